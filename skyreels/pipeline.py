"""The main job as one straight function, for library users, tests and benches."""

from pathlib import Path

from torch import Tensor

from .config import Guidance
from .image import encode_image
from .runtime import Runtime
from .sampling.sample import Solver, euler, get_sigmas, sample
from .sampling.step_cache import OFF, CacheConfig
from .text.embeds import PromptEmbeds
from .transformer.attention import Attention
from .transformer.model import SkyReelsTransformer
from .vae.model import VideoVAE
from .vae.tiling import decode_frames


def image_to_video(
    transformer: SkyReelsTransformer,
    vae: VideoVAE,
    image: Tensor,
    prompt: PromptEmbeds,
    negative: PromptEmbeds | None = None,
    *,
    width: int = 960,
    height: int = 544,
    num_frames: int = 97,
    num_inference_steps: int = 30,
    shift: float = 7.0,
    seed: int = 0,
    guidance: Guidance = Guidance(),  # noqa: B008 - frozen
    fit: str = "crop",
    noise_augmentation: float = 0.0,
    latent_strength: float = 1.0,
    solver: Solver = euler,
    riflex_k: int = 4,
    decode: str = "auto",
    resume: Path | None = None,
    attention: Attention | str = "exact",
    cache: CacheConfig = OFF,
    runtime: Runtime,
) -> Tensor:
    """A picture and a prompt become a video.

    Args:
        transformer, vae: from `load_transformer` and `load_vae`, on any device.
        image: [1, H, W, 3] float in 0..1, any size.
        prompt, negative: from `encode_prompt`.
        width, height: multiples of 16. num_frames: 4k + 1.
        decode: "auto", "full" or a name of config.TILINGS.
        The rest: see `encode_image`, `get_sigmas` and `sample`.
    Returns:
        [num_frames, height, width, 3] float32 in 0..1.
    Raises:
        SkyReelsError: see the functions called.
    """
    sigmas = get_sigmas(num_inference_steps, shift)
    conditioning = encode_image(
        vae, image, width=width, height=height, num_frames=num_frames, fit=fit,
        noise_augmentation=noise_augmentation, latent_strength=latent_strength, seed=seed,
        runtime=runtime,
    )  # fmt: skip
    vae_latents = sample(
        transformer, conditioning, prompt, negative, seed=seed, sigmas=sigmas, guidance=guidance,
        solver=solver, riflex_k=riflex_k, resume=resume, attention=attention, cache=cache,
        runtime=runtime,
    )  # fmt: skip
    return decode_frames(vae, vae_latents, decode, runtime=runtime)
