"""Nodes that run one task on wiro.ai, or fetch or prepare one.

The key is in the environment or in the user's folder, never in a widget.
"""

import threading
from typing import Any

from torch import Tensor

from .. import host
from .inputs import IMAGE_PARAMETER, IMAGES, SOCKETS, model_files, parse_assignments, png_part
from .run import Result, RunView, check_fields, collect, fingerprint, remember, run_model, wanted
from .widgets import (
    PICTURE_AND_PROMPT,
    SKYREELS_OPTIONAL,
    TAKE,
    TIMEOUT_MINUTES,
    WAIT_WHEN_BUSY,
    parse_parameters,
    skyreels_required,
    skyreels_run,
)

#: choice of Wiro Upload File that stands for its image
_FROM_IMAGE = "the image"


class WiroRemoteI2V:
    CATEGORY = "SkyReels/remote"
    SEARCH_ALIASES = [
        "image to video",
        "i2v",
        "skyreels",
        "hunyuan",
        "wiro.ai",
        "api",
        "cloud",
        "generate video",
    ]
    DESCRIPTION = (
        "Generates a video on wiro.ai with SkyReels-V1 instead of on this machine. Costs money: "
        "the price is shown before the run and the cost after it; Cancel stops the remote task. "
        "Needs an API key (WIRO_API_KEY, or Settings > SkyReels > Wiro)."
    )
    FUNCTION = "generate"
    RETURN_TYPES = ("IMAGE", "VIDEO", "STRING", "STRING")
    RETURN_NAMES = ("images", "video", "task_id", "receipt")
    OUTPUT_TOOLTIPS = (
        "Frames at 24 fps. Decoded only if connected.",
        "The video file from Wiro; SaveVideo copies it.",
        "The task's id at Wiro, for Wiro Task Result.",
        "JSON: model, parameters, task id, cost in US dollars, seconds, files.",
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                **PICTURE_AND_PROMPT,
                **skyreels_required(),
            },
            "optional": {
                **SKYREELS_OPTIONAL,
                "take": TAKE,
                "wait_when_busy": WAIT_WHEN_BUSY,
                "timeout_minutes": TIMEOUT_MINUTES,
            },
            "hidden": {"unique_id": "UNIQUE_ID", "graph": "PROMPT"},
        }

    @classmethod
    def IS_CHANGED(cls, unique_id: str | None = None, **_: Any) -> str:
        return fingerprint(unique_id, cls.RETURN_NAMES)

    @classmethod
    def VALIDATE_INPUTS(cls, prompt: str | None = None) -> bool | str:
        if prompt is not None and not prompt.strip():
            return "The prompt is empty: describe what happens in the video. Nothing was sent."
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

        parameters, size = skyreels_run(
            image,
            prompt=prompt,
            size=size,
            num_frames=num_frames,
            steps=steps,
            cfg=cfg,
            negative_prompt=negative_prompt,
            add_fps_prefix=add_fps_prefix,
        )
        result = await run_model(
            SKYREELS,
            parameters,
            lambda: [("inputImage", png_part(image, size, fit))],
            take=take,
            wait_when_busy=wait_when_busy,
            timeout_minutes=timeout_minutes,
            unique_id=unique_id,
            wants=wanted(graph, unique_id, self.RETURN_NAMES),
        )
        remember(graph, unique_id, result)
        return or_blocked(result.images), video_output(result), result.taskid, result.receipt


#: outputs of the nodes for any model
_MODEL_RETURN_TYPES = ("IMAGE", "VIDEO", "STRING", "STRING", "STRING", "MASK", "AUDIO", "STRING")
_MODEL_RETURN_NAMES = ("images", "video", "text", "task_id", "receipt", "mask", "audio", "files")
_MODEL_OUTPUT_TOOLTIPS = (
    "Frames of the first video, else all images. Decoded only if connected.",
    "The first video file from Wiro, if the model makes any.",
    "Text that the model wrote, else the content of its small text files.",
    "The task's id at Wiro, for Wiro Task Result.",
    "JSON: model, parameters, task id, cost in US dollars, seconds, files.",
    "1 where the images are transparent, as Load Image; empty if none is.",
    "The first audio file, else the audio of the first video.",
    "JSON list of all files, as paths below the output folder.",
)


class WiroRunModel:
    CATEGORY = "SkyReels/remote"
    SEARCH_ALIASES = ["wiro.ai", "api", "cloud", "any model", "skyreels"]
    DESCRIPTION = (
        "Runs any model on wiro.ai, named by the owner/project of its page. Costs money: the price "
        "is shown before the run if Wiro publishes it; Cancel stops the remote task."
    )
    FUNCTION = "run"
    RETURN_TYPES = _MODEL_RETURN_TYPES
    RETURN_NAMES = _MODEL_RETURN_NAMES
    OUTPUT_TOOLTIPS = _MODEL_OUTPUT_TOOLTIPS

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        another = "Another image, or a batch for a parameter that takes several; see "
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
                        "tooltip": "JSON object of parameter names and values, as listed on the "
                        "model's page; the rest gets the model's defaults. Do not put a key here.",
                    },
                ),
            },
            "optional": {
                "image": (
                    "IMAGE",
                    {"tooltip": "Image for image_parameter; of a batch, the first is used."},
                ),
                "image_parameter": (
                    "STRING",
                    {
                        "default": IMAGE_PARAMETER,
                        "tooltip": "The model's parameter that takes image. If the model has no "
                        "inputImage, its first image parameter is used.",
                    },
                ),
                "take": TAKE,
                "wait_when_busy": WAIT_WHEN_BUSY,
                "timeout_minutes": TIMEOUT_MINUTES,
                **{
                    name: ("IMAGE", {"tooltip": f"{another}file_parameters."})
                    for name in IMAGES[1:]
                },
                "video": (
                    "VIDEO",
                    {
                        "tooltip": "Video for the model. A file is sent unchanged, including its "
                        "metadata (such as the workflow); at most 100 MB."
                    },
                ),
                "audio": (
                    "AUDIO",
                    {"tooltip": "Audio for the model, sent as 16-bit WAV; at most 100 MB."},
                ),
                "file_parameters": (
                    "STRING",
                    {
                        "default": "",
                        "tooltip": "Which input feeds which parameter, such as "
                        "image_2=lastImage, video=inputVideo. The others follow the model's list "
                        "of parameters, in order.",
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
            assigned = parse_assignments(file_parameters or "")
            names = [image_parameter or "", *assigned.values()]
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
        from ...wiro_api.handles import Model

        values, assigned = parse_parameters(parameters), parse_assignments(file_parameters)
        check_fields(dict.fromkeys([image_parameter, *assigned.values()]))
        inputs = (image, image_2, image_3, image_4, video, audio)
        connected = {
            socket: value
            for socket, value in zip(SOCKETS, inputs, strict=True)
            if value is not None
        }
        result = await run_model(
            Model.parse(model),
            values,
            list,
            take=take,
            wait_when_busy=wait_when_busy,
            timeout_minutes=timeout_minutes,
            unique_id=unique_id,
            wants=wanted(graph, unique_id, self.RETURN_NAMES),
            files_for=lambda items: model_files(
                items, values, connected, assigned, image_parameter.strip()
            ),
        )
        return _model_outputs(remember(graph, unique_id, result))


class WiroTaskResult:
    CATEGORY = "SkyReels/remote"
    SEARCH_ALIASES = ["wiro.ai", "download", "collect task"]
    DESCRIPTION = (
        "Downloads the result of a task that was started earlier, here or elsewhere; waits for it "
        "if it is still running. Costs nothing. Cancel stops the wait, not the task."
    )
    FUNCTION = "collect"
    RETURN_TYPES = _MODEL_RETURN_TYPES
    RETURN_NAMES = _MODEL_RETURN_NAMES
    OUTPUT_TOOLTIPS = _MODEL_OUTPUT_TOOLTIPS

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "task": (
                    "STRING",
                    {
                        "default": "",
                        "tooltip": "Task id (digits) from the Wiro panel, a receipt or an error "
                        "message. Prefer it to token:..., which also works but is saved in the "
                        "workflow and lets anyone who has it read the task.",
                    },
                ),
            },
            "optional": {"timeout_minutes": TIMEOUT_MINUTES},
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
        stop_event = threading.Event()
        wants = wanted(graph, unique_id, self.RETURN_NAMES)
        result = await host.run_in_thread(
            lambda: collect(RunView(unique_id, stop_event), task, timeout_minutes, wants),
            stop_event,
        )
        return _model_outputs(remember(graph, unique_id, result))


class WiroUploadFile:
    CATEGORY = "SkyReels/remote"
    SEARCH_ALIASES = ["wiro.ai", "upload image"]
    DESCRIPTION = (
        "Uploads an image, or a file of the input folder, to your files at Wiro once and outputs "
        "its URL for model parameters. Costs nothing."
    )
    FUNCTION = "upload"
    RETURN_TYPES = ("STRING", "STRING")
    RETURN_NAMES = ("url", "file_id")
    OUTPUT_TOOLTIPS = ("The file's URL, for a model's ...Url parameter.", "The file's id at Wiro.")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "file": (
                    [_FROM_IMAGE, *host.input_files()],
                    {"tooltip": "A file in ComfyUI's input folder (at most 100 MB), or the image."},
                ),
                "folder": (
                    "STRING",
                    {
                        "default": "",
                        "tooltip": "Folder to create for it at Wiro (letters, digits, _ and -); "
                        "empty for none.",
                    },
                ),
            },
            "optional": {
                "image": ("IMAGE", {"tooltip": "The image to upload if file is 'the image'."}),
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

        stop_event = threading.Event()

        def work() -> tuple[str, str]:
            view = RunView(unique_id, stop_event)
            if file != _FROM_IMAGE:
                if file not in host.input_files():  # a link's value is not checked against the list
                    raise ConfigError(f"The input folder has no file {file[:80]!r}.")
                part = read_part(host.input_file(file))
            elif image is not None:
                part = png_part(image)
            else:
                raise ConfigError("No image is connected: connect one, or choose a file.")
            with view.make_client() as client:
                view.check()
                view.say(f"uploading {len(part[1]) / 1e6:.1f} MB")
                name = folder.strip()
                folder_id = str(client.create_folder(name)["id"]) if name else ""
                record = client.upload(part, folder_id)
            view.say("uploaded", 1.0)
            return str(record.get("url") or ""), str(record.get("id") or "")

        return await host.run_in_thread(work, stop_event)


# --- outputs ------------------------------------------------------------------------------------


def _model_outputs(result: Result) -> tuple[Any, ...]:
    """A result in the order of _MODEL_RETURN_NAMES."""
    return (
        or_blocked(result.images),
        video_output(result),
        result.text,
        result.taskid,
        result.receipt,
        or_blocked(result.masks),
        or_blocked(result.audio),
        result.files,
    )


def or_blocked(value: Any) -> Any:
    """A value, or for a text, the reason why there is none: that stops only what it feeds."""
    return host.blocked(value) if isinstance(value, str) else value


def video_output(result: Result) -> Any:
    """The VIDEO of a result."""
    if isinstance(result.video, str):
        return host.blocked(result.video)
    return host.video_from_file(result.video)
