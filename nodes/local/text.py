"""Text for people without core's CLIP files, and for the built-in model."""

from pathlib import Path
from typing import Any

from ...skyreels.builtin import BUILTIN_NAME, builtin_text_encoder
from ...skyreels.text.encode import encode_prompt
from ...skyreels.text.load import TextEncoder, load_text_encoder
from .. import host
from .convert import Conditioning, to_conditioning


def encoder_folders() -> dict[str, Path]:
    """diffusers-style folders with both text encoders among the models."""
    return host.model_folders(
        ("text_encoders", "diffusers", "LLM"), "text_encoder", "text_encoder_2"
    )


def encoder_choices() -> list[str]:
    """Everything SkyReels Load Text Encoder offers."""
    return [BUILTIN_NAME, *encoder_folders()]


class SkyReelsTextEncoderLoader:
    CATEGORY = "SkyReels/loaders"
    DESCRIPTION = (
        "Loads LLaMA-3 and CLIP-L from a diffusers-style folder through transformers. With core's "
        "files (clip_l, llava_llama3) use DualCLIPLoader, type hunyuan_video, instead."
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
                        "or the built-in one for the built-in transformer."
                    },
                ),
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, text_encoder: str | None = None) -> bool | str:
        return host.check_choice("text_encoders", text_encoder, encoder_choices())

    def load(self, text_encoder: str, unique_id: str | None = None) -> tuple[TextEncoder]:
        runtime = host.ComfyRuntime(unique_id)
        with host.without_inference_mode():
            if text_encoder == BUILTIN_NAME:
                return (builtin_text_encoder(runtime=runtime),)
            path = host.resolve("text_encoders", text_encoder, encoder_folders())
            return (load_text_encoder(path, runtime=runtime),)


class SkyReelsTextEncode:
    CATEGORY = "SkyReels/conditioning"
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
