"""Which of torch's convolutions on a CPU runs."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor


@contextmanager
def fast_convolutions() -> Iterator[None]:
    """Convolve small clips in float32 by oneDNN, as torch does with clips of a real size.

    For what a test makes at 64x64 pixels torch takes a kernel of its own that needs up to ten times
    as long and rounds less (1.3e-5 from diffusers instead of 9e-6, so the engine keeps it).
    """
    conv3d = F.conv3d

    def fast(input: Tensor, weight: Tensor, bias: Tensor | None = None,
             stride: int | Sequence[int] = 1, padding: int | str | Sequence[int] = 0,
             dilation: int | Sequence[int] = 1, groups: int = 1) -> Tensor:  # fmt: skip
        is_plain = (
            (input.device.type, input.dtype) == ("cpu", torch.float32)
            and torch.backends.mkldnn.is_available()
            and not isinstance(padding, str)
            and input.dim() == 5
            and not torch.is_grad_enabled()
        )
        if not is_plain:
            return conv3d(input, weight, bias, stride, padding, dilation, groups)
        sizes = ((n,) * 3 if isinstance(n, int) else n for n in (padding, stride, dilation))
        return torch.mkldnn_convolution(input, weight, bias, *sizes, groups)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "conv3d", fast)
        yield
