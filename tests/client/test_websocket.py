"""The progress socket: lively if all goes well, and no harm if nothing does."""

import base64
import hashlib
import itertools
import json
import re
import sys
import threading
import time

import pytest
from comfyui_skyreels.wiro_api import client as wiro
from comfyui_skyreels.wiro_api import websocket as module
from comfyui_skyreels.wiro_api.errors import ConfigError
from comfyui_skyreels.wiro_api.task import Progress
from comfyui_skyreels.wiro_api.websocket import ProgressSocket
from support import wiro_socket
from support.raw_server import RawServer, splice, tls_context
from support.wiro_client import MODEL, PARAMETERS, Clock, make_client
from support.wiro_server import STATES, WiroServer
from support.wiro_socket import SocketServer

STEP = {"stepCurrent": "6", "stepTotal": "10", "speed": "1.2", "speedType": "it/s"}
SIX = Progress(0.6, 6, 10, "1.2 it/s", "")
END = {"type": "task_postprocess_end", "message": []}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "TICK_S", 0.02)


def until(condition, limit_s: float = 5.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def listen(*scripts, limit_s: float = 5.0):
    """Progress and log lines heard until the end was announced, which ends the thread."""
    reports, lines = [], []
    with (
        SocketServer(*scripts) as server,
        ProgressSocket(
            "planted-token", url=server.url, on_progress=reports.append, on_log=lines.append
        ) as feed,
    ):
        until(lambda: not feed._thread.is_alive(), limit_s)
        assert feed.take_news()
    return reports, lines, server


def test_progress_comes_from_objects_and_from_text_and_the_rest_does_no_harm():
    reports, lines, server = listen(
        [
            ("text", {"type": "connected", "version": "1.0"}),
            ("text", "{broken"), ("text", "[1, 2]"), ("text", '"x"'), ("binary", b"\0\1audio"),
            ("text", {"type": "task_start", "message": None}),
            ("text", {"type": "task_output", "message": STEP}),
            ("text", {"type": "task_output", "message": '{"percentage": "70"}'}),
            ("text", {"type": "task_output", "message": "loading weights\n"}),
            ("text", {"type": "task_error", "message": "a warning"}),
            ("text", {"type": "task_new", "message": {"a": 1}}),
            ("ping",),
            ("text", {"type": "task_end"}),
            ("text", {"type": "task_output", "message": {"percentage": "80"}}),
            ("text", END),
        ]
    )  # fmt: skip
    assert reports == [SIX, Progress(0.7, None, None, "", ""), Progress(0.8, None, None, "", "")]
    assert lines == ["loading weights", "a warning"]
    assert server.registered == [{"type": "task_info", "tasktoken": "planted-token"}]
    assert "planted" not in server.headers[0]
    assert server.pongs == 1


@pytest.mark.parametrize("fault", ["drop", "close"])
def test_a_connection_that_ends_is_made_again_and_told_once(fault, monkeypatch, caplog):
    monkeypatch.setattr(threading.Event, "wait", quick_wait(threading.Event.wait))
    reports, _, server = listen(
        [(fault,)], [(fault,)], [("text", {"type": "task_output", "message": STEP}), ("text", END)]
    )
    assert reports == [SIX]
    assert len(server.registered) == 3
    assert caplog.text.count("polling goes on") == 1
    assert "planted" not in caplog.text


def quick_wait(wait):
    return lambda self, timeout=None: wait(self, None if timeout is None else timeout / 100)


def test_a_socket_that_cannot_be_opened_is_given_up(monkeypatch, caplog):
    monkeypatch.setattr(threading.Event, "wait", quick_wait(threading.Event.wait))
    with SocketServer() as server:
        url = server.url
    with ProgressSocket("t", url=url, on_progress=print) as feed:
        until(lambda: not feed._thread.is_alive())
        assert not feed.is_healthy
    assert caplog.text.count("polling goes on") == 1


def test_a_silent_socket_is_taken_for_dead(monkeypatch):
    monkeypatch.setattr(module, "SILENT_S", 0.1)
    monkeypatch.setattr(threading.Event, "wait", quick_wait(threading.Event.wait))
    _, _, server = listen([("silent", 9)], [("text", END)])
    assert len(server.registered) == 2


def test_leaving_the_block_ends_the_thread_at_once():
    with SocketServer([("silent", 9)]) as server:
        with ProgressSocket("t", url=server.url, on_progress=print) as feed:
            until(lambda: server.registered)
        assert not feed._thread.is_alive()


@pytest.mark.parametrize("url", ["ws://socket.wiro.ai/v1", "http://127.0.0.1/", "wss://u:p@x/"])
def test_only_safe_addresses_are_listened_to(url):
    with pytest.raises(ConfigError, match="not a wss address"):
        ProgressSocket("t", url=url, on_progress=print)


# --- together with polling ----------------------------------------------------------------------


class Feed:
    """A socket whose health and news a test sets."""

    def __init__(self, healthy: bool = True) -> None:
        self.is_healthy = healthy
        self.news = 0

    def take_news(self) -> bool:
        self.news -= self.news > 0
        return self.news > 0


def test_beside_a_healthy_socket_polls_are_rare_and_still_finish_the_task():
    clock = Clock()
    with WiroServer() as server:
        client = make_client(server, clock)
        handle = client.run(MODEL, PARAMETERS)
        states = [task.status for task in client.watch(handle, socket=Feed())]
    assert states[-1] == "task_postprocess_end", "a silent socket must not hold the end back"
    assert clock.time_s == pytest.approx(wiro.WATCHDOG_S * (len(STATES) - 1))


def test_the_announced_end_brings_the_next_poll_forward():
    clock, feed = Clock(), Feed()
    with WiroServer() as server:
        client = make_client(server, clock)
        handle = client.run(MODEL, PARAMETERS)
        watching = client.watch(handle, socket=feed)
        next(watching)
        feed.news = 2
        next(watching)
    assert clock.time_s < 1.0


def test_a_frame_of_the_end_does_not_decide_what_the_record_does():
    clock, feed = Clock(), Feed()
    feed.news = 1000
    with WiroServer() as server:
        client = make_client(server, clock)
        handle = client.run(MODEL, PARAMETERS)
        assert [task.status for task in client.watch(handle, socket=feed)] == list(STATES)


def test_beside_a_dead_socket_polls_are_as_without_one():
    clock = Clock()
    with WiroServer() as server:
        client = make_client(server, clock)
        handle = client.run(MODEL, PARAMETERS)
        list(client.watch(handle, socket=Feed(healthy=False)))
    assert clock.time_s < 60


# --- a socket that says nothing, too much, or too slowly ----------------------------------------


def frame(**changes) -> bytes:
    return json.dumps({"type": "task_output", "id": "2221", "message": STEP, **changes}).encode()


def test_only_a_frame_of_the_task_of_just_now_makes_polls_rare():
    clock = Clock()
    feed = ProgressSocket(
        "t", url="ws://127.0.0.1:1", on_progress=lambda _: None, clock=clock, taskid="2221"
    )
    assert not feed.is_healthy
    for other in ({"type": "connected"}, {"type": "error"}, {"id": "2222"}, {"type": None}):
        feed._take(frame(**other))
        assert not feed.is_healthy
    for ours in ({}, {"id": None}, {"type": "task_new"}):
        feed._take(frame(**ours))
        assert feed.is_healthy
        clock.sleep(module.RECENT_S)
        assert not feed.is_healthy


def test_frames_of_another_task_are_not_shown():
    shown = []
    feed = ProgressSocket(
        "t", url="ws://127.0.0.1:1", on_progress=shown.append, on_log=shown.append, taskid="2221"
    )
    assert not feed._take(frame(type="task_postprocess_end", id="2222"))
    feed._take(frame(id="2222"))
    assert (shown, feed.take_news()) == ([], False)


class Fading(Feed):
    """Tells of the task for a while and falls silent."""

    def __init__(self, clock: Clock, until_s: float) -> None:
        super().__init__()
        self._clock, self._until_s = clock, until_s

    @property
    def is_healthy(self) -> bool:
        return self._clock.time_s < self._until_s

    @is_healthy.setter
    def is_healthy(self, _: bool) -> None:
        pass


@pytest.mark.parametrize("until_s", [0.0, 1.0, 3.0, 12.0, 47.0, 130.0])
def test_a_socket_that_falls_silent_delays_the_end_no_longer_than_a_poll(until_s):
    clock, polls = Clock(), []
    with WiroServer() as server:
        client = make_client(server, clock)
        handle = client.run(MODEL, PARAMETERS)
        server.steps_by_itself = False
        for _ in client.watch(handle, timeout_s=400, socket=Fading(clock, until_s)):
            polls.append(clock.time_s)
            if clock.time_s > 200:
                break
    first_after = next(time_s for time_s in polls if time_s >= until_s)
    longest = 1.2 * wiro.POLL_SCHEDULE[-1][1] + wiro.SLICE_S
    assert first_after - until_s <= longest
    silent = [time_s for time_s in polls if time_s >= until_s]
    assert all(later - earlier <= longest for earlier, later in itertools.pairwise(silent))
    talking = [time_s for time_s in polls if time_s < until_s]
    assert len(talking) <= 1 + until_s / wiro.WATCHDOG_S, "few while frames come"


def opened(connection, head: bytes) -> None:
    """Shake hands, and take what the client registers with."""
    key = next(line.split(b": ")[1] for line in head.split(b"\r\n")
               if line.lower().startswith(b"sec-websocket-key"))  # fmt: skip
    accept = base64.b64encode(hashlib.sha1(key + wiro_socket._MAGIC).digest())
    connection.sendall(
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n"
    )
    connection.recv(4096)


def endless(first: bytes, again: bytes, *, opens: bool = True):
    def play(server, connection, head) -> None:
        if opens:
            opened(connection, head)
        connection.sendall(first)
        while not server.over.is_set():
            connection.sendall(again)

    return play


def dripping(data: bytes, *, opens: bool = True):
    def play(server, connection, head) -> None:
        if opens:
            opened(connection, head)
        server.drip(connection, data, 0.01)

    return play


TOO_MUCH = {
    "frame": endless(b"\x81\x7f" + (2**40).to_bytes(8, "big"), b"x" * 4096),
    "fragments": endless(b"\x01\x05hello", b"\x00\x7e\x10\x00" + b"x" * 4096),
    "fragments and pings": endless(b"\x01\x05hello", b"\x89\x00\x00\x7e\x10\x00" + b"x" * 4096),
    "pings": endless(b"", b"\x89\x01?" * 1000),
    "headers": endless(b"HTTP/1.1 101 x\r\n", b"X: x\r\n" * 500, opens=False),
    "one header": endless(b"HTTP/1.1 101 x\r\nX: ", b"x" * 4096, opens=False),
    "refusal": endless(b"HTTP/1.1 503 x\r\nContent-Length: 99999999\r\n\r\n", b"x" * 4096,
                       opens=False),
    "dripping frame": dripping(b"\x81\x7f" + (2**40).to_bytes(8, "big") + b"x" * 9999),
    "dripping headers": dripping(b"HTTP/1.1 101 x\r\nX: " + b"x" * 9999, opens=False),
}  # fmt: skip


def served(play, **options):
    server = RawServer(lambda connection, head: play(server, connection, head), **options)
    return server


@pytest.mark.parametrize("name", TOO_MUCH)
def test_a_socket_that_sends_too_much_or_too_slowly_is_left(name, monkeypatch, caplog):
    monkeypatch.setattr(module, "MAX_FRAME_BYTES", 100_000)
    monkeypatch.setattr(module, "FRAME_S", 0.3)
    monkeypatch.setattr(module, "RECONNECTS", 0)
    with served(TOO_MUCH[name]) as server:
        url = f"ws://{server.netloc}/v1"
        with ProgressSocket("planted-token", url=url, on_progress=print) as feed:
            until(lambda: not feed._thread.is_alive(), 20.0)
        assert server.closed.wait(20.0)
    assert caplog.text.count("polling goes on") == 1
    assert "planted" not in caplog.text


HELD = {
    "silent": lambda server, connection, head: (opened(connection, head), connection.recv(1)),
    "silent before the handshake": lambda server, connection, head: connection.recv(1),
    "dripping frame": TOO_MUCH["dripping frame"],
    "dripping headers": TOO_MUCH["dripping headers"],
}


@pytest.mark.parametrize("name", HELD)
def test_leaving_ends_the_thread_at_once_whatever_it_waits_for(name):
    with served(HELD[name]) as server:
        url = f"ws://{server.netloc}/v1"
        with ProgressSocket("t", url=url, on_progress=print) as feed:
            until(lambda: server.requests)
        assert not server.over.is_set(), "the server let go first"
        until(lambda: not feed._thread.is_alive())
        assert server.closed.wait(10.0)


def test_frames_that_are_no_utf_8_are_read():
    broken = json.dumps({"type": "task_output", "message": "caf@"}).encode()
    lines = []

    def play(server, connection, head) -> None:
        opened(connection, head)
        for data in (broken.replace(b"@", b"\xe9\x1b[2J"), json.dumps(END).encode()):
            connection.sendall(bytes([0x81, len(data)]) + data)
        connection.recv(1)

    with (
        served(play) as server,
        ProgressSocket(
            "t", url=f"ws://{server.netloc}/v1", on_progress=print, on_log=lines.append
        ) as feed,
    ):
        until(lambda: not feed._thread.is_alive())
    assert lines == ["caf\ufffd\ufffd[2J"]


# --- by proxy, and with a company's certificates ------------------------------------------------


@pytest.fixture
def bare(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module, "RECONNECTS", 0)
    return monkeypatch


SCRIPT = [("text", {"type": "task_output", "message": STEP}), ("text", END)]


def heard(url: str) -> list[Progress]:
    reports = []
    with ProgressSocket("planted-token", url=url, on_progress=reports.append) as feed:
        until(lambda: not feed._thread.is_alive(), 20.0)
    return reports


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_the_socket_goes_through_the_proxy_that_calls_use(bare, variable):
    def connect(connection, head) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nX: y\r\n\r\n")
        splice(connection, int(server.url.split(":")[2].split("/")[0]), proxy.over)

    with SocketServer(SCRIPT, SCRIPT) as server, RawServer(connect) as proxy:
        bare.setenv(variable, f"http://us%40er:planted@{proxy.netloc}")
        assert heard(server.url) == [SIX]
        assert proxy.requests[0].startswith(b"CONNECT 127.0.0.1:")
        login = base64.b64encode(b"us@er:planted")
        assert b"Proxy-Authorization: Basic " + login in proxy.requests[0]
        bare.setenv("NO_PROXY", "127.0.0.1")
        assert heard(server.url) == [SIX]
        assert len(proxy.requests) == 1


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("407", "HTTP_PROXY names wants a user and a password"),
        ("403", "ConnectionError"),
        ("socks5h://user:planted@127.0.0.1:1", 'HTTP_PROXY names a SOCKS proxy.*"requests.socks'),
        ("https://user:planted@127.0.0.1:1", "HTTP_PROXY does not name a proxy that the progress"),
        ("http://user:planted@[", "ValueError|Invalid"),
        ("drip", "ConnectionError"),
    ],
)
def test_a_proxy_that_does_not_connect_is_told_without_its_password(bare, caplog, given, words):
    bare.setattr(module, "FRAME_S", 0.2)
    bare.setitem(sys.modules, "socks", None)

    def refuse(connection, head) -> None:
        if given == "drip":
            proxy.drip(connection, b"HTTP/1.1 200 OK\r\nX: " + b"x" * 999, 0.01)
        connection.sendall(f"HTTP/1.1 {given} No\r\nContent-Length: 0\r\n\r\n".encode())

    with RawServer(refuse) as proxy:
        bare.setenv("HTTP_PROXY", given if ":" in given else f"http://u:planted@{proxy.netloc}")
        assert heard("ws://127.0.0.1:1/v1") == []
    assert re.search(f"The progress socket failed .*({words}).*polling goes on", caplog.text)
    assert "planted" not in caplog.text


def test_the_socket_trusts_what_calls_trust(bare, caplog, tmp_path):
    context, authority = tls_context(tmp_path)

    def pass_on(connection) -> None:
        splice(connection, int(server.url.split(":")[2].split("/")[0]), outside.over)

    with (
        SocketServer(SCRIPT, SCRIPT, SCRIPT, SCRIPT) as server,
        RawServer(pass_on, context=context, reads=False) as outside,
    ):
        url = f"wss://localhost:{outside.port}/v1"
        assert heard(url) == []
        assert "certificate of localhost was not accepted (self" in caplog.text
        assert "set REQUESTS_CA_BUNDLE to the PEM file of its CA" in caplog.text
        for variable in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"):
            with bare.context() as environment:
                environment.setenv(variable, authority)
                assert heard(url) == [SIX], variable
        bare.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "none.pem"))
        assert heard(url) == []
    assert "planted" not in caplog.text
