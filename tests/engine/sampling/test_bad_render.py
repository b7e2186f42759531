"""Stills, cuts and drifts of colour are seen halfway, good clips are left alone, and what follows.

The figures of many clips: `python -m tests.bench.bad_render`.
"""

import logging

import pytest
import torch
from bench import bad_render as bench
from comfyui_skyreels.skyreels.conditioning.latents import ImageConditioning
from comfyui_skyreels.skyreels.config import ContextWindows, Guidance
from comfyui_skyreels.skyreels.errors import BadRenderError, OptionError
from comfyui_skyreels.skyreels.runtime import TorchRuntime
from comfyui_skyreels.skyreels.sampling import bad_render
from comfyui_skyreels.skyreels.sampling.bad_render import (
    MAX_TRIES,
    Look,
    look_at,
    step_to_look_at,
    with_retries,
)
from comfyui_skyreels.skyreels.sampling.batch import Clip, sample_clips
from comfyui_skyreels.skyreels.sampling.sample import sample
from comfyui_skyreels.skyreels.sampling.settings import SamplingSettings, euler, get_sigmas
from support import tiny
from support.tiny import embeds
from train import data

PROMPT, NEGATIVE = embeds(7, 1), embeds(4, 2)
SIGMAS = get_sigmas(6)
STILL, GOOD = Look(0.1, 0.0, 0.0, 1), Look(2.0, 0.0, 0.0, 1)


@pytest.fixture(scope="module")
def model():
    return tiny.transformer()


@pytest.fixture(scope="module")
def planter():
    """At 8 steps, whose estimates have the figures of those at 30."""
    return bench.Planter(SamplingSettings(riflex_k=0, sigmas=get_sigmas(8)))


@pytest.fixture(scope="module")
def cases():
    """One that fades, one that shrinks, and one that moves no further than it must to be moving."""
    found = bench.moving_cases(24, seed=5)
    return [
        next(case for case in found if case.verb in verbs)
        for verbs in (("fade",), ("shrink",), data.DIRECTIONS)
    ]


def a_clip(num_frames: int = 17) -> ImageConditioning:
    generator = torch.Generator().manual_seed(2)
    return ImageConditioning(torch.randn(1, 16, 1, 4, 6, generator=generator), 48, 32, num_frames)


class Noting(TorchRuntime):
    """A host that keeps what it is told."""

    def __init__(self):
        super().__init__()
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def run(model, clip=None, runtime=None, **settings):
    settings = SamplingSettings(**{"sigmas": SIGMAS, **settings})
    inputs = (clip or a_clip(), PROMPT, NEGATIVE, settings)
    return sample(model, *inputs, runtime=runtime or TorchRuntime())


@pytest.fixture
def seen(monkeypatch):
    """What the looks of a run see, in turn; afterwards, nothing bad."""
    looks = []
    monkeypatch.setattr(
        bad_render, "look_at", lambda estimate, given: looks.pop(0) if looks else GOOD
    )
    return looks


# --- what is seen -------------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(3))
def test_of_the_built_in_model_good_clips_are_left_alone_and_planted_bad_ones_are_seen(
    planter, cases, index
):
    called = {
        kind: bench.called(look_at(*bench.KINDS[kind](planter, cases, index)))
        for kind in ("good", "still", "jump")
    }
    assert called == {"good": "good", "still": "still", "jump": "jump"}


def test_a_change_of_colour_in_the_quiet_places_is_a_drift():
    moving = torch.randn(1, 16, 9, 8, 8, generator=torch.Generator().manual_seed(1))
    moving[:, :, :, 2:] = moving[:, :, :1, 2:]  # the rest of the picture stays as it is
    given = moving[:, :, :1]
    assert look_at(moving, given).fault() is None
    shift = torch.linspace(0, 0.8, 9)[:, None, None] * torch.ones(16, 1, 1, 1)
    assert look_at(moving + shift, given).fault().startswith("drifts to other colours")


def test_a_cut_is_named_with_its_frame_and_a_pan_is_none():
    generator = torch.Generator().manual_seed(1)
    wide = torch.randn(1, 16, 1, 8, 24, generator=generator)
    pan = torch.cat([wide[..., frame : frame + 8] for frame in range(9)], dim=2)
    assert look_at(pan, pan[:, :, :1]).fault() is None
    cut = torch.cat([wide[..., :8].expand(-1, -1, 5, -1, -1),
                     wide[..., 8:16].expand(-1, -1, 4, -1, -1)], dim=2)  # fmt: skip
    fault = look_at(cut, cut[:, :, :1]).fault()
    assert fault is not None
    assert fault.startswith("cuts to another scene near frame 17 ")


def test_frames_that_are_given_are_not_judged():
    still = torch.randn(1, 16, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    clip = still.expand(-1, -1, 9, -1, -1).clone()
    given = torch.randn(1, 16, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    given[:, :, -1:] = still
    assert look_at(clip, given).fault().startswith("stands still")


def test_the_step_that_is_looked_at_follows_the_noise_not_the_count():
    assert step_to_look_at(SamplingSettings(sigmas=get_sigmas(30))) == 15
    assert step_to_look_at(SamplingSettings(sigmas=get_sigmas(6, shift=17.0))) == 5
    assert step_to_look_at(SamplingSettings(sigmas=get_sigmas(30)[:10])) is None
    late = SamplingSettings(sigmas=get_sigmas(30), guidance=Guidance(zero_init_steps=18))
    assert step_to_look_at(late) == 19


@pytest.mark.parametrize(("scale", "least"), [(0.0, 0.15), (1.0, 0.15), (3.0, 0.54), (9.0, 0.78)])
def test_the_limit_of_a_still_follows_guidance(scale, least):
    assert Look(least + 0.02, 0.0, 0.0, 1).fault(scale) is None
    assert f"below {least:.2f}" in Look(least - 0.02, 0.0, 0.0, 1).fault(scale)


@pytest.mark.parametrize(
    "guidance", [Guidance(1.0), Guidance(6.0, cfg_end=0.4), Guidance(6.0, cfg_start=0.6)]
)
def test_without_guidance_at_that_step_the_limit_is_the_lower_one(model, seen, guidance):
    seen.append(Look(0.4, 0.0, 0.0, 1))
    run(model, bad_render="stop", guidance=guidance)
    assert seen == []
    seen.append(Look(0.4, 0.0, 0.0, 1))
    with pytest.raises(BadRenderError, match="motion 0.40, below 0.78"):
        run(model, bad_render="stop")


# --- what follows -------------------------------------------------------------------------------


def test_a_warning_changes_nothing_and_comes_once(model, seen, caplog):
    seen += [STILL, STILL]
    host = Noting()
    assert torch.equal(run(model, runtime=host, bad_render="warn"), run(model))
    lines = [record.message for record in caplog.records if "Bad render" in record.message]
    assert lines == host.notes
    assert len(lines) == 1
    assert "seed 0: at step 4 of 6 the clip stands still (motion 0.10, below 0.78)" in lines[0]


def test_off_looks_at_nothing(model, monkeypatch):
    monkeypatch.setattr(bad_render, "look_at", lambda *_: pytest.fail("looked"))
    run(model)


@pytest.mark.parametrize("windows", [None, ContextWindows(3, 1)])
def test_a_stop_names_what_was_seen_and_leaves_the_model_as_it_was(model, seen, windows):
    options = {"windows": windows, "seed": 3}
    expected = run(model, **options)
    seen.append(Look(2.0, 0.9, 0.0, 3))
    with pytest.raises(BadRenderError) as caught:
        run(model, bad_render="stop", **options)
    assert "seed 3: at step 4 of 6 the clip cuts to another scene near frame 9" in str(caught.value)
    assert "set bad_render to warn or off" in str(caught.value)
    assert torch.equal(run(model, bad_render="stop", **options), expected)


def test_what_was_stopped_is_stopped_again_when_it_is_resumed(model, seen, tmp_path):
    seen += [STILL, STILL]
    for _ in range(2):
        with pytest.raises(BadRenderError):
            run(model, bad_render="stop", resume=tmp_path / "steps")
    assert seen == []


def test_a_retry_gives_the_clip_of_the_next_seed_and_says_which(model, seen, caplog):
    seen += [STILL, STILL]
    settings = SamplingSettings(sigmas=SIGMAS, seed=2**64 - 1, bad_render="retry")
    steps = []
    host = TorchRuntime(on_progress=lambda stage, done, *_: steps.append(done))
    made, used = with_retries(
        settings, lambda s: sample(model, a_clip(), PROMPT, NEGATIVE, s, runtime=host)
    )
    assert used.seed == 1  # after the largest comes 0
    assert torch.equal(made, run(model, seed=1))
    assert [line for line in caplog.messages if "Try 3 of 4, with seed 1." in line]
    assert steps.count(0) == 3  # the bar begins anew


def test_retries_end(model, seen):
    seen += [STILL] * MAX_TRIES
    settings = SamplingSettings(sigmas=SIGMAS, seed=7, bad_render="retry")
    with pytest.raises(BadRenderError, match="All 4 tries, from seed 7 on, .*with seed 10"):
        with_retries(settings, lambda s: run(model, seed=s.seed, bad_render=s.bad_render))
    assert seen == []


def test_each_clip_of_a_batch_has_tries_of_its_own_with_its_own_noise(model, seen):
    seen += [GOOD, STILL, GOOD]
    seeds_of_solvers = []

    def solver_of(seed):
        seeds_of_solvers.append(seed)
        return euler

    clips = [
        Clip(a_clip(), PROMPT, NEGATIVE,
             SamplingSettings(sigmas=SIGMAS, seed=4, noise_index=index, bad_render="retry"),
             solver_of)
        for index in range(2)
    ]  # fmt: skip
    made, seeds = sample_clips(model, clips, runtime=TorchRuntime())
    assert seeds == [4, 5]
    assert seeds_of_solvers == [4, 4, 5]
    assert torch.equal(made[:1], run(model, seed=4))
    assert torch.equal(made[1:], run(model, seed=5, noise_index=1))


@pytest.mark.parametrize(
    ("num_frames", "settings", "words"),
    [
        (5, {}, "fewer than 8 frames of its own"),
        (17, {"sigmas": SIGMAS[:3]}, "its schedule ends before sigma 0.9"),
    ],
)
def test_a_clip_that_cannot_be_judged_is_named(model, caplog, num_frames, settings, words):
    run(model, a_clip(num_frames), bad_render="stop", **settings)
    assert words in caplog.text


def test_a_run_that_is_resumed_behind_the_look_says_so(model, tmp_path, caplog):
    class EndedError(Exception):
        pass

    def end(stage, done, total, preview):
        if done == 5:
            raise EndedError

    with pytest.raises(EndedError):
        run(model, runtime=TorchRuntime(on_progress=end), resume=tmp_path / "steps")
    with caplog.at_level(logging.WARNING):
        run(model, bad_render="stop", resume=tmp_path / "steps")
    assert "step 4, where clips are looked at, was made by the run that is resumed" in caplog.text


def test_settings_that_contradict_are_refused(tmp_path):
    with pytest.raises(OptionError, match="'no' is not one of off, warn, stop, retry"):
        SamplingSettings(bad_render="no")
    with pytest.raises(OptionError, match="Resuming and bad_render retry"):
        SamplingSettings(bad_render="retry", resume=tmp_path / "steps")
