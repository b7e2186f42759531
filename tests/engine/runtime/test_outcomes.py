"""The small file that remembers what runs taught."""

import json
from types import SimpleNamespace

import pytest
import torch
from comfyui_skyreels.skyreels.runtime import outcomes
from comfyui_skyreels.skyreels.runtime.outcomes import (
    FILE_NAME,
    device_key,
    first_rung,
    recall,
    remember,
    remember_rung,
)

RUNGS = ["whole", "chunks", "head groups"]


@pytest.fixture(autouse=True)
def told(monkeypatch):
    monkeypatch.setattr(outcomes, "_told", set())


def test_what_is_remembered_comes_back_for_that_device_alone(tmp_path):
    folder = tmp_path / "new" / "folder"
    remember(folder, "card A", "rates", {"memory": 3, "link": 2})
    remember(folder, "card A", "rates", {"memory": 4, "link": None})
    remember(folder, "card B", "rates", {"memory": 5})
    assert recall(folder, "card A", "rates") == {"memory": 4}
    assert recall(folder, "card B", "rates") == {"memory": 5}
    assert recall(folder, "card A", "corrections") == {}
    assert recall(folder, "card C", "rates") == {}
    assert [path.name for path in folder.iterdir()] == [FILE_NAME]


def test_without_a_folder_nothing_is_remembered(tmp_path):
    remember(None, "card", "rates", {"memory": 3})
    assert recall(None, "card", "rates") == {}


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '{"devices": 3}', "\0" * 10, "[" * 100_000, " " * 1_000_001, "{}"],
)
def test_a_damaged_file_is_told_once_and_replaced(tmp_path, caplog, content):
    (tmp_path / FILE_NAME).write_text(content)
    assert recall(tmp_path, "card", "rates") == {}
    remember(tmp_path, "card", "rates", {"memory": 3})
    assert recall(tmp_path, "card", "rates") == {"memory": 3}
    assert sum("cannot be read" in r.getMessage() for r in caplog.records) == 1


@pytest.mark.parametrize(
    "devices", [{"card": 3}, {"card": {"rates": 3, "rungs": [1]}}, {"card": {"rungs": {"w": 3}}}]
)
def test_values_of_other_kinds_count_as_unknown(tmp_path, devices):
    (tmp_path / FILE_NAME).write_text(json.dumps({"devices": devices}))
    assert recall(tmp_path, "card", "rates") == {}
    assert first_rung(tmp_path, "card", "w", RUNGS, 10) == 0
    remember(tmp_path, "card", "rates", {"memory": 3})
    assert recall(tmp_path, "card", "rates") == {"memory": 3}


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    for _ in range(2):
        remember(tmp_path / "file", "card", "rates", {"memory": 3})
    assert caplog.text.count("plans are not remembered") == 1


def test_the_file_stays_small(tmp_path):
    for number in range(100):
        remember(tmp_path, "card", "rates", {f"rate {number}": number})
    for number in range(20):
        remember(tmp_path, f"card {number}", "rates", {"memory": number})
    devices = json.loads((tmp_path / FILE_NAME).read_text())["devices"]
    assert list(devices) == [f"card {number}" for number in range(12, 20)]
    remember(tmp_path, "card", "rates", {f"rate {number}": number for number in range(100)})
    assert list(recall(tmp_path, "card", "rates")) == [f"rate {n}" for n in range(36, 100)]


@pytest.mark.parametrize(("free", "first"), [(90, 1), (100, 1), (102, 1), (103, 0), (500, 0)])
def test_a_rung_counts_until_more_memory_is_free(tmp_path, free, first):
    remember_rung(tmp_path, "card", "sample", "chunks", 100)
    assert first_rung(tmp_path, "card", "sample", RUNGS, free) == first


def test_a_rung_of_another_ladder_device_or_work_does_not_count(tmp_path):
    remember_rung(tmp_path, "card", "sample", "chunks", 100)
    assert first_rung(tmp_path, "card", "sample", ["head groups"], 100) == 0
    assert first_rung(tmp_path, "card after an update", "sample", RUNGS, 100) == 0
    assert first_rung(tmp_path, "card", "decode", RUNGS, 100) == 0


def test_a_device_is_known_by_its_kind_and_torchs_version():
    key = device_key(torch.device("cpu"))
    assert key.startswith("cpu, ")
    assert key.endswith(torch.__version__)


def test_a_gpu_is_another_one_after_a_change_of_its_memory_driver_or_torch(monkeypatch):
    properties = SimpleNamespace(name="RTX 4090", total_memory=24 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    driver = [12080]
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: driver[0], raising=False)
    keys = [device_key(torch.device("cuda:0"))]
    driver[0] = 13000
    keys.append(device_key(torch.device("cuda:0")))
    properties.total_memory -= 1
    keys.append(device_key(torch.device("cuda:0")))
    properties.name = "RTX 5090"
    keys.append(device_key(torch.device("cuda:0")))
    monkeypatch.setattr(torch, "__version__", "9.9")
    keys.append(device_key(torch.device("cuda:0")))
    assert len(set(keys)) == 5
