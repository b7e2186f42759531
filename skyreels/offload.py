"""Weights that are on a device only while they are used (offload and onload).

The tensors on the offload device are kept while their copies are in use, so offloading again costs
nothing, and a cancelled or failed run finds every weight where it was.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

#: left free for kernels, workspaces and fragmentation
RESERVE_BYTES = 512 * 1024**2
#: of the free memory, if that is more
RESERVE_SHARE = 0.05


def reserve_bytes(free_bytes: int) -> int:
    """Bytes of a device that a plan leaves free, of those that are free now."""
    return max(RESERVE_BYTES, int(RESERVE_SHARE * free_bytes))


def module_tensors(module: nn.Module) -> list[Tensor]:
    """All parameters and buffers."""
    return [*module.parameters(), *module.buffers()]


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
