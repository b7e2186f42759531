"""The one command people run: format, lint, types, tests.

    python tests/scripts/check.py [--fix] [pytest arguments]

--fix formats and mends what ruff can mend instead of only reporting it. The tests run in as many
processes as there are cores, four at most: each takes up to 4 GB.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MOST_WORKERS = 4


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
        ["pytest", *workers, *pytest_arguments],
    ]
    for step in steps:
        command = step if step[0] == sys.executable else [sys.executable, "-m", *step]
        print("+", " ".join(step[1:] if step[0] == sys.executable else step), flush=True)
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
