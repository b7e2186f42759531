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
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import requests

from .candidates import is_stored, may_be, newest_id, number_of, stored_files
from .errors import (
    ApiError,
    ConfigError,
    NotFoundError,
    RunOutcomeUnknownError,
    TaskCancelledError,
    TaskFailedError,
    TaskStalledError,
    TaskTimeoutError,
    TransportError,
    WiroError,
    tell_task,
)
from .signing import Credentials, WiroAuth, account_of, nonces_of
from .task import QUEUED, Task, Verdict, failure_text, log_tail, may_lag, parse_task, verdict
from .transport import (
    BASE_URL,
    READ_S,
    RUN_S,
    UPLOAD_S,
    FilePart,
    check_base_url,
    in_time,
    is_passing,
    make_session,
    nothing,
    post,
    wait_s,
)
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
#: failures of polls in a row, of which one is told
TOLD_FAILURES = 3
#: a stored "task_error" that stands still this long with a log is reported
STALLED_S = 120.0
#: seconds after which an unknown Run is looked for
RECONCILE_AT_S = (2.0, 5.0, 10.0, 20.0, 30.0)
#: tasks of one look at the list, and the most pages of it
PAGE_TASKS, MAX_PAGES = 20, 5
#: seconds, from the first look, after which no stored file is fetched any more
PROOF_S = 120.0
#: answers to a Run that say that nothing was made, whoever gives them
NOTHING_MADE = frozenset({*range(300, 400), 401, 403, 404, 405, 413, 429})
STOP_ROUNDS, STOP_WAIT_S = 3, 2.0
NO_OUTPUT_READS, NO_OUTPUT_WAIT_S = 3, 2.0


def always(*_: object) -> bool:
    """Agree."""
    return True


def check_wait(seconds: float) -> float:
    """A longest wait in seconds.

    Raises:
        ConfigError: it is no number, not finite, or not above 0.
    """
    if not isinstance(seconds, int | float) or not (math.isfinite(seconds) and seconds > 0):
        raise ConfigError(f"{seconds!r} is no longest wait: give a time above 0, as 600 seconds.")
    return seconds


@dataclass(frozen=True)
class RunHandle:
    """Both identifiers of a task; either may be "". Keep it before anything else is done.

    started_at: Unix seconds of the Run, or None for a handle made later.
    """

    taskid: str
    token: str = field(repr=False)
    started_at: float | None = None

    @classmethod
    def parse(cls, text: str) -> "RunHandle":
        """A handle of what a person types: a task id, or "token:" and a task token."""
        text = text.strip()
        if text.startswith("token:"):
            return cls("", text.removeprefix("token:"))
        if not (text.isascii() and text.isdigit()):  # not quoted: it may be a token
            raise ConfigError("This is not a task: give the id (digits), or token:<task token>.")
        return cls(text, "")


@dataclass(frozen=True)
class Model:
    """Owner and project of a model, as its page's address says."""

    owner: str
    project: str

    @classmethod
    def parse(cls, slug: str) -> "Model":
        """A model of "owner/project"; blanks and capitals are kept."""
        owner, _, project = slug.strip().strip("/").partition("/")
        if not owner.strip() or not project.strip() or "/" in project:
            raise ConfigError(f"{slug!r} is not a model: give owner/project, as wiro/SkyReels-V1.")
        return cls(owner.strip(), project.strip())

    @property
    def clean(self) -> "Model":
        """Lower case with hyphens, the service's other spelling."""
        return Model(*(re.sub(r"[^a-z0-9]+", "-", part.lower()).strip("-") for part in
                       (self.owner, self.project)))  # fmt: skip

    def __str__(self) -> str:
        return f"{self.owner}/{self.project}"


class Client:
    """Talks to one account. Threads may share it.

    Args:
        credentials: from `load_credentials`.
        base_url: https, or http for this machine only.
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
        base_url: str = BASE_URL,
        session: requests.Session | None = None,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
        interruptible: bool = False,
    ) -> None:
        self.base_url = check_base_url(base_url)
        self.account = account_of(credentials)
        self._interruptible = interruptible
        self._auth = WiroAuth(credentials, nonces_of(now))
        self._session = session or make_session()
        weakref.finalize(self, self._session.close)  # for clients that nobody closes
        self.sleep, self.clock, self._now = sleep, clock, now
        self._rng = random.Random()

    @property
    def secrets(self) -> tuple[str, ...]:
        """What no file and no message may hold."""
        return self._auth.secrets

    def close(self) -> None:
        """Let go of the connections; a call after that makes new ones."""
        self._session.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- calls ----------------------------------------------------------------------------------

    def detail(self, handle: RunHandle) -> Task:
        """The record of a task, by its token if there is one.

        Raises:
            NotFoundError: there is no such task (yet). TransportError, ApiError: see errors.py.
        """
        body = self._read("Task/Detail", _identifier(handle, "tasktoken"), ("tasklist",))
        return _only_task(body, handle)

    def list_tasks(self, *, limit: int = 20, start: int = 0, model: str = "") -> list[Task]:
        """The account's newest tasks; `model` is (a part of) a slug."""
        body = _list_body(limit, start, model)
        tasks = self._read("Task/List", body, ("tasklist", "total")).get("tasklist")
        return [parse_task(task) for task in _mappings(tasks)]

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
        """Make a folder; returns its record with "id".

        Raises:
            ConfigError: a name with anything but letters, digits, "_" and "-".
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
        """What the service says of a model: parameters, price, texts.

        Raises:
            NotFoundError: it has no such model, in either spelling.
        """
        for spelling in dict.fromkeys((model, model.clean)):
            body = {"slugowner": spelling.owner, "slugproject": spelling.project}
            with contextlib.suppress(NotFoundError):
                return _first_of(self._read("Tool/Detail", body, ("tool",)), "tool")
        raise NotFoundError(
            f"Wiro has no model {model}: take owner/project from the address of its page.",
            code=1, status=200,
        )  # fmt: skip

    def list_models(self, search: str = "", *, limit: int = 20) -> list[Mapping[str, Any]]:
        """Models whose name or text fits a search."""
        body = {"start": "0", "limit": str(limit), "search": search, "sort": "relevance",
                "order": "DESC", "hideworkflows": True, "summary": True}  # fmt: skip
        return _mappings(self._read("Tool/List", body, ("tool", "total")).get("tool"))

    def _post(
        self,
        path: str,
        body: Mapping[str, Any],
        payload_keys: Sequence[str],
        files: Sequence[tuple[str, FilePart]] = (),
        read_s: float = READ_S,
        before_last_byte: Callable[[], None] | None = None,
        on_answer: Callable[[Mapping[str, Any]], None] | None = None,
        on_error: Callable[[TransportError | ApiError], None] | None = None,
        whole_s: float | None = None,
    ) -> dict[str, Any]:
        return post(
            self._session, f"{self.base_url}/{path}", self._auth, body=body, files=files,
            read_s=read_s, payload_keys=payload_keys, before_last_byte=before_last_byte,
            on_answer=on_answer, on_error=on_error, whole_s=whole_s,
            sleep=self.sleep if self._interruptible else None,
        )  # fmt: skip

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
        claim: Callable[[str, bool], bool] = always,
        before_sending: Callable[[str], None] = nothing,
        on_answer: Callable[[RunHandle], None] = nothing,
        on_refusal: Callable[[], None] = nothing,
    ) -> RunHandle:
        """Start a task, once.

        The id of the newest task is read first: what a lost Run has made is newer. Ids are compared
        with ids, so no clock matters.

        Args:
            parameters: every parameter of the model's schema; "" for texts that are not used.
            files: (parameter, part) of local files; the request is multipart then.
            known: tells the ids of tasks that are of other runs.
            claim: takes a task for this run (its id, whether its files prove it); False if that may
                not be.
            before_sending: called in each attempt when all but the end of the request has left,
                with the id that `newest_task` gave; what it raises keeps the end from leaving, and
                so the task from being made.
            on_answer: called with what the service named, also if the caller has left meanwhile.
            on_refusal: called, as `on_answer`, with an answer that says that no task was made.
        Raises:
            RunOutcomeUnknownError: it went out, and neither an answer nor the list of tasks tells
                what became of it. Do not run again without asking.
            ApiError, TransportError: it was refused or never left; no task was made.
        """
        baseline = self.newest_task()
        spellings = {model, model.clean}
        spelling = model
        attempt = 1
        has_left = False

        def leave() -> None:
            nonlocal has_left
            before_sending(baseline)
            has_left = True

        def note(answer: Mapping[str, Any]) -> None:
            if (handle := self._handle_of(answer)).taskid:
                on_answer(handle)

        def note_refusal(error: TransportError | ApiError) -> None:
            if has_left and _is_refusal(error):
                on_refusal()

        while True:
            path = f"Run/{quote(spelling.owner, safe='')}/{quote(spelling.project, safe='')}"
            keys = ("taskid", "socketaccesstoken")
            read_s = UPLOAD_S if files else RUN_S
            has_left = False
            try:
                answer = self._post(
                    path, parameters, keys, files, read_s, leave, note, note_refusal
                )
            except (TransportError, ApiError) as error:
                if has_left and not _is_refusal(error):
                    return self._reconcile(
                        model, parameters, files, baseline, error, known=known, claim=claim
                    )
                spellings.discard(spelling)
                if isinstance(error, NotFoundError) and spellings:
                    spelling = spellings.pop()  # no task was made; the slug has another spelling
                    continue
                may_pass = isinstance(error, TransportError) and is_passing(error)
                if has_left or not may_pass or error.status == 429 or attempt >= RUN_ATTEMPTS:
                    raise
                self.sleep(wait_s(attempt, error, self._rng))
                attempt += 1
                continue
            handle = self._handle_of(answer)
            if handle.taskid or handle.token:
                return handle
            cause = WiroError("the answer named no task")
            return self._reconcile(
                model, parameters, files, baseline, cause, known=known, claim=claim
            )

    def find_run(
        self,
        model: Model,
        parameters: Mapping[str, Any],
        files: Sequence[tuple[str, FilePart]] = (),
        *,
        baseline: str,
        known: Callable[[], Collection[str]] = frozenset,
        claim: Callable[[str, bool], bool] = always,
    ) -> RunHandle:
        """The task of a Run that a program sent and did not live to see answered.

        Args:
            model, parameters, files: of that Run.
            baseline: what `newest_task` gave before it; "" if that is not known, and then no task
                is taken for it.
            known: tells, before each look, the ids of tasks that are of other runs; may raise to
                end the search.
            claim: as for `run`.
        Raises:
            RunOutcomeUnknownError: no task, or several, may be it, or none is proved to be.
        """
        cause = WiroError("the program that sent it ended before the answer")
        return self._reconcile(model, parameters, files, baseline, cause, known=known, claim=claim)

    def _handle_of(self, answer: Mapping[str, Any]) -> RunHandle:
        taskid, token = id_of(answer.get("taskid")), token_of(answer.get("socketaccesstoken"))
        return RunHandle(taskid, token, self._now())

    def _reconcile(
        self,
        model: Model,
        parameters: Mapping[str, Any],
        files: Sequence[tuple[str, FilePart]],
        baseline: str,
        cause: WiroError,
        *,
        known: Callable[[], Collection[str]],
        claim: Callable[[str, bool], bool],
    ) -> RunHandle:
        """Find the task of a Run whose answer was lost; never resends it.

        With files, a task that keeps the same ones is taken at once. Without, the only one that may
        be it is taken, and only at the last look: until then another may come.
        """
        slugs = (str(model), str(model.clean))
        candidates: list[Task] = []
        proofs: dict[str, bool] = {}
        end = time.monotonic() + PROOF_S
        waited = 0.0
        for moment in RECONCILE_AT_S:
            self.sleep(moment - waited)
            waited = moment
            others = known()
            is_last = moment == RECONCILE_AT_S[-1]
            if not is_last and not (baseline and files):
                continue
            try:
                tasks, is_whole = self._newer_tasks(model, baseline)
            except (TransportError, ApiError):
                continue
            candidates = [
                task
                for task in tasks
                if task.taskid not in others and may_be(task, slugs, parameters, files)
            ]
            if not baseline:
                continue
            fit, is_sure = candidates, is_last and is_whole
            if files:
                for task in candidates:
                    if task.taskid not in proofs:
                        proof = self._keeps_files(task, parameters, files, end)
                        if proof is not None:
                            proofs[task.taskid] = proof
                fit = [task for task in candidates if proofs.get(task.taskid)]
                is_sure = is_last or all(task.taskid in proofs for task in candidates)
            if is_sure and len(fit) == 1 and claim(fit[0].taskid, bool(files)):
                return RunHandle(fit[0].taskid, fit[0].token, self._now())
        known()  # the answer may have come at last
        raise RunOutcomeUnknownError(_ask(model, candidates, cause), candidates)

    def _newer_tasks(self, model: Model, baseline: str) -> tuple[list[Task], bool]:
        """The account's tasks after one (with "", the newest), and whether these are all."""
        if not baseline:
            tasks = self.list_tasks(limit=PAGE_TASKS, model=model.project)
            return [task for task in tasks if number_of(task.taskid) is not None], False
        last = int(baseline)
        newer: dict[str, Task] = {}
        for page in range(MAX_PAGES):
            start = page * PAGE_TASKS
            body = _list_body(PAGE_TASKS, start, model.project)
            records = self._read("Task/List", body, ("tasklist", "total")).get("tasklist")
            records = records if isinstance(records, list) else []
            numbers = []
            for record in records:
                task = parse_task(record) if isinstance(record, Mapping) else None
                number = None if task is None else number_of(task.taskid)
                if task is not None and number is not None:
                    numbers.append(number)
                    if number > last:
                        newer[task.taskid] = task
            if len(records) < PAGE_TASKS or (numbers and numbers[-1] <= last):
                return list(newer.values()), True
        return list(newer.values()), False

    def _keeps_files(
        self,
        task: Task,
        parameters: Mapping[str, Any],
        files: Sequence[tuple[str, FilePart]],
        end: float,
    ) -> bool | None:
        """Whether the service stored exactly these files with a task; None if it cannot be told.

        Args:
            end: of the search, by the monotonic clock.
        """
        pairs: list[tuple[str, bytes]] = []
        for name in dict.fromkeys(name for name, _ in files):
            contents = [content for other, (_, content, _) in files if other == name]
            addresses = stored_files(task, parameters, name)
            if len(addresses) != len(contents):
                return False
            pairs += zip(addresses, contents, strict=True)

        def compare() -> bool | None:
            for address, content in pairs:
                found = is_stored(self._session, address, content, self.base_url)
                if not found:
                    return found
            return True

        left = max(0.0, end - time.monotonic())
        try:
            return in_time(compare, left, self.sleep if self._interruptible else None)
        except TransportError:
            return None

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
            timeout_s: longest wait; the last poll may end `LAST_POLL_S` after it.
            socket: of the same task; while it tells of the task polls are rare, and a frame that
                announces another state brings the next one forward.
        Raises:
            TaskTimeoutError: the wait is over, with both identifiers to go on later.
            TaskStalledError: it stands still on an error of its own.
            NotFoundError: the service does not know it, again and again if it once did.
        """
        return self._watch(handle, check_wait(timeout_s), socket)

    def _watch(
        self, handle: RunHandle, timeout_s: float, socket: "ProgressSocket | None"
    ) -> Iterator[Task]:
        start = self.clock()
        settled_at = start + self._settling_s(handle)
        # whoever has both identifiers, or the time of the Run, has them from the service
        is_known = handle.started_at is not None or bool(handle.taskid and handle.token)
        changed_at, last = start, ("", "")
        failures = misses = empty_reads = 0
        trouble = ""
        while True:
            task: Task | None = None
            pause = usual = 0.0
            left = start + timeout_s - self.clock()
            try:
                answer = self._post(
                    "Task/Detail", _identifier(handle, "tasktoken"), ("tasklist",),
                    whole_s=max(0.0, left) + LAST_POLL_S,
                )  # fmt: skip
                task = _only_task(answer, handle)
                failures, misses, trouble = 0, 0, ""
            except WiroError as error:
                passes = is_passing(error)
                if isinstance(error, NotFoundError):
                    misses += self.clock() >= settled_at
                    passes = misses <= (MISSES if is_known else 0)
                if not passes:
                    if misses > 1:
                        error.args = (f"{error} It answered so {misses} times in a row.",)
                    tell_task(
                        error, handle.taskid,
                        "If it runs, it goes on at Wiro: mend this, then collect it by its id.",
                    )  # fmt: skip
                    raise
                failures += 1
                trouble = str(error)
                pause = wait_s(failures, error, self._rng)
                if failures == TOLD_FAILURES:
                    logger.warning("The task is still waited for. %s", trouble)
            now = self.clock()
            left = start + timeout_s - now
            if task is not None:
                is_known = True
                handle = RunHandle(
                    task.taskid or handle.taskid, task.token or handle.token, handle.started_at
                )
                if (task.status, task.error_log) != last:
                    last, changed_at = (task.status, task.error_log), now
                judged = verdict(task)
                if may_lag(task) and empty_reads < NO_OUTPUT_READS and left > 0:
                    empty_reads += 1  # the record may lag behind its files
                    self.sleep(NO_OUTPUT_WAIT_S)
                    continue
                yield task
                if judged is not Verdict.RUNNING:
                    return
                stands = task.status == "task_error" and task.error_log
                if stands and now - changed_at >= STALLED_S:
                    raise TaskStalledError(
                        f"Task {task.taskid} has stood still on an error for {STALLED_S:.0f} s: "
                        f"{log_tail(task, 200)}. It was not stopped; watch it again, or "
                        "stop it.",
                        task,
                    )
                pause = usual = self._poll_pause(now - start)
                if socket is not None and socket.is_healthy:
                    pause = max(usual, WATCHDOG_S)
            if left <= 0:
                raise TaskTimeoutError(
                    f"Task {handle.taskid or '(by token)'} has not ended after {timeout_s:.0f} s. "
                    "It goes on at Wiro: collect it later by its id."
                    + (f" The last look at it failed: {trouble}" if trouble else ""),
                    taskid=handle.taskid,
                    handle=handle,
                )
            # news cannot bring forward what a failure or politeness holds back
            self._pause(min(pause, left), usual, socket if failures == 0 else None)

    def _pause(self, seconds: float, usual: float, socket: "ProgressSocket | None") -> None:
        """Sleep, but with a socket no longer than to the news of another state.

        Args:
            usual: without the socket; a socket that falls silent holds back no longer than this.
        """
        if socket is None:
            self.sleep(seconds)
            return
        start = self.clock()
        self.sleep(min(seconds, SHORTEST_POLL_S))
        while (left := start + seconds - self.clock()) > 0 and not socket.take_news():
            if not socket.is_healthy:
                left = min(left, start + usual - self.clock())
                if left <= 0:
                    return
            self.sleep(min(left, SLICE_S))

    def _settling_s(self, handle: RunHandle) -> float:
        """Seconds for which a task may still be on its way into the service's books."""
        if handle.started_at is None:
            return 0.0
        since = self._now() - handle.started_at
        return SETTLING_S - min(max(since, 0.0), SETTLING_S)

    def _poll_pause(self, elapsed: float) -> float:
        pause = next(every for until, every in POLL_SCHEDULE if elapsed < until)
        return pause * self._rng.uniform(0.8, 1.2)

    def stop(self, handle: RunHandle) -> Task:
        """Cancel or kill a task, whichever its state demands, until the service says it has ended.

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


def raise_for_failure(task: Task) -> None:
    """Nothing for a task that succeeded.

    Raises:
        TaskCancelledError, TaskFailedError: with the task's id and the end of its log.
    """
    judged = verdict(task)
    if judged is Verdict.CANCELLED:
        raise TaskCancelledError(f"Task {task.taskid} was cancelled.", task)
    if may_lag(task):
        raise TaskFailedError(
            f"Task {task.taskid} ended {'well' if task.exit_code else 'without an exit code'} and "
            "has no files; they may have been deleted. It may be paid for, so it is not run again "
            "unasked: choose another number in take, or --again.",
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
    body = {"type": "model", "sort": "id", "order": "DESC",
            "start": str(start), "limit": str(limit)}  # fmt: skip
    return {**body, "modelName": model} if model else body


def _is_refusal(error: TransportError | ApiError) -> bool:
    """Whether an answer to a Run says for sure that no task was made.

    A gateway may give up on a Run that is carried out all the same, and answers with a status and a
    body of its own; only what the service itself says plainly is taken for a no.
    """
    status = error.status
    if status in NOTHING_MADE:
        return True
    if status is None or status == 408 or status >= 500 or not isinstance(error, ApiError):
        return False
    return error.is_own and not is_passing(error)


def _ask(model: Model, candidates: Sequence[Task], cause: WiroError) -> str:
    """What a person must decide, and how."""
    start = f"The run of {model} was sent and its outcome is unknown ({cause}). "
    not_there = (
        '--again on the command line, or "It did not start" in ComfyUI\'s Wiro panel and queue it '
        "again"
    )
    if not candidates:
        return (
            f"{start}Tasks that may be it: none. Look at the list of tasks before running again: "
            "if it was started after all, it would be paid twice. If a task of that minute is "
            "there, collect it by its id (collect ID on the command line, Wiro Task Result in "
            f"ComfyUI). If none is: {not_there}."
        )
    ids = ", ".join(task.taskid for task in candidates)
    return (
        f"{start}Tasks that may be it: {ids}; nothing proves which. Look at them before running "
        "again, or it may be paid twice: one that is yours is collected by its id (collect ID on "
        f"the command line, Wiro Task Result in ComfyUI). If none is yours: {not_there}."
    )
