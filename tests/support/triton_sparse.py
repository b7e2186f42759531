"""Run our sparse attention in Triton's interpreter, compile it for GPUs not here, or count.

    python -m support.triton_sparse interpret        (from tests/, with TRITON_INTERPRET=1)
    python -m support.triton_sparse compile 80 90    (from tests/, without it)
"""

import sys

import torch
from comfyui_skyreels.skyreels.kernels.triton import attention, common
from comfyui_skyreels.skyreels.kernels.triton import sparse as kernels

from support.triton_versions import mend_interpreter, run_mode

#: image and text tokens of 97 frames of 544x960
IMAGE_TOKENS, TOKENS, HEADS = 51_000, 51_060, 24


def launches(tile: kernels.Tile, head_dim: int = 128) -> list[tuple]:
    """(kernel, arguments, options) of a call at the model's length, on shape-only tensors."""
    found: list[tuple] = []

    def record(kernel, grid, *args, **options):
        found.append((kernel, args, options | {"enable_fp_fusion": True}))

    attention.launch = kernels.launch = record
    try:
        qkv = torch.empty(1, TOKENS, 3, HEADS, head_dim, dtype=torch.bfloat16, device="meta")
        kernels.sparse_attention(
            *qkv.permute(2, 0, 3, 1, 4),
            beta=0.85,
            num_image_blocks=IMAGE_TOKENS // 64,
            tile=tile,
        )
    finally:
        attention.launch = kernels.launch = common.launch
    return found


def compile_for(capabilities: list[int]) -> list[dict]:
    """Resources of every kernel with every tile on every kind of GPU."""
    from support.triton_compile import source
    from support.triton_record import compiled

    rows = []
    for capability in capabilities:
        for index, tile in enumerate(kernels.tiles(divmod(capability, 10))):
            for kernel, args, options in launches(tile):
                named = dict(zip(kernel.arg_names, args, strict=True))
                constants = {p.name: named[p.name] for p in kernel.params if p.is_constexpr}
                runtime = args[: len(args) - len(constants)]  # constants come last
                took = compiled(source(kernel, runtime, constants), capability, options)
                rows.append({"kernel": kernel.fn.__name__, "capability": capability,
                             "tile": index, "threads": 32 * options["num_warps"],
                             **took})  # fmt: skip
    return rows


def interpret():
    mend_interpreter()


if __name__ == "__main__":
    run_mode(interpret, compile_for, *sys.argv[1:])
