"""A receipt beside the files of a task: what was asked for, what it cost, what came.

It holds no key, no token and no address: whoever is sent the folder learns nothing that opens the
account or its files. The paid files themselves are never touched.
"""

import hashlib
import json
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .files import safe_name
from .parts import write_whole
from .task import Task, verdict
from .transport import noop
from .wire import dollars, redact

logger = logging.getLogger("wiro_api.receipts")

#: of this package, as pyproject.toml says
VERSION = "0.1.0"
SUFFIX = ".receipt.json"
#: first field of a receipt, by which it is known as one of ours
MARK = "wiro_receipt"
#: no receipt of ours is larger
MAX_BYTES = 2 * 1024**2
CHUNK_BYTES = 1024**2
#: names that are tried before it is given up
MAX_NAMES = 100
ADDRESS = "(address)"
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,31}://[^\s\"'<>,\\]*|\bdata:[^\s\"'<>\\]*")
#: fields that hold what opens something, or where it goes; letters and digits only
_SECRET_NAMES = re.compile(
    r"apikey|apisecret|accesskey|secretkey|password|authorization|signature|nonce|callback|webhook"
    r"|projectid|^token$|(access|auth|bearer|refresh|session|socket|task)token$"
)
#: deeper values are left out
MAX_DEPTH = 20


def write_receipt(
    task: Task,
    paths: Sequence[Path],
    asked: Mapping[str, Any] | None = None,
    *,
    secrets: Sequence[str] = (),
    check: Callable[[], None] = noop,
) -> Path | None:
    """Write the receipt of a task beside its first file, or write its earlier one anew.

    Args:
        task: its record.
        paths: of its files that are here.
        asked: model, parameters and take of the run; without it, what the record says.
        secrets: that no text of it may hold, besides the task's token.
        check: called while files are read; may raise to stop.

    Returns:
        Its path, or None if it cannot be written, which is logged.
    """
    if not paths:
        return None
    known = (*secrets, task.token)
    try:
        content = json.dumps(
            _describe(task, paths, asked, known, check),
            indent=2,
            ensure_ascii=False,
            allow_nan=False,
        )
        target = _place(task, paths)
        write_whole(target, content + "\n")
    except (OSError, ValueError) as error:
        logger.warning("The receipt of task %s cannot be written: %s.", task.taskid, error)
        return None
    return target


def shown(value: object, secrets: Sequence[str] = (), depth: int = 0) -> Any:
    """Parameters as a receipt may hold them: without addresses, secrets, and where results go."""
    if depth > MAX_DEPTH:
        return None
    if isinstance(value, Mapping):
        return {
            redact(str(name), secrets): shown(inner, secrets, depth + 1)
            for name, inner in value.items()
            if not _SECRET_NAMES.search(re.sub(r"[^a-z0-9]", "", str(name).lower()))
        }
    if isinstance(value, list | tuple):
        return [shown(inner, secrets, depth + 1) for inner in value]
    if isinstance(value, str):
        return _ADDRESS.sub(ADDRESS, redact(value, secrets))
    if isinstance(value, float) and math.isfinite(value):
        return value
    return value if value is None or isinstance(value, bool | int) else str(value)


def _describe(
    task: Task,
    paths: Sequence[Path],
    asked: Mapping[str, Any] | None,
    secrets: Sequence[str],
    check: Callable[[], None],
) -> dict[str, Any]:
    given = asked or {"model": task.model, "parameters": task.parameters}
    here = {path.name for path in paths}
    names = [safe_name(output) for output in task.outputs if output.url]
    missing = names[len(here) :] if len(names) > len(here) else []
    return {
        MARK: 1,
        "backend": "wiro",
        "taskid": task.taskid,
        **shown(given, secrets),
        "status": task.status,
        "verdict": verdict(task).value,
        "cost_usd": dollars(task.totalcost),
        "elapsed_s": None if task.elapsed_s is None else float(task.elapsed_s),
        "started": _time(task.starttime),
        "ended": _time(task.endtime),
        "files": [
            {"name": path.name, "num_bytes": path.stat().st_size, "sha256": _sha256(path, check)}
            for path in paths
        ],
        **({"num_missing": len(missing)} if missing else {}),
        "package": f"skyreels-wiro {VERSION}",
    }


def _time(seconds: int | None) -> str | None:
    """The service's clock, in UTC; None for an invalid time."""
    try:
        moment = None if seconds is None else datetime.fromtimestamp(seconds, timezone.utc)
    except (ValueError, OverflowError, OSError):
        return None
    return None if moment is None else moment.isoformat().replace("+00:00", "Z")


def _sha256(path: Path, check: Callable[[], None]) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(CHUNK_BYTES):
            check()
            digest.update(piece)
    return digest.hexdigest()


def _place(task: Task, paths: Sequence[Path]) -> Path:
    """Where it goes: over the task's own receipt, else to a name that nobody has taken.

    Returns:
        Its path; a new one is made, empty.

    Raises:
        FileExistsError: all names are taken.
        OSError: the folder cannot be written.
    """
    own = {path.absolute() for path in paths}  # what is paid for, whatever is in it
    for path in paths:  # the first file of an earlier receipt may have been another one
        place = path.with_name(path.stem + SUFFIX)
        if place.absolute() not in own and _is_of(place, task.taskid):
            return place
    first = paths[0]
    for number in range(MAX_NAMES):
        mark = f" ({number})" if number else ""
        place = first.with_name(f"{first.stem}{mark}{SUFFIX}")
        if place.absolute() in own:
            continue
        if _is_of(place, task.taskid):
            return place
        try:
            place.open("xb").close()  # taken at once: others look for names too
            return place
        except FileExistsError:
            continue
    raise FileExistsError(f"{MAX_NAMES} names beginning with {first.stem} are taken")


def _is_of(place: Path, taskid: str) -> bool:
    """Whether a file is a receipt that this package wrote for a task."""
    try:
        if place.is_symlink() or not place.is_file() or place.stat().st_size > MAX_BYTES:
            return False
        stored = json.loads(place.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    is_receipt = isinstance(stored, dict) and next(iter(stored), "") == MARK
    return is_receipt and stored.get("taskid") == taskid
