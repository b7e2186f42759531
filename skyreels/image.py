"""Encode an image as the first-frame latents that condition the transformer."""

import hashlib
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .conditioning.latents import (
    ImageConditioning,
    check_size,
    latent_shape,
    nearest_frames,
    seeded_generator,
    to_model_space,
)
from .config import TEMPORAL_COMPRESSION
from .errors import DependencyError, OptionError, ShapeError
from .runtime import Runtime
from .runtime.ladder import retried
from .runtime.offload import on_device
from .vae.budget import encode_bytes, streamed_bytes
from .vae.encode import encode_streamed
from .vae.model import VideoVAE

#: how an image of other proportions is resized to the video, see `fit_image`
FITS = ("crop", "pad", "stretch")
#: what is cut to 1 without a word; the same below 0
MAX_OVERSHOOT = 1.5


def fit_image(image: Tensor, width: int, height: int, fit: str = "crop") -> Tensor:
    """Resize images to the size of the video, as the official code does.

    An image of the right size is not changed; others are resized by Lanczos in 8 bits per channel.

    Args:
        image: [F, H, W, C] float in [0, 1]; channels beyond three (alpha) are dropped.
        width: of the video in pixels.
        height: of the video in pixels.
        fit: "crop" cuts the centre to the video's proportions, "pad" adds black bars, "stretch"
            distorts.

    Returns:
        [1, 3, F, height, width] float32 in [-1, 1].

    Raises:
        ShapeError: not an image, one with NaN or infinity, or one of another range.
        OptionError: unknown fit.

    Source: SkyworkAI/SkyReels-V1 @cb0ceaa, video_generate.py (centre crop), then the Lanczos
        resize of diffusers' VideoProcessor.
    """
    _check_fit(fit)
    if image.ndim != 4 or image.shape[-1] not in (3, 4) or 0 in image.shape:
        raise ShapeError(
            f"Image must be [frames, height, width, 3 or 4 channels]; got {list(image.shape)}."
        )
    if not image.is_floating_point():
        raise ShapeError(
            f"Image must be float in [0, 1]; got {image.dtype}. Convert with image.float() / 255."
        )
    pixels = image[..., :3].detach().to("cpu", torch.float32)
    _check_range(pixels)
    pixels = pixels.clamp(0.0, 1.0)
    if pixels.shape[1:3] != (height, width):
        frames = [_resize(frame, width, height, fit) for frame in pixels]
        pixels = torch.stack(frames)
    return (pixels * 2.0 - 1.0).permute(3, 0, 1, 2)[None].contiguous()


def _check_range(pixels: Tensor) -> None:
    """Refuse what would become white or black; a resize overshoots [0, 1] a little, and is cut."""
    if not bool(pixels.isfinite().all()):
        raise ShapeError("Image contains NaN or infinity: check where it comes from.")
    low, high = pixels.aminmax()
    if high > MAX_OVERSHOOT:
        raise ShapeError(
            f"Image has values up to {high:.4g}, and must be in [0, 1]: divide one of 0..255 by "
            "255, and tone-map one with a high dynamic range."
        )
    if low < 1 - MAX_OVERSHOOT:
        raise ShapeError(
            f"Image has values down to {low:.4g}, and must be in [0, 1]: convert one of -1..1 with "
            "(image + 1) / 2."
        )


def _check_fit(fit: str) -> None:
    if fit not in FITS:
        raise OptionError(f"Fit {fit!r} is not one of {', '.join(FITS)}.")


def _resize(frame: Tensor, width: int, height: int, fit: str) -> Tensor:
    try:
        from PIL import Image
    except ImportError:
        raise DependencyError(
            "Resizing an image needs Pillow: pip install pillow, or use an image of "
            f"{width}x{height}."
        ) from None
    resized = Image.fromarray((frame * 255.0).round().to(torch.uint8).numpy())
    size = (width, height)
    if fit == "crop":
        w, h = resized.size
        if h * width > w * height:
            crop_w, crop_h = w, max(1, w * height // width)
        else:
            crop_w, crop_h = max(1, h * width // height), h
        left, top = (w - crop_w) / 2, (h - crop_h) / 2
        resized = resized.crop((left, top, left + crop_w, top + crop_h))
    elif fit == "pad":
        scale = min(width / resized.width, height / resized.height)
        size = (max(1, round(resized.width * scale)), max(1, round(resized.height * scale)))
    resized = resized.resize(size, Image.Resampling.LANCZOS)
    if size != (width, height):
        canvas = Image.new("RGB", (width, height))
        canvas.paste(resized, ((width - size[0]) // 2, (height - size[1]) // 2))
        resized = canvas
    return torch.from_numpy(np.asarray(resized, dtype=np.float32) / 255.0)


def _vae_advice(dtype: torch.dtype) -> str:
    if dtype == torch.float16:  # whose numbers end at 65504
        return "load it in bf16 or fp32."
    return "check its file with `python -m skyreels inspect`, or download it again."


@dataclass(frozen=True)
class ImageSettings:
    """How a picture becomes the start of a clip.

    Attributes:
        fit: see `fit_image`.
        prefix_frames: 1, or 4k + 1 frames to continue a clip (the model was trained with 1).
        noise_augmentation: std of noise added to the picture before encoding, 0..1; more gives more
            motion and less likeness. Pixels of -1 (black bars) stay. 0.04 is a common value.
        latent_strength: factor on the image latents, 0..10; below 1 gives more motion.
    """

    fit: str = "crop"
    prefix_frames: int = 1
    noise_augmentation: float = 0.0
    latent_strength: float = 1.0

    def __post_init__(self) -> None:
        _check_fit(self.fit)
        if self.prefix_frames < 1 or (self.prefix_frames - 1) % TEMPORAL_COMPRESSION:
            raise ShapeError(
                f"{self.prefix_frames} prefix frames is not a multiple of 4 plus 1: use "
                f"{nearest_frames(self.prefix_frames)}."
            )
        if not 0.0 <= self.noise_augmentation <= 1.0:
            raise OptionError(
                f"Noise augmentation {self.noise_augmentation} is not within 0..1: use 0.04."
            )
        if not 0.0 <= self.latent_strength <= 10.0:
            raise OptionError(f"Latent strength {self.latent_strength} is not within 0..10: use 1.")


@dataclass(frozen=True)
class PictureOrigin:
    """How a picture became the start of a clip, for the clip's receipt.

    Attributes:
        settings: of the picture.
        seed: of its noise.
        width: of the picture in pixels, before it was fitted.
        height: likewise.
        sha256: of the picture, see `picture_digest`.
        has_end: whether the clip ends with a picture too.
        vae: what the VAE was loaded from, see `VideoVAE.source`.
    """

    settings: ImageSettings
    seed: int
    width: int
    height: int
    sha256: str
    has_end: bool
    vae: object

    @property
    def picture(self) -> dict[str, Any]:
        """Size and hash, as a receipt has them."""
        return {"width": self.width, "height": self.height, "sha256": self.sha256}


def picture_digest(image: Tensor) -> str:
    """A hash of a picture that is the same however its file was packed.

    Args:
        image: [F, H, W, C] float in 0..1; the first frame and three channels count.

    Returns:
        64 hexadecimal digits, of its size and its pixels in 8 bits.
    """
    pixels = image[0, :, :, :3].detach().to("cpu", torch.float32)
    levels = pixels.clamp(0.0, 1.0).mul(255.0).round().to(torch.uint8).contiguous()
    digest = hashlib.sha256(f"{list(levels.shape)}".encode())
    digest.update(levels.numpy().tobytes())
    return digest.hexdigest()


def encode_image(
    vae: VideoVAE,
    image: Tensor,
    settings: ImageSettings = ImageSettings(),
    *,
    width: int,
    height: int,
    num_frames: int,
    seed: int = 0,
    end_image: Tensor | None = None,
    runtime: Runtime,
) -> ImageConditioning:
    """Encode an image alone, to the mode of its posterior in model space.

    An end image is encoded alone too, as ComfyUI's CosmosImageToVideoLatent does with its own, so
    that the last latent frame, which stands for four frames of the video, shows a still of it.

    Args:
        vae: on any device; back there afterwards.
        image: [F, H, W, C] float in 0..1; its first `prefix_frames` frames are used.
        settings: fit, frames given, and what is done to the picture for more motion.
        width: of the video, in pixels.
        height: of the video, in pixels.
        num_frames: of the video, 4k + 1.
        seed: of the augmentation noise: drawn after the clip's own noise, so that one seed gives
            one result however the steps are wired.
        end_image: [F, H, W, C] likewise, of which the first frame is what the clip ends with. The
            model was not trained with one. The settings hold for it too.
        runtime: progress "encode"; its device computes.

    Returns:
        The latents, with the size of the video.

    Raises:
        ShapeError: illegal sizes, fewer frames than `prefix_frames`, no room for an end image, or
            latents that are not finite.
    """
    check_size(width, height, num_frames)
    prefix_frames = settings.prefix_frames
    if image.ndim == 4 and len(image) and prefix_frames > min(num_frames, image.shape[0]):
        raise ShapeError(
            f"{prefix_frames} prefix frames are too many: the image has {image.shape[0]} and the "
            f"video {num_frames}. Use 1 for a single image."
        )
    if end_image is not None and prefix_frames == num_frames:
        raise ShapeError(
            f"A video of {num_frames} frames has no room for an end picture behind those it starts "
            f"from: use at least {num_frames + TEMPORAL_COMPRESSION} frames."
        )
    generator = seeded_generator(seed)
    if settings.noise_augmentation > 0:
        torch.randn(latent_shape(num_frames, height, width), generator=generator)

    def fitted(frames: Tensor) -> Tensor:
        video = fit_image(frames, width, height, settings.fit)
        if settings.noise_augmentation > 0:
            noise = torch.randn(video.shape, generator=generator) * settings.noise_augmentation
            video = torch.where(video == -1.0, video, video + noise)
        return video

    video = fitted(image[:prefix_frames])
    end = None if end_image is None else fitted(end_image[:1])
    weight = next(vae.parameters())
    needed = encode_bytes(vae.config, video.shape, weight.dtype)
    # room is made for the little that a long prefix can do with, so that others may stay
    least = min(needed, streamed_bytes(vae.config, video.shape, weight.dtype))
    runtime.check_interrupt()
    with runtime.place(vae, least), torch.inference_mode(), on_device(vae, runtime.device):
        runtime.progress("encode", 0, 1)

        def encode(video: Tensor) -> Tensor:
            moved = video.to(runtime.device, weight.dtype)
            if needed > least and needed > runtime.free_bytes():
                return encode_streamed(vae, moved, check=runtime.check_interrupt)
            return vae.encode(moved, check=runtime.check_interrupt)

        vae_latents = [
            retried(partial(encode, part), runtime, least, "Encoding the picture")
            for part in (video, end)
            if part is not None
        ]
    runtime.progress("encode", 1, 1)
    start, *ends = (
        to_model_space(part.float()).cpu() * settings.latent_strength for part in vae_latents
    )
    if not all(bool(latents.isfinite().all()) for latents in (start, *ends)):
        raise ShapeError(
            f"The picture's latents hold NaN or infinity; the VAE computes in "
            f"{str(weight.dtype).removeprefix('torch.')}: {_vae_advice(weight.dtype)}"
        )
    _, picture_height, picture_width, _ = image.shape
    origin = PictureOrigin(
        settings,
        seed,
        picture_width,
        picture_height,
        picture_digest(image),
        end_image is not None,
        vae.source,
    )
    end_latents = ends[0] if ends else None
    return ImageConditioning(start, width, height, num_frames, end_latents, origin)


def example_image(
    width: int = 64,
    height: int = 64,
    *,
    colour: tuple[float, float, float] = (0.9, 0.1, 0.1),
    centre: tuple[float, float] = (0.58, 0.5),
) -> Tensor:
    """Draw an image the built-in model can start from: a red circle on a shaded blue ground.

    Args:
        width: in pixels.
        height: in pixels.
        colour: of the circle, 0..1.
        centre: of the circle, as shares of width and height.

    Returns:
        [1, height, width, 3] float32 in 0..1.
    """
    x = (torch.arange(width) + 0.5)[None, :, None]
    y = (torch.arange(height) + 0.5)[:, None, None]
    shade = torch.tensor([0.1, 0.15, 0.0]) * (x / width - 0.5)
    shade = shade + torch.tensor([0.0, 0.2, 0.25]) * (0.5 - y / height)
    ground = torch.tensor([0.15, 0.3, 0.55]) + shade
    radius = 11 / 64 * min(width, height)
    distance = ((x - centre[0] * width).square() + (y - centre[1] * height).square()).sqrt()
    cover = (radius - distance + 0.5).clamp(0, 1)  # one pixel of soft edge
    return torch.lerp(ground, torch.tensor(colour), cover)[None]
