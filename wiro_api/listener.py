"""What a caller sees of a run on its way, and how it stops the wait."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .errors import WiroError
    from .journal import Entry
    from .task import Output, Progress, Task


class RunListener:
    """Callbacks of `jobs.start` and `jobs.finish`; a subclass overrides those it wants."""

    def check(self) -> None:
        """Called many times a second while a run waits; may raise to end that."""

    def on_entry(self, entry: "Entry") -> None:
        """Called with the journal's row before anything is sent."""

    def on_busy(self, error: "WiroError", wait_s: float, sleep: Callable[[float], None]) -> None:
        """Wait for a free slot of the account; by default count down with `on_wait`.

        Args:
            error: the refusal.
            wait_s: the usual wait.
            sleep: of the client.
        """
        left_s = wait_s
        while left_s > 0:
            self.on_wait(left_s)
            sleep(min(1.0, left_s))
            left_s -= 1.0

    def on_wait(self, left_s: float) -> None:
        """Called each second of the wait for a slot, with the seconds to the next try."""

    def on_task(self, task: "Task") -> None:
        """Called with each new record of the task."""

    def on_progress(self, report: "Progress") -> None:
        """Called with each report of the running model, in the socket's thread."""

    def on_log(self, text: str) -> None:
        """Called with each line of the task's log, in the socket's thread."""

    def on_bytes(self, done: int, total: int | None) -> None:
        """Called after each piece of a download: bytes here, bytes in all or None."""

    def verify(self, path: Path, output: "Output") -> None:
        """Look at a file that has come and stands in the journal.

        A DownloadError that this raises is logged, and the file stays: it is paid for.
        """


#: for callers that want to hear nothing
SILENT = RunListener()
