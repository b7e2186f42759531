"""What the ranks of one clip tell one another, through torch.distributed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Ranks:
    """The ranks of one clip, as one of them sees them.

    Attributes:
        all: every rank; each has the whole clip between two steps.
        share: those that share each prediction of this rank; None where it makes them alone.
    """

    all: "ProcessGroup"
    share: "ProcessGroup | None"

    @property
    def is_first(self) -> bool:
        """Whether this rank is the one that gets the frames."""
        return self.all.rank() == 0

    @property
    def num_shares(self) -> int:
        """Ranks that share each prediction."""
        return 1 if self.share is None else self.share.size()


def shares(count: int, num_ranks: int) -> list[int]:
    """How many of `count` things each rank has; they differ by one at most."""
    least, more = divmod(count, num_ranks)
    return [least + (rank < more) for rank in range(num_ranks)]


def exchange(
    sent: Sequence[Tensor], shapes: Sequence[Sequence[int]], group: "ProcessGroup | None"
) -> list[Tensor]:
    """Give each rank a tensor and get one from each; all ranks take part.

    Args:
        sent: one to each rank, of one dtype and device; some may be empty.
        shapes: of those that come, one from each rank.
        group: of the ranks; None for all.

    Returns:
        What came, in the order of ranks.
    """
    import torch.distributed as dist

    buffer = torch.cat([part.reshape(-1) for part in sent])
    sizes = [torch.Size(shape).numel() for shape in shapes]
    got = buffer.new_empty(sum(sizes))
    dist.all_to_all_single(got, buffer, sizes, [part.numel() for part in sent], group=group)
    return [
        part.view(torch.Size(shape))
        for part, shape in zip(torch.split(got, sizes), shapes, strict=True)
    ]


def least_of(numbers: Sequence[int], device: torch.device, group: "ProcessGroup") -> list[int]:
    """The smallest that any rank has, of each of some whole numbers; one all-reduce."""
    import torch.distributed as dist

    found = torch.tensor(numbers, dtype=torch.int64, device=device)
    dist.all_reduce(found, dist.ReduceOp.MIN, group=group)
    return [int(number) for number in found.tolist()]
