"""ComfyUI's folders and files: models, inputs, outputs, videos, and our own in the user folder."""

import io
import logging
import os
import tempfile
import time
from pathlib import Path, PureWindowsPath
from typing import Any

from ...skyreels.errors import CheckpointError

logger = logging.getLogger("skyreels.nodes.host.files")

#: where to get what a loader does not find, by folder kind
LINKS = {
    "diffusion_models": "https://huggingface.co/Kijai/SkyReels-V1-Hunyuan_comfy",
    "vae": "https://huggingface.co/Comfy-Org/HunyuanVideo_repackaged",
    "text_encoders": "https://huggingface.co/hunyuanvideo-community/HunyuanVideo",
    "diffusers": "https://huggingface.co/Skywork/SkyReels-V1-Hunyuan-I2V, or "
    "hunyuanvideo-community/HunyuanVideo for text encoders",
}
WEIGHT_SUFFIXES = (".safetensors", ".sft", ".pt", ".pth", ".ckpt", ".bin")
FOLDER_MARK = " (folder)"
RESUME_DAYS = 7


def weight_files(kind: str) -> list[str]:
    """File names of a folder kind, as ComfyUI lists them."""
    import folder_paths

    names = folder_paths.get_filename_list(kind)
    return [name for name in names if name.lower().endswith(WEIGHT_SUFFIXES)]


def model_folders(kinds: tuple[str, ...], *required: str) -> dict[str, Path]:
    """Label -> folder, for the first-level folders of some kinds that hold all of `required`."""
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
                    if all(any(folder.glob(pattern)) for pattern in required):
                        found.setdefault(folder.name + FOLDER_MARK, folder)
            except OSError as error:  # one unreadable folder must not take the node away
                logger.warning("Models in %s are not listed: %s.", root, error)
    return found


def check_choice(kind: str, name: object, choices: list[str]) -> bool | str:
    """VALIDATE_INPUTS of a loader: True, or the sentence that helps with a file that is not here.

    Args:
        name: of the file or folder a workflow asks for; None if it is linked.
        choices: what the loader lists.
    """
    if name is None or name in choices:
        return True
    name = str(name)
    if name.lower().endswith(".gguf"):
        return f"{name} is a GGUF file, which is not supported: take the fp8 .safetensors file."
    # a workflow from another machine may only differ in its sub-folder or its kind of slash
    basename = PureWindowsPath(name).name
    twins = [choice for choice in choices if PureWindowsPath(choice).name == basename]
    if twins:
        return f"{name} is not here, but {twins[0]} is: choose that one."
    return _not_here(kind, name)


def _not_here(kind: str, name: str) -> str:
    if name.endswith(FOLDER_MARK):
        kind, name = "diffusers", name.removesuffix(FOLDER_MARK)
    return (
        f"{name} is not in models/{kind}: put it there (from {LINKS[kind]}) and press R to "
        "refresh, or choose another one."
    )


def resolve(kind: str, name: str, folders: dict[str, Path]) -> Path:
    """The path of a chosen file or folder.

    Raises:
        CheckpointError: it is not there (any more); names the folder and where to get it.
    """
    import folder_paths

    if name in folders:
        return folders[name]
    path = folder_paths.get_full_path(kind, name)
    if path is None:
        raise CheckpointError(_not_here(kind, name))
    return Path(path)


def state_folder() -> Path:
    """Our folder in the user directory, which may not be there yet.

    It begins with two underscores: ComfyUI's routes do not serve such folders.
    """
    import folder_paths

    return Path(folder_paths.get_user_directory()) / "__skyreels"


def output_folder() -> Path:
    """Where the page looks for results."""
    import folder_paths

    return Path(folder_paths.get_output_directory())


def input_files() -> list[str]:
    """Names of the files directly in the input folder."""
    import folder_paths

    try:
        with os.scandir(folder_paths.get_input_directory()) as entries:
            return sorted(entry.name for entry in entries if entry.is_file())
    except OSError as error:  # an unreadable folder must not take the node away
        logger.warning("Files of the input folder are not listed: %s.", error)
        return []


def input_file(name: str) -> Path:
    """The path of a file in the input folder; it may be missing."""
    import folder_paths

    return Path(folder_paths.get_annotated_filepath(name))


def resume_folder() -> Path:
    """Folder of saved steps in the user directory; steps nobody came back for are removed."""
    folder = state_folder() / "resume"
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.glob("*.safetensors*"):
        if time.time() - file.stat().st_mtime > RESUME_DAYS * 86_400:
            file.unlink(missing_ok=True)
    return folder


def video_of(path: Path) -> Any:
    """A file as core's VIDEO; saved in its own format it is copied, not encoded again."""
    from comfy_api.latest import InputImpl

    return InputImpl.VideoFromFile(str(path))


def video_bytes(video: Any, most: int) -> tuple[bytes, bool]:
    """A VIDEO as the bytes of a file, and whether these are a file's own, not encoded now.

    Args:
        most: of a larger one that many bytes are read, and one more.
    """
    from comfy_api.latest import InputImpl

    if isinstance(video, InputImpl.VideoFromFile) and not _is_trimmed(video):
        source = video.get_stream_source()
        if isinstance(source, io.BytesIO):
            return source.getbuffer()[: most + 1].tobytes(), True
        with open(source, "rb") as file:
            return file.read(most + 1), True
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "input.mp4"
        video.save_to(str(path))
        with path.open("rb") as file:
            return file.read(most + 1), False


def _is_trimmed(video: Any) -> bool:
    """Whether only a part of its file is meant; older versions of ComfyUI know no such thing."""
    window = getattr(video, "get_active_trim_window", None)
    return window is not None and tuple(window()) != (0.0, 0.0)
