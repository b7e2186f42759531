"""A task's record: its status, its outputs, and what they mean. No I/O here.

A task has ended in two statuses only, "task_postprocess_end" (success or failure: the exit code
decides) and "task_cancel". "task_end" is not the end, and "task_error" is a line of its log.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from enum import Enum
from typing import Any

from .wire import (
    MAX_URL,
    amount_of,
    decimal_of,
    id_of,
    int_of,
    list_of,
    mapping_of,
    one_line,
    redact,
    text_of,
    time_of,
    token_of,
    word_of,
)

QUEUED = "task_queue"
#: characters of a log that an error message quotes
LOG_TAIL = 600
#: outputs of a task, and characters of an output's file name
MAX_OUTPUTS, MAX_NAME = 1000, 300
#: a step number above this is not one
MAX_STEPS = 10**9


@dataclass(frozen=True)
class Status:
    """One row of the table of task states.

    Attributes:
        rank: order of the status, for display only: polling skips statuses.
        phase: the status for people, and for the page.
        fraction: where a progress bar stands while nothing better is known, 0..1.
        is_terminal: whether the task has ended.
    """

    rank: int
    phase: str
    fraction: float
    is_terminal: bool = False


#: every status the service documents; sampling, which takes nearly all of a run, has the bar from
#: "task_start" to "task_output_full", and the model's own reports move it there
STATUSES: Mapping[str, Status] = {
    QUEUED: Status(0, "queued", 0.0),
    "task_accept": Status(1, "preparing", 0.02),
    "task_preprocess_start": Status(2, "preparing", 0.03),
    "task_preprocess_end": Status(3, "preparing", 0.04),
    "task_assign": Status(4, "preparing", 0.05),
    "task_start": Status(5, "running", 0.06),
    "task_output": Status(6, "running", 0.06),
    "task_error": Status(6, "running", 0.06),
    "task_output_full": Status(7, "running", 0.92),
    "task_error_full": Status(7, "running", 0.92),
    "task_end": Status(8, "finishing", 0.93),
    "task_postprocess_start": Status(9, "finishing", 0.95),
    "task_postprocess_end": Status(10, "ended", 0.97, is_terminal=True),
    "task_cancel": Status(10, "ended", 0.97, is_terminal=True),
}
#: of a status that this client does not know
UNKNOWN = Status(-1, "unknown", 0.0)


class Verdict(Enum):
    """How a task ended, by its record."""

    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    #: exit code 0 and no file: the record may lag behind, or the files were deleted
    NO_OUTPUT = "no_output"


@dataclass(frozen=True)
class Output:
    """One file of a result, or a text.

    Attributes:
        name: as the service sends it; not to be trusted as a path.
        contenttype: MIME type, or "raw" for a text.
        url: "" for a text.
        num_bytes: None if unknown.
        content: of a text.
    """

    name: str
    contenttype: str
    url: str
    num_bytes: int | None
    content: str


@dataclass(frozen=True)
class Task:
    """One record of Task/Detail or Task/List. Times are Unix seconds, or None.

    Attributes:
        taskid: digits, or "".
        token: lets anyone watch the task; never shown.
        status: a key of `STATUSES`, or one that this client does not know.
        exit_code: "0" for success, "" before the end.
        parameters: as the service stored them, files as URLs.
        outputs: files and texts.
        output_log: standard output of the model.
        error_log: standard error of the model.
        elapsed_s: billed seconds.
        totalcost: US dollars.
        starttime: start of the model.
        endtime: end of the model.
        postprocessendtime: end of the task.
        model: "owner/project", or "".
    """

    taskid: str
    token: str = field(repr=False)
    status: str
    exit_code: str
    parameters: Mapping[str, Any] = field(repr=False)
    outputs: tuple[Output, ...]
    output_log: str = field(repr=False)
    error_log: str = field(repr=False)
    elapsed_s: Decimal | None
    totalcost: Decimal | None
    starttime: int | None
    endtime: int | None
    postprocessendtime: int | None
    model: str

    @property
    def is_terminal(self) -> bool:
        """Whether the record will not change any more."""
        return verdict(self) is not Verdict.RUNNING

    @property
    def rank(self) -> int:
        """How far it is, 0 (queued) to 10 (ended); -1 for an unknown status."""
        return STATUSES.get(self.status, UNKNOWN).rank

    @property
    def phase(self) -> str:
        """How far it is, in a word; the service's own word for an unknown status."""
        return phase_of(self.status)


@dataclass(frozen=True)
class Progress:
    """One report of a running model; None means not reported.

    Attributes:
        fraction: 0..1.
        step: of `total_steps`.
        total_steps: sampling steps in all.
        speed: with its unit, "1.2 it/s".
        remaining: time left, as the service words it.
    """

    fraction: float | None
    step: int | None
    total_steps: int | None
    speed: str
    remaining: str

    def __str__(self) -> str:
        parts = [
            f"step {self.step}/{self.total_steps or '?'}" if self.step is not None else "",
            f"{100 * self.fraction:.0f} %" if self.fraction is not None else "",
            self.speed,
            f"{self.remaining} left" if self.remaining else "",
        ]
        return " · ".join(part for part in parts if part)


# --- what a record means ------------------------------------------------------------------------


def verdict(task: Task) -> Verdict:
    """Judge a record, in this order: cancelled, ended by exit code and files, else running."""
    if task.status == "task_cancel":
        return Verdict.CANCELLED
    ended_unknown = (
        task.status not in STATUSES and task.exit_code != "" and bool(task.postprocessendtime)
    )
    if task.status != "task_postprocess_end" and not ended_unknown:
        return Verdict.RUNNING
    has_output = any(o.url or o.contenttype == "raw" for o in task.outputs)
    if task.exit_code == "0":
        return Verdict.SUCCEEDED if has_output else Verdict.NO_OUTPUT
    if task.exit_code == "" and has_output:
        return Verdict.SUCCEEDED
    return Verdict.FAILED


def may_lag(task: Task) -> bool:
    """Whether an ended record names neither a file nor an error: it may be incomplete."""
    judged = verdict(task)
    return judged is Verdict.NO_OUTPUT or (judged is Verdict.FAILED and task.exit_code == "")


def phase_of(status: str) -> str:
    """The phase of a status; an unknown status is its own phase."""
    return STATUSES[status].phase if status in STATUSES else status or UNKNOWN.phase


def fraction_of(task: Task, report: Progress | None) -> float:
    """Where a progress bar stands, 0..1: by the model's report while it runs, else by status."""
    start, end = STATUSES["task_start"], STATUSES["task_output_full"]
    if report is None or task.rank > end.rank:
        return STATUSES.get(task.status, UNKNOWN).fraction
    return start.fraction + (report.fraction or 0.0) * (end.fraction - start.fraction)


def log_tail(task: Task, length: int = LOG_TAIL) -> str:
    """The end of a task's log in one line, without secrets."""
    text = redact((task.error_log or task.output_log).strip(), [task.token])
    return one_line(text)[-length:]


def failure_text(task: Task) -> str:
    """One sentence on a task that did not succeed, with the end of its log."""
    log = log_tail(task)
    tail = f": {log}" if log else " and left no log"
    code = task.exit_code or "none"
    return f"Task {task.taskid} failed on Wiro with exit code {code}{tail}"


# --- parsing ------------------------------------------------------------------------------------


def parse_task(record: Mapping[str, Any]) -> Task:
    """Parse one record; missing or oddly typed fields become empty."""
    outputs = list_of(record.get("outputs") or record.get("output"))
    owner, project = (word_of(record.get(f"modelslug{part}")) for part in ("owner", "project"))
    return Task(
        taskid=id_of(record.get("id") or record.get("taskid")),
        token=token_of(record.get("socketaccesstoken")),
        status=word_of(record.get("status")),
        exit_code=word_of(record.get("pexit")),
        parameters=mapping_of(record.get("parameters")),
        outputs=tuple(_parse_output(o) for o in outputs[:MAX_OUTPUTS] if isinstance(o, Mapping)),
        output_log=text_of(record.get("debugoutput")),
        error_log=text_of(record.get("debugerror")),
        elapsed_s=amount_of(record.get("elapsedseconds")),
        totalcost=amount_of(record.get("totalcost")),
        starttime=time_of(record.get("starttime")),
        endtime=time_of(record.get("endtime")),
        postprocessendtime=time_of(record.get("postprocessendtime")),
        model=f"{owner}/{project}" if owner and project else "",
    )


def _parse_output(record: Mapping[str, Any]) -> Output:
    url, size = text_of(record.get("url")), int_of(record.get("size")) or 0
    return Output(
        # the end of a name holds its suffix
        name=re.sub(r"[^\S ]", "_", text_of(record.get("name")).strip())[-MAX_NAME:],
        contenttype=word_of(record.get("contenttype")),
        url=url if len(url) <= MAX_URL else "",
        num_bytes=size if size > 0 else None,
        content=text_of(record.get("content")),
    )


def parse_progress(message: object) -> Progress | None:
    """Parse the message of a "task_output" frame.

    Args:
        message: an object, or JSON inside a string: the service sends both.

    Returns:
        The report, or None if the message is a log line.
    """
    report = mapping_of(message)
    step, total = (_step_of(report.get(name)) for name in ("stepCurrent", "stepTotal"))
    percentage = decimal_of(report.get("percentage"))
    fraction: float | None = None
    if percentage is not None:
        fraction = float(min(max(percentage, Decimal(0)), Decimal(100)) / 100)
    elif step is not None and total:
        fraction = min(max(step / total, 0.0), 1.0)
    if fraction is None and step is None:
        return None
    speed = word_of(report.get("speed"))
    if speed and report.get("speedType"):
        speed = f"{speed} {word_of(report.get('speedType'))}"
    return Progress(fraction, step, total, speed, word_of(report.get("remainingTime")))


def _step_of(value: object) -> int | None:
    number = int_of(value)
    return number if number is not None and 0 <= number <= MAX_STEPS else None
