"""Weights in GGUF blocks to floats in one pass, for the types of the published files.

One program unpacks some blocks of one row. Each number is computed by itself: the bytes that
several of them need are in the first-level cache after the first load.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..blocks import BLOCK_TYPES
from .common import launch, narrow

#: numbers of one program
NUMBERS = 2048
WARPS = 4


@triton.jit
def _half(at, mask):
    """The float16 at a byte, as float32; it need not lie at an even address."""
    low = tl.load(at, mask=mask, other=0).to(tl.int16)
    high = tl.load(at + 1, mask=mask, other=0).to(tl.int16)
    return (low | (high << 8)).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _six_bit(scales, part, mask):
    """Scale and shift of a part of a block, from 12 bytes that hold eight of each."""
    is_late = part >= 4
    first = tl.load(scales + (part & 3), mask=mask, other=0).to(tl.int32)
    second = tl.load(scales + 4 + (part & 3), mask=mask, other=0).to(tl.int32)
    both = tl.load(scales + 8 + (part & 3), mask=mask, other=0).to(tl.int32)
    scale = tl.where(is_late, (both & 15) | ((first >> 2) & 48), first & 63)
    shift = tl.where(is_late, (both >> 4) | ((second >> 2) & 48), second & 63)
    return scale.to(tl.float32), shift.to(tl.float32)


@triton.jit
def _value(block, number, mask, bits: tl.constexpr):
    """Number `number` of the block whose bytes start at `block`; bits: 4, 5, 6 (K types) or 8."""
    if bits == 8:
        code = tl.load(block + 2 + number, mask=mask, other=0).to(tl.int8, bitcast=True)
        return code.to(tl.float32) * _half(block, mask)
    if bits == 6:
        group = number // 128
        within = number % 128
        low = tl.load(block + group * 64 + within % 64, mask=mask, other=0).to(tl.int32)
        high = tl.load(block + 128 + group * 32 + within % 32, mask=mask, other=0).to(tl.int32)
        low = (low >> (within // 64 * 4)) & 15
        code = low | (((high >> (within // 32 * 2)) & 3) << 4)
        scale = tl.load(block + 192 + number // 16, mask=mask, other=0).to(tl.int8, bitcast=True)
        return _half(block + 208, mask) * scale.to(tl.float32) * (code - 32).to(tl.float32)
    part = number // 32
    scale, shift = _six_bit(block + 4, part, mask)
    codes = block + (16 if bits == 4 else 48)
    code = tl.load(codes + part // 2 * 32 + number % 32, mask=mask, other=0).to(tl.int32)
    code = (code >> (part % 2 * 4)) & 15
    if bits == 5:
        high = tl.load(block + 16 + number % 32, mask=mask, other=0).to(tl.int32)
        code = code | (((high >> part) & 1) << 4)
    return _half(block, mask) * scale * code.to(tl.float32) - _half(block + 2, mask) * shift


@triton.jit
def _dequantize_kernel(
    data,
    out,
    columns,
    data_row,
    out_row,
    bits: tl.constexpr,
    size: tl.constexpr,
    num_bytes: tl.constexpr,
    numbers: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * numbers + tl.arange(0, numbers)
    inside = column < columns
    block = data + row * data_row + column // size * num_bytes
    value = _value(block, column % size, inside, bits)
    tl.store(out + row * out_row + column, narrow(value, out.dtype.element_ty), mask=inside)


def dequantize_blocks_(data: Tensor, kind: str, out: Tensor) -> None:
    """`blocks.dequantize_blocks_`; the bytes and the numbers of a row must be adjacent."""
    rows, columns = out.shape
    block = BLOCK_TYPES[kind]
    launch(
        _dequantize_kernel,
        (triton.cdiv(columns, NUMBERS), rows),
        data,
        out,
        columns,
        data.stride(0),
        out.stride(0),
        bits=int(kind[1]),
        size=block.size,
        num_bytes=block.num_bytes,
        numbers=NUMBERS,
        num_warps=WARPS,
    )
