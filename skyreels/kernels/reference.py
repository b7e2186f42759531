"""What every kernel computes, in plain torch: the definition of correct, and what runs on a CPU.

Statistics, rotations and GEMMs are float32 (float64 for float64 input); results are rounded once,
to the dtype of the activations. Functions work in place only where the name ends in "_".
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6
#: largest magnitude of each 8-bit format
FORMAT_MAX = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
#: of a clip that are normed or added at once, where frames are smaller
PIECE_ELEMENTS = 1 << 16


def _upcast(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without weights, then scale and shift.

    Args:
        x: [B, S, C].
        shift: [B, 1, C].
        scale: [B, 1, C].

    Returns:
        [B, S, C] in x's dtype.
    """
    normed = F.layer_norm(_upcast(x), x.shape[-1:], eps=EPS)
    return torch.addcmul(_upcast(shift), normed, 1 + _upcast(scale)).to(x.dtype)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """Gated residual sum: x + gate * y; x and y [B, S, C], gate [B, 1, C]."""
    return torch.addcmul(_upcast(x), _upcast(y), _upcast(gate)).to(x.dtype)


def gated_residual_sum(x: Tensor, y: Tensor, z: Tensor, gate: Tensor) -> Tensor:
    """Gated residual sum: x + gate * (y + z); x, y and z [B, S, C], gate [B, 1, C]."""
    return torch.addcmul(_upcast(x), _upcast(y) + _upcast(z), _upcast(gate)).to(x.dtype)


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
        qkv: [B, S, 3, heads, D], image tokens first.
        q_weight: [D], of the image tokens.
        k_weight: [D], of the image tokens.
        text_q_weight: [D], of the other tokens.
        text_k_weight: [D], of the other tokens.
        rope: [N, D / 2] complex64, N <= S the number of image tokens.

    Returns:
        [B, S, 3, heads, D] in qkv's dtype; values are unchanged.

    Source: RMSNorm arXiv:1910.07467; RoPE arXiv:2104.09864.
    """
    image, text = _norm_and_rope(qkv, q_weight, k_weight, text_q_weight, text_k_weight, rope)
    query_key = torch.cat([image, text], dim=1).to(qkv.dtype)
    return torch.cat([query_key, qkv[:, :, 2:]], dim=2)


def _norm_and_rope(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    text_q_weight: Tensor,
    text_k_weight: Tensor,
    rope: Tensor,
) -> tuple[Tensor, Tensor]:
    """Queries and keys of image tokens and of the others, [B, N or S - N, 2, heads, D] float32."""
    count = rope.shape[0]
    image = _rms_norm(qkv[:, :count, :2], q_weight, k_weight)
    pairs = torch.view_as_complex(torch.unflatten(image, -1, (-1, 2)))
    image = torch.view_as_real(pairs * rope[None, :, None, None]).flatten(-2)
    return image, _rms_norm(qkv[:, count:, :2], text_q_weight, text_k_weight)


def _rms_norm(query_key: Tensor, q_weight: Tensor, k_weight: Tensor) -> Tensor:
    """RMSNorm over each head; [B, S, 2, heads, D] -> the same, upcast."""
    x = _upcast(query_key)
    weight = torch.stack([q_weight, k_weight])[:, None].to(x.dtype)
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight


def hadamard(size: int, device: torch.device | str = "cpu") -> Tensor:
    """[size, size] float32, symmetric and orthonormal; size is a power of two (Sylvester)."""
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    scaled: Tensor = matrix / size**0.5
    return scaled


def hadamard_rotate(x: Tensor, block: int) -> Tensor:
    """Rotate each run of `block` channels; twice is the identity. [..., C] -> [..., C], upcast."""
    x = _upcast(x)
    if block == 0:
        return x
    matrix = hadamard(block, x.device).to(x.dtype)
    return (torch.unflatten(x, -1, (-1, block)) @ matrix).flatten(-2)


def quantize_rows(x: Tensor, dtype: torch.dtype, hadamard_block: int = 0) -> tuple[Tensor, Tensor]:
    """Quantize every row with a scale of its own, largest magnitude / largest number of the dtype.

    Args:
        x: [..., C] float.
        dtype: float8_e4m3fn or int8.
        hadamard_block: channels rotated together before rounding (a power of two that divides C),
            which spreads an outlier over them; 0 for none.

    Returns:
        [..., C] in dtype, and [..., 1] float32; a row of zeros gets scale 1.

    Source: Hadamard rotation arXiv:2404.00456 (QuaRot).
    """
    limit = FORMAT_MAX[dtype]
    rotated = hadamard_rotate(x, hadamard_block).float()
    scale = rotated.abs().amax(dim=-1, keepdim=True) / limit
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    scaled = (rotated / scale).clamp(-limit, limit)
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scale


def gelu(x: Tensor) -> Tensor:
    """tanh-GELU, arXiv:1606.08415."""
    return F.gelu(x, approximate="tanh")


def qk_norm_rope_(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    text_q_weight: Tensor,
    text_k_weight: Tensor,
    rope: Tensor,
) -> None:
    """`qk_norm_rope` into its input."""
    image, text = _norm_and_rope(qkv, q_weight, k_weight, text_q_weight, text_k_weight, rope)
    qkv[:, : rope.shape[0], :2] = image
    qkv[:, rope.shape[0] :, :2] = text


def layer_norm_modulate_quantize(
    x: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype, hadamard_block: int
) -> tuple[Tensor, Tensor]:
    """`layer_norm_modulate`, then `quantize_rows`, with nothing rounded between."""
    normed = layer_norm_modulate(_upcast(x), shift, scale)
    return quantize_rows(normed, dtype, hadamard_block)


def residual_layer_norm_modulate(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """`gated_residual`, and `layer_norm_modulate` of what it returns."""
    total = gated_residual(x, y, gate)
    return total, layer_norm_modulate(total, shift, scale)


def residual_layer_norm_modulate_quantize(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, *act_format: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """`gated_residual`, and `layer_norm_modulate_quantize` of what it returns."""
    total = gated_residual(x, y, gate)
    return total, *layer_norm_modulate_quantize(total, shift, scale, *act_format)


def gelu_quantize(x: Tensor, dtype: torch.dtype, hadamard_block: int) -> tuple[Tensor, Tensor]:
    """`gelu`, then `quantize_rows`, with nothing rounded between."""
    return quantize_rows(gelu(_upcast(x)), dtype, hadamard_block)


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (divided by the count) of each channel.

    Args:
        x: [B, C, T, H, W].

    Returns:
        Twice [B, C]: float64, or float32 on devices that have no float64 (MPS, Arc).
    """
    return _merged([_moments(x[:, :, frames]) for frames in _pieces(x)])


def _pieces(x: Tensor) -> Iterator[slice]:
    """Frames of [B, C, T, H, W] to work on at once: one, and several where they are small."""
    # wide copies are large; but of small ones the calls would cost more than the work
    elements, count = x[:, :, 0].numel(), 1
    # with other sizes and layouts torch would round some of several frames otherwise
    if elements and elements % 64 == 0 and x.shape[3] > 1 and x.stride(1) == 1:
        count = max(1, PIECE_ELEMENTS // elements)
    for start in range(0, x.shape[2], count):
        yield slice(start, min(start + count, x.shape[2]))


def _moments(frames: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel of each frame, twice [T, B, C]; see `channel_moments`."""
    # each row has its own, which are merged: strips of a clip give the same as the whole
    dtype = torch.float64 if frames.device.type in ("cpu", "cuda", "meta") else torch.float32
    wide = frames.to(torch.promote_types(frames.dtype, torch.float32))
    pivot = wide.mean(4, keepdim=True)
    centred = wide - pivot
    offset = centred.mean(4).to(dtype)  # what the rounding of the pivot left
    means = pivot[..., 0].to(dtype) + offset
    variances = centred.square_().mean(4).to(dtype) - offset.square()
    mean = means.mean(3, keepdim=True)
    variance = variances.mean(3) + (means - mean).square_().mean(3)
    return mean[..., 0].permute(2, 0, 1), variance.permute(2, 0, 1)


def _merged(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Moments of the frames of a clip as those of the whole (Chan et al.), twice [B, C]."""
    means, variances = (torch.cat(each) for each in zip(*parts, strict=True))
    mean = means.mean(0)
    return mean, variances.mean(0) + (means - mean).square_().mean(0)


def norm_silu_pad_(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, out: Tensor, front: int
) -> None:
    """What a causal convolution reads: SiLU of x * scale + shift, with replicated borders.

    A GroupNorm with known statistics comes down to x * scale + shift.

    Args:
        x: [B, C, T, H, W].
        scale: [B, C, 1, 1, 1] float32 or float64; None copies x as it is.
        shift: likewise.
        out: [B, C, front + T, H + 2 * side, W + 2 * side], every element of which is written.
        front: copies of the first frame before it.

    Source: GroupNorm arXiv:1803.08494; SiLU arXiv:1702.03118.
    """
    height, width = x.shape[3:]
    side = (out.shape[4] - width) // 2
    inner = out[..., side : side + height, side : side + width]
    for frames in _pieces(x):
        piece, target = x[:, :, frames], inner[:, :, front + frames.start : front + frames.stop]
        if scale is None or shift is None:
            target.copy_(piece)
        elif scale.dtype == out.dtype:
            torch.addcmul(shift, piece, scale, out=target)
            F.silu(target, inplace=True)
        else:
            wide = torch.addcmul(shift, piece.to(scale.dtype), scale)
            target.copy_(F.silu(wide, inplace=True))
    written = out[:, :, front:]
    if side:
        written[..., side:-side, :side] = written[..., side:-side, side : side + 1]
        written[..., side:-side, -side:] = written[..., side:-side, -side - 1 : -side]
        written[..., :side, :] = written[..., side : side + 1, :]
        written[..., -side:, :] = written[..., -side - 1 : -side, :]
    out[:, :, :front] = out[:, :, front : front + 1]


def residual_add_(x: Tensor, branch: Tensor, bias: Tensor) -> None:
    """Add to x in place; x and branch [B, C, T, H, W], bias [C]."""
    for _ in _added(x, branch, bias):
        pass


def residual_add_moments_(x: Tensor, branch: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """`residual_add_`, and `channel_moments` of what it leaves in x."""
    return _merged([_moments(frames) for frames in _added(x, branch, bias)])


def _added(x: Tensor, branch: Tensor, bias: Tensor) -> Iterator[Tensor]:
    """Add to x, and yield its frames after it, some at a time."""
    wide = bias[:, None, None, None].to(torch.promote_types(x.dtype, torch.float32))
    for frames in _pieces(x):
        piece = x[:, :, frames]
        yield piece.copy_((branch[:, :, frames] + wide).add_(piece))


def interleave_(x: Tensor, bias: Tensor, out: Tensor) -> None:
    """An enlarged clip from the convolution that computes all copies of a pixel (`fold_taps`).

    Args:
        x: [B, copies * C, T, H + 1, W + 1]; copies is 4, of a pixel (two in height, two in width,
            width innermost), or 8 where every frame has two too, outermost.
        bias: [C], added.
        out: [B, C, T', 2 * H, 2 * W]; T' is T with 4 copies, 2 * T with 8, and 2 * T - 1 with 8
            where x begins with the clip's first frame, which is not repeated.
    """
    for _ in _interleaved(x, bias, out):
        pass


def interleave_moments_(x: Tensor, bias: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """`interleave_`, and `channel_moments` of what it leaves in `out`."""
    return _merged([_moments(frames) for frames in _interleaved(x, bias, out)])


def _interleaved(x: Tensor, bias: Tensor, out: Tensor) -> Iterator[Tensor]:
    """Fill `out`, and yield its frames after it, some at a time."""
    in_time = x.shape[1] // out.shape[1] // 4
    height, width = x.shape[3] - 1, x.shape[4] - 1
    by_copy = torch.unflatten(x, 1, (in_time, 2, 2, out.shape[1]))
    wide = bias[:, None, None, None].to(torch.promote_types(x.dtype, torch.float32))
    first = in_time * x.shape[2] - out.shape[2]
    for frames in _pieces(out):
        piece = out[:, :, frames]
        for index in range(frames.start, min(frames.start + in_time, frames.stop)):
            source, copy = divmod(first + index, in_time)
            target = piece[:, :, index - frames.start :: in_time]
            sources = slice(source, source + target.shape[2])
            for row in range(2):
                for column in range(2):
                    part = by_copy[:, copy, row, column, :, sources]
                    part = part[..., row : row + height, column : column + width]
                    target[..., row::2, column::2] = part + wide
        yield piece


def rescale_(
    acc: Tensor,
    act_scale: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    add: bool,
) -> None:
    """The epilogue of a GEMM: acc * act_scale * scale + bias, written to `out` or added to it.

    Passes write the dtype of `out`: a float32 copy of the result would take more time than 8-bit
    GEMMs of 3,072 channels save. Where that dtype is bfloat16 the result is rounded to it two or
    three times, an error far below that of rounding to 8 bits.

    Args:
        acc: [M, N] int32, bfloat16 or float32, the accumulator.
        act_scale: [M, 1], of the activations.
        scale: of the weight, one element, [N, 1] or None.
        bias: [N] or None.
        out: [M, N].
        add: whether to add to `out`.
    """
    # between the two scales a number may be beyond float16, which ends at 65,504
    dtype = torch.float32 if out.dtype == torch.float16 else out.dtype
    is_apart = add or dtype != out.dtype
    scaled = torch.empty_like(out, dtype=dtype) if is_apart else out
    torch.mul(acc, act_scale, out=scaled)
    if scale is not None:
        scaled.mul_(scale.reshape(1, -1))
    if bias is not None:
        scaled.add_(bias)
    if is_apart:
        out.add_(scaled) if add else out.copy_(scaled)


def add_low_rank_(
    x: Tensor,
    act_scale: Tensor | None,
    down: Tensor,
    up: Tensor,
    segments: Sequence[int],
    out: Tensor,
) -> None:
    """The side branch of a linear layer: add (x @ down.T) @ up.T to out, segment by segment.

    A segment is some output channels with some rows of `down`: queries, keys and values of a fused
    projection may have factors of their own.

    Args:
        x: [..., K]; 8-bit numbers are exact in the dtype of `down`.
        act_scale: [..., 1] float32, of an x in 8 bits; else None.
        down: [R, K] in the dtype of the products.
        up: [N, r], r at least the largest rank of a segment.
        segments: of each four numbers: output channels, the first and the one after the last; rows
            of `down`, likewise.
        out: [..., N].
    """
    low, high = min(segments[2::4]), max(segments[3::4])
    inner = x.to(down.dtype) @ down[low:high].T
    if act_scale is not None:
        inner = (inner * act_scale).to(down.dtype)
    for place in range(0, len(segments), 4):
        start, stop, first, last = segments[place : place + 4]
        part = inner[..., first - low : last - low] @ up[start:stop, : last - first].T
        out[..., start:stop] += part


class ValueFormat(NamedTuple):
    """How attention's weights and values are rounded for their GEMM.

    Attributes:
        dtype: of both.
        weight_max: the number that the largest weight of a row so far becomes.
        value_max: the number that the largest value of a channel becomes.
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
    """Attention with int8 queries and keys, and weights and values in e4m3 or fp16.

    * Keys are centered: their mean over the tokens adds the same to every score of a row, which
      softmax does not see. Queries and keys are rotated over the head dimension, which leaves their
      products unchanged and spreads outliers. Queries have a scale each, keys one per tile.
    * Weights are floating-point numbers. An integer grid over the largest weight of a tile would
      round everything beside an attention sink to zero (relative error 0.15 to 0.24 with 1 to
      64 sinks in 8,192 keys). They are divided by the sum of the rounded weights.
    * Values are centered too, and their mean is added at the end (weights sum to one); they are
      divided by the largest magnitude of their channel. Half of the shift of their mean by rounding
      is subtracted: with equal weights all of it would be error, with one sink nothing.

    Args:
        query: [B, heads, S, D]; D a power of two.
        key: [B, heads, T, D].
        value: [B, heads, T, D].
        key_tile: keys that share a scale, and whose largest weight counts as one of the next.
        values: format of weights and values.

    Returns:
        [B, heads, S, D] in query's dtype.

    Source: the mean of the keys arXiv:2410.02367 (SageAttention); weights and values in e4m3
        arXiv:2411.10958 (SageAttention2); rotation arXiv:2404.00456 (QuaRot); the sum over tiles
        arXiv:2205.14135 (FlashAttention).
    """
    width = query.shape[-1]
    key, value, dtype = key.float(), value.float(), query.dtype
    mean = value.mean(dim=2, keepdim=True)
    v_scale = (value - mean).abs().amax(dim=2, keepdim=True) / values.value_max
    v_scale = torch.where(v_scale == 0, 1.0, v_scale)
    v = ((value - mean) / v_scale).to(values.dtype).float()
    mean = mean - 0.5 * v_scale * v.mean(dim=2, keepdim=True)
    k = hadamard_rotate(key - key.mean(dim=2, keepdim=True), width)
    q, q_scale = _quantize_int8(hadamard_rotate(query.float(), width), (-1,))
    q_scale = q_scale * (width**-0.5 * math.log2(math.e))
    peak = torch.full_like(q_scale, -math.inf)
    total, sums = torch.zeros_like(q_scale), torch.zeros_like(q)
    tiles = list(zip(torch.split(k, key_tile, 2), torch.split(v, key_tile, 2), strict=True))
    if k.shape[2] % key_tile:  # the partial tile at the end goes first, as in the kernel
        tiles = [tiles[-1], *tiles[:-1]]
    for k_tile, v_tile in tiles:
        k_int8, k_scale = _quantize_int8(k_tile, (-2, -1))
        scores = (q @ k_int8.transpose(-1, -2)) * (q_scale * k_scale)
        new_peak = torch.maximum(peak, scores.amax(dim=-1, keepdim=True))
        weights = values.weight_max * torch.exp2(scores - new_peak)
        weights, decay = weights.to(values.dtype).float(), torch.exp2(peak - new_peak)
        total = total * decay + weights.sum(dim=-1, keepdim=True)
        sums = sums * decay + weights @ v_tile
        peak = new_peak
    return (sums / total * v_scale + mean).to(dtype)


def _quantize_int8(x: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Integers within -127..127 in float32, which sums 128 products exactly; and their scales."""
    largest = x.abs().amax(dim=axes, keepdim=True)
    scale = torch.where(largest == 0, 1.0, largest / 127)
    return (x / scale).round(), scale
