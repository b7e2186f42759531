"""What a run will cost as far as the service tells, and the limits it is held to."""

import json
import os
import re
import subprocess
import threading
from datetime import datetime
from decimal import Decimal
from pathlib import Path

import pytest
from comfyui_skyreels.wiro_api.errors import ConfigError, LimitError, TaskFailedError
from comfyui_skyreels.wiro_api.jobs import Job, Quote, finish, start, to_handle
from comfyui_skyreels.wiro_api.journal import Journal
from comfyui_skyreels.wiro_api.spending import (
    DEFAULT_LIMITS,
    Limits,
    Price,
    Spent,
    check_limits,
    describe_price,
    load_limits,
    parse_limit,
    price_of,
    save_limits,
)
from support.forked import forks
from support.wiro_client import MODEL, PARAMETERS, Clock, listening, make_client
from support.wiro_server import KEY, SECRET

ROOT = Path(__file__).resolve().parents[2]
THIRTY_CENTS = Price(Decimal("0.30"), is_exact=True)


def row(price: str, method: str, inputs: object = (), **more: str) -> dict:
    return {"inputs": inputs, "price": price, "priceMethod": method, **more}


def price(rows, parameters=None, *, files: int = 0, earlier=(), **record) -> Price | None:
    record = {"dynamicprice": rows, **record}
    return price_of(record, PARAMETERS if parameters is None else parameters, files, earlier)


# --- prices -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("listed", "parameters", "amount", "is_exact"),
    [
        (row("0.30", "cpr"), {}, "0.30", True),
        (row("0", "cpr"), {}, "0", True),
        (row("0.1", "cpo"), {"numImages": "3"}, "0.3", True),
        (row("0.1", "cpo"), {}, "0.1", False),
        (row("0.0001", "cp-promptlength"), {"prompt": "twelve chars"}, "0.0012", True),
        (row("0.0001", "cp-promptlength"), {"prompt": ""}, "0", True),
        (row("0.07", "cp-outputVideoLength"), {"duration": "5"}, "0.35", False),
        (row("0.24", "cp-outputVideoLength"), {"numFrames": 97}, "0.97", False),
        (row("0.10", "cp-outputVideoLength"), {"numFrames": 97}, "0.4042", False),
        (row("0.05", "cp-pixel"), {"size": "960x544"}, "0.05", False),
        (row("0.05", "cp-pixel"), {"size": "1024 x 1024"}, "0.05", False),
        (row("0.05", "cp-pixel"), {"resolution": "1025*1024"}, "0.10", False),
        (row("0.05", "cp-pixel"), {"width": "2048", "height": 1024}, "0.10", False),
        (row("0.05", "cp-pixel", priceExtra="0.01"), {"size": "2048x2048"}, "0.08", False),
    ],
)
def test_a_listed_price_is_computed_by_its_method(listed, parameters, amount, is_exact):
    assert price([listed], parameters) == Price(Decimal(amount), is_exact)


def test_pictures_sent_along_cost_by_their_steps_of_pixels():
    listed = row("0.05", "cp-pixel", priceInput="0.02")
    assert price([listed], {"size": "2048x1024"}, files=2).amount == Decimal("0.18")


@pytest.mark.parametrize(
    "method",
    ["cpt", "cp-audiosecondslength", "cp-realtimeturn", "cp-readoutput", "", "cp-of-tomorrow"],
)
def test_what_only_the_run_can_tell_has_no_price(method):
    assert price([row("0.1", method)], approximatelycost="0.30", cps="0.001") is None


@pytest.mark.parametrize(
    ("listed", "parameters"),
    [
        (row("0.1", "cp-pixel"), {"size": "large"}),
        (row("0.1", "cp-pixel"), {"width": 960}),
        (row("0.1", "cp-promptlength"), {}),
        (row("0.1", "cp-outputVideoLength"), {"prompt": "x"}),
        (row("free", "cpr"), {}),
        (row("-0.1", "cpr"), {}),
        (row("NaN", "cpr"), {}),
        ({"priceMethod": "cpr"}, {}),
    ],
)
def test_a_row_without_what_it_needs_has_no_price(listed, parameters):
    assert price([listed], parameters) is None


@pytest.mark.parametrize("shown", [lambda rows: rows, json.dumps])
def test_rows_come_as_a_list_or_as_its_json(shown):
    assert price(shown([row("0.30", "cpr")])) == THIRTY_CENTS


@pytest.mark.parametrize(
    "garbage", ["", "no json", "{broken", "[" * 100_000, '{"price": "9"}', 5, {}, [None, 3], None]
)
def test_garbage_for_rows_is_billing_by_the_second(garbage):
    assert price(garbage, approximatelycost="0.2", cps="0.001") == Price(Decimal("0.2"), False)
    assert price(garbage) is None


def test_the_row_with_the_most_conditions_that_are_met_wins_wherever_it_stands():
    rows = [
        row("1", "cpr", {"size": "960x544"}),
        row("3", "cpr", {"size": "960X544", "steps": "30"}),
        row("9", "cpr", {"size": "960x544", "steps": "30", "scale": "7"}),
        row("2", "cpr"),
    ]
    assert price(rows).amount == 3
    assert price(rows, {"size": "960x544"}).amount == 1
    assert price(rows, {"size": "544x960"}).amount == 2
    assert price(rows[:3], {"size": "544x960"}) is None


def test_a_condition_may_count_the_files():
    rows = [row("1", "cpr", {"inputImage": "QUANTITY:1"}),
            row("2", "cpr", {"inputImage": "QUANTITY:2"})]  # fmt: skip
    assert [price(rows, files=count) for count in (0, 1, 2, 12)] == [
        None, Price(Decimal(1), True), Price(Decimal(2), True), None,
    ]  # fmt: skip


def test_by_the_second_the_services_own_average_tells_at_its_own_rate():
    average = {"approximatelycost": "0.20", "cps": "0.001"}
    assert price(None, **average) == Price(Decimal("0.20"), False)
    assert price([row("0.003", "cps")], **average) == Price(Decimal("0.60"), False)
    for unknown in ("", "0", "-1", "about 2", None):
        assert price(None, approximatelycost=unknown, cps="0.001") is None


def test_without_any_price_the_dearest_of_the_earlier_runs_tells():
    earlier = [Decimal("0.1"), Decimal("0.7"), Decimal("0.2")]
    assert price(None, cps="0.001", earlier=earlier) == Price(Decimal("0.7"), False)
    assert price([row("1", "cpt")], earlier=earlier) == Price(Decimal("0.7"), False)
    assert price([row("0.30", "cpr")], earlier=earlier) == THIRTY_CENTS


def test_money_is_exact_whatever_type_it_came_in():
    assert price([row("0.1", "cpo")], {"samples": 3}).amount == Decimal("0.3") != 0.1 * 3
    assert price([row(0.1, "cpo")], {"samples": "3"}).amount == Decimal("0.3")
    third = price([row("0.1", "cp-outputVideoLength")], {"num_frames": 8}).amount
    assert third == Decimal("0.0334"), "a projected price is rounded up"
    assert str(Price(Decimal("0.3"), True)) == "$0.30"
    assert str(Price(Decimal("0.00351"), False)) == "about $0.00351"


# --- limits as a person sets them ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "limit"),
    [("2.50", "2.50"), (" $2.5 ", "2.5"), ("0", "0"), (3, "3"), (0.1, "0.1"), ("", None),
     ("  ", None), (None, None)],
)  # fmt: skip
def test_a_limit_is_an_amount_or_nothing(typed, limit):
    assert parse_limit(typed) == (None if limit is None else Decimal(limit))


@pytest.mark.parametrize("typed", ["-1", "ten", "1,50", "NaN", "inf", True, [5]])
def test_what_is_no_amount_is_refused(typed):
    with pytest.raises(ConfigError, match="not a limit: give US dollars"):
        parse_limit(typed)


def test_limits_come_back_as_they_were_saved(tmp_path):
    file = tmp_path / "new" / "limits.json"
    assert load_limits(file) == DEFAULT_LIMITS
    for limits in (Limits(Decimal("0.1"), None, Decimal(20)), Limits(per_run=Decimal(0)), Limits()):
        save_limits(file, limits)
        assert load_limits(file) == limits
    assert [path.name for path in file.parent.iterdir()] == ["limits.json"]


@pytest.mark.parametrize("chosen", [Limits(), Limits(per_run=Decimal(2)), Limits(None, Decimal(9))])
def test_the_default_holds_until_the_user_has_chosen_even_if_the_choice_is_none(tmp_path, chosen):
    file = tmp_path / "limits.json"
    assert load_limits(file).is_default
    assert (load_limits(file).per_run, load_limits(file).per_day) == (2, 20)
    save_limits(file, chosen)
    assert load_limits(file) == chosen
    assert not load_limits(file).is_default


@pytest.mark.parametrize(
    ("cost", "limits", "told"),
    [
        (
            "0.30",
            DEFAULT_LIMITS,
            r"price \$0.30, limit \$2.00 a run, \$20.00 a day \(default; change it in Settings",
        ),
        ("0.30", DEFAULT_LIMITS, "limits --per-run USD"),
        (
            None,
            DEFAULT_LIMITS,
            r"unknown before the run, so the default limit of \$2.00 a run cannot hold it; it",
        ),
        ("0.30", Limits(), r"price \$0.30, no limit$"),
        (None, Limits(), "price unknown before the run, no limit$"),
        ("0.30", Limits(Decimal(1), None, Decimal(20)), r"limit \$1.00 a run, \$20.00 a month$"),
    ],
)
def test_the_first_line_tells_price_and_limits(cost, limits, told):
    price = None if cost is None else Price(Decimal(cost), is_exact=True)
    assert re.search(told, describe_price(price, limits))


@pytest.mark.parametrize(
    ("before", "after", "is_more"),
    [
        (DEFAULT_LIMITS, Limits(), True),
        (DEFAULT_LIMITS, Limits(Decimal(2)), True),  # no limit of a day any more
        (DEFAULT_LIMITS, Limits(Decimal(2), Decimal(20)), False),
        (DEFAULT_LIMITS, Limits(Decimal(2), Decimal(21)), True),
        (DEFAULT_LIMITS, Limits(Decimal("2.01"), Decimal(20)), True),
        (DEFAULT_LIMITS, Limits(Decimal(1), Decimal(5)), False),
        (Limits(), Limits(Decimal(1)), False),
        (Limits(), Limits(), False),
        (Limits(None, Decimal(5)), Limits(Decimal(1), None), True),
        (Limits(None, Decimal(5), Decimal(9)), Limits(None, Decimal(4), Decimal(10)), True),
        (Limits(Decimal(0)), Limits(Decimal("0.01")), True),
    ],
)
def test_limits_that_allow_more_are_told_from_those_that_do_not(before, after, is_more):
    assert after.allows_more_than(before) is is_more


@pytest.mark.parametrize("model", ["wiro/SkyReels-V1", "wiro/skyreels-v1"])
def test_under_the_default_alone_the_fixed_model_runs_without_a_price(model):
    check_limits(DEFAULT_LIMITS, None, Spent(), model)


@pytest.mark.parametrize("model", ["acme/other", "acme/SkyReels-V1", "wiro/SkyReels-V1-fast", "x"])
def test_under_the_default_alone_another_model_without_a_price_waits_for_the_users_word(model):
    with pytest.raises(LimitError, match="you have set no limits yet.*Nothing was sent. Set lim"):
        check_limits(DEFAULT_LIMITS, None, Spent(), model)
    check_limits(Limits(), None, Spent(), model)


@pytest.mark.parametrize(("cost", "is_allowed"), [("2.00", True), ("2.01", False), ("50", False)])
def test_under_the_default_a_run_may_cost_two_dollars(cost, is_allowed):
    price = Price(Decimal(cost), is_exact=True)
    if is_allowed:
        check_limits(DEFAULT_LIMITS, price, Spent(), "acme/other")
    else:
        with pytest.raises(LimitError, match=r"your limit is \$2.00 a run"):
            check_limits(DEFAULT_LIMITS, price, Spent(), "wiro/SkyReels-V1")


@pytest.mark.parametrize(
    "content", [b"", b"{broken", b"[]", b"null", b"\xff\xfe", b'{"per_day": "ten"}', b'{"per_run"']
)
def test_limits_that_cannot_be_read_stop_the_spending(tmp_path, content):
    file = tmp_path / "limits.json"
    file.write_bytes(content)
    with pytest.raises(ConfigError):
        load_limits(file)


# --- limits at work -----------------------------------------------------------------------------


@pytest.fixture
def journal(tmp_path, clock):
    return Journal(tmp_path / "journal.sqlite", now=clock.now)


def runs(server) -> int:
    return sum(path.startswith("Run/") for path in server.paths())


def begin(client, journal, number: int = 0, cost: Price | None = THIRTY_CENTS, **limits: str):
    """Start a job of its own number under limits."""
    parameters = {**PARAMETERS, "prompt": f"number {number}"}
    amounts = {name: Decimal(limit) for name, limit in limits.items()}
    return start(
        client,
        journal,
        Job(MODEL, parameters),
        Quote(parameters, cost),
        limits=lambda: Limits(**amounts),
    )


def complete(client, server, journal, entry, folder, **final):
    server.final = final
    return finish(client, to_handle(entry), folder, journal=journal, entry_id=entry.id)


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ("per_run", r"cost \$0.30; your limit is \$0.29 a run. Nothing was sent"),
        ("per_day", r"\$0.29 a day. Nothing"),
        ("per_month", r"\$0.29 a month. Nothing"),
    ],
)
def test_a_run_over_a_limit_is_refused_before_anything_is_sent(
    server, client, journal, limit, words
):
    with pytest.raises(LimitError, match=words):
        begin(client, journal, **{limit: "0.29"})
    assert server.seen == []
    assert journal.newest()[0].state == "refused"
    assert begin(client, journal, **{limit: "0.30"}).state == "started"


def test_a_limit_is_seen_before_a_picture_is_uploaded(client, journal, monkeypatch):
    monkeypatch.setattr(client, "run", None)
    with pytest.raises(LimitError):
        begin(client, journal, per_run="0.29")


def test_a_run_without_a_price_is_refused_if_there_is_a_limit_and_sent_if_there_is_none(
    server, client, journal
):
    with pytest.raises(LimitError, match="no price.*cannot be checked.*Remove the limits"):
        begin(client, journal, cost=None, per_month="1000")
    assert server.seen == []
    assert begin(client, journal, cost=None).state == "started"


@pytest.mark.parametrize(("cost", "number"), [("2.00", 10), ("0.30", 66), (None, 10)])
def test_the_default_holds_a_day_however_many_nodes_a_workflow_has(
    server, client, journal, cost, number
):
    """A run whose price is not told counts as the dearest one until its cost is known."""
    price = None if cost is None else Price(Decimal(cost), is_exact=True)
    refused = 0
    for take in range(number + 5):
        try:
            start(
                client,
                journal,
                Job(MODEL, PARAMETERS, take=take),
                Quote(PARAMETERS, price),
                limits=lambda: DEFAULT_LIMITS,
            )
        except LimitError as error:
            refused += 1
            assert re.search(
                r"limit is \$20.00 a day, and \$\S+ of it is spent. Nothing", str(error)
            )
    assert (runs(server), refused) == (number, 5)


def test_a_run_whose_price_was_not_told_counts_by_its_cost_once_that_is_known(
    server, client, journal, tmp_path
):
    server.states = ("task_postprocess_end",)
    entry = start(client, journal, Job(MODEL, PARAMETERS), limits=lambda: DEFAULT_LIMITS)
    assert journal.spent().day == 2
    complete(client, server, journal, entry, tmp_path / "out")
    assert journal.spent().day == Decimal("0.00351")


@pytest.mark.parametrize("limit", ["per_day", "per_month"])
def test_what_is_reserved_for_tasks_under_way_counts(server, client, journal, limit):
    for number in (1, 2, 3):
        begin(client, journal, number, **{limit: "1.00"})
    with pytest.raises(LimitError, match=r"\$0.90 of it is spent"):
        begin(client, journal, 4, **{limit: "1.00"})
    assert runs(server) == 3
    assert journal.spent() == Spent(Decimal("0.90"), Decimal("0.90"))


def test_what_was_sent_and_not_answered_counts(server, client, journal):
    entry = journal.begin("another job", str(MODEL))
    journal.mark_sending(entry, str(MODEL), THIRTY_CENTS)
    with pytest.raises(LimitError):
        begin(client, journal, per_day="0.50")
    assert server.seen == []


def test_a_refused_run_gives_its_reservation_back(server, client, journal):
    server.fail("Run", (97, "balance"))
    with pytest.raises(Exception, match="balance"):
        begin(client, journal, per_day="0.30")
    assert journal.spent() == Spent()
    assert begin(client, journal, per_day="0.30").state == "started"


def test_the_cost_replaces_the_projection_at_the_end(server, client, journal, tmp_path):
    entry = begin(client, journal, 1, per_day="0.50")
    complete(client, server, journal, entry, tmp_path, totalcost="0.123000000000")
    assert journal.spent().day == Decimal("0.123")
    assert begin(client, journal, 2, per_day="0.50").state == "started"
    with pytest.raises(LimitError):
        begin(client, journal, 3, per_day="0.50")


def test_a_failed_task_that_cost_nothing_gives_the_money_back(server, client, journal, tmp_path):
    entry = begin(client, journal, 1, per_day="0.50")
    failure = {"pexit": "1", "outputs": [], "totalcost": "0"}
    with pytest.raises(TaskFailedError):
        complete(client, server, journal, entry, tmp_path, **failure)
    assert journal.spent() == Spent()
    assert begin(client, journal, 2, per_day="0.50").state == "started"


def test_a_success_whose_cost_is_not_told_counts_as_projected(server, client, journal, tmp_path):
    entry = begin(client, journal, 1, per_day="0.50")
    complete(client, server, journal, entry, tmp_path, totalcost=None)
    assert journal.spent().day == Decimal("0.30")


def test_many_small_amounts_add_up_exactly(journal):
    for number in range(10):
        entry = journal.begin(str(number), str(MODEL))
        journal.mark_sending(entry, str(MODEL), Price(Decimal("0.1"), is_exact=True))
    assert journal.spent().day == Decimal(1)
    tenth = Price(Decimal("0.1"), is_exact=True)
    check_limits(Limits(per_day=Decimal("1.1")), tenth, journal.spent(), "m")
    with pytest.raises(LimitError):
        check_limits(Limits(per_day=Decimal("1.0999999999")), tenth, journal.spent(), "m")


def set_clock(clock, *date: int) -> None:
    clock.time_s += datetime(*date).timestamp() - clock.now()


def test_a_day_ends_at_midnight_and_a_month_with_its_last_day(server, client, clock, journal):
    per_day, per_month = {"per_day": "0.30"}, {"per_month": "0.60"}
    set_clock(clock, 2025, 1, 30, 23, 59, 59)
    begin(client, journal, 1, **per_day)
    with pytest.raises(LimitError, match="a day"):
        begin(client, journal, 2, **per_day)
    set_clock(clock, 2025, 1, 31, 0, 0, 0)
    assert journal.spent() == Spent(Decimal(0), Decimal("0.30"))
    begin(client, journal, 2, **per_day)
    set_clock(clock, 2025, 1, 31, 23, 59, 59)
    with pytest.raises(LimitError, match="a month"):
        begin(client, journal, 3, **per_month)
    set_clock(clock, 2025, 2, 1, 0, 0, 0)
    assert journal.spent() == Spent()
    assert begin(client, journal, 3, **per_month, **per_day).state == "started"


def test_a_task_counts_for_the_day_it_was_sent_on(server, client, clock, journal, tmp_path):
    set_clock(clock, 2025, 1, 30, 23, 59, 0)
    entry = begin(client, journal, 1)
    set_clock(clock, 2025, 1, 31, 0, 5, 0)
    complete(client, server, journal, entry, tmp_path, totalcost="0.25")
    assert journal.spent() == Spent(Decimal(0), Decimal("0.25"))


@pytest.mark.parametrize("number_of_threads", [2, 6])
def test_threads_that_race_for_the_last_of_a_day_send_one_run(server, journal, number_of_threads):
    both_asked = threading.Barrier(number_of_threads, timeout=10)
    started, refused = [], []

    def work(number: int) -> None:
        clock = Clock()
        clock.sleep(number / 10)  # the service takes each nonce once
        parameters = {**PARAMETERS, "prompt": f"number {number}"}
        try:
            entry = start(
                make_client(server, clock),
                Journal(journal.path, now=clock.now),
                Job(MODEL, parameters),
                Quote(parameters, THIRTY_CENTS),
                limits=lambda: Limits(per_day=Decimal("0.50")),
                listener=listening(check=both_asked.wait),
            )
            started.append(entry)
        except LimitError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(number_of_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(started) == runs(server) == len(server.tasks) == 1
    assert len(refused) == number_of_threads - 1
    assert "Nothing was sent" in refused[0]
    assert journal.spent().day == Decimal("0.30")


def test_limits_are_set_shown_and_lifted_by_the_command_line(tmp_path):
    journal = Journal(tmp_path / "journal.sqlite")
    entry = journal.begin("job", str(MODEL))
    journal.mark_sending(entry, str(MODEL), THIRTY_CENTS)

    def limits(*arguments: str) -> subprocess.CompletedProcess:
        command = ["-m", "wiro_api", "limits", "--journal", str(journal.path), "--json"]
        environment = {**os.environ, "WIRO_API_KEY": KEY, "WIRO_API_SECRET": SECRET}
        return forks("support.wiro_program").run([*command, *arguments], environment)

    done = limits("--per-run", "0.5", "--per-month", "$20")
    assert json.loads(done.stdout) == {
        "limits": {"per_run": "0.5", "per_day": "20", "per_month": "20"},
        "spent": {"day": "0.3", "month": "0.3"},
    }
    assert "per day    $20.00" in done.stderr
    assert "spent: $0.30 today, $0.30 this month" in done.stderr
    limits("--per-run", "none")
    assert load_limits(tmp_path / "limits.json") == Limits(None, Decimal(20), Decimal(20))
    wrong = limits("--per-day", "plenty")
    assert wrong.returncode == 1
    assert "'plenty' is not a limit" in json.loads(wrong.stdout)["error"]
    assert load_limits(tmp_path / "limits.json") == Limits(None, Decimal(20), Decimal(20))
