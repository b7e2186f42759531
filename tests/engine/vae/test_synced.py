"""Synced decodes: norms from a part of the clip, then frame by frame in constant memory."""

import copy
import math

import pytest
import torch
from comfyui_skyreels.skyreels.builtin import builtin_vae
from comfyui_skyreels.skyreels.config import Tiling, VAEConfig
from comfyui_skyreels.skyreels.runtime import TorchRuntime, never_interrupt
from comfyui_skyreels.skyreels.vae import model
from comfyui_skyreels.skyreels.vae.model import VideoVAE, sample_starts, strip_rows
from comfyui_skyreels.skyreels.vae.tiling import decode_frames
from support import tiny

pytestmark = pytest.mark.usefixtures("fast_convolutions")

RUNTIME = TorchRuntime()
NARROW = VAEConfig(block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4)


@pytest.fixture(scope="module")
def vae64():
    return tiny.randomize(VideoVAE(NARROW)).double()


def latents(frames, height, width):
    generator = torch.Generator().manual_seed(4)
    return torch.randn(1, 16, frames, height, width, generator=generator)


def synced(vae, vae_latents, strips=1):
    """The whole clip from its strips."""
    frames, height, width = vae_latents.shape[2:]
    out = torch.full((1, 3, 4 * frames - 3, 8 * height, 8 * width), math.nan).to(
        next(vae.parameters())
    )
    for start, top, piece in vae.iter_synced(vae_latents, strips):
        place = out[:, :, start : start + piece.shape[2], top : top + piece.shape[3]]
        assert place.isnan().all()
        place.copy_(piece)
    assert not out.isnan().any()
    return out


def relative(value, reference):
    return ((value - reference).abs().max() / reference.abs().max()).item()


@pytest.mark.parametrize("size", [(1, 3, 2), (2, 2, 3), (5, 3, 2)])
def test_with_the_norms_of_the_whole_clip_it_is_the_decode_in_one_pass(vae64, size, monkeypatch):
    monkeypatch.setattr(model, "sample_starts", lambda frames, strips: ([0], frames))
    vae_latents = latents(*size).double()
    assert relative(synced(vae64, vae_latents), vae64.decode(vae_latents)) <= 1e-12


def test_strips_change_nothing(vae64, monkeypatch):
    monkeypatch.setattr(model, "sample_starts", lambda frames, strips: ([1], 2))
    vae_latents = latents(3, 16, 1).double()
    whole = synced(vae64, vae_latents)
    for strips in (2, 8):
        assert relative(synced(vae64, vae_latents, strips), whole) <= 1e-12, strips


@pytest.mark.parametrize("channels", [(16, 16), (16, 32, 32), (16, 16, 32, 32, 32)])
def test_other_depths_are_synced_too(channels, monkeypatch):
    monkeypatch.setattr(model, "sample_starts", lambda frames, strips: ([0], frames))
    config = VAEConfig(block_out_channels=channels, layers_per_block=1, norm_num_groups=8)
    vae = tiny.randomize(VideoVAE(config)).double()
    vae_latents = latents(3, 6, 2).double()
    whole = vae.decode(vae_latents)
    pieces = {}
    for start, top, piece in vae.iter_synced(vae_latents, 2):
        pieces.setdefault(top, []).append(piece)
        assert start == sum(p.shape[2] for p in pieces[top][:-1])
    joined = torch.cat([torch.cat(pieces[top], 2) for top in sorted(pieces)], 3)
    assert relative(joined, whole) <= 1e-12


def test_the_sample_is_whole_frames_spread_over_the_clip():
    assert sample_starts(1, 1) == ([0], 1)
    assert sample_starts(2, 1) == ([0], 2)
    assert sample_starts(25, 1) == ([5, 17], 2)
    assert sample_starts(25, 4) == ([11], 2)
    assert strip_rows(136, 4) == [(0, 34), (34, 68), (68, 102), (102, 136)]
    assert strip_rows(3, 8) == [(0, 1), (1, 2), (2, 3)]


def test_the_last_two_levels_of_the_full_size_decoder_need_six_rows_beside_a_strip():
    with torch.device("meta"):
        assert VideoVAE(VAEConfig()).decoder.halo_rows == 6


def test_two_runs_are_bit_identical_and_leave_the_latents_alone(vae64):
    vae, vae_latents = copy.deepcopy(vae64).float(), latents(3, 3, 2)
    kept = vae_latents.clone()
    assert torch.equal(synced(vae, vae_latents, 2), synced(vae, vae_latents, 2))
    assert torch.equal(vae_latents, kept)
    layers = [layer for layer in vae.modules() if isinstance(layer, model.CausalConv3d)]
    assert all(layer.folded is None for layer in layers)


def test_an_interrupt_stops_between_layers_and_the_next_run_is_good(vae64):
    class Stop(Exception):  # noqa: N818
        pass

    vae, vae_latents = copy.deepcopy(vae64).float(), latents(2, 2, 2)
    calls, stop_at = [], []
    runtime = TorchRuntime(on_check=lambda: calls.append(1))
    expected = decode_frames(vae, vae_latents, "synced", runtime=runtime)
    total = len(calls)

    def stop():
        calls.append(1)
        if len(calls) == stop_at[-1]:
            raise Stop

    for at in (1, total // 2, total):
        calls.clear()
        stop_at.append(at)
        with pytest.raises(Stop):
            decode_frames(vae, vae_latents, "synced", runtime=TorchRuntime(on_check=stop))
        again = decode_frames(vae, vae_latents, "synced", runtime=RUNTIME)
        assert torch.equal(again, expected)


# --- what it loses, on the built-in VAE ----------------------------------------------------------


def moving_clip():
    """[1, 3, 17, 64, 128]: two discs that move over shaded ground."""
    x = torch.linspace(-1, 3, 128)[None, None, :]
    y = torch.linspace(-1, 1, 64)[None, :, None]
    t = torch.linspace(0, 1, 17)[:, None, None]
    ground = torch.stack(
        [0.3 * x + 0 * y + 0 * t, 0.2 * y + 0 * x + 0 * t, 0 * x + 0 * y - 0.2 + 0 * t]
    )
    red = ((x + 0.5 - t).square() + y.square() < 0.12).float()
    blue = ((x - 2).square() + (y + 0.6 - 0.9 * t).square() < 0.15).float()
    clip = ground * (1 - red) * (1 - blue)
    clip[0] += 0.9 * red - 0.7 * blue
    clip[2] += 0.9 * blue - 0.7 * red
    return clip.clamp(-1, 1)[None]


def psnr(ours, exact):
    return -10 * (ours - exact).square().mean().clamp_min(1e-12).log10().item()


def seam(error, edges):
    """How much faster an error changes across the edges of tiles than elsewhere, [F, H, W, 3]."""
    steps = error.diff(dim=2).abs().mean((0, 1, 3))
    return steps[[edge - 1 for edge in edges]].mean().item()


def flicker(error):
    """How much an error changes from frame to frame, [F, H, W, 3]."""
    return error.diff(dim=0).abs().mean().item()


def test_on_the_builtin_model_it_is_within_40_db_without_seams_and_flicker():
    vae = builtin_vae(runtime=RUNTIME)
    vae_latents = vae.encode(moving_clip(), check=never_interrupt)
    full = decode_frames(vae, vae_latents, "full", runtime=RUNTIME)
    ours = decode_frames(vae, vae_latents, "synced", runtime=RUNTIME)
    tiling = Tiling(64, 64, 8, 48, 48, 4)
    tiled = decode_frames(vae, vae_latents, tiling=tiling, runtime=RUNTIME)
    assert psnr(ours, full) >= 40
    assert psnr(tiled, full) < psnr(ours, full)
    edges = [48, 64, 96, 112]
    assert seam(ours - full, edges) <= 0.25 * seam(tiled - full, edges)
    assert flicker(ours - full) <= 0.25 * flicker(tiled - full)
