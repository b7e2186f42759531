"""Run our 8-bit attention in Triton's interpreter, or compile it for GPUs that need not be here.

    python -m support.triton_attention interpret        (from tests/, with TRITON_INTERPRET=1)
    python -m support.triton_attention compile 80 90    (from tests/, without it)

`interpret` prints one JSON line, a list of {case, to_reference, to_exact, finite}, with relative
L2 errors; `compile` one of {kernel, capability, shared, registers, stack, local} for head
dimension 128 at the model's length: stack and local are the bytes that spilled registers take.
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import conftest  # noqa: F401 - loads the package the way ComfyUI does
from comfyui_skyreels.skyreels import attention
from comfyui_skyreels.skyreels.kernels import triton_attention as kernels

#: head dimension, queries, keys, dtype: lengths that no tile divides, one tile, several
CASES = [
    (128, 200, 200, torch.float32),
    (64, 130, 77, torch.float16),
    (32, 65, 129, torch.bfloat16),
    (128, 128, 128, torch.bfloat16),
    (32, 1, 64, torch.float32),
]


def relative_l2(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.float() - expected).norm() / expected.norm()).item()


def interpret() -> list[dict]:
    """Each case beside the plain reference and exact attention; then a NaN in each input."""
    rows = []
    for head_dim, queries, tokens, dtype in CASES:
        inputs = attention.probe_inputs(max(queries, tokens), 2, head_dim)
        query, key, value = (x.expand(2, -1, -1, -1).clone().to(dtype) for x in inputs)
        query[1] *= 0.5  # items of a batch differ
        query, key, value = query[:, :, :queries], key[:, :, :tokens], value[:, :, :tokens]
        got = kernels.int8_attention(query, key, value)
        wide = (query.float(), key.float(), value.float())
        rows.append({
            "case": [head_dim, queries, tokens, str(dtype)],
            "to_reference": relative_l2(got, attention.int8_attention(*wide, tile=64)),
            "to_exact": relative_l2(got, attention.sdpa(*wide)),
            "finite": bool(got.isfinite().all()),
        })  # fmt: skip
    for broken in range(3):
        inputs = [x.clone() for x in attention.probe_inputs(70, 1, 32)]
        inputs[broken][0, 0, 3, 5] = float("nan")
        got = kernels.int8_attention(*inputs)
        rows.append({"case": ["nan", broken], "finite": bool(got[0, 0, 3].isfinite().all())})
    return rows


class Recorder:
    """Stands in for a kernel and notes what it is launched with."""

    def __init__(self, kernel, found: list) -> None:
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid):
        return lambda *args, **options: self.found.append((self.kernel, args, options))


def launches(capability: int) -> list[tuple]:
    """(kernel, arguments, options) of a call at the model's length, on shape-only tensors."""
    found: list[tuple] = []
    names = [name for name in vars(kernels) if name.endswith("_kernel")]
    saved = {name: getattr(kernels, name) for name in (*names, "key_tile")}
    tile = kernels.key_tile(divmod(capability, 10))
    try:
        kernels.key_tile = lambda _: tile
        for name in names:
            setattr(kernels, name, Recorder(saved[name], found))
        qkv = torch.empty(1, 51_060, 3, 24, 128, dtype=torch.bfloat16, device="meta")
        kernels.int8_attention(*qkv.permute(2, 0, 3, 1, 4))
    finally:
        for name, value in saved.items():
            setattr(kernels, name, value)
    return found


def compile_for(capabilities: list[int]) -> list[dict]:
    """Resources of every kernel on every kind of GPU."""
    import triton
    from triton.backends.compiler import GPUTarget

    from support.triton_compile import resources, source

    rows = []
    for capability in capabilities:
        for kernel, args, options in launches(capability):
            named = dict(zip(kernel.arg_names, args, strict=True))
            constants = {p.name: named[p.name] for p in kernel.params if p.is_constexpr}
            runtime = args[: len(args) - len(constants)]  # constants come last
            compiled = triton.compile(
                source(kernel, runtime, constants), target=GPUTarget("cuda", capability, 32),
                options=options,
            )  # fmt: skip
            rows.append({
                "kernel": kernel.fn.__name__, "capability": capability,
                "shared": compiled.metadata.shared, **resources(compiled.asm["cubin"]),
                "int8_products": compiled.asm["ptx"].count(".s32.s8.s8"),
            })  # fmt: skip
    return rows


if __name__ == "__main__":
    command, *rest = sys.argv[1:]
    rows = interpret() if command == "interpret" else compile_for([int(each) for each in rest])
    sys.stdout.write(json.dumps(rows) + "\n")
