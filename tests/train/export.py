"""Write a trained model the way the real one is published: a diffusers folder of bfloat16 files.

    python -m tests.train.export OUT --vae VAE_RUN [--text TEXT_RUN] [--transformer RUN]
        [--decoder VAE_RUN] [--card CARD.json]

vae/, transformer/, text_encoder/, text_encoder_2/, tokenizer/, tokenizer_2/ and README.md, which is
the model card. What is not named is left as it is in OUT.

The latents of a trained VAE have any spread. The real one's are brought to about 1 by
SCALING_FACTOR, a constant of the pipeline; so mean and spread of each channel are folded into the
two 1x1x1 convolutions at the latents, which changes nothing else.
"""

import argparse
import json
import shutil
import textwrap
from pathlib import Path

import torch
from comfyui_skyreels.skyreels.config import SCALING_FACTOR, TransformerConfig, VAEConfig
from comfyui_skyreels.skyreels.transformer.model import SkyReelsTransformer
from comfyui_skyreels.skyreels.vae.model import VideoVAE
from comfyui_skyreels.skyreels.weights.keymaps import transformer_sources
from safetensors.torch import save_file
from torch import Tensor

from . import data, graph

FILE = "diffusion_pytorch_model.safetensors"


@torch.no_grad()
def normalise_latents(vae: VideoVAE, clips: int = 64) -> None:
    """Fold the mean and spread of the latents into the VAE, in place.

    Afterwards latents times SCALING_FACTOR have mean 0 and spread 1 in every channel; a channel
    that hardly varies is not blown up.
    """
    scenes = data.draw_scenes(clips, torch.Generator().manual_seed(77))
    batches = [data.render(scenes.take(slice(i, i + 4))) for i in range(0, clips, 4)]
    latents = torch.cat([graph.encode(vae, video)[:, :16] for video in batches])
    mean = latents.mean(dim=(0, 2, 3, 4))
    spread = latents.std(dim=(0, 2, 3, 4))
    spread = spread.clamp_min(0.25 * spread.max().item())
    gain = 1 / (SCALING_FACTOR * spread)
    out, back = vae.quant_conv, vae.post_quant_conv
    out.bias[:16] = (out.bias[:16] - mean) * gain
    out.weight[:16] *= gain[:, None, None, None, None]
    out.bias[16:] += 2 * gain.log()
    back.bias += back.weight[:, :, 0, 0, 0] @ mean
    back.weight /= gain[None, :, None, None, None]


def save_vae(folder: Path, vae: VideoVAE) -> None:
    """Write vae/ in diffusers' names, which are ours."""
    config = vae.config
    _save(folder, vae.state_dict(), {"_class_name": "AutoencoderKLHunyuanVideo", **_vae(config)})


def save_transformer(folder: Path, model: SkyReelsTransformer) -> None:
    """Write transformer/ in diffusers' names."""
    _save(
        folder,
        to_diffusers(model.state_dict(), model.config),
        {"_class_name": "HunyuanVideoTransformer3DModel", **_transformer(model.config)},
    )


def to_diffusers(state: dict[str, Tensor], config: TransformerConfig) -> dict[str, Tensor]:
    """Original names to diffusers', splitting what is fused."""
    converted = {}
    for name, tensor in state.items():
        names = transformer_sources(name, "diffusers")
        if "final_layer.adaLN" in name:
            shift, scale = tensor.chunk(2)
            tensor = torch.cat([scale, shift])
        sizes = [config.hidden_size] * (len(names) - 1)
        parts = tensor.split([*sizes, tensor.shape[0] - sum(sizes)])
        converted.update({n: p.contiguous() for n, p in zip(names, parts, strict=True)})
    return converted


def _vae(config: VAEConfig) -> dict:
    return {
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "latent_channels": config.latent_channels,
        "block_out_channels": list(config.block_out_channels),
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.norm_num_groups,
        "scaling_factor": SCALING_FACTOR,
        "down_block_types": ["HunyuanVideoDownBlock3D"] * len(config.block_out_channels),
        "up_block_types": ["HunyuanVideoUpBlock3D"] * len(config.block_out_channels),
        "spatial_compression_ratio": 8,
        "temporal_compression_ratio": 4,
        "mid_block_add_attention": True,
        "act_fn": "silu",
    }


def _transformer(config: TransformerConfig) -> dict:
    values = {**vars(config), "rope_axes_dim": list(config.rope_axes_dim)}
    return {**values, "qk_norm": "rms_norm"}


def _save(folder: Path, state: dict[str, Tensor], config: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: t.detach().to(torch.bfloat16).contiguous() for name, t in state.items()}
    save_file(weights, folder / FILE, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


CARD = """\
---
license: apache-2.0
---
# The built-in model: a tiny SkyReels

**This is not SkyReels-V1.** It is a model of the same architecture with {parameters:,} parameters
in all, trained from scratch by this project for one small task: 17 frames of 64x64 pixels at 24
frames a second, with one coloured shape on a plain or smoothly shaded background. It shows that the
code works, and faster modes are measured on it; it makes no other video.

Prompts: `a red circle moves left`. Colours
{colours};
shapes {shapes}; moves left, right, up or down, stays still, grows, shrinks, fades out. The first
frame is the given image; the verb decides the motion. English; the wording may vary a little.

## Data
Procedural (tests/train/data.py), nothing downloaded. 32 of the 192 combinations of colour, shape
and verb are held out: no part of the model was trained on a prompt that names one. Clips of them
were used: by the transformer, under prompts that leave the name out ("it moves left") or name
something else, and by the VAE in its later stages. The benchmark uses only these combinations, with
images of its own that no part was trained on.

## Recipe
```
{commands}
```

| part | how it learns | seeds | steps | time |
|---|---|---|---|---|
{recipe}

Flow matching with the real model's shift 7 and embedded guidance 1.0, prompts dropped for
classifier-free guidance, moving average of the weights, bfloat16 files.

{history}

Runs are seeded: every batch is drawn from a generator seeded by its step. An interrupted command
continues when it is run again.

{rerun}

## Figures
128 held-out cases, default settings (30 steps, CFG 6), `python -m tests.bench.quality --suite all`:

{figures}

{device}

## Licence
Apache-2.0, weights and code. Trained by this project; it contains nothing of SkyReels-V1,
HunyuanVideo, LLaMA or CLIP except the structure of their networks.
"""


def write_card(
    out: Path, commands: list[str], recipe: dict, figures: dict, **sentences: str
) -> None:
    """README.md of the folder.

    Args:
        commands: that made it. recipe: "how | seeds | steps | time" by part. figures: text by name.
        sentences: "history" of the weights, how close a "rerun" comes, the "device" of the figures.
    """
    from safetensors import safe_open

    count = 0
    for file in sorted(out.rglob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            count += sum(tensors.get_tensor(name).numel() for name in tensors.keys())  # noqa: SIM118
    table = "\n".join(f"| {name} | {text} |" for name, text in figures.items())
    card = CARD.format(
        parameters=count,
        commands="\n".join(commands),
        colours=", ".join(data.COLOURS),
        shapes=", ".join(data.SHAPES),
        recipe="\n".join(f"| {name} | {text} |" for name, text in recipe.items()),
        figures=f"| what | figure |\n|---|---|\n{table}",
        **{name: textwrap.fill(text, 100) for name, text in sentences.items()},
    )
    (out / "README.md").write_text(card, encoding="utf-8")


def main() -> None:
    """Parse and write."""
    from . import transformer, vae

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--vae", type=Path)
    parser.add_argument("--decoder", type=Path, help="run that went on; the latents stay in place")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--transformer", type=Path)
    parser.add_argument("--card", type=Path, help="what the model card tells, card.json")
    arguments = parser.parse_args()
    if arguments.vae:
        module = vae.load(arguments.vae)
        normalise_latents(module)
        save_vae(arguments.out / "vae", module)
    if arguments.decoder:
        save_vae(arguments.out / "vae", vae.load(arguments.decoder))
    if arguments.text:
        for part in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
            shutil.copytree(arguments.text / part, arguments.out / part, dirs_exist_ok=True)
    if arguments.transformer:
        save_transformer(arguments.out / "transformer", transformer.load(arguments.transformer))
    if arguments.card:
        write_card(arguments.out, **json.loads(arguments.card.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
