"""CUDA streams and events without CUDA: each stream has a clock, and copies take their time.

What is queued takes effect at once, in the order of queueing. So data is right in any case, and
what waits for what shows in the clocks: a copy into a slot that is still read is an error.
"""

from contextlib import contextmanager
from typing import ClassVar

import torch
from comfyui_skyreels.skyreels.runtime import streaming


class Stream:
    def __init__(self, device=None):
        self.clock = 0.0

    def wait_event(self, event):
        self.clock = max(self.clock, event.time)

    def wait_stream(self, stream):
        self.clock = max(self.clock, stream.clock)

    def synchronize(self):
        Machine.waits.append("a stream")


class Event:
    def __init__(self, blocking=False):
        self.time = 0.0

    def record(self, stream):
        self.time = stream.clock

    def synchronize(self):
        Machine.waits.append(self.time)
        Machine.host = max(Machine.host, self.time)


def little_memory(num_bytes):
    """Page-locked memory for the ends of tensors, not for a ring."""
    if num_bytes >= min(streaming.RING_BYTES):
        raise RuntimeError("CUDA error: out of memory")
    return torch.empty(num_bytes, dtype=torch.uint8)


class Machine:
    """What the stand-ins share; `install` replaces torch's classes for a test.

    Attributes:
        compute: the stream that blocks run on.
        bytes_per_s: of the link.
        readers: storage of a slot -> when the last block that used it ended.
        left: storage of a buffer of the ring -> when the last copy from it ended.
        host: the time that the host has seen pass.
        copied: bytes, copy by copy.
        waits: of the host: the time of the event, or "a stream".
        locked: address -> end of page-locked memory of the host.
    """

    locked: ClassVar[dict[int, int]] = {}
    copied: ClassVar[list[int]] = []
    waits: ClassVar[list[float | str]] = []
    host: ClassVar[float] = 0.0

    def __init__(self, bytes_per_s=1.0):
        self.compute, self.bytes_per_s = Stream(), bytes_per_s
        self.stall = 0.0
        self.readers: dict[int, float] = {}
        self.left: dict[int, float] = {}
        Machine.copied, Machine.waits, Machine.host, Machine.locked = [], [], 0.0, {}

    def install(self, monkeypatch):
        @contextmanager
        def on(stream):
            yield

        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.compute)
        monkeypatch.setattr(torch.cuda, "stream", on)
        monkeypatch.setattr(streaming, "page_locked", little_memory)
        return self

    def open_copies(self, device=None):
        return TimedCopies(self)

    def compute_for(self, seconds, *slots):
        """Run something on the compute stream that reads some tensors."""
        self.compute.clock += seconds
        for slot in slots:
            self.readers[slot.untyped_storage().data_ptr()] = self.compute.clock


class TimedCopies(streaming.CudaCopies):
    """The real class, whose copies take time on the clock of its stream."""

    def __init__(self, machine):
        super().__init__(torch.device("cpu"))
        self.machine = machine

    def wait_for(self, slot):
        before = self.machine.compute.clock
        super().wait_for(slot)
        self.machine.stall += self.machine.compute.clock - before

    def _copy(self, target, source):
        read_until = self.machine.readers.get(target.untyped_storage().data_ptr(), 0.0)
        assert self._stream.clock >= read_until, "a block that still runs would be overwritten"
        first, last = source.data_ptr(), source.data_ptr() + source.nbytes
        for start, end in Machine.locked.items():
            inside, outside = start <= first and last <= end, last <= start or end <= first
            assert inside or outside, "CUDA copies nothing that is page-locked in part"
        super()._copy(target, source)
        self._stream.clock += target.nbytes / self.machine.bytes_per_s
        buffer = source.untyped_storage().data_ptr()
        if any(buffer == ring.data_ptr() for ring, _ in self._ring):
            was_read = self.machine.left.get(buffer, 0.0)
            assert Machine.host >= was_read, "what still leaves the ring would be overwritten"
            self.machine.left[buffer] = self._stream.clock
        Machine.copied.append(target.nbytes)
