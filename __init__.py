"""SkyReels V1 (local + Wiro): nodes that turn a picture and a prompt into a video in ComfyUI."""

# pytest and packaging tools import this file without a parent package; ComfyUI never does
if __package__:
    from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

    WEB_DIRECTORY = "./web"
    __all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
