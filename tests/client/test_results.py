"""What a task made comes home file by file: one that does not come costs no other."""

import json
from pathlib import Path
from typing import Any

import pytest
from comfyui_skyreels.wiro_api import cli, files, jobs
from comfyui_skyreels.wiro_api.client import RunHandle
from comfyui_skyreels.wiro_api.errors import DownloadError, TaskFailedError
from comfyui_skyreels.wiro_api.jobs import MISSING, files_here, finish
from comfyui_skyreels.wiro_api.journal import Journal
from support.clip import make_clip
from support.wiro_client import listening
from support.wiro_server import STATES

CLIP = make_clip()
CONTENTS = {"0.mp4": CLIP, "cover.svg": b"<svg/>", "log.txt": b"a log", "b.bin": b"\0\1\2"}


def outputs_of(server, *names: str) -> list[dict[str, Any]]:
    return [{"name": name, "url": server.file_url(name)} for name in names]


@pytest.fixture
def task(server, client, tmp_path):
    """A task that has made four files, its row, and what brings it home."""
    server.states, server.files = STATES[-1:], dict(CONTENTS)
    server.final = {"outputs": outputs_of(server, *CONTENTS)}
    return Task(server, client, tmp_path)


class Task:
    def __init__(self, server, client, root: Path) -> None:
        self.server, self.client, self.folder = server, client, root / "out"
        self.journal = Journal(root / "journal.sqlite")
        self.taskid = server.add_task({"prompt": "x"})
        self.row = self.journal.adopt(self.taskid, "wiro/SkyReels-V1").id

    def bring_home(self, **keywords: Any) -> list[str]:
        _, paths = finish(
            self.client,
            RunHandle(self.taskid, ""),
            self.folder,
            journal=self.journal,
            entry_id=self.row,
            **keywords,
        )
        assert [path.parent for path in paths] == [self.folder] * len(paths)
        return [path.name for path in paths]

    @property
    def noted(self) -> list[str]:
        return [path.name for path in self.journal.get(self.row).files]

    def names(self) -> list[str]:
        """Of the files in its folder, the receipt left aside."""
        names = (path.name for path in self.folder.iterdir())
        return sorted(name for name in names if not name.endswith(".receipt.json"))

    def fetched(self) -> int:
        count = len(self.server.fetched)
        self.server.fetched.clear()
        return count


@pytest.mark.parametrize("fault", [404, 410, "reset", "cut", ("redirect", "https://10.0.0.1/x")])
@pytest.mark.parametrize("bad", CONTENTS)
def test_a_file_that_does_not_come_costs_no_other(task, bad, fault):
    task.server.fail(f"GET {bad}", *[fault] * 100)
    good = [name for name in CONTENTS if name != bad]
    with pytest.raises(DownloadError) as caught:
        task.bring_home()
    error = caught.value
    assert f"1 of 4 files of task {task.taskid} cannot be fetched: {bad} (" in str(error)
    assert f"here are {', '.join(good)}. The task is done and paid for" in str(error)
    assert (error.taskid, error.missing) == (task.taskid, (bad,))
    assert [path.name for path in error.paths] == good
    assert task.names() == sorted(good)
    places = [f".{name}{MISSING}" if name == bad else name for name in CONTENTS]
    assert task.noted == places
    assert files_here(task.journal, task.journal.get(task.row)) == error.paths
    task.fetched()
    # the second time only what is missing is fetched, and nothing gets another name
    task.server._faults.clear()
    assert task.bring_home() == list(CONTENTS)
    assert (task.fetched(), task.names(), task.noted) == (1, sorted(CONTENTS), list(CONTENTS))
    assert task.bring_home() == list(CONTENTS)
    assert (task.fetched(), task.names()) == (0, sorted(CONTENTS))


def test_if_nothing_comes_nothing_is_noted(task):
    for name in CONTENTS:
        task.server.fail(f"GET {name}", *[410] * 100)
    with pytest.raises(DownloadError, match="4 of 4 files.*none is here"):
        task.bring_home()
    assert (task.noted, task.names()) == ([], [])


def test_files_that_are_late_are_waited_for_a_minute_together(task, clock):
    for name in CONTENTS:
        task.server.fail(f"GET {name}", *[404] * 100)
    with pytest.raises(DownloadError, match="4 of 4 files"):
        task.bring_home()
    assert clock.time_s == pytest.approx(60.0, abs=5.0)


@pytest.mark.parametrize("after", range(len(CONTENTS)))
def test_a_stop_keeps_what_has_come(task, after):
    def stop(done: int, total: int | None) -> None:
        if len(task.server.fetched) == after + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        task.bring_home(listener=listening(on_bytes=stop))
    assert task.names() == sorted(list(CONTENTS)[:after])
    entry = task.journal.get(task.row)
    assert [path.name for path in files_here(task.journal, entry)] == list(CONTENTS)[:after]
    assert files_here(task.journal, entry) != entry.files or not after, "more is to come"
    task.fetched()
    assert task.bring_home() == list(CONTENTS)
    assert task.fetched() == len(CONTENTS) - after


@pytest.mark.parametrize("gone", [["0.mp4"], ["log.txt", "b.bin"], list(CONTENTS)])
def test_what_was_deleted_here_is_fetched_again_alone(task, gone):
    task.bring_home()
    task.fetched()
    for name in gone:
        (task.folder / name).unlink()
    assert task.bring_home() == list(CONTENTS)
    assert (task.fetched(), task.names()) == (len(gone), sorted(CONTENTS))


def test_what_was_damaged_here_is_replaced_under_its_name(task):
    task.bring_home()
    (task.folder / "0.mp4").write_bytes(CLIP[:300])
    (task.folder / "b.bin").write_bytes(b"")
    task.fetched()
    assert task.bring_home() == list(CONTENTS)
    assert (task.fetched(), task.names()) == (2, sorted(CONTENTS))
    assert (task.folder / "0.mp4").read_bytes() == CLIP


def test_files_of_one_name_keep_their_places(task):
    task.server.files |= {"1/a.png": b"first", "2/a.png": b"second", "3/a.png": b"third"}
    record = [{"name": "a.png", "url": task.server.file_url(f"{n}/a.png")} for n in (1, 2, 3)]
    task.server.tasks[task.taskid]["outputs"] = record
    task.server.fail("GET 1/a.png", *[410] * 9)
    with pytest.raises(DownloadError, match="1 of 3"):
        task.bring_home()
    assert [(task.folder / n).read_bytes() for n in task.names()] == [b"third", b"second"]
    task.server._faults.clear()
    task.fetched()
    paths = task.bring_home()
    assert task.fetched() == 1
    assert [(task.folder / n).read_bytes() for n in paths] == [b"first", b"second", b"third"]


def test_a_name_that_went_to_another_tasks_file_is_not_taken_for_it(task):
    """In a folder of many tasks, as with --out."""
    task.server.tasks[task.taskid]["outputs"] = outputs_of(task.server, "0.mp4")
    assert task.bring_home() == ["0.mp4"]
    (task.folder / "0.mp4").unlink()
    first, other = task.row, make_clip(11)
    task.server.files["0.mp4"] = other
    task.taskid = task.server.add_task({"prompt": "y"})
    task.server.tasks[task.taskid]["outputs"] = outputs_of(task.server, "0.mp4")
    task.row = task.journal.adopt(task.taskid, "wiro/SkyReels-V1").id
    assert task.bring_home() == ["0.mp4"]
    assert (task.folder / "0.mp4").read_bytes() == other
    task.server.files["0.mp4"] = CLIP
    task.taskid, task.row = "2221", first
    assert files_here(task.journal, task.journal.get(first)) == ()
    assert task.bring_home() == ["0 (1).mp4"]
    assert (task.folder / "0.mp4").read_bytes() == other
    assert (task.folder / "0 (1).mp4").read_bytes() == CLIP


def test_a_record_that_lists_its_files_otherwise_is_not_mixed_up(task):
    task.bring_home()
    task.server.tasks[task.taskid]["outputs"].reverse()
    for name in task.bring_home():
        kind = next(known for known in CONTENTS if known.partition(".")[2] in name)
        assert (task.folder / name).read_bytes() == CONTENTS[kind]


@pytest.mark.parametrize("name", ["0.mp4", "a.bin"])
def test_a_file_that_does_not_decode_is_kept_and_told(task, caplog, name):
    content = CLIP[:40] + b"\1" * (len(CLIP) - 40) if name == "0.mp4" else b"anything"
    task.server.files[name] = content
    task.server.tasks[task.taskid]["outputs"] = outputs_of(task.server, name)
    looked: list[tuple[str, list[str]]] = []

    def verify(path: Path, output) -> None:
        looked.append((path.name, task.noted))
        cli.verify(path, output)
        raise DownloadError("it is of no use")

    assert task.bring_home(listener=listening(verify=verify)) == [name]
    assert (task.folder / name).read_bytes() == content
    assert looked == [(name, [name])], "it has its name, and stands in the journal, before"
    assert f"{name} of task {task.taskid} is kept, but: " in caplog.text


def test_a_task_whose_remote_files_are_gone_keeps_those_here_in_its_row(task):
    task.bring_home()
    task.server.tasks[task.taskid]["outputs"] = []
    with pytest.raises(TaskFailedError):
        task.bring_home()
    assert task.noted == list(CONTENTS)


def test_a_disk_that_is_full_for_one_file_takes_the_others(task, monkeypatch):
    fsync = files.os.fsync

    def full(number: int) -> None:
        if files.os.fstat(number).st_size == len(CLIP):
            raise OSError(28, "No space left on device")
        fsync(number)

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(DownloadError, match=r"0.mp4 \(.*No space left.*here are cover.svg"):
        task.bring_home()
    assert task.names() == sorted(set(CONTENTS) - {"0.mp4"})


def test_a_short_wait_for_a_task_is_a_short_patience_with_its_files(task, monkeypatch):
    seen = []
    monkeypatch.setattr(
        jobs, "download", lambda *_, behind_s, **__: seen.append(behind_s) or task.folder / "x"
    )
    task.bring_home(timeout_s=25)
    task.bring_home(timeout_s=1)
    task.bring_home(timeout_s=2400)
    assert sorted(set(seen)) == [10.0, 25.0, 60.0]


# --- the command line ---------------------------------------------------------------------------


def test_the_command_line_says_what_is_here_and_what_is_not(
    task, client, monkeypatch, capsys, tmp_path
):
    monkeypatch.setattr(cli, "make_client", lambda: client)
    monkeypatch.setenv("WIRO_API_BASE_URL", task.server.url)
    collect = ["collect", task.taskid, "--json", f"--out={tmp_path}",
               f"--journal={tmp_path / 'state' / 'j'}"]  # fmt: skip
    task.server.fail("GET 0.mp4", *[410] * 9)
    assert cli.main(collect) == 1
    told = json.loads(capsys.readouterr().out)
    assert "1 of 4 files of task 2221 cannot be fetched: 0.mp4" in told["error"]
    assert [Path(file).name for file in told["files"]] == ["cover.svg", "log.txt", "b.bin"]
    task.server._faults.clear()
    for fetched in (1, 0):
        task.fetched()
        assert cli.main(collect) == 0
        told = json.loads(capsys.readouterr().out)
        assert [Path(file).name for file in told["files"]] == list(CONTENTS)
        assert task.fetched() == fetched
