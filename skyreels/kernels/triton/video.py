"""The video VAE's operators of reference.py in Triton, for clips whose channels are adjacent.

A tile is a few neighbouring pixels with all their channels, so that every load and store is of
adjacent numbers. Where a pixel lies outside of the frame its neighbour is read, which the cache
has. Numbers of frames and pixels are not specialised on: a clip has pieces of several lengths.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import launch, narrow

#: elements of a tile, of which each thread of four warps holds 32
TILE = 4096
WARPS = 4
#: tiles that one program of the moments reads
MOMENT_TILES = 32
_SIZES = ["front", "height", "width", "size", "first"]


@triton.jit(do_not_specialize=_SIZES)
def _norm_silu_pad_kernel(
    x,
    scale,
    shift,
    out,
    x_batch,
    out_batch,
    front,
    height,
    width,
    side: tl.constexpr,
    channels: tl.constexpr,
    block: tl.constexpr,
    pixels: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    rows, columns = height + 2 * side, width + 2 * side
    parts = (columns + pixels - 1) // pixels
    row = tl.program_id(0) // parts
    column = (tl.program_id(0) % parts) * pixels + tl.arange(0, pixels)
    channel = tl.arange(0, block)
    inside = (column < columns)[:, None] & (channel < channels)[None]
    frame = tl.maximum(row // rows - front, 0).to(tl.int64)
    source_row = tl.minimum(tl.maximum(row % rows - side, 0), height - 1)
    source_column = tl.minimum(tl.maximum(column - side, 0), width - 1)
    source = x + batch * x_batch + (frame * height + source_row) * width * channels
    at = source_column[:, None] * channels + channel[None]
    values = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
    if scale is not None:
        known = channel < channels
        factor = tl.load(scale + batch * channels + channel, mask=known, other=0.0)
        addend = tl.load(shift + batch * channels + channel, mask=known, other=0.0)
        values = values * factor[None] + addend[None]
        values = values / (1.0 + tl.exp2(-1.4426950408889634 * values))
    target = out + batch * out_batch + row.to(tl.int64) * columns * channels
    at = column[:, None] * channels + channel[None]
    tl.store(target + at, narrow(values, out.dtype.element_ty), mask=inside)


@triton.jit
def _store_moments(mean, spread, pivot, sums, squares, count, known):
    """Store mean and summed squared deviation of each channel of a run of `count` pixels.

    sums, squares: [pixels, channels] of the deviations from the pivot, and of their squares.
    """
    offset = tl.sum(sums, axis=0) / count.to(tl.float32)
    tl.store(mean, pivot + offset, mask=known)
    tl.store(spread, tl.sum(squares, axis=0) - offset * offset * count.to(tl.float32), mask=known)


@triton.jit(do_not_specialize=_SIZES)
def _channel_moments_kernel(
    x,
    mean,
    spread,
    x_batch,
    size,
    channels: tl.constexpr,
    block: tl.constexpr,
    pixels: tl.constexpr,
    steps: tl.constexpr,
):
    run, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    first = run * pixels * steps
    channel = tl.arange(0, block)
    known = channel < channels
    source = x + batch * x_batch + first * channels
    # deviations from the run's first pixel: a mean far from zero would cancel the digits of squares
    pivot = tl.load(source + channel, mask=known, other=0.0).to(tl.float32)
    sums = tl.zeros((pixels, block), tl.float32)
    squares = tl.zeros((pixels, block), tl.float32)
    for step in range(steps):
        pixel = step * pixels + tl.arange(0, pixels)
        inside = (first + pixel < size)[:, None] & known[None]
        at = pixel[:, None] * channels + channel[None]
        values = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
        values = tl.where(inside, values - pivot[None], 0.0)
        sums += values
        squares += values * values
    count = tl.minimum(size - first, pixels * steps)
    at = (batch * tl.num_programs(0) + run) * channels + channel
    _store_moments(mean + at, spread + at, pivot, sums, squares, count, known)


@triton.jit(do_not_specialize=_SIZES)
def _residual_add_kernel(
    x,
    branch,
    bias,
    mean,
    spread,
    x_batch,
    branch_batch,
    size,
    channels: tl.constexpr,
    block: tl.constexpr,
    pixels: tl.constexpr,
    steps: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * pixels * steps
    channel = tl.arange(0, block)
    known = channel < channels
    constant = tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)
    target = x + batch * x_batch + first * channels
    source = branch + batch * branch_batch + first * channels
    pivot = tl.zeros((block,), tl.float32)
    if mean is not None:
        # deviations from about the first pixel of the sum, see the kernel of the moments
        pivot = tl.load(target + channel, mask=known, other=0.0).to(tl.float32)
        pivot += tl.load(source + channel, mask=known, other=0.0).to(tl.float32) + constant
        tl.debug_barrier()  # no thread overwrites it before all have read it
    sums = tl.zeros((pixels, block), tl.float32)
    squares = tl.zeros((pixels, block), tl.float32)
    for step in range(steps):
        pixel = step * pixels + tl.arange(0, pixels)
        inside = (first + pixel < size)[:, None] & known[None]
        at = pixel[:, None] * channels + channel[None]
        values = tl.load(target + at, mask=inside, other=0.0).to(tl.float32)
        addend = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
        rounded = narrow((addend + constant[None]) + values, x.dtype.element_ty)
        tl.store(target + at, rounded, mask=inside)
        if mean is not None:
            values = tl.where(inside, rounded.to(tl.float32) - pivot[None], 0.0)
            sums += values
            squares += values * values
    if mean is not None:
        count = tl.minimum(size - first, pixels * steps)
        at = (batch * tl.num_programs(0) + tl.program_id(0)) * channels + channel
        _store_moments(mean + at, spread + at, pivot, sums, squares, count, known)


@triton.jit(do_not_specialize=_SIZES)
def _interleave_kernel(
    x,
    bias,
    out,
    mean,
    spread,
    x_batch,
    out_batch,
    first,
    height,
    width,
    times: tl.constexpr,
    channels: tl.constexpr,
    block: tl.constexpr,
    pixels: tl.constexpr,
    steps: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    columns = 2 * width
    parts = (columns + pixels * steps - 1) // (pixels * steps)
    row = tl.program_id(0) // parts
    start = (tl.program_id(0) % parts) * pixels * steps
    channel = tl.arange(0, block)
    known = channel < channels
    constant = tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)
    frame, y = row // (2 * height) + first, row % (2 * height)
    copy = (frame % times) * 4 + (y % 2) * 2
    source_row = ((frame // times).to(tl.int64) * (height + 1) + y // 2 + y % 2) * (width + 1)
    source = x + batch * x_batch + (source_row * (4 * times) + copy) * channels
    target = out + batch * out_batch + row.to(tl.int64) * columns * channels
    pivot = tl.zeros((block,), tl.float32)
    if mean is not None:
        # deviations from about the first pixel, see the kernel of the moments; `start` is even
        nearest = (start // 2) * (4 * times) * channels + channel
        pivot = tl.load(source + nearest, mask=known, other=0.0).to(tl.float32) + constant
    sums = tl.zeros((pixels, block), tl.float32)
    squares = tl.zeros((pixels, block), tl.float32)
    for step in range(steps):
        column = start + step * pixels + tl.arange(0, pixels)
        inside = (column < columns)[:, None] & known[None]
        pixel = (column // 2 + column % 2) * (4 * times) + column % 2
        at = pixel[:, None] * channels + channel[None]
        values = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
        rounded = narrow(values + constant[None], out.dtype.element_ty)
        at = column[:, None] * channels + channel[None]
        tl.store(target + at, rounded, mask=inside)
        if mean is not None:
            values = tl.where(inside, rounded.to(tl.float32) - pivot[None], 0.0)
            sums += values
            squares += values * values
    if mean is not None:
        count = tl.minimum(columns - start, pixels * steps)
        at = (batch * tl.num_programs(0) + tl.program_id(0)) * channels + channel
        _store_moments(mean + at, spread + at, pivot, sums, squares, count, known)


def _tile(channels: int) -> dict[str, int]:
    """Shape of a tile."""
    block = triton.next_power_of_2(channels)
    return {"channels": channels, "block": block, "pixels": max(1, TILE // block)}


def _channels_last(x: Tensor) -> Tensor:
    """The clip with adjacent channels and dense frames, or a copy that has them."""
    return x if is_channels_last(x) else x.contiguous(memory_format=torch.channels_last_3d)


def is_channels_last(x: Tensor) -> bool:
    """Whether a clip [B, C, T, H, W] is [B][T, H, W, C] in memory, T to C without gaps."""
    _, channels, _, height, width = x.shape
    strides = (1, height * width * channels, width * channels, channels)
    return all(
        size == 1 or stride == expected
        for size, stride, expected in zip(x.shape[1:], x.stride()[1:], strides, strict=True)
    )


def norm_silu_pad_(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, out: Tensor, front: int
) -> None:
    """`reference.norm_silu_pad_`; `out` has adjacent channels."""
    x = _channels_last(x)
    batch, channels, _, height, width = x.shape
    tile: Any = _tile(channels)
    parts = triton.cdiv(out.shape[4], tile["pixels"])
    launch(
        _norm_silu_pad_kernel,
        (out.shape[2] * out.shape[3] * parts, batch),
        x,
        None if scale is None else scale.float().contiguous(),
        None if shift is None else shift.float().contiguous(),
        out,
        x.stride(0),
        out.stride(0),
        front,
        height,
        width,
        side=(out.shape[4] - width) // 2,
        num_warps=WARPS,
        **tile,
    )


class _Runs:
    """Moments of runs of neighbouring pixels, one run a program, which are merged in float64.

    Args:
        clip: that the runs are of, [B, C, T, H, W].
        length: pixels after which a run ends early: the clip's, or those of a row.
        pixels: of a tile; MOMENT_TILES of these are a run.
    """

    def __init__(self, clip: Tensor, length: int, pixels: int) -> None:
        self._size, self._length, self._run = clip[0, 0].numel(), length, pixels * MOMENT_TILES
        self.count = self._size // length * triton.cdiv(length, self._run)
        shape = (clip.shape[0], self.count, clip.shape[1])
        self.means = torch.empty(shape, dtype=torch.float32, device=clip.device)
        self.spreads = torch.empty_like(self.means)

    def merged(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of the clip's channels, twice [B, C] (Chan et al.)."""
        start = torch.arange(0, self._length, self._run, device=self.means.device)
        counts = (self._length - start).clamp_(max=self._run).double()
        shares = (counts / self._size).repeat(self._size // self._length)[:, None]
        wide = self.means.double()
        mean = (wide * shares).sum(1)
        between = (wide - mean[:, None]).square_().mul_(shares).sum(1)
        return mean, self.spreads.sum(1, dtype=torch.float64).div_(self._size).add_(between)


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.channel_moments`; runs of pixels are merged in float64."""
    x = _channels_last(x)
    batch, channels = x.shape[:2]
    size = x[0, 0].numel()
    tile: Any = _tile(channels)
    runs = _Runs(x, size, tile["pixels"])
    launch(
        _channel_moments_kernel,
        (runs.count, batch),
        x,
        runs.means,
        runs.spreads,
        x.stride(0),
        size,
        steps=MOMENT_TILES,
        num_warps=WARPS,
        **tile,
    )
    return runs.merged()


def residual_add_(x: Tensor, branch: Tensor, bias: Tensor) -> None:
    """`reference.residual_add_`; x has adjacent channels."""
    _residual_add(x, branch, bias, None)


def residual_add_moments_(x: Tensor, branch: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.residual_add_moments_`; x has adjacent channels."""
    runs = _Runs(x, x[0, 0].numel(), _tile(x.shape[1])["pixels"])
    _residual_add(x, branch, bias, runs)
    return runs.merged()


def _residual_add(x: Tensor, branch: Tensor, bias: Tensor, runs: _Runs | None) -> None:
    branch = _channels_last(branch)
    batch, channels = x.shape[:2]
    size = x[0, 0].numel()
    tile: Any = _tile(channels)
    launch(
        _residual_add_kernel,
        (triton.cdiv(size, tile["pixels"]) if runs is None else runs.count, batch),
        x,
        branch,
        bias.contiguous(),
        None if runs is None else runs.means,
        None if runs is None else runs.spreads,
        x.stride(0),
        branch.stride(0),
        size,
        steps=1 if runs is None else MOMENT_TILES,
        num_warps=WARPS,
        **tile,
    )


def interleave_(x: Tensor, bias: Tensor, out: Tensor) -> None:
    """`reference.interleave_`; `out` has adjacent channels."""
    _interleave(x, bias, out, None)


def interleave_moments_(x: Tensor, bias: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.interleave_moments_`; `out` has adjacent channels."""
    runs = _Runs(out, out.shape[4], _tile(out.shape[1])["pixels"])
    _interleave(x, bias, out, runs)
    return runs.merged()


def _interleave(x: Tensor, bias: Tensor, out: Tensor, runs: _Runs | None) -> None:
    x = _channels_last(x)
    batch, channels, frames, rows, columns = out.shape
    times = x.shape[1] // channels // 4
    tile: Any = _tile(channels)
    programs = frames * rows * triton.cdiv(columns, tile["pixels"])
    launch(
        _interleave_kernel,
        (programs if runs is None else runs.count, batch),
        x,
        bias.contiguous(),
        out,
        None if runs is None else runs.means,
        None if runs is None else runs.spreads,
        x.stride(0),
        out.stride(0),
        times * x.shape[2] - frames,
        rows // 2,
        columns // 2,
        times=times,
        steps=1 if runs is None else MOMENT_TILES,
        num_warps=WARPS,
        **tile,
    )
