"""Renders that go wrong are seen halfway: a still, a cut away from the picture, a drift in colour.

Looked at is the clean estimate of one step, in latents: nothing is decoded, and a look costs less
than a thousandth of a step. By LOOK_SIGMA, 15 of 30 steps with shift 7, the estimate shows what
will move and whether the place stays the same; detail comes later.

The limits were set on clips of the built-in model with CFG 6 and measured on others of it
(tests/bench/bad_render.py prints the figures). Guidance magnifies what the two predictions disagree
in, noise too, so a still has less motion at a lower scale, and the limit follows. On SkyReels-V1
itself they have not been measured. A clip in which nothing moves because the prompt asks for it is
a still all the same.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from ..conditioning.latents import ImageConditioning
from ..config import TEMPORAL_COMPRESSION
from ..errors import BadRenderError
from ..runtime import Runtime
from ..runtime.collectives import told_by_first
from .settings import SamplingSettings

logger = logging.getLogger("skyreels.sampling.bad_render")

#: the first estimate made at this sigma or below is looked at
LOOK_SIGMA = 0.9
#: a still: motion below it; of 209 clips in which something happens the least had 0.82, of 76
#: stills the most 0.83 and all others 0.74 or less
STILL_BELOW = 0.78
#: that at this CFG scale and above, and without guidance; between them it follows the logarithm. Of
#: 36 clips in which something happens the least had 0.32 at CFG 1 and 0.66 at CFG 3, of 18 stills
#: the most 0.05 and 0.52
STILL_SCALE, STILL_UNGUIDED = 6.0, 0.15
#: a jump: above it; of 288 clips without a cut the most had 0.24, and 3 of 104 with one had less
JUMP_ABOVE = 0.25
#: a drift: above it; of 209 clips without one the most had 0.43. Of those that end in quite another
#: colour about two thirds have more: the limit is for those that cannot be missed
DRIFT_ABOVE = 0.47
#: share of the places where a moving thing shows most, where least, and where colours count
MOVING_SHARE, QUIET_SHARE, CALM_SHARE = 0.25, 0.25, 0.5
#: clips of fewer latent frames after those that are given are not judged
MIN_FRAMES = 2
#: runs with "retry", the first included
MAX_TRIES = 4

T = TypeVar("T")


@dataclass(frozen=True)
class Look:
    """What was seen in an estimate.

    Attributes:
        motion: change in time of the quarter of all places that change most, root mean square,
            over the contrast in space; that of a still is what noise is left.
        jump: how much more the picture changes between two latent frames than between others, in
            the quarter of all places that change least; latents have a deviation of 1.
        drift: change of the mean latent from the first to the last quarter of the clip, in the half
            of all places that changes least.
        jump_frame: latent frame before which the largest change is.
    """

    motion: float
    jump: float
    drift: float
    jump_frame: int

    def fault(self, scale: float = STILL_SCALE) -> str | None:
        """What will go wrong with the clip.

        Args:
            scale: of true CFG at the step that is looked at, 1 without it.

        Returns:
            It and its figure, in a clause; None if nothing will.
        """
        if self.jump > JUMP_ABOVE:
            frame = (self.jump_frame - 1) * TEMPORAL_COMPRESSION + 1
            return (
                f"cuts to another scene near frame {frame} (jump {self.jump:.2f}, above "
                f"{JUMP_ABOVE:g})"
            )
        if self.drift > DRIFT_ABOVE:
            return f"drifts to other colours (drift {self.drift:.2f}, above {DRIFT_ABOVE:g})"
        share = math.log(min(max(scale, 1.0), STILL_SCALE)) / math.log(STILL_SCALE)
        least = STILL_UNGUIDED + share * (STILL_BELOW - STILL_UNGUIDED)
        if self.motion < least:
            return f"stands still (motion {self.motion:.2f}, below {least:.2f})"
        return None


def look_at(estimate: Tensor, given: Tensor | None) -> Look:
    """Compare the clean estimate of a clip with the picture it starts from.

    Args:
        estimate: [1, 16, T, h, w] on any device, model space, T >= k + 2.
        given: [1, 16, k, h, w] likewise, the latent frames that the clip starts from; None where
            there are none, and the estimate's own first one counts.

    Returns:
        The figures; waits for the device.
    """
    clip = estimate[0].float()
    num_given = 1
    if given is not None:
        num_given = given.shape[2]
        clip = torch.cat([given[0].to(clip), clip[:, num_given:]], dim=1)
    made = clip[:, num_given:]
    mean = made.mean(1)
    contrast = (mean - mean.mean((1, 2), keepdim=True)).square().mean().sqrt()
    in_time = (made - mean[:, None]).square().mean((0, 1)).flatten()
    motion = _largest(in_time, MOVING_SHARE).mean().sqrt() / contrast.clamp_min(1e-6)

    steps = clip.diff(dim=1).square().mean(0).flatten(1)[num_given - 1 :]
    changes = _smallest(steps, QUIET_SHARE).mean(1).sqrt()
    jump = changes.max() - changes.median()

    quarter = max(1, made.shape[1] // 4)
    shift = (made[:, -quarter:].mean(1) - made[:, :quarter].mean(1)).flatten(1)
    size = shift.square().mean(0)
    calm = size <= _smallest(size[None], CALM_SHARE).max()
    drift = shift[:, calm].mean(1).square().mean().sqrt()

    place = changes.argmax() + num_given
    figures: list[float] = torch.stack([motion, jump, drift, place.float()]).tolist()
    return Look(figures[0], figures[1], figures[2], int(figures[3]))


def _largest(values: Tensor, share: float) -> Tensor:
    return values.topk(max(1, round(values.shape[-1] * share))).values


def _smallest(values: Tensor, share: float) -> Tensor:
    return values.topk(max(1, round(values.shape[-1] * share)), largest=False).values


def step_to_look_at(settings: SamplingSettings) -> int | None:
    """The step whose estimate is looked at.

    Args:
        settings: of the run.

    Returns:
        Counted from 1; None where every estimate is made at more noise than LOOK_SIGMA.
    """
    for step, sigma in enumerate(settings.sigmas[:-1].tolist()):
        if sigma <= LOOK_SIGMA and step >= settings.guidance.zero_init_steps:
            return step + 1
    return None


def watch_of_run(
    image: ImageConditioning, settings: SamplingSettings, first_step: int, runtime: Runtime
) -> Callable[[int, Tensor], None]:
    """What looks at the estimates of a run, if it is to be watched.

    Args:
        image: what the clip starts from, and its size.
        settings: of the run.
        first_step: finished steps of a resumed run.
        runtime: told what is seen.

    Returns:
        look(step counted from 1, estimate [1, 16, T, h, w]). It raises BadRenderError for a bad
        clip where settings ask for it. A clip that cannot be judged is named in the log.
    """
    if settings.bad_render == "off":
        return _look_nowhere
    given, at = image.image_latents, step_to_look_at(settings)
    num_given = 1 if given is None else given.shape[2]
    if image.latent_shape[2] < num_given + MIN_FRAMES:
        reason = f"it has fewer than {MIN_FRAMES * TEMPORAL_COMPRESSION} frames of its own"
    elif at is None:
        reason = f"its schedule ends before sigma {LOOK_SIGMA:g}, where clips are looked at"
    elif at <= first_step:
        reason = f"step {at}, where clips are looked at, was made by the run that is resumed"
    else:
        return _looking(settings, at, given, runtime)
    logger.warning(
        "bad_render %s: this clip is not judged, because %s.", settings.bad_render, reason
    )
    return _look_nowhere


def _look_nowhere(step: int, estimate: Tensor) -> None:
    """A run that is not watched."""


def _looking(
    settings: SamplingSettings, at: int, given: Tensor | None, runtime: Runtime
) -> Callable[[int, Tensor], None]:
    guidance = settings.guidance
    is_guided = settings.uses_cfg and guidance.is_in_window(at - 1, settings.num_steps)
    scale = guidance.true_cfg_scale if is_guided else 1.0

    def look(step: int, estimate: Tensor) -> None:
        if step != at:
            return
        fault = look_at(estimate, given).fault(scale)
        if runtime.ranks is not None:  # near a limit, cards of several kinds might differ
            fault = told_by_first(fault, runtime.device, runtime.ranks.all)
        if fault is None:
            return
        seen = (
            f"Bad render with seed {settings.seed}: at step {at} of {settings.num_steps} the clip "
            f"{fault}."
        )
        if settings.bad_render != "warn":
            raise BadRenderError(
                f"{seen} Use another seed or prompt, or set bad_render to warn or off to have the "
                "clip as it is.",
                seen,
            )
        logger.warning(seen)
        runtime.note(seen)

    return look


def with_retries(
    settings: SamplingSettings, run: Callable[[SamplingSettings], T]
) -> tuple[T, SamplingSettings]:
    """Do a run, and with `bad_render` "retry" again with the next seed while its clip is bad.

    Args:
        settings: of the first try.
        run: makes a clip with settings of which only the seed differs, as if they were given.

    Returns:
        What `run` returned, and the settings it was made with.

    Raises:
        BadRenderError: a bad clip with "stop"; MAX_TRIES of them with "retry".
        SkyReelsError: see `run`.
    """
    if settings.bad_render != "retry":
        return run(settings), settings
    first = settings.seed
    for number in range(2, MAX_TRIES + 1):
        try:
            return run(settings), settings
        except BadRenderError as error:
            settings = replace(settings, seed=(settings.seed + 1) % 2**64)
            logger.warning(
                "%s Try %d of %d, with seed %d.", error.seen, number, MAX_TRIES, settings.seed
            )
    try:
        return run(settings), settings
    except BadRenderError as error:
        raise BadRenderError(
            f"All {MAX_TRIES} tries, from seed {first} on, were bad renders. {error}", error.seen
        ) from None
