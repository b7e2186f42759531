"""The Wiro account that nodes and page share: its files, its journal, its client.

The key is in the environment or in a file of the user's folder under `__skyreels`, which ComfyUI's
routes do not serve, and nowhere else. Journal and limits are there too, shared with the command
line, unless another folder is shared already (wiro_api/state.py).
"""

import contextlib
import logging
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .. import host

if TYPE_CHECKING:
    from ...wiro_api.client import Client
    from ...wiro_api.journal import Journal

logger = logging.getLogger("skyreels.nodes.remote.account")

HOW_TO_SET = (
    "paste it into Settings > SkyReels > Wiro, or set WIRO_API_KEY (and WIRO_API_SECRET for a "
    "project with signature) in the environment of ComfyUI; the key is on the project's page in "
    "the Wiro dashboard"
)
#: file of the page's other settings
SETTINGS_NAME = "settings.json"

_shared: dict[Path, tuple[Path, Path]] = {}
"""The host's state folder -> journal and limits; more than one entry only in tests."""
_lock = threading.Lock()


def credentials_file() -> Path:
    """Where the settings panel stores the key."""
    return host.state_folder() / "wiro.env"


def limits_file() -> Path:
    """Where the spending limits are stored."""
    return _shared_files()[1]


def settings_file() -> Path:
    """Where the page's other settings are stored, next to the limits."""
    return limits_file().with_name(SETTINGS_NAME)


def _shared_files() -> tuple[Path, Path]:
    """Journal and limits; located at the first use, then fixed until the server exits."""
    from ...wiro_api import state
    from ...wiro_api.errors import ConfigError

    own = host.state_folder()
    with _lock:
        if own not in _shared:
            names = state.JOURNAL_NAME, state.LIMITS_NAME
            try:
                folder = state.share(own)
            except ConfigError as error:
                # a journal that cannot be read starts no run, and reports that each time
                logger.error("%s", error)
                folder, names = own, (state.HOST_JOURNAL_NAME, state.HOST_LIMITS_NAME)
            _shared[own] = folder / names[0], folder / names[1]
        return _shared[own]


def has_state() -> bool:
    """Whether a journal, limits or settings exist; checking creates and merges no file."""
    from ...wiro_api import state
    from ...wiro_api.errors import ConfigError

    own = host.state_folder()
    with _lock:
        if own in _shared:
            files = *_shared[own], _shared[own][1].with_name(SETTINGS_NAME)
            return any(file.exists() for file in files)
    folders = [own]
    with contextlib.suppress(ConfigError):  # no home folder: only the host's own
        folders += [state.state_folder(), state.user_folder()]
    names = (
        state.JOURNAL_NAME,
        state.LIMITS_NAME,
        state.HOST_JOURNAL_NAME,
        state.HOST_LIMITS_NAME,
        SETTINGS_NAME,
    )
    return any((folder / name).exists() for folder in folders for name in names)


def journal() -> "Journal":
    """The journal of all programs of this user; its sums are those of the key in use."""
    from ...wiro_api.errors import ConfigError
    from ...wiro_api.journal import Journal
    from ...wiro_api.signing import account_of, load_credentials

    try:
        key = account_of(load_credentials(file=credentials_file()))
    except (ConfigError, OSError, ValueError):  # no key, or an unreadable file
        key = ""
    return Journal(_shared_files()[0], account=key)


def make_client(sleep: Callable[[float], None] = time.sleep) -> "Client":
    """A client with the environment's key, else the one in the user's folder.

    Args:
        sleep: waits so many seconds between two requests; may raise to stop.

    Returns:
        A client whose waits can be interrupted.

    Raises:
        ConfigError: no key; the message says where to set it.
    """
    from ...wiro_api.client import Client
    from ...wiro_api.signing import load_credentials
    from ...wiro_api.transport import base_url
    from ...wiro_api.websocket import socket_url

    return Client(
        load_credentials(file=credentials_file(), how_to_set=HOW_TO_SET),
        base_url=base_url(),
        socket_url=socket_url(),
        sleep=sleep,
        interruptible=True,
    )


def check_socket_url() -> None:
    """Raise ConfigError if the socket's address is not allowed: before a run, not after it."""
    from ...wiro_api.websocket import check_socket_url, socket_url

    if socket_url():
        check_socket_url(socket_url())


def task_folder(taskid: str) -> Path:
    """Where the files of a task go; the id comes from outside, so only safe characters are kept."""
    return host.output_folder() / "wiro" / (re.sub(r"\W", "_", taskid)[:40] or "task")


def relative_to_output(path: Path) -> str:
    """A result file's path below the output folder."""
    try:
        return path.relative_to(host.output_folder()).as_posix()
    except ValueError:  # the output folder was another one when the file was saved
        return path.name
