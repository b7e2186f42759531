"""Latents to frames."""

from typing import Any

import torch
from torch import Tensor

from ...skyreels.config import DECODE_MODES
from ...skyreels.vae.tiling import decode_frames, explicit_tiling
from .. import host
from . import convert


class SkyReelsVAEDecode:
    CATEGORY = "SkyReels/video"
    SEARCH_ALIASES = ["decode", "latent to video", "hunyuan vae decode", "tiled decode"]
    DESCRIPTION = (
        "Decodes latents, ours or core's, to frames. auto takes the best that fits: the whole clip "
        "in one pass, else synced (a few frames at a time, without seams), else tiles."
    )
    FUNCTION = "decode"
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("images",)
    OUTPUT_TOOLTIPS = (
        "The frames, 4T - 3 of them, for CreateVideo at 24 fps; those of a batch in a row.",
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        tile = {"default": 0, "min": 0, "max": 4096, "step": 8, "advanced": True}
        window = {"default": 0, "min": 0, "max": 1024, "step": 4, "advanced": True}
        return {
            "required": {
                "vae": ("SKYREELS_VAE", {"tooltip": "From SkyReels Load VAE."}),
                "samples": (
                    "LATENT",
                    {"tooltip": "HunyuanVideo latents [1, 16, T, h, w], from any sampler."},
                ),
                "mode": (
                    list(DECODE_MODES),
                    {
                        "default": "auto",
                        "tooltip": "For 960x544x97 in bf16: full needs 38 GB, synced 9 GB or, in "
                        "strips, 5 GB, tiled 9 GB, tiled-tencent (64-frame windows) 8 GB, "
                        "tiled-diffusers (16-frame windows, may flicker) 3 GB; exact (full "
                        "with the clip in main memory) 4 GB, and 26 GB there.",
                    },
                ),
            },
            "optional": {
                "tile_size": (
                    "INT",
                    {
                        **tile,
                        "tooltip": "Tile height and width in pixels, multiple of 8; 0 uses the "
                        "mode's value (256; auto chooses). Larger tiles have fewer seams and need "
                        "more memory.",
                    },
                ),
                "tile_stride": (
                    "INT",
                    {
                        **tile,
                        "tooltip": "Distance between tiles in pixels, at most tile_size; 0 uses "
                        "the mode's value (192). The overlap is cross-faded.",
                    },
                ),
                "tile_frames": (
                    "INT",
                    {
                        **window,
                        "tooltip": "Frames per window, multiple of 4; 0 uses the mode's value.",
                    },
                ),
                "tile_frames_stride": (
                    "INT",
                    {
                        **window,
                        "tooltip": "Distance between windows in frames, at most tile_frames; 0 "
                        "uses the mode's value.",
                    },
                ),
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    def decode(
        self,
        vae: host.LoadedModel,
        samples: convert.Latent,
        mode: str,
        tile_size: int = 0,
        tile_stride: int = 0,
        tile_frames: int = 0,
        tile_frames_stride: int = 0,
        unique_id: str | None = None,
    ) -> tuple[Tensor]:
        latents = convert.latent_samples(samples)
        tiling = explicit_tiling(mode, tile_size, tile_stride, tile_frames, tile_frames_stride)
        runtime = host.ComfyRuntime(unique_id, vae)
        clips = [
            decode_frames(vae.module, clip, mode, tiling=tiling, runtime=runtime)
            for clip in torch.split(latents, 1)
        ]
        return (clips[0] if len(clips) == 1 else torch.cat(clips),)
