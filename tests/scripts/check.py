"""The one command people run: format, lint, types, the page's scripts, tests.

    python tests/scripts/check.py [--fix] [pytest arguments]
    python tests/scripts/check.py --floors [pytest arguments]

--fix formats and mends what ruff can mend instead of only reporting it. The page's scripts are
checked and tested by Node.js (20 or later, no packages), if it is installed. The tests run in as
many processes as there are cores, four at most: each takes up to 4 GB.

--floors runs the tests alone, with the oldest versions that pyproject.toml declares, on the oldest
Python that it declares if one is found. Their environment is kept in .floors/ (about 6 GB on
Linux, where the registry's torch brings CUDA libraries); delete the folder to build it anew.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FLOORS = ROOT / ".floors"
#: parses modules; `node --check` takes one, and a .js for one only from standard input
PARSE = Path(__file__).with_name("parse.mjs")
MOST_WORKERS = 4
OLDEST_NODE = 20
#: not needed to run the tests
NOT_IN_FLOORS = {"mypy", "ruff", "types-requests"}

sys.path.insert(0, str(ROOT / "tests"))  # for `support.*`


def main() -> int:
    """Run what the arguments ask for.

    Returns:
        0, or the exit code of the first step that failed.
    """
    arguments = sys.argv[1:]
    pytest_arguments = [a for a in arguments if a not in ("--fix", "--floors")]
    # what a file's tests share is made once: a file is not split
    workers = ["-n", str(min(os.cpu_count() or 1, MOST_WORKERS)), "--dist", "loadfile"]
    tests = ["pytest", *workers, *pytest_arguments]
    if "--floors" in arguments:
        return check_floors(tests)
    fix = "--fix" in arguments
    lint = [
        ["ruff", "format", *([] if fix else ["--check"]), "."],
        ["ruff", "check", *(["--fix"] if fix else []), "."],
    ]
    workflows = ["tests/scripts/build_workflows.py", *([] if fix else ["--check"])]
    return (
        _run(lint)
        or _run_beside(["mypy"], lambda: _run([workflows]) or check_page())
        or _run([tests])
    )


def check_page() -> int:
    """Parse every script of the page and run the tests of those that need no page."""
    node = shutil.which("node")
    if node is None:
        print("- the page's scripts are not checked: Node.js is not installed", flush=True)
        return 0
    version = subprocess.run([node, "--version"], capture_output=True, text=True, check=False)
    major = version.stdout.strip().removeprefix("v").partition(".")[0]
    if not major.isdigit() or int(major) < OLDEST_NODE:
        found = (
            f"Node.js {OLDEST_NODE} or later is needed, found {version.stdout.strip() or 'none'}"
        )
        print(f"- the page's scripts are not checked: {found}", flush=True)
        return 0
    web = ROOT / "web"
    scripts = sorted([*web.rglob("*.js"), *web.rglob("*.mjs")])
    print(f"+ node {PARSE.name}, of {len(scripts)} scripts", flush=True)
    command = [node, "--experimental-vm-modules", "--no-warnings", str(PARSE)]
    names = [script.relative_to(ROOT).as_posix() for script in scripts]
    code = subprocess.run([*command, *names], cwd=ROOT, check=False).returncode
    if code:
        return code
    tests = sorted(str(path) for path in (ROOT / "tests" / "web").glob("*.test.mjs"))
    print("+ node --test tests/web", flush=True)
    reporter = "--test-reporter=dot"
    return subprocess.run([node, "--test", reporter, *tests], cwd=ROOT, check=False).returncode


def check_floors(tests: Sequence[str]) -> int:
    """Install the oldest declared versions into an environment of their own and run the tests."""
    from support.project import PYPROJECT

    project = PYPROJECT["project"]
    extras = project["optional-dependencies"]
    declared = [*project["dependencies"], *extras["standalone"], *extras["test"]]
    python = FLOORS / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        oldest = project["requires-python"].removeprefix(">=")
        code = _run([["-m", "venv", str(FLOORS)]], _find_python(oldest))
        if code:
            return code
    pinned = oldest_versions(declared)
    # the oldest torch requires a Triton that is older than our kernels can use: replaced afterwards
    triton = [text for text in pinned if text.startswith("triton")]
    steps = [
        ["pip", "install", *(text for text in pinned if text not in triton)],
        ["pip", "install", "--no-deps", *triton],
        ["pip", "install", "--no-deps", "--editable", "."],
        list(tests),
    ]
    return _run(steps, str(python))


def oldest_versions(requirements: Sequence[str]) -> list[str]:
    """Requirements of pyproject.toml (`name>=version; marker`), pinned to the oldest version."""
    names = {text: re.split(r"[^\w-]", text)[0] for text in requirements}
    return [
        text.replace(">=", "==", 1)
        for text, name in names.items()
        if ">=" in text and name not in NOT_IN_FLOORS
    ]


def _find_python(version: str) -> str:
    """An interpreter of that version, such as "3.10", or with a word about it the running one."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    candidates = [shutil.which(f"python{version}"), *pyenv.glob(f"{version}.*/bin/python")]
    for candidate in filter(None, candidates):
        probe = subprocess.run([candidate, "--version"], capture_output=True, check=False)
        if probe.returncode == 0:  # a pyenv shim is found but fails for a version not selected
            return str(candidate)
    running = ".".join(map(str, sys.version_info[:2]))
    if running != version:
        print(f"- Python {version} is not installed: testing on {running} instead", flush=True)
    return sys.executable


def _run(steps: Sequence[Sequence[str]], python: str = sys.executable) -> int:
    """Run modules (`pytest ...`) or scripts (`tests/... .py`) until one fails; its exit code.

    What Python makes of a source is kept, also where the environment tells it otherwise: each
    process of the tests, and dozens of programs that they start, would make it anew.
    """
    for step in steps:
        print("+", " ".join(step), flush=True)
        code = subprocess.run(
            _command(step, python), cwd=ROOT, env=_environment(), check=False
        ).returncode
        if code:
            return code
    return 0


def _run_beside(step: Sequence[str], others: Callable[[], int]) -> int:
    """Run a step of one core while others run; its output comes after theirs."""
    with subprocess.Popen(
        _command(step, sys.executable), cwd=ROOT, env=_environment(),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as beside:  # fmt: skip
        code = others()
        print("+", " ".join(step), flush=True)
        print(beside.communicate()[0], end="", flush=True)
    return code or beside.returncode


def _command(step: Sequence[str], python: str) -> list[str]:
    is_module = not step[0].endswith(".py") and step[0] != "-m"
    return [python, *(["-m"] if is_module else []), *step]


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


if __name__ == "__main__":
    sys.exit(main())
