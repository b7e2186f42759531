"""A decode that runs out of memory, and what counts as running out."""

import json
import logging
import math
import weakref
from contextlib import contextmanager

import pytest
import torch
from comfyui_skyreels.skyreels import ladder
from comfyui_skyreels.skyreels.config import VAEConfig
from comfyui_skyreels.skyreels.errors import OutOfRoomError
from comfyui_skyreels.skyreels.image import encode_image
from comfyui_skyreels.skyreels.runtime import TorchRuntime
from comfyui_skyreels.skyreels.vae.model import VideoVAE
from comfyui_skyreels.skyreels.vae.tiling import (
    LADDER,
    STRIPS,
    DecodePlan,
    decode_frames,
    plan_bytes,
)
from support import tiny

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
SMALL = VAEConfig(block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_num_groups=2)


@pytest.fixture(scope="module")
def vae():
    return tiny.randomize(VideoVAE(SMALL))


@pytest.fixture(scope="module")
def latents():
    return torch.randn(1, 16, 9, 4, 3, generator=torch.Generator().manual_seed(0))


def out_of_memory_above(monkeypatch, vae, frames, strips=math.inf):
    """Refuse decodes of more latent frames than these, and synced ones in fewer strips.

    Returns:
        Latent frames of each decode, which grows with them.
    """
    made = []

    def limit(name, refuses):
        true = getattr(vae, name)

        def limited(latents, *args, **kwargs):
            made.append(latents.shape[2])
            pieces = true(latents, *args, **kwargs)
            yield next(pieces)
            if refuses(latents, *args):  # in the middle of the work
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            yield from pieces

        monkeypatch.setattr(vae, name, limited)

    limit("iter_decode", lambda latents: latents.shape[2] > frames)
    limit("iter_synced", lambda latents, count: count < strips)
    return made


def test_a_decode_that_runs_out_of_memory_is_repeated_in_smaller_pieces(
    vae, latents, monkeypatch, tmp_path, caplog
):
    made = out_of_memory_above(monkeypatch, vae, 5)
    totals = []
    runtime = TorchRuntime(
        state_folder=tmp_path, on_progress=lambda *report: totals.append(report[2])
    )
    got = decode_frames(vae, latents, "auto", runtime=runtime)
    assert torch.equal(got, decode_frames(vae, latents, "tiled-diffusers", runtime=TorchRuntime()))
    told = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "with full" in told[0]
    assert "repeated with tiled-diffusers" in told[-1]
    falls = len(told)
    assert made[:falls] == [9] * falls
    assert falls == len(LADDER) - 2
    assert max(made[falls:]) == 5
    assert totals[-1] == 3

    made.clear()  # the next decode of that size begins there
    caplog.clear()
    decode_frames(vae, latents, "auto", runtime=runtime)
    assert max(made) == 5
    assert caplog.records == []
    [groups] = json.loads((tmp_path / "plan.json").read_text())["devices"].values()
    assert len(groups["rungs"]) == 1


def test_a_mode_that_was_asked_for_is_not_replaced_by_another(vae, latents, monkeypatch):
    made = out_of_memory_above(monkeypatch, vae, 5)
    with pytest.raises(torch.OutOfMemoryError):
        decode_frames(vae, latents, "full", runtime=TorchRuntime())
    assert made == [9]


def test_a_decode_that_never_fits_ends(vae, latents, monkeypatch):
    made = out_of_memory_above(monkeypatch, vae, 0)
    with pytest.raises(torch.OutOfMemoryError):
        decode_frames(vae, latents, "auto", runtime=TorchRuntime())
    assert len(made) == len(LADDER)


def test_a_synced_decode_is_repeated_in_strips_from_its_start(
    vae, latents, monkeypatch, tmp_path, caplog
):
    strips = plan_bytes(DecodePlan("synced", strips=2), vae.config, latents.shape, torch.float32)

    class Small(TorchRuntime):
        def free_bytes(self):
            return strips + 4 * 3 * 33 * 32 * 24  # and the clip

    totals = []
    runtime = Small(on_progress=lambda *report: totals.append(report[2]))
    expected = decode_frames(vae, latents, "synced", runtime=runtime)
    assert set(totals) == {2 * 33}
    made = out_of_memory_above(monkeypatch, vae, 9, strips=2)
    runtime = TorchRuntime(state_folder=tmp_path)
    got = decode_frames(vae, latents, "synced", runtime=runtime)
    assert torch.equal(got, expected)
    assert made == [9, 9]
    [told] = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "with synced (" in told
    assert "repeated with synced in 2 strips" in told

    made.clear()  # the next decode of that size begins there
    caplog.clear()
    assert torch.equal(decode_frames(vae, latents, "synced", runtime=runtime), expected)
    assert made == [9]
    assert caplog.records == []


def test_a_synced_decode_is_never_replaced_by_tiles(vae, latents, monkeypatch):
    made = out_of_memory_above(monkeypatch, vae, 5)
    with pytest.raises(torch.OutOfMemoryError):
        decode_frames(vae, latents, "synced", runtime=TorchRuntime())
    assert made == [9] * len(STRIPS)


def test_the_ladder_goes_from_one_pass_to_no_seams_to_tiles():
    strips = [plan.strips for plan in LADDER if plan.mode == "synced"]
    assert [plan.mode for plan in LADDER] == ["full"] + ["synced"] * 2 + ["tiled"] * 10
    assert strips == list(STRIPS)
    names = list(map(str, LADDER))
    assert len(set(names)) == len(names)  # they are remembered by name
    assert names[:3] == ["full", "synced", "synced in 2 strips"]
    assert names[-2:] == ["tiled-diffusers", "tiles of 128 px, 16 frames"]


@pytest.mark.parametrize(
    ("error", "is_so"),
    [
        (FULL, True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
        (OutOfRoomError("Attention would need 9 bytes for its scores: use fewer frames."), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_only_a_failed_allocation_is_memory_that_ran_out(error, is_so):
    assert ladder.is_out_of_memory(error) is is_so


def test_what_the_failed_call_held_is_free_before_the_next():
    """A tensor of its frames that lived on would be missing for the next rung."""
    held, alive = [], []

    class Held:
        pass

    @contextmanager
    def enter(rung):
        def work():
            if held:
                alive.append(held[0]() is not None)
                return rung
            local = Held()
            held.append(weakref.ref(local))
            raise torch.OutOfMemoryError("CUDA out of memory.")

        yield work

    with ladder.descending([1, 2], enter, torch.device("cpu"), lambda *_: None) as work:
        assert work() == 2
    assert alive == [False]


def test_a_picture_whose_encoding_runs_out_of_memory_is_encoded_again(vae, monkeypatch):
    encode, calls, asked = vae.encode, [], []

    def once(video, **kwargs):
        calls.append(video)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return encode(video, **kwargs)

    runtime = TorchRuntime()
    runtime.make_room = asked.append
    image = torch.rand(1, 16, 16, 3, generator=torch.Generator().manual_seed(0))
    size = {"width": 16, "height": 16, "num_frames": 5}
    expected = encode_image(vae, image, **size, runtime=runtime)
    asked.clear()
    monkeypatch.setattr(vae, "encode", once)
    got = encode_image(vae, image, **size, runtime=runtime)
    assert torch.equal(got.image_latents, expected.image_latents)
    assert torch.equal(*calls)
    assert len(asked) == 2  # as it began, and before it was repeated
