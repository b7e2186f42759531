"""Queries, keys and values of six kinds of attention head, drawn from a seed.

A stand-in for what a trained video model has, where random numbers would make every key alike: the
rotary table with the axes of SkyReels, a positional preference for each axis, and content that is
smooth in space and moves with time. `first` looks for the first frame, `semantic` follows content
across the clip, `diffuse` attends a little to everything. In each, 90 % of the weight is on 3 to
55 % of the keys.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from comfyui_skyreels.skyreels.config import TransformerConfig
from comfyui_skyreels.skyreels.transformer.layers import rope_table
from torch import Tensor


class Taste(NamedTuple):
    """What a head looks for.

    Attributes:
        time: weight of position along time: the larger, the nearer are the keys it attends to.
        height: likewise of rows.
        width: likewise of columns.
        content: weight of what moves through the clip.
    """

    time: float
    height: float
    width: float
    content: float


HEADS = {
    "local": Taste(1.2, 1.05, 1.05, 0.8),
    "spatial": Taste(2.0, 0.55, 0.55, 1.0),
    "temporal": Taste(0.3, 1.3, 1.3, 0.8),
    "semantic": Taste(0.3, 0.4, 0.4, 1.5),
    "diffuse": Taste(0.4, 0.4, 0.4, 0.8),
    "first": Taste(0.5, 1.1, 1.1, 0.8),
}
#: tokens in time, height and width; and of the text
GRID, TEXT = (9, 17, 30), 60
#: of a query or key, of a value
NOISE = 0.5
#: tokens of space by which content moves from frame to frame
DRIFT = (0.6, 1.3)


def draw_head(
    kind: str,
    *,
    grid: tuple[int, int, int] = GRID,
    text: int = TEXT,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """One head, in the raster order of the tokens, the text last.

    Args:
        kind: of HEADS.
        grid: tokens in time, height and width.
        text: tokens of text.
        seed: of the numbers.
        device: where the results are; they are drawn on the CPU.

    Returns:
        Query, key, value: [S, 128] float32.
    """
    taste = HEADS[kind]
    generator = torch.Generator().manual_seed(seed * len(HEADS) + list(HEADS).index(kind))
    config = TransformerConfig()
    axes = config.rope_axes_dim
    width, frame = sum(axes), grid[1] * grid[2]
    image = grid[0] * frame

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    base = torch.cat(
        [torch.full((dim,), weight) for dim, weight in zip(axes, taste[:3], strict=True)]
    )
    # content sits in the slow frequencies of space, which turn little between neighbours
    starts = (axes[0], axes[0] + axes[1])
    slow = torch.cat([torch.arange(start + 28, start + 56) for start in starts])
    moving = _moving_field(grid, len(slow), 3.0, generator)
    mixed = moving @ normal(len(slow), len(slow)) / len(slow) ** 0.5
    query, key = base + NOISE * normal(image, width), base + NOISE * normal(image, width)
    query[:, slow] += taste.content * moving
    key[:, slow] += taste.content * moving + 0.3 * mixed
    rope = rope_table(grid, config)
    query, key = _rotated(query, rope), _rotated(key, rope)
    if kind == "first":
        sign = 3.0 * F.normalize(normal(width), dim=0)
        query += sign
        key[:frame] += sign
    value = _moving_field(grid, width, 2.0, generator) + NOISE * normal(image, width)
    text_query, text_key = normal(text, width), normal(text, width) + 0.05 * query.mean(dim=0)
    joined = (
        torch.cat(pair)
        for pair in ((query, text_query), (key, text_key), (value, normal(text, width)))
    )
    q, k, v = (x.to(device) for x in joined)
    return q, k, v


def draw_heads(count: int = len(HEADS), **options: object) -> tuple[Tensor, Tensor, Tensor]:
    """The kinds in turn.

    Args:
        count: of heads.
        options: of `draw_head`.

    Returns:
        Query, key, value: [1, count, S, 128] float32.
    """
    kinds = list(HEADS)
    drawn = [
        draw_head(kinds[index % len(kinds)], **{**options, "seed": index // len(kinds)})  # type: ignore[arg-type]
        for index in range(count)
    ]
    q, k, v = (torch.stack(parts)[None] for parts in zip(*drawn, strict=True))
    return q, k, v


def _rotated(x: Tensor, rope: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * rope).flatten(-2)


def _moving_field(
    grid: tuple[int, int, int], channels: int, scale: float, generator: torch.Generator
) -> Tensor:
    """Smooth noise of unit variance that drifts from frame to frame, [N, channels]."""
    frames, height, width = grid
    noise = torch.randn(1, channels, 3 * height, 3 * width, generator=generator)
    reach = int(1.5 * scale)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / scale).square())
    for shape, padding in (((1, 1, -1, 1), (reach, 0)), ((1, 1, 1, -1), (0, reach))):
        each = kernel.view(shape).expand(channels, -1, -1, -1)
        noise = F.conv2d(noise, each, padding=padding, groups=channels)
    noise = noise / noise.std()
    seen = []
    for frame in range(frames):
        top, left = (
            int(by * frame) % size for by, size in zip(DRIFT, (height, width), strict=True)
        )
        seen.append(noise[0, :, top : top + height, left : left + width])
    return torch.stack(seen).permute(0, 2, 3, 1).reshape(-1, channels)
