"""Files at both ends: a picture in, a video out.

The video is H.264 in yuv420p with its index in front, which every browser and player starts at
once; colours are converted and tagged as BT.709. A file appears under its name only when whole: it
is written as `<name>.<process>.part` beside it and renamed.
"""

import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .config import FRAMES_PER_SECOND
from .errors import DependencyError, OptionError, ShapeError
from .runtime import never_interrupt

logger = logging.getLogger("skyreels.media")

#: x264's quality: 17 is about where a loss stops being visible
VIDEO_CRF = 17
#: pixels converted to 8 bits at once: 16 frames of 544 x 960, 25 MB
_CHUNK_PIXELS = 16 * 544 * 960
#: ITU-T H.273 code of BT.709, for primaries, transfer and matrix alike
_BT709 = 1


def read_image(path: str | os.PathLike[str]) -> Tensor:
    """A picture file as a tensor: turned upright as its EXIF says, first frame, alpha dropped.

    Args:
        path: anything Pillow opens; 16-bit greys keep their depth.
    Returns:
        [1, H, W, 3] float32 in 0..1.
    Raises:
        OptionError: missing, not a picture, or damaged.
        ShapeError: more pixels than Pillow takes for a sane picture.
        DependencyError: Pillow is missing.
    """
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as error:
        raise DependencyError("Reading a picture needs Pillow: pip install pillow.") from error
    path = Path(path)
    if not path.is_file():
        raise OptionError(f"There is no picture file {path}: check the path.")
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
            f"{path} has more than {limit} pixels: scale it down first (the video has at most "
            "about a million)."
        ) from error
    except UnidentifiedImageError as error:
        raise OptionError(
            f"{path} is not a picture Pillow can read: give a PNG, JPEG or WebP."
        ) from error
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise OptionError(
            f"{path} cannot be read as a picture ({error}): it may be damaged; save it again."
        ) from error
    return torch.from_numpy(pixels)[None]


def _deep_gray(levels: np.ndarray) -> np.ndarray:
    """[H, W] of 16-bit levels, or of floats in 0..1, to [H, W, 3] float32 in 0..1.

    Pillow's own conversion to RGB would cut everything above level 255 to white.
    """
    scale = 1.0 if np.issubdtype(levels.dtype, np.floating) else 65535.0
    gray = (levels.astype(np.float32) / scale).clip(0.0, 1.0)
    return np.repeat(gray[..., None], 3, axis=2)


def check_output(path: str | os.PathLike[str]) -> None:
    """Refuse a file that `write_frames` could not write, before minutes of work are spent on it.

    Its folder is made; the file itself is neither made nor touched.

    Raises:
        OptionError: a suffix other than .mp4 and .npy, a folder of that name, or a place that
            cannot be written.
        DependencyError: .mp4 without PyAV.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (".mp4", ".npy"):
        raise OptionError(
            f"{path} ends in {suffix or 'nothing'}: end it in .mp4 (video) or .npy (float frames)."
        )
    if os.path.isdir(path):
        raise OptionError(f"{path} is a folder: name a file in it.")
    with _appearing(path, keep=False):
        pass
    if suffix == ".mp4" and importlib.util.find_spec("av") is None:
        raise DependencyError("Writing a video needs PyAV: pip install av, or write a .npy file.")


def write_frames(
    path: str | os.PathLike[str],
    frames: Tensor,
    fps: int | float = FRAMES_PER_SECOND,
    *,
    check: Callable[[], None] = never_interrupt,
) -> None:
    """Write a clip in the format its suffix names: .mp4 a video, .npy the exact numbers.

    Args and errors: as for `write_video` and `write_npy`.

    Raises:
        OptionError: any other suffix.
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
        path: of an .mp4; its folder is made if needed, a file of that name is replaced.
        frames: [F, H, W, 3] float in 0..1, even height and width; beyond 0..1 is clipped.
        fps: frames per second.
        check: called between pieces; may raise to stop.
    Raises:
        ShapeError: not such frames. OptionError: a rate or path that cannot be.
        DependencyError: PyAV, or H.264 in it, is missing.
    """
    _check_frames(frames)
    if frames.shape[1] % 2 or frames.shape[2] % 2:
        raise ShapeError(
            f"Frames of {frames.shape[2]}x{frames.shape[1]} pixels: yuv420p video needs an even "
            "width and height; crop one pixel off."
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
    with _appearing(Path(path)) as part:
        options = {"movflags": "+faststart"}
        with av.open(str(part), "w", format="mp4", options=options) as container:
            _encode(container, frames, fps, check)


def _encode(container: Any, frames: Tensor, fps: int | float, check: Callable[[], None]) -> None:
    from av import VideoFrame

    rate = Fraction(fps).limit_denominator(1001)
    stream = container.add_stream("libx264", rate=rate, options={"crf": str(VIDEO_CRF)})
    stream.height, stream.width = frames.shape[1:3]
    stream.pix_fmt = "yuv420p"
    context = stream.codec_context
    context.color_primaries = context.color_trc = context.colorspace = _BT709
    context.color_range = 1  # limited, as players expect
    for pixels in _chunks_of_bytes(frames):
        check()
        for picture in pixels:
            frame = VideoFrame.from_ndarray(picture, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709")
            container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def write_npy(path: str | os.PathLike[str], frames: Tensor) -> None:
    """Write a clip's exact numbers: float32 [F, H, W, 3] for numpy.load.

    Raises:
        ShapeError: not frames. OptionError: the path cannot be written.
    """
    _check_frames(frames)
    with _appearing(Path(path)) as part, part.open("wb") as file:
        np.save(file, frames.detach().to("cpu", torch.float32).contiguous().numpy())


def _check_frames(frames: Tensor) -> None:
    if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ShapeError(f"A clip is [frames, height, width, 3 colours]; got {list(frames.shape)}.")


def _chunks_of_bytes(frames: Tensor) -> Iterator[np.ndarray]:
    """[f, H, W, 3] uint8 pieces: the clip is never held twice."""
    step = max(1, _CHUNK_PIXELS // (frames.shape[1] * frames.shape[2]))
    warned = False
    for piece in torch.split(frames.detach(), step):
        pixels = piece.to("cpu", torch.float32)
        if not warned and not bool(pixels.isfinite().all()):
            logger.warning("The video holds NaN or infinity; such pixels are written as black.")
            warned = True
        pixels = pixels.nan_to_num(0.0, 0.0, 0.0).clamp(0.0, 1.0).mul_(255.0).round_()
        yield pixels.to(torch.uint8).contiguous().numpy()


@contextmanager
def _appearing(path: Path, *, keep: bool = True) -> Iterator[Path]:
    """A `.part` file that takes its name when the block succeeds and vanishes when it does not.

    Args:
        keep: False lets it vanish in any case, which tells whether the place can be written.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # other processes write theirs
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.open("wb").close()
        yield part
        if keep:
            os.replace(part, path)
    except (OSError, ValueError) as error:
        raise OptionError(f"{path} cannot be written ({error}): choose another place.") from error
    finally:
        if os.path.isfile(part):  # still there: the block failed or was stopped
            part.unlink()
