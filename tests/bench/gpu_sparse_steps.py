"""Steps of tests/scripts/gpu_check.py: sparse attention alone, and in a forward pass.

Weights are random, so that in the forward pass scores are Gaussian: its density is that of the
threshold, and its difference from dense attention says nothing about quality. The inputs of the
step before it have six kinds of head (tests/support/heads.py).
"""

from functools import partial

import bench_sparse
import torch
from bench_sparse import Unavailable
from comfyui_skyreels.skyreels.config import TransformerConfig
from comfyui_skyreels.skyreels.kernels.sparse import SparseAttention
from comfyui_skyreels.skyreels.transformer.model import call
from comfyui_skyreels.skyreels.transformer.sparse_attention import SparseConfig, SparseRun
from gpu_model_steps import Bench, Rounds, prepare, to_8bit
from gpu_steps import Context, relative_difference
from torch import Tensor

#: share of the blocks of 128 keys that flex_attention is given; lengths as in bench_sparse
FLEX_DENSITY, FLEX_BLOCK, FLEX_TOKENS = 0.2, 128, (51_060, 26_580)
#: a step that is sparse with the settings of a preset
NUM_STEPS, SPARSE_STEP = 30, 15


def sparse_attention(context: Context) -> None:
    """Dense and sparse kernels at two lengths: time, density, and error beside exact attention."""

    def emit(row: dict) -> None:
        name = f"{row['tokens']}, {row['name']}"
        if "unavailable" in row:
            context.skip(name, row["unavailable"])
        elif "failed" in row:
            context.problem(name, row["failed"])
        else:
            context.emit(f"{name}: time", row["ms"], "ms")
            context.emit(f"{name}: density", row["density"])
            context.emit(f"{name}: error", row["error"])

    with context.attempt("sparse attention"):
        # the first call compiles
        bench_sparse.run(device=str(context.device), runs=3 if context.full else 1, emit=emit)
    context.tidy()
    if context.is_cuda:  # its compiler may take long
        context.run_child("flex_attention", 40)
    else:
        context.skip("flex_attention", "it is compiled for GPUs")


@torch.inference_mode()
def flex(context: Context) -> None:
    """torch's flex_attention over a fifth of the blocks, for comparison; nothing is pooled."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    for tokens in FLEX_TOKENS:
        name = f"{tokens}, flex_attention"
        with context.attempt(name):
            blocks = tokens // FLEX_BLOCK
            qkv = torch.randn(3, 1, 24, blocks * FLEX_BLOCK, bench_sparse.HEAD_DIM,
                              device=context.device, dtype=torch.bfloat16)  # fmt: skip
            chosen = torch.rand(1, 24, blocks, blocks, device=context.device) < FLEX_DENSITY
            counts = chosen.sum(dim=-1, dtype=torch.int32)
            places = chosen.int().argsort(dim=-1, descending=True, stable=True).int()
            mask = BlockMask.from_kv_blocks(counts, places, BLOCK_SIZE=FLEX_BLOCK)
            seconds = context.median(partial(compiled, *qkv, block_mask=mask))
            context.emit(f"{name}: time", 1e3 * seconds, "ms", blocks=blocks)
            context.emit(f"{name}: density", chosen.float().mean().item())


@torch.inference_mode()
def forward(context: Context) -> None:
    """A forward pass of a sparse step beside a dense one, in bf16 and with linear layers in fp8."""
    bench = prepare(context, None, None if context.full else (5, 16, 16))
    rounds = Rounds(context)
    truth = rounds.time("dense, bf16", bench.denoise)
    if context.full:  # the first one chose kernels
        truth = rounds.time("dense, bf16", bench.denoise)
    found = kernels_of(context)
    sparse_steps(context, bench, rounds, found, "bf16", truth)
    with context.attempt("fp8"):
        to_8bit(bench.model, "fp8")
        context.tidy()
        bench.denoise()  # compiles, and tries its products
        rounds.time("dense, fp8", bench.denoise)
        sparse_steps(context, bench, rounds, found, "fp8", truth)


def kernels_of(context: Context) -> dict[str, SparseAttention]:
    """What a run tries first, whatever the speed gate says; "sparse attention" has the others."""
    found: dict[str, SparseAttention] = {}
    with context.attempt("Triton"):
        try:
            found = dict(list(bench_sparse.ours(context.device).items())[:1])
        except Unavailable as reason:
            context.skip("Triton", str(reason))
    return found


def sparse_steps(
    context: Context,
    bench: Bench,
    rounds: Rounds,
    found: dict[str, SparseAttention],
    precision: str,
    truth: Tensor | None,
) -> None:
    """Time both branches of a step: the first chooses blocks, the second is given them."""
    config: TransformerConfig = bench.model.config
    for name, kernel in found.items():
        subject = f"{name}, {precision}"
        with context.attempt(subject):
            run = SparseRun(
                SparseConfig(), kernel, bench.exact,
                grid=bench.model.token_grid(bench.inputs["hidden_states"].shape),
                num_steps=NUM_STEPS, blocks=bench.model.blocks, heads=config.num_attention_heads,
                device=context.device,
            )  # fmt: skip

            def predict(branch: int, run: SparseRun = run) -> Tensor:
                run.begin([branch])
                return bench.model.denoise(
                    bench.inputs["hidden_states"], bench.conditioning, rope=bench.rope,
                    attention=run, run_block=run.around(call), order=run.order,
                )  # fmt: skip

            run.begin_step(SPARSE_STEP)
            predict(0)  # compiles
            for _ in range(2 if context.full else 1):
                run.begin_step(SPARSE_STEP)
                output = rounds.time(f"{subject}, first branch", partial(predict, 0))
                rounds.time(f"{subject}, second branch", partial(predict, 1))
            context.emit(f"{subject}: density", run.densities().sparse)
            if output is not None and truth is not None:
                difference = relative_difference(output, truth)
                context.emit(f"{subject}: difference to dense bf16", difference)
