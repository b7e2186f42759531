"""Decides whether a fast path runs on a device, and says why.

Fused kernels (operators.py), 8-bit GEMMs (quant.py), GELU in the epilogue of a GEMM (linear.py) and
attention (attention.py) keep their own tables of candidates; a row of such a table becomes a
`Candidate`, and this module does the rest: `decide` probes candidates against their reference,
times them and picks one; `remembered` keeps the `Decision`; `log_decision` logs it once; `report`
lists decisions for `doctor`. An error that passes, such as a full or busy device, is never
remembered as a verdict.

Environment variables, read in this module only:

* `SKYREELS_BACKEND`: "auto"; "reference" for plain torch everywhere, without importing Triton;
  "triton" for our kernels wherever they pass their self-test, even where others are faster.
* `SKYREELS_ATTENTION`: "auto", or the name of one attention kernel (attention.PINS).
"""

import contextlib
import importlib
import importlib.util
import logging
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import MEMORY_WORDS, OptionError

logger = logging.getLogger("skyreels.kernels.dispatch")

BACKEND_VARIABLE, ATTENTION_VARIABLE = "SKYREELS_BACKEND", "SKYREELS_ATTENTION"
BACKENDS = ("auto", "reference", "triton")
#: the oldest version that the kernels were compiled and interpreted with; torch 2.8 brings it
MIN_TRITON = (3, 4)
MIN_TRITON_TORCH = "2.8"
#: tensors passed to a kernel start at a multiple of this address: the widest load of a Triton
#: kernel, and what vendors' kernels require
BYTE_ALIGNMENT = 16
#: a device that is timed is kept busy for twice as long as the launches took before, within these
#: seconds; counted in cycles of a clock that none exceeds, so rather longer
HOLD_SECONDS = (1e-3, 5e-2)
HOLD_CLOCK_HZ = 3e9
#: how torch, cuBLAS, cuDNN and the driver report an error that passes: no memory, device in use
_PASSING = (*MEMORY_WORDS, "busy or unavailable")
#: errors after which nothing runs on the device in this process any more
_STICKY = (
    "illegal memory access",
    "misaligned address",
    "illegal instruction",
    "illegal address",
    "unspecified launch failure",
    "device-side assert",
)


class Decision(NamedTuple):
    """Which implementation runs, and why.

    Attributes:
        impl: what runs; None where the fallback does.
        reason: for people.
        name: of what runs, for people.
        is_final: False where an error that passes decided, so that a later call tries again.
    """

    impl: Any
    reason: str
    name: str = "plain torch"
    is_final: bool = True


@dataclass(frozen=True)
class DeviceInfo:
    """The properties of a device that decide which fast paths it can run.

    Attributes:
        type: "cpu", "cuda", ...
        name: of the GPU.
        capability: (major, minor) of an NVIDIA GPU, else None.
        cudnn: 91900 for 9.19.0, 0 for none.
        has_flash: whether torch was built with its flash kernels for CUDA.
        triton: its version; empty where it is missing.
        triton_problem: why Triton cannot be used; empty if it can.
    """

    type: str
    name: str = ""
    capability: tuple[int, int] | None = None
    cudnn: int = 0
    has_flash: bool = True
    triton: str = ""
    triton_problem: str = ""


@dataclass(frozen=True)
class Finding:
    """What a probe measured.

    Attributes:
        errors: by kind of input.
        tolerance: the largest error that is accepted.
    """

    errors: Mapping[str, float]
    tolerance: float

    @property
    def is_accepted(self) -> bool:
        """Whether every error is within the tolerance; NaN is not."""
        return all(error <= self.tolerance for error in self.errors.values())

    def __str__(self) -> str:
        """The worst error, with its kind of input."""
        kind = max(self.errors, key=lambda k: (math.isnan(self.errors[k]), self.errors[k]))
        text = f"error {self.errors[kind]:.2g}" + (f" ({kind})" if kind else "")
        return text if self.is_accepted else f"{text}, {self.tolerance:.2g} is allowed"


class Candidate(NamedTuple):
    """A fast path that may be used on a device.

    Attributes:
        name: for people; unique among the candidates of a decision.
        load: imports and returns the implementation; may raise anything.
        probe: runs the implementation and compares it with its reference; may raise anything.
        problem: why it cannot run on the device, known without trying; empty if it may.
    """

    name: str
    load: Callable[[], Any]
    probe: Callable[[Any], Finding]
    problem: str = ""


# --- the device ---------------------------------------------------------------------------------


def backend() -> str:
    """Read `SKYREELS_BACKEND`.

    Returns:
        "auto", "reference" or "triton".

    Raises:
        OptionError: the variable holds something else.
    """
    value = os.environ.get(BACKEND_VARIABLE, "").strip().lower() or "auto"
    if value not in BACKENDS:
        raise OptionError(
            f"{BACKEND_VARIABLE} is {value!r}, which is not one of {', '.join(BACKENDS)}: "
            "correct it, or remove it from the environment."
        )
    return value


def attention_pin() -> str:
    """What `SKYREELS_ATTENTION` asks for, in lower case; "auto" where it is not set."""
    return os.environ.get(ATTENTION_VARIABLE, "").strip().lower() or "auto"


def describe(device: torch.device) -> DeviceInfo:
    """What a device is, and whether Triton can serve it; cached."""
    return _describe(device, backend())


@lru_cache
def _describe(device: torch.device, backend_name: str) -> DeviceInfo:
    if device.type != "cuda":
        return DeviceInfo(device.type)
    name = torch.cuda.get_device_name(device)
    has_flash = torch.backends.cuda.is_flash_attention_available()
    if torch.version.hip is not None:
        return DeviceInfo(device.type, name, has_flash=has_flash)
    version, problem = find_triton(backend_name)
    capability = torch.cuda.get_device_capability(device)
    cudnn_version: Any = torch.backends.cudnn.version  # untyped in torch
    cudnn = cudnn_version() or 0
    return DeviceInfo(device.type, name, capability, cudnn, has_flash, version, problem)


def find_triton(backend_name: str) -> tuple[str, str]:
    """Import Triton, as only that shows whether it loads; not where plain torch is pinned.

    Returns:
        Its version, and why our kernels cannot use it; either may be empty.
    """
    if backend_name == "reference":
        return "", f"{BACKEND_VARIABLE}=reference"
    package = "triton-windows" if sys.platform == "win32" else "triton"
    try:
        version = str(importlib.import_module("triton").__version__)
    except ImportError:
        return "", f"Triton is not installed: pip install {package}"
    except Exception as error:  # noqa: BLE001 - a broken package must not break the run
        return "", f"Triton is installed but does not load ({brief(error)}): reinstall {package}"
    if version_numbers(version) < MIN_TRITON:
        # Triton belongs to its torch: a newer one alone would not fit
        return version, (
            f"Triton {version} is older than {dotted(MIN_TRITON)}: update torch to "
            f"{MIN_TRITON_TORCH} or newer, which brings a newer one"
        )
    return version, ""


def triton_problem(info: DeviceInfo) -> str:
    """Why our Triton kernels cannot run on a device; empty if they can."""
    if info.type != "cuda":
        return f"our kernels are for NVIDIA GPUs, not for {info.type}"
    if info.capability is None:
        return "our kernels are for NVIDIA GPUs, not for AMD's"
    return info.triton_problem or ("" if info.triton else "Triton is not installed")


def sm(info: DeviceInfo) -> str:
    """sm90 for compute capability 9.0."""
    major, minor = info.capability or ("?", "")
    return f"sm{major}{minor}"


def current_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make a GPU the current device within the block, as launches go to the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


# --- probe, timer, decision ---------------------------------------------------------------------


def relative_l2(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest relative L2 error of the outputs.

    Returns:
        The error; NaN if any output has one.

    Raises:
        RuntimeError: an output has another shape than expected.
    """
    errors = []
    for ours, right in zip(got, expected, strict=True):
        if ours.shape != right.shape:
            raise RuntimeError(f"it returns {list(ours.shape)} for {list(right.shape)}")
        exact = right.double().cpu()
        errors.append(((ours.double().cpu() - exact).norm() / exact.norm()).item())
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def probe(
    candidate: Callable[..., Sequence[Tensor]],
    reference: Callable[..., Sequence[Tensor]],
    inputs: Iterable[tuple[str, tuple[Any, ...]]],
    tolerance: float,
    error: Callable[[Sequence[Tensor], Sequence[Tensor]], float] = relative_l2,
) -> Finding:
    """Compare an implementation with its reference.

    Args:
        candidate: takes the arguments of each input and returns its outputs.
        reference: the same; neither may write to its arguments.
        inputs: (kind of input, arguments); drawn one after another, so that one is held at a time.
        tolerance: the largest error that is accepted.
        error: of the candidate's outputs beside the reference's.

    Returns:
        The error on each input.
    """
    errors = {}
    for kind, args in inputs:
        errors[kind] = error(candidate(*args), reference(*args))
        del args  # before the next are drawn
    return Finding(errors, tolerance)


def median_ms(
    contenders: Mapping[str, Callable[[], object]], device: torch.device, rounds: int = 3
) -> dict[str, float]:
    """Time calls, after one to warm up: on a CUDA device what it does, not the launches.

    In a run the host launches kernels long before the device gets to them, but a call that is timed
    alone waits for its launches: on an H100, 8-bit GEMMs that take 0.2 ms seemed to take 0.6. So
    the device is kept busy while a call is launched. Contenders take turns, as clocks may still be
    rising.

    Returns:
        Name -> median milliseconds.
    """
    event: Any = torch.cuda.Event  # untyped in torch, like the other
    hold: Any = torch.cuda._sleep
    is_cuda = device.type == "cuda"
    times: dict[str, list[float]] = {name: [] for name in contenders}
    launch_s = dict.fromkeys(contenders, 0.0)
    with current_device(device):
        for round_ in range(rounds + 1):
            for name, function in contenders.items():
                if is_cuda:
                    start, end = (event(enable_timing=True) for _ in range(2))
                    least, most = HOLD_SECONDS
                    hold_s = min(max(2 * launch_s[name], least), most)
                    hold(int(hold_s * HOLD_CLOCK_HZ))
                    start.record()
                began = time.perf_counter()
                function()
                launch_s[name] = time.perf_counter() - began
                milliseconds = 1e3 * launch_s[name]
                if is_cuda:
                    end.record()
                    end.synchronize()
                    milliseconds = start.elapsed_time(end)
                if round_:
                    times[name].append(milliseconds)
    return {name: statistics.median(values) for name, values in times.items()}


def decide(
    candidates: Sequence[Candidate],
    fallback: str,
    *,
    clock: Callable[[dict[str, Any]], dict[str, float]] | None = None,
    size: str = "",
    min_gain: float = 1.0,
    must_be_timed: bool = False,
) -> Decision:
    """Probe candidates and pick the fastest that is accurate.

    Args:
        candidates: the preferred first; that order counts where nothing is timed.
        fallback: name of what runs where no candidate is picked.
        clock: implementations by name -> milliseconds of each and of the fallback; an empty result
            means that nothing can be timed. None picks the first that passes its probe.
        size: what is timed, for people.
        min_gain: how many times as fast as the fallback a candidate must be.
        must_be_timed: pick none where the clock fails.

    Returns:
        The decision; its reason names every candidate that was not picked, with its finding.

    Raises:
        RuntimeError: a probe broke the CUDA context.
    """
    passed: dict[str, Any] = {}
    findings = {candidate.name: candidate.problem for candidate in candidates}
    is_final = True
    for candidate in candidates:
        name = candidate.name
        if candidate.problem:
            continue
        try:
            impl = candidate.load()
            with _isolated():
                finding = candidate.probe(impl)
        except Exception as error:  # noqa: BLE001 - compilers and packages fail in ways of their own
            findings[name], stays = _failure(error, name)
            is_final &= stays
            continue
        if not finding.is_accepted:
            findings[name] = f"self-test failed, {finding}"
            continue
        findings[name], passed[name] = f"self-test passed, {finding}", impl
        if clock is None:
            break
    chosen = next(iter(passed), None)
    if clock is not None and passed:
        try:
            with _isolated():
                times = clock(passed)
        except Exception as error:  # noqa: BLE001 - as above
            problem, stays = _failure(error, "the timing")
            is_final &= stays
            chosen = None if must_be_timed else chosen
            for name in passed:
                findings[name] += f", its timing {problem}"
        else:
            chosen = _fastest(passed, times, fallback, min_gain) if times else chosen
            for name in passed if times else ():
                findings[name] += (
                    f", {times[name]:.3f} ms at {size}, {times[fallback] / times[name]:.2f} times "
                    f"as fast as {fallback}"
                )
    return _explain(chosen, passed, findings, fallback, is_final)


def _fastest(
    names: Iterable[str], times: Mapping[str, float], fallback: str, min_gain: float
) -> str | None:
    fastest = min(names, key=lambda name: times[name])
    return None if times[fallback] < min_gain * times[fastest] else fastest


def _explain(
    chosen: str | None,
    passed: Mapping[str, Any],
    findings: Mapping[str, str],
    fallback: str,
    is_final: bool,
) -> Decision:
    """The decision with its reason: each finding once, with the candidates it holds for."""
    names: dict[str, list[str]] = {}
    for name, finding in findings.items():
        if name != chosen and finding:  # empty if it was not tried, as another was preferred
            names.setdefault(finding, []).append(name)
    others = "; ".join(
        finding if len(group) == len(findings) else f"{', '.join(group)}: {finding}"
        for finding, group in names.items()
    )
    if chosen is None:
        return Decision(None, others, fallback, is_final)
    reason = findings[chosen] + (f". Not used: {others}" if others else "")
    return Decision(passed[chosen], reason, chosen, is_final)


@contextlib.contextmanager
def _isolated() -> Iterator[None]:
    """Run a trial outside of what the caller counts, traces or differentiates."""
    # private, but the only way to leave the dispatch modes of a counter
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes(), torch.inference_mode():
        yield


def is_passing(error: BaseException) -> bool:
    """Whether an error says only that the device was full or in use at that moment."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return any(words in text for words in _PASSING)


def broke_device(error: BaseException) -> bool:
    """Whether nothing runs on the GPU any more in this process after an error."""
    return any(words in str(error).lower() for words in _STICKY)


def _failure(error: Exception, what: str) -> tuple[str, bool]:
    """Judge an error in a trial.

    Returns:
        The problem for people, and whether it is a verdict.

    Raises:
        RuntimeError: the error broke the CUDA context; no other path would run either.
    """
    if is_passing(error):
        return f"found the device full or busy ({brief(error)}) and is tried again later", False
    if broke_device(error):
        raise RuntimeError(
            f"The self-test of {what} broke the CUDA context ({brief(error)}): nothing can run on "
            f"that GPU in this process any more. Restart with {BACKEND_VARIABLE}=reference in the "
            "environment, and please report this."
        ) from error
    return f"failed with {brief(error)}", True


# --- decisions that were made -------------------------------------------------------------------

_decisions: dict[Hashable, Decision] = {}
#: of those that are not final: calls left before the next trial, and calls to wait after that
_waits: dict[Hashable, tuple[int, int]] = {}


def remembered(key: Hashable, make: Callable[[], Decision]) -> Decision:
    """The decision for a key: made at the first call, and again until it is final.

    One that is not final is made again at the next call, then after two, four, eight more: on a
    card that stays full, layers must not pay for a trial at every call.

    Args:
        key: what is decided, on which device, with which settings.
        make: decides.

    Returns:
        The decision.
    """
    known = _decisions.get(key)
    if known is not None and known.is_final:
        return known
    left, gap = (1, 1) if known is None else _waits[key]
    if known is not None and left > 1:
        _waits[key] = left - 1, gap
        return known
    decision = _decisions[key] = make()
    _waits[key] = gap, 2 * gap
    return decision


def log_decision(
    subject: str, info: DeviceInfo, decision: Decision, preferred: str, source: logging.Logger
) -> None:
    """Log a decision once: a warning where a GPU does not run the preferred implementation."""
    is_warning = decision.name != preferred and info.type not in ("cpu", "meta")
    level = logging.WARNING if is_warning else logging.INFO
    log_once(f"{subject}: {decision.name} ({decision.reason}).", level, source)


def log_once(message: str, level: int = logging.WARNING, source: logging.Logger = logger) -> None:
    """Log a message, the first time only."""
    if message not in _logged:
        _logged.add(message)
        source.log(level, message)


_logged: set[str] = set()


def report(decisions: Mapping[str, Mapping[str, Decision]]) -> dict[str, str]:
    """What runs and why, for `doctor`.

    Args:
        decisions: subject -> variant, such as a dtype, -> decision.

    Returns:
        Subject -> finding; variants are named where they differ.
    """
    found = {}
    for subject, variants in decisions.items():
        lines = {name: f"{each.name}: {each.reason}" for name, each in variants.items()}
        if len(set(lines.values())) == 1:
            found[subject] = next(iter(lines.values()))
        else:
            found[subject] = "; ".join(f"{name}: {line}" for name, line in lines.items())
    return found


# --- words --------------------------------------------------------------------------------------


def is_installed(package: str) -> bool:
    """Whether a module is found, without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # half-removed, or switched off in sys.modules
        return False


def brief(error: BaseException) -> str:
    """Kind and decisive line of an error: a compiler's last line, of other errors the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    is_compiler = type(error).__module__.startswith("triton")
    line = lines[-1 if is_compiler else 0][:200] if lines else ""
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def short(dtype: torch.dtype | None) -> str:
    """float8_e4m3fn for torch.float8_e4m3fn."""
    return str(dtype).removeprefix("torch.")


def version_numbers(text: str) -> tuple[int, ...]:
    """The leading two numbers of a version; 3.4.0+git is (3, 4)."""
    parts = text.split(".")[:2]
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in parts)


def dotted(version: tuple[int, ...]) -> str:
    """3.4 for (3, 4)."""
    return ".".join(map(str, version))
