"""Nodes that run models on wiro.ai.

The key is in the environment or in the user's folder, never in a widget.
"""

import io
import json
import logging
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...skyreels.errors import ShapeError
from ...skyreels.image import FITS, fit_image
from ...skyreels.text.embeds import with_fps_prefix
from ...wiro_api.schema import SIZES
from .. import host
from .inputs import PICTURES, SOCKETS, parse_places, parts_of, place, slots_of
from .run import Result, RunView, check_fields, collect, fingerprint, remember, run_model, wanted

if TYPE_CHECKING:
    from ...wiro_api.transport import FilePart

logger = logging.getLogger("skyreels.nodes.remote.nodes")

ORIENTATION = "by orientation"
FROM_IMAGE = "the image"
#: default of Wiro Run Model's image_parameter
IMAGE_PARAMETER = "inputImage"


def common_widgets() -> dict[str, Any]:
    return {
        "take": (
            "INT",
            {
                "default": 1,
                "min": 1,
                "max": 1_000_000,
                "tooltip": "The service draws its own noise. The same inputs with the same number "
                "give the video that was paid for before; another number, as 2, pays for another.",
            },
        ),
        "wait_when_busy": (
            "BOOLEAN",
            {
                "default": False,
                "tooltip": "If as many tasks run as your balance allows (code 96), wait for a "
                "place and try again; otherwise it is an error.",
            },
        ),
        "timeout_minutes": (
            "FLOAT",
            {
                "default": 40.0,
                "min": 0.1,
                "max": 1440.0,
                "step": 0.1,
                "advanced": True,
                "tooltip": "Longest wait for the end, in minutes (40 is the service's own). The "
                "task then goes on at Wiro, and queueing again goes on waiting.",
            },
        ),
    }


class WiroRemoteI2V:
    CATEGORY = "SkyReels/remote"
    DESCRIPTION = (
        "Makes the video on wiro.ai with SkyReels-V1 instead of on this machine. Costs money: the "
        "price is shown before and the cost after, and Cancel stops the remote task. Needs a key "
        "(WIRO_API_KEY, or Settings > SkyReels > Wiro)."
    )
    FUNCTION = "generate"
    RETURN_TYPES = ("IMAGE", "VIDEO", "STRING", "STRING")
    RETURN_NAMES = ("images", "video", "task_id", "receipt")
    OUTPUT_TOOLTIPS = (
        "The frames, for CreateVideo at 24 fps or anything else. Decoded only if connected.",
        "The video as the service made it; SaveVideo copies it.",
        "The task's id at Wiro, for Wiro Task Result.",
        "JSON: model, parameters, task id, cost in US dollars, seconds, files.",
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "image": (
                    "IMAGE",
                    {"tooltip": "The first frame; of a batch the first picture is used."},
                ),
                "prompt": (
                    "STRING",
                    {
                        "multiline": True,
                        "dynamicPrompts": True,
                        "default": "",
                        "tooltip": "What happens in the video. Must not be empty.",
                    },
                ),
                "size": (
                    [ORIENTATION, *SIZES],
                    {
                        "default": ORIENTATION,
                        "tooltip": "Width x height. By orientation: 544x960 for a picture that is "
                        "higher than wide, else 960x544.",
                    },
                ),
                "fit": (
                    list(FITS),
                    {
                        "default": "crop",
                        "tooltip": "crop cuts the centre to the video's proportions (as the "
                        "authors do), pad adds black bars (letterbox), stretch distorts.",
                    },
                ),
                "num_frames": (
                    "INT",
                    {
                        "default": 97,
                        "min": 5,
                        "max": 289,
                        "step": 4,
                        "tooltip": "4k+1 frames at 24 a second: 97 is four seconds. Other numbers "
                        "are rounded up to the next 4k+1.",
                    },
                ),
                "steps": (
                    "INT",
                    {
                        "default": 30,
                        "min": 1,
                        "max": 100,
                        "tooltip": "Sampling steps; the authors use 30.",
                    },
                ),
                "cfg": (
                    "FLOAT",
                    {
                        "default": 6.0,
                        "min": 1.0,
                        "max": 30.0,
                        "step": 0.1,
                        "tooltip": "How closely the prompt is followed; the authors use 6.",
                    },
                ),
            },
            "optional": {
                "negative_prompt": (
                    "STRING",
                    {
                        "multiline": True,
                        "default": "",
                        "tooltip": "What the video should not show; may be empty.",
                    },
                ),
                "add_fps_prefix": (
                    "BOOLEAN",
                    {
                        "default": True,
                        "tooltip": "Put 'FPS-24, ' in front, as in training, unless the prompt "
                        "names a frame rate itself.",
                    },
                ),
                **common_widgets(),
            },
            "hidden": {"unique_id": "UNIQUE_ID", "graph": "PROMPT"},
        }

    @classmethod
    def IS_CHANGED(cls, unique_id: str | None = None, **_: Any) -> str:
        return fingerprint(unique_id, cls.RETURN_NAMES)

    @classmethod
    def VALIDATE_INPUTS(cls, prompt: str | None = None) -> bool | str:
        if prompt is not None and not prompt.strip():
            return "The prompt is empty: say what happens in the video. Nothing was sent."
        return True

    async def generate(
        self,
        image: Tensor,
        prompt: str,
        size: str,
        fit: str,
        num_frames: int,
        steps: int,
        cfg: float,
        negative_prompt: str = "",
        add_fps_prefix: bool = True,
        take: int = 1,
        wait_when_busy: bool = False,
        timeout_minutes: float = 40.0,
        unique_id: str | None = None,
        graph: dict[str, Any] | None = None,
    ) -> tuple[Any, ...]:
        from ...wiro_api.schema import SKYREELS

        values, size = skyreels_values(
            image, prompt, size, num_frames, steps, cfg, negative_prompt, add_fps_prefix
        )
        result = await run_model(
            SKYREELS, values, lambda: [("inputImage", png_part(image, size, fit))], take=take,
            wait_when_busy=wait_when_busy, timeout_minutes=timeout_minutes, unique_id=unique_id,
            wants=wanted(graph, unique_id, self.RETURN_NAMES),
        )  # fmt: skip
        remember(graph, unique_id, result)
        return or_blocked(result.images), video_output(result), result.taskid, result.receipt


class WiroRunModel:
    CATEGORY = "SkyReels/remote"
    DESCRIPTION = (
        "Runs any model on wiro.ai by its owner/project, as the address of its page says. Costs "
        "money: the price is shown before if the service tells it, and Cancel stops the task."
    )
    FUNCTION = "run"
    RETURN_TYPES = ("IMAGE", "VIDEO", "STRING", "STRING", "STRING", "MASK", "AUDIO", "STRING")
    RETURN_NAMES = ("images", "video", "text", "task_id", "receipt", "mask", "audio", "files")
    OUTPUT_TOOLTIPS = (
        "Frames of the first video, else all pictures. Decoded only if connected.",
        "The first video as the service made it, if the model makes any.",
        "What a model that writes has written, or what is in its small text files.",
        "The task's id at Wiro, for Wiro Task Result.",
        "JSON: model, parameters, task id, cost in US dollars, seconds, files.",
        "1 where the pictures are transparent, as of Load Image; empty where none is.",
        "The first sound file, else the sound of the first video.",
        "JSON list of all files as they came, as paths below the output folder.",
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": (
                    "STRING",
                    {
                        "default": "wiro/SkyReels-V1",
                        "tooltip": "owner/project, as in the address of the model's page.",
                    },
                ),
                "parameters": (
                    "STRING",
                    {
                        "multiline": True,
                        "default": '{\n  "prompt": ""\n}',
                        "tooltip": "JSON object of parameter names and values, as the model's page "
                        "lists them; the model's defaults fill the rest. No key belongs here.",
                    },
                ),
            },
            "optional": {
                "image": (
                    "IMAGE",
                    {"tooltip": "A picture for image_parameter; of a batch the first is used."},
                ),
                "image_parameter": (
                    "STRING",
                    {
                        "default": IMAGE_PARAMETER,
                        "tooltip": "The model's parameter that takes the picture; if the model has "
                        "no inputImage, its first one for pictures.",
                    },
                ),
                **common_widgets(),
                **{
                    name: (
                        "IMAGE",
                        {
                            "tooltip": "A further picture, or a batch for a parameter that takes "
                            "several; see file_parameters."
                        },
                    )
                    for name in PICTURES[1:]
                },
                "video": (
                    "VIDEO",
                    {
                        "tooltip": "A film for the model, sent as the file it is (also what is "
                        "written in it, as its workflow); at most 100 MB."
                    },
                ),
                "audio": (
                    "AUDIO",
                    {"tooltip": "A sound for the model, sent as WAV of 16 bits; at most 100 MB."},
                ),
                "file_parameters": (
                    "STRING",
                    {
                        "default": "",
                        "tooltip": "Which input feeds which parameter: image_2=lastImage, "
                        "video=inputVideo. What is not named goes where the model's list says, in "
                        "order.",
                    },
                ),
            },
            "hidden": {"unique_id": "UNIQUE_ID", "graph": "PROMPT"},
        }

    @classmethod
    def IS_CHANGED(cls, unique_id: str | None = None, **_: Any) -> str:
        return fingerprint(unique_id, cls.RETURN_NAMES)

    @classmethod
    def VALIDATE_INPUTS(
        cls,
        parameters: str | None = None,
        image_parameter: str | None = None,
        file_parameters: str | None = None,
    ) -> bool | str:
        from ...wiro_api.errors import ConfigError

        try:
            places = parse_places(file_parameters or "")
            names = [image_parameter or "", *places.values()]
            check_fields([parse_parameters(parameters or ""), dict.fromkeys(names)])
        except (ValueError, ConfigError) as error:
            return str(error)
        return True

    async def run(
        self,
        model: str,
        parameters: str,
        image: Tensor | None = None,
        image_parameter: str = IMAGE_PARAMETER,
        take: int = 1,
        wait_when_busy: bool = False,
        timeout_minutes: float = 40.0,
        image_2: Tensor | None = None,
        image_3: Tensor | None = None,
        image_4: Tensor | None = None,
        video: Any = None,
        audio: dict[str, Any] | None = None,
        file_parameters: str = "",
        unique_id: str | None = None,
        graph: dict[str, Any] | None = None,
    ) -> tuple[Any, ...]:
        from ...wiro_api.client import Model

        values, places = parse_parameters(parameters), parse_places(file_parameters)
        check_fields(dict.fromkeys([image_parameter, *places.values()]))
        all_inputs = (image, image_2, image_3, image_4, video, audio)
        connected = {
            socket: value
            for socket, value in zip(SOCKETS, all_inputs, strict=True)
            if value is not None
        }
        result = await run_model(
            Model.parse(model), values, list, take=take, wait_when_busy=wait_when_busy,
            timeout_minutes=timeout_minutes, unique_id=unique_id,
            wants=wanted(graph, unique_id, self.RETURN_NAMES),
            files_for=lambda items: _files_for(
                items, values, connected, places, image_parameter.strip()
            ),
        )  # fmt: skip
        return _outputs(remember(graph, unique_id, result))


class WiroTaskResult:
    CATEGORY = "SkyReels/remote"
    DESCRIPTION = (
        "Brings home the result of a task that was started earlier, here or elsewhere; waits if it "
        "still runs. Costs nothing. Cancel stops the wait, not the task."
    )
    FUNCTION = "collect"
    RETURN_TYPES = ("IMAGE", "VIDEO", "STRING", "STRING", "STRING", "MASK", "AUDIO", "STRING")
    RETURN_NAMES = ("images", "video", "text", "task_id", "receipt", "mask", "audio", "files")
    OUTPUT_TOOLTIPS = WiroRunModel.OUTPUT_TOOLTIPS

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "task": (
                    "STRING",
                    {
                        "default": "",
                        "tooltip": "The task's id (digits), from the Wiro panel, a receipt or an "
                        "error. token:... works too, but is saved with the workflow, and lets "
                        "anyone who has it look at the task: prefer the id.",
                    },
                ),
            },
            "optional": {"timeout_minutes": common_widgets()["timeout_minutes"]},
            "hidden": {"unique_id": "UNIQUE_ID", "graph": "PROMPT"},
        }

    @classmethod
    def IS_CHANGED(cls, unique_id: str | None = None, **_: Any) -> str:
        return fingerprint(unique_id, cls.RETURN_NAMES)

    async def collect(
        self,
        task: str,
        timeout_minutes: float = 40.0,
        unique_id: str | None = None,
        graph: dict[str, Any] | None = None,
    ) -> tuple[Any, ...]:
        over = threading.Event()
        wants = wanted(graph, unique_id, self.RETURN_NAMES)
        result = await host.in_thread(
            lambda: collect(RunView(unique_id, over), task, timeout_minutes, wants), over
        )
        return _outputs(remember(graph, unique_id, result))


class WiroUploadFile:
    CATEGORY = "SkyReels/remote"
    DESCRIPTION = (
        "Uploads a picture, or a file of the input folder, to your files at Wiro once, and gives "
        "its address for parameters of models. Costs nothing."
    )
    FUNCTION = "upload"
    RETURN_TYPES = ("STRING", "STRING")
    RETURN_NAMES = ("url", "file_id")
    OUTPUT_TOOLTIPS = ("The file's address, for a model's ...Url parameter.", "Its id at Wiro.")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "file": (
                    [FROM_IMAGE, *host.input_files()],
                    {"tooltip": "A file of ComfyUI's input folder, at most 100 MB, or the image."},
                ),
                "folder": (
                    "STRING",
                    {
                        "default": "",
                        "tooltip": "Name of a folder to make for it (letters, digits, _ and -); "
                        "empty for none.",
                    },
                ),
            },
            "optional": {
                "image": ("IMAGE", {"tooltip": "The picture, if file is 'the image'."}),
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    async def upload(
        self,
        file: str,
        folder: str,
        image: Tensor | None = None,
        unique_id: str | None = None,
    ) -> tuple[str, str]:
        from ...wiro_api.errors import ConfigError
        from ...wiro_api.files import read_part

        over = threading.Event()

        def work() -> tuple[str, str]:
            window = RunView(unique_id, over)
            if file != FROM_IMAGE:
                if file not in host.input_files():  # a link brings names that no list was asked for
                    raise ConfigError(f"There is no file {file[:80]!r} in the input folder.")
                part = read_part(host.input_file(file))
            elif image is not None:
                part = png_part(image)
            else:
                raise ConfigError("No image is connected: connect one, or choose a file.")
            with window.make_client() as client:
                window.check()
                window.say(f"uploading {len(part[1]) / 1e6:.1f} MB")
                made = str(client.create_folder(folder.strip())["id"]) if folder.strip() else ""
                record = client.upload(part, made)
            window.say("uploaded", 1.0)
            return str(record.get("url") or ""), str(record.get("id") or "")

        return await host.in_thread(work, over)


def skyreels_values(
    image: Tensor,
    prompt: str,
    size: str,
    num_frames: int,
    steps: int,
    cfg: float,
    negative_prompt: str,
    add_fps_prefix: bool,
) -> tuple[dict[str, Any], str]:
    """Parameters of SkyReels-V1 for a node's widgets, and the size that its picture is sent in.

    Raises:
        ConfigError: the prompt is empty, or there are too few frames.
    """
    from ...wiro_api.errors import ConfigError

    if not prompt.strip():
        raise ConfigError("The prompt is empty: say what happens in the video.")
    if size == ORIENTATION:
        is_upright = image.ndim == 4 and image.shape[1] > image.shape[2]
        size = SIZES[int(is_upright)]
    values = values_of_widgets(
        prompt=prompt, size=size, num_frames=num_frames, steps=steps, cfg=cfg,
        negative_prompt=negative_prompt, add_fps_prefix=add_fps_prefix,
    )  # fmt: skip
    if values["numFrames"] != num_frames:
        frames = values["numFrames"]
        logger.info("num_frames %d is not 4k + 1: %d frames are made.", num_frames, frames)
    return values, size


def values_of_widgets(**widgets: Any) -> dict[str, Any]:
    """Widgets of Wiro Remote I2V as parameters of SkyReels-V1; one that is left out has none.

    Raises:
        ConfigError: too few frames.
    """
    from ...wiro_api.schema import frame_count

    names = {"negative_prompt": "negativePrompt", "cfg": "scale", "steps": "steps", "size": "size"}
    values = {names[name]: value for name, value in widgets.items() if name in names}
    if "num_frames" in widgets:
        values["numFrames"] = frame_count(widgets["num_frames"])
    if "prompt" in widgets:
        prompt = widgets["prompt"]
        values["prompt"] = (
            with_fps_prefix(prompt) if widgets.get("add_fps_prefix", True) else prompt
        )
    return values


def _outputs(result: Result) -> tuple[Any, ...]:
    """In the order of the sockets of Wiro Run Model and Wiro Task Result."""
    return (
        or_blocked(result.images), video_output(result), result.text, result.taskid, result.receipt,
        or_blocked(result.masks), or_blocked(result.audio), result.files,
    )  # fmt: skip


def or_blocked(value: Any) -> Any:
    """What the task did not make stops only the nodes that want it, with the reason."""
    return host.blocked(value) if isinstance(value, str) else value


def video_output(result: Result) -> Any:
    if isinstance(result.video, str):
        return host.blocked(result.video)
    return host.video_of(result.video)


def _files_for(
    items: Sequence[Mapping[str, Any]],
    values: Mapping[str, Any],
    connected: dict[str, Any],
    places: dict[str, str],
    image_parameter: str,
) -> "list[tuple[str, FilePart]]":
    """The files of Wiro Run Model, in the order of its sockets.

    `image` goes to `image_parameter`, as before there were other sockets, and the first picture of
    it alone; unless `file_parameters` names it, or that is the default and the model has none.
    """
    slots = slots_of(items)
    many = {slot.name for slot in slots if slot.takes_many}
    rest, files = dict(connected), []
    is_named = "image" in places
    is_unknown = (
        image_parameter in ("", IMAGE_PARAMETER)
        and bool(slots)
        and all(slot.name != image_parameter for slot in slots)
    )
    taken = ""
    if "image" in rest and not is_named and not is_unknown:
        taken = image_parameter
        files.append((taken, png_part(rest.pop("image"))))
    for socket, name in place(list(rest), places, slots, values, taken).items():
        files += parts_of(name, socket, rest[socket], name in many, png_part)
    return files


def png_part(image: Tensor, size: str = "", fit: str = "crop") -> "FilePart":
    """The first picture of an IMAGE as a PNG part, at a size such as "960x544" if one is given.

    Raises:
        ShapeError: not a picture, or one too large to be sent.
    """
    from PIL import Image

    from ...wiro_api.files import MAX_UPLOAD_BYTES
    from ...wiro_api.jobs import PicturePart

    height, width = image.shape[1:3] if image.ndim == 4 else (0, 0)
    if size:
        width, height = (int(side) for side in size.split("x"))
    fitted = fit_image(image[:1], width, height, fit)[0, :, 0].permute(1, 2, 0)
    pixels = fitted.add(1.0).mul(127.5).round().to(torch.uint8).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    content = file.getvalue()
    if len(content) > MAX_UPLOAD_BYTES:
        raise ShapeError(
            f"The picture of {width}x{height} has {len(content)} bytes as PNG, and Wiro takes "
            f"{MAX_UPLOAD_BYTES}: make it smaller."
        )
    part = ("input.png", content, "image/png")
    return PicturePart.from_pixels(part, pixels.tobytes(), *pixels.shape)


def parse_parameters(text: str) -> dict[str, Any]:
    """The parameters of a JSON text.

    Raises:
        ValueError: not a JSON object; says where.
    """
    fix = 'write {"name": value}, with double quotes'
    try:
        values = json.loads(text.strip() or "{}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"The parameters are not JSON ({error}): {fix}.") from None
    if not isinstance(values, dict):
        raise ValueError(f"The parameters are no JSON object: {fix}.")
    return values
