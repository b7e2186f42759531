"""Guidance: how the predictions of several prompts become the velocity that a solver integrates.

Everything is float32; only the transformer itself computes in the dtype of its weights. Of the two
branches of guidance, one runs after the other, or one block of each in turn: their texts have
different lengths, and nothing is padded or masked.
"""

from collections.abc import Collection, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from ..config import FreSca, Guidance
from ..transformer.model import RunBlock
from .network import Network, blocks_to_skip, leaving_out
from .pair import Partner
from .prompts import Weights, average, one_prompt_each
from .settings import Velocity
from .step_cache import OFF, CacheConfig, start_cache


def combine(positive: Tensor, negative: Tensor | None, guidance: Guidance) -> Tensor:
    """Classifier-free guidance of two velocities, with its refinements.

    Args:
        positive: [B, ...] float32 velocity.
        negative: [B, ...] float32 velocity; None leaves the positive one as it is.
        guidance: scale and refinements.

    Returns:
        [B, ...] float32.

    Source: CFG arXiv:2207.12598; CFG-Zero* arXiv:2503.18886, equation 8; rescale
        arXiv:2305.08891, equation 16.
    """
    if negative is None:
        return positive
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


def guided_velocity(
    network: Network,
    sigmas: Tensor,
    guidance: Guidance,
    *,
    weights: Weights = one_prompt_each,
    cache: CacheConfig = OFF,
    interleaves: bool = False,
    partner: Partner | None = None,
) -> Velocity:
    """The function a solver integrates.

    Args:
        network: makes the predictions.
        sigmas: [N + 1] of the run; where a sigma falls decides about the CFG window.
        guidance: how the two predictions are combined.
        weights: which prompts make them; by default the first and, while true_cfg_scale > 1, the
            second one.
        cache: which steps are skipped; with a cache, one call is one step.
        interleaves: where a step needs more than one prediction, each block runs for two of them
            before the next one does, which a cache cannot follow. The result is the same.
        partner: makes the negative predictions on another device at the same time; the network's
            lookup then needs the positive prompts alone.

    Returns:
        The function, for the whole run.

    Source: skip-layer guidance arXiv:2411.18664 (STG, with the residual skip), which ComfyUI's
        SkipLayerGuidanceDiT adds likewise; in the negative prediction, SkipLayerGuidanceDiTSimple.
    """
    assert not (interleaves and (cache.kind != "off" or partner))
    num_steps = len(sigmas) - 1
    schedule = sigmas[:-1].cpu()
    run = network.run
    run_block = run.around(network.run_block)
    network = network._replace(run_block=run_block)
    left_out = blocks_to_skip(network.transformer, guidance.skip_layers)
    steps = start_cache(cache, num_steps, run_block, network.transformer.blocks, always=run.always)

    def predict_all(
        step: int,
        latents: Tensor,
        sigma: Tensor,
        branches: Sequence[int],
        away: Sequence[int],
        weak: Collection[int],
    ) -> Iterator[Tensor]:
        if interleaves and not weak:  # by twos, for which memory is planned
            yield from _by_twos(network, latents, sigma, step, branches)
            return
        if branches:
            steps.begin(step, latents, branches)
        if partner and away and not steps.skips:
            skip = guidance.skip_layers if weak else None
            partner.start(latents, sigma, step, away, skip)
        for branch in branches:
            if partner and branch in away:
                yield steps.predict(branch, partial(partner.result, branch))
            else:
                is_weak = branch in weak
                yield steps.predict(branch, partial(predict, step, latents, sigma, branch, is_weak))

    def predict(
        step: int,
        latents: Tensor,
        sigma: Tensor,
        branch: int,
        is_weak: bool,
        cached: RunBlock,
    ) -> Tensor:
        cached = leaving_out(cached, left_out) if is_weak else cached
        return network.predict(latents, sigma, step, [branch], cached)[0]

    def velocity(latents: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor | None]:
        sigma = sigma.to("cpu", torch.float32)
        step = step_of(sigma, schedule)
        if step < guidance.zero_init_steps:
            return torch.zeros_like(latents), None
        run.begin_step(step)
        is_guided = guidance.true_cfg_scale > 1 and guidance.is_in_window(step, num_steps)
        scale = guidance.skip_scale(step, num_steps)
        sides = [weights(side, sigma) for side in range(1 + is_guided)]
        branches, negative_branches = _branches(sides), _branches(sides[1:])
        weak = set(negative_branches) if scale == 0 else set()
        made = predict_all(step, latents, sigma, branches, negative_branches, weak)
        averages = [average(made, side, latents, sigma) for side in sides]
        if step == num_steps - 1:
            steps.report()
        positive, negative = averages[0], averages[1] if is_guided else None
        guided = combine(positive, negative, guidance)
        if scale:
            weakened = partial(predict, step, latents, sigma, is_weak=True, cached=run_block)
            made = map(weakened, _branches(sides[:1]))
            guided = guided + scale * (positive - average(made, sides[0], latents, sigma))
        return guided, negative

    return velocity


def _by_twos(
    network: Network, latents: Tensor, sigma: Tensor, step: int, branches: Sequence[int]
) -> Iterator[Tensor]:
    for first in range(0, len(branches), 2):
        yield from network.predict(latents, sigma, step, branches[first : first + 2])


def _branches(sides: Sequence[Sequence[tuple[int, float]]]) -> list[int]:
    return [branch for side in sides for branch, _ in side]


def step_of(sigma: Tensor, schedule: Tensor) -> int:
    """The step that a sigma belongs to: between two of the schedule, the earlier one's."""
    return max(0, int((schedule >= sigma - 1e-6).sum()) - 1)
