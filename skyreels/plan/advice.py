"""What to do about a clip that does not fit."""

from bisect import bisect_left
from dataclasses import replace

from ..conditioning.latents import nearest_frames
from ..transformer.quant import STORAGE_DTYPES
from ..vae.tiling import last_rung, plan_host_bytes
from .inputs import AUTO, Choice, Job, Machine, multiplies
from .predict import Plan, plan_run
from .weights import Weights, weights_as

#: of the frames, and of the sides, that are tried to find a clip that fits; 0 is a single frame
SHARES = (0.75, 0.5, 0.25, 0.0)
#: bytes of main memory that nothing here exceeds
ENOUGH = 2**60


def why_not(machine: Machine, job: Job, weights: Weights, choice: Choice = AUTO) -> str:
    """What is missing, the least that works, and what would help, in two sentences.

    What the user fixed is kept; what could be chosen instead is named.

    Args:
        machine: where.
        job: what does not fit.
        weights: of the transformer.
        choice: what the user fixed.

    Returns:
        For people.
    """
    helps = [
        *_other_choices(machine, job, weights, choice),
        *_smaller_jobs(machine, job, weights, choice),
    ]
    richer = replace(machine, ram_bytes=ENOUGH)
    if not _fits(machine, job, weights, choice) and _fits(richer, job, weights, choice):
        assert job.vae is not None  # as only a decode keeps its clip in main memory
        stored = plan_host_bytes(last_rung(choice.decode), job.vae, job.latent_shape, job.vae_dtype)
        helps.insert(0, "more free main memory (close other programs)")
        return (
            f"To decode {job} keeps {stored / 1e9:.1f} GB in main memory beside the frames, and "
            f"{machine.ram_bytes / 1e9:.1f} GB of it are free. What would work: {'; '.join(helps)}."
        )
    least = smallest(job, weights, machine, choice)
    stage, needed = max(least.peak_bytes.items(), key=lambda item: item[1])
    verb = {"condition": "prepare", "sample": "sample", "decode": "decode"}[stage]
    free = least_free_bytes(machine, job, weights, choice)
    helps.insert(0, f"{free / 1e9:.1f} GB of free memory (close other programs)")
    return (
        f"To {verb} {job} takes at least {needed / 1e9:.1f} GB and {machine.free_bytes / 1e9:.1f} "
        f"GB of {machine.name} are free, of which "
        f"{(machine.free_bytes - machine.usable_bytes) / 1e9:.1f} GB stay in reserve. What would "
        f"work: {'; '.join(helps)}."
    )


def least_free_bytes(machine: Machine, job: Job, weights: Weights, choice: Choice = AUTO) -> int:
    """Free bytes of a device with which a clip just fits, to a hundredth of a GB.

    Args:
        machine: the device, whatever is free on it now, with enough main memory.
        job: what.
        weights: of the transformer.
        choice: what the user fixed.

    Returns:
        Bytes.
    """
    machine = replace(machine, ram_bytes=ENOUGH, rates={})  # times take longest to predict

    def fits(hundredths: int) -> bool:
        return _fits(replace(machine, free_bytes=hundredths * 10**7), job, weights, choice)

    high = 1
    while not fits(high):
        high *= 2
    found = bisect_left(range(high), True, lo=high // 2, key=fits)
    return found * 10**7


def smallest(job: Job, weights: Weights, machine: Machine, choice: Choice = AUTO) -> Plan:
    """The plan that takes the least memory, whether it fits or not."""
    return plan_run(replace(machine, free_bytes=0), job, weights, choice)


def _other_choices(machine: Machine, job: Job, weights: Weights, choice: Choice) -> list[str]:
    """Of what the user fixed, what would fit if it were left to the planner."""
    others = {
        "exact attention": replace(choice, attention="exact"),
        "decode auto": replace(choice, decode="auto"),
        "weights that are streamed": replace(choice, is_resident=None),
    }
    return [
        name
        for name, other in others.items()
        if other != choice and _fits(machine, job, weights, other)
    ]


def _smaller_jobs(machine: Machine, job: Job, weights: Weights, choice: Choice) -> list[str]:
    """Clips, and a precision, that would fit."""
    found = []
    others = {
        "fewer frames": [
            replace(job, num_frames=nearest_frames(int(part * job.num_frames))) for part in SHARES
        ],
        "a smaller size": [
            replace(job, width=_multiple(part * job.width), height=_multiple(part * job.height))
            for part in SHARES[:-1]
        ],
    }
    for name, jobs in others.items():
        fitting = [each for each in jobs if each != job and _fits(machine, each, weights, choice)]
        if fitting:
            found.append(f"{name}, such as {fitting[0]}")
    for precision in STORAGE_DTYPES:
        if weights.gemm in ("bf16", "fp32") and multiplies(machine, precision):
            other = weights_as(job.config, weights.gemm, precision)
            if other.loop < weights.loop and _fits(machine, job, other, choice):
                found.append(f"precision {precision} (not exact)")
    return found


def _fits(machine: Machine, job: Job, weights: Weights, choice: Choice) -> bool:
    return plan_run(machine, job, weights, choice).fits


def _multiple(pixels: float) -> int:
    return max(16, int(pixels) // 16 * 16)
