"""Decoding a result: that it plays, its frames, its sound. PyAV is imported inside the functions.

What a header announces is not trusted: frames are counted as they come.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import DependencyError, DownloadError
from .media import claimed_kind
from .task import Output

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: of one frame; 16384 x 8192
MAX_PIXELS = 2**27
#: after that many frames that decode, a video is taken to play
CHECKED_FRAMES = 20_000
#: FFmpeg's code of colours that use all 8 bits
FULL_RANGE = 2


def is_video(output: Output) -> bool:
    """By its content type, else by its name."""
    return claimed_kind(output) == "video"


@contextmanager
def _open(path: Path) -> Iterator[tuple[Any, Any]]:
    """(container, its first video stream); what PyAV raises becomes a DownloadError."""
    try:
        import av
    except ImportError as error:
        raise DependencyError("Reading a video needs PyAV: pip install av.") from error
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise DownloadError("The file holds no video")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise DownloadError("PyAV has no decoder for the video")
            width, height = stream.codec_context.width, stream.codec_context.height
            if width * height > MAX_PIXELS:
                raise DownloadError(f"The video's frames are announced as {width}x{height}")
            stream.thread_type = "AUTO"
            yield container, stream
    except (av.error.FFmpegError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or "no memory"
        raise DownloadError(f"The video does not decode ({reason})") from None


def frame_size(path: Path) -> tuple[int, int, int]:
    """Width, height and number of frames as the header announces them; 0 means unknown."""
    with _open(path) as (_, stream):
        context = stream.codec_context
        return context.width or 0, context.height or 0, max(0, stream.frames or 0)


def read_frames(path: Path) -> "Iterator[tuple[NDArray[np.uint8], int]]":
    """Decode a video, one frame at a time, all in the size of the first.

    Yields:
        (frame [H, W, 3], how many the container announces or 0) for each.

    Raises:
        DependencyError: PyAV is missing.
        DownloadError: it does not decode.
    """
    count, size = 0, (0, 0)
    with _open(path) as (container, stream):
        announced = max(0, stream.frames or 0)
        for frame in container.decode(stream):
            size = (frame.width, frame.height) if count == 0 else size
            count += 1
            # PyAV below 17 reads every colour matrix as BT.601 without a destination, and every
            # range as limited unless it is told
            full = {"src_color_range": "JPEG"} if frame.color_range == FULL_RANGE else {}
            pixels = frame.to_ndarray(
                format="rgb24", width=size[0], height=size[1], dst_colorspace="DEFAULT", **full
            )
            yield pixels, announced
    if count == 0:
        raise DownloadError("The video ends before its first frame")


def check_video(path: Path) -> None:
    """Decode it once, keeping nothing.

    Raises:
        DependencyError: PyAV is missing.
        DownloadError: it does not decode, or ends before all announced frames have come.
    """
    count = 0
    with _open(path) as (container, stream):
        announced = max(0, stream.frames or 0)
        for _ in container.decode(stream):
            count += 1
            if count == CHECKED_FRAMES:
                return
    if count == 0 or count < announced:
        raise DownloadError(f"The video ends after {count} of {announced or 'its'} frames")


def read_sound(path: Path) -> "Iterator[tuple[NDArray[np.float32], int]]":
    """Decode the sound of an audio file, or of a video, a block at a time.

    Yields:
        (block [C, n] in -1..1, samples per second) for each.

    Raises:
        DependencyError: PyAV is missing.
        DownloadError: there is none, or it does not decode.
    """
    try:
        import av
        import numpy as np
    except ImportError as error:
        raise DependencyError("Reading sound needs PyAV: pip install av.") from error
    is_empty = True
    try:
        with av.open(str(path)) as container:
            stream = next((s for s in container.streams.audio if s.codec_context is not None), None)
            if stream is None:
                raise DownloadError("The file holds no sound")
            resampler = None
            for frame in container.decode(stream):
                # only the sample format changes: channels and rate are the first block's
                resampler = resampler or av.AudioResampler(
                    format="fltp", layout=frame.layout, rate=frame.sample_rate
                )
                for block in resampler.resample(frame):
                    is_empty = False
                    yield np.asarray(block.to_ndarray(), np.float32), block.sample_rate
            for block in resampler.resample(None) if resampler is not None else ():
                yield np.asarray(block.to_ndarray(), np.float32), block.sample_rate
    except (av.error.FFmpegError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or "no memory"
        raise DownloadError(f"The sound does not decode ({reason})") from None
    if is_empty:
        raise DownloadError("The sound ends before its first sample")
