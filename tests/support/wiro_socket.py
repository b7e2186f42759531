"""A websocket server on loopback that plays a script to each connection.

Actions: ("text", object or str), ("binary", bytes), ("ping",), ("silent", seconds), ("close",),
("drop",). After its script a connection stays open and silent until the server ends.
"""

import base64
import hashlib
import json
import socket
import struct
import threading
from typing import Any

_MAGIC = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, section 1.3


class SocketServer:
    """Start with `with`; `registered` holds what each connection sent first, `pongs` counts."""

    def __init__(self, *scripts: list[tuple[Any, ...]]) -> None:
        self._scripts = list(scripts)
        self._over = threading.Event()
        self.registered: list[dict[str, Any]] = []
        self.headers: list[str] = []
        self.pongs = 0

    def __enter__(self) -> "SocketServer":
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"ws://127.0.0.1:{self._listener.getsockname()[1]}/v1"
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        self._listener.close()

    def _accept(self) -> None:
        while not self._over.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            script = self._scripts.pop(0) if self._scripts else [("drop",)]
            threading.Thread(target=self._play, args=(connection, script), daemon=True).start()

    def _play(self, connection: socket.socket, script: list[tuple[Any, ...]]) -> None:
        with connection:
            head = b""
            while b"\r\n\r\n" not in head:
                head += connection.recv(4096)
            self.headers.append(head.decode())
            key = next(line.split(b": ")[1] for line in head.split(b"\r\n")
                       if line.lower().startswith(b"sec-websocket-key"))  # fmt: skip
            accept = base64.b64encode(hashlib.sha1(key + _MAGIC).digest())
            connection.sendall(
                b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n"
                b"Connection: Upgrade\r\nSec-WebSocket-Accept: " + accept + b"\r\n\r\n"
            )
            _, first = _read(connection)
            self.registered.append(json.loads(first))
            for action, *arguments in script:
                if action == "silent":
                    self._over.wait(arguments[0])
                elif action == "drop":
                    return
                elif action == "ping":
                    _send(connection, 0x9, b"?")
                    opcode, _ = _read(connection)
                    self.pongs += opcode == 0xA
                elif action == "close":
                    _send(connection, 0x8, struct.pack(">H", 1000))
                elif action == "binary":
                    _send(connection, 0x2, arguments[0])
                else:
                    text = arguments[0]
                    text = text if isinstance(text, str) else json.dumps(text)
                    _send(connection, 0x1, text.encode())
            self._over.wait(30)


def _send(connection: socket.socket, opcode: int, data: bytes) -> None:
    size = bytes([len(data)]) if len(data) < 126 else b"\x7e" + struct.pack(">H", len(data))
    if len(data) > 0xFFFF:
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
