"""Guidance: how the predictions of several prompts become the velocity that a solver integrates.

Everything is float32; only the transformer itself computes in the dtype of its weights. Of the two
branches of guidance, one runs after the other, or one block of each in turn: their texts have
different lengths, and nothing is padded or masked.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from ..config import FreSca, Guidance
from ..runtime.collectives import NOBODY, Peers
from ..transformer.model import RunBlock
from .network import ALONE, Alone, Asked, Network, PredictBranch, blocks_to_skip, leaving_out
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
    other: Alone = ALONE,
    peers: Peers = NOBODY,
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
        other: makes the predictions of one side on another device, or in another group of ranks, at
            the same time; the network's lookup then needs the prompts of its own side alone.
        peers: with whom a cache decides.

    Returns:
        The function, for the whole run.

    Source: skip-layer guidance arXiv:2411.18664 (STG, with the residual skip), which ComfyUI's
        SkipLayerGuidanceDiT adds likewise; in the negative prediction, SkipLayerGuidanceDiTSimple.
    """
    assert not (interleaves and (cache.kind != "off" or other is not ALONE))
    num_steps = len(sigmas) - 1
    schedule = sigmas[:-1].cpu()
    run = network.run
    run_block = run.around(network.run_block)
    network = network._replace(run_block=run_block)
    left_out = blocks_to_skip(network.transformer, guidance.skip_layers)
    steps = start_cache(
        cache, num_steps, run_block, network.transformer.blocks, always=run.always, peers=peers
    )

    def predict(asked: Asked, branch: int, cached: RunBlock = run_block) -> Tensor:
        cached = leaving_out(cached, left_out) if branch in asked.weak else cached
        return network.predict(asked.latents, asked.sigma, asked.step, [branch], cached)[0]

    def predict_all(asked: Asked) -> Iterator[Tensor]:
        if interleaves and not asked.weak:  # by twos, for which memory is planned
            yield from _by_twos(network, asked)
            return
        if asked.branches:
            steps.begin(asked.step, asked.latents, asked.branches)
        here = partial(predict, asked)
        told = () if steps.skips else other.start(asked, here)
        for branch in asked.branches:
            forward = partial(other.result if branch in told else here, branch)
            yield steps.predict(branch, forward)

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
        made = predict_all(Asked(latents, sigma, step, branches, negative_branches, weak))
        averages = [average(made, side, latents, sigma) for side in sides]
        if step == num_steps - 1:
            steps.report()
        positive, negative = averages[0], averages[1] if is_guided else None
        guided = combine(positive, negative, guidance)
        if scale:
            positives = _branches(sides[:1])
            asked = Asked(latents, sigma, step, positives, weak=positives)
            made = _past_cache(other, asked, partial(predict, asked))
            guided = guided + scale * (positive - average(made, sides[0], latents, sigma))
        return guided, negative

    return velocity


def _by_twos(network: Network, asked: Asked) -> Iterator[Tensor]:
    for first in range(0, len(asked.branches), 2):
        both = asked.branches[first : first + 2]
        yield from network.predict(asked.latents, asked.sigma, asked.step, both)


def _past_cache(other: Alone, asked: Asked, predict: PredictBranch) -> Iterator[Tensor]:
    told = other.start(asked, predict)
    for branch in asked.branches:
        yield other.result(branch) if branch in told else predict(branch)


def _branches(sides: Sequence[Sequence[tuple[int, float]]]) -> list[int]:
    return [branch for side in sides for branch, _ in side]


def step_of(sigma: Tensor, schedule: Tensor) -> int:
    """The step that a sigma belongs to: between two of the schedule, the earlier one's."""
    return max(0, int((schedule >= sigma - 1e-6).sum()) - 1)
