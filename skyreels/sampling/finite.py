"""The first step whose latents hold NaN or infinity ends a run, and is named.

What is not finite stays so through all later steps, so the rest of the run would be wasted. On a
GPU each step's flag is copied to page-locked memory behind it, and read once it is there: the host
waits for nothing, and learns of a bad step while it queues the next one.
"""

from typing import Any

import torch
from torch import Tensor

from ..errors import ShapeError
from ..transformer.model import SkyReelsTransformer
from .precompute import host_memory
from .settings import SamplingSettings


class FiniteWatch:
    """Whether the latents of each step were finite.

    Args:
        num_steps: of the schedule.
        device: of the latents.
        suspects: what may be the cause, as a sentence.
    """

    def __init__(self, num_steps: int, device: torch.device, suspects: str) -> None:
        self._num_steps, self._device, self._suspects = num_steps, device, suspects
        self._flags: Tensor | None = None
        if device.type == "cuda":
            flags = host_memory(num_steps, torch.bool, device)
            # into other memory a copy makes the host wait: then the end of the run decides
            self._flags = flags if flags.is_pinned() else None
        self._copied: list[tuple[int, Tensor, Any]] = []

    def note(self, step: int, latents: Tensor) -> None:
        """Look at a step's latents, and at flags of earlier steps that have arrived.

        Args:
            step: counted from 1.
            latents: after it.

        Raises:
            ShapeError: a step was not finite.
        """
        if self._device.type == "cpu":
            if not bool(latents.isfinite().all()):
                self._fail(step)
        elif self._flags is not None and step <= self._num_steps:
            flag = self._flags[step - 1]
            flag.copy_(latents.isfinite().all(), non_blocking=True)
            make_event: Any = torch.cuda.Event  # untyped in torch
            event = make_event()
            event.record(torch.cuda.current_stream(self._device))
            self._copied.append((step, flag, event))
            self._look(wait=False)

    def finish(self, latents: Tensor) -> None:
        """Look at the result; waits for the device.

        Raises:
            ShapeError: a step was not finite.
        """
        if not bool(latents.isfinite().all()):
            self._look(wait=True)
            self._fail(None)

    def _look(self, *, wait: bool) -> None:
        while self._copied and (wait or self._copied[0][2].query()):
            step, flag, event = self._copied.pop(0)
            event.synchronize()
            if not bool(flag):
                self._fail(step)

    def _fail(self, step: int | None) -> None:
        where = f"after step {step} of {self._num_steps}" if step else "after the last step"
        raise ShapeError(f"The latents hold NaN or infinity {where}. {self._suspects}")


def suspects(transformer: SkyReelsTransformer, settings: SamplingSettings) -> str:
    """What may have made latents that are not finite, with its remedy: the likeliest first.

    Args:
        transformer: whose dtype counts.
        settings: of the run.

    Returns:
        A sentence.
    """
    if transformer.compute_dtype == torch.float16:
        return (
            "The transformer computes in float16, whose numbers end at 65504: load it in bf16 or "
            "fp32."
        )
    causes = []
    if settings.cache.kind != "off":
        causes.append("switch the cache off")
    if settings.attention != "exact":
        causes.append("use exact attention")
    if settings.guidance.true_cfg_scale > 20:
        causes.append(f"lower CFG {settings.guidance.true_cfg_scale:g} (6 is usual)")
    if settings.loras:
        causes.append("take off the LoRA or lower its strength")
    if any(weight.dtype.itemsize == 1 for weight in transformer.parameters()):
        causes.append("load the transformer in bf16")
    causes.append("check the checkpoint with `python -m skyreels inspect`")
    return f"Try one after the other: {'; '.join(causes)}."
