"""The pack loaded the way ComfyUI does it: by path, under a name of the caller's choice."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]


def load_pack(name: str, root: Path = ROOT) -> ModuleType:
    """Import the `__init__.py` of a copy of the pack as a package of this name.

    ComfyUI takes the folder's path as the name, so no import statement could name it.

    Args:
        name: key in `sys.modules`; what stood there is replaced.
        root: folder of the copy.
    """
    spec = importlib.util.spec_from_file_location(
        name, root / "__init__.py", submodule_search_locations=[str(root)]
    )
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
