"""Inputs for the fused operators, what plain code makes of them, and the error of either.

The truth is the reference in float64 on the same inputs; "eager" is the operator as a model without
fused kernels would write it, every step in the dtype of the activations.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from comfyui_skyreels.skyreels.kernels import operators, reference
from torch import Tensor

FP8, INT8 = torch.float8_e4m3fn, torch.int8


class Case(NamedTuple):
    """One call of an operator. shape: of its first argument; extra: what else it depends on."""

    operator: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16
    to: torch.dtype | None = None
    hadamard_block: int = 0
    image_tokens: int = 0
    front: int = 0
    copies: int = 8

    def __str__(self) -> str:
        said = [self.operator, "x".join(map(str, self.shape)), str(self.dtype)[6:]]
        if self.to is not None:
            said.append(
                str(self.to)[6:]
                + (f"-rotated-{self.hadamard_block}" if self.hadamard_block else "")
            )
        if self.operator == "qk_norm_rope_":
            said.append(f"image-{self.image_tokens}")
        if self.operator in ("norm_silu_pad_", "interleave_", "interleave_moments_"):
            said.append(f"front-{self.front} copies-{self.copies}")
        return " ".join(said)


def inputs(case: Case, device: torch.device | str = "cpu") -> tuple:
    """Arguments of the operator: strided views, rows of different size, vectors cut from one."""
    generator = torch.Generator(device).manual_seed(hash_of(case))

    def wide(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def draw(*shape: int) -> Tensor:
        return wide(*shape).to(case.dtype)

    batch, tokens, *rest = case.shape
    if case.operator == "qk_norm_rope_":
        _, heads, dim = rest
        joined = 2 * draw(batch, tokens, 3 * heads * dim + 32)
        qkv = joined[..., : 3 * heads * dim].unflatten(-1, (3, heads, dim))
        angles = wide(case.image_tokens, dim // 2)
        return qkv, *(1 + 0.2 * draw(4, dim)), torch.polar(torch.ones_like(angles), angles)
    if len(case.shape) == 5:
        return _clip_inputs(case, draw)
    width = rest[0]
    spread = wide(batch, tokens + 1, 1).exp()
    x = (wide(batch, tokens + 1, width) * spread).to(case.dtype)[:, 1:]
    rounding = () if case.to is None else (case.to, case.hadamard_block)
    if case.operator in ("gelu_quantize", "quantize_rows"):
        return x, *rounding
    gate, shift, scale = (0.3 * draw(batch, 1, 3 * width)).chunk(3, dim=-1)
    if case.operator.startswith("layer_norm"):
        return x, shift, scale, *rounding
    y = draw(batch, tokens, 2 * width)[..., :width]
    if case.operator == "gated_residual":
        return x, y, gate
    if case.operator == "gated_residual_sum":
        return x, y, draw(batch, tokens + 1, width)[:, 1:], gate
    return x, y, gate, shift, scale, *rounding


def _clip_inputs(case: Case, draw: Callable[..., Tensor]) -> tuple:
    """A clip with adjacent channels, without its first frame; and where the result goes."""
    batch, channels, frames, height, width = case.shape

    def clip(*shape: int) -> Tensor:
        return draw(*shape).contiguous(memory_format=torch.channels_last_3d)

    x = 0.5 * clip(batch, channels, frames + 1, height, width)[:, :, 1:] + 2
    if case.operator == "channel_moments":
        return (x,)
    if case.operator in ("residual_add_", "residual_add_moments_"):
        return x, clip(batch, channels, frames + 2, height, width)[:, :, 2:], draw(channels)
    if case.operator == "norm_silu_pad_":
        scale, shift = draw(2, batch, channels, 1, 1, 1).float()
        out = clip(batch, channels, case.front + frames + 1, height + 2, width + 2)[:, :, 1:]
        return x, scale, shift, out, case.front
    of_copies = clip(batch, case.copies * channels, frames + 1, height + 1, width + 1)[:, :, 1:]
    frames_out = case.copies // 4 * frames - case.front
    out = clip(batch, channels, frames_out + 1, 2 * height, 2 * width)[:, :, 1:]
    return of_copies, draw(channels), out


def hash_of(case: Case) -> int:
    """A seed; the same in every process, unlike hash()."""
    return sum(31**index * ord(letter) for index, letter in enumerate(str(case)[::-1][:12])) % 2**31


def _eager_norm(x, shift, scale):
    return F.layer_norm(x, x.shape[-1:], eps=reference.EPS) * (1 + scale) + shift


def _eager_quantize(x, to, block):
    if block:
        matrix = reference.hadamard(block, x.device).to(x.dtype)
        x = (x.unflatten(-1, (-1, block)) @ matrix).flatten(-2)
    limit = reference.FORMAT_MAX[to]
    scale = (x.abs().amax(-1, keepdim=True).float() / limit).clamp_min(1e-12)
    scaled = x.float() / scale
    return (scaled.round() if to == INT8 else scaled).to(to), scale


def _eager_qk(qkv, q_weight, k_weight, text_q_weight, text_k_weight, rope):
    count, dim = rope.shape[0], qkv.shape[-1]
    for part, image_weight, text_weight in ((0, q_weight, text_q_weight),
                                            (1, k_weight, text_k_weight)):  # fmt: skip
        x = qkv[:, :, part]
        image = F.rms_norm(x[:, :count], (dim,), image_weight, reference.EPS)
        wide = image.float().unflatten(-1, (-1, 2)).contiguous()
        turned = torch.view_as_real(torch.view_as_complex(wide) * rope[None, :, None]).flatten(-2)
        text = F.rms_norm(x[:, count:], (dim,), text_weight, reference.EPS)
        qkv[:, :, part] = torch.cat([turned.to(x.dtype), text], dim=1)


def _eager_residual_norm(x, y, gate, shift, scale):
    total = x + y * gate
    return total, _eager_norm(total, shift, scale)


def _eager_norm_silu_pad(x, scale, shift, out, front):
    active = F.silu(x * scale.to(x.dtype) + shift.to(x.dtype))
    # torch 2.5 pads no float16 on a CPU
    out.copy_(F.pad(active.float(), (1, 1, 1, 1, front, 0), mode="replicate"))


def _eager_channel_moments(x):
    variance, mean = torch.var_mean(x, dim=(2, 3, 4), correction=0)
    return mean, variance


def _eager_residual_add(x, branch, bias):
    x += branch + bias[:, None, None, None]


def _eager_interleave(x, bias, out):
    reference.interleave_(x, torch.zeros_like(bias), out)
    out += bias[:, None, None, None]


def _eager_residual_add_moments(x, branch, bias):
    _eager_residual_add(x, branch, bias)
    return _eager_channel_moments(x)


def _eager_interleave_moments(x, bias, out):
    _eager_interleave(x, bias, out)
    return _eager_channel_moments(out)


def _eager_residual_norm_quantize(x, y, gate, shift, scale, to, block):
    total, normed = _eager_residual_norm(x, y, gate, shift, scale)
    return total, *_eager_quantize(normed, to, block)


EAGER: dict[str, Callable] = {
    "layer_norm_modulate": _eager_norm,
    "layer_norm_modulate_quantize": lambda x, shift, scale, to, block: _eager_quantize(
        _eager_norm(x, shift, scale), to, block
    ),
    "residual_layer_norm_modulate": _eager_residual_norm,
    "residual_layer_norm_modulate_quantize": _eager_residual_norm_quantize,
    "gated_residual": lambda x, y, gate: x + y * gate,
    "gated_residual_sum": lambda x, y, z, gate: x + (y + z) * gate,
    "qk_norm_rope_": _eager_qk,
    "gelu_quantize": lambda x, to, block: _eager_quantize(F.gelu(x, approximate="tanh"), to, block),
    "quantize_rows": _eager_quantize,
    "channel_moments": _eager_channel_moments,
    "norm_silu_pad_": _eager_norm_silu_pad,
    "residual_add_": _eager_residual_add,
    "residual_add_moments_": _eager_residual_add_moments,
    "interleave_": _eager_interleave,
    "interleave_moments_": _eager_interleave_moments,
}


def results(function: Callable, case: Case, args: tuple) -> list[Tensor]:
    """Outputs of a call on copies of the arguments, as float64; 8-bit ones times their scales,
    and turned back."""
    args = tuple(_copy(a) if isinstance(a, Tensor) else a for a in args)
    returned = function(*args)
    writes = operators.OPERATORS[case.operator].writes
    outputs = [] if writes is None else [args[writes]]
    if returned is not None:
        outputs += [returned] if isinstance(returned, Tensor) else list(returned)
    if case.to is not None:
        scale = outputs.pop().double()
        outputs[-1] = reference.hadamard_rotate(outputs[-1].double() * scale, case.hadamard_block)
    return [each.double().cpu() for each in outputs]


def _copy(x: Tensor) -> Tensor:
    """The same numbers with the same strides in memory of their own."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)


def truth(case: Case, args: tuple) -> list[Tensor]:
    """What exact arithmetic would give, before any rounding to 8 bits."""
    wide = tuple(a.double() if isinstance(a, Tensor) and not a.is_complex() else a for a in args)
    name = case.operator
    if case.to is None:
        return results(getattr(reference, name), case._replace(to=None), wide)
    plain = {"gelu_quantize": reference.gelu, "quantize_rows": lambda x: x}
    function = plain.get(name) or getattr(reference, name.removesuffix("_quantize"))
    return results(function, case._replace(to=None), wide[:-2])


def error(ours: list[Tensor], exact: list[Tensor]) -> float:
    """Largest relative L2 error of the outputs; NaN if any number is one."""
    errors = torch.stack(
        [(a - b).norm() / b.norm() for a, b in zip(ours, exact, strict=True)]
    )  # fmt: skip
    return errors.max().item()


ROWS = (
    "layer_norm_modulate", "residual_layer_norm_modulate", "gated_residual", "gated_residual_sum",
)  # fmt: skip
QUANTIZED = (
    "layer_norm_modulate_quantize", "residual_layer_norm_modulate_quantize", "gelu_quantize",
    "quantize_rows",
)  # fmt: skip
HALF = torch.float16

#: small enough for the Triton interpreter: odd counts, widths that are no powers of two, views
SMALL = [
    *(Case(name, (2, 3, 96), dtype) for name in ROWS
      for dtype in (torch.bfloat16, torch.float16, torch.float32)),
    *(Case(name, (1, 1, 3072)) for name in ROWS),
    *(Case(name, (3, 5, 32)) for name in ROWS),
    *(Case(name, (2, 3, 96), dtype, to) for name in QUANTIZED for to in (FP8, INT8)
      for dtype in (torch.bfloat16, torch.float32)),
    *(Case(name, (2, 3, 96), torch.bfloat16, to, 32) for name in QUANTIZED for to in (FP8, INT8)),
    *(Case(name, (1, 2, 3072), torch.bfloat16, to) for name in QUANTIZED for to in (FP8, INT8)),
    Case("quantize_rows", (1, 1, 768), torch.bfloat16, INT8, 256),
    Case("quantize_rows", (1, 1, 96), torch.float16, INT8, 2),
    Case("gelu_quantize", (1, 1, 12_288), torch.bfloat16, FP8),
    Case("quantize_rows", (1, 1, 15_360), torch.bfloat16, INT8),
    Case("qk_norm_rope_", (2, 5, 3, 3, 16), image_tokens=3),
    Case("qk_norm_rope_", (2, 3, 3, 24, 128), image_tokens=2),
    Case("qk_norm_rope_", (1, 3, 3, 2, 64), image_tokens=0),
    Case("qk_norm_rope_", (2, 4, 3, 3, 32), image_tokens=4),
    Case("qk_norm_rope_", (2, 3, 3, 5, 256), HALF, image_tokens=1),
    Case("qk_norm_rope_", (1, 2, 3, 1, 128), torch.float32, image_tokens=1),
    Case("norm_silu_pad_", (2, 8, 3, 5, 7), front=2),
    Case("norm_silu_pad_", (1, 3, 2, 5, 4)),
    Case("norm_silu_pad_", (1, 512, 1, 3, 9), HALF, front=1),
    Case("norm_silu_pad_", (2, 4, 1, 1, 1), torch.float32, front=2),
    Case("channel_moments", (2, 8, 3, 5, 7)),
    Case("channel_moments", (1, 300, 3, 12, 15)),
    Case("channel_moments", (2, 4, 1, 9, 9), torch.float32),
    Case("residual_add_", (2, 8, 3, 5, 7)),
    Case("residual_add_", (1, 96, 2, 5, 13), torch.float32),
    Case("residual_add_moments_", (2, 8, 3, 5, 7)),
    Case("residual_add_moments_", (1, 96, 2, 5, 13), torch.float32),
    Case("residual_add_moments_", (1, 300, 3, 12, 15)),
    Case("interleave_", (2, 8, 2, 2, 3)),
    Case("interleave_", (1, 12, 2, 3, 5), front=1),
    Case("interleave_", (1, 128, 2, 2, 40), HALF, copies=4),
    Case("interleave_moments_", (2, 8, 1, 2, 3)),
    Case("interleave_moments_", (1, 12, 2, 3, 5), torch.float32, front=1),
    Case("interleave_moments_", (1, 512, 1, 1, 200), HALF, copies=4),
]  # fmt: skip
