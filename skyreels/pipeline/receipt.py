"""The receipt of a clip: what it was made from, so that it can be made again.

    {"skyreels_receipt": 1, "backend": "local", "model", "parameters": {"prompt", "seed", ...},
     "weights": {"transformer": WEIGHTS, "vae": WEIGHTS, ...}, "loras": [WEIGHTS with "strength"],
     "picture": {"width", "height", "sha256"}, "by_hand": [...], "cost_usd", "elapsed_s",
     "ended", "device", "versions", "package"}

WEIGHTS is {"name", "num_bytes", "sampled_sha256"}: the hash is that of samples of a file, see
`fingerprint_weights`, because a file of 25 GB takes minutes. Receipts of clips from Wiro are read
too; what means the same has the same name in both. A receipt names files and no folders, and holds
no key, token or address.
"""

import json
import logging
import math
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path, PureWindowsPath
from typing import Any

import torch

from ..conditioning.embeds import with_fps_prefix
from ..conditioning.latents import check_size
from ..config import (
    ATTENTIONS,
    DECODE_MODES,
    MAX_GUIDANCE,
    MAX_STEPS,
    TRANSFORMER_PRECISIONS,
    VERSION,
)
from ..errors import OptionError, shown
from ..files import check_regular
from ..image import FITS, PictureOrigin
from ..runtime.outcomes import device_key
from ..sampling.calibrate import CACHE_CHOICES, fingerprint_weights
from ..weights.inspect import CheckpointInfo
from ..weights.load import Source
from ..weights.lora.apply import AppliedLora

logger = logging.getLogger("skyreels.pipeline.receipt")

#: first field of a receipt, by which it is known; its value is the format
MARK, FORMAT = "skyreels_receipt", 1
#: first field of one that wiro_api/receipts.py writes
WIRO_MARK = "wiro_receipt"
#: fields that differ from one run of the same inputs to the next
MOMENTARY = ("elapsed_s", "ended")
#: no receipt is larger
MAX_BYTES = 2 * 1024**2
#: of the file beside a clip in a format without metadata
SUFFIX = ".receipt.json"
#: characters of a prompt; the model reads about 1500
MAX_PROMPT = 20_000
#: names of files and options that are read of a receipt, and their characters
MAX_ITEMS, MAX_NAME = 64, 200
#: name of a parameter at Wiro -> ours
_WIRO_NAMES = {
    "prompt": "prompt",
    "negativePrompt": "negative_prompt",
    "scale": "cfg",
    "steps": "steps",
    "numFrames": "num_frames",
    "seed": "seed",
}


class NoReceiptError(OptionError):
    """A file holds no receipt.

    Attributes:
        graph: what ComfyUI has written into it instead, in API format; else "".
    """

    def __init__(self, message: str, graph: str = "") -> None:
        super().__init__(message)
        self.graph = graph


@dataclass(frozen=True)
class Weights:
    """A file or folder of weights as a receipt names it.

    Attributes:
        name: without its folder.
        num_bytes: of its tensors, or of the file of a LoRA.
        sampled_sha256: of samples of it; "" if the receipt has none.
        strength: of a LoRA.
        blocks: of a LoRA, where it acts; "" is everywhere.
    """

    name: str
    num_bytes: int = 0
    sampled_sha256: str = ""
    strength: float = 1.0
    blocks: str = ""

    def __str__(self) -> str:
        size = f"{self.num_bytes / 1e9:.2f} GB, " if self.num_bytes else ""
        digest = f"sampled SHA-256 {self.sampled_sha256[:12]}..." if self.sampled_sha256 else ""
        told = (size + digest).rstrip(", ")
        return f"{self.name} ({told})" if told else self.name


@dataclass(frozen=True)
class Receipt:
    """A receipt that was read: every value is of its type and within its range.

    Attributes:
        backend: "local" or "wiro".
        model: name of the transformer, or of the model at Wiro.
        parameters: a value for each name of PARAMETERS, the usual one where the receipt has none.
        unknown: names of PARAMETERS that the receipt does not have.
        weights: what was loaded, by its part ("transformer", "vae", "llama", "clip").
        loras: in their order.
        picture_sha256: of the picture, see `image.picture_digest`; "" if unknown.
        by_hand: what else the clip was made with.
    """

    backend: str
    model: str
    parameters: Mapping[str, Any]
    unknown: tuple[str, ...] = ()
    weights: Mapping[str, Weights] = field(default_factory=dict)
    loras: tuple[Weights, ...] = ()
    picture_sha256: str = ""
    by_hand: tuple[str, ...] = ()


# --- writing ------------------------------------------------------------------------------------


def make_receipt(
    model: str,
    parameters: Mapping[str, Any],
    *,
    weights: Mapping[str, Mapping[str, Any]],
    loras: Sequence[AppliedLora] = (),
    origin: PictureOrigin | None = None,
    by_hand: Sequence[str] = (),
    device: torch.device,
    elapsed_s: float,
) -> dict[str, Any]:
    """The receipt of a clip that was made here.

    Args:
        model: name of the transformer.
        parameters: values for names of PARAMETERS; None for one that is not known. Others may
            follow, for people.
        weights: part -> of `describe_weights`.
        loras: in use.
        origin: of the first frame; None without a picture of ours.
        by_hand: names of what else was given to the run.
        device: that computed.
        elapsed_s: seconds until the latents were there; the decode is not part of it.

    Returns:
        For json.dumps.
    """
    pictured = _picture_parameters(origin)
    return {
        MARK: FORMAT,
        "backend": "local",
        "model": base_name(model),
        "parameters": {**parameters, **pictured},
        "weights": dict(weights),
        "loras": [_describe_lora(each) for each in loras],
        "picture": None if origin is None else origin.picture,
        "by_hand": sorted({*by_hand, *_untold_of(origin)}),
        "cost_usd": "0",
        "elapsed_s": round(elapsed_s, 3),
        "ended": datetime.now(timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z"),
        "device": device_key(device),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "package": f"skyreels-wiro {VERSION}",
    }


def to_text(receipt: Mapping[str, Any]) -> str:
    """A receipt as the text that is stored.

    Returns:
        JSON.
    """
    return json.dumps(receipt, indent=2, ensure_ascii=False, allow_nan=False)


def base_name(name: str) -> str:
    """The last part of a name, whichever system's separators it has."""
    return PureWindowsPath(name).name or name


_fingerprints: dict[tuple[Any, ...], str] = {}
"""Files with their sizes and times -> sampled hash."""


def describe_weights(info: CheckpointInfo, name: str = "") -> dict[str, Any]:
    """What a receipt says of a checkpoint.

    Args:
        info: of the checkpoint.
        name: as the user chose it; by default its file's or folder's.

    Returns:
        "name", "num_bytes", "sampled_sha256".
    """
    files = sorted({entry.file for entry in info.tensors.values()})
    stamps = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = tuple(stamps)
    if key not in _fingerprints:
        _fingerprints[key] = fingerprint_weights(info)
    return {
        "name": base_name(name or info.path.name),
        "num_bytes": info.num_bytes,
        "sampled_sha256": _fingerprints[key],
    }


def describe_source(source: object, name: str = "") -> dict[str, Any] | None:
    """What a receipt says of a loaded module.

    Args:
        source: of the module.
        name: as for `describe_weights`.

    Returns:
        As `describe_weights`, without a hash where the file is another one by now; None for a
        module that was not loaded from a file.
    """
    if not isinstance(source, Source):
        return None
    info = source.info
    if source.is_unchanged:
        return describe_weights(info, name)
    logger.info(
        "%s is gone or has changed since it was loaded: its hash is not in the receipt.",
        shown(info.path.name),
    )
    return {"name": base_name(name or info.path.name), "num_bytes": info.num_bytes}


def _describe_lora(applied: AppliedLora) -> dict[str, Any]:
    path = applied.lora.path
    return {
        "name": path.name,
        "sha256": applied.lora.digest,
        "strength": applied.strength,
        "blocks": applied.blocks,
    }


def _picture_parameters(origin: PictureOrigin | None) -> dict[str, Any]:
    if origin is None:
        return {}
    settings = origin.settings
    return {
        "fit": settings.fit,
        "noise_augmentation": settings.noise_augmentation,
        "latent_strength": settings.latent_strength,
        "augmentation_seed": origin.seed,
    }


def _untold_of(origin: PictureOrigin | None) -> list[str]:
    if origin is None:
        return []
    told = {"end_image": origin.has_end, "prefix_frames": origin.settings.prefix_frames > 1}
    return [name for name, is_used in told.items() if is_used]


# --- reading ------------------------------------------------------------------------------------

#: what a parameter is read with, and its value where a receipt has none
Rule = tuple[Callable[[str, Any], Any], Any]


def _whole(low: int, high: int) -> Callable[[str, Any], int]:
    def read(name: str, value: Any) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, str) and re.fullmatch(r"-?\d{1,20}", value.strip()):
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise OptionError(
                f"The receipt's {name} is {shown(value)}, and must be a whole number within "
                f"{low}..{high}: correct it in the receipt."
            )
        return value

    return read


def _number(low: float, high: float) -> Callable[[str, Any], float]:
    def read(name: str, value: Any) -> float:
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not low <= number <= high:  # NaN too
            raise OptionError(
                f"The receipt's {name} is {shown(value)}, and must be within {low:g}..{high:g}: "
                "correct it in the receipt."
            )
        return number

    return read


def _choice(choices: Sequence[str]) -> Callable[[str, Any], str]:
    def read(name: str, value: Any) -> str:
        if value not in choices:
            raise OptionError(
                f"The receipt's {name} is {shown(value)}, and must be one of {', '.join(choices)}: "
                "correct it in the receipt, or update this package."
            )
        return str(value)

    return read


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or len(value) > MAX_PROMPT:
        what = f"{len(value)} characters long" if isinstance(value, str) else "no text"
        raise OptionError(
            f"The receipt's {name} is {what}, and must be a text of at most {MAX_PROMPT} "
            "characters: shorten it in the receipt."
        )
    return "".join(c for c in value if c.isprintable() or c in "\n\t")


#: name -> how it is read, and the usual value
PARAMETERS: dict[str, Rule] = {
    "prompt": (_text, ""),
    "negative_prompt": (_text, ""),
    "seed": (_whole(0, 2**64 - 1), 0),
    "steps": (_whole(1, MAX_STEPS), 30),
    "cfg": (_number(0.0, MAX_GUIDANCE), 6.0),
    "embedded_guidance": (_number(0.0, MAX_GUIDANCE), 1.0),
    "shift": (_number(0.01, 100.0), 7.0),
    "width": (_whole(1, 100_000), 960),
    "height": (_whole(1, 100_000), 544),
    "num_frames": (_whole(1, 100_000), 97),
    "fit": (_choice(FITS), "crop"),
    "noise_augmentation": (_number(0.0, 1.0), 0.0),
    "latent_strength": (_number(0.0, 10.0), 1.0),
    "augmentation_seed": (_whole(0, 2**64 - 1), 0),
    "denoise": (_number(1e-6, 1.0), 1.0),
    "cache": (_choice(CACHE_CHOICES), "off"),
    "attention": (_choice(ATTENTIONS), "exact"),
    "precision": (_choice(TRANSFORMER_PRECISIONS), "auto"),
    "decode": (_choice(DECODE_MODES), "auto"),
    "riflex_k": (_whole(0, 8), 4),
}


def parse_receipt(text: str | bytes) -> Receipt:
    """Read a receipt of a clip, made here or at Wiro.

    Args:
        text: JSON; it comes from outside.

    Returns:
        Its values, checked.

    Raises:
        OptionError: too long, cut short, of something else, of a newer version, or with a value
            outside its range.
        ShapeError: a size or a number of frames that no clip has.
    """
    if len(text) > MAX_BYTES:
        raise OptionError(
            f"The receipt is {len(text)} characters long, and none has more than {MAX_BYTES}: give "
            "that of a clip."
        )
    try:
        stored = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise OptionError(
            f"The receipt is not JSON ({shown(error)}): it may be cut short; copy all of it, from "
            "the first { to the last }."
        ) from None
    told = stored.get("parameters") if isinstance(stored, dict) else None
    is_wiro = isinstance(stored, dict) and MARK not in stored and "taskid" in stored
    if not isinstance(told, dict) or not (MARK in stored or WIRO_MARK in stored or is_wiro):
        names = ", ".join(map(str, stored)) if isinstance(stored, dict) else type(stored).__name__
        raise OptionError(
            f"This is not a receipt of SkyReels V1 (local + Wiro) (it holds {shown(names)}): give "
            f"one that begins with {MARK} or {WIRO_MARK}."
        )
    mark = MARK if MARK in stored else WIRO_MARK
    version = stored.get(mark, FORMAT)
    if version != FORMAT:
        raise OptionError(
            f"The receipt has format {shown(version)}, and this version reads {FORMAT}: update "
            "SkyReels V1 (local + Wiro)."
        )
    given = _of_wiro(told) if mark == WIRO_MARK else told
    values, unknown = {}, []
    for name, (read, usual) in PARAMETERS.items():
        if given.get(name) is None:
            values[name] = usual
            unknown.append(name)
        else:
            values[name] = read(name, given[name])
    check_size(values["width"], values["height"], values["num_frames"])
    picture = stored.get("picture")
    digest = picture.get("sha256") if isinstance(picture, dict) else ""
    return Receipt(
        backend="local" if mark == MARK else "wiro",
        model=shown(base_name(str(stored.get("model") or "")[:MAX_NAME])),
        parameters=values,
        unknown=tuple(unknown),
        weights=_weights_by_part(stored.get("weights")),
        loras=tuple(_weights_of(each) for each in _dicts(stored.get("loras"))),
        picture_sha256=_digest(digest),
        by_hand=_names(stored.get("by_hand")),
    )


def _of_wiro(told: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of SkyReels-V1 at Wiro under our names.

    Returns:
        Those that it has.

    Raises:
        OptionError: of another model.
    """
    given = {ours: told[theirs] for theirs, ours in _WIRO_NAMES.items() if theirs in told}
    size = re.fullmatch(r"\s*(\d{1,6})\s*[xX*]\s*(\d{1,6})\s*", str(told.get("size", "")))
    if size:
        given |= {"width": int(size[1]), "height": int(size[2])}
    if "prompt" not in given:
        raise OptionError(
            "This is the receipt of another model at Wiro, without a prompt: give one of "
            "SkyReels-V1."
        )
    return given


def _dicts(value: object) -> list[Mapping[str, Any]]:
    items = value if isinstance(value, list) else []
    return [item for item in items[:MAX_ITEMS] if isinstance(item, dict)]


def _names(value: object) -> tuple[str, ...]:
    items = value if isinstance(value, list) else []
    return tuple(shown(str(item)[:MAX_NAME]) for item in items[:MAX_ITEMS])


def _digest(value: object) -> str:
    return value if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) else ""


def _weights_by_part(value: object) -> dict[str, Weights]:
    parts = value if isinstance(value, dict) else {}
    return {
        shown(part): _weights_of(each)
        for part, each in list(parts.items())[:MAX_ITEMS]
        if isinstance(each, dict)
    }


def _weights_of(value: Mapping[str, Any]) -> Weights:
    num_bytes = value.get("num_bytes")
    strength = value.get("strength", 1.0)
    return Weights(
        name=shown(base_name(str(value.get("name") or "a file without a name")[:MAX_NAME])),
        num_bytes=num_bytes if isinstance(num_bytes, int) and num_bytes >= 0 else 0,
        sampled_sha256=_digest(value.get("sampled_sha256")) or _digest(value.get("sha256")),
        strength=_number(-100.0, 100.0)("LoRA strength", strength),
        blocks=shown(str(value.get("blocks") or "")[:MAX_NAME]),
    )


def difference(receipt: Receipt, part: str, found: Mapping[str, Any] | None) -> str:
    """What differs between the weights of a receipt and those that are here.

    Args:
        receipt: that was read.
        part: "transformer", "vae", ...
        found: of `describe_weights`; None if there are none of that name.

    Returns:
        A sentence; "" if they are the same, or the receipt says nothing of them.
    """
    told = receipt.weights.get(part)
    if told is None:
        return ""
    if found is None:
        return f"The {part} {told} of the receipt is not here."
    if told.sampled_sha256 and told.sampled_sha256 != found["sampled_sha256"]:
        return (
            f"The {part} {found['name']} is not the one of the receipt, {told}: its sampled "
            f"SHA-256 is {str(found['sampled_sha256'])[:12]}..., so the clip will be another one."
        )
    return ""


def names_frame_rate(prompt: str) -> bool:
    """Whether a prompt begins with a frame rate, so that an encoder adds none."""
    return with_fps_prefix(prompt) == prompt


# --- receipts in files --------------------------------------------------------------------------


def read_receipt(path: Path) -> Receipt:
    """Read the receipt of a file: of a JSON file, or that which a video or picture holds.

    For a clip that holds none, the file NAME.receipt.json beside it is read.

    Args:
        path: of a .json, .mp4, .mov, .mkv, .webm, .png or .npy file.

    Returns:
        The receipt.

    Raises:
        OptionError: there is none, or it cannot be read; see `parse_receipt`.
        CheckpointError: not a regular file.
    """
    return parse_receipt(receipt_text(path))


def receipt_text(path: Path) -> str | bytes:
    """The text of the receipt of a file, see `read_receipt`.

    Returns:
        JSON, not checked.

    Raises:
        NoReceiptError: there is none.
        OptionError: it is too large, or the file cannot be read.
        CheckpointError: not a regular file.
    """
    from ..media import read_metadata

    if path.suffix.lower() == ".json":
        return _small_text(path)
    check_regular(path)
    beside = path.with_name(path.stem + SUFFIX)
    held = {} if path.suffix.lower() == ".npy" else read_metadata(path, (MARK, "prompt"), MAX_BYTES)
    if MARK in held:
        return held[MARK]
    if beside.is_file():
        return _small_text(beside)
    fix = "give the receipt as JSON text, or a clip that `generate` wrote"
    if "prompt" in held:
        fix = "drop it on ComfyUI's page to open its workflow"
    raise NoReceiptError(
        f"{shown(path.name)} holds no receipt, and none lies beside it: {fix}.",
        held.get("prompt", ""),
    )


def _small_text(path: Path) -> bytes:
    check_regular(path)
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise OptionError(
            f"{shown(path.name)} has more than {MAX_BYTES} bytes, and no receipt has: give that of "
            "a clip."
        )
    return content
