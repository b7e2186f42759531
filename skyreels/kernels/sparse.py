"""Block-sparse attention with pooled tails, in plain torch: the definition of correct.

Tokens are cut into blocks of 64. For each block of queries some blocks of keys are attended
exactly; each of the others enters the same softmax as one pooled term, so that nothing is dropped.
Image tokens come first, in an order that keeps neighbours together (transformer/token_order.py),
then the text, whose length differs between the branches of guidance. Which blocks are exact is
decided for the image alone: keys from the block in which the text starts are exact for every query,
and queries from there on attend to every key.

Any device and any floating dtype. Scores of one head and a few blocks of queries are held at a
time. triton/sparse.py does the same on GPUs.

Source: Sol-Attn arXiv:2607.24027 (threshold, pooled terms); the variance term is ours.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

#: tokens of a block
BLOCK = 64
#: how a skipped block enters: by its mean key and sum of values, with a score for each query and
#: the variance of its keys; without the variance; with one score for a block of queries; not at all
TAILS = ("variance", "rows", "block", "none")
#: of the variance term: a few keys far from the others would exceed what the expansion can tell
MAX_VARIANCE_TERM = 4.0
#: below it a row of scores counts as constant; of squared scores in base 2
_MIN_VARIANCE = 1e-6
#: blocks of queries whose scores are held at a time
_CHUNK = 16


class Pooled(NamedTuple):
    """Blocks of queries, keys and values, pooled; P is batch * heads, in float32 or float64.

    Attributes:
        query: [P, nb, D] mean query of each block.
        key: [P, nb, D] mean key of each block.
        variance: [P, nb, D] of the keys within each block, for each channel.
        value: [P, nb, D] sum of the values of each block.
        counts: [nb] tokens of each block: 64, and fewer in the last.
    """

    query: Tensor
    key: Tensor
    variance: Tensor
    value: Tensor
    counts: Tensor


def num_blocks(tokens: int) -> int:
    """Blocks of a sequence, the last of which may be short."""
    return -(-tokens // BLOCK)


def pool(query: Tensor, key: Tensor, value: Tensor) -> Pooled:
    """Pool each block of 64 tokens.

    Args:
        query: [B, heads, S, D], floating.
        key: the same.
        value: the same.

    Returns:
        Float64 for float64 inputs, else float32.
    """
    tokens = query.shape[2]
    dtype = torch.promote_types(query.dtype, torch.float32)
    last = tokens - (num_blocks(tokens) - 1) * BLOCK
    counts = torch.full((num_blocks(tokens),), BLOCK, dtype=dtype, device=query.device)
    counts[-1] = last

    def sums(x: Tensor) -> Tensor:
        x = F.pad(x.flatten(0, 1).to(dtype), (0, 0, 0, BLOCK - last))
        return x.unflatten(1, (-1, BLOCK)).sum(dim=2)

    share = 1 / counts[:, None]
    mean = sums(key) * share
    # around the mean of each block: the difference of two large sums would lose what is small
    deviation = key.flatten(0, 1).to(dtype) - mean.repeat_interleave(BLOCK, dim=1)[:, :tokens]
    variance = sums(deviation.square()[None]) * share
    return Pooled(sums(query) * share, mean, variance, sums(value), counts)


def route(pooled: Pooled, beta: float, num_image_blocks: int) -> Tensor:
    """Choose the blocks of keys that each block of queries attends to exactly.

    Those whose pooled score is more than `beta` standard deviations above the mean score, of
    Gaussian scores 1 - Phi(beta) of all: 20 % for 0.85, 13.6 % for 1.1. And the neighbours: a block
    itself, the one before and the one after.

    Args:
        pooled: of queries and keys.
        beta: threshold in standard deviations; -inf chooses all.
        num_image_blocks: nI, of 64 image tokens each; later blocks are exact anyway.

    Returns:
        [P, nI, nI] bool: query block, key block.
    """
    width = pooled.query.shape[2]
    # a shift of all keys shifts the scores of a row alike, so the mean score becomes zero
    key = pooled.key - pooled.key.mean(dim=1, keepdim=True)
    spread = key.square().mean(dim=1)
    query, key = pooled.query[:, :num_image_blocks], key[:, :num_image_blocks]
    variance = (query.square() @ spread[:, :, None]) / width
    limit = beta * (variance + _MIN_VARIANCE * math.log(2) ** 2).sqrt()
    pairs = []
    for q, k, least in zip(query, key, limit, strict=True):  # the same for any grouping of heads
        pairs.append(q @ k.T * width**-0.5 > least)
    return torch.stack(pairs) | _neighbours(num_image_blocks, key.device)


def bitmap_bytes(num_image_blocks: int) -> int:
    """Bytes of a row of a bitmap of blocks."""
    return -(-num_image_blocks // 8)


def pack(exact: Tensor) -> Tensor:
    """The blocks of `route` as bits, which take an eighth of the memory.

    Args:
        exact: [P, nI, nI] bool.

    Returns:
        [P, nI, ceil(nI / 8)] uint8; block j is bit j % 8, the least significant first, of byte
        j // 8.
    """
    count = exact.shape[2]
    bits = F.pad(exact, (0, 8 * bitmap_bytes(count) - count)).unflatten(2, (-1, 8))
    places = torch.arange(8, device=exact.device, dtype=torch.uint8)
    return (bits.to(torch.uint8) << places).sum(dim=3, dtype=torch.uint8)


def unpack(bitmap: Tensor) -> Tensor:
    """The inverse of `pack`."""
    places = torch.arange(8, device=bitmap.device, dtype=torch.uint8)
    bits = (bitmap[..., None] >> places) & 1
    return bits.flatten(2)[:, :, : bitmap.shape[1]].bool()


def _neighbours(count: int, device: torch.device) -> Tensor:
    index = torch.arange(count, device=device)
    return (index[:, None] - index).abs() <= 1


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pooled: Pooled,
    exact: Tensor,
    tail: str = "variance",
) -> Tensor:
    """Attention that is exact where it matters, and pooled elsewhere.

    With everything exact it is attention. Otherwise, for a query q in block i and with E_i its
    exact keys, U_i the other blocks, n_j, k_j and V_j the size, mean key and summed values of
    block j:

        (sum over E_i of exp(q.k) v + sum over U_i of exp(q.k_j + c_j) V_j)
        / (sum over E_i of exp(q.k) + sum over U_i of exp(q.k_j + c_j) n_j)

    with scores divided by sqrt(D). c_j = sum over channels of q^2 variance_j / 2 D, at most 4,
    makes up for the mean of exp being larger than exp of the mean.

    Args:
        query: [B, heads, S, D], image tokens first; one floating dtype.
        key: the same.
        value: the same.
        pooled: of these.
        exact: [B * heads, nI, nI] bool from `route`; of another branch of guidance, if its image
            tokens are as many.
        tail: of TAILS; "variance" is the method, the others are there to be compared with it.

    Returns:
        [B, heads, S, D] in the dtype of the queries, a view of [B, S, heads, D].
    """
    assert tail in TAILS
    batch, heads, tokens, width = query.shape
    dtype = pooled.key.dtype
    num_image = exact.shape[1]
    image_tokens = num_image * BLOCK
    out = query.new_empty(batch, tokens, heads, width).transpose(1, 2)
    for pair in range(batch * heads):
        index = divmod(pair, heads)
        q, k, v = (x[index].to(dtype) for x in (query, key, value))
        q, centre = q * width**-0.5, pooled.key[pair].mean(dim=0)
        k = k - centre  # softmax is blind to it, and so are the pooled terms if theirs is the same
        out[index][image_tokens:] = ((q[image_tokens:] @ k.T).softmax(dim=-1) @ v).to(out.dtype)
        means = pooled.query[pair, :num_image], pooled.key[pair, :num_image] - centre
        others = pooled.variance[pair, :num_image], pooled.value[pair, :num_image]
        head = _Head(k, v, *means, *others, pooled.counts[:num_image])
        for first in range(0, num_image, _CHUNK):
            blocks = slice(first, min(first + _CHUNK, num_image))
            rows = slice(blocks.start * BLOCK, blocks.stop * BLOCK)
            out[index][rows] = _attend_rows(q[rows], head, exact[pair, blocks], blocks, tail).to(
                out.dtype
            )
    return out


class _Head(NamedTuple):
    """One head: keys and values [S, D], and what of `Pooled` belongs to the image, [nI, ...]."""

    key: Tensor
    value: Tensor
    mean_query: Tensor
    mean_key: Tensor
    variance: Tensor
    value_sum: Tensor
    counts: Tensor


def _attend_rows(q: Tensor, head: _Head, exact: Tensor, blocks: slice, tail: str) -> Tensor:
    """Queries of some blocks, scaled, [R, D] -> [R, D]; exact is [R / 64, nI]."""
    width, num_text = q.shape[1], len(head.key) - exact.shape[1] * BLOCK
    tokens = exact.repeat_interleave(BLOCK, dim=1)
    tokens = torch.cat([tokens, tokens.new_ones(len(exact), num_text)], dim=1)
    scores = (q @ head.key.T).masked_fill(~tokens.repeat_interleave(BLOCK, dim=0), -math.inf)
    if tail == "block":
        means = head.mean_query[blocks] * width**-0.5 @ head.mean_key.T
        pooled = means.repeat_interleave(BLOCK, dim=0)
    else:
        pooled = q @ head.mean_key.T
    if tail == "variance":  # q is divided by sqrt(D) already
        pooled = pooled + (0.5 * (q.square() @ head.variance.T)).clamp(max=MAX_VARIANCE_TERM)
    left_out = exact if tail != "none" else torch.ones_like(exact)
    pooled = pooled.masked_fill(left_out.repeat_interleave(BLOCK, dim=0), -math.inf)
    peak = torch.cat([scores, pooled], dim=1).amax(dim=1, keepdim=True)
    scores, pooled = (scores - peak).exp(), (pooled - peak).exp()
    total = scores.sum(dim=1) + pooled @ head.counts
    out: Tensor = (scores @ head.value + pooled @ head.value_sum) / total[:, None]
    return out
