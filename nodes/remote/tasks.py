"""The journal's tasks as the page lists and changes them; blocking."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import account, live_tasks

if TYPE_CHECKING:
    from ...wiro_api.handles import RunHandle
    from ...wiro_api.journal import Entry
    from ...wiro_api.task import Output

#: newest rows among which one user's are looked for
MAX_ROWS = 5000


def list_tasks(limit: int, user: str = "", before: int | None = None) -> dict[str, Any]:
    """The journal's newest tasks.

    Args:
        limit: most tasks to return.
        user: only this user's; "" for all, on a single-user server.
        before: only rows with a smaller number: the page asks for older ones this way.

    Returns:
        tasks, as `live_tasks.describe`; has_more; error: why the journal's sums cannot be read.
    """
    from ...wiro_api.errors import ConfigError

    if not account.has_state():
        return {"tasks": [], "has_more": False, "error": ""}
    error, journal = "", account.journal()
    try:
        journal.spent()
    except ConfigError as problem:
        error = str(problem)
    # one row more than asked for tells whether there are older ones
    entries = journal.newest(limit + 1 if not user else MAX_ROWS, before)
    if user:
        own = journal.rows_of(user)
        entries = [entry for entry in entries if entry.id in own]
    return {
        "tasks": [live_tasks.describe(entry) for entry in entries[:limit]],
        "has_more": len(entries) > limit,
        "error": error,
    }


def act(row: int, action: str, user: str = "") -> dict[str, Any]:
    """Apply an action to a task.

    Args:
        row: of the journal.
        action: of ACTIONS.
        user: who asks; "" on a single-user server.

    Returns:
        task: as it is afterwards.

    Raises:
        WiroError: no such task or action, or the action failed.
    """
    from ...wiro_api.errors import WiroError

    entry = _entry(row, user)
    if entry is None or action not in ACTIONS:
        raise WiroError(f"The journal has no task {row}, or there is no action {action!r}.")
    ACTIONS[action](entry)
    live_tasks.publish(row, always=True)
    return {"task": live_tasks.describe(account.journal().get(row) or entry)}


def downloaded_file(row: int, name: str) -> Path | None:
    """A task's downloaded file by name, if the page shows it; else None."""
    entry = _entry(row)
    if entry is None:
        return None
    shown = {file["filename"] for file in live_tasks.describe(entry)["files"]}
    return next((path for path in entry.files if path.name == name and name in shown), None)


def _entry(row: int, user: str = "") -> "Entry | None":
    if not account.has_state():
        return None
    journal = account.journal()
    return None if user and row not in journal.rows_of(user) else journal.get(row)


def _handle(entry: "Entry") -> "RunHandle":
    from ...wiro_api.errors import WiroError
    from ...wiro_api.jobs import to_handle

    if not entry.taskid:
        raise WiroError("This run has no known task at Wiro.")
    return to_handle(entry)


# --- actions ------------------------------------------------------------------------------------


def refresh(entry: "Entry") -> None:
    """Ask Wiro for the task's status."""
    from ...wiro_api.task import Verdict, verdict

    if not entry.taskid:
        return
    with account.make_client() as client:
        task = client.detail(_handle(entry))
    if verdict(task) is Verdict.RUNNING:
        account.journal().mark_seen(entry.id, task.status)
    elif entry.state != "ended":
        account.journal().mark_ended(entry.id, task)


def stop(entry: "Entry") -> None:
    """Cancel or kill the task."""
    with account.make_client() as client:
        task = client.stop(_handle(entry))
    account.journal().mark_ended(entry.id, task, entry.files)


def collect(entry: "Entry") -> None:
    """Download the files of an ended task."""
    from ...wiro_api.errors import WiroError
    from ...wiro_api.jobs import finish
    from ...wiro_api.listener import RunListener
    from ...wiro_api.task import Verdict, verdict
    from ...wiro_api.video import check_video, is_video

    class VideoCheck(RunListener):  # type: ignore[misc,unused-ignore]
        """Decodes each downloaded video once."""

        def verify(self, path: Path, output: "Output") -> None:
            if is_video(output):
                check_video(path)

    handle = _handle(entry)
    with account.make_client() as client:
        task = client.detail(handle)
        if verdict(task) is Verdict.RUNNING:
            raise WiroError(f"Task {task.taskid} has not ended ({task.phase}): wait, or stop it.")
        finish(
            client,
            handle,
            account.task_folder(task.taskid),
            journal=account.journal(),
            entry_id=entry.id,
            listener=VideoCheck(),
            is_labelled=True,
        )


def delete_files(entry: "Entry") -> None:
    """Delete Wiro's copies of an ended task's files; downloaded files stay."""
    with account.make_client() as client:
        client.delete_files(_handle(entry))
    account.journal().mark_remote_deleted(entry.id)


def forget(entry: "Entry") -> None:
    """Mark a run with unknown outcome as not started, on the user's word."""
    from ...wiro_api.errors import WiroError
    from ...wiro_api.transport import UPLOAD_S

    if entry.state != "sending":
        raise WiroError("Only a run whose outcome is unknown can be marked as not started.")
    age_s = abs(time.time() - (entry.sent_at or 0.0))  # the clock may have been set back
    if live_tasks.is_followed(entry.id) or age_s < UPLOAD_S + 60:
        raise WiroError("It was sent only just now and may still be answered: wait 6 minutes.")
    account.journal().mark_refused(entry, "Marked as not started.")


ACTIONS: dict[str, Callable[["Entry"], None]] = {
    "refresh": refresh,
    "stop": stop,
    "collect": collect,
    "delete_files": delete_files,
    "forget": forget,
}
