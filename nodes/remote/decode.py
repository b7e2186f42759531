"""A result's files as ComfyUI's IMAGE, MASK, AUDIO and text, within free memory.

Frames are counted while they are decoded; a frame count in a header is used in messages only.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import host

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    _Frame = tuple[NDArray[np.uint8], NDArray[np.uint8] | None]

logger = logging.getLogger("skyreels.nodes.remote.decode")

#: fraction of free memory that a result may use: other nodes need some too
MEMORY_FRACTION = 0.8
#: bytes of memory per byte of a frame: decoded as uint8, returned as float32
BYTES_PER_VALUE = 5
#: side of the mask of images without alpha, as LoadImage makes it
EMPTY_MASK = 64
#: largest file that feeds `text`
MAX_TEXT_BYTES = 1024**2


def no_check() -> None:
    """Continue."""


def read_clip(path: Path, check: Callable[[], None] = no_check) -> Tensor:
    """The frames of a video.

    Args:
        path: of the video file.
        check: called before each frame; may raise to stop.

    Returns:
        [F, H, W, 3] float32 in 0..1.

    Raises:
        DownloadError: it does not decode.
        DependencyError: PyAV is missing.
        WiroError: not enough memory.
    """
    from ...wiro_api.errors import WiroError
    from ...wiro_api.video import frame_size, read_frames

    room = MEMORY_FRACTION * host.free_host_bytes()
    width, height, announced = frame_size(path)
    if 3 * width * height * BYTES_PER_VALUE > room:
        raise WiroError(_memory_message(path, 1, announced, width, height, room))
    frames: list[NDArray[np.uint8] | None] = []
    for frame, _ in read_frames(path):
        check()
        if (len(frames) + 1) * frame.nbytes * BYTES_PER_VALUE > room:
            high, wide = frame.shape[:2]
            raise WiroError(_memory_message(path, len(frames) + 1, announced, wide, high, room))
        frames.append(frame)
    if announced and len(frames) != announced:
        logger.warning("%s announces %d frames but has %d.", path.name, announced, len(frames))
    return _to_images(frames)


def read_pictures(
    paths: Sequence[Path], check: Callable[[], None] = no_check
) -> tuple[Tensor, Tensor]:
    """Images as LoadImage reads them; animated ones with all their frames.

    Args:
        paths: of the files; those that do not decode, or differ in size from the first, are
            skipped with a warning.
        check: called before each frame; may raise to stop.

    Returns:
        Images [N, H, W, 3] and masks [N, h, w] (1 = transparent), float32 in 0..1.

    Raises:
        DownloadError: none decodes.
        WiroError: not enough memory.
    """
    from ...wiro_api.errors import DownloadError, WiroError

    room = MEMORY_FRACTION * host.free_host_bytes()
    images: list[NDArray[np.uint8] | None] = []
    masks: list[NDArray[np.uint8] | None] = []
    problem: DownloadError | None = None
    size: tuple[int, ...] = ()
    for path in paths:
        try:
            for image, mask in _frames_of_picture(path, room, check):
                if size and image.shape != size:
                    logger.warning(
                        "%s differs in size from the first image: not in the images output.",
                        path.name,
                    )
                    break
                size = image.shape
                if (
                    len(images) + 1
                ) * 4 * image.nbytes * BYTES_PER_VALUE / 3 > room:  # with the mask
                    raise WiroError(
                        _memory_message(path, len(images) + 1, 0, size[1], size[0], room)
                    )
                images.append(image)
                masks.append(mask)
        except DownloadError as error:
            problem = DownloadError(f"{path.name} was saved, but cannot be decoded ({error})")
            logger.warning("%s.", problem)
    if not images:
        raise problem or DownloadError("There is no image")
    return _to_images(images), _to_masks(masks, size)


def read_audio(path: Path, check: Callable[[], None] = no_check) -> dict[str, Any]:
    """The audio of an audio or video file as ComfyUI's AUDIO.

    Args:
        path: of the file.
        check: called before each block; may raise to stop.

    Returns:
        {"waveform": [1, C, T] float32, "sample_rate": samples per second}

    Raises:
        DownloadError: it has no audio.
        DependencyError: PyAV is missing.
        WiroError: not enough memory.
    """
    from ...wiro_api.errors import WiroError
    from ...wiro_api.video import read_sound

    room = MEMORY_FRACTION * host.free_host_bytes()
    blocks, held, sample_rate = [], 0, 0
    for block, rate in read_sound(path):
        check()
        sample_rate = rate
        held += 2 * block.nbytes  # once more when they are concatenated
        if held > room:
            raise WiroError(
                f"{path.name} has more than {held / 2e9:.1f} GB of audio, but only "
                f"{room / 1e9:.1f} GB of memory are free: free memory, or use the saved file."
            )
        blocks.append(torch.from_numpy(block))
    return {"waveform": torch.cat(blocks, dim=1)[None], "sample_rate": sample_rate}


def read_text(path: Path) -> str:
    """A small text file, or "" for a larger one."""
    if path.stat().st_size > MAX_TEXT_BYTES:
        logger.warning("%s is over 1 MiB: saved, but not in the text output.", path.name)
        return ""
    return path.read_text(encoding="utf-8-sig", errors="replace")


def _memory_message(
    path: Path, count: int, announced: int, width: int, height: int, room: float
) -> str:
    """What the frames need, what is free, and what to do."""
    # a frame takes at least some bytes of the file: ignore larger announcements
    is_likely = count <= announced <= path.stat().st_size // 8
    frames = str(announced) if is_likely else f"{count} or more"
    need = (announced if is_likely else count) * 3 * width * height * BYTES_PER_VALUE
    return (
        f"{path.name} has {frames} frames of {width}x{height}, which need {need / 1e9:.1f} GB as "
        f"IMAGE, but only {room / 1e9:.1f} GB of memory are free. The file is saved: connect video "
        "instead of images, or free memory and queue again (not billed again)."
    )


def _to_images(frames: "list[NDArray[np.uint8] | None]") -> Tensor:
    """[N, H, W, 3] float32; the list is emptied meanwhile, so that no frame is held twice."""
    first = frames[0]
    assert first is not None
    clip = torch.empty((len(frames), *first.shape))
    for number, frame in enumerate(frames):
        assert frame is not None
        clip[number].copy_(torch.from_numpy(frame)).div_(255.0)
        frames[number] = None
    return clip


def _to_masks(masks: "list[NDArray[np.uint8] | None]", size: tuple[int, ...]) -> Tensor:
    if all(mask is None for mask in masks):
        return torch.zeros(len(masks), EMPTY_MASK, EMPTY_MASK)
    whole = torch.zeros(len(masks), size[0], size[1])
    for number, mask in enumerate(masks):
        if mask is not None:
            whole[number].copy_(torch.from_numpy(mask)).div_(-255.0).add_(1.0)
    return whole


def _frames_of_picture(path: Path, room: float, check: Callable[[], None]) -> Iterator["_Frame"]:
    """Decode an image with Pillow (alpha, animated WebP), or with PyAV what Pillow cannot read.

    Yields:
        Pixels [H, W, 3] and alpha [H, W] or None, of each frame.

    Raises:
        DownloadError: it does not decode.
        WiroError: not enough memory.
    """
    import numpy as np
    from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError

    from ...wiro_api.errors import DownloadError, WiroError
    from ...wiro_api.video import read_frames

    try:
        picture = Image.open(path)
    except UnidentifiedImageError:
        for frame, _ in read_frames(path):
            check()
            yield frame, None
        return
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise DownloadError(type(error).__name__) from None
    with picture:
        width, height = picture.size
        if 4 * width * height * BYTES_PER_VALUE > room:
            raise WiroError(_memory_message(path, 1, 0, width, height, room))
        try:
            for frame in ImageSequence.Iterator(picture):
                check()
                upright = ImageOps.exif_transpose(frame)
                if upright.mode.startswith("I"):  # 16 bits and more
                    upright = upright.point(lambda value: value * (1 / 255))
                alpha = None
                if "A" in upright.getbands():
                    alpha = np.array(upright.getchannel("A"))
                elif "transparency" in upright.info:
                    alpha = np.array(upright.convert("RGBA").getchannel("A"))
                yield np.array(upright.convert("RGB")), alpha
        except (OSError, ValueError, SyntaxError, EOFError, MemoryError) as error:
            raise DownloadError(f"{type(error).__name__}") from None
