"""From noise to latents: guidance, bytes, and the run itself.

Latents, sigmas, timesteps and everything guidance does are float32; only the transformer itself
computes in the dtype of its weights. Of the two branches of guidance, one runs after the other, or
one block of each in turn: their texts have different lengths, and nothing is padded or masked.

The Euler loop reads nothing back from the device, so that the host can queue one step while another
runs: sigmas and timesteps stay on the CPU, where a scalar multiplies a tensor of any device.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..config import (
    CHUNKINGS,
    NUM_TRAIN_TIMESTEPS,
    Chunking,
    ContextWindows,
    FreSca,
    Guidance,
    SkipLayers,
)
from ..errors import OptionError, ShapeError
from ..ladder import retried
from ..latents import (
    ImageConditioning,
    check_conditioning,
    check_picture,
    latent_shape,
    seeded_generator,
    to_model_space,
    to_vae_space,
)
from ..lora.apply import check_loras, use_loras
from ..offload import weight_bytes
from ..plan import MAX_KEPT, Job, Rung, activation_bytes, weights_of
from ..runtime import Runtime
from ..text.embeds import PromptEmbeds, check_prompt_embeds
from ..transformer.attention import Attention, choose_attention, sdpa, trial_bytes
from ..transformer.layers import DoubleBlock, rope_table
from ..transformer.model import RunBlock, SkyReelsTransformer
from ..transformer.placement import placed
from .finite import FiniteWatch, suspects
from .planned import start_run
from .precompute import StepLookup, precompute
from .prompts import (
    Prompt,
    Weights,
    average,
    one_prompt_each,
    report_gaps,
    scheduled,
    weights_of_prompts,
)
from .resume import SaveStep, fingerprint_run, resume_run
from .settings import OnStep, SamplingSettings, Velocity, euler
from .step_cache import OFF, CacheConfig, cache_bytes, start_cache
from .windows import Picture, evaluated_shape, picture_of_run, predict_clip


def initial_noise(seed: int, num_frames: int, height: int, width: int, index: int = 0) -> Tensor:
    """One seed, one noise, on every device: from a CPU generator.

    Args:
        seed: 0..2^64-1.
        num_frames: of the video, 4k + 1.
        height: of the video, in pixels.
        width: of the video, in pixels.
        index: of the clip in a batch: its noise comes after that of the clips before it.

    Returns:
        [1, 16, T, h, w] float32.

    Raises:
        OptionError: a seed outside 0..2^64-1.
    """
    generator, shape = seeded_generator(seed), latent_shape(num_frames, height, width)
    for _ in range(index):
        torch.randn(shape, generator=generator)
    return torch.randn(shape, generator=generator)


def combine(positive: Tensor, negative: Tensor, guidance: Guidance) -> Tensor:
    """Classifier-free guidance of two velocities, with its refinements.

    Args:
        positive: [B, ...] float32 velocity.
        negative: [B, ...] float32 velocity.
        guidance: scale and refinements.

    Returns:
        [B, ...] float32.

    Source: CFG arXiv:2207.12598; CFG-Zero* arXiv:2503.18886, equation 8; rescale
        arXiv:2305.08891, equation 16.
    """
    axes = tuple(range(1, positive.ndim))
    if guidance.cfg_zero_star:
        dot = (positive * negative).sum(axes, keepdim=True)
        negative = negative * (dot / (negative.square().sum(axes, keepdim=True) + 1e-8))
    difference = positive - negative
    if guidance.fresca is not None:
        difference = scale_frequencies(difference, guidance.fresca)
    guided = negative + guidance.true_cfg_scale * difference
    if guidance.guidance_rescale > 0:
        deviation = guided.std(axes, keepdim=True).clamp_min(1e-12)
        factor = positive.std(axes, keepdim=True) / deviation
        guided = guided * (guidance.guidance_rescale * factor + 1 - guidance.guidance_rescale)
    return guided


def scale_frequencies(difference: Tensor, fresca: FreSca) -> Tensor:
    """Scale low and high frequencies of each latent frame.

    Args:
        difference: [..., h, w] float32, positive less negative prediction.
        fresca: factors and cutoff.

    Returns:
        [..., h, w] float32; `difference` itself if both factors are 1.

    Source: arXiv:2504.02154 (FreSca), with the square of low indices -cutoff..cutoff - 1 of its
        code, WikiChao/FreSca, which ComfyUI's node FreSca has too.
    """
    if fresca.low == fresca.high == 1.0:
        return difference
    factors = torch.full(difference.shape[-2:], fresca.high, device=difference.device)
    window = []
    for size in factors.shape:
        reach = min(fresca.cutoff, size // 2)
        window.append(slice(size // 2 - reach, size // 2 + reach))
    factors[tuple(window)] = fresca.low
    spectrum = torch.fft.fft2(difference) * torch.fft.ifftshift(factors)
    scaled: Tensor = torch.fft.ifft2(spectrum).real
    return scaled


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


def guided_velocity(
    transformer: SkyReelsTransformer,
    picture: Picture,
    lookup: StepLookup,
    sigmas: Tensor,
    guidance: Guidance,
    *,
    weights: Weights = one_prompt_each,
    rope: Tensor,
    run_block: RunBlock,
    attention: Attention = sdpa,
    chunking: Chunking = CHUNKINGS["whole"],
    cache: CacheConfig = OFF,
    interleaves: bool = False,
) -> Velocity:
    """The function a solver integrates.

    Args:
        transformer: the network.
        picture: [1, 16, T, h, w] float32, model space, zero where nothing is given; None for a
            text-to-video transformer; or, for a clip in windows, a `Windowed`.
        lookup: from `precompute`, of the prompts that `weights` names.
        sigmas: [N + 1] of the run; where a sigma falls decides about the CFG window.
        guidance: how the two predictions are combined.
        weights: which prompts make them; by default the first and, while true_cfg_scale > 1, the
            second one.
        rope: from `rope_table`, of the clip or of a window.
        run_block: runs one block of the transformer.
        attention: see transformer/attention.py.
        chunking: how much of a block is computed at a time.
        cache: which steps are skipped; with a cache, one call is one step.
        interleaves: where a step needs more than one prediction, each block runs for two of them
            before the next one does, which a cache cannot follow. The result is the same.

    Returns:
        The function, for the whole run.

    Source: skip-layer guidance arXiv:2411.18664 (STG, with the residual skip), which ComfyUI's
        SkipLayerGuidanceDiT adds likewise; in the negative prediction, SkipLayerGuidanceDiTSimple.
    """
    assert not (interleaves and cache.kind != "off")
    num_steps = len(sigmas) - 1
    schedule = sigmas[:-1].cpu()
    left_out = _blocks(transformer, guidance.skip_layers)
    steps = start_cache(cache, num_steps, run_block, transformer.blocks)

    def predict_each(
        latents: Tensor, sigma: Tensor, branches: Sequence[int], cached: RunBlock
    ) -> Sequence[Tensor]:
        timestep = float(sigma * NUM_TRAIN_TIMESTEPS)
        conditioned = [lookup(branch, timestep, run_block) for branch in branches]

        velocities = predict_clip(
            lambda latents, image_latents: transformer.denoise_together(
                _with_picture(latents, image_latents),
                conditioned,
                rope=rope,
                attention=attention,
                run_block=cached,
                chunking=chunking,
            ),
            latents,
            picture,
            _step_of(sigma, schedule),
        )
        return [velocity.float() for velocity in velocities]

    def predict_all(
        step: int,
        latents: Tensor,
        sigma: Tensor,
        branches: Sequence[int],
        weak: Collection[int],
    ) -> Iterator[Tensor]:
        if interleaves and not weak:  # by twos, for which memory is planned
            for first in range(0, len(branches), 2):
                yield from predict_each(latents, sigma, branches[first : first + 2], run_block)
        else:
            if branches:
                steps.begin(step, latents, branches)
            for branch in branches:
                is_weak = branch in weak
                yield steps.predict(branch, partial(predict, latents, sigma, branch, is_weak))

    def predict(
        latents: Tensor, sigma: Tensor, branch: int, is_weak: bool, cached: RunBlock
    ) -> Tensor:
        cached = leaving_out(cached, left_out) if is_weak else cached
        return predict_each(latents, sigma, [branch], cached)[0]

    def velocity(latents: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor | None]:
        sigma = sigma.to("cpu", torch.float32)
        step = _step_of(sigma, schedule)
        if step < guidance.zero_init_steps:
            return torch.zeros_like(latents), None
        is_guided = guidance.true_cfg_scale > 1 and guidance.is_in_window(step, num_steps)
        scale = guidance.skip_scale(step, num_steps)
        sides = [weights(side, sigma) for side in range(2 if is_guided else 1)]
        branches = [branch for side in sides for branch, _ in side]
        weak = _negative_branches(sides) if scale == 0 else set()
        made = predict_all(step, latents, sigma, branches, weak)
        averages = [average(made, side, latents, sigma) for side in sides]
        if step == num_steps - 1:
            steps.report()
        positive, negative = averages[0], averages[1] if is_guided else None
        guided = positive if negative is None else combine(positive, negative, guidance)
        if scale:
            made = (predict(latents, sigma, branch, True, run_block) for branch, _ in sides[0])
            guided = guided + scale * (positive - average(made, sides[0], latents, sigma))
        return guided, negative

    return velocity


def _step_of(sigma: Tensor, schedule: Tensor) -> int:
    """The step that a sigma belongs to: between two of the schedule, the earlier one's."""
    return max(0, int((schedule >= sigma - 1e-6).sum()) - 1)


def _negative_branches(sides: Sequence[Sequence[tuple[int, float]]]) -> set[int]:
    return {branch for side in sides[1:] for branch, _ in side}


def _blocks(transformer: SkyReelsTransformer, skip: SkipLayers | None) -> list[nn.Module]:
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


def sample(
    transformer: SkyReelsTransformer,
    image: ImageConditioning,
    prompt: Prompt,
    negative: Prompt | None,
    settings: SamplingSettings,
    *,
    runtime: Runtime,
) -> Tensor:
    """Noise to the latents of a clip.

    Args:
        transformer: on any device; it is streamed if it does not fit.
        image: from `encode_image`; for a text-to-video transformer, a size without latents.
        prompt: from `encode_prompt` or a host; or several with their strengths and ranges, of which
            each costs one evaluation at every step where it counts.
        negative: likewise; needed if true CFG is on.
        settings: schedule, seed, guidance, solver, shortcuts.
        runtime: progress "sample" in steps with the denoised estimate; asked for an interrupt
            before every block.

    Returns:
        [1, 16, T, h, w] float32 on the CPU, VAE space.

    Raises:
        OptionError: true CFG without a negative prompt, saved steps of another run, a picture where
            the transformer takes none and the other way round, or a LoRA's list of blocks with one
            that is not there.
        ShapeError: latents of another size than the video's, an input with NaN or infinity, or a
            step whose result has them.
        TextError: embeddings that do not fit the transformer.
        OutOfRoomError: not even one block fits the device.
        CheckpointError: a damaged file of saved steps; a LoRA that does not fit these weights, or
            weights that must be read again and are gone.
    """
    run = _RunPrompts(prompt, negative if settings.uses_cfg else None)
    _check_inputs(transformer, image, prompt, negative, settings)
    use_loras(transformer, settings.loras, runtime=runtime)
    num_steps, last_sigma = settings.num_steps, settings.sigmas[-1].cpu()
    latents, first_step = _start(image, settings), 0
    save_step: SaveStep = _save_nothing
    if settings.resume is not None:
        fingerprint = fingerprint_run(transformer, image, prompt, negative, settings)
        first_step, latents, save_step = resume_run(
            settings.resume, fingerprint, latents, num_steps
        )
    runtime.progress("sample", first_step, num_steps)
    if first_step == num_steps:
        return to_vae_space(latents / (1 - last_sigma))
    run.report_gaps(settings)
    reported = first_step
    watch = FiniteWatch(num_steps, runtime.device, suspects(transformer, settings))

    def on_step(step: int, latents: Tensor, denoised: Tensor) -> None:
        nonlocal reported
        reported = first_step + step + 1
        watch.note(reported, latents)
        save_step(reported, latents)
        runtime.progress("sample", reported, num_steps, denoised)

    latents = _denoise(
        transformer,
        image,
        run,
        settings,
        latents,
        first_step=first_step,
        on_step=on_step,
        runtime=runtime,
    )
    watch.finish(latents)
    if reported != num_steps:  # solvers may take fewer or more steps than there are sigmas
        runtime.progress("sample", num_steps, num_steps)
    return to_vae_space(latents.float().cpu() / (1 - last_sigma))


class _RunPrompts:
    """The prompts of a run: the positive ones, then the negative ones."""

    def __init__(self, prompt: Prompt, negative: Prompt | None) -> None:
        positive = scheduled(prompt)
        both = (positive, () if negative is None else scheduled(negative))
        self.has_negative = negative is not None
        self.all = (*both[0], *both[1])
        self.embeds = [each.embeds for each in self.all]
        self.weights = weights_of_prompts(*both)

    def at(self, step: int, sigmas: Tensor, guidance: Guidance | None = None) -> list[int]:
        """Indices of those that a step takes; with `guidance`, in its window only."""
        is_guided = self.has_negative
        if guidance is not None:
            is_guided = is_guided and guidance.is_in_window(step, len(sigmas) - 1)
        sides = range(2 if is_guided else 1)
        return [index for side in sides for index, _ in self.weights(side, sigmas[step])]

    def embedded_guidance(self, guidance: Guidance) -> Tensor:
        """[P] float32, of each, times 1000."""
        scales = [
            guidance.guidance_scale if each.guidance_scale is None else each.guidance_scale
            for each in self.all
        ]
        return torch.tensor([scale * NUM_TRAIN_TIMESTEPS for scale in scales])

    def report_gaps(self, settings: SamplingSettings) -> None:
        """Warn of steps at which no prompt counts."""
        sigmas, steps = settings.sigmas.float().cpu(), list(range(settings.num_steps))
        report_gaps(self.weights, 0, sigmas, steps)
        if self.has_negative:
            window = [s for s in steps if settings.guidance.is_in_window(s, settings.num_steps)]
            report_gaps(self.weights, 1, sigmas, window)


def _save_nothing(step: int, latents: Tensor) -> None:
    """What is done with a finished step of a run that is not saved."""


def _start(image: ImageConditioning, settings: SamplingSettings) -> Tensor:
    """[1, 16, T, h, w] float32 at the first sigma, on the CPU."""
    sigma = settings.sigmas[0]
    noise = initial_noise(
        settings.seed, image.num_frames, image.height, image.width, settings.noise_index
    )
    latents = noise * (sigma if settings.add_noise else 0.0)
    if settings.init_latents is not None:
        latents = latents + (1 - sigma) * to_model_space(settings.init_latents.float().cpu())
    return latents


def _denoise(
    transformer: SkyReelsTransformer,
    image: ImageConditioning,
    prompts: _RunPrompts,
    settings: SamplingSettings,
    latents: Tensor,
    *,
    first_step: int,
    on_step: OnStep,
    runtime: Runtime,
) -> Tensor:
    """Latents at the last sigma, on the device, from those after `first_step` steps."""
    device, sigmas = runtime.device, settings.sigmas[first_step:]
    guidance, is_euler = settings.guidance, settings.solver is euler
    needed = run_bytes(transformer, image, prompts.embeds, settings)
    taken = [
        prompts.at(step, settings.sigmas.cpu()) for step in range(first_step, settings.num_steps)
    ]
    if not is_euler or sum(map(len, taken)) > MAX_KEPT:
        # a timestep that is not kept, between two steps or late in a long run, is computed when it
        # is looked up, and its weights need room
        largest = max(weight_bytes(module) for module in transformer.conditioners)
        needed = {name: num_bytes + largest for name, num_bytes in needed.items()}
    with runtime.place(transformer, needed["chunks"]), torch.inference_mode():
        tokens = num_tokens(transformer, image, prompts.embeds, settings.windows)
        attention = attention_of_run(transformer, tokens, settings.attention, runtime)
        run = start_run(transformer, _job(transformer, image, prompts, settings), needed, runtime,
                        "exact" if settings.attention == "exact" else "fast")  # fmt: skip
        lookup = retried(
            partial(
                precompute,
                transformer,
                prompts.embeds,
                (sigmas[:-1] * NUM_TRAIN_TIMESTEPS).tolist(),
                prompts.embedded_guidance(guidance),
                needed=taken,
                attention=attention,
                runtime=runtime,
            ),
            runtime,
            run.plan.peak_bytes["condition"],
            "Preparing the text for every step",
        )
        picture = picture_of_run(image, settings.windows, device)
        kept = None if settings.noise_mask is None else _Kept(image, settings, device)
        rope = rope_table(
            transformer.token_grid(evaluated_shape(image, settings.windows)),
            transformer.config,
            riflex_k=settings.riflex_k,
            device=device,
        )

        @contextmanager
        def on_rung(rung: Rung) -> Iterator[Velocity]:
            with placed(transformer, runtime, run.bytes_on(rung)) as run_block:
                velocity = guided_velocity(
                    transformer,
                    picture,
                    lookup,
                    settings.sigmas,
                    guidance,
                    weights=prompts.weights,
                    rope=rope,
                    run_block=run_block,
                    attention=attention,
                    chunking=CHUNKINGS[rung.chunking],
                    cache=settings.cache,
                    interleaves=rung.interleaves,
                )
                yield velocity if kept is None else kept.around(velocity)

        sigmas = sigmas.to("cpu" if is_euler else device)
        with run.descending(on_rung) as velocity:
            result = settings.solver(velocity, latents.to(device), sigmas, run.marking(on_step))
            is_plain = settings.cache.kind == "off" and guidance.skip_layers is None
            run.finish(is_alike=is_euler and is_plain)
        return result


def _job(
    transformer: SkyReelsTransformer,
    image: ImageConditioning,
    prompts: _RunPrompts,
    settings: SamplingSettings,
) -> Job:
    num_steps, sigmas = settings.num_steps, settings.sigmas.cpu()
    evaluations = sum(len(prompts.at(step, sigmas, settings.guidance)) for step in range(num_steps))
    extra = [
        len(prompts.weights(0, sigmas[step]))
        for step in range(num_steps)
        if settings.guidance.skip_scale(step, num_steps)
    ]
    return Job(
        width=image.width,
        height=image.height,
        num_frames=image.num_frames,
        num_steps=num_steps,
        num_guided=max(0, evaluations - num_steps),
        num_extra=sum(extra),
        text_tokens=max(embeds.prompt_embeds.shape[1] for embeds in prompts.embeds),
        held_bytes=_held_bytes(transformer, image, prompts.embeds, settings),
        config=transformer.config,
        vae=None,
        windows=settings.windows,
    )


def attention_of_run(
    transformer: SkyReelsTransformer, tokens: int, mode: Attention | str, runtime: Runtime
) -> Attention:
    """The attention of a run, see `choose_attention`.

    Args:
        transformer: whose sizes and dtype count.
        tokens: image and text tokens of its longer branch.
        mode: of MODES; a function is taken as it is.
        runtime: where; it makes room for trying kernels.

    Returns:
        The function.
    """
    if not isinstance(mode, str):
        return mode
    size: Any = {
        "heads": transformer.config.num_attention_heads,
        "head_dim": transformer.config.attention_head_dim,
        "tokens": tokens,
        "dtype": transformer.compute_dtype,
    }
    if mode == "fast":  # its kernels are tried at this size
        runtime.make_room(trial_bytes(**size))
    attention: Attention = choose_attention(runtime.device, mode, **size).impl
    return attention


def num_tokens(
    transformer: SkyReelsTransformer,
    image: ImageConditioning,
    prompts: Sequence[PromptEmbeds],
    windows: ContextWindows | None = None,
) -> int:
    """Image and text tokens of an evaluation with the prompt that has more text."""
    text_tokens = max(embeds.prompt_embeds.shape[1] for embeds in prompts)
    return math.prod(transformer.token_grid(evaluated_shape(image, windows))) + text_tokens


def run_bytes(
    transformer: SkyReelsTransformer,
    image: ImageConditioning,
    prompts: Sequence[PromptEmbeds],
    settings: SamplingSettings,
) -> dict[str, int]:
    """Peak bytes of a run beyond the weights: its longer branch, and what a cache holds.

    Args:
        transformer: whose sizes count.
        image: size of the clip.
        prompts: the positive prompt and, if it is used, the negative one.
        settings: of the run.

    Returns:
        Bytes for each name in config.CHUNKINGS.
    """
    held = _held_bytes(transformer, image, prompts, settings)
    attention = "fast" if settings.attention == "fast" else "exact"
    tokens = num_tokens(transformer, image, prompts, settings.windows)
    return activation_bytes(transformer.config, tokens, weights_of(transformer), attention, held)


def _held_bytes(
    transformer: SkyReelsTransformer,
    image: ImageConditioning,
    prompts: Sequence[PromptEmbeds],
    settings: SamplingSettings,
) -> int:
    """What a step cache keeps through the run."""
    shape, dtype = image.latent_shape, transformer.compute_dtype
    num_image_tokens = math.prod(transformer.token_grid(shape))
    return cache_bytes(
        settings.cache, transformer.config, shape, num_image_tokens, len(prompts), dtype
    )


class _Kept:
    """What a noise mask keeps of the start latents, at every evaluation as ComfyUI's core does.

    The network sees the start where the mask is 0, without noise, and its prediction there is
    replaced by the start. Source: KSamplerX0Inpaint of comfy/samplers.py.
    """

    def __init__(
        self, image: ImageConditioning, settings: SamplingSettings, device: torch.device
    ) -> None:
        start, mask = settings.init_latents, settings.noise_mask
        assert mask is not None
        self._mask = mask.to(device, torch.float32)
        latents = torch.zeros(image.latent_shape) if start is None else start.float().cpu()
        self._start = to_model_space(latents).to(device)

    def around(self, velocity: Velocity) -> Velocity:
        """The velocity whose denoised clip is the start where the mask is 0."""
        mask, kept = self._mask, self._start * (1 - self._mask)

        def masked(latents: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor | None]:
            mixed = latents * mask + kept
            guided, negative = velocity(mixed, sigma)
            denoised = (mixed - sigma * guided) * mask + kept
            if negative is not None:
                negative = (latents - (mixed - sigma * negative)) / sigma
            return (latents - denoised) / sigma, negative

        return masked


def _check_inputs(
    transformer: SkyReelsTransformer,
    image: ImageConditioning,
    prompt: Prompt,
    negative: Prompt | None,
    settings: SamplingSettings,
) -> None:
    """Refuse inputs that do not fit each other, before anything is moved to a device."""
    check_loras(transformer, settings.loras)
    check_picture(transformer.config, image.image_latents is not None)
    _blocks(transformer, settings.guidance.skip_layers)
    for each in scheduled(prompt):
        check_prompt_embeds(each.embeds, transformer.config)
    if negative is not None:
        for each in scheduled(negative):
            check_prompt_embeds(each.embeds, transformer.config)
    elif settings.uses_cfg:
        raise OptionError(
            f"CFG {settings.guidance.true_cfg_scale} needs a negative prompt: give one (it may be "
            "empty), or set CFG to 1."
        )
    check_conditioning(image)
    start, mask = settings.init_latents, settings.noise_mask
    if start is not None and tuple(start.shape) != image.latent_shape:
        raise ShapeError(
            f"The start latent is {list(start.shape)}, and a video of {image.width}x"
            f"{image.height}x{image.num_frames} has {list(image.latent_shape)}: encode a clip of "
            "that size."
        )
    if mask is not None and not _is_mask_of(mask, image.latent_shape):
        raise ShapeError(
            f"The noise mask is {list(mask.shape)}, and a video of {image.width}x{image.height}x"
            f"{image.num_frames} has latents of {list(image.latent_shape)}: give one value for "
            "each of them, or [1, 1, T, h, w]."
        )


def _is_mask_of(mask: Tensor, shape: tuple[int, ...]) -> bool:
    return mask.ndim == 5 and mask.shape[1] in (1, shape[1]) and (
        mask.shape[0], *mask.shape[2:]
    ) == (shape[0], *shape[2:])  # fmt: skip
