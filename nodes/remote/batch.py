"""Many runs on wiro.ai at once: one node starts them, another downloads their results in order.

What goes from one node to the other is what makes each job; the journal knows by that what was
started. So it does not matter which node starts a run, nor whether ComfyUI was restarted between.

The host shows Cancel to one asker alone: only the node's own thread asks, and ends the others'.
"""

import contextvars
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .. import host
from . import account
from .inputs import png_part
from .nodes import or_blocked, video_output
from .run import (
    ALL_BUSY,
    NOTHING_SENT,
    SLICE_S,
    Result,
    RunView,
    StoppedError,
    fingerprint,
    is_stop,
    load_limits,
    model_record,
    remember,
    remember_failure,
    run_job,
    stop_job,
    wanted,
    with_images,
)
from .widgets import SKYREELS_OPTIONAL, TAKE, TIMEOUT_MINUTES, skyreels_required, skyreels_run

if TYPE_CHECKING:
    from ...wiro_api.client import Client
    from ...wiro_api.errors import WiroError
    from ...wiro_api.jobs import Job, Quote
    from ...wiro_api.journal import Entry
    from ...wiro_api.spending import Limits, Price, Spent
    from ...wiro_api.task import Task

logger = logging.getLogger("skyreels.nodes.remote.batch")

#: a picture for each frame of a clip that was connected by mistake is more than this
MAX_RUNS = 48


@dataclass(frozen=True)
class WiroRun:
    """A job of a batch.

    Attributes:
        job: all that makes it.
        label: for people, as "picture 3".
    """

    job: "Job"
    label: str

    @cached_property
    def key(self) -> str:
        """Equal for two runs that are the same job; all pixels are read for it."""
        from ...wiro_api.jobs import job_key

        return str(job_key(self.job))


class NoSlotError(Exception):
    """The account has no slot for another task now."""


class WiroSubmit:
    CATEGORY = "SkyReels/remote"
    SEARCH_ALIASES = [
        "image to video",
        "i2v",
        "skyreels",
        "hunyuan",
        "wiro.ai",
        "batch",
        "many videos",
    ]
    DESCRIPTION = (
        "Starts a SkyReels-V1 run on wiro.ai for each image of a batch or list (or each prompt), "
        "as many as the account has task slots, and does not wait. Wiro Collect starts the others "
        "and downloads the videos. Each run costs money: the total is shown first."
    )
    FUNCTION = "submit"
    INPUT_IS_LIST = True
    RETURN_TYPES = ("SKYREELS_WIRO_RUNS", "STRING")
    RETURN_NAMES = ("runs", "report")
    OUTPUT_TOOLTIPS = (
        "For Wiro Collect, in the order of the images. Started runs continue at Wiro if the prompt "
        "is cancelled or fails before Wiro Collect follows them.",
        "Number of started runs, their task ids, number of runs waiting for a slot.",
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "image": (
                    "IMAGE",
                    {
                        "tooltip": "Images: a batch, a list, or a list of batches of any sizes. "
                        "One prompt is used for all; otherwise give one prompt per image, or one "
                        "image for all prompts."
                    },
                ),
                "prompt": (
                    "STRING",
                    {
                        "multiline": True,
                        "dynamicPrompts": True,
                        "default": "",
                        "tooltip": "What happens in the video. A list is paired with the images, "
                        "in order, or with one image. None may be empty.",
                    },
                ),
                **skyreels_required(),
            },
            "optional": {
                **SKYREELS_OPTIONAL,
                "take": TAKE,
                "max_runs": (
                    "INT",
                    {
                        "default": MAX_RUNS,
                        "min": 1,
                        "max": 10_000,
                        "tooltip": f"Maximum number of runs (default {MAX_RUNS}). More are an "
                        "error before anything is paid: a clip connected by mistake is one image "
                        "per frame.",
                    },
                ),
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, prompt: Any = None) -> bool | str:
        for text in _listed(prompt):
            if text is not None and not text.strip():
                return "The prompt is empty: describe what happens in the video. Nothing was sent."
        return True

    async def submit(
        self,
        image: list[Tensor],
        prompt: list[str],
        size: list[str],
        fit: list[str],
        num_frames: list[int],
        steps: list[int],
        cfg: list[float],
        negative_prompt: Any = "",
        add_fps_prefix: Any = True,
        take: Any = 1,
        max_runs: Any = MAX_RUNS,
        unique_id: Any = None,
    ) -> tuple[tuple[WiroRun, ...], str]:
        stop_event = threading.Event()
        widgets = {
            "size": size,
            "fit": fit,
            "num_frames": num_frames,
            "steps": steps,
            "cfg": cfg,
            "negative_prompt": negative_prompt,
            "add_fps_prefix": add_fps_prefix,
            "take": take,
        }

        def work() -> tuple[tuple[WiroRun, ...], str]:
            view = RunView(_listed(unique_id)[0], stop_event)
            sent: list[_SentView] = []
            line = "not started"
            try:
                view.say("preparing the pictures")
                limit = int(_listed(max_runs)[0])
                runs = expand(image, prompt, widgets, max_runs=limit, check=view.check)
                report = _submit(view, runs, stop_event, sent)
                line = report.replace("\n", " · ")
                return runs, report
            except BaseException as error:
                line = _stop_all(sent) if is_stop(error) else str(error)
                raise
            finally:
                for run_view in sent:
                    is_started = run_view.handle is not None
                    run_view.close("Wiro Collect follows it" if is_started else line)
                view.close(line)

        return await host.run_in_thread(work, stop_event)


class WiroCollect:
    CATEGORY = "SkyReels/remote"
    SEARCH_ALIASES = ["wiro.ai", "batch", "wait for videos"]
    DESCRIPTION = (
        "Follows the runs of Wiro Submit, starts the waiting ones as slots become free, and "
        "outputs the results in the order of the images. A failed run is left out of the lists "
        "and named in the report. Cancel stops all running tasks."
    )
    FUNCTION = "collect"
    RETURN_TYPES = ("VIDEO", "IMAGE", "STRING", "STRING", "STRING")
    RETURN_NAMES = ("video", "images", "task_id", "receipt", "report")
    OUTPUT_IS_LIST = (True, True, True, True, False)
    OUTPUT_TOOLTIPS = (
        "List: the video files from Wiro; SaveVideo copies them.",
        "List: the frames of each video. Decoded only if connected, one clip after the other.",
        "List: the tasks' ids at Wiro.",
        "List: JSON for each run, as from Wiro Remote I2V.",
        "Number of finished runs, their total cost, and one line for each failed run.",
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        kind, options = TIMEOUT_MINUTES
        return {
            "required": {
                "runs": ("SKYREELS_WIRO_RUNS", {"tooltip": "From Wiro Submit."}),
            },
            "optional": {
                "timeout_minutes": (
                    kind,
                    {
                        **options,
                        "tooltip": "Maximum wait for each run once it is started, in minutes (40 "
                        "is Wiro's own limit). After it the task keeps running at Wiro; queue "
                        "again to keep waiting.",
                    },
                ),
            },
            "hidden": {"unique_id": "UNIQUE_ID", "graph": "PROMPT"},
        }

    @classmethod
    def IS_CHANGED(cls, unique_id: str | None = None, **_: Any) -> str:
        return fingerprint(unique_id, cls.RETURN_NAMES)

    async def collect(
        self,
        runs: tuple[WiroRun, ...],
        timeout_minutes: float = 40.0,
        unique_id: str | None = None,
        graph: dict[str, Any] | None = None,
    ) -> tuple[Any, ...]:
        stop_event = threading.Event()
        wants = wanted(graph, unique_id, self.RETURN_NAMES)

        def work() -> tuple[list[Result], str, bool]:
            view = RunView(unique_id, stop_event)
            return _collect(view, runs, timeout_minutes, wants, stop_event)

        results, report, has_failed = await host.run_in_thread(work, stop_event)
        for result in results:
            remember(graph, unique_id, result)
        if has_failed:
            remember_failure(graph, unique_id)
        return (
            [video_output(result) for result in results],
            [or_blocked(result.images) for result in results],
            [result.taskid for result in results],
            [result.receipt for result in results],
            report,
        )


# --- what is asked for --------------------------------------------------------------------------


def expand(
    image: Sequence[Tensor],
    prompt: Sequence[str],
    widgets: Mapping[str, Any],
    *,
    max_runs: int = MAX_RUNS,
    check: Callable[[], None],
) -> tuple[WiroRun, ...]:
    """The runs of pictures and prompts, in order.

    Args:
        image: batches [B, H, W, 3] of any sizes.
        prompt: one for all pictures, or one for each.
        widgets: the others of the node: one value, or one for each run.
        max_runs: more are refused.
        check: called before each picture is encoded; may raise to stop.

    Returns:
        The runs, in the order of the pictures.

    Raises:
        ConfigError: the numbers do not match, or there are too many.
    """
    from ...wiro_api.errors import ConfigError
    from ...wiro_api.jobs import Job
    from ...wiro_api.schema import SKYREELS

    pictures = [batch[i : i + 1] for batch in _listed(image) for i in range(len(batch))]
    prompts = _listed(prompt)
    count = max(len(pictures), len(prompts))
    if not pictures or not prompts:
        raise ConfigError(
            f"There are {len(pictures)} pictures and {len(prompts)} prompts: at least one of each "
            "is needed. Nothing was sent."
        )
    if not {len(pictures), len(prompts)} <= {1, count}:
        raise ConfigError(
            f"{len(pictures)} pictures and {len(prompts)} prompts do not go together: give one "
            "prompt for all pictures, one picture for all prompts, or as many of each. Nothing was "
            "sent."
        )
    if count > max_runs:
        raise ConfigError(
            f"That would be {count} runs ({len(pictures)} pictures, {len(prompts)} prompts), and "
            f"max_runs is {max_runs}: raise it if you mean it. Nothing was sent."
        )
    columns = {name: _listed(value) for name, value in widgets.items()}
    for name, values in columns.items():
        if len(values) not in (1, count):
            raise ConfigError(
                f"{name} has {len(values)} values for {count} runs: give one, or one for each. "
                "Nothing was sent."
            )
    word = "picture" if len(pictures) > 1 or len(prompts) == 1 else "prompt"
    runs = []
    for number in range(count):
        check()
        picture, text = _nth(pictures, number), _nth(prompts, number)
        own = {name: _nth(values, number) for name, values in columns.items()}
        fit, take = own.pop("fit"), own.pop("take")
        parameters, size = skyreels_run(picture, prompt=text, **own)
        part = png_part(picture, size, fit)
        label = f"{word} {number + 1}"
        runs.append(WiroRun(Job(SKYREELS, parameters, (("inputImage", part),), take), label))
    return tuple(runs)


def _listed(value: Any) -> list[Any]:
    """A list input as a list, also where the default stands for it."""
    return list(value) if isinstance(value, list | tuple) else [value]


def _nth(values: Sequence[Any], number: int) -> Any:
    return values[number] if len(values) > 1 else values[0]


def _unique(runs: Sequence[WiroRun]) -> dict[str, list[WiroRun]]:
    """Key -> the runs that are one job, in the order of the first of each."""
    jobs: dict[str, list[WiroRun]] = {}
    for run in runs:
        jobs.setdefault(run.key, []).append(run)
    return jobs


def _labels(runs: Sequence[WiroRun]) -> str:
    """Pictures 3, 4 and 7."""
    word, _, first = runs[0].label.partition(" ")
    if len(runs) == 1:
        return f"{word.capitalize()} {first}"
    numbers = [run.label.rpartition(" ")[2] for run in runs]
    return f"{word.capitalize()}s {', '.join(numbers[:-1])} and {numbers[-1]}"


def describe_total(prices: "Sequence[Price | None]", limits: "Limits", spent: "Spent") -> str:
    """What runs will cost together and what may be spent: said before anything is sent."""
    from ...wiro_api.spending import Price, describe_price
    from ...wiro_api.wire import money

    count = f"{len(prices)} run{'' if len(prices) == 1 else 's'}"
    known = [price for price in prices if price is not None]
    if len(known) < len(prices):
        return f"{count}, {describe_price(None, limits)}"
    total = sum((price.amount for price in known), Decimal(0))
    terms = f"{count}, {Price(total, all(price.is_exact for price in known))}, {limits}"
    for period, limit, already in (
        ("day", limits.per_day, spent.day),
        ("month", limits.per_month, spent.month),
    ):
        if limit is None or already + total <= limit:
            continue
        fits, so_far = 0, already
        for price in known:
            so_far += price.amount
            fits += so_far <= limit
        return (
            f"{terms}; that passes the limit of the {period} ({money(already)} of it is spent): "
            f"only {fits} of {len(prices)} will be started"
        )
    return terms


# --- starting -----------------------------------------------------------------------------------


class _Silent(host.RemoteProgress):
    """Of one run of several: bar, line and cancel button are the node's."""

    def __init__(self) -> None:
        pass

    def show(self, fraction: float, line: str) -> None:
        pass

    def say(self, line: str) -> None:
        pass

    def check_interrupt(self) -> None:
        pass


class _SentView(RunView):
    """A run that Wiro Submit sends or has sent: it shows itself in the panel alone."""

    def __init__(self, parent: RunView, stop_event: threading.Event, run: WiroRun) -> None:
        super().__init__(None, stop_event, _Silent())
        self.run = run
        self.parameters: Mapping[str, Any] = run.job.values
        self._parent = parent

    def check(self) -> None:
        self._parent.check()

    def on_busy(self, error: "WiroError", wait_s: float, sleep: Callable[[float], None]) -> None:
        raise NoSlotError


def _is_for_all(error: BaseException) -> bool:
    """Whether it would meet each further run as well: none is tried."""
    from ...wiro_api.errors import AccountError, AuthError, BalanceError

    return isinstance(error, AccountError | AuthError | BalanceError)


def _submit(
    view: RunView, runs: Sequence[WiroRun], stop_event: threading.Event, sent: list[_SentView]
) -> str:
    """Start what the account has slots for.

    Args:
        view: of the node.
        runs: of the batch.
        stop_event: set when the prompt has ended.
        sent: to which each run is added before it is sent, and from which it is taken if it was
            not made.

    Returns:
        The report. If none could be started, the error of the first run is raised.
    """
    from ...wiro_api.jobs import find, quote

    client, journal = view.make_client(), account.journal()
    account.check_socket_url()
    view.check()
    view.say("asking Wiro for the price")
    jobs, model = _unique(runs), runs[0].job.model
    record = model_record(client, model)
    costs = journal.costs(str(model))
    waiting = [
        (same, quote(record, same[0].job, costs))
        for same in jobs.values()
        if find(client, journal, same[0].job) is None
    ]
    lines = [describe_total([q.price for _, q in waiting], load_limits(), journal.spent())]
    if len(jobs) < len(runs):
        lines.append(f"{len(runs) - len(jobs)} the same as another: one run for both")
    if len(waiting) < len(jobs):
        num_before = len(jobs) - len(waiting)
        lines.append(f"{num_before} started before, nothing is paid for them again")
    total = " · ".join(lines)
    logger.info("Wiro: %s.", total)
    failures, num_wait = _start_all(view, client, waiting, stop_event, sent, total)
    if failures and len(failures) == len(jobs):
        raise failures[0][1]
    tasks = [f"{v.run.label}: task {v.handle.taskid}" for v in sent if v.handle is not None]
    lines.append(f"{len(tasks)} started" + (f" ({', '.join(tasks)})" if tasks else ""))
    if num_wait:
        lines.append(f"{num_wait} wait for a slot of the account: Wiro Collect starts them")
    lines += _report_failures(failures)
    view.say("started", 1.0)
    return "\n".join(lines)


def _start_all(
    view: RunView,
    client: "Client",
    waiting: "Sequence[tuple[Sequence[WiroRun], Quote]]",
    stop_event: threading.Event,
    sent: list[_SentView],
    total: str,
) -> tuple[list[tuple[Sequence[WiroRun], Exception]], int]:
    """Start jobs until the account has no slot; returns the failures, and how many wait for one."""
    from ...wiro_api.errors import RunOutcomeUnknownError, WiroError
    from ...wiro_api.jobs import start

    journal = account.journal()
    failures: list[tuple[Sequence[WiroRun], Exception]] = []
    for number, (same, quoted) in enumerate(waiting):
        view.say(f"starting {number + 1} of {len(waiting)} · {total}", number / len(waiting))
        run_view = _SentView(view, stop_event, same[0])
        run_view.parameters = quoted.parameters
        sent.append(run_view)
        try:
            entry = start(
                client,
                journal,
                same[0].job,
                quoted,
                limits=load_limits,
                wait_when_busy=True,
                listener=run_view,
            )
            run_view.on_start(entry)
        except NoSlotError:
            sent.pop().close("waits for a slot")
            return failures, len(waiting) - number
        except WiroError as error:
            if not isinstance(error, RunOutcomeUnknownError):
                sent.pop().close(str(error))
            failures.append((same, error))
            if _is_for_all(error):
                failures += [(rest, error) for rest, _ in waiting[number + 1 :]]
                break
    return failures, 0


def _stop_all(sent: Sequence[_SentView]) -> str:
    """Stop what one call has started, all at once; returns the line for the node."""
    lines = [""] * len(sent)

    def stop(number: int) -> None:
        view = sent[number]
        lines[number] = stop_job(view, view.run.job, view.parameters)

    threads = [_thread(stop, number) for number in range(len(sent))]
    for thread in threads:
        thread.join()
    return " · ".join(lines) or NOTHING_SENT


def _thread(work: Callable[..., None], *arguments: Any) -> threading.Thread:
    """Started, under the caller's context."""
    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(work, *arguments), name="wiro", daemon=True)
    thread.start()
    return thread


def _report_failures(failures: Sequence[tuple[Sequence[WiroRun], Exception]]) -> list[str]:
    """One sentence for each failure, and for several that failed alike; each is logged."""
    alike: dict[str, list[WiroRun]] = {}
    for runs, error in failures:
        text = " ".join(str(error).split()) or type(error).__name__
        alike.setdefault(text, []).extend(runs)
    sentences = [f"{_labels(runs)}: {text}" for text, runs in alike.items()]
    for sentence in sentences:
        logger.error("Wiro: %s", sentence)
    return sentences


# --- collecting ---------------------------------------------------------------------------------


class _Batch:
    """What the runs of one node know of each other: how many hold a slot, which one is starting."""

    def __init__(self, stop_event: threading.Event) -> None:
        self.stop_event = stop_event
        #: set when something has changed
        self.changed = threading.Event()
        #: how many tasks of ours have ended
        self.num_ended = 0
        #: tasks of ours that run at once, as far as Wiro has refused another; None if it has not
        self.max_slots: int | None = None
        self.refused_at = 0.0
        #: the run that is being sent: one at a time
        self.starting: _CollectView | None = None
        self.views: list[_CollectView] = []
        self.lock = threading.Lock()

    @property
    def num_slots(self) -> int:
        """Slots of the account that are ours."""
        return sum(view.has_slot for view in self.views)

    def may_start(self) -> bool:
        """Whether the next run may be sent: alone, and if there may be a slot for it."""
        from ...wiro_api.jobs import LAST_BUSY_S

        if self.starting is not None:
            return False
        is_full = self.max_slots is not None and self.num_slots >= self.max_slots
        # somebody else's task may have ended, too
        return not is_full or time.monotonic() - self.refused_at >= LAST_BUSY_S


class _CollectView(RunView):
    """One run: it shows itself in the panel alone."""

    def __init__(self, batch: _Batch, runs: Sequence[WiroRun]) -> None:
        super().__init__(None, batch.stop_event, _Silent())
        self.runs = runs
        self.result: Result | None = None
        self.error: Exception | None = None
        self.is_over = False
        #: whether its task counts among those of the account
        self.has_slot = False
        self.thread: threading.Thread | None = None
        self._batch = batch
        self._before = (0, 0)

    @property
    def fraction(self) -> float:
        """How far it is."""
        return 1.0 if self.is_over else self.state.fraction or 0.0

    def on_entry(self, entry: "Entry") -> None:
        self._before = (self._batch.num_ended, self._batch.num_slots)
        super().on_entry(entry)

    def on_start(self, entry: "Entry") -> None:
        super().on_start(entry)
        batch = self._batch
        self.has_slot = entry.state != "ended"
        if batch.max_slots is not None:
            batch.max_slots = max(batch.max_slots, batch.num_slots)
        self._end_start()

    def on_task(self, task: "Task") -> None:
        super().on_task(task)
        if task.is_terminal:
            self._release_slot()

    def on_busy(self, error: "WiroError", wait_s: float, sleep: Callable[[float], None]) -> None:
        """Wait until one of ours has ended; if none can, as long as usual.

        What was refused is an upload: it is not repeated to ask.
        """
        from ...wiro_api.errors import ConcurrencyError
        from ...wiro_api.jobs import LAST_BUSY_S

        batch = self._batch
        num_ended, num_slots = self._before
        is_full = isinstance(error, ConcurrencyError)
        is_unchanged = batch.num_ended == num_ended
        if is_full and is_unchanged and num_slots >= (batch.max_slots or 0):
            batch.max_slots = max(1, num_slots)
            wait_s = LAST_BUSY_S if num_slots else wait_s
        batch.refused_at = time.monotonic()
        end = batch.refused_at + wait_s
        while (left := end - time.monotonic()) > 0 and not (
            is_full and batch.num_ended != num_ended
        ):
            self.say(ALL_BUSY, 0.0)
            sleep(min(left, SLICE_S))

    def begin(self, timeout_minutes: float) -> None:
        """Start `work` in a thread of its own."""
        self.thread = _thread(self.work, timeout_minutes)

    def work(self, timeout_minutes: float) -> None:
        """Run it to its files; what comes of it is in `result` or `error`."""
        from ...wiro_api.errors import WiroError, add_task

        run = self.runs[0]
        try:
            # frames are decoded later, one clip at a time
            self.result = run_job(
                self,
                run.job,
                wait_when_busy=True,
                timeout_minutes=timeout_minutes,
                wants=frozenset(),
            )
        except Exception as error:
            self.error = error
            if isinstance(error, WiroError) and self.handle is not None:
                add_task(error, self.handle.taskid)
            elif not isinstance(error, WiroError | StoppedError):
                logger.error("Wiro: %s.", _labels(self.runs), exc_info=error)
        finally:
            self.is_over = True
            self._release_slot()
            self._end_start()

    def _release_slot(self) -> None:
        if self.has_slot:
            self.has_slot = False
            with self._batch.lock:
                self._batch.num_ended += 1
        self._batch.changed.set()

    def _end_start(self) -> None:
        if self._batch.starting is self:
            self._batch.starting = None
        self._batch.changed.set()


def _collect(
    view: RunView,
    runs: Sequence[WiroRun],
    timeout_minutes: float,
    wants: frozenset[str],
    stop_event: threading.Event,
) -> tuple[list[Result], str, bool]:
    """Wait for all runs and download their results.

    Returns:
        The results in the order of `runs`, the report, and whether some failed.

    Raises:
        WiroError: of the first run, if all failed.
    """
    line = "not started"
    batch = _Batch(stop_event)
    try:
        _follow_all(view, batch, runs, timeout_minutes)
        failures = [
            (run_view.runs, run_view.error)
            for run_view in batch.views
            if run_view.error is not None
        ]
        sentences = _report_failures(failures)
        if len(failures) == len(batch.views) and failures:
            raise failures[0][1]
        results: dict[str, Result] = {}
        for run_view in batch.views:
            if run_view.result is not None:
                if "images" in wants:
                    view.say(f"decoding {run_view.runs[0].label}")
                    run_view.result = with_images(run_view.result, view)
                if run_view.result.warning:
                    sentences.append(f"{_labels(run_view.runs)}: {run_view.result.warning}")
                results[run_view.runs[0].key] = run_view.result
        head = _sum_of(batch.views)
        line = " · ".join([head, *sentences])
        view.say(head, 1.0)
        in_order = [results[run.key] for run in runs if run.key in results]
        return in_order, "\n".join([head, *sentences]), bool(failures)
    except BaseException as error:
        line = _line_of_stop(batch) if is_stop(error) else str(error)
        raise
    finally:
        view.close(line)


def _resume_sent(view: RunView, batch: _Batch, timeout_minutes: float) -> list[_CollectView]:
    """Go on with the runs that were sent before; returns the others."""
    from ...wiro_api.jobs import find

    client, journal = view.make_client(), account.journal()
    waiting = []
    for run_view in batch.views:
        entry = find(client, journal, run_view.runs[0].job)
        if entry is None:
            waiting.append(run_view)
            continue
        run_view.on_entry(entry)  # Cancel stops it from here on, whatever its thread does
        if entry.state == "started":
            run_view.on_start(entry)
        run_view.begin(timeout_minutes)
    return waiting


def _follow_all(
    view: RunView, batch: _Batch, runs: Sequence[WiroRun], timeout_minutes: float
) -> None:
    """Wait until all have ended; with Cancel, until all are stopped."""
    from ...wiro_api.errors import ConfigError

    if not runs:
        raise ConfigError("There are no runs: connect Wiro Submit.")

    batch.views = [_CollectView(batch, same) for same in _unique(runs).values()]
    best = 0.0
    try:
        waiting = _resume_sent(view, batch, timeout_minutes)
        while not all(run_view.is_over for run_view in batch.views):
            view.check()
            failed = next((s.error for s in batch.views if s.error and _is_for_all(s.error)), None)
            if failed is not None:
                for run_view in waiting:
                    run_view.error, run_view.is_over = failed, True
                waiting = []
            if waiting and batch.may_start():
                batch.starting = waiting.pop(0)
                batch.starting.begin(timeout_minutes)
            best = max(best, sum(run_view.fraction for run_view in batch.views) / len(batch.views))
            view.say(_line_of(batch.views), best)
            batch.changed.wait(SLICE_S)
            batch.changed.clear()
        view.check()
    except BaseException:
        batch.stop_event.set()
        raise
    finally:
        for run_view in batch.views:
            if run_view.thread is not None:
                run_view.thread.join()


def _line_of(views: Sequence[_CollectView]) -> str:
    """How they stand: "5 of 12 done · 3 running · 3 waiting · 1 failed"."""
    done = sum(run_view.result is not None for run_view in views)
    failed = sum(run_view.error is not None for run_view in views)
    running = sum(not run_view.is_over and run_view.handle is not None for run_view in views)
    waiting = len(views) - done - failed - running
    parts = [f"{done} of {len(views)} done"]
    counts = ((running, "running"), (waiting, "waiting"), (failed, "failed"))
    return " · ".join(parts + [f"{count} {word}" for count, word in counts if count])


def _line_of_stop(batch: _Batch) -> str:
    """What came of those that were sent and had not ended."""
    lines = [run_view.state.line for run_view in batch.views if run_view.row and run_view.error]
    sent = [line for line in lines if line != NOTHING_SENT]
    return " · ".join(sent) or NOTHING_SENT


def _sum_of(views: Sequence[_CollectView]) -> str:
    """Of the end: how many, and what they did cost together."""
    from ...wiro_api.wire import decimal_of, money

    costs = [
        decimal_of(json.loads(run_view.result.receipt)["cost_usd"])
        for run_view in views
        if run_view.result is not None
    ]
    known = [cost for cost in costs if cost is not None]
    cost = f"{money(sum(known, Decimal(0)))} in all" if known else "cost unknown"
    if known and len(known) < len(costs):
        cost += f", {len(costs) - len(known)} unknown"
    return f"{_line_of(views)} · {cost}"
