"""The transformer against diffusers' class with the same weights."""

import math
from dataclasses import replace

import pytest
import torch
from comfyui_skyreels.skyreels.config import CHUNKINGS, TransformerConfig
from comfyui_skyreels.skyreels.errors import ShapeError
from comfyui_skyreels.skyreels.transformer.layers import (
    intrinsic_frequency,
    riflex_frequency,
    rope_table,
)
from comfyui_skyreels.skyreels.transformer.model import SkyReelsTransformer
from support import tiny


def diffusers_forward(theirs, inputs, padding: int = 0):
    states = inputs["encoder_hidden_states"]
    mask = torch.ones(states.shape[:2], dtype=torch.long)
    if padding:
        garbage = torch.randn(states.shape[0], padding, states.shape[2])
        states = torch.cat([states, garbage], dim=1)
        mask = torch.cat([mask, torch.zeros(states.shape[0], padding, dtype=torch.long)], dim=1)
    kwargs = {**inputs, "encoder_hidden_states": states, "encoder_attention_mask": mask}
    return theirs(**kwargs, return_dict=False)[0]


@pytest.mark.parametrize("text_tokens", [1, 2, 7, 77, 256])
@pytest.mark.parametrize("grid", [(1, 2, 2), (3, 6, 10), (5, 14, 4)])
def test_forward_equals_diffusers(text_tokens, grid):
    model = tiny.transformer()
    inputs = tiny.inputs(model.config, text_tokens, grid)
    expected = diffusers_forward(tiny.diffusers_transformer(model), inputs)
    assert tiny.relative_error(model(**inputs), expected) <= 1e-5


def test_trimmed_text_equals_padded_and_masked_text():
    model = tiny.transformer()
    inputs = tiny.inputs(model.config, text_tokens=5)
    expected = diffusers_forward(tiny.diffusers_transformer(model), inputs, padding=11)
    assert tiny.relative_error(model(**inputs), expected) <= 1e-5


def test_batch_of_two_equals_diffusers():
    model = tiny.transformer()
    inputs = tiny.inputs(model.config, batch=2)
    inputs["timestep"] = torch.tensor([900.0, 333.25])
    expected = diffusers_forward(tiny.diffusers_transformer(model), inputs)
    assert tiny.relative_error(model(**inputs), expected) <= 1e-5


def test_model_without_guidance_embedding_equals_diffusers():
    config = TransformerConfig(**{**tiny.TRANSFORMER.__dict__, "guidance_embeds": False})
    model = tiny.transformer(config)
    inputs = {**tiny.inputs(config), "guidance": None}
    expected = diffusers_forward(tiny.diffusers_transformer(model), inputs)
    assert tiny.relative_error(model(**inputs), expected) <= 1e-5


@pytest.mark.parametrize("text_tokens", [1, 7, 256])
@pytest.mark.parametrize("grid", [(1, 2, 2), (3, 6, 10)])
def test_text_to_video_forward_equals_diffusers(text_tokens, grid):
    config = replace(tiny.TRANSFORMER, in_channels=16)
    model = tiny.transformer(config)
    inputs = tiny.inputs(config, text_tokens, grid)
    expected = diffusers_forward(tiny.diffusers_transformer(model), inputs)
    assert tiny.relative_error(model(**inputs), expected) <= 1e-5


def test_missing_guidance_means_one():
    model = tiny.transformer()
    inputs = tiny.inputs(model.config)
    assert torch.equal(model(**inputs), model(**{**inputs, "guidance": None}))


def test_embedded_guidance_matters():
    model = tiny.transformer()
    inputs = tiny.inputs(model.config)
    other = model(**{**inputs, "guidance": torch.tensor([6000.0])})
    assert tiny.relative_error(other, model(**inputs)) > 0.01


def test_swapping_noise_and_image_channels_matters():
    model = tiny.transformer()
    inputs = tiny.inputs(model.config)
    swapped = inputs["hidden_states"].roll(16, dims=1)
    other = model(**{**inputs, "hidden_states": swapped})
    assert tiny.relative_error(other, model(**inputs)) > 0.1


def test_other_attention_is_used_for_every_block():
    model = tiny.transformer()
    inputs = tiny.inputs(model.config)
    calls = []

    def explicit(query, key, value):
        calls.append(query.shape)
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        return scores.softmax(-1) @ value

    assert tiny.relative_error(model(**inputs, attention=explicit), model(**inputs)) <= 1e-5
    assert len(calls) == 2 + 2 + 2  # refiner, double, single blocks


def test_every_block_goes_through_run_block():
    model = tiny.transformer()
    seen = []

    def run_block(block, *args):
        seen.append(block)
        return block(*args)

    model(**tiny.inputs(model.config), run_block=run_block)
    everything = [*model.conditioners, *model.blocks]
    assert list(map(id, seen)) == list(map(id, everything))


@pytest.mark.parametrize("chunking", CHUNKINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_predictions_made_together_are_those_made_one_after_the_other(chunking, dtype):
    model = tiny.transformer().to(dtype)
    latents = tiny.inputs(model.config)["hidden_states"]
    branches = []
    for text_tokens in (7, 4, 1):
        inputs = tiny.inputs(model.config, text_tokens)
        del inputs["hidden_states"]
        branches.append(model.condition(**inputs))
    seen = []

    def run_block(block, *args):
        seen.append(block)
        return block(*args)

    options = {"chunking": CHUNKINGS[chunking], "run_block": run_block}
    expected = [model.denoise(latents, branch, **options) for branch in branches]
    seen.clear()
    together = model.denoise_together(latents, branches, **options)
    assert all(torch.equal(*pair) for pair in zip(together, expected, strict=True))
    assert [id(block) for block in seen] == [id(b) for b in model.blocks for _ in branches]
    assert not torch.equal(*together[:2])


def test_two_forwards_are_bit_identical():
    model = tiny.transformer()
    inputs = tiny.inputs(model.config)
    assert torch.equal(model(**inputs), model(**inputs))


def test_bf16_is_as_close_to_fp32_as_diffusers_is():
    model = tiny.transformer()
    inputs = tiny.inputs(model.config)
    truth = model(**inputs)
    theirs = tiny.diffusers_transformer(model).bfloat16()
    half = {k: v if k in ("timestep", "guidance") else v.bfloat16() for k, v in inputs.items()}
    loss = (diffusers_forward(theirs, half).float() - truth).norm()
    ours = (model.bfloat16()(**inputs).float() - truth).norm()
    assert ours <= 1.2 * loss


def test_full_size_model_has_the_published_parameters():
    with torch.device("meta"):
        state = SkyReelsTransformer(TransformerConfig()).state_dict()
    assert len(state) == 856
    assert sum(tensor.numel() for tensor in state.values()) == 12_821_209_152


@pytest.mark.parametrize(
    ("hidden_states", "words"),
    [
        (torch.zeros(1, 16, 1, 2, 2), "32"),
        (torch.zeros(32, 1, 2, 2), "32"),
        (torch.zeros(1, 32, 1, 3, 2), "multiples of 16"),
    ],
)
def test_latents_of_illegal_shape_are_refused(hidden_states, words):
    model = tiny.transformer()
    inputs = {**tiny.inputs(model.config), "hidden_states": hidden_states}
    with pytest.raises(ShapeError, match=words):
        model(**inputs)


def test_rope_table_holds_the_stated_frequencies():
    config = TransformerConfig()
    angles = rope_table((3, 2, 2), config).angle()
    last = angles[-1]  # token at (2, 1, 1)
    expected = torch.cat(
        [
            p / 256 ** (torch.arange(0, d, 2) / d)
            for p, d in zip((2, 1, 1), (16, 56, 56), strict=True)
        ]
    )
    torch.testing.assert_close(last, expected)


@pytest.mark.parametrize("frames", [181, 193, 289])
def test_riflex_lowers_one_temporal_frequency_of_a_long_clip(frames):
    config, latent_frames = TransformerConfig(), (frames - 1) // 4 + 1
    grid = (latent_frames, 2, 2)
    plain, lowered = rope_table(grid, config), rope_table(grid, config, riflex_k=4)
    # the authors' formula: 0.9 of a period over the whole clip
    frequency = 0.9 * 2 * math.pi / latent_frames
    assert frequency < 256 ** (-6 / 16)
    angles = (torch.arange(latent_frames).double() * frequency).repeat_interleave(4)
    expected = plain.clone()
    expected[:, 3] = torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(lowered, expected, atol=1e-6, rtol=0)
    others = [index for index in range(64) if index != 3]
    assert torch.equal(lowered[:, others], plain[:, others])


@pytest.mark.parametrize("latent_frames", [1, 25, 45, 46, 49, 61, 73, 257])
@pytest.mark.parametrize("k", range(1, 9))
def test_riflex_is_the_formula_of_the_paper_and_never_speeds_a_frequency_up(latent_frames, k):
    theta = 256 ** (-2 * (k - 1) / 16)
    period_in_clips = 2 * math.pi / theta / latent_frames
    expected = theta if period_in_clips >= 1 / 0.9 else 2 * math.pi * 0.9 / latent_frames
    assert abs(riflex_frequency(theta, latent_frames) - expected) <= 1e-12


@pytest.mark.parametrize("latent_frames", [25, 45])
def test_riflex_leaves_clips_within_the_period_alone(latent_frames):
    config, grid = TransformerConfig(), (latent_frames, 1, 1)
    assert torch.equal(rope_table(grid, config), rope_table(grid, config, riflex_k=4))


def test_the_frequency_that_riflex_lowers_follows_from_the_model():
    assert intrinsic_frequency(TransformerConfig()) == 4
    assert intrinsic_frequency(tiny.TRANSFORMER) == 2
