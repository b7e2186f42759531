"""Runs with LoRAs: each gets the weights it asks for, streamed or not; saved steps know them."""

from dataclasses import replace

import pytest
import torch
from comfyui_skyreels.skyreels import builtin
from comfyui_skyreels.skyreels.conditioning.embeds import PromptEmbeds
from comfyui_skyreels.skyreels.conditioning.latents import ImageConditioning
from comfyui_skyreels.skyreels.errors import OptionError
from comfyui_skyreels.skyreels.image import example_image
from comfyui_skyreels.skyreels.pipeline import image_to_video
from comfyui_skyreels.skyreels.runtime import TorchRuntime
from comfyui_skyreels.skyreels.runtime.streaming import least_bytes, padded_bytes
from comfyui_skyreels.skyreels.sampling.resume import fingerprint_run
from comfyui_skyreels.skyreels.sampling.sample import sample
from comfyui_skyreels.skyreels.sampling.settings import SamplingSettings, get_sigmas
from comfyui_skyreels.skyreels.transformer import placement
from comfyui_skyreels.skyreels.transformer.placement import placed
from comfyui_skyreels.skyreels.weights.load import load_transformer
from comfyui_skyreels.skyreels.weights.lora.apply import AppliedLora, use_loras
from comfyui_skyreels.skyreels.weights.lora.read import load_lora
from support import lora as dialects
from support import tiny
from support.streams import Machine
from support.tiny import embeds

RUNTIME = TorchRuntime()
IMAGE = ImageConditioning(torch.linspace(-1, 1, 16 * 24).view(1, 16, 1, 4, 6), 48, 32, 9)
PROMPT, NEGATIVE = embeds(7, 1), embeds(4, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    tiny.save(folder / "model.safetensors", tiny.transformer().state_dict())
    return folder


@pytest.fixture(scope="module")
def lora(folder):
    parts = dialects.draw_parts(seed=4)
    return load_lora(dialects.write("OneTrainer OMI", parts, folder), tiny.TRANSFORMER)


def load(folder, precision="fp32"):
    return load_transformer(folder / "model.safetensors", precision=precision, runtime=RUNTIME)


def run(model, *loras, runtime=RUNTIME, **settings):
    settings = SamplingSettings(sigmas=get_sigmas(2), loras=loras, **settings)
    return sample(model, IMAGE, PROMPT, NEGATIVE, settings, runtime=runtime)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_one_model_serves_runs_with_and_without_loras(folder, lora, precision):
    model = load(folder, precision)
    plain = run(model)
    strong = run(model, AppliedLora(lora))
    weak = run(model, AppliedLora(lora, 0.5))
    assert not torch.equal(strong, plain)
    assert not torch.equal(weak, strong)
    assert torch.equal(run(model), plain)
    assert torch.equal(run(model, AppliedLora(lora, 0.0)), plain)
    assert torch.equal(run(model, AppliedLora(lora)), strong)
    assert torch.equal(run(load(folder, precision), AppliedLora(lora)), strong)


@pytest.mark.parametrize("cache", ["easy", "first-block"])
def test_a_step_cache_begins_anew_with_each_set(folder, lora, cache):
    from comfyui_skyreels.skyreels.sampling.step_cache import CACHES

    model, settings = load(folder), {"cache": CACHES[cache]}
    first = run(model, AppliedLora(lora), **settings)
    run(model, **settings)
    assert torch.equal(run(model, AppliedLora(lora), **settings), first)


def test_a_run_that_is_refused_changes_nothing(folder, lora):
    model = load(folder)
    before = model.single_blocks[0].linear1.weight.clone()
    with pytest.raises(OptionError, match="single block 7"):
        run(model, AppliedLora(lora), AppliedLora(lora, 1.0, "single:7"))
    assert torch.equal(model.single_blocks[0].linear1.weight, before)
    assert model.lora_state == {}


def test_saved_steps_know_the_loras_they_were_made_with(folder, lora, tmp_path):
    model, settings = load(folder), SamplingSettings(sigmas=get_sigmas(2))
    other = replace(lora, digest="another file")
    sets = [(), (AppliedLora(lora),), (AppliedLora(lora, 0.5),), (AppliedLora(other),),
            (AppliedLora(lora, 1.0, "double"),), 2 * (AppliedLora(lora),)]  # fmt: skip
    found = [
        fingerprint_run(model, IMAGE, PROMPT, NEGATIVE, replace(settings, loras=loras))
        for loras in sets
    ]
    assert len(set(found)) == len(sets)
    off = replace(settings, loras=(AppliedLora(lora, 0.0),))
    assert fingerprint_run(model, IMAGE, PROMPT, NEGATIVE, off) == found[0]
    place = tmp_path / "steps.safetensors"
    made = run(model, AppliedLora(lora), resume=place)
    run(model)
    assert torch.equal(run(model, AppliedLora(lora), resume=place), made)
    with pytest.raises(OptionError, match="other settings, picture, prompt or weights"):
        run(model, resume=place)


# --- streamed -----------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch):
    """A device with a copy stream, to which every weight has to be brought."""
    machine = Machine(bytes_per_s=1e6).install(monkeypatch)
    monkeypatch.setattr(placement, "open_copies", machine.open_copies)
    monkeypatch.setattr(
        placement, "onload_bytes", lambda tensors, device: sum(t.nbytes for t in tensors)
    )
    monkeypatch.setattr(placement, "onload", lambda tensors, device: lambda: None)
    return machine


class Small(TorchRuntime):
    """A device with so much memory, whose host page-locks at will."""

    free = 0

    def free_bytes(self) -> int:
        return self.free

    def make_room(self, num_bytes: int) -> None:
        pass

    def pin(self, memory) -> None:
        pass

    def unpin(self, memory) -> None:
        pass


@pytest.mark.parametrize("precision", ["bf16", "fp8", "int8"])
def test_a_streamed_run_brings_the_factors_with_their_blocks(folder, lora, machine, precision):
    model = load(folder, precision)
    use_loras(model, [AppliedLora(lora)], runtime=RUNTIME)
    inputs = tiny.inputs(model.config)
    latents = inputs.pop("hidden_states")
    with torch.inference_mode():
        modulation = model.condition(**inputs)
        kept, away = placement._split(model, torch.device("cpu"))
        sizes = [padded_bytes(block) for block in away.values()]
        runtime = Small()
        runtime.free = sum(t.nbytes for t in kept) + least_bytes(sizes)
        with placed(model, runtime, 0) as run_block:
            streamed = model.denoise(latents, modulation, run_block=run_block)
        resident = model.denoise(latents, modulation)
    moved = {id(tensor) for block in away.values() for tensor in block}
    factors = {id(p) for name, p in model.blocks[-1].named_parameters() if "side_branch" in name}
    assert factors <= moved | {id(tensor) for tensor in kept}
    assert bool(factors & moved) == (precision != "bf16")
    assert sum(machine.copied) >= sum(sizes)
    assert torch.equal(streamed, resident)


# --- the built-in model -------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["auto", "int8"])
@pytest.mark.usefixtures("fast_convolutions")
def test_the_builtin_model_with_a_lora_makes_another_finite_clip(precision, tmp_path):
    transformer = builtin.builtin_transformer(precision, runtime=RUNTIME)
    parts = dialects.draw_parts(transformer.config)
    style = load_lora(dialects.write("musubi-tuner", parts, tmp_path), transformer.config)
    config = transformer.config
    prompt = PromptEmbeds(torch.randn(1, 5, config.text_embed_dim),
                          torch.randn(1, config.pooled_projection_dim))  # fmt: skip
    settings = SamplingSettings(sigmas=get_sigmas(2), guidance=replace(
        SamplingSettings().guidance, true_cfg_scale=1.0), riflex_k=0)  # fmt: skip
    clips = [
        image_to_video(
            transformer, builtin.builtin_vae(runtime=RUNTIME), example_image(32, 32),
            prompt, None, replace(settings, loras=loras), width=32, height=32, num_frames=5,
            runtime=RUNTIME,
        )
        for loras in ((), (AppliedLora(style, 0.2),))
    ]  # fmt: skip
    assert clips[1].shape == (5, 32, 32, 3)
    assert bool(clips[1].isfinite().all())
    assert not torch.equal(*clips)
