"""ComfyUI nodes: thin adapters over `skyreels`; the only folder that may import ComfyUI."""

NODE_CLASS_MAPPINGS: dict[str, type] = {}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {}
