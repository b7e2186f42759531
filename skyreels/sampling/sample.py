"""Schedule, guidance and the Euler loop of flow matching.

Latents, sigmas, timesteps and everything guidance does are float32; only the transformer itself
computes in the dtype of its weights. One branch of the guidance runs at a time: their texts have
different lengths, and nothing is padded or masked.

The Euler loop reads nothing back from the device, so that the host can queue one step while another
runs: sigmas and timesteps stay on the CPU, where a scalar multiplies a tensor of any device.
"""

import logging
import math
import os
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import LAYOUTS, MAX_STEPS, NUM_TRAIN_TIMESTEPS, Guidance, Layout
from ..errors import OptionError, ShapeError
from ..latents import (
    ImageConditioning,
    latent_shape,
    seeded_generator,
    to_model_space,
    to_vae_space,
)
from ..offload import weight_bytes
from ..runtime import Runtime
from ..text.embeds import PromptEmbeds, check_prompt_embeds
from ..transformer.attention import FAST_BYTES, Attention, choose_attention, sdpa, trial_bytes
from ..transformer.layers import rope_table
from ..transformer.model import RunBlock, SkyReelsTransformer
from ..transformer.placement import choose_layout, placed, sampling_bytes
from .precompute import MAX_KEPT, Conditioning, precompute
from .resume import fingerprint_run, load_state, save_state
from .step_cache import OFF, CacheConfig, cache_bytes, protected_start, start_cache

logger = logging.getLogger("skyreels.sampling.sample")

#: velocity(latents [1, 16, T, h, w] float32, sigma [] float32) -> the guided velocity and that of
#: the negative prompt, each of the shape of the latents; None where no negative pass was made. A
#: sigma that is not on the CPU is waited for.
Velocity = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]

#: on_step(step, latents after it, denoised estimate); steps count from 0
OnStep = Callable[[int, Tensor, Tensor], None]

#: solver(velocity, latents, sigmas [N + 1], on_step) -> latents at the last sigma; `euler` has the
#: sigmas on the CPU, any other where the latents are
Solver = Callable[[Velocity, Tensor, Tensor, OnStep], Tensor]


def get_sigmas(num_inference_steps: int, shift: float = 7.0, denoise: float = 1.0) -> Tensor:
    """The official schedule: linear 1..0, shifted towards noise.

    Args:
        num_inference_steps: steps to be made, 1..1000.
        shift: 0.01..100; 7 is what SkyReels was released with.
        denoise: below 1, the last part of a longer schedule, for video to video.
    Returns:
        [N + 1] float32 from 1 (or where denoise starts) to 0.
    Raises:
        OptionError: steps, shift or denoise outside their range.
    Source: sigma' = shift * sigma / (1 + (shift - 1) * sigma), Stable Diffusion 3,
        arXiv:2403.03206, equation 23.
    """
    if not 1 <= num_inference_steps <= MAX_STEPS:
        raise OptionError(f"{num_inference_steps} steps are not within 1..{MAX_STEPS}: use 30.")
    if not 0.0 < denoise <= 1.0:
        raise OptionError(f"Denoise {denoise} is not within 0..1 (without 0): use 1 for all.")
    if not 0.01 <= shift <= 100.0:
        raise OptionError(f"Shift {shift} is not within 0.01..100: use 7.")
    total = int(num_inference_steps / denoise)
    linear = torch.linspace(1.0, 0.0, total + 1, dtype=torch.float64)
    sigmas = shift * linear / (1.0 + (shift - 1.0) * linear)
    return sigmas[-(num_inference_steps + 1) :].float()


def initial_noise(seed: int, num_frames: int, height: int, width: int) -> Tensor:
    """[1, 16, T, h, w] float32 from a CPU generator: one seed, one noise, on every device.

    Raises:
        OptionError: a seed outside 0..2^64-1.
    """
    return torch.randn(latent_shape(num_frames, height, width), generator=seeded_generator(seed))


def euler(velocity: Velocity, latents: Tensor, sigmas: Tensor, on_step: OnStep) -> Tensor:
    """First-order steps along the flow, the reference solver.

    Args:
        latents: [1, 16, T, h, w] float32 at sigmas[0].
        sigmas: [N + 1] float32, falling; on the CPU, so that no step waits for the one before.
    Returns:
        latents at sigmas[-1].
    """
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        v, _ = velocity(latents, sigma)
        denoised = latents - sigma * v
        latents = latents + (sigma_next - sigma) * v
        on_step(step, latents, denoised)
    return latents


def combine(positive: Tensor, negative: Tensor, guidance: Guidance) -> Tensor:
    """Classifier-free guidance of two velocities, with its refinements.

    Args:
        positive, negative: [B, ...] float32 velocities.
    Returns:
        [B, ...] float32.
    Source: CFG arXiv:2207.12598; CFG-Zero* arXiv:2503.18886, equation 8; rescale
        arXiv:2305.08891, equation 16.
    """
    axes = tuple(range(1, positive.ndim))
    if guidance.cfg_zero_star:
        dot = (positive * negative).sum(axes, keepdim=True)
        negative = negative * (dot / (negative.square().sum(axes, keepdim=True) + 1e-8))
    guided = negative + guidance.true_cfg_scale * (positive - negative)
    if guidance.guidance_rescale > 0:
        deviation = guided.std(axes, keepdim=True).clamp_min(1e-12)
        factor = positive.std(axes, keepdim=True) / deviation
        guided = guided * (guidance.guidance_rescale * factor + 1 - guidance.guidance_rescale)
    return guided


def guided_velocity(
    transformer: SkyReelsTransformer,
    image_latents: Tensor,
    conditioning: Conditioning,
    sigmas: Tensor,
    guidance: Guidance,
    *,
    rope: Tensor,
    run_block: RunBlock,
    attention: Attention = sdpa,
    layout: Layout = LAYOUTS["whole"],
    cache: CacheConfig = OFF,
) -> Velocity:
    """The function a solver integrates.

    Args:
        image_latents: [1, 16, T, h, w] float32, model space, zero where nothing is given.
        conditioning: of the prompt (0) and, while true_cfg_scale > 1, of the negative one (1).
        sigmas: [N + 1] of the run; where a sigma falls decides about the CFG window.
        rope: from `rope_table`.
        cache: which steps are skipped; with a cache, one call is one step.
    Source: reuse of the guidance difference, arXiv:2410.19355 (FasterCache), there with weights
        for high and low frequencies.
    """
    num_steps = len(sigmas) - 1
    schedule = sigmas[:-1].cpu()
    steps = start_cache(cache, num_steps, run_block, transformer.blocks)
    # positive - negative and the step it was computed in, kept only if it is to be used again
    difference: Tensor | None = None
    difference_step = 0

    def predict(latents: Tensor, timestep: float, branch: int, cached: RunBlock) -> Tensor:
        return transformer.denoise(
            torch.cat([latents, image_latents], dim=1),
            conditioning(branch, timestep, run_block),
            rope=rope,
            attention=attention,
            run_block=cached,
            layout=layout,
        ).float()

    def velocity(latents: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor | None]:
        nonlocal difference, difference_step
        sigma = sigma.to("cpu", torch.float32)
        # a solver may ask between two sigmas of the schedule: that still belongs to the earlier
        step = max(0, int((schedule >= sigma - 1e-6).sum()) - 1)
        if step < guidance.zero_init_steps:
            return torch.zeros_like(latents), None
        timestep = float(sigma * NUM_TRAIN_TIMESTEPS)
        in_window = guidance.cfg_start <= step / num_steps < guidance.cfg_end
        is_guided = guidance.true_cfg_scale > 1 and in_window
        steps.begin(step, latents, 2 if is_guided and difference is None else 1)
        positive = steps.predict(0, partial(predict, latents, timestep, 0))
        if step == num_steps - 1:
            steps.report()
        if not is_guided:
            return positive, None
        is_early = step < protected_start(num_steps)
        is_due = is_early or step - difference_step >= guidance.cfg_reuse
        if difference is not None and (steps.skips or not is_due):
            unwanted = positive - difference
        else:
            unwanted = steps.predict(1, partial(predict, latents, timestep, 1))
            if guidance.cfg_reuse > 1:
                difference, difference_step = positive - unwanted, step
        return combine(positive, unwanted, guidance), unwanted

    return velocity


def sample(
    transformer: SkyReelsTransformer,
    image: ImageConditioning,
    prompt: PromptEmbeds,
    negative: PromptEmbeds | None = None,
    *,
    seed: int,
    sigmas: Tensor,
    guidance: Guidance = Guidance(),  # noqa: B008 - frozen
    solver: Solver = euler,
    init_latents: Tensor | None = None,
    add_noise: bool = True,
    riflex_k: int = 4,
    resume: Path | None = None,
    attention: Attention | str = "exact",
    cache: CacheConfig = OFF,
    runtime: Runtime,
) -> Tensor:
    """Noise to the latents of a clip.

    A schedule may be run in parts: one that stops above 0 gives latents that the next continues
    from with add_noise off. Between the two they are divided by 1 - sigma, as ComfyUI does.

    Args:
        transformer: on any device; it is streamed if it does not fit.
        image: from `encode_image`.
        prompt, negative: from `encode_prompt` or a host; negative is needed if true CFG is on.
        seed: of the initial noise.
        sigmas: [N + 1] float32 falling, from `get_sigmas` or one's own.
        solver: `euler` or any function of its signature.
        init_latents: [1, 16, T, h, w] VAE space, the clip to start from when sigmas[0] < 1.
        add_noise: False continues the unfinished clip in init_latents.
        riflex_k: see `rope_table`; only clips beyond 197 frames change.
        resume: file in which each finished step is kept, or a folder in which that file is named
            by the inputs; if it exists and belongs to the same inputs, the run continues from
            there. The finished latents stay in it: remove it when they are safe. Euler only.
        attention: "exact", "fast" (8 bits, where the device has a kernel for it), or a function;
            see attention.py.
        cache: which steps are skipped, see cache.py. Euler only; resumed, it starts anew.
        runtime: progress "sample" in steps with the denoised estimate; asked for an interrupt
            before every block.
    Returns:
        [1, 16, T, h, w] float32 on the CPU, VAE space.
    Raises:
        OptionError, ShapeError, TextError, OutOfRoomError, CheckpointError: see the messages.
    """
    check_inputs(transformer, image, prompt, negative, sigmas, guidance, init_latents)
    if not add_noise and init_latents is None:
        raise OptionError("Without noise there must be a clip to continue: give a start latent.")
    if riflex_k < 0:
        raise OptionError(f"RIFLEx k {riflex_k} cannot be: use 4, or 0 for off.")
    if resume is not None and solver is not euler:
        raise OptionError(
            "Resuming needs the Euler solver: others carry a history that is not saved. "
            "Disconnect the sampler or switch resuming off."
        )
    if cache.kind != "off" and solver is not euler:
        raise OptionError(
            "Caching needs the Euler solver: others make more of a prediction than one step, so "
            "one that is foretold misleads them. Disconnect the sampler or set the cache to off."
        )
    device = runtime.device
    noise = initial_noise(seed, image.num_frames, image.height, image.width)
    latents = noise * (sigmas[0] if add_noise else 0.0)
    if init_latents is not None:
        latents = latents + (1 - sigmas[0]) * to_model_space(init_latents.float().cpu())

    first_step, fingerprint = 0, ""
    if resume is not None:
        fingerprint = fingerprint_run(
            transformer, image, prompt, negative, seed, sigmas, guidance, init_latents, add_noise,
            riflex_k, cache, attention if isinstance(attention, str) else "a function",
        )  # fmt: skip
        if os.path.isdir(resume):
            resume = resume / f"{fingerprint[:32]}.safetensors"
        first_step, latents = load_state(resume, fingerprint, latents, len(sigmas) - 1)

    num_steps = len(sigmas) - 1
    grid = transformer.token_grid(image.latent_shape)
    branches = [prompt]
    if negative is not None and guidance.true_cfg_scale > 1:
        branches.append(negative)

    reported = first_step

    def on_step(step: int, latents: Tensor, denoised: Tensor) -> None:
        nonlocal reported
        reported = first_step + step + 1
        if resume is not None and bool(latents.isfinite().all()):
            try:
                save_state(resume, fingerprint, first_step + step + 1, latents)
            except OSError as error:  # a full disk must not cost the run
                logger.warning("Step %d is not kept in %s: %s.", step + 1, resume, error)
        runtime.progress("sample", reported, num_steps, denoised)

    runtime.progress("sample", first_step, num_steps)
    if first_step == num_steps:
        return to_vae_space(latents / (1 - sigmas[-1]))
    attend = attention
    if isinstance(attend, str):
        size: Any = {
            "heads": transformer.config.num_attention_heads,
            "head_dim": transformer.config.attention_head_dim,
            "tokens": longest_branch(transformer, image, prompt, negative),
            "dtype": transformer.compute_dtype,
        }
        if attend == "fast":  # its kernels are tried at this size before the weights come
            runtime.make_room(trial_bytes(**size))
        attend = choose_attention(device, attend, **size).impl
    with torch.inference_mode():
        conditioning = precompute(
            transformer, branches, (sigmas[first_step:-1] * NUM_TRAIN_TIMESTEPS).tolist(),
            torch.tensor([guidance.guidance_scale * NUM_TRAIN_TIMESTEPS]),
            attention=attend, runtime=runtime,
        )  # fmt: skip
        needed = {
            layout: run_bytes(transformer, image, prompt, negative, cache, layout, attention)
            for layout in LAYOUTS
        }
        layout = choose_layout(transformer, needed, runtime)
        num_bytes = needed[layout]
        asked_for = (num_steps - first_step) * len(branches)
        if solver is not euler or asked_for > MAX_KEPT:
            # a time that is not kept, between two steps or late in a long run: conditioners visit
            num_bytes += max(weight_bytes(module) for module in transformer.conditioners)
        with placed(transformer, runtime, num_bytes) as run_block:
            velocity = guided_velocity(
                transformer, image.padded().to(device), conditioning, sigmas, guidance,
                rope=rope_table(grid, transformer.config, riflex_k=riflex_k, device=device),
                run_block=run_block, attention=attend, layout=LAYOUTS[layout], cache=cache,
            )  # fmt: skip
            levels = sigmas[first_step:].to("cpu" if solver is euler else device)
            latents = solver(velocity, latents.to(device), levels, on_step)
    if not bool(latents.isfinite().all()):
        raise ShapeError(
            "The sampled latents hold NaN or infinity: try precision bf16 or fp32, and check the "
            "checkpoint."
        )
    if reported != num_steps:  # solvers may take fewer or more steps than there are sigmas
        runtime.progress("sample", num_steps, num_steps)
    return to_vae_space(latents.float().cpu() / (1 - sigmas[-1].cpu()))


def longest_branch(
    transformer: SkyReelsTransformer,
    image: ImageConditioning,
    prompt: PromptEmbeds,
    negative: PromptEmbeds | None,
) -> int:
    """Image and text tokens of the branch with more text."""
    branches = [prompt] if negative is None else [prompt, negative]
    text_tokens = max(embeds.prompt_embeds.shape[1] for embeds in branches)
    return math.prod(transformer.token_grid(image.latent_shape)) + text_tokens


def run_bytes(
    transformer: SkyReelsTransformer,
    image: ImageConditioning,
    prompt: PromptEmbeds,
    negative: PromptEmbeds | None,
    cache: CacheConfig = OFF,
    layout: str = "chunks",
    attention: Attention | str = "exact",
) -> int:
    """Peak bytes of a run beyond the weights: its longer branch, and what a cache holds.

    Args:
        layout: a name of config.LAYOUTS. attention: as for `sample`.
    """
    num_image_tokens = math.prod(transformer.token_grid(image.latent_shape))
    num_branches, dtype = 1 if negative is None else 2, transformer.compute_dtype
    held = cache_bytes(
        cache, transformer.config, image.latent_shape, num_image_tokens, num_branches, dtype
    )
    num_tokens = longest_branch(transformer, image, prompt, negative)
    if attention == "fast":
        held += FAST_BYTES * num_tokens * transformer.config.hidden_size
    return held + sampling_bytes(transformer.config, num_tokens, dtype, layout)


def check_inputs(
    transformer: SkyReelsTransformer,
    image: ImageConditioning,
    prompt: PromptEmbeds,
    negative: PromptEmbeds | None,
    sigmas: Tensor,
    guidance: Guidance,
    init_latents: Tensor | None,
) -> None:
    """Refuse what `sample` cannot run, before anything is moved to a device.

    Args and errors: as for `sample`.
    """
    check_prompt_embeds(prompt, transformer.config)
    if negative is not None:
        check_prompt_embeds(negative, transformer.config)
    elif guidance.true_cfg_scale > 1:
        raise OptionError(
            f"CFG {guidance.true_cfg_scale} needs a negative prompt: give one (it may be empty), "
            "or set CFG to 1."
        )
    if sigmas.ndim != 1 or len(sigmas) < 2 or not bool((sigmas.diff() < 0).all()):
        raise OptionError(
            "Sigmas must be a falling row of at least two numbers; got "
            f"{[round(s, 4) for s in sigmas.flatten().tolist()[:6]]}."
        )
    if sigmas[0] > 1 or sigmas[-1] < 0:
        raise OptionError(
            f"Sigmas run from {sigmas[0].item():.9g} to {sigmas[-1].item():.9g}, and flow matching "
            "lives within 1..0: use a flow schedule (shift 7), not one of an older model."
        )
    for name, scale in (
        ("CFG", guidance.true_cfg_scale),
        ("Embedded guidance", guidance.guidance_scale),
    ):
        if not 0.0 <= scale <= 100.0:
            raise OptionError(
                f"{name} {scale} is not within 0..100: use {6 if name == 'CFG' else 1}."
            )
    if not 0.0 <= guidance.cfg_start <= guidance.cfg_end <= 1.0:
        raise OptionError(
            f"The CFG window {guidance.cfg_start}..{guidance.cfg_end} is not a part of 0..1."
        )
    if not 0.0 <= guidance.guidance_rescale <= 1.0:
        raise OptionError(f"Guidance rescale {guidance.guidance_rescale} is not within 0..1.")
    if init_latents is not None and not bool(init_latents.isfinite().all()):
        raise ShapeError("The start latent holds NaN or infinity: check the node that made it.")
    if guidance.cfg_reuse < 0:
        raise OptionError(
            f"CFG reuse {guidance.cfg_reuse} cannot be: use 2 for every second step, 0 for off."
        )
    if guidance.zero_init_steps < 0:
        raise OptionError(f"{guidance.zero_init_steps} zero-init steps cannot be: use 0 for off.")
    if tuple(image.image_latents.shape[3:]) != image.latent_shape[3:]:
        raise ShapeError(
            f"Image latents of {list(image.image_latents.shape)} do not fit a video of "
            f"{image.width}x{image.height}: encode the picture at that size."
        )
    if init_latents is not None and tuple(init_latents.shape) != image.latent_shape:
        raise ShapeError(
            f"The start latent is {list(init_latents.shape)}, and a video of {image.width}x"
            f"{image.height}x{image.num_frames} has {list(image.latent_shape)}: encode a clip of "
            "that size."
        )
