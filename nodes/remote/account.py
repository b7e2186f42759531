"""What the remote nodes and the page share: the account, its limits, the journal, live tasks.

The key is in the environment or in a file of the user's folder under `__skyreels`, which ComfyUI's
routes do not serve, and nowhere else. Journal and limits lie there too, shared with the command
line, unless another folder is shared already (wiro_api/state.py).
"""

import contextlib
import json
import logging
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import host
from . import guard

if TYPE_CHECKING:
    from ...wiro_api.client import Client
    from ...wiro_api.journal import Entry, Journal

logger = logging.getLogger("skyreels.nodes.remote.account")

VIDEO_SUFFIXES = (".mp4", ".webm", ".mov", ".mkv")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif")
#: file of the page's other settings, and its only field
SETTINGS_NAME, COLLECT = "settings.json", "collect_at_start"
#: event of the page; its data is what `describe` makes
EVENT = "skyreels.wiro"
#: lines of a task's log that are kept for the page
LOG_LINES, LINE_LETTERS = 200, 500
#: tasks whose log is kept
KEPT_ROWS = 100
#: seconds between two events of one task
EVENT_EVERY_S = 0.25


@dataclass
class TaskState:
    """What is known of a task that a node of this server follows, beside its row."""

    fraction: float | None = None
    line: str = ""
    log: deque[str] = field(default_factory=lambda: deque(maxlen=LOG_LINES))
    told_at: float = 0.0
    #: why what was tried for it without being asked did not work
    error: str = ""
    #: the page that queued it
    client: str | None = None


#: row of the journal -> TaskState; how many nodes follow each
_states: dict[int, TaskState] = {}
_subscribers: dict[int, int] = {}
_lock = threading.Lock()
#: state folder of the host -> journal and limits; one entry but in tests
_shared: dict[Path, tuple[Path, Path]] = {}


# --- account ------------------------------------------------------------------------------------


def credentials_file() -> Path:
    """Where the settings panel keeps the key."""
    return host.state_folder() / "wiro.env"


def limits_file() -> Path:
    """Where the spending limits are kept."""
    return _shared_files()[1]


def journal() -> "Journal":
    """The journal of all programs of this user; sums are those of the key in use."""
    from ...wiro_api.errors import ConfigError
    from ...wiro_api.journal import Journal
    from ...wiro_api.signing import account_of, load_credentials

    try:
        key = account_of(load_credentials(file=credentials_file()))
    except (ConfigError, OSError, ValueError):  # no key, or a file that is none
        key = ""
    return Journal(_shared_files()[0], account=key)


def _shared_files() -> tuple[Path, Path]:
    """Journal and limits; found at the first use, and the same until the server ends."""
    from ...wiro_api import state
    from ...wiro_api.errors import ConfigError

    own = host.state_folder()
    with _lock:
        if own not in _shared:
            names = state.JOURNAL_NAME, state.LIMITS_NAME
            try:
                folder = state.share(own)
            except ConfigError as error:
                # a journal that cannot be read starts nothing, and says so each time
                logger.error("%s", error)
                folder, names = own, (state.HOST_JOURNAL_NAME, state.HOST_LIMITS_NAME)
            _shared[own] = folder / names[0], folder / names[1]
        return _shared[own]


def settings_file() -> Path:
    """Where the page's other settings are kept, beside the limits."""
    return limits_file().with_name(SETTINGS_NAME)


def collects_at_start() -> bool:
    """Whether tasks that ran while ComfyUI was away are brought home when it starts.

    Nobody is asked for a file that cannot be read: it counts as off, which is logged.
    """
    if not has_state():
        return False
    file = settings_file()
    try:
        stored = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        return stored.get(COLLECT) is True
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        logger.warning("%s cannot be read (%s): nothing is collected at start.", file.name, error)
        return False


def save_collects_at_start(is_on: bool) -> None:
    """Write that setting; the old file is replaced as a whole."""
    from ...wiro_api.parts import write_whole

    write_whole(settings_file(), json.dumps({COLLECT: is_on}))


def has_state() -> bool:
    """Whether there is a journal or limits: looking must neither make nor merge a file."""
    from ...wiro_api import state
    from ...wiro_api.errors import ConfigError

    own = host.state_folder()
    with _lock:
        if own in _shared:
            files = *_shared[own], _shared[own][1].with_name(SETTINGS_NAME)
            return any(file.exists() for file in files)
    folders = [own]
    with contextlib.suppress(ConfigError):  # no home: only the host's own
        folders += [state.state_folder(), state.user_folder()]
    names = (state.JOURNAL_NAME, state.LIMITS_NAME, state.HOST_JOURNAL_NAME, state.HOST_LIMITS_NAME,
             SETTINGS_NAME)  # fmt: skip
    return any((folder / name).exists() for folder in folders for name in names)


def check_socket_url() -> None:
    """Raise ConfigError if the socket's address is not allowed: before a run, not after."""
    from ...wiro_api.websocket import check_socket_url, socket_url

    if socket_url():
        check_socket_url(socket_url())


def task_folder(taskid: str) -> Path:
    """Where the files of a task go; the id comes from outside."""
    return host.output_folder() / "wiro" / (re.sub(r"\W", "_", taskid)[:40] or "task")


def place_of(path: Path) -> str:
    """A file of ours without what leads to the output folder."""
    try:
        return path.relative_to(host.output_folder()).as_posix()
    except ValueError:  # the output folder was another one then
        return path.name


def make_client(sleep: Callable[[float], None] = time.sleep) -> "Client":
    """A client of the environment's key, else of the one in the user's folder.

    Raises:
        ConfigError: there is no key; says where to put it.
    """
    from ...wiro_api.client import Client
    from ...wiro_api.errors import ConfigError
    from ...wiro_api.signing import load_credentials
    from ...wiro_api.transport import base_url
    from ...wiro_api.websocket import socket_url

    try:
        credentials = load_credentials(file=credentials_file())
    except ConfigError as error:
        raise ConfigError(f"{error} In ComfyUI: Settings > SkyReels > Wiro.") from None
    return Client(
        credentials,
        base_url=base_url(),
        socket_url=socket_url(),
        sleep=sleep,
        interruptible=True,
    )


def describe_account() -> dict[str, Any]:
    """What the page may know: whether there is a key and where from, limits; nothing of the key.

    Its last letters are what proves that somebody has it (guard.py), so nobody is told them.
    """
    from ...wiro_api.errors import ConfigError
    from ...wiro_api.signing import KEY_VARIABLE, load_credentials
    from ...wiro_api.spending import DEFAULT_LIMITS, Spent, load_limits, to_json
    from ...wiro_api.transport import base_url
    from ...wiro_api.wire import dollars

    problem, source = "", "none"
    has_text = bool(os.environ.get(KEY_VARIABLE, "").strip()) or credentials_file().is_file()
    try:
        load_credentials(file=credentials_file())
        source = "environment" if os.environ.get(KEY_VARIABLE, "").strip() else "file"
    except ConfigError as error:
        if has_text:
            problem = str(error)
    limits, spent = DEFAULT_LIMITS, Spent()
    try:
        if has_state():
            limits, spent = load_limits(limits_file()), journal().spent()
    except ConfigError as error:
        problem = str(error)
    return {
        "has_key": source != "none",
        "is_locked": guard.is_locked(),
        "is_shared": host.is_multi_user(),
        "has_default_limits": limits.is_default,
        "collect_at_start": collects_at_start(),
        "source": source,
        "service": base_url(),
        "limits": to_json(limits),
        "spent": {"day": dollars(spent.day), "month": dollars(spent.month)},
        "problem": problem,
    }


# --- live tasks ---------------------------------------------------------------------------------


def is_followed(row: int) -> bool:
    """Whether a node of this server follows a task."""
    return _subscribers.get(row, 0) > 0


def subscribe(row: int, *, by_prompt: bool = True) -> TaskState:
    """Say that a node of the running prompt, or else nobody's, follows a task from now on."""
    user = host.prompt_user() if by_prompt else ""
    if user:
        journal().note_user(row, user)
    with _lock:
        _subscribers[row] = _subscribers.get(row, 0) + 1
        live = _states.setdefault(row, TaskState())
        live.error = ""
        if by_prompt:
            live.client = host.prompt_client()
        return live


def add_log(live: TaskState, lines: list[str]) -> None:
    """Append lines of a task's log; the socket's thread and the node's both do."""
    with _lock:
        live.log.extend(line[:LINE_LETTERS] for line in lines[-LOG_LINES:])


def unsubscribe(row: int) -> None:
    """Say that it does not any more; the log is kept while the server runs."""
    with _lock:
        _subscribers[row] = _subscribers.get(row, 1) - 1
        if _subscribers[row] <= 0:
            del _subscribers[row]
            _states[row].fraction = None
        while len(_states) > KEPT_ROWS:  # the oldest that nobody follows
            idle = next((old for old in _states if old not in _subscribers), None)
            if idle is None:
                break
            del _states[idle]
    publish(row, always=True)


def publish(row: int, *, always: bool = False) -> None:
    """Send the page that queued it the state of a task, if it was not just sent."""
    live = _states.get(row)
    now = time.monotonic()
    if live is not None:
        if not always and now - live.told_at < EVENT_EVERY_S:
            return
        live.told_at = now
    entry = journal().get(row)
    if entry is not None:
        host.send_event(EVENT, describe(entry), None if live is None else live.client)


def describe(entry: "Entry") -> dict[str, Any]:
    """A row and what is live of it, as the page shows it; no token, no prompt, no full path."""
    from ...wiro_api.task import QUEUED, phase_of

    live = _states.get(entry.id, TaskState())
    with _lock:
        lines = list(live.log)
    return {
        "id": entry.id,
        "taskid": entry.taskid,
        "model": entry.model,
        "state": entry.state,
        "status": entry.status,
        "phase": phase_of(entry.status or QUEUED),
        "verdict": entry.verdict,
        "fraction": live.fraction,
        "line": live.line,
        "log": lines,
        "cost": entry.cost,
        "projected": entry.projected,
        "elapsed_s": entry.elapsed_s,
        "created_at": entry.created_at,
        "updated_at": entry.updated_at,
        "is_live": is_followed(entry.id),
        "error": entry.error or live.error,
        "files": [file for path in entry.files if (file := _describe_file(path)) is not None],
        "remote_deleted": entry.remote_deleted,
    }


def _describe_file(path: Path) -> dict[str, str] | None:
    """Where the page finds a file, or None if it is not (any more) in the output folder."""
    try:
        folder = path.parent.relative_to(host.output_folder())
    except ValueError:
        return None
    if not path.is_file():
        return None
    suffix = path.suffix.lower()
    kind = "other"
    if suffix in VIDEO_SUFFIXES:
        kind = "video"
    elif suffix in IMAGE_SUFFIXES:
        kind = "image"
    return {"filename": path.name, "subfolder": folder.as_posix(), "type": "output", "kind": kind}
