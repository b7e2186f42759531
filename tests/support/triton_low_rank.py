"""Run the kernel of side branches in Triton's interpreter, or compile it for GPUs not here.

    python -m support.triton_low_rank interpret        (from tests/, with TRITON_INTERPRET=1)
    python -m support.triton_low_rank compile 80 90    (from tests/, without it)

`interpret` prints one JSON line: what the self-test says, and a list of {case, error, least, kept}
with relative L2 errors; `compile` a list of {capability, x, rank} at the model's width and what
support/triton_record.py says of each.
"""

import sys

import torch
from comfyui_skyreels.skyreels.kernels import operators
from comfyui_skyreels.skyreels.kernels.triton import low_rank as kernels

from support.triton_versions import mend_interpreter, run_mode

#: tokens, input channels, channels, dtype of x, segments; the rest of the factors is not touched
CASES = [
    (1, 64, 40, torch.bfloat16, [0, 40, 0, 4]),
    (130, 100, 129, torch.int8, [0, 129, 3, 8]),
    (5, 200, 300, torch.float8_e4m3fn, [0, 96, 0, 8, 96, 192, 8, 11, 200, 300, 11, 30]),
    (40, 72, 90, torch.int8, [0, 10, 0, 2, 10, 20, 2, 4, 20, 30, 4, 9, 30, 90, 9, 12]),
]


def interpret() -> dict:
    mend_interpreter()
    rows = []
    for tokens, depth, width, dtype, segments in CASES:
        x = torch.randn(tokens, 2 * depth)[:, depth:]
        scale = None if dtype == torch.bfloat16 else torch.rand(tokens, 1)
        x = (x if scale is None else 30 * x).clamp(-127, 127).to(dtype)
        rank = max(segments[3::4]) + 2
        widest = max(b - a for a, b in zip(segments[2::4], segments[3::4], strict=True))
        down = (torch.randn(rank, 2 * depth) / depth**0.5).bfloat16()[:, :depth]
        up = torch.randn(width, widest).bfloat16()
        buffer = torch.randn(tokens, width + 32).bfloat16()
        before, target = buffer.clone(), buffer[:, 16:-16]
        inner = x.double() @ down.double().T * (1 if scale is None else scale)
        exact = target.double()
        for place in range(0, len(segments), 4):
            start, stop, first, last = segments[place : place + 4]
            exact[:, start:stop] += inner[:, first:last] @ up[start:stop, : last - first].T.double()
        kernels.add_low_rank_(x, scale, down, up, segments, target)
        error = ((target.double() - exact).norm() / exact.norm()).item()
        least = ((exact.bfloat16().double() - exact).norm() / exact.norm()).item()
        kept = torch.equal(buffer[:, :16], before[:, :16])
        kept &= torch.equal(buffer[:, -16:], before[:, -16:])
        rows.append({"case": [tokens, depth, width, str(dtype)], "error": error, "least": least,
                     "kept": kept})  # fmt: skip
    args = ("add_low_rank_", kernels.add_low_rank_, torch.device("cpu"), torch.bfloat16)
    finding = operators.self_test(*args)
    return {"cases": rows, "problem": "" if finding.is_accepted else str(finding)}


def compile_for(capabilities: list[int]) -> list[dict]:
    """Every kind of activation, at a usual rank and at the largest."""
    from support.triton_compile import source
    from support.triton_record import compiled

    rows = []
    meta = torch.device("meta")
    tokens, width, depth = 51_256, 9216, 3072
    act_scale = torch.empty(tokens, 1, device=meta)
    out = torch.empty(tokens, width, dtype=torch.bfloat16, device=meta)
    for dtype in (torch.bfloat16, torch.int8, torch.float8_e4m3fn):
        x = torch.empty(tokens, depth, dtype=dtype, device=meta)
        for rank in (32, operators.MAX_RANK):
            down = torch.empty(rank, depth, dtype=torch.bfloat16, device=meta)
            up = torch.empty(width, rank, dtype=torch.bfloat16, device=meta)
            scale = None if dtype == torch.bfloat16 else act_scale
            args = (x, scale, down, up, out, tokens, depth, depth, depth, rank, width, 1, 0, width,
                    0, rank, *[0] * 12)  # fmt: skip
            tile = kernels.TILE
            constants = {"block_m": tile.block_m, "block_n": tile.block_n, "block_k": tile.block_k,
                         "block_r": rank}  # fmt: skip
            options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages,
                       "enable_fp_fusion": True}  # fmt: skip
            for capability in capabilities:
                if dtype == torch.float8_e4m3fn and capability < 89:
                    continue
                kernel = source(kernels._low_rank_kernel, args, constants)
                rows.append({"capability": capability, "x": str(dtype), "rank": rank}
                            | compiled(kernel, capability, options))  # fmt: skip
    return rows


if __name__ == "__main__":
    run_mode(interpret, compile_for, *sys.argv[1:])
