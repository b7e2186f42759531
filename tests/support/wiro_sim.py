"""Programs that share one account, in one process: their time, their order and their service.

Each program is a thread of its own, but only one of them ever goes on: a `World` wakes them in the
order of a clock that nothing but their waits moves. So a schedule is the same each time it is made,
however busy the machine. The service keeps what Runs have sent and lists its tasks; what becomes of
each Run is told before (see `FATES`).
"""

import contextvars
import heapq
import json
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import requests

from .wiro_replies import URL, Reply, session_of, whole_body
from .wiro_server import parse_body

#: what becomes of a Run: (whether its end leaves, when it is carried out, what comes back)
FATES = (
    "answered", "slow", "late", "lost before", "lost after", "lost and late", "gateway before",
    "gateway after", "gateway and late", "never left", "refused",
)  # fmt: skip
BALANCE = json.dumps({"result": False, "errors": [{"code": 97, "message": "low"}]}).encode()
Params = dict[str, Any]


class KilledError(BaseException):
    """The program has ended in the middle."""


class World:
    """The clock, and whose turn it is."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.now_s = 0.0
        self._queue: list[tuple[float, float, Callable[[], None]]] = []
        #: of the program, also in the threads that its calls are made in
        self._turn: contextvars.ContextVar[_Turn] = contextvars.ContextVar("turn")

    def at(self, moment: float, do: Callable[[], None]) -> None:
        """Do something at a time; what is due at once comes in an order of the dice."""
        heapq.heappush(self._queue, (moment, self.rng.random(), do))

    def start(self, moment: float, program: Callable[[], None], killed_at: float) -> None:
        """Begin a program at a time."""
        turn = _Turn(killed_at)

        def work() -> None:
            self._turn.set(turn)
            turn.go.wait()
            turn.go.clear()
            try:
                program()
            finally:
                turn.is_over = True
                turn.done.set()

        threading.Thread(target=work, daemon=True).start()
        self.at(moment, turn.run)

    def pause(self, seconds: float) -> None:
        """Let the others go on for a while; called by a program."""
        turn = self._turn.get()
        moment = min(self.now_s + seconds, max(turn.killed_at, self.now_s))
        its_turn = (moment, self.rng.random(), turn.run)
        heapq.heappush(self._queue, its_turn)
        if self._queue[0] is its_turn:  # nothing else comes before
            heapq.heappop(self._queue)
            self.now_s = max(self.now_s, moment)
        else:
            turn.done.set()
            turn.go.wait()
            turn.go.clear()
        if self.now_s >= turn.killed_at:
            raise KilledError

    def play(self) -> None:
        """Until nothing is left to do."""
        while self._queue:
            moment, _, do = heapq.heappop(self._queue)
            self.now_s = max(self.now_s, moment)
            do()


class _Turn:
    def __init__(self, killed_at: float) -> None:
        self.killed_at, self.is_over = killed_at, False
        self.go, self.done = threading.Event(), threading.Event()

    def run(self) -> None:
        if self.is_over:
            return
        self.done.clear()
        self.go.set()
        self.done.wait()


@dataclass
class Sent:
    """One Run as it went out: by whom, what, and what became of it."""

    who: Any
    parameters: Params
    files: dict[str, bytes]
    fate: str
    taskid: str = ""


@dataclass
class Service:
    """The service as its programs see it.

    reencodes: it stores other bytes than were sent. goes_over: changes a record of the list.
    """

    world: World
    reencodes: bool = False
    goes_over: Callable[[dict[str, Any]], Any] = lambda record: record
    runs: list[Sent] = field(default_factory=list)
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    inputs: dict[str, bytes] = field(default_factory=dict)
    lists: int = 0

    def session(self, who: Any, fate: Callable[[], str]) -> requests.Session:
        """The connections of one program. fate: of its next Run."""
        return session_of(lambda request: self._answer(request, who, fate))

    def add(self, parameters: Params, files: dict[str, bytes]) -> str:
        """A new task."""
        taskid = str(100 + len(self.records))
        echo = {}
        for name, content in files.items():
            self.inputs[f"t{taskid}/{name}-1.png"] = content[::-1] if self.reencodes else content
            echo[name] = f"{URL}/File/t{taskid}/{name}-1.png"
        self.records[taskid] = {
            "id": taskid, "socketaccesstoken": f"token-{taskid}", "status": "task_queue",
            "parameters": {**parameters, **echo}, "createtime": str(int(self.world.now_s)),
            "modelslugowner": "wiro", "modelslugproject": "skyreels-v1",
        }  # fmt: skip
        return taskid

    def _answer(
        self, request: requests.PreparedRequest, who: Any, fate: Callable[[], str]
    ) -> Reply:
        path = str(request.url).removeprefix(f"{URL}/")
        if request.method == "GET":
            content = self.inputs.get(path.removeprefix("File/"))
            return (404, b"") if content is None else (200, content)
        if path.startswith("Run/"):
            return self._answer_run(request, who, fate())
        raw = whole_body(request)
        self.world.pause(self.world.rng.uniform(0.05, 1.0))
        if path == "Task/List":
            self.lists += 1
            asked = json.loads(raw)
            newest = sorted(self.records.values(), key=lambda record: -int(record["id"]))
            start = int(asked["start"])
            page = [self.goes_over(dict(r)) for r in newest[start : start + int(asked["limit"])]]
            return _grant(total=str(len(newest)), tasklist=page)
        taskid = json.loads(raw)["taskid"]
        return _grant(tasklist=[self.records[taskid]])

    def _answer_run(self, request: requests.PreparedRequest, who: Any, fate: str) -> Reply:
        dice, world = self.world.rng, self.world
        world.pause(dice.uniform(0.05, 1.0))
        if fate == "never left":
            raise requests.ConnectionError("refused")
        kind = request.headers["Content-Type"]
        parameters, uploads = parse_body(kind, whole_body(request))
        files = {name: content for name, _, _, content in uploads}
        sent = Sent(who, parameters, files, fate)
        self.runs.append(sent)

        def make() -> None:
            sent.taskid = self.add(parameters, files)

        word, _, when = fate.partition(" ")
        world.pause(dice.uniform(0.05, 1.0))
        if fate in ("answered", "slow") or when == "after":
            make()
        delay = dice.uniform(1.0, 80.0)
        if when == "and late" or fate == "late":
            world.at(world.now_s + delay, make)
        if fate == "late":
            world.pause(delay + 0.5)
        elif fate == "slow":
            world.pause(delay)
        else:
            world.pause(dice.uniform(0.05, 5.0))
        if word == "lost":
            raise requests.ConnectionError("reset")
        if word == "gateway":
            status = dice.choice((408, 418, 499, 500, 502, 504, 200, 400))
            return status, dice.choice((b"<html>", b"", b'{"message": "gone"}'))
        if fate == "refused":
            return 200, BALANCE
        return _grant(taskid=sent.taskid, socketaccesstoken=f"token-{sent.taskid}")


def _grant(**payload: Any) -> Reply:
    return 200, json.dumps({"result": True, "errors": [], **payload}).encode()
