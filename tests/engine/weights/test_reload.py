"""Parameters that are read again have the bits in which they were loaded."""

import os

import pytest
import torch
from comfyui_skyreels.skyreels.errors import CheckpointError
from comfyui_skyreels.skyreels.runtime import TorchRuntime
from comfyui_skyreels.skyreels.transformer.quant import QuantLinear
from comfyui_skyreels.skyreels.weights.load import load_transformer, reload_parameters
from support import gguf_files, tiny

RUNTIME = TorchRuntime()
STATE = tiny.transformer().state_dict()
TO_LAYOUT = {
    "original": lambda state: state,
    "comfyui": tiny.to_comfyui,
    "diffusers": lambda state: tiny.to_diffusers(state, tiny.TRANSFORMER),
}


CPU = torch.device("cpu")


def floats(model):
    """Names of all parameters that are not in 8 bits, nor scales of such."""
    quantized = {name for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    apart = {f"{name}.{end}" for name in quantized for end in ("weight", "weight_scale")}
    return [name for name, _ in model.named_parameters() if name not in apart]


@pytest.mark.parametrize("layout", TO_LAYOUT)
@pytest.mark.parametrize("precision", ["auto", "bf16", "int8"])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_every_layout_and_precision(tmp_path, layout, precision, stored):
    state = {name: tensor.to(stored) for name, tensor in TO_LAYOUT[layout](STATE).items()}
    path = tiny.save(tmp_path / "model.safetensors", state)
    model = load_transformer(path, precision=precision, runtime=RUNTIME)
    names = floats(model)
    read = dict(reload_parameters(model, names, CPU))
    assert list(read) == names
    for name, tensor in read.items():
        parameter = model.get_parameter(name)
        assert tensor.dtype == parameter.dtype
        assert torch.equal(tensor, parameter), name


def test_weights_of_a_scaled_fp8_file_are_dequantized_again(tmp_path):
    state = dict(STATE)
    for name in ("txt_in.input_embedder.weight", "single_blocks.0.linear1.weight"):
        state[name] = (STATE[name] * 8).to(torch.float8_e4m3fn)
        state[f"{name.removesuffix('weight')}scale_weight"] = torch.tensor(1 / 8)
    model = load_transformer(tiny.save(tmp_path / "m.safetensors", state), runtime=RUNTIME)
    names = floats(model)
    assert "txt_in.input_embedder.weight" in names
    assert "single_blocks.0.linear1.weight" not in names
    for name, tensor in reload_parameters(model, names, CPU):
        assert torch.equal(tensor, model.get_parameter(name)), name


def test_blocks_that_were_dequantized_are_dequantized_again(tmp_path):
    path = gguf_files.write(tmp_path / "m.gguf", gguf_files.in_blocks(STATE, ("Q8_0", "Q4_0")))
    model = load_transformer(path, precision="bf16", runtime=RUNTIME)
    for name, tensor in reload_parameters(model, floats(model), CPU):
        assert torch.equal(tensor, model.get_parameter(name)), name


def test_a_pickle_and_a_sharded_folder_are_read_again(tmp_path):
    torch.save(STATE, tmp_path / "model.pt")
    state = tiny.to_diffusers(STATE, tiny.TRANSFORMER)
    tiny.save_sharded(tmp_path / "folder", state, tiny.diffusers_config(tiny.TRANSFORMER))
    for path in (tmp_path / "model.pt", tmp_path / "folder"):
        model = load_transformer(path, runtime=RUNTIME)
        for name, tensor in reload_parameters(model, floats(model), CPU):
            assert torch.equal(tensor, model.get_parameter(name)), name


def test_nothing_is_asked_of_a_file_that_is_not_needed(tmp_path):
    path = tiny.save(tmp_path / "model.safetensors", STATE)
    model = load_transformer(path, runtime=RUNTIME)
    path.unlink()
    assert list(reload_parameters(model, [], CPU)) == []


@pytest.mark.parametrize("harm", ["touched", "longer", "gone", "a folder"])
def test_a_file_that_is_not_the_same_any_more_is_refused(tmp_path, harm):
    path = tiny.save(tmp_path / "model.safetensors", STATE)
    model = load_transformer(path, runtime=RUNTIME)
    if harm == "touched":
        os.utime(path, ns=(5, 5))
    elif harm == "longer":
        status = path.stat()
        with path.open("ab") as file:
            file.write(b"x")
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    else:
        path.unlink()
        if harm == "a folder":
            path.mkdir()
    with pytest.raises(CheckpointError, match="was changed, moved or deleted since"):
        list(reload_parameters(model, ["img_in.proj.weight"], CPU))
