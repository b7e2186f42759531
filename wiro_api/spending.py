"""What a run will cost, as far as the service publishes it, and what may be spent.

Tool/Detail lists prices by input values and method. What can be computed before a run: per request,
per output, per pixel, per character of the prompt, per second of video, and per second of computing
by the service's own average. What cannot (tokens, audio length, what a model reports itself) has no
price here. Source of the methods: pricing.md of wiroai/Wiro-Docs, 2026-04-17.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import ROUND_CEILING, Decimal
from pathlib import Path
from typing import Any

from .errors import ConfigError, LimitError
from .parts import write_whole
from .wire import decimal_of, dollars, money, same_value, text_of

#: frames per second of the videos of models that are asked for a number of frames
FPS = 24
#: pixels of one price step of "cp-pixel"
TIER_PIXELS = 1024 * 1024
#: fields of Limits that hold an amount
LIMIT_NAMES = ("per_run", "per_day", "per_month")
#: the model of the node that has no field for a model: no workflow puts another in its place
FIXED_MODEL = "wiro/skyreels-v1"
HOW_TO_LIMIT = "Settings > SkyReels > Wiro or with python -m wiro_api limits --per-run USD"
_COUNTS = ("samples", "numoutputs", "num_outputs", "numimages", "num_images", "outputcount")
_SECONDS = ("duration", "videoduration", "seconds")


@dataclass(frozen=True)
class Price:
    """The price of one run.

    Attributes:
        amount: US dollars.
        is_exact: as listed; otherwise it rests on an average or an assumption.
    """

    amount: Decimal
    is_exact: bool

    def __str__(self) -> str:
        return f"{'' if self.is_exact else 'about '}{money(self.amount)}"


@dataclass(frozen=True)
class Limits:
    """Spending limits in US dollars; None is no limit. Days and months are of the local calendar.

    Attributes:
        per_run: of one run.
        per_day: of one day.
        per_month: of one month.
        is_default: nobody has set any yet, which differs from a user's choice of none.
    """

    per_run: Decimal | None = None
    per_day: Decimal | None = None
    per_month: Decimal | None = None
    is_default: bool = field(default=False, compare=False, kw_only=True)

    @property
    def is_set(self) -> bool:
        """Whether there is any."""
        return self != Limits()

    def __str__(self) -> str:
        amounts = [
            f"{money(amount)} a {name.removeprefix('per_')}"
            for name in LIMIT_NAMES
            if (amount := getattr(self, name)) is not None
        ]
        if not amounts:
            return "no limit"
        origin = f" (default; change it in {HOW_TO_LIMIT})" if self.is_default else ""
        return f"limit {', '.join(amounts)}{origin}"

    def allows_more_than(self, other: "Limits") -> bool:
        """Whether some run would pass these limits and not the other ones."""
        return any(
            theirs is not None and (ours is None or ours > theirs)
            for name in LIMIT_NAMES
            for ours, theirs in [(getattr(self, name), getattr(other, name))]
        )


#: until the user sets limits: a workflow file is a stranger's, and may name any model in any number
#: of nodes
DEFAULT_LIMITS = Limits(per_run=Decimal(2), per_day=Decimal(20), is_default=True)


@dataclass(frozen=True)
class Spent:
    """US dollars of this day and this month: paid, and projected for what is under way."""

    day: Decimal = Decimal(0)
    month: Decimal = Decimal(0)


# --- price --------------------------------------------------------------------------------------


def price_of(
    record: Mapping[str, Any],
    parameters: Mapping[str, Any],
    num_files: int = 0,
    earlier: Sequence[Decimal] = (),
) -> Price | None:
    """Price a run.

    Args:
        record: of Tool/Detail.
        parameters: of the run.
        num_files: of the run.
        earlier: US dollars that runs of this model have cost, for models billed by the second.

    Returns:
        The price, or None if it is unknown before the run.
    """
    rows = _rows(record.get("dynamicprice"))
    num_files += sum(
        str(value).startswith("https://") and name != "callbackUrl"
        for name, value in parameters.items()
    )
    if rows:
        row = _matching(rows, parameters, num_files)
        if row is None:  # other settings have prices, these have none
            return None
        price = _price_of_row(row, record, parameters, num_files)
    else:
        price = _by_second(record, decimal_of(record.get("cps")))
    if price is None and earlier:
        price = Price(max(earlier), is_exact=False)
    return price


def _rows(value: object) -> list[Mapping[str, Any]]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return []
    return [row for row in value if isinstance(row, Mapping)] if isinstance(value, list) else []


def _matching(
    rows: list[Mapping[str, Any]], parameters: Mapping[str, Any], num_files: int
) -> Mapping[str, Any] | None:
    """The row with the most conditions that the run meets."""

    def meets(name: str, wanted: object) -> bool:
        if str(wanted).startswith("QUANTITY:"):
            return str(num_files) == str(wanted).removeprefix("QUANTITY:")
        return same_value(parameters.get(name, ""), wanted)

    met: list[tuple[int, Mapping[str, Any]]] = []
    for row in rows:
        inputs = row.get("inputs")
        conditions = inputs if isinstance(inputs, Mapping) else {}
        if all(meets(name, wanted) for name, wanted in conditions.items()):
            met.append((len(conditions), row))
    return max(met, key=lambda pair: pair[0])[1] if met else None


def _price_of_row(
    row: Mapping[str, Any], record: Mapping[str, Any], parameters: Mapping[str, Any], num_files: int
) -> Price | None:
    rate = decimal_of(row.get("price"))
    method = text_of(row.get("priceMethod"))
    if rate is None or rate < 0:
        return None
    if method == "cpr":
        return Price(rate, is_exact=True)
    if method == "cp-pixel":
        return _by_pixel(row, rate, parameters, num_files)
    if method == "cps":
        return _by_second(record, rate)
    by_parameters = _BY_PARAMETERS.get(method)
    return None if by_parameters is None else by_parameters(rate, parameters)


def _by_output(rate: Decimal, parameters: Mapping[str, Any]) -> Price:
    count = _number(parameters, _COUNTS)
    return Price(rate * (count or 1), is_exact=count is not None)


def _by_character(rate: Decimal, parameters: Mapping[str, Any]) -> Price | None:
    prompt = parameters.get("prompt")
    return None if prompt is None else Price(rate * len(str(prompt)), is_exact=True)


def _by_video_second(rate: Decimal, parameters: Mapping[str, Any]) -> Price | None:
    seconds = _number(parameters, _SECONDS)
    frames = _number(parameters, ("numframes", "num_frames"))
    if seconds is not None:
        return Price(_cents_up(rate * seconds), is_exact=False)
    # multiplied first: 97 frames / 24 has no finite decimal
    return None if frames is None else Price(_cents_up(rate * frames / FPS), is_exact=False)


#: price methods that need nothing but the rate and the parameters
_BY_PARAMETERS: Mapping[str, Callable[[Decimal, Mapping[str, Any]], Price | None]] = {
    "cpo": _by_output,
    "cp-promptlength": _by_character,
    "cp-outputVideoLength": _by_video_second,
}


def _by_pixel(
    row: Mapping[str, Any], rate: Decimal, parameters: Mapping[str, Any], num_files: int
) -> Price | None:
    width, height = _number(parameters, ("width",)), _number(parameters, ("height",))
    for name in ("size", "resolution"):
        match = re.fullmatch(r"\s*(\d+)\s*[xX*]\s*(\d+)\s*", str(parameters.get(name, "")))
        if match:
            width, height = Decimal(match[1]), Decimal(match[2])
    if not width or not height:
        return None
    tiers = int((width * height / TIER_PIXELS).to_integral_value(ROUND_CEILING))
    extra = decimal_of(row.get("priceExtra"))
    per_input = decimal_of(row.get("priceInput")) or Decimal(0)
    amount = rate + (tiers - 1) * (rate if extra is None else extra)
    return Price(amount + per_input * num_files * tiers, is_exact=False)


def _by_second(record: Mapping[str, Any], cps: Decimal | None) -> Price | None:
    """By the service's average, `approximatelycost`, at its own rate."""
    average, own_rate = decimal_of(record.get("approximatelycost")), decimal_of(record.get("cps"))
    if not average or average < 0:
        return None
    if cps and own_rate:
        average = average * cps / own_rate
    return Price(average, is_exact=False)


def _number(parameters: Mapping[str, Any], names: Sequence[str]) -> Decimal | None:
    for name, value in parameters.items():
        if name.lower() in names:
            number = decimal_of(value)
            return number if number is not None and number >= 0 else None
    return None


def _cents_up(amount: Decimal) -> Decimal:
    if amount.adjusted() > 20:  # beyond what can be rounded so, and beyond all limits
        return amount
    return amount.quantize(Decimal("0.0001"), ROUND_CEILING)


# --- limits -------------------------------------------------------------------------------------


def parse_limit(value: object) -> Decimal | None:
    """Parse a limit as a person types it.

    Returns:
        US dollars, or None for an empty text.

    Raises:
        ConfigError: not an amount of dollars.
    """
    if value is None or str(value).strip() == "":
        return None
    amount = decimal_of(str(value).strip().removeprefix("$"))
    if amount is None or amount < 0:
        raise ConfigError(
            f"{str(value)[:40]!r} is not a limit: give US dollars as 2.50, or nothing for no limit."
        )
    return amount


def load_limits(file: Path) -> Limits:
    """Load the limits in a file.

    Returns:
        The limits; the default if there is no file, as the user has set none yet.

    Raises:
        ConfigError: it cannot be read. Nothing may be spent then: what it said is not known.
    """
    if not file.exists():
        return DEFAULT_LIMITS
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        amounts = [parse_limit(stored.get(name)) for name in LIMIT_NAMES]
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"The spending limits in {file} cannot be read ({error}): set them again, or delete it."
        ) from None
    return Limits(*amounts)


def save_limits(file: Path, limits: Limits) -> None:
    """Write limits; the old file is replaced as a whole."""
    write_whole(file, json.dumps(to_json(limits)))


def to_json(limits: Limits) -> dict[str, str | None]:
    """Limits as texts, None for none."""
    return {name: dollars(getattr(limits, name)) for name in LIMIT_NAMES}


def describe_price(price: Price | None, limits: Limits) -> str:
    """What a run will cost and what it may, in one line: said before anything is sent."""
    if price is not None:
        return f"price {price}, {limits}"
    assumed = reserved(price, limits)
    if assumed is not None:
        return (
            f"price unknown before the run, so the default limit of {money(assumed)} a run cannot "
            f"hold it; it counts as {money(assumed)} of the day until its cost is known (set your "
            f"limits in {HOW_TO_LIMIT})"
        )
    return f"price unknown before the run, {limits}"


def reserved(price: Price | None, limits: Limits) -> Decimal | None:
    """What a run counts for until its cost is known.

    Without a price, under the default alone, as much as a run may cost: many at once are bounded.

    Returns:
        US dollars, or None for nothing.
    """
    if price is not None:
        return price.amount
    return limits.per_run if limits.is_default else None


def check_limits(limits: Limits, price: Price | None, spent: Spent, model: str) -> None:
    """Raise unless a run may be paid for.

    Raises:
        LimitError: it would pass a limit, or its price is not known and there is one. Under the
            default alone SkyReels-V1 runs without a known price.
    """
    if not limits.is_set:
        return
    fix = "Nothing was sent. Raise the limit in the Wiro settings (or: python -m wiro_api limits)"
    assumed = reserved(price, limits)
    if price is None and limits.is_default and model.lower() != FIXED_MODEL:
        raise LimitError(
            f"Wiro publishes no price for {model} with these settings, and you have set no limits "
            "yet, so nothing bounds what it may cost. Nothing was sent. Set limits once (an "
            f"amount, or none) in {HOW_TO_LIMIT}."
        )
    if assumed is None:
        raise LimitError(
            f"Wiro publishes no price for {model} with these settings, so your spending limits "
            "cannot be checked. Nothing was sent. Remove the limits for one run; later runs use "
            "the recorded cost of this one."
        )
    periods = (
        ("a run", limits.per_run, Decimal(0)),
        ("a day", limits.per_day, spent.day),
        ("a month", limits.per_month, spent.month),
    )
    for period, limit, already in periods:
        if limit is not None and already + assumed > limit:
            so_far = f", and {money(already)} of it is spent" if already else ""
            cost = f"would cost {price}" if price is not None else "has no published price"
            raise LimitError(
                f"{model} {cost}; your limit is {money(limit)} {period}{so_far}. {fix}."
            )
