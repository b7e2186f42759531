"""The built-in model: SkyReels' architecture at 1/5000 of its size, trained for one small task.

It is stored beside this file as the real one is published, a diffusers folder of bfloat16 files,
and goes through the same loaders. README.md there says what it can do, how it was trained and how
well it does it; show `BUILTIN_NOTICE` wherever it is used.
"""

import logging
from dataclasses import replace
from pathlib import Path

from ..runtime import Runtime
from ..text.load import TextEncoder, load_text_encoder
from ..transformer.model import SkyReelsTransformer
from ..vae.model import VideoVAE
from ..weights.load import load_transformer, load_vae

logger = logging.getLogger("skyreels.builtin")

BUILTIN_NAME = "built-in (tiny, 64x64)"
BUILTIN_NOTICE = (
    "This is the built-in model, not SkyReels-V1: a tiny network of the same architecture that "
    "only makes coloured circles, squares and triangles move, grow, shrink or fade in 17 frames of "
    '64x64 pixels, as in "a red circle moves left".'
)
#: words that it was trained on, and those of the default negative prompt
_WORDS = (
    "red green blue yellow magenta cyan white orange circle circles square squares triangle "
    "triangles move moves moving go goes going slide slides sliding left right up down upwards "
    "downwards stay stays staying stand stands standing still grow grows growing shrink shrinks "
    "shrinking get gets getting bigger larger smaller fade fades fading out away disappear "
    "disappears disappearing does do not a the is and one it to of that video fps aerial view "
    "overexposed low quality deformation poor composition bad hands teeth eyes limbs distortion"
)
KNOWN_WORDS = frozenset(_WORDS.split(" "))
#: pixels a side and frames of its training; beyond LARGEST it makes no picture that can be used
TRAINED_SIZE, TRAINED_FRAMES = 64, 17
LARGEST_SIZE, LARGEST_FRAMES = 96, 33
#: [16, 3] and [3]: its latents in model space to RGB in -1..1, for previews. Least squares on 96
#: clips through its own VAE: latent frames against the means of their pixels (29 dB)
RGB_FACTORS = (
    (-0.0131, -0.0245, 0.0137),
    (0.2529, -0.1222, -0.0215),
    (-0.0725, 0.1179, 0.0090),
    (0.0190, 0.0344, -0.1284),
    (0.0135, 0.0292, 0.0959),
    (0.1209, 0.0622, -0.0828),
    (0.0563, -0.0307, -0.0043),
    (-0.0094, 0.0225, 0.0176),
    (0.0876, 0.1245, -0.0910),
    (0.0094, 0.0323, 0.0216),
    (-0.0790, -0.0339, -0.1869),
    (0.0241, -0.0005, -0.0160),
    (0.0986, 0.0475, 0.0630),
    (0.0171, -0.0209, 0.0165),
    (-0.0578, -0.1285, -0.0441),
    (0.0004, -0.0814, -0.0006),
)
RGB_BIAS = (-0.1187, -0.0638, -0.0849)
#: contains transformer/, vae/, text_encoder/, text_encoder_2/, tokenizer/, tokenizer_2/, README.md
BUILTIN_FOLDER = Path(__file__).parent


def builtin_transformer(precision: str = "auto", *, runtime: Runtime) -> SkyReelsTransformer:
    """Load the built-in transformer onto `runtime.offload_device`.

    Args:
        precision: as for `load_transformer`, but "auto" is fp32: the model is small, and its
            results are then the same on every device.
        runtime: as for `load_transformer`.

    Returns:
        The module in eval mode, without gradients.

    Raises:
        OptionError: unknown precision.
        CheckpointError: the installation is damaged.
    """
    path = BUILTIN_FOLDER / "transformer"
    return load_transformer(path, precision=_exact(precision), runtime=runtime)


def builtin_vae(precision: str = "auto", *, runtime: Runtime) -> VideoVAE:
    """Load the built-in VAE onto `runtime.offload_device`.

    Args:
        precision: as for `load_vae`, but "auto" is fp32.
        runtime: as for `load_vae`.

    Returns:
        The module in eval mode, without gradients.

    Raises:
        OptionError: unknown precision.
        CheckpointError: the installation is damaged.
    """
    return load_vae(BUILTIN_FOLDER / "vae", precision=_exact(precision), runtime=runtime)


def builtin_text_encoder(*, runtime: Runtime) -> TextEncoder:
    """Load the built-in LLaMA and CLIP in fp32, of two used layers each, with their own vocabulary.

    Args:
        runtime: as for `load_text_encoder`.

    Returns:
        Both models in eval mode, without gradients.

    Raises:
        CheckpointError: the installation is damaged.
        DependencyError: transformers is missing.
    """
    encoder = load_text_encoder(BUILTIN_FOLDER, exact=True, runtime=runtime)
    return replace(encoder, known_words=KNOWN_WORDS)


def warn_of_builtin_size(width: int, height: int, num_frames: int) -> str | None:
    """Warn of a size at which the built-in model makes no picture that can be used.

    Args:
        width: of the clip in pixels.
        height: of the clip in pixels.
        num_frames: of the clip.

    Returns:
        What was logged; None where the size will do.
    """
    sides_will_do = all(TRAINED_SIZE <= side <= LARGEST_SIZE for side in (width, height))
    if sides_will_do and TRAINED_FRAMES <= num_frames <= LARGEST_FRAMES:
        return None
    text = (
        f"{width}x{height} and {num_frames} frames are not for the built-in model, which was "
        f"trained on {TRAINED_SIZE}x{TRAINED_SIZE} and {TRAINED_FRAMES} frames: use these (up to "
        f"{LARGEST_SIZE}x{LARGEST_SIZE} and {LARGEST_FRAMES} may do), or load SkyReels-V1."
    )
    logger.warning(text)
    return text


def _exact(precision: str) -> str:
    return "fp32" if precision == "auto" else precision
