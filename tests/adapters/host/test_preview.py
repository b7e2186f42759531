"""Moving previews: what is sent, to whom, how often, and that it ends with the run."""

import base64
import io
import threading
from itertools import count

import numpy as np
import pytest
import torch
from comfyui_skyreels.nodes import host
from comfyui_skyreels.nodes.host import preview
from comfyui_skyreels.skyreels.conditioning.latents import latents_to_rgb
from PIL import Image
from support import tiny
from support.host import InterruptProcessingException, NamedPatcher


@pytest.fixture
def clock(monkeypatch):
    """Time that stands still until a test moves it."""
    now = [100.0]
    monkeypatch.setattr(preview.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def model() -> host.LoadedModel:
    return host.LoadedModel(tiny.transformer(), NamedPatcher("our patcher"), "tiny.safetensors")


def latents(num_frames: int = 3, height: int = 4, width: int = 6) -> torch.Tensor:
    return torch.randn(1, 16, num_frames, height, width)


def clips(comfy) -> list[dict]:
    return [data for name, data in comfy.events if name == "skyreels.preview"]


def previewing() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "skyreels preview"]


def wait(comfy, number: int) -> list[dict]:
    for thread in previewing():
        thread.join(30)
    assert len(clips(comfy)) == number
    return clips(comfy)


def cut(clip: dict) -> np.ndarray:
    """The frames [T, H, W, 3] of a clip, as a page takes them out of it."""
    with Image.open(io.BytesIO(base64.b64decode(clip["image"]))) as image:
        assert (image.format, image.mode) == ("JPEG", "RGB")
        width, height = image.width // clip["columns"], image.height // clip["rows"]
        assert (width * clip["columns"], height * clip["rows"]) == image.size
        sheet = np.asarray(image)
    cells = sheet.reshape(clip["rows"], height, clip["columns"], width, 3).swapaxes(1, 2)
    cells = cells.reshape(-1, height, width, 3)
    return cells[: clip["count"], : clip["height"], : clip["width"]]


# --- the clip -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 8, 8), (3, 4, 6), (25, 68, 120), (5, 17, 33), (26, 1, 1)])
def test_frames_are_cut_out_of_the_jpeg_where_its_grid_says(size):
    count, height, width = size
    frames = torch.zeros(*size, 3, dtype=torch.uint8)
    for number in range(count):  # each of one colour, unlike its neighbours
        frames[number] = torch.tensor([90 + 130 * (number % 2), 40 * (number % 5), 200])
    clip = preview.contact_sheet(frames)
    assert (clip["count"], clip["height"], clip["width"], clip["fps"]) == (count, height, width, 6)
    difference = cut(clip).astype(int) - frames.numpy().astype(int)
    assert abs(difference).max() <= 6  # flat colours through JPEG; a neighbour would give over 100


@pytest.mark.parametrize("size", [(25, 68, 120), (73, 45, 79), (257, 31, 31), (1, 512, 512)])
def test_noise_takes_no_more_bytes_than_a_page_is_sent_in_a_second(size):
    noise = torch.randint(0, 256, (*size, 3), dtype=torch.uint8)
    clip = preview.contact_sheet(noise)
    assert len(clip["image"]) <= 48 * 1024
    assert cut(clip).shape == (*size, 3)


# --- sending ------------------------------------------------------------------------------------


def test_an_estimate_reaches_the_page_of_the_prompt_and_names_the_node_that_it_shows(comfy):
    runtime = host.ComfyRuntime("12:3.0.7", with_preview=True)  # made by 12:3
    estimate = latents(height=1, width=1).repeat(1, 1, 1, 4, 6)  # flat: JPEG keeps it
    runtime.progress("sample", 1, 30, estimate)
    (clip,) = wait(comfy, 1)
    assert comfy.sent_to == ["page", "page"]  # the line on the node, and the clip
    assert (clip["node"], clip["class_type"]) == ("12:3", "class of 12:3")
    assert (clip["prompt_id"], clip["max_edge"]) == ("prompt 1", 512)
    factors = torch.tensor([[0.01 * i, -0.02, 0.03] for i in range(16)])
    expected = latents_to_rgb(estimate, factors, torch.tensor([0.1, -0.2, 0.3]), 2**18).numpy()
    assert abs(cut(clip).astype(int) - expected.astype(int)).max() <= 6


def test_comfyuis_own_still_goes_on_as_before(comfy):
    runtime = host.ComfyRuntime("1", with_preview=True)
    for step in range(5):
        runtime.progress("sample", step, 30, latents())
    assert comfy.previews == [("JPEG", (1, 16, 3, 4, 6), None)] * 5
    wait(comfy, 1)


@pytest.mark.parametrize("method", ["none", "taesd"])
def test_there_are_none_where_comfyui_draws_none_or_with_a_decoder(comfy, method):
    comfy.preview_method = method
    runtime = host.ComfyRuntime("1", with_preview=True)
    runtime.progress("sample", 1, 30, latents())
    assert len(comfy.previews) == (0 if method == "none" else 1)
    wait(comfy, 0)


def test_there_are_none_without_a_page_without_a_node_and_in_nodes_that_ask_for_none(comfy):
    host.ComfyRuntime(None, with_preview=True).progress("sample", 1, 30, latents())
    host.ComfyRuntime("1").progress("sample", 1, 30, latents())
    comfy.client = None
    host.ComfyRuntime("1", with_preview=True).progress("sample", 1, 30, latents())
    wait(comfy, 0)


def test_a_page_that_comes_later_does_not_get_the_clips_of_another(comfy):
    runtime = host.ComfyRuntime("1", with_preview=True)
    comfy.client = "another page"
    runtime.progress("sample", 1, 30, latents())
    wait(comfy, 1)
    assert sorted(comfy.sent_to) == ["another page", "page"]  # the line on the node, and the clip


def test_there_is_at_most_one_a_second_and_it_is_of_the_latest_estimate(comfy, clock):
    runtime = host.ComfyRuntime("1", with_preview=True)
    for step in range(40):  # four a second
        clock[0] = 100 + step / 4
        runtime.progress("sample", step, 40, torch.full((1, 16, 3, 4, 6), float(step % 4)))
        wait(comfy, step // 4 + 1)
    assert len({clip["image"] for clip in clips(comfy)}) == 1  # each of the first in its second


def test_one_is_made_at_a_time_however_long_it_takes(comfy, clock, monkeypatch):
    release, begun = threading.Event(), count()
    original = Image.Image.save

    def save(*arguments, **options):
        next(begun)
        assert release.wait(30)
        original(*arguments, **options)

    monkeypatch.setattr(Image.Image, "save", save)
    runtime = host.ComfyRuntime("1", with_preview=True)
    for step in range(5):
        clock[0] += 10
        runtime.progress("sample", step, 40, latents())
        assert len(previewing()) == 1
    release.set()
    wait(comfy, 1)
    assert next(begun) == 1


# --- the end ------------------------------------------------------------------------------------


def test_with_the_run_they_end_and_the_next_run_has_them_again(comfy, clock, model):
    runtime = host.ComfyRuntime("1", model, with_preview=True)
    for number in (1, 2):
        with runtime.place(model.module, 0):
            clock[0] += 10
            runtime.progress("sample", 1, 30, latents())
            wait(comfy, number)
        assert previewing() == []


def test_what_is_unfinished_when_the_run_ends_is_not_sent(comfy, model, monkeypatch):
    begun, release = threading.Event(), threading.Event()
    original = Image.Image.save

    def save(*arguments, **options):
        begun.set()
        assert release.wait(30)
        original(*arguments, **options)

    monkeypatch.setattr(Image.Image, "save", save)
    runtime = host.ComfyRuntime("1", model, with_preview=True)
    moving = runtime._moving
    asked = moving._stop_event
    threading.Thread(target=lambda: (asked.wait(30), release.set()), daemon=True).start()
    with runtime.place(model.module, 0):
        runtime.progress("sample", 1, 30, latents())
        assert begun.wait(30)
    assert previewing() == []
    assert clips(comfy) == []


def test_none_is_begun_once_the_user_pressed_cancel(comfy, model):
    runtime = host.ComfyRuntime("1", model, with_preview=True)
    comfy.is_cancelled = True
    with pytest.raises(InterruptProcessingException), runtime.place(model.module, 0):
        runtime.progress("sample", 1, 30, latents())
    assert previewing() == []
    assert clips(comfy) == []


@pytest.mark.parametrize("where", ["loop", "thread"])
def test_an_error_is_logged_once_and_the_run_goes_on_without(
    comfy, clock, caplog, monkeypatch, where
):
    def fail(*arguments, **options):
        raise OSError("no space")

    if where == "thread":
        monkeypatch.setattr(Image.Image, "save", fail)
    runtime = host.ComfyRuntime("1", with_preview=True)
    estimate = latents() if where == "thread" else latents()[0]
    for step in range(3):
        clock[0] += 10
        runtime.progress("sample", step, 30, estimate)
        wait(comfy, 0)
    assert [step for step, _ in comfy.progress] == [0, 1, 2]
    assert caplog.text.count("No more moving previews in this run") == 1
    assert ("no space" if where == "thread" else "T, h, w") in caplog.text
