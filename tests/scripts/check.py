"""The one command people run: format, lint, types, the page's scripts, tests.

    python tests/scripts/check.py [--fix] [pytest arguments]

--fix formats and mends what ruff can mend instead of only reporting it. The page's scripts are
checked and tested by Node.js (20 or later, no packages), if it is installed. The tests run in as
many processes as there are cores, four at most: each takes up to 4 GB.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MOST_WORKERS = 4
OLDEST_NODE = 20


def main() -> int:
    arguments = sys.argv[1:]
    fix = "--fix" in arguments
    pytest_arguments = [a for a in arguments if a != "--fix"]
    # what a file's tests share is made once: a file is not split
    workers = ["-n", str(min(os.cpu_count() or 1, MOST_WORKERS)), "--dist", "loadfile"]
    steps = [
        ["ruff", "format", *([] if fix else ["--check"]), "."],
        ["ruff", "check", *(["--fix"] if fix else []), "."],
        ["mypy"],
        [sys.executable, "tests/scripts/build_workflows.py", *([] if fix else ["--check"])],
    ]
    return _run(steps) or check_page() or _run([["pytest", *workers, *pytest_arguments]])


def check_page() -> int:
    """Parse every script of the page and run the tests of those that need no page."""
    node = shutil.which("node")
    if node is None:
        print("- the page's scripts are not checked: Node.js is not installed", flush=True)
        return 0
    told = subprocess.run([node, "--version"], capture_output=True, text=True, check=False).stdout
    major = told.removeprefix("v").partition(".")[0]
    if not major.isdigit() or int(major) < OLDEST_NODE:
        wanted = f"it is {told.strip() or 'of no version'}, and {OLDEST_NODE} is wanted"
        print(f"- the page's scripts are not checked by Node.js: {wanted}", flush=True)
        return 0
    web = ROOT / "web"
    scripts = sorted([*web.rglob("*.js"), *web.rglob("*.mjs")])
    print(f"+ node --check, of {len(scripts)} scripts", flush=True)
    for script in scripts:  # from its input, because only there a .js can be told to be a module
        with script.open("rb") as text:
            command = [node, "--input-type=module", "--check", "-"]
            code = subprocess.run(command, stdin=text, check=False).returncode
        if code:
            print(f"{script.relative_to(ROOT)} does not parse", flush=True)
            return code
    tests = sorted(str(path) for path in (ROOT / "tests" / "web").glob("*.test.mjs"))
    print("+ node --test tests/web", flush=True)
    reporter = "--test-reporter=dot"
    return subprocess.run([node, "--test", reporter, *tests], cwd=ROOT, check=False).returncode


def _run(steps: list[list[str]]) -> int:
    for step in steps:
        command = step if step[0] == sys.executable else [sys.executable, "-m", *step]
        print("+", " ".join(step[1:] if step[0] == sys.executable else step), flush=True)
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
