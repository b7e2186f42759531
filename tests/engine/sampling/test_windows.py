"""Context windows against formulas written out, and off without a trace."""

from dataclasses import replace

import pytest
import torch
from comfyui_skyreels.skyreels.conditioning.latents import ImageConditioning
from comfyui_skyreels.skyreels.config import ContextWindows, Guidance, SkipLayers
from comfyui_skyreels.skyreels.errors import OptionError
from comfyui_skyreels.skyreels.plan import Job
from comfyui_skyreels.skyreels.runtime import TorchRuntime
from comfyui_skyreels.skyreels.sampling.guidance import guided_velocity
from comfyui_skyreels.skyreels.sampling.network import Network
from comfyui_skyreels.skyreels.sampling.resume import fingerprint_run
from comfyui_skyreels.skyreels.sampling.sample import run_bytes, sample
from comfyui_skyreels.skyreels.sampling.settings import SamplingSettings, get_sigmas
from comfyui_skyreels.skyreels.sampling.step_cache import CACHES
from comfyui_skyreels.skyreels.sampling.windows import picture_of_run
from comfyui_skyreels.skyreels.transformer.attention import sdpa
from comfyui_skyreels.skyreels.transformer.layers import rope_table
from comfyui_skyreels.skyreels.transformer.model import call
from comfyui_skyreels.skyreels.transformer.sparse_attention import DenseRun
from support import tiny
from support.tiny import embeds

RUNTIME = TorchRuntime()
SIGMAS = get_sigmas(2)
PROMPT, NEGATIVE = embeds(7, 1), embeds(4, 2)
#: of 7 latent frames: 0..2, 2..4 and 4..6
WINDOWS = ContextWindows(3, 1)


@pytest.fixture(scope="module")
def model():
    return tiny.transformer()


def a_clip(given: int = 1) -> ImageConditioning:
    generator = torch.Generator().manual_seed(2)
    return ImageConditioning(torch.randn(1, 16, given, 4, 6, generator=generator), 48, 32, 25)


def run(model, windows, clip=None, **settings) -> torch.Tensor:
    settings = SamplingSettings(**{"sigmas": SIGMAS, "windows": windows, **settings})
    return sample(model, clip or a_clip(), PROMPT, NEGATIVE, settings, runtime=RUNTIME)


# --- the windows --------------------------------------------------------------------------------


def test_static_windows_are_the_same_at_every_step_and_the_last_ends_with_the_clip():
    for step in (0, 1, 17):
        assert WINDOWS.starts(7, step) == [0, 2, 4]
        assert WINDOWS.starts(8, step) == [0, 2, 4, 5]
    assert ContextWindows(25, 6).starts(73, 0) == [0, 19, 38, 48]


def test_uniform_windows_move_and_cover_every_frame():
    windows = ContextWindows(4, 2, "uniform")
    assert [windows.starts(10, step) for step in range(4)] == [
        [0, 2, 4, 6], [0, 1, 5, 6], [0, 2, 4, 6], [0, 2, 4, 6],
    ]  # fmt: skip
    for length, overlap, frames in ((5, 0, 12), (5, 4, 6), (7, 3, 30), (2, 1, 3)):
        windows = ContextWindows(length, overlap, "uniform")
        for step in range(40):
            starts = windows.starts(frames, step)
            covered = {frame for start in starts for frame in range(start, start + length)}
            assert covered == set(range(frames))
            assert len(set(starts)) == len(starts)


@pytest.mark.parametrize(
    ("blend", "length", "expected"),
    [
        ("flat", 3, [1, 1, 1]),
        ("pyramid", 4, [1, 2, 2, 1]),
        ("pyramid", 5, [1, 2, 3, 2, 1]),
        ("relative", 5, [0.01, 1 - 2 / 4.01, 1, 1 - 2 / 4.01, 0.01]),
    ],
)
def test_weights_are_the_named_ones(blend, length, expected):
    assert ContextWindows(length, 0, blend=blend).weights() == pytest.approx(expected)


def test_frames_of_the_video_become_latent_frames():
    assert ContextWindows.of_frames(97) == ContextWindows(25, 6)
    assert ContextWindows.of_frames(33, 8, "uniform", "flat") == ContextWindows(
        9, 2, "uniform", "flat"
    )


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ContextWindows(1, 0), "Windows of 1 latent frames are too short: use 25"),
        (lambda: ContextWindows(8, 8), r"overlap 8 is not within 0\.\.7.*use 2"),
        (lambda: ContextWindows(8, -1), "overlap -1"),
        (lambda: ContextWindows(8.0, 1), "length 8.0 is not a whole number"),
        (lambda: ContextWindows(8, 1, "looped"), "'looped' of windows is not one of static, uni"),
        (lambda: ContextWindows(8, 1, blend="mean"), "'mean' of windows is not one of pyramid"),
        (lambda: ContextWindows.of_frames(96), "multiple of 4 plus 1, from 5: use 97"),
        (lambda: ContextWindows.of_frames(1), "use 5"),
        (lambda: ContextWindows.of_frames(33, 9), "multiple of 4 below .* use 8"),
        (lambda: ContextWindows.of_frames(33, 36), "use 32"),
        (
            lambda: SamplingSettings(cache=CACHES["easy"], windows=WINDOWS),
            "Context windows and a cache do not go together",
        ),
    ],
)
def test_illegal_windows_are_explained(make, words):
    with pytest.raises(OptionError, match=words):
        make()


# --- predictions --------------------------------------------------------------------------------


def written_out(model, clip, latents, sigma, prompt, windows) -> torch.Tensor:
    """The mean of the windows' predictions, frame by frame."""
    picture, weights = clip.padded(), windows.weights()
    given = clip.image_latents.shape[2]
    sums, totals = torch.zeros_like(latents), [0.0] * latents.shape[2]
    for start in windows.starts(latents.shape[2], 1):
        frames = list(range(start, start + windows.length))
        shown = picture[:, :, frames].clone()
        if start >= given:
            shown[:, :, 0] = picture[:, :, 0]
        velocity = model(
            torch.cat([latents[:, :, frames], shown], dim=1),
            sigma[None] * 1000,
            prompt.prompt_embeds,
            prompt.pooled_prompt_embeds,
            torch.tensor([1000.0]),
        )
        for place, frame in enumerate(frames):
            sums[:, :, frame] += weights[place] * velocity[:, :, place]
            totals[frame] += weights[place]
    return torch.stack([sums[:, :, i] / total for i, total in enumerate(totals)], dim=2)


@pytest.mark.parametrize("interleaves", [False, True])
@pytest.mark.parametrize(
    ("windows", "given"),
    [
        (WINDOWS, 1),
        (replace(WINDOWS, blend="relative"), 1),
        (ContextWindows(4, 1, "uniform", "flat"), 1),
        (ContextWindows(3, 2), 3),  # windows that begin within the given frames
    ],
)
def test_a_prediction_is_the_weighted_mean_of_its_windows(model, windows, given, interleaves):
    clip = a_clip(given)
    latents = torch.randn(clip.latent_shape, generator=torch.Generator().manual_seed(3))
    sigma, prompts = SIGMAS[1], (PROMPT, NEGATIVE)
    guidance = torch.tensor([1000.0])
    with torch.inference_mode():
        velocity = guided_velocity(
            Network(
                model,
                DenseRun(sdpa),
                lambda branch, timestep, run_block: model.condition(
                    torch.tensor([timestep]),
                    prompts[branch].prompt_embeds,
                    prompts[branch].pooled_prompt_embeds,
                    guidance,
                ),
                picture_of_run(clip, windows, torch.device("cpu")),
                rope_table((windows.length, 2, 3), tiny.TRANSFORMER),
                call,
            ),
            SIGMAS,
            Guidance(),
            interleaves=interleaves,
        )
        guided, negative = velocity(latents, sigma)
        expected = [written_out(model, clip, latents, sigma, each, windows) for each in prompts]
    torch.testing.assert_close(negative, expected[1], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(
        guided, expected[1] + 6 * (expected[0] - expected[1]), atol=1e-5, rtol=1e-5
    )


def test_a_clip_that_is_not_longer_than_a_window_is_sampled_whole_to_the_last_bit(model):
    whole = run(model, None)
    assert torch.equal(run(model, ContextWindows(7, 2)), whole)
    assert torch.equal(run(model, ContextWindows(25, 6, "uniform")), whole)
    assert not torch.equal(run(model, WINDOWS), whole)


def test_every_window_shows_the_picture(model):
    seen = []

    def watch(module, args):
        seen.append(args[0][:, 16:].clone())

    handle = model.img_in.register_forward_pre_hook(watch)
    try:
        run(model, WINDOWS, guidance=Guidance(true_cfg_scale=1.0), sigmas=SIGMAS[-2:])
    finally:
        handle.remove()
    picture = a_clip().image_latents
    assert len(seen) == 3
    for each in seen:
        assert torch.equal(each[:, :, :1], picture)
        assert not each[:, :, 1:].any()


def test_the_last_window_shows_the_end_picture_too():
    clip = replace(a_clip(), end_latents=torch.ones(1, 16, 1, 4, 6))
    picture = picture_of_run(clip, WINDOWS, torch.device("cpu"))
    for start in (0, 2, 4):
        shown = picture.picture_of(start)
        assert torch.equal(shown[:, :, :1], clip.image_latents)
        assert bool((shown[:, :, 2] == (1 if start == 4 else 0)).all())


def test_text_to_video_has_windows_too():
    text_model = tiny.transformer(replace(tiny.TRANSFORMER, in_channels=16))
    clip = ImageConditioning(None, 48, 32, 25)
    whole = run(text_model, None, clip)
    assert torch.equal(run(text_model, ContextWindows(7, 1), clip), whole)
    made = run(text_model, WINDOWS, clip)
    assert made.shape == whole.shape
    assert not torch.equal(made, whole)


def test_windows_go_with_everything_else_that_a_run_has(model, tmp_path):
    skip = SkipLayers((), (0,), 1.0)
    options = {"guidance": Guidance(skip_layers=skip, cfg_end=0.5), "resume": tmp_path / "steps"}
    mask = torch.ones(1, 1, 7, 4, 6)
    mask[..., :2] = 0
    first = run(model, WINDOWS, noise_mask=mask, **options)
    assert torch.equal(run(model, WINDOWS, noise_mask=mask, **options), first)
    with pytest.raises(OptionError, match="saved with other settings"):
        run(model, replace(WINDOWS, blend="flat"), noise_mask=mask, **options)


def test_windows_that_are_off_keep_the_fingerprint_of_saved_steps(model):
    def of(**settings):
        settings = SamplingSettings(**settings)
        return fingerprint_run(model, a_clip(), PROMPT, NEGATIVE, settings)

    assert of(windows=None) == of()
    assert len({of(), of(windows=WINDOWS), of(windows=replace(WINDOWS, overlap=2))}) == 3


# --- plan ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["static", "uniform"])
def test_the_plan_counts_the_windows_that_are_evaluated(model, schedule, monkeypatch):
    counted = 0
    denoise = model.denoise_together

    def count(latents, conditioned, **options):
        nonlocal counted
        counted += len(conditioned)
        assert latents.shape[2] == 3
        return denoise(latents, conditioned, **options)

    monkeypatch.setattr(model, "denoise_together", count)
    windows = replace(WINDOWS, schedule=schedule)
    run(model, windows, sigmas=get_sigmas(4))
    job = Job(48, 32, 25, 4, 4, text_tokens=7, config=tiny.TRANSFORMER, windows=windows)
    assert job.num_evaluations == counted
    assert job.tokens == 3 * 2 * 3 + 7
    assert str(job) == "25 frames of 48x32 in windows of 9"


def test_memory_is_that_of_one_window(model):
    def needed(windows, frames):
        clip = ImageConditioning(None, 48, 32, frames)
        settings = SamplingSettings(windows=windows)
        return run_bytes(model, clip, [PROMPT], settings)

    assert needed(WINDOWS, 25) == needed(WINDOWS, 1025) == needed(None, 9)
    assert needed(None, 25)["whole"] > needed(None, 9)["whole"]
