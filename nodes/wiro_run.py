"""One run on wiro.ai as a node sees it: started once, shown, stopped with the prompt, brought home.

The work is done in a thread beside the host's loop. A run that was started is found again by its
inputs: queueing the same node after a crash goes on instead of paying again.
"""

import json
import logging
import re
import threading
import time
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import account, host

if TYPE_CHECKING:
    from ..wiro_api.client import Client, Model, RunHandle
    from ..wiro_api.journal import Entry
    from ..wiro_api.task import Output, Progress, Task
    from ..wiro_api.transport import FilePart

log = logging.getLogger("skyreels")

#: between two looks at the cancel button
SLICE_S = 0.25
#: longest that a cancelled prompt waits for the service to confirm
STOP_S = 20.0
#: seconds for which what the service said of a model is taken as current
RECORD_S = 600.0
#: rank of a task's state -> where the bar stands while nothing better is known
_BAR = {-1: 0.0, 0: 0.0, 1: 0.02, 2: 0.03, 3: 0.04, 4: 0.05, 5: 0.06, 6: 0.06, 7: 0.92, 8: 0.93,
        9: 0.95, 10: 0.97}  # fmt: skip
_RUNNING_FROM, _RUNNING_TO = 0.06, 0.92

#: how names of fields begin that send a result or a bill elsewhere, letters and digits only
_ELSEWHERE = ("callback", "webhook", "projectid")

_records: dict[tuple[str, str], tuple[float, Mapping[str, Any]]] = {}


class StoppedError(Exception):
    """The prompt has ended elsewhere: another node failed, or Cancel was seen there first."""


@dataclass(frozen=True)
class Result:
    """What a run brought home.

    frames: [F, H, W, 3] float32 in 0..1 of its first video or all its pictures, or None.
    video: path of its first video, or None. text: of models that write. cost: for people.
    """

    taskid: str
    frames: Tensor | None
    video: Path | None
    text: str
    receipt: str
    cost: str


# --- one run ------------------------------------------------------------------------------------


class Window:
    """What one run shows on its node and in the panel, and how it is stopped.

    Callbacks of the progress socket only leave a note; the worker's thread shows it, because only
    that thread may meet the host's cancel exception.
    """

    def __init__(self, unique_id: str | None, over: threading.Event) -> None:
        self._progress = host.RemoteProgress(unique_id)
        self._over = over
        self._fraction, self._line = 0.0, "asking Wiro"
        self._began = time.monotonic()
        self._report: Progress | None = None
        self._task: Task | None = None
        self._client: Client | None = None
        self.live = account.Live()
        self.row = 0
        #: of the task, as soon as one is known
        self.handle: RunHandle | None = None

    def make_client(self) -> "Client":
        """A client whose waits this run can end; let go of with `close`."""
        self._client = account.make_client(self.sleep)
        return self._client

    def check(self) -> None:
        """Raise if the run shall stop: the host's exception, or StoppedError."""
        if self._over.is_set():
            raise StoppedError
        self._progress.check_interrupt()

    def sleep(self, seconds: float) -> None:
        """Wait, showing what comes in and looking at the cancel button."""
        end = time.monotonic() + seconds
        while True:
            self.check()
            self._show()
            left = end - time.monotonic()
            if left <= 0:
                return
            self._over.wait(min(left, SLICE_S))

    def say(self, line: str, fraction: float | None = None) -> None:
        """Show a line now."""
        self._line = line
        self._fraction = self._fraction if fraction is None else fraction
        self._show()

    def on_entry(self, entry: "Entry") -> None:
        if self.row != entry.id:
            if self.row:
                account.leave(self.row)
            self.row, self.live = entry.id, account.follow(entry.id)
        account.tell(self.row, always=True)

    def on_task(self, task: "Task") -> None:
        from ..wiro_api.client import RunHandle

        if self._task is None or task.status != self._task.status:
            self._began = time.monotonic()
            self._line = task.phase
            account.add_log(self.live, [f"{time.strftime('%H:%M:%S')} {task.status}"])
        self._task = task
        self.handle = RunHandle(task.taskid, task.token)
        self._show()

    def on_progress(self, report: "Progress") -> None:
        self._report = report

    def on_log(self, line: str) -> None:
        account.add_log(self.live, line.splitlines())

    def on_bytes(self, done: int, total: int | None) -> None:
        of = f" of {total / 1e6:.1f}" if total else ""
        self.say(f"downloading {done / 1e6:.1f}{of} MB", 0.97)

    def on_wait(self, left: float) -> None:
        self.say(f"all places of the account are taken · next try in {left:.0f} s", 0.0)

    def _show(self) -> None:
        task = self._task
        if task is not None and not task.is_terminal:
            where = _BAR[task.rank]
            line = f"{task.phase} for {time.monotonic() - self._began:.0f} s"
            if self._report is not None and task.rank <= 7:
                line = str(self._report)
                done = self._report.fraction or 0.0
                where = _RUNNING_FROM + done * (_RUNNING_TO - _RUNNING_FROM)
            self._fraction, self._line = max(self._fraction, where), line
        self.live.fraction, self.live.line = self._fraction, self._line
        of = "" if task is None else f" · task {task.taskid}"  # the panel shows it beside
        self._progress.show(self._fraction, self._line + of)
        if self.row:
            account.tell(self.row)

    def close(self, line: str) -> None:
        """Show the last line, without looking at the cancel button."""
        # every open page gets this one: it needs no place of this machine
        self.live.line = line.replace(str(host.output_folder()), "output")
        self._progress.say(line)
        if self.row:
            account.leave(self.row)
        if self._client is not None:
            self._client.close()


def check_fields(values: object) -> None:
    """Refuse fields that send the bill or the result elsewhere, at any depth and in any spelling.

    A workflow file is a stranger's, and these are not seen when it runs. Whoever wants them types
    them on the command line.

    Raises:
        ConfigError: names the field.
    """
    from ..wiro_api.errors import ConfigError

    left = [values]
    while left:
        value = left.pop()
        if isinstance(value, list | tuple):
            left.extend(value)
        if not isinstance(value, Mapping):
            continue
        left.extend(value.values())
        for name in value:
            plain = re.sub(r"[^a-z0-9]", "", unicodedata.normalize("NFKC", str(name)).lower())
            if plain.startswith(_ELSEWHERE):
                raise ConfigError(
                    f"The field {str(name)[:40]!r} sends the result or the bill to somebody else, "
                    "and a workflow may not do that. Nothing was sent. Remove it, or run the model "
                    "with python -m wiro_api run, where you type it yourself."
                )


async def run_model(
    model: "Model",
    values: Mapping[str, Any],
    make_files: "Callable[[], list[tuple[str, FilePart]]]",
    *,
    take: int,
    wait_when_busy: bool,
    timeout_minutes: float,
    unique_id: str | None,
) -> Result:
    """Run a model on Wiro once, or go on with the run that these inputs started before.

    Args:
        values: of its parameters. make_files: makes its (parameter, part) of files.
        take: another number is another run of the same inputs.
    Raises:
        WiroError: with a sentence that helps. The host's cancel exception, after the remote task
            was stopped.
    """
    over = threading.Event()

    def work() -> Result:
        window = Window(unique_id, over)
        return _run(window, model, values, make_files(), take, wait_when_busy, timeout_minutes)

    return await host.in_thread(work, over)


def _run(
    window: Window,
    model: "Model",
    values: Mapping[str, Any],
    files: "list[tuple[str, FilePart]]",
    take: int,
    wait_when_busy: bool,
    timeout_minutes: float,
) -> Result:
    from ..wiro_api.client import check_wait
    from ..wiro_api.errors import DownloadError, WiroError
    from ..wiro_api.jobs import start, to_handle
    from ..wiro_api.schema import complete, items_of
    from ..wiro_api.spending import describe_price, load_limits, price_of

    line, parameters = "not started", dict(values)
    try:
        check_fields([values, dict(files)])
        check_wait(60.0 * timeout_minutes)
        client, journal = window.make_client(), account.journal()
        account.check_socket_url()
        window.check()
        window.say("asking Wiro for the price")
        record = model_record(client, model)
        parameters = complete(items_of(record, model), values, files)
        price = price_of(record, parameters, len(files), journal.costs(str(model)))
        told = describe_price(price, load_limits(account.limits_file()))
        log.info("Wiro model %r: %s.", str(model), told)
        window.say(f"sending · {told}")
        entry = start(
            client, journal, model, parameters, files, given=values, take=take, price=price,
            limits=lambda: load_limits(account.limits_file()), wait_when_busy=wait_when_busy,
            on_entry=window.on_entry, on_wait=window.on_wait, check=window.check,
        )  # fmt: skip
        window.handle = to_handle(entry)
        line = f"task {entry.taskid} goes on at Wiro"
        receipt = {"model": str(model), "parameters": parameters, "take": take}
        if entry.state == "ended" and entry.files and all(p.is_file() for p in entry.files):
            try:
                result = _from_disk(entry, receipt)
                line = f"made before by task {entry.taskid}: nothing was paid for it now"
                return result
            except DownloadError as error:
                log.warning("A file of task %s is fetched anew: %s.", entry.taskid, error)
        result = _follow(window, client, to_handle(entry), timeout_minutes, receipt, entry.id)
        line = f"done · {result.cost} · task {result.taskid}"
        return result
    except BaseException as error:
        if isinstance(error, StoppedError) or host.is_interrupt(error):
            line = _stop(window, model, parameters, files)
        elif isinstance(error, WiroError):
            line = str(error)
        raise
    finally:
        window.close(line)


def model_record(client: "Client", model: "Model") -> Mapping[str, Any]:
    """What Wiro says of a model, from the last minutes.

    Of SkyReels-V1 enough is known without: {} if Wiro does not say, which is logged.
    """
    from ..wiro_api.errors import ApiError, AuthError, NotFoundError, TransportError
    from ..wiro_api.schema import SKYREELS

    key = (client.base_url, str(model.clean))
    read_at, record = _records.get(key, (-RECORD_S, {}))
    if time.monotonic() - read_at < RECORD_S:
        return record
    try:
        record = client.model_detail(model)
    except (AuthError, NotFoundError):
        raise
    except (ApiError, TransportError) as error:
        if model.clean != SKYREELS.clean:
            raise
        log.warning("Wiro does not describe %s, so its price is not known: %s", model, error)
        return {}
    _records[key] = (time.monotonic(), record)
    return record


def _follow(
    window: Window,
    client: "Client",
    handle: "RunHandle",
    timeout_minutes: float,
    receipt: dict[str, Any],
    row: int | None,
) -> Result:
    from ..wiro_api.jobs import finish
    from ..wiro_api.task import dollars
    from ..wiro_api.transport import local_host
    from ..wiro_api.video import is_image, is_video
    from ..wiro_api.websocket import socket_url

    frames: list[Tensor] = []

    def decode(path: Path, output: "Output") -> None:
        window.say("decoding", 0.98)
        if is_video(output):
            clip = read_clip(path, window.check)
            if not frames:
                frames.append(clip)
        elif is_image(output):
            frames.append(read_clip(path, window.check))

    folder = account.task_folder(handle.taskid)
    task, paths = finish(
        client, handle, folder, journal=account.journal(), entry_id=row,
        timeout_s=60.0 * timeout_minutes, socket_url=socket_url(),
        local_host=local_host(), on_task=window.on_task, on_progress=window.on_progress,
        on_log=window.on_log, on_bytes=window.on_bytes, check=window.check, verify=decode,
    )  # fmt: skip
    window.say("done", 1.0)
    return _to_result(
        receipt, task.taskid, dollars(task.totalcost), task.elapsed_s, paths, frames,
        "\n".join(output.content for output in task.outputs if output.content),
    )  # fmt: skip


def _from_disk(entry: "Entry", receipt: dict[str, Any]) -> Result:
    videos = [path for path in entry.files if path.suffix.lower() in account.VIDEO_SUFFIXES]
    pictures = [path for path in entry.files if path.suffix.lower() in account.IMAGE_SUFFIXES]
    frames = [read_clip(path) for path in videos[:1] or pictures]
    return _to_result(receipt, entry.taskid, entry.cost, entry.elapsed_s, entry.files, frames, "")


def _to_result(
    receipt: dict[str, Any],
    taskid: str,
    cost: str | None,
    elapsed_s: object,
    paths: Sequence[Path],
    frames: list[Tensor],
    text: str,
) -> Result:
    from ..wiro_api.task import money

    whole = {
        **receipt,
        "taskid": taskid,
        "cost_usd": cost or None,
        "elapsed_s": None if elapsed_s in (None, "") else float(str(elapsed_s)),
        "files": [account.place_of(path) for path in paths],
    }
    same = [clip for clip in frames if clip.shape[1:] == frames[0].shape[1:]]
    if len(same) < len(frames):
        log.warning("Task %s made pictures of several sizes: IMAGE holds the first size.", taskid)
    videos = [path for path in paths if path.suffix.lower() in account.VIDEO_SUFFIXES]
    return Result(
        taskid, torch.cat(same) if len(same) > 1 else next(iter(same), None),
        videos[0] if videos else None, text, json.dumps(whole, indent=2, ensure_ascii=False),
        money(Decimal(cost)) if cost else "cost not told",
    )  # fmt: skip


def read_clip(path: Path, check: Callable[[], None] = lambda: None) -> Tensor:
    """The frames of a video or picture, [F, H, W, 3] float32 in 0..1, decoded one at a time.

    Args:
        check: called before each; may raise to stop.
    Raises:
        DownloadError: it does not decode. DependencyError: PyAV is missing.
    """
    from ..wiro_api.video import read_frames

    clip: Tensor | None = None
    for number, (frame, announced) in enumerate(read_frames(path)):
        check()
        if clip is None:
            # a container that does not tell is read twice: the clip must not be held twice
            total = announced or sum(1 for _ in read_frames(path))
            clip = torch.empty((total, *frame.shape))
        if number < len(clip):
            clip[number].copy_(torch.from_numpy(frame)).div_(255.0)
    assert clip is not None, "read_frames raises where there is no frame"
    return clip


def _stop(
    window: Window,
    model: "Model",
    parameters: Mapping[str, Any],
    files: "list[tuple[str, FilePart]]",
) -> str:
    """Stop what a run has started, and say what came of it; raises nothing.

    A Run whose answer is still on its way is waited for: only that, or a proof, tells its task from
    those of others, and no other's is stopped.

    Returns:
        The line for the node.
    """
    from ..wiro_api.client import RECONCILE_AT_S
    from ..wiro_api.errors import WiroError
    from ..wiro_api.jobs import recover, to_handle
    from ..wiro_api.journal import LostEntryError
    from ..wiro_api.task import money

    deadline = time.monotonic() + STOP_S

    def sleep(seconds: float) -> None:
        if time.monotonic() + seconds > deadline:
            raise WiroError("Wiro did not confirm in time")
        time.sleep(seconds)

    journal, row, handle = account.journal(), window.row, window.handle
    entry = journal.get(row) if row else None
    is_sent = entry is not None and entry.state == "sending"
    if handle is None and (row == 0 or (entry is not None and not is_sent)):
        if entry is None or not entry.taskid:
            return "cancelled before anything was sent"
        handle = to_handle(entry)
    taskid = handle.taskid if handle is not None else ""
    try:
        with account.make_client(sleep) as client:
            if handle is None:
                if entry is None:
                    raise WiroError(f"the journal {journal.path} cannot be read")
                deadline += RECONCILE_AT_S[-1]
                try:
                    handle = recover(client, journal, entry, model, parameters, files)
                except LostEntryError:  # the answer has come
                    entry = journal.get(row) or entry
                    if not entry.taskid:
                        return "cancelled, and Wiro made no task"
                    handle = to_handle(entry)
                taskid = handle.taskid
                deadline = time.monotonic() + STOP_S
            task = client.stop(handle)
    except WiroError as error:
        what = f"task {taskid}" if taskid else "the run"
        log.error("Cancelled, but %s may go on at Wiro and cost money: %s", what, error)
        return f"cancelled here, but {what} may go on at Wiro: stop it in the Wiro panel"
    if row:
        journal.ended(row, task, () if entry is None else entry.files)
    charged = f"charged {money(task.totalcost)}" if task.totalcost else "nothing was charged"
    log.info("Wiro task %s: %s, %s.", task.taskid, task.status, charged)
    word = "stopped" if task.status == "task_cancel" else "had ended"
    return f"task {task.taskid} {word} · {charged}"


def collect(window: Window, text: str, timeout_minutes: float) -> Result:
    """Follow a task that a person named, to its files."""
    from ..wiro_api.client import RunHandle
    from ..wiro_api.errors import WiroError

    line = "stopped waiting"
    try:
        account.check_socket_url()
        handle = RunHandle.parse(text)
        client = window.make_client()
        task = client.detail(handle)
        entry = account.journal().adopt(task.taskid, task.model)
        if entry is not None:
            window.on_entry(entry)
        line = f"stopped waiting; task {task.taskid} goes on at Wiro"
        receipt = {"model": task.model, "parameters": dict(task.parameters)}
        result = _follow(
            window, client, RunHandle(task.taskid, task.token), timeout_minutes, receipt,
            None if entry is None else entry.id,
        )  # fmt: skip
        line = f"done · {result.cost} · task {result.taskid}"
        return result
    except WiroError as error:
        line = str(error)
        raise
    finally:
        window.close(line)
