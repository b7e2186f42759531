"""Samplers of ComfyUI's core as solvers of the engine."""

import logging
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from ...skyreels.errors import OptionError
from ...skyreels.sampling.settings import OnStep, Solver, Velocity

logger = logging.getLogger("skyreels.nodes.host.samplers")


def core_solver(sampler: Any, shift: float, seed: int) -> Solver:
    """A core SAMPLER as a solver of the engine.

    Core's samplers are k-diffusion functions: they call a model for the denoised latents, and some
    look up its schedule. A small object with these attributes stands in for core's model.

    Args:
        sampler: what a SAMPLER socket carries.
        shift: of the schedule, for samplers that compute sigmas of their own.
        seed: of the noise that ancestral and SDE samplers add.

    Returns:
        A solver for `SamplingSettings`.

    Raises:
        OptionError: a sampler without a k-diffusion function.
    """
    import comfy.model_sampling

    function = getattr(sampler, "sampler_function", None)
    if function is None:
        raise OptionError(
            f"{type(sampler).__name__} is not a k-diffusion sampler: use KSamplerSelect, or "
            "disconnect it for Euler."
        )

    bases = (comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST)
    model_sampling = type("Flow", bases, {})()
    model_sampling.set_parameters(shift=shift)

    def solver(velocity: Velocity, latents: Tensor, sigmas: Tensor, on_step: OnStep) -> Tensor:
        model = _DenoiserOfFlow(velocity, model_sampling)

        def callback(state: dict[str, Any]) -> None:
            on_step(state["i"], state["x"], state["denoised"])

        extra_args = {"model_options": {}, "seed": seed, "denoise_mask": None}
        try:
            # a copy: they are the user's SIGMAS, and samplers may write into them
            samples: Tensor = function(
                model,
                latents,
                sigmas.clone(),
                extra_args=extra_args,
                callback=callback,
                disable=True,
                **sampler.extra_options,
            )
        except AttributeError as error:
            raise OptionError(
                f"Sampler {getattr(function, '__name__', function)} needs parts of core's model "
                f"that SkyReels lacks ({error}): choose another in KSamplerSelect."
            ) from error
        return samples

    return solver


class _DenoiserOfFlow:
    """Denoised latents from a velocity, with the attributes core's samplers look up."""

    def __init__(self, velocity: Velocity, model_sampling: Any) -> None:
        self._velocity = velocity
        self._has_warned = False
        patcher = SimpleNamespace(get_model_object={"model_sampling": model_sampling}.get)
        base = SimpleNamespace(model_sampling=model_sampling)
        self.inner_model = SimpleNamespace(
            inner_model=base, model_sampling=model_sampling, model_patcher=patcher
        )

    def __call__(
        self, x: Tensor, sigma: Tensor, model_options: dict[str, Any] | None = None, **_: Any
    ) -> Tensor:
        level = sigma.reshape(-1)[0]
        guided, negative = self._velocity(x, level)
        denoised: Tensor = x - level * guided
        functions = (model_options or {}).get("sampler_post_cfg_function", [])
        if functions and negative is None and not self._has_warned:
            logger.warning(
                "CFG++ samplers need the negative prediction; a step without it runs without CFG++."
            )
            self._has_warned = True
        uncond = denoised if negative is None else x - level * negative
        for function in functions:  # CFG++ samplers collect the negative prediction this way
            denoised = function(
                {"denoised": denoised, "uncond_denoised": uncond, "input": x, "sigma": sigma}
            )
        return denoised
