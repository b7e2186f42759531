"""What was started and paid for, on disk, so that nothing is paid for twice.

One SQLite file, shared by every process of a user. A job is a model with its inputs, known by their
digest. Its row is written before the Run goes out and goes through

    intent     written down; the end of the Run has surely not left, so no task was made
    sending    the end is leaving, or has left; no answer yet
    started    the service named a task
    ended      the task has ended: verdict, cost, files
    refused    the service or the network said no; no task was made

So the same job after a crash goes on where it was: from "intent" it is sent, from "sending" its
task is looked up at the service and never sent again by itself, from "started" it is watched, and
from "ended" its files are there. Rows hold no key, no token and no prompt.

A task belongs to one row: taking one for a lost Run is a single transaction, which fails if another
row has it or might. Rows tell whose key they are of, for the sums of spending; those of older
versions tell none and count for every key.
"""

import json
import logging
import os
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields, replace
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

from .candidates import clean_slug
from .errors import ConfigError
from .spending import Limits, Price, Spent, check_limits, reserved
from .task import Task, Verdict, may_lag, verdict
from .wire import decimal_of, dollars

logger = logging.getLogger("wiro_api.journal")

#: seconds to wait for another process that is writing
BUSY_S = 10.0
#: what a commit waits for; less only in tests
SYNCHRONOUS = "FULL"
#: seconds after which the task of a Run without an answer will not be made any more
ABANDONED_S = 86_400.0
#: columns that files of older versions lack
_NEWER_COLUMNS = ("account", "inputs", "baseline")
_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    id INTEGER PRIMARY KEY,
    job TEXT NOT NULL, owner TEXT NOT NULL, model TEXT NOT NULL, state TEXT NOT NULL,
    taskid TEXT NOT NULL DEFAULT '', status TEXT NOT NULL DEFAULT '',
    verdict TEXT NOT NULL DEFAULT '', projected TEXT NOT NULL DEFAULT '',
    cost TEXT NOT NULL DEFAULT '',
    elapsed_s TEXT NOT NULL DEFAULT '', files TEXT NOT NULL DEFAULT '[]',
    remote_deleted INTEGER NOT NULL DEFAULT 0, error TEXT NOT NULL DEFAULT '',
    created_at REAL NOT NULL, sent_at REAL, updated_at REAL NOT NULL,
    account TEXT NOT NULL DEFAULT '', inputs TEXT NOT NULL DEFAULT '',
    baseline TEXT NOT NULL DEFAULT ''
);
CREATE INDEX IF NOT EXISTS jobs_by_job ON jobs (job, id);
CREATE TABLE IF NOT EXISTS users (job_id INTEGER PRIMARY KEY, user TEXT NOT NULL);
"""


@dataclass(frozen=True)
class Entry:
    """One row; its fields are the columns of the table. Times are Unix seconds.

    Attributes:
        id: number of the row.
        job: digest of the job.
        owner: random name of the call that writes the row.
        model: "owner/project".
        state: intent, sending, started, ended or refused.
        taskid: "" until the service has named the task.
        status: of the task, as last seen.
        verdict: of the ended task.
        projected: US dollars reserved before the run.
        cost: US dollars after the run.
        elapsed_s: billed seconds.
        files: paths of what was downloaded.
        remote_deleted: whether its files were removed from the service.
        error: why it was refused.
        created_at: of the row.
        sent_at: of the Run, or None.
        updated_at: of the row.
        account: digest of the key, "" for any.
        inputs: digest of what was asked for, whichever take; "" if unknown.
        baseline: id of the newest task before the Run, "" if unknown.
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
    account: str
    inputs: str
    baseline: str

    @property
    def has_files(self) -> bool:
        """Whether it lists files, and all of them are there."""
        return bool(self.files) and all(path.is_file() for path in self.files)


_COLUMNS = tuple(column.name for column in fields(Entry))


class LostEntryError(Exception):
    """Another process has taken the job over."""


class Journal:
    """The file; opened for each access, so that threads and processes may share it.

    Args:
        path: made with its folder if it is not there, for its owner only.
        now: Unix seconds.
        account: digest of the key whose sums are asked for; "" for all keys.
    """

    def __init__(
        self, path: Path, *, now: Callable[[], float] = time.time, account: str = ""
    ) -> None:
        self.path = path
        self._now = now
        self._account = account

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A transaction that is written as a whole, or not at all."""
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
        connection = sqlite3.connect(self.path, timeout=BUSY_S, isolation_level=None)
        try:
            connection.execute(f"PRAGMA synchronous = {SYNCHRONOUS}")
            connection.execute("BEGIN IMMEDIATE")
            if not _is_current(connection):
                _bring_up_to_date(connection)
            yield connection
            connection.execute("COMMIT")
        finally:
            connection.close()

    def make(self) -> None:
        """Make the file if it is not there, and bring one of an older version up to date.

        Raises:
            sqlite3.Error, OSError: it cannot be.
        """
        with self._open():
            pass

    def merge(self, source: Path) -> int:
        """Copy the rows of another journal that are not here yet, all or none.

        A row is known by its job, its owner and when it was made, so that copying again after a
        crash adds nothing. Rows in "intent" are left out: nothing was made for them.

        Returns:
            How many were copied.

        Raises:
            sqlite3.Error, OSError: one of the files cannot be used; nothing was copied.
        """
        with self._open() as connection:
            if not source.is_file():  # another process was faster
                return 0
            uri = f"{source.resolve().as_uri()}?mode=rw"  # never made anew
            with closing(sqlite3.connect(uri, timeout=BUSY_S, uri=True)) as theirs:
                here = {row[1] for row in theirs.execute("PRAGMA table_info(jobs)")}
                if not here:  # an empty file
                    return 0
                names = [name for name in _COLUMNS if name in here and name != "id"]
                rows = theirs.execute(
                    f"SELECT id, {', '.join(names)} FROM jobs WHERE state != 'intent' ORDER BY id"
                ).fetchall()
                has_users = theirs.execute("PRAGMA table_info(users)").fetchone() is not None
                query = "SELECT job_id, user FROM users"
                users = dict(theirs.execute(query)) if has_users else {}
            copied = 0
            for number, *row in rows:
                values = dict(zip(names, row, strict=True))
                cursor = connection.execute(
                    f"INSERT INTO jobs ({', '.join(names)}) "
                    f"SELECT {', '.join('?' for _ in names)} WHERE NOT EXISTS "
                    "(SELECT 1 FROM jobs WHERE job = ? AND owner = ? AND created_at = ?)",
                    (*row, values["job"], values["owner"], values["created_at"]),
                )
                copied += cursor.rowcount
                if cursor.rowcount and number in users:  # rows have other numbers here
                    user = (cursor.lastrowid, users[number])
                    connection.execute("INSERT OR IGNORE INTO users VALUES (?, ?)", user)
            return copied

    def begin(
        self,
        job: str,
        model: str,
        *,
        again: bool = False,
        older_jobs: Sequence[str] = (),
        account: str = "",
        own_only: bool = False,
        inputs: str = "",
    ) -> Entry:
        """Find the row of a job that is under way or done, else make one in "intent".

        Args:
            job: its digest.
            model: "owner/project".
            again: make a new row in any case.
            older_jobs: digests by which earlier versions knew it.
            account: digest of the key.
            own_only: leave out rows of other keys; they are taken where this key has none.
            inputs: digest of what is asked for, whichever take.

        Returns:
            The row.

        Raises:
            ConfigError: the journal cannot be read or written; without it nothing may be started.
        """
        owner = uuid.uuid4().hex
        try:
            with self._open() as connection:
                jobs = (job, *older_jobs)
                found = None if again else _find(connection, jobs, account, own_only)
                if found is not None and found.state == "intent":
                    # of a process that died, or one that has not sent yet and will notice
                    connection.execute(
                        "UPDATE jobs SET owner = ?, account = ?, inputs = ?, updated_at = ? "
                        "WHERE id = ?",
                        (owner, account, inputs, self._now(), found.id),
                    )
                    return replace(found, owner=owner, account=account, inputs=inputs)
                if found is not None and not _may_start_again(found):
                    return found
                cursor = connection.execute(
                    "INSERT INTO jobs (job, owner, model, state, created_at, updated_at, account, "
                    "inputs) VALUES (?, ?, ?, 'intent', ?, ?, ?, ?)",
                    (job, owner, model, self._now(), self._now(), account, inputs),
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

    def find(self, jobs: Sequence[str], account: str = "") -> Entry | None:
        """Find the row of a job that was sent, so that it is not sent again.

        Args:
            jobs: digests by which it is or was known.
            account: digest of the key; rows of other keys count only where their files are here.

        Returns:
            The row, or None.
        """
        try:
            with self._open() as connection:
                entry = _find(connection, jobs, account, own_only=False)
        except (sqlite3.Error, OSError) as error:
            logger.warning("The journal %s could not be read: %s.", self.path, error)
            return None
        if entry is None or entry.state == "intent" or _may_start_again(entry):
            return None
        is_own = not account or entry.account in ("", account)
        return entry if is_own or entry.has_files else None

    def mark_sending(
        self,
        entry: Entry,
        model: str = "",
        price: Price | None = None,
        limits: Limits | None = None,
        baseline: str = "",
    ) -> None:
        """Note that the end of the Run leaves now, and reserve its price.

        Args:
            entry: the row.
            model: "owner/project".
            price: None if unknown.
            limits: of spending; None for no limit.
            baseline: id of the newest task before it, "" if unknown.

        Raises:
            LostEntryError: another process has taken the job over; do not send.
            LimitError: with what others reserved meanwhile it would pass a limit; do not send.
            ConfigError: it cannot be written; do not send.
        """
        try:
            with self._open() as connection:
                limits = limits or Limits()
                check_limits(limits, price, self._spent(connection, entry.id), model)
                cursor = connection.execute(
                    "UPDATE jobs SET state = 'sending', projected = ?, sent_at = ?, baseline = ?, "
                    "updated_at = ? "
                    "WHERE id = ? AND owner = ? AND state IN ('intent', 'sending')",
                    (
                        dollars(reserved(price, limits)) or "",
                        self._now(),
                        baseline,
                        self._now(),
                        entry.id,
                        entry.owner,
                    ),
                )
                if cursor.rowcount != 1:
                    raise LostEntryError
        except (sqlite3.Error, OSError) as error:
            raise ConfigError(
                f"The journal {self.path} cannot be written ({error}): make room, or move it away."
            ) from None

    def spent(self, but: int = 0) -> Spent:
        """Sum what this day and this month have cost.

        Args:
            but: id of a row to leave out; the sums are then those of its key.

        Returns:
            Both sums.

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
            "WHERE sent_at >= ? AND id != ? AND state IN ('sending', 'started', 'ended') "
            "AND (? = '' OR account IN ('', ?))",
            (month.timestamp(), but, *2 * (_account_of(connection, but) or self._account,)),
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
                    "INSERT INTO jobs (job, owner, model, state, taskid, created_at, updated_at, "
                    "account) VALUES (?, '', ?, 'started', ?, ?, ?, ?)",
                    (f"task {taskid}", model, taskid, self._now(), self._now(), self._account),
                )
                return _get(connection, int(cursor.lastrowid or 0))
        except (sqlite3.Error, OSError) as error:
            logger.warning("The journal %s could not be written: %s.", self.path, error)
            return None

    def mark_started(self, entry_id: int, taskid: str) -> None:
        """Note the task that the service named in its answer to the Run."""
        try:
            with self._open() as connection:
                connection.execute(
                    "UPDATE jobs SET state = 'started', taskid = ?, updated_at = ? "
                    "WHERE id = ? AND taskid != ?",  # it may have been found and stopped meanwhile
                    (taskid, self._now(), entry_id, taskid),
                )
        except (sqlite3.Error, OSError) as error:
            logger.warning("The journal %s could not be written: %s.", self.path, error)

    def claim(self, entry: Entry, taskid: str, *, is_proved: bool) -> bool:
        """Take a task of the service's list for the row of a lost Run, if it can be no other's.

        Args:
            entry: the row.
            taskid: of the task.
            is_proved: the service keeps the files of this run with it; then only another take of
                the same inputs may be waiting for it too. Otherwise any lost or unanswered Run of
                the model may.

        Returns:
            Whether the row has the task now.
        """
        try:
            with self._open() as connection:
                now = _get(connection, entry.id)
                if now is None or now.state != "sending" or now.taskid:
                    return False
                others = connection.execute(
                    f"SELECT {', '.join(_COLUMNS)} FROM jobs "
                    "WHERE id != ? AND owner != '' AND (taskid = ? OR state = 'sending')",
                    (now.id, taskid),
                )
                for other in map(_to_entry, others):
                    if other.taskid == taskid or self._may_want(other, now, is_proved):
                        return False
                connection.execute(
                    "UPDATE jobs SET state = 'started', taskid = ?, updated_at = ? WHERE id = ?",
                    (taskid, self._now(), now.id),
                )
                return True
        except (sqlite3.Error, OSError) as error:
            logger.warning("The journal %s could not be written: %s.", self.path, error)
            return False

    def _may_want(self, other: Entry, entry: Entry, is_proved: bool) -> bool:
        """Whether a task that may be one row's may as well be that of another unanswered row."""
        if other.taskid or clean_slug(other.model) != clean_slug(entry.model):
            return False
        if self._now() - (other.sent_at or other.created_at) > ABANDONED_S:
            return False
        return not is_proved or not other.inputs or other.inputs == entry.inputs

    def mark_waiting(self, entry: Entry) -> bool:
        """Note that the service had no place for it and made no task; it will be sent again.

        Returns:
            False if another process has taken the job over.
        """
        return self._note(entry.id, owner=entry.owner, state="intent")

    def mark_refused(self, entry: Entry, reason: str) -> bool:
        """Note that no task was made; False if another process has taken the job over."""
        return self._note(entry.id, owner=entry.owner, state="refused", error=reason)

    def mark_seen(self, entry_id: int, status: str) -> None:
        """Note the state of a running task."""
        self._note(entry_id, status=status)

    def mark_ended(self, entry_id: int, task: Task, files: Sequence[Path] = ()) -> None:
        """Note the end of a task, its cost and its files."""
        self._note(
            entry_id,
            state="ended",
            taskid=task.taskid,
            status=task.status,
            # a record without file and error may be incomplete: it is not run again by itself
            verdict=(Verdict.NO_OUTPUT if may_lag(task) else verdict(task)).value,
            cost=dollars(task.totalcost) or "",
            elapsed_s="" if task.elapsed_s is None else str(task.elapsed_s),
            files=json.dumps([str(path.absolute()) for path in files]),
        )

    def mark_remote_deleted(self, entry_id: int) -> None:
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
        """Write what is known; a failure is logged and loses nothing that was paid for.

        Args:
            entry_id: of the row.
            owner: write only if the row is still this one's, and no task was named yet.
            **values: by column.

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

    def newest(self, limit: int = 100, before: int | None = None) -> list[Entry]:
        """Read the newest rows.

        Args:
            limit: how many.
            before: only rows with a lower id.

        Returns:
            Newest first; [] if the journal cannot be read, which is logged.
        """
        below = 2**63 - 1 if before is None else before
        try:
            with self._open() as connection:
                rows = connection.execute(
                    f"SELECT {', '.join(_COLUMNS)} FROM jobs WHERE id < ? ORDER BY id DESC LIMIT ?",
                    (below, limit),
                ).fetchall()
        except (sqlite3.Error, OSError) as error:
            logger.warning("The journal %s could not be read: %s.", self.path, error)
            return []
        return [_to_entry(row) for row in rows]

    def note_user(self, entry_id: int, user: str) -> None:
        """Note whose a row is, where a host has several users; the first one keeps it."""
        try:
            with self._open() as connection:
                connection.execute("INSERT OR IGNORE INTO users VALUES (?, ?)", (entry_id, user))
        except (sqlite3.Error, OSError) as error:
            logger.warning("The journal %s could not be written: %s.", self.path, error)

    def rows_of(self, user: str) -> frozenset[int]:
        """The ids of a user's rows; empty if the journal cannot be read, which is logged."""
        try:
            with self._open() as connection:
                rows = connection.execute("SELECT job_id FROM users WHERE user = ?", (user,))
                return frozenset(int(row[0]) for row in rows)
        except (sqlite3.Error, OSError) as error:
            logger.warning("The journal %s could not be read: %s.", self.path, error)
            return frozenset()

    def known_taskids(self, but: int = 0) -> frozenset[str]:
        """Read the tasks of other rows: none of them is the task of this row's lost Run.

        A task that a person has collected by its id may be.

        Returns:
            Their ids.
        """
        try:
            with self._open() as connection:
                rows = connection.execute(
                    "SELECT DISTINCT taskid FROM jobs "
                    "WHERE taskid != '' AND owner != '' AND id != ?",
                    (but,),
                )
                return frozenset(taskid for (taskid,) in rows)
        except (sqlite3.Error, OSError) as error:
            logger.warning("The journal %s could not be read: %s.", self.path, error)
            return frozenset()  # nothing can be claimed in it either


def _may_start_again(entry: Entry) -> bool:
    """Whether a new Run of the job pays for nothing that is paid for or on its way.

    Returns:
        False for a task that succeeded without a file too: it was paid for, so it is not run again
        unless the user asks for that.
    """
    failed = (Verdict.FAILED.value, Verdict.CANCELLED.value)
    return entry.state == "refused" or (entry.state == "ended" and entry.verdict in failed)


def _find(
    connection: sqlite3.Connection, jobs: Sequence[str], account: str, own_only: bool
) -> Entry | None:
    """The newest row of a job that stands in the way of another Run, else its newest."""
    marks = ", ".join("?" for _ in jobs)
    rows = connection.execute(
        f"SELECT {', '.join(_COLUMNS)} FROM jobs WHERE job IN ({marks}) ORDER BY id DESC", jobs
    )
    every = [_to_entry(row) for row in rows]
    own = [entry for entry in every if not account or entry.account in ("", account)]
    for entries in (own, [] if own_only else every):
        for entry in entries:
            if not _may_start_again(entry):
                return entry
    return own[0] if own else None


def _account_of(connection: sqlite3.Connection, entry_id: int) -> str:
    row = connection.execute("SELECT account FROM jobs WHERE id = ?", (entry_id,)).fetchone()
    return "" if row is None else str(row[0])


def _is_current(connection: sqlite3.Connection) -> bool:
    """Whether the last things that versions have added are there: it is asked each time."""
    try:
        connection.execute(f"SELECT {', '.join(_NEWER_COLUMNS)}, user FROM jobs, users LIMIT 0")
    except sqlite3.OperationalError:  # no such table or column
        return False
    return True


def _bring_up_to_date(connection: sqlite3.Connection) -> None:
    """Make what an empty file lacks, or one of an older version."""
    for statement in _SCHEMA.split(";"):
        connection.execute(statement)
    here = {row[1] for row in connection.execute("PRAGMA table_info(jobs)")}
    for name in _NEWER_COLUMNS:
        if name not in here:
            connection.execute(f"ALTER TABLE jobs ADD COLUMN {name} TEXT NOT NULL DEFAULT ''")


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
