"""Every attention that can be had on a device, at the length of a clip: time, rate and error.

    python tests/bench/bench_attention.py [--device cuda] [--runs 3] [--tokens N]... [--heads 24]

torch's kernels one by one, with and without the boolean mask over padded text that other
implementations pass (the last 196 of 256 text tokens), then each kernel in 8 bits that is found,
ours among them. Without --tokens: 51,256 and 51,060 on a GPU (97 frames of 544x960 with text padded
to 256 tokens and trimmed to 60), 331 and 300 with two heads on a CPU. Errors are relative L2
against float32 on 96 of the queries. What cannot run is listed with its reason. Prints a table for
people and one JSON line for programs.
"""

import argparse
import json
import statistics
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import conftest  # noqa: F401 - loads the package the way ComfyUI does
from bench_transformer import timed
from comfyui_skyreels.skyreels import attention
from comfyui_skyreels.skyreels.attention import Attention
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

HEAD_DIM, PADDING = 128, 196
CHECKED_QUERIES = 96
TORCH = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


class Unavailable(Exception):  # noqa: N818 - not an error
    """What cannot be measured here, and why."""


def torch_attention(backend: SDPBackend, mask: Tensor | None) -> Attention:
    """Attention by one of torch's kernels alone, which says in warnings why it will not."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if query.device.type == "cpu" and backend in (TORCH["cuDNN"], TORCH["memory-efficient"]):
            raise Unavailable("torch has it for GPUs only")
        scores = attention.score_bytes(query, key)
        if backend == SDPBackend.MATH and scores > attention.MAX_SCORE_BYTES:
            raise Unavailable(f"would need {scores:,} bytes for its scores")
        with warnings.catch_warnings(record=True) as said, sdpa_kernel(backend):
            warnings.simplefilter("always")
            try:
                return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
            except RuntimeError as error:
                texts = [str(warning.message).partition(" (Triggered")[0] for warning in said]
                raise Unavailable("; ".join(texts) or str(error).splitlines()[0]) from None

    return attend


def fast_attention(name: str, device: torch.device, dtype: torch.dtype) -> Attention:
    """One of attention.FAST, whether or not it would be chosen."""
    fast = attention.FAST[name]
    hindrance = attention._hindrance(fast, attention.describe(device))
    if hindrance:
        raise Unavailable(hindrance)
    return fast.load(device, HEAD_DIM, dtype)


def exact_rows(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of the checked queries in float32, one head at a time."""
    heads = []
    for q, k, v in zip(*(x[0].float() for x in (query, key, value)), strict=True):
        scores = q @ k.T * HEAD_DIM**-0.5
        if mask is not None:
            scores = scores.masked_fill(~mask[0, 0], float("-inf"))
        heads.append(scores.softmax(dim=-1) @ v)
    return torch.stack(heads)[None]


def measure(
    attend: Attention, inputs: Sequence[Tensor], mask: Tensor | None, runs: int
) -> dict[str, float]:
    """Milliseconds, TFLOP/s and error of an attention."""
    query, key, value = inputs
    device, tokens = query.device, query.shape[2]
    chosen = torch.linspace(0, tokens - 1, min(CHECKED_QUERIES, tokens), device=device).long()
    got = attend(query, key, value)[:, :, chosen].float()
    expected = exact_rows(query[:, :, chosen], key, value, mask)
    error = ((got - expected).norm() / expected.norm()).item()
    del got, expected
    seconds = statistics.median(timed(lambda: attend(*inputs), device) for _ in range(runs))
    flop = 4 * query.shape[0] * query.shape[1] * tokens * tokens * HEAD_DIM
    return {"ms": round(seconds * 1e3, 3), "tflops": round(flop / seconds / 1e12, 3),
            "error": float(f"{error:.3g}")}  # fmt: skip


@torch.inference_mode()
def run(
    *,
    tokens: Sequence[int] = (),
    heads: int | None = None,
    device: str = "cpu",
    runs: int = 3,
    dtype: torch.dtype = torch.bfloat16,
) -> dict:
    """Rows of what ran, reasons of what did not, and what would be chosen."""
    where = torch.device(device)
    is_gpu = where.type == "cuda"
    rows: list[dict] = []
    unavailable: dict[str, str] = {}

    def add(name: str, inputs: Sequence[Tensor], mask: Tensor | None, make) -> None:
        label = name if mask is None else f"{name}, masked"
        try:
            figures = measure(make(), inputs, mask, runs)
            rows.append({"name": label, "tokens": inputs[0].shape[2], **figures})
        except Unavailable as reason:
            unavailable[label] = str(reason)
        except Exception as error:  # noqa: BLE001 - the other kernels still have their turn
            unavailable[label] = f"{type(error).__name__}: {str(error)[:300]}"

    for length in tokens or ((51_256, 51_060) if is_gpu else (331, 300)):
        made = attention.probe_inputs(length, heads or (24 if is_gpu else 2), HEAD_DIM, where)
        inputs = torch.stack([x.transpose(1, 2) for x in made], dim=2).to(dtype)
        inputs = inputs.permute(2, 0, 3, 1, 4).unbind(0)  # views of one buffer, as in the model
        del made
        key_mask = torch.ones(1, 1, 1, length, dtype=torch.bool, device=where)
        key_mask[..., -PADDING:] = False
        for name, backend in TORCH.items():
            for mask in (None, key_mask):
                add(name, inputs, mask, lambda b=backend, m=mask: torch_attention(b, m))
        for name in attention.FAST:
            add(f"{name}, 8 bits", inputs, None, lambda n=name: fast_attention(n, where, dtype))
        if not is_gpu:  # nobody's choice, but the error of its arithmetic
            add("ours in plain torch, 8 bits", inputs, None, lambda: attention.int8_attention)
        del inputs
    choices = {
        mode: attention.choose_attention(where, mode, head_dim=HEAD_DIM, dtype=dtype)
        for mode in attention.MODES
    }
    return {
        "bench": "attention",
        "device": torch.cuda.get_device_name(where) if is_gpu else "cpu",
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version() if is_gpu else None,
        "dtype": str(dtype).removeprefix("torch."),
        "heads": heads or (24 if is_gpu else 2),
        "runs": runs,
        "rows": rows,
        "unavailable": unavailable,
        "choices": {mode: f"{choice.name}: {choice.reason}" for mode, choice in choices.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--tokens", type=int, action="append", default=[])
    parser.add_argument("--heads", type=int)
    result = run(**vars(parser.parse_args()))
    print(f"{'kernel':32}{'tokens':>8}{'ms':>10}{'TFLOP/s':>10}{'error':>10}")
    for row in result["rows"]:
        figures = f"{row['tokens']:8}{row['ms']:10.3f}{row['tflops']:10.3f}{row['error']:10.2g}"
        print(f"{row['name']:32}{figures}")
    for name, reason in (result["unavailable"] | result["choices"]).items():
        print(f"{name:32}{reason}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
