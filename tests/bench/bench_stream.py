"""What streaming weights costs: simulated for small cards, measured on the device at hand.

    python tests/bench/bench_stream.py [--device cuda] [--blocks 12] [--runs 5]

Simulated: the full-size model at 51,060 tokens, seconds of a block from tests/bench/LOG.md and
published rates, on cards that leave so many bytes for blocks, over links of 25, 12 and 6 GB/s: with
one branch of guidance after the other, and with both branches in each block that arrives.
Measured on a GPU: the link from page-locked memory, through the ring and from pageable memory; then
blocks of one matrix each, in twelve passes, resident and streamed, the latter one pass after the
other and two at once, beside the simulator fed with the measured link and seconds. Measured without
a GPU: what the stream itself takes of the host for each block. All seconds are those of one pass.
Prints a table, then one line of JSON.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench_transformer import ignore_row, timed
from comfyui_skyreels.skyreels.runtime.offload import page_lock, page_unlock, whole_pages
from comfyui_skyreels.skyreels.runtime.streaming import (
    SLOTS,
    BlockStream,
    choose_resident,
    cut_sources,
    least_bytes,
    open_copies,
    padded_bytes,
    page_lock_ends,
    simulate,
)

#: bytes of the blocks without their modulation
BF16 = [453_000_000] * 20 + [226_500_000] * 40
FP8 = [size // 2 for size in BF16]
#: seconds of one block at 51,060 tokens, a double and a single one alike
BLOCK_S = {
    "H100 bf16": 0.063, "H100 8-bit": 0.048, "4090 bf16": 0.268, "4090 8-bit": 0.110,
}  # fmt: skip
LINKS_GB_PER_S = (25, 12, 6)
#: what a card of so many GB leaves for blocks and slots beside the activations
ROOM = {"8 GB": 4.2e9, "12 GB": 7.5e9, "16 GB": 11.3e9, "nothing stays": 0}
#: model evaluations of a run, and those that are timed in a row
EVALUATIONS, PASSES = 60, 12


def simulated(emit: Callable[[dict], None]) -> list[dict]:
    """A row for each speed, precision and card: what is streamed, and the stall over each link."""
    rows = []
    for speed, block_s in BLOCK_S.items():
        for precision, sizes in (("bf16", BF16), ("8-bit", FP8)):
            for card, room in ROOM.items():
                resident = choose_resident(sizes, max(int(room), least_bytes(sizes)))
                row = {"speed": speed, "weights": precision, "card": card}
                row["streamed_gb"] = sum(
                    size for index, size in enumerate(sizes) if index not in resident
                ) / 1e9  # fmt: skip
                for link in LINKS_GB_PER_S:
                    played = simulate(
                        sizes, [block_s] * len(sizes), resident, link * 1e9, passes=EVALUATIONS
                    )
                    both = simulate(
                        sizes, [2 * block_s] * len(sizes), resident, link * 1e9,
                        passes=EVALUATIONS // 2,
                    )  # fmt: skip
                    computed = EVALUATIONS * len(sizes) * block_s
                    row[f"stall_at_{link}"] = round(played.stall_s / computed, 4)
                    row[f"both_stall_at_{link}"] = round(both.stall_s / computed, 4)
                rows.append(row)
                emit(row)
    return rows


def stream_of(
    blocks: Sequence[list[Tensor]], device: torch.device, way: str, stack: ExitStack
) -> BlockStream:
    """A stream with no block on the device, its sources page-locked or not."""
    copies = open_copies(device)
    sources = None
    if way == "page-locked" and copies.runs_beside:
        locked = whole_pages([tensor for block in blocks for tensor in block])
        for memory in locked:
            page_lock(memory)
            stack.callback(page_unlock, memory)
        sources = cut_sources(blocks, locked)
        page_lock_ends(sources)
    if way == "ring":
        copies.stage()
    num_bytes = max(map(padded_bytes, blocks))
    count = SLOTS if copies.runs_beside else 1
    slots = [torch.empty(num_bytes, dtype=torch.uint8, device=device) for _ in range(count)]
    in_background = way in ("ring", "pageable")
    stream = BlockStream(blocks, slots, copies, sources=sources, in_background=in_background)
    stack.callback(stream.close)
    stream.start()
    return stream


def passes(
    stream: BlockStream, count: int, run: Callable[[int], object], together: int = 1
) -> None:
    """Some forward passes in a row, so many of them block by block."""
    for _ in range(PASSES // together):
        for position in range(count):
            for _ in range(together):
                stream.run(position, run, position)


def nothing(position: int) -> None:
    """A block that takes no time."""


@torch.inference_mode()
def run(
    *, blocks: int = 12, runs: int = 5, device: str = "cpu",
    emit: Callable[[dict], None] = ignore_row,
) -> dict:  # fmt: skip
    """Everything, as one result."""
    where = torch.device(device)
    on_gpu = where.type == "cuda"
    result = {
        "bench": "stream", "blocks": blocks, "runs": runs, "torch": torch.__version__,
        "device": torch.cuda.get_device_name(where) if on_gpu else str(where),
        "simulated": simulated(emit), "measured": [],
    }  # fmt: skip
    rows, columns, tokens = (8192, 8192, 16_384) if on_gpu else (64, 64, 64)
    weights = [[torch.randn(rows, columns).bfloat16()] for _ in range(blocks)]
    total = sum(block[0].nbytes for block in weights)
    x = torch.randn(tokens, columns, device=where, dtype=torch.bfloat16)
    there = [block[0].to(where) for block in weights]

    def resident() -> None:
        for _ in range(PASSES):
            for weight in there:
                x @ weight.T

    def compute(position: int) -> None:
        x @ weights[position][0].T

    resident()
    resident_s = statistics.median(timed(resident, where) for _ in range(runs)) / PASSES
    for way in ("page-locked", "ring", "pageable") if on_gpu else ("in order",):
        with ExitStack() as stack:
            stream = stream_of(weights, where, way, stack)
            row = {"way": way, "resident_s": round(resident_s, 6)}
            for name, block, together in (
                ("copies_s", nothing, 1), ("streamed_s", compute, 1), ("both_s", compute, 2),
            ):  # fmt: skip
                function = partial(passes, stream, blocks, block, together)
                function()
                taken = [timed(function, where) for _ in range(runs)]
                row[name] = round(statistics.median(taken) / PASSES, 6)
        row["gb_per_s"] = round(total / row["copies_s"] / 1e9, 3)
        for name, together in (("simulated_s", 1), ("simulated_both_s", 2)):
            played = simulate(
                [total // blocks] * blocks, [together * resident_s / blocks] * blocks, frozenset(),
                1e9 * row["gb_per_s"], passes=PASSES // together,
            )  # fmt: skip
            row[name] = round(played.seconds / PASSES, 6)
        result["measured"].append(row)
        emit(row)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    result = run(**vars(parser.parse_args()))
    heading = f"{'speed':12} {'weights':8} {'card':14} {'streamed':>9}  "
    print(f"{heading}{'stall at 25, 12, 6 GB/s':30}with both branches in each block")
    for row in result["simulated"]:
        stalls = "  ".join(
            f"{100 * row[f'{kind}stall_at_{link}']:6.2f} %"
            for kind in ("", "both_")
            for link in LINKS_GB_PER_S
        )
        print(
            f"{row['speed']:12} {row['weights']:8} {row['card']:14} {row['streamed_gb']:6.2f} GB  "
            f"{stalls}"
        )
    for row in result["measured"]:
        print(
            f"{row['way']:12} {row['gb_per_s']:8.2f} GB/s  resident {1e3 * row['resident_s']:8.3f} "
            f"ms  streamed {1e3 * row['streamed_s']:8.3f} ms (simulated "
            f"{1e3 * row['simulated_s']:.3f})  both branches {1e3 * row['both_s']:8.3f} ms "
            f"(simulated {1e3 * row['simulated_both_s']:.3f})"
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
