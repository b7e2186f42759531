"""Where weights are while they are used: copied to a device for as long as they are needed.

The tensors on the offload device are kept throughout, so leaving costs nothing and a cancelled or
failed run finds every weight where it was.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

#: kernels, workspaces and fragmentation
RESERVE_BYTES = 512 * 1024**2


def weight_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    return sum(tensor.nbytes for tensor in tensors_of(module))


def missing_bytes(module: nn.Module, device: torch.device) -> int:
    """Bytes of the parameters and buffers that are not on `device`."""
    return bytes_away(tensors_of(module), device)


def tensors_of(module: nn.Module) -> list[Tensor]:
    """All parameters and buffers."""
    return [*module.parameters(), *module.buffers()]


def bytes_away(tensors: list[Tensor], device: torch.device) -> int:
    """Bytes of those tensors that are not on `device`."""
    return sum(t.nbytes for t in tensors if t.device != device)


@contextmanager
def on_device(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Have a module's weights on `device` inside the block; afterwards they are where they were."""
    with ExitStack() as stack:
        stack.callback(visit(tensors_of(module), device))
        yield


def visit(tensors: list[Tensor], device: torch.device) -> Callable[[], None]:
    """Copy tensors to `device`; the function returned puts the originals back."""
    homes: list[tuple[Tensor, Tensor]] = []

    def restore() -> None:
        for tensor, home in homes:
            tensor.data = home

    try:
        for tensor in tensors:
            if tensor.device != device:
                home = tensor.data
                tensor.data = home.to(device, non_blocking=True)
                homes.append((tensor, home))
    except BaseException:
        restore()
        raise
    return restore
