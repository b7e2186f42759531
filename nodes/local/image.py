"""The picture a video starts from."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...skyreels.conditioning.latents import ImageConditioning, check_size
from ...skyreels.config import MAX_FRAMES, MAX_SIZE, SIZE_MULTIPLE
from ...skyreels.errors import OptionError, ShapeError
from ...skyreels.image import FITS, ImageSettings, encode_image
from .. import host

#: what is made of a batch of pictures; the first is the default
BATCHES = ("first picture", "one clip each")


class SkyReelsImageConditioning:
    CATEGORY = "SkyReels/conditioning"
    SEARCH_ALIASES = [
        "image to video",
        "i2v",
        "first frame",
        "start image",
        "end image",
        "hunyuan image to video",
    ]
    DESCRIPTION = (
        "Fits a picture to the size of the video and encodes it as its first frame. Size and "
        "length of the video are chosen here."
    )
    FUNCTION = "encode"
    RETURN_TYPES = ("SKYREELS_IMAGE",)
    RETURN_NAMES = ("image_conditioning",)
    OUTPUT_TOOLTIPS = ("First-frame latents and the size of the video, for SkyReels Sampler.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        size = {"min": SIZE_MULTIPLE, "max": MAX_SIZE, "step": SIZE_MULTIPLE}
        return {
            "required": {
                "vae": ("SKYREELS_VAE", {"tooltip": "From SkyReels Load VAE."}),
                "image": (
                    "IMAGE",
                    {"tooltip": "The first frame; see `batch` for a batch of pictures."},
                ),
                "width": (
                    "INT",
                    {
                        "default": 960,
                        **size,
                        "tooltip": "Multiple of 16. Trained sizes: 960x544, 544x960, 720x720.",
                    },
                ),
                "height": (
                    "INT",
                    {
                        "default": 544,
                        **size,
                        "tooltip": "Multiple of 16. Trained sizes: 960x544, 544x960, 720x720.",
                    },
                ),
                "num_frames": (
                    "INT",
                    {
                        "default": 97,
                        "min": 1,
                        "max": MAX_FRAMES,
                        "step": 4,
                        "tooltip": "4k+1 frames at 24 fps: 97 is four seconds and the trained "
                        "length. Twice the length takes 3.3 times the time.",
                    },
                ),
                "fit": (
                    list(FITS),
                    {
                        "default": "crop",
                        "tooltip": "crop cuts the centre to the video's proportions (as the "
                        "authors do), pad adds black bars, stretch distorts.",
                    },
                ),
            },
            "optional": {
                "noise_augmentation": (
                    "FLOAT",
                    {
                        "default": 0.0,
                        "min": 0.0,
                        "max": 1.0,
                        "step": 0.01,
                        "advanced": True,
                        "tooltip": "Noise added to the picture, for more motion and less "
                        "likeness. 0 is off, 0.04 a common value.",
                    },
                ),
                "latent_strength": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        "min": 0.0,
                        "max": 2.0,
                        "step": 0.01,
                        "advanced": True,
                        "tooltip": "Factor on the picture's latents. Below 1 (0.8 to 0.95) gives "
                        "more motion.",
                    },
                ),
                "augmentation_seed": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": 2**64 - 1,
                        "control_after_generate": False,
                        "advanced": True,
                        "tooltip": "Seed of the augmentation noise. Set it to the sampler's seed "
                        "to get the result of the command line.",
                    },
                ),
                "prefix_frames": (
                    "INT",
                    {
                        "default": 1,
                        "min": 1,
                        "max": MAX_FRAMES,
                        "step": 4,
                        "advanced": True,
                        "tooltip": "1 for a picture; 4k+1 to continue a clip from its frames (the "
                        "model was trained with 1).",
                    },
                ),
                "batch": (
                    list(BATCHES),
                    {
                        "default": BATCHES[0],
                        "advanced": True,
                        "tooltip": "Of a batch of pictures: use the first one, or sample a clip "
                        "of each, one after the other. Each clip takes the time of a run.",
                    },
                ),
                "end_image": (
                    "IMAGE",
                    {
                        "tooltip": "The last frame, fitted as the first one. Untrained: the model "
                        "may cut to it or ignore it. Of a batch the first, or with one clip each "
                        "the one of each clip."
                    },
                ),
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    @classmethod
    def VALIDATE_INPUTS(
        cls, num_frames: int | None = None, width: int | None = None, height: int | None = None
    ) -> bool | str:
        # before minutes of loading; linked values are not known yet, and checked when the node runs
        given = (width, height, num_frames)
        known = zip(given, (SIZE_MULTIPLE, SIZE_MULTIPLE, 1), strict=True)
        try:
            check_size(*(least if value is None else value for value, least in known))
        except ShapeError as error:
            return str(error)
        return True

    def encode(
        self,
        vae: host.LoadedModel,
        image: Tensor,
        width: int,
        height: int,
        num_frames: int,
        fit: str,
        noise_augmentation: float = 0.0,
        latent_strength: float = 1.0,
        augmentation_seed: int = 0,
        prefix_frames: int = 1,
        batch: str = BATCHES[0],
        end_image: Tensor | None = None,
        unique_id: str | None = None,
    ) -> tuple[ImageConditioning]:
        check_size(width, height, num_frames)
        settings = ImageSettings(fit, prefix_frames, noise_augmentation, latent_strength)
        is_each = batch != BATCHES[0]
        if is_each and prefix_frames > 1:
            raise OptionError(
                f"{prefix_frames} prefix frames are the start of one clip, and batch asks for a "
                "clip of each picture: set prefix_frames to 1."
            )
        pictures = torch.split(image, 1) if is_each else [image]
        ends = _end_of_each(end_image, len(pictures))
        runtime = host.ComfyRuntime(unique_id, vae)
        encoded = [
            encode_image(
                vae.module,
                part,
                settings,
                width=width,
                height=height,
                num_frames=num_frames,
                seed=augmentation_seed,
                end_image=end,
                runtime=runtime,
            )
            for part, end in zip(pictures, ends, strict=True)
        ]
        latents = torch.cat([each.image_latents for each in encoded])
        end_latents = encoded[0].end_latents
        if end_latents is not None:
            end_latents = torch.cat([each.end_latents for each in encoded])
        return (replace(encoded[0], image_latents=latents, end_latents=end_latents),)


def _end_of_each(end_image: Tensor | None, count: int) -> Sequence[Tensor | None]:
    """The end picture of each clip.

    Args:
        end_image: one or several, or None.
        count: of clips.

    Returns:
        As many; None where there is none.

    Raises:
        ShapeError: their number fits neither one nor all clips.
    """
    if end_image is None or count == 1 or len(end_image) == 1:
        return [end_image] * count
    if len(end_image) != count:
        raise ShapeError(
            f"end_image holds {len(end_image)} pictures and image {count}: connect one for all "
            "clips, or one for each."
        )
    return torch.split(end_image, 1)
