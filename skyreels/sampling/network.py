"""A transformer on its device, and what its predictions in a run take beside latents."""

from collections.abc import Callable, Collection, Sequence
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..config import CHUNKINGS, NUM_TRAIN_TIMESTEPS, Chunking, SkipLayers
from ..errors import OptionError
from ..transformer.layers import DoubleBlock
from ..transformer.model import RunBlock, SkyReelsTransformer
from ..transformer.sparse_attention import DenseRun
from .precompute import StepLookup
from .windows import Picture, predict_clip


class Network(NamedTuple):
    """One network of a run.

    Attributes:
        transformer: the network.
        run: its attention.
        lookup: from `precompute`, of the prompts that it is asked for.
        picture: [1, 16, T, h, w] float32, model space, zero where nothing is given; None for a
            text-to-video transformer; or, for a clip in windows, a `Windowed`.
        rope: from `rope_table`, of the clip or of a window.
        run_block: runs one block of the transformer.
        chunking: how much of a block is computed at a time.
    """

    transformer: SkyReelsTransformer
    run: DenseRun
    lookup: StepLookup
    picture: Picture
    rope: Tensor
    run_block: RunBlock
    chunking: Chunking = CHUNKINGS["whole"]

    def predict(
        self,
        latents: Tensor,
        sigma: Tensor,
        step: int,
        branches: Sequence[int],
        run_block: RunBlock | None = None,
    ) -> list[Tensor]:
        """The velocities of some branches, block by block for all of them.

        Args:
            latents: [1, 16, T, h, w] float32, on the network's device.
            sigma: of them.
            step: that it belongs to.
            branches: indices of prompts.
            run_block: if not the network's own, as with a step cache around it.

        Returns:
            Each [1, 16, T, h, w] float32.
        """
        timestep = float(sigma * NUM_TRAIN_TIMESTEPS)
        conditioned = [self.lookup(branch, timestep, self.run_block) for branch in branches]
        parts = count()

        def forward(latents: Tensor, image_latents: Tensor | None) -> Sequence[Tensor]:
            self.run.begin(branches, next(parts))
            return self.transformer.denoise_together(
                _with_picture(latents, image_latents),
                conditioned,
                rope=self.rope,
                order=self.run.order,
                gather=self.run.gather,
                attention=self.run,
                chunking=self.chunking,
                run_block=run_block or self.run_block,
            )

        velocities = predict_clip(forward, latents, self.picture, step)
        return [velocity.float() for velocity in velocities]


class Asked(NamedTuple):
    """Predictions that a step takes.

    Attributes:
        latents: [1, 16, T, h, w] float32.
        sigma: of them, on the CPU.
        step: that it belongs to.
        branches: indices of prompts, in their order.
        away: of these, the negative ones.
        weak: of these, those that leave blocks out.
    """

    latents: Tensor
    sigma: Tensor
    step: int
    branches: Sequence[int]
    away: Sequence[int] = ()
    weak: Collection[int] = ()


#: makes the prediction of a branch here, [1, 16, T, h, w] float32
PredictBranch = Callable[[int], Tensor]


class Alone:
    """What makes predictions for a run elsewhere: here nothing does."""

    def start(self, asked: Asked, predict: PredictBranch) -> Collection[int]:
        """Begin the predictions of a step.

        Args:
            asked: what the step takes.
            predict: makes one of them here.

        Returns:
            The branches whose `result` will come; the others are to be predicted here.
        """
        return ()

    def result(self, branch: int, run_block: RunBlock | None = None) -> Tensor:
        """The prediction of a branch; waits for it.

        Args:
            branch: one of those that `start` returned.
            run_block: nothing is run here.

        Returns:
            [1, 16, T, h, w] float32, where the run is.
        """
        raise NotImplementedError


ALONE = Alone()


def leaving_out(run_block: RunBlock, blocks: Sequence[nn.Module]) -> RunBlock:
    """Run blocks, except that some hand on their input (residual skip).

    Args:
        run_block: runs one block of the transformer.
        blocks: that are left out.

    Returns:
        The same for the others.
    """
    skipped = {id(block) for block in blocks}

    def run(block: nn.Module, *args: Any) -> Any:
        if id(block) not in skipped:
            return run_block(block, *args)
        return args[:2] if isinstance(block, DoubleBlock) else args[0]

    return run


def blocks_to_skip(transformer: SkyReelsTransformer, skip: SkipLayers | None) -> list[nn.Module]:
    """The blocks that skip-layer guidance leaves out.

    Returns:
        The double ones, then the single ones.

    Raises:
        OptionError: the transformer has no such block.
    """
    found: list[nn.Module] = []
    if skip is None:
        return found
    for kind, blocks, indices in (
        ("double", transformer.double_blocks, skip.double_blocks),
        ("single", transformer.single_blocks, skip.single_blocks),
    ):
        for index in indices:
            if not 0 <= index < len(blocks):
                raise OptionError(
                    f"Skip-layer guidance leaves out {kind} block {index}, and the transformer has "
                    f"0..{len(blocks) - 1}: choose one of these."
                )
            found.append(blocks[index])
    return found


def _with_picture(latents: Tensor, image_latents: Tensor | None) -> Tensor:
    """What the network sees: [1, 32, T, h, w], or the latents alone for text to video."""
    return latents if image_latents is None else torch.cat([latents, image_latents], dim=1)
