"""What the page asks about models: which there are, what they take, what a run would cost.

Everything here is free and changes nothing. But it asks the service with the user's key, so only
ComfyUI's own page may ask (guard.py), and for ten minutes the same question gets the same answer.
What a model says of itself is a stranger's text: only known fields are handed on, each of bounded
length, and no address but https ones of wiro.ai.
"""

import math
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from . import account, guard
from .inputs import slots_of
from .run import RECORD_S, model_record

if TYPE_CHECKING:
    from aiohttp import web

Answer = dict[str, Any]
Handler = Callable[["web.Request"], Awaitable["web.Response"]]

PREFIX = "/skyreels/wiro/models"
#: models of one search, searches that are remembered
FOUND, KEPT_SEARCHES = 50, 50
#: letters of a name, a help text, a value; options of one model, examples, characters of a request
NAME, HELP, VALUE, OPTIONS, EXAMPLES, ASKED = 120, 1000, 4000, 2000, 12, 200
#: fields of a model under which it keeps examples
_EXAMPLES = ("samples", "inspire")

_searches: dict[tuple[str, str, str], tuple[float, list[Answer]]] = {}
_lock = threading.Lock()


# --- what they do; blocking, called in a thread -------------------------------------------------


def search(text: str) -> Answer:
    """Models that fit a few words; those that the service finds best, without any.

    Returns:
        {"models": [{slug, title, about, image, price}]}
    """
    text = _checked(text, "search")
    with account.make_client() as client:
        key = (client.base_url, client.account, text.lower())
        with _lock:
            read_at, found = _searches.get(key, (-RECORD_S, []))
        if time.monotonic() - read_at < RECORD_S:
            return {"models": found}
        records = client.list_models(text, limit=FOUND)
    shown = [_describe_short(record) for record in records[:FOUND]]
    found = [model for model in shown if model["slug"]]
    with _lock:
        _searches.pop(key, None)
        _searches[key] = (time.monotonic(), found)
        if len(_searches) > KEPT_SEARCHES:
            del _searches[next(iter(_searches))]
    return {"models": found}


def describe(slug: str) -> Answer:
    """A model with its parameters and examples.

    Returns:
        {slug, title, about, image, price, page, readme, groups: [{title, items}], examples}, as
        `_describe_item` makes items; an example is {name: value}.
    """
    from ...wiro_api.client import Model
    from ...wiro_api.schema import items_of

    model = Model.parse(_checked(slug, "slug"))
    with account.make_client() as client:
        record = model_record(client, model)
    items = items_of(record, model)
    kinds = {slot.name: slot for slot in slots_of(items)}
    budget = [OPTIONS]
    titles = _titles(record)
    groups: dict[str, list[Answer]] = {}
    for item in items:
        described = _describe_item(item, kinds, budget)
        groups.setdefault(titles.get(id(item), ""), []).append(described)
    owner, project = (quote(part, safe="") for part in (model.clean.owner, model.clean.project))
    return {
        **_describe_short(record),
        "slug": str(model),
        "page": f"https://wiro.ai/models/{owner}/{project}",
        "groups": [{"title": title, "items": group} for title, group in groups.items()],
        "examples": _examples(record, {str(item["id"]) for item in items}),
    }


def price(body: Mapping[str, Any]) -> Answer:
    """The price of a run with some values, and what would keep it from being sent.

    Args:
        body: {slug, parameters: of the node, files: how many are connected}
    Returns:
        {"price": "" if nothing tells it, "source", "limits", "problem": "" or a sentence}
    """
    from ...wiro_api.client import Model
    from ...wiro_api.errors import ConfigError
    from ...wiro_api.schema import complete, is_file, items_of
    from ...wiro_api.spending import DEFAULT_LIMITS, load_limits, price_of

    values, files = body.get("parameters"), body.get("files")
    if not isinstance(values, dict) or not isinstance(files, int) or not 0 <= files <= 1000:
        raise ConfigError(
            "The request holds no parameters, or no number of files: reload the page."
        )
    model = Model.parse(_checked(body.get("slug"), "slug"))
    with account.make_client() as client:
        record = model_record(client, model)
    items = items_of(record, model)
    problem = ""
    try:
        # which file goes where is known when the graph runs
        parts = [(str(i["id"]), ("", b"", "")) for i in items if is_file(i) and files]
        parameters = complete(items, values, parts)
    except ConfigError as error:  # not filled in yet: what is there, and the defaults
        problem = str(error).replace(" Nothing was sent.", "")
        defaults = {str(item["id"]): item.get("default") for item in items}
        given = {name: value for name, value in values.items() if value not in (None, "")}
        parameters = {n: v for n, v in {**defaults, **given}.items() if v is not None}
    listed = price_of(record, parameters, files)
    earlier = account.journal().costs(str(model)) if account.has_state() else ()
    told = listed or price_of(record, parameters, files, earlier)
    source = "Wiro does not tell it before the run."
    if listed is not None:
        is_average = not record.get("dynamicprice")
        source = "Wiro's average for this model." if is_average else "Wiro's price list."
    elif told is not None:
        source = "The most that a run of it did cost you; Wiro tells nothing before the run."
    limits = load_limits(account.limits_file()) if account.has_state() else DEFAULT_LIMITS
    return {
        "price": "" if told is None else str(told), "source": source, "limits": str(limits),
        "problem": problem,
    }  # fmt: skip


def _checked(value: object, name: str) -> str:
    from ...wiro_api.errors import ConfigError
    from ...wiro_api.wire import clean_text, one_line

    if not isinstance(value, str) or len(value) > ASKED:
        raise ConfigError(f"{name} is no text of at most {ASKED} characters.")
    return one_line(clean_text(value))


# --- a record for the page ----------------------------------------------------------------------


def _describe_short(record: Mapping[str, Any]) -> Answer:
    from ...wiro_api.candidates import clean_slug
    from ...wiro_api.spending import price_of

    owner = _line(record.get("cleanslugowner") or record.get("slugowner"))
    project = _line(record.get("cleanslugproject") or record.get("slugproject"))
    slug = f"{owner}/{project}"
    told = price_of(record, {})
    return {
        "slug": slug if clean_slug(slug) else "",
        "title": _line(record.get("title")) or project,
        "about": _text(record.get("description")),
        "image": _picture(record.get("image")),
        "price": "" if told is None else str(told),
    }


def _titles(record: Mapping[str, Any]) -> dict[int, str]:
    """id() of each item of a record -> the title of its group."""
    groups = record.get("parameters")
    found: dict[int, str] = {}
    for group in groups if isinstance(groups, list) else []:
        items = group.get("items") if isinstance(group, Mapping) else None
        if isinstance(items, list):
            title = _line(group.get("title"))
            found.update((id(item), title) for item in items)
    return found


def _describe_item(item: Mapping[str, Any], kinds: Mapping[str, Any], budget: list[int]) -> Answer:
    """A parameter: what the form needs to show it. budget: options that may still be shown."""
    from ...wiro_api.schema import is_required
    from ...wiro_api.wire import bool_of, decimal_of

    name = str(item["id"])
    options = item.get("options")
    shown = []
    for option in options if isinstance(options, list) else []:
        value = _value(option.get("value")) if isinstance(option, Mapping) else None
        if value is None or len(str(value)) > HELP or not budget[0]:
            continue
        budget[0] -= 1
        shown.append({"value": str(value), "label": _line(option.get("label")) or str(value)})
    low, high, step = (_number(decimal_of(item.get(key))) for key in ("min", "max", "step"))
    has_range = low is not None and high is not None and low < high
    slot = kinds.get(name)
    return {
        "id": name,
        "type": _line(item.get("type")),
        "label": _line(item.get("label")) or name,
        "help": " ".join(filter(None, (_text(item.get(k)) for k in ("note", "description"))))[
            :HELP
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
    """Examples with the parameters that the model has, and nothing else."""
    from ...wiro_api.schema import parameters_of_example

    found: list[Answer] = []
    for field in _EXAMPLES:
        listed = record.get(field)
        for example in listed[:EXAMPLES] if isinstance(listed, list) else []:
            values = {
                str(name): plain
                for name, value in parameters_of_example(example).items()
                if str(name) in names or str(name).removesuffix("Url") in names
                if (plain := _value(value)) not in (None, "")
            }
            if values and values not in found:
                found.append(values)
    return found[:EXAMPLES]


def _line(value: object) -> str:
    from ...wiro_api.wire import one_line, text_of

    return one_line(text_of(value)[: 10 * NAME])[:NAME]


def _text(value: object) -> str:
    from ...wiro_api.wire import text_of

    return text_of(value)[:HELP].strip()


def _value(value: object) -> str | int | float | bool | list[str] | None:
    """A default or a value of an example; None for what the form cannot show as it is."""
    if isinstance(value, list) and 0 < len(value) <= 20:
        texts = [text for text in value if isinstance(text, str) and len(text) <= VALUE]
        return texts if len(texts) == len(value) else None
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        # a page's numbers hold no more
        return value if math.isfinite(value) and abs(value) < 2**53 else None
    return value if isinstance(value, str) and len(value) <= VALUE else None


def _number(value: Any) -> int | float | None:
    if value is None or abs(value) >= 2**53:
        return None
    return int(value) if value == value.to_integral_value() else float(value)


def _picture(value: object) -> str:
    """An address that the page may show: https, of the service itself, without anything odd."""
    if not isinstance(value, str) or len(value) > HELP or not value.isascii():
        return ""
    try:
        parts = urlsplit(value)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return ""
    is_own = host == "wiro.ai" or host.endswith(".wiro.ai")
    is_plain = parts.username is None and parts.password is None and port in (None, 443)
    return value if parts.scheme == "https" and is_own and is_plain and value.isprintable() else ""


# --- over HTTP ----------------------------------------------------------------------------------


def register(
    table: Any,
    answer: "Callable[[Callable[[], Answer]], Awaitable[web.Response]]",
    post: "Callable[[Callable[[Answer], Answer]], Handler]",
) -> None:
    """Add the routes to the server's table.

    Values go in a body, not in an address, which proxies write down: they hold the user's prompt.

    Args:
        answer, post: of routes.py: the result or the sentence of work, and a judged sender's body.
    """

    async def ask(request: "web.Request", name: str, work: Callable[[str], Answer]) -> Any:
        def judged() -> Answer:
            guard.check_reader(request.headers.items())
            return work(request.query.get(name, ""))

        return await answer(judged)

    @table.get(PREFIX)
    async def get_models(request: "web.Request") -> "web.Response":
        return await ask(request, "search", search)

    @table.get(f"{PREFIX}/one")
    async def get_model(request: "web.Request") -> "web.Response":
        return await ask(request, "slug", describe)

    table.post(f"{PREFIX}/price")(post(price))
