"""Draw what cards and workers bring: web/docs/scaling.svg, computed and not measured.

    python tests/bench/plot_scaling.py [--out FILE.svg]

Left, one clip on 1 to 8 cards, from the planner alone (skyreels/plan/scaling.py) with the rates of
tests/support/cards.py: ranks, a branch of guidance each, and both together, which the planner knows
and `generate --ranks` starts. Right, many clips on 1 to 64 workers of one card each, from the
simulation of tests/bench/simulate_batch.py: 40 clips a worker, 1 % of the workers lost an hour.
Prints the figures as a table, then one line of JSON.
"""

import argparse
import json
import math
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from comfyui_skyreels.skyreels.config import TransformerConfig
from comfyui_skyreels.skyreels.plan import Job, weights_as
from comfyui_skyreels.skyreels.plan.scaling import Layout, share
from support.cards import card
from support.simulated import Costs, simulate

ROOT = Path(__file__).resolve().parents[2]
JOB = Job(text_tokens=60)
#: name -> gigabytes, colour, and what is between the cards
CARDS = {
    "H100": (80, "#1f6fb4", "NVLink, 360 GB/s"),
    "RTX 4090": (24, "#b4471f", "PCIe 4, 20 GB/s"),
}
RANKS = (1, 2, 3, 4, 6, 8)
WORKERS = (1, 2, 4, 8, 16, 32, 64)
CLIPS_EACH = 40
WIDTH, HEIGHT, PANEL, TOP, BOTTOM = 1000, 440, 340, 78, 372


def cards_rows() -> list[dict]:
    """Each layout of each kind of card."""
    weights = weights_as(TransformerConfig(), "bf16", "auto")
    rows = []
    for name, (gigabytes, _, _) in CARDS.items():
        machine = card(name, gigabytes)
        for layout in [*(Layout(1, n) for n in RANKS), *(Layout(2, n) for n in RANKS if n <= 4)]:
            found = share(machine, JOB, weights, layout)
            rows.append({
                "card": name, "cards": layout.cards, "branches": layout.branches,
                "step_s": round(found.step_s, 3), "exchange_s": round(found.exchange_s, 3),
                "total_s": round(found.total_s, 1), "given_gb_a_step": found.given_bytes / 1e9,
                "weights_gb": round(found.weight_bytes / 1e9, 1), "fits": found.fits,
            })  # fmt: skip
    return rows


def workers_rows(seconds: dict[str, float]) -> list[dict]:
    """Clips an hour with so many workers, by the seconds of a clip on each kind of card."""
    rows = []
    for name, clip_s in seconds.items():
        for workers in WORKERS:
            with tempfile.TemporaryDirectory(prefix="batch-") as folder:
                costs = replace(Costs(), clip=clip_s)
                outcome = simulate(Path(folder), CLIPS_EACH * workers, workers, costs)
            hours = outcome.workers.now / 3600
            rows.append({
                "card": name, "workers": workers,
                "clips_an_hour": round(CLIPS_EACH * workers / hours, 1),
                "driver_percent": round(100 * outcome.driver_share, 3),
                "lost": outcome.workers.lost,
            })  # fmt: skip
    return rows


@dataclass(frozen=True)
class Axes:
    """A panel: where it begins, and what its ends stand for, on even scales or doublings."""

    left: float
    across: tuple[float, float]
    up: tuple[float, float]
    is_even: bool = False

    def place(self, x: float, y: float) -> tuple[float, float]:
        scale = float if self.is_even else math.log
        share_x, share_y = (
            (scale(value) - scale(low)) / (scale(high) - scale(low))
            for value, (low, high) in ((x, self.across), (y, self.up))
        )
        return self.left + PANEL * share_x, BOTTOM - (BOTTOM - TOP) * share_y


def text(x: float, y: float, words: str, anchor: str = "start", look: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{look}>{words}</text>'


def line(points: list[tuple[float, float]], colour: str, look: str = "") -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}"{look}/>'


def grid(
    axes: Axes, xs: tuple[int, ...], ys: tuple[int, ...], titles: tuple[str, str]
) -> list[str]:
    drawn = []
    for x in xs:
        foot, head = axes.place(x, axes.up[0]), axes.place(x, axes.up[1])
        drawn += [line([foot, head], "#e4e4e4"), text(foot[0], foot[1] + 20, str(x), "middle")]
    for y in ys:
        left, right = axes.place(axes.across[0], y), axes.place(axes.across[1], y)
        drawn += [line([left, right], "#e4e4e4"), text(left[0] - 8, left[1] + 4, str(y), "end")]
    middle = axes.left + PANEL / 2
    drawn.append(text(axes.left, TOP - 22, titles[0], look=' font-weight="bold"'))
    drawn.append(text(middle, BOTTOM + 42, titles[1], "middle"))
    return drawn


def dots(points: list[tuple[float, float]], colour: str) -> list[str]:
    return [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>' for x, y in points]


def draw(on_cards: list[dict], on_workers: list[dict]) -> str:
    """Both panels as SVG."""
    first = Axes(60, (1, 8), (1, 8), is_even=True)
    drawn = grid(first, RANKS, RANKS,
                 ("One clip: times the speed of one card", "cards"))  # fmt: skip
    drawn.append(line([first.place(1, 1), first.place(8, 8)], "#999999", ' stroke-dasharray="2 4"'))
    for number, (name, (_, colour, between)) in enumerate(CARDS.items()):
        own = [row for row in on_cards if row["card"] == name]
        alone = own[0]["step_s"]
        for branches, look in ((1, ""), (2, ' stroke-dasharray="7 5"')):
            points = [
                first.place(row["cards"], alone / row["step_s"])
                for row in own if row["branches"] == branches
            ]  # fmt: skip
            drawn.append(line(points, colour, f' stroke-width="2.5"{look}'))
            drawn += dots(points, colour)
        words = f"{name} ({between}): {alone:.1f} s a step alone"
        drawn.append(text(first.left + 10, TOP + 14 + 18 * number, words, look=f' fill="{colour}"'))
    for number, words in enumerate(("line: ranks", "dashes: a branch each, times ranks")):
        drawn.append(text(first.left + 10, TOP + 54 + 18 * number, words, look=' fill="#777777"'))
    most = max(row["clips_an_hour"] for row in on_workers)
    second = Axes(560, (1, 64), (2, 2 ** (2 + math.ceil(math.log2(most)))))
    ticks = tuple(2**n for n in range(1, 12) if 2**n <= second.up[1])
    drawn += grid(second, WORKERS, ticks, ("Many clips: clips an hour", "workers, a card each"))
    for number, (name, (_, colour, _)) in enumerate(CARDS.items()):
        own = [row for row in on_workers if row["card"] == name]
        points = [second.place(row["workers"], row["clips_an_hour"]) for row in own]
        ideal = [second.place(n, own[0]["clips_an_hour"] * n) for n in (1, 64)]
        drawn.append(line(ideal, "#999999", ' stroke-dasharray="2 4"'))
        drawn += [line(points, colour, ' stroke-width="2.5"'), *dots(points, colour)]
        words = f"{name}; with 64 the driver is busy {own[-1]['driver_percent']:.2g} % of the time"
        drawn.append(
            text(second.left + 10, TOP + 14 + 18 * number, words, look=f' fill="{colour}"')
        )
    title = (
        "97 frames of 960x544, 30 steps, exact bf16; computed, not measured; dots: as many times"
    )
    drawn.insert(0, text(60, 28, f"{title} as cards", look=' fill="#777777"'))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="13" fill="#333333">\n'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>\n'
        + "\n".join(drawn)
        + "\n</svg>\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "web" / "docs" / "scaling.svg")
    given = parser.parse_args()
    on_cards = cards_rows()
    seconds = {row["card"]: row["total_s"] for row in on_cards if row["cards"] == 1}
    on_workers = workers_rows(seconds)
    for row in [*on_cards, *on_workers]:
        print(row)
    given.out.write_text(draw(on_cards, on_workers), encoding="utf-8")
    print(json.dumps({"cards": on_cards, "workers": on_workers}))


if __name__ == "__main__":
    main()
