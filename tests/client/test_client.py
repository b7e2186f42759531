"""The client against a loopback server that enforces the protocol and misbehaves on demand.

Time is injected: no test waits. What money depends on is counted on the wire.
"""

import logging

import pytest
from comfyui_skyreels.wiro_api import client as wiro
from comfyui_skyreels.wiro_api.client import Client, Model, RunHandle, raise_for_failure
from comfyui_skyreels.wiro_api.errors import (
    AccountError,
    ApiError,
    AuthError,
    BalanceError,
    ConcurrencyError,
    ConfigError,
    NotFoundError,
    RequestError,
    RunOutcomeUnknownError,
    TaskCancelledError,
    TaskFailedError,
    TaskStalledError,
    TaskTimeoutError,
    TransportError,
    WiroError,
)
from comfyui_skyreels.wiro_api.signing import Credentials
from comfyui_skyreels.wiro_api.transport import check_base_url, redact
from support.wiro_client import MODEL, PARAMETERS, make_client
from support.wiro_server import KEY, SECRET, STATES, WiroServer

IMAGE = ("inputImage", ("input.png", b"\x89PNG picture", "image/png"))


STRANGE = {"status": 200, "body": {"result": False, "errors": [{"code": 0, "message": "strange"}]}}


def runs(server) -> int:
    return sum(path.startswith("Run/") for path in server.paths())


# --- requests as they go out --------------------------------------------------------------------


def test_a_run_with_an_image_is_the_documented_multipart(server, client):
    client.run(MODEL, PARAMETERS, [IMAGE])
    _, seen = server.seen
    assert seen.path == "Run/wiro/SkyReels-V1"
    assert seen.headers["content-type"].startswith("multipart/form-data; boundary=")
    assert seen.body == {
        "inputImageUrl": "", "prompt": "FPS-24, a woman smiles", "negativePrompt": "",
        "scale": "6.0", "numFrames": "97", "size": "960x544", "steps": "30",
    }  # fmt: skip
    assert seen.files == [("inputImage", "input.png", "image/png", b"\x89PNG picture")]
    assert b'name="inputImageUrl"\r\n\r\n\r\n' in seen.raw


def test_a_run_with_an_address_is_the_documented_json(server, client):
    parameters = {**PARAMETERS, "inputImageUrl": "https://x.example/a.png"}
    client.run(MODEL, parameters)
    _, seen = server.seen
    assert seen.headers["content-type"] == "application/json"
    assert seen.body == parameters


def test_every_attempt_is_signed_anew_and_a_project_without_secret_sends_the_key_alone(clock):
    with WiroServer(key_only=True) as server:
        make_client(server, clock, secret="").list_tasks()
        (seen,) = server.seen
    assert "x-nonce" not in seen.headers
    assert "x-signature" not in seen.headers
    with WiroServer() as server:
        server.fail("Task/List", {"status": 502}, "html")
        make_client(server, clock).list_tasks()
        nonces = [int(seen.headers["x-nonce"]) for seen in server.seen]
    assert len(nonces) == 3
    assert nonces == sorted(set(nonces))


def test_the_bodies_of_the_other_calls_are_the_documented_ones(server, client):
    taskid = server.add_task({"prompt": "x"})
    token = server.tasks[taskid]["socketaccesstoken"]
    server.steps_by_itself = False
    client.detail(RunHandle(taskid, token))
    client.detail(RunHandle(taskid, ""))
    client.cancel(RunHandle(taskid, token))
    client.delete_files(RunHandle(taskid, token))
    server.tasks[taskid]["status"] = "task_start"
    client.kill(RunHandle(taskid, token))
    server.tasks[taskid]["status"] = "task_start"
    client.kill(RunHandle("", token))
    assert [seen.body for seen in server.seen] == [
        {"tasktoken": token}, {"taskid": taskid}, {"taskid": taskid}, {"tasktoken": token},
        {"taskid": taskid}, {"socketaccesstoken": token},
    ]  # fmt: skip
    assert client.create_folder("my_folder-1")["id"] == "f1"
    assert client.upload(("a.png", b"x", "image/png"), folder="f1")["url"].endswith("u1.png")
    assert client.model_detail(MODEL)["title"] == "SkyReels-V1"
    assert client.list_models("sky")[0]["title"] == "sky"
    with pytest.raises(ConfigError, match="letters, digits"):
        client.create_folder("my folder")


def test_the_other_spelling_of_a_slug_is_tried_once(clock):
    with WiroServer(slugs=("wiro/skyreels-v1",)) as server:
        handle = make_client(server, clock).run(MODEL, PARAMETERS)
        assert handle.taskid == "2221"
        assert server.paths() == ["Task/List", "Run/wiro/SkyReels-V1", "Run/wiro/skyreels-v1"]
    with WiroServer(slugs=()) as server:
        with pytest.raises(NotFoundError):
            make_client(server, clock).run(MODEL, PARAMETERS)
        assert len(server.tasks) == 0


@pytest.mark.parametrize("slug", ["wiro", "/", "a/b/c", "wiro/ "])
def test_a_slug_that_cannot_be_is_refused(slug):
    with pytest.raises(ConfigError, match="owner/project"):
        Model.parse(slug)


def test_a_slug_with_blanks_is_encoded(clock):
    with WiroServer(slugs=("wiro/Virtual%20Try-On",)) as server:
        make_client(server, clock).run(Model.parse("wiro/Virtual Try-On"), PARAMETERS)
        assert server.paths() == ["Task/List", "Run/wiro/Virtual%20Try-On"]


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ((96, "concurrency limit"), ConcurrencyError),
        ((97, "balance"), BalanceError),
        ((98, "registered"), AccountError),
        ((99, "bearer"), AuthError),
        ((0, "Request parameter [size] required"), RequestError),
        ((0, "You don't have any permission for this action."), RequestError),
        ({"status": 401, "body": {"result": False, "errors": ["no"]}}, AuthError),
        ({"status": 403, "body": {"result": False}}, AuthError),
    ],
)
def test_a_refused_run_is_its_own_error_and_is_not_sent_again(server, client, fault, error):
    server.fail("Run", fault)
    with pytest.raises(error) as caught:
        client.run(MODEL, PARAMETERS)
    assert type(caught.value) is error
    assert server.paths() == ["Task/List", "Run/wiro/SkyReels-V1"], "and not looked for"


@pytest.mark.parametrize(("code", "rule"), [(97, r"balance of \$0.50"), (96, r"each \$10")])
def test_a_refusal_for_want_of_money_or_places_tells_the_rule(server, client, code, rule):
    server.fail("Run", (code, "Your balance is too low."))
    with pytest.raises(ApiError, match=rf"{rule}.*Nothing was started"):
        client.run(MODEL, PARAMETERS)


def test_codes_map_to_different_classes(server, client):
    found = set()
    for code in (0, 1, 96, 97, 98, 99):
        server.fail("Task/Cancel", (code, "Request files [x] required" if code == 0 else "text"))
        with pytest.raises(ApiError) as caught:
            client.cancel(RunHandle("1", ""))
        assert caught.value.code == code
        found.add(type(caught.value))
    assert len(found) == 6


@pytest.mark.parametrize(
    "url",
    ["http://api.wiro.ai/v1", "ftp://x", "https://user:planted@x/v1", "https://x/v1?a=1", "x", ""],
)
def test_only_safe_addresses_are_talked_to(url):
    with pytest.raises(ConfigError, match="not a https address") as caught:
        check_base_url(url)
    assert "planted" not in str(caught.value)


def test_this_machine_may_be_talked_to_without_tls():
    assert check_base_url("http://127.0.0.1:8000/v1/") == "http://127.0.0.1:8000/v1"
    assert check_base_url("ws://localhost/v1", schemes=("wss", "ws")) == "ws://localhost/v1"


def test_a_redirect_is_not_followed(server, client):
    elsewhere = {"status": 302, "headers": {"Location": "http://127.0.0.1:9/steal"}}
    server.fail("Run", elsewhere)
    with pytest.raises(TransportError, match="redirect"):
        client.run(MODEL, PARAMETERS)
    assert runs(server) == 1


# --- a run whose outcome is unknown -------------------------------------------------------------


@pytest.mark.parametrize(
    "fault", ["lost", "html", "truncated", {"status": 502}, {"status": 504}, STRANGE]
)
def test_a_run_that_was_made_and_not_answered_is_found_and_never_sent_again(server, client, fault):
    server.fail("Run", fault)
    handle = client.run(MODEL, PARAMETERS, [IMAGE])
    assert handle.taskid == "2221"
    assert runs(server) == 1
    assert server.paths().count("Task/List") >= 1


def test_a_run_that_was_lost_before_anything_was_made_asks(server, client, clock):
    server.fail("Run", "reset")
    with pytest.raises(RunOutcomeUnknownError, match="before running again") as caught:
        client.run(MODEL, PARAMETERS)
    assert caught.value.candidates == ()
    assert runs(server) == 1
    assert sum(clock.sleeps) == pytest.approx(30)


def test_two_tasks_that_may_be_it_are_named_and_none_is_taken(server, client):
    server.fail("Run", "lost")
    with pytest.raises(RunOutcomeUnknownError, match="2222, 2221") as caught:
        client.run(MODEL, PARAMETERS, before_sending=lambda _: server.add_task(dict(PARAMETERS)))
    assert [task.taskid for task in caught.value.candidates] == ["2222", "2221"]
    assert runs(server) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"prompt": "another"}, {"prompt": "fps-24, A WOMAN SMILES"}, {"steps": 20},
        {"numFrames": "101"}, {"negativePrompt": "blur"}, {"seed": "7"},
        {"inputImageUrl": "https://x.example/a.png"}, {"inputImage": "https://x.example/a.png"},
    ],
)  # fmt: skip
def test_a_task_with_other_parameters_is_not_taken_for_the_lost_one(server, client, other):
    server.fail("Run", "lost")
    handle = client.run(
        MODEL, PARAMETERS, before_sending=lambda _: server.add_task({**PARAMETERS, **other})
    )
    assert handle.taskid == "2222"


def test_an_older_task_is_not_taken_for_the_lost_one(server, client):
    server.add_task(dict(PARAMETERS))  # in the same second
    server.fail("Run", "lost")
    assert client.run(MODEL, PARAMETERS).taskid == "2222"


def test_a_list_that_fails_on_the_way_is_asked_again(server, client):
    server.fail("Run", "lost")
    server.fail("Task/List", None, {"status": 401, "body": {"result": False}}, "html", "html")
    assert client.run(MODEL, PARAMETERS, [IMAGE]).taskid == "2221"
    assert runs(server) == 1


def test_a_run_that_never_left_is_sent_again(clock):
    with WiroServer() as server:
        url = server.url
    # nobody listens there any more
    gone = Client(Credentials(KEY, SECRET), base_url=url, sleep=clock.sleep, clock=clock,
                  now=clock.now)  # fmt: skip
    with pytest.raises(TransportError, match="NewConnectionError") as caught:
        gone.run(MODEL, PARAMETERS)
    assert not caught.value.was_sent
    assert len(clock.sleeps) == wiro.RUN_ATTEMPTS - 1


# --- watching -----------------------------------------------------------------------------------


def test_a_task_is_watched_to_its_end_by_state(server, client):
    handle = client.run(MODEL, PARAMETERS)
    states = [task.status for task in client.watch(handle)]
    assert states == list(STATES)
    assert states.count("task_end") == 1, "task_end is not the end"


def test_failures_on_the_way_are_waited_through(server, client):
    handle = client.run(MODEL, PARAMETERS)
    server.fail("Task/Detail", "reset", {"status": 500}, "html", "truncated", "list",
                {"status": 429, "headers": {"Retry-After": "7"}}, (0, "hiccup"))  # fmt: skip
    *_, last = client.watch(handle)
    raise_for_failure(last)
    assert last.outputs[0].name == "0.mp4"


def test_what_the_server_asks_to_wait_is_waited(server, client, clock):
    handle = client.run(MODEL, PARAMETERS)
    server.fail("Task/Detail", {"status": 429, "headers": {"Retry-After": "17"}})
    list(client.watch(handle))
    assert 17.0 in clock.sleeps


def test_a_refused_poll_stops_at_once_and_names_the_task(server, client):
    handle = client.run(MODEL, PARAMETERS)
    watching = client.watch(handle)
    next(watching)
    server.fail("Task/Detail", {"status": 401, "body": {"result": False}})
    with pytest.raises(AuthError) as caught:
        next(watching)
    assert caught.value.taskid == handle.taskid
    assert server.paths().count("Task/Detail") == 2


def test_a_task_that_is_not_there_yet_is_waited_for_but_not_for_long(server, client, clock):
    handle = client.run(MODEL, PARAMETERS)
    server.fail("Task/Detail", (1, "There is no task yet."), (1, "task-not-exist"))
    *_, last = client.watch(handle)
    assert last.status == "task_postprocess_end"
    server.fail("Task/Detail", *[(1, "There is no task yet.")] * 100)
    with pytest.raises(NotFoundError):
        list(client.watch(RunHandle("999", "", started_at=clock.now())))
    with pytest.raises(NotFoundError):
        list(client.watch(RunHandle("999", "")))


def test_the_end_of_the_wait_carries_both_identifiers_and_stops_nothing(server, client, clock):
    handle = client.run(MODEL, PARAMETERS)
    server.steps_by_itself = False
    with pytest.raises(TaskTimeoutError, match="Task 2221 has not ended after 100 s") as caught:
        list(client.watch(handle, timeout_s=100))
    assert clock.time_s == pytest.approx(100)
    again = caught.value.handle
    assert (again.taskid, again.token) == (handle.taskid, handle.token)
    assert handle.token not in str(caught.value)
    assert not {"Task/Cancel", "Task/Kill"} & set(server.paths())
    server.steps_by_itself = True
    *_, last = client.watch(again)
    assert last.status == "task_postprocess_end"


def test_polls_slow_down(server, client, clock):
    handle = client.run(MODEL, PARAMETERS)
    server.steps_by_itself = False
    with pytest.raises(TaskTimeoutError):
        list(client.watch(handle, timeout_s=300))
    assert 1.6 <= clock.sleeps[0] <= 2.4
    assert 8.0 <= clock.sleeps[-2] <= 12.0


def test_files_that_lag_behind_the_record_are_waited_for(server, client):
    server.final = {"outputs": []}
    handle = client.run(MODEL, PARAMETERS)
    *_, last = client.watch(handle)
    assert server.paths().count("Task/Detail") == len(STATES) + wiro.NO_OUTPUT_READS
    with pytest.raises(TaskFailedError, match="no files"):
        raise_for_failure(last)


def test_a_task_that_stands_still_on_its_error_is_reported_and_goes_on(server, client):
    handle = client.run(MODEL, PARAMETERS)
    server.steps_by_itself = False
    server.tasks[handle.taskid] |= {"status": "task_error", "debugerror": "no GPU free"}
    with pytest.raises(TaskStalledError, match="no GPU free") as caught:
        list(client.watch(handle))
    assert caught.value.taskid == handle.taskid
    assert not {"Task/Cancel", "Task/Kill"} & set(server.paths())


def test_a_failed_task_says_why_with_its_id(server, client):
    server.final = {"pexit": "1", "outputs": [], "debugerror": "CUDA error"}
    *_, last = client.watch(client.run(MODEL, PARAMETERS))
    with pytest.raises(TaskFailedError, match="Task 2221 failed.*CUDA error") as caught:
        raise_for_failure(last)
    assert caught.value.taskid == "2221"


# --- stopping -----------------------------------------------------------------------------------


def test_a_queued_task_is_cancelled(server, client):
    handle = client.run(MODEL, PARAMETERS)
    server.steps_by_itself = False
    task = client.stop(handle)
    assert task.status == "task_cancel"
    assert server.paths()[2:] == ["Task/Detail", "Task/Cancel", "Task/Detail"]
    with pytest.raises(TaskCancelledError, match="2221 was cancelled"):
        raise_for_failure(task)


@pytest.mark.parametrize("state", ["task_accept", "task_assign", "task_start", "task_end"])
def test_a_running_task_is_killed(server, client, state):
    handle = client.run(MODEL, PARAMETERS)
    server.steps_by_itself = False
    server.tasks[handle.taskid]["status"] = state
    assert client.stop(RunHandle("", handle.token)).status == "task_cancel"
    assert "Task/Cancel" not in server.paths()
    kill = next(seen for seen in server.seen if seen.path == "Task/Kill")
    assert kill.body == {"taskid": handle.taskid}


def test_a_task_that_was_taken_between_two_calls_is_killed(server, client):
    handle = client.run(MODEL, PARAMETERS)
    assert client.stop(handle).status == "task_cancel"  # it steps on after each Detail
    assert [p for p in server.paths() if p in ("Task/Cancel", "Task/Kill")] == [
        "Task/Cancel", "Task/Kill",
    ]  # fmt: skip


def test_an_ended_task_is_returned_as_it_is(server, client):
    handle = client.run(MODEL, PARAMETERS)
    list(client.watch(handle))
    assert client.stop(handle).status == "task_postprocess_end"
    assert not {"Task/Cancel", "Task/Kill"} & set(server.paths())


def test_a_task_that_cannot_be_stopped_says_so_with_its_id(server, client):
    handle = client.run(MODEL, PARAMETERS)
    server.steps_by_itself = False
    server.tasks[handle.taskid]["status"] = "task_start"
    server.fail("Task/Kill", *[(1, "Task could not be killed: busy")] * 9)
    with pytest.raises(WiroError, match="2221 could not be stopped.*busy") as caught:
        client.stop(handle)
    assert caught.value.taskid == handle.taskid
    assert server.paths().count("Task/Kill") == wiro.STOP_ROUNDS


# --- handles and secrets ------------------------------------------------------------------------


def test_a_handle_of_what_a_person_types():
    assert RunHandle.parse(" 2221 ") == RunHandle("2221", "")
    assert RunHandle.parse("token:abc") == RunHandle("", "abc")
    with pytest.raises(ConfigError, match="is not a task"):
        RunHandle.parse("abc")
    assert "planted" not in repr(RunHandle("1", "planted-token"))


@pytest.mark.parametrize(
    "text",
    ['"socketaccesstoken": "planted"', "x-signature: planted", "tasktoken=planted&x=1",
     'accesskey":"planted"', "X-Api-Key: planted"],
)  # fmt: skip
def test_secrets_in_a_text_of_the_service_are_taken_out(text):
    assert "planted" not in redact(text)


def test_no_secret_is_in_any_error_or_log_line(clock, caplog):
    caplog.set_level(logging.DEBUG)
    key, secret = "planted-key", "planted-secret"
    texts = []
    with WiroServer(key=key, secret=secret) as server:
        client = make_client(server, clock, key, secret)
        handle = client.run(MODEL, PARAMETERS)
        for path, call in {
            "Run": lambda: client.run(MODEL, PARAMETERS),
            "Task/Detail": lambda: client.detail(handle),
            "Task/Kill": lambda: client.kill(handle),
        }.items():
            echo = {
                "errors": [{"code": 0, "message": f"x-api-key: {key} tasktoken={handle.token}"}]
            }
            for status in (200, 401, 404, 500):
                for each in (path, "Task/List"):
                    server.fail(each, *[{"status": status, "body": echo}] * 9)
                with pytest.raises(WiroError) as caught:
                    call()
                texts.append(f"{caught.value} {caught.value!r}")
                server._faults.clear()
        texts.append(repr(client.detail(handle)) + repr(handle))
    joined = " ".join([*texts, caplog.text])
    for planted in (key, secret, handle.token, "access-secret"):
        assert planted not in joined
