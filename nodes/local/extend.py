"""A clip and its continuation."""

from typing import Any

from torch import Tensor

from ...skyreels.config import MAX_FRAMES, Guidance
from ...skyreels.errors import ShapeError
from ...skyreels.pipeline.extend import ExtendSettings, check_clip, extend_video
from ...skyreels.sampling.calibrate import choose_cache
from ...skyreels.sampling.settings import SamplingSettings, get_sigmas
from ...skyreels.transformer.layers import intrinsic_frequency
from ...skyreels.weights.load import checkpoint_of
from .. import host
from . import convert
from .decode import SkyReelsVAEDecode
from .sampler import SkyReelsSampler


class SkyReelsExtendVideo:
    CATEGORY = "SkyReels/video"
    SEARCH_ALIASES = ["continue video", "longer video", "video to video", "hunyuan"]
    DESCRIPTION = (
        "Continues a clip: its last frames start a new one, which is sampled, decoded, matched in "
        "colour and joined to it. Chain several of these nodes for longer videos; each adds a "
        "little blur and drift."
    )
    FUNCTION = "extend"
    RETURN_TYPES = ("IMAGE", "IMAGE")
    RETURN_NAMES = ("images", "new_images")
    OUTPUT_TOOLTIPS = (
        "The clip with its continuation, for CreateVideo at 24 fps.",
        "Only the frames that were added: num_frames - overlap_frames of them.",
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        # what the sampler and the decoder have too is explained there
        sampler, decode = SkyReelsSampler.INPUT_TYPES(), SkyReelsVAEDecode.INPUT_TYPES()
        required, optional = sampler["required"], sampler["optional"]
        return {
            "required": {
                "model": required["model"],
                "vae": decode["required"]["vae"],
                "images": (
                    "IMAGE",
                    {
                        "tooltip": "The clip to continue, at 24 fps: at least 5 frames, height and "
                        "width multiples of 16. Sound is not continued."
                    },
                ),
                "positive": required["positive"],
                "seed": required["seed"],
                "num_frames": (
                    "INT",
                    {
                        "default": 97,
                        "min": 5,
                        "max": MAX_FRAMES,
                        "step": 4,
                        "tooltip": "4k+1 frames of the new clip, of which overlap_frames show what "
                        "the old one ends with. 97 is the trained length.",
                    },
                ),
                "steps": required["steps"],
                "cfg": required["cfg"],
                "embedded_guidance": required["embedded_guidance"],
                "shift": required["shift"],
            },
            "optional": {
                "negative": optional["negative"],
                "overlap_frames": (
                    "INT",
                    {
                        "default": 1,
                        "min": 1,
                        "max": MAX_FRAMES,
                        "step": 4,
                        "tooltip": "Last frames to start from, 4k+1. 1 is what the model was "
                        "trained with: the prompt must tell the motion. 5 or 9 also show it the "
                        "motion, but that is untrained and may blur or fail.",
                    },
                ),
                "color_match": (
                    "BOOLEAN",
                    {
                        "default": True,
                        "tooltip": "Shift the new frames to the clip's brightness, contrast and "
                        "colours, as measured in the overlap.",
                    },
                ),
                "decode": decode["required"]["mode"],
                "cache": optional["cache"],
                "attention": optional["attention"],
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    @classmethod
    def VALIDATE_INPUTS(
        cls, num_frames: int | None = None, overlap_frames: int | None = None
    ) -> bool | str:
        if num_frames is not None and overlap_frames is not None:  # else linked: checked later
            try:
                ExtendSettings(num_frames, overlap_frames)
            except ShapeError as error:
                return str(error)
        return True

    def extend(
        self,
        model: host.LoadedModel,
        vae: host.LoadedModel,
        images: Tensor,
        positive: convert.Conditioning,
        seed: int,
        num_frames: int,
        steps: int,
        cfg: float,
        embedded_guidance: float,
        shift: float,
        negative: convert.Conditioning | None = None,
        overlap_frames: int = 1,
        color_match: bool = True,
        decode: str = "auto",
        cache: str = "off",
        attention: str = "exact",
        unique_id: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        extend = ExtendSettings(num_frames, overlap_frames, color_match)
        check_clip(images, extend)
        config = model.module.config
        guidance = Guidance(cfg, convert.embedded_guidance(positive, embedded_guidance))
        convert.warn_unused(positive, negative)
        prompt, negative_prompt = convert.to_prompts(positive, negative, guidance, shift, config)
        settings = SamplingSettings(
            seed=seed,
            sigmas=get_sigmas(steps, shift),
            guidance=guidance,
            riflex_k=intrinsic_frequency(config),
            cache=choose_cache(cache, checkpoint_of(model.module), steps),
            attention=attention,
            loras=model.loras,
        )
        joined, new_images = extend_video(
            model.module,
            vae.module,
            images,
            prompt,
            negative_prompt,
            settings,
            extend=extend,
            decode=decode,
            runtime=host.ComfyRuntime(unique_id, model, vae, with_preview=True),
        )
        return joined, new_images
