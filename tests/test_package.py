"""What users get: the zip of the ComfyUI registry, the wheel, the commands; two copies at once."""

import ast
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image
from support.forked import forks
from support.project import PYPROJECT, ROOT

LARGEST_ZIP_BYTES = 12_000_000
#: folders of which no file is shipped
UNSHIPPED = {"tests", ".ci", ".github"}
#: the one command of the README that needs a clone of the repository
TEST_COMMAND = 'pip install -e ".[test]" && python tests/scripts/check.py'
FIRST_COMMAND = (
    'pip install ".[standalone]" && python -m skyreels generate --prompt "a red circle moves left" '
    "--out first.mp4"
)


def git_files(*options: str) -> set[str]:
    command = ["git", "ls-files", "-z", "--cached", *options]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if run.returncode:
        pytest.skip("not a git checkout")
    return set(filter(None, run.stdout.decode().split("\0")))


@pytest.fixture(scope="module")
def published() -> list[str]:
    """The files that the registry ships: those git tracks but for the patterns of .comfyignore."""
    return sorted(git_files() - git_files("--ignored", "--exclude-from=.comfyignore"))


@pytest.fixture(scope="module")
def archive(published, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("published") / "skyreels-wiro.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:  # a larger one
        for name in published:
            file.write(ROOT / name, name)
    return path


def test_the_published_zip_holds_the_pack_and_no_test_bench_or_recipe(published, archive):
    assert not {name.split("/")[0] for name in published} & UNSHIPPED
    assert {"__init__.py", "pyproject.toml", "requirements.txt", "LICENSE"} <= set(published)
    folders = {name.split("/")[0] for name in published if "/" in name}
    assert folders >= {"nodes", "skyreels", "wiro_api", "web", "workflows", "locales"}
    assert archive.stat().st_size <= LARGEST_ZIP_BYTES


def test_the_registry_finds_icon_banner_devices_and_no_second_copy_of_the_page(published):
    comfy, project = PYPROJECT["tool"]["comfy"], PYPROJECT["project"]
    repository = project["urls"]["Repository"]
    served = repository.replace("//github.com", "//raw.githubusercontent.com") + "/main/"
    sizes = {"Icon": (400, 400), "Banner": (1260, 540)}  # at most 800x400; 21:9
    for field, size in sizes.items():
        name = comfy[field].removeprefix(served)
        assert name in published
        with Image.open(ROOT / name) as image:
            assert image.size == size
    assert "web" not in comfy
    # one value that the registry does not know blanks all
    devices = {text for text in project["classifiers"] if text.startswith("Environment ::")}
    known = {"NVIDIA CUDA", "AMD ROCm", "Apple Metal"}
    assert devices == {f"Environment :: GPU :: {name}" for name in known}
    for word in ("image to video", "i2v", "hunyuan", "wiro"):
        assert word in project["description"].lower()


def test_the_readme_makes_sense_without_the_repository(published):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert FIRST_COMMAND in text
    assert TEST_COMMAND in text
    assert "tests/" not in text.replace(TEST_COMMAND, "")
    assert "tests." not in text
    repository = PYPROJECT["project"]["urls"]["Repository"]
    raw = repository.replace("//github.com", "//raw.githubusercontent.com")
    own = 0
    for is_picture, target in re.findall(r"(!?)\[[^\]]*\]\(([^)#]+)", text):
        assert target.startswith("https://"), (
            f"{target}: the registry's page shows no relative link"
        )
        for place in (f"{repository}/blob/main/", f"{raw}/main/"):
            if target.startswith(place):
                own += 1
                assert target.removeprefix(place) in published, target
                assert bool(is_picture) == place.startswith(raw)
    assert own > 5


def test_the_changelog_names_the_version_with_a_date_below_an_unreleased_section():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## \[(.+?)\](.*)$", text, re.M)
    version, date = headings[1]
    assert headings[0] == ("Unreleased", "")
    assert version == PYPROJECT["project"]["version"]
    assert re.fullmatch(r" - \d{4}-\d\d-\d\d", date)


def test_no_message_sends_users_to_the_tests(published):
    found = []
    for name in published:
        if not name.endswith(".py"):
            continue
        text = (ROOT / name).read_text(encoding="utf-8")
        if "tests" not in text:
            continue
        tree = ast.parse(text)
        bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        found += [
            f"{name}:{node.lineno}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and id(node) not in bare  # no docstring
            if isinstance(node.value, str) and re.search(r"\btests[/.]", node.value)
        ]
    assert found == []


def test_the_wheel_holds_both_packages_with_their_data_and_nothing_else(archive, tmp_path):
    try:
        setuptools = importlib.metadata.version("setuptools")
    except importlib.metadata.PackageNotFoundError:
        setuptools = "0"
    if int(setuptools.partition(".")[0]) < 77:
        pytest.skip("setuptools is missing, or older than the project needs to be built")
    source = tmp_path / "source"
    zipfile.ZipFile(archive).extractall(source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index",
               "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
        entries = file.read(next(n for n in file.namelist() if n.endswith("entry_points.txt")))
    expected = {
        path.relative_to(source).as_posix()
        for folder in ("skyreels", "wiro_api")
        for path in (source / folder).rglob("*")
        if path.is_file()
    }
    assert names == expected
    assert {"skyreels/py.typed", "wiro_api/py.typed"} <= names
    for command_name, target in PYPROJECT["project"]["scripts"].items():
        assert f"{command_name} = {target}" in entries.decode()


@pytest.mark.parametrize("name", PYPROJECT["project"]["scripts"])
def test_the_console_commands_run_and_answer_wrong_usage_with_2(name):
    module, _, function = PYPROJECT["project"]["scripts"][name].partition(":")
    code = f"import sys; from {module} import {function}; sys.exit({function}())"

    def run(*arguments: str) -> subprocess.CompletedProcess:
        return forks("torch").run(["-c", code, *arguments], {**os.environ})

    shown = run("--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "usage:" in shown.stdout
    assert run("no-such-command").returncode == 2


def test_the_oldest_versions_are_pinned_for_every_package_that_the_tests_need():
    from scripts.check import NOT_IN_FLOORS, oldest_versions

    project = PYPROJECT["project"]
    extras = project["optional-dependencies"]
    declared = [*project["dependencies"], *extras["standalone"], *extras["test"]]
    pinned = dict(text.split(";")[0].split("==") for text in oldest_versions(declared))
    names = {re.split(r"[^\w-]", text)[0] for text in declared}
    assert pinned.keys() == names - NOT_IN_FLOORS - {project["name"]}
    assert (pinned["torch"], pinned["einops"]) == ("2.5.1", "0.6")


# --- two copies in one ComfyUI ------------------------------------------------------------------

#: argv: tests folder, state folder, whether there is a server, then folder=name of each load
LOAD = """
import importlib.util, json, logging, sys
from pathlib import Path
from types import SimpleNamespace

tests, state, has_server, *loads = sys.argv[1:]
sys.path.insert(0, tests)
import torch
from support import host

torch.set_num_threads(1)
stand_ins = host.stand_ins(host.Host(Path(state)))

class Table(list):
    "The server's table of routes: method and path of each."
    def get(self, path):
        return lambda handler: self.append(("GET", path))
    def post(self, path):
        return lambda handler: self.append(("POST", path))

routes = Table()
if has_server == "True":
    server = stand_ins["server"].PromptServer.instance
    server.routes, server.loop = routes, SimpleNamespace(call_soon=lambda work: None)
else:
    del stand_ins["server"]
sys.modules.update(stand_ins)
records = []
handler = logging.Handler()
handler.emit = lambda record: records.append(record.getMessage())
logging.getLogger().addHandler(handler)

def load(folder, name):
    for loaded in [key for key in sys.modules if key == name or key.startswith(name + ".")]:
        del sys.modules[loaded]
    spec = importlib.util.spec_from_file_location(
        name, f"{folder}/__init__.py", submodule_search_locations=[folder])
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def make_video(classes):
    prompt = json.loads(Path(tests, "workflows", "quick_start.api.json").read_text("utf-8"))
    prompt["10"]["inputs"]["num_frames"] = 5
    prompt["12"]["inputs"].update(steps=1, cfg=1.0)
    return list(host.run_prompt(prompt, classes)["13"][0].shape)

copies = [load(*each.split("=")) for each in loads]
print(json.dumps({
    "nodes": [sorted(copy.NODE_CLASS_MAPPINGS) for copy in copies],
    "pages": [copy.WEB_DIRECTORY for copy in copies],
    "videos": [make_video(copy.NODE_CLASS_MAPPINGS) for copy in copies if has_server != "True"],
    "routes": routes,
    "warnings": [text for text in records if "copies" in text],
}))
"""


@pytest.fixture(scope="module")
def two_folders(archive, tmp_path_factory) -> tuple[str, str]:
    """The pack in two folders whose names differ in one sign, as an install and a clone do."""
    root = tmp_path_factory.mktemp("custom_nodes")
    folders = root / "skyreels-wiro", root / "skyreels_wiro"
    for folder in folders:
        zipfile.ZipFile(archive).extractall(folder)
    return str(folders[0]), str(folders[1])


def load(tmp_path: Path, *loads: str, has_server: bool) -> dict:
    arguments = [str(ROOT / "tests"), str(tmp_path), str(has_server), *loads]
    run = forks("torch").run(["-c", LOAD, *arguments], {**os.environ})
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_two_copies_a_second_name_and_a_reload_all_work_in_one_process(two_folders, tmp_path):
    first, second = two_folders  # ComfyUI names a pack by its path
    loads = (f"{first}={first}", f"{second}={second}", f"{first}=other", f"{first}={first}")
    found = load(tmp_path, *loads, has_server=False)
    assert found["nodes"] == [found["nodes"][0]] * 4
    assert found["videos"] == [[5, 64, 64, 3]] * 4
    assert found["warnings"] == []


def test_of_two_copies_on_one_server_the_first_serves_and_the_second_says_so(two_folders, tmp_path):
    first, second = two_folders
    loads = (f"{first}={first}", f"{second}={second}", f"{first}={first}")
    found = load(tmp_path, *loads, has_server=True)
    nodes, ignored, again = found["nodes"]
    assert (len(nodes) > 0, ignored, again) == (True, [], nodes)
    assert found["pages"] == ["./web", None, "./web"]
    routes = [tuple(route) for route in found["routes"]]
    assert len(set(routes)) == len(routes) > 0
    (warning,) = found["warnings"]
    assert first in warning
    assert second in warning


@pytest.mark.parametrize("module", ["skyreels", "wiro_api"])
def test_errors_are_named_without_the_path_of_a_module_and_cross_processes(module):
    import importlib
    import pickle
    import traceback

    errors = importlib.import_module(f"comfyui_skyreels.{module}.errors")
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    kinds = [kind for kind in kinds if issubclass(kind, Exception)]
    assert len(kinds) >= 8
    for kind in kinds:
        error = kind.__new__(kind, "what is wrong")
        error.args, error.extra = ("what is wrong",), 3
        said = traceback.format_exception_only(error)[-1]
        assert said == f"{kind.__name__}: what is wrong\n"
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), again.args, again.extra) == (kind, error.args, 3)
