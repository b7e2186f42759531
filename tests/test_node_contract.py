"""What workflows saved with version 0.1.0 rely on, kept: support/node_contract.json.

Inputs may be appended, if they are optional; texts may change.
"""

import json
from pathlib import Path

import comfyui_skyreels
import pytest

NODES = comfyui_skyreels.NODE_CLASS_MAPPINGS
CONTRACT = json.loads(
    (Path(__file__).parent / "support" / "node_contract.json").read_text(encoding="utf-8")
)

pytestmark = pytest.mark.usefixtures("comfy")
each_node = pytest.mark.parametrize("name", CONTRACT)


def inputs_of(cls: type) -> list[dict]:
    """Inputs in the order of the page, as they are written in the contract."""
    found = []
    for group, inputs in cls.INPUT_TYPES().items():
        if group == "hidden":
            continue
        for name, (kind, *rest) in inputs.items():
            what = {"type": "COMBO", "choices": kind} if isinstance(kind, list) else {"type": kind}
            found.append({**(rest[0] if rest else {}), "name": name, "group": group, **what})
    return found


@each_node
def test_a_node_keeps_its_names_and_its_place_in_the_menu(name):
    cls, saved = NODES[name], CONTRACT[name]
    assert comfyui_skyreels.NODE_DISPLAY_NAME_MAPPINGS[name] == saved["display_name"]
    assert saved["category"] == cls.CATEGORY
    assert getattr(cls, "OUTPUT_NODE", False) is saved["is_output"]
    assert getattr(cls, "INPUT_IS_LIST", False) is saved["takes_lists"]


@each_node
def test_a_node_keeps_its_inputs_in_their_order(name):
    """The values of widgets are saved by their order alone."""
    saved, found = CONTRACT[name]["inputs"], inputs_of(NODES[name])
    assert [i["name"] for i in found[: len(saved)]] == [i["name"] for i in saved]
    assert all(extra["group"] == "optional" for extra in found[len(saved) :])
    for old, new in zip(saved, found, strict=False):
        for key in ("group", "type", "default", "step", "control_after_generate", "image_upload"):
            assert new.get(key) == old.get(key), f"{old['name']}: {key}"


@each_node
def test_a_node_takes_every_value_that_it_took(name):
    for old, new in zip(CONTRACT[name]["inputs"], inputs_of(NODES[name]), strict=False):
        assert set(old.get("choices", ())) <= set(new.get("choices", ())), old["name"]
        if "min" in old:
            assert new["min"] <= old["min"], old["name"]
            assert new["max"] >= old["max"], old["name"]


@each_node
def test_a_node_keeps_its_outputs(name):
    """Links are saved by the number of the output."""
    cls, saved = NODES[name], CONTRACT[name]["outputs"]
    lists = getattr(cls, "OUTPUT_IS_LIST", [False] * len(cls.RETURN_TYPES))
    found = [
        {"name": output, "type": kind, "is_list": bool(is_list)}
        for output, kind, is_list in zip(cls.RETURN_NAMES, cls.RETURN_TYPES, lists, strict=True)
    ]
    assert found[: len(saved)] == saved
