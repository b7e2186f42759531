"""Several prompts of one run: where each counts, what it costs, and that one alone is as before."""

import logging
from dataclasses import replace

import pytest
import torch
from comfyui_skyreels.skyreels.conditioning.latents import ImageConditioning
from comfyui_skyreels.skyreels.config import Guidance
from comfyui_skyreels.skyreels.errors import OptionError
from comfyui_skyreels.skyreels.runtime import TorchRuntime
from comfyui_skyreels.skyreels.sampling.guidance import guided_velocity
from comfyui_skyreels.skyreels.sampling.network import Network
from comfyui_skyreels.skyreels.sampling.precompute import precompute
from comfyui_skyreels.skyreels.sampling.prompts import (
    ScheduledPrompt,
    percent_to_sigma,
    weights_of_prompts,
)
from comfyui_skyreels.skyreels.sampling.sample import sample
from comfyui_skyreels.skyreels.sampling.settings import SamplingSettings, euler, get_sigmas
from comfyui_skyreels.skyreels.sampling.step_cache import CACHES, CacheConfig
from comfyui_skyreels.skyreels.transformer.attention import sdpa
from comfyui_skyreels.skyreels.transformer.layers import rope_table
from comfyui_skyreels.skyreels.transformer.model import call
from comfyui_skyreels.skyreels.transformer.sparse_attention import DenseRun
from support import tiny
from support.tiny import embeds

SIGMAS = get_sigmas(6)
CAT, DOG, BAD, NONE = embeds(7, 1), embeds(5, 2), embeds(4, 3), embeds(1, 4)
HALF = percent_to_sigma(0.4, 7.0)  # between two sigmas


@pytest.fixture(scope="module")
def model():
    return tiny.transformer()


@pytest.fixture(scope="module")
def conditioning():
    generator = torch.Generator().manual_seed(2)
    return ImageConditioning(torch.randn(1, 16, 1, 4, 6, generator=generator), 48, 32, 9)


def run(model, conditioning, prompt, negative=BAD, **settings):
    """Latents, and how many forward passes they took."""
    made = []
    hook = model.img_in.register_forward_hook(lambda *_: made.append(1))
    try:
        settings = SamplingSettings(**{"sigmas": SIGMAS, **settings})
        latents = sample(model, conditioning, prompt, negative, settings, runtime=TorchRuntime())
    finally:
        hook.remove()
    return latents, len(made)


@pytest.mark.parametrize("cache", ["off", "easy"])
def test_one_entry_for_the_whole_run_gives_the_bits_and_costs_of_a_bare_prompt(
    model, conditioning, cache
):
    bare, cost = run(model, conditioning, CAT, cache=CACHES[cache])
    entry, same = run(
        model, conditioning, [ScheduledPrompt(CAT)], [ScheduledPrompt(BAD)], cache=CACHES[cache]
    )
    assert torch.equal(bare, entry)
    assert cost == same


def test_each_entry_costs_an_evaluation_where_it_counts_and_nowhere_else(model, conditioning):
    first = ScheduledPrompt(CAT, sigma_end=HALF)
    second = ScheduledPrompt(DOG, sigma_start=HALF)
    active = int((SIGMAS[:-1] >= HALF).sum())
    assert 0 < active < 6
    _, cost = run(model, conditioning, [first, second])
    assert cost == 12
    _, cost = run(model, conditioning, [first, ScheduledPrompt(DOG)])
    assert cost == 12 + active
    _, cost = run(model, conditioning, [first, ScheduledPrompt(DOG)], guidance=Guidance(1.0))
    assert cost == 6 + active


def test_the_mean_of_two_is_that_of_their_velocities(model, conditioning):
    one = get_sigmas(1)
    plain = Guidance(true_cfg_scale=1.0)
    cat, dog, both = (
        run(model, conditioning, prompt, None, sigmas=one, guidance=plain)[0]
        for prompt in (CAT, DOG, [ScheduledPrompt(CAT, 0.5), ScheduledPrompt(DOG, 1.5)])
    )
    torch.testing.assert_close(both, 0.25 * cat + 0.75 * dog, atol=1e-5, rtol=1e-5)


def test_where_no_entry_counts_the_prediction_is_zero_and_the_log_says_so(
    model, conditioning, caplog
):
    late = [ScheduledPrompt(CAT, sigma_start=HALF)]
    plain = Guidance(true_cfg_scale=1.0)
    with caplog.at_level(logging.WARNING):
        latents, cost = run(model, conditioning, late, None, guidance=plain)
    skipped = int((SIGMAS[:-1] > HALF).sum())
    assert cost == 6 - skipped
    assert bool(latents.isfinite().all())
    assert f"active in {skipped} of 6 steps (the first is step 1)" in caplog.text
    caplog.clear()
    window = Guidance(cfg_start=0.5)  # at steps that use it, the negative prompt counts
    run(model, conditioning, CAT, [ScheduledPrompt(BAD, sigma_start=0.9)], guidance=window)
    assert "No entry" not in caplog.text


def test_what_fills_up_takes_what_the_others_leave():
    prompts = [ScheduledPrompt(CAT, 0.25), ScheduledPrompt(DOG, fills_up=True)]
    weights = weights_of_prompts(prompts, [ScheduledPrompt(BAD, 0.0), ScheduledPrompt(NONE)])
    assert weights(0, torch.tensor(0.5)) == [(0, 0.25), (1, 0.75)]
    assert weights(1, torch.tensor(0.5)) == [(3, 1.0)]
    full = weights_of_prompts([ScheduledPrompt(CAT, 1.5), prompts[1]], [])
    assert full(0, torch.tensor(0.5)) == [(0, 1.5)]


def test_a_schedule_that_begins_a_rounding_error_above_one_finds_its_prompts():
    weights = weights_of_prompts([ScheduledPrompt(CAT, sigma_start=1.0)], [])
    assert weights(0, torch.tensor(1.0000008)) == [(0, 1.0)]


@pytest.mark.parametrize(
    "values",
    [
        {"strength": -1.0},
        {"strength": float("nan")},
        {"sigma_start": float("nan")},
        {"guidance_scale": 1e9},
    ],
)
def test_a_strength_or_range_that_is_none_is_refused(values):
    with pytest.raises(OptionError, match="use"):
        ScheduledPrompt(CAT, **values)


def test_no_prompt_at_all_is_refused(model, conditioning):
    with pytest.raises(OptionError, match="needs a prompt"):
        run(model, conditioning, [])


def test_entries_with_their_own_embedded_guidance_get_it(model, conditioning):
    own, _ = run(model, conditioning, [ScheduledPrompt(CAT, guidance_scale=3.0)], None,
                 guidance=Guidance(1.0))  # fmt: skip
    runs, _ = run(model, conditioning, CAT, None, guidance=Guidance(1.0, 3.0))
    assert torch.equal(own, runs)


def test_saved_steps_of_another_strength_are_refused(model, conditioning, tmp_path):
    file = tmp_path / "state"
    run(model, conditioning, [ScheduledPrompt(CAT, 1.0), ScheduledPrompt(DOG)], resume=file)
    with pytest.raises(OptionError, match="other settings"):
        run(model, conditioning, [ScheduledPrompt(CAT, 0.5), ScheduledPrompt(DOG)], resume=file)


SEVERAL = {
    "together": [ScheduledPrompt(CAT), ScheduledPrompt(DOG)],
    "in turn": [ScheduledPrompt(CAT, sigma_end=HALF), ScheduledPrompt(DOG, sigma_start=HALF)],
    "in part": [ScheduledPrompt(CAT, sigma_start=0.95), ScheduledPrompt(DOG, sigma_end=0.4)],
}


@pytest.fixture(scope="module")
def without_a_cache(model, conditioning):
    return {name: run(model, conditioning, positive) for name, positive in SEVERAL.items()}


@pytest.mark.parametrize("kind", ["easy", "first-block"])
@pytest.mark.parametrize("several", SEVERAL)
def test_a_cache_that_skips_nothing_changes_no_bit_with_several_prompts(
    model, conditioning, without_a_cache, kind, several
):
    off, cost = without_a_cache[several]
    none, same = run(model, conditioning, SEVERAL[several], cache=CacheConfig(kind, 0.0))
    assert cost == same
    assert torch.equal(off, none)


@pytest.mark.parametrize("name", ["easy", "first-block"])
def test_a_step_whose_prompts_are_new_is_never_skipped(model, conditioning, name):
    sigmas = get_sigmas(20)
    change = percent_to_sigma(0.5, 7.0)
    positive = [ScheduledPrompt(CAT, sigma_end=change), ScheduledPrompt(DOG, sigma_start=change)]
    calls = []
    widths = {each.prompt_embeds.shape[1]: mark for each, mark in ((CAT, "c"), (DOG, "d"))}

    def watch(block, args):
        calls.append(widths.get(args[1].shape[1], "n"))

    hook = model.blocks[1].register_forward_pre_hook(watch)
    try:
        run(model, conditioning, positive, sigmas=sigmas,
            cache=replace(CACHES[name], threshold=1.0))  # fmt: skip
    finally:
        hook.remove()
    # the first and last steps, and the one at which the prompt changes, are computed; with it the
    # step after that, which tells how fast the new one changes, for a cache that needs to know
    assert "d" in calls
    assert calls.index("d") < len(calls) - 4
    assert len(calls) < 2 * 12


def test_branches_by_twos_give_the_same_bits_with_three(model, conditioning):
    positive = [ScheduledPrompt(CAT), ScheduledPrompt(DOG, 0.5, sigma_start=HALF)]
    negative = [ScheduledPrompt(BAD)]
    everything = [each.embeds for each in (*positive, *negative)]
    latents = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        lookup = precompute(
            model, everything, (SIGMAS[:-1] * 1000).tolist(), torch.tensor([1000.0]),
            attention=torch.nn.functional.scaled_dot_product_attention, runtime=TorchRuntime(),
        )  # fmt: skip
        plain, interleaved = (
            euler(
                guided_velocity(
                    Network(
                        model, DenseRun(sdpa), lookup, conditioning.padded(),
                        rope_table((3, 2, 3), tiny.TRANSFORMER), call,
                    ),
                    SIGMAS, Guidance(), weights=weights_of_prompts(positive, negative),
                    interleaves=interleaves,
                ),
                latents, SIGMAS, lambda *_: None,
            )
            for interleaves in (False, True)
        )  # fmt: skip
    assert torch.equal(plain, interleaved)
