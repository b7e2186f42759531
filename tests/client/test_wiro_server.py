"""The stand-in of the service, asked without our client: what it enforces, shows and spoils."""

import ast
import hashlib
import hmac
import io
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
import requests
import websocket
from PIL import Image
from support import wiro_server
from support.wiro_server import KEY, MP4, SECRET, STATES, WiroServer

ROOT = Path(__file__).resolve().parents[2]
GOOD = {"prompt": "FPS-24, waves", "negativePrompt": "", "scale": 6.0, "numFrames": 9,
        "size": "544x960", "steps": 20, "inputImageUrl": "https://x.example/a.png"}  # fmt: skip
NONCES = itertools.count(1)


def signed(nonce: str, signature: str | None = None) -> dict[str, str]:
    message = (SECRET + nonce).encode()
    signature = signature or hmac.new(KEY.encode(), message, hashlib.sha256).hexdigest()
    return {"x-api-key": KEY, "x-nonce": nonce, "x-signature": signature}


def call(server, path: str, body=None, files=None):
    sent = {"data": body, "files": files} if files else {"json": body or {}}
    return requests.post(f"{server.url}/{path}", headers=signed(str(next(NONCES))), **sent).json()


def run(server, body=GOOD, files=None) -> dict[str, str]:
    """The body that names the new task."""
    answer = call(server, "Run/wiro/SkyReels-V1", body, files)
    assert answer["result"], answer
    return {"tasktoken": answer["socketaccesstoken"]}


def detail(server, token) -> dict:
    return call(server, "Task/Detail", token)["tasklist"][0]


def code_of(answer) -> tuple[int, str]:
    assert not answer["result"]
    return answer["errors"][0]["code"], answer["errors"][0]["message"]


def wait_for(server, token, *states: str) -> dict:
    end = time.monotonic() + 5
    while time.monotonic() < end:
        task = detail(server, token)
        if task["status"] in states:
            return task
        time.sleep(0.02)
    raise AssertionError(task["status"])


class Hand:
    """A clock that is moved by hand: no state is missed on a busy machine, none passes early."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Looks:
    """A clock that each look at it moves: so many frames come, however busy the machine."""

    def __init__(self) -> None:
        self.looks = itertools.count()

    def __call__(self) -> float:
        return 0.02 * next(self.looks)


def frames_of(content: bytes) -> list[np.ndarray]:
    with av.open(io.BytesIO(content)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def connect(server, token):
    connection = websocket.create_connection(server.socket_url, timeout=5)
    connection.send(json.dumps({"type": "task_info", **token}))
    return connection


def heard(connection) -> list[dict]:
    """Frames until the end of the task."""
    frames = []
    while not frames or frames[-1]["type"] not in wiro_server.ENDS:
        frames.append(json.loads(connection.recv()))
    connection.close()
    return frames


# --- credentials --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (signed("1734513807", "e843f5e4ef86b64976d1e75eb4164d4f145813524596c9daa0c83c70668a9f98"),
         200),
        (signed("1734513807000",
                "020bdfa290b99f5141a56b5b37c78219adc7a6d7d88088c13972d6c9b7580cb4"), 200),
        (signed("1734513807", "d5ef6ea82ffdfdb30c2fa4da0b590f9c0fbbf8bf8403e1e5792308a3d4f60e83"),
         401),
        (signed("1734513807", "bf1dadbc3189c8e8e94889877b53942b5b052f031871a6c49883d070c2626ed6"),
         401),
        ({"x-api-key": KEY}, 401),
        ({**signed("1"), "x-api-key": "other"}, 401),
        (signed("no number"), 401),
    ],
)  # fmt: skip
def test_only_the_documented_signature_is_let_in(headers, status):
    with WiroServer() as server:
        answer = requests.post(server.url + "/Task/List", headers=headers, json={})
    assert answer.status_code == status
    assert answer.json()["result"] is (status == 200)


def test_a_nonce_is_good_once():
    with WiroServer() as server:
        for status in (200, 401):
            answer = requests.post(server.url + "/Task/List", headers=signed("7"), json={})
            assert answer.status_code == status


# --- a task by the clock ------------------------------------------------------------------------


def test_a_task_walks_by_the_clock_to_a_video_of_its_picture():
    picture = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").save(picture, "JPEG")
    fields = {**{k: str(v) for k, v in GOOD.items()}, "inputImageUrl": ""}
    price = [{"inputs": [], "price": "0.30", "priceMethod": "cpr"}]
    options = {"real_video": True, "strict": True, "price": price, "clock": Hand()}
    began = int(time.time())
    with WiroServer(pace_s=0.8, **options) as server:
        token = run(server, fields, {"inputImage": ("a.jpg", picture.getvalue(), "image/jpeg")})
        seen = []
        while server.clock.now < 0.79:
            seen.append(detail(server, token)["status"])
            server.clock.now += 0.01
        assert "task_postprocess_end" not in seen
        server.clock.now = 0.81
        task = wait_for(server, token, "task_postprocess_end")  # the video is made beside
        seen.append(task["status"])
        assert seen == sorted(seen, key=STATES.index)
        assert len(set(seen)) > 5
        times = [int(task[name]) for name in ("createtime", "assigntime", "postprocessendtime")]
        assert times == sorted(times)
        assert began <= times[0] <= time.time()
        assert task["pexit"] == "0"
        assert task["totalcost"] == "0.300000000000"
        assert task["parameters"]["inputImage"].endswith("/inputImage-1.jpg")
        (output,) = task["outputs"]
        content = requests.get(output["url"]).content
        assert len(content) == int(output["size"])
        assert content[4:8] == b"ftyp"
    frames = frames_of(content)
    assert len(frames) == 9
    assert frames[0].shape == (960, 544, 3)
    assert np.abs(frames[0].astype(int) - frames[-1]).mean() > 1


def test_without_a_clock_and_a_picture_there_is_a_video_too():
    states = ("task_queue", "task_postprocess_end")
    with WiroServer(states=states, real_video=True) as server:
        token = run(server)
        detail(server, token)
        (output,) = detail(server, token)["outputs"]
        assert len(frames_of(requests.get(output["url"]).content)) == 9


def test_what_is_queued_is_cancelled_and_what_runs_is_killed_and_stays_so():
    with WiroServer(pace_s=1.0, clock=Hand()) as server:
        queued, running = run(server), run(server)
        ids = [detail(server, token)["id"] for token in (queued, running)]
        assert code_of(call(server, "Task/Kill", {"taskid": ids[0]}))[0] == 1
        cancelled = call(server, "Task/Cancel", {"taskid": ids[0]})["tasklist"][0]
        assert cancelled["status"] == "task_cancel"
        assert cancelled["canceltime"] != "0"
        server.clock.now = 0.5
        assert detail(server, running)["status"] in ("task_start", "task_output")
        refusal = code_of(call(server, "Task/Cancel", {"taskid": ids[1]}))
        assert refusal == (1, "Task is not in a cancellable state.")
        body = {"socketaccesstoken": running["tasktoken"]}
        assert call(server, "Task/Kill", body)["tasklist"][0]["status"] == "task_cancel"
        for _ in range(2):
            server.clock.now += 1.0
            assert {detail(server, t)["status"] for t in (queued, running)} == {"task_cancel"}
        for path in ("Task/Cancel", "Task/Kill"):
            assert code_of(call(server, path, {"taskid": ids[1]}))[0] == 1
        assert code_of(call(server, "Task/Cancel", running))[0] == 0, "a token where an id belongs"


def test_a_task_may_never_end():
    with WiroServer(pace_s=0.1, states=STATES[:6], clock=Hand()) as server:
        token = run(server)
        server.clock.now = 1000.0
        assert detail(server, token)["status"] == "task_start"


def test_deleted_files_are_gone():
    with WiroServer(pace_s=0.1, clock=Hand()) as server:
        token, other = run(server), run(server)
        assert code_of(call(server, "Task/InputOutputDelete", token))[0] == 1
        server.clock.now = 1.0
        (output,) = wait_for(server, token, "task_postprocess_end")["outputs"]
        assert requests.get(output["url"]).content == MP4
        for _ in range(2):
            assert call(server, "Task/InputOutputDelete", token)["tasklist"][0]["outputs"] == []
        assert requests.get(output["url"]).status_code == 404
        assert requests.get(detail(server, other)["outputs"][0]["url"]).status_code == 200


# --- the socket ---------------------------------------------------------------------------------


def test_the_socket_tells_states_progress_logs_and_the_end(monkeypatch):
    monkeypatch.setattr(wiro_server, "BEAT_S", 0.01)
    with WiroServer(pace_s=1.2, with_socket=True, clock=Looks()) as server:
        token = run(server)
        frames = heard(connect(server, token))
        record = detail(server, token)
    kinds = [frame["type"] for frame in frames]
    assert kinds[0] == "connected"
    states = [kind for kind in kinds if kind in STATES and kind != "task_output"]
    ahead = [state for state in STATES[1:] if state != "task_output"]
    assert states == ahead[-len(states) :]  # a slow connection may miss the first ones
    messages = [frame["message"] for frame in frames if frame["type"] == "task_output"]
    progress = [m for m in messages if isinstance(m, dict)]
    in_text = [json.loads(m) for m in messages if isinstance(m, str) and m.startswith("{")]
    assert wiro_server.LOG in messages
    assert "task_error" in kinds
    assert progress
    assert in_text
    for reports in (progress, in_text):
        steps = [int(m["stepCurrent"]) for m in reports]
        assert steps == sorted(steps)
    assert {m["stepTotal"] for m in progress} == {"20"}
    assert all(isinstance(value, str) for m in progress for value in m.values())
    assert frames[-1]["message"] == record["outputs"]
    assert "token-of" not in json.dumps(frames)


def test_the_socket_tells_of_a_cancelled_task_and_refuses_what_it_does_not_know():
    with WiroServer(pace_s=5, with_socket=True, clock=Hand()) as server:
        token = run(server)
        connection = connect(server, token)
        assert json.loads(connection.recv())["type"] == "connected"  # else it might be too late
        call(server, "Task/Cancel", {"taskid": "2221"})
        assert heard(connection)[-1]["type"] == "task_cancel"
        connection = connect(server, {"tasktoken": "2221"})
        assert [json.loads(connection.recv())["type"] for _ in range(2)] == ["connected", "error"]
        connection.close()


def test_the_socket_misbehaves_on_demand():
    with WiroServer(pace_s=0.8, with_socket=True) as server:
        server.fail("socket", "refuse", "silent", "drop", "binary")
        token = run(server)
        with pytest.raises(websocket.WebSocketBadStatusException):
            connect(server, token)
        silent, dropped, binary = (connect(server, token) for _ in range(3))
        with pytest.raises(websocket.WebSocketConnectionClosedException):
            heard(dropped)
        kinds = set()
        while "end" not in kinds:
            opcode, data = binary.recv_data()
            kinds |= {opcode} | ({"end"} if b"task_postprocess_end" in data else set())
        assert websocket.ABNF.OPCODE_BINARY in kinds
        assert json.loads(silent.recv())["type"] == "connected"
        silent.settimeout(0.1)
        with pytest.raises(websocket.WebSocketTimeoutException):
            silent.recv()
        for connection in (silent, dropped, binary):
            connection.close()


def test_fifty_sockets_are_followed_at_once():
    with WiroServer(pace_s=1.0, with_socket=True, clock=Hand()) as server:
        connections = [connect(server, run(server)) for _ in range(50)]
        first = {json.loads(connection.recv())["type"] for connection in connections}
        assert first == {"connected"}, "all are answered while no task goes on"
        server.clock.now = 1000.0
        ids = {heard(connection)[-1]["id"] for connection in connections}
    assert len(ids) == 50


# --- rules of a Run -----------------------------------------------------------------------------


def test_an_account_has_limits():
    with WiroServer(max_tasks=2) as server:
        tokens = [run(server), run(server)]
        assert code_of(call(server, "Run/wiro/SkyReels-V1", GOOD))[0] == 96
        assert len(server.tasks) == 2
        call(server, "Task/Cancel", {"taskid": "2221"})
        run(server)
        server.balance = "0.49"
        assert code_of(call(server, "Run/wiro/SkyReels-V1", GOOD))[0] == 97
        assert len(server.tasks) == len(tokens) + 1
    with WiroServer(balance="25.00") as server:
        run(server), run(server)
        assert code_of(call(server, "Run/wiro/SkyReels-V1", GOOD))[0] == 96


@pytest.mark.parametrize("is_form", [False, True])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": ""}, "Request parameter [prompt] required"),
        ({"size": ""}, "Request parameter [size] required"),
        ({"size": "1x1"}, "Request parameters are invalid."),
        ({"inputImageUrl": ""}, "Request files [inputImage] required"),
        ({"steps": "many"}, "[steps] must be integer or float"),
        ({"numFrames": "nan"}, "[numFrames] must be integer or float"),
        ({"steps": "0"}, "[steps] must be between 1 and 100"),
    ],
)
def test_parameters_are_checked_if_asked_for(changes, words, is_form):
    form = {"other": ("a.bin", b"x")} if is_form else None
    body = {**GOOD, **changes}
    with WiroServer(strict=True) as server:
        code, message = code_of(call(server, "Run/wiro/SkyReels-V1", body, form))
        assert (code, words in message) == (0, True), message
        assert server.tasks == {}
        run(server, GOOD, form)
    if "prompt" not in changes:
        with WiroServer() as server:
            run(server, body, form)


def test_what_is_no_request_is_refused_politely():
    with WiroServer() as server:
        for content in (b"{broken", b"[1]"):
            headers = {**signed(str(next(NONCES))), "Content-Type": "application/json"}
            answer = requests.post(server.url + "/Task/Detail", data=content, headers=headers)
            assert code_of(answer.json())[0] == 0
        assert code_of(call(server, "Task/Detail"))[0] == 0
        assert code_of(call(server, "Task/Other"))[1] == "Error parsing url."


def test_the_model_is_described_as_the_service_does():
    body = {"slugowner": "wiro", "slugproject": "SkyReels-V1"}
    price = [{"inputs": [], "price": "0.30", "priceMethod": "cpr"}]
    with WiroServer(schema=True, price=price, approximatelycost="0.30") as server:
        (model,) = call(server, "Tool/Detail", body)["tool"]
        assert code_of(call(server, "Tool/Detail", {**body, "slugproject": "x"}))[0] == 1
    items = {item["id"]: item for group in model["parameters"] for item in group["items"]}
    assert {name: item["type"] for name, item in items.items()} == {
        "inputImage": "fileinput", "prompt": "textarea", "negativePrompt": "textarea",
        "scale": "range", "numFrames": "number", "size": "select", "steps": "range",
    }  # fmt: skip
    assert {name for name, item in items.items() if item["required"]} == {
        "inputImage", "prompt", "size",
    }  # fmt: skip
    assert [o["value"] for o in items["size"]["options"]] == ["960x544", "544x960"]
    assert json.loads(model["dynamicprice"]) == price
    assert model["approximatelycost"] == "0.30"
    with WiroServer() as server:
        (model,) = call(server, "Tool/Detail", body)["tool"]
    assert (model["parameters"], model["dynamicprice"]) == (None, None)


# --- faults of answers and downloads ------------------------------------------------------------


def test_answers_and_files_can_be_late(monkeypatch):
    with WiroServer() as server:
        server.fail("Run", ("silent", 0.2))
        server.fail("GET 0.mp4", ("slow", 0.2))
        waits = []
        monkeypatch.setattr(server._free, "wait", waits.append)
        run(server)
        assert waits == [0.2]
        requests.get(server.file_url("0.mp4"))
        assert sum(waits[1:]) == pytest.approx(0.2)
        assert len(server.tasks) == 1
        with pytest.raises(ValueError, match="no fault of Run: chunked"):
            server.fail("Run", "chunked")


@pytest.mark.parametrize("fault", ["unsized", "chunked"])
def test_files_can_come_without_their_size(fault):
    with WiroServer() as server:
        server.fail("GET 0.mp4", fault)
        answer = requests.get(server.file_url("0.mp4"))
        assert answer.content == MP4
        assert "Content-Length" not in answer.headers


# --- by itself ----------------------------------------------------------------------------------


def test_it_serves_by_hand_and_prints_no_key():
    command = [sys.executable, "-m", "tests.support.wiro_server", "--port", "0", "--socket-port",
               "0", "--seconds", "1", "--fail", "Task/List=[1, \"no\"]"]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        lines = [process.stdout.readline().removeprefix("export ").strip() for _ in range(4)]
        environment = dict(line.split("=", 1) for line in lines)
        assert (environment["WIRO_API_KEY"], environment["WIRO_API_SECRET"]) == (KEY, SECRET)
        assert environment["WIRO_SOCKET_URL"].startswith("ws://127.0.0.1:")
        url = environment["WIRO_API_BASE_URL"]
        for path, body in (("Run/wiro/SkyReels-V1", GOOD), ("Task/List", {})):
            requests.post(f"{url}/{path}", headers=signed(str(next(NONCES))), json=body)
        assert process.stdout.readline() == "Run/wiro/SkyReels-V1 2221 200\n"
        assert process.stdout.readline() == "Task/List 200 code 1 no (fault)\n"
        process.terminate()
        assert process.wait(5) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_it_knows_nothing_of_the_client():
    for name in ("wiro_server", "wiro_socket"):
        path = ROOT / "tests" / "support" / f"{name}.py"
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            roots = {part for name in names for part in name.split(".")}
            assert not roots & {"wiro_api", "skyreels", "nodes", "comfyui_skyreels"}
