"""Names in LoRA files: no two dialects collide, every spelling of the full model is found."""

from itertools import pairwise

import pytest
import torch
from comfyui_skyreels.skyreels.config import TransformerConfig
from comfyui_skyreels.skyreels.weights.dialects import LORA_PREFIXES, lora_key
from comfyui_skyreels.skyreels.weights.keymaps import transformer_sources
from comfyui_skyreels.skyreels.weights.lora.names import Place, find, parameter_shapes, spellings

FULL = TransformerConfig()
H = FULL.hidden_size
LAYOUTS = ("original", "comfyui", "diffusers")


@pytest.fixture(scope="module")
def table():
    return spellings(FULL)


def test_no_two_dialects_collide(table):
    """The table asserts that a spelling means one place; here, what each place is called."""
    names: dict[Place, set[str]] = {}
    for name, place in table.items():
        names.setdefault(place, set()).add(name)
    shapes = parameter_shapes(FULL)
    for place in names:
        assert 0 <= place.rows[0] < place.rows[1] <= shapes[f"{place.module}.weight"][0]
    whole = {p.module for p in names if p.rows == (0, shapes[f"{p.module}.weight"][0])}
    assert whole == {n.removesuffix(".weight") for n in shapes if n.endswith(".weight")}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("flat", [False, True])
def test_every_module_of_the_full_model_is_found_in_every_vocabulary(table, layout, flat):
    for name, shape in parameter_shapes(FULL).items():
        if not name.endswith(".weight"):
            continue
        parts = transformer_sources(name, layout)
        places = []
        for part in parts:
            spelled = part.rpartition(".")[0]
            for prefix in ("", *LORA_PREFIXES):
                key = prefix + (spelled.replace(".", "_") if flat else spelled)
                places.append(find(table, key))
                assert places[-1] == places[-(len(places) and 1)]
            assert len(set(places)) == parts.index(part) + 1
        rows = [place.rows for place in dict.fromkeys(places)]
        assert {place.module for place in places} == {name.removesuffix(".weight")}
        assert (rows[0][0], rows[-1][1]) == (0, shape[0])
        assert all(one[1] == other[0] for one, other in pairwise(rows))


@pytest.mark.parametrize(
    ("name", "module", "rows"),
    [
        ("transformer.double_blocks.3.txt_attn_qkv.1", "double_blocks.3.txt_attn_qkv", (H, 2 * H)),
        ("single_blocks.39.linear1.3", "single_blocks.39.linear1", (3 * H, 7 * H)),
        ("diffusion_model.double_blocks.3.img_attn.qkv.2", "double_blocks.3.img_attn_qkv",
         (2 * H, 3 * H)),
        ("transformer.double_blocks.19.img_mlp.fc0", "double_blocks.19.img_mlp.fc1", (0, 4 * H)),
        ("txt_in.t_embedder.linear_1", "txt_in.t_embedder.mlp.0", (0, H)),
        ("lora_unet_single_blocks_30_modulation_linear", "single_blocks.30.modulation.linear",
         (0, 3 * H)),
        ("Hunyuan_video_I2V_lora_txt_in_individual_token_refiner_blocks_0_mlp_fc2",
         "txt_in.individual_token_refiner.blocks.0.mlp.fc2", (0, H)),
        ("lora_transformer_single_transformer_blocks_7_proj_mlp", "single_blocks.7.linear1",
         (3 * H, 7 * H)),
        ("base_model.model.transformer.transformer_blocks.0.attn.add_k_proj",
         "double_blocks.0.txt_attn_qkv", (H, 2 * H)),
        ("lora_unet__double_blocks_0_img_mlp_0", "double_blocks.0.img_mlp.fc1", (0, 4 * H)),
    ],
)  # fmt: skip
def test_parts_and_odd_names_are_found(table, name, module, rows):
    assert find(table, name) == Place(module, rows)


@pytest.mark.parametrize("name", ["", "transformer.", "double_blocks.20.img_mlp.fc1", "lora_unet_"])
def test_other_names_are_not(table, name):
    assert find(table, name) is None


def test_of_diffusers_only_the_last_modulation_is_swapped(table):
    swapped = {place.module for place in table.values() if place.swaps_halves}
    assert swapped == {"final_layer.adaLN_modulation.1"}
    assert not table["final_layer.adaLN_modulation.1"].swaps_halves


def test_a_long_name_costs_little():
    assert lora_key("a." * 300_000 + "lora_A.weight") is None
    assert lora_key(".lora_A" * 50 + ".weight").role == "down"


def test_names_do_not_depend_on_weights():
    assert torch.get_default_dtype() == torch.float32
    assert spellings(FULL) is spellings(TransformerConfig())
