"""What a run will take, before it is queued."""

from typing import Any

import torch

from ...skyreels.builtin import BUILTIN_FOLDER, BUILTIN_NAME
from ...skyreels.conditioning.latents import check_size
from ...skyreels.config import (
    ATTENTIONS,
    DECODE_MODES,
    MAX_FRAMES,
    MAX_SIZE,
    SIZE_MULTIPLE,
    TRANSFORMER_PRECISIONS,
    TransformerConfig,
    VAEConfig,
)
from ...skyreels.plan import STORED, Choice, Job, Preflight, preflight, vae_dtype
from ...skyreels.weights.inspect import CheckpointInfo, inspect
from ...skyreels.weights.load import check_transformer
from .. import host
from .loaders import naming_the_loader, transformer_choices, transformer_folders
from .sampler import STEPS


class SkyReelsPlan:
    CATEGORY = "SkyReels/sampling"
    SEARCH_ALIASES = ["vram", "memory", "will it fit", "out of memory"]
    DESCRIPTION = (
        "Shows memory and time of a clip in each precision, resident and streamed, before anything "
        "is loaded: from the file's header, the free memory and a short probe of the card. -> "
        "marks what would be taken, no what does not fit."
    )
    FUNCTION = "plan"
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("plan",)
    OUTPUT_TOOLTIPS = ("The same text as on the node.",)
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        size = {"min": SIZE_MULTIPLE, "max": MAX_SIZE, "step": SIZE_MULTIPLE}
        return {
            "required": {
                "transformer": (
                    transformer_choices(),
                    {"tooltip": "As in SkyReels Load Transformer; only its header is read."},
                ),
                "width": (
                    "INT",
                    {"default": 960, **size, "tooltip": "Of the video, a multiple of 16."},
                ),
                "height": (
                    "INT",
                    {"default": 544, **size, "tooltip": "Of the video, a multiple of 16."},
                ),
                "num_frames": (
                    "INT",
                    {
                        "default": 97,
                        "min": 1,
                        "max": MAX_FRAMES,
                        "step": 4,
                        "tooltip": "4k+1 frames; 97 is four seconds.",
                    },
                ),
                **STEPS,
                "cfg": (
                    "FLOAT",
                    {
                        "default": 6.0,
                        "min": 0.0,
                        "max": 30.0,
                        "step": 0.1,
                        "tooltip": "Above 1 a step takes two model evaluations.",
                    },
                ),
            },
            "optional": {
                "precision": (
                    list(TRANSFORMER_PRECISIONS),
                    {
                        "default": "auto",
                        "tooltip": "As in SkyReels Load Transformer; the table shows the others "
                        "too.",
                    },
                ),
                "attention": (
                    list(ATTENTIONS),
                    {"default": "exact", "tooltip": "As in SkyReels Sampler."},
                ),
                "decode": (
                    list(DECODE_MODES),
                    {"default": "auto", "tooltip": "As in SkyReels VAE Decode."},
                ),
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    @classmethod
    def IS_CHANGED(cls, **inputs: Any) -> float:
        return float("nan")  # the free memory is another one each time

    @classmethod
    def VALIDATE_INPUTS(cls, transformer: str | None = None) -> bool | str:
        return host.check_choice("diffusion_models", transformer, transformer_choices())

    def plan(
        self,
        transformer: str,
        width: int,
        height: int,
        num_frames: int,
        steps: int,
        cfg: float,
        precision: str = "auto",
        attention: str = "exact",
        decode: str = "auto",
        unique_id: str | None = None,
    ) -> dict[str, Any]:
        runtime = host.ComfyRuntime(unique_id)
        size = (width, height, num_frames)
        choice = Choice(attention, decode)
        found = plan_clip(runtime, transformer, size, steps, cfg, precision, choice)
        runtime.say(found.text)
        return {"ui": {"text": (found.text,)}, "result": (found.text,)}


def plan_clip(
    runtime: host.ComfyRuntime,
    transformer: str,
    size: tuple[int, int, int],
    steps: int,
    cfg: float,
    precision: str,
    choice: Choice,
) -> Preflight:
    """What a clip would take here, with memory of other models counted as free.

    Args:
        runtime: whose device computes.
        transformer: as its loader lists it.
        size: width, height, frames.
        steps: of the schedule.
        cfg: above 1 there are two evaluations a step.
        precision: that the loader is asked for.
        choice: attention and decode.

    Returns:
        The chosen plan and the others.

    Raises:
        SkyReelsError: an illegal size, or a file that cannot be used.
    """
    width, height, num_frames = size
    check_size(width, height, num_frames)
    info, vae = header(transformer)
    if transformer == BUILTIN_NAME and precision == "auto":
        precision = "fp32"  # as its loader
    assert isinstance(info.config, TransformerConfig)
    job = Job(
        width=width,
        height=height,
        num_frames=num_frames,
        num_steps=steps,
        num_guided=steps if cfg > 1 else 0,
        config=info.config,
        vae=vae,
        vae_dtype=torch.float32 if transformer == BUILTIN_NAME else vae_dtype(runtime.device),
    )
    return preflight(
        runtime,
        job,
        STORED.get(next(iter(info.dtypes)), "bf16"),
        precision,
        choice,
        reclaimable=runtime.reclaimable_bytes(),
    )


def header(transformer: str) -> tuple[CheckpointInfo, VAEConfig]:
    """What the header of a transformer says, and the sizes of the VAE that belongs to it."""
    if transformer == BUILTIN_NAME:
        vae = inspect(BUILTIN_FOLDER / "vae").config
        assert isinstance(vae, VAEConfig)
        return check_transformer(BUILTIN_FOLDER / "transformer"), vae
    with naming_the_loader():
        path = host.resolve("diffusion_models", transformer, transformer_folders())
        return check_transformer(path), VAEConfig()
