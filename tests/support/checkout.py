"""Where a real ComfyUI is, and the one sentence when there is none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(os.environ.get("COMFYUI_DIR") or Path.home() / "ComfyUI")


def python() -> str:
    """The interpreter that has ComfyUI's requirements."""
    own = CHECKOUT / ".venv" / "bin" / "python"
    return os.environ.get("COMFYUI_PYTHON") or (str(own) if own.exists() else sys.executable)


def _why_not() -> str:
    if not (CHECKOUT / "main.py").is_file():
        return "no ComfyUI checkout (set COMFYUI_DIR)"
    probe = subprocess.run(
        [python(), "-c", "import torch, torchvision, torchaudio, aiohttp"],
        capture_output=True,
        check=False,
    )
    return "" if probe.returncode == 0 else "ComfyUI's own requirements are not installed"


_reason = _why_not()
needs_comfy = pytest.mark.skipif(bool(_reason), reason=_reason or "unused")
