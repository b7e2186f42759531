"""Where the pieces of a clip lie between two layers when the device has no room for them.

At full resolution a clip takes 26 GB (97 frames of 544x960 in bf16 with 256 channels), of which a
layer works on a few frames at a time. The others are in main memory, in page-locked chunks as far
as the system locks pages. A piece leaves on one copy stream and comes back on another, so that both
directions of the link are used, and the next piece comes while the current one is worked on.

Everything is ordered through the stream of the computation: a copy waits for what was computed
until it is queued, and the computation waits for a copy before it uses, or frees, the piece on the
device. So a chunk is never written before it was read: what was computed until then had waited for
the copy out of it.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from mmap import PAGESIZE
from typing import NamedTuple, Protocol
from weakref import finalize

import torch
from torch import Tensor

from ..errors import OutOfRoomError
from ..kernels import dispatch
from ..runtime import Runtime
from ..runtime.ladder import is_out_of_memory
from ..runtime.streaming import Copies, open_copies

#: bytes of a chunk: large enough for the full rate of a link, small beside a piece
CHUNK_BYTES = 32 * 2**20
#: pieces of a clip that are on the device or on their way to it: one is worked on
AHEAD = 2
#: copies to main memory that may be under way
LEAVING = 2
_LAYOUT = torch.channels_last_3d


class Stored:
    """A piece in main memory, which is free again when nothing refers to this.

    Attributes:
        shape: [B, C, t, H, W].
        dtype: of its elements.
        chunks: its bytes in the order [B, t, H, W, C], [num_bytes] uint8 each.
    """

    def __init__(self, piece: Tensor, chunks: list[Tensor]) -> None:
        self.shape, self.dtype, self.chunks = piece.shape, piece.dtype, chunks


#: of a clip: on the device, or in main memory
Piece = Tensor | Stored


class Store(Protocol):
    """What keeps the pieces of clips."""

    def put(self, piece: Tensor) -> Piece:
        """Put a piece [B, C, t, H, W] away; whoever made it must not change it any more."""
        ...

    def take(self, pieces: list[Piece]) -> Iterator[Tensor]:
        """Yield pieces on the device, taken off the list; whoever gets one may change it.

        What is a tensor was never put away and comes as it is.
        """
        ...


class _Copied(NamedTuple):
    """A piece between device and main memory; neither may be used again before it is there.

    Attributes:
        piece: on the device.
        stored: in main memory; None for a piece that was never put away.
        slot: that copies of its direction know it by.
    """

    piece: Tensor
    stored: Stored | None = None
    slot: int = 0


class HostStore:
    """Keeps pieces in main memory.

    Args:
        device: where they are worked on.
        allocate: gives chunks, [num_bytes] uint8, that are free when nothing refers to them.
        make_copies: copies between chunks and the device; one for each direction.
    """

    def __init__(
        self,
        device: torch.device,
        allocate: Callable[[int], Tensor],
        make_copies: Callable[[torch.device], Copies] = open_copies,
    ) -> None:
        self._device, self._allocate = device, allocate
        self._down, self._up = make_copies(device), make_copies(device)
        self._free: list[Tensor] = []
        self._leaving: dict[int, _Copied] = {}  # by slot
        self._slots = deque(range(LEAVING))
        self._free_slots: list[int] = []  # of pieces that come
        self._num_slots = 0
        #: bytes of all chunks
        self.num_bytes = 0

    def put(self, piece: Tensor) -> Stored:
        """Queue the copy of a piece to main memory."""
        piece = piece.contiguous(memory_format=_LAYOUT)
        slot = self._slots[0]
        self._slots.rotate(-1)
        self._release(slot)
        stored = Stored(piece, self._chunks_for(piece.nbytes))
        finalize(stored, self._free.extend, stored.chunks)
        self._down.mark_used(slot)
        parts = zip(stored.chunks, torch.split(_bytes_of(piece), CHUNK_BYTES), strict=True)
        self._down.bring(slot, [(chunk[: len(part)], part) for chunk, part in parts])
        self._leaving[slot] = _Copied(piece, stored, slot)
        if self._slots[0] in self._leaving:
            # no more is launched than what the pieces in between take: who cancels waits for it
            self._down.hold(self._slots[0])
        return stored

    def take(self, pieces: list[Piece]) -> Iterator[Tensor]:
        """Bring pieces, the next one while the one that was yielded is worked on."""
        coming: deque[_Copied] = deque()
        pieces.reverse()
        while pieces or coming:
            while pieces and len(coming) < AHEAD:
                coming.append(self._bring(pieces.pop()))
            yield self._arrived(coming.popleft())

    def close(self) -> None:
        """Wait for all copies."""
        self._down.close()
        self._up.close()
        self._leaving.clear()

    def _arrived(self, copied: _Copied) -> Tensor:
        """A piece for what is computed from now on."""
        if copied.stored is not None:
            self._up.wait_for(copied.slot)
            self._free_slots.append(copied.slot)
        return copied.piece

    def _bring(self, stored: Piece) -> _Copied:
        """Queue the copy of a piece to the device, after what was computed in its memory before."""
        if isinstance(stored, Tensor):
            return _Copied(stored)
        for slot, leaving in list(self._leaving.items()):
            if leaving.stored is stored:
                self._release(slot)
        piece = torch.empty(
            stored.shape, dtype=stored.dtype, device=self._device, memory_format=_LAYOUT
        )
        if not self._free_slots:
            self._free_slots.append(self._num_slots)
            self._num_slots += 1
        slot = self._free_slots.pop()
        self._up.mark_used(slot)
        parts = zip(torch.split(_bytes_of(piece), CHUNK_BYTES), stored.chunks, strict=True)
        self._up.bring(slot, [(part, chunk[: len(part)]) for part, chunk in parts])
        return _Copied(piece, stored, slot)

    def _release(self, slot: int) -> None:
        """Let what is computed from now on use the memory of a piece that left."""
        if slot in self._leaving:
            self._down.wait_for(slot)
            del self._leaving[slot]

    def _chunks_for(self, num_bytes: int) -> list[Tensor]:
        count = -(-num_bytes // CHUNK_BYTES)
        while len(self._free) < count:
            self._free.append(self._allocate(CHUNK_BYTES))
            self.num_bytes += CHUNK_BYTES
        return [self._free.pop() for _ in range(count)]


def _bytes_of(piece: Tensor) -> Tensor:
    """[num_bytes] uint8, the same memory in its own order."""
    return piece.permute(0, 2, 3, 4, 1).view(-1).view(torch.uint8)


class HostMemory:
    """Chunks of main memory, page-locked as far as the host allows, until `release`.

    Args:
        runtime: locks the pages.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._locked: list[Tensor] = []
        self._num_bytes = 0
        self._is_locking = runtime.pinnable_bytes() > 0

    def allocate(self, num_bytes: int) -> Tensor:
        """[num_bytes] uint8 of new memory, in whole pages of its own.

        Args:
            num_bytes: of the chunk.

        Returns:
            The chunk.

        Raises:
            OutOfRoomError: there is no more main memory.
        """
        try:
            memory = torch.empty(num_bytes + PAGESIZE, dtype=torch.uint8)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfRoomError(
                f"Main memory ran out when {self._num_bytes / 1e9:.1f} GB of the clip were in it: "
                'close other programs, or decode with mode "synced", which has no seams either and '
                "keeps nothing there."
            ) from error
        self._num_bytes += num_bytes
        chunk = memory[-memory.data_ptr() % PAGESIZE :][:num_bytes]
        if self._is_locking:
            try:
                self._runtime.pin(chunk)
                self._locked.append(chunk)
            except RuntimeError as error:
                self._is_locking = False
                dispatch.log_once(
                    "A part of the clip lies in main memory that is not page-locked, so that its "
                    f"copies are slow ({error})."
                )
        return chunk

    def release(self) -> None:
        """Unlock all pages; no copy may be under way."""
        while self._locked:
            self._runtime.unpin(self._locked.pop())


@contextmanager
def host_store(runtime: Runtime) -> Iterator[HostStore]:
    """A store for the runtime's device; all of it is free again after the block."""
    memory = HostMemory(runtime)
    store = HostStore(runtime.device, memory.allocate)
    try:
        yield store
    finally:
        store.close()
        memory.release()
