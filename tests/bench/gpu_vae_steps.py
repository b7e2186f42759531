"""Step of tests/scripts/gpu_check.py that runs the video VAE: whole decodes.

Weights are random and drawn on the device.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from comfyui_skyreels.skyreels.config import TILINGS, VAEConfig
from comfyui_skyreels.skyreels.runtime import TorchRuntime
from comfyui_skyreels.skyreels.vae.model import VideoVAE
from comfyui_skyreels.skyreels.vae.tiling import (
    DecodePlan,
    choose_decode,
    decode_frames,
    largest_tile,
    plan_bytes,
)
from gpu_model_steps import split
from gpu_steps import Context, draw_weights
from support import tiny
from torch import Tensor

#: of decoding that are timed
MODES = ("auto", "synced", "tiled-diffusers")
#: of these only the first decode, which takes half a minute, or as long as the second
SLOW = ("diffusers tiled", "ours exact, from main memory")
#: bytes free on a card on which *exact* keeps the clip in main memory
SMALL_CARD = 8_000_000_000


class SmallCard(TorchRuntime):
    """A device that tells of no more free memory than a small card has."""

    def free_bytes(self) -> int:
        return min(super().free_bytes(), SMALL_CARD)


@torch.inference_mode()
def vae(context: Context) -> None:
    """Whole decodes beside diffusers', and what `auto` spends its time on."""
    with context.attempt("decodes"):
        decodes(context)


def decodes(context: Context) -> None:
    """97 frames of 544x960 in our modes and by diffusers in tiles: warm, then timed in turns."""
    config = VAEConfig() if context.full else tiny.VAE
    shape = torch.Size((1, 16, 25, 68, 120) if context.full else (1, 16, 2, 3, 4))
    dtype = torch.bfloat16 if context.is_cuda else torch.float32
    with torch.device("meta"):
        ours = VideoVAE(config).to(dtype)
    ours = draw_weights(ours.to_empty(device=context.device))
    latents = torch.randn(shape, device=context.device)
    runtime = TorchRuntime(context.device)
    contenders: dict[str, Callable[[], Tensor]] = {
        f"ours {mode}": partial(decode_frames, ours, latents, mode, runtime=runtime)
        for mode in MODES
    }
    with context.attempt("diffusers tiled"):
        theirs = _diffusers_twin(ours, config)
        contenders["diffusers tiled"] = lambda: _to_frames(theirs.decode(latents.to(dtype)).sample)
    contenders["ours exact, from main memory"] = partial(
        decode_frames, ours, latents, "exact", runtime=SmallCard(context.device)
    )
    _plans(context, config, shape, dtype, runtime)
    frames: dict[str, Tensor] = {}
    for name, function in contenders.items():
        with context.attempt(name):  # kernels are compiled, memory is taken from the driver
            frames[name] = _decode(context, f"{name}, cold", function)
            if name not in SLOW:
                _decode(context, f"{name}, warm", function)
        if name == "ours auto":
            with context.attempt("auto"):
                split(_named(context, "auto"), function)
    _compare(context, frames)
    frames.clear()
    with context.attempt("ours auto"):
        _decode(context, "ours auto, warm", contenders["ours auto"])
    with context.attempt("a window"):
        tile = largest_tile(shape, TILINGS["tiled-diffusers"])
        piece = latents[:, :, : tile[2], : tile[3], : tile[4]].to(dtype)
        split(_named(context, "a window"), lambda: ours.decode(piece))


def _plans(
    context: Context,
    config: VAEConfig,
    shape: torch.Size,
    dtype: torch.dtype,
    runtime: TorchRuntime,
) -> None:
    """What each mode is expected to take beside the weights."""
    plans = {
        mode: choose_decode(config, shape, runtime.free_bytes(), dtype, mode)
        for mode in ("auto", "synced")
    }
    tiles = DecodePlan("tiled", TILINGS["tiled-diffusers"])
    plans["tiled-diffusers"] = tiles, plan_bytes(tiles, config, shape, dtype)
    for mode, (plan, num_bytes) in plans.items():
        context.emit(f"ours {mode}: planned", num_bytes / 1e9, "GB", plan=str(plan))


def _to_frames(clip: Tensor) -> Tensor:
    """What diffusers decodes as what `decode_frames` returns: on the host, in 0..1."""
    return (clip[0].permute(1, 2, 3, 0).float().cpu() + 1).mul_(0.5).clamp_(0, 1)


def _compare(context: Context, frames: dict[str, Tensor]) -> None:
    """Our tiles beside diffusers', and every mode beside the decode in one pass."""
    if "ours tiled-diffusers" in frames and "diffusers tiled" in frames:
        difference = frames["ours tiled-diffusers"].sub(frames["diffusers tiled"]).abs().max()
        context.emit("ours tiled-diffusers: largest difference to diffusers", difference.item())
    whole = frames.get("ours auto")  # in one pass, where that fits
    for name, clip in frames.items():
        if whole is not None and name != "ours auto":
            error = (clip - whole).square_().mean().clamp_min(1e-12)
            context.emit(f"{name}: PSNR to ours auto", -10 * error.log10().item(), "dB")


def _diffusers_twin(ours: VideoVAE, config: VAEConfig) -> torch.nn.Module:
    from diffusers import AutoencoderKLHunyuanVideo

    with torch.device("meta"):
        theirs = AutoencoderKLHunyuanVideo(
            block_out_channels=config.block_out_channels, layers_per_block=config.layers_per_block
        )
    theirs.load_state_dict(ours.state_dict(), assign=True)
    theirs.enable_tiling()
    return theirs.eval()


def _decode(context: Context, name: str, function: Callable[[], Tensor]) -> Tensor:
    """One decode: seconds, the CPU's seconds in them, and the peak of memory beside the weights."""
    before = 0
    if context.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    frames: list[Tensor] = []
    cpu = time.process_time()
    seconds = context.seconds(lambda: frames.append(function()))
    cpu = time.process_time() - cpu
    context.emit(f"{name}: time", seconds, "s")
    context.emit(f"{name}: CPU time", cpu, "s")
    if context.is_cuda:
        context.emit(f"{name}: peak", (torch.cuda.max_memory_allocated() - before) / 1e9, "GB")
    return frames[0]


def _named(context: Context, name: str) -> Context:
    """The context with a name before that of every figure."""

    def write(record: dict) -> None:
        context.write({**record, "name": f"{name}, {record['name']}"})

    return replace(context, write=write)
