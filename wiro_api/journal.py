"""What was started and paid for, on disk, so that nothing is paid for twice.

One SQLite file, shared by every process of a user. A job is a model with its inputs, known by their
digest. Its row is written before the Run goes out and goes through

    intent     written down; the end of the Run has surely not left, so no task was made
    sending    the end is leaving, or has left; no answer yet
    started    the service named a task
    ended      the task has ended: verdict, cost, files
    refused    the service or the network said no; no task was made

So the same job after a crash goes on where it was: from "intent" it is sent, from "sending" its
task is looked up at the service and never sent again unasked, from "started" it is watched, and
from "ended" its files are there. Rows hold no key, no token and no prompt.
"""

import json
import logging
import os
import sqlite3
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

from .errors import ConfigError
from .spending import Limits, Price, Spent, check_limits
from .task import Task, Verdict, decimal_of, dollars, may_lag, verdict

logger = logging.getLogger(__name__)

#: seconds to wait for another process that is writing
BUSY_S = 10.0
_COLUMNS = ("id", "job", "owner", "model", "state", "taskid", "status", "verdict", "projected",
            "cost", "elapsed_s", "files", "remote_deleted", "error", "created_at", "sent_at",
            "updated_at")  # fmt: skip
_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    id INTEGER PRIMARY KEY,
    job TEXT NOT NULL, owner TEXT NOT NULL, model TEXT NOT NULL, state TEXT NOT NULL,
    taskid TEXT NOT NULL DEFAULT '', status TEXT NOT NULL DEFAULT '',
    verdict TEXT NOT NULL DEFAULT '', projected TEXT NOT NULL DEFAULT '',
    cost TEXT NOT NULL DEFAULT '',
    elapsed_s TEXT NOT NULL DEFAULT '', files TEXT NOT NULL DEFAULT '[]',
    remote_deleted INTEGER NOT NULL DEFAULT 0, error TEXT NOT NULL DEFAULT '',
    created_at REAL NOT NULL, sent_at REAL, updated_at REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS jobs_by_job ON jobs (job, id);
"""


@dataclass(frozen=True)
class Entry:
    """One row.

    projected, cost: US dollars, before and after the run. files: paths of what was downloaded.
    remote_deleted: whether its files were removed from the service. Times are Unix seconds.
    """

    id: int
    job: str
    owner: str
    model: str
    state: str
    taskid: str
    status: str
    verdict: str
    projected: str
    cost: str
    elapsed_s: str
    files: tuple[Path, ...]
    remote_deleted: bool
    error: str
    created_at: float
    sent_at: float | None
    updated_at: float


class LostEntryError(Exception):
    """Another process has taken the job over."""


def default_path() -> Path:
    """Where the command line keeps its journal: the user's folder for program state.

    Raises:
        ConfigError: this user has no folder, as in some containers.
    """
    variable, below = "XDG_STATE_HOME", Path(".local", "state")
    if sys.platform == "win32":
        variable, below = "LOCALAPPDATA", Path("AppData", "Local")
    try:
        root = Path(os.environ.get(variable) or Path.home() / below)
    except RuntimeError:
        raise ConfigError(
            f"This user has no home folder, where what is started is noted: set {variable}, or "
            "name a file with --journal."
        ) from None
    return root / "skyreels-wiro" / "journal.sqlite"


class Journal:
    """The file; opened for each access, so that threads and processes may share it.

    Args:
        path: made with its folder if it is not there, for its owner only.
        now: Unix seconds.
    """

    def __init__(self, path: Path, *, now: Callable[[], float] = time.time) -> None:
        self.path = path
        self._now = now

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A transaction that is written as a whole, or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
        connection = sqlite3.connect(self.path, timeout=BUSY_S, isolation_level=None)
        try:
            connection.execute("PRAGMA synchronous = FULL")
            connection.executescript(_SCHEMA)
            connection.execute("BEGIN IMMEDIATE")
            yield connection
            connection.execute("COMMIT")
        finally:
            connection.close()

    def begin(self, job: str, model: str, *, again: bool = False) -> Entry:
        """The row of a job that is under way or done, else a new one of ours in "intent".

        Args:
            again: make a new one in any case.
        Raises:
            ConfigError: the journal cannot be read or written; without it nothing may be started.
        """
        owner = uuid.uuid4().hex
        try:
            with self._open() as connection:
                found = None if again else _newest(connection, job)
                if found is not None and found.state == "intent":
                    # of a process that died, or one that has not sent yet and will notice
                    connection.execute(
                        "UPDATE jobs SET owner = ?, updated_at = ? WHERE id = ?",
                        (owner, self._now(), found.id),
                    )
                    return replace(found, owner=owner)
                if found is not None and not _may_start_again(found):
                    return found
                cursor = connection.execute(
                    "INSERT INTO jobs (job, owner, model, state, created_at, updated_at) "
                    "VALUES (?, ?, ?, 'intent', ?, ?)",
                    (job, owner, model, self._now(), self._now()),
                )
                made = _get(connection, int(cursor.lastrowid or 0))
                assert made is not None
                return made
        except (sqlite3.Error, OSError) as error:
            raise ConfigError(
                f"The journal {self.path} cannot be used ({error}), and nothing is started without "
                "it: a crash could make you pay twice. Move the file away, or make room. Tasks "
                "that were started before are not lost: list and collect them by their ids."
            ) from None

    def sending(
        self,
        entry: Entry,
        model: str = "",
        price: Price | None = None,
        limits: Limits | None = None,
    ) -> None:
        """Note that the end of the Run leaves now, and reserve its price.

        Raises:
            LostEntryError: another process has taken the job over; do not send.
            LimitError: with what others reserved meanwhile it would pass a limit; do not send.
            ConfigError: it cannot be written; do not send.
        """
        try:
            with self._open() as connection:
                check_limits(limits or Limits(), price, self._spent(connection, entry.id), model)
                cursor = connection.execute(
                    "UPDATE jobs SET state = 'sending', projected = ?, sent_at = ?, updated_at = ? "
                    "WHERE id = ? AND owner = ? AND state IN ('intent', 'sending')",
                    ("" if price is None else dollars(price.amount), self._now(), self._now(),
                     entry.id, entry.owner),
                )  # fmt: skip
                if cursor.rowcount != 1:
                    raise LostEntryError
        except (sqlite3.Error, OSError) as error:
            raise ConfigError(
                f"The journal {self.path} cannot be written ({error}): make room, or move it away."
            ) from None

    def spent(self, but: int = 0) -> Spent:
        """Of this day and this month, leaving out one row.

        Raises:
            ConfigError: it cannot be read, so limits cannot be checked.
        """
        try:
            with self._open() as connection:
                return self._spent(connection, but)
        except (sqlite3.Error, OSError) as error:
            raise ConfigError(
                f"The journal {self.path} cannot be read ({error}), so what was spent is not "
                "known: move the file away."
            ) from None

    def _spent(self, connection: sqlite3.Connection, but: int = 0) -> Spent:
        today = datetime.fromtimestamp(self._now()).replace(
            hour=0, minute=0, second=0, microsecond=0
        )
        month = today.replace(day=1)
        day_sum = month_sum = Decimal(0)
        rows = connection.execute(
            "SELECT sent_at, state, verdict, projected, cost FROM jobs "
            "WHERE sent_at >= ? AND id != ? AND state IN ('sending', 'started', 'ended')",
            (month.timestamp(), but),
        )
        free = (Verdict.FAILED.value, Verdict.CANCELLED.value)  # unless the service tells a cost
        for sent_at, state, judged, projected, cost in rows:
            is_free = state == "ended" and judged in free
            amount = decimal_of(cost or ("" if is_free else projected)) or Decimal(0)
            month_sum += amount
            day_sum += amount if sent_at >= today.timestamp() else Decimal(0)
        return Spent(day_sum, month_sum)

    def costs(self, model: str, limit: int = 10) -> list[Decimal]:
        """What the newest successful runs of a model did cost."""
        done = (e for e in self.newest(1000) if e.model.lower() == model.lower())
        costs = (decimal_of(e.cost) for e in done if e.verdict == Verdict.SUCCEEDED.value)
        return [cost for cost in costs if cost is not None][:limit]

    def adopt(self, taskid: str, model: str) -> Entry | None:
        """The row of a task, made if a task has none; None if that fails, which is logged."""
        try:
            with self._open() as connection:
                row = connection.execute(
                    f"SELECT {', '.join(_COLUMNS)} FROM jobs WHERE taskid = ? ORDER BY id DESC",
                    (taskid,),
                ).fetchone()
                if row is not None:
                    return _to_entry(row)
                cursor = connection.execute(
                    "INSERT INTO jobs (job, owner, model, state, taskid, created_at, updated_at) "
                    "VALUES (?, '', ?, 'started', ?, ?, ?)",
                    (f"task {taskid}", model, taskid, self._now(), self._now()),
                )
                return _get(connection, int(cursor.lastrowid or 0))
        except (sqlite3.Error, OSError) as error:
            logger.warning("The journal %s could not be written: %s.", self.path, error)
            return None

    def started(self, entry_id: int, taskid: str) -> None:
        """Note the task that the service named."""
        self._note(entry_id, state="started", taskid=taskid)

    def waiting(self, entry: Entry) -> bool:
        """Note that the service had no place for it and made no task; it will be sent again.

        Returns:
            False if another process has taken the job over.
        """
        return self._note(entry.id, owner=entry.owner, state="intent")

    def refused(self, entry: Entry, reason: str) -> bool:
        """Note that no task was made; False if another process has taken the job over."""
        return self._note(entry.id, owner=entry.owner, state="refused", error=reason)

    def seen(self, entry_id: int, status: str) -> None:
        """Note the state of a running task."""
        self._note(entry_id, status=status)

    def ended(self, entry_id: int, task: Task, files: Sequence[Path] = ()) -> None:
        """Note the end of a task, its cost and its files."""
        self._note(
            entry_id, state="ended", taskid=task.taskid, status=task.status,
            # a record that tells nothing of its end is not run again unasked
            verdict=(Verdict.NO_OUTPUT if may_lag(task) else verdict(task)).value,
            cost=dollars(task.totalcost) or "",
            elapsed_s="" if task.elapsed_s is None else str(task.elapsed_s),
            files=json.dumps([str(path.absolute()) for path in files]),
        )  # fmt: skip

    def remote_deleted(self, entry_id: int) -> None:
        """Note that the service holds no files of it any more."""
        self._note(entry_id, remote_deleted=1)

    def get(self, entry_id: int) -> Entry | None:
        """One row, or None if it is not there or cannot be read, which is logged."""
        try:
            with self._open() as connection:
                return _get(connection, entry_id)
        except (sqlite3.Error, OSError) as error:
            logger.warning("The journal %s could not be read: %s.", self.path, error)
            return None

    def _note(self, entry_id: int, owner: str = "", **values: str | int | None) -> bool:
        """Write what is known; a failure is told and costs nothing that was paid for.

        Args:
            owner: write only if the row is still this one's, and no task was named yet.
        Returns:
            Whether the row was there, and the owner's.
        """
        columns = ", ".join(f"{name} = ?" for name in (*values, "updated_at"))
        condition, arguments = "id = ?", [str(entry_id)]
        if owner:
            condition, arguments = "id = ? AND owner = ? AND taskid = ''", [str(entry_id), owner]
        try:
            with self._open() as connection:
                cursor = connection.execute(
                    f"UPDATE jobs SET {columns} WHERE {condition}",
                    (*values.values(), self._now(), *arguments),
                )
                return cursor.rowcount == 1
        except (sqlite3.Error, OSError) as error:
            logger.warning("The journal %s could not be written: %s.", self.path, error)
            return True

    def newest(self, limit: int = 100) -> list[Entry]:
        """The newest rows, newest first; empty if the journal cannot be read, which is logged."""
        try:
            with self._open() as connection:
                rows = connection.execute(
                    f"SELECT {', '.join(_COLUMNS)} FROM jobs ORDER BY id DESC LIMIT ?", (limit,)
                ).fetchall()
        except (sqlite3.Error, OSError) as error:
            logger.warning("The journal %s could not be read: %s.", self.path, error)
            return []
        return [_to_entry(row) for row in rows]

    def known_taskids(self, but: int = 0) -> frozenset[str]:
        """The tasks that belong to other rows: none of them is the task of this row's lost Run."""
        rows = self.newest(1000)
        return frozenset(entry.taskid for entry in rows if entry.taskid and entry.id != but)


def _may_start_again(entry: Entry) -> bool:
    """Whether a new Run of the job pays for nothing that is paid for or on its way.

    A task that ended well without a file was paid for: that one is not run again unasked.
    """
    failed = (Verdict.FAILED.value, Verdict.CANCELLED.value)
    return entry.state == "refused" or (entry.state == "ended" and entry.verdict in failed)


def _newest(connection: sqlite3.Connection, job: str) -> Entry | None:
    row = connection.execute(
        f"SELECT {', '.join(_COLUMNS)} FROM jobs WHERE job = ? ORDER BY id DESC LIMIT 1", (job,)
    ).fetchone()
    return None if row is None else _to_entry(row)


def _get(connection: sqlite3.Connection, entry_id: int) -> Entry | None:
    row = connection.execute(
        f"SELECT {', '.join(_COLUMNS)} FROM jobs WHERE id = ?", (entry_id,)
    ).fetchone()
    return None if row is None else _to_entry(row)


def _to_entry(row: Sequence[Any]) -> Entry:
    values = dict(zip(_COLUMNS, row, strict=True))
    try:
        paths = [str(path) for path in json.loads(values["files"])]
    except (ValueError, TypeError):
        paths = []
    values["files"] = tuple(Path(path) for path in paths)
    values["remote_deleted"] = bool(values["remote_deleted"])
    return Entry(**values)
