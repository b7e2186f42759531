"""Client of wiro.ai: start a model, follow it, stop it, bring its result home.

    from wiro_api import Client, Model, download, load_credentials, raise_for_failure

    client = Client(load_credentials())
    handle = client.run(Model.parse("wiro/SkyReels-V1"), parameters, files)
    *_, task = client.watch(handle)
    raise_for_failure(task)
    paths = [download(output, folder, taskid=task.taskid) for output in task.outputs]

A Run costs money: it is never sent twice unless the first surely never left. Usable without torch
and without ComfyUI.
"""

from .client import Client, Model, RunHandle, raise_for_failure
from .errors import (
    AccountError,
    ApiError,
    AuthError,
    BalanceError,
    ConcurrencyError,
    ConfigError,
    DownloadError,
    NotFoundError,
    RequestError,
    RunOutcomeUnknownError,
    TaskCancelledError,
    TaskFailedError,
    TaskStalledError,
    TaskTimeoutError,
    TransportError,
    WiroError,
)
from .files import download
from .signing import Credentials, load_credentials, save_credentials, sign
from .task import Output, Progress, Task, Verdict, parse_progress, parse_task, verdict

__all__ = [
    "AccountError",
    "ApiError",
    "AuthError",
    "BalanceError",
    "Client",
    "ConcurrencyError",
    "ConfigError",
    "Credentials",
    "DownloadError",
    "Model",
    "NotFoundError",
    "Output",
    "Progress",
    "RequestError",
    "RunHandle",
    "RunOutcomeUnknownError",
    "Task",
    "TaskCancelledError",
    "TaskFailedError",
    "TaskStalledError",
    "TaskTimeoutError",
    "TransportError",
    "Verdict",
    "WiroError",
    "download",
    "load_credentials",
    "parse_progress",
    "parse_task",
    "raise_for_failure",
    "save_credentials",
    "sign",
    "verdict",
]
