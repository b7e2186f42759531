"""Which blocks stay, what streaming the others costs, and the stream itself on stand-ins."""

from itertools import pairwise
from mmap import PAGESIZE

import pytest
import torch
from comfyui_skyreels.skyreels.runtime import streaming
from comfyui_skyreels.skyreels.runtime.offload import whole_pages
from comfyui_skyreels.skyreels.runtime.streaming import (
    BlockStream,
    CopiesInOrder,
    choose_resident,
    least_bytes,
    padded_bytes,
    simulate,
)
from support.streams import Machine, TimedCopies
from torch.utils._python_dispatch import TorchDispatchMode

#: bytes of the blocks of the full-size model without their modulation, 20 double and 40 single ones
BF16 = [453_000_000] * 20 + [226_500_000] * 40
FP8 = [size // 2 for size in BF16]
#: seconds of one block at 51,060 tokens; a double and a single one have the same work
H100_BF16, H100_8BIT, RTX4090_BF16, RTX4090_8BIT = 0.063, 2.9 / 60, 0.268, 0.110
#: operators of the checks below and of copies, which need no memory on the device
VIEWS = {"copy_", "detach", "eq", "all"}
#: model evaluations of a run
PASSES = 60


def stall(sizes, block_s, gb_per_s, resident=frozenset(), passes=PASSES, slots=2):
    """Share of the time of a run."""
    played = simulate(sizes, [block_s] * 60, resident, gb_per_s * 1e9, slots, passes=passes)
    return played.stall_s / (played.seconds - played.stall_s)


@pytest.mark.parametrize(
    ("block_s", "sizes", "slowest"),
    [
        (RTX4090_8BIT, FP8, 6),
        (RTX4090_8BIT, BF16, 6),
        (RTX4090_BF16, BF16, 6),
        (H100_8BIT, FP8, 6),
        (H100_BF16, FP8, 6),
        (H100_BF16, BF16, 12),
        (H100_8BIT, BF16, 12),
    ],
)
@pytest.mark.parametrize("gb_per_s", [25, 12, 6])
def test_streaming_every_block_costs_nothing_where_the_copies_are_faster(
    block_s, sizes, slowest, gb_per_s
):
    if gb_per_s >= slowest:
        assert stall(sizes, block_s, gb_per_s) <= 0.01
    else:
        assert stall(sizes, block_s, gb_per_s) > 0.01


@pytest.mark.parametrize("sizes", [FP8, BF16])
@pytest.mark.parametrize("block_s", [H100_BF16, H100_8BIT, RTX4090_BF16, RTX4090_8BIT])
@pytest.mark.parametrize("gb_per_s", [25, 12, 6, 3, 1])
def test_blocks_that_run_for_both_branches_at_once_halve_the_copies_and_stall_less(
    block_s, sizes, gb_per_s
):
    plain = simulate(sizes, [block_s] * 60, frozenset(), gb_per_s * 1e9, passes=PASSES)
    both = simulate(sizes, [2 * block_s] * 60, frozenset(), gb_per_s * 1e9, passes=PASSES // 2)
    assert 2 * both.copied_bytes == plain.copied_bytes
    for played in (plain, both):
        assert played.seconds - played.stall_s == pytest.approx(PASSES * 60 * block_s)
    if gb_per_s >= 6:
        assert both.stall_s <= 0.01 * PASSES * 60 * block_s
    if plain.stall_s > 0.01 * PASSES * 60 * block_s:
        assert both.stall_s < 0.5 * plain.stall_s
    else:
        assert both.stall_s <= plain.stall_s


def test_where_a_pass_computes_for_less_time_than_its_copies_take_the_link_sets_the_pace():
    played = simulate(BF16, [H100_8BIT] * 60, frozenset(), 6e9, 2, passes=PASSES)
    assert sum(BF16) / 6e9 > 60 * H100_8BIT
    assert played.copied_bytes == PASSES * sum(BF16)
    assert played.seconds >= played.copied_bytes / 6e9
    assert played.seconds == pytest.approx(PASSES * 60 * H100_8BIT + played.stall_s)


def test_large_blocks_that_stay_hide_the_copies_of_the_others_behind_a_slow_link():
    # all double blocks streamed in a row outrun 6 GB/s, though the pass as a whole does not
    assert sum(BF16) / 6e9 < 60 * H100_BF16
    resident = choose_resident(BF16, sum(BF16) // 2, 2)
    assert stall(BF16, H100_BF16, 6) > 0.03
    assert stall(BF16, H100_BF16, 6, resident) <= 0.01


@pytest.mark.parametrize("card_gb", [4.2, 7.5, 11.3])  # of weights, on cards of 8, 12 and 16 GB
@pytest.mark.parametrize("block_s", [RTX4090_BF16, RTX4090_8BIT, H100_BF16])
def test_what_a_small_card_streams_is_hidden(card_gb, block_s):
    resident = choose_resident(BF16, int(card_gb * 1e9), 2)
    assert stall(BF16, block_s, 12, resident) <= 0.01


def test_one_slot_hides_no_copy_and_two_hide_all_that_are_shorter_than_a_block():
    sizes, compute = [10] * 4, [1.0] * 4
    assert simulate(sizes, compute, frozenset(), 20.0, 1).stall_s == pytest.approx(4 * 0.5)
    assert simulate(sizes, compute, frozenset(), 20.0, 2).stall_s == pytest.approx(0.5)
    slow = simulate(sizes, compute, frozenset(), 8.0, 2, passes=3)
    assert slow.seconds == pytest.approx(12 * 10 / 8 + 1)


def test_the_copies_of_a_pass_begin_while_the_one_before_computes():
    once, twice = (
        simulate([10] * 4, [1.0] * 4, frozenset({1, 2, 3}), 10.0, 2, passes=passes)
        for passes in (1, 2)
    )
    assert (once.stall_s, once.seconds, once.copied_bytes) == (1.0, 5.0, 10)
    assert (twice.stall_s, twice.seconds, twice.copied_bytes) == (1.0, 9.0, 20)


def test_nothing_is_copied_if_every_block_stays():
    played = simulate(FP8, [1.0] * 60, frozenset(range(60)), 1e9, 2, passes=2)
    assert (played.seconds, played.stall_s, played.copied_bytes) == (120.0, 0.0, 0)


@pytest.mark.parametrize("sizes", [BF16, FP8, [5] * 7, [9, 1, 1, 1, 1, 9, 1, 3], [1]])
@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("share", [0, 0.1, 0.35, 0.7, 0.99])
def test_what_stays_and_the_slots_are_within_the_budget_and_use_it(sizes, slots, share):
    least = least_bytes(sizes, slots)
    budget = int(least + share * (sum(sizes) - least))
    resident = choose_resident(sizes, budget, slots)
    streamed = [size for index, size in enumerate(sizes) if index not in resident]
    taken = sum(sizes[index] for index in resident) + slots * max(streamed, default=0)
    assert taken <= budget
    assert budget - taken < 2 * max(sizes)


def test_everything_stays_if_it_fits_and_then_no_slot_is_kept_free():
    assert choose_resident([3, 4, 5], 12, 2) == {0, 1, 2}
    assert choose_resident([3, 4, 5], 11, 2) != {0, 1, 2}
    assert choose_resident([], 0, 2) == frozenset()


def test_a_block_too_large_for_two_slots_stays():
    assert choose_resident([10, 1, 1, 1], 12, 2) == {0}
    assert least_bytes([10, 1, 1, 1], 2) == 12


def test_too_small_a_budget_says_what_is_needed():
    with pytest.raises(ValueError, match="4 blocks and 2 slots need 12 bytes; the budget is 11"):
        choose_resident([10, 1, 1, 1], 11, 2)


@pytest.mark.parametrize("count", [3, 7, 15, 30, 45, 59])
def test_streamed_blocks_lie_as_far_apart_as_they_can(count):
    budget = (60 - count + 2) * 10
    streamed = sorted(set(range(60)) - choose_resident([10] * 60, budget, 2))
    assert len(streamed) == count
    around = [*streamed, streamed[0] + 60]  # the next forward pass follows
    gaps = [after - before for before, after in pairwise(around)]
    assert max(gaps) - min(gaps) <= 1


def test_as_many_bytes_are_streamed_among_double_blocks_as_among_single_ones():
    resident = choose_resident(BF16, sum(BF16) // 2, 2)
    streamed = [size * (index not in resident) for index, size in enumerate(BF16)]
    double, single = sum(streamed[:20]) / 20, sum(streamed[20:]) / 40
    assert double == pytest.approx(single, rel=0.1)


# --- the stream itself --------------------------------------------------------------------------


def make_blocks(sizes):
    """One tensor a block, filled with the number of the block."""
    return [[torch.full((size,), float(number))] for number, size in enumerate(sizes)]


def in_a_row(numbers, calls):
    """Each of them as often as both branches of guidance call it, or one."""
    return [number for number in numbers for _ in range(calls)]


@pytest.fixture
def machine(monkeypatch):
    return Machine(bytes_per_s=100.0).install(monkeypatch)


class Allocations(TorchDispatchMode):
    """Operators that make tensors with memory of their own."""

    def __init__(self):
        super().__init__()
        self.operators: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and func.overloadpacket.__name__ not in VIEWS:
            self.operators.add(func.overloadpacket.__name__)
        return result


class Streamed:
    """Blocks behind a stream; `play` runs some of them in a given order, as a model would."""

    def __init__(self, machine, sizes, slots=2, **options):
        self.machine, self.blocks = machine, make_blocks(sizes)
        size = max(map(padded_bytes, self.blocks))
        slots = [torch.empty(size, dtype=torch.uint8) for _ in range(slots)]
        self.homes = [block[0].data_ptr() for block in self.blocks]
        self.stream = BlockStream(self.blocks, slots, machine.open_copies(), **options)
        self.stream.start()

    def run(self, number, seconds=1.0):
        (tensor,) = self.blocks[number]
        assert tensor.data_ptr() != self.homes[number]
        assert bool((tensor == number).all())
        self.machine.compute_for(seconds, tensor)

    def play(self, order, seconds=1.0):
        for number in order:
            self.stream.run(number, self.run, number, seconds)

    def close(self):
        self.stream.close()
        assert [block[0].data_ptr() for block in self.blocks] == self.homes
        assert all(bool((block[0] == number).all()) for number, block in enumerate(self.blocks))


@pytest.mark.parametrize("sizes", [[128] * 6, [256, 256, 256, 128, 128, 128, 128], [128, 384] * 3])
@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("seconds", [0.5, 5.0, 12.0])
@pytest.mark.parametrize("calls", [1, 2])
def test_the_stream_takes_exactly_the_time_that_was_simulated(
    machine, sizes, slots, seconds, calls
):
    streamed = Streamed(machine, sizes, slots)
    streamed.play(in_a_row(range(len(sizes)), calls) * 3, seconds)
    num_bytes = [4 * size for size in sizes]
    expected = simulate(
        num_bytes, [calls * seconds] * len(sizes), frozenset(), 100.0, slots, passes=3
    )
    assert machine.compute.clock == pytest.approx(expected.seconds)
    assert machine.stall == pytest.approx(expected.stall_s)
    assert expected.copied_bytes <= sum(machine.copied) <= expected.copied_bytes + slots * 4 * 384
    streamed.close()


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_in_the_loop_nothing_is_allocated(machine, slots):
    streamed = Streamed(machine, [128] * 5, slots)
    streamed.play(range(5))
    with Allocations() as made:
        streamed.play([*range(5)] * 2)
    assert made.operators == set()
    streamed.close()
    assert machine.waits[-1] == "a stream"


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("calls", [1, 2])
def test_the_host_waits_for_no_call_but_the_one_before(machine, slots, calls):
    streamed = Streamed(machine, [128] * 5, slots)
    ended = []
    for number in in_a_row(range(5), calls) * 3:
        streamed.play([number], seconds=7.0)
        ended.append(machine.compute.clock)
    # so the call that was launched just now still computes when the next one is launched
    assert machine.waits == ended[:-1]
    streamed.close()


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize(
    "order",
    [
        [0, 1, 2, 3, 0, 1, 2, 3],
        [0, 0, 0, 1, 2, 3, 0, 1, 2, 3],  # a cache that runs the first block alone
        [0, 0, 1, 1, 2, 2, 3, 3, 0, 0, 1, 2, 3],  # both branches, then one
        [0, 0, 1, 1, 2, 0, 0, 1, 1, 2, 2, 3, 3],  # the second one broke off
        [0, 1, 2, 0, 1, 2, 3, 0],  # an evaluation that broke off
        [1, 2, 3, 1, 2, 3],
        [3, 2, 1, 0],
    ],
)
def test_blocks_are_brought_in_whatever_order_they_run(machine, order, slots, background):
    streamed = Streamed(machine, [128] * 4, slots, in_background=background)
    streamed.play(order)
    streamed.close()


def test_blocks_that_come_early_are_kept_over_evaluations_that_are_skipped(machine):
    streamed = Streamed(machine, [128] * 4)
    streamed.play(range(4))
    copied = sum(machine.copied)
    streamed.play(range(4))
    assert sum(machine.copied) - copied == 4 * 512
    streamed.close()


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_a_block_that_is_called_several_times_in_a_row_is_brought_once(machine, slots):
    streamed = Streamed(machine, [128] * 5, slots)
    streamed.play([0] * 7)
    assert machine.copied == [512] * slots
    streamed.play(in_a_row(range(5), 2) * 2)
    assert len(machine.copied) == slots + 9
    streamed.close()


def test_nothing_is_copied_into_memory_that_was_in_use_when_it_was_allocated(machine):
    block = [torch.ones(128)]
    slot = torch.empty(padded_bytes(block), dtype=torch.uint8)
    machine.compute_for(3.0, slot)
    stream = BlockStream([block], [slot], machine.open_copies())
    stream.start()
    stream.run(0, lambda: None)
    assert machine.compute.clock == pytest.approx(3.0 + 512 / 100)
    stream.close()


@pytest.mark.parametrize("background", [False, True])
def test_a_block_that_fails_leaves_the_weights_at_home_and_the_stream_usable(machine, background):
    streamed = Streamed(machine, [128] * 4, in_background=background)

    def fail():
        raise ZeroDivisionError

    streamed.play(range(2))
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            streamed.stream.run(2, fail)
        assert [block[0].data_ptr() for block in streamed.blocks] == streamed.homes
        streamed.play([2, 0, 1, 2, 3, 0])
    streamed.close()


def test_an_error_in_the_background_is_raised_where_the_block_is_needed(machine, monkeypatch):
    streamed = Streamed(machine, [128] * 4, in_background=True)
    streamed.play(range(2))

    def fail(self, target, source):
        raise RuntimeError("the link is down")

    monkeypatch.setattr(TimedCopies, "_copy", fail)
    with pytest.raises(RuntimeError, match="the link is down"):
        streamed.play([2, 3, 0, 1])
    streamed.stream.close()


def test_on_a_device_without_a_copy_stream_blocks_are_brought_in_order(machine, monkeypatch):
    monkeypatch.setattr(machine, "open_copies", CopiesInOrder)
    streamed = Streamed(machine, [128, 64, 32], slots=1)
    streamed.play([0, 1, 2] * 2)
    streamed.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8])
def test_a_block_has_tensors_of_any_dtype_and_shape(machine, dtype):
    numbers = torch.arange(-60, 60, dtype=torch.float32)
    block = [
        numbers.to(dtype).view(10, 12),
        torch.tensor(0.5),
        numbers[:7].double(),
        numbers.view(2, 60),
    ]
    expected = [tensor.clone() for tensor in block]
    slot = torch.full((padded_bytes(block),), 255, dtype=torch.uint8)
    stream = BlockStream([block], [slot], machine.open_copies())
    stream.start()

    def check():
        for tensor, right in zip(block, expected, strict=True):
            assert tensor.shape == right.shape
            assert tensor.untyped_storage().data_ptr() == slot.untyped_storage().data_ptr()
            assert torch.equal(tensor.view(torch.uint8) if tensor.ndim else tensor,
                               right.view(torch.uint8) if right.ndim else right)  # fmt: skip

    stream.run(0, check)
    stream.close()


# --- a ring of page-locked memory ---------------------------------------------------------------


@pytest.fixture
def lockable(monkeypatch):
    """How many bytes can be page-locked."""
    left = [0]

    def page_locked(num_bytes):
        if num_bytes > left[0]:
            raise RuntimeError("CUDA error: out of memory")
        left[0] -= num_bytes
        return torch.empty(num_bytes, dtype=torch.uint8)

    monkeypatch.setattr(streaming, "page_locked", page_locked)
    return left


@pytest.mark.parametrize(
    ("limit", "ring"), [(2**30, 2**26), (2**24, 2**24), (8_000_000, 2**22), (1000, 0)]
)
def test_the_ring_is_as_large_as_can_be_page_locked(machine, lockable, limit, ring):
    lockable[0] = limit
    assert machine.open_copies().stage() == ring


def test_ends_of_tensors_are_read_from_page_locked_copies(lockable):
    storage = torch.randint(256, (20 * PAGESIZE,), dtype=torch.uint8)
    page = PAGESIZE  # two that touch, a gap, one of whole pages and a bit
    pairs = [(5, 9), (9, 3 * page + 1), (4 * page, 8 * page), (9 * page + 8, 19 * page + 3)]
    blocks = [[storage[first:last] for first, last in pairs]]
    locked = whole_pages(blocks[0])
    sources = streaming.cut_sources(blocks, locked)
    lockable[0] = 4 * PAGESIZE
    streaming.page_lock_ends(sources)
    assert lockable[0] > PAGESIZE  # little was copied
    ranges = [(memory.data_ptr(), memory.data_ptr() + memory.nbytes) for memory in locked]
    in_place = range(storage.data_ptr(), storage.data_ptr() + storage.nbytes)
    for tensor, parts in zip(blocks[0], sources[0], strict=True):
        assert torch.equal(torch.cat(parts), tensor)
        for part in parts:
            first, last = part.data_ptr(), part.data_ptr() + part.nbytes
            assert first not in in_place or any(a <= first and last <= b for a, b in ranges)
    lockable[0] = 0
    with pytest.raises(RuntimeError, match="out of memory"):
        streaming.page_lock_ends(streaming.cut_sources(blocks, locked))


@pytest.mark.parametrize("size", [1, 255, 256, 257, 1000, 1024])
def test_what_is_not_page_locked_goes_through_the_ring(machine, lockable, monkeypatch, size):
    monkeypatch.setattr(streaming, "RING_BYTES", (1024,))
    lockable[0] = 2048
    copies = machine.open_copies()
    assert copies.stage() == 2048
    monkeypatch.setattr(machine, "open_copies", lambda: copies)
    streamed = Streamed(machine, [size] * 4, in_background=True)
    streamed.play([*range(4)] * 2)
    streamed.close()
    assert max(machine.copied) <= 1024
    assert len(machine.left) == 2  # one is filled while the other leaves
    # a piece waits until the last one but one has left; the host waits once a block, and at the end
    assert len(machine.waits) == len(machine.copied) + 7 + 1
