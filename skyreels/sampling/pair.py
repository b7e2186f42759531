"""Two devices for one clip: each has one branch of guidance, at the same time.

The first device has the positive prompts, the solver and all decisions: which steps are skipped,
which blocks of tokens are exact, how activations are chunked. The second one, the partner, has the
negative prompts and a twin of the transformer, and works in a thread of its own. Latents go there
once a step, and a prediction comes back; both are float32, so the clip has the same bits as one of
one device, as far as both devices compute alike.

Whoever fails or is interrupted stops the other one before its next block.
"""

import copy
import threading
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from ..config import SkipLayers
from ..errors import OptionError, SkyReelsError
from ..kernels import dispatch
from ..kernels.dispatch import current_device
from ..runtime.offload import module_tensors
from ..transformer.model import RunBlock, SkyReelsTransformer
from ..transformer.sparse_attention import SparseRun
from .network import Alone, Asked, Network, PredictBranch, blocks_to_skip, leaving_out
from .settings import SamplingSettings


class _StoppedError(Exception):
    """The other device has stopped; its error is the one that counts."""


def check_pair(settings: SamplingSettings) -> None:
    """Refuse settings that several devices cannot share.

    Args:
        settings: of the run.

    Raises:
        OptionError: a step cache that decides in the midst of a prediction.
    """
    if settings.cache.kind == "first-block":
        raise OptionError(
            "Cache first-block decides in the midst of a prediction, and other devices cannot wait "
            "for that: use cache easy or fast, or one device."
        )


def twin_of(transformer: SkyReelsTransformer) -> SkyReelsTransformer:
    """The same network, with parameters of its own over the same memory.

    Args:
        transformer: on any device.

    Returns:
        One whose parameters can be moved while those of the other are elsewhere. Changes of
        weights in place, as merging a LoRA, are seen by both.
    """
    memo: dict[int, Any] = {}
    for tensor in module_tensors(transformer):
        alias = tensor.data
        if isinstance(tensor, nn.Parameter):
            alias = nn.Parameter(alias, requires_grad=False)
        memo[id(tensor)] = alias
    return copy.deepcopy(transformer, memo)


class Partner(Alone):
    """The second device of a run; use it in `with`, so that its thread ends with the run.

    Args:
        network: of the second device.
        first: the first device, to which predictions come.
        skip: blocks that weak predictions leave out.
    """

    def __init__(
        self, network: Network, first: torch.device, skip: SkipLayers | None = None
    ) -> None:
        run_block = network.run.around(self._stoppable(network.run_block))
        self._network = network._replace(run_block=run_block)
        self._weak_block = leaving_out(run_block, blocks_to_skip(network.transformer, skip))
        self._first = first
        self._thread = ThreadPoolExecutor(1, "second device")
        self._stopped = threading.Event()
        self._pending: Future[dict[int, Tensor]] | None = None
        if isinstance(network.run, SparseRun):
            network.run.check = self.check

    def __enter__(self) -> "Partner":
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def start(self, asked: Asked, predict: PredictBranch) -> Collection[int]:
        """Begin the negative predictions of a step; its latents are on the first device."""
        if not asked.away:
            return ()
        network = self._network
        network.run.begin_step(asked.step)
        there = asked.latents.to(network.rope.device, non_blocking=True)

        def predict_all() -> dict[int, Tensor]:
            with torch.inference_mode(), current_device(there.device):
                return {
                    branch: network.predict(
                        there,
                        asked.sigma,
                        asked.step,
                        [branch],
                        self._weak_block if branch in asked.weak else None,
                    )[0]
                    for branch in asked.away
                }

        self._pending = self._thread.submit(predict_all)
        return asked.away

    def result(self, branch: int, run_block: RunBlock | None = None) -> Tensor:
        """The prediction of a branch, on the first device; waits for it.

        Args:
            branch: one of those begun.
            run_block: nothing is run here.

        Returns:
            [1, 16, T, h, w] float32.

        Raises:
            SkyReelsError: the second device is lost.
        """
        assert self._pending is not None
        try:
            return self._pending.result()[branch].to(self._first)
        except Exception as error:
            if dispatch.broke_device(error):
                raise SkyReelsError(
                    f"The second device, {self._network.rope.device}, failed in mid-run "
                    f"({dispatch.brief(error)}): restart the program, and use one device if it "
                    "happens again."
                ) from error
            raise

    def beside(self, run_block: RunBlock) -> RunBlock:
        """Run blocks of the first device until the second one has failed."""

        def run(block: nn.Module, *args: Any) -> Any:
            pending = self._pending
            if pending is not None and pending.done() and pending.exception() is not None:
                self.result(-1)
            return run_block(block, *args)

        return run

    def check(self) -> None:
        """Raise where the first device has stopped; for whoever waits in the thread."""
        if self._stopped.is_set():
            raise _StoppedError

    def _stoppable(self, run_block: RunBlock) -> RunBlock:
        def run(block: nn.Module, *args: Any) -> Any:
            self.check()
            return run_block(block, *args)

        return run
