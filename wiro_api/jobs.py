"""A run from its inputs to its files: started once, followed, downloaded, whatever happens.

    job = Job(model, values, files)
    entry = start(client, journal, job, quote(read_record(client, model), job))
    task, paths = finish(client, to_handle(entry), folder, journal=journal, entry_id=entry.id)

Both are for the command line and for hosts with a window alike; what these show on the way reaches
them through a `RunListener`.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

from .candidates import SentRun
from .client import MIN_WAIT_S, WATCH_S, Client, raise_for_failure
from .errors import (
    ApiError,
    AuthError,
    ConcurrencyError,
    ConfigError,
    DependencyError,
    DownloadError,
    LimitError,
    NotFoundError,
    TransportError,
    WiroError,
)
from .files import (
    BEHIND_S,
    NOT_YET_S,
    TICK_S,
    download,
    is_name_of,
    is_whole,
    label_of,
    labelled,
    safe_name,
)
from .handles import Model, RunHandle
from .journal import Entry, Journal, LostEntryError
from .listener import SILENT, RunListener
from .receipts import write_receipt
from .schema import SKYREELS, complete, items_of
from .spending import Limits, Price, check_limits, price_of
from .task import Task, Verdict, verdict
from .transport import FilePart, noop
from .websocket import ProgressSocket

logger = logging.getLogger("wiro_api.jobs")

#: rows whose files a thread of this process is downloading, as (journal, row)
_downloading: set[tuple[Path, int]] = set()
_download_ends = threading.Condition()

#: seconds between two tries while all slots of the account are in use
FIRST_BUSY_S, LAST_BUSY_S = 5.0, 60.0
#: suffix of a dot and a name, in the journal, for a file that has not come: no file is called so
MISSING = ".missing"
#: a download may be late by this many seconds however short the wait for the task, and whatever
#: the files before it have cost
LEAST_BEHIND_S = 10.0


@dataclass(frozen=True)
class Job:
    """What makes a run: the same job is started, and paid for, once.

    Attributes:
        model: to run.
        values: parameters as the caller was asked for them, before defaults are filled in:
            defaults of the service may change, and the job is still the same.
        files: (parameter, part) of the files that are sent along.
        take: another number is another run of the same inputs.
    """

    model: Model
    values: Mapping[str, Any]
    files: Sequence[tuple[str, FilePart]] = ()
    take: int = 1


@dataclass(frozen=True)
class Quote:
    """What a run is sent with, and what it will cost.

    Attributes:
        parameters: every parameter of the model's schema.
        price: None if it is not known before the run.
    """

    parameters: Mapping[str, Any]
    price: Price | None = None


def read_record(
    client: Client, model: Model, on_unknown: Callable[[WiroError], None] = noop
) -> Mapping[str, Any]:
    """Read what the service says of a model.

    Args:
        client: of the account.
        model: to look up.
        on_unknown: called with the reason if the service does not answer for SkyReels-V1, of which
            enough is known without.

    Returns:
        The record of Tool/Detail, {} after `on_unknown`.

    Raises:
        ApiError: of any other model, or if the key is refused.
        TransportError: of any other model.
    """
    try:
        return client.model_detail(model)
    except (ApiError, TransportError) as error:
        if isinstance(error, AuthError | NotFoundError) or model.clean != SKYREELS.clean:
            raise
        on_unknown(error)
        return {}


def quote(
    record: Mapping[str, Any],
    job: Job,
    earlier: Sequence[Decimal] = (),
    *,
    is_draft: bool = False,
) -> Quote:
    """Complete the parameters of a job and price it: the one way for all who show or pay it.

    Args:
        record: of `read_record`.
        job: to price.
        earlier: US dollars that runs of the model have cost, as for `spending.price_of`.
        is_draft: the job is still being written: a missing value is no error.

    Returns:
        Parameters and price.

    Raises:
        ConfigError: as for `schema.complete`.
    """
    items = items_of(record, job.model)
    parts = job.files
    if is_draft:  # where a file goes may be found out later; that it comes along counts
        items = [{**item, "required": False} for item in items]
        known = {str(item["id"]) for item in items}
        parts = [(name, part) for name, part in job.files if name in known]
    parameters = complete(items, job.values, parts)
    return Quote(parameters, price_of(record, parameters, len(job.files), earlier))


class PicturePart(tuple[str, bytes, str]):
    """A file part of a picture that the host has encoded, identified by its pixels.

    Another version of a compressor encodes the same picture into other bytes.
    """

    pixels: bytes

    @classmethod
    def from_pixels(cls, part: FilePart, pixels: bytes, *size: int) -> "PicturePart":
        """Make a part that knows its pixels.

        Args:
            part: as encoded.
            pixels: raw bytes.
            *size: their layout, as height, width and channels.

        Returns:
            The part.
        """
        made = cls(part)
        made.pixels = "x".join(map(str, size)).encode() + b"\0" + pixels
        return made


def job_key(job: Job, *, service: str = "") -> str:
    """Digest of a job: service, model, values, take and the content of the files.

    Args:
        job: names of files inside the parts do not count; a `PicturePart` counts by its pixels.
        service: base URL; a test server's tasks are not the real one's.

    Returns:
        64 hex digits.
    """
    digest = hashlib.sha256()
    values = sorted((name, json.dumps(value, sort_keys=True)) for name, value in job.values.items())
    digest.update(json.dumps([service, job.take, str(job.model.clean), values]).encode())
    for name, part in job.files:
        content = part.pixels if isinstance(part, PicturePart) else part[1]
        digest.update(f"\0{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def _job_keys(client: Client, job: Job) -> tuple[str, str]:
    """The digest of a job, and the one of earlier versions."""
    encoded = [(name, (part[0], part[1], part[2])) for name, part in job.files]
    older = replace(job, files=encoded)
    return job_key(job, service=client.base_url), job_key(older, service=client.base_url)


# --- start --------------------------------------------------------------------------------------


def start(
    client: Client,
    journal: Journal,
    job: Job,
    quoted: Quote | None = None,
    *,
    limits: Callable[[], Limits] = Limits,
    again: bool = False,
    wait_when_busy: bool = False,
    listener: RunListener = SILENT,
) -> Entry:
    """Start a job, or find it if it was started before, in whatever process.

    Args:
        client: of the account.
        journal: where the job is written down before it is sent.
        job: what to run.
        quoted: parameters to send and price; without it the job's own values, at an unknown price.
        limits: returns those of spending; called again as the Run leaves.
        again: pay for another run although the job is under way or done.
        wait_when_busy: wait for a slot if too many tasks of the account run.
        listener: its `check` may raise to keep the Run from leaving; its `on_busy` to leave the row
            in "intent", from where the job can be started later.

    Returns:
        A row in "started" or "ended".

    Raises:
        RunOutcomeUnknownError: it was sent once, and neither an answer nor the list of tasks says
            what became of it; with `again` it is sent anew.
        LimitError: it may not be paid for.
        ConfigError: the journal cannot be used.
        ApiError: as for `Client.run`.
        TransportError: as for `Client.run`.
    """
    quoted = quoted or Quote(job.values)
    key, older_key = _job_keys(client, job)
    inputs = job_key(replace(job, take=0), service=client.base_url)  # in any take
    busy_s, num_lost, own_only = FIRST_BUSY_S, 0, False
    while True:
        entry = journal.begin(
            key,
            str(job.model),
            again=again,
            older_jobs=(older_key,),
            account=client.account,
            own_only=own_only,
            inputs=inputs,
        )
        if not _is_within_reach(client, entry):
            own_only = True
            continue
        listener.on_entry(entry)
        if entry.state in ("started", "ended"):
            return entry
        try:
            handle = _send_or_recover(
                client, journal, entry, job, quoted, limits=limits, listener=listener
            )
        except LostEntryError:
            num_lost += 1
            client.sleep(random.uniform(0.5, 1.0) * 2.0 ** min(num_lost, 5))
        except (ApiError, TransportError, LimitError) as error:
            if wait_when_busy and _is_busy(error):
                if journal.mark_waiting(entry):
                    asked_s = getattr(error, "retry_after_s", None)
                    listener.on_busy(error, asked_s or busy_s, client.sleep)
                    busy_s = min(2 * busy_s, LAST_BUSY_S)
            elif journal.mark_refused(entry, str(error)):
                raise
        else:
            return _with_task(client, journal, entry, handle)
        # look at the row again: it waits, or another process has taken the job over
        again = False


def _send_or_recover(
    client: Client,
    journal: Journal,
    entry: Entry,
    job: Job,
    quoted: Quote,
    *,
    limits: Callable[[], Limits],
    listener: RunListener,
) -> RunHandle:
    if entry.state == "sending":
        return recover(client, journal, entry, job, quoted.parameters)
    model = str(job.model)

    def before_sending(baseline: str) -> None:
        listener.check()
        journal.mark_sending(entry, model, quoted.price, limits(), baseline)

    def on_refusal() -> None:
        journal.mark_waiting(entry)  # the caller may have left, and then nobody else notes it

    check_limits(limits(), quoted.price, journal.spent(but=entry.id), model)  # before uploads
    return client.run(
        job.model,
        quoted.parameters,
        job.files,
        known=partial(_other_tasks, journal, entry),
        claim=partial(_claim, journal, entry),
        before_sending=before_sending,
        on_answer=lambda handle: journal.mark_started(entry.id, handle.taskid),
        on_refusal=on_refusal,
    )


def _with_task(client: Client, journal: Journal, entry: Entry, handle: RunHandle) -> Entry:
    taskid = handle.taskid
    if not taskid:  # the answer named the token alone
        taskid = client.detail(handle).taskid
        journal.mark_started(entry.id, taskid)
    # a journal that cannot be written any more has logged it; the task goes on
    return replace(journal.get(entry.id) or entry, state="started", taskid=taskid)


def _is_busy(error: WiroError) -> bool:
    """Whether the account or the service has no slot for another task now."""
    if isinstance(error, TransportError):
        return error.status == 429
    return isinstance(error, ConcurrencyError)


def find(client: Client, journal: Journal, job: Job) -> Entry | None:
    """The row of a job that is sent, under way or done, without asking the service."""
    return journal.find(_job_keys(client, job), client.account)


def recover(
    client: Client, journal: Journal, entry: Entry, job: Job, parameters: Mapping[str, Any]
) -> RunHandle:
    """Find the task of a row in "sending", whose Run was not answered; the row then has it.

    Args:
        client: of the account.
        journal: of the row.
        entry: the row.
        job: that was sent.
        parameters: that were sent.

    Returns:
        The task's identifiers.

    Raises:
        RunOutcomeUnknownError: as for `start`.
        LostEntryError: the row has changed meanwhile: its owner has heard from the service.
    """
    return client.find_run(
        SentRun(job.model, parameters, job.files, entry.baseline),
        known=partial(_other_tasks, journal, entry),
        claim=partial(_claim, journal, entry),
    )


def _is_within_reach(client: Client, entry: Entry) -> bool:
    """Whether a row is of this key, or of an earlier one of the same account, or has its files."""
    is_open = entry.state not in ("started", "ended")
    if is_open or entry.account in ("", client.account) or entry.has_files:
        return True
    try:
        client.detail(to_handle(entry))
    except NotFoundError:
        return False
    return True


def _claim(journal: Journal, entry: Entry, taskid: str, is_proved: bool) -> bool:
    return journal.claim(entry, taskid, is_proved=is_proved)


def _other_tasks(journal: Journal, entry: Entry) -> frozenset[str]:
    """The tasks of other rows, while a row waits for its own.

    Returns:
        Their ids.

    Raises:
        LostEntryError: the row has changed meanwhile: its owner has heard from the service.
    """
    now = journal.get(entry.id)
    if now is not None and (now.state != "sending" or now.taskid or now.owner != entry.owner):
        raise LostEntryError
    return journal.known_taskids(but=entry.id)


# --- finish -------------------------------------------------------------------------------------


def to_handle(entry: Entry) -> RunHandle:
    """The identifiers of a row's task."""
    return RunHandle(entry.taskid, "", entry.sent_at)


def finish(
    client: Client,
    handle: RunHandle,
    folder: Path,
    *,
    journal: Journal | None = None,
    entry_id: int | None = None,
    timeout_s: float = WATCH_S,
    listener: RunListener = SILENT,
    asked: Mapping[str, Any] | None = None,
    is_labelled: bool = False,
) -> tuple[Task, list[Path]]:
    """Follow a task to its end, download what it made, and write a receipt beside it.

    Who comes while another thread downloads the files of the same row waits, and finds them there.

    Args:
        client: of the account; with a `socket_url` progress is live, else it comes by polling.
        handle: of the task.
        folder: for the files.
        journal: where the row is kept; None for a task that has none.
        entry_id: id of the row.
        timeout_s: longest wait for the task's end.
        listener: sees records, progress, log lines and bytes; its `check` may raise to stop.
        asked: model, parameters and take for the receipt; without it, what the record says.
        is_labelled: names of files begin with the day and the prompt's first words.

    Returns:
        The final record and the paths, those of an earlier call among them.

    Raises:
        TaskFailedError: it ended without success.
        TaskCancelledError: it was cancelled or killed.
        TaskTimeoutError: it has not ended.
        TaskStalledError: it stands still on an error of its own.
        DownloadError: it has ended, and is paid, but files are missing; the others are in its
            `paths`.
    """
    row = _Row(journal, entry_id) if journal is not None and entry_id is not None else None
    task = _follow(client, handle, row, timeout_s, listener)
    with _one_at_a_time(row, listener.check):
        paths: Sequence[Path] = ()
        try:
            label = _label_of(task, asked) if is_labelled else ""
            paths = _Delivery(client, task, folder, row, timeout_s, listener, label).fetch()
        except DownloadError as error:
            paths = error.paths
            raise
        finally:
            if paths:
                write_receipt(task, paths, asked, secrets=client.secrets, check=listener.check)
    return task, list(paths)


def _label_of(task: Task, asked: Mapping[str, Any] | None) -> str:
    told = (asked or {}).get("parameters") or {}
    parameters = told if isinstance(told, Mapping) else {}
    started = task.endtime if task.starttime is None else task.starttime
    return label_of(started, {**task.parameters, **parameters})


@dataclass(frozen=True)
class _Row:
    """A row that is kept while its task is followed."""

    journal: Journal
    id: int


def _follow(
    client: Client, handle: RunHandle, row: _Row | None, timeout_s: float, listener: RunListener
) -> Task:
    """The final record of a task."""
    end = client.clock() + timeout_s
    task = next(client.watch(handle, timeout_s=timeout_s))
    if verdict(task) is not Verdict.RUNNING:
        listener.on_task(task)
        return task
    handle = RunHandle(task.taskid or handle.taskid, task.token or handle.token, handle.started_at)
    status = ""
    with contextlib.ExitStack() as stack:
        socket = None
        if client.socket_url and task.token:
            try:
                socket = stack.enter_context(
                    ProgressSocket(
                        task.token,
                        url=client.socket_url,
                        on_progress=listener.on_progress,
                        on_log=listener.on_log,
                        taskid=task.taskid,
                    )
                )
            except (DependencyError, ConfigError) as error:  # the task is paid for: go on
                logger.warning("%s Until then progress comes by polling alone.", error)
        left = max(MIN_WAIT_S, end - client.clock())
        for task in client.watch(handle, timeout_s=left, socket=socket):
            listener.on_task(task)
            if task.status != status and row is not None:
                row.journal.mark_seen(row.id, task.status)
            status = task.status
    return task


@contextlib.contextmanager
def _one_at_a_time(row: _Row | None, check: Callable[[], None]) -> Iterator[None]:
    """Hold a row: two that look for free names would both fetch what is paid once."""
    if row is None:
        yield
        return
    key = row.journal.path, row.id
    with _download_ends:
        while key in _downloading:
            check()
            _download_ends.wait(TICK_S)
        _downloading.add(key)
    try:
        yield
    finally:
        with _download_ends:
            _downloading.discard(key)
            _download_ends.notify_all()


@dataclass
class _Delivery:
    """The files of an ended task on their way to a folder."""

    client: Client
    task: Task
    folder: Path
    row: _Row | None
    timeout_s: float
    listener: RunListener
    label: str = ""

    def __post_init__(self) -> None:
        self.outputs = [output for output in self.task.outputs if output.url]
        #: of each output: its file, None if that is not here
        self.paths: list[Path | None] = [None] * len(self.outputs)
        #: of each output: a file that is here in part, which the whole one replaces
        self.damaged: list[Path | None] = [None] * len(self.outputs)

    def fetch(self) -> list[Path]:
        """Download what is not here yet; each file is in the journal as soon as it has come."""
        earlier = self._find_earlier()
        self._note(earlier)
        raise_for_failure(self.task)
        errors = self._fetch_missing()
        came = [path for path in self.paths if path is not None]
        if errors:
            raise self._error(errors, came)
        return came

    def _find_earlier(self) -> Sequence[Path]:
        """Recognize the files of an earlier call; returns what the row lists."""
        row = None if self.row is None else self.row.journal.get(self.row.id)
        if self.row is None or row is None:
            return ()
        taken = _taken(self.row.journal, row)
        if len(row.files) == len(self.outputs):  # in the same order: missing ones hold a place
            for number, (path, output) in enumerate(zip(row.files, self.outputs, strict=True)):
                is_ours = path.parent == self.folder.absolute() and path not in taken
                if is_ours and is_name_of(path.name, output):
                    here = self.folder / path.name
                    self.paths[number] = here if is_whole(path) else None
                    self.damaged[number] = here if path.is_file() else None
        return row.files

    def _note(self, earlier: Sequence[Path] = ()) -> None:
        """Write the end of the task and the files that are here to the row."""
        if self.row is None:
            return
        known: Sequence[Path] = ()
        if any(self.paths):
            known = [
                path or self.folder / f".{safe_name(output)}{MISSING}"
                for path, output in zip(self.paths, self.outputs, strict=True)
            ]
        self.row.journal.mark_ended(self.row.id, self.task, known if self.outputs else earlier)

    def _fetch_missing(self) -> dict[int, DownloadError]:
        """Number of each output that cannot be fetched -> why."""
        clock = self.client.clock
        began = clock()
        errors: dict[int, DownloadError] = {}
        lost_s = 0.0
        for number, output in enumerate(self.outputs):
            if self.paths[number] is not None:
                continue
            start_s = clock()
            waits = zip(NOT_YET_S, itertools.accumulate(NOT_YET_S), strict=True)
            try:
                path = download(
                    labelled(output, self.label),
                    self.folder,
                    taskid=self.task.taskid,
                    base_url=self.client.base_url,
                    local_host=self.client.local_host,
                    check=self.listener.check,
                    on_bytes=self.listener.on_bytes,
                    sleep=self.client.sleep,
                    clock=clock,
                    behind_s=max(min(BEHIND_S, self.timeout_s) - lost_s, LEAST_BEHIND_S),
                    # all files together have a minute to appear
                    not_yet_s=[wait for wait, end in waits if end > start_s - began],
                    instead_of=self.damaged[number],
                )
            except DownloadError as error:
                errors[number] = error
                lost_s += clock() - start_s
                continue
            self.paths[number] = path
            self._note()
            try:
                self.listener.verify(path, output)
            except DownloadError as error:
                logger.warning(
                    "%s of task %s is kept, but: %s.",
                    path.name,
                    self.task.taskid,
                    error,
                )
        return errors

    def _error(self, errors: Mapping[int, DownloadError], came: Sequence[Path]) -> DownloadError:
        if len(self.outputs) == 1:
            return next(iter(errors.values()))
        names = [safe_name(self.outputs[number]) for number in errors]
        reasons = "; ".join(
            f"{name} ({error.reason})" for name, error in zip(names, errors.values(), strict=True)
        )
        there = f"here are {', '.join(path.name for path in came)}" if came else "none is here"
        return DownloadError(
            f"{len(errors)} of {len(self.outputs)} files of task {self.task.taskid} cannot be "
            f"fetched: {reasons}; {there}. The task is done and paid for; collect it again by its "
            "id: only what is missing is fetched.",
            taskid=self.task.taskid,
            reason=reasons,
            task=self.task,
            paths=came,
            missing=names,
        )


def is_complete(journal: Journal, entry: Entry) -> bool:
    """Whether a job was done before: its row has ended, and all its files are here."""
    is_over = entry.state == "ended" and bool(entry.files)
    return is_over and files_here(journal, entry) == entry.files


def files_here(journal: Journal, entry: Entry) -> tuple[Path, ...]:
    """The files of a row that are there, whole and its own."""
    taken = _taken(journal, entry)
    return tuple(path for path in entry.files if path not in taken and is_whole(path))


def _taken(journal: Journal, entry: Entry) -> set[Path]:
    """Names of a row's files that were free again and went to the file of a later task."""
    return {
        path
        for other in journal.newest(1000)
        if other.id != entry.id and other.updated_at > entry.updated_at
        for path in other.files
        if path in entry.files
    }
