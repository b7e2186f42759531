"""The built-in model: it does what it was trained for, in every way it can be run, and says what
it is. The full yardstick is a bench (tests/bench/quality.py); this is a handful of its cases."""

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from bench import quality
from comfyui_skyreels.skyreels import builtin
from comfyui_skyreels.skyreels.conditioning import embeds as text_embeds
from comfyui_skyreels.skyreels.errors import DependencyError, OptionError
from comfyui_skyreels.skyreels.image import example_image
from comfyui_skyreels.skyreels.runtime import TorchRuntime
from comfyui_skyreels.skyreels.text import encode, load
from comfyui_skyreels.skyreels.transformer.quant import QuantLinear, is_quantizable
from comfyui_skyreels.skyreels.weights.inspect import inspect
from support.memory import reused_memory
from train import data, measure

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fast_convolutions")]
RUNTIME = TorchRuntime()
MAKERS = (builtin.builtin_transformer, builtin.builtin_vae)
#: one of every verb, none of whose prompts was ever seen in training
CASES = measure.held_out_cases(8, seed=2)
#: for all that does not speak of the 30 steps that are the default
FEW_STEPS = quality.Setting(steps=8)


class Studio(quality.Studio):
    """Makes no clip twice, and samples no latents twice: a clip takes three seconds."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict = {}

    def _once(self, key: tuple, image: torch.Tensor, make: Callable[[], Any]) -> Any:
        key = (*key, image.numpy().tobytes())
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def make(self, setting, image, prompt, **options):
        key = (setting, prompt, *sorted(options.items()))
        made = super().make
        return self._once(key, image, lambda: made(setting, image, prompt, **options))

    def sample(self, setting, image, embeds, seed, num_frames):
        setting = replace(setting, decode="full", tiling=None)
        texts = tuple(each.prompt_embeds.numpy().tobytes() for each in embeds)
        sample = super().sample
        return self._once(
            (setting, texts, seed, num_frames),
            image,
            lambda: sample(setting, image, embeds, seed, num_frames),
        )


@pytest.fixture(scope="module", autouse=True)
def memory():
    with reused_memory():
        yield


@pytest.fixture(scope="module")
def studio() -> Studio:
    pytest.importorskip("transformers")
    return Studio()


@pytest.fixture(scope="module")
def encoder(studio) -> load.TextEncoder:
    return builtin.builtin_text_encoder(runtime=RUNTIME)


@pytest.fixture(scope="module")
def exact(studio) -> tuple[dict, list[torch.Tensor]]:
    """The row of the yardstick and the clips in float32, of two cases."""
    row, clips, _ = quality.run_setting(studio, quality.SETTINGS["fp32"], CASES[:2], None)
    return row, clips


# --- the bars, on few cases ---------------------------------------------------------------------


def test_the_shape_does_as_told_and_the_picture_is_kept(studio, exact):
    """Two of the verbs at the 30 steps that are the default, and all of them at 8."""
    all_verbs = quality.run_setting(studio, FEW_STEPS, CASES, None)
    for row, clips, *_ in (exact, all_verbs):
        assert row["told"] == 100
        assert row["kept"] == 100
        assert row["first"] >= 24
        assert row["true"] >= 20
        assert all(clip.shape == (17, 64, 64, 3) for clip in clips)
    assert len(all_verbs[1]) == len(CASES)


@pytest.mark.parametrize(("setting", "decibels"), [("tiled 32/24", 26), ("12 steps", 26)])
def test_a_faster_setting_makes_nearly_the_same_clip(studio, exact, setting, decibels):
    row, _, _ = quality.run_setting(studio, quality.SETTINGS[setting], CASES[:2], exact[1][:2])
    assert row["told"] == 100
    assert row["exact"] >= decibels


@pytest.mark.parametrize(("precision", "decibels"), [("fp8", 35), ("bf16", 38), ("int8", 40)])
def test_a_lower_precision_makes_nearly_the_same_clip(studio, precision, decibels):
    """At 12 steps, as a forward pass takes ten times as long on a CPU."""
    exact, setting = quality.SETTINGS["12 steps"], quality.SETTINGS[precision]
    case = CASES[0]
    clip, _ = studio.make(exact, case.truth()[:1], case.prompt, seed=0)
    row, _, _ = quality.run_setting(studio, replace(setting, steps=12), [case], [clip])
    assert row["told"] == 100
    assert row["exact"] >= decibels


@pytest.mark.parametrize(
    ("setting", "forwards", "decibels"),
    [
        ("easy cache", 40, 50),
        ("fast cache", 30, 40),
        ("first-block cache", 40, 40),
    ],
)
def test_skipped_steps_save_passes_and_make_nearly_the_same_clip(
    studio, exact, setting, forwards, decibels
):
    row, clips = exact
    assert row["forwards"] == 60
    row, _, _ = quality.run_setting(studio, quality.SETTINGS[setting], CASES[:1], clips[:1])
    assert row["told"] == 100
    assert row["forwards"] <= forwards
    assert row["exact"] >= decibels


def test_the_prompt_decides_and_not_the_picture(studio):
    found = quality.opposites(studio, CASES[:2], FEW_STEPS)
    assert found == {"pairs that differ as told, %": 100}


def test_an_empty_prompt_flees_the_negative_one(studio):
    shifts = quality.negatives(studio, CASES[:1], ("moves left", "moves right"), FEW_STEPS)
    left, right = (
        shifts[f"shift right, empty prompt, negative {what!r}, px"]
        for what in ("moves left", "moves right")
    )
    assert left > 0 > right


@pytest.mark.parametrize(("width", "height", "frames"), [(64, 64, 33), (96, 64, 17)])
def test_sizes_not_trained_for_keep_the_shape(studio, width, height, frames):
    case = measure.held_out_cases(1, width=width, height=height)[0]
    image = case.truth(frames, width, height)[:1]
    clip, _ = studio.make(FEW_STEPS, image, case.prompt, seed=0, num_frames=frames)
    assert clip.shape == (frames, height, width, 3)
    found = measure.measure(clip, case.scene)
    assert found.colour == quality.case_colour(case)
    assert found.shape != "none"


def test_the_vae_gives_clips_back(studio):
    assert quality.round_trip(studio, CASES[:4])["VAE round trip, dB"] >= 28


def test_diffusers_own_classes_make_the_same_clip_of_the_same_files(studio):
    pytest.importorskip("diffusers")
    found = quality.through_diffusers(studio, CASES[0], FEW_STEPS)
    assert found["through diffusers, largest difference"] <= 1e-4


def test_the_measures_can_fail():
    """The picture standing still is no movement, and other colours are other colours."""
    case = CASES[0].told("left")
    still = case.truth()[:1].expand(17, -1, -1, -1)
    assert measure.measure(still, case.scene).verb != "left"
    assert measure.measure(case.truth().flip(-1), case.scene).colour != quality.case_colour(case)


# --- the files ----------------------------------------------------------------------------------


def test_the_files_are_small_and_recognised():
    files = list(builtin.BUILTIN_FOLDER.rglob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) <= 12e6
    transformer = inspect(builtin.BUILTIN_FOLDER / "transformer")
    assert (transformer.family, transformer.variant) == ("transformer", "skyreels-i2v")
    assert transformer.dtypes.keys() == {"BF16"}
    assert inspect(builtin.BUILTIN_FOLDER / "vae").family == "vae"


def test_it_has_every_part_of_the_real_one():
    config = builtin.builtin_transformer(runtime=RUNTIME).config
    assert (config.in_channels, config.out_channels, config.guidance_embeds) == (32, 16, True)
    assert min(config.num_layers, config.num_single_layers, config.num_refiner_layers) >= 1
    real = (16, 56, 56)
    scale = sum(real) // sum(config.rope_axes_dim)
    assert tuple(scale * axis for axis in config.rope_axes_dim) == real
    assert builtin.builtin_vae(runtime=RUNTIME).config.latent_channels == 16


def test_the_card_says_what_it_is_and_how_it_was_made():
    card = (builtin.BUILTIN_FOLDER / "README.md").read_text(encoding="utf-8")
    for word in ("not SkyReels-V1", "seeds", "held-out", "rerun", "Apache-2.0", "one CPU core"):
        assert word in card
    assert "not measured" not in card


def test_the_notice_says_in_one_sentence_that_this_is_not_skyreels():
    assert builtin.BUILTIN_NOTICE.count(".") == 1
    assert "not SkyReels" in builtin.BUILTIN_NOTICE


# --- the loaders --------------------------------------------------------------------------------


@pytest.mark.parametrize("make", MAKERS)
def test_an_unknown_precision_is_refused(make):
    with pytest.raises(OptionError, match="fp4"):
        make("fp4", runtime=RUNTIME)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(
    ("precision", "dtype"), [("auto", torch.float32), ("bf16", torch.bfloat16)]
)
def test_a_precision_sets_every_weight(make, precision, dtype):
    made = make(precision, runtime=RUNTIME)
    assert {tensor.dtype for tensor in made.state_dict().values()} == {dtype}


@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_8_bits_reach_every_block(precision):
    model = builtin.builtin_transformer(precision, runtime=RUNTIME)
    quantized = {name for name, layer in model.named_modules() if isinstance(layer, QuantLinear)}
    exact = builtin.builtin_transformer(runtime=RUNTIME)
    assert quantized == {
        name
        for name, layer in exact.named_modules()
        if isinstance(layer, torch.nn.Linear) and is_quantizable(f"{name}.weight", 2)
    }


@pytest.mark.parametrize("words", ["", "мир 你好 😀", "a {brace} <|eot_id|>"])
def test_any_text_encodes(encoder, words):
    config = builtin.builtin_transformer(runtime=RUNTIME).config
    embeds = encode.encode_prompt(encoder, words, runtime=RUNTIME)
    text_embeds.check_prompt_embeds(embeds, config)


def test_the_words_it_knows_are_those_of_its_training(encoder):
    generator = torch.Generator().manual_seed(1)
    scenes = data.draw_scenes(4000, generator, held_out=None)
    texts = [*data.write_prompts(scenes, generator), encode.DEFAULT_NEGATIVE_PROMPT]
    trained = {word for text in texts for word in re.findall(r"[^\W\d_]+", text.lower())}
    assert encoder.known_words == trained | {"fps"}


def test_the_template_takes_as_many_tokens_as_the_real_one(encoder):
    assert encoder.crop_start == load.REAL_CROP_START


def test_a_long_prompt_is_cut_to_256_tokens(encoder):
    embeds = encode.encode_prompt(encoder, "word " * 300, runtime=RUNTIME)
    assert embeds.prompt_embeds.shape[1] == 256


def test_without_transformers_the_command_that_installs_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(DependencyError, match="pip install 'transformers"):
        builtin.builtin_text_encoder(runtime=RUNTIME)


def test_the_example_is_a_picture_of_the_kind_it_knows():
    image = example_image()
    assert image.shape == (1, 64, 64, 3)
    assert image.dtype == torch.float32
    red = torch.tensor(data.COLOURS["red"])
    covered = ((image[0] - red).norm(dim=-1) < 0.1).sum()
    low, high = (measure.AREAS[0] * size**2 for size in (9, 13))
    assert low < covered < high
