"""Replays of a recorded run: what they are exactly, and how near they come to real runs."""

import math

import pytest
import torch
from bench import replay as bench
from bench.quality import Studio
from comfyui_skyreels.skyreels.conditioning.latents import ImageConditioning, to_vae_space
from comfyui_skyreels.skyreels.config import Guidance
from comfyui_skyreels.skyreels.errors import OptionError
from comfyui_skyreels.skyreels.runtime import TorchRuntime
from comfyui_skyreels.skyreels.sampling.calibrate import THRESHOLDS, scores_of_thresholds
from comfyui_skyreels.skyreels.sampling.replay import Recording, decibels, record, replay
from comfyui_skyreels.skyreels.sampling.sample import sample
from comfyui_skyreels.skyreels.sampling.settings import SamplingSettings, get_sigmas
from comfyui_skyreels.skyreels.sampling.step_cache import EasyCache, StepCache
from comfyui_skyreels.skyreels.transformer.model import call
from support import tiny
from support.tiny import embeds
from train import measure

RUNTIME = TorchRuntime()
STEPS = 30
PROMPT, NEGATIVE = embeds(7, 1), embeds(4, 2)
IMAGE = ImageConditioning(
    torch.randn(1, 16, 1, 4, 6, generator=torch.Generator().manual_seed(2)), 48, 32, 9
)


@pytest.fixture(scope="module")
def model():
    return tiny.transformer()


def recorded(model, negative=NEGATIVE, **settings):
    given = SamplingSettings(**{"sigmas": get_sigmas(6), **settings})
    exact = sample(model, IMAGE, PROMPT, negative, given, runtime=RUNTIME)
    return exact, *record(model, IMAGE, PROMPT, negative, given, runtime=RUNTIME)


@pytest.mark.parametrize(("scale", "branches"), [(6.0, 2), (1.0, 1)])
def test_a_recorded_run_is_the_exact_one_and_so_is_its_replay_without_a_cache(
    model, scale, branches
):
    exact, latents, recording = recorded(model, guidance=Guidance(scale))
    assert torch.equal(latents, exact)
    assert [len(velocities) for velocities in recording.velocities] == [branches] * 6
    done = replay(recording, StepCache(6, call))
    assert (done.skipped, done.num_passes, done.error_db) == ((), 6 * branches, 100.0)
    assert recording.num_passes == done.num_passes
    # the positive prediction is had from the guided one, to its rounding
    assert tiny.relative_error(to_vae_space(done.latents), exact) <= 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {"guidance": Guidance(cfg_zero_star=True)},
        {"guidance": Guidance(guidance_rescale=0.5)},
        {"guidance": Guidance(cfg_end=0.5)},
        {"solver": lambda *_: None},
    ],
)
def test_a_run_whose_predictions_cannot_be_told_is_not_recorded(model, changes):
    settings = SamplingSettings(**changes)
    with pytest.raises(OptionError, match="A run is recorded with plain guidance"):
        record(model, IMAGE, PROMPT, NEGATIVE, settings, runtime=RUNTIME)


def flat(value: float) -> torch.Tensor:
    return torch.full((1, 16, 1, 2, 2), value)


def test_the_loops_differ_in_what_the_cache_sees():
    """Three steps, the second skipped with output = input + 2: worked out by hand."""

    class Second(StepCache):
        def begin(self, step, latents, branches):
            self.latents, self.skips = latents, step == 1

        def predict(self, branch, forward):
            return self.latents + 2 if self.skips else forward(call)

    sigmas = torch.tensor([1.0, 0.5, 0.25, 0.0])
    recording = Recording(sigmas, flat(1.0), [[flat(4.0)], [flat(2.0)], [flat(8.0)]], 1.0)
    # exact: 1 - 0.5 * 4 = -1, then -1.5, then -3.5; estimated: -1 + 2 = 1 in place of 2
    opened = replay(recording, Second(3, call), closed_loop=False)
    assert float(opened.latents[0, 0, 0, 0, 0]) == pytest.approx(-3.25)
    assert opened.error_db == pytest.approx(20 * math.log10(3.5 / 0.25))
    # closed: at sigma 0.25 the latents are 0.25 too high, and of data with a deviation of 0.2 the
    # best estimate moves by 0.75 * 0.04 / (0.75^2 * 0.04 + 0.25^2) of that, 0.3529
    closed = replay(recording, Second(3, call))
    velocity = 8 + 0.25 * (1 - 0.352941) / 0.25
    assert float(closed.latents[0, 0, 0, 0, 0]) == pytest.approx(-1.25 - 0.25 * velocity, abs=1e-5)
    assert closed.num_passes == opened.num_passes == 2


def test_decibels_are_those_of_power_over_error():
    exact = torch.tensor([3.0, 4.0])
    assert decibels(exact, exact) == 100.0
    assert decibels(exact + 0.05, exact) == pytest.approx(10 * math.log10(12.5 / 0.0025), abs=1e-4)
    assert decibels(exact + 1e-7, exact) == 100.0


# --- of the built-in model ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def take():
    case = measure.held_out_cases(8, seed=3006)[0]
    return bench.Take(Studio(), case, seed=0, steps=STEPS)


@pytest.fixture(scope="module")
def exact(take):
    """The exact latents and the recording of one clip."""
    return take.record()


def test_replays_order_thresholds_and_count_evaluations_as_real_runs_do(take, exact):
    latents, recording = exact
    thresholds = (0.01, 0.05, 0.15)
    real, closed, opened = [], [], []
    for threshold in thresholds:
        made, passes = take.run(threshold)
        real.append(decibels(made, latents))
        closed.append(replay(recording, EasyCache(STEPS, call, threshold)))
        cache = EasyCache(STEPS, call, threshold)
        opened.append(replay(recording, cache, closed_loop=False))
        assert abs(closed[-1].num_passes - passes) <= 1
    assert real == sorted(real, reverse=True)
    for replayed in (closed, opened):
        errors_db = [each.error_db for each in replayed]
        assert errors_db == sorted(errors_db, reverse=True)
    for each, other, truth in zip(closed, opened, real, strict=True):
        assert other.error_db < each.error_db  # nothing pulls an open loop back
        assert abs(each.error_db - truth) <= 12  # and the closed one is of the right size


def test_every_threshold_is_scored_and_the_same_as_alone(exact):
    recording = exact[1]
    scores = scores_of_thresholds(recording)
    assert len(scores) == len(THRESHOLDS)
    assert scores[0][0] == 60
    assert scores[-1][0] == 24
    for index in (10, 30, 48):
        alone = replay(recording, EasyCache(STEPS, call, THRESHOLDS[index]))
        assert scores[index] == (alone.num_passes, pytest.approx(alone.error_db, abs=1e-3))


def test_a_schedule_gives_its_number_of_passes_and_never_the_protected_steps(exact):
    recording = exact[1]
    wanted = [5, 6, 8, 9, 11, 12, 14, 20]
    done = replay(recording, bench.FixedSchedule(STEPS, wanted))
    assert (list(done.skipped), done.num_passes) == (wanted, 60 - 2 * len(wanted))
    every = replay(recording, bench.FixedSchedule(STEPS, range(STEPS)))
    assert every.num_passes == 24
    assert not {0, 1, 2, 3, 4, 28, 29} & set(every.skipped)


def test_the_bench_keeps_recordings_and_scores_predictors(exact, tmp_path):
    recording = exact[1]
    bench.save_recording(tmp_path / "run.safetensors", recording)
    again = bench.load_recording(tmp_path / "run.safetensors")
    assert torch.equal(again.sigmas, recording.sigmas)
    assert again.scale == recording.scale
    rows = {}
    for name, (kind, scheduled) in bench.PREDICTORS.items():
        rows[name] = bench.score(again, kind(STEPS, call, 0.05), kind(STEPS, call, 0.05))
        assert replay(again, scheduled(STEPS, [7, 8])).skipped == (7, 8)
    assert rows["hold"]["closed"] == pytest.approx(
        replay(recording, EasyCache(STEPS, call, 0.05)).error_db, abs=0.01
    )
    assert rows["linear"]["closed"] != rows["hold"]["closed"]
    assert bench.rank_correlation([1, 2, 3, 4], [10, 20, 40, 30]) == pytest.approx(0.8)
