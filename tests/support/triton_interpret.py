"""Run the Triton kernels in Triton's interpreter, which needs no GPU.

    TRITON_INTERPRET=1 python -m support.triton_interpret      (from tests/)

A process of its own, as the interpreter is chosen when the kernels are defined. Prints one JSON
line: {"versions": ..., "cases": {case: {"kernel": error, "eager": error}}, "findings": {...}}.
"""

import json

import torch
import triton
from comfyui_skyreels.skyreels.kernels import operators, reference
from comfyui_skyreels.skyreels.kernels.triton import norms as kernels
from comfyui_skyreels.skyreels.kernels.triton import video
from comfyui_skyreels.skyreels.kernels.triton.common import INTERPRETED

from support.kernel_cases import EAGER, FP8, INT8, SMALL, error, inputs, results, truth
from support.triton_versions import check_overflow, mend_interpreter


def kernel(name: str):
    """The kernel of an operator."""
    return getattr(operators.load_kernels(operators.OPERATORS[name].module), name)


def compared() -> dict[str, dict[str, float]]:
    """Errors of kernel and eager code in each case; overflow is looked for in one of a kernel."""
    found = {}
    checked = {case.operator: case for case in reversed(SMALL)}
    for case in SMALL:
        check_overflow(case is checked[case.operator])
        args = inputs(case)
        exact = truth(case, args)
        found[str(case)] = {
            "kernel": error(results(kernel(case.operator), case, args), exact),
            "eager": error(results(EAGER[case.operator], case, args), exact),
        }
    return found


def codes() -> dict[str, int]:
    """8-bit codes and scales that differ from the reference's, of rows that are hard to round."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(6, 128, generator=generator)
    rows[1] *= 1e-30
    rows[2] *= 1e30
    rows[3] = 0
    rows[4] = torch.arange(128) - 63.5  # ties in both formats
    rows[4, 0] = 127.0
    rows[5] = torch.cat([torch.zeros(127), torch.full((1,), 1e-36)])
    found = {"rows": rows.numel()}
    for to in (FP8, INT8):
        ours, scale = kernels.quantize_rows(rows[None], to, 0)
        right, right_scale = reference.quantize_rows(rows[None], to, 0)
        name = str(to)[6:]
        found[name] = int((ours.view(torch.uint8) != right.view(torch.uint8))[:, :5].sum())
        found[name + " scales"] = int((scale / right_scale - 1).abs().gt(1e-6)[:, :5].sum())
        # beyond the smallest scale a row rounds to zeros rather than to NaN
        found[name + " tiny row"] = float((ours.float() * scale)[0, 5].abs().max())
    return found


def poisoned() -> dict[str, bool]:
    """Whether a NaN or an infinity in one row stays visible there, and only there."""
    found = {}
    for value in (float("nan"), float("inf")):
        for to, rotation in ((FP8, 0), (INT8, 0), (INT8, 32)):
            x = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(1))
            x[0, 1, 5] = value
            codes, scale = kernels.quantize_rows(x, to, rotation)
            bad = ~(codes.float() * scale).isfinite().all(-1)
            found[f"{value} {str(to)[6:]} {rotation}"] = bad.tolist() == [[False, True, False]]
    return found


def in_place() -> dict[str, bool]:
    """What the in-place kernel must leave alone."""
    case = next(case for case in SMALL if case.operator == "qk_norm_rope_")
    qkv, *args = inputs(case)
    before = qkv._base.clone()
    address = qkv.data_ptr()
    kernels.qk_norm_rope_(qkv, *args)
    width = case.shape[3] * case.shape[4]
    return {
        "same memory": qkv.data_ptr() == address,
        "queries and keys changed": bool((qkv._base != before)[..., : 2 * width].any(-1).all()),
        "values and neighbours kept": torch.equal(
            qkv._base[..., 2 * width :], before[..., 2 * width :]
        ),
    }


def empty() -> dict[str, list[int]]:
    """Shapes of the results where there are no tokens."""
    x, vector = torch.zeros(1, 0, 64), torch.zeros(1, 1, 64)
    values, scale = kernels.quantize_rows(x, INT8, 0)
    return {
        "norm": list(kernels.layer_norm_modulate(x, vector, vector).shape),
        "values": list(values.shape),
        "scale": list(scale.shape),
    }


def main() -> None:
    mend_interpreter()
    torch.set_grad_enabled(False)
    video.MOMENT_TILES = 4  # the runs of a small clip are several, and seldom longer than its rows
    assert INTERPRETED.value, "set TRITON_INTERPRET=1"
    print(
        json.dumps(
            {
                "versions": {"triton": triton.__version__, "torch": torch.__version__},
                "cases": compared(),
                "codes": codes(),
                "poisoned": poisoned(),
                "in_place": in_place(),
                "empty": empty(),
            }
        )
    )


if __name__ == "__main__":
    main()
