"""Several clips, one after the other: what a batch of latents or pictures asks for.

Each clip is a run of its own, so a batch needs the memory of one clip and the time of all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from ..conditioning.latents import ImageConditioning
from ..runtime import Runtime
from ..transformer.model import SkyReelsTransformer
from .bad_render import with_retries
from .prompts import Prompt
from .sample import sample
from .settings import SamplingSettings, Solver


@dataclass(frozen=True)
class Clip:
    """One clip of a batch; its attributes are the inputs of `sample`.

    Attributes:
        solver_of: makes the solver for a seed; None where `settings` has one for every seed.
    """

    image: ImageConditioning
    prompt: Prompt
    negative: Prompt | None
    settings: SamplingSettings
    solver_of: Callable[[int], Solver] | None = None


def sample_batch(
    transformer: SkyReelsTransformer, clips: Sequence[Clip], *, runtime: Runtime
) -> Tensor:
    """Sample clips one after the other.

    Args:
        transformer: as for `sample`.
        clips: at least one, of one size.
        runtime: progress "sample" in steps of the whole batch; may interrupt.

    Returns:
        [B, 16, T, h, w] float32 on the CPU, VAE space.

    Raises:
        SkyReelsError: see `sample`.
    """
    return sample_clips(transformer, clips, runtime=runtime)[0]


def sample_clips(
    transformer: SkyReelsTransformer, clips: Sequence[Clip], *, runtime: Runtime
) -> tuple[Tensor, list[int]]:
    """The same, for a caller who asks which seeds were used.

    Args:
        transformer: as for `sample`.
        clips: at least one, of one size. With `bad_render` "retry" each has tries of its own.
        runtime: as for `sample_batch`.

    Returns:
        As of `sample_batch`, and the seed of each clip.

    Raises:
        SkyReelsError: see `sample`; of the first clip that cannot be had.
    """
    total = sum(clip.settings.num_steps for clip in clips)
    made, seeds, done = [], [], 0
    for clip in clips:
        part = runtime if len(clips) == 1 else _PartOfBatch(runtime, done, total)
        latents, used = _sample_clip(transformer, clip, cast(Runtime, part))
        made.append(latents)
        seeds.append(used.seed)
        done += clip.settings.num_steps
    return torch.cat(made), seeds


def _sample_clip(
    transformer: SkyReelsTransformer, clip: Clip, runtime: Runtime
) -> tuple[Tensor, SamplingSettings]:
    def run(settings: SamplingSettings) -> Tensor:
        if clip.solver_of is not None:
            settings = replace(settings, solver=clip.solver_of(settings.seed))
        return sample(
            transformer, clip.image, clip.prompt, clip.negative, settings, runtime=runtime
        )

    return with_retries(clip.settings, run)


class _PartOfBatch:
    """A host that is told the steps of a whole batch."""

    def __init__(self, runtime: Runtime, done: int, total: int) -> None:
        self._runtime, self._done, self._total = runtime, done, total

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)

    def progress(self, stage: str, done: int, total: int, preview: Tensor | None = None) -> None:
        """As the host's; steps count from the batch's first."""
        if stage == "sample":
            done, total = self._done + done, self._total
        self._runtime.progress(stage, done, total, preview)
