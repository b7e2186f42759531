"""Building blocks of the HunyuanVideo transformer.

Attribute names are those of the original Tencent checkpoint, whose projections are already fused
(`img_attn_qkv`, `linear1`); keymaps.py fuses the other layouts while they load. Linear layers are
plain submodules, so a quantised one takes their place by assignment; attention is an argument.

Kept in float32 whatever the weights are: the rotary table and the rotation, the sinusoid of the
timestep, the statistics of every norm (torch accumulates those in float32 itself).
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .attention import Attention
from .config import TransformerConfig
from .errors import OptionError

#: latent frames the model has seen in training; the slow temporal frequency wraps at 50.27
TRAINED_LATENT_FRAMES = 50


def rope_table(
    grid: tuple[int, int, int],
    config: TransformerConfig,
    *,
    riflex_k: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Rotations of the image tokens, as complex numbers cos + i sin.

    RIFLEx: beyond the trained length the k-th temporal frequency would complete its period inside
    the clip, and the motion starts over (at frame 201 for k = 4). Slowing that one frequency to 0.9
    of a period per clip removes the reset.

    Args:
        grid: tokens in time, height and width.
        config: rope_theta and rope_axes_dim are used.
        riflex_k: which temporal frequency to slow down, counted from 1; 0 leaves the table alone,
            and so does a clip of at most 50 latent frames.
        device: where the table is built.
    Returns:
        [N, D / 2] complex64, N = product of the grid, tokens in order time, row, column.
    Raises:
        OptionError: a long clip and no such frequency.
    Source: RoPE arXiv:2104.09864; RIFLEx arXiv:2502.15894, equation 8.
    """
    per_axis = []
    for axis, (length, dim) in enumerate(zip(grid, config.rope_axes_dim, strict=True)):
        exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
        frequencies = 1.0 / config.rope_theta**exponents
        if axis == 0 and riflex_k and length > TRAINED_LATENT_FRAMES:
            if not 1 <= riflex_k <= len(frequencies):
                raise OptionError(
                    f"RIFLEx k {riflex_k} is not within 1..{len(frequencies)}, the temporal "
                    "frequencies of this model: use 4 for SkyReels, or 0 for off."
                )
            frequencies[riflex_k - 1] = 0.9 * 2 * math.pi / length
        positions = torch.arange(length, dtype=torch.float32, device=device)
        per_axis.append(torch.outer(positions, frequencies))
    frames, rows, columns = grid
    angles = torch.cat(
        [
            per_axis[0][:, None, None].expand(-1, rows, columns, -1),
            per_axis[1][None, :, None].expand(frames, -1, columns, -1),
            per_axis[2][None, None, :].expand(frames, rows, -1, -1),
        ],
        dim=-1,
    ).flatten(0, 2)
    return torch.polar(torch.ones_like(angles), angles)


def apply_rope(x: Tensor, table: Tensor) -> Tensor:
    """Rotate adjacent pairs of the head dimension, in float32.

    Args:
        x: [B, heads, N, D] query or key.
        table: [N, D / 2] complex64 from `rope_table`.
    Returns:
        [B, heads, N, D] in x's dtype.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2)).contiguous()
    return torch.view_as_real(torch.view_as_complex(wide) * table).flatten(-2).to(x.dtype)


def sinusoidal_embedding(values: Tensor, dim: int = 256) -> Tensor:
    """[B] values on the 0-1000 scale -> [B, dim] float32, cosines first, maximal period 10000."""
    exponents = torch.arange(dim // 2, dtype=torch.float32, device=values.device) / (dim // 2)
    angles = values.float()[:, None] * torch.exp(-math.log(10000.0) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without weights, then scale and shift; x [B, N, C], shift and scale [B, 1, C]."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


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
        return self.mlp(sinusoidal_embedding(values).to(dtype))


class VectorEmbedder(nn.Module):
    """The pooled CLIP embedding through a SiLU MLP; [B, pooled] -> [B, hidden]."""

    def __init__(self, in_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(in_dim, hidden_size)
        self.out_layer = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class ContextEmbedder(nn.Module):
    """Mean of the language model's states through a SiLU MLP; [B, text] -> [B, hidden]."""

    def __init__(self, in_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class PatchEmbedder(nn.Module):
    """Latent patches to tokens; [B, C, T, h, w] -> [B, N, hidden], order time, row, column."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        patch = (config.patch_size_t, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(config.in_channels, config.hidden_size, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(self.proj(x), "B C T h w -> B (T h w) C")


class MLP(nn.Module):
    """Two linear layers around one activation; [B, N, C] -> [B, N, C]."""

    def __init__(self, hidden_size: int, inner_size: int, activation: nn.Module) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, inner_size)
        self.act = activation
        self.fc2 = nn.Linear(inner_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Modulation(nn.Module):
    """Conditioning vector to `chunks` rows of shifts, scales and gates, each [B, 1, C]."""

    def __init__(self, hidden_size: int, chunks: int) -> None:
        super().__init__()
        self.chunks = chunks
        self.linear = nn.Linear(hidden_size, chunks * hidden_size)

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        return self.linear(F.silu(vec))[:, None].chunk(self.chunks, dim=-1)


class RefinerBlock(nn.Module):
    """Self-attention block of the text refiner: affine pre-norms, gates only, no rotation."""

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
        vec = self.t_embedder(timestep, states.dtype) + self.c_embedder(states.mean(dim=1))
        x = self.input_embedder(states)
        for block in self.individual_token_refiner["blocks"].children():
            x = block(x, vec, attention)
        return x


class DoubleBlock(nn.Module):
    """Image and text stream with weights of their own, meeting in one joint attention."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        hidden, head_dim = config.hidden_size, config.attention_head_dim
        inner = int(hidden * config.mlp_ratio)
        self.head_dim = head_dim
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

    def forward(
        self, img: Tensor, txt: Tensor, vec: Tensor, rope: Tensor, attention: Attention
    ) -> tuple[Tensor, Tensor]:
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = self.img_mod(vec)
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = self.txt_mod(vec)

        qkv = self.img_attn_qkv(modulate(img, img_shift1, img_scale1))
        img_q, img_k, img_v = split_heads(qkv, self.head_dim)
        qkv = self.txt_attn_qkv(modulate(txt, txt_shift1, txt_scale1))
        txt_q, txt_k, txt_v = split_heads(qkv, self.head_dim)
        del qkv
        query = torch.cat(
            [apply_rope(self.img_attn_q_norm(img_q), rope), self.txt_attn_q_norm(txt_q)], dim=2
        )
        key = torch.cat(
            [apply_rope(self.img_attn_k_norm(img_k), rope), self.txt_attn_k_norm(txt_k)], dim=2
        )
        value = torch.cat([img_v, txt_v], dim=2)
        attended = rearrange(attention(query, key, value), "B H S D -> B S (H D)")
        img_attended, txt_attended = attended.split([img.shape[1], txt.shape[1]], dim=1)

        img = torch.addcmul(img, self.img_attn_proj(img_attended), img_gate1)
        img = torch.addcmul(img, self.img_mlp(modulate(img, img_shift2, img_scale2)), img_gate2)
        txt = torch.addcmul(txt, self.txt_attn_proj(txt_attended), txt_gate1)
        txt = torch.addcmul(txt, self.txt_mlp(modulate(txt, txt_shift2, txt_scale2)), txt_gate2)
        return img, txt


class SingleBlock(nn.Module):
    """Attention and MLP side by side on the joined [image ; text] sequence."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        hidden, head_dim = config.hidden_size, config.attention_head_dim
        self.head_dim = head_dim
        self.split_sizes = [3 * hidden, int(hidden * config.mlp_ratio)]
        self.modulation = Modulation(hidden, 3)
        self.linear1 = nn.Linear(hidden, sum(self.split_sizes))
        self.q_norm = nn.RMSNorm(head_dim, eps=1e-6)
        self.k_norm = nn.RMSNorm(head_dim, eps=1e-6)
        self.mlp_act = nn.GELU(approximate="tanh")
        self.linear2 = nn.Linear(hidden + self.split_sizes[1], hidden)

    def forward(self, x: Tensor, vec: Tensor, rope: Tensor, attention: Attention) -> Tensor:
        shift, scale, gate = self.modulation(vec)
        qkv, inner = self.linear1(modulate(x, shift, scale)).split(self.split_sizes, dim=-1)
        query, key, value = split_heads(qkv, self.head_dim)
        query = rotate_image_tokens(self.q_norm(query), rope)
        key = rotate_image_tokens(self.k_norm(key), rope)
        attended = rearrange(attention(query, key, value), "B H S D -> B S (H D)")
        return torch.addcmul(
            x, self.linear2(torch.cat([attended, self.mlp_act(inner)], dim=-1)), gate
        )


def rotate_image_tokens(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate the image part of [B, heads, S, D] (the first N tokens); text keeps its place."""
    num_image_tokens = rope.shape[0]
    rotated = apply_rope(x[:, :, :num_image_tokens], rope)
    return torch.cat([rotated, x[:, :, num_image_tokens:]], dim=2)


class FinalLayer(nn.Module):
    """Last modulation and projection to patches; [B, N, hidden] -> [B, N, C * pt * ph * pw]."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        patch_volume = config.patch_size_t * config.patch_size**2
        self.linear = nn.Linear(hidden, patch_volume * config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)
        return self.linear(modulate(x, shift, scale))
