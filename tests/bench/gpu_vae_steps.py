"""Step of tests/scripts/gpu_check.py that runs the video VAE: whole decodes, and its convolutions.

Weights are random and drawn on the device.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
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

#: channels in and out, kernel, padded input in frames, rows and columns: the levels of the decoder
#: at 544x960, then an upsampler as it is and folded into one kernel of two taps an axis
CONVOLUTIONS = {
    "512 channels": (512, 512, 3, (9, 138, 242)),
    "256 channels": (256, 256, 3, (9, 274, 482)),
    "128 channels": (128, 128, 3, (9, 546, 962)),
    "256 enlarged": (256, 256, 3, (11, 274, 482)),
    "256 to 8 x 256, folded": (256, 2048, 2, (6, 137, 241)),
}
#: of decoding that are timed
MODES = ("auto", "synced", "tiled-diffusers")
TINY_CONVOLUTIONS = {
    "8 channels": (8, 8, 3, (3, 6, 6)),
    "8 to 8 x 8, folded": (8, 64, 2, (3, 4, 4)),
}


@torch.inference_mode()
def vae(context: Context) -> None:
    """Whole decodes beside diffusers', in turns; what `auto` spends its time on; convolutions."""
    with context.attempt("decodes"):
        decodes(context)
    context.tidy()
    with context.attempt("convolutions"):
        convolutions(context, benchmark=False)
    context.tidy()
    with context.attempt("convolutions, cudnn.benchmark"):  # which may search for long
        convolutions(context, benchmark=True)


def convolutions(context: Context, *, benchmark: bool) -> None:
    """TFLOP/s of 3-D convolutions in both layouts, with and without cuDNN's search."""
    if benchmark and not context.is_cuda:
        context.skip("cudnn.benchmark", "there is no cuDNN on a CPU")
        return
    suffix = ", searched" if benchmark else ""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = benchmark
    try:
        for name, shape in (CONVOLUTIONS if context.full else TINY_CONVOLUTIONS).items():
            inputs, outputs, side, size = shape
            for layout, memory_format in (
                ("NCDHW", torch.contiguous_format), ("NDHWC", torch.channels_last_3d)
            ):  # fmt: skip
                with context.attempt(f"conv {name}: {layout}{suffix}"):
                    options = {"device": context.device, "dtype": torch.bfloat16}
                    x = torch.randn(1, inputs, *size, **options)
                    weight = torch.randn(outputs, inputs, *(side,) * 3, **options)
                    x, weight = (each.to(memory_format=memory_format) for each in (x, weight))
                    seconds = context.median(lambda x=x, w=weight: F.conv3d(x, w), 2)
                    positions = [length - side + 1 for length in size]
                    flop = 2 * weight.numel() * torch.Size(positions).numel()
                    context.emit(f"conv {name}: {layout}{suffix}", flop / seconds / 1e12,
                                 "TFLOP/s", ms=round(1e3 * seconds, 3))  # fmt: skip
                    del x, weight
    finally:
        torch.backends.cudnn.benchmark = before


def decodes(context: Context) -> None:
    """97 frames of 544x960 in our modes and by diffusers in tiles: warm, then timed in turns."""
    config = VAEConfig() if context.full else tiny.VAE
    shape = torch.Size((1, 16, 25, 68, 120) if context.full else (1, 16, 5, 3, 4))
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
    _plans(context, config, shape, dtype, runtime)
    frames: dict[str, Tensor] = {}
    for name, function in contenders.items():
        with context.attempt(name):  # kernels are compiled, memory is taken from the driver
            frames[name] = _decode(context, f"{name}, cold", function)
    _compare(context, frames)
    frames.clear()
    for turn in range(2):
        for name, function in contenders.items():
            if turn and name not in ("ours auto", "diffusers tiled"):
                continue
            with context.attempt(name):
                _decode(context, f"{name}, warm", function)
        if not turn:
            with context.attempt("auto"):
                split(_named(context, "auto"), contenders["ours auto"])
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
