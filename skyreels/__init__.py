"""SkyReels-V1 image-to-video, usable from any Python program.

    from skyreels import TorchRuntime, encode_prompt, image_to_video, load_text_encoder, ...

`image_to_video` (pipeline.py) is the whole job in one function and the place to start reading.
Nothing here knows about ComfyUI: whatever hosts the engine passes in a Runtime.
"""

from .config import Guidance, Tiling, TransformerConfig, VAEConfig
from .errors import (
    CheckpointError,
    DependencyError,
    OptionError,
    OutOfRoomError,
    ShapeError,
    SkyReelsError,
    TextError,
)
from .image import encode_image
from .latents import ImageConditioning
from .pipeline import image_to_video
from .runtime import Runtime, TorchRuntime
from .sampling.sample import get_sigmas, initial_noise, sample
from .sampling.step_cache import CACHES, CacheConfig
from .text.embeds import PromptEmbeds
from .text.encode import encode_prompt
from .text.load import TextEncoder, load_text_encoder
from .transformer.model import SkyReelsTransformer
from .vae.model import VideoVAE
from .vae.tiling import decode_frames, iter_decode
from .weights.inspect import CheckpointInfo, inspect
from .weights.load import load_transformer, load_vae

__all__ = [
    "CACHES",
    "CacheConfig",
    "CheckpointError",
    "CheckpointInfo",
    "DependencyError",
    "Guidance",
    "ImageConditioning",
    "OptionError",
    "OutOfRoomError",
    "PromptEmbeds",
    "Runtime",
    "ShapeError",
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
    "encode_image",
    "encode_prompt",
    "get_sigmas",
    "image_to_video",
    "initial_noise",
    "inspect",
    "iter_decode",
    "load_text_encoder",
    "load_transformer",
    "load_vae",
    "sample",
]
