"""The progress socket: lively if all goes well, and no harm if nothing does."""

import threading
import time

import pytest
from comfyui_skyreels.wiro_api import client as wiro
from comfyui_skyreels.wiro_api import websocket as module
from comfyui_skyreels.wiro_api.errors import ConfigError
from comfyui_skyreels.wiro_api.task import Progress
from comfyui_skyreels.wiro_api.websocket import ProgressSocket
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
