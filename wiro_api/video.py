"""Decoding a result: that it is whole, and its frames. PyAV is imported inside the functions."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import DependencyError, DownloadError
from .task import Output

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_VIDEO_SUFFIXES = (".mp4", ".webm", ".mov", ".mkv", ".gif")


def is_video(output: Output) -> bool:
    """By its content type, else by its name."""
    if output.contenttype:
        return output.contenttype.startswith("video/")
    return output.name.lower().endswith(_VIDEO_SUFFIXES)


def is_image(output: Output) -> bool:
    """By its content type, else by its name."""
    if output.contenttype:
        return output.contenttype.startswith("image/")
    return output.name.lower().endswith((".png", ".jpg", ".jpeg", ".webp"))


def read_frames(path: Path) -> "Iterator[tuple[NDArray[np.uint8], int]]":
    """The frames of a video or picture, one at a time.

    Returns:
        (frame [H, W, 3], how many the container announces or 0) for each.

    Raises:
        DependencyError: PyAV is missing.
        DownloadError: it does not decode, or ends before all announced frames have come.
    """
    try:
        import av
    except ImportError as error:
        raise DependencyError("Reading a video needs PyAV: pip install av.") from error
    count = announced = 0
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise DownloadError("The file holds no video")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            announced = stream.frames
            for frame in container.decode(stream):
                count += 1
                yield frame.to_ndarray(format="rgb24"), announced
    except av.error.FFmpegError as error:
        raise DownloadError(
            f"The video does not decode ({error.strerror}) after {count} frames"
        ) from None
    if count == 0 or count < announced:
        raise DownloadError(f"The video ends after {count} of {announced or 'its'} frames")


def check_video(path: Path) -> None:
    """Decode it once, keeping nothing; errors as for `read_frames`."""
    for _ in read_frames(path):
        pass
