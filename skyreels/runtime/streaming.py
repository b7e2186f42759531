"""Which blocks stay on the device, how the others are streamed, and what that costs.

Blocks run in a fixed order, forward pass after forward pass. Those that do not stay are copied into
slots, pieces of device memory that take turns: while one block computes, a copy stream brings the
next ones. A copy waits until the block that used its slot before is done, and a block waits for its
copy; nothing else waits. `simulate` plays this without a device, from sizes and times alone.

A block stays in its slot until another one runs. So both branches of guidance may run it, one right
after the other, and it is copied once.

A block is tensors to bring, then a module to run: which precision it is in does not matter here.
"""

from bisect import bisect_left, bisect_right
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from mmap import PAGESIZE
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

#: two let one block arrive while another computes
SLOTS = 2
#: rates of copying that are tried when blocks are chosen
RATES = 256
#: tensors begin in a slot at multiples of it, as in memory that torch allocates on a GPU
ALIGNMENT = 512
#: of each of the two buffers of a staging ring, the first that can be had
RING_BYTES = (32 * 1024**2, 8 * 1024**2, 2 * 1024**2, 512 * 1024)

#: targets on the device and sources on the host, both [num_bytes] uint8
Pairs = Sequence[tuple[Tensor, Tensor]]
#: for each tensor of each block its bytes in parts, each [num_bytes] uint8
Sources = Sequence[Sequence[list[Tensor]]]


@dataclass(frozen=True)
class Simulation:
    """What some forward passes in a row take.

    Attributes:
        seconds: from the first copy to the end of the last block.
        stall_s: of these, the seconds in which no block computes, because its copy is not done.
        copied_bytes: brought to the device.
    """

    seconds: float
    stall_s: float
    copied_bytes: int


def least_bytes(sizes: Sequence[int], slots: int = SLOTS) -> int:
    """The smallest budget that `choose_resident` accepts.

    Args:
        sizes: bytes of each block.
        slots: at least 1.

    Returns:
        Bytes: all blocks, or the slots with what is too large for them.
    """
    return min([sum(sizes), *(_fixed_bytes(sizes, slots, size) for size in sizes)])


def choose_resident(sizes: Sequence[int], budget: int, slots: int = SLOTS) -> frozenset[int]:
    """Choose the blocks that stay on the device.

    The others are spread so that about the same number of bytes is streamed for each block that
    computes: of blocks that take equally long, more of the larger ones stay. So the slowest link
    that keeps up is as slow as it can be.

    Args:
        sizes: bytes of each block, in the order in which they run.
        budget: bytes for the blocks that stay and for the slots, each as large as the largest
            streamed block.
        slots: at least 1.

    Returns:
        Indices into `sizes`; all of them if they fit, and then there are no slots.

    Raises:
        ValueError: a budget below `least_bytes`.
    """
    if sum(sizes) <= budget:
        return frozenset(range(len(sizes)))
    needed = least_bytes(sizes, slots)
    if budget < needed:
        raise ValueError(
            f"{len(sizes)} blocks and {slots} slots need {needed} bytes; the budget is {budget}."
        )
    found: list[frozenset[int]] = []
    for step in range(1, RATES + 1):
        streamed = _fitting(sizes, budget, slots, max(sizes) * step / RATES)
        if found and _total(sizes, streamed) != _total(sizes, found[0]):
            break
        if streamed:
            found.append(streamed)
    # the lowest rate that streams so much does it late, the highest early
    return frozenset(range(len(sizes))) - found[len(found) // 2]


def _fitting(sizes: Sequence[int], budget: int, slots: int, rate: float) -> frozenset[int]:
    """Indices of blocks to stream at a rate; none if the others do not fit the budget."""
    # the largest slots first: with them, any block may be streamed
    for largest in sorted(set(sizes), reverse=True):
        streamed = _spread(sizes, largest, rate)
        slot_bytes = max((sizes[index] for index in streamed), default=0)
        if sum(sizes) - _total(sizes, streamed) + slots * slot_bytes <= budget:
            return streamed
    return frozenset()


def _total(sizes: Sequence[int], indices: frozenset[int]) -> int:
    return sum(sizes[index] for index in indices)


def _fixed_bytes(sizes: Sequence[int], slots: int, largest: int) -> int:
    """Bytes of slots for blocks up to a size, and of all blocks beyond it."""
    return slots * largest + sum(size for size in sizes if size > largest)


def _spread(sizes: Sequence[int], largest: int, rate: float) -> frozenset[int]:
    """Indices of blocks, none above `largest`, that together come to `rate` bytes a block."""
    streamed, owed = set(), 0.0
    for index, size in enumerate(sizes):
        owed += rate
        if size <= largest and owed >= size / 2:
            streamed.add(index)
            owed -= size
        owed = min(owed, largest)  # what could not be streamed is not made up for at once
    return frozenset(streamed)


def simulate(
    sizes: Sequence[int],
    compute_s: Sequence[float],
    resident: frozenset[int],
    link_bytes_per_s: float,
    slots: int = SLOTS,
    *,
    passes: int = 1,
) -> Simulation:
    """Play forward passes with streamed blocks.

    The copies for the first blocks of a pass run while the last blocks of the pass before compute.
    The first pass has nothing to hide them behind.

    Args:
        sizes: bytes of each block.
        compute_s: seconds of each block.
        resident: indices of the blocks that are not streamed.
        link_bytes_per_s: of one copy from host memory to the device.
        slots: at least 1.
        passes: forward passes in a row.

    Returns:
        Seconds, stall and bytes of all passes together.
    """
    streamed = [index for index in range(len(sizes)) if index not in resident] * passes
    slot_is_free = [0.0] * slots
    arrived: list[float] = []
    link_is_free = clock = stall = 0.0

    def copy_next() -> None:
        nonlocal link_is_free
        number = len(arrived)
        start = max(link_is_free, slot_is_free[number % slots])
        link_is_free = start + sizes[streamed[number]] / link_bytes_per_s
        arrived.append(link_is_free)

    used = 0
    for _ in range(min(slots, len(streamed))):
        copy_next()
    for index in list(range(len(sizes))) * passes:
        if index not in resident:
            stall += max(0.0, arrived[used] - clock)
            clock = max(clock, arrived[used])
        clock += compute_s[index]
        if index not in resident:
            slot_is_free[used % slots] = clock
            used += 1
            if len(arrived) < len(streamed):
                copy_next()
    return Simulation(clock, stall, sum(sizes[index] for index in streamed))


# --- the stream ---------------------------------------------------------------------------------


class Copies(Protocol):
    """How bytes of the host come into slots, and what waits for what."""

    runs_beside: bool
    """Whether a copy runs beside the computation; if not, more than one slot is of no use."""

    def stage(self) -> int:
        """Copy what is not page-locked through a ring of buffers that are.

        Returns:
            Bytes of the ring; 0 if none can be had, and then a copy makes its thread wait.
        """
        ...

    def bring(self, slot: int, pairs: Pairs) -> None:
        """Queue copies into a slot, after the block that used it last.

        Args:
            slot: its number.
            pairs: targets on the device and sources on the host, both [num_bytes] uint8.
        """
        ...

    def wait_for(self, slot: int) -> None:
        """Let what is computed from now on wait for the copies into a slot."""
        ...

    def mark_used(self, slot: int) -> None:
        """Let copies into a slot from now on wait for what was computed until now."""
        ...

    def hold(self, slot: int) -> None:
        """Let the host wait until what used a slot, up to `mark_used`, is computed."""
        ...

    def close(self) -> None:
        """Wait for all copies, so that sources and slots may be released."""
        ...


class CopiesInOrder:
    """On devices without a copy stream: copies and computation are done one after the other."""

    runs_beside = False

    def stage(self) -> int:
        """There is no ring."""
        return 0

    def bring(self, slot: int, pairs: Pairs) -> None:
        """Copy."""
        for target, source in pairs:
            target.copy_(source, non_blocking=True)

    def wait_for(self, slot: int) -> None:
        """What is queued later comes later."""

    def mark_used(self, slot: int) -> None:
        """What is queued later comes later."""

    def hold(self, slot: int) -> None:
        """The host waits for each copy already, or there is nothing to run ahead of."""

    def close(self) -> None:
        """What is queued later comes later."""


class CudaCopies:
    """Copies on a CUDA stream of their own."""

    runs_beside = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._arrived: defaultdict[int, torch.cuda.Event] = defaultdict(torch.cuda.Event)
        # a host that waits for one leaves its core to others
        self._used: defaultdict[int, torch.cuda.Event] = defaultdict(_blocking_event)
        self._ring: list[tuple[Tensor, torch.cuda.Event]] = []

    def stage(self) -> int:
        """Allocate the ring, as large as can be page-locked."""
        for num_bytes in RING_BYTES:
            try:
                buffers = [page_locked(num_bytes) for _ in range(2)]
            except RuntimeError:
                continue  # a smaller one
            self._ring = [(buffer, _blocking_event()) for buffer in buffers]
            return 2 * num_bytes
        return 0

    def bring(self, slot: int, pairs: Pairs) -> None:
        """Queue copies on the copy stream."""
        self._stream.wait_event(self._used[slot])
        with torch.cuda.stream(self._stream):
            for target, source in pairs:
                if self._ring and not source.is_pinned():
                    self._stage(target, source)
                else:
                    self._copy(target, source)
            self._arrived[slot].record(self._stream)

    def _copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def _stage(self, target: Tensor, source: Tensor) -> None:
        num_bytes = len(self._ring[0][0])
        for start in range(0, len(source), num_bytes):
            part = source[start : start + num_bytes]
            buffer, is_free = self._ring[0]
            is_free.synchronize()  # this thread is not the one that launches the blocks
            staged = buffer[: len(part)].copy_(part)
            self._copy(target[start : start + num_bytes], staged)
            is_free.record(self._stream)
            self._ring.reverse()

    def wait_for(self, slot: int) -> None:
        """Let the current stream wait."""
        torch.cuda.current_stream(self._device).wait_event(self._arrived[slot])

    def mark_used(self, slot: int) -> None:
        """Remember where the current stream is."""
        self._used[slot].record(torch.cuda.current_stream(self._device))

    def hold(self, slot: int) -> None:
        """Wait for an event of the computation."""
        self._used[slot].synchronize()

    def close(self) -> None:
        """Wait for the copy stream, on the host and on the current stream."""
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        self._stream.synchronize()


def _blocking_event() -> torch.cuda.Event:
    return torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]


def page_locked(num_bytes: int) -> Tensor:
    """[num_bytes] uint8 of new page-locked memory.

    Args:
        num_bytes: how many.

    Returns:
        Uninitialized.

    Raises:
        RuntimeError: torch cannot have it.
    """
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)


def open_copies(device: torch.device) -> Copies:
    """Copies to a device."""
    return CudaCopies(device) if device.type == "cuda" else CopiesInOrder()


def padded_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of a slot for some tensors."""
    return sum(-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors)


class _Brought(NamedTuple):
    """A block in one of the slots, or on its way there."""

    position: int
    slot: int
    queued: "Future[None] | None" = None


class BlockStream:
    """Brings blocks in the order in which they run, before they run.

    The first blocks of a forward pass are brought while the last ones of the pass before compute. A
    block that is not the next in order (evaluations may be skipped, or break off) is brought when
    it is called, and the order goes on from there. A block that is called several times in a row is
    brought once.

    The host launches one call of a streamed block while the one before it computes, and no more:
    whoever cancels would wait for all that is launched.

    Args:
        blocks: tensors of each streamed block, in the order in which these run; contiguous.
        slots: [num_bytes] uint8 on the device; each holds any of the blocks, see `padded_bytes`.
        copies: how bytes come there.
        sources: from `cut_sources`; without, bytes are read where the tensors lie.
        in_background: queue copies in a thread, because some make their thread wait.
    """

    def __init__(
        self,
        blocks: Sequence[Sequence[Tensor]],
        slots: Sequence[Tensor],
        copies: Copies,
        *,
        sources: Sources | None = None,
        in_background: bool = False,
    ) -> None:
        self._blocks = [[(tensor, tensor.data) for tensor in block] for block in blocks]
        self._copies = copies
        self._thread = ThreadPoolExecutor(1, "weights") if in_background else None
        # all views are made before the loop
        homes = [[home for _, home in block] for block in self._blocks]
        sources = sources or [[[_bytes_of(home)] for home in block] for block in homes]
        targets = [[_cut(slot, block) for slot in slots] for block in homes]
        self._views = [
            [_shaped(parts, block) for parts in of_slots]
            for of_slots, block in zip(targets, self._blocks, strict=True)
        ]
        self._pairs = [
            [_paired(parts, block) for parts in of_slots]
            for of_slots, block in zip(targets, sources, strict=True)
        ]
        for slot in range(len(slots)):  # its memory may be in use by what was queued before
            copies.mark_used(slot)
        self._free = deque(range(len(slots)))
        self._coming: deque[_Brought] = deque()
        self._following = 0
        self._here: _Brought | None = None
        self._num_slots, self._num_calls = len(slots), 0

    def start(self) -> None:
        """Bring the first blocks; whatever happens then, `close` comes last."""
        self._fill()

    def run(self, position: int, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function while the tensors of a block are on the device.

        The block keeps its slot until another one is called.

        Args:
            position: index of the block among the streamed ones.
            function: runs the block.
            *args: of the function.

        Returns:
            What the function returns.
        """
        slot = self._slot_of(position)
        block = self._blocks[position]
        try:
            for (tensor, _), view in zip(block, self._views[position][slot], strict=True):
                tensor.data = view
            result = function(*args)
        finally:
            for tensor, home in block:
                tensor.data = home
            self._copies.mark_used(slot)
        self._wait_for_call_before()
        return result

    def close(self) -> None:
        """Wait for all copies; nothing is brought any more."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
        self._copies.close()

    def _wait_for_call_before(self) -> None:
        """Let the host wait until the call before the last one is computed."""
        last, before = ((self._num_calls + number) % 2 for number in range(2))
        self._copies.mark_used(self._num_slots + last)  # numbers beyond the slots mark calls
        if self._num_calls:
            self._copies.hold(self._num_slots + before)
        self._num_calls += 1

    def _slot_of(self, position: int) -> int:
        """The slot that a block is in, for what is computed from now on."""
        if self._here is not None:
            if self._here.position == position:
                return self._here.slot
            self._free.append(self._here.slot)
            self._here = None
            self._fill()
        slot = self._arrived_in(position)
        self._here = _Brought(position, slot)
        return slot

    def _arrived_in(self, position: int) -> int:
        """The slot of a block that comes or is brought now, once the computation waits for it."""
        while self._coming and self._coming[0].position != position:
            self._free.append(self._next_slot())
        if not self._coming:
            self._following = position
            self._bring()
        slot = self._next_slot()
        self._copies.wait_for(slot)
        return slot

    def _next_slot(self) -> int:
        """Of the block that comes next, once its copies are queued."""
        _, slot, queued = self._coming.popleft()
        if queued is not None:
            queued.result()
        return slot

    def _fill(self) -> None:
        while self._free:
            self._bring()

    def _bring(self) -> None:
        """Queue the copies of the block that follows."""
        position, slot = self._following, self._free.popleft()
        pairs = self._pairs[position][slot]
        queued = None
        if self._thread is None:
            self._copies.bring(slot, pairs)
        else:
            queued = self._thread.submit(self._bring_in_background, slot, pairs)
        self._coming.append(_Brought(position, slot, queued))
        self._following = (position + 1) % len(self._blocks)

    def _bring_in_background(self, slot: int, pairs: Pairs) -> None:
        with torch.inference_mode():  # the mode is the thread's; slots may be of that mode
            self._copies.bring(slot, pairs)


def cut_sources(blocks: Sequence[Sequence[Tensor]], locked: Sequence[Tensor]) -> Sources:
    """Where the bytes of blocks are read if some memory is page-locked.

    The ends of a tensor may lie in pages that are not locked because others have a part of them.
    CUDA copies from inside such a page or from outside, and never across.

    Args:
        blocks: tensors of each block, contiguous.
        locked: memory from `offload.whole_pages` of these tensors that is or may be page-locked.

    Returns:
        For each tensor of each block its bytes in parts, each [num_bytes] uint8.
    """
    pieces = sorted((memory.data_ptr(), memory.data_ptr() + memory.nbytes) for memory in locked)
    return [[_parts_of(_bytes_of(tensor.data), pieces) for tensor in block] for block in blocks]


def page_lock_ends(sources: Sources) -> None:
    """Copy the ends of tensors, less than a page each, to memory that is page-locked.

    Args:
        sources: from `cut_sources`; those parts are exchanged.

    Raises:
        RuntimeError: torch cannot have the memory; nothing is exchanged.
    """
    ends = [
        (parts, index)
        for block in sources
        for parts in block
        for index, part in enumerate(parts)
        if part.nbytes < PAGESIZE or (len(parts) == 1 and part.nbytes < 2 * PAGESIZE)
    ]
    sizes = [parts[index].nbytes for parts, index in ends]
    copies = torch.split(page_locked(sum(sizes)), sizes)
    for (parts, index), copy in zip(ends, copies, strict=True):
        parts[index] = copy.copy_(parts[index])


def _parts_of(memory: Tensor, pieces: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Cut [num_bytes] uint8 where pieces of memory, ordered by their addresses, start and end."""
    first = memory.data_ptr()
    last = first + memory.nbytes
    near = pieces[max(0, bisect_right(pieces, (first, 0)) - 1) : bisect_left(pieces, (last, 0))]
    cuts = {0, memory.nbytes}
    cuts |= {place - first for piece in near for place in piece if first < place < last}
    return [memory[start:end] for start, end in pairwise(sorted(cuts))]


def _paired(targets: Sequence[Tensor], sources: Sequence[list[Tensor]]) -> Pairs:
    """A part of a target for each part of a source."""
    pairs: list[tuple[Tensor, Tensor]] = []
    for target, parts in zip(targets, sources, strict=True):
        pairs += zip(torch.split(target, [len(part) for part in parts]), parts, strict=True)
    return pairs


def _bytes_of(tensor: Tensor) -> Tensor:
    """[num_bytes] uint8, the same memory."""
    return tensor.reshape(-1).view(torch.uint8)


def _cut(slot: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """A part of a slot for each tensor."""
    parts, start = [], 0
    for tensor in tensors:
        parts.append(slot[start : start + tensor.nbytes])
        start += padded_bytes([tensor])
    return parts


def _shaped(parts: Sequence[Tensor], block: Pairs) -> list[Tensor]:
    """Parts of a slot as tensors like those of a block."""
    return [
        part.view(home.dtype).view(home.shape) for part, (_, home) in zip(parts, block, strict=True)
    ]
