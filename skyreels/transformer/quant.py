"""Linear layers with an 8-bit weight.

A weight is float8 e4m3 or int8 with a float32 scale, per tensor or per output row. What becomes of
it is decided by the precision that was asked for, and by the device:

* 8-bit products: the input is rounded to 8 bits too, every token with a scale of its own, and the
  tensor cores multiply 8-bit numbers. int8 weights are rotated before they are rounded, and so is
  the input: a rotation of 256 channels spreads an outlier over all of them, and cancels in the
  product. This is another result than that of the widened weight, so it is asked for by
  `precision="fp8"` or `"int8"`, never taken on its own.
* weight-only: the weight is widened to the dtype of the activations for every call. Half the bytes
  of bfloat16, its arithmetic. For files that hold 8 bits (`precision="auto"`), for e5m2, for int8
  that was not rotated (rounding such an input costs 6.6 % where channels differ), and for devices
  that multiply no 8-bit numbers or fail the self-test.

The device is asked when a layer is called, and once: a layer may be on another one in the next run.
On a CPU the same numbers are multiplied, so that what rounding costs can be measured anywhere.

What is never rounded here, and why: patch, time, vector, guidance and text embedders and the final
layer touch every token at little cost; the block modulations set shift, scale and gate of all
tokens from one vector; the text stream of the first and last two double blocks is at most 256
tokens that all others read; and the attention projections of the image in the last double block,
0.4 % of the work of a step, lift fp8 on the built-in model from 35.5 to 38.3 dB against float32
(tests/bench/LOG.md). A checkpoint that already holds one of these in 8 bits keeps what it has,
except that everything outside the blocks is widened while loading.

Given up: e5m2 as a target (5.3 % error where e4m3 has 2.6 %), and the `input_scale` of scaled fp8
files: inputs are measured on the spot.
"""

import logging
import math
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels
from ..kernels import RowFormat, Rows, dispatch
from ..kernels.dispatch import BYTE_ALIGNMENT, Decision, DeviceInfo, short
from ..kernels.reference import quantize_rows, rotate

logger = logging.getLogger("skyreels.transformer.quant")

STORAGE_DTYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
FLOAT8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
#: channels rotated together, where the widths allow it
MAX_ROTATION = 256
#: of a product made at a time where it is not the result itself: 128 MB in int32, and enough tokens
#: to keep a GPU busy; four times as many where it is bfloat16 and only goes elsewhere
CHUNK_ELEMENTS = 2**25
#: rows of a weight rounded at a time, so that little stands beside it in float32
CHUNK_ROWS = 256
#: of the products that are timed against each other once: tokens, output and input channels. The
#: fewest input channels of the model: what is done to inputs and results weighs most there
TIMED_SHAPE = (8192, 3072, 3072)
#: widths and offsets that the CUDA kernels want to be multiples of, in numbers of 8 bits
ALIGNMENT = 16
#: relative L2 error of a self-test; bfloat16 results are within 0.003
PROBE_TOLERANCE = 0.01


class QuantLinear(nn.Module):
    """A linear layer with an 8-bit weight.

    Args:
        weight: [out, in] float8 or int8.
        scale: float32, one element or [out, 1]; None means 1.
        bias: [out] in the compute dtype, or None.
        rotation: channels of the input that were rotated together before the weight was rounded,
            0 for none.
        weight_only: widen the weight, whatever the device can multiply.
        compute_dtype: of the results where the input is `Rows`; else it is that of the input.
    """

    def __init__(
        self, weight: Tensor, scale: Tensor | None, bias: Tensor | None, *,
        rotation: int = 0, weight_only: bool = True, compute_dtype: torch.dtype = torch.bfloat16,
    ) -> None:  # fmt: skip
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.rotation, self.weight_only = rotation, weight_only
        self.compute_dtype = compute_dtype
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = None if scale is None else nn.Parameter(scale, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def input_format(self) -> RowFormat | None:
        """What the layer wants its input rounded to where its weights are; None for a tensor as it
        is."""
        product = None if self.weight_only else self._product(self.weight)
        return None if product is None else RowFormat(self.weight.dtype, self.rotation)

    def forward(self, x: Tensor | Rows) -> Tensor:
        """[..., in] -> [..., out]."""
        return self.part(x, slice(None), slice(None), self.bias)

    def part(
        self, x: Tensor | Rows, rows: slice, columns: slice, bias: Tensor | None,
        out: Tensor | None = None, add: bool = False,
    ) -> Tensor:  # fmt: skip
        """Some output channels (rows of the weight) from some input channels (columns).

        Args:
            x: [..., columns]; a tensor is rounded here if the layer multiplies 8-bit numbers.
            columns: whole rotations. bias: [rows], or None.
            out: [..., rows] to write to a few tokens at a time. add: to add to `out` instead.
        Returns:
            [..., rows]; `out` if it was given.
        """
        first, last, _ = columns.indices(self.in_features)
        assert self.rotation == 0 or first % self.rotation == last % self.rotation == 0, (
            f"columns {first} to {last} cut a rotation of {self.rotation}"
        )
        weight, scale = self.weight[rows, columns], self._scale(rows)
        product = None if self.weight_only else self._product(weight)
        if product is None:
            if isinstance(x, Rows):
                x = rotate(_float32(x.values) * x.scale, self.rotation).to(self.compute_dtype)
            wide = dequantize(weight, scale, x.dtype, self.rotation)
            if out is None:
                return F.linear(x, wide, bias)
            result = F.linear(x, wide, bias)
            return out.add_(result) if add else out.copy_(result)
        dtype = self.compute_dtype
        if isinstance(x, Tensor):
            dtype = x.dtype
            x = kernels.quantize_rows(x, RowFormat(weight.dtype, self.rotation))
        assert x.values.dtype == weight.dtype, f"input of {x.values.dtype} for {weight.dtype}"
        if out is None:
            values, row_scale = (tensor.flatten(0, -2) for tensor in x)
            result = multiply(product, values, row_scale, weight, scale, bias, dtype)
            return result.unflatten(0, x.values.shape[:-1])
        for target, values, row_scale in zip(out, *x, strict=True):
            multiply_into(target, product, values, row_scale, weight, scale, bias, add)
        return out

    def _scale(self, rows: slice) -> Tensor | None:
        scale = self.weight_scale
        return scale if scale is None or scale.numel() == 1 else scale[rows]

    def _product(self, weight: Tensor) -> str | None:
        """How this (part of the) weight is multiplied; None: it is widened."""
        if weight.is_cuda and any(
            size % ALIGNMENT for size in (*weight.shape, weight.storage_offset())
        ):
            return None
        return arithmetic(weight.dtype, weight.device).impl


# --- products -----------------------------------------------------------------------------------


def multiply(
    product: str, values: Tensor, row_scale: Tensor, weight: Tensor, scale: Tensor | None,
    bias: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """A linear layer of 8-bit numbers.

    Args:
        product: SCALED, or of CODES.
        values: [M, K] of the input. row_scale: [M, 1]. weight: [N, K]. scale: of the weight, one
            element or [N, 1]; None means 1. bias: [N] or None.
    Returns:
        [M, N] in dtype.
    """
    if product == SCALED and len(values):
        return _scaled_mm(values, row_scale, weight, scale, bias).to(dtype)
    out = torch.empty(len(values), len(weight), dtype=dtype, device=values.device)
    multiply_into(out, product, values, row_scale, weight, scale, bias)
    return out


def multiply_into(
    out: Tensor, product: str, values: Tensor, row_scale: Tensor, weight: Tensor,
    scale: Tensor | None, bias: Tensor | None, add: bool = False,
) -> None:  # fmt: skip
    """`multiply` with its result written to `out`, or added to it; then there is no bias."""
    if product == FUSED:
        _int8_linear_(values, row_scale, weight, scale, bias, out, add)
        return
    takes_result = out.dtype == torch.bfloat16 and out.is_contiguous() and not add
    if product == SCALED and len(values) and takes_result:
        # torch has no shape-only version that writes; the same launch, with a result that goes
        _scaled_mm(values, row_scale, weight, scale, bias, None if out.is_meta else out)
        return
    elements = 4 * CHUNK_ELEMENTS if product == SCALED else CHUNK_ELEMENTS
    tokens = max(256, elements // len(weight) // 256 * 256)
    for target, part, part_scale in zip(
        *(tensor.split(tokens) for tensor in (out, values, row_scale)), strict=True
    ):
        if not len(part):
            continue
        if product == SCALED:
            result = _scaled_mm(part, part_scale, weight, scale, bias)
            target.add_(result) if add else target.copy_(result)
        else:
            codes = CODES[product](part, weight)
            _rescale_(codes, part_scale, scale, bias, target, add)


def _scaled_mm(
    values: Tensor, row_scale: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    columns = row_scale.new_ones(1, 1) if scale is None else scale.reshape(1, -1)
    columns = columns.expand(1, len(weight)).contiguous()
    return torch._scaled_mm(
        _aligned(values), _aligned(weight).t(), scale_a=_aligned(row_scale),
        scale_b=_aligned(columns), bias=None if bias is None else _aligned(bias.to(torch.bfloat16)),
        out_dtype=torch.bfloat16, use_fast_accum=True, out=out,
    )  # fmt: skip


def _aligned(x: Tensor) -> Tensor:
    """x, or a copy where it starts in the middle of 16 bytes.

    cuBLAS 12.9 and later refuses or misreads row scales there on sm90 (pytorch PR 159957); what
    other vendor kernels do with views is told nowhere.
    """
    return x if x.is_meta or x.data_ptr() % BYTE_ALIGNMENT == 0 else x.clone()


def _unscaled_mm(values: Tensor, weight: Tensor) -> Tensor:
    """float8 by the per-tensor kernel, with scales of 1."""
    one = torch.ones((), device=values.device)
    return torch._scaled_mm(
        _aligned(values),
        _aligned(weight).t(),
        scale_a=one,
        scale_b=one,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


def _int_mm(values: Tensor, weight: Tensor) -> Tensor:
    """int8, summed in int32."""
    count = len(values)
    if values.is_cuda and count <= 16:  # cuBLAS takes no fewer
        values = F.pad(values, (0, 0, 0, 32 - count))
    return torch._int_mm(_aligned(values), _aligned(weight).t())[:count]


def _float32_mm(values: Tensor, weight: Tensor) -> Tensor:
    """Every product is exact, the sum as exact as float32 is."""
    return _float32(values) @ _float32(weight).t()


#: float8 with both scales applied inside: the fast path of sm89, sm90 and sm100
SCALED = "_scaled_mm by rows"
#: int8, with scales, bias and sum applied inside, so that no int32 reaches memory
FUSED = "our Triton kernel"
#: no product of 8-bit numbers at all
DEQUANTIZED = "weights dequantized for every call"
#: [M, K] and [N, K] 8-bit numbers -> [M, N] wide ones, to be scaled afterwards
CODES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "_scaled_mm per tensor": _unscaled_mm,
    "_int_mm": _int_mm,
    "float32": _float32_mm,
}
#: kind of device -> dtype of the weight -> products in the order in which they are tried
CANDIDATES: dict[str, dict[torch.dtype, tuple[str, ...]]] = {
    "cuda": {
        torch.float8_e4m3fn: (SCALED, "_scaled_mm per tensor"),
        torch.int8: (FUSED, "_int_mm"),
    },
    "cpu": {torch.float8_e4m3fn: ("float32",), torch.int8: ("_int_mm", "float32")},
    # shapes only: what a GPU would do, for those who count
    "meta": {torch.float8_e4m3fn: (SCALED,), torch.int8: (FUSED,)},
}
#: least compute capability with tensor cores for a format, or for what a product is written in
CAPABILITIES: dict[torch.dtype | str, tuple[int, int]] = {
    torch.float8_e4m3fn: (8, 9), torch.int8: (7, 5), FUSED: (8, 0),
}  # fmt: skip


# --- scales, after the product ------------------------------------------------------------------


def rescale(
    codes: Tensor, row_scale: Tensor, scale: Tensor | None, bias: Tensor | None, out: Tensor,
    add: bool,
) -> None:  # fmt: skip
    """codes * row_scale * scale + bias, written to `out` or added to it.

    In passes that write the dtype of `out`: a float32 copy of the result would take more time than
    8-bit products of 3,072 channels save. Where that dtype is bfloat16 the result is rounded to it
    two or three times, which rounding to 8 bits leaves far behind.

    Args:
        codes: [M, N] int32, bfloat16 or float32. row_scale: [M, 1]. scale: one element, [N, 1] or
            None. bias: [N] or None. out: [M, N].
    """
    # between the two scales a number may be beyond float16, which ends at 65,504
    dtype = torch.float32 if out.dtype == torch.float16 else out.dtype
    is_apart = add or dtype != out.dtype
    scaled = torch.empty_like(out, dtype=dtype) if is_apart else out
    torch.mul(codes, row_scale, out=scaled)
    if scale is not None:
        scaled.mul_(scale.reshape(1, -1))
    if bias is not None:
        scaled.add_(bias)
    if is_apart:
        out.add_(scaled) if add else out.copy_(scaled)


_scalings: dict[Hashable, Any] = {}


def scaling(device: torch.device) -> Decision:
    """What scales products on a CUDA device: a kernel, or None for `rescale`; logged once."""
    return dispatch.remembered(
        _scalings, (device, dispatch.backend()),
        lambda: choose_scaling(dispatch.describe(device), device),
    )  # fmt: skip


def choose_scaling(info: DeviceInfo, device: torch.device) -> Decision:
    """The Triton kernel, if it runs on the device and agrees there with `rescale`."""
    problem, is_final = dispatch.triton_problem(info), True
    if not problem:
        try:
            from ..kernels.triton.rescale import rescale_

            problem = scaling_problem(rescale_, device)
        except Exception as error:  # noqa: BLE001 - compilers fail in ways of their own
            problem, is_final = dispatch.failed_trial(error, "the kernel that scales products")
        if not problem:
            return Decision(rescale_, "tested")
        problem = f"its kernel {problem}"
    dispatch.say_once(
        f"Products of 8-bit numbers are scaled in plain torch on {device}: {problem}.",
        source=logger,
    )
    return Decision(None, problem, is_final)


def scaling_problem(kernel: Callable[..., None], device: torch.device) -> str:
    """Compare a kernel with `rescale`, "" if they agree."""
    with dispatch.apart():
        generator = torch.Generator().manual_seed(0)
        codes = torch.randint(-(2**20), 2**20, (37, 1300), generator=generator, dtype=torch.int32)
        row_scale, scale = (torch.rand(n, 1, generator=generator) / 1024 for n in codes.shape)
        bias = torch.randn(codes.shape[1], generator=generator).bfloat16()
        before = torch.randn(37, 2000, generator=generator).bfloat16()
        for factor, addend, add in ((scale, bias, False), (scale[0], None, True), (None,) * 3):
            results = []
            for function, place in ((rescale, torch.device("cpu")), (kernel, device)):
                wide = before.to(place, copy=True)
                function(
                    codes.to(place), row_scale.to(place),
                    None if factor is None else factor.to(place),
                    None if addend is None else addend.to(place), wide[:, 500:1800], bool(add),
                )  # fmt: skip
                results.append(wide.cpu().double())
            expected, got = results
            difference = ((got - expected).norm() / expected.norm()).item()
            if not difference <= PROBE_TOLERANCE / 2:
                return f"differs from its definition by {difference:.1%}"
    return ""


def _rescale_on_cuda(
    codes: Tensor, row_scale: Tensor, scale: Tensor | None, bias: Tensor | None, out: Tensor,
    add: bool,
) -> None:  # fmt: skip
    kernel = scaling(out.device).impl if out.dtype == torch.bfloat16 else None
    (kernel or rescale)(codes, row_scale, scale, bias, out, add)


_library = torch.library.Library(kernels.NAMESPACE, "FRAGMENT")
_library.define(
    "rescale_(Tensor codes, Tensor row_scale, Tensor? scale, Tensor? bias, Tensor(a!) out, "
    "bool add) -> ()"
)
_library.impl("rescale_", rescale, "CompositeExplicitAutograd")
_library.impl("rescale_", lambda *_: None, "Meta")
_library.impl("rescale_", _rescale_on_cuda, "CUDA")
_rescale_ = getattr(torch.ops, kernels.NAMESPACE).rescale_.default


def _int8_linear(
    values: Tensor, row_scale: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None,
    out: Tensor, add: bool,
) -> None:  # fmt: skip
    from ..kernels.triton.int8 import int8_linear_

    int8_linear_(values, row_scale, weight, scale, bias, out, add)


_library.define(
    "int8_linear_(Tensor values, Tensor row_scale, Tensor weight, Tensor? scale, Tensor? bias, "
    "Tensor(a!) out, bool add) -> ()"
)
# not for CUDA alone: Triton's interpreter runs it on a CPU
_library.impl("int8_linear_", _int8_linear, "CompositeExplicitAutograd")
_library.impl("int8_linear_", lambda *_: None, "Meta")
_int8_linear_ = getattr(torch.ops, kernels.NAMESPACE).int8_linear_.default


# --- which product, on which device -------------------------------------------------------------


_arithmetics: dict[Hashable, Any] = {}


def arithmetic(storage_dtype: torch.dtype, device: torch.device) -> Decision:
    """How weights of a dtype are multiplied on a device; found out and logged once for each.

    Returns:
        a product for `multiply`, or None: weights are dequantized; and why this and nothing faster.
    """
    key = (storage_dtype, device, dispatch.backend())
    if isinstance(known := _arithmetics.get(key), Decision):
        return known
    chosen = dispatch.remembered(
        _arithmetics, key,
        lambda: choose(
            storage_dtype, dispatch.describe(device),
            partial(probe, storage_dtype=storage_dtype, device=device),
            partial(race, storage_dtype=storage_dtype, device=device),
        ),
    )  # fmt: skip
    if device.type != "meta":
        is_fallback = chosen.impl != (CANDIDATES["cuda"].get(storage_dtype) or (None,))[0]
        dispatch.say_once(
            f"8-bit linear layers with {short(storage_dtype)} weights on {device}: "
            f"{chosen.impl or DEQUANTIZED} ({chosen.reason})",
            logging.WARNING if is_fallback and device.type != "cpu" else logging.INFO, logger,
        )  # fmt: skip
    return chosen


def choose(
    storage_dtype: torch.dtype,
    info: DeviceInfo,
    test: Callable[[str], str],
    timed: Callable[[Sequence[str]], dict[str, float]],
) -> Decision:
    """The fastest product that a device has and that passes its test.

    On a CUDA device, rounding the input, multiplying and scaling are timed together beside
    dequantizing the weight and multiplying in 16 bits; that too may win, where scales are applied
    in passes of their own. Elsewhere the first that passes is taken.

    Args:
        test: name of a product -> what is wrong with it, "" if nothing is.
        timed: names -> milliseconds of each, and of DEQUANTIZED.
    """
    name, kind = short(storage_dtype), info.type
    if kind == "cuda" and info.capability is None:
        kind = "rocm"
    candidates = CANDIDATES.get(kind, {}).get(storage_dtype)
    if candidates is None:
        known = kind in CANDIDATES
        return Decision(None, f"no 8-bit products of {name} here" if known else
                        f"no 8-bit products on {kind} devices here")  # fmt: skip
    if kind == "meta":
        return Decision(candidates[0], "shapes only")
    backend = dispatch.backend()
    if backend == "reference":
        return Decision("float32", f"{dispatch.BACKEND_VARIABLE}=reference")
    if kind == "cuda" and (problem := _too_old(storage_dtype, info.capability)):
        return Decision(None, f"tensor cores take {name} {problem}")
    passed: list[str] = []
    failures: list[str] = []
    is_final = True
    for candidate in candidates:
        problem = _too_old(candidate, info.capability) if kind == "cuda" else ""
        if not problem and candidate == FUSED:
            problem = dispatch.triton_problem(info)
        try:
            problem = problem or test(candidate)
        except Exception as error:  # noqa: BLE001 - compilers fail in ways of their own
            problem, may_stay = dispatch.failed_trial(error, f"the product {candidate}")
            is_final &= may_stay
        if problem:
            failures.append(f"{candidate} {problem}")
            continue
        passed.append(candidate)
        if kind != "cuda":
            break
    if not passed:
        return Decision(None, "; ".join(failures), is_final)
    if kind != "cuda" or (backend == "triton" and passed[0] == FUSED):
        return Decision(passed[0], "; ".join([*failures, "self-test passed"]), is_final)
    try:
        milliseconds = timed(passed)
    except Exception as error:  # noqa: BLE001 - compilers fail in ways of their own
        problem, may_stay = dispatch.failed_trial(error, "8-bit products")
        reason = "; ".join([*failures, f"self-test passed, the timing {problem}"])
        return Decision(passed[0], reason, is_final and may_stay)
    fastest = min(milliseconds, key=lambda each: milliseconds[each])
    times = ", ".join(f"{each} {value:.3f} ms" for each, value in milliseconds.items())
    shape = " x ".join(map(str, TIMED_SHAPE))
    reason = "; ".join([*failures, f"self-test passed; {shape} with rounding and scales: {times}"])
    return Decision(None if fastest == DEQUANTIZED else fastest, reason, is_final)


def _too_old(what: torch.dtype | str, capability: tuple[int, int] | None) -> str:
    least, has = CAPABILITIES.get(what, (0, 0)), capability or (0, 0)
    if has >= least:
        return ""
    return "from compute capability {}.{} on, this is {}.{}".format(*least, *has)


def race(
    names: Sequence[str], storage_dtype: torch.dtype, device: torch.device
) -> dict[str, float]:
    """Milliseconds of a linear layer of TIMED_SHAPE by each product, and with a dequantized weight.

    From an input in bfloat16 to a result with bias.
    """
    tokens, out_features, in_features = TIMED_SHAPE
    rotation = MAX_ROTATION if storage_dtype == torch.int8 else 0
    to = RowFormat(storage_dtype, rotation)
    with dispatch.apart():
        generator = torch.Generator(device).manual_seed(0)  # zeros would run faster than numbers do
        x = torch.randn(tokens, in_features, generator=generator, device=device).bfloat16()
        weight = torch.randn(out_features, in_features, generator=generator, device=device)
        weight, scale = quantize_rows(weight, storage_dtype, rotation)
        bias = torch.zeros(out_features, dtype=torch.bfloat16, device=device)

        def in_8_bits(product: str) -> Tensor:
            values, row_scale = kernels.quantize_rows(x[None], to)
            return multiply(product, values[0], row_scale[0], weight, scale, bias, x.dtype)

        def in_16_bits() -> Tensor:
            return F.linear(x, dequantize(weight, scale, x.dtype, rotation), bias)

        contenders = {name: partial(in_8_bits, name) for name in names}
        return dispatch.race({**contenders, DEQUANTIZED: in_16_bits}, device)


def probe(name: str, storage_dtype: torch.dtype, device: torch.device) -> str:
    """Compare a product with its definition, on a part of a weight and tokens of unlike size.

    The product with the bias is written, the one without is added to it.

    Returns:
        what is wrong, or "".
    """
    with dispatch.apart():
        generator = torch.Generator().manual_seed(0)
        x, weight = (torch.randn(size, 384, generator=generator) for size in (273, 192))
        x[:4], weight[:4] = 1.0, 1.0  # largest codes only: partial sums that saturate show here
        x *= torch.logspace(-2, 2, len(x))[:, None]
        values, row_scale = quantize_rows(x[:, 128:], storage_dtype)
        codes, scale = quantize_rows(weight, storage_dtype)
        bias = torch.randn(len(weight), generator=generator)
        expected = 2 * (values.double() @ codes[:, 128:].double().T) * row_scale * scale.T + bias
        out = torch.empty(expected.shape, dtype=torch.bfloat16, device=device)
        values, row_scale, codes, scale, bias = (
            tensor.to(device) for tensor in (values, row_scale, codes, scale, bias)
        )
        for part in (slice(0, 5), slice(5, None)):  # few tokens take another way
            inputs = (values[part], row_scale[part], codes[:, 128:], scale)
            multiply_into(out[part], name, *inputs, bias)
            multiply_into(out[part], name, *inputs, None, add=True)
        got = out.cpu().double()
    if not bool(got.isfinite().all()):
        return "gives numbers that are not finite"
    difference = ((got - expected).norm(dim=1) / expected.norm(dim=1)).max().item()
    if difference <= PROBE_TOLERANCE:
        return ""
    return f"differs from its definition by {difference:.1%}"


def report(device: torch.device) -> dict[str, str]:
    """What `doctor` says of 8-bit linear layers on a device."""
    found = {}
    products = []
    for name, storage_dtype in STORAGE_DTYPES.items():
        product, reason, _ = arithmetic(storage_dtype, device)
        products.append(product)
        found[f"{name} linears"] = (
            f"{DEQUANTIZED}: {reason}"
            if product is None
            else f"inputs rounded too, multiplied by {product}: {reason}"
        )
    if device.type == "cuda" and any(product in CODES for product in products):
        kernel, reason, _ = scaling(device)
        how = "in plain torch" if kernel is None else "by a Triton kernel of their own"
        found["scales of 8-bit products"] = f"applied {how}: {reason}"
    present = dispatch.is_installed("comfy_kitchen")
    found["comfy_kitchen int8_linear"] = (
        f"{'found' if present else 'not installed'}: not used (not benchmarked against our GEMMs)"
    )
    return found


# --- weights ------------------------------------------------------------------------------------


def dequantize(
    weight: Tensor, scale: Tensor | None, dtype: torch.dtype, rotation: int = 0
) -> Tensor:
    """Widen an 8-bit weight; the product with the scale is formed in float32.

    Args:
        weight: [out, in] float8 or int8.
        scale: float32, one element or [out, 1]; None means 1.
        rotation: that it was rotated with, and is rotated back with.
    Returns:
        [out, in] in dtype.
    """
    if scale is None and rotation == 0 and weight.device.type != "cpu":
        return weight.to(dtype)
    wide = _float32(weight)
    if scale is not None:
        wide.mul_(scale)
    return rotate(wide, rotation).to(dtype)


def _float32(codes: Tensor) -> Tensor:
    """8-bit numbers in float32. CPUs look float8 up: torch converts it ten times more slowly."""
    if codes.device.type != "cpu" or codes.dtype not in FLOAT8_DTYPES:
        return codes.float()
    table = torch.arange(256, dtype=torch.uint8, device="cpu").view(codes.dtype).float()
    return table.index_select(0, codes.view(torch.uint8).int().flatten()).view(codes.shape)


def quantize(
    weight: Tensor, storage_dtype: torch.dtype, rotation: int = 0,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Round a weight to 8 bits with one scale per output row, absmax / largest magnitude.

    Args:
        weight: [out, in] float.
        storage_dtype: float8_e4m3fn or int8.
        rotation: input channels rotated together before, 0 for none.
        device: where it is done, a few rows at a time.
    Returns:
        [out, in] in storage_dtype and [out, 1] float32, where the weight is; a row of zeros gets
        scale 1.
    """
    values = torch.empty(weight.shape, dtype=storage_dtype, device=weight.device)
    scale = torch.empty(len(weight), 1, device=weight.device)
    to = RowFormat(storage_dtype, rotation)
    for start in range(0, len(weight), CHUNK_ROWS):
        part = slice(start, start + CHUNK_ROWS)
        rows = kernels.quantize_rows(weight[None, part].to(device or weight.device), to)
        values[part], scale[part] = rows.values[0], rows.scale[0]
    return values, scale


def rotation_size(*widths: int) -> int:
    """The largest rotation that divides all widths; 0 where that is none."""
    size = math.gcd(MAX_ROTATION, *widths)
    return size if size > 1 else 0


def is_quantizable(name: str, num_layers: int) -> bool:
    """Whether `precision="fp8"` or `"int8"` rounds this weight of the transformer.

    Args:
        num_layers: of double blocks.
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
