"""What a clip takes on several cards of a kind: two with a branch of guidance each, or ranks.

Each card computes a share, and what it gives to the others takes time of its own: nothing hides
behind anything else. Counted are steps and the decode, of which each card makes a strip; left out
are loading, the text, the gathering of predictions, a thousandth of what the blocks exchange, and
what strips exchange, less than a GB.
"""

from dataclasses import dataclass, replace
from math import prod

from ..runtime.collectives import MAX_RANKS
from .inputs import AUTO, Choice, Job, Machine
from .predict import given_bytes, plan_run
from .weights import Weights


@dataclass(frozen=True)
class Layout:
    """How cards share a clip.

    Attributes:
        branches: 2 gives each branch of guidance cards of its own.
        ranks: cards that share each prediction.
    """

    branches: int = 1
    ranks: int = 1

    @property
    def cards(self) -> int:
        """Of both kinds of sharing together."""
        return self.branches * self.ranks

    def __str__(self) -> str:
        if self.cards == 1:
            return "one card"
        if self.branches == 1:
            return f"{self.ranks} ranks"
        return "two cards, a branch each" if self.ranks == 1 else f"two times {self.ranks} ranks"


@dataclass(frozen=True)
class Shared:
    """What a clip takes with one layout.

    Attributes:
        layout: of the cards.
        given_bytes: that a card gives to others in a step.
        weight_bytes: of the loop, copied to all cards together before the first step.
        compute_s: of a step, what the slowest card computes, and waits for its own weights.
        exchange_s: of a step, what goes between cards.
        decode_s: of the clip; None if it is not known, 0 where none was planned.
        total_s: of all steps and the decode; None if it is not known.
        fits: whether each card has room.
    """

    layout: Layout
    given_bytes: float
    weight_bytes: int
    compute_s: float
    exchange_s: float
    decode_s: float | None
    total_s: float | None
    fits: bool

    @property
    def step_s(self) -> float:
        """Of a step."""
        return self.compute_s + self.exchange_s


def layouts(max_cards: int, heads: int, *, is_guided: bool = True) -> list[Layout]:
    """The ways in which so many cards, or fewer, can share a clip.

    Args:
        max_cards: at least 1.
        heads: of attention, which ranks divide.
        is_guided: whether a step has two branches.

    Returns:
        One card first; those with fewer cards before those with more.
    """
    found = []
    for cards in range(1, min(max_cards, MAX_RANKS) + 1):
        branches = 2 if is_guided and cards % 2 == 0 else 1  # as `generate --ranks` has it
        if heads % (cards // branches) == 0:
            found.append(Layout(branches, cards // branches))
    return found


def share(
    machine: Machine, job: Job, weights: Weights, layout: Layout, choice: Choice = AUTO
) -> Shared | None:
    """Plan a clip on several cards, each like this one.

    Args:
        machine: one of the cards.
        job: what is made.
        weights: of the transformer.
        layout: how the cards share it.
        choice: what the user fixed.

    Returns:
        What it takes; None where a rate is unknown.
    """
    parted = replace(job, num_ranks=layout.ranks, num_strips=layout.cards)
    if layout.branches == 2:
        parted = replace(parted, num_guided=0)  # the others make those
    plan = plan_run(machine, parted, weights, choice)
    step_s, peer = plan.seconds["step"], machine.rates.get("peer", 0.0)
    if step_s is None or (layout.cards > 1 and not peer):
        return None
    times = len(weights.blocks) * parted.num_evaluations / parted.num_steps
    given = times * given_bytes(parted, weights) if layout.ranks > 1 else 0.0
    exchange_s = given / peer if given else 0.0
    compute_s = step_s - exchange_s
    if layout.branches == 2:
        latents = 4.0 * prod(job.latent_shape)  # float32, there and a prediction back
        exchange_s += 2 * latents / peer
        given += latents
    decode_s = plan.seconds.get("decode", 0.0)
    steps_s = job.num_steps * (compute_s + exchange_s)
    return Shared(
        layout=layout,
        given_bytes=given,
        weight_bytes=layout.cards * weights.loop,
        compute_s=compute_s,
        exchange_s=exchange_s,
        decode_s=decode_s,
        total_s=None if decode_s is None else steps_s + decode_s,
        fits=plan.fits,
    )
