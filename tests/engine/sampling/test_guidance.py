"""Skip-layer guidance and FreSca against formulas written out, and off without a trace."""

import math
from dataclasses import replace

import pytest
import torch
from comfyui_skyreels.skyreels.conditioning.latents import ImageConditioning
from comfyui_skyreels.skyreels.config import FreSca, Guidance, SkipLayers
from comfyui_skyreels.skyreels.errors import OptionError
from comfyui_skyreels.skyreels.runtime import TorchRuntime
from comfyui_skyreels.skyreels.sampling.guidance import combine, guided_velocity, scale_frequencies
from comfyui_skyreels.skyreels.sampling.network import Network
from comfyui_skyreels.skyreels.sampling.sample import _job, _RunPrompts, sample
from comfyui_skyreels.skyreels.sampling.settings import SamplingSettings, get_sigmas
from comfyui_skyreels.skyreels.sampling.step_cache import CACHES
from comfyui_skyreels.skyreels.transformer.attention import sdpa
from comfyui_skyreels.skyreels.transformer.layers import rope_table
from comfyui_skyreels.skyreels.transformer.model import SkyReelsTransformer, call
from comfyui_skyreels.skyreels.transformer.sparse_attention import DenseRun
from support import tiny
from support.tiny import embeds
from torch import nn

RUNTIME = TorchRuntime()
SIGMAS = get_sigmas(4)
SHAPE = (1, 16, 3, 4, 6)
PROMPT, NEGATIVE = embeds(7, 1), embeds(4, 2)
SKIP = SkipLayers((1,), (0,), scale=1.5)


@pytest.fixture(scope="module")
def model() -> SkyReelsTransformer:
    return tiny.transformer()


@pytest.fixture(scope="module")
def image() -> ImageConditioning:
    generator = torch.Generator().manual_seed(2)
    return ImageConditioning(torch.randn(1, 16, 1, 4, 6, generator=generator), 48, 32, 9)


def run(model, image, guidance: Guidance, **settings) -> torch.Tensor:
    settings = SamplingSettings(sigmas=SIGMAS, guidance=guidance, **settings)
    return sample(model, image, PROMPT, NEGATIVE, settings, runtime=RUNTIME)


def predictions(model, image, latents, timestep, prompt, left_out=()) -> torch.Tensor:
    """One forward pass of the model with some blocks removed from its lists."""
    weak = SkyReelsTransformer(model.config).eval()
    weak.load_state_dict(model.state_dict())
    for name, index in left_out:
        blocks = getattr(weak, name)
        setattr(weak, name, nn.ModuleList(b for i, b in enumerate(blocks) if i != index))
    with torch.no_grad():
        return weak(
            torch.cat([latents, image.padded()], dim=1), torch.tensor([timestep]),
            prompt.prompt_embeds, prompt.pooled_prompt_embeds, torch.tensor([1000.0]),
        )  # fmt: skip


LEFT_OUT = (("double_blocks", 1), ("single_blocks", 0))


def velocity_at(model, image, guidance, latents, sigma, *, interleaves=False):
    from comfyui_skyreels.skyreels.sampling.precompute import precompute

    with torch.inference_mode():
        lookup = precompute(
            model, [PROMPT, NEGATIVE], (SIGMAS[:-1] * 1000).tolist(), torch.tensor([1000.0]),
            attention=torch.nn.functional.scaled_dot_product_attention, runtime=RUNTIME,
        )  # fmt: skip
        function = guided_velocity(
            Network(
                model, DenseRun(sdpa), lookup, image.padded(), rope_table((3, 2, 3), model.config),
                call,
            ),
            SIGMAS, guidance, interleaves=interleaves,
        )  # fmt: skip
        return function(latents, sigma)


@pytest.mark.parametrize("interleaves", [False, True])
@pytest.mark.parametrize("scale", [1.5, 0.0])
def test_a_step_is_the_published_formula(model, image, scale, interleaves):
    latents = torch.randn(SHAPE, generator=torch.Generator().manual_seed(4))
    sigma = SIGMAS[1]
    guidance = Guidance(skip_layers=replace(SKIP, scale=scale))
    got, negative = velocity_at(model, image, guidance, latents, sigma, interleaves=interleaves)
    timestep = float(sigma * 1000)

    def predict(prompt, left_out=()):
        return predictions(model, image, latents, timestep, prompt, left_out)

    v_pos, v_neg = predict(PROMPT), predict(NEGATIVE)
    if scale:  # pushed away from the weak prediction of the prompt, after true CFG
        expected = v_neg + 6.0 * (v_pos - v_neg) + scale * (v_pos - predict(PROMPT, LEFT_OUT))
    else:  # the negative prediction is the weak one
        v_neg = predict(NEGATIVE, LEFT_OUT)
        expected = v_neg + 6.0 * (v_pos - v_neg)
    assert tiny.relative_error(got, expected) <= 1e-5
    assert tiny.relative_error(negative, v_neg) <= 1e-5


def test_without_a_negative_prompt_the_extra_evaluation_guides_alone(model, image):
    latents = torch.randn(SHAPE, generator=torch.Generator().manual_seed(4))
    guidance = Guidance(true_cfg_scale=1.0, skip_layers=SKIP)
    got, negative = velocity_at(model, image, guidance, latents, SIGMAS[1])
    timestep = float(SIGMAS[1] * 1000)
    v_pos, weak = (
        predictions(model, image, latents, timestep, PROMPT, left_out)
        for left_out in ((), LEFT_OUT)
    )
    assert negative is None
    assert tiny.relative_error(got, v_pos + 1.5 * (v_pos - weak)) <= 1e-5


def test_outside_its_window_nothing_is_left_out_to_the_last_bit(model, image):
    plain = run(model, image, Guidance())
    never = Guidance(skip_layers=replace(SKIP, start=0.5, end=0.5))
    assert torch.equal(run(model, image, never), plain)
    assert not torch.equal(run(model, image, Guidance(skip_layers=SKIP)), plain)


@pytest.mark.parametrize(
    ("skip", "forwards"),
    [
        (None, 8),
        (SKIP, 12),
        (replace(SKIP, scale=0.0), 8),
        (replace(SKIP, start=0.25, end=0.75), 10),
    ],
)
def test_the_costs_are_the_stated_ones_and_the_plan_counts_them(model, image, skip, forwards):
    guidance = Guidance(skip_layers=skip)
    made = []
    hook = model.img_in.register_forward_hook(lambda *_: made.append(1))
    try:
        run(model, image, guidance)
    finally:
        hook.remove()
    assert len(made) == forwards
    settings = SamplingSettings(sigmas=SIGMAS, guidance=guidance)
    assert _job(model, image, _RunPrompts(PROMPT, NEGATIVE), settings).num_evaluations == forwards


def written_out(difference: torch.Tensor, fresca: FreSca) -> torch.Tensor:
    """The discrete Fourier transform as sums over each frequency of one axis after the other."""
    height, width = difference.shape[-2:]

    def waves(size: int) -> torch.Tensor:
        k = torch.arange(size) - size // 2  # frequency zero in the middle
        x = torch.arange(size)
        return torch.exp(-2j * math.pi * k[:, None] * x[None] / size).to(torch.complex128)

    down, across = waves(height), waves(width)
    spectrum = torch.einsum("kh,...hw,lw->...kl", down, difference.to(torch.complex128), across)
    for row in range(height):
        for column in range(width):
            is_low = all(
                -min(fresca.cutoff, size // 2) <= place - size // 2 < min(fresca.cutoff, size // 2)
                for place, size in ((row, height), (column, width))
            )
            spectrum[..., row, column] *= fresca.low if is_low else fresca.high
    back = torch.einsum("kh,...kl,lw->...hw", down.conj(), spectrum, across.conj())
    return (back / (height * width)).real.float()


@pytest.mark.parametrize("size", [(8, 12), (7, 9)])
@pytest.mark.parametrize("cutoff", [1, 2, 20])
def test_fresca_is_its_formula_written_out(size, cutoff):
    difference = torch.randn(1, 2, 3, *size, generator=torch.Generator().manual_seed(0))
    fresca = FreSca(0.8, 1.5, cutoff)
    got = scale_frequencies(difference, fresca)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, written_out(difference, fresca), atol=1e-5, rtol=1e-5)


@pytest.mark.comfy
def test_fresca_is_comfyuis(checkout):
    """Their function alone: importing the file would need ComfyUI's own environment."""
    import ast

    source = (checkout.folder / "comfy_extras" / "nodes_fresca").with_suffix(".py").read_text()
    (function,) = (n for n in ast.parse(source).body if getattr(n, "name", "") == "Fourier_filter")
    space = {"torch": torch, "fft": torch.fft}
    exec(compile(ast.Module([function], []), "nodes_fresca", "exec"), space)
    difference = torch.randn(1, 2, 3, 68, 120, generator=torch.Generator().manual_seed(0))
    # frame by frame: of a clip, 0.3.64 takes the low frames too for low frequencies
    frames = (space["Fourier_filter"](frame, 0.9, 1.25, 20) for frame in difference.unbind(2))
    theirs = torch.stack(list(frames), dim=2)
    torch.testing.assert_close(
        scale_frequencies(difference, FreSca(0.9, 1.25, 20)), theirs, atol=1e-5, rtol=1e-5
    )


def test_fresca_scales_the_difference_before_the_cfg_scale():
    v_pos, v_neg = torch.randn(2, 1, 16, 3, 8, 12, generator=torch.Generator().manual_seed(1))
    fresca = FreSca(1.0, 2.0, 2)
    expected = v_neg + 6.0 * written_out(v_pos - v_neg, fresca)
    got = combine(v_pos, v_neg, Guidance(fresca=fresca))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_fresca_of_ones_is_off_to_the_last_bit(model, image):
    ones = run(model, image, Guidance(fresca=FreSca(1.0, 1.0)))
    assert torch.equal(ones, run(model, image, Guidance()))
    assert not torch.equal(run(model, image, Guidance(fresca=FreSca(1.0, 2.0, 1))), ones)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (SkipLayers, "leaves no block out"),
        (lambda: replace(SKIP, scale=-1.0), "scale -1.0 is not within 0..10"),
        (lambda: replace(SKIP, start=0.9, end=0.1), r"window 0\.9\.\.0\.1 is invalid"),
        (lambda: FreSca(low=11.0), "FreSca low 11.0 is not within 0..10"),
        (lambda: FreSca(high=math.nan), "FreSca high nan"),
        (lambda: FreSca(cutoff=0), "cutoff 0 is below 1"),
        (
            lambda: SamplingSettings(cache=CACHES["easy"], guidance=Guidance(skip_layers=SKIP)),
            "do not go together",
        ),
    ],
)
def test_illegal_values_are_explained(make, words):
    with pytest.raises(OptionError, match=words):
        make()


def test_a_block_that_the_transformer_has_not_is_named(model, image):
    with pytest.raises(OptionError, match=r"leaves out single block 20, and the .* 0\.\.1"):
        run(model, image, Guidance(skip_layers=SkipLayers(single_blocks=(20,))))
