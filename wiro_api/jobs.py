"""A run from its inputs to its files: started once, followed, brought home, whatever happens.

    entry = start(client, journal, model, parameters, files)
    task, paths = finish(client, to_handle(entry), folder, journal=journal, entry_id=entry.id)

Both are for the command line and for hosts with a window alike; what they see on the way comes
through callbacks.
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

from .client import MIN_WAIT_S, WATCH_S, Client, Model, RunHandle, raise_for_failure
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
from .files import BEHIND_S, NOT_YET_S, TICK_S, download, is_name_of, is_whole, safe_name
from .journal import Entry, Journal, LostEntryError
from .receipts import write_receipt
from .schema import SKYREELS, complete, items_of
from .spending import Limits, Price, check_limits, price_of
from .task import Output, Progress, Task, Verdict, verdict
from .transport import FilePart, nothing
from .websocket import ProgressSocket

logger = logging.getLogger("wiro_api.jobs")

#: rows whose files somebody is bringing home in this process, as (journal, row)
_coming: set[tuple[Path, int]] = set()
_comes_and_goes = threading.Condition()

#: seconds between two tries while the account's places are taken
FIRST_BUSY_S, LAST_BUSY_S = 5.0, 60.0
#: behind a dot and a name, in the journal, for a file that has not come: no file is called so
MISSING = ".missing"
#: a download may be late by this many seconds however short the wait for the task, and whatever
#: the files before it have cost
LEAST_BEHIND_S = 10.0


@dataclass(frozen=True)
class Quote:
    """What a run would be sent with, and what it would cost; None if that is not told before."""

    parameters: dict[str, Any]
    price: Price | None


def read_record(
    client: Client, model: Model, on_unknown: Callable[[WiroError], None] = nothing
) -> Mapping[str, Any]:
    """What the service says of a model.

    Of SkyReels-V1 enough is known without: {} if the service does not say, after `on_unknown`.

    Raises:
        ApiError, TransportError: of any other model, or if the key is refused.
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
    model: Model,
    values: Mapping[str, Any],
    files: Sequence[tuple[str, FilePart]] = (),
    earlier: Sequence[Decimal] = (),
    *,
    is_draft: bool = False,
) -> Quote:
    """The whole parameters of a run and its price: the one way for all who show or pay it.

    Args:
        record: of `read_record`.
        values, files: as for `schema.complete`. earlier: as for `spending.price_of`.
        is_draft: of a run that is still being written: what is missing is no error.
    Raises:
        ConfigError: as for `schema.complete`.
    """
    items = items_of(record, model)
    parts = files
    if is_draft:  # where a file goes may be found out later; that it comes along counts
        items = [{**item, "required": False} for item in items]
        known = {str(item["id"]) for item in items}
        parts = [(name, part) for name, part in files if name in known]
    parameters = complete(items, values, parts)
    return Quote(parameters, price_of(record, parameters, len(files), earlier))


class PicturePart(tuple[str, bytes, str]):
    """A file part of a picture that the host has packed, known by its pixels.

    The same picture is packed into other bytes by another version of a compressor.
    """

    pixels: bytes

    @classmethod
    def of(cls, part: FilePart, pixels: bytes, *size: int) -> "PicturePart":
        """A part with the bytes of its pixels and their layout, as height, width and channels."""
        made = cls(part)
        made.pixels = "x".join(map(str, size)).encode() + b"\0" + pixels
        return made


def job_key(
    model: Model,
    parameters: Mapping[str, Any],
    files: Sequence[tuple[str, FilePart]] = (),
    *,
    service: str = "",
    take: int = 1,
) -> str:
    """The digest of a job: service, model, parameters and what is in the files.

    Args:
        files: their names do not count. A `PicturePart` counts by its pixels.
        service: base address; a test server's tasks are not the real one's.
        take: another number is another run of the same inputs.
    """
    digest = hashlib.sha256()
    values = sorted((name, json.dumps(value, sort_keys=True)) for name, value in parameters.items())
    digest.update(json.dumps([service, take, str(model.clean), values]).encode())
    for name, part in files:
        content = part.pixels if isinstance(part, PicturePart) else part[1]
        digest.update(f"\0{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def _job_keys(
    client: Client,
    model: Model,
    asked: Mapping[str, Any],
    files: Sequence[tuple[str, FilePart]],
    take: int,
) -> tuple[str, str, str]:
    """The digest of a job, the one of earlier versions, and that of its inputs in any take."""
    packed = [(name, (part[0], part[1], part[2])) for name, part in files]
    return (
        job_key(model, asked, files, service=client.base_url, take=take),
        job_key(model, asked, packed, service=client.base_url, take=take),
        job_key(model, asked, files, service=client.base_url, take=0),
    )


def start(
    client: Client,
    journal: Journal,
    model: Model,
    parameters: Mapping[str, Any],
    files: Sequence[tuple[str, FilePart]] = (),
    *,
    given: Mapping[str, Any] | None = None,
    take: int = 1,
    again: bool = False,
    price: Price | None = None,
    limits: Callable[[], Limits] = Limits,
    wait_when_busy: bool = False,
    on_entry: Callable[[Entry], None] = nothing,
    on_wait: Callable[[float], None] = nothing,
    on_busy: Callable[[WiroError, float], None] | None = None,
    check: Callable[[], None] = nothing,
) -> Entry:
    """Start a job, or find it if it was started before, in whatever process.

    Args:
        model, parameters, files: as for `Client.run`.
        given: what the caller was asked for, before defaults were filled in. The job is known by
            it: defaults of the service may change, and the job is still the same.
        take: another number is another run of the same inputs.
        again: pay for another run although the job is under way or done.
        price: of the run, if known. limits: tells those of spending; asked again as the Run leaves.
        wait_when_busy: wait for a place if too many tasks of the account run.
        on_entry: called with the row before anything is sent.
        on_wait: called each second of that wait with the seconds to the next try.
        on_busy: waits in place of that countdown: gets the refusal and the seconds it would take;
            may raise to leave the row in "intent", from where the job can be started later.
        check: called before the Run leaves; may raise to keep it.
    Returns:
        A row in "started" or "ended".
    Raises:
        RunOutcomeUnknownError: it was sent once, and neither an answer nor the list of tasks tells
            what became of it; with `again` it is sent anew.
        LimitError: it may not be paid for. ConfigError: the journal cannot be used.
        Others: as for `Client.run`.
    """
    asked = parameters if given is None else given
    key, older_key, inputs = _job_keys(client, model, asked, files, take)
    busy_s = FIRST_BUSY_S
    lost = 0
    own_only = False
    while True:
        entry = journal.begin(
            key, str(model), again=again, older_jobs=(older_key,), account=client.account,
            own_only=own_only, inputs=inputs,
        )  # fmt: skip
        if not _is_within_reach(client, entry):
            own_only = True
            continue
        on_entry(entry)
        if entry.state in ("started", "ended"):
            return entry

        def before_last_byte(baseline: str, entry: Entry = entry) -> None:
            check()
            journal.sending(entry, str(model), price, limits(), baseline)

        def on_answer(handle: RunHandle, entry: Entry = entry) -> None:
            journal.started(entry.id, handle.taskid)

        def on_refusal(entry: Entry = entry) -> None:
            journal.waiting(entry)  # the caller may have left, and then nobody else notes it

        try:
            if entry.state == "sending":
                handle = recover(client, journal, entry, model, parameters, files)
                break
            check_limits(limits(), price, journal.spent(but=entry.id), str(model))  # before uploads
            handle = client.run(
                model, parameters, files, known=partial(_other_tasks, journal, entry),
                claim=partial(_claim, journal, entry), before_sending=before_last_byte,
                on_answer=on_answer, on_refusal=on_refusal,
            )  # fmt: skip
            break
        except LostEntryError:
            again = False  # the other one's row is now the newest
            lost += 1
            client.sleep(random.uniform(0.5, 1.0) * 2.0 ** min(lost, 5))
        except (ApiError, TransportError, LimitError) as error:
            is_busy = isinstance(error, ConcurrencyError) or (
                isinstance(error, TransportError) and error.status == 429
            )
            if is_busy and wait_when_busy:
                if journal.waiting(entry):
                    asked_s = getattr(error, "retry_after_s", None)
                    if on_busy is None:
                        _count_down(client, asked_s or busy_s, on_wait)
                    else:
                        on_busy(error, asked_s or busy_s)
                    busy_s = min(2 * busy_s, LAST_BUSY_S)
                again = False  # the row is there
                continue
            if journal.refused(entry, str(error)):
                raise
            again = False  # another process has taken the job over: see what it made of it
    taskid = handle.taskid
    if not taskid:  # the answer told the token alone
        taskid = client.detail(handle).taskid
        journal.started(entry.id, taskid)
    # a journal that cannot be written any more is told by itself; the task goes on
    return replace(journal.get(entry.id) or entry, state="started", taskid=taskid)


def find(
    client: Client,
    journal: Journal,
    model: Model,
    asked: Mapping[str, Any],
    files: Sequence[tuple[str, FilePart]] = (),
    *,
    take: int = 1,
) -> Entry | None:
    """The row of a job that is sent, under way or done, without asking the service.

    Args:
        asked: what `start` takes as `given`.
    """
    *keys, _ = _job_keys(client, model, asked, files, take)
    return journal.find(keys, client.account)


def recover(
    client: Client,
    journal: Journal,
    entry: Entry,
    model: Model,
    parameters: Mapping[str, Any],
    files: Sequence[tuple[str, FilePart]],
) -> RunHandle:
    """The task of a row in "sending", whose Run was not answered; the row then has it.

    Raises:
        RunOutcomeUnknownError: as for `start`.
        LostEntryError: the row has changed meanwhile: its owner has heard from the service.
    """
    return client.find_run(
        model, parameters, files, baseline=entry.baseline,
        known=partial(_other_tasks, journal, entry), claim=partial(_claim, journal, entry),
    )  # fmt: skip


def _is_within_reach(client: Client, entry: Entry) -> bool:
    """Whether a row is of this key, or of an earlier one of the same account, or has its files."""
    if entry.account in ("", client.account) or entry.state not in ("started", "ended"):
        return True
    if entry.files and all(path.is_file() for path in entry.files):
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

    Raises:
        LostEntryError: the row has changed meanwhile: its owner has heard from the service.
    """
    now = journal.get(entry.id)
    if now is not None and (now.state != "sending" or now.taskid or now.owner != entry.owner):
        raise LostEntryError
    return journal.known_taskids(but=entry.id)


def _count_down(client: Client, seconds: float, on_wait: Callable[[float], None]) -> None:
    left = seconds
    while left > 0:
        on_wait(left)
        client.sleep(min(1.0, left))
        left -= 1.0


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
    socket_url: str = "",
    local_host: str = "",
    on_task: Callable[[Task], None] = nothing,
    on_progress: Callable[[Progress], None] = nothing,
    on_log: Callable[[str], None] = nothing,
    on_bytes: Callable[[int, int | None], None] = nothing,
    check: Callable[[], None] = nothing,
    verify: Callable[[Path, Output], None] = nothing,
    asked: Mapping[str, Any] | None = None,
) -> tuple[Task, list[Path]]:
    """Follow a task to its end, download what it made, and write a receipt beside it.

    Who comes while another thread brings home the same row waits, and finds the files there.

    Args:
        folder: for the files.
        journal, entry_id: the row to keep; None for a task that has none.
        timeout_s: longest wait for its end.
        socket_url: of the progress socket; "" to poll only.
        local_host: "host:port" of a test server, as for `download`.
        on_task: called with each new record. on_bytes: as for `download`.
        on_progress, on_log: called in the socket's thread.
        check: as for `download`.
        verify: looks at each file when it has its name and stands in the journal. A DownloadError
            it raises is told, and the file stays: it is paid for.
        asked: model, parameters and take for the receipt; without it, what the record says.
    Returns:
        The final record and the paths, those of an earlier call among them.
    Raises:
        TaskFailedError, TaskCancelledError: it ended without success.
        TaskTimeoutError, TaskStalledError: it has not ended.
        DownloadError: it has, and is paid, but files are missing; the others are in its `paths`.
    """
    end = client.clock() + timeout_s
    task = next(client.watch(handle, timeout_s=timeout_s))
    handle = RunHandle(task.taskid or handle.taskid, task.token or handle.token, handle.started_at)
    last = ""
    if verdict(task) is not Verdict.RUNNING:
        on_task(task)
    with contextlib.ExitStack() as stack:
        socket = None
        if socket_url and task.token and verdict(task) is Verdict.RUNNING:
            try:
                feed = ProgressSocket(
                    task.token, url=socket_url, on_progress=on_progress, on_log=on_log,
                    taskid=task.taskid,
                )  # fmt: skip
                socket = stack.enter_context(feed)
            except (DependencyError, ConfigError) as error:  # the task is paid for: go on
                logger.warning("%s Until then progress comes by polling alone.", error)
        left = max(MIN_WAIT_S, end - client.clock())
        records = client.watch(handle, timeout_s=left, socket=socket)
        rest = records if verdict(task) is Verdict.RUNNING else ()
        for task in rest:
            on_task(task)
            if task.status != last and journal is not None and entry_id is not None:
                journal.seen(entry_id, task.status)
            last = task.status
    with _alone(journal, entry_id, check):
        paths: Sequence[Path] = ()
        try:
            paths = _bring_home(
                client, task, folder, None if entry_id is None else journal, entry_id, timeout_s,
                local_host, check, on_bytes, verify,
            )  # fmt: skip
        except DownloadError as error:
            paths = error.paths
            raise
        finally:
            if paths:
                write_receipt(task, paths, asked, secrets=client.secrets, check=check)
    return task, list(paths)


@contextlib.contextmanager
def _alone(
    journal: Journal | None, entry_id: int | None, check: Callable[[], None]
) -> Iterator[None]:
    """One at a time for a row: two that look for free names would both fetch what is paid once."""
    if journal is None or entry_id is None:
        yield
        return
    key = journal.path, entry_id
    with _comes_and_goes:
        while key in _coming:
            check()
            _comes_and_goes.wait(TICK_S)
        _coming.add(key)
    try:
        yield
    finally:
        with _comes_and_goes:
            _coming.discard(key)
            _comes_and_goes.notify_all()


def _bring_home(
    client: Client,
    task: Task,
    folder: Path,
    journal: Journal | None,
    entry_id: int | None,
    timeout_s: float,
    local_host: str,
    check: Callable[[], None],
    on_bytes: Callable[[int, int | None], None],
    verify: Callable[[Path, Output], None],
) -> list[Path]:
    """Download what is not here yet; each file is in the journal as soon as it has come."""
    outputs = [output for output in task.outputs if output.url]
    row = journal.get(entry_id) if journal is not None and entry_id is not None else None
    old = () if row is None else row.files
    taken = set() if row is None or journal is None else _taken(journal, row)
    paths: list[Path | None] = [None] * len(outputs)
    damaged: list[Path | None] = [None] * len(outputs)
    if len(old) == len(outputs):  # in the same order: the missing ones hold a place
        for number, (path, output) in enumerate(zip(old, outputs, strict=True)):
            is_its = path.parent == folder.absolute() and path not in taken
            if is_its and is_name_of(path.name, output):
                paths[number] = folder / path.name if is_whole(path) else None
                damaged[number] = folder / path.name if path.is_file() else None

    def note() -> None:
        if journal is None or entry_id is None:
            return
        known: Sequence[Path] = ()
        if any(paths):
            places = zip(paths, outputs, strict=True)
            known = [path or folder / f".{safe_name(output)}{MISSING}" for path, output in places]
        journal.ended(entry_id, task, known if outputs else old)

    note()
    raise_for_failure(task)
    began = client.clock()
    errors: dict[int, DownloadError] = {}
    lost_s = 0.0
    for number, output in enumerate(outputs):
        if paths[number] is not None:
            continue
        start_s = client.clock()
        waits = zip(NOT_YET_S, itertools.accumulate(NOT_YET_S), strict=True)
        try:
            path = download(
                output, folder, taskid=task.taskid, base_url=client.base_url,
                local_host=local_host, check=check, on_bytes=on_bytes, sleep=client.sleep,
                clock=client.clock, behind_s=max(min(BEHIND_S, timeout_s) - lost_s, LEAST_BEHIND_S),
                # all files together have a minute to appear
                not_yet_s=[wait for wait, end in waits if end > start_s - began],
                instead_of=damaged[number],
            )  # fmt: skip
        except DownloadError as error:
            errors[number] = error
            lost_s += client.clock() - start_s
            continue
        paths[number] = path
        note()
        try:
            verify(path, output)
        except DownloadError as error:
            logger.warning(
                "%s of task %s is kept as it came, but: %s.", path.name, task.taskid, error
            )
    came = [path for path in paths if path is not None]
    if not errors:
        return came
    if len(outputs) == 1:
        raise next(iter(errors.values()))
    names = [safe_name(outputs[number]) for number in errors]
    reasons = "; ".join(
        f"{name} ({error.reason})" for name, error in zip(names, errors.values(), strict=True)
    )
    there = f"here are {', '.join(path.name for path in came)}" if came else "none is here"
    raise DownloadError(
        f"{len(errors)} of {len(outputs)} files of task {task.taskid} cannot be fetched: "
        f"{reasons}; {there}. The task is done and paid for; collect it again by its id: only "
        "what is missing is fetched.",
        taskid=task.taskid,
        reason=reasons,
        task=task,
        paths=came,
        missing=names,
    )


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
