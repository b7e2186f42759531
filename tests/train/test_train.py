"""The recipe of the built-in model: its data, its measuring and its copy of the VAE's graph."""

import pytest
import torch
from comfyui_skyreels.skyreels.builtin import BUILTIN_FOLDER
from comfyui_skyreels.skyreels.conditioning.embeds import PromptEmbeds
from comfyui_skyreels.skyreels.config import SCALING_FACTOR
from comfyui_skyreels.skyreels.runtime import TorchRuntime
from comfyui_skyreels.skyreels.transformer.layers import rope_table
from comfyui_skyreels.skyreels.vae.model import VideoVAE
from comfyui_skyreels.skyreels.weights.load import load_transformer, load_vae
from safetensors.torch import load_file, save_file

from . import data, export, graph, measure, optim, transformer, vae

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


def test_a_large_clip_is_a_small_one_in_more_pixels_and_frames():
    small = data.draw_scenes(8, torch.Generator().manual_seed(6))
    large = small.magnified(data.LARGE.space, data.LARGE.time)
    size, frames = data.LARGE.size, data.LARGE.frames
    clip = data.render(large, frames=frames, width=size, height=size)[:, :, :: data.LARGE.time]
    shrunk = torch.nn.functional.avg_pool3d(clip, (1, data.LARGE.space, data.LARGE.space))
    wanted = data.render(small)
    assert shrunk.shape == wanted.shape
    assert (shrunk - wanted).abs().mean() < 0.01  # softer edges
    assert (wanted[:, :, 0] - wanted[:, :, -1]).abs().mean() > 0.05


@pytest.mark.parametrize(
    "case", measure.held_out_cases(8, size=data.LARGE), ids=lambda case: case.prompt
)
def test_what_large_clips_show_is_measured_as_in_small_ones(case):
    finding = case.measured(case.truth())
    assert finding.verb == case.verb
    if case.verb in data.DIRECTIONS:
        assert 8 < max(map(abs, finding.shift)) < 25  # pixels of the small one


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
    model = vae.build().to(torch.bfloat16)
    export.save_vae(tmp_path / "vae", model)
    loaded = load_vae(tmp_path / "vae", precision="bf16", runtime=TorchRuntime())
    assert isinstance(loaded, VideoVAE)
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )


def test_an_orthogonalised_matrix_is_nearly_so():
    values = torch.linalg.svdvals(optim.orthogonalise(torch.randn(2, 24, 60)))
    assert values.min() > 0.5
    assert values.max() < 1.4


def test_the_loss_weighs_the_shape_most_and_one_in_the_mean():
    latents = 0.1 * torch.randn(2, 16, 5, 8, 8)
    latents[:, :, :, 2:4, 3:5] += 2.0
    weight = transformer._weight(latents)
    assert torch.allclose(weight.mean(dim=(1, 2, 3)), torch.ones(2))
    assert (weight[:, :, 2:4, 3:5].sum() / weight.sum()) > 0.6


def test_now_and_then_frames_stand_at_the_places_of_a_longer_clip():
    generator = torch.Generator().manual_seed(0)
    drawn = [transformer.draw_places(generator) for _ in range(400)]
    plain = sum(torch.equal(places, torch.arange(5)) for places in drawn)
    assert 0.82 < plain / len(drawn) < 0.94
    assert all(p[0] == 0 and p[-1] < transformer.LONG and (p.diff() > 0).all() for p in drawn)


def test_frames_of_a_long_clip_are_drawn_in_order_and_with_the_first():
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([transformer.draw_frames(4, generator) for _ in range(50)])
    assert (drawn[:, 0] == 0).all()
    assert (drawn.diff(dim=1) > 0).all()
    assert set(drawn.flatten().tolist()) == set(range(transformer.LONG))
    assert torch.equal(transformer.draw_frames(9, generator), torch.arange(9))


def test_processes_that_share_a_batch_find_the_loss_of_all_of_it():
    torch.manual_seed(0)
    model = transformer.build()
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.1)  # shut before training
    states = torch.randn(2, 3, 64), torch.randn(2, 64)
    batch = (torch.randn(2, 16, 4, 8, 8), torch.randn(2, 16, 1, 8, 8), *states)
    rope = rope_table((4, 4, 4), transformer.CONFIG)
    shares = [slice(None), slice(0, None, 2), slice(1, None, 2)]
    losses = [
        transformer.flow_loss(
            model, batch, rope, torch.Generator().manual_seed(1), torch.float32, share
        ).item()
        for share in shares
    ]
    assert abs(losses[1] - losses[2]) > 1e-3
    assert abs(losses[0] - (losses[1] + losses[2]) / 2) < 1e-5


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_a_training_step_learns_from_batches_of_one_length(tmp_path):
    """Examples of every kind reach the loss, and the loss the weights."""
    what = torch.cartesian_prod(*(torch.arange(n) for n in (8, 3, 8)))
    prompts = {(text,): [embeds(3)] for text in transformer.EMPTY_PROMPTS}
    prompts |= {tuple(w.tolist()): [embeds(4), embeds(6)] for w in what}
    clips = {
        "latents": torch.randn(len(what), 16, 5, 8, 8).half(),
        "first": torch.randn(len(what), 16, 1, 8, 8).half(),
        "what": what,
    }
    save_file(clips, tmp_path / "clips_000.safetensors")
    examples = transformer.Examples(transformer.load_clips(tmp_path), prompts, "cpu")
    generator = torch.Generator().manual_seed(0)
    model = transformer.build()
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.1)  # shut before training
    rope = rope_table((5, 4, 4), transformer.CONFIG)
    for batch in (examples.draw(2, generator), examples.draw_empty(2, generator)):
        assert batch[0].shape == (2, 16, 5, 8, 8)
        loss = transformer.flow_loss(model, batch, rope, generator)
        loss.backward()
        assert 0.3 < loss.item() < 10
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # what feeds the modulations waits until they open
    assert all("embed" in name or "_in." in name for name in still)


def embeds(tokens: int) -> PromptEmbeds:
    return PromptEmbeds(torch.randn(1, tokens, 64), torch.randn(1, 64))


def test_rows_are_drawn_by_key():
    keys = torch.tensor([2, 0, 2, 1, 2])
    table = transformer.Table(keys, 4)
    wanted = torch.tensor([0, 1, 2] * 20)
    rows = table.draw(wanted, torch.Generator().manual_seed(0))
    assert torch.equal(keys[rows], wanted)
    assert set(rows.tolist()) == {0, 1, 2, 3, 4}
    assert 0 <= int(table.draw(torch.tensor([3]), torch.Generator())) < 5  # there is none


def test_a_whole_vae_goes_on_from_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(vae, "evaluate", lambda *_: {})
    monkeypatch.setattr(vae, "BATCHES", {(5, 32, 1): (1, 1)})
    export.save_vae(tmp_path / "model" / "vae", vae.build().to(torch.bfloat16))
    before = load_vae(tmp_path / "model" / "vae", precision="fp32", runtime=TorchRuntime())
    options = {"save_every": 1, "device": "cpu", "scale": 1, "decoder_of": None}
    for steps, lr in ((1, 0.0), (2, 1e-2)):
        run = tmp_path / str(steps)
        vae.train(run, steps=steps, lr=lr, vae_of=tmp_path / "model", **options)
        after = vae.load(run).state_dict()
        changed = {n for n, old in before.state_dict().items() if not torch.equal(old, after[n])}
        assert bool(changed) is (lr > 0)
    assert any(name.startswith("encoder.") for name in changed)


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_a_transformer_goes_on_from_where_it_was(tmp_path, monkeypatch):
    prompts = {(text,): [embeds(3)] for text in transformer.EMPTY_PROMPTS}
    what = torch.cartesian_prod(*(torch.arange(n) for n in (8, 3, 8)))
    prompts |= {tuple(w.tolist()): [embeds(4)] for w in what}
    monkeypatch.setattr(transformer, "encode_prompts", lambda _: prompts)
    clips = {
        "latents": torch.randn(len(what), 16, 5, 8, 8).half(),
        "first": torch.randn(len(what), 16, 1, 8, 8).half(),
        "what": what,
    }
    save_file(clips, tmp_path / "clips_000.safetensors")
    transformer.train(
        tmp_path, BUILTIN_FOLDER, steps=1, lr=0.0, save_every=1, device="cpu", scale=1,
        goes_on=True,
    )  # fmt: skip
    folder = BUILTIN_FOLDER / "transformer"
    start = load_transformer(folder, precision="fp32", runtime=TorchRuntime()).state_dict()
    after = transformer.load(tmp_path).state_dict()
    assert all(torch.allclose(after[name], start[name], atol=1e-6) for name in start)


def test_a_decoder_trained_alone_leaves_the_latents(tmp_path, monkeypatch):
    monkeypatch.setattr(vae, "evaluate", lambda *_: {})
    monkeypatch.setattr(vae, "BATCHES", {(5, 32, 1): (1, 1)})
    export.save_vae(tmp_path / "model" / "vae", vae.build())
    before = load_file(tmp_path / "model" / "vae" / export.FILE)
    before = {name: tensor.clone() for name, tensor in before.items()}  # the file is overwritten
    vae.train(
        tmp_path / "run", steps=2, lr=1e-2, save_every=2, device="cpu", scale=1,
        decoder_of=tmp_path / "model", vae_of=None,
    )  # fmt: skip
    arguments = ["export", str(tmp_path / "model"), "--decoder", str(tmp_path / "run")]
    monkeypatch.setattr("sys.argv", arguments)
    export.main()
    after = load_file(tmp_path / "model" / "vae" / export.FILE)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith(("decoder.", "post_quant_conv.")) for name in changed)
