"""Encode a clip in little memory: the two wide levels of the encoder a few frames at a time.

At full resolution one activation of a clip is larger than a small card (4.4 GB for 33 frames of
960x544 in bf16), and the GroupNorm between two layers needs the statistics of all frames. So a
level is walked once for each of its norms: each pass computes everything up to that norm and keeps
its statistics only; the last pass keeps the level's output, a quarter or an eighth of the input.
Convolutions look back two frames and never ahead, so a pass needs no more than those beside the
frames it works on. The result is that of `VideoVAE.encode` up to rounding, for 2.4 times the
products of those two levels.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels
from ..config import VAEConfig
from ..kernels import reference
from .budget import MEMORY_MARGIN, attention_bytes
from .model import (
    CausalConv3d,
    Check,
    Level,
    Resample,
    ResnetBlock,
    VideoVAE,
    check_video_shape,
    norm_silu,
)

#: levels that are walked in pieces; those after them are an eighth as large
STREAMED_LEVELS = 2
#: frames of a piece after the first, which is one frame: even, as the second level halves time
PIECE_FRAMES = 2
#: frames of the first level's activations alive at the peak of a pass, counted on shape-only
#: tensors: the last two of five convolutions, and what a piece becomes
PEAK_FRAMES = 27


@torch.no_grad()
def encode_streamed(vae: VideoVAE, video: Tensor, *, check: Check) -> Tensor:
    """Encode a clip to the mode of its posterior, as `VideoVAE.encode`.

    Args:
        vae: on the device of the computation.
        video: [B, 3, F, H, W] in [-1, 1]; F = 4k + 1, H and W multiples of 8.
        check: called before each piece and between blocks; may raise to stop.

    Returns:
        [B, 16, T, h, w], VAE space (unscaled).

    Raises:
        ShapeError: the clip breaks one of these rules.
    """
    check_video_shape(video.shape, vae.config.in_channels)
    encoder = vae.encoder
    hidden = video.to(vae.quant_conv.weight)
    conv_in: CausalConv3d | None = encoder.conv_in
    for index, level in enumerate(encoder.down_blocks.children()):
        assert isinstance(level, Level)
        if index < STREAMED_LEVELS and level.downsamplers:
            hidden = _stream(level, conv_in, hidden, check)
            conv_in = None
            continue
        hidden = hidden if conv_in is None else conv_in(hidden)
        conv_in = None
        hidden = level(hidden, check)
    hidden = encoder.mid_block(hidden, check)
    moments: Tensor = vae.quant_conv(encoder.conv_out(hidden, norm=encoder.conv_norm_out))
    return moments[:, : vae.config.latent_channels]


def streamed_bytes(config: VAEConfig, video_shape: torch.Size, dtype: torch.dtype) -> int:
    """Estimate the peak bytes of one `encode_streamed`, beside weights and video.

    Args:
        config: of the VAE.
        video_shape: [B, 3, F, H, W].
        dtype: the compute dtype.

    Returns:
        Bytes, MEMORY_MARGIN included.
    """
    batch, _, frames, height, width = video_shape
    first, second, third = config.block_out_channels[:3]
    frame = batch * height * width * dtype.itemsize
    at_work = PEAK_FRAMES * first * frame
    into_second = first * frames * frame // 4
    third_level = (second + 2 * third) * (frames // 2 + 1) * frame // 16
    return max(
        int((at_work + max(into_second, third_level)) * MEMORY_MARGIN),
        attention_bytes(config, video_shape, dtype),
    )


def _stream(level: Level, conv_in: CausalConv3d | None, source: Tensor, check: Check) -> Tensor:
    """[B, C, T, H, W] -> [B, C', T', H/2, W/2], after `conv_in` if there is one."""
    statistics: list[tuple[Tensor, Tensor]] = []
    for resnet in level.resnets.children():
        assert isinstance(resnet, ResnetBlock)
        for norm in (resnet.norm1, resnet.norm2):
            moments = _Moments()
            for piece in _pass(level, conv_in, source, statistics, check):
                moments.add(piece, norm.num_groups)
            statistics.append(moments.scale_and_shift(norm, source))
    frames = (source.shape[2] - 1) // _downsampler(level).stride[0] + 1
    out: Tensor | None = None
    done = 0
    for piece in _pass(level, conv_in, source, statistics, check):
        if out is None:
            batch, channels, _, height, width = piece.shape
            out = piece.new_empty(batch, channels, frames, height, width)
        out[:, :, done : done + piece.shape[2]] = piece
        done += piece.shape[2]
    assert out is not None
    assert done == frames
    return out


def _downsampler(level: Level) -> CausalConv3d:
    (resample,) = level.downsamplers.children()
    assert isinstance(resample, Resample)
    return resample.conv


def _pass(
    level: Level,
    conv_in: CausalConv3d | None,
    source: Tensor,
    statistics: list[tuple[Tensor, Tensor]],
    check: Check,
) -> Iterator[Tensor]:
    """Walk a level: the input of the first norm without statistics, or the level's output.

    Args:
        level: with a downsampler.
        conv_in: runs before the level, if given.
        source: [B, C, T, H, W].
        statistics: scale and shift of the level's first norms, in order.
        check: called before each piece.

    Yields:
        [B, C', t, H', W'], piece by piece.
    """
    begin = None if conv_in is None else _CausalStep(conv_in)
    blocks = []
    for resnet in level.resnets.children():
        assert isinstance(resnet, ResnetBlock)
        blocks.append((resnet, _CausalStep(resnet.conv1), _CausalStep(resnet.conv2)))
    downsample = _CausalStep(_downsampler(level))
    for start in (0, *range(1, source.shape[2], PIECE_FRAMES)):
        check()
        stop = min(start + PIECE_FRAMES, source.shape[2]) if start else 1
        hidden = source[:, :, start:stop]
        if begin is not None:
            hidden = begin(hidden)
        known = iter(statistics)
        for resnet, conv1, conv2 in blocks:
            if (given := next(known, None)) is None:
                break
            branch = conv1(norm_silu(hidden, resnet.norm1, given))
            if (given := next(known, None)) is None:
                hidden = branch
                break
            shortcut = resnet.conv_shortcut
            hidden = hidden if shortcut is None else shortcut.conv(hidden)
            hidden = hidden + conv2(norm_silu(branch, resnet.norm2, given))
            del branch
        else:
            hidden = downsample(hidden)
        yield hidden


class _CausalStep:
    """A causal convolution that is given a clip in pieces and remembers the last two frames."""

    def __init__(self, layer: CausalConv3d) -> None:
        self._layer = layer
        self._tail: Tensor | None = None
        self._seen = 0

    def __call__(self, piece: Tensor) -> Tensor:
        """[B, C, t, H, W] -> the outputs that the frames so far allow and none before gave."""
        layer, before = self._layer, self._layer.kernel_size - 1
        tail = piece[:, :, :1].expand(-1, -1, before, -1, -1) if self._tail is None else self._tail
        joined = torch.cat([tail, piece], dim=2)
        self._tail = joined[:, :, -before:].clone()
        first = -self._seen % layer.stride[0]  # outputs stand at multiples of the stride
        self._seen += piece.shape[2]
        side = layer.kernel_size // 2
        padded = F.pad(joined[:, :, first:], (side, side, side, side, 0, 0), mode="replicate")
        del joined
        out: Tensor = layer.conv(padded)
        return out


class _Moments:
    """Mean and variance of groups of channels over all pieces, in float64."""

    def __init__(self) -> None:
        self._frames = 0
        self._sums: Tensor | None = None

    def add(self, piece: Tensor, groups: int) -> None:
        """Take a piece [B, C, t, H, W] into account."""
        is_fused = kernels.is_fused("group_norm_silu", piece.device)
        moments = kernels.group_moments if is_fused else reference.group_moments
        # on the CPU where the device may have no float64 (MPS, Arc)
        has_float64 = piece.device.type in ("cuda", "cpu", "meta")
        device = piece.device if has_float64 else torch.device("cpu")
        mean, variance = (x.to(device).double() for x in moments(piece, groups))
        sums = piece.shape[2] * torch.stack([mean, variance + mean.square()])
        self._sums = sums if self._sums is None else self._sums + sums
        self._frames += piece.shape[2]

    def scale_and_shift(self, norm: nn.GroupNorm, like: Tensor) -> tuple[Tensor, Tensor]:
        """As `group_statistics`: each [B, C, 1, 1, 1], normalised = hidden * scale + shift."""
        assert self._sums is not None
        mean, square = self._sums / self._frames
        variance = (square - mean.square()).clamp_min(0.0)
        per_group = norm.num_channels // norm.num_groups
        scale = (variance + norm.eps).rsqrt().repeat_interleave(per_group, dim=1)
        scale = scale * norm.weight.to(mean)
        shift = norm.bias.to(mean) - mean.repeat_interleave(per_group, dim=1) * scale
        dtype = torch.promote_types(like.dtype, torch.float32)
        scale, shift = (x.to(like.device, dtype)[..., None, None, None] for x in (scale, shift))
        return scale, shift
