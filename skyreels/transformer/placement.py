"""Where the transformer's weights are during a run, and how many bytes a forward pass needs.

Only what `SkyReelsTransformer.denoise` needs counts as the weights of the loop (9.06 G of 12.82 G
parameters). A transformer whose loop does not fit the device is streamed: its small layers and as
many blocks as fit stay there for the whole run, the others are loaded for their own forward pass
only (block swap). The next block is not prefetched while one computes.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..config import TransformerConfig
from ..errors import OutOfRoomError
from ..offload import RESERVE_BYTES, module_tensors, onload, onload_bytes
from ..runtime import Runtime
from .model import RunBlock, SkyReelsTransformer

#: hidden-sized tensors alive at the peak of a block, counted on shape-only tensors at the full
#: 51,256 x 3072 in bfloat16 (tests/engine/test_budget.py and test_plan.py repeat the count), and a
#: little more
PEAK_HIDDEN_TENSORS = {"whole": 8.8, "chunks": 6.2, "head groups": 4.6}
#: the same where blocks are multiplied in 8 bits, or dequantized for it
PEAK_IN_8_BITS = {
    "fp8": {"whole": 9.6, "chunks": 7.6, "head groups": 4.6},
    "int8": {"whole": 9.6, "chunks": 6.2, "head groups": 4.6},
    "dequantized": {"whole": 8.8, "chunks": 7.6, "head groups": 4.6},
}

#: what must be left for "whole", which is hardly faster than "chunks"
WHOLE_MARGIN_BYTES = 1024**3


def loop_tensors(transformer: SkyReelsTransformer, part: nn.Module | None = None) -> list[Tensor]:
    """Tensors of the transformer, or of a part of it, that `denoise` needs: no conditioners."""
    excluded = {id(t) for module in transformer.conditioners for t in module_tensors(module)}
    return [t for t in module_tensors(part or transformer) if id(t) not in excluded]


def sampling_bytes(
    config: TransformerConfig,
    num_tokens: int,
    dtype: torch.dtype,
    chunking: str = "chunks",
    gemm: str = "",
) -> int:
    """Peak bytes of one forward pass beyond the weights.

    Args:
        config: sizes of the network.
        num_tokens: image and text tokens of one branch; the branches run one after the other.
        dtype: of the activations.
        chunking: a name of config.CHUNKINGS.
        gemm: of PEAK_IN_8_BITS, how blocks in 8 bits are multiplied; any other name is that of a
            floating dtype.

    Returns:
        Bytes, a little more than was counted.
    """
    hidden = num_tokens * config.hidden_size * dtype.itemsize
    tensors = PEAK_IN_8_BITS.get(gemm, PEAK_HIDDEN_TENSORS)[chunking]
    unpacked = 0
    if gemm == "dequantized":  # the widest part of a weight in float32, and in the compute dtype
        inner = int(config.hidden_size * config.mlp_ratio)
        unpacked = inner * config.hidden_size * (torch.float32.itemsize + dtype.itemsize)
    return int(tensors * hidden) + unpacked


def choose_chunking(
    transformer: SkyReelsTransformer, activation_bytes: Mapping[str, int], runtime: Runtime
) -> str:
    """The fastest chunking that leaves room for all weights of the loop, else the smallest.

    Args:
        transformer: on any device.
        activation_bytes: of each chunking; names of config.CHUNKINGS, fastest first.
        runtime: whose free memory counts.

    Returns:
        A name of config.CHUNKINGS.
    """
    weights = onload_bytes(loop_tensors(transformer), runtime.device) + RESERVE_BYTES
    runtime.make_room(weights + activation_bytes["chunks"])
    return pick_chunking(activation_bytes, runtime.free_bytes() - weights)


def pick_chunking(activation_bytes: Mapping[str, int], free: int) -> str:
    """The fastest chunking that fits in `free` bytes, else the smallest.

    Args:
        activation_bytes: of each chunking; names of config.CHUNKINGS, fastest first.
        free: bytes beside all weights of the loop.

    Returns:
        A name of config.CHUNKINGS.
    """
    for chunking, num_bytes in activation_bytes.items():
        margin = WHOLE_MARGIN_BYTES if chunking == "whole" else 0
        if num_bytes + margin <= free:
            return chunking
    return "head groups"


@contextmanager
def placed(
    transformer: SkyReelsTransformer, runtime: Runtime, activation_bytes: int
) -> Iterator[RunBlock]:
    """Make a transformer runnable on `runtime.device` for the length of a run.

    Conditioners stay where they are and are loaded when they are called (sampling/precompute.py).

    Args:
        transformer: on any device; left alone if it is on `runtime.device` already.
        runtime: where it runs.
        activation_bytes: to keep free beside the weights, from `sampling_bytes`.

    Yields:
        run_block for `SkyReelsTransformer.denoise`; asks for an interrupt before each block and
        loads the blocks that do not stay on the device.

    Raises:
        OutOfRoomError: not even one block fits beside the activations.
    """
    device = runtime.device
    parts = {id(block): loop_tensors(transformer, block) for block in transformer.blocks}
    conditioners = {id(module): module_tensors(module) for module in transformer.conditioners}
    in_blocks = {id(tensor) for tensors in parts.values() for tensor in tensors}
    outside = [t for t in loop_tensors(transformer) if id(t) not in in_blocks]
    missing = onload_bytes(loop_tensors(transformer), device)
    runtime.make_room(missing + activation_bytes + RESERVE_BYTES)
    away = {key: tensors for key, tensors in parts.items() if onload_bytes(tensors, device)}
    free = runtime.free_bytes() - activation_bytes - onload_bytes(outside, device)
    if device.type != "cpu":
        free -= RESERVE_BYTES
    sizes = {key: sum(t.nbytes for t in tensors) for key, tensors in away.items()}
    largest = max(sizes.values(), default=0)
    if away and free < largest:
        raise OutOfRoomError(
            f"One step needs {activation_bytes / 1e9:.1f} GB for activations and "
            f"{largest / 1e9:.1f} GB for a block on {device}, {(largest - free) / 1e9:.1f} GB more "
            "than is free: use fewer frames or a smaller size, or close other programs."
        )
    with ExitStack() as stack:
        stack.callback(onload(outside, device))
        streamed = dict(conditioners)
        for key, tensors in away.items():
            free -= sizes[key]
            if free < largest:  # room for one streamed block must remain
                streamed[key] = tensors
                continue
            runtime.check_interrupt()
            stack.callback(onload(tensors, device))

        def run_block(module: nn.Module, *args: Any) -> Any:
            runtime.check_interrupt()
            if id(module) not in streamed:
                return module(*args)
            restore = onload(streamed[id(module)], device)
            try:
                return module(*args)
            finally:
                restore()

        yield run_block
