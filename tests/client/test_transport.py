"""One call: its deadline, its limits, what it says where the network is in the way."""

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from email.utils import formatdate
from pathlib import Path

import pytest
import requests
import urllib3.util.connection
from comfyui_skyreels.wiro_api import client as client_module
from comfyui_skyreels.wiro_api import transport
from comfyui_skyreels.wiro_api.client import Client, RunHandle, check_wait
from comfyui_skyreels.wiro_api.errors import (
    ConfigError,
    DependencyError,
    TaskTimeoutError,
    TransportError,
    WiroError,
)
from comfyui_skyreels.wiro_api.signing import Credentials, WiroAuth, nonces_of
from comfyui_skyreels.wiro_api.transport import LAST_WAIT_S, make_session, post, wait_s
from support.forked import Fork, forks
from support.raw_server import RawServer, answer, splice, tls_context
from support.wiro_client import MODEL, PARAMETERS
from support.wiro_server import KEY, SECRET, WiroServer

ROOT = Path(__file__).resolve().parents[2]
AUTH = WiroAuth(Credentials(KEY, SECRET), nonces_of(time.time))
#: a connection or a thread that is there longer than this is there for good
SOON_S = 8.0
RECORD = {"id": "2221", "status": "task_start", "socketaccesstoken": "token-of-task"}
DETAIL = json.dumps({"result": True, "tasklist": [RECORD]}).encode()
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch):
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name in (*transport.CA_VARIABLES, "SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)


def call(url: str, **options):
    with make_session() as session:
        return post(session, f"{url}/Task/Detail", AUTH, body={"taskid": "2221"}, **options)


def client_of(url: str, **options) -> Client:
    return Client(Credentials(KEY, SECRET), base_url=url, **options)


# --- deadlines ----------------------------------------------------------------------------------


def silent(server):
    return lambda connection, request: connection.recv(1)


def dripping_headers(server):
    return lambda connection, request: server.drip(
        connection, b"HTTP/1.1 200 OK\r\nX: " + b"x" * 999
    )


def dripping_lines(server):
    return lambda connection, request: server.drip(connection, b"HTTP/1.1 100 Continue\r\n\r\n")


def dripping_body(server):
    def script(connection, request) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n{")
        server.drip(connection, b" ")

    return script


def dripping_body_of_a_connection_that_is_closed_behind_it(server):
    def script(connection, request) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{")
        server.drip(connection, b" ")

    return script


def dripping_chunk_size(server):
    def script(connection, request) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        server.drip(connection, b"0")

    return script


def endless_trailer(server):
    def script(connection, request) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n")
        while True:
            connection.sendall(b"X: x\r\n" * 1000)

    return script


SLOW = [silent, dripping_headers, dripping_lines, dripping_body,
        dripping_body_of_a_connection_that_is_closed_behind_it, dripping_chunk_size,
        endless_trailer]  # fmt: skip


@contextlib.contextmanager
def served(make_script, **options):
    server = RawServer(lambda *arguments: script(*arguments), **options)
    script = make_script(server)
    with server:
        yield server


def no_call_is_left() -> bool:
    end = time.monotonic() + SOON_S
    while time.monotonic() < end:
        if not any(thread.name == "wiro call" for thread in threading.enumerate()):
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("make_script", SLOW)
def test_a_call_ends_at_its_deadline_whatever_the_server_does_and_its_connection_with_it(
    make_script,
):
    with served(make_script) as server:
        with pytest.raises(TransportError, match=r"within 0 s\. The request had left") as caught:
            call(server.url, whole_s=0.3)
        assert not server.over.is_set(), "the server let go first"
        assert caught.value.was_sent
        assert server.closed.wait(SOON_S), "the connection is cut"
        assert no_call_is_left()


@pytest.mark.parametrize("make_script", SLOW)
def test_a_wait_ends_at_its_deadline_whatever_the_server_does(make_script, monkeypatch):
    monkeypatch.setattr(client_module, "LAST_POLL_S", 0.1)
    with served(make_script) as server:
        with pytest.raises(TaskTimeoutError, match="2221 has not ended.*did not answer as a whole"):
            list(client_of(server.url).watch(RunHandle("2221", ""), timeout_s=0.2))
        assert not server.over.is_set(), "the server let go first"
        assert no_call_is_left()


class CancelledError(Exception):
    """What a host's cancel button raises."""


@pytest.mark.parametrize("make_script", SLOW)
def test_a_caller_who_leaves_is_let_go_at_once_in_whatever_state_the_call_is(make_script):
    def sleep(seconds: float) -> None:
        if server.requests:
            raise CancelledError

    with served(make_script) as server:
        with pytest.raises(CancelledError):
            client_of(server.url, sleep=sleep, interruptible=True).detail(RunHandle("2221", ""))
        assert not server.over.is_set(), "the server let go first"
        assert server.closed.wait(SOON_S)
        assert no_call_is_left()


def test_a_server_that_does_not_read_ends_the_call_and_never_gets_its_end():
    def script(connection) -> None:
        server.over.wait()
        while piece := connection.recv(65536):
            received.append(len(piece))

    received: list[int] = []
    file = ("inputImage", ("input.png", bytes(40_000_000), "image/png"))
    with RawServer(script, reads=False) as server, make_session() as session:
        with pytest.raises(TransportError, match=r"Nothing was sent") as caught:
            post(session, f"{server.url}/Run/a/b", AUTH, files=[file], whole_s=0.3)
        assert not caught.value.was_sent
        server.over.set()
        assert server.closed.wait(SOON_S)
        assert no_call_is_left()
    assert sum(received) < 40_000_000


def test_a_call_that_is_left_before_its_end_has_left_never_sends_it():
    """Whichever comes first, the guard or the caller's leaving: the other one then knows."""
    may_leave, asked = threading.Event(), []

    def sleep(seconds: float) -> None:
        if may_leave.is_set():
            raise CancelledError

    def guard() -> None:
        asked.append(True)
        may_leave.set()

    with WiroServer() as server, make_session() as session:
        for before_last_byte in (guard, None):
            may_leave.clear()
            with contextlib.suppress(CancelledError):
                post(
                    session, f"{server.url}/Run/wiro/SkyReels-V1", AUTH, body=PARAMETERS,
                    before_last_byte=before_last_byte, sleep=sleep, payload_keys=("taskid",),
                )  # fmt: skip
        line = transport._Line(lambda: asked.append("late"))
        line.leave()
        body = transport._Body(b"x" * 10, line)
        assert body.read(4) == b"xxxx"
        with pytest.raises(TransportError, match="has left") as caught:
            body.read(6)
        assert not caught.value.was_sent
    assert "late" not in asked
    assert no_call_is_left()


def test_what_a_call_may_take_grows_with_what_it_carries():
    assert transport.longest_s(30, 0) == 70
    assert transport.longest_s(300, 100_000_000) > 3600


def test_connections_are_kept_and_used_again():
    ports = set()

    def script(connection, request) -> None:
        ports.add(connection.getpeername()[1])
        connection.sendall(answer(DETAIL))

    with RawServer(script) as server, make_session() as session:
        for _ in range(5):
            post(session, f"{server.url}/Task/Detail", AUTH, body={"taskid": "2221"})
    assert len(ports) == 1


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -float("inf"), -1, 0, -0.0, "x"])
def test_a_longest_wait_that_is_none_is_refused_before_anything_is_asked(server, client, seconds):
    with pytest.raises(ConfigError, match="not a valid time-out: give seconds above 0"):
        client.watch(RunHandle("2221", ""), timeout_s=seconds)
    with pytest.raises(ConfigError):
        check_wait(seconds)
    assert server.seen == []


# --- the command line ---------------------------------------------------------------------------


def command(server, *arguments: str, **options) -> Fork:
    environment = {**os.environ, "WIRO_API_KEY": KEY, "WIRO_API_SECRET": SECRET,
                   "WIRO_API_BASE_URL": server.url, **options}  # fmt: skip
    return forks("support.wiro_program").start(["-m", "wiro_api", *arguments], environment)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("make_script", [silent, dripping_headers, dripping_body])
def test_ctrl_c_ends_the_command_line_while_the_server_holds_an_answer(make_script):
    with served(make_script) as server:
        process = command(server, "detail", "2221", "--json")
        end = time.monotonic() + 60
        while not server.requests and time.monotonic() < end:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        code = process.wait()
        assert not server.over.is_set(), "the server let go first"
        out, err = process.output()
    assert code == 130, err
    assert "Interrupted" in json.loads(out)["error"]


@pytest.mark.parametrize("given", ["nan", "inf", "-1", "0", "soon", "1e999"])
def test_a_time_out_that_is_none_is_wrong_usage(server, given):
    process = command(server, "watch", "2221", f"--timeout={given}", "--json")
    assert process.wait() == 2
    out, _ = process.output()
    assert "is not a time: give seconds above 0" in json.loads(out)["error"]
    assert server.seen == []


def test_a_user_without_a_home_may_ask_and_is_told_what_a_run_needs(server, monkeypatch):
    from comfyui_skyreels.wiro_api import cli, state

    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("XDG_STATE_HOME", "LOCALAPPDATA", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(state.Path, "home", staticmethod(nobody))
    monkeypatch.setenv("WIRO_API_KEY", KEY)
    monkeypatch.setenv("WIRO_API_SECRET", SECRET)
    monkeypatch.setenv("WIRO_API_BASE_URL", server.url)
    assert cli.main(["list"]) == 0
    with pytest.raises(ConfigError, match="no home folder.*WIRO_STATE_DIR"):
        state.state_folder()
    assert cli.main(["run", "wiro/SkyReels-V1"]) == 1
    assert not any(path.startswith("Run/") for path in server.paths())


# --- when to ask again --------------------------------------------------------------------------

DATE = 1_700_000_000


@pytest.mark.parametrize(
    ("asked", "seconds"),
    [
        ("7", 7.0), ("0", 0.5), ("0.25", 0.5), ("1.5", 1.5), ("299.75", 299.75), ("301", 300.0),
        ("86400", 300.0), ("99999999999", 300.0), (formatdate(DATE + 42, usegmt=True), 42.0),
        (formatdate(DATE - 5, usegmt=True), 0.5), (formatdate(DATE + 9e6, usegmt=True), 300.0),
        ("", None), ("soon", None), ("-5", None), ("1e3", None), ("nan", None), ("inf", None),
        ("²", None), ("٣", None), ("7 s", None), ("9" * 500, None),
        ("Wed, 99 Nov 2023 99:13:20 GMT", None), ("Wed, 15 Nov 99999999 22:13:20 GMT", None),
        (", , ,", None),
    ],
)  # fmt: skip
def test_what_the_service_asks_to_wait_is_read_in_both_forms_within_bounds(asked, seconds):
    response = requests.Response()
    # the date of the answer, and no clock of this machine
    response.headers = {"Retry-After": asked, "Date": formatdate(DATE, usegmt=True)}
    assert transport.retry_after(response) == seconds
    error = TransportError("x", retry_after_s=transport.retry_after(response))
    assert seconds is None or wait_s(1, error, None) == seconds


def test_a_time_of_day_without_the_answers_own_is_not_told():
    response = requests.Response()
    response.headers = {"Retry-After": formatdate(time.time() + 60, usegmt=True)}
    assert transport.retry_after(response) is None


def test_a_read_does_not_ask_again_after_an_age(server, client, clock):
    server.fail("Task/Detail", *[{"status": 429, "headers": {"Retry-After": "300"}}] * 9)
    with pytest.raises(TransportError, match="429"):
        client.detail(RunHandle("2221", ""))
    assert clock.time_s <= client_module.READ_PATIENCE_S


# --- what the network does ----------------------------------------------------------------------

HOST = "https://api.wiro.example/v1"


def failure(url: str = HOST) -> WiroError:
    with pytest.raises(WiroError) as caught:
        call(url, whole_s=20.0)
    text = str(caught.value)
    assert "planted" not in text
    assert "\n" not in text
    assert len(text) < 500
    assert "Nothing was sent." in text
    assert isinstance(caught.value, ConfigError | DependencyError) or not caught.value.was_sent
    return caught.value


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY"])
def test_a_proxy_that_wants_a_login_is_named(monkeypatch, variable):
    def script(connection, request) -> None:
        connection.sendall(answer(b"", status="407 Proxy Authentication Required"))

    with RawServer(script) as proxy:
        monkeypatch.setenv(variable, f"http://user:planted@{proxy.netloc}")
        error = failure()
    assert f"that {variable} names wants a user and a password (HTTP 407)" in str(error)
    assert "name api.wiro.example in NO_PROXY" in str(error)
    assert proxy.requests[0].startswith(b"CONNECT api.wiro.example:443")


def test_a_proxy_that_wants_a_login_for_plain_http_is_named(monkeypatch):
    def script(connection, request) -> None:
        connection.sendall(answer(b"<html>", status="407 Proxy Authentication Required"))

    with RawServer(script) as proxy:
        monkeypatch.setenv("HTTP_PROXY", f"http://user:planted@{proxy.netloc}")
        with pytest.raises(TransportError, match="HTTP_PROXY names wants a user") as caught:
            call("http://127.0.0.1:1/v1")
    assert "planted" not in str(caught.value)


def test_a_proxy_that_is_not_there_is_named_without_its_password(monkeypatch):
    port = closed_port()
    monkeypatch.setenv("HTTPS_PROXY", f"http://user:planted@127.0.0.1:{port}")
    text = str(failure())
    assert f"The proxy 127.0.0.1:{port} could not be used (Connection refused)" in text
    assert "check HTTPS_PROXY, or name api.wiro.example in NO_PROXY" in text


@pytest.mark.parametrize(
    "given", ["http://[planted", "http://user:planted@127.0.0.1:99999", "http://", "foo://planted"]
)
def test_a_proxy_that_is_none_is_named_without_its_password(monkeypatch, given):
    monkeypatch.setenv("HTTPS_PROXY", given)
    assert "HTTPS_PROXY" in str(failure())


@pytest.mark.parametrize("scheme", ["socks5", "socks5h", "socks4"])
def test_a_socks_proxy_without_its_package_says_what_to_install(monkeypatch, scheme):
    def missing(*_: object, **__: object) -> None:
        raise requests.exceptions.InvalidSchema("Missing dependencies for SOCKS support.")

    monkeypatch.setattr(requests.adapters, "SOCKSProxyManager", missing)
    monkeypatch.setenv("ALL_PROXY", f"{scheme}://user:planted@127.0.0.1:1")
    error = failure()
    assert isinstance(error, DependencyError), "asking again does not help"
    assert (
        'ALL_PROXY names a SOCKS proxy, which needs PySocks: pip install "requests[socks]"'
        in str(error)
    )


def test_a_watch_behind_a_socks_proxy_ends_at_once_and_names_its_task(monkeypatch):
    def missing(*_: object, **__: object) -> None:
        raise requests.exceptions.InvalidSchema("Missing dependencies for SOCKS support.")

    monkeypatch.setattr(requests.adapters, "SOCKSProxyManager", missing)
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1")
    with pytest.raises(DependencyError, match="PySocks.*task 2221") as caught:
        list(client_of(HOST).watch(RunHandle("2221", "")))
    assert caught.value.taskid == "2221"


def test_a_certificate_of_a_companys_own_says_which_variable_to_set(monkeypatch, tmp_path):
    context, authority = tls_context(tmp_path)

    def script(connection, request) -> None:
        connection.sendall(answer(DETAIL))

    with RawServer(script, context=context) as server:
        url = server.url.replace("127.0.0.1", "localhost")
        text = str(failure(url))
        assert "The certificate of localhost was not accepted (self" in text
        assert "set REQUESTS_CA_BUNDLE to the PEM file of its CA" in text
        assert server.requests == []
        for variable in transport.CA_VARIABLES:
            with monkeypatch.context() as environment:
                environment.setenv(variable, authority)
                assert call(url)["tasklist"] == [RECORD]


@pytest.mark.parametrize("variable", transport.CA_VARIABLES)
@pytest.mark.parametrize("content", [None, "", "no certificate", "-----BEGIN CERTIFICATE-----\nx"])
def test_a_file_of_certificates_that_is_none_is_named(monkeypatch, tmp_path, variable, content):
    file = tmp_path / "company.pem"
    if content is not None:
        file.write_text(content)
    monkeypatch.setenv(variable, str(file))
    context, _ = tls_context(tmp_path)
    with RawServer(lambda *_: None, context=context) as server:
        error = failure(server.url.replace("127.0.0.1", "localhost"))
    assert variable in str(error) or "certificate" in str(error)
    assert isinstance(error, ConfigError) or content is not None


def test_a_host_that_is_not_known_and_a_network_that_is_away_are_told_apart(monkeypatch):
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    def away(*_: object, **__: object) -> None:
        raise OSError(101 if sys.platform == "linux" else 51, "Network is unreachable")

    with monkeypatch.context() as network:
        network.setattr(urllib3.util.connection.socket, "getaddrinfo", unknown)
        text = str(failure())
        assert "There is no host api.wiro.example" in text
        assert "name your proxy in HTTPS_PROXY" in text
    with monkeypatch.context() as network:
        network.setattr(urllib3.util.connection, "create_connection", away)
        assert "unreachable): check the network" in str(failure())


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")
def test_a_host_of_ipv6_alone_is_talked_to():
    def script(connection, request) -> None:
        connection.sendall(answer(DETAIL))

    with RawServer(script, host="::1") as server:
        assert client_of(server.url).detail(RunHandle("2221", "")).status == "task_start"


def test_calls_and_certificates_go_through_a_proxy(monkeypatch, tmp_path):
    context, authority = tls_context(tmp_path)

    def respond(connection, request) -> None:
        connection.sendall(answer(DETAIL))

    def connect(connection, request) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        splice(connection, server.port, proxy.over)

    with RawServer(respond, context=context) as server, RawServer(connect) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://{proxy.netloc}")
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", authority)
        assert call("https://localhost/v1")["tasklist"] == [RECORD]
        assert proxy.requests[0].startswith(b"CONNECT localhost:443")


# --- polling ------------------------------------------------------------------------------------

NO_TASK = (1, "There is no task yet.")


@pytest.mark.parametrize("known_by", ["record", "run", "both identifiers"])
def test_one_or_two_answers_of_no_task_do_not_end_the_wait_for_a_known_one(
    server, client, clock, known_by
):
    handle = client.run(MODEL, PARAMETERS)
    clock.time_s += 3600  # far beyond the time in which a new task may be missing
    if known_by == "record":
        watching = client.watch(RunHandle(handle.taskid, ""))
        next(watching)
    elif known_by == "run":
        watching = client.watch(RunHandle(handle.taskid, "", handle.started_at))
    else:
        watching = client.watch(RunHandle(handle.taskid, handle.token))
    for _ in range(3):
        server.fail("Task/Detail", NO_TASK, NO_TASK)
        next(watching)
    server.fail("Task/Detail", {"status": 200, "body": {"result": True, "tasklist": []}})
    *_, last = watching
    assert last.status == "task_postprocess_end"


def test_repeated_answers_of_no_task_end_the_wait_and_say_so(server, client, clock):
    handle = client.run(MODEL, PARAMETERS)
    watching = client.watch(handle)
    next(watching)
    clock.time_s += 100
    polls = server.paths().count("Task/Detail")
    server.fail("Task/Detail", *[NO_TASK] * 99)
    with pytest.raises(WiroError, match="answered so 3 times in a row.*task 2221") as caught:
        next(watching)
    assert caught.value.taskid == "2221"
    assert server.paths().count("Task/Detail") == polls + 3


def test_a_new_task_may_be_missing_for_a_while_whatever_our_clock_does(server, client, clock):
    handle = client.run(MODEL, PARAMETERS)
    for started_at in (clock.now(), clock.now() + 86_400):  # and a clock that was set back
        server.fail("Task/Detail", *[NO_TASK] * 99)
        with pytest.raises(WiroError, match="times in a row"):
            begin = clock.time_s
            list(client.watch(RunHandle(handle.taskid, "", started_at)))
        waits = client_module.MISSES + 1  # of the longest kind, jittered by a fifth
        assert clock.time_s - begin <= client_module.SETTLING_S + waits * 1.2 * LAST_WAIT_S
        server._faults["Task/Detail"].clear()


def test_a_record_of_another_task_is_no_answer(server, client, clock):
    other, mine = server.add_task(dict(PARAMETERS)), server.add_task(dict(PARAMETERS))
    server.tasks[other] |= {"status": "task_postprocess_end", "pexit": "0"}
    wrong = {"status": 200, "body": {"result": True, "tasklist": [server.tasks[other]]}}
    server.fail("Task/Detail", *[wrong] * 4)
    seen = {task.taskid for task in client.watch(RunHandle(mine, ""))}
    assert seen == {mine}


def test_trouble_that_lasts_is_told_once_and_at_the_end(server, client, caplog):
    handle = client.run(MODEL, PARAMETERS)
    server.fail("Task/Detail", *[{"status": 502, "body": {}}] * 999)
    with pytest.raises(TaskTimeoutError, match="last poll failed: Wiro answered HTTP 502"):
        list(client.watch(handle, timeout_s=300))
    assert caplog.text.count("The wait for the task goes on") == 1


# --- nonces of several processes ----------------------------------------------------------------

DRAW = """
import sys; from wiro_api.signing import Nonces
nonces = Nonces(lambda: 1734513807.0)
print(*(nonces.next() for _ in range(200)))
"""


def test_nonces_of_processes_in_the_same_millisecond_are_all_different():
    processes = [
        subprocess.Popen([sys.executable, "-c", DRAW], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    drawn = [process.communicate(timeout=60)[0].split() for process in processes]
    together = list(itertools.chain(*drawn))
    assert len(set(together)) == len(together) == 600
    for nonces in drawn:
        assert all(int(one) < int(next_one) for one, next_one in itertools.pairwise(nonces))
    assert all(n.isascii() and n.isdigit() and int(n) < 2**63 for n in together)
    assert all(len(nonce) == 19 for nonce in together)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_copy_of_a_process_draws_numbers_of_its_own():
    code = DRAW.replace("print(", "import os; nonces.next(); os.fork() and os.wait(); print(")
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                         check=True)  # fmt: skip
    drawn = run.stdout.split()
    assert len(set(drawn)) == len(drawn) == 400
