"""Parts of linear layers: some of their rows, some of their columns, into memory that is there.

The projections of a block are one layer each in the checkpoint; what is computed at a time is
narrower. A layer is torch's own or an 8-bit one (quant.py), which may take its input in 8 bits.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels import RowFormat, Rows
from .quant import QuantLinear

ALL = slice(None)


def input_format(layer: nn.Module) -> RowFormat | None:
    """What the layer wants its input rounded to; None for a tensor as it is."""
    return layer.input_format if isinstance(layer, QuantLinear) else None


def linear(
    layer: nn.Module, x: Tensor | Rows, rows: slice = ALL, columns: slice = ALL,
    out: Tensor | None = None, add: bool = False,
) -> Tensor:  # fmt: skip
    """Apply a part of a linear layer.

    Args:
        x: [B, S, C], C the number of columns taken; `Rows` only for an 8-bit layer.
        rows: of the weight, the output channels. columns: of the weight, the input channels; the
            bias belongs to the part that holds the first column.
        out: [B, S, rows] to write to, channels contiguous. add: to add to `out` instead; then the
            part has no bias.
    Returns:
        [B, S, rows]; `out` if it was given.
    """
    assert isinstance(layer, nn.Linear | QuantLinear)
    bias = None if columns.start or layer.bias is None else layer.bias[rows]
    if isinstance(layer, QuantLinear):
        return layer.part(x, rows, columns, bias, out, add)
    if not isinstance(x, Tensor):
        raise TypeError("Rows of 8 bits belong to an 8-bit layer.")
    if out is None:
        return F.linear(x, layer.weight[rows, columns], bias)
    if torch.is_grad_enabled():
        result = F.linear(x, layer.weight[rows, columns], bias)
        return out.add_(result) if add else out.copy_(result)
    weight = layer.weight[rows, columns].T
    for each, target in zip(x, out, strict=True):
        before = target if add else bias
        if before is None:
            torch.mm(each, weight, out=target)
        else:
            torch.addmm(before, each, weight, out=target)
    return out
