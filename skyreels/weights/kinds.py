"""What kind of file something is, from its first bytes: a file's name says nothing of its contents.

Browsers save error pages under the name of a model, git leaves pointers, and people rename files.
"""

import re
from pathlib import Path
from typing import Literal

from ..errors import CheckpointError
from ..files import check_regular

Kind = Literal["safetensors", "gguf", "pickle", "unknown"]

#: the limit of the safetensors library itself
MAX_HEADER_BYTES = 100_000_000
#: bytes that are looked at
_HEAD_BYTES = 512
_UNPACK = "unpack it and choose the weight file inside"
_CHOOSE = "choose a weight file"
_OTHER = "use the .safetensors file of the same model"
#: first bytes -> what such a file is, and what to do about it
_FOREIGN: tuple[tuple[bytes, str, str], ...] = (
    (b"\x1f\x8b", "a gzip archive", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"Rar!", "a RAR archive", _UNPACK),
    (b"BZh", "a bzip2 archive", _UNPACK),
    (b"\xfd7zXZ", "an xz archive", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", _UNPACK),
    (b"\x89PNG", "a PNG picture", _CHOOSE),
    (b"\xff\xd8\xff", "a JPEG picture", _CHOOSE),
    (b"GIF8", "a GIF picture", _CHOOSE),
    (b"RIFF", "a WebP picture, an AVI video or a sound", _CHOOSE),
    (b"\x1aE\xdf\xa3", "a WebM or MKV video", _CHOOSE),
    (b"%PDF", "a PDF document", _CHOOSE),
    (b"\x89HDF", "an HDF5 file", _OTHER),
    (b"\x93NUMPY", "a numpy array", _OTHER),
    (b"\x7fELF", "a program", _CHOOSE),
    (b"MZ", "a program", _CHOOSE),
)
_PAGE = re.compile(rb"<(!doctype|html|head|\?xml)", re.IGNORECASE)


def kind_of(path: Path) -> Kind:
    """Recognise a weight file by its first bytes.

    Args:
        path: of the file.

    Returns:
        "safetensors", "gguf", "pickle" (.pt, with or without a zip around it); "unknown" for bytes
        that begin as none of these, nor as any other file that is known.

    Raises:
        CheckpointError: not a regular file, empty, or a file of another kind; says which, and what
            to do.
    """
    check_regular(path)
    num_bytes = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if head.startswith(b"GGUF"):
        return "gguf"
    if _is_safetensors(head, num_bytes):
        return "safetensors"
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        if _holds_pickle(path):
            return "pickle"
        found: tuple[str, str] | None = "a zip archive", _UNPACK
    elif head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "pickle"
    else:
        found = _foreign_kind(head, num_bytes)
    if found is not None:
        kind, fix = found
        raise CheckpointError(f"{path.name} is {kind} and not a weight file: {fix}.")
    return "unknown"


def _is_safetensors(head: bytes, num_bytes: int) -> bool:
    length = int.from_bytes(head[:8], "little")
    return head[8:9] == b"{" and length <= min(num_bytes - 8, MAX_HEADER_BYTES)


def _holds_pickle(path: Path) -> bool:
    """Whether a zip file is one of torch.save, which stores everything as it is."""
    import zipfile

    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RecursionError):
        return True  # cut off: its table is at the end. As weights it cannot be read either
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        return False  # a few bytes could stand for gigabytes
    return any(member.filename.endswith("/data.pkl") for member in members)


def _foreign_kind(head: bytes, num_bytes: int) -> tuple[str, str] | None:
    """What a file is that holds no weights, and what to do; None if that is not known."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    is_text = _is_text(head)
    tests = (
        (not head, "empty (0 bytes)", "download it again"),
        (
            head.startswith(b"version https://git-lfs"),
            "a pointer of Git LFS, which stands for the weights,",
            "run `git lfs pull` in its folder, or download the file from the model's page",
        ),
        (
            _PAGE.match(text) is not None,
            "a web page",
            "download the file itself, after signing in or accepting the licence where the page "
            "asks for it",
        ),
        (
            text[:1] in (b"{", b"[") and is_text,
            "JSON text, such as a workflow, a config or an index,",
            "choose a weight file; for an index of shards, its folder",
        ),
        *((head.startswith(start), kind, fix) for start, kind, fix in _FOREIGN),
        (head[4:8] == b"ftyp", "an MP4 video", _CHOOSE),
        (head[257:262] == b"ustar", "a tar archive", _UNPACK),
        (
            len(head) >= 16 and not head.strip(b"\0"),
            "empty at its start (zeros)",
            "its download has not finished; download it again",
        ),
        (num_bytes > 8 and is_text, "text", _CHOOSE),
    )
    return next(((kind, fix) for holds, kind, fix in tests if holds), None)


def _is_text(head: bytes) -> bool:
    text = head.decode("utf-8", errors="ignore")
    kept = len(text.encode()) >= len(head) - 3  # a character may be cut at the end
    return kept and all(char.isprintable() or char in "\r\n\t" for char in text)


def split_number(name: str) -> tuple[int, int] | None:
    """The number of a shard and of all shards, from a name such as x-00001-of-00006.safetensors."""
    found = re.search(r"-(\d{5})-of-(\d{5})\.", name)
    return (int(found[1]), int(found[2])) if found else None


def is_shard(name: str) -> bool:
    """Whether a file is one of several that are a checkpoint together; parts of GGUF are not."""
    number = split_number(name)
    return number is not None and number[1] > 1 and not name.lower().endswith(".gguf")
