"""Where the transformer's weights are during a run, and how many bytes a forward pass needs.

Only what `SkyReelsTransformer.denoise` needs counts as the weights of the loop (9.06 G of 12.82 G
parameters). A transformer whose loop does not fit the device is streamed: its small layers and as
many blocks as fit stay there for the whole run, the others arrive in slots while the blocks before
them compute (runtime/streaming.py).
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..config import TransformerConfig
from ..errors import OutOfRoomError
from ..kernels import dispatch
from ..runtime import Runtime
from ..runtime.offload import (
    RESERVE_BYTES,
    hold_locked,
    is_held,
    module_tensors,
    onload,
    onload_bytes,
    whole_pages,
)
from ..runtime.streaming import (
    SLOTS,
    BlockStream,
    Copies,
    Sources,
    choose_resident,
    cut_sources,
    least_bytes,
    open_copies,
    padded_bytes,
    page_lock_ends,
)
from .model import RunBlock, SkyReelsTransformer

logger = logging.getLogger("skyreels.transformer.placement")

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

#: biases, norms and scales up to this size stay on the device, 12 MB in all: one by one, they would
#: be copied slowly
KEPT_BYTES = 128 * 1024
#: of the bytes of a block, which matters for tiny ones
KEPT_SHARE = 1 / 16


def loop_tensors(transformer: SkyReelsTransformer) -> list[Tensor]:
    """Tensors of the transformer that `denoise` needs: no conditioners."""
    excluded = _conditioning_tensors(transformer)
    return [t for t in module_tensors(transformer) if id(t) not in excluded]


def _conditioning_tensors(transformer: SkyReelsTransformer) -> set[int]:
    """Ids of the tensors of conditioners."""
    return {id(t) for module in transformer.conditioners for t in module_tensors(module)}


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
        num_tokens: image and text tokens of one branch; where both run block by block, see
            `waiting_bytes`.
        dtype: of the activations.
        chunking: a name of config.CHUNKINGS.
        gemm: of PEAK_IN_8_BITS, how blocks in 8 bits are multiplied; any other name is that of a
            floating dtype.

    Returns:
        Bytes, a little more than was counted.
    """
    hidden = waiting_bytes(config, num_tokens, dtype)
    tensors = PEAK_IN_8_BITS.get(gemm, PEAK_HIDDEN_TENSORS)[chunking]
    unpacked = 0
    if gemm == "dequantized":  # the widest part of a weight in float32, and in the compute dtype
        inner = int(config.hidden_size * config.mlp_ratio)
        unpacked = inner * config.hidden_size * (torch.float32.itemsize + dtype.itemsize)
    return int(tensors * hidden) + unpacked


def waiting_bytes(config: TransformerConfig, num_tokens: int, dtype: torch.dtype) -> int:
    """Bytes of a branch while a block runs for the other one: its tokens.

    Args:
        config: sizes of the network.
        num_tokens: image and text tokens of the branch.
        dtype: of the activations.

    Returns:
        Bytes.
    """
    return num_tokens * config.hidden_size * dtype.itemsize


def choose_chunking(activation_bytes: Mapping[str, int], free: int) -> str:
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
    Afterwards every weight is where it was, and no longer page-locked.

    Args:
        transformer: on any device; left alone if it is on `runtime.device` already.
        runtime: where it runs.
        activation_bytes: to keep free beside the weights, from `sampling_bytes`.

    Yields:
        run_block for `SkyReelsTransformer.denoise`; asks for an interrupt before each block and
        streams the blocks that do not stay on the device.

    Raises:
        OutOfRoomError: not even one block fits beside the activations.
        OutOfMemoryError: torch's, if not even the small layers fit.
    """
    device = runtime.device
    conditioners = {id(module): module_tensors(module) for module in transformer.conditioners}
    missing = onload_bytes(loop_tensors(transformer), device)
    runtime.make_room(missing + activation_bytes + RESERVE_BYTES)
    kept, away = _split(transformer, device)
    sizes = [padded_bytes(tensors) for tensors in away.values()]

    def room() -> int:
        """Bytes for blocks and slots."""
        free = runtime.free_bytes() - activation_bytes - onload_bytes(kept, device)
        return free if device.type == "cpu" else free - RESERVE_BYTES

    def check(budget: int) -> None:
        least = least_bytes(sizes, slots=1)
        if sizes and budget < least:
            raise OutOfRoomError(
                f"One step needs {activation_bytes / 1e9:.1f} GB for activations and "
                f"{least / 1e9:.1f} GB for a block on {device}, {(least - budget) / 1e9:.1f} GB "
                "more than is free: use fewer frames or a smaller size, or close other programs."
            )

    budget = room()
    while True:
        check(budget)
        with ExitStack() as stack:
            try:
                loaded = _load(stack, kept, away, budget, runtime)
            except torch.OutOfMemoryError as error:
                if not sizes:
                    raise
                logger.info("%s: fewer blocks stay on %s.", dispatch.brief(error), device)
            else:
                yield partial(_run_block, runtime, conditioners, *loaded)
                return
        # what was refused was less than `budget`; somebody else may have taken memory
        budget = min(room(), min(budget, sum(sizes)) - max(sizes))


def _split(
    transformer: SkyReelsTransformer, device: torch.device
) -> tuple[list[Tensor], dict[nn.Module, list[Tensor]]]:
    """What of the loop is not on a device.

    Returns:
        What is there for the whole run, and the tensors of each block that is away.
    """
    away: dict[nn.Module, list[Tensor]] = {}
    excluded = _conditioning_tensors(transformer)
    for block in transformer.blocks:
        tensors = [t for t in module_tensors(block) if id(t) not in excluded]
        tensors = [t for t in tensors if onload_bytes([t], device)]
        small = min(KEPT_BYTES, KEPT_SHARE * sum(t.nbytes for t in tensors))
        large = [t for t in tensors if t.nbytes > small and t.is_contiguous()]
        if large:
            away[block] = large
    excluded |= {id(tensor) for tensors in away.values() for tensor in tensors}
    return [t for t in module_tensors(transformer) if id(t) not in excluded], away


def _load(
    stack: ExitStack,
    kept: list[Tensor],
    away: Mapping[nn.Module, list[Tensor]],
    budget: int,
    runtime: Runtime,
) -> tuple[BlockStream | None, dict[int, int]]:
    """Load what stays, and start to stream the rest; `stack` undoes it.

    Returns:
        The stream, None if all stay; the id of each streamed module and its position there.
    """
    device, blocks = runtime.device, list(away.values())
    copies, slots, resident = None, [], frozenset(range(len(blocks)))
    if sum(t.nbytes for tensors in blocks for t in tensors) > budget:
        copies, sizes = open_copies(device), [padded_bytes(tensors) for tensors in blocks]
        count = SLOTS if copies.runs_beside and least_bytes(sizes, SLOTS) <= budget else 1
        resident = choose_resident(sizes, budget, count)
        largest = max(size for index, size in enumerate(sizes) if index not in resident)
        slots = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(count)]
    stack.callback(onload(kept, device))
    for index in sorted(resident):
        runtime.check_interrupt()
        stack.callback(onload(blocks[index], device))
    if copies is None:
        return None, {}
    streamed = [module for index, module in enumerate(away) if index not in resident]
    blocks = [away[module] for module in streamed]
    sources, in_background = None, False
    if copies.runs_beside:
        sources, is_pinned = _pin(stack, blocks, copies, runtime)
        in_background = not is_pinned
    stream = BlockStream(blocks, slots, copies, sources=sources, in_background=in_background)
    stack.callback(stream.close)
    stream.start()
    num_bytes = sum(map(padded_bytes, blocks))
    logger.info(
        "%d of %d blocks (%.1f GB) are streamed.",
        len(streamed),
        len(away),
        num_bytes / 1e9,
    )
    return stream, {id(module): position for position, module in enumerate(streamed)}


def _pin(
    stack: ExitStack, blocks: Sequence[Sequence[Tensor]], copies: Copies, runtime: Runtime
) -> tuple[Sources, bool]:
    """Page-lock blocks as far as possible, until `stack` undoes it; say it if that is not all.

    Another device of the run may stream from the same memory: each block is locked by itself, so
    that both name the same pages.

    Returns:
        Where their bytes are read, and whether all of it is page-locked.
    """
    pages: list[Tensor] = []
    refused_bytes, reason = 0, ""
    for tensors in blocks:
        homes = [tensor.data for tensor in tensors if tensor.device.type == "cpu"]
        pages += whole_pages([home for home in homes if is_held(home) or not home.is_pinned()])
    for memory in pages:
        runtime.check_interrupt()
        try:
            stack.callback(hold_locked(memory, runtime.pin, runtime.unpin))
        except RuntimeError as error:
            refused_bytes += memory.nbytes
            reason = reason or dispatch.brief(error)
    sources = cut_sources(blocks, pages)  # what is refused here may be locked for another device
    try:
        page_lock_ends(sources)
    except RuntimeError as error:
        refused_bytes, reason = refused_bytes or 1, reason or dispatch.brief(error)
    if not refused_bytes:
        return sources, True
    ring = copies.stage()
    by = f"a ring of {ring / 1e6:.1f} MB" if ring else "pageable copies"
    dispatch.log_once(
        f"Streamed weights: {refused_bytes / 1e9:.1f} GB of main memory cannot be page-locked "
        f"({reason}). They go through {by}, slower.",
        source=logger,
    )
    return sources, False


def _run_block(
    runtime: Runtime,
    conditioners: Mapping[int, list[Tensor]],
    stream: BlockStream | None,
    streamed: Mapping[int, int],
    module: nn.Module,
    *args: Any,
) -> Any:
    """Run a module of a transformer, with its weights on the device."""
    runtime.check_interrupt()
    if stream is not None and id(module) in streamed:
        return stream.run(streamed[id(module)], module, *args)
    if id(module) not in conditioners:
        return module(*args)
    restore = onload(conditioners[id(module)], runtime.device)
    try:
        return module(*args)
    finally:
        restore()
