"""The SkyReels-V1 transformer: HunyuanVideo, with 32 input channels or, from text alone, 16.

Own forward pass; tests hold it to diffusers' and ComfyUI's. What a host or a faster build may
change is passed in or replaced, never patched: `attention` is a function, linear layers are
submodules that can be replaced, and `run_block` wraps every conditioner and block, which is
where cancelling and block swap happen.

A prediction is made in two parts: `condition` sees text and time and no latents, and
`denoise` does the rest. A run computes the first for all its steps at once (precompute.py).

`denoise_together` makes several predictions block by block, so that a streamed block is brought
once for all of them.
"""

from collections.abc import Callable, Sequence
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


class StepModulation(NamedTuple):
    """What a forward pass takes from text and time.

    Attributes:
        text: [B, L, hidden] refined text tokens.
        mods: for every block, [B, 1, 3 * count * hidden] for each of its streams, see
            `split_modulation`; then for the final layer [B, 2 * hidden].
    """

    text: Tensor
    mods: tuple[tuple[Tensor, ...], ...]


def call(block: nn.Module, *args: Any) -> Any:
    """Run a block, unchanged."""
    return block(*args)


class SkyReelsTransformer(nn.Module):
    """Predicts the flow velocity (noise - data) of a latent clip.

    Args:
        config: sizes; everything else follows from it.
    """

    #: where its weights were read from, to read some again (weights/load.py)
    source: object = None

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        #: what LoRAs have changed: parameter -> how, None while it is not known (lora/apply.py)
        self.lora_state: dict[str, Any] = {}
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
        """Dtype of the activations: that of the patch embedder, which is never quantized."""
        return self.img_in.proj.weight.dtype

    @property
    def blocks(self) -> list[Any]:
        """The double blocks, then the single blocks: the units of block swap."""
        return [*self.double_blocks, *self.single_blocks]

    def token_grid(self, latent_shape: torch.Size | tuple[int, ...]) -> tuple[int, int, int]:
        """Count the tokens of a [..., T, h, w] latent.

        Returns:
            Tokens in time, height and width.

        Raises:
            ShapeError: patches do not divide the latent.
        """
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
        """The modulation layers of every block, then of the final layer."""
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
    ) -> StepModulation:
        """What `denoise` takes from text and time; arguments as for `forward`."""
        vec, text = self.embed(
            timestep,
            encoder_hidden_states,
            pooled_projections,
            guidance,
            attention=attention,
            run_block=run_block,
        )
        mods = [tuple(run_block(module, vec) for module in modules) for modules in self.modulations]
        return StepModulation(text, tuple(mods))

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
        """Embed text and time; arguments as for `forward`.

        Returns:
            The input [B, hidden] of every modulation, and the text tokens [B, L, hidden].
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
            hidden_states: [B, 32, T, h, w], noisy latents then image latents, model space; 16
                channels where the transformer takes no image.
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
        modulation = self.condition(
            timestep,
            encoder_hidden_states,
            pooled_projections,
            guidance,
            attention=attention,
            run_block=run_block,
        )
        return self.denoise(
            hidden_states,
            modulation,
            rope=rope,
            attention=attention,
            run_block=run_block,
            chunking=chunking,
        )

    def denoise(
        self,
        hidden_states: Tensor,
        modulation: StepModulation,
        *,
        rope: Tensor | None = None,
        order: Tensor | None = None,
        attention: Attention = sdpa,
        run_block: RunBlock = call,
        chunking: Chunking = CHUNKINGS["whole"],
    ) -> Tensor:
        """One prediction from what `condition` returned; otherwise as `denoise_together`."""
        (velocity,) = self.denoise_together(
            hidden_states,
            [modulation],
            rope=rope,
            order=order,
            attention=attention,
            run_block=run_block,
            chunking=chunking,
        )
        return velocity

    def denoise_together(
        self,
        hidden_states: Tensor,
        modulations: Sequence[StepModulation],
        *,
        rope: Tensor | None = None,
        order: Tensor | None = None,
        gather: Callable[[Tensor], Tensor] | None = None,
        attention: Attention = sdpa,
        run_block: RunBlock = call,
        chunking: Chunking = CHUNKINGS["whole"],
    ) -> list[Tensor]:
        """The predictions that `denoise` makes of each modulation, bit for bit.

        Each block runs for all of them before the next one runs for any. Meanwhile the tokens of
        all are in memory, but those of one are worked on at a time.

        Args:
            hidden_states: as for `forward`, for all.
            modulations: of each prediction, from `condition`.
            rope: as for `forward`.
            order: [N] the image token at each place, a permutation, in which the blocks see them;
                None is the raster order (time, row, column). Only the order of summation in
                attention depends on it, and what an attention makes of places.
            gather: where other ranks have a part of the tokens: takes [B, n, C] of those here,
                which then are all that `order` names, and returns [B, N, C] in raster order.
            attention: as for `forward`.
            run_block: as for `forward`; a block is called once for each prediction, in a row.
            chunking: as for `forward`.

        Returns:
            One velocity each, as `forward` does.
        """
        self._check(hidden_states)
        grid = self.token_grid(hidden_states.shape)
        if rope is None:
            rope = rope_table(grid, self.config, device=hidden_states.device)
        if order is not None:  # here alone, so that tokens and table cannot part
            rope = rope[order]
        last = (rope, attention, chunking)
        streams = [
            (self._tokens(hidden_states, order), modulation.text) for modulation in modulations
        ]
        num_image_tokens, num_double = len(rope), len(self.double_blocks)
        for index, block in enumerate(self.double_blocks):
            for place, modulation in enumerate(modulations):
                mods = modulation.mods[index]
                streams[place] = run_block(block, *streams[place], mods, *last)
        # each leaves its list before the next is made
        joined = [torch.cat(streams.pop(0), dim=1) for _ in modulations]
        for index, block in enumerate(self.single_blocks, start=num_double):
            for place, modulation in enumerate(modulations):
                joined[place] = run_block(block, joined[place], modulation.mods[index], *last)
        velocities = []
        for each in modulations:
            patches = self.final_layer(joined.pop(0)[:, :num_image_tokens], *each.mods[-1])
            if gather is not None:
                patches = gather(patches)
            elif order is not None:
                patches = torch.empty_like(patches).index_copy_(1, order, patches)
            velocities.append(self._unpatch(patches, grid))
        return velocities

    def _tokens(self, hidden_states: Tensor, order: Tensor | None) -> Tensor:
        """[B, C, T, h, w] -> [B, N, hidden] in that order."""
        tokens: Tensor = self.img_in(hidden_states.to(self.compute_dtype))
        return tokens if order is None else tokens[:, order]

    def _unpatch(self, patches: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """[B, N, C * pt * ph * pw] -> [B, C, T, h, w]."""
        grid_t, grid_h, grid_w = grid
        patch = self.config.patch_size
        latents: Tensor = rearrange(
            patches,
            "B (T y x) (C pt py px) -> B C (T pt) (y py) (x px)",
            T=grid_t,
            y=grid_h,
            x=grid_w,
            pt=self.config.patch_size_t,
            py=patch,
            px=patch,
        )
        return latents

    def _check(self, hidden_states: Tensor) -> None:
        channels = self.config.in_channels
        if hidden_states.ndim != 5 or hidden_states.shape[1] != channels:
            raise ShapeError(
                f"The transformer takes [B, {channels}, T, h, w] latents; got "
                f"{list(hidden_states.shape)}."
            )
        self.token_grid(hidden_states.shape)
