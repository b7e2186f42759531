"""Where weights are while they are used, and how many bytes a run needs.

A transformer that does not fit the device is streamed: its small layers and as many blocks as fit
stay there for the whole run, the other blocks visit for the length of their own forward pass. The
tensors on the offload device are kept throughout, so leaving costs nothing and a cancelled or
failed run finds every weight where it was.

Given up for now: prefetching the next block while one computes (performance plan, section 2.5).
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .config import TransformerConfig
from .errors import OutOfRoomError
from .model import RunBlock, SkyReelsTransformer
from .runtime import Runtime

#: hidden-sized tensors alive at the peak of a block, counted on shape-only tensors at the full
#: 51,256 x 3072 in bfloat16 (tests/engine/test_memory.py repeats the count)
PEAK_HIDDEN_TENSORS = 20
#: kernels, workspaces and fragmentation
RESERVE_BYTES = 512 * 1024**2


def weight_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def sampling_bytes(config: TransformerConfig, num_tokens: int, dtype: torch.dtype) -> int:
    """Peak bytes of one forward pass beyond the weights.

    Args:
        num_tokens: image and text tokens of one branch; the branches run one after the other.
        dtype: of the activations.
    """
    return PEAK_HIDDEN_TENSORS * num_tokens * config.hidden_size * dtype.itemsize


@contextmanager
def on_device(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Have a module's weights on `device` inside the block; afterwards they are where they were."""
    with ExitStack() as stack:
        stack.callback(_visit(module, device))
        yield


def _visit(module: nn.Module, device: torch.device) -> Callable[[], None]:
    """Copy a module's weights to `device`; the function returned puts the originals back."""
    homes: list[tuple[Tensor, Tensor]] = []

    def restore() -> None:
        for tensor, home in homes:
            tensor.data = home

    try:
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.device != device:
                home = tensor.data
                tensor.data = home.to(device, non_blocking=True)
                homes.append((tensor, home))
    except BaseException:
        restore()
        raise
    return restore


@contextmanager
def placed(
    transformer: SkyReelsTransformer, runtime: Runtime, activation_bytes: int
) -> Iterator[RunBlock]:
    """Make a transformer runnable on `runtime.device` for the length of a run.

    Args:
        transformer: on any device; left alone if it is on `runtime.device` already.
        activation_bytes: to keep free beside the weights, from `sampling_bytes`.
    Yields:
        run_block for `SkyReelsTransformer.forward`; asks for an interrupt before each block and
        brings in the blocks that do not live on the device.
    Raises:
        OutOfRoomError: not even one block fits beside the activations.
    """
    device = runtime.device
    missing_bytes = weight_bytes(transformer) if _is_away(transformer, device) else 0
    runtime.make_room(missing_bytes + activation_bytes + RESERVE_BYTES)
    away = [block for block in transformer.blocks if _is_away(block, device)]
    free = runtime.free_bytes() - activation_bytes
    if device.type != "cpu":
        free -= RESERVE_BYTES
    outside = [child for name, child in transformer.named_children() if "blocks" not in name]
    free -= sum(weight_bytes(child) for child in outside if _is_away(child, device))
    largest = max((weight_bytes(block) for block in away), default=0)
    if free < largest:
        raise OutOfRoomError(
            f"One step needs {activation_bytes / 1e9:.1f} GB for activations and "
            f"{largest / 1e9:.1f} GB for a block on {device}, {(largest - free) / 1e9:.1f} GB more "
            "than there is: use fewer frames or a smaller size, or close other programs."
        )
    with ExitStack() as stack:
        for child in outside:
            stack.callback(_visit(child, device))
        streamed = set()
        for block in away:
            free -= weight_bytes(block)
            if free < largest:  # room for one visitor must remain
                streamed.add(id(block))
                continue
            runtime.check_interrupt()
            stack.callback(_visit(block, device))

        def run_block(block: nn.Module, *args: Any) -> Any:
            runtime.check_interrupt()
            if id(block) not in streamed:
                return block(*args)
            with on_device(block, device):
                return block(*args)

        yield run_block


def _is_away(module: nn.Module, device: torch.device) -> bool:
    return any(tensor.device != device for tensor in module.parameters())
