"""Whole jobs against a service that misbehaves: what is paid for comes home, and is paid for once.

Each fault is met by the same call that a person would make, and then, with the fault gone, by the
same call again. The videos are real and are decoded.
"""

import contextlib
import errno
import itertools
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import requests
from comfyui_skyreels.wiro_api import client as client_module
from comfyui_skyreels.wiro_api import files, websocket
from comfyui_skyreels.wiro_api.cli import verify
from comfyui_skyreels.wiro_api.client import Client
from comfyui_skyreels.wiro_api.errors import (
    AuthError,
    DownloadError,
    RunOutcomeUnknownError,
    TaskTimeoutError,
    TransportError,
    WiroError,
)
from comfyui_skyreels.wiro_api.files import download, safe_name
from comfyui_skyreels.wiro_api.jobs import Job, finish, start, to_handle
from comfyui_skyreels.wiro_api.journal import Journal
from comfyui_skyreels.wiro_api.signing import Credentials
from comfyui_skyreels.wiro_api.task import Output
from support import wiro_server
from support.clip import make_clip
from support.wiro_client import MODEL, PARAMETERS, Clock, listening, make_client
from support.wiro_server import KEY, SECRET, STATES, WiroServer

CLIP = make_clip()
PICTURE = ("inputImage", ("input.png", b"\x89PNG picture", "image/png"))
FOREVER = 100
BAD_GATEWAY = {"status": 502, "body": {"result": False}}
NO_KEY = {"status": 401, "body": {"result": False, "errors": [{"code": 0, "message": "no"}]}}


@dataclass
class Trial:
    """One job, asked for as often as a test likes."""

    server: WiroServer
    root: Path
    clock: Clock = field(default_factory=Clock)
    client: Client = None
    on_task: Callable[..., None] = lambda _: None

    def __post_init__(self) -> None:
        self.server.files["0.mp4"] = CLIP
        self.client = self.client or make_client(self.server, self.clock)
        self.journal = Journal(self.root / "journal.sqlite", now=self.clock.now)
        self.folder = self.root / "out"
        self.folder.mkdir()

    def __call__(self, *, again: bool = False) -> list[Path]:
        self.client.socket_url = self.server.socket_url
        entry = start(self.client, self.journal, Job(MODEL, PARAMETERS, [PICTURE]), again=again)
        if entry.files:
            return list(entry.files)
        _, paths = finish(
            self.client,
            to_handle(entry),
            self.folder,
            journal=self.journal,
            entry_id=entry.id,
            timeout_s=600,
            listener=listening(on_task=self.on_task, verify=verify),
        )
        return paths

    @property
    def row(self):
        return self.journal.newest()[0]

    @property
    def runs(self) -> int:
        return sum(path.startswith("Run/") for path in self.server.paths())

    def names(self) -> list[str]:
        """Of the files in its folder, the receipt left aside."""
        names = (path.name for path in self.folder.iterdir())
        return sorted(name for name in names if not name.endswith(".receipt.json"))


@pytest.fixture
def job(server, tmp_path):
    return Trial(server, tmp_path)


def host_of(server) -> str:
    return server.url.removeprefix("http://").removesuffix("/v1")


def assert_done(job: Job, paths: list[Path], name: str = "0.mp4") -> None:
    """Once run, one file, whole, under this name, and the row says so."""
    assert paths == [job.folder / name]
    assert paths[0].read_bytes() == CLIP
    assert job.names() == [name]
    row = job.row
    assert (row.state, row.verdict, row.taskid) == ("ended", "succeeded", "2221")
    assert (row.files, row.cost) == (tuple(paths), "0.00351")
    assert job.runs == len(job.server.tasks) == len(job.journal.newest()) == 1


def assert_paid_and_kept(job: Job, caught) -> None:
    """The error names the task, the folder is empty, and the row knows what can be collected."""
    assert caught.value.taskid == "2221"
    assert "task 2221" in str(caught.value)
    assert job.names() == []
    row = job.row
    assert (row.state, row.verdict, row.taskid) == ("ended", "succeeded", "2221")
    assert (row.files, row.cost) == ((), "0.00351")
    assert job.runs == 1


# --- what is lived through ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "faults"),
    [
        ("Run", [BAD_GATEWAY]),
        ("Run", ["lost"]),
        ("Run", ["truncated"]),
        ("Run", ["html"]),
        ("Run", ["list"]),
        ("Run", [("silent", 30)]),
        ("Task/Detail", [BAD_GATEWAY] * 3),
        ("Task/Detail", ["reset"] * 3),
        ("Task/Detail", ["lost"] * 3),
        ("Task/Detail", ["truncated", "html", "list"]),
        ("Task/Detail", [("silent", 30)]),
        ("Task/Detail", [(1, "There is no task yet.")] * 2),
        ("GET 0.mp4", ["cut"]),
        ("GET 0.mp4", ["short"]),
        ("GET 0.mp4", ["reset", 404, 503, 403]),
        ("GET 0.mp4", [("slow", 0.3)]),
        ("GET 0.mp4", ["unsized"]),
        ("GET 0.mp4", ["chunked"]),
        ("GET 0.mp4", [("redirect", "/files/2221/0.mp4")]),
    ],
)
def test_the_file_comes_with_one_run_in_spite_of(server, tmp_path, monkeypatch, path, faults):
    monkeypatch.setattr(client_module, "UPLOAD_S", 0.2)
    clock = Clock()
    client = Client(
        Credentials(KEY, SECRET), base_url=server.url, sleep=clock.sleep, clock=clock,
        now=clock.now, session=Impatient(),
    )  # fmt: skip
    job = Trial(server, tmp_path, clock, client)
    server.fail(path, *faults)
    assert_done(job, job())
    assert server._faults[path] == [], "the fault was not met"
    assert_done(job, job())


class Impatient(requests.Session):
    """Waits for no answer longer than a fifth of a second."""

    def send(self, request, **keywords: Any):
        return super().send(request, **{**keywords, "timeout": (1.0, 0.2)})


@pytest.mark.parametrize("fault", ["reset", "lost", BAD_GATEWAY, "html"])
def test_a_lost_run_is_looked_for_through_lists_that_fail_too(job, fault):
    job.server.fail("Run", "lost")
    job.server.fail("Task/List", None, *[fault] * 7)
    assert_done(job, job())


@pytest.mark.parametrize(
    ("evil", "harmless"),
    [
        ("../../x.mp4", "x.mp4"),
        ("/etc/cron.d/x.mp4", "x.mp4"),
        ("..\\..\\x.mp4", "x.mp4"),
        ("C:\\Windows\\x.mp4", "x.mp4"),
        ("C:x.mp4", "C_x.mp4"),
        ("con.mp4", "result.mp4"),
        ("LPT1.tar.mp4", "result.mp4"),
        ("x.mp4:stream", "x.mp4_stream"),
        ("", "result.mp4"),
        ("..", "result.mp4"),
        (".hidden.mp4", "hidden.mp4"),
        ("a\0b.mp4", "a_b.mp4"),
        ("\x1b[2J\r\n.mp4", "__2J_.mp4"),
        ("\ud800.mp4", "_.mp4"),
    ],
)
def test_a_file_of_an_evil_name_gets_a_harmless_one_in_its_folder(job, evil, harmless):
    before = set(job.root.rglob("*"))
    job.server.final = {"outputs": [outputs_of(job.server, name=evil)]}
    assert_done(job, job(), harmless)
    ours = ("journal", ".receipt.json")
    after = {p for p in job.root.rglob("*") if not any(name in p.name for name in ours)}
    assert after - before == {job.folder / harmless}


def outputs_of(server, **changes: Any) -> dict[str, Any]:
    return {"name": "0.mp4", "contenttype": "video/mp4", "size": str(len(CLIP)),
            "url": server.file_url("0.mp4"), **changes}  # fmt: skip


@pytest.mark.parametrize("letter", ["x", "ü", "漢"])
def test_a_name_that_is_too_long_for_a_disk_is_cut(job, letter):
    job.server.final = {"outputs": [outputs_of(job.server, name=letter * 5000 + ".mp4")]}
    (path,) = job()
    assert len(path.name.encode()) <= 255
    assert path.suffix == ".mp4"
    assert path.read_bytes() == CLIP


def test_a_clock_that_is_set_back_in_the_middle_changes_nothing(job):
    def set_back(task) -> None:
        if task.status == "task_start":
            job.clock.now = lambda: wiro_server.NOW - 86_400 + job.clock.time_s

    client = Client(
        Credentials(KEY, SECRET), base_url=job.server.url, sleep=job.clock.sleep,
        clock=job.clock, now=lambda: job.clock.now(),
    )  # fmt: skip
    job.client, job.on_task = client, set_back
    job.server.fail("Task/Detail", *[BAD_GATEWAY] * 2)
    assert_done(job, job())
    assert job.clock.now() < wiro_server.NOW
    nonces = [int(seen.headers["x-nonce"]) for seen in job.server.seen]
    assert all(earlier < later for earlier, later in itertools.pairwise(nonces))
    assert len(nonces) > len(STATES)


# --- the progress socket ------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["", "silent", "drop", "refuse", "binary"])
def test_a_socket_costs_no_result_whatever_it_does(tmp_path, monkeypatch, caplog, fault):
    monkeypatch.setattr(websocket, "TICK_S", 0.02)
    monkeypatch.setattr(wiro_server, "BEAT_S", 0.01)
    is_told = fault in ("drop", "refuse")

    def hold(task) -> None:
        """Until the socket has had its effect."""
        if task.status == "task_start":
            until(lambda: server.socket.headers)
            until(lambda: not is_told or "polling goes on" in caplog.text)

    with WiroServer(with_socket=True) as server:
        server.fail("socket", *([fault] if fault else []) * FOREVER)
        job = Trial(server, tmp_path, on_task=hold)
        assert_done(job, job())
    assert caplog.text.count("polling goes on") == is_told
    assert "token-of-task" not in caplog.text


def until(condition, limit_s: float = 5.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


# --- what ends a Run ----------------------------------------------------------------------------


def test_a_run_that_is_cut_off_before_anything_is_made_is_not_sent_again_unasked(job):
    job.server.fail("Run", "reset")
    for _ in range(2):
        with pytest.raises(RunOutcomeUnknownError, match="before running again"):
            job()
        assert (job.row.state, job.row.taskid, job.row.files) == ("sending", "", ())
        assert (job.runs, job.names()) == (1, [])
    paths = job(again=True)
    assert paths[0].read_bytes() == CLIP
    assert (job.runs, len(job.server.tasks)) == (2, 1)
    assert [row.state for row in job.journal.newest()] == ["ended", "sending"]


def test_a_service_that_is_away_is_tried_again_and_refuses_for_good_later(tmp_path):
    with WiroServer() as server:
        port = int(server.url.split(":")[2].split("/")[0])
    job = Trial(server, tmp_path)
    with pytest.raises(TransportError, match="check the network"):
        job()
    assert (job.row.state, job.row.taskid) == ("refused", "")
    with WiroServer(port=port) as server:
        job.server = server
        server.files["0.mp4"] = CLIP
        paths = job()
        assert paths[0].read_bytes() == CLIP
        assert (job.runs, job.row.state) == (1, "ended")


@pytest.mark.parametrize(
    "fault", [NO_KEY, (97, "balance"), (0, "Request parameter [size] required"), {"status": 404}]
)
def test_a_run_that_is_refused_may_be_sent_again(job, fault):
    refusing = {**fault, "body": {"result": False}} if isinstance(fault, dict) else fault
    job.server.fail("Run", refusing)
    with pytest.raises(WiroError):
        job()
    assert (job.row.state, job.row.taskid, job.names()) == ("refused", "", [])
    assert job.runs == 1
    assert job()[0].read_bytes() == CLIP
    assert job.runs == 2


# --- what ends a wait ---------------------------------------------------------------------------


def test_a_task_that_never_ends_is_left_with_both_identifiers_and_ends_later(job):
    job.server.states = STATES[:6]
    with pytest.raises(TaskTimeoutError, match="Task 2221 has not ended after 600 s") as caught:
        job()
    handle = caught.value.handle
    assert (handle.taskid, handle.token) == ("2221", job.server.tasks["2221"]["socketaccesstoken"])
    assert caught.value.taskid == "2221"
    assert job.clock.time_s == pytest.approx(600)
    assert (job.row.state, job.row.status, job.names()) == ("started", "task_start", [])
    assert not {"Task/Cancel", "Task/Kill"} & set(job.server.paths())
    job.server.states = STATES
    assert_done(job, job())


def test_a_key_that_dies_in_mid_poll_stops_at_once_names_the_task_and_goes_on_with_a_good_one(job):
    def kill_key(task) -> None:
        if task.status == "task_start":
            job.server.key = "new-key"

    job.on_task = kill_key
    with pytest.raises(AuthError) as caught:
        job()
    polls = job.server.paths().count("Task/Detail")
    assert polls == STATES.index("task_start") + 2, "it is not asked again"
    assert (job.row.state, job.row.taskid, job.row.status) == ("started", "2221", "task_start")
    assert caught.value.taskid == "2221"
    assert job.names() == []
    job.client = make_client(job.server, job.clock, key="new-key")
    assert_done(job, job())


def test_the_longest_wait_is_one_wait_however_it_is_spent(job):
    asked_to_wait = {"status": 429, "headers": {"Retry-After": "250"}}
    job.server.states = STATES[:6]
    job.server.fail("Task/Detail", asked_to_wait, asked_to_wait)
    with pytest.raises(TaskTimeoutError):
        job()
    assert job.clock.time_s == pytest.approx(600)


def test_an_error_that_ends_a_wait_names_its_task(job):
    job.server.fail("Task/Detail", NO_KEY)
    with pytest.raises(AuthError, match="2221"):
        job()


# --- what ends a download -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("cut", "connection failed|bytes came"),
        ("short", "bytes came where Wiro names"),
        ("reset", "connection failed"),
        ("huge", "announced with 1099511627776 bytes"),
        (404, "HTTP 404"),
        (410, "HTTP 410"),
        (503, "HTTP 503"),
        (("redirect", "http://169.254.169.254/latest/meta-data"), "only https"),
        (("redirect", "https://169.254.169.254/latest/meta-data"), "not a public address"),
        (("redirect", "https://[fe80::1]/x"), "not a public address"),
        (("redirect", "file:///etc/passwd"), "only https"),
        (("redirect", "/files/2221/0.mp4"), "more than 3 redirects"),
        (("redirect", "https://[::1/x"), "URL is invalid"),
        (("redirect", "https://x.example:99999/x"), "URL is invalid"),
        (("redirect", f"https://{'a' * 70}.example/x"), "URL is invalid|not known"),
    ],
)
def test_a_download_that_fails_for_good_leaves_nothing_and_is_collected_later(job, fault, words):
    job.server.fail("GET 0.mp4", *[fault] * FOREVER)
    with pytest.raises(DownloadError, match=words) as caught:
        job()
    assert_paid_and_kept(job, caught)
    job.server._faults.clear()
    assert_done(job, job())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"<html>".ljust(len(CLIP)), "not an MP4 file"),
        (CLIP[: len(CLIP) // 2].ljust(len(CLIP), b"\0"), "does not decode|holds no video"),
        (CLIP[:32] + bytes(len(CLIP) - 32), "does not decode"),
    ],
    ids=["html", "half", "head"],
)
def test_a_video_that_is_none_is_not_kept_and_the_right_one_is_collected_later(job, content, words):
    job.server.files["0.mp4"] = content
    with pytest.raises(DownloadError, match=words) as caught:
        job()
    assert_paid_and_kept(job, caught)
    job.server.files["0.mp4"] = CLIP
    assert_done(job, job())


def test_a_disk_without_room_keeps_the_task_collectable(job, monkeypatch):
    open_path = Path.open

    def open_full(path, mode="r", *others, **more):
        file = open_path(path, mode, *others, **more)
        return Full(file) if path.suffix == ".part" and mode == "wb" else file

    monkeypatch.setattr(files.Path, "open", open_full)
    with pytest.raises(DownloadError, match="No space left.*make room.*it is paid for") as caught:
        job()
    assert_paid_and_kept(job, caught)
    monkeypatch.undo()
    assert_done(job, job())


class Full:
    """A file on a disk that takes ten bytes more."""

    def __init__(self, file) -> None:
        self._file = file

    def __enter__(self) -> "Full":
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def write(self, piece: bytes) -> int:
        self._file.write(piece[:10])
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_program_that_is_stopped_in_a_download_leaves_nothing_and_collects_it_later(
    job, monkeypatch
):
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "_check_container", stop)
    with pytest.raises(KeyboardInterrupt):
        job()
    assert (job.names(), job.row.state, job.row.files) == ([], "ended", ())
    monkeypatch.undo()
    assert_done(job, job())


def test_downloads_that_end_together_keep_a_file_each(server, tmp_path, monkeypatch):
    both_named, replace = threading.Barrier(2, timeout=2), files.os.replace

    def replace_together(*paths: Path) -> None:
        with contextlib.suppress(threading.BrokenBarrierError):
            both_named.wait()
        replace(*paths)

    monkeypatch.setattr(files.os, "replace", replace_together)
    paths: list[Path] = []

    def fetch() -> None:
        output = Output("0.mp4", "video/mp4", server.file_url("0.mp4"), None, "")
        paths.append(download(output, tmp_path, local_host=host_of(server)))

    threads = [threading.Thread(target=fetch) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(paths)) == len(list(tmp_path.iterdir())) == 2


def test_no_name_of_random_letters_leaves_its_folder_or_outgrows_a_disk():
    letters = "/\\.: \0\n%~$con\u202eü漢\U0001f600|?*\"<>'&;`\ud800-"
    dice = random.Random(0)
    for _ in range(2000):
        evil = "".join(dice.choices(letters, k=dice.randrange(400)))
        name = safe_name(Output(evil, "video/mp4", "", None, ""))
        assert name == Path(name).name not in ("", ".", "..")
        assert not set(name) & set('/\\:|?*"<>\0\n\u202e')
        assert len(name.encode()) <= 255
