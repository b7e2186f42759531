"""One set of changes to every matrix of a tiny transformer, as a LoRA file of every dialect."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from comfyui_skyreels.skyreels.config import TransformerConfig
from comfyui_skyreels.skyreels.weights.keymaps import transformer_sources
from comfyui_skyreels.skyreels.weights.lora.names import parameter_shapes
from torch import Tensor

from support import tiny

Tensors = dict[str, Tensor]
#: module -> (up, down) of each of the parts that diffusers splits it into, in their order
Parts = dict[str, list[tuple[Tensor, Tensor]]]
SWAPPED = "final_layer.adaLN_modulation.1"


def draw_parts(config: TransformerConfig = tiny.TRANSFORMER, seed: int = 0) -> Parts:
    """Factors of ranks 3 to 8 for every linear layer and the patch embedder."""
    generator = torch.Generator().manual_seed(seed)
    parts: Parts = {}
    for name, shape in parameter_shapes(config).items():
        module, _, attribute = name.rpartition(".")
        if attribute != "weight" or len(shape) < 2:
            continue
        count = len(transformer_sources(name, "diffusers"))
        hidden, columns = config.hidden_size, math.prod(shape[1:])
        rows = [hidden] * (count - 1) + [shape[0] - hidden * (count - 1)]
        ranks = torch.randint(3, 9, (count,), generator=generator).tolist()
        parts[module] = [
            (0.3 * torch.randn(n, r, generator=generator) / r**0.5,
             torch.randn(r, columns, generator=generator) / columns**0.5)
            for n, r in zip(rows, ranks, strict=True)
        ]  # fmt: skip
    return parts


def fused(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The same change of a whole module: (up, down), ranks added."""
    ups, downs = zip(*parts, strict=True)
    return torch.block_diag(*ups), torch.cat(downs)


def dense(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    return torch.cat([up @ down for up, down in parts])


def swap(up: Tensor) -> Tensor:
    return torch.cat(up.chunk(2)[::-1])


class Factors(NamedTuple):
    """What a dialect stores for a module: its name there, up, down."""

    name: str
    up: Tensor
    down: Tensor


def whole_modules(parts: Parts, layout: str = "original") -> list[Factors]:
    found = []
    for module, of in parts.items():
        name = transformer_sources(f"{module}.weight", layout)[0].removesuffix(".weight")
        found.append(Factors(name, *fused(of)))
    return found


def diffusers_modules(parts: Parts) -> list[Factors]:
    found = []
    for module, of in parts.items():
        names = transformer_sources(f"{module}.weight", "diffusers")
        for name, (up, down) in zip(names, of, strict=True):
            up = swap(up) if module == SWAPPED else up
            found.append(Factors(name.removesuffix(".weight"), up, down))
    return found


def omi_modules(parts: Parts) -> list[Factors]:
    found = []
    for module, of in parts.items():
        name = module.replace("mlp.fc1", "mlp.fc0")
        name = name.replace("t_embedder.mlp.0", "t_embedder.linear_1")
        name = name.replace("t_embedder.mlp.2", "t_embedder.linear_2")
        if len(of) == 1:
            found.append(Factors(name, *of[0]))
        else:
            found += [Factors(f"{name}.{i}", *each) for i, each in enumerate(of)]
    return found


def in_conv_shape(name: str, down: Tensor) -> Tensor:
    """The lower factor of the patch embedder as trainers store it."""
    is_patch = "img_in" in name or "x_embedder" in name
    return down.view(len(down), -1, 1, 2, 2) if is_patch else down


def letters(modules: list[Factors], prefix: str, middle: str = "") -> Tensors:
    """lora_A and lora_B."""
    tensors = {}
    for name, up, down in modules:
        tensors[f"{prefix}{name}.lora_A{middle}.weight"] = in_conv_shape(name, down)
        tensors[f"{prefix}{name}.lora_B{middle}.weight"] = up
    return tensors


def words(modules: list[Factors], prefix: str, alpha: float | None, flat: bool = False) -> Tensors:
    """lora_down and lora_up with an alpha: that times the rank, and the upper factor divided."""
    tensors = {}
    for name, up, down in modules:
        stem = prefix + (name.replace(".", "_") if flat else name)
        tensors[f"{stem}.lora_down.weight"] = in_conv_shape(name, down)
        tensors[f"{stem}.lora_up.weight"] = up / (alpha or 1)
        if alpha is not None:
            tensors[f"{stem}.alpha"] = torch.tensor(alpha * len(down))
    return tensors


def shared_out(modules: list[Factors]) -> list[Factors]:
    """musubi's conversion: alpha / rank is in both factors."""
    return [Factors(name, up * 0.5, down * 2) for name, up, down in modules]


def with_metadata(tensors: Tensors) -> tuple[Tensors, dict[str, str]]:
    """diffusers' description: rsLoRA, another alpha for some."""
    described = {
        "transformer.r": 4, "transformer.lora_alpha": 2.0, "transformer.use_rslora": True,
        "transformer.alpha_pattern": {"norm_out.linear": 6.0}, "text_encoder.lora_alpha": 9,
    }  # fmt: skip
    for name in list(tensors):
        if ".lora_B." in name:
            rank = tensors[name].shape[1]
            alpha = 6.0 if "norm_out.linear" in name and "refiner" not in name else 2.0
            tensors[name] = tensors[name] * rank**0.5 / alpha
    for name in list(tensors):  # the pattern means the last layer and the refiner's
        if "refiner" in name and "norm_out.linear.lora_B" in name:
            tensors[name] = tensors[name] * 2.0 / 6.0
    return tensors, {"lora_adapter_metadata": json.dumps(described)}


def raw_peft(parts: Parts, folder: Path) -> Tensors:
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 16, "use_rslora": False})
    )
    modules = [Factors(f.name, f.up * len(f.down) / 16, f.down) for f in diffusers_modules(parts)]
    return letters(modules, "base_model.model.", ".default")


TEXT_ENCODER_KEYS = {
    "lora_te1_layers_0_self_attn_q_proj.lora_down.weight": torch.ones(2, 4),
    "bundle_emb.x.clip": torch.ones(1, 4),
}

#: name -> writes the file's tensors, and its metadata
DIALECTS: dict[str, Callable[[Parts, Path], Tensors | tuple[Tensors, dict[str, str]]]] = {
    "diffusion-pipe": lambda p, f: letters(whole_modules(p), "transformer."),
    "diffusion-pipe, older": lambda p, f: letters(whole_modules(p), "diffusion_model."),
    "musubi-tuner": lambda p, f: words(whole_modules(p), "lora_unet_", 0.25, flat=True),
    "musubi-tuner, alpha 0": lambda p, f: words(whole_modules(p), "lora_unet_", 0, flat=True),
    "musubi-tuner, converted": lambda p, f: letters(
        shared_out(whole_modules(p)), "diffusion_model."
    ),
    "diffusers": lambda p, f: letters(diffusers_modules(p), "transformer."),
    "diffusers, described": lambda p, f: with_metadata(
        letters(diffusers_modules(p), "transformer.")
    ),
    "raw PEFT": raw_peft,
    "ComfyUI": lambda p, f: words(whole_modules(p, "comfyui"), "diffusion_model.", None),
    "ComfyUI 0.33": lambda p, f: words(whole_modules(p, "comfyui"), "", 2.0),
    "OneTrainer": lambda p, f: (
        words(diffusers_modules(p), "lora_transformer_", 0.5, flat=True) | TEXT_ENCODER_KEYS
    ),
    "OneTrainer OMI": lambda p, f: words(omi_modules(p), "transformer.", 3.0),
    "OneTrainer, original": lambda p, f: words(whole_modules(p), "transformer.", 0.5),
    "Tencent HunyuanVideo-I2V": lambda p, f: words(
        whole_modules(p), "Hunyuan_video_I2V_lora_", None, flat=True
    ),
    "full difference": lambda p, f: {
        f"diffusion_model.{module}.diff": in_conv_shape(module, dense(of))
        for module, of in p.items()
    },
}


def write(dialect: str, parts: Parts, folder: Path) -> Path:
    """A file of a dialect."""
    made = DIALECTS[dialect](parts, folder)
    tensors, metadata = made if isinstance(made, tuple) else (made, None)
    return tiny.save(folder / "adapter_model.safetensors", tensors, metadata)
