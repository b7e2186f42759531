"""The connected images, video and audio of a node as the files of a model's parameters.

Which socket feeds which parameter is named in `file_parameters`, or follows from the model's own
list: images in order, a video or audio where the parameter's name says so. What does not follow is
an error, not a guess: a run with the wrong file costs as much as one with the right one.
"""

import hashlib
import io
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...skyreels.errors import ShapeError
from ...skyreels.image import fit_image
from .. import host

if TYPE_CHECKING:
    from ...wiro_api.transport import FilePart

logger = logging.getLogger("skyreels.nodes.remote.inputs")

IMAGES = ("image", "image_2", "image_3", "image_4")
SOCKETS = (*IMAGES, "video", "audio")
#: default of Wiro Run Model's image_parameter
IMAGE_PARAMETER = "inputImage"
#: words of a parameter's name that tell the kind of its files
KIND_WORDS = {
    "audio": "audio|voice|sound|music|speech|song",
    "video": "video|movie|film|clip",
    "other": "document|pdf|subtitle|lora|weights|archive|zip|csv",
    "image": "image|img|photo|picture|frame|mask|portrait|face|selfie|logo",
}
#: most files of one socket
MAX_FILES = 100


# --- which socket feeds which parameter ---------------------------------------------------------


@dataclass(frozen=True)
class Slot:
    """A parameter that takes files."""

    name: str
    kind: str
    """Of KIND_WORDS; "" if the name does not tell."""
    takes_many: bool
    is_required: bool


def slots_of(items: Sequence[Mapping[str, Any]]) -> list[Slot]:
    """The parameters of a model that take files, in its order."""
    from ...wiro_api.schema import is_file, is_required, takes_many
    from ...wiro_api.wire import text_of

    return [
        Slot(
            str(item["id"]),
            _kind_of(str(item["id"])) or _kind_of(text_of(item.get("label"))),
            takes_many(item),
            is_required(item),
        )
        for item in items
        if is_file(item)
    ]


def _kind_of(text: str) -> str:
    kinds = [kind for kind, words in KIND_WORDS.items() if re.search(words, text[:200].lower())]
    return kinds[0] if len(kinds) == 1 else ""


def parse_assignments(text: str) -> dict[str, str]:
    """Socket -> parameter of the `file_parameters` widget.

    Args:
        text: such as "image_2=lastImage, video=inputVideo".

    Returns:
        Socket -> parameter, in the text's order.

    Raises:
        ConfigError: not in this form, or an unknown socket.
    """
    from ...wiro_api.errors import ConfigError

    assigned: dict[str, str] = {}
    for part in re.split(r"[,;\n]", text):
        if not part.strip():
            continue
        socket, _, name = (side.strip() for side in part.partition("="))
        if socket not in SOCKETS or not name:
            raise ConfigError(
                f"file_parameters contains {part.strip()[:60]!r}: write input=parameter, such as "
                f"image_2=lastImage; the inputs are {', '.join(SOCKETS)}. Nothing was sent."
            )
        if socket in assigned:
            raise ConfigError(f"file_parameters names {socket} twice: name it once.")
        assigned[socket] = name
    return assigned


def assign_sockets(
    sockets: Sequence[str],
    assigned: Mapping[str, str],
    slots: Sequence[Slot],
    values: Mapping[str, Any],
    taken: str = "",
) -> dict[str, str]:
    """The parameter of every connected socket.

    Args:
        sockets: the connected ones, in the order of SOCKETS.
        assigned: socket -> parameter as the user wrote it; all of them must be connected.
        slots: of the model; if empty, the user must assign every socket.
        values: the node's `parameters`; a parameter with an address there is not free.
        taken: parameter that `image_parameter` feeds, or "".

    Returns:
        Socket -> parameter, in the order of SOCKETS.

    Raises:
        ConfigError: lists the model's parameters and says what to write.
    """
    from ...wiro_api.errors import ConfigError

    full = [*assigned.values(), *([taken] if taken else [])]
    problem = _problem_of(assigned, full, sockets, slots)
    found = dict(assigned)
    for socket in sockets:
        if socket in found or problem:
            continue
        free = [
            slot
            for slot in slots
            if slot.takes_many
            or not (slot.name in full or values.get(slot.name) or values.get(f"{slot.name}Url"))
        ]
        found[socket] = _choose(socket, free)
        full.append(found[socket])
        if not slots:
            problem = f"The model does not say which parameter takes {socket}"
        elif not found[socket]:
            problem = f"It is not clear which parameter takes {socket}"
    if problem:
        raise ConfigError(
            f"{problem}. {_describe_slots(slots)}. Write input=parameter into file_parameters, "
            "such as image_2=lastImage, video=inputVideo. Nothing was sent."
        )
    return {socket: found[socket] for socket in SOCKETS if socket in found}


def _problem_of(
    assigned: Mapping[str, str], full: Sequence[str], sockets: Sequence[str], slots: Sequence[Slot]
) -> str:
    """What is wrong with the user's own assignments, or ""."""
    by_name = {slot.name: slot for slot in slots}
    for socket, name in assigned.items():
        target = f"file_parameters assigns {socket} to {name[:60]!r}"
        if socket not in sockets:
            return f"{target}, but {socket} is not connected"
        if slots and name not in by_name:
            return f"{target}, which takes no file"
    for name in {name for name in full if full.count(name) > 1}:
        if name in by_name and not by_name[name].takes_many:
            return f"{name} takes one file but is assigned several"
    return ""


def _choose(socket: str, free: Sequence[Slot]) -> str:
    kind = "image" if socket in IMAGES else socket
    fits = [slot for slot in free if slot.kind == kind] or [s for s in free if not s.kind]
    if kind == "image" and fits:
        return fits[0].name
    if len(fits) > 1:
        fits = [slot for slot in fits if slot.is_required]
    return fits[0].name if len(fits) == 1 else ""


def _describe_slots(slots: Sequence[Slot]) -> str:
    from ...wiro_api.schema import listed

    if not slots:
        return "The model lists no parameter that takes files"
    names = (f"{slot.name} ({'several' if slot.takes_many else 'one'})" for slot in slots)
    return f"Files are taken by {listed(names)}"


# --- files --------------------------------------------------------------------------------------


def model_files(
    items: Sequence[Mapping[str, Any]],
    values: Mapping[str, Any],
    connected: Mapping[str, Any],
    assigned: Mapping[str, str],
    image_parameter: str,
) -> "list[tuple[str, FilePart]]":
    """The files of Wiro Run Model.

    `image` goes to `image_parameter`, and only the first of its batch, as before there were other
    sockets; unless `file_parameters` names it, or `image_parameter` is the default and the model
    has no such parameter.

    Args:
        items: the model's parameters.
        values: the node's `parameters`.
        connected: socket -> value, in the order of SOCKETS.
        assigned: of `parse_assignments`.
        image_parameter: widget of the node.

    Returns:
        (parameter, file) in the order of SOCKETS.

    Raises:
        ConfigError: it is not clear where a file goes, or it cannot be sent.
        ShapeError: an image cannot be sent.
    """
    slots = slots_of(items)
    takes_many = {slot.name for slot in slots if slot.takes_many}
    rest = dict(connected)
    files: list[tuple[str, FilePart]] = []
    is_missing = (
        image_parameter in ("", IMAGE_PARAMETER)
        and bool(slots)
        and all(slot.name != image_parameter for slot in slots)
    )
    taken = ""
    if "image" in rest and "image" not in assigned and not is_missing:
        taken = image_parameter
        files.append((taken, png_part(rest.pop("image"))))
    for socket, name in assign_sockets(list(rest), assigned, slots, values, taken).items():
        parts = file_parts(socket, rest[socket], name, name in takes_many)
        files += [(name, part) for part in parts]
    return files


def file_parts(socket: str, value: Any, name: str, takes_many: bool) -> "list[FilePart]":
    """The files that one socket sends to one parameter.

    Args:
        socket: of SOCKETS.
        value: ComfyUI's IMAGE, VIDEO or AUDIO.
        name: of the parameter.
        takes_many: send the whole batch; otherwise its first item.

    Returns:
        One file for each image or sound.

    Raises:
        ConfigError: nothing to send, or too much.
    """
    from ...wiro_api.errors import ConfigError

    if socket == "video":
        return [video_part(value)]
    batch = value if socket in IMAGES else value["waveform"]
    count = len(batch)
    if count > 1 and not takes_many:
        logger.warning("%s holds %d, but %s takes one: sending the first.", socket, count, name)
        count = 1
    if not 0 < count <= MAX_FILES:
        raise ConfigError(
            f"{socket} has a batch of {count}; it must be 1 to {MAX_FILES}. Nothing was sent."
        )
    if socket == "audio":
        return [wav_part(batch[i], int(value["sample_rate"])) for i in range(count)]
    return [png_part(batch[i : i + 1]) for i in range(count)]


def png_part(image: Tensor, size: str = "", fit: str = "crop") -> "FilePart":
    """The first image of a batch as a PNG file.

    Args:
        image: [B, H, W, C] float in 0..1.
        size: such as "960x544"; "" keeps the image's own.
        fit: of `skyreels.image.FITS`, if its proportions differ.

    Returns:
        Name, content and type; known by its pixels, which another compressor packs differently.

    Raises:
        ShapeError: not an image, or too large to send.
    """
    from PIL import Image

    from ...wiro_api.files import MAX_UPLOAD_BYTES
    from ...wiro_api.jobs import PicturePart

    height, width = image.shape[1:3] if image.ndim == 4 else (0, 0)
    if size:
        width, height = (int(side) for side in size.split("x"))
    fitted = fit_image(image[:1], width, height, fit)[0, :, 0].permute(1, 2, 0)
    pixels = fitted.add(1.0).mul(127.5).round().to(torch.uint8).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    content = file.getvalue()
    if len(content) > MAX_UPLOAD_BYTES:
        raise ShapeError(
            f"The {width}x{height} image is {len(content)} bytes as PNG; Wiro accepts at most "
            f"{MAX_UPLOAD_BYTES}: downscale it."
        )
    part = ("input.png", content, "image/png")
    return PicturePart.from_pixels(part, pixels.tobytes(), *pixels.shape)


def wav_part(waveform: Tensor, sample_rate: int) -> "FilePart":
    """Audio as a 16-bit WAV file; its bytes do not depend on installed libraries.

    Args:
        waveform: [C, T] float in -1..1.
        sample_rate: samples per second.

    Returns:
        Name, content and type.

    Raises:
        ConfigError: empty or too long.
    """
    from ...wiro_api.errors import ConfigError
    from ...wiro_api.files import MAX_UPLOAD_BYTES

    channels, length = waveform.shape if waveform.ndim == 2 else (0, 0)
    if not channels or not length or not 0 < sample_rate < 2**31:
        raise ConfigError("audio is empty: connect another one. Nothing was sent.")
    if 2 * channels * length > MAX_UPLOAD_BYTES:
        raise ConfigError(
            f"audio lasts {length / sample_rate:.0f} seconds, {2 * channels * length / 1e6:.0f} MB "
            f"as WAV; Wiro accepts at most {MAX_UPLOAD_BYTES // 10**6} MB: shorten it. Nothing was "
            "sent."
        )
    levels = waveform.detach().float().cpu().nan_to_num(0.0).clamp(-1.0, 1.0).mul(32767.0).round()
    samples = levels.to(torch.int16).T.contiguous().numpy().astype("<i2")
    file = io.BytesIO()
    import wave

    with wave.open(file, "wb") as sound:
        sound.setnchannels(channels)
        sound.setsampwidth(2)
        sound.setframerate(sample_rate)
        sound.writeframes(samples.tobytes())
    return "input.wav", file.getvalue(), "audio/wav"


def video_part(video: Any) -> "FilePart":
    """A video as a file: the source file unchanged, or what ComfyUI encodes from its frames.

    An encoded one is known by its frames and audio: another encoder makes other bytes of them.

    Args:
        video: ComfyUI's VIDEO.

    Returns:
        Name, content and type.

    Raises:
        ConfigError: empty or too large.
    """
    from ...wiro_api.errors import ConfigError
    from ...wiro_api.files import MAX_UPLOAD_BYTES
    from ...wiro_api.jobs import PicturePart

    content, is_source = host.video_bytes(video, MAX_UPLOAD_BYTES)
    if not 0 < len(content) <= MAX_UPLOAD_BYTES:
        count = f"more than {MAX_UPLOAD_BYTES}" if content else "0"
        raise ConfigError(
            f"video has {count} bytes; Wiro accepts 1 to {MAX_UPLOAD_BYTES} (100 MB): shorten it "
            "or lower its resolution. Nothing was sent."
        )
    suffix, mime_type = _container(content)
    part = (f"input{suffix}", content, mime_type)
    return part if is_source else PicturePart.from_pixels(part, _digest(video), 0)


def _container(content: bytes) -> tuple[str, str]:
    """Suffix and type of a video file."""
    if content[:4] == b"\x1aE\xdf\xa3":
        is_webm = b"webm" in content[:64]
        return (".webm", "video/webm") if is_webm else (".mkv", "video/x-matroska")
    if content[:4] == b"RIFF":
        return ".avi", "video/x-msvideo"
    if content[4:12] == b"ftypqt  ":
        return ".mov", "video/quicktime"
    return ".mp4", "video/mp4"


def _digest(video: Any) -> bytes:
    """A digest of a video's frames, frame rate and audio."""
    parts = video.get_components()
    digest = hashlib.sha256()
    for frame in parts.images:  # one by one: they may fill half the memory
        pixels = frame.detach().float().cpu().mul(255.0).round().to(torch.uint8)
        digest.update(json.dumps(list(pixels.shape)).encode())
        digest.update(pixels.contiguous().numpy().tobytes())
    digest.update(str(parts.frame_rate).encode())
    if parts.audio is not None:
        sound = parts.audio["waveform"].detach().float().cpu().contiguous()
        digest.update(json.dumps([list(sound.shape), int(parts.audio["sample_rate"])]).encode())
        digest.update(sound.numpy().tobytes())
    return digest.digest()
