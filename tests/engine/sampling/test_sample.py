"""Schedule, guidance, the loop, and the whole pipeline against the reference procedure."""

import os
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from comfyui_skyreels.skyreels.conditioning.embeds import PromptEmbeds
from comfyui_skyreels.skyreels.conditioning.latents import ImageConditioning
from comfyui_skyreels.skyreels.config import Guidance
from comfyui_skyreels.skyreels.errors import OptionError, ShapeError, TextError
from comfyui_skyreels.skyreels.image import fit_image
from comfyui_skyreels.skyreels.pipeline import image_to_video
from comfyui_skyreels.skyreels.runtime import TorchRuntime
from comfyui_skyreels.skyreels.sampling.finite import FiniteWatch, suspects
from comfyui_skyreels.skyreels.sampling.guidance import combine, guided_velocity
from comfyui_skyreels.skyreels.sampling.network import Network
from comfyui_skyreels.skyreels.sampling.precompute import precompute
from comfyui_skyreels.skyreels.sampling.sample import initial_noise, sample
from comfyui_skyreels.skyreels.sampling.settings import SamplingSettings, euler, get_sigmas
from comfyui_skyreels.skyreels.sampling.step_cache import CACHES
from comfyui_skyreels.skyreels.transformer.attention import sdpa
from comfyui_skyreels.skyreels.transformer.layers import rope_table
from comfyui_skyreels.skyreels.transformer.model import call
from comfyui_skyreels.skyreels.transformer.sparse_attention import DenseRun
from comfyui_skyreels.skyreels.vae.model import VideoVAE
from comfyui_skyreels.skyreels.weights.lora.apply import AppliedLora
from comfyui_skyreels.skyreels.weights.lora.read import Lora
from support import tiny
from support.tiny import embeds
from support.waits import Waits, no_wait_for_the_gpu

RUNTIME = TorchRuntime()


@pytest.fixture(scope="module")
def model():
    return tiny.transformer()


@pytest.fixture
def conditioning():
    return a_picture()


def a_picture():
    generator = torch.Generator().manual_seed(2)
    return ImageConditioning(torch.randn(1, 16, 1, 4, 6, generator=generator), 48, 32, 9)


PROMPT, NEGATIVE = embeds(7, 1), embeds(4, 2)
SIGMAS = get_sigmas(4)
ROPE = rope_table((3, 2, 3), tiny.TRANSFORMER)


def run(model, conditioning, prompt=PROMPT, negative=NEGATIVE, runtime=RUNTIME, **settings):
    settings = SamplingSettings(**{"sigmas": SIGMAS, **settings})
    return sample(model, conditioning, prompt, negative, settings, runtime=runtime)


# --- schedule -----------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 6, 10, 20, 30, 50])
@pytest.mark.parametrize("shift", [7.0, 9.0, 17.0])
def test_sigmas_equal_the_diffusers_scheduler(steps, shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.0, steps + 1)[:-1])
    torch.testing.assert_close(get_sigmas(steps, shift), scheduler.sigmas, atol=6e-8, rtol=1.2e-7)


def test_timesteps_of_thirty_steps_are_the_published_ones():
    timesteps = (get_sigmas(30) * 1000).tolist()
    for index, expected in ((0, 1000), (1, 995.10), (2, 989.90), (27, 437.5), (28, 333.33),
                            (29, 194.44), (30, 0)):  # fmt: skip
        assert timesteps[index] == pytest.approx(expected, abs=0.005)


def test_denoise_takes_the_end_of_a_longer_schedule():
    assert torch.equal(get_sigmas(5, denoise=0.5), get_sigmas(10)[-6:])


def test_the_end_of_a_very_long_schedule_costs_nothing_and_has_the_same_bits():
    for steps, denoise in ((30, 0.4), (7, 0.123), (1, 0.01)):
        total = int(steps / denoise)
        linear = torch.linspace(1.0, 0.0, total + 1, dtype=torch.float64)
        whole = (7 * linear / (1 + 6 * linear))[-(steps + 1) :].float()
        assert torch.equal(get_sigmas(steps, 7.0, denoise), whole)
    sigmas = get_sigmas(1000, 7.0, 1e-5)  # of a hundred million steps
    assert len(sigmas) == 1001
    assert bool((sigmas.diff() < 0).all())


@pytest.mark.parametrize("steps", [30.5, 30.0, True, "30", None])
def test_steps_that_are_no_whole_number_are_refused(steps):
    with pytest.raises(OptionError, match="not a whole number"):
        get_sigmas(steps)


def test_numpys_whole_numbers_are_whole_numbers():
    assert torch.equal(get_sigmas(np.int64(4)), get_sigmas(4))
    assert SamplingSettings(seed=np.uint64(3)).seed == 3
    for seed in (1.5, True, np.float32(2)):
        with pytest.raises(OptionError, match="not a whole number"):
            SamplingSettings(seed=seed)


def test_a_schedule_may_begin_a_rounding_error_above_one(model, conditioning):
    sigmas = torch.tensor([1.0000008, 0.5, 0.0])
    latents = run(model, conditioning, sigmas=sigmas)
    one = run(model, conditioning, sigmas=torch.tensor([1.0, 0.5, 0.0]))
    torch.testing.assert_close(latents, one, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "arguments", [(0,), (-1,), (4, 0.0), (4, float("nan")), (4, 7.0, 0.0), (4, 7.0, 1.5)]
)
def test_illegal_schedules_are_refused(arguments):
    with pytest.raises(OptionError, match="use"):
        get_sigmas(*arguments)


# --- guidance -----------------------------------------------------------------------------------


def test_plain_guidance_is_the_published_formula():
    v_pos, v_neg = torch.randn(2, 1, 16, 3, 4, 6)
    expected = v_neg + 6.0 * (v_pos - v_neg)
    torch.testing.assert_close(combine(v_pos, v_neg, Guidance()), expected)


def test_cfg_zero_star_projects_the_negative_on_the_positive():
    v_pos, v_neg = torch.randn(2, 2, 16, 3)
    got = combine(v_pos, v_neg, Guidance(cfg_zero_star=True))
    for i in range(2):
        alpha = (v_pos[i] * v_neg[i]).sum() / (v_neg[i].norm() ** 2 + 1e-8)
        expected = alpha * v_neg[i] + 6.0 * (v_pos[i] - alpha * v_neg[i])
        torch.testing.assert_close(got[i], expected)


def test_rescale_of_one_gives_the_positive_branchs_deviation():
    v_pos, v_neg = torch.randn(2, 2, 16, 300)
    got = combine(v_pos, v_neg, Guidance(guidance_rescale=1.0))
    torch.testing.assert_close(got.std((1, 2)), v_pos.std((1, 2)))
    half = combine(v_pos, v_neg, Guidance(guidance_rescale=0.5))
    torch.testing.assert_close(half, (got + combine(v_pos, v_neg, Guidance())) / 2)


@contextmanager
def counted(model):
    """A list that grows by one with every forward pass."""
    forwards = []
    hook = model.img_in.register_forward_hook(lambda *_: forwards.append(1))
    try:
        yield forwards
    finally:
        hook.remove()


@pytest.mark.parametrize(
    ("guidance", "forwards"),
    [
        (Guidance(), 8),
        (Guidance(true_cfg_scale=1.0), 4),
        (Guidance(cfg_end=0.5), 6),
        (Guidance(cfg_start=0.25, cfg_end=0.75), 6),
        (Guidance(zero_init_steps=1), 6),
    ],
)
def test_guidance_runs_the_negative_branch_only_where_it_counts(
    model, conditioning, guidance, forwards
):
    with counted(model) as made:
        run(model, conditioning, guidance=guidance)
    assert len(made) == forwards


def test_a_run_too_long_to_be_precomputed_leaves_room_for_conditioners(
    model, conditioning, monkeypatch
):
    from comfyui_skyreels.skyreels.sampling import sample as sampling

    placed, needed = sampling.placed, []

    def recorded(transformer, runtime, activation_bytes):
        needed.append(activation_bytes)
        return placed(transformer, runtime, activation_bytes)

    monkeypatch.setattr(sampling, "placed", recorded)
    run(model, conditioning)  # four steps of two branches
    for kept in (8, 7):
        monkeypatch.setattr(sampling, "MAX_KEPT", kept)
        run(model, conditioning)
    largest = max(sampling.weight_bytes(module) for module in model.conditioners)
    assert needed == [needed[0], needed[0], needed[0] + largest]


def test_cfg_of_one_ignores_the_negative_prompt(model, conditioning):
    plain = Guidance(true_cfg_scale=1.0)
    without = run(model, conditioning, negative=None, guidance=plain)
    assert torch.equal(run(model, conditioning, guidance=plain), without)


# --- the loop -----------------------------------------------------------------------------------


def test_noise_is_the_seeds_and_nothing_elses():
    expected = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(7))
    assert torch.equal(initial_noise(7, 9, 32, 48), expected)


def test_two_runs_are_bit_identical_and_another_seed_is_not(model, conditioning):
    first = run(model, conditioning)
    assert torch.equal(first, run(model, conditioning))
    assert not torch.equal(first, run(model, conditioning, seed=1))


def test_global_random_state_is_neither_used_nor_changed(model, conditioning):
    torch.manual_seed(1)
    first = run(model, conditioning)
    state = torch.random.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(first, run(model, conditioning))
    torch.manual_seed(1)
    assert torch.equal(state, torch.random.get_rng_state())


def test_progress_counts_steps_and_carries_the_denoised_estimate(model, conditioning):
    reports = []
    run(model, conditioning, runtime=TorchRuntime(on_progress=lambda *r: reports.append(r)))
    assert [r[:3] for r in reports] == [("sample", i, 4) for i in range(5)]
    assert reports[0][3] is None
    assert all(report[3].shape == (1, 16, 3, 4, 6) for report in reports[1:])


def test_custom_sigmas_are_used_as_given(model, conditioning):
    seen = []

    def spy(velocity, latents, sigmas, on_step):
        seen.append(sigmas)
        return euler(velocity, latents, sigmas, on_step)

    custom = torch.tensor([1.0, 0.7, 0.2, 0.0])
    run(model, conditioning, sigmas=custom, solver=spy)
    assert torch.equal(seen[0], custom)


def test_start_latents_are_mixed_with_noise_at_the_first_sigma(model, conditioning):
    start = torch.randn(conditioning.latent_shape)
    sigmas = get_sigmas(2, denoise=0.5)
    seen = []

    def spy(velocity, latents, sigmas, on_step):
        seen.append(latents)
        return latents

    run(model, conditioning, sigmas=sigmas, init_latents=start, solver=spy)
    noise = initial_noise(0, 9, 32, 48)
    expected = sigmas[0] * noise + (1 - sigmas[0]) * start * 0.476986
    torch.testing.assert_close(seen[0], expected)


def test_long_clips_change_with_riflex_and_short_ones_do_not(model):
    latents = torch.randn(1, 16, 1, 2, 2)
    long = ImageConditioning(latents, 16, 16, 241)
    short = ImageConditioning(latents, 16, 16, 97)
    two = get_sigmas(2)
    off = {"riflex_k": 0, "sigmas": two}
    assert not torch.equal(run(model, long, sigmas=two, riflex_k=1), run(model, long, **off))
    assert torch.equal(run(model, short, sigmas=two, riflex_k=1), run(model, short, **off))


def test_riflex_frequency_the_model_lacks_is_refused(model):
    long = ImageConditioning(torch.zeros(1, 16, 1, 2, 2), 16, 16, 241)
    with pytest.raises(OptionError, match=r"k 9 is not within 1\.\.2"):
        run(model, long, riflex_k=9)


class StopError(Exception):
    pass


def stop_after(checks: int) -> TorchRuntime:
    countdown = iter(range(10_000))

    def check() -> None:
        if next(countdown) == checks:
            raise StopError

    return TorchRuntime(on_check=check)


@pytest.fixture(scope="module")
def before(model):
    """Latents of a run before any is cancelled."""
    return run(model, a_picture())


@pytest.mark.parametrize("checks", [0, 3, 5, 17, 30])
def test_cancelled_run_stops_within_a_block_and_the_next_is_good(
    model, conditioning, before, checks
):
    with pytest.raises(StopError):
        run(model, conditioning, runtime=stop_after(checks))
    assert torch.equal(run(model, conditioning), before)


def test_interrupted_run_resumes_to_the_same_latents(model, conditioning, tmp_path):
    file = tmp_path / "state"
    whole = run(model, conditioning)
    with pytest.raises(StopError):
        run(model, conditioning, resume=file, runtime=stop_after(33))  # in the third step
    assert file.exists()
    with counted(model) as made:
        assert torch.equal(run(model, conditioning, resume=file), whole)
    assert len(made) == 4  # two steps of four
    # a run that fails after sampling, in the decoder say, loses nothing either
    with counted(model) as made:
        assert torch.equal(run(model, conditioning, resume=file), whole)
    assert made == []
    assert list(tmp_path.iterdir()) == [file]


def test_saved_step_of_other_inputs_is_refused_and_kept(model, conditioning, tmp_path):
    file = tmp_path / "state"
    with pytest.raises(StopError):
        run(model, conditioning, resume=file, runtime=stop_after(20))
    for other in ({"seed": 1}, {"prompt": NEGATIVE}, {"guidance": Guidance(5.0)}):
        with pytest.raises(OptionError, match="other settings"):
            run(model, conditioning, resume=file, **other)
    assert file.exists()


def test_damaged_saved_step_is_explained(model, conditioning, tmp_path):
    from comfyui_skyreels.skyreels.errors import CheckpointError

    file = tmp_path / "state"
    file.write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="delete it to start over"):
        run(model, conditioning, resume=file)


def test_resuming_needs_euler(model, conditioning, tmp_path):
    with pytest.raises(OptionError, match="Euler"):
        run(model, conditioning, resume=tmp_path / "x", solver=lambda *_: None)


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"negative": None}, OptionError, "needs a negative prompt"),
        ({"sigmas": torch.tensor([0.0, 1.0])}, OptionError, "falling"),
        ({"sigmas": torch.tensor([14.6, 0.0])}, OptionError, "flow"),
        ({"sigmas": torch.tensor([1.0])}, OptionError, "two numbers"),
        ({"init_latents": torch.zeros(1, 16, 3, 4, 4)}, ShapeError, r"\[1, 16, 3, 4, 4\]"),
        ({"prompt": PromptEmbeds(torch.zeros(1, 3, 9), torch.zeros(1, 12))}, TextError, "9"),
    ],
)
def test_illegal_settings_are_explained(model, conditioning, kwargs, error, words):
    with pytest.raises(error, match=words):
        run(model, conditioning, **kwargs)


def test_image_latents_of_another_size_are_refused(model):
    conditioning = ImageConditioning(torch.zeros(1, 16, 1, 4, 4), 48, 32, 9)
    with pytest.raises(ShapeError, match="48x32"):
        run(model, conditioning)


@pytest.mark.parametrize(
    "conditioning",
    [
        ImageConditioning(torch.zeros(16, 1, 4, 6), 48, 32, 9),
        ImageConditioning(torch.zeros(1, 4, 1, 4, 6), 48, 32, 9),
        ImageConditioning(torch.zeros(1, 16, 4, 4, 6), 48, 32, 9),
        ImageConditioning(torch.zeros(1, 16, 0, 4, 6), 48, 32, 9),
        ImageConditioning(torch.zeros(2, 16, 1, 4, 6), 48, 32, 9),
        ImageConditioning(torch.zeros(1, 16, 1, 4, 6), 48.0, 32, 9),
        ImageConditioning(torch.zeros(1, 16, 1, 4, 6), 48, 32, 10),
        ImageConditioning(torch.full((1, 16, 1, 4, 6), torch.nan), 48, 32, 9),
        ImageConditioning(torch.zeros(1, 16, 1, 4, 6).tolist(), 48, 32, 9),
    ],
)
def test_a_misshaped_picture_is_refused_before_any_work(model, conditioning):
    with counted(model) as made, pytest.raises(ShapeError):
        run(model, conditioning)
    assert made == []


@pytest.mark.parametrize(
    "mask", [torch.ones(1, 1, 3, 4, 4), torch.ones(1, 3, 4, 6), torch.ones(1, 2, 3, 4, 6)]
)
def test_a_misshaped_noise_mask_is_refused(model, conditioning, mask):
    with pytest.raises(ShapeError, match="noise mask is"):
        run(model, conditioning, noise_mask=mask)


def test_a_noise_mask_keeps_the_start_where_it_is_zero(model, conditioning):
    start = torch.randn(conditioning.latent_shape)
    mask = torch.ones(1, 1, 3, 4, 6)
    mask[..., :2] = 0
    latents = run(model, conditioning, init_latents=start, noise_mask=mask)
    torch.testing.assert_close(latents[..., :2], start[..., :2])
    everything = run(model, conditioning, init_latents=start, noise_mask=torch.ones(1, 1, 3, 4, 6))
    torch.testing.assert_close(everything, run(model, conditioning, init_latents=start))


@pytest.mark.parametrize(
    ("end", "frames", "words"),
    [
        (torch.zeros(1, 16, 2, 4, 6), 9, r"\[1, 16, 1, 4, 6\].*got \[1, 16, 2, 4, 6\]"),
        (torch.zeros(2, 16, 1, 4, 6), 9, r"got \[2, 16, 1, 4, 6\]"),
        ("a picture", 9, "got str"),
        (torch.full((1, 16, 1, 4, 6), torch.inf), 9, "end picture's latents hold NaN or infinity"),
        (torch.zeros(1, 16, 1, 4, 6), 1, "use at least 5 frames"),
    ],
)
def test_a_misshaped_end_picture_is_refused(model, end, frames, words):
    clip = ImageConditioning(torch.zeros(1, 16, 1, 4, 6), 48, 32, frames, end)
    with pytest.raises(ShapeError, match=words):
        run(model, clip)


def test_the_network_sees_the_end_picture_at_the_last_latent_frame(model, conditioning):
    end = torch.randn(1, 16, 1, 4, 6, generator=torch.Generator().manual_seed(8))
    seen = []
    watch = model.img_in.register_forward_pre_hook(lambda _, args: seen.append(args[0][:, 16:]))
    try:
        latents = run(model, replace(conditioning, end_latents=end))
    finally:
        watch.remove()
    assert len(seen) == 8
    for each in seen:
        assert torch.equal(each[:, :, :1], conditioning.image_latents)
        assert not each[:, :, 1:-1].any()
        assert torch.equal(each[:, :, -1:], end)
    assert not torch.equal(latents, run(model, conditioning))


def test_latents_that_are_not_finite_are_reported(conditioning):
    model = tiny.transformer()
    model.final_layer.linear.weight.data.fill_(1e38)
    with counted(model) as made, pytest.raises(ShapeError, match="NaN or infinity after step 1 of"):
        run(model, conditioning)
    assert len(made) == 2  # of eight


def test_the_first_step_that_is_not_finite_ends_the_run_and_is_named(conditioning):
    model = tiny.transformer()
    model.half_way = 0

    def overflow(module, args, output):
        model.half_way += 1
        return output * torch.inf if model.half_way == 5 else output

    model.final_layer.register_forward_hook(overflow)
    saved = []
    with counted(model) as made, pytest.raises(ShapeError, match="after step 3 of 4"):
        run(
            model, conditioning,
            runtime=TorchRuntime(on_progress=lambda stage, done, *_: saved.append(done)),
        )  # fmt: skip
    assert len(made) == 6
    assert max(saved) == 2


NO_CHANGE = Lora(Path("none.safetensors"), "", "", (), 0, (), ())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "check the checkpoint"),
        ({"loras": (AppliedLora(NO_CHANGE, 0.5),)}, "take off the LoRA"),
        ({"cache": CACHES["easy"]}, "switch the cache off"),
        ({"attention": "fast"}, "use exact attention"),
        ({"guidance": Guidance(50.0)}, "lower CFG 50"),
    ],
)
def test_what_may_have_made_nan_is_named_with_its_remedy(settings, words):
    model = tiny.transformer()
    assert words in suspects(model, SamplingSettings(**settings))
    assert ("LoRA" in words) == ("LoRA" in suspects(model, SamplingSettings(**settings)))
    assert "float16, whose numbers end at 65504" in suspects(model.half(), SamplingSettings())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_this_gpu_the_watch_never_makes_the_host_wait():
    device = torch.device("cuda:0")
    latents = torch.zeros(1, 16, 3, 4, 6, device=device)
    watch = FiniteWatch(4, device, "why")
    with no_wait_for_the_gpu():
        for step in range(1, 4):
            watch.note(step, latents)
    with pytest.raises(ShapeError, match="after step 4 of 4"):  # at the latest when it is over
        watch.note(4, latents * torch.nan)
        watch.finish(latents * torch.nan)


# --- branches block by block ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("guidance", "alone"),
    [
        (Guidance(), 0),
        (Guidance(guidance_rescale=0.5, cfg_zero_star=True), 0),
        (Guidance(cfg_start=0.25, cfg_end=0.75), 2),
        (Guidance(zero_init_steps=1, cfg_end=0.5), 2),
    ],
)
def test_branches_run_block_by_block_where_both_are_needed_and_give_the_same_bits(
    model, guidance, alone
):
    shape = (1, 16, 3, 4, 6)
    generator = torch.Generator().manual_seed(3)
    latents, image_latents = torch.randn(2, *shape, generator=generator)
    with torch.inference_mode():
        lookup = precompute(
            model, [PROMPT, NEGATIVE], (SIGMAS[:-1] * 1000).tolist(), torch.tensor([1000.0]),
            attention=torch.nn.functional.scaled_dot_product_attention, runtime=RUNTIME,
        )  # fmt: skip

        def made(interleaves):
            """The result, and how often in a row the first block was called."""
            calls = []

            def run_block(block, *args):
                calls.append(block is model.blocks[0])
                return block(*args)

            velocity = guided_velocity(
                Network(model, DenseRun(sdpa), lookup, image_latents, ROPE, run_block), SIGMAS,
                guidance, interleaves=interleaves,
            )  # fmt: skip
            result = euler(velocity, latents, SIGMAS, lambda *_: None)
            runs = "".join("x" if first else " " for first in calls).split()
            return result, [len(run) for run in runs]

        (plain, one_by_one), (interleaved, in_a_row) = made(False), made(True)
    assert torch.equal(plain, interleaved)
    assert set(one_by_one) == {1}
    assert sorted(in_a_row) == [1] * alone + [2] * ((len(one_by_one) - alone) // 2)


# --- a loop that waits for nothing ----------------------------------------------------------------

META = torch.device("meta")
REFINED = Guidance(guidance_rescale=0.5, cfg_zero_star=True, cfg_end=0.9)


def precomputed_on_meta(model, sigmas=SIGMAS):
    """A model of shapes only, standing for one on a GPU, and the lookup of its run, on the CPU.

    Reading a value of a shape-only tensor on the host raises; copying one to it does not.
    """
    runtime = TorchRuntime()
    lookup = precompute(
        model, [PROMPT, NEGATIVE], (sigmas[:-1] * 1000).tolist(), torch.tensor([1000.0]),
        attention=torch.nn.functional.scaled_dot_product_attention, runtime=runtime,
    )  # fmt: skip
    runtime.device = META
    return tiny.transformer().to(model.compute_dtype).to(META), lookup, runtime


@pytest.mark.parametrize(
    ("dtype", "interleaves"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)],
)
@pytest.mark.parametrize("guidance", [Guidance(), REFINED, Guidance(zero_init_steps=1)])
def test_the_euler_loop_reads_nothing_from_the_device_and_copies_once_a_forward(
    guidance, dtype, interleaves
):
    with torch.inference_mode():
        on_meta, lookup, _ = precomputed_on_meta(tiny.transformer().to(dtype))
        shape = (1, 16, 3, 4, 6)
        rope = rope_table(on_meta.token_grid(shape), on_meta.config, device=META)
        velocity = guided_velocity(
            Network(
                on_meta, DenseRun(sdpa), lookup, torch.empty(shape, device=META), rope, call
            ),
            SIGMAS, guidance, interleaves=interleaves,
        )  # fmt: skip
        steps, copied = [], []

        def on_step(step, latents, denoised):
            steps.append((step, latents.shape, denoised.device))
            copied.append((len(waits.to_device), len(forwards)))

        with counted(on_meta) as forwards, Waits() as waits:
            latents = euler(velocity, torch.empty(shape, device=META), SIGMAS, on_step)
    assert latents.is_meta and latents.shape == shape
    assert steps == [(step, shape, META) for step in range(4)]
    assert waits.reads == [] and waits.to_host == []
    # what a forward needs is copied in one piece, and nothing else is
    assert len(forwards) >= 6 and all(copies == made for copies, made in copied)
    assert all(len(copy_shape) == 1 for _, copy_shape in waits.to_device)


def test_a_whole_run_reads_the_device_once_after_its_last_step(conditioning, monkeypatch):
    from comfyui_skyreels.skyreels.sampling import sample as sampling

    model = tiny.transformer()
    on_meta, lookup, runtime = precomputed_on_meta(model)
    monkeypatch.setattr(sampling, "precompute", lambda *_, **__: lookup)
    waits, seen = Waits(), []
    runtime._on_progress = lambda stage, done, *_: seen.append((done, len(waits.reads)))
    with waits, suppress(RuntimeError):
        run(on_meta, conditioning, runtime=runtime)
    assert seen == [(done, 0) for done in range(5)]
    assert len(waits.reads) == 1 and waits.to_host == []  # whether the latents are finite
    # the picture, the noise, and eight forwards
    assert len(waits.to_device) == 10


@pytest.mark.parametrize("inference", [False, True])
def test_the_counter_sees_what_it_is_there_to_see(inference):
    device, host = torch.ones(3, device=META), torch.ones(3)
    reads = [
        lambda: device[0].item(), lambda: float(device[0]), lambda: bool(device[0]),
        lambda: 1 if device.any() else 2, lambda: torch.equal(device, device),
        lambda: device[device > 0], device.nonzero,
    ]  # fmt: skip
    to_host = [
        device.cpu, lambda: device.to("cpu", torch.float64), lambda: host.clone().copy_(device),
        lambda: device.to(host), device.tolist,
    ]  # fmt: skip
    to_device = [
        lambda: host.to(META, non_blocking=True), lambda: device.copy_(host),
        lambda: host.to(device), lambda: host.to(device="meta", dtype=torch.float16),
    ]  # fmt: skip
    if inference:
        to_device.append(lambda: torch.tensor([1.0], device=META))
    nothing = [
        lambda: host[0] * device, lambda: float(host[0]), lambda: torch.equal(host, host),
        lambda: host.to(torch.float64), lambda: device.to(torch.float64), host.cpu,
        lambda: device.to(META), lambda: device.clone().copy_(device), lambda: host.copy_(host),
    ]  # fmt: skip
    for group, planted in (
        ("reads", reads), ("to_host", to_host), ("to_device", to_device), (None, nothing),
    ):  # fmt: skip
        for index, act in enumerate(planted):
            seen = Waits()
            with torch.inference_mode(inference), seen, suppress(RuntimeError, NotImplementedError):
                act()
            found = {name for name in ("reads", "to_host", "to_device") if getattr(seen, name)}
            assert found == ({group} if group else set()), (group, index)


def test_a_solver_with_sigmas_of_the_device_pays_for_itself_and_euler_does_not():
    """The planted read: what the loop would do if its sigmas were moved to the device."""
    on_meta, lookup, _ = precomputed_on_meta(tiny.transformer())
    shape = (1, 16, 3, 4, 6)
    velocity = guided_velocity(
        Network(
            on_meta, DenseRun(sdpa), lookup, torch.empty(shape, device=META),
            rope_table(on_meta.token_grid(shape), on_meta.config, device=META), call,
        ),
        SIGMAS, Guidance(),
    )  # fmt: skip
    for sigma, waited in ((SIGMAS[0], 0), (SIGMAS.to(META)[0], 1)):
        with Waits() as waits, suppress(NotImplementedError):
            velocity(torch.empty(shape, device=META), sigma)
        assert len(waits.reads) + len(waits.to_host) == waited


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_this_gpu_a_step_never_makes_the_host_wait(model):
    runtime, shape = TorchRuntime("cuda"), (1, 16, 3, 4, 6)
    with torch.inference_mode():
        on_gpu = tiny.transformer().to(runtime.device)
        lookup = precompute(
            on_gpu, [PROMPT, NEGATIVE], (SIGMAS[:-1] * 1000).tolist(), torch.tensor([1000.0]),
            attention=torch.nn.functional.scaled_dot_product_attention, runtime=runtime,
        )  # fmt: skip
        velocity = guided_velocity(
            Network(
                on_gpu, DenseRun(sdpa), lookup, torch.zeros(shape, device=runtime.device),
                rope_table(on_gpu.token_grid(shape), on_gpu.config, device=runtime.device), call,
            ),
            SIGMAS, REFINED,
        )  # fmt: skip
        latents = torch.zeros(shape, device=runtime.device)
        euler(velocity, latents, SIGMAS, lambda *_: None)  # self-tests read their results
        with no_wait_for_the_gpu():
            euler(velocity, latents, SIGMAS, lambda *_: None)


# --- the whole pipeline -------------------------------------------------------------------------


@torch.inference_mode()
def reference_latents(model, vae_state, image, *, height, width, num_frames, steps, padding):
    """diffusers' modules driven by the reference procedure: nothing of ours but the fit."""
    from diffusers import AutoencoderKLHunyuanVideo, FlowMatchEulerDiscreteScheduler

    vae = AutoencoderKLHunyuanVideo(
        block_out_channels=tiny.VAE.block_out_channels, layers_per_block=1, latent_channels=16
    ).eval()
    vae.load_state_dict(vae_state)
    transformer = tiny.diffusers_transformer(model)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.0, steps + 1)[:-1])
    shape = (1, 16, (num_frames - 1) // 4 + 1, height // 8, width // 8)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(11))
    encoded = vae.encode(fit_image(image, width, height)).latent_dist.mode() * 0.476986
    image_latents = torch.cat([encoded, encoded.new_zeros(1, 16, shape[2] - 1, *shape[3:])], dim=2)

    def predict(timestep, text):
        states = torch.nn.functional.pad(text.prompt_embeds, (0, 0, 0, padding))
        mask = torch.zeros(states.shape[:2], dtype=torch.long)
        mask[:, : text.prompt_embeds.shape[1]] = 1
        return transformer(
            torch.cat([latents, image_latents], dim=1), timestep[None], states, mask,
            text.pooled_prompt_embeds, torch.tensor([1000.0]), return_dict=False,
        )[0]  # fmt: skip

    for timestep in scheduler.timesteps:
        v_pos, v_neg = predict(timestep, PROMPT), predict(timestep, NEGATIVE)
        velocity = v_neg + 6.0 * (v_pos - v_neg)
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    return latents


def test_pipeline_equals_diffusers_modules_driven_by_the_reference_procedure(model, monkeypatch):
    from comfyui_skyreels.skyreels import pipeline

    vae = tiny.randomize(VideoVAE(tiny.VAE))
    image = torch.rand(1, 40, 50, 3)
    size = {"height": 32, "width": 48, "num_frames": 9}
    expected = reference_latents(model, vae.state_dict(), image, **size, steps=6, padding=5)
    decoded = []
    decode = pipeline.decode_frames
    monkeypatch.setattr(
        pipeline, "decode_frames",
        lambda vae, latents, *a, **k: decoded.append(latents) or decode(vae, latents, *a, **k),
    )  # fmt: skip
    frames = image_to_video(
        model, vae, image, PROMPT, NEGATIVE, SamplingSettings(seed=11, sigmas=get_sigmas(6)),
        **size, runtime=RUNTIME,
    )  # fmt: skip
    assert tiny.relative_error(decoded[0] * 0.476986, expected) <= 1e-4
    assert frames.shape == (9, 32, 48, 3)
    assert frames.dtype == torch.float32
    assert 0.0 <= frames.min() < frames.max() <= 1.0


@pytest.fixture(scope="module")
def text_model():
    return tiny.transformer(replace(tiny.TRANSFORMER, in_channels=16))


def test_text_to_video_equals_diffusers_own_pipeline(text_model, monkeypatch):
    """HunyuanVideoPipeline with true CFG 6, embedded guidance 1, shift 7, as the authors call it.

    Its padded texts are masked, ours are trimmed.
    """
    from comfyui_skyreels.skyreels import pipeline
    from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline

    size = {"height": 32, "width": 48, "num_frames": 9}
    theirs = HunyuanVideoPipeline(
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, vae=None,
        transformer=tiny.diffusers_transformer(text_model),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )  # fmt: skip
    theirs.vae_scale_factor_temporal, theirs.vae_scale_factor_spatial = 4, 8
    theirs.set_progress_bar_config(disable=True)
    texts = {}
    for name, text in (("", PROMPT), ("negative_", NEGATIVE)):
        tokens = text.prompt_embeds.shape[1]
        texts[f"{name}prompt_embeds"] = torch.nn.functional.pad(
            text.prompt_embeds, (0, 0, 0, 10 - tokens), value=3.0
        )
        texts[f"{name}prompt_attention_mask"] = (torch.arange(10) < tokens).long()[None]
        texts[f"{name}pooled_prompt_embeds"] = text.pooled_prompt_embeds
    expected = theirs(
        **texts, **size, num_inference_steps=6, guidance_scale=1.0, true_cfg_scale=6.0,
        generator=torch.Generator().manual_seed(11), output_type="latent", return_dict=False,
    )[0]  # fmt: skip
    decoded = []
    decode = pipeline.decode_frames
    monkeypatch.setattr(
        pipeline, "decode_frames",
        lambda vae, latents, *a, **k: decoded.append(latents) or decode(vae, latents, *a, **k),
    )  # fmt: skip
    vae = tiny.randomize(VideoVAE(tiny.SMALL_VAE))
    frames = image_to_video(
        text_model, vae, None, PROMPT, NEGATIVE, SamplingSettings(seed=11, sigmas=get_sigmas(6)),
        **size, runtime=RUNTIME,
    )  # fmt: skip
    assert tiny.relative_error(decoded[0] * 0.476986, expected) <= 1e-4
    assert frames.shape == (9, 32, 48, 3)


def test_a_picture_is_given_where_the_transformer_takes_one_and_nowhere_else(
    model, text_model, conditioning
):
    size = ImageConditioning(None, 48, 32, 9)
    assert size.padded() is None
    assert run(text_model, size).shape == size.latent_shape
    with pytest.raises(OptionError, match="16 input channels.* takes no picture"):
        run(text_model, conditioning)
    with pytest.raises(OptionError, match="32 input channels.* needs a picture"):
        run(model, size)
    vae = tiny.randomize(VideoVAE(tiny.SMALL_VAE))
    settings = SamplingSettings(sigmas=SIGMAS)
    for each, image in ((text_model, torch.rand(1, 32, 48, 3)), (model, None)):
        with pytest.raises(OptionError, match="picture"):
            image_to_video(each, vae, image, PROMPT, NEGATIVE, settings, runtime=RUNTIME)


@pytest.mark.parametrize("cache", ["easy", "first-block"])
def test_text_to_video_runs_with_every_cache_and_resumes(text_model, tmp_path, cache):
    from comfyui_skyreels.skyreels.sampling.step_cache import CACHES

    size = ImageConditioning(None, 48, 32, 9)
    assert bool(run(text_model, size, cache=CACHES[cache]).isfinite().all())
    with pytest.raises(StopError):
        run(text_model, size, resume=tmp_path / "state", runtime=stop_after(33))
    assert torch.equal(run(text_model, size, resume=tmp_path / "state"), run(text_model, size))


def test_pipeline_is_deterministic_to_the_last_bit(model):
    vae = tiny.randomize(VideoVAE(tiny.SMALL_VAE))
    image = torch.rand(1, 32, 32, 3)
    size = {"height": 32, "width": 32, "num_frames": 5}
    settings = SamplingSettings(sigmas=get_sigmas(2))
    first, second = (
        image_to_video(model, vae, image, PROMPT, NEGATIVE, settings, **size, runtime=RUNTIME)
        for _ in range(2)
    )
    assert torch.equal(first, second)


# --- saved steps that cannot be ------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp8", "int8", "bf16"])
def test_a_saved_step_of_another_precision_is_refused(conditioning, tmp_path, precision):
    from comfyui_skyreels.skyreels.weights.load import load_transformer

    path = tiny.save(tmp_path / "x.safetensors", tiny.transformer().state_dict())
    models = {p: load_transformer(path, precision=p, runtime=TorchRuntime())
              for p in ("fp8", "int8", "bf16")}  # fmt: skip
    file = tmp_path / "state"
    with pytest.raises(StopError):
        run(models.pop(precision), conditioning, resume=file, runtime=stop_after(20))
    for other in models.values():
        with pytest.raises(OptionError, match="or weights"):
            run(other, conditioning, resume=file)


@pytest.mark.parametrize("damage", ["step -1", "step 99", "int32", "nan"])
def test_a_saved_step_that_cannot_be_is_refused(model, conditioning, tmp_path, damage):
    from comfyui_skyreels.skyreels.errors import CheckpointError
    from safetensors import safe_open
    from safetensors.torch import save_file

    file = tmp_path / "state"
    with pytest.raises(StopError):
        run(model, conditioning, resume=file, runtime=stop_after(20))
    with safe_open(file, "pt") as saved:
        metadata, latents = saved.metadata(), saved.get_tensor("latents").clone()
    if damage.startswith("step"):
        metadata["step"] = damage.split()[1]
    latents = (
        latents.int() if damage == "int32" else latents * (torch.nan if damage == "nan" else 1)
    )
    save_file({"latents": latents}, file, metadata)
    with pytest.raises(CheckpointError, match="damaged"):
        run(model, conditioning, resume=file)


def test_a_place_that_cannot_be_written_is_found_before_the_first_step(
    model, conditioning, tmp_path
):
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "fifo")
    for place in ("file/state", "fifo", "nul\0", "x" * 300):
        with (
            counted(model) as made,
            pytest.raises(OptionError, match="choose another place|not a file"),
        ):
            run(model, conditioning, resume=tmp_path / place)
        assert made == []
    run(model, conditioning, resume=tmp_path / "new" / "folder" / "state")


def test_a_disk_that_fills_up_costs_the_saved_step_and_not_the_run(
    model, conditioning, tmp_path, monkeypatch, caplog
):
    from comfyui_skyreels.skyreels.sampling import resume

    save, calls = resume.save_state, []

    def fail(*args):
        calls.append(args)
        if len(calls) > 2:
            raise OSError(28, "No space left on device")
        save(*args)

    monkeypatch.setattr(resume, "save_state", fail)
    assert torch.equal(
        run(model, conditioning, resume=tmp_path / "state"), run(model, conditioning)
    )
    assert "No space left" in caplog.text


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"riflex_k": -1}, "riflex_k must be >= 0, got -1"),
        ({"add_noise": False}, "clip to continue"),
        ({"sigmas": torch.tensor([1.01, 0.0])}, "from 1.00999999 to 0"),
        ({"seed": 2**64}, "Seed 18446744073709551616"),
        ({"sigmas": torch.tensor([1.0, float("nan"), 0.0])}, "NaN"),
        ({"sigmas": [1.0, 0.0]}, "must be a tensor"),
        ({"noise_index": -1}, "noise_index"),
    ],
)
def test_numbers_out_of_range_are_refused(kwargs, words):
    with pytest.raises(OptionError, match=words):
        SamplingSettings(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"true_cfg_scale": 1e39}, "CFG 1e\\+39 is not within 0..100"),
        ({"true_cfg_scale": -1.0}, "CFG -1.0"),
        ({"guidance_scale": 1e39}, "Embedded guidance 1e\\+39"),
        ({"zero_init_steps": -1}, "zero_init_steps must be >= 0, got -1"),
        ({"cfg_start": 0.6, "cfg_end": 0.4}, "0.6..0.4"),
        ({"guidance_rescale": 2.0}, "rescale 2.0"),
        ({"true_cfg_scale": float("nan")}, "CFG nan"),
    ],
)
def test_guidance_out_of_range_is_refused(kwargs, words):
    with pytest.raises(OptionError, match=words):
        Guidance(**kwargs)


@pytest.mark.parametrize("arguments", [(1001,), (10**11,), (30, 1e9), (30, 1e-308), (30, -7.0)])
def test_schedules_out_of_range_are_refused(arguments):
    with pytest.raises(OptionError, match="is not within|are not within"):
        get_sigmas(*arguments)


def test_rescaling_constant_velocities_stays_finite():
    constant = torch.ones(1, 16, 3, 4, 6)
    assert bool(combine(constant, constant, Guidance(guidance_rescale=0.7)).isfinite().all())
