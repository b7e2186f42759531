"""What a run would cost, before it is queued: for the badge of a node and for the model dialog.

Wiro is asked for what it says of the model, at most every ten minutes, and not at all without a
key. No file is written and nothing is changed.
"""

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from . import account
from .models import checked_text
from .run import check_fields, model_record
from .widgets import ORIENTATION, parse_parameters, size_at_wiro, skyreels_parameters

if TYPE_CHECKING:
    from ...wiro_api.handles import Model
    from ...wiro_api.transport import FilePart

#: the node that starts a run for each picture, and the one that runs on this machine too
_BATCH_NODE, _EITHER_NODE = "WiroSubmit", "SkyReelsI2V"
#: widgets of the nodes for SkyReels-V1 that a price may depend on
_PRICED_WIDGETS = {"prompt", "size", "width", "height", "num_frames", "steps", "cfg"}
#: stands for a file of which only the presence counts
_ANY_FILE = ("", b"", "")
_BAD_FIELD = "A field of the node has a value of the wrong type: reload the page."


def _price_sources(model: "Model") -> tuple[Mapping[str, Any], Sequence[Decimal]]:
    """What a price is made of: Wiro's record of a model, and what its earlier runs cost."""
    earlier = account.journal().costs(str(model)) if account.has_state() else ()
    with account.make_client() as client:
        return model_record(client, model), earlier


def node_price(body: dict[str, Any]) -> dict[str, Any]:
    """What a node would cost as its widgets are.

    Args:
        body: node: its class. values: its widgets by name. linked: names of its linked inputs,
            whose values are not known yet.

    Returns:
        has_key; price: of one run, in US dollars, or None; is_exact; is_each: whether the node
        starts several runs; is_free: whether it runs on this machine for certain, so that nothing
        else is told; is_most: whether it may; problem: why there is no price, or "".
    """
    from ...wiro_api.errors import ConfigError, WiroError
    from ...wiro_api.jobs import Job, quote
    from ...wiro_api.signing import load_credentials
    from ...wiro_api.wire import dollars

    answer: dict[str, Any] = {
        "has_key": True,
        "price": None,
        "is_exact": False,
        "problem": "",
        "is_each": body.get("node") == _BATCH_NODE,
        "is_free": False,
        "is_most": False,
    }
    try:
        given, linked = _fields(body)
    except ConfigError as error:
        return {**answer, "problem": str(error)}
    runs_here = _runs_here(body["node"], given)
    if runs_here:
        return {**answer, "is_free": True}
    answer["is_most"] = runs_here is None
    try:
        load_credentials(file=account.credentials_file())
    except ConfigError:
        return {**answer, "has_key": False}
    try:
        model, values, files, is_known = _draft(body["node"], given, linked)
        check_fields([values, dict(files)])
        record, earlier = _price_sources(model)
        price = quote(record, Job(model, values, files), earlier, is_draft=True).price
    except (WiroError, ValueError) as error:
        return {**answer, "problem": str(error)}
    if price is None:
        return answer
    return {**answer, "price": dollars(price.amount), "is_exact": price.is_exact and is_known}


def _fields(body: Mapping[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    """What a request says of a node.

    Returns:
        Widgets whose values are known, and names of linked inputs.

    Raises:
        ConfigError: the request is of the wrong form.
    """
    from ...wiro_api.errors import ConfigError

    node, values, linked = (body.get(name) for name in ("node", "values", "linked"))
    if isinstance(node, str) and isinstance(values, dict) and isinstance(linked, list):
        return {name: value for name, value in values.items() if name not in linked}, linked
    raise ConfigError("The request lacks node, values or linked: reload the page.")


def _runs_here(node: str, given: Mapping[str, Any]) -> bool | None:
    """Whether a node runs on this machine as its widgets are; None if that is not known yet."""
    if node != _EITHER_NODE or given.get("backend") == "remote":
        return False
    is_auto = given.get("backend") == "auto"
    is_refused = is_auto and given.get("allow_paid_remote") is False
    return True if is_refused or given.get("backend") == "local" else None


def _draft(
    node: str, given: dict[str, Any], linked: list[Any]
) -> "tuple[Model, dict[str, Any], list[tuple[str, FilePart]], bool]":
    """A node's run as far as it is known.

    Returns:
        Model, parameters, files, and whether all that the price depends on is known.

    Raises:
        ConfigError: a widget is of the wrong type or value, or the model is linked.
        ValueError: the parameters are not a JSON object.
    """
    from ...wiro_api.errors import ConfigError
    from ...wiro_api.handles import Model
    from ...wiro_api.schema import SIZES, SKYREELS

    if node in ("WiroRemoteI2V", _BATCH_NODE, _EITHER_NODE):
        if node == _EITHER_NODE and {"width", "height"}.isdisjoint(linked):
            given["size"] = size_at_wiro(given.get("width", 0), given.get("height", 0))
        elif node == _EITHER_NODE or given.get("size") == ORIENTATION:
            given["size"] = SIZES[0]  # as many pixels as the other
            linked = [*linked, "size"]
        frames = given.get("num_frames", 97)
        if not isinstance(frames, int) or not isinstance(given.get("prompt", ""), str):
            raise ConfigError(_BAD_FIELD)
        is_known = node != _BATCH_NODE and _PRICED_WIDGETS.isdisjoint(linked)
        return SKYREELS, skyreels_parameters(**given), [("inputImage", _ANY_FILE)], is_known
    if not isinstance(given.get("model"), str):
        raise ConfigError("The model comes through a link, so its price is not known yet.")
    text, name = given.get("parameters", ""), given.get("image_parameter", "inputImage")
    if not isinstance(text, str) or not isinstance(name, str):
        raise ConfigError(_BAD_FIELD)
    sockets = [name for name in linked if re.fullmatch(r"(image|video|audio)(_\d+)?", str(name))]
    files = [(name.strip(), _ANY_FILE) for _ in sockets]
    is_known = {"parameters", "image_parameter"}.isdisjoint(linked)
    return Model.parse(given["model"]), parse_parameters(text), files, is_known


def form_price(body: Mapping[str, Any]) -> dict[str, Any]:
    """The price of a run with the values of the model dialog, and what would prevent the run.

    Args:
        body: slug; parameters: of the node; files: how many are connected.

    Returns:
        price: "" if unknown; source: where it is from; limits; problem: "" or a sentence.

    Raises:
        ConfigError: the request is of the wrong form.
    """
    from ...wiro_api.errors import ConfigError
    from ...wiro_api.handles import Model
    from ...wiro_api.schema import complete, is_file, items_of
    from ...wiro_api.spending import DEFAULT_LIMITS, load_limits, price_of

    values, num_files = body.get("parameters"), body.get("files")
    is_count = isinstance(num_files, int) and 0 <= num_files <= 1000
    if not isinstance(values, dict) or not is_count:
        raise ConfigError("The request lacks parameters or the number of files: reload the page.")
    model = Model.parse(checked_text(body.get("slug"), "slug"))
    record, earlier = _price_sources(model)
    items = items_of(record, model)
    problem = ""
    try:
        # which parameter gets which file is decided when the graph runs
        files = [(str(item["id"]), _ANY_FILE) for item in items if is_file(item) and num_files]
        parameters = complete(items, values, files)
    except ConfigError as error:  # not filled in yet: price what is given, and the defaults
        problem = str(error).replace(" Nothing was sent.", "")
        defaults = {str(item["id"]): item.get("default") for item in items}
        given = {name: value for name, value in values.items() if value not in (None, "")}
        parameters = {n: v for n, v in {**defaults, **given}.items() if v is not None}
    listed = price_of(record, parameters, num_files)
    price = listed or price_of(record, parameters, num_files, earlier)
    source = "Wiro does not publish it before the run."
    if listed is not None:
        is_average = not record.get("dynamicprice")
        source = "Wiro's average for this model." if is_average else "Wiro's price list."
    elif price is not None:
        source = "The most an earlier run of yours cost; Wiro publishes no price before the run."
    limits = load_limits(account.limits_file()) if account.has_state() else DEFAULT_LIMITS
    return {
        "price": "" if price is None else str(price),
        "source": source,
        "limits": str(limits),
        "problem": problem,
    }
