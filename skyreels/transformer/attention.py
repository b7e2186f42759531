"""Joint attention without a mask: which kernel runs on a device, and why.

Text is trimmed to its true length before it enters the transformer, so every token may attend to
every other one and no kernel ever sees a mask: padded-and-masked and trimmed text give the same
numbers (3e-7 in fp32), but a boolean mask rules out the fast kernels. The transformer takes any
function of the type `Attention`.

Queries, keys and values usually are views of one buffer [B, S, 3, heads, D], each [B, heads, S, D]
with a contiguous head dimension. The output should be a view of [B, S, heads, D], which the next
projection reads without a copy. torch's kernels read and write like that, except for math, the last
resort. Before sm80 bfloat16 is upcast to float32, one head at a time.

`exact` is the default. `fast` uses kernels that round to 8 bits (fast_attention.py): each one found
is compared with exact attention on inputs of the run's own size (attention_quality.py), those that
pass are timed at that size, and the fastest is used. Where there is none, exact attention runs, and
the reasons are logged. For the environment variables see kernels/dispatch.py.
"""

import inspect
import logging
import math
from collections.abc import Hashable, Mapping
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import OptionError, OutOfRoomError
from ..kernels import dispatch
from ..kernels.dispatch import Candidate, Decision, DeviceInfo, Finding, short, sm
from . import fast_attention
from .attention_quality import KINDS, draw, exact_checked, run_checked
from .fast_attention import FAST

logger = logging.getLogger("skyreels.transformer.attention")

Attention = fast_attention.Attention

MODES = ("exact", "fast")
#: of 97 frames of 544x960 and 60 tokens of text
FULL_TOKENS = 51_060
#: older ones are wrong for lengths that 128 does not divide (pytorch issue 169849)
MIN_CUDNN = 91501
#: scores of all pairs may take this much where only torch's math kernel can serve
MAX_SCORE_BYTES = 2 * 10**9
#: a kernel in 8 bits must come this close to exact attention (relative L2) on every kind of input
FAST_ERROR = 4e-2
#: and be this many times as fast
FAST_GAIN = 1.05
#: shorter sequences (the text refiner's) cost next to nothing and stay exact
FAST_MIN_TOKENS = 1024
#: heads on which errors are measured; times are measured on those of the run
PROBED_HEADS = 4
#: bytes beside inputs and output, per element of a query, of the 8-bit kernel that needs the most:
#: SageAttention 1 holds a copy of the keys, 16-bit values, queries and keys in 8 bits
FAST_BYTES = 6

_CUDNN, _FLASH = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION
_EFFICIENT, _MATH = SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
_NAMES = {_CUDNN: "cuDNN", _FLASH: "flash", _EFFICIENT: "memory-efficient", _MATH: "math"}


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Exact attention by whichever kernel torch prefers, on any device, "meta" included.

    Args:
        query: [B, heads, S, D], one floating dtype.
        key: [B, heads, T, D].
        value: [B, heads, T, D].

    Returns:
        [B, heads, S, D] in the same dtype.
    """
    return F.scaled_dot_product_attention(query, key, value)


def choose_attention(
    device: torch.device | str,
    mode: str = "exact",
    *,
    heads: int = 24,
    head_dim: int = 128,
    tokens: int = FULL_TOKENS,
    dtype: torch.dtype = torch.bfloat16,
) -> Decision:
    """The attention to run on a device; logged once per device and process.

    Kernels in 8 bits are compared and timed at the size given, so there must be room for it, see
    `trial_bytes`.

    Args:
        device: of the queries.
        mode: "exact", or "fast" for a kernel that rounds to 8 bits. Where none is usable, exact
            attention is chosen, with a warning that names each and its reason.
        heads: of the queries.
        head_dim: of the queries.
        tokens: of the queries.
        dtype: of the queries.

    Returns:
        An `Attention` as `impl`, its name, and the reason.

    Raises:
        OptionError: an unknown mode, or an unknown kernel in `SKYREELS_ATTENTION`.
    """
    if mode not in MODES:
        raise OptionError(f"Attention {mode!r} is not one of {', '.join(MODES)}.")
    device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
    info, pin, level = dispatch.describe(device), _pin(), logging.INFO
    chosen = exact = _exact(info, dtype, pin)
    if mode == "fast":
        chosen = _fastest(info, device, Size(heads, head_dim, tokens, dtype), exact, pin)
        if chosen.impl is None:
            reason, level = f"fast attention unavailable ({chosen.reason})", logging.WARNING
            chosen = Decision(exact.impl, reason, exact.name)
        else:
            chosen = chosen._replace(impl=_only_long(chosen.impl, exact.impl))
    kind = "8 bits" if chosen.impl is not exact.impl else "exact"
    text = f"Attention on {device}: {chosen.name}, {kind}: {chosen.reason}."
    dispatch.log_once(text, level, logger)
    return chosen


def trial_bytes(heads: int, head_dim: int, tokens: int, dtype: torch.dtype) -> int:
    """Bytes that trials of 8-bit kernels at this size take: inputs, output, and their copies."""
    return tokens * heads * head_dim * (5 * dtype.itemsize + FAST_BYTES)


def decisions(device: torch.device) -> dict[str, dict[str, Decision]]:
    """Decide on exact attention, and look up kernels in 8 bits without importing them.

    Whether those work shows when `fast` is requested.

    Returns:
        Subject -> "" -> decision, for `dispatch.report`.
    """
    info, pin = dispatch.describe(device), _pin()
    exact = _exact(info, torch.bfloat16, pin)
    found = {"attention": {"": exact._replace(reason=f"{exact.reason}, exact")}}
    for name in FAST:
        problem = unavailable_reason(name, info, pin)
        reason = problem or "tried when fast attention is requested"
        decision = Decision(None, reason, "not available" if problem else "found")
        found[f"8-bit attention, {name}"] = {"": decision}
    return found


def _pin() -> str:
    """Read the kernel that the environment pins.

    Returns:
        A name of PINS; empty for none.

    Raises:
        OptionError: there is no such kernel.
    """
    pin = dispatch.attention_pin()
    if pin == "auto":
        return ""
    if pin not in PINS:
        raise OptionError(
            f"{dispatch.ATTENTION_VARIABLE} is {pin!r}, which is not one of auto, "
            f"{', '.join(PINS)}: correct it, or remove it from the environment."
        )
    return pin


# --- exact --------------------------------------------------------------------------------------


def _exact(info: DeviceInfo, dtype: torch.dtype, pin: str = "") -> Decision:
    """Exact attention by torch's kernels, the fastest on a device first.

    None of them needs quadratic memory.

    Args:
        info: of the device.
        dtype: of the queries.
        pin: of PINS; one of torch's kernels is then the only one allowed.

    Returns:
        An `Attention` as `impl`.

    Source: public measurements on six GPUs, transformers PR 48163: cuDNN 1.7 to 2.3 times as fast
        as flash on Hopper, as fast on Ada, 0.82 on A100, 0.88 on RTX PRO 6000.
    """
    for kernel, name in _NAMES.items():
        if pin == _slug(name):
            return Decision(_pinned_attention(kernel), _pinned(pin), name)
    if info.type not in ("cpu", "cuda"):
        return Decision(sdpa, f"torch decides on {info.type}", "torch's own")
    if info.type == "cpu":
        return Decision(_torch_attention([_FLASH]), "torch's kernel for CPUs", _NAMES[_FLASH])
    is_half = dtype in (torch.float16, torch.bfloat16)
    if not is_half or (info.capability is not None and info.capability < (8, 0)):
        attend, reason = _torch_attention([_EFFICIENT]), f"the others take no {short(dtype)}"
        if is_half:
            reason = f"flash needs sm80, this is {sm(info)}"
        if dtype == torch.bfloat16:
            reason += "; in float32, head by head, as it takes no bfloat16 there"
            attend = _upcast(attend)
        return Decision(attend, reason, _NAMES[_EFFICIENT])
    order, reasons = _priority(info)
    if _FLASH in order and not info.has_flash:
        order.remove(_FLASH)
        reasons.append("this torch is built without flash")
    if not _CAN_ORDER and len(order) > 1:
        reasons.append("this torch cannot be given an order")
    return Decision(_torch_attention(order), "; ".join(reasons), _NAMES[order[0]])


def _priority(info: DeviceInfo) -> tuple[list[SDPBackend], list[str]]:
    """Order torch's kernels for 16 bits on AMD GPUs and from sm80 on, the fastest first."""
    if info.capability is None:
        return [_FLASH, _EFFICIENT], ["as on every AMD GPU"]
    if info.capability[0] not in (9, 10):
        return [_FLASH, _EFFICIENT], [f"the fastest on {sm(info)}"]
    if info.cudnn >= MIN_CUDNN:
        reason = f"version {_version(info.cudnn)}, the fastest on {sm(info)}"
        return [_CUDNN, _FLASH, _EFFICIENT], [reason]
    found = f"version {_version(info.cudnn)} is too old" if info.cudnn else "it is missing"
    reason = f"cuDNN would be faster, but {found}: any length needs {_version(MIN_CUDNN)}"
    return [_FLASH, _EFFICIENT], [reason]


#: torch 2.6 and older: kernels can be allowed, not ordered
_CAN_ORDER = "set_priority" in inspect.signature(sdpa_kernel).parameters
#: how torch says that none of the kernels it may use takes the inputs
_NO_KERNEL = ("No available kernel", "No viable backend")


def _torch_attention(order: list[SDPBackend]) -> Attention:
    """Attention by the first of these kernels that takes the inputs."""
    ordered = {"set_priority": True} if _CAN_ORDER else {}

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        _let_torch_order(query)
        num_bytes = score_bytes(query, key)
        is_small = num_bytes <= MAX_SCORE_BYTES
        allowed = [*order, _MATH] if is_small else order
        try:
            with sdpa_kernel(allowed, **ordered):
                return F.scaled_dot_product_attention(query, key, value)
        except RuntimeError as error:
            if is_small or not any(words in str(error) for words in _NO_KERNEL):
                raise
        raise OutOfRoomError(
            f"Attention of {query.shape[2]:,} tokens would need {num_bytes:,} bytes for its scores "
            f"({MAX_SCORE_BYTES:,} are allowed): no kernel that works without them "
            f"({', '.join(_NAMES[backend] for backend in order)}) takes {short(query.dtype)} with "
            f"a head dimension of {query.shape[3]} on {query.device}. Use another precision, fewer "
            "frames or a smaller size."
        )

    return attention


def _let_torch_order(query: Tensor) -> None:
    """Have torch order its own kernels, once, before an order of ours is set for a call.

    At its first attention on a GPU torch may change its order, cuDNN first on sm90 and sm100, in
    the global state that `sdpa_kernel` puts back when it ends. Were that call one of ours, the
    order of before would be put back, for good: other models of the process would do without
    cuDNN (H100, 51,256 masked tokens: 237 ms instead of 79).

    Args:
        query: [B, heads, S, D] of a call to come.

    Source: torch 2.11 aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, priority_order.
    """
    if query.device.type == "cuda" and not _ordered:
        few = query[:1, :1, :8]
        sdpa(few, few, few)
        _ordered.append(query.device)


#: the device whose first attention made torch order its kernels
_ordered: list[torch.device] = []


def _pinned_attention(kernel: SDPBackend) -> Attention:
    """Attention by one of torch's kernels only."""

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        num_bytes = score_bytes(query, key)
        if kernel == _MATH and num_bytes > MAX_SCORE_BYTES:
            raise OutOfRoomError(
                f"{_pinned('math')} would need {num_bytes:,} bytes for the scores of "
                f"{query.shape[2]:,} tokens ({MAX_SCORE_BYTES:,} are allowed): pin another kernel, "
                "or remove the variable."
            )
        try:
            with sdpa_kernel(kernel):
                return F.scaled_dot_product_attention(query, key, value)
        except RuntimeError as error:
            if not any(words in str(error) for words in _NO_KERNEL):
                raise
        raise OptionError(
            f"{_pinned(_slug(_NAMES[kernel]))}, and that kernel does not take "
            f"{short(query.dtype)} with a head dimension of {query.shape[3]} on {query.device}: "
            "pin another one, or remove the variable."
        )

    return attention


def _upcast(attend: Attention) -> Attention:
    """The same in float32, one head at a time, so that the copies stay small."""

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, queries, width = query.shape
        out = query.new_empty(batch, queries, heads, width).transpose(1, 2)
        for head in range(heads):
            part = slice(head, head + 1)
            out[:, part] = attend(*(x[:, part].float() for x in (query, key, value)))
        return out

    return attention


def score_bytes(query: Tensor, key: Tensor) -> int:
    """Bytes of the scores of all pairs, which only torch's math kernel holds."""
    batch, heads, queries, _ = query.shape
    return batch * heads * queries * key.shape[2] * query.element_size()


def _version(cudnn: int) -> str:
    return f"{cudnn // 10_000}.{cudnn // 100 % 100}.{cudnn % 100}"


# --- fast ---------------------------------------------------------------------------------------


def _slug(name: str) -> str:
    return name.lower().replace(" ", "-")


#: values of `SKYREELS_ATTENTION`: torch's kernels, for exact attention and in place of fast; and
#: those in 8 bits, for fast attention, even where others are faster
PINS = tuple(map(_slug, [*_NAMES.values(), *FAST]))


def _pinned(pin: str) -> str:
    return f"{dispatch.ATTENTION_VARIABLE}={pin}"


def unavailable_reason(name: str, info: DeviceInfo, pin: str = "") -> str:
    """Why a kernel of FAST cannot be tried on a device; empty if it can."""
    kernel, backend = FAST[name], dispatch.backend()
    is_ours = kernel.package == "triton"
    if backend == "reference" or (backend == "triton" and not is_ours):
        return f"{dispatch.BACKEND_VARIABLE}={backend}"
    if pin and pin != _slug(name):
        return _pinned(pin)
    if info.capability is None:
        return f"needs an NVIDIA GPU, this is {info.type}"
    problem = dispatch.triton_problem(info) if is_ours else ""
    if not is_ours and not dispatch.is_installed(kernel.package):
        problem = f"{kernel.package} is not installed"
    if info.capability < kernel.min_capability or info.capability[0] not in kernel.majors:
        problem = problem or f"is not made for {sm(info)}"
    return problem


class Size(NamedTuple):
    """Of the queries of a run."""

    heads: int
    head_dim: int
    tokens: int
    dtype: torch.dtype

    @property
    def key(self) -> Hashable:
        """Alike for lengths that differ by less than a fifth: prompts differ by a few tokens."""
        return self.heads, self.head_dim, round(4 * math.log2(self.tokens)), self.dtype


def _fastest(
    info: DeviceInfo, device: torch.device, size: Size, exact: Decision, pin: str
) -> Decision:
    """The fastest kernel in 8 bits that is accurate and faster than exact attention, if any."""
    candidates = [
        Candidate(
            name,
            partial(kernel.load, info, device, size.head_dim, size.dtype),
            lambda attend: judge(attend, size.tokens, size.head_dim, device, size.dtype),
            unavailable_reason(name, info, pin),
        )
        for name, kernel in FAST.items()
    ]
    problems = tuple(each.problem for each in candidates)
    if all(problems):
        return dispatch.decide(candidates, exact.name)
    if size.tokens < FAST_MIN_TOKENS:
        reason = f"{size.tokens:,} tokens are below {FAST_MIN_TOKENS:,}, where it gains nothing"
        return Decision(None, reason, exact.name)
    is_forced = bool(pin) or dispatch.backend() == "triton"
    return dispatch.remembered(
        ("attention", device, size.key, problems, is_forced, exact.name),
        lambda: dispatch.decide(
            candidates,
            exact.name,
            clock=None if is_forced else lambda passed: timed(passed, exact, device, size),
            size=f"{size.tokens:,} tokens",
            min_gain=FAST_GAIN,
            must_be_timed=True,
        ),
    )


def judge(
    attend: Attention, tokens: int, head_dim: int, device: torch.device, dtype: torch.dtype
) -> Finding:
    """Error of an attention on each kind of input, a few heads of this length."""
    inputs = (
        (kind, draw(kind, tokens, PROBED_HEADS, head_dim, device=device, dtype=dtype))
        for kind in KINDS
    )
    return dispatch.probe(partial(run_checked, attend), exact_checked, inputs, FAST_ERROR)


def timed(
    functions: Mapping[str, Attention], exact: Decision, device: torch.device, size: Size
) -> dict[str, float]:
    """Time exact attention and each kernel at the size of the run.

    Args:
        functions: name -> kernel.
        exact: what they are compared with.
        device: that runs them.
        size: of the run.

    Returns:
        Name -> milliseconds; empty on devices that are not timed, where the first is taken.
    """
    if device.type != "cuda":
        return {}
    # numbers, as zeros would run faster; views of one buffer, as in the model
    qkv = torch.randn(
        (1, size.tokens, 3, size.heads, size.head_dim),
        device=device,
        dtype=size.dtype,
        generator=torch.Generator(device).manual_seed(0),
    )
    inputs = qkv.permute(2, 0, 3, 1, 4).unbind()
    contenders = {exact.name: exact.impl, **functions}
    return dispatch.median_ms(
        {name: partial(function, *inputs) for name, function in contenders.items()}, device
    )


def _only_long(fast: Attention, exact: Attention) -> Attention:
    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (fast if key.shape[2] >= FAST_MIN_TOKENS else exact)(query, key, value)

    return attention
