"""The memory-bound steps between GEMMs, fused.

`reference.py` says what each step computes and runs on a CPU; `triton/` is what runs on a GPU where
it passes its self-test; `operators.py` makes torch operators of them, and `dispatch.py` decides.
Tensors that need gradients take the reference.

Where a `QuantFormat` is given, the result is quantized to 8 bits in the same pass, one scale a
token, and returned as `QuantizedActivation`, which an 8-bit linear layer (quant.py) takes in place
of a tensor.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import operators, reference
from .operators import NAMESPACE as NAMESPACE
from .operators import int8_linear_ as int8_linear_


class QuantFormat(NamedTuple):
    """How an 8-bit linear layer wants its input, or stores its weight.

    Attributes:
        dtype: float8_e4m3fn or int8.
        hadamard_block: channels rotated together before they are rounded; 0 for none.
    """

    dtype: torch.dtype
    hadamard_block: int = 0


class QuantizedActivation(NamedTuple):
    """Tokens in 8 bits.

    Attributes:
        qdata: [B, S, C] float8 or int8.
        scale: [B, S, 1] float32.
    """

    qdata: Tensor
    scale: Tensor


#: an activation, quantized or not
Activation = Tensor | QuantizedActivation
_call: dict[str, Any] = operators.CALLS


def layer_norm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, act_format: QuantFormat | None = None
) -> Activation:
    """LayerNorm without weights, scaled and shifted.

    Args:
        x: [B, S, C].
        shift: [B, 1, C].
        scale: [B, 1, C].
        act_format: of the result; None leaves it in x's dtype.

    Returns:
        [B, S, C].
    """
    result: Tensor
    if act_format is None:
        result = _call["layer_norm_modulate"](x, shift, scale)
        return result
    return QuantizedActivation(*_call["layer_norm_modulate_quantize"](x, shift, scale, *act_format))


def residual_layer_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    act_format: QuantFormat | None = None,
) -> tuple[Tensor, Activation]:
    """Gated residual sum (x + gate * y), and its LayerNorm scaled and shifted.

    Args:
        x: [B, S, C].
        y: [B, S, C].
        gate: [B, 1, C].
        shift: [B, 1, C].
        scale: [B, 1, C].
        act_format: of the second result; None leaves it in x's dtype.

    Returns:
        Twice [B, S, C].
    """
    if act_format is None:
        total, normed = _call["residual_layer_norm_modulate"](x, y, gate, shift, scale)
        return total, normed
    total, *quantized = _call["residual_layer_norm_modulate_quantize"](
        x, y, gate, shift, scale, *act_format
    )
    return total, QuantizedActivation(*quantized)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, z: Tensor | None = None) -> Tensor:
    """Residual sum: x + gate * y, or x + gate * (y + z); x, y, z [B, S, C], gate [B, 1, C]."""
    total: Tensor
    if z is None:
        total = _call["gated_residual"](x, y, gate)
    else:
        total = _call["gated_residual_sum"](x, y, z, gate)
    return total


def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    text_q_weight: Tensor,
    text_k_weight: Tensor,
    rope: Tensor,
) -> Tensor:
    """RMSNorm of queries and keys over each head, and RoPE of those of image tokens.

    Args:
        qkv: [B, S, 3, heads, D], image tokens first; overwritten unless it needs gradients.
        q_weight: [D], of the image tokens.
        k_weight: [D], of the image tokens.
        text_q_weight: [D], of the other tokens.
        text_k_weight: [D], of the other tokens.
        rope: [N, D / 2] complex64, N the number of image tokens.

    Returns:
        [B, S, 3, heads, D]; values are unchanged.
    """
    args = (q_weight, k_weight, text_q_weight, text_k_weight, rope)
    if torch.is_grad_enabled() and qkv.requires_grad:
        return reference.qk_norm_rope(qkv, *args)
    _call["qk_norm_rope_"](qkv[:, :, :2], *args)  # the values are not touched
    return qkv


def gelu(x: Tensor, act_format: QuantFormat | None = None) -> Activation:
    """tanh-GELU, [B, S, C]; without a format in place unless x needs gradients."""
    if act_format is not None:
        return QuantizedActivation(*_call["gelu_quantize"](x, *act_format))
    if torch.is_grad_enabled() and x.requires_grad:
        return reference.gelu(x)
    active: Tensor = torch.ops.aten.gelu_(x, approximate="tanh")
    return active


def quantize_rows(x: Tensor, act_format: QuantFormat) -> QuantizedActivation:
    """Every token (row of a weight) in 8 bits with a scale of its own; x is [B, S, C]."""
    return QuantizedActivation(*_call["quantize_rows"](x, *act_format))


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel, twice [B, C]; see `reference.channel_moments`."""
    mean, variance = _call["channel_moments"](x)
    return mean, variance


def norm_silu_pad_(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, out: Tensor, front: int
) -> None:
    """What a causal convolution reads, into `out`; see `reference.norm_silu_pad_`."""
    _call["norm_silu_pad_"](x, scale, shift, out, front)


def residual_add_(x: Tensor, branch: Tensor, bias: Tensor) -> None:
    """Add branch and bias to x, in place; see `reference.residual_add_`."""
    _call["residual_add_"](x, branch, bias)


def residual_add_moments_(x: Tensor, branch: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """`residual_add_`, and `channel_moments` of the sum without reading it again."""
    mean, variance = _call["residual_add_moments_"](x, branch, bias)
    return mean, variance


def interleave_(x: Tensor, bias: Tensor, out: Tensor) -> None:
    """An enlarged clip from all copies of its pixels, into `out`; see `reference.interleave_`."""
    _call["interleave_"](x, bias, out)


def interleave_moments_(x: Tensor, bias: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """`interleave_`, and `channel_moments` of `out` without reading it again."""
    mean, variance = _call["interleave_moments_"](x, bias, out)
    return mean, variance


def rescale_(
    acc: Tensor,
    act_scale: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    add: bool,
) -> None:
    """The epilogue of a GEMM whose accumulator went through memory; see `reference.rescale_`."""
    _call["rescale_"](acc, act_scale, scale, bias, out, add)


def add_low_rank_(
    x: Activation, down: Tensor, up: Tensor, segments: Sequence[int], out: Tensor
) -> None:
    """Add the side branch of a linear layer to `out`; see `reference.add_low_rank_`."""
    tokens, act_scale = (x, None) if isinstance(x, Tensor) else x
    _call["add_low_rank_"](tokens, act_scale, down, up, segments, out)


def dequantize_blocks_(data: Tensor, kind: str, out: Tensor) -> None:
    """A weight in GGUF blocks, into `out`; see `blocks.dequantize_blocks_`."""
    _call["dequantize_blocks_"](data, kind, out)


def is_fused(name: str, device: torch.device) -> bool:
    """Whether the operator `name` runs in a kernel of its own on the device."""
    return operators.choose(name, device).impl is not None
