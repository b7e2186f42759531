"""Building blocks of the HunyuanVideo transformer.

Attribute names are those of the original Tencent checkpoint, whose projections are already fused
(`img_attn_qkv`, `linear1`); keymaps.py fuses the other layouts while they load. Linear layers are
plain submodules, so a quantised one takes their place by assignment; attention is an argument, and
so are the rows of the modulation. What lies between the matrix products is fused (kernels/).

Kept in float32 whatever the weights are: the rotary table and the rotation, the sinusoid of the
timestep, the statistics of every norm.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .. import kernels
from ..config import Chunking, TransformerConfig
from ..errors import OptionError
from ..kernels import Rows
from .attention import Attention
from .linear import ALL, input_format, linear, linear_gelu

#: latent frames the model has seen in training; the slow temporal frequency wraps at 50.27
TRAINED_LATENT_FRAMES = 50
#: runs of tokens start at multiples of this: what belongs to a token, even four bytes of scale,
#: then starts at an address that vendor kernels take, and their tiles are whole
TOKEN_MULTIPLE = 128


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
    """Conditioning vector to a row of `chunks` shifts, scales and gates; [B, C] -> [B, 1, all].

    A third of the model's weights, and nothing but (timestep, pooled text, guidance) goes in: see
    precompute.py.
    """

    def __init__(self, hidden_size: int, chunks: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, chunks * hidden_size)

    def forward(self, vec: Tensor) -> Tensor:
        return self.linear(F.silu(vec))[:, None]


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
        """Those whose rows `forward` takes, in its order."""
        return [self.img_mod, self.txt_mod]

    def forward(
        self, img: Tensor, txt: Tensor, rows: tuple[Tensor, ...], rope: Tensor,
        attention: Attention, chunking: Chunking,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = rows[0].chunk(6, -1)
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = rows[1].chunk(6, -1)
        img_normed = _norm_for(self.img_attn_qkv, img, img_shift1, img_scale1)
        txt_normed = _norm_for(self.txt_attn_qkv, txt, txt_shift1, txt_scale1)
        norms = [
            self.img_attn_q_norm, self.img_attn_k_norm, self.txt_attn_q_norm, self.txt_attn_k_norm
        ]  # fmt: skip
        attended = _attend(
            [(self.img_attn_qkv, img_normed), (self.txt_attn_qkv, txt_normed)],
            img, img.shape[1] + txt.shape[1], norms, rope, attention, chunking,
        )  # fmt: skip
        del img_normed, txt_normed
        img_attended, txt_attended = attended.split([img.shape[1], txt.shape[1]], dim=1)
        del attended
        img_out = linear(self.img_attn_proj, _rounded_for(self.img_attn_proj, img_attended))
        txt_out = linear(self.txt_attn_proj, _rounded_for(self.txt_attn_proj, txt_attended))
        del img_attended, txt_attended

        img, img_normed = kernels.residual_layer_norm_modulate(
            img, img_out, img_gate1, img_shift2, img_scale2, input_format(self.img_mlp.fc1)
        )
        del img_out
        img_out = _feed_forward(self.img_mlp, img_normed, img, chunking.mlp_chunks)
        del img_normed
        img = kernels.gated_residual(img, img_out, img_gate2)
        txt, txt_normed = kernels.residual_layer_norm_modulate(
            txt, txt_out, txt_gate1, txt_shift2, txt_scale2, input_format(self.txt_mlp.fc1)
        )
        txt_out = _feed_forward(self.txt_mlp, txt_normed, txt, 1)
        return img, kernels.gated_residual(txt, txt_out, txt_gate2)


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
        """Those whose rows `forward` takes."""
        return [self.modulation]

    def forward(
        self, x: Tensor, rows: tuple[Tensor, ...], rope: Tensor, attention: Attention,
        chunking: Chunking,
    ) -> Tensor:  # fmt: skip
        shift, scale, gate = rows[0].chunk(3, dim=-1)
        hidden = x.shape[2]
        normed = _norm_for(self.linear1, x, shift, scale)
        norms = [self.q_norm, self.k_norm, self.q_norm, self.k_norm]
        attended = _attend(
            [(self.linear1, normed)], x, x.shape[1], norms, rope, attention, chunking
        )
        rounded = _rounded_for(self.linear2, attended)
        del attended
        out = linear(self.linear2, rounded, columns=slice(0, hidden))
        del rounded
        # products of 8 bits are not added to what is there, so the other half waits beside
        other = None if input_format(self.linear2) is None else torch.empty_like(out)
        for part in _parts(x.shape[1], chunking.mlp_chunks, TOKEN_MULTIPLE):
            rows_of_mlp, columns = slice(3 * hidden, None), slice(hidden, None)
            active = linear_gelu(
                self.linear1, _tokens(normed, part), rows_of_mlp, input_format(self.linear2)
            )
            into = out if other is None else other
            linear(self.linear2, active, ALL, columns, into[:, part], add=other is None)
            del active  # else it would live on while the next part is made
        return kernels.gated_residual(x, out, gate, other)


def _parts(length: int, count: int, multiple: int = 1) -> list[slice]:
    """At most `count` runs of about equal length that start at multiples of `multiple`."""
    even = [-(-length * part // (count * multiple)) * multiple for part in range(count)]
    ends = [*(min(end, length) for end in even), length]
    return [slice(start, end) for start, end in pairwise(ends) if end > start]


def _tokens(x: Tensor | Rows, part: slice) -> Tensor | Rows:
    if isinstance(x, Tensor):
        return x[:, part]
    return Rows(x.values[:, part], x.scale[:, part])


def _norm_for(layer: nn.Module, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor | Rows:
    """The modulated LayerNorm of x, as the layer wants its input."""
    return kernels.layer_norm_modulate(x, shift, scale, input_format(layer))


def _rounded_for(layer: nn.Module, x: Tensor) -> Tensor | Rows:
    to = input_format(layer)
    return x if to is None else kernels.quantize_rows(x, to)


def _feed_forward(mlp: MLP, normed: Tensor | Rows, like: Tensor, chunks: int) -> Tensor:
    """The MLP of a block, some tokens at a time, so that its wide middle is never whole."""
    if chunks == 1:
        return linear(mlp.fc2, linear_gelu(mlp.fc1, normed, to=input_format(mlp.fc2)))
    out = torch.empty_like(like)
    for part in _parts(like.shape[1], chunks, TOKEN_MULTIPLE):
        inner = linear_gelu(mlp.fc1, _tokens(normed, part), to=input_format(mlp.fc2))
        linear(mlp.fc2, inner, out=out[:, part])
        del inner  # before the next part is made
    return out


def _attend(
    streams: list[tuple[nn.Module, Tensor | Rows]], like: Tensor, length: int,
    norms: list[nn.RMSNorm], rope: Tensor, attention: Attention, chunking: Chunking,
) -> Tensor:  # fmt: skip
    """Joint attention of all tokens of the streams, some heads at a time.

    Queries, keys and values of all streams are projected into one buffer, so that nothing is
    concatenated, and normalised and rotated in place.

    Args:
        streams: (layer whose first rows are the q, k, v projection, its input), in order.
        like: of the dtype, device, batch and width of the result. length: all tokens.
        norms: of queries and keys of image tokens, of queries and keys of text tokens.
    Returns:
        [B, length, C].
    """
    batch, _, hidden = like.shape
    head_dim = len(norms[0].weight)
    q_norm, k_norm, text_q_norm, text_k_norm = (norm.weight for norm in norms)
    weights = (q_norm, k_norm, text_q_norm, text_k_norm)
    groups = _parts(hidden // head_dim, chunking.head_groups)
    if len(groups) == 1:
        qkv = _project(streams, like, length, slice(0, hidden)).unflatten(3, (-1, head_dim))
        query, key, value = kernels.qk_norm_rope(qkv, *weights, rope).permute(2, 0, 3, 1, 4)
        return attention(query, key, value).transpose(1, 2).flatten(2)
    attended = like.new_empty(batch, length, hidden)
    for heads in groups:
        columns = slice(heads.start * head_dim, heads.stop * head_dim)
        qkv = _project(streams, like, length, columns).unflatten(3, (-1, head_dim))
        query, key, value = kernels.qk_norm_rope(qkv, *weights, rope).permute(2, 0, 3, 1, 4)
        attended[:, :, columns] = attention(query, key, value).transpose(1, 2).flatten(2)
        del qkv, query, key, value  # before the next group is made
    return attended


def _project(
    streams: list[tuple[nn.Module, Tensor | Rows]], like: Tensor, length: int, columns: slice
) -> Tensor:
    """[B, length, 3, columns]: those columns of the queries, keys and values of all streams."""
    hidden, width = like.shape[2], columns.stop - columns.start
    qkv = like.new_empty(like.shape[0], length, 3, width)
    start = 0
    for layer, normed in streams:
        tokens = (normed if isinstance(normed, Tensor) else normed.values).shape[1]
        into = qkv[:, start : start + tokens]
        start += tokens
        if width == hidden:
            linear(layer, normed, slice(0, 3 * hidden), out=into.flatten(2))
            continue
        for index in range(3):
            rows = slice(index * hidden + columns.start, index * hidden + columns.stop)
            linear(layer, normed, rows, out=into[:, :, index])
    return qkv


class FinalLayer(nn.Module):
    """Last modulation and projection to patches; [B, N, hidden] -> [B, N, C * pt * ph * pw]."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        patch_volume = config.patch_size_t * config.patch_size**2
        self.linear = nn.Linear(hidden, patch_volume * config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden))

    def forward(self, x: Tensor, row: Tensor) -> Tensor:
        shift, scale = row[:, None].chunk(2, dim=-1)
        return self.linear(kernels.layer_norm_modulate(x, shift, scale))
