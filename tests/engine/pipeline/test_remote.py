"""Jobs of a batch that go to Wiro: within a limit, paid for once, collected by whoever comes later.

Most tests answer in the place of `python -m wiro_api`; the last ones run it, against a loopback
server.
"""

import errno
import json
import os
import signal
import sys
import threading
import time
from argparse import Namespace
from decimal import Decimal
from pathlib import Path

import pytest
from comfyui_skyreels.skyreels.errors import OptionError, SkyReelsError
from comfyui_skyreels.skyreels.pipeline import batch, remote
from support.clip import make_clip
from support.wiro_server import KEY, SECRET, WiroServer

PICTURE = Path(__file__).resolve().parents[3] / "web" / "portrait.jpg"


def task_of(digest: str = "a", **changes) -> batch.Task:
    given = {"prompt": "FPS-24, a fox", "negative": None, "cfg": 6.0, "frames": 97, "width": 960,
             "height": 544, "steps": 30, "image": PICTURE}  # fmt: skip
    files = {"image": batch.file_digest(PICTURE)}
    return batch.Task(digest, Namespace(**{**given, **changes}), files, is_remote=True)


def make(runs: remote.RemoteRuns, *tasks, here=()) -> dict[str, batch.Ended]:
    return {each.digest: each for each in remote.beside(runs, tasks, iter(here), lambda: None)}


@pytest.fixture
def answered(tmp_path, monkeypatch):
    """Runs whose client answers from a dictionary; what it was asked is noted."""

    def prepare(limit="1", quote=None, run=None):
        quotes = {"price": "0.40", "was_sent": False} | (quote or {})
        asked = []

        def call(self, command, *words):
            asked.append((command, *words))
            if command == "quote":
                return quotes
            if isinstance(run, Exception):
                raise run
            place = Path(words[words.index("--out") + 1])
            place.mkdir(parents=True)
            (place / "0.mp4").write_bytes(b"paid")
            told = {"cost": "0.25", "elapsed_s": 3.0, "taskid": "1"}
            return {**told, "files": [str(place / "0.mp4")], **(run or {})}

        monkeypatch.setattr(remote.RemoteRuns, "_call", call)
        return remote.RemoteRuns(tmp_path, Decimal(limit), print), asked

    return prepare


def spent(folder: Path) -> dict:
    return json.loads((folder / remote.LEDGER).read_text())


def test_a_job_is_priced_written_down_run_and_copied(answered, tmp_path, monkeypatch):
    runs, asked = answered()
    noted = []
    monkeypatch.setattr(
        remote, "write_whole", lambda path, clip: noted.append((path, clip, spent(tmp_path)))
    )
    (ended,) = make(runs, task_of()).values()
    assert ended == batch.Ended("a", 3.0, "wiro.ai", 1)
    assert noted == [(tmp_path / "a.mp4", b"paid", {"a": "0.25"})]
    job = ["--param=prompt=FPS-24, a fox", "--param=negativePrompt=", "--param=scale=6.0",
           "--param=numFrames=97", "--param=size=960x544", "--param=steps=30",
           f"--file=inputImage={PICTURE}"]  # fmt: skip
    place = str(tmp_path / "wiro" / "a")
    assert asked == [
        ("quote", *job), ("run", *job, "--max-price", "0.40", "--out", place, "--wait"),
    ]  # fmt: skip


def test_the_price_is_on_disk_before_the_run_leaves(answered, tmp_path, monkeypatch):
    runs, _ = answered()
    call, seen = remote.RemoteRuns._call, []

    def watch(self, command, *words):
        if command == "run":
            seen.append(spent(tmp_path))
        return call(self, command, *words)

    monkeypatch.setattr(remote.RemoteRuns, "_call", watch)
    make(runs, task_of())
    assert seen == [{"a": "0.40"}]


def test_what_cannot_be_written_down_is_not_sent(answered, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    runs, asked = answered()
    monkeypatch.setattr(remote, "write_json", fail)
    (ended,) = make(runs, task_of()).values()
    assert "No space left on device" in ended.error
    assert [command for command, *_ in asked] == ["quote"]
    assert runs._ledger.total == 0


def test_what_would_pass_the_limit_is_not_sent(answered, tmp_path):
    runs, asked = answered(limit="0.9", run={"cost": "0.40"})
    told = make(runs, *(task_of(name) for name in "abc"))
    errors = [each.error for each in told.values() if each.error]
    assert errors == [
        "It would cost $0.40, and of --wiro-limit $0.90 the clips of this folder have taken $0.80. "
        "Nothing was sent: raise the limit."
    ]
    assert sum(command == "run" for command, *_ in asked) == 2
    assert spent(tmp_path).keys() == {name for name, each in told.items() if not each.error}


def test_the_limit_holds_for_the_folder_and_a_job_counts_once(answered, tmp_path):
    (tmp_path / remote.LEDGER).write_text('{"a": "0.40", "z": "0.30"}')
    runs, _ = answered(limit="0.75")
    told = make(runs, task_of("a"), task_of("b"))
    assert (told["a"].error, told["b"].error[:20]) == ("", "It would cost $0.40,")


def test_a_job_that_was_sent_before_costs_nothing_more(answered, tmp_path):
    runs, asked = answered(limit="0", quote={"was_sent": True, "price": None})
    (ended,) = make(runs, task_of()).values()
    assert ended.error == ""
    assert "--max-price" not in asked[-1]
    assert not (tmp_path / remote.LEDGER).exists()


def test_an_unknown_price_is_refused(answered):
    runs, asked = answered(quote={"price": None})
    (ended,) = make(runs, task_of()).values()
    assert "Its price on Wiro is not known before the run" in ended.error
    assert len(asked) == 1


@pytest.mark.parametrize(("was_sent", "counted"), [(False, "0"), (True, "0.40")])
def test_a_run_that_fails_counts_unless_nothing_was_sent(
    answered, tmp_path, monkeypatch, was_sent, counted
):
    runs, asked = answered(run=OptionError("No answer."))
    call = remote.RemoteRuns._call

    def later(self, command, *words):
        found = call(self, command, *words)
        return found if len(asked) == 1 else {**found, "was_sent": was_sent}

    monkeypatch.setattr(remote.RemoteRuns, "_call", later)
    (ended,) = make(runs, task_of()).values()
    assert ended.error == "No answer."
    assert spent(tmp_path) == {"a": counted}


def test_a_task_without_a_video_is_said(answered):
    runs, _ = answered(run={"files": ["x.txt"]})
    (ended,) = make(runs, task_of()).values()
    assert "Task 1 has ended, and none of its files is an .mp4" in ended.error


def test_a_ledger_that_cannot_be_read_stops_the_batch(tmp_path):
    for content in ("{", '{"a": "much"}', "[1]", '{"a": "-1"}', '{"a": null}'):
        (tmp_path / remote.LEDGER).write_text(content)
        with pytest.raises(OptionError, match="what was spent on Wiro is not known"):
            remote.RemoteRuns(tmp_path, Decimal(1), print)


@pytest.mark.parametrize("text", ["", "free", "-1", "nan", "inf"])
def test_an_amount_that_is_none_is_refused(text):
    with pytest.raises(OptionError, match=r"give US dollars, as 2\.50"):
        remote.parse_dollars(text)
    assert remote.parse_dollars(" $2.50 ") == Decimal("2.50")


def test_others_are_made_here_meanwhile(answered):
    runs, _ = answered()
    sent = threading.Event()
    call = remote.RemoteRuns._call

    def note(self, command, *words):
        sent.set()
        return call(self, command, *words)

    def here():
        assert sent.wait(60)
        yield batch.Ended("here")

    runs._call = note.__get__(runs)
    assert set(make(runs, task_of(), here=here())) == {"a", "here"}


def test_an_error_here_interrupts_what_runs_and_keeps_the_rest_from_being_sent(
    answered, monkeypatch, capsys
):
    monkeypatch.setattr(remote, "AT_ONCE", 1)
    runs, asked = answered()
    begun, interrupted = threading.Event(), threading.Event()

    class Program:
        def send_signal(self, number):
            interrupted.set()

        terminate = send_signal

    def wait(command, *words):
        asked.append(words)
        runs._programs.add(Program())
        begun.set()
        assert interrupted.wait(60)
        raise OptionError("Interrupted. Task 1 goes on at Wiro.")

    def here():
        assert begun.wait(60)
        raise SkyReelsError("the disk is full")
        yield

    runs._call = wait
    with pytest.raises(SkyReelsError, match="the disk is full"):
        make(runs, task_of("a"), task_of("b"), here=here())
    assert len(asked) == 1
    assert "goes on there; the same command collects it" in capsys.readouterr().out


@pytest.fixture
def server(tmp_path_factory, monkeypatch):
    with WiroServer(states=("task_postprocess_end",)) as server:
        server.files["0.mp4"] = make_clip()
        server.price = [{"inputs": [], "price": "0.30", "priceMethod": "cpr"}]
        server.schema = True
        settings = {
            "WIRO_API_KEY": KEY, "WIRO_API_SECRET": SECRET, "WIRO_API_BASE_URL": server.url,
            "WIRO_STATE_DIR": str(tmp_path_factory.mktemp("state")),
        }  # fmt: skip
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        yield server


def runs_of(server) -> int:
    return sum(seen.path.startswith("Run/") for seen in server.seen)


def test_a_clip_comes_from_wiro_and_is_paid_for_once(server, tmp_path):
    (ended,) = make(remote.RemoteRuns(tmp_path, Decimal(1), print), task_of()).values()
    assert ended.error == ""
    assert (tmp_path / "a.mp4").read_bytes() == server.files["0.mp4"]
    assert len(list((tmp_path / "wiro" / "a").glob("*.receipt.json"))) == 1
    (tmp_path / "a.mp4").unlink()  # as if the driver had been killed before the copy
    (again,) = make(remote.RemoteRuns(tmp_path, Decimal(0), print), task_of()).values()
    assert again.error == ""
    assert (tmp_path / "a.mp4").is_file()
    assert runs_of(server) == 1


def test_an_answer_that_is_lost_is_collected_by_the_next_batch(server, tmp_path, monkeypatch):
    server.fail("Run", "lost")
    (ended,) = make(remote.RemoteRuns(tmp_path, Decimal(1), print), task_of()).values()
    if ended.error:  # it was found at once, or is found now
        (ended,) = make(remote.RemoteRuns(tmp_path, Decimal(1), print), task_of()).values()
    assert ended.error == ""
    assert runs_of(server) == 1
    assert (tmp_path / "a.mp4").is_file()


@pytest.mark.skipif(sys.platform == "win32", reason="kill -9 is of POSIX")
def test_what_a_killed_batch_had_sent_is_collected(server, tmp_path):
    server.states, server.steps_by_itself = ("task_start", "task_postprocess_end"), False
    runs = remote.RemoteRuns(tmp_path, Decimal(1), print)
    ended = []
    batch_thread = threading.Thread(target=lambda: ended.extend(make(runs, task_of()).values()))
    batch_thread.start()
    deadline = time.monotonic() + 100
    while "Task/Detail" not in server.paths() and time.monotonic() < deadline:
        time.sleep(0.05)
    for program in [*runs._programs]:
        os.kill(program.pid, signal.SIGKILL)
    batch_thread.join(60)
    assert "ended with -9" in ended[0].error
    assert spent(tmp_path) == {"a": "0.3"}  # it was sent
    server.steps_by_itself = True
    (again,) = make(remote.RemoteRuns(tmp_path, Decimal("0.30"), print), task_of()).values()
    assert again.error == ""
    assert runs_of(server) == 1
    assert (tmp_path / "a.mp4").is_file()


def test_without_a_key_nothing_is_sent(server, tmp_path, monkeypatch):
    monkeypatch.setenv("WIRO_API_KEY", "")
    (ended,) = make(remote.RemoteRuns(tmp_path, Decimal(1), print), task_of()).values()
    assert "no Wiro API key" in ended.error
    assert server.seen == []
