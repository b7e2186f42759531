"""A clip and its continuation: what is joined, in which colours, and what is refused."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from comfyui_skyreels.skyreels import builtin
from comfyui_skyreels.skyreels.conditioning.embeds import PromptEmbeds
from comfyui_skyreels.skyreels.config import Guidance
from comfyui_skyreels.skyreels.errors import ShapeError
from comfyui_skyreels.skyreels.image import ImageSettings, example_image
from comfyui_skyreels.skyreels.pipeline import image_to_video
from comfyui_skyreels.skyreels.pipeline.extend import (
    Continuation,
    ExtendSettings,
    check_clip,
    extend_latents,
    extend_video,
    join_clips,
    match_colors,
)
from comfyui_skyreels.skyreels.runtime import TorchRuntime, never_interrupt
from comfyui_skyreels.skyreels.sampling.settings import SamplingSettings, get_sigmas
from comfyui_skyreels.skyreels.text.encode import DEFAULT_NEGATIVE_PROMPT, encode_prompt
from comfyui_skyreels.skyreels.vae.model import VideoVAE
from comfyui_skyreels.skyreels.vae.tiling import decode_into
from support import tiny
from support.memory import reused_memory

pytestmark = pytest.mark.usefixtures("fast_convolutions")

RUNTIME = TorchRuntime()
SETTINGS = SamplingSettings(seed=3, sigmas=get_sigmas(2), guidance=Guidance(1.0))
AS_THEY_COME = ExtendSettings(num_frames=9, color_match=False)


def random_clip(frames: int, channels: int = 3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(frames, 16, 32, channels, generator=generator)


@pytest.fixture(scope="module")
def model():
    """A tiny transformer, a tiny VAE, and the clip and prompts that they are asked with."""
    generator = torch.Generator().manual_seed(1)
    config = tiny.TRANSFORMER
    prompt, negative = (
        PromptEmbeds(
            torch.randn(1, tokens, config.text_embed_dim, generator=generator),
            torch.randn(1, config.pooled_projection_dim, generator=generator),
        )
        for tokens in (5, 3)
    )
    vae = tiny.randomize(VideoVAE(tiny.SMALL_VAE))
    return tiny.transformer(), vae, random_clip(11), prompt, negative


def extend(model, settings=SETTINGS, extend=AS_THEY_COME, **options):
    return extend_video(*model, settings, extend=extend, **{"runtime": RUNTIME, **options})


# --- what comes out -----------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [1, 5])
def test_the_new_frames_are_those_of_a_video_that_starts_with_the_last_ones(model, overlap):
    transformer, vae, clip, *prompts = model
    joined, new = extend(model, extend=replace(AS_THEY_COME, overlap_frames=overlap))
    expected = image_to_video(
        transformer, vae, clip[-overlap:], *prompts, SETTINGS, width=32, height=16, num_frames=9,
        image_settings=ImageSettings(prefix_frames=overlap), runtime=RUNTIME,
    )  # fmt: skip
    assert joined.shape == (11 + 9 - overlap, 16, 32, 3)
    assert torch.equal(joined[: 11 - overlap], clip[:-overlap])
    assert torch.equal(joined[11:], expected[overlap:])
    assert torch.equal(new, joined[11:])


class Collected:
    def __init__(self) -> None:
        self.frames = [torch.zeros(99, 16, 32, 3)]  # forgotten at the start
        self.starts = 0

    def restart(self) -> None:
        self.frames.clear()
        self.starts += 1

    def write(self, frames: torch.Tensor) -> None:
        self.frames.append(frames)


@pytest.mark.parametrize("color_match", [True, False])
@pytest.mark.parametrize("overlap", [1, 5])
def test_frame_by_frame_the_whole_is_the_same(model, overlap, color_match):
    settings = ExtendSettings(9, overlap, color_match)
    joined, _ = extend(model, extend=settings, decode="tiled-diffusers")
    latents = extend_latents(*model, SETTINGS, extend=settings, runtime=RUNTIME)
    collected = Collected()
    sink = Continuation(model[2], settings, collected)
    for starts in (1, 2):  # also when the decode is repeated
        decode_into(sink, model[1], latents, "tiled-diffusers", runtime=RUNTIME)
        assert torch.equal(torch.cat(collected.frames), joined)
        assert collected.starts == starts


def test_a_stop_between_the_frames_of_a_continuation_passes_through(model):
    calls = []

    def check() -> None:
        calls.append(1)
        if len(calls) == 12:  # the second new frame
            raise KeyboardInterrupt

    collected = Collected()
    sink = Continuation(model[2], AS_THEY_COME, collected, check=check)
    sink.restart()
    with pytest.raises(KeyboardInterrupt):
        sink.write(random_clip(9))
    assert len(torch.cat(collected.frames)) == 11


def test_a_seed_gives_the_same_frames_and_another_seed_others(model):
    _, first = extend(model)
    _, again = extend(model)
    _, other = extend(model, replace(SETTINGS, seed=4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_alpha_is_dropped_and_the_clip_is_not_changed(model):
    transformer, vae, _, *prompts = model
    clip = random_clip(6, channels=4)
    before = clip.clone()
    matched = replace(AS_THEY_COME, color_match=True)
    joined, _ = extend((transformer, vae, clip, *prompts), extend=matched)
    assert joined.shape == (14, 16, 32, 3)
    assert torch.equal(clip, before)


def test_progress_runs_through_every_stage_and_cancel_in_any_leaves_the_next_run_good(model):
    class StopError(Exception):
        pass

    stages, checks, limit = [], 0, None

    def check() -> None:
        nonlocal checks
        checks += 1
        if checks == limit:
            raise StopError

    runtime = TorchRuntime(on_progress=lambda stage, *_: stages.append(stage), on_check=check)
    matched = replace(AS_THEY_COME, color_match=True)
    expected, _ = extend(model, extend=matched, runtime=runtime)
    assert list(dict.fromkeys(stages)) == ["encode", "sample", "decode"]
    total = checks
    assert total > 20
    for number in (1, total // 3, total * 2 // 3, total):
        checks, limit = 0, number
        with pytest.raises(StopError):
            extend(model, extend=matched, runtime=runtime)
    checks, limit = 0, None
    assert torch.equal(extend(model, extend=matched, runtime=runtime)[0], expected)


# --- the join -----------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [1, 5])
def test_the_clip_fades_into_the_new_one_over_the_overlap(overlap):
    clip, new = torch.zeros(7, 2, 2, 3), torch.ones(9, 2, 2, 3)
    joined = join_clips(clip, new, overlap)
    fade = [index / (overlap + 1) for index in range(1, overlap + 1)]
    expected = [0.0] * (7 - overlap) + fade + [1.0] * (9 - overlap)
    assert joined[:, 0, 0, 0].tolist() == pytest.approx(expected, abs=1e-7)


def test_where_both_show_the_same_nothing_changes():
    clip = random_clip(12)
    assert torch.equal(join_clips(clip[:9], clip[4:], 5), clip)


# --- colours ------------------------------------------------------------------------------------


def to_linear(srgb: torch.Tensor) -> torch.Tensor:
    return torch.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def to_srgb(linear: torch.Tensor) -> torch.Tensor:
    return torch.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)


def test_a_change_of_exposure_and_white_balance_is_undone_in_every_frame():
    true = 0.2 + 0.6 * random_clip(9).double()
    gain, offset = torch.tensor([0.8, 1.1, 0.95]), torch.tensor([0.05, -0.01, 0.02])
    changed = to_srgb(to_linear(true) * gain + offset).float()
    assert (changed - true).abs().max() > 0.05
    match_colors(changed, true[:5].float(), check=never_interrupt)
    torch.testing.assert_close(changed, true.float(), atol=1e-5, rtol=0)


def test_what_happens_after_the_overlap_is_kept():
    """A clip that gets dark gets dark by the same factor in linear light."""
    fading = (0.2 + 0.6 * random_clip(9)) * torch.linspace(1, 0.3, 9)[:, None, None, None]
    matched = fading.clone()
    match_colors(matched, fading[:1], check=never_interrupt)
    torch.testing.assert_close(matched, fading, atol=1e-5, rtol=0)


def test_a_flat_channel_is_shifted_and_its_noise_is_not_blown_up():
    noise = 1e-5 * torch.randn(5, 16, 32, 3, generator=torch.Generator().manual_seed(0))
    new, reference = 0.5 + noise, 0.2 + 0.6 * random_clip(1)
    match_colors(new, reference, check=never_interrupt)
    expected = to_srgb(to_linear(reference).mean((0, 1, 2)))
    torch.testing.assert_close(new.mean((0, 1, 2)), expected, atol=1e-3, rtol=0)
    assert new.std((1, 2)).max() < 1e-4


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"overlap_frames": 0}, "overlap of 0 frames is not a multiple of 4 plus 1: use 1"),
        ({"overlap_frames": 6}, "overlap of 6 frames is not a multiple of 4 plus 1: use 5"),
        ({"overlap_frames": 97}, "overlap of 97 frames leaves nothing new in 97"),
        ({"num_frames": 1}, "leaves nothing new in 1"),
        ({"num_frames": 96}, "96 frames is not a multiple of 4 plus 1: use 97"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values, words):
    with pytest.raises(ShapeError, match=words):
        ExtendSettings(**values)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((4, 32, 48, 3), "clip of 4 frames is too short to continue: give at least 5"),
        ((7, 32, 48, 3), "overlap of 9 frames is longer than the clip, which has 7: use 5 or less"),
        ((9, 32, 40, 3), "Width 40 is not a multiple of 16: use 32"),
        ((9, 30, 48, 3), "Height 30 is not a multiple of 16: use 32"),
        ((9, 32, 48), "A clip must be"),
        ((9, 3, 32, 48), "A clip must be"),
        ((0, 32, 48, 3), "A clip must be"),
    ],
)
def test_clips_that_cannot_be_continued_are_refused(shape, words):
    with pytest.raises(ShapeError, match=words):
        check_clip(torch.zeros(shape), ExtendSettings(overlap_frames=9))


def test_a_refused_clip_costs_no_work(model):
    transformer, vae, _, *prompts = model
    stages = []
    runtime = TorchRuntime(on_progress=lambda stage, *_: stages.append(stage))
    with pytest.raises(ShapeError, match="too short"):
        extend((transformer, vae, random_clip(3), *prompts), runtime=runtime)
    assert stages == []


# --- the built-in model -------------------------------------------------------------------------


def red_circle(x: float, y: float = 32.0) -> torch.Tensor:
    """[1, 64, 64, 3]: the example image with its circle elsewhere."""
    image = example_image()
    ground = image[:, :, :1].expand(-1, -1, 64, -1)
    columns, rows = (torch.arange(64) + 0.5)[None, :], (torch.arange(64) + 0.5)[:, None]
    distance = ((columns - x).square() + (rows - y).square()).sqrt()
    cover = (11.5 - distance).clamp(0, 1)[..., None]
    return torch.lerp(ground, torch.tensor([0.9, 0.1, 0.1]), cover)


def centre_of_red(clip: torch.Tensor) -> list[float]:
    """Column of the red shape's centre in every frame."""
    redness = (clip[..., 0] - clip[..., 2] - 0.1).clamp_min(0)
    columns = torch.arange(clip.shape[2]) + 0.5
    return ((redness.sum(1) * columns).sum(1) / redness.sum((1, 2))).tolist()


def steps_of(clip: torch.Tensor) -> torch.Tensor:
    """Root mean square difference of each frame to the next."""
    return clip.diff(dim=0).square().mean((1, 2, 3)).sqrt()


@pytest.fixture(scope="module")
def studio():
    pytest.importorskip("transformers")
    with reused_memory():
        encoder = builtin.builtin_text_encoder(runtime=RUNTIME)
        prompt = encode_prompt(encoder, "a red circle moves left", runtime=RUNTIME)
        negative = encode_prompt(
            encoder, DEFAULT_NEGATIVE_PROMPT, fps_prefix=False, runtime=RUNTIME
        )
        models = builtin.builtin_transformer(runtime=RUNTIME), builtin.builtin_vae(runtime=RUNTIME)
        settings = SamplingSettings(seed=1, sigmas=get_sigmas(12))
        clip = image_to_video(
            *models, red_circle(50), prompt, negative, settings, width=64, height=64,
            num_frames=17, runtime=RUNTIME,
        )  # fmt: skip
        yield *models, clip, prompt, negative


@pytest.mark.parametrize("overlap", [1, 5])
def test_a_circle_that_moves_left_goes_on_and_nothing_jumps_at_the_join(studio, overlap):
    clip = studio[2]
    before = centre_of_red(clip)
    assert before[0] - before[-1] > 16
    settings = SamplingSettings(seed=2, sigmas=get_sigmas(12))
    joined, new = extend(studio, settings, ExtendSettings(17, overlap))
    assert (len(joined), len(new)) == (34 - overlap, 17 - overlap)
    path = centre_of_red(joined)
    # 24 pixels in the first clip; the same speed goes on until the circle is at the border
    assert path[16] - path[24] > 6
    assert all(b <= a + 0.5 for a, b in pairwise(path[:25]))
    at_join = steps_of(joined)[16 - overlap : 18]
    assert at_join.max() <= steps_of(clip).max()
