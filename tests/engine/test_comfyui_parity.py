"""The transformer against ComfyUI's own, in ComfyUI's own environment."""

import subprocess
from pathlib import Path

import pytest
import torch
from comfyui_skyreels.skyreels.config import TransformerConfig
from comfyui_skyreels.skyreels.runtime import TorchRuntime
from comfyui_skyreels.skyreels.weights.load import load_transformer
from safetensors.torch import load_file
from support import tiny

# ComfyUI fixes the rotary axes to 16, 56, 56 and two refiner blocks
CONFIG = TransformerConfig(num_attention_heads=1, num_layers=2, num_single_layers=2)
SCRIPT = Path(__file__).resolve().parents[1] / "support" / "comfy_forward.py"

pytestmark = pytest.mark.comfy


@pytest.mark.parametrize("text_tokens", [1, 40])
def test_forward_equals_comfyuis_and_its_names_load_back(checkout, tmp_path, text_tokens):
    model = tiny.transformer(CONFIG)
    inputs = tiny.inputs(CONFIG, text_tokens, grid=(3, 6, 10))
    checkpoint = tiny.save(tmp_path / "model.safetensors", model.state_dict())
    tiny.save(tmp_path / "inputs.safetensors", inputs)
    command = [checkout.python(), SCRIPT, checkout.folder, checkpoint,
               tmp_path / "inputs.safetensors", tmp_path / "out.safetensors"]  # fmt: skip
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    output = load_file(tmp_path / "out.safetensors")
    assert tiny.relative_error(model(**inputs), output.pop("velocity")) <= 1e-5

    # files saved by ComfyUI carry its internal names
    theirs = {name.removeprefix("weights."): tensor for name, tensor in output.items()}
    path = tiny.save(tmp_path / "comfy.safetensors", theirs)
    loaded = load_transformer(path, runtime=TorchRuntime()).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded[name], tensor), name
