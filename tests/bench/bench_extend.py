"""How well the built-in model continues its own clips: the join, the motion, the colours.

    python tests/bench/bench_extend.py [--cases 12] [--steps 30]

A shape that has room moves left, right, up and down in a clip that the model makes; the clip is
then continued with the same prompt, for several overlaps, with and without the colour match. For
each way, median and worst:

    join     largest step of the frames at the join over the largest step within the clip itself;
             a step is the root mean square difference of two frames that follow one another
    follows  share of the continuations in which the shape goes on as the prompt says
    shade    change of the mean of the empty ground from the clip's last frame to the first one
             after the overlap, in steps of 1/255
    drift    the same to the last frame of all; within the clip itself it is printed below

Prints a table, then one line of JSON.
"""

import argparse
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from comfyui_skyreels.skyreels.builtin import (
    builtin_text_encoder,
    builtin_transformer,
    builtin_vae,
)
from comfyui_skyreels.skyreels.pipeline import image_to_video
from comfyui_skyreels.skyreels.pipeline.extend import ExtendSettings, extend_video
from comfyui_skyreels.skyreels.runtime import TorchRuntime
from comfyui_skyreels.skyreels.sampling.settings import SamplingSettings, get_sigmas
from comfyui_skyreels.skyreels.text.encode import DEFAULT_NEGATIVE_PROMPT, encode_prompt
from torch import Tensor
from train import data, measure

OVERLAPS = (1, 5, 9)
#: from the centre of the picture to where the shape starts, against its direction
START = 16.0


def moving_cases(count: int) -> list[measure.Case]:
    """Held-out pictures of shapes that start on one side and are told to go to the other."""
    cases = [c for c in measure.held_out_cases(2 * count, seed=14) if c.verb in data.DIRECTIONS]
    found = []
    for case in cases[:count]:
        direction = torch.tensor([data.DIRECTIONS[case.verb]], dtype=torch.float32)
        scene = replace(case.scene, centre=data.SIZE / 2 - START * direction)
        found.append(measure.Case(scene, case.told(case.verb).prompt))
    return found


def steps_of(clip: Tensor) -> Tensor:
    """[F - 1]: root mean square difference of each frame to the next."""
    return clip.diff(dim=0).square().mean((1, 2, 3)).sqrt()


def judge(clip: Tensor, joined: Tensor, overlap: int, case: measure.Case) -> dict[str, float]:
    """The figures of one continuation."""
    end = len(clip)
    at_join = steps_of(joined)[end - overlap - 1 : end]
    found = measure.measure(joined[end - 1 :], case.scene)
    first, last, new, newest = ground(
        torch.stack([clip[0], clip[-1], joined[end], joined[-1]]), case
    )
    return {
        "join": float(at_join.max() / steps_of(clip).max()),
        "follows": 100.0 * (found.verb == case.verb),
        "shade": float((new - last).abs().max()),
        "drift": float((newest - last).abs().max()),
        "own": float((last - first).abs().max()),
    }


def ground(frames: Tensor, case: measure.Case) -> Tensor:
    """[F, 3]: mean of the pixels that the shape touches in none of the frames, in 0..255."""
    touched = measure.opacity_map(frames, case.scene).amax(0) > 0
    return 255 * frames[:, ~touched].mean(1)


def run(count: int, num_steps: int) -> dict[str, dict[str, Any]]:
    """Way -> figure -> [median, worst], or the share for "follows"."""
    runtime = TorchRuntime()
    transformer, vae = builtin_transformer(runtime=runtime), builtin_vae(runtime=runtime)
    encoder = builtin_text_encoder(runtime=runtime)
    negative = encode_prompt(encoder, DEFAULT_NEGATIVE_PROMPT, fps_prefix=False, runtime=runtime)
    sigmas, figures = get_sigmas(num_steps), {}
    for seed, case in enumerate(moving_cases(count)):
        prompt = encode_prompt(encoder, case.prompt, runtime=runtime)
        parts = (transformer, vae)
        first = SamplingSettings(seed=seed, sigmas=sigmas, riflex_k=0)
        clip = image_to_video(
            *parts, case.truth()[:1], prompt, negative, first, width=data.SIZE, height=data.SIZE,
            num_frames=data.FRAMES, runtime=runtime,
        )  # fmt: skip
        second = replace(first, seed=seed + 1000)
        for overlap in OVERLAPS:
            for match in (True, False):
                joined, _ = extend_video(
                    *parts, clip, prompt, negative, second, runtime=runtime,
                    extend=ExtendSettings(data.FRAMES, overlap, match),
                )  # fmt: skip
                way = f"overlap {overlap}, {'colours matched' if match else 'as they come'}"
                figures.setdefault(way, []).append(judge(clip, joined, overlap, case))
    return {
        way: {
            "follows": statistics.mean(row["follows"] for row in rows),
            **{
                name: [statistics.median(row[name] for row in rows), max(row[name] for row in rows)]
                for name in ("join", "shade", "drift", "own")
            },
        }
        for way, rows in figures.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=12)
    parser.add_argument("--steps", type=int, default=30)
    arguments = parser.parse_args()
    results = run(arguments.cases, arguments.steps)
    names = ("join", "shade", "drift")
    print(
        f"| continued with | follows | {' | '.join(f'{name}: median, worst' for name in names)} |"
    )
    print("|---|---|---|---|---|")
    for way, found in results.items():
        cells = " | ".join("{:.2f}, {:.2f}".format(*found[name]) for name in names)
        print(f"| {way} | {found['follows']:.0f} % | {cells} |")
    own = next(iter(results.values()))["own"]
    print("\nDrift within the clip itself: {:.2f}, {:.2f}".format(*own))
    print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
