"""Run the kernel for GGUF blocks in Triton's interpreter, or compile it for GPUs not here.

    python -m support.triton_blocks interpret        (from tests/, with TRITON_INTERPRET=1)
    python -m support.triton_blocks compile 80 90    (from tests/, without it)

`interpret` prints one JSON line: what the self-test says, and for each type the
largest difference from the reference over the largest number; `compile` a list of {capability,
kind} at the model's width and what support/triton_record.py says of each.
"""

import sys

import torch
from comfyui_skyreels.skyreels.kernels import blocks, operators
from comfyui_skyreels.skyreels.kernels.triton import blocks as kernels

from support.triton_versions import mend_interpreter, run_mode


def interpret() -> dict:
    """float32 results: the interpreter cuts bfloat16 off where it should round it."""
    mend_interpreter()
    rows = []
    columns = kernels.NUMBERS + 768  # two programs a row, the second cut
    for kind in operators.BLOCK_KINDS:
        data = operators._block_bytes(torch.randn, kind, 2, columns)
        buffers = torch.zeros(2, 2, columns + 32)
        outputs = buffers[:, :, 16:-16]
        kernels.dequantize_blocks_(data, kind, outputs[0])
        blocks.dequantize_blocks_(data, kind, outputs[1])
        error = (outputs[0] - outputs[1]).abs().max() / outputs[1].abs().max()
        kept = not bool(buffers[0, :, :16].any() or buffers[0, :, -16:].any())
        rows.append({"case": kind, "error": error.item(), "kept": kept})
    finding = operators.self_test(
        "dequantize_blocks_", kernels.dequantize_blocks_, torch.device("cpu"), torch.bfloat16
    )
    return {"cases": rows, "problem": "" if finding.is_accepted else str(finding)}


def compile_for(capabilities: list[int]) -> list[dict]:
    """Each type, for a projection of the model."""
    from support.triton_compile import source
    from support.triton_record import compiled

    rows = []
    out = torch.empty(3072, 12_288, dtype=torch.bfloat16, device="meta")
    for kind in operators.BLOCK_KINDS:
        block = blocks.BLOCK_TYPES[kind]
        width = blocks.row_bytes(kind, 12_288)
        data = torch.empty(3072, width, dtype=torch.uint8, device="meta")
        constants = {"bits": int(kind[1]), "size": block.size, "num_bytes": block.num_bytes,
                     "numbers": kernels.NUMBERS}  # fmt: skip
        for capability in capabilities:
            options = {"num_warps": kernels.WARPS, "enable_fp_fusion": True}
            kernel = source(
                kernels._dequantize_kernel, (data, out, 12_288, width, 12_288), constants
            )
            rows.append({"capability": capability, "kind": kind}
                        | compiled(kernel, capability, options))  # fmt: skip
    return rows


if __name__ == "__main__":
    run_mode(interpret, compile_for, *sys.argv[1:])
