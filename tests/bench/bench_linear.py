"""Time the products of 8-bit linear layers beside bfloat16's, and measure their error.

    python tests/bench/bench_linear.py [--device cuda] [--tokens 51256] [--runs 5]

The shapes are those of a block: (9216, 3072) query, key, value; (3072, 3072) the projection after
attention; (12288, 3072) and (3072, 12288) the MLP; (3072, 15360) attention and MLP at once, as
single blocks of other implementations take it. Every product that the device has is timed, also
those that would not be its first choice (int8: our Triton kernel, which scales inside, and torch's
with the scales after it), with the input already rounded (the fused kernels do that;
"rounding" is what it takes alone). The error is that of the whole layer, input and weight rounded,
against float32. Without a GPU the shapes are an eighth as wide and the tokens few: a check that
everything runs, not a measurement. Prints a table, then one line of JSON.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench_transformer import ignore_row, timed
from comfyui_skyreels.skyreels import kernels
from comfyui_skyreels.skyreels.kernels import QuantFormat, QuantizedActivation, dispatch
from comfyui_skyreels.skyreels.transformer import quant

#: out and in features
SHAPES = ((9216, 3072), (3072, 3072), (12288, 3072), (3072, 12288), (3072, 15360))
#: tokens whose float32 result is computed
ERROR_TOKENS = 1024


def candidates(device: torch.device) -> list[tuple[str, torch.dtype, str]]:
    """(precision, dtype, gemm) of everything that could multiply 8 bits there."""
    listed = quant.GEMMS.get(device.type, {})
    return [
        (precision, dtype, gemm)
        for precision, dtype in quant.STORAGE_DTYPES.items()
        for gemm in listed.get(dtype, ())
    ]


def layer_row(name: str, function, x, weight, runs: int) -> dict:
    """Median seconds and TFLOP/s of `function(x)`, and its relative error on some tokens."""
    head = x[:, :ERROR_TOKENS]
    exact = head[0].float() @ weight.float().T
    error = ((function(head)[0].float() - exact).norm() / exact.norm()).item()
    function(x)
    seconds = statistics.median(timed(lambda: function(x), x.device) for _ in range(runs))
    tflops = 2 * x.shape[1] * weight.numel() / seconds / 1e12
    return {
        "name": name, "ms": round(1e3 * seconds, 4), "tflops": round(tflops, 4),
        "error": round(error, 5),
    }  # fmt: skip


def shape_rows(
    x: torch.Tensor, weight: torch.Tensor, runs: int, emit: Callable[[dict], None]
) -> list[dict]:
    """bfloat16, then every 8-bit product, or why it does not run."""
    device, bias = x.device, torch.zeros(len(weight), device=x.device, dtype=x.dtype)
    rows = [layer_row("bf16", lambda part: F.linear(part, weight, bias), x, weight, runs)]
    emit(rows[0])
    for precision, dtype, gemm in candidates(device):
        name = f"{precision}: {gemm}"
        finding = quant.probe_gemm(gemm, dtype, device)
        if not finding.is_accepted:
            rows.append({"name": name, "skipped": f"self-test failed, {finding}"})
            emit(rows[-1])
            continue
        block = quant.hadamard_block_size(weight.shape[1]) if precision == "int8" else 0
        stored, scale = quant.quantize(weight, dtype, block)
        to = QuantFormat(dtype, block)
        rounded = {}  # by length, before the clock starts

        def function(part, gemm=gemm, stored=stored, scale=scale, to=to, rounded=rounded):
            if part.shape[1] not in rounded:
                rounded[part.shape[1]] = kernels.quantize_rows(part, to)
            tokens = QuantizedActivation(*(each[0] for each in rounded[part.shape[1]]))
            return quant.multiply(gemm, tokens, stored, scale, bias, torch.bfloat16)[None]

        row = layer_row(name, function, x, weight, runs)
        kernels.quantize_rows(x, to)
        row["rounding_ms"] = round(
            1e3 * statistics.median(
                timed(lambda to=to: kernels.quantize_rows(x, to), device) for _ in range(runs)
            ), 4,
        )  # fmt: skip
        row["ratio_to_bf16"] = round(rows[0]["ms"] / row["ms"], 3)
        rows.append(row)
        emit(row)
    return rows


@torch.inference_mode()
def run(
    *,
    tokens: int | None = None,
    runs: int = 5,
    device: str = "cpu",
    emit: Callable[[dict], None] = ignore_row,
) -> dict:
    """Every shape by every product.

    Args:
        tokens: None is 51,256 on a GPU and 64 elsewhere.
        emit: is handed each row, with its shape, as soon as it is measured.
    """
    where = torch.device(device)
    on_gpu = where.type == "cuda"
    tokens = tokens or (51256 if on_gpu else 64)
    generator = torch.Generator(where).manual_seed(0)
    result = {
        "bench": "linear", "tokens": tokens, "runs": runs, "torch": torch.__version__,
        "device": torch.cuda.get_device_name(where) if on_gpu else str(where),
        "chosen": dispatch.report(quant.decisions(where)), "shapes": {},
    }  # fmt: skip
    for out_features, in_features in SHAPES:
        if not on_gpu:
            out_features, in_features = out_features // 8, in_features // 8
        options = {"device": where, "dtype": torch.bfloat16, "generator": generator}
        x = torch.randn(1, tokens, in_features, **options)
        weight = 0.02 * torch.randn(out_features, in_features, **options)
        shape = f"{out_features}x{in_features}"
        result["shapes"][shape] = shape_rows(
            x, weight, runs, lambda row, shape=shape: emit({"shape": shape, **row})
        )
        del x, weight
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    result = run(**vars(parser.parse_args()))
    for line in result["chosen"].items():
        print(": ".join(line))
    for shape, rows in result["shapes"].items():
        for row in rows:
            if "skipped" in row:
                print(f"{shape:12} {row['name']:28} {row['skipped']}")
                continue
            extra = f"  rounding {row['rounding_ms']:8.3f} ms" if "rounding_ms" in row else ""
            print(
                f"{shape:12} {row['name']:28} {row['ms']:9.3f} ms {row['tflops']:8.2f} TFLOP/s"
                f"  error {row['error']:.4f}{extra}"
            )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
