"""Whether a task of the account's list can be the one that a lost Run has started.

The list holds everybody's tasks on the key, and any field of theirs may be missing or absurd: what
cannot be read is no candidate. Equal parameters alone prove little where a model takes files, since
two jobs may differ in nothing else; so the stored files are fetched and compared with those sent.
"""

import contextlib
import hashlib
import json
import re
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any
from urllib.parse import urljoin, urlsplit

import requests

from .task import Task
from .transport import CONNECT_S, LOOPBACK, READ_S, FilePart
from .wire import bool_of, decimal_of, text_of

#: seconds for one stored file, and how often its address may point elsewhere
FETCH_S = 60.0
MAX_REDIRECTS = 3
PIECE_BYTES = 64 * 1024
#: digits of a task's id; more is no id
LONGEST_ID = 18
#: stored beside the parameters, if at all
_BESIDE = ("callbackUrl", "projectid")


def number_of(taskid: str) -> int | None:
    """The number in a task's id, by which newer ones are known; None if it is no id."""
    is_id = taskid.isascii() and taskid.isdigit() and len(taskid) <= LONGEST_ID
    return int(taskid) if is_id and not taskid.startswith("0") else None


def newest_id(tasks: Sequence[Task]) -> str:
    """The largest id of a page of the newest tasks, "0" for an empty page.

    Returns:
        "" if that cannot be told: no task has an id, or the oldest come first.
    """
    numbers = [number for task in tasks if (number := number_of(task.taskid)) is not None]
    if not tasks:
        return "0"
    if not numbers or (len(numbers) > 1 and numbers == sorted(numbers)):
        return ""
    return str(max(numbers))


def may_be(
    task: Task,
    slugs: Collection[str],
    parameters: Mapping[str, Any],
    files: Sequence[tuple[str, FilePart]],
) -> bool:
    """Whether model and parameters of a task are those of a Run, files left aside.

    Args:
        slugs: the model's spellings, as "owner/project".
    """
    slug = clean_slug(task.model)
    if not slug or slug not in {clean_slug(spelling) for spelling in slugs}:
        return False
    stored = task.parameters
    names = {name for name, _ in files}
    for name, value in parameters.items():
        if name in _BESIDE and name not in stored:
            continue
        if name in names or (name.removesuffix("Url") in names and _is_empty(value)):
            continue  # the address of a file may stand there
        if not _is_same(value, stored.get(name)):
            return False
    plain = [name for name in parameters if name not in names]
    others = (
        name
        for name in stored
        if name not in parameters and name not in names and name.removesuffix("Url") not in names
    )
    has_more = any(not _is_empty(stored[name]) for name in others)
    return not has_more and (bool(files) or any(not _is_empty(parameters[n]) for n in plain))


def stored_files(task: Task, parameters: Mapping[str, Any], name: str) -> list[str]:
    """The addresses under which the service keeps the files of one parameter, in order.

    Addresses that were given for it beside the files are left out; they must be there too.
    """
    given = _addresses(parameters.get(name))
    found = _addresses(task.parameters.get(name))
    if given and not set(given) <= set(found):
        return []
    found = [address for address in found if address not in given]
    if not _is_empty(parameters.get(f"{name}Url")):
        return found  # that one is of ours, and was compared
    others = _addresses(task.parameters.get(f"{name}Url"))
    return [] if found and others and found != others else found or others


def is_stored(
    session: requests.Session, address: str, content: bytes, base_url: str
) -> bool | None:
    """Whether an address of the service holds exactly these bytes.

    It is fetched without key, cookies or anything else of ours, and not beyond the length that is
    compared.

    Returns:
        None if it could not be fetched now.
    """
    end = time.monotonic() + FETCH_S
    try:
        for _ in range(MAX_REDIRECTS + 1):
            if not _is_own(address, base_url):
                return False
            request = requests.Request(
                "GET", address, headers={"Accept-Encoding": "identity"}
            ).prepare()
            settings = session.merge_environment_settings(address, {}, True, None, None)
            with session.send(
                request, allow_redirects=False, timeout=(CONNECT_S, READ_S), **settings
            ) as response:
                if response.is_redirect:
                    address = urljoin(address, response.headers["Location"])
                    continue
                if response.status_code != 200:
                    return None
                announced = response.headers.get("Content-Length", "")
                if announced.isdecimal() and announced != str(len(content)):
                    return False
                return _holds(response, content, end)
    except (requests.RequestException, OSError, ValueError):  # ValueError: no address
        return None
    return None


def _holds(response: requests.Response, content: bytes, end: float) -> bool | None:
    digest, done = hashlib.sha256(), 0
    for piece in response.iter_content(PIECE_BYTES):
        digest.update(piece)
        done += len(piece)
        if done > len(content):
            return False
        if time.monotonic() > end:
            return None
    if done != len(content):
        return None  # cut off
    return digest.digest() == hashlib.sha256(content).digest()


def _is_own(address: str, base_url: str) -> bool:
    """Whether it is https under the service's own domain, or the very test server in use."""
    try:
        parts, base = urlsplit(address), urlsplit(base_url)
        host, own = parts.hostname or "", base.hostname or ""
        _ = parts.port
    except ValueError:
        return False
    if parts.username or parts.password:
        return False
    if base.scheme == "http":  # for this machine only
        return parts.scheme == "http" and own in LOOPBACK and parts.netloc == base.netloc
    domain = "wiro.ai" if own.endswith(".wiro.ai") else own
    return parts.scheme == "https" and (host == domain or host.endswith(f".{domain}"))


def clean_slug(text: str) -> str:
    """Lower case with hyphens, the two spellings of a model as one; "" for what is no model."""
    parts = text.split("/")
    if len(parts) != 2:
        return ""
    owner, project = (re.sub(r"[\W_]+", "-", part.lower()).strip("-") for part in parts)
    return f"{owner}/{project}" if owner and project else ""


def _addresses(value: object) -> list[str]:
    if isinstance(value, str):
        value = value.strip()
        if value.startswith("["):
            try:
                return _addresses(json.loads(value))
            except (ValueError, RecursionError):
                return []
        value = value.split(",")
    if not isinstance(value, list):
        return []
    texts = (text_of(one).strip() for one in value)
    return [text for text in texts if text]


def _is_empty(value: object) -> bool:
    return value is None or (isinstance(value, str) and not value.strip()) or value in ([], {})


def _is_same(sent: object, stored: object) -> bool:
    """Whether a value that was sent is the one that is stored, which may have become text."""
    if _is_empty(sent) or _is_empty(stored):
        return _is_empty(sent) and _is_empty(stored)
    if isinstance(sent, bool) or isinstance(stored, bool):
        return bool_of(sent) is not None and bool_of(sent) is bool_of(stored)
    if isinstance(sent, Mapping | list):
        if isinstance(stored, str):
            with contextlib.suppress(ValueError, RecursionError):
                stored = json.loads(stored)
        if isinstance(sent, list) and len(sent) == 1 and not isinstance(stored, Mapping | list):
            stored = [stored]
        if isinstance(sent, list) and isinstance(stored, list):
            return len(sent) == len(stored) and all(map(_is_same, sent, stored))
        return sent == stored
    if isinstance(stored, Mapping | list):
        return False
    first, second = _text(sent), _text(stored)
    number = decimal_of(first)
    return first == second or (number is not None and number == decimal_of(second))


def _text(value: object) -> str:
    text = text_of(value)
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()
