"""Memory and time of one way to make a clip, and the way that is chosen.

Memory is counted from shapes, as tests do it on shape-only tensors. Time is work over rates: of
matrix products, of attention, of memory and of the link, each measured once in a short probe and
remembered (runtime/outcomes.py). What a run then took corrects the next prediction of its kind.

The choice follows these rules. Weights keep the precision that was asked for; "auto" is the
file's own and never one that changes numbers. Everything stays on the device if it fits, with the
largest chunks that then fit; else blocks are streamed, and the smallest chunks leave the most room
for those that stay. Where a step would wait for copies, each block that arrives runs for both
branches of guidance if that is faster: half as much is copied, and one branch more is in memory.
A twentieth of the free memory, at least RESERVE_BYTES, is left. The decode is the best that fits:
in one pass, without seams, in tiles (vae/tiling.py).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch

from ..config import CHUNKINGS, TILINGS, TransformerConfig, VAEConfig
from ..errors import OutOfRoomError
from ..runtime.offload import module_tensors, shapes_only
from ..runtime.outcomes import in_bytes, in_seconds
from ..runtime.streaming import SLOTS, choose_resident, least_bytes, simulate
from ..transformer.attention import FAST_BYTES
from ..transformer.placement import choose_chunking, sampling_bytes, waiting_bytes
from ..transformer.quant import STORAGE_DTYPES
from ..transformer.sparse_attention import SPARSE
from ..transformer.sparse_kernels import sparse_bytes
from ..transformer.ulysses import exchanged_bytes
from ..vae.model import VideoVAE
from ..vae.tiling import (
    CHOOSING_MODES,
    DecodePlan,
    choose_decode,
    expected_decode,
    last_rung,
    plan_bytes,
    room_bytes,
    room_of,
)
from .inputs import AUTO, Choice, Job, Machine
from .weights import Weights

#: hidden-sized tensors that a double and a single block move beside products and attention
#: (tests/engine/test_budget.py counts them), in 16 bits and where inputs are rounded to 8
MOVED_TENSORS = {False: (13.2, 9.1), True: (19.7, 17.2)}

#: what our sparse kernel reaches of the rate of exact attention, until a run has shown it: on an
#: H100, 51,060 tokens with 17 % of the blocks took 19.9 ms, cuDNN 52.8 (tests/bench/LOG.md)
SPARSE_EFFICIENCY = 0.47
#: seconds of a block at least, which the host takes to launch it: the built-in model on that H100
LAUNCH_SECONDS = 1e-3

#: of the time of a step, what running both branches block by block must save to be chosen
LEAST_GAIN = 0.01

#: pairs of prompt and step whose text and modulation are kept; with 256 tokens of text each, 256
#: are about 1 GB. Others are computed when they are looked up
MAX_KEPT = 256


@dataclass(frozen=True)
class Plan:
    """One way to make a clip, and what it is expected to take.

    Attributes:
        precision: of the transformer.
        is_exact: see `Weights`; False as well with any attention but "exact".
        attention: a name of config.ATTENTIONS.
        chunking: a name of config.CHUNKINGS.
        activation_bytes: of a forward pass, beside the weights.
        resident_bytes: of the blocks, those that stay on the device.
        streamed_bytes: of the blocks, those copied in every forward pass or, if `interleaves`, once
            for both passes of a step.
        interleaves: whether each block runs for both branches of guidance before the next one does.
        decode: mode or tiles of the decode; "" if none is planned.
        peak_bytes: stage ("condition", "sample", "decode") -> most bytes on the device.
        seconds: stage ("step", "stall", "sample", "decode", "total") -> seconds, None if unknown;
            "stall" is the part of a step that waits for copies.
        free_bytes: of the device when this was planned.
        fits: whether every stage fits, with the reserve.
    """

    precision: str
    is_exact: bool
    attention: str
    chunking: str
    activation_bytes: int
    resident_bytes: int
    streamed_bytes: int
    interleaves: bool
    decode: str
    peak_bytes: Mapping[str, int]
    seconds: Mapping[str, float | None]
    free_bytes: int
    fits: bool

    @property
    def peak(self) -> int:
        """Most bytes of any stage."""
        return max(self.peak_bytes.values())

    @property
    def placement(self) -> str:
        """Where the blocks are, in words."""
        if not self.streamed_bytes:
            return "all weights stay on the device"
        stay, away = self.resident_bytes / 1e9, self.streamed_bytes / 1e9
        text = f"{stay:.1f} GB of blocks stay on the device, {away:.1f} GB are streamed"
        return f"{text}, once for both predictions of a step" if self.interleaves else text


def expectation(plan: Plan, job: Job) -> str:
    """What was chosen and what it should take, as one line."""
    exact = "exact" if plan.is_exact else "not exact"
    step = plan.seconds.get("step")
    time_ = "time not known yet"
    if step is not None:
        time_ = f"{job.num_steps} steps of about {in_seconds(step)}"
    return (
        f"Plan for {job}: {plan.precision} ({exact}), {plan.attention} attention, activations "
        f"{plan.chunking}, {plan.placement}; {time_}; peak {in_bytes(plan.peak_bytes['sample'])} "
        f"of {in_bytes(plan.free_bytes)} free."
    )


def activation_bytes(
    config: TransformerConfig,
    tokens: int,
    weights: Weights,
    attention: str,
    held_bytes: int = 0,
) -> dict[str, int]:
    """Peak bytes of a forward pass beyond the weights, of each chunking.

    Args:
        config: sizes of the network.
        tokens: image and text tokens of the longer branch.
        weights: of the transformer.
        attention: a name of config.ATTENTIONS.
        held_bytes: what a step cache keeps.

    Returns:
        Bytes for each name in config.CHUNKINGS, in that order.
    """
    if attention != "exact":
        held_bytes += FAST_BYTES * tokens * config.hidden_size
    heads, kind = config.num_attention_heads, weights.gemm
    if weights.is_dequantized:
        kind = "dequantized"
    lists = sparse_bytes(heads, config.attention_head_dim, tokens) if attention in SPARSE else 0
    return {
        name: held_bytes
        + lists // chunking.head_groups
        + sampling_bytes(config, tokens, weights.dtype, name, kind)
        for name, chunking in CHUNKINGS.items()
    }


def plan_run(
    machine: Machine,
    job: Job,
    weights: Weights,
    choice: Choice = AUTO,
    activations: Mapping[str, int] | None = None,
) -> Plan:
    """How to make a clip with these weights, whether it fits or not.

    Args:
        machine: where.
        job: what.
        weights: of the transformer.
        choice: what the user fixed.
        activations: bytes of each chunking, if they are known; else they are computed.

    Returns:
        The plan; see `Plan.fits`.
    """
    config = job.config
    sparse = SPARSE.get(choice.attention)
    if sparse is not None and job.tokens < sparse.min_tokens:  # then it is dense
        choice = replace(choice, attention="exact")
    if activations is None:
        activations = activation_bytes(
            config, job.tokens, weights, choice.attention, job.held_bytes
        )
    usable = machine.usable_bytes
    chunking = choose_chunking(activations, usable - weights.loop)
    if choice.is_resident is False:
        chunking = "head groups"
    way = _fastest_way(machine, job, weights, choice, activations[chunking])
    blocks, fits = weights.blocks, way.fits
    away = [size for index, size in enumerate(blocks) if index not in way.resident]
    stay = sum(blocks) - sum(away)
    kept = min(job.num_predictions, MAX_KEPT)
    text = kept * job.text_tokens * config.hidden_size * weights.dtype.itemsize
    sampling = weights.outside + stay + way.slots * max(away, default=0) + way.activation_bytes
    kind = f"{kind_of_work(weights, choice.attention)}, peak"
    peak_bytes = {
        "condition": weights.conditioners + text,
        "sample": int(machine.corrections.get(kind, 1.0) * sampling),
    }
    seconds, decode = way.seconds, ""
    if job.vae is not None:
        decode, peak_bytes["decode"], seconds["decode"], decodes = _plan_decode(
            machine, job, choice.decode
        )
        fits = fits and decodes
    parts = [seconds[name] for name in ("sample", "decode") if name in seconds]
    known = [part for part in parts if part is not None]
    seconds["total"] = sum(known) if len(known) == len(parts) else None
    return Plan(
        precision=weights.precision,
        is_exact=weights.is_exact and choice.attention == "exact",
        attention=choice.attention,
        chunking=chunking,
        activation_bytes=way.activation_bytes,
        resident_bytes=stay,
        streamed_bytes=sum(away),
        interleaves=way.interleaves,
        decode=decode,
        peak_bytes=peak_bytes,
        seconds=seconds,
        free_bytes=machine.free_bytes,
        fits=fits and peak_bytes["condition"] <= usable,
    )


class _Way(NamedTuple):
    """Which blocks stay while sampling, and what that takes; some attributes are the plan's."""

    resident: frozenset[int]
    slots: int
    fits: bool
    activation_bytes: int
    interleaves: bool
    seconds: dict[str, float | None]


def _fastest_way(
    machine: Machine, job: Job, weights: Weights, choice: Choice, num_bytes: int
) -> _Way:
    """One branch of guidance after the other or, if that is faster, both block by block."""
    plain = _way(machine, job, weights, choice, num_bytes)
    # a step cache decides after the first branch whether the second one runs
    if not plain.seconds["stall"] or not job.num_guided or job.held_bytes:
        return plain
    num_bytes += waiting_bytes(job.config, job.tokens, weights.dtype)
    both = _way(machine, job, weights, choice, num_bytes, interleaves=True)
    plain_s, both_s = (way.seconds["sample"] or 0.0 for way in (plain, both))
    return both if both.fits and both_s <= (1 - LEAST_GAIN) * plain_s else plain


def _way(
    machine: Machine,
    job: Job,
    weights: Weights,
    choice: Choice,
    num_bytes: int,
    *,
    interleaves: bool = False,
) -> _Way:
    budget = machine.usable_bytes - num_bytes - weights.outside
    blocks, slots = weights.blocks, SLOTS
    if choice.is_resident is True or not machine.streams:
        resident, fits = frozenset(range(len(blocks))), sum(blocks) <= budget
    elif choice.is_resident is False:
        least = least_bytes(blocks)
        resident, fits = choose_resident(blocks, least), least <= budget
    else:
        slots = SLOTS if least_bytes(blocks) <= budget else 1  # as `placed`
        fits = least_bytes(blocks, slots) <= budget
        resident = choose_resident(blocks, max(budget, least_bytes(blocks, slots)), slots)
    compute = block_seconds(machine, job, weights, choice.attention)
    seconds = _sampling_seconds(
        machine, job, weights, resident, slots, compute, interleaves=interleaves
    )
    return _Way(resident, slots, fits, num_bytes, interleaves, seconds)


def kind_of_work(weights: Weights, attention: str) -> str:
    """Name of what is corrected together."""
    return f"GEMM {weights.gemm}, attention {attention}"


def _sampling_seconds(
    machine: Machine,
    job: Job,
    weights: Weights,
    resident: frozenset[int],
    slots: int,
    compute: Sequence[float] | None,
    *,
    interleaves: bool,
) -> dict[str, float | None]:
    """Seconds of a step, of its stall and of all steps."""
    link = machine.rates.get("link", 0.0)
    is_streamed = len(resident) < len(weights.blocks)
    if compute is None or (is_streamed and not link):
        return {"step": None, "stall": None, "sample": None}

    def stall_of(calls: int) -> float:
        """Of a pass in which each block is called so often."""
        if not is_streamed:
            return 0.0
        # the first pass of a run has nothing to hide its first copies behind: from the second on
        block_s = [calls * seconds for seconds in compute]
        once, twice = (
            simulate(weights.blocks, block_s, resident, link, slots, passes=count)
            for count in (1, 2)
        )
        return twice.stall_s - once.stall_s

    # passes that run for two predictions
    together = round(job.num_guided * job.num_windows) if interleaves else 0
    stall = (job.num_evaluations - 2 * together) * stall_of(1)
    stall += together * stall_of(2) if together else 0.0
    sample = job.num_evaluations * sum(compute) + stall
    return {"step": sample / job.num_steps, "stall": stall / job.num_steps, "sample": sample}


def block_seconds(
    machine: Machine, job: Job, weights: Weights, attention: str
) -> list[float] | None:
    """Seconds that each block takes in one forward pass; None where a rate is unknown."""
    names = (f"GEMM {weights.gemm}", "attention exact", "memory")
    gemm, attend, memory = (machine.rates.get(name, 0.0) for name in names)
    exchange_s = exchange_seconds(machine, job, weights)
    if not gemm or not attend or not memory or exchange_s is None:
        return None
    config, tokens = job.config, job.tokens_here
    hidden = config.hidden_size
    # a card attends with a share of the heads, from all tokens to all
    attend_flop = 4 * job.tokens**2 * hidden / job.num_ranks
    attend_s = attend_flop / attend * _attention_share(job, attention)
    common = gemm_flop(job) / gemm + attend_s
    unit = tokens * hidden * weights.dtype.itemsize / memory
    moved = MOVED_TENSORS[weights.gemm in STORAGE_DTYPES]
    factor = machine.corrections.get(kind_of_work(weights, attention), 1.0)
    double, single = (
        max(LAUNCH_SECONDS, factor * (common + tensors * unit)) + exchange_s for tensors in moved
    )
    return [double] * config.num_layers + [single] * config.num_single_layers


def gemm_flop(job: Job) -> float:
    """Operations of a block's matrix products on one card; both kinds of block have as many."""
    config = job.config
    return 2 * job.tokens_here * int((4 + 2 * config.mlp_ratio) * config.hidden_size**2)


def exchange_seconds(machine: Machine, job: Job, weights: Weights) -> float | None:
    """Seconds of a block in which cards that share a prediction exchange tokens for heads.

    Args:
        machine: of each card.
        job: says how many share a prediction.
        weights: of the transformer, which say how wide the numbers are.

    Returns:
        Seconds; 0 where nothing is shared, None where the rate between cards is unknown.
    """
    if job.num_ranks == 1:
        return 0.0
    peer = machine.rates.get("peer", 0.0)
    return given_bytes(job, weights) / peer if peer else None


def given_bytes(job: Job, weights: Weights) -> float:
    """Bytes that a card gives to the others in a block."""
    num_bytes = exchanged_bytes(
        job.tokens, job.text_tokens, job.config.hidden_size, weights.dtype.itemsize, job.num_ranks
    )
    return num_bytes * (job.num_ranks - 1) / job.num_ranks


def _attention_share(job: Job, attention: str) -> float:
    """Expected time of attention, of dense attention's, the mean of all steps."""
    config = SPARSE.get(attention)
    if config is None or job.tokens < config.min_tokens:
        return 1.0
    steps = range(job.num_steps)
    dense = sum(config.is_dense(step, job.num_steps) for step in steps) / job.num_steps
    density = 0.5 * math.erfc(config.beta / 2**0.5)  # of Gaussian scores
    return dense + (1 - dense) * min(1.0, density / SPARSE_EFFICIENCY)


def _plan_decode(machine: Machine, job: Job, mode: str) -> tuple[str, int, float | None, bool]:
    """Mode, peak bytes and seconds of a decode, and whether it fits."""
    assert job.vae is not None
    sizes = (job.vae, job.latent_shape)
    dtype, corrections = job.vae_dtype, machine.corrections
    vae = vae_bytes(job.vae, dtype)
    device = torch.device(machine.info.type)
    # `room_bytes` has a margin of its own: the reserve is not left beside it
    free, host = room_of(device, machine.free_bytes - vae, machine.ram_bytes, job.latent_shape)
    if mode in CHOOSING_MODES:
        try:
            decode, num_bytes = choose_decode(
                *sizes,
                free,
                dtype,
                mode,
                host_bytes=host,
                corrections=corrections,
                ranks=job.num_strips,
            )
            fits = True
        except OutOfRoomError:
            decode, fits = last_rung(mode), False
            num_bytes = plan_bytes(decode, *sizes, dtype)
    else:
        ranks = job.num_strips if mode == "full" else 1
        decode = DecodePlan(mode, TILINGS.get(mode), ranks=ranks)
        num_bytes = plan_bytes(decode, *sizes, dtype)
        fits = room_bytes(decode, num_bytes, dtype, corrections) <= free
    expected = expected_decode(
        decode, num_bytes, *sizes, dtype, rates=machine.rates, corrections=corrections
    )
    return str(decode), vae + expected.peak_bytes, expected.seconds, fits


@lru_cache(maxsize=8)
def vae_bytes(config: VAEConfig, dtype: torch.dtype) -> int:
    """Bytes of a VAE's weights."""
    with shapes_only():
        vae = VideoVAE(config)
    return sum(tensor.numel() for tensor in module_tensors(vae)) * dtype.itemsize
