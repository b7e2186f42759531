"""The parameters of a model: what Tool/Detail lists, made whole and checked before money is spent.

The service rejects some runs when a key of its schema is missing, so all are sent: "" for a text
that is not used, the model's default for a number that is not given.
"""

from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any

from .errors import ConfigError
from .handles import Model
from .transport import FilePart
from .wire import MAX_WORD, bool_of, decimal_of, one_line, text_of

SKYREELS = Model("wiro", "SkyReels-V1")
#: sizes of SkyReels-V1, width x height: landscape, portrait
SIZES = ("960x544", "544x960")
#: of SkyReels-V1, where the service does not tell; names, order and options from the n8n node
#: Skyreels1 of wiroai/n8n-nodes-wiroai 2.0.1, defaults from upstream's README
SKYREELS_ITEMS: tuple[Mapping[str, Any], ...] = (
    {"id": "inputImage", "type": "fileinput", "required": True},
    {"id": "prompt", "type": "textarea", "required": True},
    {"id": "negativePrompt", "type": "textarea"},
    {"id": "scale", "type": "range", "default": 6.0},
    {"id": "numFrames", "type": "number", "default": 97},
    {
        "id": "size",
        "type": "select",
        "required": True,
        "options": [{"value": size} for size in SIZES],
    },
    {"id": "steps", "type": "range", "default": 30},
)
MIN_FRAMES = 5
#: how PNG, JPEG, WebP and GIF files begin
_PICTURES = (b"\x89PNG", b"\xff\xd8", b"RIFF", b"GIF8")
_FILES = ("fileinput", "multifileinput", "combinefileinput")
_NUMBERS = ("range", "number", "float")
#: optional fields that every model takes
_COMMON = ("callbackUrl", "projectid")
MAX_ITEMS = 500
#: letters of a list of names or choices in a message
LISTED = 500


def items_of(record: Mapping[str, Any], model: Model | None = None) -> list[Mapping[str, Any]]:
    """List the parameters in a record of Tool/Detail, without their groups.

    Args:
        record: of the model.
        model: SkyReels-V1 has known ones if the record lists none.

    Returns:
        At most `MAX_ITEMS` items; those without an id of at most `MAX_WORD` characters are left
        out.
    """
    groups = record.get("parameters")
    items = [
        item
        for group in _as_list(groups)
        if isinstance(group, Mapping)
        for item in _as_list(group.get("items"))
        if isinstance(item, Mapping) and 0 < len(text_of(item.get("id"))) <= MAX_WORD
    ][:MAX_ITEMS]
    if not items and model is not None and model.clean == SKYREELS.clean:
        return list(SKYREELS_ITEMS)
    return items


def _as_list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def complete(
    items: Sequence[Mapping[str, Any]],
    values: Mapping[str, Any],
    files: Sequence[tuple[str, FilePart]] = (),
) -> dict[str, Any]:
    """Complete the parameters of a run: every key of the schema, numbers as numbers.

    Args:
        items: of `items_of`; with none, the values are returned as they are.
        values: by parameter; URLs of files as the parameter or as its "...Url".
        files: (parameter, part) of the files that are sent along.

    Returns:
        The parameters.

    Raises:
        ConfigError: an unknown parameter, a required one missing, an invalid number or choice.
    """
    if not items:
        return dict(values)
    types = {str(item["id"]): text_of(item.get("type")) for item in items}
    urls = {f"{name}Url": name for name, kind in types.items() if kind in _FILES[:2]}
    sent = {name for name, _ in files}
    for name in [*values, *sent]:
        if name not in types and name not in urls and name not in _COMMON:
            raise ConfigError(
                f"The model has no parameter {name!r}: it knows {listed(types)}. Nothing was sent."
            )
    whole: dict[str, Any] = {}
    for item in items:
        name, kind = str(item["id"]), types[str(item["id"])]
        if kind in _FILES:
            whole |= _file_values(name, kind, values, name in sent, is_required(item))
            continue
        value = values.get(name)
        if value is None or (value == "" and kind in _NUMBERS):
            value = item.get("default")
        if value is None or value == "":
            if is_required(item):
                options = listed(_options(item))
                fix = f"choose one of {options}" if options else "fill it in"
                raise ConfigError(f"The model wants {name}, which is empty: {fix}.")
            if kind not in _NUMBERS:
                whole[name] = ""
            continue
        whole[name] = _checked(item, name, kind, value)
    return whole | {name: values[name] for name in _COMMON if name in values}


def _file_values(
    name: str, kind: str, values: Mapping[str, Any], is_sent: bool, is_required: bool
) -> dict[str, Any]:
    """What stands in the fields of a file parameter beside the file itself."""
    url = values.get(f"{name}Url") or values.get(name) or ""
    if is_required and not url and not is_sent:
        raise ConfigError(f"The model wants a file for {name}: connect or name one.")
    if kind == "combinefileinput":
        return {name: [url] if isinstance(url, str) else list(url)} if url else {}
    return {f"{name}Url": url if isinstance(url, str) else ",".join(map(str, url))}


def _checked(item: Mapping[str, Any], name: str, kind: str, value: object) -> object:
    if kind in _NUMBERS:
        number = decimal_of(value)
        if number is None:
            raise ConfigError(f"{name} is {str(value)[:40]!r}, which is not a number: give one.")
        low, high = decimal_of(item.get("min")), decimal_of(item.get("max"))
        # schemas hold 0 for both where nothing was filled in
        if low is not None and high is not None and low < high and not low <= number <= high:
            raise ConfigError(f"{name} is {number}, and the model takes {low} to {high}.")
        return _plain(number, value)
    options = _options(item)
    if kind == "select" and options and str(value) not in options:
        raise ConfigError(f"{name} is {str(value)[:40]!r}: choose one of {listed(options)}.")
    return str(value) if kind == "select" else value


def is_required(item: Mapping[str, Any]) -> bool:
    """Whether a parameter must have a value."""
    return bool(bool_of(item.get("required")))


def _options(item: Mapping[str, Any]) -> list[str]:
    options = _as_list(item.get("options"))
    return [text_of(option.get("value")) for option in options if isinstance(option, Mapping)]


def is_file(item: Mapping[str, Any]) -> bool:
    """Whether a parameter takes files."""
    return text_of(item.get("type")) in _FILES


def takes_many(item: Mapping[str, Any]) -> bool:
    """Whether a parameter takes several files."""
    return text_of(item.get("type")) in _FILES[1:]


def parameters_of_example(example: object) -> Mapping[str, Any]:
    """The values in one of a model's examples: itself, or the object in its "parameters"."""
    if not isinstance(example, Mapping):
        return {}
    inner = example.get("parameters") or example.get("inputs")
    return inner if isinstance(inner, Mapping) else example


def listed(names: Iterable[str]) -> str:
    """Names or choices for a message, of bounded length."""
    text = one_line(", ".join(names))
    return text if len(text) <= LISTED else f"{text[:LISTED]}..."


def _plain(number: Decimal, value: object) -> int | float:
    if isinstance(value, float):
        return value
    return int(number) if number == number.to_integral_value() else float(number)


def check_skyreels(
    values: Mapping[str, Any], files: Sequence[tuple[str, FilePart]] = ()
) -> dict[str, Any]:
    """Round the frame count of SkyReels-V1 up to one that it can make, and check its files.

    Returns:
        The values.

    Raises:
        ConfigError: too few frames, or a file that is not a picture.
    """
    for name, (_, content, _) in files:
        if not content.startswith(_PICTURES) and content[4:8] != b"ftyp":
            raise ConfigError(
                f"The file for {name} is not a picture: use a PNG, JPEG, WebP, GIF or HEIC file."
            )
    frames = decimal_of(values.get("numFrames"))
    if frames is None:  # not given, or not a number, which `complete` refuses
        return dict(values)
    return {**values, "numFrames": frame_count(int(frames))}


def frame_count(num_frames: int) -> int:
    """Round a frame count up to one that the video VAE can make: 4k + 1, at least 5.

    Returns:
        The count.

    Raises:
        ConfigError: fewer than 5.
    """
    if num_frames < MIN_FRAMES:
        raise ConfigError(
            f"The number of frames is {num_frames}: the least is {MIN_FRAMES}, and counts are "
            "4k + 1, as 97."
        )
    return num_frames + (1 - num_frames) % 4
