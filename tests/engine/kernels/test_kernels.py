"""The fused operators: what they compute, how torch sees them, which implementation runs where."""

import importlib.util
import itertools
import json
import logging
import math
import os
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from comfyui_skyreels.skyreels import kernels
from comfyui_skyreels.skyreels.kernels import (
    QuantFormat,
    QuantizedActivation,
    operators,
    reference,
)
from comfyui_skyreels.skyreels.kernels import dispatch as fast_paths
from comfyui_skyreels.skyreels.kernels.dispatch import DeviceInfo
from support.forked import forks
from support.kernel_cases import EAGER, FP8, INT8, SMALL, Case, error, inputs, results, truth
from support.project import ROOT
from torch.utils._python_dispatch import TorchDispatchMode

DOUBLE = torch.float64
OPERATORS = getattr(torch.ops, kernels.NAMESPACE)
CAPABILITIES = (80, 86, 89, 90, 120)
#: of each operator with every 8-bit format, the smallest case
EACH = list(
    {(case.operator, case.to): case for case in SMALL if case.hadamard_block in (0, 32)}.values()
)
#: below this, a relative error is float32's own and no matter of method
FLOAT32_NOISE = 5e-7


def draw(*shape):
    return torch.randn(shape, dtype=DOUBLE)


# --- what the references compute ------------------------------------------------------------------


def test_layer_norm_modulate_is_the_textbook_formula():
    x, shift, scale = 3 * draw(2, 5, 24) + 1, draw(2, 1, 24), draw(2, 1, 24)
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    expected = normed * (1 + scale) + shift
    assert error([kernels.layer_norm_modulate(x, shift, scale)], [expected]) <= 1e-14


def test_gated_residual_and_the_norm_of_its_sum():
    x, y, gate, shift, scale = draw(2, 5, 24), draw(2, 5, 24), *draw(3, 2, 1, 24)
    total, normed = kernels.residual_layer_norm_modulate(x, y, gate, shift, scale)
    assert error([total], [x + gate * y]) <= 1e-15
    assert torch.equal(total, kernels.gated_residual(x, y, gate))
    assert (
        error([kernels.gated_residual(x, y, gate, shift * x)], [x + gate * (y + shift * x)])
        <= 1e-15
    )
    assert torch.equal(normed, kernels.layer_norm_modulate(total, shift, scale))


def test_the_norm_is_that_of_the_rounded_sum():
    """What the next block reads is what was normalised, in every dtype."""
    x, y, gate, shift, scale = (
        part.bfloat16() for part in (draw(1, 4, 64), draw(1, 4, 64), *draw(3, 1, 1, 64))
    )
    total, normed = kernels.residual_layer_norm_modulate(x, y, gate, shift, scale)
    assert total.dtype == normed.dtype == torch.bfloat16
    assert torch.equal(normed, kernels.layer_norm_modulate(total, shift, scale))


def test_queries_and_keys_are_normed_and_those_of_image_tokens_turned():
    batch, tokens, heads, dim, count = 2, 7, 3, 16, 4
    qkv, angles = draw(batch, tokens, 3, heads, dim), draw(count, dim // 2)
    weights = 1 + 0.3 * draw(4, dim)
    expected = qkv.clone()
    for clip, token, part, head in itertools.product(
        range(batch), range(tokens), range(2), range(heads)
    ):
        vector = qkv[clip, token, part, head]
        weight = weights[part if token < count else part + 2]
        normed = vector / math.sqrt(vector.square().mean() + 1e-6) * weight
        if token < count:
            turned = torch.view_as_complex(normed.unflatten(-1, (-1, 2))) * torch.polar(
                torch.ones(dim // 2, dtype=DOUBLE), angles[token]
            )
            normed = torch.view_as_real(turned).flatten()
        expected[clip, token, part, head] = normed
    rope = torch.polar(torch.ones_like(angles), angles)
    assert error([kernels.qk_norm_rope(qkv, *weights, rope)], [expected]) <= 1e-14


def test_gelu_is_the_tanh_formula():
    x = 3 * draw(1, 3, 50)
    expected = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    assert error([kernels.gelu(x)], [expected]) <= 1e-15


@pytest.mark.parametrize("to", [FP8, INT8])
def test_rows_are_rounded_to_the_nearest_code_of_a_scale_that_uses_the_whole_range(to):
    x = torch.randn(2, 6, 40) * torch.logspace(-3, 3, 6)[:, None]
    x[0, 2] = 0
    values, scale = kernels.quantize_rows(x, QuantFormat(to))
    assert (values.dtype, values.shape, scale.shape) == (to, x.shape, (2, 6, 1))
    limit = reference.FORMAT_MAX[to]
    assert scale[0, 2] == 1 and not values[0, 2].float().any()
    used = values.float().abs().amax(-1)
    assert (used[x.abs().amax(-1) > 0] == limit).all()
    # half a step: of int8 everywhere, of e4m3 2^-4 of a normal number and 2^-10 below
    step = torch.full_like(x, 0.5) if to == INT8 else (x / scale).abs().clamp_min(2**-6) * 2**-4
    assert ((values.float() - x / scale).abs() <= step * 1.001).all()


@pytest.mark.parametrize("size", [2, 16, 256])
def test_the_rotation_is_orthonormal_its_own_inverse_and_stays_within_its_run(size):
    matrix = reference.hadamard(size).double()
    # entries are 1 / sqrt(size) in float32
    assert (matrix @ matrix - torch.eye(size)).abs().max() <= 1e-6
    x = torch.zeros(3, 2 * size, dtype=DOUBLE)
    x[0, 0], x[1, size] = 1, 1
    rotated = reference.hadamard_rotate(x, size)
    assert not rotated[0, size:].any() and not rotated[1, :size].any()
    assert (rotated[0, :size].abs() - size**-0.5).abs().max() <= 1e-7


@pytest.mark.parametrize("to", [FP8, INT8])
def test_operators_that_round_equal_the_plain_ones_followed_by_rounding(to):
    form = QuantFormat(to, 8)
    (x, y), (gate, shift, scale) = torch.randn(2, 1, 5, 16), torch.randn(3, 1, 1, 16)

    def same(rows, plain):
        assert isinstance(rows, QuantizedActivation)
        right = kernels.quantize_rows(plain, form)
        assert torch.equal(rows.qdata.view(torch.uint8), right.qdata.view(torch.uint8))
        assert torch.equal(rows.scale, right.scale)

    same(kernels.layer_norm_modulate(x, shift, scale, form),
         kernels.layer_norm_modulate(x, shift, scale))  # fmt: skip
    same(kernels.gelu(x, form), kernels.gelu(x))
    total, rows = kernels.residual_layer_norm_modulate(x, y, gate, shift, scale, form)
    right, plain = kernels.residual_layer_norm_modulate(x, y, gate, shift, scale)
    assert torch.equal(total, right)
    same(rows, plain)


def test_group_norm_from_the_moments_of_channels_is_torchs_own():
    x, groups = 2 * draw(2, 8, 3, 4, 5) + 1, 4
    weight, bias = draw(2, 8)
    mean, variance = (each.unflatten(1, (groups, -1)) for each in kernels.channel_moments(x))
    centre = mean.mean(-1, keepdim=True)
    variance = (variance + (mean - centre).square()).mean(-1)
    factor = (variance + 1e-6).rsqrt().repeat_interleave(2, 1) * weight
    addend = bias - centre[..., 0].repeat_interleave(2, 1) * factor
    wide = (each[..., None, None, None] for each in (factor, addend))
    expected = F.silu(F.group_norm(x, groups, weight, bias, 1e-6))
    out = torch.empty(2, 8, 5, 6, 7, dtype=DOUBLE)
    kernels.norm_silu_pad_(x, *wide, out, 2)
    assert error([out], [F.pad(expected, (1, 1, 1, 1, 2, 0), mode="replicate")]) <= 1e-13


def test_moments_are_good_far_from_zero():
    """A single pass over sums and squares in float32 would keep no digit of this variance."""
    x = (draw(1, 4, 3, 40, 50) + 3000).float()
    variance, mean = torch.var_mean(x.double(), dim=(2, 3, 4), correction=0)
    ours = kernels.channel_moments(x)
    assert error(list(ours), [mean, variance]) <= 1e-7


@pytest.mark.parametrize("offset", [0, 3e3, 1e6])
def test_moments_of_wide_numbers_are_exact_from_whatever_makes_them(offset):
    """Bar: 1e-8 of the variance, also where it is a 1e-12th of the squared mean."""

    def right(clip):
        centred = clip - offset
        variance, mean = torch.var_mean(centred, dim=(2, 3, 4), correction=0)
        return [mean + offset, variance]

    def clip(*shape):
        return draw(*shape).contiguous(memory_format=torch.channels_last_3d)

    x = clip(2, 4, 3, 20, 25) + offset
    assert error(list(kernels.channel_moments(x)), right(x)) <= 1e-8
    found = kernels.residual_add_moments_(x, clip(2, 4, 3, 20, 25), draw(4))
    assert error(list(found), right(x)) <= 1e-8
    copies, out = clip(1, 32, 2, 11, 13) + offset, clip(1, 4, 3, 20, 24)
    found = kernels.interleave_moments_(copies, draw(4), out)
    assert error(list(found), right(out)) <= 1e-8


# --- 8-bit products ------------------------------------------------------------------------------


def token_matrix(outliers: bool, rows: int = 192, width: int = 3072) -> torch.Tensor:
    x = torch.randn(rows, width)
    if outliers:  # a dozen channels 30 times larger, and tokens of very different size
        x[:, torch.randperm(width)[:12]] *= 30
        x *= torch.randn(rows, 1).mul(0.5).exp()
    return x


@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize(
    ("form", "bound"), [(QuantFormat(FP8), 0.040), (QuantFormat(INT8, 256), 0.015)]
)
def test_the_error_of_an_8_bit_product_stays_within_its_gate(form, bound, outliers):
    x = token_matrix(outliers).bfloat16()
    weight = (torch.randn(256, 3072) * 0.02).bfloat16()
    exact = x.double() @ weight.double().T
    (values, scale), (codes, weight_scale) = (
        kernels.quantize_rows(each[None], form) for each in (x, weight)
    )
    product = (values[0].double() @ codes[0].double().T) * scale[0] * weight_scale[0].T
    difference = ((product - exact).norm() / exact.norm()).item()
    assert 0.2 * bound < difference <= bound  # far below would mean that nothing was rounded


def test_without_the_rotation_outliers_break_the_int8_gate():
    x, weight = token_matrix(True), torch.randn(256, 3072) * 0.02
    (values, scale), (codes, weight_scale) = (
        kernels.quantize_rows(each[None], QuantFormat(INT8)) for each in (x, weight)
    )
    product = (values[0].float() @ codes[0].float().T) * scale[0] * weight_scale[0].T
    exact = x @ weight.T
    assert (product - exact).norm() / exact.norm() > 3 * 0.015


# --- how torch sees them --------------------------------------------------------------------------


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("case", EACH, ids=str)
def test_a_counter_sees_each_operator_as_one_call_of_its_name(case, device):
    args = [a.to(device) if isinstance(a, torch.Tensor) else a for a in inputs(case)]
    with Seen() as seen:
        operators.CALLS[case.operator](*args)
    assert seen.names == [f"{kernels.NAMESPACE}::{case.operator}"]


@pytest.mark.parametrize("case", EACH, ids=str)
def test_operators_keep_their_schema_and_promise_the_shapes_they_give(case):
    torch.library.opcheck(
        getattr(OPERATORS, case.operator).default,
        inputs(case),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("case", [case for case in EACH if case.to is None], ids=str)
def test_results_have_the_dtype_of_the_activations(case):
    returned = operators.CALLS[case.operator](*inputs(case))
    if "moments" in case.operator:
        assert all(each.dtype == torch.float64 for each in returned)
    elif operators.OPERATORS[case.operator].writes is None:
        for each in [returned] if isinstance(returned, torch.Tensor) else returned:
            assert each.dtype == case.dtype


def test_gradients_pass_through_the_reference():
    x, y = draw(1, 3, 8).requires_grad_(), draw(1, 3, 8)
    gate, shift, scale = draw(3, 1, 1, 8)
    assert torch.autograd.gradcheck(lambda x: kernels.layer_norm_modulate(x, shift, scale), x)
    assert torch.autograd.gradcheck(
        lambda x: kernels.residual_layer_norm_modulate(x, y, gate, shift, scale), x
    )
    qkv = draw(1, 3, 3, 2, 4).requires_grad_()
    weights, rope = 1 + 0.1 * draw(4, 4), torch.polar(torch.ones(2, 2), torch.randn(2, 2))
    rope = rope.to(torch.complex128)
    assert torch.autograd.gradcheck(lambda qkv: kernels.qk_norm_rope(qkv, *weights, rope), qkv)


def test_queries_and_keys_are_overwritten_unless_they_need_gradients():
    qkv, weights = torch.randn(1, 5, 3, 2, 8), 1 + 0.1 * torch.randn(4, 8)
    rope = torch.polar(torch.ones(3, 4), torch.randn(3, 4))
    before, address = qkv.clone(), qkv.data_ptr()
    result = kernels.qk_norm_rope(qkv, *weights, rope)
    assert result is qkv and qkv.data_ptr() == address
    assert torch.equal(qkv, reference.qk_norm_rope(before, *weights, rope))
    assert torch.equal(qkv[:, :, 2], before[:, :, 2]) and not torch.equal(qkv, before)
    kept = before.clone().requires_grad_()
    assert kernels.qk_norm_rope(kept, *weights, rope) is not kept
    assert torch.equal(kept, before)


def _plain(name, function):
    row = operators.OPERATORS[name]
    return operators.in_pieces(function) if row.is_tokenwise else function


@pytest.mark.parametrize("case", EACH, ids=str)
def test_long_clips_go_through_plain_torch_in_pieces_with_the_same_result(case, monkeypatch):
    args = inputs(case)
    whole = results(getattr(reference, case.operator), case, args)
    monkeypatch.setattr(operators, "PIECE_TOKENS", 2)
    tokens = []

    def counted(*args):
        tokens.append(args[0].shape[1])
        return getattr(reference, case.operator)(*args)

    pieces = results(_plain(case.operator, counted), case, args)
    assert all(torch.equal(a, b) for a, b in zip(whole, pieces, strict=True))
    if operators.OPERATORS[case.operator].is_tokenwise:
        assert max(tokens) <= 2 and sum(tokens) == case.shape[1]


# --- the Triton kernels, without a GPU ------------------------------------------------------------


def in_a_process_of_its_own(module: str, *arguments: str, **environment: str) -> dict | list:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    command = ["-m", f"support.{module}", *arguments]
    run = forks("torch").run(command, {**clean, **environment})
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def interpreted():
    return in_a_process_of_its_own("triton_interpret", TRITON_INTERPRET="1")


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_a_kernel_loses_no_more_than_eager_code_in_the_interpreter(interpreted, case):
    found = interpreted["cases"][str(case)]
    assert found["kernel"] <= 1.2 * found["eager"] + FLOAT32_NOISE


def test_kernels_round_hard_rows_exactly_as_the_reference_does(interpreted):
    codes = interpreted["codes"]
    for name in ("float8_e4m3fn", "int8"):
        assert codes[name] == codes[name + " scales"] == 0
        assert 0 <= codes[name + " tiny row"] <= 2e-36


def test_a_nan_or_an_infinity_stays_visible_in_its_row_and_only_there(interpreted):
    assert len(interpreted["poisoned"]) == 6
    assert all(interpreted["poisoned"].values())


def test_the_in_place_kernel_touches_queries_and_keys_alone(interpreted):
    assert len(interpreted["in_place"]) == 3
    assert all(interpreted["in_place"].values())


def test_kernels_take_a_clip_without_tokens(interpreted):
    assert interpreted["empty"] == {"norm": [1, 0, 64], "values": [1, 0, 64], "scale": [1, 0, 1]}


@pytest.mark.slow
def test_every_kernel_compiles_for_every_architecture_without_spilled_registers():
    rows = in_a_process_of_its_own("triton_compile", *map(str, CAPABILITIES))
    compiled = {(row["operator"], row["to"], row["capability"]) for row in rows}
    expected = {
        (name, fast_paths.short(to), capability)
        for name in operators.OPERATORS
        for to in ((FP8, INT8) if "quantize" in name else (None,))
        for capability in CAPABILITIES
        if to != FP8 or capability >= 89
    }
    assert compiled == expected
    spilled = [row for row in rows if row["stack"] or row["local"]]
    assert spilled == []


WITH_A_WRONG_RECORD = """
from support import triton_record, triton_rescale
class Wrong(dict):
    def get(self, key):
        return {"registers": 1}
triton_record._record = Wrong
triton_rescale.compile_for([90])
"""


def test_a_kernel_that_compiles_to_something_else_than_was_recorded_is_found():
    pytest.importorskip("triton")
    environment = {**os.environ, "SKYREELS_COMPILE": "all"}
    run = forks("torch").run(["-c", WITH_A_WRONG_RECORD], environment)
    assert run.returncode != 0
    assert "says {'registers': 1}: make that file again" in run.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    "case",
    [*SMALL, *(case._replace(shape=(1, 4097, 3072)) for case in EACH if len(case.shape) == 3)],
    ids=str,
)
def test_what_runs_on_this_gpu_loses_no_more_than_eager_code(case):
    args = inputs(case, "cuda")
    exact = truth(case, args)
    ours = error(results(getattr(OPERATORS, case.operator).default, case, args), exact)
    assert ours <= 1.2 * error(results(EAGER[case.operator], case, args), exact) + FLOAT32_NOISE


# --- which implementation runs where --------------------------------------------------------------


def gpu(name, capability, problem="") -> DeviceInfo:
    return DeviceInfo("cuda", name, capability, triton="3.6.0", triton_problem=problem)


H100, T4 = gpu("H100", (9, 0)), gpu("T4", (7, 5))


@pytest.fixture
def simulated(monkeypatch, caplog):
    """simulated(descriptions, kernels): what devices are, and what the Triton module holds.

    Tensors stay on the CPU, which stands for cuda:0; references stand for good kernels.
    """
    caplog.set_level(logging.WARNING, logger=operators.logger.name)

    def set_up(*descriptions, **broken):
        monkeypatch.setattr(fast_paths, "_decisions", {})
        monkeypatch.setattr(fast_paths, "_logged", set())
        by_device = dict(zip(DEVICES, descriptions, strict=False))
        monkeypatch.setattr(fast_paths, "describe", lambda device: by_device[device])
        good = {name: getattr(reference, name) for name in operators.OPERATORS}
        monkeypatch.setattr(
            operators, "load_kernels", lambda module: SimpleNamespace(**good | broken)
        )

    return set_up


DEVICES = (torch.device("cpu"), torch.device("cpu", 1))


def report_of(device):
    return fast_paths.report(operators.decisions(device))


def dispatch(case: Case, args: tuple | None = None):
    function = operators.dispatcher(case.operator, getattr(reference, case.operator))
    return results(function, case, args or inputs(case))


def test_a_kernel_that_agrees_with_its_reference_is_used(simulated, caplog):
    calls = []

    def counted(*args):
        calls.append(args[0].shape)
        return reference.gated_residual(*args)

    simulated(H100, gated_residual=counted)
    case = Case("gated_residual", (2, 3, 96))
    dispatch(case)
    dispatch(case)
    assert calls == [(2, 3, 3072), (2, 3, 96), (2, 3, 96)]  # the self-test, once, and two calls
    assert all("self-test passed" in line for line in report_of(DEVICES[0]).values())
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("description", "reason"),
    [
        (
            gpu("RTX", (8, 9), "Triton is not installed: pip install it"),
            "Triton is not installed: pip install it",
        ),
        (gpu("RTX", (8, 9), "Triton 3.1.0 is older than 3.4"), "Triton 3.1.0 is older than 3.4"),
        (gpu("V100", (7, 0)), "compute capability 7.0 is below 7.5"),
        (gpu("MI300", None), "not for AMD's"),
    ],
)
def test_a_device_that_cannot_run_kernels_takes_the_reference_and_says_why_once(
    simulated, caplog, description, reason
):
    def never(*args):
        raise AssertionError("this kernel must not be tried")

    simulated(description, **dict.fromkeys(operators.OPERATORS, never))
    for case in EACH:
        args = inputs(case)
        right = results(getattr(reference, case.operator), case, args)
        assert all(torch.equal(a, b) for a, b in zip(dispatch(case, args), right, strict=True))
    report = report_of(DEVICES[0])
    assert set(report) == set(operators.OPERATORS)
    assert all(line.startswith("plain torch: ") and reason in line for line in report.values())
    assert len(caplog.messages) == 1 and reason in caplog.messages[0]
    assert description.name in caplog.messages[0]


def test_a_cpu_says_what_it_runs_without_a_warning(caplog):
    report = report_of(torch.device("cpu"))
    assert len(report) == 15
    assert all("not for cpu" in line for line in report.values())
    assert caplog.messages == []


def raising(*args):
    raise RuntimeError("Triton Error [CUDA]: device kernel image is invalid\nmore")


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (lambda *args: reference.gated_residual(*args) * math.nan, "error nan, 0.005 is allowed"),
        (lambda x, y, gate: reference.gated_residual(x, y, 1.05 * gate), "error 0.0"),
        (lambda x, y, gate: x.clone(), "0.005 is allowed"),
        (raising, "RuntimeError: Triton Error [CUDA]: device kernel image is invalid"),
        (
            lambda *args: reference.gated_residual(*args)[:, :2],
            "failed with RuntimeError: it returns",
        ),
    ],
    ids=["nan", "inexact", "wrong", "raising", "shape"],
)
def test_a_kernel_that_fails_its_self_test_is_switched_off_and_the_others_are_not(
    simulated, caplog, kernel, reason
):
    simulated(H100, gated_residual=kernel)
    case = Case("gated_residual", (2, 3, 96))
    args = inputs(case)
    for _ in range(2):
        assert torch.equal(*dispatch(case, args), *results(reference.gated_residual, case, args))
    report = report_of(DEVICES[0])
    assert report["gated_residual"].startswith("plain torch: ")
    assert reason in report["gated_residual"]
    assert all("passed" in line for name, line in report.items() if name != "gated_residual")
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("gated_residual on cpu: plain torch (")


def test_one_wrong_row_of_a_rounding_kernel_is_noticed(simulated):
    def wrong(x, to, rotation):
        values, scale = reference.quantize_rows(x, to, rotation)
        scale[0, 1] *= 1.05
        return values, scale

    simulated(H100, quantize_rows=wrong)
    choice = operators.choose("quantize_rows", DEVICES[0], INT8)
    assert choice.impl is None and "0.005 is allowed" in choice.reason


def test_a_missing_kernel_module_is_a_reason_and_no_error(simulated, monkeypatch):
    simulated(H100)

    def broken(module):
        raise ImportError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(operators, "load_kernels", broken)
    choice = operators.choose("gated_residual", DEVICES[0])
    assert choice.impl is None and "libcuda.so.1" in choice.reason


def test_every_device_gets_a_decision_of_its_own(simulated):
    first, second = DEVICES
    simulated(H100, gpu("V100", (7, 0)))
    assert operators.choose("gated_residual", first).impl is not None
    assert operators.choose("gated_residual", second).impl is None
    assert operators.choose("gated_residual", first).impl is not None
    assert "7.0" in report_of(second)["gated_residual"]


def test_fp8_needs_a_newer_device_than_int8(simulated):
    simulated(gpu("A100", (8, 0)))
    assert operators.choose("quantize_rows", DEVICES[0], INT8).impl is not None
    assert operators.choose("quantize_rows", DEVICES[0], FP8).impl is None
    line = report_of(DEVICES[0])["quantize_rows"]
    assert "float8_e4m3fn needs compute capability 8.9, this device has 8.0" in line
    assert "int8: Triton 3.6.0" in line


def test_a_turing_gpu_is_tested_in_float16_and_leaves_bfloat16_to_torch(simulated, caplog):
    dtypes = []

    def recording(x, y, gate):
        dtypes.append(x.dtype)
        return reference.gated_residual(x, y, gate)

    simulated(T4, gated_residual=recording)
    dispatch(Case("gated_residual", (2, 3, 96), torch.float16))
    dispatch(Case("gated_residual", (2, 3, 96), torch.bfloat16))
    assert dtypes == [torch.float16, torch.float16]
    assert caplog.messages == [
        "gated_residual runs in plain torch on cpu: bfloat16 is emulated on compute capability 7.5."
    ]


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (("gated_residual", torch.zeros(1, 2, 8, dtype=DOUBLE)), "not float64"),
        (("gated_residual", torch.zeros(1, 2, 40_000)), "40000 channels are wider than 32768"),
        (("quantize_rows", torch.zeros(1, 2, 512), INT8, 512), "a Hadamard block of 512 channels"),
        (("qk_norm_rope_", torch.zeros(1, 2, 3, 2, 10)), "head size 10 is not one of"),
        (("qk_norm_rope_", torch.zeros(1, 2, 3, 16, 16).transpose(3, 4)), "16 elements apart"),
        (("gated_residual", torch.zeros(1, 0, 8)), "empty"),
        (("quantize_rows", torch.zeros(1, 2, 512), INT8, 256), ""),
        (("channel_moments", torch.zeros(1, 100_000, 1, 1, 8)), "100000 channels are more than"),
        (("channel_moments", torch.zeros(1, 4, 1, 8, 10)), "adjacent channels"),
        (("channel_moments", torch.zeros(1, 1, 1, 8, 100_000)), ""),
    ],
)
def test_arguments_that_a_kernel_does_not_take_are_named(args, reason):
    name, *rest = args
    found = operators.unsuited(name, tuple(rest), H100)
    assert reason in found and bool(found) == bool(reason)


def test_the_self_test_moves_no_seed(simulated):
    simulated(H100)
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    report_of(DEVICES[0])
    assert torch.equal(torch.randn(4), expected)


def test_the_vae_uses_the_fused_steps_where_they_are_and_decodes_the_same(simulated):
    from comfyui_skyreels.skyreels.vae import model
    from support import tiny

    vae = tiny.randomize(model.VideoVAE(tiny.VAE))
    latents = torch.randn(1, 16, 3, 3, 4)
    plain = vae.decode(latents)
    simulated(H100)
    with Seen() as seen:
        fused = vae.decode(latents)
    names = {name.partition("::")[2] for name in seen.names}
    assert {
        "channel_moments", "norm_silu_pad_", "residual_add_", "residual_add_moments_",
        "interleave_moments_",
    } <= names  # fmt: skip
    assert error([fused.double()], [plain.double()]) <= 1e-5


def test_a_gpu_is_described_with_the_reason_for_a_missing_triton(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "RTX 4090")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(torch.version, "hip", None)
    device = torch.device("cuda", 0)

    def found(module=None, fails=None):
        fast_paths._describe.cache_clear()
        if fails is not None:

            def fail(name):
                raise fails

            monkeypatch.setattr(fast_paths.importlib, "import_module", fail)
        else:
            monkeypatch.setattr(fast_paths.importlib, "import_module", lambda name: module)
        return fast_paths.describe(device)

    missing = found(fails=ImportError("No module named 'triton'"))
    assert (missing.name, missing.capability, missing.triton) == ("RTX 4090", (8, 9), "")
    assert missing.triton_problem == "Triton is not installed: pip install triton"
    monkeypatch.setattr(fast_paths.sys, "platform", "win32")
    problem = found(fails=ImportError()).triton_problem
    assert problem == "Triton is not installed: pip install triton-windows"
    monkeypatch.setattr(fast_paths.sys, "platform", "linux")
    broken = found(fails=OSError("libtriton.so: undefined symbol"))
    assert "does not load (OSError: libtriton.so" in broken.triton_problem
    old = found(SimpleNamespace(__version__="3.1.0"))
    assert old.triton == "3.1.0"
    assert "3.1.0 is older than 3.4: update torch to 2.8 or newer" in old.triton_problem
    new = found(SimpleNamespace(__version__="3.6.0"))
    assert (new.triton, new.triton_problem) == ("3.6.0", "")
    monkeypatch.setenv("SKYREELS_BACKEND", "reference")
    pinned = found(fails=AssertionError("must not be imported"))
    assert pinned.triton_problem == "SKYREELS_BACKEND=reference"
    monkeypatch.delenv("SKYREELS_BACKEND")
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert found().capability is None
    fast_paths._describe.cache_clear()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"),
                                   RuntimeError("Triton Error [CUDA]: out of memory")])  # fmt: skip
def test_want_of_memory_at_first_use_is_no_verdict(simulated, caplog, error):
    shortages = iter([error])

    def short_of_memory(*args):
        for shortage in shortages:
            raise shortage
        return reference.gated_residual(*args)

    simulated(H100, gated_residual=short_of_memory)
    case = Case("gated_residual", (2, 3, 96))
    args = inputs(case)
    right = results(reference.gated_residual, case, args)
    assert torch.equal(*dispatch(case, args), *right)
    assert operators.choose("gated_residual", DEVICES[0]).impl is short_of_memory
    assert torch.equal(*dispatch(case, args), *right)
    assert len(caplog.messages) == 1
    assert "found the device full or busy" in caplog.messages[0]


def test_a_card_that_stays_full_is_asked_less_and_less_often(monkeypatch):
    monkeypatch.setattr(fast_paths, "_decisions", {})
    monkeypatch.setattr(fast_paths, "_waits", {})
    calls = []

    def decide():
        calls.append(call)
        return fast_paths.Decision(None, "no room", is_final=len(calls) == 6)

    for call in range(1, 100):  # noqa: B007 - `decide` notes it
        fast_paths.remembered("a kernel", decide)
    assert calls == [1, 2, 4, 8, 16, 32]


def test_a_self_test_that_breaks_the_gpu_names_the_way_out(simulated):
    def broken(*args):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    simulated(H100, gated_residual=broken)
    with pytest.raises(RuntimeError, match="Restart with SKYREELS_BACKEND=reference"):
        operators.choose("gated_residual", DEVICES[0])


def test_plain_torch_can_be_pinned_and_imports_no_triton():
    """The same numbers as the references, in a process that describes its CPU as a GPU."""
    code = """
import json, sys, torch
from comfyui_skyreels.skyreels import doctor
from comfyui_skyreels.skyreels.kernels import dispatch, operators, reference
from comfyui_skyreels.skyreels.transformer import attention, linear, quant
H100 = dispatch.DeviceInfo("cuda", "H100", (9, 0), 91900, triton_problem=dispatch.find_triton(
    dispatch.backend())[1])
dispatch.describe = lambda device: H100
same, cpu = {}, torch.device("cpu")
for name, row in operators.OPERATORS.items():
    for to in row.formats:
        args, again = (operators.samples(name, torch.bfloat16, to)[0] for _ in range(2))
        ours, right = operators.dispatcher(name, row.reference)(*args), row.reference(*again)
        flat = lambda x, a: list(x) if isinstance(x, tuple) else [a[0] if x is None else x]
        pairs = zip(flat(ours, args), flat(right, again))
        same[f"{name} {to}"] = all(torch.equal(a.float(), b.float()) for a, b in pairs)
report = doctor._kernels()
products = [quant.choose_gemm(dtype, cpu).impl for dtype in quant.STORAGE_DTYPES.values()]
print(json.dumps({"same": same, "triton": "triton" in sys.modules, "report": report,
                  "products": products, "gelu": linear.gelu_epilogue(cpu, torch.bfloat16).reason,
                  "fast": attention.choose_attention("cpu", "fast").reason}))
"""
    run = forks("torch").run(["-c", code], {**os.environ, "SKYREELS_BACKEND": "reference"})
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["same"] and all(found["same"].values())
    assert found["triton"] is False
    assert found["products"] == ["float32", "float32"]
    pinned = "SKYREELS_BACKEND=reference"
    report = found["report"]
    assert report["SKYREELS_BACKEND"].startswith("reference (of auto")
    assert report["triton"] == f"not used: {pinned}"
    assert report["gated_residual"] == f"plain torch: {pinned}"
    assert all(pinned in each for each in (found["gelu"], found["fast"]))


def test_doctor_says_for_every_operator_what_runs_on_each_gpu(simulated, monkeypatch):
    from comfyui_skyreels.skyreels import doctor

    simulated()
    found = [
        gpu("RTX", (8, 9), "Triton is not installed"),
        gpu("V100", (7, 0)),
    ]
    monkeypatch.setattr(fast_paths, "describe", lambda device: found[device.index])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for module in (doctor.attention, doctor.quant, doctor.linear):  # they ask the true device
        monkeypatch.setattr(module, "decisions", lambda device: {})
    lines = doctor._kernels()
    for name in operators.OPERATORS:
        assert lines[f"{name} (cuda:0)"] == "plain torch: Triton is not installed"
        assert "7.0 is below 7.5" in lines[f"{name} (cuda:1)"]
    assert "not benchmarked against ours" in lines["comfy_kitchen"]


def test_the_bench_runs_at_tiny_size_and_says_what_it_measured():
    folder = ROOT / "tests" / "bench"
    code = f"""
import runpy, sys
sys.path.insert(0, {str(folder)!r})
runpy.run_path({str(folder / "bench_kernels.py")!r}, run_name="__main__")
"""
    options = ["--device", "cpu", "--tokens", "6", "--runs", "1", "--width", "96"]
    run = forks("torch").run(["-c", code, *options], {**os.environ})
    assert run.returncode == 0, run.stderr
    *table, last = run.stdout.splitlines()
    result = json.loads(last)
    assert {row["operator"] for row in result["rows"]} == set(operators.OPERATORS)
    assert result["fused"] == 0 and "No kernel ran here" in table[-1]
    assert result["worst_error_to_eager_error"] <= 1.2
