"""What a clip takes on several cards, beside counted operations and bytes."""

import json
import logging
from dataclasses import replace
from functools import lru_cache
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from comfyui_skyreels.skyreels.config import TransformerConfig
from comfyui_skyreels.skyreels.plan import (
    Choice,
    Job,
    cards_table,
    modes,
    on_cards,
    plan_run,
    preflight,
    weights_as,
)
from comfyui_skyreels.skyreels.plan.predict import gemm_flop, given_bytes
from comfyui_skyreels.skyreels.plan.scaling import Layout, layouts, share
from comfyui_skyreels.skyreels.runtime import TorchRuntime
from comfyui_skyreels.skyreels.runtime.collectives import Ranks
from comfyui_skyreels.skyreels.sampling.planned import compare_ranks, start_run
from comfyui_skyreels.skyreels.transformer import rates
from comfyui_skyreels.skyreels.transformer.attention import sdpa
from comfyui_skyreels.skyreels.transformer.model import SkyReelsTransformer, call
from comfyui_skyreels.skyreels.transformer.sparse_attention import DenseRun
from comfyui_skyreels.skyreels.transformer.ulysses import UlyssesRun
from support import tiny
from support.cards import CARDS, card
from torch.utils.flop_counter import FlopCounterMode

CONFIG = TransformerConfig()
JOB = Job(text_tokens=60)
WEIGHTS = weights_as(CONFIG, "bf16", "auto")


@lru_cache
def counted(num_ranks):
    """FLOPs of a block's products and of its attention, and bytes that it sends, on one rank.

    The model's full size on shape-only tensors, in fp32, whose products the counter knows all.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    tokens = JOB.tokens - JOB.text_tokens
    with torch.device("meta"):
        model = SkyReelsTransformer(replace(CONFIG, num_layers=1, num_single_layers=1))
        rope = torch.empty(tokens, 64, dtype=torch.complex64)
        latents = torch.empty(1, 32, *JOB.latent_shape[2:])
        texts = (torch.empty(1), torch.empty(1, JOB.text_tokens, 4096), torch.empty(1, 768))
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_ranks)
    try:
        run = UlyssesRun(
            DenseRun(sdpa), tokens, CONFIG.num_attention_heads, blocks=model.blocks,
            device=torch.device("meta"),
        )  # fmt: skip
        options = {"attention": run, "run_block": run.around(call)}
        with (
            pytest.MonkeyPatch.context() as patch,
            FlopCounterMode(display=False) as flops,
            torch.no_grad(),
        ):
            patch.setattr(dist, "all_to_all_single", lambda *_, **__: None)  # torch 2.5: no shapes
            conditioning = model.condition(*texts, **options)
            model.denoise_together(
                latents, [conditioning], rope=rope, order=run.order, **options,
                gather=lambda patches: patches.new_empty(1, tokens, patches.shape[2]),
            )  # fmt: skip
    finally:
        dist.destroy_process_group()
    counts = flops.get_flop_counts()
    assert counts["DoubleBlock"] == counts["SingleBlock"]
    products = counts["DoubleBlock"]
    attention = sum(n for operator, n in products.items() if operator != torch.ops.aten.addmm)
    return products[torch.ops.aten.addmm], attention, run.num_bytes / len(model.blocks)


@pytest.mark.parametrize("num_ranks", [2, 3, 8])
def test_operations_and_bytes_of_a_rank_are_those_that_are_counted(num_ranks):
    job = replace(JOB, num_ranks=num_ranks)
    products, attention, sent = counted(num_ranks)
    assert gemm_flop(job) == products
    assert 4 * job.tokens**2 * CONFIG.hidden_size / num_ranks == attention
    wide = weights_as(CONFIG, "fp32", "auto")  # what a rank sends to itself is no traffic
    assert given_bytes(job, wide) == sent * (num_ranks - 1) / num_ranks


def test_a_card_of_several_takes_its_share_and_what_goes_between_them():
    machine = replace(card("H100", 80), corrections={"GEMM bf16, attention exact": 1.2})
    alone, pair, ranks, both = (
        share(machine, JOB, WEIGHTS, layout)
        for layout in (Layout(), Layout(branches=2), Layout(ranks=4), Layout(2, 4))
    )
    plan = plan_run(machine, JOB, WEIGHTS)
    assert alone.step_s == alone.compute_s == plan.seconds["step"]
    assert (alone.total_s, alone.given_bytes) == (plan.seconds["total"], 0)
    assert pair.compute_s == pytest.approx(alone.compute_s / 2)
    assert pair.given_bytes == 4 * 16 * 25 * 68 * 120
    # the text is on every card
    assert 1.0 < ranks.compute_s / (alone.compute_s / 4) < 1.01
    assert both.compute_s == pytest.approx(ranks.compute_s / 2)
    moved = 2 * 60 * given_bytes(replace(JOB, num_ranks=4), WEIGHTS)
    assert ranks.given_bytes == moved == pytest.approx(2 * 60 * 0.75 * 315e6, rel=0.05)
    assert ranks.exchange_s == pytest.approx(moved / 360e9)
    assert both.exchange_s == pytest.approx(moved / 2 / 360e9 + 2 * pair.given_bytes / 360e9)
    found = (alone, pair, ranks, both)
    assert [each.weight_bytes // WEIGHTS.loop for each in found] == [1, 2, 4, 8]
    for each in found:
        assert each.decode_s == pytest.approx(alone.decode_s / each.layout.cards, rel=0.07)
        assert each.total_s == pytest.approx(30 * each.step_s + each.decode_s)


def test_what_eight_cards_exchange_in_a_forward_pass():
    eight = share(card("H100", 80), JOB, WEIGHTS, Layout(ranks=8))
    assert eight.given_bytes / 2 == pytest.approx(8.3e9, rel=0.01)


def test_the_ways_to_share_are_those_that_can_be_started():
    assert [str(layout) for layout in layouts(8, 24)] == [
        "one card", "two cards, a branch each", "3 ranks", "two times 2 ranks",
        "two times 3 ranks", "two times 4 ranks",
    ]  # fmt: skip
    assert [layout.cards for layout in layouts(8, 24, is_guided=False)] == [1, 2, 3, 4, 6, 8]
    assert layouts(1, 24) == [Layout()]
    assert [layout.cards for layout in layouts(16, 24)][-1] == 8


def test_a_link_between_cards_that_is_too_slow_is_said():
    machine = replace(card("H100", 80), num_cards=4)
    slow = replace(machine, rates={**machine.rates, "peer": 0.5e9})
    fast_lines, slow_lines = (cards_table(on_cards(m, JOB, WEIGHTS)) for m in (machine, slow))
    assert len(fast_lines) == len(slow_lines) == 5
    assert not any("does not pay" in line for line in fast_lines)
    assert [line.split()[0] for line in slow_lines if "does not pay" in line] == ["3", "4"]
    assert "two cards, a branch each" in slow_lines[2] and "does not" not in slow_lines[2]


def test_ways_that_fit_no_card_are_marked():
    machine = replace(card("RTX 4090", 16), num_cards=2)
    assert all(each.fits for each in on_cards(machine, JOB, WEIGHTS))
    found = on_cards(machine, JOB, WEIGHTS, Choice(is_resident=True))
    assert [each.fits for each in found] == [False] * 2
    assert all("does not fit" in line for line in cards_table(found)[1:])


def test_several_cards_are_compared_where_there_are_several_and_their_link_is_known():
    machine = card("H100", 80)
    assert on_cards(machine, JOB, WEIGHTS) == [] == cards_table([])
    several = replace(machine, num_cards=2)
    unknown = {name: rate for name, rate in several.rates.items() if name != "peer"}
    assert on_cards(replace(several, rates=unknown), JOB, WEIGHTS) == []
    assert [each.layout.cards for each in on_cards(several, JOB, WEIGHTS)] == [1, 2]


def test_the_preflight_of_a_machine_with_several_cards_compares_them(monkeypatch):
    asked = []

    def machine_of(runtime, names, **_):
        asked.extend(names)
        return replace(card("H100", 80), num_cards=2)

    monkeypatch.setattr(modes, "machine_of", machine_of)
    found = preflight(TorchRuntime(), JOB, "bf16")
    assert "peer" in asked
    assert "two cards, a branch each" in found.text
    told = json.loads(json.dumps(found.to_json()))["cards"]
    assert [each["layout"] for each in told] == [
        {"branches": 1, "ranks": 1}, {"branches": 2, "ranks": 1},
    ]  # fmt: skip
    assert told[0]["step_s"] == found.chosen.seconds["step"]


@pytest.mark.parametrize("name", CARDS)
def test_every_card_has_a_rate_between_cards(name):
    assert set(CARDS[name][1]) == set(rates.NAMES)


def test_a_copy_to_the_next_card_is_what_is_measured(monkeypatch):
    made, size = [], rates._ON_GPU.copied_bytes
    monkeypatch.setattr(rates.torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(
        rates.torch, "ones", lambda *_, device, **__: made.append(device) or torch.zeros(4)
    )
    monkeypatch.setattr(
        rates.torch, "empty_like", lambda *_, device: made.append(device) or torch.zeros(4)
    )
    for index, other in ((0, 1), (2, 0)):
        _, amount = rates._copy_to_peer(torch.device("cuda", index), size)
        assert amount == size
        assert made[-2:] == [torch.device("cuda", index), torch.device("cuda", other)]
    assert rates._work("peer", torch.device("cpu"), rates._ELSEWHERE) is None


@pytest.fixture
def run():
    model = tiny.transformer()
    job = Job(
        width=64, height=64, num_frames=5, num_steps=4, num_guided=4, config=model.config, vae=None
    )
    needed = dict.fromkeys(("whole", "chunks", "head groups"), 0)
    return start_run(model, replace(job, num_ranks=2), needed, TorchRuntime(), "exact")


@pytest.mark.parametrize(
    ("machine_rates", "words", "levels"),
    [
        ({}, "2 ranks share each prediction.", [logging.INFO]),
        ({"peer": 1e12}, "2 ranks share each prediction, about", [logging.INFO]),
        ({"peer": 1e3}, "one device would take no longer", [logging.INFO, logging.WARNING]),
    ],
)
def test_ranks_say_whether_they_pay(run, caplog, machine_rates, words, levels):
    known = {"GEMM fp32": 1e6, "attention exact": 1e6, "memory": 1e12}
    run.machine = replace(run.machine, rates=known | machine_rates)
    run.plan = plan_run(run.machine, run.job, run.weights, activations=run.needed)
    caplog.set_level(logging.INFO, "skyreels.sampling.planned")
    group = SimpleNamespace(size=lambda: 2)
    compare_ranks(run, Ranks(group, group), replace(run.job, num_ranks=1))
    assert words in caplog.text
    assert [record.levelno for record in caplog.records] == levels


def test_a_share_of_the_work_teaches_nothing_of_the_whole(run, tmp_path):
    run.runtime.state_folder = tmp_path
    run.plan = replace(run.plan, seconds={"step": 1.0, "stall": 0.0})
    for ranks, is_taught in ((Ranks(None, None), False), (None, True)):
        run.runtime.ranks = ranks
        run.marks.seconds = lambda: [1.1] * 4
        run.finish(is_alike=True)
        assert bool(list(tmp_path.iterdir())) == is_taught
