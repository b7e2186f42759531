"""What the Triton kernels share: rounding to a narrower dtype.

Triton's interpreter (TRITON_INTERPRET=1, how the tests run the kernels without a GPU) truncates
where it should round to bfloat16, and rounds float8 wrongly. `narrow` rounds to the grid of the
target before the conversion there.
"""

import triton
import triton.language as tl

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
