"""Tasks that ran at Wiro while ComfyUI was away are brought home when it starts, if asked for.

Off unless the setting is on; then nothing is asked of the network unless there are a key and such a
task. All of it happens in daemon threads: the end of ComfyUI waits for none of them, and what was
not fetched is fetched at the next start. A node that is queued for the same task meanwhile follows
it too, and whoever comes second to its files finds them there (jobs.finish).
"""

import logging
import threading
import time
from collections import deque
from typing import TYPE_CHECKING

from ...wiro_api.listener import RunListener
from .. import host
from . import account

if TYPE_CHECKING:
    from ...wiro_api.journal import Entry
    from ...wiro_api.task import Progress, Task

logger = logging.getLogger("skyreels.nodes.remote.autocollect")

#: tasks that are followed at a time
AT_A_TIME = 4
#: newest rows that are looked through
SEARCHED = 1000
#: a task that has ended longer ago without its files was left so by somebody
LATELY_S = 86_400.0


class Follower(RunListener):
    """What is shown of a task that no node follows; callbacks of jobs.finish."""

    def __init__(self, row: int) -> None:
        self.row = row
        self.live = account.subscribe(row, by_prompt=False)
        self._status = ""
        self._task: Task | None = None

    def on_task(self, task: "Task") -> None:
        from ...wiro_api.task import fraction_of

        if task.status != self._status:
            self._status = task.status
            account.add_log(self.live, [f"{time.strftime('%H:%M:%S')} {task.status}"])
        self._task = task
        self._show(fraction_of(task, None), task.phase)

    def on_progress(self, report: "Progress") -> None:
        from ...wiro_api.task import fraction_of

        if self._task is not None:
            self._show(fraction_of(self._task, report), str(report))

    def on_log(self, line: str) -> None:
        account.add_log(self.live, line.splitlines())

    def on_bytes(self, done: int, total: int | None) -> None:
        of = f" of {total / 1e6:.1f}" if total else ""
        self._show(0.97, f"downloading {done / 1e6:.1f}{of} MB")

    def _show(self, fraction: float, line: str) -> None:
        self.live.fraction = max(self.live.fraction or 0.0, fraction)
        self.live.line = line
        account.publish(self.row)

    def close(self, error: str = "") -> None:
        """Leave the row, with the reason why it is not home."""
        # every open page gets this one: it needs no place of this machine
        self.live.error = error.replace(str(host.output_folder()), "output")
        account.unsubscribe(self.row)


def bring_home() -> None:
    """Follow what runs at Wiro, as the setting says, and fetch what it makes; raises nothing."""
    try:
        entries = deque(entries_away())
    except Exception:  # of a thread that nobody waits for
        logger.exception("Tasks at Wiro could not be looked for")
        return
    if not entries:
        return
    logger.info("Wiro: %d tasks ran while ComfyUI was away and are brought home.", len(entries))

    def work() -> None:
        while True:
            try:
                entry = entries.popleft()
            except IndexError:
                return
            bring(entry)

    workers = [threading.Thread(target=work, name="wiro collect", daemon=True)
               for _ in range(min(AT_A_TIME, len(entries)))]  # fmt: skip
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def entries_away() -> "list[Entry]":
    """The tasks that are brought home, oldest first; none if the setting is off or no key is there.

    Those under way when ComfyUI was last seen, and those of the last day that have succeeded and of
    which files are missing: it ended while they were fetched.
    """
    from ...wiro_api.errors import ConfigError
    from ...wiro_api.signing import account_of, load_credentials

    if not account.collects_at_start():
        return []
    try:
        key = account_of(load_credentials(file=account.credentials_file()))
    except ConfigError as error:
        logger.warning("Nothing is collected at start: %s", error)
        return []
    since = time.time() - LATELY_S
    rows = account.journal().newest(SEARCHED)
    return [row for row in reversed(rows) if row.account in ("", key) and _is_away(row, since)]


def _is_away(entry: "Entry", since: float) -> bool:
    from ...wiro_api.jobs import MISSING
    from ...wiro_api.task import Verdict

    if not entry.taskid or account.is_followed(entry.id):
        return False
    if entry.state == "started":
        return True
    is_done = entry.state == "ended" and entry.verdict == Verdict.SUCCEEDED.value
    is_part = not entry.files or any(path.name.endswith(MISSING) for path in entry.files)
    return is_done and is_part and not entry.remote_deleted and entry.updated_at > since


def bring(entry: "Entry") -> None:
    """One task to its files; what keeps it from that stands in its row."""
    from ...wiro_api.errors import WiroError
    from ...wiro_api.jobs import finish, to_handle

    if account.is_followed(entry.id):  # a node was faster
        return
    error = ""
    follower = Follower(entry.id)
    try:
        account.check_socket_url()
        with account.make_client() as client:
            finish(
                client, to_handle(entry), account.task_folder(entry.taskid),
                journal=account.journal(), entry_id=entry.id, listener=follower,
            )  # fmt: skip
    except (WiroError, OSError) as problem:
        error = f"Not brought home: {problem}"
        logger.warning("Task %s is not brought home: %s", entry.taskid, problem)
    except Exception as problem:  # of a thread that nobody waits for
        error = f"Not brought home ({type(problem).__name__}): see ComfyUI's log."
        logger.exception("Task %s is not brought home", entry.taskid)
    finally:
        follower.close(error)
