"""An int8 linear layer in one kernel, and the epilogue alone for GEMMs without one.

`int8_linear_` keeps its int32 accumulator in registers until it is scaled; `torch._int_mm` writes
it to memory, four bytes a number, and `rescale_` reads it again. One program makes one tile.

Triton 3.4 to 3.9 wait for every int8 product on sm90 before the next begins, unlike for other
types. Therefore quant.py times this kernel beside torch's before it is used.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import launch, narrow


class Tile(NamedTuple):
    """Tokens, channels and input channels of one program at a time; stages: loads in flight."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


#: compute capability -> tile; elsewhere `OTHER_TILE`. Both as compiled, not yet timed: no registers
#: spilled, and at most the 99 KiB of shared memory that 8.6, 8.9 and 12.0 have, 227 KiB on 9.0
TILES = {(9, 0): Tile(128, 256, 128, 8, 4)}
OTHER_TILE = Tile(128, 128, 128, 8, 3)
#: rows of tiles that run side by side, so that the weight they share is read from the L2 cache
GROUP = 8
#: tokens and channels of one program of `rescale_`: 16 numbers a thread, 64 bytes of int32
RESCALE_M, RESCALE_N, RESCALE_WARPS = 4, 1024, 8


@triton.jit
def _store_scaled(
    acc,
    act_scale,
    scale,
    bias,
    out,
    row,
    column,
    tokens,
    width,
    out_row,
    per_channel: tl.constexpr,
    add: tl.constexpr,
):
    """The epilogue: scale an accumulator of these rows and columns, add, and store.

    per_channel: `scale` has a number for every channel; else it has one, or is None.
    """
    within = column < width
    result = acc.to(tl.float32) * tl.load(act_scale + row, mask=row < tokens, other=0.0)[:, None]
    if per_channel:
        result *= tl.load(scale + column, mask=within, other=0.0)[None, :]
    elif scale is not None:
        result *= tl.load(scale)
    if bias is not None:
        result += tl.load(bias + column, mask=within, other=0.0).to(tl.float32)[None, :]
    target = out + row.to(tl.int64)[:, None] * out_row + column[None, :]
    inside = (row < tokens)[:, None] & within[None, :]
    if add:
        result += tl.load(target, mask=inside, other=0.0).to(tl.float32)
    tl.store(target, narrow(result, out.dtype.element_ty), mask=inside)


# else another kernel would be compiled for some numbers and parts of the tokens
@triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["act_scale"])
def _int8_linear_kernel(
    qdata,
    act_scale,
    weight,
    scale,
    bias,
    out,
    tokens,
    width,
    depth,
    qdata_row,
    weight_row,
    out_row,
    per_channel: tl.constexpr,
    add: tl.constexpr,
    even: tl.constexpr,
    group: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
):
    """even: `block_k` divides `depth`, so that no load of the loop is masked.

    Rows beyond the last are loaded as the last one; nothing of them is stored.
    """
    program = tl.program_id(0)
    down, across = tl.cdiv(tokens, block_m), tl.cdiv(width, block_n)
    first = program // (group * across) * group
    height = tl.minimum(down - first, group)
    inside_group = program % (group * across)
    row = (first + inside_group % height) * block_m + tl.arange(0, block_m)
    start = inside_group // height * block_n
    column = start + tl.arange(0, block_n)
    along = tl.arange(0, block_k)
    left_row = tl.minimum(row, tokens - 1).to(tl.int64)
    right_row = tl.minimum(column, width - 1).to(tl.int64)
    left = qdata + left_row[:, None] * qdata_row + along[None, :]
    right = weight + right_row[None, :] * weight_row + along[:, None]
    acc = tl.zeros((block_m, block_n), tl.int32)
    for done in range(0, depth, block_k):
        if even:
            a, b = tl.load(left), tl.load(right)
        else:
            a = tl.load(left, mask=(along < depth - done)[None, :], other=0)
            b = tl.load(right, mask=(along < depth - done)[:, None], other=0)
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
        left += block_k
        right += block_k
    if block_n <= 128:
        _store_scaled(
            acc, act_scale, scale, bias, out, row, column, tokens, width, out_row, per_channel, add
        )
    else:
        # all at once, the accumulator and what it is added to would not fit into the registers
        halves = tl.permute(tl.reshape(acc, (block_m, 2, block_n // 2)), (0, 2, 1))
        acc_left, acc_right = tl.split(halves)
        column = start + tl.arange(0, block_n // 2)
        _store_scaled(
            acc_left, act_scale, scale, bias, out, row, column, tokens, width, out_row,
            per_channel, add,
        )  # fmt: skip
        column += block_n // 2
        _store_scaled(
            acc_right, act_scale, scale, bias, out, row, column, tokens, width, out_row,
            per_channel, add,
        )  # fmt: skip


@triton.jit
def _rescale_kernel(
    acc,
    act_scale,
    scale,
    bias,
    out,
    tokens,
    width,
    out_row,
    per_channel: tl.constexpr,
    add: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * block_m + tl.arange(0, block_m)
    column = tl.program_id(1) * block_n + tl.arange(0, block_n)
    inside = (row < tokens)[:, None] & (column < width)[None, :]
    tile = tl.load(acc + row[:, None] * width + column[None, :], mask=inside, other=0)
    _store_scaled(
        tile, act_scale, scale, bias, out, row, column, tokens, width, out_row, per_channel, add
    )


def int8_linear_(
    qdata: Tensor,
    act_scale: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    add: bool,
) -> None:
    """Linear layer: qdata @ weight.T * act_scale * scale + bias, written to `out` or added to it.

    Rounded once, when it is stored. Sums are int32: exact up to 130,000 products.

    Args:
        qdata: [M, K] int8. In this, `weight` and `out` the numbers of a row must be adjacent.
        act_scale: [M, 1] float32, of the activations.
        weight: [N, K] int8, which may be some columns of a wider one.
        scale: of the weight, float32, one element, [N, 1] or None.
        bias: [N] or None.
        out: [M, N] float.
        add: whether to add to `out`.

    Raises:
        ValueError: the numbers of a row are not adjacent.
    """
    tokens, depth = qdata.shape
    width = len(weight)
    for name, matrix in (("qdata", qdata), ("weight", weight), ("out", out)):
        if matrix.stride(1) != 1 and matrix.shape[1] > 1:
            raise ValueError(
                f"The numbers of a row of {name} are {matrix.stride(1)} apart and must be "
                "adjacent: call .contiguous() first."
            )
    capability = torch.cuda.get_device_capability(out.device) if out.is_cuda else (0, 0)
    tile = TILES.get(capability, OTHER_TILE)
    launch(
        _int8_linear_kernel,
        (triton.cdiv(tokens, tile.block_m) * triton.cdiv(width, tile.block_n),),
        qdata,
        act_scale.contiguous(),
        weight,
        None if scale is None else scale.contiguous(),
        bias,
        out,
        tokens,
        width,
        depth,
        qdata.stride(0),
        weight.stride(0),
        out.stride(0),
        per_channel=scale is not None and scale.numel() > 1,
        add=add,
        even=depth % tile.block_k == 0,
        group=GROUP,
        **tile._asdict(),
    )


def rescale_(
    acc: Tensor,
    act_scale: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    add: bool,
) -> None:
    """`reference.rescale_`, rounded once; the channels of `out` must be adjacent."""
    tokens, width = acc.shape
    launch(
        _rescale_kernel,
        (triton.cdiv(tokens, RESCALE_M), triton.cdiv(width, RESCALE_N)),
        acc.contiguous(),
        act_scale.contiguous(),
        None if scale is None else scale.contiguous(),
        bias,
        out,
        tokens,
        width,
        out.stride(0),
        per_channel=scale is not None and scale.numel() > 1,
        add=add,
        block_m=RESCALE_M,
        block_n=RESCALE_N,
        num_warps=RESCALE_WARPS,
    )
