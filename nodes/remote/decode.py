"""Files of a result as what core's sockets carry, in the memory that is free.

Frames are counted as they come; what a header announces only words a refusal.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import host

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

logger = logging.getLogger("skyreels.nodes.remote.decode")

#: of the free memory, what a result may take: other nodes want some too
SHARE = 0.8
#: bytes in memory for one of a frame: read as 8 bits, handed on as float32
BYTES_EACH = 5
#: side of a mask where there is no alpha, as core's LoadImage makes it
EMPTY_MASK = 64
#: of a file that feeds `text`
MAX_TEXT_BYTES = 1024**2

Picture = tuple["NDArray[np.uint8]", "NDArray[np.uint8] | None"]


def nothing() -> None:
    """Do nothing."""


def read_clip(path: Path, check: Callable[[], None] = nothing) -> Tensor:
    """The frames of a video, [F, H, W, 3] float32 in 0..1.

    Args:
        check: called before each; may raise to stop.
    Raises:
        DownloadError: it does not decode. DependencyError: PyAV is missing. WiroError: there is
            not enough memory.
    """
    from ...wiro_api.video import frame_size, read_frames

    room = SHARE * host.free_host_bytes()
    width, height, announced = frame_size(path)
    if 3 * width * height * BYTES_EACH > room:
        raise _no_room(path, 1, announced, width, height, room)
    frames: list[NDArray[np.uint8] | None] = []
    for frame, _ in read_frames(path):
        check()
        if (len(frames) + 1) * frame.nbytes * BYTES_EACH > room:
            high, wide = frame.shape[:2]
            raise _no_room(path, len(frames) + 1, announced, wide, high, room)
        frames.append(frame)
    if announced and len(frames) != announced:
        logger.warning("%s announces %d frames and has %d.", path.name, announced, len(frames))
    return _to_images(frames)


def read_pictures(
    paths: Sequence[Path], check: Callable[[], None] = nothing
) -> tuple[Tensor, Tensor]:
    """Pictures, animated ones with all their frames, as core's LoadImage reads them.

    Args:
        paths: of which those that do not decode, or are of another size than the first, are left
            out with a warning.
        check: called before each frame; may raise to stop.
    Returns:
        Images [N, H, W, 3] and masks [N, h, w], 1 where a picture is transparent, float32 in 0..1.
    Raises:
        WiroError: none decodes, or there is not enough memory.
    """
    from ...wiro_api.errors import DownloadError

    room = SHARE * host.free_host_bytes()
    images: list[NDArray[np.uint8] | None] = []
    masks: list[NDArray[np.uint8] | None] = []
    problem: DownloadError | None = None
    size: tuple[int, ...] = ()
    for path in paths:
        try:
            for image, mask in _frames_of_picture(path, room, check):
                if size and image.shape != size:
                    logger.warning("%s is of another size than the first picture: IMAGE leaves it "
                                "out.", path.name)  # fmt: skip
                    break
                size = image.shape
                if (len(images) + 1) * 4 * image.nbytes * BYTES_EACH / 3 > room:  # with the mask
                    raise _no_room(path, len(images) + 1, 0, size[1], size[0], room)
                images.append(image)
                masks.append(mask)
        except DownloadError as error:
            problem = DownloadError(f"{path.name} is kept, but it does not decode here ({error})")
            logger.warning("%s.", problem)
    if not images:
        raise problem or DownloadError("There is no picture")
    return _to_images(images), _to_masks(masks, size)


def read_audio(path: Path, check: Callable[[], None] = nothing) -> dict[str, Any]:
    """The sound of an audio file, or of a video, as core's AUDIO.

    Returns:
        {"waveform": [1, C, T] float32, "sample_rate": samples per second}
    Raises:
        DownloadError: there is none. DependencyError: PyAV is missing. WiroError: there is not
            enough memory.
    """
    from ...wiro_api.errors import WiroError
    from ...wiro_api.video import read_sound

    room = SHARE * host.free_host_bytes()
    blocks, held, sample_rate = [], 0, 0
    for block, rate in read_sound(path):
        check()
        sample_rate = rate
        held += 2 * block.nbytes  # once more when they are put together
        if held > room:
            raise WiroError(
                f"{path.name} holds more than {held / 2e9:.1f} GB of sound, and {room / 1e9:.1f} "
                "GB of memory are free: free some, or use the file itself, which is kept."
            )
        blocks.append(torch.from_numpy(block))
    return {"waveform": torch.cat(blocks, dim=1)[None], "sample_rate": sample_rate}


def read_text(path: Path) -> str:
    """A small text file, or "" for a larger one."""
    if path.stat().st_size > MAX_TEXT_BYTES:
        logger.warning("%s is over 1 MiB: it is kept, and left out of text.", path.name)
        return ""
    return path.read_text(encoding="utf-8-sig", errors="replace")


def _no_room(
    path: Path, count: int, announced: int, width: int, height: int, room: float
) -> Exception:
    """Says what it needs and has, and how to go on."""
    from ...wiro_api.errors import WiroError

    # a frame takes some bytes in a file: other announcements are not worth repeating
    is_likely = count <= announced <= path.stat().st_size // 8
    frames = str(announced) if is_likely else f"{count} or more"
    need = (announced if is_likely else count) * 3 * width * height * BYTES_EACH
    return WiroError(
        f"{path.name} has {frames} frames of {width}x{height}, which need {need / 1e9:.1f} GB as "
        f"IMAGE, and {room / 1e9:.1f} GB of memory are free. The file is there: connect video "
        "instead of images, or free memory and queue again; nothing is paid for again."
    )


def _to_images(frames: "list[NDArray[np.uint8] | None]") -> Tensor:
    """[N, H, W, 3] float32; the list is emptied on the way, so that nothing is held twice."""
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


def _frames_of_picture(path: Path, room: float, check: Callable[[], None]) -> Any:
    """(pixels [H, W, 3], alpha [H, W] or None) of each frame; DownloadError if it does not decode.

    By Pillow, which knows alpha and animated WebP; by PyAV what Pillow does not know.
    """
    import numpy as np
    from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError

    from ...wiro_api.errors import DownloadError
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
        if 4 * width * height * BYTES_EACH > room:
            raise _no_room(path, 1, 0, width, height, room)
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
