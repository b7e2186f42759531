"""A server that answers with whatever bytes a test writes, for what no HTTP library would send."""

import contextlib
import select
import socket
import ssl
import threading
from collections.abc import Callable

#: less than any time-out of the client that a test leaves as it is
HELD_S = 25.0
#: of a made-up authority for localhost that nobody trusts, good from 2020 to 2120
CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBijCCAS+gAwIBAgIBATAKBggqhkjOPQQDAjAUMRIwEAYDVQQDDAlsb2NhbGhv
c3QwIBcNMjAwMTAxMDAwMDAwWhgPMjEyMDAxMDEwMDAwMDBaMBQxEjAQBgNVBAMM
CWxvY2FsaG9zdDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABMCmCK/RgiOumyXy
jDBthw9bCH8VJgZpts2o6noD00g4Dh2AQ6HWyoOdHtEkkQpknAwrER/V25C7T4Ec
cmh9imujcDBuMCwGA1UdEQQlMCOCCWxvY2FsaG9zdIcEfwAAAYcQAAAAAAAAAAAA
AAAAAAAAATAPBgNVHRMBAf8EBTADAQH/MA4GA1UdDwEB/wQEAwIChDAdBgNVHQ4E
FgQUr1T6b2SXAXaAV/n3XtBvdixcP5wwCgYIKoZIzj0EAwIDSQAwRgIhAMfuCxMB
h9L0zNPwGq3NrKaqlwB+j+61Ug+sG8wSMa+0AiEA1PNzrmxNWVcqeR4JjE/9ekBP
fjCK41tK1AIKapLOUw4=
-----END CERTIFICATE-----
"""
CERTIFICATE_KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgeDYXoH1FeyPOFGgs
NmbJFUx4pRPg3Or0DCm89/tjiJuhRANCAATApgiv0YIjrpsl8owwbYcPWwh/FSYG
abbNqOp6A9NIOA4dgEOh1sqDnR7RJJEKZJwMKxEf1duQu0+BHHJofYpr
-----END PRIVATE KEY-----
"""


class RawServer:
    """Start with `with`; plays `script` to each connection.

    script: called with the connection and, unless `reads` is false, the request that was read from
        it as a whole. Ends when the connection is to be closed; what it sends into a closed one
        does no harm.
    requests: the requests that came whole. received: bytes that came, of all connections.
    over: set at the end, and after `HELD_S`, when it lets go of everything; scripts that wait look
        at it. A call that ends before that was not held by the server.
    """

    def __init__(self, script: Callable, *, host="127.0.0.1", context=None, reads=True) -> None:
        self._script, self._context, self._reads = script, context, reads
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family)
        self.port = self._listener.getsockname()[1]
        self.netloc = f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"
        self.url = f"http{'s' if context else ''}://{self.netloc}/v1"
        self.requests: list[bytes] = []
        self.received = 0
        self.closed = threading.Event()
        self.over = threading.Event()
        self._open: list[socket.socket] = []

    def __enter__(self) -> "RawServer":
        threading.Thread(target=self._accept, daemon=True).start()
        self._release = threading.Timer(HELD_S, self.let_go)
        self._release.daemon = True
        self._release.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._release.cancel()
        self.let_go()

    def let_go(self) -> None:
        """End every script and connection."""
        self.over.set()
        for each in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while not self.over.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._context is not None:
                connection = self._context.wrap_socket(connection, server_side=True)
            self._open.append(connection)
            with connection:
                if self._reads:
                    while request := self.read_request(connection):
                        self._script(connection, request)
                else:
                    self._script(connection)
        self.closed.set()

    def read_request(self, connection: socket.socket) -> bytes:
        """One request as a whole; b"" if there is none."""
        data = b""
        while b"\r\n\r\n" not in data:
            piece = connection.recv(65536)
            if not piece:
                return b""
            data += piece
        head, _, rest = data.partition(b"\r\n\r\n")
        sizes = [int(line.split(b":")[1]) for line in head.lower().split(b"\r\n")
                 if line.startswith(b"content-length:")]  # fmt: skip
        while sizes and len(rest) < sizes[0]:
            rest += connection.recv(65536)
        self.received += len(head) + 4 + len(rest)
        self.requests.append(head + b"\r\n\r\n" + rest)
        return self.requests[-1]

    def drip(self, connection: socket.socket, data: bytes, every_s: float = 0.05) -> None:
        """Send the bytes one by one, again and again, until either side ends."""
        while True:
            for i in range(len(data)):
                connection.sendall(data[i : i + 1])
                if self.over.wait(every_s):
                    return


def answer(content: bytes, *headers: str, status: str = "200 OK") -> bytes:
    """An ordinary HTTP answer."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(content)}", *headers, "", ""]
    return "\r\n".join(lines).encode("latin-1") + content


def tls_context(folder) -> tuple[ssl.SSLContext, str]:
    """A server's context, and the file that makes a client trust it."""
    authority, key = folder / "authority.pem", folder / "key.pem"
    authority.write_text(CERTIFICATE)
    key.write_text(CERTIFICATE_KEY)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority, key)
    return context, str(authority)


def splice(one: socket.socket, port: int, over: threading.Event) -> None:
    """Pass bytes between a connection and a port of this machine until either side ends."""
    with socket.create_connection(("127.0.0.1", port)) as other:
        while not over.is_set():
            pending = getattr(one, "pending", lambda: 0)()
            ready = [one] if pending else select.select([one, other], [], [], 0.1)[0]
            for source, target in ((one, other), (other, one)):
                if source in ready:
                    piece = source.recv(65536)
                    if not piece:
                        return
                    target.sendall(piece)
