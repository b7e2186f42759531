"""Inputs on which the error of a rounding attention is measured.

Random normal numbers alone would pass kernels that fail on the inputs of trained models. Every kind
is drawn for any length, as views of one buffer, which is what the transformer passes.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..kernels.dispatch import relative_l2

#: queries, spread over the clip, whose outputs are compared
CHECKED_QUERIES = 128

#: query, key, value: [1, heads, S, D] float32
Inputs = tuple[Tensor, Tensor, Tensor]
#: draw([3, S, heads, D] standard normal, generator) -> the same with the kind's structure
Structure = Callable[[Tensor, torch.Generator], None]


def _gaussian(qkv: Tensor, generator: torch.Generator) -> None:
    """Every score alike: errors of many small weights add up."""


def _video(qkv: Tensor, generator: torch.Generator) -> None:
    """Runs of eight tokens are alike, so attention has something to find; keys share a mean."""
    _, tokens, heads, width = qkv.shape
    kind, content = _normal(qkv, generator, 2, -(-tokens // 8), heads, width)
    for part, base in zip(qkv, (kind, kind, content), strict=True):
        part.mul_(0.5).add_(base.repeat_interleave(8, dim=0)[:tokens])
    qkv[1] += 4 * _normal(qkv, generator, heads, width)


def _sinks(qkv: Tensor, generator: torch.Generator, *, count: int) -> None:
    """`count` keys, spread over the clip, take 60 % of every query's weight and say little."""
    tokens = qkv.shape[1]
    where = torch.linspace(0, tokens - 1, count + 2, device=qkv.device).long()[1:-1]
    _attract(qkv, generator, where, 0.6 / 0.4 * tokens / count)
    qkv[2, where] *= 0.05


def _peaks(qkv: Tensor, generator: torch.Generator) -> None:
    """One key of 128 weighs as much as the other 127 together."""
    _attract(qkv, generator, torch.arange(64, qkv.shape[1], 128, device=qkv.device), 127.0)


def _attract(qkv: Tensor, generator: torch.Generator, where: Tensor, factor: float) -> None:
    """Give the keys at `where` a weight `factor` times that of an ordinary key."""
    width = qkv.shape[3]
    direction = _normal(qkv, generator, width)
    direction /= direction.norm()
    pull = 6.0
    qkv[0] += pull * direction
    # the mean of exp(score) over ordinary keys, whose scores are normal with this variance
    ordinary = math.exp(0.5 * (width + pull**2) / width)
    qkv[1, where] = direction * (math.sqrt(width) / pull * math.log(factor * ordinary))


def _normal(like: Tensor, generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, device=like.device)


KINDS: dict[str, Structure] = {
    "Gaussian": _gaussian,
    "video-like": _video,
    "1 sink": partial(_sinks, count=1),
    "8 sinks": partial(_sinks, count=8),
    "64 sinks": partial(_sinks, count=64),
    "one peak in 128": _peaks,
}


def draw(
    kind: str,
    tokens: int,
    heads: int,
    head_dim: int,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Inputs:
    """Queries, keys and values of one of KINDS.

    Args:
        kind: of KINDS.
        tokens: S, at least 66 where there are 64 sinks.
        heads: number of heads.
        head_dim: D.
        device: where they are drawn.
        dtype: of the results.
        seed: of the numbers.

    Returns:
        Three times [1, heads, S, D] in dtype, views of one buffer [1, S, 3, heads, D].
    """
    generator = torch.Generator(device).manual_seed(seed)
    qkv = torch.randn(3, tokens, heads, head_dim, generator=generator, device=device)
    KINDS[kind](qkv, generator)
    buffer = torch.empty(1, tokens, 3, heads, head_dim, device=device, dtype=dtype)
    query, key, value = buffer.copy_(qkv.transpose(0, 1)[None]).permute(2, 0, 3, 1, 4)
    return query, key, value


def exact(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention in float32, one head at a time; for few queries, as all scores are held."""
    heads = []
    for q, k, v in zip(*(x.flatten(0, 1) for x in (query, key, value)), strict=True):
        scores = q.float() @ k.float().T * q.shape[-1] ** -0.5
        heads.append(scores.softmax(dim=-1) @ v.float())
    return torch.stack(heads).view(query.shape)


def run_checked(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], query: Tensor, key: Tensor, value: Tensor
) -> list[Tensor]:
    """Run an attention on all queries.

    Returns:
        Its output for the checked queries.

    Raises:
        RuntimeError: it returns another shape than that of the queries.
    """
    got = attend(query, key, value)
    if got.shape != query.shape:
        raise RuntimeError(f"it returns {list(got.shape)} for {list(query.shape)}")
    return [got[:, :, _checked(query)].float()]


def exact_checked(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """Exact outputs for the checked queries."""
    return [exact(query[:, :, _checked(query)], key, value)]


def _checked(query: Tensor) -> Tensor:
    tokens = query.shape[2]
    return torch.linspace(0, tokens - 1, min(CHECKED_QUERIES, tokens), device=query.device).long()


def relative_error(attend: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: Inputs) -> float:
    """Relative L2 error of an attention on the checked queries; NaN if it has one."""
    return relative_l2(run_checked(attend, *inputs), exact_checked(*inputs))
