"""Where a tensor of a checkpoint is stored, and as what."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from ..kernels.blocks import BLOCK_TYPES

#: names in safetensors headers
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor is stored.

    Attributes:
        file: the file, or the shard, that contains it.
        name: in the file, prefix included.
        dtype: as stored; uint8 for numbers in GGUF blocks.
        shape: of the numbers.
        num_bytes: its size.
        offset: of its first byte in `file`; 0 if `is_pickled`.
        is_pickled: the file is a .pt, from which only torch.load can read, by name.
        block_type: of blocks.BLOCK_TYPES, for numbers in GGUF blocks; else "".
    """

    file: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    num_bytes: int
    offset: int = 0
    is_pickled: bool = False
    block_type: str = ""

    @property
    def dtype_name(self) -> str:
        """As files name it: a dtype, or a type of blocks."""
        return self.block_type or DTYPE_NAMES[self.dtype]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Of what is read, in `dtype`: of blocks their bytes, row by row where rows are whole."""
        if not self.block_type:
            return self.shape
        rows = math.prod(self.shape[:-1])
        whole = self.shape and self.shape[-1] % BLOCK_TYPES[self.block_type].size == 0
        return (rows, self.num_bytes // max(1, rows)) if whole else (1, self.num_bytes)
