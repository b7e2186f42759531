"""Parts of linear layers: some output channels, some input channels, into existing memory.

The projections of a block are one layer each in the checkpoint; only a part of one is computed at a
time. A layer is torch's own, one with GGUF blocks (block_linear.py), or an 8-bit one (quant.py),
which may take its input in 8 bits.

A GELU that follows a layer runs in the epilogue of the GEMM where a GPU supports it: a pass of its
own reads and writes the widest tensor of a block again.
"""

import logging
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels
from ..kernels import Activation, QuantFormat, dispatch
from ..kernels.dispatch import Candidate, Decision, Finding, short
from .block_linear import BlockLinear
from .quant import QuantLinear
from .side_branch import SideBranch

logger = logging.getLogger("skyreels.transformer.linear")

ALL = slice(None)
#: in which cuBLASLt has GELU in its epilogue
HALF_DTYPES = (torch.bfloat16, torch.float16)
#: largest relative L2 difference from tanh-GELU in float32: rounding to bfloat16 alone is 0.0017
EPILOGUE_BOUND = 5e-3
OWN_PASS = "a pass of its own"


def input_format(layer: nn.Module) -> QuantFormat | None:
    """The format that a layer wants its input in; None for a plain tensor."""
    return layer.input_format if isinstance(layer, QuantLinear) else None


def linear(
    layer: nn.Module,
    x: Activation,
    out_slice: slice = ALL,
    in_slice: slice = ALL,
    out: Tensor | None = None,
    add: bool = False,
) -> Tensor:
    """Apply a part of a linear layer, and of the side branch that a LoRA may have given it.

    Args:
        layer: `nn.Linear`, `BlockLinear` or `QuantLinear`.
        x: [B, S, in_slice]; quantized only for an 8-bit layer.
        out_slice: of the output channels.
        in_slice: of the input channels; the bias belongs to the part that holds the first one.
        out: [B, S, out_slice] to write to, channels contiguous.
        add: add to `out` instead; then the part has no bias.

    Returns:
        [B, S, out_slice]; `out` if it was given.

    Raises:
        TypeError: a quantized input for a layer that is not in 8 bits.
    """
    result = _linear(layer, x, out_slice, in_slice, out, add)
    branch = getattr(layer, "side_branch", None)
    if isinstance(branch, SideBranch):
        branch.add_to(result, x, out_slice, in_slice)
    return result


def _linear(
    layer: nn.Module,
    x: Activation,
    out_slice: slice,
    in_slice: slice,
    out: Tensor | None,
    add: bool,
) -> Tensor:
    """`linear` without the side branch."""
    assert isinstance(layer, nn.Linear | BlockLinear | QuantLinear)
    bias = None if in_slice.start or layer.bias is None else layer.bias[out_slice]
    if isinstance(layer, BlockLinear | QuantLinear):
        return layer.part(x, out_slice, in_slice, bias, out, add)
    if not isinstance(x, Tensor):
        raise TypeError("A quantized input needs an 8-bit layer.")
    weight = layer.weight[out_slice, in_slice]
    if out is None:
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled():
        result = F.linear(x, weight, bias)
        return out.add_(result) if add else out.copy_(result)
    for item, target in zip(x, out, strict=True):
        before = target if add else bias
        if before is None:
            torch.mm(item, weight.T, out=target)
        else:
            torch.addmm(before, item, weight.T, out=target)
    return out


def linear_gelu(
    layer: nn.Module,
    x: Activation,
    out_slice: slice = ALL,
    act_format: QuantFormat | None = None,
) -> Activation:
    """tanh-GELU of a part of a linear layer.

    Where the GEMM applies GELU, that happens before its sums are rounded, else after.

    Args:
        layer: `nn.Linear`, `BlockLinear` or `QuantLinear`.
        x: [B, S, C]; quantized only for an 8-bit layer.
        out_slice: of the output channels.
        act_format: that the next layer wants its input in. Quantizing is a pass over the result
            that does GELU too, so the epilogue would gain nothing.

    Returns:
        [B, S, out_slice].
    """
    if act_format is None and isinstance(x, Tensor) and _can_end_in_gelu(layer, x):
        assert isinstance(layer, nn.Linear)
        active = torch._addmm_activation(
            layer.bias[out_slice], x.flatten(0, -2), layer.weight[out_slice].t(), use_gelu=True
        )
        return torch.unflatten(active, 0, x.shape[:-1])
    return kernels.gelu(linear(layer, x, out_slice), act_format)


def _can_end_in_gelu(layer: nn.Module, x: Tensor) -> bool:
    if not isinstance(layer, nn.Linear) or layer.bias is None:
        return False
    tensors = (x, layer.weight, layer.bias)
    if any(tensor.dtype != x.dtype for tensor in tensors) or x.dtype not in HALF_DTYPES:
        return False
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    return gelu_epilogue(x.device, x.dtype).impl is not None


# --- GELU in the epilogue of a GEMM -------------------------------------------------------------


def gelu_epilogue(device: torch.device, dtype: torch.dtype) -> Decision:
    """Whether GEMMs of a dtype on a device apply GELU; impl None: they do not."""
    key = ("GELU", device, dtype, dispatch.backend())
    return dispatch.remembered(key, lambda: _decide_epilogue(device, dtype))


def _decide_epilogue(device: torch.device, dtype: torch.dtype) -> Decision:
    info, name = dispatch.describe(device), "torch._addmm_activation"
    if dispatch.backend() == "reference":
        return Decision(None, f"{dispatch.BACKEND_VARIABLE}=reference", OWN_PASS)
    if info.type == "meta":
        return Decision(name, "shapes only: as on a GPU", name)
    problem = "" if info.type == "cuda" else f"{info.type} devices have no tanh-GELU there"
    candidate = Candidate(
        name,
        lambda: torch._addmm_activation,
        lambda impl: probe_epilogue(impl, device, dtype),
        problem,
    )
    decision = dispatch.decide([candidate], OWN_PASS)
    if info.type == "cuda":
        subject = f"GELU on {device} ({short(dtype)})"
        dispatch.log_decision(subject, info, decision, name, logger)
    return decision


def probe_epilogue(
    addmm_gelu: Callable[..., Tensor], device: torch.device, dtype: torch.dtype
) -> Finding:
    """Compare torch's GEMM that ends in GELU with tanh-GELU in float32.

    On a CPU the same operator has erf-GELU, which no norm over ordinary numbers tells from the
    other. So half of the outputs come from -3.5..-2, where the two differ by 0.2 to 30 per cent,
    and the second error is 0 for tanh-GELU and 1 for erf-GELU. Single outputs may be far off there:
    a GPU's own tanh has 11 bits (PTX ISA, tanh.approx.f32).

    Returns:
        The first error that is too large, else the second.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(67, 256, generator=generator).to(dtype)
    weight = torch.randn(512, 256, generator=generator) / 16  # sums have deviation 1,
    weight[:256] /= 10  # or 0.1
    bias = torch.cat([torch.linspace(-3.5, -2.0, 256), torch.randn(256, generator=generator)])
    weight, bias = weight.to(dtype), bias.to(dtype)
    sums = F.linear(x.float(), weight.float(), bias.float())
    tanh, erf = F.gelu(sums, approximate="tanh"), F.gelu(sums)
    got = addmm_gelu(bias.to(device), x.to(device), weight.to(device).t(), use_gelu=True)
    got = got.float().cpu()

    def towards_erf(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
        apart = (erf - tanh)[:, :256]
        share = ((got[0] - expected[0])[:, :256] * apart).sum() / apart.square().sum()
        return share.item()

    finding = dispatch.probe(lambda: [got], lambda: [tanh], [("tanh-GELU", ())], EPILOGUE_BOUND)
    if not finding.is_accepted:
        return finding
    return dispatch.probe(
        lambda: [got], lambda: [tanh], [("0 is tanh-GELU, 1 is erf-GELU", ())], 0.5, towards_erf
    )


def decisions(device: torch.device) -> dict[str, dict[str, Decision]]:
    """What `doctor` says of GELU on a device; tries it there if that has not been done."""
    variants = {short(dtype): gelu_epilogue(device, dtype) for dtype in HALF_DTYPES}
    return {"GELU in the linear layer's epilogue": variants}
