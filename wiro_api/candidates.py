"""Find the task that a lost Run has started, in the account's list of tasks.

A Run is lost if it left and no answer came. The list holds everybody's tasks on the key, and any
field of theirs may be missing or absurd: what cannot be read is not a candidate. Equal parameters
alone prove little where a model takes files, since two jobs may differ in nothing else; so the
stored files are fetched and compared with those sent.
"""

import contextlib
import hashlib
import json
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urljoin, urlsplit

import requests

from .errors import ApiError, RunOutcomeUnknownError, TransportError, WiroError
from .handles import Model
from .task import Task, parse_task
from .transport import CONNECT_S, LOOPBACK, READ_S, FilePart, in_time
from .wire import bool_of, decimal_of, text_of

#: seconds after which a lost Run is looked for
RECONCILE_AT_S = (2.0, 5.0, 10.0, 20.0, 30.0)
#: tasks of one page of the list, and the most pages that are read
PAGE_TASKS, MAX_PAGES = 20, 5
#: seconds, from the first look, after which no stored file is fetched any more
PROOF_S = 120.0
#: seconds for one stored file, and how often its address may point elsewhere
FETCH_S = 60.0
MAX_REDIRECTS = 3
PIECE_BYTES = 64 * 1024
#: digits of a task's id, at most
LONGEST_ID = 18
#: stored beside the parameters, if at all
_BESIDE = ("callbackUrl", "projectid")


class Service(Protocol):
    """What the search needs of a `Client`."""

    base_url: str
    session: requests.Session
    sleep: Callable[[float], None]
    sleep_in_call: Callable[[float], None] | None

    def list_tasks(self, *, limit: int, model: str) -> list[Task]:
        """See `Client.list_tasks`."""
        ...

    def list_records(self, *, limit: int, start: int, model: str) -> list[Any]:
        """See `Client.list_records`."""
        ...


@dataclass(frozen=True)
class SentRun:
    """A Run as it was sent.

    Attributes:
        model: of the Run.
        parameters: of the Run.
        files: (parameter, part) of the files sent along.
        baseline: id of the newest task before it, "" if unknown.
    """

    model: Model
    parameters: Mapping[str, Any]
    files: Sequence[tuple[str, FilePart]]
    baseline: str


def accept(*_: object) -> bool:
    """Accept any task: a `claim` for callers that keep no journal."""
    return True


# --- search -------------------------------------------------------------------------------------


def find_lost_run(
    client: Service,
    sent: SentRun,
    cause: WiroError,
    known: Callable[[], Collection[str]],
    claim: Callable[[str, bool], bool],
) -> Task:
    """Find the task of a Run whose answer was lost; never resends it.

    With files, a task that keeps the same ones is taken at once. Without, the only candidate is
    taken, and only at the last look: until then another may come.

    Args:
        client: of the account.
        sent: the Run.
        cause: why its outcome is unknown, for the message.
        known: returns the ids of tasks that belong to other runs.
        claim: takes a task (its id, whether its files prove it); False if another run may own it.

    Returns:
        The task.

    Raises:
        RunOutcomeUnknownError: no task, or several, may be it, or none is proved to be.
    """
    candidates: list[Task] = []
    proofs: dict[str, bool] = {}
    end = time.monotonic() + PROOF_S
    waited = 0.0
    for moment in RECONCILE_AT_S:
        client.sleep(moment - waited)
        waited = moment
        others = known()
        is_last = moment == RECONCILE_AT_S[-1]
        if not is_last and not (sent.baseline and sent.files):
            continue
        try:
            tasks, is_complete = _newer_tasks(client, sent)
        except (TransportError, ApiError):
            continue
        candidates = [t for t in tasks if t.taskid not in others and may_be(t, sent)]
        if not sent.baseline:
            continue
        matches, is_sure = candidates, is_last and is_complete
        if sent.files:
            _compare_files(client, sent, candidates, proofs, end)
            matches = [task for task in candidates if proofs.get(task.taskid)]
            is_sure = is_last or all(task.taskid in proofs for task in candidates)
        if is_sure and len(matches) == 1 and claim(matches[0].taskid, bool(sent.files)):
            return matches[0]
    known()  # the answer may have come at last
    raise RunOutcomeUnknownError(_question(sent.model, candidates, cause), candidates)


def _newer_tasks(client: Service, sent: SentRun) -> tuple[list[Task], bool]:
    """The tasks after the baseline (without one, the newest), and whether these are all."""
    project = sent.model.project
    if not sent.baseline:
        tasks = client.list_tasks(limit=PAGE_TASKS, model=project)
        return [task for task in tasks if number_of(task.taskid) is not None], False
    last = int(sent.baseline)
    newer: dict[str, Task] = {}
    for page in range(MAX_PAGES):
        records = client.list_records(limit=PAGE_TASKS, start=page * PAGE_TASKS, model=project)
        tasks = [parse_task(record) for record in records if isinstance(record, Mapping)]
        numbered = [(n, task) for task in tasks if (n := number_of(task.taskid)) is not None]
        newer.update((task.taskid, task) for number, task in numbered if number > last)
        if len(records) < PAGE_TASKS or (numbered and numbered[-1][0] <= last):
            return list(newer.values()), True
    return list(newer.values()), False


def _compare_files(
    client: Service,
    sent: SentRun,
    candidates: Sequence[Task],
    proofs: dict[str, bool],
    end: float,
) -> None:
    """Note for each candidate whether it keeps the files of the Run, as far as that can be told."""
    for task in candidates:
        if task.taskid not in proofs:
            proof = _keeps_files(client, sent, task, end)
            if proof is not None:
                proofs[task.taskid] = proof


def _keeps_files(client: Service, sent: SentRun, task: Task, end: float) -> bool | None:
    """Whether the service stored exactly these files with a task; None if it cannot be told.

    Args:
        client: of the account.
        sent: the Run.
        task: a candidate.
        end: of the search, by the monotonic clock.

    Returns:
        None if a stored file cannot be fetched, or time is over.
    """
    pairs: list[tuple[str, bytes]] = []
    for name in dict.fromkeys(name for name, _ in sent.files):
        contents = [content for other, (_, content, _) in sent.files if other == name]
        urls = stored_files(task, sent.parameters, name)
        if len(urls) != len(contents):
            return False
        pairs += zip(urls, contents, strict=True)

    def compare() -> bool | None:
        for url, content in pairs:
            found = is_stored(client.session, url, content, client.base_url)
            if not found:
                return found
        return True

    try:
        return in_time(compare, max(0.0, end - time.monotonic()), client.sleep_in_call)
    except TransportError:
        return None


def _question(model: Model, candidates: Sequence[Task], cause: WiroError) -> str:
    """What a person must decide, and how."""
    start = f"The run of {model} was sent and its outcome is unknown ({cause}). "
    not_there = (
        '--again on the command line, or "It did not start" in ComfyUI\'s Wiro panel and queue it '
        "again"
    )
    if not candidates:
        return (
            f"{start}Tasks that may be it: none. Look at the list of tasks before running again: "
            "if it was started after all, it would be paid twice. If a task of that minute is "
            "there, collect it by its id (collect ID on the command line, Wiro Task Result in "
            f"ComfyUI). If none is: {not_there}."
        )
    ids = ", ".join(task.taskid for task in candidates)
    return (
        f"{start}Tasks that may be it: {ids}; nothing proves which. Look at them before running "
        "again, or it may be paid twice: one that is yours is collected by its id (collect ID on "
        f"the command line, Wiro Task Result in ComfyUI). If none is yours: {not_there}."
    )


# --- comparison ---------------------------------------------------------------------------------


def number_of(taskid: str) -> int | None:
    """The number in a task's id, by which newer ones are recognized; None if it is invalid."""
    is_id = taskid.isascii() and taskid.isdigit() and len(taskid) <= LONGEST_ID
    return int(taskid) if is_id and not taskid.startswith("0") else None


def newest_id(tasks: Sequence[Task]) -> str:
    """The largest id of a page of the newest tasks, "0" for an empty page.

    Returns:
        "" if it is unknown: no task has an id, or the oldest come first.
    """
    numbers = [number for task in tasks if (number := number_of(task.taskid)) is not None]
    if not tasks:
        return "0"
    if not numbers or (len(numbers) > 1 and numbers == sorted(numbers)):
        return ""
    return str(max(numbers))


def may_be(task: Task, sent: SentRun) -> bool:
    """Whether model and parameters of a task are those of a Run, files left aside."""
    slug = clean_slug(task.model)
    if not slug or slug not in {clean_slug(str(m)) for m in (sent.model, sent.model.clean)}:
        return False
    parameters, files, stored = sent.parameters, sent.files, task.parameters
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
    """The URLs under which the service keeps the files of one parameter, in order.

    URLs that were given for it beside the files are left out; they must be there too.

    Returns:
        [] if they cannot be distinguished from other files.
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
    """Lower case with hyphens, so that both spellings are equal; "" for an invalid slug."""
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
