"""Joint attention without a mask: which kernel runs on a device, and why.

Text is trimmed to its true length before it enters the transformer, so every token may attend to
every other one and no kernel ever sees a mask: padded-and-masked and trimmed text give the same
numbers (3e-7 in fp32), but a boolean mask rules out the fast kernels. The transformer takes any
function of the type `Attention`.

Queries, keys and values usually are views of one buffer [B, S, 3, heads, D], each [B, heads, S, D]
with a contiguous head dimension; the output is wanted as a view of [B, S, heads, D], which the
projection behind it reads without a copy. Every kernel here reads such inputs where they lie.
torch's (but for its last resort, math), ours, SageAttention and FA3 also write that output;
comfy-kitchen writes [B, heads, S, D], so the projection copies it once. SageAttention 1 subtracts
the mean of the keys in place and is handed a copy of them; FA3 is handed copies in 8 bits. Before
sm80 bfloat16 is widened to float32, one head at a time.

`exact` is the default. `fast` uses kernels that round to 8 bits: it is asked for; every one that is
found is judged beside exact attention on inputs of the run's own size (attention_quality.py), those
that pass are timed at that size, and the fastest is used; where none is, exact attention is, with
the reasons in one log line. What the environment may pin is told in kernels/dispatch.py.
"""

import inspect
import logging
import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import OptionError, OutOfRoomError
from ..kernels import dispatch
from ..kernels.dispatch import Decision, DeviceInfo, short, sm
from ..kernels.reference import hadamard
from .attention_quality import KINDS, draw, relative_error

logger = logging.getLogger("skyreels.transformer.attention")

#: attention(query, key, value), each [B, heads, S, D] -> [B, heads, S, D]; no mask, scale D**-0.5
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

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
#: shorter sequences (the text refiner's) cost next to nothing and are not rounded
FAST_MIN_TOKENS = 1024
#: heads on which a kernel is judged; it is timed on those of the run
PROBED_HEADS = 4
#: what the hungriest kernel in 8 bits takes beside inputs and output, per element of a query:
#: SageAttention 1 holds a copy of the keys, 16-bit values, queries and keys in 8 bits
FAST_BYTES = 6

_NAMES = {
    SDPBackend.CUDNN_ATTENTION: "cuDNN",
    SDPBackend.FLASH_ATTENTION: "flash",
    SDPBackend.EFFICIENT_ATTENTION: "memory-efficient",
    SDPBackend.MATH: "math",
}


@dataclass(frozen=True)
class Choice:
    """Attention as it runs on a device, its name, and why it is this one."""

    function: Attention
    name: str
    reason: str


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Exact attention by whichever kernel torch prefers, for tensors of any device or of none.

    Args:
        query, key, value: [B, heads, S, D], one floating dtype.
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
) -> Choice:
    """The attention to run on a device; says so once per device and process.

    Args:
        mode: "exact", or "fast" for a kernel that rounds to 8 bits. Where none is usable, exact
            attention is chosen, with a warning that names each and its reason.
        heads, head_dim, tokens, dtype: of the queries it will meet; kernels in 8 bits are judged
            and timed at this size, so there must be room for it, see `trial_bytes`.
    Raises:
        OptionError: an unknown mode, or an unknown kernel in `SKYREELS_ATTENTION`.
    """
    if mode not in MODES:
        raise OptionError(f"Attention {mode!r} is not one of {', '.join(MODES)}.")
    device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
    info, pin = dispatch.describe(device), _pin()
    exact = _exact(info, dtype, pin)
    if mode == "exact":
        _say(device, f"{exact.name} ({exact.reason})")
        return exact
    size = _Size(heads, head_dim, tokens, dtype)
    found, finding = _fastest(info, device, size, exact, pin)
    if found is None:
        reason = f"fast attention unavailable ({finding})"
        _say(device, f"{exact.name}, exact: {reason}", logging.WARNING)
        return Choice(exact.function, exact.name, reason)
    name, function = found
    _say(device, f"{name} in 8 bits, {finding}")
    return Choice(_only_long(function, exact.function), name, finding)


def trial_bytes(heads: int, head_dim: int, tokens: int, dtype: torch.dtype) -> int:
    """Bytes that judging kernels in 8 bits at this size takes: inputs, output, and their copies."""
    return tokens * heads * head_dim * (5 * dtype.itemsize + FAST_BYTES)


def report(device: torch.device | str) -> dict[str, str]:
    """What attention runs on a device, and which kernels in 8 bits are found.

    Other packages are looked up, not imported: whether they work shows when `fast` is asked for.

    Returns:
        "attention", and one entry for each kernel of FAST.
    """
    info, pin = dispatch.describe(torch.device(device)), _pin()
    exact = _exact(info, torch.bfloat16, pin)
    found = {"attention": f"{exact.name} ({exact.reason}): used, exact"}
    for name in FAST:
        problem = unavailable_reason(name, info, pin)
        finding = problem or "found; tried when fast attention is asked for"
        found[f"8-bit attention, {name}"] = finding
    return found


def _pin() -> str:
    """The kernel that the environment pins, "" for none.

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


def _say(device: torch.device, text: str, level: int = logging.INFO) -> None:
    dispatch.say_once(f"Attention on {device}: {text}.", level, logger)


# --- exact --------------------------------------------------------------------------------------


def _exact(info: DeviceInfo, dtype: torch.dtype, pin: str = "") -> Choice:
    """torch's kernels in the order that is fastest on a device; none needs quadratic memory.

    Args:
        pin: of PINS; the name of one of torch's kernels leaves it alone.
    Source: public measurements on six GPUs, transformers PR 48163: cuDNN 1.7 to 2.3 times as fast
        as flash on Hopper, as fast on Ada, 0.82 on A100, 0.88 on RTX PRO 6000.
    """
    for kernel, name in _NAMES.items():
        if pin == _slug(name):
            return Choice(_pinned_attention(kernel), name, _pinned(pin))
    cudnn, flash = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION
    efficient = SDPBackend.EFFICIENT_ATTENTION
    if info.type not in ("cpu", "cuda"):
        return Choice(sdpa, "torch's own", f"torch decides on {info.type}")
    if info.type == "cpu":
        return Choice(_torch_attention([flash]), "flash", "torch's kernel for CPUs")
    if dtype not in (torch.float16, torch.bfloat16):
        reason = f"the others take no {short(dtype)}"
        return Choice(_torch_attention([efficient]), _NAMES[efficient], reason)
    order, reasons = [flash, efficient], []
    if info.capability is None:
        reasons.append("as on every AMD GPU")
    elif info.capability < (8, 0):
        reason = f"flash needs sm80, this is {sm(info)}"
        attend = _torch_attention([efficient])
        if dtype == torch.bfloat16:
            reason += "; in float32, head by head, as it takes no bfloat16 there"
            attend = _widened(attend)
        return Choice(attend, _NAMES[efficient], reason)
    elif info.capability[0] in (9, 10) and info.cudnn >= MIN_CUDNN:
        order = [cudnn, flash, efficient]
        reasons.append(f"version {_version(info.cudnn)}, the fastest on {sm(info)}")
    elif info.capability[0] in (9, 10):
        have = f"version {_version(info.cudnn)}" if info.cudnn else "missing"
        reasons.append(f"cuDNN would be faster, but {have}: lengths need {_version(MIN_CUDNN)}")
    else:
        reasons.append(f"the fastest on {sm(info)}")
    if flash in order and not info.has_flash:
        order.remove(flash)
        reasons.append("this torch is built without flash")
    if not _CAN_ORDER and len(order) > 1:
        reasons.append("this torch puts them in an order of its own")
    return Choice(_torch_attention(order), _NAMES[order[0]], "; ".join(reasons))


#: torch 2.6 and older: kernels can be allowed, not ordered
_CAN_ORDER = "set_priority" in inspect.signature(sdpa_kernel).parameters


#: how torch says that none of the kernels it may use takes the inputs
_NO_KERNEL = ("No available kernel", "No viable backend")


def _torch_attention(order: list[SDPBackend]) -> Attention:
    """Attention by the first of these kernels that takes the inputs."""
    ordered = {"set_priority": True} if _CAN_ORDER else {}

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        num_bytes = score_bytes(query, key)
        is_small = num_bytes <= MAX_SCORE_BYTES
        allowed = [*order, SDPBackend.MATH] if is_small else order
        try:
            with sdpa_kernel(allowed, **ordered):
                return F.scaled_dot_product_attention(query, key, value)
        except RuntimeError as error:
            if is_small or not any(words in str(error) for words in _NO_KERNEL):
                raise
        raise OutOfRoomError(
            f"Attention of {query.shape[2]:,} tokens would need {num_bytes:,} bytes for its scores "
            f"({MAX_SCORE_BYTES:,} are allowed): no kernel that does without them "
            f"({', '.join(_NAMES[backend] for backend in order)}) takes {short(query.dtype)} with "
            f"a head dimension of {query.shape[3]} on {query.device}. Use another precision, fewer "
            "frames or a smaller size."
        )

    return attention


def _pinned_attention(kernel: SDPBackend) -> Attention:
    """Attention by one of torch's kernels, whatever the others can."""

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        num_bytes = score_bytes(query, key)
        if kernel == SDPBackend.MATH and num_bytes > MAX_SCORE_BYTES:
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


def _widened(attend: Attention) -> Attention:
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


@dataclass(frozen=True)
class FastKernel:
    """An attention in 8 bits.

    package: what must be installed. first, majors: the least compute capability it is made for, and
    the first numbers of those it knows. load: imports it and makes the function for (what the
    device is, device, head_dim, dtype).
    """

    package: str
    first: tuple[int, int]
    majors: tuple[int, ...]
    load: Callable[[DeviceInfo, torch.device, int, torch.dtype], Attention]


def _load_comfy_kitchen(
    info: DeviceInfo, device: torch.device, head_dim: int, dtype: torch.dtype
) -> Attention:
    import comfy_kitchen

    attend = comfy_kitchen.int8_attention  # an AttributeError is a reason too
    is_available = getattr(comfy_kitchen, "int8_attention_is_available", None)
    if is_available is not None and not is_available(device):
        raise RuntimeError("its CUDA extension does not load: it needs driver 580 or newer")

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(query, key, value)

    return attention


def _load_sage(
    info: DeviceInfo, device: torch.device, head_dim: int, dtype: torch.dtype
) -> Attention:
    from sageattention import sageattn

    # version 1 names this parameter, and then subtracts the mean from the keys it was given
    writes_keys = "smooth_k" in inspect.signature(sageattn).parameters

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if writes_keys:
            key = key.clone()
        tokens_first = (x.transpose(1, 2) for x in (query, key, value))
        with dispatch.current_device(query.device):  # version 2 sets it and leaves it so
            out = sageattn(*tokens_first, tensor_layout="NHD", is_causal=False, smooth_k=True)
        return out.transpose(1, 2)

    return attention


def _load_fa3(
    info: DeviceInfo, device: torch.device, head_dim: int, dtype: torch.dtype
) -> Attention:
    """FA3 in fp8, called directly: torch's hook for it changes attention for the whole process."""
    from flash_attn_interface import flash_attn_func

    matrix = hadamard(head_dim, device).to(dtype)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key = key - key.mean(dim=2, keepdim=True)
        parts = [_to_e4m3(x, (2, 3)) for x in (query @ matrix, key @ matrix, value)]
        q, k, v = (x.transpose(1, 2) for x, _ in parts)
        q_scale, k_scale, v_scale = (scale[:, :, 0, 0] for _, scale in parts)
        out = flash_attn_func(q, k, v, q_descale=q_scale, k_descale=k_scale, v_descale=v_scale)
        out = out[0] if isinstance(out, tuple) else out  # early releases add the log-sum-exp
        return out.transpose(1, 2).to(query.dtype)

    return attention


def _to_e4m3(x: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """x over the largest magnitude along `axes`, in e4m3; and the scales, float32."""
    scale = x.abs().amax(dim=axes, keepdim=True).float() / 448
    scale = torch.where(scale == 0, 1.0, scale)
    return (x / scale.to(x.dtype)).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def _load_cudnn_fp8(
    info: DeviceInfo, device: torch.device, head_dim: int, dtype: torch.dtype
) -> Attention:
    """cuDNN's attention with both products in e4m3, through nvidia-cudnn-frontend.

    One scale for each tensor. Below sm100 its output is e4m3 too, which costs 2.6 % by itself.

    Source: nvidia-cudnn-frontend 1.18.0, sdpa_support_surface.h (what sm90 takes) and
        scaled_dot_product_flash_attention.h (where each scale enters).
    """
    import cudnn

    version = cudnn.backend_version()  # raises where there is no libcudnn
    is_wide = info.capability is not None and info.capability >= (10, 0) and version >= 91300
    out_dtype = torch.bfloat16 if is_wide else torch.float8_e4m3fn
    with dispatch.current_device(device):
        handle = cudnn.create_handle()
    matrix = hadamard(head_dim, device).to(dtype)
    # weights are at most 1; a power of two below 448 has an exact inverse
    weight_scale = torch.full((1, 1, 1, 1), 256.0, device=device)
    graphs: dict[Hashable, Any] = {}

    def build(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Any:
        e4m3, float32 = cudnn.data_type.FP8_E4M3, cudnn.data_type.FLOAT
        graph = cudnn.pygraph(
            io_data_type=e4m3, intermediate_data_type=float32, compute_data_type=float32,
            handle=handle,
        )  # fmt: skip
        inputs = {
            name: graph.tensor(
                name=name, dim=list(x.shape), stride=list(x.stride()), data_type=e4m3,
                uid=_CUDNN_UIDS[name],
            )
            for name, x in (("q", q), ("k", k), ("v", v))
        }  # fmt: skip
        scales = {
            name: graph.tensor(
                name=name, dim=[1] * 4, stride=[1] * 4, data_type=float32, uid=_CUDNN_UIDS[name]
            )
            for name in _CUDNN_SCALES
        }
        result, _, *largest = graph.sdpa_fp8(
            **inputs, **scales, generate_stats=False, attn_scale=float(head_dim**-0.5)
        )
        result.set_uid(_CUDNN_UIDS["o"]).set_output(True).set_dim(list(out.shape)).set_stride(
            list(out.stride())
        ).set_data_type(cudnn.data_type.BFLOAT16 if is_wide else e4m3)
        for name, tensor in zip(_CUDNN_UNUSED, largest, strict=True):  # they must have a shape
            tensor.set_uid(_CUDNN_UIDS[name]).set_output(False)
            tensor.set_dim([1] * 4).set_stride([1] * 4).set_data_type(float32)
        graph.build([cudnn.heur_mode.A])
        return graph

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mean = value.mean(dim=2, keepdim=True)
        key = key - key.mean(dim=2, keepdim=True)
        whole = (0, 1, 2, 3)
        q, q_scale = _to_e4m3(query @ matrix, whole)
        k, k_scale = _to_e4m3(key @ matrix, whole)
        v, v_scale = _to_e4m3(value - mean, whole)
        batch, heads, tokens, width = query.shape
        out = torch.empty(batch, tokens, heads, width, dtype=out_dtype, device=query.device)
        out = out.transpose(1, 2)
        key_ = tuple((x.shape, x.stride()) for x in (q, k, v))
        if key_ not in graphs:
            graphs[key_] = build(q, k, v, out)
        graph = graphs[key_]
        # no output is larger than the largest value, so this scale cannot overflow
        out_scale = torch.ones_like(v_scale) if is_wide else 1 / v_scale
        scales = (q_scale, k_scale, v_scale, 1 / weight_scale, weight_scale, out_scale)
        pack = {"q": q, "k": k, "v": v, "o": out, **dict(zip(_CUDNN_SCALES, scales, strict=True))}
        with dispatch.current_device(query.device):
            cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
            workspace = torch.empty(
                graph.get_workspace_size(), dtype=torch.uint8, device=query.device
            )
            graph.execute(
                {_CUDNN_UIDS[name]: x for name, x in pack.items()}, workspace, handle=handle
            )
        return (out.float() / out_scale + mean).to(query.dtype)

    return attention


_CUDNN_SCALES = ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o")
#: largest weight and output, which cuDNN would tell
_CUDNN_UNUSED = ("amax_s", "amax_o")
_CUDNN_NAMES = ("q", "k", "v", "o", *_CUDNN_SCALES, *_CUDNN_UNUSED)
_CUDNN_UIDS = {name: uid for uid, name in enumerate(_CUDNN_NAMES, 1)}


def _load_triton(
    info: DeviceInfo, device: torch.device, head_dim: int, dtype: torch.dtype, *, index: int = 0
) -> Attention:
    from ..kernels.triton import attention as triton_attention

    if head_dim not in triton_attention.HEAD_DIMS:
        raise OptionError(f"it takes head dimensions {triton_attention.HEAD_DIMS}, not {head_dim}")
    tiles = triton_attention.tiles(info.capability or (0, 0))
    if index >= len(tiles):
        raise OptionError(f"it has {len(tiles) or 'no'} tile for {sm(info)}")
    return partial(triton_attention.quantized_attention, tile=tiles[index])


#: the likely fastest first, which is what counts where nothing can be timed
FAST = {
    "SageAttention": FastKernel("sageattention", (8, 0), (8, 9, 12), _load_sage),
    "FA3": FastKernel("flash_attn_interface", (9, 0), (9,), _load_fa3),
    "comfy-kitchen": FastKernel("comfy_kitchen", (7, 5), (7, 8, 9, 10, 12), _load_comfy_kitchen),
    "Triton": FastKernel("triton", (8, 0), (8, 9, 12), _load_triton),
    "Triton large tile": FastKernel("triton", (8, 9), (8, 9, 12), partial(_load_triton, index=1)),
    "Triton fp16": FastKernel("triton", (8, 9), (8, 9, 12), partial(_load_triton, index=2)),
    "cuDNN fp8": FastKernel("cudnn", (9, 0), (9, 10, 12), _load_cudnn_fp8),
}


def _slug(name: str) -> str:
    return name.lower().replace(" ", "-")


#: what `SKYREELS_ATTENTION` may name: torch's kernels, for exact attention and in place of fast;
#: and those in 8 bits, for fast attention, without asking whether they are faster
PINS = tuple(map(_slug, [*_NAMES.values(), *FAST]))


def _pinned(pin: str) -> str:
    return f"{dispatch.ATTENTION_VARIABLE}={pin}"


def unavailable_reason(name: str, info: DeviceInfo, pin: str = "") -> str:
    """Why a kernel of FAST cannot be tried on a device; empty if it can."""
    kernel, backend = FAST[name], dispatch.backend()
    if backend == "reference" or (backend == "triton" and kernel.package != "triton"):
        return f"{dispatch.BACKEND_VARIABLE}={backend}"
    if pin and pin != _slug(name):
        return _pinned(pin)
    if info.capability is None:
        return f"needs an NVIDIA GPU, this is {info.type}"
    if kernel.package == "triton":
        if problem := dispatch.triton_problem(info):
            return problem
    elif not dispatch.is_installed(kernel.package):
        return f"{kernel.package} is not installed"
    if info.capability < kernel.first or info.capability[0] not in kernel.majors:
        return f"is not made for {sm(info)}"
    return ""


class _Size(NamedTuple):
    """Of the queries of a run."""

    heads: int
    head_dim: int
    tokens: int
    dtype: torch.dtype

    @property
    def key(self) -> Hashable:
        """Alike for lengths that differ by less than a fifth: prompts differ by a few tokens."""
        return self.heads, self.head_dim, round(4 * math.log2(self.tokens)), self.dtype


_decisions: dict[Hashable, Any] = {}


def _fastest(
    info: DeviceInfo, device: torch.device, size: _Size, exact: Choice, pin: str
) -> tuple[tuple[str, Attention] | None, str]:
    """The fastest kernel in 8 bits that is right and faster than exact attention, if there is one.

    Returns:
        its name and function, or None; and what was found of all of them, for people.
    """
    problems = {name: unavailable_reason(name, info, pin) for name in FAST}
    available = tuple(name for name, problem in problems.items() if not problem)
    refused = _by_reason({name: problem for name, problem in problems.items() if problem})
    if not available:
        return None, "; ".join(refused)
    if size.tokens < FAST_MIN_TOKENS:
        return None, f"{size.tokens:,} tokens are below {FAST_MIN_TOKENS:,}, where it gains nothing"
    is_forced = bool(pin) or dispatch.backend() == "triton"
    decision = dispatch.remembered(
        _decisions, (device, size.key, available, is_forced, exact.name),
        lambda: _try(available, info, device, size, exact, is_forced),
    )  # fmt: skip
    return decision.impl, "; ".join([decision.reason, *refused])


def _by_reason(problems: dict[str, str]) -> list[str]:
    """Each reason once, with those it holds for; alone where that is all of FAST."""
    names: dict[str, list[str]] = {}
    for name, problem in problems.items():
        names.setdefault(problem, []).append(name)
    return [
        reason if len(those) == len(FAST) else f"{', '.join(those)}: {reason}"
        for reason, those in names.items()
    ]


def _try(
    names: tuple[str, ...], info: DeviceInfo, device: torch.device, size: _Size, exact: Choice,
    is_forced: bool,
) -> Decision:  # fmt: skip
    """Judge kernels at the size of a run, time those that pass, and choose.

    Args:
        is_forced: the first that passes is chosen, whatever its speed.
    """
    passed: dict[str, Attention] = {}
    worst: dict[str, str] = {}
    refused: list[str] = []
    is_final = True
    for name in names:
        try:
            function = FAST[name].load(info, device, size.head_dim, size.dtype)
            errors = judge(function, size.tokens, size.head_dim, device, size.dtype)
        except Exception as error:  # noqa: BLE001 - of a package that is not ours
            problem, may_stay = dispatch.failed_trial(error, f"attention by {name}")
            is_final &= may_stay
        else:
            is_right, worst[name] = accept(errors)
            problem = "" if is_right else worst[name]
        if problem:
            refused.append(f"{name}: {problem}")
        else:
            passed[name] = function
    milliseconds: dict[str, float] = {}
    if passed and not is_forced:
        try:
            milliseconds = _timed(passed, exact, device, size)
        except Exception as error:  # noqa: BLE001 - of a package that is not ours
            problem, may_stay = dispatch.failed_trial(error, "8-bit attention")
            refused += [f"{name}: {problem}" for name in passed]
            return Decision(None, "; ".join(refused), is_final and may_stay)
    chosen = min(passed, key=lambda name: milliseconds.get(name, 0.0), default=None)
    for name in passed:
        finding = worst[name]
        if milliseconds:
            gain = milliseconds[exact.name] / milliseconds[name]
            finding += f", {gain:.2f} times as fast as {exact.name} at {size.tokens:,} tokens"
            if gain < FAST_GAIN and chosen == name:
                chosen = None  # nor is any other, as this is the fastest
        worst[name] = finding
    if chosen is None:
        return Decision(
            None, "; ".join([*(f"{n}: {worst[n]}" for n in passed), *refused]), is_final
        )
    others = [f"{name}: {worst[name]}" for name in passed if name != chosen] + refused
    instead = f". Not used: {'; '.join(others)}" if others else ""
    return Decision((chosen, passed[chosen]), worst[chosen] + instead, is_final)


def judge(
    function: Attention, tokens: int, head_dim: int, device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """Relative L2 error of an attention on each kind of input, a few heads of this length."""
    return {
        kind: relative_error(
            function, draw(kind, tokens, PROBED_HEADS, head_dim, device=device, dtype=dtype)
        )
        for kind in KINDS
    }


def accept(errors: dict[str, float]) -> tuple[bool, str]:
    """Whether a kernel is close enough to exact attention, and its worst error for people."""
    kind = max(errors, key=lambda kind: math.inf if math.isnan(errors[kind]) else errors[kind])
    finding = f"error {errors[kind]:.2g} ({kind})"
    if errors[kind] <= FAST_ERROR:  # NaN is not
        return True, finding
    return False, f"{finding}, {FAST_ERROR:.2g} is allowed"


def _timed(
    functions: dict[str, Attention], exact: Choice, device: torch.device, size: _Size
) -> dict[str, float]:
    """Milliseconds of exact attention and of each kernel at the size of the run.

    Empty where there is no clock: then the likely fastest is taken.
    """
    if device.type != "cuda":
        return {}
    # numbers, as zeros would run faster; views of one buffer, as in the model
    qkv = torch.randn(
        (1, size.tokens, 3, size.heads, size.head_dim), device=device, dtype=size.dtype,
        generator=torch.Generator(device).manual_seed(0),
    )  # fmt: skip
    inputs = qkv.permute(2, 0, 3, 1, 4).unbind()
    contenders = {exact.name: exact.function, **functions}
    return dispatch.race(
        {name: partial(function, *inputs) for name, function in contenders.items()}, device
    )


def _only_long(fast: Attention, exact: Attention) -> Attention:
    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (fast if key.shape[2] >= FAST_MIN_TOKENS else exact)(query, key, value)

    return attention
