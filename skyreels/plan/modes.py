"""Every way to make a clip beside the others, before anything is loaded."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from ..runtime import Runtime
from ..runtime.outcomes import in_bytes, in_seconds
from ..transformer.quant import STORAGE_DTYPES
from .advice import why_not
from .inputs import AUTO, Choice, Job, Machine, machine_of, multiplies, rates_needed
from .predict import Plan, expectation, plan_run
from .weights import Weights, weights_as

if TYPE_CHECKING:
    from .scaling import Shared


@dataclass(frozen=True)
class Preflight:
    """What a run would take, before anything is loaded.

    Attributes:
        machine: where.
        job: what.
        chosen: the plan that would be taken.
        modes: every plan, the chosen one among them.
        cards: the chosen way on one card, and on several of this machine, where there are more.
        text: for people.
        obstacle: why the chosen plan does not fit, and what would; "" if it does.
    """

    machine: Machine
    job: Job
    chosen: Plan
    modes: tuple[Plan, ...]
    cards: "tuple[Shared, ...]"
    text: str
    obstacle: str = ""

    def to_json(self) -> dict[str, Any]:
        """The same for json.dumps: sizes in bytes, times in seconds, rates a second."""
        job = {
            key: getattr(self.job, key) for key in ("width", "height", "num_frames", "num_steps")
        }
        return {
            "device": self.machine.name,
            "total_bytes": self.machine.total_bytes,
            "free_bytes": self.machine.free_bytes,
            "rates": dict(self.machine.rates),
            "job": {**job, "num_evaluations": self.job.num_evaluations},
            "chosen": self.modes.index(self.chosen),
            "modes": [asdict(plan) for plan in self.modes],
            "cards": [{**asdict(each), "step_s": each.step_s} for each in self.cards],
            "text": self.text,
        }


def preflight(
    runtime: Runtime,
    job: Job,
    stored: str,
    precision: str = "auto",
    choice: Choice = AUTO,
    *,
    reclaimable: int = 0,
) -> Preflight:
    """Plan a run from the header of its file.

    Args:
        runtime: whose device is probed, if it is a new one, and whose free memory counts.
        job: what is made.
        stored: precision of the file, a value of STORED.
        precision: that the loader is asked for.
        choice: attention and decode.
        reclaimable: bytes that other models take and would give back.

    Returns:
        The chosen plan and the others.
    """
    weights = weights_as(job.config, stored, precision)
    gemms = {weights_as(job.config, stored, each).gemm for each in ("auto", "fp8", "int8")}
    names = [*rates_needed(sorted({weights.gemm, *gemms})), "peer"]
    machine = machine_of(runtime, names, loaded_bytes=reclaimable)
    chosen = plan_run(machine, job, weights, choice)
    modes = plans(machine, job, stored, choice)
    if chosen not in modes:
        modes.insert(0, chosen)
    lines = [
        f"{machine.name}: {machine.free_bytes / 1e9:.1f} of {machine.total_bytes / 1e9:.1f} GB "
        f"free, {machine.ram_bytes / 1e9:.1f} GB of main memory free",
        expectation(chosen, job),
        *table(modes, chosen),
    ]
    cards = on_cards(machine, job, weights, choice)
    lines += cards_table(cards)
    obstacle = "" if chosen.fits else why_not(machine, job, weights, choice)
    if obstacle:
        lines.append(obstacle)
    if weights.total > machine.ram_bytes:
        lines.append(
            f"The weights take {weights.total / 1e9:.1f} GB of main memory, more than is free: "
            "close other programs, or use a file in 8 bits."
        )
    return Preflight(machine, job, chosen, tuple(modes), tuple(cards), "\n".join(lines), obstacle)


def plans(machine: Machine, job: Job, stored: str, choice: Choice = AUTO) -> list[Plan]:
    """Every mode beside the others, for people to compare.

    Args:
        machine: where.
        job: what.
        stored: precision of the file, a value of STORED.
        choice: attention and decode.

    Returns:
        For each precision what would be chosen here and, where that streams a part, all resident
        and all streamed. The exact ones come first.
    """
    found: list[Plan] = []
    for precision in ("auto", "bf16", "fp8", "int8"):
        weights = weights_as(job.config, stored, precision)
        if precision == "bf16" and stored in ("bf16", "fp16"):
            continue  # as auto
        if precision in STORAGE_DTYPES and not multiplies(machine, precision):
            continue
        chosen = plan_run(machine, job, weights, choice)
        found.append(chosen)
        if machine.streams:
            others = (
                plan_run(machine, job, weights, replace(choice, is_resident=resident))
                for resident in (True, False)
            )
            found += [plan for plan in others if plan.streamed_bytes != chosen.streamed_bytes]
    return sorted(found, key=lambda plan: not plan.is_exact)


def table(found: Sequence[Plan], chosen: Plan) -> list[str]:
    """Plans beside each other for people; "no" marks those that do not fit.

    Args:
        found: see `plans`.
        chosen: of these the one that would be taken, marked ->.

    Returns:
        A heading and a line for each plan.
    """
    rows = [["", "precision", "streamed", "sampling", "a step", "decoding", "in pieces", "total"]]
    for plan in found:
        away = f"{plan.streamed_bytes / 1e9:.1f} GB" if plan.streamed_bytes else "nothing"
        seconds = [_or_unknown(plan.seconds.get(name)) for name in ("step", "total")]
        peaks = [in_bytes(plan.peak_bytes.get(name, 0)) for name in ("sample", "decode")]
        rows.append(
            [
                "->" if plan == chosen else "" if plan.fits else "no",
                plan.precision + ("" if plan.is_exact else ", not exact"),
                f"{away} a step" if plan.interleaves else away,
                *(peaks[0], seconds[0], peaks[1], plan.decode or "-", seconds[1]),
            ]
        )
    return _aligned(rows)


def on_cards(machine: Machine, job: Job, weights: Weights, choice: Choice = AUTO) -> "list[Shared]":
    """One card beside the ways in which several of this machine can share a clip.

    Args:
        machine: one of the cards.
        job: what is made.
        weights: of the transformer.
        choice: what the user fixed.

    Returns:
        What each takes, one card first; empty where there is no other card, or a rate is unknown.
    """
    from .scaling import layouts, share

    if machine.num_cards < 2:
        return []
    heads, is_guided = job.config.num_attention_heads, job.num_guided > 0
    found = [
        share(machine, job, weights, layout, choice)
        for layout in layouts(machine.num_cards, heads, is_guided=is_guided)
    ]
    known = [each for each in found if each is not None]
    return known if len(known) == len(found) else []


def cards_table(found: "Sequence[Shared]") -> list[str]:
    """Ways to share a clip beside each other for people.

    Args:
        found: see `on_cards`.

    Returns:
        A heading and a line for each; nothing where there is nothing to compare.
    """
    if not found:
        return []
    rows = [["cards", "shared as", "a step", "of it exchanges", "total", "speed"]]
    for each in found:
        verdict = f"{found[0].step_s / each.step_s:.2f}"
        if each is not found[0] and each.step_s >= found[0].step_s:
            verdict += ", does not pay"
        if not each.fits:
            verdict += ", does not fit"
        part = f"{100 * each.exchange_s / each.step_s:.0f} %"
        times = (in_seconds(each.step_s), part, _or_unknown(each.total_s))
        rows.append([str(each.layout.cards), str(each.layout), *times, verdict])
    return _aligned(rows)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines, whose columns are as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _or_unknown(seconds: float | None) -> str:
    return "?" if seconds is None else in_seconds(seconds)
