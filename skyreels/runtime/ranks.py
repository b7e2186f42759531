"""The ranks of one clip on one host: processes that torch starts, one a device."""

import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import torch
from torch import nn

from ..errors import DependencyError, OptionError, SkyReelsError
from .collectives import MAX_RANKS, Ranks, one_group, told_by_first, two_groups
from .shared_weights import attach, share

logger = logging.getLogger("skyreels.runtime.ranks")

#: tells a process that it is one of the ranks
_VARIABLE = "SKYREELS_RANKS"
#: seconds in which the launcher ends a rank after another one has failed
PATIENCE_S = 10.0

ModulesT = TypeVar("ModulesT", bound=tuple[nn.Module, ...])


def is_rank() -> bool:
    """Whether this process was started by `start_ranks`."""
    return _VARIABLE in os.environ


def is_first() -> bool:
    """Whether this process is the one that writes: the first of the ranks, or the only process."""
    return not is_rank() or os.environ.get("RANK") == "0"


def check_devices(num_ranks: int, device: str) -> None:
    """Refuse a number of ranks for which there are not the devices.

    Args:
        num_ranks: 2..MAX_RANKS.
        device: "cuda" for one card a rank, or "cpu".

    Raises:
        OptionError: another number, another device, or too few cards.
        DependencyError: this torch knows no ranks.
    """
    if not 2 <= num_ranks <= MAX_RANKS:
        raise OptionError(
            f"--ranks {num_ranks} is not within 2..{MAX_RANKS}: use the cards you have."
        )
    if device not in ("cuda", "cpu"):
        raise OptionError(
            f"--ranks takes the first cards in turn, not {device!r}: use --device cuda, and "
            "CUDA_VISIBLE_DEVICES to choose among them."
        )
    if device == "cuda" and torch.cuda.device_count() < num_ranks:
        raise OptionError(
            f"--ranks {num_ranks} needs as many CUDA devices, and there are "
            f"{torch.cuda.device_count()}: use no more ranks than cards."
        )
    if not torch.distributed.is_available():
        raise DependencyError("This torch is built without torch.distributed: use one device.")


def start_ranks(num_ranks: int, command: Sequence[str]) -> int:
    """Run a command on several ranks, of which only the first one is heard.

    Args:
        num_ranks: processes.
        command: arguments of `python`, such as -m and a module.

    Returns:
        The exit code: 0 if all ranks ended well, else that of the first one that did not.

    Raises:
        SkyReelsError: what another rank than the first said when it failed, or what ended a rank.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]
    from torch.distributed.elastic.multiprocessing import (
        DefaultLogsSpecs,
        SignalException,
        start_processes,
    )

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # the ranks say it
    # where the ranks find one another; the system chooses its port
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    threads = str(max(1, (os.cpu_count() or 1) // num_ranks))
    common = {
        _VARIABLE: str(num_ranks),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": store.host,
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads),
    }
    ranks = range(num_ranks)
    with tempfile.TemporaryDirectory(prefix="skyreels-ranks-") as folder:
        started = start_processes(
            "ranks",
            sys.executable,
            dict.fromkeys(ranks, ("-u", *command)),
            {rank: {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in ranks},
            DefaultLogsSpecs(folder, local_ranks_filter={0}),
        )
        try:
            ended = started.wait(period=0.05)
        except SignalException as signal:
            started.close(signal.sigval)
            return 128 + int(signal.sigval)
        finally:
            started.close()
    assert ended is not None  # it waits for ever
    if not ended.is_failed():
        return 0
    failure = min(ended.failures.values(), key=lambda each: each.timestamp)
    rank, who = failure.local_rank, f"Rank {failure.local_rank + 1} of {num_ranks}"
    told = failure.error_file_data.get("message")
    if isinstance(told, dict):
        if rank:
            raise SkyReelsError(f"{who}: {told['message']}")
        return max(1, failure.exitcode)  # the first one has said it
    if failure.exitcode < 0:
        raise SkyReelsError(
            f"{who} was ended by signal {-failure.exitcode}: if memory had run out, use fewer "
            "ranks, a smaller size or fewer frames."
        )
    return failure.exitcode


def join_ranks(device: str, *, by_branch: bool = False) -> tuple[str, Ranks]:
    """Join the other ranks, in a process that `start_ranks` started.

    Args:
        device: "cuda" or "cpu".
        by_branch: in two groups, one for each branch of guidance.

    Returns:
        The device of this rank, and who the ranks are.
    """
    import torch.distributed as dist

    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    # what only main memory holds goes through it, by gloo
    dist.init_process_group("gloo" if device == "cpu" else "cpu:gloo,cuda:nccl")
    return device, two_groups() if by_branch else one_group()


def load_once(load: Callable[[], ModulesT], ranks: Ranks | None) -> ModulesT:
    """Load modules on one rank, whose weights in main memory become those of all ranks.

    Nobody may write to the weights afterwards: what changes them, such as a LoRA, is for `load`.

    Args:
        load: makes the modules, with weights on the CPU; called on the first rank, and on others
            only if they cannot map its memory. The first one says so, and why.
        ranks: of this host; None calls `load`.

    Returns:
        The modules.
    """
    import torch.distributed as dist

    if ranks is None:
        return load()
    modules, shared, problem = None, None, ""
    if ranks.is_first:
        modules = load()
        try:
            shared = share(modules)
        except OSError as error:
            problem = str(error)
    shared = told_by_first(shared, torch.device("cpu"), ranks.all)
    if modules is None and shared is not None:
        try:
            modules = cast(ModulesT, attach(shared))
        except OSError as error:
            problem = str(error)
    problems = [problem] * ranks.all.size()
    dist.all_gather_object(problems, problem, group=ranks.all)
    if ranks.is_first and any(problems):
        logger.warning(
            "Main memory cannot be shared by all ranks (%s): those that cannot load the weights "
            "for themselves, and they take as much of it again.",
            next(filter(None, problems)),
        )
    return load() if modules is None else modules


def tell_launcher(message: str) -> None:
    """Leave for `start_ranks` what a rank fails of, and when: others fail because it is gone."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        return
    told = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"message": told}, file)


def wait_for_others() -> None:
    """Let the launcher end this rank if it misses one that has failed; that one says why.

    The first one waits longest: after it, nobody else is heard.
    """
    if is_rank():
        time.sleep(PATIENCE_S if is_first() else PATIENCE_S / 4)


def leave_ranks() -> None:
    """Leave the group, once all is done."""
    import torch.distributed as dist

    if is_rank() and dist.is_initialized():
        dist.destroy_process_group()
