"""Where journal and spending limits lie: in one folder for all programs of a user.

    WIRO_STATE_DIR                       if it is set; else
    what <user state>/skyreels-wiro/folder names, if a journal is there; else
    <user state>/skyreels-wiro           <user state>: XDG_STATE_HOME, ~/.local/state, LOCALAPPDATA

A host that keeps its data elsewhere, as one in a container, makes a folder of its own the shared
one. What lay in other places is merged in: each file is copied in one transaction and then renamed,
and a row that is there already is not copied again, so a crash in between costs nothing.
"""

import logging
import os
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

from .errors import ConfigError
from .journal import BUSY_S, Journal
from .parts import drop_part, new_part
from .spending import LIMIT_NAMES, Limits, load_limits, save_limits

logger = logging.getLogger("wiro_api.state")

STATE_VARIABLE = "WIRO_STATE_DIR"
JOURNAL_NAME, LIMITS_NAME = "journal.sqlite", "limits.json"
POINTER_NAME, LOCK_NAME = "folder", "folder.lock"
#: names of a host's files in versions that shared nothing
HOST_JOURNAL_NAME, HOST_LIMITS_NAME = "wiro_journal.sqlite", "wiro_limits.json"


def state_folder() -> Path:
    """Find the folder of this user's journal and limits, without making it.

    Returns:
        The folder.

    Raises:
        ConfigError: there is no home, and no variable that names a folder.
    """
    named = os.environ.get(STATE_VARIABLE, "").strip()
    if named:
        return Path(named).absolute()
    user = user_folder()
    return _pointed(user) or user


def user_folder() -> Path:
    """Find our folder in the user's program state.

    Returns:
        The folder.

    Raises:
        ConfigError: there is no home.
    """
    name = "LOCALAPPDATA" if sys.platform == "win32" else "XDG_STATE_HOME"
    root = Path(os.environ.get(name, ""))
    if not root.is_absolute():  # "" too
        try:
            home = Path.home()
        except RuntimeError:  # neither the environment nor the system's list of users tells it
            home = Path()
        if not home.is_absolute():
            raise ConfigError(
                f"This user has no home folder for journal and limits: set {STATE_VARIABLE} to a "
                "folder that stays."
            )
        parts = ("AppData", "Local") if sys.platform == "win32" else (".local", "state")
        root = home.joinpath(*parts)
    return root / "skyreels-wiro"


def open_state() -> Path:
    """Open the folder for a program without one of its own; files left elsewhere are merged in.

    Returns:
        The folder.

    Raises:
        ConfigError: as for `state_folder`, or a file that was left behind cannot be read.
    """
    folder = state_folder()
    if not os.environ.get(STATE_VARIABLE, "").strip():
        user = user_folder()
        if folder != user:
            gather(folder, user)
    return folder


def share(own: Path) -> Path:
    """Open the folder for a host that has one of its own, which becomes the shared one if none is.

    Args:
        own: the host's folder, kept where the host's other data are.

    Returns:
        The folder.

    Raises:
        ConfigError: files of the host itself cannot be merged. Others that cannot be are logged
            and left where they are.
    """
    own = own.absolute()
    if os.environ.get(STATE_VARIABLE, "").strip():
        folder = state_folder()
        is_own = _is_same(folder, own)
        gather(folder, None if is_own else own, keep=not is_own)
        return folder
    gather(own)
    try:
        user = user_folder()
        folder = _pointed(user) or _point(user, own)
        gather(folder, own)
        gather(folder, user)
    except (ConfigError, OSError) as error:
        logger.warning(
            "Journal and limits are shared with no other program of this user: %s They lie in %s. "
            "%s names a folder for all.",
            error,
            own,
            STATE_VARIABLE,
        )
        return own
    return folder


def gather(folder: Path, other: Path | None = None, *, keep: bool = False) -> None:
    """Merge journals and limits into a folder.

    Args:
        folder: where they go.
        other: where they are; without it, the ones under a host's old names in `folder` itself.
        keep: leave them there under their names, and limits that `folder` has as they are.

    Raises:
        ConfigError: one of them cannot be read or moved.
    """
    journal, limits = folder / JOURNAL_NAME, folder / LIMITS_NAME
    source = other or folder
    try:
        for name in (HOST_JOURNAL_NAME, JOURNAL_NAME):
            if not _is_same(source / name, journal):
                _merge_journal(journal, source / name, keep=keep)
        for name in (HOST_LIMITS_NAME, LIMITS_NAME):
            if not _is_same(source / name, limits):
                _merge_limits(limits, source / name, keep=keep)
    except (sqlite3.Error, OSError) as error:
        raise ConfigError(
            f"The journal or the limits in {source} cannot be merged into {folder} ({error}): move "
            "the files away, or make room. Tasks that were started before are not lost: list and "
            "collect them by their ids."
        ) from None


def _merge_journal(target: Path, source: Path, *, keep: bool) -> None:
    if not source.is_file():
        return
    Journal(target).merge(source)
    if not keep:
        _retire(source)


def _merge_limits(target: Path, source: Path, *, keep: bool) -> None:
    """The stricter of both; one that cannot be read stays so, and stops the spending."""
    if not source.is_file() or (keep and target.exists()):
        return
    try:
        theirs = load_limits(source)
    except ConfigError:
        if not keep:
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, target)
        return
    both = [theirs, load_limits(target)] if target.exists() else [theirs]
    merged = [
        min((x for limits in both if (x := getattr(limits, name)) is not None), default=None)
        for name in LIMIT_NAMES
    ]
    save_limits(target, Limits(*merged))
    if not keep:
        _retire(source)


def _retire(file: Path) -> None:
    """Give a merged file another name; nothing is overwritten."""
    target, number = file.with_name(f"{file.name}.merged"), 1
    while target.exists():
        number += 1
        target = file.with_name(f"{file.name}.merged-{number}")
    try:
        file.rename(target)
    except FileNotFoundError:
        return  # another process has done it


def _is_same(one: Path, other: Path) -> bool:
    """Whether two paths lead to the same file or folder."""
    try:
        return one == other or one.samefile(other)
    except OSError:  # one is not there
        return False


def _pointed(user: Path) -> Path | None:
    """The folder that the pointer names, if a journal is there."""
    try:
        folder = Path(os.fsdecode((user / POINTER_NAME).read_bytes()))
        return folder if folder.is_absolute() and (folder / JOURNAL_NAME).is_file() else None
    except (OSError, ValueError):
        return None


def _point(user: Path, own: Path) -> Path:
    """Make a host's folder the shared one, unless another host was faster; the one that is it."""
    user.mkdir(parents=True, exist_ok=True)
    pointer = user / POINTER_NAME
    try:
        Journal(own / JOURNAL_NAME).make()
        # one at a time: a pointer to what is gone may be replaced, one that is just written may not
        with closing(sqlite3.connect(user / LOCK_NAME, timeout=BUSY_S)) as lock:
            lock.execute("BEGIN EXCLUSIVE")
            folder = _pointed(user)
            if folder is None:
                part = new_part(user)
                try:
                    part.write_bytes(os.fsencode(own))
                    os.replace(part, pointer)
                finally:
                    drop_part(part)
            return folder or own
    except sqlite3.Error as error:
        raise ConfigError(f"A journal in {own} or {user} cannot be made ({error}).") from None


def limits_beside(journal: Path) -> Path:
    """Where the spending limits of a journal are kept."""
    return journal.with_name(LIMITS_NAME)
