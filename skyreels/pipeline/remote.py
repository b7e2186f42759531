"""Jobs of a batch that are made on wiro.ai, each by a process of `python -m wiro_api`.

Nothing is sent without a limit. What a job may cost is written to `wiro.json` in the folder of
results before its Run leaves, and counts there until its cost is known, also for the same command
later. The client's own journal sees to it that a job is not paid for twice: a batch that was
stopped collects what it had started.

The files of a task stay in `wiro/HASH/` as they came; the clip is a copy.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from ..errors import OptionError, SkyReelsError, shown
from ..files import read_json, write_json
from .batch import Ended, Task, python_path, read_files, write_whole

#: what makes the clips
MODEL = "wiro/SkyReels-V1"
LEDGER = "wiro.json"
#: jobs under way at a time
AT_ONCE = 4
#: between two looks for an interrupt, while nothing ends
PERIOD_S = 0.5


def parse_dollars(text: str) -> Decimal:
    """An amount as a person types it.

    Returns:
        US dollars.

    Raises:
        OptionError: not an amount.
    """
    try:
        amount = Decimal(text.strip().removeprefix("$"))
    except InvalidOperation:
        amount = Decimal("nan")
    if not amount.is_finite() or amount < 0:
        raise OptionError(f"{shown(text)!r} is not an amount: give US dollars, as 2.50.")
    return amount


def _money(amount: Decimal) -> str:
    return f"${amount:.2f}" if amount == round(amount, 2) else f"${amount}"


class Ledger:
    """What the jobs of a folder have cost on Wiro, or may have.

    Args:
        file: in which it is kept; of a locked folder.
        limit: US dollars, of all jobs together.

    Raises:
        OptionError: the file cannot be read, so what was spent is not known.
    """

    def __init__(self, file: Path, limit: Decimal) -> None:
        self._file, self._limit, self._lock = file, limit, threading.Lock()
        self._amounts: dict[str, Decimal] = {}
        if file.exists():
            try:
                told = read_json(file)
                self._amounts = {name: parse_dollars(value) for name, value in told.items()}
            except (SkyReelsError, AttributeError) as error:
                raise OptionError(
                    f"{file} cannot be read ({shown(str(error), 300)}), so what was spent on Wiro "
                    "is not known: move it away, and lower --wiro-limit by what was spent."
                ) from None

    @property
    def total(self) -> Decimal:
        """US dollars of all jobs."""
        return sum(self._amounts.values(), Decimal(0))

    def reserve(self, digest: str, price: Decimal) -> None:
        """Write down that a job may cost so much, before it is sent.

        Raises:
            OptionError: with it, all jobs together would cost more than the limit.
            OSError: it cannot be written.
        """
        with self._lock:
            others = self.total - self._amounts.get(digest, Decimal(0))
            if others + price > self._limit:
                raise OptionError(
                    f"It would cost {_money(price)}, and of --wiro-limit {_money(self._limit)} "
                    f"the clips of this folder have taken {_money(others)}. Nothing was sent: "
                    "raise the limit."
                )
            self._write({**self._amounts, digest: price})

    def settle(self, digest: str, cost: Decimal) -> None:
        """Write down what a job has cost that was reserved; 0 for one that was not sent."""
        with self._lock:
            if digest in self._amounts:
                self._write({**self._amounts, digest: cost})

    def _write(self, amounts: Mapping[str, Decimal]) -> None:
        write_json(self._file, {name: str(amount) for name, amount in amounts.items()})
        self._amounts = dict(amounts)


class RemoteRuns:
    """The jobs of a batch that go to Wiro.

    Args:
        folder: of the clips, locked.
        limit: US dollars for all jobs of the folder together.
        tell: takes a line for people.
    """

    def __init__(self, folder: Path, limit: Decimal, tell: Callable[[str], None]) -> None:
        self._folder, self._ledger = folder, Ledger(folder / LEDGER, limit)
        self._tell = tell
        self._programs: set[subprocess.Popen[str]] = set()
        self._is_stopped = False
        self._lock = threading.Lock()
        self._ended: queue.SimpleQueue[Ended] = queue.SimpleQueue()

    @contextmanager
    def running(self, tasks: Sequence[Task]) -> Iterator[None]:
        """Make tasks meanwhile; afterwards what still runs is interrupted, and goes on at Wiro."""
        pool = ThreadPoolExecutor(AT_ONCE, "wiro")
        try:
            for task in tasks:
                pool.submit(self._end, task)
            yield
        finally:
            with self._lock:
                self._is_stopped = True
                if self._programs:
                    self._tell("What was sent to Wiro goes on there; the same command collects it.")
                for program in self._programs:
                    _interrupt(program)
            pool.shutdown(wait=True, cancel_futures=True)

    def ended(self, *, waits: bool) -> Iterator[Ended]:
        """What has ended since the last call.

        Args:
            waits: for one that ends, half a second at most.

        Yields:
            Each, of `running`.
        """
        try:
            if waits:
                yield self._ended.get(timeout=PERIOD_S)
            while True:
                yield self._ended.get_nowait()
        except queue.Empty:
            return

    def _end(self, task: Task) -> None:
        try:
            told = self._make(task)
        except (SkyReelsError, OSError) as error:
            told = Ended(task.digest, 0.0, "wiro.ai", 1, str(error))
        except Exception as error:  # noqa: BLE001 - of this clip; what was sent is in the journal
            told = Ended(task.digest, 0.0, "wiro.ai", 1, f"Unexpected {shown(repr(error), 300)}.")
        self._ended.put(told)

    def _make(self, task: Task) -> Ended:
        read_files(task)  # the clip's name says what is in them
        words = _words(task)
        quoted = self._call("quote", *words)
        price = quoted.get("price")
        if not quoted.get("was_sent"):
            if price is None:
                raise OptionError(
                    "Its price on Wiro is not known before the run, so --wiro-limit cannot hold "
                    "it. Nothing was sent. Make one clip alone with `python -m wiro_api run "
                    f"{MODEL}`: its cost is then the price."
                )
            self._ledger.reserve(task.digest, parse_dollars(price))
        most = ["--max-price", str(price)] if price is not None else []
        place = self._folder / "wiro" / task.digest
        try:
            made = self._call("run", *words, *most, "--out", str(place), "--wait")
        except OptionError:
            if not self._call("quote", *words).get("was_sent"):
                self._ledger.settle(task.digest, Decimal(0))
            raise
        if made.get("cost") is not None:
            self._ledger.settle(task.digest, parse_dollars(str(made["cost"])))
        clip = next((Path(path) for path in made.get("files", ()) if path.endswith(".mp4")), None)
        if clip is None:
            raise OptionError(
                f"Task {shown(made.get('taskid'))} has ended, and none of its files is an .mp4: "
                f"see {place}."
            )
        write_whole(task.place(self._folder), clip.read_bytes())
        return Ended(task.digest, made.get("elapsed_s") or 0.0, "wiro.ai", 1)

    def _call(self, command: str, *words: str) -> dict[str, Any]:
        """The JSON of a command of the client; SkyReelsError with its sentence where it fails."""
        with self._lock:
            if self._is_stopped:
                raise OptionError("The batch was stopped before this clip was sent.")
            program = subprocess.Popen(
                [sys.executable, "-m", "wiro_api", command, MODEL, *words, "--json"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": python_path()},
                encoding="utf-8",
            )
            self._programs.add(program)
        try:
            out, err = program.communicate()
        finally:
            with self._lock:
                self._programs.discard(program)
        try:
            told = json.loads(out)
        except ValueError:
            last = next(reversed(err.strip().splitlines()), "")
            told = {"error": f"The client of Wiro ended with {program.returncode} ({last})."}
        if program.returncode or not isinstance(told, dict):
            raise OptionError(shown(told.get("error") if isinstance(told, dict) else told, 2000))
        return told


def _words(task: Task) -> list[str]:
    """A job as options of `wiro_api run`."""
    given = task.arguments
    parameters = {
        "prompt": given.prompt,
        "negativePrompt": given.negative or "",
        "scale": given.cfg,
        "numFrames": given.frames,
        "size": f"{given.width}x{given.height}",
        "steps": given.steps,
    }
    words = [f"--param={name}={value}" for name, value in parameters.items()]
    return [*words, f"--file=inputImage={given.image}"]


def _interrupt(program: "subprocess.Popen[str]") -> None:
    if os.name == "posix":
        program.send_signal(signal.SIGINT)
    else:
        program.terminate()


def beside(
    remote: RemoteRuns, tasks: Sequence[Task], here: Iterator[Ended], check: Callable[[], None]
) -> Iterator[Ended]:
    """Make tasks on Wiro while others are made here.

    Args:
        remote: makes `tasks`.
        tasks: for Wiro.
        here: makes the others.
        check: may interrupt.

    Yields:
        Each of both as it ends.

    Raises:
        SkyReelsError: as of `here`.
    """
    left = len(tasks)
    with remote.running(tasks):
        for each in here:
            yield each
            for other in remote.ended(waits=False):
                left -= 1
                yield other
        while left:
            check()
            for other in remote.ended(waits=True):
                left -= 1
                yield other
