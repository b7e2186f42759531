"""What is connected to Wiro Run Model as the files of a model's parameters.

Which socket feeds which parameter is written in `file_parameters`, or follows from the model's own
list: pictures in order, a film and a sound where the parameter's name says so. What does not follow
is asked for, never guessed: a run with the wrong file costs as much as one with the right one.
"""

import hashlib
import io
import json
import logging
import re
import wave
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import host

if TYPE_CHECKING:
    from ...wiro_api.transport import FilePart

logger = logging.getLogger("skyreels.nodes.remote.inputs")

PICTURES = ("image", "image_2", "image_3", "image_4")
SOCKETS = (*PICTURES, "video", "audio")
#: words of a parameter's name that say what its files are; "" takes what nothing else is for
WORDS = {
    "audio": "audio|voice|sound|music|speech|song",
    "video": "video|movie|film|clip",
    "other": "document|pdf|subtitle|lora|weights|archive|zip|csv",
    "image": "image|img|photo|picture|frame|mask|portrait|face|selfie|logo",
}
#: of one parameter that takes several, and of all that a run sends
MAX_PICTURES = 100


@dataclass(frozen=True)
class Slot:
    """A parameter that takes files. kind: of WORDS, or "" if its name says nothing."""

    name: str
    kind: str
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
    kinds = [kind for kind, words in WORDS.items() if re.search(words, text[:200].lower())]
    return kinds[0] if len(kinds) == 1 else ""


def parse_places(text: str) -> dict[str, str]:
    """Socket -> parameter of "image_2=lastImage, video=inputVideo".

    Raises:
        ConfigError: not written so, or a socket that there is not.
    """
    from ...wiro_api.errors import ConfigError

    places: dict[str, str] = {}
    for part in re.split(r"[,;\n]", text):
        if not part.strip():
            continue
        socket, _, name = (side.strip() for side in part.partition("="))
        if socket not in SOCKETS or not name:
            raise ConfigError(
                f"file_parameters holds {part.strip()[:60]!r}: write input=parameter, as "
                f"image_2=lastImage; the inputs are {', '.join(SOCKETS)}. Nothing was sent."
            )
        if socket in places:
            raise ConfigError(f"file_parameters names {socket} twice: name it once.")
        places[socket] = name
    return places


def place(
    sockets: Sequence[str],
    places: Mapping[str, str],
    slots: Sequence[Slot],
    values: Mapping[str, Any],
    taken: str = "",
) -> dict[str, str]:
    """Socket -> parameter for all that is connected.

    Args:
        sockets: that are connected, in the order of SOCKETS.
        places: those that are named; all must be connected.
        slots: of the model; with none, all must be named.
        values: what stands in `parameters`; a parameter with an address there is not free.
        taken: the parameter that `image_parameter` feeds, or "".
    Raises:
        ConfigError: lists the parameters, and says what to write.
    """
    by_name = {slot.name: slot for slot in slots}
    for socket, name in places.items():
        if socket not in sockets:
            raise _problem(f"file_parameters sends {socket} to {name[:60]!r}, but nothing is "
                           "connected to it", slots)  # fmt: skip
        if slots and name not in by_name:
            raise _problem(f"{socket} is sent to {name[:60]!r}, which takes no file", slots)
    full = [*places.values(), *([taken] if taken else [])]
    for name in {name for name in full if full.count(name) > 1}:
        if name in by_name and not by_name[name].takes_many:
            raise _problem(f"{name} takes one file and gets several", slots)
    found = dict(places)
    for socket in sockets:
        if socket in found:
            continue
        if not slots:
            raise _problem(f"The model does not say where the file of {socket} belongs", slots)
        free = [
            slot for slot in slots
            if slot.takes_many
            or (slot.name not in full and not values.get(slot.name)
                and not values.get(f"{slot.name}Url"))
        ]  # fmt: skip
        name = _choose(socket, free)
        if not name:
            raise _problem(f"It does not follow where the file of {socket} belongs", slots)
        found[socket] = name
        full.append(name)
    return {socket: found[socket] for socket in SOCKETS if socket in found}


def _choose(socket: str, free: Sequence[Slot]) -> str:
    kind = "image" if socket in PICTURES else socket
    fits = [slot for slot in free if slot.kind == kind] or [s for s in free if not s.kind]
    if kind == "image" and fits:
        return fits[0].name
    if len(fits) > 1:
        fits = [slot for slot in fits if slot.is_required]
    return fits[0].name if len(fits) == 1 else ""


def _problem(what: str, slots: Sequence[Slot]) -> Exception:
    from ...wiro_api.errors import ConfigError
    from ...wiro_api.schema import listed

    there = "The model lists no parameter that takes files"
    if slots:
        there = "Files are taken by " + listed(
            f"{slot.name} ({'several' if slot.takes_many else 'one'})" for slot in slots
        )
    return ConfigError(
        f"{what}. {there}. Write input=parameter into file_parameters, as "
        "image_2=lastImage, video=inputVideo. Nothing was sent."
    )


def parts_of(
    name: str, socket: str, value: Any, takes_many: bool,
    png: Callable[[Tensor], "FilePart"],
) -> "list[tuple[str, FilePart]]":  # fmt: skip
    """What one socket sends to one parameter.

    Args:
        takes_many: all pictures or sounds of a batch are sent; otherwise the first one.
        png: packs a picture.
    Raises:
        ConfigError: nothing that can be sent.
    """
    from ...wiro_api.errors import ConfigError

    if socket == "video":
        return [(name, video_part(value))]
    batch = value if socket in PICTURES else value["waveform"]
    count = len(batch)
    if count > 1 and not takes_many:
        logger.warning("%s holds %d, and %s takes one: the first is sent.", socket, count, name)
        count = 1
    if not 0 < count <= MAX_PICTURES:
        raise ConfigError(
            f"{socket} holds {count}: a run sends 1 to {MAX_PICTURES} of one input. Nothing was "
            "sent."
        )
    if socket == "audio":
        return [(name, wav_part(batch[i], int(value["sample_rate"]))) for i in range(count)]
    return [(name, png(batch[i : i + 1])) for i in range(count)]


def wav_part(waveform: Tensor, sample_rate: int) -> "FilePart":
    """A sound [C, T] in -1..1 as WAV of 16 bits, the same bytes whatever is installed.

    Raises:
        ConfigError: there is no sound, or it is too long.
    """
    from ...wiro_api.errors import ConfigError
    from ...wiro_api.files import MAX_UPLOAD_BYTES

    channels, length = waveform.shape if waveform.ndim == 2 else (0, 0)
    if not channels or not length or not 0 < sample_rate < 2**31:
        raise ConfigError("audio holds no sound: connect another. Nothing was sent.")
    if 2 * channels * length > MAX_UPLOAD_BYTES:
        raise ConfigError(
            f"audio lasts {length / sample_rate:.0f} seconds, {2 * channels * length / 1e6:.0f} MB "
            f"as WAV, and Wiro takes {MAX_UPLOAD_BYTES // 10**6} MB: shorten it. Nothing was sent."
        )
    levels = waveform.detach().float().cpu().nan_to_num(0.0).clamp(-1.0, 1.0).mul(32767.0).round()
    samples = levels.to(torch.int16).T.contiguous().numpy().astype("<i2")
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(channels)
        sound.setsampwidth(2)
        sound.setframerate(sample_rate)
        sound.writeframes(samples.tobytes())
    return "input.wav", file.getvalue(), "audio/wav"


def video_part(video: Any) -> "FilePart":
    """Core's VIDEO: the file it lies in as it is, else what core makes of its frames.

    What core makes is known by frames and sound, since another encoder makes other bytes of them.

    Raises:
        ConfigError: empty, or too large.
    """
    from ...wiro_api.errors import ConfigError
    from ...wiro_api.files import MAX_UPLOAD_BYTES
    from ...wiro_api.jobs import PicturePart

    content, is_as_it_was = host.video_bytes(video, MAX_UPLOAD_BYTES)
    if not 0 < len(content) <= MAX_UPLOAD_BYTES:
        raise ConfigError(
            f"video has {'more than ' if len(content) > MAX_UPLOAD_BYTES else ''}"
            f"{min(len(content), MAX_UPLOAD_BYTES)} bytes, and Wiro takes 1 to "
            f"{MAX_UPLOAD_BYTES} (100 MB): shorten it, or make it smaller. Nothing was sent."
        )
    suffix, kind = _video_kind(content)
    part = (f"input{suffix}", content, kind)
    if is_as_it_was:
        return part
    return PicturePart.from_pixels(part, _fingerprint(video), 0)


def _video_kind(content: bytes) -> tuple[str, str]:
    if content[:4] == b"\x1aE\xdf\xa3":
        is_webm = b"webm" in content[:64]
        return (".webm", "video/webm") if is_webm else (".mkv", "video/x-matroska")
    if content[:4] == b"RIFF":
        return ".avi", "video/x-msvideo"
    if content[4:12] == b"ftypqt  ":
        return ".mov", "video/quicktime"
    return ".mp4", "video/mp4"


def _fingerprint(video: Any) -> bytes:
    """A digest of frames, rate and sound."""
    parts = video.get_components()
    digest = hashlib.sha256()
    for frame in parts.images:  # one by one: they may fill half the memory
        eighth = frame.detach().float().cpu().mul(255.0).round().to(torch.uint8)
        digest.update(json.dumps(list(eighth.shape)).encode())
        digest.update(eighth.contiguous().numpy().tobytes())
    digest.update(str(parts.frame_rate).encode())
    if parts.audio is not None:
        sound = parts.audio["waveform"].detach().float().cpu().contiguous()
        digest.update(json.dumps([list(sound.shape), int(parts.audio["sample_rate"])]).encode())
        digest.update(sound.numpy().tobytes())
    return digest.digest()
