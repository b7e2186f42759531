"""Every attention that can be had on a device, at the length of a clip: time, rate and error.

    python tests/bench/bench_attention.py [--device cuda] [--runs 3] [--tokens N]... [--heads 24]

torch's kernels one by one, with and without the boolean mask over padded text that other
implementations pass (the last 196 of 256 text tokens), then each kernel in 8 bits that is found,
ours among them, and comfy-kitchen's sparse one. Without --tokens: 51,060 on a GPU and 51,256 with
the mask (97 frames of 544x960 with text trimmed to 60 tokens and padded to 256), 300 and 331 with
two heads on a CPU. Errors are relative L2 against float32 on 128 of the queries, for each kind of
input in skyreels/transformer/attention_quality.py. What cannot run is listed with its reason.
Prints a table for people and one JSON line for programs.
"""

import argparse
import json
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import conftest  # noqa: F401 - loads the package the way ComfyUI does
from bench_transformer import ignore_row, timed
from comfyui_skyreels.skyreels.kernels import dispatch, reference
from comfyui_skyreels.skyreels.transformer import attention
from comfyui_skyreels.skyreels.transformer.attention import Attention
from comfyui_skyreels.skyreels.transformer.attention_quality import (
    CHECKED_QUERIES,
    KINDS,
    draw,
    relative_error,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

HEAD_DIM, PADDING = 128, 196
TORCH = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
SPARSE = "comfy-kitchen sol_attn, sparse"
PLAIN = "ours in plain torch, 8 bits"


class Unavailable(Exception):  # noqa: N818 - not an error
    """What cannot be measured here, and why."""


def torch_attention(backend: SDPBackend, mask: Tensor | None = None) -> Attention:
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


def fast_attention(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int = HEAD_DIM
) -> Attention:
    """One of attention.FAST, whether or not it would be chosen.

    Raises:
        Unavailable: it is not installed, or not made for the device.
    """
    info = dispatch.describe(device)
    problem = attention.unavailable_reason(name, info)
    if problem:
        raise Unavailable(problem)
    return attention.FAST[name].load(info, device, head_dim, dtype)


def sparse_attention(device: torch.device) -> Attention:
    """comfy-kitchen's attention that skips what its routing finds unimportant; for comparison."""
    if not dispatch.is_installed("comfy_kitchen"):
        raise Unavailable("comfy_kitchen is not installed")
    import comfy_kitchen

    if not hasattr(comfy_kitchen, "sol_attn"):
        raise Unavailable("this comfy_kitchen has none")
    if not comfy_kitchen.sol_attn_is_available(device):
        raise Unavailable("its kernel does not run here")

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        tokens_first = (x.transpose(1, 2).contiguous() for x in (query, key, value))
        return comfy_kitchen.sol_attn(*tokens_first).transpose(1, 2)

    return attend


def masked_error(attend: Attention, inputs: Sequence[Tensor], mask: Tensor) -> float:
    """As attention_quality.relative_error, with keys left out."""
    query, key, value = inputs
    tokens = query.shape[2]
    chosen = torch.linspace(0, tokens - 1, min(CHECKED_QUERIES, tokens), device=query.device)
    got = attend(query, key, value)[:, :, chosen.long()].float()
    heads = []
    for q, k, v in zip(query[0][:, chosen.long()], key[0], value[0], strict=True):
        scores = q.float() @ k.float().T * HEAD_DIM**-0.5
        scores = scores.masked_fill(~mask[0, 0], float("-inf"))
        heads.append(scores.softmax(dim=-1) @ v.float())
    expected = torch.stack(heads)[None]
    return ((got - expected).norm() / expected.norm()).item()


def measure(
    attend: Attention, make: Callable[[str], Sequence[Tensor]], mask: Tensor | None, runs: int
) -> dict:
    """Milliseconds and TFLOP/s on Gaussian inputs, and the error on each kind of input.

    Args:
        make: inputs of a kind.
    """
    inputs = make("Gaussian")
    if mask is not None:
        errors = {"Gaussian": masked_error(attend, inputs, mask)}
    else:
        errors = {"Gaussian": relative_error(attend, inputs)}
    query = inputs[0]
    device, (batch, heads, tokens, width) = query.device, query.shape
    call = partial(attend, *inputs)
    seconds = statistics.median(timed(call, device) for _ in range(runs))
    del inputs, query, call
    if mask is None:
        for kind in KINDS:
            if kind not in errors:
                errors[kind] = relative_error(attend, make(kind))
    flop = 4 * batch * heads * tokens * tokens * width
    return {"ms": round(seconds * 1e3, 3), "tflops": round(flop / seconds / 1e12, 3),
            "errors": {kind: float(f"{error:.3g}") for kind, error in errors.items()}}  # fmt: skip


@torch.inference_mode()
def run(
    *,
    tokens: Sequence[int] = (),
    heads: int | None = None,
    device: str = "cpu",
    runs: int = 3,
    dtype: torch.dtype = torch.bfloat16,
    emit: Callable[[dict], None] = ignore_row,
) -> dict:
    """Rows of what ran, reasons of what did not, and what would be chosen.

    Args:
        tokens: lengths; the last is measured with the mask too, the default one with it alone.
        emit: is handed each row as soon as it is measured.
    """
    where = torch.device(device)
    is_gpu = where.type == "cuda"
    lengths = tokens or ((51_060, 51_256) if is_gpu else (300, 331))
    heads = heads or (24 if is_gpu else 2)
    rows: list[dict] = []
    unavailable: dict[str, str] = {}

    def add(name: str, length: int, load: Callable[[], Attention], mask: Tensor | None) -> None:
        label = name if mask is None else f"{name}, masked"
        row = {"name": label, "tokens": length}
        make = partial(
            draw, tokens=length, heads=heads, head_dim=HEAD_DIM, device=where, dtype=dtype
        )
        try:
            row |= measure(load(), make, mask, runs)
            rows.append(row)
        except Unavailable as reason:
            row["unavailable"] = unavailable[label] = str(reason)
        except Exception as error:  # noqa: BLE001 - the other kernels still have their turn
            row["failed"] = unavailable[label] = f"{type(error).__name__}: {str(error)[:300]}"
        emit(row)

    for index, length in enumerate(lengths):
        for name, backend in TORCH.items():
            if index == 0 or len(tokens):
                add(name, length, partial(torch_attention, backend), None)
            if index == len(lengths) - 1:
                mask = torch.ones(1, 1, 1, length, dtype=torch.bool, device=where)
                mask[..., -PADDING:] = False
                add(name, length, partial(torch_attention, backend, mask), mask)
        if index and not len(tokens):
            continue
        for name in attention.FAST:
            add(f"{name}, 8 bits", length, partial(fast_attention, name, where, dtype), None)
        add(SPARSE, length, partial(sparse_attention, where), None)
        if not is_gpu:  # nobody's choice, but the error of its arithmetic
            add(PLAIN, length, lambda: reference.quantized_attention, None)
    choices = {}
    for mode in attention.MODES:
        chosen = attention.choose_attention(
            where, mode, heads=heads, head_dim=HEAD_DIM, tokens=lengths[0], dtype=dtype
        )
        choices[mode] = f"{chosen.name}: {chosen.reason}"
        emit({"name": f"chosen, {mode}", "chosen": choices[mode]})
    return {
        "bench": "attention",
        "device": torch.cuda.get_device_name(where) if is_gpu else "cpu",
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version() if is_gpu else None,
        "dtype": str(dtype).removeprefix("torch."),
        "heads": heads,
        "runs": runs,
        "rows": rows,
        "unavailable": unavailable,
        "choices": choices,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--tokens", type=int, action="append", default=[])
    parser.add_argument("--heads", type=int)
    result = run(**vars(parser.parse_args()))
    print(f"{'kernel':32}{'tokens':>8}{'ms':>10}{'TFLOP/s':>10}  errors")
    for row in result["rows"]:
        errors = ", ".join(f"{kind} {error:.2g}" for kind, error in row["errors"].items())
        print(f"{row['name']:32}{row['tokens']:8}{row['ms']:10.3f}{row['tflops']:10.3f}  {errors}")
    for name, reason in (result["unavailable"] | result["choices"]).items():
        print(f"{name:32}{reason}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
