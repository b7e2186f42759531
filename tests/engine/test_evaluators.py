"""The bench's measures, on differences that are known: none, noise, flicker, a lost shape."""

import pytest
import torch
from bench import evaluators
from train import data, measure

CASE = measure.held_out_cases(1, seed=5)[0]
EXACT = CASE.truth(frames=5)


def noisy(spread: float) -> torch.Tensor:
    noise = torch.randn(EXACT.shape, generator=torch.Generator().manual_seed(0))
    return (EXACT + spread * noise).clamp(0, 1)


def shifted(offsets: list[float]) -> torch.Tensor:
    return (0.8 * EXACT + 0.1) + torch.tensor(offsets)[:, None, None, None]


def measures(*names: str):
    for name in names:
        if name in evaluators.NEEDS:
            pytest.importorskip(evaluators.NEEDS[name][1])
    return [getattr(evaluators, name) for name in names]


@pytest.mark.parametrize(
    ("name", "same", "off"), [("ssim", 1, 1e-6), ("gmsd", 0, 1e-6), ("warp", 1, 0), ("vmaf", 98, 3)]
)
def test_a_clip_is_like_itself(name, same, off):
    (score,) = measures(name)
    assert abs(score(EXACT, EXACT) - same) <= off


@pytest.mark.parametrize(("name", "sign"), [("ssim", -1), ("gmsd", 1), ("warp", 1), ("vmaf", -1)])
def test_more_noise_is_worse(name, sign):
    (score,) = measures(name)
    scores = [sign * score(noisy(spread), EXACT) for spread in (0.0, 0.01, 0.03, 0.1)]
    assert scores == sorted(scores)
    assert scores[-1] - scores[0] > 0.05


def test_flicker_is_told_from_a_constant_offset_of_the_same_size():
    """Which no measure of single frames does."""
    (warp,) = measures("warp")
    exact = shifted([0.0] * 5)
    constant, flickering = shifted([0.04] * 5), shifted([0.04, -0.04, 0.04, -0.04, 0.04])
    assert abs(measure.psnr(constant, exact) - measure.psnr(flickering, exact)) < 0.1
    assert warp(constant, exact) < 1.05
    assert warp(flickering, exact) > 3


def test_a_lost_shape_is_seen_by_structure_more_than_a_constant_offset():
    ground = CASE.scene.with_verb(torch.tensor([data.VERBS.index("still")])).magnified(1e-3)
    empty = data.render(ground, frames=5)
    lost = (empty[0] / 2 + 0.5).permute(1, 2, 3, 0)
    offset = (EXACT + 0.05).clamp(0, 1)
    ssim, gmsd = measures("ssim", "gmsd")
    assert ssim(lost, EXACT) < ssim(offset, EXACT) - 0.05
    assert gmsd(lost, EXACT) > gmsd(offset, EXACT) + 0.05


def test_ssim_is_that_of_a_reference_computed_in_a_loop():
    """One window of the definition, weights written out."""
    clip = torch.rand(1, 11, 11, 3, generator=torch.Generator().manual_seed(1))
    other = torch.rand(1, 11, 11, 3, generator=torch.Generator().manual_seed(2))
    place = torch.arange(11) - 5
    weight = torch.exp(-(place[:, None] ** 2 + place[None] ** 2) / 4.5)
    weight = weight / weight.sum()
    a, b = evaluators.luma(clip)[0, 0], evaluators.luma(other)[0, 0]
    mean_a, mean_b = (weight * a).sum(), (weight * b).sum()
    var_a, var_b = (weight * (a - mean_a) ** 2).sum(), (weight * (b - mean_b) ** 2).sum()
    both = (weight * (a - mean_a) * (b - mean_b)).sum()
    wanted = (2 * mean_a * mean_b + 1e-4) * (2 * both + 9e-4)
    wanted = wanted / ((mean_a**2 + mean_b**2 + 1e-4) * (var_a + var_b + 9e-4))
    assert abs(evaluators.ssim(clip, other) - float(wanted)) < 1e-5


def test_what_is_not_installed_is_said_in_a_line_each(monkeypatch):
    monkeypatch.setattr(evaluators.importlib.util, "find_spec", lambda _: None)
    assert evaluators.missing() == [
        "not measured: vmaf (pip install imageio-ffmpeg)",
        "not measured: warp (pip install opencv-python-headless)",
    ]
