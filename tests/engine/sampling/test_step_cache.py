"""Skipped steps: which, in which branches, what is put in their place, and what it costs."""

import logging
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from comfyui_skyreels.skyreels.conditioning.latents import ImageConditioning
from comfyui_skyreels.skyreels.config import Guidance, TransformerConfig
from comfyui_skyreels.skyreels.errors import OptionError
from comfyui_skyreels.skyreels.runtime import TorchRuntime
from comfyui_skyreels.skyreels.runtime.collectives import Peers
from comfyui_skyreels.skyreels.sampling.guidance import combine
from comfyui_skyreels.skyreels.sampling.sample import initial_noise, run_bytes, sample
from comfyui_skyreels.skyreels.sampling.settings import SamplingSettings, euler, get_sigmas
from comfyui_skyreels.skyreels.sampling.step_cache import (
    CACHES,
    OFF,
    CacheConfig,
    EasyCache,
    FirstBlockCache,
    cache_bytes,
    is_protected,
    protected_start,
    start_cache,
)
from comfyui_skyreels.skyreels.transformer.layers import DoubleBlock, SingleBlock
from comfyui_skyreels.skyreels.transformer.model import call
from support import tiny
from support.tiny import embeds

RUNTIME = TorchRuntime()
STEPS = 20
CONFIG = replace(tiny.TRANSFORMER, num_layers=1, num_refiner_layers=1)
PROTECTED = {0, 1, 2, 19}  # of 20 steps
#: with these most steps that may be skipped are, in the model of random weights below
MOST = {"easy": CacheConfig("easy", 1.0), "first-block": CacheConfig("first-block", 1.0)}
#: with these some are
SOME = {"easy": CacheConfig("easy", 0.1), "first-block": CacheConfig("first-block", 0.3)}


PROMPT, NEGATIVE = embeds(7, 1), embeds(4, 2)
IMAGE = ImageConditioning(
    torch.randn(1, 16, 1, 4, 6, generator=torch.Generator().manual_seed(2)), 48, 32, 9
)


@pytest.fixture(scope="module")
def model():
    """Random weights whose predictions change as little from step to step as trained ones."""
    model = tiny.transformer(CONFIG)
    model.final_layer.linear.weight.data *= 0.05
    return model


@pytest.fixture
def block_runs(model):
    """How often each block ran, counted by hooks."""
    runs = [0] * len(model.blocks)

    def counter(index):
        def count(*_):
            runs[index] += 1

        return count

    hooks = [b.register_forward_hook(counter(i)) for i, b in enumerate(model.blocks)]
    yield runs
    for hook in hooks:
        hook.remove()


@pytest.fixture
def skipped(caplog):
    """Steps that the last run said it skipped, counted from 0; None if it said nothing."""
    caplog.set_level(logging.INFO)

    def read() -> list[int] | None:
        said = [r for r in caplog.records if r.name.endswith(".step_cache")]
        if not said:
            return None
        steps = said[-1].getMessage().rstrip(".").split(": ")[1]
        return [] if steps == "none" else [int(step) - 1 for step in steps.split(", ")]

    return read


def run(model, negative=NEGATIVE, runtime=RUNTIME, **settings):
    settings = SamplingSettings(**{"sigmas": get_sigmas(STEPS), **settings})
    return sample(model, IMAGE, PROMPT, negative, settings, runtime=runtime)


# --- the plan of a run --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_steps", "first", "last"),
    [(1, 1, 1), (2, 1, 1), (4, 1, 1), (10, 2, 1), (20, 3, 1), (30, 5, 2), (100, 15, 5)],
)
def test_the_first_and_last_steps_are_protected(num_steps, first, last):
    expected = [s < first or s >= num_steps - last for s in range(num_steps)]
    assert [is_protected(s, num_steps) for s in range(num_steps)] == expected
    assert protected_start(num_steps) == first


@pytest.mark.parametrize("threshold", [-0.1, 1.5, math.nan, math.inf])
def test_a_threshold_out_of_range_is_refused(threshold):
    with pytest.raises(OptionError, match=r"is not within 0\.\.1: use"):
        CacheConfig("easy", threshold)


def test_an_unknown_cache_is_refused():
    with pytest.raises(OptionError, match="'teacache' is not one of off, easy, first-block"):
        CacheConfig("teacache", 0.1)


@pytest.mark.parametrize("config", MOST.values(), ids=MOST)
def test_a_cache_is_refused_with_another_solver(model, config):
    with pytest.raises(OptionError, match="needs the Euler solver.*set the cache to off"):
        run(model, cache=config, solver=lambda *args: euler(*args))


def test_nothing_is_cached_unless_asked_for(model, block_runs, skipped):
    assert CACHES["off"] == OFF == CacheConfig()
    run(model)
    assert block_runs == [2 * STEPS] * len(model.blocks)
    assert skipped() is None


@torch.inference_mode()
def test_off_gives_the_bits_of_a_loop_without_any_cache(model):
    sigmas, guidance = get_sigmas(4), Guidance()
    latents = initial_noise(0, 9, 32, 48)

    def predict(text, sigma):
        return model(
            torch.cat([latents, IMAGE.padded()], dim=1), (sigma * 1000)[None],
            text.prompt_embeds, text.pooled_prompt_embeds, torch.tensor([1000.0]),
        )  # fmt: skip

    for sigma, sigma_next in pairwise(sigmas):
        v = combine(predict(PROMPT, sigma), predict(NEGATIVE, sigma), guidance)
        latents = latents + (sigma_next - sigma) * v
    assert torch.equal(run(model, sigmas=sigmas), latents / 0.476986)


# --- EasyCache on scripted inputs ---------------------------------------------------------------


def scripted(cache, inputs, branches=2):
    """Outputs of both branches, and which of them were computed, for inputs 100, 101 ..."""
    outputs, computed = [], []
    for step, value in enumerate(inputs):
        latents = torch.full((1, 16, 1, 2, 2), float(value))
        cache.begin(step, latents, range(branches))
        for branch in range(branches):

            def forward(run_block, latents=latents, branch=branch, step=step):
                computed.append((step, branch))
                return 3 * latents + 1000 * branch

            outputs.append(cache.predict(branch, forward)[0, 0, 0, 0, 0].item())
    return outputs, computed


def test_easy_cache_skips_until_the_expected_change_reaches_the_threshold():
    # the output is three times the input, so its change is that of the input: after the step of
    # input 102 that is 1/102 and 2/102, below 0.025, then 3/102, above it; and so on
    cache = EasyCache(STEPS, call, 0.025)
    outputs, computed = scripted(cache, range(100, 100 + STEPS))
    assert cache.skipped == [3, 4, 6, 7, 9, 10, 12, 13, 15, 16, 18]
    assert {step for step, _ in computed} == set(range(STEPS)) - set(cache.skipped)
    # output = input + (output - input of the last computed step)
    assert outputs[2 * 4] == 104 + (3 * 102 - 102)
    assert outputs[2 * 4 + 1] == 104 + (3 * 102 + 1000 - 102)
    assert outputs[2 * 5] == 3 * 105


#: what is skipped of 20 steps however little they change: three in a row, then one is computed
MOST_SKIPPED = [3, 4, 5, 7, 8, 9, 11, 12, 13, 15, 16, 17]


@pytest.mark.parametrize(
    ("threshold", "skipped"), [(0.0, []), (1e-6, []), (1.0, MOST_SKIPPED)], ids=str
)
def test_easy_cache_at_the_ends_of_its_range(threshold, skipped):
    cache = EasyCache(STEPS, call, threshold)
    scripted(cache, range(100, 100 + STEPS))
    assert cache.skipped == skipped


def test_steps_that_are_always_computed_are_and_those_around_them_are_not():
    cache = EasyCache(STEPS, call, 1.0, always={4, 8})
    _, computed = scripted(cache, range(100, 100 + STEPS))
    assert cache.skipped == [3, 5, 6, 7, 9, 10, 11, 13, 14, 15, 17, 18]
    assert {(step, branch) for step in (4, 8) for branch in (0, 1)} <= set(computed)


def test_easy_cache_computes_when_the_input_leaps():
    inputs = [*range(100, 110), *range(1000, 1010)]
    cache = EasyCache(STEPS, call, 0.1)
    scripted(cache, inputs)
    assert {8, 9} <= set(cache.skipped)
    assert 10 not in cache.skipped
    assert 11 in cache.skipped


def test_easy_cache_computes_when_nothing_is_known_of_the_change():
    still = EasyCache(STEPS, call, 1.0)  # no input change, so no rate: 0 / 0
    scripted(still, [5] * STEPS)
    assert still.skipped == []
    resumed = EasyCache(STEPS, call, 1.0)
    for step in (10, 11, 12):  # the first two computed steps give the rate
        resumed.begin(step, torch.full((1,), 100.0 + step), [0])
        resumed.predict(0, lambda _, s=step: torch.full((1,), 300.0 + s))
    assert resumed.skipped == [12]


def test_a_step_is_computed_if_a_branch_it_needs_was_not_there_before():
    latents = torch.full((1, 16, 1, 2, 2), 108.0)
    cache = EasyCache(STEPS, call, 1.0)
    scripted(cache, range(100, 108), branches=1)
    assert cache.skips
    cache.begin(8, latents, [0, 1])
    assert not cache.skips


@torch.inference_mode()
@pytest.mark.parametrize("name", MOST)
def test_a_negative_branch_older_than_the_positive_is_not_used(model, name):
    cache = start_cache(MOST[name], STEPS, call, model.blocks)
    inputs = tiny.inputs(CONFIG)
    states = inputs.pop("hidden_states")
    # step 2 is protected: computed, and of the positive branch alone
    for step, branches in ((0, 2), (1, 2), (2, 1), (3, 2), (4, 2)):
        given = states + 0.01 * step
        cache.begin(step, given[:, :16], range(branches))
        for branch in range(branches):
            cache.predict(branch, lambda rb, given=given: model(given, **inputs, run_block=rb))
    assert cache.skipped == [4]


# --- in the model -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOME)
def test_both_branches_skip_the_same_steps(model, name, skipped):
    lengths = []  # 18 image tokens, then the prompt's 7 or the negative one's 4

    def note(_, args, __):
        lengths.append(args[0].shape[1])

    hook = model.blocks[-1].register_forward_hook(note)
    try:
        run(model, cache=SOME[name])
    finally:
        hook.remove()
    steps = skipped()
    assert 0 < len(steps) < STEPS - len(PROTECTED)
    assert not PROTECTED & set(steps)
    assert lengths == [25, 22] * (STEPS - len(steps))


@pytest.mark.parametrize("name", MOST)
def test_skipped_steps_cost_no_block_or_the_first_alone(model, name, block_runs, skipped):
    run(model, cache=MOST[name])
    assert len(skipped()) >= 12
    whole = 2 * (STEPS - len(skipped()))
    assert block_runs[1:] == [whole] * (len(model.blocks) - 1)
    assert block_runs[0] == (whole if name == "easy" else 2 * STEPS)


@pytest.fixture(scope="module")
def uncached(model):
    return run(model)


@pytest.mark.parametrize("kind", MOST)
def test_a_threshold_of_zero_skips_nothing_and_changes_no_bit(model, uncached, kind, skipped):
    assert torch.equal(run(model, cache=CacheConfig(kind, 0.0)), uncached)
    assert skipped() == []


def first_block_cache(model, run_block=call):
    return FirstBlockCache(STEPS, run_block, 0.5, first=model.blocks[0], last=model.blocks[-1])


def spoiling(block, *args):
    """Run a block, then spoil the streams it was given, as one that works in place may."""
    result = block(*args)
    if isinstance(block, DoubleBlock | SingleBlock):
        for stream in args[: 2 if isinstance(block, DoubleBlock) else 1]:
            stream.fill_(math.nan)
    return result


@torch.inference_mode()
@pytest.mark.parametrize("run_block", [call, spoiling])
def test_first_block_cache_gives_a_step_again_where_nothing_has_changed(
    model, block_runs, run_block
):
    cache = first_block_cache(model, run_block)
    inputs = tiny.inputs(CONFIG)
    states = inputs.pop("hidden_states")
    texts = [inputs["encoder_hidden_states"], inputs["encoder_hidden_states"][:, :3]]
    outputs = []
    for step in (5, 6):
        cache.begin(step, states[:, :16], [0, 1])
        for branch, text in enumerate(texts):
            inputs["encoder_hidden_states"] = text.clone()
            outputs.append(
                cache.predict(branch, lambda rb: model(states.clone(), **inputs, run_block=rb))
            )
    assert cache.skipped == [6]
    assert block_runs == [4, 2, 2]
    for computed, skipped in zip(outputs[:2], outputs[2:], strict=True):
        assert tiny.relative_error(skipped, computed) <= 1e-5
    assert tiny.relative_error(outputs[1], outputs[0]) > 1e-2  # the branches are told apart


@torch.inference_mode()
@pytest.mark.parametrize("name", MOST)
@pytest.mark.parametrize(
    ("always", "skipped"), [((), [3, 4, 5, 7, 8]), ([5, 9], [3, 4, 6, 7, 8])], ids=str
)
def test_at_most_three_steps_in_a_row_are_skipped(model, name, always, skipped):
    cache = start_cache(MOST[name], STEPS, call, model.blocks, always)
    inputs = tiny.inputs(CONFIG)
    states = inputs.pop("hidden_states")
    for step in range(9):
        given = states + 0.001 * step
        cache.begin(step, given[:, :16], [0])
        cache.predict(0, lambda rb, given=given: model(given, **inputs, run_block=rb))
    assert cache.skipped == skipped


@torch.inference_mode()
def test_first_block_cache_decides_by_what_the_first_block_does(model):
    cache = first_block_cache(model)
    inputs = tiny.inputs(CONFIG)
    states = inputs.pop("hidden_states")
    nudged, other = states + 0.01 * torch.randn_like(states), torch.randn_like(states)
    for step, given in enumerate((states, nudged, other, other), 5):
        cache.begin(step, given[:, :16], [0])
        cache.predict(0, lambda rb, given=given: model(given, **inputs, run_block=rb))
    assert cache.skipped == [6, 8]


@pytest.mark.parametrize("name", MOST)
def test_the_step_in_which_guidance_begins_is_computed(model, name, skipped):
    run(model, cache=MOST[name], guidance=Guidance(cfg_start=0.5))
    assert {9, 11} <= set(skipped())
    assert 10 not in skipped()


@pytest.mark.parametrize("name", MOST)
def test_without_guidance_one_branch_is_cached(model, name, block_runs, skipped):
    run(model, cache=MOST[name], guidance=Guidance(1.0), negative=None)
    assert len(skipped()) >= 12
    assert block_runs[-1] == STEPS - len(skipped())


@pytest.mark.parametrize("name", SOME)
def test_every_step_is_reported_and_the_skipped_ones_are_said_once(model, name, caplog):
    caplog.set_level(logging.INFO)
    reports = []
    run(model, cache=SOME[name], runtime=TorchRuntime(on_progress=lambda *r: reports.append(r)))
    assert [r[:3] for r in reports] == [("sample", i, STEPS) for i in range(STEPS + 1)]
    assert all(r[3].isfinite().all() for r in reports[1:])
    said = [r.getMessage() for r in caplog.records if " skipped " in r.getMessage()]
    assert len(said) == 1
    assert f"of {STEPS} steps: " in said[0]


class StopError(Exception):
    pass


def stop_in(step: int, checks: int) -> TorchRuntime:
    """Cancels at a check, counted from the first of a step on."""
    reached, countdown = [0], iter(range(10_000))

    def progress(stage, done, total, preview=None) -> None:
        reached[0] = done

    def check() -> None:
        if reached[0] >= step and next(countdown) == checks:
            raise StopError

    return TorchRuntime(on_check=check, on_progress=progress)


@pytest.fixture(scope="module")
def undisturbed(model):
    """Latents of runs that nothing was cancelled before, by cache; without one, a short run."""
    cached = {config: run(model, cache=config) for config in SOME.values()}
    return {OFF: run(model, sigmas=get_sigmas(2)), **cached}


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize(("step", "checks"), [(1, 0), (2, 1), (3, 6), (12, 1), (19, 5)])
def test_a_cancelled_run_leaves_the_next_one_as_it_was(model, undisturbed, name, step, checks):
    with pytest.raises(StopError):
        run(model, cache=SOME[name], runtime=stop_in(step, checks))
    assert torch.equal(run(model, cache=SOME[name]), undisturbed[SOME[name]])
    assert torch.equal(run(model, sigmas=get_sigmas(2)), undisturbed[OFF])


@pytest.mark.parametrize("name", MOST)
def test_a_resumed_run_starts_its_cache_anew(model, name, tmp_path, skipped):
    file = tmp_path / "state"
    stop_at = 10

    def stop(stage, done, total, preview=None):
        if done == stop_at and preview is not None:
            raise StopError

    with pytest.raises(StopError):
        run(model, cache=MOST[name], resume=file, runtime=TorchRuntime(on_progress=stop))
    for other in (OFF, CacheConfig(MOST[name].kind, 0.5)):
        with pytest.raises(OptionError, match="other settings"):
            run(model, cache=other, resume=file)
    assert bool(run(model, cache=MOST[name], resume=file).isfinite().all())
    # the rate of change takes two computed steps, the first block's change one
    fresh = {"easy": 2, "first-block": 1}[name]
    assert skipped()[0] == stop_at + fresh


@pytest.mark.parametrize("guidance", [Guidance(), Guidance(1.0)])
@pytest.mark.parametrize("name", MOST)
def test_the_bytes_planned_for_a_cache_are_those_it_holds(model, name, guidance):
    negative = NEGATIVE if guidance.true_cfg_scale > 1 else None
    cache = start_cache(MOST[name], STEPS, call, model.blocks)
    inputs = tiny.inputs(CONFIG, grid=(3, 4, 6))
    states = inputs.pop("hidden_states")
    branches = 1 if negative is None else 2
    with torch.inference_mode():
        for step in (5, 6):
            cache.begin(step, states[:, :16].clone(), range(branches))
            for branch in range(branches):
                cache.predict(branch, lambda rb: model(states, **inputs, run_block=rb))
    held = {}
    for value in vars(cache).values():
        for tensor in value.values() if isinstance(value, dict) else [value]:
            if isinstance(tensor, torch.Tensor) and tensor.ndim:
                held[tensor.data_ptr()] = tensor.numel() * tensor.itemsize
    prompts = [PROMPT] if negative is None else [PROMPT, NEGATIVE]
    planned = run_bytes(model, IMAGE, prompts, SamplingSettings(cache=MOST[name]))["chunks"]
    planned -= run_bytes(model, IMAGE, prompts, SamplingSettings())["chunks"]
    assert 0.6 * planned <= sum(held.values()) <= planned


def test_at_full_size_the_caches_are_as_small_as_they_say():
    full = (TransformerConfig(), (1, 16, 25, 68, 120), 51_000, 2, torch.bfloat16)
    assert cache_bytes(OFF, *full) == 0
    assert cache_bytes(CACHES["easy"], *full) / 1e6 == pytest.approx(39.2, abs=0.1)
    assert cache_bytes(CACHES["first-block"], *full) / 1e6 == pytest.approx(675, abs=1)


@pytest.mark.parametrize("name", MOST)
def test_ranks_decide_together(model, skipped, monkeypatch, name):
    """What the others have counts, and what the first one decides."""

    class Others(Peers):
        def __init__(self, factor):
            self.factor = torch.tensor([factor, 1.0])

        def add_up(self, sums):
            assert sums.shape == (2,)
            return sums * self.factor

    run(model, cache=MOST[name])
    most = skipped()
    assert most
    if name == "first-block":
        monkeypatch.setattr("comfyui_skyreels.skyreels.sampling.sample.NOBODY", Others(1e9))
        run(model, cache=MOST[name])
        assert skipped() == []
    others = Others(1.0)
    others.agree = lambda decision: False
    monkeypatch.setattr("comfyui_skyreels.skyreels.sampling.sample.NOBODY", others)
    run(model, cache=MOST[name])
    assert skipped() == []
