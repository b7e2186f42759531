"""Weights among ComfyUI's models that a clip can be made with, known by their headers."""

import functools
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from ...skyreels.config import TransformerConfig
from ...skyreels.errors import SkyReelsError
from ...skyreels.text.sources import find_text_sources
from ...skyreels.weights.inspect import CheckpointInfo, inspect
from ...skyreels.weights.load import check_transformer, check_vae
from .. import host
from .loaders import transformer_folders, vae_folders
from .text import IN_THE_FOLDER, encoder_files, encoder_folders

logger = logging.getLogger("skyreels.nodes.local.found")

#: files whose header can be read without reading the file
_WITH_HEADER = (".safetensors", ".sft", ".gguf")


def transformers() -> list[str]:
    """Image-to-video transformers as the loader lists them, the largest file first."""
    sizes: dict[str, int] = {}
    for name, path in _choices("diffusion_models", transformer_folders()):
        info = _info(path, "transformer")
        config = None if info is None else info.config
        if info is not None and isinstance(config, TransformerConfig) and config.takes_image:
            sizes[name] = info.num_bytes
    return sorted(sizes, key=lambda name: (-sizes[name], name))


def vae() -> str | None:
    """A HunyuanVideo VAE as the loader lists it."""
    for name, path in _choices("vae", vae_folders()):
        if _info(path, "vae") is not None:
            return name
    return None


def text_encoders(chosen: str | None = None) -> tuple[str, str] | None:
    """Both text encoders as the loader lists them.

    Args:
        chosen: a folder with both, or LLaMA-3, to which CLIP-L is looked for.

    Returns:
        Values of `text_encoder` and `clip` of SkyReels Load Text Encoder; None if one is missing.
    """
    folders = encoder_folders()
    both = [name for name, folder in folders.items() if (folder / "text_encoder_2").is_dir()]
    if chosen in both:
        return str(chosen), IN_THE_FOLDER
    names = [name for name in (*folders, *_with_header(encoder_files())) if name not in both]
    paths = {name: host.resolve("text_encoders", name, folders) for name in names}
    families = {name: info.family for name, path in paths.items() if (info := _info(path))}
    clips = [name for name, family in families.items() if family == "clip"]
    llamas = [name for name, family in families.items() if family == "llama"]
    for llama in llamas if chosen is None else [chosen]:
        for clip in clips:
            if llama in paths and _go_together(paths[llama], paths[clip]):
                return llama, clip
    return (both[0], IN_THE_FOLDER) if both and chosen is None else None


def _go_together(llama: Path, clip: Path) -> bool:
    try:
        find_text_sources([llama, clip], (), host.tokenizer_folders())
    except SkyReelsError as error:
        logger.info("%s with %s: %s", llama.name, clip.name, error)
        return False
    return True


def _choices(kind: str, folders: Mapping[str, Path]) -> Iterator[tuple[str, Path]]:
    for name in (*_with_header(host.weight_files(kind)), *folders):
        yield name, host.resolve(kind, name, dict(folders))


def _with_header(names: Iterable[str]) -> list[str]:
    return [name for name in names if name.lower().endswith(_WITH_HEADER)]


def _info(path: Path, part: str = "") -> CheckpointInfo | None:
    """What a file or folder is, if it can be used for a part."""
    status = path.stat()
    return _read(path, part, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=512)
def _read(path: Path, part: str, num_bytes: int, changed_ns: int) -> CheckpointInfo | None:
    try:
        if part == "transformer":
            return check_transformer(path)
        return check_vae(path) if part == "vae" else inspect(path)
    except SkyReelsError as error:  # another model: these folders hold those of all packs
        logger.debug("%s is not used: %s", path.name, error)
        return None
