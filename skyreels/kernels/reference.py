"""What every kernel computes, in plain torch: the definition of correct, and what runs on a CPU.

Statistics, rotations and products are float32 (float64 for float64 input); results are rounded
once, to the dtype of the activations. Nothing here works in place except where the name ends in
"_".
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6
#: largest magnitude of each 8-bit format
FORMAT_MAX = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without weights, then scale and shift.

    Args:
        x: [B, S, C]. shift, scale: [B, 1, C].
    Returns:
        [B, S, C] in x's dtype.
    """
    normed = F.layer_norm(_wide(x), x.shape[-1:], eps=EPS)
    return torch.addcmul(_wide(shift), normed, 1 + _wide(scale)).to(x.dtype)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate * y.

    Args:
        x, y: [B, S, C]. gate: [B, 1, C].
    """
    return torch.addcmul(_wide(x), _wide(y), _wide(gate)).to(x.dtype)


def gated_residual_sum(x: Tensor, y: Tensor, z: Tensor, gate: Tensor) -> Tensor:
    """x + gate * (y + z).

    Args:
        x, y, z: [B, S, C]. gate: [B, 1, C].
    """
    return torch.addcmul(_wide(x), _wide(y) + _wide(z), _wide(gate)).to(x.dtype)


def qk_norm_rope(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor,
    text_q_weight: Tensor, text_k_weight: Tensor, rope: Tensor,
) -> Tensor:  # fmt: skip
    """RMSNorm of queries and keys over each head; those of image tokens are then rotated.

    Args:
        qkv: [B, S, 3, heads, D], image tokens first.
        q_weight, k_weight, text_q_weight, text_k_weight: [D].
        rope: [N, D / 2] complex64, N <= S the number of image tokens.
    Returns:
        [B, S, 3, heads, D] in qkv's dtype; the values as they were.
    Source: RMSNorm arXiv:1910.07467; RoPE arXiv:2104.09864.
    """
    image, text = _normed_and_turned(qkv, q_weight, k_weight, text_q_weight, text_k_weight, rope)
    query_key = torch.cat([image, text], dim=1).to(qkv.dtype)
    return torch.cat([query_key, qkv[:, :, 2:]], dim=2)


def _normed_and_turned(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor,
    text_q_weight: Tensor, text_k_weight: Tensor, rope: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Queries and keys of image tokens and of the others, [B, N or S - N, 2, heads, D], wide."""
    count = rope.shape[0]
    image = _normed(qkv[:, :count, :2], q_weight, k_weight)
    pairs = torch.view_as_complex(image.unflatten(-1, (-1, 2)))
    image = torch.view_as_real(pairs * rope[None, :, None, None]).flatten(-2)
    return image, _normed(qkv[:, count:, :2], text_q_weight, text_k_weight)


def _normed(query_key: Tensor, q_weight: Tensor, k_weight: Tensor) -> Tensor:
    """[B, S, 2, heads, D] -> the same, wide."""
    wide = _wide(query_key)
    weight = torch.stack([q_weight, k_weight])[:, None].to(wide.dtype)
    return wide * (wide.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight


def hadamard(size: int, device: torch.device | str = "cpu") -> Tensor:
    """[size, size] float32, symmetric and orthonormal; size is a power of two (Sylvester)."""
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / size**0.5


def rotate(x: Tensor, size: int) -> Tensor:
    """Rotate each run of `size` channels; twice is the identity. [..., C] -> [..., C], wide."""
    wide = _wide(x)
    if size == 0:
        return wide
    matrix = hadamard(size, x.device).to(wide.dtype)
    return (wide.unflatten(-1, (-1, size)) @ matrix).flatten(-2)


def quantize_rows(x: Tensor, dtype: torch.dtype, rotation: int = 0) -> tuple[Tensor, Tensor]:
    """Round every row to 8 bits with a scale of its own, largest magnitude / largest code.

    Args:
        x: [..., C] float. dtype: float8_e4m3fn or int8.
        rotation: channels rotated together before rounding (a power of two that divides C); an
            outlier is spread over them. 0 is none.
    Returns:
        [..., C] in dtype, and [..., 1] float32; a row of zeros gets scale 1.
    Source: rotation arXiv:2404.00456 (QuaRot).
    """
    limit = FORMAT_MAX[dtype]
    wide = rotate(x, rotation).float()
    scale = wide.abs().amax(dim=-1, keepdim=True) / limit
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    scaled = (wide / scale).clamp(-limit, limit)
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scale


def gelu(x: Tensor) -> Tensor:
    """tanh-GELU, arXiv:1606.08415."""
    return F.gelu(x, approximate="tanh")


def qk_norm_rope_(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor,
    text_q_weight: Tensor, text_k_weight: Tensor, rope: Tensor,
) -> None:  # fmt: skip
    """`qk_norm_rope` into its input."""
    image, text = _normed_and_turned(qkv, q_weight, k_weight, text_q_weight, text_k_weight, rope)
    qkv[:, : rope.shape[0], :2] = image
    qkv[:, rope.shape[0] :, :2] = text


def layer_norm_modulate_quantize(
    x: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype, rotation: int
) -> tuple[Tensor, Tensor]:
    """`layer_norm_modulate`, then `quantize_rows`, with nothing rounded between."""
    wide = layer_norm_modulate(_wide(x), shift, scale)
    return quantize_rows(wide, dtype, rotation)


def residual_layer_norm_modulate(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """`gated_residual`, and `layer_norm_modulate` of what it returns."""
    total = gated_residual(x, y, gate)
    return total, layer_norm_modulate(total, shift, scale)


def residual_layer_norm_modulate_quantize(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor,
    dtype: torch.dtype, rotation: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`gated_residual`, and `layer_norm_modulate_quantize` of what it returns."""
    total = gated_residual(x, y, gate)
    return total, *layer_norm_modulate_quantize(total, shift, scale, dtype, rotation)


def gelu_quantize(x: Tensor, dtype: torch.dtype, rotation: int) -> tuple[Tensor, Tensor]:
    """`gelu`, then `quantize_rows`, with nothing rounded between."""
    return quantize_rows(gelu(_wide(x)), dtype, rotation)


def group_moments(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and variance (divided by the count) of each group of channels.

    Args:
        x: [B, C, T, H, W]. groups: divides C.
    Returns:
        twice [B, groups], wide.
    """
    grouped = _wide(x).unflatten(1, (groups, -1))
    variance, mean = torch.var_mean(grouped, dim=(2, 3, 4, 5), correction=0)
    return mean, variance


def group_norm_silu(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """SiLU of x * scale + shift, what a GroupNorm with known statistics comes down to.

    Args:
        x: [B, C, T, H, W]. scale, shift: [B, C, 1, 1, 1] float32.
    Returns:
        [B, C, T, H, W] in x's dtype.
    Source: GroupNorm arXiv:1803.08494; SiLU arXiv:1702.03118.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
    return F.silu(wide.mul_(scale).add_(shift), inplace=True).to(x.dtype)


class ValueFormat(NamedTuple):
    """How attention's weights and values are rounded for their product.

    dtype: of both. weight_max: what the largest weight of a row so far becomes. value_max: what the
    largest value of a channel becomes.
    """

    dtype: torch.dtype
    weight_max: float
    value_max: float


#: the whole range of e4m3: a weight of 2^-17 of the largest is not lost yet
VALUES_E4M3 = ValueFormat(torch.float8_e4m3fn, 448.0, 448.0)
#: sums over 64 keys stay within fp16's range
VALUES_FP16 = ValueFormat(torch.float16, 512.0, 1.0)


def quantized_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_tile: int = 128,
    values: ValueFormat = VALUES_E4M3,
) -> Tensor:
    """Attention with an int8 product of queries and keys, and one of e4m3 or fp16 with the values.

    * Keys lose their mean over the tokens: that adds the same to every score of a row, which
      softmax does not see. Queries and keys are rotated over the head dimension, which leaves their
      products alone and spreads outliers. Queries have a scale each, keys one a tile.
    * Weights are floating-point numbers. An integer grid over the largest weight of a tile would
      round everything beside an attention sink to nothing (relative error 0.15 to 0.24 with 1 to
      64 sinks in 8,192 keys). They are divided by the sum of what they were rounded to.
    * Values lose their mean, which comes back at the end (weights sum to one), and are divided by
      the largest magnitude of their channel. Half of what rounding moved their mean by comes off
      again: were all weights alike, the whole of it would be error; were all on a sink, nothing.

    Args:
        query: [B, heads, S, D]; key, value: [B, heads, T, D]; D a power of two.
        key_tile: keys that share a scale, and whose largest weight counts as one of the next.
        values: format of the second product.
    Returns:
        [B, heads, S, D] in query's dtype.
    Source: the mean of the keys arXiv:2410.02367 (SageAttention); weights and values in e4m3
        arXiv:2411.10958 (SageAttention2); rotation arXiv:2404.00456 (QuaRot); the sum over tiles
        arXiv:2205.14135 (FlashAttention).
    """
    width = query.shape[-1]
    wide_key, wide_value = key.float(), value.float()
    mean = wide_value.mean(dim=2, keepdim=True)
    v_scale = (wide_value - mean).abs().amax(dim=2, keepdim=True) / values.value_max
    v_scale = torch.where(v_scale == 0, 1.0, v_scale)
    v = ((wide_value - mean) / v_scale).to(values.dtype).float()
    mean = mean - 0.5 * v_scale * v.mean(dim=2, keepdim=True)
    k = rotate(wide_key - wide_key.mean(dim=2, keepdim=True), width)
    q, q_scale = _to_int8(rotate(query.float(), width), (-1,))
    q_scale = q_scale * (width**-0.5 * math.log2(math.e))
    peak = torch.full_like(q_scale, -math.inf)
    total, sums = torch.zeros_like(q_scale), torch.zeros_like(q)
    tiles = list(zip(k.split(key_tile, 2), v.split(key_tile, 2), strict=True))
    if k.shape[2] % key_tile:  # the part of a tile at the end goes first, as in the kernel
        tiles = [tiles[-1], *tiles[:-1]]
    for keys, some_values in tiles:
        keys, k_scale = _to_int8(keys, (-2, -1))
        scores = (q @ keys.transpose(-1, -2)) * (q_scale * k_scale)
        new_peak = torch.maximum(peak, scores.amax(dim=-1, keepdim=True))
        weights = values.weight_max * torch.exp2(scores - new_peak)
        weights, kept = weights.to(values.dtype).float(), torch.exp2(peak - new_peak)
        total = total * kept + weights.sum(dim=-1, keepdim=True)
        sums = sums * kept + weights @ some_values
        peak = new_peak
    return (sums / total * v_scale + mean).to(query.dtype)


def _to_int8(x: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Integers within -127..127 in float32, which sums 128 products exactly; and their scales."""
    largest = x.abs().amax(dim=axes, keepdim=True)
    scale = torch.where(largest == 0, 1.0, largest / 127)
    return (x / scale).round(), scale
