"""The threshold of `EasyCache` for one file of weights: found on exact runs, stored, found again.

    {"format": 1, "weights": {"name", "fingerprint"}, "threshold": T, "settings": {"steps", ...},
     "clips": N, "passes_of": P, "replayed": SCORE, "measured": SCORE or null,
     "thresholds": [{"threshold", "passes", "median_db", "worst_db"}, ...], "versions": {...}}

SCORE is {"clips", "passes", "median_db", "worst_db"}: "replayed" is what replay.py expects on the
recorded runs, "measured" what real runs with the cache gave on other clips. The file lies beside
the weights, or in the user's folder where the weights cannot be written to. It counts only for the
very weights that it names: their fingerprint is compared whenever it is used.
"""

import hashlib
import json
import logging
import math
import os
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, OptionError, shown
from ..files import read_json, write_json
from ..runtime import never_interrupt
from ..runtime.outcomes import user_folder
from ..transformer.model import call
from ..weights.inspect import CheckpointInfo
from .step_cache import CACHES, CacheConfig, EasyCache, StepCache

if TYPE_CHECKING:
    from .replay import Recording

logger = logging.getLogger("skyreels.sampling.calibrate")

#: the choice that takes the stored threshold
CALIBRATED = "calibrated"
#: what users choose from
CACHE_CHOICES = (*CACHES, CALIBRATED)
#: of the stored file; one of another format is not read
FORMAT = 1
#: added to the name of the weights
SUFFIX = ".cache.json"
#: thresholds that are tried: 0.005 to 0.5, a tenth more each time
THRESHOLDS = tuple(round(0.005 * 1.1**index, 5) for index in range(49))
#: of each file of weights, that its fingerprint takes
SAMPLES, SAMPLE_BYTES = 256, 4096


@dataclass(frozen=True)
class Score:
    """Some clips with one threshold.

    Attributes:
        clips: how many.
        passes: model evaluations of a clip, the mean.
        median_db: of the latents to the exact ones, see `decibels`.
        worst_db: the least of them.
    """

    clips: int
    passes: float
    median_db: float
    worst_db: float

    @classmethod
    def of(cls, passes: Sequence[int], errors_db: Sequence[float]) -> "Score":
        """The score of clips, from what each took and how near it came."""
        return cls(
            len(passes),
            round(statistics.mean(passes), 2),
            round(statistics.median(errors_db), 2),
            round(min(errors_db), 2),
        )


@dataclass(frozen=True)
class Calibration:
    """What is stored of a calibrated file.

    Attributes:
        name: of the weights.
        fingerprint: of the weights, see `fingerprint_weights`.
        threshold: of `EasyCache`.
        passes_of: model evaluations of an exact run.
        settings: of the runs: "width", "height", "frames", "steps", "cfg", "embedded_guidance",
            "shift", "precision".
        replayed: what the recorded runs let expect.
        measured: real runs with the cache; None if none were made.
        thresholds: the expectation of each threshold, the smallest first.
        versions: of this package's parts and the libraries it was made with.
    """

    name: str
    fingerprint: str
    threshold: float
    passes_of: int
    settings: dict[str, Any]
    replayed: Score
    measured: Score | None
    thresholds: dict[float, Score]
    versions: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """The same for json.dumps, as it is stored."""
        return {
            "format": FORMAT,
            "weights": {"name": self.name, "fingerprint": self.fingerprint},
            "threshold": self.threshold,
            "settings": self.settings,
            "passes_of": self.passes_of,
            "replayed": vars(self.replayed),
            "measured": None if self.measured is None else vars(self.measured),
            "thresholds": [
                {"threshold": threshold, **vars(score)}
                for threshold, score in self.thresholds.items()
            ],
            "versions": self.versions,
        }


def scores_of_thresholds(
    recording: "Recording", *, check: Callable[[], None] = never_interrupt
) -> list[tuple[int, float]]:
    """What every one of THRESHOLDS would do to a recorded run.

    Args:
        recording: of an exact run.
        check: called before each threshold; may raise to stop.

    Returns:
        Model evaluations and decibels of each, in their order.
    """
    from .replay import replay

    found: list[tuple[int, float]] = []
    most = recording.num_steps - least_computed(recording.num_steps)
    for threshold in THRESHOLDS:
        check()
        done = replay(recording, EasyCache(recording.num_steps, call, threshold))
        found.append((done.num_passes, round(done.error_db, 3)))
        if len(done.skipped) >= most:
            break
    return found + [found[-1]] * (len(THRESHOLDS) - len(found))


def least_computed(num_steps: int) -> int:
    """Steps that `EasyCache` computes however little they change.

    Args:
        num_steps: of the schedule.

    Returns:
        At least the protected ones, and two for the first rate of change.
    """
    cache = StepCache(num_steps, call)
    for step in range(2, num_steps):
        if cache.may_skip(step):
            cache.skipped.append(step)
    return num_steps - len(cache.skipped)


def parse_passes(text: str, num_steps: int, num_passes: int) -> float:
    """Read how many model evaluations are wanted.

    Args:
        text: a count, "30", or a share of the exact run's, "50%" or "0.5".
        num_steps: of the schedule.
        num_passes: of an exact run.

    Returns:
        A count.

    Raises:
        OptionError: no number, or one that no threshold reaches.
    """
    is_share = text.endswith("%")
    try:
        number = float(text.removesuffix("%")) / (100 if is_share else 1)
    except ValueError:
        number = math.nan
    is_share = is_share or "." in text
    count = number * num_passes if is_share else number
    least = least_computed(num_steps) * num_passes / num_steps
    if not least <= count <= num_passes:  # NaN too
        raise OptionError(
            f"--passes {shown(text, 40)} is not within {least:g}..{num_passes} model evaluations "
            f"(of {num_steps} steps {least_computed(num_steps)} are always computed): give such a "
            f"count, or a share as {math.ceil(100 * least / num_passes)}%."
        )
    return count


def pick(clips: Sequence[Sequence[tuple[int, float]]], passes: float) -> tuple[float, Score]:
    """The smallest threshold with which clips take no more than the wanted evaluations.

    Args:
        clips: of each, the result of `scores_of_thresholds`.
        passes: wanted, the mean of the clips.

    Returns:
        The threshold and its score; the largest threshold if none suffices.
    """
    table = table_of(clips)
    for threshold, score in table.items():
        if score.passes <= passes:
            return threshold, score
    return next(reversed(table.items()))


def table_of(clips: Sequence[Sequence[tuple[int, float]]]) -> dict[float, Score]:
    """Threshold -> score of some clips.

    Args:
        clips: of each, the result of `scores_of_thresholds`.

    Returns:
        All of THRESHOLDS, in their order.
    """
    table = {}
    for index, threshold in enumerate(THRESHOLDS):
        passes, errors_db = zip(*(clip[index] for clip in clips), strict=True)
        table[threshold] = Score.of(passes, errors_db)
    return table


# --- the file -----------------------------------------------------------------------------------


def fingerprint_weights(info: CheckpointInfo) -> str:
    """A hash that other weights do not have, made without reading all of them.

    The samples of the 13 B transformer lie 100 MB apart, so that each of its blocks has some.

    Args:
        info: of the checkpoint.

    Returns:
        64 hexadecimal digits, of the size of each file, of samples of it and of its end.
    """
    digest = hashlib.sha256()
    for file in sorted({entry.file for entry in info.tensors.values()}):
        size = file.stat().st_size
        digest.update(f"{size}\0".encode())
        with file.open("rb") as stream:
            for sample in range(SAMPLES):
                stream.seek(size * sample // SAMPLES)
                digest.update(stream.read(SAMPLE_BYTES))
            stream.seek(max(0, size - SAMPLE_BYTES))
            digest.update(stream.read())
    return digest.hexdigest()


def place_beside(info: CheckpointInfo) -> Path:
    """Where the calibration of weights is stored: in their folder, under their name.

    Args:
        info: of the checkpoint.

    Returns:
        The path, absolute: NAME.cache.json beside NAME.safetensors or the shards of NAME, and
        NAME.gguf.cache.json beside NAME.gguf.
    """
    first = Path(os.path.abspath(min(entry.file for entry in info.tensors.values())))
    stem = re.sub(r"-\d{5}-of-\d{5}$", "", first.name.removesuffix(".safetensors"))
    return first.with_name(stem + SUFFIX)


def place_of_user(fingerprint: str) -> Path | None:
    """Where the calibration of weights in a folder of others is stored.

    Args:
        fingerprint: of the weights.

    Returns:
        The path; None for a user without a home.
    """
    folder = user_folder()
    return None if folder is None else folder / "caches" / f"{fingerprint[:32]}{SUFFIX}"


def save_calibration(path: Path, calibration: Calibration) -> None:
    """Store a calibration.

    Args:
        path: from `place_beside` or `place_of_user`.
        calibration: what is stored.

    Raises:
        OSError: the place cannot be written.
    """
    write_json(path, calibration.to_json())


def choose_cache(name: str, info: CheckpointInfo | None, num_steps: int) -> CacheConfig:
    """The cache that a user has chosen.

    Args:
        name: of CACHE_CHOICES.
        info: of the transformer's checkpoint, whose stored threshold is wanted; None if it was not
            loaded from one.
        num_steps: of the run.

    Returns:
        What the sampler takes.

    Raises:
        OptionError: nothing is stored for these weights; the message has the command.
        CheckpointError: what is stored cannot be used.
    """
    if name != CALIBRATED:
        return CACHES[name]
    if info is None:
        raise OptionError(
            "Cache calibrated needs a transformer that was loaded from a file, and this one was "
            "not: choose easy."
        )
    fingerprint = fingerprint_weights(info)
    path = _stored_for(info, fingerprint)
    threshold, calibrated_steps, told = _read(path, fingerprint)
    logger.info("Cache calibrated for %s: %s", shown(info.path.name), told)
    if calibrated_steps != num_steps:
        logger.warning(
            "The cache of %s was calibrated with %d steps, and this run has %d: it may skip more "
            "or less than expected. Calibrate with --steps %d.",
            shown(info.path.name),
            calibrated_steps,
            num_steps,
            num_steps,
        )
    return CacheConfig("easy", threshold)


def _stored_for(info: CheckpointInfo, fingerprint: str) -> Path:
    """The first file that is for these very weights."""
    places = [place_beside(info), place_of_user(fingerprint)]
    there = [place for place in places if place is not None and os.path.isfile(place)]
    for place in there:
        if _weights_of(_read_stored(place)) == fingerprint:
            return place
    command = "python -m skyreels calibrate"
    if Path(__file__).parents[1] not in info.path.resolve().parents:  # not the built-in model
        command += f" {json.dumps(str(info.path), ensure_ascii=False)}"
    if there:
        raise OptionError(
            f"{there[0]} was measured on other weights than {info.path.name}: run `{command}` "
            "again, or choose the cache easy."
        )
    raise OptionError(
        f"No cache threshold is stored for {info.path.name} ({places[0]} does not exist): run "
        f"`{command}` once, or choose the cache easy."
    )


def _read_stored(path: Path) -> Any:
    try:
        return read_json(path)
    except CheckpointError:
        raise CheckpointError(
            f"{path} is damaged: delete it and run `python -m skyreels calibrate` again."
        ) from None


def _weights_of(stored: Any) -> Any:
    weights = stored.get("weights") if isinstance(stored, dict) else None
    return weights.get("fingerprint") if isinstance(weights, dict) else None


def _read(path: Path, fingerprint: str) -> tuple[float, int, str]:
    """Threshold, number of steps, and a line about a stored calibration."""
    stored = _read_stored(path)
    try:
        assert _weights_of(stored) == fingerprint
        if stored["format"] != FORMAT:
            raise ValueError
        config = CacheConfig("easy", float(stored["threshold"]))
        num_steps = int(stored["settings"]["steps"])
        score = stored["measured"] or stored["replayed"]
        kind = "measured" if stored["measured"] else "expected from replay"
        told = (
            f"threshold {config.threshold:g}, {float(score['passes']):g} of "
            f"{int(stored['passes_of'])} model evaluations, latents {float(score['median_db']):g} "
            f"dB to exact, worst {float(score['worst_db']):g} dB ({kind}, {int(score['clips'])} "
            f"clips); {path}."
        )
    except (KeyError, TypeError, ValueError, OptionError):
        raise CheckpointError(
            f"{path} is not a calibration of this version: delete it and run `python -m skyreels "
            "calibrate` again."
        ) from None
    return config.threshold, num_steps, told
