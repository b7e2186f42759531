"""Block-sparse attention in Triton: beside its definition, what it compiles to, what it takes."""

import json
import os

import pytest
import torch
from comfyui_skyreels.skyreels.kernels import sparse
from support.forked import forks

CAPABILITIES = (80, 86, 89, 90, 120)


def run_support(*command: str, **variables: str):
    """tests/support/triton_sparse.py in a process of its own."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = forks("torch").run(
        ["-m", "support.triton_sparse", *command], {**environment, **variables}
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def interpreted():
    return run_support("interpret", TRITON_INTERPRET="1")


def test_the_kernel_computes_its_definition_in_the_interpreter(interpreted):
    assert len(interpreted["cases"]) == 7
    for row in interpreted["cases"]:
        _, _, _, dtype, capability, index = row["case"]
        is_wide = (capability, index) in (([9, 0], 2), ([8, 0], 1))
        # rounding to int8 and e4m3 loses as much as in dense attention
        bound = {"torch.float32": 2e-6, "torch.float16": 5e-4}[dtype] if is_wide else 0.02
        assert row["error"] <= bound, row
        assert row["lists"] and row["counts"], row
    densities = [row["density"] for row in interpreted["cases"]]
    assert min(densities) < 0.8 and max(densities) == 1.0


def test_lists_of_another_branch_are_followed(interpreted):
    assert interpreted["given"]["error"] <= 2e-6
    assert interpreted["given"]["kept"]


def test_lists_are_those_of_the_definition_for_any_grouping_of_heads(interpreted):
    assert len(interpreted["routing"]) == 4
    assert all(interpreted["routing"].values()), interpreted["routing"]


def test_a_key_that_is_not_finite_shows_in_its_head_and_only_there(interpreted):
    assert len(interpreted["poisoned"]) == 3
    assert all(interpreted["poisoned"].values()), interpreted["poisoned"]


def test_products_are_a_quarter_of_those_of_dense_attention(interpreted):
    """Routing, pooled terms and text with them; the density is that of Gaussian scores."""
    work = interpreted["work"]["0.85"]
    assert work["all"] <= 0.25
    assert work["tail"] <= 0.025 and work["routing"] <= 0.004
    assert interpreted["work"]["1.1"]["all"] <= 0.19


@pytest.fixture(scope="module")
def compiled():
    return run_support("compile", *map(str, CAPABILITIES))


@pytest.mark.slow
def test_a_call_takes_little_memory_and_few_launches(compiled):
    """At the model's length, on shape-only tensors; copies in 8 bits are planned for already."""
    for taken in (*compiled["taken"], compiled["second"]):
        assert taken["bytes"] <= 54e6
        assert taken["launches"] <= 9
    # one pass less, over queries, and no routing
    assert compiled["second"]["launches"] == compiled["taken"][0]["launches"] - 1
    # pooling, rounding and attending: each reads queries, keys and values once or less
    assert compiled["taken"][0]["moved"] <= 3.9e9


@pytest.mark.slow
def test_every_kernel_compiles_for_every_gpu_without_spilling(compiled):
    attending = [row for row in compiled["kernels"] if row["kernel"] == "_attend_kernel"]
    assert len(attending) == 2 + 2 + 3 + 3 + 3
    for row in compiled["kernels"]:
        assert row["stack"] == row["local"] == 0, row
        # of a block: sm86, sm89 and sm120 have 99 KiB, sm80 163, sm90 227
        assert row["shared"] <= (227 if row["capability"] == 90 else 99) * 1024, row
    for row in attending:
        is_wide = row["values"] is None and not row["is_int8"]
        assert (row["int8_products"] > 0) == (not is_wide), row
        assert (row["e4m3_products"] > 0) == (row["values"] == "float8_e4m3fn"), row


@pytest.mark.slow
def test_two_programs_share_a_multiprocessor(compiled):
    """65,536 registers in steps of 8 a thread; of shared memory each program takes 1 KiB more."""
    memory = {80: 164, 86: 100, 89: 100, 90: 228, 120: 100}
    found = []
    for row in compiled["kernels"]:
        if row["kernel"] != "_attend_kernel":
            continue
        by_registers = 65_536 // (row["threads"] * (-(-row["registers"] // 8) * 8))
        by_memory = memory[row["capability"]] * 1024 // (row["shared"] + 1024)
        found.append(min(by_registers, by_memory))
        # what a GPU runs first, and on those for servers in 16 bits too
        if row["tile"] == 0 or row["capability"] in (80, 90):
            assert found[-1] >= 2, row
        assert (row["wgmma"] > 0) == (row["capability"] == 90), row
    assert len(found) == 13


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("index", range(3))
def test_on_this_gpu_the_kernel_is_its_definition(index):
    from comfyui_skyreels.skyreels.kernels.triton import sparse as kernels

    tiles = kernels.tiles(torch.cuda.get_device_capability())
    if index >= len(tiles):
        pytest.skip(f"there are {len(tiles)} tiles for this GPU")
    count, heads = 40, 6
    tokens = count * 64 + 61
    base = torch.randn(1, -(-tokens // 64), 3, heads, 128, device="cuda")
    buffer = base.repeat_interleave(64, dim=1)[:, :tokens]
    buffer = (buffer + torch.randn_like(buffer)).bfloat16()
    given = buffer.permute(2, 0, 3, 1, 4).unbind()
    wide = [x.float() for x in given]

    def run(inputs, exact=None):
        return kernels.sparse_attention(
            *inputs, beta=0.85, num_image_blocks=count, exact=exact, tile=tiles[index]
        )

    got = run(given)
    twin = sparse.route(*wide[:2], 0.85, count)
    # at the threshold rounding decides
    assert (sparse.unpack(got.exact) != twin).float().mean().item() <= 1e-3
    assert 0.1 < got.counts.float().mean().item() / count < 0.5
    right = sparse.attend(*wide, sparse.pool(*wide), sparse.unpack(got.exact))
    error = ((got.out.float() - right).norm() / right.norm()).item()
    assert error <= (0.03 if tiles[index].is_int8 else 0.005)
    for part in (slice(0, 3), slice(3, 6)):
        again = run([x[:, part] for x in given])
        assert torch.equal(again.exact, got.exact[part])
    assert torch.equal(run(given, got.exact).out, got.out)
