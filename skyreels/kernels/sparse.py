"""Block-sparse attention with pooled tails, in plain torch: the definition of correct.

Tokens are cut into blocks of 64. For each block of queries some blocks of keys are attended
exactly; each of the others enters the same softmax as one pooled term, so that nothing is dropped.
Image tokens come first, in an order that keeps neighbours together (transformer/token_order.py),
then the text, whose length differs between the branches of guidance. Which blocks are exact is
decided for the image alone: keys from the block in which the text starts are exact for every query,
and queries from there on attend to every key.

Any device and any floating dtype. Scores of one head and a few blocks of queries are held at a
time. triton/sparse.py does the same on GPUs.

Source: Sol-Attn arXiv:2607.24027 (threshold, pooled terms); scores of parts of blocks, SGLang PR
    34148; the variance term is ours.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

#: tokens of a block
BLOCK = 64
#: tokens whose mean stands for them when blocks are chosen
PART = 16
#: how a skipped block enters: by its mean key and sum of values, with a score for each query and
#: the variance of its keys; without the variance; with one score for a block of queries; not at all
TAILS = ("variance", "rows", "block", "none")
#: of the variance term: a few keys far from the others would exceed what the expansion can tell
MAX_VARIANCE_TERM = 4.0
#: added to the variance of a row of scores: where all are alike, rounding must not decide
MIN_VARIANCE = 1e-6
#: blocks of queries whose scores are held at a time
_CHUNK = 4


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


class SparseResult(NamedTuple):
    """What sparse attention returns.

    Attributes:
        out: [B, heads, S, D].
        exact: uint8 [B * heads, nI, ceil(nI / 8)], see `pack`; None where a kernel does not tell.
        counts: [B * heads, nI] whole numbers: exact image blocks of each block of queries.
    """

    out: Tensor
    exact: Tensor | None
    counts: Tensor


#: attend(query, key, value, beta, num_image_blocks, exact): the last one None, or what was chosen
#: for another branch of guidance, packed
SparseAttention = Callable[[Tensor, Tensor, Tensor, float, int, Tensor | None], SparseResult]


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
        return torch.unflatten(x, 1, (-1, BLOCK)).sum(dim=2)

    share = 1 / counts[:, None]
    mean = sums(key) * share
    # around the mean of each block: the difference of two large sums would lose what is small
    deviation = key.flatten(0, 1).to(dtype) - mean.repeat_interleave(BLOCK, dim=1)[:, :tokens]
    variance = sums(deviation.square()[None]) * share
    return Pooled(sums(query) * share, mean, variance, sums(value), counts)


def route(query: Tensor, key: Tensor, beta: float, num_image_blocks: int) -> Tensor:
    """Choose the blocks of keys that each block of queries attends to exactly.

    The score of two blocks is the log-sum-exp over their 4 x 4 pairs of means of 16 tokens. Those
    are exact whose score is more than `beta` standard deviations above the mean of their row, of
    Gaussian scores 1 - Phi(beta) of all: 20 % for 0.85, 13.6 % for 1.1. So are the neighbours: a
    block itself, the one before and the one after. The text plays no part, so that the branches of
    guidance may share what is chosen.

    Args:
        query: [B, heads, S, D], image tokens first.
        key: the same.
        beta: threshold in standard deviations; -inf chooses all.
        num_image_blocks: nI, of 64 image tokens each; later blocks are exact anyway.

    Returns:
        [B * heads, nI, nI] bool: query block, key block.
    """
    width, image_tokens = query.shape[3], num_image_blocks * BLOCK
    dtype = torch.promote_types(query.dtype, torch.float32)
    means = [
        torch.unflatten(x[:, :, :image_tokens].flatten(0, 1).to(dtype), 1, (-1, PART)).mean(dim=2)
        for x in (query, key)
    ]
    means = [means[0] * width**-0.5, means[1] - means[1].mean(dim=1, keepdim=True)]
    shape = (num_image_blocks, BLOCK // PART) * 2
    chosen = []
    for q, k in zip(*means, strict=True):  # one head at a time, the same for any grouping of them
        scores = (q @ k.T).view(shape).logsumexp(dim=(1, 3))
        spread = (scores.var(dim=1, correction=0, keepdim=True) + MIN_VARIANCE).sqrt()
        chosen.append(scores > scores.mean(dim=1, keepdim=True) + beta * spread)
    return torch.stack(chosen) | _neighbours(num_image_blocks, key.device)


def route_by_means(pooled: Pooled, beta: float, num_image_blocks: int) -> Tensor:
    """Choose as comfy-kitchen's `sol_attn` does: by the scores of mean queries and mean keys.

    Args:
        pooled: of queries and keys.
        beta: threshold in standard deviations of a row of all blocks, from the diagonal variance
            of the mean keys.
        num_image_blocks: as for `route`.

    Returns:
        [P, nI, nI] bool, as `route`.

    Source: comfy-kitchen 0.2.40, the eager `sol_attn`.
    """
    width = pooled.query.shape[2]
    key = pooled.key - pooled.key.mean(dim=1, keepdim=True)
    spread = key.square().mean(dim=1)
    query, key = pooled.query[:, :num_image_blocks], key[:, :num_image_blocks]
    variance = (query.square() @ spread[:, :, None]) / width
    # its least variance is one of scores in base 2
    limit = beta * (variance + MIN_VARIANCE * math.log(2) ** 2).sqrt()
    exact: Tensor = query @ key.mT * width**-0.5 > limit
    return exact | _neighbours(num_image_blocks, key.device)


def _neighbours(count: int, device: torch.device) -> Tensor:
    index = torch.arange(count, device=device)
    return (index[:, None] - index).abs() <= 1


def pack(exact: Tensor) -> Tensor:
    """[P, nI, nI] bool -> uint8 [P, nI, ceil(nI / 8)]: bit j % 8, least significant first."""
    padded = torch.unflatten(F.pad(exact, (0, -exact.shape[2] % 8)), 2, (-1, 8))
    bits = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=exact.device)
    return (padded.to(torch.uint8) * bits).sum(dim=3, dtype=torch.uint8)


def unpack(packed: Tensor) -> Tensor:
    """The reverse of `pack`."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = packed[..., None].bitwise_right_shift(shifts).bitwise_and(1)
    return bits.flatten(2)[:, :, : packed.shape[1]].bool()


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


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: float,
    num_image_blocks: int,
    exact: Tensor | None = None,
) -> SparseResult:
    """All of it, a `SparseAttention`.

    Args:
        query: [B, heads, S, D], image tokens first; one floating dtype.
        key: the same.
        value: the same.
        beta: see `route`; not used where `exact` is given.
        num_image_blocks: nI.
        exact: None, or what was chosen for another branch of guidance, packed.

    Returns:
        The output, what was exact, and how much.
    """
    chosen = route(query, key, beta, num_image_blocks) if exact is None else unpack(exact)
    out = attend(query, key, value, pool(query, key, value), chosen)
    return SparseResult(out, pack(chosen) if exact is None else exact, chosen.sum(dim=2))


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
    # in place: a copy of the scores costs as much as a product
    scores = (q @ head.key.T).masked_fill_(~tokens.repeat_interleave(BLOCK, dim=0), -math.inf)
    if tail == "block":
        means = head.mean_query[blocks] * width**-0.5 @ head.mean_key.T
        pooled = means.repeat_interleave(BLOCK, dim=0)
    else:
        pooled = q @ head.mean_key.T
    if tail == "variance":  # q is divided by sqrt(D) already
        pooled = pooled + (0.5 * (q.square() @ head.variance.T)).clamp(max=MAX_VARIANCE_TERM)
    left_out = exact if tail != "none" else torch.ones_like(exact)
    pooled = pooled.masked_fill(left_out.repeat_interleave(BLOCK, dim=0), -math.inf)
    peak = torch.maximum(scores.amax(dim=1, keepdim=True), pooled.amax(dim=1, keepdim=True))
    scores, pooled = scores.sub_(peak).exp_(), pooled.sub_(peak).exp_()
    total = scores.sum(dim=1) + pooled @ head.counts
    out: Tensor = (scores @ head.value + pooled @ head.value_sum) / total[:, None]
    return out
