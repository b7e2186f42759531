"""A linear layer of 8-bit integers in one kernel: product, scales, bias, sum with what is there.

Sums stay in registers as int32 until they are scaled; `torch._int_mm` writes them to memory, four
bytes a number, and `rescale` reads them again. One program makes one tile of the result.

Triton 3.4 to 3.9 wait for every int8 product on sm90 before the next begins, unlike for other
types. `quant.choose` therefore times this kernel beside torch's before it is used.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import current_device
from .common import narrow


class Tile(NamedTuple):
    """Tokens, channels and summands of one program at a time; stages: loads that are in flight."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


#: compute capability -> tile; elsewhere `OTHER_TILE`. Both as compiled, not yet timed: no registers
#: spilled, and at most the 99 KiB of shared memory that 8.6, 8.9 and 12.0 have, 227 KiB on 9.0
TILES = {(9, 0): Tile(128, 256, 128, 8, 4)}
OTHER_TILE = Tile(128, 128, 128, 8, 3)
#: rows of tiles that run side by side, so that the weight they share is read from the L2 cache
GROUP = 8


@triton.jit
def _finish(
    sums, row_scale, scale, bias, out, row, column, tokens, width, out_row,
    per_row: tl.constexpr, add: tl.constexpr,
):  # fmt: skip
    """Scale the sums of these rows and columns and store them."""
    within = column < width
    result = sums.to(tl.float32) * tl.load(row_scale + row, mask=row < tokens, other=0.0)[:, None]
    if per_row:
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
@triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["row_scale"])
def _int8_linear_kernel(
    values, row_scale, weight, scale, bias, out, tokens, width, summands,
    values_row, weight_row, out_row,
    per_row: tl.constexpr, add: tl.constexpr, even: tl.constexpr, group: tl.constexpr,
    rows: tl.constexpr, columns: tl.constexpr, depth: tl.constexpr,
):  # fmt: skip
    """per_row: `scale` has a number for every channel; else it has one, or is None.

    even: `depth` divides the summands, so that no load of the loop is masked. Rows beyond the last
    are loaded as the last one; nothing of them is stored.
    """
    program = tl.program_id(0)
    down, across = tl.cdiv(tokens, rows), tl.cdiv(width, columns)
    first = program // (group * across) * group
    height = tl.minimum(down - first, group)
    inside_group = program % (group * across)
    row = (first + inside_group % height) * rows + tl.arange(0, rows)
    start = inside_group // height * columns
    column = start + tl.arange(0, columns)
    along = tl.arange(0, depth)
    left_row = tl.minimum(row, tokens - 1).to(tl.int64)
    right_row = tl.minimum(column, width - 1).to(tl.int64)
    left = values + left_row[:, None] * values_row + along[None, :]
    right = weight + right_row[None, :] * weight_row + along[:, None]
    sums = tl.zeros((rows, columns), tl.int32)
    for done in range(0, summands, depth):
        if even:
            a, b = tl.load(left), tl.load(right)
        else:
            a = tl.load(left, mask=(along < summands - done)[None, :], other=0)
            b = tl.load(right, mask=(along < summands - done)[:, None], other=0)
        sums = tl.dot(a, b, sums, out_dtype=tl.int32)
        left += depth
        right += depth
    if columns <= 128:
        _finish(sums, row_scale, scale, bias, out, row, column, tokens, width, out_row,
                per_row, add)  # fmt: skip
    else:
        # all at once, the sums and what they are added to would not fit into the registers
        halves = tl.permute(tl.reshape(sums, (rows, 2, columns // 2)), (0, 2, 1))
        sums_left, sums_right = tl.split(halves)
        column = start + tl.arange(0, columns // 2)
        _finish(sums_left, row_scale, scale, bias, out, row, column, tokens, width, out_row,
                per_row, add)  # fmt: skip
        column += columns // 2
        _finish(sums_right, row_scale, scale, bias, out, row, column, tokens, width, out_row,
                per_row, add)  # fmt: skip


def int8_linear_(
    values: Tensor, row_scale: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None,
    out: Tensor, add: bool,
) -> None:  # fmt: skip
    """values @ weight.T * row_scale * scale + bias, written to `out` or added to it.

    Rounded once, at the store. Products are summed in int32: exact up to 130,000 summands.

    Args:
        values: [M, K] int8. row_scale: [M, 1] float32. weight: [N, K] int8, maybe some columns of
            a wider one. scale: float32, one element, [N, 1] or None. bias: [N] or None.
        out: [M, N] float. In all three, the numbers of a row must be adjacent.
    Raises:
        ValueError: they are not.
    """
    tokens, summands = values.shape
    width = len(weight)
    for name, matrix in (("values", values), ("weight", weight), ("out", out)):
        if matrix.stride(1) != 1 and matrix.shape[1] > 1:
            raise ValueError(
                f"The numbers of a row of {name} are {matrix.stride(1)} apart and must be "
                "adjacent: call .contiguous() first."
            )
    if not tokens:
        return
    capability = torch.cuda.get_device_capability(out.device) if out.is_cuda else (0, 0)
    tile = TILES.get(capability, OTHER_TILE)
    grid = (triton.cdiv(tokens, tile.rows) * triton.cdiv(width, tile.columns),)
    with current_device(out.device):
        _int8_linear_kernel[grid](
            values, row_scale.contiguous(), weight, None if scale is None else scale.contiguous(),
            bias, out, tokens, width, summands, values.stride(0), weight.stride(0), out.stride(0),
            per_row=scale is not None and scale.numel() > 1, add=add,
            even=summands % tile.depth == 0, group=GROUP, rows=tile.rows, columns=tile.columns,
            depth=tile.depth, num_warps=tile.num_warps, num_stages=tile.num_stages,
            enable_fp_fusion=True,
        )  # fmt: skip
