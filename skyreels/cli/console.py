"""What the command line says, and how far it is."""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import shown

if TYPE_CHECKING:
    from torch import Tensor

#: between two lines of progress where standard error is a file, in seconds
LINE_PERIOD_S = 60.0


def explain_file_error(error: OSError) -> str:
    """Say what is wrong with a file, and what to do.

    Args:
        error: of the system.

    Returns:
        A sentence or two.
    """
    from ..media import is_disk_full

    place = error.filename or "A file"
    if is_disk_full(error):
        return f"{place} cannot be written, because its disk is full: free some space."
    return f"{place} cannot be used ({error.strerror}): check the path."


def explain_unexpected(error: Exception) -> str:
    """Say what to do about an error that no check caught.

    Args:
        error: anything.

    Returns:
        A sentence or two.
    """
    if type(error).__name__ in ("OutOfMemoryError", "MemoryError"):  # torch's, Python's
        return (
            "The device ran out of memory: use fewer frames, a smaller size, --decode "
            "tiled-diffusers or --precision fp8, or close other programs."
        )
    reason = shown(next(iter(str(error).splitlines()), ""), 300)
    return (
        f"Unexpected {type(error).__name__} ({reason}): this is a defect of the program. Please "
        "report it with the output of `python -X dev -m skyreels ...` and `python -m skyreels "
        "doctor`."
    )


class Parser(argparse.ArgumentParser):
    """Answers wrong usage with a JSON object too if --json was asked for."""

    def error(self, message: str) -> NoReturn:
        """End the program with exit code 2.

        Args:
            message: what is wrong.
        """
        if "--json" in sys.argv:
            print(json.dumps({"error": message}))  # noqa: T201
        super().error(message)


def say(text: str) -> None:
    """Write a line for people."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201


@contextlib.contextmanager
def progress_bar() -> Iterator[Any]:
    """A bar on standard error: one line that is rewritten; in a file, a line now and then.

    Yields:
        The callback for progress reports.
    """
    started: dict[str, float] = {}
    is_terminal = sys.stderr.isatty()
    last_line = time.perf_counter()

    def report(stage: str, done: int, total: int, preview: "Tensor | None" = None) -> None:
        nonlocal last_line
        now = time.perf_counter()
        if done <= 0:
            started[stage] = now
        elapsed = now - started.setdefault(stage, now)
        if total <= 0:
            return
        left = f"{elapsed / done * (total - done):.0f} s left" if done > 0 and elapsed else ""
        if not is_terminal:
            if now - last_line >= LINE_PERIOD_S:
                last_line = now
                say(f"{stage} {100 * done // total} %, {left or 'just begun'}")
            return
        filled = 24 * done // total
        bar = "█" * filled + "·" * (24 - filled)
        sys.stderr.write(f"\r{stage:7} {bar} {100 * done // total:3d} %  {left:14}")
        if done >= total:
            sys.stderr.write(f"\r{stage:7} {'█' * 24} 100 %  {elapsed:.1f} s{'':14}\n")
        sys.stderr.flush()

    yield report
