"""Guidance: how the predictions of several prompts become the velocity that a solver integrates.

Everything is float32; only the transformer itself computes in the dtype of its weights. Of the two
branches of guidance, one runs after the other, or one block of each in turn: their texts have
different lengths, and nothing is padded or masked.
"""

from collections.abc import Collection, Iterator, Sequence
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from ..config import CHUNKINGS, NUM_TRAIN_TIMESTEPS, Chunking, FreSca, Guidance, SkipLayers
from ..errors import OptionError
from ..transformer.attention import Attention, sdpa
from ..transformer.layers import DoubleBlock
from ..transformer.model import RunBlock, SkyReelsTransformer, StepModulation
from ..transformer.sparse_attention import DenseRun
from .precompute import StepLookup
from .prompts import Weights, average, one_prompt_each
from .settings import Velocity
from .step_cache import OFF, CacheConfig, start_cache
from .windows import Picture, Predict, predict_clip


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
        attention: see transformer/attention.py; or a `SparseRun` of this transformer and run.
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
    left_out = blocks_to_skip(transformer, guidance.skip_layers)
    run = attention if isinstance(attention, DenseRun) else DenseRun(attention)
    run_block = run.around(run_block)
    steps = start_cache(cache, num_steps, run_block, transformer.blocks, always=run.always)

    def predict_each(
        latents: Tensor, sigma: Tensor, branches: Sequence[int], cached: RunBlock
    ) -> Sequence[Tensor]:
        timestep = float(sigma * NUM_TRAIN_TIMESTEPS)
        conditioned = [lookup(branch, timestep, run_block) for branch in branches]

        forward = _forward_pass(
            transformer,
            run,
            branches,
            conditioned,
            rope=rope,
            run_block=cached,
            chunking=chunking,
        )
        velocities = predict_clip(forward, latents, picture, step_of(sigma, schedule))
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
        step = step_of(sigma, schedule)
        if step < guidance.zero_init_steps:
            return torch.zeros_like(latents), None
        run.begin_step(step)
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


def _forward_pass(
    transformer: SkyReelsTransformer,
    run: DenseRun,
    branches: Sequence[int],
    conditioned: Sequence[StepModulation],
    **options: Any,
) -> Predict:
    """The predictions of these branches, of as many frames as are given."""
    parts = count()

    def forward(latents: Tensor, image_latents: Tensor | None) -> Sequence[Tensor]:
        run.begin(branches, next(parts))
        seen = _with_picture(latents, image_latents)
        return transformer.denoise_together(
            seen, conditioned, order=run.order, attention=run, **options
        )

    return forward


def step_of(sigma: Tensor, schedule: Tensor) -> int:
    """The step that a sigma belongs to: between two of the schedule, the earlier one's."""
    return max(0, int((schedule >= sigma - 1e-6).sum()) - 1)


def _negative_branches(sides: Sequence[Sequence[tuple[int, float]]]) -> set[int]:
    return {branch for side in sides[1:] for branch, _ in side}


def blocks_to_skip(transformer: SkyReelsTransformer, skip: SkipLayers | None) -> list[nn.Module]:
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
