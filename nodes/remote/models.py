"""Wiro's model catalogue for the page: search, and one model's parameters and examples.

Free, and changes nothing. But Wiro is asked with the user's key, so only ComfyUI's own page may ask
(guard.py), and answers are cached for ten minutes. A model's record is untrusted text: only known
fields are passed on, each of bounded length, and only https addresses of wiro.ai.
"""

import math
import threading
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, urlsplit

from . import account
from .inputs import Slot, slots_of
from .run import RECORD_S, model_record

Answer = dict[str, Any]

#: models of one search, and cached searches
MAX_MODELS, MAX_SEARCHES = 50, 50
#: characters of a name, of a help text, of a value, of a request
NAME_LENGTH, HELP_LENGTH, VALUE_LENGTH, REQUEST_LENGTH = 120, 1000, 4000, 200
#: options and examples of one model
MAX_OPTIONS, MAX_EXAMPLES = 2000, 12
#: fields of a record that hold examples
_EXAMPLE_FIELDS = ("samples", "inspire")

_searches: dict[tuple[str, str, str], tuple[float, list[Answer]]] = {}
"""(service, account, text) -> time of the answer, models."""
_lock = threading.Lock()


def search(text: str) -> Answer:
    """Search the catalogue; without text, what Wiro lists first.

    Returns:
        {"models": [{slug, title, about, image, price}]}
    """
    text = checked_text(text, "search")
    with account.make_client() as client:
        key = (client.base_url, client.account, text.lower())
        with _lock:
            read_at, found = _searches.get(key, (-RECORD_S, []))
        if time.monotonic() - read_at < RECORD_S:
            return {"models": found}
        records = client.list_models(text, limit=MAX_MODELS)
    shown = [_describe_short(record) for record in records[:MAX_MODELS]]
    found = [model for model in shown if model["slug"]]
    with _lock:
        _searches.pop(key, None)
        _searches[key] = (time.monotonic(), found)
        if len(_searches) > MAX_SEARCHES:
            del _searches[next(iter(_searches))]
    return {"models": found}


def describe(slug: str) -> Answer:
    """A model with its parameters and examples.

    Returns:
        {slug, title, about, image, price, page, groups: [{title, items}], examples}; items are
        those of `_describe_item`, an example is {name: value}.
    """
    from ...wiro_api.handles import Model
    from ...wiro_api.schema import items_of

    model = Model.parse(checked_text(slug, "slug"))
    with account.make_client() as client:
        record = model_record(client, model)
    items = items_of(record, model)
    slots = {slot.name: slot for slot in slots_of(items)}
    budget = [MAX_OPTIONS]
    titles = _titles(record)
    groups: dict[str, list[Answer]] = {}
    for item in items:
        described = _describe_item(item, slots, budget)
        groups.setdefault(titles.get(id(item), ""), []).append(described)
    owner, project = (quote(part, safe="") for part in (model.clean.owner, model.clean.project))
    return {
        **_describe_short(record),
        "slug": str(model),
        "page": f"https://wiro.ai/models/{owner}/{project}",
        "groups": [{"title": title, "items": group} for title, group in groups.items()],
        "examples": _examples(record, {str(item["id"]) for item in items}),
    }


def checked_text(value: object, name: str) -> str:
    """A request's text in one line.

    Args:
        value: of the request.
        name: of its field, for the message.

    Returns:
        The text, without control characters.

    Raises:
        ConfigError: not a text, or too long.
    """
    from ...wiro_api.errors import ConfigError
    from ...wiro_api.wire import clean_text, one_line

    if not isinstance(value, str) or len(value) > REQUEST_LENGTH:
        raise ConfigError(f"{name} must be a text of at most {REQUEST_LENGTH} characters.")
    line: str = one_line(clean_text(value))
    return line


# --- from a record to the page -------------------------------------------------------------------


def _describe_short(record: Mapping[str, Any]) -> Answer:
    from ...wiro_api.candidates import clean_slug
    from ...wiro_api.spending import price_of

    owner = _line(record.get("cleanslugowner") or record.get("slugowner"))
    project = _line(record.get("cleanslugproject") or record.get("slugproject"))
    slug = f"{owner}/{project}"
    price = price_of(record, {})
    return {
        "slug": slug if clean_slug(slug) else "",
        "title": _line(record.get("title")) or project,
        "about": _text(record.get("description")),
        "image": _picture(record.get("image")),
        "price": "" if price is None else str(price),
    }


def _titles(record: Mapping[str, Any]) -> dict[int, str]:
    """id() of each item of a record -> title of its group."""
    groups = record.get("parameters")
    found: dict[int, str] = {}
    for group in groups if isinstance(groups, list) else []:
        items = group.get("items") if isinstance(group, Mapping) else None
        if isinstance(items, list):
            title = _line(group.get("title"))
            found.update((id(item), title) for item in items)
    return found


def _describe_item(item: Mapping[str, Any], slots: Mapping[str, Slot], budget: list[int]) -> Answer:
    """A parameter for the form; `budget` counts down the options that may still be shown."""
    from ...wiro_api.schema import is_required
    from ...wiro_api.wire import bool_of, decimal_of

    name = str(item["id"])
    options = item.get("options")
    shown = []
    for option in options if isinstance(options, list) else []:
        value = _value(option.get("value")) if isinstance(option, Mapping) else None
        if value is None or len(str(value)) > HELP_LENGTH or not budget[0]:
            continue
        budget[0] -= 1
        shown.append({"value": str(value), "label": _line(option.get("label")) or str(value)})
    low, high, step = (_number(decimal_of(item.get(key))) for key in ("min", "max", "step"))
    has_range = low is not None and high is not None and low < high
    slot = slots.get(name)
    return {
        "id": name,
        "type": _line(item.get("type")),
        "label": _line(item.get("label")) or name,
        "help": " ".join(filter(None, (_text(item.get(k)) for k in ("note", "description"))))[
            :HELP_LENGTH
        ],
        "placeholder": _line(item.get("placeholder")),
        "is_required": is_required(item),
        "is_advanced": bool(bool_of(item.get("advanced"))),
        "default": _value(item.get("default")),
        "options": shown,
        "min": low if has_range else None,
        "max": high if has_range else None,
        "step": step if step and step > 0 else None,
        "files": None if slot is None else {"kind": slot.kind, "takes_many": slot.takes_many},
    }


def _examples(record: Mapping[str, Any], names: set[str]) -> list[Answer]:
    """A record's examples, with the model's own parameters only."""
    from ...wiro_api.schema import parameters_of_example

    found: list[Answer] = []
    for field in _EXAMPLE_FIELDS:
        listed = record.get(field)
        for example in listed[:MAX_EXAMPLES] if isinstance(listed, list) else []:
            values = {
                str(name): plain
                for name, value in parameters_of_example(example).items()
                if str(name) in names or str(name).removesuffix("Url") in names
                if (plain := _value(value)) not in (None, "")
            }
            if values and values not in found:
                found.append(values)
    return found[:MAX_EXAMPLES]


def _line(value: object) -> str:
    from ...wiro_api.wire import one_line, text_of

    line: str = one_line(text_of(value)[: 10 * NAME_LENGTH])
    return line[:NAME_LENGTH]


def _text(value: object) -> str:
    from ...wiro_api.wire import text_of

    text: str = text_of(value)
    return text[:HELP_LENGTH].strip()


def _value(value: object) -> str | int | float | bool | list[str] | None:
    """A default or an example's value; None if the form cannot show it unchanged."""
    if isinstance(value, list) and 0 < len(value) <= 20:
        texts = [text for text in value if isinstance(text, str) and len(text) <= VALUE_LENGTH]
        return texts if len(texts) == len(value) else None
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        # JavaScript's largest safe integer
        return value if math.isfinite(value) and abs(value) < 2**53 else None
    return value if isinstance(value, str) and len(value) <= VALUE_LENGTH else None


def _number(value: Any) -> int | float | None:
    if value is None or abs(value) >= 2**53:
        return None
    return int(value) if value == value.to_integral_value() else float(value)


def _picture(value: object) -> str:
    """A picture's address, if it is a plain https address of wiro.ai; else ""."""
    if not isinstance(value, str) or len(value) > HELP_LENGTH or not value.isascii():
        return ""
    try:
        parts = urlsplit(value)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return ""
    is_own = host == "wiro.ai" or host.endswith(".wiro.ai")
    is_plain = parts.username is None and parts.password is None and port in (None, 443)
    return value if parts.scheme == "https" and is_own and is_plain and value.isprintable() else ""
