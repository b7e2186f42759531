"""Wiro Submit and Wiro Collect against a loopback Wiro with few places."""

import asyncio
import json
import re
import threading
import time
from decimal import Decimal

import av
import pytest
import torch
from comfyui_skyreels.nodes.remote import account, live_tasks
from comfyui_skyreels.nodes.remote import batch as wiro_batch
from comfyui_skyreels.nodes.remote import nodes as remote
from comfyui_skyreels.nodes.remote import run as wiro_run
from comfyui_skyreels.wiro_api import candidates, client
from comfyui_skyreels.wiro_api.errors import (
    BalanceError,
    ConcurrencyError,
    ConfigError,
    LimitError,
    TaskFailedError,
)
from comfyui_skyreels.wiro_api.spending import Limits, Price, Spent, save_limits
from support import wiro_server
from support.host import ExecutionBlocker, InterruptProcessingException
from support.wiro_server import STATES

PROMPT = "a woman smiles"
NAMES = wiro_batch.WiroCollect.RETURN_NAMES
#: a Collect node with something on each output
GRAPH = {
    "7": {"inputs": {"timeout_minutes": 40.0}},
    "8": {"inputs": {name: ["7", i] for i, name in enumerate(NAMES)}},
}


@pytest.fixture(autouse=True)
def quick_polls(monkeypatch):
    """Tasks of these tests end at once: no poll waits seconds, nor a look for a Run or a stop."""
    monkeypatch.setattr(client, "POLL_SCHEDULE", ((float("inf"), 0.05),))
    monkeypatch.setattr(client, "STOP_WAIT_S", 0.02)
    looks = tuple(moment / 20 for moment in candidates.RECONCILE_AT_S)
    monkeypatch.setattr(candidates, "RECONCILE_AT_S", looks)
    wiro_run._results.clear()


def picture(number: int, height: int = 24, width: int = 32) -> torch.Tensor:
    """A plain picture whose brightness tells its number, 0 to 15."""
    return torch.full((1, height, width, 3), (8 + 16 * number) / 255)


def pictures(count: int) -> torch.Tensor:
    return torch.cat([picture(number) for number in range(count)])


def listed(value) -> list:
    return value if isinstance(value, list) else [value]


def submit(image, prompt=PROMPT, **changes):
    """(runs, report), called as ComfyUI calls a node that wants lists."""
    inputs = {
        "image": image,
        "prompt": prompt,
        "size": "by orientation",
        "fit": "crop",
        "num_frames": 5,
        "steps": 30,
        "cfg": 6.0,
        **changes,
        "unique_id": "6",
    }
    with torch.inference_mode():
        lists = {name: listed(value) for name, value in inputs.items()}
        return asyncio.run(wiro_batch.WiroSubmit().submit(**lists))


def collect(runs, graph=None, **changes) -> dict:
    """The outputs by name."""
    with torch.inference_mode():
        outputs = asyncio.run(
            wiro_batch.WiroCollect().collect(runs, **changes, unique_id="7", graph=graph)
        )
    return dict(zip(NAMES, outputs, strict=True))


def paid(wiro) -> list:
    return [seen for seen in wiro.seen if seen.path.startswith("Run/")]


def when(condition, action) -> threading.Thread:
    """Do something as soon as a condition holds."""

    def wait() -> None:
        for _ in range(2000):
            if condition():
                action()
                return
            time.sleep(0.005)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def cancel(comfy) -> None:
    comfy.is_cancelled = True


def cancel_and_answer(comfy, wiro) -> None:
    """Cancel, and let the service answer a held Run once the cancel was seen."""
    cancel(comfy)
    when(lambda: not comfy.is_cancelled, wiro.let_go).join()


def going(wiro) -> list[str]:
    return [key for key, task in wiro.tasks.items() if "cancel" not in task["status"]]


def number_of(video) -> int:
    """Of which picture a video was made."""
    with av.open(video.file) as container:
        frame = next(container.decode(container.streams.video[0])).to_ndarray(format="rgb24")
    return round((float(frame.mean()) - 8) / 16)


def few_places(wiro, places=3) -> None:
    """Tasks that go on with each look at them, so many at once."""
    wiro.states, wiro.max_tasks = STATES[4:], places


def hold(wiro, places=3) -> None:
    """Tasks that run until the test ends them."""
    wiro.states, wiro.steps_by_itself = ("task_start", "task_postprocess_end"), False
    wiro.max_tasks = places


# --- the whole way ------------------------------------------------------------------------------


def test_twelve_pictures_three_places_one_fails(comfy, wiro, caplog, monkeypatch):
    few_places(wiro)
    wiro.real_video = True
    make_video = wiro_server.make_video
    monkeypatch.setattr(
        wiro_server, "make_video", lambda p, _, *rest: make_video(p, "96x56", *rest)
    )
    failure = {"pexit": "1", "outputs": [], "debugerror": "CUDA error: out of memory"}
    wiro.finals["2225"] = failure  # the fifth
    runs, report = submit(pictures(12))
    assert len(wiro.tasks) == 3
    assert report.startswith("12 runs, ")
    assert "3 started (picture 1: task 2221, picture 2: task 2222, picture 3: task 2223)" in report
    assert "9 wait for a slot" in report
    most = [0]
    look = threading.Event()

    def watch() -> None:
        while not look.wait(0.005):
            names = [thread.name for thread in threading.enumerate()]
            most[0] = max(most[0], names.count("wiro"))

    watching = threading.Thread(target=watch)
    watching.start()
    got = collect(runs)
    look.set()
    watching.join()
    rest = [n for n in range(12) if n != 4]
    assert [number_of(video) for video in got["video"]] == rest, "in order, each of its picture"
    assert got["task_id"] == [str(2221 + n) for n in rest]
    receipts = [json.loads(receipt) for receipt in got["receipt"]]
    assert [r["taskid"] for r in receipts] == got["task_id"]
    assert [r["files"] for r in receipts] == [[f"wiro/{t}/0.mp4"] for t in got["task_id"]]
    head, *sentences = got["report"].split("\n")
    assert head.startswith("11 of 12 done · 1 failed · $")
    (sentence,) = sentences
    assert sentence.startswith("Picture 5: Task 2225 failed on Wiro with exit code 1: ")
    assert caplog.text.count("Picture 5:") == 1
    assert "Picture 5: Task 2225 failed" in comfy.texts[-1]
    assert len(wiro.tasks) == 12
    refused = len(paid(wiro)) - 12
    assert 1 <= refused <= 4, "a place that is not there is not asked for again and again"
    # the node's, those that run or bring their files home, one at the door
    assert most[0] < 1 + 12, "none for what waits"
    values = [value for value, _ in comfy.progress]
    after = values[values.index(1000) :] if 1000 in values else values
    assert after[1:] == sorted(after[1:]), "the bar of Collect never moves back"
    lines = [text for text in comfy.texts if re.match(r"\d+ of 12 done", text)]
    assert any(re.fullmatch(r"\d+ of 12 done · 3 running · \d+ waiting", line) for line in lines)
    events = [data for name, data in comfy.events if name == live_tasks.EVENT]
    assert {data["taskid"] for data in events} >= set(wiro.tasks), "each row in the panel"
    assert account.journal().newest()[0].id == 12, "one row for each run"
    # what failed is tried again by the next queue, and nothing else is paid for
    del wiro.finals["2225"]
    again = collect(runs)
    assert [number_of(video) for video in again["video"]] == list(range(12))
    assert again["report"].startswith("12 of 12 done · $")
    assert len(wiro.tasks) == 13


def test_results_come_in_order_whichever_ends_first(comfy, wiro):
    hold(wiro, places=4)
    runs, _ = submit(pictures(4))
    assert len(wiro.tasks) == 4

    def end_backwards() -> None:
        for key in reversed(list(wiro.tasks)):
            with wiro._lock:
                wiro._enter(wiro.tasks[key], "task_postprocess_end", wiro.now() + 7)
            time.sleep(0.1)

    watching = when(lambda: wiro.paths().count("Task/Detail") >= 4, end_backwards)
    got = collect(runs)
    watching.join()
    assert got["task_id"] == ["2221", "2222", "2223", "2224"]


def test_collect_alone_starts_what_nobody_has_started(comfy, wiro):
    runs, _ = submit(pictures(3))
    account.journal().path.unlink()  # another machine, or a journal that was moved away
    assert collect(runs)["task_id"] == ["2224", "2225", "2226"]


def test_after_a_restart_the_same_workflow_pays_for_nothing_again(comfy, wiro):
    few_places(wiro)
    submit(pictures(5))
    assert len(wiro.tasks) == 3
    wiro_run._results.clear()
    wiro_run._records.clear()
    account._shared.clear()
    live_tasks._states.clear()
    live_tasks._subscribers.clear()
    runs, report = submit(pictures(5))
    assert report.startswith("2 runs, ")
    assert "3 started before, nothing is paid for them again" in report
    assert collect(runs)["task_id"] == [str(2221 + n) for n in range(5)]
    assert collect(runs)["report"].startswith("5 of 5 done")
    assert "0 started" in submit(pictures(5))[1]
    assert len(wiro.tasks) == 5


def test_a_run_is_known_to_the_node_for_one_as_well(comfy, wiro):
    runs, _ = submit(pictures(2))
    collect(runs)
    with torch.inference_mode():
        single = asyncio.run(
            remote.WiroRemoteI2V().generate(
                picture(1), PROMPT, "by orientation", "crop", 5, 30, 6.0, unique_id="9"
            )
        )
    assert single[2] == "2222"
    assert len(paid(wiro)) == 2


def test_a_lost_run_of_submit_is_found_by_collect_and_not_sent_again(comfy, wiro, monkeypatch):
    monkeypatch.setattr(candidates, "RECONCILE_AT_S", (0.1, 0.2))
    wiro.fail("Run", "lost")
    wiro.now = time.time
    runs, _ = submit(pictures(3))
    assert collect(runs)["task_id"] == ["2221", "2222", "2223"]
    assert len(paid(wiro)) == 3


# --- what becomes runs --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "prompt", "expected"),
    [
        (pictures(3), "x", [(0, "x"), (1, "x"), (2, "x")]),
        ([picture(4), picture(2)], "x", [(4, "x"), (2, "x")]),
        (
            [pictures(2), picture(5, 40, 30), picture(7, 64, 64)],
            "x",
            [(0, "x"), (1, "x"), (5, "x"), (7, "x")],
        ),
        (picture(3), ["a", "b", "c"], [(3, "a"), (3, "b"), (3, "c")]),
        (pictures(2), ["a", "b"], [(0, "a"), (1, "b")]),
        ([picture(1), picture(0)], ["a", "b"], [(1, "a"), (0, "b")]),
        (picture(0), "x", [(0, "x")]),
    ],
)
def test_pictures_and_prompts_become_runs_in_order(comfy, wiro, image, prompt, expected):
    import io

    from PIL import Image

    submit(image, prompt)
    sent = []
    for run in paid(wiro):
        with Image.open(io.BytesIO(run.files[0][3])) as content:
            number = (content.getpixel((400, 300))[0] - 8) // 16
        sent.append((number, run.body["prompt"].removeprefix("FPS-24, ")))
    assert sent == expected


@pytest.mark.parametrize(
    ("image", "prompt", "words"),
    [
        (pictures(3), ["a", "b"], "3 pictures and 2 prompts"),
        ([pictures(2), picture(3)], ["a"] * 4, "3 pictures and 4 prompts"),
        (pictures(2), ["a"] * 3, "2 pictures and 3 prompts"),
        (pictures(2), [], "2 pictures and 0 prompts"),
        ([], ["a"], "0 pictures and 1 prompts"),
        (torch.zeros(0, 8, 8, 3), ["a"], "0 pictures and 1 prompts"),
        (torch.zeros(97, 8, 8, 3), "a", "97 runs .* max_runs is 48"),
    ],
)
def test_numbers_that_do_not_go_together_are_named_and_nothing_is_sent(
    comfy, wiro, image, prompt, words
):
    with pytest.raises(ConfigError, match=words):
        submit(image, prompt)
    assert wiro.seen == []


def test_other_widgets_are_one_value_or_one_for_each_run(comfy, wiro):
    runs, _ = submit(pictures(3), steps=[10, 20, 30], take=[1, 2, 3], cfg=[4.0])
    assert [run.job.take for run in runs] == [1, 2, 3]
    assert [seen.body["steps"] for seen in paid(wiro)] == ["10", "20", "30"]
    with pytest.raises(ConfigError, match="steps has 2 values for 3 runs"):
        submit(pictures(3), steps=[10, 20])
    with pytest.raises(ConfigError, match="prompt is empty"):
        submit(pictures(2), ["a", " "])
    assert len(paid(wiro)) == 3
    assert wiro_batch.WiroSubmit.VALIDATE_INPUTS(prompt=["a", " "]) is not True
    assert wiro_batch.WiroSubmit.VALIDATE_INPUTS(prompt=[None]) is True


def test_the_same_job_twice_is_one_run_in_both_places(comfy, wiro):
    image = [picture(1), picture(2), picture(1)]
    runs, report = submit(image)
    assert "1 the same as another" in report
    got = collect(runs)
    assert got["task_id"] == ["2221", "2222", "2221"]
    assert len(paid(wiro)) == 2
    assert submit(image, take=[1, 1, 2])[1].startswith("1 run, "), "another take is another run"


def test_a_failure_of_a_job_that_stands_twice_names_both(comfy, wiro):
    wiro.final = {"pexit": "1", "outputs": [], "debugerror": "CUDA error"}
    wiro.finals["2222"] = {"pexit": "0", "debugerror": ""}
    good = dict(wiro.final)
    wiro.final = {}
    wiro.finals = {"2221": good}
    runs, _ = submit([picture(1), picture(2), picture(1)])
    got = collect(runs)
    assert got["task_id"] == ["2222"]
    assert "\nPictures 1 and 3: Task 2221 failed" in got["report"]


# --- failures -----------------------------------------------------------------------------------


def test_if_all_fail_the_first_error_is_the_nodes(comfy, wiro):
    wiro.final = {"pexit": "1", "outputs": [], "debugerror": "CUDA error"}
    runs, _ = submit(pictures(3))
    with pytest.raises(TaskFailedError, match="Task 2221 failed"):
        collect(runs)


def test_only_a_part_makes_the_node_run_again_and_all_does_not(comfy, wiro):
    comfy.graph = GRAPH
    changed = wiro_batch.WiroCollect.IS_CHANGED
    runs, _ = submit(pictures(2))
    wiro.finals["2222"] = {"pexit": "1", "outputs": [], "debugerror": "CUDA error"}
    wiro.tasks["2222"] |= wiro.finals["2222"]
    before = changed("7")
    collect(runs, GRAPH)
    after = changed("7")
    assert before != after
    got = collect(runs, GRAPH)
    assert got["task_id"] == ["2221", "2223"]
    assert changed("7") == after
    (comfy.root / "output" / "wiro" / "2221" / "0.mp4").unlink()
    assert changed("7") != after, "a file is gone"
    collect(runs, GRAPH)
    assert (comfy.root / "output" / "wiro" / "2221" / "0.mp4").is_file()
    assert len(wiro.tasks) == 3


def test_runs_within_the_limit_are_made_and_the_others_told(comfy, wiro):
    wiro.price = [{"inputs": {}, "price": 0.3, "priceMethod": "cpr"}]
    save_limits(account.limits_file(), Limits(per_day=Decimal("1.00")))
    runs, report = submit(pictures(5))
    assert report.startswith(
        "5 runs, $1.50, limit $1.00 a day; that passes the limit of the day ($0.00 of it is "
        "spent): only 3 of 5 will be started"
    )
    assert any("only 3 of 5 will be started" in text for text in comfy.texts)
    assert "Pictures 4 and 5: wiro/SkyReels-V1 would cost $0.30; your limit is" in report
    got = collect(runs)
    assert got["task_id"] == ["2221", "2222", "2223"]
    assert got["report"].startswith("3 of 5 done · 2 failed · $0.90 in all\nPictures 4 and 5: ")
    assert len(paid(wiro)) == 3
    save_limits(account.limits_file(), Limits(per_day=Decimal("0.10")))
    with pytest.raises(LimitError):
        submit(pictures(3), take=2)
    save_limits(account.limits_file(), Limits())
    assert len(collect(runs)["task_id"]) == 5


def test_what_meets_every_run_is_tried_once(comfy, wiro):
    wiro.fail("Run", (97, "Your balance is too low to run this model."))
    with pytest.raises(BalanceError):
        submit(pictures(4))
    assert len(paid(wiro)) == 1
    wiro.max_tasks = 1
    hold(wiro, places=1)
    runs, _ = submit(pictures(4))
    wiro.balance = "0.10"

    def end() -> None:
        with wiro._lock:
            wiro._enter(wiro.tasks["2221"], "task_postprocess_end", wiro.now() + 7)

    watching = when(lambda: "Task/Detail" in wiro.paths(), end)
    got = collect(runs)
    watching.join()
    assert got["task_id"] == ["2221"]
    assert "\nPictures 2, 3 and 4: " in got["report"]
    assert "balance is too low" in got["report"]


@pytest.mark.parametrize("fault", [(96, "concurrency limit"), (0, "Too many requests.", 429)])
def test_no_place_leaves_a_run_that_was_never_sent_and_is_started_later(comfy, wiro, fault):
    wiro.fail("Run", fault)
    runs, report = submit(pictures(2))
    assert "0 started\n2 wait for a slot" in report
    assert [(entry.id, entry.state) for entry in account.journal().newest()] == [(1, "intent")]
    assert collect(runs)["task_id"] == ["2221", "2222"]
    assert [entry.id for entry in account.journal().newest()] == [2, 1]


def test_places_taken_by_others_are_asked_for_at_the_usual_pace(comfy, wiro, monkeypatch):
    from comfyui_skyreels.wiro_api import jobs

    monkeypatch.setattr(jobs, "FIRST_BUSY_S", 0.1)
    wiro.fail("Run", *[(96, "concurrency limit")] * 3)
    runs, _ = submit(pictures(2))
    waits, wait = [], wiro_batch._CollectView.on_busy

    def on_busy(view, error, wait_s, sleep):
        waits.append(wait_s)
        wait(view, error, wait_s, sleep)

    monkeypatch.setattr(wiro_batch._CollectView, "on_busy", on_busy)
    assert collect(runs)["task_id"] == ["2221", "2222"]
    assert waits == [0.1, 0.2]
    assert len(paid(wiro)) == 5


def test_a_refusal_of_the_only_node_is_still_an_error(comfy, wiro):
    """Wiro Remote I2V waits only if it is asked to."""
    wiro.fail("Run", (96, "concurrency limit"))
    with pytest.raises(ConcurrencyError), torch.inference_mode():
        asyncio.run(
            remote.WiroRemoteI2V().generate(picture(1), PROMPT, "960x544", "crop", 5, 30, 6.0)
        )


# --- what comes out -----------------------------------------------------------------------------


def test_frames_are_decoded_only_if_connected_and_one_clip_at_a_time(comfy, wiro, monkeypatch):
    runs, _ = submit(pictures(4))
    inside, most, original = [], [0], wiro_run.read_clip

    def counted(path, check=lambda: None):
        inside.append(path)
        most[0] = max(most[0], len(inside))
        time.sleep(0.02)
        clip = original(path, check)
        inside.remove(path)
        return clip

    monkeypatch.setattr(wiro_run, "read_clip", counted)
    only_video = {**GRAPH, "8": {"inputs": {"video": ["7", 0]}}}
    got = collect(runs, only_video)
    assert most[0] == 0
    assert all(isinstance(image, ExecutionBlocker) for image in got["images"])
    got = collect(runs, GRAPH)
    assert most[0] == 1
    assert [tuple(image.shape) for image in got["images"]] == [(5, 32, 48, 3)] * 4
    comfy.free_bytes = 1000
    got = collect(runs, GRAPH)
    assert len(got["video"]) == 4
    assert all(isinstance(image, ExecutionBlocker) for image in got["images"])


@pytest.mark.parametrize(
    ("prices", "limits", "spent", "expected"),
    [
        (["0.30"] * 12, Limits(Decimal(2)), Spent(), "12 runs, $3.60, limit $2.00 a run"),
        (["0.30"], Limits(), Spent(), "1 run, $0.30, no limit"),
        ([None, "0.30"], Limits(), Spent(), "2 runs, price unknown before the run, no limit"),
        (
            ["1"] * 4,
            Limits(per_month=Decimal(5)),
            Spent(Decimal(0), Decimal(3)),
            "4 runs, $4.00, limit $5.00 a month; that passes the limit of the month ($3.00 of it "
            "is spent): only 2 of 4 will be started",
        ),
        ([], Limits(), Spent(), "0 runs, $0.00, no limit"),
    ],
)
def test_the_total_is_told(prices, limits, spent, expected):
    known = [None if p is None else Price(Decimal(p), is_exact=True) for p in prices]
    assert wiro_batch.describe_total(known, limits, spent) == expected


# --- stopping -----------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [1, 3])
def test_cancel_in_submit_stops_what_this_call_has_started(comfy, wiro, after):
    hold(wiro, places=None)
    submit(picture(15))
    wiro.fail("Run", *[None] * after, ("silent", 60))
    watching = when(lambda: len(wiro.tasks) > after + 1, lambda: cancel_and_answer(comfy, wiro))
    with pytest.raises(InterruptProcessingException):
        submit([picture(15), pictures(4)])
    watching.join()
    assert going(wiro) == ["2221"], "of an earlier call: it goes on"
    assert len(wiro.tasks) == after + 2
    assert "task 2222 stopped" in comfy.texts[-1]
    wiro.steps_by_itself, wiro.states = True, ("task_postprocess_end",)
    with wiro._lock:
        wiro._enter(wiro.tasks["2221"], "task_postprocess_end", wiro.now() + 7)
    runs, _ = submit([picture(15), pictures(4)])
    assert len(collect(runs)["task_id"]) == 5, "the next queue is good"


def test_cancel_of_a_run_that_is_being_refused_waits_for_the_no(comfy, wiro):
    """Otherwise nobody notes it, and the run counts as lost for good."""
    wiro.max_tasks = 0
    wiro.fail("Run", ("silent", 60))
    node = remote.WiroRemoteI2V()
    inputs = (picture(1), PROMPT, "960x544", "crop", 5, 30, 6.0)
    watching = when(lambda: paid(wiro), lambda: cancel_and_answer(comfy, wiro))
    with pytest.raises(InterruptProcessingException), torch.inference_mode():
        asyncio.run(node.generate(*inputs, unique_id="9"))
    watching.join()
    assert comfy.texts[-1] == "cancelled, Wiro made no task: nothing paid"
    assert [entry.state for entry in account.journal().newest()] == ["intent"]
    wiro.max_tasks = None
    with torch.inference_mode():
        assert asyncio.run(node.generate(*inputs, unique_id="9"))[2] == "2221"


def is_following(wiro) -> bool:
    return wiro.paths().count("Task/Detail") >= 6


@pytest.mark.parametrize(
    "moment", ["at once", "while some wait", "from outside", "at the door", "being refused"]
)
def test_cancel_in_collect_stops_all_and_starts_none(comfy, wiro, moment):
    hold(wiro)
    runs, _ = submit(pictures(5))
    assert len(wiro.tasks) == 3
    if moment == "at the door":
        with wiro._lock:
            wiro._enter(wiro.tasks["2221"], "task_postprocess_end", wiro.now() + 7)
        wiro.fail("Run", ("silent", 60))

    if moment == "being refused":
        wiro.fail("Run", ("silent", 60))

    def is_the_moment() -> bool:
        if moment == "being refused":
            return is_following(wiro) and len(paid(wiro)) == 5
        if moment == "at the door":
            return len(wiro.tasks) == 4
        return is_following(wiro) and len(paid(wiro)) == 5  # the fifth was refused

    if moment == "at once":
        cancel(comfy)
        with pytest.raises(InterruptProcessingException):
            collect(runs)
    elif moment == "from outside":

        async def prompt():
            node = asyncio.create_task(
                wiro_batch.WiroCollect().collect(runs, unique_id="7", graph=None)
            )
            while not is_the_moment():
                await asyncio.sleep(0.01)
            node.cancel()
            await node

        with pytest.raises(asyncio.CancelledError):
            asyncio.run(prompt())
    else:
        watching = when(is_the_moment, lambda: cancel_and_answer(comfy, wiro))
        with pytest.raises(InterruptProcessingException):
            collect(runs)
        watching.join()
    statuses = [task["status"] for task in wiro.tasks.values()]
    if moment == "at the door":
        assert statuses == ["task_postprocess_end"] + ["task_cancel"] * 3
    else:
        assert statuses == ["task_cancel"] * 3
        assert comfy.texts[-1].count("stopped") == 3
    for thread in [thread for thread in threading.enumerate() if thread.name == "wiro"]:
        thread.join(10)
        assert not thread.is_alive(), "none is left to start one afterwards"
    started = len(paid(wiro))
    wiro.steps_by_itself, wiro.states = True, ("task_postprocess_end",)
    got = collect(runs)
    assert len(got["task_id"]) == 5, got["report"]  # the next queue is good
    assert len(paid(wiro)) - started == 5 - (moment == "at the door")
