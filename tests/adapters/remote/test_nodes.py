"""The remote nodes against a loopback Wiro: what is sent, shown, stopped and output."""

import asyncio
import io
import json
import stat
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from comfyui_skyreels.nodes import host
from comfyui_skyreels.nodes.remote import account, inputs, live_tasks, routes, settings, tasks
from comfyui_skyreels.nodes.remote import nodes as remote
from comfyui_skyreels.nodes.remote import run as wiro_run
from comfyui_skyreels.skyreels.errors import ShapeError
from comfyui_skyreels.wiro_api import candidates, client, jobs, transport
from comfyui_skyreels.wiro_api.errors import (
    AuthError,
    BalanceError,
    ConcurrencyError,
    ConfigError,
    DownloadError,
    LimitError,
    NotFoundError,
    TaskFailedError,
    TaskTimeoutError,
    WiroError,
)
from PIL import Image
from support import wiro_server
from support.clip import make_clip
from support.host import ExecutionBlocker, InterruptProcessingException
from support.wiro_server import KEY, SECRET, STATES, WiroServer

PROMPT = "a woman smiles"


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch):
    """The loopback service knows at once what has become of a Run, a task or a stop."""
    monkeypatch.setattr(client, "POLL_SCHEDULE", ((float("inf"), 0.05),))
    monkeypatch.setattr(client, "STOP_WAIT_S", 0.02)
    monkeypatch.setattr(transport, "FIRST_WAIT_S", 0.05)
    looks = tuple(moment / 20 for moment in candidates.RECONCILE_AT_S)
    monkeypatch.setattr(candidates, "RECONCILE_AT_S", looks)


def run_node(cls, **inputs):
    """The outputs of a node, executed as ComfyUI does."""
    with torch.inference_mode():
        return asyncio.run(getattr(cls(), cls.FUNCTION)(**inputs, unique_id="7"))


def picture(height=48, width=64) -> torch.Tensor:
    return torch.linspace(0, 1, height * width * 3).reshape(1, height, width, 3)


def generate(**changes):
    inputs = {
        "image": picture(),
        "prompt": PROMPT,
        "size": "by orientation",
        "fit": "crop",
        "num_frames": 97,
        "steps": 30,
        "cfg": 6.0,
        **changes,
    }
    return run_node(remote.WiroRemoteI2V, **inputs)


def runs(server) -> list:
    return [seen for seen in server.seen if seen.path.startswith("Run/")]


def when(condition, action) -> threading.Thread:
    """Do something as soon as a condition holds."""

    def wait() -> None:
        for _ in range(1000):
            if condition():
                action()
                return
            time.sleep(0.01)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


# --- what is sent and what comes back -----------------------------------------------------------


def test_a_picture_and_a_prompt_become_frames_a_video_and_a_receipt(comfy, wiro):
    frames, video, taskid, receipt = generate(negative_prompt="blur")
    assert frames.shape == (5, 32, 48, 3)
    assert frames.dtype == torch.float32
    assert 0.0 <= frames.min() <= frames.max() <= 1.0
    assert frames[0, 16:31, 1:15].mean() > 0.9 > 0.5 > frames[0, :15].mean(), "the white square"
    assert Path(video.file) == comfy.root / "output" / "wiro" / "2221" / "0.mp4"
    assert Path(video.file).read_bytes() == wiro.files["0.mp4"]
    assert taskid == "2221"
    told = json.loads(receipt)
    assert (told["taskid"], told["files"]) == ("2221", ["wiro/2221/0.mp4"])
    assert (told["cost_usd"], told["elapsed_s"]) == ("0.00351", 6.0)
    (run,) = runs(wiro)
    assert run.body == {
        "inputImageUrl": "",
        "prompt": f"FPS-24, {PROMPT}",
        "negativePrompt": "blur",
        "scale": "6.0",
        "numFrames": "97",
        "size": "960x544",
        "steps": "30",
    }
    ((name, filename, kind, content),) = run.files
    assert (name, filename, kind) == ("inputImage", "input.png", "image/png")
    assert Image.open(io.BytesIO(content)).size == (960, 544)


@pytest.mark.parametrize("minutes", [float("nan"), float("inf"), -1.0, 0.0])
def test_a_longest_wait_that_is_none_is_refused_before_anything_is_sent(comfy, wiro, minutes):
    with pytest.raises(ConfigError, match="not a valid time-out"):
        generate(timeout_minutes=minutes)
    assert wiro.seen == []


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"image": picture(64, 48)}, "size", "544x960"),
        ({"image": picture(48, 48)}, "size", "960x544"),
        ({"size": "544x960"}, "size", "544x960"),
        ({"num_frames": 96}, "numFrames", "97"),
        ({"num_frames": 98}, "numFrames", "101"),
        ({"add_fps_prefix": False}, "prompt", PROMPT),
        ({"prompt": "FPS-24, x"}, "prompt", "FPS-24, x"),
        ({"cfg": 4.5}, "scale", "4.5"),
        ({"steps": 12}, "steps", "12"),
    ],
)
def test_each_widget_arrives_as_its_parameter(comfy, wiro, changes, field, value):
    generate(**changes)
    assert runs(wiro)[0].body[field] == value


@pytest.mark.parametrize(("fit", "corner"), [("pad", (0, 0, 0)), ("crop", (255, 255, 255))])
def test_a_picture_is_letterboxed_or_cropped(comfy, wiro, fit, corner):
    generate(image=torch.ones(1, 40, 40, 3), fit=fit)
    with Image.open(io.BytesIO(runs(wiro)[0].files[0][3])) as sent:
        assert (sent.getpixel((2, 2)), sent.getpixel((480, 272))) == (corner, (255, 255, 255))


def test_the_same_inputs_are_paid_for_once_and_another_take_again(comfy, wiro):
    first = generate()
    again = generate()
    assert torch.equal(first[0], again[0])
    assert (first[2], json.loads(again[3])["cost_usd"]) == (again[2], "0.00351")
    assert len(runs(wiro)) == 1
    assert any("made before by task 2221" in text for text in comfy.texts)
    Path(first[1].file).unlink()
    assert Path(generate()[1].file).is_file(), "fetched again"
    assert len(runs(wiro)) == 1
    assert generate(take=2)[2] == "2222"
    assert len(runs(wiro)) == 2


def test_the_price_stands_on_the_node_before_and_the_cost_after(comfy, wiro):
    wiro.price = [{"inputs": {}, "price": 0.3, "priceMethod": "cpr"}]
    generate()
    assert (
        "sending · price $0.30, limit $2.00 a run, $20.00 a day (default; change it in Settings > "
        "SkyReels > Wiro or with python -m wiro_api limits --per-run USD)"
    ) in comfy.texts
    assert comfy.texts[-1] == "done · charged $0.30 · task 2221"


def outcomes(comfy) -> list[dict]:
    """What pages were told to keep on nodes."""
    return [data for name, data in comfy.events if name == "skyreels.wiro.outcome"]


def test_what_a_run_cost_is_kept_on_its_node_and_logged_in_one_line(comfy, wiro, caplog):
    caplog.set_level("INFO")
    wiro.price = [{"inputs": {}, "price": 0.3, "priceMethod": "cpr"}]
    generate()
    generate()
    where = {"node": "7", "class_type": "class of 7", "prompt_id": "prompt 1"}
    lines = [
        "done · charged $0.30 · task 2221",
        "made before by task 2221: nothing paid now",
    ]
    assert outcomes(comfy) == [{**where, "line": line, "must_act": False} for line in lines]
    logged = [r.getMessage() for r in caplog.records if "node 7" in r.getMessage()]
    assert logged == [f"Wiro, node 7: {line}" for line in lines]


def test_a_run_that_a_limit_forbids_is_kept_as_the_sentence_that_says_so(comfy, wiro):
    wiro.price = [{"inputs": {}, "price": 2.5, "priceMethod": "cpr"}]
    with pytest.raises(LimitError) as caught:
        generate()
    (kept,) = outcomes(comfy)
    assert (kept["line"], kept["must_act"]) == (str(caught.value), False)


def test_progress_comes_from_the_socket_and_never_moves_back(comfy, wiro, monkeypatch):
    for name in ("SLICE_S", "SHORTEST_POLL_S"):
        monkeypatch.setattr(client, name, 0.02)
    monkeypatch.setattr(wiro_server, "BEAT_S", 0.02)

    def clock() -> float:  # moved by the node's looks at the cancel button
        return 0.05 * comfy.checks

    with WiroServer(states=STATES, pace_s=2.5, with_socket=True, clock=clock) as timed:
        timed.files = wiro.files
        monkeypatch.setenv("WIRO_API_BASE_URL", timed.url)
        monkeypatch.setenv("WIRO_SOCKET_URL", timed.socket_url)
        generate()
    values = [value for value, _ in comfy.progress]
    assert values == sorted(values)
    assert len(set(values)) > 5
    assert any(text.startswith("queued for") for text in comfy.texts)
    steps = [text for text in comfy.texts if text.startswith("step ")]
    assert any("it/s" in text and "left" in text and "task 2221" in text for text in steps)
    logs = [data["log"] for name, data in comfy.events if name == live_tasks.EVENT]
    assert "Loading pipeline components" in logs[-1]
    rows = [data for name, data in comfy.events if name == live_tasks.EVENT]
    assert rows[-1]["is_live"] is False


def test_several_nodes_run_at_the_same_time(comfy, wiro):
    meeting = threading.Barrier(3, timeout=10)
    wiro.files["0.mp4"] = make_clip(5, 48, 32)
    original = wiro_run.read_clip

    def meet(path, check=lambda: None):
        meeting.wait()  # only passes if all three are here at once
        return original(path, check)

    async def three():
        return await asyncio.gather(
            *[
                remote.WiroRemoteI2V().generate(
                    picture(), f"number {n}", "960x544", "crop", 97, 30, 6.0, unique_id=str(n)
                )
                for n in range(3)
            ]
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wiro_run, "read_clip", meet)
        results = asyncio.run(three())
    assert {result[2] for result in results} == {"2221", "2222", "2223"}


# --- stopping -----------------------------------------------------------------------------------


def cancel(comfy) -> None:
    comfy.is_cancelled = True


@pytest.mark.parametrize(
    ("state", "call"),
    [("task_queue", "Task/Cancel"), ("task_accept", "Task/Kill"), ("task_start", "Task/Kill")],
)
def test_cancel_stops_the_remote_task_as_its_state_demands(comfy, wiro, state, call):
    wiro.states, wiro.steps_by_itself = (state, "task_postprocess_end"), False
    watching = when(lambda: wiro.paths().count("Task/Detail") >= 2, lambda: cancel(comfy))
    with pytest.raises(InterruptProcessingException):
        generate()
    watching.join()
    assert wiro.tasks["2221"]["status"] == "task_cancel"
    assert call in wiro.paths()
    assert comfy.texts[-1].startswith("cancelled, ")
    assert [(kept["line"], kept["must_act"]) for kept in outcomes(comfy)] == [
        (comfy.texts[-1], False)
    ]
    assert comfy.texts[-1].endswith(" · task 2221 stopped")
    (entry,) = account.journal().newest()
    assert (entry.state, entry.verdict) == ("ended", "cancelled")
    wiro.states = ("task_postprocess_end",)
    assert generate()[2] == "2222", "a cancelled run may be run again"


def test_a_prompt_that_fails_in_another_node_stops_the_task_too(comfy, wiro):
    wiro.states, wiro.steps_by_itself = ("task_start", "task_postprocess_end"), False

    async def prompt():
        node = asyncio.create_task(
            remote.WiroRemoteI2V().generate(picture(), PROMPT, "960x544", "crop", 97, 30, 6.0)
        )
        while wiro.paths().count("Task/Detail") < 2:
            await asyncio.sleep(0.01)
        node.cancel()  # as asyncio does when another node has raised
        await node

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(prompt())
    assert wiro.tasks["2221"]["status"] == "task_cancel"


def test_cancel_before_the_end_of_the_upload_sends_nothing(comfy, wiro):
    describe = wiro_run.model_record

    def describe_and_cancel(*arguments):
        cancel(comfy)
        return describe(*arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(InterruptProcessingException):
        patch.setattr(wiro_run, "model_record", describe_and_cancel)
        generate()
    assert runs(wiro) == []
    assert wiro.tasks == {}
    assert comfy.texts[-1] == "cancelled before anything was sent: nothing paid"
    assert generate()[2] == "2221"


def test_cancel_while_the_outcome_of_a_run_is_unknown_finds_and_stops_it(comfy, wiro):
    wiro.now = time.time
    wiro.states, wiro.steps_by_itself = ("task_start", "task_postprocess_end"), False
    wiro.fail("Run", "lost")
    watching = when(lambda: wiro.tasks, lambda: cancel(comfy))
    with pytest.raises(InterruptProcessingException):
        generate()
    watching.join()
    assert wiro.tasks["2221"]["status"] == "task_cancel"
    assert len(runs(wiro)) == 1


def test_a_service_that_does_not_answer_the_stop_is_not_waited_for(
    comfy, wiro, monkeypatch, caplog
):
    monkeypatch.setattr(wiro_run, "STOP_S", 0.5)
    wiro.states, wiro.steps_by_itself = ("task_start", "task_postprocess_end"), False

    def end() -> None:
        wiro.fail("Task/Detail", *[{"status": 502}] * 50)
        cancel(comfy)

    watching = when(lambda: wiro.paths().count("Task/Detail") >= 2, end)
    with pytest.raises(InterruptProcessingException):
        generate()
    watching.join()
    assert 2 < wiro.paths().count("Task/Detail") < 50, "it asked, and gave up"
    assert "task 2221 may go on at Wiro: stop it in the Wiro panel" in comfy.texts[-1]
    (kept,) = outcomes(comfy)
    assert (kept["line"], kept["must_act"]) == (comfy.texts[-1], True)
    assert "task 2221 may go on at Wiro and cost money" in caplog.text


def test_cancel_in_mid_download_leaves_nothing_half_written(comfy, wiro):
    wiro.files["0.mp4"] = make_clip(5, 48, 32)
    wiro.fail("GET 0.mp4", ("slow", 5))
    watching = when(lambda: wiro.fetched, lambda: cancel(comfy))
    with pytest.raises(InterruptProcessingException):
        generate()
    watching.join()
    assert [p for p in (comfy.root / "output").rglob("*") if p.is_file()] == []
    assert comfy.texts[-1].startswith("cancelled, charged $0.00351 · task 2221 had ended")
    assert generate()[0].shape == (5, 32, 48, 3)
    assert len(runs(wiro)) == 1


def test_cancel_waits_for_an_answer_that_is_on_its_way_and_stops_what_it_names(comfy, wiro):
    wiro.states, wiro.steps_by_itself = ("task_start", "task_postprocess_end"), False
    wiro.fail("Run", ("silent", 60))
    values = {"prompt": "x", "size": "960x544", "inputImageUrl": "https://x.example/a.png"}

    def end() -> None:
        wiro.add_task(dict(wiro.tasks["2221"]["parameters"]))  # somebody else's, the same
        cancel(comfy)
        when(lambda: not comfy.is_cancelled, wiro.let_go).join()

    watching = when(lambda: wiro.tasks, end)
    with pytest.raises(InterruptProcessingException):
        run_node(remote.WiroRunModel, model="wiro/SkyReels-V1", parameters=json.dumps(values))
    watching.join()
    assert [task["status"] for task in wiro.tasks.values()] == ["task_cancel", "task_start"]
    assert comfy.texts[-1].endswith(" · task 2221 stopped")


def test_cancel_of_a_lost_run_stops_no_task_of_another_picture(comfy, wiro, monkeypatch):
    monkeypatch.setattr(candidates, "RECONCILE_AT_S", (0.1, 0.3, 60.0))
    wiro.states, wiro.steps_by_itself = ("task_start", "task_postprocess_end"), False
    wiro.fail("Run", "reset")

    def end() -> None:
        theirs = ("inputImage", "b.png", "image/png", b"another picture")
        wiro.add_task(dict(runs(wiro)[0].body), uploads=[theirs])
        monkeypatch.setattr(candidates, "RECONCILE_AT_S", (0.1, 0.3))
        cancel(comfy)

    watching = when(lambda: runs(wiro), end)
    with pytest.raises(InterruptProcessingException):
        generate()
    watching.join()
    assert wiro.tasks["2221"]["status"] == "task_start"
    assert "the run may go on at Wiro: stop it in the Wiro panel" in comfy.texts[-1]
    assert account.journal().newest()[0].state == "sending"


def test_of_a_batch_no_node_gets_the_video_of_another_picture(comfy, wiro, monkeypatch):
    monkeypatch.setattr(candidates, "RECONCILE_AT_S", (0.05, 0.1, 0.2))
    wiro.fail("Run", "reset", ("silent", 0.5), "lost")
    pictures = [picture().roll(number, dims=2) for number in range(3)]

    async def batch():
        return await asyncio.gather(
            *[
                remote.WiroRemoteI2V().generate(
                    image, PROMPT, "960x544", "crop", 97, 30, 6.0, unique_id=str(number)
                )
                for number, image in enumerate(pictures)
            ],
            return_exceptions=True,
        )

    ends = asyncio.run(batch())
    assert len(runs(wiro)) == 3
    assert [type(end).__name__ for end in ends].count("RunOutcomeUnknownError") == 1
    for image, end in zip(pictures, ends, strict=True):
        if isinstance(end, tuple):
            (stored,) = (c for p, c in wiro.inputs.items() if p.startswith(f"upload-{end[2]}/"))
            assert stored == inputs.png_part(image, "960x544")[1]


# --- the job of a picture -----------------------------------------------------------------------


def test_a_picture_that_is_packed_into_other_bytes_is_the_same_job(
    comfy, wiro, monkeypatch, forget_pictures
):
    generate()
    forget_pictures()
    save = Image.Image.save
    monkeypatch.setattr(Image.Image, "save", lambda *a, **k: save(*a, **k, compress_level=1))
    first = runs(wiro)[0].files[0][3]
    assert inputs.png_part(picture(), "960x544")[1] != first
    assert generate()[2] == "2221"
    assert len(runs(wiro)) == 1
    assert generate(image=picture().flip(1))[2] == "2222"


def test_pictures_of_the_same_numbers_in_another_shape_are_other_jobs(comfy, wiro):
    from comfyui_skyreels.wiro_api.client import Model
    from comfyui_skyreels.wiro_api.jobs import Job, job_key

    image = torch.linspace(0, 1, 4 * 6 * 3)
    shapes = [(1, 4, 6, 3), (1, 6, 4, 3), (1, 2, 12, 3), (1, 24, 1, 3)]
    parts = [inputs.png_part(image.reshape(shape)) for shape in shapes]
    keys = {job_key(Job(Model("a", "b"), {}, [("inputImage", part)])) for part in parts}
    assert len(keys) == len(shapes)


def test_a_job_that_was_known_by_its_bytes_is_still_known(comfy, wiro):
    from comfyui_skyreels.wiro_api.jobs import Job, job_key
    from comfyui_skyreels.wiro_api.schema import SKYREELS

    values = {
        "prompt": f"FPS-24, {PROMPT}",
        "negativePrompt": "",
        "scale": 6.0,
        "numFrames": 97,
        "size": "960x544",
        "steps": 30,
    }
    part = inputs.png_part(picture(), "960x544")
    key = job_key(Job(SKYREELS, values, [("inputImage", tuple(part))]), service=wiro.url)
    entry = account.journal().begin(key, str(SKYREELS))
    account.journal().mark_sending(entry)
    account.journal().mark_started(entry.id, wiro.add_task({"prompt": "x"}))
    assert generate()[2] == "2221"
    assert runs(wiro) == []


# --- what goes wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "inputs", "error", "words"),
    [
        (
            {"WIRO_API_KEY": ""},
            {},
            ConfigError,
            "no Wiro API key: paste it into Settings > .* WIRO_API_KEY",
        ),
        ({"WIRO_API_KEY": "wrong"}, {}, AuthError, "check key, secret"),
        ({"WIRO_API_SECRET": "wrong"}, {}, AuthError, "check key, secret"),
        ({"WIRO_API_KEY": "test key"}, {}, ConfigError, "API key holds a blank"),
        ({"WIRO_API_BASE_URL": "http://api.wiro.ai/v1"}, {}, ConfigError, "not a https address"),
        ({}, {"prompt": "  "}, ConfigError, "The prompt is empty"),
        ({}, {"num_frames": 0}, ConfigError, "frames is 0: the least is 5"),
        ({}, {"image": torch.zeros(3, 5)}, ShapeError, "Image must be"),
        ({}, {"image": torch.full((1, 8, 8, 3), float("nan"))}, ShapeError, "NaN"),
        ({}, {"steps": 5000}, ConfigError, "steps is 5000, and the model takes"),
    ],
)
def test_mistakes_are_one_sentence_and_cost_nothing(
    comfy, wiro, monkeypatch, environment, inputs, error, words
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(error, match=words):
        generate(**inputs)
    assert wiro.tasks == {}


def test_a_key_in_quotes_and_blanks_is_taken(comfy, wiro, monkeypatch):
    monkeypatch.setenv("WIRO_API_KEY", f' "{KEY}" ')
    monkeypatch.setenv("WIRO_API_SECRET", f"'{SECRET}'\n")
    assert generate()[2] == "2221"


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        ((97, "balance too low"), BalanceError, "balance too low"),
        ((96, "too many"), ConcurrencyError, "too many"),
        ((1, "slug-owner-project-not-exist"), NotFoundError, "not-exist"),
    ],
)
def test_a_refusal_is_told_and_leaves_no_task(comfy, wiro, fault, error, words):
    wiro.fail("Run", fault, fault)
    with pytest.raises(error, match=words):
        generate()
    assert wiro.tasks == {}
    assert account.journal().newest()[0].state == "refused"
    wiro._faults.clear()
    assert generate()[2] == "2221"


def test_a_busy_account_is_waited_for_only_if_asked_with_a_countdown(comfy, wiro, monkeypatch):
    sleep, seconds = wiro_run.RunView.sleep, []

    def nap(view, wait_s: float) -> None:
        if wait_s:  # 0 looks whether to go on, in a call that takes its time
            seconds.append(wait_s)
        sleep(view, min(wait_s, 0.01))

    monkeypatch.setattr(wiro_run.RunView, "sleep", nap)
    wiro.fail("Run", (96, "too many"))
    assert generate(wait_when_busy=True)[2] == "2221"
    assert seconds[:5] == [1.0] * 5
    countdown = [t for t in comfy.texts if "next try in" in t]
    assert [t.rpartition("in ")[2] for t in countdown] == ["5 s", "4 s", "3 s", "2 s", "1 s"]
    assert len(runs(wiro)) == 2


def test_a_limit_keeps_the_run_from_being_sent(comfy, wiro):
    wiro.price = [{"inputs": {}, "price": 0.3, "priceMethod": "cpr"}]
    limits = {"per_run": None, "per_day": "0.50", "per_month": ""}
    settings.save_limits({**limits, "proof": KEY[-4:]})
    generate()
    with pytest.raises(LimitError, match=r"would cost \$0.30; your limit is \$0.50 a day"):
        generate(take=2)
    assert len(wiro.tasks) == 1
    assert settings.describe_account()["spent"] == {"day": "0.3", "month": "0.3"}


def test_a_failed_task_says_why_with_its_id(comfy, wiro):
    wiro.final = {"pexit": "1", "outputs": [], "debugerror": "CUDA error"}
    with pytest.raises(TaskFailedError, match="Task 2221 failed.*CUDA error"):
        generate()


def test_a_wait_that_ends_goes_on_with_the_next_prompt(comfy, wiro):
    wiro.states, wiro.steps_by_itself = ("task_start", "task_postprocess_end"), False
    with pytest.raises(TaskTimeoutError, match="2221"):
        generate(timeout_minutes=0.002)
    wiro.steps_by_itself = True
    assert generate()[2] == "2221"
    assert len(runs(wiro)) == 1


def test_a_result_that_does_not_decode_is_no_result_and_is_not_paid_for_twice(comfy, wiro):
    good, wiro.files["0.mp4"] = wiro.files["0.mp4"], make_clip(5, 48, 32)[:900]
    with pytest.raises(DownloadError, match="2221.*paid"):
        generate()
    assert [p for p in (comfy.root / "output").rglob("*") if p.is_file()] == []
    wiro.files["0.mp4"] = good
    wiro.tasks["2221"]["outputs"][0]["size"] = str(len(good))
    assert generate()[2] == "2221"
    assert len(runs(wiro)) == 1


# --- the other nodes ----------------------------------------------------------------------------


def run_model(**changes):
    inputs = {"model": "wiro/SkyReels-V1", "image": picture(), **changes}
    values = {"prompt": "x", "size": "960x544", **inputs.pop("values", {})}
    return run_node(remote.WiroRunModel, parameters=json.dumps(values), **inputs)


def test_any_model_is_run_by_its_slug_with_its_defaults(comfy, wiro):
    frames, _, text, taskid, *_ = run_model()
    assert (frames.shape, text, taskid) == ((5, 32, 48, 3), "", "2221")
    (run,) = runs(wiro)
    assert (run.body["steps"], run.body["numFrames"]) == ("30", "97")
    assert Image.open(io.BytesIO(run.files[0][3])).size == (64, 48), "the picture in its own size"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"values": {"seed": 1}}, "no parameter 'seed'.*prompt"),
        ({"values": {"size": "1x1"}}, "choose one of 960x544, 544x960"),
        ({"values": {"prompt": ""}}, "wants prompt"),
        ({"image": None}, "wants a file for inputImage"),
        ({"image_parameter": "photo"}, "no parameter 'photo'"),
        ({"model": "SkyReels"}, "owner/project"),
        ({"model": "wiro/nothing"}, "Wiro has no model wiro/nothing: take owner/project"),
    ],
)
def test_a_model_that_cannot_run_so_is_not_started(comfy, wiro, changes, words):
    with pytest.raises(WiroError, match=words):
        run_model(**changes)
    assert wiro.tasks == {}


@pytest.mark.parametrize("text", ["{", "[1]", "prompt: x"])
def test_parameters_must_be_a_json_object(text):
    assert "JSON" in remote.WiroRunModel.VALIDATE_INPUTS(text)
    assert remote.WiroRunModel.VALIDATE_INPUTS('{"prompt": "x"}') is True


def test_pictures_and_texts_come_out_of_models_that_make_them(comfy, wiro):
    file = io.BytesIO()
    Image.new("RGB", (6, 4), (255, 0, 0)).save(file, "PNG")
    wiro.files |= {"a.png": file.getvalue(), "b.png": file.getvalue()}
    wiro.final = {
        "outputs": [
            {"name": n, "contenttype": "image/png", "url": wiro.file_url(n)}
            for n in ("a.png", "b.png")
        ]
        + [{"contenttype": "raw", "content": "a text"}]
    }
    frames, video, text, *_ = run_model()
    assert (frames.shape, text) == ((2, 4, 6, 3), "a text")
    assert frames[1, 0, 0].tolist() == [1.0, 0.0, 0.0]
    assert isinstance(video, ExecutionBlocker)
    assert "2221 made no video" in video.message
    wiro.final = {"outputs": [{"contenttype": "raw", "content": "a text"}]}
    frames, *_ = run_model(take=2)
    assert "made no picture" in frames.message


@pytest.mark.parametrize("by", ["id", "token"])
def test_an_earlier_task_is_collected(comfy, wiro, by):
    wiro.add_task({"prompt": "x"})
    token = wiro.tasks["2221"]["socketaccesstoken"]
    task = "2221" if by == "id" else f"token:{token}"
    frames, _, _, taskid, receipt, *_ = run_node(remote.WiroTaskResult, task=task)
    assert (frames.shape, taskid) == ((5, 32, 48, 3), "2221")
    assert token not in receipt
    assert runs(wiro) == []
    (entry,) = account.journal().newest()
    assert (entry.taskid, entry.state) == ("2221", "ended")
    assert settings.describe_account()["spent"]["day"] == "0", "it was not paid for here"


def test_cancel_stops_the_wait_for_an_earlier_task_and_not_the_task(comfy, wiro):
    wiro.states, wiro.steps_by_itself = ("task_start", "task_postprocess_end"), False
    wiro.add_task({"prompt": "x"})
    watching = when(lambda: wiro.paths().count("Task/Detail") >= 2, lambda: cancel(comfy))
    with pytest.raises(InterruptProcessingException):
        run_node(remote.WiroTaskResult, task="2221")
    watching.join()
    assert wiro.tasks["2221"]["status"] == "task_start"
    assert comfy.texts[-1] == "stopped waiting; task 2221 goes on at Wiro"


def test_a_task_that_is_none_is_told(comfy, wiro):
    with pytest.raises(ConfigError, match="is not a task"):
        run_node(remote.WiroTaskResult, task="")
    with pytest.raises(NotFoundError, match="There is no task yet"):
        run_node(remote.WiroTaskResult, task="999")


def test_files_and_pictures_are_uploaded_once(comfy, wiro):
    (comfy.root / "input" / "a.png").write_bytes(b"\x89PNG")
    assert "a.png" in remote.WiroUploadFile.INPUT_TYPES()["required"]["file"][0]
    url, file_id = run_node(remote.WiroUploadFile, file="a.png", folder="mine")
    assert (url, file_id) == ("https://cdn.wiro.ai/u1.png", "u1")
    assert wiro.paths() == ["File/FolderCreate", "File/Upload"]
    run_node(remote.WiroUploadFile, file="the image", folder="", image=picture())
    assert Image.open(io.BytesIO(wiro.seen[-1].files[0][3])).size == (64, 48)
    with pytest.raises(ConfigError, match="No image is connected"):
        run_node(remote.WiroUploadFile, file="the image", folder="")
    with pytest.raises(ConfigError, match="may hold letters"):
        run_node(remote.WiroUploadFile, file="a.png", folder="a/b")
    with pytest.raises(ConfigError, match="no file"):
        run_node(remote.WiroUploadFile, file="gone.png", folder="")


# --- what the page asks for ---------------------------------------------------------------------


def test_the_key_is_written_for_its_owner_only_and_never_told(comfy, wiro, monkeypatch):
    monkeypatch.delenv("WIRO_API_KEY")
    monkeypatch.delenv("WIRO_API_SECRET")
    assert settings.describe_account()["has_key"] is False
    answers = [
        settings.save_account({"api_key": "planted-key-123456", "api_secret": "planted-secret"}),
        settings.describe_account(),
    ]
    for answer in answers:
        assert answer["source"] == "file"
        assert "planted" not in json.dumps(answer)
        assert "3456" not in json.dumps(answer), "the end of the key is what proves it is known"
    assert stat.S_IMODE(account.credentials_file().stat().st_mode) == 0o600
    assert account.credentials_file().parent.name == "__skyreels"
    with pytest.raises(AuthError, match="check key, secret"):
        settings.test_account({})
    settings.save_account({"api_key": KEY, "api_secret": SECRET, "proof": "3456"})
    assert "accepts the key" in settings.test_account({})["message"]
    assert generate()[2] == "2221", "the nodes use it"
    assert settings.save_account({"api_key": "", "proof": KEY[-4:]})["has_key"] is False
    assert not account.credentials_file().exists()
    with pytest.raises(ConfigError, match="API key holds a blank"):
        settings.save_account({"api_key": "a b", "api_secret": ""})
    with pytest.raises(ConfigError, match="must be a text"):
        settings.save_account({"api_key": ["x"]})


def test_a_key_in_the_environment_wins_and_is_not_overwritten(comfy, wiro):
    assert settings.describe_account()["source"] == "environment"
    with pytest.raises(ConfigError, match="WIRO_API_KEY is set in the environment"):
        settings.save_account({"api_key": "other", "api_secret": ""})


def test_tasks_are_listed_without_secrets_and_with_their_files(comfy, wiro):
    generate()
    answer = tasks.list_tasks(50)
    assert answer["error"] == ""
    (task,) = answer["tasks"]
    assert (task["taskid"], task["verdict"], task["cost"]) == ("2221", "succeeded", "0.00351")
    assert task["files"] == [
        {"filename": "0.mp4", "subfolder": "wiro/2221", "type": "output", "kind": "video"}
    ]
    told = json.dumps([answer, *(data for _, data in comfy.events), comfy.texts])
    for secret in (KEY, SECRET, wiro.tasks["2221"]["socketaccesstoken"], PROMPT, str(comfy.root)):
        assert secret not in told


def entry_in(state: str, wiro, **task) -> int:
    """A row whose task is in a state, as after a restart."""
    wiro.states, wiro.steps_by_itself = (state, "task_postprocess_end"), False
    taskid = wiro.add_task({"prompt": "x"})
    wiro.tasks[taskid] |= task
    return account.journal().adopt(taskid, "wiro/SkyReels-V1").id


def test_a_task_of_an_earlier_start_is_refreshed_and_stopped(comfy, wiro):
    row = entry_in("task_start", wiro)
    assert tasks.act(row, "refresh")["task"]["status"] == "task_start"
    with pytest.raises(WiroError, match="2221 has not ended"):
        tasks.act(row, "collect")
    task = tasks.act(row, "stop")["task"]
    assert (task["state"], task["verdict"]) == ("ended", "cancelled")
    assert wiro.tasks["2221"]["status"] == "task_cancel"
    rows = [data for name, data in comfy.events if name == live_tasks.EVENT]
    assert rows[-1]["verdict"] == "cancelled"


def test_an_ended_task_is_downloaded_and_its_remote_files_deleted(comfy, wiro):
    row = account.journal().adopt(wiro.add_task({"prompt": "x"}), "wiro/SkyReels-V1").id
    assert tasks.act(row, "refresh")["task"]["verdict"] == "succeeded"
    task = tasks.act(row, "collect")["task"]
    assert task["files"][0]["filename"] == "0.mp4"
    deleted = tasks.act(row, "delete_files")["task"]
    assert deleted["remote_deleted"] is True
    assert deleted["files"] == task["files"], "what was downloaded stays"
    assert wiro.tasks["2221"]["outputs"] == []


@pytest.mark.parametrize("later_s", [400, -10_000])  # the clock may have been set back
def test_a_run_whose_outcome_is_unknown_asks_and_may_be_called_not_started(
    comfy, wiro, monkeypatch, later_s
):
    wiro.fail("Run", "reset")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wiro_run.RunView, "sleep", lambda self, seconds: None)
        with pytest.raises(WiroError, match="outcome is unknown"):
            generate()
        with pytest.raises(WiroError, match="outcome is unknown"):
            generate()
    assert len(runs(wiro)) == 1
    (task,) = tasks.list_tasks(5)["tasks"]
    assert task["state"] == "sending"
    with pytest.raises(WiroError, match="no known task"):
        tasks.act(task["id"], "stop")
    with pytest.raises(WiroError, match="may still be answered"):
        tasks.act(task["id"], "forget")
    later = time.time() + later_s
    monkeypatch.setattr(tasks, "time", SimpleNamespace(time=lambda: later))
    assert tasks.act(task["id"], "forget")["task"]["state"] == "refused"
    assert generate()[2] == "2221"
    with pytest.raises(WiroError, match="Only a run whose outcome is unknown"):
        tasks.act(account.journal().newest()[0].id, "forget")


def test_what_is_not_there_is_told(comfy, wiro):
    for row, action in ((99, "stop"), (99, "explode")):
        with pytest.raises(WiroError, match="has no task 99"):
            tasks.act(row, action)


def test_a_broken_journal_starts_nothing_and_is_told(comfy, wiro):
    account.journal().path.parent.mkdir(parents=True, exist_ok=True)
    account.journal().path.write_bytes(b"no database" * 100)
    with pytest.raises(ConfigError, match="journal.*Move the file away"):
        generate()
    assert wiro.tasks == {}
    assert "journal" in tasks.list_tasks(5)["error"]
    assert "journal" in settings.describe_account()["problem"]
    wiro.add_task({"prompt": "x"})
    assert run_node(remote.WiroTaskResult, task="2221")[3] == "2221", "what was paid for comes home"


def test_routes_are_registered_under_one_prefix():
    class Table:
        def __init__(self):
            self.paths = []

        def get(self, path):
            self.paths.append(("GET", path))
            return lambda function: function

        def post(self, path):
            self.paths.append(("POST", path))
            return lambda function: function

    table = Table()
    routes.register(table)
    assert len(table.paths) == 12
    assert all(path.startswith("/skyreels/wiro/") for _, path in table.paths)
    assert {p for m, p in table.paths if m == "GET"} == {
        "/skyreels/wiro/account",
        "/skyreels/wiro/tasks",
        "/skyreels/wiro/models",
        "/skyreels/wiro/models/one",
        "/skyreels/wiro/tasks/{row:[0-9]{1,18}}/file",
    }


def test_work_in_a_thread_keeps_its_context_and_hands_its_error_on():
    import contextvars

    node = contextvars.ContextVar("node")

    async def prompt():
        node.set("7")
        assert await host.run_in_thread(node.get, threading.Event()) == "7"
        with pytest.raises(ZeroDivisionError):
            await host.run_in_thread(lambda: 1 / 0, threading.Event())

    asyncio.run(prompt())


def test_the_journal_is_shared_with_the_command_line(comfy, wiro, caplog):
    from comfyui_skyreels.wiro_api import state
    from comfyui_skyreels.wiro_api.journal import Journal
    from comfyui_skyreels.wiro_api.spending import load_limits

    own = comfy.root / "user" / "__skyreels"
    Journal(own / "wiro_journal.sqlite").adopt("7", "wiro/SkyReels-V1")
    Journal(state.user_folder() / "journal.sqlite").adopt("8", "wiro/SkyReels-V1")
    assert {entry.taskid for entry in account.journal().newest()} == {"7", "8"}
    assert account.journal().path == state.open_state() / "journal.sqlite"
    settings.save_limits({"per_run": "1", "per_day": "20", "per_month": ""})
    assert load_limits(state.open_state() / "limits.json").per_run == 1
    assert account.credentials_file() == own / "wiro.env"
    assert caplog.text == ""


def test_an_old_journal_that_cannot_be_read_starts_nothing_and_keeps_no_result_away(
    comfy, wiro, caplog
):
    own = comfy.root / "user" / "__skyreels"
    own.mkdir(parents=True)
    (own / "wiro_journal.sqlite").write_bytes(b"no database" * 100)
    for _ in range(2):
        with pytest.raises(ConfigError, match="wiro_journal.sqlite cannot be used"):
            generate()
    assert wiro.tasks == {}
    assert caplog.text.count("cannot be merged") == 1
    wiro.add_task({"prompt": "x"})
    assert run_node(remote.WiroTaskResult, task="2221")[3] == "2221"


# --- hostile and unlucky surroundings ------------------------------------------------------------


def test_defaults_of_the_service_may_change_and_the_job_is_still_the_same(comfy, wiro, monkeypatch):
    from support import wiro_server

    generate()
    Path(comfy.root / "output" / "wiro" / "2221" / "0.mp4").unlink()
    wiro_run._records.clear()
    more = {"title": "More", "items": [{"id": "extra", "type": "text", "default": "x"}]}
    monkeypatch.setattr(wiro_server, "PARAMETERS", [*wiro_server.PARAMETERS, more])
    assert generate()[2] == "2221"
    assert len(runs(wiro)) == 1
    assert generate(take=2)[2] == "2222"
    assert runs(wiro)[-1].body["extra"] == "x"


def test_a_model_that_is_not_described_is_not_run_unchecked(comfy, wiro, monkeypatch):
    monkeypatch.setattr(wiro_run.RunView, "sleep", lambda self, seconds: None)
    wiro.fail("Tool/Detail", *[{"status": 502}] * 10)
    wiro.slugs = ("acme/other",)
    with pytest.raises(WiroError, match="502"):
        run_model(model="acme/other")
    assert wiro.tasks == {}
    wiro.fail("Tool/Detail", *[{"status": 502}] * 5)
    wiro.slugs = ("wiro/SkyReels-V1",)
    wiro._faults["Tool/Detail"] = [{"status": 502}] * 5
    assert generate()[2] == "2221", "of SkyReels-V1 enough is known"


@pytest.mark.parametrize("damage", ["garbage", "gone"])
def test_cancel_stops_the_task_although_the_journal_is_lost(comfy, wiro, damage):
    wiro.states, wiro.steps_by_itself = ("task_start", "task_postprocess_end"), False

    def lose() -> None:
        path = account.journal().path
        path.write_bytes(b"garbage" * 99) if damage == "garbage" else path.unlink()
        cancel(comfy)

    watching = when(lambda: wiro.paths().count("Task/Detail") >= 2, lose)
    with pytest.raises(InterruptProcessingException):
        generate()
    watching.join()
    assert wiro.tasks["2221"]["status"] == "task_cancel"
    assert "2221 stopped" in comfy.texts[-1]


@pytest.mark.parametrize("damage", ["cut", "moved"])
def test_a_file_that_is_damaged_or_elsewhere_is_no_dead_end(comfy, wiro, monkeypatch, damage):
    path = Path(generate()[1].file)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:500])
    else:
        import folder_paths

        monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(comfy.root / "new"))
    frames, video, _, receipt = generate()
    assert frames.shape == (5, 32, 48, 3)
    assert Path(video.file).read_bytes() == wiro.files["0.mp4"]
    assert len(runs(wiro)) == 1
    assert str(comfy.root) not in receipt


def test_an_evil_id_of_a_task_stays_in_the_output_folder(comfy, wiro):
    folder = account.task_folder("../../../evil")
    assert folder.parent == comfy.root / "output" / "wiro"
    assert folder.name == "_________evil"


def test_an_address_of_the_socket_that_is_not_allowed_is_told_before_anything_is_paid(
    comfy, wiro, monkeypatch
):
    monkeypatch.setenv("WIRO_SOCKET_URL", "ws://socket.example/v1")
    with pytest.raises(ConfigError, match="WIRO_SOCKET_URL is not a wss address"):
        generate()
    assert wiro.tasks == {}


def test_without_the_websocket_package_polling_brings_the_result(comfy, wiro, monkeypatch, caplog):
    import sys

    monkeypatch.setitem(sys.modules, "websocket", None)
    monkeypatch.setenv("WIRO_SOCKET_URL", "ws://127.0.0.1:9/v1")
    wiro.states = ("task_start", "task_postprocess_end")
    assert generate()[2] == "2221"
    assert caplog.text.count("pip install websocket-client") == 1


def test_a_task_that_is_not_there_in_the_first_second_is_waited_for(comfy, wiro):
    wiro.now = time.time
    wiro.states = ("task_start", "task_postprocess_end")
    wiro.fail("Task/Detail", *[(1, "There is no task yet.")] * 2)
    assert generate()[2] == "2221"


def test_cancel_is_seen_while_an_answer_is_waited_for(comfy, wiro):
    wiro.now = time.time
    wiro.states, wiro.steps_by_itself = ("task_start", "task_postprocess_end"), False
    wiro.fail("Run", ("silent", 60))
    watching = when(lambda: wiro.tasks, lambda: cancel(comfy))
    with pytest.raises(InterruptProcessingException):
        generate()
    watching.join()
    assert wiro.held_s == 0
    assert wiro.tasks["2221"]["status"] == "task_cancel"


def test_cancel_is_seen_while_a_slow_server_sends_the_file(comfy, wiro):
    wiro.fail("GET 0.mp4", ("slow", 60))
    watching = when(lambda: wiro.fetched, lambda: cancel(comfy))
    with pytest.raises(InterruptProcessingException):
        generate()
    watching.join()
    assert wiro.held_s < 60, "the file was not waited for"


def test_two_nodes_with_the_same_inputs_pay_once(comfy, wiro, monkeypatch):
    moments = SimpleNamespace(uniform=lambda low, high: 0.01)
    monkeypatch.setattr(jobs, "random", moments)  # until the one looks for the other's task again
    wiro.states = ("task_start", "task_postprocess_end")
    inputs = (picture(), PROMPT, "960x544", "crop", 97, 30, 6.0)

    async def two():
        nodes = [remote.WiroRemoteI2V().generate(*inputs, unique_id=str(n)) for n in range(2)]
        return await asyncio.gather(*nodes)

    first, second = asyncio.run(two())
    assert first[2] == second[2] == "2221"
    assert len(runs(wiro)) == 1


def test_the_log_of_a_task_and_the_rows_that_are_kept_are_bounded(comfy, wiro):
    live = live_tasks.subscribe(1)
    live_tasks.add_log(live, ["x" * 10_000] * 1000)
    assert len(live.log) == live_tasks.LOG_LINES
    assert len(live.log[0]) == live_tasks.LINE_LENGTH
    live_tasks.unsubscribe(1)
    for row in range(2, 400):
        live_tasks.subscribe(row)
        live_tasks.unsubscribe(row)
    assert len(live_tasks._states) <= live_tasks.MAX_TASKS
    assert live_tasks._subscribers == {}


def test_an_error_on_the_page_names_no_folder_of_this_machine(comfy, wiro, monkeypatch):
    (comfy.root / "output").mkdir()
    (comfy.root / "output" / "wiro").write_text("a file where the folder should be")
    with pytest.raises(DownloadError):
        generate()
    told = json.dumps([data for _, data in comfy.events])
    assert "output/wiro" in told
    assert str(comfy.root) not in told
