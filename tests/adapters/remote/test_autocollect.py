"""Tasks that ran while ComfyUI was closed are collected when it starts."""

import asyncio
import json
import threading
import time

import pytest
from comfyui_skyreels.nodes import host
from comfyui_skyreels.nodes.remote import account, autocollect, live_tasks, settings, tasks
from comfyui_skyreels.wiro_api import jobs
from comfyui_skyreels.wiro_api.errors import ConfigError, WiroError
from comfyui_skyreels.wiro_api.jobs import finish


def runs(wiro):
    return [seen for seen in wiro.seen if seen.path.startswith("Run/")]


def row_of(wiro, **task):
    """A row in "started", as a server that was killed has left it, and its task."""
    taskid = wiro.add_task({"prompt": "x"})
    wiro.tasks[taskid].update(task)
    return account.journal().adopt(taskid, "wiro/SkyReels-V1").id


def switch_on(is_on=True):
    settings.save_settings({"collect_at_start": is_on})


def names(comfy, taskid):
    return sorted(path.name for path in (comfy.root / "output" / "wiro" / taskid).iterdir())


def test_it_is_off_until_somebody_switches_it_on_and_asks_nothing_then(comfy, wiro):
    assert settings.describe_account()["collect_at_start"] is False
    row_of(wiro)
    seen = len(wiro.seen)
    autocollect.collect_at_start()
    assert len(wiro.seen) == seen
    switch_on()
    assert settings.describe_account()["collect_at_start"] is True
    switch_on(False)
    autocollect.collect_at_start()
    assert len(wiro.seen) == seen


@pytest.mark.parametrize("value", [None, 1, "true", [], {}])
def test_the_setting_is_true_or_false(comfy, wiro, value):
    with pytest.raises(ConfigError, match="must be true or false"):
        settings.save_settings({"collect_at_start": value})
    with pytest.raises(ConfigError, match="lacks collect_at_start"):
        settings.save_settings({})


@pytest.mark.parametrize("content", ["", "[]", "{", '{"collect_at_start": 1}', "\xff"])
def test_a_setting_that_cannot_be_read_is_off(comfy, wiro, content):
    row_of(wiro)
    account.settings_file().write_text(content, encoding="latin1")
    seen = len(wiro.seen)
    autocollect.collect_at_start()
    assert len(wiro.seen) == seen


def test_without_a_key_or_without_an_open_task_nothing_is_asked(comfy, wiro, monkeypatch):
    switch_on()
    autocollect.collect_at_start()
    row_of(wiro)
    seen = len(wiro.seen)
    monkeypatch.delenv("WIRO_API_KEY")
    autocollect.collect_at_start()
    assert len(wiro.seen) == seen


def test_tasks_that_were_under_way_come_home_and_are_shown(comfy, wiro):
    switch_on()
    rows = [row_of(wiro) for _ in range(6)]
    autocollect.collect_at_start()
    journal = account.journal()
    for row in rows:
        entry = journal.get(row)
        assert (entry.state, entry.verdict) == ("ended", "succeeded")
        assert names(comfy, entry.taskid) == ["0.mp4", "0.receipt.json"]
        assert not live_tasks.is_followed(row)
    told = [data for name, data in comfy.events if name == live_tasks.EVENT and data["is_live"]]
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
    autocollect.collect_at_start()
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
        connection.execute(
            "UPDATE jobs SET updated_at = ? WHERE id = ?", (time.time() - 2 * 86_400, rows["old"])
        )
    live_tasks.subscribe(rows["followed"], by_prompt=False)
    try:
        found = {entry.id for entry in autocollect.unfinished_entries()}
    finally:
        live_tasks.unsubscribe(rows["followed"])
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
    autocollect.collect_at_start()
    told = {task["id"]: task["error"] for task in tasks.list_tasks(10)["tasks"]}
    assert told[lost] == "Not collected (RuntimeError): see ComfyUI's log."
    assert told[failed].startswith("Not collected: No room in output")
    assert str(comfy.root) not in told[failed]
    assert told[good] == ""
    assert account.journal().get(good).state == "ended"
    live_tasks.subscribe(lost, by_prompt=False)
    live_tasks.unsubscribe(lost)
    assert {task["id"]: task["error"] for task in tasks.list_tasks(10)["tasks"]}[lost] == ""


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
    autocollect.collect_at_start()
    assert kinds == [True]


def test_the_work_at_start_is_called_in_a_daemon_once_the_loop_runs(monkeypatch):
    loop = asyncio.new_event_loop()
    called = threading.Event()
    threads = []

    def work():
        threads.append(threading.current_thread())
        called.set()

    monkeypatch.setattr(host.server, "_prompt_server", lambda: type("Server", (), {"loop": loop})())
    host.run_at_startup(work)
    assert not called.is_set(), "nothing happens while the nodes are loaded"
    loop.run_until_complete(asyncio.sleep(0))
    assert called.wait(timeout=30)
    assert threads[0].daemon
    loop.close()
    monkeypatch.setattr(host.server, "_prompt_server", lambda: None)
    host.run_at_startup(work)


def test_a_collected_row_is_not_given_to_the_user_whose_prompt_runs(comfy, wiro):
    comfy.is_multi_user, comfy.user = True, "anna"
    switch_on()
    row = row_of(wiro)
    autocollect.collect_at_start()
    assert account.journal().rows_of("anna") == frozenset()
    assert account.journal().get(row).state == "ended"
