"""The stored threshold of the cache: how it is picked, where it lies, and for what it counts."""

import json
import logging
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from comfyui_skyreels.skyreels.builtin import BUILTIN_FOLDER
from comfyui_skyreels.skyreels.errors import CheckpointError, OptionError
from comfyui_skyreels.skyreels.sampling.calibrate import (
    CACHE_CHOICES,
    THRESHOLDS,
    Calibration,
    Score,
    choose_cache,
    fingerprint_weights,
    least_computed,
    parse_passes,
    pick,
    place_beside,
    place_of_user,
    save_calibration,
    table_of,
)
from comfyui_skyreels.skyreels.sampling.step_cache import CACHES, CacheConfig
from comfyui_skyreels.skyreels.weights.load import check_transformer
from support import tiny

BUILTIN = BUILTIN_FOLDER / "transformer"


def falling(first: int, error_db: float) -> list[tuple[int, float]]:
    """A clip that takes one evaluation less with each threshold, down to 24."""
    return [(max(24, first - index), error_db - index) for index in range(len(THRESHOLDS))]


def calibration(info, threshold=0.03, **changes) -> Calibration:
    score = Score(8, 30.0, 40.0, 35.0)
    made = Calibration(
        name="x",
        fingerprint=fingerprint_weights(info),
        threshold=threshold,
        passes_of=60,
        settings={"steps": 30},
        replayed=score,
        measured=None,
        thresholds={0.03: score},
        versions={},
    )
    return replace(made, **changes)


@pytest.fixture
def weights(tmp_path):
    """The built-in transformer in a folder of its own."""
    shutil.copytree(BUILTIN, tmp_path / "model")
    return check_transformer(tmp_path / "model")


# --- picking ------------------------------------------------------------------------------------


def test_the_smallest_threshold_with_which_the_mean_is_as_wanted_is_picked():
    clips = [falling(60, 80.0), falling(56, 90.0)]
    threshold, score = pick(clips, 40.0)
    # means 58, 57, ...: 40 is reached by the nineteenth
    assert (threshold, score) == (THRESHOLDS[18], Score(2, 40.0, 67.0, 62.0))
    assert pick(clips, 40.1)[0] == threshold
    assert pick(clips, 39.9)[0] == THRESHOLDS[19]


def test_where_no_threshold_saves_enough_the_largest_is_picked():
    assert pick([falling(60, 80.0)], 20.0) == (THRESHOLDS[-1], Score(1, 24, 32.0, 32.0))


def test_the_table_has_mean_median_and_worst_of_every_threshold():
    table = table_of([falling(60, 80.0), falling(60, 70.0), falling(59, 20.0)])
    assert list(table) == list(THRESHOLDS)
    assert table[THRESHOLDS[0]] == Score(3, 59.67, 70.0, 20.0)


@pytest.mark.parametrize(
    ("text", "count"), [("50%", 30), ("0.5", 30), ("30", 30), ("60", 60), ("1.0", 60), ("40%", 24)]
)
def test_wanted_evaluations_are_a_count_or_a_share(text, count):
    assert parse_passes(text, 30, 60) == count


@pytest.mark.parametrize("text", ["10%", "23", "61", "101%", "nan", "nan%", "x", "", "%", "-1"])
def test_evaluations_that_no_threshold_gives_are_refused_with_the_limits(text):
    with pytest.raises(OptionError, match=re.escape("is not within 24..60 model evaluations")):
        parse_passes(text, 30, 60)


@pytest.mark.parametrize(
    ("num_steps", "least"), [(1, 1), (2, 2), (3, 3), (4, 3), (20, 8), (30, 12)]
)
def test_so_many_steps_are_always_computed(num_steps, least):
    assert least_computed(num_steps) == least


# --- the file -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place", [place_beside, lambda info: place_of_user("".join([fingerprint_weights(info)]))]
)
def test_what_is_stored_beside_the_weights_or_for_the_user_is_found(weights, place, caplog):
    caplog.set_level(logging.INFO)
    save_calibration(place(weights), calibration(weights))
    assert choose_cache("calibrated", weights, 30) == CacheConfig("easy", 0.03)
    assert "threshold 0.03, 30 of 60 model evaluations" in caplog.text
    assert str(place(weights)) in caplog.text
    assert [r.levelname for r in caplog.records] == ["INFO"]


def test_real_runs_are_told_where_they_were_made(weights, caplog):
    caplog.set_level(logging.INFO)
    measured = Score(4, 31.0, 50.0, 45.5)
    save_calibration(place_beside(weights), calibration(weights, measured=measured))
    choose_cache("calibrated", weights, 30)
    assert "31 of 60 model evaluations, latents 50 dB to exact, worst 45.5 dB" in caplog.text
    assert "measured, 4 clips" in caplog.text


def test_another_number_of_steps_is_warned_of(weights, caplog):
    save_calibration(place_beside(weights), calibration(weights))
    assert choose_cache("calibrated", weights, 20) == CacheConfig("easy", 0.03)
    assert "calibrated with 30 steps, and this run has 20" in caplog.text


def test_without_a_file_the_command_is_told(weights):
    with pytest.raises(OptionError, match="No cache threshold is stored for model") as refusal:
        choose_cache("calibrated", weights, 30)
    assert f'`python -m skyreels calibrate "{weights.path}"` once' in str(refusal.value)
    with pytest.raises(OptionError, match="`python -m skyreels calibrate` once"):
        choose_cache("calibrated", check_transformer(BUILTIN), 30)


def test_weights_that_changed_are_refused(weights):
    save_calibration(place_beside(weights), calibration(weights))
    file = next(Path(weights.path).glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(OptionError, match="was measured on other weights than model: run"):
        choose_cache("calibrated", weights, 30)
    save_calibration(place_of_user(fingerprint_weights(weights)), calibration(weights, 0.05))
    assert choose_cache("calibrated", weights, 30).threshold == 0.05


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is damaged: delete it"),
        ("[]", "other weights"),
        ('{"weights": 3}', "other weights"),
        ({"format": 2}, "is not a calibration of this version"),
        ({"threshold": 2}, "is not a calibration of this version"),
        ({"threshold": "x"}, "is not a calibration of this version"),
        ({"settings": None}, "is not a calibration of this version"),
        ({"replayed": {}}, "is not a calibration of this version"),
    ],
)
def test_a_file_that_is_none_is_one_sentence(weights, content, words):
    place = place_beside(weights)
    if isinstance(content, dict):
        content = json.dumps({**calibration(weights).to_json(), **content})
    place.write_text(content)
    with pytest.raises((CheckpointError, OptionError), match=words):
        choose_cache("calibrated", weights, 30)


def test_a_transformer_that_is_no_file_has_no_calibration():
    with pytest.raises(OptionError, match="loaded from a file"):
        choose_cache("calibrated", None, 30)


@pytest.mark.parametrize("name", CACHES)
def test_the_other_choices_are_those_of_the_table(name):
    assert choose_cache(name, None, 30) == CACHES[name]
    assert [*CACHES, "calibrated"] == list(CACHE_CHOICES)


def test_the_file_lies_beside_the_weights_under_their_name(tmp_path):
    info = check_transformer(BUILTIN)
    assert place_beside(info) == BUILTIN / "diffusion_pytorch_model.cache.json"
    path = tiny.save(tmp_path / "a b.safetensors", tiny.transformer().state_dict())
    assert place_beside(check_transformer(path)) == tmp_path / "a b.cache.json"


def test_a_fingerprint_is_that_of_the_bytes_and_not_of_the_name(tmp_path, weights):
    assert fingerprint_weights(weights) == fingerprint_weights(check_transformer(BUILTIN))
    path = tiny.save(tmp_path / "x.safetensors", tiny.transformer().state_dict())
    assert fingerprint_weights(check_transformer(path)) != fingerprint_weights(weights)
