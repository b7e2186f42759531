"""A service that sends nonsense: every field of every record, and every body.

Each ends in a verdict or in one sentence, in bounded time and memory, and nothing of it that could
steer a terminal, or that cannot be written down, gets further than the edge.
"""

import contextlib
import gzip
import io
import itertools
import json
import logging
import re
import struct
import subprocess
import sys
import zlib
from functools import partial
from pathlib import Path

import pytest
import requests
import urllib3
from comfyui_skyreels.wiro_api import cli, transport
from comfyui_skyreels.wiro_api import client as client_module
from comfyui_skyreels.wiro_api.client import Client, RunHandle, raise_for_failure
from comfyui_skyreels.wiro_api.errors import TransportError, WiroError
from comfyui_skyreels.wiro_api.jobs import Job, start
from comfyui_skyreels.wiro_api.journal import Journal
from comfyui_skyreels.wiro_api.schema import complete, items_of
from comfyui_skyreels.wiro_api.signing import Credentials
from comfyui_skyreels.wiro_api.spending import price_of
from comfyui_skyreels.wiro_api.task import (
    Verdict,
    failure_text,
    log_tail,
    parse_progress,
    parse_task,
    verdict,
)
from comfyui_skyreels.wiro_api.websocket import ProgressSocket
from comfyui_skyreels.wiro_api.wire import clean_text, read_json, same_value
from support.raw_server import RawServer, answer
from support.wiro_client import MODEL, PARAMETERS, Clock
from support.wiro_server import KEY, SECRET, STATES, WiroServer

ROOT = Path(__file__).resolve().parents[2]
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")
WAIT_S = 12.0
#: as they stand in the JSON that comes
NONSENSE = {
    "null": "null", "true": "true", "false": "false", "list": "[]", "object": "{}",
    "zero": "0", "negative": "-1", "minus zero": "-0.0", "fraction": "1.5", "tiny": "1e-400",
    "infinite": "1e999", "minus infinite": "-1e999", "NaN": "NaN", "Infinity": "Infinity",
    "31 digits": "1" + 30 * "0", "5000 digits": "9" * 5000, "0.000...": "0." + "1" * 5000,
    "exponent": "1e30", "blank": '" "', "empty": '""', "NaN text": '"NaN"', "text 1e999": '"1e999"',
    "negative text": '"-5"', "hex": '"0x10"', "wide digits": '"\uff19\uff19"', "yes": '"true"',
    "digits text": '"' + "9" * 5000 + '"', "long": '"' + "x" * 300_000 + '"',
    "surrogate": r'"\ud800"', "turned surrogates": r'"\udfff\ud800"',
    "escape": r'"\u001b[2J\u001b]0;owned\u0007"', "NUL": r'"a\u0000b"', "C1": r'"\u009b31m"',
    "DEL and CR": r'"a\u007f\rb"', "direction": r'"\u202e4pm.exe"',
    "lines": r'"a\r\nerror: task 1 was paid\n"', "path": '"../../../etc/passwd"',
    "script": '"javascript:alert(1)"', "file": '"file:///etc/passwd"', "two slashes": '"a/b/c"',
    "broken JSON": '"{broken"', "JSON in text": r'"{\"a\": \"\\u001b[2J\\ud800\", \"b\": 1e999}"',
    "deep": "[" * 60 + "]" * 60, "deep text": '"' + "[" * 50_000 + '"',
    "deep objects": '{"a":' * 60 + "1" + "}" * 60, "many": "[" + "null," * 2_000 + "null]",
    "bad keys": r'{"\ud800": "\u001b", "\u0000": 1}', "list of texts": '["x"]',
    "list of lists": "[[]]", "list of objects": "[{}]",
}  # fmt: skip
assert len(NONSENSE) >= 40
SPOILED = "@spoiled@"


class Wire(requests.adapters.BaseAdapter):
    """The stand-in of Wiro without a network, whose answers to some calls are spoiled.

    spoil: gets the path and the answer, changes the answer; `SPOILED` in it becomes `nonsense`.
    """

    def __init__(self, server: WiroServer, spoil=lambda path, answer: None) -> None:
        super().__init__()
        self.server, self.spoil, self.nonsense = server, spoil, "null"
        self.replace: dict[str, str] = {}

    def send(self, request, **_: object) -> requests.Response:
        path = request.path_url.removeprefix("/v1/")
        given = b""
        while piece := request.body.read(65536):
            given += piece
        status, found = self.server._answer(path, json.loads(given), [])
        found = json.loads(json.dumps(found))  # it shares constants with the next
        self.spoil(path, found)
        text = json.dumps(found)
        for old, new in {f'"{SPOILED}"': self.nonsense, **self.replace}.items():
            text = text.replace(old, new)
        response = requests.Response()
        response.status_code, response.url, response.request = status, request.url, request
        response.raw = urllib3.HTTPResponse(io.BytesIO(text.encode()), preload_content=False)
        return response

    def close(self) -> None:
        pass


def make(spoil, **options):
    """A client of a spoiled Wiro and its wire."""
    clock, server = Clock(), WiroServer(schema=True, **options)
    session = requests.Session()
    session.trust_env = False  # it knows no network
    wire = Wire(server, spoil)
    session.mount("http://", wire)
    client = Client(
        Credentials(KEY, SECRET), base_url="http://127.0.0.1:1/v1", session=session,
        sleep=clock.sleep, clock=clock, now=clock.now,
    )  # fmt: skip
    return client, wire, clock


def assert_harmless(text: str, longest: int = 4000) -> None:
    found = CONTROL.search(text)
    assert not found, f"{found[0]!r} in {text[:200]!r}"
    text.encode()
    assert len(text) < longest


def outcome(call):
    """What a call returned, or the one sentence it raised, which is harmless and bounded."""
    try:
        return call()
    except WiroError as error:
        assert_harmless(str(error), 1500)
        assert_harmless(error.taskid, 100)
        assert str(error).strip()
        assert "\n" not in str(error)
        return error


def put(target: dict, field: str) -> None:
    """Spoil `field` of an object; "outputs.0.url" is deeper."""
    *way, last = field.split(".")
    for step in way:
        target = target[int(step)] if isinstance(target, list) else target[step]
    if isinstance(target, list):
        target[int(last)] = SPOILED
    else:
        target[last] = SPOILED


# --- every field --------------------------------------------------------------------------------

RECORD = WiroServer(states=("task_postprocess_end",))
RECORD.add_task(dict(PARAMETERS))
TASK = RECORD.tasks["2221"]
ENVELOPE = ["result", "errors", "total", "data", "tasklist", "tasklist.0"]
TASK_FIELDS = [f"tasklist.0.{name}" for name in (*TASK, "output", "taskid", "modeldescription")]
OUTPUT_FIELDS = [f"tasklist.0.outputs.0{name}" for name in
                 ("", *(f".{name}" for name in (*TASK["outputs"][0], "content")))]  # fmt: skip
PARAMETER_FIELDS = [f"tasklist.0.parameters.{name}" for name in PARAMETERS]


#: what a wait looks at
STEERING = [
    *ENVELOPE,
    *(
        f"tasklist.0.{name}"
        for name in (
            "id",
            "status",
            "pexit",
            "outputs",
            "socketaccesstoken",
            "debugerror",
            "postprocessendtime",
        )
    ),
]


@pytest.mark.usefixtures("calls_at_once")
@pytest.mark.parametrize("field", STEERING)
def test_detail_in_a_wait(field, caplog):
    def spoil(path, found) -> None:
        if found.get("tasklist"):
            put(found, field)

    states = ("task_queue", "task_postprocess_end")
    for nonsense in NONSENSE.values():
        client, wire, clock = make(spoil, states=states)
        taskid = wire.server.add_task(dict(PARAMETERS))
        if field.endswith("error"):
            wire.server.final = {"pexit": "1", "outputs": []}
        wire.nonsense = nonsense
        seen = []
        handle = RunHandle(taskid, "token")
        outcome(lambda: seen.extend(client.watch(handle, timeout_s=WAIT_S)))  # noqa: B023
        assert clock.time_s <= WAIT_S + 5.0
        for task in seen:
            assert task.taskid in ("", taskid)
            outcome(partial(raise_for_failure, task))
            assert_task(task)
    assert not CONTROL.search(caplog.text)


def assert_task(task) -> None:
    """Whatever was in its record, what is shown of it is harmless and bounded."""
    assert verdict(task) in Verdict
    shown = (task.taskid, task.status, task.phase, task.exit_code, task.model, failure_text(task),
             log_tail(task))  # fmt: skip
    for text in shown:
        assert_harmless(text)
        assert "\n" not in text
    assert len(task.output_log) + len(task.error_log) <= 2**19
    for amount in (task.totalcost, task.elapsed_s):
        assert amount is None or 0 <= amount < 10**32
    for output in task.outputs:
        assert_harmless(output.name + output.contenttype + output.url, 9000)
        assert output.num_bytes is None or output.num_bytes > 0
    text = json.dumps(cli.describe(task), ensure_ascii=False, allow_nan=False)
    assert not CONTROL.search(text)
    text.encode()


@pytest.mark.parametrize("status", ["task_queue", "task_postprocess_end", "task_cancel"])
@pytest.mark.parametrize("field", [*TASK_FIELDS, *OUTPUT_FIELDS, *PARAMETER_FIELDS])
def test_detail(field, status):
    found = json.loads(json.dumps({"tasklist": [{**TASK, "status": status}]}))
    put(found, field)
    for nonsense in NONSENSE.values():
        text = json.dumps(found).replace(f'"{SPOILED}"', nonsense)
        (record,) = read_json(text.encode())["tasklist"]
        assert_task(parse_task(record if isinstance(record, dict) else {}))


@pytest.mark.usefixtures("calls_at_once")
@pytest.mark.parametrize("field", ENVELOPE)
def test_list(field, monkeypatch, capsys):
    def spoil(path, found) -> None:
        put(found, field)

    client, wire, _ = make(spoil)
    wire.server.add_task(dict(PARAMETERS))
    monkeypatch.setattr(cli, "make_client", lambda: client)
    for nonsense in NONSENSE.values():
        wire.nonsense = nonsense
        assert_command(["list"], capsys)


@pytest.mark.usefixtures("calls_at_once")
def test_list_of_records_of_nonsense(monkeypatch, capsys):
    """One list with every field of a record replaced by every nonsense."""

    def spoil(path, found) -> None:
        record = found["tasklist"][0]
        found["tasklist"] = [
            {**record, "id": str(number), name: f"{SPOILED}{kind}"}
            for number, (kind, name) in enumerate(itertools.product(light, record))
        ]

    light = [name for name, text in NONSENSE.items() if len(text) < 1000]
    client, wire, _ = make(spoil)
    wire.server.add_task(dict(PARAMETERS))
    wire.server._finish(wire.server.tasks["2221"], 0)
    wire.replace = {f'"{SPOILED}{kind}"': NONSENSE[kind] for kind in light}
    monkeypatch.setattr(cli, "make_client", lambda: client)
    assert len(client.list_tasks()) == len(light) * len(TASK)
    assert assert_command(["list"], capsys) == 0


def assert_command(arguments: list[str], capsys) -> int:
    """The command line ends, and shows nothing that harms."""
    code = cli.main([*arguments, "--json"])
    assert code in (0, 1)
    shown = capsys.readouterr()
    assert shown.out.count("\n") == 1
    assert not CONTROL.search(json.dumps(json.loads(shown.out), ensure_ascii=False))
    assert not CONTROL.search(shown.err)
    shown.err.encode()
    assert max(map(len, shown.err.splitlines() or [""])) < 9000
    return code


@pytest.mark.usefixtures("calls_at_once")
@pytest.mark.parametrize("field", ["result", "errors", "taskid", "socketaccesstoken", "data"])
def test_run(field):
    def spoil(path, found) -> None:
        if path.startswith("Run/"):
            put(found, field)

    for nonsense in NONSENSE.values():
        client, wire, _ = make(spoil)
        wire.nonsense = nonsense
        found = outcome(lambda: client.run(MODEL, PARAMETERS))  # noqa: B023
        if isinstance(found, RunHandle):
            assert found.taskid or found.token
            assert_harmless(found.taskid + found.token, 600)
        assert len(wire.server.tasks) == 1, "never sent twice"


MODEL_RECORD = WiroServer(schema=True, price=[{"inputs": [], "price": "1", "priceMethod": "cpr"}],
                          approximatelycost="0.30")._answer_model(
    {"slugowner": "wiro", "slugproject": "SkyReels-V1"})[1]["tool"][0]  # fmt: skip
ITEM_FIELDS = ("id", "type", "label", "required", "default", "min", "max", "options", "note")
TOOL_FIELDS = [
    "result", "errors", "tool", "tool.0", *(f"tool.0.{name}" for name in MODEL_RECORD),
    "tool.0.parameters.0", "tool.0.parameters.0.items", "tool.0.parameters.0.title",
    *(f"tool.0.parameters.1.items.{i}.{name}" for i in (0, 1, 2) for name in ITEM_FIELDS),
    "tool.0.parameters.1.items.0", "tool.0.parameters.1.items.2.options.0",
    "tool.0.parameters.1.items.2.options.0.value",
]  # fmt: skip
PRICES = ["cpr", "cpo", "cp-promptlength", "cp-outputVideoLength", "cp-pixel", "cps"]


@pytest.mark.parametrize("field", TOOL_FIELDS)
def test_model(field, monkeypatch, capsys):
    found = json.loads(json.dumps({"result": True, "errors": [], "tool": [MODEL_RECORD]}))
    put(found, field)
    for nonsense in NONSENSE.values():
        text = json.dumps(found).replace(f'"{SPOILED}"', nonsense)
        tools = read_json(text.encode())["tool"]
        record = tools[0] if isinstance(tools, list) and tools else {}
        if isinstance(record, dict):
            items = items_of(record, MODEL)
            whole = outcome(lambda: complete(items, PARAMETERS, []))  # noqa: B023
            assert isinstance(whole, dict | WiroError)
            assert_harmless(str(price_of(record, PARAMETERS)))


@pytest.mark.usefixtures("calls_at_once")
@pytest.mark.parametrize("field", ["result", "tool", "tool.0", "tool.0.parameters", *(
    f"tool.0.parameters.1.items.0.{name}" for name in ("id", "type", "label"))])  # fmt: skip
def test_model_on_the_command_line(field, monkeypatch, capsys):
    client, wire, _ = make(lambda path, found: put(found, field))
    monkeypatch.setattr(cli, "make_client", lambda: client)
    for wire.nonsense in NONSENSE.values():
        assert_command(["model", "wiro/SkyReels-V1"], capsys)


@pytest.mark.parametrize("method", PRICES)
@pytest.mark.parametrize("name", ["inputs", "price", "priceMethod", "priceExtra", "priceInput"])
def test_price(method, name):
    for nonsense in NONSENSE.values():
        row = {"inputs": {}, "price": "0.30", "priceMethod": method, name: SPOILED}
        for record in ({"dynamicprice": [row]}, {"dynamicprice": json.dumps([row])},
                       {"dynamicprice": [row], "cps": "1", "approximatelycost": "1"}):  # fmt: skip
            text = json.dumps(record).replace(f'"{SPOILED}"', nonsense)
            found = read_json(text.encode()) if text.count('\\"') == 0 else record
            price = price_of(found, {**PARAMETERS, "duration": 5})
            assert price is None or price.amount >= 0
            assert_harmless(str(price))


FIELDS_OF_ALL = ("result", "errors")
FIELDS_OF_FILES = ("list", "list.0", "list.0.id", "list.0.url", "list.0.name")


@pytest.mark.usefixtures("calls_at_once")
@pytest.mark.parametrize(
    ("call", "field"),
    [
        *itertools.product(("upload", "folder", "cancel", "delete"), FIELDS_OF_ALL),
        *itertools.product(("upload", "folder"), FIELDS_OF_FILES),
    ],
)
def test_the_other_calls(field, call, tmp_path, monkeypatch, capsys):
    def spoil(path, found) -> None:
        if field in FIELDS_OF_ALL or "list" in found:
            put(found, field)

    file = tmp_path / "a.png"
    file.write_bytes(b"\x89PNG")
    for nonsense in NONSENSE.values():
        client, wire, clock = make(spoil)
        wire.nonsense = nonsense
        taskid = wire.server.add_task(dict(PARAMETERS))
        monkeypatch.setattr(wire, "send", partial(send_parts, wire))
        handle = RunHandle(taskid, wire.server.tasks[taskid]["socketaccesstoken"])
        monkeypatch.setattr(cli, "make_client", lambda: client)  # noqa: B023
        if call == "upload":
            assert_command(["upload", str(file), "--folder", "f"], capsys)
        elif call == "folder":
            found = outcome(partial(client.create_folder, "f"))
            assert isinstance(found, WiroError) or str(found["id"])
        elif call == "cancel":
            outcome(partial(client.stop, handle))
        else:
            outcome(partial(client.delete_files, handle))
        assert clock.time_s < 400


def send_parts(wire: Wire, request, **options: object) -> requests.Response:
    """Uploads are no JSON; what is in them does not matter here."""
    if not request.headers["Content-Type"].startswith("application/json"):
        while request.body.read(65536):
            pass
        request.body = io.BytesIO(b"{}")
    return Wire.send(wire, request, **options)


CALLS = {
    "Run": lambda client: client.run(MODEL, PARAMETERS),
    "Task/Detail": lambda client: client.detail(RunHandle("1", "")),
    "Task/Cancel": lambda client: client.cancel(RunHandle("1", "")),
    "Tool/Detail": lambda client: client.model_detail(MODEL),
}


@pytest.mark.usefixtures("calls_at_once")
@pytest.mark.parametrize("path", CALLS)
@pytest.mark.parametrize("field", ["errors.0", "errors.0.code", "errors.0.message", "errors"])
def test_refusal(path, field):
    def spoil(asked, found) -> None:
        if asked.startswith(path):
            found.clear()
            found |= {"result": False, "errors": [{"code": 0, "message": "permission"}]}
            put(found, field)

    client, wire, _ = make(spoil)
    for wire.nonsense in NONSENSE.values():
        found = outcome(partial(CALLS[path], client))
        # a Run that is refused without a clear reason is looked for, and is there
        assert isinstance(found, WiroError | RunHandle)


@pytest.mark.usefixtures("calls_at_once")
@pytest.mark.parametrize("name", ["surrogate", "escape", "NUL", "C1", "lines", "long"])
def test_a_refusal_of_any_text_leaves_the_row_refused(tmp_path, name):
    def spoil(path, found) -> None:
        if path.startswith("Run/"):
            found.clear()
            found |= {"result": False, "errors": [{"code": 97, "message": SPOILED}]}

    client, wire, clock = make(spoil)
    wire.nonsense = NONSENSE[name]
    journal = Journal(tmp_path / "journal.sqlite", now=clock.now)
    outcome(lambda: start(client, journal, Job(MODEL, PARAMETERS)))
    (row,) = journal.newest()
    assert row.state == "refused"
    assert_harmless(row.error, 1000)


FRAME = {"type": "task_output", "id": "2221", "result": True, "message": {
    "type": "progressGenerate", "percentage": "60", "stepCurrent": "6", "stepTotal": "10",
    "speed": "1.2", "speedType": "it/s", "elapsedTime": "5s", "remainingTime": "3s"}}  # fmt: skip


@pytest.mark.parametrize(
    "kind", ["task_output", "task_error", "task_postprocess_end", "task_start"]
)
@pytest.mark.parametrize("field", ["type", "id", "result", "message", "tasktoken", "success",
                                   *(f"message.{name}" for name in FRAME["message"])])  # fmt: skip
def test_frame(kind, field, caplog):
    caplog.set_level(logging.DEBUG)
    shown: list[str] = []
    feed = ProgressSocket(
        "token", url="ws://127.0.0.1:1", taskid="2221", on_log=shown.append,
        on_progress=lambda report: shown.append(str(report)),
    )  # fmt: skip
    for inside in (False, True):
        frame = json.loads(json.dumps({**FRAME, "type": kind}))
        put(frame, field)
        for nonsense in NONSENSE.values():
            if inside and field.startswith("message."):
                message = json.dumps(frame["message"]).replace(f'"{SPOILED}"', nonsense)
                text = json.dumps({**frame, "message": message})
            else:
                text = json.dumps(frame).replace(f'"{SPOILED}"', nonsense)
            feed._take(text.encode())
            feed._take(text.encode("utf-16"))
            feed._take(text.encode()[:-7] + b"\xff\x1b")
    for text in shown:
        assert not CONTROL.search(text)
        assert len(text) <= 16 * 1024
    assert not CONTROL.search(caplog.text)


# --- cleaning -----------------------------------------------------------------------------------


def test_what_is_clean_stays_as_it_is():
    for text in ("", "plain", "zwei Zeilen\n\tmit Tab", "日本語", "👩‍👩‍👧", "עברית", "a\u00a0b"):
        assert clean_text(text) == text
    assert read_json('{"a": ["\\ud83d\\ude00", 1, 2.5, true, null]}') == {
        "a": ["😀", 1, 2.5, True, None]
    }


def test_bytes_that_are_no_utf_8_are_replaced_wherever_they_stand():
    found = read_json(b'{"debugoutput": "caf\xe9 \xff\xfe", "k\xff": [{"x": "\xc3"}]}')
    assert found == {"debugoutput": "caf\ufffd \ufffd\ufffd", "k\ufffd": [{"x": "\ufffd"}]}
    assert read_json(b'{"debugoutput": "10 %\r20 %\x1b[K\n"}') == {
        "debugoutput": "10 %\n20 %\ufffd[K\n"
    }


def test_of_a_log_the_end_is_kept():
    text = json.dumps({"tasklist": [{"debugerror": "x" * 3_000_000 + "the reason"}]})
    record = read_json(text.encode())["tasklist"][0]
    assert len(record["debugerror"]) <= 2**18
    assert log_tail(parse_task(record)).endswith("the reason")


@pytest.mark.parametrize("text", ["[" * 300_000, '{"a":' * 300_000, "[{}," * 150_000, "9" * 10**6])
def test_a_text_that_would_fill_the_memory_or_the_stack_is_none(text):
    with contextlib.suppress(ValueError):
        assert read_json(text.encode()) is None


def test_a_log_in_bytes_that_are_no_utf_8_does_not_hide_the_end(server, client):
    server.states = STATES[-1:]
    handle = client.run(MODEL, PARAMETERS)
    body = json.dumps({"result": True, "tasklist": [server.tasks[handle.taskid]]})
    content = body.replace('"debugoutput": ""', '"debugoutput": "@"').encode()
    content = content.replace(b"@", b"Fortschritt: \xfc\xff 10\x80%")
    with RawServer(lambda connection, _: connection.sendall(answer(content))) as raw:
        task = Client(Credentials(KEY, SECRET), base_url=raw.url).detail(handle)
    assert task.status == "task_postprocess_end"
    assert task.output_log == "Fortschritt: \ufffd\ufffd 10\ufffd%"


def test_what_was_sent_equals_what_comes_back_cleaned():
    prompt = "two\r\nlines \u202eturned\u202c"
    assert same_value(clean_text(prompt), prompt)


def test_progress_beyond_all_bounds_is_none():
    assert parse_progress({"stepCurrent": "9" * 5000, "stepTotal": "-5"}) is None
    assert parse_progress("x" * 10_000_000) is None


# --- every body ---------------------------------------------------------------------------------

GOOD = json.dumps({"result": True, "tasklist": [{"id": "2221", "status": "task_start"}]}).encode()
MEGABYTE = 1_000_000


def once(content: bytes):
    return lambda connection, request: connection.sendall(content)


def endless(head: bytes, piece: bytes):
    def script(connection, request) -> None:
        connection.sendall(head)
        while True:
            connection.sendall(piece)

    return script


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
BOMB = gzip.compress(bytes(50 * MEGABYTE), 1)
RAW_DEFLATE = zlib.compressobj(wbits=-15)
RAW_DEFLATE = RAW_DEFLATE.compress(GOOD) + RAW_DEFLATE.flush()
BODIES = {
    "endless": endless(OK + b"\r\n", b"x" * 65536),
    "endless of a known size": endless(OK + b"Content-Length: 99999999999\r\n\r\n", b" " * 65536),
    "endless chunks": endless(CHUNKED, b"10000\r\n" + b" " * 65536 + b"\r\n"),
    "endless size of a chunk": endless(CHUNKED, b"0" * 65536),
    "endless header": endless(OK + b"X: ", b"x" * 65536),
    "endless headers": endless(OK, b"X: x\r\n" * 9999),
    "endless status": endless(b"HTTP/1.1 200 ", b"x" * 65536),
    "bomb": once(answer(BOMB, "Content-Encoding: gzip")),
    "bomb with a redirect": once(
        answer(BOMB, "Content-Encoding: gzip", "Location: /v1/x", status="302 Found")
    ),
    "endless redirect": endless(
        b"HTTP/1.1 302 Found\r\nLocation: /v1/x\r\n\r\n", b"x" * 65536
    ),
    "cut": once(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\nConnection: close\r\n\r\n" + GOOD),
    "cut pack": once(answer(gzip.compress(GOOD)[:-9], "Content-Encoding: gzip")),
    "no pack": once(answer(GOOD, "Content-Encoding: gzip")),
    "pack not asked for": once(answer(GOOD, "Content-Encoding: br")),
    "a list": once(answer(b"[" + GOOD + b"]")),
    "a number": once(answer(b"9" * 100_000)),
    "UTF-16": once(answer(GOOD.decode().encode("utf-16"))),
    "Latin-1": once(answer(b'{"result": false, "errors": ["caf\xe9"]}')),
    "empty": once(answer(b"")),
    "nothing": once(b""),
    "HTML": once(answer(b"<html>\x1b[2Jgateway\xff</html>", "Content-Type: text/html")),
    "chunks that are none": once(CHUNKED + b"zz\r\nhello\r\n-5\r\n"),
    "two objects": once(answer(GOOD + GOOD)),
    "deep": once(answer(b'{"result": true, "tasklist": ' + b"[" * 200_000)),
    "many": once(answer(b'{"result": true, "tasklist": [' + b"{}," * MEGABYTE + b"{}]}")),
    "no HTTP": once(b"SSH-2.0-OpenSSH\r\n"),
    "no header": once(OK + b"no header \x1b[2J here\r\nX: y\r\n\r\n[]"),
    "headers in one": once(OK + b"X\x1b[2J: y\r\n y\x9b\r\n\r\n[]"),
    "two sizes": once(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 7\r\n\r\n{}"),
    "size that is none": once(b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n{}"),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_body(name, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)

    def script(connection, request) -> None:
        BODIES[name](connection, request)
        raise ConnectionError  # the end

    monkeypatch.setattr(transport, "MAX_ANSWER_BYTES", MEGABYTE)
    monkeypatch.setattr(client_module, "LAST_POLL_S", 0.5)
    with RawServer(script) as server:
        client = Client(Credentials(KEY, SECRET), base_url=server.url)
        found = outcome(lambda: list(client.watch(RunHandle("2221", ""), timeout_s=0.1)))
    assert isinstance(found, WiroError)
    assert not CONTROL.search(caplog.text)


@pytest.mark.parametrize(
    ("content", "encoding"),
    [(GOOD, "identity"), (gzip.compress(GOOD), "gzip"), (gzip.compress(GOOD), "X-GZIP"),
     (zlib.compress(GOOD), "deflate"), (RAW_DEFLATE, "deflate"), (b"\xef\xbb\xbf" + GOOD, "")],
    ids=["identity", "gzip", "X-GZIP", "zlib", "raw deflate", "byte order mark"],  # gzip tells time
)  # fmt: skip
def test_a_body_that_is_packed_as_asked_is_read(content, encoding):
    packed = answer(content, f"Content-Encoding: {encoding}")
    with RawServer(once(packed)) as server:
        client = Client(Credentials(KEY, SECRET), base_url=server.url)
        assert client.detail(RunHandle("2221", "")).status == "task_start"


@pytest.mark.parametrize("length", [1000, 100_000])
def test_an_answer_up_to_the_limit_is_read_and_one_byte_more_is_not(monkeypatch, length):
    content = GOOD + b" " * length
    for limit, is_read in ((len(content), True), (len(content) - 1, False)):
        monkeypatch.setattr(transport, "MAX_ANSWER_BYTES", limit)
        for sent in (answer(content), answer(gzip.compress(content), "Content-Encoding: gzip")):
            response = requests.Response()
            head, _, body = sent.partition(b"\r\n\r\n")
            response.status_code = 200
            response.headers = {"Content-Encoding": "gzip"} if b"gzip" in head else {}
            response.raw = urllib3.HTTPResponse(io.BytesIO(body), preload_content=False)
            if is_read:
                assert transport.read_answer(response)["tasklist"]
            else:
                with pytest.raises(TransportError, match=f"is over {limit} bytes"):
                    transport.read_answer(response)


def gzip_of_zeros(megabytes: int) -> bytes:
    """Each megabyte is packed by itself, and so alike: it is packed once."""
    packer, zeros = zlib.compressobj(1, wbits=-15), bytes(MEGABYTE)
    block = packer.compress(zeros) + packer.flush(zlib.Z_FULL_FLUSH)
    sum_of_all = 0
    for _ in range(megabytes):
        sum_of_all = zlib.crc32(zeros, sum_of_all)
    end = packer.flush() + struct.pack("<II", sum_of_all, megabytes * MEGABYTE)
    return b"\x1f\x8b\x08" + bytes(6) + b"\xff" + block * megabytes + end


PEAK = """
import resource, sys
from wiro_api.client import Client, RunHandle
from wiro_api.errors import WiroError
from wiro_api.signing import Credentials
client = Client(Credentials("test-key", "test-secret"), base_url=sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for _ in range(int(sys.argv[2])):
    try:
        client._post("Task/Detail", {}, ("tasklist",), whole_s=2.0)
    except WiroError:
        pass
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(grown * (1 if sys.platform == "darwin" else 1024))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no resource module")
def test_no_body_takes_more_than_300_mb():
    wide = "\U0001f600" * (transport.MAX_ANSWER_BYTES // 4 - 100)  # four bytes in memory for each
    bomb = gzip_of_zeros(400)
    heavy = {
        **{name: BODIES[name] for name in BODIES if name.startswith("endless")},
        "bomb": once(answer(bomb, "Content-Encoding: gzip")),
        "bomb with a redirect": once(
            answer(bomb, "Content-Encoding: gzip", "Location: /x", status="302 Found")
        ),
        "wide": once(answer(json.dumps({"a": wide}, ensure_ascii=False).encode())),
        "floats": once(answer(b'{"a": [' + b"1.5," * 4_000_000 + b"0]}")),
        "texts": once(answer(b'{"a": [' + b'"ab",' * 3_300_000 + b'""]}')),
        "objects": once(answer(b'{"a": [' + b'{"":0},' * 190_000 + b"0]}")),
    }
    bodies = list(heavy.values())

    def script(connection, request) -> None:
        bodies.pop(0)(connection, request)
        raise ConnectionError

    with RawServer(script) as server:
        run = subprocess.run(
            [sys.executable, "-c", PEAK, server.url, str(len(heavy))], cwd=ROOT, check=True,
            capture_output=True, text=True,
        )  # fmt: skip
    grown = dict(zip(heavy, map(int, run.stdout.split()), strict=True))
    assert bodies == []
    assert max(grown.values()) < 300 * MEGABYTE, grown
