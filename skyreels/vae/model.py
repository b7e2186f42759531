"""The HunyuanVideo causal video VAE: pixels to latents and back.

Every 3x3x3 convolution pads two frames in front and none behind (replicate), so a latent depends
on its own and earlier frames; only GroupNorm, whose statistics run over all frames handed in, looks
ahead. Parameter names are those of diffusers' AutoencoderKLHunyuanVideo.

Activations at full resolution are what fills a card, so layers walk through time in pieces: a
piece is normalised, padded and convolved while only the layer's input and output exist whole. The
result is the same (GroupNorm statistics are taken over all pieces first), and no operator ever
sees more than 2^31 elements, the limit of CUDA's padding and upsampling kernels.

Source: HunyuanVideo (arXiv 2412.03603), section 4.1; diffusers 0.42.1
models/autoencoders/autoencoder_kl_hunyuan_video.py is the reference the tests compare with.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels
from ..config import SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION, VAEConfig
from ..errors import ShapeError
from ..kernels import reference
from ..runtime import never_interrupt

Check = Callable[[], None]
Factors = tuple[int, int, int]

#: elements of a layer's input worked on at once: 0.5 GiB in bf16
PIECE_ELEMENTS = 2**28
#: bytes the fp32 attention scores may take where no fused kernel exists (head dim 512 has few)
SCORE_BYTES = 2**29
NORM_EPS = 1e-6


class CausalConv3d(nn.Module):
    """Convolution over time, height and width that never looks at a later frame.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the result.
        kernel_size: along each of the three axes.
        stride: steps in (time, height, width).
        upsample: nearest-neighbour factors in (time, height, width), applied before the
            convolution. In time the first frame is not repeated: T frames become
            (T - 1) * factor + 1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: Factors = (1, 1, 1),
        upsample: Factors = (1, 1, 1),
    ) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.upsample = kernel_size, stride, upsample
        self.conv = nn.Conv3d(in_channels, out_channels, kernel_size, stride)

    def forward(
        self, hidden: Tensor, norm: nn.GroupNorm | None = None, add_to: Tensor | None = None
    ) -> Tensor:
        """Convolve `hidden`, after GroupNorm and SiLU if `norm` is given.

        Args:
            hidden: [B, C, T, H, W].
            norm: applied to `hidden` first, then SiLU.
            add_to: [B, C', T', H', W'], a residual to which the result is added in place.

        Returns:
            [B, C', T', H', W']; `add_to` itself if that was given.
        """
        batch, channels, frames, height, width = hidden.shape
        time_up, time_stride = self.upsample[0], self.stride[0]
        frames_out = (frames - 1) * time_up // time_stride + 1
        rows, columns = height * self.upsample[1], width * self.upsample[2]
        step = max(1, PIECE_ELEMENTS // (batch * channels * rows * columns * time_stride))
        whole = step >= frames_out
        statistics = None if whole or norm is None else group_statistics(hidden, norm)
        out = add_to
        for start in range(0, frames_out, step):
            stop = min(start + step, frames_out)
            # positions in the upsampled clip that outputs start..stop read; < 0 is padding
            first = start * time_stride - (self.kernel_size - 1)
            last = (stop - 1) * time_stride
            source = [_ceil_div(frame, time_up) for frame in range(max(first, 0), last + 1)]
            piece = hidden[:, :, source[0] : source[-1] + 1]
            if norm is not None:
                piece = norm_silu(piece, norm, statistics)
            piece = self._enlarge_and_pad(piece, [s - source[0] for s in source], max(-first, 0))
            result = self.conv(piece)
            del piece
            if add_to is not None:
                add_to[:, :, start:stop] += result
            elif whole:
                out = result
            else:
                if out is None:
                    out = result.new_empty((*result.shape[:2], frames_out, *result.shape[3:]))
                out[:, :, start:stop] = result
            del result  # or it would live on beside the next piece
        assert out is not None
        return out

    def _enlarge_and_pad(self, piece: Tensor, source: list[int], front: int) -> Tensor:
        if self.upsample[0] > 1:
            piece = piece.index_select(2, torch.tensor(source, device=piece.device))
        if self.upsample[1:] != (1, 1):
            scale = [1.0, float(self.upsample[1]), float(self.upsample[2])]
            piece = F.interpolate(piece, scale_factor=scale, mode="nearest")
        if self.kernel_size > 1:
            side = self.kernel_size // 2
            piece = F.pad(piece, (side, side, side, side, front, 0), mode="replicate")
        return piece


def group_statistics(hidden: Tensor, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
    """GroupNorm of the whole clip as one scale and one shift per channel, read piece by piece.

    Per-piece means and variances are merged in float64 (Chan's parallel formula), so the result
    does not depend on where the pieces end by more than fp32 rounding.

    Args:
        hidden: [B, C, T, H, W].
        norm: gives the groups, the weights and eps.

    Returns:
        scale and shift, each [B, C, 1, 1, 1] float32; normalised = hidden * scale + shift.
    """
    batch, channels, frames, height, width = hidden.shape
    step = max(1, PIECE_ELEMENTS // (2 * batch * channels * height * width))
    # a few numbers per piece, on the CPU where the device may have no float64 (MPS, Arc)
    has_float64 = hidden.device.type in ("cuda", "cpu", "meta")
    device = hidden.device if has_float64 else torch.device("cpu")
    mean = torch.zeros(batch, norm.num_groups, dtype=torch.float64, device=device)
    spread = torch.zeros_like(mean)  # sum of squared deviations, in units of one frame
    seen = 0
    moments = kernels.group_moments if _is_fused(hidden.device) else reference.group_moments
    for piece in torch.split(hidden, step, dim=2):
        count = piece.shape[2]
        piece_mean, piece_var = moments(piece, norm.num_groups)
        delta = piece_mean.to(device).double() - mean
        between = delta.square() * (seen * count / (seen + count))
        spread += piece_var.to(device).double() * count + between
        seen += count
        mean += delta * (count / seen)
    per_group = channels // norm.num_groups
    scale = (spread / frames + norm.eps).rsqrt().repeat_interleave(per_group, dim=1)
    scale = scale * norm.weight.to(device).double()
    shift = norm.bias.to(device).double() - mean.repeat_interleave(per_group, dim=1) * scale
    scale, shift = (x.float().to(hidden.device) for x in (scale, shift))
    return scale[..., None, None, None], shift[..., None, None, None]


def norm_silu(
    piece: Tensor, norm: nn.GroupNorm, statistics: tuple[Tensor, Tensor] | None
) -> Tensor:
    """GroupNorm then SiLU of a piece [B, C, t, H, W]; without statistics the piece is the clip."""
    is_fused = _is_fused(piece.device)
    if statistics is None and not is_fused:
        normed: Tensor = norm(piece)
        return F.silu(normed, inplace=True)
    scale, shift = statistics or group_statistics(piece, norm)
    if is_fused:
        return kernels.group_norm_silu(piece, scale, shift)
    return reference.group_norm_silu(piece, scale, shift)


def _is_fused(device: torch.device) -> bool:
    """Whether the normalisation runs in kernels here; plain torch shows tests its temporaries."""
    return kernels.is_fused("group_norm_silu", device)


class ResnetBlock(nn.Module):
    """Two normalised convolutions around a shortcut. It overwrites its input."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=NORM_EPS)
        self.conv1 = CausalConv3d(in_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=NORM_EPS)
        self.conv2 = CausalConv3d(out_channels, out_channels)
        self.conv_shortcut = (
            CausalConv3d(in_channels, out_channels, kernel_size=1)
            if in_channels != out_channels
            else None
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, C', T, H, W]; in place where C = C'."""
        branch = self.conv1(hidden, norm=self.norm1)
        residual = hidden if self.conv_shortcut is None else self.conv_shortcut(hidden)
        out: Tensor = self.conv2(branch, norm=self.norm2, add_to=residual)
        return out


class CausalAttention(nn.Module):
    """Single-head attention in which a token sees its own and earlier frames. Works in place."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=NORM_EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, hidden: Tensor, check: Check) -> Tensor:
        """[B, C, T, h, w] -> the same tensor, attention added."""
        frames, height, width = hidden.shape[2:]
        tokens = self.group_norm(hidden).flatten(2).transpose(1, 2)
        query, key, value = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        del tokens
        out = frame_causal_attention(query, key, value, height * width, check=check)
        out = self.to_out[0](out).transpose(1, 2)
        return hidden.add_(out.unflatten(2, (frames, height, width)))


def frame_causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tokens_per_frame: int,
    *,
    score_bytes: int = SCORE_BYTES,
    check: Check = never_interrupt,
) -> Tensor:
    """Attention of each frame's tokens to the tokens of its own and all earlier frames.

    No mask is ever built (at 544x960x97 it would be 83 GB): the keys of frame t are simply the
    prefix that ends with frame t. Queries are cut so that even a kernel which writes its fp32
    scores out stays within score_bytes; a row of the softmax is never split, so this is exact.

    Args:
        query: [B, N, D], N = T * tokens_per_frame, frames in order.
        key: [B, N, D].
        value: [B, N, D].
        tokens_per_frame: h * w of the latents.
        score_bytes: most bytes of one fp32 score matrix (at least one query row is taken).
        check: called once per frame; may raise to stop.

    Returns:
        [B, N, D].
    """
    out = torch.empty_like(query)
    for start in range(0, query.shape[1], tokens_per_frame):
        check()
        stop = start + tokens_per_frame
        keys, values = key[:, None, :stop], value[:, None, :stop]
        rows = max(1, score_bytes // (4 * query.shape[0] * stop))
        for row in range(start, stop, rows):
            span = slice(row, min(row + rows, stop))
            attended = F.scaled_dot_product_attention(query[:, None, span], keys, values)
            out[:, span] = attended[:, 0]
    return out


class MidBlock(nn.Module):
    """Resnet, attention, resnet at the lowest resolution."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, groups) for _ in range(2)])
        self.attentions = nn.ModuleList([CausalAttention(channels, groups)])

    def forward(self, hidden: Tensor, check: Check) -> Tensor:
        """[B, C, T, h, w] -> [B, C, T, h, w]."""
        check()
        hidden = self.resnets[0](hidden)
        hidden = self.attentions[0](hidden, check)
        check()
        out: Tensor = self.resnets[1](hidden)
        return out


class Resample(nn.Module):
    """A convolution that changes the size of the clip."""

    def __init__(
        self, channels: int, stride: Factors = (1, 1, 1), upsample: Factors = (1, 1, 1)
    ) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, stride=stride, upsample=upsample)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, C, T', H', W']."""
        out: Tensor = self.conv(hidden)
        return out


class Level(nn.Module):
    """The resnets of one resolution and the step to the next: a down block or an up block."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        layers: int,
        groups: int,
        *,
        stride: Factors = (1, 1, 1),
        upsample: Factors = (1, 1, 1),
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            [
                ResnetBlock(in_channels if i == 0 else out_channels, out_channels, groups)
                for i in range(layers)
            ]
        )
        self.downsamplers, self.upsamplers = nn.ModuleList(), nn.ModuleList()
        if stride != (1, 1, 1):
            self.downsamplers.append(Resample(out_channels, stride=stride))
        if upsample != (1, 1, 1):
            self.upsamplers.append(Resample(out_channels, upsample=upsample))

    def forward(self, hidden: Tensor, check: Check) -> Tensor:
        """[B, C, T, H, W] -> [B, C', T', H', W']."""
        for block in (*self.resnets, *self.downsamplers, *self.upsamplers):
            check()
            hidden = block(hidden)
        return hidden


def level_factors(level: int, num_levels: int) -> Factors:
    """Factors in (time, height, width) by which a level resamples.

    The first log2(8) levels resample space, the log2(4) levels before the last resample time.

    Args:
        level: counted from the pixels in the encoder and from the latents in the decoder.
        num_levels: of the encoder or decoder.

    Returns:
        1 or 2 for each axis.
    """
    space = 2 if level < int(math.log2(SPATIAL_COMPRESSION)) else 1
    last = num_levels - 1
    time = 2 if last - int(math.log2(TEMPORAL_COMPRESSION)) <= level < last else 1
    return (time, space, space)


class Encoder(nn.Module):
    """Pixels to the 2 * 16 channels of the posterior, before quant_conv."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        channels, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = CausalConv3d(config.in_channels, channels[0])
        self.down_blocks = nn.ModuleList(
            [
                Level(
                    channels[max(i - 1, 0)],
                    channels[i],
                    config.layers_per_block,
                    groups,
                    stride=level_factors(i, len(channels)),
                )
                for i in range(len(channels))
            ]
        )
        self.mid_block = MidBlock(channels[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=NORM_EPS)
        self.conv_out = CausalConv3d(channels[-1], 2 * config.latent_channels)

    def forward(self, video: Tensor, check: Check) -> Tensor:
        """[B, 3, F, H, W] -> [B, 32, T, h, w]."""
        hidden = self.conv_in(video)
        for block in self.down_blocks:
            hidden = block(hidden, check)
        hidden = self.mid_block(hidden, check)
        out: Tensor = self.conv_out(hidden, norm=self.conv_norm_out)
        return out


class Decoder(nn.Module):
    """Latents, after post_quant_conv, to pixels."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        channels, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = CausalConv3d(config.latent_channels, channels[0])
        self.mid_block = MidBlock(channels[0], groups)
        self.up_blocks = nn.ModuleList(
            [
                Level(
                    channels[max(i - 1, 0)],
                    channels[i],
                    config.layers_per_block + 1,
                    groups,
                    upsample=level_factors(i, len(channels)),
                )
                for i in range(len(channels))
            ]
        )
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=NORM_EPS)
        self.conv_out = CausalConv3d(channels[-1], config.out_channels)

    def forward(self, latents: Tensor, check: Check) -> Tensor:
        """[B, 16, T, h, w] -> [B, 3, F, H, W]."""
        hidden = self.mid_block(self.conv_in(latents), check)
        for block in self.up_blocks:
            hidden = block(hidden, check)
        out: Tensor = self.conv_out(hidden, norm=self.conv_norm_out)
        return out


class VideoVAE(nn.Module):
    """The whole autoencoder. Inference only; it keeps no state between calls."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv3d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv3d(config.latent_channels, config.latent_channels, 1)

    @torch.no_grad()
    def encode(self, video: Tensor, *, check: Check = never_interrupt) -> Tensor:
        """Encode a clip to the mode of its posterior.

        The mode rather than a sample: the posterior is narrow and a mode repeats bit for bit.

        Args:
            video: [B, 3, F, H, W] in [-1, 1]; F = 4k + 1, H and W multiples of 8. Moved to this
                module's device and dtype.
            check: called between blocks; may raise to stop.

        Returns:
            [B, 16, T, h, w], VAE space (unscaled); T = (F - 1) / 4 + 1.

        Raises:
            ShapeError: the clip breaks one of these rules.
        """
        check_video_shape(video.shape, self.config.in_channels)
        moments: Tensor = self.quant_conv(self.encoder(video.to(self.quant_conv.weight), check))
        return moments[:, : self.config.latent_channels]

    @torch.no_grad()
    def decode(self, vae_latents: Tensor, *, check: Check = never_interrupt) -> Tensor:
        """Decode all latents in one pass.

        Args:
            vae_latents: [B, 16, T, h, w], VAE space (unscaled). Moved to this module's device
                and dtype.
            check: called between blocks; may raise to stop.

        Returns:
            [B, 3, F, H, W], about -1 to 1, not clamped; F = 4 * (T - 1) + 1, H = 8h, W = 8w.

        Raises:
            ShapeError: not 5-D, or not the latent channels of this VAE.
        """
        check_latent_shape(vae_latents.shape, self.config.latent_channels)
        latents = self.post_quant_conv(vae_latents.to(self.post_quant_conv.weight))
        video: Tensor = self.decoder(latents, check)
        return video


def check_video_shape(shape: torch.Size, channels: int) -> None:
    """Raise ShapeError unless `shape` is [B, channels, 4k + 1, 8m, 8n]."""
    _check_five(shape, channels, "a clip", "[B, C, F, H, W]")
    frames, height, width = shape[2:]
    if (frames - 1) % TEMPORAL_COMPRESSION:
        near = _nearest(frames - 1, TEMPORAL_COMPRESSION) + 1
        raise ShapeError(
            f"The clip to encode has {frames} frames; the video VAE takes 4k + 1: use {near}."
        )
    for name, value in (("height", height), ("width", width)):
        if value % SPATIAL_COMPRESSION:
            near = max(_nearest(value, SPATIAL_COMPRESSION), SPATIAL_COMPRESSION)
            raise ShapeError(
                f"The clip to encode has {name} {value}; the video VAE takes multiples of "
                f"{SPATIAL_COMPRESSION}: use {near}."
            )


def check_latent_shape(shape: torch.Size, channels: int) -> None:
    """Raise ShapeError unless `shape` is [B, channels, T, h, w]."""
    _check_five(shape, channels, "latents", "[B, C, T, h, w]")


def _check_five(shape: torch.Size, channels: int, what: str, layout: str) -> None:
    if len(shape) != 5 or shape[1] != channels or 0 in shape:
        raise ShapeError(
            f"The video VAE was given {what} of shape {list(shape)}; it takes {layout} with "
            f"C = {channels} and no empty dimension: pass such a tensor."
        )


def _nearest(value: int, multiple: int) -> int:
    return (value + multiple // 2) // multiple * multiple


def _ceil_div(value: int, divisor: int) -> int:
    return -(-value // divisor)
