"""A tiny text encoder folder, loaded, and the pipeline of diffusers to compare with."""

import importlib
import shutil
from pathlib import Path

import pytest
from comfyui_skyreels.skyreels.runtime import TorchRuntime
from comfyui_skyreels.skyreels.text.load import TextEncoder, load_text_encoder


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    pytest.importorskip("transformers")
    from support.text import make_text_folder

    return make_text_folder(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def encoder(folder) -> TextEncoder:
    return load_text_encoder(folder, runtime=TorchRuntime())


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    """The folder, for a test that changes it."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture(scope="session")
def diffusers_pipeline():
    """The module of diffusers' own SkyReels pipeline."""
    try:
        return importlib.import_module(
            "diffusers.pipelines.hunyuan_video.pipeline_hunyuan_skyreels_image2video"
        )
    except (ImportError, RuntimeError) as error:  # missing, or does not go with transformers
        pytest.skip(f"diffusers cannot be imported: {error}")
