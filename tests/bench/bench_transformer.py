"""One forward pass beside diffusers', same weights, same process.

    python tests/bench/bench_transformer.py [--tokens 2048] [--runs 7] [--dtype fp32] [--device cpu]

Prints a table for people and one JSON line for programs. The two take turns, so a drifting machine
slows both.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from comfyui_skyreels.skyreels.config import TransformerConfig
from support import tiny

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def ignore_row(row: dict) -> None:
    """Take a row that was just measured and do nothing with it."""


def timed(function, device: torch.device) -> float:
    """Seconds of one call, which is over when the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.inference_mode()
def run(
    *, tokens: int = 2048, runs: int = 7, dtype: str = "fp32", device: str = "cpu", heads: int = 4
) -> dict:
    """Median seconds of a 2 + 2 block model, ours and diffusers', and the largest difference."""
    config = TransformerConfig(
        num_attention_heads=heads, num_layers=2, num_single_layers=2, num_refiner_layers=1,
        text_embed_dim=256, pooled_projection_dim=64,
    )  # fmt: skip
    where = torch.device(device)
    ours = tiny.transformer(config).to(where, DTYPES[dtype])
    theirs = tiny.diffusers_transformer(ours.float()).to(where, DTYPES[dtype])
    ours = ours.to(DTYPES[dtype])
    side = 32
    frames = max(1, tokens // (side * side // 4))
    inputs = tiny.inputs(config, text_tokens=60, grid=(frames, side, side))
    keep = ("timestep", "guidance")
    inputs = {k: v.to(where, torch.float32 if k in keep else DTYPES[dtype])
              for k, v in inputs.items()}  # fmt: skip
    padded = dict(inputs)
    # what the diffusers pipeline feeds: 256 text tokens and a mask over the padding
    states = inputs["encoder_hidden_states"]
    padded["encoder_hidden_states"] = torch.nn.functional.pad(states, (0, 0, 0, 256 - 60))
    mask = torch.zeros(1, 256, dtype=torch.long, device=where)
    mask[:, :60] = 1
    # and the kinder comparison: trimmed text for both
    trimmed_mask = torch.ones(1, 60, dtype=torch.long, device=where)
    contenders = {
        "ours": lambda: ours(**inputs),
        "diffusers, trimmed": lambda: theirs(
            **inputs, encoder_attention_mask=trimmed_mask, return_dict=False
        )[0],
        "diffusers, padded": lambda: theirs(
            **padded, encoder_attention_mask=mask, return_dict=False
        )[0],
    }
    outputs = {name: function() for name, function in contenders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(runs):
        for name, function in contenders.items():
            seconds[name].append(timed(function, where))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "bench": "transformer",
        "tokens": frames * side * side // 4,
        "dtype": dtype,
        "device": torch.cuda.get_device_name() if where.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "runs": runs,
        "median_s": {name: round(value, 4) for name, value in medians.items()},
        "ratio_to_trimmed": round(medians["ours"] / medians["diffusers, trimmed"], 3),
        "ratio_to_padded": round(medians["ours"] / medians["diffusers, padded"], 3),
        "relative_error": tiny.relative_error(
            outputs["ours"].float(), outputs["diffusers, trimmed"].float()
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", default="cpu")
    result = run(**vars(parser.parse_args()))
    for name, seconds in result["median_s"].items():
        print(f"{name:20} {seconds:8.4f} s")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
