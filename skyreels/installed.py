"""Whether the packages that every part needs are there, in a sentence instead of a traceback.

Imported before anything that needs them, so it needs none itself.
"""

import importlib.util
import json
import sys

#: what is imported everywhere
REQUIRED = ("torch", "numpy", "einops", "safetensors")


def check_installed() -> None:
    """Refuse to go on without them; `python -m skyreels` says so and ends.

    Raises:
        ImportError: names what is missing and the command that installs it.
    """
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if not missing:
        return
    are = "is" if len(missing) == 1 else "are"
    message = (
        f"{' and '.join(missing)} {are} not installed: {sys.executable} -m pip install "
        f"{' '.join(missing)}"
    )
    if sys.argv[:1] == ["-m"] and "skyreels" in sys.orig_argv:  # as Python imports the package
        print(f"error: {message}", file=sys.stderr)  # noqa: T201
        if "--json" in sys.argv:
            print(json.dumps({"error": message}))  # noqa: T201
        sys.exit(1)
    raise ImportError(message)
