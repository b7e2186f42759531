"""Everything the client raises.

    WiroError
    ├── DependencyError        a package is missing
    ├── ConfigError            no key, a key that cannot be one, an address that is not allowed
    ├── LimitError             the run would pass a spending limit; nothing was sent
    ├── TransportError         no usable answer: connection, time-out, server error, not JSON
    ├── ApiError               the service said no; .code and .status tell how
    │   ├── AuthError          401, 403, code 99: key, secret, signature or IP list
    │   ├── NotFoundError      code 1: task, model or file unknown, or in another state
    │   ├── ConcurrencyError   code 96: too many tasks at once, none was made
    │   ├── BalanceError       code 97: not enough money, none was made
    │   ├── AccountError       code 98: the model wants a registered account
    │   └── RequestError       code 0 for good: parameters, permission, team, suspension
    ├── RunOutcomeUnknownError a Run was sent, and no answer says whether a task was made
    ├── TaskFailedError        the task ended without success
    ├── TaskCancelledError     the task was cancelled or killed
    ├── TaskTimeoutError       the wait is over, the task is not: resumable
    ├── TaskStalledError       a task that waits on an error of its own: resumable
    └── DownloadError          a result that cannot be fetched or is not what was announced

An error about a task carries its id in `taskid`, and names it. No message holds a key, a signature
or a task token.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from .task import Task


class WiroError(Exception):
    """Base of all errors; `taskid` is "" unless the error is about one task.

    Tracebacks and ComfyUI's error report name the class without the path of this module, which says
    nothing to who reads them: hence `__module__`, and `__reduce__` so that other processes find it.
    """

    __module__ = "builtins"

    def __init_subclass__(cls) -> None:
        cls.__module__ = "builtins"

    def __init__(self, message: str, *, taskid: str = "") -> None:
        super().__init__(message)
        self.taskid = taskid

    def __reduce__(self) -> tuple[object, ...]:
        return _again, (type(self).__name__, self.args, self.__dict__)


def _again(name: str, args: tuple[str, ...], state: dict[str, object]) -> WiroError:
    """An error as it was before it was pickled."""
    kind = globals()[name]
    error: WiroError = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


def add_task(error: WiroError, taskid: str, advice: str = "") -> None:
    """Make an error one about a task: set its `taskid`, and name the task in its text."""
    if taskid and not error.taskid:
        error.taskid = taskid
    if taskid and taskid not in str(error):
        error.args = (f"{error} It is about task {taskid}. {advice}".rstrip(),)


class DependencyError(WiroError):
    """A package is missing."""


class ConfigError(WiroError):
    """No key, a key that cannot be one, or an address that is not allowed."""


class LimitError(WiroError):
    """The run would pass a spending limit; nothing was sent."""


class TransportError(WiroError):
    """No usable answer came.

    status: of HTTP, or None. was_sent: False if the request surely never left.
    retry_after_s: what the server asked for, or None.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        was_sent: bool = True,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.was_sent, self.retry_after_s = status, was_sent, retry_after_s


class ApiError(WiroError):
    """The service refused, or failed in a way of its own (code 0 may pass).

    is_own: whether the answer was a refusal in the service's documented shape, which nothing
    between it and us would write.
    """

    def __init__(self, message: str, *, code: int, status: int, is_own: bool = False) -> None:
        super().__init__(message)
        self.code, self.status, self.is_own = code, status, is_own


class AuthError(ApiError):
    """Key, secret, signature or IP list."""


class NotFoundError(ApiError):
    """Task, model or file unknown, or a task in another state."""


class ConcurrencyError(ApiError):
    """Too many tasks at once; none was made."""

    CODE = 96


class BalanceError(ApiError):
    """Not enough money; no task was made."""


class AccountError(ApiError):
    """The model wants a registered account."""


class RequestError(ApiError):
    """Parameters, permission, team or suspension: the same request will not succeed."""


class RunOutcomeUnknownError(WiroError):
    """A Run was sent, and whether a task was made is unknown; it must not be resent unless asked.

    candidates: tasks that may be it.
    """

    def __init__(self, message: str, candidates: Sequence["Task"]) -> None:
        super().__init__(message)
        self.candidates = tuple(candidates)


class _TaskError(WiroError):
    def __init__(self, message: str, task: "Task") -> None:
        super().__init__(message, taskid=task.taskid)
        self.task = task


class TaskFailedError(_TaskError):
    """The task ended without success; `task` has its log."""


class TaskCancelledError(_TaskError):
    """The task was cancelled or killed."""


class TaskTimeoutError(WiroError):
    """The wait is over, the task is not; nothing was stopped.

    handle: both identifiers, for `Client.watch`.
    """

    def __init__(self, message: str, *, taskid: str, handle: object) -> None:
        super().__init__(message, taskid=taskid)
        self.handle = handle


class TaskStalledError(_TaskError):
    """The task has stood still on an error for a while; nothing was stopped."""


class DownloadError(WiroError):
    """A result that cannot be fetched or is not what was announced; its task is done and paid.

    reason: why, without the sentence around it. task, paths: if some files of it are here, its
    record and these. missing: names of the others.
    """

    def __init__(
        self,
        message: str,
        *,
        taskid: str = "",
        reason: str = "",
        task: "Task | None" = None,
        paths: Sequence["Path"] = (),
        missing: Sequence[str] = (),
    ) -> None:
        super().__init__(message, taskid=taskid)
        self.reason, self.task = reason or message, task
        self.paths, self.missing = tuple(paths), tuple(missing)


CODES: Mapping[int, type[ApiError]] = {
    1: NotFoundError,
    ConcurrencyError.CODE: ConcurrencyError,
    97: BalanceError,
    98: AccountError,
    99: AuthError,
}
