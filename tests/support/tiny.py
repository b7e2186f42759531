"""Tiny networks of the true architecture, and checkpoints of them in every layout."""

import json
import struct
from pathlib import Path

import torch
from comfyui_skyreels.skyreels.conditioning.embeds import PromptEmbeds
from comfyui_skyreels.skyreels.config import TransformerConfig, VAEConfig
from comfyui_skyreels.skyreels.transformer.model import SkyReelsTransformer
from comfyui_skyreels.skyreels.weights.keymaps import transformer_sources
from safetensors.torch import save_file
from torch import Tensor

TRANSFORMER = TransformerConfig(
    num_attention_heads=2,
    attention_head_dim=16,
    num_layers=2,
    num_single_layers=2,
    num_refiner_layers=2,
    text_embed_dim=24,
    pooled_projection_dim=12,
    rope_axes_dim=(4, 6, 6),
)
VAE = VAEConfig(block_out_channels=(32, 32, 64, 64), layers_per_block=1)
#: a quarter of the work, for tests that do not speak of the VAE
SMALL_VAE = VAEConfig(block_out_channels=(32, 32, 32, 32), layers_per_block=1)


def randomize(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights large enough that every path matters, biases and norms included."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 16
        center = 1.0 if parameter.ndim == 1 and parameter.mean() > 0.5 else 0.0
        parameter.data = (center + 0.8 * noise / fan_in**0.5).to(parameter.dtype)
    return module.eval().requires_grad_(False)


def transformer(config: TransformerConfig = TRANSFORMER, seed: int = 0) -> SkyReelsTransformer:
    return randomize(SkyReelsTransformer(config), seed)


def diffusers_config(config: TransformerConfig) -> dict:
    return {
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_attention_heads": config.num_attention_heads,
        "attention_head_dim": config.attention_head_dim,
        "num_layers": config.num_layers,
        "num_single_layers": config.num_single_layers,
        "num_refiner_layers": config.num_refiner_layers,
        "mlp_ratio": config.mlp_ratio,
        "patch_size": config.patch_size,
        "patch_size_t": config.patch_size_t,
        "guidance_embeds": config.guidance_embeds,
        "text_embed_dim": config.text_embed_dim,
        "pooled_projection_dim": config.pooled_projection_dim,
        "rope_theta": config.rope_theta,
        "rope_axes_dim": config.rope_axes_dim,
    }


def diffusers_transformer(model: SkyReelsTransformer) -> torch.nn.Module:
    """diffusers' own class holding the same weights."""
    from diffusers import HunyuanVideoTransformer3DModel

    theirs = HunyuanVideoTransformer3DModel(**diffusers_config(model.config)).eval()
    theirs.load_state_dict(to_diffusers(model.state_dict(), model.config), strict=True)
    return theirs.requires_grad_(False)


def to_diffusers(state: dict[str, Tensor], config: TransformerConfig) -> dict[str, Tensor]:
    """Original names to diffusers', splitting what is fused."""
    hidden = config.hidden_size
    converted = {}
    for name, tensor in state.items():
        names = transformer_sources(name, "diffusers")
        if "final_layer.adaLN" in name:
            shift, scale = tensor.chunk(2)
            tensor = torch.cat([scale, shift])
        sizes = [hidden] * (len(names) - 1)
        parts = tensor.split([*sizes, tensor.shape[0] - sum(sizes)])
        converted.update({n: p.contiguous() for n, p in zip(names, parts, strict=True)})
    return converted


def to_comfyui(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {transformer_sources(name, "comfyui")[0]: tensor for name, tensor in state.items()}


def save(path: Path, state: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in state.items()}, path, metadata)
    return path


def write_header(path: Path, header: dict | bytes, data_bytes: int = 0) -> Path:
    """A safetensors file of a header and a hole."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + data_bytes)  # sparse
    return path


def sparse_file(path: Path, state: dict[str, Tensor], dtype: str = "BF16") -> Path:
    """A file of these names and shapes whose data is a hole: full size, no disk."""
    header, offset = {}, 0
    for name, tensor in state.items():
        size = tensor.numel() * {"BF16": 2, "F8_E4M3": 1}[dtype]
        header[name] = {
            "dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, offset + size]
        }  # fmt: skip
        offset += size
    return write_header(path, header, offset)


def save_sharded(folder: Path, state: dict[str, Tensor], config: dict, shards: int = 2) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    names = list(state)
    weight_map = {}
    for shard in range(shards):
        file = f"diffusion_pytorch_model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {n: state[n] for n in names[shard::shards]}
        save(folder / file, part)
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def inputs(config: TransformerConfig, text_tokens: int = 7, grid=(3, 6, 10), batch: int = 1):
    """Keyword arguments of a forward pass, without the mask diffusers wants."""
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "hidden_states": randn(batch, config.in_channels, *grid),
        "timestep": torch.full((batch,), 875.0),
        "encoder_hidden_states": randn(batch, text_tokens, config.text_embed_dim),
        "pooled_projections": randn(batch, config.pooled_projection_dim),
        "guidance": torch.full((batch,), 1000.0),
    }


def embeds(tokens: int, seed: int = 0) -> PromptEmbeds:
    """Made-up states of so many tokens, and a pooled one."""
    generator = torch.Generator().manual_seed(seed)
    return PromptEmbeds(
        torch.randn(1, tokens, TRANSFORMER.text_embed_dim, generator=generator),
        torch.randn(1, TRANSFORMER.pooled_projection_dim, generator=generator),
    )


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected magnitude."""
    return ((got - expected).abs().max() / expected.abs().max()).item()
