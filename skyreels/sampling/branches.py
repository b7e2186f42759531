"""Ranks in two groups: each makes the predictions of one branch of guidance, at the same time.

The first group has the positive prompts, the second one the negative prompts, and within a group
the ranks share each prediction (transformer/ulysses.py). After its own predictions each rank swaps
them with its mate, the rank of the other group that has the same share. So all ranks have all
predictions, and solver and caches work alike everywhere.

Lists of sparse attention are made by the first group. Mates attend with the same heads, so each
rank of the second group gets the lists of its heads from its mate, block by block.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from ..runtime.collectives import Ranks, exchange
from ..transformer.model import RunBlock
from ..transformer.sparse_attention import DenseRun, SparseRun
from .network import Alone, Asked, PredictBranch


class Mate(Alone):
    """The rank of the other group that has the same share.

    Args:
        ranks: in two groups.
        run: the attention of this rank.
        left_out: indices of blocks that weak predictions leave out.
    """

    def __init__(self, ranks: Ranks, run: DenseRun, left_out: Collection[int] = ()) -> None:
        assert ranks.side is not None
        self._ranks, self._side = ranks, ranks.side
        self._run = run if isinstance(run, SparseRun) else None
        self._left_out = left_out
        self._made: dict[int, Tensor] = {}
        self._tells: bool | None = None  # whether the kernel of the first group tells its lists
        if isinstance(run, SparseRun):
            run.makes_lists, run.swap = self._side == 0, self._swap_lists

    def start(self, asked: Asked, predict: PredictBranch) -> Collection[int]:
        """Make the predictions of this group and swap them for those of the other one.

        Args:
            asked: what the step takes, alike on all ranks.
            predict: makes one of them here.

        Returns:
            All branches.
        """
        mine = [branch for branch in asked.branches if (branch in asked.away) == (self._side == 1)]
        theirs = [branch for branch in asked.branches if branch not in mine]
        if self._run is not None:
            of_both = self._run.block_indices - set(self._left_out if asked.weak else ())
            self._run.swaps_in = of_both if mine and theirs else frozenset()
        made = [predict(branch) for branch in mine]
        nothing = asked.latents.new_empty(0)
        sent, shapes = [nothing, nothing], [nothing.shape, nothing.shape]
        if made:
            sent[1 - self._side] = torch.stack(made)
        shapes[1 - self._side] = torch.Size((len(theirs), *asked.latents.shape))
        got = exchange(sent, shapes, self._ranks.mates)[1 - self._side]
        self._made = dict(zip([*mine, *theirs], [*made, *got], strict=True))
        return asked.branches

    def result(self, branch: int, run_block: RunBlock | None = None) -> Tensor:
        """The prediction of a branch, which is there."""
        return self._made.pop(branch)

    def _swap_lists(
        self, bits: Tensor | None, shape: Sequence[int], device: torch.device
    ) -> Tensor | None:
        """Lists of the first group, given to the second one.

        Args:
            bits: uint8 of that shape, in the first group; None where its kernel tells nothing.
            shape: [B * heads, rows, bytes].
            device: of this rank.

        Returns:
            The same in both groups.
        """
        size = torch.Size(shape).numel()
        nothing = torch.empty(0, dtype=torch.uint8, device=device)
        if self._side == 0:
            told = torch.full((1,), bits is not None, dtype=torch.uint8, device=device)
            body = told.new_zeros(size) if bits is None else bits.reshape(-1)
            exchange([nothing, torch.cat([body, told])], [(0,), (0,)], self._ranks.mates)
            return bits
        got = exchange([nothing, nothing], [(size + 1,), (0,)], self._ranks.mates)[0]
        if self._tells is None:
            self._tells = bool(got[size])
        return got[:size].view(torch.Size(shape)) if self._tells else None
