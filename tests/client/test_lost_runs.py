"""A Run that was sent and not answered: which task is taken for it, and when a person is asked."""

import itertools
import json
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from comfyui_skyreels.wiro_api import candidates as wiro
from comfyui_skyreels.wiro_api.candidates import newest_id, number_of
from comfyui_skyreels.wiro_api.client import Client, Model
from comfyui_skyreels.wiro_api.errors import RunOutcomeUnknownError
from comfyui_skyreels.wiro_api.jobs import Job, job_key, start
from comfyui_skyreels.wiro_api.journal import ABANDONED_S, Journal
from comfyui_skyreels.wiro_api.signing import Credentials
from comfyui_skyreels.wiro_api.task import parse_task
from support.wiro_client import MODEL, PARAMETERS, listening, make_client
from support.wiro_replies import URL
from support.wiro_server import NOW, WiroServer
from support.wiro_sim import Service, World

ROOT = Path(__file__).resolve().parents[2]
OURS = ("inputImage", ("a.png", b"\x89PNG our picture", "image/png"))
THEIRS = ("inputImage", ("b.png", b"\x89PNG their picture", "image/png"))
TWO = [OURS, ("inputImage", ("c.png", b"\x89PNG second", "image/png"))]


@pytest.fixture
def journal(tmp_path, clock):
    return Journal(tmp_path / "journal.sqlite", now=clock.now)


def runs(server) -> int:
    return sum(path.startswith("Run/") for path in server.paths())


def uploads(*files) -> list[tuple[str, str, str, bytes]]:
    return [(name, filename, kind, content) for name, (filename, content, kind) in files]


def add_theirs(server, *files, **changes) -> str:
    """A task of somebody else on the key, with our parameters."""
    return server.add_task({**PARAMETERS, **changes}, uploads=uploads(*files))


def run_lost(client, server, files=(), foreign=(), fault="lost", **keywords):
    """A Run whose answer is lost, while others start tasks on the key."""
    server.fail("Run", fault)

    def others_start(_: str) -> None:
        for theirs in foreign:
            add_theirs(server, *theirs)

    return client.run(MODEL, PARAMETERS, files, before_sending=others_start, **keywords)


# --- the files are the proof --------------------------------------------------------------------


@pytest.mark.parametrize("foreign", [[[THEIRS]], [[THEIRS]] * 3, [[]], [TWO]])
def test_a_dropped_run_is_not_given_the_task_of_another_picture(server, client, foreign):
    with pytest.raises(RunOutcomeUnknownError):
        run_lost(client, server, [OURS], foreign, fault="reset")
    assert runs(server) == 1


@pytest.mark.parametrize("foreign", [[], [[THEIRS]], [[THEIRS]] * 3, [[]], [TWO]])
def test_the_task_with_our_picture_is_found_among_others_at_once(server, client, clock, foreign):
    handle = run_lost(client, server, [OURS], foreign)
    assert handle.taskid == str(2221 + len(foreign))
    assert clock.time_s == wiro.RECONCILE_AT_S[0]
    for headers in server.fetched_inputs:
        assert not {"x-api-key", "x-nonce", "x-signature", "cookie", "authorization"} & set(headers)


def test_two_tasks_with_our_picture_are_asked_about(server, client):
    with pytest.raises(RunOutcomeUnknownError, match="2222, 2221; nothing proves which"):
        run_lost(client, server, [OURS], [[OURS]])


def test_a_service_that_stores_other_bytes_proves_nothing(server, client):
    server.fail("Run", "lost")
    real = server._store

    def reencode(number, files):
        return real(number, [(name, f, kind, b"re-encoded") for name, f, kind, _ in files])

    server._store = reencode
    with pytest.raises(RunOutcomeUnknownError, match="2221.*collect ID") as caught:
        client.run(MODEL, PARAMETERS, [OURS])
    assert [task.taskid for task in caught.value.candidates] == ["2221"]


@pytest.mark.parametrize("faults", [[404], [503, "reset"], ["cut"], [404, "cut", "reset", 403]])
def test_a_stored_picture_that_is_not_there_yet_is_asked_for_again(server, client, clock, faults):
    server.fail("GET inputImage-1.png", *faults)
    assert run_lost(client, server, [OURS]).taskid == "2221"
    assert clock.time_s == wiro.RECONCILE_AT_S[len(faults)]


@pytest.mark.parametrize("fault", [404, "reset", "cut", ("redirect", "http://127.0.0.1:9/x"),
                                   ("redirect", "https://elsewhere.example/x")])  # fmt: skip
def test_a_stored_picture_that_cannot_be_had_proves_nothing(server, client, fault):
    server.fail("GET inputImage-1.png", *[fault] * 20)
    with pytest.raises(RunOutcomeUnknownError, match="2221"):
        run_lost(client, server, [OURS])


@pytest.mark.parametrize("fault", ["huge", "short", "chunked", "unsized"])
def test_no_more_of_a_stored_picture_is_read_than_is_compared(server, client, fault):
    server.fail("GET inputImage-1.png", *[fault] * 20)
    if fault in ("huge", "short"):  # another length is another file
        with pytest.raises(RunOutcomeUnknownError):
            run_lost(client, server, [OURS])
        assert len(server.fetched_inputs) == 1
    else:
        assert run_lost(client, server, [OURS]).taskid == "2221"


def test_an_endless_stored_picture_is_left(server, client):
    longer = ("inputImage", ("b.png", OURS[1][1] + bytes(10_000_000), "image/png"))
    server.fail("GET inputImage-1.png", "chunked")
    with pytest.raises(RunOutcomeUnknownError):
        run_lost(client, server, [OURS], [[longer]], fault="reset")


@pytest.mark.parametrize(
    "address",
    ["http://169.254.169.254/a.png", "https://elsewhere.example/a.png", "file:///etc/passwd",
     "https://wiro.ai.elsewhere.example/a.png", "http://127.0.0.1:9/a.png", "https://[::1/a.png",
     "http://user@127.0.0.1/a.png", "", "x" * 5000, None, 7, [], {}, [["x"]], "[", "[1, 2]"],
)  # fmt: skip
def test_nothing_is_fetched_from_elsewhere(server, client, address):
    def theirs(_: str) -> None:
        server.tasks[add_theirs(server)]["parameters"]["inputImage"] = address

    server.fail("Run", "reset")
    with pytest.raises(RunOutcomeUnknownError):
        client.run(MODEL, PARAMETERS, [OURS], before_sending=theirs)
    assert server.fetched_inputs == []


@pytest.mark.parametrize("foreign", [[OURS], [*TWO, THEIRS], list(reversed(TWO)), [OURS, THEIRS]])
def test_all_files_of_a_run_are_compared_in_order(server, client, foreign):
    assert run_lost(client, server, TWO, [foreign]).taskid == "2222"
    with pytest.raises(RunOutcomeUnknownError):
        run_lost(client, server, TWO, [foreign], fault="reset")


def test_a_picture_by_address_is_a_parameter_like_others(server, client):
    given = {**PARAMETERS, "inputImageUrl": "https://x.example/a.png"}
    server.fail("Run", "lost")

    def other(_: str) -> None:
        add_theirs(server, inputImageUrl="https://x.example/b.png")

    assert client.run(MODEL, given, before_sending=other).taskid == "2222"


# --- other rows of this journal -----------------------------------------------------------------


def pend(journal, files=(), model=MODEL, take=1, service="x", **changes):
    """A row of another program whose Run has not been answered."""
    parameters = {**PARAMETERS, **changes}
    key, inputs = (
        job_key(Job(model, parameters, files, take=number), service=service) for number in (take, 0)
    )
    entry = journal.begin(key, str(model), inputs=inputs)
    journal.mark_sending(entry, baseline="1")
    return entry


def test_without_files_the_only_task_is_taken_at_the_last_look(server, client, journal, clock):
    server.fail("Run", "lost")
    assert start(client, journal, Job(MODEL, PARAMETERS)).taskid == "2221"
    assert clock.time_s == wiro.RECONCILE_AT_S[-1]


@pytest.mark.parametrize("slug", ["wiro/SkyReels-V1", "WIRO/skyreels-v1"])
def test_without_files_no_task_is_taken_while_another_run_of_the_model_is_unanswered(
    server, client, journal, clock, slug
):
    other = pend(journal, model=Model.parse(slug), prompt="another")
    server.fail("Run", "lost")
    with pytest.raises(RunOutcomeUnknownError, match="2221"):
        start(client, journal, Job(MODEL, PARAMETERS))
    journal.mark_started(other.id, "2000")  # it has heard
    assert start(client, journal, Job(MODEL, PARAMETERS)).taskid == "2221"
    assert runs(server) == 1


def test_an_unanswered_run_of_another_model_or_of_another_day_is_not_in_the_way(
    server, client, journal, clock
):
    pend(journal)
    clock.time_s += ABANDONED_S + 1
    pend(journal, model=Model("acme", "other"))
    server.fail("Run", "lost")
    assert start(client, journal, Job(MODEL, PARAMETERS)).taskid == "2221"


def test_with_proof_only_another_take_of_the_same_inputs_is_in_the_way(server, client, journal):
    pend(journal, [THEIRS], service=server.url)
    server.fail("Run", "lost")
    assert start(client, journal, Job(MODEL, PARAMETERS, [OURS])).taskid == "2221"
    other = pend(journal, [OURS], take=2, service=server.url)
    server.fail("Run", "reset")
    with pytest.raises(RunOutcomeUnknownError, match="2222"):
        start(
            client,
            journal,
            Job(MODEL, PARAMETERS, [OURS], take=3),
            listener=listening(check=lambda: add_theirs(server, OURS)),
        )
    journal.mark_started(other.id, "2222")
    with pytest.raises(RunOutcomeUnknownError, match="be it: none"):
        start(client, journal, Job(MODEL, PARAMETERS, [OURS], take=3))


def test_a_task_that_a_person_has_collected_by_its_id_may_still_be_found(server, client, journal):
    server.fail("Run", "lost")

    def collect(_: float) -> None:
        if server.tasks:
            journal.adopt("2221", str(MODEL))

    client.sleep = collect
    assert start(client, journal, Job(MODEL, PARAMETERS, [OURS])).taskid == "2221"


def test_one_of_many_takes_a_task(journal):
    entries = [pend(journal, [OURS], prompt=str(number)) for number in range(12)]
    taken = []

    def take(entry) -> None:
        own = Journal(journal.path, now=journal._now)
        if own.claim(entry, "2221", is_proved=True):
            taken.append(entry.id)

    threads = [threading.Thread(target=take, args=(entry,)) for entry in entries]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 1
    assert [entry.id for entry in journal.newest() if entry.taskid == "2221"] == taken


def test_an_answer_that_comes_late_is_not_lost_to_a_caller_that_has_left(server, journal):
    class LeftError(Exception):
        pass

    def leave(seconds: float) -> None:
        if server.tasks:
            raise LeftError

    server.fail("Run", ("silent", 0.3))
    client = Client(
        Credentials("test-key", "test-secret"), base_url=server.url, sleep=leave,
        interruptible=True,
    )  # fmt: skip
    with pytest.raises(LeftError):
        start(client, journal, Job(MODEL, PARAMETERS))
    assert journal.newest()[0].state == "sending"
    end = time.monotonic() + 20
    while journal.newest()[0].state == "sending" and time.monotonic() < end:
        time.sleep(0.02)
    assert (journal.newest()[0].state, journal.newest()[0].taskid) == ("started", "2221")


def test_a_late_answer_does_not_bring_back_a_task_that_was_found_and_has_ended(journal):
    entry = pend(journal, [OURS])
    assert journal.claim(entry, "2221", is_proved=True)
    journal.mark_ended(entry.id, parse_task({"id": "2221", "status": "task_cancel"}))
    journal.mark_started(entry.id, "2221")
    assert journal.get(entry.id).state == "ended"
    journal.mark_started(entry.id, "2222")  # what the service answered is right
    assert (journal.get(entry.id).state, journal.get(entry.id).taskid) == ("started", "2222")


# --- no clock, no list, no newer row ------------------------------------------------------------


@pytest.mark.parametrize("offset_s", [-86_400, -600, -61, 0, 61, 600, 86_400, -NOW, 10**10])
@pytest.mark.parametrize("files", [[OURS], []], ids=["file", "no file"])
def test_no_clock_matters(clock, journal, offset_s, files):
    with WiroServer(now=lambda: NOW + offset_s) as server:
        client = make_client(server, clock)
        old = add_theirs(server, *files)
        server.fail("Run", "lost", "lost")
        assert start(client, journal, Job(MODEL, PARAMETERS, files)).taskid == str(int(old) + 1)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(client, "sleep", interrupt)  # the program ends
            start(client, journal, Job(MODEL, PARAMETERS, files, take=2))
        assert journal.newest()[0].state == "sending"
        again = start(make_client(server, clock), journal, Job(MODEL, PARAMETERS, files, take=2))
        assert again.taskid == str(int(old) + 2)
        assert runs(server) == 2


def interrupt(_: float) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "fault", ["html", "reset", "lost", "list", {"status": 502}, (0, "hiccup"),
              {"status": 200, "body": {"result": True}},
              {"status": 200, "body": {"result": True, "tasklist": "x"}},
              {"status": 200, "body": {"result": True, "tasklist": [{}, 7, {"id": "x"}]}},
              {"status": 200, "body": {"result": True, "tasklist": [{"id": 1}, {"id": 2}]}}],
    ids=str,
)  # fmt: skip
def test_a_list_that_does_not_tell_keeps_no_run_from_going_and_lets_none_be_taken(
    server, client, journal, fault
):
    server.fail("Task/List", fault)
    assert start(client, journal, Job(MODEL, PARAMETERS, [OURS])).taskid == "2221"
    server.fail("Task/List", fault)
    server.fail("Run", "lost")
    with pytest.raises(RunOutcomeUnknownError, match="2222"):
        start(client, journal, Job(MODEL, PARAMETERS, [OURS], take=2))
    assert server.paths().count("Task/List") == 3, "one before each Run, one to name candidates"


def test_a_row_of_an_older_version_is_asked_about(server, client, tmp_path, clock):
    path = tmp_path / "old.sqlite"
    with sqlite3.connect(path) as old:
        old.execute(
            "CREATE TABLE jobs (id INTEGER PRIMARY KEY, job TEXT NOT NULL, owner TEXT NOT NULL, "
            "model TEXT NOT NULL, state TEXT NOT NULL, taskid TEXT NOT NULL DEFAULT '', "
            "status TEXT NOT NULL DEFAULT '', verdict TEXT NOT NULL DEFAULT '', "
            "projected TEXT NOT NULL DEFAULT '', cost TEXT NOT NULL DEFAULT '', "
            "elapsed_s TEXT NOT NULL DEFAULT '', files TEXT NOT NULL DEFAULT '[]', "
            "remote_deleted INTEGER NOT NULL DEFAULT 0, error TEXT NOT NULL DEFAULT '', "
            "created_at REAL NOT NULL, sent_at REAL, updated_at REAL NOT NULL)"
        )
        for number, (state, taskid) in enumerate([("sending", ""), ("started", "2221")]):
            key = job_key(Job(MODEL, {**PARAMETERS, "steps": number}, [OURS]), service=server.url)
            old.execute(
                "INSERT INTO jobs (job, owner, model, state, taskid, created_at, sent_at, "
                "updated_at) VALUES (?, 'x', 'wiro/SkyReels-V1', ?, ?, ?, ?, ?)",
                (key, state, taskid, NOW, NOW, NOW),
            )
    old.close()
    journal = Journal(path, now=clock.now)
    add_theirs(server, OURS, steps=1)
    add_theirs(server, OURS, steps=0)  # even if it is the only one, and would be proved
    with pytest.raises(RunOutcomeUnknownError, match="2222"):
        start(client, journal, Job(MODEL, {**PARAMETERS, "steps": 0}, [OURS]))
    entry = start(client, journal, Job(MODEL, {**PARAMETERS, "steps": 1}, [OURS]))
    assert (entry.taskid, runs(server)) == ("2221", 0)
    assert start(client, journal, Job(MODEL, {**PARAMETERS, "steps": 2}, [OURS])).state == "started"


def test_the_question_tells_what_to_do(server, client):
    with pytest.raises(RunOutcomeUnknownError) as caught:
        run_lost(client, server, [OURS], [[THEIRS]], fault="reset")
    text = str(caught.value)
    for words in ("2221", "before running again", "collect ID", "Wiro Task Result", "--again",
                  "It did not start"):  # fmt: skip
        assert words in text
    assert "token" not in text


# --- what others have in the list ---------------------------------------------------------------

NONSENSE = (
    None, "", " ", "x", "a/b", "a/b/c", "/", "//", "../..", "wiro/SkyReels-V1", "\0", "\ud800",
    "\x1b[31m", "漢" * 500, "x" * 10_000, 0, 1, -1, 2**63, 10**40, 1e308, float("nan"),
    float("inf"), float("-inf"), True, False, [], [None], [[]], ["x"] * 100, {}, {"a": None},
    {"id": {}}, [{"id": 1}], "0", "-5", "1e5", "1" * 5000, "null", "[]", "{", '"x"', "9" * 17,
)  # fmt: skip
FIELDS = (
    "id", "taskid", "socketaccesstoken", "parameters", "status", "pexit", "outputs", "output",
    "createtime", "modelslugowner", "modelslugproject", "categories", "totalcost", "size",
    "debugerror", "uuid",
)  # fmt: skip


@pytest.mark.usefixtures("calls_at_once")
@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("files", [[OURS], []], ids=["file", "no file"])
def test_a_record_of_somebody_else_may_hold_anything(name, files):
    for value in (*NONSENSE, ...):
        world = World(0)
        service = Service(world)

        def spoil(record, value=value):
            if record["id"] == "100":  # theirs, and older or newer than our baseline
                record.pop(name, None)
                if value is not ...:
                    record[name] = value
            return record

        outcome: list[str] = []
        sent = {other: part[1] for other, part in files}
        service.add({**PARAMETERS, "prompt": "theirs"}, sent)

        def lost(world=world, service=service, outcome=outcome) -> None:
            client = Client(
                Credentials("test-key"), base_url=URL, sleep=world.pause,
                session=service.session("us", lambda: "lost after"),
            )  # fmt: skip
            try:
                outcome.append(client.run(MODEL, PARAMETERS, files).taskid)
            except RunOutcomeUnknownError:
                outcome.append("asked")

        service.goes_over = spoil
        world.start(0.0, lost, 1e9)
        world.play()
        # an id of theirs that seems newer than any hides ours: then we ask
        expected = {"101", "asked"} if name == "id" else {"101"}
        assert set(outcome) <= expected, value
        assert len(outcome) == 1


@pytest.mark.usefixtures("calls_at_once")
@pytest.mark.parametrize("name", FIELDS)
def test_a_record_of_nonsense_is_never_ours(name):
    """Ours was dropped; somebody's task of our very inputs is spoilt in one field."""
    needed = {"parameters", "modelslugowner", "modelslugproject", "id"}
    for value in (*NONSENSE, ...):
        world = World(0)
        service = Service(world)

        def spoil(record, value=value):
            record.pop(name, None)
            return record if value is ... else {**record, name: value}

        service.goes_over = spoil
        outcome: list[str] = []

        def dropped(world=world, service=service, outcome=outcome) -> None:
            client = Client(
                Credentials("test-key"), base_url=URL, sleep=world.pause,
                session=service.session("us", lambda: "lost after"),
            )  # fmt: skip
            try:
                outcome.append(client.run(MODEL, PARAMETERS, [OURS]).taskid)
            except RunOutcomeUnknownError:
                outcome.append("asked")

        world.start(0.0, dropped, 1e9)
        world.play()
        if name in needed and value not in ("wiro/SkyReels-V1",):
            assert outcome[0] == "asked" or (name == "id" and number_of(outcome[0])), value
        else:
            assert outcome in (["100"], ["asked"]), value


def test_more_newer_tasks_than_a_page_are_all_looked_at(server, client):
    assert run_lost(client, server, [OURS], [[THEIRS]] * 45).taskid == "2266"
    foreign = [[]] + [[THEIRS]] * 45
    with pytest.raises(RunOutcomeUnknownError):  # one with our parameters is on the last page
        run_lost(client, server, [], foreign, fault="lost")


def test_without_files_a_list_that_does_not_reach_back_proves_nothing(server, client, monkeypatch):
    monkeypatch.setattr(wiro, "MAX_PAGES", 1)
    with pytest.raises(RunOutcomeUnknownError):
        run_lost(client, server, [], [[THEIRS]] * 25)


@pytest.mark.parametrize(
    ("ids", "newest"),
    [([], "0"), (["7", "5"], "7"), ([7, 5], "7"), (["7", "x", None, "5"], "7"), (["5", "7"], ""),
     (["x"], ""), ([None], ""), (["9"], "9"), (["1" * 40, "9"], "9"), (["-3", "9"], "9")],
)  # fmt: skip
def test_the_newest_id_of_a_page(ids, newest):
    assert newest_id([parse_task({"id": one}) for one in ids]) == newest


# --- as processes of their own ------------------------------------------------------------------

PROGRAM = """
import json, sys, time
from pathlib import Path
from wiro_api import candidates, client, errors, jobs, journal, signing
url, file, picture, take = sys.argv[1:]
candidates.RECONCILE_AT_S = tuple(moment / 100 for moment in candidates.RECONCILE_AT_S)
ours = client.Client(signing.Credentials("test-key", "test-secret"), base_url=url)
part = ("inputImage", ("a.png", picture.encode(), "image/png"))
try:
    job = jobs.Job(client.Model("wiro", "SkyReels-V1"), {"prompt": "same"}, [part], int(take))
    entry = jobs.start(ours, journal.Journal(Path(file)), job)
    print(json.dumps(entry.taskid))
except errors.RunOutcomeUnknownError:
    print(json.dumps("asked"))
"""
#: answered when the others have ended
SLOW = ("silent", 120.0)


@pytest.mark.parametrize(
    ("faults", "pictures", "takes", "shares"),
    [
        (["reset", SLOW], "AB", "11", False),
        (["reset", SLOW], "AB", "11", True),
        ([SLOW, "reset", "lost"], "ABC", "111", False),
        (["reset", "lost", SLOW], "AAB", "121", True),
    ],
    ids=["two machines", "one machine", "three machines", "three on one, another take"],
)
def test_processes_on_one_key_never_get_the_task_of_another(
    server, tmp_path, faults, pictures, takes, shares
):
    # each says in its picture which it is; the answers come in the order of the Runs
    started = []
    for number, (fault, picture, take) in enumerate(zip(faults, pictures, takes, strict=True)):
        server.fail("Run", fault)
        file = tmp_path / ("shared.sqlite" if shares else f"{number}.sqlite")
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM, server.url, str(file), picture, take],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        end = time.monotonic() + 60
        while runs(server) <= number and time.monotonic() < end:
            time.sleep(0.01)
    slow = [fault == SLOW for fault in faults]
    for process, is_slow in zip(started, slow, strict=True):
        assert is_slow or process.wait(timeout=120) == 0
    server.let_go()
    ends = [json.loads(process.communicate(timeout=120)[0]) for process in started]
    assert runs(server) == len(faults)
    for (fault, picture), end in zip(zip(faults, pictures, strict=True), ends, strict=True):
        if end != "asked":
            stored = [c for path, c in server.inputs.items() if path.startswith(f"upload-{end}/")]
            assert stored == [picture.encode()]
            assert fault != "reset", "no task of its own was made"
    answered = [end for fault, end in zip(faults, ends, strict=True) if fault == SLOW]
    assert "asked" not in answered
    taken = [end for end in ends if end != "asked"]
    assert all(one != other for one, other in itertools.combinations(taken, 2))
