"""Weights that are on a device only while they are used (offload and onload).

The tensors on the offload device are kept while their copies are in use, so offloading again costs
nothing, and a cancelled or failed run finds every weight where it was. `shapes_only` builds modules
that have no weights yet, or never will.
"""

import ctypes
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from mmap import PAGESIZE
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

#: left free for kernels, workspaces and fragmentation
RESERVE_BYTES = 512 * 1024**2
#: of the free memory, if that is more
RESERVE_SHARE = 0.05


def reserve_bytes(free_bytes: int) -> int:
    """Bytes of a device that a plan leaves free, of those that are free now."""
    return max(RESERVE_BYTES, int(RESERVE_SHARE * free_bytes))


def with_reserve(num_bytes: int) -> int:
    """Free bytes of a device of which `num_bytes` may be used, see `reserve_bytes`."""
    return max(num_bytes + RESERVE_BYTES, math.ceil(num_bytes / (1 - RESERVE_SHARE)))


class _Undrawn(TorchFunctionMode):
    """Leave shape-only weights undrawn; torch would ask Python for each of them."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        weight = (kwargs or {}).get("tensor")
        is_drawing = func in (nn.init.kaiming_uniform_, nn.init.uniform_)
        if is_drawing and isinstance(weight, Tensor) and weight.is_meta:
            return weight
        return func(*args, **(kwargs or {}))


@contextmanager
def shapes_only() -> Iterator[None]:
    """Build modules on the meta device, which takes half the time of `torch.device("meta")`."""
    with torch.device("meta"), _Undrawn():
        yield


def module_tensors(module: nn.Module) -> list[Tensor]:
    """All parameters, then all buffers, each once."""
    modules = list(_modules(module, set()))
    tensors: list[Tensor | None] = [t for each in modules for t in each._parameters.values()]
    tensors += [t for each in modules for t in each._buffers.values()]
    return list({id(t): t for t in tensors if t is not None}.values())


def _modules(module: nn.Module, seen: set[int]) -> Iterator[nn.Module]:
    """A module and all below it; `Module.modules` makes up a name for each."""
    if id(module) not in seen:
        seen.add(id(module))
        yield module
        for child in module._modules.values():
            if child is not None:
                yield from _modules(child, seen)


def weight_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    return sum(tensor.nbytes for tensor in module_tensors(module))


def missing_bytes(module: nn.Module, device: torch.device) -> int:
    """Bytes of the parameters and buffers that are not on `device`."""
    return onload_bytes(module_tensors(module), device)


def onload_bytes(tensors: list[Tensor], device: torch.device) -> int:
    """Bytes that `onload` would copy to `device`."""
    return sum(tensor.nbytes for tensor in tensors if tensor.device != device)


@contextmanager
def on_device(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Keep a module's weights on `device` inside the block and restore them afterwards."""
    with ExitStack() as stack:
        stack.callback(onload(module_tensors(module), device))
        yield


def onload(tensors: list[Tensor], device: torch.device) -> Callable[[], None]:
    """Copy tensors to `device`, in place.

    Returns:
        A function that offloads them again: it puts the original storage back.
    """
    originals: list[tuple[Tensor, Tensor]] = []

    def offload() -> None:
        for tensor, original in originals:
            tensor.data = original

    try:
        for tensor in tensors:
            if tensor.device != device:
                original = tensor.data
                tensor.data = original.to(device, non_blocking=True)
                originals.append((tensor, original))
    except BaseException:
        offload()
        raise
    return offload


# --- page-locked memory -------------------------------------------------------------------------

#: cudaHostRegisterPortable: page-locked for every device
_PORTABLE = 1


def whole_pages(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The pages that hold nothing but some tensors: memory is locked page by page.

    A page of which a part belongs to somebody else is left out: CUDA copies nothing that is
    page-locked in part (`cudaErrorInvalidValue`), so whoever read that neighbour would fail.

    Args:
        tensors: contiguous, on the host.

    Returns:
        Each [num_bytes] uint8, in the order of their addresses, none next to another.
    """
    runs: list[list[int]] = []
    for address, num_bytes in sorted((t.data_ptr(), t.nbytes) for t in tensors if t.nbytes):
        if runs and address <= runs[-1][1]:
            runs[-1][1] = max(address + num_bytes, runs[-1][1])
        else:
            runs.append([address, address + num_bytes])
    pages = [(-(-start // PAGESIZE) * PAGESIZE, end // PAGESIZE * PAGESIZE) for start, end in runs]
    return [
        torch.frombuffer((ctypes.c_ubyte * (end - start)).from_address(start), dtype=torch.uint8)
        for start, end in pages
        if start < end
    ]


def page_lock(memory: Tensor) -> None:
    """Page-lock memory where it lies, so that a GPU can read it by itself.

    Args:
        memory: from `whole_pages`.

    Raises:
        RuntimeError: the driver refuses; the message says why.
    """
    cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    _check(cudart.cudaHostRegister(memory.data_ptr(), memory.nbytes, _PORTABLE))


def page_unlock(memory: Tensor) -> None:
    """Undo `page_lock`; no copy from this memory may be under way."""
    cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    _check(cudart.cudaHostUnregister(memory.data_ptr()))


#: address and bytes of what `hold_locked` keeps -> how many hold it, and what undoes it
_held: dict[tuple[int, int], tuple[int, Callable[[Tensor], None]]] = {}
_guard = threading.Lock()


def hold_locked(
    memory: Tensor, pin: Callable[[Tensor], None], unpin: Callable[[Tensor], None]
) -> Callable[[], None]:
    """Keep memory page-locked, which others of this process may do at the same time.

    Args:
        memory: from `whole_pages`; whoever shares it gives the same tensors there.
        pin: page-locks it where nobody has yet; may raise RuntimeError.
        unpin: undoes that, when the last one lets go.

    Returns:
        Lets go.
    """
    key = memory.data_ptr(), memory.nbytes
    with _guard:
        count, undo = _held.get(key, (0, unpin))
        if not count:
            pin(memory)
        _held[key] = count + 1, undo

    def release() -> None:
        with _guard:
            count, undo = _held.pop(key)
            if count > 1:
                _held[key] = count - 1, undo
            else:
                undo(memory)

    return release


def is_held(tensor: Tensor) -> bool:
    """Whether some of a tensor's memory is page-locked by `hold_locked`."""
    first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    with _guard:
        return any(start < last and first < start + num_bytes for start, num_bytes in _held)


def _check(code: Any) -> None:
    if int(code):
        with suppress(RuntimeError):  # or the next kernel would report it again
            torch.zeros(1, device="cuda")
        torch.cuda.check_error(int(code))
