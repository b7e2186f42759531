"""The tensor table of a GGUF file.

Every count and length in it is compared with what is left of the file before anything is read, so
that a damaged or hostile file costs no more than its own bytes. Only the table is read.

Source: the format's description in ggml's repository. That a tensor may have five dimensions, and
that its true shape may be among the values (`comfy.gguf.orig_shape.`), comes from ComfyUI-GGUF,
which made the published files.
"""

import math
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch

from ..errors import CheckpointError, shown
from ..kernels.blocks import BLOCK_TYPES
from .entries import TensorEntry

#: number of a type -> its dtype, or the name of its blocks
_PLAIN = {
    0: torch.float32,
    1: torch.float16,
    24: torch.int8,
    25: torch.int16,
    26: torch.int32,
    27: torch.int64,
    28: torch.float64,
    30: torch.bfloat16,
}
_BLOCKS = {
    2: "Q4_0",
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    20: "IQ4_NL",
    23: "IQ4_XS",
}
#: type of a value -> its layout for struct
_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY, _INT32 = 8, 9, 5
_SHAPE_KEY = "comfy.gguf.orig_shape."
#: bytes of a table, and values and tensors in it; a language model's vocabulary takes ten million
#: bytes and half a million values
MAX_TABLE_BYTES = 100_000_000
MAX_ITEMS = 4_000_000
#: bytes of a name, and dimensions of a tensor
MAX_NAME_BYTES = 65_535
MAX_DIMENSIONS = 8
#: characters of a value that is kept
_MAX_TEXT = 10_000


def read_gguf(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Read the tensor table and the texts of a GGUF file.

    Returns:
        The tensors by name, and the values beside them that are text.

    Raises:
        CheckpointError: another version, big-endian, damaged, truncated, one of several parts, or
            with a type that is not read here.
    """
    with path.open("rb") as file:
        table = _Table(path, file)
        num_tensors, num_values = _start(table)
        values = _read_values(table, num_values)
        found = [_read_tensor(table, values.shapes) for _ in range(num_tensors)]
        end = table.position
    if len(entries := {each.name: each for each in found}) != len(found):
        raise table.damaged("a name appears twice")
    data_start = -(-end // values.alignment) * values.alignment
    return _placed(table, entries, data_start, values.alignment), values.texts


class _Table:
    """The open file; reads no further than it goes."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path, self._file = path, file
        self.num_bytes = path.stat().st_size
        self.limit = min(self.num_bytes, MAX_TABLE_BYTES)
        self.position = 0
        self.items = 0

    def damaged(self, why: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path.name} is a damaged GGUF file ({why}): download it again."
        )

    def read(self, count: int) -> bytes:
        if count > self.limit - self.position:
            raise self.damaged(
                f"its table needs {count} bytes at byte {self.position} of {self.num_bytes}, "
                f"and may have {self.limit}"
            )
        self.position += count
        return self._file.read(count)

    def skip(self, count: int) -> None:
        if count > self.limit - self.position:
            self.read(count)
        self.position += count
        self._file.seek(self.position)

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.read(struct.calcsize(layout)))[0]

    def count(self, least_bytes: int, what: str) -> int:
        """A number of things that take at least so many bytes each."""
        found: int = self.number("<Q")
        self.items += found
        if found * least_bytes > self.limit - self.position or self.items > MAX_ITEMS:
            raise self.damaged(f"it announces {found} {what}")
        return found

    def text(self, limit: int) -> str:
        length: int = self.number("<Q")
        if length > limit:
            raise self.damaged(f"a name or text of {length} bytes")
        return self.read(length).decode("utf-8", errors="replace")


def _start(table: _Table) -> tuple[int, int]:
    """Check magic and version; the numbers of tensors and of values."""
    name = table.path.name
    table.read(4)
    version: int = table.number("<I")
    if version in (2 << 24, 3 << 24):
        raise CheckpointError(
            f"{name} is a GGUF file for big-endian machines: use the usual (little-endian) one."
        )
    if version not in (2, 3):
        raise CheckpointError(
            f"{name} is GGUF version {version}, and versions 2 and 3 are read: use a file that a "
            "current program converted."
        )
    # a tensor has a name, its dimensions, a type and an offset; a value has a name, a type, a byte
    return table.count(24, "tensors"), table.count(13, "values")


@dataclass
class _Values:
    """What is kept of the values.

    Attributes:
        texts: by name.
        shapes: true shapes of tensors, by the tensor's name.
        alignment: of the data, in bytes.
    """

    texts: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    alignment: int = 32


def _read_values(table: _Table, count: int) -> _Values:
    found = _Values({}, {})
    for _ in range(count):
        key, kind = table.text(MAX_NAME_BYTES), table.number("<I")
        if kind == _ARRAY:
            numbers = _read_array(table, keep=key.startswith(_SHAPE_KEY))
            if numbers is not None:
                found.shapes[key.removeprefix(_SHAPE_KEY)] = numbers
        elif kind == _STRING:
            found.texts[key] = table.text(table.limit)[:_MAX_TEXT]
        elif kind not in _SCALARS:
            raise table.damaged(f"a value of type {kind}")
        else:
            number = table.number(_SCALARS[kind])
            if key == "general.alignment":
                found.alignment = number
            if key == "split.count" and number > 1:
                raise CheckpointError(
                    f"{table.path.name} is one of {number} parts of a GGUF file: join them "
                    "with llama-gguf-split --merge and choose the result."
                )
    good = type(found.alignment) is int and 1 <= found.alignment <= 2**20
    if not good or found.alignment & (found.alignment - 1):
        raise table.damaged(f"an alignment of {found.alignment}")
    return found


def _read_array(table: _Table, *, keep: bool) -> tuple[int, ...] | None:
    """Read or pass over an array of numbers or of texts."""
    kind = table.number("<I")
    if kind == _STRING:
        for _ in range(table.count(8, "texts")):
            table.skip(table.number("<Q"))
        return None
    if kind not in _SCALARS:  # arrays of arrays are in no known file
        raise table.damaged(f"an array of type {kind}")
    size = struct.calcsize(_SCALARS[kind])
    count: int = table.number("<Q")
    if not keep:
        table.skip(count * size)
        return None
    if kind != _INT32 or count > MAX_DIMENSIONS:
        raise table.damaged(f"a shape of {count} values of type {kind}")
    return tuple(table.number("<i") for _ in range(count))


def _read_tensor(table: _Table, shapes: dict[str, tuple[int, ...]]) -> TensorEntry:
    """One row of the table; its offset counts from the start of the data."""
    name = table.text(MAX_NAME_BYTES)
    num_dims: int = table.number("<I")
    if num_dims > MAX_DIMENSIONS:
        raise table.damaged(f"tensor {shown(name)} has {num_dims} dimensions")
    stored = tuple(table.number("<Q") for _ in range(num_dims))[::-1]
    kind, offset = table.number("<I"), table.number("<Q")
    shape = shapes.get(name, stored)
    if min(shape, default=1) < 0 or math.prod(shape) != math.prod(stored):
        raise table.damaged(f"tensor {shown(name)} of {list(stored)} is called {list(shape)}")
    if kind in _PLAIN:
        dtype = _PLAIN[kind]
        size = math.prod(stored) * dtype.itemsize
        return TensorEntry(table.path, name, dtype, shape, size, offset)
    if kind not in _BLOCKS:
        raise CheckpointError(
            f"{table.path.name} stores {shown(name)} in GGUF type {kind}, which this "
            f"package cannot read: use a file in one of {', '.join(BLOCK_TYPES)}."
        )
    block = BLOCK_TYPES[_BLOCKS[kind]]
    columns = stored[-1] if stored else 1
    if columns % block.size:
        raise table.damaged(
            f"tensor {shown(name)} has rows of {columns} numbers, not whole blocks of {block.size}"
        )
    size = math.prod(stored) // block.size * block.num_bytes
    return TensorEntry(table.path, name, torch.uint8, shape, size, offset, block_type=_BLOCKS[kind])


def _placed(
    table: _Table, entries: dict[str, TensorEntry], data_start: int, alignment: int
) -> dict[str, TensorEntry]:
    """The entries with offsets from the start of the file, which they must not leave."""
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].offset):
        if entry.offset % alignment or entry.offset < end:
            raise table.damaged(
                f"tensor {shown(name)} starts at byte {entry.offset} of the data, the one before "
                f"ends at {end}, and the alignment is {alignment}"
            )
        end = entry.offset + entry.num_bytes
        if data_start + end > table.num_bytes:
            raise CheckpointError(
                f"{table.path.name} has {table.num_bytes} bytes, and tensor {shown(name)} "
                f"ends at byte {data_start + end}: it is truncated; download it again."
            )
    return {n: replace(e, offset=data_start + e.offset) for n, e in entries.items()}
