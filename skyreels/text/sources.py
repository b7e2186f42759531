"""Which files hold the two text encoders and their tokenizers.

They come as one folder in the layout of hunyuanvideo-community/HunyuanVideo, or as ComfyUI's users
have them: one file for each model (or a folder of shards), without a tokenizer. Files are told
apart by their tensors, tokenizers by their tokens; names decide only where a tokenizer is looked
for.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError
from ..files import MAX_JSON_BYTES
from ..weights.inspect import FAMILY_NAMES, inspect

#: family of a checkpoint -> its name, a token that only its tokenizer has, and the folder of
#: hunyuanvideo-community/HunyuanVideo that holds this tokenizer
MODELS = {
    "llama": ("LLaMA-3", "<|start_header_id|>", "tokenizer"),
    "clip": ("CLIP-L", "<|startoftext|>", "tokenizer_2"),
}
#: where tokenizers lie below a folder: diffusers' names, then ComfyUI's
_BELOW = (".", "tokenizer", "tokenizer_2", "llama_tokenizer", "sd1_tokenizer")
#: where they lie below a checkout of ComfyUI
_IN_COMFYUI = ("comfy/text_encoders/llama_tokenizer", "comfy/sd1_tokenizer")
#: folders above a weight file of which one may be that checkout: models/text_encoders/a/b
_LEVELS_UP = 4


@dataclass(frozen=True)
class TextSources:
    """Where each part of the text encoder is.

    Attributes:
        llm: LLaMA-3, one file or a folder of shards.
        clip: CLIP-L, likewise.
        llm_tokenizer: folder with tokenizer.json.
        clip_tokenizer: folder with tokenizer.json, or vocab.json and merges.txt.
    """

    llm: Path
    clip: Path
    llm_tokenizer: Path
    clip_tokenizer: Path


def find_text_sources(
    paths: Sequence[str | os.PathLike[str]],
    tokenizers: Iterable[str | os.PathLike[str]] = (),
    hosts: Iterable[Path] = (),
) -> Path | TextSources:
    """Sort what was given, and find the tokenizers.

    Args:
        paths: one folder with everything, or LLaMA-3 and CLIP-L in any order, each a file or a
            folder of shards.
        tokenizers: folders of tokenizers, or folders that contain such.
        hosts: a host's own tokenizers, used where neither `tokenizers` nor the neighbours of the
            weights have one.

    Returns:
        The folder as it was given, or the four places.

    Raises:
        CheckpointError: a file missing or of another model, one of the two models missing, or no
            tokenizer for one of them; the message says what to give.
    """
    given = [Path(path) for path in paths]
    if len(given) == 1 and not given[0].is_file() and not _is_one_model(given[0]):
        return given[0]
    found: dict[str, Path] = {}
    for path in given:
        family = inspect(path).family
        if family not in MODELS:
            raise CheckpointError(
                f"{path.name} is {FAMILY_NAMES[family]}, and the text encoders are LLaMA-3 and "
                "CLIP-L: give llava_llama3_*.safetensors and clip_l.safetensors.",
                family,
            )
        if family in found:
            raise CheckpointError(
                f"{found[family].name} and {path.name} are both {MODELS[family][0]}: give one of "
                "them, and the other text encoder."
            )
        found[family] = path
    for family, (name, _, _) in MODELS.items():
        if family not in found:
            (other,) = found.values()
            file = {"llama": "llava_llama3_*.safetensors", "clip": "clip_l.safetensors"}[family]
            raise CheckpointError(
                f"{other.name} alone is not enough: {name} is needed too; give {file} of "
                "Comfy-Org/HunyuanVideo_repackaged as well (--text-encoder a second time on the "
                "command line, `clip` in the node)."
            )
    searched = _places(found.values(), [Path(each) for each in tokenizers], list(hosts))
    llm, clip = (_find_tokenizer(family, found[family], searched) for family in MODELS)
    return TextSources(found["llama"], found["clip"], llm, clip)


def _is_one_model(folder: Path) -> bool:
    """Whether a folder holds the shards of one model, not folders of several."""
    has_weights = (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))
    return has_weights and not (folder / "text_encoder").is_dir()


def _places(
    weights: Iterable[Path], tokenizers: Sequence[Path], hosts: Sequence[Path]
) -> list[Path]:
    """Folders that may be tokenizers, the most particular first."""

    def candidates() -> Iterator[Path]:
        for folder in tokenizers:
            if not any(kinds_of_tokenizer(folder / each) for each in (*_BELOW, *_IN_COMFYUI)):
                raise CheckpointError(
                    f"{folder} holds no tokenizer of LLaMA-3 or CLIP-L: give the folders tokenizer "
                    "and tokenizer_2 of hunyuanvideo-community/HunyuanVideo."
                )
            yield from (folder / each for each in (*_BELOW, *_IN_COMFYUI))
        for path in weights:
            folder = path if path.is_dir() else path.parent
            yield from (folder / each for each in _BELOW)
        for path in weights:
            for above in list(path.resolve().parents)[:_LEVELS_UP]:
                yield from (above / each for each in _IN_COMFYUI)
        yield from hosts

    return [folder for folder in dict.fromkeys(candidates()) if folder.is_dir()]


def _find_tokenizer(family: str, weights: Path, places: Sequence[Path]) -> Path:
    for folder in places:
        if family in kinds_of_tokenizer(folder):
            return folder
    name, _, folder_name = MODELS[family]
    files = "tokenizer.json" if family == "llama" else "vocab.json and merges.txt"
    raise CheckpointError(
        f"No tokenizer of {name} was found beside {weights.name}, and the file holds none: put the "
        f"folder {folder_name} of hunyuanvideo-community/HunyuanVideo ({files}) beside it, or name "
        "that folder (--tokenizer DIR on the command line, `tokenizer` in the node). ComfyUI has "
        "it too, in comfy/text_encoders/llama_tokenizer and comfy/sd1_tokenizer."
    )


def kinds_of_tokenizer(folder: Path) -> set[str]:
    """Of which models a folder is the tokenizer, by its tokens: none, "llama" or "clip"."""
    names = ["tokenizer.json"]
    if (folder / "merges.txt").is_file():
        names.append("vocab.json")
    found = set()
    for name in names:
        path = folder / name
        try:
            # a pipe of that name would be waited for
            if not path.is_file() or path.stat().st_size > MAX_JSON_BYTES:
                continue
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        found |= {family for family, (_, token, _) in MODELS.items() if f'"{token}"' in text}
    return found
