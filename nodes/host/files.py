"""ComfyUI's folders and files: models, inputs, outputs, videos, our state in the user folder."""

import io
import logging
import os
import tempfile
import time
from pathlib import Path, PureWindowsPath
from typing import Any

from ...skyreels.errors import CheckpointError, OptionError, shown
from ...skyreels.weights.kinds import is_shard

logger = logging.getLogger("skyreels.nodes.host.files")

#: folder kind -> where to download models of that kind
_DOWNLOAD_PAGES = {
    "diffusion_models": "https://huggingface.co/Kijai/SkyReels-V1-Hunyuan_comfy",
    "vae": "https://huggingface.co/Comfy-Org/HunyuanVideo_repackaged",
    "text_encoders": "https://huggingface.co/Comfy-Org/HunyuanVideo_repackaged (files), or "
    "hunyuanvideo-community/HunyuanVideo (a folder)",
    "loras": "https://civitai.com/models (base model Hunyuan Video)",
    "diffusers": "https://huggingface.co/Skywork/SkyReels-V1-Hunyuan-I2V, or "
    "hunyuanvideo-community/HunyuanVideo for text encoders",
}
_WEIGHT_SUFFIXES = (".safetensors", ".sft", ".pt", ".pth", ".ckpt", ".bin")
_FOLDER_LABEL = " (folder)"
#: folder kinds with .gguf files, which are none of core's: that of ComfyUI-GGUF, where it is
#: installed, and ours, which is where core's diffusion models are
_GGUF_KINDS = ("unet_gguf", "skyreels_gguf")
_RESUME_DAYS = 7


def weight_files(kind: str) -> list[str]:
    """Weight files of a folder kind, as ComfyUI lists them; no shards, whose folder is chosen.

    Args:
        kind: ComfyUI's; for "diffusion_models" GGUF files are there too.

    Returns:
        Names below the kind's folders.
    """
    import folder_paths

    names = [
        name
        for name in folder_paths.get_filename_list(kind)
        if name.lower().endswith(_WEIGHT_SUFFIXES)
    ]
    for other in _gguf_kinds(kind):
        found = folder_paths.get_filename_list(other)
        names += [name for name in found if name.lower().endswith(".gguf") and name not in names]
    return [name for name in names if not is_shard(name)]


def _gguf_kinds(kind: str) -> tuple[str, ...]:
    """Folder kinds that list the GGUF files of a kind."""
    import folder_paths

    if kind != "diffusion_models":
        return ()
    known = folder_paths.folder_names_and_paths
    # the list itself: folders that are added to it later count too
    known.setdefault(_GGUF_KINDS[-1], (known[kind][0], {".gguf"}))
    return tuple(each for each in _GGUF_KINDS if each in known)


def model_folders(
    kinds: tuple[str, ...], *required: str, any_of: tuple[str, ...] = ()
) -> dict[str, Path]:
    """Top-level model folders that hold certain files.

    Args:
        kinds: ComfyUI's folder kinds, such as "diffusers".
        *required: glob patterns; a folder must match all of them.
        any_of: glob patterns; a folder must match one of them, if there are any.

    Returns:
        Label -> folder.
    """
    import folder_paths

    found: dict[str, Path] = {}
    for kind in kinds:
        for root in folder_paths.folder_names_and_paths.get(kind, ([], set()))[0]:
            if not os.path.isdir(root):
                continue
            try:
                with os.scandir(root) as entries:
                    folders = sorted(Path(entry.path) for entry in entries if entry.is_dir())
                for folder in folders:
                    holds_all = all(any(folder.glob(pattern)) for pattern in required)
                    if holds_all and (not any_of or any(any(folder.glob(each)) for each in any_of)):
                        found.setdefault(folder.name + _FOLDER_LABEL, folder)
            except OSError as error:  # one unreadable folder must not hide the node
                logger.warning("Cannot list models in %s: %s.", shown(root), shown(error))
    return found


def tokenizer_folders() -> list[Path]:
    """ComfyUI's own tokenizers of LLaMA-3 and CLIP-L."""
    import folder_paths

    comfy = Path(folder_paths.__file__).parent / "comfy"
    return [comfy / "text_encoders" / "llama_tokenizer", comfy / "sd1_tokenizer"]


def check_choice(kind: str, name: object, choices: list[str]) -> bool | str:
    """VALIDATE_INPUTS of a loader.

    Args:
        kind: ComfyUI's folder kind.
        name: file or folder that the workflow asks for; None if it is linked.
        choices: what the loader lists.

    Returns:
        True, or a message that says how to get the missing file.
    """
    if name is None or name in choices:
        return True
    name = str(name)
    if is_shard(name):
        folder = PureWindowsPath(name).parent.name
        where = f"its folder, {shown(folder)}{_FOLDER_LABEL}" if folder else "its folder"
        return f"{shown(name)} is one of several shards: choose {where}."
    # a workflow from another machine may differ only in its sub-folder or path separator
    basename = PureWindowsPath(name).name
    twins = [choice for choice in choices if PureWindowsPath(choice).name == basename]
    if twins:
        return f"{shown(name)} was not found, but {shown(twins[0])} was: choose that one."
    return _missing_message(kind, name)


def _missing_message(kind: str, name: str) -> str:
    if name.endswith(_FOLDER_LABEL):
        kind, name = "diffusers", name.removesuffix(_FOLDER_LABEL)
    return (
        f"{shown(name)} is not in models/{kind}: download it from {_DOWNLOAD_PAGES[kind]} and "
        "press R to refresh, or choose another file."
    )


def resolve(kind: str, name: str, folders: dict[str, Path]) -> Path:
    """Path of the file or folder chosen in a loader.

    Args:
        kind: ComfyUI's folder kind.
        name: as the loader lists it.
        folders: label -> folder, of `model_folders`.

    Returns:
        Its path.

    Raises:
        CheckpointError: it does not exist; the message says where to download it.
    """
    import folder_paths

    if name in folders:
        return folders[name]
    found = (folder_paths.get_full_path(each, name) for each in (kind, *_gguf_kinds(kind)))
    path = next(filter(None, found), None)
    if path is None:
        raise CheckpointError(_missing_message(kind, name))
    return Path(path)


def state_folder() -> Path:
    """Our folder in the user directory; it may not exist yet."""
    import folder_paths

    # ComfyUI's routes do not serve names that start with two underscores
    return Path(folder_paths.get_user_directory()) / "__skyreels"


def output_folder() -> Path:
    """The folder whose files the page can show."""
    import folder_paths

    return Path(folder_paths.get_output_directory())


def input_files() -> list[str]:
    """Names of the files directly in the input folder."""
    import folder_paths

    try:
        with os.scandir(folder_paths.get_input_directory()) as entries:
            return sorted(entry.name for entry in entries if entry.is_file())
    except OSError as error:  # an unreadable folder must not hide the node
        logger.warning("Cannot list the input folder: %s.", error)
        return []


def input_file(name: str) -> Path:
    """Path of a file in the input folder; the file may be missing."""
    import folder_paths

    return Path(folder_paths.get_annotated_filepath(name))


def media_file(name: str) -> Path:
    """A file in the input or the output folder, by its name below it.

    Args:
        name: as "clip.mp4", "video/clip.mp4" or "clip.mp4 [output]".

    Returns:
        Its path.

    Raises:
        OptionError: there is none, or the name leads out of both folders.
    """
    import folder_paths

    folders = {
        "input": Path(folder_paths.get_input_directory()),
        "output": Path(folder_paths.get_output_directory()),
    }
    for label, folder in folders.items():
        if name.endswith(f" [{label}]"):
            name = name.removesuffix(f" [{label}]")
            folders = {label: folder}
            break
    try:
        for folder in folders.values():
            path = (folder / name).resolve()
            if path.is_relative_to(folder.resolve()) and path.is_file():
                return path
    except (OSError, ValueError):  # a name that no file can have
        pass
    where = " or ".join(folders)
    raise OptionError(
        f"There is no file {shown(name)} in the {where} folder of ComfyUI: give the name of one, "
        "with its folder below that one."
    )


def resume_folder() -> Path:
    """Folder of saved sampling steps; files older than _RESUME_DAYS are deleted."""
    folder = state_folder() / "resume"
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.glob("*.safetensors*"):
        if time.time() - file.stat().st_mtime > _RESUME_DAYS * 86_400:
            file.unlink(missing_ok=True)
    return folder


def video_from_file(path: Path) -> Any:
    """A file as ComfyUI's VIDEO; SaveVideo copies it without re-encoding if the format is kept."""
    from comfy_api.latest import InputImpl

    return InputImpl.VideoFromFile(str(path))


def video_bytes(video: Any, max_bytes: int) -> tuple[bytes, bool]:
    """A VIDEO as the bytes of a video file.

    Args:
        video: ComfyUI's VIDEO.
        max_bytes: read at most one byte more than this, which tells that the file is too large.

    Returns:
        The bytes, and whether they are those of the source file rather than encoded now.
    """
    from comfy_api.latest import InputImpl

    if isinstance(video, InputImpl.VideoFromFile) and not _is_trimmed(video):
        source = video.get_stream_source()
        if isinstance(source, io.BytesIO):
            return source.getbuffer()[: max_bytes + 1].tobytes(), True
        with open(source, "rb") as file:
            return file.read(max_bytes + 1), True
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "input.mp4"
        video.save_to(str(path))
        with path.open("rb") as file:
            return file.read(max_bytes + 1), False


def _is_trimmed(video: Any) -> bool:
    """Whether only a part of the file is used; older versions of ComfyUI cannot trim."""
    window = getattr(video, "get_active_trim_window", None)
    return window is not None and tuple(window()) != (0.0, 0.0)
