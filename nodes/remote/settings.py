"""What the page's forms show and change: the key, the spending limits, other settings.

The functions with a `body` handle the JSON of a POST request.
"""

import json
import logging
import os
from typing import Any

from .. import host
from . import account, guard

logger = logging.getLogger("skyreels.nodes.remote.settings")

#: field of the settings file, of the account and of the request that sets it
COLLECT = "collect_at_start"
#: characters of a text in a request
_MAX_TEXT = 1000


def describe_account() -> dict[str, Any]:
    """What the page may know of the account; nothing of the key but its source.

    The key's last characters prove that somebody has it (guard.py), so they are not shown.

    Returns:
        Of the key has_key, source, service, problem; limits and spent in US dollars; and whether
        they are locked, default, or shared by several users; collect_at_start.
    """
    from ...wiro_api.errors import ConfigError
    from ...wiro_api.signing import KEY_VARIABLE, load_credentials
    from ...wiro_api.spending import DEFAULT_LIMITS, Spent, load_limits, to_json
    from ...wiro_api.transport import base_url
    from ...wiro_api.wire import dollars

    problem, source = "", "none"
    is_in_environment = bool(os.environ.get(KEY_VARIABLE, "").strip())
    try:
        load_credentials(file=account.credentials_file())
        source = "environment" if is_in_environment else "file"
    except ConfigError as error:
        if is_in_environment or account.credentials_file().is_file():
            problem = str(error)
    limits, spent = DEFAULT_LIMITS, Spent()
    try:
        if account.has_state():
            limits, spent = load_limits(account.limits_file()), account.journal().spent()
    except ConfigError as error:
        problem = str(error)
    return {
        "has_key": source != "none",
        "is_locked": guard.is_locked(),
        "is_shared": host.is_multi_user(),
        "has_default_limits": limits.is_default,
        "collect_at_start": collects_at_start(),
        "source": source,
        "service": base_url(),
        "limits": to_json(limits),
        "spent": {"day": dollars(spent.day), "month": dollars(spent.month)},
        "problem": problem,
    }


def save_account(body: dict[str, Any]) -> dict[str, Any]:
    """Store the key, or remove it if it is empty; a stored one takes proof (guard.py).

    Args:
        body: api_key, api_secret, proof.

    Returns:
        The account afterwards.

    Raises:
        ConfigError: a bad key, or one in the environment takes precedence.
        ForbiddenError: locked, or no proof.
    """
    from ...wiro_api.errors import ConfigError
    from ...wiro_api.signing import (
        KEY_VARIABLE,
        SECRET_VARIABLE,
        load_credentials,
        save_credentials,
    )

    guard.check_unlocked()
    if os.environ.get(KEY_VARIABLE, "").strip():
        raise ConfigError(
            f"{KEY_VARIABLE} is set in the environment of ComfyUI and takes precedence: change it "
            "there."
        )
    file = account.credentials_file()
    _require(body, "api_key")
    api_key = _text(body, "api_key")
    if not api_key.strip():
        _check_proof(body)
        file.unlink(missing_ok=True)
        return describe_account()
    given = {KEY_VARIABLE: api_key, SECRET_VARIABLE: _text(body, "api_secret")}
    credentials = load_credentials(given)
    _check_proof(body)
    save_credentials(file, credentials)
    return describe_account()


def test_account(_: dict[str, Any]) -> dict[str, Any]:
    """Make a signed call that is free, and report success."""
    with account.make_client() as client:
        client.list_tasks(limit=1)
    return {"message": f"{client.base_url} accepts the key."}


def save_limits(body: dict[str, Any]) -> dict[str, Any]:
    """Store the spending limits; raising or removing one takes proof of the key (guard.py)."""
    from ...wiro_api import spending
    from ...wiro_api.errors import ConfigError

    guard.check_unlocked()
    file = account.limits_file()
    _require(body, *spending.LIMIT_NAMES)
    limits = spending.Limits(
        *(spending.parse_limit(body.get(name)) for name in spending.LIMIT_NAMES)
    )
    try:
        is_raised = limits.allows_more_than(spending.load_limits(file))
    except ConfigError:  # the present limits cannot be read
        is_raised = True
    if is_raised:
        _check_proof(body)
    spending.save_limits(file, limits)
    return describe_account()


def save_settings(body: dict[str, Any]) -> dict[str, Any]:
    """Store whether tasks are collected when ComfyUI starts."""
    from ...wiro_api.errors import ConfigError
    from ...wiro_api.parts import write_whole

    _require(body, COLLECT)
    if not isinstance(body[COLLECT], bool):
        raise ConfigError(f"{COLLECT} must be true or false.")
    write_whole(account.settings_file(), json.dumps({COLLECT: body[COLLECT]}))
    return describe_account()


def collects_at_start() -> bool:
    """Whether tasks left running are collected when ComfyUI starts; off if it cannot be read."""
    if not account.has_state():
        return False
    file = account.settings_file()
    try:
        stored = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        return stored.get(COLLECT) is True
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        logger.warning("Cannot read %s (%s): collecting at start is off.", file.name, error)
        return False


def _check_proof(body: dict[str, Any]) -> None:
    """Raise ForbiddenError if a key is in use and the request does not prove knowledge of it."""
    from ...wiro_api.errors import ConfigError
    from ...wiro_api.signing import load_credentials

    proof = _text(body, "proof").strip()
    try:
        credentials = load_credentials(file=account.credentials_file())
    except ConfigError:
        return
    guard.check_proof(proof, credentials.api_key)


def _require(body: dict[str, Any], *names: str) -> None:
    """Raise ConfigError for a missing field: it must not be mistaken for an empty one."""
    from ...wiro_api.errors import ConfigError

    missing = [name for name in names if name not in body]
    if missing:
        raise ConfigError(f"The request lacks {', '.join(missing)}: reload the page.")


def _text(body: dict[str, Any], name: str) -> str:
    from ...wiro_api.errors import ConfigError

    value = body.get(name, "")
    if not isinstance(value, str) or len(value) > _MAX_TEXT:
        raise ConfigError(f"{name} must be a text of at most {_MAX_TEXT} characters.")
    return value
