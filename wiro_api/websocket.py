"""Live progress of a task over the service's socket.

The socket only makes progress livelier: what a task is, and whether it has ended, is read from
Task/Detail alone. So whatever goes wrong here costs nothing but liveliness, is logged once, and the
wait goes on by polling.

Protocol: connect without headers, send {"type": "task_info", "tasktoken": ...}, read text frames.
The task token is the credential. Source: websocket.md of wiroai/Wiro-Docs, 2026-04-17.
"""

import base64
import json
import logging
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote, urlsplit

import requests
import requests.utils

from .errors import ConfigError, DependencyError, WiroError
from .task import STATUSES, Progress, parse_progress
from .transport import (
    BASE_URL_VARIABLE,
    check_base_url,
    no_certificate,
    no_login,
    no_socks,
    place_of,
    proxy_of,
    proxy_variable,
    shut,
)
from .wire import id_of, read_json

logger = logging.getLogger("wiro_api.websocket")

SOCKET_URL = "wss://socket.wiro.ai/v1"
SOCKET_URL_VARIABLE = "WIRO_SOCKET_URL"
OPEN_S = 30.0
#: how long one read waits before it looks whether the watch is over
TICK_S = 0.5
RECONNECTS, LONGEST_WAIT_S = 5, 30.0
#: the service pings every 30 s; a socket that is silent for longer than this is taken for dead
SILENT_S = 90.0
#: polls may be rare for so long after a frame of the task; about two steps of a video model
RECENT_S = 5.0
#: frames that come many times while a task is in one state
_REPEATED = ("task_output", "task_error")
#: of a message with all its frames, and from its first byte to its last
MAX_FRAME_BYTES, FRAME_S = 4 * 1024 * 1024, 30.0
#: of what comes before the first frame
MAX_OPENING_BYTES = 64 * 1024
#: of a frame's text, what is passed on as log
MAX_LOG = 16 * 1024


def socket_url() -> str:
    """Of the progress socket; "" if another service is used and it has none named."""
    given = os.environ.get(SOCKET_URL_VARIABLE, "")
    return given or ("" if os.environ.get(BASE_URL_VARIABLE) else SOCKET_URL)


def check_socket_url(url: str) -> str:
    """Check the URL of a progress socket.

    Returns:
        The URL without its trailing slash.

    Raises:
        ConfigError: it is not one of wss, or of ws on this machine.
    """
    try:
        return check_base_url(url, schemes=("wss", "ws"))
    except ConfigError:
        raise ConfigError(
            f"{SOCKET_URL_VARIABLE} is not a wss address without user, query and fragment (ws is "
            f"for this machine only): use {SOCKET_URL}, or unset it."
        ) from None


class _Wire:
    """A connected socket that hands out so many bytes in so much time, and then no more.

    websocket-client reads headers, frames and fragments of any length, for as long as they take.
    """

    def __init__(self, connected: socket.socket, clock: Callable[[], float]) -> None:
        self._socket, self._clock = connected, clock
        self._is_over = False
        self._first_at: float | None = None
        self.allow(MAX_OPENING_BYTES)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)

    def allow(self, num_bytes: int) -> None:
        """Begin anew: so many bytes may come, within `FRAME_S` of the first."""
        self._num_bytes, self._first_at = num_bytes, None

    def allow_time(self) -> None:
        """Begin the time anew, but not the bytes: a ping may stand between two fragments."""
        self._first_at = None

    def recv(self, size: int) -> bytes:
        """As a socket's; raises ConnectionError beyond what is allowed."""
        if self._is_over:
            raise ConnectionError("left")
        if self._num_bytes <= 0:
            raise ConnectionError("too many bytes")
        if self._first_at is not None and self._clock() - self._first_at > FRAME_S:
            raise ConnectionError("too slow")
        piece = self._socket.recv(min(size, self._num_bytes))
        self._num_bytes -= len(piece)
        if self._first_at is None:
            self._first_at = self._clock()
        return piece

    def cut(self) -> None:
        """End it under the feet of the thread that reads."""
        self._is_over = True
        shut(self._socket)

    def to_tls(self, context: ssl.SSLContext, host: str) -> None:
        """Encrypt it; the time for that is the socket's time-out as a whole."""
        self._socket = context.wrap_socket(self._socket, server_hostname=host)


def _connect(url: str, clock: Callable[[], float], use: Callable[[_Wire], None]) -> _Wire:
    """Connect to the socket's host, by the proxy and the certificates that calls use too.

    Args:
        url: of the socket.
        clock: seconds.
        use: called with the connection as soon as it is there.

    Returns:
        The connection.
    """
    parts = urlsplit(url)
    host, is_safe = parts.hostname or "", parts.scheme == "wss"
    port = parts.port or (443 if is_safe else 80)
    as_call = f"http{url.removeprefix('ws')}"
    with requests.Session() as session:
        settings = session.merge_environment_settings(as_call, {}, None, None, None)
    proxy = proxy_of(as_call, settings["proxies"])
    wire = _Wire(_dial(proxy, as_call, host, port), clock)
    try:
        use(wire)
        if proxy and not proxy.startswith("socks"):
            _tunnel(wire, proxy, as_call, host, port)
            wire.allow(MAX_OPENING_BYTES)
        if is_safe:
            wire.to_tls(_tls_of(settings["verify"]), host)
    except BaseException:
        wire.close()
        raise
    return wire


def _dial(proxy: str, as_call: str, host: str, port: int) -> socket.socket:
    """A connection to the host, or to the proxy that is to connect to it."""
    if not proxy:
        return socket.create_connection((host, port), OPEN_S)
    parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    if parts.scheme.startswith("socks"):
        try:
            import socks
        except ImportError:
            raise DependencyError(no_socks(as_call)) from None
        kind = socks.SOCKS5 if parts.scheme.startswith("socks5") else socks.SOCKS4
        connected: socket.socket = socks.create_connection(
            (host, port),
            OPEN_S,
            proxy_type=kind,
            proxy_addr=parts.hostname,
            proxy_port=parts.port,
            proxy_rdns=parts.scheme in ("socks5h", "socks4a"),
            proxy_username=unquote(parts.username or "") or None,
            proxy_password=unquote(parts.password or "") or None,
        )
        return connected
    if parts.scheme != "http" or not parts.hostname:
        raise ConfigError(
            f"{proxy_variable(as_call)} does not name a proxy that the progress socket can use, "
            "which is one of http or socks"
        )
    return socket.create_connection((parts.hostname, parts.port or 80), OPEN_S)


def _tunnel(wire: _Wire, proxy: str, as_call: str, host: str, port: int) -> None:
    """Have an HTTP proxy connect to the host."""
    parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    login = ""
    if parts.username:
        user = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
        login = f"Proxy-Authorization: Basic {base64.b64encode(user).decode()}\r\n"
    wire.sendall(f"CONNECT {place} HTTP/1.1\r\nHost: {place}\r\n{login}\r\n".encode())
    head = bytearray()
    while not head.endswith(b"\r\n\r\n"):
        piece = wire.recv(1)  # not a byte of what comes behind it
        if not piece:
            raise ConnectionError("the proxy hung up")
        head += piece
    status = head.split(b" ", 2)[1:2]
    if status == [b"407"]:
        raise ConfigError(no_login(as_call, host, ""))
    if status != [b"200"]:
        raise ConnectionError(f"the proxy {place_of(proxy)} does not connect to {host}")


def _tls_of(verify: bool | str | None) -> ssl.SSLContext:
    """What calls trust; where no file is named, what the system trusts too."""
    if isinstance(verify, str):
        is_folder = os.path.isdir(verify)
        return ssl.create_default_context(
            cafile=None if is_folder else verify, capath=verify if is_folder else None
        )
    context = ssl.create_default_context()
    context.load_verify_locations(requests.utils.DEFAULT_CA_BUNDLE_PATH)
    return context


class ProgressSocket:
    """Follows one task in a thread of its own, from `with` to the end of the block.

    Args:
        token: the task token.
        url: wss, or ws for this machine only.
        on_progress: called in that thread with each report.
        on_log: called in that thread with each line of the task's log.
        taskid: frames of another task are not used.
    """

    def __init__(
        self,
        token: str,
        *,
        url: str = SOCKET_URL,
        on_progress: Callable[[Progress], None],
        on_log: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
        taskid: str = "",
    ) -> None:
        self._url = check_socket_url(url)
        self._token, self._taskid = token, taskid
        self._on_progress, self._on_log = on_progress, on_log
        self._clock = clock
        self._over = threading.Event()
        self._news = threading.Event()
        self._told_at: float | None = None
        self._wire: _Wire | None = None
        self._thread = threading.Thread(target=self._follow, name="wiro socket", daemon=True)

    @property
    def is_healthy(self) -> bool:
        """Whether a frame of the task came just now: polling may slow down to a watchdog.

        That it is connected tells nothing: a socket may stay silent for good.
        """
        told_at = self._told_at
        return told_at is not None and self._clock() - told_at < RECENT_S

    def take_news(self) -> bool:
        """Whether a new state of the task was announced since the last call."""
        has_news = self._news.is_set()
        self._news.clear()
        return has_news

    def __enter__(self) -> "ProgressSocket":
        try:
            import websocket  # noqa: F401
        except ImportError as error:
            raise DependencyError(
                "Live progress needs websocket-client: pip install websocket-client."
            ) from error
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._wire is not None:
            self._wire.cut()
        self._thread.join(TICK_S + 0.5)

    def _follow(self) -> None:
        wait = 1.0
        for attempt in range(RECONNECTS + 1):
            try:
                if self._read_one_connection():
                    return
                reason = "it was closed"
            except Exception as error:  # noqa: BLE001 - a thread's end; the wait goes on by polling
                reason = _reason(error, self._url)
            finally:
                self._told_at = None
            if self._over.is_set():
                return
            if attempt == 0:
                logger.warning("The progress socket failed (%s): polling goes on.", reason)
            if attempt == RECONNECTS or self._over.wait(wait):
                return
            wait = min(2 * wait, LONGEST_WAIT_S)

    def _read_one_connection(self) -> bool:
        """Read until the end of the task or of the watch (True), or of the connection (False)."""
        import websocket

        wire = _connect(self._url, self._clock, self._use)
        try:
            # a redirect is not followed: the token would go elsewhere
            connection = websocket.create_connection(
                self._url, timeout=OPEN_S, redirect_limit=0, socket=wire, skip_utf8_validation=True
            )
        except BaseException:
            wire.close()
            raise
        try:
            if connection.getstatus() != 101:
                raise ConnectionError(f"answered {connection.getstatus()}")
            connection.send(json.dumps({"type": "task_info", "tasktoken": self._token}))
            connection.settimeout(TICK_S)
            wire.allow(MAX_FRAME_BYTES)
            heard = self._clock()
            while not self._over.is_set():
                try:
                    opcode, data = connection.recv_data(control_frame=True)
                except websocket.WebSocketTimeoutException:
                    if self._clock() - heard > SILENT_S:
                        return False
                    continue
                heard = self._clock()
                wire.allow_time()
                if opcode in (websocket.ABNF.OPCODE_TEXT, websocket.ABNF.OPCODE_BINARY):
                    wire.allow(MAX_FRAME_BYTES)
                if opcode == websocket.ABNF.OPCODE_CLOSE:
                    return False
                elif opcode == websocket.ABNF.OPCODE_TEXT and self._take(data):
                    return True
            return True
        finally:
            connection.close(timeout=0)  # a courtesy; its answer is not waited for
            # close() does nothing after the server has closed
            connection.shutdown()  # type: ignore[no-untyped-call]

    def _use(self, wire: _Wire) -> None:
        self._wire = wire
        if self._over.is_set():
            wire.cut()

    def _take(self, data: bytes) -> bool:
        """Use one text frame; True if it says that the task has ended."""
        try:
            frame = read_json(data)
        except ValueError:
            return False
        if not isinstance(frame, dict):
            return False
        kind, message = frame.get("type"), frame.get("message")
        other = self._taskid and id_of(frame.get("id")) not in ("", self._taskid)
        if other or not isinstance(kind, str) or not kind.startswith("task_"):
            return False
        self._told_at = self._clock()
        if kind in ("task_output", "task_error"):
            progress = parse_progress(message)
            if progress is not None:
                self._on_progress(progress)
            elif isinstance(message, str) and message.strip():
                self._on_log(message.strip()[-MAX_LOG:])
        if kind in STATUSES and kind not in _REPEATED:
            self._news.set()
        return kind in STATUSES and STATUSES[kind].is_terminal


def _reason(error: Exception, url: str) -> str:
    """Why a connection failed, without what an address may hold."""
    if isinstance(error, WiroError):
        return str(error).rstrip(".")
    if isinstance(error, ssl.SSLCertVerificationError):
        return no_certificate(urlsplit(url).hostname or "", error, "").rstrip(". ")
    return type(error).__name__
