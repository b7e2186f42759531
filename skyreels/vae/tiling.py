"""Decode a clip in windows of time and tiles of space, and choose them from the free memory.

Window i starts at latent i * stride and decodes tile / 4 + 1 latents: the first is context, and
the frame it decodes to is dropped for i > 0. Tiles start at every multiple of the stride. Where two
overlap, a linear ramp leads from the earlier to the later one. Blends are fp32 `torch.lerp`s, so
wherever both sides agree the result is exactly that value.

Every window is decoded alone: causal padding and GroupNorm statistics start afresh. Seams in time
are therefore the visible ones, and whole-time spatial tiles come before windows in `choose_decode`.

Source: the geometry is diffusers 0.42.1 models/autoencoders/autoencoder_kl_hunyuan_video.py and
Tencent/HunyuanVideo hyvideo/vae/autoencoder_kl_causal_3d.py, which share it.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from ..config import (
    DECODE_MODES,
    SPATIAL_COMPRESSION,
    TEMPORAL_COMPRESSION,
    TILINGS,
    Tiling,
    VAEConfig,
)
from ..errors import OptionError, OutOfRoomError, ShapeError
from ..runtime import FREE_HOST_BYTES, Runtime, free_host_bytes, outcomes
from ..runtime.collectives import least_of, shares
from ..runtime.ladder import descending, is_out_of_memory, release
from ..runtime.offload import on_device
from .budget import (
    MEMORY_MARGIN,
    decode_bytes,
    decode_flop,
    exact_bytes,
    exact_seconds,
    middle_bytes,
    stored_bytes,
    synced_bytes,
    synced_flop,
)
from .frames import FrameSink, FrameWriter
from .model import STORED_PIECE_ELEMENTS, VideoVAE
from .store import host_store
from .strips import Strips

logger = logging.getLogger("skyreels.vae.tiling")

#: corrections of a device that has decoded nothing yet
NONE_YET: Mapping[str, float] = MappingProxyType({})

#: whole-time tiles, largest first; a 64 px overlap is the reference's, smaller tiles afford less
_SPATIAL_SIZES = ((512, 448), (448, 384), (384, 320), (320, 256), (256, 192), (192, 144), (128, 96))
_SMALLEST = Tiling(128, 128, 16, 96, 96, 12)
#: of a synced decode; 4 and 8 take as much memory as 2, of which the sample of the norms has most
STRIPS = (1, 2)


@dataclass(frozen=True)
class DecodePlan:
    """How a clip is decoded; its text names it for people and in the file of outcomes.

    Attributes:
        mode: "full", "synced", "exact" or, with tiles, any name.
        tiling: the tiles, None without.
        strips: in how many a synced decode does the rows.
        piece_elements: of the largest piece of a clip that an exact decode keeps in main memory.
        ranks: of which each decodes a strip of rows; 1 is the first one alone.
    """

    mode: str
    tiling: Tiling | None = None
    strips: int = 1
    piece_elements: int = STORED_PIECE_ELEMENTS
    ranks: int = 1

    def __str__(self) -> str:
        if self.ranks > 1:
            return f"{replace(self, ranks=1)} on {self.ranks} ranks"
        if self.piece_elements < STORED_PIECE_ELEMENTS:
            return f"{self.mode} in 1/{STORED_PIECE_ELEMENTS // self.piece_elements} pieces"
        if self.tiling is None:
            return self.mode if self.strips == 1 else f"{self.mode} in {self.strips} strips"
        for name, known in TILINGS.items():
            if known == self.tiling:
                return name
        frames = self.tiling.tile_sample_min_num_frames
        window = f", {frames} frames" if frames else ""
        return f"tiles of {self.tiling.tile_sample_min_width} px{window}"


#: modes that choose, and decode again with less where memory runs out
CHOOSING_MODES = ("auto", "synced", "exact")
#: what "auto" chooses from, the best first: exact, without seams, then the least divided in tiles
LADDER = (
    DecodePlan("full"),
    *(DecodePlan("synced", strips=strips) for strips in STRIPS),
    *(DecodePlan("tiled", Tiling(t, t, 0, s, s, 0)) for t, s in _SPATIAL_SIZES),
    *(DecodePlan("tiled", TILINGS[name]) for name in ("tiled-tencent", "tiled-diffusers")),
    DecodePlan("tiled", _SMALLEST),
)
#: what "exact" chooses from: the clip on the device, or in main memory
EXACT_LADDER = (
    DecodePlan("full"),
    *(DecodePlan("exact", piece_elements=STORED_PIECE_ELEMENTS // part) for part in (1, 2)),
)


class Decoder(Protocol):
    """What tiling needs of a VAE."""

    def decode(self, vae_latents: Tensor, *, check: Callable[[], None]) -> Tensor:
        """[1, 16, T, h, w] -> [1, 3, 4 * (T - 1) + 1, 8h, 8w]."""
        ...


def decode_frames(
    vae: VideoVAE,
    vae_latents: Tensor,
    mode: str = "auto",
    *,
    tiling: Tiling | None = None,
    runtime: Runtime,
) -> Tensor:
    """Decode a clip to frames ready to show.

    Args:
        vae: on any device; back there afterwards.
        vae_latents: [1, 16, T, h, w], VAE space (unscaled); not changed.
        mode: one of config.DECODE_MODES. "auto" makes room for a synced decode and takes the best
            that then fits (`choose_decode`), "full" decodes in one pass, "synced" with norms from a
            part of the clip (`VideoVAE.iter_synced`), "exact" as "full" but, where that does not
            fit, with the clip in main memory between layers (`VideoVAE.iter_exact`), the others in
            the tiles of config.TILINGS.
        tiling: explicit tiles; they override `mode`.
        runtime: progress "decode" in tiles or frames; asked for an interrupt between layers.

    Returns:
        [F, H, W, 3] float32 in [0, 1], contiguous, on runtime.offload_device; F = 4 * (T - 1) + 1.
        Of several ranks only the first gets frames, the others F = 0.

    Raises:
        OptionError: unknown mode.
        ShapeError: latents of another shape.
        OutOfRoomError: nothing fits, or memory ran out; the message names what would fit.

    If memory runs out, "auto", "synced" and "exact" decode again with less, and remember with what;
    another mode or tiles that were asked for are never replaced. Several ranks decode "auto",
    "full" and "exact" together where they can, and do not decode again.
    """
    clip = _decode_on_rungs(vae, vae_latents, mode, tiling, runtime, None)
    if clip is None:
        clip = torch.empty(0, *_output_size(vae_latents.shape)[1:], 3)
    return clip


def decode_into(
    sink: FrameSink | None,
    vae: VideoVAE,
    vae_latents: Tensor,
    mode: str = "auto",
    *,
    tiling: Tiling | None = None,
    runtime: Runtime,
) -> None:
    """Decode a clip and hand its frames on, in order, as they become final.

    In one pass, synced or in windows of time, whole frames arrive one group after the other and
    the clip is never held. In strips of rows, or in tiles of the whole time, they are whole when
    the last one is decoded.

    Args:
        sink: gets the frames that `decode_frames` would return; restarted for each decode. None
            on other ranks than the first, which get none.
        vae: as for `decode_frames`.
        vae_latents: as for `decode_frames`.
        mode: as for `decode_frames`.
        tiling: as for `decode_frames`.
        runtime: as for `decode_frames`.

    Raises:
        SkyReelsError: as `decode_frames`.
    """
    _decode_on_rungs(vae, vae_latents, mode, tiling, runtime, sink)


def _decode_on_rungs(
    vae: VideoVAE,
    vae_latents: Tensor,
    mode: str,
    tiling: Tiling | None,
    runtime: Runtime,
    sink: FrameSink | None,
) -> Tensor | None:
    """The clip, or None where a sink has its frames, or another rank."""
    if mode not in DECODE_MODES:
        raise OptionError(
            f'Decode mode "{mode}" does not exist: use one of {", ".join(DECODE_MODES)}.'
        )
    _check_latents(vae_latents)
    dtype = next(vae.parameters()).dtype
    shape, chooses = vae_latents.shape, tiling is None and mode in CHOOSING_MODES
    plan = _asked_for(mode, tiling, _num_strips(runtime, shape))
    frames, height, width = _output_size(vae_latents.shape)
    folder, device = runtime.state_folder, outcomes.device_key(runtime.device)
    rates, factors = outcomes.known_rates(folder, device), outcomes.corrections(folder, device)
    channels, falls = vae.config.block_out_channels, 0
    work = f"decode {frames} frames of {width}x{height} {mode}, {channels}, {dtype}"

    def on_fall(failed: DecodePlan, rung: DecodePlan) -> None:
        nonlocal falls
        falls += 1
        runtime.check_interrupt()
        runtime.progress("decode", 0, _total(rung, shape))
        free = runtime.free_bytes()
        outcomes.remember_rung(folder, device, work, str(rung), free)
        logger.warning(
            "Memory ran out in a decode with %s (%.1f GB are free now): it is repeated with %s.",
            failed,
            free / 1e9,
            rung,
        )

    def on_rung(rung: DecodePlan) -> nullcontext[Callable[[], Tensor | None]]:
        return nullcontext(partial(_decode_clip, vae, vae_latents, rung, runtime, sink))

    rungs, config = [plan], vae.config
    num_bytes = plan_bytes(plan, config, shape, dtype)
    room = room_bytes(plan, num_bytes, dtype, factors)
    with runtime.place(vae, room), on_device(vae, runtime.device), vae.folded():
        if chooses:
            rungs, num_bytes = _fitting_rungs(mode, config, shape, dtype, runtime, work)
        with descending(rungs, on_rung, runtime.device, on_fall) as decode:
            try:
                peak, begin = outcomes.watch_peak(runtime.device), _now(runtime.device)
                clip: Tensor | None = decode()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            else:
                # the clip is in main memory, so the device has finished
                seconds, most = time.perf_counter() - begin, peak()
                if not falls and _is_first(runtime):
                    expected = expected_decode(
                        rungs[0], num_bytes, config, shape, dtype, rates=rates, corrections=factors
                    )
                    what = f"Decoded {frames} frames with {rungs[0]} in"
                    logger.info(expected.account(what, seconds, most))
                    # a sink that takes frames as they come may be slower than the device
                    alone = seconds if sink is None else None
                    expected.learn(folder, device, seconds=alone, peak=most)
                return clip
        # outside of the handler, as the error's frames hold what the decode had
        release(runtime.device)
        free, _ = room_of(runtime.device, runtime.free_bytes(), 0, shape)
        raise OutOfRoomError(what_fits(rungs, config, shape, free, dtype, factors))


def _fitting_rungs(
    mode: str, config: VAEConfig, shape: torch.Size, dtype: torch.dtype, runtime: Runtime, work: str
) -> tuple[list[DecodePlan], int]:
    """The rungs from the best decode that fits now, or where such work ended; and its bytes."""
    if runtime.ranks is not None:
        return _plan_of_ranks(mode, config, shape, dtype, runtime)
    folder, device = runtime.state_folder, outcomes.device_key(runtime.device)
    free, host = room_of(runtime.device, runtime.free_bytes(), free_host_bytes(), shape)
    corrections = outcomes.corrections(folder, device)
    plan, num_bytes = choose_decode(
        config, shape, free, dtype, mode, host_bytes=host, corrections=corrections
    )
    ladder = _ladder(mode)
    rungs = ladder[ladder.index(plan) :]
    names = list(map(str, rungs))
    rungs = rungs[outcomes.first_rung(folder, device, work, names, runtime.free_bytes()) :]
    if rungs[0] != plan:
        num_bytes = plan_bytes(rungs[0], config, shape, dtype)
    return rungs, num_bytes


def _plan_of_ranks(
    mode: str, config: VAEConfig, shape: torch.Size, dtype: torch.dtype, runtime: Runtime
) -> tuple[list[DecodePlan], int]:
    """The best decode that fits every rank, as none of them can decode again; and its bytes."""
    assert runtime.ranks is not None
    device, group = runtime.device, runtime.ranks.all
    free, host = room_of(device, runtime.free_bytes(), free_host_bytes(), shape)
    free, least_host = least_of([free, 0 if host is None else host], device, group)
    plan, num_bytes = choose_decode(
        config,
        shape,
        free,
        dtype,
        mode,
        host_bytes=None if host is None else least_host,
        ranks=_num_strips(runtime, shape),
    )
    return [plan], num_bytes


def _asked_for(mode: str, tiling: Tiling | None, num_strips: int) -> DecodePlan:
    """What a mode stands for; of one that chooses, what room is made for."""
    if tiling is not None:
        return DecodePlan("tiled", tiling)
    # "auto" makes room for a synced decode: making room for one in a single pass would offload
    # every other model for a little speed
    if mode in CHOOSING_MODES:
        return DecodePlan("exact" if mode == "exact" else "synced")
    return DecodePlan(mode, TILINGS.get(mode), ranks=num_strips if mode == "full" else 1)


def _num_strips(runtime: Runtime, latent_shape: torch.Size) -> int:
    """Ranks that decode together; each needs a row of latents."""
    num_ranks = 1 if runtime.ranks is None else runtime.ranks.all.size()
    return num_ranks if num_ranks <= latent_shape[3] else 1


def _is_first(runtime: Runtime) -> bool:
    """Whether frames come here."""
    return runtime.ranks is None or runtime.ranks.is_first


def _now(device: torch.device) -> float:
    """Seconds at which the device has done what was asked of it so far."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def expected_decode(
    plan: DecodePlan,
    num_bytes: int,
    config: VAEConfig,
    latent_shape: torch.Size,
    dtype: torch.dtype,
    *,
    rates: Mapping[str, float],
    corrections: Mapping[str, float],
) -> outcomes.Expected:
    """What a decode should take, beside the weights of the VAE.

    Args:
        plan: how it is decoded.
        num_bytes: its `plan_bytes`.
        config: of the VAE.
        latent_shape: [1, 16, T, h, w].
        dtype: the decoder's compute dtype.
        rates: of the device, see `outcomes.known_rates`.
        corrections: of earlier decodes, see `outcomes.corrections`.

    Returns:
        Time and peak, corrected.
    """
    rate, link = rates.get("convolution"), rates.get("link")
    seconds = None
    if rate and plan.mode != "exact":
        seconds = plan_flop(plan, config, latent_shape) / rate
    elif rate and link:
        seconds = exact_seconds(
            config,
            _strip_of(plan, latent_shape),
            dtype,
            plan.piece_elements,
            flop_per_s=rate,
            bytes_per_s=link,
        )
    peak_bytes = int(num_bytes / MEMORY_MARGIN)
    return outcomes.expect(kind_of_decode(plan, dtype), seconds, peak_bytes, corrections)


def kind_of_decode(plan: DecodePlan, dtype: torch.dtype) -> str:
    """Name of what is corrected together, see `outcomes.learn`."""
    return f"decode {plan}, {str(dtype).removeprefix('torch.')}"


def what_fits(
    tried: Sequence[DecodePlan],
    config: VAEConfig,
    shape: torch.Size,
    free: int,
    dtype: torch.dtype,
    corrections: Mapping[str, float] = NONE_YET,
) -> str:
    """Why a decode ended, and the best that would fit, in two sentences.

    Args:
        tried: what ran out of memory, the last one last.
        config: of the VAE.
        shape: [1, 16, T, h, w] of the latents.
        free: bytes that a decoder may take beside its weights.
        dtype: the decoder's compute dtype.
        corrections: as for `room_bytes`.

    Returns:
        For people.
    """

    def room(plan: DecodePlan) -> int:
        return room_bytes(plan, plan_bytes(plan, config, shape, dtype), dtype, corrections)

    failed = tried[-1]
    needed = room(failed)
    sizes = [(room(plan), plan) for plan in LADDER if plan not in tried]
    fitting = [(size, plan) for size, plan in sizes if size < needed and size <= free]
    advice = "close other programs that use it, or use fewer frames or a smaller size"
    if fitting:
        size, plan = fitting[0]
        names = [name for name, tiling in TILINGS.items() if tiling == plan.tiling]
        name = plan.mode if plan.tiling is None else (*names, "auto")[0]
        advice = f"choose {name}, as {plan} needs {size / 1e9:.2f} GB, or {advice}"
    return (
        f"Memory ran out in a decode with {failed}: it needs about {needed / 1e9:.2f} GB beside "
        f"the weights, and {max(0, free) / 1e9:.2f} GB of the device are free. To go on, {advice}."
    )


def _decode_clip(
    vae: VideoVAE,
    vae_latents: Tensor,
    plan: DecodePlan,
    runtime: Runtime,
    sink: FrameSink | None = None,
) -> Tensor | None:
    """[F, H, W, 3] in [0, 1] on the offload device, or in a sink; the VAE is on the device."""
    if not _is_first(runtime):
        if plan.ranks > 1:
            assert not list(_decode(vae, vae_latents, plan, runtime))  # its rows go to the first
        return None
    if sink is not None:
        sink.restart()
    writer = FrameWriter(*_output_size(vae_latents.shape), runtime.offload_device, sink)
    for images, *place in _decode(vae, vae_latents, plan, runtime):
        writer.write(images, *place)
        del images  # or it would live on beside the next ones
    return writer.finish()


def _decode(
    vae: VideoVAE, vae_latents: Tensor, plan: DecodePlan, runtime: Runtime
) -> Iterator[tuple[Tensor, int, int, int]]:
    """Yield final [f, rows, columns, 3] on the device, with their first frame, row and column."""
    start, strips = 0, None
    if plan.ranks > 1:
        assert runtime.ranks is not None
        strips = Strips(vae_latents.shape[3], runtime.ranks.all)
    if plan.mode == "synced":
        total, done = _total(plan, vae_latents.shape), 0
        synced = vae.iter_synced(vae_latents, plan.strips, check=runtime.check_interrupt)
        for start, top, piece in synced:
            done += piece.shape[2]
            yield _images(piece), start, top, 0
            runtime.progress("decode", done, total)
    elif plan.mode == "full":
        pieces = vae.iter_decode(vae_latents, check=runtime.check_interrupt, strips=strips)
        for piece in _whole_frames(pieces, strips):
            yield _images(piece), start, 0, 0
            start += piece.shape[2]
        runtime.progress("decode", 1, 1)
    elif plan.mode == "exact":
        with host_store(runtime) as store:
            pieces = vae.iter_exact(
                vae_latents,
                store,
                plan.piece_elements,
                check=runtime.check_interrupt,
                strips=strips,
            )
            for piece in _whole_frames(pieces, strips):
                yield _images(piece), start, 0, 0
                start += piece.shape[2]
        runtime.progress("decode", 1, 1)
    elif len(window_starts(vae_latents.shape[2], plan.tiling)[0]) == 1:
        decode_tile = _tile_decoder(vae, vae_latents.shape, plan.tiling, runtime)
        for images, top, left in _tiles(decode_tile, vae_latents, plan.tiling):
            yield images, 0, top, left
            del images
    else:
        for images in _windows(vae, vae_latents, plan.tiling, runtime):
            frames = len(images)
            yield images, start, 0, 0
            start += frames
            del images  # or it would live on beside the next window


def _whole_frames(pieces: Iterator[Tensor], strips: Strips | None) -> Iterator[Tensor]:
    """Yield frames that are whole: where ranks have strips of them, on the first rank alone."""
    for piece in pieces:
        whole = [piece if strips is None else strips.to_first(piece)]
        del piece
        if whole[0] is not None:
            yield whole.pop()  # type: ignore[misc]


def _images(clip: Tensor) -> Tensor:
    """[1, 3, f, H, W] -> [f, H, W, 3], contiguous; a view where memory is in that order."""
    return clip[0].permute(1, 2, 3, 0).contiguous()


def _total(plan: DecodePlan, latent_shape: torch.Size) -> int:
    """The total that progress reports: the frames of every strip, or decoder calls."""
    if plan.mode != "synced":
        return count_decodes(latent_shape, plan.tiling)
    return plan.strips * ((latent_shape[2] - 1) * TEMPORAL_COMPRESSION + 1)


def iter_decode(
    vae: Decoder,
    vae_latents: Tensor,
    tiling: Tiling | None,
    *,
    runtime: Runtime,
    device: torch.device | None = None,
) -> Iterator[Tensor]:
    """Decode a clip and yield its frames, in order, as soon as they are final.

    With windows in time only the overlap with the next window is held back; without them the clip
    is assembled once and yielded whole. The caller owns each chunk and may overwrite it. Tiles are
    blended and assembled on runtime.device.

    Args:
        vae: already on `runtime.device`.
        vae_latents: [1, 16, T, h, w], VAE space (unscaled); not changed.
        tiling: windows and tiles; None decodes everything in one pass.
        runtime: as for `decode_frames`.
        device: of the frames; None is runtime.offload_device.

    Returns:
        Iterator of [1, 3, f, H, W] float32, about -1 to 1, not clamped; the memory of a chunk is
        ordered [f, H, W, 3].

    Raises:
        ShapeError: latents are not 5-D, or contain more than one clip. Raised by the call, before
            the first chunk is requested.
        OptionError: illegal tiles; raised by the call too.

    Source: diffusers 0.42.1 AutoencoderKLHunyuanVideo._temporal_tiled_decode.
    """
    _check_latents(vae_latents)
    target = runtime.offload_device if device is None else device
    return _moved(_windows(vae, vae_latents, tiling, runtime), target)


def _moved(windows: Iterator[Tensor], target: torch.device) -> Iterator[Tensor]:
    for frames in windows:
        yield frames.to(target).permute(3, 0, 1, 2)[None]
        del frames  # or it would live on beside the next window


def _tile_decoder(
    vae: Decoder, latent_shape: torch.Size, tiling: Tiling | None, runtime: Runtime
) -> Callable[[Tensor], Tensor]:
    """[1, 16, t, h, w] of a tile -> [f, H, W, 3] float32 where it was decoded; reports progress."""
    total = count_decodes(latent_shape, tiling)
    done = 0

    def decode_tile(latents: Tensor) -> Tensor:
        nonlocal done
        runtime.check_interrupt()
        decoded = vae.decode(latents, check=runtime.check_interrupt)
        frames = _images(decoded).float()
        done += 1
        runtime.progress("decode", done, total)
        return frames

    return decode_tile


def _windows(
    vae: Decoder, vae_latents: Tensor, tiling: Tiling | None, runtime: Runtime
) -> Iterator[Tensor]:
    """Yield float32 frames [f, H, W, 3] where they were decoded."""
    starts, length = window_starts(vae_latents.shape[2], tiling)
    decode_tile = _tile_decoder(vae, vae_latents.shape, tiling, runtime)
    tail: Tensor | None = None
    for start in starts:
        frames = _decode_space(decode_tile, vae_latents[:, :, start : start + length], tiling)
        if start > 0:
            frames = frames[1:]
        if tail is not None:
            _blend(tail, frames, dim=0)
        if tiling is None or start == starts[-1]:
            tail = None
            final = frames
        else:
            stride = tiling.tile_sample_stride_num_frames
            final = frames[: stride + (start == 0)]
            tail = _tail(frames, tiling.tile_sample_min_num_frames - stride, dim=0)
        del frames
        yield final
        del final


def _decode_space(
    decode_tile: Callable[[Tensor], Tensor], latents: Tensor, tiling: Tiling | None
) -> Tensor:
    """Decode one window, [1, 16, T, h, w] -> [F, H, W, 3], in tiles where it exceeds one."""
    size = _output_size(latents.shape)
    window: Tensor | None = None
    for images, top, left in _tiles(decode_tile, latents, tiling):
        if images.shape[:3] == size:
            return images
        if window is None:
            window = images.new_empty(*size, 3)
        window[:, top : top + images.shape[1], left : left + images.shape[2]] = images
        del images
    assert window is not None
    return window


def _tiles(
    decode_tile: Callable[[Tensor], Tensor], latents: Tensor, tiling: Tiling | None
) -> Iterator[tuple[Tensor, int, int]]:
    """Yield what is final of each tile, [F, rows, columns, 3], with its first row and column.

    Between two tiles only what overlaps with later ones is held.
    """
    tops, lefts = tile_starts(latents.shape, tiling)
    if tiling is None or (len(tops) == 1 and len(lefts) == 1):
        yield decode_tile(latents), 0, 0
        return
    tile_h, stride_h = tiling.tile_sample_min_height, tiling.tile_sample_stride_height
    tile_w, stride_w = tiling.tile_sample_min_width, tiling.tile_sample_stride_width
    above: list[Tensor | None] = [None] * len(lefts)
    for top in tops:
        before: Tensor | None = None
        rows = slice(top, top + tile_h // SPATIAL_COMPRESSION)
        for column, left in enumerate(lefts):
            columns = slice(left, left + tile_w // SPATIAL_COMPRESSION)
            tile = decode_tile(latents[:, :, :, rows, columns])
            for previous, dim in ((above[column], 1), (before, 2)):
                if previous is not None:
                    _blend(previous, tile, dim)
            above[column] = _tail(tile, tile_h - stride_h, dim=1)
            before = _tail(tile, tile_w - stride_w, dim=2)
            final = [tile[:, :stride_h, :stride_w]]
            del tile
            yield final.pop(), top * SPATIAL_COMPRESSION, left * SPATIAL_COMPRESSION


def _blend(previous: Tensor, tile: Tensor, dim: int) -> None:
    """Cross-fade from the end of `previous` into the start of `tile`, in place, from weight 0."""
    extent = min(previous.shape[dim], tile.shape[dim])
    head = tile.narrow(dim, 0, extent)
    weight = torch.arange(extent, device=tile.device, dtype=torch.float32) / extent
    weight = weight.view([extent if axis == dim else 1 for axis in range(tile.dim())])
    old = previous.narrow(dim, previous.shape[dim] - extent, extent)
    head.copy_(torch.lerp(old, head, weight))


def _tail(tile: Tensor, overlap: int, dim: int) -> Tensor | None:
    """The last `overlap` frames, rows or columns, copied so that the tile can be freed."""
    if overlap == 0:
        return None
    length = min(overlap, tile.shape[dim])
    return tile.narrow(dim, tile.shape[dim] - length, length).clone()


def window_starts(latent_frames: int, tiling: Tiling | None) -> tuple[list[int], int]:
    """Where the windows in time start, and the most latents that a window contains.

    A window of its context latent alone would add no frame and is not listed (diffusers decodes it
    and discards the result: 9 windows for 25 latents instead of 8).

    Args:
        latent_frames: T of the clip.
        tiling: None, or without windows, is one window over everything.

    Returns:
        The first latent of each window, and its greatest length in latents.
    """
    if tiling is None or tiling.tile_sample_min_num_frames == 0:
        return [0], latent_frames
    length = tiling.tile_sample_min_num_frames // TEMPORAL_COMPRESSION
    stride = tiling.tile_sample_stride_num_frames // TEMPORAL_COMPRESSION
    if latent_frames <= length:
        return [0], latent_frames
    starts = [s for s in range(0, latent_frames, stride) if s == 0 or latent_frames - s > 1]
    return starts, length + 1


def tile_starts(latent_shape: torch.Size, tiling: Tiling | None) -> tuple[list[int], list[int]]:
    """Where the tiles start; a frame that fits one tile is not cut.

    Args:
        latent_shape: [1, C, T, h, w].
        tiling: None is one tile.

    Returns:
        The first latent row of each row of tiles, the first latent column of each column.
    """
    height, width = latent_shape[3:]
    if tiling is None or (
        height * SPATIAL_COMPRESSION <= tiling.tile_sample_min_height
        and width * SPATIAL_COMPRESSION <= tiling.tile_sample_min_width
    ):
        return [0], [0]
    return (
        list(range(0, height, tiling.tile_sample_stride_height // SPATIAL_COMPRESSION)),
        list(range(0, width, tiling.tile_sample_stride_width // SPATIAL_COMPRESSION)),
    )


def count_decodes(latent_shape: torch.Size, tiling: Tiling | None) -> int:
    """Number of decoder calls for latents [1, 16, T, h, w]; the total that progress reports."""
    tops, lefts = tile_starts(latent_shape, tiling)
    return len(window_starts(latent_shape[2], tiling)[0]) * len(tops) * len(lefts)


def largest_tile(latent_shape: torch.Size, tiling: Tiling | None) -> torch.Size:
    """Shape of the largest piece of latents [1, C, T, h, w] that one decoder call receives."""
    if tiling is None:
        return latent_shape
    batch, channels, frames, height, width = latent_shape
    tops, lefts = tile_starts(latent_shape, tiling)
    if len(tops) * len(lefts) > 1:
        height = min(height, tiling.tile_sample_min_height // SPATIAL_COMPRESSION)
        width = min(width, tiling.tile_sample_min_width // SPATIAL_COMPRESSION)
    frames = min(frames, window_starts(frames, tiling)[1])
    return torch.Size((batch, channels, frames, height, width))


def plan_bytes(
    plan: DecodePlan, config: VAEConfig, latent_shape: torch.Size, dtype: torch.dtype
) -> int:
    """The peak bytes that a decode takes beside the weights, predicted; see budget.py."""
    if plan.ranks > 1:
        strip = _strip_of(plan, latent_shape)
        num_bytes = plan_bytes(replace(plan, ranks=1), config, strip, dtype)
        return max(num_bytes, middle_bytes(config, latent_shape, dtype))
    if plan.mode == "synced":
        return synced_bytes(config, latent_shape, dtype, plan.strips)
    if plan.mode == "exact":
        return exact_bytes(config, latent_shape, dtype, plan.piece_elements)
    num_bytes = decode_bytes(config, largest_tile(latent_shape, plan.tiling), dtype)
    tiling = plan.tiling
    tops, lefts = tile_starts(latent_shape, tiling)
    if tiling is not None and len(window_starts(latent_shape[2], tiling)[0]) == 1:
        if len(tops) * len(lefts) > 1:  # what overlaps: with the row above, and to the left
            height, width = tiling.tile_sample_min_height, tiling.tile_sample_min_width
            above = len(lefts) * width * (height - tiling.tile_sample_stride_height)
            before = height * (width - tiling.tile_sample_stride_width)
            num_bytes += 4 * 3 * _output_size(latent_shape)[0] * (above + before)
    elif tiling is not None:  # windows are assembled, and blended, beside the tile
        frames = min(latent_shape[2], _window_length(plan.tiling) or latent_shape[2])
        window = torch.Size((*latent_shape[:2], frames, *latent_shape[3:]))
        num_bytes += 2 * 4 * 3 * math.prod(_output_size(window))
    return num_bytes


def room_bytes(
    plan: DecodePlan,
    num_bytes: int,
    dtype: torch.dtype,
    corrections: Mapping[str, float],
) -> int:
    """The free bytes, beside the weights, with which a decode is begun.

    Args:
        plan: how it is decoded.
        num_bytes: its `plan_bytes`.
        dtype: the decoder's compute dtype.
        corrections: of earlier decodes, see `outcomes.corrections`.

    Returns:
        What is predicted, with its margin, or what such a decode took before if that was more.
    """
    factor = corrections.get(outcomes.peak_kind(kind_of_decode(plan, dtype)), 1.0)
    return max(num_bytes, int(factor * num_bytes / MEMORY_MARGIN))


def room_of(
    device: torch.device, free_bytes: int, free_host_bytes: int, latent_shape: torch.Size
) -> tuple[int, int | None]:
    """The memory that a decode may take.

    Args:
        device: where it runs.
        free_bytes: of the device, beside the weights.
        free_host_bytes: of main memory.
        latent_shape: [1, 16, T, h, w].

    Returns:
        Bytes of the device, and of main memory beside the frames that end there; None where the
        device has no memory of its own.
    """
    clip_bytes = 4 * 3 * math.prod(_output_size(latent_shape))
    if device.type in ("cpu", "mps"):
        return free_bytes - clip_bytes, None
    return free_bytes, free_host_bytes - FREE_HOST_BYTES - clip_bytes


def plan_host_bytes(
    plan: DecodePlan, config: VAEConfig, latent_shape: torch.Size, dtype: torch.dtype
) -> int:
    """The main memory in which a decode, of all ranks, keeps the clip beside the frames, or 0."""
    if plan.mode != "exact":
        return 0
    strip = _strip_of(plan, latent_shape)
    return plan.ranks * stored_bytes(config, strip, dtype, plan.piece_elements)


def plan_flop(plan: DecodePlan, config: VAEConfig, latent_shape: torch.Size) -> float:
    """FLOP of a rank's convolutions; tiles at the edges count as whole ones. See budget.py."""
    latent_shape = _strip_of(plan, latent_shape)
    if plan.mode == "synced":
        return synced_flop(config, latent_shape, plan.strips)
    tile = decode_flop(config, largest_tile(latent_shape, plan.tiling))
    return count_decodes(latent_shape, plan.tiling) * tile


def _strip_of(plan: DecodePlan, latent_shape: torch.Size) -> torch.Size:
    """[1, 16, T, h, w] of what a rank decodes, the largest of them."""
    batch, channels, frames, height, width = latent_shape
    return torch.Size((batch, channels, frames, shares(height, plan.ranks)[0], width))


def _window_length(tiling: Tiling | None) -> int | None:
    frames = 0 if tiling is None else tiling.tile_sample_min_num_frames
    return frames // TEMPORAL_COMPRESSION + 1 if frames else None


def choose_decode(
    config: VAEConfig,
    latent_shape: torch.Size,
    free_bytes: int,
    dtype: torch.dtype,
    mode: str = "auto",
    *,
    host_bytes: int | None = None,
    corrections: Mapping[str, float] = NONE_YET,
    ranks: int = 1,
) -> tuple[DecodePlan, int]:
    """The best decode that fits, and the bytes it is predicted to take.

    In order: in one pass, which is exact; synced, in as few strips as possible, which has no seams;
    then the least divided in tiles: whole-time tiles, 64/48 windows, 16/12 windows.

    "auto" does not keep the clip in main memory, although that would be exact: for 97 frames of
    544x960 in bf16 it page-locks 26 GB there, which text encoder and transformer of the next run
    may need, and moves about 320 GB over the link, which takes longer than the computation on a
    slow one. A synced decode differs by less than 8-bit pictures show (60 dB on the built-in
    model). Who wants every bit says "exact".

    Args:
        config: of the VAE.
        latent_shape: [1, 16, T, h, w].
        free_bytes: bytes the decoder may take beside its weights.
        dtype: the decoder's compute dtype.
        mode: "auto", or "synced" or "exact" for the first such decode that fits.
        host_bytes: of main memory that an exact decode may keep the clip in; None where the device
            has no memory of its own.
        corrections: as for `room_bytes`.
        ranks: that can decode a strip each; free_bytes are of each, host_bytes of all.

    Returns:
        The plan, and its `plan_bytes`.

    Raises:
        OutOfRoomError: nothing fits.
    """
    for plan in _ladder(mode, ranks):
        num_bytes = plan_bytes(plan, config, latent_shape, dtype)
        needed = room_bytes(plan, num_bytes, dtype, corrections)
        stored = plan_host_bytes(plan, config, latent_shape, dtype)
        if host_bytes is None:
            needed += stored
        elif stored > host_bytes and needed <= free_bytes:
            raise OutOfRoomError(
                f"An exact decode of these latents keeps {stored / 1e9:.1f} GB in main memory, of "
                f"which {max(host_bytes, 0) / 1e9:.1f} GB may be used: close other programs, or "
                'decode with mode "synced", which has no seams either and needs no such memory.'
            )
        if needed <= free_bytes:
            return plan, num_bytes
    names = {"synced": f"in {STRIPS[-1]} strips", "exact": "in one pass"}
    what = names.get(mode, "in the smallest tiles")
    raise OutOfRoomError(
        f"Decoding these latents {what} needs {needed / 1e6:,.0f} MB beside the "
        f"weights, and {max(free_bytes, 0) / 1e6:,.0f} MB are free: unload other models, use a "
        "bf16 or fp16 VAE, or close other programs that use this device."
    )


def last_rung(mode: str) -> DecodePlan:
    """What `choose_decode` tries last."""
    return _ladder(mode)[-1]


def _ladder(mode: str, ranks: int = 1) -> list[DecodePlan]:
    """From the best; what is exact is done by all ranks, the rest by the first one alone."""
    if mode == "exact":
        return [replace(plan, ranks=ranks) for plan in EXACT_LADDER]
    return [
        replace(plan, ranks=ranks) if plan.mode == "full" else plan
        for plan in LADDER
        if mode in ("auto", plan.mode)
    ]


def explicit_tiling(
    mode: str, size: int, stride: int, num_frames: int, num_frames_stride: int
) -> Tiling | None:
    """The tiles of a mode with some of its numbers replaced; "auto" then means "tiled".

    Args:
        mode: as for `decode_frames`.
        size: of tiles in pixels; 0 keeps the mode's.
        stride: of tiles in pixels; 0 is three quarters of a given size, else the mode's.
        num_frames: of windows in frames; 0 keeps the mode's.
        num_frames_stride: of windows in frames; 0 is three quarters of a given length, else the
            mode's.

    Returns:
        None if every number is 0: the mode decides.

    Raises:
        OptionError: numbers for a mode that has no tiles.
    """
    if not any((size, stride, num_frames, num_frames_stride)):
        return None
    mode = "tiled" if mode == "auto" else mode
    if mode not in TILINGS:
        raise OptionError(
            f"Decode mode {mode} has no tiles: choose auto, {' or '.join(TILINGS)}, or set the "
            "tile sizes to 0."
        )
    own = TILINGS[mode]
    tile = size or own.tile_sample_min_height
    step = stride or (_three_quarters(size, SPATIAL_COMPRESSION) or own.tile_sample_stride_height)
    window = num_frames or own.tile_sample_min_num_frames
    window_step = num_frames_stride or (
        _three_quarters(num_frames, TEMPORAL_COMPRESSION) or own.tile_sample_stride_num_frames
    )
    return Tiling(tile, tile, window, step, step, window_step)


def _three_quarters(length: int, multiple: int) -> int:
    return max(multiple, length * 3 // 4 // multiple * multiple) if length else 0


def _check_latents(vae_latents: Tensor) -> None:
    shape = list(vae_latents.shape)
    if len(shape) != 5 or shape[0] != 1 or 0 in shape:
        raise ShapeError(
            f"Latents to decode must be one clip [1, 16, T, h, w]; got {shape}. Decode the clips "
            "of a batch one by one."
        )


def _output_size(latent_shape: torch.Size) -> tuple[int, int, int]:
    frames, height, width = latent_shape[2:]
    return (
        (frames - 1) * TEMPORAL_COMPRESSION + 1,
        height * SPATIAL_COMPRESSION,
        width * SPATIAL_COMPRESSION,
    )
