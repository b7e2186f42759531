"""The journal: whatever happens to a program, a job is sent once."""

import sqlite3
import stat
import subprocess
import threading
import time
from contextlib import closing

import pytest
from comfyui_skyreels.wiro_api import journal as journal_module
from comfyui_skyreels.wiro_api.client import Model
from comfyui_skyreels.wiro_api.errors import BalanceError, ConfigError, RunOutcomeUnknownError
from comfyui_skyreels.wiro_api.jobs import Job, find, job_key, start, to_handle
from comfyui_skyreels.wiro_api.journal import Journal, LostEntryError
from support.wiro_client import MODEL, PARAMETERS, Clock, listening, make_client
from support.wiro_server import NOW

FILE = ("inputImage", ("a.png", b"picture", "image/png"))


@pytest.fixture
def journal(tmp_path, clock):
    return Journal(tmp_path / "state" / "journal.sqlite", now=clock.now)


def runs(server) -> int:
    return sum(path.startswith("Run/") for path in server.paths())


def test_a_job_is_known_by_its_contents():
    key = job_key(Job(MODEL, PARAMETERS, [FILE]))
    assert key == job_key(
        Job(Model("WIRO", "skyreels-v1"), dict(reversed(PARAMETERS.items())), [FILE])
    )
    renamed = ("inputImage", ("b.png", b"picture", "image/png"))
    assert key == job_key(Job(MODEL, PARAMETERS, [renamed]))
    others = [
        job_key(Job(MODEL, {**PARAMETERS, "steps": 31}, [FILE])),
        job_key(Job(MODEL, PARAMETERS, [])),
        job_key(Job(MODEL, PARAMETERS, [("inputImage", ("a.png", b"other", "image/png"))])),
        job_key(Job(Model("wiro", "other"), PARAMETERS, [FILE])),
        job_key(Job(MODEL, PARAMETERS, [FILE], take=2)),
        job_key(Job(MODEL, PARAMETERS, [FILE]), service="http://127.0.0.1:1/v1"),
    ]
    assert len({key, *others}) == 7


def test_a_job_goes_through_its_states_and_is_found_again(server, client, journal):
    entry = start(client, journal, Job(MODEL, PARAMETERS))
    assert (entry.state, entry.taskid) == ("started", "2221")
    again = start(client, journal, Job(MODEL, PARAMETERS))
    assert (again.state, again.taskid) == ("started", "2221")
    *_, task = client.watch(to_handle(again))
    journal.mark_ended(again.id, task, [journal.path])
    done = start(client, journal, Job(MODEL, PARAMETERS))
    assert (done.state, done.verdict, done.cost) == ("ended", "succeeded", "0.00351")
    assert done.files == (journal.path,)
    assert runs(server) == 1


def test_the_intent_is_on_disk_before_anything_is_sent(server, client, journal):
    states = []
    send = journal.mark_sending

    def spy(entry, *others):
        states.append(journal.newest()[0].state)
        send(entry, *others)
        states.append(journal.newest()[0].state)
        assert runs(server) == 0

    journal.mark_sending = spy
    start(client, journal, Job(MODEL, PARAMETERS))
    assert states == ["intent", "sending"]


def test_a_job_that_was_never_sent_is_sent(server, client, journal):
    journal.begin(
        job_key(Job(MODEL, PARAMETERS), service=server.url), str(MODEL)
    )  # and the program ends
    assert start(client, journal, Job(MODEL, PARAMETERS)).taskid == "2221"
    assert runs(server) == 1
    assert len(journal.newest()) == 1


def test_a_job_that_was_sent_and_not_answered_is_looked_up(server, client, journal):
    entry = journal.begin(job_key(Job(MODEL, PARAMETERS), service=server.url), str(MODEL))
    journal.mark_sending(entry, baseline="2220")
    server.add_task(dict(PARAMETERS))  # the Run arrived, and the program ended
    found = start(client, journal, Job(MODEL, PARAMETERS))
    assert (found.state, found.taskid) == ("started", "2221")
    assert runs(server) == 0


def test_a_job_that_was_sent_and_cannot_be_found_asks_and_is_sent_anew_if_told(
    server, client, journal
):
    entry = journal.begin(job_key(Job(MODEL, PARAMETERS), service=server.url), str(MODEL))
    journal.mark_sending(entry)
    for _ in range(2):
        with pytest.raises(RunOutcomeUnknownError, match="before running again"):
            start(client, journal, Job(MODEL, PARAMETERS))
    assert runs(server) == 0
    assert start(client, journal, Job(MODEL, PARAMETERS), again=True).taskid == "2221"
    assert runs(server) == 1


def test_a_task_of_another_row_is_not_taken_for_the_lost_one(server, client, journal):
    start(client, journal, Job(MODEL, PARAMETERS))
    server.fail("Run", "lost")
    entry = start(client, journal, Job(MODEL, PARAMETERS), again=True)
    assert entry.taskid == "2222"
    assert runs(server) == 2


def test_a_refused_job_may_be_tried_again(server, client, journal):
    server.fail("Run", (97, "balance too low"))
    with pytest.raises(BalanceError):
        start(client, journal, Job(MODEL, PARAMETERS))
    assert journal.newest()[0].state == "refused"
    assert start(client, journal, Job(MODEL, PARAMETERS)).state == "started"


def test_a_job_is_found_without_asking_if_it_was_sent_and_only_then(server, client, journal):
    def found(**changes):
        entry = find(client, journal, Job(MODEL, PARAMETERS, [FILE], **changes))
        return None if entry is None else entry.state

    class LeftError(Exception):
        pass

    def leave(error, wait_s, sleep):
        assert (wait_s, runs(server)) == (5.0, 1)
        raise LeftError

    assert found() is None
    server.fail("Run", (96, "You have reached your concurrency limit."))
    with pytest.raises(LeftError):
        start(
            client,
            journal,
            Job(MODEL, PARAMETERS, [FILE]),
            wait_when_busy=True,
            listener=listening(on_busy=leave),
        )
    assert journal.newest()[0].state == "intent"
    assert found() is None
    server.fail("Run", (97, "Your balance is too low to run this model."))
    with pytest.raises(BalanceError):
        start(client, journal, Job(MODEL, PARAMETERS, [FILE]))
    assert found() is None
    entry = start(client, journal, Job(MODEL, PARAMETERS, [FILE]))
    assert (found(), found(take=2)) == ("started", None)
    journal.mark_ended(entry.id, client.stop(to_handle(entry)))
    asked = len(server.seen)
    assert found() is None, "a cancelled run may be run again"
    assert len(server.seen) == asked


def test_two_programs_with_one_job_send_it_once(server, clock, journal):
    other = Journal(journal.path, now=clock.now)
    mine = journal.begin("job", "m")
    theirs = other.begin("job", "m")
    assert mine.id == theirs.id
    other.mark_sending(theirs)
    with pytest.raises(LostEntryError):
        journal.mark_sending(mine)


def test_many_threads_with_one_job_send_it_once(server, journal):
    taskids, errors = [], []

    class Patient(Clock):
        """The others get a moment to go on."""

        def sleep(self, seconds: float) -> None:
            super().sleep(seconds)
            time.sleep(0.005)

    def work(number: int) -> None:
        clock = Patient()
        clock.sleep(number / 10)  # nonces are milliseconds, and the service takes each once
        try:
            entry = start(
                make_client(server, clock),
                Journal(journal.path, now=clock.now),
                Job(MODEL, PARAMETERS),
            )
            taskids.append(entry.taskid)
        except RunOutcomeUnknownError as error:  # looked it up before the other's Run arrived
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(taskids) == {"2221"}
    assert len(taskids) + len(errors) == 8
    assert runs(server) == 1


@pytest.mark.parametrize("damage", [b"", b"not a database at all" * 100])
def test_a_damaged_journal_starts_nothing_and_says_what_to_do(server, client, journal, damage):
    start(client, journal, Job(MODEL, PARAMETERS))
    journal.path.write_bytes(damage)
    if not damage:  # an empty file is a new journal
        assert start(client, journal, Job(MODEL, {**PARAMETERS, "steps": 1})).state == "started"
        return
    with pytest.raises(ConfigError, match="Move the file away"):
        start(client, journal, Job(MODEL, PARAMETERS), again=True)
    assert runs(server) == 1


def test_a_journal_that_fails_later_does_not_cost_the_result(server, client, journal, caplog):
    entry = start(client, journal, Job(MODEL, PARAMETERS))
    journal.path.write_bytes(b"not a database at all" * 100)
    *_, task = client.watch(to_handle(entry))
    journal.mark_seen(entry.id, "task_start")
    journal.mark_ended(entry.id, task)
    assert "could not be written" in caplog.text
    assert journal.newest() == []


def test_a_disk_without_room_starts_nothing(server, client, journal, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(journal_module.os, "open", full)
    with pytest.raises(ConfigError, match="No space left"):
        start(client, journal, Job(MODEL, PARAMETERS))
    assert server.seen == []


def test_it_is_for_its_owner_only_and_holds_no_secret(server, client, journal):
    entry = start(client, journal, Job(MODEL, {**PARAMETERS, "prompt": "planted-prompt"}, [FILE]))
    *_, task = client.watch(to_handle(entry))
    journal.mark_ended(entry.id, task)
    assert stat.S_IMODE(journal.path.stat().st_mode) == 0o600
    content = b"".join(p.read_bytes() for p in journal.path.parent.iterdir())
    token = server.tasks["2221"]["socketaccesstoken"].encode()
    for secret in (b"test-key", b"test-secret", token, b"access-secret", b"planted-prompt"):
        assert secret not in content


def test_times_are_the_clocks(journal, clock):
    entry = journal.begin("job", "m")
    assert (entry.created_at, entry.sent_at) == (NOW, None)
    clock.time_s = 5
    journal.mark_sending(entry)
    assert journal.newest()[0].sent_at == NOW + 5


def test_the_file_is_an_ordinary_sqlite_file(journal):
    journal.begin("job", "m")
    code = (
        "import sqlite3, sys; "
        "print(sqlite3.connect(sys.argv[1]).execute('select state from jobs').fetchall())"
    )
    import sys

    run = subprocess.run(
        [sys.executable, "-c", code, str(journal.path)], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[('intent',)]"


def test_the_loser_of_a_race_does_not_overwrite_what_the_winner_has_started(journal, clock):
    mine = journal.begin("job", "m")
    theirs = journal.begin("job", "m")
    journal.mark_sending(theirs)
    journal.mark_started(theirs.id, "2221")
    assert journal.mark_refused(mine, "no place") is False
    assert journal.mark_waiting(mine) is False
    row = journal.get(mine.id)
    assert (row.state, row.taskid, row.error) == ("started", "2221", "")


def test_a_row_that_is_answered_while_it_is_looked_for_is_gone_on_with(server, client, journal):
    entry = journal.begin(job_key(Job(MODEL, PARAMETERS), service=server.url), str(MODEL))
    journal.mark_sending(entry)
    server.add_task(dict(PARAMETERS))
    listed = journal.known_taskids

    def answered(but=0):
        journal.mark_started(entry.id, "2221")
        return listed(but)

    journal.known_taskids = answered
    assert start(client, journal, Job(MODEL, PARAMETERS)).taskid == "2221"
    assert runs(server) == 0


def test_a_listed_task_that_tells_nothing_of_itself_is_not_taken_for_ours(server, client, journal):
    entry = journal.begin(job_key(Job(MODEL, PARAMETERS), service=server.url), str(MODEL))
    journal.mark_sending(entry)
    server.tasks[server.add_task({})] |= {"parameters": "no JSON", "modelslugowner": ""}
    with pytest.raises(RunOutcomeUnknownError):
        start(client, journal, Job(MODEL, PARAMETERS))


def test_an_end_without_exit_code_and_files_is_not_paid_for_again_unasked(server, client, journal):
    server.states, server.final = ("task_postprocess_end",), {"pexit": "", "outputs": []}
    entry = start(client, journal, Job(MODEL, PARAMETERS))
    *_, task = client.watch(to_handle(entry))
    journal.mark_ended(entry.id, task)
    assert start(client, journal, Job(MODEL, PARAMETERS)).id == entry.id
    assert runs(server) == 1


def test_a_row_that_cannot_be_read_stops_neither_the_list_nor_the_others(journal):
    journal.begin("job", "m")
    with sqlite3.connect(journal.path) as connection:
        connection.execute("UPDATE jobs SET files = '{'")
    connection.close()
    assert journal.newest()[0].files == ()


@pytest.mark.parametrize("lost", ["users", "jobs"])
def test_a_table_that_a_file_lacks_is_made_and_the_other_stays(journal, lost):
    entry = journal.begin("job", str(MODEL))
    with closing(sqlite3.connect(journal.path)) as connection:
        connection.execute(f"DROP TABLE {lost}")
    assert len(journal.newest()) == (lost == "users")
    journal.note_user(entry.id, "anna")
    assert journal.rows_of("anna") == {entry.id}
    assert journal.begin("another", str(MODEL)).baseline == ""
