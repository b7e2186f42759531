"""Sparse attention over density and length, beside dense attention: time, density and error.

    python tests/bench/bench_sparse.py [--device cuda] [--runs 3] [--heads 24] [--beta B]...

Inputs are the six kinds of head of tests/support/heads.py along the Hilbert curve, in bf16, at the
lengths of 97 and 49 frames of 544x960 with 60 tokens of text (51,060 and 26,580), on a CPU 200
tokens. Dense kernels first, then each sparse kernel that is found at each threshold beta, with the
lists that another call chose where it takes any, and our definition in plain torch on a CPU.
Density is the share of the pairs of an image block and any block; errors are relative L2 against
exact attention in float32 on 128 of the queries. What cannot run is listed with its reason. Prints
a table for people and one JSON line for programs.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench_attention import TORCH, Unavailable, fast_attention, torch_attention
from bench_transformer import ignore_row, timed
from comfyui_skyreels.skyreels.kernels import dispatch, sparse
from comfyui_skyreels.skyreels.kernels.sparse import SparseAttention, SparseResult, num_blocks
from comfyui_skyreels.skyreels.transformer import attention, sparse_kernels
from comfyui_skyreels.skyreels.transformer.attention import Attention
from comfyui_skyreels.skyreels.transformer.attention_quality import relative_error
from comfyui_skyreels.skyreels.transformer.token_order import hilbert_order
from support.heads import HEADS, draw_heads
from torch import Tensor

HEAD_DIM = 128
#: tokens in time, height and width of 97 and 49 frames of 544x960; on a CPU
GRIDS, TINY_GRID = ((25, 34, 60), (13, 34, 60)), (3, 8, 8)
TEXT, TINY_TEXT = 60, 8
BETAS = (0.5, 0.85, 1.0, 1.3)
KITCHEN = "comfy-kitchen"

Inputs = tuple[Tensor, Tensor, Tensor]


def make_inputs(
    grid: tuple[int, int, int], text: int, heads: int, device: torch.device, dtype: torch.dtype
) -> Inputs:
    """Heads in the order in which the model works, views of one buffer [1, S, 3, heads, 128]."""
    kinds = min(heads, len(HEADS))
    drawn = draw_heads(kinds, grid=grid, text=text, device=device)
    order = hilbert_order(grid).to(device)
    image, tokens = len(order), len(order) + text
    buffer = torch.empty(1, tokens, 3, heads, HEAD_DIM, device=device, dtype=dtype)
    for place, part in enumerate(drawn):
        rows = part.transpose(1, 2)
        for first in range(0, heads, kinds):
            some = rows[:, :, : heads - first]
            target = buffer[:, :, place, first : first + kinds]
            target[:, :image], target[:, image:] = some[:, order], some[:, image:]
    query, key, value = buffer.permute(2, 0, 3, 1, 4)
    return query, key, value


def kitchen(
    device: torch.device, tokens: int, heads: int, dtype: torch.dtype
) -> dict[str, SparseAttention]:
    """comfy-kitchen's kernel, whether or not it would be chosen.

    Raises:
        Unavailable: it is not installed, or not made for the device.
    """
    info = dispatch.describe(device)
    problem = sparse_kernels.unavailable_reason(KITCHEN, info)
    if problem:
        raise Unavailable(problem)
    size = attention.Size(heads, HEAD_DIM, tokens, dtype)
    return {KITCHEN: sparse_kernels.SPARSE_KERNELS[KITCHEN](info, device, size)}


def ours(device: torch.device) -> dict[str, SparseAttention]:
    """Our kernel in each precision that it has for a device; the definition on a CPU.

    Raises:
        Unavailable: it does not run there.
    """
    if device.type == "cpu":
        return {"plain torch": sparse.sparse_attention}
    info = dispatch.describe(device)
    problem = dispatch.triton_problem(info)
    if problem:
        raise Unavailable(problem)
    from comfyui_skyreels.skyreels.kernels.triton import sparse as triton_sparse

    found: dict[str, SparseAttention] = {}
    for tile in triton_sparse.tiles(info.capability or (0, 0)):
        values = dispatch.short(tile.values.dtype) if tile.values else "16 bits"
        name = f"Triton, int8 and {values}" if tile.is_int8 else "Triton, 16 bits"

        def attend(
            query: Tensor, key: Tensor, value: Tensor, beta: float, count: int,
            exact: Tensor | None, tile: triton_sparse.Tile = tile,
        ) -> SparseResult:  # fmt: skip
            return triton_sparse.sparse_attention(
                query, key, value, beta=beta, num_image_blocks=count, exact=exact, tile=tile
            )

        found[name] = attend
    return found


def dense_rows(
    device: torch.device, dtype: torch.dtype
) -> Iterable[tuple[str, Callable[[], Attention]]]:
    """Exact attention by the fastest of torch's kernels, and those in 8 bits."""
    exact = "cuDNN" if device.type == "cuda" else "flash"
    yield f"{exact}, exact", partial(torch_attention, TORCH[exact])
    for name in attention.FAST:
        yield f"{name}, 8 bits", partial(fast_attention, name, device, dtype)


def measure_dense(attend: Attention, inputs: Inputs, runs: int) -> dict:
    """Milliseconds and error."""
    call = partial(attend, *inputs)
    error = relative_error(attend, inputs)
    seconds = statistics.median(timed(call, inputs[0].device) for _ in range(runs))
    return {"ms": round(1e3 * seconds, 3), "density": 1.0, "error": float(f"{error:.3g}")}


def loaded_and_measured(load: Callable[[], Attention], inputs: Inputs, runs: int) -> dict:
    """The same, of what is to be loaded."""
    return measure_dense(load(), inputs, runs)


def measure_sparse(
    attend: SparseAttention, inputs: Inputs, beta: float, count: int, exact: Tensor | None,
    runs: int,
) -> dict:  # fmt: skip
    """Milliseconds, density and error, with lists of its own or with those given.

    Args:
        count: blocks of the image.
        exact: given lists.
    """
    result = attend(*inputs, beta, count, exact)
    row = measure_dense(lambda q, k, v: attend(q, k, v, beta, count, exact).out, inputs, runs)
    text = num_blocks(inputs[1].shape[2]) - count
    density = (result.counts.float().mean().item() + text) / (count + text)
    return row | {"density": round(density, 4)}


@torch.inference_mode()
def run(
    *,
    beta: Sequence[float] = (),
    heads: int | None = None,
    device: str = "cpu",
    runs: int = 3,
    dtype: torch.dtype = torch.bfloat16,
    emit: Callable[[dict], None] = ignore_row,
) -> dict:
    """Rows of what ran, and reasons of what did not.

    Args:
        beta: thresholds.
        emit: is handed each row as soon as it is measured.
    """
    where = torch.device(device)
    is_gpu = where.type == "cuda"
    if is_gpu:
        where = torch.empty(0, device=where).device
    heads = heads or (24 if is_gpu else 2)
    rows: list[dict] = []
    unavailable: dict[str, str] = {}

    def add(name: str, tokens: int, measure: Callable[[], dict]) -> None:
        row: dict = {"name": name, "tokens": tokens}
        try:
            row |= measure()
            rows.append(row)
        except Unavailable as reason:
            row["unavailable"] = unavailable[name] = str(reason)
        except Exception as error:
            row["failed"] = unavailable[name] = f"{type(error).__name__}: {str(error)[:300]}"
            if dispatch.broke_device(error):
                emit(row)
                raise
        emit(row)

    for grid in GRIDS if is_gpu else (TINY_GRID,):
        inputs = make_inputs(grid, TEXT if is_gpu else TINY_TEXT, heads, where, dtype)
        tokens, count = inputs[0].shape[2], math.prod(grid) // sparse.BLOCK
        for name, load in dense_rows(where, dtype):
            add(name, tokens, partial(loaded_and_measured, load, inputs, runs))
        found: dict[str, SparseAttention] = {}
        for name, find in (
            (f"{KITCHEN}, sparse", partial(kitchen, where, tokens, heads, dtype)),
            ("Triton, sparse", partial(ours, where)),
        ):
            try:
                found |= find()
            except Exception as reason:  # noqa: BLE001 - the other still has its turn
                unavailable[name] = str(reason)
                emit({"name": name, "tokens": tokens, "unavailable": unavailable[name]})
        for name, attend in found.items():
            for threshold in beta or BETAS:
                add(f"{name}, beta {threshold}", tokens, partial(
                    measure_sparse, attend, inputs, threshold, count, None, runs
                ))  # fmt: skip
            if name != KITCHEN:  # that takes no lists
                given = sparse.pack(sparse.route(*inputs[:2], 0.85, count))
                add(f"{name}, given lists", tokens, partial(
                    measure_sparse, attend, inputs, 0.85, count, given, runs
                ))  # fmt: skip
    return {
        "bench": "sparse attention",
        "device": torch.cuda.get_device_name(where) if is_gpu else "cpu",
        "torch": torch.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "heads": heads,
        "runs": runs,
        "rows": rows,
        "unavailable": unavailable,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--heads", type=int)
    parser.add_argument("--beta", type=float, action="append", default=[])
    result = run(**vars(parser.parse_args()))
    print(f"{'kernel':40}{'tokens':>8}{'ms':>10}{'density':>10}{'error':>10}")
    for row in result["rows"]:
        print(f"{row['name']:40}{row['tokens']:8}{row['ms']:10.3f}"
              f"{row['density']:10.3f}{row['error']:10.2g}")  # fmt: skip
    for name, reason in result["unavailable"].items():
        print(f"{name:40}{reason}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
