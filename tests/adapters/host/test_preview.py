"""Moving previews: what is sent, to whom, how often, and that it ends with the run."""

import base64
import io
import threading
from itertools import count

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from comfyui_skyreels.nodes import host
from comfyui_skyreels.nodes.host import preview
from comfyui_skyreels.skyreels import builtin
from comfyui_skyreels.skyreels.conditioning.latents import latents_to_rgb
from comfyui_skyreels.skyreels.config import Guidance
from comfyui_skyreels.skyreels.image import example_image
from comfyui_skyreels.skyreels.pipeline import image_to_video
from comfyui_skyreels.skyreels.runtime import TorchRuntime
from comfyui_skyreels.skyreels.sampling.settings import SamplingSettings, get_sigmas
from comfyui_skyreels.skyreels.text.encode import encode_prompt
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


# --- colours, frames, cost ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def half_and_end(fast_convolutions):
    """Of three clips of the built-in model: the estimate at half the steps, and the video."""
    runtime = TorchRuntime()
    transformer = builtin.builtin_transformer(runtime=runtime)
    vae = builtin.builtin_vae(runtime=runtime)
    encoder = builtin.builtin_text_encoder(runtime=runtime)
    prompts = ("a red circle moves left", "a red circle fades out", "a red circle grows")
    made = []
    for seed, prompt in enumerate(prompts):
        estimates = []

        def keep(stage, done, total, estimate, estimates=estimates):
            if estimate is not None:
                estimates.append(estimate)

        settings = SamplingSettings(
            seed=seed, sigmas=get_sigmas(8), riflex_k=0, guidance=Guidance(6.0)
        )
        video = image_to_video(
            transformer, vae, example_image(),
            *(encode_prompt(encoder, text, runtime=runtime) for text in (prompt, "")), settings,
            width=64, height=64, num_frames=17, runtime=TorchRuntime(on_progress=keep),
        )  # fmt: skip
        made.append((estimates[3], video))
    return made


def test_previews_of_the_built_in_model_look_like_its_clips_at_half_the_steps(comfy, half_and_end):
    model = host.LoadedModel(tiny.transformer(), NamedPatcher("ours"), builtin.BUILTIN_NAME)
    for estimate, video in half_and_end:
        comfy.events.clear()
        runtime = host.ComfyRuntime("1", model, with_preview=True)
        runtime.progress("sample", 4, 8, estimate)
        (clip,) = wait(comfy, 1)
        frames = torch.from_numpy(cut(clip).copy()).permute(0, 3, 1, 2) / 255
        frames = F.interpolate(frames, size=(64, 64), mode="bilinear")
        frames = frames[[0, *(1 + frame // 4 for frame in range(16))]].permute(0, 2, 3, 1)
        assert -10 * torch.log10((frames - video).square().mean()) >= 12
    own = comfy.latent_formats[-1]  # of ComfyUI's still
    assert own.latent_rgb_factors == [list(row) for row in builtin.RGB_FACTORS]
    assert own.taesd_decoder_name is None
    host.ComfyRuntime("1", with_preview=True)
    assert comfy.latent_formats[-1].latent_rgb_factors[1] == [0.01, -0.02, 0.03]


@pytest.mark.parametrize(
    ("value", "places"),
    [
        ("", [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        ("100", [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        ("5", [0, 2, 4, 6, 8]),
        ("2", [0, 8]),
        ("1", [0]),
    ],
)
def test_the_number_of_frames_can_be_limited(comfy, monkeypatch, value, places):
    monkeypatch.setenv("SKYREELS_PREVIEW_FRAMES", value)
    estimate = latents(9, 1, 1).repeat(1, 1, 1, 4, 6)
    host.ComfyRuntime("1", with_preview=True).progress("sample", 1, 30, estimate)
    (clip,) = wait(comfy, 1)
    assert clip["count"] == len(places)
    assert clip["fps"] * 9 == pytest.approx(6 * len(places))  # it lasts as long
    factors = torch.tensor([[0.01 * i, -0.02, 0.03] for i in range(16)])
    whole = latents_to_rgb(estimate, factors, torch.tensor([0.1, -0.2, 0.3]), 2**18).numpy()
    assert abs(cut(clip).astype(int) - whole[places].astype(int)).max() <= 6


def test_a_number_of_frames_that_is_none_is_named(comfy, monkeypatch, caplog):
    monkeypatch.setenv("SKYREELS_PREVIEW_FRAMES", "many")
    host.ComfyRuntime("1", with_preview=True).progress("sample", 1, 30, latents())
    assert wait(comfy, 1)[0]["count"] == 3
    assert "SKYREELS_PREVIEW_FRAMES is 'many'" in caplog.text


def test_at_full_size_a_preview_costs_less_than_a_hundredth_of_a_step():
    from torch.utils.flop_counter import FlopCounterMode

    estimate = torch.zeros(1, 16, 25, 68, 120)
    with FlopCounterMode(display=False) as counter:
        latents_to_rgb(estimate, torch.zeros(16, 3), torch.zeros(3), preview.MAX_PIXELS)
    tokens, parameters, evaluations = 25 * 34 * 60, 12.8e9, 2
    assert 0 < counter.get_total_flops() < 0.01 * 2 * parameters * tokens * evaluations
    assert estimate.nbytes < 0.01 * 2 * parameters * evaluations  # read, against bf16 weights
