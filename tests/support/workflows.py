"""What the page makes of a workflow file: which widget each saved value belongs to."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfyui_skyreels

from .host import CORE_NODES

ROOT = Path(__file__).resolve().parents[2]
#: graph -> name of its file, which the template browser shows as its title, in the order of people
TITLES = {
    "quick_start": "SkyReels 01 Quick start",
    "remote": "SkyReels 02 On Wiro, no GPU",
    "local_bf16": "SkyReels 03 Local, bf16, 24 GB",
    "local_low_memory": "SkyReels 04 Local, 8-bit, 12 GB",
    "local_gguf": "SkyReels 05 Local, GGUF, 8 GB",
    "local_text_to_video": "SkyReels 06 Text to video",
    "local_few_steps": "SkyReels 07 Few steps with a LoRA",
    "extend_video": "SkyReels 08 Extend a video",
    "wiro_batch": "SkyReels 09 Many images on Wiro",
    "local_and_remote": "SkyReels 10 Local and Wiro compared",
    "core_samplers": "SkyReels 11 Core samplers",
    "compare": "SkyReels 12 One node, here and on Wiro",
}
NODES = comfyui_skyreels.NODE_CLASS_MAPPINGS
WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
#: nodes without a class on the server
PAGE_ONLY = {"MarkdownNote"}
#: widgets that the page adds behind a widget with this option
ADDED = {"control_after_generate": {"fixed"}, "image_upload": {"image"}}


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def shipped(name: str, suffix: str = ".json") -> Path:
    """The file of a graph, or its thumbnail."""
    return ROOT / "workflows" / f"{TITLES.get(name, name)}{suffix}"


def widgets(node_type: str) -> list[tuple[str, str, dict]]:
    """(name, type, options) of a node's widgets, in the order of its values."""
    if node_type in NODES:
        groups = NODES[node_type].INPUT_TYPES()
    else:
        groups = CORE_NODES[node_type]["input"]
    found = []
    for kind in ("required", "optional"):
        for name, (what, *rest) in groups.get(kind, {}).items():
            options = dict(rest[0]) if rest else {}
            if isinstance(what, list):
                what, options = "COMBO", {**options, "options": what}
            if what in WIDGET_TYPES:
                found.append((name, what, options))
    return found


def placed(node: dict) -> Iterator[tuple[str, str, dict, Any]]:
    """(name, type, options, value) of a saved node, as the page hands its values out in order.

    A node that was saved before its last widgets existed has fewer values.
    """
    values = list(node["widgets_values"])
    for name, kind, options in widgets(node["type"]):
        if not values:
            return
        yield name, kind, options, values.pop(0)
        for option, expected in ADDED.items():
            if options.get(option):
                added = values.pop(0)
                assert added in expected, f"{added!r} stands behind {node['type']}.{name}"
    assert values == [], f"{node['type']} has no widget for {values}"
