"""Every format gives the same weights; what does not fit is refused before anything is read."""

import io
import json
import math
import os
import queue
import sys
import threading
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from comfyui_skyreels.skyreels.config import TransformerConfig
from comfyui_skyreels.skyreels.errors import CheckpointError, OptionError
from comfyui_skyreels.skyreels.runtime import TorchRuntime
from comfyui_skyreels.skyreels.transformer.model import SkyReelsTransformer
from comfyui_skyreels.skyreels.transformer.quant import QuantLinear, dequantize, quantize
from comfyui_skyreels.skyreels.vae.model import VideoVAE
from comfyui_skyreels.skyreels.weights import load
from comfyui_skyreels.skyreels.weights.inspect import inspect
from comfyui_skyreels.skyreels.weights.keymaps import (
    PREFIXES,
    common_spelling,
    transformer_sources,
    vae_sources,
)
from comfyui_skyreels.skyreels.weights.load import load_transformer, load_vae
from support import tiny
from support.forked import forks

RUNTIME = TorchRuntime()
E4M3 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def model():
    return tiny.transformer()


@pytest.fixture(scope="module")
def state(model):
    return model.state_dict()


def assert_same(module: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    loaded = module.state_dict()
    assert loaded.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(loaded[name], tensor), name


# --- layouts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", PREFIXES)
def test_original_names_with_any_prefix_load_exactly(tmp_path, state, prefix):
    path = tiny.save(tmp_path / "x.safetensors", {prefix + k: v for k, v in state.items()})
    assert_same(load_transformer(path, runtime=RUNTIME), state)


@pytest.mark.parametrize("respelled", [0, 1, 2], ids=["scale", "both", "weight"])
def test_comfyui_names_load_exactly_in_every_versions_spelling(tmp_path, state, respelled):
    """ComfyUI 0.33 calls the norms of queries and keys a weight, before they were a scale."""
    norms = [[], ["query_norm.scale"], ["_norm.scale"]][respelled]
    theirs = {
        name.replace(norms[0], norms[0].replace("scale", "weight")) if norms else name: tensor
        for name, tensor in tiny.to_comfyui(state).items()
    }
    path = tiny.save(tmp_path / "x.safetensors", theirs)
    assert inspect(path).layout == "comfyui"
    assert_same(load_transformer(path, runtime=RUNTIME), state)


def test_sharded_diffusers_folder_loads_exactly(tmp_path, model, state):
    theirs = tiny.diffusers_transformer(model)
    theirs.save_pretrained(tmp_path / "f", max_shard_size="200KB")
    assert len(list((tmp_path / "f").glob("*.safetensors"))) > 1
    assert_same(load_transformer(tmp_path / "f", runtime=RUNTIME), state)


def test_single_diffusers_file_loads_exactly(tmp_path, state):
    path = tiny.save(tmp_path / "x.safetensors", tiny.to_diffusers(state, tiny.TRANSFORMER))
    assert_same(load_transformer(path, runtime=RUNTIME), state)


def test_loaded_folder_computes_what_diffusers_computes(tmp_path, model):
    theirs = tiny.diffusers_transformer(model)
    theirs.save_pretrained(tmp_path)
    inputs = tiny.inputs(model.config)
    mask = torch.ones(inputs["encoder_hidden_states"].shape[:2])
    expected = theirs(**inputs, encoder_attention_mask=mask, return_dict=False)[0]
    ours = load_transformer(tmp_path, runtime=RUNTIME)(**inputs)
    assert tiny.relative_error(ours, expected) <= 1e-5


def test_pickled_transformer_loads_exactly(tmp_path, state):
    torch.save({"module": {"model." + k: v for k, v in state.items()}}, tmp_path / "x.pt")
    assert_same(load_transformer(tmp_path / "x.pt", runtime=RUNTIME), state)


def test_unusual_rotary_axes_come_from_the_folder_config(tmp_path, model):
    config = {**tiny.diffusers_config(model.config), "rope_axes_dim": [2, 2, 12]}
    state = tiny.to_diffusers(model.state_dict(), model.config)
    folder = tiny.save_sharded(tmp_path / "f", state, config)
    loaded = load_transformer(folder, runtime=RUNTIME)
    assert loaded.config.rope_axes_dim == (2, 2, 12)


@pytest.mark.parametrize("layout", ["original", "comfyui", "diffusers"])
def test_full_size_names_all_land_with_their_shapes(layout):
    """856 and 1264 names; the split ones against diffusers' own converter and model."""
    with torch.device("meta"):
        ours = SkyReelsTransformer(TransformerConfig()).state_dict()
    names = [n for name in ours for n in transformer_sources(name, layout)]
    assert len(names) == len(set(names)) == {"diffusers": 1264}.get(layout, 856)
    if layout != "diffusers":
        return
    from diffusers import HunyuanVideoTransformer3DModel
    from diffusers.loaders.single_file_utils import (
        convert_hunyuan_video_transformer_to_diffusers,
    )

    with torch.device("meta"):
        theirs = HunyuanVideoTransformer3DModel(in_channels=32).state_dict()
        converted = convert_hunyuan_video_transformer_to_diffusers(dict(ours))
    split = tiny.to_diffusers(ours, TransformerConfig())
    shapes = {name: tensor.shape for name, tensor in theirs.items()}
    assert {name: tensor.shape for name, tensor in converted.items()} == shapes
    assert {name: tensor.shape for name, tensor in split.items()} == shapes


def test_comfyui_names_are_the_documented_ones():
    refiner = "txt_in.individual_token_refiner.blocks.1"
    expected = {
        "double_blocks.3.img_mod.linear.bias": "double_blocks.3.img_mod.lin.bias",
        "double_blocks.3.txt_attn_q_norm.weight": "double_blocks.3.txt_attn.norm.query_norm.scale",
        "double_blocks.3.img_attn_qkv.weight": "double_blocks.3.img_attn.qkv.weight",
        "double_blocks.3.img_mlp.fc2.weight": "double_blocks.3.img_mlp.2.weight",
        "single_blocks.7.k_norm.weight": "single_blocks.7.norm.key_norm.scale",
        "single_blocks.7.modulation.linear.weight": "single_blocks.7.modulation.lin.weight",
        "single_blocks.7.linear1.weight": "single_blocks.7.linear1.weight",
        "time_in.mlp.0.weight": "time_in.in_layer.weight",
        "vector_in.in_layer.weight": "vector_in.in_layer.weight",
        "txt_in.t_embedder.mlp.2.bias": "txt_in.t_embedder.out_layer.bias",
        "txt_in.c_embedder.linear_1.bias": "txt_in.c_embedder.in_layer.bias",
        f"{refiner}.self_attn_qkv.bias": f"{refiner}.self_attn.qkv.bias",
        f"{refiner}.mlp.fc1.bias": f"{refiner}.mlp.0.bias",
        "final_layer.adaLN_modulation.1.bias": "final_layer.adaLN_modulation.1.bias",
    }
    assert {ours: transformer_sources(ours, "comfyui")[0] for ours in expected} == expected
    later = {name.replace("_norm.scale", "_norm.weight") for name in expected.values()}
    assert {common_spelling(name) for name in later} == set(expected.values())


# --- 8 bits -------------------------------------------------------------------------------------


def plain_fp8(state):
    return {k: v.to(E4M3) if in_8_bits(k, v) else v for k, v in state.items()}


def in_8_bits(name, tensor):
    """What such files hold in 8 bits: every linear of the blocks but the modulations."""
    return "_blocks." in name and "mod" not in name and tensor.ndim == 2


def scaled_fp8(state, version: str, per_row: bool):
    """fp8 weights with scales, and the weights they stand for."""
    suffix = {"v0": ".scale_weight", "v1": ".weight_scale"}[version]
    stored, meant = {}, {}
    for name, tensor in state.items():
        stored[name] = meant[name] = tensor
        if in_8_bits(name, tensor):
            absmax = tensor.abs().amax(1, keepdim=True) if per_row else tensor.abs().amax()
            scale = absmax / 448
            stored[name] = (tensor / scale).to(E4M3)
            stored[name.removesuffix(".weight") + suffix] = scale
            meant[name] = (stored[name].float() * scale).to(tensor.dtype)
    if version == "v0":
        stored["scaled_fp8"] = torch.zeros(2, dtype=E4M3)
    else:
        quant = torch.tensor(list(b'{"format":"float8_e4m3fn"}'), dtype=torch.uint8)
        stored["double_blocks.0.img_attn_qkv.comfy_quant"] = quant
    return stored, meant


def widened(layer) -> torch.Tensor:
    return dequantize(layer.weight, layer.weight_scale, torch.float32, layer.hadamard_block)


def dense(module) -> dict[str, torch.Tensor]:
    """The weights a module computes with, 8-bit ones widened."""
    state = {k: v for k, v in module.state_dict().items() if not k.endswith("weight_scale")}
    for name, layer in module.named_modules():
        if isinstance(layer, QuantLinear):
            state[name + ".weight"] = widened(layer)
    return state


def test_plain_fp8_keeps_the_stored_values(tmp_path, state):
    stored = plain_fp8(state)
    loaded = load_transformer(tiny.save(tmp_path / "x.safetensors", stored), runtime=RUNTIME)
    assert isinstance(loaded.double_blocks[0].img_attn_qkv, QuantLinear)
    for name, tensor in dense(loaded).items():
        assert torch.equal(tensor.float(), stored[name].to(loaded.compute_dtype).float()), name


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("version", ["v0", "v1"])
def test_scaled_fp8_gives_the_meant_weights(tmp_path, state, version, per_row):
    stored, meant = scaled_fp8(state, version, per_row)
    path = tiny.save(tmp_path / "x.safetensors", stored)
    assert inspect(path).scales == f"{version} per {'row' if per_row else 'tensor'}"
    loaded = load_transformer(path, runtime=RUNTIME)
    assert isinstance(loaded.single_blocks[1].linear2, QuantLinear)
    for name, tensor in dense(loaded).items():
        assert torch.equal(tensor, meant[name]), name


@pytest.mark.parametrize("version", ["v0", "v1"])
def test_scales_follow_the_parts_of_a_fused_weight(tmp_path, state, version):
    """diffusers names: q, k and v are scaled one by one and fused while loading."""
    split = tiny.to_diffusers(state, tiny.TRANSFORMER)
    suffix = {"v0": ".scale_weight", "v1": ".weight_scale"}[version]
    stored, meant = {}, {}
    for name, tensor in split.items():
        stored[name] = meant[name] = tensor
        if ".attn." in name and name.endswith(".weight") and tensor.ndim == 2:
            scale = tensor.abs().amax() / 448
            stored[name] = (tensor / scale).to(E4M3)
            stored[name.removesuffix(".weight") + suffix] = scale
            meant[name] = stored[name].float() * scale
    path = tiny.save(tmp_path / "x.safetensors", stored)
    loaded = load_transformer(path, precision="fp32", runtime=RUNTIME)
    assert_same(
        loaded,
        {
            name: torch.cat([meant[part] for part in transformer_sources(name, "diffusers")])
            if "adaLN" not in name or "final" not in name
            else tensor
            for name, tensor in state.items()
        },
    )


def test_fp8_file_in_another_precision_is_widened(tmp_path, state):
    stored, meant = scaled_fp8(state, "v0", per_row=False)
    path = tiny.save(tmp_path / "x.safetensors", stored)
    assert_same(load_transformer(path, precision="fp32", runtime=RUNTIME), meant)


@pytest.mark.parametrize("dtype", [E4M3, torch.float8_e5m2])
@pytest.mark.parametrize("precision", ["auto", "int8"])
def test_a_device_without_float8_gets_none_and_is_told_once(
    tmp_path, state, monkeypatch, caplog, dtype, precision
):
    stored = {k: v.to(dtype) if in_8_bits(k, v) else v.bfloat16() for k, v in state.items()}
    path = tiny.save(tmp_path / "x.safetensors", stored)
    monkeypatch.setattr(load, "holds_float8", lambda device: False)
    loaded = load_transformer(path, precision=precision, runtime=RUNTIME)
    dtypes = {tensor.dtype for tensor in loaded.state_dict().values()}
    assert dtypes == {torch.bfloat16} | (
        {torch.int8, torch.float32} if precision == "int8" else set()
    )
    if precision == "auto":
        wide = {k: v.bfloat16() for k, v in stored.items()}
        assert_same(loaded, wide)
    (message,) = caplog.messages
    assert "fp8, which cpu cannot hold: they are dequantized to bfloat16" in message
    with pytest.raises(OptionError, match="choose int8 or bf16"):
        load_transformer(path, precision="fp8", runtime=RUNTIME)


@pytest.mark.parametrize(
    ("error", "holds"),
    [
        (TypeError("Trying to convert Float8_e4m3fn to the MPS backend"), False),
        (RuntimeError("float8 is not supported"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), None),
        (None, True),
    ],
)
def test_whether_a_device_holds_float8_is_tried_and_a_full_one_is_no_answer(
    monkeypatch, error, holds
):
    class Numbers:
        def to(self, *where):
            if error is not None:
                raise error
            return self

    load.holds_float8.cache_clear()
    monkeypatch.setattr(load.torch, "zeros", lambda *args, **options: Numbers())
    try:
        if holds is None:
            with pytest.raises(torch.OutOfMemoryError):
                load.holds_float8(torch.device("mps"))
        else:
            assert load.holds_float8(torch.device("mps")) == holds
    finally:
        load.holds_float8.cache_clear()


@pytest.mark.parametrize(("precision", "bound"), [("fp8", 0.03), ("int8", 0.01)])
def test_rounding_to_8_bits_stays_within_its_bound(tmp_path, state, precision, bound):
    path = tiny.save(tmp_path / "x.safetensors", state)
    loaded = load_transformer(path, precision=precision, runtime=RUNTIME)
    quantized = {n: m for n, m in loaded.named_modules() if isinstance(m, QuantLinear)}
    # of two double blocks the image streams only, and of the last one only the MLP
    assert len(quantized) == 4 + 2 + 2 * 2
    for name, layer in quantized.items():
        weight = state[name + ".weight"]
        assert (widened(layer) - weight).norm() / weight.norm() <= bound, name
        assert layer.hadamard_block == (32 if precision == "int8" else 0)
        assert layer.input_format == (layer.weight.dtype, layer.hadamard_block)
        assert layer.compute_dtype == torch.bfloat16


def test_quantised_model_computes_nearly_the_same(tmp_path, model, state):
    path = tiny.save(tmp_path / "x.safetensors", state)
    inputs = tiny.inputs(model.config)
    expected = model(**inputs)
    for precision, bound in (("bf16", 0.03), ("int8", 0.04), ("fp8", 0.12)):
        loaded = load_transformer(path, precision=precision, runtime=RUNTIME)
        error = (loaded(**inputs).float() - expected).norm() / expected.norm()
        assert error <= bound, (precision, error)


def codes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8)


@pytest.mark.parametrize("per_row", [False, True, None])
def test_fp8_files_are_multiplied_in_8_bits_as_they_are_when_asked(tmp_path, state, per_row):
    stored = plain_fp8(state) if per_row is None else scaled_fp8(state, "v0", per_row)[0]
    path = tiny.save(tmp_path / "x.safetensors", stored)
    for precision, weight_only in (("auto", True), ("fp8", False)):
        loaded = load_transformer(path, precision=precision, runtime=RUNTIME)
        layer = loaded.single_blocks[1].linear2
        assert torch.equal(codes(layer.weight), codes(stored["single_blocks.1.linear2.weight"]))
        assert layer.weight_only == weight_only
        assert (layer.input_format is None) == weight_only
        kept = loaded.double_blocks[0].txt_mlp.fc1  # keeps its bytes, but is not multiplied in 8
        assert kept.weight.dtype == E4M3
        assert kept.input_format is None


def test_e5m2_files_stay_what_they_are(tmp_path, state):
    stored = {k: v.to(torch.float8_e5m2) if in_8_bits(k, v) else v for k, v in state.items()}
    path = tiny.save(tmp_path / "x.safetensors", stored)
    layer = load_transformer(path, precision="fp8", runtime=RUNTIME).single_blocks[0].linear1
    assert torch.equal(codes(layer.weight), codes(stored["single_blocks.0.linear1.weight"]))
    assert layer.input_format is None


def test_int8_files_of_others_are_not_rotated_and_so_only_widened(tmp_path, state):
    name = "single_blocks.0.linear1"
    stored = dict(state)
    stored[f"{name}.weight"], stored[f"{name}.weight_scale"] = quantize(
        state[f"{name}.weight"], torch.int8
    )
    path = tiny.save(tmp_path / "x.safetensors", stored)
    for precision in ("auto", "int8"):
        loaded = load_transformer(path, precision=precision, runtime=RUNTIME)
        layer = loaded.get_submodule(name)
        assert torch.equal(layer.weight, stored[f"{name}.weight"])
        assert (layer.hadamard_block, layer.input_format) == (0, None)


def test_fp8_file_is_rotated_and_rounded_anew_for_int8(tmp_path, state):
    stored, meant = scaled_fp8(state, "v0", per_row=False)
    path = tiny.save(tmp_path / "x.safetensors", stored)
    layer = load_transformer(path, precision="int8", runtime=RUNTIME).single_blocks[0].linear1
    weight = meant["single_blocks.0.linear1.weight"]
    assert layer.input_format == (torch.int8, 32)
    assert (widened(layer) - weight).norm() / weight.norm() <= 0.01


def test_half_precision_file_computes_in_bf16(tmp_path, state):
    path = tiny.save(tmp_path / "x.safetensors", {k: v.half() for k, v in state.items()})
    assert load_transformer(path, runtime=RUNTIME).compute_dtype == torch.bfloat16


# --- VAE ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vae_state():
    return tiny.randomize(VideoVAE(tiny.VAE)).state_dict()


def to_sd(state):
    converted = {}
    for name, tensor in state.items():
        if "attentions" in name and tensor.ndim == 2:
            tensor = tensor[..., None, None, None]
        converted[vae_sources(name, "sd", 4)[0]] = tensor
    return converted


def test_vae_in_both_layouts_loads_exactly(tmp_path, vae_state):
    assert_same(
        load_vae(tiny.save(tmp_path / "a.safetensors", vae_state), runtime=RUNTIME), vae_state
    )
    sd = to_sd(vae_state)
    assert "decoder.mid.attn_1.proj_out.weight" in sd
    assert "decoder.up.3.block.0.norm1.weight" in sd
    assert "encoder.down.0.downsample.conv.conv.weight" in sd
    assert_same(load_vae(tiny.save(tmp_path / "b.safetensors", sd), runtime=RUNTIME), vae_state)


@pytest.mark.parametrize("nest", [None, "state_dict", "model"])
def test_vae_from_a_pickle_loads_exactly(tmp_path, vae_state, nest):
    content = {"vae." + k: v for k, v in vae_state.items()}
    torch.save({nest: content} if nest else content, tmp_path / "pytorch_model.pt")
    assert_same(load_vae(tmp_path / "pytorch_model.pt", runtime=RUNTIME), vae_state)


def test_full_size_vae_names_map_one_to_one():
    with torch.device("meta"):
        from comfyui_skyreels.skyreels.config import VAEConfig

        state = VideoVAE(VAEConfig()).state_dict()
    names = {vae_sources(name, "sd", 4)[0] for name in state}
    assert len(names) == len(state) == 248
    assert {"decoder.up.3.block.0.nin_shortcut.conv.weight"} & names == set()
    assert "decoder.up.0.block.0.nin_shortcut.conv.weight" in names


def test_vae_of_unusual_width_asks_for_its_config(tmp_path):
    from comfyui_skyreels.skyreels.config import VAEConfig

    vae = VideoVAE(VAEConfig(block_out_channels=(16, 16, 16, 16), norm_num_groups=8))
    path = tiny.save(tmp_path / "x.safetensors", vae.state_dict())
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_vae(path, runtime=RUNTIME)
    (tmp_path / "config.json").write_text('{"norm_num_groups": 8}')
    assert load_vae(tmp_path, runtime=RUNTIME).config.norm_num_groups == 8


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [33, 48])
def test_checkpoint_for_another_task_is_refused_with_both_numbers(tmp_path, channels):
    config = TransformerConfig(**{**tiny.TRANSFORMER.__dict__, "in_channels": channels})
    path = tiny.save(tmp_path / "i2v.safetensors", SkyReelsTransformer(config).state_dict())
    with pytest.raises(CheckpointError, match=f"{channels} input channels.*has 32"):
        load_transformer(path, runtime=RUNTIME)


def test_missing_left_over_and_misshapen_tensors_are_named(tmp_path, state):
    lacking = {k: v for k, v in state.items() if k != "double_blocks.1.img_mlp.fc2.bias"}
    with pytest.raises(CheckpointError, match=r"lacks tensors double_blocks\.1\.img_mlp\.fc2"):
        load_transformer(tiny.save(tmp_path / "a.safetensors", lacking), runtime=RUNTIME)
    extra = {**state, "strange.weight": torch.ones(2)}
    with pytest.raises(CheckpointError, match=r"unknown tensors strange\.weight"):
        load_transformer(tiny.save(tmp_path / "b.safetensors", extra), runtime=RUNTIME)
    bent = {**state, "single_blocks.0.linear2.weight": torch.ones(3, 3)}
    with pytest.raises(CheckpointError, match=r"\[3, 3\]"):
        load_transformer(tiny.save(tmp_path / "c.safetensors", bent), runtime=RUNTIME)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite_are_refused(tmp_path, state, value, dtype):
    bad = {k: v.to(dtype, copy=True) for k, v in state.items()}
    bad["single_blocks.1.linear1.weight"][5, 7] = value
    with pytest.raises(CheckpointError, match=r"NaN or infinity.*single_blocks\.1\.linear1"):
        load_transformer(tiny.save(tmp_path / "x.safetensors", bad), runtime=RUNTIME)


def test_nan_codes_in_fp8_are_refused(tmp_path, state):
    bad = plain_fp8(state)
    bad["single_blocks.1.linear1.weight"].view(torch.uint8)[5, 7] = 0x7F
    with pytest.raises(CheckpointError, match="NaN"):
        load_transformer(tiny.save(tmp_path / "x.safetensors", bad), runtime=RUNTIME)


def test_huge_but_finite_weights_are_accepted(tmp_path, state):
    large = {**state, "single_blocks.1.linear1.weight": torch.full((224, 32), 3e38)}
    load_transformer(tiny.save(tmp_path / "x.safetensors", large), runtime=RUNTIME)


def test_four_bit_storage_is_named(tmp_path, state):
    packed = {**state, "single_blocks.1.linear1.weight": torch.zeros(224, 32, dtype=torch.uint8)}
    with pytest.raises(CheckpointError, match="stores.*as U8"):
        load_transformer(tiny.save(tmp_path / "x.safetensors", packed), runtime=RUNTIME)


@pytest.mark.parametrize("precision", ["fp16", "fp4", ""])
def test_unknown_precision_lists_the_legal_ones(tmp_path, precision):
    with pytest.raises(OptionError, match="auto, fp32, bf16, fp8, int8"):
        load_transformer(tmp_path, precision=precision, runtime=RUNTIME)


def test_interrupted_load_stops_at_the_next_tensor_and_can_be_repeated(tmp_path, state):
    path = tiny.save(tmp_path / "x.safetensors", state)
    checks = 0

    class StopError(Exception):
        pass

    def check():
        nonlocal checks
        checks += 1
        if checks == 10:
            raise StopError

    with pytest.raises(StopError):
        load_transformer(path, runtime=TorchRuntime(on_check=check))
    assert checks == 10
    assert_same(load_transformer(path, runtime=RUNTIME), state)


def test_loading_reports_bytes_up_to_the_size_of_the_file(tmp_path, state):
    reports = []
    runtime = TorchRuntime(on_progress=lambda *report: reports.append(report[:3]))
    load_transformer(tiny.save(tmp_path / "x.safetensors", state), runtime=runtime)
    assert {stage for stage, _, _ in reports} == {"load"}
    done = [done for _, done, _ in reports]
    assert done == sorted(done)
    assert done[-1] == reports[-1][2] == sum(t.numel() * t.itemsize for t in state.values())


def test_a_file_on_a_slow_disk_shows_its_progress_and_can_be_cancelled(
    tmp_path, state, monkeypatch
):
    """Every read waits until the test lets it go on, and then brings a thousand bytes."""
    monkeypatch.setattr("comfyui_skyreels.skyreels.runtime.REPORTS", 10**9)  # of every tensor
    path = tiny.save(tmp_path / "x.safetensors", state)
    done = []
    load_transformer(path, runtime=TorchRuntime(on_progress=lambda *report: done.append(report[1])))
    largest = max(later - earlier for earlier, later in pairwise(done))
    waiting, gate, stopping = queue.Queue(), threading.Semaphore(0), threading.Event()

    class SlowFile(io.FileIO):
        def readinto(self, view):
            waiting.put(self.name)
            assert gate.acquire(timeout=60)
            return super().readinto(view[:1000])

    open_plain = Path.open

    def open_slow(path, mode="r", buffering=-1, **kwargs):
        if buffering == 0:
            return SlowFile(path, mode)
        return open_plain(path, mode, buffering, **kwargs)

    class StopError(Exception):
        pass

    def check():
        if stopping.is_set():
            raise StopError

    errors = []

    def load():
        try:
            load_transformer(path, runtime=runtime)
        except StopError as error:
            errors.append(error)

    done.clear()
    runtime = TorchRuntime(on_progress=lambda *report: done.append(report[1]), on_check=check)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_slow)
        thread = threading.Thread(target=load, daemon=True)
        thread.start()
        reads = 100
        for read in range(reads):
            waiting.get(timeout=60)
            assert done[-1] <= 1000 * read <= done[-1] + largest + 1000 * len(done)
            gate.release()
        waiting.get(timeout=60)
        seen = len(done)
        assert seen > 5
        stopping.set()
        gate.release(10**6)
        thread.join(60)
    assert not thread.is_alive()
    assert len(errors) == 1
    assert len(done) <= seen + 1  # the tensor that was being read, and no other
    assert waiting.qsize() <= largest // 1000 + len(done)
    assert_same(load_transformer(path, runtime=RUNTIME), state)


# --- memory -------------------------------------------------------------------------------------

MEASURE = r"""
import re
from pathlib import Path
from skyreels.weights.load import load_transformer
from skyreels.runtime import TorchRuntime
from skyreels.runtime.offload import weight_bytes
from support.memory import return_memory
return_memory()
def resident(item):  # ru_maxrss would start at what the parent process held
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(item + r":\s+(\d+)", status)[1])
before = resident("VmRSS")
model = load_transformer({path!r}, precision={precision!r}, runtime=TorchRuntime())
print(weight_bytes(model), resident("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read the Linux way")
@pytest.mark.parametrize(
    ("layout", "precision", "before"),
    [
        ("original", "auto", 2 * 1024**3),
        ("diffusers", "auto", 0),
        ("original", "fp8", 0),
        ("original", "int8", 0),
    ],
)
def test_loading_gigabytes_needs_little_beyond_the_weights(tmp_path, layout, precision, before):
    """Before the weights may stand 2 GiB of another model."""
    config = TransformerConfig(
        num_layers=1, num_single_layers=1, num_refiner_layers=1, num_attention_heads=12
    )
    num_bytes = 350 * 1024**2
    with torch.device("meta"):
        state = SkyReelsTransformer(config).state_dict()
        if before:
            other = {"first_stage_model.x": torch.empty(before // 2)}  # of two bytes each
            state = other | {PREFIXES[1] + name: tensor for name, tensor in state.items()}
    if layout == "diffusers":
        state = tiny.to_diffusers(state, config)
    path = tiny.sparse_file(tmp_path / "x.safetensors", state)
    assert path.stat().st_size >= before + num_bytes
    code = MEASURE.format(path=str(path), precision=precision)
    run = forks("torch").run(["-c", code], {**os.environ})
    assert run.returncode == 0, run.stderr
    weights, grown = map(int, run.stdout.split())
    largest_fused = 7 * config.hidden_size**2 * 2
    bound = largest_fused + 64 * 1024**2
    assert weights >= (1 if precision == "auto" else 0.6) * num_bytes
    assert weights >= 3 * bound  # a second copy of them is no small thing
    assert grown - weights <= bound, (grown - weights) / 1e6


# --- what a damaged or strange file must not do -------------------------------------------------


QKV = "double_blocks.0.img_attn_qkv"


@pytest.mark.parametrize("shape", [(5,), (0,), (1, 96), (32, 2), (96, 1, 1)])
def test_a_scale_of_another_shape_is_refused(tmp_path, state, shape):
    scaled = scaled_fp8(state, "v0", per_row=False)[0]
    scaled[f"{QKV}.scale_weight"] = torch.ones(shape)
    path = tiny.save(tmp_path / "x.safetensors", scaled)
    with pytest.raises(CheckpointError, match="scale_weight of shape"):
        load_transformer(path, runtime=RUNTIME)


@pytest.mark.parametrize("value", [0.0, -1.0, torch.nan, torch.inf])
def test_a_scale_that_is_no_positive_number_is_refused(tmp_path, state, value):
    scaled = scaled_fp8(state, "v0", per_row=False)[0]
    scaled[f"{QKV}.scale_weight"] = torch.tensor(value)
    path = tiny.save(tmp_path / "x.safetensors", scaled)
    with pytest.raises(CheckpointError, match="not a positive number"):
        load_transformer(path, runtime=RUNTIME)


def test_a_scale_counts_whatever_its_weight_is_stored_as(tmp_path, state):
    scaled = {**state, f"{QKV}.scale_weight": torch.tensor(3.0)}
    path = tiny.save(tmp_path / "x.safetensors", scaled)
    loaded = load_transformer(path, runtime=RUNTIME).state_dict()
    torch.testing.assert_close(loaded[f"{QKV}.weight"], 3 * state[f"{QKV}.weight"])


@pytest.mark.parametrize("described", [b'{"format": "mxfp8"}', b"garbage", b"[1]"])
def test_a_quantisation_of_another_kind_is_refused(tmp_path, state, described):
    scaled = scaled_fp8(state, "v1", per_row=False)[0]
    scaled[f"{QKV}.comfy_quant"] = torch.tensor(list(described), dtype=torch.uint8)
    path = tiny.save(tmp_path / "x.safetensors", scaled)
    with pytest.raises(CheckpointError, match="mxfp8|cannot be read"):
        load_transformer(path, runtime=RUNTIME)


def test_formats_in_the_header_are_read_too(tmp_path, state):
    scaled = scaled_fp8(state, "v1", per_row=False)[0]
    for kind, is_refused in (("float8_e4m3fn", False), ("nvfp4", True)):
        metadata = {"_quantization_metadata": json.dumps({"layers": {QKV: {"format": kind}}})}
        path = tiny.save(tmp_path / "x.safetensors", scaled, metadata)
        if not is_refused:
            load_transformer(path, runtime=RUNTIME)
            continue
        with pytest.raises(CheckpointError, match=f"stores {QKV} as nvfp4"):
            load_transformer(path, runtime=RUNTIME)


def test_parts_that_only_fit_in_sum_are_refused(tmp_path, state):
    split = tiny.to_diffusers(state, tiny.TRANSFORMER)
    stem = "transformer_blocks.0.attn.to_"
    joined = torch.cat([split[stem + "q.weight"], split[stem + "k.weight"]])
    split[stem + "q.weight"], split[stem + "k.weight"] = joined.split([16, 48])
    path = tiny.save(tmp_path / "x.safetensors", split)
    with pytest.raises(CheckpointError, match="of another model"):
        load_transformer(path, runtime=RUNTIME)


def test_numbers_beyond_the_range_of_the_precision_are_refused(tmp_path, state, vae_state):
    name = "single_blocks.0.linear2.weight"
    huge = {**state, name: torch.full_like(state[name], torch.finfo(torch.float32).max)}
    path = tiny.save(tmp_path / "x.safetensors", huge)
    with pytest.raises(CheckpointError, match="beyond the range of bfloat16"):
        load_transformer(path, precision="bf16", runtime=RUNTIME)
    name = "decoder.conv_out.conv.weight"
    path = tiny.save(tmp_path / "v.safetensors", {**vae_state, name: vae_state[name] + 1e6})
    with pytest.raises(CheckpointError, match="beyond the range of float16"):
        load_vae(path, precision="fp16", runtime=RUNTIME)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rope_axes_dim", [4, 6]),
        ("rope_axes_dim", 5),
        ("rope_axes_dim", "abc"),
        ("rope_axes_dim", [4, 6, 8]),
        ("rope_axes_dim", [-4, 10, 10]),
        ("rope_axes_dim", [1, 3, 12]),
        ("rope_axes_dim", [4.0, 6, 6]),
        ("rope_theta", "x"),
        ("rope_theta", 0),
        ("rope_theta", -256),
        ("rope_theta", None),
    ],
)
def test_a_folder_config_that_cannot_be_is_refused(tmp_path, model, name, value):
    config = {**tiny.diffusers_config(model.config), name: value}
    if value is None:
        config[name] = float("inf")
    state = tiny.to_diffusers(model.state_dict(), model.config)
    folder = tiny.save_sharded(tmp_path / "f", state, config)
    with pytest.raises(CheckpointError, match=f"config.json in f has {name}"):
        load_transformer(folder, runtime=RUNTIME)


@pytest.mark.parametrize("value", ["x", 0, -32, True, [1], 1.5])
def test_norm_groups_that_cannot_be_are_refused(tmp_path, vae_state, value):
    tiny.save(tmp_path / "f" / "x.safetensors", vae_state)
    (tmp_path / "f" / "config.json").write_text(json.dumps({"norm_num_groups": value}))
    with pytest.raises(CheckpointError, match="norm_num_groups"):
        load_vae(tmp_path / "f", runtime=RUNTIME)


@pytest.mark.parametrize("text", ["[" * 100_000, "nonsense", "\udcff"])
def test_a_folder_config_that_is_no_json_is_refused(tmp_path, vae_state, text):
    tiny.save(tmp_path / "f" / "x.safetensors", vae_state)
    (tmp_path / "f" / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointError, match="is not JSON"):
        load_vae(tmp_path / "f", runtime=RUNTIME)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("double_blocks.0.img_attn_q_norm.weight", ()),
        ("double_blocks.0.img_attn_q_norm.weight", (0,)),
        ("img_in.proj.weight", (32, 32, 1, 0, 2)),
        ("img_in.proj.weight", (32, 32)),
        ("final_layer.linear.weight", ()),
        ("double_blocks.0.img_mlp.fc1.weight", ()),
        ("txt_in.input_embedder.weight", (32,)),
        ("double_blocks.0.img_mlp.fc1.bias", ()),
    ],
)
def test_a_tensor_of_impossible_shape_is_refused(tmp_path, state, name, shape):
    path = tiny.save(tmp_path / "x.safetensors", {**state, name: torch.ones(shape)})
    with pytest.raises(CheckpointError, match="of another model"):
        load_transformer(path, runtime=RUNTIME)


def test_a_vae_of_other_latent_channels_is_refused(tmp_path):
    other = VideoVAE(replace(tiny.VAE, latent_channels=8))
    path = tiny.save(tmp_path / "x.safetensors", other.state_dict())
    with pytest.raises(CheckpointError, match="8 latent channels"):
        load_vae(path, runtime=RUNTIME)


@pytest.mark.parametrize("nest", [("model", "module"), ("module", "state_dict"), ("state_dict",)])
def test_a_pickle_may_nest_its_weights_in_any_order(tmp_path, state, nest):
    content = dict(state)
    for key in reversed(nest):
        content = {key: content, "epoch": 3, 7: "x"}
    torch.save(content, tmp_path / "x.pt")
    assert_same(load_transformer(tmp_path / "x.pt", runtime=RUNTIME), state)


def test_a_pickle_of_the_old_format_is_read(tmp_path, state):
    torch.save(state, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    assert_same(load_transformer(tmp_path / "x.pt", runtime=RUNTIME), state)


class Evil:
    def __reduce__(self):
        return print, ("never run",)


@pytest.mark.parametrize("kind", ["code", "empty", "garbage", "fifo"])
def test_a_pickle_that_is_none_is_refused_without_torchs_advice(tmp_path, kind, capsys):
    path = tmp_path / "x.pt"
    if kind == "code":
        torch.save({"a": Evil()}, path)
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.write_bytes({"empty": b"", "garbage": b"\x80\x02nonsense" * 9}[kind])
    with pytest.raises(CheckpointError, match="as plain weights|is a pipe|is empty") as caught:
        load_transformer(path, runtime=RUNTIME)
    assert "weights_only" not in str(caught.value)
    assert "never run" not in capsys.readouterr().out


def test_a_load_is_reported_in_few_parts_that_end_with_all_bytes():
    from comfyui_skyreels.skyreels import builtin

    for read in (builtin.builtin_transformer, builtin.builtin_vae, builtin.builtin_text_encoder):
        reports: list = []
        read(runtime=TorchRuntime(on_progress=lambda *report: reports.append(report)))  # noqa: B023
        assert len(reports) <= 42
        total = reports[0][2]
        assert total > 100_000, "these are no bytes"
        assert [reports[0][1], reports[-1][1]] == [0, total]
