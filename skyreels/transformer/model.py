"""The SkyReels-V1 transformer: HunyuanVideo with 32 input channels.

Own forward pass, held to diffusers' and ComfyUI's by tests. What a host or a faster build may
change is passed in or swapped, never patched: `attention` is a function, linear layers are
submodules that can be replaced, and `run_block` wraps every conditioner and block, which is
where cancelling and streaming of weights happen.

A prediction is made in two parts: `condition` knows text and time and nothing of the latents, and
`denoise` does the rest. A run computes the first for all its steps at once (precompute.py).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from ..config import CHUNKINGS, Chunking, TransformerConfig
from ..errors import ShapeError
from .attention import Attention, sdpa
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


class StepConditioning(NamedTuple):
    """What one forward pass is told by text and time.

    text: [B, L, hidden] refined text tokens.
    rows: for every block, [B, 1, chunks * hidden] for each of its streams; then for the final
        layer [B, 2 * hidden].
    """

    text: Tensor
    rows: tuple[tuple[Tensor, ...], ...]


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
    def blocks(self) -> list[Any]:
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

    @property
    def embedders(self) -> list[nn.Module]:
        """What `embed` needs, in its order."""
        modules = (self.time_in, self.vector_in, self.guidance_in, self.txt_in)
        return [module for module in modules if module is not None]

    @property
    def modulations(self) -> list[list[nn.Module]]:
        """What makes the rows of every block, then of the final layer."""
        of_blocks: list[list[nn.Module]] = [block.modulations for block in self.blocks]
        return [*of_blocks, [self.final_layer.adaLN_modulation]]

    @property
    def conditioners(self) -> list[nn.Module]:
        """What only `condition` needs: 3.76 G of the 12.82 G parameters. The rest denoises."""
        return [*self.embedders, *(module for modules in self.modulations for module in modules)]

    def condition(
        self,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        guidance: Tensor | None = None,
        *,
        attention: Attention = sdpa,
        run_block: RunBlock = call,
    ) -> StepConditioning:
        """All that a forward pass needs of the text and the time, and that no latent changes.

        Args:
            as for `forward`.
        """
        vec, text = self.embed(
            timestep, encoder_hidden_states, pooled_projections, guidance,
            attention=attention, run_block=run_block,
        )  # fmt: skip
        rows = [tuple(run_block(module, vec) for module in modules) for modules in self.modulations]
        return StepConditioning(text, tuple(rows))

    def embed(
        self,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        guidance: Tensor | None = None,
        *,
        attention: Attention = sdpa,
        run_block: RunBlock = call,
    ) -> tuple[Tensor, Tensor]:
        """The vector [B, hidden] that modulates everything, and the text tokens [B, L, hidden].

        Args:
            as for `forward`.
        """
        dtype = self.compute_dtype
        vec = run_block(self.time_in, timestep, dtype)
        vec = vec + run_block(self.vector_in, pooled_projections.to(dtype))
        if self.guidance_in is not None:
            guidance = torch.full_like(timestep, 1000.0) if guidance is None else guidance
            vec = vec + run_block(self.guidance_in, guidance, dtype)
        text = run_block(self.txt_in, encoder_hidden_states.to(dtype), timestep, attention)
        return vec, text

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
        chunking: Chunking = CHUNKINGS["whole"],
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
            run_block: called as run_block(module, *args) for every conditioner and every block.
            chunking: how much of a block is computed at a time.
        Returns:
            [B, 16, T, h, w] velocity in the compute dtype.
        Raises:
            ShapeError: channels or sizes that do not fit (the message gives both numbers).
        """
        self._check(hidden_states)
        conditioning = self.condition(
            timestep, encoder_hidden_states, pooled_projections, guidance,
            attention=attention, run_block=run_block,
        )  # fmt: skip
        return self.denoise(
            hidden_states, conditioning, rope=rope, attention=attention, run_block=run_block,
            chunking=chunking,
        )  # fmt: skip

    def denoise(
        self,
        hidden_states: Tensor,
        conditioning: StepConditioning,
        *,
        rope: Tensor | None = None,
        attention: Attention = sdpa,
        run_block: RunBlock = call,
        chunking: Chunking = CHUNKINGS["whole"],
    ) -> Tensor:
        """One prediction from what `condition` returned; otherwise as `forward`."""
        self._check(hidden_states)
        config = self.config
        grid = self.token_grid(hidden_states.shape)
        if rope is None:
            rope = rope_table(grid, config, device=hidden_states.device)
        img, txt = self.img_in(hidden_states.to(self.compute_dtype)), conditioning.text
        rows = iter(conditioning.rows)
        for block in self.double_blocks:
            img, txt = run_block(block, img, txt, next(rows), rope, attention, chunking)
        num_image_tokens = img.shape[1]
        joined = torch.cat([img, txt], dim=1)
        del img, txt
        for block in self.single_blocks:
            joined = run_block(block, joined, next(rows), rope, attention, chunking)

        patches = self.final_layer(joined[:, :num_image_tokens], *next(rows))
        frames, rows_of_tokens, columns = grid
        patch = config.patch_size
        return rearrange(
            patches,
            "B (T y x) (C pt py px) -> B C (T pt) (y py) (x px)",
            T=frames, y=rows_of_tokens, x=columns, pt=config.patch_size_t, py=patch, px=patch,
        )  # fmt: skip

    def _check(self, hidden_states: Tensor) -> None:
        channels = self.config.in_channels
        if hidden_states.ndim != 5 or hidden_states.shape[1] != channels:
            raise ShapeError(
                f"The transformer takes [B, {channels}, T, h, w] latents; got "
                f"{list(hidden_states.shape)}."
            )
        self.token_grid(hidden_states.shape)
