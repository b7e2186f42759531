"""One forward pass on several ranks: the result of one, the bytes of the model of its cost."""

import pytest
from comfyui_skyreels.skyreels.errors import OptionError
from comfyui_skyreels.skyreels.plan import Job
from comfyui_skyreels.skyreels.runtime.collectives import shares
from comfyui_skyreels.skyreels.transformer.ulysses import check_ranks, exchanged_bytes
from support.ranks import rows_of


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_several_ranks_predict_what_one_does(num_ranks):
    *rows, easy, first_block = rows_of(num_ranks, "predictions")
    for run in (easy, first_block):
        assert run["difference"] <= 1e-5  # six steps, guidance 6
        one, several = run["skipped"]
        assert one == several and run["run"] in one and "skipped 0" not in one
    assert len(rows) == 11 and any(row["sparse"] for row in rows)
    for row in rows:
        assert row["difference"] <= 1e-6, row
        assert row["ranks_agree"], row


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_bytes_exchanged_by_a_block_are_those_of_the_model(num_ranks):
    for row in rows_of(num_ranks, "predictions")[:-2]:
        assert row["bytes"] == row["expected"], row


def test_at_full_size_a_block_exchanges_four_tensors_over_the_ranks():
    job = Job()
    for num_ranks in (2, 3, 4, 6, 8):
        num_bytes = exchanged_bytes(job.tokens, job.text_tokens, 3072, 2, num_ranks)
        assert num_bytes == pytest.approx(4 * 315e6 / num_ranks, rel=0.05)


def test_shares_differ_by_one_at_most():
    for num_tokens in (0, 1, 7, 51_000):
        for num_ranks in (1, 2, 3, 8):
            found = shares(num_tokens, num_ranks)
            assert sum(found) == num_tokens and max(found) - min(found) <= 1


def test_heads_that_do_not_divide_are_refused_with_what_does():
    for num_ranks in (1, 2, 3, 4, 6, 8):
        check_ranks(num_ranks, 24)
    with pytest.raises(OptionError, match="5 ranks cannot share 24 heads.*use 2, 3, 4, 6, 8"):
        check_ranks(5, 24)
    with pytest.raises(OptionError, match="2 ranks cannot share 1 heads.*use 1"):
        check_ranks(2, 1)
