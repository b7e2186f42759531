"""Latents: their shapes, their two spaces, and the sizes a clip may have."""

import numpy as np
import pytest
import torch
from comfyui_skyreels.skyreels.conditioning.latents import (
    ImageConditioning,
    check_size,
    latents_to_rgb,
    to_model_space,
    to_vae_space,
)
from comfyui_skyreels.skyreels.errors import ShapeError


def test_the_two_latent_spaces_are_inverse():
    x = torch.randn(2, 16, 1, 4, 4)
    torch.testing.assert_close(to_vae_space(to_model_space(x)), x)
    assert to_model_space(torch.ones(1)).item() == pytest.approx(0.476986)


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ((50, 32, 17), "Width 50.*use 48"),
        ((48, 30, 17), "Height 30.*use 32"),
        ((48, 0, 17), "Height 0.*use 16"),
        ((48, 32, 16), "16 frames.*use 17"),
        ((48, 32, 0), "0 frames.*use 1"),
        ((48, 32, -3), "-3 frames.*use 1"),
        ((48, 32, 100), "100 frames.*use 101"),
    ],
)
def test_illegal_sizes_name_the_nearest_legal_one(size, words):
    with pytest.raises(ShapeError, match=words):
        check_size(*size)


def test_conditioning_of_another_size_keeps_its_numbers():
    conditioning = ImageConditioning(torch.zeros(1, 16, 1, 4, 6), 48, 32, 97)
    assert conditioning.latent_shape == (1, 16, 25, 4, 6)
    assert np.prod(conditioning.padded().shape) == 16 * 25 * 24


# --- previews -----------------------------------------------------------------------------------


def test_a_preview_is_a_linear_map_of_every_latent_pixel():
    latents = torch.zeros(1, 16, 2, 1, 3)
    latents[0, 0, 0] = torch.tensor([[-2.0, 0.0, 2.0]])  # red at the ends of its range
    latents[0, 5, 1] = 1.0
    factors, bias = torch.zeros(16, 3), torch.tensor([0.0, -1.0, 1.0])
    factors[0, 0], factors[5, 1] = 0.5, 0.25
    frames = latents_to_rgb(latents, factors, bias, 2**18)
    assert (frames.dtype, tuple(frames.shape)) == (torch.uint8, (2, 1, 3, 3))
    assert frames[0, 0].tolist() == [[0, 0, 255], [128, 0, 255], [255, 0, 255]]
    assert frames[1, 0].tolist() == [[128, 32, 255]] * 3  # 127.5 * 0.25


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1, 68, 120), (1, 68, 120, 3)),
        ((25, 68, 120), (25, 68, 120, 3)),  # 97 frames of 960x544, as they are
        ((73, 68, 120), (73, 45, 79, 3)),
        ((1, 512, 512), (1, 512, 512, 3)),
    ],
)
def test_the_frames_of_a_preview_are_scaled_down_alike_to_a_number_of_pixels(size, expected):
    latents = torch.ones(1, 1, *size)
    frames = latents_to_rgb(latents, torch.ones(1, 3), torch.zeros(3), 2**18)
    assert tuple(frames.shape) == expected
    assert frames.unique().tolist() == [255]


def test_a_preview_that_is_scaled_down_has_the_means_of_the_pixels():
    latents = torch.tensor([-0.5, 0.5, 1.0, 0.0]).reshape(1, 1, 1, 1, 4).expand(1, 1, 1, 4, 4)
    frames = latents_to_rgb(latents, torch.ones(1, 3), torch.zeros(3), 4)
    assert frames[0, :, :, 0].tolist() == [[128, 191]] * 2  # 127.5 * (1 + 0), 127.5 * (1 + 0.5)


def test_a_preview_does_not_change_the_latents_and_takes_any_precision():
    latents = torch.randn(1, 16, 3, 2, 2)
    before = latents.clone()
    factors, bias = torch.randn(16, 3), torch.randn(3)
    exact = latents_to_rgb(latents, factors, bias, 100).int()
    rounded = latents_to_rgb(latents.bfloat16(), factors, bias, 100).int()
    assert torch.equal(latents, before)
    assert (exact - rounded).abs().max() <= 16  # of 255; bfloat16 keeps 8 bits of each of 16 terms


@pytest.mark.parametrize("shape", [(2, 16, 1, 4, 4), (1, 4, 1, 4, 4), (1, 16, 4, 4)])
def test_a_preview_of_other_latents_is_refused(shape):
    with pytest.raises(ShapeError, match="16, T, h, w"):
        latents_to_rgb(torch.zeros(shape), torch.zeros(16, 3), torch.zeros(3), 100)
