"""Weights in GGUF blocks: how many numbers and bytes a block has, and what its bytes mean.

A block is 32 or 256 numbers of a row, a few bits each, with the scales that belong to them. Blocks
run along the last dimension, so that some rows, and some columns in whole blocks, are bytes that
lie together. What a block's bytes stand for is computed in float32 and rounded once.

Source: block layouts of ggml (ggml-quants.h, MIT), compared with the `gguf` package number by
number in the tests.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

#: numbers that plain torch works on at a time, so that few are held in float32
PIECE_NUMBERS = 2**20
_IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


class BlockType(NamedTuple):
    """One way to store numbers in blocks.

    Attributes:
        size: numbers of a block.
        num_bytes: of a block.
        halves: where its float16 factors start.
        unpack: [n, num_bytes] uint8 -> [n, size] float32.
    """

    size: int
    num_bytes: int
    halves: tuple[int, ...]
    unpack: Callable[[Tensor], Tensor]


def row_bytes(kind: str, columns: int) -> int:
    """Bytes of a row of so many columns, which are whole blocks."""
    block = BLOCK_TYPES[kind]
    return columns // block.size * block.num_bytes


def dequantize_blocks_(data: Tensor, kind: str, out: Tensor) -> None:
    """Write what blocks stand for.

    Args:
        data: [rows, bytes] uint8, the bytes of a row adjacent and whole blocks.
        kind: of BLOCK_TYPES.
        out: [rows, columns] float.
    """
    block = BLOCK_TYPES[kind]
    rows = max(1, PIECE_NUMBERS // max(1, out.shape[1]))
    for piece, target in zip(torch.split(data, rows), torch.split(out, rows), strict=True):
        numbers = block.unpack(piece.reshape(-1, block.num_bytes))
        target.copy_(numbers.view(target.shape))


def factors(data: Tensor, kind: str) -> Tensor:
    """All float16 factors of some blocks: the rest are whole numbers, which are always finite.

    Args:
        data: uint8 of any shape, whole blocks.
        kind: of BLOCK_TYPES.

    Returns:
        [blocks, factors of each] float16.
    """
    block = BLOCK_TYPES[kind]
    flat = data.reshape(-1, block.num_bytes)
    return torch.cat([_half(flat, start, torch.float16) for start in block.halves], dim=1)


# --- what the bytes of a block mean -------------------------------------------------------------


def _half(data: Tensor, start: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The float16 at a byte, [n, 1]."""
    return data[:, start : start + 2].contiguous().view(torch.float16).to(dtype)


def _bits(data: Tensor, width: int, group: int) -> Tensor:
    """Unsigned numbers of `width` bits: from every `group` bytes first all lowest bits, then ..."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=data.device)
    parts = data.reshape(len(data), -1, 1, group) >> shifts.view(1, 1, -1, 1)
    codes: Tensor = parts & (2**width - 1)
    return codes.view(len(data), -1)


def _high_bits(data: Tensor) -> Tensor:
    """The bits of four bytes, the lowest first, as 0 or 16: [n, 32]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=data.device)
    bits = (data.unsqueeze(-1) >> shifts) & 1
    return bits.view(len(data), -1) << 4


def _q4_0(data: Tensor) -> Tensor:
    return _half(data, 0) * (_bits(data[:, 2:], 4, 16).float() - 8)


def _q4_1(data: Tensor) -> Tensor:
    return _half(data, 0) * _bits(data[:, 4:], 4, 16).float() + _half(data, 2)


def _q5_0(data: Tensor) -> Tensor:
    codes = _bits(data[:, 6:], 4, 16) | _high_bits(data[:, 2:6])
    return _half(data, 0) * (codes.float() - 16)


def _q5_1(data: Tensor) -> Tensor:
    codes = _bits(data[:, 8:], 4, 16) | _high_bits(data[:, 4:8])
    return _half(data, 0) * codes.float() + _half(data, 2)


def _q8_0(data: Tensor) -> Tensor:
    return data[:, 2:].view(torch.int8).float() * _half(data, 0)


def _scaled(scale: Tensor, codes: Tensor, shift: Tensor | None = None) -> Tensor:
    """Scale times codes minus shift: one of each for every one of a block's equal parts."""
    parts = codes.float().view(len(codes), scale.shape[1], -1)
    parts = scale.unsqueeze(-1) * parts
    if shift is not None:
        parts = parts - shift.unsqueeze(-1)
    return parts.view(len(codes), -1)


def _q2_k(data: Tensor) -> Tensor:
    low, high = (data[:, :16] & 15).float(), (data[:, :16] >> 4).float()
    codes = _bits(data[:, 16:80], 2, 32)
    return _scaled(_half(data, 80) * low, codes, _half(data, 82) * high)


def _q3_k(data: Tensor) -> Tensor:
    packed = data[:, 96:108]
    scales = _bits(packed[:, :8], 4, 8) | _bits(packed[:, 8:], 2, 4) << 4
    # a bit that is not set in the mask takes 4 away
    codes = _bits(data[:, 32:96], 2, 32).float() - 4 * (1 - _bits(data[:, :32], 1, 32).float())
    return _scaled(_half(data, 108) * (scales.float() - 32), codes)


def _six_bit_scales(data: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and shifts of eight parts, from 12 bytes."""
    scale, shift, both = data[:, :4], data[:, 4:8], data[:, 8:]
    scales = torch.cat([scale & 63, (both & 15) | (scale >> 2 & 48)], dim=1)
    shifts = torch.cat([shift & 63, (both >> 4) | (shift >> 2 & 48)], dim=1)
    return scales.float(), shifts.float()


def _q4_k(data: Tensor) -> Tensor:
    scales, shifts = _six_bit_scales(data[:, 4:16])
    codes = _bits(data[:, 16:], 4, 32)
    return _scaled(_half(data, 0) * scales, codes, _half(data, 2) * shifts)


def _q5_k(data: Tensor) -> Tensor:
    scales, shifts = _six_bit_scales(data[:, 4:16])
    codes = _bits(data[:, 48:], 4, 32) | _bits(data[:, 16:48], 1, 32) << 4
    return _scaled(_half(data, 0) * scales, codes, _half(data, 2) * shifts)


def _q6_k(data: Tensor) -> Tensor:
    codes = _bits(data[:, :128], 4, 64) | _bits(data[:, 128:192], 2, 32) << 4
    scales = data[:, 192:208].view(torch.int8).float()
    return _scaled(_half(data, 208) * scales, codes.float() - 32)


def _iq4(codes: Tensor) -> Tensor:
    values = torch.tensor(_IQ4_VALUES, dtype=torch.float32, device=codes.device)
    return values[codes.long()]


def _iq4_nl(data: Tensor) -> Tensor:
    return _half(data, 0) * _iq4(_bits(data[:, 2:], 4, 16))


def _iq4_xs(data: Tensor) -> Tensor:
    low = _bits(data[:, 4:8].reshape(-1, 1), 4, 1).view(len(data), 8)
    high = _bits(data[:, 2:4].reshape(-1, 1), 2, 1).view(len(data), 8)
    scales = (low | high << 4).float() - 32
    return _scaled(_half(data, 0) * scales, _iq4(_bits(data[:, 8:], 4, 16)))


#: names as in ggml
BLOCK_TYPES: dict[str, BlockType] = {
    "Q4_0": BlockType(32, 18, (0,), _q4_0),
    "Q4_1": BlockType(32, 20, (0, 2), _q4_1),
    "Q5_0": BlockType(32, 22, (0,), _q5_0),
    "Q5_1": BlockType(32, 24, (0, 2), _q5_1),
    "Q8_0": BlockType(32, 34, (0,), _q8_0),
    "Q2_K": BlockType(256, 84, (80, 82), _q2_k),
    "Q3_K": BlockType(256, 110, (108,), _q3_k),
    "Q4_K": BlockType(256, 144, (0, 2), _q4_k),
    "Q5_K": BlockType(256, 176, (0, 2), _q5_k),
    "Q6_K": BlockType(256, 210, (208,), _q6_k),
    "IQ4_NL": BlockType(32, 18, (0,), _iq4_nl),
    "IQ4_XS": BlockType(256, 136, (0,), _iq4_xs),
}
