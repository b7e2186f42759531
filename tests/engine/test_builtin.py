"""The built-in stand-ins: the true architecture, harmless to the program, fit to be looked at."""

import sys

import pytest
import torch
from comfyui_skyreels.skyreels import builtin, text
from comfyui_skyreels.skyreels.conditioning import ImageConditioning, encode_image
from comfyui_skyreels.skyreels.config import SCALING_FACTOR, Guidance
from comfyui_skyreels.skyreels.errors import DependencyError, OptionError
from comfyui_skyreels.skyreels.model import SkyReelsTransformer
from comfyui_skyreels.skyreels.quant import QuantLinear
from comfyui_skyreels.skyreels.runtime import TorchRuntime
from comfyui_skyreels.skyreels.sampling import get_sigmas, sample
from comfyui_skyreels.skyreels.text import PromptEmbeds
from comfyui_skyreels.skyreels.vae.model import VideoVAE

RUNTIME = TorchRuntime()
MAKERS = (builtin.builtin_transformer, builtin.builtin_vae, builtin.builtin_text_encoder)


@pytest.fixture(scope="module")
def transformer() -> SkyReelsTransformer:
    return builtin.builtin_transformer(runtime=RUNTIME)


@pytest.fixture(scope="module")
def vae() -> VideoVAE:
    return builtin.builtin_vae(runtime=RUNTIME)


@pytest.fixture(scope="module")
def encoder() -> text.TextEncoder:
    pytest.importorskip("transformers")
    return builtin.builtin_text_encoder(runtime=RUNTIME)


@pytest.fixture(scope="module")
def picture(vae) -> ImageConditioning:
    return encode_image(
        vae, builtin.example_image(), width=64, height=64, num_frames=5, runtime=RUNTIME
    )


def prompt(seed: int = 0, tokens: int = 9) -> PromptEmbeds:
    generator = torch.Generator().manual_seed(seed)
    return PromptEmbeds(
        torch.randn(1, tokens, 64, generator=generator), torch.randn(1, 32, generator=generator)
    )


def run(transformer, picture, positive=None, steps=30):
    return sample(
        transformer, picture, positive or prompt(), prompt(seed=1), seed=0,
        sigmas=get_sigmas(steps), guidance=Guidance(), runtime=RUNTIME,
    )  # fmt: skip


def state(made) -> list[torch.Tensor]:
    modules = [made.llm, made.clip] if isinstance(made, text.TextEncoder) else [made]
    return [tensor.clone() for module in modules for tensor in module.state_dict().values()]


@pytest.mark.parametrize("make", MAKERS)
def test_building_leaves_the_global_random_state_alone(make):
    pytest.importorskip("transformers")
    before = torch.random.get_rng_state()
    make(runtime=RUNTIME)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("make", MAKERS)
def test_two_builds_have_the_same_weights_whatever_the_global_seed(make):
    pytest.importorskip("transformers")
    torch.manual_seed(1)
    first = state(make(runtime=RUNTIME))
    torch.manual_seed(2)
    second = state(make(runtime=RUNTIME))
    assert len(first) > 10
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("make", MAKERS)
def test_an_unknown_precision_is_refused(make):
    with pytest.raises(OptionError, match="fp4"):
        make("fp4", runtime=RUNTIME)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("auto", torch.float32), ("bf16", torch.bfloat16)]
)
def test_a_precision_sets_every_weight(precision, dtype):
    for make in MAKERS[:2]:
        made = make(precision, runtime=RUNTIME)
        assert {tensor.dtype for tensor in state(made)} == {dtype}


@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_the_transformer_in_8_bits_predicts_about_the_same(transformer, precision):
    small = builtin.builtin_transformer(precision, runtime=RUNTIME)
    quantized = [module for module in small.modules() if isinstance(module, QuantLinear)]
    assert len(quantized) == 2 * 8 + 2 * 2  # 8 linears of a double block, 2 of a single block
    inputs = {
        "hidden_states": torch.randn(1, 32, 2, 8, 8),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": prompt().prompt_embeds,
        "pooled_projections": prompt().pooled_prompt_embeds,
    }
    with torch.no_grad():
        wanted, got = transformer(**inputs), small(**inputs).float()
    error = (got - wanted).norm() / wanted.norm()
    assert 1e-4 < error < 0.1


def test_latents_of_the_example_have_the_spread_of_real_ones(picture):
    assert 0.7 < picture.image_latents.std() < 1.3  # model space


def test_decoded_frames_are_in_range_and_not_flat(vae):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, 2, 8, 8, generator=generator) / SCALING_FACTOR
    pixels = vae.decode(latents)
    assert 0.2 < pixels.std() < 0.6
    assert (pixels.abs() > 1).float().mean() < 0.1
    assert (pixels[:, :, 1:] - pixels[:, :, :-1]).abs().mean() > 0.01  # and it moves


def test_thirty_guided_steps_stay_near_the_spread_of_latents(transformer, picture):
    vae_latents = run(transformer, picture)
    assert vae_latents.isfinite().all()
    assert 1.0 < vae_latents.std() < 6.0


def test_the_picture_and_the_prompt_both_change_the_result(transformer, picture):
    base = run(transformer, picture, steps=4)
    other_prompt = run(transformer, picture, prompt(seed=5), steps=4)
    blank = ImageConditioning(torch.zeros_like(picture.image_latents), 64, 64, 5)
    other_picture = run(transformer, blank, steps=4)
    assert (other_prompt - base).std() > 0.05
    assert (other_picture - base).std() > 0.05


def test_every_gate_is_open(transformer, picture):
    """Bypassing any one block changes the prediction."""

    def predict(skipped=None):
        def run_block(block, *args):
            if block is not skipped:
                return block(*args)
            return args[:2] if len(args) == 5 else args[0]  # img, txt or the joined tokens

        with torch.no_grad():
            return transformer(
                torch.ones(1, 32, 2, 8, 8), torch.tensor([500.0]), prompt().prompt_embeds,
                prompt().pooled_prompt_embeds, run_block=run_block,
            )  # fmt: skip

    whole = predict()
    for block in transformer.blocks:
        assert (predict(skipped=block) - whole).norm() / whole.norm() > 1e-3


def test_the_text_encoder_fits_the_transformer(encoder, transformer):
    embeds = text.encode_prompt(encoder, "a cat", fps_prefix=False, runtime=RUNTIME)
    text.check_prompt_embeds(embeds, transformer.config)
    assert embeds.prompt_embeds.shape[1] == len("a cat") + 1  # bytes and the end of the turn


@pytest.mark.parametrize("words", ["", "мир 你好 😀", "a {brace} <|eot_id|>"])
def test_any_text_encodes(encoder, transformer, words):
    embeds = text.encode_prompt(encoder, words, runtime=RUNTIME)
    text.check_prompt_embeds(embeds, transformer.config)


def test_different_prompts_give_different_states(encoder):
    one = text.encode_prompt(encoder, "a cat", runtime=RUNTIME)
    two = text.encode_prompt(encoder, "a dog", runtime=RUNTIME)
    assert (one.prompt_embeds - two.prompt_embeds).abs().max() > 0.1
    assert (one.pooled_prompt_embeds - two.pooled_prompt_embeds).abs().max() > 0.1


def test_a_long_prompt_is_cut_to_256_tokens(encoder):
    embeds = text.encode_prompt(encoder, "word " * 200, runtime=RUNTIME)
    assert embeds.prompt_embeds.shape[1] == 256


def test_the_precision_is_part_of_the_text_encoders_fingerprint(encoder):
    half = builtin.builtin_text_encoder("bf16", runtime=RUNTIME)
    assert half.fingerprint != encoder.fingerprint


def test_without_transformers_the_command_that_installs_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(DependencyError, match="pip install 'transformers"):
        builtin.builtin_text_encoder(runtime=RUNTIME)


def test_the_example_is_a_colourful_picture_within_zero_and_one():
    image = builtin.example_image()
    assert image.shape == (1, 64, 64, 3)
    assert image.dtype == torch.float32
    assert image.min() >= 0
    assert image.max() <= 1
    assert (image.std(dim=(0, 1, 2)) > 0.05).all()


def test_the_notice_says_in_one_sentence_that_this_is_not_skyreels():
    assert builtin.BUILTIN_NOTICE.count(".") == 1
    assert "random weights" in builtin.BUILTIN_NOTICE
    assert "not SkyReels" in builtin.BUILTIN_NOTICE
