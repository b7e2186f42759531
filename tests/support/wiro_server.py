"""A stand-in of wiro.ai on loopback: enforces signatures and field names, walks the states.

It knows nothing of the client. By hand, from the repository root, until Ctrl-C:

    python -m tests.support.wiro_server --seconds 20 --fail Run=lost --fail "GET 0.mp4=cut"

Faults are queued with `fail` and used up one by one, by what they are queued for:

    "Run" (of any model), "Task/Detail", "Tool/Detail" and every other path
        "reset"            the connection ends before anything is done
        "lost"             carried out, and the connection ends without an answer
        ("silent", 30)     carried out, and answered that many seconds late
        "html", "truncated", "list"    carried out, and the answer is no JSON object
        {"status": 502, "headers": {...}, "body": {...}}    carried out, and that is the answer;
                           {"status": 401, "body": {"result": False}} is a key that dies meanwhile
        (96, "message")    refused: {"result": false, "errors": [...]}
    "GET 0.mp4", "GET 2221/0.mp4" (of one task), "GET inputImage-1.png" (what a Run has sent)
        404, 503, ...      that status, and nothing
        "reset"            the connection ends
        "cut", "short"     half of it comes; with "short", half is what was announced
        "huge"             1 TiB is announced
        "unsized", "chunked"    whole, without Content-Length
        ("slow", 30)       whole, in trickles over that many seconds
        ("drip", 0.5)      a byte each half second
        ("stall", 60)      half of it comes, then nothing for so long, then the connection ends
        ("silent", 60)     no answer for so long, then the connection ends
        ("headers", {...})     whole, under these headers beside or instead of the usual ones; of
                               {"Content-Encoding": "gzip"} the content is packed so
        ("piece", 100)     an answer 206 that begins at that byte, whatever was asked for
        ("redirect", address)    anywhere
    "socket"
        "refuse"           no connection
        "silent"           nothing ever comes, not even the end
        "drop"             the connection ends while the task runs
        "binary"           binary frames between the others

What needs no fault: wrong first bytes (`files["0.mp4"] = b"<html>"`); evil names, lost files and
failures (`final={"outputs": [{"name": "../../x.mp4", "url": server.file_url("0.mp4")}]}`,
`final={"outputs": []}`, `final={"pexit": "1", "outputs": [], "debugerror": "CUDA error"}`), also
of one task alone (`finals`); a task that never ends (`states=STATES[:6]` stays in task_start); a
clock that is off (`now=lambda: time.time() + 300`).
"""

import argparse
import email
import email.message
import gzip
import hashlib
import hmac
import io
import json
import math
import re
import signal
import socket
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

from .wiro_socket import Script, SocketServer

KEY, SECRET = "test-key", "test-secret"
STATES = (
    "task_queue", "task_accept", "task_preprocess_start", "task_preprocess_end", "task_assign",
    "task_start", "task_output", "task_output_full", "task_end", "task_postprocess_start",
    "task_postprocess_end",
)  # fmt: skip
ENDS = ("task_postprocess_end", "task_cancel")
#: when each state begins in timed mode, as a share of `pace_s`
BEGINS = {
    "task_queue": 0.0, "task_accept": 0.15, "task_preprocess_start": 0.17,
    "task_preprocess_end": 0.18, "task_assign": 0.20, "task_start": 0.25, "task_output": 0.27,
    "task_output_full": 0.90, "task_end": 0.91, "task_postprocess_start": 0.92,
    "task_postprocess_end": 1.0,
}  # fmt: skip
#: the field of a record that keeps when a state began
STAMPS = {
    "task_accept": "accepttime", "task_preprocess_start": "preprocessstarttime",
    "task_preprocess_end": "preprocessendtime", "task_assign": "assigntime",
    "task_start": "starttime", "task_end": "endtime",
    "task_postprocess_start": "postprocessstarttime",
    "task_postprocess_end": "postprocessendtime", "task_cancel": "canceltime",
}  # fmt: skip
#: time of the sample on the model page; the clock of this server unless it is timed
NOW = 1734513807
#: 1000 bytes that begin as an MP4 file does
MP4 = (b"\0\0\0\x18ftypisom" + bytes(range(256)) * 4)[:1000]
#: between two frames of the socket
BEAT_S = 0.2
FPS = 24
LOG = "Loading pipeline components\n"
WARNING = "UserWarning: `resume_download` is deprecated\n"

SIZES = ("960x544", "544x960")
#: SkyReels-V1 as Tool/Detail shows it; a Run is checked against it if `strict`
PARAMETERS = [
    {"title": "Inputs", "items": [
        {"id": "inputImage", "type": "fileinput", "label": "Input Image", "required": True,
         "note": "The first frame."},
        {"id": "prompt", "type": "textarea", "label": "Prompt", "required": True, "default": "",
         "placeholder": "FPS-24, a woman smiles"},
        {"id": "negativePrompt", "type": "textarea", "label": "Negative Prompt",
         "required": False, "default": ""},
    ]},
    {"title": "Settings", "items": [
        {"id": "scale", "type": "range", "label": "Guidance Scale", "required": False,
         "default": 6.0, "min": 1, "max": 20, "step": 0.5, "advanced": True},
        {"id": "numFrames", "type": "number", "label": "Number of Frames", "required": False,
         "default": 97, "note": "If N is divisible by 4, the length should be N + 1."},
        {"id": "size", "type": "select", "label": "Size", "required": True, "default": SIZES[0],
         "options": [{"label": "16:9 (960x544)", "value": SIZES[0]},
                     {"label": "9:16 (544x960)", "value": SIZES[1]}]},
        {"id": "steps", "type": "range", "label": "Steps", "required": False, "default": 30,
         "min": 1, "max": 100, "step": 1, "advanced": True},
    ]},
]  # fmt: skip
#: further models of the server by hand: several pictures, a film, a sound
MODELS = {
    "wiro/first-last-frame": {
        "title": "First and Last Frame",
        "description": "A video between two pictures.",
        "image": "https://cdn.wiro.ai/first-last-frame.webp",
        "dynamicprice": json.dumps([
            {"inputs": {"resolution": "480p"}, "price": "0.20", "priceMethod": "cpr"},
            {"inputs": {"resolution": "720p"}, "price": "0.45", "priceMethod": "cpr"},
        ]),
        "inspire": [
            {"prompt": "a fox jumps over a brook", "resolution": "720p",
             "firstFrameUrl": "https://cdn.wiro.ai/fox.png"},
            {"prompt": "a town from dusk to night", "seed": 7},
        ],
        "parameters": [
            {"title": "Inputs", "items": [
                {"id": "firstFrame", "type": "fileinput", "label": "First frame", "required": True},
                {"id": "lastFrame", "type": "fileinput", "label": "Last frame"},
                {"id": "references", "type": "multifileinput", "label": "Reference pictures",
                 "note": "Up to four pictures of the same person."},
                {"id": "prompt", "type": "textarea", "label": "Prompt", "required": True},
            ]},
            {"title": "Settings", "items": [
                {"id": "resolution", "type": "select", "label": "Resolution", "default": "480p",
                 "options": [{"label": "480p", "value": "480p"},
                             {"label": "720p", "value": "720p"}]},
                {"id": "strength", "type": "range", "label": "Strength", "default": 0.5, "min": 0,
                 "max": 1, "step": 0.05, "note": "How far it may leave the pictures."},
                {"id": "seed", "type": "number", "label": "Seed", "advanced": True},
            ]},
        ],
    },
    "wiro/lip-sync": {
        "title": "Lip Sync",
        "description": "Lets a person in a film say what is in a sound file.",
        "parameters": [
            {"title": "Inputs", "items": [
                {"id": "inputVideo", "type": "fileinput", "label": "Video", "required": True},
                {"id": "inputAudio", "type": "fileinput", "label": "Voice", "required": True},
                {"id": "faces", "type": "combinefileinput", "label": "Pictures of faces"},
                {"id": "prompt", "type": "text", "label": "Prompt", "required": True},
            ]},
        ],
    },
}  # fmt: skip
#: the words that name a fault, for what it is queued for
FAULTS = {
    "GET": {
        "reset",
        "cut",
        "short",
        "huge",
        "unsized",
        "chunked",
        "slow",
        "redirect",
        "drip",
        "stall",
        "silent",
        "headers",
        "piece",
    },
    "socket": {"refuse", "silent", "drop", "binary"},
    "": {"reset", "lost", "silent", "html", "truncated", "list"},
}

Answer = tuple[int, dict[str, Any]]
Upload = tuple[str, str, str, bytes]


@dataclass
class Seen:
    """One request as it arrived; files are (parameter, filename, type, content)."""

    path: str
    headers: dict[str, str]
    raw: bytes
    body: dict[str, Any]
    files: list[Upload]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that leave in the middle."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


@dataclass
class WiroServer:
    """Start with `with`; `url` is the base address, `socket_url` that of the socket.

    key_only: no signature. seen, fetched: requests, and the headers of downloads, as they came.
    states: what each task walks through, one state per Task/Detail; with the last alone, a task
        has ended when it is made. steps_by_itself: False stops the walk.
    pace_s: above 0, tasks walk by the real clock instead, from the Run to the end in that time.
    final: goes over a task's record at its end; finals: over that of one task, by its id.
    files: what is served; each task shows "0.mp4" under an address of its own.
    inputs: what Runs have sent, "token/name" -> content; records show their addresses.
    fetched_inputs: the headers with which these were asked for.
    real_video: each task gets a video made of its picture instead.
    strict: a Run is checked against PARAMETERS. Without, only an empty prompt is refused.
    schema: Tool/Detail shows PARAMETERS. price: rows such as {"inputs": [], "price": "0.30",
        "priceMethod": "cpr"}; without, a task costs `cps` per second. approximatelycost: "" is
        left out.
    models: slug -> record of further models, as Tool/Detail shows them; Tool/List searches in their
        titles, and a `strict` Run of one is checked against its parameters.
    balance: dollars; a Run needs 0.50. max_tasks: that may go at once; None is what the balance
        allows, which is any number above 250 dollars.
    ranges: files have tags, and pieces of them are given.
    with_socket: a progress socket beside. port, socket_port: 0 takes a free one.
    now: Unix seconds, for the times in records; without, the real clock if timed, else NOW.
    clock: seconds, by which timed tasks walk.
    log: called with one line per request.
    """

    key: str = KEY
    secret: str = SECRET
    key_only: bool = False
    states: tuple[str, ...] = STATES
    steps_by_itself: bool = True
    final: dict[str, Any] = field(default_factory=dict)
    finals: dict[str, dict[str, Any]] = field(default_factory=dict)
    slugs: tuple[str, ...] = ("wiro/SkyReels-V1",)
    seen: list[Seen] = field(default_factory=list)
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=lambda: {"0.mp4": MP4})
    inputs: dict[str, bytes] = field(default_factory=dict)
    fetched: list[dict[str, str]] = field(default_factory=list)
    fetched_inputs: list[dict[str, str]] = field(default_factory=list)
    now: Callable[[], float] | None = None
    clock: Callable[[], float] = time.monotonic
    pace_s: float = 0.0
    real_video: bool = False
    strict: bool = False
    schema: bool = False
    price: list[dict[str, Any]] | None = None
    cps: str = "0.000585000000"
    approximatelycost: str = ""
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    balance: Decimal | str = "1000.00"
    max_tasks: int | None = None
    ranges: bool = False
    with_socket: bool = False
    port: int = 0
    socket_port: int = 0
    log: Callable[[str], None] = lambda _: None

    def __post_init__(self) -> None:
        if self.now is None:
            self.now = time.time if self.pace_s > 0 else lambda: NOW
        self.url, self.socket_url = "", ""
        self.socket: SocketServer | None = None
        self._faults: dict[str, list[Any]] = defaultdict(list)
        self._nonces: set[str] = set()
        #: of each task, when it was made, by the monotonic clock and in Unix seconds
        self._begun: dict[str, tuple[float, float]] = {}
        self._history: dict[str, list[str]] = {}
        self._deleted: set[str] = set()
        self._videos: dict[str, threading.Thread] = {}
        self._broken: dict[str, str] = {}
        self._studio = threading.Lock()
        self._over = threading.Event()
        self._free = threading.Event()
        #: seconds that a "silent", "stall" or "slow" fault held a caller up to its end
        self.held_s = 0.0
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

        self._server = _Server(("127.0.0.1", self.port), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        if self.with_socket:
            self.socket = SocketServer(then=self._script, port=self.socket_port).__enter__()
            self.socket_url = self.socket.url
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        self.let_go()
        if self.socket is not None:
            self.socket.__exit__()
        with socket.socket() as wakes_the_thread:
            wakes_the_thread.connect(self._server.server_address)
        self._thread.join()
        self._server.server_close()
        for video in list(self._videos.values()):
            video.join()

    def _serve(self) -> None:
        while not self._over.is_set():  # serve_forever would look for its end again and again
            self._server.handle_request()

    def fail(self, path: str, *faults: Any) -> None:
        """Queue faults; the table at the top of this file names them."""
        kind = path.split()[0] if path.startswith("GET ") or path == "socket" else ""
        for fault in faults:
            word = fault[0] if isinstance(fault, tuple) else fault
            if isinstance(word, str) and word not in FAULTS[kind]:
                raise ValueError(f"no fault of {path}: {word}")
        self._faults[path].extend(faults)

    def file_url(self, name: str) -> str:
        """Where a file of `files` is served."""
        return self.url.removesuffix("/v1") + f"/files/{name}"

    def paths(self) -> list[str]:
        """The paths asked for, in order."""
        return [seen.path for seen in self.seen]

    # --- tasks ----------------------------------------------------------------------------------

    def add_task(
        self,
        parameters: dict[str, Any],
        slug: str = "wiro/SkyReels-V1",
        picture: bytes = b"",
        uploads: Sequence[Upload] = (),
    ) -> str:
        """A task as a Run makes it; returns its id. picture: what its video is made of."""
        owner, project = unquote(slug).split("/")
        with self._lock:
            number = str(2221 + len(self.tasks))
            parameters = {**parameters, **self._store(number, uploads)}
            now = self.now()
            task = self.tasks[number] = {
                "id": number,
                "uuid": "user-1",
                "name": "",
                "description": "",
                "socketaccesstoken": f"token-of-task-{number}-abcdefgh",
                "parameters": parameters,
                "status": self.states[0],
                "pexit": "",
                "outputs": [],
                "debugoutput": "",
                "debugerror": "",
                "createtime": str(int(now)),
                **dict.fromkeys(STAMPS.values(), "0"),
                "elapsedseconds": "0",
                "totalcost": "0",
                "cps": self.cps,
                "guestid": None,
                "runtype": "model",
                "callbackurl": parameters.get("callbackUrl", ""),
                "categories": ["image-to-video"],
                "size": "0",
                "modelslugowner": owner.lower(),
                "modelslugproject": project.lower(),
            }
            self._begun[number] = (self.clock(), now)
            self._history[number] = [self.states[0]]
            if self.real_video:
                delay = self.pace_s * BEGINS["task_start"]
                video = threading.Thread(
                    target=self._make_video, args=(task, picture, delay), daemon=True
                )
                self._videos[number] = video
                video.start()
            if len(self.states) == 1:
                self._finish(task, now + 7)
        return number

    def _store(self, number: str, uploads: Sequence[Upload]) -> dict[str, Any]:
        """Keep the files of a Run; returns their parameters as the service echoes them."""
        echo: dict[str, list[str]] = defaultdict(list)
        for i, (name, filename, _, content) in enumerate(uploads, 1):
            path = f"upload-{number}/{name}-{i}.{filename.rpartition('.')[2]}"
            self.inputs[path] = content
            echo[name].append(f"{self.url}/File/{path}")
        return {name: urls[0] if len(urls) == 1 else urls for name, urls in echo.items()}

    def _advance(self, task: dict[str, Any]) -> None:
        """Bring a task to where the clock says it is, through every state on the way."""
        history = self._history[task["id"]]
        while self.pace_s > 0 and self.steps_by_itself and task["status"] in self.states[:-1]:
            state = self.states[self.states.index(task["status"]) + 1]
            video = self._videos.get(task["id"])
            start, unix = self._begun[task["id"]]
            after = self.pace_s * BEGINS.get(state, 0.0)
            is_late = state == "task_postprocess_end" and video is not None and video.is_alive()
            if is_late or self.clock() < start + after:
                break
            self._enter(task, state, unix + after)
        if history[-1] != task["status"]:  # a test has set it
            history.append(task["status"])

    def _step(self, task: dict[str, Any]) -> None:
        """The next state, for servers without a clock."""
        if task["status"] in self.states[:-1]:
            state = self.states[self.states.index(task["status"]) + 1]
            self._enter(task, state, self.now() + 7 if state == "task_postprocess_end" else 0)

    def _enter(self, task: dict[str, Any], state: str, at: float) -> None:
        task["status"] = state
        if state in STAMPS and at > 0:
            task[STAMPS[state]] = str(int(at))
        if state == "task_postprocess_end":
            self._finish(task, at)
        self._history[task["id"]].append(state)

    def _finish(self, task: dict[str, Any], at: float) -> None:
        """Outputs, exit code and cost."""
        name = f"{task['id']}/0.mp4"
        if task["id"] in self._videos:
            self._videos[task["id"]].join()
        elapsed = Decimal("6.0000")
        if self.pace_s > 0:
            share = BEGINS["task_end"] - BEGINS["task_assign"]
            elapsed = Decimal(f"{share * self.pace_s:.4f}")
            task |= {"debugoutput": LOG, "debugerror": WARNING}
        output = {
            "id": f"file-{task['id']}",
            "name": "0.mp4",
            "contenttype": "video/mp4",
            "size": str(len(self.files.get(name) or self.files.get("0.mp4", MP4))),
            "addedtime": str(int(at)),
            "ispublic": 0,
            "expiretime": None,
            "url": self.file_url(name),
            "accesskey": "access-secret",
        }
        flat = [row["price"] for row in self.price or [] if row.get("priceMethod") == "cpr"]
        cost = Decimal(flat[0]) if flat else elapsed * Decimal(self.cps)
        task |= {
            "pexit": "0", "outputs": [output], "size": output["size"],
            "postprocessendtime": str(int(at)),
            "elapsedseconds": str(elapsed), "totalcost": f"{cost:.12f}",
        }  # fmt: skip
        if task["id"] in self._broken:
            error = self._broken[task["id"]]
            task |= {"pexit": "1", "outputs": [], "debugerror": error, "totalcost": "0"}
        task |= self.final | self.finals.get(task["id"], {})

    def _make_video(self, task: dict[str, Any], picture: bytes, delay: float) -> None:
        """Runs in a thread of its own; one at a time, from when the task starts running."""
        self._over.wait(delay)
        with self._studio:
            if self._over.is_set() or task["status"] == "task_cancel":
                return
            given = task["parameters"]
            size = str(given.get("size") or SIZES[0])
            count = int(_number(given.get("numFrames"), 97))
            try:
                video = make_video(picture, size, count, self._over.is_set)
                self.files[f"{task['id']}/0.mp4"] = video
            except Exception as error:  # noqa: BLE001 - the task then fails, as it would there
                self._broken[task["id"]] = f"{type(error).__name__}: {error}"

    def _going(self) -> list[dict[str, Any]]:
        for task in self.tasks.values():
            self._advance(task)
        return [task for task in self.tasks.values() if task["status"] not in ENDS]

    # --- one request ----------------------------------------------------------------------------

    def _handle(self, handler: BaseHTTPRequestHandler) -> None:
        announced = int(handler.headers.get("Content-Length") or 0)
        raw = handler.rfile.read(announced)
        if len(raw) < announced:  # the sender went away: nobody acts on half a request
            handler.close_connection = True
            return
        path = handler.path.removeprefix("/v1/")
        headers = {name.lower(): value for name, value in handler.headers.items()}
        with self._lock:
            refusal: Answer | None = None
            try:
                body, files = parse_body(headers.get("content-type", ""), raw)
            except (ValueError, AttributeError):
                body, files = {}, []
                refusal = _refuse(0, "Request parameters are invalid.")
            self.seen.append(Seen(path, headers, raw, body, files))
            queue = self._faults["Run" if path.startswith("Run/") else path]
            fault = queue.pop(0) if queue else None
            if fault == "reset":
                self.log(f"{path} (reset)")
                handler.close_connection = True
                handler.connection.close()
                return
            refusal = self._check_auth(headers) or refusal
            if refusal is None and isinstance(fault, tuple) and isinstance(fault[0], int):
                refusal = _refuse(*fault)
            status, answer = refusal or self._answer(path, body, files)
        if fault == "lost":
            self.log(_line_of(path, answer, "lost"))
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
        elif isinstance(fault, tuple) and fault[0] == "silent":
            self._hold(fault[1])
        note = fault if isinstance(fault, str) else "fault" if fault is not None else ""
        self.log(_line_of(path, answer, status, note))
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **extra}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(content)

    def _hold(self, seconds: float) -> None:
        if not self._free.wait(seconds):
            self.held_s += seconds

    def let_go(self) -> None:
        """Answer now whom a "silent", "stall" or "slow" fault holds."""
        self._free.set()

    def _check_auth(self, headers: dict[str, str]) -> Answer | None:
        if headers.get("x-api-key") != self.key:
            return _refuse(0, "Project authorization is not founded.", 401)
        if self.key_only:
            return None
        nonce, signature = headers.get("x-nonce", ""), headers.get("x-signature", "")
        if not nonce or not signature:
            return _refuse(
                0,
                "Project requires signature authentication. "
                "x-signature and x-nonce headers are required.",
                401,
            )
        digest = hmac.new(self.key.encode(), (self.secret + nonce).encode(), hashlib.sha256)
        is_new = nonce.isdecimal() and nonce not in self._nonces
        self._nonces.add(nonce)
        if signature != digest.hexdigest() or not is_new:
            return _refuse(0, "Project authorization is not valid.", 401)
        return None

    def _answer(self, path: str, body: dict[str, Any], files: list[Upload]) -> Answer:
        if path.startswith("Run/"):
            return self._answer_run(path.removeprefix("Run/"), body, files)
        if path == "Task/List":
            self._going()
            part = str(body.get("modelName", "")).lower()
            newest = [
                dict(task)
                for task in sorted(self.tasks.values(), key=lambda task: -int(task["id"]))
                if part in f"{task['modelslugowner']}/{task['modelslugproject']}"
            ]
            start, limit = int(body.get("start") or 0), int(body.get("limit") or 20)
            return _grant(total=str(len(newest)), tasklist=newest[start : start + limit])
        if path.startswith("Task/"):
            return self._answer_task(path, body)
        if path == "Tool/Detail":
            return self._answer_model(body)
        if path == "Tool/List":
            word = str(body.get("search", ""))
            if not self.models:
                return _grant(total=1, tool=[{"id": "598", "title": word}])
            own = {slug: self._model(slug) for slug in (*self.slugs, *self.models)}
            fits = [m for m in own.values() if word.lower() in str(m.get("title", "")).lower()]
            return _grant(total=len(fits), tool=fits[: int(body.get("limit") or 20)])
        if path == "File/FolderCreate":
            return _grant(list=[{"id": "f1", "name": body.get("name", "")}])
        if path == "File/Upload":
            return _grant(list=[{"id": "u1", "url": "https://cdn.wiro.ai/u1.png"}])
        return _refuse(0, "Error parsing url.", 404)

    def _answer_run(self, slug: str, body: dict[str, Any], files: list[Upload]) -> Answer:
        if slug not in self.slugs and unquote(slug) not in self.models:
            return _refuse(1, "slug-owner-project-not-exist")
        complaint = "" if body.get("prompt") else "Request parameter [prompt] required"
        record = self.models.get(unquote(slug))
        if self.strict or record is not None:
            listed = PARAMETERS if record is None else record.get("parameters") or []
            complaint = _complaint(body, {name for name, *_ in files}, listed)
        if complaint:
            return _refuse(0, complaint)
        balance, limit = Decimal(self.balance), self.max_tasks
        if balance < Decimal("0.50"):
            return _refuse(97, "Your balance is too low to run this model.")
        if limit is None and balance <= 250:
            limit = max(1, int(balance / 10))
        if limit is not None and len(self._going()) >= limit:
            return _refuse(96, "You have reached your concurrency limit.")
        picture = files[0][3] if files else b""
        task = self.tasks[self.add_task(body, slug, picture, files)]
        return _grant(taskid=task["id"], socketaccesstoken=task["socketaccesstoken"])

    def _answer_model(self, body: dict[str, Any]) -> Answer:
        owner, project = str(body.get("slugowner", "")), str(body.get("slugproject", ""))
        known = {unquote(slug).lower() for slug in (*self.slugs, *self.models)}
        if self.schema and f"{owner}/{project}".lower() not in known:
            return _refuse(1, "slug-owner-project-not-exist")
        return _grant(tool=[self._model(f"{owner}/{project}")])

    def _model(self, slug: str) -> dict[str, Any]:
        owner, _, project = slug.partition("/")
        model: dict[str, Any] = {
            "id": "598",
            "title": project,
            "slugowner": owner,
            "slugproject": project,
            "cleanslugowner": owner.lower(),
            "cleanslugproject": project.lower(),
            "parameters": PARAMETERS if self.schema else None,
            "dynamicprice": None if self.price is None else json.dumps(self.price),
            "cps": self.cps,
        }
        if self.approximatelycost:
            model["approximatelycost"] = self.approximatelycost
        return {**model, **self.models.get(slug, {})}

    def _answer_task(self, path: str, body: dict[str, Any]) -> Answer:
        legal = {
            "Task/Detail": ("tasktoken", "taskid"),
            "Task/Cancel": ("taskid",),
            "Task/Kill": ("taskid", "socketaccesstoken"),
            "Task/InputOutputDelete": ("tasktoken",),
        }.get(path)
        if legal is None:
            return _refuse(0, "Error parsing url.", 404)
        if len(body) != 1 or next(iter(body)) not in legal:
            return _refuse(0, "taskid or socketaccesstoken is required")
        ((name, value),) = body.items()
        own = "id" if name == "taskid" else "socketaccesstoken"
        found = [task for task in self.tasks.values() if task[own] == str(value)]
        if not found:
            return _refuse(1, "There is no task yet.")
        task = found[0]
        self._advance(task)
        ended = task["status"] in ENDS
        if path == "Task/Cancel" and task["status"] != "task_queue":
            return _refuse(1, "Task is not in a cancellable state.")
        if path == "Task/Kill" and (ended or task["status"] == "task_queue"):
            return _refuse(1, "Task could not be killed: no worker")
        if path in ("Task/Cancel", "Task/Kill"):
            self._enter(task, "task_cancel", self.now())
            task["pexit"] = "0"
        elif path == "Task/InputOutputDelete":
            if not ended:
                return _refuse(1, "Task must be completed or cancelled before deleting files")
            task["outputs"] = []
            self._deleted.add(task["id"])
            self.files.pop(f"{task['id']}/0.mp4", None)
            for path in [path for path in self.inputs if path.startswith(f"upload-{task['id']}/")]:
                del self.inputs[path]
        answer = _grant(total="1", tasklist=[dict(task)])
        if path == "Task/Detail" and self.steps_by_itself and self.pace_s <= 0:
            self._step(task)
        return answer

    # --- downloads ------------------------------------------------------------------------------

    def _serve_file(self, handler: BaseHTTPRequestHandler) -> None:
        is_input = handler.path.startswith("/v1/File/")
        name = handler.path.removeprefix("/v1/File/").removeprefix("/files/")
        taskid, _, base = name.rpartition("/")
        with self._lock:
            fetched = self.fetched_inputs if is_input else self.fetched
            fetched.append({k.lower(): v for k, v in handler.headers.items()})
            queue = self._faults["GET " + name] or self._faults["GET " + base]
            fault = queue.pop(0) if queue else None
            content = self.inputs.get(name) if is_input else self.files.get(name)
            if content is None and taskid in self.tasks and taskid not in self._deleted:
                content = self.files.get(base)
        word, value = fault if isinstance(fault, tuple) else (fault, None)
        if content is None and not isinstance(word, int):
            word = 404
        self.log(
            f"GET {'File' if is_input else 'files'}/{name} {word if word is not None else 200}"
        )
        if word == "reset":
            handler.close_connection = True
            handler.connection.close()
            return
        if isinstance(word, int) or word == "redirect":
            handler.send_response(word if isinstance(word, int) else 302)
            if word == "redirect":
                handler.send_header("Location", value)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        assert content is not None
        if word == "silent":
            self._hold(value)
            handler.close_connection = True
            return
        special = value if word == "headers" else {}
        if special.get("Content-Encoding") == "gzip":
            content = gzip.compress(content)
        tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
        whole, start = content, 0
        asked = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
        if asked and self.ranges and handler.headers.get("If-Range", tag) == tag:
            start = int(asked[1])
        start = value if word == "piece" else start
        content = content[start:]
        if start and not content:
            handler.send_response(416)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        half = content[: len(content) // 2]
        handler.send_response(206 if start else 200)
        headers = {"ETag": tag} if self.ranges else {}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(whole) - 1}/{len(whole)}"
        if word == "chunked":
            headers["Transfer-Encoding"] = "chunked"
        elif word == "unsized":
            headers["Connection"] = "close"
        else:
            announced = {"short": len(half), "huge": 2**40}.get(word or "", len(content))
            headers["Content-Length"] = str(announced)
        for header, text in {**headers, **special}.items():
            handler.send_header(header, text)
        handler.end_headers()
        if word == "slow":
            step = len(content) // 20 + 1
            for first in range(0, len(content), step):
                self._hold(value / 20)
                handler.wfile.write(content[first : first + step])
        elif word == "drip":
            for first in range(len(content)):
                if self._over.wait(value):
                    break
                handler.wfile.write(content[first : first + 1])
        elif word == "chunked":
            pieces = [piece for piece in (half, content[len(half) :]) if piece]
            for piece in (*pieces, b""):
                handler.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        else:
            handler.wfile.write(half if word in ("cut", "short", "stall") else content)
        if word == "stall":
            self._hold(value)
        if word in ("cut", "huge", "unsized", "stall", "drip", "headers"):
            handler.close_connection = True

    # --- the socket -----------------------------------------------------------------------------

    def _script(self) -> Script:
        """What the next connection of the socket is played."""
        with self._lock:
            queue = self._faults["socket"]
            fault = queue.pop(0) if queue else ""
        if fault == "refuse":
            self.log("socket (refuse)")
            return [("refuse",)]
        return partial(self._follow, fault)

    def _follow(self, fault: str, registration: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
        """Frames of one task, from its next state to its end; what was before is not repeated.

        Before is what came before "connected": who has heard that misses nothing.
        """
        token = registration.get("tasktoken")
        with self._lock:
            found = [t for t in self.tasks.values() if t["socketaccesstoken"] == token]
            for task in found:
                self._advance(task)
            told = len(self._history[found[0]["id"]]) if found else 0
        yield "text", {"type": "connected", "version": "1.0"}
        if registration.get("type") != "task_info" or not found:
            self.log("socket: no such task")
            yield "text", {"type": "error", "message": "tasktoken is not valid", "result": False}
            return
        task, history = found[0], self._history[found[0]["id"]]
        self.log(f"socket {task['id']} {f'({fault})' if fault else ''}".rstrip())
        if fault == "silent":
            return
        beats = running = 0
        while not self._over.is_set():
            with self._lock:
                self._advance(task)
                news, told = history[told:], len(history)
                status, progress = task["status"], self._progress(task, running)
            for state in news:
                if state != "task_output":  # these are sent below
                    yield "text", _frame(task, state)
            if status in ENDS:
                return
            if status in ("task_start", "task_output"):
                yield from _chatter(task, running, progress)
                running += 1
            if fault == "drop" and running == 3:
                yield ("drop",)
            if fault == "binary":
                yield "binary", b"\0\1audio"
            if beats % 10 == 2:
                yield "ping", 0
            beats += 1
            yield "silent", BEAT_S

    def _progress(self, task: dict[str, Any], running: int) -> dict[str, str]:
        """A report as of now: by the clock, or without one, by how many were sent."""
        share = min(1.0, running / 10)
        elapsed, pace = running * BEAT_S, 10 * BEAT_S
        if self.pace_s > 0:
            start = self._begun[task["id"]][0] + self.pace_s * BEGINS["task_start"]
            pace = self.pace_s * (BEGINS["task_output_full"] - BEGINS["task_start"])
            elapsed = max(0.0, self.clock() - start)
            share = min(1.0, elapsed / pace)
        total = max(1, int(_number(task["parameters"].get("steps"), 30)))
        return {
            "type": "progressGenerate", "task": "Generate", "percentage": str(int(100 * share)),
            "stepCurrent": str(int(total * share)), "stepTotal": str(total),
            "speed": f"{total / pace:.2f}", "speedType": "it/s",
            "elapsedTime": _duration(elapsed), "remainingTime": _duration(pace * (1 - share)),
        }  # fmt: skip


def _frame(task: dict[str, Any], kind: str, message: Any = None) -> dict[str, Any]:
    """A frame as docs+ shows it."""
    if kind == "task_postprocess_end":
        message = task["outputs"]
    elif kind == "task_output_full":
        message = {"raw": LOG}
    return {"type": kind, "id": task["id"], "message": message, "result": True}


def _chatter(
    task: dict[str, Any], running: int, progress: dict[str, str]
) -> Iterator[tuple[Any, ...]]:
    """What a running task says at one beat: at first log lines, then progress in both forms."""
    if running == 0:
        yield "text", _frame(task, "task_output", LOG)
        yield "text", _frame(task, "task_error", WARNING)
    message = json.dumps(progress) if running % 3 == 1 else progress
    yield "text", _frame(task, "task_output", message)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m {rest}s" if minutes else f"{rest}s"


def _grant(**payload: Any) -> Answer:
    return 200, {"result": True, "errors": [], **payload}


def _refuse(code: int, message: str, status: int = 200) -> Answer:
    return status, {"result": False, "errors": [{"code": code, "message": message}]}


def _complaint(
    body: dict[str, Any], uploaded: set[str], parameters: list[dict[str, Any]] = PARAMETERS
) -> str:
    """What is wrong with the parameters of a Run, or ""."""
    for item in (item for group in parameters for item in group["items"]):
        name, value = item["id"], body.get(item["id"])
        if item["type"] in ("fileinput", "multifileinput", "combinefileinput"):
            is_there = name in uploaded or value or body.get(name + "Url")
            if item.get("required") and not is_there:
                return f"Request files [{name}] required"
            continue
        if value in (None, ""):
            if item.get("required"):
                return f"Request parameter [{name}] required"
            continue
        if item["type"] in ("range", "number"):
            number = _number(value, math.nan)
            if math.isnan(number):
                return f"Request parameter [{name}] must be integer or float"
            if "min" in item and not item["min"] <= number <= item["max"]:
                between = f"{item['min']} and {item['max']}"
                return f"Request parameter [{name}] must be between {between}"
        elif "options" in item and value not in [option["value"] for option in item["options"]]:
            return "Request parameters are invalid."
    return ""


def _number(value: Any, default: float) -> float:
    """A finite number, of JSON or in text; else the default."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return default
    try:
        number = float(value)
    except ValueError:
        return default
    return number if math.isfinite(number) else default


def parse_body(content_type: str, raw: bytes) -> tuple[dict[str, Any], list[Upload]]:
    """Fields, and files as (parameter, filename, type, content)."""
    if content_type.startswith("application/json"):
        body = json.loads(raw or b"{}")
        if not isinstance(body, dict):
            raise ValueError("no object")
        return body, []
    head = f"Content-Type: {content_type}\r\n\r\n".encode()
    parts = email.message_from_bytes(head + raw).get_payload()
    fields: dict[str, Any] = {}
    files = []
    for part in parts:
        content, said = part.get_payload(decode=True), _disposition(part)
        if "filename" in said:
            files.append((said["name"], said["filename"], part.get_content_type(), content))
        else:
            fields[said["name"]] = content.decode()
    return fields, files


def _disposition(part: email.message.Message) -> dict[str, str]:
    """Name and filename of a part, which browsers and requests write in quoted UTF-8."""
    headers = {name.lower(): value for name, value in part.raw_items()}
    said = headers["content-disposition"].encode("ascii", "surrogateescape").decode()
    return dict(re.findall(r'\b(name|filename)="([^"]*)"', said))


def make_video(
    picture: bytes, size: str, count: int, is_over: Callable[[], bool] = lambda: False
) -> bytes:
    """An MP4 of `count` frames at 24 a second, gliding over the picture, or over a gradient."""
    import av
    import numpy as np
    from PIL import Image, ImageOps

    width, height = (int(side) // 2 * 2 for side in size.split("x"))
    wide = (width * 9 // 8, height * 9 // 8)
    try:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(picture))).convert("RGB")
        canvas = np.asarray(ImageOps.fit(image, wide))
    except (OSError, ValueError, SyntaxError):  # what PIL raises for what is no picture
        x, y = np.meshgrid(np.linspace(0, 255, wide[0]), np.linspace(0, 255, wide[1]))
        canvas = np.stack([x, y, 255 - x], axis=-1).astype(np.uint8)
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=FPS)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if codec == "libx264":
            stream.options = {"preset": "ultrafast"}
        for i in range(count):
            if is_over():
                break
            share = i / max(1, count - 1)
            left, top = round((wide[0] - width) * share), round((wide[1] - height) * share)
            window = np.ascontiguousarray(canvas[top : top + height, left : left + width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(window, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


# --- by hand ------------------------------------------------------------------------------------


def _line_of(path: str, answer: dict[str, Any], status: Any, note: str = "") -> str:
    """One line on a request; nothing secret is in it."""
    task = next(iter(answer.get("tasklist") or []), {}) if path != "Task/List" else {}
    codes = [f"code {error['code']} {error['message']}" for error in answer["errors"]]
    parts = [path, answer.get("taskid") or task.get("id"), task.get("status"), status, *codes]
    return " ".join(str(part) for part in [*parts, note and f"({note})"] if part)


def _fault_of(text: str) -> tuple[str, Any]:
    """ "Run=lost", 'Task/Detail={"status": 502}', 'Run=[96, "busy"]', "GET 0.mp4=404"."""
    path, _, value = text.partition("=")
    try:
        fault = json.loads(value)
    except ValueError:
        fault = value
    return path, tuple(fault) if isinstance(fault, list) else fault


def main() -> None:
    """Serve with everything on, and say what is asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, default=8190)
    parser.add_argument("--socket-port", type=int, default=8191)
    parser.add_argument("--seconds", type=float, default=20.0, help="from a Run to its end")
    parser.add_argument("--fail", action="append", default=[], metavar="PATH=FAULT")
    options = parser.parse_args()

    def say(line: str) -> None:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    server = WiroServer(
        port=options.port, socket_port=options.socket_port, pace_s=options.seconds,
        with_socket=True, real_video=True, strict=True, schema=True, log=say,
        price=[{"inputs": [], "price": "0.30", "priceMethod": "cpr"}], approximatelycost="0.30",
        models=MODELS,
    )  # fmt: skip
    for text in options.fail:
        try:
            server.fail(*_fault_of(text))
        except ValueError as error:
            parser.error(str(error))
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background jobs ignore the first
        signal.signal(number, signal.default_int_handler)
    with server:
        say(f"export WIRO_API_KEY={server.key}")
        say(f"export WIRO_API_SECRET={server.secret}")
        say(f"export WIRO_API_BASE_URL={server.url}")
        say(f"export WIRO_SOCKET_URL={server.socket_url}")
        try:
            while True:
                time.sleep(1)
        except KeyboardInterrupt:
            say("")


if __name__ == "__main__":
    main()
