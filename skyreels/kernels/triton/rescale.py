"""What follows a product of 8-bit numbers: scales, bias, the sum with what is there, in one pass.

`quant.rescale` is the same in plain torch, and takes the product through memory twice more.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import current_device
from .common import narrow

#: tokens and channels of one program: 16 numbers a thread, so 64 bytes of int32 in flight
ROWS, BLOCK, NUM_WARPS = 4, 1024, 8


@triton.jit
def _rescale_kernel(
    codes, row_scale, scale, bias, out, tokens, width, out_row,
    per_row: tl.constexpr, add: tl.constexpr, rows: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """per_row: `scale` has a number for every channel; else it has one, or is None."""
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = (row < tokens)[:, None] & (column < width)[None, :]
    values = tl.load(codes + row[:, None] * width + column[None, :], mask=inside, other=0)
    factor = tl.load(row_scale + row, mask=row < tokens, other=0.0)[:, None]
    values = values.to(tl.float32) * factor
    if per_row:
        values *= tl.load(scale + column, mask=column < width, other=0.0)[None, :]
    elif scale is not None:
        values *= tl.load(scale)
    if bias is not None:
        addend = tl.load(bias + column, mask=column < width, other=0.0)
        values += addend.to(tl.float32)[None, :]
    target = out + row[:, None] * out_row + column[None, :]
    if add:
        values += tl.load(target, mask=inside, other=0.0).to(tl.float32)
    tl.store(target, narrow(values, out.dtype.element_ty), mask=inside)


def rescale_(
    codes: Tensor, row_scale: Tensor, scale: Tensor | None, bias: Tensor | None, out: Tensor,
    add: bool,
) -> None:  # fmt: skip
    """`quant.rescale`; the channels of `out` must be adjacent."""
    tokens, width = codes.shape
    grid = (triton.cdiv(tokens, ROWS), triton.cdiv(width, BLOCK))
    per_row = scale is not None and scale.numel() > 1
    with current_device(out.device):
        _rescale_kernel[grid](
            codes.contiguous(), row_scale.contiguous(),
            None if scale is None else scale.contiguous(), bias, out, tokens, width, out.stride(0),
            per_row=per_row, add=add, rows=ROWS, block=BLOCK, num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )  # fmt: skip
