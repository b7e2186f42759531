"""What a file is, by its bytes: names and content types come from outside. No decoding here."""

import re
from pathlib import Path
from typing import BinaryIO

from .task import Output

#: how much of a file tells what it is
HEAD_BYTES = 4096
#: what a kind is worth to somebody who waits for a result, least first
KINDS = ("other", "text", "audio", "image", "video")
_SUFFIXES = {
    "video": (".mp4", ".m4v", ".webm", ".mov", ".mkv", ".avi", ".mpg", ".ts", ".flv"),
    "image": (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".apng"),
    "audio": (
        ".wav",
        ".mp3",
        ".flac",
        ".ogg",
        ".oga",
        ".opus",
        ".m4a",
        ".mka",
        ".weba",
        ".aac",
        ".aiff",
    ),
    "text": (".txt", ".json", ".srt", ".vtt", ".md"),
}
_BEGINNINGS = (
    (b"\x89PNG\r\n\x1a\n", "image"),
    (b"\xff\xd8\xff", "image"),
    (b"GIF87a", "image"),
    (b"GIF89a", "image"),
    (b"II*\0", "image"),
    (b"MM\0*", "image"),
    (b"\x1aE\xdf\xa3", "video"),
    (b"FLV\1", "video"),
    (b"\0\0\1\xba", "video"),
    (b"\0\0\1\xb3", "video"),
    (b"OggS", "audio"),
    (b"fLaC", "audio"),
)
_RIFF = {b"AVI ": "video", b"WAVE": "audio", b"WEBP": "image"}
#: containers that hold sound alone as well as pictures: the name decides
_EITHER = (b"\x1aE\xdf\xa3", b"OggS")
_PAGE = re.compile(rb"\s*(<!--.*?-->\s*)*<(!doctype\s+html|html|head|body)\b", re.I | re.S)
_BOX = re.compile(rb"[\x20-\x7e\xa9]{4}")
#: boxes, or chunks, that are looked at
_MAX_STEPS = 100_000


def kind_of(path: Path, claimed: str = "") -> str:
    """Recognize a file by its first bytes.

    Args:
        path: of the file.
        claimed: decides where a container may hold either sound or pictures; "" for what the
            suffix claims.

    Returns:
        One of KINDS.
    """
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    claimed = claimed or kind_of_name(path.name)
    kind = _container_kind(head, claimed) or _stream_kind(head, claimed)
    return kind or ("text" if is_text(head) else "other")


def _container_kind(head: bytes, claimed: str) -> str:
    """The kind of a file that begins with a box or a chunk, else ""."""
    if head[4:8] == b"ftyp":
        if head[8:12] in (b"avif", b"avis", b"heic", b"heix", b"mif1"):
            return "image"
        is_sound = head[8:12] in (b"M4A ", b"M4B ") or claimed == "audio"
        return "audio" if is_sound else "video"
    if head[4:8] in (b"moov", b"mdat", b"wide"):
        return "video"  # QuickTime from before ftyp
    if head[:4] == b"RIFF":
        return _RIFF.get(head[8:12], "other")
    return "audio" if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC") else ""


def _stream_kind(head: bytes, claimed: str) -> str:
    """The kind of a file that begins with a signature or a frame, else ""."""
    if head[:2] == b"BM" and head[6:10] == bytes(4):
        return "image"
    if head[:3] == b"ID3" and head[3:4] < b"\x10":
        return "audio"
    for beginning, kind in _BEGINNINGS:
        if head.startswith(beginning):
            return claimed if beginning in _EITHER and claimed in ("audio", "video") else kind
    if head[:1] == b"\x47" and head[188:189] == b"\x47":
        return "video"  # MPEG transport stream
    if re.match(rb"\xff[\xe2\xe3\xf0-\xf5\xf8-\xfd]", head):
        return "audio"  # MPEG audio, ADTS
    return ""


def kind_of_name(name: str) -> str:
    """One of KINDS, as a name claims."""
    found = (kind for kind, suffixes in _SUFFIXES.items() if name.lower().endswith(suffixes))
    return next(found, "other")


def claimed_kind(output: Output) -> str:
    """One of KINDS, as a record claims: its content type, else its name."""
    first = output.contenttype.partition("/")[0].lower()
    if "svg" in output.contenttype or output.name.lower().endswith(".svg"):
        return "text"
    return first if first in ("video", "image", "audio", "text") else kind_of_name(output.name)


def is_text(head: bytes) -> bool:
    """Whether the beginning of a file is UTF-8 without control characters."""
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4 or len(head) < HEAD_BYTES:  # else a letter cut in the middle
            return False
        text = head[: error.start].decode()
    return bool(text) and not re.search(r"[\x00-\x08\x0e-\x1a\x1c-\x1f]", text)


def is_page(path: Path) -> bool:
    """Whether it is a web page: what gateways and portals send in place of a file."""
    with path.open("rb") as file:
        return _PAGE.match(file.read(HEAD_BYTES)) is not None


def what_is_missing(path: Path) -> tuple[str, bool]:
    """Whether a file ends early, as far as its container tells.

    Returns:
        ("", True) if it is whole or of a kind that does not tell; else what is missing, and
        whether what is there can be shown.
    """
    num_bytes = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(12)
        file.seek(0)
        if head[4:8] == b"ftyp":
            return _walk_boxes(file, num_bytes)
        if head[:8] == b"\x89PNG\r\n\x1a\n":
            return _walk_chunks(file, num_bytes)
    if head[:4] == b"RIFF":
        announced = int.from_bytes(head[4:8], "little")
        # writers that cannot go back leave these two
        if announced not in (0, 0xFFFFFFFF) and announced + 8 > num_bytes:
            return f"it ends after {num_bytes} of {announced + 8} bytes", True
    return "", True


def _walk_boxes(file: BinaryIO, num_bytes: int) -> tuple[str, bool]:
    """Of MP4 and its kin: do all boxes end in the file, and is there an index?"""
    position, has_index = 0, False
    for _ in range(_MAX_STEPS):
        if position == num_bytes:
            break
        file.seek(position)
        header = file.read(16)
        if not any(header):  # a hole, as of a file that was made in full size and never filled
            break
        size, kind = int.from_bytes(header[:4], "big"), header[4:8]
        if len(header) < 8 or not _BOX.fullmatch(kind):
            return "", True  # something else from here on: players skip it
        if size == 1:
            size = int.from_bytes(header[8:16], "big")
        elif size == 0:  # to the end
            size = num_bytes - position
        if size < 8:
            return "", True
        if position + size > num_bytes:
            return f"it ends inside its box {kind.decode('latin-1')!r}", has_index
        has_index = has_index or kind in (b"moov", b"moof", b"meta")
        position += size
    if not has_index:
        return "it is an MP4 file without its index (moov), so it does not decode", False
    return "", True


def _walk_chunks(file: BinaryIO, num_bytes: int) -> tuple[str, bool]:
    position = 8
    for _ in range(_MAX_STEPS):
        file.seek(position)
        header = file.read(8)
        position += 12 + int.from_bytes(header[:4], "big")
        if len(header) < 8 or position > num_bytes:
            return "it ends before its last chunk (IEND)", True
        if header[4:] == b"IEND":
            break
    return "", True
