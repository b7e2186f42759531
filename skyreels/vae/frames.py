"""Decoded frames on their way to main memory, copied while the device works on the next ones."""

from typing import Any

import torch
from torch import Tensor

from ..errors import OptionError
from ..kernels import dispatch

#: bytes copied at a time; two such buffers are page-locked while a decode lasts
STAGING_BYTES = 64 * 2**20


class FrameWriter:
    """Fills the tensor that a decode returns.

    The result itself is ordinary memory: page-locked memory is scarce, and would stay so for as
    long as somebody holds the frames.

    Args:
        frames: number of frames of the clip.
        height: in pixels.
        width: in pixels.
        offload_device: where the clip goes.
    """

    def __init__(self, frames: int, height: int, width: int, offload_device: torch.device) -> None:
        self._shape = (frames, height, width, 3)
        self._offload_device = offload_device
        self._clip: Tensor | None = None
        self._written = 0
        self._slots: list[_Slot] | None = None

    def write(self, images: Tensor, start: int, top: int = 0) -> None:
        """Take some frames, or rows of them, that are final.

        Args:
            images: [f, rows, W, 3] float32, about -1 to 1, on any device; overwritten.
            start: the first of these frames.
            top: the first of these rows.

        Raises:
            OptionError: NaN among these frames or, on a GPU, among earlier ones.
        """
        images.add_(1).mul_(0.5).clamp_(0, 1)
        self._written += images.numel()
        if images.device == self._offload_device and images.shape == self._shape:
            _check(images.sum())
            self._clip = images
            return
        if self._clip is None:
            self._clip = torch.empty(self._shape, device=self._offload_device)
        target = self._clip[start : start + len(images), top : top + images.shape[1]]
        if images.is_cuda and self._slots is None:
            self._slots = _page_locked_slots(images.device)
        if images.is_cuda and self._slots:
            step = max(1, STAGING_BYTES // images[0].nbytes)
            for part, place in zip(
                torch.split(images, step), torch.split(target, step), strict=True
            ):
                slot = self._slots.pop(0)
                slot.flush()
                slot.start(part, place)
                self._slots.append(slot)
            return
        _check(images.sum())
        target.copy_(images)

    def finish(self) -> Tensor:
        """Wait for the last copies.

        Returns:
            [F, H, W, 3] float32 in [0, 1], contiguous, on the offload device.

        Raises:
            OptionError: NaN among the frames.
        """
        for slot in self._slots or ():
            slot.flush()
        assert self._clip is not None and self._written == self._clip.numel()
        return self._clip


class _Slot:
    """A page-locked buffer, and the copy that is on its way through it."""

    def __init__(self, device: torch.device) -> None:
        self._staging = torch.empty(STAGING_BYTES // 4, pin_memory=True)
        self._sum = torch.empty((), pin_memory=True)
        event: Any = torch.cuda.Event  # untyped in torch
        self._ready = event(blocking=True)
        self._device = device
        self._target: Tensor | None = None
        self._size = 0

    def start(self, images: Tensor, target: Tensor) -> None:
        if images.numel() > self._staging.numel():  # a single frame may be larger
            self._staging = torch.empty(images.numel(), pin_memory=True)
        self._size = images.numel()
        self._staging[: self._size].view(images.shape).copy_(images, non_blocking=True)
        self._sum.copy_(images.sum(), non_blocking=True)
        self._ready.record(torch.cuda.current_stream(self._device))
        self._target = target

    def flush(self) -> None:
        if self._target is None:
            return
        self._ready.synchronize()
        _check(self._sum)
        self._target.copy_(self._staging[: self._size].view(self._target.shape))
        self._target = None


def _page_locked_slots(device: torch.device) -> list[_Slot]:
    """Two buffers; none where the system locks no more pages, and copies wait for each other."""
    try:
        return [_Slot(device), _Slot(device)]
    except RuntimeError as error:
        dispatch.log_once(f"Frames are copied without page-locked memory ({error}).")
        return []


def _check(total: Tensor) -> None:
    """Refuse frames whose sum is not a number, as it is not if one of them has one that is not."""
    if not bool(total.isfinite()):
        raise OptionError(
            "The decoded frames contain NaN: load the VAE in bf16 or fp32 instead of fp16, and "
            "check the latents."
        )
