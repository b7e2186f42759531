"""Record one exact run, then score any threshold, schedule or predictor without running the model.

    python -m tests.bench.replay record FILE [--model FOLDER] [--case 0] [--seed 3006] [--steps 30]
    python -m tests.bench.replay score FILE [--threshold 0.025]... [--skip 6,7,9,10]...
        [--predictor hold|linear] [--frames] [--model FOLDER]
    python -m tests.bench.replay compare [--cases 4] [--model FOLDER]

`record` samples a held-out case exactly (skyreels/sampling/replay.py says what is kept). `score`
prints a row for each threshold of the cache and for each list of skipped steps, counted from 1:

    passes    model evaluations of the run
    closed    dB of the latents to the exact ones, the model's answer stood in for
    open      the same, every step from the exact run's input
    frames    with --frames, PSNR of the decoded frames to the exact run's (closed loop)
    ms        for one replay

Neither is a real run, see there: the order of thresholds and schedules holds, that of predictors
not always. `compare` makes the real runs of some thresholds beside them: passes, dB and the rank
correlation. A cache that decides inside the network (first-block) cannot be replayed. Figures are
printed as a table, then as one line of JSON.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from comfyui_skyreels.skyreels.builtin import BUILTIN_FOLDER
from comfyui_skyreels.skyreels.conditioning.embeds import PromptEmbeds
from comfyui_skyreels.skyreels.conditioning.latents import ImageConditioning, to_vae_space
from comfyui_skyreels.skyreels.image import encode_image
from comfyui_skyreels.skyreels.sampling.replay import Recording, decibels, record, replay
from comfyui_skyreels.skyreels.sampling.sample import sample
from comfyui_skyreels.skyreels.sampling.settings import SamplingSettings, get_sigmas
from comfyui_skyreels.skyreels.sampling.step_cache import (
    CacheConfig,
    EasyCache,
    Forward,
    StepCache,
)
from comfyui_skyreels.skyreels.text.encode import DEFAULT_NEGATIVE_PROMPT, encode_prompt
from comfyui_skyreels.skyreels.text.load import load_text_encoder
from comfyui_skyreels.skyreels.transformer.model import call
from comfyui_skyreels.skyreels.vae.tiling import decode_frames
from safetensors.torch import load_file, save_file
from torch import Tensor
from train import measure

from .quality import SETTINGS, Studio

THRESHOLDS = (0.01, 0.015, 0.025, 0.035, 0.05, 0.1)


class FixedSchedule(EasyCache):
    """Skips given steps, where the rules of every cache let it, and estimates as EasyCache does."""

    def __init__(self, num_steps: int, skip: Collection[int]) -> None:
        super().__init__(num_steps, call, math.inf)
        self.skip = frozenset(skip)

    def may_skip(self, step: int) -> bool:
        """Whether the schedule and the rules skip a step."""
        return step in self.skip and super().may_skip(step)


class Linear(EasyCache):
    """Another predictor, to be mixed in: output less input goes on as between the last two."""

    def begin(self, step: int, latents: Tensor, branches: Sequence[int]) -> None:
        """Decide as the cache does, and note the step."""
        super().begin(step, latents, branches)
        self.now = step, latents

    def predict(self, branch: int, forward: Forward) -> Tensor:
        """The recorded prediction, or the estimate."""
        step, latents = self.now
        known = vars(self).setdefault("known", {}).setdefault(branch, [])
        if self.skips and len(known) > 1:
            (earlier, first), (later, second) = known[-2:]
            return latents + second + (second - first) * ((step - later) / (later - earlier))
        output = super().predict(branch, forward)
        if not self.skips:
            known.append((step, output - latents))
        return output


class LinearSchedule(Linear, FixedSchedule):
    """Both."""


#: name -> the cache of a threshold, and that of a schedule
PREDICTORS: dict[str, tuple[type[EasyCache], type[FixedSchedule]]] = {
    "hold": (EasyCache, FixedSchedule),
    "linear": (Linear, LinearSchedule),
}


def save_recording(path: Path, recording: Recording) -> None:
    """Write a recording to a safetensors file."""
    tensors = {"sigmas": recording.sigmas, "start": recording.start}
    for step, velocities in enumerate(recording.velocities):
        tensors |= {f"{step:04} {branch}": v for branch, v in enumerate(velocities)}
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, path, {"scale": str(recording.scale)})


def load_recording(path: Path) -> Recording:
    """Read what `save_recording` wrote."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        scale = float(file.metadata()["scale"])
    tensors = load_file(path)
    sigmas, start = tensors.pop("sigmas"), tensors.pop("start")
    steps: list[list[Tensor]] = [[] for _ in range(len(sigmas) - 1)]
    for name in sorted(tensors):
        steps[int(name[:4])].append(tensors[name])
    return Recording(sigmas, start, steps, scale)


class Take:
    """A held-out case of a model: its picture and prompts, ready to be sampled."""

    def __init__(self, studio: Studio, case: measure.Case, seed: int, steps: int = 30) -> None:
        setting, self.runtime = SETTINGS["fp32"], studio.runtime
        encoder = studio._part(load_text_encoder, "", exact=True)
        self.transformer, self.vae = studio.transformer(setting), studio.vae(setting)
        self.embeds: tuple[PromptEmbeds, PromptEmbeds] = (
            encode_prompt(encoder, case.prompt, runtime=self.runtime),
            encode_prompt(encoder, DEFAULT_NEGATIVE_PROMPT, fps_prefix=False, runtime=self.runtime),
        )
        truth = case.truth()
        self.image: ImageConditioning = encode_image(
            self.vae, truth[:1], width=truth.shape[2], height=truth.shape[1],
            num_frames=len(truth), runtime=self.runtime,
        )  # fmt: skip
        self.settings = SamplingSettings(seed=seed, sigmas=get_sigmas(steps), riflex_k=0)

    def record(self) -> tuple[Tensor, Recording]:
        """The exact run."""
        return record(
            self.transformer, self.image, *self.embeds, self.settings, runtime=self.runtime
        )

    def run(self, threshold: float) -> tuple[Tensor, int]:
        """A real run with the cache: latents, and model evaluations."""
        settings = replace(self.settings, cache=CacheConfig("easy", threshold))
        count = [0]
        hook = self.transformer.blocks[-1].register_forward_hook(
            lambda *_: count.__setitem__(0, count[0] + 1)
        )
        try:
            latents = sample(
                self.transformer, self.image, *self.embeds, settings, runtime=self.runtime
            )
        finally:
            hook.remove()
        return latents, count[0]


def score(recording: Recording, cache: StepCache, other: StepCache) -> dict:
    """One row, from two caches of the same kind that have not seen a step."""
    started = time.perf_counter()
    closed = replay(recording, cache)
    milliseconds = 1e3 * (time.perf_counter() - started)
    return {
        "passes": closed.num_passes,
        "closed": round(closed.error_db, 2),
        "open": round(replay(recording, other, closed_loop=False).error_db, 2),
        "ms": round(milliseconds, 1),
        "skipped": [step + 1 for step in closed.skipped],
    }


def frames_of(studio: Studio, latents: Tensor) -> Tensor:
    """The decoded clip of latents in model space."""
    vae = studio.vae(SETTINGS["fp32"])
    return decode_frames(vae, to_vae_space(latents), "full", runtime=studio.runtime)


def ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 0, equal values share theirs."""
    return [
        sum(other < value for other in values) + (values.count(value) - 1) / 2 for value in values
    ]


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's coefficient."""
    return statistics.correlation(ranks(list(first)), ranks(list(second)))


def compare(studio: Studio, cases: Sequence[measure.Case]) -> tuple[dict[str, dict], dict]:
    """Real runs beside replays, the means of some cases; and how far they are apart."""
    rows: dict[str, dict] = {}
    found: list[dict[float, tuple]] = []
    for index, case in enumerate(cases):
        take = Take(studio, case, seed=index)
        exact, recording = take.record()
        own = {}
        for threshold in THRESHOLDS:
            latents, passes = take.run(threshold)
            row = score(recording, *(EasyCache(30, call, threshold) for _ in range(2)))
            own[threshold] = (
                passes, row["passes"], decibels(latents, exact), row["closed"], row["open"],
            )  # fmt: skip
        found.append(own)
    for threshold in THRESHOLDS:
        columns = zip(*(own[threshold] for own in found), strict=True)
        names = ("passes", "replayed", "real dB", "closed", "open")
        values = [round(statistics.mean(column), 2) for column in columns]
        rows[f"threshold {threshold}"] = dict(zip(names, values, strict=True))

    def mean_correlation(place: int) -> float:
        each = [
            rank_correlation([row[2] for row in own.values()], [row[place] for row in own.values()])
            for own in found
        ]
        return round(statistics.mean(each), 3)

    every = [row for own in found for row in own.values()]
    return rows, {
        "most passes apart": max(abs(row[0] - row[1]) for row in every),
        "rank correlation, closed": mean_correlation(3),
        "rank correlation, open": mean_correlation(4),
        "closed less real, dB": round(statistics.mean(row[3] - row[2] for row in every), 2),
        "open less real, dB": round(statistics.mean(row[4] - row[2] for row in every), 2),
    }


def print_rows(rows: dict[str, dict]) -> None:
    """Rows down, measures across; lists at the end."""
    names = [name for name in next(iter(rows.values())) if name != "skipped"]
    wide = max(map(len, rows)) + 2
    print(" " * wide + "".join(f"{name:>10}" for name in names))
    for label, row in rows.items():
        skipped = " ".join(map(str, row.get("skipped", ())))
        print(f"{label:<{wide}}" + "".join(f"{row[name]:>10}" for name in names), skipped)


def main() -> None:
    """Parse, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, dest="command")
    recorder, scorer, comparer = (commands.add_parser(n) for n in ("record", "score", "compare"))
    for command in (recorder, scorer, comparer):
        command.add_argument("--model", type=Path, default=BUILTIN_FOLDER)
        command.add_argument("--device", default="cpu")
    for command in (recorder, scorer):
        command.add_argument("file", type=Path)
    recorder.add_argument("--case", type=int, default=0)
    recorder.add_argument("--steps", type=int, default=30)
    for command in (recorder, comparer):
        command.add_argument("--seed", type=int, default=3006, help="of the cases")
    scorer.add_argument("--threshold", type=float, action="append")
    scorer.add_argument("--skip", action="append", default=[], help="steps, counted from 1: 6,7,9")
    scorer.add_argument("--predictor", choices=PREDICTORS, default="hold")
    scorer.add_argument("--frames", action="store_true")
    comparer.add_argument("--cases", type=int, default=4)
    arguments = parser.parse_args()
    studio = Studio(arguments.model, arguments.device)
    if arguments.command == "record":
        case = measure.held_out_cases(arguments.case + 1, arguments.seed)[arguments.case]
        _, recording = Take(studio, case, arguments.case, arguments.steps).record()
        save_recording(arguments.file, recording)
        return
    if arguments.command == "compare":
        rows, apart = compare(studio, measure.held_out_cases(arguments.cases, arguments.seed))
        print_rows(rows)
        print(json.dumps({"rows": rows, **apart}))
        return
    recording = load_recording(arguments.file)
    cached, scheduled = PREDICTORS[arguments.predictor]
    steps = recording.num_steps
    makers = {
        f"threshold {t}": partial(cached, steps, call, t)
        for t in arguments.threshold or ([] if arguments.skip else THRESHOLDS)
    } | {
        f"skip {text}": partial(scheduled, steps, [int(step) - 1 for step in text.split(",")])
        for text in arguments.skip
    }
    rows = {name: score(recording, make(), make()) for name, make in makers.items()}
    if arguments.frames:
        exact = frames_of(studio, replay(recording, StepCache(steps, call)).latents)
        for name, make in makers.items():
            clip = frames_of(studio, replay(recording, make()).latents)
            rows[name]["frames"] = round(measure.psnr(clip, exact), 2)
    print_rows(rows)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
