"""Workers of a batch that exist in a simulated time only; the driver's decisions are the real ones.

An event is heard when the driver asks; whatever the driver does takes time, so that events queue up
behind it. A worker is lost after a random time (exponential), which shows when it has a task, and a
new one begins in its place.
"""

import contextlib
import heapq
import itertools
import random
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comfyui_skyreels.skyreels.pipeline.batch import Line, Task, run_lines
from comfyui_skyreels.skyreels.pipeline.driver import Lost, Member, drive


@dataclass(frozen=True)
class Costs:
    """Seconds; of the driver as measured (tests/bench/simulate_batch.py), of others as marked.

    Attributes:
        clip: that a worker takes for one.
        spread: of that, standard deviation over mean.
        start: until a worker has started.
        load: of weights, with a worker's first clip (assumed: 26 GB at 0.43 GB/s).
        notice: until the loss of a worker is noticed (assumed, of a machine; a process: 0.02 s).
        create: of the driver, to begin a worker.
        send: of the driver, to send a job with a picture.
        take: of the driver, to take a clip and write it, and to say so.
        wait: of the driver, each time it asks whether anything has happened.
        wait_each: the same, for each worker that is awaited.
    """

    clip: float = 256.0
    spread: float = 0.02
    start: float = 10.0
    load: float = 60.0
    notice: float = 30.0
    create: float = 1.1e-3
    send: float = 4e-3
    take: float = 9.6e-3
    wait: float = 4e-5
    wait_each: float = 2.7e-7


@dataclass
class _Simulated:
    """A worker: when it is lost, and whether its weights are loaded."""

    lost_at: float
    has_weights: bool = False


class SimulatedWorkers:
    """The `Workers` of a batch.

    Args:
        costs: of everything.
        lost_per_hour: of all workers, the share that is lost in an hour.
        seed: of what is random.
    """

    def __init__(self, costs: Costs, lost_per_hour: float, seed: int) -> None:
        self.costs, self._rate = costs, lost_per_hour / 3600
        self._random = random.Random(seed)
        self._events: list[tuple[float, int, Member, Any]] = []
        self._number = itertools.count()
        self.now = self.idle = 0.0
        self.started = self.lost = 0
        #: seconds that workers made clips which were kept
        self.useful = 0.0

    def start(self) -> Member:
        self.now += self.costs.create
        lifetime = self._random.expovariate(self._rate) if self._rate else float("inf")
        born = self.now + self.costs.start
        member = Member(_Simulated(born + lifetime))
        self.started += 1
        self._push(born, member, {"name": f"worker {self.started}"})
        return member

    def send(self, member: Member, task: Task) -> None:
        self.now += self.costs.send
        worker: _Simulated = member.handle
        took = self.costs.clip * max(0.1, self._random.gauss(1.0, self.costs.spread))
        end = self.now + took + (0.0 if worker.has_weights else self.costs.load)
        if worker.lost_at < end:
            self._push(max(worker.lost_at, self.now) + self.costs.notice, member, Lost(""))
            return
        worker.has_weights = True
        self._push(end, member, {"clip": task.digest.encode(), "error": "", "seconds": took})

    def hear(self) -> list[tuple[Member, Any]]:
        self.now += self._asking()
        at, _, member, answer = heapq.heappop(self._events)
        if at > self.now:
            gap = at - self.now
            asked = min(int(gap) * self._asking(), gap)  # once a second
            self.idle += gap - asked
            self.now = at
        if isinstance(answer, Lost):
            self.lost += 1
        elif member.task is not None:
            self.now += self.costs.take
            self.useful += answer["seconds"]
        return [(member, answer)]

    def _asking(self) -> float:
        return self.costs.wait + self.costs.wait_each * len(self._events)

    def _push(self, at: float, member: Member, answer: Any) -> None:
        heapq.heappush(self._events, (at, next(self._number), member, answer))


@dataclass(frozen=True)
class Outcome:
    """Of a simulated batch: its summary, files that were written twice, and figures."""

    summary: dict[str, Any]
    written: list[str]
    workers: SimulatedWorkers

    @property
    def driver_share(self) -> float:
        """Of the time, that the driver was busy."""
        return 1 - self.workers.idle / self.workers.now


def simulate(
    folder: Path,
    num_clips: int,
    num_workers: int,
    costs: Costs,
    *,
    lost_per_hour: float = 0.01,
    seed: int = 0,
    stop_after: int | None = None,
) -> Outcome:
    """Run a batch, with the real books and summary.

    Args:
        folder: of the clips, which hold their own names.
        num_clips: lines of the batch.
        num_workers: that are wanted.
        costs: of everything.
        lost_per_hour: of the workers.
        seed: of what is random.
        stop_after: the driver is killed after so many clips.
    """
    workers, written = SimulatedWorkers(costs, lost_per_hour, seed), []

    def save(task: Task, clip: bytes) -> None:
        if len(written) == stop_after:
            raise KeyboardInterrupt
        written.append(task.digest)
        task.place(folder).write_bytes(clip)

    lines = [Line(n + 1, Task(f"{n:032x}", Namespace())) for n in range(num_clips)]
    summary: dict[str, Any] = {}
    with contextlib.suppress(KeyboardInterrupt):
        summary = run_lines(
            lines, folder,
            lambda tasks: drive(
                tasks, workers, num_workers, admit=lambda found: True, save=save,
                tell=lambda line: None, check=lambda: None,
            ),
            lambda line: None,
        )  # fmt: skip
    return Outcome(summary, written, workers)
