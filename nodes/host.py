"""The only file that imports ComfyUI: devices, memory, files, progress, cancel, samplers, routes.

Imports stand inside the functions, so the package loads (and its nodes can be listed and tested)
where there is no ComfyUI.
"""

import asyncio
import contextvars
import io
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..skyreels.errors import CheckpointError, OptionError
from ..skyreels.memory import RESERVE_BYTES, missing_bytes, weight_bytes
from ..skyreels.sampling import OnStep, Solver, Velocity

log = logging.getLogger("skyreels")
T = TypeVar("T")

#: where to get what a loader does not find, by folder kind
LINKS = {
    "diffusion_models": "https://huggingface.co/Kijai/SkyReels-V1-Hunyuan_comfy",
    "vae": "https://huggingface.co/Comfy-Org/HunyuanVideo_repackaged",
    "text_encoders": "https://huggingface.co/hunyuanvideo-community/HunyuanVideo",
    "diffusers": "https://huggingface.co/Skywork/SkyReels-V1-Hunyuan-I2V, or "
    "hunyuanvideo-community/HunyuanVideo for text encoders",
}
WEIGHT_SUFFIXES = (".safetensors", ".sft", ".pt", ".pth", ".ckpt", ".bin")
FOLDER_MARK = " (folder)"
RESUME_DAYS = 7
#: field of a prompt's extra data, where the server has several users
_USER_MARK = "skyreels_user"
#: more than any device has
UNKNOWN_BYTES = 2**50


@dataclass(frozen=True)
class LoadedModel:
    """What a SKYREELS_MODEL or SKYREELS_VAE socket carries.

    module: SkyReelsTransformer or VideoVAE. patcher: ComfyUI's handle on it, through which its
    memory manager moves it. name: for messages.
    """

    module: Any
    patcher: Any
    name: str


# --- runtime ------------------------------------------------------------------------------------


class ComfyRuntime:
    """The engine's Runtime over ComfyUI's memory manager, progress bar and cancel button."""

    def __init__(self, unique_id: str | None = None, *, with_preview: bool = False) -> None:
        import comfy.model_management as mm
        import comfy.utils

        self._mm = mm
        self._unique_id = unique_id
        self._bar = comfy.utils.ProgressBar(1, node_id=unique_id)
        self._started: dict[str, tuple[float, int]] = {}
        # as weights name it: "mps" becomes "mps:0"
        self.device = torch.empty(0, device=mm.get_torch_device()).device
        self.offload_device = mm.unet_offload_device()
        if self.offload_device.type != "cpu":  # --highvram keeps models where they compute
            self.offload_device = torch.device("cpu")
        self._previewer = _previewer(self.device) if with_preview else None
        self._in_use: list[Any] = []

    def free_bytes(self) -> int:
        """Bytes ComfyUI considers free on the compute device, less what --reserve-vram keeps."""
        if self.device.type == "privateuseone":  # DirectML tells nothing: try, and see
            return UNKNOWN_BYTES
        return int(self._mm.get_free_memory(self.device) - self._mm.extra_reserved_memory())

    def make_room(self, num_bytes: int) -> None:
        """Let ComfyUI unload other models until num_bytes are free."""
        kept = [self._mm.LoadedModel(patcher) for patcher in self._in_use]
        self._mm.free_memory(num_bytes, self.device, kept)

    def keep(self, patcher: Any) -> None:
        """Never unload this model to make room: the run needs it."""
        self._in_use.append(patcher)

    def progress(self, stage: str, done: int, total: int, preview: Tensor | None = None) -> None:
        """Move the bar of the node, draw a preview if the server wants one, write a status line."""
        now = time.monotonic()
        if stage not in self._started or done <= self._started[stage][1]:
            self._started[stage] = (now, done)
        image = None
        if preview is not None and self._previewer is not None:
            image = self._previewer.decode_latent_to_preview_image("JPEG", preview)
        self._bar.update_absolute(done, max(1, total), image)
        start, first = self._started[stage]
        self._say(status_line(stage, done, total, (now - start) / max(1, done - first)))

    def check_interrupt(self) -> None:
        """Raise ComfyUI's own exception if the user pressed Cancel."""
        self._mm.throw_exception_if_processing_interrupted()

    def _say(self, text: str) -> None:
        say_on_node(text, self._unique_id)


def say_on_node(text: str, unique_id: str | None) -> None:
    """Write a line on a node of the page that queued the prompt, if there is a page."""
    server = _server()
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
    server = _server()
    if server is not None and (client or not is_multi_user()):
        server.send_sync(name, data, client)


def prompt_client() -> str | None:
    """The page that queued the prompt that is being executed; None if no page did."""
    return getattr(_server(), "client_id", None)


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
    server = _server()
    if server is None or not is_multi_user():
        return ""
    return str(server.user_manager.get_request_user_id(request))


def prompt_user() -> str:
    """The user who queued the prompt that is being executed; "" if that is not known."""
    server = _server()
    if server is None or not is_multi_user():
        return ""
    running, _ = server.prompt_queue.get_current_queue_volatile()
    return str(running[0][3].get(_USER_MARK, "")) if running else ""


def remember_users() -> None:
    """Keep with each prompt who queued it: the server itself forgets it before it is executed."""
    server = _server()
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
    server = _server()
    if server is None:
        return
    thread = threading.Thread(target=work, name="wiro at start", daemon=True)
    server.loop.call_soon(thread.start)


def routes() -> Any:
    """The server's table of routes, or None in tests and import-only runs."""
    server = _server()
    return None if server is None else server.routes


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
    context, queue = get_executing_context(), getattr(_server(), "prompt_queue", None)
    if context is None or queue is None:
        return None
    for item in queue.get_current_queue_volatile()[0]:  # (number, prompt id, prompt, ...)
        if item[1] == context.prompt_id:
            graph: dict[str, Any] = item[2]
            return graph
    return None


def free_host_bytes() -> int:
    """Bytes of main memory that ComfyUI considers free."""
    import comfy.model_management as mm

    return int(mm.get_free_memory(torch.device("cpu")))


def video_of(path: Path) -> Any:
    """A file as core's VIDEO; saved in its own format it is copied, not encoded again."""
    from comfy_api.latest import InputImpl

    return InputImpl.VideoFromFile(str(path))


def video_bytes(video: Any, most: int) -> tuple[bytes, bool]:
    """A VIDEO as the bytes of a file, and whether these are a file's own, not encoded now.

    Args:
        most: of a larger one that many bytes are read, and one more.
    """
    from comfy_api.latest import InputImpl

    if isinstance(video, InputImpl.VideoFromFile) and not _is_trimmed(video):
        source = video.get_stream_source()
        if isinstance(source, io.BytesIO):
            return source.getbuffer()[: most + 1].tobytes(), True
        with open(source, "rb") as file:
            return file.read(most + 1), True
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "input.mp4"
        video.save_to(str(path))
        with path.open("rb") as file:
            return file.read(most + 1), False


def _is_trimmed(video: Any) -> bool:
    """Whether only a part of its file is meant; older versions of ComfyUI know no such thing."""
    window = getattr(video, "get_active_trim_window", None)
    return window is not None and tuple(window()) != (0.0, 0.0)


def status_line(stage: str, done: int, total: int, seconds_each: float) -> str:
    """What stands on the node: "step 12/30 · 3.4 s/step · about 61 s left"."""
    if stage == "load":
        scale, unit = (1e9, "GB") if total >= 1e8 else (1e6, "MB")
        size = f"{total / scale:.1f} {unit}"
        return f"loading {done / scale:.1f} of {size}" if done < total else f"loaded {size}"
    if stage == "encode":
        return "encoding" if done < total else "encoded"
    unit = "step" if stage == "sample" else "tile"
    if done > total:  # adaptive samplers take as many as they need
        return f"{unit} {done}"
    line = f"{unit} {done}/{total}"
    if done and done < total and seconds_each > 0:
        left = seconds_each * (total - done)
        short = f"{left:.0f} s" if left < 90 else f"{left / 60:.0f} min"
        each = f"{seconds_each:.1f}" if seconds_each >= 1 else f"{seconds_each:.2f}"
        line += f" · {each} s/{unit} · about {short} left"
    return line


def _server() -> Any:
    """The running server, or None in tests and import-only runs."""
    try:
        from server import PromptServer
    except ImportError:
        return None
    return getattr(PromptServer, "instance", None)


def _previewer(device: torch.device) -> Any:
    """ComfyUI's previewer with its own factors, or None where previews are switched off."""
    import comfy.latent_formats
    import latent_preview

    return latent_preview.get_previewer(device, comfy.latent_formats.HunyuanVideo())


# --- memory manager -----------------------------------------------------------------------------


def register(module: nn.Module, name: str, runtime: ComfyRuntime) -> LoadedModel:
    """Hand a module to ComfyUI's memory manager, idle until it is used."""
    from comfy.model_patcher import ModelPatcher

    patcher = ModelPatcher(
        module, load_device=runtime.device, offload_device=runtime.offload_device
    )
    return LoadedModel(module, patcher, name)


def bring_in(loaded: LoadedModel, runtime: ComfyRuntime, activation_bytes: int) -> None:
    """Load a model onto the device through the memory manager, if it fits as a whole.

    If not, it and everything else leaves the device: the engine then brings in its parts itself,
    as far as they fit, and takes them away afterwards.
    """
    import comfy.model_management as mm

    runtime.keep(loaded.patcher)
    if runtime.device.type != "cpu":
        away = missing_bytes(loaded.module, runtime.device)
        runtime.make_room(away + activation_bytes + RESERVE_BYTES)
        if runtime.free_bytes() < away + activation_bytes + RESERVE_BYTES:
            size = weight_bytes(loaded.module)
            log.info(
                "%s (%.1f GB) and %.1f GB of activations do not fit the card together: it works on "
                "a part at a time.",
                loaded.name, size / 1e9, activation_bytes / 1e9,
            )  # fmt: skip
            mm.unload_all_models()
            return
    mm.load_models_gpu([loaded.patcher], memory_required=activation_bytes, force_full_load=True)


# --- files --------------------------------------------------------------------------------------


def weight_files(kind: str) -> list[str]:
    """File names of a folder kind, as ComfyUI lists them."""
    import folder_paths

    names = folder_paths.get_filename_list(kind)
    return [name for name in names if name.lower().endswith(WEIGHT_SUFFIXES)]


def model_folders(kinds: tuple[str, ...], *required: str) -> dict[str, Path]:
    """Label -> folder, for the first-level folders of some kinds that hold all of `required`."""
    import folder_paths

    found: dict[str, Path] = {}
    for kind in kinds:
        for root in folder_paths.folder_names_and_paths.get(kind, ([], set()))[0]:
            if not os.path.isdir(root):
                continue
            try:
                with os.scandir(root) as entries:
                    folders = sorted(Path(entry.path) for entry in entries if entry.is_dir())
                for folder in folders:
                    if all(any(folder.glob(pattern)) for pattern in required):
                        found.setdefault(folder.name + FOLDER_MARK, folder)
            except OSError as error:  # one unreadable folder must not take the node away
                log.warning("Models in %s are not listed: %s.", root, error)
    return found


def check_choice(kind: str, name: object, choices: list[str]) -> bool | str:
    """VALIDATE_INPUTS of a loader: True, or the sentence that helps with a file that is not here.

    Args:
        name: of the file or folder a workflow asks for; None if it is linked.
        choices: what the loader lists.
    """
    if name is None or name in choices:
        return True
    name = str(name)
    if name.lower().endswith(".gguf"):
        return f"{name} is a GGUF file, which is not supported: take the fp8 .safetensors file."
    # a workflow from another machine may only differ in its sub-folder or its kind of slash
    basename = PureWindowsPath(name).name
    twins = [choice for choice in choices if PureWindowsPath(choice).name == basename]
    if twins:
        return f"{name} is not here, but {twins[0]} is: choose that one."
    return _not_here(kind, name)


def _not_here(kind: str, name: str) -> str:
    if name.endswith(FOLDER_MARK):
        kind, name = "diffusers", name.removesuffix(FOLDER_MARK)
    return (
        f"{name} is not in models/{kind}: put it there (from {LINKS[kind]}) and press R to "
        "refresh, or choose another one."
    )


def resolve(kind: str, name: str, folders: dict[str, Path]) -> Path:
    """The path of a chosen file or folder.

    Raises:
        CheckpointError: it is not there (any more); names the folder and where to get it.
    """
    import folder_paths

    if name in folders:
        return folders[name]
    path = folder_paths.get_full_path(kind, name)
    if path is None:
        raise CheckpointError(_not_here(kind, name))
    return Path(path)


def state_folder() -> Path:
    """Our folder in the user directory, which may not be there yet.

    It begins with two underscores: ComfyUI's routes do not serve such folders.
    """
    import folder_paths

    return Path(folder_paths.get_user_directory()) / "__skyreels"


def output_folder() -> Path:
    """Where the page looks for results."""
    import folder_paths

    return Path(folder_paths.get_output_directory())


def input_files() -> list[str]:
    """Names of the files directly in the input folder."""
    import folder_paths

    try:
        with os.scandir(folder_paths.get_input_directory()) as entries:
            return sorted(entry.name for entry in entries if entry.is_file())
    except OSError as error:  # an unreadable folder must not take the node away
        log.warning("Files of the input folder are not listed: %s.", error)
        return []


def input_file(name: str) -> Path:
    """The path of a file in the input folder; it may be missing."""
    import folder_paths

    return Path(folder_paths.get_annotated_filepath(name))


def resume_folder() -> Path:
    """Folder of saved steps in the user directory; steps nobody came back for are removed."""
    folder = state_folder() / "resume"
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.glob("*.safetensors"):
        if time.time() - file.stat().st_mtime > RESUME_DAYS * 86_400:
            file.unlink(missing_ok=True)
    return folder


# --- core samplers ------------------------------------------------------------------------------


def core_solver(sampler: Any, shift: float, seed: int) -> Solver:
    """A core SAMPLER as a solver of the engine.

    Core's samplers are k-diffusion functions: they ask a model for the denoised latents, and some
    look up the kind of schedule behind it. A small object of that shape stands in for core's model.

    Args:
        sampler: what a SAMPLER socket carries.
        shift: of the schedule, for samplers that compute sigmas of their own.
        seed: of the noise that ancestral and SDE samplers add.
    Raises:
        OptionError: a sampler without a k-diffusion function.
    """
    import comfy.model_sampling

    function = getattr(sampler, "sampler_function", None)
    if function is None:
        raise OptionError(
            f"{type(sampler).__name__} is not a k-diffusion sampler: use KSamplerSelect, or "
            "disconnect it for Euler."
        )

    class Flow(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
        pass

    model_sampling = Flow()
    model_sampling.set_parameters(shift=shift)

    def solver(velocity: Velocity, latents: Tensor, sigmas: Tensor, on_step: OnStep) -> Tensor:
        model = _DenoiserOfFlow(velocity, model_sampling)

        def callback(state: dict[str, Any]) -> None:
            on_step(state["i"], state["x"], state["denoised"])

        extra_args = {"model_options": {}, "seed": seed, "denoise_mask": None}
        try:
            # a copy: they are the user's SIGMAS, and samplers may write into them
            return function(
                model, latents, sigmas.clone(), extra_args=extra_args, callback=callback,
                disable=True, **sampler.extra_options,
            )  # fmt: skip
        except AttributeError as error:
            raise OptionError(
                f"Sampler {getattr(function, '__name__', function)} wants more of core's model "
                f"than SkyReels has ({error}): choose another in KSamplerSelect."
            ) from error

    return solver


class _DenoiserOfFlow:
    """Denoised latents from a velocity, with the attributes core's samplers look up."""

    def __init__(self, velocity: Velocity, model_sampling: Any) -> None:
        self._velocity = velocity
        self._said = False
        patcher = SimpleNamespace(get_model_object={"model_sampling": model_sampling}.get)
        base = SimpleNamespace(model_sampling=model_sampling)
        self.inner_model = SimpleNamespace(
            inner_model=base, model_sampling=model_sampling, model_patcher=patcher
        )

    def __call__(
        self, x: Tensor, sigma: Tensor, model_options: dict[str, Any] | None = None, **_: Any
    ) -> Tensor:
        level = sigma.reshape(-1)[0]
        guided, negative = self._velocity(x, level)
        denoised = x - level * guided
        functions = (model_options or {}).get("sampler_post_cfg_function", [])
        if functions and negative is None and not self._said:
            log.warning("CFG++ samplers need the negative prediction: a step without it is plain.")
            self._said = True
        unwanted = denoised if negative is None else x - level * negative
        for function in functions:  # CFG++ samplers collect the negative prediction this way
            denoised = function({"denoised": denoised, "uncond_denoised": unwanted, "input": x,
                                 "sigma": sigma})  # fmt: skip
        return denoised


@contextmanager
def plain_tensors() -> Iterator[None]:
    """Leave ComfyUI's inference mode while modules are built: their weights outlive the prompt."""
    with torch.inference_mode(False), torch.no_grad():
        yield
