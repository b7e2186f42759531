"""The page's routes: who may call them, and errors as HTTP answers.

ComfyUI's server has no login: anyone who reaches its port may call these. So none returns a key or
a token, none starts a paid run, and every POST goes through `guard.check_sender`. GET changes
nothing and creates no file.

On a server with several users (--multi-user) they share one account, its key and its limits; each
sees and changes only the tasks they queued. ComfyUI trusts the page about its user, so this keeps
users from getting in each other's way; it is not access control.
"""

import json
import logging
import threading
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from .. import host
from . import guard, models, prices, settings, tasks

if TYPE_CHECKING:
    from aiohttp import web

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

logger = logging.getLogger("skyreels.nodes.remote.routes")

PREFIX = "/skyreels/wiro"
#: bytes of a request; of one with the fields of a node, prompts included
MAX_BODY, MAX_NODE_BODY = 10_000, 500_000
#: most tasks of one answer, and how many without `limit`
MAX_TASKS, DEFAULT_TASKS = 500, 50
#: of a file that the browser must not open as part of the page, whatever it holds
_AS_DOWNLOAD = {
    "Content-Type": "application/octet-stream",
    "X-Content-Type-Options": "nosniff",
}


def register(table: Any) -> None:
    """Add the routes to the server's table."""
    row = r"{row:[0-9]{1,18}}"
    for path, get in {
        "account": _get_account,
        "tasks": _get_tasks,
        f"tasks/{row}/file": _get_file,
        "models": _get_models,
        "models/one": _get_model,
    }.items():
        table.get(f"{PREFIX}/{path}")(get)
    for path, work in {
        "account": settings.save_account,
        "account/test": settings.test_account,
        "limits": settings.save_limits,
        "settings": settings.save_settings,
        "models/price": prices.form_price,
    }.items():
        table.post(f"{PREFIX}/{path}")(_post(work))
    table.post(f"{PREFIX}/price")(_post(prices.node_price, MAX_NODE_BODY))
    table.post(f"{PREFIX}/tasks/{row}/{{action}}")(_post_action)


async def _get_account(_: "web.Request") -> "web.Response":
    return await _answer(settings.describe_account)


async def _get_tasks(request: "web.Request") -> "web.Response":
    limit = min(_number(request.query.get("limit", "")) or DEFAULT_TASKS, MAX_TASKS)
    before = _number(request.query.get("before", ""))
    return await _answer(lambda: tasks.list_tasks(limit, _user(request), before))


async def _get_file(request: "web.Request") -> "web.StreamResponse":
    from aiohttp import web

    row, name = int(request.match_info["row"]), request.query.get("name", "")
    path = await host.run_in_thread(lambda: tasks.downloaded_file(row, name), threading.Event())
    if path is None:
        return web.json_response({"error": "There is no such file."}, status=404)
    disposition = f"attachment; filename*=UTF-8''{quote(path.name)}"
    return web.FileResponse(path, headers={**_AS_DOWNLOAD, "Content-Disposition": disposition})


async def _get_models(request: "web.Request") -> "web.Response":
    return await _answer_page(request, lambda: models.search(request.query.get("search", "")))


async def _get_model(request: "web.Request") -> "web.Response":
    return await _answer_page(request, lambda: models.describe(request.query.get("slug", "")))


async def _post_action(request: "web.Request") -> "web.StreamResponse":
    row, action = int(request.match_info["row"]), request.match_info["action"]
    return await _post(lambda _: tasks.act(row, action, _user(request)))(request)


def _number(text: str) -> int | None:
    """A whole number of a query, or None."""
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


# --- one place that judges requests, one that maps errors ----------------------------------------


def _post(work: Callable[[dict[str, Any]], dict[str, Any]], max_body: int = MAX_BODY) -> "Handler":
    """A handler that calls `work` with the JSON body of a request from ComfyUI's own page."""

    async def handle(request: "web.Request") -> "web.StreamResponse":
        from aiohttp import web

        try:
            guard.check_sender(request.headers.items())
        except guard.ForbiddenError as error:  # before the body is read
            logger.warning("Refused a request to %r: %s", request.path[:80], error)
            return web.json_response({"error": str(error)}, status=403)
        if request.content_type != "application/json":
            return web.json_response({"error": "The request is not JSON."}, status=415)
        content = b""
        async for chunk in request.content.iter_chunked(MAX_BODY):
            content += chunk
            if len(content) > max_body:
                return web.json_response({"error": "The request is too long."}, status=413)
        try:
            body = json.loads(content)
        except (ValueError, RecursionError):
            body = None
        if not isinstance(body, dict):
            return web.json_response({"error": "The request is not a JSON object."}, status=400)
        return await _answer(lambda: work(body))

    return handle


async def _answer_page(
    request: "web.Request", work: Callable[[], dict[str, Any]]
) -> "web.Response":
    """Answer a GET that makes the server ask Wiro: only ComfyUI's own page may."""

    def guarded() -> dict[str, Any]:
        guard.check_reader(request.headers.items())
        return work()

    return await _answer(guarded)


async def _answer(work: Callable[[], dict[str, Any]]) -> "web.Response":
    """The result of blocking work, or its error's message with a fitting HTTP status."""
    from aiohttp import web

    from ...wiro_api.errors import ConfigError, WiroError

    try:
        return web.json_response(await host.run_in_thread(work, threading.Event()))
    except (guard.ForbiddenError, WiroError) as error:
        status = 502
        if isinstance(error, guard.ForbiddenError):
            status = 403
        elif isinstance(error, ConfigError):
            status = 400
        return web.json_response({"error": str(error)}, status=status)
    except OSError as error:
        logger.warning("A file of the Wiro account cannot be used: %s", error)
        return web.json_response(
            {"error": f"A file cannot be used ({error.strerror})."}, status=500
        )
