"""The fused operators beside eager code: time, memory rate and error of each.

    python tests/bench/bench_kernels.py [--tokens 51000] [--runs 20] [--dtype bf16] [--device cuda]

Prints a table for people and one JSON line for programs. `runs` says which implementation an
operator has on the device; without a GPU that is plain torch, and its time says nothing about the
kernels. Rates are the bytes that the operator must read and write, once each, per second.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench_transformer import DTYPES, ignore_row, timed
from comfyui_skyreels.skyreels import kernels
from comfyui_skyreels.skyreels.kernels import operators
from support.kernel_cases import EAGER, FP8, INT8, Case, error, inputs, results, truth

WIDTH, HEADS, HEAD_DIM = 3072, 24, 128
#: tokens on which the error is measured: float64 copies of all would not fit
ERROR_TOKENS = 512


def cases(tokens: int, dtype: torch.dtype, width: int = WIDTH) -> list[Case]:
    """Every operator at the widths of the model, for an input of so many tokens."""
    heads = max(1, width // HEAD_DIM)
    dim = width // heads
    text = min(60, tokens // 2)
    row, inner = (1, tokens, width), (1, min(tokens, 8192), 4 * width)
    formats = ((FP8, 0), (INT8, min(256, width & -width)))
    # a piece of the last level of the video VAE at 544 x 960, or a little of one
    clip = (1, 128, 13, 544, 960) if tokens > 4096 else (1, 128, 2, 40, 64)
    return [
        Case("layer_norm_modulate", row, dtype),
        *(Case("layer_norm_modulate_quantize", row, dtype, *f) for f in formats),
        Case("residual_layer_norm_modulate", row, dtype),
        *(Case("residual_layer_norm_modulate_quantize", row, dtype, *f) for f in formats),
        Case("gated_residual", row, dtype),
        Case("gated_residual_sum", row, dtype),
        Case("qk_norm_rope_", (1, tokens, 3, heads, dim), dtype, image_tokens=tokens - text),
        *(Case("quantize_rows", row, dtype, *f) for f in formats),
        *(Case("gelu_quantize", inner, dtype, *f) for f in formats),
        Case("channel_moments", clip, dtype),
        Case("norm_silu_pad_", clip, dtype, front=2),
        Case("residual_add_", clip, dtype),
        Case("residual_add_moments_", clip, dtype),
        *(Case(name, (*clip[:3], clip[3] // 2, clip[4] // 2), dtype, copies=4)
          for name in ("interleave_", "interleave_moments_")),
    ]  # fmt: skip


def moved_bytes(case: Case, args: tuple, outputs: list[torch.Tensor]) -> int:
    """Bytes that must be read and written once; of an operator in place, queries and keys twice."""
    total = sum(a.numel() * a.element_size() for a in (*args, *outputs) if _is_tensor(a))
    if case.operator == "qk_norm_rope_":
        total += args[0].numel() * args[0].element_size() // 3
    return total


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def _outputs(function: Callable, args: tuple) -> list[torch.Tensor]:
    returned = function(*args)
    if returned is None:
        return []
    return [returned] if _is_tensor(returned) else list(returned)


def _shortened(case: Case) -> Case:
    if case.operator in ("interleave_", "interleave_moments_"):
        return case._replace(shape=(1, 128, 2, 20, 32))
    if len(case.shape) == 5 and case.operator != "qk_norm_rope_":
        return case._replace(shape=(1, 128, 2, 40, 64))
    tokens = min(ERROR_TOKENS, case.shape[1])
    return case._replace(
        shape=(1, tokens, *case.shape[2:]), image_tokens=min(case.image_tokens, tokens // 2)
    )


def seconds_per_call(function: Callable, device: torch.device, calls: int = 5) -> float:
    """On a GPU between two events around some calls, so that starting them does not count."""
    if device.type != "cuda":
        return timed(function, device)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        function()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3 / calls


@torch.inference_mode()
def measure(case: Case, device: torch.device, runs: int) -> dict:
    """One row of the table; fused and eager take turns, so a drifting machine slows both."""
    operator = getattr(getattr(torch.ops, kernels.NAMESPACE), case.operator).default
    eager = EAGER[case.operator]
    short = _shortened(case)
    args = inputs(short, device)
    exact = truth(short, args)
    errors = [error(results(function, short, args), exact) for function in (operator, eager)]
    args = inputs(case, device)
    size = moved_bytes(case, args, _outputs(operator, args))
    seconds: list[list[float]] = [[], []]
    for turn in range(runs + 1):
        for function, taken in zip((operator, eager), seconds, strict=True):
            elapsed = seconds_per_call(lambda function=function: function(*args), device)
            if turn:  # the first compiles and warms up
                taken.append(elapsed)
    fused_s, eager_s = (statistics.median(each) for each in seconds)
    return {
        "operator": case.operator,
        "shape": list(case.shape),
        "to": None if case.to is None else str(case.to)[6:],
        "rotation": case.hadamard_block,
        "fused_ms": round(fused_s * 1e3, 4),
        "eager_ms": round(eager_s * 1e3, 4),
        "speedup": round(eager_s / fused_s, 2),
        "gb_per_s": round(size / fused_s / 1e9, 1),
        "error": errors[0],
        "error_to_eager_error": round(errors[0] / errors[1], 3) if errors[1] else None,
        "runs": operators.choose(case.operator, device, case.to).reason,
    }


def _indexed(device: str) -> torch.device:
    where = torch.device(device)
    if where.type == "cuda" and where.index is None:
        where = torch.device("cuda", torch.cuda.current_device())
    return where


def run(
    *, tokens: int = 51_000, runs: int = 20, dtype: str = "bf16", device: str = "cpu",
    width: int = WIDTH, emit: Callable[[dict], None] = ignore_row,
) -> dict:  # fmt: skip
    """Every operator measured, and whether each loses at most 1.2 times what eager code loses.

    Args:
        emit: is handed each row as soon as it is measured, also one that "failed".
    """
    where = _indexed(device)
    rows, failed = [], {}
    for case in cases(tokens, DTYPES[dtype], width):
        try:
            rows.append(measure(case, where, runs))
            emit(rows[-1])
        except Exception as error:  # noqa: BLE001 - the other operators still have their turn
            failed[str(case)] = f"{type(error).__name__}: {str(error)[:300]}"
            emit({"operator": str(case), "failed": failed[str(case)]})
    worst = max((row["error_to_eager_error"] or 0.0 for row in rows), default=None)
    return {
        "bench": "kernels",
        "device": torch.cuda.get_device_name(where) if where.type == "cuda" else where.type,
        "torch": torch.__version__,
        "tokens": tokens,
        "dtype": dtype,
        "timed_runs": runs,
        "fused": sum("self-test passed" in row["runs"] for row in rows),
        "operators": len(rows),
        "worst_error_to_eager_error": worst,
        "failed": failed,
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=None)
    parser.add_argument("--runs", type=int, default=None)
    parser.add_argument("--width", type=int, default=None)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = vars(parser.parse_args())
    small = {"tokens": 256, "runs": 3, "width": 512} if arguments["device"] == "cpu" else {}
    result = run(**small | {name: value for name, value in arguments.items() if value is not None})
    head = ("fused ms", "eager ms", "GB/s", "error")
    print(f"{'operator':38} {'to':14}", *(f"{name:>9}" for name in head), " runs")
    for row in result["rows"]:
        to = (row["to"] or "") + (f" rot {row['rotation']}" if row["rotation"] else "")
        print(
            f"{row['operator']:38} {to:14} {row['fused_ms']:9.3f} {row['eager_ms']:9.3f} "
            f"{row['gb_per_s']:9.1f} {row['error']:9.2e}  {row['runs']}"
        )
    for name, reason in result["failed"].items():
        print(f"{name}: {reason}")
    if not result["fused"]:
        print("No kernel ran here: the times compare plain torch with plain torch.")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
