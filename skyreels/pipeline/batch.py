"""Many clips: jobs from a file, each named by what it is made from, and what became of them.

A folder of results holds HASH.mp4 of every finished clip, `summary.json`, and `.lock` for the one
process that fills it. What is finished is never made again, so the same command continues a batch
that was stopped, however it was stopped.

Knows nothing of models or of Ray: who makes the clips is a function, see `Work`.
"""

import contextlib
import hashlib
import json
import os
import re
import socket
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ..errors import OptionError, SkyReelsError, shown
from ..files import MAX_JSON_BYTES, check_regular, write_json
from ..media import is_disk_full

#: tries of a clip whose worker was lost
MAX_TRIES = 3
#: hexadecimal digits of the name of a clip
NAME_DIGITS = 32
SUMMARY = "summary.json"
#: seconds between two summaries of a batch that goes on, and the share of the time they may take
SUMMARY_PERIOD_S = 2.0
SUMMARY_SHARE = 0.01


@dataclass(frozen=True)
class Task:
    """A clip to make.

    Attributes:
        digest: of all it is made from; its file's name.
        arguments: of `generate`.
        files: name of an argument that is a path -> SHA-256 of that file.
        is_remote: made on Wiro, see remote.py.
    """

    digest: str
    arguments: Namespace
    files: Mapping[str, str] = field(default_factory=dict)
    is_remote: bool = False

    def place(self, folder: Path) -> Path:
        """Of its clip."""
        return folder / f"{self.digest}.mp4"


@dataclass(frozen=True)
class Line:
    """A line of a file of jobs: a task, or what is wrong with it."""

    number: int
    task: Task | None
    error: str = ""


@dataclass(frozen=True)
class Ended:
    """What became of a task.

    Attributes:
        digest: of the task.
        seconds: that it took; 0 for a clip that was there.
        worker: that made it; "" for a clip that was there.
        tries: to make it.
        error: a sentence; "" for a clip that is there.
    """

    digest: str
    seconds: float = 0.0
    worker: str = ""
    tries: int = 0
    error: str = ""


#: makes tasks and tells of each as it ends
Work = Callable[[Sequence[Task]], Iterator[Ended]]


# --- jobs ---------------------------------------------------------------------------------------


def read_lines(path: Path) -> list[tuple[int, str]]:
    """Read a file of jobs.

    Returns:
        The lines that are not empty, with their numbers from 1.

    Raises:
        OptionError: no text in UTF-8, too large, or without jobs.
        CheckpointError: not a regular file.
    """
    check_regular(path)
    with path.open("rb") as file:
        content = file.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise OptionError(
            f"{path} has more than {MAX_JSON_BYTES} bytes: share its lines among several files."
        )
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise OptionError(f"{path} is not text in UTF-8: save it so.") from None
    # not splitlines, which also splits at characters that JSON allows within a text
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise OptionError(
            f'{path} holds no job: write one a line, as {{"prompt": "a red circle"}}.'
        )
    return lines


def parse_line(text: str, keys: Sequence[str]) -> list[tuple[str, str]]:
    """A job as options of the command line.

    Args:
        text: a JSON object; its keys are names of options, its values texts or numbers, or lists of
            texts for an option that is given several times.
        keys: names that are known.

    Returns:
        Names and values, as texts.

    Raises:
        OptionError: names what is wrong.
    """
    try:
        job = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise OptionError(
            f"This is not JSON ({shown(error)}): write one object on one line, as "
            '{"prompt": "a red circle moves left", "seed": 1}.'
        ) from None
    if not isinstance(job, dict):
        raise OptionError(
            f'This is {shown(text)} and not an object: write {{"prompt": "...", "seed": 1}}.'
        )
    given = []
    for key, value in job.items():
        if key not in keys:
            raise OptionError(f"{shown(key)!r} is not one of {', '.join(keys)}: leave it out.")
        is_list = isinstance(value, list) and all(isinstance(each, str) for each in value)
        if isinstance(value, bool) or not (is_list or isinstance(value, str | int | float)):
            raise OptionError(
                f"{key} is {shown(json.dumps(value))}: give a text or a number, or leave it out."
            )
        given += [(key, str(each)) for each in (value if is_list else [value])]
    return given


def content_hash(inputs: Mapping[str, Any]) -> str:
    """The name of a clip.

    Args:
        inputs: for json.dumps; all that the clip is made from.

    Returns:
        Hexadecimal digits; others for other inputs.
    """
    text = json.dumps(inputs, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:NAME_DIGITS]


def file_digest(path: Path) -> str:
    """Hash a whole file.

    Returns:
        Its SHA-256, hexadecimal.

    Raises:
        CheckpointError: not a regular file.
    """
    return hashlib.sha256(_read(path)).hexdigest()


def read_files(task: Task) -> dict[str, bytes]:
    """The files of a task, as they were when it was read.

    Returns:
        Name of the argument -> bytes.

    Raises:
        OptionError: a file has changed.
        CheckpointError: a file is gone.
    """
    found = {name: _read(getattr(task.arguments, name)) for name in task.files}
    for name, content in found.items():
        if hashlib.sha256(content).hexdigest() != task.files[name]:
            raise OptionError(
                f"{getattr(task.arguments, name)} has changed since the batch began: run the "
                "command again."
            )
    return found


def _read(path: Path) -> bytes:
    check_regular(path)
    return path.read_bytes()


# --- the folder of results ----------------------------------------------------------------------


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a folder to this process; the lock ends with the process, however that ends.

    Raises:
        OptionError: another process has it.
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+", encoding="utf-8") as file:
        try:
            _lock(file)
        except OSError:
            file.seek(0)
            raise OptionError(
                f"{folder} is being filled by another batch ({shown(file.read()) or 'unknown'}): "
                "wait until it ends, or name another folder with --out."
            ) from None
        with contextlib.suppress(OSError):  # of a full disk: the lock needs no text
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        yield


def _lock(file: IO[str]) -> None:
    """Lock an open file, or raise OSError; it is unlocked when it is closed."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        file.seek(2**20)  # beyond the text, which others read
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        file.seek(0)
        return
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def remove_parts(folder: Path) -> None:
    """Remove what processes that were killed left half-written; of a locked folder."""
    for path in folder.glob("*.part"):
        if re.fullmatch(
            rf"(([0-9a-f]{{{NAME_DIGITS}}}|clip)\.mp4|(summary|wiro)\.json)\.\d+\.part", path.name
        ):
            path.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears under its name when it is complete.

    Raises:
        OSError: the place cannot be written.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def python_path() -> str:
    """PYTHONPATH of a process that imports this package from where this one has it."""
    root = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))


# --- the run ------------------------------------------------------------------------------------


def run_lines(
    lines: Sequence[Line], folder: Path, work: Work, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Make the clips that are not there yet, each once, and keep `summary.json`.

    Args:
        lines: in the order of the summary.
        folder: locked.
        work: makes them.
        tell: takes a line for people.

    Returns:
        The summary: "jobs", each with "line", "file", "seconds", "worker", "tries", "error"; how
        many lines "made", "found", "failed" and "left" count; "elapsed_s".

    Raises:
        SkyReelsError: nothing more can be made.
        OSError: the folder cannot be written.
    """
    start = time.perf_counter()
    for line in lines:
        if line.error:
            tell(f"line {line.number}: {line.error}")
    tasks = {line.task.digest: line.task for line in lines if line.task is not None}
    first = {}  # digest -> number of the first of equal lines
    for line in reversed(lines):
        if line.task is not None:
            first[line.task.digest] = line.number
    ended = {name: Ended(name) for name, task in tasks.items() if task.place(folder).is_file()}
    left = [task for name, task in tasks.items() if name not in ended]
    tell(f"{len(lines)} jobs: {len(ended)} clips are there, {len(left)} to make.")
    write_at = 0.0
    try:
        for count, each in enumerate(work(left), 1):
            ended[each.digest] = each
            if (now := time.perf_counter()) >= write_at:
                _write_summary(lines, folder, ended, start)
                took = time.perf_counter() - now
                write_at = now + max(SUMMARY_PERIOD_S, took / SUMMARY_SHARE)
            task = tasks[each.digest]
            told = each.error or f"{task.place(folder).name} in {each.seconds:.1f} s"
            rest = (time.perf_counter() - start) / count * (len(left) - count)
            tell(
                f"{count}/{len(left)} (line {first[each.digest]}, {each.worker}): {told}"
                + (f"; {_duration(rest)} left" if count < len(left) else "")
            )
    except BaseException:
        with contextlib.suppress(OSError):  # what stopped the batch is what is told
            _write_summary(lines, folder, ended, start)
        raise
    return _write_summary(lines, folder, ended, start)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _write_summary(
    lines: Sequence[Line], folder: Path, ended: Mapping[str, Ended], start: float
) -> dict[str, Any]:
    jobs: list[dict[str, Any]] = []
    counts = dict.fromkeys(("made", "found", "failed", "left"), 0)
    for line in lines:
        result = Ended("", error=line.error)
        if line.task is not None:
            result = ended.get(line.task.digest, Ended("", error="Not made yet: run it again."))
        is_left = line.task is not None and line.task.digest not in ended
        kind = "found" if not result.tries else "made"
        counts["left" if is_left else "failed" if result.error else kind] += 1
        jobs.append(
            {
                "line": line.number,
                "file": line.task.place(folder).name if line.task and not result.error else None,
                "seconds": round(result.seconds, 3),
                "worker": result.worker,
                "tries": result.tries,
                "error": result.error or None,
            }
        )
    elapsed_s = round(time.perf_counter() - start, 3)
    summary = {"skyreels_batch": 1, **counts, "elapsed_s": elapsed_s, "jobs": jobs}
    write_json(folder / SUMMARY, summary)
    return summary


def work_here(
    tasks: Sequence[Task], make: Callable[[Namespace], None], folder: Path
) -> Iterator[Ended]:
    """Make tasks one after the other in this process.

    Args:
        tasks: in their order.
        make: writes the clip of `arguments.out`, or nothing.
        folder: of the clips.

    Yields:
        Each as it ends.

    Raises:
        SkyReelsError: the folder's disk is full.
    """
    for task in tasks:
        start = time.perf_counter()
        error = ""
        try:
            read_files(task)  # the clip's name says what is in them
            make(Namespace(**{**vars(task.arguments), "out": task.place(folder)}))
        except SkyReelsError as failure:
            if failure.__cause__ is not None and is_disk_full(failure.__cause__):
                raise
            error = str(failure)
        yield Ended(task.digest, time.perf_counter() - start, "this process", 1, error)
