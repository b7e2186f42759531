"""SkyReels Plan: the table on the node, from a header alone."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import comfyui_skyreels
import pytest
import torch
from comfyui_skyreels.skyreels.builtin import BUILTIN_NAME
from comfyui_skyreels.skyreels.errors import ShapeError
from comfyui_skyreels.skyreels.transformer import rates
from support import tiny

SIZE = {"width": 64, "height": 64, "num_frames": 17, "steps": 6, "cfg": 6.0}


@pytest.fixture(autouse=True)
def no_probe(monkeypatch):
    monkeypatch.setattr(rates, "_measure", lambda name, device: None if name == "link" else 1e12)
    monkeypatch.setattr(rates, "_measured", {})


def plan(**inputs):
    cls = comfyui_skyreels.NODE_CLASS_MAPPINGS["SkyReelsPlan"]
    with torch.inference_mode():
        return cls().plan(**{"transformer": BUILTIN_NAME, **SIZE, "unique_id": "7", **inputs})


def test_the_text_is_on_the_node_and_in_its_output(comfy):
    found = plan()
    (text,) = found["result"]
    assert found["ui"]["text"] == (text,)
    assert comfy.texts == [text]
    assert "17 frames of 64x64" in text
    assert "-> " in text
    assert "6 steps of about" in text
    assert (comfy.root / "user" / "__skyreels" / "plan.json").is_file()


def test_memory_of_models_that_would_be_unloaded_counts_as_free(comfy):
    comfy.free_bytes = 10**9
    for device, gigabytes in ((torch.device("cpu"), 3), ("cuda:1", 9)):
        loaded = SimpleNamespace(
            device=device, model="a patcher", model_loaded_memory=partial(int, gigabytes * 10**9)
        )
        comfy.others.append(loaded)
    assert "of 4.0 GB free" in plan()["result"][0]


def test_what_does_not_fit_is_told_with_what_would(comfy):
    comfy.free_bytes = 10**6
    text = plan()["result"][0]
    assert "\nno" in text
    assert "What would work" in text


def test_a_text_to_video_file_is_planned_like_any_other(comfy):
    config = replace(tiny.TRANSFORMER, in_channels=16)
    state = tiny.transformer(config).state_dict()
    tiny.save(comfy.folder("diffusion_models") / "t2v.safetensors", state)
    assert "17 frames of 64x64" in plan(transformer="t2v.safetensors")["result"][0]


def test_an_illegal_size_is_refused(comfy):
    with pytest.raises(ShapeError):
        plan(num_frames=18)


def test_the_plan_is_made_anew_each_time(comfy):
    cls = comfyui_skyreels.NODE_CLASS_MAPPINGS["SkyReelsPlan"]
    first = cls.IS_CHANGED(transformer=BUILTIN_NAME, **SIZE)
    assert first != cls.IS_CHANGED(transformer=BUILTIN_NAME, **SIZE)
