"""What a decode out of main memory does, followed piece by piece without computing anything.

How much lies on the device depends on where pieces end and on which copies are under way, and a
short clip never has as many of them as a long one. So the sizes go the way that the pieces go in
model.py and store.py; a test compares both.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from .store import AHEAD, LEAVING


@dataclass
class Memory:
    """A tensor on the device, by its size alone.

    Attributes:
        num_elements: of it.
        owners: how many refer to it.
    """

    num_elements: int
    owners: int = 0


@dataclass(frozen=True, eq=False)
class Piece:
    """Some frames of a clip between two layers.

    Attributes:
        frames: their number.
        num_elements: of these.
        memory: on the device; None for a piece in main memory.
    """

    frames: int
    num_elements: int
    memory: Memory | None = None


@dataclass(frozen=True)
class Pass:
    """One layer's way through a clip.

    Attributes:
        products: multiplications of its convolutions.
        coming: elements that are copied to the device.
        leaving: elements that are copied to main memory.
    """

    products: int
    coming: int
    leaving: int


@dataclass
class Follower:
    """Sizes on their way through the layers at high resolution.

    Attributes:
        piece_elements: of the largest piece of a clip.
        most: elements that were on the device at once so far.
        passes: so far.
    """

    piece_elements: int
    most: int = 0
    passes: list[Pass] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._alive = self._coming = self._left = 0
        self._slots: list[tuple[Piece, Memory] | None] = [None] * LEAVING
        self._turn = 0

    def resnet(
        self,
        pieces: list[Piece],
        frame: tuple[int, int],
        padded: tuple[int, int],
        products: tuple[int, int],
    ) -> list[Piece]:
        """`ResnetBlock.forward`.

        Args:
            pieces: of the clip; taken off the list.
            frame: elements of a frame before and after.
            padded: the same with a pixel more on each side.
            products: of the first convolution with the shortcut, and of the second, in all.

        Returns:
            Pieces of the result.
        """
        has_shortcut = frame[0] != frame[1]
        residual, branch, result = [] if has_shortcut else list(pieces), [], []  # type: ignore[var-annotated]
        halo = self._new(0)
        for piece, _ in self._take(pieces, frame[0]):
            halo = self._convolve(piece.frames, padded[0], frame[1], halo, branch)
            if has_shortcut:
                self._put(residual, self._new(piece.frames * frame[1]), piece.frames)
        self._drop(halo)
        self._end(products[0])
        halo, parts = self._new(0), self._take(branch, frame[1])
        for piece, memory in self._take(residual, frame[1]):
            next(parts)
            halo = self._convolve(piece.frames, padded[1], frame[1], halo, None)
            self._put(result, self._own(memory), piece.frames)
        assert next(parts, None) is None
        self._drop(halo)
        self._end(products[1])
        return result

    def enlarge(
        self,
        pieces: list[Piece],
        frame: tuple[int, int],
        padded: int,
        copies: int,
        factors: tuple[int, int, int],
        products: int,
    ) -> list[Piece]:
        """`Resample.forward`.

        Args:
            pieces: of the clip; taken off the list.
            frame: elements of a frame before and after.
            padded: of a frame before, with a pixel more on each side.
            copies: elements that the convolution makes of a frame.
            factors: in (time, height, width).
            products: of the convolution, in all.

        Returns:
            Pieces of the result.
        """
        result: list[Piece] = []
        time, kept = factors[0], 1 if factors[0] > 1 and factors[1] > 1 else 2
        halo, is_first = self._new(0), time > 1
        growth = factors[0] * factors[1] * factors[2]
        for piece, _ in self._take(pieces, frame[0], growth):
            frames = piece.frames * time - is_first
            made = self._new(frames * frame[1])
            for half in _split(piece.frames, max(1, piece.frames // 2)):
                read = self._new((kept + half) * padded)
                halo = self._replace(halo, kept * padded)
                several = self._new(half * copies)
                self._drop(read)
                self._drop(several)
            self._put(result, made, frames)
            is_first = False
        self._drop(halo)
        self._end(products)
        return result

    def last(self, pieces: list[Piece], frame: tuple[int, int], padded: int, products: int) -> None:
        """The convolution to pixels.

        Args:
            pieces: of the clip; taken off the list.
            frame: elements of a frame before and after.
            padded: of a frame before, with a pixel more on each side.
            products: of the convolution, in all.
        """
        halo = self._new(0)
        for piece, _ in self._take(pieces, frame[0]):
            halo = self._convolve(piece.frames, padded, frame[1], halo, None)
        self._drop(halo)
        self._end(products)

    def begin(self, frames: int, frame: int, step: int) -> list[Piece]:
        """A clip on the device, in pieces of `step` frames."""
        return [Piece(part, part * frame, self._new(part * frame)) for part in _split(frames, step)]

    def _convolve(
        self, frames: int, padded: int, made: int, halo: Memory, result: list[Piece] | None
    ) -> Memory:
        """A convolution of some frames; gives the frames that it keeps for the next ones."""
        read = self._new((frames + 2) * padded)
        halo = self._replace(halo, 2 * padded)
        out = self._new(frames * made)
        self._drop(read)
        if result is None:
            self._drop(out)
        else:
            self._put(result, out, frames)
        return halo

    def _take(
        self, pieces: list[Piece], frame: int, growth: int = 1
    ) -> Iterator[tuple[Piece, Memory]]:
        """`Walk.take` from a store."""
        coming: deque[tuple[Piece, Memory]] = deque()
        pieces.reverse()
        while pieces or coming:
            while pieces and len(coming) < AHEAD:
                coming.append(self._bring(pieces.pop()))
            piece, memory = coming.popleft()
            step = max(1, self.piece_elements // (growth * frame))
            for part in _split(piece.frames, step):
                yield Piece(part, part * frame), memory
            self._drop(memory)

    def _bring(self, piece: Piece) -> tuple[Piece, Memory]:
        if piece.memory is not None:
            return piece, piece.memory
        for slot, left in enumerate(self._slots):
            if left is not None and left[0] is piece:
                self._release(slot)
        self._coming += piece.num_elements
        return piece, self._new(piece.num_elements)

    def _put(self, clip: list[Piece], memory: Memory, frames: int) -> None:
        """`Walk.put` of a tensor that only this refers to from now on."""
        frame = memory.num_elements // frames
        for part in _split(frames, max(1, self.piece_elements // frame)):
            self._release(self._turn)
            piece = Piece(part, part * frame)
            self._slots[self._turn] = (piece, self._own(memory))
            self._turn = (self._turn + 1) % LEAVING
            self._left += piece.num_elements
            clip.append(piece)
        self._drop(memory)

    def _release(self, slot: int) -> None:
        left = self._slots[slot]
        if left is not None:
            self._slots[slot] = None
            self._drop(left[1])

    def _replace(self, old: Memory, num_elements: int) -> Memory:
        self._drop(old)
        return self._new(num_elements)

    def _new(self, num_elements: int) -> Memory:
        self._alive += num_elements
        self.most = max(self.most, self._alive)
        return Memory(num_elements, 1)

    def _own(self, memory: Memory) -> Memory:
        memory.owners += 1
        return memory

    def _drop(self, memory: Memory) -> None:
        memory.owners -= 1
        if not memory.owners:
            self._alive -= memory.num_elements

    def _end(self, products: int) -> None:
        """End a pass."""
        self.passes.append(Pass(products, self._coming, self._left))
        self._coming = self._left = 0


def _split(frames: int, step: int) -> list[int]:
    """As torch.split: the last part may be shorter."""
    return [min(step, frames - start) for start in range(0, frames, step)]
