"""GGUF files: what is read, kept and multiplied, and what is refused."""

import struct
from dataclasses import replace

import pytest
import torch
from comfyui_skyreels.skyreels.config import TransformerConfig
from comfyui_skyreels.skyreels.errors import CheckpointError
from comfyui_skyreels.skyreels.kernels.blocks import BLOCK_TYPES
from comfyui_skyreels.skyreels.plan import Job, plan_run, weights_as, weights_of
from comfyui_skyreels.skyreels.runtime import TorchRuntime
from comfyui_skyreels.skyreels.runtime.offload import weight_bytes
from comfyui_skyreels.skyreels.transformer.block_linear import BlockLinear
from comfyui_skyreels.skyreels.transformer.model import SkyReelsTransformer
from comfyui_skyreels.skyreels.transformer.quant import QuantLinear, dequantize
from comfyui_skyreels.skyreels.weights.inspect import inspect
from comfyui_skyreels.skyreels.weights.load import load_transformer
from support import tiny
from support.cards import card
from support.gguf_files import (
    Blocks,
    dequantized,
    gguf_bytes,
    in_blocks,
    random_blocks,
    text,
    value,
    write,
)

RUNTIME = TorchRuntime()
#: rows of whole blocks of 256 numbers, as the model's are
WIDE = replace(
    tiny.TRANSFORMER, attention_head_dim=128, num_layers=1, num_single_layers=1,
    num_refiner_layers=1, rope_axes_dim=(16, 56, 56),
)  # fmt: skip


@pytest.fixture(scope="module")
def mixed():
    return in_blocks(tiny.transformer(WIDE).state_dict(), BLOCK_TYPES)


@pytest.fixture(scope="module")
def mixed_file(mixed, tmp_path_factory):
    return write(tmp_path_factory.mktemp("gguf") / "mixed.gguf", mixed)


@pytest.fixture
def small():
    """Tensors of a tiny model in Q8_0."""
    return in_blocks(tiny.transformer().state_dict(), ["Q8_0"])


# --- numbers ------------------------------------------------------------------------------------


def test_a_model_of_every_type_computes_what_its_dequantized_weights_do(mixed, mixed_file):
    loaded = load_transformer(mixed_file, runtime=RUNTIME)
    layers = {n: m for n, m in loaded.named_modules() if isinstance(m, BlockLinear)}
    assert {layer.kind for layer in layers.values()} == set(BLOCK_TYPES)
    assert loaded.compute_dtype == torch.bfloat16
    for name, layer in layers.items():
        assert torch.equal(layer.weight, mixed[name + ".weight"].data)
    exact = SkyReelsTransformer(WIDE).eval().requires_grad_(False)
    exact.load_state_dict(dequantized(mixed))
    inputs = tiny.inputs(WIDE)
    with torch.inference_mode():
        assert tiny.relative_error(loaded.float()(**inputs), exact(**inputs)) <= 1e-5


def test_it_equals_the_safetensors_file_of_the_dequantized_weights(tmp_path, mixed, mixed_file):
    twin = tiny.save(tmp_path / "x.safetensors", dequantized(mixed))
    ours = load_transformer(mixed_file, precision="fp32", runtime=RUNTIME).state_dict()
    theirs = load_transformer(twin, precision="fp32", runtime=RUNTIME).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("precision", ["bf16", "fp8", "int8"])
def test_other_precisions_go_the_usual_way_from_the_dequantized_weights(tmp_path, small, precision):
    path = write(tmp_path / "x.gguf", small)
    twin = tiny.save(tmp_path / "x.safetensors", dequantized(small))
    ours, theirs = (
        load_transformer(each, precision=precision, runtime=RUNTIME) for each in (path, twin)
    )
    assert not any(isinstance(layer, BlockLinear) for layer in ours.modules())
    quantized = [layer for layer in ours.modules() if isinstance(layer, QuantLinear)]
    assert bool(quantized) == (precision != "bf16")
    for name, weight in theirs.state_dict().items():
        mine = ours.state_dict()[name]
        assert torch.equal(
            dequantize(mine, None, torch.float32), dequantize(weight, None, torch.float32)
        )


def test_names_and_parts_of_other_layouts_are_joined(tmp_path, small):
    state = dequantized(small)
    theirs = tiny.to_diffusers(state, tiny.TRANSFORMER)
    kinds = {"attn.to_q": "Q8_0", "attn.to_k": "Q8_0", "attn.to_v": "Q5_1"}
    stored = {}
    for name, tensor in theirs.items():
        kind = "Q8_0" if name.startswith("transformer_blocks") else kinds.get(name[-16:-7])
        is_weight = "_blocks." in name and tensor.ndim == 2 and "refiner" not in name
        stored[name] = random_blocks(kind, *tensor.shape) if is_weight and kind else tensor
    loaded = load_transformer(write(tmp_path / "x.gguf", stored), runtime=RUNTIME)
    assert isinstance(loaded.double_blocks[0].img_attn_qkv, BlockLinear)
    twin = tiny.save(tmp_path / "x.safetensors", dequantized(stored))
    exact = load_transformer(twin, precision="fp32", runtime=RUNTIME)
    inputs = tiny.inputs(tiny.TRANSFORMER)
    loaded = load_transformer(tmp_path / "x.gguf", precision="fp32", runtime=RUNTIME)
    with torch.inference_mode():
        assert torch.equal(loaded(**inputs), exact(**inputs))


def test_a_file_of_floats_loads_as_one_of_safetensors(tmp_path):
    state = tiny.transformer().state_dict()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        state = {name: tensor.to(dtype) for name, tensor in state.items()}
        ours = load_transformer(write(tmp_path / "x.gguf", state), runtime=RUNTIME)
        twin = tiny.save(tmp_path / "x.safetensors", state)
        theirs = load_transformer(twin, runtime=RUNTIME).state_dict()
        assert all(torch.equal(each, theirs[n]) for n, each in ours.state_dict().items())


# --- sizes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "total", "loop"), [("Q4_K", 7.74e9, 5.11e9), ("Q8_0", 13.97e9, 9.64e9)]
)
def test_full_size_weights_are_counted_and_an_8_gb_card_has_a_plan(kind, total, loop):
    weights = weights_as(TransformerConfig(), kind, "auto")
    assert 0.99 * total <= weights.total <= total
    assert 0.99 * loop <= weights.loop <= loop
    assert weights.is_dequantized
    plan = plan_run(card("RTX 4090", 8), Job(), weights)
    assert plan.fits
    assert (plan.streamed_bytes == 0) == (kind == "Q4_K")


def test_planned_sizes_are_those_of_the_loaded_model(tmp_path):
    stored = in_blocks(tiny.transformer(WIDE).state_dict(), ["Q4_K"])
    loaded = load_transformer(write(tmp_path / "x.gguf", stored), runtime=RUNTIME)
    made, planned = weights_of(loaded), weights_as(WIDE, "Q4_K", "auto")
    assert (made.blocks, made.outside, made.total) == (
        planned.blocks, planned.outside, planned.total,
    )  # fmt: skip
    assert made.total == weight_bytes(loaded)
    assert made.precision == "Q4_K blocks in bf16"
    assert inspect(tmp_path / "x.gguf").dtypes.keys() == {"Q4_K", "F32"}


# --- the container ------------------------------------------------------------------------------


def test_a_file_is_described_as_one_of_safetensors_is(tmp_path, small):
    prefixed = {"model.diffusion_model." + name: tensor for name, tensor in small.items()}
    values = {"general.architecture": "hyvid", "general.file_type": 7, "general.name": "x"}
    info = inspect(write(tmp_path / "x.gguf", prefixed, values))
    assert (info.family, info.variant, info.layout) == ("transformer", "skyreels-i2v", "original")
    assert (info.prefix, info.config) == ("model.diffusion_model.", tiny.TRANSFORMER)
    assert info.metadata["general.architecture"] == "hyvid"
    assert info.num_parameters == sum(t.numel() for t in tiny.transformer().state_dict().values())
    assert list(info.dtypes) == ["Q8_0", "F32"]
    assert len(info.tensors["img_in.proj.weight"].shape) == 5


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [32, 64])
def test_versions_and_alignments_are_read(tmp_path, small, version, alignment):
    path = write(tmp_path / "x.gguf", small, version=version, alignment=alignment)
    loaded = load_transformer(path, precision="fp32", runtime=RUNTIME).state_dict()
    for name, tensor in dequantized(small).items():
        assert torch.equal(loaded[name], tensor), name


def test_the_shape_in_the_values_counts_and_not_the_stored_one(tmp_path, small):
    shape = small["img_in.proj.weight"].shape
    shapes = {"img_in.proj.weight": (shape[0], shape[1:].numel())}
    path = write(tmp_path / "x.gguf", small, shapes=shapes)
    assert inspect(path).tensors["img_in.proj.weight"].shape == shape
    in_4_bits = dict(small)
    in_4_bits["img_in.proj.weight"] = Blocks(
        random_blocks("Q4_0", shape[0], 128).data, "Q4_0", shape
    )
    path = write(tmp_path / "y.gguf", in_4_bits, shapes=shapes)
    loaded = load_transformer(path, precision="fp32", runtime=RUNTIME)
    assert torch.equal(loaded.img_in.proj.weight, in_4_bits["img_in.proj.weight"].floats())


def test_arrays_beside_the_tensors_are_passed_over(tmp_path, small):
    raw = gguf_bytes(small, {"a": 1, "b": "c"})
    words = struct.pack("<IIQ", 9, 8, 2) + text("one") + text("two")
    more = text("tokenizer.ggml.tokens") + words + text("scores")
    more += struct.pack("<IIQ3f", 9, 6, 3, 0.5, 1, 2)
    begin = 24 + len(value("a", 1) + value("b", "c"))
    path = tmp_path / "x.gguf"
    more += value("z", "z" * (-(len(more) + len(value("z", ""))) % 32))  # the data stays aligned
    grown = raw[:8] + struct.pack("<QQ", len(small), 5) + raw[24:begin] + more + raw[begin:]
    path.write_bytes(grown)
    assert set(inspect(path).metadata) == {"b", "z"}


def test_an_unfinished_conversion_is_told(tmp_path, small):
    del small["img_in.proj.weight"]
    path = write(tmp_path / "x.gguf", small)
    with pytest.raises(CheckpointError, match=r"lacks tensor img_in\.proj\.weight.*unfinished"):
        inspect(path)


def test_a_text_encoder_is_named(tmp_path):
    tensors = {"token_embd.weight": torch.zeros(4, 32), "blk.0.attn_q.weight": torch.zeros(4, 32)}
    path = write(tmp_path / "x.gguf", tensors, {"general.architecture": "llama"})
    assert inspect(path).family == "llama"
    with pytest.raises(CheckpointError, match="is a LLaMA text encoder"):
        load_transformer(path, runtime=RUNTIME)


def patched(raw: bytes, at: int, layout: str, number: int) -> bytes:
    new = struct.pack(layout, number)
    return raw[:at] + new + raw[at + len(new) :]


def one_value(content: bytes) -> bytes:
    """A file without tensors, whose only value is this."""
    return RAW[:8] + struct.pack("<QQ", 0, 1) + text("k") + content


ONE = {"a": torch.ones(2, 32), "b": torch.ones(8)}
RAW = gguf_bytes(ONE)
#: of the first tensor in the table
NAME = RAW.index(text("a"))
DAMAGES = {
    "version 1": (patched(RAW, 4, "<I", 1), "version 1, and versions 2 and 3"),
    "big-endian": (patched(RAW, 4, ">I", 3), "big-endian"),
    "2^63 tensors": (patched(RAW, 8, "<Q", 2**63), "announces 9223372036854775808 tensors"),
    "2^40 values": (patched(RAW, 16, "<Q", 2**40), "announces 1099511627776 values"),
    "a long key": (patched(RAW, 24, "<Q", 2**60), "a name or text of 1152921504606846976 bytes"),
    "a long name": (patched(RAW, NAME, "<Q", 60_000), "its table needs 60000 bytes"),
    "dimensions": (patched(RAW, NAME + 9, "<I", 2**31), "2147483648 dimensions"),
    "a huge shape": (patched(RAW, NAME + 13, "<Q", 2**62), "truncated"),
    "a type": (patched(RAW, NAME + 29, "<I", 77), "stores a in GGUF type 77"),
    "cut blocks": (patched(RAW, NAME + 29, "<I", 12), "not whole blocks of 256"),
    "not aligned": (patched(RAW, NAME + 33, "<Q", 8), "starts at byte 8"),
    "overlapping": (patched(RAW, RAW.index(text("b")) + 25, "<Q", 32), "starts at byte 32"),
    "behind the end": (patched(RAW, NAME + 33, "<Q", 2**40), "truncated"),
    "twice": (RAW.replace(text("b"), text("a")), "appears twice"),
    "a value's type": (RAW.replace(b"architecture\x08", b"architecture\x63"), "a value of type 99"),
    "alignment": (gguf_bytes(ONE, {"general.alignment": 48}), "an alignment of 48"),
    "a split file": (gguf_bytes(ONE, {"split.count": 3}), "one of 3 parts"),
    "a shape that does not fit": (
        gguf_bytes(ONE, {"comfy.gguf.orig_shape.a": [3, 7]}), r"\[2, 32\] is called \[3, 7\]",
    ),
    "an array of arrays": (one_value(struct.pack("<IIQ", 9, 9, 1)), "array of type 9"),
    "a long array": (one_value(struct.pack("<IIQ", 9, 6, 2**61)), "its table needs"),
    "many texts": (one_value(struct.pack("<IIQ", 9, 8, 2**61)), "announces 2305843009213693952"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_table_is_refused_by_what_is_wrong(tmp_path, name):
    raw, why = DAMAGES[name]
    path = tmp_path / "x.gguf"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=why):
        inspect(path)


def test_a_file_that_is_cut_anywhere_is_refused(tmp_path):
    path = tmp_path / "x.gguf"
    for length in (*range(1, len(RAW), 5), len(RAW) - 1):
        path.write_bytes(RAW[:length])
        with pytest.raises(CheckpointError, match="damaged|truncated|not a weight file|download"):
            inspect(path)


def test_an_infinite_factor_is_refused_by_the_tensors_name(tmp_path, small):
    name = "single_blocks.1.linear2.weight"
    small[name].data[3, 34:36] = torch.tensor([0, 124], dtype=torch.uint8)
    path = write(tmp_path / "x.gguf", small)
    with pytest.raises(
        CheckpointError, match=r"NaN or infinity in tensor single_blocks\.1\.linear2"
    ):
        load_transformer(path, runtime=RUNTIME)
