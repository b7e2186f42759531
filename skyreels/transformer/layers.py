"""Building blocks of the HunyuanVideo transformer.

Attribute names are those of the original Tencent checkpoint, whose projections are already fused
(`img_attn_qkv`, `linear1`); keymaps.py fuses the other layouts while they load. Linear layers are
plain submodules, so a quantized one takes their place by assignment; attention and modulation are
arguments. What lies between the GEMMs is fused (kernels/).

In float32 whatever the weights are: the RoPE table and its rotation, the sinusoid of the timestep,
the statistics of every norm.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .. import kernels
from ..config import Chunking, TransformerConfig
from ..errors import OptionError
from ..kernels import Activation, QuantizedActivation
from .attention import Attention
from .linear import ALL, input_format, linear, linear_gelu

#: RIFLEx keeps a clip within this part of one period of a temporal frequency
RIFLEX_PERIODS = 0.9
#: latent frames beyond which RIFLEx is needed: 0.9 of 50.27, the period of SkyReels' 4th frequency
MAX_PLAIN_LATENT_FRAMES = 45
#: of the longest clips that HunyuanVideo was trained on, 129 frames
TRAINED_LATENT_FRAMES = 33
#: chunks of tokens start at multiples of this: the data of a token, even four bytes of scale, then
#: starts at an address that vendor kernels accept, and their tiles are whole
TOKEN_MULTIPLE = 128


def rope_table(
    grid: tuple[int, int, int],
    config: TransformerConfig,
    *,
    riflex_k: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """RoPE of the image tokens, as complex numbers cos + i sin.

    RIFLEx: where a clip is longer than the period of the k-th temporal frequency, that frequency
    starts over, and the motion with it (for k = 4 after 50.27 latent frames, 201 frames). So it is
    lowered until the clip takes 0.9 of its period; with a whole period, the end may still repeat.

    Args:
        grid: tokens in time, height and width.
        config: rope_theta and rope_axes_dim are used.
        riflex_k: which temporal frequency to lower, counted from 1; 0 leaves the table alone, and
            so does a clip of at most 45 latent frames (177 frames).
        device: where the table is built.

    Returns:
        [N, D / 2] complex64, N = product of the grid, tokens in order time, row, column.

    Raises:
        OptionError: the clip is long and there is no such frequency.

    Source: RoPE arXiv:2104.09864; RIFLEx arXiv:2502.15894, equation 8, and the factor 0.9 of its
        authors' code, thu-ml/RIFLEx.
    """
    per_axis = []
    for axis, (length, dim) in enumerate(zip(grid, config.rope_axes_dim, strict=True)):
        exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
        frequencies = 1.0 / config.rope_theta**exponents
        if axis == 0 and riflex_k and length > MAX_PLAIN_LATENT_FRAMES:
            if not 1 <= riflex_k <= len(frequencies):
                raise OptionError(
                    f"RIFLEx k {riflex_k} is not within 1..{len(frequencies)}, the temporal "
                    "frequencies of this model: use 4 for SkyReels, or 0 for off."
                )
            frequency = config.rope_theta ** (-2 * (riflex_k - 1) / dim)
            lowered = riflex_frequency(frequency, length)
            if lowered < frequency:  # else the float32 value stays, bit for bit
                frequencies[riflex_k - 1] = lowered
        positions = torch.arange(length, dtype=torch.float32, device=device)
        per_axis.append(torch.outer(positions, frequencies))
    grid_t, grid_h, grid_w = grid
    angles = torch.cat(
        [
            per_axis[0][:, None, None].expand(-1, grid_h, grid_w, -1),
            per_axis[1][None, :, None].expand(grid_t, -1, grid_w, -1),
            per_axis[2][None, None, :].expand(grid_t, grid_h, -1, -1),
        ],
        dim=-1,
    ).flatten(0, 2)
    return torch.polar(torch.ones_like(angles), angles)


def riflex_frequency(frequency: float, latent_frames: int) -> float:
    """A temporal frequency, lowered if a clip would take more than 0.9 of its period.

    Args:
        frequency: radians per latent frame.
        latent_frames: of the clip.

    Returns:
        min(frequency, 0.9 * 2 pi / latent_frames).

    Source: see `rope_table`.
    """
    return min(frequency, RIFLEX_PERIODS * 2 * math.pi / latent_frames)


def intrinsic_frequency(config: TransformerConfig) -> int:
    """Find the temporal frequency that decides when a clip repeats, RIFLEx's k.

    It is the fastest whose period covers the longest clips of the training; the faster ones repeat
    within such clips already.

    Args:
        config: rope_theta and rope_axes_dim are used.

    Returns:
        Counted from 1: 4 for SkyReels. The slowest frequency if none is slow enough.

    Source: RIFLEx arXiv:2502.15894, section 3.
    """
    dim = config.rope_axes_dim[0]
    for k in range(1, dim // 2):
        if 2 * math.pi * config.rope_theta ** (2 * (k - 1) / dim) >= TRAINED_LATENT_FRAMES:
            return k
    return dim // 2


def sinusoidal_embedding(values: Tensor, dim: int = 256) -> Tensor:
    """[B] values on the 0-1000 scale -> [B, dim] float32, cosines first, maximal period 10000."""
    exponents = torch.arange(dim // 2, dtype=torch.float32, device=values.device) / (dim // 2)
    angles = values.float()[:, None] * torch.exp(-math.log(10000.0) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def split_heads(qkv: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """[B, N, 3 * heads * D] fused projection -> query, key, value, each [B, heads, N, D]."""
    query, key, value = rearrange(qkv, "B N (K H D) -> K B H N D", K=3, D=head_dim)
    return query, key, value


class TimestepEmbedder(nn.Module):
    """Sinusoid of a scalar through a SiLU MLP; [B] -> [B, hidden]."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(256, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """[B] -> [B, hidden] in dtype."""
        embedded: Tensor = self.mlp(sinusoidal_embedding(values).to(dtype))
        return embedded


class VectorEmbedder(nn.Module):
    """The pooled CLIP embedding through a SiLU MLP; [B, pooled] -> [B, hidden]."""

    def __init__(self, in_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(in_dim, hidden_size)
        self.out_layer = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[B, pooled] -> [B, hidden]."""
        embedded: Tensor = self.out_layer(F.silu(self.in_layer(x)))
        return embedded


class ContextEmbedder(nn.Module):
    """Mean of the language model's states through a SiLU MLP; [B, text] -> [B, hidden]."""

    def __init__(self, in_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[B, text] -> [B, hidden]."""
        embedded: Tensor = self.linear_2(F.silu(self.linear_1(x)))
        return embedded


class PatchEmbedder(nn.Module):
    """Latent patches to tokens; [B, C, T, h, w] -> [B, N, hidden], order time, row, column."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        patch = (config.patch_size_t, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(config.in_channels, config.hidden_size, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, h, w] -> [B, N, hidden]."""
        tokens: Tensor = rearrange(self.proj(x), "B C T h w -> B (T h w) C")
        return tokens


class MLP(nn.Module):
    """Two linear layers around one activation; [B, N, C] -> [B, N, C]."""

    def __init__(self, hidden_size: int, inner_size: int, activation: nn.Module) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, inner_size)
        self.act = activation
        self.fc2 = nn.Linear(inner_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out


class ModulationOut(NamedTuple):
    """What AdaLN does around one attention or MLP; each [B, 1, hidden]."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


def split_modulation(mod: Tensor, count: int) -> list[ModulationOut]:
    """[B, 1, 3 * count * hidden], the output of a `Modulation`, by attention and MLP."""
    return [ModulationOut(*part.chunk(3, dim=-1)) for part in mod.chunk(count, dim=-1)]


class Modulation(nn.Module):
    """Timestep, pooled text and guidance to shifts, scales and gates; [B, C] -> [B, 1, all].

    A third of the model's weights, but no latent goes in, so a run computes it in advance: see
    precompute.py.
    """

    def __init__(self, hidden_size: int, chunks: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, chunks * hidden_size)

    def forward(self, vec: Tensor) -> Tensor:
        """[B, C] -> [B, 1, all]."""
        return linear(self.linear, F.silu(vec))[:, None]


class RefinerBlock(nn.Module):
    """Self-attention block of the text refiner: affine pre-norms, gates only, no RoPE."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.head_dim = config.attention_head_dim
        self.norm1 = nn.LayerNorm(hidden, eps=1e-6)
        self.self_attn_qkv = nn.Linear(hidden, 3 * hidden)
        self.self_attn_proj = nn.Linear(hidden, hidden)
        self.norm2 = nn.LayerNorm(hidden, eps=1e-6)
        self.mlp = MLP(hidden, int(hidden * config.mlp_ratio), nn.SiLU())
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden))

    def forward(self, x: Tensor, vec: Tensor, attention: Attention) -> Tensor:
        """[B, L, hidden] and [B, hidden] -> [B, L, hidden]."""
        gate_attn, gate_mlp = self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)
        query, key, value = split_heads(self.self_attn_qkv(self.norm1(x)), self.head_dim)
        attended = rearrange(attention(query, key, value), "B H L D -> B L (H D)")
        x = torch.addcmul(x, self.self_attn_proj(attended), gate_attn)
        return torch.addcmul(x, self.mlp(self.norm2(x)), gate_mlp)


class TokenRefiner(nn.Module):
    """Language-model states to text tokens; [B, L, text] -> [B, L, hidden]."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.input_embedder = nn.Linear(config.text_embed_dim, hidden)
        self.t_embedder = TimestepEmbedder(hidden)
        self.c_embedder = ContextEmbedder(config.text_embed_dim, hidden)
        blocks = nn.ModuleList(RefinerBlock(config) for _ in range(config.num_refiner_layers))
        self.individual_token_refiner = nn.ModuleDict({"blocks": blocks})

    def forward(self, states: Tensor, timestep: Tensor, attention: Attention) -> Tensor:
        """[B, L, text] and [B] -> [B, L, hidden]."""
        vec = self.t_embedder(timestep, states.dtype) + self.c_embedder(states.mean(dim=1))
        x: Tensor = self.input_embedder(states)
        for block in self.individual_token_refiner["blocks"].children():
            x = block(x, vec, attention)
        return x


class DoubleBlock(nn.Module):
    """Image and text stream with weights of their own, joined by one attention."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        hidden, head_dim = config.hidden_size, config.attention_head_dim
        inner = int(hidden * config.mlp_ratio)
        self.img_mod = Modulation(hidden, 6)
        self.img_attn_qkv = nn.Linear(hidden, 3 * hidden)
        self.img_attn_q_norm = nn.RMSNorm(head_dim, eps=1e-6)
        self.img_attn_k_norm = nn.RMSNorm(head_dim, eps=1e-6)
        self.img_attn_proj = nn.Linear(hidden, hidden)
        self.img_mlp = MLP(hidden, inner, nn.GELU(approximate="tanh"))
        self.txt_mod = Modulation(hidden, 6)
        self.txt_attn_qkv = nn.Linear(hidden, 3 * hidden)
        self.txt_attn_q_norm = nn.RMSNorm(head_dim, eps=1e-6)
        self.txt_attn_k_norm = nn.RMSNorm(head_dim, eps=1e-6)
        self.txt_attn_proj = nn.Linear(hidden, hidden)
        self.txt_mlp = MLP(hidden, inner, nn.GELU(approximate="tanh"))

    @property
    def modulations(self) -> list[Modulation]:
        """Those whose outputs `forward` takes, in this order."""
        return [self.img_mod, self.txt_mod]

    def forward(
        self,
        img: Tensor,
        txt: Tensor,
        mods: tuple[Tensor, ...],
        rope: Tensor,
        attention: Attention,
        chunking: Chunking,
    ) -> tuple[Tensor, Tensor]:
        """Tokens [B, N, C] of the image and [B, L, C] of the text -> the same."""
        img_mod1, img_mod2 = split_modulation(mods[0], 2)
        txt_mod1, txt_mod2 = split_modulation(mods[1], 2)
        img_normed = _modulated_norm(self.img_attn_qkv, img, img_mod1)
        txt_normed = _modulated_norm(self.txt_attn_qkv, txt, txt_mod1)
        streams = [(self.img_attn_qkv, img_normed), (self.txt_attn_qkv, txt_normed)]
        norms = [
            self.img_attn_q_norm,
            self.img_attn_k_norm,
            self.txt_attn_q_norm,
            self.txt_attn_k_norm,
        ]
        num_tokens = img.shape[1] + txt.shape[1]
        attended = _attend(
            streams, img, num_tokens, norms, rope, attention=attention, chunking=chunking
        )
        del img_normed, txt_normed, streams
        img_attended, txt_attended = torch.split(attended, [img.shape[1], txt.shape[1]], dim=1)
        del attended
        img_out = linear(self.img_attn_proj, _quantized_input(self.img_attn_proj, img_attended))
        txt_out = linear(self.txt_attn_proj, _quantized_input(self.txt_attn_proj, txt_attended))
        del img_attended, txt_attended

        img, img_normed = kernels.residual_layer_norm_modulate(
            img,
            img_out,
            img_mod1.gate,
            img_mod2.shift,
            img_mod2.scale,
            input_format(self.img_mlp.fc1),
        )
        del img_out
        img_out = _feed_forward(self.img_mlp, img_normed, img, chunking.mlp_chunks)
        del img_normed
        img = kernels.gated_residual(img, img_out, img_mod2.gate)
        txt, txt_normed = kernels.residual_layer_norm_modulate(
            txt,
            txt_out,
            txt_mod1.gate,
            txt_mod2.shift,
            txt_mod2.scale,
            input_format(self.txt_mlp.fc1),
        )
        txt_out = _feed_forward(self.txt_mlp, txt_normed, txt, 1)
        return img, kernels.gated_residual(txt, txt_out, txt_mod2.gate)


class SingleBlock(nn.Module):
    """Attention and MLP side by side on the joined [image ; text] sequence."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        hidden, head_dim = config.hidden_size, config.attention_head_dim
        inner = int(hidden * config.mlp_ratio)
        self.modulation = Modulation(hidden, 3)
        self.linear1 = nn.Linear(hidden, 3 * hidden + inner)  # queries, keys, values, MLP
        self.q_norm = nn.RMSNorm(head_dim, eps=1e-6)
        self.k_norm = nn.RMSNorm(head_dim, eps=1e-6)
        self.linear2 = nn.Linear(hidden + inner, hidden)  # of attention, of MLP

    @property
    def modulations(self) -> list[Modulation]:
        """Those whose outputs `forward` takes."""
        return [self.modulation]

    def forward(
        self,
        x: Tensor,
        mods: tuple[Tensor, ...],
        rope: Tensor,
        attention: Attention,
        chunking: Chunking,
    ) -> Tensor:
        """[B, N + L, C], image tokens first -> the same."""
        (mod,) = split_modulation(mods[0], 1)
        hidden = x.shape[2]
        normed = _modulated_norm(self.linear1, x, mod)
        norms = [self.q_norm, self.k_norm, self.q_norm, self.k_norm]
        attended = _attend(
            [(self.linear1, normed)],
            x,
            x.shape[1],
            norms,
            rope,
            attention=attention,
            chunking=chunking,
        )
        attended_input = _quantized_input(self.linear2, attended)
        del attended
        out = linear(self.linear2, attended_input, in_slice=slice(0, hidden))
        del attended_input
        # 8-bit GEMMs cannot accumulate into `out`, so the MLP half goes to a buffer of its own
        mlp_out = None if input_format(self.linear2) is None else torch.empty_like(out)
        mlp_slice, in_slice = slice(3 * hidden, None), slice(hidden, None)
        for chunk in _chunks(x.shape[1], chunking.mlp_chunks, TOKEN_MULTIPLE):
            active = linear_gelu(
                self.linear1, _slice_tokens(normed, chunk), mlp_slice, input_format(self.linear2)
            )
            target = (out if mlp_out is None else mlp_out)[:, chunk]
            linear(self.linear2, active, ALL, in_slice, target, add=mlp_out is None)
            del active  # before the next chunk is computed
        return kernels.gated_residual(x, out, mod.gate, mlp_out)


def _chunks(length: int, count: int, multiple: int = 1) -> list[slice]:
    """At most `count` chunks of about equal length that start at multiples of `multiple`."""
    even = [-(-length * part // (count * multiple)) * multiple for part in range(count)]
    ends = [*(min(end, length) for end in even), length]
    return [slice(start, end) for start, end in pairwise(ends) if end > start]


def _slice_tokens(x: Activation, chunk: slice) -> Activation:
    if isinstance(x, Tensor):
        return x[:, chunk]
    return QuantizedActivation(x.qdata[:, chunk], x.scale[:, chunk])


def _modulated_norm(layer: nn.Module, x: Tensor, mod: ModulationOut) -> Activation:
    """The modulated LayerNorm of x, in the input format of the layer."""
    return kernels.layer_norm_modulate(x, mod.shift, mod.scale, input_format(layer))


def _quantized_input(layer: nn.Module, x: Tensor) -> Activation:
    act_format = input_format(layer)
    return x if act_format is None else kernels.quantize_rows(x, act_format)


def _feed_forward(mlp: MLP, normed: Activation, like: Tensor, chunks: int) -> Tensor:
    """The MLP of a block, some tokens at a time, so that its wide middle is never whole."""
    if chunks == 1:
        return linear(mlp.fc2, linear_gelu(mlp.fc1, normed, act_format=input_format(mlp.fc2)))
    out = torch.empty_like(like)
    for chunk in _chunks(like.shape[1], chunks, TOKEN_MULTIPLE):
        inner = linear_gelu(mlp.fc1, _slice_tokens(normed, chunk), act_format=input_format(mlp.fc2))
        linear(mlp.fc2, inner, out=out[:, chunk])
        del inner  # before the next chunk is computed
    return out


def _attend(
    streams: Sequence[tuple[nn.Module, Activation]],
    like: Tensor,
    num_tokens: int,
    norms: list[nn.RMSNorm],
    rope: Tensor,
    *,
    attention: Attention,
    chunking: Chunking,
) -> Tensor:
    """Joint attention of all tokens of the streams, some heads at a time.

    Queries, keys and values of all streams are projected into one buffer, so that nothing is
    concatenated, and normalized and rotated in place.

    Args:
        streams: (layer that begins with the q, k, v projection, its input), in order.
        like: of the dtype, device, batch and width of the result.
        num_tokens: of all streams.
        norms: of queries and keys of image tokens, of queries and keys of text tokens.
        rope: [N, D / 2] complex64, N the number of image tokens.
        attention: see attention.py.
        chunking: how many heads are computed at a time.

    Returns:
        [B, num_tokens, C].
    """
    batch, _, hidden = like.shape
    head_dim = len(norms[0].weight)
    q_norm, k_norm, text_q_norm, text_k_norm = (norm.weight for norm in norms)
    weights = (q_norm, k_norm, text_q_norm, text_k_norm)
    groups = _chunks(hidden // head_dim, chunking.head_groups)
    if len(groups) == 1:
        qkv = _project(streams, like, num_tokens, slice(0, hidden), head_dim)
        query, key, value = kernels.qk_norm_rope(qkv, *weights, rope).permute(2, 0, 3, 1, 4)
        return attention(query, key, value).transpose(1, 2).flatten(2)
    attended = like.new_empty(batch, num_tokens, hidden)
    for heads in groups:
        channels = slice(heads.start * head_dim, heads.stop * head_dim)
        qkv = _project(streams, like, num_tokens, channels, head_dim)
        query, key, value = kernels.qk_norm_rope(qkv, *weights, rope).permute(2, 0, 3, 1, 4)
        attended[:, :, channels] = attention(query, key, value).transpose(1, 2).flatten(2)
        del qkv, query, key, value  # before the next group is computed
    return attended


def _project(
    streams: Sequence[tuple[nn.Module, Activation]],
    like: Tensor,
    num_tokens: int,
    channels: slice,
    head_dim: int,
) -> Tensor:
    """Those channels of the q, k, v of all streams: [B, num_tokens, 3, heads, D]."""
    hidden, width = like.shape[2], channels.stop - channels.start
    qkv = like.new_empty(like.shape[0], num_tokens, 3, width)
    start = 0
    for layer, normed in streams:
        tokens = (normed if isinstance(normed, Tensor) else normed.qdata).shape[1]
        target = qkv[:, start : start + tokens]
        start += tokens
        if width == hidden:
            linear(layer, normed, slice(0, 3 * hidden), out=target.flatten(2))
            continue
        for index in range(3):
            out_slice = slice(index * hidden + channels.start, index * hidden + channels.stop)
            linear(layer, normed, out_slice, out=target[:, :, index])
    return torch.unflatten(qkv, 3, (-1, head_dim))


class FinalLayer(nn.Module):
    """Last modulation and projection to patches; [B, N, hidden] -> [B, N, C * pt * ph * pw]."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        patch_volume = config.patch_size_t * config.patch_size**2
        self.linear = nn.Linear(hidden, patch_volume * config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden))

    def forward(self, x: Tensor, mod: Tensor) -> Tensor:
        """[B, N, hidden] and [B, 2 * hidden] -> [B, N, C * pt * ph * pw]."""
        shift, scale = mod[:, None].chunk(2, dim=-1)
        patches: Tensor = self.linear(kernels.layer_norm_modulate(x, shift, scale))
        return patches
