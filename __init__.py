"""SkyReels V1 (local + Wiro): nodes that turn a picture and a prompt into a video in ComfyUI."""

# pytest and packaging tools import this file without a parent package; ComfyUI never does
if __package__:
    from pathlib import Path as _Path

    from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
    from .nodes import register as _register

    WEB_DIRECTORY: str | None = "./web"
    if not _register(_Path(__file__).parent):  # another copy of the pack serves this ComfyUI
        NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, WEB_DIRECTORY = {}, {}, None
    __all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
