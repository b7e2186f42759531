"""The command line: run a model, download its result, and manage tasks.

Exit code 0 only when the job is done. With --json, standard output carries exactly one JSON object;
everything meant for people goes to standard error. The key is read from the environment, never from
an argument: arguments are seen by every program on the machine.
"""

import argparse
import functools
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from .client import WATCH_S, Client, check_wait
from .errors import ConfigError, DependencyError, DownloadError, LimitError, WiroError
from .files import read_part
from .handles import Model, RunHandle
from .jobs import Job, Quote, find, finish, is_complete, quote, read_record, start, to_handle
from .journal import Entry, Journal
from .listener import RunListener
from .media import claimed_kind, kind_of
from .schema import SKYREELS, check_skyreels, items_of
from .signing import account_of, load_credentials
from .spending import (
    LIMIT_NAMES,
    Price,
    describe_price,
    load_limits,
    parse_limit,
    price_of,
    save_limits,
    to_json,
)
from .state import JOURNAL_NAME, limits_beside, open_state
from .task import Output, Progress, Task, Verdict, verdict
from .transport import base_url
from .video import check_video
from .websocket import socket_url
from .wire import MAX_URL, dollars, money, one_line, text_of, word_of

EXIT_ERROR, EXIT_INTERRUPTED = 1, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; None means sys.argv.

    Returns:
        0 done, 1 an error that was explained, 2 wrong usage, 130 interrupted.
    """
    arguments = build_parser().parse_args(argv)
    try:
        # setting a limit needs no key
        client = None if arguments.run is run_limits else make_client()
        result = arguments.run(client, arguments)
    except WiroError as error:
        return _fail(arguments, error)
    except OSError as error:
        place = error.filename or "A file"
        message = f"{place} cannot be used ({error.strerror}): check the path."
        return _fail(arguments, WiroError(message))
    except KeyboardInterrupt:
        task = (
            f"Task {arguments.taskid} goes" if arguments.taskid else "A task that was started goes"
        )
        message = f"Interrupted. {task} on at Wiro: watch, collect or stop it by its id."
        say(message)
        if arguments.json:
            print(json.dumps({"error": message, "taskid": arguments.taskid}))  # noqa: T201
        return EXIT_INTERRUPTED
    if arguments.json:
        print(json.dumps(result))  # noqa: T201
    return 0


def _fail(arguments: argparse.Namespace, error: WiroError) -> int:
    say(f"error: {error}")
    if arguments.json:
        told: dict[str, Any] = {"error": str(error), "taskid": error.taskid}
        if isinstance(error, DownloadError) and error.paths:
            told["files"] = [str(path) for path in error.paths]
        print(json.dumps(told))  # noqa: T201
    return EXIT_ERROR


def say(text: str) -> None:
    """Write a line for people."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201


def make_client() -> Client:
    """A client of the environment's key and address."""
    return Client(load_credentials(), base_url=base_url(), socket_url=socket_url())


class _Parser(argparse.ArgumentParser):
    """Answers wrong usage with a JSON object too if --json was asked for."""

    def error(self, message: str) -> NoReturn:
        if "--json" in sys.argv:
            print(json.dumps({"error": message, "taskid": ""}))  # noqa: T201
        super().error(message)


@functools.cache
def build_parser() -> argparse.ArgumentParser:
    """All commands and options."""
    parser = _Parser(prog="python -m wiro_api", description="Models on wiro.ai.")
    parser.set_defaults(taskid="")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function: Any, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        added.set_defaults(run=function)
        added.add_argument("--json", action="store_true")
        return added

    run = command("run", run_run, "start a model, wait, download; costs money")
    quoting = command("quote", run_quote, "what a run would cost, and whether it was made before")
    for added in (run, quoting):
        added.add_argument("model", help="owner/project, as wiro/SkyReels-V1")
        added.add_argument("--param", action="append", default=[], metavar="NAME=VALUE")
        added.add_argument("--file", action="append", default=[], metavar="NAME=PATH")
    run.add_argument(
        "--max-price",
        type=_dollars,
        metavar="USD",
        help="start nothing that costs more, or whose price is not known",
    )
    run.add_argument(
        "--again", action="store_true", help="pay for another run of what was run before"
    )
    run.add_argument(
        "--wait", action="store_true", help="wait for a free slot if too many of your tasks run"
    )
    watch = command("watch", run_watch, "wait for a task that was started earlier, download")
    collect = command("collect", run_collect, "download the result of an ended task")
    detail = command("detail", run_detail, "what the service says of a task")
    cancel = command("cancel", run_cancel, "cancel a queued task")
    kill = command("kill", run_kill, "end a running task")
    stop = command("stop", run_stop, "cancel or kill, and wait until it has ended")
    for added in (watch, collect, detail, cancel, kill, stop):
        added.add_argument("task", help="a task id, or token:<task token>")
    for added in (run, watch, collect):
        added.add_argument("--out", type=Path, default=Path(), metavar="DIR")
    for added in (run, watch):
        added.add_argument("--timeout", type=_seconds, default=WATCH_S, metavar="S")

    upload = command("upload", run_upload, "upload a file once and print its address")
    upload.add_argument("file", type=Path)
    upload.add_argument("--folder", default="", help="made if it is not there")
    command("list", run_list, "the account's newest tasks")
    model = command("model", run_model, "parameters and price of a model")
    model.add_argument("model")
    limits = command("limits", run_limits, "show or set how many US dollars may be spent")
    for name in LIMIT_NAMES:
        limits.add_argument(
            f"--{name.replace('_', '-')}", metavar="USD", help="an amount, or none for no limit"
        )
    for added in (run, quoting, collect, limits):
        added.add_argument(
            "--journal",
            type=Path,
            metavar="FILE",
            help="what was started and paid for, if not the one that all programs of the user "
            "share (see WIRO_STATE_DIR); limits are kept beside it",
        )
    return parser


# --- commands -----------------------------------------------------------------------------------


def run_run(client: Client, arguments: argparse.Namespace) -> dict[str, Any]:
    """`run`: start, wait, download."""
    _check_folder(arguments.out)
    job, journal, quoted = _quote(client, arguments)
    model = job.model
    limits = partial(load_limits, limits_beside(journal.path))
    say(describe_price(quoted.price, limits()))
    is_paid = not arguments.again and find(client, journal, job) is not None
    if arguments.max_price is not None and not is_paid:
        _check_price(quoted.price, arguments.max_price)
    entry = start(
        client,
        journal,
        job,
        quoted,
        limits=limits,
        again=arguments.again,
        wait_when_busy=arguments.wait,
        listener=_Printer(arguments),
    )
    if is_complete(journal, entry):
        say(f"made before, by task {entry.taskid}; --again pays for another run")
        for path in entry.files:
            say(str(path))
        return _describe_entry(entry)
    arguments.taskid = entry.taskid
    say(f"task {entry.taskid} started; it goes on if this program ends")
    asked = {"model": str(model), "parameters": quoted.parameters, "take": 1}
    return _finish(client, arguments, to_handle(entry), journal, entry, asked)


def run_quote(client: Client, arguments: argparse.Namespace) -> dict[str, Any]:
    """`quote`: price of a run; one that the journal has costs nothing more."""
    job, journal, quoted = _quote(client, arguments)
    entry = find(client, journal, job)
    say(describe_price(quoted.price, load_limits(limits_beside(journal.path))))
    if entry is not None:
        say("it was sent before, and is not paid for again")
    return {
        "price": None if quoted.price is None else dollars(quoted.price.amount),
        "is_exact": quoted.price is not None and quoted.price.is_exact,
        "was_sent": entry is not None,
        "taskid": "" if entry is None else entry.taskid,
    }


def _quote(client: Client, arguments: argparse.Namespace) -> tuple[Job, Journal, Quote]:
    """The job of the arguments, the journal, and what the job will be sent with and cost."""
    model = Model.parse(arguments.model)
    given: dict[str, Any] = dict(_pair(text, "--param") for text in arguments.param)
    files = [
        (name, read_part(Path(path)))
        for name, path in (_pair(text, "--file") for text in arguments.file)
    ]
    if model.clean == SKYREELS.clean:
        given = check_skyreels(given, files)
    job, journal = Job(model, given, files), open_journal(arguments)
    record = read_record(
        client, model, lambda error: say(f"the price is not known before the run: {error}")
    )
    return job, journal, quote(record, job, journal.costs(str(model)))


def _check_price(price: Price | None, most: Decimal) -> None:
    if price is None:
        raise LimitError(
            "The price is not known before the run, so --max-price cannot hold it. Nothing was "
            "sent. Make one run without it: its cost is then the price."
        )
    if price.amount > most:
        raise LimitError(
            f"The run would cost {price}, and --max-price is {money(most)}. Nothing was sent. "
            "Raise --max-price."
        )


def run_watch(client: Client, arguments: argparse.Namespace) -> dict[str, Any]:
    """`watch`: wait, download."""
    _check_folder(arguments.out)
    return _finish(client, arguments, RunHandle.parse(arguments.task))


def run_collect(client: Client, arguments: argparse.Namespace) -> dict[str, Any]:
    """`collect`: download what an ended task made."""
    _check_folder(arguments.out)
    task = client.detail(RunHandle.parse(arguments.task))
    if verdict(task) is Verdict.RUNNING:
        raise WiroError(
            f"Task {task.taskid} has not ended ({task.status}): watch it instead.",
            taskid=task.taskid,
        )
    arguments.timeout = WATCH_S
    journal = open_journal(arguments)  # knows what was fetched before
    entry = journal.adopt(task.taskid, task.model)
    return _finish(client, arguments, RunHandle(task.taskid, task.token), journal, entry)


def run_detail(client: Client, arguments: argparse.Namespace) -> dict[str, Any]:
    """`detail`: one record."""
    task = client.detail(RunHandle.parse(arguments.task))
    say(f"task {task.taskid}: {task.status}, {verdict(task).value}")
    return describe(task)


def run_cancel(client: Client, arguments: argparse.Namespace) -> dict[str, Any]:
    """`cancel`: of a queued task."""
    handle = RunHandle.parse(arguments.task)
    client.cancel(handle)
    return describe(client.detail(handle))


def run_kill(client: Client, arguments: argparse.Namespace) -> dict[str, Any]:
    """`kill`: of a running task."""
    handle = RunHandle.parse(arguments.task)
    client.kill(handle)
    return describe(client.detail(handle))


def run_stop(client: Client, arguments: argparse.Namespace) -> dict[str, Any]:
    """`stop`: whichever the state demands."""
    task = client.stop(RunHandle.parse(arguments.task))
    say(f"task {task.taskid}: {verdict(task).value}")
    return describe(task)


def run_upload(client: Client, arguments: argparse.Namespace) -> dict[str, Any]:
    """`upload`: a file, into a folder if asked for."""
    part = read_part(arguments.file)
    folder = text_of(client.create_folder(arguments.folder)["id"]) if arguments.folder else ""
    record = client.upload(part, folder)
    say(one_line(text_of(record.get("url")))[:MAX_URL])
    return {name: record.get(name) for name in ("id", "name", "url", "size", "contenttype")}


def run_list(client: Client, arguments: argparse.Namespace) -> dict[str, Any]:
    """`list`: the newest tasks."""
    tasks = client.list_tasks()
    for task in tasks:
        say(f"{task.taskid:>10}  {verdict(task).value:10} {task.status:22} {task.model}")
    return {"tasks": [describe(task) for task in tasks]}


def run_model(client: Client, arguments: argparse.Namespace) -> dict[str, Any]:
    """`model`: parameters and price."""
    record = client.model_detail(Model.parse(arguments.model))
    items = items_of(record)
    for item in items:
        need = "required" if item.get("required") else "optional"
        name, kind, label = (word_of(item.get(k)) for k in ("id", "type", "label"))
        say(f"{name:20} {kind:16} {need}  {label}")
    price = price_of(record, {str(item["id"]): item.get("default") for item in items})
    say(f"price with the defaults: {'unknown before the run' if price is None else price}")
    return dict(record)


def open_journal(arguments: argparse.Namespace) -> Journal:
    """Open the journal that was named, else the one that all programs of the user share.

    Returns:
        The journal; its sums are those of the key in the environment, if there is one.
    """
    path = arguments.journal or open_state() / JOURNAL_NAME
    try:
        account = account_of(load_credentials())
    except ConfigError:
        account = ""
    return Journal(path, account=account)


def run_limits(_: None, arguments: argparse.Namespace) -> dict[str, Any]:
    """`limits`: set what is given, show all."""
    journal = open_journal(arguments)
    file = limits_beside(journal.path)
    limits = load_limits(file)
    given = {
        name: parse_limit("" if value == "none" else value)
        for name in LIMIT_NAMES
        if (value := getattr(arguments, name)) is not None
    }
    if given:
        limits = replace(limits, **given, is_default=False)
        save_limits(file, limits)
    spent = journal.spent()
    if limits.is_default:
        say("no limits are set; until you set some (an amount, or none), these hold:")
    for name, amount in to_json(limits).items():
        shown = "no limit" if amount is None else money(Decimal(amount))
        say(f"{name.replace('_', ' '):10} {shown}")
    say(f"spent: {money(spent.day)} today, {money(spent.month)} this month")
    return {
        "limits": to_json(limits),
        "spent": {"day": dollars(spent.day), "month": dollars(spent.month)},
    }


def _finish(
    client: Client,
    arguments: argparse.Namespace,
    handle: RunHandle,
    journal: Journal | None = None,
    entry: Entry | None = None,
    asked: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    task, paths = finish(
        client,
        handle,
        arguments.out,
        journal=journal,
        entry_id=None if entry is None else entry.id,
        timeout_s=arguments.timeout,
        listener=_Printer(arguments),
        asked=asked,
        is_labelled=True,
    )
    return _report(task, paths)


class _Printer(RunListener):
    """Prints what happens to a run, and notes its task for an interruption."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments, self._status = arguments, ""

    def on_wait(self, left_s: float) -> None:
        say(f"all task slots of the account are in use; next try in {left_s:.0f} s")

    def on_task(self, task: Task) -> None:
        self._arguments.taskid = task.taskid
        if task.status != self._status:
            self._status = task.status
            say(f"task {task.taskid}: {task.phase} ({task.status})")

    def on_progress(self, report: Progress) -> None:
        say(str(report))

    def verify(self, path: Path, output: Output) -> None:
        verify(path, output)


def verify(path: Path, output: Output) -> None:
    """Decode a video once, keeping nothing, if PyAV is installed.

    Raises:
        DownloadError: it does not decode.
    """
    if kind_of(path, claimed_kind(output)) != "video":
        return
    try:
        check_video(path)
    except DependencyError:
        say("the video was not verified by decoding: PyAV is missing (pip install av)")


def _describe_entry(entry: Entry) -> dict[str, Any]:
    return {
        "taskid": entry.taskid,
        "status": entry.status,
        "verdict": entry.verdict,
        "exit_code": "0",
        "cost": entry.cost or None,
        "elapsed_s": float(entry.elapsed_s) if entry.elapsed_s else None,
        "files": [str(path) for path in entry.files],
        "outputs": [],
    }


def _report(task: Task, paths: Sequence[Path]) -> dict[str, Any]:
    for path in paths:
        say(str(path))
    if task.totalcost is not None:
        say(f"cost: {money(task.totalcost)}")
    return describe(task, paths)


def describe(task: Task, paths: Sequence[Path] = ()) -> dict[str, Any]:
    """The JSON of a task: no token, no access key."""
    outputs = [
        {"name": o.name, "contenttype": o.contenttype, "url": o.url, "content": o.content}
        for o in task.outputs
    ]
    return {
        "taskid": task.taskid,
        "status": task.status,
        "verdict": verdict(task).value,
        "exit_code": task.exit_code,
        "cost": dollars(task.totalcost),
        "elapsed_s": None if task.elapsed_s is None else float(task.elapsed_s),
        "files": [str(path) for path in paths],
        "outputs": outputs,
    }


def _seconds(text: str) -> float:
    try:
        return check_wait(float(text))
    except (ValueError, ConfigError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a time: give seconds above 0, such as 600"
        ) from None


def _dollars(text: str) -> Decimal:
    try:
        amount = parse_limit(text)
    except ConfigError:
        amount = None
    if amount is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not an amount: give US dollars, as 0.50")
    return amount


def _pair(text: str, option: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise ConfigError(f"{option} {text!r} is not NAME=VALUE: write it so.")
    return name, value


def _check_folder(folder: Path) -> None:
    """Before money is spent: the result must have a place to go to."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"{folder} cannot be written: choose another folder.")
