"""8-bit linear layers: what rounding costs, that parts make the whole, and which product a device
gets. Devices other than the CPU are described, not present."""

import json
import logging
import os
import sys
from types import SimpleNamespace

import pytest
import torch
from comfyui_skyreels.skyreels import kernels
from comfyui_skyreels.skyreels.config import CHUNKINGS, TransformerConfig
from comfyui_skyreels.skyreels.kernels import (
    QuantFormat,
    QuantizedActivation,
    dispatch,
    operators,
    reference,
)
from comfyui_skyreels.skyreels.kernels.dispatch import DeviceInfo, Finding
from comfyui_skyreels.skyreels.transformer import layers, quant
from comfyui_skyreels.skyreels.transformer.linear import input_format, linear
from comfyui_skyreels.skyreels.transformer.model import SkyReelsTransformer
from comfyui_skyreels.skyreels.transformer.quant import (
    STORAGE_DTYPES,
    QuantLinear,
    dequantize,
    hadamard_block_size,
    is_quantizable,
    quantize,
)
from support import peak
from support.forked import forks
from support.traffic import Traffic
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

E4M3, INT8 = torch.float8_e4m3fn, torch.int8
CPU = torch.device("cpu")
BY_ROWS, PER_TENSOR, FUSED = quant.ROWWISE, "_scaled_mm per tensor", quant.FUSED


def make(weight, precision, bias=None, **options) -> QuantLinear:
    """A layer that rounds its input too."""
    block = hadamard_block_size(weight.shape[1]) if precision == "int8" else 0
    stored, scale = quantize(weight, STORAGE_DTYPES[precision], block)
    options = {"weight_only": False, "compute_dtype": torch.float32, **options}
    return QuantLinear(stored, scale, bias, hadamard_block=block, **options)


def error(got, expected) -> float:
    return ((got.double() - expected).norm() / expected.norm()).item()


def gaussian(tokens, channels):
    return torch.randn(tokens, channels)


def outliers(tokens, channels):
    """12 channels 30 times as large, and tokens of unlike size."""
    x = torch.randn(tokens, channels)
    x[:, torch.randperm(channels)[:12]] *= 30
    return x * torch.randn(tokens, 1).exp()


# --- what rounding costs ------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", [gaussian, outliers])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("precision", "bound"), [("fp8", 0.040), ("int8", 0.015)])
def test_rounding_inputs_and_weights_costs_no_more_than_planned(
    distribution, dtype, precision, bound
):
    x, weight = distribution(256, 3072)[None].to(dtype), torch.randn(512, 3072) * 0.02
    layer = make(weight, precision, compute_dtype=dtype)
    assert layer.input_format is not None
    got = layer(x)
    assert got.dtype == dtype
    assert bound / 4 <= error(got, x.double() @ weight.double().T) <= bound


def test_without_rotation_int8_would_cost_far_more():
    """The gate above can fail: this is what the rotation is for."""
    x, weight = outliers(256, 3072)[None], torch.randn(512, 3072) * 0.02
    stored, scale = quantize(weight, INT8)
    layer = QuantLinear(stored, scale, None, weight_only=False)
    assert error(layer(x), x.double() @ weight.double().T) >= 0.03


@pytest.mark.parametrize("precision", STORAGE_DTYPES)
def test_the_result_is_that_of_the_rounded_numbers(precision):
    """Exactly: scales are applied to the product, nothing else is lost."""
    x, weight, bias = torch.randn(2, 17, 96), torch.randn(48, 96), torch.randn(48)
    layer = make(weight, precision, bias)
    rows = kernels.quantize_rows(x, layer.input_format)
    inputs = rows.qdata.double() * rows.scale
    expected = inputs @ (layer.weight.double() * layer.weight_scale).T + bias
    assert error(layer(x), expected) <= 1e-6


@pytest.mark.parametrize("block", [0, 32])
def test_a_widened_weight_is_the_one_that_was_rounded(block):
    weight = torch.randn(40, 96)
    stored, scale = quantize(weight, INT8, block)
    wide = dequantize(stored, scale, torch.float32, block)
    assert error(wide, weight.double()) <= 0.01
    x = torch.randn(5, 96)
    layer = QuantLinear(stored, scale, None, hadamard_block=block)
    assert layer.input_format is None
    torch.testing.assert_close(layer(x), x @ wide.T)


def test_quantising_goes_by_rows_whatever_runs_at_a_time(monkeypatch):
    weight = torch.randn(70, 64)
    weight[3] = 0
    whole = quantize(weight, INT8, 64)
    monkeypatch.setattr(quant, "CHUNK_ROWS", 32)
    parts = quantize(weight, INT8, 64)
    assert torch.equal(whole[0], parts[0])
    assert torch.equal(whole[1], parts[1])
    assert whole[1][3] == 1
    assert whole[1].shape == (70, 1)


# --- parts, rows, shapes ------------------------------------------------------------------------


@pytest.fixture(params=[*STORAGE_DTYPES, "weight-only int8", "weight-only fp8"])
def layer(request):
    weight, bias = torch.randn(96, 192) * 0.1, torch.randn(96)
    precision = request.param.split()[-1]
    return make(weight, precision, bias, weight_only="only" in request.param)


def rounded(layer, x):
    """As a fused kernel would hand it over."""
    to = input_format(layer)
    return x if to is None else kernels.quantize_rows(x, to)


def test_parts_of_the_rows_make_the_whole(layer):
    x = torch.randn(2, 9, 192)
    parts = [slice(0, 16), slice(16, 80), slice(80, None)]
    joined = torch.cat([linear(layer, rounded(layer, x), out_slice=rows) for rows in parts], dim=-1)
    torch.testing.assert_close(joined, layer(x))


def test_parts_of_the_columns_make_the_whole(layer):
    """[attention | MLP]: each with scales of its own, so equal up to rounding."""
    x = torch.randn(2, 9, 192)
    out = torch.empty(2, 9, 96)
    first, second = rounded(layer, x[..., :64]), rounded(layer, x[..., 64:])
    linear(layer, first, in_slice=slice(0, 64), out=out)
    linear(layer, second, in_slice=slice(64, None), out=out, add=True)
    wide = dequantize(layer.weight, layer.weight_scale, torch.float32, layer.hadamard_block)
    exact = (x @ wide.T + layer.bias).double()
    assert error(out, exact) <= (0.03 if layer.weight.dtype == E4M3 else 0.01)


def test_a_part_is_written_and_added_where_it_is_told(layer, monkeypatch):
    x = torch.randn(2, 600, 192)
    expected = layer(x)
    monkeypatch.setattr(quant, "CHUNK_ELEMENTS", 1)  # 256 tokens at a time
    buffer = torch.full((2, 603, 3, 96), torch.nan)
    into = buffer[:, 2:602, 1]  # neither contiguous nor at the start
    got = layer.part(rounded(layer, x), slice(None), slice(None), layer.bias, into)
    assert got is into
    torch.testing.assert_close(into, expected)
    layer.part(rounded(layer, x), slice(None), slice(None), None, into, add=True)
    torch.testing.assert_close(into, 2 * expected - layer.bias)
    assert buffer.isnan().sum() == buffer.numel() - into.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 17])
@pytest.mark.parametrize("precision", STORAGE_DTYPES)
def test_rows_give_what_the_tensor_gives(precision, tokens, dtype):
    weight, bias = torch.randn(48, 96), torch.randn(48).to(dtype)
    layer = make(weight, precision, bias, compute_dtype=dtype)
    x = torch.randn(2, tokens, 96).to(dtype)
    rows = kernels.quantize_rows(x, layer.input_format)
    assert torch.equal(layer(rows), layer(x))
    assert layer(rows).dtype == dtype
    assert layer(x).shape == (2, tokens, 48)
    assert layer(x[0]).shape == (tokens, 48)


def test_a_layer_that_widens_takes_rounded_rows_too():
    """Rows made for another device: rotated back, not refused."""
    weight = torch.randn(48, 96)
    stored, scale = quantize(weight, INT8, 32)
    layer = QuantLinear(stored, scale, None, hadamard_block=32, compute_dtype=torch.float32)
    x = torch.randn(1, 5, 96)
    rows = kernels.quantize_rows(x, QuantFormat(INT8, 32))
    assert error(layer(rows), layer(x).double()) <= 0.01


def test_rows_of_another_format_are_a_mistake():
    layer = make(torch.randn(48, 96), "int8")
    rows = kernels.quantize_rows(torch.randn(1, 5, 96), QuantFormat(E4M3))
    with pytest.raises(AssertionError, match="float8"):
        layer(rows)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("precision", STORAGE_DTYPES)
def test_what_is_not_finite_spoils_its_token_and_no_other(precision, value):
    layer = make(torch.randn(48, 96), precision)
    x = torch.randn(1, 3, 96)
    x[0, 1, 5] = value
    finite = layer(x).isfinite()
    assert finite[0, [0, 2]].all()
    assert not finite[0, 1].any()


@pytest.mark.parametrize("scale", [None, torch.tensor(0.5), torch.rand(48, 1) + 0.5])
def test_scales_of_a_file_are_used_as_they_are(scale):
    stored = torch.randn(48, 96).to(E4M3)
    layer = QuantLinear(stored, scale, None, weight_only=False)
    x = torch.randn(1, 7, 96)
    exact = x.double() @ (stored.double() * (1.0 if scale is None else scale)).T
    assert layer.input_format == (E4M3, 0)
    assert error(layer(x), exact) <= 0.03
    part = layer.part(x, slice(16, 32), slice(None), None)
    torch.testing.assert_close(part, layer(x)[..., 16:32])


# --- rotations ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hidden", "size"), [(3072, 256), (128, 128), (96, 32), (48, 16), (17, 0), (2, 2)]
)
def test_no_rotation_straddles_the_parts_of_a_projection(hidden, size):
    assert hadamard_block_size(hidden, 4 * hidden) == size
    assert size == 0 or (hidden % size == 0 and 4 * hidden % size == 0)


def test_columns_that_cut_a_rotation_are_a_mistake():
    layer = make(torch.randn(16, 96), "int8")
    assert layer.hadamard_block == 32
    layer.part(torch.randn(2, 64), slice(None), slice(32, None), None)
    with pytest.raises(AssertionError, match="cut a Hadamard block of 32"):
        layer.part(torch.randn(2, 48), slice(None), slice(48, None), None)


# --- what is rounded ----------------------------------------------------------------------------


def test_small_and_delicate_layers_are_kept():
    """Of 20 double blocks: the text stream of the first and last two, and the last attention."""
    kept = (
        "img_in.proj", "txt_in.input_embedder", "time_in.mlp.0", "vector_in.in_layer",
        "guidance_in.mlp.2", "final_layer.linear", "final_layer.adaLN_modulation.1",
        "txt_in.individual_token_refiner.blocks.0.self_attn_qkv",
        "double_blocks.7.img_mod.linear", "double_blocks.7.txt_mod.linear",
        "double_blocks.7.img_attn_q_norm", "single_blocks.0.q_norm",
        "single_blocks.30.modulation.linear",
        "double_blocks.19.img_attn_qkv", "double_blocks.19.img_attn_proj",
        *(f"double_blocks.{block}.txt_{part}" for block in (0, 1, 18, 19)
          for part in ("attn_qkv", "attn_proj", "mlp.fc1", "mlp.fc2")),
    )  # fmt: skip
    rounded = (
        "double_blocks.0.img_attn_qkv", "double_blocks.19.img_mlp.fc2",
        "double_blocks.18.img_attn_proj", "double_blocks.2.txt_attn_qkv",
        "double_blocks.17.txt_mlp.fc1",
        "single_blocks.0.linear1", "single_blocks.39.linear2",
    )  # fmt: skip
    assert not any(is_quantizable(f"{name}.weight", 20) for name in kept)
    assert all(is_quantizable(f"{name}.weight", 20) for name in rounded)


# --- which product a device gets ----------------------------------------------------------------


def passes(name):
    return Finding({"": 0.0}, quant.PROBE_TOLERANCE)


def by_rows_not_supported(name):
    if name == BY_ROWS:
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")
    return passes(name)


def ours_fails(name):
    if name == FUSED:
        raise RuntimeError("ptxas")
    return passes(name)


def fails(name):
    return Finding({"": float("nan")}, quant.PROBE_TOLERANCE)


def as_listed(names):
    """A clock that finds the first of them the fastest, and dequantizing the slowest."""
    return {name: 1.0 + place for place, name in enumerate([*names, quant.DEQUANTIZED])}


def device(kind, capability=None, triton="3.6.0", problem=""):
    return DeviceInfo(kind, "a GPU", capability, triton=triton, triton_problem=problem)


DEVICES = [
    # kind, capability, test, product of fp8, product of int8
    ("cuda", (7, 0), passes, None, None),
    ("cuda", (7, 5), passes, None, "_int_mm"),
    ("cuda", (8, 0), passes, None, FUSED),
    ("cuda", (8, 6), passes, None, FUSED),
    ("cuda", (8, 9), passes, BY_ROWS, FUSED),
    ("cuda", (8, 9), by_rows_not_supported, PER_TENSOR, FUSED),
    ("cuda", (9, 0), passes, BY_ROWS, FUSED),
    ("cuda", (9, 0), ours_fails, BY_ROWS, "_int_mm"),
    ("cuda", (9, 0), fails, None, None),
    ("cuda", (12, 0), by_rows_not_supported, PER_TENSOR, FUSED),
    ("cuda", None, passes, None, None),  # AMD
    ("mps", None, passes, None, None),
    ("cpu", None, passes, "float32", "_int_mm"),
    (
        "cpu",
        None,
        lambda name: passes(name) if name == "float32" else fails(name),
        "float32",
        "float32",
    ),
    ("meta", None, fails, BY_ROWS, FUSED),
]


@pytest.mark.parametrize(("kind", "capability", "test", "fp8", "int8"), DEVICES)
def test_a_device_gets_the_fastest_product_it_has_and_passes(kind, capability, test, fp8, int8):
    info = device(kind, capability)
    for dtype, product in ((E4M3, fp8), (INT8, int8)):
        chosen = quant.decide_gemm(dtype, info, test, as_listed)
        assert chosen.impl == product
        assert chosen.reason and chosen.is_final
        if product is None and test is passes:
            assert "capability" in chosen.reason or "no 8-bit GEMM" in chosen.reason
    assert quant.decide_gemm(torch.float8_e5m2, info, test, as_listed).impl is None


def test_the_reason_names_what_failed_before():
    chosen = quant.decide_gemm(E4M3, device("cuda", (12, 0)), by_rows_not_supported, as_listed)
    assert "self-test passed" in chosen.reason
    assert "by rows: failed with RuntimeError: CUBLAS_STATUS_NOT_SUPPORTED" in chosen.reason
    refused = quant.decide_gemm(INT8, device("cuda", (7, 0)), passes, as_listed)
    assert "from compute capability 7.5 on, this is 7.0" in refused.reason
    older = quant.decide_gemm(INT8, device("cuda", (7, 5)), passes, as_listed)
    assert f"{FUSED}: from compute capability 8.0 on, this is 7.5" in older.reason


def test_a_device_too_old_is_not_even_tested():
    def explodes(name):
        raise AssertionError

    assert quant.decide_gemm(E4M3, device("cuda", (8, 6)), explodes, as_listed).impl is None
    only_fused = lambda name: explodes(name) if name == FUSED else passes(name)  # noqa: E731
    quant.decide_gemm(INT8, device("cuda", (7, 5)), only_fused, as_listed)


# what a 4090 takes for 8,192 x 3,072 x 3,072: rounding, product and scales, in milliseconds
WITH_TRITON = {PER_TENSOR: 0.7, FUSED: 0.5, "_int_mm": 0.6, quant.DEQUANTIZED: 1.0}
WITHOUT_TRITON = {PER_TENSOR: 1.9, "_int_mm": 1.7, quant.DEQUANTIZED: 1.0}


@pytest.mark.parametrize("dtype", [E4M3, INT8])
def test_on_windows_without_triton_8_bits_that_are_slower_are_not_used_and_that_is_told(dtype):
    """No product by rows there (torch has none on Windows), and scales in passes of their own."""
    info = device("cuda", (8, 9), triton="", problem="Triton is not installed: pip install it")
    chosen = quant.decide_gemm(
        dtype, info, by_rows_not_supported,
        lambda names: {name: WITHOUT_TRITON[name] for name in [*names, quant.DEQUANTIZED]},
    )  # fmt: skip
    assert chosen.impl is None
    assert f"times as fast as {quant.DEQUANTIZED}" in chosen.reason
    assert "8192 x 3072 x 3072 with rounding and scales" in chosen.reason
    if dtype == INT8:
        assert f"{FUSED}: Triton is not installed: pip install it" in chosen.reason
    with_triton = quant.decide_gemm(
        dtype, device("cuda", (8, 9)), by_rows_not_supported,
        lambda names: {name: WITH_TRITON[name] for name in [*names, quant.DEQUANTIZED]},
    )  # fmt: skip
    assert with_triton.impl == (PER_TENSOR if dtype == E4M3 else FUSED)


def test_plain_torch_multiplies_as_defined_on_every_device(monkeypatch):
    monkeypatch.setenv("SKYREELS_BACKEND", "reference")

    def explodes(name):
        raise AssertionError("nothing may be tried that could break a GPU")

    for info in (device("cuda", (9, 0)), device("cpu")):
        for dtype in (E4M3, INT8):
            chosen = quant.decide_gemm(dtype, info, explodes, explodes)
            assert chosen == ("float32", "SKYREELS_BACKEND=reference", "float32", True)


def test_our_product_is_used_where_it_is_pinned_whatever_the_clock_says(monkeypatch):
    slow = lambda names: {**dict.fromkeys(names, 9.0), quant.DEQUANTIZED: 1.0}  # noqa: E731
    info = device("cuda", (8, 9))
    assert quant.decide_gemm(INT8, info, passes, slow).impl is None
    monkeypatch.setenv("SKYREELS_BACKEND", "triton")
    assert quant.decide_gemm(INT8, info, passes, slow).impl == FUSED
    assert quant.decide_gemm(INT8, info, ours_fails, slow).impl is None, "but it must be right"


@pytest.mark.parametrize("dtype", [E4M3, INT8])
def test_sound_products_pass_their_self_test_on_this_cpu(dtype):
    assert quant.probe_gemm("float32", dtype, CPU).is_accepted
    assert quant.choose_gemm(dtype, CPU).impl is not None


@pytest.mark.parametrize("name", [BY_ROWS, PER_TENSOR])
def test_torchs_float8_products_are_called_as_they_are_meant(name):
    """The calls that a GPU gets, on the CPU version of the same operator."""
    try:
        finding = quant.probe_gemm(name, E4M3, CPU)
    except (RuntimeError, NotImplementedError) as fault:
        pytest.skip(f"this torch has no such product on a CPU: {fault}")
    assert finding.is_accepted


def saturating(values, weight):
    """In the manner of CPUs without VNNI, where sums of two products stop short of the largest."""
    pairs = values.float().unflatten(1, (-1, 2))[:, None] * weight.float().unflatten(1, (-1, 2))
    return pairs.sum(-1).clamp(-(2**14), 2**14 - 1).sum(-1)


def not_finite(values, weight):
    return quant._float32_mm(values, weight) * torch.nan


@pytest.mark.parametrize(
    ("product", "problem"),
    [
        (not_finite, "error nan"),
        (lambda values, weight: quant._float32_mm(values, weight).half(), "error nan"),
        (lambda values, weight: quant._float32_mm(values, weight.roll(1, 0)), "is allowed"),
        (lambda values, weight: quant._float32_mm(values.roll(1, 0), weight), "is allowed"),
        (saturating, "is allowed"),
    ],
)
def test_a_product_that_is_wrong_is_found_out(monkeypatch, product, problem):
    monkeypatch.setitem(quant.UNSCALED_GEMMS, "float32", product)
    assert problem in str(quant.probe_gemm("float32", INT8, CPU))


def test_a_product_that_fails_says_why_and_want_of_memory_is_no_verdict(monkeypatch, fresh):
    def fail(values, weight):
        raise kind("no such kernel\nand a long trace")

    for name in ("float32", "_int_mm"):
        monkeypatch.setitem(quant.UNSCALED_GEMMS, name, fail)
    kind = torch.OutOfMemoryError
    passing = quant.choose_gemm(INT8, CPU)
    assert passing.impl is None and "tried again later" in passing.reason
    kind = RuntimeError
    failing = quant.choose_gemm(INT8, CPU)
    assert failing.impl is None
    assert failing.reason == "failed with RuntimeError: no such kernel"
    monkeypatch.setitem(quant.UNSCALED_GEMMS, "float32", quant._float32_mm)
    assert quant.choose_gemm(INT8, CPU) is failing, "a verdict is remembered"


def test_want_of_memory_for_the_timing_leaves_a_product_that_is_right(monkeypatch, fresh):
    shortages = iter([torch.OutOfMemoryError("CUDA out of memory")])

    def clock(names, storage_dtype, device):
        for shortage in shortages:
            raise shortage
        return as_listed(names[::-1])

    monkeypatch.setattr(quant, "probe_gemm", lambda name, **_: passes(name))
    monkeypatch.setattr(quant, "time_gemms", clock)
    monkeypatch.setattr(dispatch, "describe", lambda _: device("cuda", (8, 9)))
    where = torch.device("cuda:0")
    assert quant.choose_gemm(INT8, where).impl == FUSED
    assert quant.choose_gemm(INT8, where).impl == "_int_mm", "the clock is asked again"


@pytest.fixture
def fresh(monkeypatch):
    """Nothing decided or said yet."""
    for name, empty in (("_decisions", {}), ("_waits", {}), ("_logged", set())):
        monkeypatch.setattr(dispatch, name, empty)


def test_a_layer_whose_products_fail_widens_and_says_so_once(monkeypatch, caplog, fresh):
    for name in ("float32", "_int_mm"):
        monkeypatch.setitem(quant.UNSCALED_GEMMS, name, not_finite)
    layer = make(torch.randn(48, 96), "int8")
    x = torch.randn(1, 7, 96)
    with caplog.at_level(logging.INFO):
        got = [layer(x) for _ in range(3)]
    assert layer.input_format is None
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert "int8" in message
    assert "cpu" in message
    assert "error nan" in message
    assert "dequantized" in message
    wide = dequantize(layer.weight, layer.weight_scale, torch.float32, layer.hadamard_block)
    torch.testing.assert_close(got[-1], x @ wide.T)


def test_every_device_gets_a_decision_of_its_own(monkeypatch, fresh):
    """A layer that moves between runs asks again; one that stays does not."""
    asked = []

    def record(name, storage_dtype, device):
        asked.append((name, device.type))
        return passes(name)

    monkeypatch.setattr(quant, "probe_gemm", record)
    monkeypatch.setattr(quant, "time_gemms", lambda names, **_: as_listed(names))
    known = {None: DeviceInfo("cpu"), 0: device("cuda", (8, 6)), 1: device("cuda", (9, 0))}
    monkeypatch.setattr(dispatch, "describe", lambda device: known[device.index])
    for _ in range(2):
        assert quant.choose_gemm(E4M3, CPU).impl == "float32"
        assert quant.choose_gemm(E4M3, torch.device("cuda:0")).impl is None
        assert quant.choose_gemm(E4M3, torch.device("cuda:1")).impl == BY_ROWS
    assert asked == [("float32", "cpu"), (BY_ROWS, "cuda"), (PER_TENSOR, "cuda")]


def test_a_fallback_on_a_gpu_is_a_warning_and_the_fast_path_is_not(monkeypatch, caplog, fresh):
    monkeypatch.setattr(quant, "probe_gemm", lambda name, **_: by_rows_not_supported(name))
    monkeypatch.setattr(quant, "time_gemms", lambda names, **_: as_listed(names))
    monkeypatch.setattr(dispatch, "describe", lambda _: device("cuda", (12, 0)))
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            quant.choose_gemm(E4M3, torch.device("cuda:0"))
            quant.choose_gemm(INT8, torch.device("cuda:0"))
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert "_scaled_mm per tensor" in caplog.messages[0] and FUSED in caplog.messages[1]


# --- addresses ----------------------------------------------------------------------------------


class Addresses(TorchDispatchMode):
    """Notes where the tensors start that products are handed, in bytes modulo 16."""

    def __init__(self):
        super().__init__()
        self.found: dict[str, set[int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[-1]
        if name in ("_scaled_mm", "int8_linear_", "_int_mm"):
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, torch.Tensor):
                    at = leaf.storage_offset() * leaf.itemsize % quant.BYTE_ALIGNMENT
                    self.found.setdefault(name, set()).add(at)
        return peak.run(func, args, kwargs or {})


@pytest.mark.parametrize("precision", STORAGE_DTYPES)
def test_products_of_a_block_are_handed_whole_16_bytes(precision):
    """Shapes of the full model; allocations start at far greater multiples than 16. Four lengths,
    one of each remainder, as shape-only blocks take their time; the next test knows them all."""
    config = TransformerConfig(num_layers=1, num_single_layers=1)
    block = quant.MAX_HADAMARD_BLOCK if precision == "int8" else 0
    with torch.device("meta"):
        model = SkyReelsTransformer(config).bfloat16().requires_grad_(False)
        for name, layer in list(model.named_modules()):
            is_block = name.startswith(("double_blocks", "single_blocks")) and "mod" not in name
            if isinstance(layer, torch.nn.Linear) and is_block:
                stored = torch.empty(layer.weight.shape, dtype=STORAGE_DTYPES[precision])
                scale = torch.empty(layer.out_features, 1)
                quantized = QuantLinear(
                    stored, scale, layer.bias, hadamard_block=block, weight_only=False
                )
                model.set_submodule(name, quantized)
        image, rope = torch.empty(1, 51_000, 3072).bfloat16(), torch.empty(51_000, 64).cfloat()
        rows = [torch.empty(1, 1, 6 * 3072).bfloat16() for _ in range(2)]
    attend = lambda query, key, value: torch.empty_like(query)  # noqa: E731
    with Addresses() as seen, torch.inference_mode():
        for text_tokens in (1, 62, 155, 256):
            text = torch.empty(1, text_tokens, 3072, dtype=torch.bfloat16, device="meta")
            joined = torch.empty(1, 51_000 + text_tokens, 3072, dtype=torch.bfloat16, device="meta")
            for chunking in CHUNKINGS.values():
                model.double_blocks[0](image, text, rows, rope, attend, chunking)
                model.single_blocks[0](joined, [rows[0][..., :9216]], rope, attend, chunking)
    assert seen.found == {"_scaled_mm" if precision == "fp8" else "int8_linear_": {0}}


@pytest.mark.parametrize("chunking", CHUNKINGS)
def test_tokens_are_cut_where_a_scale_starts_whole_16_bytes_for_every_length_of_text(chunking):
    """A scale is four bytes; the cuts are the same for fp8 and int8."""
    for text_tokens in range(257):
        length = 51_000 + text_tokens
        for tokens in (51_000, length):  # of a double and of a single block
            parts = layers._chunks(tokens, CHUNKINGS[chunking].mlp_chunks, layers.TOKEN_MULTIPLE)
            addresses = [4 * part.start % quant.BYTE_ALIGNMENT for part in parts]
            assert set(addresses) == {0}, text_tokens
            covered = [index for part in parts for index in (part.start, part.stop)]
            assert covered[0] == 0 and covered[-1] == tokens
            assert covered[1:-1:2] == covered[2::2], "no token is left out or taken twice"


@pytest.mark.parametrize("odd", [1, 5, 253])
def test_an_odd_view_is_copied_before_a_vendors_kernel_sees_it(monkeypatch, odd):
    """Whatever cuts tokens in future, and items of a batch of odd length."""
    addresses = []

    def record(values, weight, *, scale_a, scale_b, bias, **_):
        addresses.extend(x.data_ptr() % 16 for x in (values, weight, scale_a, scale_b, bias))
        return values.float() @ weight.float()

    monkeypatch.setattr(torch, "_scaled_mm", record)
    values = torch.zeros(300, 32).to(E4M3).flatten()[3:][: 32 * 256].view(256, 32)
    row_scale, scale, bias = torch.ones(600, 1)[odd:][:256], torch.ones(97, 1)[1:], torch.ones(97)
    assert row_scale.data_ptr() % 16 != 0
    weight = torch.zeros(97, 32).to(E4M3)[1:]
    quant._scaled_mm(values, row_scale, weight, scale, bias[1:])
    assert addresses == [0] * 5


# --- the int8 product that scales inside --------------------------------------------------------


def test_a_kernel_that_does_not_compile_is_found_out_by_the_self_test(monkeypatch):
    def does_not_compile(*_):
        raise OutOfResourcesError("out of resource: shared memory\nlong log")

    class OutOfResourcesError(Exception):  # as Triton's, which is no RuntimeError
        pass

    name = quant.kernels.__name__ + ".triton.int8"
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(int8_linear_=does_not_compile))
    with pytest.raises(OutOfResourcesError):
        quant.probe_gemm(FUSED, INT8, CPU)
    chosen = quant.decide_gemm(
        INT8,
        device("cuda", (8, 9)),
        lambda name: quant.probe_gemm(name, INT8, CPU) if name == FUSED else passes(name),
        as_listed,
    )
    assert chosen.impl == "_int_mm" and chosen.is_final
    assert "OutOfResourcesError: out of resource: shared memory" in chosen.reason


def test_a_part_is_one_launch_into_the_result(monkeypatch):
    """Whatever its length: no int32 sums that would have to be made in pieces."""
    calls = []

    def record(values, row_scale, weight, scale, bias, out, add):
        calls.append((values.shape, weight.stride(0), out.data_ptr(), add))
        # exact sums: _int_mm of torch 2.5 saturates on CPUs without VNNI
        reference.rescale_(quant._float32_mm(values, weight), row_scale, scale, bias, out, add)

    name = quant.kernels.__name__ + ".triton.int8"
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(int8_linear_=record))
    monkeypatch.setattr(quant, "CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(QuantLinear, "_gemm", lambda self, weight: FUSED)
    layer, x = make(torch.randn(48, 96), "int8"), torch.randn(1, 600, 64)
    exact = dequantize(layer.weight, layer.weight_scale, torch.float32, layer.hadamard_block)[
        :, 32:
    ]
    out = torch.zeros(1, 600, 48)
    layer.part(x, slice(None), slice(32, None), None, out, add=True)
    assert calls == [((600, 64), 96, out.data_ptr(), True)]
    assert error(out, (x @ exact.T).double()) <= 0.01


def test_the_int8_kernel_computes_its_definition_in_the_interpreter():
    found = run_kernel("int8", "interpret", TRITON_INTERPRET="1")
    assert found["problem"] == ""
    assert found["spoilt"] == [False, True, False]
    assert len(found["cases"]) == 6
    for case in found["cases"]:
        assert case["error"] <= 1.01 * case["least"] + 1e-6, case
        assert case["kept"], case


@pytest.mark.slow
def test_the_int8_kernel_compiles_for_every_gpu_without_spilling():
    rows = run_kernel("int8", "compile", "80", "86", "89", "90", "120")
    assert len(rows) == 4 * 5
    assert all(row["stack"] == row["local"] == 0 for row in rows)
    assert all((row["wgmma"] > 0) == (row["capability"] == 90) for row in rows)
    assert all(row["shared"] <= (227 if row["capability"] == 90 else 99) * 1024 for row in rows)


# --- scales after the product -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        (device("cuda", (8, 9), problem="Triton is not installed: pip install"), "not installed"),
        (device("cuda"), "not for AMD"),
        (device("cpu"), "not for cpu"),
    ],
)
def test_without_triton_products_are_scaled_in_plain_torch(monkeypatch, fresh, where, reason):
    monkeypatch.setattr(dispatch, "describe", lambda _: where)
    chosen = operators.choose("rescale_", CPU)
    assert chosen.impl is None
    assert reason in chosen.reason


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.bfloat16])
def test_plain_torch_scales_where_the_result_lies_in_its_dtype(dtype, add):
    """A copy in float32 was 28 bytes of traffic a number: more than 8 bits save on a 4090."""
    codes = torch.randint(-(2**15), 2**15, (40, 64)).to(dtype)
    row_scale, scale, bias = torch.rand(40, 1) / 999, torch.rand(64, 1), torch.randn(64).bfloat16()
    out = torch.randn(40, 100).bfloat16()[:, 20:84]
    exact = codes.double() * row_scale * scale.T + (out.double() if add else bias)
    with Traffic() as traffic:
        reference.rescale_(codes, row_scale, scale, None if add else bias, out, add)
    assert error(out, exact) <= 0.004
    assert traffic.bytes / out.numel() <= (19 if add else 17)


@pytest.mark.parametrize("add", [False, True])
def test_sums_beyond_float16_before_their_second_scale_are_not_lost(add):
    codes, out = torch.full((3, 8), 2**27, dtype=torch.int32), torch.ones(3, 8).half()
    reference.rescale_(codes, torch.full((3, 1), 0.01), torch.full((8, 1), 1e-6), None, out, add)
    torch.testing.assert_close(out, torch.full_like(out, 1.3422 + add), rtol=1e-3, atol=0)


def stand_in(monkeypatch, function):
    """A module of kernels that needs neither Triton nor a GPU."""
    name = quant.kernels.__name__ + ".triton.int8"
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(rescale_=function))
    monkeypatch.setattr(dispatch, "describe", lambda _: device("cuda", (8, 9)))


def test_a_scaling_kernel_is_used_if_it_agrees(monkeypatch, fresh):
    stand_in(monkeypatch, reference.rescale_)
    assert operators.choose("rescale_", CPU).impl is reference.rescale_


def forgets_to_add(codes, row_scale, scale, bias, out, add):
    reference.rescale_(codes, row_scale, scale, bias, out, False)


def gives_nan(codes, row_scale, scale, bias, out, add):
    out.fill_(torch.nan)


def does_not_compile(*_):
    raise RuntimeError("ptxas failed\nlong log")


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (forgets_to_add, "(input 1), 0.005"),
        (gives_nan, "error nan"),
        (does_not_compile, "ptxas failed"),
    ],
)
def test_a_scaling_kernel_that_is_wrong_or_fails_is_not(monkeypatch, fresh, kernel, reason):
    stand_in(monkeypatch, kernel)
    chosen = operators.choose("rescale_", CPU)
    assert chosen.impl is None and chosen.is_final
    assert reason in chosen.reason
    assert "long log" not in chosen.reason


def test_want_of_memory_is_no_verdict_on_a_scaling_kernel(monkeypatch, fresh):
    shortages = iter([torch.OutOfMemoryError("CUDA out of memory")])

    def short_of_memory(*args):
        for shortage in shortages:
            raise shortage
        reference.rescale_(*args)

    stand_in(monkeypatch, short_of_memory)
    assert operators.choose("rescale_", CPU).impl is None
    assert operators.choose("rescale_", CPU).impl is short_of_memory


def run_kernel(name: str, *arguments: str, **environment: str) -> dict | list:
    """tests/support/triton_<name>.py in a process of its own."""
    pytest.importorskip("triton")
    command = ["-m", f"support.triton_{name}", *arguments]
    run = forks("torch").run(command, {**os.environ, **environment})
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_the_scaling_kernel_computes_its_definition_in_the_interpreter():
    found = run_kernel("rescale", "interpret", TRITON_INTERPRET="1")
    assert found["problem"] == ""
    assert found["spoilt"] == [False, True, False]
    assert len(found["cases"]) == 5
    for case in found["cases"]:
        assert case["error"] <= 1e-6, case
        assert case["kept"], case


def test_the_scaling_kernel_compiles_for_every_gpu_without_spilling():
    rows = run_kernel("rescale", "compile", "80", "86", "89", "90", "120")
    assert len(rows) == 2 * 5
    assert all(row["stack"] == row["local"] == 0 for row in rows)


# --- counting -----------------------------------------------------------------------------------


def test_a_self_test_is_not_counted_as_the_callers_work(fresh):
    from torch.utils.flop_counter import FlopCounterMode

    layer = make(torch.randn(48, 96), "fp8")
    with FlopCounterMode(display=False) as counter:
        assert layer.input_format is not None
    assert counter.get_total_flops() == 0


def test_shapes_alone_take_the_way_of_a_gpu():
    with torch.device("meta"):
        x = torch.empty(1, 51256, 3072, dtype=torch.bfloat16)
        for dtype in (E4M3, INT8):
            weight, scale = torch.empty(9216, 3072, dtype=dtype), torch.empty(9216, 1)
            layer = QuantLinear(weight, scale, torch.empty(9216).bfloat16(), weight_only=False)
            assert layer(x).shape == (1, 51256, 9216)
            out = torch.empty(1, 51256, 9216, dtype=torch.bfloat16)
            assert layer.part(x, slice(None), slice(None), layer.bias, out) is out


def test_the_report_names_both_formats_and_the_package_not_used():
    found = dispatch.report(quant.decisions(CPU))
    assert "multiplied by float32" in found["fp8 linears"]
    assert "8-bit inputs" in found["int8 linears"]
    assert "not used" in found["comfy_kitchen int8_linear"]


def test_a_layer_says_how_it_was_made():
    layer = make(torch.randn(48, 96), "int8", torch.randn(48))
    assert layer.state_dict().keys() == {"weight", "weight_scale", "bias"}
    assert (layer.in_features, layer.out_features, layer.hadamard_block) == (96, 48, 32)
    assert isinstance(
        kernels.quantize_rows(torch.randn(1, 2, 96), layer.input_format), QuantizedActivation
    )
