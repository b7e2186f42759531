"""How far a clip is from the exact one of the same seed: measures that need no downloaded weights.

Clips are [F, H, W, 3] in 0..1. SSIM and GMSD are computed here. VMAF-neg needs imageio-ffmpeg,
whose ffmpeg has libvmaf and its models; the warping error needs opencv-python-headless, for its
optical flow. Both are optional: `missing` says in a line which are not installed.

    ssim    structural similarity of the luma, mean of the frames; 1 is the same (Wang et al., 2004)
    gmsd    gradient magnitude similarity deviation, mean of the frames; 0 is the same, 0.1 is much
            (Xue et al., 2014)
    vmaf    VMAF v0.6.1 neg, mean of the frames; 100 is the same, about
    warp    warping error over that of the exact clip: what changes from a frame to the next beside
            the motion; 1 is the same, flicker is more (Lai et al., 2018)
"""

import importlib.util
import json
import subprocess
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

#: by measure: the distribution it needs and the module it is imported as
NEEDS = {
    "vmaf": ("imageio-ffmpeg", "imageio_ffmpeg"),
    "warp": ("opencv-python-headless", "cv2"),
}
LUMA = (0.299, 0.587, 0.114)
#: error per pixel of a clip without any, in steps of 1/255: below it, noise of rounding decides
LEAST_WARP = 0.25


def is_here(name: str) -> bool:
    """Whether a measure can be taken: what it needs is installed."""
    return name not in NEEDS or importlib.util.find_spec(NEEDS[name][1]) is not None


def missing() -> list[str]:
    """A line for each measure that cannot be taken here."""
    return [
        f"not measured: {name} (pip install {package})"
        for name, (package, _) in NEEDS.items()
        if not is_here(name)
    ]


def luma(clip: Tensor) -> Tensor:
    """[F, 1, H, W] in 0..1."""
    return (clip * clip.new_tensor(LUMA)).sum(-1)[:, None]


def ssim(clip: Tensor, exact: Tensor) -> float:
    """Structural similarity, windows of 11 pixels with a spread of 1.5."""
    place = torch.arange(11, dtype=clip.dtype) - 5
    line = torch.exp(-place.square() / (2 * 1.5**2))
    line = line / line.sum()

    def smooth(picture: Tensor) -> Tensor:
        picture = F.conv2d(picture, line[None, None, None, :])
        return F.conv2d(picture, line[None, None, :, None])

    a, b = luma(clip), luma(exact)
    mean_a, mean_b = smooth(a), smooth(b)
    var_a = smooth(a * a) - mean_a.square()
    var_b = smooth(b * b) - mean_b.square()
    both = smooth(a * b) - mean_a * mean_b
    first, second = 0.01**2, 0.03**2
    score = (2 * mean_a * mean_b + first) * (2 * both + second)
    score = score / ((mean_a.square() + mean_b.square() + first) * (var_a + var_b + second))
    return float(score.mean())


def gmsd(clip: Tensor, exact: Tensor) -> float:
    """Spread of the similarity of gradients, of pictures of half the size."""
    across = clip.new_tensor([[1.0, 0.0, -1.0]] * 3) / 3

    def gradient(picture: Tensor) -> Tensor:
        half = F.avg_pool2d(picture, 2)
        steps = [F.conv2d(half, kernel[None, None]) for kernel in (across, across.T)]
        return (steps[0].square() + steps[1].square()).sqrt()

    a, b = gradient(luma(clip)), gradient(luma(exact))
    constant = 170 / 255**2
    alike = (2 * a * b + constant) / (a.square() + b.square() + constant)
    return float(alike.flatten(1).std(dim=1, correction=0).mean())


def vmaf(clip: Tensor, exact: Tensor) -> float:
    """VMAF-neg of a clip of 64x64 and more pixels; needs imageio-ffmpeg."""
    import imageio_ffmpeg

    height, width = clip.shape[1:3]
    with tempfile.TemporaryDirectory() as folder:
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error"]
        for name, video in (("clip", clip), ("exact", exact)):
            file = Path(folder, name)
            file.write_bytes((video * 255).round().clamp(0, 255).byte().numpy().tobytes())
            command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}"]
            command += ["-r", "24", "-i", str(file)]
        both = "[0]format=yuv420p[a];[1]format=yuv420p[b];[a][b]"
        filters = f"{both}libvmaf=model=version=vmaf_v0.6.1neg:log_fmt=json:log_path=log.json"
        command += ["-lavfi", filters, "-f", "null", "-"]
        subprocess.run(command, check=True, cwd=folder)
        log = json.loads(Path(folder, "log.json").read_text(encoding="utf-8"))
    return float(log["pooled_metrics"]["vmaf"]["mean"])


def warp(clip: Tensor, exact: Tensor) -> float:
    """Warping error of a clip over that of the exact one; needs opencv-python-headless.

    Both by the exact clip's optical flow (dense inverse search), where flow and backward flow
    agree. Root mean square; an error below LEAST_WARP counts as that.
    """
    import cv2

    search = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    grey = (luma(exact)[:, 0] * 255).round().clamp(0, 255).byte().numpy()
    errors = torch.zeros(2)
    for index in range(len(exact) - 1):
        now, later = grey[index], grey[index + 1]
        flow, back = (
            torch.from_numpy(search.calc(*pair, None)) for pair in ((now, later), (later, now))
        )
        returned = flow + _fetch(back, flow)
        seen = returned.square().sum(-1) < 0.01 * flow.square().sum(-1) + 0.5
        for row, video in enumerate((clip, exact)):
            change = (_fetch(video[index + 1], flow) - video[index])[seen]
            errors[row] += change.square().mean()
    root = (errors / (len(exact) - 1)).sqrt() * 255
    root = root.clamp_min(LEAST_WARP)
    return float(root[0] / root[1])


def _fetch(picture: Tensor, flow: Tensor) -> Tensor:
    """[H, W, C] of a picture at every pixel's place moved by a flow [H, W, 2], in pixels."""
    height, width = flow.shape[:2]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    at = torch.stack([x, y], dim=-1) + flow
    at = (at + 0.5) * 2 / torch.tensor([width, height]) - 1
    fetched = F.grid_sample(
        picture.permute(2, 0, 1)[None], at[None], padding_mode="border", align_corners=False
    )
    return fetched[0].permute(1, 2, 0)
