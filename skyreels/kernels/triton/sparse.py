"""Block-sparse attention with pooled tails, for sm80 to sm12x.

`kernels/sparse.py` is the definition. Block sums are made in one pass over queries, keys and
values, which may be views of one buffer. Scores of parts of blocks are compared with a threshold
tile by tile, so no map of scores is written; what is written are bitmaps, and from them a list of
tiles for each block of queries. Nothing is summed by atomics, and no sum depends on how
many heads there are: lists are alike for any grouping of heads.

One program attends with a block of 64 queries to the tiles of its list, then to the pooled keys,
those that were attended to exactly left out. Pooled terms stay in 16 bits: they
stand for 64 keys each. Blocks of queries with text have all tiles on their list and no pooled
terms, and run first, as they take longest.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import VALUES_E4M3, VALUES_FP16, ValueFormat
from ..sparse import BLOCK, MAX_VARIANCE_TERM, MIN_VARIANCE, PART, SparseResult, num_blocks
from .attention import (
    HEAD_DIMS,
    add_weighted,
    attend_tile,
    product,
    quantize_keys,
    quantize_queries,
    quantize_values,
    weigh,
)
from .common import launch, narrow


class Tile(NamedTuple):
    """How one program attends; it has 64 queries, and 64 keys at a time.

    Attributes:
        num_warps: of one program.
        num_stages: tiles of keys in flight.
        tail_keys: pooled keys at a time; with fewer the loop takes less shared memory.
        is_int8: whether queries and keys are rounded to int8; else they are read in place.
        values: format of weights and values; None where values are read in place.
    """

    num_warps: int
    num_stages: int
    tail_keys: int
    is_int8: bool
    values: ValueFormat | None


_E4M3, _FP16 = Tile(4, 3, 16, True, VALUES_E4M3), Tile(4, 2, 16, True, VALUES_FP16)
_MIXED, _WIDE = Tile(4, 3, 32, True, None), Tile(4, 2, 16, False, None)
_E4M3_SM90, _WIDE_SM90 = Tile(4, 3, 32, True, VALUES_E4M3), Tile(4, 2, 32, False, None)
#: compute capability -> tiles, the likely fastest first and that of 16 bits throughout last; as
#: compiled for a head dimension of 128, not yet timed: no register spilled, and but for the last
#: ones of 8.6, 8.9 and 12.0 two programs share the memory of a multiprocessor, 164 KiB on 8.0 and
#: 8.7, 100 on 8.6, 8.9 and 12.0, 228 on 9.0. GeForce cards multiply e4m3 no faster than fp16 summed
#: in fp16; where fp16 is summed in float32 at the same rate, values need no copy
TILES = {
    (8, 0): (_MIXED, _WIDE),
    (8, 6): (_FP16, _WIDE),
    (8, 7): (_MIXED, _WIDE),
    (8, 9): (_E4M3, _FP16, _WIDE),
    (9, 0): (_E4M3_SM90, _MIXED, _WIDE_SM90),
    (12, 0): (_E4M3, _FP16, _WIDE),
    (12, 1): (_E4M3, _FP16, _WIDE),
}
#: lists hold places of blocks in 16 bits
MAX_BLOCKS = 32_767
#: of the largest weight so far where weights are in 16 bits: small ones are not subnormal then
_WIDE_MAX = 512.0
#: rows, and channels, that a program of `_center_kernel` takes at a time
_CENTER_ROWS, _CENTER_CHANNELS = 64, 32
#: blocks of queries of a program of `_route_kernel`, and blocks of keys at a time
_ROUTE_BLOCKS = 16
#: tiles of pooled keys in flight; loads without a buffer spill registers
_TAIL_STAGES = 2
_LOG2E = tl.constexpr(math.log2(math.e))
_LOG2_BLOCK = tl.constexpr(math.log2(BLOCK))
_MAX_TERM = tl.constexpr(MAX_VARIANCE_TERM * math.log2(math.e))
_MIN_VARIANCE = tl.constexpr(MIN_VARIANCE * math.log2(math.e) ** 2)
#: the largest number of fp16
_FP16_MAX = tl.constexpr(65_504.0)


@triton.jit
def _load_block(x, batch, head, x_batch, x_head, x_row, start, tokens, width, block: tl.constexpr):
    """A block of rows [block, width] from a strided tensor; zeros behind the last token."""
    rows = start + tl.arange(0, block)
    columns = tl.arange(0, width)
    place = x + batch * x_batch + head * x_head + rows.to(tl.int64)[:, None] * x_row + columns
    return tl.load(place, mask=(rows < tokens)[:, None], other=0.0)


@triton.jit
def _narrow16(x, dtype: tl.constexpr):
    """float32 to a dtype of 16 bits; what is beyond fp16 becomes its largest number."""
    if dtype == tl.float16:
        x = tl.maximum(tl.minimum(x, _FP16_MAX), -_FP16_MAX)
    return narrow(x, dtype)


@triton.jit
def _part_means(x, block: tl.constexpr, width: tl.constexpr, part: tl.constexpr):
    """Means of the parts [block / part, width] of a block of rows in float32."""
    return tl.sum(tl.reshape(x, (block // part, part, width)), axis=1) / part


# else other kernels would be compiled for some lengths of the text
@triton.jit(do_not_specialize=["tokens", "image_blocks", "padded_blocks"])
def _pool_kernel(
    q,
    k,
    v,
    query_parts,
    key_parts,
    variance,
    value_sum,
    value_least,
    value_largest,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    heads,
    tokens,
    image_blocks,
    padded_blocks,
    width: tl.constexpr,
    block: tl.constexpr,
    part: tl.constexpr,
):
    """Pool a block of values, and of the image also queries and keys.

    query_parts, and value_least with value_largest, are None where they are not needed. variance is
    [pairs, padded_blocks, width].
    """
    at = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // heads, pair % heads
    columns = tl.arange(0, width)
    start = at * block
    parts: tl.constexpr = block // part
    if at < image_blocks:
        place = (pair * image_blocks + at) * parts * width
        place += tl.arange(0, parts)[:, None] * width + columns
        if query_parts is not None:
            query = _load_block(q, batch, head, q_batch, q_head, q_row, start, tokens, width, block)
            means = _part_means(query.to(tl.float32), block, width, part)
            tl.store(query_parts + place, _narrow16(means, query_parts.dtype.element_ty))
        key = _load_block(k, batch, head, k_batch, k_head, k_row, start, tokens, width, block)
        key = key.to(tl.float32)
        tl.store(key_parts + place, _part_means(key, block, width, part))
        # around the mean: the difference of two large sums would lose what is small
        apart = key - tl.sum(key, axis=0) / block
        spread = _narrow16(tl.sum(apart * apart, axis=0) / block, variance.dtype.element_ty)
        tl.store(variance + (pair * padded_blocks + at) * width + columns, spread)
    inside = (start + tl.arange(0, block) < tokens)[:, None]
    place = (pair * tl.num_programs(0) + at) * width + columns
    value = _load_block(v, batch, head, v_batch, v_head, v_row, start, tokens, width, block)
    tl.store(value_sum + place, tl.sum(value.to(tl.float32), axis=0))
    if value_least is not None:
        wide = value.to(tl.float32)
        least = tl.min(tl.where(inside, wide, float("inf")), axis=0)
        largest = tl.max(tl.where(inside, wide, float("-inf")), axis=0)
        tl.store(value_least + place, least.to(value_least.dtype.element_ty))
        tl.store(value_largest + place, largest.to(value_largest.dtype.element_ty))


@triton.jit(do_not_specialize=["parts", "blocks", "tokens"])
def _center_kernel(
    key_parts,
    value_sum,
    value_least,
    value_largest,
    key_center,
    value_mean,
    value_scale,
    parts,
    blocks,
    tokens,
    value_max,
    width: tl.constexpr,
    channels: tl.constexpr,
    chunk: tl.constexpr,
):
    """Mean key of the image, zero without one; mean and scale of all values, unless None."""
    pair = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * channels + tl.arange(0, channels)
    keys = tl.zeros((channels,), tl.float32)
    for first in range(0, parts, chunk):
        rows = first + tl.arange(0, chunk)
        place = (pair * parts + rows[:, None]) * width + columns
        keys += tl.sum(tl.load(key_parts + place, mask=(rows < parts)[:, None], other=0.0), axis=0)
    tl.store(key_center + pair * width + columns, keys / tl.maximum(parts, 1))
    if value_mean is not None:
        values = tl.zeros((channels,), tl.float32)
        least = tl.full((channels,), float("inf"), tl.float32)
        largest = tl.full((channels,), float("-inf"), tl.float32)
        for first in range(0, blocks, chunk):
            rows = first + tl.arange(0, chunk)
            inside = (rows < blocks)[:, None]
            place = (pair * blocks + rows[:, None]) * width + columns
            values += tl.sum(tl.load(value_sum + place, mask=inside, other=0.0), axis=0)
            low = tl.load(value_least + place, mask=inside, other=float("inf")).to(tl.float32)
            high = tl.load(value_largest + place, mask=inside, other=float("-inf")).to(tl.float32)
            least = tl.minimum(least, tl.min(low, axis=0))
            largest = tl.maximum(largest, tl.max(high, axis=0))
        mean = values / tokens
        scale = tl.maximum(largest - mean, mean - least) / value_max
        tl.store(value_mean + pair * width + columns, mean)
        tl.store(value_scale + pair * width + columns, tl.where(scale == 0.0, 1.0, scale))


@triton.jit
def _block_scores(
    query, center, key_parts, first, parts, width: tl.constexpr, count: tl.constexpr,
    each: tl.constexpr,
):  # fmt: skip
    """Scores of blocks in base 2 [M, count], of queries [M * each, width] and parts from first."""
    rows = first + tl.arange(0, count * each)
    columns = tl.arange(0, width)
    place = key_parts + rows[:, None] * width + columns
    key = tl.load(place, mask=(rows < parts)[:, None], other=0.0) - center
    key = _narrow16(key, query.dtype)
    scores = product(query, tl.trans(key)) * (width**-0.5 * _LOG2E)
    scores = tl.reshape(scores, (query.shape[0] // each, each, count, each))
    peak = tl.max(tl.max(scores, axis=3), axis=1)
    scores = tl.exp2(scores - peak[:, None, :, None])
    return tl.log2(tl.sum(tl.sum(scores, axis=3), axis=1)) + peak


@triton.jit(do_not_specialize=["blocks", "row_bytes"])
def _route_kernel(
    query_parts,
    key_parts,
    key_center,
    bitmap,
    blocks,
    row_bytes,
    beta,
    width: tl.constexpr,
    rows_of_program: tl.constexpr,
    count: tl.constexpr,
    each: tl.constexpr,
):
    """Choose blocks of keys for some blocks of queries, eight to a byte; blocks are of the image.

    All scores are computed twice: for mean and variance of each row, and to be compared with them.
    """
    pair = tl.program_id(1).to(tl.int64)
    query_parts += pair * blocks * each * width
    key_parts += pair * blocks * each * width
    columns = tl.arange(0, width)
    rows = tl.program_id(0) * rows_of_program + tl.arange(0, rows_of_program)
    places = tl.program_id(0) * rows_of_program * each + tl.arange(0, rows_of_program * each)
    is_part = (places < blocks * each)[:, None]
    query = tl.load(query_parts + places[:, None] * width + columns, mask=is_part, other=0.0)
    center = tl.load(key_center + pair * width + columns)
    mean = tl.zeros((rows_of_program,), tl.float32)
    squares = tl.zeros((rows_of_program,), tl.float32)
    for first in range(0, blocks, count):
        scores = _block_scores(
            query, center, key_parts, first * each, blocks * each, width, count, each
        )
        number = tl.minimum(blocks - first, count).to(tl.float32)
        inside = (first + tl.arange(0, count) < blocks)[None, :]
        own_mean = tl.sum(tl.where(inside, scores, 0.0), axis=1) / number
        apart = tl.where(inside, scores - own_mean[:, None], 0.0)
        change = own_mean - mean
        share = number / (first + number)
        mean += change * share
        squares += tl.sum(apart * apart, axis=1) + change * change * (first * share)
    limit = mean + beta * tl.sqrt(squares / blocks + _MIN_VARIANCE)
    for first in range(0, blocks, count):
        scores = _block_scores(
            query, center, key_parts, first * each, blocks * each, width, count, each
        )
        others = first + tl.arange(0, count)
        apart = rows[:, None] - others[None, :]
        exact = (scores > limit[:, None]) | ((apart <= 1) & (apart >= -1))
        bits = (exact & (others < blocks)[None, :]).to(tl.int32)
        bits = tl.reshape(bits, (rows_of_program, count // 8, 8)) << tl.arange(0, 8)[None, None, :]
        numbers = first // 8 + tl.arange(0, count // 8)
        out = bitmap + (pair * blocks + rows[:, None]) * row_bytes + numbers[None, :]
        is_byte = (rows < blocks)[:, None] & (numbers < row_bytes)[None, :]
        tl.store(out, tl.sum(bits, axis=2).to(tl.uint8), mask=is_byte)


@triton.jit(do_not_specialize=["image_blocks", "whole_blocks", "row_bytes"])
def _list_kernel(
    bitmap,
    tiles,
    counts,
    image_blocks,
    whole_blocks,
    row_bytes,
    columns: tl.constexpr,
):
    """The tiles that a block of queries attends to, ascending: exact ones, then whole ones of text.

    A row has room for all; counts are of the image alone. Blocks with text attend to all.
    """
    row = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    places = tl.arange(0, columns)
    is_image = places < image_blocks
    row_start = bitmap + (pair * image_blocks + row) * row_bytes
    is_chosen = places < tl.where(row < image_blocks, image_blocks, 0)
    byte = tl.load(row_start + places // 8, mask=is_chosen, other=255)
    is_listed = ((byte.to(tl.int32) >> (places % 8)) & 1) != 0
    is_listed = (is_listed | (places >= image_blocks)) & (places < whole_blocks)
    order = tl.cumsum(is_listed.to(tl.int32), axis=0) - 1
    at = pair * tl.num_programs(0) + row
    tl.store(tiles + at * whole_blocks + order, places.to(tl.int16), mask=is_listed)
    tl.store(counts + at, tl.sum((is_listed & is_image).to(tl.int32), axis=0))


@triton.jit(do_not_specialize=["blocks", "image_blocks", "padded_blocks"])
def _tail_kernel(
    key_parts,
    key_center,
    value_sum,
    value_mean,
    value_scale,
    key,
    variance,
    value,
    blocks,
    image_blocks,
    padded_blocks,
    width: tl.constexpr,
    block: tl.constexpr,
    each: tl.constexpr,
):
    """Pooled keys and values of the image in 16 bits, scaled as the values are, zeros behind."""
    pair = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * block + tl.arange(0, block)
    columns = tl.arange(0, width)
    inside = (rows < image_blocks)[:, None]
    source = (pair * blocks + rows[:, None]) * width + columns
    target = (pair * padded_blocks + rows[:, None]) * width + columns
    first = (pair * image_blocks + rows[:, None]) * (each * width) + columns
    mean_key = tl.zeros((block, width), tl.float32)
    for part in range(each):
        mean_key += tl.load(key_parts + first + part * width, mask=inside, other=0.0)
    mean_key = mean_key / each - tl.load(key_center + pair * width + columns)
    mean_key = narrow(tl.where(inside, mean_key, 0.0), key.dtype.element_ty)
    tl.store(key + target, mean_key)
    mean_value = tl.load(value_sum + source, mask=inside, other=0.0) / block
    if value_mean is not None:
        mean_value = mean_value - tl.load(value_mean + pair * width + columns)
        mean_value = mean_value / tl.load(value_scale + pair * width + columns)
    mean_value = narrow(tl.where(inside, mean_value, 0.0), value.dtype.element_ty)
    tl.store(value + target, mean_value)
    tl.store(variance + target, tl.zeros((block, width), variance.dtype.element_ty), mask=~inside)


@triton.jit
def _attend_pooled(
    query,
    offset,
    pooled_key,
    variance,
    pooled_value,
    bitmap,
    sums,
    total,
    peak,
    image_blocks,
    width: tl.constexpr,
    block: tl.constexpr,
    log_max: tl.constexpr,
    tail_keys: tl.constexpr,
    tail_stages: tl.constexpr,
):
    """The pooled keys of a head that a row of the bitmap leaves; offset [M] is added to scores."""
    columns = tl.arange(0, width)
    wide = query.to(tl.float32)
    square = _narrow16(wide * wide * (0.5 * _LOG2E / width), query.dtype)
    one = tl.full((block,), 1.0, tl.float32)
    for first in tl.range(0, image_blocks, tail_keys, num_stages=tail_stages):
        others = first + tl.arange(0, tail_keys)
        across = columns[:, None] + others[None, :] * width
        scores = product(query, tl.load(pooled_key + across)) * (width**-0.5 * _LOG2E)
        term = product(square, tl.load(variance + across))
        scores += tl.minimum(term, _MAX_TERM) + offset[:, None]
        byte = tl.load(bitmap + others // 8, mask=others < image_blocks, other=255)
        is_left = ((byte.to(tl.int32) >> (others % 8)) & 1) == 0
        scores = tl.where(is_left[None, :], scores, float("-inf"))
        weights, decay, peak = weigh(scores, one, peak, log_max, pooled_value.dtype.element_ty)
        value = tl.load(pooled_value + others[:, None] * width + columns)
        sums, total = add_weighted(weights, decay, value, sums, total, False)
    return sums, total, peak


@triton.jit(
    do_not_specialize=["tokens", "image_blocks", "whole_blocks", "padded_blocks", "row_bytes"]
)
def _attend_kernel(
    raw,
    q,
    q_scale,
    k,
    k_scale,
    v,
    value_scale,
    value_mean,
    key_center,
    pooled_key,
    variance,
    pooled_value,
    bitmap,
    tiles,
    counts,
    out,
    raw_batch,
    raw_head,
    raw_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    v_column,
    out_batch,
    out_head,
    out_row,
    heads,
    tokens,
    image_blocks,
    whole_blocks,
    padded_blocks,
    row_bytes,
    width: tl.constexpr,
    block: tl.constexpr,
    log_max: tl.constexpr,
    sum_in_fp16: tl.constexpr,
    in_place: tl.constexpr,
    tail_keys: tl.constexpr,
    tail_stages: tl.constexpr,
):
    """A block of queries. q and k_scale are None where keys are read in place, as raw queries are.

    Pooled keys are centered, and so are keys in int8. Keys in place are not: what that adds to the
    scores of a query is added to its pooled scores.
    """
    blocks = tl.num_programs(0)
    at = blocks - 1 - tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // heads, pair % heads
    start = at * block
    rows = start + tl.arange(0, block)
    columns = tl.arange(0, width)
    unit: tl.constexpr = width**-0.5 * _LOG2E
    if q is not None:
        place = pair * blocks * block + rows
        query = tl.load(q + place[:, None] * width + columns)
        query_scale = tl.load(q_scale + place)
        k_scale += pair * blocks
    else:
        query = _load_block(
            raw, batch, head, raw_batch, raw_head, raw_row, start, tokens, width, block
        )
        query_scale = tl.full((block,), unit, tl.float32)
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    tiles += (pair * blocks + at) * whole_blocks
    count = tl.load(counts + pair * blocks + at) + whole_blocks - image_blocks
    sums = tl.zeros((block, width), tl.float32)
    total = tl.zeros((block, 16), tl.float32)
    peak = tl.full((block,), float("-inf"), tl.float32)
    # the last tile goes first: behind the loop it would cost the loop registers
    if whole_blocks * block < tokens:
        sums, total, peak = attend_tile(
            query,
            query_scale,
            k,
            k_scale,
            v,
            sums,
            total,
            peak,
            whole_blocks,
            tokens,
            k_row,
            v_row,
            v_column,
            width,
            block,
            log_max,
            sum_in_fp16,
            in_place,
            True,
        )
    for number in range(count):
        sums, total, peak = attend_tile(
            query,
            query_scale,
            k,
            k_scale,
            v,
            sums,
            total,
            peak,
            tl.load(tiles + number).to(tl.int32),
            tokens,
            k_row,
            v_row,
            v_column,
            width,
            block,
            log_max,
            sum_in_fp16,
            in_place,
            False,
        )
    if at < image_blocks:
        raw_query = _load_block(
            raw, batch, head, raw_batch, raw_head, raw_row, start, tokens, width, block
        )
        offset = tl.full((block,), _LOG2_BLOCK, tl.float32)
        if q is None:
            center = tl.load(key_center + pair * width + columns)
            offset += tl.sum(raw_query.to(tl.float32) * center, axis=1) * unit
        tail = pair * padded_blocks * width
        sums, total, peak = _attend_pooled(
            raw_query,
            offset,
            pooled_key + tail,
            variance + tail,
            pooled_value + tail,
            bitmap + (pair * image_blocks + at) * row_bytes,
            sums,
            total,
            peak,
            image_blocks,
            width,
            block,
            log_max,
            tail_keys,
            tail_stages,
        )
    result = sums / (tl.sum(total, axis=1) / 16)[:, None]
    if value_scale is not None:
        result = result * tl.load(value_scale + pair * width + columns)
        result += tl.load(value_mean + pair * width + columns)
    place = out + batch * out_batch + head * out_head
    place += rows.to(tl.int64)[:, None] * out_row + columns
    tl.store(place, narrow(result, out.dtype.element_ty), mask=(rows < tokens)[:, None])


def tiles(capability: tuple[int, int]) -> tuple[Tile, ...]:
    """The tiles made for a compute capability, the likely fastest first; none for some."""
    return TILES.get(capability, ())


def refusal(head_dim: int, tokens: int) -> str:
    """Why the kernels do not take heads or a sequence of this size; empty if they do."""
    if head_dim not in HEAD_DIMS:
        return f"head dimension {head_dim} is not one of {', '.join(map(str, HEAD_DIMS))}"
    if num_blocks(tokens) > MAX_BLOCKS:
        return f"{tokens:,} tokens are more than {MAX_BLOCKS * BLOCK:,}"
    return ""


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: float,
    num_image_blocks: int,
    exact: Tensor | None = None,
    *,
    tile: Tile,
) -> SparseResult:
    """Route and attend, as `kernels.sparse.route` and `attend` do with the tail "variance".

    Reads the inputs in place, as long as the head dimension of each is contiguous.

    Args:
        query: [B, heads, S, D] fp16, bf16 or fp32, image tokens first; D 32, 64 or 128.
        key: the same.
        value: the same.
        beta: threshold in standard deviations.
        num_image_blocks: nI, of 64 image tokens each.
        exact: bitmap of an earlier result, of another branch of guidance, instead of a routing of
            its own.
        tile: one that the device takes, see `tiles`.

    Returns:
        The output; the blocks that were exact, and how many.
    """
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    pooled = _pool(
        query, key, value, num_image_blocks, is_routed=exact is None, is_scaled=bool(tile.values)
    )
    centers = _center(pooled, query.shape[2], tile.values)
    if exact is None:
        exact = _route(pooled, centers, beta)
    tail = _tail(pooled, centers, tile.values)
    del pooled
    lists, counts = _list(exact, query.shape[2])
    out = _attend(query, key, value, centers, tail, exact, lists, counts, tile)
    return SparseResult(out, exact, counts[:, :num_image_blocks])


class _Pooled(NamedTuple):
    """What is pooled of queries, keys and values.

    Attributes:
        query_parts: [P, 4 * nI, D] fp16, means of 16 queries; None where nothing is routed.
        key_parts: [P, 4 * nI, D] float32, of 16 keys.
        variance: [P, nI rounded up to 64, D] of the keys of each block, in their dtype.
        value_sum: [P, nb, D] float32, of each block.
        value_least: [P, nb, D], in the dtype of the values; None where those are read in place.
        value_largest: likewise.
    """

    query_parts: Tensor | None
    key_parts: Tensor
    variance: Tensor
    value_sum: Tensor
    value_least: Tensor | None
    value_largest: Tensor | None


class _Centers(NamedTuple):
    """Of each head, [P, D] float32; mean and scale of values are None where those are in place."""

    key: Tensor
    value_mean: Tensor | None
    value_scale: Tensor | None


class _Tail(NamedTuple):
    """Pooled keys, their variances and pooled values: [P, nI rounded up to 64, D], in 16 bits."""

    key: Tensor
    variance: Tensor
    value: Tensor


def _pool(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_image_blocks: int,
    *,
    is_routed: bool,
    is_scaled: bool,
) -> _Pooled:
    batch, heads, tokens, width = query.shape
    blocks, pairs = num_blocks(tokens), batch * heads
    parts = (pairs, num_image_blocks * (BLOCK // PART), width)
    padded = num_blocks(num_image_blocks) * BLOCK
    pooled = _Pooled(
        query.new_empty(parts, dtype=torch.float16) if is_routed else None,
        key.new_empty(parts, dtype=torch.float32),
        key.new_empty(pairs, padded, width),
        value.new_empty(pairs, blocks, width, dtype=torch.float32),
        value.new_empty(pairs, blocks, width) if is_scaled else None,
        value.new_empty(pairs, blocks, width) if is_scaled else None,
    )
    launch(
        _pool_kernel,
        (blocks, pairs),
        query,
        key,
        value,
        *pooled,
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        heads,
        tokens,
        num_image_blocks,
        padded,
        width,
        BLOCK,
        PART,
        num_warps=8,
    )
    return pooled


def _center(pooled: _Pooled, tokens: int, values: ValueFormat | None) -> _Centers:
    pairs, blocks, width = pooled.value_sum.shape

    def empty() -> Tensor:
        return pooled.value_sum.new_empty(pairs, width)

    mean, scale = (empty(), empty()) if values else (None, None)
    centers = _Centers(empty(), mean, scale)
    launch(
        _center_kernel,
        (width // _CENTER_CHANNELS, pairs),
        pooled.key_parts,
        pooled.value_sum,
        pooled.value_least,
        pooled.value_largest,
        *centers,
        pooled.key_parts.shape[1],
        blocks,
        tokens,
        values.value_max if values else 1.0,
        width,
        _CENTER_CHANNELS,
        _CENTER_ROWS,
        num_warps=4,
    )
    return centers


def _route(pooled: _Pooled, centers: _Centers, beta: float) -> Tensor:
    pairs, parts, width = pooled.key_parts.shape
    blocks = parts // (BLOCK // PART)
    row_bytes = -(-blocks // 8)
    bitmap = pooled.key_parts.new_empty(pairs, blocks, row_bytes, dtype=torch.uint8)
    launch(
        _route_kernel,
        (triton.cdiv(blocks, _ROUTE_BLOCKS), pairs),
        pooled.query_parts,
        pooled.key_parts,
        centers.key,
        bitmap,
        blocks,
        row_bytes,
        beta,
        width,
        _ROUTE_BLOCKS,
        _ROUTE_BLOCKS,
        BLOCK // PART,
        num_warps=4,
        num_stages=2,
    )
    return bitmap


def _list(bitmap: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Tiles of each block of queries [P, nb, whole tiles] int16; and how many of the image."""
    pairs, num_image_blocks, row_bytes = bitmap.shape
    blocks, whole = num_blocks(tokens), tokens // BLOCK
    lists = bitmap.new_empty(pairs, blocks, whole, dtype=torch.int16)
    counts = bitmap.new_empty(pairs, blocks, dtype=torch.int32)
    launch(
        _list_kernel,
        (blocks, pairs),
        bitmap,
        lists,
        counts,
        num_image_blocks,
        whole,
        row_bytes,
        triton.next_power_of_2(blocks),
        num_warps=4,
    )
    return lists, counts


def _tail(pooled: _Pooled, centers: _Centers, values: ValueFormat | None) -> _Tail:
    pairs, blocks, width = pooled.value_sum.shape
    variance, num_parts = pooled.variance, BLOCK // PART
    # in e4m3 the weight of a pooled value would be too coarse
    dtype = torch.float16 if values else variance.dtype
    tail = _Tail(torch.empty_like(variance), variance, torch.empty_like(variance, dtype=dtype))
    launch(
        _tail_kernel,
        (variance.shape[1] // BLOCK, pairs),
        pooled.key_parts,
        centers.key,
        pooled.value_sum,
        centers.value_mean,
        centers.value_scale,
        *tail,
        blocks,
        pooled.key_parts.shape[1] // num_parts,
        variance.shape[1],
        width,
        BLOCK,
        num_parts,
        num_warps=4,
    )
    return tail


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    centers: _Centers,
    tail: _Tail,
    bitmap: Tensor,
    lists: Tensor,
    counts: Tensor,
    tile: Tile,
) -> Tensor:
    batch, heads, tokens, width = query.shape
    pairs, blocks, whole = lists.shape
    padded = blocks * BLOCK
    raw_strides, k_strides, v_strides = (x.stride()[:3] for x in (query, key, value))
    q = q_scale = k_scale = None
    raw, k, v, v_column = query, key, value, 1
    if tile.is_int8:
        q, q_scale = quantize_queries(query, BLOCK)
        k, k_scale = quantize_keys(key, centers.key, BLOCK)
        k_strides = (heads * padded * width, padded * width, width)
    if tile.values is not None:
        mean, scale = centers.value_mean, centers.value_scale
        assert mean is not None and scale is not None
        v = quantize_values(value, mean, scale, padded, tile.values.dtype)
        v_strides, v_column = (heads * padded * width, padded * width, 1), padded
    weight_max = tile.values.weight_max if tile.values else _WIDE_MAX
    out = query.new_empty(batch, tokens, heads, width).transpose(1, 2)
    launch(
        _attend_kernel,
        (blocks, pairs),
        raw,
        q,
        q_scale,
        k,
        k_scale,
        v,
        centers.value_scale,
        centers.value_mean,
        centers.key,
        *tail,
        bitmap,
        lists,
        counts,
        out,
        *raw_strides,
        *k_strides,
        *v_strides,
        v_column,
        *out.stride()[:3],
        heads,
        tokens,
        bitmap.shape[1],
        whole,
        tail.key.shape[1],
        bitmap.shape[2],
        width,
        BLOCK,
        math.log2(weight_max),
        tile.values is not None and tile.values.dtype == torch.float16,
        tile.values is None or not tile.is_int8,
        tile.tail_keys,
        _TAIL_STAGES,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out
