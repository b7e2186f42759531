"""Which file, or which index of shards, a folder of weights stands for.

Understood are a diffusers folder (config.json with one file, or with shards and their index), the
root of a diffusers model (with `transformer` and `vae` inside), and a folder of Hugging Face's
cache (`models--owner--name`, whose snapshots are links). Of variants the plain one is taken.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import CheckpointError, shown
from ..files import read_json
from .kinds import is_shard

#: parts of a diffusers model that are loaded here
PARTS = ("transformer", "vae")
#: of one checkpoint; the published ones have six
MAX_SHARDS = 1000
#: as diffusers names the only file
MAIN_FILE = "diffusion_pytorch_model.safetensors"


def weights_folder(folder: Path, part: str = "") -> Path:
    """The folder that holds the weights: inside a cache, and inside a whole model.

    Args:
        folder: that was chosen.
        part: of PARTS, what is wanted from a whole model; "" takes the only one that is there.

    Returns:
        `folder` itself if it is neither.
    """
    folder = _snapshot(folder)
    if _candidates(folder, "*.safetensors*"):
        return folder
    inside = [name for name in PARTS if _candidates(folder / name, "*.safetensors*")]
    if part in inside:
        return folder / part
    return folder / inside[0] if len(inside) == 1 and not part else folder


def _snapshot(folder: Path) -> Path:
    """The current snapshot of a folder in Hugging Face's cache; of others, the folder."""
    snapshots = folder / "snapshots"
    if not folder.name.startswith("models--") or not snapshots.is_dir():
        return folder
    main = folder / "refs" / "main"
    if main.is_file() and main.stat().st_size < 100:
        revision = main.read_text(encoding="utf-8", errors="replace").strip()
        if re.fullmatch(r"\w+", revision) and (snapshots / revision).is_dir():
            return snapshots / revision
    found = [path for path in snapshots.iterdir() if path.is_dir()]
    return max(found, key=lambda path: (path.stat().st_mtime, path.name), default=folder)


def _candidates(folder: Path, pattern: str) -> list[Path]:
    return sorted(folder.glob(pattern))


def find_weights(folder: Path) -> Path:
    """The index of the shards in a folder, or its only file.

    Returns:
        Path of a .json or of a .safetensors file.

    Raises:
        CheckpointError: none of these, or several to choose from.
    """
    plain = _candidates(folder, "*.safetensors.index.json")
    variants = _candidates(folder, "*.safetensors.index.*.json")
    files = _candidates(folder, "*.safetensors")
    shards = [path for path in files if is_shard(path.name)]
    files = [path for path in files if path not in shards]
    if len(plain) == 1:
        return plain[0]
    if not plain:
        main = [path for path in files if path.name == MAIN_FILE]
        for choice in (main, [] if variants else files, variants):
            if len(choice) == 1:
                return choice[0]
    raise CheckpointError(_what_is_there(folder, [*plain, *variants], shards, files))


def _what_is_there(
    folder: Path, indices: Sequence[Path], shards: Sequence[Path], files: Sequence[Path]
) -> str:
    name = folder.name
    if shards and not indices and not files:
        return (
            f"Folder {name} has {len(shards)} shards and no index that lists them: download the "
            "file that ends in .safetensors.index.json into it."
        )
    subfolders = [part for part in PARTS if (folder / part).is_dir()]
    hint = f"; did you mean its folder {' or '.join(subfolders)}?" if subfolders else "."
    if len(files) > 1 and not indices and not shards:
        hint = f"; choose one of them, such as {files[0].name}."
    return (
        f"Folder {name} has {len(indices)} *.safetensors.index.json and "
        f"{len(shards) + len(files)} .safetensors files: it needs one index with its shards, or "
        f"exactly one file{hint}"
    )


def read_index(index: Path) -> dict[str, str]:
    """Which shard has which tensor.

    Returns:
        Name of each tensor -> name of a file of the same folder.

    Raises:
        CheckpointError: not an index, too many shards, or one that is missing or elsewhere.
    """
    content = read_json(index)
    folder, name = index.parent, index.parent.name
    try:
        shard_of = {str(key): str(value) for key, value in content["weight_map"].items()}
    except (KeyError, TypeError, AttributeError):
        raise CheckpointError(
            f"{index.name} in {name} is not a shard index: download it again."
        ) from None
    shards = sorted(set(shard_of.values()))
    if len(shards) > MAX_SHARDS:
        raise CheckpointError(
            f"{index.name} in {name} names {len(shards)} shards, and at most {MAX_SHARDS} "
            "are read: it is not the index of a model; download it again."
        )
    for shard in shards:
        if Path(shard).name != shard or "\\" in shard:
            raise CheckpointError(
                f"{index.name} in {name} names {shown(shard)}, which is outside its folder: "
                "use the folder as it was published."
            )
        if not os.path.isfile(folder / shard):  # also of a name too long for a file
            raise CheckpointError(
                f"Folder {name} lacks {shown(shard)}, which its index names: download that file."
            )
    return shard_of
