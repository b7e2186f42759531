"""A stand-in of wiro.ai on loopback: enforces signatures and field names, walks the states.

It knows nothing of the client. Faults are queued per path with `fail` and used up one by one:

    "reset"        the connection ends after the request was read, before anything is done
    "lost"         the request is carried out and the connection ends without an answer
    "html", "truncated", "list"   carried out, and the answer is no JSON object
    {"status": 502, "headers": {...}, "body": {...}}   carried out, and that is the answer
    (code, message)   refused: {"result": false, "errors": [...]}
"""

import email.parser
import email.policy
import hashlib
import hmac
import json
import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY, SECRET = "test-key", "test-secret"
STATES = (
    "task_queue", "task_accept", "task_preprocess_start", "task_preprocess_end", "task_assign",
    "task_start", "task_output", "task_output_full", "task_end", "task_postprocess_start",
    "task_postprocess_end",
)  # fmt: skip
#: time of the sample on the model page; the clock of this server
NOW = 1734513807
#: 1000 bytes that begin as an MP4 file does
MP4 = (b"\0\0\0\x18ftypisom" + bytes(range(256)) * 4)[:1000]


@dataclass
class Seen:
    """One request as it arrived."""

    path: str
    headers: dict[str, str]
    raw: bytes
    body: dict[str, Any]
    files: list[tuple[str, str, str, bytes]]


@dataclass
class WiroServer:
    """Start with `with`; `url` is the base address.

    states: what each task walks through, one state per Task/Detail; with the last alone, a task
    has ended when it is made. steps_by_itself: False stops that. key_only: no signature.
    now: Unix seconds.
    """

    key: str = KEY
    secret: str = SECRET
    key_only: bool = False
    states: tuple[str, ...] = STATES
    steps_by_itself: bool = True
    final: dict[str, Any] = field(default_factory=dict)
    slugs: tuple[str, ...] = ("wiro/SkyReels-V1",)
    seen: list[Seen] = field(default_factory=list)
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=lambda: {"0.mp4": MP4})
    fetched: list[dict[str, str]] = field(default_factory=list)
    now: Callable[[], float] = lambda: NOW

    def __post_init__(self) -> None:
        self._faults: dict[str, list[Any]] = defaultdict(list)
        self._nonces: list[int] = []
        self._lock = threading.RLock()

    def __enter__(self) -> "WiroServer":
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_POST(self) -> None:
                outer._handle(self)

            def do_GET(self) -> None:
                outer._serve_file(self)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        serve = self._server.serve_forever
        self._thread = threading.Thread(target=serve, args=(0.01,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def fail(self, path: str, *faults: Any) -> None:
        """Queue faults for a path such as "Task/Detail" ("Run" for any model)."""
        self._faults[path].extend(faults)

    def file_url(self, name: str) -> str:
        """Where a file of `files` is served."""
        return self.url.removesuffix("/v1") + f"/files/{name}"

    def _serve_file(self, handler: BaseHTTPRequestHandler) -> None:
        """Faults for a GET: a status, "cut" (half comes), "short" (half is announced), "reset",
        or ("redirect", address)."""
        name = handler.path.rpartition("/")[2]
        with self._lock:
            self.fetched.append({k.lower(): v for k, v in handler.headers.items()})
            queue = self._faults["GET " + name]
            fault = queue.pop(0) if queue else None
        content = self.files.get(name, b"")
        if fault == "reset":
            handler.close_connection = True
            handler.connection.close()
            return
        if isinstance(fault, int) or name not in self.files:
            handler.send_response(fault if isinstance(fault, int) else 404)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        if isinstance(fault, tuple):
            handler.send_response(302)
            handler.send_header("Location", fault[1])
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        half = content[: len(content) // 2]
        announced = {"short": len(half), "huge": 2**40}.get(fault or "", len(content))
        handler.send_response(200)
        handler.send_header("Content-Length", str(announced))
        handler.end_headers()
        handler.wfile.write(half if fault in ("cut", "short") else content)
        if fault in ("cut", "huge"):
            handler.close_connection = True

    def paths(self) -> list[str]:
        """The paths asked for, in order."""
        return [seen.path for seen in self.seen]

    def add_task(self, parameters: dict[str, Any], slug: str = "wiro/SkyReels-V1") -> str:
        """A task as a Run makes it; returns its id."""
        number = str(2221 + len(self.tasks))
        owner, project = slug.split("/")
        self.tasks[number] = {
            "id": number,
            "socketaccesstoken": f"token-of-task-{number}-abcdefgh",
            "parameters": parameters,
            "status": self.states[0],
            "pexit": "",
            "outputs": [],
            "debugoutput": "",
            "debugerror": "",
            "createtime": str(int(self.now())),
            "starttime": "0",
            "endtime": "0",
            "postprocessendtime": "0",
            "elapsedseconds": "0",
            "totalcost": "0",
            "cps": "0.000585000000",
            "modelslugowner": owner.lower(),
            "modelslugproject": project.lower(),
        }
        if len(self.states) == 1:
            self._finish(self.tasks[number])
        return number

    # --- one request ----------------------------------------------------------------------------

    def _handle(self, handler: BaseHTTPRequestHandler) -> None:
        length = int(handler.headers.get("Content-Length") or 0)
        raw = handler.rfile.read(length)
        if len(raw) < length:  # the sender went away: nobody acts on half a request
            handler.close_connection = True
            return
        path = handler.path.removeprefix("/v1/")
        headers = {name.lower(): value for name, value in handler.headers.items()}
        with self._lock:
            body, files = _parse(headers.get("content-type", ""), raw)
            self.seen.append(Seen(path, headers, raw, body, files))
            queue = self._faults["Run" if path.startswith("Run/") else path]
            fault = queue.pop(0) if queue else None
            if fault == "reset":
                handler.close_connection = True
                handler.connection.close()
                return
            refusal = self._check_auth(headers)
            if refusal is None and isinstance(fault, tuple):
                refusal = _refuse(*fault)
            status, answer = refusal or self._answer(path, body)
        if fault == "lost":
            handler.close_connection = True
            handler.connection.close()
            return
        content = json.dumps(answer).encode()
        extra: dict[str, str] = {}
        if isinstance(fault, dict):
            status, extra = fault["status"], fault.get("headers", {})
            content = json.dumps(fault.get("body", {})).encode()
        elif isinstance(fault, str):
            content = {"html": b"<html>bad gateway</html>", "truncated": content[:-5],
                       "list": b"[]"}[fault]  # fmt: skip
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **extra}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(content)

    def _check_auth(self, headers: dict[str, str]) -> tuple[int, dict[str, Any]] | None:
        if headers.get("x-api-key") != self.key:
            return _refuse(0, "Project authorization is not founded.", 401)
        if self.key_only:
            return None
        nonce, signature = headers.get("x-nonce", ""), headers.get("x-signature", "")
        if not nonce or not signature:
            return _refuse(0, "Project requires signature authentication.", 401)
        digest = hmac.new(self.key.encode(), (self.secret + nonce).encode(), hashlib.sha256)
        is_new = not self._nonces or int(nonce) not in self._nonces
        self._nonces.append(int(nonce))
        if signature != digest.hexdigest() or not is_new:
            return _refuse(0, "Project authorization is not valid.", 401)
        return None

    def _answer(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if path.startswith("Run/"):
            slug = path.removeprefix("Run/")
            if slug not in self.slugs:
                return _refuse(1, "slug-owner-project-not-exist")
            if not body.get("prompt"):
                return _refuse(0, "Request parameter [prompt] required")
            task = self.tasks[self.add_task(body, slug)]
            return _grant(taskid=task["id"], socketaccesstoken=task["socketaccesstoken"])
        if path == "Task/List":
            newest = sorted(self.tasks.values(), key=lambda t: -int(t["id"]))
            return _grant(total=str(len(newest)), tasklist=newest[: int(body["limit"])])
        if path.startswith("Task/"):
            return self._answer_task(path, body)
        if path == "Tool/Detail":
            return _grant(tool=[{"id": "598", "title": body["slugproject"], "parameters": None}])
        if path == "Tool/List":
            return _grant(total=1, tool=[{"id": "598", "title": body["search"]}])
        if path == "File/FolderCreate":
            return _grant(list=[{"id": "f1", "name": body["name"]}])
        if path == "File/Upload":
            return _grant(list=[{"id": "u1", "url": "https://cdn.wiro.ai/u1.png"}])
        return _refuse(0, "Error parsing url.", 404)

    def _answer_task(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        legal = {
            "Task/Detail": ("tasktoken", "taskid"),
            "Task/Cancel": ("taskid",),
            "Task/Kill": ("taskid", "socketaccesstoken"),
            "Task/InputOutputDelete": ("tasktoken",),
        }[path]
        if len(body) != 1 or next(iter(body)) not in legal:
            return _refuse(0, "taskid or socketaccesstoken is required")
        (value,) = body.values()
        found = [t for t in self.tasks.values() if value in (t["id"], t["socketaccesstoken"])]
        if not found:
            return _refuse(1, "There is no task yet.")
        task = found[0]
        ended = task["status"] in ("task_postprocess_end", "task_cancel")
        if path == "Task/Cancel" and task["status"] != "task_queue":
            return _refuse(1, "Task is not in a cancellable state.")
        if path == "Task/Kill" and (ended or task["status"] == "task_queue"):
            return _refuse(1, "Task could not be killed: no worker")
        if path in ("Task/Cancel", "Task/Kill"):
            task |= {"status": "task_cancel", "pexit": "0"}
        elif path == "Task/InputOutputDelete":
            if not ended:
                return _refuse(1, "Task must be completed or cancelled before deleting files")
            task["outputs"] = []
        answer = _grant(total="1", tasklist=[dict(task)])
        if path == "Task/Detail" and self.steps_by_itself:
            self._step(task)
        return answer

    def _step(self, task: dict[str, Any]) -> None:
        if task["status"] not in self.states[:-1]:
            return
        task["status"] = self.states[self.states.index(task["status"]) + 1]
        if task["status"] == "task_postprocess_end":
            self._finish(task)

    def _finish(self, task: dict[str, Any]) -> None:
        output = {
            "name": "0.mp4",
            "contenttype": "video/mp4",
            "size": "1000",
            "url": self.file_url("0.mp4"),
            "accesskey": "access-secret",
        }
        task |= {"pexit": "0", "outputs": [output], "postprocessendtime": str(int(self.now()) + 7),
                 "totalcost": "0.003510000000", "elapsedseconds": "6.0000"}  # fmt: skip
        task |= self.final


def _grant(**payload: Any) -> tuple[int, dict[str, Any]]:
    return 200, {"result": True, "errors": [], **payload}


def _refuse(code: int, message: str, status: int = 200) -> tuple[int, dict[str, Any]]:
    return status, {"result": False, "errors": [{"code": code, "message": message}]}


def _parse(
    content_type: str, raw: bytes
) -> tuple[dict[str, Any], list[tuple[str, str, str, bytes]]]:
    """Fields, and files as (parameter, filename, type, content)."""
    if content_type.startswith("application/json"):
        return json.loads(raw or b"{}"), []
    head = f"Content-Type: {content_type}\r\n\r\n".encode()
    message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + raw)
    fields: dict[str, Any] = {}
    files = []
    for part in message.iter_parts():
        name = str(part.get_param("name", header="content-disposition"))
        content = part.get_payload(decode=True)
        assert isinstance(content, bytes)
        if part.get_filename() is None:
            fields[name] = content.decode()
        else:
            files.append((name, str(part.get_filename()), part.get_content_type(), content))
    return fields, files
