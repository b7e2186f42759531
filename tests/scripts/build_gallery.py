"""Write web/docs/gallery.webp: eight clips of the built-in model, one of each motion it knows.

    python tests/scripts/build_gallery.py

Pictures and prompts are of combinations that the model was not trained on, drawn with a fixed seed;
nothing is picked afterwards. About a minute on a CPU.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from comfyui_skyreels.skyreels.builtin import (
    builtin_text_encoder,
    builtin_transformer,
    builtin_vae,
)
from comfyui_skyreels.skyreels.pipeline import image_to_video
from comfyui_skyreels.skyreels.runtime import TorchRuntime
from comfyui_skyreels.skyreels.sampling.settings import SamplingSettings
from comfyui_skyreels.skyreels.text.encode import DEFAULT_NEGATIVE_PROMPT, encode_prompt
from PIL import Image, ImageDraw, ImageFont
from support.project import ROOT
from torch import Tensor
from train import data

SEED = 5
COLUMNS, SCALE, GAP, LINE = 4, 2, 8, 18
MS, LAST_MS = 42, 900  # of a frame at 24 fps, and of the last one
PAPER, INK = (24, 26, 30), (222, 222, 222)


def make_clips() -> tuple[list[Tensor], list[str]]:
    """Clips [17, 64, 64, 3] in 0..1, and their prompts."""
    runtime = TorchRuntime(torch.device("cpu"))
    scenes = data.draw_scenes(8, torch.Generator().manual_seed(SEED), held_out=True)
    pictures = data.render(scenes)[:, :, 0].permute(0, 2, 3, 1) / 2 + 0.5
    subjects = zip(scenes.colour.tolist(), scenes.shape.tolist(), scenes.verb.tolist(), strict=True)
    prompts = [data.plain_prompt(*subject) for subject in subjects]
    encoder = builtin_text_encoder(runtime=runtime)
    negative = encode_prompt(encoder, DEFAULT_NEGATIVE_PROMPT, fps_prefix=False, runtime=runtime)
    transformer, vae = builtin_transformer(runtime=runtime), builtin_vae(runtime=runtime)
    clips = []
    for picture, prompt in zip(pictures, prompts, strict=True):
        embeds = encode_prompt(encoder, prompt, runtime=runtime)
        settings = SamplingSettings(seed=SEED)
        clips.append(
            image_to_video(
                transformer, vae, picture[None], embeds, negative, settings,
                width=64, height=64, num_frames=17, runtime=runtime,
            )
        )  # fmt: skip
        print(prompt, flush=True)
    return clips, prompts


def sheet(frames: list[Tensor], prompts: list[str]) -> Image.Image:
    """One frame of every clip, each above its prompt."""
    side, rows = 64 * SCALE, -(-len(frames) // COLUMNS)
    size = (COLUMNS * (side + GAP) + GAP, rows * (side + LINE + GAP) + GAP)
    picture = Image.new("RGB", size, PAPER)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=9)
    for index, (frame, prompt) in enumerate(zip(frames, prompts, strict=True)):
        x = GAP + index % COLUMNS * (side + GAP)
        y = GAP + index // COLUMNS * (side + LINE + GAP)
        shown = Image.fromarray((frame * 255).round().to(torch.uint8).numpy())
        picture.paste(shown.resize((side, side), Image.Resampling.BICUBIC), (x, y))
        draw.text((x, y + side + 4), prompt, INK, font=font)
    return picture


def main() -> None:
    """Make the clips and write them as one moving picture."""
    clips, prompts = make_clips()
    sheets = [sheet([clip[index] for clip in clips], prompts) for index in range(len(clips[0]))]
    path = ROOT / "web" / "docs" / "gallery.webp"
    durations = [MS] * (len(sheets) - 1) + [LAST_MS]
    sheets[0].save(
        path, save_all=True, append_images=sheets[1:], duration=durations, loop=0,
        quality=70, method=6,
    )  # fmt: skip
    print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
