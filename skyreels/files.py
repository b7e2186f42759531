"""Files that are opened: only regular ones, and text of them only up to a size.

A pipe, a socket or a device with the name of a weight file would be waited for without end.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any

from .errors import CheckpointError

#: bytes of a configuration or an index; the largest published index has half a megabyte
MAX_JSON_BYTES = 32_000_000


def check_regular(path: Path) -> None:
    """Refuse what is not a file with contents.

    Args:
        path: followed if it is a link.

    Raises:
        CheckpointError: missing, a folder, or a pipe, socket or device.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        raise CheckpointError(f"{path} does not exist: check the name and the folder.") from None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"
        raise CheckpointError(f"{path} is {kind} and not a file: choose a regular file.")


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Returns:
        What it holds.

    Raises:
        CheckpointError: not a regular file, too large, or not JSON.
    """
    check_regular(path)
    num_bytes = path.stat().st_size
    if num_bytes > MAX_JSON_BYTES:
        raise CheckpointError(
            f"{path.name} has {num_bytes} bytes, and a configuration has at most "
            f"{MAX_JSON_BYTES}: it is another file; take the one of the model's page."
        )
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError, OSError):
        raise CheckpointError(
            f"{path.name} in {path.parent.name} is not JSON: download it again."
        ) from None


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, which is replaced as a whole.

    Args:
        path: its folder is created.
        value: for json.dumps, without NaN and infinity.

    Raises:
        OSError: the place cannot be written.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # other processes write theirs
    text = json.dumps(value, indent=1, allow_nan=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text + "\n", encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
