"""Sparse attention through a run: who is sparse when, by which kernel, and how dense it was.

`SparseRun` is the attention of one run (kernels/sparse.py says what sparse attention computes). The
sampler tells it the step and the branches of guidance before each forward pass, and it wraps
`run_block` to know the block; the calls of the text refiner, outside any block, are dense. The
first 20 % of the steps and the first two blocks are dense: errors made there grow most.

All branches of a step share the lists of exact blocks of the first one, as they share the decision
of a step cache: errors of the two predictions then cancel in their difference, which guidance
multiplies by five. Between the branches the lists wait as bits, on a GPU in pinned host memory.

The transformer works in the order `hilbert_order` throughout, in dense steps too, so that what a
step cache keeps fits every step.
"""

import logging
import math
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import OptionError
from ..kernels.sparse import BLOCK, SparseAttention, num_blocks
from .fast_attention import Attention
from .model import RunBlock
from .token_order import hilbert_order

logger = logging.getLogger("skyreels.transformer.sparse_attention")

#: between two looks whether the run that makes lists has stopped
WAIT_SECONDS = 0.05


#: swap(bits, shape, device): to the other group of ranks, or from it where bits are None
SwapLists = Callable[[Tensor | None, Sequence[int], torch.device], Tensor | None]


def _never_stop() -> None:
    """The check of a run that waits for nobody."""


@dataclass(frozen=True)
class SparseConfig:
    """How sparse a run is, and where it is not.

    Attributes:
        beta: standard deviations by which the score of a block must exceed the mean to be exact;
            of Gaussian scores 1 - Phi(beta) of all: 20 % for 0.85, 13.6 % for 1.1.
        dense_share: of the steps, first ones that are dense, 0..1.
        dense_last: likewise of the last ones.
        dense_blocks: first blocks of the transformer that are dense.
        min_tokens: of image and text; shorter sequences are dense, where sparsity gains nothing.

    Raises:
        OptionError: a value outside its range.

    Source: Sol-Attn arXiv:2607.24027 (20 % of the steps dense); Chipmunk (two blocks dense). The
        second block costs 1 % of a run, and dense it halves the error of the velocity on the second
        yardstick (tests/bench/LOG.md).
    """

    beta: float = 0.85
    dense_share: float = 0.2
    dense_last: float = 0.0
    dense_blocks: int = 2
    min_tokens: int = 12_000

    def __post_init__(self) -> None:
        if math.isnan(self.beta):
            raise OptionError("beta of sparse attention is NaN: use 0.85, or 1.1 for fewer blocks.")
        for name in ("dense_share", "dense_last"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise OptionError(f"{name} {getattr(self, name)} is not within 0..1: use 0.2.")
        if self.dense_blocks < 0:
            raise OptionError(f"dense_blocks {self.dense_blocks} is negative: use 2.")

    def is_dense(self, step: int, num_steps: int) -> bool:
        """Whether all blocks of a step are dense."""
        return step < self.first_sparse(num_steps) or step >= num_steps - math.floor(
            self.dense_last * num_steps
        )

    def first_sparse(self, num_steps: int) -> int:
        """The first step, from 0, that is not dense; may be `num_steps`."""
        return math.ceil(self.dense_share * num_steps)


#: what users choose from
SPARSE = {"sparse": SparseConfig(0.85), "sparser": SparseConfig(1.1)}


class Densities(NamedTuple):
    """Shares of the pairs of an image block and any block that were attended to exactly.

    Attributes:
        mean: of all attention in the blocks of the transformer, where dense is 1.
        sparse: of that which was sparse; NaN if none was.
        by_step: step -> mean, of the steps that ran.
        by_block: block of the transformer -> mean of the sparse steps.
        by_head: head -> mean of what was sparse.
    """

    mean: float
    sparse: float
    by_step: dict[int, float]
    by_block: dict[int, float]
    by_head: dict[int, float]


class DenseRun:
    """The attention of a run that is the same at every step and in every block.

    Args:
        attention: that function.
    """

    #: of the tokens, see `SkyReelsTransformer.denoise_together`; None is the raster order
    order: Tensor | None = None
    #: likewise; None where all tokens are here
    gather: Callable[[Tensor], Tensor] | None = None
    #: steps that a cache must not skip
    always: Collection[int] = ()

    def __init__(self, attention: Attention) -> None:
        self._dense = attention

    def begin_step(self, step: int) -> None:
        """Begin a step.

        Args:
            step: its index in the schedule.
        """

    def begin(self, branches: Sequence[int], part: int = 0) -> None:
        """Begin a forward pass.

        Args:
            branches: that it predicts together.
            part: which part of the clip it sees, where a prediction takes several.
        """

    def around(self, run_block: RunBlock) -> RunBlock:
        """Run blocks, and know which one runs for which branch."""
        return run_block

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """An `Attention`."""
        return self._dense(query, key, value)

    def report(self) -> None:
        """Log how dense the run was; called once, after its last step."""


class SparseRun(DenseRun):
    """The attention of a run that is sparse where it may be.

    Args:
        config: who is sparse.
        kernel: that attends where it is.
        dense: attends elsewhere.
        grid: tokens of the image in time, height and width.
        num_steps: of the whole schedule.
        blocks: the transformer's, in order.
        heads: of its attention.
        device: that computes.
        follows: a run of the same step on another device, whose lists it takes; it is asked for
            them from another thread than the one that makes them.
    """

    def __init__(
        self,
        config: SparseConfig,
        kernel: SparseAttention,
        dense: Attention,
        *,
        grid: tuple[int, int, int],
        num_steps: int,
        blocks: Sequence[nn.Module],
        heads: int,
        device: torch.device | str,
        follows: "SparseRun | None" = None,
    ) -> None:
        super().__init__(dense)
        self._follows = follows
        self.check: Callable[[], None] = _never_stop
        #: of two groups of ranks (sampling/branches.py): whether lists are made in this one, how
        #: they are told, see `SwapLists`, and the blocks that run in both groups
        self.makes_lists = True
        self.swap: SwapLists | None = None
        self.swaps_in: Collection[int] = ()
        self.always = (config.first_sparse(num_steps),)  # the first of its kind
        self.config, self._kernel, self._num_steps = config, kernel, num_steps
        #: [N] the token at each place of the curve, for `SkyReelsTransformer.denoise`
        self.order = hilbert_order(grid).to(device)
        self._num_image_blocks = len(self.order) // BLOCK
        self._indices = {id(block): index for index, block in enumerate(blocks)}
        self.block_indices = frozenset(self._indices.values())
        self._step, self._part = 0, 0
        self._branches: Sequence[int] = ()
        self._leader: int | None = None
        self._block, self._head = -1, 0  # -1: outside the blocks of the transformer
        self._last_block, self._place = -1, 0
        #: (part, block, first head) -> bits that the leader chose in this step
        self._lists: dict[tuple[int, int, int], Tensor] = {}
        #: likewise -> the step of these lists, and on a GPU what tells that they are on the host
        self._made: dict[tuple[int, int, int], tuple[int, Any]] = {}
        self._is_made = threading.Condition()
        # pairs of blocks, [steps, blocks, heads]: visited by sparse attention, all of it, dense
        shape = (num_steps, len(self._indices), heads)
        self._visited = torch.zeros(shape, dtype=torch.int64, device=device)
        self._sparse, self._dense_pairs = torch.zeros(2, *shape, dtype=torch.int64)

    def begin_step(self, step: int) -> None:
        """Begin a step; its first branch will choose what is exact."""
        self._step, self._leader = step, None

    def begin(self, branches: Sequence[int], part: int = 0) -> None:
        """Begin a forward pass."""
        self._branches, self._part, self._last_block = branches, part, -1
        if self._leader is None:
            self._leader = branches[0]

    def around(self, run_block: RunBlock) -> RunBlock:
        """Run blocks, and know which one runs for which branch."""

        def run(block: nn.Module, *args: Any) -> Any:
            index = self._indices.get(id(block))
            if index is None:
                return run_block(block, *args)
            # a block runs once for each branch, in a row
            self._place = self._place + 1 if index == self._last_block else 0
            self._block, self._last_block, self._head = index, index, 0
            try:
                return run_block(block, *args)
            finally:
                self._block = -1

        return run

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """An `Attention`."""
        if self._block < 0:
            return self._dense(query, key, value)
        first, count = self._head, query.shape[1]
        self._head += count  # a block may attend with some heads at a time
        of_call = (self._step, self._block, slice(first, self._head))
        rows, all_blocks = self._num_image_blocks, num_blocks(key.shape[2])
        pairs = query.shape[0] * rows * all_blocks
        if self._block < self.config.dense_blocks or self.config.is_dense(
            self._step, self._num_steps
        ):
            self._dense_pairs[of_call] += pairs
            return self._dense(query, key, value)
        place, leads = (self._part, self._block, first), self._leads()
        swap = self.swap if leads and self._block in self.swaps_in else None
        shape = (query.shape[0] * count, rows, -(-rows // 8))
        known = None if leads else self._known(place, query.device)
        if swap is not None and not self.makes_lists:
            known = swap(None, shape, query.device)
            self._keep(place, known)
        result = self._kernel(query, key, value, self.config.beta, rows, known)
        if leads and known is None:
            self._keep(place, result.exact)
            if swap is not None and self.makes_lists:
                swap(result.exact, shape, query.device)
        visited = result.counts.view(-1, count, rows).sum(dim=(0, 2))
        self._visited[of_call] += visited + query.shape[0] * rows * (all_blocks - rows)
        self._sparse[of_call] += pairs
        return result.out

    def _leads(self) -> bool:
        return self._follows is None and self._branches[self._place] == self._leader

    def _keep(self, place: tuple[int, int, int], bits: Tensor | None) -> None:
        """Keep what the leader chose, None where its kernel tells nothing."""
        arrived = None
        if bits is not None and bits.device.type == "cuda":
            if place not in self._lists:
                self._lists[place] = torch.empty(bits.shape, dtype=bits.dtype, pin_memory=True)
            self._lists[place].copy_(bits, non_blocking=True)
            arrived = torch.cuda.current_stream(bits.device).record_event()
        elif bits is not None:
            self._lists[place] = bits
        with self._is_made:
            self._made[place] = self._step, arrived
            self._is_made.notify_all()

    def _known(self, place: tuple[int, int, int], device: torch.device) -> Tensor | None:
        """What the leader chose in this step, on the device."""
        leader = self._follows or self
        if self._follows is not None:
            arrived = leader._wait_for(place, self._step, self.check)
            if arrived is not None and device.type == "cuda":
                torch.cuda.current_stream(device).wait_event(arrived)
        known = leader._lists.get(place)
        return None if known is None else known.to(device, non_blocking=True)

    def _wait_for(self, place: tuple[int, int, int], step: int, check: Callable[[], None]) -> Any:
        """Wait until lists of a step are made, in the thread of another run."""
        with self._is_made:
            while self._made.get(place, (-1, None))[0] != step:
                check()
                self._is_made.wait(WAIT_SECONDS)
            return self._made[place][1]

    def densities(self) -> Densities:
        """What has been measured so far; waits for the device."""
        visited, pairs, dense = self._visited.cpu(), self._sparse, self._dense_pairs

        def means(part: Tensor, whole: Tensor, axes: tuple[int, ...]) -> dict[int, float]:
            sums = zip(part.sum(dim=axes).tolist(), whole.sum(dim=axes).tolist(), strict=True)
            return {index: some / total for index, (some, total) in enumerate(sums) if total}

        total, of_sparse = int((pairs + dense).sum()), int(pairs.sum())
        return Densities(
            int((visited + dense).sum()) / total if total else math.nan,
            int(visited.sum()) / of_sparse if of_sparse else math.nan,
            means(visited + dense, pairs + dense, (1, 2)),
            means(visited, pairs, (0, 2)),
            means(visited, pairs, (0, 1)),
        )

    def report(self) -> None:
        """Log how dense the run was; called once, after its last step."""
        found = self.densities()
        if math.isnan(found.sparse):
            logger.info("Sparse attention: no step was sparse.")
            return
        steps = self._sparse.sum(dim=(1, 2)).nonzero().flatten() + 1
        logger.info(
            "Sparse attention attended to %.1f %% of the pairs of blocks in steps %d to %d (blocks "
            "of the transformer: %s; heads: %s), and to %.1f %% in the whole run.",
            100 * found.sparse,
            int(steps[0]),
            int(steps[-1]),
            _span(found.by_block),
            _span(found.by_head),
            100 * found.mean,
        )
        for name, each in (
            ("step", found.by_step),
            ("block", found.by_block),
            ("head", found.by_head),
        ):
            shares = ", ".join(f"{index} {100 * share:.1f}" for index, share in each.items())
            logger.debug("Sparse attention, per cent by %s: %s.", name, shares)


def _span(shares: dict[int, float]) -> str:
    return f"{100 * min(shares.values()):.1f} to {100 * max(shares.values()):.1f} %"
