"""Context windows for the sampler."""

from typing import Any

from ...skyreels.config import MAX_FRAMES, WINDOW_BLENDS, WINDOW_SCHEDULES, ContextWindows


class SkyReelsContextWindows:
    CATEGORY = "SkyReels/sampling"
    SEARCH_ALIASES = ["long video", "context options"]
    DESCRIPTION = (
        "Samples a long clip in windows that overlap in time: each step needs the memory of one "
        "window, and every window shows the picture again. Untested on the SkyReels weights."
    )
    FUNCTION = "make"
    RETURN_TYPES = ("SKYREELS_WINDOWS",)
    RETURN_NAMES = ("windows",)
    OUTPUT_TOOLTIPS = ("For the input windows of SkyReels Sampler.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "window_frames": (
                    "INT",
                    {
                        "default": 97,
                        "min": 5,
                        "max": MAX_FRAMES,
                        "step": 4,
                        "tooltip": "Frames of a window, 4k+1; 97 is the trained length. Clips that "
                        "are not longer are sampled whole.",
                    },
                ),
                "overlap_frames": (
                    "INT",
                    {
                        "default": 24,
                        "min": 0,
                        "max": MAX_FRAMES,
                        "step": 4,
                        "tooltip": "Frames that neighbours share at least, a multiple of 4. More "
                        "is smoother and takes more windows: 24 of 97 costs a third more time.",
                    },
                ),
                "schedule": (
                    list(WINDOW_SCHEDULES),
                    {
                        "default": WINDOW_SCHEDULES[0],
                        "tooltip": "static has the same windows at every step, uniform moves them "
                        "from step to step, which hides where they meet.",
                    },
                ),
                "blend": (
                    list(WINDOW_BLENDS),
                    {
                        "default": WINDOW_BLENDS[0],
                        "tooltip": "Weights within a window: pyramid and relative count its middle "
                        "most, flat counts all frames alike.",
                    },
                ),
            },
        }

    def make(
        self, window_frames: int, overlap_frames: int, schedule: str, blend: str
    ) -> tuple[ContextWindows]:
        return (ContextWindows.of_frames(window_frames, overlap_frames, schedule, blend),)
