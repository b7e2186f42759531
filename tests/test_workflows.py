"""Every shipped workflow: a file the page opens without complaint, and a graph that runs."""

import itertools
import json
import re
import uuid
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from comfyui_skyreels.skyreels.builtin import BUILTIN_NAME
from comfyui_skyreels.skyreels.vae.model import VideoVAE
from PIL import Image
from support import gguf_files, host, lora, tiny
from support.workflows import NODES, PAGE_ONLY, TITLES, placed, read, shipped, widgets

ROOT = Path(__file__).resolve().parents[1]
FILES = [shipped(name) for name in TITLES]
NAMES = {path: name for name, path in zip(TITLES, FILES, strict=True)}
#: as users may have saved them from version 0.1.0
SAVED = sorted(path for path in (ROOT / "tests" / "workflows" / "saved").glob("*.json")
               if not path.name.endswith(".api.json"))  # fmt: skip
MODEL_HOSTS = ("https://huggingface.co/", "https://civitai.com/")

pytestmark = pytest.mark.usefixtures("comfy", "fast_convolutions", "kept_models")
each_file = pytest.mark.parametrize("path", FILES, ids=list(TITLES))
each_saved_file = pytest.mark.parametrize("path", SAVED, ids=lambda path: path.stem)


def name_of(path: Path) -> str:
    """Of the graph in a file."""
    return NAMES.get(path, path.stem)


def api_form(path: Path) -> dict:
    folder = ROOT / "tests" / "workflows" if path in FILES else path.parent
    return read(folder / f"{name_of(path)}.api.json")


#: a saved graph that is still the shipped one runs once
GRAPHS = [
    *FILES,
    *(path for path in SAVED if api_form(path) != api_form(shipped(path.stem))),
]
#: core's own sampler runs in a real ComfyUI only (tests/adapters/test_real_comfyui.py)
each_graph = pytest.mark.parametrize(
    "path",
    [path for path in GRAPHS if name_of(path) != "core_samplers"],
    ids=lambda path: f"{path.parent.name}-{name_of(path)}",
)


def test_the_workflows_are_here():
    assert set((ROOT / "workflows").glob("*.json")) == set(FILES)
    assert set((ROOT / "workflows").iterdir()) == {
        p for f in FILES for p in (f, f.with_suffix(".jpg"))
    }


def test_the_titles_are_for_people_and_in_order():
    titles = list(TITLES.values())
    assert titles == sorted(titles)
    for number, title in enumerate(titles, 1):
        assert re.fullmatch(rf"SkyReels {number:02} [A-Z][\w ,-]+", title), title
        assert len(title) <= 40
        assert "_" not in title


@each_file
def test_app_mode_is_offered_widgets_that_are_there_and_the_saved_videos(path):
    graph = read(path)
    nodes = {node["id"]: node for node in graph["nodes"]}
    if any(node["type"].startswith(("Wiro", "SkyReelsI2V")) for node in nodes.values()):
        assert graph["extra"] == {}, "app mode hides the price that stands above the node"
        return
    offered = graph["extra"]["linearData"]
    assert offered["inputs"]
    for node_id, name in offered["inputs"]:
        node = nodes[node_id]
        assert name in [widget[0] for widget in widgets(node["type"])], node["type"]
        assert next(i for i in node["inputs"] if i["name"] == name)["link"] is None
    saved = [node["id"] for node in graph["nodes"] if node["type"] == "SaveVideo"]
    assert offered["outputs"] == saved != []


# --- blueprints: a graph as one node ------------------------------------------------------------

BLUEPRINTS = sorted((ROOT / "subgraphs").glob("*.json"))
each_blueprint = pytest.mark.parametrize("path", BLUEPRINTS, ids=lambda path: path.stem)


def test_the_blueprints_are_here():
    names = ["Extend Video (SkyReels V1)", "Image to Video (SkyReels V1)"]
    assert [path.stem for path in BLUEPRINTS] == names


@each_blueprint
def test_a_blueprint_is_one_node_whose_graph_is_sound(path):
    file = read(path)
    (outer,), (graph,) = file["nodes"], file["definitions"]["subgraphs"]
    assert outer["type"] == graph["id"] == str(uuid.UUID(graph["id"]))
    assert outer["title"] == graph["name"] == path.stem
    assert graph["category"] == "SkyReels"
    assert len(file["extra"]["BlueprintDescription"]) > 40
    assert {"hunyuan", "skyreels"} <= set(file["extra"]["BlueprintSearchAliases"])
    nodes = {node["id"]: node for node in graph["nodes"]}
    links = {link["id"]: link for link in graph["links"]}
    assert len(nodes) == len(graph["nodes"])
    assert len(links) == len(graph["links"])
    ends = {("in", s): e for s, e in enumerate(graph["inputs"])}
    ends |= {("out", s): e for s, e in enumerate(graph["outputs"])}
    for number, link in links.items():
        origin, target = link["origin_id"], link["target_id"]
        if origin == -10:
            assert number in ends["in", link["origin_slot"]]["linkIds"]
        else:
            output = nodes[origin]["outputs"][link["origin_slot"]]
            assert output["type"] == link["type"]
            assert number in output["links"]
        if target == -20:
            assert number in ends["out", link["target_slot"]]["linkIds"]
        else:
            socket = nodes[target]["inputs"][link["target_slot"]]
            assert (socket["link"], socket["type"]) == (number, link["type"])
    used = [i["link"] for n in nodes.values() for i in n["inputs"] if i["link"] is not None]
    left = [number for end in graph["outputs"] for number in end["linkIds"]]
    assert sorted([*used, *left]) == sorted(links), "nothing is linked twice or not at all"
    required = [i for n in nodes.values() for i in n["inputs"] if "widget" not in i]
    assert all(i["link"] for i in required if i.get("shape") != 7)


@each_blueprint
def test_a_blueprint_shows_the_widgets_of_its_graph_with_their_values(path):
    file = read(path)
    (outer,), (graph,) = file["nodes"], file["definitions"]["subgraphs"]
    nodes = {node["id"]: node for node in graph["nodes"]}
    shown = [i["name"] for i in outer["inputs"] if "widget" in i]
    assert outer["properties"]["proxyWidgets"] == [["-1", name] for name in shown]
    targets = {link["origin_slot"]: link for link in graph["links"] if link["origin_id"] == -10}
    values = []
    for slot, end in enumerate(graph["inputs"]):
        assert (end["name"], end["type"]) == (outer["inputs"][slot]["name"],
                                              outer["inputs"][slot]["type"])  # fmt: skip
        node = nodes[targets[slot]["target_id"]]
        name = node["inputs"][targets[slot]["target_slot"]]["name"]
        values += [value for widget, _, _, value in placed(node) if widget == name]
    assert values == outer["widgets_values"]
    assert [(o["name"], o["type"]) for o in outer["outputs"]] == [
        (o["name"], o["type"]) for o in graph["outputs"]
    ]
    for node in graph["nodes"]:
        if node["type"] not in PAGE_ONLY:
            assert len(list(placed(node))) == len(widgets(node["type"]))


def test_the_portrait_is_the_one_that_the_script_draws(monkeypatch):
    from scripts import draw_pictures

    monkeypatch.setattr(draw_pictures, "SCALE", 1)  # edges are coarser, and it takes a quarter
    shipped_picture = np.asarray(Image.open(ROOT / "web" / "portrait.jpg"), np.float32)
    drawn = np.asarray(draw_pictures.portrait(), np.float32)
    assert shipped_picture.shape == drawn.shape == (544, 960, 3)
    assert abs(shipped_picture - drawn).mean() < 3


def test_the_picture_in_the_readme_shows_the_quick_start_as_it_is():
    from scripts.draw_graph import digest, digest_of, shown

    graph = read(shipped("quick_start"))
    assert digest_of(ROOT / "web" / "docs" / "graph.png") == digest(graph)
    nodes, _, _ = shown(graph)
    for kind, _, _, _, lines in nodes:
        if kind in NODES:
            assert [name for name, _ in lines] == [widget[0] for widget in widgets(kind)]


@each_file
def test_who_asks_for_a_person_shows_one(path):
    """Run never pays for a mascot with the prompt of a woman."""
    nodes = read(path)["nodes"]
    pictures = {n["widgets_values"][0] for n in nodes if n["type"] == "LoadImage"}
    assert pictures <= {"skyreels_portrait.jpg"}
    asks = any("A woman in a green coat" in str(n["widgets_values"]) for n in nodes)
    assert bool(pictures) == (asks and name_of(path) != "local_text_to_video")


@each_file
def test_ids_and_links_are_sound(path):
    graph = read(path)
    assert str(uuid.UUID(graph["id"])) == graph["id"]
    assert graph["version"] == 0.4
    nodes = {node["id"]: node for node in graph["nodes"]}
    assert len(nodes) == len(graph["nodes"])
    assert graph["last_node_id"] >= max(nodes)
    links = {link[0]: link for link in graph["links"]}
    assert len(links) == len(graph["links"])
    assert graph["last_link_id"] >= max(links)
    for number, origin, slot, target, place, kind in graph["links"]:
        assert nodes[origin]["outputs"][slot]["type"] == kind
        assert number in nodes[origin]["outputs"][slot]["links"]
        assert nodes[target]["inputs"][place]["type"] in (kind, "*")
        assert nodes[target]["inputs"][place]["link"] == number
    used = [i["link"] for node in nodes.values() for i in node["inputs"] if i["link"] is not None]
    given = [n for node in nodes.values() for out in node["outputs"] for n in out["links"] or []]
    assert sorted(used) == sorted(given) == sorted(links)


@pytest.mark.parametrize(
    "path", [*FILES, *SAVED], ids=lambda path: f"{path.parent.name}-{name_of(path)}"
)
def test_every_value_stands_in_its_place_and_range(path):
    for node in read(path)["nodes"]:
        if node["type"] in PAGE_ONLY:
            continue
        found = list(placed(node))
        assert path in SAVED or len(found) == len(widgets(node["type"]))
        for name, kind, options, value in found:
            where = f"{node['type']}.{name} = {value!r}"
            if kind in ("INT", "FLOAT"):
                assert type(value) in ((int,) if kind == "INT" else (int, float)), where
                assert options.get("min", value) <= value <= options.get("max", value), where
            elif kind == "BOOLEAN":
                assert type(value) is bool, where
            else:
                assert type(value) is str, where
                is_file = value.endswith((".safetensors", ".gguf", ".png", ".jpg"))
                assert kind != "COMBO" or is_file or value in options["options"], where


@each_saved_file
def test_each_value_of_a_saved_file_lands_on_the_input_it_was_saved_for(path):
    prompt = api_form(path)
    graph = read(path)
    links = {link[0]: [str(link[1]), link[2]] for link in graph["links"]}
    for node in graph["nodes"]:
        if node["type"] in PAGE_ONLY:
            continue
        landed = {name: value for name, _, _, value in placed(node)}
        for socket in node["inputs"]:
            if socket["link"] is not None:
                landed[socket["name"]] = links[socket["link"]]
        saved = prompt[str(node["id"])]
        assert saved["class_type"] == node["type"]
        assert landed == saved["inputs"]


@each_file
def test_nodes_say_whose_they_are_and_where_their_files_are(path):
    for node in read(path)["nodes"]:
        if node["type"] in PAGE_ONLY:
            continue
        properties = node["properties"]
        ours = node["type"] in NODES
        assert properties["cnr_id"] == ("skyreels-wiro" if ours else "comfy-core")
        files = {v for v in node["widgets_values"] if str(v).endswith((".safetensors", ".gguf"))}
        assert {model["name"] for model in properties.get("models", [])} == files
        for model in properties.get("models", []):
            assert model["url"].startswith(MODEL_HOSTS)
            assert model["url"].endswith(f"/{model['name']}")
            assert model["directory"] in ("diffusion_models", "vae", "text_encoders", "loras")
            assert "/" not in model["name"]


@each_file
def test_groups_and_notes_explain_the_graph(path):
    graph = read(path)
    assert len(graph["groups"]) >= 4
    assert sum(node["type"] == "MarkdownNote" for node in graph["nodes"]) >= 2
    boxes = [group["bounding"] for group in graph["groups"]]
    for node in graph["nodes"]:
        x, y = node["pos"]
        right, bottom = x + node["size"][0], y + node["size"][1]
        assert any(
            gx <= x and gy <= y and right <= gx + w and bottom <= gy + h for gx, gy, w, h in boxes
        ), node["type"]
    rectangles = [(*node["pos"], *node["size"]) for node in graph["nodes"]]
    for i, (ax, ay, aw, ah) in enumerate(rectangles):
        for bx, by, bw, bh in rectangles[:i]:
            apart = ax + aw <= bx or bx + bw <= ax or ay + ah <= by - 30 or by + bh <= ay - 30
            assert apart, "two nodes overlap"


@each_file
def test_nodes_leave_room_for_badges_above_and_for_a_footer_below(path):
    """As measured in the pages: badges of two rows, and the footer of a node without its model."""
    columns: dict[float, list[tuple[float, float]]] = {}
    for node in read(path)["nodes"]:
        (x, y), (_, height) = node["pos"], node["size"]
        columns.setdefault(x, []).append((y, y + height))
    for boxes in columns.values():
        boxes.sort()
        assert boxes[0][0] >= 110
        for (_, bottom), (top, _) in itertools.pairwise(boxes):
            assert top - 30 - bottom >= 50


@each_file
def test_prompts_for_the_real_model_name_the_frame_rate(path):
    titles = {
        node["title"]: node["widgets_values"][0]
        for node in read(path)["nodes"]
        if node["type"] == "CLIPTextEncode"
    }
    for title, prompt in titles.items():
        assert prompt.startswith("FPS-24, ") == title.startswith("Prompt")


@each_file
def test_nothing_private_is_in_the_file(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"(?<![:/\w])/(home|root|Users|mnt|tmp)/|[A-Za-z]:\\\\", text)
    assert not re.search(r"api[_-]?key|token(?!izer\b)|secret", text, re.IGNORECASE)


@each_file
def test_the_thumbnail_is_what_the_template_browser_takes(path):
    thumbnail = path.with_suffix(".jpg")
    assert thumbnail.stat().st_size < 100_000
    with Image.open(thumbnail) as image:
        assert image.format == "JPEG"
        assert 1 <= image.width / image.height <= 1.7


@cache
def transformer_weights(in_channels: int) -> dict[str, torch.Tensor]:
    return tiny.transformer(replace(tiny.TRANSFORMER, in_channels=in_channels)).state_dict()


@cache
def vae_weights() -> dict[str, torch.Tensor]:
    return tiny.randomize(VideoVAE(tiny.SMALL_VAE)).state_dict()


@each_graph
def test_the_graph_runs_to_a_video_on_tiny_weights(path, comfy, wiro):
    prompt = api_form(path)
    channels = 16 if name_of(path) == "local_text_to_video" else 32
    saved = {"transformer": transformer_weights(channels), "vae": vae_weights()}
    for node in prompt.values():
        inputs = node["inputs"]
        for name, weights in saved.items():
            file = inputs.get(name)
            if isinstance(file, str) and file not in (BUILTIN_NAME, "auto"):
                target = comfy.folder("vae" if name == "vae" else "diffusion_models") / file
                if target.suffix == ".gguf":
                    gguf_files.write(target, gguf_files.in_blocks(weights))
                else:
                    tiny.save(target, weights)
        if "lora" in inputs:
            parts = lora.draw_parts()
            tensors = lora.letters(lora.whole_modules(parts), "transformer.")
            tiny.save(comfy.folder("loras") / inputs["lora"], tensors)
        inputs |= {
            name: value
            for name, value in {"width": 48, "height": 32, "num_frames": 5, "steps": 2}.items()
            if name in inputs and node["class_type"].startswith("SkyReels")
        }
        if node["class_type"] == "SkyReelsI2V":  # Wiro has its own sizes
            is_here = inputs["backend"] == "local"
            inputs |= {"transformer": BUILTIN_NAME} if is_here else {"width": 960, "height": 544}
        if node["class_type"] == "EmptyHunyuanLatentVideo":
            inputs |= {"width": 48, "height": 32, "length": 5}
    text_sizes = (tiny.TRANSFORMER.text_embed_dim, tiny.TRANSFORMER.pooled_projection_dim)
    results = host.run_prompt(prompt, NODES, text_sizes)
    types = {node["class_type"]: key for key, node in prompt.items()}
    videos = [results[key][0] for key in prompt if prompt[key]["class_type"] == "CreateVideo"]
    assert all((v[0].dtype, v[1]) == (torch.float32, 24.0) for v in videos)
    shapes = [tuple(v[0].shape) for v in videos]
    expected = {
        "remote": [],
        "wiro_batch": [],
        "compare": [(5, 32, 144, 3)],
        "extend_video": [(9, 32, 48, 3)],
        "local_and_remote": [(5, 32, 48, 3), (5, 32, 96, 3)],
    }
    assert shapes == expected.get(name_of(path), [(5, 32, 48, 3)])
    assert types["SaveVideo"] in results
    if "SkyReelsLoraLoader" in types:
        model, report = results[types["SkyReelsLoraLoader"]]
        assert model.module.lora_state.keys() == {c.parameter for c in model.loras[0].lora.changes}
        assert "(diffusion-pipe): 100 keys matched, 50 modules changed" in report
    if "WiroCollect" in types:
        videos, _, taskids, _, report = results[types["WiroCollect"]]
        assert taskids == ["2221", "2222"]
        assert [Path(video.file).parent.name for video in videos] == taskids
        assert report.startswith("2 of 2 done")
    if "WiroRemoteI2V" in types:
        frames, video, taskid, receipt = results[types["WiroRemoteI2V"]]
        assert taskid == "2221"
        if name_of(path) == "remote":  # nothing wants the frames
            assert isinstance(frames, host.ExecutionBlocker)
        else:
            assert tuple(frames.shape) == (5, 32, 48, 3)
        assert Path(video.file).read_bytes() == wiro.files["0.mp4"]
        assert json.loads(receipt)["cost_usd"] == "0.00351"
