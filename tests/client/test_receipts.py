"""What stands beside the files of a task, and what never does."""

import hashlib
import json
import os

import pytest
from comfyui_skyreels.wiro_api import receipts
from comfyui_skyreels.wiro_api.client import RunHandle
from comfyui_skyreels.wiro_api.errors import DownloadError
from comfyui_skyreels.wiro_api.jobs import Job, finish, start, to_handle
from comfyui_skyreels.wiro_api.journal import Journal
from comfyui_skyreels.wiro_api.receipts import shown, write_receipt
from comfyui_skyreels.wiro_api.task import parse_task
from support.project import PYPROJECT
from support.wiro_client import MODEL, PARAMETERS
from support.wiro_server import KEY, SECRET

TOKEN = "made-up-task-token"


def task_of(**fields):
    record = {"id": "77", "status": "task_postprocess_end", "socketaccesstoken": TOKEN,
              "totalcost": "0.30", "elapsedseconds": "12.5", "starttime": "1750513340",
              "endtime": "1750513350", "modelslugowner": "wiro", "modelslugproject": "SkyReels-V1",
              **fields}  # fmt: skip
    return parse_task(record)


def write(folder, *names, task=None, asked=None, **keywords):
    paths = [folder / name for name in names]
    for path in paths:
        if not path.exists():
            path.write_bytes(path.name.encode())
    return write_receipt(task or task_of(), paths, asked, **keywords)


def run(server, client, folder, **changes):
    """A whole run, as the command line and the node make it."""
    server.states = ("task_postprocess_end",)
    journal = Journal(folder.parent / "journal.sqlite")
    entry = start(client, journal, Job(MODEL, {**PARAMETERS, **changes}))
    asked = {"model": str(MODEL), "parameters": PARAMETERS, "take": 3}
    return finish(client, to_handle(entry), folder, journal=journal, entry_id=entry.id, asked=asked)


def test_a_run_leaves_a_receipt_that_tells_what_was_asked_paid_and_made(server, client, tmp_path):
    task, (path,) = run(server, client, tmp_path / "out")
    told = json.loads((tmp_path / "out" / "0.receipt.json").read_bytes())
    assert told["model"] == "wiro/SkyReels-V1"
    assert told["parameters"] == PARAMETERS
    assert (told["take"], told["taskid"]) == (3, task.taskid)
    assert told["files"] == [{
        "name": "0.mp4", "num_bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }]  # fmt: skip
    assert told["package"] == f"{PYPROJECT['project']['name']} {PYPROJECT['project']['version']}"
    assert path.name in {p.name for p in (tmp_path / "out").iterdir()}


def test_without_what_was_asked_the_record_tells_and_cost_and_times_are_the_services(tmp_path):
    task = task_of(parameters={"prompt": "a fox", "inputImageUrl": "https://cdn.example/x?sig=1"})
    told = json.loads(write(tmp_path, "0.mp4", task=task).read_bytes())
    assert told["parameters"] == {"prompt": "a fox", "inputImageUrl": "(address)"}
    assert (told["cost_usd"], told["elapsed_s"]) == ("0.3", 12.5)
    assert (told["started"], told["ended"]) == ("2025-06-21T13:42:20Z", "2025-06-21T13:42:30Z")


SECRETS = ("sk-made-up", "shh-made-up", TOKEN, "cdn.example", "evil.example", "base64,AAAA")
HOSTILE = [
    {"prompt": f"my key is sk-made-up and {TOKEN}"},
    {"inputImageUrl": "https://cdn.example/a.png?token=1"},
    {"inputImage": ["https://cdn.example/a", {"x": "HTTP://cdn.example/b"}]},
    {"images": "https://cdn.example/a,https://cdn.example/b"},
    {"images": '["https://cdn.example/a"]'},
    {"image": "data:image/png;base64,AAAA"},
    {"text": "see s3://cdn.example/x, or ftp://cdn.example/y."},
    {"apiKey": "shh-made-up", "x-api-key": "shh-made-up", "API_SECRET": "shh-made-up"},
    {"nested": {"access_token": "shh-made-up", "list": [{"password": "shh-made-up"}]}},
    {"callbackUrl": "evil.example", "webhookUrl": "evil.example", "projectid": "evil.example"},
    {"shh-made-up": 1},
    {"note": "socketaccesstoken: abcdef-shh"},
]


@pytest.mark.parametrize("parameters", HOSTILE, ids=str)
def test_no_key_no_token_and_no_address_is_in_a_receipt(tmp_path, parameters):
    asked = {"model": "wiro/SkyReels-V1", "parameters": {**parameters, "max_tokens": 5}, "take": 1}
    for given, task in ((asked, task_of()), (None, task_of(parameters=asked["parameters"]))):
        place = write(tmp_path, "0.mp4", task=task, asked=given, secrets=SECRETS[:2])
        text = place.read_text(encoding="utf-8")
        for secret in (*SECRETS, "abcdef"):
            assert secret not in text
        assert json.loads(text)["parameters"]["max_tokens"] == 5


def test_what_is_no_secret_stays_as_it_was():
    values = {"prompt": "tokens: 5, a door with a key", "seed": 7, "ok": True, "x": None, "y": 0.5,
              "list": [1, "a"], "max_tokens": 5, "keyframes": "1,2"}  # fmt: skip
    assert shown(values) == values
    deep: object = "x"
    for _ in range(5000):
        deep = [deep]
    assert json.dumps(shown(deep))


def test_nothing_that_is_not_its_own_is_overwritten(tmp_path):
    others = {
        "0.receipt.json": b"mine",
        "0 (1).receipt.json": json.dumps({"taskid": "77"}).encode(),
        "0 (2).receipt.json": json.dumps({receipts.MARK: 1, "taskid": "78"}).encode(),
    }
    for name, content in others.items():
        (tmp_path / name).write_bytes(content)
    first = write(tmp_path, "0.mp4")
    assert first.name == "0 (3).receipt.json"
    assert write(tmp_path, "0.mp4") == first, "its own is written anew"
    assert {n: (tmp_path / n).read_bytes() for n in others} == others


def test_a_paid_file_that_looks_like_a_receipt_is_no_receipt(tmp_path):
    content = json.dumps({receipts.MARK: 1, "taskid": "77"}).encode()
    (tmp_path / "0.receipt.json").write_bytes(content)
    place = write(tmp_path, "0.mp4", "0.receipt.json")
    assert place.name != "0.receipt.json"
    assert (tmp_path / "0.receipt.json").read_bytes() == content


def test_a_link_is_not_followed(tmp_path):
    outside = tmp_path / "outside.json"
    outside.write_text(json.dumps({receipts.MARK: 1, "taskid": "77"}))
    folder = tmp_path / "out"
    folder.mkdir()
    try:
        (folder / "0.receipt.json").symlink_to(outside)
    except OSError:
        pytest.skip("links cannot be made here")
    before = outside.read_bytes()
    write(folder, "0.mp4")
    assert outside.read_bytes() == before


def test_a_receipt_that_cannot_be_written_is_one_warning_and_costs_no_file(
    server, client, tmp_path, monkeypatch, caplog
):
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(receipts, "_place", refuse)
    _, paths = run(server, client, tmp_path / "out")
    assert [path.name for path in paths] == ["0.mp4"]
    assert len([r for r in caplog.records if "receipt" in r.getMessage()]) == 1
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["0.mp4"]


def test_a_write_that_breaks_leaves_the_earlier_receipt_whole(tmp_path, monkeypatch):
    place = write(tmp_path, "0.mp4")
    before = place.read_bytes()

    def refuse(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "replace", refuse)
    assert write(tmp_path, "0.mp4", asked={"model": "other"}) is None
    assert place.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.mp4", "0.receipt.json"]


def test_what_came_of_several_files_has_a_receipt_and_the_rest_joins_it(server, client, tmp_path):
    names = ("0.mp4", "1.mp4", "2.mp4")
    server.files = dict.fromkeys(names, server.files["0.mp4"])
    server.final = {"outputs": [
        {"name": name, "contenttype": "video/mp4", "size": None, "url": server.file_url(name)}
        for name in names
    ]}  # fmt: skip
    server.fail("GET 0.mp4", *[410] * 50)
    folder = tmp_path / "out"
    with pytest.raises(DownloadError) as caught:
        run(server, client, folder)
    place = folder / "1.receipt.json"
    told = json.loads(place.read_bytes())
    assert [file["name"] for file in told["files"]] == ["1.mp4", "2.mp4"]
    assert told["num_missing"] == 1
    assert len(caught.value.paths) == 2
    server._faults.clear()
    run(server, client, folder)
    told = json.loads(place.read_bytes())
    assert [file["name"] for file in told["files"]] == list(names)
    assert "num_missing" not in told
    assert len(list(folder.glob("*.receipt.json"))) == 1, "one task, one receipt"


def test_a_task_that_was_started_elsewhere_has_one_too(server, client, tmp_path):
    run(server, client, tmp_path / "first")
    finish(client, RunHandle("2221", ""), tmp_path / "second")
    text = (tmp_path / "second" / "0.receipt.json").read_text(encoding="utf-8")
    assert json.loads(text)["taskid"] == "2221"
    assert KEY not in text
    assert SECRET not in text
