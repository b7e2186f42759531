"""One POST and what came back, and when to try again.

Every call of the service is a POST, reads too, so whether it may be repeated depends on the
endpoint and not on the method: reads are, a Run is only if it surely never left. Failures arrive as
HTTP 200 with `result: false` as well as by status, so the body is read before the status.
"""

import json
import os
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import requests

from .errors import (
    CODES,
    ApiError,
    AuthError,
    ConcurrencyError,
    ConfigError,
    RequestError,
    TransportError,
)
from .signing import WiroAuth
from .task import bool_of, int_of, redact, text_of

BASE_URL = "https://api.wiro.ai/v1"
BASE_URL_VARIABLE = "WIRO_API_BASE_URL"
#: seconds to connect, and to wait between two bytes of an answer, by kind of call
CONNECT_S = 10.0
READ_S = 30.0
RUN_S = 60.0
UPLOAD_S = 300.0
#: waits between attempts double from the first to the last
FIRST_WAIT_S, LAST_WAIT_S = 0.5, 30.0
#: of an answer that is not JSON, what an error message quotes
EXCERPT = 200

LOOPBACK = ("localhost", "127.0.0.1", "::1")
_PERMANENT = re.compile(
    r"request (parameter|files)|parameters are invalid|permission|suspend|not allowed"
    r"|authoriz|authoris|signature|must be (integer|between)|-required|invalid-parameters",
    re.IGNORECASE,
)
#: (name, content, content type) of a file part
FilePart = tuple[str, bytes, str]


def check_base_url(url: str, *, schemes: tuple[str, str] = ("https", "http")) -> str:
    """An address without its trailing slash.

    Args:
        schemes: the safe one, and the one that is accepted for this machine only.
    Raises:
        ConfigError: not such an address, or one with user, query or fragment.
    """
    safe, local = schemes
    try:
        parts = urlsplit(url.strip())
        _ = parts.port
    except ValueError:
        parts = urlsplit("")
    is_local = parts.scheme == local and parts.hostname in LOOPBACK
    bare = not (parts.username or parts.password or parts.query or parts.fragment)
    if not parts.hostname or not bare or not (parts.scheme == safe or is_local):
        raise ConfigError(
            f"{_without_user(url)!r} is not a {safe} address without user, query and fragment "
            f"({local} is for this machine only): use {BASE_URL}, or unset {BASE_URL_VARIABLE}."
        )
    return url.strip().rstrip("/")


def base_url() -> str:
    """Of the service, or of the one that the environment names."""
    return os.environ.get(BASE_URL_VARIABLE) or BASE_URL


def local_host() -> str:
    """host:port of a test server on this machine, "" for the real service."""
    address = urlsplit(base_url())
    return address.netloc if address.scheme == "http" else ""


def _without_user(url: str) -> str:
    return re.sub(r"//[^/@]*@", "//...@", url)


def post(
    session: requests.Session,
    url: str,
    auth: WiroAuth,
    *,
    body: Mapping[str, Any] | None = None,
    files: Sequence[tuple[str, FilePart]] = (),
    read_s: float = READ_S,
    payload_keys: Sequence[str] = (),
    before_last_byte: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Send once; never follows a redirect, which would carry the key elsewhere.

    Args:
        body: sent as JSON, or, with files, as text parts before them.
        files: (parameter, part), in order; a parameter may come several times.
        read_s: longest wait between two bytes of the answer.
        payload_keys: one of these makes an answer without `result` a success.
        before_last_byte: called when all but the end of the request has left; what it raises keeps
            the end from leaving, and without its end the service cannot act on a request.
    Returns:
        The answer's object, its "data" merged in below the top level.
    Raises:
        TransportError: no usable answer. ApiError: the service's own no.
    """
    content: dict[str, Any]
    if files:
        fields = [
            (name, (None, _as_text(one)))
            for name, value in (body or {}).items()
            for one in (value if isinstance(value, list) else [value])
        ]
        content = {"files": [*fields, *files]}
    else:
        content = {"json": dict(body or {})}
    try:
        request = session.prepare_request(requests.Request("POST", url, auth=auth, **content))
    except (ValueError, requests.RequestException) as error:  # NaN, half a character, ...
        raise ConfigError(
            f"The parameters cannot be sent ({type(error).__name__}): they hold a number that is "
            "none or a broken character."
        ) from None
    whole = _Body(request.body, before_last_byte)
    request.body = whole  # type: ignore[assignment]
    settings = session.merge_environment_settings(url, {}, None, None, None)
    try:
        response = session.send(
            request, timeout=(CONNECT_S, read_s), allow_redirects=False, **settings
        )
    except requests.RequestException as error:
        raise TransportError(
            f"Wiro could not be reached ({_reason(error)}): check the network.",
            was_sent=whole.is_whole,
        ) from None
    sent = [text_of((body or {}).get(name)) for name in ("tasktoken", "socketaccesstoken")]
    return read_answer(response, payload_keys, (*auth.secrets, *sent))


class _Body:
    """A request's content, read piece by piece as it leaves, which knows when its end does.

    is_whole: whether the last piece was handed out; before that nothing can have been done.
    """

    def __init__(
        self, content: bytes | str | None, before_last_byte: Callable[[], None] | None
    ) -> None:
        self._content = content.encode() if isinstance(content, str) else content or b""
        self._before_last_byte = before_last_byte
        self._position = 0
        self.is_whole = False

    def __len__(self) -> int:
        return len(self._content)

    def read(self, size: int = -1) -> bytes:
        """The next piece, b"" after the last."""
        end = len(self._content) if size < 0 else self._position + size
        if end >= len(self._content) and not self.is_whole:
            if self._before_last_byte is not None:
                self._before_last_byte()
            self.is_whole = True
        piece = self._content[self._position : end]
        self._position = end
        return piece


def _as_text(value: object) -> str:
    return json.dumps(value) if isinstance(value, dict | bool) else str(value)


def _reason(error: requests.RequestException) -> str:
    """The kind of failure; the text of these errors holds addresses, and may hold more."""
    inner = error.args[0] if error.args else None
    return type(getattr(inner, "reason", None) or inner or error).__name__


def read_answer(
    response: requests.Response, payload_keys: Sequence[str] = (), secrets: Sequence[str] = ()
) -> dict[str, Any]:
    """The object of an answer, or the error it means; args and errors as for `post`.

    Args:
        secrets: no error quotes them, whatever the service says.
    """
    status = response.status_code
    if 300 <= status < 400:
        raise TransportError(
            f"Wiro answered with a redirect (HTTP {status}), which is never followed: check "
            f"{BASE_URL_VARIABLE}.",
            status=status,
        )
    try:
        body = json.loads(response.content)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        excerpt = redact(response.text, secrets)[:EXCERPT].strip()
        raise TransportError(
            f"Wiro answered HTTP {status} with something else than an object: {excerpt!r}.",
            status=status,
            retry_after_s=_retry_after(response),
        )
    inner = body.get("data")
    merged = {**inner, **body} if isinstance(inner, dict) else body
    success = bool_of(body.get("result"))
    if success is None and 200 <= status < 300:
        success = any(merged.get(key) for key in payload_keys)
    if success and status < 400:
        return merged
    code, message = _first_error(body.get("errors"))
    message = redact(message, secrets)
    if code != ConcurrencyError.CODE and (status in (408, 429) or status >= 500):
        raise TransportError(
            f"Wiro answered HTTP {status} ({message or 'no reason given'}).",
            status=status,
            retry_after_s=_retry_after(response),
        )
    error = to_error(code, message, status)
    error.is_own = _is_own_refusal(body, merged)
    raise error


def _is_own_refusal(body: Mapping[str, Any], merged: Mapping[str, Any]) -> bool:
    """Whether an answer is the service's own no, in a documented shape, and names no task."""
    errors = body.get("errors")
    if merged.get("taskid") or merged.get("socketaccesstoken"):
        return False
    if "result" in body:
        is_list = isinstance(errors, list) and all(isinstance(e, str | Mapping) for e in errors)
        return bool_of(body["result"]) is False and (errors is None or is_list)
    return (
        isinstance(errors, list)
        and bool(errors)
        and all(isinstance(e, Mapping) and int_of(e.get("code")) in {0, *CODES} for e in errors)
    )


def _first_error(errors: object) -> tuple[int, str]:
    first = errors[0] if isinstance(errors, list) and errors else errors
    if isinstance(first, Mapping):
        return int_of(first.get("code")) or 0, text_of(first.get("message"))
    return 0, text_of(first)


def to_error(code: int, message: str, status: int) -> ApiError:
    """The class and the sentence of a refusal, by code, status and wording."""
    said = f'Wiro says "{message}"' if message else "Wiro refused without a reason"
    fixes: dict[type[ApiError], str] = {
        AuthError: "check key, secret, the project's kind of authentication and its IP list",
        RequestError: "change the request; nothing was started",
    }
    cls = CODES.get(code, ApiError)
    if status in (401, 403):
        cls = AuthError
    elif cls is ApiError and (status == 404 or _PERMANENT.search(message)):
        cls = RequestError
    fix = fixes.get(cls)
    suffix = f": {fix}." if fix else "."
    return cls(f"{said} (code {code}, HTTP {status}){suffix}", code=code, status=status)


def is_passing(error: Exception) -> bool:
    """Whether the same read may succeed later."""
    if isinstance(error, TransportError):
        return error.status is None or error.status < 300 or error.status >= 408
    return type(error) is ApiError


def wait_s(attempt: int, error: Exception, rng: random.Random) -> float:
    """Seconds before attempt number `attempt` + 1 (from 1), as asked for or doubling, jittered."""
    asked = getattr(error, "retry_after_s", None)
    if asked is not None:
        return float(min(max(asked, 0.0), 300.0))
    wait = min(FIRST_WAIT_S * 2.0 ** (attempt - 1), LAST_WAIT_S)
    return wait * rng.uniform(0.8, 1.2)


def _retry_after(response: requests.Response) -> float | None:
    value = response.headers.get("Retry-After", "")
    return float(value) if value.isdigit() else None
