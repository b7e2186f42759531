"""Train the built-in VAE.

    nice -n 19 python -m tests.train.vae RUN_DIR [--steps 8000] [--decoder-only]

Windows of clips at first: a window of 32 pixels holds the whole shape and a quarter of the plain
ground. Full clips in between and at the end, because GroupNorm sees all that is handed in.
The same command goes on after a break. --decoder-only keeps the encoder, and with it the latents
that a transformer was trained on, and improves the decoder alone.

One thread: beside another busy process two threads wait for each other, several times slower.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from comfyui_skyreels.skyreels.config import VAEConfig
from comfyui_skyreels.skyreels.vae.model import ResnetBlock, VideoVAE
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
                if hasattr(level, name):
                    weight = getattr(level, name)[0].conv.conv.weight
                    weight.mul_(0.5)
                    weight[:, :, 2, 1, 1] += 0.8 * torch.eye(len(weight))
        for mid in (vae.encoder.mid_block, vae.decoder.mid_block):
            mid.attentions[0].to_out[0].weight.mul_(0.1)
        vae.quant_conv.weight[16:] = 0  # variance: small and the same everywhere at first
        vae.quant_conv.bias[16:] = -5.0
    return vae


def draw_batch(progress: float, generator: torch.Generator) -> Tensor:
    """[B, 3, F, H, W] windows of training clips, most of them around the shape."""
    shapes = list(BATCHES)
    weights = torch.tensor([a + (b - a) * progress for a, b in BATCHES.values()])
    index = int(torch.multinomial(weights, 1, generator=generator))
    frames, pixels, count = shapes[index]
    scenes = data.draw_scenes(8 * -(-count // 8), generator)
    scenes = scenes.take(torch.randperm(len(scenes), generator=generator)[:count])
    start = torch.randint(0, data.FRAMES - frames + 1, (count,), generator=generator).float()
    times = start[:, None] + (frames - 1) / 2
    extent = torch.tensor([data.SIZE, data.SIZE])
    centre = data.track(scenes, times, data.FRAMES, extent)[0][:, 0]
    shake = 24 * (torch.rand(count, 2, generator=generator) - 0.5)
    corner = (centre + shake - pixels / 2).round().clamp(0, data.SIZE - pixels)
    return data.render(scenes, start=start, corner=corner, window=(frames, pixels, pixels))


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


def train(run_dir: Path, steps: int, decoder_only: bool, lr: float, save_every: int) -> None:
    """Train, or go on training, and write RUN_DIR/vae.pt and log.jsonl."""
    vae = build()
    if decoder_only:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    optimizer = optim.make_optimizer(vae, lr, lr / 4, OUTER)
    average = optim.Average(vae)
    step, seconds = 0, 0.0
    state = optim.load_run(run_dir / "vae.pt")
    if state is not None:
        goes_on = state["decoder_only"] == decoder_only
        vae.load_state_dict(state["model" if goes_on else "average"])
        average.module.load_state_dict(state["average"])
        if goes_on:
            optimizer.load_state_dict(state["optimizer"])
            average.count = state["count"]
            step, seconds = state["step"], state["seconds"]
    losses, started = [], time.perf_counter()
    while step < steps:
        generator = torch.Generator().manual_seed((1_000_000 if decoder_only else 1000) + step)
        video = draw_batch(step / steps, generator)
        with torch.set_grad_enabled(not decoder_only):
            moments = graph.encode(vae, video.bfloat16())
        mean, log_variance = moments.chunk(2, dim=1)
        noise = torch.randn(mean.shape, generator=generator)
        deviation = (0.5 * log_variance.clamp(-20, 5)).exp()
        if decoder_only:  # a transformer's latents are off by more than the encoder's own noise
            spread = 0.06 * mean.std() * torch.rand(len(mean), 1, 1, 1, 1, generator=generator)
            deviation = deviation + spread
        latents = mean + deviation * noise
        loss = loss_of(video, graph.decode(vae, latents.bfloat16()), moments)
        loss.backward()
        for group in optimizer.param_groups:
            group["scale"] = optim.scale_at(step, steps)
        norm = nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        if norm.isfinite():
            optimizer.step()
        optimizer.zero_grad()
        average.update(vae)
        losses.append(loss.item())
        step += 1
        if step % save_every == 0 or step == steps:
            elapsed = seconds + time.perf_counter() - started
            row = {"step": step, "loss": round(statistics.mean(losses), 4), "s": round(elapsed)}
            row.update(evaluate(average.module, 32 if step == steps else 12))
            with (run_dir / "log.jsonl").open("a") as log:
                log.write(json.dumps(row) + "\n")
            losses = []
            optim.save_run(
                run_dir / "vae.pt", model=vae.state_dict(), average=average.module.state_dict(),
                optimizer=optimizer.state_dict(), count=average.count, step=step, seconds=elapsed,
                decoder_only=decoder_only,
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
    parser.add_argument("--decoder-only", action="store_true")
    parser.add_argument("--lr", type=float, default=6e-3)
    parser.add_argument("--save-every", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.run_dir.mkdir(parents=True, exist_ok=True)
    train(
        arguments.run_dir, arguments.steps, arguments.decoder_only, arguments.lr,
        arguments.save_every,
    )  # fmt: skip


if __name__ == "__main__":
    main()
