"""Parts of linear layers: some of their rows, some of their columns, into memory that is there.

The projections of a block are one layer each in the checkpoint; what is computed at a time is
narrower. A layer is torch's own or an 8-bit one (quant.py), which may take its input in 8 bits.

A GELU that follows a layer is applied by the matrix product itself where a GPU can: as a pass of
its own it reads and writes the widest tensor of a block again.
"""

import logging
from collections.abc import Hashable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels
from ..kernels import RowFormat, Rows, dispatch
from ..kernels.dispatch import Decision, short
from .quant import QuantLinear

logger = logging.getLogger("skyreels.transformer.linear")

ALL = slice(None)
#: in which cuBLASLt has GELU in its epilogue
HALF_DTYPES = (torch.bfloat16, torch.float16)
#: largest relative L2 difference from tanh-GELU in float32: rounding to bfloat16 alone is 0.0017
EPILOGUE_BOUND = 5e-3


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


def linear_gelu(
    layer: nn.Module, x: Tensor | Rows, rows: slice = ALL, to: RowFormat | None = None
) -> Tensor | Rows:
    """tanh-GELU of a part of a linear layer.

    Where the matrix product applies GELU, that happens before its sums are rounded, else after.

    Args:
        x: [B, S, C]; `Rows` only for an 8-bit layer.
        rows: of the weight, the output channels.
        to: what the next layer wants its input rounded to. That is a pass over the result, which
            has room for GELU too, so nothing would be gained by doing it earlier.
    Returns:
        [B, S, rows].
    """
    if to is None and isinstance(x, Tensor) and _can_end_in_gelu(layer, x):
        assert isinstance(layer, nn.Linear)
        active = torch._addmm_activation(
            layer.bias[rows], x.flatten(0, -2), layer.weight[rows].t(), use_gelu=True
        )
        return active.unflatten(0, x.shape[:-1])
    return kernels.gelu(linear(layer, x, rows), to)


def _can_end_in_gelu(layer: nn.Module, x: Tensor) -> bool:
    if not isinstance(layer, nn.Linear) or layer.bias is None:
        return False
    tensors = (x, layer.weight, layer.bias)
    if any(tensor.dtype != x.dtype for tensor in tensors) or x.dtype not in HALF_DTYPES:
        return False
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    return bool(gelu_epilogue(x.device, x.dtype).impl)


# --- GELU in the epilogue of a matrix product -----------------------------------------------------


_epilogues: dict[Hashable, Any] = {}


def gelu_epilogue(device: torch.device, dtype: torch.dtype) -> Decision:
    """Whether products of a dtype on a device end in GELU (impl True); tried once, remembered."""
    key = (device, dtype, dispatch.backend())
    return dispatch.remembered(_epilogues, key, lambda: _try_epilogue(device, dtype))


def _try_epilogue(device: torch.device, dtype: torch.dtype) -> Decision:
    backend, kind = dispatch.backend(), dispatch.describe(device).type
    if backend == "reference":
        reason = f"{dispatch.BACKEND_VARIABLE}=reference"
        return Decision(False, f"a pass of its own: {reason}")
    if kind == "meta":
        return Decision(True, "shapes only: as on a GPU")
    if kind != "cuda":
        return Decision(False, f"a pass of its own: {kind} devices have no tanh-GELU there")
    is_final = True
    try:
        problem = epilogue_problem(device, dtype)
    except Exception as error:  # noqa: BLE001 - a private operator: whatever it does, work goes on
        problem, is_final = dispatch.failed_trial(error, "torch._addmm_activation")
    if not problem:
        logger.info("GELU on %s (%s) is part of the matrix product.", device, short(dtype))
        return Decision(True, "self-test passed")
    reason = f"a pass of its own: torch._addmm_activation {problem}"
    dispatch.say_once(f"GELU on {device} ({short(dtype)}) is {reason}.", source=logger)
    return Decision(False, reason, is_final)


def epilogue_problem(device: torch.device, dtype: torch.dtype) -> str:
    """Compare torch's product that ends in GELU with tanh-GELU in float32.

    On a CPU the same operator has erf-GELU, which no norm over ordinary numbers tells from the
    other. So half of the outputs come from -3.5..-2, where the two differ by 0.2 to 30 per cent,
    and the question is to which of them they are nearer. Each single one may be far off there: a
    GPU's own tanh has 11 bits (PTX ISA, tanh.approx.f32).

    Returns:
        what is wrong, or "".
    Raises:
        Exception: whatever a private operator raises.
    """
    with dispatch.apart():
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(67, 256, generator=generator).to(dtype)
        weight = torch.randn(512, 256, generator=generator) / 16  # sums have deviation 1,
        weight[:256] /= 10  # or 0.1
        bias = torch.cat([torch.linspace(-3.5, -2.0, 256), torch.randn(256, generator=generator)])
        weight, bias = weight.to(dtype), bias.to(dtype)
        got = torch._addmm_activation(
            bias.to(device), x.to(device), weight.to(device).t(), use_gelu=True
        )
        got = got.float().cpu()
        before = F.linear(x.float(), weight.float(), bias.float())
        right, wrong = F.gelu(before, approximate="tanh"), F.gelu(before)
    difference = ((got - right).norm() / right.norm()).item()
    if not difference <= EPILOGUE_BOUND:
        return f"differs from tanh-GELU by {difference:.2g}"
    apart = (wrong - right)[:, :256]
    # 0 for tanh-GELU, 1 for erf-GELU
    towards_wrong = ((got - right)[:, :256] * apart).sum() / apart.square().sum()
    if not towards_wrong <= 0.5:
        return "gives erf-GELU"
    return ""


def gelu_report(device: torch.device) -> dict[str, str]:
    """What `doctor` says of GELU on a device; tries it there if that has not been done."""
    reasons = {dtype: gelu_epilogue(device, dtype).reason for dtype in HALF_DTYPES}
    if len(set(reasons.values())) == 1:
        line = reasons[HALF_DTYPES[0]]
    else:
        line = "; ".join(f"{short(dtype)}: {reason}" for dtype, reason in reasons.items())
    return {"GELU in the linear layer's epilogue": line}
