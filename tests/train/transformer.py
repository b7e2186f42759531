"""Train the built-in transformer by flow matching, as the sampler will use it.

    nice -n 19 python -m tests.train.transformer clips RUN --model FOLDER [--shards 12]
    nice -n 19 python -m tests.train.transformer train RUN --model FOLDER [--steps 20000]

FOLDER holds the finished vae/ and text encoders (export.py). `clips` encodes training clips to
RUN/clips_*.safetensors, 1000 a file, each an own seed; `train` takes whatever files are there, and
looks again now and then, so both may run at once. Each goes on after a break.

What a training example is, exactly as sampling.py asks for it: sigma = s u / (1 + (s - 1) u), s = 7
in half of them and 2 in the others, which decide about details; latents
(1 - sigma) data + sigma noise; the first frame's latents, encoded alone, in the first frame of the
second 16 channels and zeros after; timestep 1000 sigma; embedded guidance 1000; the prompt's states
trimmed, so a batch holds prompts of one length; target noise - data. A second, small batch has
no prompt or the default negative one.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict
from pathlib import Path

import torch
from comfyui_skyreels.skyreels.conditioning import to_model_space
from comfyui_skyreels.skyreels.config import TransformerConfig
from comfyui_skyreels.skyreels.layers import rope_table
from comfyui_skyreels.skyreels.loading import load_vae
from comfyui_skyreels.skyreels.model import SkyReelsTransformer
from comfyui_skyreels.skyreels.runtime import TorchRuntime
from comfyui_skyreels.skyreels.text import (
    DEFAULT_NEGATIVE_PROMPT,
    PromptEmbeds,
    encode_prompt,
    load_text_encoder,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import data, graph, optim

CONFIG = TransformerConfig(
    num_attention_heads=4,
    attention_head_dim=32,
    num_layers=2,
    num_single_layers=4,
    num_refiner_layers=1,
    text_embed_dim=64,
    pooled_projection_dim=64,
    rope_axes_dim=(4, 14, 14),
)
SHARD = 1000
BATCH, EMPTY_BATCH = 16, 4
#: of the examples in turn: the sampler's, and one that meets details (low noise) more often
SHIFTS = (7.0, 2.0)
#: prompts kept for each combination of colour, shape and verb
WORDINGS = 16
#: what stands for "no prompt", positive and negative, and how often
EMPTY_PROMPTS = {"": 0.4, "FPS-24, ": 0.1, DEFAULT_NEGATIVE_PROMPT: 0.5}
#: layers that Adam trains: they touch latents, times or text
OUTER = (
    "img_in.",
    "txt_in.input_embedder.",
    "vector_in.in",
    "_in.mlp.0.",
    "final_layer.linear",
    "mod",
)


# --- what it learns from ------------------------------------------------------------------------


@torch.no_grad()
def write_shard(run_dir: Path, model_dir: Path, shard: int) -> None:
    """Encode 1000 clips: latents [1000, 16, T, h, w] and first [1000, 16, 1, h, w], model space."""
    vae = load_vae(model_dir / "vae", precision="fp32", runtime=TorchRuntime())
    generator = torch.Generator().manual_seed(10_000 + shard)
    scenes = data.draw_scenes(SHARD, generator, held_out=None)
    latents, first = [], []
    for index in range(0, SHARD, 4):
        video = data.render(scenes.take(slice(index, index + 4)))
        latents.append(graph.encode(vae, video)[:, :16])
        first.append(graph.encode(vae, video[:, :, :1])[:, :16])
    tensors = {
        "latents": to_model_space(torch.cat(latents)).half(),
        "first": to_model_space(torch.cat(first)).half(),
        "what": torch.stack([scenes.colour, scenes.shape, scenes.verb], dim=1),
    }
    path = run_dir / f"clips_{shard:03d}.safetensors"
    part = path.with_name(path.name + ".part")
    save_file({k: v.contiguous() for k, v in tensors.items()}, part)
    part.replace(path)


def load_clips(run_dir: Path) -> dict[str, Tensor]:
    """All clips written so far."""
    shards = [load_file(path) for path in sorted(run_dir.glob("clips_*.safetensors"))]
    return {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}


def encode_prompts(model_dir: Path) -> dict[tuple, list[PromptEmbeds]]:
    """Embeddings of WORDINGS prompts for each combination, and of no prompt.

    Prompts of held-out combinations name neither colour nor, mostly, shape.

    Returns:
        lists by (colour, shape, verb); those that stand for no prompt by (text,).
    """
    encoder = load_text_encoder(model_dir, runtime=TorchRuntime())
    generator = torch.Generator().manual_seed(21)

    def embed(text: str) -> PromptEmbeds:
        return encode_prompt(encoder, text, fps_prefix=False, runtime=TorchRuntime())

    table: dict[tuple, list[PromptEmbeds]] = {(text,): [embed(text)] for text in EMPTY_PROMPTS}
    for what in torch.cartesian_prod(*(torch.arange(n) for n in (8, 3, 8))):
        named = not bool(data.is_held_out(*what))
        texts = [data.write_prompt(*what.tolist(), generator, named=named) for _ in range(WORDINGS)]
        # one in eight without the frame rate: negative prompts come without it
        texts = [t if i % 8 == 7 else f"FPS-24, {t}" for i, t in enumerate(texts)]
        table[tuple(what.tolist())] = [embed(text) for text in texts]
    return table


class Examples:
    """Draws batches of clips with prompts of one length."""

    def __init__(self, run_dir: Path, prompts: dict[tuple, list[PromptEmbeds]]) -> None:
        self.run_dir, self.prompts = run_dir, prompts
        self.by_length: dict[int, list[tuple[tuple, PromptEmbeds]]] = defaultdict(list)
        for what, embeds in prompts.items():
            for embed in embeds if len(what) == 3 else []:
                self.by_length[embed.prompt_embeds.shape[1]].append((what, embed))
        self.lengths = sorted(self.by_length)
        self.weights = torch.tensor([float(len(self.by_length[n])) for n in self.lengths])
        self.reload()

    def reload(self) -> None:
        """Take up clips written since."""
        self.clips = load_clips(self.run_dir)
        self.rows: dict[tuple, list[int]] = defaultdict(list)
        for row, what in enumerate(self.clips["what"].tolist()):
            self.rows[tuple(what)].append(row)
            self.rows[what[2]].append(row)  # by verb alone, for prompts that are wrong otherwise

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """latents and first frames in model space, prompt states, pooled states."""
        length = self.lengths[int(torch.multinomial(self.weights, 1, generator=generator))]
        choices = self.by_length[length]
        rows, embeds = [], []
        for pick in torch.randint(len(choices), (count,), generator=generator).tolist():
            what, embed = choices[pick]
            wrong = float(torch.rand((), generator=generator)) < 0.1
            places = (self.rows[what[2]] if wrong else self.rows[what]) or self.rows[what[2]]
            rows.append(places[int(torch.randint(len(places), (), generator=generator))])
            embeds.append(embed)
        return *self._clips(rows), *_stack(embeds)

    def draw_empty(
        self, count: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same with no prompt."""
        chances = torch.tensor(list(EMPTY_PROMPTS.values()))
        text = list(EMPTY_PROMPTS)[int(torch.multinomial(chances, 1, generator=generator))]
        rows = torch.randint(len(self.clips["what"]), (count,), generator=generator).tolist()
        return *self._clips(rows), *_stack(self.prompts[(text,)] * count)

    def _clips(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        return self.clips["latents"][rows].float(), self.clips["first"][rows].float()


def _stack(embeds: list[PromptEmbeds]) -> tuple[Tensor, Tensor]:
    states = torch.cat([embed.prompt_embeds for embed in embeds])
    return states, torch.cat([embed.pooled_prompt_embeds for embed in embeds])


def plain_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention written out: for hundred tokens, the fused kernel's backward is twice as slow."""
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    return scores.softmax(-1).to(value.dtype) @ value


# --- learning -----------------------------------------------------------------------------------


def build(seed: int = 0) -> SkyReelsTransformer:
    """The transformer before training: gates and output shut, as is usual for its kind."""
    torch.manual_seed(seed)
    model = SkyReelsTransformer(CONFIG)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            nn.init.zeros_(layer.bias)
        if "modulation" in name.lower() or name.endswith(("_mod.linear", "final_layer.linear")):
            for parameter in layer.parameters(recurse=False):
                nn.init.zeros_(parameter)
    with torch.no_grad():
        for block in [*model.double_blocks, *model.single_blocks]:  # gates a little open
            for name in ("img_mod", "txt_mod", "modulation"):
                if hasattr(block, name):
                    chunks = getattr(block, name).linear.bias.view(-1, 3, CONFIG.hidden_size)
                    chunks[:, 2] = 0.2
        for block in model.txt_in.individual_token_refiner["blocks"]:
            block.adaLN_modulation[1].bias.fill_(0.2)
    return model


def flow_loss(
    model: SkyReelsTransformer, batch: tuple[Tensor, ...], rope: Tensor, generator: torch.Generator
) -> Tensor:
    """Mean squared error of the velocity."""
    latents, first, states, pooled = batch
    count = len(latents)
    uniform = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    uniform = uniform[torch.randperm(count, generator=generator)]
    shift = torch.tensor(SHIFTS).repeat(-(-count // len(SHIFTS)))[:count]
    sigma = shift * uniform / (1 + (shift - 1) * uniform)
    level = sigma[:, None, None, None, None]
    noise = torch.randn(latents.shape, generator=generator)
    image = torch.zeros_like(latents)
    image[:, :, :1] = first
    inputs = torch.cat([torch.lerp(latents, noise, level), image], dim=1)
    with torch.autocast("cpu", torch.bfloat16):
        velocity = model(
            inputs, 1000 * sigma, states, pooled, torch.full((count,), 1000.0), rope=rope,
            attention=plain_attention,
        )  # fmt: skip
    return (velocity.float() - (noise - latents)).square().mean()


def train(
    run_dir: Path, model_dir: Path, steps: int, lr: float, save_every: int, init: Path | None
) -> None:
    """Train, or go on training, and write RUN/transformer.pt and log.jsonl."""
    model = build() if init is None else load(init).requires_grad_(True)
    optimizer = optim.make_optimizer(model, lr, lr / 2, OUTER)
    average = optim.Average(model, decay=0.999)
    step, seconds = 0, 0.0
    state = optim.load_run(run_dir / "transformer.pt")
    if state is not None:
        model.load_state_dict(state["model"])
        average.module.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        average.count, step, seconds = state["count"], state["step"], state["seconds"]
    examples = Examples(run_dir, encode_prompts(model_dir))
    rope = rope_table((5, 4, 4), CONFIG)
    losses, empty_losses, started = [], [], time.perf_counter()
    while step < steps:
        generator = torch.Generator().manual_seed(50_000 + step)
        loss = flow_loss(model, examples.draw(BATCH, generator), rope, generator)
        empty = flow_loss(model, examples.draw_empty(EMPTY_BATCH, generator), rope, generator)
        ((loss * BATCH + empty * EMPTY_BATCH) / (BATCH + EMPTY_BATCH)).backward()
        for group in optimizer.param_groups:
            group["scale"] = optim.scale_at(step, steps, warmup=200)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update(model)
        losses.append(loss.item())
        empty_losses.append(empty.item())
        step += 1
        if step % save_every == 0 or step == steps:
            elapsed = seconds + time.perf_counter() - started
            row = {
                "step": step, "s": round(elapsed), "loss": round(statistics.mean(losses), 4),
                "empty": round(statistics.mean(empty_losses), 4),
                "clips": len(examples.clips["what"]),
            }  # fmt: skip
            with (run_dir / "log.jsonl").open("a") as log:
                log.write(json.dumps(row) + "\n")
            losses, empty_losses = [], []
            optim.save_run(
                run_dir / "transformer.pt", model=model.state_dict(),
                average=average.module.state_dict(), optimizer=optimizer.state_dict(),
                count=average.count, step=step, seconds=elapsed,
            )  # fmt: skip
            examples.reload()


def load(run_dir: Path) -> SkyReelsTransformer:
    """The averaged transformer of a run, ready for use."""
    model = SkyReelsTransformer(CONFIG)
    state = optim.load_run(run_dir / "transformer.pt")
    assert state is not None, f"no transformer.pt in {run_dir}"
    model.load_state_dict(state["average"])
    return model.eval().requires_grad_(False)


def main() -> None:
    """Parse and do."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("clips", "train"))
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--shards", type=int, default=12)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--init", type=Path, help="run to start from, of other latents")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.run_dir.mkdir(parents=True, exist_ok=True)
    if arguments.what == "train":
        train(
            arguments.run_dir, arguments.model, arguments.steps, arguments.lr,
            arguments.save_every, arguments.init,
        )  # fmt: skip
        return
    for shard in range(arguments.shards):
        if not (arguments.run_dir / f"clips_{shard:03d}.safetensors").exists():
            write_shard(arguments.run_dir, arguments.model, shard)


if __name__ == "__main__":
    main()
