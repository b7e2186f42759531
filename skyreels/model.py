"""The SkyReels-V1 transformer: HunyuanVideo with 32 input channels.

Own forward pass, held to diffusers' and ComfyUI's by tests. What a host or a faster build may
change is passed in or swapped, never patched: `attention` is a function, linear layers are
submodules that can be replaced, and `run_block` wraps the call of every block, which is where
progress, cancelling and streaming of weights happen.
"""

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from .attention import Attention, sdpa
from .config import TransformerConfig
from .errors import ShapeError
from .layers import (
    DoubleBlock,
    FinalLayer,
    PatchEmbedder,
    SingleBlock,
    TimestepEmbedder,
    TokenRefiner,
    VectorEmbedder,
    rope_table,
)

#: run_block(block, *args) -> block(*args)
RunBlock = Callable[..., Any]


def call(block: nn.Module, *args: Any) -> Any:
    """Run a block and do nothing else."""
    return block(*args)


class SkyReelsTransformer(nn.Module):
    """Predicts the flow velocity (noise - data) of a latent clip.

    Args:
        config: sizes; everything else follows from it.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden_size
        self.img_in = PatchEmbedder(config)
        self.txt_in = TokenRefiner(config)
        self.time_in = TimestepEmbedder(hidden)
        self.vector_in = VectorEmbedder(config.pooled_projection_dim, hidden)
        self.guidance_in = TimestepEmbedder(hidden) if config.guidance_embeds else None
        self.double_blocks = nn.ModuleList(DoubleBlock(config) for _ in range(config.num_layers))
        self.single_blocks = nn.ModuleList(
            SingleBlock(config) for _ in range(config.num_single_layers)
        )
        self.final_layer = FinalLayer(config)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the activations: that of the patch embedder, which is never quantised."""
        return self.img_in.proj.weight.dtype

    @property
    def blocks(self) -> list[nn.Module]:
        """The double blocks, then the single blocks: what can be streamed to a small device."""
        return [*self.double_blocks, *self.single_blocks]

    def token_grid(self, latent_shape: torch.Size | tuple[int, ...]) -> tuple[int, int, int]:
        """Tokens in time, height and width of a [..., T, h, w] latent."""
        frames, height, width = latent_shape[-3:]
        patch = self.config.patch_size
        if frames % self.config.patch_size_t or height % patch or width % patch:
            raise ShapeError(
                f"Latent of {frames}x{height}x{width} does not split into patches of "
                f"{self.config.patch_size_t}x{patch}x{patch}: height and width of the video must "
                f"be multiples of {8 * patch}."
            )
        return frames // self.config.patch_size_t, height // patch, width // patch

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        guidance: Tensor | None = None,
        *,
        rope: Tensor | None = None,
        attention: Attention = sdpa,
        run_block: RunBlock = call,
    ) -> Tensor:
        """One prediction.

        Args:
            hidden_states: [B, 32, T, h, w], noisy latents then image latents, model space.
            timestep: [B] float32, 0..1000.
            encoder_hidden_states: [B, L, 4096] language-model states, trimmed: no padding.
            pooled_projections: [B, 768] CLIP-L pooled state.
            guidance: [B] embedded guidance times 1000 (1000.0 for SkyReels); ignored by
                checkpoints without a guidance embedding, 1000.0 if None.
            rope: [N, D / 2] complex64 from `rope_table`; built here if None.
            attention: see attention.py.
            run_block: called as run_block(block, *args) for every block.
        Returns:
            [B, 16, T, h, w] velocity in the compute dtype.
        Raises:
            ShapeError: channels or sizes that do not fit (the message gives both numbers).
        """
        config, dtype = self.config, self.compute_dtype
        if hidden_states.ndim != 5 or hidden_states.shape[1] != config.in_channels:
            raise ShapeError(
                f"The transformer takes [B, {config.in_channels}, T, h, w] latents; got "
                f"{list(hidden_states.shape)}."
            )
        grid = self.token_grid(hidden_states.shape)
        if rope is None:
            rope = rope_table(grid, config, device=hidden_states.device)

        pooled_projections = pooled_projections.to(dtype)
        vec = self.time_in(timestep, dtype) + self.vector_in(pooled_projections)
        if self.guidance_in is not None:
            guidance = torch.full_like(timestep, 1000.0) if guidance is None else guidance
            vec = vec + self.guidance_in(guidance, dtype)
        txt = self.txt_in(encoder_hidden_states.to(dtype), timestep, attention)
        img = self.img_in(hidden_states.to(dtype))

        for block in self.double_blocks:
            img, txt = run_block(block, img, txt, vec, rope, attention)
        num_image_tokens = img.shape[1]
        joined = torch.cat([img, txt], dim=1)
        del img, txt
        for block in self.single_blocks:
            joined = run_block(block, joined, vec, rope, attention)

        patches = self.final_layer(joined[:, :num_image_tokens], vec)
        frames, rows, columns = grid
        patch = config.patch_size
        return rearrange(
            patches,
            "B (T y x) (C pt py px) -> B C (T pt) (y py) (x px)",
            T=frames, y=rows, x=columns, pt=config.patch_size_t, py=patch, px=patch,
        )  # fmt: skip
