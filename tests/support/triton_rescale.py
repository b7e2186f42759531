"""Run the scaling kernel in Triton's interpreter, or compile it for GPUs that need not be here.

    python -m support.triton_rescale interpret        (from tests/, with TRITON_INTERPRET=1)
    python -m support.triton_rescale compile 80 90    (from tests/, without it)

`interpret` prints one JSON line: what the self-test says, and a list of {case, error, neighbours}
with relative L2 errors; `compile` a list of {capability, codes} at the model's width and what
support/triton_record.py says of each.
"""

import sys

import torch
from comfyui_skyreels.skyreels.kernels import operators, reference
from comfyui_skyreels.skyreels.kernels.triton import int8 as kernels

from support.triton_versions import mend_interpreter, run_mode

#: tokens, channels, dtype of the product, scale, bias, add
CASES = [
    (1, 16, torch.int32, "row", True, False),
    (9, 1100, torch.int32, "row", True, False),
    (5, 1024, torch.int32, "row", False, True),
    (4, 130, torch.bfloat16, "one", True, False),
    (3, 64, torch.float32, "none", False, True),
]


def interpret() -> dict:
    """float32 results: the interpreter cuts bfloat16 off where it should round it."""
    mend_interpreter()
    rows = []
    for tokens, width, dtype, kind, has_bias, add in CASES:
        codes = torch.randint(-(2**20), 2**20, (tokens, width)).to(dtype)
        row_scale = torch.rand(tokens, 1)
        scale = {"row": torch.rand(width, 1), "one": torch.tensor(0.3), "none": None}[kind]
        bias = torch.randn(width).bfloat16() if has_bias else None
        buffer = torch.randn(tokens, width + 32)
        expected = buffer.clone()
        for function, target in ((kernels.rescale_, buffer), (reference.rescale_, expected)):
            function(codes, row_scale, scale, bias, target[:, 16:-16], add)
        error = ((buffer - expected).norm() / expected.norm()).item()
        outside = torch.equal(buffer[:, :16], expected[:, :16])
        outside &= torch.equal(buffer[:, -16:], expected[:, -16:])
        rows.append({"case": [tokens, width, str(dtype), kind], "error": error, "kept": outside})
    codes, row_scale = torch.ones(3, 16, dtype=torch.int32), torch.ones(3, 1)
    row_scale[1] = torch.nan
    out = torch.empty(3, 16)
    kernels.rescale_(codes, row_scale, None, None, out, False)
    spoilt = out.isnan().all(dim=1).tolist()
    finding = operators.self_test("rescale_", kernels.rescale_, torch.device("cpu"), torch.bfloat16)
    return {"cases": rows, "problem": "" if finding.is_accepted else str(finding), "spoilt": spoilt}


def compile_for(capabilities: list[int]) -> list[dict]:
    """Both kinds of product, with everything that a projection of the model asks for."""
    from support.triton_compile import source
    from support.triton_record import compiled

    rows = []
    width = 12_288
    meta = torch.device("meta")
    out = torch.empty(1024, width, dtype=torch.bfloat16, device=meta)
    vectors = [torch.empty(size, device=meta) for size in (1024, width)]
    bias = torch.empty(width, dtype=torch.bfloat16, device=meta)
    constants = {"per_channel": True, "add": True, "block_m": kernels.RESCALE_M,
                 "block_n": kernels.RESCALE_N}  # fmt: skip
    for dtype in (torch.int32, torch.bfloat16):
        codes = torch.empty(1024, width, dtype=dtype, device=meta)
        args = (codes, *vectors, bias, out, 1024, width, width)
        for capability in capabilities:
            options = {"num_warps": kernels.RESCALE_WARPS, "enable_fp_fusion": True}
            kernel = source(kernels._rescale_kernel, args, constants)
            rows.append({"capability": capability, "codes": str(dtype)}
                        | compiled(kernel, capability, options))  # fmt: skip
    return rows


if __name__ == "__main__":
    run_mode(interpret, compile_for, *sys.argv[1:])
