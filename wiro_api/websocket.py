"""Live progress of a task over the service's socket.

The socket only makes progress livelier: what a task is, and whether it has ended, is read from
Task/Detail alone. So whatever goes wrong here costs nothing but liveliness, is told once, and the
wait goes on by polling.

Protocol: connect without headers, send {"type": "task_info", "tasktoken": ...}, read text frames.
The task token is the credential. Source: websocket.md of wiroai/Wiro-Docs, 2026-04-17.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Callable

from .errors import ConfigError, DependencyError
from .task import RANKS, TERMINAL, Progress, parse_progress
from .transport import BASE_URL_VARIABLE, check_base_url

logger = logging.getLogger(__name__)

SOCKET_URL = "wss://socket.wiro.ai/v1"
SOCKET_URL_VARIABLE = "WIRO_SOCKET_URL"
OPEN_S = 30.0
#: how long one read waits before it looks whether the watch is over
TICK_S = 0.5
RECONNECTS, LONGEST_WAIT_S = 5, 30.0
#: the service pings every 30 s; a socket that is silent for longer than this is taken for dead
SILENT_S = 90.0
#: frames that come many times while a task is in one state
_REPEATED = ("task_output", "task_error")
MAX_FRAME_BYTES = 4 * 1024 * 1024


def socket_url() -> str:
    """Of the progress socket; "" if another service is used and it has none named."""
    given = os.environ.get(SOCKET_URL_VARIABLE, "")
    return given or ("" if os.environ.get(BASE_URL_VARIABLE) else SOCKET_URL)


def check_socket_url(url: str) -> str:
    """The address, without its trailing slash.

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


class ProgressSocket:
    """Follows one task in a thread of its own, from `with` to the end of the block.

    Args:
        token: the task token.
        url: wss, or ws for this machine only.
        on_progress: called in that thread with each report.
        on_log: called in that thread with each line of the task's log.
    """

    def __init__(
        self,
        token: str,
        *,
        url: str = SOCKET_URL,
        on_progress: Callable[[Progress], None],
        on_log: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._url = check_socket_url(url)
        self._token = token
        self._on_progress, self._on_log = on_progress, on_log
        self._clock = clock
        self._over = threading.Event()
        self._news = threading.Event()
        self._healthy = False
        self._thread = threading.Thread(target=self._follow, name="wiro socket", daemon=True)

    @property
    def is_healthy(self) -> bool:
        """Whether frames can be expected to come: polling may slow down to a watchdog."""
        return self._healthy

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
        self._thread.join(2 * TICK_S + 1.0)

    def _follow(self) -> None:
        wait = 1.0
        for attempt in range(RECONNECTS + 1):
            try:
                if self._read_one_connection():
                    return
                reason = "it was closed"
            except Exception as error:  # noqa: BLE001 - a thread's end; the wait goes on by polling
                reason = type(error).__name__
            finally:
                self._healthy = False
            if self._over.is_set():
                return
            if attempt == 0:
                logger.warning("The progress socket failed (%s): polling goes on.", reason)
            if self._over.wait(wait):
                return
            wait = min(2 * wait, LONGEST_WAIT_S)

    def _read_one_connection(self) -> bool:
        """Read until the end of the task or of the watch (True), or of the connection (False)."""
        import websocket

        # a redirect is not followed: the token would go elsewhere
        connection = websocket.create_connection(self._url, timeout=OPEN_S, redirect_limit=0)
        try:
            if connection.getstatus() != 101:
                raise ConnectionError(f"answered {connection.getstatus()}")
            connection.send(json.dumps({"type": "task_info", "tasktoken": self._token}))
            connection.settimeout(TICK_S)
            self._healthy = True
            heard = self._clock()
            while not self._over.is_set():
                try:
                    opcode, data = connection.recv_data(control_frame=True)
                except websocket.WebSocketTimeoutException:
                    if self._clock() - heard > SILENT_S:
                        return False
                    continue
                heard = self._clock()
                if opcode == websocket.ABNF.OPCODE_CLOSE:
                    return False
                elif opcode == websocket.ABNF.OPCODE_TEXT and self._take(data):
                    return True
            return True
        finally:
            connection.close(timeout=0)  # a courtesy; its answer is not waited for
            # close() does nothing after the server has closed
            connection.shutdown()  # type: ignore[no-untyped-call]

    def _take(self, data: bytes) -> bool:
        """Use one text frame; True if it says that the task has ended."""
        if len(data) > MAX_FRAME_BYTES:
            return False
        try:
            frame = json.loads(data)
        except (ValueError, RecursionError):
            return False
        if not isinstance(frame, dict):
            return False
        kind, message = frame.get("type"), frame.get("message")
        if kind in ("task_output", "task_error"):
            progress = parse_progress(message)
            if progress is not None:
                self._on_progress(progress)
            elif isinstance(message, str) and message.strip():
                self._on_log(message.strip())
        if kind in RANKS and kind not in _REPEATED:
            self._news.set()
        return kind in TERMINAL
