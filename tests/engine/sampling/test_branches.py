"""Ranks in two groups, one for each branch of guidance: the bits of one group."""

from types import SimpleNamespace

import pytest
import torch
from comfyui_skyreels.skyreels.conditioning.latents import ImageConditioning
from comfyui_skyreels.skyreels.config import Guidance
from comfyui_skyreels.skyreels.errors import OptionError
from comfyui_skyreels.skyreels.runtime import TorchRuntime
from comfyui_skyreels.skyreels.runtime.collectives import Ranks
from comfyui_skyreels.skyreels.sampling.sample import sample
from comfyui_skyreels.skyreels.sampling.settings import SamplingSettings, get_sigmas
from comfyui_skyreels.skyreels.sampling.step_cache import CACHES
from support import tiny
from support.ranks import RUNS, rows_of


@pytest.mark.parametrize(("num_ranks", "count"), [(2, len(RUNS) + 1), (4, 2)])
def test_two_groups_make_the_bits_of_one(num_ranks, count):
    *rows, _, _ = rows_of(num_ranks, "branches")
    assert len(rows) == count
    for row in rows:
        assert row["same"], row
        assert row["own"] and row["count"], row  # each group has predicted its own branch alone


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_run_of_ranks_continues_from_what_the_first_one_saved(num_ranks):
    row = rows_of(num_ranks, "branches")[-2]
    assert row["same"] and row["saved"] == ["0.safetensors"]


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_cards_of_different_memory_are_planned_for_the_least(num_ranks):
    row = rows_of(num_ranks, "branches")[-1]
    assert len(row["plans"]) == num_ranks and len(set(row["plans"])) == 1
    least = f"{10 - num_ranks}.0"
    assert f"of {least} GB free" in row["plans"][0]
    assert "activations chunks" in row["plans"][0]  # which the last one alone needs
    (warning,) = row["warnings"]
    assert warning.startswith(f"The ranks have {least} to 9.0 GB of free memory")


def test_memory_that_runs_out_ends_the_run_of_all_ranks():
    assert rows_of(2, "branches")[-1]["error"].startswith("Memory ran out in a step")


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_sparse_attention_that_not_all_have_is_refused_by_all(num_ranks):
    *others, last = rows_of(num_ranks, "branches")[-1]["refused"]
    assert all("(cpu: has one)" in said for said in others) and "(cpu: has none)" in last


def test_whether_a_clip_is_bad_the_first_rank_says():
    """Where each decided by itself, one would stop and the others wait for it."""
    assert rows_of(2, "branches")[-1]["looked"] == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"guidance": Guidance(true_cfg_scale=1.0)}, "two groups.*CFG 1.0"),
        ({"cache": CACHES["first-block"]}, "first-block decides in the midst"),
    ],
)
def test_what_two_groups_cannot_share_is_refused_before_anything_is_loaded(settings, words):
    group = SimpleNamespace(rank=lambda: 0, size=lambda: 2)
    runtime = TorchRuntime(ranks=Ranks(group, None, 0, group))
    image = ImageConditioning(torch.zeros(1, 16, 1, 16, 16), 128, 128, 9)
    with pytest.raises(OptionError, match=words):
        sample(
            tiny.transformer(), image, tiny.embeds(7, 1), tiny.embeds(4, 2),
            SamplingSettings(sigmas=get_sigmas(6), **settings), runtime=runtime,
        )  # fmt: skip
