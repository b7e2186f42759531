"""The nodes at work, under stand-ins of ComfyUI: same numbers as the library, errors, cancel."""

import logging
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfyui_skyreels
import pytest
import torch
from comfyui_skyreels.nodes import host as adapter
from comfyui_skyreels.nodes.local import convert, loaders
from comfyui_skyreels.nodes.local import extend as extend_module
from comfyui_skyreels.skyreels.builtin import BUILTIN_NAME
from comfyui_skyreels.skyreels.conditioning.latents import ImageConditioning, to_vae_space
from comfyui_skyreels.skyreels.config import ContextWindows, FreSca, Guidance, SkipLayers, Tiling
from comfyui_skyreels.skyreels.errors import (
    BadRenderError,
    CheckpointError,
    OptionError,
    ShapeError,
    TextError,
)
from comfyui_skyreels.skyreels.image import ImageSettings, encode_image
from comfyui_skyreels.skyreels.pipeline import image_to_video
from comfyui_skyreels.skyreels.pipeline.extend import ExtendSettings, extend_video
from comfyui_skyreels.skyreels.runtime import TorchRuntime
from comfyui_skyreels.skyreels.sampling import bad_render
from comfyui_skyreels.skyreels.sampling.calibrate import (
    Calibration,
    Score,
    fingerprint_weights,
    place_of_user,
    save_calibration,
)
from comfyui_skyreels.skyreels.sampling.network import Network
from comfyui_skyreels.skyreels.sampling.sample import sample
from comfyui_skyreels.skyreels.sampling.settings import SamplingSettings, euler, get_sigmas
from comfyui_skyreels.skyreels.sampling.step_cache import CACHES, CacheConfig
from comfyui_skyreels.skyreels.transformer.block_linear import BlockLinear
from comfyui_skyreels.skyreels.transformer.placement import sampling_bytes
from comfyui_skyreels.skyreels.vae.budget import decode_bytes, encode_bytes
from comfyui_skyreels.skyreels.vae.model import VideoVAE
from comfyui_skyreels.skyreels.vae.tiling import decode_frames
from comfyui_skyreels.skyreels.weights.load import checkpoint_of, load_transformer, load_vae
from support import host, tiny
from support.gguf_files import in_blocks, write
from support.kept import kept

pytestmark = pytest.mark.usefixtures("fast_convolutions", "kept_models")
NODES = comfyui_skyreels.NODE_CLASS_MAPPINGS
TEXT = (tiny.TRANSFORMER.text_embed_dim, tiny.TRANSFORMER.pooled_projection_dim)
SIZE = {"width": 48, "height": 32, "num_frames": 9}
LOADERS = {"load_transformer": load_transformer, "load_vae": load_vae}
KEPT = {name: kept(load) for name, load in LOADERS.items()}


@pytest.fixture(autouse=True)
def files_are_read_once(monkeypatch):
    for name, load in KEPT.items():
        monkeypatch.setattr(loaders, name, load)


@pytest.fixture
def read_each_time(monkeypatch, files_are_read_once):
    """For tests of the reading itself."""
    for name, load in LOADERS.items():
        monkeypatch.setattr(loaders, name, load)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    tiny.save(folder / "tiny.safetensors", tiny.transformer().state_dict())
    tiny.save(folder / "vae.safetensors", tiny.randomize(VideoVAE(tiny.SMALL_VAE)).state_dict())
    calm = tiny.transformer()
    calm.final_layer.linear.weight.data *= 0.02
    calm.double_blocks[0].img_mod.linear.weight.data *= 0.02
    tiny.save(folder / "calm.safetensors", calm.state_dict())
    return folder


@pytest.fixture
def comfy(comfy, weights):
    shutil.copy(weights / "tiny.safetensors", comfy.folder("diffusion_models"))
    shutil.copy(weights / "vae.safetensors", comfy.folder("vae"))
    return comfy


@pytest.fixture
def calm(comfy, weights):
    """A model of random weights whose predictions change as little as those of a trained one."""
    shutil.copy(weights / "calm.safetensors", comfy.folder("diffusion_models"))
    return load_model("calm.safetensors")


@pytest.fixture
def picture() -> torch.Tensor:
    return torch.rand(1, 40, 50, 3, generator=torch.Generator().manual_seed(3))


def text(words: str) -> convert.Conditioning:
    return host.made_up_conditioning(words, *TEXT)


def entry(words: str, **options) -> list:
    states, extras = text(words)[0]
    return [states, {**extras, **options}]


def node(name: str, **inputs):
    cls = NODES[name]
    with torch.inference_mode():
        return getattr(cls(), cls.FUNCTION)(**inputs)[0]


def load_model(name="tiny.safetensors"):
    return node("SkyReelsTransformerLoader", transformer=name, precision="auto")


def load_vae_node():
    return node("SkyReelsVAELoader", vae="vae.safetensors", precision="auto")


def prepare(picture, model=None) -> tuple[Any, dict]:
    """A VAE, and the inputs of a sampler node."""
    vae = load_vae_node()
    image = node("SkyReelsImageConditioning", vae=vae, image=picture, fit="crop", **SIZE)
    inputs = {
        "model": model or load_model(),
        "positive": text("a dog runs"),
        "negative": text(""),
        "image": image,
        "seed": 5,
        "steps": 2,
        "cfg": 6.0,
        "embedded_guidance": 1.0,
        "shift": 7.0,
    }
    return vae, inputs


def make_clip(picture, model=None, **changes) -> torch.Tensor:
    vae, inputs = prepare(picture, model)
    samples = node("SkyReelsSampler", **{**inputs, **changes})
    return node("SkyReelsVAEDecode", vae=vae, samples=samples, mode="auto")


def make_latents(picture, **changes) -> torch.Tensor:
    """For what the decoder has no part in."""
    _, inputs = prepare(picture)
    return node("SkyReelsSampler", **{**inputs, **changes})["samples"]


@pytest.fixture(scope="module")
def library_clip(weights) -> torch.Tensor:
    """Of the picture of `picture`; what the nodes make with the inputs of `prepare`."""
    picture = torch.rand(1, 40, 50, 3, generator=torch.Generator().manual_seed(3))
    runtime = TorchRuntime()
    prompt, negative = (convert.to_prompt_embeds(text(t), "x") for t in ("a dog runs", ""))
    return image_to_video(
        load_transformer(weights / "tiny.safetensors", runtime=runtime),
        load_vae(weights / "vae.safetensors", runtime=runtime),
        picture, prompt, negative, SamplingSettings(seed=5, sigmas=get_sigmas(2)),
        runtime=runtime, **SIZE,
    )  # fmt: skip


# --- the same numbers ---------------------------------------------------------------------------


def test_the_graph_gives_the_bits_of_the_library(comfy, library_clip, picture):
    frames = make_clip(picture)
    assert (frames.shape, frames.dtype) == ((9, 32, 48, 3), torch.float32)
    assert torch.equal(frames, library_clip)


def test_a_second_run_of_the_same_objects_gives_the_same_bits(comfy, picture):
    model = load_model()
    assert torch.equal(make_clip(picture, model), make_clip(picture, model))


def test_weights_loaded_in_one_prompt_serve_the_next(comfy, picture):
    # ComfyUI runs nodes in inference mode, whose tensors must not become weights
    model = load_model()
    assert not any(p.is_inference() for p in model.module.parameters())


def test_the_built_in_graph_runs_without_files(comfy, picture):
    name = BUILTIN_NAME
    vae = node("SkyReelsVAELoader", vae=name, precision="auto")
    model = node("SkyReelsTransformerLoader", transformer=name, precision="auto")
    encoder = node("SkyReelsTextEncoderLoader", text_encoder=name)
    prompt = node(
        "SkyReelsTextEncode", text_encoder=encoder, prompt="a red circle", add_fps_prefix=True
    )
    assert prompt[0][0].dtype == torch.float32
    image = node("SkyReelsImageConditioning", vae=vae, image=picture, fit="crop", **SIZE)
    samples = node(
        "SkyReelsSampler", model=model, positive=prompt, image=image, seed=0, steps=2, cfg=1.0,
        embedded_guidance=1.0, shift=7.0,
    )  # fmt: skip
    assert node("SkyReelsVAEDecode", vae=vae, samples=samples, mode="tiled").shape == (9, 32, 48, 3)


def test_a_core_picture_conditioning_gives_the_same_clip(comfy, picture):
    _, inputs = prepare(picture)
    ours = node("SkyReelsSampler", **inputs)
    # what InstructPixToPixConditioning leaves: the unscaled latent in the conditioning
    states, extras = inputs["positive"][0]
    unscaled = to_vae_space(inputs.pop("image").image_latents)
    inputs["positive"] = [[states, {**extras, "concat_latent_image": unscaled}]]
    empty = {"samples": torch.zeros(1, 16, 3, 4, 6)}
    theirs = node("SkyReelsSampler", **inputs, latent=empty)
    assert torch.allclose(ours["samples"], theirs["samples"], atol=1e-5)


def test_euler_given_as_a_core_sampler_gives_the_same_clip(comfy, picture):
    def sample_euler(model, x, sigmas, extra_args=None, callback=None, disable=None):
        for i in range(len(sigmas) - 1):
            denoised = model(x, sigmas[i] * x.new_ones([x.shape[0]]), **extra_args)
            callback({"i": i, "x": x, "denoised": denoised})
            x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
        return x

    sampler = type("KSAMPLER", (), {"sampler_function": sample_euler, "extra_options": {}})
    sampler.sampler_function = staticmethod(sample_euler)
    ours, theirs = make_latents(picture), make_latents(picture, sampler=sampler)
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_a_sampler_of_another_kind_is_refused(comfy, picture):
    with pytest.raises(OptionError, match="KSamplerSelect"):
        make_latents(picture, sampler=object())


def test_sigmas_replace_steps_and_shift(comfy, picture):
    own = torch.tensor([1.0, 0.6, 0.0])
    latents = [make_latents(picture, sigmas=own, steps=steps, shift=3.0) for steps in (7, 9)]
    assert torch.equal(*latents)


def test_the_latents_other_keys_are_passed_on_and_it_stays_as_it_was(comfy, picture, caplog):
    _, inputs = prepare(picture)
    latent = {"samples": torch.zeros(1, 16, 3, 4, 6), "noise_mask": torch.ones(1, 4, 6), "mine": 1}
    before = dict(latent)
    with caplog.at_level(logging.WARNING):
        samples = node("SkyReelsSampler", **inputs, latent=latent)
    assert samples["mine"] == 1
    assert latent["samples"] is before["samples"]
    assert latent.keys() == before.keys()
    assert caplog.text == ""  # a mask of ones keeps nothing


# --- progress and cancel ------------------------------------------------------------------------


@pytest.mark.usefixtures("read_each_time")
def test_progress_previews_and_time_left_reach_the_node(comfy, picture):
    model = node(
        "SkyReelsTransformerLoader", transformer="tiny.safetensors", precision="auto", unique_id="2"
    )
    assert comfy.texts[-1] == "loaded 0.7 MB"
    comfy.progress.clear()
    make_clip(picture, model, steps=3, unique_id="3:1")
    assert (3, 3) in comfy.progress
    assert len(comfy.previews) == 3
    assert comfy.previews[0][1] == (1, 16, 3, 4, 6)
    steps = [line for line in comfy.texts if line.startswith("step")]
    assert steps[-1] == "step 3/3"
    assert "s/step · about" in steps[2]


@pytest.mark.usefixtures("read_each_time")
@pytest.mark.parametrize("stage", ["load", "load vae", "encode", "sample", "decode"])
def test_cancel_in_any_stage_passes_through_and_the_next_run_is_good(
    comfy, library_clip, picture, stage
):
    vae, sampling = prepare(picture)
    samples = node("SkyReelsSampler", **sampling)
    work = {
        "load": load_model,
        "load vae": load_vae_node,
        "encode": lambda: node(
            "SkyReelsImageConditioning", vae=vae, image=picture, fit="crop", **SIZE
        ),
        "sample": lambda: node("SkyReelsSampler", **sampling),
        "decode": lambda: node("SkyReelsVAEDecode", vae=vae, samples=samples, mode="tiled"),
    }[stage]
    start = comfy.checks
    work()
    total = comfy.checks - start
    assert total >= 4
    for after in {0, 1, total // 2, total - 1}:
        comfy.checks, comfy.cancel_after = 0, after
        with pytest.raises(host.InterruptProcessingException):
            work()
    assert torch.equal(make_clip(picture, sampling["model"]), library_clip)


def test_a_cancelled_resumable_run_continues_to_the_same_bits(comfy, picture):
    _, inputs = prepare(picture)
    inputs["steps"] = 4
    comfy.checks = 0
    expected = node("SkyReelsSampler", **inputs)["samples"]
    total, comfy.checks = comfy.checks, 0
    comfy.cancel_after = total * 3 // 4
    with pytest.raises(host.InterruptProcessingException):
        node("SkyReelsSampler", **inputs, resume=True)
    saved = list((comfy.root / "user" / "__skyreels" / "resume").glob("*.safetensors"))
    assert len(saved) == 1
    comfy.progress.clear()
    assert torch.equal(node("SkyReelsSampler", **inputs, resume=True)["samples"], expected)
    assert comfy.progress[0][0] > 0, "it started over"
    # finished latents stay, for a ComfyUI that ends while decoding
    comfy.checks = 0
    assert torch.equal(node("SkyReelsSampler", **inputs, resume=True)["samples"], expected)
    assert comfy.checks < 5


# --- a clip that is continued -------------------------------------------------------------------


def extend_inputs(model=None) -> dict:
    clip = torch.rand(7, 32, 48, 3, generator=torch.Generator().manual_seed(2))
    return {
        "model": model or load_model(), "vae": load_vae_node(), "images": clip,
        "positive": text("a dog runs"), "negative": text(""), "seed": 5, "num_frames": 9,
        "steps": 2, "cfg": 6.0, "embedded_guidance": 1.0, "shift": 7.0,
    }  # fmt: skip


def extend_node(**inputs) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.inference_mode():
        return NODES["SkyReelsExtendVideo"]().extend(**inputs)


def test_a_clip_and_its_continuation_are_the_bits_of_the_library(comfy, weights):
    inputs = extend_inputs()
    joined, new = extend_node(**inputs, overlap_frames=5, unique_id="7")
    assert (joined.shape, joined.dtype) == ((11, 32, 48, 3), torch.float32)
    runtime = TorchRuntime()
    prompts = [convert.to_prompt_embeds(text(t), "x") for t in ("a dog runs", "")]
    expected, _ = extend_video(
        load_transformer(weights / "tiny.safetensors", runtime=runtime),
        load_vae(weights / "vae.safetensors", runtime=runtime), inputs["images"], *prompts,
        SamplingSettings(seed=5, sigmas=get_sigmas(2)), extend=ExtendSettings(9, 5),
        runtime=runtime,
    )  # fmt: skip
    assert torch.equal(joined, expected)
    assert torch.equal(new, joined[7:])
    assert len(comfy.previews) == 2
    assert [line for line in comfy.texts if line.startswith("step")][-1] == "step 2/2"


def test_a_long_continuation_takes_the_frequency_of_its_model(comfy, monkeypatch):
    """The tiny model has two temporal frequencies, SkyReels' fourth does not exist in it."""
    seen = []

    def spy(*inputs, extend, **options):
        seen.append((inputs[5].riflex_k, extend))
        return inputs[2], inputs[2][:0]

    monkeypatch.setattr(extend_module, "extend_video", spy)
    extend_node(**{**extend_inputs(), "num_frames": 289}, color_match=False)
    assert seen == [(2, ExtendSettings(289, 1, color_match=False))]


def test_cancel_while_a_clip_is_continued_passes_through_and_the_next_run_is_good(comfy):
    inputs = extend_inputs()
    comfy.checks = 0
    expected, _ = extend_node(**inputs)
    total = comfy.checks
    for after in {0, total // 3, total * 2 // 3, total - 1}:
        comfy.checks, comfy.cancel_after = 0, after
        with pytest.raises(host.InterruptProcessingException):
            extend_node(**inputs)
    comfy.cancel_after = None
    assert torch.equal(extend_node(**inputs)[0], expected)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"images": torch.zeros(3, 32, 48, 3)}, "clip of 3 frames is too short"),
        ({"images": torch.zeros(9, 30, 48, 3)}, "Height 30 is not a multiple of 16"),
        ({"overlap_frames": 9, "num_frames": 17}, "longer than the clip, which has 7"),
        ({"overlap_frames": 9}, "leaves nothing new in 9"),
        ({"overlap_frames": 4}, "use 5"),
        ({"num_frames": 10}, "10 frames is not a multiple of 4 plus 1"),
    ],
)
def test_a_clip_that_cannot_be_continued_is_refused_before_any_work(comfy, changes, words):
    with pytest.raises(ShapeError, match=words):
        extend_node(**{**extend_inputs(), **changes})
    assert not any(line.startswith(("step", "encod")) for line in comfy.texts)


def test_lengths_that_make_no_sense_are_refused_before_the_graph_runs(comfy):
    validate = NODES["SkyReelsExtendVideo"].VALIDATE_INPUTS
    assert validate(num_frames=17, overlap_frames=5) is True
    assert "leaves nothing new" in validate(num_frames=17, overlap_frames=17)
    assert "use 5" in validate(num_frames=17, overlap_frames=6)
    assert validate(num_frames=17) is True  # the other is linked


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_frames", "words"),
    [
        (98, "98 frames is not a multiple of 4 plus 1: use 97"),
        (0, "use 1"),
        (2001, "is more than 1025"),
        ("abc", "'abc' is not a whole number"),
    ],
)
def test_a_length_that_cannot_be_is_refused_before_anything_runs(comfy, num_frames, words):
    validate = NODES["SkyReelsImageConditioning"].VALIDATE_INPUTS
    assert validate(97) is True
    assert validate() is True  # linked
    assert words in validate(num_frames)


@pytest.mark.parametrize("size", [{"width": 100}, {"height": 0}, {"height": 8192}])
def test_a_width_that_cannot_be_is_refused_before_anything_runs(comfy, size):
    validate = NODES["SkyReelsImageConditioning"].VALIDATE_INPUTS
    assert str(next(iter(size.values()))) in validate(**{**SIZE, **size})
    assert str(next(iter(size.values()))) in validate(**size)  # the others are linked
    assert validate(**SIZE) is True


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"width": 100}, "Width 100 is not a multiple of 16: use 96"),
        ({"height": 0}, "Height 0 is not a multiple of 16: use 16"),
        ({"width": 8192}, "is more than 4096"),
    ],
)
def test_a_size_that_cannot_be_is_refused_when_the_node_runs(comfy, picture, inputs, words):
    with pytest.raises(ShapeError, match=words):
        node("SkyReelsImageConditioning", vae=load_vae_node(), image=picture, fit="crop",
             **{**SIZE, **inputs})  # fmt: skip


def test_a_file_that_is_not_here_is_answered_with_where_to_get_it(comfy):
    validate = NODES["SkyReelsTransformerLoader"].VALIDATE_INPUTS
    assert validate("tiny.safetensors") is True
    assert validate(BUILTIN_NAME) is True
    assert validate() is True
    answer = validate("skyreels_hunyuan_i2v_bf16.safetensors")
    assert "models/diffusion_models" in answer
    assert "https://huggingface.co/Kijai" in answer
    assert validate("sub\\tiny.safetensors").endswith("but tiny.safetensors was: choose that one.")
    assert "models/vae" in NODES["SkyReelsVAELoader"].VALIDATE_INPUTS("gone.safetensors")
    assert "models/diffusers" in validate("SkyReels (folder)")
    assert "https://huggingface.co/Kijai" in validate("q.gguf")
    shard = "SkyReels/diffusion_pytorch_model-00001-of-00006.safetensors"
    assert validate(shard).endswith("one of several shards: choose its folder, SkyReels (folder).")
    assert "5 is not in" in validate(5)
    assert "hunyuanvideo" in NODES["SkyReelsTextEncoderLoader"].VALIDATE_INPUTS("gone")
    with pytest.raises(CheckpointError, match="models/vae"):
        node("SkyReelsVAELoader", vae="gone.safetensors", precision="auto")


def test_files_in_the_wrong_slot_name_the_right_one(comfy, weights):
    shutil.copy(weights / "vae.safetensors", comfy.folder("diffusion_models"))
    shutil.copy(weights / "tiny.safetensors", comfy.folder("vae"))
    with pytest.raises(CheckpointError, match="SkyReels Load VAE"):
        node("SkyReelsTransformerLoader", transformer="vae.safetensors", precision="auto")
    with pytest.raises(CheckpointError, match="SkyReels Load Transformer"):
        node("SkyReelsVAELoader", vae="tiny.safetensors", precision="auto")


def test_sharded_folders_and_text_encoder_folders_are_offered(comfy):
    state = tiny.to_diffusers(tiny.transformer().state_dict(), tiny.TRANSFORMER)
    config = tiny.diffusers_config(tiny.TRANSFORMER)
    tiny.save_sharded(comfy.folder("diffusers") / "SkyReels-V1", state, config)
    for part in ("text_encoder", "text_encoder_2"):
        (comfy.folder("text_encoders") / "Hunyuan" / part).mkdir(parents=True)
    (comfy.folder("diffusers") / "other").mkdir()
    choices = NODES["SkyReelsTransformerLoader"].INPUT_TYPES()["required"]["transformer"][0]
    assert choices == [BUILTIN_NAME, "tiny.safetensors", "SkyReels-V1 (folder)"]
    encoders = NODES["SkyReelsTextEncoderLoader"].INPUT_TYPES()["required"]["text_encoder"][0]
    assert encoders == [BUILTIN_NAME, "Hunyuan (folder)"]
    loaded = node(
        "SkyReelsTransformerLoader", transformer="SkyReels-V1 (folder)", precision="auto"
    ).module.state_dict()
    for name, tensor in tiny.transformer().state_dict().items():
        assert torch.equal(loaded[name], tensor)


def test_gguf_files_are_offered_and_loaded_and_shards_are_not_offered(comfy):
    state = tiny.transformer().state_dict()
    write(comfy.folder("diffusion_models") / "q8.gguf", in_blocks(state))
    shards = comfy.folder("diffusion_models") / "SkyReels"
    tiny.save_sharded(shards, tiny.to_diffusers(state, tiny.TRANSFORMER), {})
    choices = NODES["SkyReelsTransformerLoader"].INPUT_TYPES()["required"]["transformer"][0]
    assert choices == [BUILTIN_NAME, "tiny.safetensors", "q8.gguf", "SkyReels (folder)"]
    assert NODES["SkyReelsTransformerLoader"].VALIDATE_INPUTS("q8.gguf") is True
    loaded = node("SkyReelsTransformerLoader", transformer="q8.gguf", precision="auto").module
    assert isinstance(loaded.double_blocks[0].img_attn_qkv, BlockLinear)


def test_a_whole_model_and_a_cache_are_offered_for_both_of_its_parts(comfy):
    whole = comfy.folder("diffusers") / "models--a--b" / "snapshots" / "0123"
    state = tiny.to_diffusers(tiny.transformer().state_dict(), tiny.TRANSFORMER)
    tiny.save(whole / "transformer" / "diffusion_pytorch_model.safetensors", state)
    tiny.save(
        whole / "vae" / "diffusion_pytorch_model.fp16.safetensors",
        tiny.randomize(VideoVAE(tiny.SMALL_VAE)).state_dict(),
    )
    name = "models--a--b (folder)"
    assert node("SkyReelsTransformerLoader", transformer=name, precision="auto")
    assert node("SkyReelsVAELoader", vae=name, precision="auto")


# --- guidance -----------------------------------------------------------------------------------

PLAIN = {
    "skip_layers": "off", "double_blocks": "", "single_blocks": "1", "skip_scale": 1.0,
    "skip_start": 0.0, "skip_end": 1.0, "fresca_low": 1.0, "fresca_high": 1.0,
    "fresca_cutoff": 20,
}  # fmt: skip


@pytest.mark.parametrize(
    ("widgets", "expected"),
    [
        ({}, Guidance()),
        ({"skip_layers": "extra evaluation", "skip_scale": 0.0}, Guidance()),
        ({"skip_layers": "negative prediction"}, Guidance(skip_layers=SkipLayers((), (1,)))),
        (
            {"skip_layers": "extra evaluation", "double_blocks": "0, 1 1", "skip_end": 0.5},
            Guidance(skip_layers=SkipLayers((0, 1), (1,), 1.0, 0.0, 0.5)),
        ),
        ({"fresca_high": 1.25, "fresca_cutoff": 1}, Guidance(fresca=FreSca(1.0, 1.25, 1))),
    ],
)
def test_refinements_of_guidance_reach_the_sampler(comfy, picture, widgets, expected):
    made = node("SkyReelsGuidance", **{**PLAIN, **widgets})
    assert made == expected
    _, inputs = prepare(picture)
    got = node("SkyReelsSampler", **inputs, guidance=made)["samples"]
    assert torch.equal(got, library_samples(inputs, guidance=expected, sigmas=get_sigmas(2)))
    plain = library_samples(inputs, sigmas=get_sigmas(2))
    assert torch.equal(got, plain) == (expected == Guidance())


def test_blocks_that_are_no_numbers_are_named(comfy):
    with pytest.raises(OptionError, match="Blocks 'a, 2' are not whole numbers"):
        node("SkyReelsGuidance", **{**PLAIN, "skip_layers": "negative prediction",
                                    "single_blocks": "a, 2"})  # fmt: skip


# --- windows ------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["static", "uniform"])
def test_windows_reach_the_sampler(comfy, picture, schedule):
    windows = node("SkyReelsContextWindows", window_frames=5, overlap_frames=4, schedule=schedule,
                   blend="flat")  # fmt: skip
    expected = ContextWindows(2, 1, schedule, "flat")
    assert windows == expected
    _, inputs = prepare(picture)
    got = node("SkyReelsSampler", **inputs, windows=windows)["samples"]
    assert torch.equal(got, library_samples(inputs, windows=expected, sigmas=get_sigmas(2)))
    assert not torch.equal(got, library_samples(inputs, sigmas=get_sigmas(2)))
    with pytest.raises(OptionError, match="Set the cache to off"):
        node("SkyReelsSampler", **inputs, windows=windows, cache="easy")


# --- text encoders in single files --------------------------------------------------------------


def test_text_encoders_in_single_files_give_the_conditioning_of_their_folder(comfy):
    from safetensors.torch import load_file
    from support.text import make_text_folder

    place = comfy.folder("text_encoders")
    folder = make_text_folder(place / "both", true_heads=True)
    for part, prefix, file in (
        ("text_encoder", "model.", "llava_llama3.safetensors"),
        ("text_encoder_2", "text_model.", "clip_l.safetensors"),
    ):
        state = load_file(folder / part / "model.safetensors")
        state = {prefix + name.removeprefix(prefix): tensor for name, tensor in state.items()}
        tiny.save(place / file, state)
    groups = NODES["SkyReelsTextEncoderLoader"].INPUT_TYPES()
    files = ["clip_l.safetensors", "llava_llama3.safetensors"]
    encoders = groups["required"]["text_encoder"][0]
    assert encoders == [BUILTIN_NAME, "both (folder)", *files]
    assert groups["optional"]["clip"][0] == ["in the folder", *files]
    assert groups["optional"]["tokenizer"][0] == ["auto", "both (folder)"]

    def encode(**choice):
        encoder = node("SkyReelsTextEncoderLoader", **choice)
        made = node("SkyReelsTextEncode", text_encoder=encoder, prompt="a cat", add_fps_prefix=True)
        return made[0][0], made[0][1]["pooled_output"]

    wanted = encode(text_encoder="both (folder)")
    single = {"text_encoder": "llava_llama3.safetensors", "clip": "clip_l.safetensors"}
    assert NODES["SkyReelsTextEncoderLoader"].VALIDATE_INPUTS(**single) is True
    with pytest.raises(CheckpointError, match="No tokenizer of LLaMA-3 was found"):
        encode(**single)
    given = encode(**single, tokenizer="both (folder)")
    # ComfyUI's own, which lie below its checkout
    own = comfy.root / "comfy"
    shutil.copytree(folder / "tokenizer", own / "text_encoders" / "llama_tokenizer")
    shutil.copytree(folder / "tokenizer_2", own / "sd1_tokenizer")
    for found in (given, encode(**single)):
        assert all(map(torch.equal, found, wanted))
    with pytest.raises(CheckpointError, match="CLIP-L is needed too.*`clip` in the node"):
        encode(text_encoder="llava_llama3.safetensors")


@pytest.mark.parametrize("name", ["text_encoder", "clip", "tokenizer"])
def test_a_text_encoder_file_that_is_gone_is_answered_with_where_to_get_it(comfy, name):
    answer = NODES["SkyReelsTextEncoderLoader"].VALIDATE_INPUTS(**{name: "gone.safetensors"})
    assert "gone.safetensors is not in models/text_encoders: download it from" in answer


# --- text to video ------------------------------------------------------------------------------


@pytest.fixture
def text_only(comfy) -> dict:
    """Inputs of a sampler node with a text-to-video model, whose size an empty latent gives."""
    model = tiny.transformer(replace(tiny.TRANSFORMER, in_channels=16))
    tiny.save(comfy.folder("diffusion_models") / "t2v.safetensors", model.state_dict())
    return {
        "model": node("SkyReelsTransformerLoader", transformer="t2v.safetensors", precision="auto"),
        "positive": text("a dog runs"), "negative": text(""), "seed": 5, "steps": 2, "cfg": 6.0,
        "embedded_guidance": 1.0, "shift": 7.0,
        "latent": {"samples": torch.zeros(1, 16, 3, 4, 6)},
    }  # fmt: skip


def test_a_text_to_video_model_samples_without_a_picture_what_the_library_does(text_only):
    samples = node("SkyReelsSampler", **text_only)["samples"]
    prompt, negative = (convert.to_prompt_embeds(text(t), "x") for t in ("a dog runs", ""))
    expected = sample(
        text_only["model"].module, ImageConditioning(None, 48, 32, 9), prompt, negative,
        SamplingSettings(seed=5, sigmas=get_sigmas(2)), runtime=TorchRuntime(),
    )  # fmt: skip
    assert torch.equal(samples, expected)
    again = node(
        "SkyReelsSampler", **{**text_only, "latent": {"samples": samples}, "denoise": 0.5}
    )["samples"]
    assert not torch.equal(again, samples)


def test_a_picture_for_a_text_to_video_model_and_a_missing_size_are_named(
    comfy, text_only, picture
):
    _, inputs = prepare(picture)
    concat = [[text("a")[0][0], {"concat_latent_image": torch.zeros(1, 16, 1, 4, 6),
                                 **text("a")[0][1]}]]  # fmt: skip
    for change, words in (
        ({"image": inputs["image"]}, "takes no picture: disconnect `image`"),
        ({"positive": concat}, "takes no picture"),
        ({"latent": None}, "connect an EmptyHunyuanLatentVideo to `latent`"),
    ):
        with pytest.raises(ShapeError, match=words):
            node("SkyReelsSampler", **{**text_only, **change})
    extended = {**extend_inputs(), "model": text_only["model"]}
    with pytest.raises(OptionError, match="takes no picture"):
        node("SkyReelsExtendVideo", **extended)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"negative": None}, OptionError, "needs a negative prompt"),
        ({"positive": []}, TextError, "positive conditioning is empty"),
        ({"positive": [[torch.zeros(1, 3, 24), {}]]}, TextError, "no pooled CLIP state"),
        (
            {"positive": [[torch.zeros(1, 3, 99), {"pooled_output": torch.zeros(1, 12)}]]},
            TextError,
            "width 99.*DualCLIPLoader",
        ),
        (
            {
                "positive": [
                    [torch.full((1, 3, 24), torch.nan), {"pooled_output": torch.zeros(1, 12)}]
                ]
            },
            TextError,
            "NaN",
        ),
        ({"positive": [entry("a", strength=-1.0)]}, OptionError, "Strength -1.0"),
        ({"image": None}, ShapeError, "No picture"),
        ({"latent": {"samples": torch.zeros(1, 4, 8, 8)}}, ShapeError, "EmptyHunyuanLatentVideo"),
        (
            {"latent": {"samples": torch.full((1, 16, 3, 4, 6), torch.nan)}},
            ShapeError,
            "start latent",
        ),
        (
            {
                "latent": {
                    "samples": torch.zeros(2, 16, 3, 4, 6),
                    "noise_mask": torch.full((1, 4, 6), torch.nan),
                }
            },
            ShapeError,
            "mask holds NaN",
        ),
        ({"sigmas": torch.tensor([1.0, torch.nan, 0.0])}, OptionError, "NaN"),
        ({"latent": {"samples": torch.zeros(1, 16, 5, 4, 6)}}, ShapeError, "start latent"),
        ({"sigmas": torch.tensor([14.6, 1.0, 0.0])}, OptionError, "flow schedule"),
        ({"sigmas": torch.tensor([0.0, 1.0])}, OptionError, "must be falling"),
    ],
)
def test_what_cannot_be_sampled_is_refused_before_the_model_moves(
    comfy, picture, change, error, words
):
    _, inputs = prepare(picture)
    comfy.loaded.clear()
    with pytest.raises(error, match=words):
        node("SkyReelsSampler", **{**inputs, **change})
    assert comfy.loaded == []


def test_tile_widgets_without_tiles_are_refused(comfy, picture):
    samples = {"samples": torch.zeros(1, 16, 3, 4, 6)}
    with pytest.raises(OptionError, match="mode full has no tiles"):
        node("SkyReelsVAEDecode", vae=load_vae_node(), samples=samples, mode="full", tile_size=64)


# --- CONDITIONING -------------------------------------------------------------------------------


def test_conditioning_is_trimmed_to_its_true_tokens_and_to_256(caplog):
    states = torch.randn(1, 300, 24)
    pooled = {"pooled_output": torch.randn(1, 12)}
    mask = torch.zeros(1, 300)
    mask[:, :7] = 1
    masked = convert.to_prompt_embeds([[states, {**pooled, "attention_mask": mask}]], "positive")
    assert torch.equal(masked.prompt_embeds, states[:, :7])
    with caplog.at_level(logging.WARNING):
        long = convert.to_prompt_embeds([[states, pooled]], "positive")
    assert torch.equal(long.prompt_embeds, states[:, :256])
    assert "300 tokens" in caplog.text


def to_prompt(conditioning, **options):
    return convert.to_prompt(conditioning, "positive", **{"shift": 7.0, "guidance": 1.0, **options})


def test_every_entry_comes_with_its_strength_range_and_guidance():
    ranged = {"start_percent": 0.25, "end_percent": 1.0}
    first, second, third = to_prompt(
        [entry("a"), entry("b c", strength=0.5, guidance=3.5, **ranged), entry("d", default=True)]
    )
    assert torch.equal(first.embeds.prompt_embeds, text("a")[0][0])
    assert (first.strength, first.sigma_start, first.sigma_end) == (1.0, 1.0, 0.0)
    assert (second.strength, second.guidance_scale) == (0.5, 3.5)
    assert second.sigma_start == pytest.approx(7 * 0.75 / (1 + 6 * 0.75))
    assert second.sigma_end == 0.0
    assert not first.fills_up
    assert third.fills_up


def test_an_entry_with_prompts_for_each_clip_gives_each_its_own(caplog):
    states, pooled = torch.randn(2, 3, 24), torch.randn(2, 12)
    conditioning = [[states, {"pooled_output": pooled}]]
    for index in range(3):
        (prompt,) = to_prompt(conditioning, index=index)
        assert torch.equal(prompt.embeds.prompt_embeds, states[index % 2][None])
        assert torch.equal(prompt.embeds.pooled_prompt_embeds, pooled[index % 2][None])
    convert.warn_surplus(conditioning, "positive", 1)
    assert "holds 2 prompts at once, and the batch has 1 clip" in caplog.text


def test_keys_that_are_not_used_are_named_once_each(caplog):
    odd = {"area": (1, 2, 3, 4), "mask": torch.ones(1, 2, 2), "mask_strength": 1.0, "hooks": 1,
           "control": 1, "gligen": 1, "reference_latents": [], "from_another_pack": 1}  # fmt: skip
    used = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0, "guidance": 1.0}
    convert.warn_unused([entry("a", **odd), entry("b", **odd, **used)], [entry("c", **odd)], None)
    named = [record.getMessage().split()[2] for record in caplog.records]
    assert sorted(named) == sorted(odd.keys() - {"mask_strength"})


def test_a_graph_with_ranges_and_strengths_says_nothing_and_one_with_an_area_does(
    comfy, picture, caplog
):
    _, inputs = prepare(picture)
    plain = node("SkyReelsSampler", **inputs)["samples"]
    inputs["positive"] = [entry("a dog runs", start_percent=0.0, end_percent=0.5),
                          entry("a cat", start_percent=0.5, end_percent=1.0)]  # fmt: skip
    scheduled = node("SkyReelsSampler", **inputs)["samples"]
    assert caplog.text == ""
    assert not torch.equal(plain, scheduled)
    inputs["positive"] = [entry("a dog runs", area=(4, 4, 0, 0), start_percent=0.0, end_percent=1.0,
                                strength=1.0)]  # fmt: skip
    assert torch.equal(node("SkyReelsSampler", **inputs)["samples"], plain)
    assert caplog.text.count("area") == 1


# --- batches and masks --------------------------------------------------------------------------


def test_a_batch_is_sampled_clip_by_clip_with_the_noise_of_one_generator(comfy, picture):
    _, inputs = prepare(picture)
    start = torch.randn(2, 16, 3, 4, 6, generator=torch.Generator().manual_seed(9))
    inputs["sigmas"] = get_sigmas(2, denoise=0.5)
    samples = node("SkyReelsSampler", **inputs, latent={"samples": start}, unique_id="1")
    assert samples["samples"].shape == (2, 16, 3, 4, 6)
    assert [line for line in comfy.texts if line.startswith("step 4/4")]
    assert max(done for done, total in comfy.progress if total == 4) == 4
    for index in range(2):
        alone = library_samples(
            inputs, sigmas=inputs["sigmas"], init_latents=start[index : index + 1],
            noise_index=index,
        )  # fmt: skip
        assert torch.equal(samples["samples"][index : index + 1], alone)
    third = {"samples": start[:1], "batch_index": [1]}
    again = node("SkyReelsSampler", **inputs, latent=third)["samples"]
    other = library_samples(inputs, sigmas=inputs["sigmas"], init_latents=start[:1], noise_index=1)
    assert torch.equal(again, other)


def test_a_batch_of_pictures_gives_its_first_clip_or_one_of_each(comfy, picture):
    vae, inputs = prepare(picture)
    both = torch.cat([picture, picture.flip(1)])
    first, each = (
        node("SkyReelsImageConditioning", vae=vae, image=both, fit="crop", batch=batch, **SIZE)
        for batch in ("first picture", "one clip each")
    )
    assert torch.equal(first.image_latents, inputs["image"].image_latents)
    assert each.image_latents.shape == (2, 16, 1, 4, 6)
    samples = node("SkyReelsSampler", **{**inputs, "image": each})["samples"]
    assert samples.shape == (2, 16, 3, 4, 6)
    assert torch.equal(samples[:1], node("SkyReelsSampler", **inputs)["samples"])
    with pytest.raises(OptionError, match="set prefix_frames to 1"):
        node("SkyReelsImageConditioning", vae=vae, image=both, fit="crop", prefix_frames=5,
             batch="one clip each", **SIZE)  # fmt: skip


def test_an_end_picture_reaches_the_sampler_and_each_clip_of_a_batch_has_its_own(comfy, picture):
    vae, inputs = prepare(picture)
    both = torch.cat([picture, picture.flip(1)])
    end = both.flip(0)

    def encode(**options):
        options = {"vae": vae, "image": both, "fit": "crop", **SIZE, **options}
        return node("SkyReelsImageConditioning", **options)

    one = encode(end_image=end)  # the first of each
    assert torch.equal(one.image_latents, inputs["image"].image_latents)
    assert torch.equal(one.end_latents, encode(image=end).image_latents)
    each = encode(end_image=end, batch="one clip each")
    assert torch.equal(each.end_latents[0], one.end_latents[0])
    samples = node("SkyReelsSampler", **{**inputs, "image": each})["samples"]
    for index in range(2):
        own = encode(image=both[index:][:1], end_image=end[index:][:1])
        options = {"sigmas": get_sigmas(2), "noise_index": index}
        made = library_samples({**inputs, "image": own}, **options)
        assert torch.equal(samples[index], made[0])
    shared = encode(end_image=end[:1], batch="one clip each")
    assert torch.equal(shared.end_latents[0], shared.end_latents[1])
    with pytest.raises(ShapeError, match="end_image holds 3 pictures and image 2"):
        encode(end_image=torch.cat([end, end[:1]]), batch="one clip each")


def test_a_batch_is_decoded_clip_by_clip_into_one_row_of_frames(comfy):
    vae = load_vae_node()
    latents = torch.randn(2, 16, 2, 4, 6, generator=torch.Generator().manual_seed(1))
    both = node("SkyReelsVAEDecode", vae=vae, samples={"samples": latents}, mode="full")
    each = [node("SkyReelsVAEDecode", vae=vae, samples={"samples": one[None]}, mode="full")
            for one in latents]  # fmt: skip
    assert torch.equal(both, torch.cat(each))


def test_cancel_between_two_clips_passes_through(comfy, picture):
    _, inputs = prepare(picture)
    latent = {"samples": torch.zeros(2, 16, 3, 4, 6)}
    comfy.checks = 0
    expected = node("SkyReelsSampler", **inputs, latent=latent)["samples"]
    for after in (comfy.checks // 2, comfy.checks - 1):
        comfy.checks, comfy.cancel_after = 0, after
        with pytest.raises(host.InterruptProcessingException):
            node("SkyReelsSampler", **inputs, latent=latent)
    assert torch.equal(node("SkyReelsSampler", **inputs, latent=latent)["samples"], expected)


def test_a_noise_mask_keeps_what_it_covers_and_changes_the_rest(comfy, picture):
    _, inputs = prepare(picture)
    start = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(9))
    mask = torch.ones(1, 4, 6)
    mask[..., :3] = 0
    samples = node("SkyReelsSampler", **inputs, latent={"samples": start, "noise_mask": mask})
    torch.testing.assert_close(samples["samples"][..., :3], start[..., :3])
    assert not torch.allclose(samples["samples"][..., 3:], start[..., 3:])


@pytest.mark.parametrize(
    ("mask", "words"),
    [(torch.full((1, 4, 6), torch.nan), "mask holds NaN"), (torch.ones(6), "noise mask is"),
     (1.0, "noise mask is")],
)  # fmt: skip
def test_a_mask_that_is_none_is_named(mask, words):
    samples = torch.zeros(1, 16, 3, 4, 6)
    with pytest.raises(ShapeError, match=words):
        convert.noise_mask({"noise_mask": mask}, samples)


def test_a_batch_index_that_is_none_is_named():
    for indices in ([0], [0, 1.5], [True, False]):
        with pytest.raises(ShapeError, match="batch_index"):
            convert.noise_indices({"batch_index": indices}, 2)


def test_a_picture_of_another_size_than_the_clip_is_fitted_and_reported(caplog):
    states, extras = text("a")[0]
    given = torch.randn(1, 16, 4, 8, 8)
    positive = [[states, {**extras, "concat_latent_image": given}]]
    image = convert.image_from_conditioning(positive, {"samples": torch.zeros(1, 16, 3, 4, 6)})
    assert image.image_latents.shape == (1, 16, 3, 4, 6)
    assert (image.width, image.height, image.num_frames) == (48, 32, 9)
    assert "8x8 and the clip's 6x4" in caplog.text
    assert "4 latent frames and the clip 3" in caplog.text


def test_flux_guidance_wins_over_the_widget():
    states, extras = text("a")[0]
    assert convert.embedded_guidance([[states, {**extras, "guidance": 3.5}]], 1.0) == 3.5
    assert convert.embedded_guidance(text("a"), 1.0) == 1.0


def test_conditioning_made_here_is_laid_out_as_cores(comfy):
    encoder = node("SkyReelsTextEncoderLoader", text_encoder=BUILTIN_NAME)
    made = node("SkyReelsTextEncode", text_encoder=encoder, prompt="", add_fps_prefix=False)
    states, extras = made[0]
    assert states.ndim == 3
    assert states.shape[0] == 1
    assert list(extras) == ["pooled_output"]
    assert extras["pooled_output"].shape == (1, 64)


def test_the_length_of_a_core_conditioned_clip_must_be_known():
    states, extras = text("a")[0]
    positive = [[states, {**extras, "concat_latent_image": torch.zeros(1, 16, 1, 4, 6)}]]
    with pytest.raises(ShapeError, match="length of the video is unknown"):
        convert.image_from_conditioning(positive, None)


# --- every widget reaches the engine ------------------------------------------------------------


def library_samples(inputs, *, denoise=1.0, **settings) -> torch.Tensor:
    """What `sample` makes of a sampler node's inputs, with some of its settings set by hand."""
    return sample(
        inputs["model"].module, inputs["image"],
        convert.to_prompt_embeds(inputs["positive"], "x"),
        convert.to_prompt_embeds(inputs["negative"], "x"),
        SamplingSettings(**{"seed": 5, "sigmas": get_sigmas(2, 7.0, denoise), **settings}),
        runtime=TorchRuntime(),
    )  # fmt: skip


START = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize(
    ("widgets", "keywords"),
    [
        ({"seed": 6}, {"seed": 6}),
        ({"cfg": 2.0}, {"guidance": Guidance(2.0)}),
        ({"embedded_guidance": 4.0}, {"guidance": Guidance(guidance_scale=4.0)}),
        ({"shift": 3.0}, {"sigmas": get_sigmas(2, 3.0)}),
        ({"cfg_start": 0.5}, {"guidance": Guidance(cfg_start=0.5)}),
        ({"cfg_end": 0.5}, {"guidance": Guidance(cfg_end=0.5)}),
        ({"guidance_rescale": 0.7}, {"guidance": Guidance(guidance_rescale=0.7)}),
        ({"cfg_zero_star": True}, {"guidance": Guidance(cfg_zero_star=True)}),
        ({"zero_init_steps": 1}, {"guidance": Guidance(zero_init_steps=1)}),
        (
            {"denoise": 0.5, "latent": {"samples": START}},
            {"denoise": 0.5, "init_latents": START},
        ),
        (
            {"sigmas": get_sigmas(4)[2:], "latent": {"samples": START}, "add_noise": False},
            {"sigmas": get_sigmas(4)[2:], "init_latents": START, "add_noise": False},
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_a_sampler_widget_does_what_the_library_does(comfy, picture, widgets, keywords):
    _, inputs = prepare(picture)
    plain = node("SkyReelsSampler", **inputs)["samples"]
    changed = node("SkyReelsSampler", **{**inputs, **widgets})["samples"]
    assert not torch.equal(changed, plain)
    assert torch.equal(changed, library_samples(inputs, **keywords))


@pytest.mark.parametrize("name", [name for name in CACHES if name != "off"])
def test_a_cache_does_what_the_librarys_does_and_says_so(comfy, calm, picture, name, caplog):
    caplog.set_level("INFO")
    _, inputs = prepare(picture, calm)
    inputs |= {"steps": 16, "cfg": 1.5}
    plain = node("SkyReelsSampler", **inputs)["samples"]
    assert "skipped" not in caplog.text
    cached = node("SkyReelsSampler", **inputs, cache=name)["samples"]
    assert f"Cache {CACHES[name].kind} skipped" in caplog.text
    expected = {"guidance": Guidance(1.5), "sigmas": get_sigmas(16)}
    assert torch.equal(cached, library_samples(inputs, **expected, cache=CACHES[name]))
    assert not torch.equal(cached, plain)


def test_a_calibrated_cache_takes_what_is_stored_for_the_weights(comfy, calm, picture, caplog):
    caplog.set_level("INFO")
    _, inputs = prepare(picture, calm)
    inputs |= {"steps": 16, "cfg": 1.5, "cache": "calibrated"}
    with pytest.raises(OptionError, match="No cache threshold is stored for calm.safetensors"):
        node("SkyReelsSampler", **inputs)
    info = checkpoint_of(calm.module)
    place = place_of_user(fingerprint_weights(info))
    score = Score(8, 16.0, 50.0, 40.0)
    save_calibration(
        place,
        Calibration(
            "calm.safetensors", fingerprint_weights(info), 0.04, 32, {"steps": 16}, score, None,
            {}, {},
        ),
    )  # fmt: skip
    cached = node("SkyReelsSampler", **inputs)["samples"]
    assert "Cache calibrated for calm.safetensors: threshold 0.04, 16 of 32" in caplog.text
    expected = {"guidance": Guidance(1.5), "sigmas": get_sigmas(16)}
    inputs["cache"] = "off"
    cache = CacheConfig("easy", 0.04)
    assert torch.equal(cached, library_samples(inputs, **expected, cache=cache))


def test_fast_attention_stays_exact_without_a_gpu_and_says_so(comfy, picture, caplog, monkeypatch):
    from comfyui_skyreels.skyreels.transformer import attention

    monkeypatch.setattr(attention.dispatch, "_logged", set())
    _, inputs = prepare(picture)
    plain = node("SkyReelsSampler", **inputs)["samples"]
    assert "fast attention" not in caplog.text
    fast = node("SkyReelsSampler", **inputs, attention="fast")["samples"]
    assert "fast attention unavailable (needs an NVIDIA GPU" in caplog.text
    assert torch.equal(fast, plain)


def test_riflex_reaches_a_long_clip(comfy, picture):
    _, inputs = prepare(picture)
    image = inputs["image"]
    long = type(image)(image.image_latents[..., :2, :2], 16, 16, 241)
    inputs |= {"image": long, "cfg": 1.0, "steps": 1}
    off, on = (node("SkyReelsSampler", **inputs, riflex_k=k)["samples"] for k in (0, 1))
    assert not torch.equal(off, on)


def test_a_split_schedule_gives_what_the_whole_gives(comfy, picture):
    _, inputs = prepare(picture)
    sigmas = node("SkyReelsScheduler", steps=6, shift=7.0, denoise=1.0)
    whole = node("SkyReelsSampler", **inputs, sigmas=sigmas)["samples"]
    first = node("SkyReelsSampler", **inputs, sigmas=sigmas[:4])
    second = node("SkyReelsSampler", **inputs, sigmas=sigmas[3:], latent=first, add_noise=False)
    assert tiny.relative_error(second["samples"], whole) <= 1e-5
    with pytest.raises(OptionError, match="clip to continue"):
        node("SkyReelsSampler", **inputs, sigmas=sigmas[3:], add_noise=False)


@pytest.mark.parametrize(
    "widgets",
    [
        {"latent_strength": 0.8},
        {"noise_augmentation": 0.1},
        {"noise_augmentation": 0.1, "augmentation_seed": 4},
        {"prefix_frames": 5},
        {"fit": "pad"},
        {"num_frames": 13},
    ],
    ids=str,
)
def test_a_conditioning_widget_does_what_the_library_does(comfy, weights, widgets):
    clip = torch.rand(5, 40, 50, 3, generator=torch.Generator().manual_seed(3))
    vae = load_vae_node()
    base = {**SIZE, "fit": "crop"}
    made = node("SkyReelsImageConditioning", vae=vae, image=clip, **{**base, **widgets})
    settings = {"fit": "crop", **widgets}
    seed, num_frames = settings.pop("augmentation_seed", 0), settings.pop("num_frames", 9)
    expected = encode_image(
        vae.module, clip, ImageSettings(**settings), **{**SIZE, "num_frames": num_frames},
        seed=seed, runtime=TorchRuntime(),
    )  # fmt: skip
    assert torch.equal(made.image_latents, expected.image_latents)
    assert made.num_frames == expected.num_frames
    if widgets != {"num_frames": 13}:
        plain = node("SkyReelsImageConditioning", vae=vae, image=clip, **base)
        assert not torch.equal(made.image_latents, plain.image_latents)


@pytest.mark.parametrize(
    ("widgets", "tiling"),
    [
        ({"mode": "tiled", "tile_size": 16}, Tiling(16, 16, 0, 8, 8, 0)),
        ({"mode": "auto", "tile_size": 16, "tile_stride": 16}, Tiling(16, 16, 0, 16, 16, 0)),
        ({"mode": "tiled", "tile_size": 32}, Tiling(32, 32, 0, 24, 24, 0)),
        ({"mode": "tiled", "tile_frames": 8}, Tiling(256, 256, 8, 192, 192, 4)),
        (
            {"mode": "tiled-diffusers", "tile_frames": 4, "tile_frames_stride": 4},
            Tiling(256, 256, 4, 192, 192, 4),
        ),
        ({"mode": "tiled", "tile_stride": 64}, Tiling(256, 256, 0, 64, 64, 0)),
    ],
    ids=str,
)
def test_a_tile_widget_does_what_the_library_does(comfy, widgets, tiling):
    vae = load_vae_node()
    latents = START if tiling.tile_sample_min_num_frames else START[:, :, :2]
    if tiling.tile_sample_min_width == 16:  # two or three in each direction
        latents = latents[..., :3, :4]
    frames = node("SkyReelsVAEDecode", vae=vae, samples={"samples": latents}, **widgets)
    expected = decode_frames(vae.module, latents, tiling=tiling, runtime=TorchRuntime())
    assert torch.equal(frames, expected)


def test_the_frame_rate_switch_reaches_the_encoder(comfy):
    encoder = node("SkyReelsTextEncoderLoader", text_encoder=BUILTIN_NAME)
    on, off, spelled = (
        node("SkyReelsTextEncode", text_encoder=encoder, prompt=prompt, add_fps_prefix=prefix)
        for prompt, prefix in (("a", True), ("a", False), ("FPS-24, a", False))
    )
    assert torch.equal(on[0][0], spelled[0][0])
    assert on[0][0].shape != off[0][0].shape


@pytest.mark.parametrize("name", ["tiny.safetensors", BUILTIN_NAME])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8", "int8"])
def test_a_precision_reaches_the_transformer(comfy, name, precision):
    model = node("SkyReelsTransformerLoader", transformer=name, precision=precision).module
    weight = model.double_blocks[0].img_attn_qkv.weight
    stored = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn,
              "int8": torch.int8}[precision]  # fmt: skip
    assert weight.dtype == stored


@pytest.mark.parametrize("name", ["vae.safetensors", BUILTIN_NAME])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_precision_reaches_the_vae(comfy, name, precision):
    vae = node("SkyReelsVAELoader", vae=name, precision=precision).module
    stored = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert {p.dtype for p in vae.parameters()} == {stored}


def test_every_model_is_brought_in_by_the_memory_manager_before_it_works(comfy, picture):
    vae, inputs = prepare(picture)
    assert comfy.loaded == [vae.patcher]
    samples = node("SkyReelsSampler", **inputs)
    node("SkyReelsVAEDecode", vae=vae, samples=samples, mode="tiled")
    assert comfy.loaded == [vae.patcher, inputs["model"].patcher, vae.patcher]
    assert all(load["force_full_load"] for load in comfy.loads)
    needed = [load["memory_required"] for load in comfy.loads]
    latents = samples["samples"].shape
    picture_shape = torch.Size((1, 3, 1, *(8 * side for side in latents[3:])))
    assert needed[0] == encode_bytes(tiny.SMALL_VAE, picture_shape, torch.float32)
    tokens = 3 * 2 * 3 + 4  # latent frames, rows, columns; "a dog runs" and the end of its turn
    assert needed[1] == sampling_bytes(tiny.TRANSFORMER, tokens, torch.float32)
    assert needed[2] == decode_bytes(tiny.SMALL_VAE, latents, torch.float32)


# --- odd things on a socket ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (torch.zeros(1, 4, 1, 8, 8), "use the HunyuanVideo VAE"),
        (torch.zeros(1, 16, 0, 4, 6), "one picture"),
        (torch.zeros(1, 16, 4, 6), "use the HunyuanVideo VAE"),
    ],
)
def test_a_picture_of_another_vae_is_named(given, words):
    states, extras = text("a")[0]
    positive = [[states, {**extras, "concat_latent_image": given}]]
    for latent in (None, {"samples": torch.zeros(1, 16, 3, 4, 6)}):
        with pytest.raises(ShapeError, match=words):
            convert.image_from_conditioning(positive, latent)


def test_a_mask_shorter_than_its_text_and_a_latent_without_samples_are_named():
    states, extras = text("a b c")[0]
    with pytest.raises(TextError, match="4 tokens and a mask of 2"):
        convert.to_prompt_embeds([[states, {**extras, "attention_mask": torch.ones(1, 2)}]], "x")
    for latent in ({}, {"samples": None}):
        with pytest.raises(ShapeError, match="holds no samples"):
            convert.latent_samples(latent)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (torch.rand(1, 3, 40, 50), "3 or 4 channels"),
        (torch.rand(0, 40, 50, 3), "3 or 4 channels"),
        (torch.full((1, 40, 50, 3), torch.nan), "NaN"),
    ],
)
def test_an_image_that_is_none_is_named(comfy, image, words):
    with pytest.raises(ShapeError, match=words):
        node("SkyReelsImageConditioning", vae=load_vae_node(), image=image, fit="crop", **SIZE)


@pytest.mark.parametrize("name", ["width", "height", "num_frames"])
def test_a_size_that_is_no_whole_number_is_named(comfy, picture, name):
    with pytest.raises(ShapeError, match="17.0 is not a whole number"):
        node("SkyReelsImageConditioning", vae=load_vae_node(), image=picture, fit="crop",
             **{**SIZE, name: 17.0})  # fmt: skip


def test_a_start_latent_with_nan_is_named(comfy, picture):
    _, inputs = prepare(picture)
    latent = {"samples": torch.full((1, 16, 3, 4, 6), torch.nan)}
    with pytest.raises(ShapeError, match="start latent holds NaN"):
        node("SkyReelsSampler", **inputs, latent=latent)


def test_a_sampler_that_looks_for_more_of_cores_model_is_named(comfy, picture):
    def sample_strange(model, x, sigmas, **_):
        return model.inner_model.conds

    sampler = SimpleNamespace(sampler_function=sample_strange, extra_options={})
    with pytest.raises(OptionError, match="Sampler sample_strange needs parts"):
        make_latents(picture, sampler=sampler)


def test_a_core_sampler_gets_seed_shift_options_and_its_own_sigmas(comfy, picture):
    seen = {}

    def sample_spy(model, x, sigmas, extra_args=None, callback=None, disable=None, eta=0):
        seen.update(seed=extra_args["seed"], eta=eta, shift=model.inner_model.model_sampling.shift)
        sigmas[0] = 0.123  # as some do
        return x

    sigmas = torch.tensor([1.0, 0.5, 0.0])
    sampler = SimpleNamespace(sampler_function=sample_spy, extra_options={"eta": 0.5})
    make_latents(picture, sampler=sampler, sigmas=sigmas, shift=5.0, seed=77)
    assert seen == {"seed": 77, "eta": 0.5, "shift": 5.0}
    assert sigmas[0] == 1.0


def test_a_cfg_plus_plus_sampler_gets_the_negative_prediction(comfy, picture, caplog):
    seen = []

    def sample_spy(model, x, sigmas, extra_args=None, **_):
        options = {
            "sampler_post_cfg_function": [lambda args: seen.append(args) or args["denoised"]]
        }
        model(x, sigmas[:1], **{**extra_args, "model_options": options})
        return x

    sampler = SimpleNamespace(sampler_function=sample_spy, extra_options={})
    make_latents(picture, sampler=sampler)
    assert not torch.equal(seen[0]["denoised"], seen[0]["uncond_denoised"])
    assert caplog.text == ""
    make_latents(picture, sampler=sampler, cfg=1.0)
    assert torch.equal(seen[1]["denoised"], seen[1]["uncond_denoised"])
    assert "CFG++" in caplog.text


def test_an_adaptive_samplers_steps_are_reported_as_they_come(comfy, picture):
    def sample_many(model, x, sigmas, callback=None, **_):
        for i in range(4):
            callback({"i": i, "x": x, "denoised": x})
        return x

    sampler = SimpleNamespace(sampler_function=sample_many, extra_options={})
    make_latents(picture, sampler=sampler, unique_id="1")
    lines = [line for line in comfy.texts if line.startswith("step")]
    assert lines[-2:] == ["step 4", "step 2/2"]


# --- nothing is silent --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"denoise": 0.5}, "denoise is 0.5"),
        ({"sigmas": get_sigmas(2, denoise=0.5)}, "`sigmas` begin at 0.875"),
    ],
    ids=str,
)
def test_the_end_of_a_schedule_needs_a_clip_to_start_from(comfy, picture, caplog, change, words):
    _, inputs = prepare(picture)
    comfy.loads.clear()
    with pytest.raises(OptionError, match=f"{words}, .*connect one to `latent`, or set denoise"):
        node("SkyReelsSampler", **inputs, **change)
    assert not comfy.loads  # before the model moves
    empty = {"samples": torch.zeros(1, 16, 3, 4, 6)}
    node("SkyReelsSampler", **inputs, **change, latent=empty)
    assert f"{words}, and `latent` is empty" in caplog.text


def test_a_denoise_that_connected_sigmas_replace_is_named(comfy, picture, caplog):
    _, inputs = prepare(picture)
    node("SkyReelsSampler", **inputs, sigmas=get_sigmas(2), denoise=0.5)
    assert "denoise 0.5 is not used: `sigmas` is connected" in caplog.text


def test_a_bad_render_is_said_on_the_node_stops_it_or_takes_another_seed(
    comfy, picture, monkeypatch
):
    looks, bad = [], bad_render.Look(0.1, 0.0, 0.0, 1)
    good = bad_render.Look(2.0, 0.0, 0.0, 1)
    monkeypatch.setattr(bad_render, "look_at", lambda *_: looks.pop(0) if looks else good)
    _, inputs = prepare(picture)
    inputs["steps"] = 4
    expected = node("SkyReelsSampler", **inputs)
    looks.append(bad)
    warned = node("SkyReelsSampler", **inputs, bad_render="warn", unique_id="1")
    assert torch.equal(warned["samples"], expected["samples"])
    assert "seeds" not in warned
    assert comfy.texts[-1].startswith("step 4/4")
    assert "stands still" in comfy.texts[-1]
    looks.append(bad)
    with pytest.raises(BadRenderError, match="seed 5: at step 3 of 4"):
        node("SkyReelsSampler", **inputs, bad_render="stop")
    looks.append(bad)
    retried = node("SkyReelsSampler", **inputs, bad_render="retry")
    assert retried["seeds"] == [6]
    alone = node("SkyReelsSampler", **{**inputs, "seed": 6})
    assert torch.equal(retried["samples"], alone["samples"])


def test_a_retry_with_a_core_sampler_is_the_run_of_that_seed(comfy, picture, monkeypatch):
    seeds = []
    looks = [bad_render.Look(0.1, 0.0, 0.0, 1)]
    good = bad_render.Look(2.0, 0.0, 0.0, 1)
    monkeypatch.setattr(bad_render, "look_at", lambda *_: looks.pop() if looks else good)

    def solver(sampler, shift, seed):
        seeds.append(seed)
        return euler

    monkeypatch.setattr(adapter, "core_solver", solver)
    _, inputs = prepare(picture)
    inputs["steps"] = 4
    node("SkyReelsSampler", **inputs, sampler=object(), bad_render="retry")
    assert seeds[-2:] == [5, 6]


def test_words_and_sizes_that_the_built_in_model_does_not_know_are_said_on_the_node(
    comfy, picture, caplog
):
    encoder = node("SkyReelsTextEncoderLoader", text_encoder=BUILTIN_NAME)
    texts = {
        side: node("SkyReelsTextEncode", text_encoder=encoder, prompt=prompt, add_fps_prefix=False,
                   unique_id="7")
        for side, prompt in (("positive", "a dog moves left"), ("negative", ""))
    }  # fmt: skip
    assert "does not know dog:" in comfy.texts[-1] + comfy.texts[0]
    model = node("SkyReelsTransformerLoader", transformer=BUILTIN_NAME, precision="auto")
    vae = node("SkyReelsVAELoader", vae=BUILTIN_NAME, precision="auto")
    image = node("SkyReelsImageConditioning", vae=vae, image=picture, fit="crop", **SIZE)
    node("SkyReelsSampler", model=model, image=image, seed=1, steps=1, cfg=6.0, shift=7.0,
         embedded_guidance=1.0, unique_id="8", **texts)  # fmt: skip
    assert "48x32 and 9 frames are not for the built-in model" in comfy.texts[-1]
    assert "48x32 and 9 frames" in caplog.text


def test_a_second_device_makes_the_negative_predictions_of_the_same_clip(
    comfy, picture, monkeypatch
):
    threads = []
    true = Network.predict

    def predict(self, latents, sigma, step, branches, run_block=None):
        threads.append((threading.current_thread() is threading.main_thread(), tuple(branches)))
        return true(self, latents, sigma, step, branches, run_block)

    monkeypatch.setattr(Network, "predict", predict)
    _, inputs = prepare(picture)
    expected = node("SkyReelsSampler", **inputs)
    assert {main for main, _ in threads} == {True}
    threads.clear()
    asked = []

    def second(name, first):
        asked.append(name)
        return adapter.ComfyRuntime()

    monkeypatch.setattr(adapter, "second_runtime", second)
    got = node("SkyReelsSampler", **inputs, second_device="auto")
    assert asked == ["auto"]
    assert set(threads) == {(True, (0,)), (False, (1,))}
    assert torch.equal(got["samples"], expected["samples"])
