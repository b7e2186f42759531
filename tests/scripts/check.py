"""The one command people run: format, lint, types, tests.

    python tests/scripts/check.py [--fix] [pytest arguments]

--fix formats and mends what ruff can mend instead of only reporting it.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    arguments = sys.argv[1:]
    fix = "--fix" in arguments
    pytest_arguments = [a for a in arguments if a != "--fix"]
    steps = [
        ["ruff", "format", *([] if fix else ["--check"]), "."],
        ["ruff", "check", *(["--fix"] if fix else []), "."],
        ["mypy"],
        [sys.executable, "tests/scripts/build_workflows.py", *([] if fix else ["--check"])],
        ["pytest", *pytest_arguments],
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
