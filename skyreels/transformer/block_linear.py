"""Linear layers whose weight stays in the blocks of a GGUF file.

The bytes are kept as they are in the file; for every call the part that is asked for is dequantized
in the dtype of the activations, then multiplied there. So the result is that of the dequantized
weight, rounded once, and the layer takes 4 to 9 bits a number.

Given up: multiplying codes without dequantizing them, which pays for single tokens; a forward pass
has tens of thousands, and uses a dequantized weight for each of them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels
from ..kernels import Activation
from ..kernels.blocks import BLOCK_TYPES, row_bytes


class BlockLinear(nn.Module):
    """A linear layer with a weight in GGUF blocks.

    Args:
        weight: [out, bytes] uint8, the blocks of each row.
        kind: of blocks.BLOCK_TYPES.
        bias: [out] in the compute dtype, or None.
    """

    def __init__(self, weight: Tensor, kind: str, bias: Tensor | None) -> None:
        super().__init__()
        block = BLOCK_TYPES[kind]
        self.kind = kind
        self.out_features = len(weight)
        self.in_features = weight.shape[1] // block.num_bytes * block.size
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return self.part(x, slice(None), slice(None), self.bias)

    def part(
        self,
        x: Activation,
        out_slice: slice,
        in_slice: slice,
        bias: Tensor | None,
        out: Tensor | None = None,
        add: bool = False,
    ) -> Tensor:
        """Some output channels from some input channels.

        Args:
            x: [..., in_slice], a tensor.
            out_slice: of the output channels.
            in_slice: of the input channels.
            bias: [out_slice], or None.
            out: [..., out_slice] to write to.
            add: add to `out` instead.

        Returns:
            [..., out_slice]; `out` if it was given.

        Raises:
            TypeError: a quantized input.
        """
        if not isinstance(x, Tensor):
            raise TypeError("A quantized input needs an 8-bit layer.")
        result = F.linear(x, self.dequantized(out_slice, in_slice, x.dtype), bias)
        if out is None:
            return result
        return out.add_(result) if add else out.copy_(result)

    def dequantized(self, out_slice: slice, in_slice: slice, dtype: torch.dtype) -> Tensor:
        """A part of the weight as floats, [out_slice, in_slice]; a cut block is unpacked whole."""
        first, last, _ = in_slice.indices(self.in_features)
        size = BLOCK_TYPES[self.kind].size
        start, end = first // size * size, -(-last // size) * size
        data = self.weight[out_slice, row_bytes(self.kind, start) : row_bytes(self.kind, end)]
        return unpack(data, self.kind, dtype)[:, first - start : last - start]


def unpack(data: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """Dequantize rows of blocks.

    Args:
        data: [rows, bytes] uint8.
        kind: of blocks.BLOCK_TYPES.
        dtype: of the result.

    Returns:
        [rows, columns] in dtype, on the same device.
    """
    block = BLOCK_TYPES[kind]
    columns = data.shape[1] // block.num_bytes * block.size
    out = torch.empty(len(data), columns, dtype=dtype, device=data.device)
    kernels.dequantize_blocks_(data, kind, out)
    return out
