"""What earlier runs on this device taught, in one small file of the user's folder.

    {"devices": {DEVICE: {GROUP: {NAME: VALUE}}}}

DEVICE names the device, its memory, its driver and torch, so that nothing is taken from another one
or from before an update. The file is a convenience: one that cannot be read counts as empty, one
that cannot be written costs a warning, and deleting it only makes runs learn again.
"""

import json
import logging
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger("skyreels.runtime.outcomes")

FILE_NAME = "plan.json"
#: a larger file is not ours
MAX_BYTES = 1_000_000
#: entries of a group, and devices, that are kept; the oldest are dropped
MAX_ENTRIES, MAX_DEVICES = 64, 8
#: with this much more free memory than a rung was left with, the rung above is tried again
MORE_FREE = 1.02

#: of one measured run in the next correction, so that a single odd one weighs half
CORRECTION_WEIGHT = 0.5
#: a correction beyond these is no property of the device: it was shared, suspended or swapping
CORRECTION_LIMITS = (0.25, 8.0)

#: problems that were told
_told: set[str] = set()


def user_folder() -> Path | None:
    """Our folder in the user's program state, for hosts that have none of their own.

    Returns:
        The folder, which may not exist yet; None for a user without a home.
    """
    name = "LOCALAPPDATA" if sys.platform == "win32" else "XDG_STATE_HOME"
    root = Path(os.environ.get(name, ""))
    if not root.is_absolute():  # "" too
        try:
            home = Path.home()
        except RuntimeError:
            return None
        root = home / ("AppData/Local" if sys.platform == "win32" else ".local/state")
    return root / "skyreels-wiro"


def device_key(device: torch.device) -> str:
    """What must be the same for an outcome to count: device, memory, driver, torch.

    Args:
        device: of the runs.

    Returns:
        One line.
    """
    if device.type != "cuda":
        return f"{device.type}, {platform.machine()}, {os.cpu_count()} cores, {torch.__version__}"
    properties = torch.cuda.get_device_properties(device)
    driver = getattr(torch._C, "_cuda_getDriverVersion", lambda: 0)()
    return (
        f"{properties.name}, {properties.total_memory} bytes, driver {driver}, torch "
        f"{torch.__version__}"
    )


def recall(folder: Path | None, device: str, group: str) -> dict[str, Any]:
    """What is known of a device.

    Args:
        folder: of the file; None remembers nothing.
        device: from `device_key`.
        group: "rungs", "rates" or "corrections".

    Returns:
        Name -> value, the oldest first; empty if nothing is known.
    """
    group_: Any = _devices(folder).get(device, {}).get(group, {})
    return group_ if isinstance(group_, dict) else {}


def remember(folder: Path | None, device: str, group: str, values: dict[str, Any]) -> None:
    """Add to what is known of a device; values that are None are forgotten.

    Args:
        folder: of the file, made if needed; None remembers nothing.
        device: from `device_key`.
        group: "rungs", "rates" or "corrections".
        values: name -> value for JSON.
    """
    if folder is None or not values:
        return
    devices = _devices(folder)
    known = devices.pop(device, {})
    entries = known.get(group, {}) if isinstance(known.get(group), dict) else {}
    for name, value in values.items():
        entries.pop(name, None)
        if value is not None:
            entries[name] = value
    known[group] = dict(list(entries.items())[-MAX_ENTRIES:])
    devices[device] = known  # at the end: the newest
    kept = dict(list(devices.items())[-MAX_DEVICES:])
    path = folder / FILE_NAME
    part = path.with_name(f"{FILE_NAME}.{os.getpid()}.part")  # other processes write theirs
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps({"devices": kept}, indent=1), encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        _tell(f"{path} cannot be written ({error.strerror}): plans are not remembered.")
        with suppress(OSError):
            part.unlink(missing_ok=True)


def corrections(folder: Path | None, device: str) -> dict[str, float]:
    """How far predictions were off on a device: kind of work -> measured over predicted.

    Args:
        folder: of the file; None remembers nothing.
        device: from `device_key`.

    Returns:
        Those that `learn` could have left there.
    """
    low, high = CORRECTION_LIMITS
    return {
        kind: float(factor)
        for kind, factor in recall(folder, device, "corrections").items()
        if isinstance(factor, int | float) and low <= factor <= high
    }


def known_rates(folder: Path | None, device: str) -> dict[str, float]:
    """What a device reaches, as transformer/rates.py measured it: name -> FLOP/s or bytes/s.

    Args:
        folder: of the file; None remembers nothing.
        device: from `device_key`.

    Returns:
        Those that are numbers.
    """
    return {
        name: float(rate)
        for name, rate in recall(folder, device, "rates").items()
        if isinstance(rate, int | float) and 0 < rate < float("inf")
    }


def learn(folder: Path | None, device: str, kind: str, ratio: float) -> None:
    """Remember how far a prediction was off, to correct the next.

    Args:
        folder: of the file; None remembers nothing.
        device: from `device_key`.
        kind: of work; what is corrected together.
        ratio: measured over predicted, the prediction without a correction.
    """
    old = corrections(folder, device).get(kind, ratio)
    factor = old + CORRECTION_WEIGHT * (ratio - old)
    low, high = CORRECTION_LIMITS
    if low <= factor <= high:
        remember(folder, device, "corrections", {kind: round(factor, 4)})


@dataclass(frozen=True)
class Expected:
    """What work is expected to take.

    Attributes:
        kind: of work; what is corrected together.
        seconds: None if unknown.
        peak_bytes: on the device, beside what others hold.
        corrections: from `corrections`, with which these were corrected.
    """

    kind: str
    seconds: float | None
    peak_bytes: int
    corrections: Mapping[str, float]

    def account(self, what: str, seconds: float, peak: int | None) -> str:
        """What happened beside what was expected, as one line.

        Args:
            what: was done, as "Sampled 30 steps of"; a time follows.
            seconds: that it took.
            peak: most bytes on the device, beside what others hold; None if unknown.

        Returns:
            For people.
        """
        line = f"{what} {in_seconds(seconds)}"
        if self.seconds is not None:
            line += f" (expected {in_seconds(self.seconds)})"
        if peak is not None:
            line += f"; peak {in_bytes(peak)} (expected {in_bytes(self.peak_bytes)})"
        return line + "."

    def learn(
        self, folder: Path | None, device: str, *, seconds: float | None, peak: int | None
    ) -> None:
        """Remember how far this was off, to correct the next prediction of its kind.

        Args:
            folder: of the file; None remembers nothing.
            device: from `device_key`.
            seconds: that it took; None if they teach nothing.
            peak: as for `account`.
        """
        measured = {
            self.kind: (seconds, self.seconds),
            peak_kind(self.kind): (peak, self.peak_bytes),
        }
        for kind, (value, expected) in measured.items():
            if value is not None and expected:
                learn(folder, device, kind, value / expected * self.corrections.get(kind, 1.0))


def expect(
    kind: str, seconds: float | None, peak_bytes: int, corrections: Mapping[str, float]
) -> Expected:
    """Correct a prediction by what earlier runs taught.

    Args:
        kind: of work; what is corrected together.
        seconds: predicted; None if unknown.
        peak_bytes: predicted, beside what others hold.
        corrections: from `corrections`.

    Returns:
        The corrected one.
    """
    if seconds is not None:
        seconds *= corrections.get(kind, 1.0)
    peak_bytes = int(peak_bytes * corrections.get(peak_kind(kind), 1.0))
    return Expected(kind, seconds, peak_bytes, corrections)


def peak_kind(kind: str) -> str:
    """Under which the peak of a kind of work is corrected."""
    return f"{kind}, peak"


def watch_peak(device: torch.device, own_bytes: int = 0) -> Callable[[], int | None]:
    """Count the most bytes on a device from now on.

    Args:
        device: whose memory is counted, by torch.
        own_bytes: of what is there now, those that belong to the work; the others are not counted.

    Returns:
        A function that gives the count so far; None on a device that does not count.
    """
    if device.type != "cuda":
        return lambda: None
    torch.cuda.reset_peak_memory_stats(device)
    others = torch.cuda.memory_allocated(device) - own_bytes
    return lambda: torch.cuda.max_memory_allocated(device) - others


def in_bytes(num_bytes: int) -> str:
    """A size for people, in GB or MB."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.0f} MB"


def in_seconds(value: float) -> str:
    """A time for people, in seconds, minutes or hours."""
    if value >= 7200:
        return f"{value / 3600:.1f} h"
    if value >= 100:
        return f"{value / 60:.1f} min"
    return f"{value:.1f} s" if value >= 1 else f"{value:.2g} s"


def first_rung(
    folder: Path | None, device: str, work: str, rungs: Sequence[str], free_bytes: int
) -> int:
    """Where to begin on a ladder: on the rung on which such work ended, with no more memory free.

    With more, what ran out then, perhaps to another program, may be there now.

    Args:
        folder: of the file; None remembers nothing.
        device: from `device_key`.
        work: what is done and at which size.
        rungs: names of the ladder's rungs, from the top.
        free_bytes: of the device now.

    Returns:
        An index into `rungs`.
    """
    known = recall(folder, device, "rungs").get(work)
    try:
        name, free_then = known["rung"], float(known["free_bytes"])  # type: ignore[index]
    except (KeyError, TypeError, ValueError):
        return 0
    return rungs.index(name) if name in rungs and free_bytes <= MORE_FREE * free_then else 0


def remember_rung(folder: Path | None, device: str, work: str, rung: str, free_bytes: int) -> None:
    """Remember where work of a size ended, and how much memory was free there.

    Args:
        folder: of the file; None remembers nothing.
        device: from `device_key`.
        work: what was done and at which size.
        rung: its name.
        free_bytes: of the device when all that the work had held was free again.
    """
    remember(folder, device, "rungs", {work: {"rung": rung, "free_bytes": free_bytes}})


def _devices(folder: Path | None) -> dict[str, dict[str, Any]]:
    """Device -> group -> name -> value; empty if there is no usable file."""
    if folder is None:
        return {}
    path = folder / FILE_NAME
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_BYTES + 1)
        devices = json.loads(text)["devices"] if len(text) <= MAX_BYTES else None
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        devices = None
    if not isinstance(devices, dict):
        _tell(f"{path} cannot be read: it is ignored, and replaced after the next run.")
        return {}
    return {name: known for name, known in devices.items() if isinstance(known, dict)}


def _tell(problem: str) -> None:
    if problem not in _told:
        _told.add(problem)
        logger.warning(problem)
