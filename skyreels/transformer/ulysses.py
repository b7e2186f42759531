"""One forward pass on several ranks: each has a part of the image tokens, and some of the heads.

Outside attention a rank has its tokens and all of the text, with the weights of all layers. For
attention the ranks exchange: each gets all image tokens of its heads, attends, and gives back what
belongs to the others (Ulysses). No length needs to divide by the number of ranks; heads do.

Everything else of a run is alike on all ranks, so nothing has to be told: noise comes from the
seed, predictions are gathered whole, and every decision follows from them.

Source: DeepSpeed-Ulysses arXiv:2309.14509.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import OptionError
from ..runtime.collectives import MAX_RANKS, exchange, shares
from .model import RunBlock
from .sparse_attention import DenseRun

#: tensors as large as a rank's tokens that an exchange takes beside queries, keys and values: these
#: stacked, those that came, and all in order
EXCHANGED_TENSORS = 9


def check_ranks(num_ranks: int, heads: int, num_groups: int = 1) -> None:
    """Refuse a number of ranks by which heads do not divide.

    Args:
        num_ranks: of a group, at least 1.
        heads: of the transformer.
        num_groups: of so many ranks.

    Raises:
        OptionError: the heads of attention cannot be shared out.
    """
    if heads % num_ranks:
        counts = [num_groups * n for n in range(1, heads + 1) if heads % n == 0]
        fitting = ", ".join(str(n) for n in counts if 2 <= n <= MAX_RANKS) or 1
        groups = "" if num_groups == 1 else f" in each of {num_groups} groups"
        raise OptionError(
            f"{num_ranks} ranks{groups} cannot share {heads} heads of attention: use {fitting}."
        )


def exchanged_bytes(
    tokens: int, text_tokens: int, hidden_size: int, itemsize: int, num_ranks: int
) -> float:
    """Bytes that a rank gives to a block's two exchanges, its own part among them.

    Args:
        tokens: image and text tokens.
        text_tokens: of these; every rank gets what all heads make of them.
        hidden_size: of the transformer.
        itemsize: bytes of an activation's number.
        num_ranks: that share the image tokens.

    Returns:
        Queries, keys and values of a share of the image tokens, and the results; and the text.
    """
    shared = 4 * (tokens - text_tokens) / num_ranks
    return (shared + text_tokens) * hidden_size * itemsize


class UlyssesRun(DenseRun):
    """The attention of a run whose tokens are shared out.

    Args:
        run: attends with the heads of this rank; all tokens are in its order.
        num_tokens: of the image, on all ranks together.
        heads: of the transformer.
        blocks: of the transformer; what attends outside them, as the text refiner, is alike on all
            ranks.
        device: of this rank.
        group: of the ranks; None for all.

    Raises:
        OptionError: see `check_ranks`.
    """

    def __init__(
        self,
        run: DenseRun,
        num_tokens: int,
        heads: int,
        *,
        blocks: Sequence[nn.Module],
        device: torch.device,
        group: "dist.ProcessGroup | None" = None,
    ) -> None:
        super().__init__(run)
        self._run, self._group = run, group
        self._num_ranks, self._rank = dist.get_world_size(group), dist.get_rank(group)
        check_ranks(self._num_ranks, heads)
        self.always = run.always
        self._shares = shares(num_tokens, self._num_ranks)
        whole = torch.arange(num_tokens, device=device) if run.order is None else run.order
        self._whole = whole
        self.order = torch.split(whole, self._shares)[self._rank]
        self.gather = self._gather
        self._blocks, self._is_in_block = {id(block) for block in blocks}, False
        #: sent to all ranks, this one too, since the run began
        self.num_bytes = 0

    def begin_step(self, step: int) -> None:
        """Begin a step."""
        self._run.begin_step(step)

    def begin(self, branches: Sequence[int], part: int = 0) -> None:
        """Begin a forward pass."""
        self._run.begin(branches, part)

    def around(self, run_block: RunBlock) -> RunBlock:
        """Run blocks, and know that one runs."""
        inner = self._run.around(run_block)

        def run(block: nn.Module, *args: Any) -> Any:
            self._is_in_block = id(block) in self._blocks
            try:
                return inner(block, *args)
            finally:
                self._is_in_block = False

        return run

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """An `Attention` of the tokens of this rank, the text behind them."""
        if not self._is_in_block:
            return self._run(query, key, value)
        batch, heads, length, width = query.shape
        if heads % self._num_ranks:
            check_ranks(self._num_ranks, heads)
        here, own = self._shares[self._rank], heads // self._num_ranks
        text = length - here
        mine = slice(self._rank * own, (self._rank + 1) * own)

        stacked = torch.stack([query, key, value])  # [3, B, heads, S, D]
        by_rank = torch.unflatten(stacked[:, :, :, :here], 2, (self._num_ranks, own))
        shapes = [(3, batch, own, tokens, width) for tokens in self._shares]
        parts = self._exchange(list(by_rank.movedim(2, 0)), shapes)
        q, k, v = torch.cat([*parts, stacked[:, :, mine, here:]], dim=3)
        del stacked, by_rank, parts
        out = self._run(q, k, v)  # [B, own, N + text, D]

        *images, words = torch.split(out, [*self._shares, text], dim=2)
        shape = (batch, own, length, width)
        back = self._exchange(
            [torch.cat([image, words], dim=2) for image in images], [shape] * self._num_ranks
        )
        # laid out as [B, S, heads, D], which the next projection reads
        return torch.cat([part.transpose(1, 2) for part in back], dim=2).transpose(1, 2)

    def _exchange(self, sent: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Send a tensor to each rank; of those that come, one from each, the shapes are known."""
        self.num_bytes += sum(part.nbytes for part in sent)
        return exchange(sent, shapes, self._group)

    def _gather(self, patches: Tensor) -> Tensor:
        """[B, n, C] of the tokens of this rank -> [B, N, C] of all, in raster order."""
        most = max(self._shares)
        padded = nn.functional.pad(patches, (0, 0, 0, most - patches.shape[1]))
        with torch.inference_mode(False):  # gloo of torch 2.5 fills them in a thread of its own
            all_of = [torch.empty_like(padded) for _ in self._shares]
        dist.all_gather(all_of, padded.contiguous(), group=self._group)
        joined = torch.cat(
            [part[:, :count] for part, count in zip(all_of, self._shares, strict=True)], dim=1
        )
        return torch.empty_like(joined).index_copy_(1, self._whole, joined)

    def report(self) -> None:
        """As of the run of this rank."""
        self._run.report()
