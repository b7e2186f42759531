"""Ways to sample with less and less memory, for a run in which it runs out."""

from collections.abc import Mapping
from dataclasses import dataclass

from ..config import CHUNKINGS
from ..runtime.offload import reserve_bytes
from ..runtime.streaming import least_bytes
from .predict import Plan
from .weights import Weights


@dataclass(frozen=True)
class Rung:
    """A way to sample.

    Attributes:
        chunking: a name of config.CHUNKINGS.
        spare: share of the planned resident blocks that are streamed instead, 0..1.
        interleaves: each block runs for both branches of guidance before the next one does.
    """

    chunking: str
    spare: float = 0.0
    interleaves: bool = False

    def __str__(self) -> str:
        if self.interleaves:
            return f"{self.chunking}, both predictions at once"
        if not self.spare:
            return self.chunking
        return f"{self.chunking}, {self.spare:.0%} fewer resident blocks"


def rungs(chunking: str, streams: bool, *, interleaves: bool = False) -> list[Rung]:
    """From the planned way down to the smallest chunks, then with fewer and fewer resident blocks.

    Args:
        chunking: of the plan.
        streams: whether blocks can leave the device.
        interleaves: of the plan; on lower rungs one branch runs after the other.

    Returns:
        At least one.
    """
    names = list(CHUNKINGS)
    found = [Rung(chunking, interleaves=True)] if interleaves else []
    found += [Rung(name) for name in names[names.index(chunking) :]]
    if streams:
        found += [Rung(names[-1], spare) for spare in (0.25, 0.5, 0.75, 1.0)]
    return found


def bytes_on(rung: Rung, plan: Plan, weights: Weights, free: int, needed: Mapping[str, int]) -> int:
    """Bytes to keep free beside the weights on a rung.

    What smaller chunks leave of the planned bytes stays free: more weights in it would make the
    next step run out again.

    Args:
        rung: of `rungs`.
        plan: of the run.
        weights: of the run.
        free: bytes of the device while no weight is on it.
        needed: bytes of the activations, of each chunking.

    Returns:
        Never so many that blocks could not be streamed beside them.
    """
    least = plan.activation_bytes if rung.interleaves else needed[rung.chunking]
    room = free - least - weights.outside - least_bytes(weights.blocks, 1) - reserve_bytes(free)
    kept = plan.activation_bytes - least
    if rung.spare:
        kept = max(kept, room - int((1 - rung.spare) * plan.resident_bytes))
    return least + max(0, min(kept, room))
