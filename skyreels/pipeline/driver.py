"""What the driver of a batch decides: who makes what, and what a lost worker means.

Knows no clock, no network and no Ray: `Workers` start, are sent tasks, and are heard.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..errors import OptionError, SkyReelsError
from .batch import MAX_TRIES, Ended, Task


@dataclass(eq=False)
class Member:
    """A worker as the driver sees it.

    Attributes:
        handle: by which it is reached.
        name: for people.
        task: that it makes; None while it starts or is free.
    """

    handle: Any
    name: str = "a worker that has not started"
    task: Task | None = None


@dataclass(frozen=True)
class Lost:
    """What is heard of a worker that is gone: why, or ""."""

    why: str


class Workers(Protocol):
    """Those who make the tasks, as they are reached."""

    def start(self) -> Member:
        """Start a worker; the first that is heard of it is what it has."""

    def send(self, member: Member, task: Task) -> None:
        """Send a worker its task; SkyReelsError if the task cannot be sent."""

    def hear(self) -> Iterable[tuple[Member, Mapping[str, Any] | Lost]]:
        """Wait a second at most for what workers answer.

        Returns:
            Of a worker that has started, what it has, with its "name"; of one that has had a task,
            "clip" (bytes), "error" (a sentence, or "") and "seconds".
        """


class Driver:
    """The books of a batch.

    Args:
        tasks: to make, in their order.
        tell: takes a line for people.

    Attributes:
        members: workers that start, work or are free.
    """

    def __init__(self, tasks: Sequence[Task], tell: Callable[[str], None]) -> None:
        self.members: set[Member] = set()
        self._queue, self._tell = deque(tasks), tell
        self._free: deque[Member] = deque()
        self._tries: dict[str, int] = {}
        #: tasks that are being made
        self._begun = 0
        #: workers lost since one last finished a task
        self._lost = 0

    @property
    def is_busy(self) -> bool:
        """Whether a task waits or is being made."""
        return bool(self._queue) or self._begun > 0

    def begin(self, member: Member) -> None:
        """A worker starts."""
        self.members.add(member)

    def admit(self, member: Member) -> None:
        """A worker has started, and can be given tasks."""
        self._free.append(member)

    def refuse(self, member: Member) -> None:
        """A worker has started, and is not used."""
        self.members.discard(member)

    def give(self) -> tuple[Member, Task] | None:
        """The next worker and its task; None where nobody is free, or nothing waits."""
        if not self._queue or not self._free:
            return None
        member, task = self._free.popleft(), self._queue.popleft()
        member.task = task
        self._begun += 1
        self._tries[task.digest] = self._tries.get(task.digest, 0) + 1
        return member, task

    def finish(self, member: Member, seconds: float, error: str = "", maker: str = "") -> Ended:
        """A worker has made its task, or found that it cannot be made, and is free.

        Args:
            member: that had the task.
            seconds: that it took.
            error: a sentence; "" for a clip that is there.
            maker: who tried, if not the worker.

        Returns:
            What became of the task.
        """
        task = self._leave(member)
        self._lost = 0
        self._free.append(member)
        return Ended(task.digest, seconds, maker or member.name, self._tries[task.digest], error)

    def lose(self, member: Member, reason: str) -> Ended | None:
        """A worker is lost; its task waits again, as the next one, or has had its last try.

        Args:
            member: that is lost; another one may begin in its place.
            reason: for people; "" if nothing is known.

        Returns:
            What became of its task, if that ends.

        Raises:
            OptionError: workers are only lost.
        """
        self.members.discard(member)
        self._lost += 1
        said = f"{member.name} was lost"
        if member.task is None:
            said = f"{said} ({reason})" if reason else said
        if self._lost > MAX_TRIES * (1 + len(self.members)):
            raise OptionError(
                f"{self._lost} workers were lost and made nothing; the last: {said}. Look for what "
                "ends them (memory?), and that this package is installed on each machine."
            )
        if member.task is None:
            self._tell(f"{said}; another one is started.")
            return None
        task = self._leave(member)
        tries = self._tries[task.digest]
        if tries < MAX_TRIES:
            self._tell(f"{said}; {task.digest}.mp4 is tried again.")
            self._queue.appendleft(task)
            return None
        sentence = f"Its worker was lost {tries} times: look for what ends them (memory?)."
        return Ended(task.digest, 0.0, member.name, tries, sentence)

    def _leave(self, member: Member) -> Task:
        task, member.task = member.task, None
        assert task is not None
        self._begun -= 1
        return task


def drive(
    tasks: Sequence[Task],
    workers: Workers,
    count: int,
    *,
    admit: Callable[[Mapping[str, Any]], bool],
    save: Callable[[Task, bytes], None],
    tell: Callable[[str], None],
    check: Callable[[], None],
) -> Iterator[Ended]:
    """Make tasks, each by the next worker that is free.

    Args:
        tasks: in their order.
        workers: none of which has started.
        count: of workers that are wanted.
        admit: whether a worker is used, from what it has.
        save: keeps a clip.
        tell: takes a line for people.
        check: may interrupt.

    Yields:
        Each task as it ends.

    Raises:
        OptionError: no worker can make a clip, or workers are only lost.
        OSError: a clip cannot be saved.
    """
    driver = Driver(tasks, tell)
    for _ in range(min(count, len(tasks))):
        driver.begin(workers.start())
    while driver.is_busy:
        while (given := driver.give()) is not None:
            try:
                workers.send(*given)
            except SkyReelsError as error:
                yield driver.finish(given[0], 0.0, str(error), "this process")
        if driver.is_busy and not driver.members:
            raise OptionError(
                "No worker can make a clip, for the reasons above: correct them, and run the same "
                "command again."
            )
        check()
        for member, answer in workers.hear() if driver.is_busy else ():
            if isinstance(answer, Lost):
                ended = driver.lose(member, answer.why)
                driver.begin(workers.start())
                if ended is not None:
                    yield ended
            elif member.task is None:
                member.name = answer["name"]
                (driver.admit if admit(answer) else driver.refuse)(member)
            else:
                if not answer["error"]:
                    save(member.task, answer["clip"])
                yield driver.finish(member, answer["seconds"], answer["error"])
