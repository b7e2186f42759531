"""GELU as a part of the matrix product: where it is taken, and what is refused."""

import logging
import math

import pytest
import torch
import torch.nn.functional as F
from comfyui_skyreels.skyreels import kernels
from comfyui_skyreels.skyreels.kernels import QuantFormat, QuantizedActivation, dispatch
from comfyui_skyreels.skyreels.kernels.dispatch import DeviceInfo
from comfyui_skyreels.skyreels.transformer import linear as linear_module
from comfyui_skyreels.skyreels.transformer import quant
from comfyui_skyreels.skyreels.transformer.linear import (
    gelu_epilogue,
    linear,
    linear_gelu,
)
from comfyui_skyreels.skyreels.transformer.quant import QuantLinear
from support.traffic import Traffic
from torch import nn

CPU, BF16 = torch.device("cpu"), torch.bfloat16
H100 = DeviceInfo("cuda", "H100", (9, 0), triton="3.6.0")
LABEL = "GELU in the linear layer's epilogue"
#: torch's own on this machine: erf-GELU
ERF = torch._addmm_activation


def ending_in(activation):
    """A stand-in for torch's operator on a GPU: float32 sums, the activation, one rounding."""

    def product(bias, x, weight, *, use_gelu):
        assert use_gelu
        return activation(F.linear(x.float(), weight.t().float(), bias.float())).to(x.dtype)

    return product


def tanh_gelu(x):
    return F.gelu(x, approximate="tanh")


def tanh_gelu_of_11_bits(x):
    """What a GPU's own instruction makes of it: a tanh that is a multiple of 2^-11."""
    tanh = torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    return 0.5 * x * (1 + (tanh * 2**11).round() / 2**11)


@pytest.fixture
def on_gpu(monkeypatch, caplog):
    """on_gpu(operator): tensors stay on the CPU, which is described as a GPU; calls are noted."""
    caplog.set_level(logging.WARNING, logger=linear_module.logger.name)
    for name, empty in (("_decisions", {}), ("_waits", {}), ("_logged", set())):
        monkeypatch.setattr(dispatch, name, empty)
    monkeypatch.setattr(dispatch, "describe", lambda device: H100)
    # a CPU takes minutes for what is timed on a GPU
    monkeypatch.setattr(
        quant, "time_gemms", lambda names, **_: dict.fromkeys([*names, quant.DEQUANTIZED], 1.0)
    )

    def set_up(operator):
        calls = []

        def noted(bias, x, weight, **options):
            calls.append(tuple(x.shape))
            return operator(bias, x, weight, **options)

        monkeypatch.setattr(torch, "_addmm_activation", noted)
        return calls

    return set_up


def layer_and_input(dtype=BF16, batch=1):
    layer = nn.Linear(24, 40).to(dtype).requires_grad_(False)
    return layer, torch.randn(batch, 5, 24).to(dtype)


def gelu_report(device):
    return dispatch.report(linear_module.decisions(device))


def in_two_passes(layer, x, rows=linear_module.ALL, to=None):
    return kernels.gelu(linear(layer, x, rows), to)


def test_a_product_that_ends_in_tanh_gelu_is_used_after_one_self_test(on_gpu, caplog):
    calls = on_gpu(ending_in(tanh_gelu))
    layer, x = layer_and_input(batch=2)
    rows = slice(16, None)
    results = [linear_gelu(layer, part, rows) for part in (x, x[:, 1:4])]
    assert calls == [(67, 256), (10, 24), (6, 24)]  # the self-test, and two calls
    right = tanh_gelu(F.linear(x.float(), layer.weight[rows].float(), layer.bias[rows].float()))
    for found, expected in zip(results, (right, right[:, 1:4]), strict=True):
        assert found.dtype == BF16 and found.shape == expected.shape
        assert torch.equal(found, expected.to(BF16))
    assert "_addmm_activation: self-test passed" in gelu_report(CPU)[LABEL]
    assert caplog.messages == []


@pytest.mark.parametrize("dtype", linear_module.HALF_DTYPES)
def test_the_tanh_of_a_gpu_is_not_taken_for_erf(on_gpu, dtype):
    on_gpu(ending_in(tanh_gelu_of_11_bits))
    assert gelu_epilogue(CPU, dtype).impl


@pytest.mark.parametrize("dtype", linear_module.HALF_DTYPES)
@pytest.mark.parametrize(
    ("operator", "words"),
    [
        (ERF, "1 is erf-GELU), 0.5 is allowed"),
        (ending_in(F.gelu), "1 is erf-GELU), 0.5 is allowed"),
        (ending_in(F.relu), "error 0.1"),
        (ending_in(lambda x: x), "(tanh-GELU), 0.005 is allowed"),
        (ending_in(lambda x: x * math.nan), "error nan (tanh-GELU)"),
    ],
    ids=["torch's on a CPU", "erf", "relu", "none", "nan"],
)
def test_a_product_that_ends_in_something_else_is_refused_in_words_once(
    on_gpu, caplog, operator, words, dtype
):
    calls = on_gpu(operator)
    layer, x = layer_and_input(dtype)
    for _ in range(2):
        assert torch.equal(linear_gelu(layer, x), in_two_passes(layer, x))
    assert len(calls) == 1
    assert words in gelu_epilogue(CPU, dtype).reason
    assert len(caplog.messages) == 1 and words in caplog.messages[0]


def test_the_two_kinds_of_gelu_differ_by_less_than_a_norm_over_ordinary_numbers_shows():
    """Why the self-test looks where they differ by per cents."""
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    assert (F.gelu(x) - tanh_gelu(x)).norm() / tanh_gelu(x).norm() < linear_module.EPILOGUE_BOUND
    x = torch.linspace(-3.5, -2.5, 100)
    assert ((F.gelu(x) - tanh_gelu(x)) / tanh_gelu(x)).abs().min() > 0.02


def test_an_operator_that_raises_is_refused_with_its_words_once(on_gpu, caplog):
    def broken(*args, **options):
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED\nand a long trace")

    calls = on_gpu(broken)
    layer, x = layer_and_input()
    for _ in range(2):
        assert torch.equal(linear_gelu(layer, x), in_two_passes(layer, x))
    assert len(calls) == len(caplog.messages) == 1
    assert "RuntimeError: CUBLAS_STATUS_NOT_SUPPORTED" in caplog.messages[0]
    assert "cpu (bfloat16)" in caplog.messages[0]


def test_a_torch_without_the_private_operator_is_refused_with_words(on_gpu, monkeypatch, caplog):
    on_gpu(ERF)
    monkeypatch.delattr(torch, "_addmm_activation")
    layer, x = layer_and_input()
    assert torch.equal(linear_gelu(layer, x), in_two_passes(layer, x))
    assert len(caplog.messages) == 1 and "has no attribute" in caplog.messages[0]


def test_want_of_memory_is_no_verdict(on_gpu, caplog):
    shortages = iter([True])

    def short_of_memory(bias, x, weight, **options):
        if len(x) == 67 and next(shortages, False):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return ending_in(tanh_gelu)(bias, x, weight, **options)

    calls = on_gpu(short_of_memory)
    layer, x = layer_and_input()
    assert torch.equal(linear_gelu(layer, x), in_two_passes(layer, x))
    assert calls == [(67, 256)]
    assert len(caplog.messages) == 1 and "tried again later" in caplog.messages[0]
    linear_gelu(layer, x)
    assert calls == [*2 * [(67, 256)], (5, 24)]
    assert "_addmm_activation: self-test passed" in gelu_report(CPU)[LABEL]


def test_one_switch_turns_it_off_and_on_again(on_gpu, monkeypatch):
    calls = on_gpu(ending_in(tanh_gelu))
    layer, x = layer_and_input()
    monkeypatch.setenv("SKYREELS_BACKEND", "reference")
    assert torch.equal(linear_gelu(layer, x), in_two_passes(layer, x))
    assert calls == []
    assert "SKYREELS_BACKEND" in gelu_report(CPU)[LABEL]
    monkeypatch.delenv("SKYREELS_BACKEND")
    linear_gelu(layer, x)
    assert calls[1:] == [(5, 24)]


def test_layers_that_it_is_not_for_take_two_passes(on_gpu):
    calls = on_gpu(ending_in(tanh_gelu))
    layer, x = layer_and_input()
    linear_gelu(layer, x)
    assert calls.pop() == (5, 24)
    calls.clear()

    def same(layer, x, to=None):
        found, expected = linear_gelu(layer, x, act_format=to), in_two_passes(layer, x, to=to)
        if to is None:
            found, expected = [found], [expected]
        assert all(map(torch.equal, found, expected))
        return found

    wide, y = layer_and_input(torch.float32)
    same(wide, y)
    layer.bias = None
    same(layer, x)
    layer, x = layer_and_input()
    assert isinstance(same(layer, x, QuantFormat(torch.int8)), QuantizedActivation)
    codes, scale = kernels.quantize_rows(layer.weight[None], QuantFormat(torch.int8))
    eight_bit = QuantLinear(codes[0], scale[0], layer.bias, weight_only=False)
    same(eight_bit, x)
    same(eight_bit, kernels.quantize_rows(x, QuantFormat(torch.int8)))
    assert calls == []


def test_gradients_pass_through_two_passes(on_gpu):
    calls = on_gpu(ending_in(tanh_gelu))
    layer, x = layer_and_input()
    x.requires_grad_()
    linear_gelu(layer, x).sum().backward()
    assert x.grad is not None and calls == []
    with torch.no_grad():
        linear_gelu(layer, x)
    assert calls[1:] == [(5, 24)]


def test_a_cpu_takes_two_passes_and_says_so_without_a_warning(caplog):
    layer, x = layer_and_input()
    with Traffic() as traffic, torch.inference_mode():
        assert torch.equal(linear_gelu(layer, x), in_two_passes(layer, x))
    assert "gelu_" in traffic.by_name
    assert "cpu devices have no tanh-GELU" in gelu_report(CPU)[LABEL]
    assert caplog.messages == []


def test_shapes_alone_show_what_a_gpu_would_do():
    layer, x = layer_and_input()
    with Traffic() as traffic, torch.inference_mode():
        active = linear_gelu(layer.to("meta"), x.to("meta"), slice(0, 16))
    assert active.shape == (1, 5, 16) and active.dtype == BF16
    assert traffic.products == 1 and "gelu_" not in traffic.by_name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_this_gpu_ends_products_in_tanh_gelu():
    device = torch.device("cuda", 0)
    assert "_addmm_activation: self-test passed" in gelu_report(device)[LABEL]
    layer, x = (part.to(device) for part in layer_and_input())
    found, expected = linear_gelu(layer, x), in_two_passes(layer, x)
    assert (found.double() - expected.double()).norm() / expected.double().norm() <= 5e-3
