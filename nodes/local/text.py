"""Text for people without core's CLIP files, and for the built-in model."""

from pathlib import Path, PureWindowsPath
from typing import Any

from ...skyreels.builtin import BUILTIN_NAME, builtin_text_encoder
from ...skyreels.text.encode import encode_prompt
from ...skyreels.text.load import TextEncoder, load_text_encoder
from ...skyreels.text.sources import find_text_sources
from .. import host
from .convert import Conditioning, to_conditioning

#: where text encoders and tokenizers lie
KINDS = ("text_encoders", "diffusers", "LLM")
#: choices of `clip` and `tokenizer` that leave it to the loader
IN_THE_FOLDER, AUTO = "in the folder", "auto"


def encoder_folders() -> dict[str, Path]:
    """Folders among the models: with both text encoders, or with the shards of one."""
    both = host.model_folders(KINDS, "text_encoder", "text_encoder_2")
    return both | host.model_folders(("text_encoders", "LLM"), "config.json", "*.safetensors")


def encoder_files() -> list[str]:
    """Weight files that may be one text encoder: not those of a folder above."""
    folders = {folder.name for folder in encoder_folders().values()}
    files = host.weight_files("text_encoders")
    return [name for name in files if PureWindowsPath(name).parts[0] not in folders]


def encoder_choices() -> list[str]:
    """Everything SkyReels Load Text Encoder offers."""
    return [BUILTIN_NAME, *encoder_folders(), *encoder_files()]


def clip_choices() -> list[str]:
    """What may hold CLIP-L."""
    return [IN_THE_FOLDER, *encoder_files()]


def tokenizer_choices() -> dict[str, Path]:
    """Folders among the models that hold a tokenizer, directly or one below."""
    return host.model_folders(KINDS, "tokenizer*") | host.model_folders(KINDS, "vocab.json")


class SkyReelsTextEncoderLoader:
    CATEGORY = "SkyReels/loaders"
    SEARCH_ALIASES = ["load clip", "llama", "hunyuan text encoder"]
    DESCRIPTION = (
        "Loads LLaMA-3 and CLIP-L through transformers: from a diffusers-style folder, or from the "
        "two files that core uses (llava_llama3 in fp16 or fp8, clip_l). Core's DualCLIPLoader, "
        "type hunyuan_video, makes the same CONDITIONING."
    )
    FUNCTION = "load"
    RETURN_TYPES = ("SKYREELS_TEXT_ENCODER",)
    RETURN_NAMES = ("text_encoder",)
    OUTPUT_TOOLTIPS = ("Both text encoders, for SkyReels Text Encode.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "text_encoder": (
                    encoder_choices(),
                    {
                        "tooltip": "A folder in models/text_encoders or models/diffusers with "
                        "text_encoder, text_encoder_2, tokenizer and tokenizer_2 (about 16 GB), "
                        "or the built-in one for the built-in transformer. Or LLaMA-3 alone, as "
                        "llava_llama3_fp8_scaled.safetensors (9 GB): then choose CLIP-L in `clip`."
                    },
                ),
            },
            "optional": {
                "clip": (
                    clip_choices(),
                    {
                        "default": IN_THE_FOLDER,
                        "tooltip": "CLIP-L, as clip_l.safetensors (0.2 GB), where `text_encoder` "
                        "is LLaMA-3 alone.",
                    },
                ),
                "tokenizer": (
                    [AUTO, *tokenizer_choices()],
                    {
                        "default": AUTO,
                        "tooltip": "For single files, which hold none. auto takes one beside the "
                        "file, else ComfyUI's own.",
                    },
                ),
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    @classmethod
    def VALIDATE_INPUTS(
        cls,
        text_encoder: str | None = None,
        clip: str | None = None,
        tokenizer: str | None = None,
    ) -> bool | str:
        for value, choices in (
            (text_encoder, encoder_choices()),
            (clip, clip_choices()),
            (tokenizer, [AUTO, *tokenizer_choices()]),
        ):
            answer = host.check_choice("text_encoders", value, choices)
            if answer is not True:
                return answer
        return True

    def load(
        self,
        text_encoder: str,
        clip: str = IN_THE_FOLDER,
        tokenizer: str = AUTO,
        unique_id: str | None = None,
    ) -> tuple[TextEncoder]:
        runtime = host.ComfyRuntime(unique_id)
        with host.without_inference_mode():
            if text_encoder == BUILTIN_NAME:
                return (builtin_text_encoder(runtime=runtime),)
            paths = [host.resolve("text_encoders", text_encoder, encoder_folders())]
            if clip != IN_THE_FOLDER:
                paths.append(host.resolve("text_encoders", clip, {}))
            given = []
            if tokenizer != AUTO:
                given.append(host.resolve("text_encoders", tokenizer, tokenizer_choices()))
            source = find_text_sources(paths, given, host.tokenizer_folders())
            return (load_text_encoder(source, runtime=runtime),)


class SkyReelsTextEncode:
    CATEGORY = "SkyReels/conditioning"
    SEARCH_ALIASES = ["prompt", "clip text encode", "hunyuan"]
    DESCRIPTION = (
        "Encodes a prompt with HunyuanVideo's video template into the same CONDITIONING that "
        "core's CLIPTextEncode makes with the hunyuan_video CLIP."
    )
    FUNCTION = "encode"
    RETURN_TYPES = ("CONDITIONING",)
    RETURN_NAMES = ("conditioning",)
    OUTPUT_TOOLTIPS = ("Up to 256 LLaMA-3 states and the pooled CLIP-L state.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "text_encoder": (
                    "SKYREELS_TEXT_ENCODER",
                    {"tooltip": "From SkyReels Load Text Encoder."},
                ),
                "prompt": (
                    "STRING",
                    {
                        "multiline": True,
                        "dynamicPrompts": True,
                        "default": "",
                        "tooltip": "What happens in the video, up to 256 tokens (about 190 words); "
                        "longer text is cut, with a warning. A negative prompt may be empty. "
                        "(word:1.2) weighs words as in core; write \\( and \\) for parentheses.",
                    },
                ),
                "add_fps_prefix": (
                    "BOOLEAN",
                    {
                        "default": True,
                        "tooltip": "Prepend 'FPS-24, ', as in training, unless the prompt names a "
                        "frame rate. Switch off for the negative prompt.",
                    },
                ),
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    def encode(
        self,
        text_encoder: TextEncoder,
        prompt: str,
        add_fps_prefix: bool,
        unique_id: str | None = None,
    ) -> tuple[Conditioning]:
        runtime = host.ComfyRuntime(unique_id)
        embeds = encode_prompt(text_encoder, prompt, fps_prefix=add_fps_prefix, runtime=runtime)
        return (to_conditioning(embeds),)
