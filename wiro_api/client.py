"""The calls of the service, and the three things built on them: run, watch, stop.

A Run costs money and cannot be repeated safely, so it is sent again only if it surely never left;
otherwise its outcome is looked up in the list of tasks, and if that does not settle it the caller
is asked. A wait that ends, or a program that ends, stops nothing: both identifiers of a task lead
back to it.
"""

import contextlib
import logging
import math
import random
import re
import time
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

import requests

from .candidates import PAGE_TASKS, SentRun, accept, find_lost_run, newest_id
from .errors import (
    ApiError,
    ConfigError,
    NotFoundError,
    TaskCancelledError,
    TaskFailedError,
    TaskStalledError,
    TaskTimeoutError,
    TransportError,
    WiroError,
    add_task,
)
from .handles import Model, RunHandle
from .signing import Credentials, WiroAuth, account_of, nonces_of
from .task import QUEUED, Task, Verdict, failure_text, log_tail, may_lag, parse_task, verdict
from .transport import (
    RUN_S,
    UPLOAD_S,
    FilePart,
    check_base_url,
    is_passing,
    make_session,
    noop,
    post,
    wait_s,
)
from .transport import base_url as environment_url
from .wire import id_of, token_of

if TYPE_CHECKING:
    from .websocket import ProgressSocket

logger = logging.getLogger("wiro_api.client")

#: attempts of a read, and of a Run that never left
READ_ATTEMPTS, RUN_ATTEMPTS = 5, 3
#: a read is not tried again when it would be later than this
READ_PATIENCE_S = 120.0
#: (until this many seconds into the wait, seconds between polls)
POLL_SCHEDULE = ((15.0, 2.0), (60.0, 5.0), (float("inf"), 10.0))
#: seconds between polls beside a socket that tells of the task, and between two looks at it
WATCHDOG_S, SLICE_S, SHORTEST_POLL_S = 30.0, 0.2, 0.5
#: seconds of `watch`; the service's own longest wait
WATCH_S = 2400.0
#: what is left at the end of a wait is one more look
MIN_WAIT_S = 0.001
#: of the last poll of a wait, which begins before its end
LAST_POLL_S = 2.0
#: a task is "not found" for this long after its Run, at most, and once it is known this often
SETTLING_S, MISSES = 30.0, 2
#: failed polls in a row after which a warning is logged
LOGGED_FAILURES = 3
#: a stored "task_error" that stands still this long with a log is reported
STALLED_S = 120.0
#: answers to a Run that say that nothing was made, whoever gives them
NOTHING_MADE = frozenset({*range(300, 400), 401, 403, 404, 405, 413, 429})
STOP_ROUNDS, STOP_WAIT_S = 3, 2.0
NO_OUTPUT_READS, NO_OUTPUT_WAIT_S = 3, 2.0


def check_wait(seconds: float) -> float:
    """Check a time-out.

    Returns:
        The seconds.

    Raises:
        ConfigError: not a finite number above 0.
    """
    if not isinstance(seconds, int | float) or not (math.isfinite(seconds) and seconds > 0):
        raise ConfigError(
            f"{seconds!r} is not a valid time-out: give seconds above 0, such as 600."
        )
    return seconds


class Client:
    """Talks to one account. Threads may share it.

    Args:
        credentials: from `load_credentials`.
        base_url: https, or http for this machine only; "" for what WIRO_API_BASE_URL names, else
            the real service.
        socket_url: of the progress socket; "" to follow tasks by polling alone.
        session: for tests and proxies.
        sleep, clock: seconds; replaced where a wait must be interruptible or a test must not wait.
            `sleep` may raise to end the wait.
        now: Unix seconds.
        interruptible: `sleep` is called while an answer is waited for too, so it can end that.
    """

    def __init__(
        self,
        credentials: Credentials,
        *,
        base_url: str = "",
        socket_url: str = "",
        session: requests.Session | None = None,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
        interruptible: bool = False,
    ) -> None:
        self.base_url, self.socket_url = check_base_url(base_url or environment_url()), socket_url
        self.account = account_of(credentials)
        self._auth = WiroAuth(credentials, nonces_of(now))
        self.session = session or make_session()
        weakref.finalize(self, self.session.close)  # for clients that nobody closes
        self.sleep, self.clock, self.now = sleep, clock, now
        #: called while an answer is waited for, or None
        self.sleep_in_call = sleep if interruptible else None
        self._rng = random.Random()

    @property
    def secrets(self) -> tuple[str, ...]:
        """What no file and no message may hold."""
        return self._auth.secrets

    @property
    def local_host(self) -> str:
        """host:port of a test server on this machine, "" for the real service."""
        address = urlsplit(self.base_url)
        return address.netloc if address.scheme == "http" else ""

    def close(self) -> None:
        """Let go of the connections; a call after that makes new ones."""
        self.session.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- calls ----------------------------------------------------------------------------------

    def detail(self, handle: RunHandle) -> Task:
        """Read the record of a task, by its token if there is one.

        Returns:
            The record.

        Raises:
            NotFoundError: there is no such task (yet).
            TransportError: no usable answer came.
            ApiError: the service refused.
        """
        body = self._read("Task/Detail", _identifier(handle, "tasktoken"), ("tasklist",))
        return _only_task(body, handle)

    def detail_once(self, handle: RunHandle, whole_s: float) -> Task:
        """As `detail`, in one attempt of at most `whole_s` seconds."""
        identifier = _identifier(handle, "tasktoken")
        answer = self._post("Task/Detail", identifier, ("tasklist",), whole_s=whole_s)
        return _only_task(answer, handle)

    def list_tasks(self, *, limit: int = 20, start: int = 0, model: str = "") -> list[Task]:
        """The account's newest tasks; `model` is (a part of) a slug."""
        records = self.list_records(limit=limit, start=start, model=model)
        return [parse_task(record) for record in _mappings(records)]

    def list_records(self, *, limit: int = 20, start: int = 0, model: str = "") -> list[Any]:
        """As `list_tasks`, but as the service sends them: what is not an object keeps its place."""
        body = _list_body(limit, start, model)
        records = self._read("Task/List", body, ("tasklist", "total")).get("tasklist")
        return records if isinstance(records, list) else []

    def newest_task(self) -> str:
        """The id of the account's newest task, asked for once: "0" if there is none.

        Returns:
            "" if the list cannot be read, or does not tell.
        """
        try:
            answer = self._post("Task/List", _list_body(PAGE_TASKS), ("tasklist", "total"))
        except (TransportError, ApiError):
            return ""
        tasks = answer.get("tasklist")
        if not isinstance(tasks, list):
            return ""
        return newest_id([parse_task(t if isinstance(t, Mapping) else {}) for t in tasks])

    def cancel(self, handle: RunHandle) -> None:
        """Cancel a task that is still queued; the body is the task id alone."""
        taskid = handle.taskid or self.detail(handle).taskid
        self._read("Task/Cancel", {"taskid": taskid}, ("tasklist",))

    def kill(self, handle: RunHandle) -> None:
        """End a task that a worker has taken."""
        body = _identifier(handle, "socketaccesstoken", prefer_token=False)
        self._read("Task/Kill", body, ("tasklist",))

    def delete_files(self, handle: RunHandle) -> None:
        """Remove inputs and outputs of an ended task from the service; the record stays."""
        token = handle.token or self.detail(handle).token
        self._read("Task/InputOutputDelete", {"tasktoken": token}, ())

    def create_folder(self, name: str, parent: str = "") -> Mapping[str, Any]:
        """Make a folder.

        Returns:
            Its record, with "id".

        Raises:
            ConfigError: a name with anything but letters, digits, "_" and "-".
            NotFoundError: the answer names no folder.
        """
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise ConfigError(
                f"Folder name {name!r} may hold letters, digits, _ and - only: choose another."
            )
        body = {"name": name, **({"parentid": parent} if parent else {})}
        record = _first_of(self._post("File/FolderCreate", body, ("list", "id")), "list")
        if not id_of(record.get("id")):
            raise NotFoundError("Wiro's answer names no folder: try again.", code=1, status=200)
        return record

    def upload(self, part: FilePart, folder: str = "") -> Mapping[str, Any]:
        """Upload a file once; returns its record with "url". Never repeated by itself."""
        body = {"folderid": folder} if folder else {}
        answer = self._post("File/Upload", body, ("list",), [("file", part)], read_s=UPLOAD_S)
        return _first_of(answer, "list")

    def model_detail(self, model: Model) -> Mapping[str, Any]:
        """Read what the service says of a model.

        Returns:
            Its record: parameters, price, texts.

        Raises:
            NotFoundError: it has no such model, in either spelling.
        """
        for spelling in dict.fromkeys((model, model.clean)):
            body = {"slugowner": spelling.owner, "slugproject": spelling.project}
            with contextlib.suppress(NotFoundError):
                return _first_of(self._read("Tool/Detail", body, ("tool",)), "tool")
        raise NotFoundError(
            f"Wiro has no model {model}: take owner/project from the URL of its page.",
            code=1,
            status=200,
        )

    def list_models(self, search: str = "", *, limit: int = 20) -> list[Mapping[str, Any]]:
        """Models whose name or text fits a search."""
        body = {
            "start": "0",
            "limit": str(limit),
            "search": search,
            "sort": "relevance",
            "order": "DESC",
            "hideworkflows": True,
            "summary": True,
        }
        return _mappings(self._read("Tool/List", body, ("tool", "total")).get("tool"))

    def poll_pause_s(self, elapsed_s: float) -> float:
        """Seconds between two polls, that long into a wait."""
        pause = next(every for until, every in POLL_SCHEDULE if elapsed_s < until)
        return pause * self._rng.uniform(0.8, 1.2)

    def retry_wait_s(self, attempt: int, error: Exception) -> float:
        """Seconds before another attempt after a failure that may pass."""
        return wait_s(attempt, error, self._rng)

    def _post(
        self,
        path: str,
        body: Mapping[str, Any],
        payload_keys: Sequence[str],
        files: Sequence[tuple[str, FilePart]] = (),
        **options: Any,
    ) -> dict[str, Any]:
        """Send once; options as for `transport.post`."""
        return post(
            self.session,
            f"{self.base_url}/{path}",
            self._auth,
            body=body,
            files=files,
            payload_keys=payload_keys,
            sleep=self.sleep_in_call,
            **options,
        )

    def _read(
        self, path: str, body: Mapping[str, Any], payload_keys: Sequence[str]
    ) -> dict[str, Any]:
        """A call that may be repeated, and is."""
        end = self.clock() + READ_PATIENCE_S
        for attempt in range(1, READ_ATTEMPTS):
            try:
                return self._post(path, body, payload_keys)
            except (TransportError, ApiError) as error:
                wait = wait_s(attempt, error, self._rng)
                if not is_passing(error) or self.clock() + wait > end:
                    raise
                self.sleep(wait)
        return self._post(path, body, payload_keys)

    # --- run ------------------------------------------------------------------------------------

    def run(
        self,
        model: Model,
        parameters: Mapping[str, Any],
        files: Sequence[tuple[str, FilePart]] = (),
        *,
        known: Callable[[], Collection[str]] = frozenset,
        claim: Callable[[str, bool], bool] = accept,
        before_sending: Callable[[str], None] = noop,
        on_answer: Callable[[RunHandle], None] = noop,
        on_refusal: Callable[[], None] = noop,
    ) -> RunHandle:
        """Start a task, once.

        The id of the newest task is read first: what a lost Run has made is newer. Ids are compared
        with ids, so no clock matters.

        Args:
            model: what to run.
            parameters: every parameter of the model's schema; "" for texts that are not used.
            files: (parameter, part) of local files; the request is multipart then.
            known: returns the ids of tasks that belong to other runs.
            claim: takes a task for this run (its id, whether its files prove it); False if another
                run may own it.
            before_sending: called in each attempt when all but the end of the request has left,
                with the id that `newest_task` returned; if it raises, the end does not leave and no
                task is made.
            on_answer: called with the identifiers in the answer, also if the caller has left
                meanwhile.
            on_refusal: called, as `on_answer`, if the answer says that no task was made.

        Returns:
            The task's identifiers.

        Raises:
            RunOutcomeUnknownError: the request left, and neither an answer nor the list of tasks
                says what became of it. Do not run again without asking.
            ApiError: the service refused it; no task was made.
            TransportError: it never left, or was refused on the way; no task was made.
        """
        sent = SentRun(model, parameters, files, self.newest_task())
        spellings = list(dict.fromkeys((model, model.clean)))
        attempt = 1
        has_left = False

        def leave() -> None:
            nonlocal has_left
            before_sending(sent.baseline)
            has_left = True

        def note_answer(answer: Mapping[str, Any]) -> None:
            if (handle := self._handle_of(answer)).taskid:
                on_answer(handle)

        def note_refusal(error: TransportError | ApiError) -> None:
            if has_left and _is_refusal(error):
                on_refusal()

        while True:
            has_left = False
            try:
                answer = self._post(
                    _run_path(spellings[0]),
                    parameters,
                    ("taskid", "socketaccesstoken"),
                    files,
                    read_s=UPLOAD_S if files else RUN_S,
                    before_last_byte=leave,
                    on_answer=note_answer,
                    on_error=note_refusal,
                )
            except (TransportError, ApiError) as error:
                if has_left and not _is_refusal(error):
                    return self._find_lost(sent, error, known, claim)
                if isinstance(error, NotFoundError) and len(spellings) > 1:
                    del spellings[0]  # no task was made; the slug has another spelling
                    continue
                if has_left or attempt >= RUN_ATTEMPTS or not _may_resend(error):
                    raise
                self.sleep(wait_s(attempt, error, self._rng))
                attempt += 1
                continue
            handle = self._handle_of(answer)
            if handle.taskid or handle.token:
                return handle
            return self._find_lost(sent, WiroError("the answer named no task"), known, claim)

    def find_run(
        self,
        sent: SentRun,
        *,
        known: Callable[[], Collection[str]] = frozenset,
        claim: Callable[[str, bool], bool] = accept,
    ) -> RunHandle:
        """Find the task of a Run that a program sent and did not live to see answered.

        Args:
            sent: that Run. Without a baseline no task is taken for it.
            known: returns, before each look, the ids of tasks that belong to other runs; may raise
                to end the search.
            claim: as for `run`.

        Returns:
            The task's identifiers.

        Raises:
            RunOutcomeUnknownError: no task, or several, may be it, or none is proved to be.
        """
        cause = WiroError("the program that sent it ended before the answer")
        return self._find_lost(sent, cause, known, claim)

    def _find_lost(
        self,
        sent: SentRun,
        cause: WiroError,
        known: Callable[[], Collection[str]],
        claim: Callable[[str, bool], bool],
    ) -> RunHandle:
        task = find_lost_run(self, sent, cause, known, claim)
        return RunHandle(task.taskid, task.token, self.now())

    def _handle_of(self, answer: Mapping[str, Any]) -> RunHandle:
        taskid, token = id_of(answer.get("taskid")), token_of(answer.get("socketaccesstoken"))
        return RunHandle(taskid, token, self.now())

    # --- watch and stop -------------------------------------------------------------------------

    def watch(
        self,
        handle: RunHandle,
        *,
        timeout_s: float = WATCH_S,
        socket: "ProgressSocket | None" = None,
    ) -> Iterator[Task]:
        """Records of a task as they change, until the one that ends it.

        Failures that may pass are waited through; what will not pass is raised, with the task's id.
        Leaving the loop stops nothing.

        Args:
            handle: of the task.
            timeout_s: longest wait; the last poll may end `LAST_POLL_S` after it.
            socket: of the same task; while it reports on the task polls are rare, and a frame that
                announces another status brings the next one forward.

        Returns:
            An iterator of records, which raises:
            TaskTimeoutError: the wait is over; carries both identifiers, to go on later.
            TaskStalledError: the task stands still on an error of its own.
            NotFoundError: the service does not know it, several times in a row if it once did.
        """
        return _Watch(self, handle, check_wait(timeout_s), socket).records()

    def stop(self, handle: RunHandle) -> Task:
        """Cancel or kill a task, as its status requires, until the service says it has ended.

        Returns:
            The final record; a task that had ended by itself is returned as it is.

        Raises:
            WiroError: it still runs after several rounds.
        """
        reason = ""
        task = self.detail(handle)
        for _ in range(STOP_ROUNDS):
            if task.is_terminal:
                return task
            handle = RunHandle(task.taskid or handle.taskid, task.token or handle.token)
            try:
                (self.cancel if task.status == QUEUED else self.kill)(handle)
            except ApiError as error:  # a worker took it meanwhile, or it is between two states
                reason = str(error)
                if task.status == QUEUED:
                    with contextlib.suppress(ApiError):
                        self.kill(handle)
            task = self.detail(handle)
            if not task.is_terminal:
                self.sleep(STOP_WAIT_S)
                task = self.detail(handle)
        if task.is_terminal:
            return task
        raise WiroError(
            f"Task {handle.taskid} could not be stopped ({reason or 'it goes on'}): stop it in the "
            "Wiro dashboard.",
            taskid=handle.taskid,
        )


class _Watch:
    """One wait for a task, and what its polls have shown so far."""

    def __init__(
        self, client: Client, handle: RunHandle, timeout_s: float, socket: "ProgressSocket | None"
    ) -> None:
        self._client, self._handle, self._socket = client, handle, socket
        self._timeout_s = timeout_s
        self._start = client.clock()
        self._settled_at = self._start + self._settling_s()
        # whoever has both identifiers, or the time of the Run, has them from the service
        self._is_known = handle.started_at is not None or bool(handle.taskid and handle.token)
        self._changed_at, self._last = self._start, ("", "")
        self._failures = self._misses = self._empty_reads = 0
        self._trouble = ""

    def records(self) -> Iterator[Task]:
        """Poll until the task has ended or the time is over."""
        clock = self._client.clock
        while True:
            task, pause_s = self._poll()
            now = clock()
            left = self._start + self._timeout_s - now
            usual_s = 0.0
            if task is not None:
                if may_lag(task) and self._empty_reads < NO_OUTPUT_READS and left > 0:
                    self._empty_reads += 1  # the record may lag behind its files
                    self._client.sleep(NO_OUTPUT_WAIT_S)
                    continue
                yield task
                if task.is_terminal:
                    return
                self._check_stalled(task, now)
                pause_s = usual_s = self._client.poll_pause_s(now - self._start)
                if self._socket is not None and self._socket.is_healthy:
                    pause_s = max(usual_s, WATCHDOG_S)
            if left <= 0:
                raise self._timeout()
            self._pause(min(pause_s, left), usual_s)

    def _poll(self) -> tuple[Task | None, float]:
        """The record, or None and the seconds to wait after a failure that may pass."""
        left = self._start + self._timeout_s - self._client.clock()
        try:
            task = self._client.detail_once(self._handle, max(0.0, left) + LAST_POLL_S)
        except WiroError as error:
            return None, self._after_failure(error)
        self._failures, self._misses, self._trouble = 0, 0, ""
        self._is_known = True
        self._handle = RunHandle(
            task.taskid or self._handle.taskid,
            task.token or self._handle.token,
            self._handle.started_at,
        )
        if (task.status, task.error_log) != self._last:
            self._last, self._changed_at = (task.status, task.error_log), self._client.clock()
        return task, 0.0

    def _after_failure(self, error: WiroError) -> float:
        """Seconds until the next try; raises what will not pass, with the task's id."""
        passes = is_passing(error)
        if isinstance(error, NotFoundError):
            self._misses += self._client.clock() >= self._settled_at
            passes = self._misses <= (MISSES if self._is_known else 0)
        if not passes:
            if self._misses > 1:
                error.args = (f"{error} It answered so {self._misses} times in a row.",)
            advice = "If it runs, it goes on at Wiro: fix this, then collect it by its id."
            add_task(error, self._handle.taskid, advice)
            raise error
        self._failures += 1
        self._trouble = str(error)
        if self._failures == LOGGED_FAILURES:
            logger.warning("The wait for the task goes on. %s", self._trouble)
        return self._client.retry_wait_s(self._failures, error)

    def _check_stalled(self, task: Task, now: float) -> None:
        has_error = task.status == "task_error" and task.error_log
        if has_error and now - self._changed_at >= STALLED_S:
            raise TaskStalledError(
                f"Task {task.taskid} has been in task_error for {STALLED_S:.0f} s: "
                f"{log_tail(task, 200)}. It was not stopped; watch it again, or stop it.",
                task,
            )

    def _timeout(self) -> TaskTimeoutError:
        trouble = f" The last poll failed: {self._trouble}" if self._trouble else ""
        return TaskTimeoutError(
            f"Task {self._handle.taskid or '(by token)'} has not ended after "
            f"{self._timeout_s:.0f} s. It goes on at Wiro: collect it later by its id.{trouble}",
            taskid=self._handle.taskid,
            handle=self._handle,
        )

    def _pause(self, seconds: float, usual_s: float) -> None:
        """Sleep, but with a socket no longer than until it announces another status.

        Args:
            seconds: longest pause.
            usual_s: pause without the socket; one that falls silent delays no longer than this.
        """
        client, socket = self._client, self._socket
        if socket is None or self._failures:  # no news shortens the wait after a failure
            client.sleep(seconds)
            return
        start = client.clock()
        client.sleep(min(seconds, SHORTEST_POLL_S))
        while (left := start + seconds - client.clock()) > 0 and not socket.take_news():
            if not socket.is_healthy:
                left = min(left, start + usual_s - client.clock())
                if left <= 0:
                    return
            client.sleep(min(left, SLICE_S))

    def _settling_s(self) -> float:
        """Seconds for which Task/Detail may not know the task yet."""
        if self._handle.started_at is None:
            return 0.0
        since = self._client.now() - self._handle.started_at
        return SETTLING_S - min(max(since, 0.0), SETTLING_S)


def raise_for_failure(task: Task) -> None:
    """Raise unless a task succeeded.

    Raises:
        TaskCancelledError: with the task's id.
        TaskFailedError: with the task's id and the end of its log.
    """
    judged = verdict(task)
    if judged is Verdict.CANCELLED:
        raise TaskCancelledError(f"Task {task.taskid} was cancelled.", task)
    if may_lag(task):
        raise TaskFailedError(
            f"Task {task.taskid} ended {'well' if task.exit_code else 'without an exit code'} and "
            "has no files; they may have been deleted. It may be paid for, so it is not run again "
            "by itself: choose another number in take, or give --again.",
            task,
        )
    if judged is Verdict.FAILED:
        raise TaskFailedError(f"{failure_text(task)}.", task)


def _identifier(handle: RunHandle, token_name: str, *, prefer_token: bool = True) -> dict[str, str]:
    """Exactly one key: the service refuses two."""
    by_token = {token_name: handle.token}
    by_id = {"taskid": handle.taskid}
    if not handle.token and not handle.taskid:
        raise ConfigError("A task needs its id or its token: give one.")
    if prefer_token:
        return by_token if handle.token else by_id
    return by_id if handle.taskid else by_token


def _only_task(body: Mapping[str, Any], handle: RunHandle) -> Task:
    """The record that was asked for; another task's is no answer."""
    tasks = body.get("tasklist")
    if not isinstance(tasks, list) or not tasks or not isinstance(tasks[0], Mapping):
        raise NotFoundError("Wiro knows no such task (yet).", code=1, status=200)
    task = parse_task(tasks[0])
    if handle.taskid and task.taskid and task.taskid != handle.taskid:
        raise TransportError(
            f"Wiro was asked for task {handle.taskid} and answered with another, {task.taskid}: "
            "try again later.",
            status=200,
        )
    return task


def _mappings(value: object) -> list[Mapping[str, Any]]:
    return [each for each in value if isinstance(each, Mapping)] if isinstance(value, list) else []


def _first_of(body: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    items = body.get(key)
    if isinstance(items, list) and items and isinstance(items[0], Mapping):
        return items[0]
    if body.get("id"):
        return body
    raise NotFoundError(f"Wiro's answer holds no {key}.", code=1, status=200)


def _list_body(limit: int, start: int = 0, model: str = "") -> dict[str, str]:
    body = {
        "type": "model",
        "sort": "id",
        "order": "DESC",
        "start": str(start),
        "limit": str(limit),
    }
    return {**body, "modelName": model} if model else body


def _run_path(model: Model) -> str:
    return f"Run/{quote(model.owner, safe='')}/{quote(model.project, safe='')}"


def _may_resend(error: TransportError | ApiError) -> bool:
    """Whether a Run that never left may succeed at the next try."""
    return isinstance(error, TransportError) and is_passing(error) and error.status != 429


def _is_refusal(error: TransportError | ApiError) -> bool:
    """Whether an answer to a Run says for sure that no task was made.

    A gateway may give up on a Run that is carried out all the same, and answers with a status and a
    body of its own; only a refusal in the service's own form counts.

    Returns:
        False if a task may have been made.
    """
    status = error.status
    if status in NOTHING_MADE:
        return True
    if status is None or status == 408 or status >= 500 or not isinstance(error, ApiError):
        return False
    return error.is_own and not is_passing(error)
