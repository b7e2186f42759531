"""LoRAs on the transformer."""

import logging
from dataclasses import replace
from typing import Any

from ...skyreels.weights.lora.apply import AppliedLora, check_loras
from ...skyreels.weights.lora.read import load_lora
from ...skyreels.weights.lora.report import describe_lora
from .. import host
from .loaders import naming_the_loader

logger = logging.getLogger("skyreels.nodes.local.lora")


#: the list of files where there are none
NO_LORA = "no file in models/loras"


class SkyReelsLoraLoader:
    CATEGORY = "SkyReels/loaders"
    SEARCH_ALIASES = ["load lora", "hunyuan lora", "few steps"]
    DESCRIPTION = (
        "Adds a HunyuanVideo LoRA to the transformer; chain several. Files of every usual trainer "
        "are read. The model that comes in stays as it is: one loaded transformer serves branches "
        "with and without LoRAs."
    )
    FUNCTION = "load"
    RETURN_TYPES = ("SKYREELS_MODEL", "STRING")
    RETURN_NAMES = ("model", "report")
    OUTPUT_TOOLTIPS = (
        "The transformer with this LoRA, for SkyReels Sampler or another SkyReels Load LoRA.",
        "Keys matched, ignored and unknown, and how much each group of blocks changes.",
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": (
                    "SKYREELS_MODEL",
                    {"tooltip": "From SkyReels Load Transformer or another SkyReels Load LoRA."},
                ),
                "lora": (
                    host.weight_files("loras") or [NO_LORA],
                    {
                        "tooltip": "A file in models/loras for HunyuanVideo: LoRA, LoHa, LoKr, "
                        "DoRA or a full difference. The report says what of it is used."
                    },
                ),
                "strength": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        "min": -10.0,
                        "max": 10.0,
                        "step": 0.05,
                        "tooltip": "Factor of the change: 1 as trained, 0 off, below 0 reversed. "
                        "Strengths of several LoRAs add.",
                    },
                ),
            },
            "optional": {
                "blocks": (
                    "STRING",
                    {
                        "default": "",
                        "advanced": True,
                        "tooltip": "Where it acts, as in double:0-5, single:3. SkyReels has double "
                        "blocks 0-19 and single blocks 0-39; other is what lies outside them. "
                        "Empty is everywhere.",
                    },
                ),
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, lora: str | None = None) -> bool | str:
        if lora == NO_LORA:
            return "models/loras has no file: put a HunyuanVideo LoRA there and press R to refresh."
        return host.check_choice("loras", lora, host.weight_files("loras"))

    def load(
        self,
        model: host.LoadedModel,
        lora: str,
        strength: float,
        blocks: str = "",
        unique_id: str | None = None,
    ) -> tuple[host.LoadedModel, str]:
        transformer = model.module
        with host.without_inference_mode(), naming_the_loader():
            path = host.resolve("loras", lora, {})
            applied = AppliedLora(load_lora(path, transformer.config), strength, blocks)
            loras = (*model.loras, applied)
            check_loras(transformer, loras)
            report = describe_lora(applied, transformer)
        logger.info("LoRA %s", report.replace("\n", " "))
        host.ComfyRuntime(unique_id).say(report)
        return replace(model, loras=loras), report
