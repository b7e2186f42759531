"""Files: bringing a result home, whole or not at all; reading what is sent.

The address comes from outside, so it is fetched without any header of ours, over https, from public
addresses only, and redirects are checked one by one. The file grows under a temporary name and
takes its own when its size and its first bytes are right.
"""

import ipaddress
import mimetypes
import os
import random
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import requests
import urllib3.exceptions

from .errors import ConfigError, DownloadError
from .task import Output
from .transport import CONNECT_S, LOOPBACK, READ_S, FilePart, wait_s

#: the service's limit for an uploaded file
MAX_UPLOAD_BYTES = 100 * 1000 * 1000
#: no result is larger than this
MAX_BYTES = 2 * 1024**3
ATTEMPTS = 5
MAX_REDIRECTS = 3
CHUNK_BYTES = 256 * 1024
#: of a file's name, in UTF-8, with room for a number
MAX_NAME_BYTES = 120
#: HTTP answers that may pass: a file may reach the delivery network late
PASSING = (403, 404, 408, 425, 429)
_SUFFIXES = {"video/mp4": ".mp4", "video/webm": ".webm", "image/png": ".png", "image/jpeg": ".jpg"}
_WINDOWS_NAMES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


def nothing(*_: object) -> None:
    """Do nothing."""


def download(
    output: Output,
    folder: Path,
    *,
    taskid: str = "",
    local_host: str = "",
    session: requests.Session | None = None,
    check: Callable[[], None] = nothing,
    on_bytes: Callable[[int, int | None], None] = nothing,
    verify: Callable[[Path, Output], None] = nothing,
    sleep: Callable[[float], None] = time.sleep,
    max_bytes: int = MAX_BYTES,
) -> Path:
    """One file of a result.

    Args:
        output: with an address.
        folder: made if needed. A name that is taken gets a number.
        taskid: for messages.
        local_host: "host:port" of a test server on this machine, which alone may be fetched from
            without TLS.
        check: called before every piece; may raise to stop.
        on_bytes: (bytes here, bytes in all or None), after every piece.
        verify: looks at the whole file before it gets its name; raises if it is not right.
        max_bytes: a larger file is refused.
    Returns:
        The path.
    Raises:
        DownloadError: it cannot be had, is not what was announced, or its address is not allowed.
    """
    if session is None:
        with requests.Session() as own:
            return download(
                output, folder, taskid=taskid, local_host=local_host, session=own, check=check,
                on_bytes=on_bytes, verify=verify, sleep=sleep, max_bytes=max_bytes,
            )  # fmt: skip
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part = _new_part(folder)
    except OSError as error:
        raise DownloadError(
            f"{folder} cannot be written ({error.strerror}): choose another folder, then collect "
            f"task {taskid} again.",
            taskid=taskid,
        ) from None
    rng = random.Random()
    try:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                _fetch(output, part, local_host, session, check, on_bytes, max_bytes)
                break
            except _PassingError as error:
                if attempt == ATTEMPTS:
                    raise _refusal(output, taskid, str(error)) from None
                sleep(wait_s(attempt, error, rng))
            except _LastingError as error:
                raise _refusal(output, taskid, str(error)) from None
        try:
            verify(part, output)
        except DownloadError as error:
            raise _refusal(output, taskid, str(error)) from None
        target = free_name(folder, safe_name(output))
        try:
            os.replace(part, target)
        except OSError:
            target.unlink(missing_ok=True)
            raise
        return target
    except OSError as error:
        raise DownloadError(
            f"The result of task {taskid} cannot be written to {folder} ({error.strerror}): make "
            "room or choose another folder, then collect it again; it is paid for.",
            taskid=taskid,
        ) from None
    finally:
        part.unlink(missing_ok=True)


class _PassingError(Exception):
    """Worth another attempt."""


class _LastingError(Exception):
    """Not worth one."""


def _refusal(output: Output, taskid: str, reason: str) -> DownloadError:
    return DownloadError(
        f"{output.name or 'The result'} of task {taskid} cannot be fetched: {reason}. The task is "
        "done and paid for; collect it again by its id.",
        taskid=taskid,
    )


def _fetch(
    output: Output,
    part: Path,
    local_host: str,
    session: requests.Session,
    check: Callable[[], None],
    on_bytes: Callable[[int, int | None], None],
    max_bytes: int,
) -> None:
    try:
        with _open(output.url, local_host, session) as response:
            announced = response.headers.get("Content-Length", "")
            expected = int(announced) if announced.isdigit() else None
            for size in (expected, output.num_bytes):
                if size is not None and size > max_bytes:
                    raise _LastingError(f"it is announced with {size} bytes, over {max_bytes}")
            done = 0
            with part.open("wb") as file:
                for piece in _pieces(response):
                    check()
                    done += len(piece)
                    if done > max_bytes:
                        raise _LastingError(f"it is over {max_bytes} bytes")
                    file.write(piece)
                    on_bytes(done, expected or output.num_bytes)
                file.flush()
                os.fsync(file.fileno())
    except requests.RequestException as error:
        raise _PassingError(f"the connection failed ({type(error).__name__})") from None
    if expected is not None and done != expected:
        raise _PassingError(f"{done} of {expected} bytes came")
    if output.num_bytes is not None and done != output.num_bytes:
        raise _PassingError(f"{done} bytes came where Wiro names {output.num_bytes}")
    _check_container(output, part)


def _pieces(response: requests.Response) -> Iterator[bytes]:
    """The content as it comes, so that a slow server does not hold up `check`."""
    raw = response.raw
    # urllib3 has read1 since version 2.1; before it, small pieces must do
    read, size = getattr(raw, "read1", None), CHUNK_BYTES
    if read is None:
        read, size = raw.read, 16 * 1024
    try:
        while piece := read(size):
            yield piece
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise _PassingError(f"the connection failed ({type(error).__name__})") from None


def _check_container(output: Output, part: Path) -> None:
    is_mp4 = output.contenttype == "video/mp4" or output.name.lower().endswith(".mp4")
    with part.open("rb") as file:
        head = file.read(12)
    if is_mp4 and head[4:8] != b"ftyp":
        raise _PassingError("it is no MP4 file")
    if not head:
        raise _PassingError("it is empty")


def _open(url: str, local_host: str, session: requests.Session) -> requests.Response:
    """The answer at the end of a chain of allowed addresses."""
    for _ in range(MAX_REDIRECTS + 1):
        check_address(url, local_host)
        try:
            response = session.get(
                url, stream=True, allow_redirects=False, timeout=(CONNECT_S, READ_S),
                headers={"Accept-Encoding": "identity"}, auth=_no_auth,
            )  # fmt: skip
        except ValueError:  # of an address, or of one it is redirected to
            raise _LastingError("its address is none, or is redirected to none") from None
        status = response.status_code
        if status == 200:
            return response
        response.close()
        if status in (301, 302, 303, 307, 308) and response.headers.get("Location"):
            url = urljoin(url, response.headers["Location"])
            continue
        if status in PASSING or status >= 500:
            raise _PassingError(f"the server answered HTTP {status}")
        raise _LastingError(f"the server answered HTTP {status}")
    raise _LastingError(f"there are more than {MAX_REDIRECTS} redirects")


def _no_auth(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """Keeps requests from adding what a .netrc says."""
    return request


def check_address(url: str, local_host: str = "") -> None:
    """Refuse everything but https to public addresses (and one test server on this machine)."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise _LastingError("its address is none") from None
    if local_host and parts.netloc == local_host and host in LOOPBACK:
        return
    if parts.scheme != "https" or not host or parts.username or parts.password:
        raise _LastingError(f"its address is {parts.scheme or 'no'}: only https is fetched")
    try:
        found = socket.getaddrinfo(host, port or 443, type=socket.SOCK_STREAM)
    except OSError:
        raise _PassingError(f"{host} is not known") from None
    except UnicodeError:
        raise _LastingError("its address is none") from None
    for entry in found:
        address = ipaddress.ip_address(str(entry[4][0]).partition("%")[0])
        if not address.is_global or address.is_multicast:
            raise _LastingError(f"{host} is not a public address")


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


def _new_part(folder: Path) -> Path:
    part = folder / f".wiro-{os.getpid()}-{random.getrandbits(48):012x}.part"
    part.open("xb").close()
    return part


def read_part(path: Path) -> FilePart:
    """A file as a part of a request, under an ASCII name that keeps its suffix.

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
