"""What the service says of a task, and what it means. No I/O here.

The wire is loosely typed: numbers come as strings, lists as text, keys are missing. Parsing never
fails on that; it keeps the raw record beside what it understood.

Nor is it trusted. `read_json` is the one place where bytes become objects, for answers, for frames
of the socket and for JSON inside texts: what leaves it can be encoded, holds no character that
steers a terminal, and is bounded in depth and number.

A task has ended in two states only, "task_postprocess_end" (success or failure: the exit code
tells) and "task_cancel". "task_end" is not the end, and "task_error" is a line of its log.
"""

import json
import math
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
#: of a log, how much an error message quotes, and how much of its end is kept at all
LOG_TAIL, LOG_KEPT = 600, 256 * 1024
_LOGS = ("debugoutput", "debugerror")
#: of an answer: objects and lists in it (an empty one takes 20 times its text), and their depth
MAX_GROUPS, MAX_DEPTH = 200_000, 32
#: letters of a name or a state, of a file's name, of an address, and of a key in an object
WORD, NAME, ADDRESS, KEY = 100, 300, 8192, 200
MAX_OUTPUTS = 1000
#: a step beyond this is none
MAX_STEPS = 10**9

#: C0 without tab and newline, DEL, C1, and halves of letters that no encoding takes
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
#: turns the direction of what follows, so that it reads as something else
_DIRECTION = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_TOKEN = re.compile(r"[!-~]{1,512}")

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
    """The end of a task's log in one line, without secrets."""
    text = redact((task.error_log or task.output_log).strip(), [task.token])
    return one_line(text)[-length:]


def failure_text(task: Task) -> str:
    """One sentence on a task that did not succeed, with the end of its log."""
    log = log_tail(task)
    tail = f": {log}" if log else " and left no log"
    code = task.exit_code or "none"
    return f"Task {task.taskid} failed on Wiro with exit code {code}{tail}"


# --- cleaning -----------------------------------------------------------------------------------


def read_json(data: bytes | str) -> object:
    """The value of a JSON text of the service, cleaned.

    Bytes that are no UTF-8 are replaced, and bare control characters. NaN, infinities and numbers
    as long as a book are None, as is what lies deeper than any record. Of a log its end is kept.

    Raises:
        ValueError: it is no JSON, or holds more objects and lists than any answer.
    """
    text = data if isinstance(data, str) else data.decode("utf-8", "replace")
    if text.count("{") + text.count("[") > MAX_GROUPS:
        raise ValueError("too many values")
    try:
        value = json.loads(
            text.removeprefix("\ufeff"), parse_int=_int_or_none, parse_float=_float_or_none,
            parse_constant=lambda _: None, strict=False,
        )  # fmt: skip
    except RecursionError:
        raise ValueError("too deep") from None
    return _clean(value, 0)


def _int_or_none(text: str) -> int | None:
    return int(text) if len(text) <= LONGEST_NUMBER else None


def _float_or_none(text: str) -> float | None:
    number = float(text) if len(text) <= 2 * LONGEST_NUMBER else math.inf
    return number if math.isfinite(number) else None


def _clean(value: Any, depth: int) -> Any:
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, dict | list) and depth == MAX_DEPTH:
        return None
    if isinstance(value, list):
        return [_clean(each, depth + 1) for each in value]
    if isinstance(value, dict):
        return {
            clean_text(key[:KEY]): _clean(
                each[-LOG_KEPT:] if key in _LOGS and isinstance(each, str) else each, depth + 1
            )
            for key, each in value.items()
        }
    return value


def clean_text(text: str) -> str:
    """A text that any encoding takes and no terminal obeys.

    Control characters and halves of letters become U+FFFD, so that nothing grows together where
    they stood; a carriage return is the end of a line.
    """
    if text.isascii() and text.isprintable():
        return text
    text = _DIRECTION.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    return _CONTROL.sub("\ufffd", text)


def one_line(text: str) -> str:
    """The same without line ends and runs of blanks."""
    return " ".join(text.split())


# --- parsing ------------------------------------------------------------------------------------


def parse_task(record: Mapping[str, Any]) -> Task:
    """A Task of one record; missing or oddly typed fields become empty."""
    outputs = _as_list(record.get("outputs") or record.get("output"))
    owner, project = (word_of(record.get(f"modelslug{part}")) for part in ("owner", "project"))
    return Task(
        taskid=id_of(record.get("id") or record.get("taskid")),
        token=token_of(record.get("socketaccesstoken")),
        status=word_of(record.get("status")),
        exit_code=word_of(record.get("pexit")),
        parameters=_as_mapping(record.get("parameters")),
        outputs=tuple(_parse_output(o) for o in outputs[:MAX_OUTPUTS] if isinstance(o, Mapping)),
        output_log=text_of(record.get("debugoutput")),
        error_log=text_of(record.get("debugerror")),
        elapsed_s=_amount_of(record.get("elapsedseconds")),
        totalcost=_amount_of(record.get("totalcost")),
        cps=_amount_of(record.get("cps")),
        createtime=time_of(record.get("createtime")),
        starttime=time_of(record.get("starttime")),
        endtime=time_of(record.get("endtime")),
        postprocessendtime=time_of(record.get("postprocessendtime")),
        model=f"{owner}/{project}" if owner and project else "",
        callbackurl=text_of(record.get("callbackurl"))[:ADDRESS],
        raw=record,
    )


def _parse_output(record: Mapping[str, Any]) -> Output:
    url, size = text_of(record.get("url")), int_of(record.get("size")) or 0
    return Output(
        # the end of a name holds its suffix
        name=re.sub(r"[^\S ]", "_", text_of(record.get("name")).strip())[-NAME:],
        contenttype=word_of(record.get("contenttype")),
        url=url if len(url) <= ADDRESS else "",
        num_bytes=size if size > 0 else None,
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
    step, total = (_step_of(message.get(name)) for name in ("stepCurrent", "stepTotal"))
    percentage = decimal_of(message.get("percentage"))
    fraction: float | None = None
    if percentage is not None:
        fraction = float(min(max(percentage, Decimal(0)), Decimal(100)) / 100)
    elif step is not None and total:
        fraction = min(max(step / total, 0.0), 1.0)
    if fraction is None and step is None:
        return None
    speed = word_of(message.get("speed"))
    if speed and message.get("speedType"):
        speed = f"{speed} {word_of(message.get('speedType'))}"
    return Progress(fraction, step, total, speed, word_of(message.get("remainingTime")))


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
    """Whether two parameter values are equal as text or as numbers, of which one may be cleaned."""
    first_text, second_text = (clean_text(str(value)).strip().lower() for value in (one, other))
    if first_text == second_text:
        return True
    first, second = decimal_of(one), decimal_of(other)
    return first is not None and first == second


def text_of(value: object) -> str:
    """A scalar as text; None and anything with structure as ""."""
    if isinstance(value, bool) or value is None or isinstance(value, Mapping | list):
        return ""
    return str(value)


def word_of(value: object) -> str:
    """A scalar as a short text of one line."""
    return one_line(text_of(value)[: 10 * WORD])[:WORD]


def id_of(value: object) -> str:
    """The id of a task or a file: letters, digits, "_" and "-"; "" for anything else."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = text_of(value).strip()
    return text if _ID.fullmatch(text) else ""


def token_of(value: object) -> str:
    """A task token, or "" for what cannot be one."""
    text = text_of(value).strip()
    return text if _TOKEN.fullmatch(text) else ""


def int_of(value: object) -> int | None:
    """A whole number, or None."""
    number = decimal_of(value)
    return None if number is None else int(number)


def decimal_of(value: object) -> Decimal | None:
    """A finite number, or None; money is never a float on its way here."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    # a number as long as a book is no number, and would keep the processor busy
    if isinstance(value, int) and value.bit_length() > 4 * LONGEST_NUMBER:
        return None
    text = str(value).strip()
    try:
        number = Decimal(text if len(text) <= 2 * LONGEST_NUMBER else "NaN")
    except InvalidOperation:
        return None
    return number if number.is_finite() and abs(number.adjusted()) <= LONGEST_NUMBER else None


def _amount_of(value: object) -> Decimal | None:
    """Seconds or dollars of a record: a negative one would pay back what was spent."""
    number = decimal_of(value)
    return number if number is not None and number >= 0 else None


def _step_of(value: object) -> int | None:
    number = int_of(value)
    return number if number is not None and 0 <= number <= MAX_STEPS else None


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
        return read_json(text) if text.lstrip()[:1] in ("{", "[") else None
    except ValueError:
        return None
