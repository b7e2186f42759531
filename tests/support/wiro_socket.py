"""A websocket server on loopback that plays a script to each connection.

A script is a list of actions, or a function that makes them, one by one, from the message that
the client registers with. Actions: ("text", object or str), ("binary", bytes), ("ping",) which
waits for its pong, ("ping", 0) which does not, ("silent", seconds), ("close",), ("drop",); and
[("refuse",)] as a whole script refuses the connection. After its script a connection stays open
and silent until either side ends.
"""

import base64
import contextlib
import hashlib
import json
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

_MAGIC = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, section 1.3
PONG_S = 10.0

Actions = Iterable[tuple[Any, ...]]
Script = Actions | Callable[[dict[str, Any]], Actions]


class SocketServer:
    """Start with `with`; `registered` holds what each connection sent first, `pongs` counts
    the pings that were answered.

    scripts: of the first connections, in order. then: makes the script of each later one; without
    it they are dropped. port: 0 takes a free one.
    """

    def __init__(
        self, *scripts: Script, then: Callable[[], Script] | None = None, port: int = 0
    ) -> None:
        self._scripts = list(scripts)
        self._then = then
        self._port = port
        self._over = threading.Event()
        self._open: set[socket.socket] = set()
        self.registered: list[dict[str, Any]] = []
        self.headers: list[str] = []
        self.pongs = 0

    def __enter__(self) -> "SocketServer":
        self._listener = socket.create_server(("127.0.0.1", self._port))
        self.url = f"ws://127.0.0.1:{self._listener.getsockname()[1]}/v1"
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        for each in (self._listener, *list(self._open)):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits for it
        self._listener.close()

    def _accept(self) -> None:
        while not self._over.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            script: Script = [("drop",)]
            if self._scripts:
                script = self._scripts.pop(0)
            elif self._then is not None:
                script = self._then()
            threading.Thread(target=self._serve, args=(connection, script), daemon=True).start()

    def _serve(self, connection: socket.socket, script: Script) -> None:
        self._open.add(connection)
        try:
            with connection, contextlib.suppress(OSError):  # a client may leave at any moment
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._play(connection, script)
        finally:
            self._open.discard(connection)

    def _play(self, connection: socket.socket, script: Script) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            piece = connection.recv(4096)
            if not piece:
                return
            head += piece
        self.headers.append(head.decode())
        keys = [line.split(b": ")[1] for line in head.split(b"\r\n")
                if line.lower().startswith(b"sec-websocket-key: ")]  # fmt: skip
        if script == [("refuse",)] or not keys:
            connection.sendall(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")
            return
        accept = base64.b64encode(hashlib.sha1(keys[0] + _MAGIC).digest())
        connection.sendall(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n"
            b"Connection: Upgrade\r\nSec-WebSocket-Accept: " + accept + b"\r\n\r\n"
        )
        opcode, first = _read(connection)
        if opcode == 0x8:
            return
        registration = _object_of(first)
        self.registered.append(registration)
        for action, *arguments in script(registration) if callable(script) else script:
            if action == "silent":
                self._listen(connection, arguments[0])
            elif action == "drop":
                return
            elif action == "ping":
                _send(connection, 0x9, b"?")
                if arguments:
                    continue
                connection.settimeout(PONG_S)
                while self._take(connection) != 0xA:
                    pass
                self.pongs += 1
                connection.settimeout(None)
            elif action == "close":
                _send(connection, 0x8, struct.pack(">H", 1000))
            elif action == "binary":
                _send(connection, 0x2, arguments[0])
            else:
                text = arguments[0]
                text = text if isinstance(text, str) else json.dumps(text)
                _send(connection, 0x1, text.encode())
        self._listen(connection, None)

    def _listen(self, connection: socket.socket, seconds: float | None) -> None:
        """Answer what the client sends for so long, or until it leaves."""
        end = None if seconds is None else time.monotonic() + seconds
        while not self._over.is_set():
            left = None if end is None else max(0.0, end - time.monotonic())
            if not select.select([connection], [], [], left)[0]:
                return
            self._take(connection)

    def _take(self, connection: socket.socket) -> int:
        """Read one frame and do what it wants; returns its kind."""
        opcode, data = _read(connection)
        if opcode == 0x8:
            _send(connection, 0x8, data)
            raise ConnectionError("the client has closed")
        if opcode == 0x9:
            _send(connection, 0xA, data)
        return opcode


def _object_of(text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _send(connection: socket.socket, opcode: int, data: bytes) -> None:
    if len(data) < 126:
        size = bytes([len(data)])
    elif len(data) <= 0xFFFF:
        size = b"\x7e" + struct.pack(">H", len(data))
    else:
        size = b"\x7f" + struct.pack(">Q", len(data))
    connection.sendall(bytes([0x80 | opcode]) + size + data)


def _read(connection: socket.socket) -> tuple[int, bytes]:
    """One short masked frame of a client."""

    def exactly(count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = connection.recv(count - len(data))
            if not piece:
                raise ConnectionError
            data += piece
        return data

    opcode, length = exactly(2)
    size = length & 0x7F
    if size == 126:
        (size,) = struct.unpack(">H", exactly(2))
    mask = exactly(4)
    return opcode & 0x0F, bytes(b ^ mask[i % 4] for i, b in enumerate(exactly(size)))
