"""A run's plan at work: said before it, kept to when memory runs out, compared with what happened.

A step that runs out of memory is repeated one rung down, from the latents it began with: it is a
function of them, so the result is that of the rung, and up to rounding that of every other. A step
cache begins empty on the new rung, which costs time and no accuracy.
"""

import logging
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..errors import OutOfRoomError
from ..plan import (
    Choice,
    Job,
    Machine,
    Plan,
    Rung,
    Weights,
    bytes_on,
    expectation,
    kind_of_work,
    machine_of,
    plan_run,
    rates_needed,
    rungs,
    weights_of,
    why_not,
)
from ..runtime import Runtime, outcomes
from ..runtime.collectives import Ranks, least_of, told_by_first
from ..runtime.ladder import descending, is_out_of_memory
from ..runtime.offload import onload_bytes, with_reserve
from ..transformer.model import SkyReelsTransformer
from ..transformer.placement import loop_tensors
from .settings import OnStep

logger = logging.getLogger("skyreels.sampling.planned")

#: fewer steps are mostly warming up
MIN_STEPS_TO_LEARN = 3
#: of the most free memory of a rank, what the least may have without being named
LIKE_MEMORY = 0.9


class Marks:
    """When the steps of a run ended, on the device, without making the host wait for it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Note this moment of the device's work."""
        if self._device.type != "cuda":
            self._marks.append(time.perf_counter())
            return
        make_event: Any = torch.cuda.Event  # untyped in torch
        event = make_event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        self._marks.append(event)

    def seconds(self) -> list[float]:
        """Seconds between the marks; waits for the device."""
        pairs = pairwise(self._marks)
        if self._device.type != "cuda":
            return [later - earlier for earlier, later in pairs]
        torch.cuda.synchronize(self._device)
        return [earlier.elapsed_time(later) / 1e3 for earlier, later in pairs]


@dataclass
class PlannedRun:
    """One run and its plan; made by `start_run`.

    Attributes:
        transformer: that denoises.
        runtime: where.
        machine: the runtime's device as it was at the start.
        job: what is made.
        weights: of the transformer.
        plan: what was chosen and is expected.
        needed: bytes beside the weights, of each chunking.
        work: name under which the rung is remembered.
        peak: gives the most bytes on the device so far, see `outcomes.watch_peak`.
    """

    transformer: SkyReelsTransformer
    runtime: Runtime
    machine: Machine
    job: Job
    weights: Weights
    plan: Plan
    needed: Mapping[str, int]
    work: str
    peak: Callable[[], int | None]
    marks: Marks = field(init=False)
    falls: int = 0

    def __post_init__(self) -> None:
        self.marks = Marks(self.runtime.device)

    def bytes_on(self, rung: Rung) -> int:
        """Bytes to keep free beside the weights on a rung; asked when no weight is on the device.

        Args:
            rung: that is about to be placed.

        Returns:
            As planned, or what is left of that.
        """
        if not self.falls and not rung.spare:
            return self.plan.activation_bytes
        if rung.spare:  # also of the weights that a host loaded fewer may stay
            self.runtime.stream(self.transformer)
        loaded = _loaded_bytes(self.transformer, self.runtime.device)
        free = self.runtime.free_bytes() + loaded
        return bytes_on(rung, self.plan, self.weights, free, self.needed)

    @contextmanager
    def descending(
        self, enter: Callable[[Rung], AbstractContextManager[Callable[..., Any]]]
    ) -> Iterator[Callable[..., Any]]:
        """The velocity on the planned rung, and further down whenever memory runs out.

        Args:
            enter: places the weights for a rung and gives the velocity, or any other function.

        Yields:
            The velocity; a call that runs out of memory is repeated with the same arguments.

        Raises:
            OutOfRoomError: memory ran out on the last rung.
        """
        ladder = rungs(self.plan.chunking, self.machine.streams, interleaves=self.plan.interleaves)
        folder, device = self.runtime.state_folder, outcomes.device_key(self.runtime.device)
        names = list(map(str, ladder))
        first = outcomes.first_rung(folder, device, self.work, names, self.machine.free_bytes)
        ranks = self.runtime.ranks
        if ranks is not None:
            first = -least_of([-first], self.runtime.device, ranks.all)[0]
        if first:
            logger.info("Memory ran out here before: begins with %s.", names[first])
        ladder, below = ladder[first:], []
        if ranks is not None:  # one rank cannot repeat a step that the others do not repeat
            ladder, below = ladder[:1], ladder[1:2]

        def on_fall(failed: Rung, rung: Rung) -> None:
            self.runtime.check_interrupt()
            self.falls += 1
            free = self.runtime.free_bytes()
            outcomes.remember_rung(folder, device, self.work, str(rung), free)
            logger.warning(
                "Memory ran out with activations %s (%.1f GB are free now): the step is repeated "
                "with %s.",
                failed,
                free / 1e9,
                rung,
            )

        self.marks.mark()
        with descending(ladder, enter, self.runtime.device, on_fall) as velocity:
            try:
                yield velocity
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if below:  # for the next run
                    free = self.runtime.free_bytes()
                    outcomes.remember_rung(folder, device, self.work, str(below[0]), free)
                choice = Choice(self.plan.attention)
                reason = why_not(self.machine, self.job, self.weights, choice)
                raise OutOfRoomError(
                    f"Memory ran out in a step, also with {ladder[-1]}: another program may have "
                    f"taken it. {reason}"
                ) from error

    def marking(self, on_step: OnStep) -> OnStep:
        """The same function, noting when steps end."""

        def marked(step: int, latents: Tensor, denoised: Tensor) -> None:
            self.marks.mark()
            on_step(step, latents, denoised)

        return marked

    def finish(self, *, is_alike: bool) -> None:
        """Say what happened beside what was expected, and remember it.

        Args:
            is_alike: every step does the same work, so that one is like the next run's.
        """
        seconds = self.marks.seconds()
        if not seconds:
            return
        plan = self.plan
        step_s, peak = statistics.median(seconds), self.peak()
        expected = outcomes.Expected(
            kind_of_work(self.weights, plan.attention),
            plan.seconds["step"],
            plan.peak_bytes["sample"],
            self.machine.corrections,
        )
        logger.info(expected.account(f"Sampled {len(seconds)} steps of", step_s, peak))
        if self.falls or self.runtime.ranks is not None:  # what a device does alone is learned
            return
        is_alike &= self.job.num_guided in (0, self.job.num_steps)
        is_alike &= len(seconds) >= MIN_STEPS_TO_LEARN
        # a slow link says nothing about the device
        is_alike &= (plan.seconds["stall"] or 0.0) <= 0.1 * (plan.seconds["step"] or 0.0)
        folder, key = self.runtime.state_folder, outcomes.device_key(self.runtime.device)
        expected.learn(folder, key, seconds=step_s if is_alike else None, peak=peak)


def _loaded_bytes(transformer: SkyReelsTransformer, device: torch.device) -> int:
    """Bytes of the weights of the loop that are on a device."""
    loop = loop_tensors(transformer)
    return sum(tensor.nbytes for tensor in loop) - onload_bytes(loop, device)


def start_run(
    transformer: SkyReelsTransformer,
    job: Job,
    needed: Mapping[str, int],
    runtime: Runtime,
    attention: str,
) -> PlannedRun:
    """Plan a run with the memory that is free now, and say what it will take.

    Args:
        transformer: on any device.
        job: what is made.
        needed: bytes beside the weights, of each chunking.
        runtime: where; it has made room.
        attention: a name of config.ATTENTIONS, for people and for predictions.

    Returns:
        The run.

    Raises:
        OutOfRoomError: not even the smallest plan fits.
    """
    device = runtime.device
    weights = weights_of(transformer)
    loaded = _loaded_bytes(transformer, device)
    runtime.make_room(with_reserve(weights.loop + needed["chunks"]) - loaded)
    names = rates_needed([weights.gemm])
    can_probe = device.type == "cuda"
    machine = machine_of(runtime, names, loaded_bytes=loaded, can_probe=can_probe)
    if runtime.ranks is not None:
        machine = least_machine(machine, runtime.ranks, device)
    plan = plan_run(machine, job, weights, Choice(attention), needed)
    if machine.streams and not plan.fits:
        raise OutOfRoomError(why_not(machine, job, weights, Choice(attention)))
    if runtime.ranks is not None:
        plan = _chunked_alike(plan, needed, runtime.ranks, device)
    logger.info(expectation(plan, job))
    work = f"sample {job.tokens} tokens, {kind_of_work(weights, attention)}, {len(weights.blocks)}"
    return PlannedRun(
        transformer=transformer,
        runtime=runtime,
        machine=machine,
        job=job,
        weights=weights,
        plan=plan,
        needed=needed,
        work=f"{work} blocks of {max(weights.blocks)} bytes",
        peak=outcomes.watch_peak(device, loaded),
    )


def least_machine(machine: Machine, ranks: Ranks, device: torch.device) -> Machine:
    """What all ranks plan for: the free memory of the least, the rates of the first.

    They have to choose alike, as they take part in the same exchanges.

    Args:
        machine: of this rank.
        ranks: of the run.
        device: of this rank.

    Returns:
        The same on all ranks but for what only names the device.
    """
    free, most = machine.free_bytes, machine.free_bytes
    free, most, total, ram = least_of(
        [free, -most, machine.total_bytes, machine.ram_bytes], device, ranks.all
    )
    if ranks.is_first and free < LIKE_MEMORY * -most:
        logger.warning(
            "The ranks have %.1f to %.1f GB of free memory: all are planned for the least.",
            free / 1e9,
            -most / 1e9,
        )
    found = told_by_first((machine.rates, machine.corrections), device, ranks.all)
    return replace(
        machine,
        free_bytes=free,
        total_bytes=total,
        ram_bytes=ram,
        rates=found[0],
        corrections=found[1],
    )


def _chunked_alike(
    plan: Plan, needed: Mapping[str, int], ranks: Ranks, device: torch.device
) -> Plan:
    """The plan with the smallest chunks of any rank: cards of several kinds need different room."""
    order = list(needed)
    index, together = least_of(
        [-order.index(plan.chunking), int(plan.interleaves)], device, ranks.all
    )
    chunking, interleaves = order[-index], bool(together)
    if (chunking, interleaves) == (plan.chunking, plan.interleaves):
        return plan
    return replace(
        plan, chunking=chunking, interleaves=interleaves, activation_bytes=needed[chunking]
    )


def compare_devices(first: PlannedRun, second: PlannedRun) -> None:
    """Chunk both devices of a pair alike, and say what the pair takes; each has its plan.

    Args:
        first: of the device with the positive predictions; its plan is what both keep to.
        second: of the other device.
    """
    order = list(first.needed)
    chunking = max(first.plan.chunking, second.plan.chunking, key=order.index)
    for run in (first, second):
        if run.plan.chunking != chunking:
            num_bytes = run.needed[chunking]
            run.plan = replace(run.plan, chunking=chunking, activation_bytes=num_bytes)
    one, other = first.runtime.device, second.runtime.device
    own_s, other_s = first.plan.seconds["step"], second.plan.seconds["step"]
    if own_s is None or other_s is None:
        logger.info("Two devices, %s and %s: one branch of guidance each.", one, other)
        return
    shown = [outcomes.in_seconds(seconds) for seconds in (own_s, other_s, 2 * own_s)]
    logger.info(
        "Two devices, one branch of guidance each: %s takes about %s a step, %s %s; %s alone takes "
        "%s.",
        one,
        shown[0],
        other,
        shown[1],
        one,
        shown[2],
    )
    if other_s >= 2 * own_s:
        logger.warning(
            "%s is so slow that %s alone would take no longer: use one device.", other, one
        )


def compare_ranks(run: PlannedRun, ranks: Ranks, whole: Job) -> None:
    """Say what ranks take beside one device, and where they do not pay.

    Args:
        run: of one of the ranks.
        ranks: who they are.
        whole: what they make together.
    """
    alone = plan_run(run.machine, whole, run.weights, Choice(run.plan.attention), run.needed)
    shared_s, alone_s = run.plan.seconds["step"], alone.seconds["step"]
    if shared_s is None or alone_s is None:
        advice = "; whether they are faster than one, `python -m skyreels doctor --plan` says"
        is_cuda = run.runtime.device.type == "cuda"  # between CPUs nothing is measured
        logger.info("%s%s.", ranks, advice if is_cuda else "")
        return
    logger.info(
        "%s, about %s a step; one device takes %s.",
        ranks,
        outcomes.in_seconds(shared_s),
        outcomes.in_seconds(alone_s),
    )
    if shared_s >= alone_s:
        logger.warning(
            "So much goes between %d ranks that one device would take no longer: use one device, "
            "or two with a branch of guidance each (--ranks 2).",
            ranks.num_shares,
        )
