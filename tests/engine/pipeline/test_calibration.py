"""The clips of a calibration: what they are made of, how long they should take, what is kept."""

from dataclasses import replace

import pytest
import torch
from comfyui_skyreels.skyreels.config import Guidance
from comfyui_skyreels.skyreels.errors import OptionError
from comfyui_skyreels.skyreels.image import example_image
from comfyui_skyreels.skyreels.pipeline.calibration import (
    DEFAULT_CLIPS,
    Case,
    Size,
    Target,
    calibrate,
    drawn_image,
    drawn_prompts,
    expected_seconds,
    unfinished_place,
)
from comfyui_skyreels.skyreels.plan import rates_needed, weights_of
from comfyui_skyreels.skyreels.runtime import TorchRuntime, outcomes
from comfyui_skyreels.skyreels.sampling.settings import SamplingSettings, get_sigmas
from comfyui_skyreels.skyreels.vae.model import VideoVAE
from support import tiny
from support.tiny import embeds

SIZE = Size(48, 32, 9)


def test_each_drawn_prompt_has_a_picture_of_its_own():
    prompts = drawn_prompts()
    assert len(prompts) == 2 * DEFAULT_CLIPS == len(set(prompts))
    pictures = [drawn_image(index, 64, 48) for index in range(len(prompts))]
    assert all(picture.shape == (1, 48, 64, 3) for picture in pictures)
    assert all(float(p.min()) >= 0 and float(p.max()) <= 1 for p in pictures)
    assert len({bytes(p.numpy().tobytes()) for p in pictures}) == len(prompts)
    assert torch.equal(drawn_image(len(prompts), 64, 48), pictures[0])
    assert prompts[0] == "a red circle moves left"
    assert torch.equal(pictures[0], example_image(64, 48))


def test_the_time_of_a_clip_is_told_where_the_device_is_known(tmp_path):
    model, runtime = tiny.transformer(), TorchRuntime(state_folder=tmp_path)
    settings = SamplingSettings(sigmas=get_sigmas(20))
    assert expected_seconds(model, settings, SIZE, runtime) is None
    rates = dict.fromkeys(rates_needed([weights_of(model).gemm]), 1e9)
    outcomes.remember(tmp_path, outcomes.device_key(runtime.device), "rates", rates)
    seconds = expected_seconds(model, settings, SIZE, runtime)
    assert seconds is not None
    single = SamplingSettings(sigmas=get_sigmas(20), guidance=Guidance(1.0))
    half = expected_seconds(model, single, SIZE, runtime)
    assert half == pytest.approx(seconds / 2, rel=0.2)


def start(place, tell):
    model = tiny.transformer(replace(tiny.TRANSFORMER, in_channels=16))
    settings = SamplingSettings(sigmas=get_sigmas(6), guidance=Guidance(1.0))
    case = Case(embeds(5, 1), None, None, 3)
    return calibrate(
        model,
        tiny.randomize(VideoVAE(tiny.VAE)),
        [case],
        [case],
        settings,
        SIZE,
        passes=6.0,
        target=Target("x", "f" * 64, place, {"steps": 6}),
        runtime=TorchRuntime(),
        tell=tell,
    )


def test_without_guidance_or_picture_a_clip_takes_one_evaluation_a_step(tmp_path):
    told = []
    made = start(tmp_path / "x.cache.json", told.append)
    assert made.passes_of == 6
    assert (made.replayed.clips, made.measured.clips) == (1, 1)
    # nothing need be skipped for six of six evaluations, so the run with the cache is the exact one
    assert made.measured.passes == made.replayed.passes <= 6
    assert told[0] == "3 clips; how long one takes here is told after the first."
    assert told[1] == "Clip 1 of 1"
    assert told[2].startswith("Check 1 of 1, exact, ")


def test_a_damaged_state_is_one_sentence(tmp_path):
    place = tmp_path / "x.cache.json"
    unfinished_place(place).write_text("{")
    with pytest.raises(OptionError, match="is damaged: delete it to start over"):
        start(place, lambda _: None)
