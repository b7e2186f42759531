"""What a decode by the full-size VAE computes, moves and keeps, on shape-only tensors."""

import pytest
import torch
from comfyui_skyreels.skyreels.config import VAEConfig
from comfyui_skyreels.skyreels.vae.budget import decode_bytes, encode_bytes, synced_bytes
from comfyui_skyreels.skyreels.vae.model import VideoVAE
from support.peak import Convolutions, PeakBytes
from support.traffic import Traffic
from torch.utils.flop_counter import FlopCounterMode

FULL_SIZE = torch.Size((1, 16, 25, 68, 120))  # 97 x 544 x 960


@pytest.fixture(scope="module")
def meta_vae():
    with torch.device("meta"):
        return VideoVAE(VAEConfig()).bfloat16()


@pytest.fixture(scope="module")
def counted(meta_vae):
    """FLOPs, bytes and peak of a decode of the whole clip."""
    traffic = Traffic(
        write_only=frozenset({"norm_silu_pad_", "interleave_", "interleave_moments_", "copy_"})
    )
    with Convolutions() as convolutions, traffic, PeakBytes() as memory:
        meta_vae.decode(torch.empty(FULL_SIZE, device="meta", dtype=torch.bfloat16))
    return convolutions.flops, traffic, memory.peak


def test_convolutions_are_counted_as_torch_counts_them(meta_vae):
    latents = torch.empty(1, 16, 2, 4, 4, device="meta", dtype=torch.bfloat16)
    with FlopCounterMode(display=False) as flops, Convolutions() as convolutions:
        meta_vae.decode(latents)
    assert convolutions.flops == flops.get_flop_counts()["Global"][torch.ops.aten.convolution]


def test_enlarging_is_part_of_the_convolutions(counted):
    """663 TFLOP; 858 without."""
    flops, _, _ = counted
    assert 655e12 <= flops <= 670e12


def test_passes_between_convolutions_move_less_than_a_terabyte(counted):
    """687 GB, of which halos that pieces have in common are 123; attention is counted apart.

    Only the results of plain convolutions are read once more for their moments, 53 GB.
    """
    _, traffic, _ = counted
    attention = {"_safe_softmax", "mul", "_to_copy"}
    moved = {name: size for name, size in traffic.by_name.items() if name not in attention}
    assert 0.65e12 <= sum(moved.values()) <= 0.7e12
    assert 50e9 <= moved["channel_moments"] <= 55e9
    assert not {"replication_pad3d", "upsample_nearest3d", "native_group_norm"} & set(moved)


def test_a_clip_is_decoded_whole_in_32_gigabytes(counted):
    """29.2 GB: the clip as the last level gets it, 25.9, and what its pieces need."""
    _, _, peak = counted
    assert peak <= 30e9


@pytest.mark.parametrize(("strips", "gib"), [(1, 9), (2, 4)])
def test_a_synced_decode_fits_cards_that_a_whole_one_does_not(meta_vae, strips, gib):
    """6.7 and 3.8 GiB."""
    latents = torch.empty(FULL_SIZE, device="meta", dtype=torch.bfloat16)
    frames = 0
    with Convolutions() as convolutions, PeakBytes() as memory:
        for _, _, piece in meta_vae.iter_synced(latents, strips):
            frames += piece.shape[2]
    assert frames == strips * 97
    assert memory.peak <= gib * 2**30
    estimate = synced_bytes(meta_vae.config, FULL_SIZE, torch.bfloat16, strips)
    assert 1.2 * memory.peak <= estimate <= 1.6 * memory.peak
    # a tenth is for the sample; rows beside strips are computed twice
    assert 715e12 <= convolutions.flops <= (730e12 if strips == 1 else 750e12)


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
        meta_vae.encode(video)
    assert memory.peak <= encode_bytes(meta_vae.config, video.shape, torch.bfloat16)
