"""Calibrate the step cache for one transformer: exact clips, replayed for every threshold.

What is known of each finished clip is kept in a file beside the result, so that an interrupted
calibration continues with the next clip.
"""

import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..conditioning.embeds import PromptEmbeds
from ..conditioning.latents import ImageConditioning
from ..errors import CheckpointError, OptionError
from ..files import read_json, write_json
from ..image import encode_image, example_image
from ..plan import Choice, Job, machine_of, plan_run, rates_needed, weights_of
from ..runtime import Runtime
from ..runtime.outcomes import device_key, in_seconds
from ..sampling.calibrate import (
    FORMAT,
    Calibration,
    Score,
    pick,
    scores_of_thresholds,
    table_of,
)
from ..sampling.replay import decibels, record
from ..sampling.sample import sample
from ..sampling.settings import SamplingSettings
from ..sampling.step_cache import CacheConfig
from ..transformer.model import SkyReelsTransformer
from ..vae.model import VideoVAE

#: clips, if no prompts are given: so many to calibrate, and the rest to check
DEFAULT_CLIPS = 8
#: colour of the disc, its name, its centre as shares of the size, and what it does
_DRAWN: tuple[tuple[tuple[float, float, float], str, tuple[float, float], str], ...] = (
    ((0.90, 0.10, 0.10), "red", (0.58, 0.50), "moves left"),
    ((0.95, 0.90, 0.10), "yellow", (0.35, 0.50), "moves right"),
    ((0.97, 0.97, 0.97), "white", (0.50, 0.65), "moves up"),
    ((1.00, 0.55, 0.05), "orange", (0.45, 0.35), "moves down"),
    ((0.90, 0.10, 0.85), "magenta", (0.50, 0.50), "grows"),
    ((0.10, 0.70, 0.15), "green", (0.60, 0.45), "shrinks"),
    ((0.10, 0.85, 0.90), "cyan", (0.40, 0.60), "stays still"),
    ((0.90, 0.10, 0.10), "red", (0.45, 0.55), "fades away"),
    ((0.10, 0.70, 0.15), "green", (0.60, 0.55), "moves left"),
    ((0.97, 0.97, 0.97), "white", (0.40, 0.45), "moves right"),
    ((0.90, 0.10, 0.85), "magenta", (0.45, 0.60), "moves up"),
    ((0.10, 0.85, 0.90), "cyan", (0.55, 0.40), "moves down"),
    ((0.95, 0.90, 0.10), "yellow", (0.50, 0.55), "grows"),
    ((1.00, 0.55, 0.05), "orange", (0.55, 0.50), "shrinks"),
    ((0.90, 0.10, 0.10), "red", (0.55, 0.60), "stays still"),
    ((0.97, 0.97, 0.97), "white", (0.50, 0.45), "fades away"),
)


@dataclass(frozen=True, eq=False)
class Case:
    """What one clip is made of.

    Attributes:
        prompt: from `encode_prompt`.
        negative: likewise; None without guidance.
        image: [1, H, W, 3] float in 0..1; None for a text-to-video transformer.
        seed: of the noise.
    """

    prompt: PromptEmbeds
    negative: PromptEmbeds | None
    image: Tensor | None
    seed: int


@dataclass(frozen=True)
class Size:
    """Of the clips.

    Attributes:
        width: in pixels.
        height: in pixels.
        num_frames: 4k + 1.
    """

    width: int
    height: int
    num_frames: int


def drawn_prompts() -> list[str]:
    """Prompts for people who give none: sixteen, each about the picture of the same place."""
    return [f"a {name} circle {what}" for _, name, _, what in _DRAWN]


def drawn_image(index: int, width: int, height: int) -> Tensor:
    """The picture of a drawn prompt.

    Args:
        index: of the prompt; those beyond the last begin anew.
        width: in pixels.
        height: in pixels.

    Returns:
        [1, height, width, 3] float32 in 0..1.
    """
    colour, _, centre, _ = _DRAWN[index % len(_DRAWN)]
    return example_image(width, height, colour=colour, centre=centre)


def expected_seconds(
    transformer: SkyReelsTransformer, settings: SamplingSettings, size: Size, runtime: Runtime
) -> float | None:
    """How long an exact clip should take here.

    Args:
        transformer: on any device.
        settings: of the run.
        size: of the clip.
        runtime: where; a GPU is measured if it was not before.

    Returns:
        Seconds of sampling; None where it is not known.
    """
    weights = weights_of(transformer)
    is_cuda = runtime.device.type == "cuda"
    machine = machine_of(runtime, rates_needed([weights.gemm]), can_probe=is_cuda)
    job = Job(
        width=size.width,
        height=size.height,
        num_frames=size.num_frames,
        num_steps=settings.num_steps,
        num_guided=settings.num_steps if settings.uses_cfg else 0,
        config=transformer.config,
        vae=None,
    )
    return plan_run(machine, job, weights, Choice("exact")).seconds.get("sample")


@dataclass(frozen=True)
class Target:
    """What is calibrated.

    Attributes:
        name: of the weights.
        fingerprint: of the weights.
        place: of the result; what is unfinished is kept in a file beside it.
        settings: of the runs, as they are stored, see `Calibration`.
    """

    name: str
    fingerprint: str
    place: Path
    settings: dict[str, Any]


def calibrate(
    transformer: SkyReelsTransformer,
    vae: VideoVAE,
    cases: Sequence[Case],
    checks: Sequence[Case],
    settings: SamplingSettings,
    size: Size,
    *,
    passes: float,
    target: Target,
    runtime: Runtime,
    tell: Callable[[str], None],
) -> Calibration:
    """Find the threshold with which clips take the wanted number of model evaluations.

    Args:
        transformer: from `load_transformer`.
        vae: encodes the pictures.
        cases: clips that are recorded and replayed.
        checks: other clips, which are made with the threshold and compared with exact ones.
        settings: of the runs; the seed is that of the case.
        size: of the clips.
        passes: model evaluations of a clip that are wanted, the mean of all cases.
        target: what is calibrated.
        runtime: where.
        tell: takes lines for people.

    Returns:
        What is to be stored.

    Raises:
        SkyReelsError: see `sample`.
        OSError: the unfinished state cannot be written.
    """
    unfinished = _Unfinished(target, [*cases, *checks])
    progress = _Progress(
        len(cases) + 2 * len(checks),
        len(unfinished.clips) + 2 * len(unfinished.checks),
        expected_seconds(transformer, settings, size, runtime),
        tell,
    )
    for index in range(len(unfinished.clips), len(cases)):
        with progress.clip(f"clip {index + 1} of {len(cases)}"):
            conditioning = _start(vae, cases[index], size, runtime)
            own = replace(settings, seed=cases[index].seed)
            prompts = cases[index].prompt, cases[index].negative
            _, recording = record(transformer, conditioning, *prompts, own, runtime=runtime)
            scores = scores_of_thresholds(recording, check=runtime.check_interrupt)
        unfinished.add("clips", scores)
    threshold, replayed = pick(unfinished.clips, passes)
    for index in range(len(unfinished.checks), len(checks)):
        name, case = f"check {index + 1} of {len(checks)}", checks[index]
        with progress.clip(f"{name}, exact"):
            exact, _ = _made(transformer, vae, case, settings, size, runtime)
        with progress.clip(f"{name}, threshold {threshold:g}"):
            cached = replace(settings, cache=CacheConfig("easy", threshold))
            latents, taken = _made(transformer, vae, case, cached, size, runtime)
        unfinished.add("checks", [taken, round(decibels(latents, exact), 3)])
    measured = None
    if checks:
        taken_each, errors_db = zip(*unfinished.checks, strict=True)
        measured = Score.of(taken_each, errors_db)
    return Calibration(
        name=target.name,
        fingerprint=target.fingerprint,
        threshold=threshold,
        passes_of=settings.num_steps * (2 if settings.uses_cfg else 1),
        settings=target.settings,
        replayed=replayed,
        measured=measured,
        thresholds=table_of(unfinished.clips),
        versions={
            "device": device_key(runtime.device),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    )


def _start(vae: VideoVAE, case: Case, size: Size, runtime: Runtime) -> ImageConditioning:
    if case.image is None:
        return ImageConditioning(None, size.width, size.height, size.num_frames)
    return encode_image(
        vae,
        case.image,
        width=size.width,
        height=size.height,
        num_frames=size.num_frames,
        seed=case.seed,
        runtime=runtime,
    )


def _made(
    transformer: SkyReelsTransformer,
    vae: VideoVAE,
    case: Case,
    settings: SamplingSettings,
    size: Size,
    runtime: Runtime,
) -> tuple[Tensor, int]:
    """Latents of a real run, and its model evaluations, counted where they end."""
    count = 0

    def note(*_: Any) -> None:
        nonlocal count
        count += 1

    conditioning = _start(vae, case, size, runtime)
    own = replace(settings, seed=case.seed)
    hook = transformer.blocks[-1].register_forward_hook(note)
    try:
        latents = sample(
            transformer, conditioning, case.prompt, case.negative, own, runtime=runtime
        )
    finally:
        hook.remove()
    return latents, count


class _Unfinished:
    """Finished clips in a file, until the calibration is stored.

    Attributes:
        clips: of each, the result of `scores_of_thresholds`.
        checks: of each, model evaluations and decibels.
    """

    def __init__(self, target: Target, cases: Sequence[Case]) -> None:
        self.path = unfinished_place(target.place)
        self._key = _key(target, cases)
        try:
            stored = read_json(self.path) if self.path.is_file() else {}
        except CheckpointError:
            raise OptionError(f"{self.path} is damaged: delete it to start over.") from None
        is_ours = isinstance(stored, dict) and stored.get("key") == self._key
        self.clips: list[Any] = list(stored["clips"]) if is_ours else []
        self.checks: list[Any] = list(stored["checks"]) if is_ours else []

    def add(self, kind: str, value: Any) -> None:
        """Keep one more clip or check."""
        getattr(self, kind).append(value)
        write_json(self.path, {"key": self._key, "clips": self.clips, "checks": self.checks})


def unfinished_place(place: Path) -> Path:
    """Where finished clips are kept until the calibration is stored.

    Args:
        place: of the calibration.

    Returns:
        The path of a file in the same folder.
    """
    return place.with_name(f"{place.name}.unfinished")


def _key(target: Target, cases: Sequence[Case]) -> str:
    """A hash of all that decides about the clips and their order."""
    digest = hashlib.sha256(json.dumps([FORMAT, target.fingerprint, target.settings]).encode())
    for case in cases:
        tensors = [case.prompt.prompt_embeds, case.prompt.pooled_prompt_embeds]
        for tensor in (*tensors, case.image):
            if tensor is not None:
                digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        digest.update(f"{case.seed}".encode())
    return digest.hexdigest()


class _Progress:
    """What is being made, and how long the rest takes: as expected, then as the clips took."""

    def __init__(
        self, total: int, done: int, seconds: float | None, tell: Callable[[str], None]
    ) -> None:
        self._left, self._seconds, self._tell = total - done, seconds, tell
        self._is_measured = False
        if done:
            tell(f"{done} of {total} clips are there from before.")
        if seconds is None and self._left:
            tell(f"{self._left} clips; how long one takes here is told after the first.")
        elif seconds is not None and self._left:
            tell(
                f"{self._left} clips of about {in_seconds(seconds)} each: about "
                f"{in_seconds(self._left * seconds)}. Ctrl-C loses at most one clip."
            )

    @contextmanager
    def clip(self, name: str) -> Iterator[None]:
        """Around the making of one clip."""
        left = "" if self._seconds is None else f", {in_seconds(self._left * self._seconds)} left"
        self._tell(f"{name[:1].upper()}{name[1:]}{left}")
        started = time.perf_counter()
        yield
        took = time.perf_counter() - started
        # a cached clip takes less than an exact one: the longest is the safer guess
        self._seconds = max(took, self._seconds or 0.0) if self._is_measured else took
        self._is_measured = True
        self._left -= 1
