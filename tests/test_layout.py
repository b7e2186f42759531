"""Who may import whom, and that importing does nothing."""

import ast
import os
import re
import subprocess
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from types import ModuleType

import pytest
from support.forked import forks
from support.project import PYPROJECT, ROOT

HOST = {
    "comfy",
    "folder_paths",
    "server",
    "latent_preview",
    "execution",
    "comfy_api",
    "node_helpers",
}
HEAVY = {"diffusers", "transformers", "triton", "av", "PIL", "websocket", "tokenizers", "ray"}

#: a room of skyreels/ (a file, or a folder) may import those of a later row, and of its own folder
LAYERS = [
    {"cli"},
    {"builtin", "pipeline"},
    {"doctor", "sampling", "text"},
    {"image", "plan", "weights"},
    {"conditioning", "media", "transformer", "vae"},
    {"config", "files", "kernels", "runtime"},
    {"errors"},
]


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports(path: Path) -> list[tuple[str, int, bool]]:
    """(module, relative level, inside a function or TYPE_CHECKING) of every import."""
    tree = parsed(path)
    top = {id(node) for node in tree.body}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, 0, id(node) not in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module] if node.module else [alias.name for alias in node.names]
            found += [(module, node.level, id(node) not in top) for module in modules]
    return found


@pytest.mark.parametrize("path", [*sources("skyreels"), *sources("wiro_api")], ids=str)
def test_engine_and_client_never_name_the_host_or_each_other(path):
    for module, level, _ in imports(path):
        root = module.split(".")[0]
        assert root not in HOST
        assert level == 0 or root != "nodes"
        assert root not in {"skyreels", "wiro_api"}, "imports within the pack are relative"
    if path.is_relative_to(ROOT / "wiro_api"):
        assert all(module.split(".")[0] != "torch" for module, _, _ in imports(path))


@cache
def imported_modules(path: Path) -> set[str]:
    """Dotted names, below the pack, of what a module of the engine imports when it is imported."""
    package = path.relative_to(ROOT).parts[:-1]
    found = set()
    for node in parsed(path).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            base += tuple(node.module.split(".")) if node.module else ()
            for alias in node.names:
                inner = ROOT.joinpath(*base, alias.name)
                is_module = inner.with_suffix(".py").exists() or inner.is_dir()
                found.add(".".join((*base, alias.name) if is_module else base))
    return found


def test_imports_in_the_engine_only_go_down():
    floors = {room: floor for floor, rooms in enumerate(LAYERS) for room in rooms}
    there = {path.stem for path in (ROOT / "skyreels").iterdir() if "." not in path.stem}
    assert floors.keys() == there - {"__init__", "__main__", "__pycache__", "py"}
    upward = []
    for path in sources("skyreels"):
        room = path.relative_to(ROOT / "skyreels").with_suffix("").parts[0]
        if room in {"__init__", "__main__"}:
            continue  # these only name what others made
        for target in imported_modules(path):
            other = target.split(".")[1]
            if other != room and floors[other] <= floors[room]:
                upward.append(f"{path.relative_to(ROOT)} -> {target}")
    assert upward == []


@pytest.mark.parametrize("folder", ["nodes", "skyreels", "wiro_api"])
def test_no_imports_go_in_a_circle(folder):
    def name_of(path: Path) -> str:
        parts = path.relative_to(ROOT).with_suffix("").parts
        return ".".join(part for part in parts if part != "__init__")

    graph = {name_of(path): imported_modules(path) for path in sources(folder)}
    graph.pop(folder)  # the root re-exports
    TopologicalSorter(graph).prepare()  # raises CycleError, naming the circle


def test_the_formatter_lays_out_nearly_all_of_the_packages():
    """A few tables of numbers read better as they are written."""
    places = [
        f"{path.relative_to(ROOT)}:{number}"
        for folder in ("nodes", "skyreels", "wiro_api")
        for path in sources(folder)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if "fmt: skip" in line or "fmt: off" in line
    ]
    assert len(places) <= 5, places


@pytest.mark.parametrize(
    ("place", "name", "num_arguments", "num_lines"),
    [
        ("skyreels/pipeline/__init__.py", "image_to_video", 12, 60),
        ("skyreels/sampling/sample.py", "sample", 8, 60),
        ("nodes/local/sampler.py", "sample", None, 60),  # an argument for each widget
    ],
)
def test_what_is_read_first_fits_on_a_screen(place, name, num_arguments, num_lines):
    functions = [
        each for each in ast.walk(parsed(ROOT / place)) if isinstance(each, ast.FunctionDef)
    ]
    [function] = [each for each in functions if each.name == name]
    arguments = [*function.args.args, *function.args.kwonlyargs]
    assert num_arguments is None or len(arguments) <= num_arguments
    first = function.body[ast.get_docstring(function) is not None]
    assert function.body[-1].end_lineno - first.lineno < num_lines


def test_of_the_nodes_only_the_host_folder_names_comfyui():
    for path in sources("nodes"):
        named = {module.split(".")[0] for module, level, _ in imports(path) if not level}
        assert path.parent.name == "host" or not named & HOST, path


@pytest.mark.parametrize("folder", ["nodes", "skyreels", "wiro_api"])
def test_heavy_packages_are_imported_inside_functions(folder):
    for path in sources(folder):
        for module, level, is_late in imports(path):
            root = module.split(".")[0]
            if path.parent.name == "triton":
                continue  # these are themselves imported inside functions
            assert level or is_late or root not in HEAVY | (HOST if folder == "nodes" else set())
            assert is_late or "triton" not in module.split("."), module


def test_library_works_alone_and_leaves_the_host_and_heavy_packages_out():
    code = (
        "import sys; import skyreels, wiro_api, skyreels.pipeline, skyreels.cli, skyreels.builtin;"
        f"print(sorted({HOST | HEAVY!r} & set(sys.modules)))"
    )
    run = forks("torch").run(["-c", code], {**os.environ})
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"


def public_names(package) -> set[str]:
    """What the root of a package defines or imports for its users; its modules are none of it."""
    return {
        name
        for name, value in vars(package).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }


def test_public_names_are_exactly_those_listed():
    import comfyui_skyreels
    from comfyui_skyreels import skyreels, wiro_api
    from comfyui_skyreels.nodes import host

    for package in (comfyui_skyreels, skyreels, wiro_api, host):
        assert set(package.__all__) == public_names(package), package.__name__
        assert len(set(package.__all__)) == len(package.__all__)


def test_every_node_class_is_handed_to_comfyui_with_a_display_name():
    from comfyui_skyreels import nodes

    classes = {name for name in public_names(nodes) if isinstance(vars(nodes)[name], type)} - {
        "Path"
    }
    defined = {
        node.name
        for path in sources("nodes")
        for node in parsed(path).body
        if isinstance(node, ast.ClassDef)
        and any(isinstance(n, ast.Assign) and n.targets[0].id == "CATEGORY" for n in node.body)
    }
    assert set(nodes.NODE_CLASS_MAPPINGS) == set(nodes.NODE_DISPLAY_NAME_MAPPINGS)
    assert set(nodes.NODE_CLASS_MAPPINGS) == classes == defined


def test_requirements_equal_the_projects_dependencies_and_are_floors():
    project = PYPROJECT["project"]
    lines = (ROOT / "requirements.txt").read_text().split()
    assert lines == project["dependencies"]
    assert all(re.fullmatch(r"[a-z-]+>=[\d.]+", line) for line in lines)
    assert not any(line.startswith("torch") for line in lines)


def test_packages_listed_for_installation_exist_and_leave_the_root_out():
    tool = PYPROJECT["tool"]["setuptools"]
    expected = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for folder in ("skyreels", "wiro_api")
        for path in (ROOT / folder).rglob("__init__.py")
    }
    assert set(tool["packages"]) == expected
    assert "" not in tool["package-dir"]


def test_documented_functions_have_docstrings():
    bare = []
    for path in [*sources("skyreels"), *sources("wiro_api")]:
        tree = parsed(path)
        assert ast.get_docstring(tree), path
        for node in tree.body:
            is_code = isinstance(node, ast.FunctionDef | ast.ClassDef)
            if is_code and not node.name.startswith("_") and not ast.get_docstring(node):
                bare.append(f"{path.name}:{node.name}")
    assert bare == []


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    """Name -> text of the files of the repository that people read."""
    run = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if run.returncode:
        pytest.skip("not a git checkout")
    kinds = {".py", ".json", ".md", ".toml", ".js", ".mjs", ".yml", ".yaml"}
    names = [name for name in run.stdout.decode().split("\0") if Path(name).suffix in kinds]
    return {name: (ROOT / name).read_text(encoding="utf-8") for name in names}


#: fixed; `locales/` and `subgraphs/` are looked for by ComfyUI
TOP_LEVEL = {
    *("__init__.py", "nodes", "skyreels", "wiro_api", "web", "workflows", "tests"),
    *("pyproject.toml", "requirements.txt", "locales", "subgraphs", "LICENSE"),
    *("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"),
    *(".ci", ".github", ".gitignore", ".comfyignore", ".pre-commit-config.yaml"),
}


def test_nothing_else_lies_at_the_top():
    run = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    there = {name.split("/")[0] for name in run.stdout.decode().split("\0") if name}
    assert there <= TOP_LEVEL


def test_repository_holds_no_private_path(texts):
    pattern = re.compile(r"/(root|home|Users)/\w|[A-Z]:\\+Users")
    assert [name for name, text in texts.items() if pattern.search(text)] == []


#: files of other projects that are named as sources, or looked for
FOREIGN = {
    "autoencoder_kl_causal_3d.py",
    "autoencoder_kl_hunyuan_video.py",
    "cli_args.py",
    "comfy/k_diffusion/sampling.py",
    "comfy/ldm/hunyuan_video/model.py",
    "comfy/samplers.py",
    "comfy/sd1_clip.py",
    "comfy/utils.py",
    "convert_hunyuan_video_to_diffusers.py",
    "main.py",
    "pipeline_hunyuan_skyreels_image2video.py",
    "pricing.md",
    "src/mochi_preview/infer.py",
    "video_generate.py",
    "websocket.md",
}


def test_every_file_that_a_text_names_exists(texts):
    word = re.compile(r"(?<![\w/.:@<>{}*-])((?:[\w.-]+/)*[\w-]+\.(?:md|py))\b(?![(\w*])")
    there = [f"/{name}" for name in {*texts, *FOREIGN}]
    missing = {
        f"{name}: {path}"
        for name, text in texts.items()
        if name.endswith((".py", ".md", ".toml", ".yml", ".yaml"))
        for path in word.findall(text)
        if not any(known.endswith(f"/{path}") for known in there)
        and not any(path.endswith(f"/{known}") for known in FOREIGN)
    }
    assert missing == set()


def test_texts_name_no_section_of_a_document_that_is_not_here(texts):
    word = re.compile(r"\b(performance plan|speed plan|specs?, section|design\.md|specs/)")
    own = Path(__file__).relative_to(ROOT).as_posix()
    assert [name for name, text in texts.items() if name != own and word.search(text)] == []


@pytest.mark.parametrize("path", [".github", ".pre-commit-config.yaml"])
def test_configuration_files_parse(path):
    yaml = pytest.importorskip("yaml")
    root = ROOT / path
    files = sorted(root.rglob("*.yml")) if root.is_dir() else [root]
    assert files
    for file in files:
        assert isinstance(yaml.safe_load(file.read_text(encoding="utf-8")), dict), file
