"""What a saved workflow and the page rely on: ids, order of inputs, sockets, tooltips, help."""

import ast
import inspect
import json
import os
import re
import sys
from pathlib import Path

import comfyui_skyreels
import pytest
from comfyui_skyreels.skyreels.config import ATTENTIONS, DECODE_MODES, TRANSFORMER_PRECISIONS
from comfyui_skyreels.skyreels.image import FITS
from comfyui_skyreels.skyreels.sampling.calibrate import CACHE_CHOICES
from support.forked import forks

ROOT = Path(__file__).resolve().parents[2]
NODES = comfyui_skyreels.NODE_CLASS_MAPPINGS
TYPES = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}
CORE_SOCKETS = {
    "IMAGE", "MASK", "VIDEO", "AUDIO", "LATENT", "CONDITIONING", "SAMPLER", "SIGMAS", "MODEL",
}  # fmt: skip
#: nodes whose results lie in files that may be deleted
WITH_FILES = {"SkyReelsI2V", "WiroRemoteI2V", "WiroRunModel", "WiroTaskResult", "WiroCollect"}
#: nodes that read a file whose name is a text
WITH_INPUT_FILES = {"SkyReelsFromReceipt"}
#: nodes whose results depend on the memory that is free
WITH_MEMORY = {"SkyReelsPlan"}

#: frozen: display name, inputs in order, outputs. New widgets only at the end of a list
FROZEN = {
    "SkyReelsI2V": (
        "SkyReels I2V",
        ["image", "prompt", "backend", "transformer", "width", "height", "num_frames", "fit",
         "seed", "steps", "cfg", "negative_prompt", "add_fps_prefix", "vae", "text_encoder",
         "precision", "embedded_guidance", "shift", "attention", "cache", "decode",
         "allow_paid_remote", "take", "wait_when_busy", "timeout_minutes"],
        [("images", "IMAGE"), ("video", "VIDEO"), ("task_id", "STRING"), ("receipt", "STRING"),
         ("report", "STRING")],
    ),
    "SkyReelsTransformerLoader": (
        "SkyReels Load Transformer",
        ["transformer", "precision"],
        [("model", "SKYREELS_MODEL")],
    ),
    "SkyReelsVAELoader": ("SkyReels Load VAE", ["vae", "precision"], [("vae", "SKYREELS_VAE")]),
    "SkyReelsLoraLoader": (
        "SkyReels Load LoRA",
        ["model", "lora", "strength", "blocks"],
        [("model", "SKYREELS_MODEL"), ("report", "STRING")],
    ),
    "SkyReelsTextEncoderLoader": (
        "SkyReels Load Text Encoder",
        ["text_encoder", "clip", "tokenizer"],
        [("text_encoder", "SKYREELS_TEXT_ENCODER")],
    ),
    "SkyReelsTextEncode": (
        "SkyReels Text Encode",
        ["text_encoder", "prompt", "add_fps_prefix"],
        [("conditioning", "CONDITIONING")],
    ),
    "SkyReelsImageConditioning": (
        "SkyReels Image Conditioning",
        ["vae", "image", "width", "height", "num_frames", "fit", "noise_augmentation",
         "latent_strength", "augmentation_seed", "prefix_frames", "batch", "end_image"],
        [("image_conditioning", "SKYREELS_IMAGE")],
    ),
    "SkyReelsSampler": (
        "SkyReels Sampler",
        ["model", "positive", "seed", "steps", "cfg", "embedded_guidance", "shift", "negative",
         "image", "latent", "sampler", "sigmas", "denoise", "cfg_start", "cfg_end",
         "guidance_rescale", "cfg_zero_star", "zero_init_steps", "riflex_k", "resume",
         "add_noise", "cache", "attention", "guidance", "windows", "bad_render",
         "second_device"],
        [("samples", "LATENT"), ("receipt", "STRING")],
    ),
    "SkyReelsGuidance": (
        "SkyReels Guidance",
        ["skip_layers", "double_blocks", "single_blocks", "skip_scale", "skip_start", "skip_end",
         "fresca_low", "fresca_high", "fresca_cutoff"],
        [("guidance", "SKYREELS_GUIDANCE")],
    ),
    "SkyReelsContextWindows": (
        "SkyReels Context Windows",
        ["window_frames", "overlap_frames", "schedule", "blend"],
        [("windows", "SKYREELS_WINDOWS")],
    ),
    "SkyReelsScheduler": (
        "SkyReels Scheduler",
        ["steps", "shift", "denoise", "scheduler"],
        [("sigmas", "SIGMAS")],
    ),
    "SkyReelsVAEDecode": (
        "SkyReels VAE Decode",
        ["vae", "samples", "mode", "tile_size", "tile_stride", "tile_frames",
         "tile_frames_stride"],
        [("images", "IMAGE")],
    ),
    "SkyReelsExtendVideo": (
        "SkyReels Extend Video",
        ["model", "vae", "images", "positive", "seed", "num_frames", "steps", "cfg",
         "embedded_guidance", "shift", "negative", "overlap_frames", "color_match", "decode",
         "cache", "attention"],
        [("images", "IMAGE"), ("new_images", "IMAGE")],
    ),
    "SkyReelsPlan": (
        "SkyReels Plan",
        ["transformer", "width", "height", "num_frames", "steps", "cfg", "precision", "attention",
         "decode"],
        [("plan", "STRING")],
    ),
    "SkyReelsCoreModel": ("SkyReels Core Model", ["model", "image"], [("model", "MODEL")]),
    "SkyReelsFromReceipt": (
        "SkyReels From Receipt",
        ["receipt"],
        [("prompt", "STRING"), ("negative_prompt", "STRING"), ("seed", "INT"), ("steps", "INT"),
         ("cfg", "FLOAT"), ("embedded_guidance", "FLOAT"), ("shift", "FLOAT"), ("width", "INT"),
         ("height", "INT"), ("num_frames", "INT"), ("fit", list(FITS)),
         ("noise_augmentation", "FLOAT"), ("latent_strength", "FLOAT"),
         ("augmentation_seed", "INT"), ("denoise", "FLOAT"), ("cache", list(CACHE_CHOICES)),
         ("attention", list(ATTENTIONS)), ("precision", list(TRANSFORMER_PRECISIONS)),
         ("decode", list(DECODE_MODES)), ("riflex_k", "INT"), ("add_fps_prefix", "BOOLEAN"),
         ("report", "STRING")],
    ),
    "WiroRemoteI2V": (
        "Wiro Remote I2V",
        ["image", "prompt", "size", "fit", "num_frames", "steps", "cfg", "negative_prompt",
         "add_fps_prefix", "take", "wait_when_busy", "timeout_minutes"],
        [("images", "IMAGE"), ("video", "VIDEO"), ("task_id", "STRING"), ("receipt", "STRING")],
    ),
    "WiroRunModel": (
        "Wiro Run Model",
        ["model", "parameters", "image", "image_parameter", "take", "wait_when_busy",
         "timeout_minutes", "image_2", "image_3", "image_4", "video", "audio", "file_parameters"],
        [("images", "IMAGE"), ("video", "VIDEO"), ("text", "STRING"), ("task_id", "STRING"),
         ("receipt", "STRING"), ("mask", "MASK"), ("audio", "AUDIO"), ("files", "STRING")],
    ),
    "WiroTaskResult": (
        "Wiro Task Result",
        ["task", "timeout_minutes"],
        [("images", "IMAGE"), ("video", "VIDEO"), ("text", "STRING"), ("task_id", "STRING"),
         ("receipt", "STRING"), ("mask", "MASK"), ("audio", "AUDIO"), ("files", "STRING")],
    ),
    "WiroUploadFile": (
        "Wiro Upload File",
        ["file", "folder", "image"],
        [("url", "STRING"), ("file_id", "STRING")],
    ),
    "WiroSubmit": (
        "Wiro Submit",
        ["image", "prompt", "size", "fit", "num_frames", "steps", "cfg", "negative_prompt",
         "add_fps_prefix", "take", "max_runs"],
        [("runs", "SKYREELS_WIRO_RUNS"), ("report", "STRING")],
    ),
    "WiroCollect": (
        "Wiro Collect",
        ["runs", "timeout_minutes"],
        [("video", "VIDEO"), ("images", "IMAGE"), ("task_id", "STRING"), ("receipt", "STRING"),
         ("report", "STRING")],
    ),
}  # fmt: skip

pytestmark = pytest.mark.usefixtures("comfy")


def inputs_of(cls) -> dict[str, tuple]:
    """name -> (type, options) of all inputs that the page shows, required first."""
    groups = cls.INPUT_TYPES()
    assert list(groups) == [k for k in ("required", "optional", "hidden") if k in groups]
    shown = [groups.get("required", {}), groups.get("optional", {})]
    return {name: spec for group in shown for name, spec in group.items()}


def test_ids_names_inputs_and_outputs_are_frozen():
    got = {
        name: (
            comfyui_skyreels.NODE_DISPLAY_NAME_MAPPINGS[name],
            list(inputs_of(cls)),
            list(zip(cls.RETURN_NAMES, cls.RETURN_TYPES, strict=True)),
        )
        for name, cls in NODES.items()
    }
    assert got == FROZEN
    assert all(cls.__name__ == name for name, cls in NODES.items())


@pytest.mark.parametrize("cls", NODES.values(), ids=NODES)
def test_every_input_and_output_is_explained_with_its_numbers(cls):
    assert len(cls.DESCRIPTION) > 40
    assert cls.CATEGORY.split("/")[0] == "SkyReels"
    assert [bool(t) for t in cls.OUTPUT_TOOLTIPS] == [True] * len(cls.RETURN_TYPES)
    for name, (kind, options) in inputs_of(cls).items():
        assert len(options["tooltip"]) > 10, name
        if kind in ("INT", "FLOAT") and "seed" not in name:
            assert re.search(r"\d", options["tooltip"]), name


@pytest.mark.parametrize("cls", NODES.values(), ids=NODES)
def test_every_node_has_words_by_which_it_is_searched(cls):
    """Newer front ends search in them; older ones in ids and names only."""
    words = cls.SEARCH_ALIASES
    assert words
    assert all(word == word.lower().strip() and len(word) > 1 for word in words)
    assert len(set(words)) == len(words)


@pytest.mark.parametrize(
    ("search", "found"),
    [
        ("image to video", {"SkyReelsI2V", "SkyReelsSampler", "WiroRemoteI2V"}),
        ("image to video", {"SkyReelsImageConditioning"}),
        ("i2v", {"SkyReelsI2V", "SkyReelsSampler", "WiroRemoteI2V", "SkyReelsImageConditioning"}),
        ("hunyuan", {"SkyReelsTransformerLoader", "SkyReelsSampler", "WiroRemoteI2V"}),
        ("skyreels", {"SkyReelsI2V", "SkyReelsSampler", "WiroRemoteI2V", "WiroRunModel"}),
        ("wiro", {"SkyReelsI2V", "WiroRemoteI2V", "WiroRunModel", "WiroTaskResult"}),
        ("metadata", {"SkyReelsFromReceipt"}),
    ],
)
def test_what_people_type_finds_our_nodes(search, found):
    names = comfyui_skyreels.NODE_DISPLAY_NAME_MAPPINGS
    texts = {name: [name, names[name], *cls.SEARCH_ALIASES] for name, cls in NODES.items()}
    hits = {name for name, words in texts.items() if any(search in w.lower() for w in words)}
    assert found <= hits


@pytest.mark.parametrize("cls", NODES.values(), ids=NODES)
def test_the_function_takes_the_inputs_with_the_widgets_defaults(cls):
    groups = cls.INPUT_TYPES()
    parameters = dict(inspect.signature(getattr(cls, cls.FUNCTION)).parameters)
    del parameters["self"]
    assert list(parameters) == [*inputs_of(cls), *groups.get("hidden", {})]
    for name, (kind, options) in groups.get("optional", {}).items():
        is_widget = str(kind) in TYPES or isinstance(kind, list)
        expected = options["default"] if is_widget else None
        assert parameters[name].default == expected, name
    for name, (kind, options) in inputs_of(cls).items():
        if str(kind) in TYPES and kind != "STRING":
            default = options["default"]
            assert type(default) is TYPES[kind], name
            assert options.get("min", default) <= default <= options.get("max", default), name
        elif isinstance(kind, list):
            assert options.get("default", kind[0]) in kind, name


@pytest.mark.parametrize("cls", NODES.values(), ids=NODES)
def test_a_core_type_is_named_only_for_what_core_accepts(cls):
    sockets = [kind for kind, _ in inputs_of(cls).values() if isinstance(kind, str)]
    given = {kind for kind in cls.RETURN_TYPES if not isinstance(kind, list)}  # a list is a choice
    for kind in {*sockets, *given} - set(TYPES):
        assert kind in CORE_SOCKETS or kind.startswith("SKYREELS_"), kind


@pytest.mark.parametrize("cls", NODES.values(), ids=NODES)
def test_nodes_hold_no_state_and_are_cached_like_any_other(cls):
    assert "__init__" not in vars(cls)
    assert hasattr(cls, "IS_CHANGED") is (
        cls.__name__ in WITH_FILES | WITH_INPUT_FILES | WITH_MEMORY
    )
    source = inspect.getsource(cls)
    assert not re.search(r"\bself\.\w+ =", source)


@pytest.mark.parametrize("name", NODES)
def test_every_node_has_a_help_page_that_names_its_inputs_and_outputs(name):
    page = (ROOT / "web" / "docs" / f"{name}.md").read_text(encoding="utf-8")
    cls = NODES[name]
    assert page.startswith(f"# {comfyui_skyreels.NODE_DISPLAY_NAME_MAPPINGS[name]}\n")
    for word in (*inputs_of(cls), *cls.RETURN_NAMES):
        assert re.search(rf"\b{word}\b", page), word


@pytest.mark.parametrize("name", NODES)
def test_every_help_page_has_a_picture_an_example_and_two_mistakes(name):
    page = (ROOT / "web" / "docs" / f"{name}.md").read_text(encoding="utf-8")
    (picture,) = re.findall(r"!\[[^\]]+\]\((pictures/\w+\.webp)\)", page)
    assert Path(picture).stem == name
    assert 1000 < (ROOT / "web" / "docs" / picture).stat().st_size < 40_000
    example, mistakes = re.search(
        r"(?s)\n## Example\n(.*)\n## Common mistakes\n(.*)", page
    ).groups()
    assert example.count("\n|") >= 4  # a head, a line, two rows
    assert mistakes.count("\n- ") == 2


@pytest.fixture(scope="module")
def messages() -> str:
    """All texts in the code, one a line, with a blank for what is filled in."""
    lines = []
    for folder in ("nodes", "skyreels", "wiro_api"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    lines.append(
                        "".join(
                            getattr(part, "value", " ")
                            for part in node.values
                            if isinstance(getattr(part, "value", ""), str)
                        )
                    )
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    lines.append(node.value)
    return "\n".join(lines)


@pytest.mark.parametrize("name", NODES)
def test_messages_quoted_as_mistakes_are_those_of_the_code(name, messages):
    page = (ROOT / "web" / "docs" / f"{name}.md").read_text(encoding="utf-8")
    quoted = re.findall(r"(?m)^- `([^`]+)`:", page.split("## Common mistakes")[1])
    assert [text for text in quoted if text not in messages] == []


def test_figures_of_the_cache_in_a_tooltip_are_those_of_the_help_page():
    """The page is the one source of measured figures; the tooltip may repeat some."""
    page = (ROOT / "web" / "docs" / "SkyReelsSampler.md").read_text(encoding="utf-8")
    measured = set(re.findall(r"\| (easy|fast|first-block) \| (\d+) \| (\d+),", page))
    tooltip = inputs_of(NODES["SkyReelsSampler"])["cache"][1]["tooltip"]
    repeated = set(re.findall(r"(easy|fast|first-block) (\d+), (\d+) dB", tooltip))
    assert len(measured) == 3
    assert repeated <= measured


def test_the_web_folder_is_there_and_asks_no_other_host():
    assert (ROOT / comfyui_skyreels.WEB_DIRECTORY).is_dir()
    scripts = [p for p in (ROOT / "web").rglob("*") if p.suffix in (".js", ".mjs", ".css")]
    assert len(scripts) > 5
    for script in scripts:
        text = script.read_text(encoding="utf-8")
        assert "http" not in text
        assert "prototype" not in text


LOAD = """
import importlib.abc, importlib.util, json, sys
import torch  # ComfyUI has it before any pack, with what it needs itself
blocked = set(sys.argv[2].split(","))
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Block())
sys.modules.update(dict.fromkeys(blocked & set(sys.modules)))
before = set(sys.modules)
name = "/some where/custom_nodes/sky-reels_x_1"
spec = importlib.util.spec_from_file_location(
    name, sys.argv[1] + "/__init__.py", submodule_search_locations=[sys.argv[1]])
module = sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
new = sorted(set(sys.modules) - before)
print(json.dumps({"nodes": sorted(module.NODE_CLASS_MAPPINGS), "modules": new, "ours": name}))
"""


def load_in_a_fresh_process(blocked: str) -> dict:
    run = forks("torch").run(["-c", LOAD, str(ROOT), blocked], {**os.environ})
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize(
    "blocked",
    ["diffusers", "transformers", "triton", "av", "PIL",
     "diffusers,transformers,triton,av,PIL,websocket,tokenizers,requests,comfy,server"],
)  # fmt: skip
def test_every_node_registers_without_optional_packages(blocked):
    assert load_in_a_fresh_process(blocked)["nodes"] == sorted(FROZEN)


def test_importing_the_package_imports_little_beside_torch():
    """Our own modules and a few of the standard library: 0.2 s on a quiet machine."""
    found = load_in_a_fresh_process("nothing")
    others = {name.split(".")[0] for name in found["modules"] if found["ours"] not in name}
    assert others - sys.stdlib_module_names <= {"einops"}
    assert len(found["modules"]) < 150
