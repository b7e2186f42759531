"""Latents: their shapes, their two spaces, and the sizes a clip may have."""

import numpy as np
import pytest
import torch
from comfyui_skyreels.skyreels.errors import ShapeError
from comfyui_skyreels.skyreels.latents import (
    ImageConditioning,
    check_size,
    to_model_space,
    to_vae_space,
)


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
