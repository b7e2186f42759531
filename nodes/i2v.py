"""The whole job in one node: on this machine or on Wiro, with the same sockets and widgets."""

import logging
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..skyreels.builtin import BUILTIN_NAME
from ..skyreels.config import FRAMES_PER_SECOND, MAX_FRAMES, MAX_SIZE, MAX_STEPS, SIZE_MULTIPLE
from ..skyreels.errors import OptionError, shown
from ..skyreels.image import FITS
from ..skyreels.plan import Choice
from . import host
from .local import found
from .local.decode import SkyReelsVAEDecode
from .local.loaders import SkyReelsTransformerLoader, transformer_choices, vae_choices
from .local.plan import plan_clip
from .local.sampler import SkyReelsSampler
from .local.text import encoder_choices
from .remote.nodes import WiroRemoteI2V
from .remote.run import fingerprint
from .remote.widgets import (
    PICTURE_AND_PROMPT,
    SKYREELS_OPTIONAL,
    TAKE,
    TIMEOUT_MINUTES,
    WAIT_WHEN_BUSY,
    size_at_wiro,
)

logger = logging.getLogger("skyreels.nodes.i2v")

AUTO, LOCAL, REMOTE = "auto", "local", "remote"


class SkyReelsI2V:
    CATEGORY = "SkyReels"
    SEARCH_ALIASES = [
        "image to video",
        "i2v",
        "hunyuan",
        "wiro.ai",
        "generate video",
        "animate image",
        "all in one",
    ]
    DESCRIPTION = (
        "Picture and prompt to video in one node, on this machine or on wiro.ai. auto runs here if "
        "the weights are in ComfyUI's folders and the clip fits; it goes to Wiro, which costs "
        "money, only if allow_paid_remote is on. The report says where it ran and why."
    )
    FUNCTION = "generate"
    RETURN_TYPES = ("IMAGE", "VIDEO", "STRING", "STRING", "STRING")
    RETURN_NAMES = ("images", "video", "task_id", "receipt", "report")
    OUTPUT_TOOLTIPS = (
        "The frames, at 24 fps. Of a video from Wiro decoded only if connected.",
        "The video at 24 fps, for SaveVideo.",
        "The task's id at Wiro; empty for a clip made here.",
        "JSON: prompt, seed, settings, weights, cost and seconds; for SkyReels From Receipt.",
        "Where the clip was made, with what, and why there.",
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        sampler, decode = SkyReelsSampler.INPUT_TYPES(), SkyReelsVAEDecode.INPUT_TYPES()
        loader = SkyReelsTransformerLoader.INPUT_TYPES()["required"]
        side = {"min": SIZE_MULTIPLE, "max": MAX_SIZE, "step": SIZE_MULTIPLE}
        sizes = "Multiple of 16. Wiro makes 960x544 and 544x960; the built-in model 64x64."
        return {
            "required": {
                **PICTURE_AND_PROMPT,
                "backend": (
                    [AUTO, LOCAL, REMOTE],
                    {
                        "default": AUTO,
                        "tooltip": "local: on this machine. remote: on wiro.ai, which costs money. "
                        "auto: here if it can be, else on Wiro if allow_paid_remote is on.",
                    },
                ),
                "transformer": (
                    [AUTO, *transformer_choices()],
                    {
                        "default": AUTO,
                        "tooltip": "For a clip made here. auto: the largest SkyReels-V1 file in "
                        "models/diffusion_models that fits, found by its header. The built-in "
                        "model is not SkyReels but a tiny one that moves coloured shapes, 64x64.",
                    },
                ),
                "width": ("INT", {"default": 960, **side, "tooltip": sizes}),
                "height": ("INT", {"default": 544, **side, "tooltip": sizes}),
                "num_frames": (
                    "INT",
                    {
                        "default": 97,
                        "min": 5,
                        "max": MAX_FRAMES,
                        "step": 4,
                        "tooltip": "4k+1 frames at 24 fps: 97 is four seconds and the trained "
                        "length.",
                    },
                ),
                "fit": (
                    list(FITS),
                    {
                        "default": "crop",
                        "tooltip": "crop cuts the centre to the video's proportions, pad adds "
                        "black bars, stretch distorts.",
                    },
                ),
                "seed": (
                    "INT",
                    {
                        **sampler["required"]["seed"][1],
                        "tooltip": "Of a clip made here; one seed gives the same noise on every "
                        "device. Wiro picks its own: see take.",
                    },
                ),
                "steps": (
                    "INT",
                    {
                        "default": 30,
                        "min": 1,
                        "max": MAX_STEPS,
                        "tooltip": "The authors use 30. Wiro takes at most 100.",
                    },
                ),
                "cfg": (
                    "FLOAT",
                    {
                        "default": 6.0,
                        "min": 1.0,
                        "max": 30.0,
                        "step": 0.1,
                        "tooltip": "True classifier-free guidance; the authors use 6.",
                    },
                ),
            },
            "optional": {
                **SKYREELS_OPTIONAL,
                "vae": (
                    [AUTO, *vae_choices()],
                    {
                        "default": AUTO,
                        "tooltip": "For a clip made here; auto finds one by its header, and takes "
                        "the built-in one for the built-in transformer.",
                    },
                ),
                "text_encoder": (
                    [AUTO, *encoder_choices()],
                    {
                        "default": AUTO,
                        "tooltip": "For a clip made here: a folder with both text encoders, or "
                        "LLaMA-3, to which CLIP-L is found. auto finds both by their headers.",
                    },
                ),
                "precision": (
                    loader["precision"][0],
                    {
                        "default": AUTO,
                        "advanced": True,
                        "tooltip": "For a clip made here, as in SkyReels Load Transformer.",
                    },
                ),
                "embedded_guidance": (
                    "FLOAT",
                    {
                        **sampler["required"]["embedded_guidance"][1],
                        "advanced": True,
                        "tooltip": "For a clip made here. Keep 1.0, the value of the training.",
                    },
                ),
                "shift": (
                    "FLOAT",
                    {
                        **sampler["required"]["shift"][1],
                        "advanced": True,
                        "tooltip": "For a clip made here: shift of the schedule, released as 7.",
                    },
                ),
                "attention": (
                    sampler["optional"]["attention"][0],
                    {
                        "default": "exact",
                        "advanced": True,
                        "tooltip": "For a clip made here, as in SkyReels Sampler.",
                    },
                ),
                "cache": (
                    sampler["optional"]["cache"][0],
                    {
                        "default": "off",
                        "advanced": True,
                        "tooltip": "For a clip made here, as in SkyReels Sampler; off is exact.",
                    },
                ),
                "decode": (
                    decode["required"]["mode"][0],
                    {
                        "default": AUTO,
                        "advanced": True,
                        "tooltip": "For a clip made here, as in SkyReels VAE Decode.",
                    },
                ),
                "allow_paid_remote": (
                    "BOOLEAN",
                    {
                        "default": False,
                        "tooltip": "Lets auto make the clip on wiro.ai, which costs money, if it "
                        "cannot be made here. Your spending limits hold.",
                    },
                ),
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
        return WiroRemoteI2V.VALIDATE_INPUTS(prompt)

    async def generate(
        self,
        image: Tensor,
        prompt: str,
        backend: str,
        transformer: str,
        width: int,
        height: int,
        num_frames: int,
        fit: str,
        seed: int,
        steps: int,
        cfg: float,
        negative_prompt: str = "",
        add_fps_prefix: bool = True,
        vae: str = AUTO,
        text_encoder: str = AUTO,
        precision: str = AUTO,
        embedded_guidance: float = 1.0,
        shift: float = 7.0,
        attention: str = "exact",
        cache: str = "off",
        decode: str = AUTO,
        allow_paid_remote: bool = False,
        take: int = 1,
        wait_when_busy: bool = False,
        timeout_minutes: float = 40.0,
        unique_id: str | None = None,
        graph: dict[str, Any] | None = None,
    ) -> Any:
        if not prompt.strip():
            raise OptionError("The prompt is empty: describe what happens in the video.")
        local: _Local | None = None
        why = "backend is remote"
        if backend != REMOTE:
            runtime = host.ComfyRuntime(unique_id)
            size, choice = (width, height, num_frames), Choice(attention, decode)
            try:
                local = _find_weights(transformer, vae, text_encoder)
                if backend == AUTO or len(local.transformers) > 1:
                    fitting, why = _fitting(local, runtime, size, steps, cfg, precision, choice)
                    # what was asked for is tried, with the smallest file
                    local = fitting or (None if backend == AUTO else local.smallest)
            except _NotHereError as error:
                local, why = None, str(error)
            if local is None and (backend == LOCAL or not allow_paid_remote):
                raise OptionError(_both_ways(why, backend))
        if local is None:
            report = f"Made on wiro.ai: {why}"
            logger.info("%s", report)
            made = await WiroRemoteI2V().generate(
                image=image,
                prompt=prompt,
                size=size_at_wiro(width, height, why),
                fit=fit,
                num_frames=num_frames,
                steps=steps,
                cfg=cfg,
                negative_prompt=negative_prompt,
                add_fps_prefix=add_fps_prefix,
                take=take,
                wait_when_busy=wait_when_busy,
                timeout_minutes=timeout_minutes,
                unique_id=unique_id,
                graph=graph,
            )
            return (*made, report)
        link = (host.prompt_node(graph, unique_id) or {}).get("inputs", {}).get("image")
        nodes = _local_nodes(
            str(unique_id),
            local,
            # the link, so that what hangs on the picture is made once
            image=link if isinstance(link, list) else image,
            texts=(prompt, negative_prompt),
            add_fps_prefix=add_fps_prefix,
            picture={"width": width, "height": height, "num_frames": num_frames, "fit": fit},
            sampling={
                "seed": seed,
                "steps": steps,
                "cfg": cfg,
                "embedded_guidance": embedded_guidance,
                "shift": shift,
                "attention": attention,
                "cache": cache,
            },
            precision=precision,
            decode=decode,
        )
        names = dict.fromkeys((local.transformer, local.vae, local.text_encoder))
        report = f"Made here with {', '.join(map(shown, names))}."
        if backend == AUTO:
            report = f"{report} {why}"
        logger.info("%s", report)
        host.show_outcome("on this machine · nothing paid", unique_id, must_act=False)
        outputs = [
            [f"{unique_id}.{name}", slot]
            for name, slot in (("decode", 0), ("video", 0), ("sampler", 1))
        ]
        return {"expand": nodes, "result": (*outputs[:2], "", outputs[2], report)}


# --- where --------------------------------------------------------------------------------------


class _NotHereError(Exception):
    """A clip cannot be made on this machine; the message says why."""


@dataclass(frozen=True)
class _Local:
    """Weights as their loaders list them.

    transformers: those to choose from, the best first. clip: of SkyReels Load Text Encoder.
    """

    transformers: tuple[str, ...]
    vae: str
    text_encoder: str
    clip: str

    @property
    def transformer(self) -> str:
        return self.transformers[0]

    @property
    def smallest(self) -> "_Local":
        """The same with the last transformer alone."""
        return replace(self, transformers=self.transformers[-1:])


def _find_weights(transformer: str, vae: str, text_encoder: str) -> _Local:
    """The weights that were chosen, and for auto those that are found.

    Returns:
        Names as the loaders list them.

    Raises:
        _NotHereError: names what is missing.
    """
    is_builtin = transformer == BUILTIN_NAME
    transformers = found.transformers() if transformer == AUTO else [transformer]
    if vae == AUTO:
        vae = BUILTIN_NAME if is_builtin else found.vae() or ""
    if text_encoder == BUILTIN_NAME or (is_builtin and text_encoder == AUTO):
        texts: tuple[str, str] | None = (BUILTIN_NAME, "in the folder")
    else:
        texts = found.text_encoders(None if text_encoder == AUTO else text_encoder)
    missing = [
        what
        for what, is_here in (
            ("a SkyReels-V1 image-to-video transformer in models/diffusion_models", transformers),
            ("the HunyuanVideo VAE in models/vae", vae),
            ("the text encoders LLaMA-3 and CLIP-L in models/text_encoders", texts),
        )
        if not is_here
    ]
    if missing or texts is None:
        raise _NotHereError(f"this machine lacks {', '.join(missing)}.")
    return _Local(tuple(transformers), vae, *texts)


def _fitting(
    local: _Local,
    runtime: host.ComfyRuntime,
    size: tuple[int, int, int],
    steps: int,
    cfg: float,
    precision: str,
    choice: Choice,
) -> tuple[_Local | None, str]:
    """The first of the transformers whose plan fits, and the plan; or None, and why not."""
    why = ""
    for name in local.transformers:
        plan = plan_clip(runtime, name, size, steps, cfg, precision, choice)
        if not plan.obstacle:
            line = plan.text.splitlines()[1]
            return replace(local, transformers=(name,)), line
        why = f"{shown(name)} does not fit this machine: {plan.obstacle}"
    return None, why


def _both_ways(why: str, backend: str) -> str:
    here = "put the files there (SkyReels Load Transformer and the README name them) or choose a "
    here += "smaller clip"
    if backend == LOCAL:
        return (
            f"The clip cannot be made here: {why} Either {here}, or set backend to remote "
            "(wiro.ai, which costs money)."
        )
    return (
        f"The clip cannot be made here: {why} Nothing was sent. Either {here}, or switch "
        "allow_paid_remote on to let it be made on wiro.ai, which costs money within your limits."
    )


# --- here ---------------------------------------------------------------------------------------


def _local_nodes(
    prefix: str,
    local: _Local,
    *,
    image: Any,
    texts: tuple[str, str],
    add_fps_prefix: bool,
    picture: dict[str, Any],
    sampling: dict[str, Any],
    precision: str,
    decode: str,
) -> dict[str, dict[str, Any]]:
    """The graph of local nodes that stands for this one; ComfyUI runs and caches each of them."""

    def link(name: str) -> list[Any]:
        return [f"{prefix}.{name}", 0]

    negative = {"negative": link("negative")} if sampling["cfg"] > 1 else {}
    nodes: dict[str, tuple[str, dict[str, Any]]] = {
        "transformer": (
            "SkyReelsTransformerLoader",
            {"transformer": local.transformer, "precision": precision},
        ),
        "vae": ("SkyReelsVAELoader", {"vae": local.vae, "precision": AUTO}),
        "encoder": (
            "SkyReelsTextEncoderLoader",
            {"text_encoder": local.text_encoder, "clip": local.clip},
        ),
        "positive": (
            "SkyReelsTextEncode",
            {"text_encoder": link("encoder"), "prompt": texts[0], "add_fps_prefix": add_fps_prefix},
        ),
        "negative": (
            "SkyReelsTextEncode",
            {"text_encoder": link("encoder"), "prompt": texts[1], "add_fps_prefix": False},
        ),
        "picture": (
            "SkyReelsImageConditioning",
            {"vae": link("vae"), "image": image, "augmentation_seed": sampling["seed"], **picture},
        ),
        "sampler": (
            "SkyReelsSampler",
            {
                "model": link("transformer"),
                "positive": link("positive"),
                "image": link("picture"),
                **negative,
                **sampling,
            },
        ),
        "decode": (
            "SkyReelsVAEDecode",
            {"vae": link("vae"), "samples": link("sampler"), "mode": decode},
        ),
        "video": ("CreateVideo", {"images": link("decode"), "fps": float(FRAMES_PER_SECOND)}),
    }
    return {
        f"{prefix}.{name}": {"class_type": class_type, "inputs": inputs}
        for name, (class_type, inputs) in nodes.items()
        if name != "negative" or negative
    }
