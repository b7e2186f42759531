"""One POST and what came back, and when to try again.

Every call of the service is a POST, reads too, so whether it may be repeated depends on the
endpoint and not on the method: reads are, a Run is only if it surely never left. Failures arrive as
HTTP 200 with `result: false` as well as by status, so the body is read before the status.

Nothing the other side does may hold a call or fill the memory: a call has a thread of its own,
which its caller leaves at its deadline, and a call that is left has its connection cut; an answer
is read piece by piece up to a limit, before and after it is unpacked.
"""

import contextlib
import contextvars
import errno
import http.client
import json
import os
import random
import re
import socket
import ssl
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from functools import lru_cache
from http.cookiejar import DefaultCookiePolicy
from typing import Any, TypeVar
from urllib.parse import urlsplit

import requests
import requests.adapters
import requests.exceptions
import requests.utils
import urllib3.exceptions

from .errors import (
    CODES,
    ApiError,
    AuthError,
    BalanceError,
    ConcurrencyError,
    ConfigError,
    DependencyError,
    RequestError,
    TransportError,
    WiroError,
)
from .signing import WiroAuth
from .wire import bool_of, clean_text, int_of, one_line, read_json, redact, text_of

BASE_URL = "https://api.wiro.ai/v1"
BASE_URL_VARIABLE = "WIRO_API_BASE_URL"
#: seconds to connect, and to wait between two bytes of an answer, by kind of call
CONNECT_S = 10.0
READ_S = 30.0
RUN_S = 60.0
UPLOAD_S = 300.0
#: a call may also take as long as its content needs at this speed
LEAST_BYTES_PER_S = 16 * 1024
#: waits between attempts double from the first to the last; the service may ask for the longest
FIRST_WAIT_S, LAST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0, 300.0
#: of an answer, packed or not; the logs of a task are the long part of it
MAX_ANSWER_BYTES = 16 * 1024 * 1024
PIECE_BYTES = 64 * 1024
#: of an answer or a refusal, what an error message quotes, and what it is looked for in
EXCERPT, EXCERPT_FROM = 200, 4096
#: of a header that is looked at
MAX_HEADER = 200
#: between two looks at whether a caller has left
LOOK_S = 0.02

LOOPBACK = ("localhost", "127.0.0.1", "::1")
_PERMANENT = re.compile(
    r"request (parameter|files)|parameters are invalid|permission|suspend|not allowed"
    r"|authoriz|authoris|signature|must be (integer|between)|-required|invalid-parameters",
    re.IGNORECASE,
)
#: what a call brings
Found = TypeVar("Found")
#: (name, content, content type) of a file part
FilePart = tuple[str, bytes, str]


def noop(*_: object) -> None:
    """Do nothing."""


def check_base_url(url: str, *, schemes: tuple[str, str] = ("https", "http")) -> str:
    """Check a base URL.

    Args:
        url: as a person gives it.
        schemes: the safe one, and the one that is accepted for this machine only.

    Returns:
        The URL without its trailing slash.

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
    on_answer: Callable[[Mapping[str, Any]], None] | None = None,
    on_error: Callable[[TransportError | ApiError], None] | None = None,
    whole_s: float | None = None,
    sleep: Callable[[float], None] | None = None,
) -> dict[str, Any]:
    """Send once; never follows a redirect, which would carry the key elsewhere.

    Args:
        session: of `make_session`; with another one a call that is left goes on for a while.
        url: of the endpoint.
        auth: signs the request.
        body: sent as JSON, or, with files, as text parts before them.
        files: (parameter, part), in order; a parameter may come several times.
        read_s: longest wait between two bytes of the answer.
        payload_keys: one of these makes an answer without `result` a success.
        before_last_byte: called when all but the end of the request has left; what it raises keeps
            the end from leaving, and without its end the service cannot act on a request.
        on_answer: called with what is returned. With it, a call whose end has left is listened to
            until its time is over, also if `sleep` has ended the wait: the answer is worth having.
        on_error: called with what is raised instead, under the same terms.
        whole_s: longest time from the first byte to the last, if less than what `longest_s` allows.
        sleep: called again and again while the call is under way; what it raises ends the wait.

    Returns:
        The answer's object, its "data" merged in below the top level.

    Raises:
        TransportError: no usable answer.
        ApiError: the service refused.
        ConfigError: the parameters cannot be sent, or this machine's settings keep calls from
            leaving.
        DependencyError: this machine's settings need a package that is missing.
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
    except (ValueError, requests.RequestException) as error:  # NaN, an unpaired surrogate, ...
        raise ConfigError(
            f"The parameters cannot be sent ({type(error).__name__}): they contain NaN, infinity "
            "or an unpaired surrogate. Remove it."
        ) from None
    request.headers["Accept-Encoding"] = "gzip, deflate"  # what `_unpacked` undoes
    line = _Line(before_last_byte)
    whole = _Body(request.body, line)
    request.body = whole  # type: ignore[assignment]
    sent = [text_of((body or {}).get(name)) for name in ("tasktoken", "socketaccesstoken")]

    def exchange() -> dict[str, Any]:
        try:
            answer = answered()
        except (TransportError, ApiError) as error:
            if on_error is not None:
                on_error(error)
            raise
        if on_answer is not None:
            on_answer(answer)  # here, because the caller may have left
        return answer

    def answered() -> dict[str, Any]:
        settings: Mapping[str, Any] = {}
        try:
            settings = session.merge_environment_settings(url, {}, True, None, None)
            response = session.send(
                request, timeout=(CONNECT_S, read_s), allow_redirects=False, **settings
            )
        except (
            requests.RequestException,
            urllib3.exceptions.HTTPError,
            http.client.HTTPException,
            OSError,
            ValueError,
        ) as error:
            raise _failure(error, url, settings.get("proxies") or {}, line.is_whole) from None
        with contextlib.closing(response):
            return read_answer(response, payload_keys, (*auth.secrets, *sent))

    longest = longest_s(read_s, len(whole))
    longest = longest if whole_s is None else min(whole_s, longest)
    return _in_time(exchange, line, longest, sleep, listens=on_answer is not None)


def longest_s(read_s: float, num_bytes: int) -> float:
    """Seconds that a call may take as a whole: sent, answered and read."""
    return CONNECT_S + 2.0 * read_s + num_bytes / LEAST_BYTES_PER_S


# --- a call that can be left --------------------------------------------------------------------


class _Line:
    """Between a call in its thread and the caller who may leave it.

    A call that is left sends nothing more: either the end of its request had left before, which
    `is_whole` tells, or it never does.
    """

    def __init__(self, before_last_byte: Callable[[], None] | None) -> None:
        self._before_last_byte = before_last_byte
        self._lock = threading.Lock()
        self._connection: Any = None
        self._socket: Any = None
        self._is_left = False
        self.is_whole = False

    def let_end_leave(self) -> None:
        """Called before the last piece of a request is handed out."""
        with self._lock:
            if self._is_left:
                raise TransportError("The caller has left.", was_sent=False)
            if self._before_last_byte is not None:
                self._before_last_byte()
            self.is_whole = True

    def use(self, connection: Any, its_socket: Any) -> None:
        """Called when a connection is made, and when a request is about to go over it."""
        with _connections:
            if self._is_left:
                raise OSError(errno.ECONNABORTED, "the caller has left")
            connection.line = self
            self._connection, self._socket = connection, its_socket

    def leave(self, cut_after_s: float = 0.0) -> bool:
        """Send nothing more.

        Args:
            cut_after_s: if the end of the request has left, the connection is cut only after this
                time.

        Returns:
            Whether the end of the request has left.
        """
        with self._lock:
            self._is_left = True
        if self.is_whole and cut_after_s > 0:
            timer = threading.Timer(cut_after_s, self._cut)
            timer.daemon = True
            timer.start()
        else:
            self._cut()
        return self.is_whole

    def _cut(self) -> None:
        with _connections:
            if self._socket is not None and self._connection.line is self:
                shut(self._socket)


#: of who uses which connection; held for moments
_connections = threading.Lock()
_line: contextvars.ContextVar[_Line | None] = contextvars.ContextVar("line", default=None)


def shut(connected: Any) -> None:
    """End a connection both ways, under the feet of a thread that waits for it."""
    inner = getattr(connected, "socket", connected)  # of TLS within TLS
    with contextlib.suppress(OSError):
        # not SSLSocket's own: that drops its cipher first, and a thread may be about to send
        socket.socket.shutdown(inner, socket.SHUT_RDWR)


def in_time(
    work: Callable[[], Found], whole_s: float, sleep: Callable[[float], None] | None
) -> Found:
    """Make requests over a session of `make_session`, and cut them when their time is over.

    Args:
        work: makes them.
        whole_s: seconds for all of it.
        sleep: as for `post`.

    Returns:
        What `work` returns.

    Raises:
        TransportError: the time is over.
    """
    return _in_time(work, _Line(None), whole_s, sleep)


def _in_time(
    exchange: Callable[[], Found],
    line: _Line,
    whole_s: float,
    sleep: Callable[[float], None] | None,
    *,
    listens: bool = False,
) -> Found:
    """Make a call in a thread of its own, which the caller leaves when its time is over.

    Args:
        exchange: makes the call.
        line: to that thread.
        whole_s: seconds for all of it.
        sleep: as for `post`.
        listens: go on listening after the caller has left, until the time is over.

    Returns:
        What `exchange` returns.

    Raises:
        TransportError: the time is over.
    """
    over = threading.Event()
    answer: list[Found] = []
    errors: list[BaseException] = []

    def work() -> None:
        _line.set(line)
        try:
            answer.append(exchange())
        except BaseException as error:  # noqa: BLE001 - it is raised again in the caller
            errors.append(error)
        over.set()

    context = contextvars.copy_context()
    threading.Thread(target=context.run, args=(work,), name="wiro call", daemon=True).start()
    end = time.monotonic() + whole_s
    try:
        while not over.wait(LOOK_S if sleep is not None else min(0.5, max(0.0, whole_s))):
            if sleep is not None:
                sleep(0.0)
            if time.monotonic() >= end:
                break
    except BaseException:
        line.leave(end - time.monotonic() if listens else 0.0)
        raise
    if not over.is_set():
        was_sent = line.leave()
        raise TransportError(
            f"Wiro did not answer as a whole within {whole_s:.0f} s. {_sent(was_sent)}",
            was_sent=was_sent,
        )
    if errors:
        raise errors[0]
    return answer[0]


def make_session() -> requests.Session:
    """A session whose calls can be cut, that follows no redirect and keeps no cookie."""
    session = _Session()
    session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
    for scheme in ("https://", "http://"):
        session.mount(scheme, _Adapter())
    return session


class _Session(requests.Session):
    def get_redirect_target(self, resp: requests.Response) -> None:
        """None: requests would read all that comes with a redirect, even one it does not follow."""


class _Adapter(requests.adapters.HTTPAdapter):
    """Makes connections that tell their call of themselves."""

    def init_poolmanager(self, *arguments: Any, **keywords: Any) -> None:
        super().init_poolmanager(*arguments, **keywords)
        self.poolmanager.pool_classes_by_scheme = _with_lines(self.poolmanager)

    def proxy_manager_for(self, proxy: str, **keywords: Any) -> Any:
        manager = super().proxy_manager_for(proxy, **keywords)
        manager.pool_classes_by_scheme = _with_lines(manager)
        return manager


def _with_lines(manager: Any) -> dict[str, type]:
    return {scheme: _with_line(pool) for scheme, pool in manager.pool_classes_by_scheme.items()}


@lru_cache(maxsize=16)
def _with_line(pool: Any) -> type:
    """A pool of the same kind for connections that tell of themselves."""
    if issubclass(pool.ConnectionCls, _Connection):
        return pool  # type: ignore[no-any-return]
    connection = type("Connection", (_Connection, pool.ConnectionCls), {})
    return type("Pool", (pool,), {"ConnectionCls": connection})


class _Connection:
    """Mixed into urllib3's connections: new ones, and kept ones that are used again."""

    sock: Any

    def _new_conn(self) -> Any:
        made = super()._new_conn()  # type: ignore[misc]
        try:
            self._tell(made)
        except OSError:
            made.close()
            raise
        return made

    def connect(self) -> None:
        super().connect()  # type: ignore[misc]
        self._tell(self.sock)  # in TLS now

    def putrequest(self, *arguments: Any, **keywords: Any) -> None:
        self._tell(self.sock)
        super().putrequest(*arguments, **keywords)  # type: ignore[misc]

    def _tell(self, its_socket: Any) -> None:
        line = _line.get()
        if line is not None and its_socket is not None:
            line.use(self, its_socket)


class _Body:
    """A request's content, read piece by piece as it leaves."""

    def __init__(self, content: bytes | str | None, line: _Line) -> None:
        self._content = content.encode() if isinstance(content, str) else content or b""
        self._line = line
        self._position = 0

    def __len__(self) -> int:
        return len(self._content)

    def read(self, size: int = -1) -> bytes:
        """The next piece, b"" after the last; the last only if the line lets it."""
        end = len(self._content) if size < 0 else self._position + size
        if end >= len(self._content) and not self._line.is_whole:
            self._line.let_end_leave()
        piece = self._content[self._position : end]
        self._position = end
        return piece


def _as_text(value: object) -> str:
    return json.dumps(value) if isinstance(value, dict | bool) else str(value)


# --- why a call failed --------------------------------------------------------------------------


def _failure(error: Exception, url: str, proxies: Mapping[str, str], was_sent: bool) -> WiroError:
    """What kept a call from being answered, and what to do about it."""
    left = _sent(was_sent)
    at_fault = setting_at_fault(error, url, proxies, left)
    if at_fault is not None:
        if isinstance(at_fault, TransportError):
            at_fault.was_sent = was_sent
        return at_fault
    causes = list(_causes(error))
    kind = type(_innermost(error)).__name__
    if any(isinstance(c, socket.gaierror) for c in causes):
        host = urlsplit(url).hostname or ""
        fix = "check the network, or name your proxy in HTTPS_PROXY"
        return TransportError(f"There is no host {host} ({kind}): {fix}. {left}", was_sent=was_sent)
    if isinstance(error, requests.exceptions.ReadTimeout):
        return TransportError(f"Wiro did not answer ({kind}). {left}", was_sent=was_sent)
    reason = ", ".join(filter(None, (kind, _strerror(causes))))
    return TransportError(
        f"Wiro could not be reached ({reason}): check the network. {left}", was_sent=was_sent
    )


def setting_at_fault(
    error: Exception, url: str, proxies: Mapping[str, str], left: str = ""
) -> WiroError | None:
    """Find the setting of this machine that kept a request from being answered.

    The texts of these errors hold URLs with user and password: none is quoted as it is.

    Args:
        error: of requests.
        url: that was asked.
        proxies: in use.
        left: what the sentence ends with.

    Returns:
        An error that names the setting, or None.
    """
    causes = list(_causes(error))
    told = " ".join(map(str, causes))
    host = urlsplit(url).hostname or ""
    proxy = proxy_of(url, proxies)
    found: WiroError | None = None
    malformed = (requests.exceptions.InvalidURL, urllib3.exceptions.LocationValueError)
    refused = next((c for c in causes if isinstance(c, ssl.SSLCertVerificationError)), None)
    wrong_ca = [
        name
        for name in CA_VARIABLES
        if os.environ.get(name)
        and re.search(r"CA certificate bundle|NO_CERTIFICATE|\[X509|\bPEM\b", told)
    ]
    if "SOCKS" in told and isinstance(error, requests.exceptions.InvalidSchema):
        found = DependencyError(no_socks(url))
    elif proxy and isinstance(error, malformed):
        found = ConfigError(
            f"{proxy_variable(url)} is not the address of a proxy: give http://host:port, or unset "
            f"it. {left}"
        )
    elif wrong_ca:
        named = clean_text(os.environ[wrong_ca[0]])[:MAX_HEADER]
        found = ConfigError(
            f"{wrong_ca[0]} names {named!r}, which holds no certificate: name the PEM file of your "
            f"company's CA, or unset it. {left}"
        )
    elif refused is not None or "CERTIFICATE_VERIFY_FAILED" in told:
        found = TransportError(no_certificate(host, refused, left))
    elif proxy and any(isinstance(c, urllib3.exceptions.ProxyError) for c in causes):
        why = _strerror(causes) or type(_innermost(error)).__name__
        found = TransportError(
            no_login(url, host, left)
            if re.search(r"\b407\b", told)
            else f"The proxy {place_of(proxy)} could not be used ({why}): check "
            f"{proxy_variable(url)}, or name {host} in NO_PROXY. {left}"
        )
    return found


#: name a file of CAs, in the order in which requests looks at them
CA_VARIABLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")


def _sent(was_sent: bool) -> str:
    return "The request had left." if was_sent else "Nothing was sent."


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and what it was made of, in the several ways in which libraries wrap them."""
    seen: list[BaseException] = []
    waiting: list[object] = [error]
    while waiting and len(seen) < 20:
        one = waiting.pop(0)
        if isinstance(one, BaseException) and all(one is not other for other in seen):
            seen.append(one)
            waiting += [*one.args, getattr(one, "reason", None), one.__cause__, one.__context__]
    yield from seen


def _innermost(error: Exception) -> object:
    inner = error.args[0] if error.args else None
    found = getattr(inner, "reason", None) or inner
    return found if isinstance(found, BaseException) else error


def _strerror(causes: Sequence[BaseException]) -> str:
    """What the system says: "Connection refused"; these words hold no address."""
    plain = (cause for cause in causes if not isinstance(cause, ssl.SSLError))
    codes = [cause.errno for cause in plain if isinstance(cause, OSError)]
    return next((os.strerror(code) for code in codes if isinstance(code, int) and code > 0), "")


def proxy_of(url: str, proxies: Mapping[str, str]) -> str:
    """The address of the proxy that is used for an address, "" for none."""
    return str(requests.utils.select_proxy(url, dict(proxies)) or "")


def proxy_variable(url: str) -> str:
    """What names the proxy that is used for an address."""
    scheme = urlsplit(url).scheme
    names = (f"{scheme}_proxy", f"{scheme.upper()}_PROXY", "all_proxy", "ALL_PROXY")
    return next((name for name in names if os.environ.get(name)), "the system's proxy setting")


def place_of(proxy: str) -> str:
    """host:port of an address, without its user and password."""
    try:
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        return one_line(f"{parts.hostname}:{parts.port}" if parts.port else str(parts.hostname))
    except ValueError:
        return ""


def no_socks(url: str) -> str:
    """The sentence on a SOCKS proxy without the package for it."""
    return (
        f"{proxy_variable(url)} names a SOCKS proxy, which needs PySocks: pip install "
        '"requests[socks]", or unset it. Nothing was sent.'
    )


def no_login(url: str, host: str, left: str) -> str:
    """The sentence on a proxy that wants to know who is asking."""
    return (
        f"The proxy that {proxy_variable(url)} names wants a user and a password (HTTP 407): give "
        f"them as http://user:password@host:port, or name {host} in NO_PROXY. {left}"
    )


def no_certificate(host: str, refused: BaseException | None, left: str) -> str:
    """The sentence on a certificate that is not trusted here."""
    why = one_line(clean_text(str(getattr(refused, "verify_message", "")))) or "not trusted"
    return (
        f"The certificate of {host} was not accepted ({why[:MAX_HEADER]}): behind a company's "
        f"proxy, set {CA_VARIABLES[0]} to the PEM file of its CA. {left}"
    )


# --- answers ------------------------------------------------------------------------------------


def header(response: requests.Response, name: str) -> str:
    """A header of an answer, cleaned and bounded; "" if it is not there."""
    return clean_text(str(response.headers.get(name, ""))[:MAX_HEADER]).strip()


def read_answer(
    response: requests.Response, payload_keys: Sequence[str] = (), secrets: Sequence[str] = ()
) -> dict[str, Any]:
    """Read the object of an answer, or raise the error it means.

    Args:
        response: with its content unread.
        payload_keys: as for `post`.
        secrets: no error quotes them, whatever the service says.

    Returns:
        The object, its "data" merged in below the top level.

    Raises:
        TransportError: no usable answer.
        ApiError: the service refused.
    """
    status = response.status_code
    if 300 <= status < 400:
        raise TransportError(
            f"Wiro answered with a redirect (HTTP {status}), which is never followed: check "
            f"{BASE_URL_VARIABLE}.",
            status=status,
        )
    retry_after_s = retry_after(response)
    try:
        content = _unpacked(_read(response), header(response, "Content-Encoding").lower())
    except (
        _UnusableError,
        urllib3.exceptions.HTTPError,
        http.client.HTTPException,
        requests.RequestException,
        OSError,
        ValueError,
    ) as error:
        reason = (
            str(error)
            if isinstance(error, _UnusableError)
            else (f"broke off ({type(error).__name__})")
        )
        raise TransportError(
            f"Wiro's answer (HTTP {status}) {reason}: try again later.",
            status=status,
            retry_after_s=retry_after_s,
        ) from None
    try:
        body = read_json(content)
    except ValueError:
        body = None
    if not isinstance(body, dict):
        if status == 407:
            url = response.url or ""
            raise TransportError(
                no_login(url, urlsplit(url).hostname or "", "It was not passed on."), status=status
            )
        found = excerpt(content[:EXCERPT_FROM].decode("utf-8", "replace"), secrets)
        raise TransportError(
            f"Wiro answered HTTP {status} with something else than an object: {found!r}.",
            status=status,
            retry_after_s=retry_after_s,
        )
    inner = body.get("data")
    merged = {**inner, **body} if isinstance(inner, dict) else body
    success = bool_of(body.get("result"))
    if success is None and 200 <= status < 300:
        success = any(merged.get(key) for key in payload_keys)
    if success and status < 400:
        return merged
    code, message = _first_error(body.get("errors"))
    message = excerpt(message, secrets, EXCERPT_FROM)
    if code != ConcurrencyError.CODE and (status in (408, 429) or status >= 500):
        raise TransportError(
            f"Wiro answered HTTP {status} ({message[:EXCERPT] or 'no reason given'}).",
            status=status,
            retry_after_s=retry_after_s,
        )
    refusal = to_error(code, message, status)
    refusal.is_own = _is_own_refusal(body, merged)
    raise refusal


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


class _UnusableError(Exception):
    """What an answer did, in words that follow its name."""


def _read(response: requests.Response) -> bytes:
    """The content of an answer as it came over the wire."""
    raw = response.raw
    # urllib3 has read1 since version 2.1; both read HTTP's chunks by lines of a bounded length,
    # which its own `stream` does not
    read = getattr(raw, "read1", None) or raw.read
    pieces, size = [], 0
    while piece := read(PIECE_BYTES, decode_content=False):
        pieces.append(piece)
        size += len(piece)
        if size > MAX_ANSWER_BYTES:
            raise _UnusableError(f"is over {MAX_ANSWER_BYTES} bytes")
    return b"".join(pieces)


def _unpacked(content: bytes, encoding: str) -> bytes:
    if encoding in ("", "identity") or not content:
        return content
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise _UnusableError(f"is packed as {encoding!r}, which was not asked for")
    window = zlib.MAX_WBITS + 32  # with either header, or, for some that say deflate, with none
    if encoding == "deflate" and content[0] & 0x0F != zlib.DEFLATED:
        window = -zlib.MAX_WBITS
    unpacker = zlib.decompressobj(window)
    try:
        unpacked = unpacker.decompress(content, MAX_ANSWER_BYTES + 1)
    except zlib.error:
        raise _UnusableError(f"is not packed as {encoding}, as it says") from None
    if len(unpacked) > MAX_ANSWER_BYTES:
        raise _UnusableError(f"is over {MAX_ANSWER_BYTES} bytes when it is unpacked")
    if not unpacker.eof:
        raise _UnusableError("broke off")
    return unpacked


def excerpt(text: str, secrets: Sequence[str] = (), length: int = EXCERPT) -> str:
    """The beginning of a text of the service in one line, without secrets."""
    part = text[:EXCERPT_FROM]
    shown = redact(clean_text(part), secrets)
    if len(text) > len(part):  # the cut may have left half a secret at the end
        shown = shown[: -max([1, *map(len, secrets)])]
    return one_line(shown)[:length]


def _first_error(errors: object) -> tuple[int, str]:
    first = errors[0] if isinstance(errors, list) and errors else errors
    if isinstance(first, Mapping):
        return int_of(first.get("code")) or 0, text_of(first.get("message"))
    return 0, text_of(first)


def to_error(code: int, message: str, status: int) -> ApiError:
    """The class and the sentence of a refusal, by code, status and wording."""
    said = f'Wiro says "{message[:EXCERPT]}"' if message else "Wiro refused without a reason"
    fixes: dict[type[ApiError], str] = {
        AuthError: "check key, secret, the project's kind of authentication and its IP list",
        RequestError: "change the request; nothing was started",
        BalanceError: "a run needs a balance of $0.50, training $10; top it up at wiro.ai (Wiro "
        "tells the balance nowhere else). Nothing was started",
        ConcurrencyError: "as many tasks run as the balance allows, one for each $10 and at least "
        "one; wait for one to end. Nothing was started",
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
        return float(min(max(asked, FIRST_WAIT_S), LONGEST_WAIT_S))
    wait = min(FIRST_WAIT_S * 2.0 ** (attempt - 1), LAST_WAIT_S)
    return wait * rng.uniform(0.8, 1.2)


def retry_after(response: requests.Response) -> float | None:
    """Read how long the service asks to wait.

    A time of day is measured from the answer's own: the clocks of two machines are not compared.

    Returns:
        Seconds, within bounds; None if it does not say so clearly.
    """
    asked = header(response, "Retry-After")
    if re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,12})?", asked):
        seconds = float(asked)
    else:
        then, now = _time_of(asked), _time_of(header(response, "Date"))
        if then is None or now is None:
            return None
        seconds = (then - now).total_seconds()
    return min(max(seconds, FIRST_WAIT_S), LONGEST_WAIT_S)


def _time_of(text: str) -> datetime | None:
    """Of the form that HTTP has for dates, which is always GMT."""
    try:
        return parsedate_to_datetime(text).replace(tzinfo=timezone.utc)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
