"""A decode on several ranks: each has a strip of rows, from the latents to the pixels.

A convolution reads one row beside a strip, so before each of them neighbours give one another the
rows at their edges, normalised and padded as they are read. A norm takes the moments of all strips,
and the attention in the middle sees the tokens of all. Nothing is computed twice but keys and
values of that attention, and the clip is that of one rank up to rounding.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..runtime.collectives import exchange, shares

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: mean and variance of each channel, each [B, C]
MeanAndVariance = tuple[Tensor, Tensor]


class Strips:
    """The strip of a rank, and what it needs of the others.

    Args:
        height: rows of the latents, at least one for each rank.
        group: of the ranks, top to bottom.
    """

    def __init__(self, height: int, group: "ProcessGroup") -> None:
        self._group = group
        self._rank, self._num_ranks = group.rank(), group.size()
        self._shares = shares(height, self._num_ranks)
        bottom = list(accumulate(self._shares))[self._rank]
        #: of the latents, that this rank has
        self.rows = slice(bottom - self._shares[self._rank], bottom)
        #: given to other ranks so far
        self.num_bytes = 0

    def largest(self, count: int) -> int:
        """What the largest strip has where this one has `count` elements or rows."""
        return count // self._shares[self._rank] * self._shares[0]

    def swap_rows(self, padded: Tensor) -> None:
        """Fill the rows of padding that lie inside of the clip with those of the neighbours.

        Args:
            padded: [B, C, t, rows + 2, W + 2] with replicated borders.
        """
        by_row = padded.permute(3, 0, 2, 4, 1)  # [rows + 2, B, t, W + 2, C]
        shape, nothing = by_row.shape[1:], by_row.new_empty(0)
        sent, shapes = [nothing] * self._num_ranks, [nothing.shape] * self._num_ranks
        # the row to give, and where that of the neighbour belongs
        beside = {self._rank - 1: (1, 0), self._rank + 1: (-2, -1)}
        beside = {rank: rows for rank, rows in beside.items() if 0 <= rank < self._num_ranks}
        for rank, (given, _) in beside.items():
            sent[rank], shapes[rank] = by_row[given], shape
        got = self._exchange(sent, shapes)
        for rank, (_, place) in beside.items():
            by_row[place] = got[rank]

    def whole_moments(self, mean: Tensor, variance: Tensor) -> MeanAndVariance:
        """Moments of the whole clip, from those of this strip; each [B, C], alike on all ranks."""
        own = torch.stack([mean, variance])
        found = self._exchange([own] * self._num_ranks, [own.shape] * self._num_ranks)
        means, variances = torch.stack(found, 1)
        weights = torch.tensor(self._shares, dtype=mean.dtype, device=mean.device)[:, None, None]
        return merged(means, variances, weights)

    def whole_rows(self, strip: Tensor) -> Tensor:
        """[B, T, rows, W, C] of this strip -> [B, T, H, W, C] of all."""
        unit = strip.shape[2] // self._shares[self._rank]
        shapes = [(*strip.shape[:2], unit * share, *strip.shape[3:]) for share in self._shares]
        return torch.cat(self._exchange([strip] * self._num_ranks, shapes), 2)

    def to_first(self, piece: Tensor) -> Tensor | None:
        """Rows of some frames of all strips, on the first rank; None on the others.

        Args:
            piece: [B, C, t, rows, W].

        Returns:
            [B, C, t, H, W], in memory [B, t, H, W, C].
        """
        by_frame = piece.permute(0, 2, 3, 4, 1)
        unit = by_frame.shape[2] // self._shares[self._rank]
        sent = [by_frame, *[by_frame.new_empty(0)] * (self._num_ranks - 1)]
        shapes: list[Sequence[int]] = [(0,)] * self._num_ranks
        if self._rank == 0:
            shapes = [
                (*by_frame.shape[:2], unit * share, *by_frame.shape[3:]) for share in self._shares
            ]
        got = self._exchange(sent, shapes)
        return torch.cat(got, 2).permute(0, 4, 1, 2, 3) if self._rank == 0 else None

    def _exchange(self, sent: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        others = (part.nbytes for rank, part in enumerate(sent) if rank != self._rank)
        self.num_bytes += sum(others)
        return exchange(sent, shapes, self._group)


def merged(means: Tensor, variances: Tensor, weights: Tensor) -> MeanAndVariance:
    """Moments of parts as those of the whole (Chan's parallel formula).

    Args:
        means: [parts, B, C].
        variances: [parts, B, C], divided by the counts.
        weights: [parts, 1, 1], in proportion to the counts.

    Returns:
        Each [B, C].
    """
    share = weights / weights.sum()
    mean = (means * share).sum(0)
    return mean, ((variances + (means - mean).square()) * share).sum(0)
