"""Whether a fast path runs on a device: what the device is, what was pinned, what a trial showed.

Fused kernels (selection.py), 8-bit products (quant.py), the GELU of a linear layer (linear.py) and
attention (attention.py) all ask here, and keep their own tables of candidates. A candidate is tried
once and the verdict is remembered; a trial that ran out of memory says nothing about the candidate
and is never remembered.

Environment, read here and nowhere else:

* `SKYREELS_BACKEND`: "auto"; "reference" for plain torch everywhere, without importing Triton;
  "triton" for our kernels wherever they pass their self-test, whatever is faster.
* `SKYREELS_ATTENTION`: "auto", or the name of one attention kernel (attention.PINS).
"""

import contextlib
import importlib
import importlib.util
import logging
import os
import statistics
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch

from ..errors import OptionError

logger = logging.getLogger("skyreels.kernels.dispatch")

BACKEND_VARIABLE, ATTENTION_VARIABLE = "SKYREELS_BACKEND", "SKYREELS_ATTENTION"
BACKENDS = ("auto", "reference", "triton")
#: the oldest that the kernels were compiled and interpreted with; torch 2.8 brings it
MIN_TRITON = (3, 4)
MIN_TRITON_TORCH = "2.8"
#: what is handed to a kernel starts at a multiple of this address: the widest load of a Triton
#: kernel, and what vendors' kernels ask for
BYTE_ALIGNMENT = 16
#: how torch, cuBLAS, cuDNN and the driver say that there was no room
_NO_ROOM = ("out of memory", "alloc_failed", "outofmemory")
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
    """impl: what runs, None for the slow path. reason: for either, for people.

    is_final: False where something passing decided, so that the next call asks again.
    """

    impl: Any
    reason: str
    is_final: bool = True


@dataclass(frozen=True)
class DeviceInfo:
    """What the choice of a fast path depends on.

    type: "cpu", "cuda", ... capability: (major, minor) of an NVIDIA GPU, else None.
    cudnn: 91900 for 9.19.0, 0 for none. has_flash: whether torch was built with its flash kernels
    for CUDA. triton: its version; empty where it is missing. triton_problem: why it cannot be used.
    """

    type: str
    name: str = ""
    capability: tuple[int, int] | None = None
    cudnn: int = 0
    has_flash: bool = True
    triton: str = ""
    triton_problem: str = ""


def backend() -> str:
    """What `SKYREELS_BACKEND` asks for: "auto", "reference" or "triton".

    Raises:
        OptionError: it holds something else.
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
    """Look at a device, and at Triton if it is one that Triton could serve; remembered."""
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
    cudnn = torch.backends.cudnn.version() or 0
    return DeviceInfo(device.type, name, capability, cudnn, has_flash, version, problem)


def find_triton(backend_name: str) -> tuple[str, str]:
    """Triton's version and why our kernels cannot use it; either may be empty.

    Imports Triton, as only that shows whether it loads; not where plain torch is pinned.
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
    """Why our Triton kernels cannot run on a device, "" if they can."""
    if info.type != "cuda":
        return f"our kernels are for NVIDIA GPUs, not for {info.type}"
    if info.capability is None:
        return "our kernels are for NVIDIA GPUs, not for AMD's"
    return info.triton_problem or ("" if info.triton else "Triton is not installed")


def sm(info: DeviceInfo) -> str:
    """sm90 for compute capability 9.0."""
    major, minor = info.capability or ("?", "")
    return f"sm{major}{minor}"


def remembered(
    decisions: dict[Hashable, Any], key: Hashable, decide: Callable[[], Decision]
) -> Decision:
    """The decision for a key: made at the first call, and again until it is final.

    One that is not is asked again at the next call, then after two, four, eight more: a card that
    stays full must not pay for a trial at every layer of every step.

    Args:
        decisions: those of the caller, and how long to wait with which.
    """
    known = decisions.get(key)
    if isinstance(known, Decision):
        return known
    gap = 1
    if known is not None:
        postponed, wait, gap = known
        if wait > 1:
            decisions[key] = postponed, wait - 1, gap
            return cast(Decision, postponed)
    decision = decide()
    decisions[key] = decision if decision.is_final else (decision, gap, 2 * gap)
    return decision


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch, a library or the driver only says that there was no room."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return any(words in text for words in _NO_ROOM)


def broke_device(error: BaseException) -> bool:
    """Whether nothing will run on the GPU any more in this process after an error."""
    return any(words in str(error).lower() for words in _STICKY)


def failed_trial(error: Exception, what: str) -> tuple[str, bool]:
    """What an error in the trial of a candidate means: (problem for people, whether it is final).

    Raises:
        RuntimeError: the error broke the CUDA context; no other path would run either.
    """
    if is_out_of_memory(error):
        return "had no room for its trial and is tried again at the next call", False
    if broke_device(error):
        raise RuntimeError(
            f"The trial of {what} broke the CUDA context ({brief(error)}): nothing can run on that "
            f"GPU in this process any more. Restart with {BACKEND_VARIABLE}=reference in the "
            "environment, and please report this."
        ) from error
    return f"failed with {brief(error)}", True


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Run a trial outside of what the caller counts, traces or differentiates."""
    # private, but the only way to leave the dispatch modes of a counter
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes(), torch.inference_mode():
        yield


def current_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make a GPU the current one for a while, where kernels of packages are launched."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def race(
    contenders: Mapping[str, Callable[[], object]], device: torch.device, rounds: int = 3
) -> dict[str, float]:
    """Median milliseconds of each on a CUDA device, after one call to warm up.

    They take turns, as clocks may still be rising.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    with current_device(device):
        for round_ in range(rounds + 1):
            for name, function in contenders.items():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                function()
                end.record()
                end.synchronize()
                if round_:
                    times[name].append(start.elapsed_time(end))
    return {name: statistics.median(each) for name, each in times.items()}


def say_once(message: str, level: int = logging.WARNING, source: logging.Logger = logger) -> None:
    """Log a message, the first time only."""
    if message not in _said:
        _said.add(message)
        source.log(level, message)


_said: set[str] = set()


def is_installed(package: str) -> bool:
    """Whether a module is found, without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # half-removed, or switched off in sys.modules
        return False


def brief(error: BaseException) -> str:
    """Kind and telling line of an error: a compiler's last, of all others the first."""
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
