"""The peak memory of a decode or encode, and its operations, predicted from shapes alone.

The peak adds up what is alive at the first resnet and the upsampler of each level and in the
attention: whole clips, and the piece being worked on. Tests compare it with the storages that
model.py allocates on shape-only tensors; MEMORY_MARGIN covers what those do not show.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..config import SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION, VAEConfig
from . import model as vae_model
from .passes import Follower
from .store import CHUNK_BYTES

#: covers convolution workspaces and the allocator's rounding
MEMORY_MARGIN = 1.25
#: frames that a synced decode works on at once, at most
_STREAMED_FRAMES = 2
#: frames of the first level's activations alive at the peak of `encode_streamed`, counted on
#: shape-only tensors: two for each of five convolutions, and the work on two frames
_STREAMED_ENCODE_FRAMES = 22


class _Clip(NamedTuple):
    """Numbers of a clip in a layer."""

    batch: int
    frames: int
    height: int
    width: int

    @property
    def pixels(self) -> int:
        return self.batch * self.frames * self.height * self.width

    def enlarged(self, factors: tuple[int, int, int]) -> "_Clip":
        return _Clip(
            self.batch,
            (self.frames - 1) * factors[0] + 1,
            self.height * factors[1],
            self.width * factors[2],
        )


class _Level(NamedTuple):
    """One level of the decoder: channels before and in it, and by what it enlarges."""

    before: int
    channels: int
    factors: tuple[int, int, int]


class _Split(NamedTuple):
    """The parts of a synced decode: its levels at low and at high resolution.

    Attributes:
        low: those up to the step to high resolution, which is of the other part.
        high: the others; the first may stand for that step alone.
        starts_with_step: whether it does.
        coarse: the clip between both.
    """

    low: list[_Level]
    high: list[_Level]
    starts_with_step: bool
    coarse: _Clip


def decode_bytes(config: VAEConfig, latent_shape: torch.Size, dtype: torch.dtype) -> int:
    """Estimate the peak bytes of one VideoVAE.decode call, beside the weights.

    Args:
        config: of the VAE.
        latent_shape: [B, 16, T, h, w] of the latents in that call; see `largest_tile`.
        dtype: the compute dtype.

    Returns:
        Bytes, MEMORY_MARGIN included.
    """
    clip = _clip_of(latent_shape)
    levels = _levels(config)
    piece = vae_model.PIECE_ELEMENTS
    elements = max(_level_elements(levels, clip, piece), default=0)
    peak = max(_middle_bytes(config, clip, dtype), elements * dtype.itemsize)
    return int((peak + folded_bytes(config, dtype)) * MEMORY_MARGIN)


def synced_bytes(
    config: VAEConfig, latent_shape: torch.Size, dtype: torch.dtype, strips: int
) -> int:
    """Estimate the peak bytes of VideoVAE.iter_synced, beside the weights.

    Args:
        config: of the VAE.
        latent_shape: [1, 16, T, h, w].
        dtype: the compute dtype.
        strips: in how many the rows are decoded.

    Returns:
        Bytes, MEMORY_MARGIN included.
    """
    latents = _clip_of(latent_shape)
    low, high, is_step, coarse = _split(config, latents)
    piece = vae_model.SYNCED_PIECE_ELEMENTS
    elements = max(_level_elements(low, latents, piece), default=0)
    peak = max(_middle_bytes(config, latents, dtype), elements * dtype.itemsize)
    kept = high[0].before * coarse.pixels
    peak = max(peak, 2 * kept * dtype.itemsize)
    starts, length = vae_model.sample_starts(coarse.frames, strips)
    sample = coarse._replace(batch=len(starts), frames=length)
    gathered = kept + max(_level_elements(high, sample, piece, starts_with_step=is_step))
    top, bottom = max(
        vae_model.strip_rows(coarse.height, strips), key=lambda strip: strip[1] - strip[0]
    )
    halo = _halo_rows(config, high, is_step)
    strip = coarse._replace(frames=1, height=min(coarse.height, bottom - top + 2 * halo))
    streamed = kept + _stream_elements(config, high, strip, starts_with_step=is_step)
    peak = max(peak, max(gathered, streamed) * dtype.itemsize)
    return int((peak + folded_bytes(config, dtype)) * MEMORY_MARGIN)


def exact_bytes(
    config: VAEConfig, latent_shape: torch.Size, dtype: torch.dtype, piece_elements: int
) -> int:
    """Estimate the peak bytes of VideoVAE.iter_exact on the device, beside the weights.

    Args:
        config: of the VAE.
        latent_shape: [1, 16, T, h, w].
        dtype: the compute dtype.
        piece_elements: of the largest piece of a clip.

    Returns:
        Bytes, MEMORY_MARGIN included.
    """
    latents = _clip_of(latent_shape)
    piece = min(piece_elements, vae_model.SYNCED_PIECE_ELEMENTS)
    elements = max(_level_elements(_split(config, latents).low, latents, piece), default=0)
    elements = max(elements, _followed(config, latents, piece_elements).most)
    # of the attention where no kernel is fused: the clip, q, k, v and out, and wide copies of k, v
    # and the scaled k, of which the last is gone when the scores become a softmax; and of a few
    # rows of q and of the result
    wide = torch.promote_types(dtype, torch.float32).itemsize
    width, frame = config.block_out_channels[-1], latents.height * latents.width
    rows = min(frame, max(1, vae_model.SCORE_BYTES // (4 * latents.pixels)))
    scores = 4 * rows * latents.pixels
    clip = width * latents.pixels
    middle = clip * (5 * dtype.itemsize + 2 * wide) + max(clip * wide + scores, 2 * scores)
    middle += 3 * rows * width * wide
    peak = max(middle, elements * dtype.itemsize)
    return int((peak + folded_bytes(config, dtype)) * MEMORY_MARGIN)


def middle_bytes(config: VAEConfig, latent_shape: torch.Size, dtype: torch.dtype) -> int:
    """Estimate the peak bytes of a decode's attention, which sees all rows on every rank.

    Args:
        config: of the VAE.
        latent_shape: [1, 16, T, h, w].
        dtype: the compute dtype.

    Returns:
        Bytes, MEMORY_MARGIN included.
    """
    middle = _middle_bytes(config, _clip_of(latent_shape), dtype)
    return int((middle + folded_bytes(config, dtype)) * MEMORY_MARGIN)


def exact_seconds(
    config: VAEConfig,
    latent_shape: torch.Size,
    dtype: torch.dtype,
    piece_elements: int,
    *,
    flop_per_s: float,
    bytes_per_s: float,
) -> float:
    """Time of VideoVAE.iter_exact, whose pieces go both ways over a link beside the computation.

    A layer's way through the clip takes as long as the slowest of three: its convolutions, the
    copies to the device and those to main memory.

    Args:
        config: of the VAE.
        latent_shape: [1, 16, T, h, w].
        dtype: the compute dtype.
        piece_elements: of the largest piece of a clip.
        flop_per_s: of convolutions.
        bytes_per_s: of the link, in each direction.

    Returns:
        Seconds.
    """
    latents = _clip_of(latent_shape)
    low = _split(config, latents).low
    products = _first_products(config, latents) + _level_products(config, low, latents)[0]
    seconds = 2.0 * products / flop_per_s
    for each in _followed(config, latents, piece_elements).passes:
        copied = max(each.coming, each.leaving) * dtype.itemsize / bytes_per_s
        seconds += max(2.0 * each.products / flop_per_s, copied)
    return seconds


def stored_bytes(
    config: VAEConfig, latent_shape: torch.Size, dtype: torch.dtype, piece_elements: int
) -> int:
    """Most bytes of the main memory that VideoVAE.iter_exact keeps pieces in.

    Args:
        config: of the VAE.
        latent_shape: [1, 16, T, h, w].
        dtype: the compute dtype.
        piece_elements: of the largest piece of a clip.

    Returns:
        Bytes, of whole chunks.
    """
    _, high, is_step, clip = _split(config, _clip_of(latent_shape))
    step, read, most = clip.frames, 0, 0
    for index, (before, channels, factors) in enumerate(high):
        if not (is_step and index == 0):
            step = min(step, max(1, piece_elements * clip.frames // (before * clip.pixels)))
            # two clips of the level's width, or the one it reads while that leaves
            most = max(most, read, 2 * _chunk_bytes(channels, clip, step, dtype))
        if factors != (1, 1, 1):
            clip = clip.enlarged(factors)
            step = max(1, piece_elements * clip.frames // (channels * clip.pixels))
        read = _chunk_bytes(channels, clip, min(step, clip.frames), dtype)
        most = max(most, read)
    return most


def _chunk_bytes(channels: int, clip: _Clip, step: int, dtype: torch.dtype) -> int:
    """Bytes of the chunks for a clip in pieces of some frames, of which the first may be one."""
    frame = channels * clip.pixels // clip.frames * dtype.itemsize
    pieces, rest = divmod(clip.frames - 1, step)
    chunks = [-(-frame * frames // CHUNK_BYTES) for frames in (1, step, rest)]
    return (chunks[0] + pieces * chunks[1] + chunks[2]) * CHUNK_BYTES


def encode_bytes(config: VAEConfig, video_shape: torch.Size, dtype: torch.dtype) -> int:
    """Estimate the peak bytes of one VideoVAE.encode call, beside weights and video.

    It lies in the resnets at full resolution, which hold a clip, their branch and a piece of work;
    or, of a single small frame, in the attention.

    Args:
        config: of the VAE.
        video_shape: [B, 3, F, H, W] of the clip.
        dtype: the compute dtype.

    Returns:
        Bytes, MEMORY_MARGIN included.
    """
    clip, channels = _clip_of(video_shape), config.block_out_channels[0]
    frame = channels * clip.pixels // clip.frames
    step = min(clip.frames, max(1, vae_model.PIECE_ELEMENTS // frame))
    elements = frame * (2 * clip.frames + step) + _padded(channels, clip) * (step + 2)
    middle = _middle_bytes(config, _encoded(clip), dtype)
    return int(max(middle, elements * dtype.itemsize) * MEMORY_MARGIN)


def streamed_bytes(config: VAEConfig, video_shape: torch.Size, dtype: torch.dtype) -> int:
    """Estimate the peak bytes of one encode.encode_streamed call, beside weights and video.

    Args:
        config: of the VAE.
        video_shape: [B, 3, F, H, W] of the clip.
        dtype: the compute dtype.

    Returns:
        Bytes, MEMORY_MARGIN included.
    """
    clip = _clip_of(video_shape)
    first, third = config.block_out_channels[0], config.block_out_channels[2]
    frame = clip.pixels // clip.frames
    # what the second level reads; later the clip and the branch of the third
    kept = max(first * clip.frames // 4, 2 * third * (clip.frames // 2 + 1) // 16) * frame
    elements = _STREAMED_ENCODE_FRAMES * first * frame + kept
    middle = _middle_bytes(config, _encoded(clip), dtype)
    return int(max(middle, elements * dtype.itemsize) * MEMORY_MARGIN)


def _encoded(clip: _Clip) -> _Clip:
    """A clip of pixels as the latents have it."""
    frames = (clip.frames - 1) // TEMPORAL_COMPRESSION + 1
    height, width = clip.height // SPATIAL_COMPRESSION, clip.width // SPATIAL_COMPRESSION
    return _Clip(clip.batch, frames, height, width)


def decode_flop(config: VAEConfig, latent_shape: torch.Size) -> float:
    """Operations of the convolutions of one VideoVAE.decode call.

    Args:
        config: of the VAE.
        latent_shape: [B, 16, T, h, w] of the latents in that call; see `largest_tile`.

    Returns:
        FLOP; attention in the middle, a twentieth more, is left out.
    """
    latents = _clip_of(latent_shape)
    products, clip = _level_products(config, _levels(config), latents)
    products += _first_products(config, latents) + _last_products(config, clip)
    return 2.0 * products


def synced_flop(config: VAEConfig, latent_shape: torch.Size, strips: int) -> float:
    """Operations of the convolutions of VideoVAE.iter_synced: of the sample and of all strips too.

    Args:
        config: of the VAE.
        latent_shape: [1, 16, T, h, w].
        strips: in how many the rows are decoded.

    Returns:
        FLOP, as of `decode_flop`.
    """
    latents = _clip_of(latent_shape)
    low, high, is_step, coarse = _split(config, latents)
    products = _first_products(config, latents) + _level_products(config, low, latents)[0]
    starts, length = vae_model.sample_starts(coarse.frames, strips)
    sample = coarse._replace(batch=len(starts), frames=length)
    products += _level_products(config, high, sample, starts_with_step=is_step)[0]
    halo = _halo_rows(config, high, is_step)
    for top, bottom in vae_model.strip_rows(coarse.height, strips):
        rows = min(coarse.height, bottom + halo) - max(0, top - halo)
        strip = coarse._replace(height=rows)
        of_strip, clip = _level_products(config, high, strip, starts_with_step=is_step)
        products += of_strip + _last_products(config, clip)
    return 2.0 * products


def folded_bytes(config: VAEConfig, dtype: torch.dtype) -> int:
    """Bytes of the weights that `VideoVAE.folded` makes for a run: 62 MB in bf16."""
    total = 0
    for level in _levels(config):
        if level.factors[1] > 1:
            total += level.channels**2 * _folded_taps(level.factors)
    return total * dtype.itemsize


def _clip_of(shape: torch.Size) -> _Clip:
    return _Clip(shape[0], *shape[2:])


def _levels(config: VAEConfig) -> list[_Level]:
    channels = config.block_out_channels[::-1]
    return [
        _Level(channels[max(i - 1, 0)], width, vae_model.level_factors(i, len(channels)))
        for i, width in enumerate(channels)
    ]


def _split(config: VAEConfig, latents: _Clip) -> _Split:
    levels = _levels(config)
    count = max(0, len(levels) - 2)
    low, high = levels[:count], levels[count:]
    if low:
        step = low[-1]
        low[-1] = step._replace(factors=(1, 1, 1))
        high = [_Level(step.channels, step.channels, step.factors), *high]
    coarse = latents
    for level in low:
        coarse = coarse.enlarged(level.factors)
    return _Split(low, high, bool(low), coarse)


def _folded_taps(factors: tuple[int, int, int]) -> int:
    """Copies of a pixel times taps of each: both are two along an enlarged axis."""
    return math.prod(4 if factor > 1 else 3 for factor in factors)


def _first_products(config: VAEConfig, latents: _Clip) -> int:
    """Multiplications of the first convolution and those in the middle."""
    wide = config.block_out_channels[-1]
    return 27 * (config.latent_channels * wide + 4 * wide**2) * latents.pixels


def _last_products(config: VAEConfig, clip: _Clip) -> int:
    return 27 * config.block_out_channels[0] * config.out_channels * clip.pixels


def _level_products(
    config: VAEConfig, levels: list[_Level], clip: _Clip, *, starts_with_step: bool = False
) -> tuple[int, _Clip]:
    """Multiplications of the convolutions of some levels, and the clip that these make."""
    products = 0
    for index, (before, channels, factors) in enumerate(levels):
        if not (starts_with_step and index == 0):
            inner = before * channels + channels**2 * (2 * config.layers_per_block + 1)
            shortcut = before * channels if before != channels else 0
            products += (27 * inner + shortcut) * clip.pixels
        enlarged = clip.enlarged(factors)
        if factors[1] > 1:  # folded; the copies are computed on one row and column more
            edged = clip._replace(height=clip.height + 1, width=clip.width + 1)
            products += _folded_taps(factors) * channels**2 * edged.pixels
        elif factors[0] > 1:
            products += 27 * channels**2 * enlarged.pixels
        clip = enlarged
    return products, clip


def _middle_bytes(config: VAEConfig, clip: _Clip, dtype: torch.dtype) -> int:
    """Of the attention: the clip, and its norm with wide copies or q, k, v, out and scores."""
    item, wide = dtype.itemsize, torch.promote_types(dtype, torch.float32).itemsize
    tokens = config.block_out_channels[-1] * clip.pixels
    scores = 4 * clip.batch * (clip.height * clip.width) ** 2 * clip.frames
    scores = min(vae_model.SCORE_BYTES, scores)  # written thrice where no kernel is fused
    return tokens * item + max(tokens * (2 * wide + item), 4 * tokens * item + 3 * scores)


def _level_elements(
    levels: list[_Level], clip: _Clip, piece: int, *, starts_with_step: bool = False
) -> Iterator[int]:
    """Elements alive where a level needs most, breadth-first; the first may be its step alone."""
    for index, (before, channels, factors) in enumerate(levels):
        inputs, outputs = before * clip.pixels, channels * clip.pixels
        if not (starts_with_step and index == 0):
            into, of = (_piece_elements(c, clip, piece) for c in (before, channels))
            yield max(max(inputs, outputs) + into, 2 * outputs + of)
            if before == channels:
                yield inputs + outputs + into
        if factors != (1, 1, 1):
            clip = clip.enlarged(factors)
            enlarged = channels * clip.pixels
            yield outputs + enlarged + min(enlarged, max(piece, enlarged // clip.frames)) // 2


def _piece_elements(channels: int, clip: _Clip, piece: int) -> int:
    """Elements of one convolution's temporaries: a padded piece, the one before, the result."""
    frame = channels * clip.pixels // clip.frames
    step = min(clip.frames, max(1, piece // frame))
    following = min(step, clip.frames - step)
    padded = _padded(channels, clip)
    first = padded * (step + 2) + frame * step
    if not following:
        return first
    return max(first, padded * (step + 2 + following + 2) + frame * following)


def _padded(channels: int, clip: _Clip) -> int:
    return channels * clip.batch * (clip.height + 2) * (clip.width + 2)


def _followed(config: VAEConfig, latents: _Clip, piece_elements: int) -> Follower:
    """The part of an exact decode at high resolution, which keeps its clip in main memory."""
    _, high, is_step, clip = _split(config, latents)
    follower = Follower(piece_elements)
    frame = high[0].before * clip.pixels // clip.frames
    step = max(1, min(piece_elements, vae_model.SYNCED_PIECE_ELEMENTS) // frame)
    pieces = follower.begin(clip.frames, frame, step)
    for index, (before, channels, factors) in enumerate(high):
        into, of = (width * clip.pixels // clip.frames for width in (before, channels))
        wide, padded = _padded(before, clip), _padded(channels, clip)
        square = 27 * channels**2 * clip.pixels
        if not (is_step and index == 0):
            first = (27 * channels + (channels if before != channels else 0)) * before * clip.pixels
            pieces = follower.resnet(pieces, (into, of), (wide, padded), (first, square))
            for _ in range(config.layers_per_block):
                pieces = follower.resnet(pieces, (of, of), (padded, padded), (square, square))
        if factors != (1, 1, 1):
            small, clip = clip, clip.enlarged(factors)
            large = channels * clip.pixels // clip.frames
            if factors[1] > 1:
                edged = small._replace(frames=1, height=small.height + 1, width=small.width + 1)
                copies = math.prod(factors) * channels * edged.pixels
                products = _folded_taps(factors) * channels**2 * edged.pixels * small.frames
            else:
                copies = factors[0] * of
                products = 27 * channels**2 * clip.pixels
            sizes = ((of, large), padded, copies)
            pieces = follower.enlarge(pieces, *sizes, factors, products)
    of = channels * clip.pixels // clip.frames
    made = config.out_channels * clip.pixels // clip.frames
    follower.last(pieces, (of, made), _padded(channels, clip), _last_products(config, clip))
    return follower


def _halo_rows(config: VAEConfig, levels: list[_Level], starts_with_step: bool) -> int:
    """As `Decoder.halo_rows`."""
    rows = 1
    for index, level in reversed(list(enumerate(levels))):
        if level.factors != (1, 1, 1):
            rows = -(-(rows + 1) // level.factors[1])
        if not (starts_with_step and index == 0):
            rows += 2 * (config.layers_per_block + 1)
    return rows


def _stream_elements(
    config: VAEConfig, levels: list[_Level], clip: _Clip, *, starts_with_step: bool
) -> int:
    """Elements alive in a depth-first decode: the frames every convolution keeps, and the work."""
    kept, work = 0, 0
    for index, (before, channels, factors) in enumerate(levels):
        frames = 1 if index == 0 else _STREAMED_FRAMES
        if not (starts_with_step and index == 0):
            into, of = _padded(before, clip), _padded(channels, clip)
            kept += 2 * into + 2 * of * (2 * config.layers_per_block + 1)
            # the frames, padded, kept anew, convolved, and the residual
            work = max(work, into * (frames + (frames + 2)) + 2 * of * frames)
        if factors != (1, 1, 1):
            kept += (1 if factors[0] > 1 else 2) * _padded(channels, clip)
            clip = clip.enlarged(factors)
            work = max(work, 2 * _STREAMED_FRAMES * _padded(channels, clip))
    return kept + 2 * _padded(levels[-1].channels, clip) + work
