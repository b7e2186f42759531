"""Which blocks stay, and what streaming the others costs, from sizes and times alone."""

from itertools import pairwise

import pytest
from comfyui_skyreels.skyreels.streaming import choose_resident, least_bytes, simulate

#: bytes of the blocks of the full-size model without their modulation, 20 double and 40 single ones
BF16 = [453_000_000] * 20 + [226_500_000] * 40
FP8 = [size // 2 for size in BF16]
#: seconds of one block at 51,060 tokens; a double and a single one have the same work
H100_BF16, H100_8BIT, RTX4090_BF16, RTX4090_8BIT = 0.063, 2.9 / 60, 0.268, 0.110
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
