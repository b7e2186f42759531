"""The built-in model: SkyReels' architecture at 1/5000 of its size, trained for one small task.

It is stored beside this file as the real one is published, a diffusers folder of bfloat16 files,
and goes through the same loaders. README.md there says what it can do, how it was trained and how
well it does it; show `BUILTIN_NOTICE` wherever it is used.
"""

from pathlib import Path

import torch
from torch import Tensor

from ..runtime import Runtime
from ..text.load import TextEncoder, load_text_encoder
from ..transformer.model import SkyReelsTransformer
from ..vae.model import VideoVAE
from ..weights.load import load_transformer, load_vae

BUILTIN_NAME = "built-in (tiny, 64x64)"
BUILTIN_NOTICE = (
    "This is the built-in model, not SkyReels-V1: a tiny network of the same architecture that "
    "only makes coloured circles, squares and triangles move, grow, shrink or fade in 17 frames of "
    '64x64 pixels, as in "a red circle moves left".'
)
#: contains transformer/, vae/, text_encoder/, text_encoder_2/, tokenizer/, tokenizer_2/, README.md
BUILTIN_FOLDER = Path(__file__).parent
#: width and height of the clips it was trained on
BUILTIN_SIZE = 64


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
    return load_text_encoder(BUILTIN_FOLDER, exact=True, runtime=runtime)


def _exact(precision: str) -> str:
    return "fp32" if precision == "auto" else precision


def example_image(
    width: int = BUILTIN_SIZE,
    height: int = BUILTIN_SIZE,
    *,
    colour: tuple[float, float, float] = (0.9, 0.1, 0.1),
    centre: tuple[float, float] = (0.58, 0.5),
) -> Tensor:
    """Draw an image the built-in model can start from: a red circle on a shaded blue ground.

    Args:
        width: in pixels.
        height: in pixels.
        colour: of the circle, 0..1.
        centre: of the circle, as shares of width and height.

    Returns:
        [1, height, width, 3] float32 in 0..1.
    """
    x = (torch.arange(width) + 0.5)[None, :, None]
    y = (torch.arange(height) + 0.5)[:, None, None]
    shade = torch.tensor([0.1, 0.15, 0.0]) * (x / width - 0.5)
    shade = shade + torch.tensor([0.0, 0.2, 0.25]) * (0.5 - y / height)
    ground = torch.tensor([0.15, 0.3, 0.55]) + shade
    radius = 11.0 * min(width, height) / BUILTIN_SIZE
    distance = ((x - centre[0] * width).square() + (y - centre[1] * height).square()).sqrt()
    cover = (radius - distance + 0.5).clamp(0, 1)  # one pixel of soft edge
    return torch.lerp(ground, torch.tensor(colour), cover)[None]
