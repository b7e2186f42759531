"""The side branch of a linear layer: its definition, and its kernel in the interpreter."""

import json
import os
from types import SimpleNamespace

import pytest
import torch
from comfyui_skyreels.skyreels import kernels
from comfyui_skyreels.skyreels.kernels import QuantizedActivation, operators, reference
from support.forked import forks


def inputs(tokens=5000):
    """Activations, factors and the result of a layer; the segments leave rows out."""
    x, out = torch.randn(1, tokens, 24), torch.randn(1, tokens, 40)[:, :, 4:-4]
    return x, torch.randn(9, 24), torch.randn(32, 4), [0, 10, 0, 4, 12, 32, 6, 9], out


def by_hand(x, down, up, segments, out):
    right = out.double()
    for place in range(0, len(segments), 4):
        start, stop, first, last = segments[place : place + 4]
        factors = up[start:stop, : last - first].double() @ down[first:last].double()
        right[..., start:stop] += x.double() @ factors.T
    return right


def test_each_segment_is_changed_by_its_factors_and_no_other_row_is():
    x, down, up, segments, out = inputs()
    before, right = out.clone(), by_hand(x, down, up, segments, out)
    kernels.add_low_rank_(x, down, up, segments, out)
    assert (out - right).abs().max() <= 1e-4
    assert torch.equal(out[..., 10:12], before[..., 10:12])


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_activations_in_8_bits_are_scaled_token_by_token(dtype):
    x, down, up, segments, out = inputs(70)
    values, scale = reference.quantize_rows(x, dtype)
    right = by_hand(values.double() * scale, down, up, segments, out)
    kernels.add_low_rank_(QuantizedActivation(values, scale), down, up, segments, out)
    assert (out - right).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"up": torch.ones(32, 300)}, "rank 300 in 2 segments is too much"),
        ({"segments": [0, 1, 0, 1] * 5}, "rank 4 in 5 segments is too much"),
        ({"down": torch.ones(24, 9).T}, "not adjacent"),
        ({}, "factors are float32"),
    ],
)
def test_what_the_kernel_does_not_take_runs_in_plain_torch(change, said):
    x, down, up, segments, out = inputs(3)
    given = {"down": down, "up": up, "segments": segments, **change}
    args = (x, None, given["down"], given["up"], given["segments"], out)
    assert said in operators.unsuited("add_low_rank_", args, SimpleNamespace())


def run_kernel(*arguments, **environment):
    """tests/support/triton_low_rank.py in a process of its own."""
    pytest.importorskip("triton")
    command = ["-m", "support.triton_low_rank", *arguments]
    run = forks("torch").run(command, {**os.environ, **environment})
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_the_kernel_computes_its_definition_in_the_interpreter():
    found = run_kernel("interpret", TRITON_INTERPRET="1")
    assert found["problem"] == ""
    assert len(found["cases"]) == 4
    for case in found["cases"]:
        # what is between the products is rounded to bfloat16 too: 2^-9 at most, 0.0017 in the mean
        assert case["error"] <= 2 * case["least"], case
        assert case["kept"], case


def test_the_kernel_compiles_for_every_gpu_without_spilling():
    rows = run_kernel("compile", "80", "86", "89", "90", "120")
    assert len(rows) == 3 * 2 * 5 - 4
    assert [row for row in rows if row["stack"] or row["local"]] == []
    assert max(row["shared"] for row in rows) <= 99 * 1024


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [None, torch.int8, torch.float8_e4m3fn])
def test_on_this_gpu_the_branch_is_its_definition(dtype):
    segments = [0, 3072, 0, 32, 6144, 9216, 32, 64]
    x, before = torch.randn(1, 1000, 3072).bfloat16(), torch.randn(1, 1000, 9216).bfloat16()
    down, up = torch.randn(64, 3072).bfloat16() / 3072**0.5, torch.randn(9216, 32).bfloat16()
    values, given = x.float(), x.cuda()
    if dtype is not None:
        rows = reference.quantize_rows(x, dtype)
        values = rows[0].float() * rows[1]
        given = QuantizedActivation(*(tensor.cuda() for tensor in rows))
    right = by_hand(values, down, up, segments, before)
    out = before.cuda()
    kernels.add_low_rank_(given, down.cuda(), up.cuda(), segments, out)
    assert (out.cpu() - right).norm() / right.norm() <= 2**-7
