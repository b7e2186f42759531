"""What a run is asked for: its schedule, start, guidance, solver and shortcuts."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from ..conditioning.latents import is_whole, seeded_generator
from ..config import ATTENTIONS, BAD_RENDERS, MAX_STEPS, ContextWindows, Guidance
from ..errors import OptionError, ShapeError
from ..transformer.attention import Attention
from ..transformer.sparse_attention import SparseConfig
from ..weights.lora.apply import AppliedLora
from .step_cache import OFF, CacheConfig

#: below it the noise that is added is less than float32 tells apart
MIN_DENOISE = 1e-6
#: rounding errors by which a schedule may leave 1..0
_SIGMA_TOLERANCE = 1e-4

#: velocity(latents [1, 16, T, h, w] float32, sigma [] float32) -> the guided velocity and the
#: negative one, each of the shape of the latents; None where no negative prediction was made. A
#: sigma that is not on the CPU makes the host wait for the device.
Velocity = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]

#: on_step(step, latents after it, denoised estimate); steps count from 0
OnStep = Callable[[int, Tensor, Tensor], None]

#: solver(velocity, latents, sigmas [N + 1], on_step) -> latents at the last sigma; `euler` has the
#: sigmas on the CPU, any other where the latents are
Solver = Callable[[Velocity, Tensor, Tensor, OnStep], Tensor]


def get_sigmas(num_inference_steps: int = 30, shift: float = 7.0, denoise: float = 1.0) -> Tensor:
    """The official schedule: linear 1..0, shifted towards noise.

    Args:
        num_inference_steps: 1..1000.
        shift: 0.01..100; 7 is what SkyReels was released with.
        denoise: below 1, the last part of a longer schedule, for video to video.

    Returns:
        [N + 1] float32 from 1 (or where denoise starts) to 0.

    Raises:
        OptionError: steps, shift or denoise outside their range.

    Source: sigma' = shift * sigma / (1 + (shift - 1) * sigma), Stable Diffusion 3,
        arXiv:2403.03206, equation 23.
    """
    check_schedule(num_inference_steps, shift, denoise)
    total = int(num_inference_steps / denoise)
    if total > 2 * num_inference_steps:  # the end alone, with the bits that it has below
        indices = torch.arange(num_inference_steps, -1, -1, dtype=torch.float64)
        linear = indices * (1.0 / total)
    else:
        linear = torch.linspace(1.0, 0.0, total + 1, dtype=torch.float64)
    sigmas = shift * linear / (1.0 + (shift - 1.0) * linear)
    return sigmas[-(num_inference_steps + 1) :].float()


def check_schedule(num_inference_steps: int, shift: float, denoise: float) -> None:
    """Refuse a schedule that cannot be made.

    Raises:
        OptionError: steps, shift or denoise outside their range.
    """
    if not is_whole(num_inference_steps):
        raise OptionError(f"{num_inference_steps!r} steps are not a whole number: use 30.")
    if not 1 <= num_inference_steps <= MAX_STEPS:
        raise OptionError(f"{num_inference_steps} steps are not within 1..{MAX_STEPS}: use 30.")
    if not 0.0 < denoise <= 1.0:
        raise OptionError(f"Denoise {denoise} is not within 0..1 (0 excluded): use 1 for all.")
    if denoise < MIN_DENOISE:
        raise OptionError(
            f"Denoise {denoise} is below {MIN_DENOISE:g} and would change nothing: use 0.01 or "
            "more."
        )
    if not 0.01 <= shift <= 100.0:
        raise OptionError(f"Shift {shift} is not within 0.01..100: use 7.")


def euler(velocity: Velocity, latents: Tensor, sigmas: Tensor, on_step: OnStep) -> Tensor:
    """First-order steps along the flow, the reference solver.

    Args:
        velocity: the function to integrate.
        latents: [1, 16, T, h, w] float32 at sigmas[0].
        sigmas: [N + 1] float32, falling; on the CPU, so that no step waits for the one before.
        on_step: called after each step.

    Returns:
        latents at sigmas[-1].
    """
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        v, _ = velocity(latents, sigma)
        denoised = latents - sigma * v
        latents = latents + (sigma_next - sigma) * v
        on_step(step, latents, denoised)
    return latents


@dataclass(frozen=True, eq=False)
class SamplingSettings:
    """How latents are sampled.

    A schedule may be run in parts: one that stops above 0 gives latents that the next run continues
    with `init_latents` and `add_noise=False`. Between the two they are divided by 1 - sigma, as
    ComfyUI does.

    Attributes:
        seed: of the initial noise, 0..2^64-1.
        sigmas: [N + 1] falling within 1..0, from `get_sigmas` or one's own.
        guidance: how the positive and negative predictions are combined.
        init_latents: [1, 16, T, h, w] VAE space, the clip to start from when sigmas[0] < 1.
        add_noise: False continues the unfinished clip in init_latents.
        riflex_k: see `rope_table`; only clips beyond 177 frames change.
        cache: which steps are skipped, see step_cache.py. Euler only; a resumed run starts with an
            empty cache.
        attention: "exact"; "fast" (8 bits, where the device has a kernel for it); "sparse",
            "sparser" or a `SparseConfig` (fast, and sparse in most steps); or a function. See
            transformer/attention.py and sparse_attention.py.
        solver: `euler` or any function of its signature.
        resume: file in which each finished step is saved, or a folder in which that file is named
            after the inputs. A run with the same inputs continues from it. The finished latents
            stay in it: delete it once they are safe. Euler only.
        noise_index: of the clip in a batch, see `initial_noise`.
        noise_mask: [1, 1 or 16, T, h, w] in 0..1; where it is 0 the clip in init_latents is kept,
            where it is 1 a new one is sampled.
        loras: in use together; the transformer is brought to exactly these before the first step,
            and keeps them until another run asks for others.
        windows: see `ContextWindows`; None predicts the whole clip at once. Not with a cache.
        bad_render: one of config.BAD_RENDERS, see bad_render.py: what happens when the estimate
            halfway is a still, jumps or drifts in colour. "warn" logs it, "stop" and "retry" end
            the run with an error, which `with_retries` answers with the next seed for "retry".

    Raises:
        OptionError: a value outside its range, or two that contradict each other.
        ShapeError: init_latents or noise_mask hold NaN or infinity.
    """

    seed: int = 0
    sigmas: Tensor = field(default_factory=get_sigmas)
    guidance: Guidance = field(default_factory=Guidance)
    init_latents: Tensor | None = None
    add_noise: bool = True
    riflex_k: int = 4
    cache: CacheConfig = OFF
    attention: Attention | SparseConfig | str = "exact"
    solver: Solver = euler
    resume: Path | None = None
    noise_index: int = 0
    noise_mask: Tensor | None = None
    loras: tuple[AppliedLora, ...] = ()
    windows: ContextWindows | None = None
    bad_render: str = "off"

    def __post_init__(self) -> None:
        seeded_generator(self.seed)  # refuses a seed outside its range
        _check_sigmas(self.sigmas)
        if self.init_latents is None and not self.add_noise:
            raise OptionError("add_noise=False needs a clip to continue: give a start latent.")
        for name, given in (("start latent", self.init_latents), ("noise mask", self.noise_mask)):
            if given is not None and not bool(given.isfinite().all()):
                raise ShapeError(f"The {name} holds NaN or infinity: check the node that made it.")
        if not is_whole(self.riflex_k) or self.riflex_k < 0:
            raise OptionError(f"riflex_k must be >= 0, got {self.riflex_k}: use 4, or 0 for off.")
        if not is_whole(self.noise_index) or self.noise_index < 0:
            raise OptionError(f"noise_index must be >= 0, got {self.noise_index}: use 0.")
        if isinstance(self.attention, str) and self.attention not in ATTENTIONS:
            raise OptionError(
                f"Attention {self.attention!r} is not one of {', '.join(ATTENTIONS)}."
            )
        _check_bad_render(self.bad_render, self.resume)
        if self.resume is not None and self.solver is not euler:
            raise OptionError(
                "Resuming needs the Euler solver: the state of other solvers is not saved. "
                "Disconnect the sampler or switch resuming off."
            )
        if self.cache.kind != "off" and self.guidance.skip_layers is not None:
            raise OptionError(
                "Skip-layer guidance and a cache do not go together: the cache would compare "
                "predictions of two models. Set the cache to off, or switch the guidance off."
            )
        if self.cache.kind != "off" and self.windows is not None:
            raise OptionError(
                "Context windows and a cache do not go together: the cache would compare one "
                "window with another. Set the cache to off, or disconnect the windows."
            )
        if self.cache.kind != "off" and self.solver is not euler:
            raise OptionError(
                "Caching needs the Euler solver: other solvers use a prediction for more than one "
                "step, so a skipped one misleads them. Disconnect the sampler or set the cache to "
                "off."
            )

    @property
    def num_steps(self) -> int:
        """Steps of the schedule."""
        return len(self.sigmas) - 1

    @property
    def uses_cfg(self) -> bool:
        """Whether the negative prompt is used at all."""
        return self.guidance.true_cfg_scale > 1


def _check_bad_render(bad_render: str, resume: Path | None) -> None:
    if bad_render not in BAD_RENDERS:
        raise OptionError(
            f"bad_render {bad_render!r} is not one of {', '.join(BAD_RENDERS)}: use off."
        )
    if resume is not None and bad_render == "retry":
        raise OptionError(
            "Resuming and bad_render retry do not go together: the saved steps are those of "
            "one seed. Set bad_render to stop, or switch resuming off."
        )


def _check_sigmas(sigmas: Tensor) -> None:
    if not isinstance(sigmas, Tensor) or sigmas.ndim != 1 or len(sigmas) < 2:
        raise OptionError(
            "Sigmas must be a tensor of falling numbers, at least two numbers long: use "
            "`get_sigmas`, or SkyReels Scheduler in ComfyUI."
        )
    if not bool(sigmas.isfinite().all()):
        raise OptionError("Sigmas hold NaN or infinity: check what made them.")
    if not bool((sigmas.diff() < 0).all()):
        raise OptionError(
            "Sigmas must be falling, at least two numbers; got "
            f"{[round(s, 4) for s in sigmas.flatten().tolist()[:6]]}."
        )
    if sigmas[0] > 1 + _SIGMA_TOLERANCE or sigmas[-1] < -_SIGMA_TOLERANCE:
        raise OptionError(
            f"Sigmas run from {sigmas[0].item():.9g} to {sigmas[-1].item():.9g}; flow matching "
            "needs them within 1..0: use a flow schedule (shift 7), not one of an older model."
        )
