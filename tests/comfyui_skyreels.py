"""The pack under the name that tests, benches and scripts import it by.

With `tests/` on `sys.path`, `import comfyui_skyreels.skyreels` loads the whole pack once, as
ComfyUI does (support/pack.py). No class exists twice, every relative import is proved, and `nodes`
is never importable as a top-level name.
"""

from support.pack import load_pack

load_pack(__name__)
