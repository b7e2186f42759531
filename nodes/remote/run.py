"""One run on wiro.ai as a node sees it: started once, shown, stopped with the prompt, downloaded.

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
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import host
from . import account, live_tasks
from .decode import EMPTY_MASK, read_audio, read_clip, read_pictures, read_text

if TYPE_CHECKING:
    from ...wiro_api.client import Client
    from ...wiro_api.errors import WiroError
    from ...wiro_api.handles import Model, RunHandle
    from ...wiro_api.jobs import Job
    from ...wiro_api.journal import Entry
    from ...wiro_api.spending import Limits
    from ...wiro_api.task import Output, Progress, Task
    from ...wiro_api.transport import FilePart

logger = logging.getLogger("skyreels.nodes.remote.run")
#: the parameters of a model -> (parameter, part) of files
FilesFor = Callable[[Sequence[Mapping[str, Any]]], "list[tuple[str, FilePart]]"]

#: in place of a cost
COST_UNKNOWN = "cost unknown"
#: on a node that waits
ALL_BUSY = "all task slots of the account are in use"
#: in the last line of a node whose task nobody has stopped: the user has to
GOES_ON = "may go on at Wiro"
NOTHING_SENT = "cancelled before anything was sent: nothing paid"
#: seconds between two looks at the cancel button
SLICE_S = 0.25
#: longest that a cancelled prompt waits for the service to confirm
STOP_S = 20.0
#: seconds for which what the service said of a model is taken as current
RECORD_S = 600.0
#: models of which it is remembered
KEPT_RECORDS = 50

#: how names of fields begin that send a result or a bill elsewhere, letters and digits only
_ELSEWHERE = ("callback", "webhook", "projectid")

#: outputs of which it depends on the graph whether they are decoded
DECODED = ("images", "mask", "audio", "text")
#: nodes, and files of each, that are looked after while the server runs
KEPT_NODES, KEPT_FILES = 500, 256

#: a node with its widgets -> how often files of its results were gone, and the files it has now
_results: dict[str, tuple[int, tuple[Path, ...]]] = {}
_records: dict[tuple[str, str], tuple[float, Mapping[str, Any]]] = {}


class StoppedError(Exception):
    """The prompt has ended elsewhere: another node failed, or Cancel was seen there first."""


@dataclass(frozen=True)
class Result:
    """What a run made; a text in place of an image, mask, sound or video says why it is missing.

    Attributes:
        taskid: of the task.
        images: [F, H, W, 3] float32 in 0..1, of its first video or all its pictures.
        masks: [F, h, w] float32 in 0..1.
        audio: as core's AUDIO.
        video: path of its first video.
        text: of models that write.
        paths: of all files.
        receipt: JSON.
        cost: for people.
        warning: "" or a sentence.
    """

    taskid: str
    images: Tensor | str
    masks: Tensor | str
    audio: dict[str, Any] | str
    video: Path | str
    text: str
    paths: tuple[Path, ...]
    receipt: str
    cost: str
    warning: str

    @property
    def files(self) -> str:
        """JSON list of the files, as paths below the output folder."""
        return json.dumps(
            [account.relative_to_output(path) for path in self.paths], ensure_ascii=False
        )

    @property
    def line(self) -> str:
        """What the task cost and is called, for the node."""
        line = f"{self.cost} · task {self.taskid}"
        return f"{line} · {self.warning}" if self.warning else line


# --- what a node is asked for -------------------------------------------------------------------


def wanted(
    graph: dict[str, Any] | None, unique_id: str | None, names: Sequence[str]
) -> frozenset[str]:
    """Names of a node's outputs that something hangs on; all if it cannot be known."""
    linked = host.linked_outputs(graph, unique_id)
    return frozenset(n for i, n in enumerate(names) if linked is None or i in linked)


def fingerprint(unique_id: str | None, names: Sequence[str]) -> str:
    """What IS_CHANGED returns for a node: it runs again if this differs from the last time.

    It differs when files of its results are gone, and when other outputs are connected than were
    decoded. Nothing is paid for again: the journal finds the run.

    Returns:
        Any text; only its equality counts.
    """
    graph = host.running_graph()
    key = _key_of(graph, unique_id)
    times, files = _results.get(key, (0, ()))
    left = tuple(path for path in files if path.is_file())
    if left != files:
        times += 1
        _results[key] = (times, left)
    return f"{times} {sorted(wanted(graph, unique_id, names) & set(DECODED))}"


def remember(graph: dict[str, Any] | None, unique_id: str | None, result: Result) -> Result:
    """Look after the files of a result from now on."""
    key = _key_of(graph, unique_id)
    times, files = _results.pop(key, (0, ()))
    _results[key] = (times, tuple(dict.fromkeys((*files, *result.paths)))[-KEPT_FILES:])
    if len(_results) > KEPT_NODES:
        del _results[next(iter(_results))]
    return result


def remember_failure(graph: dict[str, Any] | None, unique_id: str | None) -> None:
    """Let a node that downloaded only a part run again with the next queue."""
    key = _key_of(graph, unique_id)
    times, files = _results.get(key, (0, ()))
    _results[key] = (times + 1, files)


def _key_of(graph: dict[str, Any] | None, unique_id: str | None) -> str:
    """A node with its widgets; linked inputs are not known when IS_CHANGED is asked."""
    inputs = (graph or {}).get(str(unique_id), {}).get("inputs", {})
    widgets = sorted((k, v) for k, v in inputs.items() if not isinstance(v, list))
    return json.dumps([unique_id, widgets], default=str)


# --- one run ------------------------------------------------------------------------------------


class RunView:
    """What one run shows on its node and in the panel, and how it is stopped.

    A `RunListener` by its methods, not by inheritance: the client (with requests) is imported when
    a node runs, not with the nodes.

    Callbacks of the progress socket only leave a note; the worker's thread shows it, because only
    that thread may meet the host's cancel exception.
    """

    def __init__(
        self,
        unique_id: str | None,
        stop_event: threading.Event,
        progress: host.RemoteProgress | None = None,
    ) -> None:
        self._progress = progress or host.RemoteProgress(unique_id)
        self._unique_id = unique_id
        self._stop_event = stop_event
        self._fraction, self._line = 0.0, "asking Wiro"
        self._began = time.monotonic()
        self._report: Progress | None = None
        self._task: Task | None = None
        self._client: Client | None = None
        self.state = live_tasks.TaskState()
        self.row = 0
        #: of the task, as soon as one is known
        self.handle: RunHandle | None = None

    def make_client(self) -> "Client":
        """A client whose waits this run can end; released by `close`."""
        self._client = account.make_client(self.sleep)
        return self._client

    def check(self) -> None:
        """Raise if the run shall stop: the host's exception, or StoppedError."""
        if self._stop_event.is_set():
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
            self._stop_event.wait(min(left, SLICE_S))

    def say(self, line: str, fraction: float | None = None) -> None:
        """Show a line now."""
        self._line = line
        self._fraction = self._fraction if fraction is None else fraction
        self._show()

    def on_entry(self, entry: "Entry") -> None:
        if self.row != entry.id:
            if self.row:
                live_tasks.unsubscribe(self.row)
            self.row, self.state = entry.id, live_tasks.subscribe(entry.id)
        live_tasks.publish(self.row, always=True)

    def on_start(self, entry: "Entry") -> None:
        """The run is started, or was before."""
        from ...wiro_api.jobs import to_handle

        self.handle = to_handle(entry)

    def on_task(self, task: "Task") -> None:
        from ...wiro_api.handles import RunHandle

        if self._task is None or task.status != self._task.status:
            self._began = time.monotonic()
            self._line = task.phase
            live_tasks.add_log(self.state, [f"{time.strftime('%H:%M:%S')} {task.status}"])
        self._task = task
        self.handle = RunHandle(task.taskid, task.token)
        self._show()

    def on_progress(self, report: "Progress") -> None:
        self._report = report

    def on_log(self, text: str) -> None:
        live_tasks.add_log(self.state, text.splitlines())

    def on_bytes(self, done: int, total: int | None) -> None:
        in_all = f" of {total / 1e6:.1f}" if total else ""
        self.say(f"downloading {done / 1e6:.1f}{in_all} MB", 0.97)

    def on_busy(self, error: "WiroError", wait_s: float, sleep: Callable[[float], None]) -> None:
        """Count down to the next try."""
        from ...wiro_api.listener import RunListener

        RunListener.on_busy(self, error, wait_s, sleep)

    def verify(self, path: Path, output: "Output") -> None:
        """Accept the file: decoding it checks it."""

    def on_wait(self, left_s: float) -> None:
        self.say(f"{ALL_BUSY} · next try in {left_s:.0f} s", 0.0)

    def _show(self) -> None:
        from ...wiro_api.task import STATUSES, fraction_of

        task = self._task
        if task is not None and not task.is_terminal:
            self._fraction = max(self._fraction, fraction_of(task, self._report))
            self._line = f"{task.phase} for {time.monotonic() - self._began:.0f} s"
            if self._report is not None and task.rank <= STATUSES["task_output_full"].rank:
                self._line = str(self._report)
        self.state.fraction, self.state.line = self._fraction, self._line
        name = "" if task is None else f" · task {task.taskid}"  # the panel shows it beside
        self._progress.show(self._fraction, self._line + name)
        if self.row:
            live_tasks.publish(self.row)

    def close(self, line: str, *, must_act: bool = False) -> None:
        """Show what came of it, without looking at the cancel button: it stays on the node.

        Args:
            line: the last one.
            must_act: whether the user has to act; known from the line if a task may go on.
        """
        must_act = must_act or GOES_ON in line
        # every open page gets this one: it needs no path of this machine
        self.state.line = line.replace(str(host.output_folder()), "output")
        self._progress.say(line)
        if self._unique_id is not None:
            level = logging.WARNING if must_act else logging.INFO
            logger.log(level, "Wiro, node %s: %s", self._unique_id, " ".join(line.split()))
            host.show_outcome(self.state.line, self._unique_id, must_act=must_act)
        if self.row:
            live_tasks.unsubscribe(self.row)
        if self._client is not None:
            self._client.close()


def check_fields(values: object) -> None:
    """Refuse fields that send the bill or the result elsewhere, at any depth and in any spelling.

    A workflow may come from anyone, and its user does not see these fields when it runs. They can
    be given on the command line.

    Raises:
        ConfigError: names the field.
    """
    from ...wiro_api.errors import ConfigError

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
    wants: frozenset[str],
    files_for: "FilesFor | None" = None,
) -> Result:
    """Run a model on Wiro once, or go on with the run that these inputs started before.

    Args:
        model: to run.
        values: of its parameters.
        make_files: makes its (parameter, part) of files.
        take: another number is another run of the same inputs.
        wait_when_busy: wait for a slot of the account.
        timeout_minutes: longest wait for the task's end.
        unique_id: of the node.
        wants: names of the outputs that something is connected to, as `wanted` finds them.
        files_for: makes further files, of which the model's parameters decide where they go.

    Returns:
        The result. Raises WiroError with a sentence that helps, or the host's cancel exception
        after the remote task was stopped.
    """
    stop_event = threading.Event()

    def work() -> Result:
        from ...wiro_api.jobs import Job

        return run_job(
            RunView(unique_id, stop_event),
            Job(model, values, make_files(), take),
            wait_when_busy=wait_when_busy,
            timeout_minutes=timeout_minutes,
            wants=wants,
            files_for=files_for,
        )

    return await host.run_in_thread(work, stop_event)


def run_job(
    view: RunView,
    job: "Job",
    *,
    wait_when_busy: bool,
    timeout_minutes: float,
    wants: frozenset[str],
    files_for: "FilesFor | None" = None,
) -> Result:
    """Start a job, or go on with it, up to its result; `view` is closed. Blocks.

    Args:
        view: shows it.
        job: to run.
        wait_when_busy: as for `run_model`.
        timeout_minutes: as for `run_model`.
        wants: as for `run_model`.
        files_for: as for `run_model`.

    Returns:
        As `run_model`.
    """
    from ...wiro_api.client import check_wait
    from ...wiro_api.errors import RunOutcomeUnknownError, WiroError
    from ...wiro_api.jobs import is_complete, quote, start, to_handle
    from ...wiro_api.schema import items_of
    from ...wiro_api.spending import describe_price

    line, parameters, must_act = "not started, nothing paid", job.values, False
    try:
        check_fields([job.values, dict(job.files)])
        check_wait(60.0 * timeout_minutes)
        client, journal = view.make_client(), account.journal()
        account.check_socket_url()
        view.check()
        view.say("asking Wiro for the price")
        record = model_record(client, job.model)
        if files_for is not None:
            job = replace(job, files=[*job.files, *files_for(items_of(record, job.model))])
            check_fields(dict(job.files))
            view.check()
        quoted = quote(record, job, journal.costs(str(job.model)))
        parameters = quoted.parameters
        terms = describe_price(quoted.price, load_limits())
        logger.info("Wiro model %r: %s.", str(job.model), terms)
        view.say(f"sending · {terms}")
        entry = start(
            client,
            journal,
            job,
            quoted,
            limits=load_limits,
            wait_when_busy=wait_when_busy,
            listener=view,
        )
        view.on_start(entry)
        line = f"task {entry.taskid} goes on at Wiro"
        receipt = {"model": str(job.model), "parameters": parameters, "take": job.take}
        delivery = _Delivery(view, client, receipt, wants)
        if is_complete(journal, entry):
            result = delivery.read(entry, entry.files)
            line = f"made before by task {entry.taskid}: nothing paid now"
        else:
            result = delivery.follow(to_handle(entry), entry, timeout_minutes)
            charged = "" if result.cost == COST_UNKNOWN else "charged "
            line = f"done · {charged}{result.line}"
        return result
    except BaseException as error:
        if is_stop(error):
            line = stop_job(view, job, parameters)
        elif isinstance(error, WiroError):
            line, must_act = str(error), isinstance(error, RunOutcomeUnknownError)
        raise
    finally:
        view.close(line, must_act=must_act)


def load_limits() -> "Limits":
    """The spending limits of the account."""
    from ...wiro_api import spending

    return spending.load_limits(account.limits_file())


def is_stop(error: BaseException) -> bool:
    """Whether it ends a run because the prompt has ended, here or elsewhere."""
    return isinstance(error, StoppedError) or host.is_interrupt(error)


def model_record(client: "Client", model: "Model") -> Mapping[str, Any]:
    """Read what Wiro says of a model; remembered for `RECORD_S`.

    Returns:
        The record; {} for SkyReels-V1 if Wiro does not answer, which is logged.
    """
    from ...wiro_api.jobs import read_record

    key = (client.base_url, str(model.clean))
    read_at, known = _records.get(key, (-RECORD_S, {}))
    if time.monotonic() - read_at < RECORD_S:
        return known
    problems: list[WiroError] = []
    record: Mapping[str, Any] = read_record(client, model, problems.append)
    if problems:
        logger.warning(
            "Wiro does not describe %s, so its price is not known: %s", model, problems[0]
        )
        return {}
    _records.pop(key, None)
    _records[key] = (time.monotonic(), record)
    if len(_records) > KEPT_RECORDS:
        _records.pop(next(iter(_records)), None)
    return record


@dataclass(frozen=True)
class _Delivery:
    """The result of one run on its way to the node's sockets."""

    view: RunView
    client: "Client"
    #: what the node's receipt says of the inputs
    receipt: Mapping[str, Any]
    wants: frozenset[str]

    def follow(self, handle: "RunHandle", entry: "Entry | None", timeout_minutes: float) -> Result:
        """Wait for a task, and download what is not here.

        If a file cannot be fetched, and what matters is here, that is a warning.

        Returns:
            The result.

        Raises:
            WiroError: the task failed, has not ended, or what matters is not here.
        """
        from ...wiro_api.errors import DownloadError, WiroError
        from ...wiro_api.jobs import files_here, finish
        from ...wiro_api.wire import dollars

        warning = ""
        try:
            task, paths = finish(
                self.client,
                handle,
                account.task_folder(handle.taskid),
                journal=account.journal(),
                entry_id=None if entry is None else entry.id,
                timeout_s=60.0 * timeout_minutes,
                listener=self.view,
                asked=self.receipt,
                is_labelled=True,
            )
        except WiroError as error:
            warning = str(error)
            if isinstance(error, DownloadError) and error.task is not None:
                if not _is_enough(error.paths, error.missing):
                    raise
                task, paths = error.task, list(error.paths)
                logger.warning("%s", error)
            else:
                here = () if entry is None else files_here(account.journal(), entry)
                if entry is None or not _is_enough(here, [path.name for path in entry.files]):
                    raise
                logger.warning("Task %s: %s", entry.taskid, error)
                return self.read(entry, here, warning)
        bill = _Bill(task.taskid, dollars(task.totalcost), task.elapsed_s)
        result = self._to_result(bill, paths, _text_of(task), warning)
        self.view.say("done", 1.0)
        return result

    def read(self, entry: "Entry", paths: Sequence[Path], warning: str = "") -> Result:
        """The result of files that were downloaded before."""
        from ...wiro_api.errors import WiroError
        from ...wiro_api.jobs import to_handle

        text = ""
        if "text" in self.wants:  # the journal holds none
            try:
                text = _text_of(self.client.detail(to_handle(entry)))
            except WiroError as error:
                logger.warning(
                    "The text of task %s is read from its files alone: %s", entry.taskid, error
                )
        bill = _Bill(entry.taskid, entry.cost, entry.elapsed_s)
        return self._to_result(bill, paths, text, warning)

    def _to_result(self, bill: "_Bill", paths: Sequence[Path], text: str, warning: str) -> Result:
        """The files as what the sockets carry; only connected outputs are decoded."""
        from ...wiro_api.media import kind_of_name
        from ...wiro_api.receipts import shown
        from ...wiro_api.wire import money

        kinds = _by_kind(paths)
        videos, pictures = kinds.get("video", []), kinds.get("image", [])
        receipt = {
            "backend": "wiro",
            **shown(self.receipt),
            "taskid": bill.taskid,
            "cost_usd": bill.cost or None,
            "elapsed_s": None if bill.elapsed_s in (None, "") else float(str(bill.elapsed_s)),
            "files": [account.relative_to_output(path) for path in paths],
        }
        more = f" {warning}" if warning else ""
        images: Tensor | str = f"Task {bill.taskid} made no picture and no video.{more}"
        masks: Tensor | str = images
        audio: dict[str, Any] | str = f"Task {bill.taskid} made no sound.{more}"
        idle = "Nothing was connected to this output when the files were read: queue again."
        if videos or pictures:
            images = masks = idle
            if self.wants & {"images", "mask"}:
                self.view.say("decoding", 0.98)
                images, masks = _decode(videos, pictures, self.view)
        sounds = kinds.get("audio", []) + videos
        if sounds:
            audio = _decode_sound(sounds[0], self.view) if "audio" in self.wants else idle
        if not text and "text" in self.wants:
            notes = [path for path in kinds.get("text", []) if kind_of_name(path.name) == "text"]
            text = "\n".join(filter(None, map(read_text, notes)))
        return Result(
            taskid=bill.taskid,
            images=images,
            masks=masks,
            audio=audio,
            video=videos[0] if videos else f"Task {bill.taskid} made no video.{more}",
            text=text,
            paths=tuple(paths),
            receipt=json.dumps(receipt, indent=2, ensure_ascii=False),
            cost=money(Decimal(bill.cost)) if bill.cost else COST_UNKNOWN,
            warning=warning,
        )


@dataclass(frozen=True)
class _Bill:
    """A task, its cost in US dollars and its billed seconds; "" or None if unknown."""

    taskid: str
    cost: str | None
    elapsed_s: object


def _text_of(task: "Task") -> str:
    return "\n".join(output.content for output in task.outputs if output.content)


def _is_enough(paths: Sequence[Path], missing: Sequence[str]) -> bool:
    """Whether what is here is of the kind that matters most: a video counts more than its cover."""
    from ...wiro_api.jobs import MISSING
    from ...wiro_api.media import KINDS, kind_of, kind_of_name

    here = [KINDS.index(kind_of(path)) for path in paths]
    lost = [KINDS.index(kind_of_name(name.removesuffix(MISSING))) for name in missing]
    return bool(here) and max(here) >= max(lost, default=0)


def _by_kind(paths: Sequence[Path]) -> dict[str, list[Path]]:
    from ...wiro_api.media import kind_of

    kinds: dict[str, list[Path]] = {}
    for path in paths:
        kinds.setdefault(kind_of(path), []).append(path)
    return kinds


def with_images(result: Result, view: RunView) -> Result:
    """A result with the frames of its video, or its pictures, which are decoded now."""
    kinds = _by_kind(result.paths)
    videos, pictures = kinds.get("video", []), kinds.get("image", [])
    if not videos and not pictures:
        return result
    images, masks = _decode(videos, pictures, view)
    return replace(result, images=images, masks=masks)


def _decode(
    videos: Sequence[Path], pictures: Sequence[Path], view: RunView
) -> tuple[Tensor | str, Tensor | str]:
    """IMAGE and MASK of the first video, else of all pictures; or why there are none."""
    from ...wiro_api.errors import DownloadError, WiroError

    try:
        if not videos:
            return read_pictures(pictures, view.check)
        clip = read_clip(videos[0], view.check)
        return clip, torch.zeros(len(clip), EMPTY_MASK, EMPTY_MASK)
    except WiroError as error:
        place = account.relative_to_output((*videos, *pictures)[0])
        again = "; delete it to fetch it again" if isinstance(error, DownloadError) else ""
        reason = f"{str(error).rstrip('.')}. The file is kept: {place}{again}."
        logger.warning("%s", reason)
        return reason, reason


def _decode_sound(path: Path, view: RunView) -> dict[str, Any] | str:
    from ...wiro_api.errors import WiroError

    try:
        return read_audio(path, view.check)
    except WiroError as error:
        return f"{str(error).rstrip('.')}: {account.relative_to_output(path)}."


class _Patience:
    """Waits that end in an error when their time is over."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.restart()

    def restart(self) -> None:
        self._end = time.monotonic() + self._seconds

    def extend(self, seconds: float) -> None:
        self._end += seconds

    def sleep(self, seconds: float) -> None:
        from ...wiro_api.errors import WiroError

        if time.monotonic() + seconds > self._end:
            raise WiroError("Wiro did not confirm in time")
        time.sleep(seconds)


def stop_job(view: RunView, job: "Job", parameters: Mapping[str, Any]) -> str:
    """Stop what a run has started, and say what came of it; raises nothing.

    A Run whose answer is still on its way is waited for: only that, or a proof, tells its task from
    those of others, and no other's is stopped.

    Args:
        view: of the run.
        job: of the run.
        parameters: that were sent.

    Returns:
        The line for the node.
    """  # noqa: DOC501 - caught below
    from ...wiro_api.candidates import RECONCILE_AT_S
    from ...wiro_api.errors import WiroError
    from ...wiro_api.jobs import recover, to_handle
    from ...wiro_api.journal import LostEntryError
    from ...wiro_api.wire import money

    patience = _Patience(STOP_S)
    journal, row, handle = account.journal(), view.row, view.handle
    entry = journal.get(row) if row else None
    is_sent = entry is not None and entry.state == "sending"
    if handle is None and (row == 0 or (entry is not None and not is_sent)):
        if entry is None or not entry.taskid:
            return NOTHING_SENT
        handle = to_handle(entry)
    taskid = handle.taskid if handle is not None else ""
    try:
        with account.make_client(patience.sleep) as client:
            if handle is None:
                if entry is None:
                    raise WiroError(f"the journal {journal.path} cannot be read")
                patience.extend(RECONCILE_AT_S[-1])
                try:
                    handle = recover(client, journal, entry, job, parameters)
                except LostEntryError:  # the answer has come
                    entry = journal.get(row) or entry
                    if not entry.taskid:
                        return "cancelled, Wiro made no task: nothing paid"
                    handle = to_handle(entry)
                taskid = handle.taskid
                patience.restart()
            task = client.stop(handle)
    except WiroError as error:
        what = f"task {taskid}" if taskid else "the run"
        logger.error("Cancelled, but %s may go on at Wiro and cost money: %s", what, error)
        return f"cancelled here, but {what} {GOES_ON}: stop it in the Wiro panel"
    if row:
        journal.mark_ended(row, task, () if entry is None else entry.files)
    charged = f"charged {money(task.totalcost)}" if task.totalcost else "nothing was charged"
    word = "stopped" if task.status == "task_cancel" else "had ended"
    return f"cancelled, {charged} · task {task.taskid} {word}"


def collect(view: RunView, text: str, timeout_minutes: float, wants: frozenset[str]) -> Result:
    """Follow a task that a person named, to its files; `view` is closed. Blocks."""
    from ...wiro_api.errors import WiroError
    from ...wiro_api.handles import RunHandle

    line = "stopped waiting"
    try:
        account.check_socket_url()
        handle = RunHandle.parse(text)
        client = view.make_client()
        task = client.detail(handle)
        entry = account.journal().adopt(task.taskid, task.model)
        if entry is not None:
            view.on_entry(entry)
        line = f"stopped waiting; task {task.taskid} goes on at Wiro"
        receipt = {"model": task.model, "parameters": dict(task.parameters)}
        delivery = _Delivery(view, client, receipt, wants)
        result = delivery.follow(RunHandle(task.taskid, task.token), entry, timeout_minutes)
        line = f"collected, nothing paid now; its run: {result.line}"
        return result
    except WiroError as error:
        line = str(error)
        raise
    finally:
        view.close(line)
