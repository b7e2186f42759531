"""Several clips, one after the other: what a batch of latents or pictures asks for.

Each clip is a run of its own, so a batch needs the memory of one clip and the time of all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ..conditioning.latents import ImageConditioning
from ..runtime import Runtime
from ..transformer.model import SkyReelsTransformer
from .prompts import Prompt
from .sample import sample
from .settings import SamplingSettings


@dataclass(frozen=True)
class Clip:
    """One clip of a batch; its attributes are the inputs of `sample`."""

    image: ImageConditioning
    prompt: Prompt
    negative: Prompt | None
    settings: SamplingSettings


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
    total = sum(clip.settings.num_steps for clip in clips)
    made, done = [], 0
    for clip in clips:
        inputs = (clip.image, clip.prompt, clip.negative, clip.settings)
        part = runtime if len(clips) == 1 else _PartOfBatch(runtime, done, total)
        made.append(sample(transformer, *inputs, runtime=cast(Runtime, part)))
        done += clip.settings.num_steps
    return torch.cat(made)


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
