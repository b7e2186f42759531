"""State of the tasks that this server follows, beyond their journal rows, and the page's events."""

import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import host
from . import account

if TYPE_CHECKING:
    from ...wiro_api.journal import Entry

#: event of the page; its data is that of `describe`
EVENT = "skyreels.wiro"
#: log lines kept for each task, and characters of a line
LOG_LINES, LINE_LENGTH = 200, 500
#: tasks whose log is kept
MAX_TASKS = 100
#: seconds between two events of one task
EVENT_INTERVAL_S = 0.25

_VIDEO_SUFFIXES = (".mp4", ".webm", ".mov", ".mkv")
_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif")


@dataclass
class TaskState:
    """What is known of a task beyond its row, while this server follows it."""

    fraction: float | None = None
    line: str = ""
    log: deque[str] = field(default_factory=lambda: deque(maxlen=LOG_LINES))
    published_at: float = 0.0
    error: str = ""
    """Why an automatic download failed."""
    client: str | None = None
    """The page that queued it."""


_states: dict[int, TaskState] = {}
"""Row of the journal -> state."""
_subscribers: dict[int, int] = {}
"""Row of the journal -> how many nodes follow it."""
_lock = threading.Lock()


def is_followed(row: int) -> bool:
    """Whether a node of this server follows a task."""
    return _subscribers.get(row, 0) > 0


def subscribe(row: int, *, by_prompt: bool = True) -> TaskState:
    """Follow a task from now on.

    Args:
        row: of the journal.
        by_prompt: whether a node of the running prompt follows it; its user then owns the task.

    Returns:
        The task's state, shared by all who follow it.
    """
    user = host.prompt_user() if by_prompt else ""
    if user:
        account.journal().note_user(row, user)
    with _lock:
        _subscribers[row] = _subscribers.get(row, 0) + 1
        state = _states.setdefault(row, TaskState())
        state.error = ""
        if by_prompt:
            state.client = host.prompt_client()
        return state


def unsubscribe(row: int) -> None:
    """Stop following a task; its log is kept while the server runs."""
    with _lock:
        _subscribers[row] = _subscribers.get(row, 1) - 1
        if _subscribers[row] <= 0:
            del _subscribers[row]
            _states[row].fraction = None
        while len(_states) > MAX_TASKS:  # drop the oldest that nobody follows
            idle = next((old for old in _states if old not in _subscribers), None)
            if idle is None:
                break
            del _states[idle]
    publish(row, always=True)


def add_log(state: TaskState, lines: list[str]) -> None:
    """Append to a task's log; the socket's thread and the node's thread both do."""
    with _lock:
        state.log.extend(line[:LINE_LENGTH] for line in lines[-LOG_LINES:])


def publish(row: int, *, always: bool = False) -> None:
    """Send a task's state to the page that queued it, at most once per EVENT_INTERVAL_S."""
    state = _states.get(row)
    now = time.monotonic()
    if state is not None:
        if not always and now - state.published_at < EVENT_INTERVAL_S:
            return
        state.published_at = now
    entry = account.journal().get(row)
    if entry is not None:
        host.send_event(EVENT, describe(entry), None if state is None else state.client)


def describe(entry: "Entry") -> dict[str, Any]:
    """A row and its live state for the page; without token, prompt and full paths."""
    from ...wiro_api.task import QUEUED, phase_of

    state = _states.get(entry.id, TaskState())
    with _lock:
        lines = list(state.log)
    return {
        "id": entry.id,
        "taskid": entry.taskid,
        "model": entry.model,
        "state": entry.state,
        "status": entry.status,
        "phase": phase_of(entry.status or QUEUED),
        "verdict": entry.verdict,
        "fraction": state.fraction,
        "line": state.line,
        "log": lines,
        "cost": entry.cost,
        "projected": entry.projected,
        "elapsed_s": entry.elapsed_s,
        "created_at": entry.created_at,
        "updated_at": entry.updated_at,
        "is_live": is_followed(entry.id),
        "error": entry.error or state.error,
        "files": [file for path in entry.files if (file := _describe_file(path)) is not None],
        "remote_deleted": entry.remote_deleted,
    }


def _describe_file(path: Path) -> dict[str, str] | None:
    """Where the page finds a file; None if it is missing or outside the output folder."""
    try:
        folder = path.parent.relative_to(host.output_folder())
    except ValueError:
        return None
    if not path.is_file():
        return None
    suffix = path.suffix.lower()
    kind = "other"
    if suffix in _VIDEO_SUFFIXES:
        kind = "video"
    elif suffix in _IMAGE_SUFFIXES:
        kind = "image"
    return {"filename": path.name, "subfolder": folder.as_posix(), "type": "output", "kind": kind}
