"""Patches that core's LoRA loader makes, as changes of the engine's parameters."""

from types import SimpleNamespace

import pytest
import torch
from comfyui_skyreels.nodes.host.core_patches import core_names, loras_of
from comfyui_skyreels.skyreels.errors import CheckpointError
from comfyui_skyreels.skyreels.runtime import TorchRuntime
from comfyui_skyreels.skyreels.weights.lora.apply import use_loras
from support import tiny

CONFIG = tiny.TRANSFORMER
NAMES = core_names(CONFIG)
KEY = "diffusion_model.double_blocks.0.img_attn.qkv.weight"
BIAS = "diffusion_model.double_blocks.0.img_attn.qkv.bias"


@pytest.fixture
def model():
    return tiny.transformer(CONFIG)


def factors(rows, columns, rank=3):
    generator = torch.Generator().manual_seed(1)
    up = torch.randn(rows, rank, generator=generator)
    return up, torch.randn(rank, columns, generator=generator)


def adapter(up, down, alpha=None, middle=None, dora=None):
    return SimpleNamespace(name="lora", weights=(up, down, alpha, middle, dora, None))


def patched(model, patches):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    use_loras(model, loras_of(patches, CONFIG), runtime=TorchRuntime())
    after = model.state_dict()
    return {name: after[name] - before[name] for name in before}


def test_every_parameter_has_a_name_in_core(model):
    assert set(NAMES.values()) == set(dict(model.named_parameters()))
    assert len(NAMES) == len(set(NAMES.values()))


def test_factors_and_differences_of_a_weight_add_with_their_strengths(model):
    name = NAMES[KEY]
    rows, columns = model.get_parameter(name).shape
    up, down = factors(rows, columns)
    whole, bias = torch.full((rows, columns), 0.5), torch.ones(rows)
    changes = patched(model, {
        KEY: [
            (0.7, adapter(up, down, alpha=1.5), 1.0, None, None),
            (2.0, ("diff", (whole,)), 1.0, None, None),
            (-1.0, (whole,), 1.0, None, None),
            (0.0, SimpleNamespace(name="oft"), 1.0, None, None),
        ],
        BIAS: [(0.25, ("diff", (bias,)), 1.0, None, None)],
    })  # fmt: skip
    expected = 0.7 * 1.5 / 3 * up @ down + 0.5
    torch.testing.assert_close(changes.pop(name), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(changes.pop(NAMES[BIAS]), 0.25 * bias, rtol=1e-5, atol=1e-5)
    assert not any(change.any() for change in changes.values())


def test_a_part_of_a_fused_weight_is_its_rows(model):
    name, third = NAMES[KEY], CONFIG.hidden_size
    up, down = factors(third, model.get_parameter(name).shape[1])
    part = (0, third, third)
    change = patched(model, {KEY: [(1.0, adapter(up, down), 1.0, part, None)]})[name]
    torch.testing.assert_close(change[third : 2 * third], up @ down, rtol=1e-5, atol=1e-5)
    assert not change[:third].any()
    assert not change[2 * third :].any()


def test_the_same_patches_are_the_same_lora_and_others_are_not():
    up, down = factors(3 * CONFIG.hidden_size, CONFIG.hidden_size)

    def digest(strength):
        (applied,) = loras_of({KEY: [(strength, adapter(up, down), 1.0, None, None)]}, CONFIG)
        return applied.lora.digest

    assert digest(1.0) == digest(1.0) != digest(0.5)
    assert loras_of({}, CONFIG) == ()


WIDTH = CONFIG.hidden_size
FITTING = factors(3 * WIDTH, WIDTH)
REFUSED = {
    "DoRA": (1.0, adapter(*FITTING, dora=torch.ones(1)), 1.0, None, None),
    "reshaped convolution": (1.0, adapter(*FITTING, middle=torch.ones(1)), 1.0, None, None),
    "kind loha": (1.0, SimpleNamespace(name="loha", weights=()), 1.0, None, None),
    "kind set": (1.0, ("set", (torch.ones(1),)), 1.0, None, None),
    "scales or computes": (1.0, adapter(*FITTING), 0.5, None, None),
    "some columns": (1.0, adapter(*FITTING), 1.0, (1, 0, 4), None),
    "another model": (1.0, adapter(*factors(8, WIDTH)), 1.0, None, None),
    "of shape": (1.0, ("diff", (torch.ones(2, 2),)), 1.0, None, None),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_the_engine_does_not_have_is_refused_by_name(words):
    with pytest.raises(CheckpointError, match=words) as caught:
        loras_of({KEY: [REFUSED[words]]}, CONFIG)
    assert "double_blocks.0.img_attn_qkv.weight" in str(caught.value)
