"""Score step caches on a recorded exact run, in milliseconds and without the model.

`record` samples a clip exactly and keeps what the model predicted at each step. `replay` then lets
a cache decide over those predictions: where it computes a step it gets the recorded prediction,
where it skips one its own estimate is used.

That is an approximation. A real run computes its later steps from latents that skipped steps have
already moved, and the model's answer to that is not in the recording. Two stand-ins are offered:

* closed loop (the default): the cache sees the latents that its own estimates have led to, and the
  model is taken to answer as the best denoiser of Gaussian data of standard deviation SPREAD does:
  it pulls moved latents back, the more the noisier they are;
* open loop: every step has the exact run's latents as its input, and the errors of the estimates
  add up with nothing that pulls them back.

On the built-in model both order thresholds and schedules as real runs do (rank correlation 0.99 and
0.97), decide on the same steps to within one, and give figures 4 dB and 20 dB below the real ones
(tests/bench/LOG.md). Between two ways to estimate a skipped step the order was wrong in three of
eight pairs. How another model answers is not known: trust the order of thresholds and the number of
skipped steps, and measure the error on real runs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from torch import Tensor

from ..conditioning.latents import ImageConditioning
from ..config import Guidance
from ..errors import OptionError
from ..runtime import Runtime
from ..transformer.model import SkyReelsTransformer
from .guidance import combine
from .prompts import Prompt
from .sample import sample
from .settings import OnStep, SamplingSettings, Velocity, euler
from .step_cache import OFF, StepCache

#: of the data about what the model expects of its picture and prompt, in units of the noise. The
#: built-in model answers as with 0.15 or so; more than that makes figures that promise too little
SPREAD = 0.2
#: decibels of equal latents, and the most that are told
MAX_DB = 100.0


@dataclass(frozen=True, eq=False)
class Recording:
    """What the model predicted in one exact run.

    Attributes:
        sigmas: [N + 1] float32 of the run.
        start: [1, 16, T, h, w] float32, the latents at sigmas[0].
        velocities: of each step, the positive prediction and, with guidance, the negative one,
            [1, 16, T, h, w] float32 each.
        scale: true CFG scale with which they are combined.
    """

    sigmas: Tensor
    start: Tensor
    velocities: Sequence[Sequence[Tensor]]
    scale: float

    @property
    def num_steps(self) -> int:
        """Steps of the run."""
        return len(self.velocities)

    @property
    def num_passes(self) -> int:
        """Model evaluations of the exact run."""
        return sum(map(len, self.velocities))


@dataclass(frozen=True, eq=False)
class Replayed:
    """One cache on one recording.

    Attributes:
        skipped: steps, counted from 0.
        num_passes: model evaluations that a run with these skipped steps takes.
        latents: [1, 16, T, h, w] float32 that the run is expected to end with, model space.
        error_db: of these, see `decibels`.
    """

    skipped: tuple[int, ...]
    num_passes: int
    latents: Tensor
    error_db: float


def record(
    transformer: SkyReelsTransformer,
    image: ImageConditioning,
    prompt: Prompt,
    negative: Prompt | None,
    settings: SamplingSettings,
    *,
    runtime: Runtime,
) -> tuple[Tensor, Recording]:
    """Sample a clip exactly, and keep every prediction in main memory.

    Two tensors of the size of the latents are kept for each step: 0.8 GB for 30 steps of
    960x544x97.

    Args:
        transformer: as for `sample`, and all the others.
        image: start of the clip.
        prompt: what happens.
        negative: what to avoid.
        settings: of the run, with a schedule to 0; its cache is not used.
        runtime: where.

    Returns:
        [1, 16, T, h, w] float32 on the CPU, VAE space, as from `sample`; and the recording.

    Raises:
        OptionError: a refinement of guidance, from whose result the two predictions cannot be told,
            or another solver than Euler.
        SkyReelsError: see `sample`.
    """
    guidance = settings.guidance
    plain = Guidance(guidance.true_cfg_scale, guidance.guidance_scale)
    if guidance != plain or settings.solver is not euler or settings.resume is not None:
        raise OptionError(
            "A run is recorded with plain guidance, the Euler solver and no saved steps: leave the "
            "refinements of guidance, the sampler and resuming out."
        )
    start: list[Tensor] = []
    steps: list[list[Tensor]] = []

    def recording(velocity: Velocity, latents: Tensor, sigmas: Tensor, on_step: OnStep) -> Tensor:
        start.append(latents.cpu())

        def noted(latents: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor | None]:
            guided, negative = velocity(latents, sigma)
            each = [guided]
            if negative is not None:  # the inverse of `combine`
                each = [negative + (guided - negative) / plain.true_cfg_scale, negative]
            steps.append([prediction.cpu() for prediction in each])
            return guided, negative

        return euler(noted, latents, sigmas.cpu(), on_step)

    exact = replace(settings, solver=recording, cache=OFF)
    vae_latents = sample(transformer, image, prompt, negative, exact, runtime=runtime)
    sigmas = settings.sigmas.float().cpu()
    return vae_latents, Recording(sigmas, start[0], steps, plain.true_cfg_scale)


def replay(recording: Recording, cache: StepCache, *, closed_loop: bool = True) -> Replayed:
    """Let a cache decide over a recorded run.

    Args:
        recording: from `record`.
        cache: that has not seen a step; one that decides by what blocks do cannot be replayed.
        closed_loop: what the cache sees as a step's input, see above.

    Returns:
        What it skipped and what that is expected to cost.
    """
    guidance = Guidance(recording.scale)
    latents = exact = recording.start
    num_passes = 0
    for step, (sigma, sigma_next) in enumerate(pairwise(recording.sigmas)):
        recorded = recording.velocities[step]
        seen = latents if closed_loop else exact
        answered = [velocity + _answer(sigma) * (seen - exact) for velocity in recorded]
        cache.begin(step, seen, range(len(recorded)))
        used = [
            cache.predict(branch, lambda _, v=velocity: v)  # type: ignore[misc]
            for branch, velocity in enumerate(answered)
        ]
        num_passes += 0 if cache.skips else len(recorded)
        latents = latents + (sigma_next - sigma) * _guided(used, guidance)
        exact = exact + (sigma_next - sigma) * _guided(recorded, guidance)
    return Replayed(tuple(cache.skipped), num_passes, latents, decibels(latents, exact))


def _answer(sigma: Tensor) -> Tensor:
    """Change of the velocity with its input, for the best denoiser of Gaussian data.

    With data d of variance s^2 and x = (1 - sigma) d + sigma noise, the best estimate of d moves by
    (1 - sigma) s^2 / ((1 - sigma)^2 s^2 + sigma^2) of a change of x, and v = (x - d) / sigma.

    Returns:
        [] float32.
    """
    scale = (1 - sigma) * SPREAD**2
    moved = scale / ((1 - sigma) * scale + sigma**2)
    return (1 - moved) / sigma


def _guided(predictions: Sequence[Tensor], guidance: Guidance) -> Tensor:
    if len(predictions) == 1:
        return predictions[0]
    positive, negative = predictions
    return combine(positive, negative, guidance)


def decibels(latents: Tensor, exact: Tensor) -> float:
    """How near latents are to those of the exact run: its power over that of the difference.

    Args:
        latents: [1, 16, T, h, w].
        exact: of the same shape, in the same space.

    Returns:
        10 log10 of the ratio, 100 at most.
    """
    power = float(exact.double().square().mean())
    error = float((latents.double() - exact.double()).square().mean())
    if error == 0:
        return MAX_DB
    return min(MAX_DB, 10 * math.log10(power / error)) if power else -MAX_DB
