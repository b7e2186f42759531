"""GGUF files written byte by byte, sound ones and others, and random blocks."""

import struct
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path

import torch
from comfyui_skyreels.skyreels.kernels.blocks import BLOCK_TYPES, factors, row_bytes
from comfyui_skyreels.skyreels.transformer.block_linear import unpack
from torch import Tensor

TYPES = {
    "F32": 0, "F16": 1, "BF16": 30, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8,
    "Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14, "IQ4_NL": 20, "IQ4_XS": 23,
}  # fmt: skip
_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class Blocks:
    """A weight in blocks: its bytes [rows, bytes], its type, and the shape of its numbers."""

    def __init__(self, data: Tensor, kind: str, shape: Sequence[int] = ()) -> None:
        block = BLOCK_TYPES[kind]
        columns = data.shape[1] // block.num_bytes * block.size
        self.data, self.kind, self.shape = data, kind, tuple(shape) or (len(data), columns)

    def floats(self) -> Tensor:
        return unpack(self.data, self.kind, torch.float32).reshape(self.shape)


def random_blocks(kind: str, rows: int, columns: int, seed: int = 0) -> Blocks:
    """Any codes, with factors that give the weights a variance of 0.6 / columns."""
    generator = torch.Generator().manual_seed(seed)
    block = BLOCK_TYPES[kind]
    data = torch.randint(0, 256, (rows, row_bytes(kind, columns)), generator=generator)
    data = data.to(torch.uint8)
    each = data.view(-1, block.num_bytes)

    def set_factors(values: Tensor) -> None:
        for at, start in enumerate(block.halves):
            each[:, start : start + 2] = values[:, at : at + 1].half().view(torch.uint8)

    values = 0.5 + torch.rand(factors(data, kind).shape, generator=generator)
    set_factors(values)
    set_factors(values * (0.6 / columns) ** 0.5 / unpack(data, kind, torch.float32).std())
    return Blocks(data, kind)


def in_blocks(
    state: Mapping[str, Tensor], kinds: Iterable[str] = ("Q8_0",)
) -> dict[str, Tensor | Blocks]:
    """What conversions make: linear weights of the blocks in these types by turns, the rest not."""
    kind = cycle(kinds)
    stored: dict[str, Tensor | Blocks] = {}
    for seed, (name, tensor) in enumerate(state.items()):
        if "_blocks." in name and tensor.ndim == 2:
            stored[name] = random_blocks(next(kind), *tensor.shape, seed)
        else:
            stored[name] = tensor.bfloat16().float()
    return stored


def dequantized(stored: Mapping[str, Tensor | Blocks]) -> dict[str, Tensor]:
    return {n: t.floats() if isinstance(t, Blocks) else t for n, t in stored.items()}


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def value(key: str, content: object) -> bytes:
    """A string, a number, or a list of numbers (INT32) as ComfyUI-GGUF writes shapes."""
    if isinstance(content, str):
        return text(key) + struct.pack("<I", 8) + text(content)
    if isinstance(content, int):
        return text(key) + struct.pack("<II", 4, content)
    assert isinstance(content, list)
    head = struct.pack("<IIQ", 9, 5, len(content))
    return text(key) + head + struct.pack(f"<{len(content)}i", *content)


def gguf_bytes(
    tensors: Mapping[str, Tensor | Blocks],
    values: Mapping[str, object] | None = None,
    *,
    version: int = 3,
    alignment: int = 32,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> bytes:
    """A file of these tensors.

    Args:
        tensors: by name.
        values: of the table.
        version: of the container.
        alignment: of the data; written where it is not the default.
        shapes: that tensors are stored with where that is not their own.
    """
    values = dict(values or {"general.architecture": "hyvid"})
    if alignment != 32:
        values["general.alignment"] = alignment
    for name in shapes or {}:
        values[f"comfy.gguf.orig_shape.{name}"] = list(tensors[name].shape)
    table, data = [], b""
    for name, tensor in tensors.items():
        kind = tensor.kind if isinstance(tensor, Blocks) else _NAMES[tensor.dtype]
        raw = tensor.data if isinstance(tensor, Blocks) else tensor.detach().contiguous()
        dims = list((shapes or {}).get(name, tensor.shape))[::-1]
        table.append(
            text(name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
            + struct.pack("<IQ", TYPES[kind], len(data))
        )  # fmt: skip
        data += raw.reshape(-1).view(torch.uint8).numpy().tobytes()
        data += b"\0" * (-len(data) % alignment)
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(values))
    head += b"".join(value(*item) for item in values.items()) + b"".join(table)
    return head + b"\0" * (-len(head) % alignment) + data


def write(path: Path, *args, **kwargs) -> Path:
    path.write_bytes(gguf_bytes(*args, **kwargs))
    return path
