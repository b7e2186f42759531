"""Read image and video files, and write video files.

A video is H.264 in yuv420p with its index in front, so every browser and player starts it at once;
colours are converted to BT.709 and tagged so. A file appears under its name only when it is
complete: it is written as `<name>.<process>.part` beside it and renamed.
"""

import contextlib
import errno
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .config import FRAMES_PER_SECOND
from .errors import DependencyError, OptionError, ShapeError, shown
from .runtime import TorchRuntime, never_interrupt

logger = logging.getLogger("skyreels.media")

#: x264's quality: about where its loss stops being visible
VIDEO_CRF = 18
#: without its macroblock tree, with which x264 writes other bytes for the same frames now and then
_X264_PARAMETERS = "mbtree=0"
#: pixels converted to 8 bits at once: 16 frames of 544 x 960, 25 MB
_CHUNK_PIXELS = 16 * 544 * 960
#: part of the free memory that a clip may take, and bytes per value: 8 bits, then float32
_CLIP_FRACTION, _CLIP_BYTES = 0.5, 5
#: ITU-T H.273 code of BT.709, for primaries, transfer and matrix alike
_BT709 = 1
#: FFmpeg's code of colours that use all 8 bits
_FULL_RANGE = 2


def read_image(path: str | os.PathLike[str]) -> Tensor:
    """Read an image file: upright as its EXIF says, first frame, without alpha.

    Args:
        path: anything Pillow opens; 16-bit grey keeps its depth.

    Returns:
        [1, H, W, 3] float32 in [0, 1].

    Raises:
        OptionError: missing, not an image, or damaged.
        ShapeError: more pixels than Pillow accepts.
        DependencyError: Pillow is missing.
    """
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as error:
        raise DependencyError("Reading an image needs Pillow: pip install pillow.") from error
    path = Path(path)
    if not path.is_file():
        raise OptionError(f"There is no image file {path}: check the path.")
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I") or image.mode == "F":
                pixels = _deep_gray(np.asarray(image))
            else:
                pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255.0
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise ShapeError(
            f"{path} has more than {limit} pixels: scale it down first (a video frame has about "
            "half a million)."
        ) from error
    except UnidentifiedImageError as error:
        raise OptionError(
            f"{path} is not an image that Pillow can read: use a PNG, JPEG or WebP file."
        ) from error
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise OptionError(
            f"{path} cannot be read as an image ({error}): it may be damaged; save it again."
        ) from error
    return torch.from_numpy(pixels)[None]


def read_clip(
    path: str | os.PathLike[str], *, check: Callable[[], None] = never_interrupt
) -> Tensor:
    """Read the frames of a video, or of an .npy file as `write_npy` makes it.

    Sound is not read, and a rate other than the model's is not converted: the log says so.

    Args:
        path: anything PyAV decodes, or float32 [F, H, W, 3] for numpy.load.
        check: called before each frame; may raise to stop.

    Returns:
        [F, H, W, 3] float32 in [0, 1].

    Raises:
        OptionError: missing, not a video, or damaged.
        ShapeError: an array of another shape, or a clip that does not fit the memory.
        DependencyError: a video without PyAV.
    """
    path = Path(path)
    if not path.is_file():
        raise OptionError(f"There is no video file {path}: check the path.")
    if path.suffix.lower() == ".npy":
        return _read_npy(path)
    try:
        import av
    except ImportError as error:
        raise DependencyError(
            "Reading a video needs PyAV: pip install av, or give the clip as an .npy file."
        ) from error
    try:
        with av.open(str(path)) as container:
            frames = _decode_frames(path, container, check)
    except av.error.FFmpegError as error:
        raise OptionError(
            f"{path} cannot be read as a video ({error.strerror}): use an MP4, WebM or MOV file "
            "that plays."
        ) from error
    if not frames:
        raise OptionError(f"{path} holds no frames: use a video that plays.")
    clip = torch.empty(len(frames), *frames[0].shape)
    for index, pixels in enumerate(frames):
        clip[index].copy_(torch.from_numpy(pixels)).div_(255.0)
    return clip


def read_metadata(
    path: str | os.PathLike[str], names: Sequence[str], max_chars: int
) -> dict[str, str]:
    """Texts that a video or a PNG carries beside its pictures.

    Args:
        path: of a file that PyAV or, for a PNG, Pillow opens.
        names: of the texts that are wanted, in small letters.
        max_chars: of each; a longer text is cut one character behind them.

    Returns:
        Those that are there, by name.

    Raises:
        OptionError: missing, or no such file.
        DependencyError: PyAV or Pillow is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise OptionError(f"There is no file {path}: check the path.")
    read = _png_texts if path.suffix.lower() == ".png" else _container_texts
    found = {str(name).lower(): text for name, text in read(path).items()}
    return {name: str(found[name])[: max_chars + 1] for name in names if name in found}


def _png_texts(path: Path) -> Mapping[str, Any]:
    try:
        from PIL import Image
    except ImportError as error:
        raise DependencyError("Reading an image needs Pillow: pip install pillow.") from error
    try:
        with Image.open(path, formats=("PNG",)) as file:
            return dict(getattr(file, "text", None) or file.info)
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise OptionError(
            f"{path} cannot be read as a PNG ({error}): it may be damaged; save it again."
        ) from error


def _container_texts(path: Path) -> Mapping[str, Any]:
    try:
        import av
    except ImportError as error:
        raise DependencyError("Reading a video needs PyAV: pip install av.") from error
    try:
        with av.open(str(path)) as container:
            return dict(container.metadata)
    except (av.error.FFmpegError, ValueError) as error:
        raise OptionError(
            f"{path} cannot be read as a video ({error}): use an MP4, WebM or MOV file that plays."
        ) from error


def _decode_frames(path: Path, container: Any, check: Callable[[], None]) -> list[np.ndarray]:
    """Frames [H, W, 3] uint8 of the first video stream, all in the size of the first."""
    stream = next((s for s in container.streams.video if s.codec_context is not None), None)
    if stream is None:
        raise OptionError(f"{path} holds no video that can be decoded: use a video that plays.")
    stream.thread_type = "AUTO"
    rate = float(stream.average_rate or FRAMES_PER_SECOND)
    if abs(rate - FRAMES_PER_SECOND) > 0.1:
        logger.warning(
            "%s has %.4g frames per second, and the model makes %d: the clip will play at %d.",
            shown(path),
            rate,
            FRAMES_PER_SECOND,
            FRAMES_PER_SECOND,
        )
    if container.streams.audio:
        logger.warning("The sound of %s is not used.", shown(path))
    room = _CLIP_FRACTION * TorchRuntime().free_bytes()
    frames: list[np.ndarray] = []
    for frame in container.decode(stream):
        check()
        size = (frames[0].shape[1], frames[0].shape[0]) if frames else (frame.width, frame.height)
        if (len(frames) + 1) * 3 * size[0] * size[1] * _CLIP_BYTES > room:
            raise ShapeError(
                f"{path} has more than {len(frames)} frames of {size[0]}x{size[1]}, which is all "
                "that half of the free memory holds: cut it to its last seconds first."
            )
        # PyAV below 17 reads every colour matrix as BT.601 without a destination, and every range
        # as limited unless it is told
        full = {"src_color_range": "JPEG"} if frame.color_range == _FULL_RANGE else {}
        pixels = frame.to_ndarray(
            format="rgb24", width=size[0], height=size[1], dst_colorspace="DEFAULT", **full
        )
        frames.append(pixels)
    return frames


def _read_npy(path: Path) -> Tensor:
    try:
        frames = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, MemoryError) as error:  # a header may claim any size
        raise OptionError(f"{path} is not an array that numpy can read ({error}).") from error
    if not isinstance(frames, np.ndarray) or frames.dtype != np.float32:
        raise OptionError(f"{path} must hold one float32 array: use one that `generate` wrote.")
    clip = torch.from_numpy(frames)
    _check_frames(clip)
    return clip


def _deep_gray(levels: np.ndarray) -> np.ndarray:
    """Convert [H, W] of 16-bit levels, or of floats in [0, 1], to [H, W, 3] float32 in [0, 1]."""
    # Pillow's own conversion to RGB would clip every level above 255 to white
    scale = 1.0 if np.issubdtype(levels.dtype, np.floating) else 65535.0
    gray = (levels.astype(np.float32) / scale).clip(0.0, 1.0)
    return np.repeat(gray[..., None], 3, axis=2)


def check_output(path: str | os.PathLike[str]) -> None:
    """Refuse a path that `write_frames` could not write, before minutes of work are spent on it.

    Creates the folder, but neither creates nor changes the file.

    Raises:
        OptionError: a suffix other than .mp4 and .npy, a folder of that name, or a place without
            write access.
        DependencyError: .mp4 without PyAV.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (".mp4", ".npy"):
        raise OptionError(
            f"{path} has {f'suffix {suffix}' if suffix else 'no suffix'}: use .mp4 (video) or .npy "
            "(float frames)."
        )
    check_place(path)
    if suffix == ".mp4" and importlib.util.find_spec("av") is None:
        raise DependencyError("Writing a video needs PyAV: pip install av, or write a .npy file.")


def check_place(path: str | os.PathLike[str]) -> None:
    """Refuse a place where no file can be written; creates the folder, and no file.

    Raises:
        OptionError: a folder, a device or a pipe of that name, or no write access.
    """
    path = Path(path)
    if os.path.isdir(path):
        raise OptionError(f"{path} is a folder: name a file in it.")
    if os.path.exists(path) and not os.path.isfile(path):
        raise OptionError(f"{path} is not a regular file: name another one.")
    with _complete_file(path, keep=False):
        pass


def write_frames(
    path: str | os.PathLike[str],
    frames: Tensor,
    fps: int | float = FRAMES_PER_SECOND,
    *,
    check: Callable[[], None] = never_interrupt,
) -> None:
    """Write a clip in the format of the suffix: .mp4 a video, .npy the exact numbers.

    Args:
        path: see `write_video`.
        frames: see `write_video`.
        fps: frames per second of a video.
        check: see `write_video`.

    Raises:
        OptionError: another suffix; else as `write_video` and `write_npy`.
    """
    check_output(path)
    if Path(path).suffix.lower() == ".mp4":
        write_video(path, frames, fps, check=check)
    else:
        write_npy(path, frames)


def write_video(
    path: str | os.PathLike[str],
    frames: Tensor,
    fps: int | float = FRAMES_PER_SECOND,
    *,
    check: Callable[[], None] = never_interrupt,
) -> None:
    """Write a clip that plays in a browser: H.264, yuv420p, index in front, BT.709.

    Args:
        path: of an .mp4; its folder is created if needed, a file of that name is replaced.
        frames: [F, H, W, 3] float in [0, 1], even height and width; other values are clipped.
        fps: frames per second.
        check: called between pieces; may raise to stop.

    Raises:
        ShapeError: frames of another shape.
        OptionError: an invalid frame rate, or a path that cannot be written.
        DependencyError: PyAV, or H.264 in it, is missing.
    """
    _check_frames(frames)
    _, height, width, _ = frames.shape
    _check_video(height, width, fps)
    with _complete_file(Path(path)) as part, _explained(path):
        video = _VideoFile(part, height, width, fps)
        try:
            for pixels in _chunks_of_bytes(frames):
                check()
                video.put_pixels(pixels)
            video.finish()
        finally:
            video.close()


def _check_video(height: int, width: int, fps: int | float) -> None:
    """Refuse what cannot be written as a video, and a PyAV that cannot write it."""
    if height % 2 or width % 2:
        raise ShapeError(
            f"Frames are {width}x{height} pixels, and yuv420p video needs an even width and "
            "height: crop one pixel."
        )
    if not 0 < fps <= 1000:
        raise OptionError(f"{fps} frames per second is not within 0..1000: use 24.")
    try:
        import av
    except ImportError as error:
        raise DependencyError("Writing a video needs PyAV: pip install av.") from error
    if "libx264" not in av.codecs_available:
        raise DependencyError(
            f"PyAV {av.__version__} was built without libx264: pip install --force-reinstall av."
        )


class _VideoFile:
    """A video that is being written."""

    def __init__(
        self,
        part: Path,
        height: int,
        width: int,
        fps: int | float,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        import av

        # the container keeps names of our own only if it is told so, as ComfyUI does
        options = {"movflags": "+faststart+use_metadata_tags" if metadata else "+faststart"}
        self._container: Any = av.open(str(part), "w", format="mp4", options=options)
        self._container.metadata.update(metadata or {})
        rate = Fraction(fps).limit_denominator(1001)
        options = {"crf": str(VIDEO_CRF), "x264-params": _X264_PARAMETERS}
        self._stream = self._container.add_stream("libx264", rate=rate, options=options)
        self._stream.height, self._stream.width = height, width
        self._stream.pix_fmt = "yuv420p"
        context = self._stream.codec_context
        context.color_primaries = context.color_trc = context.colorspace = _BT709
        context.color_range = 1  # limited, as players expect

    def put(self, frames: Tensor) -> None:
        for pixels in _chunks_of_bytes(frames):
            self.put_pixels(pixels)

    def put_pixels(self, pixels: np.ndarray) -> None:
        from av import VideoFrame

        for image in pixels:
            frame = VideoFrame.from_ndarray(image, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709")
            self._container.mux(self._stream.encode(frame))

    def finish(self) -> None:
        self._container.mux(self._stream.encode(None))
        self._container.close()

    def close(self) -> None:
        self._container.close()


class _ArrayFile:
    """An .npy file that is being written: the bytes of `write_npy`."""

    def __init__(self, part: Path, shape: tuple[int, ...]) -> None:
        self._file = part.open("wb")
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)

    def put(self, frames: Tensor) -> None:
        pixels = frames.detach().to("cpu", torch.float32).contiguous().numpy()
        self._file.write(pixels.astype("<f4", copy=False).data)

    def finish(self) -> None:
        self._file.close()

    def close(self) -> None:
        self._file.close()


def write_npy(path: str | os.PathLike[str], frames: Tensor) -> None:
    """Write a clip's exact numbers: float32 [F, H, W, 3] for numpy.load.

    Raises:
        ShapeError: frames of another shape.
        OptionError: the path cannot be written.
    """
    _check_frames(frames)
    with _complete_file(Path(path)) as part, _explained(path):
        file = _ArrayFile(part, tuple(frames.shape))
        try:
            file.put(frames)
            file.finish()
        finally:
            file.close()


@contextmanager
def open_frames(
    path: str | os.PathLike[str],
    num_frames: int,
    height: int,
    width: int,
    fps: int | float = FRAMES_PER_SECOND,
    metadata: Mapping[str, str] | None = None,
) -> Iterator["FrameFile"]:
    """Write a clip while it is made: the file that `write_frames` would make of all its frames.

    The file appears under its name when the block ends without an error.

    Args:
        path: see `write_frames`.
        num_frames: that will come.
        height: in pixels; even for a video.
        width: in pixels; even for a video.
        fps: frames per second of a video.
        metadata: texts that a video carries, by name; an .npy file has no place for them.

    Yields:
        What takes the frames.

    Raises:
        SkyReelsError: as `write_frames`.
    """
    check_output(path)
    path = Path(path)
    begin: Callable[[Path], _Writer]
    if path.suffix.lower() == ".mp4":
        _check_video(height, width, fps)
        begin = partial(
            _VideoFile, height=height, width=width, fps=fps, metadata=dict(metadata or {})
        )
    else:
        begin = partial(_ArrayFile, shape=(num_frames, height, width, 3))
    with _complete_file(path) as part:
        file = FrameFile(path, partial(begin, part))
        try:
            yield file
            file.finish(num_frames)
        finally:
            file.close()


class _Writer(Protocol):
    """A file that takes frames until `finish`; `close` comes last in any case."""

    def put(self, frames: Tensor) -> None: ...

    def finish(self) -> None: ...

    def close(self) -> None: ...


class FrameFile:
    """A clip on its way to a file; a thread writes, one group of frames behind the caller.

    So two groups of frames exist at a time: one that is written and one that is made.

    Args:
        path: for messages.
        begin: opens the file anew.
    """

    def __init__(self, path: Path, begin: Callable[[], _Writer]) -> None:
        self._path = path
        self._begin = begin
        self._thread = ThreadPoolExecutor(1, "frames")
        self._writing: Future[None] | None = None
        self._writer: _Writer | None = None
        self._count = 0

    def restart(self) -> None:
        """Begin the file anew."""
        self._wait()
        self._close()
        self._count = 0
        with _explained(self._path):
            self._writer = self._begin()

    def write(self, frames: Tensor) -> None:
        """Take the next frames, once those before are written.

        Args:
            frames: [f, H, W, 3] float in [0, 1], not changed afterwards.

        Raises:
            OptionError: those before could not be written.
        """
        self._wait()
        assert self._writer is not None  # restarted first
        self._count += len(frames)
        self._writing = self._thread.submit(self._writer.put, frames)

    def finish(self, num_frames: int) -> None:
        """Complete the file; so many frames must have come.

        Raises:
            OptionError: the last frames could not be written.
        """
        self._wait()
        assert self._writer is not None and self._count == num_frames
        with _explained(self._path):
            self._writer.finish()

    def close(self) -> None:
        """Stop writing, so that the file can be renamed or removed."""
        self._thread.shutdown(wait=True)
        self._close()

    def _wait(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            with _explained(self._path):
                writing.result()

    def _close(self) -> None:
        """An unfinished file is removed or begun anew: why it cannot be completed is of no use."""
        if self._writer is not None:
            with contextlib.suppress(OSError, ValueError):
                self._writer.close()


def _check_frames(frames: Tensor) -> None:
    if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ShapeError(f"A clip must be [frames, height, width, 3]; got {list(frames.shape)}.")


def _chunks_of_bytes(frames: Tensor) -> Iterator[np.ndarray]:
    """Convert to uint8 in pieces [f, H, W, 3], so that no second copy of the clip exists."""
    step = max(1, _CHUNK_PIXELS // (frames.shape[1] * frames.shape[2]))
    warned = False
    for piece in torch.split(frames.detach(), step):
        pixels = piece.to("cpu", torch.float32)
        if not warned and not bool(pixels.isfinite().all()):
            logger.warning("The video contains NaN or infinity; such pixels are written as black.")
            warned = True
        pixels = pixels.nan_to_num(0.0, 0.0, 0.0).clamp(0.0, 1.0).mul_(255.0).round_()
        yield pixels.to(torch.uint8).contiguous().numpy()


@contextmanager
def _complete_file(path: Path, *, keep: bool = True) -> Iterator[Path]:
    """Yield a `.part` file that is renamed to `path` if the block succeeds, and removed if not.

    Args:
        path: its folder is created.
        keep: False removes the file in any case: a test for write access.

    Yields:
        The path of the `.part` file, unique per process.

    Raises:
        OptionError: the place cannot be written.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with _explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            part.open("wb").close()
        yield part
        if keep:
            with _explained(path):
                os.replace(part, path)
    finally:
        if os.path.isfile(part):  # the block failed or was stopped
            part.unlink()


@contextmanager
def _explained(path: str | os.PathLike[str]) -> Iterator[None]:
    """Errors of writing as a sentence."""
    try:
        yield
    except (OSError, ValueError) as error:
        if is_disk_full(error):
            raise OptionError(
                f"{path} cannot be written, because its disk is full: free some space, or choose "
                "another place."
            ) from error
        raise OptionError(f"{path} cannot be written ({error}): choose another place.") from error


def is_disk_full(error: BaseException) -> bool:
    """Whether a disk, or the share of it that a user may take, ran full."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
