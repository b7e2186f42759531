"""Run our 8-bit attention in Triton's interpreter, or compile it for GPUs that need not be here.

    python -m support.triton_attention interpret        (from tests/, with TRITON_INTERPRET=1)
    python -m support.triton_attention compile 80 90    (from tests/, without it)

`interpret` prints one JSON line, a list of {case, to_reference, to_exact, finite}, with relative
L2 errors; `compile` one of {kernel, capability, tile, threads} for head dimension 128 at the
model's length, and what support/triton_record.py says of each.
"""

import json
import sys

import torch
from comfyui_skyreels.skyreels.kernels import reference
from comfyui_skyreels.skyreels.kernels.triton import attention as kernels
from comfyui_skyreels.skyreels.transformer import attention_quality as quality

from support.triton_versions import check_overflow, mend_interpreter

#: like the model's 51,060 to what specialises a kernel: no multiple of 16, and several tiles
TOKENS = 1_204
#: head dimension, queries, keys, dtype, kind of input, (compute capability, index of the tile):
#: lengths that no tile divides, one tile, several
CASES = [
    (128, 200, 200, torch.float32, "video-like", (9, 0), 0),
    (64, 130, 77, torch.float16, "Gaussian", (8, 6), 0),
    (32, 65, 129, torch.bfloat16, "Gaussian", (9, 0), 1),
    (128, 128, 128, torch.bfloat16, "video-like", (8, 9), 0),
    (128, 70, 200, torch.float32, "64 sinks", (12, 0), 1),
    (128, 70, 257, torch.float32, "8 sinks", (8, 0), 0),
    (32, 1, 64, torch.float32, "Gaussian", (8, 9), 1),
]


def relative_l2(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.float() - expected).norm() / expected.norm()).item()


def interpret() -> list[dict]:
    """Each case beside the plain reference and exact attention; then a NaN in each input."""
    mend_interpreter()
    rows = []
    for head_dim, queries, tokens, dtype, kind, capability, index in CASES:
        tile = kernels.TILES[capability][index]
        inputs = quality.draw(kind, max(queries, tokens), 2, head_dim)
        query, key, value = (x.expand(2, -1, -1, -1).clone().to(dtype) for x in inputs)
        query[1] *= 0.5  # items of a batch differ
        query, key, value = query[:, :, :queries], key[:, :, :tokens], value[:, :, :tokens]
        got = kernels.quantized_attention(query, key, value, tile)
        wide = (query.float(), key.float(), value.float())
        twin = reference.quantized_attention(*wide, key_tile=tile.keys, values=tile.values)
        rows.append({
            "case": [head_dim, queries, tokens, str(dtype), kind, list(capability), index],
            "to_reference": relative_l2(got, twin),
            "to_exact": relative_l2(got, quality.exact(*wide)),
            "finite": bool(got.isfinite().all()),
        })  # fmt: skip
    check_overflow(False)  # the same kernels again
    for broken in range(3):
        for tile in (kernels.TILES[9, 0][0], kernels.TILES[8, 0][0]):
            inputs = [x.clone() for x in quality.draw("video-like", 70, 1, 32)]
            inputs[broken][0, 0, 3, 5] = float("nan")
            got = kernels.quantized_attention(*inputs, tile)
            rows.append({"case": ["nan", broken], "finite": bool(got[0, 0, 3].isfinite().all())})
    return rows


class Recorder:
    """Stands in for a kernel and notes what it is launched with."""

    def __init__(self, kernel, found: list) -> None:
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid):
        return lambda *args, **options: self.found.append((self.kernel, args, options))


def launches(tile: kernels.Tile) -> list[tuple]:
    """(kernel, arguments, options) of a call: those of the model's length, of fewer tokens.

    Nothing is shape-only: for what such tensors meet around a launch torch imports its compiler.
    """
    found: list[tuple] = []
    names = [name for name in vars(kernels) if name.endswith("_kernel")]
    saved = {name: getattr(kernels, name) for name in names}
    try:
        for name in names:
            setattr(kernels, name, Recorder(saved[name], found))
        qkv = torch.zeros(1, TOKENS, 3, 24, 128, dtype=torch.bfloat16)
        kernels.quantized_attention(*qkv.permute(2, 0, 3, 1, 4), tile)
    finally:
        for name, value in saved.items():
            setattr(kernels, name, value)
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


if __name__ == "__main__":
    command, *rest = sys.argv[1:]
    rows = interpret() if command == "interpret" else compile_for([int(each) for each in rest])
    sys.stdout.write(json.dumps(rows) + "\n")
