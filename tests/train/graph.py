"""The VAE's graph once more, for training; the one in `skyreels` works in place.

Same modules, same parameters, same numbers (test_train.py compares); made for speed:

* activations are channels-last, in bfloat16 if asked for; parameters are float32;
* padding is one copy, forwards and backwards;
* a convolution of a clip that was enlarged by repeating pixels reads each pixel several times with
  different taps. Summing these taps first leaves 2 instead of 3 in every enlarged axis, one set for
  each of the copies: a third of the work.
"""

import torch
import torch.nn.functional as F
from comfyui_skyreels.skyreels.vae.model import (
    CausalAttention,
    CausalConv3d,
    Level,
    MidBlock,
    ResnetBlock,
    VideoVAE,
)
from torch import Tensor, nn

CHANNELS_LAST = torch.channels_last_3d
#: [copy, tap, old tap]: the first copy of a pixel reads (one before, itself, itself), the second
#: (itself, itself, one after)
_SPACE = torch.tensor([[[1.0, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])
#: in time nothing later is read: (before, before, itself) and (before, itself, itself)
_TIME = torch.tensor([[[1.0, 1, 0], [0, 0, 1]], [[1, 0, 0], [0, 1, 1]]])
_PLAIN = torch.eye(3)[None]


def encode(vae: VideoVAE, video: Tensor) -> Tensor:
    """[B, 3, F, H, W] -> [B, 32, T, h, w]: mean and log variance of the latents."""
    encoder = vae.encoder
    hidden = _conv(encoder.conv_in, video.contiguous(memory_format=CHANNELS_LAST))
    for level in encoder.down_blocks:
        hidden = _level(level, hidden)
    hidden = _mid(encoder.mid_block, hidden)
    hidden = _conv(encoder.conv_out, _norm_silu(encoder.conv_norm_out, hidden))
    return _plain_conv(vae.quant_conv, hidden).float()


def decode(vae: VideoVAE, latents: Tensor) -> Tensor:
    """[B, 16, T, h, w] -> [B, 3, F, H, W] float32."""
    decoder = vae.decoder
    hidden = _plain_conv(vae.post_quant_conv, latents.contiguous(memory_format=CHANNELS_LAST))
    hidden = _mid(decoder.mid_block, _conv(decoder.conv_in, hidden))
    for level in decoder.up_blocks:
        hidden = _level(level, hidden)
    return _conv(decoder.conv_out, _norm_silu(decoder.conv_norm_out, hidden)).float()


class _Pad(torch.autograd.Function):
    """Replicate padding: `front` frames before, one pixel around."""

    @staticmethod
    def forward(context, x: Tensor, front: int) -> Tensor:
        batch, channels, frames, height, width = x.shape
        shape = (batch, channels, frames + front, height + 2, width + 2)
        out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=CHANNELS_LAST)
        inner = out[..., 1:-1, 1:-1]
        inner[:, :, front:] = x
        inner[:, :, :front] = x[:, :, :1]
        out[..., 1:-1, 0], out[..., 1:-1, -1] = inner[..., 0], inner[..., -1]
        out[..., 0, :], out[..., -1, :] = out[..., 1, :], out[..., -2, :]
        context.front = front
        return out

    @staticmethod
    def backward(context, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous(memory_format=CHANNELS_LAST)  # fresh from a convolution: ours
        grad[..., 1, :] += grad[..., 0, :]
        grad[..., -2, :] += grad[..., -1, :]
        grad[..., 1] += grad[..., 0]
        grad[..., -2] += grad[..., -1]
        first = grad[:, :, : context.front + 1].sum(2)
        grad[:, :, context.front] = first
        return grad[:, :, context.front :, 1:-1, 1:-1].contiguous(memory_format=CHANNELS_LAST), None


def _plain_conv(conv: nn.Conv3d, hidden: Tensor) -> Tensor:
    weight, bias = conv.weight.to(hidden.dtype), conv.bias.to(hidden.dtype)
    return F.conv3d(hidden, weight, bias, conv.stride)


def _conv(layer: CausalConv3d, hidden: Tensor) -> Tensor:
    if layer.kernel_size == 1:
        return _plain_conv(layer.conv, hidden)
    if layer.upsample != (1, 1, 1):
        return _enlarging_conv(layer, hidden)
    return _plain_conv(layer.conv, _Pad.apply(hidden, 2))


def _enlarging_conv(layer: CausalConv3d, hidden: Tensor) -> Tensor:
    """Repeat every pixel (and frame but the first) and convolve, without the repetition."""
    height, width = hidden.shape[-2:]
    twice = layer.upsample[0] > 1
    in_time, in_space = (t.to(hidden.device) for t in (_TIME if twice else _PLAIN, _SPACE))
    weight = layer.conv.weight
    weight = torch.einsum("oiklm,pak,qbl,rcm->pqroiabc", weight, in_time, in_space, in_space)
    weight = weight.flatten(0, 3).to(hidden.dtype)
    padded = _Pad.apply(hidden, 1 if twice else 2)
    copies = F.conv3d(padded, weight)  # [B, p q r o, T, H + 1, W + 1]
    copies = copies.unflatten(1, (1 + twice, 2, 2, -1))
    rows = [copies[:, :, 0, :, :, :, :height], copies[:, :, 1, :, :, :, 1:]]
    even = torch.stack([rows[0][:, :, 0, ..., :width], rows[1][:, :, 0, ..., :width]], 5)
    odd = torch.stack([rows[0][:, :, 1, ..., 1:], rows[1][:, :, 1, ..., 1:]], 5)
    out = torch.stack([even, odd], -1)  # [B, p, o, T, H, q, W, r]
    out = out.flatten(6, 7).flatten(4, 5)  # [B, p, o, T, 2H, 2W]
    out = out.transpose(1, 2)
    out = out.transpose(2, 3).flatten(2, 3)[:, :, 1:] if twice else out[:, :, 0]
    out = out + layer.conv.bias.to(out.dtype)[:, None, None, None]
    return out.contiguous(memory_format=CHANNELS_LAST)


def _norm_silu(norm: nn.GroupNorm, hidden: Tensor) -> Tensor:
    return F.silu(_norm(norm, hidden))


def _norm(norm: nn.GroupNorm, hidden: Tensor) -> Tensor:
    weight, bias = norm.weight.to(hidden.dtype), norm.bias.to(hidden.dtype)
    return F.group_norm(hidden, norm.num_groups, weight, bias, norm.eps)


def _resnet(block: ResnetBlock, hidden: Tensor) -> Tensor:
    branch = _conv(block.conv1, _norm_silu(block.norm1, hidden))
    branch = _conv(block.conv2, _norm_silu(block.norm2, branch))
    shortcut = block.conv_shortcut
    return (hidden if shortcut is None else _conv(shortcut, hidden)) + branch


def _attention(block: CausalAttention, hidden: Tensor) -> Tensor:
    frames, height, width = hidden.shape[2:]
    tokens = _norm(block.group_norm, hidden).flatten(2).transpose(1, 2)
    query, key, value = (
        F.linear(tokens, layer.weight.to(tokens.dtype), layer.bias.to(tokens.dtype))[:, None]
        for layer in (block.to_q, block.to_k, block.to_v)
    )
    frame = torch.arange(frames, device=hidden.device).repeat_interleave(height * width)
    seen = frame[:, None] >= frame[None]
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=seen)[:, 0]
    layer = block.to_out[0]
    out = F.linear(out, layer.weight.to(out.dtype), layer.bias.to(out.dtype))
    out = out.transpose(1, 2).unflatten(2, (frames, height, width))
    return hidden + out.contiguous(memory_format=CHANNELS_LAST)


def _mid(block: MidBlock, hidden: Tensor) -> Tensor:
    hidden = _attention(block.attentions[0], _resnet(block.resnets[0], hidden))
    return _resnet(block.resnets[1], hidden)


def _level(level: Level, hidden: Tensor) -> Tensor:
    for block in level.resnets:
        hidden = _resnet(block, hidden)
    for resample in (*level.downsamplers, *level.upsamplers):
        hidden = _conv(resample.conv, hidden)
    return hidden
