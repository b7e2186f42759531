"""Client of wiro.ai: start a model, follow it, stop it, download its result.

    from pathlib import Path
    from wiro_api import (
        Client, Job, Journal, Model, finish, load_credentials, quote, read_part, read_record, start,
        to_handle,
    )

    client, journal = Client(load_credentials()), Journal(Path("journal.sqlite"))
    values = {"prompt": "FPS-24, a cat turns its head", "size": "960x544"}
    files = [("inputImage", read_part(Path("cat.png")))]
    job = Job(Model.parse("wiro/SkyReels-V1"), values, files)
    entry = start(client, journal, job, quote(read_record(client, job.model), job))
    task, paths = finish(client, to_handle(entry), Path("out"), journal=journal, entry_id=entry.id)

A Run costs money: it is never sent twice unless the first surely never left, and the journal finds
a job again after a crash instead of paying for it again. Usable without torch and without ComfyUI.
"""

from .client import Client, raise_for_failure
from .errors import (
    AccountError,
    ApiError,
    AuthError,
    BalanceError,
    ConcurrencyError,
    ConfigError,
    DependencyError,
    DownloadError,
    LimitError,
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
from .files import download, read_part
from .handles import Model, RunHandle
from .jobs import Job, Quote, finish, quote, read_record, start, to_handle
from .journal import Entry, Journal
from .listener import RunListener
from .signing import Credentials, load_credentials, save_credentials, sign
from .spending import Limits, Price
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
    "DependencyError",
    "DownloadError",
    "Entry",
    "Job",
    "Journal",
    "LimitError",
    "Limits",
    "Model",
    "NotFoundError",
    "Output",
    "Price",
    "Progress",
    "Quote",
    "RequestError",
    "RunHandle",
    "RunListener",
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
    "finish",
    "load_credentials",
    "parse_progress",
    "parse_task",
    "quote",
    "raise_for_failure",
    "read_part",
    "read_record",
    "save_credentials",
    "sign",
    "start",
    "to_handle",
    "verdict",
]
