"""Files of LoRAs: every dialect by name, every method by its formula, and what is refused."""

import json
import math

import pytest
import torch
from comfyui_skyreels.skyreels.errors import CheckpointError
from comfyui_skyreels.skyreels.runtime import TorchRuntime
from comfyui_skyreels.skyreels.weights.inspect import inspect
from comfyui_skyreels.skyreels.weights.load import load_transformer
from comfyui_skyreels.skyreels.weights.lora.apply import (
    AppliedLora,
    difference,
    low_rank,
    use_loras,
)
from comfyui_skyreels.skyreels.weights.lora.read import load_lora
from comfyui_skyreels.skyreels.weights.lora.report import describe_lora, effect_sizes
from support import lora as dialects
from support import tiny

CONFIG = tiny.TRANSFORMER
PARTS = dialects.draw_parts()
#: [9 * 32, 32], fused q, k, v; and the same layer's name in a file of musubi-tuner
QKV, FLAT = "double_blocks.0.img_attn_qkv", "lora_unet_double_blocks_0_img_attn_qkv"
ROWS, COLUMNS = 96, 32
#: who writes a dialect, as it is shown
SHOWN = {
    "diffusion-pipe, older": "diffusion-pipe",
    "musubi-tuner, alpha 0": "musubi-tuner",
    "musubi-tuner, converted": "diffusion-pipe",
    "diffusers, described": "diffusers",
    "ComfyUI 0.33": "ComfyUI",
    "OneTrainer, original": "diffusion-pipe",
    "full difference": "diffusion-pipe, full difference",
}


def randn(*shape):
    return torch.randn(*shape)


@pytest.fixture
def read(tmp_path):
    def make(tensors, metadata=None):
        path = tiny.save(tmp_path / "some.safetensors", tensors, metadata)
        return load_lora(path, CONFIG)

    return make


def total(lora, parameter=f"{QKV}.weight", shape=(ROWS, COLUMNS)):
    """What a file adds to a parameter of zeros."""
    result = torch.zeros(shape)
    for change in lora.changes:
        if change.parameter == parameter:
            result[slice(*change.rows)] += difference(change, torch.zeros(
                change.rows[1] - change.rows[0], *shape[1:]))  # fmt: skip
    return result


def assert_near(got, right):
    assert got.shape == right.shape
    assert (got - right).abs().max() <= 1e-5 * right.abs().max().clamp_min(1)


@pytest.mark.parametrize("dialect", dialects.DIALECTS)
def test_inspect_names_every_dialect(dialect, tmp_path):
    path = dialects.write(dialect, PARTS, tmp_path)
    info = inspect(path)
    assert (info.family, info.layout) == ("lora", SHOWN.get(dialect, dialect))
    assert load_lora(path, CONFIG).dialect == info.layout


# --- scales -------------------------------------------------------------------------------------


def pair(rank=4):
    return randn(ROWS, rank), randn(rank, COLUMNS)


@pytest.mark.parametrize(
    ("alpha", "scale"), [(None, 1.0), (4.0, 1.0), (1.0, 0.25), (0.0, 1.0), (-2.0, -0.5)]
)
def test_alpha_is_divided_by_the_rank(read, alpha, scale):
    up, down = pair()
    tensors = {f"{FLAT}.lora_down.weight": down, f"{FLAT}.lora_up.weight": up}
    if alpha is not None:
        tensors[f"{FLAT}.alpha"] = torch.tensor(alpha)
    assert_near(total(read(tensors)), scale * up @ down)


def described(up, down, **config):
    prefix = f"transformer.{QKV}"
    tensors = {f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up}
    text = json.dumps({f"transformer.{key}": value for key, value in config.items()})
    return tensors, {"lora_adapter_metadata": text}


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"r": 4, "lora_alpha": 8}, 2.0),
        ({"r": 4, "lora_alpha": 8, "use_rslora": True}, 4.0),
        ({"r": 16, "lora_alpha": 8, "rank_pattern": {"img_attn_qkv": 4}}, 2.0),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"0.img_attn_qkv": 2}}, 0.5),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"^.*".strip(".*^") + QKV: 2}}, 0.5),
        ({}, 1.0),
    ],
)
def test_peft_describes_its_scale_in_the_metadata(read, config, scale):
    up, down = pair()
    assert_near(total(read(*described(up, down, **config))), scale * up @ down)


@pytest.mark.parametrize(
    "text",
    ["{", "[1]", '{"lora_alpha": "8"}', '{"lora_alpha": NaN}', '{"lora_alpha": true}',
     '{"alpha_pattern": {"(a+)+$": 1}}', '{"alpha_pattern": [1]}', "[" * 100_000,
     '{"alpha_pattern": {"x": 1e999}}'],
)  # fmt: skip
def test_a_description_that_cannot_be_followed_is_refused(read, text):
    tensors, _ = described(*pair())
    with pytest.raises(CheckpointError, match="PEFT description of some.safetensors"):
        read(tensors, {"lora_adapter_metadata": text})


def test_a_description_beside_a_file_counts_for_raw_peft_alone(read, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 12}')
    up, down = pair()
    names = [f"{QKV}.lora_A.weight", f"{QKV}.lora_B.weight"]
    tensors = dict(zip(names, (down, up), strict=True))
    assert_near(total(read(tensors)), up @ down)
    raw = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    assert_near(total(read(raw)), 3 * up @ down)


# --- suffixes and methods -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("down_name", "up_name"),
    [
        (".lora_A.weight", ".lora_B.weight"),
        (".lora_A.default.weight", ".lora_B.default.weight"),
        (".lora_A.style_0.weight", ".lora_B.style_0.weight"),
        (".lora_down.weight", ".lora_up.weight"),
        (".lora.down.weight", ".lora.up.weight"),
        ("_lora.down.weight", "_lora.up.weight"),
        (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn])
def test_all_suffixes_and_narrow_dtypes_are_read(read, down_name, up_name, dtype):
    up, down = (tensor.to(dtype) for tensor in pair())
    lora = read({f"transformer.{QKV}{down_name}": down, f"transformer.{QKV}{up_name}": up})
    assert_near(total(lora), up.float() @ down.float())


def test_biases_of_the_factors_and_of_the_layer_add(read):
    up, down = pair()
    inner, outer, plain = randn(4), randn(ROWS), randn(ROWS)
    stem = f"diffusion_model.{QKV}"
    lora = read({
        f"{stem}.lora_A.weight": down, f"{stem}.lora_A.bias": inner, f"{stem}.lora_B.weight": up,
        f"{stem}.lora_B.bias": outer, f"{stem}.diff_b": plain, f"{stem}.alpha": torch.tensor(2.0),
    })  # fmt: skip
    assert_near(total(lora, f"{QKV}.bias", (ROWS,)), 0.5 * (up @ inner + outer) + plain)


def loha(up1, down1, up2, down2, **more):
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    found = dict(zip(names, (up1, down1, up2, down2), strict=True)) | more
    return {f"lycoris_{QKV.replace('.', '_')}.{name}": tensor for name, tensor in found.items()}


def test_loha_is_a_product_of_products(read):
    (up1, down1), (up2, down2) = pair(3), pair(5)
    lora = read(loha(up1, down1, up2, down2, alpha=torch.tensor(6.0)))
    right = 2 * (up1 @ down1) * (up2 @ down2)
    assert lora.dialect == "LyCORIS, LoHa"
    assert_near(total(lora), right)
    up, down = low_rank(lora.changes[0])
    assert_near(up @ down, right)


@pytest.mark.parametrize("decomposed", [(), ("w1",), ("w2",), ("w1", "w2")])
def test_lokr_is_a_kronecker_product(read, decomposed):
    whole = {"w1": randn(4, 8), "w2": randn(24, 4)}
    tensors, scale = {"alpha": torch.tensor(6.0)}, 1.0
    for name in decomposed:
        up, down = randn(len(whole[name]), 3), randn(3, whole[name].shape[1])
        tensors |= {f"lokr_{name}_a": up, f"lokr_{name}_b": down}
        whole[name], scale = up @ down, 2.0
    tensors |= {f"lokr_{n}": t for n, t in whole.items() if n not in decomposed}
    lora = read({f"{FLAT}.{name}": tensor for name, tensor in tensors.items()})
    right = scale * torch.kron(whole["w1"], whole["w2"])
    assert lora.dialect == "musubi-tuner, LoKr"
    assert_near(total(lora), right)
    if "w2" in decomposed:
        up, down = low_rank(lora.changes[0])
        assert_near(up @ down, right)


def test_loha_of_the_patch_embedder_may_have_cores(read):
    cores, factors = [randn(2, 3, 1, 2, 2) for _ in range(2)], []
    kernels = []
    for core in cores:
        out, inner = randn(2, 32), randn(3, 32)
        factors += [out, inner]
        kernels.append(torch.einsum("rstyx,ro,si->oityx", core, out, inner))
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    tensors = {f"lycoris_img_in_proj.{n}": t for n, t in zip(names, factors, strict=True)}
    tensors |= {f"lycoris_img_in_proj.hada_t{i + 1}": core for i, core in enumerate(cores)}
    right = (kernels[0] * kernels[1]).flatten(1)
    assert_near(total(read(tensors), "img_in.proj.weight", (32, 128)), right)


@pytest.mark.parametrize("axis", [0, 1])
def test_dora_scales_the_changed_weight_to_its_magnitudes(read, axis, tmp_path):
    up, down = pair()
    shape = (ROWS, 1) if axis == 0 else (1, COLUMNS)
    magnitude = randn(*shape).abs()
    lora = read({
        f"{FLAT}.lora_down.weight": down, f"{FLAT}.lora_up.weight": up,
        f"{FLAT}.dora_scale": magnitude, f"{FLAT}.alpha": torch.tensor(2.0),
    })  # fmt: skip
    assert lora.dialect == "musubi-tuner, DoRA"
    path = tiny.save(tmp_path / "model.safetensors", tiny.transformer().state_dict())
    runtime = TorchRuntime("cpu")
    model = load_transformer(path, runtime=runtime)
    weight = model.get_parameter(f"{QKV}.weight").clone()
    changed = weight + 0.5 * up @ down
    right = magnitude * changed / changed.norm(dim=1 - axis, keepdim=True)
    use_loras(model, [AppliedLora(lora)], runtime=runtime)
    assert_near(model.get_parameter(f"{QKV}.weight"), right)
    use_loras(model, [AppliedLora(lora, 0.5)], runtime=runtime)
    assert_near(model.get_parameter(f"{QKV}.weight"), (weight + right) / 2)
    for precision in ("fp8", "int8"):
        quantized = load_transformer(path, precision=precision, runtime=runtime)
        with pytest.raises(CheckpointError, match="has DoRA for .*precision bf16"):
            use_loras(quantized, [AppliedLora(lora)], runtime=runtime)
        assert quantized.lora_state == {}


def test_a_magnitude_of_peft_is_one_number_a_row(read):
    up, down = pair()
    stem = f"base_model.model.{QKV}"
    lora = read({
        f"{stem}.lora_A.default.weight": down, f"{stem}.lora_B.default.weight": up,
        f"{stem}.lora_magnitude_vector.default.weight": randn(ROWS),
    })  # fmt: skip
    assert lora.changes[0].magnitude.shape == (ROWS, 1)


def test_norms_biases_and_values_are_changed_whole(read):
    norm, bias, value = randn(16), randn(32), randn(32, 32)
    lora = read({
        "diffusion_model.single_blocks.0.norm.query_norm.diff": norm,
        "diffusion_model.img_in.proj.diff_b": bias,
        "diffusion_model.double_blocks.1.img_attn.proj.set_weight": value,
        "lycoris_double_blocks_0_img_attn_k_norm.w_norm": norm.clone(),
    })  # fmt: skip
    assert_near(total(lora, "single_blocks.0.q_norm.weight", (16,)), norm)
    assert_near(total(lora, "double_blocks.0.img_attn_k_norm.weight", (16,)), norm)
    assert_near(total(lora, "img_in.proj.bias", (32,)), bias)
    assert_near(total(lora, "double_blocks.1.img_attn_proj.weight", (32, 32)), value)


def test_halves_of_diffusers_last_modulation_are_swapped_in_rows_alone(read):
    up, down, bias = randn(64, 4), randn(4, 32), randn(64)
    stem = "transformer.norm_out.linear"
    lora = read({f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up,
                 f"{stem}.lora_B.bias": bias})  # fmt: skip
    name = "final_layer.adaLN_modulation.1"
    swapped = torch.cat([up[32:], up[:32]])
    assert_near(total(lora, f"{name}.weight", (64, 32)), swapped @ down)
    assert_near(total(lora, f"{name}.bias", (64,)), torch.cat([bias[32:], bias[:32]]))


# --- the patch embedder -------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 16, 1, 2, 2), (4, 64)])
def test_a_lora_for_16_channels_acts_on_the_first_16(read, shape):
    up, down = randn(32, 4, 1, 1, 1), randn(*shape)
    lora = read({"lora_unet_img_in_proj.lora_down.weight": down,
                 "lora_unet_img_in_proj.lora_up.weight": up})  # fmt: skip
    right = torch.cat([up.flatten(1) @ down.flatten(1), torch.zeros(32, 64)], dim=1)
    assert_near(total(lora, "img_in.proj.weight", (32, 128)), right)


def test_a_lora_for_33_channels_is_used_without_its_patch_embedder(read):
    up, down = pair()
    tensors = {
        "lora_unet_img_in_proj.lora_down.weight": randn(4, 33, 1, 2, 2),
        "lora_unet_img_in_proj.lora_up.weight": randn(32, 4, 1, 1, 1),
        f"{FLAT}.lora_down.weight": down, f"{FLAT}.lora_up.weight": up,
    }  # fmt: skip
    lora = read(tensors)
    assert {change.parameter for change in lora.changes} == {f"{QKV}.weight"}
    assert "33 input channels, and this one has 32" in lora.notes[0]
    assert "33 input channels" in describe_lora(AppliedLora(lora), tiny.transformer())


# --- what is counted and said -------------------------------------------------------------------


def test_keys_of_text_encoders_are_ignored_and_unknown_ones_are_named(read):
    up, down = pair()
    lora = read({
        f"{FLAT}.lora_down.weight": down, f"{FLAT}.lora_up.weight": up,
        "lora_te1_x.lora_down.weight": randn(2, 2), "text_encoder.y.lora_A.weight": randn(2, 2),
        "bundle_emb.z.clip": randn(1, 2), "lora_unet_nothing.lora_up.weight": randn(2, 2),
        "\x1b[31mred": randn(1),
    }, {"ss_base_model_version": "flux1"})  # fmt: skip
    assert (lora.num_matched, len(lora.ignored), len(lora.unknown)) == (2, 3, 2)
    lines = describe_lora(AppliedLora(lora, 0.5), tiny.transformer()).splitlines()
    assert lines[0] == (
        "some.safetensors (musubi-tuner): 2 keys matched, 1 modules changed, rank 4."
    )
    assert lines[1].startswith("3 keys of text encoders or embeddings ignored (")
    assert "lora_unet_nothing.lora_up.weight" in lines[2]
    assert "\\x1b[31mred" in lines[2]
    assert lines[3] == "its metadata says that it was trained for flux1."
    assert lines[4].startswith("Change relative to the weights at strength 0.5: double blocks (im")


@pytest.mark.parametrize("precision", ["fp32", "fp8", "int8"])
def test_the_size_of_the_effect_is_the_norm_of_the_change_over_that_of_the_weights(
    read, precision, tmp_path
):
    path = tiny.save(tmp_path / "model.safetensors", tiny.transformer().state_dict())
    model = load_transformer(path, precision=precision, runtime=TorchRuntime("cpu"))
    lora = load_lora(dialects.write("OneTrainer", PARTS, tmp_path), CONFIG)
    weights = tiny.transformer()
    of = {"double blocks (image)": (".img_", "double"), "double blocks (text)": (".txt_", "double"),
          "single blocks": ("", "single"), "the rest": ("", "")}  # fmt: skip
    sizes = effect_sizes(AppliedLora(lora, 0.5), model)
    assert list(sizes) == list(of)
    for group, (part, start) in of.items():
        names = [n for n in PARTS if part in n and n.startswith(start or ("txt", "img_in", "time",
                 "vec", "gui", "final"))]  # fmt: skip
        change = math.sqrt(sum(dialects.dense(PARTS[n]).square().sum().item() for n in names))
        weight = math.sqrt(sum(weights.get_parameter(f"{n}.weight").square().sum().item()
                               for n in names))  # fmt: skip
        assert sizes[group] == pytest.approx(0.5 * change / weight, rel=0.1)


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["diffusion_model.blocks.0.self_attn.q"], "look like Wan"),
        (["lora_unet_down_blocks_0_attentions_0_proj_in"], "look like Stable Diffusion"),
        (["transformer.transformer_blocks.0.attn1.to_q"], "look like LTX-Video or CogVideoX"),
        (["lora_te1_a", "lora_te1_b"], "lora_te1_a.lora_down.weight, lora_te1_a.lora_up.weight, "
         "lora_te1_b.lora_down.weight, look like unknown names"),
        (["x" * 5000 + ".y"], "xxx..."),
    ],
)  # fmt: skip
def test_a_lora_that_changes_nothing_names_its_keys_and_what_it_looks_like(read, names, said):
    tensors = {}
    for name in names:
        tensors |= {f"{name}.lora_down.weight": randn(2, 8), f"{name}.lora_up.weight": randn(8, 2)}
    with pytest.raises(CheckpointError) as refusal:
        read(tensors | {f"{FLAT}.alpha": torch.tensor(1.0)})
    if len(names[0]) < 400:
        assert said in str(refusal.value)
        assert "changes nothing of a HunyuanVideo transformer" in str(refusal.value)
    assert len(str(refusal.value)) < 700


@pytest.mark.parametrize(
    ("suffixes", "method"),
    [
        (["oft_blocks"], "OFT or BOFT"), (["oft_diag"], "OFT or BOFT"),
        (["oft_R.default.weight"], "OFT or BOFT"),
        (["a1.weight", "a2.weight", "b1.weight", "b2.weight"], "GLoRA"),
        (["lora_down.weight", "lora_up.weight", "lora_mid.weight"], "LoCon with a middle factor"),
        (["ia3_l"], "IA3"), (["vera_lambda_b"], "VeRA"), (["lora_E"], "AdaLoRA"),
    ],
)  # fmt: skip
def test_other_methods_are_refused_by_name(read, suffixes, method):
    with pytest.raises(CheckpointError, match=f"kind {method}, which is not supported"):
        read({f"{FLAT}.{suffix}": randn(4, 4) for suffix in suffixes})


def bad(**roles):
    return {f"{FLAT}.{name.replace('__', '.')}": tensor for name, tensor in roles.items()}


GOOD = {"lora_down__weight": torch.ones(4, 32), "lora_up__weight": torch.ones(96, 4)}
LOHA = {"hada_w1_a": torch.ones(96, 2), "hada_w1_b": torch.ones(2, 32)}


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (bad(**GOOD | {"lora_up__weight": torch.ones(95, 4)}), "95 x 32 .*must be 96 x 32"),
        (bad(**GOOD | {"lora_down__weight": torch.ones(4, 64)}), "96 x 64 .*must be 96 x 32"),
        (bad(**GOOD | {"lora_down__weight": torch.ones(5, 32)}), r"\[96, 4\] beside .*\[5, 32\]"),
        (bad(**GOOD | {"lora_down__weight": torch.full((4, 32), torch.nan)}), "NaN or infinity"),
        (bad(**GOOD | {"lora_up__weight": torch.full((96, 4), torch.inf)}), "NaN or infinity"),
        (bad(**GOOD | {"alpha": torch.tensor(torch.nan)}), "NaN or infinity"),
        (bad(**GOOD | {"alpha": torch.ones(3)}), r"shape \[3\], not one number"),
        (bad(**GOOD | {"lora_down__weight": torch.ones(4, 32).int()}), "stored as I32"),
        (bad(**GOOD | {"lora_down__weight": torch.ones(0, 32)}), "without numbers"),
        (bad(**GOOD | {"lora_down__weight": torch.ones(32)}), "which is no matrix"),
        (bad(lora_down__weight=torch.ones(4, 32)), "without its up"),
        (bad(dora_scale=torch.ones(96, 1)), "magnitude without factors"),
        (bad(**GOOD, dora_scale=torch.ones(7, 1)), r"shape \[7, 1\] for a weight of \[96, 32\]"),
        (bad(**LOHA), "without its hada_w2_a, hada_w2_b"),
        (bad(lokr_w1=torch.ones(5, 5), lokr_w2=torch.ones(5, 5)), "25 x 25 .*must be 96 x 32"),
        (bad(diff=torch.ones(96, 31)), "96 x 31 .*must be 96 x 32"),
        (bad(diff_b=torch.ones(95)), r"shape \[95\], and double_blocks.0.img_attn_qkv.bias is"),
        (bad(**GOOD, lora_down__scale_weight=torch.ones(1)), "scaled 8-bit factors"),
        ({"diffusion_model.single_blocks.0.q_norm.diff_b": torch.ones(16)}, "without bias"),
        ({"lora_unet_single_blocks_0_q_norm.lora_down.weight": torch.ones(2, 16),
          "lora_unet_single_blocks_0_q_norm.lora_up.weight": torch.ones(16, 2)}, "without a matr"),
        (bad(**GOOD) | {f"transformer.{QKV}.lora_A.weight": torch.ones(4, 32)}, "twice"),
        ({f"x.{QKV}.lora_A.{a}.weight": torch.ones(4, 32) for a in "ab"}, "changes nothing"),
        ({f"transformer.{QKV}.lora_A.{a}.weight": torch.ones(4, 32) for a in "ab"}, "twice"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_its_numbers(read, tensors, said):
    with pytest.raises(CheckpointError, match=said):
        read(tensors)


def test_factors_of_an_enormous_product_are_refused_before_it_is_made(read):
    long = torch.ones(10**6, 1)
    for tensors in (
        bad(lokr_w1_a=long, lokr_w1_b=long.T, lokr_w2=torch.ones(2, 2)),
        bad(hada_w1_a=long, hada_w1_b=long.T, hada_w2_a=long, hada_w2_b=long.T),
        bad(lora_up__weight=long, lora_down__weight=long.T),
    ):
        with pytest.raises(CheckpointError, match="must be 96 x 32"):
            read({name: tensor.clone() for name, tensor in tensors.items()})


def test_a_rank_above_the_layers_width_is_taken(read, tmp_path):
    up, down = pair(200)
    lora = read(bad(lora_down__weight=down, lora_up__weight=up))
    path = tiny.save(tmp_path / "model.safetensors", tiny.transformer().state_dict())
    runtime = TorchRuntime("cpu")
    model = load_transformer(path, precision="int8", runtime=runtime)
    use_loras(model, [AppliedLora(lora)], runtime=runtime)
    layer = model.get_submodule(QKV)
    # factors would be larger than the weight
    if hasattr(layer, "hadamard_block"):
        assert layer.side_branch.down is None


def test_a_file_of_another_kind_is_named(tmp_path):
    path = tiny.save(tmp_path / "model.safetensors", tiny.transformer().state_dict())
    with pytest.raises(CheckpointError, match="is not a LoRA") as refusal:
        load_lora(path, CONFIG)
    assert refusal.value.family == "transformer"


class Code:
    def __reduce__(self):
        return (pytest.fail, ("code of a file was run",))


def test_code_in_a_pickle_is_never_run(tmp_path):
    path = tmp_path / "lora.pt"
    torch.save({f"{FLAT}.lora_up.weight": Code()}, path)
    with pytest.raises(CheckpointError, match="never run"):
        load_lora(path, CONFIG)


def test_a_pickle_of_tensors_is_read(tmp_path):
    up, down = pair()
    path = tmp_path / "lora.pt"
    torch.save({f"{FLAT}.lora_up.weight": up, f"{FLAT}.lora_down.weight": down}, path)
    assert_near(total(load_lora(path, CONFIG)), up @ down)


def test_the_digest_tells_files_apart(read):
    up, down = pair()
    one = read(bad(lora_down__weight=down, lora_up__weight=up))
    again = read(bad(lora_down__weight=down, lora_up__weight=up))
    other = read(bad(lora_down__weight=down, lora_up__weight=2 * up))
    assert one.digest == again.digest != other.digest
