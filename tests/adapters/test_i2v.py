"""SkyReels I2V: one graph on this machine and on Wiro, and never paid for without leave."""

import json
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import comfyui_skyreels
import pytest
import torch
from comfyui_skyreels.nodes import i2v
from comfyui_skyreels.nodes.local import found
from comfyui_skyreels.nodes.remote import account
from comfyui_skyreels.nodes.remote import run as wiro_run
from comfyui_skyreels.skyreels.builtin import BUILTIN_FOLDER, BUILTIN_NAME
from comfyui_skyreels.skyreels.errors import OptionError
from comfyui_skyreels.skyreels.vae.model import VideoVAE
from comfyui_skyreels.wiro_api.errors import ConfigError, LimitError
from comfyui_skyreels.wiro_api.spending import Limits, save_limits
from support import host, tiny

pytestmark = pytest.mark.usefixtures("fast_convolutions", "kept_models")
NODES = comfyui_skyreels.NODE_CLASS_MAPPINGS
SIZE = {"width": 64, "height": 64, "num_frames": 5}
WIRO_SIZE = {"width": 960, "height": 544, "num_frames": 5}


def graph(**widgets) -> dict:
    inputs = {
        "image": ["1", 0], "prompt": "a red circle moves left", "backend": "auto",
        "transformer": BUILTIN_NAME, "fit": "crop", "seed": 5, "steps": 2, "cfg": 6.0, **SIZE,
        "negative_prompt": "blur", **widgets,
    }  # fmt: skip
    return {
        "1": {"class_type": "EmptyImage",
              "inputs": {"width": 64, "height": 64, "color": 0x3060A0, "batch_size": 1}},
        "2": {"class_type": "SkyReelsI2V", "inputs": inputs},
        "3": {"class_type": "SaveVideo", "inputs": {"video": ["2", 1]}},
        "4": {"class_type": "ImageStitch", "inputs": {"image1": ["2", 0], "image2": ["2", 0]}},
    }  # fmt: skip


def run(**widgets) -> dict:
    made = host.run_prompt(graph(**widgets), NODES)["2"]
    return dict(zip(NODES["SkyReelsI2V"].RETURN_NAMES, made, strict=True))


def runs(wiro) -> int:
    return sum(path.startswith("Run/") for path in wiro.paths())


def test_the_clip_is_that_of_the_local_nodes_bit_for_bit(comfy, wiro):
    def node(class_type: str, **inputs) -> dict:
        return {"class_type": class_type, "inputs": inputs}

    nodes = {
        "1": graph()["1"],
        "m": node("SkyReelsTransformerLoader", transformer=BUILTIN_NAME, precision="auto"),
        "v": node("SkyReelsVAELoader", vae=BUILTIN_NAME, precision="auto"),
        "e": node("SkyReelsTextEncoderLoader", text_encoder=BUILTIN_NAME),
        "p": node("SkyReelsTextEncode", text_encoder=["e", 0], prompt="a red circle moves left",
                  add_fps_prefix=True),
        "n": node("SkyReelsTextEncode", text_encoder=["e", 0], prompt="blur", add_fps_prefix=False),
        "i": node("SkyReelsImageConditioning", vae=["v", 0], image=["1", 0], fit="crop", **SIZE),
        "s": node("SkyReelsSampler", model=["m", 0], positive=["p", 0], negative=["n", 0],
                  image=["i", 0], seed=5, steps=2, cfg=6.0, embedded_guidance=1.0, shift=7.0),
        "d": node("SkyReelsVAEDecode", vae=["v", 0], samples=["s", 0], mode="auto"),
    }  # fmt: skip
    expected = host.run_prompt(nodes, NODES)["d"][0]
    for backend in ("local", "auto"):
        made = run(backend=backend)
        assert torch.equal(made["images"], expected)
        assert torch.equal(made["video"][0], expected)
        assert made["task_id"] == ""
        told = json.loads(made["receipt"])
        assert told["parameters"]["prompt"] == "FPS-24, a red circle moves left"
        assert (told["backend"], told["parameters"]["decode"]) == ("local", "auto")
        assert made["report"].startswith("Made here")
    assert "Plan for 5 frames" in made["report"]
    assert wiro.seen == []


@pytest.mark.parametrize(
    "widgets", [{"backend": "remote"}, {"transformer": "auto", "allow_paid_remote": True}]
)
def test_the_same_graph_runs_on_wiro(comfy, wiro, widgets):
    made = run(**widgets, **WIRO_SIZE)
    assert tuple(made["images"].shape) == (5, 32, 48, 3)
    assert Path(made["video"].file).read_bytes() == wiro.files["0.mp4"]
    told = json.loads(made["receipt"])
    assert (told["backend"], told["taskid"], told["cost_usd"]) == (
        "wiro",
        made["task_id"],
        "0.00351",
    )
    assert runs(wiro) == 1
    assert made["report"].startswith("Made on wiro.ai: ")
    if "transformer" in widgets:
        assert "lacks a SkyReels-V1 image-to-video transformer" in made["report"]


def test_where_it_ran_and_what_was_paid_is_kept_on_the_node(comfy, wiro):
    wiro.price = [{"inputs": {}, "price": 0.3, "priceMethod": "cpr"}]
    run(backend="remote", **WIRO_SIZE)
    run(backend="local")
    kept = [data for name, data in comfy.events if name == "skyreels.wiro.outcome"]
    lines = ["done · charged $0.30 · task 2221", "on this machine · nothing paid"]
    assert [(data["node"], data["line"]) for data in kept] == [("2", line) for line in lines]


@pytest.mark.parametrize("widgets", [{}, {"backend": "local", "allow_paid_remote": True}])
def test_nothing_is_paid_without_leave(comfy, wiro, widgets):
    with pytest.raises(OptionError) as caught:
        run(transformer="auto", **WIRO_SIZE, **widgets)
    text = str(caught.value)
    assert "lacks a SkyReels-V1 image-to-video transformer" in text
    assert "put the files there" in text
    assert "wiro.ai" in text
    assert ("allow_paid_remote on" in text) == (not widgets)
    assert wiro.seen == []


def test_a_limit_holds_although_it_is_allowed(comfy, wiro):
    wiro.price = [{"inputs": {}, "price": 0.3, "priceMethod": "cpr"}]
    save_limits(account.limits_file(), Limits(per_run=Decimal("0.1")))
    with pytest.raises(LimitError, match=r"would cost \$0\.30; your limit is \$0\.10 a run"):
        run(transformer="auto", allow_paid_remote=True, **WIRO_SIZE)
    assert runs(wiro) == 0


def test_a_size_that_wiro_does_not_make_is_named_before_anything_is_sent(comfy, wiro):
    with pytest.raises(ConfigError, match="960x544 and 544x960, and the clip is 64x64"):
        run(backend="remote")
    assert wiro.seen == []


def test_a_clip_that_does_not_fit_is_not_begun_and_the_plan_says_why(comfy, wiro, monkeypatch):
    obstacle = "It needs 40 GB, and 24 GB are free."

    class Plan:
        text = "machine\nplan"

    Plan.obstacle = obstacle
    monkeypatch.setattr(i2v, "plan_clip", lambda *_: Plan)
    with pytest.raises(OptionError, match="It needs 40 GB"):
        run(**WIRO_SIZE)
    made = run(allow_paid_remote=True, **WIRO_SIZE)
    assert obstacle in made["report"]


def test_cancel_stops_the_clip_here(comfy, wiro):
    comfy.cancel_after = 12
    with pytest.raises(host.InterruptProcessingException):
        run(backend="local")


def test_cancel_stops_the_task_at_wiro(comfy, wiro, monkeypatch):
    wiro.states, wiro.steps_by_itself = ("task_start", "task_postprocess_end"), False
    follow = wiro_run.RunView.on_task

    def follow_and_cancel(view, task) -> None:
        comfy.is_cancelled = True
        follow(view, task)

    monkeypatch.setattr(wiro_run.RunView, "on_task", follow_and_cancel)
    with pytest.raises(host.InterruptProcessingException):
        run(backend="remote", **WIRO_SIZE)
    assert wiro.tasks["2221"]["status"] == "task_cancel"


# --- weights by their headers -------------------------------------------------------------------


def test_weights_are_found_by_their_headers_whatever_their_names(comfy):
    assert (found.transformers(), found.vae(), found.text_encoders()) == ([], None, None)
    folder = comfy.folder("diffusion_models")
    tiny.save(folder / "b.safetensors", tiny.transformer().state_dict())
    text_only = tiny.transformer(replace(tiny.TRANSFORMER, in_channels=16))
    tiny.save(folder / "a.safetensors", text_only.state_dict())
    tiny.save(comfy.folder("vae") / "a.safetensors", text_only.state_dict())
    tiny.save(comfy.folder("vae") / "x.safetensors",
              tiny.randomize(VideoVAE(tiny.SMALL_VAE)).state_dict())  # fmt: skip
    (folder / "junk.safetensors").write_bytes(b"no weights at all")
    assert found.transformers() == ["b.safetensors"]
    assert found.vae() == "x.safetensors"


def test_a_folder_with_both_text_encoders_is_found(comfy):
    target = comfy.folder("text_encoders") / "any name"
    target.mkdir(parents=True)
    for part in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        (target / part).symlink_to(BUILTIN_FOLDER / part)
    assert found.text_encoders() == ("any name (folder)", "in the folder")
    assert found.text_encoders("any name (folder)") == ("any name (folder)", "in the folder")
