"""When ComfyUI starts, download the results of tasks that were left running at Wiro.

Off unless the setting is on, and without network traffic unless there are a key and such a task.
Everything runs in daemon threads: ComfyUI exits without waiting for them, and the next start
continues. A node queued for the same task meanwhile follows it too; whoever comes second finds the
files on disk (jobs.finish).
"""

import logging
import threading
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

from .. import host
from . import account, live_tasks, settings

if TYPE_CHECKING:
    from ...wiro_api.journal import Entry
    from ...wiro_api.task import Output, Progress, Task

logger = logging.getLogger("skyreels.nodes.remote.autocollect")

#: tasks that are followed at a time
MAX_WORKERS = 4
#: newest journal rows that are searched
MAX_ROWS = 1000
#: a task that ended longer ago without its files was left so on purpose
MAX_AGE_S = 86_400.0


class Follower:
    """Publishes a task that no node follows; the callbacks of a `RunListener` that finish uses."""

    def __init__(self, row: int) -> None:
        self.row = row
        self.state = live_tasks.subscribe(row, by_prompt=False)
        self._status = ""
        self._task: Task | None = None

    def check(self) -> None:
        """Go on: nothing stops it but the end of ComfyUI."""

    def verify(self, path: Path, output: "Output") -> None:
        """Accept the file: a node that uses it decodes it."""

    def on_task(self, task: "Task") -> None:
        from ...wiro_api.task import fraction_of

        if task.status != self._status:
            self._status = task.status
            live_tasks.add_log(self.state, [f"{time.strftime('%H:%M:%S')} {task.status}"])
        self._task = task
        self._show(fraction_of(task, None), task.phase)

    def on_progress(self, report: "Progress") -> None:
        from ...wiro_api.task import fraction_of

        if self._task is not None:
            self._show(fraction_of(self._task, report), str(report))

    def on_log(self, text: str) -> None:
        live_tasks.add_log(self.state, text.splitlines())

    def on_bytes(self, done: int, total: int | None) -> None:
        suffix = f" of {total / 1e6:.1f}" if total else ""
        self._show(0.97, f"downloading {done / 1e6:.1f}{suffix} MB")

    def _show(self, fraction: float, line: str) -> None:
        self.state.fraction = max(self.state.fraction or 0.0, fraction)
        self.state.line = line
        live_tasks.publish(self.row)

    def close(self, error: str = "") -> None:
        """Stop following; `error` says why the files were not downloaded."""
        # every open page gets this: hide this machine's paths
        self.state.error = error.replace(str(host.output_folder()), "output")
        live_tasks.unsubscribe(self.row)


def collect_at_start() -> None:
    """Follow what was left running at Wiro and download its results; raises nothing."""
    try:
        entries = deque(unfinished_entries())
    except Exception:  # nobody waits for this thread
        logger.exception("Cannot look for tasks at Wiro")
        return
    if not entries:
        return
    logger.info("Wiro: collecting %d tasks that ran while ComfyUI was closed.", len(entries))

    def work() -> None:
        while True:
            try:
                entry = entries.popleft()
            except IndexError:
                return
            collect(entry)

    workers = [
        threading.Thread(target=work, name="wiro collect", daemon=True)
        for _ in range(min(MAX_WORKERS, len(entries)))
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def unfinished_entries() -> "list[Entry]":
    """The tasks to collect, oldest first; none if the setting is off or there is no key.

    Returns:
        Those that were running when ComfyUI exited, and those of the last day that succeeded but
        lack files: ComfyUI exited during the download.
    """
    from ...wiro_api.errors import ConfigError
    from ...wiro_api.signing import account_of, load_credentials

    if not settings.collects_at_start():
        return []
    try:
        key = account_of(load_credentials(file=account.credentials_file()))
    except ConfigError as error:
        logger.warning("Cannot collect tasks at start: %s", error)
        return []
    since = time.time() - MAX_AGE_S
    rows = account.journal().newest(MAX_ROWS)
    return [
        row for row in reversed(rows) if row.account in ("", key) and _is_unfinished(row, since)
    ]


def _is_unfinished(entry: "Entry", since: float) -> bool:
    from ...wiro_api.jobs import MISSING
    from ...wiro_api.task import Verdict

    if not entry.taskid or live_tasks.is_followed(entry.id):
        return False
    if entry.state == "started":
        return True
    is_done = entry.state == "ended" and entry.verdict == Verdict.SUCCEEDED.value
    is_part = not entry.files or any(path.name.endswith(MISSING) for path in entry.files)
    return is_done and is_part and not entry.remote_deleted and entry.updated_at > since


def collect(entry: "Entry") -> None:
    """Wait for a task and download its files; an error is shown in its row."""
    from ...wiro_api.errors import WiroError
    from ...wiro_api.jobs import finish, to_handle

    if live_tasks.is_followed(entry.id):  # a node was faster
        return
    error = ""
    follower = Follower(entry.id)
    try:
        account.check_socket_url()
        with account.make_client() as client:
            finish(
                client,
                to_handle(entry),
                account.task_folder(entry.taskid),
                journal=account.journal(),
                entry_id=entry.id,
                listener=follower,
                is_labelled=True,
            )
    except (WiroError, OSError) as problem:
        error = f"Not collected: {problem}"
        logger.warning("Task %s was not collected: %s", entry.taskid, problem)
    except Exception as problem:  # nobody waits for this thread
        error = f"Not collected ({type(problem).__name__}): see ComfyUI's log."
        logger.exception("Task %s was not collected", entry.taskid)
    finally:
        follower.close(error)
