"""The command line: results, exit codes, one JSON object, and sentences instead of tracebacks."""

import contextlib
import errno
import functools
import gc
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from comfyui_skyreels.skyreels import cli, media, pipeline
from comfyui_skyreels.skyreels.builtin import (
    BUILTIN_FOLDER,
    BUILTIN_NOTICE,
    builtin_text_encoder,
    builtin_transformer,
    builtin_vae,
)
from comfyui_skyreels.skyreels.conditioning.embeds import PromptEmbeds
from comfyui_skyreels.skyreels.config import ContextWindows, TransformerConfig
from comfyui_skyreels.skyreels.errors import OptionError
from comfyui_skyreels.skyreels.image import example_image
from comfyui_skyreels.skyreels.pipeline import image_to_video
from comfyui_skyreels.skyreels.runtime import TorchRuntime, outcomes
from comfyui_skyreels.skyreels.sampling import bad_render
from comfyui_skyreels.skyreels.sampling.settings import SamplingSettings, get_sigmas
from comfyui_skyreels.skyreels.text.encode import DEFAULT_NEGATIVE_PROMPT, encode_prompt
from comfyui_skyreels.skyreels.transformer.model import SkyReelsTransformer
from comfyui_skyreels.skyreels.vae.model import VideoVAE
from PIL import Image
from support import lora, tiny
from support.forked import WITHOUT_TEXT_ENCODER, forks

pytestmark = pytest.mark.usefixtures("fast_convolutions", "kept_models")
ROOT = Path(__file__).resolve().parents[2]
RUNTIME = TorchRuntime()
FAST = ["--prompt", "a red circle moves left", "--steps", "2"]
#: behind FAST, where what is sampled does not matter
ONCE = ["--steps", "1", "--cfg", "1"]


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = cli.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def picture(tmp_path) -> Path:
    path = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), np.uint8)).save(path)
    return path


@pytest.mark.parametrize(
    ("options", "windows"),
    [
        ([], None),
        (["--window", "97"], ContextWindows(25, 6)),
        (["--window", "9:4", "--end-image", "PICTURE"], ContextWindows(3, 1)),
    ],
)
def test_windows_and_an_end_picture_reach_the_run(
    capsys, tmp_path, picture, monkeypatch, options, windows
):
    given = []

    def stop(model, vae, image, prompt, negative, settings, *, end_image, **sizes):
        given.extend((settings.windows, end_image))
        raise OptionError("far enough")

    monkeypatch.setattr(pipeline, "image_to_latents", stop)
    options = [picture if option == "PICTURE" else option for option in options]
    code, _, err = run(capsys, "generate", *FAST, "--out", tmp_path / "x.npy", *options)
    assert (code, "far enough" in err) == (1, True)
    assert given[0] == windows
    if picture in options:
        assert torch.equal(given[1], media.read_image(picture))
    else:
        assert given[1] is None


def test_illegal_windows_are_refused_before_any_work(capsys, tmp_path):
    options = ["--out", tmp_path / "x.npy", "--window"]
    code, _, err = run(capsys, "generate", *FAST, *options, "16")
    assert code == 1
    assert "A window of 16 frames is not a multiple of 4 plus 1, from 5: use 17." in err
    with pytest.raises(SystemExit):
        run(capsys, "generate", *FAST, *options, "17:x")
    assert "invalid" in capsys.readouterr().err


def test_an_end_picture_and_a_clip_to_extend_exclude_each_other(capsys, tmp_path, picture):
    options = ["--extend", picture, "--end-image", picture, "--out", tmp_path / "x.npy"]
    code, _, err = run(capsys, "generate", *FAST, *options)
    assert code == 1
    assert "--extend does not go together with --end-image" in err


def test_generate_writes_a_playable_video_and_says_what_it_is(capsys, tmp_path, picture):
    import av

    out_file = tmp_path / "clip.mp4"
    code, out, err = run(capsys, "generate", picture, *FAST, "--out", out_file, "--json")
    assert code == 0
    report = json.loads(out)
    assert out.count("\n") == 1
    assert (report["file"], report["model"], report["frames"]) == (str(out_file), "built-in", 17)
    assert "not SkyReels-V1" in err
    with av.open(str(out_file)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert stream.average_rate == 24
        assert sum(1 for _ in container.decode(stream)) == 17


def test_generate_without_a_picture_draws_one(capsys, tmp_path):
    out_file = tmp_path / "clip.npy"
    size = ["--width", "32", "--height", "48", "--frames", "5"]
    code, out, _ = run(capsys, "generate", *FAST, *size, "--out", out_file)
    assert (code, out) == (0, "")
    frames = np.load(out_file)
    assert (frames.shape, frames.dtype) == ((5, 48, 32, 3), np.float32)
    assert 0 <= frames.min() < frames.max() <= 1


def test_same_seed_gives_the_same_file_and_another_seed_another(capsys, tmp_path):
    size = ["--width", "32", "--height", "32", "--frames", "5"]
    clips = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        path = tmp_path / f"{name}.npy"
        assert run(capsys, "generate", *FAST, *size, "--seed", seed, "--out", path)[0] == 0
        clips.append(path.read_bytes())
    assert clips[0] == clips[1] != clips[2]


@pytest.mark.parametrize(
    ("precision", "decode"),
    [("fp32", "full"), ("bf16", "full"), ("fp8", "full"), ("int8", "tiled-diffusers")],
)
def test_every_precision_and_decode_mode_makes_a_clip(capsys, tmp_path, precision, decode):
    out_file = tmp_path / "clip.npy"
    size = ["--width", "32", "--height", "32", "--frames", "5"]
    modes = ["--precision", precision, "--decode", decode]
    assert run(capsys, "generate", *FAST, *size, *modes, "--out", out_file)[0] == 0
    assert np.isfinite(np.load(out_file)).all()


def test_a_cache_makes_another_clip_and_an_unknown_one_is_wrong_usage(capsys, tmp_path, caplog):
    clips = []
    for name in ("off", "fast"):
        path = tmp_path / f"{name}.npy"
        size = ["--width", "32", "--height", "32", "--frames", "5", "--cache", name]
        assert run(capsys, "generate", *FAST, *size, "--steps", "16", "--out", path)[0] == 0
        clips.append(np.load(path))
        assert ("Cache easy skipped" in caplog.text) is (name == "fast")
    assert 0 < np.abs(clips[0] - clips[1]).max() < 0.5
    with pytest.raises(SystemExit):
        cli.main(["generate", "--prompt", "x", "--out", "x.npy", "--cache", "most"])
    assert "first-block" in capsys.readouterr().err


def test_extend_makes_a_longer_file_that_begins_with_the_clip(capsys, tmp_path):
    size = ["--width", "32", "--height", "48", "--frames", "5"]
    first, whole = tmp_path / "first.npy", tmp_path / "whole.npy"
    assert run(capsys, "generate", *FAST, *size, "--out", first)[0] == 0
    extend = ["--extend", first, "--frames", "9", "--overlap", "5", "--json"]
    code, out, err = run(capsys, "generate", *FAST, *extend, "--out", whole)
    assert code == 0
    assert json.loads(out)["frames"] == 9
    assert json.loads(out)["width"] == 32
    assert "9 frames of 32x48" in err
    assert np.load(whole).shape == (9, 48, 32, 3)
    video, plain = tmp_path / "video.mp4", tmp_path / "plain.npy"
    assert (
        run(capsys, "generate", *FAST, "--extend", first, "--frames", "5", "--out", video)[0] == 0
    )
    extend = ["--extend", video, "--frames", "5", "--no-color-match"]
    assert run(capsys, "generate", *FAST, *extend, "--out", plain)[0] == 0
    assert np.load(plain).shape == (13, 48, 32, 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "clip of 3 frames is too short"),
        (["--overlap", "4"], "overlap of 4 frames is not a multiple of 4 plus 1: use 5"),
        (["--overlap", "17"], "leaves nothing new in 17"),
        (["--overlap", "5"], "clip of 3 frames is too short"),
        (["--width", "64"], "keeps the clip's size"),
        (["picture.png"], "takes no picture"),
        (["--extend", "gone.mp4"], "There is no video file gone.mp4"),
        (["--extend", __file__], "cannot be read as a video"),
    ],
)
def test_a_clip_that_cannot_be_continued_is_one_sentence(capsys, tmp_path, options, words):
    clip, out_file = tmp_path / "clip.npy", tmp_path / "out.mp4"
    np.save(clip, np.zeros((3, 32, 32, 3), np.float32))
    code, out, err = run(
        capsys, "generate", *FAST, "--extend", clip, *options, "--out", out_file, "--json"
    )
    assert code == 1
    assert words in json.loads(out)["error"]
    assert BUILTIN_NOTICE not in err  # said before the models are made
    assert not out_file.exists()


def test_riflex_can_be_switched_off_and_changes_only_long_clips(capsys, tmp_path):
    clips = []
    for option in ("auto", "off"):
        path = tmp_path / f"{option}.npy"
        size = ["--width", "32", "--height", "32", "--frames", "5"]
        assert run(capsys, "generate", *FAST, *size, "--riflex", option, "--out", path)[0] == 0
        clips.append(path.read_bytes())
    assert clips[0] == clips[1]


SMALL = ["--width", "32", "--height", "32", "--frames", "5"]


def test_loras_are_read_from_the_command_line_and_change_the_clip(capsys, tmp_path):
    config = builtin_transformer(runtime=RUNTIME).config
    path = lora.write("musubi-tuner", lora.draw_parts(config), tmp_path)
    clips = []
    for index, options in enumerate(([], ["--lora", f"{path}:0.2", "--lora", f"{path}:0"])):
        file = tmp_path / f"{index}.npy"
        code, _, err = run(capsys, "generate", *FAST, *SMALL, *options, "--out", file)
        assert code == 0
        assert err.count("adapter_model.safetensors (musubi-tuner):") == options.count("--lora")
        clips.append(file.read_bytes())
    assert clips[0] != clips[1]


@pytest.mark.parametrize(
    ("text", "file", "strength"),
    [
        ("style.safetensors", "style.safetensors", 1.0),
        ("style.safetensors:0.8", "style.safetensors", 0.8),
        ("a:b.safetensors:-1", "a:b.safetensors", -1.0),
        (r"C:\loras\style.safetensors", r"C:\loras\style.safetensors", 1.0),
        (r"C:\loras\style.safetensors:1e-1", r"C:\loras\style.safetensors", 0.1),
        ("C:style.safetensors", "C:style.safetensors", 1.0),
        (":2", ":2", 1.0),
    ],
)
def test_what_follows_the_last_colon_is_a_strength_if_it_is_a_number(text, file, strength):
    assert cli.options.parse_lora(text) == (Path(file), strength)


def test_a_file_whose_name_ends_like_a_strength_is_a_file(tmp_path):
    (tmp_path / "x:2").touch()
    assert cli.options.parse_lora(str(tmp_path / "x:2")) == (tmp_path / "x:2", 1.0)


@pytest.mark.parametrize(
    ("options", "values"),
    [
        ([], (30, 6.0, 1.0, 7.0)),
        (["--preset", "official"], (30, 6.0, 1.0, 7.0)),
        (["--preset", "few-steps"], (6, 1.0, 6.0, 17.0)),
        (["--preset", "few-steps", "--steps", "8", "--cfg", "0"], (8, 0.0, 6.0, 17.0)),
    ],
)
def test_a_preset_gives_the_settings_that_are_not_given(options, values):
    words = ["generate", "--prompt", "x", "--out", "x.npy", *options]
    arguments = cli.build_parser().parse_args(words)
    cli.options.apply_preset(arguments)
    names = ("steps", "cfg", "embedded_guidance", "shift")
    assert tuple(getattr(arguments, name) for name in names) == values


@pytest.mark.parametrize(("option", "k"), [("auto", 4), ("off", 0)])
def test_the_riflex_option_reaches_the_run(option, k):
    words = ["generate", "--prompt", "x", "--out", "x.npy", "--riflex", option]
    arguments = cli.build_parser().parse_args([*words, "--transformer", "x"])
    assert cli.options.riflex_k(arguments) == k


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--overlap", "5"], "belong to --extend"),
        (["--no-color-match"], "belong to --extend"),
        (["--width", "100"], "Width 100 is not a multiple of 16: use 96"),
        (["--frames", "16"], "use 17"),
        (["--steps", "0"], "0 steps"),
        (["--cfg", "nan"], "CFG nan"),
        (["--seed", "-1"], "Seed -1"),
        (["--latent-strength", "inf"], "strength inf"),
        (["--shift", "-1"], "Shift -1.0"),
        (["--device", "tpu"], "'tpu' is not one of"),
        (["--device", "cuda:99"], "not found"),
        (["--transformer", "x.safetensors"], "belong together"),
        (["--noise-augmentation", "3"], "within 0..1"),
        (["--lora", "gone.safetensors"], "gone.safetensors does not exist"),
        (["--lora", f"{BUILTIN_FOLDER / 'vae'}:nan"], "is not a LoRA"),
    ],
)
def test_bad_options_are_one_sentence_and_exit_code_1(capsys, tmp_path, options, words):
    out_file = tmp_path / "clip.mp4"
    code, out, err = run(capsys, "generate", *FAST, *options, "--out", out_file, "--json")
    assert code == 1
    assert words in json.loads(out)["error"]
    assert words in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_output_of_an_unknown_kind_is_refused_before_any_work(capsys, tmp_path):
    code, _, err = run(capsys, "generate", *FAST, "--out", tmp_path / "clip.gif")
    assert code == 1
    assert BUILTIN_NOTICE not in err  # said before the models are made
    assert ".mp4" in err
    assert ".npy" in err
    (tmp_path / "folder.mp4").mkdir()
    code, _, err = run(capsys, "generate", *FAST, "--out", tmp_path / "folder.mp4")
    assert code == 1
    assert "is a folder" in err
    assert BUILTIN_NOTICE not in err


def damaged_files(tmp_path: Path) -> dict[str, tuple[Path, str]]:
    """name -> (a path for the transformer slot, words its error must have)."""
    state = tiny.transformer().state_dict()
    good = tiny.save(tmp_path / "good.safetensors", state)
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(good.read_bytes()[:-100])
    flipped = tmp_path / "flipped.safetensors"
    content = bytearray(good.read_bytes())
    content[20] ^= 0x80
    flipped.write_bytes(content)
    empty = tmp_path / "empty.safetensors"
    empty.touch()
    folder = tmp_path / "folder"
    folder.mkdir()
    huge = tmp_path / "huge.safetensors"
    huge.write_bytes((10**15).to_bytes(8, "little") + b"{}")
    nan = {**state, "img_in.proj.bias": torch.full((32,), torch.nan)}
    lora = {"diffusion_model.double_blocks.0.img_attn_qkv.lora_A.weight": torch.ones(2, 2)}
    framepack = {"clean_x_embedder.proj.weight": torch.ones(2, 2)}
    wan = {n: torch.ones(2, 2) for n in ("patch_embedding.weight", "blocks.0.self_attn.q.weight")}
    llama = {"model.layers.0.self_attn.q_proj.weight": torch.ones(2, 2)}

    def variant(channels: int) -> dict[str, torch.Tensor]:
        config = TransformerConfig(**{**tiny.TRANSFORMER.__dict__, "in_channels": channels})
        return SkyReelsTransformer(config).state_dict()

    return {
        "truncated": (truncated, "download it again"),
        "flipped": (flipped, "damaged header"),
        "empty": (empty, "0 bytes"),
        "folder": (folder, "one index"),
        "huge": (huge, "1000000000000000"),
        "nan": (tiny.save(tmp_path / "nan.safetensors", nan), "NaN"),
        "lora": (tiny.save(tmp_path / "lora.safetensors", lora), "LoRA"),
        "llama": (tiny.save(tmp_path / "llama.safetensors", llama), "load it as a text encoder"),
        "t2v": (tiny.save(tmp_path / "t2v.safetensors", variant(16)), "takes no picture"),
        "framepack": (
            tiny.save(tmp_path / "framepack.safetensors", {**variant(16), **framepack}),
            "is FramePack",
        ),
        "wan": (tiny.save(tmp_path / "wan.safetensors", wan), "use the files of SkyReels-V1"),
        "33": (tiny.save(tmp_path / "i2v.safetensors", variant(33)), "33 input channels"),
        "vae": (
            tiny.save(tmp_path / "vae.safetensors", VideoVAE(tiny.VAE).state_dict()),
            "HunyuanVideo VAE",
        ),
        "missing": (tmp_path / "nothing.safetensors", "does not exist"),
    }


def test_damaged_and_wrong_files_are_one_sentence_in_the_transformer_slot(
    capsys, tmp_path, monkeypatch, picture
):
    from comfyui_skyreels.skyreels import builtin
    from comfyui_skyreels.skyreels.text import load

    # the text encoder comes first; the built-in one stands in for the real folder
    monkeypatch.setattr(
        load, "load_text_encoder",
        lambda path, *, runtime: builtin.builtin_text_encoder(runtime=runtime),
    )  # fmt: skip
    vae = tiny.save(tmp_path / "good vae.safetensors", VideoVAE(tiny.VAE).state_dict())
    for name, (path, words) in damaged_files(tmp_path).items():
        out_file = tmp_path / "clip.mp4"
        slots = ["--transformer", path, "--vae", vae, "--text-encoder", tmp_path]
        code, out, err = run(capsys, "generate", picture, *FAST, *slots, "--out", out_file)
        assert (code, out) == (1, ""), name
        sentence = err.strip().splitlines()[-1]
        assert sentence.startswith("error: ") and words in sentence, (name, sentence)
        assert "Traceback" not in err, name
        assert not out_file.exists(), name


def test_transformer_in_the_vae_slot_is_named(capsys, tmp_path, monkeypatch):
    from comfyui_skyreels.skyreels import builtin
    from comfyui_skyreels.skyreels.text import load

    monkeypatch.setattr(
        load, "load_text_encoder",
        lambda path, *, runtime: builtin.builtin_text_encoder(runtime=runtime),
    )  # fmt: skip
    path = tiny.save(tmp_path / "x.safetensors", tiny.transformer().state_dict())
    slots = ["--transformer", path, "--vae", path, "--text-encoder", tmp_path]
    code, _, err = run(capsys, "generate", *FAST, *slots, "--out", tmp_path / "clip.mp4")
    assert code == 1
    assert "a HunyuanVideo VAE is needed" in err


def test_missing_text_encoder_folder_is_explained(capsys, tmp_path, picture):
    transformer = tiny.save(tmp_path / "a.safetensors", tiny.transformer().state_dict())
    vae = tiny.save(tmp_path / "b.safetensors", VideoVAE(tiny.VAE).state_dict())
    slots = ["--transformer", transformer, "--vae", vae, "--text-encoder", tmp_path / "none"]
    code, _, err = run(capsys, "generate", picture, *FAST, *slots, "--out", tmp_path / "clip.mp4")
    assert code == 1
    assert "HunyuanVideo" in err


def test_cached_prompts_are_found_without_loading_the_text_encoder(
    capsys, tmp_path, monkeypatch, picture
):
    from comfyui_skyreels.skyreels.text import encode, load
    from support.text import POOLED_DIM, TEXT_DIM, make_text_folder

    config = TransformerConfig(
        **{**tiny.TRANSFORMER.__dict__, "text_embed_dim": TEXT_DIM,
           "pooled_projection_dim": POOLED_DIM}
    )  # fmt: skip
    model = tiny.save(tmp_path / "t.safetensors", tiny.transformer(config).state_dict())
    vae = tiny.save(tmp_path / "v.safetensors", tiny.randomize(VideoVAE(tiny.VAE)).state_dict())
    folder = make_text_folder(tmp_path / "text")
    slots = ["--transformer", model, "--vae", vae, "--text-encoder", folder,
             "--width", "32", "--height", "32", "--frames", "5",
             "--prompt-cache", tmp_path / "cache"]  # fmt: skip
    first, second = tmp_path / "a.npy", tmp_path / "b.npy"
    assert run(capsys, "generate", picture, *FAST, *slots, "--out", first)[0] == 0
    monkeypatch.setattr(load, "load_text_encoder", lambda *_, **__: pytest.fail("was loaded"))
    encode._cache.clear()
    assert run(capsys, "generate", picture, *FAST, *slots, "--out", second)[0] == 0
    assert first.read_bytes() == second.read_bytes()


def test_text_encoders_in_single_files_make_the_clip_of_their_folder(capsys, tmp_path, picture):
    from safetensors.torch import load_file
    from support.text import TEXT_DIM, make_text_folder

    folder = make_text_folder(tmp_path / "text", true_heads=True)
    files = []
    for part, prefix in (("text_encoder", "model."), ("text_encoder_2", "text_model.")):
        state = load_file(folder / part / "model.safetensors")
        state = {prefix + name.removeprefix(prefix): tensor for name, tensor in state.items()}
        files.append(tiny.save(tmp_path / f"{part}.safetensors", state))
    config = replace(tiny.TRANSFORMER, text_embed_dim=TEXT_DIM, pooled_projection_dim=128)
    model = tiny.save(tmp_path / "t.safetensors", tiny.transformer(config).state_dict())
    vae = tiny.save(tmp_path / "v.safetensors", tiny.randomize(VideoVAE(tiny.VAE)).state_dict())
    slots = ["--transformer", model, "--vae", vae, "--width", "32", "--height", "32",
             "--frames", "5"]  # fmt: skip
    single = ["--text-encoder", files[1], "--text-encoder", files[0], "--tokenizer", folder]
    clips = []
    for number, encoder in enumerate((["--text-encoder", folder], single)):
        out = tmp_path / f"{number}.npy"
        assert run(capsys, "generate", picture, *FAST, *slots, *encoder, "--out", out)[0] == 0
        clips.append(np.load(out))
    assert np.array_equal(*clips)
    out = tmp_path / "x.npy"
    code, _, err = run(capsys, "generate", picture, *FAST, *slots, *single[:4], "--out", out)
    assert code == 1
    assert "No tokenizer of LLaMA-3 was found" in err


def test_a_tokenizer_without_text_encoders_is_refused(capsys, tmp_path):
    code, _, err = run(
        capsys, "generate", *FAST, "--tokenizer", tmp_path, "--out", tmp_path / "x.npy"
    )
    assert code == 1
    assert "--tokenizer belongs to --text-encoder" in err


@pytest.fixture
def t2v_slots(tmp_path) -> list:
    """A tiny text-to-video transformer with its VAE and text encoders, and a small size."""
    from support.text import POOLED_DIM, TEXT_DIM, make_text_folder

    config = replace(
        tiny.TRANSFORMER, in_channels=16, text_embed_dim=TEXT_DIM, pooled_projection_dim=POOLED_DIM
    )
    model = tiny.save(tmp_path / "t.safetensors", tiny.transformer(config).state_dict())
    vae = tiny.save(tmp_path / "v.safetensors", tiny.randomize(VideoVAE(tiny.VAE)).state_dict())
    return ["--transformer", model, "--vae", vae, "--text-encoder",
            make_text_folder(tmp_path / "text"), "--width", "32", "--height", "32",
            "--frames", "5"]  # fmt: skip


def test_a_text_to_video_transformer_makes_a_clip_of_the_prompt_alone(capsys, tmp_path, t2v_slots):
    out = tmp_path / "clip.npy"
    code, _, err = run(capsys, "generate", *FAST, *t2v_slots, "--out", out)
    assert code == 0, err
    assert np.load(out).shape == (5, 32, 32, 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["PICTURE"], "takes no picture: leave the picture out"),
        (["--extend", "CLIP"], "takes no picture"),
        (["--noise-augmentation", "0.1"], "--latent-strength are for a picture"),
        (["--end-image", "PICTURE"], "--latent-strength are for a picture"),
    ],
)
def test_a_picture_for_a_text_to_video_transformer_is_refused_before_text_is_encoded(
    capsys, tmp_path, t2v_slots, picture, monkeypatch, options, words
):
    monkeypatch.setattr(cli.generate, "encode_prompts", lambda *_: pytest.fail("text was encoded"))
    np.save(tmp_path / "clip.npy", np.zeros((5, 32, 32, 3), np.float32))
    paths = {"PICTURE": picture, "CLIP": tmp_path / "clip.npy"}
    given = [paths.get(option, option) for option in options]
    slots = t2v_slots[:-6] if "--extend" in options else t2v_slots
    command = ["generate", *given, *FAST, *slots, "--out", tmp_path / "x.npy"]
    code, _, err = run(capsys, *command)
    assert code == 1
    assert words in err


def test_an_image_to_video_transformer_without_a_picture_is_one_sentence(capsys, tmp_path):
    model = tiny.save(tmp_path / "t.safetensors", tiny.transformer().state_dict())
    vae = tiny.save(tmp_path / "v.safetensors", VideoVAE(tiny.VAE).state_dict())
    slots = ["--transformer", model, "--vae", vae, "--text-encoder", tmp_path]
    code, _, err = run(capsys, "generate", *FAST, *slots, "--out", tmp_path / "x.npy")
    assert code == 1
    assert "needs a picture to start from: give one" in err


def test_inspect_describes_a_file_for_people_and_for_programs(capsys, tmp_path):
    path = tiny.save(tmp_path / "x.safetensors", tiny.transformer().state_dict())
    code, out, err = run(capsys, "inspect", path)
    assert (code, out) == (0, "")
    assert "skyreels-i2v" in err
    code, out, _ = run(capsys, "inspect", path, "--json")
    report = json.loads(out)
    assert (report["family"], report["variant"]) == ("transformer", "skyreels-i2v")
    assert report["config"]["attention_head_dim"] == 16


def test_inspect_refuses_each_damaged_file_in_one_sentence(capsys, tmp_path):
    files = damaged_files(tmp_path)
    for name in ("truncated", "flipped", "empty", "folder", "huge", "missing"):
        code, _, err = run(capsys, "inspect", files[name][0])
        assert code == 1, name
        assert err.startswith("error: ") and err.count("\n") == 1, (name, err)


def test_doctor_names_versions_devices_kernels_and_weights(capsys, tmp_path, monkeypatch):
    folder = tmp_path / "models" / "diffusion_models"
    tiny.save(folder / "a.safetensors", tiny.transformer().state_dict())
    (folder / "b.safetensors").touch()
    monkeypatch.setenv("COMFYUI_DIR", str(tmp_path))
    code, out, _ = run(capsys, "doctor", "--json")
    findings = json.loads(out)
    assert code == 0
    assert findings["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert "memory free" in findings["devices"]["cpu"]
    assert "skyreels-i2v" in findings["weights"]["diffusion_models/a.safetensors"]
    assert "0 bytes" in findings["weights"]["diffusion_models/b.safetensors"]
    assert findings["kernels"]["attention"].endswith("exact")


def test_wrong_usage_exits_with_2():
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["generate"])
    assert exit_info.value.code == 2


def test_resumable_run_leaves_no_state_behind(capsys, tmp_path):
    out_file, state = tmp_path / "clip.npy", tmp_path / "state"
    size = ["--width", "32", "--height", "32", "--frames", "5"]
    assert run(capsys, "generate", *FAST, *size, "--resume", state, "--out", out_file)[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.npy", "clip.receipt.json"]


#: as `python -m skyreels`, also where the tests run in the background, which ignores SIGINT
PROGRAM = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from skyreels import cli
{WITHOUT_TEXT_ENCODER}
cli.generate.encode_prompts = lambda *_: (prompt, prompt)
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_ctrl_c_stops_with_one_line_and_leaves_nothing(tmp_path):
    out_file = tmp_path / "clip.mp4"
    arguments = ["generate", "--prompt", "x", "--steps", "1000", "--out", str(out_file)]
    end = time.monotonic() + 300
    program = forks("torch").start(["-c", PROGRAM, *arguments], {**os.environ})
    try:
        while "Plan for" not in program.output()[1]:  # said before the first step
            assert time.monotonic() < end, program.output()
            time.sleep(0.05)
        time.sleep(0.2)
        program.send_signal(signal.SIGINT)
    except BaseException:
        program.kill()
        raise
    finally:
        code = program.wait()
    _, err = program.output()
    assert code == 130
    assert "Interrupted" in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def in_a_destructor() -> None:
    class Dying:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    Dying()


def in_a_callback() -> None:
    weakref.finalize(Dropped(), signal.raise_signal, signal.SIGINT)


def under_a_bare_except() -> None:
    with contextlib.suppress(BaseException):
        signal.raise_signal(signal.SIGINT)


class Dropped:
    """What a weak reference can point to."""


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize("swallow", [in_a_destructor, in_a_callback, under_a_bare_except])
@pytest.mark.parametrize("place", ["builtin.builtin_text_encoder", "pipeline.image_to_latents"])
def test_an_interrupt_that_is_swallowed_on_the_way_stops_all_the_same(
    swallow, place, capsys, monkeypatch, tmp_path
):
    module, name = place.split(".")
    owner = importlib.import_module(f"comfyui_skyreels.skyreels.{module}")
    original = getattr(owner, name)

    def interrupted(*args, **options):
        swallow()
        return original(*args, **options)

    monkeypatch.setattr(owner, name, interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code, _, err = run(capsys, "generate", *FAST, "--out", tmp_path / "clip.npy")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert code == 130
    assert "Interrupted" in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


# --- frames go to the file as they become final --------------------------------------------------


class Watched:
    """Counts the frames that a file was given and that still exist."""

    def __init__(self, monkeypatch) -> None:
        self.alive = self.most = 0
        self.starts: list[int] = []
        self.groups: list[int] = []
        write, restart = media.FrameFile.write, media.FrameFile.restart

        def watched_write(file, frames):
            self.alive += len(frames)
            self.most = max(self.most, self.alive)
            self.groups.append(len(frames))
            weakref.finalize(frames, self.gone, len(frames))
            write(file, frames)

        def watched_restart(file):
            self.starts.append(len(self.groups))
            restart(file)

        monkeypatch.setattr(media.FrameFile, "write", watched_write)
        monkeypatch.setattr(media.FrameFile, "restart", watched_restart)

    def gone(self, frames: int) -> None:
        self.alive -= frames


@pytest.mark.parametrize(("decode", "held"), [("synced", 24), ("tiled-diffusers", 36)])
def test_of_a_long_clip_only_a_few_frames_are_held(capsys, tmp_path, monkeypatch, decode, held):
    watched = Watched(monkeypatch)
    size = ["--width", "16", "--height", "16", "--frames", "97", "--decode", decode]
    out_file = tmp_path / "clip.npy"
    assert run(capsys, "generate", *FAST, *ONCE, *size, "--out", out_file)[0] == 0
    assert sum(watched.groups) == 97
    assert watched.most <= held
    assert len(np.load(out_file)) == 97


@functools.cache
def encoded() -> tuple[PromptEmbeds, PromptEmbeds]:
    """The prompt of FAST and the usual negative one."""
    encoder = builtin_text_encoder(runtime=RUNTIME)
    return (
        encode_prompt(encoder, FAST[1], runtime=RUNTIME),
        encode_prompt(encoder, DEFAULT_NEGATIVE_PROMPT, fps_prefix=False, runtime=RUNTIME),
    )


@pytest.mark.parametrize(
    ("decode", "kinds"),
    [
        ("full", ["npy"]), ("synced", ["npy", "mp4"]), ("tiled", ["npy"]),
        ("tiled-diffusers", ["npy"]),
    ],
)  # fmt: skip
def test_the_file_holds_the_frames_that_a_library_user_gets(capsys, tmp_path, decode, kinds):
    size = {"width": 32, "height": 48, "num_frames": 21}
    frames = image_to_video(
        builtin_transformer(runtime=RUNTIME), builtin_vae(runtime=RUNTIME), example_image(),
        *encoded(), SamplingSettings(seed=0, sigmas=get_sigmas(2, 7.0), riflex_k=0), **size,
        decode=decode, runtime=RUNTIME,
    )  # fmt: skip
    options = ["--width", "32", "--height", "48", "--frames", "21", "--decode", decode]
    for kind in kinds:
        command = ["generate", *FAST, *options, "--out", tmp_path / f"a.{kind}"]
        assert run(capsys, *command)[0] == 0
        media.write_frames(tmp_path / f"whole.{kind}", frames)
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()
    if "mp4" in kinds:
        # not the bytes of the video: its encoder has threads, and on a busy machine they may differ
        written, whole = (media.read_clip(tmp_path / name) for name in ("a.mp4", "whole.mp4"))
        assert (written - whole).abs().mean() < 0.02


def test_a_decode_that_runs_out_of_memory_begins_the_file_anew(capsys, tmp_path, monkeypatch):
    iter_decode, refused = VideoVAE.iter_decode, []

    def limited(vae, latents, **options):
        pieces = iter_decode(vae, latents, **options)
        yield next(pieces)[:, :, :1]  # in the middle of the work
        refused.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    size = ["--width", "32", "--height", "32", "--frames", "17"]
    expected, out_file = tmp_path / "synced.npy", tmp_path / "auto.npy"
    command = ["generate", *FAST, *size]
    assert run(capsys, *command, "--decode", "synced", "--out", expected)[0] == 0
    watched = Watched(monkeypatch)
    monkeypatch.setattr(VideoVAE, "iter_decode", limited)
    monkeypatch.setattr(outcomes, "user_folder", lambda: tmp_path / "state")
    assert run(capsys, *command, "--decode", "auto", "--out", out_file)[0] == 0
    assert refused == [1]
    assert watched.starts == [0, 1]
    assert out_file.read_bytes() == expected.read_bytes()


@pytest.mark.parametrize(
    "stop", [KeyboardInterrupt(), OSError(5, "broken"), torch.OutOfMemoryError("CUDA")]
)
def test_a_decode_that_ends_early_leaves_the_old_file_and_the_saved_steps(
    capsys, tmp_path, monkeypatch, stop
):
    iter_decode = VideoVAE.iter_decode

    def ends(vae, latents, **options):
        yield next(iter_decode(vae, latents, **options))[:, :, :1]
        raise stop

    state, out_file = tmp_path / "state", tmp_path / "x.mp4"
    out_file.write_bytes(b"old")
    size = ["--width", "32", "--height", "32", "--frames", "5", "--decode", "full"]
    command = ["generate", *FAST, *size, "--resume", state, "--out", out_file]
    with monkeypatch.context() as patch:
        patch.setattr(VideoVAE, "iter_decode", ends)
        code, _, err = run(capsys, *command)
    assert code == (130 if isinstance(stop, KeyboardInterrupt) else 1)
    assert "Traceback" not in err
    assert "cannot be written" not in err  # it was the decode
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state", "x.mp4"]
    assert out_file.read_bytes() == b"old"
    assert run(capsys, *command)[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["x.mp4"]


# --- what a careless or unlucky person meets -----------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--width", "0"], "Width 0"),
        (["--height", "0"], "Height 0"),
        (["--frames", "0"], "0 frames"),
        (["--width", "1600000000000"], "more than 4096"),
        (["--frames", "400000000001"], "more than 1025"),
        (["--steps", "100000000000"], "not within 1..1000"),
        (["--device", "cpu:"], "'cpu:' is not one of"),
        (["--device", "cuda:"], "'cuda:' is not one of"),
        (["--seed", str(2**64), "--noise-augmentation", "0.1"], "Seed"),
        (["--latent-strength", "1e39"], "Latent strength 1e+39"),
    ],
)
def test_slips_are_refused_before_any_work(capsys, tmp_path, options, words):
    code, out, err = run(capsys, "generate", *FAST, *options, "--out", tmp_path / "x.npy", "--json")
    assert code == 1
    assert words in json.loads(out)["error"]
    assert "Traceback" not in err


@pytest.mark.parametrize("place", ["file/o.npy", "nul\0.npy", "x" * 300 + ".npy", "taken.npy"])
def test_an_output_that_cannot_be_written_is_found_first(capsys, tmp_path, place, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / f"taken.npy.{os.getpid()}.part").mkdir()
    monkeypatch.setattr(cli.generate, "_generate", lambda *_: pytest.fail("work was begun"))
    code, out, _ = run(capsys, "generate", *FAST, "--out", tmp_path / place, "--json")
    assert code == 1
    assert "cannot be written" in json.loads(out)["error"]


def test_weights_are_looked_at_before_minutes_of_text_encoding(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(cli.generate, "encode_prompts", lambda *_: pytest.fail("text was encoded"))
    vae = tiny.save(tmp_path / "v.safetensors", VideoVAE(tiny.VAE).state_dict())
    slots = ["--transformer", vae, "--vae", vae, "--text-encoder", tmp_path]
    code, _, err = run(capsys, "generate", *FAST, *slots, "--out", tmp_path / "x.npy")
    assert code == 1
    assert "a HunyuanVideo transformer is needed" in err


def test_a_run_that_fails_after_sampling_is_continued(capsys, tmp_path, monkeypatch):
    from comfyui_skyreels.skyreels.vae import tiling

    size = ["--width", "32", "--height", "32", "--frames", "5"]
    state, out_file = tmp_path / "state", tmp_path / "x.npy"
    command = ["generate", *FAST, *size, "--resume", state, "--out", out_file]

    def fail(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tiling, "decode_into", fail)
        code, _, err = run(capsys, *command)
    assert code == 130
    assert f"continues from {state}" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state"]
    assert run(capsys, *command)[0] == 0
    assert not state.exists()
    whole = np.load(out_file)
    assert run(capsys, "generate", *FAST, *size, "--out", out_file)[0] == 0
    assert np.array_equal(np.load(out_file), whole)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "ran out of memory: use fewer frames"),
        (MemoryError(), "ran out of memory"),
        (RuntimeError("strange\nlong"), "Unexpected RuntimeError (strange): this is a defect"),
    ],
)
def test_what_no_check_foresaw_is_still_one_sentence(capsys, tmp_path, monkeypatch, error, words):
    def fail(*_):
        raise error

    monkeypatch.setattr(cli.generate, "_generate", fail)
    code, out, err = run(capsys, "generate", *FAST, "--out", tmp_path / "x.npy", "--json")
    assert code == 1
    assert words in json.loads(out)["error"]
    assert "Traceback" not in err


def test_wrong_usage_answers_with_json_too(tmp_path):
    command = ["-m", "skyreels", "generate", "--json", "--steps", "abc"]
    done = forks("torch").run(command, {**os.environ})
    assert done.returncode == 2
    assert "steps" in json.loads(done.stdout)["error"]


def test_the_built_in_model_makes_long_clips(capsys, tmp_path):
    size = ["--width", "16", "--height", "16", "--frames", "201"]
    options = ["--steps", "1", "--prompt", "x", "--cfg", "1"]
    code, _, err = run(capsys, "generate", *options, *size, "--out", tmp_path / "x.npy")
    assert code == 0, err


def test_doctor_survives_files_nobody_can_read_and_finds_folders(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COMFYUI_DIR", str(tmp_path))
    models = tmp_path / "models"
    state = tiny.transformer().state_dict()
    split = tiny.to_diffusers(state, tiny.TRANSFORMER)
    config = tiny.diffusers_config(tiny.TRANSFORMER)
    tiny.save_sharded(models / "diffusers" / "SkyReels", split, config)
    broken = {**state, "final_layer.linear.weight": torch.ones(())}
    tiny.save(models / "diffusion_models" / "sub" / "broken.safetensors", broken)
    code, out, _ = run(capsys, "doctor", "--json")
    assert code == 0
    weights = json.loads(out)["weights"]
    assert "skyreels-i2v" in weights["diffusers/SkyReels"]
    assert "of another model" in weights["diffusion_models/sub/broken.safetensors"]


# --- places and packages ------------------------------------------------------------------------


def test_a_place_that_cannot_be_used_is_found_before_any_work(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(cli.generate, "_generate", lambda *_: pytest.fail("it began"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    out_file = tmp_path / "clip.npy"
    for options, words in (
        (["--resume", tmp_path / "folder"], "is a folder: name a file"),
        (["--resume", tmp_path / "pipe"], "not a regular file"),
        (["--resume", tmp_path / "file" / "x"], "cannot be written"),
        (["--resume", out_file], "both name"),
        (["--prompt-cache", tmp_path / "file"], "is not a folder"),
    ):
        code, _, err = run(capsys, "generate", *FAST, "--out", out_file, *options)
        assert code == 1
        assert words in err
    assert not list(tmp_path.glob("*.part"))


def test_a_tilde_is_the_home_folder_in_every_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    options = ("transformer", "vae", "out", "resume", "prompt-cache", "extend")
    lists = ("text-encoder", "tokenizer")
    given = [text for name in (*options, *lists) for text in (f"--{name}", f"~/{name}")]
    arguments = cli.build_parser().parse_args(["generate", "~/image", "--prompt", "x", *given])
    for name in ("image", *options):
        assert getattr(arguments, name.replace("-", "_")) == tmp_path / name
    for name in lists:
        assert getattr(arguments, name.replace("-", "_")) == [tmp_path / name]
    assert cli.options.parse_lora("~/style.safetensors:0.5") == (
        tmp_path / "style.safetensors",
        0.5,
    )
    assert cli.build_parser().parse_args(["inspect", "~/x"]).path == tmp_path / "x"
    nobody = cli.build_parser().parse_args(["inspect", "~nobody-here/x"]).path
    assert nobody == Path("~nobody-here/x")


@pytest.mark.parametrize("device", ["mps", "xpu", "nonsense", "cuda:x", ""])
def test_a_device_that_is_none_gets_a_sentence(capsys, device):
    code, _, err = run(capsys, "generate", *FAST, "--out", "clip.npy", "--device", device)
    assert code == 1
    assert "use cpu" in err


@pytest.mark.parametrize("device", ["mps", "xpu", "tpu", "cuda:99"])
def test_a_runtime_of_a_device_that_is_none_gets_a_sentence(device):
    if torch.cuda.device_count() > 99 or (device == "mps" and torch.backends.mps.is_available()):
        pytest.skip("it is there")
    with pytest.raises(OptionError, match="cannot be used .*: use cpu"):
        TorchRuntime(device)


@pytest.mark.parametrize("missing", ["torch", "einops"])
def test_a_missing_package_is_a_sentence(tmp_path, missing):
    """In a fresh interpreter, which finds all but one package."""
    hide = f"""
import importlib.util, runpy, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == {missing!r} else find(name, *a)
sys.argv = ["-m", "inspect", "x", "--json"]
sys.orig_argv = ["python", "-m", "skyreels", "inspect", "x", "--json"]
import skyreels
"""
    ran = subprocess.run(
        [sys.executable, "-c", hide], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 1
    assert f"{missing} is not installed" in json.loads(ran.stdout)["error"]
    assert f"-m pip install {missing}" in ran.stderr
    assert "Traceback" not in ran.stderr
    library = hide.replace("sys.argv = ", "unused = ").replace("sys.orig_argv = ", "unused = ")
    ran = subprocess.run(
        [sys.executable, "-c", library], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert f"ImportError: {missing} is not installed" in ran.stderr


def test_a_full_disk_is_called_full(capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "clip.npy")

    monkeypatch.setattr(cli.generate, "_check_places", full)
    code, _, err = run(capsys, "generate", *FAST, "--out", "clip.npy")
    assert code == 1
    assert "its disk is full" in err


# --- calibrate ----------------------------------------------------------------------------------

SHORT = ["--width", "32", "--height", "32", "--frames", "5", "--steps", "10", "--passes", "70%"]


@pytest.fixture(scope="module")
def whole_model(tmp_path_factory) -> Path:
    """The built-in model as a folder of somebody else's."""
    folder = tmp_path_factory.mktemp("whole") / "model"
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer",
                 "tokenizer_2"):  # fmt: skip
        shutil.copytree(BUILTIN_FOLDER / part, folder / part)
    return folder


@pytest.fixture
def two_prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle moves left\n\n  a green circle grows \n")
    return path


def test_a_calibrated_cache_is_stored_beside_the_weights_and_used(
    capsys, tmp_path, whole_model, two_prompts, picture, caplog
):
    given = [whole_model, "--prompts", two_prompts, "--image", picture, *SHORT]
    parts = ["--transformer", whole_model, "--vae", whole_model, "--text-encoder", whole_model]
    clip = ["generate", picture, *FAST, "--steps", "10", *parts, *SHORT[:6]]
    clip += ["--cache", "calibrated", "--out", tmp_path / "clip.npy"]
    code, _, err = run(capsys, *clip)
    assert code == 1
    assert f'run `python -m skyreels calibrate "{whole_model}"` once' in err
    assert not (tmp_path / "clip.npy").exists()

    code, out, err = run(capsys, "calibrate", *given, "--check", "1", "--json")
    assert code == 0
    assert out.count("\n") == 1
    (found,) = json.loads(out)["models"]
    place = whole_model / "transformer" / "diffusion_pytorch_model.cache.json"
    assert found["file"] == str(place)
    stored = json.loads(place.read_text())
    assert stored.items() <= found.items()
    assert found["passes_wanted"] == 14
    assert stored["replayed"]["clips"] == 2
    assert stored["replayed"]["passes"] <= 14
    assert stored["measured"]["clips"] == 1
    assert stored["settings"]["steps"] == 10
    assert [path.name for path in place.parent.iterdir() if "unfinished" in path.name] == []
    assert "3 clips" not in err  # a check is two
    assert "Clip 2 of 2" in err
    assert "Check 1 of 1, threshold" in err
    assert f"Stored in {place}" in err
    assert "drawn pictures" not in err

    caplog.clear()
    assert run(capsys, *clip)[0] == 0
    assert f"threshold {stored['threshold']:g}, " in caplog.text
    assert "Cache easy skipped" in caplog.text


def test_an_interrupted_calibration_continues_with_the_next_clip(capsys, two_prompts, monkeypatch):
    from comfyui_skyreels.skyreels.pipeline import calibration

    recorded = []
    real = calibration.record

    def stopped(*arguments, **options):
        if len(recorded) == 1:
            raise KeyboardInterrupt
        recorded.append(arguments)
        return real(*arguments, **options)

    command = ["calibrate", "--prompts", two_prompts, *SHORT, "--json"]
    monkeypatch.setattr(calibration, "record", stopped)
    code, out, err = run(capsys, *command)
    assert code == 130
    assert "continues with the first clip that is not finished" in json.loads(out)["error"]
    monkeypatch.setattr(calibration, "record", real)
    code, out, err = run(capsys, *command)
    assert code == 0
    assert "1 of 2 clips are there from before." in err
    assert "Clip 1 of 2" not in err
    assert "Clip 2 of 2" in err
    (found,) = json.loads(out)["models"]
    assert found["replayed"]["clips"] == 2
    # and with other prompts nothing of it is taken
    two_prompts.write_text("a red circle moves left\na blue circle fades away")
    _, _, err = run(capsys, *command)
    assert "from before" not in err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--passes", "5%"], "--passes 5% is not within 8..20 model evaluations"),
        (["--check", "-1"], "--check -1 is not within 0..256"),
        (["--steps", "0"], "0 steps"),
        (["--width", "100"], "Width 100 is not a multiple of 16"),
        (["--prompts", "gone.txt"], "gone.txt does not exist"),
        (["--prompts", "EMPTY"], "has 0 prompts, and 1..256 are used"),
        (["--vae", "x"], "belong to a MODEL"),
        (["gone"], "gone"),
        (["TRANSFORMER"], "There is no VAE in"),
        (["TRANSFORMER", "--vae", "VAE"], "There is no text encoder in"),
        (["--image", "gone.png"], "There is no image file gone.png"),
    ],
)
def test_what_cannot_be_calibrated_is_one_sentence(capsys, tmp_path, options, words):
    (tmp_path / "empty.txt").write_text("\n")
    names = {
        "EMPTY": tmp_path / "empty.txt",
        "TRANSFORMER": BUILTIN_FOLDER / "transformer",
        "VAE": BUILTIN_FOLDER / "vae",
    }
    options = [names.get(option, option) for option in options]
    code, out, err = run(capsys, "calibrate", *SHORT, *options, "--json")
    assert code == 1
    assert words in json.loads(out)["error"]
    assert "Traceback" not in err


def test_a_place_that_cannot_be_written_names_the_one_that_can(capsys, tmp_path, two_prompts):
    shutil.copytree(BUILTIN_FOLDER / "transformer", tmp_path / "model")
    (tmp_path / "model" / "diffusion_pytorch_model.cache.json").mkdir()
    parts = ["--vae", BUILTIN_FOLDER / "vae", "--text-encoder", BUILTIN_FOLDER]
    command = ["calibrate", tmp_path / "model", *parts, "--prompts", two_prompts, *SHORT, "--json"]
    code, out, _ = run(capsys, *command)
    assert code == 1
    message = json.loads(out)["error"]
    assert "is a folder" in message
    assert "give --user-folder: then" in message
    code, out, err = run(capsys, *command, "--user-folder")
    assert code == 0
    (found,) = json.loads(out)["models"]
    assert found["file"] in message
    assert Path(found["file"]).is_file()
    assert "drawn pictures" in err


def test_two_devices_are_named_with_a_comma(monkeypatch):
    from comfyui_skyreels.skyreels.cli.devices import pick_devices

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_devices("auto") == ("cuda", None)
    assert pick_devices("cuda:0, cuda:1") == ("cuda:0", "cuda:1")
    assert pick_devices("cuda,cuda:1") == ("cuda", "cuda:1")
    for names, words in (
        ("cuda,cuda:0", "cuda is named twice in 'cuda,cuda:0'"),
        ("cuda:1,cuda:1", "cuda:1 is named twice"),
        ("cuda:0,cuda:2", r"'cuda:2' not found \(CUDA devices: 2\)"),
        ("cuda:0,cuda:1,cpu", "3 devices are named"),
        ("cuda:0,", "Device '' is not one of"),
    ):
        with pytest.raises(OptionError, match=words):
            pick_devices(names)


# --- nothing is silent --------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["stop", "retry"])
def test_a_bad_render_ends_the_command_or_takes_the_next_seed(
    capsys, tmp_path, monkeypatch, choice
):
    looks = [bad_render.Look(0.1, 0.0, 0.0, 1)]
    good = bad_render.Look(2.0, 0.0, 0.0, 1)
    monkeypatch.setattr(bad_render, "look_at", lambda *_: looks.pop() if looks else good)
    command = ["generate", "--prompt", "a red circle moves left", "--steps", "4", "--seed", "6"]
    options = ["--bad-render", choice, "--out", tmp_path / "a.npy", "--json"]
    code, out, err = run(capsys, *command, *options)
    if choice == "stop":
        assert code == 1
        assert "seed 6: at step 3 of 4 the clip stands still" in json.loads(out)["error"]
        assert not (tmp_path / "a.npy").exists()
    else:
        assert json.loads(out)["seed"] == 7
        assert run(capsys, *command[:-1], "7", "--out", tmp_path / "b.npy")[0] == 0
        assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()
    assert err.count("Bad render") == 1 - (choice == "retry")  # a warning is in the log


def test_words_that_the_built_in_model_does_not_know_are_named_once(capsys, tmp_path, caplog):
    prompt = "a purple dog moves left, quickly, past a purple (tree:1.2)"
    made = run(capsys, "generate", "--prompt", prompt, "--steps", "1", "--out", tmp_path / "a.npy")
    assert made[0] == 0
    lines = [line for line in caplog.messages if "does not know" in line]
    assert len(lines) == 1
    assert "does not know purple, dog, quickly, past, tree:" in lines[0]


@pytest.mark.parametrize("size", [(["--width", "32"]), (["--height", "112"]), (["--frames", "37"])])
def test_a_size_that_the_built_in_model_cannot_do_is_named(capsys, tmp_path, caplog, size):
    command = ["generate", *FAST, "--cfg", "1", "--out", tmp_path / "a.npy"]
    assert run(capsys, *command, *size)[0] == 0
    assert "trained on 64x64 and 17 frames" in caplog.text


def test_sizes_that_will_do_and_known_words_are_not_named(capsys, tmp_path, caplog):
    command = ["generate", *FAST, "--out", tmp_path / "a.npy", "--width", "96", "--frames", "33"]
    assert run(capsys, *command)[0] == 0
    assert "built-in" not in caplog.text


@pytest.mark.parametrize("size", [["--width", "100"], ["--height", "8"], ["--frames", "98"]])
def test_an_illegal_size_is_refused_before_any_weight_file_is_looked_at(
    capsys, tmp_path, monkeypatch, size
):
    from comfyui_skyreels.skyreels.weights import load

    monkeypatch.setattr(load, "check_transformer", lambda *_, **__: pytest.fail("looked"))
    weights = ["--transformer", "t", "--vae", "v", "--text-encoder", "e"]
    code, _, err = run(capsys, "generate", *FAST, *weights, *size, "--out", tmp_path / "a.npy")
    assert code == 1
    assert f" {size[1]} " in err
    assert " use " in err


def test_where_standard_error_is_a_file_a_line_a_minute_says_how_far_it_is(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(cli.console.time, "perf_counter", lambda: now[0])
    with cli.console.progress_bar() as report:
        for step in range(31):
            report("sample", step, 30)
            now[0] += 25.0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "sample 10 %, 675 s left"
    assert len(lines) == 10


# --- several ranks ------------------------------------------------------------------------------


def test_ranks_make_the_clip_of_one_process_and_only_the_first_is_heard(capsys, tmp_path):
    command = ["generate", *FAST, *SMALL, "--device", "cpu", "--json"]
    assert run(capsys, *command, "--out", tmp_path / "one.npy")[0] == 0
    command += ["--ranks", "2", "--out", str(tmp_path / "two.npy")]
    done = forks("torch").run(["-m", "skyreels", *command], {**os.environ})
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["frames"] == 5  # one object, of one rank
    assert "2 ranks in two groups, one for each branch of guidance." in done.stderr
    assert "frames with full on 2 ranks in" in done.stderr
    one, two = (np.load(tmp_path / f"{name}.npy") for name in ("one", "two"))
    assert abs(one - two).max() <= 1e-4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--ranks", "3"], "3 ranks cannot share 4 heads of attention: use 2, 4."),
        (
            ["--ranks", "6"],
            "3 ranks in each of 2 groups cannot share 4 heads of attention: use 2, 4, ",
        ),
        (["--ranks", "6", "--cfg", "1"], "6 ranks cannot share 4 heads of attention: use 2, 4."),
        (["--ranks", "9"], "--ranks 9 is not within 2..8"),
        (["--ranks", "2", "--device", "cpu,cpu"], "Device 'cpu,cpu' is not one of"),
    ],
)
def test_what_ranks_cannot_do_is_said_before_they_are_started(capsys, tmp_path, options, words):
    command = ["generate", *FAST, "--device", "cpu", "--out", tmp_path / "a.npy"]
    code, _, err = run(capsys, *command, *options)
    assert code == 1 and words in err


# torch's launcher leaves a file open for each rank that is not heard
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("code", [0, 3])
def test_only_the_first_rank_is_heard_and_the_worst_code_is_that_of_all(capfd, code):
    from comfyui_skyreels.skyreels.runtime.ranks import start_ranks

    program = f"import os, sys; print('rank', os.environ['RANK']); sys.exit({code})"
    assert start_ranks(2, ["-c", program]) == code
    out, err = capfd.readouterr()
    assert out == "rank 0\n"
    assert "Traceback" not in err and "rank 1" not in err
    assert "SKYREELS_RANKS" not in os.environ
    gc.collect()


#: what rank 2 says, or what ends it, while the first one waits for it
FAILING = """
import os, shutil, signal, sys, time
if os.environ["RANK"] == "0":
    time.sleep(120)
{action}
"""


# as above
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("action", "words"),
    [
        (
            "shutil.copy({told!r}, os.environ['TORCHELASTIC_ERROR_FILE']); sys.exit(1)",
            "Rank 2 of 2: The disk is full.",
        ),
        ("os.kill(os.getpid(), signal.SIGKILL)", "Rank 2 of 2 was ended by signal 9"),
    ],
)
def test_what_another_rank_fails_of_is_said(action, words, tmp_path, monkeypatch):
    from comfyui_skyreels.skyreels.errors import SkyReelsError
    from comfyui_skyreels.skyreels.runtime.ranks import start_ranks, tell_launcher

    told = str(tmp_path / "told.json")
    with monkeypatch.context() as patch:
        patch.setenv("TORCHELASTIC_ERROR_FILE", told)
        tell_launcher("The disk is full.")  # here: a rank would import torch first
    program = FAILING.format(action=action.format(told=told))
    with pytest.raises(SkyReelsError, match=words):
        start_ranks(2, ["-c", program])
    gc.collect()
