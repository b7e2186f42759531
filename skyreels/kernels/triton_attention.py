"""Attention with both products in int8, for sm8x, sm90 and sm12x.

`attention.int8_attention` is the same arithmetic in plain torch, and says why it is what it is.
One kernel rounds queries and keys, one values, and the third attends: a program takes a tile of
queries past all tiles of keys. 8-bit tensors are padded to whole tiles, so only scores need a mask,
and only in the last tile. On sm90 both products are wgmma, with the weights in registers.
"""

import contextlib
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import hadamard

HEAD_DIMS = (32, 64, 128)
#: queries of one program
BLOCK_M = 128
#: the attending kernel then holds 253 registers a thread on sm90, about 190 elsewhere; none spills
NUM_WARPS, NUM_STAGES = 8, 3

_LOG2_127 = tl.constexpr(math.log2(127))
#: adding this leaves |x| < 2^22, rounded to the nearest integer, in the low bits of a float32
_TO_INTEGER = tl.constexpr(1.5 * 2.0**23)


@triton.jit
def _narrow(x):
    """float32 within -127..127 to int8, to nearest, ties to even."""
    return (x + _TO_INTEGER).to(tl.int32, bitcast=True).to(tl.int8)


#: also false where the kernels were compiled: `triton.jit` decides when it decorates
_INTERPRETED = tl.constexpr(not isinstance(_narrow, triton.JITFunction))


@triton.jit
def _scale(largest_bits):
    """Bits of largest magnitudes to scales; those of nothing are 1, and a NaN stays one."""
    largest = largest_bits.to(tl.float32, bitcast=True)
    return tl.where(largest == 0.0, 1.0, largest / 127.0)


@triton.jit
def _round_rotated_kernel(
    x, mean, signs, out, out_scale,
    x_batch, x_head, x_row, heads, tokens, padded,
    width: tl.constexpr, block: tl.constexpr, row_scales: tl.constexpr, factor: tl.constexpr,
):  # fmt: skip
    """A tile of queries (a scale for each) or of keys (one for all, without their mean), rotated.

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
    if _INTERPRETED:  # its product of bf16 is wrong
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
    tl.store(out + (pair * padded + rows[:, None]) * width + columns, _narrow(rotated))


@triton.jit
def _round_values_kernel(
    x, mean, spread, out, out_scale,
    x_batch, x_head, x_row, heads, tokens, padded,
    width: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """A tile of values without their mean, over the spread of their channel, transposed."""
    pair = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * block + tl.arange(0, block)
    columns = tl.arange(0, width)
    inside = (rows < tokens)[:, None]
    start = x + (pair // heads) * x_batch + (pair % heads) * x_head
    tile = tl.load(start + rows.to(tl.int64)[:, None] * x_row + columns, mask=inside, other=0.0)
    tile = tile.to(tl.float32) - tl.load(mean + pair * width + columns)
    tile = tl.where(inside, tile / tl.load(spread + pair * width + columns), 0.0)
    largest = tl.max(tile.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    scale = _scale(tl.max(largest, axis=0))
    tl.store(out_scale + pair * tl.num_programs(0) + tl.program_id(0), scale)
    place = out + (pair * width + columns[:, None]) * padded + rows
    tl.store(place, tl.trans(_narrow(tile / scale)))


@triton.jit
def _attend_tile(
    query, query_scale, k, k_scale, v, v_scale, total, peak, sums, tile, tokens, padded,
    width: tl.constexpr, block: tl.constexpr, masked: tl.constexpr,
):  # fmt: skip
    """One tile of keys: sums [M, width], total [M] and peak [M] after it."""
    keys = tile * block + tl.arange(0, block)
    columns = tl.arange(0, width)
    key = tl.load(k + columns[:, None] + keys * width)
    scores = tl.dot(query, key, out_dtype=tl.int32).to(tl.float32)
    if masked:
        scores = tl.where((keys < tokens)[None, :], scores, float("-inf"))
    factor = query_scale * tl.load(k_scale + tile)
    top = tl.max(scores, axis=1) * factor
    weights = tl.exp2(scores * factor[:, None] - (top - _LOG2_127)[:, None])
    new_peak = tl.maximum(peak, top)
    kept, added = tl.exp2(peak - new_peak), tl.exp2(top - new_peak)
    whole = (weights + _TO_INTEGER) - _TO_INTEGER
    total = total * kept + tl.sum(whole, axis=1) * added
    value = tl.load(v + columns * padded + keys[:, None])
    part = tl.dot(_narrow(weights), value, out_dtype=tl.int32).to(tl.float32)
    sums = sums * kept[:, None] + part * (added * tl.load(v_scale + tile))[:, None]
    return sums, total, new_peak


@triton.jit
def _attend_kernel(
    q, q_scale, k, k_scale, v, v_scale, mean, spread, out,
    out_batch, out_head, out_row, heads, queries, tokens, padded_q, padded_k,
    width: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * block_m + tl.arange(0, block_m)
    columns = tl.arange(0, width)
    query = tl.load(q + pair * padded_q * width + rows[:, None] * width + columns)
    query_scale = tl.load(q_scale + pair * padded_q + rows)
    k += pair * padded_k * width
    v += pair * padded_k * width
    k_scale += pair * (padded_k // block_n)
    v_scale += pair * (padded_k // block_n)
    sums = tl.zeros((block_m, width), tl.float32)
    total = tl.zeros((block_m,), tl.float32)
    peak = tl.full((block_m,), float("-inf"), tl.float32)
    whole_tiles = tokens // block_n
    # the last tile goes first: behind the loop it would cost the loop 60 registers
    if whole_tiles * block_n < tokens:
        sums, total, peak = _attend_tile(
            query, query_scale, k, k_scale, v, v_scale, total, peak, sums, whole_tiles, tokens,
            padded_k, width, block_n, True,
        )  # fmt: skip
    for tile in range(whole_tiles):
        sums, total, peak = _attend_tile(
            query, query_scale, k, k_scale, v, v_scale, total, peak, sums, tile, tokens, padded_k,
            width, block_n, False,
        )  # fmt: skip
    result = sums / total[:, None] * tl.load(spread + pair * width + columns)
    result += tl.load(mean + pair * width + columns)
    place = out + (pair // heads) * out_batch + (pair % heads) * out_head
    place += rows.to(tl.int64)[:, None] * out_row + columns
    tl.store(place, result.to(out.dtype.element_ty), mask=(rows < queries)[:, None])


def key_tile(capability: tuple[int, int]) -> int:
    """Keys that share a scale, and against whose largest weight the others are rounded.

    128 halve the work between the products, but only on sm90 do they fit in the registers. Not for
    sm10x, whose tensor cores take operands that Triton 3.6 cannot lay out for these kernels.
    """
    return 128 if capability == (9, 0) else 64


def int8_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What `attention.int8_attention` computes.

    Reads the inputs where they lie, as long as the head dimension of each is contiguous; takes
    3 bytes per element for their 8-bit copies. The output lies as [B, S, heads, D].

    Args:
        query: [B, heads, S, D]; key, value: [B, heads, T, D]; fp16, bf16 or fp32, D 32, 64 or 128.
    Returns:
        [B, heads, S, D] in query's dtype.
    """
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    batch, heads, queries, width = query.shape
    tokens, device, pairs = key.shape[2], query.device, batch * heads
    is_cuda = device.type == "cuda"
    block_n = key_tile(torch.cuda.get_device_capability(device) if is_cuda else (8, 0))
    tiles_q, tiles_k = triton.cdiv(queries, BLOCK_M), triton.cdiv(tokens, block_n)
    padded_q, padded_k = tiles_q * BLOCK_M, tiles_k * block_n

    signs = hadamard(width, device) * width**0.5
    key_mean = key.mean(dim=2, dtype=torch.float32) @ signs
    mean = value.mean(dim=2, dtype=torch.float32)
    norm = torch.linalg.vector_norm(value, dim=2, dtype=torch.float32)
    spread = (norm.square() / tokens - mean.square()).clamp_min(0).sqrt()
    spread = torch.where(spread == 0, 1.0, spread)

    def empty(*shape: int, dtype: torch.dtype = torch.int8) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    q, q_scale = empty(pairs, padded_q, width), empty(pairs, padded_q, dtype=torch.float32)
    k, k_scale = empty(pairs, padded_k, width), empty(pairs, tiles_k, dtype=torch.float32)
    v, v_scale = empty(pairs, width, padded_k), empty(pairs, tiles_k, dtype=torch.float32)
    out = empty(batch, queries, heads, width, dtype=query.dtype).transpose(1, 2)
    # the rotation's 1 / width for each pair, softmax's scale, and exp2 in exp's place
    unit = width**-0.5
    # multiplications and additions are to be fused, which Triton 3.10 no longer does by itself
    options = {"num_warps": NUM_WARPS, "enable_fp_fusion": True}
    with torch.cuda.device(device) if is_cuda else contextlib.nullcontext():
        _round_rotated_kernel[(tiles_q, pairs)](
            query, None, signs.to(query.dtype), q, q_scale, *query.stride()[:3], heads, queries,
            padded_q, width, BLOCK_M, True, unit * unit * math.log2(math.e), **options,
        )  # fmt: skip
        _round_rotated_kernel[(tiles_k, pairs)](
            key, key_mean, signs.to(key.dtype), k, k_scale, *key.stride()[:3], heads, tokens,
            padded_k, width, block_n, False, unit, **options,
        )  # fmt: skip
        _round_values_kernel[(tiles_k, pairs)](
            value, mean, spread, v, v_scale, *value.stride()[:3], heads, tokens, padded_k, width,
            block_n, **options,
        )  # fmt: skip
        _attend_kernel[(tiles_q, pairs)](
            q, q_scale, k, k_scale, v, v_scale, mean, spread, out, *out.stride()[:3], heads,
            queries, tokens, padded_q, padded_k, width, BLOCK_M, block_n, num_stages=NUM_STAGES,
            **options,
        )  # fmt: skip
    return out
