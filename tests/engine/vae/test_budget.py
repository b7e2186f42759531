"""The predicted peak of a decode against what the full-size VAE allocates."""

import pytest
import torch
from comfyui_skyreels.skyreels.config import VAEConfig
from comfyui_skyreels.skyreels.vae.budget import decode_bytes
from comfyui_skyreels.skyreels.vae.model import VideoVAE
from support.peak import PeakBytes

FULL_SIZE = torch.Size((1, 16, 25, 68, 120))  # 97 x 544 x 960


@pytest.fixture(scope="module")
def meta_vae():
    with torch.device("meta"):
        return VideoVAE(VAEConfig()).bfloat16()


@pytest.mark.parametrize(
    "size", [(25, 64, 64), (25, 32, 32), (25, 16, 16), (17, 32, 32), (5, 32, 32), (5, 16, 16)]
)
def test_the_estimate_covers_what_the_full_size_decoder_allocates(meta_vae, size):
    shape = torch.Size((1, 16, *size))
    with PeakBytes() as memory:
        meta_vae.decode(torch.empty(shape, device="meta", dtype=torch.bfloat16))
    estimate = decode_bytes(meta_vae.config, shape, torch.bfloat16)
    assert 1.2 * memory.peak <= estimate <= 1.6 * memory.peak


def test_float32_is_estimated_at_about_twice_bf16():
    half = decode_bytes(VAEConfig(), FULL_SIZE, torch.bfloat16)
    whole = decode_bytes(VAEConfig(), FULL_SIZE, torch.float32)
    assert 1.8 < whole / half <= 2


@pytest.mark.parametrize("shape", [(1, 3, 1, 544, 960), (1, 3, 9, 256, 256)])
def test_encoding_takes_no_more_than_what_is_asked_for(meta_vae, shape):
    video = torch.empty(shape, device="meta", dtype=torch.bfloat16)
    with PeakBytes() as memory:
        latents = meta_vae.encode(video)
    assert memory.peak <= decode_bytes(meta_vae.config, latents.shape, torch.bfloat16)
