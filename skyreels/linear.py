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
    bias = layer.bias if not columns.start else None
    if bias is not None:
        bias = bias[rows]
    if isinstance(layer, QuantLinear):
        result = layer.part(x, rows, columns, bias)
    elif out is None or torch.is_grad_enabled():
        result = F.linear(x, layer.weight[rows, columns], bias)
    else:
        weight = layer.weight[rows, columns].T
        for each, target in zip(x, out, strict=True):
            if add:
                target.addmm_(each, weight)
            elif bias is None:
                torch.mm(each, weight, out=target)
            else:
                torch.addmm(bias, each, weight, out=target)
        return out
    if out is None:
        return result
    return out.add_(result) if add else out.copy_(result)
