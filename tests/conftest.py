"""Load the package once, the way ComfyUI does: by path, under a name that is not importable.

Tests import `comfyui_skyreels.skyreels...` and `comfyui_skyreels.nodes...`, so no class exists
twice and every relative import is proved. `nodes` must never be importable as a top-level name.
"""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "comfyui_skyreels"

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")


def load_package(name: str = PACKAGE):
    spec = importlib.util.spec_from_file_location(
        name, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


if PACKAGE not in sys.modules:
    load_package()
    sys.path.insert(0, str(ROOT / "tests"))  # for `support.*`


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def root() -> Path:
    return ROOT


@pytest.fixture
def comfy(monkeypatch, tmp_path):
    """A ComfyUI of stand-ins (support/host.py); its models, user files and records are in it."""
    from support import host

    comfy = host.Host(tmp_path / "comfyui")
    for name, module in host.stand_ins(comfy).items():
        monkeypatch.setitem(sys.modules, name, module)
    return comfy
