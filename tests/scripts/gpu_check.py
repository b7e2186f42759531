"""Everything that needs a GPU, in one run of under ten minutes; tiny sizes where there is none.

    python tests/scripts/gpu_check.py [--size full|tiny] [--device cuda|cpu] [--out DIR]
        [--only STEP]... [--budget SECONDS]

Every step is a process of its own with a limit; what it does is in tests/bench/gpu_steps.py and
beside it. A step appends each figure to `results.jsonl` in the out folder ($OUT, else a temporary
one) the moment it exists, and asserts nothing: a measurement that fails is recorded as a problem
and the next one goes on; a step that crashes, or hangs until it is killed, costs only itself. At
the end the bounds are judged, from that file alone: what was not measured has not passed. The last
lines are a table of all figures, the problems, and one JSON object. Exit code 1 if there are
problems. `python tests/bench/report.py results.jsonl` writes the section for tests/bench/LOG.md.
"""

import argparse
import importlib
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
WHEELS = ROOT / ".gpu-wheels"
#: the tool that runs this on a GPU machine shows the last 12,000 characters of what it prints
SCREEN = 11_500
#: of which problems may take this much, twice
PROBLEM_ROOM = 2_000
#: with less time left than this a step is not started
LEAST_SECONDS = 5.0
#: of one call on a GPU machine 590 s may be used; ending takes a moment
BUDGET_SECONDS = 580.0
#: what a whole step may take at tiny size, where a busy machine is no fault
TINY_SECONDS = 300.0
#: image and text tokens of 97 frames of 544x960, and what one forward pass must see to count
FULL_TOKENS = 51_060
#: distribution -> module it brings, of the wheels that gpu_wheels.py collects
MODULES = {
    "importlib_metadata": "importlib_metadata",
    "diffusers": "diffusers",
    "nvidia_cudnn_frontend": "cudnn",
    "comfy_kitchen": "comfy_kitchen",
}


#: takes a record for the file
Write = Callable[[dict], None]


class Step(NamedTuple):
    """function: "module:function" that takes a gpu_steps.Context; limit_s: at full size.

    Those of this module do without torch, and take what a Context is made of.
    """

    name: str
    limit_s: float
    function: str


#: the most valuable first
STEPS = (
    Step("environment", 15, "gpu_steps:environment"),
    Step("exact", 90, "gpu_model_steps:exact"),
    Step("sparse forward", 50, "gpu_sparse_steps:forward"),
    Step("vae", 75, "gpu_vae_steps:vae"),
    Step("fp8", 50, "gpu_model_steps:fp8"),
    Step("int8", 45, "gpu_model_steps:int8"),
    Step("attention", 30, "gpu_steps:attention"),
    Step("sparse attention", 70, "gpu_sparse_steps:sparse_attention"),
    Step("plan", 22, "gpu_model_steps:plan"),
    Step("memory", 50, "gpu_check:process_memory"),
    Step("rates", 32, "gpu_steps:rates"),
    Step("accuracy", 20, "gpu_model_steps:accuracy"),
    Step("yardstick", 31, "gpu_steps:yardstick"),
)
#: parts of steps that may break the CUDA context, or whose memory is measured as a whole
CHILDREN = {
    "alignment": "gpu_model_steps:alignment",
    "flex_attention": "gpu_sparse_steps:flex",
    "memory in bf16": "gpu_model_steps:memory_bf16",
    "memory in fp8": "gpu_model_steps:memory_fp8",
    "streaming": "gpu_model_steps:streaming",
}
#: those of the step "memory", and their limits in seconds
MEMORY_CHILDREN = {"memory in bf16": 30.0, "memory in fp8": 30.0, "streaming": 45.0}
#: for the test of this file: each goes wrong in its own way
PLANTED = (
    Step("planted crash", 20, "gpu_check:planted_crash"),
    Step("planted hang", 3, "gpu_check:planted_hang"),
    Step("planted miss", 20, "gpu_check:planted_miss"),
)


class Bound(NamedTuple):
    """What a figure must keep.

    name: of the figure, a pattern; sense: "<=", ">=" or "=="; where: "everywhere", "cuda" (there is
    such a device) or "full" (the full size).
    """

    step: str
    name: str
    sense: str
    limit: Any
    where: str = "everywhere"


BOUNDS = (
    Bound("exact", "ours, whole: difference to diffusers", "<=", 0.05),
    Bound("exact", "ours, *: peak over planned", "<=", 1.0, "full"),
    Bound("attention", "Triton*, 8 bits: error, *", "<=", 0.04, "cuda"),
    Bound("attention", "cuDNN: error, *", "<=", 0.01, "cuda"),
    Bound("attention", "flash: error, *", "<=", 0.01),
    Bound("sparse attention", "*, Triton*, beta 0.85: error", "<=", 0.1, "cuda"),
    Bound("sparse forward", "Triton*, bf16: density", "<=", 0.25, "cuda"),
    Bound("vae", "ours tiled-diffusers: largest difference to diffusers", "<=", 0.1),
    Bound("rates", "*: error over eager error", "<=", 1.2),
    Bound("rates", "GGUF *: difference to plain torch", "<=", 0.005),
    Bound("memory", "streamed: equals resident", "==", True, "cuda"),
    Bound("memory", "* streamed: equals resident", "==", True, "cuda"),
    Bound("memory", "streamed: weights came home", "==", True, "cuda"),
    Bound("memory", "all streamed: slowdown", "<=", 0.02, "full"),
    Bound("memory", "half streamed: slowdown", "<=", 0.02, "full"),
    Bound("memory", "*: peak over planned", "<=", 1.0, "full"),
    Bound("accuracy", "bf16: error over diffusers'", "<=", 1.2),
    Bound("accuracy", "fp8: error", "<=", 0.06),
    Bound("accuracy", "int8: error", "<=", 0.06),
    Bound("accuracy", "fp8, *: error", "<=", 0.08),
    Bound("accuracy", "int8, *: error", "<=", 0.08),
    Bound("yardstick", "*: told", ">=", 75.0, "full"),
    Bound("plan", "a step: time over planned", "<=", 1.15, "full"),
    Bound("plan", "a step: time over planned", ">=", 0.85, "full"),
    Bound("plan", "sampling: peak over planned", "<=", 1.05, "full"),
    Bound("plan", "sampling: peak over planned", ">=", 0.90, "full"),
    Bound("planted miss", "planted: value", "<=", 1.0),
)


# --- records ------------------------------------------------------------------------------------
#
# One JSON object a line:
#   {"run": {"size", "device", "steps"}}              first
#   {"step", "name", "value", "unit", ...}             a figure; of several of a name the last
#   {"step", "name", "skipped"}                        what cannot be measured here, and why
#   {"step", "name", "problem"}                        a measurement that failed
#   {"step", "ended", "seconds", "limit", "stderr"}    how a step ended: "ok", or in words


def append(path: Path, record: dict) -> None:
    """Add a record to a file, so that a crash of any process leaves it there."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()


def read(path: Path) -> list[dict]:
    """The records of a file; a line that a crash cut short is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def short_line(record: dict) -> str:
    """A figure, or what there is instead of it, for people."""
    head = f"{record['step']}: {record.get('name', '')}".rstrip(": ")
    for kind in ("problem", "skipped"):
        if kind in record:
            return f"{head}: {kind}: {record[kind]}"[:300]
    return f"{head} {shown(record['value'])} {record.get('unit', '')}".rstrip()[:300]


def shown(value: object) -> str:
    """A value for a table."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def figures(records: Iterable[dict]) -> dict[tuple[str, str], Any]:
    """(step, name) -> value; the last of several."""
    return {(r["step"], r["name"]): r["value"] for r in records if "value" in r}


# --- judging ------------------------------------------------------------------------------------


def keeps(value: Any, bound: Bound) -> bool:
    """Whether a value is within a bound; NaN is within none."""
    if bound.sense == "==":
        return value == bound.limit
    if not isinstance(value, int | float) or math.isnan(value):
        return False
    return value <= bound.limit if bound.sense == "<=" else value >= bound.limit


def judge(records: Sequence[dict], bounds: Sequence[Bound] = BOUNDS) -> list[str]:
    """What is wrong with a run, step by step: how it ended, what failed, what misses its bound.

    Args:
        records: of the whole file; the first tells which steps there should be.
    """
    run = next((r["run"] for r in records if "run" in r), {"size": "", "device": "", "steps": []})
    measured = figures(records)
    problems = []
    for step in run["steps"]:
        own = [r for r in records if r.get("step") == step]
        ended = next(
            (r for r in own if "ended" in r), {"ended": "did not end" if own else "never began"}
        )
        if ended["ended"] != "ok":
            last = ended.get("stderr", "").strip().splitlines()[-1:]
            problems.append(": ".join([step, ended["ended"], *last]))
        problems += [
            ": ".join(filter(None, (step, r.get("name"), r["problem"]))) for r in own
            if "problem" in r
        ]  # fmt: skip
        for bound in bounds:
            if bound.step != step or not _applies(bound, run):
                continue
            found = {
                name: value for (of, name), value in measured.items()
                if of == step and fnmatchcase(name, bound.name)
            }  # fmt: skip
            if not found:
                problems.append(f"{step}: {bound.name}: not measured")
            problems += [
                f"{step}: {name}: {shown(value)} is not {bound.sense} {bound.limit}"
                for name, value in found.items()
                if not keeps(value, bound)
            ]
    return problems


def _applies(bound: Bound, run: dict) -> bool:
    if bound.where == "full":
        return run["size"] == "full"
    return bound.where == "everywhere" or run["device"].startswith("cuda")


def bars(records: Sequence[dict]) -> dict[str, float | None]:
    """The bounds of the speed at full size; None for what was not measured at full size.

    Attention in 8 bits counts only where it was found close enough to exact attention. Step caching
    is computed: the best step, times the share of the forward passes that the built-in model needs
    with its default threshold. Random weights say nothing about that.
    """
    found = figures(records)
    if found.get(("exact", "tokens: image and text")) != FULL_TOKENS:
        found = {}  # of a small one they would say nothing
    theirs = found.get(("exact", "diffusers: time"))
    exact = found.get(("exact", "ours, whole: time"))
    linears, both = [], []
    for record in records:
        step, name = record.get("step"), record.get("name", "")
        if step in ("fp8", "int8") and name.endswith(": time") and (step, name) in found:
            if name == f"{step}, exact attention: time":
                linears.append(found[step, name])
            elif record.get("accepted"):
                both.append(found[step, name])
    forwards = [
        found.get(("yardstick", f"{name}: forwards")) for name in ("easy cache", "fp32")
    ]  # fmt: skip
    share = forwards[0] / forwards[1] if all(forwards) else None
    work, rate = found.get(("exact", "forward: work")), found.get(("environment", "GEMM: rate"))
    best = min(both, default=None)
    steps = "sparse forward"
    sparse = [
        (value + found[steps, name.replace("first", "second")]) / 2
        for (step, name), value in found.items()
        if step == steps and name.endswith(", fp8, first branch: time")
        and (steps, name.replace("first", "second")) in found
    ]  # fmt: skip

    def ratio(mine: float | None) -> float | None:
        return round(theirs / mine, 3) if theirs and mine else None

    return {
        "11 exact bf16": ratio(exact),
        "12 8-bit linears": ratio(min(linears, default=None)),
        "13 8-bit linears and attention": ratio(best),
        "14 and caching, computed": ratio(best * share if best and share else None),
        "sparse step with 8-bit linears": ratio(min(sparse, default=None)),
        "15 share of the matrix product": (
            round(work / exact / rate, 3) if work and exact and rate else None
        ),
    }


# --- running ------------------------------------------------------------------------------------


def plan(only: Sequence[str], planted: bool) -> list[Step]:
    """The steps to run; planted ones stand in the middle."""
    chosen = [step for step in STEPS if not only or step.name in only]
    middle = len(chosen) // 2
    return [*chosen[:middle], *PLANTED, *chosen[middle:]] if planted else chosen


def allowed(step: Step, left_s: float, spare_s: float, is_full: bool) -> float | None:
    """Seconds that a step may take, None if it is not worth starting.

    Args:
        left_s: of the budget. spare_s: what earlier steps left of their limits.
    """
    limit = step.limit_s + spare_s if is_full else TINY_SECONDS
    if step in PLANTED:
        limit = step.limit_s
    limit = min(limit, left_s)
    return None if limit < min(LEAST_SECONDS, step.limit_s) else limit


def how_it_ended(code: int) -> str:
    """An exit code in words."""
    if code == 0:
        return "ok"
    if code > 0:
        return f"failed with exit code {code}"
    with suppress(ValueError):
        return f"died of {signal.Signals(-code).name}"
    return f"died of signal {-code}"


def run_process(command: Sequence[str], limit_s: float, stderr: IO[bytes]) -> str:
    """Run a command in a process group that is gone afterwards; how it ended, in words."""
    process = subprocess.Popen(command, stderr=stderr, start_new_session=True)
    try:
        return how_it_ended(process.wait(timeout=limit_s))
    except subprocess.TimeoutExpired:
        return f"killed at its limit of {limit_s:.0f} s"
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # one that waits for a driver may not go
            process.wait(timeout=5)


def run_step(step: Step, limit_s: float, options: Sequence[str], scratch: Path) -> dict:
    """Run one step; the record of how it ended."""
    command = [sys.executable, __file__, "--step", step.name, *options]
    started = time.monotonic()
    with (scratch / "stderr").open("w+b") as stderr:
        ended = run_process(command, limit_s, stderr)
        stderr.seek(0)
        said = stderr.read().decode(errors="replace")
    took = round(time.monotonic() - started, 2)
    record = {"step": step.name, "ended": ended, "seconds": took, "limit": round(limit_s, 1)}
    return record if ended == "ok" else {**record, "stderr": said[-1500:]}


def check(
    steps: Sequence[Step], size: str, device: str, out: Path, budget_s: float,
    started: float | None = None,
) -> Path:  # fmt: skip
    """Run steps one after the other within a budget.

    Returns:
        the file of the records.
    """
    started = time.monotonic() if started is None else started
    results = out / "results.jsonl"
    results.unlink(missing_ok=True)
    run = {"size": size, "device": device, "steps": [step.name for step in steps]}
    append(results, {"run": run})
    spare = 0.0
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        options = ["--size", size, "--device", device, "--out", str(out), "--site", folder]
        if device.startswith("cuda"):
            install(WHEELS, Path(folder))
        for step in steps:
            left = budget_s - (time.monotonic() - started)
            limit = allowed(step, left, spare, size == "full")
            if limit is None:
                record = {"step": step.name, "ended": "skipped: no time left", "seconds": 0.0}
            else:
                record = run_step(step, limit, options, Path(folder))
                spare = max(0.0, spare + step.limit_s - record["seconds"])
            append(results, record)
            print(f"-- {step.name}: {record['ended']}, {record['seconds']} s", flush=True)
    return results


def _module(wheel: Path) -> str:
    distribution = wheel.name.split("-")[0]
    return MODULES.get(distribution, distribution)


def install(wheels: Path, site: Path) -> None:
    """Install what was carried along and is not there already, for the steps to import."""
    missing = [
        wheel for wheel in sorted(wheels.glob("*.whl"))
        if importlib.util.find_spec(_module(wheel)) is None
    ]  # fmt: skip
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    pip += ["--no-compile", "--no-cache-dir", "--upgrade", "--target", str(site)]
    for wheel in missing:  # one that does not fit this Python stops none of the others
        with suppress(subprocess.TimeoutExpired):
            subprocess.run([*pip, str(wheel)], check=False, timeout=30)
    print("Wheels carried along:", ", ".join(w.name for w in missing) or "none needed", flush=True)


# --- the steps' side ------------------------------------------------------------------------------


def take_step(options: argparse.Namespace) -> None:
    """Be a step, or a child of one."""
    functions = {step.name: step.function for step in (*STEPS, *PLANTED)} | CHILDREN
    module, function = functions[options.step].split(":")
    results = options.out / "results.jsonl"
    name = options.within or options.step

    def write(record: dict) -> None:
        record = {"step": name, **record}
        append(results, record)
        print(short_line(record), flush=True)

    def run_child(child: str, limit_s: float) -> str:
        command = [sys.executable, __file__, "--step", child, "--within", name]
        command += ["--size", options.size, "--device", options.device]
        command += ["--out", str(options.out), "--site", str(options.site)]
        try:
            return how_it_ended(subprocess.run(command, check=False, timeout=limit_s).returncode)
        except subprocess.TimeoutExpired:
            return f"killed at its limit of {limit_s:.0f} s"

    sys.path.append(str(options.site))
    if module == "gpu_check":
        globals()[function](write, run_child, options.device)
        return
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "bench")]
    context = importlib.import_module("gpu_steps").make_context(
        options.device, options.size == "full", write, run_child
    )
    getattr(importlib.import_module(module), function)(context)


def process_memory(write: Write, run_child: Callable[[str, float], str], device: str) -> None:
    """What a process takes that holds nothing else, and streaming; this one stays off the GPU."""
    for name, limit_s in MEMORY_CHILDREN.items():
        if not device.startswith("cuda"):
            write({"name": name, "skipped": "weights are already on the only device"})
            continue
        ended = run_child(name, limit_s)
        if ended != "ok":
            write({"name": name, "problem": f"its process {ended}"})


def planted_crash(write: Write, *_: object) -> None:
    """Write a figure and die as a process with a broken driver does."""
    write({"name": "before the crash", "value": 1, "unit": ""})
    os.abort()


def planted_hang(write: Write, *_: object) -> None:
    """Write a figure and never end."""
    write({"name": "before the hang", "value": 1, "unit": ""})
    while True:
        time.sleep(1)


def planted_miss(write: Write, *_: object) -> None:
    """Write a figure that misses its bound, then a problem and one more figure."""
    write({"name": "planted: value", "value": 2.0, "unit": ""})
    write({"name": "planted: other", "problem": "a measurement that failed"})
    write({"name": "planted: last", "value": 3.0, "unit": ""})


# --- the end --------------------------------------------------------------------------------------


def table(records: Sequence[dict], room: int) -> str:
    """All figures, step by step, what belongs to one subject on one line; in so many characters.

    A name is "subject: quantity". Where the room is too small the longest steps lose lines.
    """
    blocks: dict[str, dict[str, list[str]]] = {}
    last = {(r["step"], r["name"]): r for r in records if "value" in r}
    for (step, name), record in last.items():
        subject, _, quantity = name.rpartition(": ")
        text = f"{quantity} {shown(record['value'])} {record.get('unit', '')}".rstrip()
        blocks.setdefault(step, {}).setdefault(subject, []).append(text)
    lines = {
        step: [f"  {subject + ': ' if subject else ''}{', '.join(texts)}"
               for subject, texts in subjects.items()]
        for step, subjects in blocks.items()
    }  # fmt: skip
    dropped = dict.fromkeys(lines, 0)

    def render() -> str:
        parts = []
        for step, own in lines.items():
            more = [f"  ... {dropped[step]} more lines in the file"] if dropped[step] else []
            parts.append("\n".join([f"[{step}]", *own, *more]))
        return "\n".join(parts)

    text = render()
    while len(text) > room and any(lines.values()):
        longest = max(lines, key=lambda step: sum(map(len, lines[step])))
        lines[longest].pop()
        dropped[longest] += 1
        text = render()
    return text


def summary(records: Sequence[dict]) -> tuple[str, bool]:
    """The last lines of the screen, and whether nothing is wrong."""
    problems = judge(records)
    run = next(r["run"] for r in records if "run" in r)
    ended = {r["step"]: r for r in records if "ended" in r}
    told: list[str] = []
    for problem in problems:
        if sum(map(len, told)) > PROBLEM_ROOM:
            told.append(f"{len(problems) - len(told)} more: see report.py")
            break
        told.append(problem[:200])
    result = {
        "gpu_check": run["size"],
        "steps": {
            name: {"ended": ended[name]["ended"], "seconds": ended[name]["seconds"]}
            for name in run["steps"]
            if name in ended
        },
        "problems": told,
        "bars": bars(records),
    }
    listed = "\n".join(["Problems:", *(f"  {problem}" for problem in told or ["none"])])
    line = json.dumps(result)
    figures_ = table(records, SCREEN - len(listed) - len(line))
    return f"{figures_}\n{listed}\n{line}", not problems


def main() -> int:
    """Parse, run the steps and print what came of them; or be one of the steps."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=("full", "tiny"), help="full where there is a GPU")
    parser.add_argument("--device", help="cuda where there is one")
    parser.add_argument("--out", type=Path, help="where results.jsonl goes")
    names = [step.name for step in STEPS]
    parser.add_argument("--only", choices=names, action="append", default=[])
    parser.add_argument("--budget", type=float, default=BUDGET_SECONDS, help="seconds for all")
    parser.add_argument("--plant", action="store_true", help=argparse.SUPPRESS)
    for hidden in ("--step", "--within"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--site", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        take_step(options)
        return 0
    device = options.device or _default_device()
    size = options.size or ("full" if device.startswith("cuda") else "tiny")
    if size == "full" and not device.startswith("cuda"):
        parser.error("full size needs a CUDA device")
    out = options.out or Path(os.environ.get("OUT") or tempfile.mkdtemp(prefix="gpu-check-out-"))
    out.mkdir(parents=True, exist_ok=True)
    print(f"Figures go to {out / 'results.jsonl'}", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stopped from outside: still report
    with suppress(KeyboardInterrupt):
        check(plan(options.only, options.plant), size, device, out, options.budget, started)
    text, is_well = summary(read(out / "results.jsonl"))
    print(text, flush=True)
    return 0 if is_well else 1


def _default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    sys.exit(main())
