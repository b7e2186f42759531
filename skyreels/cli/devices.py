"""The devices that a command computes on."""

import argparse
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import OptionError
from ..runtime.ranks import is_rank, join_ranks

if TYPE_CHECKING:
    from ..runtime import TorchRuntime


def pick_device(name: str) -> str:
    """The device for "auto", or the named one if it exists.

    Args:
        name: auto, cpu, cuda or cuda:N.

    Returns:
        Its name for torch.

    Raises:
        OptionError: unknown device, or CUDA where there is none.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", name):
        raise OptionError(
            f"Device {name!r} is not one of auto, cpu, cuda, cuda:N: use cpu, or the nodes in "
            "ComfyUI, which also run on devices that it supports."
        )
    kind, _, index = name.partition(":")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise OptionError(
            f"Device {name!r} not found (CUDA devices: {torch.cuda.device_count()}): use cpu, or "
            "see `python -m skyreels doctor`."
        )
    return name


def runtime_of(
    arguments: argparse.Namespace, report: Any, check: Callable[[], None]
) -> "TorchRuntime":
    """Where a clip is made, on one device or two."""
    from ..runtime import TorchRuntime
    from ..runtime.outcomes import user_folder

    (device, second), folder = pick_devices(arguments.device), user_folder()
    partner = ranks = None
    if is_rank():
        device, ranks = join_ranks(device, by_branch=makes_groups(arguments))
    if second is not None:
        partner = TorchRuntime(second, on_check=check, state_folder=folder)
    return TorchRuntime(
        device,
        on_progress=report,
        on_check=check,
        state_folder=folder,
        partner=partner,
        ranks=ranks,
    )


def makes_groups(arguments: argparse.Namespace) -> bool:
    """Whether ranks form two groups, one for each branch of guidance.

    Args:
        arguments: of `generate`, completed from the preset.

    Returns:
        True with an even number and guidance: a group exchanges nothing with the other one within
        a prediction. The first-block cache decides there, which two groups cannot wait for.
    """
    return bool(arguments.ranks % 2 == 0 and arguments.cfg > 1 and arguments.cache != "first-block")


def pick_devices(names: str) -> tuple[str, str | None]:
    """The device of a run, and a second one where two are named.

    Args:
        names: as for `pick_device`; or two with a comma between them.

    Returns:
        Their names for torch.

    Raises:
        OptionError: as for `pick_device`; more than two, or one of them twice.
    """
    listed = [name.strip() for name in names.split(",")]
    if len(listed) > 2:
        raise OptionError(
            f"{len(listed)} devices are named ({names!r}): use one or two, as a step has two "
            "predictions."
        )
    picked = [pick_device(name) for name in listed]
    if len({"cuda:0" if name == "cuda" else name for name in picked}) < len(picked):
        raise OptionError(f"Device {picked[0]} is named twice in {names!r}: name two, or one.")
    return picked[0], picked[1] if len(picked) > 1 else None
