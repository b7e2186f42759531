"""One dispatcher for every fast path: its parts exist once, and a new kernel is one table row."""

import ast
import contextlib
import functools
import os
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from comfyui_skyreels.skyreels.kernels import dispatch, operators, reference
from comfyui_skyreels.skyreels.kernels.dispatch import DeviceInfo, Finding
from comfyui_skyreels.skyreels.transformer import attention, linear, quant
from comfyui_skyreels.skyreels.transformer.fast_attention import FAST, FastKernel
from support.forked import forks
from support.project import ROOT

CPU, BF16, INT8 = torch.device("cpu"), torch.bfloat16, torch.int8
GPU = DeviceInfo("cuda", "GPU", (8, 9), cudnn=91900, triton="3.6.0")


@pytest.fixture(autouse=True)
def on_gpu(monkeypatch):
    """Nothing decided yet; the CPU is described as a GPU, and nothing foreign is installed."""
    for name, empty in (("_decisions", {}), ("_waits", {}), ("_logged", set())):
        monkeypatch.setattr(dispatch, name, empty)
    for name in (dispatch.BACKEND_VARIABLE, dispatch.ATTENTION_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(dispatch, "describe", lambda device: GPU)
    for kernel in FAST.values():
        monkeypatch.setitem(sys.modules, kernel.package, None)


# --- one of each --------------------------------------------------------------------------------


class Definition(NamedTuple):
    """A class or a function of the engine.

    Attributes:
        place: "file:name".
        fields: of a class, those that are declared; of a function none.
        names: of a function, what is named in it; of a class none.
        calls: likewise, what is called by its bare name.
    """

    place: str
    fields: set[str]
    names: set[str]
    calls: set[str]


@functools.cache
def definitions() -> list[Definition]:
    """Those of all files in skyreels/."""
    found = []
    for path in sorted((ROOT / "skyreels").rglob("*.py")):
        file = path.relative_to(ROOT / "skyreels").as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            place = f"{file}:{getattr(node, 'name', '')}"
            if isinstance(node, ast.ClassDef):
                declared = [part.target.id for part in node.body if isinstance(part, ast.AnnAssign)]
                found.append(Definition(place, {*declared}, set(), set()))
            elif isinstance(node, ast.FunctionDef):
                inner = list(ast.walk(node))
                bare = [each.id for each in inner if isinstance(each, ast.Name)]
                dotted = [each.attr for each in inner if isinstance(each, ast.Attribute)]
                calls = [each.func for each in inner if isinstance(each, ast.Call)]
                called = [getattr(each, "id", "") for each in calls]
                found.append(Definition(place, set(), {*bare, *dotted}, {*called}))
    return found


def test_a_device_is_described_by_one_class():
    assert [each.place for each in definitions() if "capability" in each.fields] == [
        "kernels/dispatch.py:DeviceInfo"
    ]


def test_a_choice_and_its_reason_are_one_class():
    assert [each.place for each in definitions() if "reason" in each.fields] == [
        "kernels/dispatch.py:Decision"
    ]


def test_fast_paths_are_compared_with_their_reference_by_one_function():
    assert [each.place for each in definitions() if "Finding" in each.calls] == [
        "kernels/dispatch.py:probe"
    ]


def test_fast_paths_are_timed_by_one_function():
    clocks = {"Event", "perf_counter", "elapsed_time"}
    timers = [each.place for each in definitions() if each.names & clocks]
    assert [place for place in timers if place.startswith(("kernels", "transformer"))] == [
        "kernels/dispatch.py:median_ms"
    ]


def test_trials_run_and_their_errors_are_judged_in_one_function():
    """What may be remembered as a verdict is decided nowhere else."""
    assert [each.place for each in definitions() if "_failure" in each.names] == [
        "kernels/dispatch.py:decide"
    ]


# --- the timer ----------------------------------------------------------------------------------


class Queue:
    """A device that works through what a host launches; each has a clock, in seconds."""

    def __init__(self) -> None:
        self.host = self.device = 0.0

    def launch(self, device_s: float, host_s: float = 0.0) -> None:
        self.host += host_s
        self.device = max(self.device, self.host) + device_s

    def event(self, enable_timing: bool) -> SimpleNamespace:
        mark = SimpleNamespace()

        def record() -> None:
            self.launch(0.0)
            mark.at = self.device

        def wait() -> None:
            self.host = max(self.host, mark.at)

        mark.record, mark.synchronize = record, wait
        mark.elapsed_time = lambda end: 1e3 * (end.at - mark.at)
        return mark


@pytest.mark.parametrize("launches", [1, 4, 30])
@pytest.mark.parametrize("launch_s", [1e-6, 1e-4, 6e-4])
def test_the_timer_sees_what_the_device_does_and_not_how_long_launches_take(
    monkeypatch, launches, launch_s
):
    """On an H100 an 8-bit GEMM of 0.2 ms seemed to take 0.6, so that it was refused."""
    queue = Queue()
    monkeypatch.setattr(torch.cuda, "Event", queue.event)
    monkeypatch.setattr(
        torch.cuda, "_sleep", lambda cycles: queue.launch(cycles / dispatch.HOLD_CLOCK_HZ)
    )
    monkeypatch.setattr(dispatch, "time", SimpleNamespace(perf_counter=lambda: queue.host))
    few = lambda: queue.launch(2e-4, launch_s)  # noqa: E731
    many = lambda: [queue.launch(1e-4 / launches, launch_s) for _ in range(launches)]  # noqa: E731
    monkeypatch.setattr(dispatch, "current_device", lambda device: contextlib.nullcontext())
    gpu = torch.device("cuda:0")
    times = dispatch.median_ms({"few launches": few, "many launches": many}, gpu)
    assert times == pytest.approx({"few launches": 0.2, "many launches": 0.1})


def test_dequantizing_counts_once_for_the_tokens_of_a_clip(monkeypatch):
    clock = {"GEMM": 1.0, quant.DEQUANTIZED: 2.0, "dequantizing": 0.6}
    seen = {}

    def median_ms(contenders, device):
        for name, function in contenders.items():
            seen[name] = function()
        return dict(clock)

    monkeypatch.setattr(dispatch, "median_ms", median_ms)
    monkeypatch.setattr(quant, "TIMED_SHAPE", (32, 64, 64))
    monkeypatch.setattr(quant, "multiply", lambda *args: None)
    monkeypatch.setattr(quant, "MAX_HADAMARD_BLOCK", 64)
    times = quant.time_gemms(["GEMM"], INT8, CPU)
    assert times == pytest.approx({"GEMM": 1.0, quant.DEQUANTIZED: 2.0 + 0.6 / quant.TIMED_CALLS})
    assert seen[quant.DEQUANTIZED].shape == (32, 64), "a GEMM in 16 bits"
    assert seen["dequantizing"].dtype == BF16


# --- a further kernel is one row ----------------------------------------------------------------


def test_a_row_among_the_operators_is_decided_probed_and_reported(monkeypatch):
    def double(x):
        return 2 * x

    row = operators.Operator(
        "(Tensor x) -> Tensor", double, lambda draw: [(draw(3, 8),)], lambda args: ""
    )
    monkeypatch.setitem(operators.OPERATORS, "double", row)
    calls = []
    kernel = lambda x: calls.append(x.shape) or x + x  # noqa: E731
    monkeypatch.setattr(operators, "load_kernels", lambda module: SimpleNamespace(double=kernel))
    assert operators.choose("double", CPU).impl is kernel
    assert calls == [(3, 8)]
    line = dispatch.report({"double": operators.decisions(CPU)["double"]})["double"]
    assert line == "Triton 3.6.0: self-test passed, error 0"


@pytest.mark.parametrize(("factor", "is_used"), [(1.0, True), (1.1, False)])
def test_a_row_among_the_attentions_is_decided_probed_and_reported(monkeypatch, factor, is_used):
    load = lambda *args: lambda q, k, v: factor * attention.sdpa(q, k, v)  # noqa: E731
    monkeypatch.setitem(FAST, "new", FastKernel("torch", (8, 0), (8,), load))
    chosen = attention.choose_attention(CPU, "fast", heads=1, head_dim=32, tokens=1100)
    assert (chosen.name == "new") == is_used
    assert ("new: self-test failed, error 0.1" in chosen.reason) != is_used
    assert "found" in dispatch.report(attention.decisions(CPU))["8-bit attention, new"]


def test_a_row_among_the_gemms_is_decided_probed_and_reported(monkeypatch):
    monkeypatch.setitem(quant.GEMMS["cuda"], INT8, ("new",))
    monkeypatch.setitem(quant.GEMMS["cuda"], torch.float8_e4m3fn, ("float32",))  # not asked of here
    monkeypatch.setitem(quant.UNSCALED_GEMMS, "new", quant._float32_mm)
    monkeypatch.setattr(quant, "time_gemms", lambda names, **_: {})
    assert quant.choose_gemm(INT8, CPU).impl == "new"
    line = dispatch.report(quant.decisions(CPU))["int8 linears"]
    assert line.startswith("8-bit inputs, multiplied by new: self-test passed, error 0.00")


# --- an error that passes is no verdict ---------------------------------------------------------


def operator_path(monkeypatch, trial):
    def kernel(*args):
        trial()
        return reference.gated_residual(*args)

    loaded = SimpleNamespace(gated_residual=kernel)
    monkeypatch.setattr(operators, "load_kernels", lambda module: loaded)
    return lambda: operators.choose("gated_residual", CPU)


def rescale_path(monkeypatch, trial):
    def kernel(*args):
        trial()
        reference.rescale_(*args)

    monkeypatch.setattr(operators, "load_kernels", lambda module: SimpleNamespace(rescale_=kernel))
    return lambda: operators.choose("rescale_", CPU)


def gemm_path(monkeypatch, trial):
    def gemm(qdata, weight):
        trial()
        return quant._float32_mm(qdata, weight)

    monkeypatch.setitem(quant.GEMMS["cuda"], INT8, ("new",))
    monkeypatch.setitem(quant.UNSCALED_GEMMS, "new", gemm)
    monkeypatch.setattr(quant, "time_gemms", lambda names, **_: {})
    return lambda: quant.choose_gemm(INT8, CPU)


def epilogue_path(monkeypatch, trial):
    def addmm_gelu(bias, x, weight, *, use_gelu):
        trial()
        sums = torch.nn.functional.linear(x.float(), weight.t().float(), bias.float())
        return torch.nn.functional.gelu(sums, approximate="tanh").to(x.dtype)

    monkeypatch.setattr(torch, "_addmm_activation", addmm_gelu)
    return lambda: linear.gelu_epilogue(CPU, BF16)


def attention_path(monkeypatch, trial):
    def attend(query, key, value):
        trial()
        return attention.sdpa(query, key, value)

    size = attention.Size(1, 32, 1100, torch.float32)
    exact = dispatch.Decision(attention.sdpa, "", "exact")
    monkeypatch.setitem(FAST, "new", FastKernel("torch", (8, 0), (8,), lambda *args: attend))
    return lambda: attention._fastest(GPU, CPU, size, exact, "")


PATHS = [operator_path, rescale_path, gemm_path, epilogue_path, attention_path]
PASSING = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable"),
]


@pytest.mark.parametrize("error", PASSING, ids=["full", "busy"])
@pytest.mark.parametrize("path", PATHS)
def test_a_full_or_busy_device_is_asked_again(monkeypatch, path, error):
    errors = iter([error])

    def trial():
        for each in errors:
            raise each

    choose = path(monkeypatch, trial)
    first = choose()
    assert first.impl is None and not first.is_final
    assert "tried again later" in first.reason
    assert choose().impl is not None


@pytest.mark.parametrize("path", PATHS)
def test_an_interrupt_in_a_trial_interrupts_and_is_no_verdict(monkeypatch, path):
    errors = iter([KeyboardInterrupt()])

    def trial():
        for each in errors:
            raise each

    choose = path(monkeypatch, trial)
    with pytest.raises(KeyboardInterrupt):
        choose()
    assert choose().impl is not None


@pytest.mark.parametrize("path", PATHS)
def test_another_error_is_a_verdict_and_is_not_asked_again(monkeypatch, path):
    calls = []

    def trial():
        calls.append(1)
        raise RuntimeError("no kernel image is available")

    choose = path(monkeypatch, trial)
    for _ in range(3):
        assert choose().impl is None
    assert len(calls) == 1
    assert "no kernel image" in choose().reason


# --- findings -----------------------------------------------------------------------------------


def test_a_finding_names_the_worst_input_and_nan_is_the_worst():
    assert str(Finding({"a": 0.01, "b": 0.02}, 0.05)) == "error 0.02 (b)"
    assert str(Finding({"a": float("nan"), "b": 9.0}, 0.05)) == "error nan (a), 0.05 is allowed"


def test_every_reason_stands_once_with_the_candidates_it_holds_for():
    info = replace(GPU, type="cuda", capability=None)
    candidates = [
        dispatch.Candidate(name, dict, dict, problem)
        for name, problem in (("a", "too old"), ("b", "missing"), ("c", "too old"))
    ]
    assert dispatch.decide(candidates, "x").reason == "a, c: too old; b: missing"
    assert dispatch.decide(candidates[::2], "x").reason == "too old"
    assert dispatch.triton_problem(info) == "our kernels are for NVIDIA GPUs, not for AMD's"


# --- two copies in one process ------------------------------------------------------------------

TWO_COPIES = """
import gc, importlib, importlib.util, sys
import torch

def load(name):
    spec = importlib.util.spec_from_file_location(
        name, "skyreels/__init__.py", submodule_search_locations=["skyreels"])
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return importlib.import_module(name + ".kernels")

def works(kernels):
    x = torch.randn(1, 3, 8)
    quantized = kernels.quantize_rows(x, kernels.QuantFormat(torch.int8))
    exact = (quantized.qdata * quantized.scale - x).abs().max() < 0.1
    meta = kernels.gated_residual(*(torch.empty(1, 3, 8, device="meta") for _ in range(3)))
    return bool(exact) and meta.shape == (1, 3, 8)

first, second = load("pack-a"), load("pack_a")
assert first.NAMESPACE == "pack_a_kernels" != second.NAMESPACE
assert works(first) and works(second)
for name in [name for name in sys.modules if name.startswith("pack_a")]:
    del sys.modules[name]
again = load("pack_a")
assert works(first) and works(second) and works(again)
importlib.reload(again.operators)
importlib.reload(again)
assert works(again)
del first, second
gc.collect()
assert works(again)
print("ok")
"""


def test_copies_under_two_names_and_a_reload_work_side_by_side():
    run = forks("torch").run(["-c", TWO_COPIES], {**os.environ})
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.split() == ["ok"]
