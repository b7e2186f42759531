"""SkyReels-V1 image-to-video, usable from any Python program.

    from skyreels import SamplingSettings, TorchRuntime, encode_prompt, get_sigmas, image_to_video
    from skyreels import load_text_encoder, load_transformer, load_vae

    runtime = TorchRuntime("cuda")
    encoder = load_text_encoder("HunyuanVideo", runtime=runtime)
    prompt = encode_prompt(encoder, "a dog runs", runtime=runtime)
    negative = encode_prompt(encoder, "", fps_prefix=False, runtime=runtime)
    frames = image_to_video(
        load_transformer("skyreels.safetensors", runtime=runtime),
        load_vae("vae.safetensors", runtime=runtime),
        image,  # [1, H, W, 3] in 0..1
        prompt,
        negative,
        SamplingSettings(seed=5, sigmas=get_sigmas(30, shift=7.0)),
        runtime=runtime,
    )

LoRAs are part of a run's settings, and the transformer is brought to exactly those:

    style = load_lora("style.safetensors", transformer.config)
    settings = SamplingSettings(seed=5, loras=(AppliedLora(style, 0.8, "double, single:0-9"),))
    print(describe_lora(settings.loras[0], transformer))

`image_to_video` (pipeline/) is the whole job in one function and the place to start reading. With
a text-to-video transformer its image is None; `find_text_sources` takes text encoders in files.
Nothing here knows about ComfyUI: whatever hosts the engine passes in a Runtime.
"""

from . import errors

errors.check_installed()

# ruff: noqa: E402 - first what says what is missing
from .conditioning.embeds import PromptEmbeds
from .conditioning.latents import ImageConditioning
from .config import (
    ContextWindows,
    FreSca,
    Guidance,
    SkipLayers,
    Tiling,
    TransformerConfig,
    VAEConfig,
)
from .errors import (
    CheckpointError,
    DependencyError,
    OptionError,
    OutOfRoomError,
    ShapeError,
    SkyReelsError,
    TextError,
)
from .image import ImageSettings, encode_image
from .pipeline import image_to_video
from .runtime import Runtime, TorchRuntime
from .sampling.batch import Clip, sample_batch
from .sampling.prompts import ScheduledPrompt, percent_to_sigma
from .sampling.sample import initial_noise, sample
from .sampling.schedules import named_sigmas
from .sampling.settings import SamplingSettings, euler, get_sigmas
from .sampling.step_cache import CACHES, CacheConfig
from .text.encode import encode_prompt
from .text.load import TextEncoder, load_text_encoder
from .text.sources import find_text_sources
from .transformer.model import SkyReelsTransformer
from .vae.model import VideoVAE
from .vae.tiling import decode_frames, iter_decode
from .weights.inspect import CheckpointInfo, inspect
from .weights.load import load_transformer, load_vae
from .weights.lora.apply import AppliedLora
from .weights.lora.read import Lora, load_lora
from .weights.lora.report import describe_lora

__all__ = [
    "CACHES",
    "AppliedLora",
    "CacheConfig",
    "CheckpointError",
    "CheckpointInfo",
    "Clip",
    "ContextWindows",
    "DependencyError",
    "FreSca",
    "Guidance",
    "ImageConditioning",
    "ImageSettings",
    "Lora",
    "OptionError",
    "OutOfRoomError",
    "PromptEmbeds",
    "Runtime",
    "SamplingSettings",
    "ScheduledPrompt",
    "ShapeError",
    "SkipLayers",
    "SkyReelsError",
    "SkyReelsTransformer",
    "TextEncoder",
    "TextError",
    "Tiling",
    "TorchRuntime",
    "TransformerConfig",
    "VAEConfig",
    "VideoVAE",
    "decode_frames",
    "describe_lora",
    "encode_image",
    "encode_prompt",
    "euler",
    "find_text_sources",
    "get_sigmas",
    "image_to_video",
    "initial_noise",
    "inspect",
    "iter_decode",
    "load_lora",
    "load_text_encoder",
    "load_transformer",
    "load_vae",
    "named_sigmas",
    "percent_to_sigma",
    "sample",
    "sample_batch",
]
