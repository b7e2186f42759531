"""Receipts: what a clip was made from, and the inputs that make it again."""

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from ...skyreels.builtin import BUILTIN_FOLDER, BUILTIN_NAME
from ...skyreels.conditioning.embeds import with_fps_prefix
from ...skyreels.conditioning.latents import ImageConditioning
from ...skyreels.config import ATTENTIONS, DECODE_MODES, TRANSFORMER_PRECISIONS, Guidance
from ...skyreels.errors import SkyReelsError, shown
from ...skyreels.image import FITS, PictureOrigin
from ...skyreels.pipeline.receipt import (
    FORMAT,
    MARK,
    PARAMETERS,
    NoReceiptError,
    Receipt,
    base_name,
    describe_source,
    describe_weights,
    difference,
    make_receipt,
    names_frame_rate,
    parse_receipt,
    receipt_text,
    to_text,
)
from ...skyreels.sampling.calibrate import CACHE_CHOICES
from ...skyreels.sampling.settings import SamplingSettings, get_sigmas
from ...skyreels.weights.inspect import inspect
from ...skyreels.weights.load import Source
from ...skyreels.weights.lora.read import file_digest
from .. import host
from .loaders import transformer_choices, transformer_folders, vae_choices, vae_folders
from .text import encoder_choices, encoder_folders

logger = logging.getLogger("skyreels.nodes.local.receipts")

#: what a receipt says of weights
Told = dict[str, Any]

#: nodes between a text and the sampler that are followed up a graph
MAX_DEPTH = 50
#: folders of the built-in model, by the part that a receipt names
_BUILTIN_PARTS = {
    "transformer": "transformer",
    "vae": "vae",
    "llama": "text_encoder",
    "clip": "text_encoder_2",
}


# --- what the graph tells -----------------------------------------------------------------------


def prompt_text(graph: Any, unique_id: str | None, socket: str) -> str | None:
    """The text that a sampler's prompt was encoded from.

    Args:
        graph: hidden input DYNPROMPT.
        unique_id: of the sampler.
        socket: "positive" or "negative".

    Returns:
        The text as the encoder had it, with the frame rate; None if there is none, are several, or
        it was made by a node that is not known.
    """
    texts = {text for _, text in _encoders(graph, unique_id, socket)}
    return texts.pop() if len(texts) == 1 else None


def text_weights(graph: Any, unique_id: str | None) -> dict[str, dict[str, Any]]:
    """What a receipt says of the text encoders of a sampler's prompt.

    Args:
        graph: hidden input DYNPROMPT.
        unique_id: of the sampler.

    Returns:
        "llama" and "clip", as far as the graph names their files.
    """
    names: dict[str, None] = {}
    for node, _ in _encoders(graph, unique_id, "positive"):
        names |= dict.fromkeys(_file_names(graph, node))
    if BUILTIN_NAME in names:
        return {part: _builtin(part) for part in ("llama", "clip")}
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        chosen = host.resolve("text_encoders", name, encoder_folders())
        for path in _parts_of(chosen):
            try:
                info = inspect(path)
            except SkyReelsError as error:  # core read it, so the clip is sound
                logger.warning("%s is not in the receipt: %s", shown(name), error)
                continue
            if info.family in ("llama", "clip"):
                found[info.family] = describe_weights(info, chosen.name)
    return found


def decode_mode(graph: Any, unique_id: str | None) -> str | None:
    """The mode of the node that decodes a sampler's latents; None if it is not one of ours."""
    modes = {
        _string(graph, node["inputs"].get("mode"))
        for node in host.prompt_nodes(graph)
        if node["class_type"] == "SkyReelsVAEDecode"
        and node["inputs"].get("samples") == [unique_id, 0]
    }
    return modes.pop() if len(modes) == 1 else None


def _encoders(
    graph: Any, unique_id: str | None, socket: str
) -> list[tuple[Mapping[str, Any], str | None]]:
    """Nodes that encode what ends in a socket, and the text of each."""
    found: list[tuple[Mapping[str, Any], str | None]] = []
    left = [(link, 0) for link in _links(host.prompt_node(graph, unique_id), (socket,))]
    while left:
        (origin, slot), depth = left.pop()
        node = host.prompt_node(graph, origin)
        if node is None or depth > MAX_DEPTH:
            continue
        inputs = node["inputs"]
        if node["class_type"] == "SkyReelsTextEncode":
            text = _string(graph, inputs.get("prompt"))
            if text is not None and inputs.get("add_fps_prefix", True):
                text = with_fps_prefix(text)
            found.append((node, text))
        elif node["class_type"] == "CLIPTextEncode":
            found.append((node, _string(graph, inputs.get("text"))))
        elif {"positive", "negative"} <= set(inputs):  # as core orders both outputs
            names = ("positive", "negative")
            left += [(link, depth + 1) for link in _links(node, names[slot : slot + 1])]
        else:
            left += [(link, depth + 1) for link in _links(node, inputs)]
    return found


def _links(node: Mapping[str, Any] | None, names: Iterable[str]) -> list[tuple[str, int]]:
    values = [] if node is None else [node["inputs"].get(name) for name in names]
    return [(str(v[0]), int(v[1])) for v in values if isinstance(v, list) and len(v) == 2]


def _string(graph: Any, value: Any) -> str | None:
    """A text of a widget, or of the primitive or receipt it is linked to; None for any other."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or len(value) != 2:
        return None
    node, slot = host.prompt_node(graph, str(value[0])), value[1]
    text = None
    if node is not None and node["class_type"] == "SkyReelsFromReceipt":
        given = _string(graph, node["inputs"].get("receipt"))
        text = None if given is None else _outputs_of(_read(given))[slot]
    elif node is not None and node["class_type"].startswith("PrimitiveString"):
        text = node["inputs"].get("value")
    return text if isinstance(text, str) else None


def _file_names(graph: Any, encoder: Mapping[str, Any]) -> list[str]:
    """Files that the loader of a text node's encoder names."""
    names = ("clip", "text_encoder")
    node: Mapping[str, Any] | None = encoder
    for _ in range(MAX_DEPTH):
        links = _links(node, names)
        if not links:
            break
        node = host.prompt_node(graph, links[0][0])
    inputs = {} if node is None else node["inputs"]
    named = [inputs.get(name) for name in ("clip_name1", "clip_name2", *names)]
    choices = set(encoder_choices())
    return [name for name in named if isinstance(name, str) and name in choices]


def _parts_of(path: Path) -> list[Path]:
    """The text encoders of a folder with both, or the one file or folder."""
    parts = [path / name for name in ("text_encoder", "text_encoder_2")]
    return parts if all(part.is_dir() for part in parts) else [path]


def _builtin(part: str) -> dict[str, Any]:
    told: Told = describe_weights(inspect(BUILTIN_FOLDER / _BUILTIN_PARTS[part]), BUILTIN_NAME)
    return told


# --- the receipt of a sampler -------------------------------------------------------------------


def sampler_receipt(
    model: host.LoadedModel,
    image: ImageConditioning,
    settings: SamplingSettings,
    widgets: Mapping[str, Any],
    by_hand: Iterable[str],
    graph: Any,
    unique_id: str | None,
    runtime: host.ComfyRuntime,
    elapsed_s: float,
) -> str:
    """The receipt of SkyReels Sampler.

    Args:
        model: that was sampled with.
        image: size and start of the clip.
        settings: of the run.
        widgets: steps, shift, denoise and cache of the node.
        by_hand: names of connected sockets that a receipt cannot hold.
        graph: hidden input DYNPROMPT.
        unique_id: of the node.
        runtime: that computed.
        elapsed_s: seconds of sampling.

    Returns:
        JSON.
    """
    guidance, origin = settings.guidance, image.origin
    assert origin is None or isinstance(origin, PictureOrigin)
    parameters = {
        "prompt": prompt_text(graph, unique_id, "positive"),
        "negative_prompt": prompt_text(graph, unique_id, "negative") if settings.uses_cfg else None,
        "seed": settings.seed,
        **widgets,
        "cfg": guidance.true_cfg_scale,
        "embedded_guidance": guidance.guidance_scale,
        "width": image.width,
        "height": image.height,
        "num_frames": image.num_frames,
        "attention": settings.attention,
        "precision": model.precision,
        "decode": decode_mode(graph, unique_id),
        "riflex_k": settings.riflex_k,
    }
    usual = Guidance()
    others = [
        f"{each.name} {getattr(guidance, each.name)}"
        for each in fields(Guidance)
        if each.name
        in ("cfg_start", "cfg_end", "guidance_rescale", "cfg_zero_star", "zero_init_steps")
        and getattr(guidance, each.name) != getattr(usual, each.name)
    ]
    if not settings.add_noise:
        others.append("add_noise off")
    is_builtin = model.name == BUILTIN_NAME
    weights = {
        "transformer": describe_source(model.module.source, BUILTIN_NAME if is_builtin else ""),
        "vae": _vae_of(origin),
        **text_weights(graph, unique_id),
    }
    receipt = make_receipt(
        model.name,
        parameters,
        weights={part: told for part, told in weights.items() if told is not None},
        loras=settings.loras,
        origin=origin,
        by_hand=[*by_hand, *others],
        device=runtime.device,
        elapsed_s=elapsed_s,
    )
    return str(to_text(receipt))


def _vae_of(origin: PictureOrigin | None) -> dict[str, Any] | None:
    if origin is None:
        return None
    source = origin.vae
    is_builtin = isinstance(source, Source) and BUILTIN_FOLDER in source.info.path.parents
    told: Told | None = describe_source(source, BUILTIN_NAME if is_builtin else "")
    return told


def is_plain(sigmas: Tensor | None, steps: int, shift: float, denoise: float) -> bool:
    """Whether sigmas are those that the widgets beside them make."""
    if sigmas is None:
        return True
    own = get_sigmas(steps, shift, denoise)
    return own.shape == sigmas.shape and bool((own == sigmas.float().cpu()).all())


# --- from a receipt to inputs -------------------------------------------------------------------

#: names of the outputs that are parameters, in their order
_NAMES = (
    "prompt",
    "negative_prompt",
    "seed",
    "steps",
    "cfg",
    "embedded_guidance",
    "shift",
    "width",
    "height",
    "num_frames",
    "fit",
    "noise_augmentation",
    "latent_strength",
    "augmentation_seed",
    "denoise",
    "cache",
    "attention",
    "precision",
    "decode",
    "riflex_k",
)
#: a list is a choice, which only a widget of the very same choices takes
_TYPES: dict[str, Any] = {
    "prompt": "STRING",
    "negative_prompt": "STRING",
    "cfg": "FLOAT",
    "embedded_guidance": "FLOAT",
    "shift": "FLOAT",
    "noise_augmentation": "FLOAT",
    "latent_strength": "FLOAT",
    "denoise": "FLOAT",
    "fit": list(FITS),
    "cache": list(CACHE_CHOICES),
    "attention": list(ATTENTIONS),
    "precision": list(TRANSFORMER_PRECISIONS),
    "decode": list(DECODE_MODES),
}


class SkyReelsFromReceipt:
    CATEGORY = "SkyReels/sampling"
    SEARCH_ALIASES = ["metadata", "prompt from video", "load settings", "reproduce"]
    DESCRIPTION = (
        "Gives the inputs of an earlier clip again, from its receipt: the text itself, or a file "
        "that holds one. Link the outputs to the widgets of the same names; the report says which "
        "weights were used and whether they are here."
    )
    FUNCTION = "read"
    RETURN_TYPES = (*(_TYPES.get(name, "INT") for name in _NAMES), "BOOLEAN", "STRING")
    RETURN_NAMES = (*_NAMES, "add_fps_prefix", "report")
    OUTPUT_TOOLTIPS = (
        "The prompt, with the frame rate it was encoded with.",
        "The negative prompt; empty if it was not used.",
        "The seed; 0 if the receipt has none, as of a clip from Wiro.",
        *(f"Of the clip; link it to the widget {name}." for name in _NAMES[3:]),
        "Whether the prompt names its frame rate, so that adding it changes nothing.",
        "Where the clip was made, its weights and LoRAs, and what a receipt cannot give.",
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "receipt": (
                    "STRING",
                    {
                        "multiline": True,
                        "default": "",
                        "tooltip": "The receipt as JSON, linked or pasted; or the name of a file "
                        "in the input or output folder: a .json, or a video or PNG that holds one "
                        "(or the workflow of a local clip) or has NAME.receipt.json beside it.",
                    },
                ),
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    @classmethod
    def IS_CHANGED(cls, receipt: str | None = None, **_: Any) -> str:
        """Text counts by itself; a file when it changes."""
        if receipt is None or _is_json(receipt):
            return ""
        try:
            return str(host.media_file(receipt.strip()).stat().st_mtime_ns)
        except (SkyReelsError, OSError):  # told when the node runs
            return "missing"

    def read(self, receipt: str, unique_id: str | None = None) -> tuple[Any, ...]:
        told = _read(receipt)
        outputs = _outputs_of(told)
        host.ComfyRuntime(unique_id).say(outputs[-1])
        return outputs


def _is_json(text: str) -> bool:
    return text.lstrip().startswith(("{", "["))


def _read(text: str) -> Receipt:
    if _is_json(text) or not text.strip():
        return parse_receipt(text)
    try:
        return parse_receipt(receipt_text(host.media_file(text.strip())))
    except NoReceiptError as error:
        receipt = graph_receipt(error.graph)
        if receipt is None:
            raise
        return parse_receipt(json.dumps(receipt))


def graph_receipt(text: str) -> dict[str, Any] | None:
    """A receipt without hashes, from the graph that core writes into videos and pictures.

    Args:
        text: the graph in API format; it comes from outside.

    Returns:
        For `parse_receipt`; None unless exactly one node of ours in it has sampled locally.
    """
    try:
        graph = json.loads(text or "{}")
        made = [
            (key, node["class_type"], node["inputs"])
            for key, node in graph.items()
            if node["class_type"] == "SkyReelsSampler"
            or (node["class_type"] == "SkyReelsI2V" and node["inputs"]["backend"] != "remote")
        ]
        if len(made) != 1:
            return None
        key, class_type, inputs = made[0]
        if class_type == "SkyReelsI2V":
            prompt = _string(graph, inputs.get("prompt"))
            if prompt is not None and inputs.get("add_fps_prefix", True):
                prompt = with_fps_prefix(prompt)
            given = {**inputs, "prompt": prompt, "augmentation_seed": inputs.get("seed")}
            loader: dict[str, Any] = inputs
            loras: list[dict[str, Any]] = []
        else:
            picture = _node_at(graph, inputs.get("image"))
            loader, loras = _loader_of(graph, inputs.get("model"))
            given = {
                **picture,
                **inputs,
                "prompt": prompt_text(graph, key, "positive"),
                "negative_prompt": prompt_text(graph, key, "negative"),
                "decode": decode_mode(graph, key),
                "precision": loader.get("precision"),
            }
        sockets = ("latent", "sampler", "sigmas", "guidance", "windows")
        parameters = {k: v for k, v in given.items() if k in PARAMETERS and not isinstance(v, list)}
        return {
            MARK: FORMAT,
            "model": loader.get("transformer", ""),
            "parameters": parameters,
            "weights": {"transformer": {"name": loader.get("transformer", "")}},
            "loras": loras,
            "by_hand": [name for name in sockets if name in inputs],
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        logger.info("The graph in the file is none of ours: %s", shown(error))
        return None


def _node_at(graph: Any, link: Any) -> dict[str, Any]:
    """The inputs of the node at the other end of a link; {} if there is none."""
    node = host.prompt_node(graph, str(link[0])) if isinstance(link, list) else None
    return {} if node is None else dict(node["inputs"])


def _loader_of(graph: Any, link: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Inputs of the loader that a model comes from, and the LoRAs on the way."""
    loras: list[dict[str, Any]] = []
    inputs = _node_at(graph, link)
    for _ in range(MAX_DEPTH):
        if "model" not in inputs:
            break
        names = {"lora": "name", "strength": "strength", "blocks": "blocks"}
        loras.insert(0, {names[k]: v for k, v in inputs.items() if k in names})
        inputs = _node_at(graph, inputs["model"])
    return inputs, loras


def _outputs_of(receipt: Receipt) -> tuple[Any, ...]:
    values = receipt.parameters
    return (
        *(values[name] for name in _NAMES),
        names_frame_rate(values["prompt"]),
        "\n".join(_report(receipt)),
    )


def _report(receipt: Receipt) -> list[str]:
    where = "on wiro.ai" if receipt.backend == "wiro" else "locally"
    lines = [f"Made {where} with {receipt.model or 'a model that is not named'}."]
    for part, told in receipt.weights.items():
        found = _find(part, told.name)
        lines.append(difference(receipt, part, found) or f"{part} {told}: here.")
    here = {base_name(name): name for name in host.weight_files("loras")}
    for lora in receipt.loras:
        at = f"strength {lora.strength:g}" + (f", blocks {lora.blocks}" if lora.blocks else "")
        if lora.name not in here:
            lines.append(f"The LoRA {lora} ({at}) of the receipt is not in models/loras.")
        elif lora.sampled_sha256 not in (
            "",
            file_digest(host.resolve("loras", here[lora.name], {})),
        ):
            lines.append(f"The LoRA {lora.name} is another file than the receipt's, {lora} ({at}).")
        else:
            lines.append(f"LoRA {lora.name}, {at}: add it with SkyReels Load LoRA.")
    if receipt.by_hand:
        lines.append(f"Connect or set by hand: {', '.join(receipt.by_hand)}.")
    unknown = [name for name in receipt.unknown if name in PARAMETERS]
    if unknown:
        lines.append(f"Not in the receipt, so the usual values: {', '.join(unknown)}.")
    return lines


def _find(part: str, name: str) -> dict[str, Any] | None:
    """What is here under the name that a receipt gives; None if nothing is, or nothing readable."""
    kinds: dict[str, tuple[str, list[str], dict[str, Path]]] = {
        "transformer": ("diffusion_models", transformer_choices(), transformer_folders()),
        "vae": ("vae", vae_choices(), vae_folders()),
        "llama": ("text_encoders", encoder_choices(), encoder_folders()),
        "clip": ("text_encoders", encoder_choices(), encoder_folders()),
    }
    if part not in kinds:
        return None
    if name == BUILTIN_NAME:
        return _builtin(part)
    kind, choices, folders = kinds[part]
    labels = {folder.name: label for label, folder in folders.items()}
    choice = labels.get(name) or next((c for c in choices if base_name(c) == name), None)
    if choice is None:
        return None
    path = host.resolve(kind, choice, folders)
    found: Told | None = None
    try:
        if part == "transformer":
            info = inspect(path, "transformer")
        elif part == "vae":
            info = inspect(path, "vae")
        else:
            info = inspect(_parts_of(path)[0 if part == "llama" else -1])
        found = describe_weights(info, name)
    except SkyReelsError as error:
        logger.warning("%s cannot be compared with the receipt: %s", shown(name), error)
    return found
