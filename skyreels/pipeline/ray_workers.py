"""The workers of a batch on a Ray cluster; Ray is imported here alone, and inside functions.

The process that runs the command keeps the list of jobs and writes the files; a worker gets the
next job, with the bytes of its pictures, when it is free, and returns the bytes of the clip. So no
folder need be shared. A job whose worker was lost is tried again by another one.
"""

import importlib.util
import math
import os
import platform
import re
import socket
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..config import VERSION
from ..errors import DependencyError, OptionError, SkyReelsError, shown
from .batch import Ended, Task, python_path, read_files, write_whole
from .driver import Lost, Member, drive

#: seconds without any worker until that is said
PATIENCE_S = 60.0
#: seconds in which a cluster answers
CONNECT_S = 15.0
#: of memory that jobs and clips on their way take on this machine, with `local`
LOCAL_STORE_BYTES = 256 * 1024**2


@dataclass(frozen=True)
class Crew:
    """Which workers are wanted.

    Attributes:
        address: of the cluster; "local" starts one on this machine.
        count: of workers; None for as many as there are GPUs, or machines without any.
        device: auto, cpu or cuda.
        prepare: arguments of the batch -> what makes a clip of arguments. Workers import it.
        look: arguments of the batch -> hashes of the weights, or SkyReelsError.
    """

    address: str
    count: int | None
    device: str
    prepare: Callable[[Namespace], Callable[[Namespace], None]]
    look: Callable[[Namespace], dict[str, str]]


class Worker:
    """What runs in a worker's process.

    Args:
        arguments: of the batch.
        prepare: see `Crew`.
        look: see `Crew`.
    """

    def __init__(self, arguments: Namespace, prepare: Any, look: Any) -> None:
        self._arguments, self._prepare, self._look = arguments, prepare, look
        self._make: Callable[[Namespace], None] | None = None

    def look(self) -> dict[str, Any]:
        """Who this is, and what it has."""
        import torch

        told: dict[str, Any] = {
            "name": f"{socket.gethostname()}:{os.getpid()}",
            "package": VERSION,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "weights": {},
            "error": "",
        }
        try:
            told["weights"] = self._look(self._arguments)
        except SkyReelsError as error:
            told["error"] = str(error)
        return told

    def make(self, arguments: Namespace, files: Mapping[str, tuple[str, bytes]]) -> dict[str, Any]:
        """Make a clip.

        Args:
            arguments: of `generate`.
            files: name of an argument that is a path -> name and bytes of the file.

        Returns:
            "clip" (bytes), "error" (a sentence, or ""), "seconds".
        """
        start = time.perf_counter()
        clip, sentence = b"", ""
        try:
            if self._make is None:
                self._make = self._prepare(self._arguments)
            with tempfile.TemporaryDirectory(prefix="skyreels-") as name:
                folder = Path(name)
                arguments.out = folder / "clip.mp4"
                for argument, (file, content) in files.items():
                    place = folder / argument / file
                    place.parent.mkdir()
                    place.write_bytes(content)
                    setattr(arguments, argument, place)
                self._make(arguments)
                clip = arguments.out.read_bytes()
        except SkyReelsError as error:
            sentence = str(error)
        return {"clip": clip, "error": sentence, "seconds": time.perf_counter() - start}


def work_on_ray(
    tasks: Sequence[Task],
    arguments: Namespace,
    crew: Crew,
    weights: Mapping[str, str],
    tell: Callable[[str], None],
    check: Callable[[], None],
) -> Iterator[Ended]:
    """Make tasks on a cluster, each by the next worker that is free.

    Args:
        tasks: in their order.
        arguments: of the batch; clips are written to the folder `arguments.out`.
        crew: who makes them.
        weights: part -> hash, as on this machine.
        tell: takes a line for people.
        check: may interrupt.

    Yields:
        Each as it ends.

    Raises:
        DependencyError: Ray is not installed.
        OptionError: no cluster, or no worker that can make a clip.
        OSError: a clip cannot be written.
    """
    check_crew(crew)
    if not tasks:
        return
    from ray.exceptions import RayError

    with _connected(crew):
        try:
            start, count = _starter(crew, arguments)
            yield from drive(
                tasks,
                _RayWorkers(start, tell),
                count,
                admit=partial(is_fit, weights=weights, tell=tell),
                save=lambda task, clip: write_whole(task.place(arguments.out), clip),
                tell=tell,
                check=check,
            )
        except RayError as error:
            raise OptionError(
                f"Ray has failed ({shown(_last_line(error), 300)}): see `ray status`; the same "
                "command makes what is left."
            ) from None


class _RayWorkers:
    """The `Workers` of a batch, each an actor of Ray.

    Args:
        start: starts one.
        tell: takes a line for people.
    """

    def __init__(self, start: Callable[[], Any], tell: Callable[[str], None]) -> None:
        self._start, self._tell = start, tell
        #: what is awaited -> who answers
        self._waiting: dict[Any, Member] = {}
        #: when to say that no worker has started; infinity once one has, or it was said
        self._say_at = time.monotonic() + PATIENCE_S

    def start(self) -> Member:
        member = Member(self._start())
        self._waiting[member.handle.look.remote()] = member
        return member

    def send(self, member: Member, task: Task) -> None:
        files = {
            name: (getattr(task.arguments, name).name, content)
            for name, content in read_files(task).items()
        }
        ref = member.handle.make.remote(_without_run(task.arguments), files)
        self._waiting[ref] = member

    def hear(self) -> Iterator[tuple[Member, Mapping[str, Any] | Lost]]:
        import ray
        from ray.exceptions import RayActorError

        ready, _ = ray.wait(list(self._waiting), timeout=1.0)
        if ready:
            self._say_at = math.inf
        elif time.monotonic() > self._say_at:
            self._say_at = math.inf
            self._tell("No worker has started yet: `ray status` shows what the cluster lacks.")
        for ref in ready:
            member = self._waiting.pop(ref)
            try:
                answer: Mapping[str, Any] | Lost = ray.get(ref)
            except RayActorError as error:
                answer = Lost(shown(_last_line(error), 300))
            yield member, answer


def is_fit(
    found: Mapping[str, Any], weights: Mapping[str, str], tell: Callable[[str], None]
) -> bool:
    """Whether a worker that has started can be used; what differs is said.

    Args:
        found: what it has, see `Worker.look`.
        weights: part -> hash, as on this machine.
        tell: takes a line for people.

    Returns:
        Whether its clips would be those of this machine.
    """
    import torch

    name = found["name"]
    others = [part for part, digest in weights.items() if found["weights"].get(part) != digest]
    refusal = ""
    if found["package"] != VERSION:
        refusal = (
            f"has version {found['package']} of this package, and {VERSION} runs here: it is not "
            "used; install the same."
        )
    elif found["error"]:
        refusal = (
            f"lacks the weights ({found['error']}): it is not used; copy them to the same place "
            "there."
        )
    elif others:
        refusal = (
            f"has another {' and '.join(others)} than this machine: it is not used; copy the files "
            "from here to the same place there."
        )
    if refusal:
        tell(f"{name} {refusal}")
        return False
    for part, version in {"python": platform.python_version(), "torch": torch.__version__}.items():
        if found[part] != version:
            tell(
                f"{name} has {part} {found[part]}, and {version} is here: its clips may differ in "
                "their last bits; install the same."
            )
    return True


def check_crew(crew: Crew) -> None:
    """Refuse what no cluster can give.

    Raises:
        OptionError: a device that is one GPU of a machine.
        DependencyError: Ray is not installed.
    """
    if crew.device not in ("auto", "cpu", "cuda"):
        raise OptionError(
            f"--device {crew.device} names a GPU, and with --ray each worker has its own: use auto."
        )
    if importlib.util.find_spec("ray") is None:
        raise DependencyError(
            'Ray is not installed: pip install "skyreels-wiro[ray]", or leave out --ray.'
        )


@contextmanager
def _connected(crew: Crew) -> Iterator[None]:
    """A connection to the cluster, or one that is started here."""
    # what it warns of on a machine without GPUs, and what it would send to its makers
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "CRITICAL"}
    if crew.address == "local":
        options |= {
            "num_cpus": max(os.cpu_count() or 1, crew.count or 1),
            "include_dashboard": False,
            "object_store_memory": LOCAL_STORE_BYTES,
            # workers import this package from where this process has it
            "runtime_env": {"env_vars": {"PYTHONPATH": python_path()}},
        }
    try:
        _check_address(crew.address)
        ray.init(crew.address, **options)
    except Exception as error:  # noqa: BLE001 - of many kinds; all say that there is no cluster
        raise OptionError(
            f"There is no Ray cluster to use at {shown(crew.address)} "
            f"({shown(_last_line(error), 300)}): give the address that `ray start --head` shows, "
            "with the same versions of Ray and Python, or local."
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Raise OSError where nothing answers: Ray itself would wait for it for minutes."""
    found = re.fullmatch(r"(?:ray://)?\[?([^/]+?)\]?:(\d{1,5})", address)
    if found:
        socket.create_connection((found[1], int(found[2])), CONNECT_S).close()
    elif address not in ("auto", "local"):
        raise ValueError("neither HOST:PORT nor auto nor local")


def _starter(crew: Crew, arguments: Namespace) -> tuple[Callable[[], Any], int]:
    """What starts a worker, and how many are wanted."""
    import ray

    found = ray.nodes()  # type: ignore[no-untyped-call,unused-ignore]
    nodes = [node["Resources"] for node in found if node["Alive"]]
    gpus = int(sum(node.get("GPU", 0) for node in nodes)) if crew.device != "cpu" else 0
    if crew.device == "cuda" and not gpus:
        raise OptionError("The Ray cluster has no GPU: add one, or use --device cpu.")
    count = crew.count or gpus or len(nodes)
    if gpus:
        count = min(count, gpus)
    # the threads that a worker computes with
    per_node = -(-count // len(nodes))
    cpus = min(
        max(1, int(node.get("CPU", 1)) // int(node.get("GPU", 0) if gpus else per_node))
        for node in nodes
        if not gpus or node.get("GPU", 0)
    )
    kind = ray.remote(
        num_cpus=cpus, num_gpus=1 if gpus else 0, max_restarts=0, scheduling_strategy="SPREAD"
    )(Worker)
    given = _without_run(arguments)
    return lambda: kind.remote(given, crew.prepare, crew.look), count


def _without_run(arguments: Namespace) -> Namespace:
    """Without the command's own function, which may not be found where the arguments go."""
    return Namespace(**{k: v for k, v in vars(arguments).items() if k != "run"})


def _last_line(error: Exception) -> str:
    return next(reversed(str(error).strip().splitlines()), type(error).__name__)
