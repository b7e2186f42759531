"""ComfyUI's server: page events, users, routes, the running prompt, and work beside its loop."""

import asyncio
import contextvars
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

#: attribute of the server: the folder of the copy of this pack that serves it
_OWNER_MARK = "skyreels_wiro_folder"
#: event of the page: what came of a node's run
_OUTCOME_EVENT = "skyreels.wiro.outcome"
#: field of a prompt's extra data that names its user, on a server with several users
_USER_FIELD = "skyreels_user"


def _prompt_server() -> Any:
    """The running server, or None in tests and import-only runs."""
    try:
        from server import PromptServer
    except ImportError:
        return None
    return getattr(PromptServer, "instance", None)


# --- what the page sees -------------------------------------------------------------------------


def show_on_node(text: str, unique_id: str | None) -> None:
    """Write a line on a node, in the page that queued the prompt; does nothing without a page."""
    server = _prompt_server()
    if server is None or unique_id is None:
        return
    client = prompt_client()
    if client or not is_multi_user():
        server.send_progress_text(text, _node_on_page(unique_id), client)


def _node_on_page(unique_id: str) -> str:
    """The node of the page that a running node belongs to: another one if that one made it."""
    if "." not in unique_id:
        return unique_id
    from comfy_execution.progress import get_progress_state

    return str(get_progress_state().dynprompt.get_display_node_id(unique_id))


def send_event(name: str, data: dict[str, Any], client: str | None = None) -> None:
    """Send an event to one page, or to every open page of a single-user server; no secrets."""
    server = _prompt_server()
    if server is not None and (client or not is_multi_user()):
        server.send_sync(name, data, client)


def show_outcome(line: str, unique_id: str | None, *, must_act: bool) -> None:
    """Let the page that queued the prompt keep on a node what came of its run.

    A line of `show_on_node` is gone with the prompt's end in newer front ends.

    Args:
        line: for people; no path of this machine.
        unique_id: of the node; None does nothing.
        must_act: whether the user has to act, so that the page says it loudly.
    """
    if _prompt_server() is None or unique_id is None:
        return
    outcome = {**page_address(unique_id), "line": line, "must_act": must_act}
    send_event(_OUTCOME_EVENT, outcome, prompt_client())


def page_address(unique_id: str) -> dict[str, str]:
    """Where the page shows what happens in a running node.

    Returns:
        `node`, the id of a node in the page, "12:3" for one in a subgraph; its `class_type`, which
        tells it from a node of another workflow; `prompt_id`.
    """
    from comfy_execution.progress import get_progress_state

    state = get_progress_state()
    node = state.dynprompt.get_display_node_id(unique_id)
    class_type = state.dynprompt.get_node(node)["class_type"]
    return {"node": node, "class_type": class_type, "prompt_id": state.prompt_id}


class RemoteProgress:
    """Progress bar, status line and Cancel button of a node that waits for another machine."""

    def __init__(self, unique_id: str | None) -> None:
        import comfy.model_management as mm
        import comfy.utils

        self._mm = mm
        self._unique_id = unique_id
        self._bar = comfy.utils.ProgressBar(1000, node_id=unique_id)
        self._shown: tuple[float, str] = (-1.0, "")

    def show(self, fraction: float, line: str) -> None:
        """Move the bar to `fraction` (0..1) and write the line, where they have changed."""
        if (fraction, line) == self._shown:
            return
        if fraction != self._shown[0]:
            self._bar.update_absolute(round(1000 * fraction), 1000)  # also checks for Cancel
        self.say(line)
        self._shown = (fraction, line)

    def say(self, line: str) -> None:
        """Write the line and leave the bar."""
        show_on_node(line, self._unique_id)

    def check_interrupt(self) -> None:
        """Raise ComfyUI's interrupt exception if the user pressed Cancel."""
        self._mm.throw_exception_if_processing_interrupted()


def is_interrupt(error: BaseException) -> bool:
    """Whether ComfyUI raised it because the user pressed Cancel."""
    import comfy.model_management as mm

    return isinstance(error, mm.InterruptProcessingException)


# --- work beside the loop -----------------------------------------------------------------------


async def run_in_thread(work: Callable[[], T], stop_event: threading.Event) -> T:
    """Run blocking work in a daemon thread of its own, with the caller's context.

    Not in asyncio's thread pool: Python waits for that pool before it exits.

    Args:
        work: blocking function without arguments.
        stop_event: set when the wait ends from outside (another node failed, or the prompt was
            cancelled). `work` must then clean up and return soon: the caller waits for it.

    Returns:
        The result of `work`; its exception is raised here.
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

    def run() -> None:
        result, error = None, None
        try:
            result = context.run(work)
        except BaseException as caught:  # noqa: BLE001 - raised again in the caller
            error = caught
        loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name="wiro", daemon=True).start()
    try:
        return await asyncio.shield(future)
    except BaseException:
        stop_event.set()
        await asyncio.wait({future})
        if not future.cancelled():
            future.exception()  # mark as retrieved: the outer exception is the one to raise
        raise


def run_at_startup(work: Callable[[], None]) -> None:
    """Run `work` in a daemon thread as soon as the server's loop runs; never without a server."""
    server = _prompt_server()
    if server is None:
        return
    thread = threading.Thread(target=work, name="wiro startup", daemon=True)
    server.loop.call_soon(thread.start)


# --- users and routes ---------------------------------------------------------------------------


def routes() -> Any:
    """The server's table of routes, or None in tests and import-only runs."""
    server = _prompt_server()
    return None if server is None else server.routes


def is_multi_user() -> bool:
    """Whether the server was started with --multi-user."""
    try:
        from comfy.cli_args import args
    except ImportError:  # tests and import-only runs
        return False
    return bool(args.multi_user)


def request_user(request: Any) -> str:
    """The user whose page sent a request.

    Args:
        request: of aiohttp.

    Returns:
        The user's id; "" on a single-user server.

    Raises:
        KeyError: the server has several users and the request names none of them.
    """
    server = _prompt_server()
    if server is None or not is_multi_user():
        return ""
    return str(server.user_manager.get_request_user_id(request))


def prompt_client() -> str | None:
    """The page that queued the running prompt; None if no page did."""
    return getattr(_prompt_server(), "client_id", None)


def prompt_user() -> str:
    """The user who queued the running prompt; "" if unknown."""
    server = _prompt_server()
    if server is None or not is_multi_user():
        return ""
    running, _ = server.prompt_queue.get_current_queue_volatile()
    return str(running[0][3].get(_USER_FIELD, "")) if running else ""


def record_prompt_users() -> None:
    """Store with each prompt who queued it: the server forgets that before the prompt runs."""
    server = _prompt_server()
    if server is None or not is_multi_user():
        return
    from aiohttp import web

    current_user: contextvars.ContextVar[str] = contextvars.ContextVar("skyreels_user", default="")

    async def note_user(request: Any, handler: Any) -> Any:
        try:
            user = request_user(request)
        except KeyError:
            user = ""
        token = current_user.set(user)
        try:
            return await handler(request)
        finally:
            current_user.reset(token)

    def store_user(prompt: dict[str, Any]) -> dict[str, Any]:
        prompt.setdefault("extra_data", {})[_USER_FIELD] = current_user.get()
        return prompt

    server.app.middlewares.append(web.middleware(note_user))
    server.add_on_prompt_handler(store_user)


# --- the running prompt -------------------------------------------------------------------------


def claim_server(folder: Path) -> Path | None:
    """Mark the server as served by the copy of the pack in `folder`, if no copy serves it yet.

    Returns:
        The folder of the copy that had claimed the server before; None: this call claimed it, or
        there is no server.
    """
    server = _prompt_server()
    first: Path | None = getattr(server, _OWNER_MARK, None)
    if server is not None and first is None:
        setattr(server, _OWNER_MARK, folder)
    return first


def blocked(message: str) -> Any:
    """An output that stops the nodes connected to it, with a message, and no others."""
    from comfy_execution.graph_utils import ExecutionBlocker

    return ExecutionBlocker(message)


def linked_outputs(graph: dict[str, Any] | None, unique_id: str | None) -> set[int] | None:
    """Which outputs of a node are connected.

    Args:
        graph: the prompt, in API format.
        unique_id: of the node.

    Returns:
        Output numbers, or None if unknown: a node created by another node is not in the prompt.
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


def prompt_node(graph: Any, node_id: str | None) -> dict[str, Any] | None:
    """A node of the prompt that runs, in API format.

    Args:
        graph: hidden input DYNPROMPT, with nodes that other nodes made too; or PROMPT.
        node_id: of the node.

    Returns:
        None if there is none of that id.
    """
    if graph is None or node_id is None:
        return None
    if isinstance(graph, dict):
        return graph.get(node_id)
    found: dict[str, Any] | None = graph.get_node(node_id) if graph.has_node(node_id) else None
    return found


def prompt_nodes(graph: Any) -> list[dict[str, Any]]:
    """All nodes of the prompt that runs, see `prompt_node`."""
    if graph is None:
        return []
    if isinstance(graph, dict):
        return list(graph.values())
    return [graph.get_node(node_id) for node_id in graph.all_node_ids()]


def running_graph() -> dict[str, Any] | None:
    """The prompt of the node that is being evaluated, in API format.

    IS_CHANGED is called without the prompt, and its answer may depend on what is connected.

    Returns:
        Node id -> node, or None if unknown.
    """
    try:
        from comfy_execution.utils import get_executing_context
    except ImportError:
        return None
    context, queue = get_executing_context(), getattr(_prompt_server(), "prompt_queue", None)
    if context is None or queue is None:
        return None
    for item in queue.get_current_queue_volatile()[0]:  # (number, prompt id, prompt, ...)
        if item[1] == context.prompt_id:
            graph: dict[str, Any] = item[2]
            return graph
    return None
