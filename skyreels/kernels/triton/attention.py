"""Attention with int8 queries and keys, for sm8x, sm90 and sm12x.

The GEMM of weights and values is e4m3 where the tensor cores take that (8.9 and later), or fp16.
`reference.quantized_attention` is the same arithmetic in plain torch, and gives the reasons. One
kernel quantizes queries and keys, one values, and the third attends: a program takes a tile of
queries past all tiles of keys. Quantized tensors are padded to whole tiles, so only scores need a
mask, and only in the last tile.

A tensor core of 8.9 and 9.0 sums e4m3 products with 13 bits behind the point. So a tile of keys is
summed there, and tiles in float32: old sums are multiplied by their decay under a new peak anyway.
The tensor core sums the weights as well, by multiplying them with ones: these are the sums of the
rounded weights, at a fraction of the cost of upcasting them again.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import VALUES_E4M3, VALUES_FP16, ValueFormat, hadamard
from .common import INTERPRETED, launch, narrow

HEAD_DIMS = (32, 64, 128)


class Tile(NamedTuple):
    """Queries of one program and keys at a time, which share a scale.

    Attributes:
        queries: of one program.
        keys: at a time.
        num_warps: of one program.
        num_stages: tiles of keys in flight.
        values: format of weights and values.
    """

    queries: int
    keys: int
    num_warps: int
    num_stages: int
    values: ValueFormat


_FP16 = Tile(128, 64, 8, 3, VALUES_FP16)
_E4M3 = Tile(128, 64, 8, 3, VALUES_E4M3), Tile(128, 128, 8, 2, VALUES_E4M3)
#: compute capability -> tiles, as compiled for a head dimension of 128, not yet timed: no register
#: spilled, at most the 99 KiB of shared memory of 8.6, 8.9 and 12.0. On 9.0 two programs of the
#: first share a multiprocessor (231 registers, 74 KiB), and the softmax of one hides behind the
#: products of the other. GeForce cards multiply e4m3 no faster than fp16 summed in fp16, which
#: loses a third as much. 10.x is left out: Triton 3.6 does not compile these for it
TILES = {
    (8, 0): (_FP16,),
    (8, 6): (_FP16,),
    (8, 7): (_FP16,),
    (8, 9): (*_E4M3, _FP16),
    (9, 0): (Tile(64, 128, 4, 2, VALUES_E4M3), Tile(128, 128, 8, 3, VALUES_E4M3), _FP16),
    (12, 0): (*_E4M3, _FP16),
    (12, 1): (*_E4M3, _FP16),
}
#: tokens of values quantized at a time; divides every tile's keys
VALUE_BLOCK = 64
#: columns of ones that a tile of weights is multiplied with, the fewest a GEMM takes
_ONES = tl.constexpr(16)


@triton.jit
def _scale(largest_bits):
    """Bits of largest magnitudes to int8 scales; zero gives scale 1, NaN stays NaN."""
    largest = largest_bits.to(tl.float32, bitcast=True)
    return tl.where(largest == 0.0, 1.0, largest / 127.0)


@triton.jit
def _quantize_rotated_kernel(
    x,
    mean,
    signs,
    out,
    out_scale,
    x_batch,
    x_head,
    x_row,
    heads,
    tokens,
    padded,
    width: tl.constexpr,
    block: tl.constexpr,
    row_scales: tl.constexpr,
    factor: tl.constexpr,
):
    """Rotate and quantize a tile of queries (a scale for each) or of centered keys (one for all).

    signs is the unscaled Hadamard matrix; factor, part of every scale, makes up for that. The
    largest magnitude is taken over bits: as integers they order alike, and a NaN is the largest.
    """
    pair = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * block + tl.arange(0, block)
    columns = tl.arange(0, width)
    inside = (rows < tokens)[:, None]
    start = x + (pair // heads) * x_batch + (pair % heads) * x_head
    tile = tl.load(start + rows.to(tl.int64)[:, None] * x_row + columns, mask=inside, other=0.0)
    matrix = tl.load(signs + columns[:, None] * width + columns)
    if INTERPRETED:  # its bf16 GEMM is wrong
        tile, matrix = tile.to(tl.float32), matrix.to(tl.float32)
    rotated = tl.dot(tile, matrix, input_precision="ieee")
    if mean is not None:
        rotated = tl.where(inside, rotated - tl.load(mean + pair * width + columns), 0.0)
    largest = tl.max(rotated.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    if row_scales:
        scale = _scale(largest)
        tl.store(out_scale + pair * padded + rows, scale * factor)
        rotated = rotated / scale[:, None]
    else:
        scale = _scale(tl.max(largest, axis=0))
        tl.store(out_scale + pair * tl.num_programs(0) + tl.program_id(0), scale * factor)
        rotated = rotated / scale
    tl.store(out + (pair * padded + rows[:, None]) * width + columns, narrow(rotated, tl.int8))


@triton.jit
def _quantize_values_kernel(
    x,
    mean,
    scale,
    out,
    sums,
    x_batch,
    x_head,
    x_row,
    heads,
    tokens,
    padded,
    width: tl.constexpr,
    block: tl.constexpr,
):
    """Center, quantize and transpose a tile of values; and sum the rounded values."""
    pair = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * block + tl.arange(0, block)
    columns = tl.arange(0, width)
    inside = (rows < tokens)[:, None]
    start = x + (pair // heads) * x_batch + (pair % heads) * x_head
    tile = tl.load(start + rows.to(tl.int64)[:, None] * x_row + columns, mask=inside, other=0.0)
    tile = tile.to(tl.float32) - tl.load(mean + pair * width + columns)
    tile = tl.where(inside, tile / tl.load(scale + pair * width + columns), 0.0)
    tile = narrow(tile, out.dtype.element_ty)
    place = out + (pair * width + columns[:, None]) * padded + rows
    tl.store(place, tl.trans(tile))
    if sums is not None:
        of_tile = (pair * tl.num_programs(0) + tl.program_id(0)) * width + columns
        tl.store(sums + of_tile, tl.sum(tile.to(tl.float32), axis=0))


@triton.jit
def weigh(scores, factor, peak, log_max, dtype: tl.constexpr):
    """The softmax so far, one tile further.

    Args:
        scores: [M, N] float32; times factor, in base 2.
        factor: [M].
        peak: [M], the largest score of each row so far.
        log_max: in base 2, of the weight that the largest score so far gets.
        dtype: of the weights.

    Returns:
        Weights [M, N]; what earlier sums are to be multiplied with [M]; the new peak [M].
    """
    new_peak = tl.maximum(peak, tl.max(scores, axis=1) * factor)
    weights = tl.exp2(scores * factor[:, None] - (new_peak - log_max)[:, None])
    return narrow(weights, dtype), tl.exp2(peak - new_peak), new_peak


@triton.jit
def product(a, b, out_dtype: tl.constexpr = tl.float32):
    """A GEMM of two tiles in the dtype that both have."""
    if INTERPRETED and a.dtype == tl.bfloat16:  # its bf16 GEMM is wrong
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, out_dtype=out_dtype, input_precision="ieee")


@triton.jit
def add_weighted(weights, decay, value, sums, total, sum_in_fp16: tl.constexpr):
    """Weigh the values of a tile.

    Args:
        weights: [M, N].
        decay: [M], what earlier sums are multiplied with.
        value: [N, width].
        sums: [M, width] float32, of weighted values.
        total: [M, 16] float32, of weights, columns alike.
        sum_in_fp16: within the tile, at twice the rate of GeForce cards.

    Returns:
        sums and total with this tile.
    """
    ones = tl.full((weights.shape[1], _ONES), 1.0, tl.float32).to(weights.dtype)
    total = total * decay[:, None] + product(weights, ones)
    if sum_in_fp16:
        part = product(weights, value, tl.float16).to(tl.float32)
    else:
        part = product(weights, value)
    return sums * decay[:, None] + part, total


@triton.jit
def attend_tile(
    query,
    query_scale,
    k,
    k_scale,
    v,
    sums,
    total,
    peak,
    tile,
    tokens,
    k_row,
    v_row,
    v_column,
    width: tl.constexpr,
    block: tl.constexpr,
    log_max: tl.constexpr,
    sum_in_fp16: tl.constexpr,
    in_place: tl.constexpr,
    masked: tl.constexpr,
):
    """Attend to one tile of keys.

    Args:
        query: [M, width], int8, or in the dtype of the keys.
        query_scale: [M]; scores times it, and times k_scale, are in base 2.
        k: keys of this head.
        k_scale: one for each tile, None where keys are not in int8.
        v: values of this head.
        sums: [M, width], as `add_weighted`.
        total: [M, 16], as there.
        peak: [M], as `weigh`.
        tile: which one.
        tokens: of the keys.
        k_row: stride of keys.
        v_row: stride of values.
        v_column: stride of the channels of values.
        width: channels of a head.
        block: keys of a tile.
        log_max: as `weigh`.
        sum_in_fp16: as `add_weighted`.
        in_place: whether keys or values are no copies padded to whole tiles.
        masked: whether the tile may be partial.

    Returns:
        sums, total and peak with this tile.
    """
    keys = tile * block + tl.arange(0, block)
    columns = tl.arange(0, width)
    inside = keys < tokens
    if in_place:
        start = tile.to(tl.int64) * block
        k += start * k_row
        v += start * v_row
        keys = tl.arange(0, block)
        if masked:  # copies are padded
            keys = tl.minimum(keys, tokens - tile * block - 1)
    key = tl.load(k + columns[:, None] + keys * k_row)
    if k_scale is not None:
        scores = product(query, key, tl.int32).to(tl.float32)
        factor = query_scale * tl.load(k_scale + tile)
    else:
        scores = product(query, key)
        factor = query_scale
    if masked:
        scores = tl.where(inside[None, :], scores, float("-inf"))
    weights, decay, peak = weigh(scores, factor, peak, log_max, v.dtype.element_ty)
    value = tl.load(v + columns * v_column + keys[:, None] * v_row)
    sums, total = add_weighted(weights, decay, value, sums, total, sum_in_fp16)
    return sums, total, peak


@triton.jit
def _attend_kernel(
    q,
    q_scale,
    k,
    k_scale,
    v,
    v_scale,
    v_mean,
    out,
    out_batch,
    out_head,
    out_row,
    heads,
    queries,
    tokens,
    padded_q,
    padded_k,
    width: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    log_max: tl.constexpr,
    sum_in_fp16: tl.constexpr,
):
    pair = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * block_m + tl.arange(0, block_m)
    columns = tl.arange(0, width)
    query = tl.load(q + pair * padded_q * width + rows[:, None] * width + columns)
    query_scale = tl.load(q_scale + pair * padded_q + rows)
    k += pair * padded_k * width
    v += pair * padded_k * width
    k_scale += pair * (padded_k // block_n)
    sums = tl.zeros((block_m, width), tl.float32)
    total = tl.zeros((block_m, _ONES), tl.float32)
    peak = tl.full((block_m,), float("-inf"), tl.float32)
    whole_tiles = tokens // block_n
    # the last tile goes first: behind the loop it would cost the loop 60 registers
    if whole_tiles * block_n < tokens:
        sums, total, peak = attend_tile(
            query,
            query_scale,
            k,
            k_scale,
            v,
            sums,
            total,
            peak,
            whole_tiles,
            tokens,
            width,
            1,
            padded_k,
            width,
            block_n,
            log_max,
            sum_in_fp16,
            False,
            True,
        )
    for tile in range(whole_tiles):
        sums, total, peak = attend_tile(
            query,
            query_scale,
            k,
            k_scale,
            v,
            sums,
            total,
            peak,
            tile,
            tokens,
            width,
            1,
            padded_k,
            width,
            block_n,
            log_max,
            sum_in_fp16,
            False,
            False,
        )
    result = sums / (tl.sum(total, axis=1) / _ONES)[:, None]
    result = result * tl.load(v_scale + pair * width + columns)
    result += tl.load(v_mean + pair * width + columns)
    place = out + (pair // heads) * out_batch + (pair % heads) * out_head
    place += rows.to(tl.int64)[:, None] * out_row + columns
    tl.store(place, narrow(result, out.dtype.element_ty), mask=(rows < queries)[:, None])


@lru_cache
def _signs(width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The unscaled Hadamard matrix [width, width]; made once, as it takes thirty launches."""
    return (hadamard(width, device) * width**0.5).to(dtype)


def tiles(capability: tuple[int, int]) -> tuple[Tile, ...]:
    """The tiles made for a compute capability, the likely fastest first; none for some."""
    return TILES.get(capability, ())


def quantize_queries(query: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Rotate and quantize queries.

    Args:
        query: [B, heads, S, D], the head dimension contiguous.
        block: queries of a program.

    Returns:
        [B * heads, S', D] int8 and a scale for each query [B * heads, S'], with S' a multiple of
        block; products of these with keys of `quantize_keys` are scores in base 2.
    """
    unit = query.shape[-1] ** -0.5
    # the rotation's 1 / width for each pair, softmax's scale, and exp2 in exp's place
    return _quantize_rotated(query, None, block, True, unit * unit * math.log2(math.e))


def quantize_keys(key: Tensor, mean: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Center, rotate and quantize keys.

    Args:
        key: [B, heads, T, D], the head dimension contiguous.
        mean: float32, of each head [D], to be subtracted.
        block: keys that share a scale.

    Returns:
        [B * heads, T', D] int8 and a scale for each tile [B * heads, T' / block].
    """
    width = key.shape[-1]
    mean = mean @ _signs(width, key.device, torch.float32)
    return _quantize_rotated(key, mean, block, False, width**-0.5)


def _quantize_rotated(
    x: Tensor, mean: Tensor | None, block: int, row_scales: bool, factor: float
) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, width = x.shape
    tiles, pairs = triton.cdiv(tokens, block), batch * heads
    out = x.new_empty(pairs, tiles * block, width, dtype=torch.int8)
    scale = x.new_empty(pairs, tiles * block if row_scales else tiles, dtype=torch.float32)
    launch(
        _quantize_rotated_kernel,
        (tiles, pairs),
        x,
        mean,
        _signs(width, x.device, x.dtype),
        out,
        scale,
        *x.stride()[:3],
        heads,
        tokens,
        tiles * block,
        width,
        block,
        row_scales,
        factor,
        num_warps=8,
    )
    return out, scale


def quantize_values(
    value: Tensor,
    mean: Tensor,
    scale: Tensor,
    padded: int,
    dtype: torch.dtype,
    sums: Tensor | None = None,
) -> Tensor:
    """Center, quantize and transpose values.

    Args:
        value: [B, heads, T, D], the head dimension contiguous.
        mean: float32, of each head [D], to be subtracted.
        scale: float32, of each head [D], to be divided by.
        padded: T', a multiple of VALUE_BLOCK.
        dtype: of the result.
        sums: [B * heads, T' / VALUE_BLOCK, D] float32, filled with sums of the rounded values.

    Returns:
        [B * heads, D, T'].
    """
    batch, heads, tokens, width = value.shape
    out = value.new_empty(batch * heads, width, padded, dtype=dtype)
    launch(
        _quantize_values_kernel,
        (padded // VALUE_BLOCK, batch * heads),
        value,
        mean,
        scale,
        out,
        sums,
        *value.stride()[:3],
        heads,
        tokens,
        padded,
        width,
        VALUE_BLOCK,
        num_warps=8,
    )
    return out


def quantized_attention(query: Tensor, key: Tensor, value: Tensor, tile: Tile) -> Tensor:
    """`reference.quantized_attention`.

    Reads the inputs in place, as long as the head dimension of each is contiguous; takes 3 bytes
    per element for their quantized copies, 4 where values are fp16.

    Args:
        query: [B, heads, S, D] fp16, bf16 or fp32; D 32, 64 or 128.
        key: [B, heads, T, D].
        value: [B, heads, T, D].
        tile: one that the device takes, see `tiles`.

    Returns:
        [B, heads, S, D] in query's dtype, a view of [B, S, heads, D].
    """
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    batch, heads, queries, width = query.shape
    tokens, pairs = key.shape[2], batch * heads

    mean = value.mean(dim=2, dtype=torch.float32)
    least, largest = torch.aminmax(value, dim=2)
    v_scale = torch.maximum(largest - mean, mean - least) / tile.values.value_max
    v_scale = torch.where(v_scale == 0, 1.0, v_scale)
    q, q_scale = quantize_queries(query, tile.queries)
    k, k_scale = quantize_keys(key, key.mean(dim=2, dtype=torch.float32), tile.keys)
    padded_q, padded_k = q.shape[1], k.shape[1]
    v_sums = value.new_empty(pairs, padded_k // VALUE_BLOCK, width, dtype=torch.float32)
    v = quantize_values(value, mean, v_scale, padded_k, tile.values.dtype, v_sums)
    out = query.new_empty(batch, queries, heads, width).transpose(1, 2)
    rounded_mean = v_sums.sum(dim=1).view(mean.shape) / tokens
    mean = mean - 0.5 * v_scale * rounded_mean
    launch(
        _attend_kernel,
        (padded_q // tile.queries, pairs),
        q,
        q_scale,
        k,
        k_scale,
        v,
        v_scale,
        mean,
        out,
        *out.stride()[:3],
        heads,
        queries,
        tokens,
        padded_q,
        padded_k,
        width,
        tile.queries,
        tile.keys,
        math.log2(tile.values.weight_max),
        # GeForce cards sum fp16 products in fp16 at twice the rate, and 64 keys stay below 2^15
        tile.values.dtype == torch.float16,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out
