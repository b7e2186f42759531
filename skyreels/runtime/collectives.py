"""What the ranks of one clip tell one another, through torch.distributed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")
#: of a clip
MAX_RANKS = 8


@dataclass(frozen=True)
class Ranks:
    """The ranks of one clip, as one of them sees them.

    Attributes:
        all: every rank; each has the whole clip between two steps.
        share: those that share each prediction of this rank; None where it makes them alone.
        side: of guidance, 0 or 1, of which this rank's group makes the predictions; None where
            there is one group for both (sampling/branches.py).
        mates: this rank and that of the other group with the same share, the first group's first.
    """

    all: "ProcessGroup"
    share: "ProcessGroup | None"
    side: int | None = None
    mates: "ProcessGroup | None" = None

    def __str__(self) -> str:
        if self.side is None:
            return f"{self.all.size()} ranks share each prediction"
        text = f"{self.all.size()} ranks in two groups, one for each branch of guidance"
        return text if self.share is None else f"{text}; {self.num_shares} share a prediction"

    @property
    def is_first(self) -> bool:
        """Whether this rank is the one that gets the frames."""
        return self.all.rank() == 0

    @property
    def num_shares(self) -> int:
        """Ranks that share each prediction."""
        return 1 if self.share is None else self.share.size()


def one_group() -> Ranks:
    """All processes of torch.distributed as ranks that share each prediction."""
    import torch.distributed as dist

    assert dist.group.WORLD is not None
    return Ranks(dist.group.WORLD, dist.group.WORLD)


def two_groups() -> Ranks:
    """All processes, an even number, as two groups, one for each branch of guidance."""
    import torch.distributed as dist

    num_shares, side = dist.get_world_size() // 2, dist.get_rank() * 2 // dist.get_world_size()
    # every process takes part in making every group
    halves = [dist.new_group(list(range(first, first + num_shares))) for first in (0, num_shares)]
    mates = [dist.new_group([share, share + num_shares]) for share in range(num_shares)]
    world = dist.group.WORLD
    assert world is not None
    return Ranks(
        world,
        halves[side] if num_shares > 1 else None,
        side,
        mates[dist.get_rank() % num_shares],
    )


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


class Peers:
    """Who else decides about the steps of a run: nobody."""

    def agree(self, decision: bool) -> bool:
        """The decision of the first one, for all."""
        return decision

    def add_up(self, sums: Tensor) -> Tensor:
        """Sums over the tokens that are here, those of all who share a prediction."""
        return sums


class RankPeers(Peers):
    """The other ranks.

    Args:
        ranks: of the run.
        device: of this rank.
    """

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        self._ranks, self._device = ranks, device

    def agree(self, decision: bool) -> bool:
        """The decision of the first rank, for all."""
        import torch.distributed as dist

        group = self._ranks.all
        told = torch.tensor([decision], dtype=torch.uint8, device=self._device)
        dist.broadcast(told, dist.get_global_rank(group, 0), group=group)
        return bool(told)

    def add_up(self, sums: Tensor) -> Tensor:
        """Sums over the tokens of this rank, those of all that share a prediction."""
        import torch.distributed as dist

        if self._ranks.share is not None:
            dist.all_reduce(sums, group=self._ranks.share)
        return sums


NOBODY = Peers()


def told_by_first(value: T, device: torch.device, group: "ProcessGroup") -> T:
    """What the first rank has, on all: any object that can be pickled."""
    import torch.distributed as dist

    values = [value]
    source = dist.get_global_rank(group, 0)
    dist.broadcast_object_list(values, source, group=group, device=device)
    return values[0]


def made_by_first(make: Callable[[], T], ranks: Ranks | None) -> T:
    """What the first rank makes in main memory, for all; without ranks it is made here."""
    if ranks is None:
        return make()
    made = cast(T, make() if ranks.is_first else None)  # of the others nothing is asked
    return told_by_first(made, torch.device("cpu"), ranks.all)


def least_of(numbers: Sequence[int], device: torch.device, group: "ProcessGroup") -> list[int]:
    """The smallest that any rank has, of each of some whole numbers; one all-reduce."""
    import torch.distributed as dist

    found = torch.tensor(numbers, dtype=torch.int64, device=device)
    dist.all_reduce(found, dist.ReduceOp.MIN, group=group)
    return [int(number) for number in found.tolist()]
