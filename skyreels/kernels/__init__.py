"""The memory-bound steps between the matrix products, fused.

Each step is one torch operator, so that compilers, shape-only tensors and counters see one call:
`reference.py` says what it computes and runs on a CPU, `triton/` is what runs on a GPU
where it passes its self-test (`selection.py`). Tensors that need gradients take the reference.

Where a `RowFormat` is given, the result is rounded to 8 bits row by row in the same pass and comes
as `Rows`, which an 8-bit linear layer (quant.py) takes in place of a tensor.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference, selection

#: the package may be loaded under two names in one process, one of them a path with spaces
NAMESPACE = re.sub(r"\W", "_", __name__)
_library = torch.library.Library(NAMESPACE, "DEF")


class RowFormat(NamedTuple):
    """How an 8-bit linear layer wants its input.

    dtype: float8_e4m3fn or int8. rotation: channels rotated together before rounding, 0 for none.
    """

    dtype: torch.dtype
    rotation: int = 0


class Rows(NamedTuple):
    """Tokens in 8 bits. values: [B, S, C] float8 or int8. scale: [B, S, 1] float32."""

    values: Tensor
    scale: Tensor


def _define(schema: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """One operator: the function everywhere and for shapes, on a GPU the kernel selected there."""
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, selection.in_pieces(name, function), "CompositeExplicitAutograd")
    _library.impl(name, selection.dispatcher(name, function), "CUDA")
    operator = getattr(getattr(torch.ops, NAMESPACE), name).default

    def call(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            return function(*args)
        return operator(*args)

    return call


_layer_norm_modulate = _define(
    "layer_norm_modulate(Tensor x, Tensor shift, Tensor scale) -> Tensor",
    reference.layer_norm_modulate,
)
_layer_norm_modulate_quantize = _define(
    "layer_norm_modulate_quantize(Tensor x, Tensor shift, Tensor scale, ScalarType dtype, "
    "int rotation) -> (Tensor, Tensor)",
    reference.layer_norm_modulate_quantize,
)
_residual_layer_norm_modulate = _define(
    "residual_layer_norm_modulate(Tensor x, Tensor y, Tensor gate, Tensor shift, Tensor scale) "
    "-> (Tensor, Tensor)",
    reference.residual_layer_norm_modulate,
)
_residual_layer_norm_modulate_quantize = _define(
    "residual_layer_norm_modulate_quantize(Tensor x, Tensor y, Tensor gate, Tensor shift, "
    "Tensor scale, ScalarType dtype, int rotation) -> (Tensor, Tensor, Tensor)",
    reference.residual_layer_norm_modulate_quantize,
)
_gated_residual = _define(
    "gated_residual(Tensor x, Tensor y, Tensor gate) -> Tensor", reference.gated_residual
)
_gated_residual_sum = _define(
    "gated_residual_sum(Tensor x, Tensor y, Tensor z, Tensor gate) -> Tensor",
    reference.gated_residual_sum,
)
_qk_norm_rope_ = _define(
    "qk_norm_rope_(Tensor(a!) qk, Tensor q_weight, Tensor k_weight, Tensor text_q_weight, "
    "Tensor text_k_weight, Tensor rope) -> ()",
    reference.qk_norm_rope_,
)
_gelu_quantize = _define(
    "gelu_quantize(Tensor x, ScalarType dtype, int rotation) -> (Tensor, Tensor)",
    reference.gelu_quantize,
)
_quantize_rows = _define(
    "quantize_rows(Tensor x, ScalarType dtype, int rotation) -> (Tensor, Tensor)",
    reference.quantize_rows,
)
_group_moments = _define(
    "group_moments(Tensor x, int groups) -> (Tensor, Tensor)", reference.group_moments
)
_group_norm_silu = _define(
    "group_norm_silu(Tensor x, Tensor scale, Tensor shift) -> Tensor", reference.group_norm_silu
)


def layer_norm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, to: RowFormat | None = None
) -> Tensor | Rows:
    """LayerNorm without weights, scaled and shifted.

    Args:
        x: [B, S, C]. shift, scale: [B, 1, C]. to: None leaves the result in x's dtype.
    Returns:
        [B, S, C].
    """
    if to is None:
        return _layer_norm_modulate(x, shift, scale)
    return Rows(*_layer_norm_modulate_quantize(x, shift, scale, *to))


def residual_layer_norm_modulate(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, to: RowFormat | None = None
) -> tuple[Tensor, Tensor | Rows]:
    """x + gate * y, and its LayerNorm scaled and shifted.

    Args:
        x, y: [B, S, C]. gate, shift, scale: [B, 1, C]. to: of the second result.
    Returns:
        twice [B, S, C].
    """
    if to is None:
        return _residual_layer_norm_modulate(x, y, gate, shift, scale)
    total, *rows = _residual_layer_norm_modulate_quantize(x, y, gate, shift, scale, *to)
    return total, Rows(*rows)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, z: Tensor | None = None) -> Tensor:
    """x + gate * y, or x + gate * (y + z); x, y and z [B, S, C], gate [B, 1, C]."""
    return _gated_residual(x, y, gate) if z is None else _gated_residual_sum(x, y, z, gate)


def qk_norm_rope(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor,
    text_q_weight: Tensor, text_k_weight: Tensor, rope: Tensor,
) -> Tensor:  # fmt: skip
    """RMSNorm of queries and keys over each head; those of image tokens are then rotated.

    Args:
        qkv: [B, S, 3, heads, D], image tokens first; overwritten unless it needs gradients.
        q_weight, k_weight: [D] of the image tokens; text_q_weight, text_k_weight: of the others.
        rope: [N, D / 2] complex64, N the number of image tokens.
    Returns:
        [B, S, 3, heads, D]; the values as they were.
    """
    args = (q_weight, k_weight, text_q_weight, text_k_weight, rope)
    if torch.is_grad_enabled() and qkv.requires_grad:
        return reference.qk_norm_rope(qkv, *args)
    _qk_norm_rope_(qkv[:, :, :2], *args)  # the values are not touched
    return qkv


def gelu(x: Tensor, to: RowFormat | None = None) -> Tensor | Rows:
    """tanh-GELU, [B, S, C]; torch's own, in place unless x needs gradients, where nothing is
    rounded."""
    if to is not None:
        return Rows(*_gelu_quantize(x, *to))
    if torch.is_grad_enabled() and x.requires_grad:
        return reference.gelu(x)
    return torch.ops.aten.gelu_(x, approximate="tanh")


def quantize_rows(x: Tensor, to: RowFormat) -> Rows:
    """Every row in 8 bits with a scale of its own, [B, S, C]."""
    return Rows(*_quantize_rows(x, *to))


def group_moments(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of each group of channels; [B, C, T, H, W] -> twice [B, groups], wide."""
    return _group_moments(x, groups)


def group_norm_silu(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """SiLU of x * scale + shift; x [B, C, T, H, W], scale and shift [B, C, 1, 1, 1] float32."""
    return _group_norm_silu(x, scale, shift)


def is_fused(name: str, device: torch.device) -> bool:
    """Whether the operator `name` runs in a kernel of its own on the device."""
    return selection.choose(name, device).impl is not None
