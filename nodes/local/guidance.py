"""Refinements of guidance for the sampler."""

import re
from typing import Any

from ...skyreels.config import FreSca, Guidance, SkipLayers
from ...skyreels.errors import OptionError

#: choices of skip_layers
OFF, NEGATIVE, EXTRA = "off", "negative prediction", "extra evaluation"


def block_indices(text: str) -> tuple[int, ...]:
    """Indices of blocks, written with commas.

    Args:
        text: as "7, 8, 9"; may be empty.

    Returns:
        Each once, in order.

    Raises:
        OptionError: something else than whole numbers.
    """
    words = [word for word in re.split(r"[,\s]+", text.strip()) if word]
    if not all(re.fullmatch(r"\d{1,4}", word) for word in words):
        raise OptionError(f"Blocks {text[:80]!r} are not whole numbers with commas: write 7, 8, 9.")
    return tuple(dict.fromkeys(map(int, words)))


class SkyReelsGuidance:
    CATEGORY = "SkyReels/sampling"
    SEARCH_ALIASES = ["skip layer guidance", "slg", "fresca"]
    DESCRIPTION = (
        "Skip-layer guidance (SLG, STG) and FreSca for SkyReels Sampler. Both are off by default, "
        "and untested on the SkyReels weights: compare with a run without them."
    )
    FUNCTION = "make"
    RETURN_TYPES = ("SKYREELS_GUIDANCE",)
    RETURN_NAMES = ("guidance",)
    OUTPUT_TOOLTIPS = ("For the input guidance of SkyReels Sampler.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        def number(default: float, high: float, tooltip: str) -> tuple[str, dict[str, Any]]:
            limits = {"default": default, "min": 0.0, "max": high, "step": 0.01}
            return ("FLOAT", {**limits, "tooltip": tooltip})

        return {
            "required": {
                "skip_layers": (
                    [OFF, NEGATIVE, EXTRA],
                    {
                        "default": OFF,
                        "tooltip": "Leaves blocks out: of the negative prediction (SLG, no extra "
                        "cost), or of an extra evaluation of the prompt that the result is pushed "
                        "away from (STG; a guided step takes three evaluations instead of two). "
                        "Not together with a cache.",
                    },
                ),
                "double_blocks": (
                    "STRING",
                    {"default": "", "tooltip": "Double blocks left out, 0 to 19, as in 7, 8, 9."},
                ),
                "single_blocks": (
                    "STRING",
                    {"default": "20", "tooltip": "Single blocks left out, 0 to 39."},
                ),
                "skip_scale": number(
                    1.0, 10.0, "With the extra evaluation: how far it is pushed, 0.5 to 2."
                ),
                "skip_start": number(
                    0.1,
                    1.0,
                    "Fraction of the steps before which no block is left out; 0 begins at once.",
                ),
                "skip_end": number(
                    0.8,
                    1.0,
                    "Fraction of the steps after which no block is left out; 1 goes on to the end.",
                ),
                "fresca_low": number(
                    1.0,
                    10.0,
                    "FreSca: factor of the low frequencies of the guidance; 1 changes nothing.",
                ),
                "fresca_high": number(
                    1.0,
                    10.0,
                    "FreSca: factor of the high frequencies, for "
                    "sharpness: 1.25 is usual, 1 changes nothing.",
                ),
                "fresca_cutoff": (
                    "INT",
                    {
                        "default": 20,
                        "min": 1,
                        "max": 10_000,
                        "tooltip": "FreSca: indices on either side of frequency zero that are low. "
                        "960x544 has 60 across and 34 down.",
                    },
                ),
            },
        }

    def make(
        self,
        skip_layers: str,
        double_blocks: str,
        single_blocks: str,
        skip_scale: float,
        skip_start: float,
        skip_end: float,
        fresca_low: float,
        fresca_high: float,
        fresca_cutoff: int,
    ) -> tuple[Guidance]:
        skip = None
        if skip_layers == EXTRA and skip_scale == 0:
            skip_layers = OFF  # nothing is pushed, so the evaluation is left out
        if skip_layers != OFF:
            skip = SkipLayers(
                block_indices(double_blocks),
                block_indices(single_blocks),
                skip_scale if skip_layers == EXTRA else 0.0,
                skip_start,
                skip_end,
            )
        is_scaled = (fresca_low, fresca_high) != (1.0, 1.0)
        fresca = FreSca(fresca_low, fresca_high, fresca_cutoff) if is_scaled else None
        return (Guidance(skip_layers=skip, fresca=fresca),)
