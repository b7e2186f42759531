"""Which blocks stay on the device, and what it costs to stream the others.

Blocks run in a fixed order, forward pass after forward pass. Those that do not stay are copied into
slots, pieces of device memory that take turns: while one block computes, a copy stream brings the
next ones. A copy waits until the block that used its slot before is done, and a block waits for its
copy; nothing else waits. `simulate` plays this without a device, from sizes and times alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

#: two let one block arrive while another computes
SLOTS = 2
#: rates of copying that are tried when blocks are chosen
RATES = 256


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
