"""Decoded frames on their way to main memory, copied while the device works on the next ones."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import OptionError
from ..kernels import dispatch

#: bytes copied at a time; two such buffers are page-locked while a decode lasts
STAGING_BYTES = 64 * 2**20


class FrameSink(Protocol):
    """Takes the frames of a clip as they become final."""

    def restart(self) -> None:
        """Forget what came before: the first frame comes next. Called before it, too."""
        ...

    def write(self, frames: Tensor) -> None:
        """Take the next frames.

        Args:
            frames: [f, H, W, 3] float32 in [0, 1] in main memory, not changed afterwards.
        """
        ...


class FrameWriter:
    """Fills the tensor that a decode returns, or hands frames to a sink in order.

    Frames that arrive in parts on their way to a sink wait in the decoder's own dtype, which is
    half of float32 with a bf16 VAE, and become float32 when they are handed on. A clip that is
    returned is ordinary memory: page-locked memory is scarce, and would stay so for as long as
    somebody holds the frames.

    Args:
        frames: number of frames of the clip.
        height: in pixels.
        width: in pixels.
        offload_device: where the clip goes.
        sink: gets the frames; the clip is then held only where frames arrive in parts.
    """

    def __init__(
        self,
        frames: int,
        height: int,
        width: int,
        offload_device: torch.device,
        sink: FrameSink | None = None,
    ) -> None:
        self._shape = (frames, height, width, 3)
        self._offload_device = offload_device
        self._sink = sink
        self._pixels = [0] * frames  # that have arrived, of each frame
        self._handed = 0  # frames that the sink has
        self._clip: Tensor | None = None
        self._written = 0
        self._slots: list[_Slot] | None = None

    def write(self, images: Tensor, start: int, top: int = 0, left: int = 0) -> None:
        """Take some frames, or parts of them, that are final.

        Args:
            images: [f, rows, columns, 3] float, about -1 to 1, on any device; may be overwritten.
            start: the first of these frames.
            top: the first of these rows.
            left: the first of these columns.

        Raises:
            OptionError: NaN among these frames or, on a GPU, among earlier ones.
        """
        self._written += images.numel()
        if (images.device, images.dtype) == (self._offload_device, torch.float32) and (
            images.shape == self._shape or self._is_handed_on(images)
        ):
            _check(_sum(_shown(images)))
            self._clip = None if self._sink else images
            self._landed(images, start)
            return
        waits = self._waits(images)
        if images.is_cuda and self._slots is None:
            self._slots = _page_locked_slots(images.device)
        if images.is_cuda and self._slots:
            step = max(1, STAGING_BYTES // (4 * images[0].numel()))
            for index, part in enumerate(torch.split(images, step)):
                first = start + index * step
                place = self._place(part, first, top, left)
                ready = part if waits else _shown(part)
                total = _sum(part.clamp(-1, 1) if waits else ready)  # infinite ones are shown as 1
                slot = self._slots.pop(0)
                slot.flush()
                slot.start(ready, total, place, partial(self._landed, place, first))
                self._slots.append(slot)
            return
        place = self._place(images, start, top, left)
        place.copy_(images)
        if not waits:
            place = _shown(place)
        _check(_sum(place.clamp(-1, 1) if waits else place))
        self._landed(place, start)

    def finish(self) -> Tensor | None:
        """Wait for the last copies.

        Returns:
            [F, H, W, 3] float32 in [0, 1], contiguous, on the offload device; None where a sink
            has the frames.

        Raises:
            OptionError: NaN among the frames.
        """
        for slot in self._slots or ():
            slot.flush()
        assert self._written == math.prod(self._shape)
        assert self._handed == (self._shape[0] if self._sink else 0)
        return None if self._sink else self._clip

    def _is_handed_on(self, images: Tensor) -> bool:
        """Whether these frames are whole and go to a sink, past the clip."""
        return self._sink is not None and images.shape[1:] == self._shape[1:]

    def _waits(self, images: Tensor) -> bool:
        """Whether these are parts of frames for a sink, which wait until they are whole."""
        return self._sink is not None and images.shape[1:] != self._shape[1:]

    def _place(self, images: Tensor, start: int, top: int, left: int) -> Tensor:
        """Memory for some frames, or parts of them."""
        if self._is_handed_on(images):
            return torch.empty(images.shape, device=self._offload_device)
        if self._clip is None:
            dtype = images.dtype if self._waits(images) else torch.float32
            self._clip = torch.empty(self._shape, device=self._offload_device, dtype=dtype)
        frames, rows, columns, _ = images.shape
        return self._clip[start : start + frames, top : top + rows, left : left + columns]

    def _landed(self, images: Tensor, start: int) -> None:
        """Hand on what has become whole, some frames at a time."""
        if self._sink is None:
            return
        for index in range(start, start + len(images)):
            self._pixels[index] += images.shape[1] * images.shape[2]
        ready, whole = self._handed, self._shape[1] * self._shape[2]
        while ready < len(self._pixels) and self._pixels[ready] == whole:
            ready += 1
        waits = self._waits(images)
        if waits:
            assert self._clip is not None
            images, start = self._clip, 0
        assert start <= self._handed  # whole frames come in order
        step = max(1, STAGING_BYTES // (4 * images[0].numel()))
        while self._handed < ready:
            first = self._handed
            self._handed = min(first + step, ready)
            frames = images[first - start : self._handed - start]
            self._sink.write(_shown(frames) if waits else frames)


class _Slot:
    """A page-locked buffer, and the copy that is on its way through it."""

    def __init__(self, device: torch.device) -> None:
        self._staging = torch.empty(STAGING_BYTES // 4, pin_memory=True)
        self._sum = torch.empty((), pin_memory=True)
        event: Any = torch.cuda.Event  # untyped in torch
        self._ready = event(blocking=True)
        self._device = device
        self._coming: tuple[Tensor, Tensor, Callable[[], None]] | None = None

    def start(
        self, images: Tensor, total: Tensor, target: Tensor, on_landed: Callable[[], None]
    ) -> None:
        if images.numel() > self._staging.numel():  # a single frame may be larger
            self._staging = torch.empty(images.numel(), pin_memory=True)
        staging = self._staging.view(images.dtype)[: images.numel()].view(images.shape)
        staging.copy_(images, non_blocking=True)
        self._sum.copy_(total, non_blocking=True)
        self._ready.record(torch.cuda.current_stream(self._device))
        self._coming = staging, target, on_landed

    def flush(self) -> None:
        if self._coming is None:
            return
        (staging, target, on_landed), self._coming = self._coming, None
        self._ready.synchronize()
        _check(self._sum)
        target.copy_(staging)
        on_landed()


def _page_locked_slots(device: torch.device) -> list[_Slot]:
    """Two buffers; none where the system locks no more pages, and copies wait for each other."""
    try:
        return [_Slot(device), _Slot(device)]
    except RuntimeError as error:
        dispatch.log_once(f"Frames are copied without page-locked memory ({error}).")
        return []


def _shown(images: Tensor) -> Tensor:
    """Frames about -1 to 1 as float32 in 0 to 1; float32 in place."""
    return images.float().add_(1).mul_(0.5).clamp_(0, 1)


def _sum(images: Tensor) -> Tensor:
    """A number that is not finite if one of these is NaN."""
    return images.sum(dtype=torch.float32)


def _check(total: Tensor) -> None:
    """Refuse frames whose sum is not a number, as it is not if one of them has one that is not."""
    if not bool(total.isfinite()):
        raise OptionError(
            "The decoded frames contain NaN: if the VAE was loaded in fp16, load it in bf16 or "
            "fp32; else check its file and the latents."
        )
