"""A run's bytes are computed in one place, by the engine, for the command line and for nodes."""

import ast
from collections import Counter

import comfyui_skyreels
import numpy as np
import pytest
import torch
from comfyui_skyreels.skyreels import cli, image
from comfyui_skyreels.skyreels.builtin import BUILTIN_NAME
from comfyui_skyreels.skyreels.sampling import sample
from comfyui_skyreels.skyreels.vae import tiling
from support.project import ROOT

NODES = comfyui_skyreels.NODE_CLASS_MAPPINGS
ONCE_EACH = {"encode": 1, "sample": 1, "decode": 1}


@pytest.fixture
def computed(monkeypatch) -> Counter:
    """How often the bytes of each kind of run were computed."""
    counts: Counter = Counter()

    def count(module, name, kind):
        function = getattr(module, name)

        def counted(*args):
            counts[kind] += 1
            return function(*args)

        monkeypatch.setattr(module, name, counted)

    count(image, "encode_bytes", "encode")
    count(sample, "run_bytes", "sample")
    count(tiling, "decode_bytes", "decode")
    return counts


def test_the_command_line_computes_the_bytes_of_each_run_once(computed, tmp_path):
    size = ["--width", "32", "--height", "32", "--frames", "5", "--steps", "1"]
    options = ["--prompt", "a red circle", "--decode", "tiled", "--out", str(tmp_path / "x.npy")]
    assert cli.main(["generate", *size, *options]) == 0
    assert computed == ONCE_EACH


def test_the_command_line_computes_the_bytes_of_a_continuation_once(computed, tmp_path):
    torch.manual_seed(0)
    np.save(tmp_path / "clip.npy", torch.rand(6, 32, 32, 3).numpy())
    clip = ["--extend", str(tmp_path / "clip.npy"), "--frames", "5", "--steps", "1"]
    options = ["--prompt", "a red circle", "--decode", "tiled", "--out", str(tmp_path / "x.npy")]
    assert cli.main(["generate", *clip, *options]) == 0
    assert computed == ONCE_EACH


def node(name: str, **inputs):
    cls = NODES[name]
    with torch.inference_mode():
        return getattr(cls(), cls.FUNCTION)(**inputs)[0]


def test_the_nodes_compute_the_bytes_of_each_run_once(computed, comfy):
    model = node("SkyReelsTransformerLoader", transformer=BUILTIN_NAME, precision="auto")
    vae = node("SkyReelsVAELoader", vae=BUILTIN_NAME, precision="auto")
    encoder = node("SkyReelsTextEncoderLoader", text_encoder=BUILTIN_NAME)
    positive, negative = (
        node("SkyReelsTextEncode", text_encoder=encoder, prompt=prompt, add_fps_prefix=True)
        for prompt in ("a red circle", "")
    )
    picture = node(
        "SkyReelsImageConditioning", vae=vae, image=torch.rand(1, 32, 32, 3), width=32, height=32,
        num_frames=5, fit="crop",
    )  # fmt: skip
    samples = node(
        "SkyReelsSampler", model=model, positive=positive, negative=negative, image=picture,
        seed=0, steps=1, cfg=6.0, embedded_guidance=1.0, shift=7.0,
    )  # fmt: skip
    node("SkyReelsVAEDecode", vae=vae, samples=samples, mode="tiled")
    assert computed == ONCE_EACH
    computed.clear()
    node(
        "SkyReelsExtendVideo", model=model, vae=vae, images=torch.rand(5, 32, 32, 3),
        positive=positive, negative=negative, seed=0, num_frames=5, steps=1, cfg=6.0,
        embedded_guidance=1.0, shift=7.0, decode="tiled",
    )  # fmt: skip
    assert computed == ONCE_EACH


def test_no_node_imports_a_function_that_computes_bytes():
    named = [
        alias.name
        for path in (ROOT / "nodes" / "local").glob("*.py")
        for statement in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    ]
    assert [name for name in named if name.endswith(("_bytes", "largest_tile"))] == []
