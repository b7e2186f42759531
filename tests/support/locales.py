"""Every text that the page shows, in English and in the languages of locales/.

English comes from its source (node classes, scripts, help pages), so that it stands in one place;
`locales/en` is written from it by tests/scripts/locales.py. A text has a key such as
`nodeDefs.SkyReelsSampler.inputs.steps.tooltip`, `panel.Save key` or `docs.SkyReelsSampler`.
"""

import hashlib
import json
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import comfyui_skyreels

from . import host
from .project import ROOT

LOCALES = ROOT / "locales"
DOCS = ROOT / "web" / "docs"
PANEL = ROOT / "web" / "wiro" / "lang"
#: language -> key -> digest of the English text that was translated
TRANSLATED = Path(__file__).parent / "translated.json"
#: the files that ComfyUI reads of a pack
FILES = ("main", "nodeDefs", "commands", "settings")
TEXTS_OF_MESSAGES = re.compile(r"[{}@|]")  # signs with a meaning in the page's message format

Tree = dict[str, Any]


def languages() -> list[str]:
    return sorted(p.name for p in LOCALES.iterdir() if p.is_dir() and p.name != "en")


# --- English ------------------------------------------------------------------------------------


def english_files() -> dict[str, Tree]:
    """What stands in locales/en: file name without suffix -> content."""
    nodes = node_texts()
    classes = comfyui_skyreels.NODE_CLASS_MAPPINGS.values()
    categories = sorted({part for cls in classes for part in cls.CATEGORY.split("/")})
    settings, settings_categories, commands = page_texts()
    return {
        "main": {
            "nodeCategories": {name: name for name in categories},
            "settingsCategories": {name: name for name in settings_categories},
        },
        "nodeDefs": nodes,
        "commands": commands,
        "settings": settings,
    }


def node_texts() -> Tree:
    """The node classes in the layout of nodeDefs.json."""
    with tempfile.TemporaryDirectory() as folder:
        stand_ins = host.stand_ins(host.Host(Path(folder)))
        with patch.dict(sys.modules, stand_ins):
            return {name: texts_of(name, cls) for name, cls in _classes().items()}


def _classes() -> dict[str, type]:
    return comfyui_skyreels.NODE_CLASS_MAPPINGS


def texts_of(name: str, cls: Any) -> Tree:
    inputs = {}
    for group, members in cls.INPUT_TYPES().items():
        if group == "hidden":
            continue
        for key, (_, *rest) in members.items():
            options = rest[0] if rest else {}
            inputs[key] = {
                "name": options.get("display_name", key),
                "tooltip": options.get("tooltip", ""),
            }
    outputs = zip(cls.RETURN_NAMES, cls.OUTPUT_TOOLTIPS, strict=True)
    return {
        "display_name": comfyui_skyreels.NODE_DISPLAY_NAME_MAPPINGS[name],
        "description": cls.DESCRIPTION,
        "inputs": inputs,
        "outputs": {
            str(index): {"name": key, "tooltip": tooltip}
            for index, (key, tooltip) in enumerate(outputs)
        },
    }


def page_texts() -> tuple[Tree, list[str], Tree]:
    """Settings, their categories and the sidebar's commands, as the scripts register them."""
    settings, categories, commands = {}, set(), {}
    for path in sorted((ROOT / "web").glob("*.js")):
        text = path.read_text(encoding="utf-8")
        setting = r'id: "(\w+(?:\.\w+)+)",\s*category: (\[.*?\]),\s*name: "(.*?)"'
        for key, found, name in re.findall(setting, text):
            settings[key.replace(".", "_")] = {"name": name}
            categories |= set(json.loads(found))
        for key, title in re.findall(r'id: "([\w-]+)",\s*icon: .*?,\s*title: "(.*?)"', text):
            commands[f"Workspace_ToggleSidebarTab_{key}"] = {"label": f"Toggle {title} Sidebar"}
    return settings, sorted(categories), commands


STRING = r'"(?:[^"\\]|\\.)*"'
MARKED = re.compile(rf"\b(?:t|mark)\(\s*({STRING}(?:\s*\+\s*{STRING})*)")


def panel_texts() -> list[str]:
    """The texts that web/ passes to `t` or `mark`."""
    found = []
    for path in sorted((ROOT / "web").rglob("*.*js")):
        if path.parent == PANEL or path.name == "language.mjs":
            continue
        for joined in MARKED.findall(path.read_text(encoding="utf-8")):
            found.append("".join(json.loads(part) for part in re.findall(STRING, joined)))
    return list(dict.fromkeys(found))


def english() -> dict[str, str]:
    """Every text: key -> English."""
    texts = flat(english_files())
    texts |= {f"panel.{text}": text for text in panel_texts()}
    return texts | {f"docs.{page.stem}": read(page) for page in sorted(DOCS.glob("*.md"))}


# --- a language ---------------------------------------------------------------------------------


def texts_in(language: str) -> dict[str, str]:
    """Every text that a language has: key -> translation."""
    files = {name: json.loads(read(LOCALES / language / f"{name}.json")) for name in FILES}
    texts = flat(files)
    script = read(PANEL / f"{language}.mjs")
    panel = json.loads(script[script.index("{") : script.rindex("}") + 1])
    texts |= {f"panel.{key}": text for key, text in panel.items()}
    pages = sorted(DOCS.glob(f"*/{language}.md"))
    return texts | {f"docs.{page.parent.name}": read(page) for page in pages}


def problems_of(language: str) -> list[str]:
    """What a language lacks or has wrong, one line each."""
    source, texts = english(), texts_in(language)
    known = json.loads(read(TRANSLATED)).get(language, {})
    lines = [f"missing: {key}" for key in source if not texts.get(key)]
    lines += [f"of no text: {key}" for key in texts if key not in source]
    for key in source.keys() & texts.keys():
        if texts[key] and known.get(key) != digest(source[key]):
            lines.append(f"stale, English has changed: {key}")
        lines += [f"{fault}: {key}" for fault in faults_of(key, source[key], texts[key])]
    return sorted(lines)


def faults_of(key: str, source: str, text: str) -> list[str]:
    """How a translation differs from its source in what must be the same in both."""
    parts = {"placeholders": r"\{\w+\}", "figures": r"\d+(?:[.,]\d+)*", "code": r"`[^`\n]+`"}
    if key.startswith("docs."):
        parts |= {
            "links and pictures": r"\]\(([^)\s]+)",
            "headings": r"(?m)^#+(?= )",
            "table rows": r"(?m)^\|",
            "list items": r"(?m)^(?:- |\d+\. )",
            "names of inputs": r"(?m)^- (\*\*\w.*?\*\*)",
        }
    found = []
    for name, pattern in parts.items():
        ours, theirs = (Counter(re.findall(pattern, one)) for one in (text, source))
        if ours != theirs:
            found.append(f"{name} differ: {list((theirs - ours) + (ours - theirs))}")
    if not key.startswith(("docs.", "panel.")) and TEXTS_OF_MESSAGES.search(text):
        found.append("the page cannot show {, }, @ and |")
    return found


# --- both ---------------------------------------------------------------------------------------


def flat(tree: Tree, prefix: str = "") -> dict[str, str]:
    """A tree of texts as one level, keys joined by dots."""
    texts = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            texts |= flat(value, f"{prefix}{key}.")
        else:
            texts[prefix + key] = value
    return texts


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def as_json(tree: Tree) -> str:
    return json.dumps(tree, indent=2, ensure_ascii=False) + "\n"
