"""Where real ComfyUIs are, and the one sentence for each that cannot be used."""

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Checkout:
    """A folder of ComfyUI's source."""

    folder: Path

    def python(self) -> str:
        """The interpreter that has ComfyUI's requirements."""
        own = self.folder / ".venv" / "bin" / "python"
        return os.environ.get("COMFYUI_PYTHON") or (str(own) if own.exists() else sys.executable)

    def problem(self) -> str:
        """Why the tests cannot use it, or ""."""
        if not (self.folder / "main.py").is_file():
            return "no ComfyUI checkout (set COMFYUI_DIR)"
        # found and not imported: that takes seconds, in each process of the tests
        code = "import sys; from importlib.util import find_spec as find; "
        code += "sys.exit(not all(map(find, sys.argv[1:])))"
        command = [self.python(), "-c", code, "torch", "torchvision", "torchaudio", "aiohttp"]
        probe = subprocess.run(command, capture_output=True, check=False)
        return "" if probe.returncode == 0 else "ComfyUI's own requirements are not installed"


def checkouts(environment: Mapping[str, str] = os.environ) -> list[Checkout]:
    """Those of COMFYUI_DIR, separated by the path separator; else `~/ComfyUI`."""
    folders = [each for each in environment.get("COMFYUI_DIR", "").split(os.pathsep) if each]
    return [Checkout(Path(each)) for each in folders or [Path.home() / "ComfyUI"]]


def parameters() -> list:
    """A parameter of each checkout, for a fixture; skipped with the reason where it is unusable."""
    found = []
    for each in checkouts():
        problem = each.problem()
        marks = [pytest.mark.skip(reason=problem)] if problem else []
        found.append(pytest.param(each, id=each.folder.name, marks=marks))
    return found
