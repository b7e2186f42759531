"""What a LoRA adds to a linear layer whose weight cannot hold it: y += (x down^T) up^T.

Rounding a changed weight to 8 or fewer bits again would cost more than a LoRA changes. So its
factors stay beside the weight, in the dtype of the activations, as parameters of the layer: they
are placed, streamed and counted with it. `linear.linear` adds them to every part of every layer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import kernels
from ..kernels import Activation
from ..kernels.reference import hadamard_rotate

#: numbers of an 8-bit input that are widened at a time where a change has no factors
CHUNK_ELEMENTS = 2**24

#: rows of the weight, the first and the one after the last, and their factors up, down
Factors = tuple[tuple[int, int], Tensor, Tensor]


class SideBranch(nn.Module):
    """Factors for some rows of a weight each, or one matrix of its size.

    Args:
        shape: [out, in] of the weight.
        factors: (rows, up [rows, r], down [r, in]) of each segment; segments do not overlap.
        dense: [out, in], where a change has no factors of small rank; then there are no others.
        hadamard_block: that the weight's input channels are rotated with; 0 for none.
        dtype: of the activations.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        factors: Sequence[Factors],
        dense: Tensor | None = None,
        *,
        hadamard_block: int = 0,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        assert (dense is None) == bool(factors)
        self.hadamard_block = hadamard_block
        #: of each: rows of the weight, the first and the one after the last; rows of `down`
        self.segments: list[tuple[int, int, int, int]] = []
        self.down: nn.Parameter | None
        first = 0
        ordered = sorted(factors, key=lambda each: each[0])
        for (start, stop), _, down in ordered:
            self.segments.append((start, stop, first, first + len(down)))
            first += len(down)

        def parameter(tensor: Tensor) -> nn.Parameter:
            return nn.Parameter(tensor.to(dtype).contiguous(), requires_grad=False)

        def rotated(columns: Tensor) -> nn.Parameter:
            return parameter(hadamard_rotate(columns.float(), hadamard_block))

        if dense is not None:
            self.down, self.up = None, rotated(dense)
            return
        rank = max(len(down) for _, _, down in ordered)
        up_rows = torch.zeros(shape[0], rank, dtype=dtype, device=ordered[0][1].device)
        for (start, stop), up, _ in ordered:
            up_rows[start:stop, : up.shape[1]] = up
        self.down = rotated(torch.cat([down for _, _, down in ordered]))
        self.up = parameter(up_rows)

    def add_to(self, out: Tensor, x: Activation, out_slice: slice, in_slice: slice) -> None:
        """Add a part of the branch to the same part of the layer's result, in place.

        Args:
            out: [..., out_slice].
            x: [..., in_slice], as the layer took it.
            out_slice: of the output channels.
            in_slice: of the input channels.
        """
        columns = (self.up if self.down is None else self.down)[:, in_slice]
        if isinstance(x, Tensor) and self.hadamard_block:
            # the input is not rotated; of the two, this is the small one
            columns = hadamard_rotate(columns.float(), self.hadamard_block).to(columns.dtype)
        if self.down is None:
            _add_product(out, x, columns[out_slice])
            return
        first_row, last_row, _ = out_slice.indices(len(self.up))
        segments = []
        for start, stop, *ranks in self.segments:
            if start < last_row and stop > first_row:
                rows = (max(start, first_row) - first_row, min(stop, last_row) - first_row)
                segments += [*rows, *ranks]
        if segments:
            kernels.add_low_rank_(x, columns, self.up[out_slice], segments, out)


def _add_product(out: Tensor, x: Activation, weight: Tensor) -> None:
    """Add x @ weight.T to out, an x in 8 bits some tokens at a time."""
    if isinstance(x, Tensor):
        out += x @ weight.T
        return
    count = max(1, CHUNK_ELEMENTS // (x.qdata.shape[-1] * len(x.qdata)))
    for start in range(0, x.qdata.shape[-2], count):
        chunk = slice(start, start + count)
        product = x.qdata[..., chunk, :].to(weight.dtype) @ weight.T
        out[..., chunk, :] += product * x.scale[..., chunk, :]
