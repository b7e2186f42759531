"""Reuse predictions of an earlier step, so that a run computes fewer of them.

Between two steps of a long schedule the velocity changes little, so some steps can be skipped. The
result differs from the exact clip, so caching is off by default.

Both branches of guidance skip the same steps: if only one branch were refreshed, guidance would
amplify the error of the stale one sixfold. The positive branch decides and the negative one
follows. The first 15 and the last 5 per cent of the steps, which matter most, are always computed,
and at most three steps in a row are skipped, so that an estimate is soon compared with the truth.
"""

import logging
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import TransformerConfig
from ..errors import OptionError
from ..runtime.collectives import NOBODY, Peers
from ..transformer.layers import DoubleBlock, SingleBlock
from ..transformer.model import RunBlock

logger = logging.getLogger("skyreels.sampling.step_cache")

KINDS = ("off", "easy", "first-block")
#: per cent of the steps that are never skipped, at least one step each
PROTECTED_START, PROTECTED_END = 15, 5
#: skipped steps after which the next one is computed
MAX_SKIPPED_IN_A_ROW = 3
#: tokens that the first-block cache compares, spread over all
COMPARED_TOKENS = 4096

#: forward(run_block) -> [1, 16, T, h, w] float32: one branch's prediction, computed
Forward = Callable[[RunBlock], Tensor]


@dataclass(frozen=True)
class CacheConfig:
    """Which steps are skipped.

    Attributes:
        kind: "off"; "easy", see `EasyCache`; "first-block", see `FirstBlockCache`.
        threshold: relative change, 0..1, below which a step is skipped; 0 skips none.
    """

    kind: str = "off"
    threshold: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise OptionError(f"Cache {self.kind!r} is not one of {', '.join(KINDS)}.")
        if not 0.0 <= self.threshold <= 1.0:
            raise OptionError(
                f"Cache threshold {self.threshold} is not within 0..1: use one of CACHES, or 0 to "
                "skip no step."
            )


OFF = CacheConfig()
#: what users choose from; 0.025 is what EasyCache's authors use for HunyuanVideo. Measured on 24
#: clips of the built-in model (the last two on 11): model evaluations saved, median PSNR to the
#: exact clips
CACHES = {
    "off": OFF,
    "easy": CacheConfig("easy", 0.025),  # 1.7 times fewer, 69 dB
    "fast": CacheConfig("easy", 0.05),  # 2.1 times fewer, 64 dB; at 0.1 some clips go wrong
    "first-block": CacheConfig("first-block", 0.04),  # 1.7 times fewer, 66 dB; at 0.1 the same
}


def is_protected(step: int, num_steps: int) -> bool:
    """Whether a step is one of the first or last that are always computed."""
    return step < protected_start(num_steps) or step >= num_steps - _percent(
        PROTECTED_END, num_steps
    )


def protected_start(num_steps: int) -> int:
    """How many first steps are always computed."""
    return _percent(PROTECTED_START, num_steps)


def _percent(share: int, num_steps: int) -> int:
    return max(1, -(-share * num_steps // 100))


def cache_bytes(
    config: CacheConfig,
    transformer: TransformerConfig,
    latent_shape: Sequence[int],
    num_image_tokens: int,
    num_branches: int,
    dtype: torch.dtype,
) -> int:
    """Bytes that a cache holds through a run.

    Args:
        config: the cache.
        transformer: sizes of the network.
        latent_shape: [1, 16, T, h, w].
        num_image_tokens: of the clip.
        num_branches: 1, or 2 with guidance.
        dtype: of the activations.

    Returns:
        0 if the cache is off.
    """
    if config.kind == "easy":
        return (1 + num_branches) * 4 * math.prod(latent_shape)
    if config.kind == "first-block":
        compared = len(range(0, num_image_tokens, _stride(num_image_tokens)))
        tokens = num_branches * num_image_tokens + 2 * compared
        return tokens * transformer.hidden_size * dtype.itemsize
    return 0


class StepCache:
    """Computes every step: the cache that is off, and the base of the others.

    One object belongs to one run, so that a cancelled or failed run leaves nothing behind. The
    sampler calls `begin` once a step, then `predict` for each of its branches. A branch is a
    prompt; the first one of a step decides, and the others follow.

    Args:
        num_steps: of the whole schedule.
        run_block: runs one block of the transformer.
        always: steps that are computed beside the protected ones.
        peers: with whom it decides.
    """

    kind = "off"

    def __init__(
        self,
        num_steps: int,
        run_block: RunBlock,
        *,
        always: Collection[int] = (),
        peers: Peers = NOBODY,
    ) -> None:
        self.num_steps = num_steps
        self.peers = peers
        self.run_block = run_block
        self.always = frozenset(always)
        self.skipped: list[int] = []
        #: whether the current step is skipped; known once its positive branch is there
        self.skips = False

    def begin(self, step: int, latents: Tensor, branches: Sequence[int]) -> None:
        """Begin a step.

        Args:
            step: its index in the schedule.
            latents: [1, 16, T, h, w] float32, its input.
            branches: the predictions of this step, in their order.
        """

    def predict(self, branch: int, forward: Forward) -> Tensor:
        """The prediction of a branch, [1, 16, T, h, w] float32; `forward` computes it."""
        return forward(self.run_block)

    def may_skip(self, step: int) -> bool:
        """Whether a step may be skipped at all, however little it is expected to change."""
        if is_protected(step, self.num_steps) or step in self.always:
            return False
        before = list(range(step - MAX_SKIPPED_IN_A_ROW, step))
        return self.skipped[-MAX_SKIPPED_IN_A_ROW:] != before

    def report(self) -> None:
        """Log which steps were skipped, counted from 1; called once, at the last step."""
        if self.kind == "off":
            return
        steps = ", ".join(str(step + 1) for step in self.skipped) or "none"
        logger.info(
            "Cache %s skipped %d of %d steps: %s.",
            self.kind,
            len(self.skipped),
            self.num_steps,
            steps,
        )


class EasyCache(StepCache):
    """Predicts the output from the input: output = input + (output - input of an earlier step).

    The ratio of output change to input change hardly varies from step to step. So this ratio at the
    last two computed steps, times the change of the input since then, estimates the change of the
    output; if that is below the threshold, relative to the output, the step is skipped.

    Holds one latent-sized tensor and one more for each branch.

    Source: arXiv:2507.02860 (EasyCache), which sums the changes of the input step by step.
    """

    kind = "easy"

    def __init__(
        self,
        num_steps: int,
        run_block: RunBlock,
        threshold: float,
        *,
        always: Collection[int] = (),
        peers: Peers = NOBODY,
    ) -> None:
        super().__init__(num_steps, run_block, always=always, peers=peers)
        self.threshold = threshold
        self._latents: Tensor | None = None  # input of this step
        self._computed: Tensor | None = None  # input of the last computed step, its outputs
        self._outputs: dict[int, Tensor] = {}
        self._rate: Tensor | None = None
        self._leader = 0

    def begin(self, step: int, latents: Tensor, branches: Sequence[int]) -> None:
        """Decide whether to skip a step."""
        self._latents = latents
        known = all(branch in self._outputs for branch in branches)
        if branches[0] != self._leader:  # its outputs cannot be compared with another prompt's
            known, self._rate, self._leader = False, None, branches[0]
        self.skips = known and self.may_skip(step) and self._changes_little()
        if self.skips:
            self.skipped.append(step)

    def _changes_little(self) -> bool:
        return self.peers.agree(self._change() < self.threshold)

    def _change(self) -> float:
        """Expected change of the output since the last computed step, relative."""
        if self._rate is None or self._latents is None or self._computed is None:
            return float("inf")
        distance = (self._latents - self._computed).abs().mean()
        # 0 / 0 gives NaN, which is not below any threshold
        return float(self._rate * distance / self._outputs[self._leader].abs().mean())

    def predict(self, branch: int, forward: Forward) -> Tensor:
        """The prediction of a branch, computed or estimated."""
        assert self._latents is not None
        if self.skips:
            assert self._computed is not None
            return self._latents + (self._outputs[branch] - self._computed)
        output = forward(self.run_block)
        if branch == self._leader:
            if self._computed is not None and branch in self._outputs:
                distance = (self._latents - self._computed).abs().mean()
                self._rate = (output - self._outputs[branch]).abs().mean() / distance
            self._computed = self._latents
            self._outputs.clear()
        self._outputs[branch] = output
        return output


class FirstBlockCache(StepCache):
    """Runs the first block, and the others only if its residual has changed.

    The first block's residual on the image tokens is compared with that of the last computed step.
    If it differs by less than the threshold, the residual of all the other blocks is added again.

    Holds for each branch one tensor of the size of the image tokens. Blocks may work in place.

    Args:
        num_steps: of the whole schedule.
        run_block: runs one block of the transformer.
        threshold: relative change of the first residual below which a step is skipped.
        first: block of the transformer, a double one.
        last: block of the transformer, a single one.
        always: steps that are computed beside the protected ones.

    Source: the first-block cache of ParaAttention (no paper), after arXiv:2411.02397 (AdaCache).
    """

    kind = "first-block"

    def __init__(
        self,
        num_steps: int,
        run_block: RunBlock,
        threshold: float,
        *,
        first: nn.Module,
        last: nn.Module,
        always: Collection[int] = (),
        peers: Peers = NOBODY,
    ) -> None:
        super().__init__(num_steps, run_block, always=always, peers=peers)
        self.threshold = threshold
        self.first, self.last = first, last
        self._step, self._branch = 0, 0
        self._branches: Sequence[int] = (0,)
        self._leader = 0  # whose first residual is kept
        self._num_tokens = 0
        self._first_residual: Tensor | None = None  # of the first block, on the compared tokens
        self._residuals: dict[int, Tensor] = {}  # of all other blocks, on the image tokens

    def begin(self, step: int, latents: Tensor, branches: Sequence[int]) -> None:
        """Begin a step; its first block decides whether it is skipped."""
        self._step, self._branches, self.skips = step, branches, False

    def predict(self, branch: int, forward: Forward) -> Tensor:
        """The prediction of a branch, from all blocks or from the first alone."""
        self._branch = branch
        return forward(self._run)

    def _run(self, block: nn.Module, *args: Any) -> Any:
        if block is self.first:
            return self._run_first(block, *args)
        if not self.skips or not isinstance(block, DoubleBlock | SingleBlock):
            result = self.run_block(block, *args)
            if block is self.last:
                self._residuals[self._branch] += result[:, : self._num_tokens]
            return result
        if isinstance(block, DoubleBlock):
            return args[:2]
        joined = args[0]
        if block is self.last:  # the model has joined the streams for these blocks alone
            joined[:, : self._num_tokens] += self._residuals[self._branch]
        return joined

    def _run_first(self, block: nn.Module, img: Tensor, *args: Any) -> tuple[Tensor, ...]:
        stride = _stride(img.shape[1])
        before = img[:, ::stride].clone()
        img, *others = self.run_block(block, img, *args)
        if self._branch == self._branches[0]:
            self._decide(img[:, ::stride] - before)
        if not self.skips:
            # the last block's output is added to this, which makes the residual without a third
            # tensor
            self._residuals[self._branch] = -img
            self._num_tokens = img.shape[1]
        return img, *others

    def _decide(self, residual: Tensor) -> None:
        known = all(branch in self._residuals for branch in self._branches)
        known = known and self._branch == self._leader
        if known and self.may_skip(self._step):
            assert self._first_residual is not None
            difference = (residual - self._first_residual).abs().mean(dtype=torch.float32)
            before = self._first_residual.abs().mean(dtype=torch.float32)
            # ranks with a part of the tokens each: sums, as their numbers may differ by one
            sums = self.peers.add_up(torch.stack([difference, before]) * residual.numel())
            self.skips = self.peers.agree(bool(sums[0] < self.threshold * sums[1]))
        if self.skips:
            self.skipped.append(self._step)
        else:
            self._first_residual, self._leader = residual, self._branch
            self._residuals.clear()


def _stride(num_tokens: int) -> int:
    """Distance of compared tokens; odd, so that these are not always the same columns."""
    return max(1, num_tokens // COMPARED_TOKENS) | 1


def start_cache(
    config: CacheConfig,
    num_steps: int,
    run_block: RunBlock,
    blocks: Sequence[nn.Module],
    always: Collection[int] = (),
    peers: Peers = NOBODY,
) -> StepCache:
    """The cache of one run.

    Args:
        config: which cache.
        num_steps: of the schedule.
        run_block: see transformer/model.py.
        blocks: the transformer's, in order.
        always: steps that are computed beside the protected ones, as the first one of another kind
            of attention.
        peers: with whom it decides.

    Returns:
        A cache that has not seen a step.
    """
    if config.kind == "easy":
        return EasyCache(num_steps, run_block, config.threshold, always=always, peers=peers)
    if config.kind == "first-block":
        return FirstBlockCache(
            num_steps,
            run_block,
            config.threshold,
            first=blocks[0],
            last=blocks[-1],
            always=always,
            peers=peers,
        )
    return StepCache(num_steps, run_block, always=always)
