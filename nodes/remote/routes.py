"""What the page asks of the server about the remote account and its tasks.

ComfyUI's server has no login: whoever reaches its port may call these. So none of them returns a
key or a token, what costs money is not among them, and what changes anything goes through
`guard.py`. GET changes nothing, and makes no file.

On a server with several users (--multi-user) the account, its key and its limits are one; tasks are
seen and changed by the user who queued them. ComfyUI takes a page's word for who its user is, so
this keeps users out of each other's way, not out of each other's reach.
"""

import json
import logging
import os
import re
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from .. import host
from . import account, guard, models
from .nodes import ORIENTATION, SIZES, parse_parameters, values_of_widgets
from .run import check_fields, model_record

if TYPE_CHECKING:
    from aiohttp import web

    from ...wiro_api.client import Model
    from ...wiro_api.journal import Entry
    from ...wiro_api.transport import FilePart

logger = logging.getLogger("skyreels.nodes.remote.routes")

#: no request of the page is longer
MAX_BODY = 10_000
#: but what stands in a node's fields, prompts among them
MAX_PRICE_BODY = 500_000
PREFIX = "/skyreels/wiro"
#: newest rows among which a user's are looked for
SEARCHED = 5000
#: the node that starts a run for each picture
MANY_RUNS = "WiroSubmit"
#: in place of a file of which only its name counts
NO_FILE = ("", b"", "")
#: of a file that a browser must not open here, whatever is in it
AS_DOWNLOAD = {
    "Content-Type": "application/octet-stream",
    "X-Content-Type-Options": "nosniff",
}


# --- what they do; blocking, called in a thread -------------------------------------------------


def save_account(body: dict[str, Any]) -> dict[str, Any]:
    """Write the key to its file, or remove it; answers as `account.describe_account`.

    One that is there already is replaced or removed only by who knows its end.
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
            f"{KEY_VARIABLE} is set in the environment of ComfyUI, and it wins: change it there."
        )
    file = account.credentials_file()
    _check_names(body, "api_key")
    api_key = _text(body, "api_key")
    if not api_key.strip():
        _check_proof(body)
        file.unlink(missing_ok=True)
        return account.describe_account()
    given = {KEY_VARIABLE: api_key, SECRET_VARIABLE: _text(body, "api_secret")}
    credentials = load_credentials(given)
    _check_proof(body)
    save_credentials(file, credentials)
    return account.describe_account()


def test_account(_: dict[str, Any]) -> dict[str, Any]:
    """Make a call that is signed and free, and say how it went."""
    with account.make_client() as client:
        client.list_tasks(limit=1)
    return {"message": f"{client.base_url} accepts the key."}


def save_limits(body: dict[str, Any]) -> dict[str, Any]:
    """Write the spending limits; answers as `account.describe_account`.

    Whoever wants to allow more than before must know the key's end.
    """
    from ...wiro_api import spending
    from ...wiro_api.errors import ConfigError

    guard.check_unlocked()
    file = account.limits_file()
    _check_names(body, *spending.LIMIT_NAMES)
    limits = spending.Limits(*(spending.parse_limit(body.get(n)) for n in spending.LIMIT_NAMES))
    try:
        is_more = limits.allows_more_than(spending.load_limits(file))
    except ConfigError:  # what they were is not known
        is_more = True
    if is_more:
        _check_proof(body)
    spending.save_limits(file, limits)
    return account.describe_account()


def _check_proof(body: dict[str, Any]) -> None:
    """Nothing if there is no key that could be used, or the request proves that it is known."""
    from ...wiro_api.errors import ConfigError
    from ...wiro_api.signing import load_credentials

    proof = _text(body, "proof").strip()
    try:
        credentials = load_credentials(file=account.credentials_file())
    except ConfigError:
        return
    guard.check_proof(proof, credentials.api_key)


def save_settings(body: dict[str, Any]) -> dict[str, Any]:
    """Write whether tasks are collected at start; answers as `account.describe_account`."""
    from ...wiro_api.errors import ConfigError

    _check_names(body, account.COLLECT)
    is_on = body[account.COLLECT]
    if not isinstance(is_on, bool):
        raise ConfigError(f"{account.COLLECT} is neither true nor false.")
    account.save_collects_at_start(is_on)
    return account.describe_account()


def list_tasks(limit: int, user: str = "", before: int | None = None) -> dict[str, Any]:
    """The journal's newest tasks; what keeps it from being read is told beside.

    Args:
        user: whose; "" for all, on a server that has one user.
        before: only rows with a lower number: the page asks for older ones so.
    """
    from ...wiro_api.errors import ConfigError

    if not account.has_state():
        return {"tasks": [], "has_more": False, "error": ""}
    error, journal = "", account.journal()
    try:
        journal.spent()
    except ConfigError as problem:
        error = str(problem)
    # one more than asked for tells whether there are older ones
    entries = journal.newest(limit + 1 if not user else SEARCHED, before)
    if user:
        mine = journal.rows_of(user)
        entries = [entry for entry in entries if entry.id in mine]
    return {
        "tasks": [account.describe(entry) for entry in entries[:limit]],
        "has_more": len(entries) > limit,
        "error": error,
    }


def price(body: dict[str, Any]) -> dict[str, Any]:
    """What a node would cost as it stands.

    Wiro is asked for what it says of the model, at most every ten minutes, and not at all without a
    key. No file is made and nothing is changed.

    Args:
        body: node: its id. values: its widgets by name. linked: names of its inputs that links
            fill: what they bring is not known yet.
    Returns:
        has_key; price of a run in US dollars or None, is_exact; is_each: whether the node makes
        several runs; problem: why there is no price, or "".
    """
    from ...wiro_api.errors import ConfigError, WiroError
    from ...wiro_api.jobs import quote
    from ...wiro_api.signing import load_credentials
    from ...wiro_api.task import dollars

    told: dict[str, Any] = {"has_key": True, "price": None, "is_exact": False, "problem": "",
                            "is_each": body.get("node") == MANY_RUNS}  # fmt: skip
    try:
        load_credentials(file=account.credentials_file())
    except ConfigError:
        return {**told, "has_key": False}
    try:
        model, values, files, is_known = _draft(body)
        check_fields([values, dict(files)])
        earlier = account.journal().costs(str(model)) if account.has_state() else []
        with account.make_client() as client:
            record = model_record(client, model)
        amount = quote(record, model, values, files, earlier, is_draft=True).price
    except (WiroError, ValueError) as error:
        return {**told, "problem": str(error)}
    if amount is None:
        return told
    return {**told, "price": dollars(amount.amount), "is_exact": amount.is_exact and is_known}


def _draft(
    body: dict[str, Any],
) -> "tuple[Model, dict[str, Any], list[tuple[str, FilePart]], bool]":
    """Model, parameters and files of a node, and whether all that a price may depend on is known.

    Raises:
        ConfigError: it is no node that runs a model, or what its model is comes through a link.
        ValueError: its parameters are no JSON object.
    """
    from ...wiro_api.client import Model
    from ...wiro_api.errors import ConfigError
    from ...wiro_api.schema import SKYREELS

    node, values, linked = (body.get(name) for name in ("node", "values", "linked"))
    if not isinstance(values, dict) or not isinstance(linked, list):
        raise ConfigError("The request names no values and links: reload the page.")
    given = {name: value for name, value in values.items() if name not in linked}
    if node in ("WiroRemoteI2V", MANY_RUNS):
        if given.get("size") == ORIENTATION:
            given["size"] = SIZES[0]  # as many pixels as the other
            linked = [*linked, "size"]
        frames = given.get("num_frames", 97)
        if not isinstance(frames, int) or not isinstance(given.get("prompt", ""), str):
            raise ConfigError("A field of the node holds what it cannot: reload the page.")
        is_known = node != MANY_RUNS and not {"prompt", "size", "num_frames", "steps", "cfg"} & set(
            linked
        )
        return SKYREELS, values_of_widgets(**given), [("inputImage", NO_FILE)], is_known
    if "model" not in given or not isinstance(given["model"], str):
        raise ConfigError("The model comes through a link, so its price is not known yet.")
    text, name = given.get("parameters", ""), given.get("image_parameter", "inputImage")
    if not isinstance(text, str) or not isinstance(name, str):
        raise ConfigError("A field of the node holds what it cannot: reload the page.")
    sockets = [name for name in linked if re.fullmatch(r"(image|video|audio)(_\d+)?", str(name))]
    files = [(name.strip(), NO_FILE) for _ in sockets]
    is_known = not {"parameters", "image_parameter"} & set(linked)
    return Model.parse(given["model"]), parse_parameters(text), files, is_known


def refresh(entry: "Entry") -> None:
    """Ask the service how a task stands."""
    from ...wiro_api.jobs import to_handle
    from ...wiro_api.task import Verdict, verdict

    if not entry.taskid:
        return
    with account.make_client() as client:
        task = client.detail(to_handle(entry))
    if verdict(task) is Verdict.RUNNING:
        account.journal().seen(entry.id, task.status)
    elif entry.state != "ended":
        account.journal().ended(entry.id, task)


def stop(entry: "Entry") -> None:
    """Cancel or kill a task."""
    from ...wiro_api.jobs import to_handle

    with account.make_client() as client:
        task = client.stop(to_handle(_with_task(entry)))
    account.journal().ended(entry.id, task, entry.files)


def collect(entry: "Entry") -> None:
    """Download the files of an ended task."""
    from ...wiro_api.errors import WiroError
    from ...wiro_api.jobs import finish, to_handle
    from ...wiro_api.task import Verdict, verdict
    from ...wiro_api.transport import local_host
    from ...wiro_api.video import check_video, is_video

    handle = to_handle(_with_task(entry))
    with account.make_client() as client:
        task = client.detail(handle)
        if verdict(task) is Verdict.RUNNING:
            raise WiroError(f"Task {task.taskid} has not ended ({task.phase}): wait, or stop it.")
        finish(
            client, handle, account.task_folder(task.taskid), journal=account.journal(),
            entry_id=entry.id, local_host=local_host(),
            verify=lambda path, output: check_video(path) if is_video(output) else None,
        )  # fmt: skip


def delete_files(entry: "Entry") -> None:
    """Remove what the service keeps of an ended task; what was downloaded stays."""
    from ...wiro_api.jobs import to_handle

    with account.make_client() as client:
        client.delete_files(to_handle(_with_task(entry)))
    account.journal().remote_deleted(entry.id)


def forget(entry: "Entry") -> None:
    """Take a person's word that a run whose outcome is unknown did not start."""
    from ...wiro_api.errors import WiroError
    from ...wiro_api.transport import UPLOAD_S

    if entry.state != "sending":
        raise WiroError("Only a run whose outcome is unknown can be called not started.")
    age_s = abs(time.time() - (entry.sent_at or 0.0))  # the clock may have been set back
    if account.is_followed(entry.id) or age_s < UPLOAD_S + 60:
        raise WiroError("It was sent moments ago, and an answer may still come: wait 6 minutes.")
    account.journal().refused(entry, "Marked as not started.")


ACTIONS: dict[str, Callable[["Entry"], None]] = {
    "refresh": refresh,
    "stop": stop,
    "collect": collect,
    "delete_files": delete_files,
    "forget": forget,
}


def act(row: int, action: str, user: str = "") -> dict[str, Any]:
    """Do something to a task of the journal and describe it afterwards.

    Args:
        user: who asks; "" on a server that has one user.
    """
    from ...wiro_api.errors import WiroError

    entry = _entry(row, user)
    if entry is None or action not in ACTIONS:
        raise WiroError(f"There is no task {row} in the journal, or no action {action!r}.")
    ACTIONS[action](entry)
    account.tell(row, always=True)
    return {"task": account.describe(account.journal().get(row) or entry)}


def file_of(row: int, name: str) -> Path | None:
    """A downloaded file of a task by its name, or None: of what the page may show no other."""
    entry = _entry(row)
    if entry is None:
        return None
    shown = {file["filename"] for file in account.describe(entry)["files"]}
    return next((path for path in entry.files if path.name == name and name in shown), None)


def _entry(row: int, user: str = "") -> "Entry | None":
    if not account.has_state():
        return None
    journal = account.journal()
    return None if user and row not in journal.rows_of(user) else journal.get(row)


def _with_task(entry: "Entry") -> "Entry":
    from ...wiro_api.errors import WiroError

    if not entry.taskid:
        raise WiroError("No task of this run is known at Wiro.")
    return entry


def _check_names(body: dict[str, Any], *names: str) -> None:
    """Nothing is taken for a wish to remove what it does not name."""
    from ...wiro_api.errors import ConfigError

    missing = [name for name in names if name not in body]
    if missing:
        raise ConfigError(f"The request names no {', '.join(missing)}: reload the page.")


def _text(body: dict[str, Any], name: str) -> str:
    from ...wiro_api.errors import ConfigError

    value = body.get(name, "")
    if not isinstance(value, str) or len(value) > 1000:
        raise ConfigError(f"{name} is no text of at most 1000 characters.")
    return value


# --- over HTTP ----------------------------------------------------------------------------------


def register(table: Any) -> None:
    """Add the routes to the server's table."""

    @table.get(f"{PREFIX}/account")
    async def get_account(_: "web.Request") -> "web.Response":
        return await _answer(account.describe_account)

    @table.get(f"{PREFIX}/tasks")
    async def get_tasks(request: "web.Request") -> "web.Response":
        limit = min(_number(request.query.get("limit", "")) or 50, 500)
        before = _number(request.query.get("before", ""))
        return await _answer(lambda: list_tasks(limit, _user(request), before))

    @table.get(f"{PREFIX}/tasks/{{row:[0-9]{{1,18}}}}/file")
    async def get_file(request: "web.Request") -> "web.StreamResponse":
        from aiohttp import web

        row, name = int(request.match_info["row"]), request.query.get("name", "")
        path = await host.run_in_thread(lambda: file_of(row, name), threading.Event())
        if path is None:
            return web.json_response({"error": "There is no such file."}, status=404)
        told = f"attachment; filename*=UTF-8''{quote(path.name)}"
        return web.FileResponse(path, headers={**AS_DOWNLOAD, "Content-Disposition": told})

    for path, function in {
        "account": save_account,
        "account/test": test_account,
        "limits": save_limits,
        "settings": save_settings,
    }.items():
        table.post(f"{PREFIX}/{path}")(_post(function))
    table.post(f"{PREFIX}/price")(_post(price, MAX_PRICE_BODY))

    @table.post(f"{PREFIX}/tasks/{{row:[0-9]{{1,18}}}}/{{action}}")
    async def post_action(request: "web.Request") -> "web.Response":
        row, action = int(request.match_info["row"]), request.match_info["action"]
        return await _post(lambda _: act(row, action, _user(request)))(request)

    models.register(table, _answer, _post)


def _number(text: str) -> int | None:
    """A number of a query, or None if it is none."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else None


def _user(request: "web.Request") -> str:
    """Who asks, on a server with several users."""
    try:
        return host.request_user(request)
    except KeyError:
        raise guard.ForbiddenError(
            "This ComfyUI has several users (--multi-user), and the page names none: reload it and "
            "choose yours."
        ) from None


def _post(
    function: Callable[[dict[str, Any]], dict[str, Any]],
    max_body: int = MAX_BODY,
) -> "Callable[[web.Request], Awaitable[web.Response]]":
    async def handle(request: "web.Request") -> "web.Response":
        from aiohttp import web

        try:
            guard.check_sender(request.headers.items())
        except guard.ForbiddenError as error:  # its body is not even read
            logger.warning("A request to %r was refused: %s", request.path[:80], error)
            return web.json_response({"error": str(error)}, status=403)
        if request.content_type != "application/json":
            return web.json_response({"error": "The request is not JSON."}, status=415)
        content = b""
        async for piece in request.content.iter_chunked(MAX_BODY):
            content += piece
            if len(content) > max_body:
                return web.json_response({"error": "The request is too long."}, status=413)
        try:
            body = json.loads(content)
        except (ValueError, RecursionError):
            body = None
        if not isinstance(body, dict):
            return web.json_response({"error": "The request is no JSON object."}, status=400)
        return await _answer(lambda: function(body))

    return handle


async def _answer(work: Callable[[], dict[str, Any]]) -> "web.Response":
    """The result of blocking work, or the sentence of what went wrong."""
    from aiohttp import web

    from ...wiro_api.errors import ConfigError, WiroError

    try:
        # not asyncio's own threads: the program would wait for them when it ends
        return web.json_response(await host.run_in_thread(work, threading.Event()))
    except guard.ForbiddenError as error:
        return web.json_response({"error": str(error)}, status=403)
    except ConfigError as error:
        return web.json_response({"error": str(error)}, status=400)
    except WiroError as error:
        return web.json_response({"error": str(error)}, status=502)
    except OSError as error:
        logger.warning("A file of the Wiro account cannot be used: %s", error)
        return web.json_response(
            {"error": f"A file cannot be used ({error.strerror})."}, status=500
        )
