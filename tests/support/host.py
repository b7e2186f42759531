"""Stand-ins for the parts of ComfyUI that `nodes/` uses, for tests without ComfyUI.

`stand_ins` makes modules of ComfyUI's names for sys.modules; `Host` is what they share and what a
test looks at. `run_prompt` executes an API prompt the way ComfyUI does: validation first, then
every node after the nodes it depends on. What is checked here is checked again in a real ComfyUI
where there is one (tests/adapters/test_real_comfyui.py).
"""

import asyncio
import inspect
import json
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

CORE_NODES = json.loads((Path(__file__).parent / "core_nodes.json").read_text(encoding="utf-8"))
SUFFIXES = (".safetensors", ".sft", ".pt", ".pth", ".ckpt", ".bin")
MODULES = (
    "folder_paths",
    "server",
    "latent_preview",
    "comfy",
    "comfy.cli_args",
    "comfy.utils",
    "comfy.model_management",
    "comfy.model_patcher",
    "comfy.model_sampling",
    "comfy.latent_formats",
    "comfy_api",
    "comfy_api.latest",
    "comfy_execution",
    "comfy_execution.graph_utils",
    "comfy_execution.progress",
    "comfy_execution.utils",
)


class InterruptProcessingException(Exception):  # noqa: N818 - ComfyUI's own name
    """What ComfyUI raises when the user pressed Cancel."""


@dataclass
class Host:
    """The state behind the stand-ins: what the program has, and what was asked of it."""

    root: Path
    free_bytes: int = 24 * 1024**3
    cancel_after: int | None = None
    checks: int = 0
    progress: list[tuple[int, int]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    latent_formats: list[Any] = field(default_factory=list)
    previews: list[Any] = field(default_factory=list)
    loaded: list[Any] = field(default_factory=list)
    loads: list[dict[str, Any]] = field(default_factory=list)
    #: loaded models of other nodes, each with `device` and `model_loaded_memory()`
    others: list[Any] = field(default_factory=list)
    asked: list[tuple[int, list[Any]]] = field(default_factory=list)
    reserved_bytes: int = 0
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    is_cancelled: bool = False
    #: the page and the user of the running prompt; to whom events and texts went
    client: str | None = "page"
    user: str = ""
    is_multi_user: bool = False
    sent_to: list[str | None] = field(default_factory=list)
    #: as --preview-method, with its decoder at hand
    preview_method: str = "latent2rgb"
    #: the prompt that runs, in API format
    graph: dict[str, Any] | None = None

    def folder(self, kind: str) -> Path:
        path = self.root / "models" / kind
        path.mkdir(parents=True, exist_ok=True)
        return path

    def free_memory(self, num_bytes: int, device: torch.device, keep_loaded: Any = ()) -> None:
        """Models leave only for more than any device has; what was asked for is noted."""
        self.asked.append((num_bytes, list(keep_loaded)))
        if num_bytes >= 2**50:
            self.loaded[:] = [model for model in self.loaded if model in keep_loaded]

    def check(self) -> None:
        self.checks += 1
        if self.is_cancelled:  # the first asker clears the flag
            self.is_cancelled = False
            raise InterruptProcessingException
        if self.cancel_after is not None and self.checks > self.cancel_after:
            self.cancel_after = None  # the first asker clears the flag
            raise InterruptProcessingException


class ExecutionBlocker:
    """An output that stops what depends on it."""

    def __init__(self, message: str | None) -> None:
        self.message = message


class VideoFromFile:
    """A VIDEO that lies in a file."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.window = (0.0, 0.0)

    def get_stream_source(self) -> Any:
        return self.file

    def get_active_trim_window(self) -> tuple[float, float]:
        return self.window

    def get_components(self) -> Any:
        return SimpleNamespace(images=torch.zeros(2, 4, 4, 3), frame_rate=24, audio=None)

    def save_to(self, path: str) -> None:
        Path(path).write_bytes(b"\0\0\0\x18ftypisom a part")


class VideoFromComponents:
    """A VIDEO of frames and sound; each encoding of it gives other bytes."""

    encoded = 0

    def __init__(self, images: torch.Tensor, audio: Any = None, frame_rate: float = 24.0) -> None:
        self.images, self.audio, self.frame_rate = images, audio, frame_rate

    def get_components(self) -> Any:
        return self

    def save_to(self, path: str) -> None:
        VideoFromComponents.encoded += 1
        Path(path).write_bytes(b"\0\0\0\x18ftypisom" + str(self.encoded).encode())


class ModelPatcher:
    """A handle on a module; loading and unloading only leaves a record."""

    def __init__(self, model: Any, load_device: torch.device, offload_device: torch.device) -> None:
        self.model, self.load_device, self.offload_device = model, load_device, offload_device
        self.size = 0

    def model_size(self) -> int:
        if not self.size:
            self.size = sum(tensor.nbytes for tensor in self.model.state_dict().values())
        return self.size

    def loaded_size(self) -> int:
        return int(getattr(self.model, "model_loaded_weight_memory", 0))


class NamedPatcher(str):
    """A handle that is told by its name."""

    def model_size(self) -> int:
        return 0

    def loaded_size(self) -> int:
        return 0


class ProgressBar:
    """Records what is reported."""

    host: Host

    def __init__(self, total: int, node_id: str | None = None) -> None:
        self.node_id = node_id

    def update_absolute(self, value: int, total: int, preview: Any = None) -> None:
        self.host.check()
        self.host.progress.append((value, total))
        if preview is not None:
            self.host.previews.append(preview)


class LatentPreviewer:
    """Returns the shape of what it is asked to draw."""

    def decode_latent_to_preview_image(self, kind: str, latents: torch.Tensor) -> Any:
        return (kind, tuple(latents.shape), None)


class Latent2RGBPreviewer(LatentPreviewer):
    """The one that needs no decoder."""


def get_previewer(method: str) -> LatentPreviewer | None:
    """The previewer of a method, as `--preview-method` names it."""
    return {"none": None, "latent2rgb": Latent2RGBPreviewer(), "taesd": LatentPreviewer()}[method]


def stand_ins(host: Host) -> dict[str, ModuleType]:
    """Name -> module, to be put in sys.modules for a while."""
    modules = {name: ModuleType(name) for name in MODULES}
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    cpu = torch.device("cpu")

    paths: Any = modules["folder_paths"]
    paths.__file__ = str((host.root / "folder_paths").with_suffix(".py"))
    paths.folder_names_and_paths = {
        kind: ([str(host.folder(kind))], set(SUFFIXES))
        for kind in ("diffusion_models", "vae", "text_encoders", "diffusers", "loras")
    }
    paths.get_filename_list = lambda kind: sorted(
        path.relative_to(root).as_posix()
        for root in paths.folder_names_and_paths[kind][0]
        for path in Path(root).rglob("*")
        if path.suffix in paths.folder_names_and_paths[kind][1]
    )
    paths.get_full_path = lambda kind, name: (
        str(host.folder(kind) / name) if (host.folder(kind) / name).is_file() else None
    )
    paths.get_user_directory = lambda: str(host.root / "user")
    paths.get_output_directory = lambda: str(host.root / "output")
    paths.get_input_directory = lambda: str(host.root / "input")
    paths.get_annotated_filepath = lambda name: str(host.root / "input" / name)
    (host.root / "input").mkdir(parents=True, exist_ok=True)

    management: Any = modules["comfy.model_management"]
    management.InterruptProcessingException = InterruptProcessingException
    management.throw_exception_if_processing_interrupted = host.check
    management.get_torch_device = management.unet_offload_device = lambda: cpu
    management.get_free_memory = lambda device: host.free_bytes
    management.LoadedModel = lambda patcher: patcher
    management.free_memory = host.free_memory
    management.extra_reserved_memory = lambda: host.reserved_bytes

    def load_models_gpu(models: list[Any], **options: Any) -> None:
        host.loaded.extend(models)
        host.loads.append(options)

    management.load_models_gpu = load_models_gpu
    management.current_loaded_models = host.others

    bar = type("ProgressBar", (ProgressBar,), {"host": host})
    modules["comfy.utils"].ProgressBar = bar  # type: ignore[attr-defined]
    modules["comfy.model_patcher"].ModelPatcher = ModelPatcher  # type: ignore[attr-defined]
    sampling: Any = modules["comfy.model_sampling"]
    sampling.CONST = type("CONST", (), {})
    sampling.ModelSamplingDiscreteFlow = type(
        "ModelSamplingDiscreteFlow",
        (),
        {"set_parameters": lambda self, shift: setattr(self, "shift", shift)},
    )
    modules["comfy.latent_formats"].HunyuanVideo = type(  # type: ignore[attr-defined]
        "HunyuanVideo",
        (),
        {"latent_rgb_factors": [[0.01 * i, -0.02, 0.03] for i in range(16)],
         "latent_rgb_factors_bias": [0.1, -0.2, 0.3]},
    )  # fmt: skip
    preview: Any = modules["latent_preview"]
    preview.MAX_PREVIEW_RESOLUTION = 512
    preview.Latent2RGBPreviewer = Latent2RGBPreviewer

    def previewer_of(device: Any, latent_format: Any) -> Any:
        host.latent_formats.append(latent_format)
        return get_previewer(host.preview_method)

    preview.get_previewer = previewer_of
    latest: Any = modules["comfy_api.latest"]
    latest.InputImpl = SimpleNamespace(
        VideoFromFile=VideoFromFile, VideoFromComponents=VideoFromComponents
    )
    graph_utils: Any = modules["comfy_execution.graph_utils"]
    graph_utils.ExecutionBlocker = ExecutionBlocker
    modules["comfy.cli_args"].args = _Arguments(host)  # type: ignore[attr-defined]
    modules["server"].PromptServer = SimpleNamespace(instance=PromptServer(host))  # type: ignore[attr-defined]
    dynamic = SimpleNamespace(
        get_display_node_id=lambda node: node.partition(".")[0],
        get_node=lambda node: {"class_type": f"class of {node}"},
    )
    state = SimpleNamespace(prompt_id="prompt 1", dynprompt=dynamic)
    modules["comfy_execution.progress"].get_progress_state = lambda: state  # type: ignore[attr-defined]
    utils: Any = modules["comfy_execution.utils"]
    context = SimpleNamespace(prompt_id="prompt 1", node_id="", list_index=None)
    utils.get_executing_context = lambda: None if host.graph is None else context
    return modules


class _Arguments:
    def __init__(self, host: Host) -> None:
        self._host = host

    @property
    def multi_user(self) -> bool:
        return self._host.is_multi_user


class PromptServer:
    """The part of the server that nodes meet while a prompt is executed."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self.prompt_queue = SimpleNamespace(get_current_queue_volatile=self._queue)
        self.user_manager = SimpleNamespace(get_request_user_id=self._user_of)

    def _queue(self) -> tuple[list[Any], list[Any]]:
        data = {"skyreels_user": self._host.user}
        return [(0, "prompt 1", self._host.graph, data, [])], []

    @property
    def client_id(self) -> str | None:
        return self._host.client

    def _user_of(self, request: Any) -> str:
        user = request.headers["comfy-user"]
        if user not in ("anna", "bert"):
            raise KeyError(user)
        return str(user)

    def send_progress_text(self, text: str, node_id: str, sid: str | None = None) -> None:
        self._host.texts.append(text)
        self._host.sent_to.append(sid)

    def send_sync(self, event: str, data: dict[str, Any], sid: str | None = None) -> None:
        self._host.events.append((event, data))
        self._host.sent_to.append(sid)


# --- executing a prompt -------------------------------------------------------------------------


def made_up_conditioning(text: str, width: int, pooled: int) -> list[list[Any]]:
    """CONDITIONING laid out as core's hunyuan_video CLIP does, with numbers made from the text."""
    generator = torch.Generator().manual_seed(sum(text.encode()) + 1)
    states = torch.randn(1, len(text.split()) + 1, width, generator=generator)
    return [[states, {"pooled_output": torch.randn(1, pooled, generator=generator)}]]


def core_node(class_type: str, inputs: dict[str, Any], text_sizes: tuple[int, int]) -> tuple:
    """What the core nodes of our workflows return, near enough for ours."""
    if class_type == "LoadImage":
        return torch.rand(1, 48, 80, 3), torch.zeros(1, 48, 80)
    if class_type == "EmptyHunyuanLatentVideo":
        frames = (inputs["length"] - 1) // 4 + 1
        size = (inputs["batch_size"], 16, frames, inputs["height"] // 8, inputs["width"] // 8)
        return ({"samples": torch.zeros(size)},)
    if class_type == "EmptyImage":
        colour = [inputs["color"] >> shift & 255 for shift in (16, 8, 0)]
        size = (inputs["batch_size"], inputs["height"], inputs["width"], 3)
        return (torch.tensor(colour).div(255).expand(size).clone(),)
    if class_type == "ImageCompositeMasked":
        image, source = inputs["destination"].clone(), inputs["source"]
        x, y = inputs["x"], inputs["y"]
        image[:, y : y + source.shape[1], x : x + source.shape[2]] = source
        return (image,)
    if class_type == "ImageBatch":
        return (torch.cat([inputs["image1"], inputs["image2"]]),)
    if class_type == "DualCLIPLoader":
        assert inputs["type"] == "hunyuan_video"
        return ("clip",)
    if class_type == "CLIPTextEncode":
        return (made_up_conditioning(inputs["text"], *text_sizes),)
    if class_type == "CreateVideo":
        return ((inputs["images"], inputs["fps"]),)
    if class_type == "PrimitiveStringMultiline":
        return (inputs["value"],)
    if class_type == "ImageStitch":
        side = 1 if inputs.get("direction") == "down" else 2
        return (torch.cat([inputs["image1"], inputs["image2"]], dim=side),)
    if class_type == "ImageBlend":
        assert inputs["blend_mode"] == "difference"
        return (inputs["image1"] - inputs["image2"],)
    if class_type == "ImageFromBatch":
        index = min(inputs["batch_index"], len(inputs["image"]) - 1)
        return (inputs["image"][index : index + 1],)
    if class_type in ("PreviewAny", "PreviewImage"):
        return ()
    if class_type == "SaveVideo":
        return ()
    raise AssertionError(f"unknown core node {class_type}")


def validate(prompt: dict[str, Any], classes: dict[str, Any]) -> dict[str, str]:
    """Node id -> what VALIDATE_INPUTS says against its widget values."""
    problems = {}
    for key, node in prompt.items():
        function = getattr(classes.get(node["class_type"]), "VALIDATE_INPUTS", None)
        if function is None:
            continue
        names = inspect.signature(function).parameters
        constants = {k: v for k, v in node["inputs"].items() if not isinstance(v, list)}
        verdict = function(**{k: v for k, v in constants.items() if k in names})
        if verdict is not True:
            problems[key] = verdict
    return problems


def run_prompt(
    prompt: dict[str, Any], classes: dict[str, Any], text_sizes: tuple[int, int] = (4096, 768)
) -> dict[str, tuple]:
    """Node id -> outputs, after a validation that must find nothing.

    A list of a node that gives lists is handed on as it is: only core nodes stand behind one.
    """
    assert validate(prompt, classes) == {}
    prompt = dict(prompt)
    results: dict[str, tuple] = {}

    def result(key: str) -> tuple:
        if key not in results:
            node = prompt[key]
            inputs = {
                name: result(value[0])[value[1]] if isinstance(value, list) else value
                for name, value in node["inputs"].items()
            }
            class_type = node["class_type"]
            if class_type in classes:
                cls = classes[class_type]
                hidden = {"unique_id": key, "graph": prompt}
                inputs |= {k: hidden[k] for k in cls.INPUT_TYPES().get("hidden", {})}
                if getattr(cls, "INPUT_IS_LIST", False):
                    inputs = {name: [value] for name, value in inputs.items()}
                with torch.inference_mode():  # as ComfyUI does
                    outputs = getattr(cls(), cls.FUNCTION)(**inputs)
                    if asyncio.iscoroutine(outputs):
                        outputs = asyncio.run(outputs)
                if isinstance(outputs, dict) and "expand" in outputs:  # nodes in place of the node
                    prompt.update(outputs["expand"])
                    outputs = tuple(
                        result(value[0])[value[1]] if isinstance(value, list) else value
                        for value in outputs["result"]
                    )
                results[key] = outputs
            else:
                results[key] = core_node(class_type, inputs, text_sizes)
        return results[key]

    for key in list(prompt):
        result(key)
    return results
