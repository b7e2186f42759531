"""The nodes at work, under stand-ins of ComfyUI: same numbers as the library, errors, cancel."""

import logging
import shutil
from pathlib import Path
from typing import Any

import comfyui_skyreels
import pytest
import torch
from comfyui_skyreels.nodes import convert
from comfyui_skyreels.skyreels.builtin import BUILTIN_NAME
from comfyui_skyreels.skyreels.conditioning import to_vae_space
from comfyui_skyreels.skyreels.errors import CheckpointError, OptionError, ShapeError, TextError
from comfyui_skyreels.skyreels.loading import load_transformer, load_vae
from comfyui_skyreels.skyreels.pipeline import image_to_video
from comfyui_skyreels.skyreels.runtime import TorchRuntime
from comfyui_skyreels.skyreels.vae.model import VideoVAE
from support import host, tiny

NODES = comfyui_skyreels.NODE_CLASS_MAPPINGS
TEXT = (tiny.TRANSFORMER.text_embed_dim, tiny.TRANSFORMER.pooled_projection_dim)
SIZE = {"width": 48, "height": 32, "num_frames": 9}


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    tiny.save(folder / "tiny.safetensors", tiny.transformer().state_dict())
    tiny.save(folder / "vae.safetensors", tiny.randomize(VideoVAE(tiny.VAE)).state_dict())
    return folder


@pytest.fixture
def comfy(comfy, weights):
    shutil.copy(weights / "tiny.safetensors", comfy.folder("diffusion_models"))
    shutil.copy(weights / "vae.safetensors", comfy.folder("vae"))
    return comfy


@pytest.fixture
def picture() -> torch.Tensor:
    return torch.rand(1, 40, 50, 3, generator=torch.Generator().manual_seed(3))


def text(words: str) -> convert.Conditioning:
    return host.made_up_conditioning(words, *TEXT)


def node(name: str, **inputs):
    cls = NODES[name]
    with torch.inference_mode():
        return getattr(cls(), cls.FUNCTION)(**inputs)[0]


def load_model():
    return node("SkyReelsTransformerLoader", transformer="tiny.safetensors", precision="auto")


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


def library_clip(weights, picture) -> torch.Tensor:
    runtime = TorchRuntime()
    prompt, negative = (convert.to_prompt_embeds(text(t), "x") for t in ("a dog runs", ""))
    return image_to_video(
        load_transformer(weights / "tiny.safetensors", runtime=runtime),
        load_vae(weights / "vae.safetensors", runtime=runtime),
        picture, prompt, negative, seed=5, num_inference_steps=2, runtime=runtime, **SIZE,
    )  # fmt: skip


# --- the same numbers ---------------------------------------------------------------------------


def test_the_graph_gives_the_bits_of_the_library(comfy, weights, picture):
    frames = make_clip(picture)
    assert (frames.shape, frames.dtype) == ((9, 32, 48, 3), torch.float32)
    assert torch.equal(frames, library_clip(weights, picture))


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
    ours, theirs = make_clip(picture), make_clip(picture, sampler=sampler)
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_a_sampler_of_another_kind_is_refused(comfy, picture):
    with pytest.raises(OptionError, match="KSamplerSelect"):
        make_clip(picture, sampler=object())


def test_sigmas_replace_steps_and_shift(comfy, picture):
    own = torch.tensor([1.0, 0.6, 0.0])
    clips = [make_clip(picture, sigmas=own, steps=steps, shift=3.0) for steps in (7, 9)]
    assert torch.equal(*clips)


def test_the_latents_other_keys_are_passed_on_and_it_stays_as_it_was(comfy, picture, caplog):
    _, inputs = prepare(picture)
    latent = {"samples": torch.zeros(1, 16, 3, 4, 6), "noise_mask": torch.ones(1, 4, 6), "mine": 1}
    before = dict(latent)
    with caplog.at_level(logging.WARNING):
        samples = node("SkyReelsSampler", **inputs, latent=latent)
    assert samples["mine"] == 1
    assert latent["samples"] is before["samples"]
    assert latent.keys() == before.keys()
    assert "noise mask is not used" in caplog.text


# --- progress and cancel ------------------------------------------------------------------------


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


@pytest.mark.parametrize("stage", ["load", "load vae", "encode", "sample", "decode"])
def test_cancel_in_any_stage_passes_through_and_the_next_run_is_good(
    comfy, weights, picture, stage
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
    assert torch.equal(make_clip(picture, sampling["model"]), library_clip(weights, picture))


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


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"width": 100}, "Width 100 is not a multiple of 16: use 96"),
        ({"height": 0}, "Height 0 is not a multiple of 16: use 16"),
        ({"num_frames": 98}, "98 frames is not a multiple of 4 plus 1: use 97"),
        ({"num_frames": 0}, "use 1"),
        ({"width": 8192}, "is more than 4096"),
        ({"num_frames": 2001}, "is more than 1025"),
    ],
)
def test_sizes_that_cannot_be_are_refused_before_anything_runs(comfy, inputs, words):
    validate = NODES["SkyReelsImageConditioning"].VALIDATE_INPUTS
    good = {"width": 960, "height": 544, "num_frames": 97}
    assert validate(**good) is True
    assert validate() is True  # all linked
    assert words in validate(**{**good, **inputs})


def test_a_file_that_is_not_here_is_answered_with_where_to_get_it(comfy):
    validate = NODES["SkyReelsTransformerLoader"].VALIDATE_INPUTS
    assert validate("tiny.safetensors") is True
    assert validate(BUILTIN_NAME) is True
    assert validate() is True
    answer = validate("skyreels_hunyuan_i2v_bf16.safetensors")
    assert "models/diffusion_models" in answer
    assert "https://huggingface.co/Kijai" in answer
    assert validate("sub\\tiny.safetensors").endswith("but tiny.safetensors is: choose that one.")
    assert "models/vae" in NODES["SkyReelsVAELoader"].VALIDATE_INPUTS("gone.safetensors")
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


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"negative": None}, OptionError, "needs a negative prompt"),
        ({"positive": []}, TextError, "positive conditioning is empty"),
        ({"positive": [[torch.zeros(1, 3, 24), {}]]}, TextError, "no pooled CLIP state"),
        (
            {"positive": [[torch.zeros(1, 3, 99), {"pooled_output": torch.zeros(1, 12)}]]},
            TextError,
            "width 99",
        ),
        (
            {"positive": [[torch.zeros(2, 3, 24), {"pooled_output": torch.zeros(2, 12)}]]},
            TextError,
            "2 prompts at once",
        ),
        ({"image": None}, ShapeError, "There is no picture"),
        ({"latent": {"samples": torch.zeros(1, 4, 8, 8)}}, ShapeError, "EmptyHunyuanLatentVideo"),
        ({"latent": {"samples": torch.zeros(2, 16, 3, 4, 6)}}, ShapeError, "batch_size to 1"),
        ({"latent": {"samples": torch.zeros(1, 16, 5, 4, 6)}}, ShapeError, "start latent"),
        ({"sigmas": torch.tensor([14.6, 1.0, 0.0])}, OptionError, "flow schedule"),
        ({"sigmas": torch.tensor([0.0, 1.0])}, OptionError, "falling row"),
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
    with pytest.raises(OptionError, match="no meaning in mode full"):
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


def test_a_second_entry_is_reported_and_the_first_is_used(caplog):
    with caplog.at_level(logging.WARNING):
        embeds = convert.to_prompt_embeds([*text("a"), *text("b c")], "positive")
    assert torch.equal(embeds.prompt_embeds, text("a")[0][0])
    assert "2 entries" in caplog.text


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
    assert extras["pooled_output"].shape == (1, 32)


def test_the_length_of_a_core_conditioned_clip_must_be_known():
    states, extras = text("a")[0]
    positive = [[states, {**extras, "concat_latent_image": torch.zeros(1, 16, 1, 4, 6)}]]
    with pytest.raises(ShapeError, match="length of the video is unknown"):
        convert.image_from_conditioning(positive, None)
    other = {"samples": torch.zeros(1, 16, 3, 8, 6)}
    with pytest.raises(ShapeError, match="same video size"):
        convert.image_from_conditioning(positive, other)
