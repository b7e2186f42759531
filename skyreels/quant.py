"""8-bit storage of linear weights.

A quantised layer keeps its weight as float8 e4m3 or int8 with a float32 scale, per tensor or per
output row, and widens it to the dtype of the activations for each call: half the bytes of
bfloat16, the arithmetic of bfloat16. Tensor-core 8-bit arithmetic is a different layer that takes
the same tensors; it would replace this module, not patch it.

What is never quantised here, and why: patch, time, vector, guidance and text embedders and the
final layer touch every token at little cost, and the block modulations set shift, scale and gate of
all tokens from one vector (specs, section 12). A checkpoint that already holds one of these in
8 bits keeps what it has, except that everything outside the blocks is widened while loading.

Given up: e5m2 as a target (5.3 % error where e4m3 has 2.6 %), and the `input_scale` of scaled fp8
files, which only matters to 8-bit arithmetic.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels import RowFormat, Rows
from .kernels.reference import FORMAT_MAX

STORAGE_DTYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
FLOAT8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


class QuantLinear(nn.Module):
    """A linear layer with an 8-bit weight, widened on every call.

    Args:
        weight: [out, in] float8 or int8.
        scale: float32, one element or [out, 1]; None means 1.
        bias: [out] in the compute dtype, or None.
    """

    def __init__(self, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = None if scale is None else nn.Parameter(scale, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def input_format(self) -> RowFormat | None:
        """What the layer wants its input rounded to; None for a tensor as it is."""
        return None

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x, slice(None), slice(None), self.bias)

    def part(self, x: Tensor | Rows, rows: slice, columns: slice, bias: Tensor | None) -> Tensor:
        """Some output channels (rows of the weight) from some input channels (columns)."""
        scale = self.weight_scale
        if scale is not None and scale.numel() > 1:
            scale = scale[rows]
        return F.linear(x, dequantize(self.weight[rows, columns], scale, x.dtype), bias)


def dequantize(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Widen an 8-bit weight; the product with the scale is formed in float32.

    Args:
        weight: [out, in] float8 or int8.
        scale: float32, one element or [out, 1]; None means 1.
    Returns:
        [out, in] in dtype.
    """
    if scale is None:
        return weight.to(dtype)
    return weight.to(torch.float32).mul_(scale).to(dtype)


def quantize(weight: Tensor, storage_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round a weight to 8 bits with one scale per output row, absmax / largest magnitude.

    Args:
        weight: [out, in] float.
        storage_dtype: float8_e4m3fn or int8.
    Returns:
        [out, in] in storage_dtype and [out, 1] float32; a row of zeros gets scale 1.
    """
    wide = weight.float()
    limit = FORMAT_MAX[storage_dtype]
    scale = wide.abs().amax(dim=1, keepdim=True) / limit
    scale[scale == 0] = 1.0
    scaled = (wide / scale).clamp_(-limit, limit)
    if storage_dtype == torch.int8:
        scaled.round_()
    return scaled.to(storage_dtype), scale


def is_quantizable(name: str) -> bool:
    """Whether `precision="fp8"` or `"int8"` rounds this weight of the transformer."""
    in_block = name.startswith(("double_blocks.", "single_blocks."))
    is_modulation = "_mod." in name or ".modulation." in name
    return in_block and not is_modulation and not name.endswith("_norm.weight")
