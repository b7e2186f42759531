"""Our transformer for the samplers of ComfyUI's core."""

from typing import Any

from ...skyreels.conditioning.latents import ImageConditioning
from .. import host


class SkyReelsCoreModel:
    CATEGORY = "SkyReels/sampling"
    SEARCH_ALIASES = ["ksampler", "model", "hunyuan video"]
    DESCRIPTION = (
        "Makes a MODEL for core's KSampler, SamplerCustomAdvanced and guiders of a SkyReels model. "
        "Weights stay with the engine, which streams what does not fit. SkyReels Sampler is "
        "recommended: it alone has step caches, resume and 8-bit attention."
    )
    FUNCTION = "wrap"
    RETURN_TYPES = ("MODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("For core's samplers, guiders and model nodes.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("SKYREELS_MODEL", {"tooltip": "From SkyReels Load Transformer."}),
            },
            "optional": {
                "image": (
                    "SKYREELS_IMAGE",
                    {
                        "tooltip": "From SkyReels Image Conditioning. Without it the picture is "
                        "taken from core's InstructPixToPixConditioning. The latent of the "
                        "sampler (EmptyHunyuanLatentVideo) needs the same size."
                    },
                ),
            },
        }

    def wrap(self, model: host.LoadedModel, image: ImageConditioning | None = None) -> tuple[Any]:
        return (host.core_model(model, image),)
