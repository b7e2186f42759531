"""Files under a wrong name, in odd places, of other kinds: what each is told to be, and the fix."""

import gzip
import json
import os
import pickle
import zipfile

import pytest
import torch
from comfyui_skyreels.skyreels.errors import MAX_MESSAGE, CheckpointError, shown
from comfyui_skyreels.skyreels.files import MAX_JSON_BYTES, read_json
from comfyui_skyreels.skyreels.runtime import TorchRuntime
from comfyui_skyreels.skyreels.vae.model import VideoVAE
from comfyui_skyreels.skyreels.weights.folders import MAX_SHARDS
from comfyui_skyreels.skyreels.weights.inspect import MAX_LAYERS, inspect
from comfyui_skyreels.skyreels.weights.kinds import is_shard, kind_of
from comfyui_skyreels.skyreels.weights.load import check_transformer, load_transformer, load_vae
from support import tiny
from support.gguf_files import in_blocks, write

RUNTIME = TorchRuntime()
MAIN = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def state():
    return tiny.transformer().state_dict()


@pytest.fixture(scope="module")
def diffusers(state):
    return tiny.to_diffusers(state, tiny.TRANSFORMER)


# --- the first bytes decide ---------------------------------------------------------------------

WRONG = {
    "empty": (b"", "is empty.*download it again"),
    "web page": (b"\n<!doctype HTML><html>", "is a web page.*signing in"),
    "xml": (b"\xef\xbb\xbf<?xml version='1.0'?><Error>AccessDenied</Error>", "is a web page"),
    "pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
        "Git LFS.*git lfs pull",
    ),
    "workflow": (b'{"nodes": [], "links": []}', "is JSON text, such as a workflow"),
    "PNG": (b"\x89PNG\r\n\x1a\n\0\0\0", "is a PNG picture"),
    "JPEG": (b"\xff\xd8\xff\xe0\0\0", "is a JPEG picture"),
    "MP4": (b"\0\0\0 ftypisom\0\0", "is an MP4 video"),
    "gzip": (gzip.compress(b"x" * 99), "is a gzip archive.*unpack it"),
    "7z": (b"7z\xbc\xaf\x27\x1c\0\4", "is a 7z archive.*unpack it"),
    "zeros": (b"\0" * 4096, "zeros.*has not finished"),
    "text": (b"Repository not found\n" * 3, "is text and not a weight file"),
    "program": (b"\x7fELF\2\1\1\0\0\0", "is a program"),
}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".gguf"])
@pytest.mark.parametrize("kind", WRONG)
def test_another_kind_of_file_is_named_whatever_its_suffix(tmp_path, kind, suffix):
    raw, words = WRONG[kind]
    path = tmp_path / f"model{suffix}"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=words):
        inspect(path)


def test_a_zip_file_of_something_else_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model.safetensors", b"x" * 99)
    with pytest.raises(CheckpointError, match="is a zip archive.*unpack it"):
        inspect(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10**6)  # a thousand bytes
    with pytest.raises(CheckpointError, match="is a zip archive"):
        inspect(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".gguf", ""])
def test_sound_files_load_under_any_name(tmp_path, state, suffix):
    path = tmp_path / f"model{suffix}"
    tiny.save(path, state)
    assert inspect(path).layout == "original"
    for old in (False, True):
        torch.save(state, path, _use_new_zipfile_serialization=not old)
        loaded = load_transformer(path, runtime=RUNTIME).state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    write(path, in_blocks(state))
    assert "Q8_0" in inspect(path).dtypes


def test_code_in_a_pickle_does_not_run_under_any_name(tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    for suffix in (".safetensors", ".gguf", ".pt"):
        path = tmp_path / f"model{suffix}"
        for raw in (pickle.dumps({"a": Evil()}), pickle.dumps(Evil(), protocol=2)):
            path.write_bytes(raw)
            with pytest.raises(CheckpointError, match="program code, which is never run"):
                inspect(path)
        torch.save({"a": Evil()}, path)
        with pytest.raises(CheckpointError, match="program code, which is never run"):
            inspect(path)
    assert not (tmp_path / "ran").exists()


# --- descent that a file drives -----------------------------------------------------------------


def test_a_pickle_that_holds_itself_ends(tmp_path):
    own: dict = {}
    own["state_dict"] = own
    torch.save(own, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="contains no tensors: it is not a checkpoint"):
        inspect(tmp_path / "x.pt")


def test_a_pickled_tensor_that_claims_more_than_the_file_has_is_refused(tmp_path, state):
    huge = {**state, "img_in.proj.weight": torch.ones(1).expand(10**12)}
    torch.save(huge, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="its tensor img_in.proj.weight takes 4000000000000"):
        inspect(tmp_path / "x.pt")
    torch.save({"a": torch.ones(2, dtype=torch.complex128)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="stores a as torch.complex128"):
        inspect(tmp_path / "x.pt")


def test_an_index_of_very_many_shards_is_refused(tmp_path):
    names = {str(number): f"{number}.safetensors" for number in range(MAX_SHARDS + 1)}
    (tmp_path / f"{MAIN}.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(CheckpointError, match=f"names {MAX_SHARDS + 1} shards"):
        inspect(tmp_path)


def test_json_is_bounded_in_size_and_depth(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b"[" * 100_000)
    with pytest.raises(CheckpointError, match="is not JSON"):
        read_json(path)
    with path.open("wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    with pytest.raises(CheckpointError, match="at most"):
        read_json(path)


def test_a_model_of_very_many_blocks_is_refused_before_it_is_built(tmp_path, state):
    more = {f"double_blocks.{n}.x": torch.zeros(0) for n in range(MAX_LAYERS + 1)}
    path = tiny.save(tmp_path / "x.safetensors", {**state, **more})
    with pytest.raises(CheckpointError, match=f"has {MAX_LAYERS + 1} double_blocks"):
        check_transformer(path)


# --- only regular files are opened --------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes among files are Unix's")
@pytest.mark.parametrize(
    "name", [MAIN, f"{MAIN}.index.json", "config.json", "m-00001-of-00002.safetensors"]
)
def test_a_pipe_where_a_file_is_expected_is_refused(tmp_path, diffusers, name):
    folder = tiny.save_sharded(tmp_path / "f", diffusers, {})
    if name == MAIN:
        for path in folder.iterdir():
            path.unlink()
    elif name.startswith("m-"):
        index = folder / f"{MAIN}.index.json"
        index.write_text(json.dumps({"weight_map": {"a": name}}))
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match=r"is a pipe|lacks m-00001"):
        inspect(folder)


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="devices among files are Unix's")
def test_a_device_and_a_link_to_itself_are_refused(tmp_path):
    (tmp_path / "zero.safetensors").symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="is a pipe, a socket or a device"):
        inspect(tmp_path / "zero.safetensors")
    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
    with pytest.raises(CheckpointError, match="does not exist"):
        inspect(tmp_path / "loop.safetensors")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes among files are Unix's")
@pytest.mark.parametrize("name", ["text_encoder/config.json", "tokenizer/tokenizer.json"])
def test_a_pipe_in_a_text_encoders_folder_is_refused(tmp_path, name):
    from comfyui_skyreels.skyreels.text.load import load_text_encoder

    for file in ("config.json", "model.safetensors"):
        for part in ("text_encoder", "text_encoder_2"):
            (tmp_path / part).mkdir(exist_ok=True)
            (tmp_path / part / file).write_bytes(b"{}")
    for part in ("tokenizer", "tokenizer_2"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "tokenizer.json").write_bytes(b"{}")
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match="is a pipe"):
        load_text_encoder(tmp_path, runtime=RUNTIME)


# --- folders and shards -------------------------------------------------------------------------


def test_a_shard_names_the_folder_to_choose(tmp_path, diffusers):
    folder = tiny.save_sharded(tmp_path / "SkyReels", diffusers, {})
    shard = next(folder.glob("*-00002-of-00002.safetensors"))
    with pytest.raises(CheckpointError, match="is shard 2 of 2.*choose its folder, SkyReels"):
        load_transformer(shard, runtime=RUNTIME)
    assert is_shard(shard.name) and not is_shard("model-00001-of-00001.safetensors")
    torch.save({}, tmp_path / "pytorch_model-00001-of-00002.bin")
    with pytest.raises(CheckpointError, match="use the .safetensors files"):
        inspect(tmp_path / "pytorch_model-00001-of-00002.bin")


def test_a_part_of_a_gguf_file_is_to_be_joined_not_chosen_as_a_folder(tmp_path, state):
    path = tmp_path / "model-00001-of-00002.gguf"
    write(path, in_blocks(state), {"split.count": 2})
    with pytest.raises(CheckpointError, match="one of 2 parts of a GGUF file: join them"):
        inspect(path)


def test_advice_for_numbers_out_of_range_is_not_the_precision_they_are_in(tmp_path, state):
    wide = {**state, "img_in.proj.bias": state["img_in.proj.bias"].double() + 1e300}
    path = tiny.save(tmp_path / "x.safetensors", wide)
    for precision, fix in (
        ("fp32", "float32: use another file"),
        ("bf16", "choose precision fp32"),
    ):
        with pytest.raises(CheckpointError, match=fix):
            load_transformer(path, precision=precision, runtime=RUNTIME)


def test_shards_without_their_index_are_told(tmp_path, diffusers):
    folder = tiny.save_sharded(tmp_path / "f", diffusers, {})
    (folder / f"{MAIN}.index.json").unlink()
    with pytest.raises(CheckpointError, match="2 shards and no index.*download"):
        inspect(folder)


def as_cache(folder, files):
    """A folder of Hugging Face's cache, whose snapshots are links to blobs."""
    snapshot = folder / "snapshots" / "abc123"
    for name, write_to in files.items():
        blob = folder / "blobs" / name.replace("/", "-")
        write_to(blob)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc123")
    (folder / "snapshots" / "older").mkdir()
    return folder


def test_a_cache_folder_and_a_whole_model_hold_both_parts(tmp_path, state, diffusers):
    vae = tiny.randomize(VideoVAE(tiny.VAE)).state_dict()
    config = {**tiny.diffusers_config(tiny.TRANSFORMER), "rope_axes_dim": [2, 2, 12]}
    folder = as_cache(
        tmp_path / "models--Skywork--SkyReels",
        {
            f"transformer/{MAIN}": lambda path: tiny.save(path, diffusers),
            "transformer/config.json": lambda path: path.write_text(json.dumps(config)),
            f"vae/{MAIN}": lambda path: tiny.save(path, vae),
        },
    )
    for root in (folder, folder / "snapshots" / "abc123"):
        loaded = load_transformer(root, runtime=RUNTIME)
        assert loaded.config.rope_axes_dim == (2, 2, 12)
        assert torch.equal(loaded.img_in.proj.weight, state["img_in.proj.weight"])
        assert load_vae(root, runtime=RUNTIME).config == tiny.VAE
        with pytest.raises(CheckpointError, match="did you mean its folder transformer or vae"):
            inspect(root)


def test_a_single_file_takes_the_config_beside_it(tmp_path, diffusers):
    config = {"rope_axes_dim": [2, 2, 12]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in (MAIN, "diffusion_pytorch_model.fp16.safetensors"):
        path = tiny.save(tmp_path / name, diffusers)
        assert inspect(path).config.rope_axes_dim == (2, 2, 12)
    assert inspect(tmp_path).config.rope_axes_dim == (2, 2, 12)  # of both files the plain one


def test_variants_are_found_and_the_plain_one_is_preferred(tmp_path, diffusers):
    half = {name: tensor.half() for name, tensor in diffusers.items()}
    folder = tiny.save_sharded(tmp_path / "f", half, {})
    index = folder / f"{MAIN}.index.json"
    index.rename(folder / f"{MAIN}.index.fp16.json")
    assert list(inspect(folder).dtypes) == ["F16"]
    tiny.save(folder / MAIN, diffusers)
    assert list(inspect(folder).dtypes) == ["F32"]


def test_several_files_are_named_to_choose_from(tmp_path, state):
    for name in ("a", "b"):
        tiny.save(tmp_path / f"{name}.safetensors", state)
    with pytest.raises(CheckpointError, match=r"choose one of them, such as a\.safetensors"):
        inspect(tmp_path)


# --- words --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["\x1b[2J\x07", "a\nb\r\x00", "\u202egpj.exe", "\ud800", "\x9b31m"]
)
def test_what_a_terminal_obeys_is_escaped(text):
    assert shown(text).isprintable()
    assert shown("ä 中 😀") == "ä 中 😀"


def test_long_texts_lose_their_middle():
    assert shown("a" * 500 + "z", 30) == "a" * 20 + "..." + "a" * 9 + "z"
    assert len(shown("\x00" * 10**6)) <= 103
    assert len(str(CheckpointError("\x1b" * 10**6))) <= MAX_MESSAGE + 3


@pytest.mark.parametrize("name", ["\x1b[31m", "x" * 1_000_000], ids=["escape", "megabyte"])
def test_names_in_files_reach_messages_escaped_and_bounded(tmp_path, state, name):
    paths = [
        tiny.save(tmp_path / "a.safetensors", {**state, name: torch.ones(1)}),
        tiny.save(tmp_path / "b.safetensors", {name: torch.ones(1)}),
        tiny.write_header(tmp_path / "c.safetensors", {name: {"dtype": name}}),
        tiny.write_header(
            tmp_path / "d.safetensors",
            {name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 1]}},
        ),
        tmp_path / "e.pt",
    ]
    torch.save({**state, name: torch.ones(1)}, paths[-1])
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "x.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": name}})
    )
    for path in (*paths, tmp_path / "f"):
        with pytest.raises(CheckpointError) as refusal:
            load_transformer(path, runtime=RUNTIME)
        assert str(refusal.value).isprintable()
        assert len(str(refusal.value)) < 1000
        assert str(refusal.value).endswith(".")  # the advice is still there


def test_a_complete_file_of_another_model_is_not_to_be_downloaded_again(tmp_path, state):
    fewer = {name: tensor for name, tensor in state.items() if "img_mlp.fc1" not in name}
    cases = [
        {name: tensor for name, tensor in state.items() if name != "single_blocks.1.linear1.bias"},
        {**state, "other.weight": torch.ones(1)},
        fewer,
        {},
    ]
    for number, case in enumerate(cases):
        path = tiny.save(tmp_path / f"{number}.safetensors", case)
        with pytest.raises(CheckpointError) as refusal:
            load_transformer(path, runtime=RUNTIME)
        assert "download" not in str(refusal.value)


def test_kinds_of_files_are_told_apart(tmp_path, state):
    path = tiny.save(tmp_path / "x", {"a": torch.ones(1)})
    assert kind_of(path) == "safetensors"
    path.write_bytes(bytes(range(200, 255)))
    assert kind_of(path) == "unknown"
