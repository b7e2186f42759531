"""A decode that runs out of memory, and what counts as running out."""

import json
import logging
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
from comfyui_skyreels.skyreels.vae.tiling import LADDER, decode_frames
from support import tiny

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
SMALL = VAEConfig(block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_num_groups=2)


@pytest.fixture(scope="module")
def vae():
    return tiny.randomize(VideoVAE(SMALL))


@pytest.fixture(scope="module")
def latents():
    return torch.randn(1, 16, 9, 4, 3, generator=torch.Generator().manual_seed(0))


def out_of_memory_above(monkeypatch, vae, frames):
    """Refuse decodes of more latent frames than these; the list grows with each decode."""
    decode, made = vae.decode, []

    def limited(latents, **kwargs):
        made.append(latents.shape[2])
        if latents.shape[2] > frames:
            raise FULL
        return decode(latents, **kwargs)

    monkeypatch.setattr(vae, "decode", limited)
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
