"""Shapes and spaces of latents, legal sizes of clips, first-image latents, and a quick preview."""

import math
from dataclasses import dataclass
from typing import SupportsIndex

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import (
    MAX_FRAMES,
    MAX_SIZE,
    SCALING_FACTOR,
    SIZE_MULTIPLE,
    SPATIAL_COMPRESSION,
    TEMPORAL_COMPRESSION,
    TransformerConfig,
)
from ..errors import OptionError, ShapeError


@dataclass(frozen=True)
class ImageConditioning:
    """The first latent frames of a clip, perhaps the last one, and the clip's size.

    Attributes:
        image_latents: [1, 16, k, h, w] float32 on the CPU, model space, 1 <= k <= T; None for text
            to video, which has a size and no picture.
        width: of the video in pixels.
        height: of the video in pixels.
        num_frames: of the video, 4n + 1.
        end_latents: [1, 16, 1, h, w] likewise, of the picture that the clip ends with; None leaves
            the end open. The model was not trained with one.
        origin: how the picture became latents, see `image.PictureOrigin`; it decides nothing.
    """

    image_latents: Tensor | None
    width: int
    height: int
    num_frames: int
    end_latents: Tensor | None = None
    origin: object = None

    @property
    def latent_shape(self) -> tuple[int, int, int, int, int]:
        """[1, 16, T, h, w] of the whole clip."""
        return latent_shape(self.num_frames, self.height, self.width)

    def padded(self) -> Tensor | None:
        """The model's conditioning [1, 16, T, h, w]: what is given, and zeros between and after."""
        if self.image_latents is None:
            return None
        latents = torch.zeros(self.latent_shape)
        latents[:, :, : self.image_latents.shape[2]] = self.image_latents
        if self.end_latents is not None:
            latents[:, :, -1:] = self.end_latents
        return latents


def check_picture(config: TransformerConfig, has_picture: bool) -> None:
    """Refuse a picture where the transformer takes none, and none where it needs one.

    Args:
        config: of the transformer.
        has_picture: whether a clip starts from one.

    Raises:
        OptionError: names the model and the fix.
    """
    if has_picture and not config.takes_image:
        raise OptionError(
            f"The transformer makes videos from text alone ({config.in_channels} input channels) "
            "and takes no picture: leave the picture out, or load the image-to-video transformer "
            f"({2 * config.out_channels} channels)."
        )
    if config.takes_image and not has_picture:
        raise OptionError(
            f"The transformer is image-to-video ({config.in_channels} input channels) and needs a "
            "picture to start from: give one, or load the text-to-video transformer "
            f"({config.out_channels} channels)."
        )


def check_conditioning(image: ImageConditioning) -> None:
    """Refuse latents of pictures that do not fit the size of their video.

    Raises:
        ShapeError: names what does not fit.
    """
    check_size(image.width, image.height, image.num_frames)
    if image.image_latents is None:
        if image.end_latents is not None:
            raise ShapeError("An end picture needs one to start from: give both, or none.")
        return
    _check_start(image)
    if image.end_latents is not None:
        _check_end(image.end_latents, image)


def _check_start(image: ImageConditioning) -> None:
    latents, (_, channels, frames, height, width) = image.image_latents, image.latent_shape
    if not isinstance(latents, Tensor) or latents.ndim != 5:
        shape = list(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
        raise ShapeError(
            f"Image latents must be [1, {channels}, k, {height}, {width}] for a video of "
            f"{image.width}x{image.height}; got {shape}. Make them with `encode_image`."
        )
    if latents.shape[0] != 1:
        raise ShapeError(
            f"Image latents of {latents.shape[0]} pictures: sample one after the other, or all "
            "with `sample_batch`."
        )
    if tuple(latents.shape[1:2] + latents.shape[3:]) != (channels, height, width):
        raise ShapeError(
            f"Image latents of {list(latents.shape)} do not fit a video of {image.width}x"
            f"{image.height}, which needs [1, {channels}, k, {height}, {width}]: encode the "
            "picture at that size."
        )
    if not 1 <= latents.shape[2] <= frames:
        raise ShapeError(
            f"Image latents of {latents.shape[2]} frames do not fit a video of "
            f"{image.num_frames} frames, which has {frames} latent frames: encode fewer."
        )
    _check_numbers(latents, "image latents")


def _check_end(latents: Tensor, image: ImageConditioning) -> None:
    assert image.image_latents is not None
    _, channels, frames, height, width = image.latent_shape
    expected = [1, channels, 1, height, width]
    if not isinstance(latents, Tensor) or list(latents.shape) != expected:
        shape = list(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
        raise ShapeError(
            f"The end picture's latents must be {expected} for a video of {image.width}x"
            f"{image.height}; got {shape}. Make them with `encode_image`."
        )
    if image.image_latents.shape[2] == frames:
        raise ShapeError(
            f"A video of {image.num_frames} frames has no room for an end picture behind those it "
            f"starts from: use at least {image.num_frames + TEMPORAL_COMPRESSION} frames."
        )
    _check_numbers(latents, "end picture's latents")


def _check_numbers(latents: Tensor, name: str) -> None:
    if not latents.is_floating_point() or not bool(latents.isfinite().all()):
        raise ShapeError(
            f"The {name} hold NaN or infinity, or are no floats: check the picture, and load "
            "the VAE in bf16 or fp32 (fp16 can overflow)."
        )


def latent_shape(num_frames: int, height: int, width: int) -> tuple[int, int, int, int, int]:
    """[1, 16, T, h, w] of a clip; T = (num_frames - 1) / 4 + 1."""
    frames = (num_frames - 1) // TEMPORAL_COMPRESSION + 1
    return (1, 16, frames, height // SPATIAL_COMPRESSION, width // SPATIAL_COMPRESSION)


def to_model_space(vae_latents: Tensor) -> Tensor:
    """Scale VAE-space latents, as in a LATENT, for the transformer."""
    return vae_latents * SCALING_FACTOR


def to_vae_space(latents: Tensor) -> Tensor:
    """Scale the transformer's latents for the VAE."""
    return latents / SCALING_FACTOR


def latents_to_rgb(latents: Tensor, factors: Tensor, bias: Tensor, max_pixels: int) -> Tensor:
    """The latent frames of a clip as small pictures, by one linear map for every latent pixel.

    A decode would take seconds; this is what a preview of every step can cost.

    Args:
        latents: [1, 16, T, h, w] on any device, model space.
        factors: [16, 3], to RGB in [-1, 1]; of the host, which knows them for its own previews.
        bias: [3].
        max_pixels: of all frames together; above it they are scaled down alike.

    Returns:
        [T, H, W, 3] uint8 on the device of the latents; one frame for each latent frame, H W = h w
        where max_pixels allows it.

    Raises:
        ShapeError: latents of another shape.
    """
    if latents.ndim != 5 or latents.shape[:2] != (1, factors.shape[0]):
        raise ShapeError(
            f"A preview is made of latents [1, {factors.shape[0]}, T, h, w]; got "
            f"{list(latents.shape)}."
        )
    factors, bias = (part.to(latents.device, torch.float32) for part in (factors, bias))
    frames = torch.einsum("cthw,cr->trhw", latents[0].float(), factors) + bias[:, None, None]
    num_frames, _, height, width = frames.shape
    scale = math.sqrt(max_pixels / (num_frames * height * width))
    if scale < 1:
        size = (max(1, int(height * scale)), max(1, int(width * scale)))
        frames = F.interpolate(frames, size=size, mode="area")
    levels = (frames + 1).mul(127.5).clamp(0, 255).round()
    return levels.to(torch.uint8).permute(0, 2, 3, 1)


def is_whole(value: object) -> bool:
    """Whether a value is a whole number: Python's or NumPy's, but not a truth value."""
    return isinstance(value, SupportsIndex) and not isinstance(value, bool | Tensor)


def seeded_generator(seed: int) -> torch.Generator:
    """Make the random generator of a run; the clip's noise must be the first draw.

    Returns:
        A CPU generator, so that a seed gives the same noise on every device.

    Raises:
        OptionError: the seed is not within 0..2^64-1.
    """
    if not is_whole(seed) or not 0 <= seed < 2**64:
        raise OptionError(f"Seed {seed} is not a whole number within 0..2^64-1: use one.")
    return torch.Generator("cpu").manual_seed(int(seed))


def nearest_frames(num_frames: int) -> int:
    """The legal frame count (4n + 1) closest to a number."""
    num_frames = max(1, min(num_frames, MAX_FRAMES))
    return round((num_frames - 1) / TEMPORAL_COMPRESSION) * TEMPORAL_COMPRESSION + 1


def nearest_size(pixels: int) -> int:
    """The legal width or height (a multiple of 16) closest to a number."""
    return round(max(SIZE_MULTIPLE, min(pixels, MAX_SIZE)) / SIZE_MULTIPLE) * SIZE_MULTIPLE


def check_size(width: int, height: int, num_frames: int) -> None:
    """Refuse sizes that the model cannot generate.

    Raises:
        ShapeError: names the value, the rule and the nearest legal value.
    """
    for name, value in (("Width", width), ("Height", height), ("Number of frames", num_frames)):
        if not is_whole(value):
            raise ShapeError(f"{name} {value!r} is not a whole number.")
    for name, value in (("Width", width), ("Height", height)):
        if value < SIZE_MULTIPLE or value % SIZE_MULTIPLE:
            raise ShapeError(
                f"{name} {value} is not a multiple of {SIZE_MULTIPLE}: use {nearest_size(value)}."
            )
        if value > MAX_SIZE:
            raise ShapeError(f"{name} {value} is more than {MAX_SIZE}: use 960 or 544.")
    if num_frames < 1 or (num_frames - 1) % TEMPORAL_COMPRESSION:
        raise ShapeError(
            f"{num_frames} frames is not a multiple of 4 plus 1: use {nearest_frames(num_frames)}."
        )
    if num_frames > MAX_FRAMES:
        raise ShapeError(f"{num_frames} frames is more than {MAX_FRAMES}: use 97.")
