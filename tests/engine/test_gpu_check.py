"""The script for a GPU runs everywhere, survives its steps, and passes nothing that it did not see.

The long test runs every step at tiny size with three planted faults among them.
"""

import contextlib
import importlib.util
import io
import json
import signal
import sys
import warnings
from itertools import pairwise

import pytest
from support.project import ROOT

pytestmark = pytest.mark.usefixtures("fast_convolutions", "few_objects")
FULL = {"run": {"size": "full", "device": "cuda", "steps": ["exact", "memory"]}}
WELL = [{"step": step, "ended": "ok", "seconds": 1.0} for step in ("exact", "memory")]


def load(path: str):
    """A script of tests/ as a module of its name."""
    spec = importlib.util.spec_from_file_location(path.split("/")[-1], ROOT / f"tests/{path}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def gpu_check():
    return load("scripts/gpu_check")


@pytest.fixture(scope="module")
def report(gpu_check):
    return load("bench/report")


@pytest.fixture(scope="module")
def tiny_run(gpu_check, tmp_path_factory):
    """A whole run at tiny size with faults: its exit code, what it printed, the file's records.

    The first step and those that do not end are processes, as all are in the script. The others run
    here, where torch and diffusers are imported already.
    """
    out = tmp_path_factory.mktemp("gpu check")
    in_processes = {"environment", "planted crash", "planted hang"}
    start = gpu_check.run_process

    def run_step(command, limit_s, stderr):
        if command[command.index("--step") + 1] in in_processes:
            return start(command, limit_s, stderr)
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("default")
            patch.setattr(sys, "argv", command[1:])
            patch.setattr(sys, "path", [*sys.path])
            return gpu_check.how_it_ended(gpu_check.main())

    arguments = ["--size", "tiny", "--device", "cpu", "--out", str(out), "--budget", "1500"]
    printed = io.StringIO()
    on_terminate = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(gpu_check, "run_process", run_step)
        patch.setattr(sys, "argv", ["gpu_check.py", *arguments, "--plant"])
        code = gpu_check.main()
    signal.signal(signal.SIGTERM, on_terminate)
    return code, printed.getvalue(), out / "results.jsonl"


def figure(step, name, value, **details):
    return {"step": step, "name": name, "value": value, "unit": "", **details}


@pytest.mark.slow
def test_every_step_is_measured_and_each_planted_fault_costs_only_itself(gpu_check, tiny_run):
    code, printed, results = tiny_run
    records = gpu_check.read(results)
    screen = printed[-12_000:]
    last = json.loads(printed.splitlines()[-1])
    assert code == 1
    assert last["gpu_check"] == "tiny"
    # nothing is wrong but what was planted, and that is told in words
    problems = last["problems"]
    assert problems == [
        "planted crash: died of SIGABRT",
        "planted hang: killed at its limit of 3 s",
        "planted miss: planted: other: a measurement that failed",
        "planted miss: planted: value: 2 is not <= 1.0",
    ], printed[-6000:]
    assert all(problem in screen for problem in problems)
    ended = {name: step["ended"] for name, step in last["steps"].items()}
    own = [step.name for step in gpu_check.STEPS]
    assert {name: ended[name] for name in own} == dict.fromkeys(own, "ok")
    assert list(ended) == [step.name for step in gpu_check.plan([], planted=True)]
    # figures of every step are in the file and among the last lines, also those before a crash
    found = gpu_check.figures(records)
    with_figures = {step for step, _ in found}
    assert with_figures == {*ended} - {"memory"}  # there all weights are on the only device
    text = screen[screen.index("[environment]") :]
    blocks = {block.partition("]")[0]: block for block in text.split("\nProblems:")[0].split("\n[")}
    blocks["environment"] = blocks.pop("[environment")
    assert set(blocks) == with_figures
    for step, name in found:
        subject, _, quantity = name.rpartition(": ")
        assert subject in blocks[step]
        assert quantity in blocks[step]
    # a small model on a CPU says nothing about the bars
    assert list(last["bars"].values()) == [None] * 6
    # there are no kernels here, and that is told, not passed over
    told = {(r["step"], r["name"]) for r in records if "skipped" in r}
    assert {("fp8", "Triton"), ("attention", "cuDNN"), ("memory", "streaming")} <= told


@pytest.mark.slow
def test_the_report_has_a_table_of_every_step_of_that_run(gpu_check, report, tiny_run):
    records = gpu_check.read(tiny_run[2])
    text = report.report(records, "2026-01-31")
    assert text.startswith("## 2026-01-31")
    sections = {section.partition(" (")[0]: section for section in text.split("\n### ")[1:]}
    assert list(sections) == [step.name for step in gpu_check.plan([], planted=True)]
    for name, section in sections.items():
        assert ("| --- |" in section) == (name != "memory")
    assert "times diffusers" in sections["fp8"]
    assert "difference to exact bf16" in sections["fp8"]
    assert "Not measured: memory in bf16 (" in sections["memory"]
    assert "* planted crash: died of SIGABRT" in text
    assert "| 11 exact bf16 | not measured |" in text
    for before, line in pairwise(text.splitlines()):  # whole tables
        if line.startswith("|") and before.startswith("|"):
            assert line.count("|") == before.count("|")


def test_the_streaming_step_streams_where_weights_are_told_to_be_elsewhere(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests/bench")
    placement = importlib.import_module("comfyui_skyreels.skyreels.transformer.placement")
    monkeypatch.setattr(
        placement, "onload_bytes", lambda tensors, _: sum(t.nbytes for t in tensors)
    )
    monkeypatch.setattr(placement, "RESERVE_BYTES", 0)
    records: list[dict] = []
    make_context = importlib.import_module("gpu_steps").make_context
    context = make_context("cpu", False, records.append, lambda *_: "ok")
    importlib.import_module("gpu_model_steps").streaming(context)
    assert [record for record in records if "problem" in record] == []
    found = {record["name"]: record["value"] for record in records}
    assert found["streaming: blocks"] > 0
    equal = [name for name in found if name.endswith("equals resident")]
    assert len(equal) == 4
    assert all(found[name] is True for name in equal)
    assert "branches of a short clip: at once over one by one" in found


def test_what_was_not_measured_has_not_passed(gpu_check):
    problems = gpu_check.judge([FULL, *WELL])
    assert "exact: ours, whole: difference to diffusers: not measured" in problems
    assert "memory: streamed: equals resident: not measured" in problems


@pytest.mark.parametrize(
    ("value", "is_kept"), [(0.049, True), (0.05, True), (0.051, False), (float("nan"), False)]
)
def test_a_bound_is_judged_by_the_last_figure_of_its_name(gpu_check, value, is_kept):
    name = "ours, whole: difference to diffusers"
    records = [FULL, figure("exact", name, 1.0), figure("exact", name, value), *WELL]
    told = [problem for problem in gpu_check.judge(records) if name in problem]
    assert told == ([] if is_kept else [f"exact: {name}: {value:.4g} is not <= 0.05"])


def test_a_flag_and_each_figure_of_a_pattern_are_judged(gpu_check):
    records = [
        FULL,
        figure("exact", "ours, whole: peak over planned", 0.9),
        figure("exact", "ours, chunks: peak over planned", 1.1),
        figure("memory", "streamed: equals resident", False),
        *WELL,
    ]
    problems = gpu_check.judge(records)
    assert "exact: ours, chunks: peak over planned: 1.1 is not <= 1.0" in problems
    assert "memory: streamed: equals resident: False is not == True" in problems
    assert not any("ours, whole: peak over planned" in problem for problem in problems)


def test_how_a_step_ended_is_told_with_the_last_line_it_said(gpu_check):
    run = {"run": {"size": "tiny", "device": "cpu", "steps": ["int8", "fp8", "memory"]}}
    records = [
        run,
        {"step": "int8", "ended": "died of SIGSEGV", "stderr": "first\nlast words\n"},
        figure("fp8", "a: b", 1),
    ]
    assert gpu_check.judge(records) == [
        "int8: died of SIGSEGV: last words", "fp8: did not end", "memory: never began"
    ]  # fmt: skip


def test_a_line_that_a_crash_cut_short_is_left_out(gpu_check, tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"step": "fp8", "name": "a: b", "value": 1}\n{"step": "fp8", "na')
    assert gpu_check.figures(gpu_check.read(path)) == {("fp8", "a: b"): 1}


def test_steps_share_the_budget_and_what_earlier_ones_left(gpu_check):
    step = gpu_check.Step("fp8", 60, "")
    assert gpu_check.allowed(step, 500, 0, True) == 60
    assert gpu_check.allowed(step, 500, 25, True) == 85
    assert gpu_check.allowed(step, 40, 25, True) == 40
    assert gpu_check.allowed(step, 4, 0, True) is None
    assert gpu_check.allowed(step, -1, 0, True) is None
    assert sum(step.limit_s for step in gpu_check.STEPS) <= gpu_check.BUDGET_SECONDS


def test_without_time_left_every_step_is_recorded_as_skipped(gpu_check, tmp_path):
    results = gpu_check.check(gpu_check.STEPS[:2], "tiny", "cpu", tmp_path, budget_s=0)
    problems = gpu_check.judge(gpu_check.read(results))
    assert "environment: skipped: no time left" in problems
    assert "exact: ours, whole: difference to diffusers: not measured" in problems


def test_bars_count_only_the_full_size_and_attention_that_was_accepted(gpu_check):
    records = [
        figure("environment", "GEMM: rate", 780.0),
        figure("exact", "tokens: image and text", 51_060),
        figure("exact", "forward: work", 2616.0),
        figure("exact", "diffusers: time", 6.9),
        figure("exact", "ours, whole: time", 4.3),
        figure("fp8", "fp8, exact attention: time", 4.0),
        figure("fp8", "fp8, good: time", 3.0, accepted=True),
        figure("fp8", "fp8, bad: time", 2.0, accepted=False),
        figure("yardstick", "fp32: forwards", 60.0),
        figure("yardstick", "easy cache: forwards", 30.0),
        figure("sparse forward", "Triton, fp8, first branch: time", 2.1),
        figure("sparse forward", "Triton, fp8, second branch: time", 1.9),
        figure("sparse forward", "Triton, bf16, first branch: time", 1.0),
    ]
    assert list(gpu_check.bars(records).values()) == [1.605, 1.725, 2.3, 4.6, 3.45, 0.78]
    records[1]["value"] = 108
    assert set(gpu_check.bars(records).values()) == {None}


def test_the_table_keeps_within_its_room_and_says_what_it_left_out(gpu_check):
    records = [figure("a", f"subject {i}: rate", 1.5) for i in range(200)]
    records.append(figure("b", "other: rate", 2.5))
    text = gpu_check.table(records, 1000)
    assert len(text) <= 1000
    assert "subject 0: rate 1.5" in text
    assert "more lines in the file" in text
    assert "other: rate 2.5" in text


def test_many_problems_leave_room_for_the_figures(gpu_check):
    records = [FULL, *WELL, *(figure("exact", f"subject {i}: rate", 1.5) for i in range(200))]
    records += [{"step": "exact", "name": f"part {i}", "problem": "x" * 400} for i in range(90)]
    text, is_well = gpu_check.summary(records)
    assert not is_well
    assert len(text) < 12_000
    assert "subject 50: rate" in text
    assert "more: see report.py" in text
