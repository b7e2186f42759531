"""What a run will cost, before it is queued, and tasks that come home by themselves."""

import asyncio
import json
import threading
import time

import pytest
import torch
from comfyui_skyreels.nodes import host
from comfyui_skyreels.nodes.remote import (
    account,
    autocollect,
    routes,
)
from comfyui_skyreels.nodes.remote import (
    nodes as remote,
)
from comfyui_skyreels.nodes.remote import (
    run as wiro_run,
)
from comfyui_skyreels.wiro_api import jobs
from comfyui_skyreels.wiro_api.client import Model
from comfyui_skyreels.wiro_api.errors import ConfigError, WiroError
from comfyui_skyreels.wiro_api.jobs import Job, finish, quote
from support.wiro_server import KEY

WIDGETS = {"prompt": "a fox", "size": "960x544", "fit": "crop", "num_frames": 97, "steps": 30,
           "cfg": 6.0, "negative_prompt": "", "add_fps_prefix": True, "take": 1,
           "wait_when_busy": False, "timeout_minutes": 40.0}  # fmt: skip
ANY = {
    "model": "wiro/SkyReels-V1",
    "parameters": '{"prompt": "x"}',
    "image_parameter": "inputImage",
}


def ask(node="WiroRemoteI2V", linked=("image",), values=None, **changes):
    shown = {**(ANY if node == "WiroRunModel" else WIDGETS), **changes}
    return routes.price({"node": node, "values": values or shown, "linked": list(linked)})


def listed(price="0.30", method="cpr", **inputs):
    return [{"inputs": inputs, "price": price, "priceMethod": method}]


def runs(wiro):
    return [seen for seen in wiro.seen if seen.path.startswith("Run/")]


# --- the price before queueing ------------------------------------------------------------------


def test_the_price_of_a_node_is_told_and_nothing_is_started_or_written(comfy, wiro):
    wiro.price = listed()
    before = sorted(comfy.root.rglob("*"))
    told = {"has_key": True, "price": "0.3", "is_exact": True, "is_each": False, "problem": ""}
    assert ask() == told
    assert ask("WiroRunModel") == told
    assert ask("WiroSubmit") == {**told, "is_exact": False, "is_each": True}
    assert sorted(comfy.root.rglob("*")) == before
    assert {seen.path for seen in wiro.seen} == {"Tool/Detail"}
    assert len(wiro.seen) == 1, "what Wiro says of a model is kept for a while"


def test_it_is_the_price_that_the_run_is_sent_with(comfy, wiro):
    wiro.price = [*listed("0.10", "cp-outputVideoLength"), *listed("0.05", size="544x960")]
    for changes in ({}, {"size": "544x960"}, {"num_frames": 50}):
        told = ask(**changes)["price"]
        picture = torch.zeros(1, 48, 64, 3)
        with torch.inference_mode():
            node = remote.WiroRemoteI2V()
            asyncio.run(node.generate(image=picture, **{**WIDGETS, **changes}, unique_id="7"))
        assert account.journal().newest()[0].projected == told


def test_without_a_key_nothing_is_asked(comfy, wiro, monkeypatch):
    monkeypatch.delenv("WIRO_API_KEY")
    for node in ("WiroRemoteI2V", "WiroRunModel"):
        assert ask(node)["has_key"] is False
    assert wiro.seen == []


@pytest.mark.parametrize(
    ("linked", "is_exact"),
    [(["image"], True), ([], True), (["image", "prompt"], False), (["num_frames"], False),
     (["image", "size"], False)],
)  # fmt: skip
def test_what_a_link_brings_is_not_known_and_the_price_is_about(comfy, wiro, linked, is_exact):
    wiro.price = listed()
    told = ask(linked=linked)
    assert (told["price"], told["is_exact"]) == ("0.3", is_exact)
    assert ask(size=remote.ORIENTATION)["is_exact"] is False


def test_what_is_still_missing_hinders_no_price(comfy, wiro):
    wiro.price = listed()
    assert ask(prompt="", linked=[])["price"] == "0.3"
    assert ask("WiroRunModel", parameters="{}", linked=[])["price"] == "0.3"
    assert ask("WiroRunModel", parameters="", image_parameter="lastImage")["price"] == "0.3"


@pytest.mark.parametrize(
    ("node", "changes", "words"),
    [
        ("WiroRunModel", {"model": "acme/none"}, "acme/none"),
        ("WiroRunModel", {"model": "nonsense"}, "owner/project"),
        ("WiroRunModel", {"parameters": "{"}, "not JSON"),
        ("WiroRunModel", {"parameters": '{"callbackUrl": "x"}'}, "may not do that"),
        ("WiroRunModel", {"parameters": '{"odd": 1}'}, "no parameter 'odd'"),
        ("WiroRunModel", {"parameters": '{"size": "1x1"}'}, "choose one of"),
        ("WiroRunModel", {"linked": ["model"]}, "comes through a link"),
        ("WiroRemoteI2V", {"num_frames": 1}, "the least is 5"),
        ("WiroRemoteI2V", {"num_frames": "many"}, "holds what it cannot"),
        ("WiroRunModel", {"parameters": 5}, "holds what it cannot"),
    ],
)
def test_a_price_that_cannot_be_had_is_a_sentence(comfy, wiro, node, changes, words):
    wiro.price = listed()
    told = ask(node, **changes)
    assert (told["price"], told["has_key"]) == (None, True)
    assert words in told["problem"]
    assert KEY not in json.dumps(told)


def test_a_model_without_a_price_is_told_as_that_until_a_run_has_cost_something(comfy, wiro):
    assert ask()["price"] is None
    assert ask()["problem"] == ""


@pytest.mark.parametrize("body", [{}, {"node": "WiroRunModel"}, {"values": [], "linked": {}}])
def test_a_question_that_is_none_is_told(comfy, wiro, body):
    assert "reload the page" in routes.price(body)["problem"]


def test_a_quote_of_a_draft_checks_all_but_what_is_missing(comfy, wiro):
    with account.make_client() as client:
        model = Model.parse("wiro/SkyReels-V1")
        record = jobs.read_record(client, model)
    with pytest.raises(ConfigError, match="wants"):
        quote(record, Job(model, {"prompt": "x"}))
    assert quote(record, Job(model, {"prompt": "x"}), is_draft=True).parameters["prompt"] == "x"
    with pytest.raises(ConfigError, match="no parameter"):
        quote(record, Job(model, {"odd": 1}), is_draft=True)


# --- a task that ran while ComfyUI was away -----------------------------------------------------


def row_of(wiro, **task):
    """A row in "started", as a server that was killed has left it, and its task."""
    taskid = wiro.add_task({"prompt": "x"})
    wiro.tasks[taskid].update(task)
    return account.journal().adopt(taskid, "wiro/SkyReels-V1").id


def switch_on(is_on=True):
    routes.save_settings({"collect_at_start": is_on})


def names(comfy, taskid):
    return sorted(path.name for path in (comfy.root / "output" / "wiro" / taskid).iterdir())


def test_it_is_off_until_somebody_switches_it_on_and_asks_nothing_then(comfy, wiro):
    assert account.describe_account()["collect_at_start"] is False
    row_of(wiro)
    seen = len(wiro.seen)
    autocollect.bring_home()
    assert len(wiro.seen) == seen
    switch_on()
    assert account.describe_account()["collect_at_start"] is True
    switch_on(False)
    autocollect.bring_home()
    assert len(wiro.seen) == seen


@pytest.mark.parametrize("value", [None, 1, "true", [], {}])
def test_the_setting_is_true_or_false(comfy, wiro, value):
    with pytest.raises(ConfigError, match="neither true nor false"):
        routes.save_settings({"collect_at_start": value})
    with pytest.raises(ConfigError, match="names no collect_at_start"):
        routes.save_settings({})


@pytest.mark.parametrize("content", ["", "[]", "{", '{"collect_at_start": 1}', "\xff"])
def test_a_setting_that_cannot_be_read_is_off(comfy, wiro, content):
    row_of(wiro)
    account.settings_file().write_text(content, encoding="latin1")
    seen = len(wiro.seen)
    autocollect.bring_home()
    assert len(wiro.seen) == seen


def test_without_a_key_or_without_an_open_task_nothing_is_asked(comfy, wiro, monkeypatch):
    switch_on()
    autocollect.bring_home()
    row_of(wiro)
    seen = len(wiro.seen)
    monkeypatch.delenv("WIRO_API_KEY")
    autocollect.bring_home()
    assert len(wiro.seen) == seen


def test_tasks_that_were_under_way_come_home_and_are_shown(comfy, wiro):
    switch_on()
    rows = [row_of(wiro) for _ in range(6)]
    autocollect.bring_home()
    journal = account.journal()
    for row in rows:
        entry = journal.get(row)
        assert (entry.state, entry.verdict) == ("ended", "succeeded")
        assert names(comfy, entry.taskid) == ["0.mp4", "0.receipt.json"]
        assert not account.is_followed(row)
    told = [data for name, data in comfy.events if name == account.EVENT and data["is_live"]]
    assert {data["id"] for data in told} == set(rows), "each was shown while it was followed"
    assert not runs(wiro)


def test_four_are_followed_at_a_time(comfy, wiro, monkeypatch):
    switch_on()
    for _ in range(9):
        row_of(wiro)
    now, most = set(), []
    gate, real = threading.Barrier(4), finish

    def watched(*arguments, **keywords):
        now.add(threading.get_ident())
        most.append(len(now))
        if len(most) <= 4:
            gate.wait(timeout=30)  # all four are in here together
        try:
            return real(*arguments, **keywords)
        finally:
            now.discard(threading.get_ident())

    monkeypatch.setattr(jobs, "finish", watched)
    autocollect.bring_home()
    assert (max(most), len(most)) == (4, 9)


def test_which_rows_are_brought_home(comfy, wiro):
    switch_on()
    journal = account.journal()
    every = ("running", "done", "fetched", "part", "failed", "deleted", "old", "followed")
    rows = {name: row_of(wiro) for name in every}
    folder = comfy.root / "output" / "wiro"

    def note(name, **values):
        journal._note(rows[name], **values)

    note("done", state="ended", verdict="succeeded")
    note("fetched", state="ended", verdict="succeeded", files=json.dumps([str(folder / "0.mp4")]))
    parts = [str(folder / "0.mp4"), str(folder / f".1.mp4{jobs.MISSING}")]
    note("part", state="ended", verdict="succeeded", files=json.dumps(parts))
    note("failed", state="ended", verdict="failed")
    note("deleted", state="ended", verdict="succeeded", remote_deleted=1)
    note("old", state="ended", verdict="succeeded")
    with journal._open() as connection:
        connection.execute("UPDATE jobs SET updated_at = ? WHERE id = ?",
                           (time.time() - 2 * 86_400, rows["old"]))  # fmt: skip
    account.subscribe(rows["followed"], by_prompt=False)
    try:
        found = {entry.id for entry in autocollect.entries_away()}
    finally:
        account.unsubscribe(rows["followed"])
    assert found == {rows[name] for name in ("running", "done", "part")}


def test_a_task_that_cannot_be_brought_home_says_why_in_its_row_and_costs_no_other(
    comfy, wiro, monkeypatch
):
    switch_on()
    lost, failed, good = row_of(wiro), row_of(wiro, pexit="1", outputs=[]), row_of(wiro)
    monkeypatch.setattr("comfyui_skyreels.wiro_api.client.UNSEEN_S", 0.0, raising=False)
    wiro.tasks[account.journal().get(failed).taskid]["status"] = "task_postprocess_end"
    wiro.final = {}
    real = finish

    def some(client, handle, folder, **keywords):
        if keywords["entry_id"] == lost:
            raise RuntimeError("secret of the inside")
        if keywords["entry_id"] == failed:
            raise WiroError(f"No room in {folder}: make some.")
        return real(client, handle, folder, **keywords)

    monkeypatch.setattr(jobs, "finish", some)
    autocollect.bring_home()
    told = {task["id"]: task["error"] for task in routes.list_tasks(10)["tasks"]}
    assert told[lost] == "Not brought home (RuntimeError): see ComfyUI's log."
    assert told[failed].startswith("Not brought home: No room in output")
    assert str(comfy.root) not in told[failed]
    assert told[good] == ""
    assert account.journal().get(good).state == "ended"
    account.subscribe(lost, by_prompt=False)
    account.unsubscribe(lost)
    assert {task["id"]: task["error"] for task in routes.list_tasks(10)["tasks"]}[lost] == ""


@pytest.mark.parametrize("number", [2, 3])
def test_who_comes_second_to_the_files_of_a_row_finds_them_there(comfy, wiro, number):
    """A node, the panel and the collector at once: one file, fetched once, under one name."""
    row = row_of(wiro)
    entry = account.journal().get(row)
    gate, results = threading.Barrier(number), []

    def bring():
        with account.make_client() as client:
            gate.wait(timeout=30)
            _, paths = finish(
                client,
                jobs.to_handle(entry),
                account.task_folder(entry.taskid),
                journal=account.journal(),
                entry_id=row,
            )
            results.append(paths)

    threads = [threading.Thread(target=bring) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(results) == number
    assert all(paths == results[0] for paths in results)
    assert names(comfy, entry.taskid) == ["0.mp4", "0.receipt.json"]
    assert len(wiro.fetched) == 1
    assert not jobs._downloading


def test_who_waits_for_another_ones_download_can_be_stopped(comfy, wiro):
    row = row_of(wiro)
    journal, inside, leave = account.journal(), threading.Event(), threading.Event()

    def hold():
        with jobs._one_at_a_time(jobs._Row(journal, row), lambda: None):
            inside.set()
            leave.wait(timeout=60)

    holder = threading.Thread(target=hold)
    holder.start()
    inside.wait(timeout=60)

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), jobs._one_at_a_time(jobs._Row(journal, row), stop):
        raise AssertionError("it came in")
    with jobs._one_at_a_time(jobs._Row(journal, row + 1), stop):  # another row is another one's
        pass
    leave.set()
    holder.join(timeout=60)
    with jobs._one_at_a_time(jobs._Row(journal, row), stop):
        pass


def test_the_end_of_comfyui_waits_for_no_collector(comfy, wiro, monkeypatch):
    """All of its threads are daemons, and the one at the start is not waited for."""
    switch_on()
    row_of(wiro)
    kinds = []
    real = finish

    def watched(*arguments, **keywords):
        kinds.append(threading.current_thread().daemon)
        return real(*arguments, **keywords)

    monkeypatch.setattr(jobs, "finish", watched)
    autocollect.bring_home()
    assert kinds == [True]


def test_the_work_at_start_is_called_in_a_daemon_once_the_loop_runs(monkeypatch):
    loop = asyncio.new_event_loop()
    called = threading.Event()
    threads = []

    def work():
        threads.append(threading.current_thread())
        called.set()

    monkeypatch.setattr(host.server, "instance", lambda: type("Server", (), {"loop": loop})())
    host.at_start(work)
    assert not called.is_set(), "nothing happens while the nodes are loaded"
    loop.run_until_complete(asyncio.sleep(0))
    assert called.wait(timeout=30)
    assert threads[0].daemon
    loop.close()
    monkeypatch.setattr(host.server, "instance", lambda: None)
    host.at_start(work)


def test_a_collected_row_is_not_given_to_the_user_whose_prompt_runs(comfy, wiro):
    comfy.is_multi_user, comfy.user = True, "anna"
    switch_on()
    row = row_of(wiro)
    autocollect.bring_home()
    assert account.journal().rows_of("anna") == frozenset()
    assert account.journal().get(row).state == "ended"


# --- older rows ---------------------------------------------------------------------------------


@pytest.mark.parametrize("user", ["", "anna"])
def test_rows_beyond_the_first_page_are_reached(comfy, wiro, user):
    journal = account.journal()
    ids = [journal.adopt(str(number), "wiro/SkyReels-V1").id for number in range(1, 8)]
    for number in ids:
        journal.note_user(number, "anna")
    found, before = [], None
    while True:
        answer = routes.list_tasks(3, user, before)
        found += [task["id"] for task in answer["tasks"]]
        before = found[-1]
        if not answer["has_more"]:
            break
    assert found == ids[::-1]
    assert routes.list_tasks(7, user)["has_more"] is False
    assert routes.list_tasks(3, user, ids[0]) == {"tasks": [], "has_more": False, "error": ""}


@pytest.mark.parametrize("text", ["", "x", "-1", "1e3", "٣", "9" * 30, "1.5", " 1"])
def test_a_number_of_the_query_that_is_none_is_none(text):
    assert routes._number(text) is None
    assert wiro_run.RECORD_S
