"""The eleven points of the specification's acceptance checklist, each as a whole."""

import json
import logging
import re
import threading
import time
import traceback
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import requests
from comfyui_skyreels.wiro_api import cli, websocket
from comfyui_skyreels.wiro_api import client as client_module
from comfyui_skyreels.wiro_api.client import Client, RunHandle, raise_for_failure
from comfyui_skyreels.wiro_api.errors import (
    AccountError,
    ApiError,
    AuthError,
    BalanceError,
    ConcurrencyError,
    DownloadError,
    NotFoundError,
    RequestError,
    TaskFailedError,
    TaskTimeoutError,
    WiroError,
)
from comfyui_skyreels.wiro_api.files import download, read_part
from comfyui_skyreels.wiro_api.jobs import Job, finish, start, to_handle
from comfyui_skyreels.wiro_api.journal import Journal
from comfyui_skyreels.wiro_api.signing import Credentials, sign
from comfyui_skyreels.wiro_api.task import Progress, Verdict, parse_task, verdict
from support.clip import make_clip
from support.wiro_client import MODEL, PARAMETERS, Clock, listening, make_client
from support.wiro_server import STATES, WiroServer
from support.wiro_socket import SocketServer

FOREVER = 200
BAD_GATEWAY = {"status": 502, "body": {"result": False}}
NO_KEY = {"status": 401, "body": {"result": False}}
OUTPUT = {"name": "0.mp4", "contenttype": "video/mp4", "url": "https://cdn1.wiro.ai/x/0.mp4"}


def runs(server) -> int:
    return sum(path.startswith("Run/") for path in server.paths())


def host_of(server) -> str:
    return server.url.removeprefix("http://").removesuffix("/v1")


def until(condition, limit_s: float = 5.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


# --- 1 ------------------------------------------------------------------------------------------


def test_point_01_signatures_are_the_vectors_and_never_the_negative_ones():
    vectors = {
        "1734513807": "e843f5e4ef86b64976d1e75eb4164d4f145813524596c9daa0c83c70668a9f98",
        "1734513807000": "020bdfa290b99f5141a56b5b37c78219adc7a6d7d88088c13972d6c9b7580cb4",
    }
    assert {nonce: sign("test-key", "test-secret", nonce) for nonce in vectors} == vectors
    assert not set(vectors.values()) & {
        "d5ef6ea82ffdfdb30c2fa4da0b590f9c0fbbf8bf8403e1e5792308a3d4f60e83",
        "bf1dadbc3189c8e8e94889877b53942b5b052f031871a6c49883d070c2626ed6",
    }


def test_point_01_nonces_rise_strictly_across_threads_and_retries(server, clock):
    client = make_client(server, clock)
    server.fail("Task/List", *[BAD_GATEWAY] * 4)
    threads = [
        threading.Thread(target=client.list_tasks, kwargs={"model": f"thread {number}"})
        for number in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sent = [(seen.body["modelName"], int(seen.headers["x-nonce"])) for seen in server.seen]
    assert len({nonce for _, nonce in sent}) == len(sent) == 8 + 4
    for number in range(8):
        own = [nonce for name, nonce in sent if name == f"thread {number}"]
        assert own == sorted(own)


def test_point_01_two_clients_of_one_process_share_no_nonce(server, clock):
    # a node makes a client for each run, and a service may take each nonce once
    for client in (make_client(server, clock), make_client(server, clock)):
        client.list_tasks()
    first, second = (int(seen.headers["x-nonce"]) for seen in server.seen)
    assert first < second


# --- 2 ------------------------------------------------------------------------------------------


def test_point_02_a_local_picture_goes_as_the_documented_multipart_byte_by_byte(
    server, client, tmp_path
):
    picture = tmp_path / "ä b.PNG"
    picture.write_bytes(b"\x89PNG\r\n\x1a\n\0\xff--")
    parameters = {**PARAMETERS, "prompt": 'FPS-24, eine Frau lächelt 漢\r\n& "x"'}
    for _ in range(2):
        client.run(MODEL, parameters, [("inputImage", read_part(picture))])
    boundaries = set()
    for seen in (seen for seen in server.seen if seen.path.startswith("Run/")):
        kind, _, boundary = seen.headers["content-type"].partition("; boundary=")
        boundaries.add(boundary)
        assert kind == "multipart/form-data"
        assert seen.headers["content-length"] == str(len(seen.raw))
        *parts, end = seen.raw.split(b"--" + boundary.encode())
        assert (parts[0], end) == (b"", b"--\r\n")
        head = b"\r\nContent-Disposition: form-data; name="
        assert sorted(parts[1:]) == sorted(
            [
                head + b'"inputImageUrl"\r\n\r\n\r\n',
                head + b'"prompt"\r\n\r\n' + parameters["prompt"].encode() + b"\r\n",
                head + b'"negativePrompt"\r\n\r\n\r\n',
                head + b'"scale"\r\n\r\n6.0\r\n',
                head + b'"numFrames"\r\n\r\n97\r\n',
                head + b'"size"\r\n\r\n960x544\r\n',
                head + b'"steps"\r\n\r\n30\r\n',
                head + b'"inputImage"; filename="input.png"\r\nContent-Type: image/png\r\n\r\n'
                + picture.read_bytes() + b"\r\n",
            ]
        )  # fmt: skip
    assert len(boundaries) == 2, "the library makes them"


def test_point_02_an_address_goes_as_the_documented_json(server, client):
    client.run(MODEL, {**PARAMETERS, "inputImageUrl": "https://x.example/a.png"})
    _, seen = server.seen
    assert seen.headers["content-type"] == "application/json"
    assert json.loads(seen.raw) == {
        "inputImageUrl": "https://x.example/a.png", "prompt": "FPS-24, a woman smiles",
        "negativePrompt": "", "scale": 6.0, "numFrames": 97, "size": "960x544", "steps": 30,
    }  # fmt: skip


# --- 3 ------------------------------------------------------------------------------------------


def test_point_03_a_record_reads_the_same_with_its_numbers_as_strings():
    numbers = {"id": 7, "pexit": 0, "elapsedseconds": 6, "cps": 0.000585, "totalcost": 0.00351,
               "createtime": 1734513807, "starttime": 0, "endtime": 1734513813,
               "postprocessendtime": 1734513814, "status": "task_postprocess_end"}  # fmt: skip
    words = {name: str(value) for name, value in numbers.items()}
    read = [
        parse_task({**numbers, "outputs": [{**OUTPUT, "size": 1000, "ispublic": 0}]}),
        parse_task({**words, "outputs": [{**OUTPUT, "size": "1000", "ispublic": "0"}]}),
    ]
    for name in (
        "taskid", "exit_code", "elapsed_s", "totalcost", "starttime", "endtime",
        "postprocessendtime",
    ):  # fmt: skip
        assert getattr(read[0], name) == getattr(read[1], name), name
    assert read[1].totalcost == Decimal("0.00351")
    assert [task.outputs[0].num_bytes for task in read] == [1000, 1000]
    assert [verdict(task) for task in read] == [Verdict.SUCCEEDED] * 2


def test_point_03_what_is_missing_or_oddly_typed_is_read_without_failing(server, client):
    records = [
        {"outputs": None}, {"parameters": '{"prompt": "x"}'}, {"categories": '["a"b"]'},
        {"categories": ["a"], "parameters": None, "pexit": None}, {"status": "task_of_tomorrow"},
    ]  # fmt: skip
    for record in records:
        body = {"tasklist": [{"id": "7", "status": "task_start", **record}]}
        server.fail("Task/Detail", {"status": 200, "body": body})  # without `result`
        task = client.detail(RunHandle("7", ""))
        assert (task.taskid, verdict(task)) == ("7", Verdict.RUNNING)
    assert parse_task(records[1]).parameters == {"prompt": "x"}
    for yes in (True, 1, "1", "true"):
        body = {"result": yes, "tasklist": [{"id": 7}]}
        server.fail("Task/Detail", {"status": 200, "body": body})
        assert client.detail(RunHandle("7", "")).taskid == "7"
    for no in (False, 0, "0", "false", None):
        for errors in (
            ["Request parameter [x] required"],
            [{"code": "0", "message": "Request parameter [x] required", "time": 3}],
        ):
            body = {"result": no, "errors": errors}
            server.fail("Task/Detail", {"status": 200, "body": body})
            with pytest.raises(RequestError, match=r"Request parameter \[x\] required"):
                client.detail(RunHandle("7", ""))  # fmt: skip


# --- 4 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "pexit", "outputs", "expected"),
    [
        ("task_cancel", "0", [OUTPUT], Verdict.CANCELLED),
        ("task_cancel", "1", [], Verdict.CANCELLED),
        ("task_cancel", "", [], Verdict.CANCELLED),
        ("task_postprocess_end", "0", [OUTPUT], Verdict.SUCCEEDED),
        ("task_postprocess_end", 0, [{"contenttype": "raw", "content": "x"}], Verdict.SUCCEEDED),
        ("task_postprocess_end", "0", [], Verdict.NO_OUTPUT),
        ("task_postprocess_end", "0", [{"name": "0.mp4"}], Verdict.NO_OUTPUT),
        ("task_postprocess_end", None, [OUTPUT], Verdict.SUCCEEDED),
        ("task_postprocess_end", "", [], Verdict.FAILED),
        ("task_postprocess_end", "1", [OUTPUT], Verdict.FAILED),
        ("task_postprocess_end", "137", [], Verdict.FAILED),
        *((s, "0", [OUTPUT], Verdict.RUNNING) for s in (*STATES[:-1], "task_error", "task_new")),
    ],
)
def test_point_04_the_verdict_follows_the_table(status, pexit, outputs, expected):
    record = {"id": "7", "status": status, "pexit": pexit, "outputs": outputs}
    assert verdict(parse_task(record)) is expected
    late = parse_task({**record, "postprocessendtime": "9"})
    assert (verdict(late) is expected) == (status != "task_new")


def test_point_04_a_success_without_files_is_read_three_times_more_and_then_failed(
    server, client, clock
):
    server.states, server.final = STATES[-1:], {"outputs": []}
    *_, task = client.watch(client.run(MODEL, PARAMETERS))
    assert server.paths().count("Task/Detail") == 1 + 3
    assert clock.sleeps == [2.0, 2.0, 2.0]
    with pytest.raises(TaskFailedError, match="2221 ended .*file"):
        raise_for_failure(task)


# --- 5 ------------------------------------------------------------------------------------------


def test_point_05_a_lost_answer_to_run_is_looked_up_and_never_sent_again(server, client):
    server.fail("Run", "lost")
    assert client.run(MODEL, PARAMETERS).taskid == "2221"
    assert server.paths() == ["Task/List", "Run/wiro/SkyReels-V1", "Task/List"]
    assert "modelName" not in server.seen[0].body
    assert server.seen[2].body == {
        "type": "model", "sort": "id", "order": "DESC", "start": "0", "limit": "20",
        "modelName": "SkyReels-V1",
    }  # fmt: skip
    assert len(server.tasks) == 1


# --- 6 ------------------------------------------------------------------------------------------


def follow(server, script, hold=lambda task, socket: None):
    """States and progress of a task beside a socket that plays a script."""
    clock = Clock()
    client = make_client(server, clock)
    states, progress = [], []

    def on_task(task) -> None:
        states.append(task.status)
        until(lambda: socket.registered)
        hold(task, socket, progress)

    with SocketServer(script) as socket:
        client.socket_url = socket.url
        task, _ = finish(
            client,
            client.run(MODEL, PARAMETERS),
            server.folder,
            timeout_s=3600,
            listener=listening(on_task=on_task, on_progress=progress.append),
        )
    assert verdict(task) is Verdict.SUCCEEDED
    return clock, states, progress


@pytest.fixture
def followed(server, tmp_path, monkeypatch):
    monkeypatch.setattr(websocket, "TICK_S", 0.02)
    server.folder = tmp_path
    return server


def test_point_06_beside_a_silent_socket_the_watchdog_finishes_the_task(followed):
    def hold(task, socket, progress) -> None:
        assert progress == []

    clock, states, _ = follow(followed, [("silent", 60)], hold)
    assert states[-1] == "task_postprocess_end"
    assert clock.time_s < client_module.WATCHDOG_S * 2, "that it is connected tells nothing"


@pytest.mark.parametrize("end", ["close", "drop"])
def test_point_06_after_a_socket_that_closes_early_polling_goes_on(followed, caplog, end):
    def hold(task, socket, progress) -> None:
        until(lambda: "polling goes on" in caplog.text)

    clock, states, _ = follow(followed, [(end,)], hold)
    assert states[-1] == "task_postprocess_end"
    assert clock.time_s < client_module.WATCHDOG_S * 2


def test_point_06_progress_may_be_json_in_a_string_and_binary_and_task_end_do_nothing(followed):
    def hold(task, socket, progress) -> None:
        until(lambda: len(progress) == 2)

    script = [
        ("binary", b"\0\1audio"),
        ("text", {"type": "task_output", "message": '{"percentage": "60", "stepCurrent": "6"}'}),
        ("text", {"type": "task_end"}),
        ("text", {"type": "task_output", "message": {"percentage": "70"}}),
    ]
    _, states, progress = follow(followed, script, hold)
    assert progress == [Progress(0.6, 6, None, "", ""), Progress(0.7, None, None, "", "")]
    assert states[states.index("task_end") :] == list(STATES[STATES.index("task_end") :])


# --- 7 ------------------------------------------------------------------------------------------


class Impatient(requests.Session):
    """Waits for no answer longer than a fifth of a second."""

    def send(self, request, **keywords):
        return super().send(request, **{**keywords, "timeout": (1.0, 0.2)})


def test_point_07_polls_go_on_through_every_fault_until_the_deadline_and_can_be_resumed(clock):
    with WiroServer() as server:
        client = make_client(server, clock)
        client.session = Impatient()
        handle = client.run(MODEL, PARAMETERS)
        server.fail("Task/Detail", BAD_GATEWAY, ("silent", 60), "html", "truncated", "list",
                    "reset", "lost", {"status": 429}, (0, "strange"))  # fmt: skip
        server.fail("Task/Detail", *[BAD_GATEWAY] * FOREVER)
        with pytest.raises(TaskTimeoutError, match="2221") as caught:
            list(client.watch(handle, timeout_s=600))
        assert clock.time_s == pytest.approx(600)
        again = caught.value.handle
        assert (again.taskid, again.token) == (handle.taskid, handle.token) == (
            "2221", server.tasks["2221"]["socketaccesstoken"],
        )  # fmt: skip
        assert caught.value.taskid == "2221"
        server._faults.clear()
        *_, task = client.watch(again)
        assert verdict(task) is Verdict.SUCCEEDED
        assert runs(server) == 1


@pytest.mark.parametrize("status", [401, 403, 404])
def test_point_07_a_poll_that_is_refused_stops_at_once(server, client, clock, status):
    handle = client.run(MODEL, PARAMETERS)
    server.fail("Task/Detail", {"status": status, "body": {"result": False}})
    with pytest.raises(ApiError) as caught:
        list(client.watch(handle))
    assert caught.value.taskid == "2221"
    assert (server.paths().count("Task/Detail"), clock.sleeps) == (1, [])


# --- 8 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("handle", "state", "calls"),
    [
        ("id", "task_queue", [("Task/Cancel", {"taskid": "2221"})]),
        ("token", "task_queue", [("Task/Cancel", {"taskid": "2221"})]),
        ("id", "task_start", [("Task/Kill", {"taskid": "2221"})]),
        ("token", "task_accept", [("Task/Kill", {"taskid": "2221"})]),
        ("both", "task_assign", [("Task/Kill", {"taskid": "2221"})]),
        ("both", "task_postprocess_end", []),
        ("both", "task_cancel", []),
    ],
)
def test_point_08_stop_cancels_what_is_queued_and_kills_what_runs(
    server, client, handle, state, calls
):
    server.add_task(dict(PARAMETERS))
    server.steps_by_itself = False
    task = server.tasks["2221"]
    task |= {"status": state, "pexit": "0", "outputs": [OUTPUT]}
    token = task["socketaccesstoken"]
    identifiers = {"id": ("2221", ""), "token": ("", token), "both": ("2221", token)}[handle]
    assert client.stop(RunHandle(*identifiers)).is_terminal
    sent = [(s.path, s.body) for s in server.seen if s.path in ("Task/Cancel", "Task/Kill")]
    assert sent == calls


def test_point_08_a_task_that_was_taken_between_two_calls_is_killed_with_one_key(server, client):
    handle = client.run(MODEL, PARAMETERS)  # it steps on after each Detail
    server.fail("Task/Kill", (1, "Task could not be killed: no worker"))
    assert client.stop(handle).status == "task_cancel"
    sent = [(s.path, s.body) for s in server.seen if s.path in ("Task/Cancel", "Task/Kill")]
    identifier = {"taskid": "2221"}
    assert sent == [
        ("Task/Cancel", identifier), ("Task/Kill", identifier), ("Task/Kill", identifier),
    ]  # fmt: skip
    server.tasks["2221"]["status"] = "task_start"
    client.kill(RunHandle("", handle.token))
    assert server.seen[-1].body == {"socketaccesstoken": handle.token}


# --- 9 ------------------------------------------------------------------------------------------


def test_point_09_codes_are_classes_of_their_own_and_make_no_task(server, client):
    answers = {
        96: ("concurrency limit", ConcurrencyError),
        97: ("balance too low", BalanceError),
        98: ("registered account", AccountError),
        1: ("tool-not-accessible", NotFoundError),
        0: ("Request parameter [size] required", RequestError),
        99: ("bearer token", AuthError),
    }
    for code, (message, kind) in answers.items():
        server.fail("Run", *[(code, message)] * 2)
        with pytest.raises(ApiError, match=re.escape(message)) as caught:
            client.run(MODEL, PARAMETERS)
        assert (type(caught.value), caught.value.code) == (kind, code)
        server._faults.clear()
    assert len({kind for _, kind in answers.values()}) == len(answers)
    assert server.tasks == {}


def test_point_09_a_full_account_is_waited_for_only_if_that_was_asked(
    server, client, clock, tmp_path
):
    journal = Journal(tmp_path / "journal.sqlite", now=clock.now)
    server.fail("Run", *[(96, "concurrency limit")] * 4)
    with pytest.raises(ConcurrencyError):
        start(client, journal, Job(MODEL, PARAMETERS))
    assert (runs(server), clock.time_s) == (1, 0)
    assert start(client, journal, Job(MODEL, PARAMETERS), wait_when_busy=True).taskid == "2221"
    assert (runs(server), clock.time_s, len(server.tasks)) == (5, 5 + 10 + 20, 1)


# --- 10 -----------------------------------------------------------------------------------------

#: an MP4 file that ends inside its content
CUT = (b"\0\0\0\x10ftypisom\0\0\0\0" + b"\0\1\0\0mdat").ljust(1000, b"\1")


@pytest.mark.parametrize(
    ("changes", "content", "words"),
    [
        ({"size": "1001"}, None, None),  # Content-Length and the container decide
        ({"size": "999"}, None, None),
        ({"size": "1001"}, CUT, "1000 bytes came where Wiro names 1001"),
        ({}, b"<html>".ljust(1000), "not an MP4 file"),
        ({"contenttype": "", "name": "a.MP4"}, b"x" * 1000, "not an MP4 file"),
        ({"name": "../../etc/cron.d/x"}, None, None),
        ({"name": "..\\..\\x.mp4"}, None, None),
    ],
)
def test_point_10_a_download_is_what_was_announced_in_its_folder_and_asked_without_key(
    server, client, tmp_path, changes, content, words
):
    folder = tmp_path / "a" / "b" / "c"
    server.states = STATES[-1:]
    server.files["0.mp4"] = content or server.files["0.mp4"]
    handle = client.run(MODEL, PARAMETERS)
    server.tasks["2221"]["outputs"][0] |= changes
    (output,) = client.detail(handle).outputs

    def fetch():
        return download(output, folder, taskid="2221", local_host=host_of(server),
                        sleep=client.sleep)  # fmt: skip

    if words is None:
        path = fetch()
        assert (path.parent, list(folder.iterdir())) == (folder, [path])
    else:
        with pytest.raises(DownloadError, match=words):
            fetch()
        assert list(folder.iterdir()) == []
    assert [path for path in tmp_path.rglob("*") if path.is_file() and folder != path.parent] == []
    assert server.fetched
    for headers in server.fetched:
        assert not {"x-api-key", "x-nonce", "x-signature", "authorization", "cookie"} & set(headers)
        assert "test-key" not in str(headers)


# --- 11 -----------------------------------------------------------------------------------------

PLANTED_KEY, PLANTED_SECRET = "planted-key-1234567890", "planted-secret-0987654321"
ECHO = {"errors": [{"code": 0, "message": f"x-api-key: {PLANTED_KEY}, tasktoken=token-of-task-2221-"
        "abcdefgh, accesskey: access-secret"}]}  # fmt: skip
SCENARIOS = {
    "success": {},
    "401": {"Run": [NO_KEY]},
    "401 that echoes": {"Run": [{"status": 401, "body": ECHO}]},
    "401 on the way": {"Task/Detail": [{"status": 401, "body": ECHO}]},
    "failures on the way": {"Task/Detail": ["html", "reset", {"status": 500, "body": ECHO}]},
    "lost run": {"Run": ["lost"]},
    "run that is not found": {"Run": ["reset"], "Task/List": [{"status": 500, "body": ECHO}] * 50},
    "run of an unclear answer": {
        "Run": [{"status": 200, "body": ECHO}],
        "Task/List": [None, "html"],
    },
    "refused download": {"GET 0.mp4": [403] * 9},
    "redirected download": {"GET 0.mp4": [("redirect", "http://169.254.169.254/x")]},
    "refused socket": {"socket": ["refuse"] * 9},
    "dropped socket": {"socket": ["drop"] * 9},
    "failed task": {"final": {"pexit": "1", "outputs": [], "debugerror": "CUDA error"}},
    "task without files": {"final": {"outputs": []}},
    "task that never ends": {"states": STATES[:6]},
    "damaged journal": {"journal": b"no database at all" * 100},
}
GO_WELL = ("success", "failures on the way", "lost run", "run of an unclear answer",
           "refused socket", "dropped socket")  # fmt: skip


def spoil(server, path: Path, **faults: Any) -> None:
    server._faults.clear()
    for name, value in faults.items():
        if name == "journal":
            path.parent.mkdir()
            path.write_bytes(value)
        elif name in ("states", "final"):
            setattr(server, name, value)
        else:
            server.fail(name, *value)


def all_texts_of(error: BaseException | None) -> str:
    """An error and whatever it hides, in every form it can be shown."""
    if error is None:
        return ""
    shown = traceback.format_exception(error)
    hidden = all_texts_of(error.__cause__) + all_texts_of(error.__context__)
    return f"{error} {error!r} {error.args} {''.join(shown)} {hidden}"


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_point_11_no_secret_is_in_any_text(scenario, tmp_path, monkeypatch, caplog, capsys):
    caplog.set_level(logging.DEBUG)
    texts: list[str] = []
    clock = Clock()
    with WiroServer(
        key=PLANTED_KEY, secret=PLANTED_SECRET, with_socket=True, now=clock.now
    ) as server:
        server.files["0.mp4"] = make_clip()
        credentials = Credentials(PLANTED_KEY, PLANTED_SECRET)
        client = Client(
            credentials,
            base_url=server.url,
            socket_url=server.socket_url,
            sleep=clock.sleep,
            clock=clock,
            now=clock.now,
        )
        path = tmp_path / "library" / "journal.sqlite"
        spoil(server, path, **SCENARIOS[scenario])
        journal = Journal(path, now=clock.now)
        try:
            entry = start(client, journal, Job(MODEL, PARAMETERS))
            task, _ = finish(
                client,
                to_handle(entry),
                tmp_path / "out",
                journal=journal,
                entry_id=entry.id,
                timeout_s=600,
                listener=listening(
                    verify=cli.verify, on_task=lambda task: texts.append(repr(task))
                ),
            )
            texts.append(repr([entry, task, *task.outputs]))
            assert scenario in GO_WELL
        except WiroError as error:
            texts.append(all_texts_of(error))
            assert scenario not in GO_WELL

        monkeypatch.setattr(cli, "make_client", lambda: client)
        monkeypatch.setenv("WIRO_API_BASE_URL", server.url)
        monkeypatch.setenv("WIRO_SOCKET_URL", server.socket_url)
        program = tmp_path / "program" / "journal.sqlite"
        spoil(server, program, **SCENARIOS[scenario])
        parameters = [f"--param={name}={value}" for name, value in PARAMETERS.items()]
        picture = "--param=inputImageUrl=https://x.example/a.png"
        code = cli.main(
            ["run", "wiro/SkyReels-V1", *parameters, "--param=prompt=another", picture, "--json",
             "--timeout=600", f"--out={tmp_path / 'program'}", f"--journal={program}"]
        )  # fmt: skip
        shown = capsys.readouterr()
        assert json.loads(shown.out)
        assert (code == 0) == ("error" not in json.loads(shown.out)) == (scenario in GO_WELL)
        for task in server.tasks.values():
            handle = RunHandle(task["id"], task["socketaccesstoken"])
            texts.append(repr([handle, client.detail(handle)]))
        texts += [repr(credentials), repr(client), repr(journal), repr(journal.newest())]
        texts += [shown.out, shown.err, caplog.text, *map(repr, caplog.records)]
        texts += [p.read_bytes().decode("latin1") for p in tmp_path.rglob("journal*")]
    assert "urllib3.connectionpool" in caplog.text or scenario == "damaged journal"
    signatures = [seen.headers["x-signature"] for seen in server.seen]
    nonces = [seen.headers["x-nonce"] for seen in server.seen]
    tokens = [task["socketaccesstoken"] for task in server.tasks.values()]
    joined = "\n".join(texts)
    for planted in (PLANTED_KEY, PLANTED_SECRET, "access-secret", "token-of-task", "abcdefgh",
                    *tokens, *signatures, *nonces):  # fmt: skip
        assert planted not in joined


@pytest.mark.parametrize("status", [200, 401, 500])
@pytest.mark.parametrize("path", ["Run", "Task/Detail"])
def test_point_11_a_service_that_repeats_a_secret_in_a_sentence_is_not_quoted(
    tmp_path, caplog, status, path
):
    caplog.set_level(logging.DEBUG)
    clock = Clock()
    with WiroServer(key=PLANTED_KEY, secret=PLANTED_SECRET) as server:
        client = make_client(server, clock, PLANTED_KEY, PLANTED_SECRET)
        handle = client.run(MODEL, PARAMETERS)
        sentence = f"Key {PLANTED_KEY} may not see permission {handle.token}."
        body = {"result": False, "errors": [{"code": 0, "message": sentence}]}
        server.fail(path, *[{"status": status, "body": body}] * 9)
        server.fail("Task/List", *[{"status": 401, "body": body}] * 9)
        with pytest.raises(WiroError) as caught:
            client.run(MODEL, PARAMETERS) if path == "Run" else client.detail(handle)
    joined = all_texts_of(caught.value) + caplog.text
    assert PLANTED_KEY not in joined
    assert path == "Run" or handle.token not in joined


def test_point_11_a_log_that_shows_a_token_is_not_quoted(server, client):
    token = "token-of-task-2221-abcdefgh"
    server.final = {"pexit": "1", "outputs": [], "debugerror": f'{{"tasktoken": "{token}"}}'}
    *_, task = client.watch(client.run(MODEL, PARAMETERS))
    with pytest.raises(TaskFailedError) as caught:
        raise_for_failure(task)
    assert token not in all_texts_of(caught.value)
