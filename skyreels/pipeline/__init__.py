"""The main job as one straight function, for library users, tests and benches."""

from torch import Tensor

from ..conditioning.latents import ImageConditioning, check_picture, check_size
from ..errors import ShapeError
from ..image import ImageSettings, encode_image
from ..runtime import Runtime
from ..sampling.prompts import Prompt
from ..sampling.sample import sample
from ..sampling.settings import SamplingSettings
from ..transformer.model import SkyReelsTransformer
from ..vae.model import VideoVAE
from ..vae.tiling import decode_frames


def image_to_video(
    transformer: SkyReelsTransformer,
    vae: VideoVAE,
    image: Tensor | None,
    prompt: Prompt,
    negative: Prompt | None,
    settings: SamplingSettings,
    *,
    width: int = 960,
    height: int = 544,
    num_frames: int = 97,
    image_settings: ImageSettings = ImageSettings(),  # noqa: B008 - frozen
    decode: str = "auto",
    runtime: Runtime,
) -> Tensor:
    """A picture and a prompt become a video.

    Args:
        transformer: from `load_transformer`, on any device.
        vae: from `load_vae`, on any device.
        image: [1, H, W, 3] float in 0..1, any size; None for a text-to-video transformer.
        prompt: from `encode_prompt`.
        negative: likewise; needed if true CFG is on.
        settings: see `SamplingSettings`; its seed is that of the picture's noise too.
        width: multiple of 16.
        height: multiple of 16.
        num_frames: 4k + 1.
        image_settings: see `ImageSettings`.
        decode: one of config.DECODE_MODES.
        runtime: its device computes; it gets the progress and may interrupt.

    Returns:
        [num_frames, height, width, 3] float32 in 0..1.

    Raises:
        SkyReelsError: see the functions called.
    """
    vae_latents = image_to_latents(
        transformer,
        vae,
        image,
        prompt,
        negative,
        settings,
        width=width,
        height=height,
        num_frames=num_frames,
        image_settings=image_settings,
        runtime=runtime,
    )
    return decode_frames(vae, vae_latents, decode, runtime=runtime)


def image_to_latents(
    transformer: SkyReelsTransformer,
    vae: VideoVAE,
    image: Tensor | None,
    prompt: Prompt,
    negative: Prompt | None,
    settings: SamplingSettings,
    *,
    width: int = 960,
    height: int = 544,
    num_frames: int = 97,
    image_settings: ImageSettings = ImageSettings(),  # noqa: B008 - frozen
    end_image: Tensor | None = None,
    runtime: Runtime,
) -> Tensor:
    """The same up to the decode, for a caller who takes the frames as they come (`decode_into`).

    Args:
        transformer: as for `image_to_video`, and all the others.
        vae: encodes the picture.
        image: the picture, or None.
        prompt: what happens.
        negative: what to avoid.
        settings: of the run.
        width: in pixels.
        height: in pixels.
        num_frames: 4k + 1.
        image_settings: of the picture.
        end_image: that the clip ends with, see `encode_image`.
        runtime: where.

    Returns:
        [1, 16, T, h, w] float32 on the CPU, VAE space.

    Raises:
        ShapeError: an end picture without one to start from.
        SkyReelsError: see the functions called.
    """
    check_picture(transformer.config, image is not None)
    if image is None:
        if end_image is not None:
            raise ShapeError("An end picture needs one to start from: give both, or none.")
        check_size(width, height, num_frames)
        conditioning = ImageConditioning(None, width, height, num_frames)
    else:
        conditioning = encode_image(
            vae,
            image,
            image_settings,
            width=width,
            height=height,
            num_frames=num_frames,
            seed=settings.seed,
            end_image=end_image,
            runtime=runtime,
        )
    return sample(transformer, conditioning, prompt, negative, settings, runtime=runtime)
