"""Receipts of clips: what they hold, what makes the clip again, and what is refused."""

import json
import re

import pytest
import torch
from comfyui_skyreels.skyreels import cli, media
from comfyui_skyreels.skyreels.builtin import BUILTIN_NAME
from comfyui_skyreels.skyreels.config import VERSION
from comfyui_skyreels.skyreels.errors import SkyReelsError
from comfyui_skyreels.skyreels.image import picture_digest
from comfyui_skyreels.skyreels.pipeline import receipt as receipts
from comfyui_skyreels.skyreels.pipeline.receipt import (
    MARK,
    MAX_BYTES,
    PARAMETERS,
    Weights,
    difference,
    parse_receipt,
    read_receipt,
)
from PIL import Image, PngImagePlugin
from support.project import PYPROJECT

pytestmark = pytest.mark.usefixtures("fast_convolutions", "kept_models")
SIZE = ["--width", "32", "--height", "32", "--frames", "5"]
RUN = ["--prompt", "a red circle moves left", "--seed", "7", "--steps", "2", "--shift", "9",
       "--cfg", "4", "--negative", "blur", *SIZE]  # fmt: skip
TOLD = {
    MARK: 1,
    "backend": "local",
    "model": BUILTIN_NAME,
    "parameters": {"prompt": "a", "seed": 3},
}


def generate(capsys, *options) -> tuple[int, dict, str]:
    code = cli.main(["generate", *map(str, options), "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out), err


def told(**changes) -> str:
    return json.dumps({**TOLD, **changes})


def test_the_version_is_that_of_the_package():
    assert PYPROJECT["project"]["version"] == VERSION


@pytest.mark.parametrize("suffix", ["mp4", "npy"])
def test_a_clip_is_made_again_bit_for_bit_from_its_file(capsys, tmp_path, suffix):
    exact, holder, again = (tmp_path / name for name in ("a.npy", f"b.{suffix}", "c.npy"))
    code, made, _ = generate(capsys, *RUN, "--out", exact)
    assert code == 0
    assert generate(capsys, *RUN, "--out", holder)[0] == 0
    code, remade, _ = generate(capsys, "--from-receipt", holder, "--out", again)
    assert code == 0
    assert exact.read_bytes() == again.read_bytes()
    told = {k: v for k, v in made["receipt"].items() if k not in receipts.MOMENTARY}
    assert told == {k: v for k, v in remade["receipt"].items() if k not in receipts.MOMENTARY}


def test_a_receipt_tells_inputs_weights_and_cost_and_no_place(capsys, tmp_path):
    _, made, _ = generate(capsys, *RUN, "--out", tmp_path / "a.mp4")
    told = made["receipt"]
    assert told["parameters"].items() >= {
        "prompt": "FPS-24, a red circle moves left", "negative_prompt": "blur", "seed": 7,
        "steps": 2, "shift": 9.0, "cfg": 4.0, "width": 32, "height": 32, "num_frames": 5,
    }.items()  # fmt: skip
    assert set(told["weights"]) == {"transformer", "vae", "llama", "clip"}
    for each in told["weights"].values():
        assert each["name"] == BUILTIN_NAME
        assert re.fullmatch("[0-9a-f]{64}", each["sampled_sha256"])
    assert (told["backend"], told["cost_usd"]) == ("local", "0")
    assert str(tmp_path) not in json.dumps(told)


def test_what_is_given_beside_a_receipt_counts(capsys, tmp_path):
    generate(capsys, *RUN, "--out", tmp_path / "a.mp4")
    _, made, _ = generate(
        capsys, "--from-receipt", tmp_path / "a.mp4", "--seed", 8, "--out", tmp_path / "b.npy"
    )
    assert made["receipt"]["parameters"]["seed"] == 8
    assert made["receipt"]["parameters"]["shift"] == 9.0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "real.safetensors"}, "made with real.safetensors"),
        ({"model": "real.safetensors",
          "weights": {"transformer": {"name": "x/real.safetensors", "num_bytes": 5 * 10**9}}},
         r"made with real\.safetensors \(5\.00 GB\)"),
        ({"loras": [{"name": "a.safetensors", "strength": 0.5}]}, "--lora PATH/a.safetensors:0.5"),
    ],
)  # fmt: skip
def test_weights_that_a_receipt_names_must_be_given(capsys, tmp_path, changes, words):
    (tmp_path / "r.json").write_text(told(**changes))
    code, answer, _ = generate(
        capsys, "--from-receipt", tmp_path / "r.json", "--out", tmp_path / "a.npy"
    )
    assert code == 1
    assert re.search(words, answer["error"])
    assert not (tmp_path / "a.npy").exists()


def test_weights_and_pictures_that_differ_are_said_and_not_refused(capsys, tmp_path):
    generate(capsys, *RUN, "--out", tmp_path / "a.npy")
    place = tmp_path / "a.receipt.json"
    stored = json.loads(place.read_bytes())
    stored["weights"]["vae"]["sampled_sha256"] = "0" * 64
    stored["picture"]["sha256"] = "1" * 64
    place.write_text(json.dumps(stored))
    code, _, err = generate(capsys, "--from-receipt", place, "--out", tmp_path / "b.npy")
    assert code == 0
    assert f"The vae {BUILTIN_NAME} is not the one of the receipt" in err
    assert "The picture is not the one of the receipt" in err
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()


def test_the_prompt_is_still_needed_without_a_receipt(capsys, tmp_path):
    with pytest.raises(SystemExit) as caught:
        cli.main(["generate", "--out", str(tmp_path / "a.npy")])
    assert caught.value.code == 2
    assert "--prompt" in capsys.readouterr().err


# --- reading ------------------------------------------------------------------------------------


def test_missing_values_are_the_usual_ones_and_are_named():
    receipt = parse_receipt(told())
    assert receipt.parameters["seed"] == 3
    assert receipt.parameters["steps"] == 30
    assert set(receipt.unknown) == set(PARAMETERS) - {"prompt", "seed"}


def test_a_receipt_of_wiro_is_read_with_its_names():
    stored = {
        "wiro_receipt": 1, "taskid": "7", "model": "wiro/SkyReels-V1", "cost_usd": "0.3",
        "parameters": {"prompt": "FPS-24, a fox", "negativePrompt": "blur", "scale": "5",
                       "steps": "20", "numFrames": "49", "size": "544x960"},
    }  # fmt: skip
    for given in (stored, {k: v for k, v in stored.items() if k != "wiro_receipt"}):  # the node's
        receipt = parse_receipt(json.dumps(given))
        assert receipt.backend == "wiro"
        assert receipt.parameters.items() >= {
            "prompt": "FPS-24, a fox", "negative_prompt": "blur", "cfg": 5.0, "steps": 20,
            "num_frames": 49, "width": 544, "height": 960, "seed": 0,
        }.items()  # fmt: skip
        assert "seed" in receipt.unknown


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not JSON"),
        (told()[:-9], "cut short"),
        ("[1]", "not a receipt"),
        ("[" * 100_000, "not JSON|not a receipt"),
        ('{"version": 1, "nodes": []}', "not a receipt.*version, nodes"),
        (json.dumps({MARK: 1}), "not a receipt"),
        (told(**{MARK: 2}), "format 2.*update"),
        (json.dumps({"wiro_receipt": 1, "taskid": "1", "parameters": {"q": 1}}), "another model"),
        (told() + " " * 10 * 1024**2, "characters long"),
        (told(parameters={"steps": 0}), "steps is 0.*1..1000"),
        (told(parameters={"steps": 1e400}), "steps is inf"),
        (told(parameters={"steps": True}), "steps is True"),
        (told(parameters={"seed": -1}), "seed is -1"),
        (told(parameters={"seed": 2**64}), "seed is"),
        (told(parameters={"cfg": "much"}), "cfg is much"),
        (told(parameters={"shift": float("nan")}), "shift is nan"),
        (told(parameters={"fit": "zoom"}), "fit is zoom.*crop"),
        (told(parameters={"attention": ["exact"]}), "attention is"),
        (told(parameters={"prompt": 5}), "prompt is no text"),
        (told(parameters={"prompt": "a" * 20_001}), "prompt is 20001 characters"),
        (told(parameters={"width": 100}), "16"),
        (told(parameters={"width": 16_000}), "16000"),
        (told(parameters={"num_frames": 98}), "98"),
        (told(loras=[{"name": "a", "strength": 1e9}]), "strength"),
    ],
)
def test_what_is_no_receipt_is_refused_in_a_sentence(text, words):
    with pytest.raises(SkyReelsError) as caught:
        parse_receipt(text)
    assert re.search(words, str(caught.value), re.DOTALL)
    assert len(str(caught.value)) < 600


def test_texts_of_a_receipt_are_clean_and_names_have_no_folder():
    receipt = parse_receipt(told(
        model="C:\\models\\secret\\a.safetensors",
        parameters={"prompt": "a\x1b[2J\u202eb\nc"},
        weights={"vae": {"name": "/srv/x/\x1b[31mv.safetensors", "sampled_sha256": "zz"}},
        by_hand=["sampler\x07"],
    ))  # fmt: skip
    assert receipt.model == "a.safetensors"
    assert receipt.parameters["prompt"] == "a[2Jb\nc"
    assert receipt.weights == {"vae": Weights("\\x1b[31mv.safetensors")}
    assert receipt.by_hand == ("sampler\\x07",)


def test_weights_are_compared_by_their_sampled_hash():
    receipt = parse_receipt(told(weights={"vae": {"name": "v", "sampled_sha256": "a" * 64}}))
    same = {"name": "v", "sampled_sha256": "a" * 64}
    assert difference(receipt, "vae", same) == ""
    assert "is not here" in difference(receipt, "vae", None)
    assert "is not the one" in difference(receipt, "vae", {**same, "sampled_sha256": "b" * 64})
    assert difference(receipt, "transformer", None) == ""


# --- files --------------------------------------------------------------------------------------


def test_a_png_holds_a_receipt_too(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text(MARK, told())
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", pnginfo=info)
    assert read_receipt(tmp_path / "a.png").parameters["seed"] == 3


def test_a_receipt_beside_a_clip_is_found(tmp_path):
    media.write_frames(tmp_path / "a.mp4", torch.zeros(2, 16, 16, 3))
    with pytest.raises(SkyReelsError, match=r"a\.mp4 holds no receipt"):
        read_receipt(tmp_path / "a.mp4")
    (tmp_path / "a.receipt.json").write_text(told())
    assert read_receipt(tmp_path / "a.mp4").parameters["seed"] == 3


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", b" " * (MAX_BYTES + 1), "more than"),
        ("a.json", b"\xff\xfe\x00", "not JSON"),
        ("a.mp4", b"no video", "cannot be read as a video"),
        ("a.png", b"no picture", "cannot be read as a PNG"),
        ("a.npy", b"", "holds no receipt"),
        ("b.json", None, "does not exist"),
    ],
)
def test_a_file_without_a_receipt_is_named(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SkyReelsError, match=words):
        read_receipt(tmp_path / name)


def test_a_video_of_a_workflow_says_where_the_workflow_is(tmp_path):
    with media.open_frames(tmp_path / "a.mp4", 2, 16, 16, metadata={"prompt": "{}"}) as file:
        file.restart()
        file.write(torch.zeros(2, 16, 16, 3))
    with pytest.raises(SkyReelsError, match="drop it on ComfyUI's page"):
        read_receipt(tmp_path / "a.mp4")


def test_a_picture_is_known_by_its_pixels():
    image = torch.rand(2, 5, 7, 4)
    assert picture_digest(image) == picture_digest(image[:1, :, :, :3].clone())
    assert picture_digest(image) != picture_digest(1 - image)
    assert picture_digest(image) != picture_digest(image.transpose(1, 2))
