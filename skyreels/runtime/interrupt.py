"""Ctrl-C that no library can swallow.

Python drops an exception that is raised in a destructor or in a callback of C code, and a library
may catch everything. A KeyboardInterrupt that lands there would be lost, and an hour of work would
go on. So it is remembered, and raised again at the next interrupt check.
"""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any


@contextlib.contextmanager
def remembered_interrupt() -> Iterator[Callable[[], None]]:
    """Within the block, Ctrl-C interrupts as usual and is remembered.

    Where Ctrl-C does not raise KeyboardInterrupt (another thread, a host with a handler of its own,
    a program in the background), nothing is changed.

    Yields:
        A check that raises KeyboardInterrupt if one was raised before.
    """
    was_interrupted = False

    def check() -> None:
        if was_interrupted:
            raise KeyboardInterrupt

    def handle(_: int, __: FrameType | None) -> None:
        nonlocal was_interrupted
        was_interrupted = True
        raise KeyboardInterrupt

    def report(unraisable: Any) -> None:
        if not (
            was_interrupted and unraisable.exc_type is KeyboardInterrupt
        ):  # remembered, so not lost
            previous_hook(unraisable)

    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield check
        return
    previous_hook = sys.unraisablehook
    signal.signal(signal.SIGINT, handle)
    sys.unraisablehook = report
    try:
        yield check
    finally:
        sys.unraisablehook = previous_hook
        signal.signal(signal.SIGINT, signal.default_int_handler)
