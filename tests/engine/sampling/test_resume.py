"""What a saved step belongs to: the fingerprint of a run."""

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from comfyui_skyreels.skyreels.conditioning.embeds import PromptEmbeds
from comfyui_skyreels.skyreels.conditioning.latents import ImageConditioning
from comfyui_skyreels.skyreels.config import ContextWindows, FreSca, Guidance, SkipLayers
from comfyui_skyreels.skyreels.sampling.resume import NOT_IN_FINGERPRINT, fingerprint_run
from comfyui_skyreels.skyreels.sampling.settings import SamplingSettings, euler
from comfyui_skyreels.skyreels.sampling.step_cache import CacheConfig
from support import tiny


def ramp(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel()).reshape(shape) / 64


CONFIG = tiny.TRANSFORMER
IMAGE = ImageConditioning(ramp(1, 16, 1, 4, 6), 48, 32, 9)
PROMPT, NEGATIVE = (
    PromptEmbeds(
        sign * ramp(1, tokens, CONFIG.text_embed_dim), sign * ramp(1, CONFIG.pooled_projection_dim)
    )
    for sign, tokens in ((1, 7), (-1, 4))
)
START = ramp(1, 16, 3, 4, 6)
SETTINGS = SamplingSettings(sigmas=torch.tensor([1.0, 0.75, 0.25, 0.0]), init_latents=START)
#: for each field that decides the result, another value
OTHERS = {
    "seed": 1,
    "sigmas": torch.tensor([1.0, 0.75, 0.5, 0.0]),
    "guidance": Guidance(5.0),
    "init_latents": START + 1,
    "add_noise": False,
    "riflex_k": 0,
    "cache": CacheConfig("easy", 0.05),
    "attention": "fast",
    "noise_index": 1,
    "noise_mask": torch.ones(1, 1, 3, 4, 6),
    "windows": ContextWindows(2, 1),
}
OTHER_GUIDANCE = {
    "true_cfg_scale": 5.0,
    "guidance_scale": 2.0,
    "cfg_start": 0.1,
    "cfg_end": 0.9,
    "guidance_rescale": 0.5,
    "cfg_zero_star": True,
    "zero_init_steps": 1,
    "skip_layers": SkipLayers((1,)),
    "fresca": FreSca(),
}


@pytest.fixture(scope="module")
def model():
    model = tiny.transformer()
    for index, parameter in enumerate(model.parameters()):
        parameter.data.fill_(index / 8)
    return model


def names(settings: object) -> set[str]:
    return {each.name for each in fields(settings)}


def test_a_new_option_must_be_considered_here():
    # a field that is missing here decides the result: add it to OTHERS. It changes every
    # fingerprint, so add it after the other fields, and only if it is set, if saved steps of
    # earlier versions shall still be found
    assert OTHERS.keys() | NOT_IN_FINGERPRINT == names(SETTINGS)
    assert OTHER_GUIDANCE.keys() == names(Guidance())


@pytest.mark.parametrize("name", OTHERS)
def test_every_setting_that_decides_the_result_changes_the_fingerprint(model, name):
    inputs = (model, IMAGE, PROMPT, NEGATIVE)
    other = replace(SETTINGS, **{name: OTHERS[name]})
    assert fingerprint_run(*inputs, other) != fingerprint_run(*inputs, SETTINGS)


@pytest.mark.parametrize("name", OTHER_GUIDANCE)
def test_every_value_of_guidance_changes_the_fingerprint(model, name):
    inputs = (model, IMAGE, PROMPT, NEGATIVE)
    guidance = replace(SETTINGS.guidance, **{name: OTHER_GUIDANCE[name]})
    other = replace(SETTINGS, guidance=guidance)
    assert fingerprint_run(*inputs, other) != fingerprint_run(*inputs, SETTINGS)


def test_an_end_picture_changes_the_fingerprint(model):
    end = torch.zeros(1, 16, 1, 4, 6)
    images = (IMAGE, replace(IMAGE, end_latents=end), replace(IMAGE, end_latents=end + 1))
    assert len({fingerprint_run(model, i, PROMPT, NEGATIVE, SETTINGS) for i in images}) == 3


def test_where_steps_are_saved_does_not_change_the_fingerprint(model, tmp_path):
    inputs = (model, IMAGE, PROMPT, NEGATIVE)
    other = replace(SETTINGS, resume=Path(tmp_path), solver=euler)
    assert fingerprint_run(*inputs, other) == fingerprint_run(*inputs, SETTINGS)


@pytest.mark.parametrize(
    ("negative", "settings", "fingerprint"),
    [
        (NEGATIVE, {}, "428d58611de4e43780a7ff488a566fcb19fdf8a4102f932af6605b192f72cf39"),
        (
            None,
            {
                "seed": 7,
                "guidance": Guidance(1.0, 2.0, guidance_rescale=0.5),
                "init_latents": START,
                "add_noise": False,
                "riflex_k": 0,
                "cache": CacheConfig("easy", 0.05),
                "attention": "fast",
            },
            "83372daa336120cc70e936c15bbb16256f649ec4ac11be33105da013b076e427",
        ),
        (
            NEGATIVE,
            {"attention": lambda query, key, value: query},
            "2f8bf7563b322c3d3f417b881cc6bb67c49921d2d8a2230b4360c659e2db49ab",
        ),
    ],
    ids=["defaults", "all others", "own attention"],
)
def test_steps_saved_before_there_was_a_settings_object_are_found(
    model, negative, settings, fingerprint
):
    # written down from the version that hashed its arguments one by one
    settings = SamplingSettings(sigmas=SETTINGS.sigmas, **settings)
    assert fingerprint_run(model, IMAGE, PROMPT, negative, settings) == fingerprint
