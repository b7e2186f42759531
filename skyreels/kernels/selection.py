"""Which implementation of each operator runs on a device, and why.

Decided once per operator, device and 8-bit format, at first use: a kernel must be fit for the
device and must agree there with its reference on a small input. One that does not, or fails to
start, or returns NaN, is switched off, which is said once; the reference then runs in its place.
"""

import math
from collections.abc import Callable, Hashable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import dispatch
from .dispatch import Decision, DeviceInfo, dotted, short

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


_references: dict[str, Callable[..., Any]] = {}
_decisions: dict[Hashable, Any] = {}


def load_kernels() -> ModuleType:
    """The module of the Triton kernels; imports Triton."""
    from .triton import norms as triton_kernels

    return triton_kernels


def dispatcher(name: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    """What the operator `name` does on CUDA devices: a kernel if one is chosen for the arguments.

    Args:
        name: of the operator, of its reference and of its kernel.
        reference: what it computes.
    """
    _references[name] = reference

    plain = in_pieces(name, reference)

    def run(*args: Any) -> Any:
        device = args[0].device
        kernel = choose(name, device, _format(args)).impl
        if kernel is not None:
            reason = unsuited(name, args, dispatch.describe(device).capability)
            if not reason:
                return kernel(*args)
            dispatch.say_once(f"{name} runs in plain torch on {device}: {reason}.")
        return plain(*args)

    return run


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


def choose(name: str, device: torch.device, to: torch.dtype | None = None) -> Decision:
    """The implementation of an operator on a device; decided at the first call, then remembered.

    Args:
        to: the 8-bit dtype of the result, for operators that round to one.
    Returns:
        its kernel, or None for the reference.
    """
    key = (name, device, to, dispatch.backend())
    return dispatch.remembered(_decisions, key, lambda: _decide(name, device, to))


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
            found[name] = "; ".join(f"{short(to)}: {line}" for to, line in lines.items())
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
            return f"the kernels take float16, bfloat16 and float32, not {short(each.dtype)}"
        if capability is not None and capability < DTYPE_CAPABILITY.get(each.dtype, (0, 0)):
            return f"{short(each.dtype)} is emulated on compute capability {dotted(capability)}"
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


def _decide(name: str, device: torch.device, to: torch.dtype | None) -> Decision:
    info = dispatch.describe(device)
    problem = _unfit(info, to)
    if problem:
        if info.type == "cuda":
            dispatch.say_once(
                f"The kernels run in plain torch on {device} ({info.name}): {problem}."
            )
        return Decision(None, f"plain torch: {problem}")
    dtype = torch.bfloat16
    if info.capability is not None and info.capability < DTYPE_CAPABILITY[dtype]:
        dtype = torch.float16
    is_final = True
    try:
        kernel = getattr(load_kernels(), name)
        with dispatch.apart():
            difference = self_test(name, kernel, device, dtype, to)
    except Exception as error:  # noqa: BLE001 - whatever a compiler or driver says, work goes on
        problem, is_final = dispatch.failed_trial(error, f"the kernel of {name}")
        problem = f"the self-test {problem}"
    else:
        if math.isnan(difference):
            problem = "the self-test returned NaN"
        elif difference > SELF_TEST_BOUND:
            problem = f"the self-test differs from the reference by {difference:.2g}"
        else:
            reason = f"Triton {info.triton}: self-test passed, difference {difference:.1g}"
            return Decision(kernel, reason)
    suffix = "" if to is None else f" ({short(to)})"
    dispatch.say_once(f"{name}{suffix} runs in plain torch on {device}: {problem}.")
    return Decision(None, f"plain torch: {problem}", is_final)


def _unfit(info: DeviceInfo, to: torch.dtype | None) -> str:
    if problem := dispatch.triton_problem(info):
        return problem
    assert info.capability is not None
    if info.capability < MIN_CAPABILITY:
        return (
            f"compute capability {dotted(info.capability)} is below {dotted(MIN_CAPABILITY)}, "
            "the least that Triton serves"
        )
    needed = DTYPE_CAPABILITY.get(to, (0, 0)) if to is not None else (0, 0)
    if info.capability < needed:
        return (
            f"{short(to)} needs compute capability {dotted(needed)}, this device has "
            f"{dotted(info.capability)}"
        )
    return ""


def _format(args: tuple[Any, ...]) -> torch.dtype | None:
    return next((a for a in args if isinstance(a, torch.dtype)), None)
