"""SkyReels From Receipt and the receipt of the sampler: clip -> receipt -> inputs -> clip."""

import json
import os
import shutil

import comfyui_skyreels
import pytest
import torch
from comfyui_skyreels.nodes.local import receipts
from comfyui_skyreels.nodes.local.receipts import decode_mode, prompt_text
from comfyui_skyreels.skyreels import media
from comfyui_skyreels.skyreels.builtin import BUILTIN_NAME
from comfyui_skyreels.skyreels.errors import OptionError
from comfyui_skyreels.skyreels.pipeline.receipt import MARK, make_receipt
from support import host, lora, tiny

pytestmark = pytest.mark.usefixtures("fast_convolutions", "kept_models")
NODES = comfyui_skyreels.NODE_CLASS_MAPPINGS
NAMES = NODES["SkyReelsFromReceipt"].RETURN_NAMES
#: inputs of the sampler and of the picture that a receipt gives
SAMPLING = ("seed", "steps", "cfg", "embedded_guidance", "shift", "denoise", "cache", "attention",
            "riflex_k")  # fmt: skip
PICTURE = ("width", "height", "num_frames", "fit", "noise_augmentation", "latent_strength",
           "augmentation_seed")  # fmt: skip


def builtin_graph(**sampling) -> dict:
    """The quick start, smaller, with values that are not the usual ones."""

    def node(class_type: str, **inputs) -> dict:
        return {"class_type": class_type, "inputs": inputs}

    return {
        "1": node("SkyReelsTransformerLoader", transformer=BUILTIN_NAME, precision="bf16"),
        "2": node("SkyReelsVAELoader", vae=BUILTIN_NAME, precision="auto"),
        "3": node("SkyReelsTextEncoderLoader", text_encoder=BUILTIN_NAME),
        "4": node("EmptyImage", width=40, height=30, color=0x3060A0, batch_size=1),
        "5": node("SkyReelsTextEncode", text_encoder=["3", 0], prompt="a red circle moves left",
                  add_fps_prefix=True),
        "6": node("SkyReelsTextEncode", text_encoder=["3", 0], prompt="blur",
                  add_fps_prefix=False),
        "7": node("SkyReelsImageConditioning", vae=["2", 0], image=["4", 0], width=32, height=48,
                  num_frames=5, fit="pad", noise_augmentation=0.05, latent_strength=0.9,
                  augmentation_seed=4),
        "8": node("SkyReelsSampler", model=["1", 0], positive=["5", 0], negative=["6", 0],
                  image=["7", 0], seed=11, steps=3, cfg=4.0, embedded_guidance=1.5, shift=9.0,
                  cache="easy", **sampling),
        "9": node("SkyReelsVAEDecode", vae=["2", 0], samples=["8", 0], mode="full"),
    }  # fmt: skip


def linked_to_receipt(graph: dict, text: str) -> dict:
    """The same graph with usual values, and a link to the receipt for each that it gives."""
    graph = json.loads(json.dumps(graph))
    graph["20"] = {"class_type": "SkyReelsFromReceipt", "inputs": {"receipt": text}}

    def link(name: str) -> list:
        return ["20", NAMES.index(name)]

    graph["8"]["inputs"] |= {name: link(name) for name in SAMPLING}
    graph["7"]["inputs"] |= {name: link(name) for name in PICTURE}
    graph["5"]["inputs"] |= {"prompt": link("prompt"), "add_fps_prefix": link("add_fps_prefix")}
    graph["6"]["inputs"] |= {"prompt": link("negative_prompt")}
    graph["1"]["inputs"] |= {"precision": link("precision")}
    graph["9"]["inputs"] |= {"mode": link("decode")}
    return graph


def test_a_clip_is_made_again_bit_for_bit_from_its_receipt(comfy):
    graph = builtin_graph()
    made = host.run_prompt(graph, NODES)
    text = made["8"][1]
    again = host.run_prompt(linked_to_receipt(graph, text), NODES)
    assert torch.equal(made["9"][0], again["9"][0])
    told, retold = json.loads(text), json.loads(again["8"][1])
    for field in ("elapsed_s", "ended"):
        told.pop(field), retold.pop(field)
    assert told == retold  # the prompt too, although it is linked now


def test_the_receipt_tells_what_the_graph_was(comfy):
    told = json.loads(host.run_prompt(builtin_graph(cfg_start=0.2), NODES)["8"][1])
    assert told[MARK] == 1
    assert told["parameters"] == {
        "prompt": "FPS-24, a red circle moves left", "negative_prompt": "blur", "seed": 11,
        "steps": 3, "cfg": 4.0, "embedded_guidance": 1.5, "shift": 9.0, "denoise": 1.0,
        "width": 32, "height": 48, "num_frames": 5, "cache": "easy", "attention": "exact",
        "precision": "bf16", "decode": "full", "riflex_k": 4, "fit": "pad",
        "noise_augmentation": 0.05, "latent_strength": 0.9, "augmentation_seed": 4,
    }  # fmt: skip
    assert {part: each["name"] for part, each in told["weights"].items()} == dict.fromkeys(
        ("transformer", "vae", "llama", "clip"), BUILTIN_NAME
    )
    assert (told["picture"]["width"], told["picture"]["height"]) == (40, 30)
    assert told["by_hand"] == ["cfg_start 0.2"]
    assert str(comfy.root) not in json.dumps(told)


def read(text: str) -> dict:
    return dict(zip(NAMES, NODES["SkyReelsFromReceipt"]().read(receipt=text), strict=True))


def test_a_file_of_the_input_or_output_folder_is_read(comfy):
    text = json.dumps({MARK: 1, "parameters": {"prompt": "a", "seed": 3}})
    for folder in ("input", "output/video"):
        (comfy.root / folder).mkdir(parents=True, exist_ok=True)
    (comfy.root / "input" / "a.json").write_text(text)
    (comfy.root / "output" / "video" / "b.json").write_text(text.replace("3", "4"))
    assert read("a.json")["seed"] == read(" a.json [input]\n")["seed"] == 3
    assert read("video/b.json")["seed"] == read("video/b.json [output]")["seed"] == 4
    changed = NODES["SkyReelsFromReceipt"].IS_CHANGED
    before = changed(receipt="a.json")
    (comfy.root / "input" / "a.json").write_text(text)
    os.utime(comfy.root / "input" / "a.json", ns=(1, 1))
    assert changed(receipt="a.json") != before
    assert changed(receipt=text) == changed(receipt=None) == ""


def saved_by_core(folder, name: str, graph: dict) -> str:
    """A video as core's SaveVideo leaves it: with the graph."""
    held = {"prompt": json.dumps(graph), "workflow": "{}"}
    with media.open_frames(folder / name, 1, 16, 16, metadata=held) as file:
        file.restart()
        file.write(torch.zeros(1, 16, 16, 3))
    return name


def test_a_video_that_core_saved_gives_the_inputs_of_its_graph(comfy):
    graph = builtin_graph()
    graph["0"] = {
        "class_type": "SkyReelsLoraLoader",
        "inputs": {"model": ["1", 0], "lora": "x/l.safetensors", "strength": 0.5},
    }
    graph["8"]["inputs"] |= {"model": ["0", 0], "latent": ["9", 0]}
    told = read(saved_by_core(comfy.root / "input", "a.mp4", graph))
    own = host.run_prompt(builtin_graph(), NODES)["8"][1]
    assert {**told, "report": ""} == {**read(own), "report": ""}
    assert "LoRA l.safetensors" in told["report"]
    assert "Connect or set by hand: latent." in told["report"]


def test_a_video_of_sky_reels_i2v_gives_its_inputs(comfy):
    inputs = {
        "prompt": "a fox",
        "backend": "auto",
        "transformer": "t.safetensors",
        "seed": 7,
        "width": 64,
        "height": 64,
        "num_frames": 9,
        "image": ["1", 0],
        "steps": ["2", 0],
    }
    graph = {"3": {"class_type": "SkyReelsI2V", "inputs": inputs}}
    told = read(saved_by_core(comfy.root / "input", "a.mp4", graph))
    assert (told["prompt"], told["seed"], told["width"]) == ("FPS-24, a fox", 7, 64)
    assert "t.safetensors" in told["report"]
    assert "steps" in told["report"]  # linked: not known


@pytest.mark.parametrize(
    "graph",
    [{}, [], "x", {"1": {}}, {"1": {"class_type": "SkyReelsSampler", "inputs": 5}},
     {"1": {"class_type": "SkyReelsI2V", "inputs": {"backend": "remote"}}},
     {k: {"class_type": "SkyReelsSampler", "inputs": {}} for k in "12"}],
)  # fmt: skip
def test_a_graph_without_one_local_clip_holds_no_receipt(comfy, graph):
    with pytest.raises(OptionError, match="holds no receipt"):
        read(saved_by_core(comfy.root / "input", "a.mp4", graph))


@pytest.mark.parametrize(
    "name",
    ["gone.json", "../secret.json", "/etc/hostname", "a.json [output]", "a\0b", "x" * 5000],
)
def test_a_file_outside_or_missing_is_named(comfy, name):
    (comfy.root / "secret.json").write_text("{}")
    (comfy.root / "input" / "a.json").write_text("{}")
    with pytest.raises(OptionError, match="There is no file"):
        read(name)


def test_the_report_names_weights_that_are_here_missing_and_other(comfy):
    tiny.save(comfy.folder("diffusion_models") / "t.safetensors", tiny.transformer().state_dict())
    model = NODES["SkyReelsTransformerLoader"]().load("t.safetensors", "auto")[0]
    own = receipts.describe_source(model.module.source)
    text = {MARK: 1, "model": "t.safetensors", "parameters": {"prompt": "a"}}
    weights = {"transformer": own, "vae": {"name": "v.safetensors", "num_bytes": 10**9},
               "llama": {"name": "l.safetensors", "sampled_sha256": "a" * 64}}  # fmt: skip
    report = read(json.dumps({**text, "weights": weights}))["report"]
    assert f"transformer t.safetensors ({own['num_bytes'] / 1e9:.2f} GB" in report
    assert "): here." in report
    assert "The vae v.safetensors (1.00 GB) of the receipt is not here." in report
    assert "llama l.safetensors (sampled SHA-256 aaaaaaaaaaaa...) of the receipt is not" in report
    weights["transformer"] = {**own, "sampled_sha256": "b" * 64}
    report = read(json.dumps({**text, "weights": weights}))["report"]
    assert "The transformer t.safetensors is not the one of the receipt" in report


def test_loras_are_in_the_receipt_and_in_the_report(comfy, tmp_path):
    tiny.save(comfy.folder("diffusion_models") / "t.safetensors", tiny.transformer().state_dict())
    tensors = lora.letters(lora.whole_modules(lora.draw_parts()), "transformer.")
    tiny.save(comfy.folder("loras") / "l.safetensors", tensors)
    model = NODES["SkyReelsTransformerLoader"]().load("t.safetensors", "auto")[0]
    model, _ = NODES["SkyReelsLoraLoader"]().load(model, "l.safetensors", 0.5, "double")
    made = make_receipt("t", {"prompt": "a"}, weights={}, loras=model.loras,
                        device=torch.device("cpu"), elapsed_s=1.0)  # fmt: skip
    assert made["loras"][0]["strength"] == 0.5
    assert (
        "LoRA l.safetensors, strength 0.5, blocks double: add it"
        in read(json.dumps(made))["report"]
    )
    shutil.copy(comfy.folder("diffusion_models") / "t.safetensors",
                comfy.folder("loras") / "l.safetensors")  # fmt: skip
    assert "is another file than the receipt's" in read(json.dumps(made))["report"]
    (comfy.folder("loras") / "l.safetensors").unlink()
    assert "is not in models/loras" in read(json.dumps(made))["report"]


# --- what the graph tells -----------------------------------------------------------------------


def sampler_with(positive: list, **nodes) -> dict:
    sampler = {"class_type": "SkyReelsSampler", "inputs": {"positive": positive}}
    return {"s": sampler, **{k: {"class_type": c, "inputs": i} for k, (c, i) in nodes.items()}}


CORE = ("CLIPTextEncode", {"text": "FPS-24, a fox", "clip": ["x", 0]})
EMPTY = ("CLIPTextEncode", {"text": "blur", "clip": ["x", 0]})


@pytest.mark.parametrize(
    ("graph", "expected"),
    [
        (sampler_with(["a", 0], a=CORE), "FPS-24, a fox"),
        (sampler_with(["g", 0], g=("FluxGuidance", {"conditioning": ["a", 0]}), a=CORE),
         "FPS-24, a fox"),
        (sampler_with(["p", 0], a=CORE, b=EMPTY,
                      p=("InstructPixToPixConditioning", {"positive": ["a", 0],
                                                          "negative": ["b", 0]})),
         "FPS-24, a fox"),
        (sampler_with(["p", 1], a=CORE, b=EMPTY,
                      p=("InstructPixToPixConditioning", {"positive": ["a", 0],
                                                          "negative": ["b", 0]})),
         "blur"),
        (sampler_with(["c", 0], a=CORE, b=EMPTY,
                      c=("ConditioningCombine", {"conditioning_1": ["a", 0],
                                                 "conditioning_2": ["b", 0]})),
         None),
        (sampler_with(["a", 0], a=("CLIPTextEncode", {"text": ["t", 0]}),
                      t=("PrimitiveStringMultiline", {"value": "a cat"})),
         "a cat"),
        (sampler_with(["a", 0], a=("CLIPTextEncode", {"text": ["t", 0]}),
                      t=("SomebodysTextNode", {"text": "a", "more": "b"})),
         None),
        (sampler_with(["a", 0], a=("Loop", {"x": ["b", 0]}), b=("Loop", {"x": ["a", 0]})), None),
        (sampler_with(["gone", 0]), None),
        (None, None),
    ],
)  # fmt: skip
def test_a_prompt_is_found_in_the_graph_or_not_told(graph, expected):
    assert prompt_text(graph, "s", "positive") == expected


def test_two_decoders_of_other_modes_are_not_told():
    def decoder(mode: str) -> tuple[str, dict]:
        return "SkyReelsVAEDecode", {"samples": ["s", 0], "mode": mode}

    assert decode_mode(sampler_with(["a", 0], d=decoder("full")), "s") == "full"
    both = sampler_with(["a", 0], d=decoder("full"), e=decoder("tiled"))
    assert decode_mode(both, "s") is None
