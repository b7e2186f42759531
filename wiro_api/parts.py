"""Files that appear whole or not at all: written under a temporary name, then renamed.

The name holds the number of the process and a random number, so no two writers share a file. What
processes that have ended left behind is removed by the next writer in the folder.
"""

import logging
import os
import random
import re
import sys
import time
from pathlib import Path
from typing import Any

logger = logging.getLogger("wiro_api.parts")

_PART = re.compile(r"\.wiro-(\d+)-[0-9a-f]+\.part")
#: temporary files of this process; those of its number from before are another process's
_own_parts: set[str] = set()
_BEGAN = time.time() - 10.0  # for disks that keep coarse times


def new_part(folder: Path, mode: int = 0o666) -> Path:
    """Make an empty temporary file, after removing those that nobody writes any more.

    Args:
        folder: made if needed.
        mode: permissions, before the umask.

    Returns:
        Its path; give it to `drop_part` in the end.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_dead_parts(folder)
    part = folder / f".wiro-{os.getpid()}-{random.getrandbits(48):012x}.part"
    _own_parts.add(part.name)
    os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))
    return part


def drop_part(part: Path) -> None:
    """Remove a temporary file of this process, unless it was renamed."""
    part.unlink(missing_ok=True)
    _own_parts.discard(part.name)


def write_whole(file: Path, text: str, mode: int = 0o666) -> None:
    """Write a text file in UTF-8; an old one is replaced as a whole.

    Args:
        file: its folder is made if needed.
        text: to write.
        mode: permissions, before the umask.

    Raises:
        OSError: it cannot be written.
    """
    part = new_part(file.parent, mode)
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, file)
    finally:
        drop_part(part)


def remove_dead_parts(folder: Path) -> None:
    """Remove what downloads have left that were killed; what is in use stays."""
    for part in folder.glob(".wiro-*.part"):
        found = _PART.fullmatch(part.name)
        try:
            if found is None or _is_alive(int(found[1]), part):
                continue
            part.unlink()
        except OSError as error:  # another process was faster, or it is not ours to remove
            if part.exists():
                logger.warning("%s is left over and cannot be removed: %s.", part, error.strerror)


def _is_alive(pid: int, part: Path) -> bool:
    """Whether the process of a temporary file may still write to it."""
    if pid == os.getpid():
        # containers give the same number to each new process
        return part.name in _own_parts or part.stat().st_mtime >= _BEGAN
    if sys.platform == "win32":
        return _is_alive_on_windows(pid)
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it is somebody else's
        return True
    return True


def _is_alive_on_windows(pid: int) -> bool:
    """There, `os.kill(pid, 0)` sends Ctrl-C instead of asking."""
    import ctypes

    kernel: Any = ctypes.WinDLL("kernel32", use_last_error=True)  # type: ignore[attr-defined]
    query_limited, invalid_parameter, still_active = 0x1000, 87, 259
    process = kernel.OpenProcess(query_limited, False, pid & 0xFFFFFFFF)
    if not process:
        error: int = ctypes.get_last_error()  # type: ignore[attr-defined]
        return error != invalid_parameter
    code = ctypes.c_ulong()
    known = kernel.GetExitCodeProcess(process, ctypes.byref(code))
    kernel.CloseHandle(process)
    return not known or code.value == still_active
