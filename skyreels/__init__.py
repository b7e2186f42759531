"""SkyReels-V1 image-to-video, usable from any Python program.

    from skyreels import TorchRuntime, encode_prompt, image_to_video, load_text_encoder, ...

`image_to_video` (pipeline.py) is the whole job in one function and the place to start reading.
Nothing here knows about ComfyUI: whatever hosts the engine passes in a Runtime.
"""

from .cache import CACHES, CacheConfig
from .checkpoint import CheckpointInfo, inspect
from .conditioning import ImageConditioning, encode_image
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
from .loading import load_transformer, load_vae
from .model import SkyReelsTransformer
from .pipeline import image_to_video
from .runtime import Runtime, TorchRuntime
from .sampling import get_sigmas, initial_noise, sample
from .text import PromptEmbeds, TextEncoder, encode_prompt, load_text_encoder
from .vae.model import VideoVAE
from .vae.tiling import decode_frames, iter_decode

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
