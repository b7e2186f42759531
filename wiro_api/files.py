"""Files: download a result, whole or not at all; read what is sent.

The address comes from outside: `addresses` says where it may lead, and no header of ours goes
there. A thread of its own listens to the server, so that a silent one keeps nobody from leaving.
The file grows under a temporary name and takes its own when it is whole: Content-Length and its
container tell that. The size in the record is a hint, for it has been wrong.
"""

import contextlib
import logging
import mimetypes
import os
import queue
import random
import re
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urljoin

import requests
import urllib3.exceptions

from .addresses import PublicAdapter, RefusedAddressError, must_be_public, service_domain
from .errors import ConfigError, DownloadError, TransportError
from .media import claimed_kind, is_page, kind_of, what_is_missing
from .parts import drop_part, new_part
from .task import Output
from .transport import (
    BASE_URL,
    CONNECT_S,
    READ_S,
    FilePart,
    noop,
    retry_after,
    setting_at_fault,
    wait_s,
)

logger = logging.getLogger("wiro_api.files")

#: the service's limit for an uploaded file
MAX_UPLOAD_BYTES = 100 * 1000 * 1000
#: no result is larger than this
MAX_BYTES = 2 * 1024**3
#: in a row that bring nothing new
ATTEMPTS = 5
MAX_REDIRECTS = 3
CHUNK_BYTES = 256 * 1024
#: of a file's name, in UTF-8, with room for a number
MAX_NAME_BYTES = 120
#: a file may reach the delivery network a minute after its task has ended: seconds to wait
NOT_YET = (403, 404)
NOT_YET_S = (1.0, 2.0, 4.0, 8.0, 15.0, 15.0, 15.0)
#: other HTTP answers that may pass
PASSING = (408, 425, 429)
#: the least speed of a download, and the seconds by which all attempts together may fall behind it
LEAST_BYTES_PER_S, BEHIND_S = 1024, 60.0
#: longest download, all attempts together
LONGEST_S = 6 * 3600.0
INVALID_URL = "the download URL is invalid, or redirects to an invalid URL"
#: between two looks at the cancel button while a server is silent
TICK_S = 0.1
_SUFFIXES = {
    "video/mp4": ".mp4",
    "video/webm": ".webm",
    "video/quicktime": ".mov",
    "image/png": ".png",
    "image/jpeg": ".jpg",
    "image/webp": ".webp",
    "image/gif": ".gif",
    "image/svg+xml": ".svg",
    "audio/mpeg": ".mp3",
    "audio/wav": ".wav",
    "audio/x-wav": ".wav",
    "text/plain": ".txt",
    "application/json": ".json",
    "application/zip": ".zip",
}
#: words of the prompt, and their bytes, in the name of a file
LABEL_WORDS, LABEL_BYTES = 6, 48
_LABEL = r"\d{4}-\d\d-\d\d_[\w-]+_"
_WINDOWS_NAMES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


def download(
    output: Output,
    folder: Path,
    *,
    taskid: str = "",
    base_url: str = BASE_URL,
    local_host: str = "",
    check: Callable[[], None] = noop,
    on_bytes: Callable[[int, int | None], None] = noop,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
    behind_s: float = BEHIND_S,
    not_yet_s: Sequence[float] = NOT_YET_S,
    instead_of: Path | None = None,
) -> Path:
    """Download one file of a result.

    Args:
        output: with a URL.
        folder: made if needed. A name that is taken gets a number. Temporary files of processes
            that have ended are removed from it.
        taskid: for messages.
        base_url: of the service, whose own hosts are fetched from wherever names lead.
        local_host: "host:port" of a test server on this machine, which alone may be fetched from
            without TLS.
        check: called many times a second, whatever the server does; may raise to stop.
        on_bytes: called with (bytes here, bytes in all or None) after every piece.
        sleep: as `check`, with the seconds to wait.
        clock: seconds.
        behind_s: seconds by which it may fall behind LEAST_BYTES_PER_S before it is given up.
        not_yet_s: waits while the server does not have it yet; () to ask once.
        instead_of: a damaged file that it replaces, under that name.

    Returns:
        The path.

    Raises:
        DownloadError: it cannot be fetched, is incomplete, or its URL is not allowed.
    """
    try:
        part = new_part(folder)
    except OSError as error:
        _refuse(
            output,
            taskid,
            f"{folder} cannot be written ({error.strerror})",
            f"{folder} cannot be written ({error.strerror}): choose another folder, then collect "
            f"task {taskid} again.",
        )
    try:
        with requests.Session() as session:
            fetch = _Fetch(
                output,
                part,
                taskid,
                service_domain(base_url),
                local_host,
                session,
                check,
                on_bytes,
                sleep,
                clock,
                behind_s,
            )
            _fetch_patiently(fetch, not_yet_s)
        if instead_of is None:
            return _take_name(part, folder, safe_name(output))
        os.replace(part, instead_of)
        return instead_of
    except OSError as error:
        _refuse(
            output,
            taskid,
            f"{folder} cannot be written ({error.strerror})",
            f"The result of task {taskid} cannot be written to {folder} ({error.strerror}): make "
            "room or choose another folder, then collect it again; it is paid for.",
        )
    finally:
        drop_part(part)


class _PassingError(Exception):
    """Worth another attempt; retry_after_s: what the server asked for, or None."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class _NotYetError(_PassingError):
    """The server does not have it, or does not show it."""


class _CutError(_PassingError):
    """All that was announced came, and the file ends early all the same."""

    def __init__(self, message: str, *, is_usable: bool) -> None:
        super().__init__(message)
        self.is_usable = is_usable


class _LastingError(Exception):
    """Not worth one."""


def _take_name(part: Path, folder: Path, name: str) -> Path:
    """Give the whole file its name, or that with a number.

    Returns:
        Its path.

    Raises:
        OSError: it cannot be renamed.
    """
    target = free_name(folder, name)
    try:
        os.replace(part, target)
    except OSError:
        target.unlink(missing_ok=True)
        raise
    return target


def _refuse(output: Output, taskid: str, reason: str, sentence: str = "") -> NoReturn:
    name = safe_name(output) if output.name else "The result"
    raise DownloadError(
        sentence
        or f"{name} of task {taskid} cannot be fetched: {reason}. The task is done and "
        "paid for; collect it again by its id.",
        taskid=taskid,
        reason=reason,
    ) from None


@dataclass
class _Fetch:
    """One download, through all its attempts.

    Attributes:
        done: bytes in the part.
        came: bytes of all attempts.
        busy_s: seconds of all attempts.
        validator: names the version of the file that the part is of, for If-Range; "" if the
            server named none.
        total: bytes in all, or None.
    """

    output: Output
    part: Path
    taskid: str
    service: str
    local_host: str
    session: requests.Session
    check: Callable[[], None]
    on_bytes: Callable[[int, int | None], None]
    sleep: Callable[[float], None]
    clock: Callable[[], float]
    behind_s: float
    done: int = 0
    came: int = 0
    busy_s: float = 0.0
    validator: str = ""
    total: int | None = None

    @property
    def announced_bytes(self) -> int | None:
        """The record's size, if it can be one."""
        size = self.output.num_bytes
        return size if size is not None and 0 < size <= MAX_BYTES else None

    @property
    def is_given_up(self) -> bool:
        """Whether the attempts so far have taken too long for what they brought."""
        return (
            self.busy_s > self.behind_s + self.came / LEAST_BYTES_PER_S or self.busy_s > LONGEST_S
        )


def _fetch_patiently(fetch: _Fetch, not_yet_s: Sequence[float]) -> None:
    """Attempts until the part is whole."""
    rng = random.Random()
    waits = list(not_yet_s)
    failures, most, last_cut = 0, 0, ""
    while True:
        try:
            _attempt(fetch)
            return
        except (_LastingError, RefusedAddressError) as error:
            _refuse(fetch.output, fetch.taskid, str(error))
        except _NotYetError as error:
            if not waits:
                _refuse(fetch.output, fetch.taskid, str(error))
            pause = waits.pop(0)
        except _PassingError as error:
            failures = 1 if fetch.done > most else failures + 1
            most = max(most, fetch.done)
            is_over = failures >= ATTEMPTS or fetch.is_given_up
            if isinstance(error, _CutError):
                if str(error) == last_cut and error.is_usable:
                    _warn(fetch, f"{error}; the file is kept")
                    return
                is_over |= str(error) == last_cut  # the same again: that is what the server has
                last_cut = str(error)
            if is_over:
                _refuse(fetch.output, fetch.taskid, str(error))
            pause = min(wait_s(failures, error, rng), fetch.behind_s)
            fetch.busy_s += pause  # or one byte in each attempt would keep it going for ever
        fetch.sleep(pause)


def _warn(fetch: _Fetch, text: str) -> None:
    logger.warning("%s of task %s: %s.", safe_name(fetch.output), fetch.taskid, text)


def _attempt(fetch: _Fetch) -> None:
    """Ask once, and let the part grow; raises unless it is whole."""
    if fetch.validator == "":
        fetch.done = 0
    began, before = fetch.clock(), fetch.busy_s

    def tick() -> None:
        fetch.check()
        fetch.sleep(0.0)
        fetch.busy_s = before + fetch.clock() - began
        if fetch.is_given_up:
            raise _PassingError(f"it comes too slowly: {fetch.came} bytes in {fetch.busy_s:.0f} s")

    sent_range = f"bytes={fetch.done}-" if fetch.done else ""
    events = _in_thread(_listen(fetch, sent_range), tick)
    try:
        answer = next(events)
        assert isinstance(answer, _Answer)
        tick()
        _agree(fetch, answer)
        with fetch.part.open("ab" if fetch.done else "wb") as file:
            for piece in events:
                assert isinstance(piece, bytes)
                fetch.came += len(piece)
                tick()
                if fetch.done + len(piece) > MAX_BYTES:
                    raise _LastingError(f"it is over {MAX_BYTES} bytes")
                file.write(piece)
                fetch.done += len(piece)
                fetch.on_bytes(fetch.done, fetch.total or fetch.announced_bytes)
            file.flush()
            os.fsync(file.fileno())
    finally:
        events.close()
        fetch.busy_s = before + fetch.clock() - began
    if fetch.total is not None and fetch.done != fetch.total:
        raise _PassingError(f"{fetch.done} of {fetch.total} bytes came")
    _check_container(fetch, answer.has_end)
    if fetch.announced_bytes is not None and fetch.done != fetch.announced_bytes:
        size = f"{fetch.done} bytes came where Wiro names {fetch.announced_bytes}"
        _warn(fetch, f"{size}, and the file is whole")


def _agree(fetch: _Fetch, answer: "_Answer") -> None:
    """Go on where the part ends, or begin again, as the server says."""
    if answer.start is None:
        fetch.done, fetch.total, fetch.validator = 0, answer.total, answer.validator
    else:
        # a tag can be compared to a tag, and a date to a date
        same_kind = answer.validator[:1] == fetch.validator[:1] == '"' or not (
            answer.validator[:1] == '"' or fetch.validator[:1] == '"'
        )
        is_other = same_kind and answer.validator not in ("", fetch.validator)
        totals = {fetch.total, answer.total} - {None}
        if answer.start != fetch.done or is_other or len(totals) > 1:
            fetch.validator = ""  # from the start, then
            raise _PassingError("the server went on with another piece or another file")
        fetch.total = next(iter(totals), None)
    if fetch.total is not None and fetch.total > MAX_BYTES:
        raise _LastingError(f"it is announced with {fetch.total} bytes, over {MAX_BYTES}")


def _check_container(fetch: _Fetch, has_end: bool) -> None:
    """Raise if the part is not the file, or not all of it.

    Args:
        fetch: its part is looked at.
        has_end: whether the server said where the file ends, and all before that came.

    Raises:
        _PassingError: another attempt may bring it.
        _CutError: it ends early, though all that was announced came.
    """
    fetch.validator = ""  # if it is wrong, it is wrong from the start
    output, part = fetch.output, fetch.part
    difference = ""
    if fetch.announced_bytes is not None and fetch.done != fetch.announced_bytes:
        difference = f"; {fetch.done} bytes came where Wiro names {fetch.announced_bytes}"
    if fetch.done == 0:
        raise _PassingError("it is empty")
    claimed = claimed_kind(output)
    is_mp4 = output.contenttype == "video/mp4" or output.name.lower().endswith(".mp4")
    kind = kind_of(part, claimed)
    if is_mp4 and kind in ("text", "other"):
        page = ", but a web page" if is_page(part) else ""
        raise _PassingError(f"it is not an MP4 file{page}{difference}")
    if claimed in ("image", "audio", "video") and is_page(part):
        raise _PassingError(f"it is a web page instead of {claimed}{difference}")
    missing, is_usable = what_is_missing(part)
    if missing and has_end:
        raise _CutError(f"{missing}{difference}", is_usable=is_usable)
    if missing:
        raise _PassingError(f"{missing}{difference}")
    if not has_end and fetch.announced_bytes is not None and fetch.done < fetch.announced_bytes:
        # the connection may have broken: once more, and if it ends there again, it is its end
        raise _CutError(difference.removeprefix("; "), is_usable=True)
    if claimed in ("image", "audio", "video") and claimed != kind:
        _warn(fetch, f"it is announced as {claimed} and is {kind}")


def is_whole(path: Path) -> bool:
    """Whether a file is there and, as far as its container tells, all of it."""
    try:
        return path.is_file() and path.stat().st_size > 0 and not what_is_missing(path)[0]
    except OSError:
        return False


# --- asking the server --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Answer:
    """What the head of an answer says.

    start: of the piece it brings, or None for a whole file. total: bytes of the whole file, or
    None. has_end: whether the end of the content can be told from a broken connection.
    """

    start: int | None
    total: int | None
    validator: str
    has_end: bool


def _in_thread(
    events: Generator[object, None, None], tick: Callable[[], None]
) -> Generator[object, None, None]:
    """Run a generator in a thread of its own; `tick` is called while it is silent.

    A thread that hangs in a system call is left behind, and ends with that call.

    Yields:
        What the generator yields.
    """
    items: queue.Queue[object] = queue.Queue(maxsize=4)
    is_left = threading.Event()
    end = object()

    def put(item: object) -> None:
        while not is_left.is_set():
            try:
                items.put(item, timeout=TICK_S)
                return
            except queue.Full:
                pass

    def run() -> None:
        try:
            for item in events:
                put(item)
                if is_left.is_set():
                    events.close()
                    return
            put(end)
        except BaseException as error:  # noqa: BLE001 - it is raised again in the caller
            put(error)

    threading.Thread(target=run, name="wiro download", daemon=True).start()
    try:
        while True:
            try:
                item = items.get(timeout=TICK_S)
            except queue.Empty:
                tick()
                continue
            if item is end:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        is_left.set()


def _listen(fetch: _Fetch, sent_range: str) -> Generator[object, None, None]:
    """The _Answer of a server, then pieces of the content."""
    try:
        with contextlib.ExitStack() as stack:
            response = _open(fetch, sent_range, stack)
            yield _read_head(response)
            yield from _pieces(response)
    except (requests.exceptions.InvalidSchema, requests.exceptions.MissingSchema):
        raise _LastingError("the download URL is invalid: only https is fetched") from None
    except (requests.exceptions.InvalidURL, urllib3.exceptions.LocationValueError):
        raise _LastingError(INVALID_URL) from None
    except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
        raise _PassingError(f"the connection failed ({_reason(error)})") from None
    except ValueError:
        raise _LastingError(INVALID_URL) from None


def _reason(error: Exception) -> str:
    """The kind of failure; the text of these errors holds addresses."""
    inner = error.args[0] if error.args else None
    return type(getattr(inner, "reason", None) or error).__name__


def _read_head(response: requests.Response) -> _Answer:
    headers = response.headers
    announced = headers.get("Content-Length", "").strip()
    length = int(announced) if re.fullmatch(r"[0-9]{1,30}", announced) else None
    is_packed = _is_packed(response)
    if is_packed:
        length = None
    tag, changed = headers.get("ETag", "").strip(), headers.get("Last-Modified", "").strip()
    # a weak tag does not promise the same bytes
    validator = "" if is_packed else (tag if tag.startswith('"') else changed)
    is_chunked = "chunked" in headers.get("Transfer-Encoding", "").lower()
    has_end = length is not None or is_chunked
    if response.status_code == 200:
        return _Answer(None, length, validator, has_end)
    given = re.fullmatch(
        r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19}|\*)",
        headers.get("Content-Range", "").strip(),
    )
    if given is None:
        return _Answer(-1, None, validator, has_end)
    total = None if given[3] == "*" else int(given[3])
    return _Answer(int(given[1]), total, validator, has_end)


def _is_packed(response: requests.Response) -> bool:
    """Whether the content is compressed on the way, which nobody has asked for."""
    encoding = response.headers.get("Content-Encoding", "").strip().lower()
    return encoding not in ("", "identity")


def _pieces(response: requests.Response) -> Iterator[bytes]:
    """The content as it comes, so that a slow server does not hold up the caller."""
    raw, is_packed = response.raw, _is_packed(response)
    # urllib3 has read1 since version 2.1; before it, small pieces must do
    read, size = getattr(raw, "read1", None), CHUNK_BYTES
    if read is None or is_packed:
        read, size = raw.read, 16 * 1024
    while piece := read(size, decode_content=is_packed):
        yield piece


def _open(fetch: _Fetch, sent_range: str, stack: contextlib.ExitStack) -> requests.Response:
    """The answer at the end of a chain of allowed addresses; closed with the stack."""
    url, session = fetch.output.url, fetch.session
    headers = {"Accept-Encoding": "identity"}
    if sent_range:
        headers |= {"Range": sent_range, "If-Range": fetch.validator}
    for _ in range(MAX_REDIRECTS + 1):
        request = session.prepare_request(
            requests.Request("GET", url, headers=headers, auth=_no_auth)
        )
        address = request.url or ""
        settings = session.merge_environment_settings(address, {}, True, None, None)
        proxy = requests.utils.select_proxy(address, settings["proxies"]) or ""
        adapter = session.get_adapter(address)
        if must_be_public(address, service=fetch.service, local_host=fetch.local_host, proxy=proxy):
            adapter = PublicAdapter()
            stack.callback(adapter.close)
        try:
            # not the session's own way to send: that reads all that comes with a redirect
            response = adapter.send(
                request,
                stream=True,
                timeout=(CONNECT_S, READ_S),
                verify=settings["verify"] or False,
                cert=settings["cert"],
                proxies=settings["proxies"],
            )
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            at_fault = setting_at_fault(error, address, settings["proxies"])
            if at_fault is None:
                raise
            lasts = not isinstance(at_fault, TransportError)
            problem = _LastingError if lasts else _PassingError
            raise problem(str(at_fault).rstrip(" .")) from None
        status = response.status_code
        if status == 200 or (status == 206 and sent_range):
            stack.callback(response.close)
            return response
        response.close()
        if status in (301, 302, 303, 307, 308) and response.headers.get("Location"):
            url = urljoin(address, response.headers["Location"])
            continue
        said = f"the server answered HTTP {status}"
        if status == 416 and sent_range:
            fetch.validator = ""  # from the start, then
            raise _PassingError(said)
        if status in NOT_YET:
            raise _NotYetError(said)
        if status in PASSING or status >= 500:
            raise _PassingError(said, retry_after(response))
        raise _LastingError(said)
    raise _LastingError(f"there are more than {MAX_REDIRECTS} redirects")


def _no_auth(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """Keeps requests from adding what a .netrc says."""
    return request


# --- names --------------------------------------------------------------------------------------


def safe_name(output: Output) -> str:
    """A file name that stays in its folder on every system."""
    name = re.split(r"[/\\]", output.name)[-1]
    name = re.sub(r"[^\w.()\- ]", "_", name).strip(" .")
    # the end holds the suffix; half a letter at the cut is dropped
    name = name.encode()[-MAX_NAME_BYTES:].decode(errors="ignore").strip(" .")
    if not name or _WINDOWS_NAMES.fullmatch(name):
        name = "result"
    if "." not in name:
        name += _SUFFIXES.get(output.contenttype, ".bin")
    return name


def label_of(started: int | None, parameters: Mapping[str, Any]) -> str:
    """What tells a file from others in a list of names: day, first words of the prompt, seed.

    Args:
        started: seconds of the service's clock, which are the same whenever the file is fetched.
        parameters: of the run.

    Returns:
        As "2026-11-27_a-fox-runs_seed7_", for the front of a name on every system; "" without a
        day.
    """
    try:
        moment = None if started is None else datetime.fromtimestamp(started, timezone.utc)
    except (ValueError, OverflowError, OSError):
        moment = None
    if moment is None:
        return ""
    prompt = re.sub(r"^\W*FPS-?\d+\W*", "", str(parameters.get("prompt") or "")[:1000])
    words = "-".join(re.findall(r"\w+", prompt)[:LABEL_WORDS])
    words = words.encode()[:LABEL_BYTES].decode(errors="ignore").strip("-_")
    seed = re.fullmatch(r"\d{1,20}", str(parameters.get("seed", "")))
    parts = [f"{moment:%Y-%m-%d}", words or "task", f"seed{seed[0]}" if seed else ""]
    return "".join(f"{part}_" for part in parts if part)


def labelled(output: Output, label: str) -> Output:
    """The same output under a name with a label, if that is not too long."""
    name = label + safe_name(output)
    return output if len(name.encode()) > MAX_NAME_BYTES else replace(output, name=name)


def is_name_of(name: str, output: Output) -> bool:
    """Whether a file of that name may be the output's: its own, with a label or a number or not."""
    stem, dot, suffix = (re.escape(part) for part in safe_name(output).rpartition("."))
    return re.fullmatch(rf"({_LABEL})?{stem}( \(\d+\))?{dot}{suffix}", name) is not None


def free_name(folder: Path, name: str) -> Path:
    """A new empty file of that name, or with a number if it is taken."""
    stem, dot, suffix = name.rpartition(".")
    candidate, number = folder / name, 1
    while True:
        try:
            candidate.open("xb").close()  # taken at once: others look for names too
            return candidate
        except FileExistsError:
            candidate = folder / f"{stem} ({number}){dot}{suffix}"
            number += 1


def read_part(path: Path) -> FilePart:
    """Read a file as a part of a request.

    Returns:
        The part, under an ASCII name that keeps its suffix.

    Raises:
        ConfigError: missing, empty or too large.
    """
    if not path.is_file():
        raise ConfigError(f"There is no file {path}: check the path.")
    num_bytes = path.stat().st_size
    if not 0 < num_bytes <= MAX_UPLOAD_BYTES:
        raise ConfigError(
            f"{path} has {num_bytes} bytes, and Wiro takes 1 to {MAX_UPLOAD_BYTES}: use another "
            "file."
        )
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    suffix = path.suffix.lower() if path.suffix.isascii() else ""
    return f"input{suffix}", path.read_bytes(), kind
