"""Which implementation of each operator runs on a device, and why.

Decided once per operator, device and 8-bit format, at first use: a kernel must be fit for the
device and must agree there with its reference on a small input. One that does not, or fails to
start, or returns NaN, is switched off, which is said once; the reference then runs in its place.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

log = logging.getLogger(__name__)

#: the oldest that the kernels were compiled and interpreted with; 3.6 and 3.9 are the others
MIN_TRITON = (3, 4)
MIN_CAPABILITY = (7, 5)
#: of a dtype read or written by a kernel: the first with instructions for it
DTYPE_CAPABILITY = {torch.bfloat16: (8, 0), torch.float8_e4m3fn: (8, 9)}
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
#: 32 float32 registers in each thread of 32 warps
MAX_WIDTH = 32_768
MAX_ROTATION = 256
HEAD_DIMS = (16, 32, 64, 128, 256)

#: tokens that plain torch works on at a time: float32 copies of a whole clip would take gigabytes
PIECE_TOKENS = 4096

#: largest relative L2 difference from the reference, both rounded to the same format: a value in a
#: few thousand lies so close to a tie that it falls the other way
SELF_TEST_BOUND = 5e-3


@dataclass(frozen=True)
class DeviceDescription:
    """What the choice depends on.

    type: "cpu", "cuda", ... capability: (major, minor) of an NVIDIA GPU, else None.
    triton: its version; empty where it is missing. triton_problem: why it is.
    """

    type: str
    name: str = ""
    capability: tuple[int, int] | None = None
    triton: str = ""
    triton_problem: str = ""


class Choice(NamedTuple):
    """kernel: what runs instead of the reference, or None. reason: for either, for people."""

    kernel: Callable[..., Any] | None
    reason: str


_references: dict[str, Callable[..., Any]] = {}
_choices: dict[tuple[str, torch.device, torch.dtype | None], Choice] = {}
_descriptions: dict[torch.device, DeviceDescription] = {}
_said: set[str] = set()


def describe(device: torch.device) -> DeviceDescription:
    """Look at a device, and at Triton if it is one that Triton could serve."""
    if device.type != "cuda":
        return DeviceDescription(device.type)
    name = torch.cuda.get_device_name(device)
    if torch.version.hip is not None:
        return DeviceDescription(device.type, name)
    version = problem = ""
    try:
        import triton
    except ImportError:
        problem = "Triton is not installed: pip install triton (on Windows: triton-windows)"
    except Exception as error:  # noqa: BLE001 - a broken package must not break the run
        problem = f"Triton is installed but does not load ({_brief(error)}): reinstall it"
    else:
        version = triton.__version__
    capability = torch.cuda.get_device_capability(device)
    return DeviceDescription(device.type, name, capability, version, problem)


def load_kernels() -> ModuleType:
    """The module of the Triton kernels; imports Triton."""
    from . import triton_kernels

    return triton_kernels


def dispatcher(name: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    """What the operator `name` does on CUDA devices: a kernel if one is chosen for the arguments.

    Args:
        name: of the operator, of its reference and of its kernel.
        reference: what it computes.
    """
    _references[name] = reference

    plain = in_pieces(name, reference)

    def dispatch(*args: Any) -> Any:
        device = args[0].device
        kernel, reason = choose(name, device, _format(args))
        if kernel is not None:
            reason = unsuited(name, args, _describe_once(device).capability)
            if not reason:
                return kernel(*args)
            _say(f"{name} runs in plain torch on {device}: {reason}.")
        return plain(*args)

    return dispatch


def in_pieces(name: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    """The reference of a row operator over a few thousand tokens at a time.

    Rows do not depend on each other, so this is the same. The group operators are handed pieces.
    """
    if name.startswith("group"):
        return reference

    def run(*args: Any) -> Any:
        x = args[0]
        tokens = x.shape[1]
        if x.is_meta or x.ndim < 3 or tokens <= PIECE_TOKENS:
            return reference(*args)
        wholes: list[Tensor] = []
        for start in range(0, tokens, PIECE_TOKENS):
            span = slice(start, start + PIECE_TOKENS)
            returned = reference(*(_part(each, tokens, span) for each in args))
            if returned is None:  # in place
                continue
            pieces = [returned] if isinstance(returned, Tensor) else list(returned)
            if not wholes:
                wholes = [each.new_empty(each.shape[0], tokens, *each.shape[2:]) for each in pieces]
            for whole, piece in zip(wholes, pieces, strict=True):
                whole[:, span] = piece
        return (wholes[0] if len(wholes) == 1 else tuple(wholes)) if wholes else None

    return run


def _part(each: Any, tokens: int, span: slice) -> Any:
    """The tokens of an argument that has some; a rope table has them in its first dimension."""
    if not isinstance(each, Tensor):
        return each
    if each.is_complex():
        return each[span]
    return each[:, span] if each.ndim >= 3 and each.shape[1] == tokens else each


def choose(name: str, device: torch.device, to: torch.dtype | None = None) -> Choice:
    """The implementation of an operator on a device; decided at the first call, then remembered.

    Args:
        to: the 8-bit dtype of the result, for operators that round to one.
    """
    key = (name, device, to)
    if key not in _choices:
        _choices[key] = _decide(name, device, to)
    return _choices[key]


def report(device: torch.device) -> dict[str, str]:
    """Operator -> what runs on the device and why, for all operators.

    On a GPU this runs the self-test of every kernel not yet decided on: seconds at first use.
    """
    found = {}
    for name in _references:
        formats: list[torch.dtype | None] = [None]
        if "quantize" in name:
            formats = [torch.float8_e4m3fn, torch.int8]
        lines = {to: choose(name, device, to).reason for to in formats}
        if len(set(lines.values())) == 1:
            found[name] = next(iter(lines.values()))
        else:
            found[name] = "; ".join(f"{_short(to)}: {line}" for to, line in lines.items())
    return found


def unsuited(name: str, args: tuple[Any, ...], capability: tuple[int, int] | None) -> str:
    """Why a kernel that works on the device does not take these arguments; empty if it does."""
    x = args[0]
    if x.numel() == 0:
        return "the input is empty"
    for each in args:
        if not isinstance(each, Tensor) or each.is_complex():
            continue
        if each.dtype not in KERNEL_DTYPES:
            return f"the kernels take float16, bfloat16 and float32, not {_short(each.dtype)}"
        if capability is not None and capability < DTYPE_CAPABILITY.get(each.dtype, (0, 0)):
            return f"{_short(each.dtype)} is emulated on compute capability {_dotted(capability)}"
    if name == "qk_norm_rope_":
        if x.shape[-1] not in HEAD_DIMS:
            return f"head size {x.shape[-1]} is not one of {HEAD_DIMS}"
        if x.stride(-1) != 1:
            return f"the channels of a head are {x.stride(-1)} elements apart"
    elif x.ndim == 3 or "quantize" in name:
        if x.shape[-1] > MAX_WIDTH:
            return f"rows of {x.shape[-1]} channels are wider than {MAX_WIDTH}"
        if _format(args) is not None and args[-1] > MAX_ROTATION:
            return f"a rotation of {args[-1]} channels is wider than {MAX_ROTATION}"
    return ""


def sample(name: str, dtype: torch.dtype, to: torch.dtype | None = None) -> tuple[Any, ...]:
    """Arguments of the self-test: the widths of the model, an odd number of rows, strided views.

    Drawn from a generator of their own, so that no seed of the caller's moves.
    """
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    rounding = () if to is None else (to, MAX_ROTATION if to == torch.int8 else 0)
    if name == "group_moments":
        return 3 * draw(2, 8, 3, 5, 7) + 1, 4
    if name == "group_norm_silu":
        scale, shift = draw(2, 2, 8, 1, 1, 1).float()
        return draw(2, 8, 4, 5, 7)[:, :, 1:], scale, shift
    if name == "qk_norm_rope_":
        rope = torch.polar(torch.ones(3, 64), draw(3, 64).float())
        return draw(2, 5, 3, 24, 128), *(1 + 0.1 * draw(4, 128)), rope
    if name in ("gelu_quantize", "quantize_rows"):
        width = 12_288 if name == "gelu_quantize" else 3072
        return draw(2, 4, width)[:, 1:], *rounding
    vectors = draw(2, 1, 3 * 3072).chunk(3, dim=-1)
    tokens = [2 * draw(2, 4, 3072)[:, 1:] + 1, draw(2, 3, 3072)]
    if name.startswith("layer_norm"):
        return tokens[0], *vectors[:2], *rounding
    if name == "gated_residual_sum":
        return *tokens, draw(2, 3, 3072), vectors[0]
    return (*tokens, *(vectors[:1] if name == "gated_residual" else vectors), *rounding)


def self_test(
    name: str, kernel: Callable[..., Any], device: torch.device, dtype: torch.dtype,
    to: torch.dtype | None = None,
) -> float:  # fmt: skip
    """Largest relative L2 difference of a kernel's results from its reference's; NaN if it has one.

    Results in 8 bits are compared after multiplication with their scales.
    """
    results = []
    for function in (_references[name], kernel):
        args = tuple(
            a.to(device, copy=True) if isinstance(a, Tensor) else a for a in sample(name, dtype, to)
        )
        returned = function(*args)
        if returned is None:  # in place
            returned = args[0]
        outputs = [returned] if isinstance(returned, Tensor) else list(returned)
        if to is not None:
            scale = outputs.pop()
            outputs[-1] = outputs[-1].float() * scale
        results.append([each.double().cpu() for each in outputs])
    differences = [
        ((ours - right).norm() / right.norm()).item() for right, ours in zip(*results, strict=True)
    ]
    return math.nan if any(map(math.isnan, differences)) else max(differences)


def _decide(name: str, device: torch.device, to: torch.dtype | None) -> Choice:
    where = _describe_once(device)
    problem = _unfit(where, to)
    if problem:
        if where.type == "cuda":
            label = f"{device} ({where.name})"
            _say(f"The kernels run in plain torch on {label}: {problem}.")
        return Choice(None, f"plain torch: {problem}")
    dtype = torch.bfloat16
    if where.capability is not None and where.capability < DTYPE_CAPABILITY[dtype]:
        dtype = torch.float16
    try:
        kernel = getattr(load_kernels(), name)
        with torch.no_grad():
            difference = self_test(name, kernel, device, dtype, to)
    except Exception as error:  # noqa: BLE001 - whatever a compiler or driver says, work goes on
        problem = f"the self-test failed to run ({_brief(error)})"
    else:
        if math.isnan(difference):
            problem = "the self-test returned NaN"
        elif difference > SELF_TEST_BOUND:
            problem = f"the self-test differs from the reference by {difference:.2g}"
        else:
            reason = f"Triton {where.triton}: self-test passed, difference {difference:.1g}"
            return Choice(kernel, reason)
    suffix = "" if to is None else f" ({_short(to)})"
    _say(f"{name}{suffix} runs in plain torch on {device}: {problem}.")
    return Choice(None, f"plain torch: {problem}")


def _unfit(where: DeviceDescription, to: torch.dtype | None) -> str:
    if where.type != "cuda":
        return f"the kernels are for NVIDIA GPUs, not for {where.type}"
    if where.capability is None:
        return "the kernels are for NVIDIA GPUs, not for AMD's"
    if where.triton_problem:
        return where.triton_problem
    if _version(where.triton) < MIN_TRITON:
        return f"Triton {where.triton} is older than {_dotted(MIN_TRITON)}: update it"
    if where.capability < MIN_CAPABILITY:
        return (
            f"compute capability {_dotted(where.capability)} is below {_dotted(MIN_CAPABILITY)}, "
            "the least that Triton serves"
        )
    needed = DTYPE_CAPABILITY.get(to, (0, 0)) if to is not None else (0, 0)
    if where.capability < needed:
        return (
            f"{_short(to)} needs compute capability {_dotted(needed)}, this device has "
            f"{_dotted(where.capability)}"
        )
    return ""


def _describe_once(device: torch.device) -> DeviceDescription:
    if device not in _descriptions:
        _descriptions[device] = describe(device)
    return _descriptions[device]


def _format(args: tuple[Any, ...]) -> torch.dtype | None:
    return next((a for a in args if isinstance(a, torch.dtype)), None)


def _say(message: str) -> None:
    if message not in _said:
        _said.add(message)
        log.warning(message)


def _version(text: str) -> tuple[int, ...]:
    """The leading two numbers of a version; 3.4.0+git is (3, 4)."""
    parts = text.split(".")[:2]
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in parts)


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _short(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def _brief(error: Exception) -> str:
    """Kind and last line of an error, where compilers put what matters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1][:200]}" if lines else type(error).__name__
