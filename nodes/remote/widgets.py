"""Widgets that several remote nodes share, and the parameters they stand for."""

import json
import logging
from typing import Any

from torch import Tensor

from ...skyreels.conditioning.embeds import with_fps_prefix
from ...skyreels.image import FITS

logger = logging.getLogger("skyreels.nodes.remote.widgets")

ORIENTATION = "by orientation"

# --- of every node that starts a run ------------------------------------------------------------

TAKE = (
    "INT",
    {
        "default": 1,
        "min": 1,
        "max": 1_000_000,
        "display_name": "variation",  # label in newer front ends; the input's name never changes
        "tooltip": "Variation. Wiro picks the seed. Same inputs and number reuse the video already "
        "paid for; a new number (e.g. 2) starts and bills a new run.",
    },
)
WAIT_WHEN_BUSY = (
    "BOOLEAN",
    {
        "default": False,
        "tooltip": "When all task slots of your account are in use (code 96): wait for a free slot "
        "and retry. Off: raise an error.",
    },
)
TIMEOUT_MINUTES = (
    "FLOAT",
    {
        "default": 40.0,
        "min": 0.1,
        "max": 1440.0,
        "step": 0.1,
        "advanced": True,
        "tooltip": "Maximum wait in minutes (40 is Wiro's own limit). After it the task keeps "
        "running at Wiro; queue again to keep waiting.",
    },
)

# --- of SkyReels-V1 -----------------------------------------------------------------------------

PICTURE_AND_PROMPT = {
    "image": (
        "IMAGE",
        {"tooltip": "First frame of the video; of a batch, the first image is used."},
    ),
    "prompt": (
        "STRING",
        {
            "multiline": True,
            "dynamicPrompts": True,
            "default": "",
            "tooltip": "What happens in the video. Must not be empty.",
        },
    ),
}
SKYREELS_OPTIONAL = {
    "negative_prompt": (
        "STRING",
        {
            "multiline": True,
            "default": "",
            "tooltip": "What the video should not show; may be empty.",
        },
    ),
    "add_fps_prefix": (
        "BOOLEAN",
        {
            "default": True,
            "tooltip": "Prepend 'FPS-24, ' to the prompt, as in training, unless it already names "
            "a frame rate.",
        },
    ),
}


def skyreels_required() -> dict[str, Any]:
    """Widgets of SkyReels-V1; the client, which knows the sizes, is not imported with the nodes."""
    from ...wiro_api.schema import SIZES

    return {
        "size": (
            [ORIENTATION, *SIZES],
            {
                "default": ORIENTATION,
                "tooltip": 'Width x height. "by orientation": 544x960 if the image is taller than '
                "wide, else 960x544.",
            },
        ),
        "fit": (
            list(FITS),
            {
                "default": "crop",
                "tooltip": "crop: centre crop to the video's aspect ratio (as in the original "
                "code). pad: black bars. stretch: resize without keeping the aspect ratio.",
            },
        ),
        "num_frames": (
            "INT",
            {
                "default": 97,
                "min": 5,
                "max": 289,
                "step": 4,
                "tooltip": "Number of frames, 4k+1, at 24 fps: 97 is four seconds. Other values "
                "are rounded up to the next 4k+1.",
            },
        ),
        "steps": (
            "INT",
            {
                "default": 30,
                "min": 1,
                "max": 100,
                "tooltip": "Number of sampling steps; the authors use 30.",
            },
        ),
        "cfg": (
            "FLOAT",
            {
                "default": 6.0,
                "min": 1.0,
                "max": 30.0,
                "step": 0.1,
                "tooltip": "Classifier-free guidance scale; the authors use 6.",
            },
        ),
    }


def skyreels_run(image: Tensor, **widgets: Any) -> tuple[dict[str, Any], str]:
    """A run of SkyReels-V1 from the widgets of a node.

    Args:
        image: [B, H, W, 3]; its orientation may decide the size.
        **widgets: prompt, and all of skyreels_required() and SKYREELS_OPTIONAL but fit.

    Returns:
        The model's parameters, and the size the image is sent in.

    Raises:
        ConfigError: the prompt is empty, or there are too few frames.
    """
    from ...wiro_api.errors import ConfigError
    from ...wiro_api.schema import SIZES

    if not widgets["prompt"].strip():
        raise ConfigError("The prompt is empty: describe what happens in the video.")
    size = widgets["size"]
    if size == ORIENTATION:
        is_portrait = image.ndim == 4 and image.shape[1] > image.shape[2]
        size = SIZES[int(is_portrait)]
    parameters = skyreels_parameters(**{**widgets, "size": size})
    asked, frames = widgets["num_frames"], parameters["numFrames"]
    if frames != asked:
        logger.info("num_frames %d is not 4k+1; using %d.", asked, frames)
    return parameters, size


def size_at_wiro(width: int, height: int, why: str = "") -> str:
    """The size of a clip as Wiro names it.

    Args:
        width: pixels.
        height: pixels.
        why: why the clip is made there, for the message.

    Returns:
        As "960x544".

    Raises:
        ConfigError: Wiro does not make it.
    """
    from ...wiro_api.errors import ConfigError
    from ...wiro_api.schema import SIZES

    size = f"{width}x{height}"
    if size not in SIZES:
        unsent = f" Nothing was sent ({why.rstrip('.')})." if why else ""
        raise ConfigError(
            f"Wiro makes {' and '.join(SIZES)}, and the clip is {size}: change width and height."
            f"{unsent}"
        )
    return size


def skyreels_parameters(**widgets: Any) -> dict[str, Any]:
    """Widgets as parameters of SkyReels-V1; a widget that is left out gives no parameter.

    Args:
        **widgets: widget name -> value; others than the model's are ignored.

    Returns:
        Parameter name -> value.

    Raises:
        ConfigError: too few frames.
    """
    from ...wiro_api.schema import frame_count

    names = {"negative_prompt": "negativePrompt", "cfg": "scale", "steps": "steps", "size": "size"}
    parameters = {names[name]: value for name, value in widgets.items() if name in names}
    if "num_frames" in widgets:
        parameters["numFrames"] = frame_count(widgets["num_frames"])
    if "prompt" in widgets:
        prompt = widgets["prompt"]
        has_prefix = widgets.get("add_fps_prefix", True)
        parameters["prompt"] = with_fps_prefix(prompt) if has_prefix else prompt
    return parameters


def parse_parameters(text: str) -> dict[str, Any]:
    """The parameters of Wiro Run Model.

    Args:
        text: JSON object; empty for no parameters.

    Returns:
        Parameter name -> value.

    Raises:
        ValueError: not a JSON object; the message says where.
    """
    fix = 'write {"name": value}, with double quotes'
    try:
        values = json.loads(text.strip() or "{}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"parameters is not valid JSON ({error}): {fix}.") from None
    if not isinstance(values, dict):
        raise ValueError(f"parameters is not a JSON object: {fix}.")
    return values
