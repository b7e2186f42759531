"""Headers: what is recognised, how fast, and what is refused."""

import json
import struct
import time
import tracemalloc

import pytest
import torch
from comfyui_skyreels.skyreels.config import TransformerConfig, VAEConfig
from comfyui_skyreels.skyreels.errors import CheckpointError
from comfyui_skyreels.skyreels.transformer.model import SkyReelsTransformer
from comfyui_skyreels.skyreels.vae.model import VideoVAE
from comfyui_skyreels.skyreels.weights.inspect import inspect, read_header, require, rope_axes
from comfyui_skyreels.skyreels.weights.keymaps import PREFIXES
from support import tiny


@pytest.fixture(scope="module")
def full_size_state():
    with torch.device("meta"):
        return SkyReelsTransformer(TransformerConfig()).state_dict()


def least_time(work) -> float:
    """Of three tries: what disturbs one of them is not the work's."""
    times = []
    for _ in range(3):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def header_of(path):
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length))


def test_full_size_file_is_described_at_the_cost_of_its_header(tmp_path, full_size_state):
    path = tiny.sparse_file(tmp_path / "anything.safetensors", full_size_state)
    assert path.stat().st_size > 25.6e9
    # 5 to 8 times as long as to parse it; a look at the 25 GB would be thousands of times
    assert least_time(lambda: inspect(path)) < 40 * least_time(lambda: header_of(path))
    info = inspect(path)
    assert (info.family, info.variant, info.layout) == ("transformer", "skyreels-i2v", "original")
    assert info.num_tensors == 856
    assert info.num_parameters == 12_821_209_152
    assert info.dtypes == {"BF16": 12_821_209_152}
    assert info.guidance_embeds
    assert info.config == TransformerConfig()


def test_full_size_sharded_folder_is_described_from_its_index(tmp_path, full_size_state):
    state = tiny.to_diffusers(full_size_state, TransformerConfig())
    names = list(state)
    weight_map = {}
    for shard in range(6):
        part = {name: state[name] for name in names[shard::6]}
        file = f"diffusion_pytorch_model-{shard + 1:05d}-of-00006.safetensors"
        tiny.sparse_file(tmp_path / file, part)
        weight_map.update(dict.fromkeys(part, file))
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    headers = [index, *tmp_path.glob("*.safetensors")]

    def parse() -> None:
        for path in headers:
            json.loads(path.read_text()) if path == index else header_of(path)

    assert least_time(lambda: inspect(tmp_path)) < 40 * least_time(parse)
    info = inspect(tmp_path)
    assert (info.layout, info.num_tensors, info.config) == ("diffusers", 1264, TransformerConfig())


@pytest.mark.parametrize("prefix", PREFIXES)
def test_every_prefix_is_stripped(tmp_path, prefix):
    state = {prefix + k: v for k, v in tiny.transformer().state_dict().items()}
    info = inspect(tiny.save(tmp_path / "vae.safetensors", state))
    assert (info.family, info.prefix, info.config) == ("transformer", prefix, tiny.TRANSFORMER)


def test_other_models_in_the_same_file_are_left_out(tmp_path):
    state = {"model.diffusion_model." + k: v for k, v in tiny.transformer().state_dict().items()}
    state["cond_stage_model.logit_scale"] = torch.ones(1)
    info = inspect(tiny.save(tmp_path / "all_in_one.safetensors", state))
    assert "cond_stage_model.logit_scale" not in info.tensors


@pytest.mark.parametrize(
    ("channels", "variant"), [(16, "t2v"), (32, "skyreels-i2v"), (33, "tencent-i2v")]
)
def test_variant_is_read_from_the_input_channels(tmp_path, channels, variant):
    config = TransformerConfig(**{**tiny.TRANSFORMER.__dict__, "in_channels": channels})
    model = SkyReelsTransformer(config)
    assert inspect(tiny.save(tmp_path / "x.safetensors", model.state_dict())).variant == variant


def test_missing_guidance_embedding_is_noticed(tmp_path):
    config = TransformerConfig(**{**tiny.TRANSFORMER.__dict__, "guidance_embeds": False})
    state = SkyReelsTransformer(config).state_dict()
    info = inspect(tiny.save(tmp_path / "x.safetensors", state))
    assert not info.guidance_embeds


def test_dtypes_and_scales_are_counted(tmp_path):
    state = dict(tiny.transformer().state_dict())
    name = "double_blocks.0.img_attn_qkv"
    state[name + ".weight"] = state[name + ".weight"].to(torch.float8_e4m3fn)
    state[name + ".scale_weight"] = torch.tensor(0.5)
    state["scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    info = inspect(tiny.save(tmp_path / "x.safetensors", state))
    assert info.scales == "v0 per tensor"
    assert info.dtypes["F8_E4M3"] == state[name + ".weight"].numel()
    state[name + ".weight_scale"] = torch.ones(96, 1)
    del state[name + ".scale_weight"]
    info = inspect(tiny.save(tmp_path / "y.safetensors", state))
    assert info.scales == "v1 per row"


def test_vae_is_recognised_with_its_sizes(tmp_path):
    info = inspect(tiny.save(tmp_path / "x.safetensors", VideoVAE(tiny.VAE).state_dict()))
    assert (info.family, info.layout, info.config) == ("vae", "diffusers", tiny.VAE)


def test_full_size_vae_is_the_default_config(tmp_path):
    with torch.device("meta"):
        state = VideoVAE(VAEConfig()).state_dict()
    info = inspect(tiny.sparse_file(tmp_path / "x.safetensors", state))
    assert (info.config, info.num_parameters) == (VAEConfig(), 246_478_803)


@pytest.mark.parametrize(
    ("names", "family", "fix"),
    [
        (["model.layers.0.self_attn.q_proj.weight"], "llama", "load it as a text encoder"),
        (
            ["text_model.encoder.layers.0.self_attn.q_proj.weight"],
            "clip",
            "load it as a text encoder",
        ),
        (["encoder.block.0.layer.0.SelfAttention.q.weight"], "t5", "does not use it"),
        (
            ["diffusion_model.double_blocks.0.img_attn_qkv.lora_A.weight"],
            "lora",
            "modifies a model",
        ),
        (["double_blocks.0.img_attn.qkv.weight", "img_in.weight"], "unknown", "img_in.weight"),
    ],
)
def test_file_of_another_family_is_named_with_the_fix(tmp_path, names, family, fix):
    path = tiny.save(tmp_path / "x.safetensors", {name: torch.zeros(2, 2) for name in names})
    info = inspect(path)
    assert info.family == family
    with pytest.raises(CheckpointError, match=fix):
        require(info, "transformer")


def test_vae_in_the_transformer_slot_is_named(tmp_path):
    info = inspect(tiny.save(tmp_path / "x.safetensors", VideoVAE(tiny.VAE).state_dict()))
    with pytest.raises(CheckpointError, match="HunyuanVideo VAE.*load it as the VAE"):
        require(info, "transformer")


def test_every_flipped_header_bit_is_reported_or_harmless(tmp_path):
    path = tiny.save(tmp_path / "x.safetensors", {"a": torch.ones(2, 3), "b": torch.ones(4)})
    good = path.read_bytes()
    header_end = 8 + struct.unpack("<Q", good[:8])[0]
    before, _ = read_header(path)
    refused = 0
    for bit in range(header_end * 8):
        damaged = bytearray(good)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            after, _ = read_header(path)
        except CheckpointError as error:
            assert "download" in str(error)
            refused += 1
            continue
        # what still parses describes the same bytes: at most a name or a dtype's twin changed
        assert sorted(e.num_bytes for e in after.values()) == sorted(
            e.num_bytes for e in before.values()
        )
    assert refused > header_end * 8 * 0.7


@pytest.mark.parametrize("keep", [0, 4, 8, 40, -1])
def test_truncated_file_is_reported(tmp_path, keep):
    path = tiny.save(tmp_path / "x.safetensors", {"a": torch.ones(2, 3)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="download it again"):
        inspect(path)


def test_longer_file_than_promised_is_reported(tmp_path):
    path = tiny.save(tmp_path / "x.safetensors", {"a": torch.ones(2, 3)})
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(CheckpointError, match="describes"):
        inspect(path)


def test_huge_header_is_refused_without_reading_it(tmp_path):
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 10**12))
        file.truncate(2 * 10**8)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="1000000000000"):
            inspect(path)
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "value",
    [
        {"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 15]},
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [4, 20]},
        {"dtype": "F32", "shape": [2.0, 2], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [2, 2]},
        [1, 2],
    ],
)
def test_impossible_tensor_entry_is_refused(tmp_path, value):
    path = tiny.write_header(tmp_path / "x.safetensors", {"a": value}, 16)
    with pytest.raises(CheckpointError, match="damaged header"):
        inspect(path)


def test_a_dtype_of_another_package_is_named(tmp_path):
    entry = {"dtype": "F4", "shape": [2, 16], "data_offsets": [0, 16]}
    path = tiny.write_header(tmp_path / "x.safetensors", {"a": entry}, 16)
    with pytest.raises(CheckpointError, match="stores a as F4, which this package cannot read"):
        inspect(path)


def test_doubled_name_is_refused(tmp_path):
    entry = b'"a":{"dtype":"F32","shape":[1],"data_offsets":[%d,%d]}'
    raw = b"{" + entry % (0, 4) + b"," + entry % (4, 8) + b"}"
    with pytest.raises(CheckpointError, match="twice"):
        inspect(tiny.write_header(tmp_path / "x.safetensors", raw, 8))


def test_folder_without_index_is_explained(tmp_path):
    (tmp_path / "transformer").mkdir()
    with pytest.raises(CheckpointError, match="one index.*transformer"):
        inspect(tmp_path)


def test_folder_that_lacks_a_shard_names_it(tmp_path):
    state = tiny.to_diffusers(tiny.transformer().state_dict(), tiny.TRANSFORMER)
    folder = tiny.save_sharded(tmp_path / "f", state, {})
    (folder / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="00002-of-00002"):
        inspect(folder)


def test_index_that_points_outside_its_folder_is_refused(tmp_path):
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    tiny.save(tmp_path.parent / "other.safetensors", {"a": torch.ones(1)})
    with pytest.raises(CheckpointError, match="outside its folder"):
        inspect(tmp_path)


def test_missing_gguf_and_pickle_with_code_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        inspect(tmp_path / "nothing.safetensors")
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="GGUF"):
        inspect(tmp_path / "x.gguf")
    torch.save({"state_dict": print}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="plain weights"):
        inspect(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("head_dim", "axes"), [(128, (16, 56, 56)), (64, (8, 28, 28)), (32, (4, 14, 14))]
)
def test_rotary_axes_keep_the_proportions(head_dim, axes):
    assert rope_axes(head_dim) == axes
    assert sum(rope_axes(head_dim)) == head_dim
