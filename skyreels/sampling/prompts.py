"""Several prompts of one run: where each counts in the schedule, and how strongly.

The rules are those of ComfyUI's core (`calc_cond_batch` and `calculate_start_end_timesteps` of
comfy/samplers.py), so that a graph gives here what it gives there. Each prompt that is active at a
step is one more evaluation of the model; their predictions are averaged by strength.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..conditioning.embeds import PromptEmbeds
from ..config import MAX_GUIDANCE
from ..errors import OptionError

logger = logging.getLogger("skyreels.sampling.prompts")

#: weights(side, sigma) -> prompts that count there, as (index among all prompts, weight > 0).
#: side: 0 positive, 1 negative. sigma: [] float32 on the CPU
Weights = Callable[[int, Tensor], list[tuple[int, float]]]


@dataclass(frozen=True)
class ScheduledPrompt:
    """A prompt, and where it counts.

    Attributes:
        embeds: from `encode_prompt` or a host.
        strength: its share beside others that are active at the same step; >= 0.
        sigma_start: counts at this sigma and below, see `percent_to_sigma`.
        sigma_end: counts at this sigma and above.
        fills_up: takes what the strengths of all others that are active leave of 1, instead of its
            own strength (ConditioningSetDefaultCombine of ComfyUI).
        guidance_scale: embedded guidance of this prompt, 0..100; None takes the run's.

    Raises:
        OptionError: a value outside its range.
    """

    embeds: PromptEmbeds
    strength: float = 1.0
    sigma_start: float = 1.0
    sigma_end: float = 0.0
    fills_up: bool = False
    guidance_scale: float | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.strength < math.inf:
            raise OptionError(
                f"Strength {self.strength} of a prompt is not a number from 0 up: use 1."
            )
        for name, sigma in (("start", self.sigma_start), ("end", self.sigma_end)):
            if not -math.inf < sigma < math.inf:
                raise OptionError(f"The {name} of a prompt's range is {sigma}: use 0..1.")
        scale = self.guidance_scale
        if scale is not None and not 0.0 <= scale <= MAX_GUIDANCE:
            raise OptionError(
                f"Embedded guidance {scale} of a prompt is not within 0..{MAX_GUIDANCE:g}: use 1."
            )

    def is_active(self, sigma: Tensor) -> bool:
        """Whether it counts at a sigma, [] float32 on the CPU."""
        return not bool(sigma > self.sigma_start) and not bool(sigma < self.sigma_end)


#: one prompt for the whole run, or several
Prompt = PromptEmbeds | Sequence[ScheduledPrompt]


def scheduled(prompt: Prompt) -> tuple[ScheduledPrompt, ...]:
    """The prompts of one side of guidance.

    Args:
        prompt: one or several.

    Returns:
        At least one.

    Raises:
        OptionError: there is none.
    """
    if isinstance(prompt, PromptEmbeds):
        return (ScheduledPrompt(prompt),)
    if not prompt:
        raise OptionError("A run needs a prompt: give one (it may be empty text).")
    return tuple(prompt)


def percent_to_sigma(percent: float, shift: float) -> float:
    """The sigma at which so much of the time has passed.

    Args:
        percent: 0..1; ComfyUI's name for a fraction. Beyond its ends it counts as the end.
        shift: of the schedule.

    Returns:
        1..0.

    Source: ModelSamplingDiscreteFlow.percent_to_sigma of ComfyUI.
    """
    if percent <= 0.0:
        return 1.0
    if percent >= 1.0:
        return 0.0
    left = 1.0 - percent
    return shift * left / (1.0 + (shift - 1.0) * left)


def weights_of_prompts(
    positive: Sequence[ScheduledPrompt], negative: Sequence[ScheduledPrompt]
) -> Weights:
    """Which prompts count at a sigma.

    Args:
        positive: their indices begin at 0.
        negative: their indices go on after them.

    Returns:
        The function.
    """
    sides = (positive, negative)
    starts = (0, len(positive))

    def weights(side: int, sigma: Tensor) -> list[tuple[int, float]]:
        sigma = sigma.clamp(0.0, 1.0)  # schedules may begin a rounding error above 1
        active = [
            (index, prompt)
            for index, prompt in enumerate(sides[side], start=starts[side])
            if prompt.is_active(sigma)
        ]
        left = max(0.0, 1.0 - sum(each.strength for _, each in active if not each.fills_up))
        found = [(index, left if each.fills_up else each.strength) for index, each in active]
        return [(index, weight) for index, weight in found if weight > 0]

    return weights


def one_prompt_each(side: int, sigma: Tensor) -> list[tuple[int, float]]:
    """The weights of a run with one prompt and one negative prompt."""
    return [(side, 1.0)]


def average(
    predictions: Iterator[Tensor], side: Sequence[tuple[int, float]], latents: Tensor, sigma: Tensor
) -> Tensor:
    """The velocity of one side of guidance.

    Args:
        predictions: velocities [1, 16, T, h, w] float32, from which as many are taken as count.
        side: the prompts that count, and their weights.
        latents: of the step.
        sigma: of the step, on the CPU.

    Returns:
        Their weighted mean. Of none, what leads to a clip of zeros: ComfyUI's core takes that for
        the prediction.
    """
    if not side:
        return latents / sigma
    if len(side) == 1:
        return next(predictions)
    total = torch.zeros_like(latents)
    for _, weight in side:
        total = total + next(predictions) * weight
    return total / sum(weight for _, weight in side)


def report_gaps(weights: Weights, side: int, sigmas: Tensor, steps: Sequence[int]) -> None:
    """Warn of the steps at which no prompt of a side counts.

    Args:
        weights: from `weights_of_prompts`.
        side: 0 positive, 1 negative.
        sigmas: [N + 1] of the run, on the CPU.
        steps: those at which the side is used, from 0.
    """
    empty = [step for step in steps if not weights(side, sigmas[step])]
    if empty:
        logger.warning(
            "No entry of the %s conditioning is active in %d of %d steps (the first is step %d): "
            "a clip of zeros is taken for its prediction there, as in ComfyUI's core. Add an entry "
            "for the rest of the range.",
            ("positive", "negative")[side],
            len(empty),
            len(sigmas) - 1,
            empty[0] + 1,
        )
