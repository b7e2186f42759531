"""The HunyuanVideo causal video VAE: pixels to latents and back.

Every 3x3x3 convolution pads two frames in front and none behind (replicate), so a latent depends
on its own and earlier frames; only GroupNorm, whose statistics run over all frames handed in, looks
ahead. Parameter names are those of diffusers' AutoencoderKLHunyuanVideo.

A clip goes through the layers as a list of pieces in time, whose channels are adjacent in memory
(channels_last_3d). A layer takes pieces off one list and puts its own on another; a `ConvStream`
keeps the frames that the convolution of the next piece reads again. Between two layers the pieces
may lie in main memory (store.py). GroupNorm is a scale and a shift per channel, once the moments of
all pieces are known, which the layer before takes while it makes them: normalising, SiLU and
padding are one step (`kernels.norm_silu_pad_`). No operator sees more than 2^31 elements.

Source: HunyuanVideo (arXiv 2412.03603), section 4.1; diffusers 0.42.1
models/autoencoders/autoencoder_kl_hunyuan_video.py is the reference the tests compare with.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import compress, pairwise
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels
from ..config import SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION, VAEConfig
from ..errors import ShapeError
from ..runtime import never_interrupt
from .store import Store
from .strips import Strips, merged

Check = Callable[[], None]
Factors = tuple[int, int, int]
#: a clip [B, C, T, H, W], cut along T
Pieces = list[Tensor]
#: scale and shift of a GroupNorm with known statistics, each [B, C, 1, 1, 1]
Affine = tuple[Tensor, Tensor]
#: which of the three taps of a convolution are summed: [copy][tap][old tap]
Taps = tuple[tuple[tuple[int, int, int], ...], ...]

#: elements of the largest piece a layer takes or makes: 1 GiB in bf16
PIECE_ELEMENTS = 2**29
#: the same where memory is short: four frames at the lower resolution of a synced decode
SYNCED_PIECE_ELEMENTS = 2**26
#: the same of an exact decode out of main memory: two frames of the last level's input at 544x960
STORED_PIECE_ELEMENTS = 2**28
#: bytes the fp32 attention scores may take where no fused kernel exists (head dim 512 has few)
SCORE_BYTES = 2**29
NORM_EPS = 1e-6
_LAYOUT = torch.channels_last_3d

#: the first copy of a pixel reads (one before, itself, itself), the second (itself, itself, one
#: after)
_SPACE_TAPS: Taps = (((1, 0, 0), (0, 1, 1)), ((1, 1, 0), (0, 0, 1)))
#: of a frame, which reads nothing later: (before, before, itself) and (before, itself, itself)
_TIME_TAPS: Taps = (((1, 1, 0), (0, 0, 1)), ((1, 0, 0), (0, 1, 1)))
_SAME_TAPS: Taps = (((1, 0, 0), (0, 1, 0), (0, 0, 1)),)


class CausalConv3d(nn.Module):
    """Convolution over time, height and width that never looks at a later frame.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the result.
        kernel_size: along each of the three axes.
        stride: steps in (time, height, width).
        upsample: nearest-neighbour factors in (time, height, width), applied before the
            convolution; height and width are enlarged together. In time the first frame is not
            repeated: T frames become (T - 1) * factor + 1.
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
        #: the weight of `fold_taps`, while a run lasts
        self.folded: Tensor | None = None

    @property
    def is_folded(self) -> bool:
        """Whether enlarging is part of the convolution."""
        return self.upsample[1] > 1

    def fold(self) -> Tensor:
        """The weight that computes every copy of a pixel from the pixels themselves."""
        return fold_taps(self.conv.weight, in_time=self.upsample[0] > 1)


def fold_taps(weight: Tensor, *, in_time: bool) -> Tensor:
    """Weights for a clip whose pixels would be repeated, to be used on the clip as it is.

    Where pixels are repeated, several taps of a convolution read the same one. Their sums are two
    taps instead of three along each enlarged axis, one set for each copy of a pixel: a third of the
    work. Sums are float32 (of float64 weights float64) and rounded once.

    Args:
        weight: [C', C, 3, 3, 3].
        in_time: whether frames are repeated too, besides rows and columns.

    Returns:
        [copies * C', C, 2 or 3, 2, 2], the copies in the order of `kernels.interleave_`.
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    for taps in (_SPACE_TAPS, _SPACE_TAPS, _TIME_TAPS if in_time else _SAME_TAPS):
        # the last axis becomes copies and taps; the next turn finds the axis before it there
        wide = _fold_last(wide, taps).movedim(-1, -3)
    return wide.flatten(0, 3).to(weight.dtype).contiguous(memory_format=_LAYOUT)


def _fold_last(weight: Tensor, taps: Taps) -> Tensor:
    """[..., 3] -> [copies, ..., taps]: sums of the weights that read the same pixel."""
    old = weight.unbind(-1)
    copies = [
        torch.stack([torch.stack(list(compress(old, tap))).sum(0) for tap in copy], -1)
        for copy in taps
    ]
    return torch.stack(copies)


class ConvStream:
    """A convolution on its way through a clip, which is given to it piece by piece.

    Args:
        layer: the convolution.
        affine: of the GroupNorm before it, which SiLU follows; None for neither.
        keeps_copies: of the frames that the next piece reads again, where memory is short; else
            the whole piece that they are part of is kept, which saves copying them.
        strips: where other ranks have the rows beside.
    """

    def __init__(
        self,
        layer: CausalConv3d,
        affine: Affine | None = None,
        *,
        keeps_copies: bool = False,
        strips: Strips | None = None,
    ) -> None:
        self.layer, self.affine, self.keeps_copies = layer, affine, keeps_copies
        self._strips = strips
        self._halo: Tensor | None = None  # padded frames that the next piece's outputs read too

    def __call__(
        self, piece: Tensor, *, with_bias: bool = True, moments: "Moments | None" = None
    ) -> Tensor | None:
        """Convolve the next frames.

        Args:
            piece: [B, C, t, H, W].
            with_bias: False where the caller adds the bias itself.
            moments: takes in the result.

        Returns:
            [B, C', t', H', W']; None if a stride in time has no output yet.
        """
        layer = self.layer
        if layer.is_folded:
            return self._enlarge(piece, moments)
        weight, bias = layer.conv.weight, layer.conv.bias if with_bias else None
        if layer.kernel_size > 1:
            if layer.upsample[0] > 1:
                piece = piece.repeat_interleave(2, 2)[:, :, self._halo is None :]
            piece = self._pad(piece, layer.kernel_size, layer.stride[0])
            if piece.shape[2] < layer.kernel_size:
                return None
        out = F.conv3d(piece, weight, bias, layer.stride)
        if moments is not None:
            moments.add(out)
        return out

    def _enlarge(self, piece: Tensor, moments: "Moments | None") -> Tensor:
        """Enlarge the next frames and convolve them, in one convolution."""
        layer, weight = self.layer, self.layer.folded
        if weight is None:
            weight = layer.fold()
        assert layer.conv.bias is not None
        batch, _, frames, height, width = piece.shape
        time = layer.upsample[0]
        is_first = self._halo is None and time > 1
        shape = (batch, layer.conv.out_channels, frames * time - is_first, 2 * height, 2 * width)
        out = torch.empty(shape, dtype=piece.dtype, device=piece.device, memory_format=_LAYOUT)
        start = 0
        for half in torch.split(
            piece, max(1, frames // 2), 2
        ):  # all copies take as much as the result
            stop = start + half.shape[2] * time - (is_first and start == 0)
            copies = F.conv3d(self._pad(half, weight.shape[2], 1), weight)
            target = out[:, :, start:stop]
            if moments is None:
                kernels.interleave_(copies, layer.conv.bias, target)
            else:
                found = kernels.interleave_moments_(copies, layer.conv.bias, target)
                moments.take(target, found)
            del copies
            start = stop
        return out

    def _pad(self, piece: Tensor, taps: int, stride: int) -> Tensor:
        """What the convolution reads: kept frames, then the piece, normalised and padded."""
        batch, channels, frames, height, width = piece.shape
        kept = taps - 1 if self._halo is None else self._halo.shape[2]
        shape = (batch, channels, kept + frames, height + 2, width + 2)
        padded = torch.empty(shape, dtype=piece.dtype, device=piece.device, memory_format=_LAYOUT)
        scale, shift = self.affine or (None, None)
        if self._halo is None:
            new, front = padded, kept
        else:
            padded[:, :, :kept] = self._halo
            self._halo = None
            new, front = padded[:, :, kept:], 0
        kernels.norm_silu_pad_(piece, scale, shift, new, front)
        if self._strips is not None:
            self._strips.swap_rows(new)
        used = max(0, (kept + frames - taps) // stride + 1) * stride
        self._halo = padded[:, :, used:]
        if self.keeps_copies:
            self._halo = self._halo.clone()
        return padded


class Moments:
    """Mean and variance of every channel of a clip, gathered piece by piece.

    They are merged in float64 (Chan's parallel formula), so the result does not depend on where
    the pieces end by more than the rounding of a piece's own.
    """

    def __init__(self) -> None:
        self._parts: list[tuple[int, Tensor, Tensor]] = []

    def add(self, piece: Tensor) -> None:
        """Take in [B, C, t, H, W]."""
        self.take(piece, kernels.channel_moments(piece))

    def take(self, piece: Tensor, found: tuple[Tensor, Tensor]) -> None:
        """Take in a piece whose mean and variance of each channel are known."""
        self._parts.append((piece.shape[2], *found))
        self._like = torch.empty(0, dtype=piece.dtype, device=piece.device)

    def affine(
        self,
        norm: nn.GroupNorm,
        bias: Tensor | None,
        *,
        is_one_clip: bool,
        strips: Strips | None = None,
    ) -> Affine:
        """A GroupNorm of the clip as one scale and one shift per channel.

        Args:
            norm: gives the groups, the weights and eps.
            bias: [C], added to the clip before it is normalised.
            is_one_clip: whether the whole batch has one mean and variance.
            strips: where the pieces are a strip of the clip, whose others have moments too.

        Returns:
            scale and shift, each [B, C, 1, 1, 1] in float32 (of float64 clips float64);
            normalised = clip * scale + shift.
        """
        # a few numbers, on the CPU where the device has no float64 (MPS, Arc)
        means = torch.stack([mean for _, mean, _ in self._parts])
        variances = torch.stack([variance for _, _, variance in self._parts])
        device = means.device if means.dtype == torch.float64 else torch.device("cpu")
        means, variances = means.to(device).double(), variances.to(device).double()
        frames = [count for count, _, _ in self._parts]
        weights = torch.tensor(frames, dtype=torch.float64, device=device)[:, None, None]
        mean, variance = merged(means, variances, weights)
        if strips is not None:
            mean, variance = strips.whole_moments(mean, variance)
        weight, shift = (each.to(device).double() for each in (norm.weight, norm.bias))
        offset = 0.0 if bias is None else bias.to(device).double()
        groups = (norm.num_groups, -1)
        mean = torch.unflatten(mean + offset, 1, groups)
        variance = torch.unflatten(variance, 1, groups)
        axes = (0, 2) if is_one_clip else (2,)
        centre = mean.mean(axes, keepdim=True)
        spread = (variance + (mean - centre).square()).mean(axes, keepdim=True)
        scale = ((spread + norm.eps).rsqrt().expand(mean.shape)).flatten(1) * weight
        shift = shift + (offset - centre.expand(mean.shape).flatten(1)) * scale
        dtype = torch.promote_types(self._like.dtype, torch.float32)
        scale, shift = (x.to(self._like.device, dtype) for x in (scale, shift))
        return scale[..., None, None, None], shift[..., None, None, None]


#: the affine of every norm, for clips of a batch of one
Frozen = dict[nn.GroupNorm, Affine]
PieceT = TypeVar("PieceT")


@dataclass
class Clip:
    """A clip [B, C, T, H, W] between two layers.

    Attributes:
        pieces: cut along T; tensors, or what a store made of them.
        moments: of all pieces; None where the layer that made them took none.
    """

    pieces: list[Any] = field(default_factory=list)
    moments: Moments | None = None


@dataclass
class Walk:
    """One run of a network over a clip.

    Attributes:
        check: called between layers and pieces; may raise to stop.
        piece_elements: elements of the largest piece where memory is short, else None.
        recorded: takes the affine of every norm, where a later run uses them.
        is_one_clip: whether GroupNorm treats the whole batch as one clip.
        store: where pieces lie between layers; None for on the device.
        strips: where other ranks have the rows beside; None for a clip that is here whole.
    """

    check: Check
    piece_elements: int | None = None
    recorded: "Frozen | None" = None
    is_one_clip: bool = False
    store: Store | None = None
    strips: Strips | None = None

    def affine(self, norm: nn.GroupNorm, moments: Moments, bias: Tensor | None = None) -> Affine:
        """The norm of a clip with these moments."""
        affine = moments.affine(norm, bias, is_one_clip=self.is_one_clip, strips=self.strips)
        if self.recorded is not None:
            self.recorded[norm] = (affine[0][:1], affine[1][:1])
        return affine

    def measure(self, norm: nn.GroupNorm, clip: Clip) -> Affine:
        """The norm of a clip that is there."""
        moments = clip.moments
        if moments is None:
            moments = Moments()
            for piece in clip.pieces:
                for part in self.cut(piece):
                    self.check()
                    moments.add(part)
        return self.affine(norm, moments)

    def cut(self, piece: Tensor, growth: int = 1) -> Pieces:
        """The same frames in pieces that are small enough even after they grow by a factor."""
        limit = PIECE_ELEMENTS if self.piece_elements is None else self.piece_elements
        frame = piece[:, :, 0].numel()
        if self.strips is not None:  # all ranks cut alike
            frame = self.strips.largest(frame)
        frames = max(1, limit // max(1, growth * frame))
        return list(torch.split(piece, frames, 2))

    def put(self, clip: Clip, piece: Tensor) -> None:
        """Put a piece at the end of a clip."""
        if self.store is None:
            clip.pieces.append(piece)
        else:
            clip.pieces += map(self.store.put, self.cut(piece))

    def take(self, clip: Clip, growth: int = 1) -> Iterator[Tensor]:
        """Yield a clip in pieces as `cut` makes them, and take them off it as it goes on."""
        pieces = consume(clip.pieces) if self.store is None else self.store.take(clip.pieces)
        for piece in pieces:
            parts = self.cut(piece, growth)
            del piece
            for part in consume(parts):
                self.check()
                yield part
                del part

    def stream(self, layer: CausalConv3d, affine: Affine | None = None) -> ConvStream:
        """A layer on its way through a clip."""
        keeps_copies = self.piece_elements is not None
        return ConvStream(layer, affine, keeps_copies=keeps_copies, strips=self.strips)

    def convolve(
        self,
        layer: CausalConv3d,
        clip: Clip,
        affine: Affine | None = None,
        moments: Moments | None = None,
    ) -> Iterator[Tensor]:
        """Yield what a layer makes of a clip, whose pieces are taken off it.

        Args:
            layer: the convolution.
            clip: what it reads.
            affine: of the norm before it.
            moments: take in what is yielded.
        """
        stream = self.stream(layer, affine)
        for piece in self.take(clip, math.prod(layer.upsample)):
            made = stream(piece, moments=moments)
            del piece
            if made is not None:
                given = [made]
                del made
                yield given.pop()  # whoever takes it may free it


def consume(pieces: list[PieceT]) -> Iterator[PieceT]:
    """Yield pieces while taking them off the list, so that each can be freed after its use."""
    pieces.reverse()
    while pieces:
        yield pieces.pop()


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

    @property
    def bias(self) -> Tensor:
        """[C'], of the last convolution and the shortcut, added with the residual."""
        bias = self.conv2.conv.bias
        assert bias is not None
        if self.conv_shortcut is not None:
            assert self.conv_shortcut.conv.bias is not None
            bias = bias + self.conv_shortcut.conv.bias
        return bias

    def shortcut(self, piece: Tensor) -> Tensor:
        """What the convolutions' result is added to, without a bias."""
        if self.conv_shortcut is None:
            return piece
        return F.conv3d(piece, self.conv_shortcut.conv.weight)

    def forward(self, clip: Clip, walk: Walk, *, measures: bool = False) -> Clip:
        """Pieces [B, C, t, H, W] -> [B, C', t, H, W]; in place where C = C'."""
        first = walk.stream(self.conv1, walk.measure(self.norm1, clip))
        moments, branch = Moments(), Clip()
        residual = Clip(list(clip.pieces) if self.conv_shortcut is None else [])
        for piece in walk.take(clip):
            # its bias is not added: the second norm knows it
            convolved = first(piece, with_bias=False, moments=moments)
            assert convolved is not None
            walk.put(branch, convolved)
            del convolved
            if self.conv_shortcut is not None:
                walk.put(residual, self.shortcut(piece))
            del piece
        del first  # with the frames that it keeps
        affine = walk.affine(self.norm2, moments, self.conv1.conv.bias)
        second, bias = walk.stream(self.conv2, affine), self.bias
        result = Clip(moments=Moments() if measures else None)
        parts = walk.take(branch)
        for piece in walk.take(residual):
            convolved = second(next(parts), with_bias=False)
            assert convolved is not None
            _add(piece, convolved, bias, result.moments)
            del convolved
            walk.put(result, piece)
            del piece
        return result

    def stream(self, frozen: Frozen) -> Callable[[Tensor], Tensor]:
        """The same with known norms, frames by frames: [B, C, t, H, W] -> [B, C', t, H, W]."""
        first = ConvStream(self.conv1, frozen[self.norm1], keeps_copies=True)
        second = ConvStream(self.conv2, frozen[self.norm2], keeps_copies=True)
        bias = self.bias

        def push(frames: Tensor) -> Tensor:
            branch = first(frames, with_bias=False)
            assert branch is not None
            branch = second(branch, with_bias=False)
            assert branch is not None
            residual = self.shortcut(frames)
            kernels.residual_add_(residual, branch, bias)
            return residual

        return push


def _add(piece: Tensor, branch: Tensor, bias: Tensor, moments: Moments | None) -> None:
    """Add to a piece in place; moments take in the sum."""
    if moments is None:
        kernels.residual_add_(piece, branch, bias)
    else:
        moments.take(piece, kernels.residual_add_moments_(piece, branch, bias))


class CausalAttention(nn.Module):
    """Single-head attention in which a token sees its own and earlier frames. Works in place."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=NORM_EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, clip: Clip, walk: Walk) -> Clip:
        """Pieces [B, C, t, h, w] -> one piece [B, C, T, h, w], attention added."""
        scale, shift = (x.flatten(1)[:, None] for x in walk.measure(self.group_norm, clip))
        hidden = _whole(clip)
        tokens = hidden.permute(0, 2, 3, 4, 1).flatten(1, 3)
        normed = torch.addcmul(shift, tokens.to(scale.dtype), scale).to(tokens.dtype)
        query = self.to_q(normed)
        if walk.strips is not None:  # half of what keys and values would be to send
            by_row = torch.unflatten(normed, 1, hidden.shape[2:])
            normed = walk.strips.whole_rows(by_row).flatten(1, 3)
        key, value = self.to_k(normed), self.to_v(normed)
        del normed
        per_frame = key.shape[1] // hidden.shape[2]
        out = frame_causal_attention(query, key, value, per_frame, check=walk.check)
        del query, key, value
        out = self.to_out[0](out).unflatten(1, hidden.shape[2:]).permute(0, 4, 1, 2, 3)
        return Clip([hidden.add_(out)])


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
    prefix that ends with frame t. Where a kernel may write its fp32 scores out, queries are cut so
    that these stay within score_bytes; a row of the softmax is never split, so this is exact.

    Args:
        query: [B, M, D], M = N, or less where these are of a part of each frame.
        key: [B, N, D], N = T * tokens_per_frame, frames in order.
        value: [B, N, D].
        tokens_per_frame: h * w of the latents.
        score_bytes: most bytes of one fp32 score matrix (at least one query row is taken).
        check: called once per frame; may raise to stop.

    Returns:
        [B, M, D].
    """
    out = torch.empty_like(query)
    num_frames = key.shape[1] // tokens_per_frame
    per_frame = query.shape[1] // num_frames
    for frame in range(num_frames):
        check()
        start, stop = frame * per_frame, (frame + 1) * per_frame
        seen = (frame + 1) * tokens_per_frame
        keys, values = key[:, None, :seen], value[:, None, :seen]
        rows = per_frame
        if not _holds_no_scores(query[:, None], keys, values):
            rows = max(1, score_bytes // (4 * query.shape[0] * seen))
        for row in range(start, stop, rows):
            span = slice(row, min(row + rows, stop))
            attended = F.scaled_dot_product_attention(query[:, None, span], keys, values)
            out[:, span] = attended[:, 0]
    return out


def _holds_no_scores(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the GPU's memory-efficient kernel serves, which is slow on a part of a frame."""
    # it takes 32 queries a program: of 97 frames of 544x960 SCORE_BYTES allow 657 at the end, which
    # leave five sixths of an H100 idle
    if not query.is_cuda:
        return False
    wanted = torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, False, False)
    return torch.backends.cuda.can_use_efficient_attention(wanted)


class MidBlock(nn.Module):
    """Resnet, attention, resnet at the lowest resolution."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, groups) for _ in range(2)])
        self.attentions = nn.ModuleList([CausalAttention(channels, groups)])

    def forward(self, clip: Clip, walk: Walk) -> Clip:
        """Pieces [B, C, t, h, w] -> [B, C, t, h, w]."""
        clip = self.resnets[0](clip, walk, measures=True)
        clip = self.attentions[0](clip, walk)
        clip = self.resnets[1](clip, walk, measures=True)
        return clip


class Resample(nn.Module):
    """A convolution that changes the size of the clip."""

    def __init__(
        self, channels: int, stride: Factors = (1, 1, 1), upsample: Factors = (1, 1, 1)
    ) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, stride=stride, upsample=upsample)

    def forward(self, clip: Clip, walk: Walk, *, measures: bool = False) -> Clip:
        """Pieces [B, C, t, H, W] -> [B, C, t', H', W']."""
        result = Clip(moments=Moments() if measures else None)
        for piece in walk.convolve(self.conv, clip, moments=result.moments):
            walk.put(result, piece)
            del piece
        return result

    def stream(self, frozen: Frozen) -> ConvStream:
        """The same, frames by frames; it has no norm."""
        return ConvStream(self.conv, keeps_copies=True)


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

    def forward(self, clip: Clip, walk: Walk) -> Clip:
        """Pieces [B, C, t, H, W] -> [B, C', t', H', W']."""
        return _through([*self.resnets, *self.downsamplers, *self.upsamplers], clip, walk)


def _through(blocks: list[Any], clip: Clip, walk: Walk, *, measures: bool = True) -> Clip:
    """A clip through resnets and steps between resolutions.

    Args:
        blocks: in order.
        clip: what the first reads.
        walk: how.
        measures: whether a norm follows.

    Returns:
        What the last one makes, with its moments where a norm follows.
    """
    for index, block in enumerate(blocks):
        walk.check()
        is_last = index + 1 == len(blocks)
        before_norm = measures if is_last else isinstance(blocks[index + 1], ResnetBlock)
        clip = block(clip, walk, measures=before_norm)
    return clip


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

    def forward(self, video: Tensor, walk: Walk) -> Tensor:
        """[B, 3, F, H, W] -> [B, 32, T, h, w]."""
        return self.from_level(0, _first(self.conv_in, video, walk), walk)

    def from_level(self, level: int, clip: Clip, walk: Walk) -> Tensor:
        """This level and all after it: pieces [B, C, t, H, W] -> [B, 32, T, h, w]."""
        for block in self.down_blocks[level:]:
            clip = block(clip, walk)
        clip = self.mid_block(clip, walk)
        affine = walk.measure(self.conv_norm_out, clip)
        return torch.cat(list(walk.convolve(self.conv_out, clip, affine)), 2)


def _first(layer: CausalConv3d, clip: Tensor, walk: Walk) -> Clip:
    """What the first convolution of a network makes of its input."""
    growth = -(-layer.conv.out_channels // clip.shape[1])
    return Clip(list(walk.convolve(layer, Clip(walk.cut(_laid_out(clip), growth)))))


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

    def forward(self, latents: Tensor, walk: Walk) -> Iterator[Tensor]:
        """[B, 16, T, h, w] -> [B, 3, F, H, W], yielded piece by piece."""
        yield from self.fine(self.coarse(latents, walk), walk)

    def fine(self, coarse: Clip, walk: Walk) -> Iterator[Tensor]:
        """The part at high resolution: what `coarse` returns -> [B, 3, f, H, W], piece by piece."""
        clip, affine = self._features(coarse, walk)
        yield from walk.convolve(self.conv_out, clip, affine)

    def coarse(self, latents: Tensor, walk: Walk) -> Clip:
        """The part at low resolution: pieces [B, C, t, rows, columns]."""
        clip = self.mid_block(_first(self.conv_in, latents, walk), walk)
        blocks = self._blocks
        ends = self._num_coarse == len(blocks) or isinstance(blocks[self._num_coarse], ResnetBlock)
        return _through(blocks[: self._num_coarse], clip, walk, measures=ends)

    def gather(self, sample: Tensor, walk: Walk) -> Frozen:
        """The norms of the part at high resolution, from parts of a clip.

        Args:
            sample: [N, C, t, rows, columns], N parts of what `coarse` returns.
            walk: how.

        Returns:
            What `stream` takes.
        """
        frozen: Frozen = {}
        walk = replace(walk, recorded=frozen, is_one_clip=True)
        self._features(Clip([sample]), walk)
        return frozen

    def stream(self, frozen: Frozen, check: Check) -> Callable[[Tensor], Iterator[Tensor]]:
        """The part at high resolution with known norms, in the memory that a few frames take.

        Args:
            frozen: from `gather`.
            check: called between layers; may raise to stop.

        Returns:
            A function that takes the next frames [1, C, t, rows, columns] of what `coarse` returns
            and yields the frames [1, 3, f, H, W] that they complete.
        """
        streams: list[Any] = [b.stream(frozen) for b in self._blocks[self._num_coarse :]]
        affine = frozen[self.conv_norm_out]
        return partial(
            _push, [*streams, ConvStream(self.conv_out, affine, keeps_copies=True)], check
        )

    @property
    def halo_rows(self) -> int:
        """Rows of what `coarse` returns beside a strip that reach into its pixels.

        With known norms nothing else does. At full size 6, which are 24 rows of pixels.
        """
        rows = self.conv_out.kernel_size // 2
        for block in reversed(self._blocks[self._num_coarse :]):
            if isinstance(block, Resample):
                rows = -(-(rows + 1) // block.conv.upsample[1])
            else:
                rows += 2
        return rows

    @property
    def _blocks(self) -> list[Any]:
        levels: list[Any] = list(self.up_blocks)
        return [block for level in levels for block in (*level.resnets, *level.upsamplers)]

    @property
    def _num_coarse(self) -> int:
        """How many of these are at low resolution: all but those of the last two levels.

        The step between both parts makes pixels, so it is of the part at high resolution.
        """
        levels: list[Any] = list(self.up_blocks)[:-2]
        blocks = sum(len(level.resnets) + len(level.upsamplers) for level in levels)
        return blocks - len(levels[-1].upsamplers) if levels else 0

    def _features(self, clip: Clip, walk: Walk) -> tuple[Clip, Affine]:
        """What the last convolution reads, and its norm."""
        clip = _through(self._blocks[self._num_coarse :], clip, walk)
        return clip, walk.measure(self.conv_norm_out, clip)


def _push(streams: list[Any], check: Check, frames: Tensor) -> Iterator[Tensor]:
    """Put frames through layers one after the other, in single frames where they are enlarged."""
    for index, stream in enumerate(streams):
        check()
        enlarges = isinstance(stream, ConvStream) and stream.layer.upsample != (1, 1, 1)
        if enlarges and frames.shape[2] > 1:
            for frame in torch.split(frames, 1, 2):
                yield from _push(streams[index:], check, frame)
            return
        frames = stream(frames)
    yield frames


class VideoVAE(nn.Module):
    """The whole autoencoder. Inference only; it keeps no state between calls."""

    #: where its weights were read from (weights/load.py)
    source: object = None

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
        hidden = self.encoder(video.to(self.quant_conv.weight), Walk(check))
        moments: Tensor = self.quant_conv(hidden)
        return moments[:, : self.config.latent_channels].contiguous()

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
        return _whole(Clip(list(self.iter_decode(vae_latents, check=check))))

    @torch.no_grad()
    def iter_decode(
        self,
        vae_latents: Tensor,
        *,
        check: Check = never_interrupt,
        strips: Strips | None = None,
    ) -> Iterator[Tensor]:
        """Decode all latents in one pass and yield the frames in order, as soon as they are final.

        Args:
            vae_latents: as for `decode`, on all ranks the same.
            check: called between blocks and pieces; may raise to stop.
            strips: where several ranks decode.

        Yields:
            [B, 3, f, H, W], about -1 to 1, not clamped, in memory [f, H, W, 3]; with strips, the
            rows of this rank's.

        Raises:
            ShapeError: not 5-D, or not the latent channels of this VAE.
        """
        check_latent_shape(vae_latents.shape, self.config.latent_channels)
        latents = self.post_quant_conv(_of_strip(vae_latents, strips).to(self._like))
        with self.folded():
            yield from self.decoder(latents, Walk(check, strips=strips))

    @torch.no_grad()
    def iter_exact(
        self,
        vae_latents: Tensor,
        store: Store,
        piece_elements: int = STORED_PIECE_ELEMENTS,
        *,
        check: Check = never_interrupt,
        strips: Strips | None = None,
    ) -> Iterator[Tensor]:
        """Decode in one pass with the clip between layers in a store, and yield frames in order.

        The layers see the pieces that `iter_decode` shows them, if smaller ones, and norms are
        those of the whole clip: the result is the same. Only the part at high resolution uses the
        store; what is before it is small.

        Args:
            vae_latents: [1, 16, T, h, w]; as for `decode`.
            store: what keeps the pieces; the caller closes it.
            piece_elements: of the largest piece of a clip, at least one frame.
            check: called between blocks and pieces; may raise to stop.
            strips: where several ranks decode.

        Yields:
            As `iter_decode`.

        Raises:
            ShapeError: not 5-D, or not the latent channels of this VAE.
        """
        check_latent_shape(vae_latents.shape, self.config.latent_channels)
        walk = Walk(check, piece_elements=min(piece_elements, SYNCED_PIECE_ELEMENTS), strips=strips)
        latents = self.post_quant_conv(_of_strip(vae_latents, strips).to(self._like))
        with self.folded():
            coarse = self.decoder.coarse(latents, walk)
            walk = replace(walk, piece_elements=piece_elements, store=store)
            yield from self.decoder.fine(coarse, walk)

    @torch.no_grad()
    def iter_synced(
        self, vae_latents: Tensor, strips: int = 1, *, check: Check = never_interrupt
    ) -> Iterator[tuple[int, int, Tensor]]:
        """Decode in the memory that a few frames take, with norms taken from a part of the clip.

        The part at low resolution is exact. The GroupNorms of the last two levels would need the
        whole clip; they get the statistics of `sample_starts`, which stay the same for all frames,
        so there are no seams. With strips, rows are decoded one strip after the other, with the
        rows beside it that it depends on: the result is the same.

        Args:
            vae_latents: [1, 16, T, h, w]; as for `decode`.
            strips: how many.
            check: called between layers; may raise to stop.

        Yields:
            First frame, first row, and [1, 3, f, rows, W], about -1 to 1, not clamped, in memory
            [f, rows, W, 3].

        Raises:
            ShapeError: not 5-D, or not the latent channels of this VAE.
        """
        check_latent_shape(vae_latents.shape, self.config.latent_channels)
        walk = Walk(check, piece_elements=SYNCED_PIECE_ELEMENTS)
        latents = self.post_quant_conv(vae_latents.to(self._like))
        with self.folded():
            coarse = _whole(self.decoder.coarse(latents, walk))
            frames, rows = coarse.shape[2:4]
            starts, length = sample_starts(frames, strips)
            sample = torch.cat([coarse[:, :, start : start + length] for start in starts])
            frozen = self.decoder.gather(_laid_out(sample), walk)
            del sample
            scale = SPATIAL_COMPRESSION * vae_latents.shape[3] // rows
            halo = self.decoder.halo_rows
            for top, bottom in strip_rows(rows, strips):
                above = max(0, top - halo)
                push = self.decoder.stream(frozen, check)
                start = 0
                for index in range(frames):
                    piece = coarse[:, :, index : index + 1, above : min(rows, bottom + halo)]
                    for out in push(_owned(piece)):
                        inner = out[..., (top - above) * scale : (bottom - above) * scale, :]
                        yield start, top * scale, inner
                        start += out.shape[2]

    @property
    def _like(self) -> Tensor:
        """Whose device and dtype latents get."""
        return self.post_quant_conv.weight

    @contextmanager
    def folded(self) -> Iterator[None]:
        """Fold the weights of the upsamplers once for all decodes inside the block.

        They are 4.5 % of the decoder's (62 MB in bf16) and gone afterwards, so that a VAE which is
        moved or cast between runs needs no care.
        """
        layers = [
            layer
            for layer in self.decoder.modules()
            if isinstance(layer, CausalConv3d) and layer.is_folded and layer.folded is None
        ]
        try:
            for layer in layers:
                layer.folded = layer.fold()
            yield
        finally:
            for layer in layers:
                layer.folded = None


def sample_starts(frames: int, strips: int) -> tuple[list[int], int]:
    """The frames at low resolution whose statistics stand for those of all in a synced decode.

    Whole frames of a few moments: a video is alike over time, while its regions differ. (The same
    share of the clip in tiles or in rows costs 5 to 15 dB, see tests/bench/LOG.md.)

    Args:
        frames: at low resolution.
        strips: more than one where memory is short.

    Returns:
        The first frame of each window, and the length of a window.
    """
    length = min(2, frames)
    windows = min(1 if strips > 1 else 2, frames // length)
    return [(2 * i + 1) * (frames - length) // (2 * windows) for i in range(windows)], length


def strip_rows(rows: int, strips: int) -> list[tuple[int, int]]:
    """Where each of some strips of about equal height begins and ends; no more than rows."""
    strips = min(strips, rows)
    edges = [rows * i // strips for i in range(strips + 1)]
    return list(pairwise(edges))


def _of_strip(latents: Tensor, strips: Strips | None) -> Tensor:
    """[B, 16, T, h, w] -> the rows of this rank."""
    return latents if strips is None else latents[:, :, :, strips.rows]


def _owned(piece: Tensor) -> Tensor:
    """A copy with adjacent channels, as layers overwrite what they are given."""
    return torch.empty_like(piece, memory_format=_LAYOUT).copy_(piece)


def _laid_out(clip: Tensor) -> Tensor:
    """The clip with adjacent channels."""
    return clip.contiguous(memory_format=_LAYOUT)


def _whole(clip: Clip) -> Tensor:
    """All pieces as one in their layout, taken off the clip; each is freed once it is copied."""
    pieces: Pieces = clip.pieces
    if len(pieces) == 1:
        return pieces.pop()
    batch, channels, _, height, width = pieces[0].shape
    shape = (batch, channels, sum(piece.shape[2] for piece in pieces), height, width)
    like = pieces[0]
    out = torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=_LAYOUT)
    del like
    start = 0
    for piece in consume(pieces):
        out[:, :, start : start + piece.shape[2]] = piece
        start += piece.shape[2]
    return out


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
