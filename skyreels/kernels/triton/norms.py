"""The operators of reference.py in Triton; operators.py chooses where they run.

Row kernels: one program per token, which stays in registers from its load to its store. Statistics
are float32 in two passes over those registers; only what is stored is rounded. Tokens may lie
anywhere (views are read in place) as long as the channels of a token are adjacent; others are
copied first. Widths need not be powers of two.

Triton's interpreter has no libdevice, so tanh and SiLU are written with exp2 everywhere.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import EPS, FORMAT_MAX
from .common import launch, narrow

#: elements one thread holds; 16 bytes of bf16 are loaded at a time, so four loads are in flight
ELEMENTS_PER_THREAD = 32
#: smallest scale: its reciprocal must be finite. Rows below 1e-34 round to zeros
_SMALLEST_SCALE = tl.constexpr(2.0**-120)
_EPS = tl.constexpr(EPS)


@triton.jit
def _butterfly(x, pairs: tl.constexpr, distance: tl.constexpr):
    """Sums and differences of the numbers `distance` apart in x, [pairs * 2 * distance]."""
    # the second of two numbers is their exclusive or with the first: one shuffle between lanes,
    # where splitting and joining would go through shared memory
    x = tl.reshape(x, (pairs, 2, distance))
    bits = x.to(tl.int32, bitcast=True)
    other = (tl.xor_sum(bits, axis=1, keep_dims=True) ^ bits).to(tl.float32, bitcast=True)
    sign = (1 - 2 * tl.arange(0, 2)).to(tl.float32)
    return tl.reshape(other + x * sign[None, :, None], (pairs * 2 * distance,))


@triton.jit
def _hadamard(x, block: tl.constexpr, stages: tl.constexpr):
    """Multiply each run of 2^stages of the `block` channels by `reference.hadamard`."""
    for stage in tl.static_range(stages):
        x = _butterfly(x, block // (2 << stage), 1 << stage)
    return x * 2.0 ** (-0.5 * stages)


@triton.jit
def _store_row(
    x,
    out,
    out_scale,
    row,
    columns,
    width: tl.constexpr,
    block: tl.constexpr,
    stages: tl.constexpr,
    limit: tl.constexpr,
):
    """Store one row, quantized with a scale of its own if there is an `out_scale`.

    x is zero beyond the width. The largest magnitude is taken over the bits, as integers order like
    magnitudes and, unlike a floating-point maximum, keep a NaN.
    """
    dtype: tl.constexpr = out.dtype.element_ty
    if out_scale is not None:
        x = _hadamard(x, block, stages)
        magnitudes = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        largest = tl.max(magnitudes, axis=0).to(tl.float32, bitcast=True)
        # compared this way round, a NaN stays what it is
        scale = largest / limit
        scale = tl.where(scale < _SMALLEST_SCALE, _SMALLEST_SCALE, scale)
        scale = tl.where(largest == 0, 1.0, scale)
        x = x * (1.0 / scale)
        tl.store(out_scale + row, scale)
    tl.store(out + row * width + columns, narrow(x, dtype), mask=columns < width)


@triton.jit
def _norm_kernel(
    x,
    y,
    gate,
    shift,
    scale,
    total,
    out,
    out_scale,
    x_batch,
    x_row,
    y_batch,
    y_row,
    gate_batch,
    shift_batch,
    scale_batch,
    width: tl.constexpr,
    block: tl.constexpr,
    stages: tl.constexpr,
    limit: tl.constexpr,
):
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row = batch * tl.num_programs(0) + token
    columns = tl.arange(0, block)
    inside = columns < width
    values = tl.load(x + batch * x_batch + token * x_row + columns, mask=inside, other=0.0)
    values = values.to(tl.float32)
    if y is not None:
        branch = tl.load(y + batch * y_batch + token * y_row + columns, mask=inside, other=0.0)
        weight = tl.load(gate + batch * gate_batch + columns, mask=inside, other=0.0)
        values += branch.to(tl.float32) * weight.to(tl.float32)
        rounded = narrow(values, total.dtype.element_ty)
        tl.store(total + row * width + columns, rounded, mask=inside)
        values = rounded.to(tl.float32)  # the norm is that of what is stored
    mean = tl.sum(values, axis=0) / width
    centred = tl.where(inside, values - mean, 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred, axis=0) / width + _EPS)
    factor = tl.load(scale + batch * scale_batch + columns, mask=inside, other=0.0)
    addend = tl.load(shift + batch * shift_batch + columns, mask=inside, other=0.0)
    result = addend.to(tl.float32) + normed * (1.0 + factor.to(tl.float32))
    _store_row(result, out, out_scale, row, columns, width, block, stages, limit)


@triton.jit
def _gated_residual_kernel(
    x,
    y,
    z,
    gate,
    out,
    x_batch,
    x_row,
    y_batch,
    y_row,
    z_batch,
    z_row,
    gate_batch,
    width: tl.constexpr,
    block: tl.constexpr,
):
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row = batch * tl.num_programs(0) + token
    columns = tl.arange(0, block)
    inside = columns < width
    values = tl.load(x + batch * x_batch + token * x_row + columns, mask=inside, other=0.0)
    branch = tl.load(y + batch * y_batch + token * y_row + columns, mask=inside, other=0.0)
    branch = branch.to(tl.float32)
    if z is not None:
        other = tl.load(z + batch * z_batch + token * z_row + columns, mask=inside, other=0.0)
        branch += other.to(tl.float32)
    weight = tl.load(gate + batch * gate_batch + columns, mask=inside, other=0.0)
    values = values.to(tl.float32) + branch * weight.to(tl.float32)
    tl.store(out + row * width + columns, narrow(values, out.dtype.element_ty), mask=inside)


@triton.jit
def _quantize_kernel(
    x,
    out,
    out_scale,
    x_batch,
    x_row,
    width: tl.constexpr,
    block: tl.constexpr,
    stages: tl.constexpr,
    limit: tl.constexpr,
    gelu: tl.constexpr,
):
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row = batch * tl.num_programs(0) + token
    columns = tl.arange(0, block)
    values = tl.load(
        x + batch * x_batch + token * x_row + columns, mask=columns < width, other=0.0
    ).to(tl.float32)
    if gelu:
        # x / 2 * (1 + tanh u) = x / (1 + exp(-2 u)) with u = sqrt(2 / pi) * (x + 0.044715 x^3), and
        # exp(y) = exp2(y / ln 2); where that overflows, the quotient is zero
        power = values * (-2.302208198144325 - 0.10294323957902348 * values * values)
        values = values / (1.0 + tl.exp2(power))
    _store_row(values, out, out_scale, row, columns, width, block, stages, limit)


@triton.jit(do_not_specialize=["image_tokens"])
def _qk_norm_rope_kernel(
    qkv,
    q_weight,
    k_weight,
    text_q_weight,
    text_k_weight,
    rope,
    image_tokens,
    batch_stride,
    token_stride,
    part_stride,
    head_stride,
    heads: tl.constexpr,
    heads_block: tl.constexpr,
    dim: tl.constexpr,
):
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    channels = tl.arange(0, dim)
    pairs = tl.arange(0, dim // 2)
    head = tl.arange(0, heads_block)[:, None]
    inside = head < heads
    # an image token uses the image weights on all channels, a text token on none; it is not rotated
    used = tl.where(token < image_tokens, dim, 0)
    of_image, of_text, rotating = channels < used, channels >= used, pairs < used
    cos = tl.load(rope + token * dim + 2 * pairs, mask=rotating, other=1.0)[None]
    sin = tl.load(rope + token * dim + 2 * pairs + 1, mask=rotating, other=0.0)[None]
    tile = qkv + batch * batch_stride + token * token_stride
    tile += head * head_stride + channels[None]
    for part in tl.static_range(2):
        if part == 0:
            weight = tl.load(q_weight + channels, mask=of_image, other=0.0).to(tl.float32)
            text_weight = tl.load(text_q_weight + channels, mask=of_text, other=0.0)
        else:
            weight = tl.load(k_weight + channels, mask=of_image, other=0.0).to(tl.float32)
            text_weight = tl.load(text_k_weight + channels, mask=of_text, other=0.0)
        weight += text_weight.to(tl.float32)
        values = tl.load(tile + part * part_stride, mask=inside, other=0.0).to(tl.float32)
        mean_square = tl.sum(values * values, axis=1, keep_dims=True) / dim
        values = values * tl.rsqrt(mean_square + _EPS) * weight[None]
        even, odd = tl.split(tl.reshape(values, (heads_block, dim // 2, 2)))
        rotated = tl.join(even * cos - odd * sin, even * sin + odd * cos)
        rotated = narrow(tl.reshape(rotated, (heads_block, dim)), qkv.dtype.element_ty)
        tl.store(tile + part * part_stride, rotated, mask=inside)


def _warps(elements: int) -> int:
    return max(1, min(32, elements // (32 * ELEMENTS_PER_THREAD)))


def _rows(x: Tensor) -> Tensor:
    """Input [B, S, C], or a copy where the channels of a token are not adjacent."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _vectors(x: Tensor, like: Tensor) -> Tensor:
    """[B or 1, 1, C] as one vector per item of the batch, whose batch stride may be zero."""
    return _rows(x.expand(like.shape[0], 1, like.shape[-1]))


def _quantization(dtype: torch.dtype, hadamard_block: int) -> dict[str, int | float]:
    return {"stages": max(hadamard_block, 1).bit_length() - 1, "limit": FORMAT_MAX[dtype]}


def _norm(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    dtype: torch.dtype | None = None,
    hadamard_block: int = 0,
) -> tuple[Tensor, ...]:
    batch, tokens, width = x.shape
    x, shift, scale = _rows(x), _vectors(shift, x), _vectors(scale, x)
    out = torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
    out_scale = None
    quantization: dict[str, int | float] = {"stages": 0, "limit": 0.0}
    if dtype is not None:
        out_scale = torch.empty(batch, tokens, 1, dtype=torch.float32, device=x.device)
        quantization = _quantization(dtype, hadamard_block)
    total, strides = None, (0, 0, 0)
    if y is not None and gate is not None:
        y, gate = _rows(y), _vectors(gate, x)
        total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        strides = (y.stride(0), y.stride(1), gate.stride(0))
    block = triton.next_power_of_2(width)
    launch(
        _norm_kernel,
        (tokens, batch),
        x,
        y,
        gate,
        shift,
        scale,
        total,
        out,
        out_scale,
        x.stride(0),
        x.stride(1),
        *strides,
        shift.stride(0),
        scale.stride(0),
        width=width,
        block=block,
        num_warps=_warps(block),
        **quantization,
    )
    return tuple(each for each in (total, out, out_scale) if each is not None)


def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """`reference.layer_norm_modulate`."""
    return _norm(x, None, None, shift, scale)[0]


def layer_norm_modulate_quantize(
    x: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype, hadamard_block: int
) -> tuple[Tensor, ...]:
    """`reference.layer_norm_modulate_quantize`."""
    return _norm(x, None, None, shift, scale, dtype, hadamard_block)


def residual_layer_norm_modulate(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, ...]:
    """`reference.residual_layer_norm_modulate`."""
    return _norm(x, y, gate, shift, scale)


def residual_layer_norm_modulate_quantize(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
    hadamard_block: int,
) -> tuple[Tensor, ...]:
    """`reference.residual_layer_norm_modulate_quantize`."""
    return _norm(x, y, gate, shift, scale, dtype, hadamard_block)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """`reference.gated_residual`."""
    return _gated(x, y, None, gate)


def gated_residual_sum(x: Tensor, y: Tensor, z: Tensor, gate: Tensor) -> Tensor:
    """`reference.gated_residual_sum`."""
    return _gated(x, y, z, gate)


def _gated(x: Tensor, y: Tensor, z: Tensor | None, gate: Tensor) -> Tensor:
    batch, tokens, width = x.shape
    x, y, gate = _rows(x), _rows(y), _vectors(gate, x)
    z_strides = (0, 0)
    if z is not None:
        z = _rows(z)
        z_strides = (z.stride(0), z.stride(1))
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(width)
    launch(
        _gated_residual_kernel,
        (tokens, batch),
        x,
        y,
        z,
        gate,
        out,
        x.stride(0),
        x.stride(1),
        y.stride(0),
        y.stride(1),
        *z_strides,
        gate.stride(0),
        width=width,
        block=block,
        num_warps=_warps(block),
    )
    return out


def _quantize(
    x: Tensor, dtype: torch.dtype, hadamard_block: int, gelu: bool
) -> tuple[Tensor, Tensor]:
    *outer, width = x.shape
    rows = _rows(x if x.ndim == 3 else x.reshape(1, -1, width))
    batch, tokens, _ = rows.shape
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    out_scale = torch.empty(*outer, 1, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    launch(
        _quantize_kernel,
        (tokens, batch),
        rows,
        out,
        out_scale,
        rows.stride(0),
        rows.stride(1),
        width=width,
        block=block,
        gelu=gelu,
        num_warps=_warps(block),
        **_quantization(dtype, hadamard_block),
    )
    return out, out_scale


def quantize_rows(x: Tensor, dtype: torch.dtype, hadamard_block: int) -> tuple[Tensor, Tensor]:
    """`reference.quantize_rows`."""
    return _quantize(x, dtype, hadamard_block, gelu=False)


def gelu_quantize(x: Tensor, dtype: torch.dtype, hadamard_block: int) -> tuple[Tensor, Tensor]:
    """`reference.gelu_quantize`."""
    return _quantize(x, dtype, hadamard_block, gelu=True)


def qk_norm_rope_(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    text_q_weight: Tensor,
    text_k_weight: Tensor,
    rope: Tensor,
) -> None:
    """`reference.qk_norm_rope_`; the channels of a head must be adjacent."""
    batch, tokens, _, heads, dim = qkv.shape
    weights = [w.contiguous() for w in (q_weight, k_weight, text_q_weight, text_k_weight)]
    rotations = torch.view_as_real(rope.resolve_conj()).contiguous()
    heads_block = triton.next_power_of_2(heads)
    launch(
        _qk_norm_rope_kernel,
        (tokens, batch),
        qkv,
        *weights,
        rotations,
        rope.shape[0],
        *qkv.stride()[:4],
        heads=heads,
        heads_block=heads_block,
        dim=dim,
        num_warps=_warps(heads_block * dim),
    )
