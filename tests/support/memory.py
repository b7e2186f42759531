"""Where freed memory goes."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

#: options of glibc's mallopt
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD, MMAP_MAX = -1, -2, -3, -4


def keep_memory() -> None:
    """Return less of what is freed to the system, which clears each page that it gives again.

    Clips of tests are small: a tenth of the time of those that make some. What is larger than
    32 MiB goes back at once, as ever. Elsewhere than with glibc nothing changes.
    """
    if (libc := _glibc()) is not None:
        libc.mallopt(MMAP_THRESHOLD, 2**25)  # the largest that there is
        libc.mallopt(TRIM_THRESHOLD, 2**29)
        libc.mallopt(TOP_PAD, 2**24)


def return_memory() -> None:
    """Return all that is freed to the system at once, so that what a process holds is in use.

    Otherwise that depends on what else lies between freed pieces: 16 to 200 MB of a loaded model.
    """
    if (libc := _glibc()) is not None:
        libc.mallopt(MMAP_THRESHOLD, 2**16)
        libc.mallopt(TRIM_THRESHOLD, 2**16)
        libc.mallopt(TOP_PAD, 0)


def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return None
    return libc


@contextmanager
def reused_memory() -> Iterator[None]:
    """Let the next tensor take the memory of the last one.

    glibc returns large tensors to the system, which clears new pages for each that follows: a
    quarter of the time of making a small clip. Elsewhere than with glibc nothing changes.
    """
    if (libc := _glibc()) is None:
        yield
        return
    libc.mallopt(TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(MMAP_MAX, 0)
    try:
        yield
    finally:
        libc.mallopt(MMAP_MAX, 2**16)
        keep_memory()
        libc.malloc_trim(0)
