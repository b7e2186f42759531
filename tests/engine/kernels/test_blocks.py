"""GGUF blocks: their numbers against the gguf package, layers that keep them, and their kernel."""

import json
import os

import pytest
import torch
from comfyui_skyreels.skyreels.kernels import blocks, operators
from comfyui_skyreels.skyreels.transformer.block_linear import BlockLinear, unpack
from comfyui_skyreels.skyreels.transformer.linear import input_format, linear, linear_gelu
from support.forked import forks
from support.gguf_files import TYPES, random_blocks
from support.peak import PeakBytes

KINDS = tuple(blocks.BLOCK_TYPES)
CAPABILITIES = (80, 86, 89, 90, 120)


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_and_sizes_are_those_of_the_gguf_package(kind):
    gguf = pytest.importorskip("gguf")
    number = gguf.GGMLQuantizationType[kind]
    block = blocks.BLOCK_TYPES[kind]
    assert (block.size, block.num_bytes) == gguf.GGML_QUANT_SIZES[number]
    assert number == TYPES[kind]
    stored = random_blocks(kind, 7, 768)
    expected = torch.from_numpy(gguf.quants.dequantize(stored.data.numpy(), number))
    assert torch.equal(stored.floats(), expected)
    assert torch.equal(unpack(stored.data, kind, torch.bfloat16), expected.bfloat16())


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_a_weight_that_the_gguf_package_quantized_comes_back_within_a_step(kind):
    gguf = pytest.importorskip("gguf")
    weight = torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    data = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[kind])
    step = 2 * weight.abs().max() / 2 ** int(kind[1])
    error = (unpack(torch.from_numpy(data), kind, torch.float32) - weight).abs().max()
    assert error <= 0.76 * step  # a code is cut at one end of the range of Q4_0 and Q5_0


def test_a_weight_in_pieces_is_the_same_and_takes_few_numbers_in_float32(monkeypatch):
    stored = random_blocks("Q5_K", 64, 1024)
    whole = unpack(stored.data, "Q5_K", torch.bfloat16)
    monkeypatch.setattr(blocks, "PIECE_NUMBERS", 4096)
    with PeakBytes() as counted:
        pieces = unpack(stored.data, "Q5_K", torch.bfloat16)
    assert torch.equal(whole, pieces)
    assert counted.peak <= whole.nbytes + 10 * 4096 * 4


def test_factors_are_all_that_can_be_infinite():
    for kind in KINDS:
        stored = random_blocks(kind, 4, 256)
        assert blocks.factors(stored.data, kind).isfinite().all()
        block = blocks.BLOCK_TYPES[kind]
        for start in block.halves:
            spoilt = stored.data.clone()
            spoilt[1, start : start + 2] = torch.tensor([0, 124], dtype=torch.uint8)  # infinity
            assert not blocks.factors(spoilt, kind).isfinite().all()
            assert not unpack(spoilt, kind, torch.float32).isfinite().all()


# --- layers -------------------------------------------------------------------------------------


@pytest.fixture(params=["Q8_0", "Q4_K", "Q3_K"])
def layer(request) -> BlockLinear:
    stored = random_blocks(request.param, 48, 768)
    return BlockLinear(stored.data, request.param, torch.randn(48))


@pytest.mark.parametrize("columns", [slice(None), slice(0, 256), slice(256, None), slice(40, 300)])
@pytest.mark.parametrize("rows", [slice(None), slice(16, 40)])
def test_a_part_of_a_layer_is_that_of_the_dequantized_weight(layer, rows, columns):
    weight = unpack(layer.weight, layer.kind, torch.float32)
    x = torch.randn(2, 5, 768)[..., columns]
    bias = None if columns.start else layer.bias[rows]
    expected = torch.nn.functional.linear(x, weight[rows, columns], bias)
    assert torch.equal(linear(layer, x, rows, columns), expected)
    out = torch.randn(2, 5, 60)[..., : expected.shape[-1]]
    before = out.clone()
    assert linear(layer, x, rows, columns, out=out) is out
    assert torch.equal(out, expected)
    torch.testing.assert_close(linear(layer, x, rows, columns, out=out, add=True), 2 * expected)
    assert not torch.equal(before, out)


def test_a_layer_takes_and_gives_the_dtype_of_its_input(layer):
    x = torch.randn(1, 3, 768).bfloat16()
    layer.bias.data = layer.bias.data.bfloat16()
    weight = unpack(layer.weight, layer.kind, torch.bfloat16)
    expected = torch.nn.functional.linear(x, weight, layer.bias)
    assert torch.equal(layer(x), expected)
    active = torch.nn.functional.gelu(expected, approximate="tanh")
    assert torch.equal(linear_gelu(layer, x), active)
    assert input_format(layer) is None


def test_a_layers_bytes_stay_bytes_when_a_module_is_cast(layer):
    before = layer.weight.clone()
    assert torch.equal(layer.half().weight, before)
    assert layer.bias.dtype == torch.float16
    assert (layer.out_features, layer.in_features) == (48, 768)


def test_a_quantized_input_is_refused(layer):
    from comfyui_skyreels.skyreels.kernels import QuantFormat, quantize_rows

    with pytest.raises(TypeError, match="8-bit layer"):
        linear(layer, quantize_rows(torch.randn(1, 3, 768), QuantFormat(torch.int8)))


# --- the Triton kernel, without a GPU -------------------------------------------------------------


def run_kernel(*arguments: str, **environment: str):
    pytest.importorskip("triton")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    command = ["-m", "support.triton_blocks", *arguments]
    run = forks("torch").run(command, {**clean, **environment})
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_the_kernel_computes_its_definition_in_the_interpreter():
    found = run_kernel("interpret", TRITON_INTERPRET="1")
    assert found["problem"] == ""
    assert len(found["cases"]) == 4
    for case in found["cases"]:
        assert case["error"] <= 1e-6, case
        assert case["kept"], case


@pytest.mark.slow
def test_the_kernel_compiles_for_every_architecture_without_spilled_registers():
    rows = run_kernel("compile", *map(str, CAPABILITIES))
    assert len(rows) == len(CAPABILITIES) * len(operators.BLOCK_KINDS)
    assert [row for row in rows if row["stack"] or row["local"]] == []


def test_the_kernel_takes_the_types_that_it_has_and_adjacent_numbers():
    info = operators.dispatch.DeviceInfo("cuda", "GPU", (9, 0))
    data, out = torch.zeros(2, 272, dtype=torch.uint8), torch.zeros(2, 256)

    def reason(kind, out):
        return operators.unsuited("dequantize_blocks_", (data, kind, out), info)

    assert reason("Q8_0", out) == ""
    assert "not Q2_K" in reason("Q2_K", out)
    assert "not adjacent" in reason("Q8_0", torch.zeros(256, 2).T)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_on_this_gpu_are_those_of_plain_torch(kind):
    stored = random_blocks(kind, 96, 3072)
    got = unpack(stored.data.cuda(), kind, torch.float32).cpu()
    torch.testing.assert_close(got, stored.floats(), rtol=1e-6, atol=1e-7)
