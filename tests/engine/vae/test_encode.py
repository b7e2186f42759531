"""A clip is encoded in pieces: the same latents, in a fraction of the memory."""

import pytest
import torch
from comfyui_skyreels.skyreels.config import VAEConfig
from comfyui_skyreels.skyreels.errors import ShapeError
from comfyui_skyreels.skyreels.runtime import never_interrupt
from comfyui_skyreels.skyreels.vae.budget import MEMORY_MARGIN, encode_bytes, streamed_bytes
from comfyui_skyreels.skyreels.vae.encode import encode_streamed
from comfyui_skyreels.skyreels.vae.model import VideoVAE
from support import tiny
from support.peak import PeakBytes


@pytest.fixture(scope="module")
def vae() -> VideoVAE:
    return tiny.randomize(VideoVAE(tiny.VAE))


def clip(frames: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.rand(1, 3, frames, 16, 24, generator=generator, dtype=dtype) * 2 - 1


@pytest.mark.parametrize("frames", [1, 5, 9, 13])
def test_in_pieces_a_clip_has_the_same_latents(frames):
    vae = tiny.randomize(VideoVAE(tiny.VAE)).double()
    video = clip(frames, torch.float64)
    pieces = encode_streamed(vae, video, check=never_interrupt)
    assert tiny.relative_error(pieces, vae.encode(video)) <= 1e-12


def test_in_bfloat16_it_is_as_near_to_float32_as_the_whole(vae):
    video = clip(9)
    exact = vae.encode(video)
    half = tiny.randomize(VideoVAE(tiny.VAE)).bfloat16()
    whole = tiny.relative_error(half.encode(video).float(), exact)
    pieces = encode_streamed(half, video, check=never_interrupt).float()
    assert tiny.relative_error(pieces, exact) <= 1.5 * whole


def test_it_can_be_stopped_between_pieces(vae):
    class StopError(Exception):
        pass

    calls = 0

    def check():
        nonlocal calls
        calls += 1
        if calls == 7:
            raise StopError

    with pytest.raises(StopError):
        encode_streamed(vae, clip(5), check=check)


def test_a_length_that_the_vae_cannot_take_is_refused(vae):
    with pytest.raises(ShapeError, match="4k . 1: use 5"):
        encode_streamed(vae, clip(6), check=never_interrupt)


@pytest.mark.parametrize("frames", [1, 5, 13, 97])
def test_memory_is_planned_a_little_above_what_is_counted(frames):
    """At 960x544 in bf16: 97 frames take 26.2 GiB whole, 5.7 GiB in pieces."""
    with torch.device("meta"):
        vae = VideoVAE(VAEConfig()).bfloat16()
        video = torch.empty(1, 3, frames, 544, 960, dtype=torch.bfloat16)
    for encode, planned, gib in (
        (vae.encode, encode_bytes, 26.2),
        (lambda video: encode_streamed(vae, video, check=never_interrupt), streamed_bytes, 5.8),
    ):
        with PeakBytes() as counted:
            encode(video)
        assert counted.peak <= gib * 2**30
        bound = planned(vae.config, video.shape, torch.bfloat16) / MEMORY_MARGIN
        # the plan leaves the statistics out, a few hundred numbers; the count leaves out what a
        # kernel for the attention writes, of which the plan expects 1.5 GiB at most
        assert counted.peak - 2**20 <= bound <= 1.25 * counted.peak + 2**30
