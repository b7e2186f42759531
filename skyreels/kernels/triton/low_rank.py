"""The side branch of a linear layer in one kernel: both products, added to the layer's result.

A program holds x @ down.T of some tokens in registers and multiplies it with some rows of `up`. So
activations are read once, in 8 bits if they are, and nothing but the result is written.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .common import INTERPRETED, launch, narrow


class Tile(NamedTuple):
    """Tokens, channels and input channels of one program at a time; stages: loads in flight."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


#: as compiled, not yet timed: no registers spilled up to rank 128
TILE = Tile(128, 64, 64, 8, 2)
#: programs that keep a GPU busy: with few tokens, several share the channels of a segment
PROGRAMS = 256
#: segments that the kernel has arguments for
SEGMENTS = 4


@triton.jit
def _pick(segment, first, second, third, fourth):
    return tl.where(
        segment < 2,
        tl.where(segment == 0, first, second),
        tl.where(segment == 2, third, fourth),
    )


@triton.jit
def _add_product(acc, a, b):
    if INTERPRETED:  # its bf16 GEMM is wrong
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc)


# else another kernel would be compiled for some parts of a layer and numbers of tokens
@triton.jit(
    do_not_specialize=[
        *("tokens", "splits", "start0", "stop0", "first0", "last0", "start1", "stop1", "first1"),
        *("last1", "start2", "stop2", "first2", "last2", "start3", "stop3", "first3", "last3"),
    ],
    do_not_specialize_on_alignment=["x", "act_scale", "out"],
)
def _low_rank_kernel(
    x,
    act_scale,
    down,
    up,
    out,
    tokens,
    depth,
    x_row,
    down_row,
    up_row,
    out_row,
    splits,
    start0,
    stop0,
    first0,
    last0,
    start1,
    stop1,
    first1,
    last1,
    start2,
    stop2,
    first2,
    last2,
    start3,
    stop3,
    first3,
    last3,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    block_r: tl.constexpr,
):
    """Rows beyond the last are loaded as the last one; nothing of them is stored."""
    row = tl.program_id(0).to(tl.int64) * block_m + tl.arange(0, block_m)
    segment, split = tl.program_id(1) // splits, tl.program_id(1) % splits
    start = _pick(segment, start0, start1, start2, start3)
    stop = _pick(segment, stop0, stop1, stop2, stop3)
    first = _pick(segment, first0, first1, first2, first3)
    rank = _pick(segment, last0, last1, last2, last3) - first
    along, place = tl.arange(0, block_k), tl.arange(0, block_r)
    near = tl.minimum(row, tokens - 1)
    left = x + near[:, None] * x_row + along[None, :]
    right = down + (first + place)[None, :] * down_row + along[:, None]
    acc = tl.zeros((block_m, block_r), tl.float32)
    for done in range(0, depth, block_k):
        inside = along < depth - done
        a = tl.load(left, mask=inside[None, :], other=0.0)
        # by way of float32, as the interpreter knows no integer to bfloat16
        a = a.to(tl.float32).to(down.dtype.element_ty)
        b = tl.load(right, mask=inside[:, None] & (place < rank)[None, :], other=0.0)
        acc = _add_product(acc, a, b)
        left += block_k
        right += block_k
    if act_scale is not None:
        acc *= tl.load(act_scale + near)[:, None]
    inner = narrow(acc, up.dtype.element_ty)
    for channel in range(start + split * block_n, stop, splits * block_n):
        column = channel + tl.arange(0, block_n)
        within = column < stop
        factor = tl.load(
            up + column[None, :].to(tl.int64) * up_row + place[:, None],
            mask=within[None, :] & (place < rank)[:, None],
            other=0.0,
        )
        target = out + row[:, None] * out_row + column[None, :]
        inside = (row < tokens)[:, None] & within[None, :]
        before = tl.load(target, mask=inside, other=0.0).to(tl.float32)
        result = narrow(_add_product(before, inner, factor), out.dtype.element_ty)
        tl.store(target, result, mask=inside)


def add_low_rank_(
    x: Tensor,
    act_scale: Tensor | None,
    down: Tensor,
    up: Tensor,
    segments: list[int],
    out: Tensor,
) -> None:
    """`reference.add_low_rank_`, rounded once when it is added; numbers of a row are adjacent."""
    if x.ndim > 2:
        scales = [None] * len(x) if act_scale is None else act_scale
        for item, scale, target in zip(x, scales, out, strict=True):
            add_low_rank_(item, scale, down, up, segments, target)
        return
    tokens, depth = x.shape
    blocks, count = triton.cdiv(tokens, TILE.block_m), len(segments) // 4
    most = max(segments[place + 1] - segments[place] for place in range(0, len(segments), 4))
    splits = max(1, min(PROGRAMS // max(1, blocks * count), triton.cdiv(most, TILE.block_n)))
    launch(
        _low_rank_kernel,
        (blocks, count * splits),
        x,
        None if act_scale is None else act_scale.contiguous(),
        down,
        up,
        out,
        tokens,
        depth,
        x.stride(0),
        down.stride(0),
        up.stride(0),
        out.stride(0),
        splits,
        *segments,
        *[0] * (4 * SEGMENTS - len(segments)),
        block_r=max(16, triton.next_power_of_2(up.shape[1])),
        **TILE._asdict(),
    )
