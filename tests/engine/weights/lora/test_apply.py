"""What a LoRA does to a transformer, and how it is undone."""

import copy
import functools
import os
from types import SimpleNamespace

import pytest
import torch
from comfyui_skyreels.skyreels import kernels
from comfyui_skyreels.skyreels.config import CHUNKINGS
from comfyui_skyreels.skyreels.errors import CheckpointError, OptionError
from comfyui_skyreels.skyreels.runtime import TorchRuntime
from comfyui_skyreels.skyreels.runtime.offload import module_tensors
from comfyui_skyreels.skyreels.transformer.block_linear import BlockLinear, unpack
from comfyui_skyreels.skyreels.transformer.linear import input_format, linear
from comfyui_skyreels.skyreels.transformer.quant import QuantLinear, dequantize
from comfyui_skyreels.skyreels.transformer.side_branch import SideBranch
from comfyui_skyreels.skyreels.weights.load import load_transformer
from comfyui_skyreels.skyreels.weights.lora.apply import AppliedLora, parse_blocks, use_loras
from comfyui_skyreels.skyreels.weights.lora.read import load_lora
from support import gguf_files, tiny
from support import lora as dialects
from torch import nn

RUNTIME = TorchRuntime("cpu")
PARTS = dialects.draw_parts()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return tiny.save(folder / "model.safetensors", tiny.transformer().state_dict())


@functools.cache
def _loaded(path, precision):
    return load_transformer(path, precision=precision, runtime=RUNTIME)


def load(path, precision="auto"):
    """A model of its own; copying one that was loaded is four times as fast as loading it."""
    return copy.deepcopy(_loaded(path, precision))


@pytest.fixture
def model(checkpoint):
    return load(checkpoint)


@functools.cache
def merged_by_hand(strength=1.0):
    model = tiny.transformer()
    state = model.state_dict()
    for module, parts in PARTS.items():
        weight = state[f"{module}.weight"]
        weight += strength * dialects.dense(parts).view(weight.shape)
    return model


@functools.cache
def result_by_hand(strength=1.0):
    model = merged_by_hand(strength)
    return model(**tiny.inputs(model.config))


@pytest.mark.parametrize("dialect", dialects.DIALECTS)
def test_every_dialect_equals_merging_by_hand(model, dialect, tmp_path):
    path = dialects.write(dialect, PARTS, tmp_path)
    lora = load_lora(path, model.config)
    use_loras(model, [AppliedLora(lora, 0.7)], runtime=RUNTIME)
    got = model(**tiny.inputs(model.config))
    assert (got - result_by_hand(0.7)).abs().max() <= 1e-5
    for name, parameter in merged_by_hand(0.7).named_parameters():
        assert (model.get_parameter(name) - parameter).abs().max() <= 1e-6, name


# --- layers in 8 bits ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fp8_file(tmp_path_factory):
    """Block weights in fp8, modulation included, as published files have them."""
    state = tiny.transformer().state_dict()
    for name, tensor in state.items():
        if name.startswith(("double_blocks", "single_blocks")) and tensor.ndim == 2:
            state[name] = tensor.to(torch.float8_e4m3fn)
    return tiny.save(tmp_path_factory.mktemp("fp8") / "model.safetensors", state)


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    stored = gguf_files.in_blocks(tiny.transformer().state_dict(), ("Q8_0", "Q5_1"))
    return gguf_files.write(tmp_path_factory.mktemp("gguf") / "model.gguf", stored)


@pytest.fixture(params=["fp8", "int8", "fp8 file"])
def in_8_bits(request, checkpoint, fp8_file):
    if request.param == "fp8 file":
        return load(fp8_file)
    return load(checkpoint, request.param)


@pytest.fixture(params=["fp8", "int8", "fp8 file", "GGUF file"])
def quantized(request, checkpoint, fp8_file, gguf_file):
    files = {"fp8 file": fp8_file, "GGUF file": gguf_file}
    if request.param in files:
        return load(files[request.param])
    return load(checkpoint, request.param)


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    path = dialects.write("diffusers", PARTS, tmp_path_factory.mktemp("lora"))
    return load_lora(path, tiny.TRANSFORMER)


def quant_layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear | BlockLinear)}


def input_of(layer, tokens=37):
    """An input in 16 bits as the layer takes it, and the numbers that it stands for."""
    x = torch.randn(2, tokens, layer.in_features).bfloat16()
    act_format = input_format(layer)
    if act_format is None:
        return x, x.float()
    quantized = kernels.quantize_rows(x, act_format)
    block = layer.hadamard_block
    rotated = quantized.qdata.float() * quantized.scale
    return quantized, kernels.reference.hadamard_rotate(rotated, block)


def right_result(name, layer, x, strength):
    """Dequantize, add, multiply in float32."""
    if isinstance(layer, BlockLinear):
        weight = unpack(layer.weight, layer.kind, torch.float32)
    else:
        weight = dequantize(layer.weight, layer.weight_scale, torch.float32, layer.hadamard_block)
    return x @ (weight + strength * dialects.dense(PARTS[name])).T + layer.bias.float()


def assert_within_rounding(got, right):
    # the largest error of a rounding to bfloat16 is 2^-9 of the number; the factors, what is
    # between them, the product without the branch and the sum are rounded
    error = (got.float() - right).norm() / right.norm()
    assert error <= 2**-8


def test_a_quantized_layer_equals_the_changed_weight(quantized, lora):
    use_loras(quantized, [AppliedLora(lora, 1.5)], runtime=RUNTIME)
    layers = quant_layers(quantized)
    assert len(layers) >= 8
    for name, layer in layers.items():
        x, values = input_of(layer)
        assert isinstance(layer.side_branch, SideBranch)
        assert_within_rounding(linear(layer, x), right_result(name, layer, values, 1.5))


def test_every_part_of_a_layer_gets_its_part_of_the_branch(quantized, lora):
    use_loras(quantized, [AppliedLora(lora)], runtime=RUNTIME)
    layers = quant_layers(quantized)
    for name in ("single_blocks.0.linear1", "single_blocks.1.linear2"):
        layer = layers[name]
        x, values = input_of(layer)
        right = right_result(name, layer, values, 1.0)
        for rows in (slice(0, 16), slice(10, 30), slice(20, None)):
            assert_within_rounding(linear(layer, x, rows), right[..., rows])
        halves = (slice(0, 32), slice(32, None))
        out = torch.zeros(*right.shape[:2], right.shape[2] + 8).bfloat16()[..., 4:-4]
        for columns in halves if layer.in_features > 32 else ():
            part = x[..., columns] if isinstance(x, torch.Tensor) else kernels.QuantizedActivation(
                x.qdata[..., columns], x.scale)  # fmt: skip
            linear(layer, part, slice(None), columns, out, add=columns.start > 0)
        if layer.in_features > 32:
            assert_within_rounding(out, right)


def test_a_plain_input_of_a_rotated_layer_is_right(checkpoint, lora):
    model = load(checkpoint, "int8")
    use_loras(model, [AppliedLora(lora, 4.0)], runtime=RUNTIME)
    layer = model.single_blocks[0].linear2
    x = torch.randn(1, 5, layer.in_features).bfloat16()
    plain = layer.part(x, slice(None), slice(None), layer.bias).float()
    change = 4 * x.float() @ dialects.dense(PARTS["single_blocks.0.linear2"]).T
    assert layer.hadamard_block == 32
    assert_within_rounding(linear(layer, x), plain + change)


@pytest.mark.parametrize("chunking", CHUNKINGS)
def test_a_quantized_model_is_near_the_changed_one(in_8_bits, lora, chunking):
    inputs = tiny.inputs(in_8_bits.config)
    right = result_by_hand()
    with torch.inference_mode():
        before = in_8_bits(**inputs, chunking=CHUNKINGS[chunking]).float()
        use_loras(in_8_bits, [AppliedLora(lora)], runtime=RUNTIME)
        got = in_8_bits(**inputs, chunking=CHUNKINGS[chunking]).float()
    # 8-bit weights of this tiny model alone cost this much
    assert (got - right).norm() / right.norm() <= 0.12
    assert (before - right).norm() / right.norm() >= 0.3


@pytest.mark.parametrize("chunking", CHUNKINGS)
def test_a_model_in_blocks_is_near_the_same_weights_changed(gguf_file, lora, chunking):
    model, right = load(gguf_file), load(gguf_file, "fp32")
    inputs = tiny.inputs(model.config)
    with torch.inference_mode():
        before = right(**inputs)
        for each in (model, right):
            use_loras(each, [AppliedLora(lora)], runtime=RUNTIME)
        got, right = model(**inputs, chunking=CHUNKINGS[chunking]).float(), right(**inputs)
    assert (got - right).norm() / right.norm() <= 0.03
    assert (before - right).norm() / right.norm() >= 0.3


def test_the_modulation_of_a_quantized_file_is_changed(fp8_file, lora):
    model = load(fp8_file)
    layer = model.single_blocks[0].modulation.linear
    assert isinstance(layer, QuantLinear)
    vec = torch.randn(1, layer.in_features).bfloat16()
    use_loras(model, [AppliedLora(lora)], runtime=RUNTIME)
    active = torch.nn.functional.silu(vec).float()
    right = right_result("single_blocks.0.modulation.linear", layer, active, 1.0)
    assert_within_rounding(model.single_blocks[0].modulation(vec)[:, 0], right)


# --- sets ---------------------------------------------------------------------------------------


def bits(model):
    return {name: parameter.clone() for name, parameter in model.named_parameters()}


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    assert [n for n in one if not torch.equal(_raw(one[n]), _raw(other[n]))] == []


def _raw(tensor):
    return tensor.contiguous().view(torch.uint8)


@pytest.fixture(params=["fp32", "bf16", "fp8", "int8", "GGUF"])
def any_model(request, checkpoint, gguf_file):
    if request.param == "GGUF":
        return load(gguf_file)
    return load(checkpoint, request.param)


@pytest.fixture(scope="module")
def other_lora(tmp_path_factory):
    parts = dialects.draw_parts(seed=9)
    parts = {name: parts[name] for name in list(parts)[::2]}
    path = dialects.write("musubi-tuner", parts, tmp_path_factory.mktemp("other"))
    return load_lora(path, tiny.TRANSFORMER)


def test_strength_0_and_taking_away_leave_the_bits_of_the_file(any_model, lora, other_lora):
    before = bits(any_model)
    use_loras(any_model, [AppliedLora(lora, 0.0)], runtime=RUNTIME)
    assert_same_bits(bits(any_model), before)
    use_loras(any_model, [AppliedLora(lora, 0.5), AppliedLora(other_lora)], runtime=RUNTIME)
    loaded = bits(any_model)
    assert any(name not in before or not torch.equal(loaded[name], before[name])
               for name in loaded)  # fmt: skip
    use_loras(any_model, [], runtime=RUNTIME)
    assert_same_bits(bits(any_model), before)
    use_loras(any_model, [AppliedLora(lora, 0.5), AppliedLora(other_lora)], runtime=RUNTIME)
    assert_same_bits(bits(any_model), loaded)
    assert any_model.lora_state


def changed_parameters(model, loras):
    """How many parameters a set makes anew: before each, an interrupt is asked for."""
    asked = []
    use_loras(model, loras, runtime=TorchRuntime("cpu", on_check=lambda: asked.append(1)))
    return len(asked)


def test_of_two_sets_only_the_difference_is_changed(any_model, lora, other_lora):
    assert changed_parameters(any_model, [AppliedLora(lora)]) == len(PARTS)
    assert changed_parameters(any_model, [AppliedLora(lora)]) == 0
    both = [AppliedLora(lora), AppliedLora(other_lora, 2.0)]
    count = len({change.parameter for change in other_lora.changes})
    assert changed_parameters(any_model, both) == count < len(PARTS)


def test_strengths_add_and_the_same_lora_may_be_used_twice(any_model, lora):
    inputs = tiny.inputs(any_model.config)
    results = []
    for strengths in ([1.5], [1.0, 0.5], [1.0]):
        use_loras(any_model, [AppliedLora(lora, s) for s in strengths], runtime=RUNTIME)
        results.append(any_model(**inputs).float())
    scale = results[0].norm()
    tolerance = 1e-5 if any_model.compute_dtype == torch.float32 else 0.03
    assert (results[0] - results[1]).norm() <= tolerance * scale
    assert (results[0] - results[2]).norm() > 3 * tolerance * scale


def test_a_change_of_a_part_of_the_rows_leaves_the_others(checkpoint, tmp_path):
    parts = {"single_blocks.0.linear1": PARTS["single_blocks.0.linear1"]}
    tensors = dialects.letters(dialects.diffusers_modules(parts), "transformer.")
    only = {n: t for n, t in tensors.items() if "to_q" in n or "to_v" in n}
    some = load_lora(tiny.save(tmp_path / "qv.safetensors", only), tiny.TRANSFORMER)
    for precision in ("fp32", "int8"):
        model = load(checkpoint, precision)
        layer = model.single_blocks[0].linear1
        x, _ = input_of(layer)
        x = x if precision == "int8" else x.float()
        before = linear(layer, x)
        use_loras(model, [AppliedLora(some)], runtime=RUNTIME)
        changed = (linear(layer, x) != before).flatten(0, 1).any(dim=0)
        assert changed[:32].all()
        assert not changed[32:64].any()
        assert changed[64:96].all()
        assert not changed[96:].any()


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_run_cancelled_while_loras_change_is_repaired_by_the_next(
    checkpoint, precision, lora, other_lora
):
    model = load(checkpoint, precision)
    original = bits(model)
    use_loras(model, [AppliedLora(lora)], runtime=RUNTIME)
    wanted = bits(model)
    left = iter(range(9))

    def cancel():
        if next(left, None) is None:
            raise KeyboardInterrupt

    runtime = TorchRuntime("cpu", on_check=cancel)
    with pytest.raises(KeyboardInterrupt):
        use_loras(model, [AppliedLora(other_lora)], runtime=runtime)
    use_loras(model, [AppliedLora(lora)], runtime=RUNTIME)
    assert_same_bits(bits(model), wanted)
    use_loras(model, [], runtime=RUNTIME)
    assert_same_bits(bits(model), original)


def test_a_change_that_breaks_off_inside_a_weight_counts_as_unknown(model, lora, monkeypatch):
    original = bits(model)
    broken = AppliedLora(lora)
    monkeypatch.setattr(
        "comfyui_skyreels.skyreels.weights.lora.apply._merge",
        lambda parameter, *_: parameter.data.fill_(7.0) / 0 / SimpleNamespace(),
    )
    with pytest.raises(TypeError):
        use_loras(model, [broken], runtime=RUNTIME)
    monkeypatch.undo()
    assert None in model.lora_state.values()
    use_loras(model, [], runtime=RUNTIME)
    assert_same_bits(bits(model), original)


@pytest.mark.parametrize("harm", ["deleted", "changed"])
def test_weights_whose_file_is_gone_are_not_restored_from_another(tmp_path, lora, harm):
    path = tiny.save(tmp_path / "model.safetensors", tiny.transformer().state_dict())
    model = load_transformer(path, runtime=RUNTIME)
    use_loras(model, [AppliedLora(lora)], runtime=RUNTIME)
    changed = bits(model)
    if harm == "deleted":
        path.unlink()
    else:
        tiny.save(path, tiny.transformer(seed=3).state_dict())
        os.utime(path, ns=(1, 1))
    with pytest.raises(CheckpointError, match="changed, moved or deleted"):
        use_loras(model, [], runtime=RUNTIME)
    assert_same_bits(bits(model), changed)
    use_loras(model, [AppliedLora(lora)], runtime=RUNTIME)  # what it has needs no file


def test_a_model_that_no_file_made_says_so_when_it_is_to_be_restored(lora):
    model = tiny.transformer()
    use_loras(model, [AppliedLora(lora)], runtime=RUNTIME)
    with pytest.raises(CheckpointError, match="was not loaded from a file"):
        use_loras(model, [], runtime=RUNTIME)


def test_weights_are_changed_where_they_are(model, lora):
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    with torch.inference_mode():  # ComfyUI runs nodes in it
        use_loras(model, [AppliedLora(lora)], runtime=RUNTIME)
        use_loras(model, [], runtime=RUNTIME)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before


def test_factors_are_parameters_of_their_layer(checkpoint, lora):
    model = load(checkpoint, "int8")
    before = len(module_tensors(model.single_blocks[0]))
    with torch.inference_mode():
        use_loras(model, [AppliedLora(lora)], runtime=RUNTIME)
    branch = model.single_blocks[0].linear1.side_branch
    assert len(module_tensors(model.single_blocks[0])) == before + 4
    assert isinstance(branch.down, nn.Parameter)
    assert branch.down.dtype == branch.up.dtype == model.compute_dtype
    assert not branch.down.is_inference()


# --- blocks -------------------------------------------------------------------------------------


def test_a_list_of_blocks_limits_where_a_lora_acts(model, lora):
    before = bits(model)
    use_loras(model, [AppliedLora(lora, 1.0, "double:1, single:0-1")], runtime=RUNTIME)
    touched = {
        n.split(".mlp")[0][:15] for n, p in bits(model).items() if not (p == before[n]).all()
    }
    assert touched == {"double_blocks.1", "single_blocks.0", "single_blocks.1"}


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("", None),
        ("double", {"double": None}),
        (" double : 0-2 ,double:7", {"double": frozenset({0, 1, 2, 7})}),
        ("single:3,other", {"single": frozenset({3}), "other": None}),
        ("single,single:3", {"single": None}),
    ],
)
def test_lists_of_blocks_are_read(text, blocks):
    assert parse_blocks(text) == blocks


@pytest.mark.parametrize(
    "text", ["double:", "double:1-", "double:-1", "double:3-1", "triple", "other:1", "double;1",
             "double:1,,", "single:99999", "double:\u0661"],
)  # fmt: skip
def test_what_is_no_list_of_blocks_is_refused(text, lora):
    with pytest.raises(OptionError, match="list of blocks"):
        AppliedLora(lora, 1.0, text)


def test_a_block_that_is_not_there_is_refused(model, lora):
    with pytest.raises(OptionError, match="double block 2, and this model has 2, 0 to 1"):
        use_loras(model, [AppliedLora(lora, 1.0, "double:0-5")], runtime=RUNTIME)


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), 101.0])
def test_a_strength_that_is_none_is_refused(lora, strength):
    with pytest.raises(OptionError, match="strength"):
        AppliedLora(lora, strength)
