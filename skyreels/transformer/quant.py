"""Linear layers with an 8-bit weight.

A weight is float8 e4m3 or int8 with a float32 scale, per tensor or per output channel. How it is
multiplied depends on the requested precision and on the device:

* 8-bit GEMM: the input is quantized too, every token with a scale of its own, and the tensor cores
  multiply 8-bit numbers. int8 weights and their inputs are rotated before they are rounded: a
  Hadamard rotation of 256 channels spreads an outlier over all of them, and cancels in the GEMM.
  The result differs from that of the dequantized weight, so this takes `precision="fp8"` or
  `"int8"`; it is never chosen by default.
* weight-only: the weight is dequantized to the dtype of the activations for every call. Half the
  bytes of bfloat16, its arithmetic. For files that hold 8 bits (`precision="auto"`), for e5m2, for
  int8 that was not rotated (quantizing such an input costs 6.6 % where channels differ), and for
  devices that multiply no 8-bit numbers or fail the self-test.

The GEMM is chosen per device on the first call and cached: a layer may be on another device in the
next run. On a CPU the same numbers are multiplied, so that the cost of rounding can be measured
anywhere.

What is never quantized here, and why: patch, time, vector, guidance and text embedders and the
final layer touch every token at little cost; the block modulations set shift, scale and gate of all
tokens from one vector; the text stream of the first and last two double blocks is at most 256
tokens that all others read; and the attention projections of the image in the last double block,
0.4 % of the work of a step, lift fp8 on the built-in model from 35.5 to 38.3 dB against float32
(tests/bench/LOG.md). A checkpoint that already holds one of these in 8 bits keeps them, except that
everything outside the blocks is dequantized while loading.

Given up: e5m2 as a target (5.3 % error where e4m3 has 2.6 %), and the `input_scale` of scaled fp8
files: inputs are measured on the spot.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels
from ..kernels import Activation, QuantFormat, QuantizedActivation, dispatch, operators
from ..kernels.dispatch import BYTE_ALIGNMENT, Candidate, Decision, DeviceInfo, Finding, short
from ..kernels.reference import hadamard_rotate, quantize_rows

logger = logging.getLogger("skyreels.transformer.quant")

STORAGE_DTYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
FLOAT8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
#: channels rotated together, where the widths allow it
MAX_HADAMARD_BLOCK = 256
#: of an accumulator held at a time: 128 MB in int32, and enough tokens to keep a GPU busy; four
#: times as many where it is bfloat16 and only copied
CHUNK_ELEMENTS = 2**25
#: output channels of a weight quantized at a time, so that few are held in float32
CHUNK_ROWS = 256
#: of the GEMMs that are timed against each other once: tokens, output and input channels. The
#: fewest input channels of the model: there quantizing inputs and scaling results weigh most
TIMED_SHAPE = (8192, 3072, 3072)
#: calls of that many tokens in one of a whole clip, which dequantizes a weight once
TIMED_CALLS = 6
#: widths and offsets that the CUDA kernels need to be multiples of, in numbers of 8 bits
ALIGNMENT = 16
#: relative L2 error of a self-test; bfloat16 results are within 0.003
PROBE_TOLERANCE = 0.01


class QuantLinear(nn.Module):
    """A linear layer with an 8-bit weight.

    Args:
        weight: [out, in] float8 or int8.
        scale: float32, one element or [out, 1]; None means 1.
        bias: [out] in the compute dtype, or None.
        hadamard_block: channels of the input that were rotated together before the weight was
            rounded, 0 for none.
        weight_only: dequantize the weight, whatever the device can multiply.
        compute_dtype: of the results where the input is quantized; else it is that of the input.
    """

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        *,
        hadamard_block: int = 0,
        weight_only: bool = True,
        compute_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.hadamard_block, self.weight_only = hadamard_block, weight_only
        self.compute_dtype = compute_dtype
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = None if scale is None else nn.Parameter(scale, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def input_format(self) -> QuantFormat | None:
        """The format that the layer wants its input in on its device; None for a plain tensor."""
        gemm = None if self.weight_only else self._gemm(self.weight)
        return None if gemm is None else QuantFormat(self.weight.dtype, self.hadamard_block)

    def forward(self, x: Activation) -> Tensor:
        """[..., in] -> [..., out]."""
        return self.part(x, slice(None), slice(None), self.bias)

    def part(
        self,
        x: Activation,
        out_slice: slice,
        in_slice: slice,
        bias: Tensor | None,
        out: Tensor | None = None,
        add: bool = False,
    ) -> Tensor:
        """Some output channels from some input channels.

        Args:
            x: [..., in_slice]; a tensor is quantized here if the layer multiplies 8-bit numbers.
            out_slice: of the output channels.
            in_slice: of the input channels, whole Hadamard blocks.
            bias: [out_slice], or None.
            out: [..., out_slice] to write to, a few tokens at a time.
            add: add to `out` instead.

        Returns:
            [..., out_slice]; `out` if it was given.
        """
        first, last, _ = in_slice.indices(self.in_features)
        assert self.hadamard_block == 0 or (
            first % self.hadamard_block == last % self.hadamard_block == 0
        ), f"columns {first} to {last} cut a Hadamard block of {self.hadamard_block}"
        weight, scale = self.weight[out_slice, in_slice], self._scale(out_slice)
        gemm = None if self.weight_only else self._gemm(weight)
        if gemm is None:
            if not isinstance(x, Tensor):
                rotated = _float32(x.qdata) * x.scale
                x = hadamard_rotate(rotated, self.hadamard_block).to(self.compute_dtype)
            result = F.linear(x, dequantize(weight, scale, x.dtype, self.hadamard_block), bias)
            if out is None:
                return result
            return out.add_(result) if add else out.copy_(result)
        dtype = self.compute_dtype
        if isinstance(x, Tensor):
            dtype = x.dtype
            x = kernels.quantize_rows(x, QuantFormat(weight.dtype, self.hadamard_block))
        assert x.qdata.dtype == weight.dtype, f"input of {x.qdata.dtype} for {weight.dtype}"
        if out is None:
            flat = QuantizedActivation(*(tensor.flatten(0, -2) for tensor in x))
            result = multiply(gemm, flat, weight, scale, bias, dtype)
            return torch.unflatten(result, 0, x.qdata.shape[:-1])
        for target, *tokens in zip(out, *x, strict=True):
            multiply_into(target, gemm, QuantizedActivation(*tokens), weight, scale, bias, add=add)
        return out

    def _scale(self, out_slice: slice) -> Tensor | None:
        scale = self.weight_scale
        return scale if scale is None or scale.numel() == 1 else scale[out_slice]

    def _gemm(self, weight: Tensor) -> str | None:
        """How this (part of the) weight is multiplied; None: it is dequantized."""
        if weight.is_cuda and any(
            size % ALIGNMENT for size in (*weight.shape, weight.storage_offset())
        ):
            return None
        return cast(str | None, choose_gemm(weight.dtype, weight.device).impl)


# --- GEMMs --------------------------------------------------------------------------------------


def multiply(
    gemm: str,
    x: QuantizedActivation,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """A linear layer of 8-bit numbers.

    Args:
        gemm: ROWWISE, FUSED, or of UNSCALED_GEMMS.
        x: [M, K], scale [M, 1].
        weight: [N, K].
        scale: of the weight, one element or [N, 1]; None means 1.
        bias: [N] or None.
        dtype: of the result.

    Returns:
        [M, N] in dtype.
    """
    if gemm == ROWWISE and len(x.qdata):
        return _scaled_mm(*x, weight, scale, bias).to(dtype)
    out = torch.empty(len(x.qdata), len(weight), dtype=dtype, device=weight.device)
    multiply_into(out, gemm, x, weight, scale, bias)
    return out


def multiply_into(
    out: Tensor,
    gemm: str,
    x: QuantizedActivation,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    *,
    add: bool = False,
) -> None:
    """`multiply` with its result written to `out`, or added to it; then there is no bias."""
    if gemm == FUSED:
        kernels.int8_linear_(*x, weight, scale, bias, out, add)
        return
    is_in_place = out.dtype == torch.bfloat16 and out.is_contiguous() and not add
    if gemm == ROWWISE and len(x.qdata) and is_in_place:
        # torch has no shape-only version that writes; the same launch, its result dropped
        _scaled_mm(*x, weight, scale, bias, None if out.is_meta else out)
        return
    elements = 4 * CHUNK_ELEMENTS if gemm == ROWWISE else CHUNK_ELEMENTS
    tokens = max(256, elements // len(weight) // 256 * 256)
    for target, part, part_scale in zip(
        *(torch.split(tensor, tokens) for tensor in (out, *x)), strict=True
    ):
        if not len(part):
            continue
        if gemm == ROWWISE:
            result = _scaled_mm(part, part_scale, weight, scale, bias)
            target.add_(result) if add else target.copy_(result)
        else:
            acc = UNSCALED_GEMMS[gemm](part, weight)
            kernels.rescale_(acc, part_scale, scale, bias, target, add)


def _scaled_mm(
    qdata: Tensor,
    act_scale: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    channels = act_scale.new_ones(1, 1) if scale is None else scale.reshape(1, -1)
    channels = channels.expand(1, len(weight)).contiguous()
    return torch._scaled_mm(
        _aligned(qdata),
        _aligned(weight).t(),
        scale_a=_aligned(act_scale),
        scale_b=_aligned(channels),
        bias=None if bias is None else _aligned(bias.to(torch.bfloat16)),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
        out=out,
    )


def _aligned(x: Tensor) -> Tensor:
    """Copy a tensor whose address is not a multiple of 16 bytes."""
    # cuBLAS 12.9 and later refuses or misreads such row scales on sm90 (pytorch PR 159957); the
    # behaviour of other vendor kernels with views is undocumented
    return x if x.is_meta or x.data_ptr() % BYTE_ALIGNMENT == 0 else x.clone()


def _unscaled_mm(qdata: Tensor, weight: Tensor) -> Tensor:
    """float8 by the per-tensor kernel, with scales of 1."""
    one = torch.ones((), device=qdata.device)
    return torch._scaled_mm(
        _aligned(qdata),
        _aligned(weight).t(),
        scale_a=one,
        scale_b=one,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


def _int_mm(qdata: Tensor, weight: Tensor) -> Tensor:
    """int8, summed in int32."""
    count = len(qdata)
    if qdata.is_cuda and count <= 16:  # cuBLAS takes no fewer
        qdata = F.pad(qdata, (0, 0, 0, 32 - count))
    return torch._int_mm(_aligned(qdata), _aligned(weight).t())[:count]


def _float32_mm(qdata: Tensor, weight: Tensor) -> Tensor:
    """Every product is exact, the sum as exact as float32 is."""
    return _float32(qdata) @ _float32(weight).t()


#: float8 with both scales applied inside: the fast path of sm89, sm90 and sm100
ROWWISE = "_scaled_mm by rows"
#: int8 with its epilogue inside, so that no int32 reaches memory
FUSED = "our Triton kernel"
#: no 8-bit GEMM at all
DEQUANTIZED = "weights dequantized for every call"
#: [M, K] and [N, K] 8-bit numbers -> [M, N] accumulator, to be scaled afterwards
UNSCALED_GEMMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "_scaled_mm per tensor": _unscaled_mm,
    "_int_mm": _int_mm,
    "float32": _float32_mm,
}
#: type of device -> dtype of the weight -> GEMMs, the preferred first
GEMMS: dict[str, dict[torch.dtype, tuple[str, ...]]] = {
    "cuda": {
        torch.float8_e4m3fn: (ROWWISE, "_scaled_mm per tensor"),
        torch.int8: (FUSED, "_int_mm"),
    },
    "cpu": {torch.float8_e4m3fn: ("float32",), torch.int8: ("_int_mm", "float32")},
    # shapes only: what a GPU would do, for counters
    "meta": {torch.float8_e4m3fn: (ROWWISE,), torch.int8: (FUSED,)},
}
#: least compute capability with tensor cores for a format, or that a GEMM is written for
CAPABILITIES: dict[torch.dtype | str, tuple[int, int]] = {
    torch.float8_e4m3fn: (8, 9),
    torch.int8: (7, 5),
    FUSED: (8, 0),
}


# --- which GEMM, on which device ----------------------------------------------------------------


def choose_gemm(storage_dtype: torch.dtype, device: torch.device) -> Decision:
    """How weights of a dtype are multiplied on a device.

    Returns:
        A GEMM for `multiply`, or None where weights are dequantized.
    """
    key = ("GEMM", storage_dtype, device, dispatch.backend())
    return dispatch.remembered(key, lambda: _decide_gemm(storage_dtype, device))


def _decide_gemm(storage_dtype: torch.dtype, device: torch.device) -> Decision:
    info = dispatch.describe(device)
    decision = decide_gemm(
        storage_dtype,
        info,
        partial(probe_gemm, storage_dtype=storage_dtype, device=device),
        partial(time_gemms, storage_dtype=storage_dtype, device=device),
    )
    subject = f"8-bit linear layers with {short(storage_dtype)} weights on {device}"
    preferred = GEMMS["cuda"].get(storage_dtype, (DEQUANTIZED,))[0]
    if device.type != "meta":
        dispatch.log_decision(subject, info, decision, preferred, logger)
    return decision


def decide_gemm(
    storage_dtype: torch.dtype,
    info: DeviceInfo,
    probe: Callable[[str], Finding],
    clock: Callable[[Sequence[str]], dict[str, float]],
) -> Decision:
    """The fastest GEMM that a device has and that passes its self-test.

    On a CUDA device, quantizing the input, multiplying and scaling are timed together beside
    dequantizing the weight and multiplying in 16 bits; that may win where scales are applied in
    passes of their own. Elsewhere the first that passes is taken.

    Args:
        storage_dtype: of the weight.
        info: of the device.
        probe: name of a GEMM -> its finding.
        clock: names -> milliseconds of each, and of DEQUANTIZED.

    Returns:
        The name of a GEMM as `impl`, or None: DEQUANTIZED.
    """
    dtype, kind, backend = short(storage_dtype), info.type, dispatch.backend()
    if kind == "cuda" and info.capability is None:
        kind = "rocm"
    names = GEMMS.get(kind, {}).get(storage_dtype)
    if names is None:
        missing = f"of {dtype} here" if kind in GEMMS else f"on {kind} devices here"
        return Decision(None, f"no 8-bit GEMM {missing}", DEQUANTIZED)
    if kind == "meta":
        return Decision(names[0], "shapes only", names[0])
    if backend == "reference":
        return Decision("float32", f"{dispatch.BACKEND_VARIABLE}=reference", "float32")
    if kind == "cuda" and (problem := _too_old(storage_dtype, info)):
        return Decision(None, f"tensor cores take {dtype} {problem}", DEQUANTIZED)
    candidates = [
        Candidate(name, partial(str, name), probe, _gemm_problem(name, info)) for name in names
    ]

    def milliseconds(passed: dict[str, str]) -> dict[str, float]:
        return {} if backend == "triton" and FUSED in passed else clock(list(passed))

    return dispatch.decide(
        candidates,
        DEQUANTIZED,
        clock=milliseconds if kind == "cuda" else None,
        size=f"{' x '.join(map(str, TIMED_SHAPE))} with rounding and scales",
    )


def _gemm_problem(name: str, info: DeviceInfo) -> str:
    if info.type != "cuda":
        return ""
    return _too_old(name, info) or (dispatch.triton_problem(info) if name == FUSED else "")


def _too_old(what: torch.dtype | str, info: DeviceInfo) -> str:
    least, found = CAPABILITIES.get(what, (0, 0)), info.capability or (0, 0)
    if found >= least:
        return ""
    return "from compute capability {}.{} on, this is {}.{}".format(*least, *found)


def time_gemms(
    names: Sequence[str], storage_dtype: torch.dtype, device: torch.device
) -> dict[str, float]:
    """Time a linear layer of TIMED_SHAPE, from an input in bfloat16 to a result with bias.

    Returns:
        Milliseconds of each GEMM, and of DEQUANTIZED with its share of dequantizing the weight once
        for TIMED_CALLS times as many tokens.
    """
    tokens, out_features, in_features = TIMED_SHAPE
    block = MAX_HADAMARD_BLOCK if storage_dtype == torch.int8 else 0
    act_format = QuantFormat(storage_dtype, block)
    generator = torch.Generator(device).manual_seed(0)  # zeros would run faster than numbers do
    x = torch.randn(tokens, in_features, generator=generator, device=device).bfloat16()
    weight = torch.randn(out_features, in_features, generator=generator, device=device)
    weight, scale = quantize_rows(weight, storage_dtype, block)
    bias = torch.zeros(out_features, dtype=torch.bfloat16, device=device)

    def in_8_bits(gemm: str) -> Tensor:
        quantized = kernels.quantize_rows(x[None], act_format)
        tokens = QuantizedActivation(*(tensor[0] for tensor in quantized))
        return multiply(gemm, tokens, weight, scale, bias, x.dtype)

    dequantized = dequantize(weight, scale, x.dtype, block)
    once = "dequantizing"
    contenders: dict[str, Callable[[], object]] = {
        **{name: partial(in_8_bits, name) for name in names},
        DEQUANTIZED: partial(F.linear, x, dequantized, bias),
        once: partial(dequantize, weight, scale, x.dtype, block),
    }
    times = dispatch.median_ms(contenders, device)
    times[DEQUANTIZED] += times.pop(once) / TIMED_CALLS
    return times


def probe_gemm(gemm: str, storage_dtype: torch.dtype, device: torch.device) -> Finding:
    """Compare a GEMM with its definition, on a part of a weight and tokens of unlike size.

    The result with bias is written, the one without is added to it.

    Returns:
        The largest error of a token.
    """

    def inputs() -> Iterator[tuple[str, tuple[Tensor, ...]]]:
        generator = torch.Generator().manual_seed(0)
        x, weight = (torch.randn(size, 384, generator=generator) for size in (273, 192))
        x[:4], weight[:4] = 1.0, 1.0  # largest numbers only: sums that saturate show here
        x *= torch.logspace(-2, 2, len(x))[:, None]
        qdata, act_scale = quantize_rows(x[:, 128:], storage_dtype)
        quantized, scale = quantize_rows(weight, storage_dtype)
        yield (
            "",
            (qdata, act_scale, quantized, scale, torch.randn(len(weight), generator=generator)),
        )

    def run(
        qdata: Tensor, act_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor
    ) -> list[Tensor]:
        out = torch.empty(len(qdata), len(weight), dtype=torch.bfloat16, device=device)
        for part in (slice(0, 5), slice(5, None)):  # few tokens take another way
            tokens = QuantizedActivation(qdata[part].to(device), act_scale[part].to(device))
            args = (out[part], gemm, tokens, weight.to(device)[:, 128:], scale.to(device))
            multiply_into(*args, bias.to(device))
            multiply_into(*args, None, add=True)
        return [out]

    def definition(
        qdata: Tensor, act_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor
    ) -> list[Tensor]:
        acc = qdata.double() @ weight[:, 128:].double().T
        return [2 * acc * act_scale * scale.T + bias]

    return dispatch.probe(run, definition, inputs(), PROBE_TOLERANCE, _worst_token)


def _worst_token(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest relative L2 error of a row; NaN if any number is not finite."""
    ours, right = got[0].double().cpu(), expected[0]
    if not bool(ours.isfinite().all()):
        return math.nan
    errors: Tensor = (ours - right).norm(dim=1) / right.norm(dim=1)
    return float(errors.max())


def decisions(device: torch.device) -> dict[str, dict[str, Decision]]:
    """What `doctor` says of 8-bit linear layers on a device."""
    found, chosen = {}, []
    for name, storage_dtype in STORAGE_DTYPES.items():
        decision = choose_gemm(storage_dtype, device)
        chosen.append(decision.impl)
        if decision.impl is not None:
            decision = decision._replace(name=f"8-bit inputs, multiplied by {decision.name}")
        found[f"{name} linears"] = {"": decision}
    if device.type == "cuda" and any(gemm in UNSCALED_GEMMS for gemm in chosen):
        found["scales of 8-bit products"] = {"": operators.choose("rescale_", device)}
    if device.type == "cuda":
        found["weights in GGUF blocks"] = {"": operators.choose("dequantize_blocks_", device)}
    is_there = dispatch.is_installed("comfy_kitchen")
    found["comfy_kitchen int8_linear"] = {
        "": Decision(
            None,
            "not used, because it is not benchmarked against our GEMMs",
            "found" if is_there else "not installed",
        )
    }
    return found


# --- weights ------------------------------------------------------------------------------------


def dequantize(
    weight: Tensor, scale: Tensor | None, dtype: torch.dtype, hadamard_block: int = 0
) -> Tensor:
    """Convert an 8-bit weight to a floating dtype; it is multiplied by the scale in float32.

    Args:
        weight: [out, in] float8 or int8.
        scale: float32, one element or [out, 1]; None means 1.
        dtype: of the result.
        hadamard_block: that it was rotated with, and is rotated back with; 0 for none.

    Returns:
        [out, in] in dtype.
    """
    if scale is None and hadamard_block == 0 and weight.device.type != "cpu":
        return weight.to(dtype)
    upcast = _float32(weight)
    if scale is not None:
        upcast.mul_(scale)
    return hadamard_rotate(upcast, hadamard_block).to(dtype)


def _float32(qdata: Tensor) -> Tensor:
    """8-bit numbers in float32. CPUs look float8 up: torch converts it ten times more slowly."""
    if qdata.device.type != "cpu" or qdata.dtype not in FLOAT8_DTYPES:
        return qdata.float()
    table = torch.arange(256, dtype=torch.uint8, device="cpu").view(qdata.dtype).float()
    return table.index_select(0, qdata.view(torch.uint8).int().flatten()).view(qdata.shape)


def quantize(
    weight: Tensor,
    storage_dtype: torch.dtype,
    hadamard_block: int = 0,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantize a weight to 8 bits with one scale per output channel.

    Args:
        weight: [out, in] float.
        storage_dtype: float8_e4m3fn or int8.
        hadamard_block: input channels rotated together before, 0 for none.
        device: where it is done, a few output channels at a time; None where the weight is.

    Returns:
        [out, in] in storage_dtype and [out, 1] float32, where the weight is; a row of zeros gets
        scale 1.
    """
    qdata = torch.empty(weight.shape, dtype=storage_dtype, device=weight.device)
    scale = torch.empty(len(weight), 1, device=weight.device)
    act_format = QuantFormat(storage_dtype, hadamard_block)
    for start in range(0, len(weight), CHUNK_ROWS):
        part = slice(start, start + CHUNK_ROWS)
        done = kernels.quantize_rows(weight[None, part].to(device or weight.device), act_format)
        qdata[part], scale[part] = done.qdata[0], done.scale[0]
    return qdata, scale


def hadamard_block_size(*widths: int) -> int:
    """The largest Hadamard block that divides all widths; 0 if there is none."""
    size = math.gcd(MAX_HADAMARD_BLOCK, *widths)
    return size if size > 1 else 0


def is_quantizable(name: str, num_layers: int) -> bool:
    """Whether `precision="fp8"` or `"int8"` quantizes this weight of the transformer.

    Args:
        name: of the weight.
        num_layers: number of double blocks.

    Returns:
        Whether it does.
    """
    kind, index, *rest = name.split(".")
    if kind not in ("double_blocks", "single_blocks") or name.endswith("_norm.weight"):
        return False
    part = rest[0]
    if part == "modulation" or part.endswith("_mod"):
        return False
    if kind == "single_blocks":
        return True
    if part.startswith("txt_"):
        return 2 <= int(index) < num_layers - 2
    return int(index) != num_layers - 1 or not part.startswith("img_attn_")
