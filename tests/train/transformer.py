"""Train the built-in transformer by flow matching, as the sampler will use it.

    python -m tests.train.transformer clips RUN --model FOLDER [--shards 12] [--device cuda]
        [--size large]
    python -m tests.train.transformer train RUN --model FOLDER [--steps 20000] [--until STEP]
        [--device cuda --scale 8] [--goes-on] [--size large]

FOLDER holds the finished vae/ and text encoders (export.py). `clips` encodes training clips to
RUN/clips_*.safetensors, 1000 a file (32 of the large ones), each an own seed; `train` learns from
all of them. Each goes on after a break. --goes-on starts from FOLDER's own transformer: for a VAE
that has changed a bit, or for larger clips. By `torchrun --nproc-per-node N -m` in front of all
this, N processes share each batch; the steps are the same.

What a training example is, exactly as sample.py asks for it: sigma = s u / (1 + (s - 1) u), s = 7
in half of them and 2 in the others, which decide about details; latents
(1 - sigma) data + sigma noise; the first frame's latents, encoded alone, in the first frame of the
second 16 channels and zeros after; timestep 1000 sigma; embedded guidance 1000; the prompt's states
trimmed, so a batch holds prompts of one length; target noise - data. A second, small batch has
no prompt or the default negative one.
"""

import argparse
import json
import os
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from comfyui_skyreels.skyreels.conditioning.embeds import PromptEmbeds
from comfyui_skyreels.skyreels.conditioning.latents import to_model_space
from comfyui_skyreels.skyreels.config import TransformerConfig
from comfyui_skyreels.skyreels.runtime import TorchRuntime
from comfyui_skyreels.skyreels.text.encode import DEFAULT_NEGATIVE_PROMPT, encode_prompt
from comfyui_skyreels.skyreels.text.load import load_text_encoder
from comfyui_skyreels.skyreels.transformer.attention import sdpa
from comfyui_skyreels.skyreels.transformer.layers import rope_table
from comfyui_skyreels.skyreels.transformer.model import SkyReelsTransformer
from comfyui_skyreels.skyreels.weights.load import load_transformer, load_vae
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


class Stage(NamedTuple):
    """A part of the steps.

    until: share of all steps at its end. frames: latent frames of a clip that are looked at.
    batch, empty_batch: clips of a step with and without a prompt; the latter come every
    `empty_every` steps.
    """

    until: float
    frames: int
    batch: int
    empty_batch: int
    empty_every: int


@dataclass(frozen=True)
class Course:
    """How clips of one size are learnt.

    clips: of a file. clip_seed: of the first file. seed: of the first step; again_seed: of that of
    a run that goes on. stages: in turn. warmup: steps. decay: of the moving average.
    dtype: in which a processor multiplies.
    """

    size: data.Format
    clips: int
    clip_seed: int
    seed: int
    again_seed: int
    stages: tuple[Stage, ...]
    warmup: int
    decay: float
    dtype: torch.dtype


SMALL = Course(
    data.SMALL, 1000, 10_000, 50_000, 3_000_000, (Stage(1.0, 5, 16, 4, 1),), 200, 0.999,
    torch.bfloat16,
)  # fmt: skip
#: A clip has sixteen times the tokens. Four of its frames cost a third of all nine, and tell what
#: becomes of the first one as well. bfloat16 is four times slower than float32 on processors
#: without instructions for it, and no faster at this length on others.
LARGE = Course(
    data.LARGE, 32, 20_000, 4_000_000, 4_000_000, (Stage(0.65, 4, 4, 2, 3), Stage(1.0, 9, 2, 2, 6)),
    40, 0.99, torch.float32,
)  # fmt: skip
COURSES = {"small": SMALL, "large": LARGE}
#: of the examples in turn: the sampler's, and one that meets details (low noise) more often
SHIFTS = (7.0, 2.0)
#: share of the prompts that fit the clip in nothing but the verb: what a shape looks like is to be
#: read from the picture, so that combinations never told before keep their shape
WRONG = 0.5
#: prompts kept for each combination of colour, shape and verb
WORDINGS = 16
#: what stands for "no prompt", positive and negative, and how often
EMPTY_PROMPTS = {"": 0.4, "FPS-24, ": 0.1, DEFAULT_NEGATIVE_PROMPT: 0.5}
#: share of the batches whose five latent frames stand at places of a clip of nine: a longer clip's
#: distances in time are known then, though no longer clip was seen
SPREAD, LONG = 0.12, 9
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
def write_shard(
    run_dir: Path, model_dir: Path, shard: int, device: str = "cpu", course: Course = SMALL
) -> None:
    """Encode N clips: latents [N, 16, T, h, w] and first [N, 16, 1, h, w], model space."""
    vae = load_vae(model_dir / "vae", precision="fp32", runtime=TorchRuntime()).to(device)
    generator = torch.Generator().manual_seed(course.clip_seed + shard)
    size = course.size
    scenes = data.draw_scenes(course.clips, generator, held_out=None)
    scenes = scenes.magnified(size.space, size.time)
    latents, first = [], []
    at_once = max(1, 20 * data.FRAMES * data.SIZE**2 // (size.frames * size.size**2))
    for index in range(0, course.clips, at_once):
        video = data.render(
            scenes.take(slice(index, index + at_once)).to(device),
            frames=size.frames, width=size.size, height=size.size,
        )  # fmt: skip
        latents.append(graph.encode(vae, video)[:, :16].cpu())
        first.append(graph.encode(vae, video[:, :, :1])[:, :16].cpu())
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


def kept_prompts(run_dir: Path, model_dir: Path) -> dict[tuple, list[PromptEmbeds]]:
    """What encode_prompts returns, from the run's folder if it was there before."""
    path = run_dir / "prompts.pt"
    if not path.exists():
        part = path.with_name(f"{path.name}.{os.getpid()}")
        torch.save(encode_prompts(model_dir), part)
        part.replace(path)
    return torch.load(path, weights_only=False)


class Table:
    """Rows by key, drawn without a loop."""

    def __init__(self, keys: Tensor, count: int) -> None:
        self.rows = keys.argsort(stable=True)
        self.counts = torch.bincount(keys, minlength=count)
        self.starts = self.counts.cumsum(0) - self.counts

    def draw(self, keys: Tensor, generator: torch.Generator) -> Tensor:
        """A row for each key; any row for a key that has none."""
        place = (torch.rand(len(keys), generator=generator) * self.counts[keys]).long()
        return self.rows[(self.starts[keys] + place).clamp_max(len(self.rows) - 1)]


def _key(what: Tensor) -> Tensor:
    """[..., 3] colour, shape and verb as one number; the verb is its remainder by 8."""
    return (what[..., 0] * 3 + what[..., 1]) * 8 + what[..., 2]


class Examples:
    """Draws batches of clips with prompts of one length.

    Args:
        clips: of load_clips. prompts: of encode_prompts. device: where batches shall be.
    """

    def __init__(
        self, clips: dict[str, Tensor], prompts: dict[tuple, list[PromptEmbeds]], device: str
    ) -> None:
        self.device = device
        self.latents, self.first = (clips[name].to(device) for name in ("latents", "first"))
        keys = _key(clips["what"])
        self.by_what, self.by_verb = Table(keys, 192), Table(keys % 8, 8)
        self.empty = {what[0]: _stack(e, device) for what, e in prompts.items() if len(what) == 1}
        pairs = [(what, e) for what, es in prompts.items() if len(what) == 3 for e in es]
        lengths = sorted({e.prompt_embeds.shape[1] for _, e in pairs})
        groups = [[p for p in pairs if p[1].prompt_embeds.shape[1] == n] for n in lengths]
        self.keys = [_key(torch.tensor([what for what, _ in group])) for group in groups]
        self.states = [_stack([e for _, e in group], device) for group in groups]
        self.weights = torch.tensor([float(len(group)) for group in groups])

    def draw(
        self, count: int, generator: torch.Generator, frames: Tensor | slice = slice(None)
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """latents (those frames) and first frames in model space, prompt states, pooled states."""
        length = int(torch.multinomial(self.weights, 1, generator=generator))
        picks = torch.randint(len(self.keys[length]), (count,), generator=generator)
        keys = self.keys[length][picks]
        fitting, others = (
            self.by_what.draw(keys, generator), self.by_verb.draw(keys % 8, generator)
        )  # fmt: skip
        wrong = torch.rand(count, generator=generator) < WRONG
        rows = torch.where(wrong | (self.by_what.counts[keys] == 0), others, fitting)
        states, pooled = self.states[length]
        picks = picks.to(self.device)
        return *self._clips(rows, frames), states[picks], pooled[picks]

    def draw_empty(
        self, count: int, generator: torch.Generator, frames: Tensor | slice = slice(None)
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same with no prompt."""
        chances = torch.tensor(list(EMPTY_PROMPTS.values()))
        text = list(EMPTY_PROMPTS)[int(torch.multinomial(chances, 1, generator=generator))]
        rows = torch.randint(len(self.latents), (count,), generator=generator)
        states, pooled = self.empty[text]
        return *self._clips(rows, frames), states.expand(count, -1, -1), pooled.expand(count, -1)

    def _clips(self, rows: Tensor, frames: Tensor | slice) -> tuple[Tensor, Tensor]:
        rows = rows.to(self.device)
        return self.latents[rows][:, :, frames].float(), self.first[rows].float()


def _stack(embeds: list[PromptEmbeds], device: str) -> tuple[Tensor, Tensor]:
    states = torch.cat([embed.prompt_embeds for embed in embeds])
    return states.to(device), torch.cat([e.pooled_prompt_embeds for e in embeds]).to(device)


def plain_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention written out: for a hundred tokens on a processor, the fused kernel's backward
    takes twice as long."""
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
    model: SkyReelsTransformer, batch: tuple[Tensor, ...], rope: Tensor, generator: torch.Generator,
    dtype: torch.dtype = torch.bfloat16, share: slice = slice(None),
) -> Tensor:  # fmt: skip
    """Mean squared error of the velocity, of the shape above all.

    Args:
        dtype: of products on a processor. share: the clips of the batch that this process looks at.
    """
    latents, first, states, pooled = batch
    count, device = len(latents), latents.device
    uniform = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    uniform = uniform[torch.randperm(count, generator=generator)]
    shift = torch.tensor(SHIFTS).repeat(-(-count // len(SHIFTS)))[:count]
    sigma = (shift * uniform / (1 + (shift - 1) * uniform)).to(device)
    if device.type != "cpu":  # too much for the processor to draw
        generator = torch.Generator(device).manual_seed(generator.initial_seed())
    noise = torch.randn(latents.shape, generator=generator, device=device)
    latents, first, states, pooled, sigma, noise = (
        tensor[share] for tensor in (latents, first, states, pooled, sigma, noise)
    )
    level, count = sigma[:, None, None, None, None], len(sigma)
    image = torch.zeros_like(latents)
    image[:, :, :1] = first
    inputs = torch.cat([torch.lerp(latents, noise, level), image], dim=1)
    few = device.type == "cpu" and dtype is torch.bfloat16
    with torch.autocast(device.type, torch.bfloat16, enabled=few or device.type != "cpu"):
        velocity = model(
            inputs, 1000 * sigma, states, pooled, torch.full((count,), 1000.0, device=device),
            rope=rope, attention=plain_attention if few else sdpa,
        )  # fmt: skip
    error = (velocity.float() - (noise - latents)).square().mean(dim=1)
    return (error * _weight(latents)).mean()


def _weight(latents: Tensor) -> Tensor:
    """[B, T, h, w], mean 1: two thirds of the loss where the shape is, a tenth of the picture.

    Where it is follows from picture and verb, so what is learnt is the same, in better order.
    """
    unlike = (latents - latents.mean(dim=(3, 4), keepdim=True)).square().mean(dim=1)
    return (1 + 2 * unlike / unlike.mean(dim=(1, 2, 3), keepdim=True)) / 3


def draw_places(generator: torch.Generator) -> Tensor:
    """[5] places in time of the latent frames of a short clip."""
    if float(torch.rand((), generator=generator)) >= SPREAD:
        return torch.arange(5)
    return draw_frames(5, generator)


def draw_frames(count: int, generator: torch.Generator) -> Tensor:
    """[count] places in time, the first and any others of a long clip."""
    later = 1 + torch.randperm(LONG - 1, generator=generator)[: count - 1].sort().values
    return torch.cat([torch.zeros(1, dtype=torch.int64), later])


def train(
    run_dir: Path, model_dir: Path, *, steps: int, lr: float, save_every: int,
    device: str, scale: int, goes_on: bool, until: int | None = None, course: Course = SMALL,
) -> None:  # fmt: skip
    """Train, or go on training, and write RUN/transformer.pt and log.jsonl.

    Args:
        until: stop at this step of a schedule of `steps`.
    """
    model, first_seed = build().to(device), course.seed
    if goes_on:
        folder = model_dir / "transformer"
        start = load_transformer(folder, precision="fp32", runtime=TorchRuntime())
        model.load_state_dict(start.state_dict())
        first_seed = course.again_seed
    optimizer = optim.make_optimizer(model, lr, lr / 2, OUTER, course.dtype)
    average = optim.Average(model, decay=course.decay)
    step, seconds = 0, 0.0
    state = optim.load_run(run_dir / "transformer.pt")
    if state is not None:
        model.load_state_dict(state["model"])
        average.module.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        average.count, step, seconds = state["count"], state["step"], state["seconds"]
    examples = Examples(load_clips(run_dir), kept_prompts(run_dir, model_dir), device)
    frames, height, width = course.size.grid
    rotations = rope_table((LONG, height, width), CONFIG).unflatten(0, (LONG, height * width))
    rotations = rotations.to(device)
    parts: dict[str, list[Tensor]] = {"loss": [], "empty": []}
    started, last = time.perf_counter(), min(steps, until or steps)
    workers, worker = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    share = slice(worker, None, workers)
    while step < last:
        generator = torch.Generator().manual_seed(first_seed + step)
        stage = next(each for each in course.stages if step < each.until * steps)
        if frames == LONG:  # some of a long clip's frames, or all of them in order
            shown = places = draw_frames(stage.frames, generator)
        else:
            shown, places = torch.arange(frames), draw_places(generator)
        rope = rotations[places].flatten(0, 1)

        batch = examples.draw(scale * stage.batch, generator, shown)
        loss = flow_loss(model, batch, rope, generator, course.dtype, share)
        parts["loss"].append(loss.detach())
        if step % stage.empty_every == 0:
            batch = examples.draw_empty(scale * stage.empty_batch, generator, shown)
            empty = flow_loss(model, batch, rope, generator, course.dtype, share)
            parts["empty"].append(empty.detach())
            loss = loss * stage.batch + empty * stage.empty_batch
            loss = loss / (stage.batch + stage.empty_batch)
        loss.backward()
        _share_gradients(model, workers)
        for group in optimizer.param_groups:
            group["scale"] = optim.scale_at(step, steps, course.warmup)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update(model)
        step += 1
        if worker == 0 and (step % save_every == 0 or step == last):
            elapsed = seconds + time.perf_counter() - started
            row = {"step": step, "s": round(elapsed, 1)}
            row |= {k: round(torch.stack(v).mean().item(), 4) for k, v in parts.items() if v}
            with (run_dir / "log.jsonl").open("a") as log:
                log.write(json.dumps(row) + "\n")
            parts = {name: [] for name in parts}
            optim.save_run(
                run_dir / "transformer.pt", model=model.state_dict(),
                average=average.module.state_dict(), optimizer=optimizer.state_dict(),
                count=average.count, step=step, seconds=elapsed,
            )  # fmt: skip


def _share_gradients(model: nn.Module, workers: int) -> None:
    """The mean over all processes, in place."""
    if workers == 1:
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients]) / workers
    torch.distributed.all_reduce(flat)
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


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
    parser.add_argument("--size", choices=COURSES, default="small", help="of the clips")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--until", type=int, help="stop at this step of --steps")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--scale", type=int, default=1, help="times the clips of a batch")
    parser.add_argument("--goes-on", action="store_true", help="from the model's own transformer")
    arguments = parser.parse_args()
    course = COURSES[arguments.size]
    torch.set_num_threads(1)
    # autocast leaves the weights of norms in float32; that is meant
    warnings.filterwarnings("ignore", message="Mismatch dtype")
    arguments.run_dir.mkdir(parents=True, exist_ok=True)
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
    if arguments.what == "train":
        train(
            arguments.run_dir, arguments.model, steps=arguments.steps, lr=arguments.lr,
            save_every=arguments.save_every, device=arguments.device, scale=arguments.scale,
            goes_on=arguments.goes_on, until=arguments.until, course=course,
        )  # fmt: skip
        return
    for shard in range(arguments.shards):
        if not (arguments.run_dir / f"clips_{shard:03d}.safetensors").exists():
            write_shard(arguments.run_dir, arguments.model, shard, arguments.device, course)


if __name__ == "__main__":
    main()
