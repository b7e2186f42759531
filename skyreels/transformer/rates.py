"""What a device reaches: operations and bytes a second, each measured once in a short probe.

A probe works on the shapes of a run, and takes at most 0.7 GB. A GPU first works for half a second,
until it has the clock that it keeps under load. What is found is remembered (runtime/outcomes.py)
until the device, the driver or torch change.
"""

import logging
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import dispatch
from ..runtime import Runtime, outcomes
from ..runtime.ladder import is_out_of_memory
from .attention import choose_attention
from .quant import MAX_HADAMARD_BLOCK, STORAGE_DTYPES, QuantLinear, quantize

logger = logging.getLogger("skyreels.transformer.rates")

#: names of rates; a GEMM in 8 bits includes rounding its input. A "link" brings bytes from main
#: memory, "peer" takes them to the next card
NAMES = (
    "GEMM fp32",
    "GEMM bf16",
    "GEMM fp8",
    "GEMM int8",
    "attention exact",
    "convolution",
    "memory",
    "link",
    "peer",
)
HEADS, HEAD_DIM = 24, 128
#: of the work on a GPU, where once takes less than a millisecond
REPEATS = 5
#: of the same work before a GPU is timed. A cool one is faster than its power lets it be for long:
#: an H100 was probed at 679 TFLOP/s of attention, and a whole forward pass has 555
WARM_SECONDS = 0.5


class _Size(NamedTuple):
    """How much a probe works on: tokens of products and of attention, width, bytes of copies."""

    tokens: int
    attended: int
    width: int
    copied_bytes: int
    conv: tuple[int, int, int, int]


_ON_GPU = _Size(16_384, 16_384, 3072, 2**28, (256, 8, 128, 128))
_ELSEWHERE = _Size(256, 512, 768, 2**25, (32, 4, 32, 32))


def known_rates(runtime: Runtime) -> dict[str, float]:
    """Rates of the runtime's device that were measured before.

    Returns:
        Name -> FLOP/s or bytes/s.
    """
    known = outcomes.known_rates(runtime.state_folder, outcomes.device_key(runtime.device))
    return {name: rate for name, rate in known.items() if name in NAMES}


def rates(runtime: Runtime, names: Iterable[str]) -> dict[str, float]:
    """Rates of the runtime's device: those known, and those asked for.

    Args:
        runtime: whose device is probed; its interrupt is asked for before each probe.
        names: of NAMES.

    Returns:
        Name -> FLOP/s or bytes/s; one that could not be measured now, as the device is full, is
        left out and tried again later.
    """
    key = outcomes.device_key(runtime.device)
    known = known_rates(runtime) | _measured.get(key, {})
    found: dict[str, float] = {}
    for name in names:
        if name in known or name not in NAMES:
            continue
        runtime.check_interrupt()
        try:
            rate = _measure(name, runtime.device)
        except Exception as error:
            if dispatch.broke_device(error):
                raise
            if not is_out_of_memory(error) and not dispatch.is_passing(error):
                dispatch.log_once(
                    f"{name} of {runtime.device} cannot be measured ({dispatch.brief(error)}): "
                    "times that depend on it are not predicted.",
                    source=logger,
                )
            continue
        if rate is not None:
            found[name] = rate
    _measured.setdefault(key, {}).update(found)
    outcomes.remember(runtime.state_folder, key, "rates", {k: round(v) for k, v in found.items()})
    return known | found


#: device -> rates of this process, where no file remembers them
_measured: dict[str, dict[str, float]] = {}


@torch.inference_mode()
def _measure(name: str, device: torch.device) -> float | None:
    """One rate; None where there is no such thing, as a link to the host's own memory."""
    size = _ON_GPU if device.type == "cuda" else _ELSEWHERE
    made = _work(name, device, size)
    if made is None:
        return None
    work, amount = made
    repeats = REPEATS if device.type == "cuda" else 1
    if device.type == "cuda" and name not in ("link", "peer"):
        _warm(work, device)
    milliseconds = dispatch.median_ms({name: partial(_repeat, work, repeats)}, device)[name]
    seconds = milliseconds / 1e3 / repeats
    del work, made
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return amount / seconds if seconds > 0 else None


def _warm(work: Callable[[], object], device: torch.device) -> None:
    started = time.monotonic()
    while time.monotonic() - started < WARM_SECONDS:
        _repeat(work, REPEATS)
        torch.cuda.synchronize(device)


def _repeat(work: Callable[[], object], repeats: int) -> None:
    for _ in range(repeats):
        work()


def _work(
    name: str, device: torch.device, size: _Size
) -> tuple[Callable[[], object], float] | None:
    """What is timed, and how many operations or bytes it is."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        # never zeros: a GPU that draws less power on them is faster
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    kind, _, form = name.partition(" ")
    if kind == "GEMM":
        dtype = torch.float32 if form == "fp32" else torch.bfloat16
        x, weight = (draw(n, size.width, dtype=dtype) for n in (size.tokens, size.width))
        return partial(_linear(weight, form), x), 2.0 * size.tokens * size.width**2
    if kind == "attention":
        tokens = size.attended
        query, key, value = (draw(1, HEADS, tokens, HEAD_DIM) for _ in range(3))
        attend = choose_attention(device, tokens=tokens).impl
        return partial(attend, query, key, value), 4.0 * tokens**2 * HEADS * HEAD_DIM
    if kind == "convolution":
        channels, frames, height, width = size.conv
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        x = draw(1, *size.conv, dtype=dtype).contiguous(memory_format=torch.channels_last_3d)
        weight = draw(channels, channels, 3, 3, 3, dtype=dtype)
        products = 27 * channels**2 * (frames - 2) * (height - 2) * (width - 2)
        return partial(F.conv3d, x, weight), 2.0 * products
    if kind == "peer":
        return _copy_to_peer(device, size.copied_bytes)
    return _copy(kind == "link", device, size.copied_bytes)


def _linear(weight: Tensor, form: str) -> Callable[[Tensor], Tensor]:
    """A linear layer whose blocks are multiplied as `Weights.gemm` says."""
    if form not in STORAGE_DTYPES:
        return partial(F.linear, weight=weight)
    block = MAX_HADAMARD_BLOCK if form == "int8" else 0
    stored, scale = quantize(weight, STORAGE_DTYPES[form], block)
    return QuantLinear(stored, scale, None, hadamard_block=block, weight_only=False)


def _copy(
    from_host: bool, device: torch.device, num_bytes: int
) -> tuple[Callable[[], object], float] | None:
    """A copy, within the device (its bytes are read and written) or to it from pinned memory."""
    if from_host and device.type != "cuda":
        return None
    target = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    if from_host:
        source = torch.ones(num_bytes, dtype=torch.uint8, pin_memory=True)
        return partial(target.copy_, source, non_blocking=True), float(num_bytes)
    return partial(target.copy_, torch.ones_like(target)), 2.0 * num_bytes


def _copy_to_peer(
    device: torch.device, num_bytes: int
) -> tuple[Callable[[], object], float] | None:
    """A copy to the next card of this process."""
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if count < 2:
        return None
    other = torch.device("cuda", ((device.index or 0) + 1) % count)
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source, device=other)
    return partial(target.copy_, source, non_blocking=True), float(num_bytes)
