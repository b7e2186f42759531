"""The recipe of the built-in model: its data, its measuring and its copy of the VAE's graph."""

import pytest
import torch
from comfyui_skyreels.skyreels.config import SCALING_FACTOR
from comfyui_skyreels.skyreels.vae.model import VideoVAE

from . import data, export, graph, measure, optim, vae

CASES = measure.held_out_cases(16)


def told(case: measure.Case, verb: str) -> measure.Finding:
    case = case.told(verb)
    return measure.measure(case.truth(), case.scene)


def test_one_seed_gives_one_set_of_clips():
    draw = [data.draw_scenes(8, torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*(data.render(scenes) for scenes in draw))


def test_held_out_combinations_never_come_up_in_training():
    scenes = data.draw_scenes(400, torch.Generator().manual_seed(2))
    assert not data.is_held_out(scenes.colour, scenes.shape, scenes.verb).any()
    kept = data.is_held_out(*torch.cartesian_prod(*map(torch.arange, (8, 3, 8))).T)
    assert kept.sum() == 32


def test_a_window_is_a_piece_of_the_clip():
    scenes = data.draw_scenes(2, torch.Generator().manual_seed(3))
    window = data.render(
        scenes, start=torch.tensor([4.0, 0.0]), corner=torch.tensor([[8.0, 3.0], [0.0, 32.0]]),
        window=(5, 32, 32),
    )  # fmt: skip
    whole = data.render(scenes)
    assert torch.equal(window[0], whole[0, :, 4:9, 3:35, 8:40])
    assert torch.equal(window[1], whole[1, :, :5, 32:, :32])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.prompt)
def test_what_true_clips_show_is_measured(case):
    finding = measure.measure(case.truth(), case.scene)
    assert finding.verb == case.verb
    if case.verb != "fade":
        assert finding.colour == list(data.COLOURS)[int(case.scene.colour[0])]
        assert finding.shape == data.SHAPES[int(case.scene.shape[0])]


def test_a_picture_told_another_verb_is_measured_as_that():
    assert told(CASES[0], "right").verb == "right"
    assert told(CASES[0], "shrink").verb == "shrink"
    assert abs(told(CASES[1], "left").shift[0]) > 6


def test_an_empty_clip_is_not_measured_as_told():
    case = CASES[4]
    gone = torch.full((17, 64, 64, 3), 0.5)
    assert measure.measure(gone, case.scene).shape == "none"


def test_the_training_graph_is_the_vae():
    model = vae.build(seed=1)
    clip = torch.rand(1, 3, 5, 16, 24) * 2 - 1
    with torch.no_grad():
        wanted = model.encode(clip)
        got = graph.encode(model, clip)[:, :16]
        assert (got - wanted).abs().max() < 1e-4 * wanted.abs().max()
        wanted_pixels = model.decode(wanted)
        pixels = graph.decode(model, wanted)
    assert (pixels - wanted_pixels).abs().max() < 1e-3 * wanted_pixels.abs().max()


def test_padding_has_the_gradient_of_replicate_padding():
    clip = torch.randn(2, 3, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 3, 5, 6, 7, dtype=torch.float64)[:, :, :, :, :]
    pad = torch.nn.functional.pad(clip, (1, 1, 1, 1, 2, 0), mode="replicate")
    (wanted,) = torch.autograd.grad((pad * weight).sum(), clip)
    (got,) = torch.autograd.grad((graph._Pad.apply(clip, 2) * weight.clone()).sum(), clip)
    assert torch.allclose(got, wanted)


def test_normalised_latents_have_unit_spread_and_decode_to_the_same_pixels():
    model = vae.build(seed=2)
    scenes = data.draw_scenes(8, torch.Generator().manual_seed(4))
    clip = data.render(scenes.take(slice(0, 1)), window=(5, 32, 32))
    before = model.decode(model.encode(clip))
    export.normalise_latents(model, clips=4)
    latents = model.encode(clip)
    assert 0.2 < (latents * SCALING_FACTOR).std() < 2.0
    assert torch.allclose(model.decode(latents), before, atol=1e-3)


def test_the_saved_vae_loads_with_the_ordinary_loader(tmp_path):
    from comfyui_skyreels.skyreels.loading import load_vae
    from comfyui_skyreels.skyreels.runtime import TorchRuntime

    model = vae.build().to(torch.bfloat16)
    export.save_vae(tmp_path / "vae", model)
    loaded = load_vae(tmp_path / "vae", precision="bf16", runtime=TorchRuntime())
    assert isinstance(loaded, VideoVAE)
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )


def test_an_orthogonalised_matrix_is_nearly_so():
    values = torch.linalg.svdvals(optim.orthogonalise(torch.randn(24, 60)))
    assert values.min() > 0.5
    assert values.max() < 1.4
