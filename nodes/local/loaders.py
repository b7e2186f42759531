"""Loaders: from files in ComfyUI's model folders, or the tiny built-in model."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...skyreels.builtin import BUILTIN_NAME, BUILTIN_NOTICE, builtin_transformer, builtin_vae
from ...skyreels.config import TRANSFORMER_PRECISIONS, VAE_PRECISIONS
from ...skyreels.errors import CheckpointError
from ...skyreels.weights.load import load_transformer, load_vae
from .. import host

logger = logging.getLogger("skyreels.nodes.local.loaders")

#: family of a checkpoint -> the node that loads it
LOADERS = {
    "transformer": "SkyReels Load Transformer",
    "vae": "SkyReels Load VAE",
    "llama": "DualCLIPLoader, type hunyuan_video",
    "clip": "DualCLIPLoader, type hunyuan_video",
    "lora": "SkyReels Load LoRA",
}
#: the only file of a diffusers folder, and what a folder of Hugging Face's cache has
_MAIN_FILE, _CACHE = "diffusion_pytorch_model*.safetensors", "snapshots/*/*"


def transformer_folders() -> dict[str, Path]:
    """Folders of diffusers among the models, whole models, and those of Hugging Face's cache."""
    return host.model_folders(
        ("diffusers", "diffusion_models"),
        any_of=("*.safetensors.index*.json", _MAIN_FILE, "transformer/*.safetensors*", _CACHE),
    )


def vae_folders() -> dict[str, Path]:
    """The same for the VAE."""
    return host.model_folders(("diffusers",), any_of=(_MAIN_FILE, "vae/*.safetensors", _CACHE))


def transformer_choices() -> list[str]:
    """Everything SkyReels Load Transformer offers."""
    return [BUILTIN_NAME, *host.weight_files("diffusion_models"), *transformer_folders()]


def vae_choices() -> list[str]:
    """Everything SkyReels Load VAE offers."""
    return [BUILTIN_NAME, *host.weight_files("vae"), *vae_folders()]


@contextmanager
def naming_the_loader() -> Iterator[None]:
    """Add the right node to the refusal of a file that belongs to another one."""
    try:
        yield
    except CheckpointError as error:
        if error.family not in LOADERS:
            raise
        raise CheckpointError(f"{error} Use the node {LOADERS[error.family]}.") from None


class SkyReelsTransformerLoader:
    CATEGORY = "SkyReels/loaders"
    SEARCH_ALIASES = [
        "load model",
        "unet loader",
        "diffusion model",
        "hunyuan video",
        "gguf",
        "image to video",
        "i2v",
    ]
    DESCRIPTION = (
        "Loads a SkyReels-V1 transformer (13 B parameters), image-to-video or text-to-video. "
        "Layout, variant and 8-bit format are read from the file's tensors, never from its name. "
        "Tencent's own I2V files (33 channels), FramePack and SkyReels-V2 are refused by name."
    )
    FUNCTION = "load"
    RETURN_TYPES = ("SKYREELS_MODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("The transformer, for SkyReels Sampler.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "transformer": (
                    transformer_choices(),
                    {
                        "tooltip": "A file in models/diffusion_models (bf16 25.6 GB, fp8 13.2 GB, "
                        "GGUF 7.7 to 14 GB), a diffusers folder in models/diffusers, or the "
                        "built-in model: not SkyReels but a tiny model that moves coloured shapes, "
                        "64x64."
                    },
                ),
                "precision": (
                    list(TRANSFORMER_PRECISIONS),
                    {
                        "default": "auto",
                        "tooltip": "auto keeps the file's precision. bf16 is exact (25.6 GB). fp8 "
                        "and int8 quantize the block weights to 8 bits (17 GB) and multiply in 8 "
                        "bits where the GPU can: not exact, see the help. fp32 is for checks "
                        "(51 GB).",
                    },
                ),
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, transformer: str | None = None) -> bool | str:
        return host.check_choice("diffusion_models", transformer, transformer_choices())

    def load(
        self, transformer: str, precision: str, unique_id: str | None = None
    ) -> tuple[host.LoadedModel]:
        runtime = host.ComfyRuntime(unique_id)
        with host.without_inference_mode(), naming_the_loader():
            if transformer == BUILTIN_NAME:
                logger.info(BUILTIN_NOTICE)
                module = builtin_transformer(precision, runtime=runtime)
            else:
                path = host.resolve("diffusion_models", transformer, transformer_folders())
                module = load_transformer(path, precision=precision, runtime=runtime)
        return (host.register(module, transformer, runtime, precision),)


class SkyReelsVAELoader:
    CATEGORY = "SkyReels/loaders"
    SEARCH_ALIASES = ["load vae", "hunyuan video vae"]
    DESCRIPTION = (
        "Loads the HunyuanVideo VAE in either key layout. Unlike core's, its decoder uses the "
        "frame-causal attention that the weights were trained with."
    )
    FUNCTION = "load"
    RETURN_TYPES = ("SKYREELS_VAE",)
    RETURN_NAMES = ("vae",)
    OUTPUT_TOOLTIPS = ("The VAE, for SkyReels Image Conditioning and SkyReels VAE Decode.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "vae": (
                    vae_choices(),
                    {
                        "tooltip": "A file in models/vae (hunyuan_video_vae_bf16, 0.5 GB), or the "
                        "built-in one. Use the built-in VAE with the built-in transformer."
                    },
                ),
                "precision": (
                    list(VAE_PRECISIONS),
                    {
                        "default": "auto",
                        "tooltip": "auto is bf16 on a GPU and fp32 on the CPU; fp32 doubles memory "
                        "and time and is for checks.",
                    },
                ),
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, vae: str | None = None) -> bool | str:
        return host.check_choice("vae", vae, vae_choices())

    def load(
        self, vae: str, precision: str, unique_id: str | None = None
    ) -> tuple[host.LoadedModel]:
        runtime = host.ComfyRuntime(unique_id)
        with host.without_inference_mode(), naming_the_loader():
            if vae == BUILTIN_NAME:
                module = builtin_vae(precision, runtime=runtime)
            else:
                module = load_vae(
                    host.resolve("vae", vae, vae_folders()), precision=precision, runtime=runtime
                )
        return (host.register(module, vae, runtime),)
