"""Reading the service's records, and the verdict on them."""

import re
from decimal import Decimal

import pytest
from comfyui_skyreels.wiro_api.task import (
    STATUSES,
    Progress,
    Verdict,
    failure_text,
    parse_progress,
    parse_task,
    verdict,
)
from comfyui_skyreels.wiro_api.wire import bool_of
from support.project import ROOT

FILE = {"name": "0.mp4", "contenttype": "video/mp4", "url": "https://cdn1.wiro.ai/x/0.mp4"}
TEXT = {"contenttype": "raw", "content": "hello"}


def record(status: str, pexit: object = "", outputs: object = (), **more) -> dict:
    return {"id": "7", "status": status, "pexit": pexit, "outputs": list(outputs), **more}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (record("task_cancel", "0", [FILE]), Verdict.CANCELLED),
        (record("task_cancel", "1"), Verdict.CANCELLED),
        (record("task_postprocess_end", "0", [FILE]), Verdict.SUCCEEDED),
        (record("task_postprocess_end", 0, [FILE]), Verdict.SUCCEEDED),
        (record("task_postprocess_end", "0", [TEXT]), Verdict.SUCCEEDED),
        (record("task_postprocess_end", "0", []), Verdict.NO_OUTPUT),
        (record("task_postprocess_end", None, [FILE]), Verdict.SUCCEEDED),
        (record("task_postprocess_end", "", []), Verdict.FAILED),
        (record("task_postprocess_end", "1", [FILE]), Verdict.FAILED),
        (record("task_end", "0", [FILE]), Verdict.RUNNING),
        (record("task_error", "1"), Verdict.RUNNING),
        (record("task_new_state"), Verdict.RUNNING),
        (record("task_new_state", "0", [FILE], postprocessendtime="9"), Verdict.SUCCEEDED),
        (record("task_new_state", "0", [FILE], postprocessendtime="0"), Verdict.RUNNING),
        (record(""), Verdict.RUNNING),
    ],
)
def test_the_verdict_follows_state_exit_code_and_files(given, expected):
    assert verdict(parse_task(given)) is expected


def test_the_table_of_states_marks_the_two_that_end_a_task():
    assert {name for name, status in STATUSES.items() if status.is_terminal} == {
        "task_postprocess_end",
        "task_cancel",
    }
    ranked = sorted(STATUSES.values(), key=lambda status: status.rank)
    assert [s.fraction for s in ranked] == sorted(s.fraction for s in ranked)


def test_the_page_has_words_for_every_phase():
    page = (ROOT / "web/wiro/words.mjs").read_text(encoding="utf-8")
    table = re.search(r"const PHASES = \{(.*?)\n\};", page, re.DOTALL)
    assert table is not None
    phases = {status.phase for status in STATUSES.values()}
    assert set(re.findall(r"^  (\w+):", table[1], re.MULTILINE)) == phases


def test_only_the_two_last_states_end_a_task():
    ended = {s for s in STATUSES if parse_task(record(s, "0", [FILE])).is_terminal}
    assert ended == {"task_postprocess_end", "task_cancel"}


def test_a_record_of_strings_and_one_of_numbers_read_the_same():
    words = parse_task({"id": "534574", "pexit": "0", "elapsedseconds": "6.0000", "size": "1",
                        "totalcost": "0.003510000000", "endtime": "1734513807",
                        "starttime": "0"})  # fmt: skip
    numbers = parse_task({"taskid": 534574, "pexit": 0, "elapsedseconds": 6, "starttime": 0,
                          "totalcost": 0.00351, "endtime": 1734513807})  # fmt: skip
    for name in ("taskid", "exit_code", "elapsed_s", "totalcost", "endtime", "starttime"):
        assert getattr(words, name) == getattr(numbers, name), name
    assert words.totalcost == Decimal("0.00351")
    assert words.starttime is None


@pytest.mark.parametrize(
    "odd",
    [
        {}, {"outputs": None}, {"outputs": "[broken"}, {"outputs": [None, 3, "x"]},
        {"parameters": '{"a": 1}'}, {"parameters": "[" * 100_000}, {"parameters": None},
        {"categories": '["tool","image"]x'}, {"totalcost": "free", "elapsedseconds": "NaN"},
        {"id": True, "status": {"a": 1}, "createtime": []},
    ],
)  # fmt: skip
def test_odd_records_are_read_without_failing(odd):
    task = parse_task(odd)
    assert task.totalcost is None or task.totalcost.is_finite()
    assert verdict(task) is Verdict.RUNNING


def test_parameters_as_text_are_unpacked_and_output_is_an_alias():
    task = parse_task({"parameters": '{"prompt": "x"}', "output": [FILE]})
    assert task.parameters == {"prompt": "x"}
    assert task.outputs[0].url == FILE["url"]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            {"percentage": "60", "stepCurrent": "6", "stepTotal": "10", "speed": "1.2",
             "speedType": "it/s", "remainingTime": "3s"},
            Progress(0.6, 6, 10, "1.2 it/s", "3s"),
        ),
        ('{"percentage": "140"}', Progress(1.0, None, None, "", "")),
        ({"stepCurrent": 3, "stepTotal": 4}, Progress(0.75, 3, 4, "", "")),
        ({"percentage": "-3"}, Progress(0.0, None, None, "", "")),
        ({"percentage": "NaN", "stepCurrent": "x"}, None),
        ("loading weights", None), (None, None), (["a"], None), ({}, None), ("{broken", None),
    ],
)  # fmt: skip
def test_progress_is_read_from_objects_and_from_text(message, expected):
    assert parse_progress(message) == expected


def test_a_failure_quotes_the_end_of_its_log_and_the_id():
    failed = parse_task(record("task_postprocess_end", "1", debugerror="x" * 5000 + "the reason"))
    text = failure_text(failed)
    assert "Task 7" in text
    assert text.endswith("the reason")
    assert len(text) < 800
    assert "left no log" in failure_text(parse_task(record("task_postprocess_end", "1")))


def test_the_token_is_never_shown():
    task = parse_task({"id": "1", "socketaccesstoken": "planted-token", "outputs": [FILE]})
    assert "planted-token" not in repr(task)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(True, True), (1, True), ("1", True), ("True", True), (0, False), ("false", False),
     (None, None), ("maybe", None)],
)  # fmt: skip
def test_the_many_ways_to_say_yes(value, expected):
    assert bool_of(value) is expected
