"""What a LoRA does to a transformer, and how it is undone."""

import pytest
import torch
from comfyui_skyreels.skyreels.lora.apply import AppliedLora, use_loras
from comfyui_skyreels.skyreels.lora.read import load_lora
from comfyui_skyreels.skyreels.runtime import TorchRuntime
from comfyui_skyreels.skyreels.weights.load import load_transformer
from support import lora as dialects
from support import tiny

RUNTIME = TorchRuntime("cpu")
PARTS = dialects.draw_parts()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return tiny.save(folder / "model.safetensors", tiny.transformer().state_dict())


@pytest.fixture
def model(checkpoint):
    return load_transformer(checkpoint, runtime=RUNTIME)


def merged_by_hand(strength=1.0):
    state = tiny.transformer().state_dict()
    for module, parts in PARTS.items():
        weight = state[f"{module}.weight"]
        weight += strength * dialects.dense(parts).view(weight.shape)
    other = tiny.transformer()
    other.load_state_dict(state)
    return other


@pytest.mark.parametrize("dialect", dialects.DIALECTS)
def test_every_dialect_equals_merging_by_hand(model, dialect, tmp_path):
    path = dialects.write(dialect, PARTS, tmp_path)
    lora = load_lora(path, model.config)
    use_loras(model, [AppliedLora(lora, 0.7)], runtime=RUNTIME)
    expected = merged_by_hand(0.7)
    inputs = tiny.inputs(model.config)
    got, right = model(**inputs), expected(**inputs)
    assert (got - right).abs().max() <= 1e-5
    for name, parameter in expected.named_parameters():
        assert (model.get_parameter(name) - parameter).abs().max() <= 1e-6, name
