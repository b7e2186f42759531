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

`exact` is the default. `fast` uses kernels that round to 8 bits: it is asked for, tries each once
on a small input beside exact attention, and falls back to exact with the reasons in one log line.
"""

import contextlib
import importlib.util
import inspect
import logging
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .errors import OptionError, OutOfRoomError
from .kernels.reference import hadamard, rotate

logger = logging.getLogger(__name__)

#: attention(query, key, value), each [B, heads, S, D] -> [B, heads, S, D]; no mask, scale D**-0.5
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

MODES = ("exact", "fast")
#: older ones are wrong for lengths that 128 does not divide (pytorch issue 169849)
MIN_CUDNN = 91501
#: scores of all pairs may take this much where only torch's math kernel can serve
MAX_SCORE_BYTES = 2 * 10**9
#: a kernel in 8 bits must come this close to exact attention (relative L2) on the probe
FAST_ERROR = 4e-2
#: and be this many times as fast
FAST_GAIN = 1.05
#: shorter sequences (the text refiner's) cost next to nothing and are not rounded
FAST_MIN_TOKENS = 1024
#: what the hungriest kernel in 8 bits takes beside inputs and output, per element of a query:
#: SageAttention 1 holds a copy of the keys, 16-bit values, queries and keys in 8 bits
FAST_BYTES = 6

_NAMES = {
    SDPBackend.CUDNN_ATTENTION: "cuDNN",
    SDPBackend.FLASH_ATTENTION: "flash",
    SDPBackend.EFFICIENT_ATTENTION: "memory-efficient",
}


@dataclass(frozen=True)
class Choice:
    """Attention as it runs on a device, its name, and why it is this one."""

    function: Attention
    name: str
    reason: str


@dataclass(frozen=True)
class Machine:
    """What a choice depends on.

    type: of the device. capability: (major, minor) of an NVIDIA GPU, else None. cudnn: 91900 for
    9.19.0, 0 for none. has_flash: whether torch was built with its flash kernels for CUDA.
    """

    type: str
    capability: tuple[int, int] | None = None
    cudnn: int = 0
    has_flash: bool = True


def describe(device: torch.device) -> Machine:
    """Look at a device."""
    if device.type != "cuda":
        return Machine(device.type)
    has_flash = torch.backends.cuda.is_flash_attention_available()
    if torch.version.hip is not None:
        return Machine(device.type, None, 0, has_flash)
    capability = torch.cuda.get_device_capability(device)
    return Machine(device.type, capability, torch.backends.cudnn.version() or 0, has_flash)


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
    head_dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
) -> Choice:
    """The attention to run on a device; says so once per device and process.

    Args:
        mode: "exact", or "fast" for a kernel that rounds to 8 bits. Where none is usable, exact
            attention is chosen, with a warning that names each and its reason.
        head_dim, dtype: of the queries it will meet.
    Raises:
        OptionError: an unknown mode.
    """
    if mode not in MODES:
        raise OptionError(f"Attention {mode!r} is not one of {', '.join(MODES)}.")
    device = torch.device(device)
    machine = describe(device)
    exact = _exact(machine, dtype)
    if mode == "exact":
        _say(device, mode, logging.INFO, f"{exact.name} ({exact.reason})")
        return exact
    refused = []
    for name in _order(machine):
        function, finding = _try(name, machine, device, head_dim, dtype, exact)
        if function is None:
            refused.append(f"{name}: {finding}")
            continue
        instead = f". Not used: {'; '.join(refused)}" if refused else ""
        _say(device, mode, logging.INFO, f"{name} in 8 bits, {finding}{instead}")
        return Choice(_only_long(function, exact.function), name, finding)
    reason = f"fast attention is not to be had ({'; '.join(refused)})"
    _say(device, mode, logging.WARNING, f"{exact.name}, exact, as {reason}")
    return Choice(exact.function, exact.name, reason)


def report(device: torch.device | str) -> dict[str, str]:
    """What attention runs on a device, and which kernels in 8 bits are found.

    Other packages are looked up, not imported: whether they work shows when `fast` is asked for.

    Returns:
        "attention", and one entry for each kernel of FAST.
    """
    machine = describe(torch.device(device))
    exact = _exact(machine, torch.bfloat16)
    found = {"attention": f"{exact.name} ({exact.reason}): used, exact"}
    for name in _order(machine):
        hindrance = _hindrance(FAST[name], machine)
        finding = hindrance or "found; tried when fast attention is asked for"
        found[f"8-bit attention, {name}"] = finding
    return found


def _say(device: torch.device, mode: str, level: int, text: str) -> None:
    if (str(device), mode) not in _said:
        _said.add((str(device), mode))
        logger.log(level, "Attention on %s: %s.", device, text)


_said: set[tuple[str, str]] = set()


# --- exact --------------------------------------------------------------------------------------


def _exact(machine: Machine, dtype: torch.dtype) -> Choice:
    """torch's kernels in the order that is fastest on a machine; none needs quadratic memory.

    Source: public measurements on six GPUs, transformers PR 48163: cuDNN 1.7 to 2.3 times as fast
        as flash on Hopper, as fast on Ada, 0.82 on A100, 0.88 on RTX PRO 6000.
    """
    cudnn, flash, efficient = _NAMES
    if machine.type not in ("cpu", "cuda"):
        return Choice(sdpa, "torch's own", f"torch decides on {machine.type}")
    if machine.type == "cpu":
        return Choice(_torch_attention([flash]), "flash", "torch's kernel for CPUs")
    if dtype not in (torch.float16, torch.bfloat16):
        reason = f"the others take no {_plain(dtype)}"
        return Choice(_torch_attention([efficient]), _NAMES[efficient], reason)
    order, reasons = [flash, efficient], []
    if machine.capability is None:
        reasons.append("as on every AMD GPU")
    elif machine.capability < (8, 0):
        reason = f"flash needs sm80, this is {_sm(machine)}"
        attend = _torch_attention([efficient])
        if dtype == torch.bfloat16:
            reason += "; in float32, head by head, as it takes no bfloat16 there"
            attend = _widened(attend)
        return Choice(attend, _NAMES[efficient], reason)
    elif machine.capability[0] in (9, 10) and machine.cudnn >= MIN_CUDNN:
        order = [cudnn, flash, efficient]
        reasons.append(f"version {_version(machine.cudnn)}, the fastest on {_sm(machine)}")
    elif machine.capability[0] in (9, 10):
        have = f"version {_version(machine.cudnn)}" if machine.cudnn else "missing"
        reasons.append(f"cuDNN would be faster, but {have}: lengths need {_version(MIN_CUDNN)}")
    else:
        reasons.append(f"the fastest on {_sm(machine)}")
    if flash in order and not machine.has_flash:
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
            f"({', '.join(_NAMES[backend] for backend in order)}) takes {_plain(query.dtype)} with "
            f"a head dimension of {query.shape[3]} on {query.device}. Use another precision, fewer "
            "frames or a smaller size."
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


def _sm(machine: Machine) -> str:
    return "sm{}{}".format(*machine.capability or ("?", ""))


def _version(cudnn: int) -> str:
    return f"{cudnn // 10_000}.{cudnn // 100 % 100}.{cudnn % 100}"


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- fast ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fast:
    """An attention in 8 bits.

    package: what must be installed. first, majors: the least compute capability it is made for, and
    the first numbers of those it knows. load: imports it and makes the function for (device,
    head_dim, dtype).
    """

    package: str
    first: tuple[int, int]
    majors: tuple[int, ...]
    load: Callable[[torch.device, int, torch.dtype], Attention]


def _load_comfy_kitchen(device: torch.device, head_dim: int, dtype: torch.dtype) -> Attention:
    import comfy_kitchen

    attend = comfy_kitchen.int8_attention  # an AttributeError is a reason too
    is_available = getattr(comfy_kitchen, "int8_attention_is_available", None)
    if is_available is not None and not is_available(device):
        raise RuntimeError("its CUDA extension does not load: it needs driver 580 or newer")

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(query, key, value)

    return attention


def _load_sage(device: torch.device, head_dim: int, dtype: torch.dtype) -> Attention:
    from sageattention import sageattn

    # version 1 names this parameter, and then subtracts the mean from the keys it was given
    writes_keys = "smooth_k" in inspect.signature(sageattn).parameters

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if writes_keys:
            key = key.clone()
        tokens_first = (x.transpose(1, 2) for x in (query, key, value))
        with _current(query.device):  # version 2 makes the device current and leaves it so
            out = sageattn(*tokens_first, tensor_layout="NHD", is_causal=False, smooth_k=True)
        return out.transpose(1, 2)

    return attention


def _load_fa3(device: torch.device, head_dim: int, dtype: torch.dtype) -> Attention:
    """FA3 in fp8, called directly: torch's hook for it changes attention for the whole process."""
    from flash_attn_interface import flash_attn_func

    matrix = hadamard(head_dim, device).to(dtype)

    def narrow(x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, heads, S, D] to fp8 as [B, S, heads, D], and its scales [B, heads]."""
        scale = x.abs().amax(dim=(2, 3)).float() / 448
        scale = torch.where(scale == 0, 1.0, scale)
        narrowed = (x / scale[..., None, None].to(x.dtype)).clamp(-448, 448)
        return narrowed.to(torch.float8_e4m3fn).transpose(1, 2), scale

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, q_scale = narrow(query @ matrix)
        k, k_scale = narrow((key - key.mean(dim=2, keepdim=True)) @ matrix)
        v, v_scale = narrow(value)
        out = flash_attn_func(q, k, v, q_descale=q_scale, k_descale=k_scale, v_descale=v_scale)
        out = out[0] if isinstance(out, tuple) else out  # early releases add the log-sum-exp
        return out.transpose(1, 2).to(query.dtype)

    return attention


def _load_triton(device: torch.device, head_dim: int, dtype: torch.dtype) -> Attention:
    from .kernels import triton_attention

    if head_dim not in triton_attention.HEAD_DIMS:
        raise OptionError(f"it takes head dimensions {triton_attention.HEAD_DIMS}, not {head_dim}")
    return triton_attention.int8_attention


FAST = {
    "comfy-kitchen": Fast("comfy_kitchen", (7, 5), (7, 8, 9, 10, 12), _load_comfy_kitchen),
    "SageAttention": Fast("sageattention", (8, 0), (8, 9, 12), _load_sage),
    "FA3": Fast("flash_attn_interface", (9, 0), (9,), _load_fa3),
    "Triton": Fast("triton", (8, 0), (8, 9, 12), _load_triton),
}


def _order(machine: Machine) -> tuple[str, ...]:
    """Best first. On Hopper those made for its tensor cores: 882 and 892 TOPS at 32k tokens."""
    if machine.capability == (9, 0):
        return ("SageAttention", "FA3", "comfy-kitchen", "Triton")
    return ("comfy-kitchen", "SageAttention", "FA3", "Triton")


def _hindrance(fast: Fast, machine: Machine) -> str:
    """Why a kernel cannot be tried on a machine; empty if it can."""
    if machine.capability is None:
        return f"needs an NVIDIA GPU, this is {machine.type}"
    if not _is_installed(fast.package):
        also = " (on Windows: triton-windows)" if fast.package == "triton" else ""
        return f"{fast.package}{also} is not installed"
    if machine.capability < fast.first or machine.capability[0] not in fast.majors:
        return f"is not made for {_sm(machine)}"
    return ""


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # half-removed, or switched off in sys.modules
        return False


_tried: dict[tuple[str, torch.device, int, torch.dtype], tuple[Attention | None, str]] = {}


def _try(
    name: str, machine: Machine, device: torch.device, head_dim: int, dtype: torch.dtype,
    exact: Choice,
) -> tuple[Attention | None, str]:  # fmt: skip
    """A kernel and how it did, or None and why not; found out once per process."""
    fast, key = FAST[name], (name, device, head_dim, dtype)
    if key not in _tried:
        hindrance = _hindrance(fast, machine)
        if hindrance:
            return None, hindrance
        try:
            function = fast.load(device, head_dim, dtype)
            error = _probe(function, device, head_dim, dtype)
            gain = _gain(function, exact.function, device, head_dim, dtype)
        except Exception as fault:  # noqa: BLE001 - of a package that is not ours
            reason = next(iter(str(fault).splitlines()), "")
            _tried[key] = None, f"failed with {type(fault).__name__} ({reason})"
        else:
            is_fit, finding = judge(error, gain, exact.name)
            _tried[key] = function if is_fit else None, finding
    return _tried[key]


def judge(error: float, gain: float | None, exact_name: str) -> tuple[bool, str]:
    """Whether a kernel in 8 bits is used, and what is said about it.

    Args:
        error: relative L2 error on the probe. gain: times as fast as exact attention, None where
            that was not measured.
    """
    if not error <= FAST_ERROR:  # NaN is not
        return False, f"error {error:.2g} on a small input, {FAST_ERROR:.2g} is allowed"
    finding = f"error {error:.2g} on a small input"
    if gain is None:
        return True, finding
    finding += f", {gain:.2f} times as fast as {exact_name}"
    return gain >= FAST_GAIN, finding


def _probe(function: Attention, device: torch.device, head_dim: int, dtype: torch.dtype) -> float:
    """Relative L2 error of an attention on a small input."""
    query, key, value = (x.to(dtype) for x in probe_inputs(1000, 2, head_dim, device))
    with sdpa_kernel(SDPBackend.MATH):
        expected = sdpa(query.float(), key.float(), value.float())
    got = function(query, key, value).float()
    if got.shape != expected.shape:
        raise RuntimeError(f"it returns {list(got.shape)} for {list(expected.shape)}")
    return ((got - expected).norm() / expected.norm()).item()


def probe_inputs(
    tokens: int, heads: int, head_dim: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values like a video's, [1, heads, S, D] float32, views of one buffer.

    Runs of eight tokens are alike, so attention has something to find; keys share a large mean.
    """
    generator = torch.Generator(device).manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    runs = -(-tokens // 8)
    kind, content = noise(1, runs, heads, head_dim), noise(1, runs, heads, head_dim)
    qkv = torch.stack([kind, kind, content], dim=2).repeat_interleave(8, dim=1)[:, :tokens]
    qkv = qkv + 0.5 * noise(*qkv.shape)
    qkv[:, :, 1] += 4 * noise(heads, head_dim)
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    return query, key, value


def _gain(
    function: Attention, exact: Attention, device: torch.device, head_dim: int, dtype: torch.dtype
) -> float | None:
    """Times as fast as exact attention at 8,192 tokens of 8 heads; None on a CPU."""
    if device.type != "cuda":
        return None
    inputs = [x.to(dtype) for x in probe_inputs(8192, 8, head_dim, device)]
    medians = []
    for attention in (exact, function):
        for _ in range(2):
            attention(*inputs)
        times = []
        for _ in range(5):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            with _current(device):
                start.record()
                attention(*inputs)
                end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        medians.append(statistics.median(times))
    return medians[0] / medians[1]


def _current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make a GPU the current one for a while; kernels of other packages launch there."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _only_long(fast: Attention, exact: Attention) -> Attention:
    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (fast if key.shape[2] >= FAST_MIN_TOKENS else exact)(query, key, value)

    return attention


# --- the arithmetic of kernels/triton_attention.py ----------------------------------------------


def int8_attention(query: Tensor, key: Tensor, value: Tensor, *, tile: int = 128) -> Tensor:
    """Attention with both products in int8: what our Triton kernel computes, in plain torch.

    * Keys lose their mean over the tokens: that adds the same to every score of a row, which
      softmax does not see. Queries and keys are rotated over the head dimension, which leaves their
      products alone and spreads outliers. Queries have a scale each, keys one a tile.
    * Weights are rounded against the largest of their own tile, so that rows that look at many
      tokens keep all 7 bits; they are divided by the sum of what they were rounded to.
    * Values lose their mean, which comes back at the end (weights sum to one), and are divided by
      the spread of their channel. A scale a tile keeps text from coarsening the image.

    Args:
        query: [B, heads, S, D]; key, value: [B, heads, T, D]; D a power of two.
        tile: keys rounded together.
    Returns:
        [B, heads, S, D] in query's dtype.
    Source: the mean of the keys arXiv:2410.02367 (SageAttention); rotation arXiv:2404.00456
        (QuaRot); the sum over tiles arXiv:2205.14135 (FlashAttention).
    """
    width = query.shape[-1]
    wide_key, wide_value = key.float(), value.float()
    mean = wide_value.mean(dim=2, keepdim=True)
    spread = wide_value.std(dim=2, keepdim=True, correction=0)
    spread = torch.where(spread == 0, 1.0, spread)
    keys = rotate(wide_key - wide_key.mean(dim=2, keepdim=True), width)
    values = (wide_value - mean) / spread
    queries, query_scale = _whole(rotate(query.float(), width), (-1,))
    query_scale = query_scale * (width**-0.5 * math.log2(math.e))
    peak = torch.full_like(query_scale, -math.inf)
    total, sums = torch.zeros_like(query_scale), torch.zeros_like(queries)
    for some_keys, some_values in zip(keys.split(tile, 2), values.split(tile, 2), strict=True):
        k, k_scale = _whole(some_keys, (-2, -1))
        v, v_scale = _whole(some_values, (-2, -1))
        scores = (queries @ k.transpose(-1, -2)) * (query_scale * k_scale)
        top = scores.amax(dim=-1, keepdim=True)
        weights = (127 * torch.exp2(scores - top)).round()
        new_peak = torch.maximum(peak, top)
        kept, added = torch.exp2(peak - new_peak), torch.exp2(top - new_peak)
        total = total * kept + weights.sum(dim=-1, keepdim=True) * added
        sums = sums * kept + (weights @ v) * (added * v_scale)
        peak = new_peak
    return (sums / total * spread + mean).to(query.dtype)


def _whole(x: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Integers within -127..127 in float32, which sums 128 products exactly; and their scales."""
    largest = x.abs().amax(dim=axes, keepdim=True)
    scale = torch.where(largest == 0, 1.0, largest / 127)
    return (x / scale).round(), scale
