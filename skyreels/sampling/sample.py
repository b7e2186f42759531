"""From noise to latents: guidance, bytes, and the run itself.

Latents, sigmas, timesteps and everything guidance does are float32; only the transformer itself
computes in the dtype of its weights. Of the two branches of guidance, one runs after the other, or
one block of each in turn: their texts have different lengths, and nothing is padded or masked.

The Euler loop reads nothing back from the device, so that the host can queue one step while another
runs: sigmas and timesteps stay on the CPU, where a scalar multiplies a tensor of any device.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from ..conditioning.embeds import PromptEmbeds, check_prompt_embeds
from ..conditioning.latents import (
    ImageConditioning,
    check_conditioning,
    check_picture,
    latent_shape,
    seeded_generator,
    to_model_space,
    to_vae_space,
)
from ..config import (
    CHUNKINGS,
    NUM_TRAIN_TIMESTEPS,
    ContextWindows,
    Guidance,
)
from ..errors import OptionError, ShapeError
from ..plan import MAX_KEPT, Job, Rung, activation_bytes, weights_of
from ..runtime import Runtime
from ..runtime.collectives import NOBODY, RankPeers, shares, told_by_first
from ..runtime.ladder import retried
from ..runtime.offload import weight_bytes
from ..transformer.layers import rope_table
from ..transformer.model import RunBlock, SkyReelsTransformer
from ..transformer.placement import placed
from ..transformer.sparse_attention import DenseRun
from ..transformer.ulysses import EXCHANGED_TENSORS
from ..weights.lora.apply import check_loras, use_loras
from .attend import attention_of_run, name_of, shared_out, warn_of_few_steps
from .bad_render import watch_of_run
from .finite import FiniteWatch, suspects
from .guidance import guided_velocity
from .network import ALONE, Alone, Network, blocks_to_skip
from .pair import Partner, check_pair, twin_of
from .planned import PlannedRun, compare_devices, compare_ranks, start_run
from .precompute import StepLookup, precompute
from .prompts import (
    Prompt,
    report_gaps,
    scheduled,
    weights_of_prompts,
)
from .resume import SaveStep, fingerprint_run, resume_run
from .settings import OnStep, SamplingSettings, Velocity, euler
from .step_cache import cache_bytes
from .windows import Picture, evaluated_shape, picture_of_run

logger = logging.getLogger("skyreels.sampling.sample")


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
            before every block. Its partner, if any, makes the negative predictions (pair.py).

    Returns:
        [1, 16, T, h, w] float32 on the CPU, VAE space.

    Raises:
        OptionError: true CFG without a negative prompt, saved steps of another run, a picture where
            the transformer takes none and the other way round, or a LoRA's list of blocks with one
            that is not there.
        ShapeError: latents of another size than the video's, an input with NaN or infinity, or a
            step whose result has them.
        TextError: embeddings that do not fit the transformer.
        BadRenderError: the clip would be bad, and `settings.bad_render` is "stop" or "retry".
        OutOfRoomError: not even one block fits the device.
        CheckpointError: a damaged file of saved steps; a LoRA that does not fit these weights, or
            weights that must be read again and are gone.
    """
    run = _RunPrompts(prompt, negative if settings.uses_cfg else None)
    _check_inputs(transformer, image, prompt, negative, settings)
    if runtime.partner is not None or (runtime.ranks and runtime.ranks.mates):
        check_pair(settings)
    if runtime.ranks is not None and runtime.ranks.side is not None and not settings.uses_cfg:
        raise OptionError(
            "Ranks in two groups make a prediction each, and with CFG "
            f"{settings.guidance.true_cfg_scale} a step has one: use one group."
        )
    use_loras(transformer, settings.loras, runtime=runtime)
    num_steps, last_sigma = settings.num_steps, settings.sigmas[-1].cpu()
    latents, first_step = _start(image, settings), 0
    save_step: SaveStep = _save_nothing
    if settings.resume is not None:
        fingerprint = fingerprint_run(transformer, image, prompt, negative, settings)
        if runtime.ranks is None or runtime.ranks.is_first:
            first_step, latents, save_step = resume_run(
                settings.resume, fingerprint, latents, num_steps
            )
        if runtime.ranks is not None:
            state = (first_step, latents)
            first_step, latents = told_by_first(state, runtime.device, runtime.ranks.all)
    runtime.progress("sample", first_step, num_steps)
    if first_step == num_steps:
        return to_vae_space(latents / (1 - last_sigma))
    run.report_gaps(settings)
    reported = first_step
    watch = FiniteWatch(num_steps, runtime.device, suspects(transformer, settings))
    look = watch_of_run(image, settings, first_step, runtime)

    def on_step(step: int, latents: Tensor, denoised: Tensor) -> None:
        nonlocal reported
        reported = first_step + step + 1
        watch.note(reported, latents)
        look(reported, denoised)  # before it is saved: a resumed run looks again
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
        second=_second_device(settings, runtime.partner),
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

    def at(
        self, step: int, sigmas: Tensor, guidance: Guidance | None = None, only: int | None = None
    ) -> list[int]:
        """Indices of those that a step takes; in the window of `guidance`, or of one side alone."""
        is_guided = self.has_negative
        if guidance is not None:
            is_guided = is_guided and guidance.is_in_window(step, len(sigmas) - 1)
        sides = range(2 if is_guided else 1)
        return [
            index
            for side in sides
            if only in (None, side)
            for index, _ in self.weights(side, sigmas[step])
        ]

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


def _second_device(settings: SamplingSettings, second: Runtime | None) -> Runtime | None:
    if second is None or settings.uses_cfg:
        return second
    logger.warning(
        "The second device, %s, is not used: with CFG 1 a step has one prediction.", second.device
    )
    return None


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
    second: Runtime | None,
) -> Tensor:
    """Latents at the last sigma, on the device, from those after `first_step` steps."""
    sigmas = settings.sigmas[first_step:]
    guidance, is_euler = settings.guidance, settings.solver is euler
    prepare = partial(_prepare, image, prompts, settings, first_step)
    with ExitStack() as stack:
        twin = None if second is None else twin_of(transformer)
        stack.enter_context(torch.inference_mode())
        side = None if twin is None else 0
        peers = NOBODY
        if runtime.ranks is not None:
            side, peers = runtime.ranks.side, RankPeers(runtime.ranks, runtime.device)
        own = stack.enter_context(prepare(transformer, runtime, side=side))
        other = None
        if twin is not None and second is not None:
            other = stack.enter_context(prepare(twin, second, side=1, leader=own.attention))
            compare_devices(own.run, other.run)
        warn_of_few_steps(settings)
        kept = None if settings.noise_mask is None else _Kept(image, settings, runtime.device)

        @contextmanager
        def on_rung(rung: Rung) -> Iterator[Velocity]:
            with ExitStack() as rung_stack:
                run_block = rung_stack.enter_context(
                    placed(transformer, runtime, own.run.bytes_on(rung))
                )
                elsewhere: Alone = ALONE if own.mate is None else own.mate
                if other is not None:
                    theirs = placed(
                        other.transformer, other.runtime, other.run.needed[rung.chunking]
                    )
                    network = other.network(rung_stack.enter_context(theirs), rung)
                    partner = Partner(network, runtime.device, guidance.skip_layers)
                    elsewhere = rung_stack.enter_context(partner)
                    run_block = partner.beside(run_block)
                velocity = guided_velocity(
                    own.network(run_block, rung),
                    settings.sigmas,
                    guidance,
                    weights=prompts.weights,
                    cache=settings.cache,
                    interleaves=rung.interleaves,
                    other=elsewhere,
                    peers=peers,
                )
                yield velocity if kept is None else kept.around(velocity)

        sigmas = sigmas.to("cpu" if is_euler else runtime.device)
        with own.run.descending(on_rung) as velocity:
            result = settings.solver(
                velocity, latents.to(runtime.device), sigmas, own.run.marking(on_step)
            )
            is_plain = settings.cache.kind == "off" and guidance.skip_layers is None
            own.attention.report()
            own.run.finish(is_alike=is_euler and is_plain and other is None)
        return result


@dataclass(frozen=True, eq=False)
class _Prepared:
    """What a run needs on a device before its first step."""

    transformer: SkyReelsTransformer
    runtime: Runtime
    attention: DenseRun
    run: PlannedRun
    lookup: StepLookup
    picture: Picture
    rope: Tensor
    mate: Alone | None

    def network(self, run_block: RunBlock, rung: Rung) -> Network:
        """What makes predictions, once its weights are placed."""
        return Network(
            self.transformer,
            self.attention,
            self.lookup,
            self.picture,
            self.rope,
            run_block,
            CHUNKINGS[rung.chunking],
        )


@contextmanager
def _prepare(
    image: ImageConditioning,
    prompts: _RunPrompts,
    settings: SamplingSettings,
    first_step: int,
    transformer: SkyReelsTransformer,
    runtime: Runtime,
    *,
    side: int | None = None,
    leader: DenseRun | None = None,
) -> Iterator[_Prepared]:
    """Plan a device's part of a run and compute what its steps need of text and time.

    Args:
        image: size of the clip, and its picture.
        prompts: of the run.
        settings: of the run.
        first_step: that is not yet done.
        transformer: of the device.
        runtime: of the device.
        side: of guidance, 0 or 1, of which it makes the predictions; None for both.
        leader: attention of the first device, where this is the second one.

    Yields:
        What was prepared; weights are as the host placed them.
    """
    device, steps = runtime.device, range(first_step, settings.num_steps)
    num_ranks = 1 if runtime.ranks is None else runtime.ranks.num_shares
    needed = run_bytes(transformer, image, prompts.embeds, settings, num_ranks)
    taken = [prompts.at(step, settings.sigmas.cpu(), only=side) for step in steps]
    if settings.solver is not euler or sum(map(len, taken)) > MAX_KEPT:
        # a timestep that is not kept, between two steps or late in a long run, is computed when it
        # is looked up, and its weights need room
        largest = max(weight_bytes(module) for module in transformer.conditioners)
        needed = {name: num_bytes + largest for name, num_bytes in needed.items()}
    with runtime.place(transformer, needed["chunks"]):
        whole = _job(transformer, image, prompts, settings)
        job = replace(whole, num_ranks=num_ranks)
        if side is not None:
            job = replace(job, num_guided=0)
        attention = attention_of_run(transformer, job, settings.attention, runtime, follows=leader)
        mate = None
        if runtime.ranks is not None and runtime.ranks.mates is not None:
            from .branches import Mate

            left_out = blocks_to_skip(transformer, settings.guidance.skip_layers)
            mate = Mate(runtime.ranks, attention, _indices(left_out, transformer.blocks))
        attention = shared_out(attention, transformer, job, runtime)
        run = start_run(transformer, job, needed, runtime, name_of(settings.attention))
        if runtime.ranks is not None:
            compare_ranks(run, runtime.ranks, whole)
        lookup = retried(
            partial(
                precompute,
                transformer,
                prompts.embeds,
                (settings.sigmas[first_step:-1] * NUM_TRAIN_TIMESTEPS).tolist(),
                prompts.embedded_guidance(settings.guidance),
                needed=taken,
                attention=attention,
                runtime=runtime,
            ),
            runtime,
            run.plan.peak_bytes["condition"],
            "Preparing the text for every step",
        )
        rope = rope_table(
            transformer.token_grid(evaluated_shape(image, settings.windows)),
            transformer.config,
            riflex_k=settings.riflex_k,
            device=device,
        )
        picture = picture_of_run(image, settings.windows, device)
        yield _Prepared(transformer, runtime, attention, run, lookup, picture, rope, mate)


def _indices(some: Sequence[nn.Module], blocks: Sequence[nn.Module]) -> list[int]:
    """Where some blocks are among all."""
    wanted = set(map(id, some))
    return [index for index, block in enumerate(blocks) if id(block) in wanted]


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


def num_tokens(
    transformer: SkyReelsTransformer,
    image: ImageConditioning,
    prompts: Sequence[PromptEmbeds],
    windows: ContextWindows | None = None,
    num_ranks: int = 1,
) -> int:
    """Image and text tokens of a rank, with the prompt that has more text."""
    text_tokens = max(embeds.prompt_embeds.shape[1] for embeds in prompts)
    patches = math.prod(transformer.token_grid(evaluated_shape(image, windows)))
    return shares(patches, num_ranks)[0] + text_tokens


def run_bytes(
    transformer: SkyReelsTransformer,
    image: ImageConditioning,
    prompts: Sequence[PromptEmbeds],
    settings: SamplingSettings,
    num_ranks: int = 1,
) -> dict[str, int]:
    """Peak bytes of a run beyond the weights: its longer branch, and what a cache holds.

    Args:
        transformer: whose sizes count.
        image: size of the clip.
        prompts: the positive prompt and, if it is used, the negative one.
        settings: of the run.
        num_ranks: that share each prediction.

    Returns:
        Bytes for each name in config.CHUNKINGS.
    """
    held = _held_bytes(transformer, image, prompts, settings)
    tokens = num_tokens(transformer, image, prompts, settings.windows, num_ranks)
    if num_ranks > 1:
        width = transformer.config.hidden_size * transformer.compute_dtype.itemsize
        held += EXCHANGED_TENSORS * tokens * width
    attention, weights = name_of(settings.attention), weights_of(transformer)
    return activation_bytes(transformer.config, tokens, weights, attention, held)


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
    blocks_to_skip(transformer, settings.guidance.skip_layers)
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
    return (
        mask.ndim == 5
        and mask.shape[1] in (1, shape[1])
        and (mask.shape[0], *mask.shape[2:]) == (shape[0], *shape[2:])
    )
