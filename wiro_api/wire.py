"""Values as the service sends them: JSON, text, numbers, money. No I/O here.

The wire is loosely typed: numbers come as strings, lists as text, keys are missing. The `..._of`
functions convert one value each and never raise; what they cannot read becomes "", None or empty.

Nor is it trusted. `read_json` is the one place where bytes become objects, for answers, for frames
of the socket and for JSON inside strings: its result can be encoded, holds no character that
controls a terminal, and is bounded in depth and number.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

#: digits
MAX_NUMBER = 30
#: characters of a log that are kept, from its end
MAX_LOG = 256 * 1024
_LOG_FIELDS = ("debugoutput", "debugerror")
#: objects and lists in one answer (an empty one takes 20 times its text), and their depth
MAX_GROUPS, MAX_DEPTH = 200_000, 32
#: characters of a word (a name, a status), of a URL and of a key in an object
MAX_WORD, MAX_URL, MAX_KEY = 100, 8192, 200

#: C0 without tab and newline, DEL, C1, and unpaired surrogates
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
#: bidirectional controls, which make text read as something else
_DIRECTION = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_TOKEN = re.compile(r"[!-~]{1,512}")
_SECRET = re.compile(
    r"""((?:\\?["'])?(?:x-api-key|x-nonce|x-signature|socketaccesstoken|tasktoken|accesskey)"""
    r"""(?:\\?["'])?\s*[:=]\s*(?:\\?["'])?)[^\s"',}&\\]+""",
    re.IGNORECASE,
)


# --- JSON ---------------------------------------------------------------------------------------


def read_json(data: bytes | str) -> object:
    """Parse and clean a JSON text of the service.

    Invalid UTF-8 and bare control characters are replaced. NaN, infinities, numbers of more than
    `MAX_NUMBER` digits and anything nested deeper than `MAX_DEPTH` become None. Of a task's logs
    the last `MAX_LOG` characters are kept.

    Returns:
        The value.

    Raises:
        ValueError: not JSON, or more than `MAX_GROUPS` objects and lists.
    """
    text = data if isinstance(data, str) else data.decode("utf-8", "replace")
    if text.count("{") + text.count("[") > MAX_GROUPS:
        raise ValueError("too many values")
    try:
        value = json.loads(
            text.removeprefix("\ufeff"),
            parse_int=_int_or_none,
            parse_float=_float_or_none,
            parse_constant=lambda _: None,
            strict=False,
        )
    except RecursionError:
        raise ValueError("too deep") from None
    return _clean(value, 0)


def _int_or_none(text: str) -> int | None:
    return int(text) if len(text) <= MAX_NUMBER else None


def _float_or_none(text: str) -> float | None:
    number = float(text) if len(text) <= 2 * MAX_NUMBER else math.inf
    return number if math.isfinite(number) else None


def _clean(value: Any, depth: int) -> Any:
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, dict | list) and depth == MAX_DEPTH:
        return None
    if isinstance(value, list):
        return [_clean(item, depth + 1) for item in value]
    if isinstance(value, dict):
        return {
            clean_text(key[:MAX_KEY]): _clean(
                item[-MAX_LOG:] if key in _LOG_FIELDS and isinstance(item, str) else item, depth + 1
            )
            for key, item in value.items()
        }
    return value


def clean_text(text: str) -> str:
    """Make a text safe to encode and to print on a terminal.

    Control characters and unpaired surrogates become U+FFFD, so that what stood on both sides of
    one does not join; a carriage return becomes a newline; bidirectional controls are dropped.

    Returns:
        The text.
    """
    if text.isascii() and text.isprintable():
        return text
    text = _DIRECTION.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    return _CONTROL.sub("\ufffd", text)


def one_line(text: str) -> str:
    """Collapse line ends and runs of blanks to single blanks."""
    return " ".join(text.split())


def redact(text: str, secrets: Sequence[str] = ()) -> str:
    """Replace keys, signatures and tokens in a text of the service by "...".

    Args:
        text: any text.
        secrets: known values to hide, besides those that the text itself names as secret.

    Returns:
        The text without them.
    """
    for secret in secrets:
        if len(secret) >= 4:  # a shorter one would hide words
            text = text.replace(secret, "...")
    return _SECRET.sub(r"\1...", text)


# --- values -------------------------------------------------------------------------------------


def text_of(value: object) -> str:
    """A scalar as text; None, booleans, objects and lists as ""."""
    if isinstance(value, bool) or value is None or isinstance(value, Mapping | list):
        return ""
    return str(value)


def word_of(value: object) -> str:
    """A scalar as one line of at most `MAX_WORD` characters."""
    return one_line(text_of(value)[: 10 * MAX_WORD])[:MAX_WORD]


def id_of(value: object) -> str:
    """The id of a task or a file: letters, digits, "_" and "-"; "" for anything else."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = text_of(value).strip()
    return text if _ID.fullmatch(text) else ""


def token_of(value: object) -> str:
    """A task token, or "" for what cannot be one."""
    text = text_of(value).strip()
    return text if _TOKEN.fullmatch(text) else ""


def int_of(value: object) -> int | None:
    """A whole number, or None."""
    number = decimal_of(value)
    return None if number is None else int(number)


def decimal_of(value: object) -> Decimal | None:
    """A finite number, or None; money is never a float on its way here."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    # converting a number of a million digits would keep the processor busy
    if isinstance(value, int) and value.bit_length() > 4 * MAX_NUMBER:
        return None
    text = str(value).strip()
    try:
        number = Decimal(text if len(text) <= 2 * MAX_NUMBER else "NaN")
    except InvalidOperation:
        return None
    return number if number.is_finite() and abs(number.adjusted()) <= MAX_NUMBER else None


def amount_of(value: object) -> Decimal | None:
    """Seconds or US dollars, or None; a negative amount would lower what was spent."""
    number = decimal_of(value)
    return number if number is not None and number >= 0 else None


def time_of(value: object) -> int | None:
    """Unix seconds, or None; 0 and "" mean that it has not happened."""
    return int_of(value) or None


def bool_of(value: object) -> bool | None:
    """The service's spellings of true and false, or None."""
    if isinstance(value, bool):
        return value
    return {"1": True, "true": True, "0": False, "false": False}.get(str(value).strip().lower())


def list_of(value: object) -> list[Any]:
    """A list, also from JSON text; [] for anything else."""
    if isinstance(value, str):
        value = _json_or_none(value)
    return value if isinstance(value, list) else []


def mapping_of(value: object) -> Mapping[str, Any]:
    """An object, also from JSON text; {} for anything else."""
    if isinstance(value, str):
        value = _json_or_none(value)
    return value if isinstance(value, Mapping) else {}


def _json_or_none(text: str) -> object:
    try:
        return read_json(text) if text.lstrip()[:1] in ("{", "[") else None
    except ValueError:
        return None


def same_value(one: object, other: object) -> bool:
    """Whether two parameter values are equal as text or as numbers; one of them may be cleaned."""
    first_text, second_text = (clean_text(str(value)).strip().lower() for value in (one, other))
    if first_text == second_text:
        return True
    first, second = decimal_of(one), decimal_of(other)
    return first is not None and first == second


# --- money --------------------------------------------------------------------------------------


def dollars(amount: Decimal | None) -> str | None:
    """An amount in US dollars without trailing zeros: "0.00351"; None for None."""
    return None if amount is None else f"{amount.normalize():f}"


def money(amount: Decimal) -> str:
    """An amount for people: "$0.30", "$0.00351"."""
    text = dollars(amount) or "0"
    whole, _, cents = text.partition(".")
    return f"${whole}.{cents:0<2}"
