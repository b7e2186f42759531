"""What the Triton kernels share: rounding to a narrower dtype, and launching on the right device.

Triton's interpreter (TRITON_INTERPRET=1, how the tests run the kernels without a GPU) truncates
where it should round to bfloat16, and rounds float8 wrongly. `narrow` rounds to the grid of the
target before the conversion there.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import current_device

#: adding and subtracting this rounds |x| < 2^22 to the nearest integer, ties to even; after the
#: addition alone, the integer is in the low bits
TO_INTEGER = tl.constexpr(1.5 * 2.0**23)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 to the dtype of the output, to nearest, ties to even; x is within its range."""
    if dtype == tl.int8:
        return (x + TO_INTEGER).to(tl.int32, bitcast=True).to(tl.int8)
    if INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        if dtype == tl.bfloat16:
            bits = bits + 0x7FFF + ((bits >> 16) & 1)
            x = (bits & -65536).to(tl.float32, bitcast=True)
        if dtype == tl.float8e4nv:
            power = (bits & 0x7F800000).to(tl.float32, bitcast=True)
            step = tl.maximum(power, 2.0**-6) * 0.125
            x = ((x / step + TO_INTEGER) - TO_INTEGER) * step
    return x.to(dtype)


#: also false where the kernels were compiled: `triton.jit` decides when it decorates
INTERPRETED = tl.constexpr(not isinstance(narrow, triton.JITFunction))


def launch(kernel: Any, grid: tuple[int, ...], *args: object, **options: object) -> None:
    """Launch a kernel on the device of its tensors, which need not be the current one.

    Args:
        kernel: decorated with `triton.jit`.
        grid: programs along each axis; where one is 0 nothing is launched.
        args: of the kernel, by position.
        options: of the kernel, by name, `num_warps` and other options of Triton.
    """
    if 0 in grid:
        return
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    with current_device(device):
        # fused multiply-adds are requested, as Triton 3.10 does not make them by default
        kernel[grid](*args, **options, enable_fp_fusion=True)
