"""What the service says of a task, and what it means. No I/O here.

The wire is loosely typed: numbers come as strings, lists as text, keys are missing. Parsing never
fails on that; it keeps the raw record beside what it understood.

A task has ended in two states only, "task_postprocess_end" (success or failure: the exit code
tells) and "task_cancel". "task_end" is not the end, and "task_error" is a line of its log.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from enum import Enum
from typing import Any

TERMINAL = ("task_postprocess_end", "task_cancel")
QUEUED = "task_queue"
#: how far a task is, for display only: polling skips states, and a bar must not move backwards
RANKS: Mapping[str, int] = {
    "task_queue": 0,
    "task_accept": 1,
    "task_preprocess_start": 2,
    "task_preprocess_end": 3,
    "task_assign": 4,
    "task_start": 5,
    "task_output": 6,
    "task_error": 6,
    "task_output_full": 7,
    "task_error_full": 7,
    "task_end": 8,
    "task_postprocess_start": 9,
    "task_postprocess_end": 10,
    "task_cancel": 10,
}
#: (up to this rank, what people call it)
PHASES = ((0, "queued"), (4, "preparing"), (7, "running"), (9, "finishing"), (10, "ended"))
LONGEST_NUMBER = 30
#: of a log, how much an error message quotes
LOG_TAIL = 600


_SECRET = re.compile(
    r"""((?:\\?["'])?(?:x-api-key|x-nonce|x-signature|socketaccesstoken|tasktoken|accesskey)"""
    r"""(?:\\?["'])?\s*[:=]\s*(?:\\?["'])?)[^\s"',}&\\]+""",
    re.IGNORECASE,
)


class Verdict(Enum):
    """What a task's record says about its end."""

    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    #: exit code 0 and no file: the record may lag behind, or the files were deleted
    NO_OUTPUT = "no_output"


@dataclass(frozen=True)
class Output:
    """One file of a result, or a text.

    name: as the service says; not to be trusted as a path. url: "" for texts (`content`).
    num_bytes: None if not told.
    """

    name: str
    contenttype: str
    url: str
    num_bytes: int | None
    content: str
    raw: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True)
class Task:
    """One record of Task/Detail or Task/List.

    token: lets anyone watch the task; never shown. parameters: as stored by the service, files as
    addresses. times are Unix seconds or None. totalcost, cps: US dollars.
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
    cps: Decimal | None
    createtime: int | None
    starttime: int | None
    endtime: int | None
    postprocessendtime: int | None
    model: str
    callbackurl: str = field(repr=False)
    raw: Mapping[str, Any] = field(repr=False)

    @property
    def is_terminal(self) -> bool:
        """Whether the record will not change any more."""
        return verdict(self) is not Verdict.RUNNING

    @property
    def rank(self) -> int:
        """How far it is, 0 (queued) to 10 (ended); -1 for a state this client does not know."""
        return RANKS.get(self.status, -1)

    @property
    def phase(self) -> str:
        """How far it is, in a word; the service's own for a state this client does not know."""
        if self.rank < 0:
            return self.status or "unknown"
        return next(word for last, word in PHASES if self.rank <= last)


@dataclass(frozen=True)
class Progress:
    """One report of a running model; None is not told.

    fraction: 0..1. speed: with its unit, "1.2 it/s". remaining: as the service words it.
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


def verdict(task: Task) -> Verdict:
    """Judge a record, in this order: cancelled, ended by exit code and files, else running."""
    if task.status == "task_cancel":
        return Verdict.CANCELLED
    ended_unknown = (
        task.status not in RANKS and task.exit_code != "" and bool(task.postprocessendtime)
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
    """Whether an ended record tells neither a file nor an error: it may not be whole yet."""
    judged = verdict(task)
    return judged is Verdict.NO_OUTPUT or (judged is Verdict.FAILED and task.exit_code == "")


def log_tail(task: Task, length: int = LOG_TAIL) -> str:
    """The end of a task's log, without secrets."""
    return redact((task.error_log or task.output_log).strip(), [task.token])[-length:]


def failure_text(task: Task) -> str:
    """One sentence on a task that did not succeed, with the end of its log."""
    log = log_tail(task)
    tail = f": {log}" if log else " and left no log"
    code = task.exit_code or "none"
    return f"Task {task.taskid} failed on Wiro with exit code {code}{tail}"


# --- parsing ------------------------------------------------------------------------------------


def parse_task(record: Mapping[str, Any]) -> Task:
    """A Task of one record; missing or oddly typed fields become empty."""
    outputs = _as_list(record.get("outputs") or record.get("output"))
    owner, project = record.get("modelslugowner"), record.get("modelslugproject")
    return Task(
        taskid=text_of(record.get("id") or record.get("taskid")),
        token=text_of(record.get("socketaccesstoken")),
        status=text_of(record.get("status")),
        exit_code=text_of(record.get("pexit")),
        parameters=_as_mapping(record.get("parameters")),
        outputs=tuple(_parse_output(o) for o in outputs if isinstance(o, Mapping)),
        output_log=text_of(record.get("debugoutput")),
        error_log=text_of(record.get("debugerror")),
        elapsed_s=decimal_of(record.get("elapsedseconds")),
        totalcost=decimal_of(record.get("totalcost")),
        cps=decimal_of(record.get("cps")),
        createtime=time_of(record.get("createtime")),
        starttime=time_of(record.get("starttime")),
        endtime=time_of(record.get("endtime")),
        postprocessendtime=time_of(record.get("postprocessendtime")),
        model=f"{owner}/{project}" if owner and project else "",
        callbackurl=text_of(record.get("callbackurl")),
        raw=record,
    )


def _parse_output(record: Mapping[str, Any]) -> Output:
    return Output(
        name=text_of(record.get("name")),
        contenttype=text_of(record.get("contenttype")),
        url=text_of(record.get("url")),
        num_bytes=int_of(record.get("size")) or None,
        content=text_of(record.get("content")),
        raw=record,
    )


def parse_progress(message: object) -> Progress | None:
    """The progress report in the message of a "task_output" frame, or None if it is a log line.

    The service sends it as an object, or as JSON inside a string.
    """
    if isinstance(message, str):
        message = _json_or_none(message)
    if not isinstance(message, Mapping):
        return None
    step, total = int_of(message.get("stepCurrent")), int_of(message.get("stepTotal"))
    percentage = decimal_of(message.get("percentage"))
    fraction: float | None = None
    if percentage is not None:
        fraction = float(min(max(percentage, Decimal(0)), Decimal(100)) / 100)
    elif step is not None and total:
        fraction = min(max(step / total, 0.0), 1.0)
    if fraction is None and step is None:
        return None
    speed = text_of(message.get("speed"))
    if speed and message.get("speedType"):
        speed = f"{speed} {text_of(message.get('speedType'))}"
    return Progress(fraction, step, total, speed, text_of(message.get("remainingTime")))


def redact(text: str, secrets: Sequence[str] = ()) -> str:
    """A text of the service without keys, signatures and tokens.

    Args:
        secrets: that are known, besides those a text names as such.
    """
    for secret in secrets:
        if len(secret) >= 4:  # a shorter one would hide words
            text = text.replace(secret, "...")
    return _SECRET.sub(r"\1...", text)


def same_value(one: object, other: object) -> bool:
    """Whether two parameter values are equal as text or as numbers."""
    if str(one).strip().lower() == str(other).strip().lower():
        return True
    first, second = decimal_of(one), decimal_of(other)
    return first is not None and first == second


def text_of(value: object) -> str:
    """A scalar as text; None and anything with structure as ""."""
    if isinstance(value, bool) or value is None or isinstance(value, Mapping | list):
        return ""
    return str(value)


def int_of(value: object) -> int | None:
    """A whole number, or None."""
    number = decimal_of(value)
    return None if number is None else int(number)


def decimal_of(value: object) -> Decimal | None:
    """A finite number, or None; money is never a float on its way here."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        number = Decimal(str(value).strip())
    except InvalidOperation:
        return None
    # a number as long as a book is no number, and would keep the processor busy
    return number if number.is_finite() and abs(number.adjusted()) <= LONGEST_NUMBER else None


def dollars(amount: Decimal | None) -> str | None:
    """An amount without the zeros at its end: "0.00351"."""
    return None if amount is None else f"{amount.normalize():f}"


def money(amount: Decimal) -> str:
    """An amount for people: "$0.30", "$0.00351"."""
    text = dollars(amount) or "0"
    whole, _, cents = text.partition(".")
    return f"${whole}.{cents:0<2}"


def time_of(value: object) -> int | None:
    """Unix seconds; 0 and empty mean not yet."""
    return int_of(value) or None


def bool_of(value: object) -> bool | None:
    """The service's many ways to say yes and no, or None."""
    if isinstance(value, bool):
        return value
    return {"1": True, "true": True, "0": False, "false": False}.get(str(value).strip().lower())


def _as_list(value: object) -> list[Any]:
    if isinstance(value, str):
        value = _json_or_none(value)
    return value if isinstance(value, list) else []


def _as_mapping(value: object) -> Mapping[str, Any]:
    if isinstance(value, str):
        value = _json_or_none(value)
    return value if isinstance(value, Mapping) else {}


def _json_or_none(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
