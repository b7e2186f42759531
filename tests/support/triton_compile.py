"""Compile every Triton kernel at the model's widths for GPUs that need not be here.

    python -m support.triton_compile 80 90        (from tests/; TRITON_INTERPRET must not be set)

The operators' launches are recorded and compiled ahead of time, so what is compiled is what would
run. Prints one JSON line, a list of {operator, to, capability, warps} and what
support/triton_record.py says of each.
"""

import json
import sys

import torch
from comfyui_skyreels.skyreels.kernels import operators
from comfyui_skyreels.skyreels.kernels.dispatch import short
from triton.compiler import ASTSource

from support.triton_record import compiled

TYPES = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int8: "*i8",
    torch.int32: "*i32", torch.int16: "*i16", torch.uint8: "*u8", torch.float8_e4m3fn: "*fp8e4nv",
}  # fmt: skip
CAPABILITIES = [80, 86, 89, 90, 120]


def launches(name: str, to: torch.dtype | None) -> list[tuple]:
    """(kernel, arguments, constants, warps) of a call of an operator at the model's widths."""
    found = []
    kernels = operators.load_kernels(operators.OPERATORS[name].module)

    def record(kernel, grid, *args, num_warps, **constants):
        found.append((kernel, args, constants, num_warps))

    kernels.launch, launch = record, kernels.launch
    try:
        # no shape-only tensors: for what they meet around a launch torch imports its compiler
        args = operators.samples(name, torch.bfloat16, to)[0]
        if isinstance(args[0], torch.Tensor) and args[0].ndim == 5 and "rope" not in name:
            args = [_widened(arg, name) for arg in args]
        getattr(kernels, name)(*args)
    finally:
        kernels.launch = launch
    return found


def _widened(arg, name: str):
    """An argument as wide as the last level of the video VAE, whose clips the tests are small."""
    if not isinstance(arg, torch.Tensor):
        return arg
    axis = 1 if arg.ndim == 5 else 0
    shape = [size * 16 if at == axis else size for at, size in enumerate(arg.shape)]
    wide = torch.empty(shape, dtype=arg.dtype)
    is_clip = arg.ndim == 5 and arg.shape[2:].numel() > 1
    return wide.contiguous(memory_format=torch.channels_last_3d) if is_clip else wide


def source(kernel, args: tuple, constants: dict) -> ASTSource:
    """What a launch with these arguments would compile: types, alignment, constants."""
    signature, attributes, fixed = {}, {}, dict(constants)
    for index, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
        if value is None:
            fixed[name] = None
        elif isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and not kernel.params[index].do_not_specialize:
            fixed[name] = 1
        else:
            signature[name] = "i32"
            if value % 16 == 0 and not kernel.params[index].do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
    for name in fixed:
        signature[name] = "constexpr"
    ordered = {name: signature[name] for name in kernel.arg_names}
    return ASTSource(kernel, ordered, fixed, attributes)


def compile_for(capabilities: list[int]) -> list[dict]:
    """A row for every operator, format and GPU."""
    rows = []
    for name, row in operators.OPERATORS.items():
        for to in row.formats:
            for kernel, args, constants, warps in launches(name, to):
                for capability in capabilities:
                    if to == torch.float8_e4m3fn and capability < 89:
                        continue
                    options = {"num_warps": warps, "enable_fp_fusion": True}
                    took = compiled(source(kernel, args, constants), capability, options)
                    rows.append({"operator": name, "to": short(to), "capability": capability,
                                 "warps": warps, **took})  # fmt: skip
    return rows


if __name__ == "__main__":
    print(json.dumps(compile_for([int(each) for each in sys.argv[1:]] or CAPABILITIES)))
