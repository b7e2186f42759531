"""Weights that the processes of one machine hold once.

The process that has loaded modules moves their weights into memory without a name (Linux's memfd),
and the others map it: no file to leave behind, no limit of /dev/shm, and a page is in main memory
once, however many processes stream it to their cards.
"""

import io
import mmap
import os
import pickle
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .offload import module_tensors

#: weights begin at whole pages, so that each process can page-lock those that it streams
_PAGE = mmap.PAGESIZE


def share(modules: tuple[nn.Module, ...]) -> bytes:
    """Move the weights of modules into memory that other processes can map.

    Args:
        modules: contiguous weights on the CPU are moved; they stay as they are otherwise. Whoever
            writes to one of them later writes to that of all processes.

    Returns:
        What `attach` takes, as long as this process lives: all of the modules but those weights.

    Raises:
        OSError: this system has no such memory, or refuses it.
    """
    if not hasattr(os, "memfd_create"):
        raise OSError("only Linux has memory files without a name")
    places, num_bytes = _places(tensor for module in modules for tensor in module_tensors(module))
    descriptor = os.memfd_create("skyreels-weights")  # open to the end: others find it by number
    os.ftruncate(descriptor, num_bytes)
    memory = _mapped(descriptor, num_bytes)
    with torch.inference_mode(False), torch.no_grad():
        for offset, tensor in places.values():  # the old memory of each is free before the next
            tensor.data = _view(memory, offset, tensor.dtype, tensor.shape).copy_(tensor)
    file = io.BytesIO()
    _Pickler(file, {key: offset for key, (offset, _) in places.items()}).dump(modules)
    return pickle.dumps((os.getpid(), descriptor, num_bytes, file.getvalue()))


def attach(shared: bytes) -> tuple[nn.Module, ...]:
    """The modules that another process of this machine has shared.

    Args:
        shared: what `share` returned there; trusted, as every pickle must be.

    Returns:
        The modules, whose weights are the memory of that process.

    Raises:
        OSError: that process is gone, or its memory is not open to this one.
    """
    process, descriptor, num_bytes, pickled = pickle.loads(shared)
    with open(f"/proc/{process}/fd/{descriptor}", "r+b", buffering=0) as file:
        memory = _mapped(file.fileno(), num_bytes)
    modules: tuple[nn.Module, ...] = _Unpickler(io.BytesIO(pickled), memory).load()
    return modules


def _places(tensors: Iterable[Tensor]) -> tuple[dict[int, tuple[int, Tensor]], int]:
    """By id: where each tensor begins, and itself; and the bytes of all."""
    places: dict[int, tuple[int, Tensor]] = {}
    end = 0
    for tensor in tensors:
        if id(tensor) not in places and tensor.device.type == "cpu" and tensor.is_contiguous():
            places[id(tensor)] = end, tensor
            end += max(1, -(-tensor.nbytes // _PAGE)) * _PAGE
    return places, max(_PAGE, end)


def _mapped(descriptor: int, num_bytes: int) -> Tensor:
    """[num_bytes] uint8, that keep the mapping alive."""
    return torch.frombuffer(mmap.mmap(descriptor, num_bytes), dtype=torch.uint8)


def _view(memory: Tensor, offset: int, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    return memory[offset : offset + shape.numel() * dtype.itemsize].view(dtype).view(shape)


class _Pickler(pickle.Pickler):
    """Names the tensors that are in the shared memory by their places."""

    def __init__(self, file: io.BytesIO, offsets: dict[int, int]) -> None:
        super().__init__(file)
        self._offsets = offsets

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, Tensor) or id(obj) not in self._offsets:
            return None
        return (
            self._offsets[id(obj)],
            obj.dtype,
            obj.shape,
            isinstance(obj, nn.Parameter),
        )


class _Unpickler(pickle.Unpickler):
    """Finds those tensors in memory; one that has several names stays one."""

    def __init__(self, file: io.BytesIO, memory: Tensor) -> None:
        super().__init__(file)
        self._memory = memory
        self._found: dict[int, Tensor] = {}

    def persistent_load(self, pid: Any) -> Tensor:
        offset, dtype, shape, is_parameter = pid
        if offset not in self._found:
            tensor = _view(self._memory, offset, dtype, shape)
            self._found[offset] = (
                nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
            )
        return self._found[offset]
