"""ComfyUI's server: the page's events, users, routes, prompts, and Cancel beside its loop."""

import asyncio
import contextvars
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

#: field of a prompt's extra data, where the server has several users
_USER_MARK = "skyreels_user"
#: attribute of the server: the folder of the copy of this pack that serves it
_OWNER_MARK = "skyreels_wiro_folder"


def instance() -> Any:
    """The running server, or None in tests and import-only runs."""
    try:
        from server import PromptServer
    except ImportError:
        return None
    return getattr(PromptServer, "instance", None)


def say_on_node(text: str, unique_id: str | None) -> None:
    """Write a line on a node of the page that queued the prompt, if there is a page."""
    server = instance()
    if server is None or unique_id is None:
        return
    client = prompt_client()
    if client or not is_multi_user():
        server.send_progress_text(text, unique_id, client)


class RemoteProgress:
    """Bar, line and cancel button of a node that waits for another machine."""

    def __init__(self, unique_id: str | None) -> None:
        import comfy.model_management as mm
        import comfy.utils

        self._mm = mm
        self._unique_id = unique_id
        self._bar = comfy.utils.ProgressBar(1000, node_id=unique_id)
        self._shown: tuple[float, str] = (-1.0, "")

    def show(self, fraction: float, line: str) -> None:
        """Move the bar, 0..1, and write the line, if they are new."""
        if (fraction, line) == self._shown:
            return
        if fraction != self._shown[0]:
            self._bar.update_absolute(round(1000 * fraction), 1000)  # asks for the interrupt too
        self.say(line)
        self._shown = (fraction, line)

    def say(self, line: str) -> None:
        """Write the line alone."""
        say_on_node(line, self._unique_id)

    def check_interrupt(self) -> None:
        """Raise ComfyUI's own exception if the user pressed Cancel."""
        self._mm.throw_exception_if_processing_interrupted()


async def in_thread(work: Callable[[], T], over: threading.Event) -> T:
    """Run blocking work beside the host's loop, in a thread of its own, under the caller's context.

    Args:
        over: set if the wait is ended from outside (another node failed, or the prompt was
            cancelled); the work must then put its things in order and return soon. The caller is
            left only after that.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()
    context = contextvars.copy_context()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.cancelled():
            return
        if error is None:
            future.set_result(result)  # type: ignore[arg-type]
        else:
            future.set_exception(error)

    def body() -> None:
        result, error = None, None
        try:
            result = context.run(work)
        except BaseException as caught:  # noqa: BLE001 - it is raised again in the caller
            error = caught
        loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=body, name="wiro", daemon=True).start()
    try:
        return await asyncio.shield(future)
    except BaseException:
        over.set()
        await asyncio.wait({future})
        if not future.cancelled():
            future.exception()  # seen: what ended the wait from outside goes on
        raise


def is_interrupt(error: BaseException) -> bool:
    """Whether it is what the host raises when the user pressed Cancel."""
    import comfy.model_management as mm

    return isinstance(error, mm.InterruptProcessingException)


def send_event(name: str, data: dict[str, Any], client: str | None = None) -> None:
    """Tell one page, or every open page of a server that has one user; no secrets."""
    server = instance()
    if server is not None and (client or not is_multi_user()):
        server.send_sync(name, data, client)


def prompt_client() -> str | None:
    """The page that queued the prompt that is being executed; None if no page did."""
    return getattr(instance(), "client_id", None)


def is_multi_user() -> bool:
    """Whether the server was started with --multi-user."""
    try:
        from comfy.cli_args import args
    except ImportError:  # tests and import-only runs
        return False
    return bool(args.multi_user)


def user_of(request: Any) -> str:
    """The user whose page asks; "" if the server has one user only.

    Raises:
        KeyError: there are several, and the request names none of them.
    """
    server = instance()
    if server is None or not is_multi_user():
        return ""
    return str(server.user_manager.get_request_user_id(request))


def prompt_user() -> str:
    """The user who queued the prompt that is being executed; "" if that is not known."""
    server = instance()
    if server is None or not is_multi_user():
        return ""
    running, _ = server.prompt_queue.get_current_queue_volatile()
    return str(running[0][3].get(_USER_MARK, "")) if running else ""


def remember_users() -> None:
    """Keep with each prompt who queued it: the server itself forgets it before it is executed."""
    server = instance()
    if server is None or not is_multi_user():
        return
    from aiohttp import web

    asking: contextvars.ContextVar[str] = contextvars.ContextVar("skyreels_user", default="")

    @web.middleware
    async def note(request: Any, handler: Any) -> Any:
        try:
            user = user_of(request)
        except KeyError:
            user = ""
        token = asking.set(user)
        try:
            return await handler(request)
        finally:
            asking.reset(token)

    def mark(prompt: dict[str, Any]) -> dict[str, Any]:
        prompt.setdefault("extra_data", {})[_USER_MARK] = asking.get()
        return prompt

    server.app.middlewares.append(note)
    server.add_on_prompt_handler(mark)


def at_start(work: Callable[[], None]) -> None:
    """Call `work` in a thread once the server's loop runs; the end of the program waits not for it.

    Where there is no server nothing is called.
    """
    server = instance()
    if server is None:
        return
    thread = threading.Thread(target=work, name="wiro at start", daemon=True)
    server.loop.call_soon(thread.start)


def routes() -> Any:
    """The server's table of routes, or None in tests and import-only runs."""
    server = instance()
    return None if server is None else server.routes


def claim_server(folder: Path) -> Path | None:
    """Mark the server as served by the copy of the pack in `folder`, if no copy serves it yet.

    Returns:
        The folder of the copy that had claimed the server before; None: this call claimed it, or
        there is no server.
    """
    server = instance()
    first: Path | None = getattr(server, _OWNER_MARK, None)
    if server is not None and first is None:
        setattr(server, _OWNER_MARK, folder)
    return first


def blocked(message: str) -> Any:
    """An output that stops, with a message, only what depends on it."""
    from comfy_execution.graph_utils import ExecutionBlocker

    return ExecutionBlocker(message)


def linked_outputs(graph: dict[str, Any] | None, unique_id: str | None) -> set[int] | None:
    """Which outputs of a node something hangs on, by a prompt in API format.

    Returns:
        Their numbers, or None if it cannot be known: a node that another one has made is not in
        the prompt.
    """
    if not graph or unique_id is None or unique_id not in graph:
        return None
    found = set()
    for node in graph.values():
        for value in node.get("inputs", {}).values():
            is_link = isinstance(value, list) and len(value) == 2
            if is_link and str(value[0]) == unique_id and isinstance(value[1], int):
                found.add(value[1])
    return found


def running_graph() -> dict[str, Any] | None:
    """The prompt that the caller's node is asked for, in API format; None if it cannot be known.

    IS_CHANGED is called without it, and the answer may depend on what hangs on the node.
    """
    try:
        from comfy_execution.utils import get_executing_context
    except ImportError:
        return None
    context, queue = get_executing_context(), getattr(instance(), "prompt_queue", None)
    if context is None or queue is None:
        return None
    for item in queue.get_current_queue_volatile()[0]:  # (number, prompt id, prompt, ...)
        if item[1] == context.prompt_id:
            graph: dict[str, Any] = item[2]
            return graph
    return None
