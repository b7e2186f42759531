"""Run the int8 linear kernel in Triton's interpreter, or compile it for GPUs that need not be here.

    python -m support.triton_int8 interpret        (from tests/, with TRITON_INTERPRET=1)
    python -m support.triton_int8 compile 80 90    (from tests/, without it)

`interpret` prints one JSON line: what the self-test says, which rows one NaN spoils, and a list of
{case, error, kept} with relative L2 errors; `compile` a list of {capability, add, even, out} and
what support/triton_record.py says of each.
"""

import sys

import torch
from comfyui_skyreels.skyreels.kernels.triton import int8 as kernels
from comfyui_skyreels.skyreels.transformer import quant

from support.triton_versions import mend_interpreter, run_mode

#: tokens, channels, summands, dtype of the result, scale, bias, add; the weight is half a wider one
CASES = [
    (1, 16, 16, torch.float32, "row", True, False),
    (3, 129, 100, torch.float32, "row", True, False),
    (130, 37, 128, torch.bfloat16, "row", False, True),
    (131, 300, 272, torch.float16, "one", True, True),
    (257, 131, 384, torch.bfloat16, "none", True, False),
    (40, 257, 15_360, torch.float32, "none", False, True),
]


def codes(*shape: int) -> torch.Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def interpret() -> dict:
    mend_interpreter()
    rows = []
    for tokens, width, summands, dtype, kind, has_bias, add in CASES:
        values, weight = codes(tokens, summands), codes(width, 2 * summands)[:, summands:]
        values[:1], weight[:1] = 127, 127  # the largest sum
        row_scale = torch.rand(tokens, 1) / 1024
        scale = {"row": torch.rand(width, 1), "one": torch.tensor(0.3), "none": None}[kind]
        bias = torch.randn(width).bfloat16() if has_bias else None
        buffer = torch.randn(tokens, width + 32).to(dtype)
        before = buffer.clone()
        target = buffer[:, 16:-16]
        exact = (values.double() @ weight.double().T) * row_scale
        exact = exact * (scale.T if kind == "row" else 1 if scale is None else scale)
        exact = exact + (0 if bias is None else bias) + (target.double() if add else 0)
        kernels.int8_linear_(values, row_scale, weight, scale, bias, target, add)
        error = ((target.double() - exact).norm() / exact.norm()).item()
        kept = torch.equal(buffer[:, :16], before[:, :16])
        kept &= torch.equal(buffer[:, -16:], before[:, -16:])
        # what rounding the exact result to the dtype costs: rounding twice, or down, costs more
        least = ((exact.to(dtype).double() - exact).norm() / exact.norm()).item()
        rows.append({"case": [tokens, width, summands, str(dtype), kind], "error": error,
                     "least": least, "kept": kept})  # fmt: skip
    row_scale, out = torch.ones(3, 1), torch.empty(3, 16)
    row_scale[1] = torch.nan
    kernels.int8_linear_(codes(3, 32), row_scale, codes(16, 32), None, None, out, False)
    finding = quant.probe_gemm(quant.FUSED, torch.int8, torch.device("cpu"))
    return {
        "cases": rows,
        "problem": "" if finding.is_accepted else str(finding),
        "spoilt": out.isnan().all(dim=1).tolist(),
    }


def compile_for(capabilities: list[int]) -> list[dict]:
    """With scales and bias, with the sum, and at a depth that masks loads; wide results too."""
    from support.triton_compile import source
    from support.triton_record import compiled

    rows = []
    meta = torch.device("meta")
    tokens, width, summands, stride = 51_256, 3072, 12_288, 15_360
    values, weight = (
        torch.empty(n, summands, dtype=torch.int8, device=meta) for n in (tokens, width)
    )
    vectors = [torch.empty(size, device=meta) for size in (tokens, width)]
    kinds = [(False, True, torch.bfloat16), (True, True, torch.bfloat16),
             (True, False, torch.bfloat16), (True, True, torch.float32)]  # fmt: skip
    for add, even, dtype in kinds:
        out = torch.empty(tokens, width, dtype=dtype, device=meta)
        bias = None if add else torch.empty(width, dtype=torch.bfloat16, device=meta)
        args = (values, vectors[0], weight, vectors[1], bias, out, tokens, width,
                summands if even else summands + 48, summands, stride, width)  # fmt: skip
        for capability in capabilities:
            tile = kernels.TILES.get(divmod(capability, 10), kernels.OTHER_TILE)
            constants = {"per_channel": True, "add": add, "even": even, "group": kernels.GROUP,
                         "block_m": tile.block_m, "block_n": tile.block_n,
                         "block_k": tile.block_k}  # fmt: skip
            options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages,
                       "enable_fp_fusion": True}  # fmt: skip
            kernel = source(kernels._int8_linear_kernel, args, constants)
            rows.append({"capability": capability, "add": add, "even": even, "out": str(dtype),
                         **compiled(kernel, capability, options)})  # fmt: skip
    return rows


if __name__ == "__main__":
    run_mode(interpret, compile_for, *sys.argv[1:])
