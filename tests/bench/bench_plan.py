"""What the planner chooses on cards of each size, and memory against time of every way to run.

    python tests/bench/bench_plan.py [--plot FILE.png]
    python tests/bench/bench_plan.py --device cuda

Without a device: the plans of the cards of tests/support/cards.py for 97 frames of 960x544, whose
predicted peaks tests/engine/test_plan.py compares with shape-only tensors. With --plot they are
drawn: a line is a precision, from everything streamed to everything resident; where a line ends at
the right, more memory buys nothing. With --device the same for that device, whose rates are probed.
Prints a table, then one line of JSON.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench_decode import commit
from comfyui_skyreels.skyreels.config import TransformerConfig
from comfyui_skyreels.skyreels.plan import (
    Job,
    Machine,
    Plan,
    machine_of,
    plan_run,
    plans,
    rates_needed,
    table,
    weights_as,
)
from comfyui_skyreels.skyreels.runtime import TorchRuntime
from support.cards import CARDS, card

GIGABYTES = (8, 12, 16, 24, 48, 80)
PRECISIONS = ("auto", "fp8", "int8")
#: card -> precisions that are drawn
DRAWN = {"H100": ("auto", "fp8"), "RTX 4090": ("auto", "int8"), "RTX 3060": ("auto", "int8")}
JOB = Job(text_tokens=60, vae=None)


def frontier(machine: Machine, precision: str, job: Job = JOB) -> list[Plan]:
    """Plans that take more and more memory, until everything is resident."""
    weights = weights_as(job.config, "bf16", precision)
    found: list[Plan] = []
    for tenths in range(15, 300):
        free = tenths * 10**8
        plan = plan_run(replace(machine, free_bytes=free), job, weights)
        if plan.fits and (not found or plan.peak > found[-1].peak):
            found.append(plan)
        if plan.fits and not plan.streamed_bytes and plan.chunking == "whole":
            break
    return found


def choices(machine: Machine) -> tuple[list[Plan], Plan]:
    """Every mode on a machine, and the one that would be taken."""
    weights = weights_as(TransformerConfig(), "bf16", "auto")
    return plans(machine, Job(), "bf16"), plan_run(machine, Job(), weights)


def summary(plan: Plan) -> dict:
    """Of a plan, what is compared."""
    step = plan.seconds["step"]
    return {
        "precision": plan.precision,
        "chunking": plan.chunking,
        "streamed_gb": round(plan.streamed_bytes / 1e9, 2),
        "sampling_gb": round(plan.peak_bytes["sample"] / 1e9, 2),
        "free_gb": round(plan.free_bytes / 1e9, 2),
        "step_s": None if step is None else round(step, 2),
        "decode": plan.decode,
        "fits": plan.fits,
    }


# --- the picture --------------------------------------------------------------------------------

WIDTH, HEIGHT, MARGIN, RIGHT = 900, 480, 70, 190
COLOURS = ("#1f6fb4", "#5aa7dd", "#b4471f", "#e08b62", "#3b7d3b", "#8cc08c")
MOST_GB = 24


def draw(path: Path) -> None:
    """Draw memory against time of a step, both from the planner alone."""
    from PIL import Image, ImageDraw, ImageFont

    lines = {
        f"{name}, {'bf16 (exact)' if precision == 'auto' else precision}": frontier(
            card(name, 80), precision
        )
        for name, precisions in DRAWN.items()
        for precision in precisions
    }
    seconds = [plan.seconds["step"] or 0 for line in lines.values() for plan in line]
    low, high = 5.0, 1.3 * max(seconds)
    scale = 2  # drawn large and made smaller, for smooth lines
    image = Image.new("RGB", (scale * WIDTH, scale * HEIGHT), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(13 * scale)

    def place(gigabytes: float, step_s: float) -> tuple[float, float]:
        across = MARGIN + (WIDTH - MARGIN - RIGHT) * gigabytes / MOST_GB
        up = torch.log(torch.tensor([low, step_s, high]))
        share = float((up[1] - up[0]) / (up[2] - up[0]))
        return scale * across, scale * (HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * share)

    def write(where: tuple[float, float], text: str, anchor: str, fill: str = "#333333") -> None:
        pen.text(where, text, fill, font, anchor)

    for gigabytes in range(0, MOST_GB + 1, 4):
        x, y = place(gigabytes, low)
        pen.line([(x, y), (x, scale * MARGIN)], "#e4e4e4", scale)
        write((x, y + 8 * scale), f"{gigabytes}", "ma")
    for step_s in (5, 10, 20, 50, 100, 200):
        if step_s <= high:
            x, y = place(0, step_s)
            pen.line([(x, y), place(MOST_GB, step_s)], "#e4e4e4", scale)
            write((x - 8 * scale, y), f"{step_s} s", "rm")
    names = []
    for colour, (name, line) in zip(COLOURS, lines.items(), strict=True):
        points = [place(plan.peak / 1e9, plan.seconds["step"] or low) for plan in line]
        pen.line(points, colour, 3 * scale, joint="curve")
        for point, radius in ((points[0], 3 * scale), (points[-1], 5 * scale)):
            box = [point[0] - radius, point[1] - radius, point[0] + radius, point[1] + radius]
            pen.ellipse(box, colour)
        names.append((points[-1][1], name, colour))
    lowest = 0.0
    for y, name, colour in sorted(names):  # names of lines that lie close stand below each other
        lowest = max(y, lowest + 17 * scale)
        write((scale * (WIDTH - RIGHT + 10), lowest), name, "lm", colour)
    title = "A step (two model evaluations) of 97 frames of 960x544, predicted"
    write((scale * MARGIN, scale * 24), title, "lm")
    write((scale * MARGIN, scale * 46), "small dot: all blocks streamed; large dot: all resident",
          "lm", "#777777")  # fmt: skip
    write((scale * (MARGIN + WIDTH - RIGHT) / 2, scale * (HEIGHT - 22)),
          "GB on the card while sampling", "mm")  # fmt: skip
    image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS).quantize(64).save(path, optimize=True)


def show(name: str, machine: Machine) -> dict:
    """Print the modes of a machine; what is chosen."""
    found, chosen = choices(machine)
    print(f"\n{name}, {machine.free_bytes / 1e9:.1f} GB free")
    print("\n".join(table(found, chosen)))
    return {"card": name, **summary(chosen)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", help="plan for this device instead of the known cards")
    parser.add_argument("--plot", type=Path, help="draw memory against time to this PNG")
    options = parser.parse_args(argv)
    rows = []
    if options.device:
        runtime = TorchRuntime(options.device)
        names = [*rates_needed(["bf16", "fp8", "int8"]), "convolution"]
        machine = machine_of(runtime, names)
        rows.append(show(machine.name, machine))
    else:
        for name in CARDS:
            for gigabytes in GIGABYTES:
                rows.append(show(f"{name}, {gigabytes} GB", card(name, gigabytes)))
    if options.plot:
        draw(options.plot)
    device = options.device or "none: planned"
    result = {"bench": "plan", "device": device, "torch": torch.__version__, "commit": commit()}
    print(json.dumps({**result, "chosen": rows}))


if __name__ == "__main__":
    main()
