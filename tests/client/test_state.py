"""One journal and one set of limits for all programs of a user, wherever they lay before."""

import json
import os
import sqlite3
import subprocess
import sys
import threading
from decimal import Decimal
from pathlib import Path

import pytest
from comfyui_skyreels.wiro_api import state
from comfyui_skyreels.wiro_api.client import Client
from comfyui_skyreels.wiro_api.errors import ConfigError
from comfyui_skyreels.wiro_api.jobs import Job, start
from comfyui_skyreels.wiro_api.journal import Journal
from comfyui_skyreels.wiro_api.signing import Credentials, account_of
from comfyui_skyreels.wiro_api.spending import Limits, Price, load_limits, save_limits
from comfyui_skyreels.wiro_api.task import parse_task
from support.clip import make_clip
from support.forked import forks
from support.wiro_client import MODEL, PARAMETERS, make_client
from support.wiro_server import KEY, SECRET, WiroServer

ROOT = Path(__file__).resolve().parents[2]
TEN_CENTS = Price(Decimal("0.10"), is_exact=True)
SUCCESS = {"status": "task_postprocess_end", "pexit": "0", "outputs": [{"url": "https://x"}]}


@pytest.fixture
def user(tmp_path, monkeypatch) -> Path:
    """The user's folder for program state."""
    for name in ("XDG_STATE_HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(name, str(tmp_path / "state"))
    return tmp_path / "state" / "skyreels-wiro"


@pytest.fixture
def host(tmp_path) -> Path:
    """A ComfyUI's own folder."""
    return tmp_path / "comfyui" / "user" / "__skyreels"


def fill(file: Path, *jobs: str, state: str = "ended") -> Journal:
    """A journal with a row of each job, ten cents each."""
    journal = Journal(file)
    for number, job in enumerate(jobs):
        entry = journal.begin(job, str(MODEL))
        if state != "intent":
            journal.mark_sending(entry, str(MODEL), TEN_CENTS)
        if state in ("started", "ended"):
            journal.mark_started(entry.id, f"{number}{job}")
        if state == "ended":
            journal.mark_ended(entry.id, parse_task({"id": f"{number}{job}", **SUCCESS}))
    return journal


def jobs_in(folder: Path) -> list[str]:
    return sorted(entry.job for entry in Journal(folder / state.JOURNAL_NAME).newest(1000))


def limit(file: Path, **amounts: str) -> None:
    save_limits(file, Limits(**{name: Decimal(value) for name, value in amounts.items()}))


# --- where it lies ------------------------------------------------------------------------------


def test_the_command_lines_folder_is_the_users_until_a_host_shares_its_own(user, host, monkeypatch):
    assert state.state_folder() == user
    assert state.share(host) == host
    assert state.state_folder() == host
    monkeypatch.setenv(state.STATE_VARIABLE, str(user.parent / "elsewhere"))
    assert state.state_folder() == user.parent / "elsewhere"
    assert state.share(host) == user.parent / "elsewhere"


def test_a_second_host_uses_the_folder_of_the_first_until_that_is_gone(user, host, tmp_path):
    other = tmp_path / "other" / "__skyreels"
    fill(other / state.HOST_JOURNAL_NAME, "theirs")
    state.share(host)
    assert state.share(other) == host
    assert jobs_in(host) == ["theirs"]
    (host / state.JOURNAL_NAME).unlink()
    assert state.state_folder() == user
    assert state.share(other) == other
    assert state.state_folder() == other


@pytest.mark.parametrize("content", [b"", b"relative/folder", b"/nowhere/at/all", b"\0", b"\xff"])
def test_a_pointer_to_nothing_is_replaced(user, host, content):
    user.mkdir(parents=True)
    (user / state.POINTER_NAME).write_bytes(content)
    assert state.state_folder() == user
    assert state.share(host) == host
    assert state.state_folder() == host
    assert sorted(path.name for path in user.iterdir()) == ["folder", "folder.lock"]


@pytest.mark.skipif(sys.platform == "win32", reason="homes are elsewhere there")
def test_a_user_without_a_home_is_told_the_variable(host, monkeypatch, caplog):
    def nobody(*_: object) -> None:
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", nobody)
    with pytest.raises(ConfigError, match="no home folder.*WIRO_STATE_DIR"):
        state.state_folder()
    assert state.share(host) == host
    assert caplog.text.count("WIRO_STATE_DIR names a folder") == 1


def test_a_home_that_cannot_be_written_leaves_a_host_with_its_own(host, monkeypatch, caplog):
    monkeypatch.setenv("XDG_STATE_HOME", "/dev/null/state")
    fill(host / state.HOST_JOURNAL_NAME, "ours")
    assert state.share(host) == host
    assert caplog.text.count("shared with no other program") == 1
    assert jobs_in(host) == ["ours"]


@pytest.mark.parametrize("pointer", [None, b"/nowhere/at/all"])
def test_hosts_that_start_together_agree(user, tmp_path, pointer):
    if pointer is not None:
        user.mkdir(parents=True)
        (user / state.POINTER_NAME).write_bytes(pointer)
    homes = [tmp_path / f"comfyui-{number}" for number in range(6)]
    for number, home in enumerate(homes):
        fill(home / state.HOST_JOURNAL_NAME, f"job {number}")
    barrier, found = threading.Barrier(len(homes), timeout=30), []

    def share(home: Path) -> None:
        barrier.wait()
        found.append(state.share(home))

    threads = [threading.Thread(target=share, args=(home,)) for home in homes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(found) == {state.state_folder()}
    assert jobs_in(found[0]) == [f"job {number}" for number in range(6)]


# --- what is brought together -------------------------------------------------------------------


def test_old_files_of_both_come_together_once(user, host):
    fill(user / state.JOURNAL_NAME, "a", "b")
    fill(host / state.HOST_JOURNAL_NAME, "c")
    limit(user / state.LIMITS_NAME, per_run="1", per_day="5")
    limit(host / state.HOST_LIMITS_NAME, per_day="3", per_month="30")
    for _ in range(2):
        assert state.share(host) == host
        assert state.open_state() == host
    assert jobs_in(host) == ["a", "b", "c"]
    limits = load_limits(host / state.LIMITS_NAME)
    assert (limits.per_run, limits.per_day, limits.per_month) == (1, 3, 30)
    assert sorted(path.name for path in user.iterdir()) == [
        "folder", "folder.lock", "journal.sqlite.merged", "limits.json.merged",
    ]  # fmt: skip
    assert sorted(path.name for path in host.iterdir()) == [
        "journal.sqlite", "limits.json", "wiro_journal.sqlite.merged", "wiro_limits.json.merged",
    ]  # fmt: skip


def test_a_host_that_is_there_first_finds_what_the_command_line_leaves_later(user, host):
    state.share(host)
    fill(user / state.JOURNAL_NAME, "left by a program that was running")
    assert state.open_state() == host
    assert jobs_in(host) == ["left by a program that was running"]
    assert not (user / state.JOURNAL_NAME).exists()


def test_a_crash_between_copying_and_renaming_copies_nothing_twice(user, host, monkeypatch):
    fill(user / state.JOURNAL_NAME, "a", "b")
    fill(user / state.JOURNAL_NAME, "never sent", state="intent")
    limit(user / state.LIMITS_NAME, per_day="5")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(state, "_retire", lambda _: interrupt())
        state.share(host)
    assert (user / state.JOURNAL_NAME).exists()
    assert state.state_folder() == host, "the command line is on the new one already"
    rows = Journal(host / state.JOURNAL_NAME)
    rows.mark_ended(rows.newest()[0].id, parse_task({"id": "0a", **SUCCESS}), [host / "a.mp4"])
    state.share(host)
    assert jobs_in(host) == ["a", "b"], "what was never sent is not a run"
    assert any(entry.files for entry in rows.newest()), "and nothing is written over"


def interrupt() -> None:
    raise KeyboardInterrupt


def test_a_crash_in_the_middle_of_copying_loses_nothing(user, host, monkeypatch):
    fill(user / state.JOURNAL_NAME, "a", "b", "c")
    host.mkdir(parents=True)
    with sqlite3.connect(host / state.JOURNAL_NAME) as damaged:
        damaged.execute("CREATE TABLE other (x)")
    damaged.close()
    Journal(host / state.JOURNAL_NAME).make()
    with sqlite3.connect(host / state.JOURNAL_NAME) as damaged:  # the third row cannot be written
        damaged.execute(
            "CREATE TRIGGER full BEFORE INSERT ON jobs WHEN NEW.job = 'c' "
            "BEGIN SELECT RAISE(ABORT, 'disk full'); END"
        )
    damaged.close()
    assert state.share(host) == host
    assert jobs_in(host) == []
    assert jobs_in(user) == ["a", "b", "c"]


@pytest.mark.parametrize("content", [b"no database" * 100, b""])
def test_a_journal_that_cannot_be_read_stays_where_it_is(user, host, content, caplog):
    user.mkdir(parents=True)
    (user / state.JOURNAL_NAME).write_bytes(content)
    fill(host / state.HOST_JOURNAL_NAME, "ours")
    assert state.share(host) == host
    assert jobs_in(host) == ["ours"]
    if content:
        assert "cannot be merged" in caplog.text
        assert (user / state.JOURNAL_NAME).read_bytes() == content
        with pytest.raises(ConfigError, match="move the files away"):
            state.open_state()


def test_limits_that_cannot_be_read_go_on_stopping_the_spending(user, host):
    user.mkdir(parents=True)
    (user / state.LIMITS_NAME).write_text("{broken")
    limit(host / state.HOST_LIMITS_NAME, per_day="3")
    folder = state.share(host)
    with pytest.raises(ConfigError, match="set them again"):
        load_limits(folder / state.LIMITS_NAME)


def test_a_folder_that_is_reached_by_two_paths_is_merged_with_nothing(user, host, tmp_path):
    fill(host / state.HOST_JOURNAL_NAME, "ours")
    state.share(host)
    (tmp_path / "link").symlink_to(host)
    limit(host / state.LIMITS_NAME, per_day="3")
    state.share(tmp_path / "link")
    assert jobs_in(host) == ["ours"]
    assert (host / state.LIMITS_NAME).exists()


def test_a_folder_of_the_environment_takes_copies_and_leaves_what_is_elsewhere(
    user, host, tmp_path, monkeypatch
):
    monkeypatch.setenv(state.STATE_VARIABLE, str(tmp_path / "named"))
    fill(user / state.JOURNAL_NAME, "the user's")
    fill(host / state.HOST_JOURNAL_NAME, "the host's")
    limit(host / state.HOST_LIMITS_NAME, per_day="3")
    for per_day in ("3", "9"):
        assert state.share(host) == tmp_path / "named"
        assert jobs_in(tmp_path / "named") == ["the host's"]
        limits = load_limits(tmp_path / "named" / state.LIMITS_NAME)
        assert limits.per_day == Decimal(per_day)
        limit(tmp_path / "named" / state.LIMITS_NAME, per_day="9")
    assert (host / state.HOST_JOURNAL_NAME).exists()
    assert jobs_in(user) == ["the user's"]


# --- what comes of it ---------------------------------------------------------------------------


def test_what_one_program_has_paid_for_the_other_does_not_pay_again(user, host, clock):
    with WiroServer() as server:
        client = make_client(server, clock)
        for number, file in enumerate((user / state.JOURNAL_NAME, host / state.HOST_JOURNAL_NAME)):
            start(client, Journal(file), Job(MODEL, {**PARAMETERS, "steps": number}))
        folder = state.share(host)
        for number in range(2):
            journal = Journal(state.open_state() / state.JOURNAL_NAME)
            entry = start(client, journal, Job(MODEL, {**PARAMETERS, "steps": number}))
            assert entry.taskid == str(2221 + number)
        assert len(server.tasks) == 2
        assert journal.path.parent == folder


def test_a_paid_row_wins_over_a_refused_one_that_was_merged_later(user, host, clock):
    with WiroServer() as server:
        client = make_client(server, clock)
        start(client, Journal(host / state.HOST_JOURNAL_NAME), Job(MODEL, PARAMETERS))
        server.fail("Run", (97, "low"))
        with pytest.raises(Exception, match="low"):
            start(client, Journal(user / state.JOURNAL_NAME), Job(MODEL, PARAMETERS))
        journal = Journal(state.share(host) / state.JOURNAL_NAME)
        assert start(client, journal, Job(MODEL, PARAMETERS)).taskid == "2221"
        assert len(server.tasks) == 1


def test_sums_are_those_of_a_key_and_of_rows_that_tell_none(tmp_path):
    file = tmp_path / "journal.sqlite"
    one, other = (account_of(Credentials(key)) for key in ("key one", "key two"))
    assert one != other
    assert "key" not in one
    for number, account in enumerate((one, one, other, "")):
        entry = Journal(file).begin(f"job {number}", str(MODEL), account=account)
        Journal(file).mark_sending(entry, str(MODEL), TEN_CENTS)
    sums = [Journal(file, account=account).spent().day for account in (one, other, "")]
    assert sums == [Decimal("0.30"), Decimal("0.20"), Decimal("0.40")]
    assert Journal(file, account=other).spent(but=1).day == Decimal("0.20"), "on the key of row 1"


def test_the_job_of_another_key_is_gone_on_with_if_it_is_the_same_account_and_else_run(
    tmp_path, clock
):
    journal = Journal(tmp_path / "journal.sqlite", now=clock.now)
    with WiroServer() as server:
        start(make_client(server, clock), journal, Job(MODEL, PARAMETERS))
        server.key = "a new key of the account"
        fresh = make_client(server, clock, key=server.key)
        assert start(fresh, journal, Job(MODEL, PARAMETERS)).taskid == "2221"
        server.fail("Task/Detail", (1, "There is no task yet."))  # of somebody else's account
        assert start(fresh, journal, Job(MODEL, PARAMETERS)).taskid == "2222"
        assert start(fresh, journal, Job(MODEL, PARAMETERS)).taskid == "2222"
        assert len(server.tasks) == 2


# --- the command line ---------------------------------------------------------------------------


def wiro(*arguments: str, **changes: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "WIRO_API_KEY": KEY, "WIRO_API_SECRET": SECRET, **changes}
    environment = {name: value for name, value in environment.items() if value}
    return forks("support.wiro_program").run(["-m", "wiro_api", *arguments], environment)


def test_the_command_line_knows_what_a_host_has_paid_for_and_its_limits(user, host, clock):
    run = ["run", "acme/other", "--param=prompt=x", "--out", str(host.parent)]
    price = [{"inputs": [], "price": "0.30", "priceMethod": "cpr"}]
    ended = ("task_postprocess_end",)
    with WiroServer(states=ended, slugs=("acme/other",), price=price) as server:
        server.files["0.mp4"] = make_clip()
        address = {"WIRO_API_BASE_URL": server.url}
        journal = Journal(state.share(host) / state.JOURNAL_NAME)
        first = wiro(*run, "--json", **address)
        assert first.returncode == 0, first.stderr
        assert [entry.taskid for entry in journal.newest()] == ["2221"]
        assert "--again pays" in wiro(*run, **address).stderr
        own = host.parent / "own.sqlite"
        assert wiro(*run, f"--journal={own}", **address).returncode == 0
        assert len(server.tasks) == 2
        assert (
            json.loads(wiro("limits", "--per-day=7", "--json").stdout)["limits"]["per_day"] == "7"
        )
        assert load_limits(host / state.LIMITS_NAME).per_day == Decimal(7)


@pytest.mark.skipif(sys.platform == "win32", reason="homes are elsewhere there")
def test_a_command_without_a_home_is_one_sentence_and_others_need_none():
    with WiroServer() as server:
        nowhere = {"WIRO_API_BASE_URL": server.url, "XDG_STATE_HOME": "", "HOME": "relative"}
        done = wiro("run", "acme/other", "--param=prompt=x", "--json", **nowhere)
        assert done.returncode == 1
        assert "set WIRO_STATE_DIR" in json.loads(done.stdout)["error"]
        assert "Traceback" not in done.stderr
        assert wiro("list", **nowhere).returncode == 0
        assert server.tasks == {}
        named = {**nowhere, "WIRO_STATE_DIR": "/dev/null/state"}
        assert "/dev/null/state" in json.loads(wiro("limits", "--json", **named).stdout)["error"]


def test_clients_of_one_key_have_one_account(clock):
    with WiroServer() as server:
        ours = make_client(server, clock)
        assert ours.account == Client(Credentials(KEY), base_url=server.url).account
