"""Train the built-in VAE.

    python -m tests.train.vae RUN_DIR [--steps 8000] [--device cuda --scale 8]
        [--decoder-of FOLDER | --vae-of FOLDER]

Windows of clips at first: a window of 32 pixels holds the whole shape and a quarter of the plain
ground. Full clips in between and at the end, because GroupNorm sees all that is handed in.
The same command goes on after a break.

Both ways of going on see clips of all combinations, half of them shrinking: small shapes are what a
decoder gets wrong, and green squares, which it had not seen shrink, became circles (LOG.md).
--decoder-of does so with the decoder alone of an exported folder's VAE, so that its latents, which
a transformer has learnt, stay. --vae-of does so with the whole VAE and holds its latents near what
they were; the transformer is then trained on for a while (its --goes-on).

One thread: beside another busy process two threads wait for each other, several times slower. On a
GPU a step of so small a network takes the time of its launches, so larger batches are for free.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from comfyui_skyreels.skyreels.config import VAEConfig
from comfyui_skyreels.skyreels.runtime import TorchRuntime
from comfyui_skyreels.skyreels.vae.model import ResnetBlock, VideoVAE
from comfyui_skyreels.skyreels.weights.load import load_vae
from torch import Tensor, nn

from . import data, graph, optim

CONFIG = VAEConfig(block_out_channels=(8, 16, 48, 64), layers_per_block=1, norm_num_groups=2)
#: (frames, pixels, clips) of a batch and how often it is drawn, early and late; about equal work
BATCHES = {
    (1, 32, 48): (1, 1),
    (5, 32, 14): (6, 1),
    (9, 32, 8): (4, 2),
    (17, 32, 4): (1, 2),
    (9, 64, 2): (0.5, 2),
    (17, 64, 1): (0.5, 3),
}
#: layers that Adam trains: they touch pixels or latents
OUTER = ("conv_in.", "decoder.conv_out.", "quant_conv.")
KL_WEIGHT = 2e-5
#: of the squared distance to the latents of the VAE that --vae-of goes on with
ANCHOR_WEIGHT = 1.0


def build(seed: int = 0) -> VideoVAE:
    """The VAE before training: residual branches almost shut, enlarging steps near the identity."""
    torch.manual_seed(seed)
    vae = VideoVAE(CONFIG)
    for layer in vae.modules():
        if isinstance(layer, nn.Conv3d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
            nn.init.zeros_(layer.bias)
    with torch.no_grad():
        for block in vae.modules():
            if isinstance(block, ResnetBlock):
                block.conv2.conv.weight.mul_(0.2)
        for level in [*vae.encoder.down_blocks, *vae.decoder.up_blocks]:
            for name in ("downsamplers", "upsamplers"):
                for resample in getattr(level, name):
                    weight = resample.conv.conv.weight
                    weight.mul_(0.5)
                    weight[:, :, 2, 1, 1] += 0.8 * torch.eye(len(weight))
        for mid in (vae.encoder.mid_block, vae.decoder.mid_block):
            mid.attentions[0].to_out[0].weight.mul_(0.1)
        vae.quant_conv.weight[16:] = 0  # variance: small and the same everywhere at first
        vae.quant_conv.bias[16:] = -5.0
    return vae


def draw_batch(
    progress: float, generator: torch.Generator, scale: int = 1, device: str = "cpu",
    held_out: bool | None = False,
) -> Tensor:  # fmt: skip
    """[B, 3, F, H, W] windows of training clips, most of them around the shape.

    Args:
        progress: 0 at the start of the training, 1 at its end.
        scale: how many times the clips of BATCHES.
        held_out: as for draw_scenes; None makes half of the clips shrinking ones.
    """
    shapes = list(BATCHES)
    weights = torch.tensor([a + (b - a) * progress for a, b in BATCHES.values()])
    index = int(torch.multinomial(weights, 1, generator=generator))
    frames, pixels, count = shapes[index]
    count *= scale
    scenes = data.draw_scenes(8 * -(-count // 8), generator, held_out=held_out)
    scenes = scenes.take(torch.randperm(len(scenes), generator=generator)[:count])
    if held_out is None:
        shrinks = torch.rand(count, generator=generator) < 0.5
        scenes = scenes.with_verb(scenes.verb.masked_fill(shrinks, data.VERBS.index("shrink")))
    start = torch.randint(0, data.FRAMES - frames + 1, (count,), generator=generator).float()
    times = start[:, None] + (frames - 1) / 2
    extent = torch.tensor([data.SIZE, data.SIZE])
    centre = data.track(scenes, times, data.FRAMES, extent)[0][:, 0]
    shake = 24 * (torch.rand(count, 2, generator=generator) - 0.5)
    corner = (centre + shake - pixels / 2).round().clamp(0, data.SIZE - pixels)
    window = (frames, pixels, pixels)
    return data.render(scenes.to(device), start=start, corner=corner, window=window)


def loss_of(video: Tensor, restored: Tensor, moments: Tensor) -> Tensor:
    """Absolute and squared errors, those of neighbouring pixels' differences, and a small KL."""
    error = restored - video
    loss = error.abs().mean() + 8 * error.square().mean()
    for axis in (3, 4):
        loss = loss + 0.5 * error.diff(dim=axis).abs().mean()
    mean, log_variance = moments.chunk(2, dim=1)
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
    return loss + KL_WEIGHT * kl.sum(dim=1).mean()


def psnr(a: Tensor, b: Tensor) -> list[float]:
    """Decibels per clip of [B, 3, F, H, W] in -1..1; of pixels as shown, clamped."""
    error = ((a.clamp(-1, 1) - b.clamp(-1, 1)) / 2).square().flatten(1).mean(1)
    return (-10 * error.clamp_min(1e-10).log10()).tolist()


@torch.no_grad()
def evaluate(vae: VideoVAE, count: int = 32) -> dict[str, float]:
    """Median and worst PSNR of the round trip of held-out clips and of their first frames."""
    scenes = data.draw_scenes(count, torch.Generator().manual_seed(7), held_out=True)
    scenes = scenes.to(next(vae.parameters()).device)
    clips, firsts, spread = [], [], []
    for index in range(count):
        video = data.render(scenes.take(slice(index, index + 1)))
        latents = vae.encode(video)
        clips += psnr(vae.decode(latents), video)
        first = video[:, :, :1]
        firsts += psnr(vae.decode(vae.encode(first)), first)
        spread.append(latents.std().item())
    return {
        "clip": round(statistics.median(clips), 2),
        "worst": round(min(clips), 2),
        "first": round(statistics.median(firsts), 2),
        "spread": round(statistics.mean(spread), 3),
    }


def train(
    run_dir: Path, *, steps: int, lr: float, save_every: int, device: str, scale: int,
    decoder_of: Path | None, vae_of: Path | None,
) -> None:  # fmt: skip
    """Train, or go on training, and write RUN_DIR/vae.pt and log.jsonl."""
    run_dir.mkdir(parents=True, exist_ok=True)
    vae, first_seed, before = build(), 1000, None
    if decoder_of is not None or vae_of is not None:
        before = load_vae((decoder_of or vae_of) / "vae", precision="fp32", runtime=TorchRuntime())
        vae.load_state_dict(before.state_dict())
        before.to(device)
        first_seed = 1_000_000 if vae_of is None else 2_000_000
    if decoder_of is not None:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    vae.to(device)
    optimizer = optim.make_optimizer(vae, lr, lr / 4, OUTER)
    average = optim.Average(vae)
    step, seconds = 0, 0.0
    state = optim.load_run(run_dir / "vae.pt")
    if state is not None:
        vae.load_state_dict(state["model"])
        average.module.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        average.count, step, seconds = state["count"], state["step"], state["seconds"]
    losses, started = [], time.perf_counter()
    while step < steps:
        generator = torch.Generator().manual_seed(first_seed + step)
        held_out = False if before is None else None
        video = draw_batch(step / steps, generator, scale, device, held_out)
        with torch.set_grad_enabled(decoder_of is None):
            moments = graph.encode(vae, video.bfloat16())
        mean, log_variance = moments.chunk(2, dim=1)
        noise = torch.randn(mean.shape, generator=generator).to(device)
        deviation = (0.5 * log_variance.clamp(-20, 5)).exp()
        # a transformer's latents are off by more than the encoder's own noise
        off = 0.1 * torch.rand(len(mean), 1, 1, 1, 1, generator=generator).to(device)
        deviation = deviation + off * mean.detach().std()
        latents = mean + deviation * noise
        loss = loss_of(video, graph.decode(vae, latents.bfloat16()), moments)
        if vae_of is not None:
            with torch.no_grad():
                old_mean, _ = graph.encode(before, video.bfloat16()).chunk(2, dim=1)
            loss = loss + ANCHOR_WEIGHT * (mean - old_mean).square().mean()
        loss.backward()
        for group in optimizer.param_groups:
            group["scale"] = optim.scale_at(step, steps)
        norm = nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        if norm.isfinite():
            optimizer.step()
        optimizer.zero_grad()
        average.update(vae)
        losses.append(loss.detach())
        step += 1
        if step % save_every == 0 or step == steps:
            elapsed = seconds + time.perf_counter() - started
            loss = torch.stack(losses).mean().item()
            row = {"step": step, "s": round(elapsed, 1), "loss": round(loss, 4)}
            row |= evaluate(average.module, 32 if step == steps else 12)
            with (run_dir / "log.jsonl").open("a") as log:
                log.write(json.dumps(row) + "\n")
            losses = []
            optim.save_run(
                run_dir / "vae.pt", model=vae.state_dict(), average=average.module.state_dict(),
                optimizer=optimizer.state_dict(), count=average.count, step=step, seconds=elapsed,
            )  # fmt: skip


def load(run_dir: Path) -> VideoVAE:
    """The averaged VAE of a run, ready for use."""
    vae = VideoVAE(CONFIG)
    state = optim.load_run(run_dir / "vae.pt")
    assert state is not None, f"no vae.pt in {run_dir}"
    vae.load_state_dict(state["average"])
    return vae.eval().requires_grad_(False)


def main() -> None:
    """Parse and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--save-every", type=int, default=200)
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--decoder-of", type=Path, help="exported folder whose encoder stays")
    start.add_argument("--vae-of", type=Path, help="exported folder to go on with as a whole")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--scale", type=int, default=1, help="times the clips of a batch")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    train(**vars(arguments))


if __name__ == "__main__":
    main()
