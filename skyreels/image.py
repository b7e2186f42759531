"""Encode an image as the first-frame latents that condition the transformer."""

import numpy as np
import torch
from torch import Tensor

from .config import TEMPORAL_COMPRESSION
from .errors import DependencyError, OptionError, ShapeError
from .latents import (
    ImageConditioning,
    check_size,
    latent_shape,
    nearest_frames,
    seeded_generator,
    to_model_space,
)
from .offload import missing_bytes, on_device
from .runtime import Runtime
from .vae.budget import decode_bytes
from .vae.model import VideoVAE

#: how an image of other proportions is resized to the video, see `fit_image`
FITS = ("crop", "pad", "stretch")


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
        ShapeError: not an image, or one with NaN or infinity.
        OptionError: unknown fit.

    Source: SkyworkAI/SkyReels-V1 @cb0ceaa, video_generate.py (centre crop), then the Lanczos
        resize of diffusers' VideoProcessor.
    """
    if fit not in FITS:
        raise OptionError(f"Fit {fit!r} is not one of {', '.join(FITS)}.")
    if image.ndim != 4 or image.shape[-1] not in (3, 4) or 0 in image.shape:
        raise ShapeError(
            f"Image must be [frames, height, width, 3 or 4 channels]; got {list(image.shape)}."
        )
    if not image.is_floating_point():
        raise ShapeError(
            f"Image must be float in [0, 1]; got {image.dtype}. Convert with image.float() / 255."
        )
    pixels = image[..., :3].detach().to("cpu", torch.float32).clamp(0.0, 1.0)
    if not bool(pixels.isfinite().all()):
        raise ShapeError("Image contains NaN or infinity: check where it comes from.")
    if pixels.shape[1:3] != (height, width):
        frames = [_resize(frame, width, height, fit) for frame in pixels]
        pixels = torch.stack(frames)
    return (pixels * 2.0 - 1.0).permute(3, 0, 1, 2)[None].contiguous()


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


def encode_image(
    vae: VideoVAE,
    image: Tensor,
    *,
    width: int,
    height: int,
    num_frames: int,
    fit: str = "crop",
    prefix_frames: int = 1,
    noise_augmentation: float = 0.0,
    latent_strength: float = 1.0,
    seed: int = 0,
    runtime: Runtime,
) -> ImageConditioning:
    """Encode an image alone, to the mode of its posterior in model space.

    Args:
        vae: on any device; back there afterwards.
        image: [F, H, W, C] float in [0, 1]; its first `prefix_frames` frames are used.
        width: of the video in pixels.
        height: of the video in pixels.
        num_frames: of the video, 4n + 1.
        fit: see `fit_image`.
        prefix_frames: 1, or 4k + 1 frames to continue a clip (the model was trained with 1).
        noise_augmentation: standard deviation of noise added to the image before encoding; more
            noise gives more motion and less likeness. Pixels of -1 (black bars) are left out. 0.04
            is a common value.
        latent_strength: factor on the image latents; below 1 gives more motion.
        seed: of the augmentation noise, which is drawn after the clip's own noise, so that one seed
            gives one result in whatever order the parts of a run are called.
        runtime: progress "encode"; asked for an interrupt between the layers of the VAE.

    Returns:
        The conditioning of `sample`.

    Raises:
        ShapeError: an illegal size, number of frames or image.
        OptionError: an illegal setting.
    """
    check_size(width, height, num_frames)
    if prefix_frames < 1 or (prefix_frames - 1) % TEMPORAL_COMPRESSION:
        raise ShapeError(
            f"{prefix_frames} prefix frames is not a multiple of 4 plus 1: use "
            f"{nearest_frames(prefix_frames)}."
        )
    if image.ndim == 4 and len(image) and prefix_frames > min(num_frames, image.shape[0]):
        raise ShapeError(
            f"{prefix_frames} prefix frames are too many: the image has {image.shape[0]} and the "
            f"video {num_frames}. Use 1 for a single image."
        )
    if not 0.0 <= noise_augmentation <= 1.0:
        raise OptionError(f"Noise augmentation {noise_augmentation} is not within 0..1: use 0.04.")
    if not 0.0 <= latent_strength <= 10.0:
        raise OptionError(f"Latent strength {latent_strength} is not within 0..10: use 1.")
    generator = seeded_generator(seed)
    video = fit_image(image[:prefix_frames], width, height, fit)
    if noise_augmentation > 0:
        torch.randn(latent_shape(num_frames, height, width), generator=generator)
        noise = torch.randn(video.shape, generator=generator) * noise_augmentation
        video = torch.where(video == -1.0, video, video + noise)
    weight = next(vae.parameters())
    largest = torch.Size(latent_shape(prefix_frames, height, width))
    runtime.check_interrupt()
    runtime.make_room(
        missing_bytes(vae, runtime.device) + decode_bytes(vae.config, largest, weight.dtype)
    )
    runtime.progress("encode", 0, 1)
    with torch.inference_mode(), on_device(vae, runtime.device):
        vae_latents = vae.encode(
            video.to(runtime.device, weight.dtype), check=runtime.check_interrupt
        )
    runtime.progress("encode", 1, 1)
    latents = to_model_space(vae_latents.float()).cpu() * latent_strength
    return ImageConditioning(latents, width, height, num_frames)
