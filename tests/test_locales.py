"""Every text that the page shows is there in every language: nodes, settings, panel, help pages."""

import json
import re

import comfyui_skyreels
import pytest
from support import locales

NODES = comfyui_skyreels.NODE_CLASS_MAPPINGS
LANGUAGES = locales.languages()
HELP = "run `python tests/scripts/locales.py` (CONTRIBUTING.md, Languages)"

pytestmark = pytest.mark.usefixtures("comfy")
each_language = pytest.mark.parametrize("language", LANGUAGES)


def test_there_is_a_second_language():
    assert "zh" in LANGUAGES


def test_english_is_what_the_classes_and_scripts_say():
    for name, tree in locales.english_files().items():
        assert json.loads(locales.read(locales.LOCALES / "en" / f"{name}.json")) == tree, HELP


@each_language
def test_a_language_has_every_text_and_none_is_stale(language):
    problems = locales.problems_of(language)
    assert not problems, "\n".join([HELP, *problems])


@each_language
def test_a_language_holds_the_files_that_comfyui_and_the_page_read(language):
    found = {path.name for path in (locales.LOCALES / language).iterdir()}
    assert found == {f"{name}.json" for name in locales.FILES}
    script = locales.read(locales.PANEL.parent / "language.mjs")
    listed = re.search(r"LANGUAGES = (\[.*?\]);", script)[1]
    assert language in json.loads(listed)


@each_language
def test_nodes_keep_names_of_their_own(language):
    texts = locales.texts_in(language)
    names = {name: texts[f"nodeDefs.{name}.display_name"] for name in NODES}
    assert len(set(names.values())) == len(names)
    for name, shown in names.items():
        assert shown.startswith("SkyReels " if name.startswith("SkyReels") else "Wiro ")


@each_language
def test_help_pages_are_titled_with_the_name_in_the_menu(language):
    texts = locales.texts_in(language)
    for name in NODES:
        page = texts[f"docs.{name}"]
        assert page.startswith(f"# {texts[f'nodeDefs.{name}.display_name']}\n"), name


@each_language
def test_help_pages_say_what_the_inputs_are_called_on_the_node(language):
    texts = locales.texts_in(language)
    unsaid = []
    for name, cls in NODES.items():
        for key in locales.texts_of(name, cls)["inputs"]:
            label = texts[f"nodeDefs.{name}.inputs.{key}.name"]
            is_numbered = re.search(r"\d$", key)  # image_2: as image
            if not is_numbered and label.lower() not in texts[f"docs.{name}"].lower():
                unsaid.append(f"{name}: {key} ({label})")
    assert unsaid == []


def test_every_text_of_the_page_goes_through_the_dictionary():
    """What looks like words and is in no call of `t` or `mark`; a few strings are no texts."""
    no_texts = {"Enter", "Escape", "Wiro", "SkyReels", "Account", "JSON"}
    in_settings = {"Wiro account and limits"}  # locales/*/settings.json
    words = re.compile(r"^[A-Z][a-z]+(?![\w.-])|[a-z]{2,} [a-z]{2,} [a-z]{2,}")
    found = []
    for path in sorted((locales.ROOT / "web").glob("*.js")) + sorted(
        (locales.ROOT / "web").glob("*/*.mjs")
    ):
        text = re.sub(r"(?m)(^|\s)//.*$|/\*.*?\*/", "", locales.read(path))
        text = re.sub(r"(?s)/\*\*.*?\*/", "", text)
        text = re.sub(r"console\.\w+\(.*?\)", "", locales.MARKED.sub("", text))
        for string in re.findall(rf"{locales.STRING}|`[^`\n]*`", text):
            inner = string[1:-1]
            if inner not in no_texts | in_settings and words.search(inner):
                found.append(f"{path.name}: {inner}")
    assert found == []


@pytest.mark.parametrize(
    ("source", "text", "fault"),
    [
        ("97 is four seconds", "是四秒", "figures"),
        ("97 is four seconds", "97 是 4 秒", "figures"),
        ("Spent {day} today", "今天 {tag}", "placeholders"),
        ("as `--json`", "如 `--jsn`", "code"),
        ("one", "一 | 二", "the page cannot show"),
    ],
)
def test_a_translation_with_other_facts_is_found(source, text, fault):
    assert locales.faults_of("panel.x", source, source) == []
    assert any(f.startswith(fault) for f in locales.faults_of("nodeDefs.x", source, text))


@pytest.mark.parametrize(
    ("source", "text", "fault"),
    [
        ("# A\n\n## B\n", "# 甲\n", "headings"),
        ("- **width** (16)", "- **高** (16)", "names of inputs"),
        ("| a |\n| b |", "| 甲 |", "table rows"),
        ("see [x](#a)", "见 [x](#b)", "links"),
    ],
)
def test_a_help_page_of_another_structure_is_found(source, text, fault):
    assert locales.faults_of("docs.X", source, source) == []
    assert any(found.startswith(fault) for found in locales.faults_of("docs.X", source, text))


def test_a_text_whose_english_changed_is_stale(monkeypatch):
    key = "nodeDefs.SkyReelsSampler.description"
    changed = locales.english() | {key: "Another sentence."}
    monkeypatch.setattr(locales, "english", lambda: changed)
    assert f"stale, English has changed: {key}" in locales.problems_of("zh")
