"""A session whose answers are made in this process: no socket, no thread, any status and body."""

import io
import json
from collections.abc import Callable
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.response import HTTPResponse

URL = "http://127.0.0.1:1/v1"
EMPTY_LIST = json.dumps({"result": True, "errors": [], "total": "0", "tasklist": []}).encode()

Reply = tuple[int, bytes]


class Replying(HTTPAdapter):
    """Answers a request by a function of its path and body, which may raise instead."""

    def __init__(self, answer: Callable[[requests.PreparedRequest], Reply]) -> None:
        super().__init__()
        self._answer = answer

    def send(self, request: requests.PreparedRequest, *_: Any, **__: Any) -> requests.Response:
        status, content = self._answer(request)
        content = b"" if status in (204, 304) else content  # these have none
        raw = HTTPResponse(
            io.BytesIO(content), status=status, preload_content=False,
            headers={"Content-Length": str(len(content)), "Content-Type": "application/json"},
        )  # fmt: skip
        return self.build_response(request, raw)


def session_of(answer: Callable[[requests.PreparedRequest], Reply]) -> requests.Session:
    """A session that knows no network."""
    session = requests.Session()
    session.trust_env = False
    session.mount("http://", Replying(answer))
    return session


def whole_body(request: requests.PreparedRequest) -> bytes:
    """The content of a request, read to its end as a connection does."""
    body = request.body
    if body is None or isinstance(body, bytes | str):
        return (body or b"").encode() if isinstance(body, str) else body or b""
    pieces = []
    while piece := body.read(16384):
        pieces.append(piece)
    return b"".join(pieces)


class Replies:
    """Fixed answers by kind of call, the last one again and again; other calls find no tasks.

    reads_body: False answers before the end of a request has left.
    """

    def __init__(self, replies: dict[str, list[Reply]], *, reads_body: bool = True) -> None:
        self.url, self.session = URL, session_of(self._answer)
        self._replies, self._reads_body = replies, reads_body
        self._asked: list[str] = []

    def count(self, kind: str) -> int:
        """How often a kind of call was made."""
        return self._asked.count(kind)

    def _answer(self, request: requests.PreparedRequest) -> Reply:
        path = str(request.url).removeprefix(f"{URL}/")
        kind = "Run" if path.startswith("Run/") else path
        self._asked.append(kind)
        if kind not in self._replies:
            whole_body(request)
            return 200, EMPTY_LIST
        if self._reads_body:
            whole_body(request)
        queue = self._replies[kind]
        return queue.pop(0) if len(queue) > 1 else queue[0]
