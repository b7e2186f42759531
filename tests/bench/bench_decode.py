"""Time the decode modes on this machine and count what each costs at full size.

    python tests/bench/bench_decode.py
    python tests/bench/bench_decode.py --device cuda --dtype bfloat16 --full-size \\
        --frames 97 --height 544 --width 960
    python tests/bench/bench_decode.py --beside-diffusers --repeats 7

Without options a small VAE decodes a small clip, so that it also runs on a CPU. The counts (decoder
calls, FLOPs, peak bytes) are always those of the full-size decoder at 97x544x960 in bf16, on
shape-only tensors. With --beside-diffusers a VAE of a quarter of the width decodes 17 frames of
256x256 in one pass, ours and diffusers' in turns. Ends with one line of JSON.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from comfyui_skyreels.skyreels.config import TILINGS, Tiling, VAEConfig
from comfyui_skyreels.skyreels.runtime import TorchRuntime
from comfyui_skyreels.skyreels.vae.model import VideoVAE
from comfyui_skyreels.skyreels.vae.store import HostStore
from comfyui_skyreels.skyreels.vae.tiling import (
    DecodePlan,
    count_decodes,
    decode_frames,
    largest_tile,
    plan_bytes,
    tile_starts,
    window_starts,
)
from support.peak import PeakBytes

ROOT = Path(__file__).resolve().parents[2]
MODES = ("full", "synced", "exact", *TILINGS)
FULL_SIZE = torch.Size((1, 16, 25, 68, 120))


def tile_shapes(shape: torch.Size, tiling: Tiling | None) -> Counter:
    """How many decoder calls receive latents of which [T, h, w]."""
    starts, length = window_starts(shape[2], tiling)
    tops, lefts = tile_starts(shape, tiling)
    _, _, _, height, width = largest_tile(shape, tiling)
    return Counter(
        (min(length, shape[2] - t), min(height, shape[3] - y), min(width, shape[4] - x))
        for t in starts
        for y in tops
        for x in lefts
    )


def count_full_size(mode: str) -> dict[str, float]:
    """Decoder calls, TFLOP and peak GB of one 97x544x960 decode by the full-size VAE in bf16."""
    tiling = TILINGS.get(mode)
    with torch.device("meta"):
        vae = VideoVAE(VAEConfig()).bfloat16()
    if mode in ("synced", "exact"):
        latents = torch.empty(FULL_SIZE, device="meta", dtype=torch.bfloat16)
        store = HostStore(torch.device("meta"), _uncounted)
        with FlopCounterMode(display=False) as counter, PeakBytes() as memory:
            decoded: Any = (
                vae.iter_synced(latents) if mode == "synced" else vae.iter_exact(latents, store)
            )
            for piece in decoded:
                del piece
        estimate = plan_bytes(DecodePlan(mode), vae.config, FULL_SIZE, torch.bfloat16)
        return _counts(1, counter.get_total_flops(), memory.peak, estimate)
    flops = peak = 0
    for (frames, height, width), calls in tile_shapes(FULL_SIZE, tiling).items():
        latents = torch.empty(1, 16, frames, height, width, device="meta", dtype=torch.bfloat16)
        with FlopCounterMode(display=False) as counter, PeakBytes() as memory:
            vae.decode(latents)
        flops += calls * counter.get_total_flops()
        peak = max(peak, memory.peak)
    estimate = plan_bytes(DecodePlan(mode, tiling), vae.config, FULL_SIZE, torch.bfloat16)
    return _counts(count_decodes(FULL_SIZE, tiling), flops, peak, estimate)


def _uncounted(num_bytes: int) -> torch.Tensor:
    """Main memory, of which the peak on the device has nothing."""
    with _disable_current_modes():
        return torch.empty(num_bytes, dtype=torch.uint8, device="meta")


def _counts(calls: int, flops: int, peak: int, estimate: int) -> dict[str, float]:
    return {
        "calls": calls,
        "tflop": round(flops / 1e12, 1),
        "peak_gb": round(peak / 1e9, 2),
        "estimate_gb": round(estimate / 1e9, 2),
    }


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_mode(vae: VideoVAE, latents: torch.Tensor, mode: str, repeats: int) -> dict[str, float]:
    """Seconds of decode_frames after one warm-up, and on CUDA the peak bytes beside the weights."""
    runtime = TorchRuntime(next(vae.parameters()).device)
    on_cuda = runtime.device.type == "cuda"
    seconds: list[float] = []
    resident = torch.cuda.memory_allocated(runtime.device) if on_cuda else 0
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(runtime.device)
    for repeat in range(repeats + 1):
        synchronise(runtime.device)
        start = time.perf_counter()
        decode_frames(vae, latents, mode, runtime=runtime)
        synchronise(runtime.device)
        if repeat > 0:
            seconds.append(time.perf_counter() - start)
    result = {
        "seconds": round(statistics.median(seconds), 4),
        "spread": round(max(seconds) - min(seconds), 4),
    }
    if on_cuda:
        peak = torch.cuda.max_memory_allocated(runtime.device) - resident
        result["measured_gb"] = round(peak / 1e9, 2)
    return result


@torch.inference_mode()
def beside_diffusers(repeats: int) -> dict[str, float]:
    """Median seconds of a decode in one pass by both, in turns, after one of each."""
    from diffusers import AutoencoderKLHunyuanVideo

    config = VAEConfig(block_out_channels=(32, 64, 128, 128))
    ours = VideoVAE(config).eval()
    theirs = AutoencoderKLHunyuanVideo(block_out_channels=config.block_out_channels).eval()
    theirs.load_state_dict(ours.state_dict())
    theirs.use_framewise_decoding = False
    latents = torch.randn(1, 16, 5, 32, 32)
    taken: dict[str, list[float]] = {"ours": [], "diffusers": []}
    for turn in range(repeats + 1):
        for name, decode in (("ours", ours.decode), ("diffusers", theirs.decode)):
            start = time.perf_counter()
            decode(latents)
            if turn:
                taken[name].append(time.perf_counter() - start)
    seconds = {name: statistics.median(each) for name, each in taken.items()}
    return {
        **{name: round(value, 3) for name, value in seconds.items()},
        "ratio": round(seconds["ours"] / seconds["diffusers"], 3),
    }


def commit() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--full-size", action="store_true", help="the real channel widths")
    parser.add_argument("--frames", type=int, default=25)
    parser.add_argument("--height", type=int, default=16)
    parser.add_argument("--width", type=int, default=264)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    parser.add_argument("--beside-diffusers", action="store_true")
    options = parser.parse_args()

    torch.manual_seed(0)
    if options.beside_diffusers:
        found = beside_diffusers(options.repeats)
        print(json.dumps({"bench": "decode beside diffusers", "commit": commit(), **found}))
        return
    small = VAEConfig(block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4)
    config = VAEConfig() if options.full_size else small
    vae = VideoVAE(config).to(options.device, getattr(torch, options.dtype)).eval()
    latents = torch.randn(
        1, 16, (options.frames - 1) // 4 + 1, options.height // 8, options.width // 8
    )
    rows = {}
    print(f"{'mode':18}{'median s':>10}{'spread s':>10}   full size, bf16: calls  TFLOP  peak GB")
    for mode in options.modes:
        timed = time_mode(vae, latents, mode, options.repeats)
        counted = count_full_size(mode)
        rows[mode] = {**timed, "full_size": counted}
        print(
            f"{mode:18}{timed['seconds']:10.3f}{timed['spread']:10.3f}"
            f"{counted['calls']:26}{counted['tflop']:7.0f}{counted['peak_gb']:9.2f}"
        )
    on_cuda = torch.device(options.device).type == "cuda"
    print(
        json.dumps(
            {
                "bench": "decode",
                "device": torch.cuda.get_device_name() if on_cuda else platform.machine(),
                "torch": torch.__version__,
                "commit": commit(),
                "dtype": options.dtype,
                "channels": config.block_out_channels,
                "size": [options.frames, options.height, options.width],
                "modes": rows,
            }
        )
    )


if __name__ == "__main__":
    main()
