"""Receipts: what a clip was made from, and options taken from one."""

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import OptionError
from .console import say
from .options import image_settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..sampling.settings import SamplingSettings


def read_defaults(arguments: argparse.Namespace) -> dict[str, Any]:
    """Read --from-receipt.

    Args:
        arguments: of `generate`.

    Returns:
        Defaults of its options, and `receipt`, which is what was read.

    Raises:
        OptionError: the receipt cannot be read.
    """
    from ..pipeline.receipt import read_receipt

    receipt = read_receipt(arguments.from_receipt)
    known = {k: v for k, v in receipt.parameters.items() if k not in receipt.unknown}
    names = {"negative_prompt": "negative", "num_frames": "frames"}
    defaults = {names.get(name, name): value for name, value in known.items()}
    if known.get("riflex_k") == 0:
        defaults["riflex"] = "off"
    defaults["receipt"] = receipt
    if arguments.extend is not None:  # the clip has a size
        defaults = {k: v for k, v in defaults.items() if k not in ("width", "height")}
    return defaults


def check_given(arguments: argparse.Namespace) -> None:
    """Refuse a receipt's clip whose weights were not given; say what the receipt does not know.

    Args:
        arguments: of `generate`, with `receipt`.

    Raises:
        OptionError: names the options.
    """
    from ..builtin import BUILTIN_NAME

    receipt = arguments.receipt
    if receipt.model != BUILTIN_NAME and arguments.transformer is None:
        told = receipt.weights.get("transformer", receipt.model)
        raise OptionError(
            f"The clip of the receipt was made with {told}, and a receipt names no folder: give "
            "--transformer, --vae and --text-encoder."
        )
    if receipt.loras and not arguments.lora:
        loras = " ".join(f"--lora PATH/{each.name}:{each.strength:g}" for each in receipt.loras)
        raise OptionError(
            f"The clip of the receipt was made with LoRAs, and a receipt names no folder: give "
            f"{loras}."
        )
    if receipt.by_hand:
        say(f"Not in the receipt, and missing now: {', '.join(receipt.by_hand)}.")
    if "seed" in receipt.unknown:
        say("The receipt names no seed (Wiro picks its own): the clip will be another one.")


def make_clip_receipt(  # noqa: PLR0917 - of one caller
    arguments: argparse.Namespace,
    models: Mapping[str, Any],
    image: "Tensor | None",
    size: tuple[int, int, int],
    settings: "SamplingSettings",
    device: "torch.device",
    elapsed_s: float,
) -> dict[str, Any]:
    """The receipt of the clip; says what differs from the one that the settings came from."""
    from ..builtin import BUILTIN_NAME
    from ..conditioning.embeds import with_fps_prefix
    from ..image import PictureOrigin, picture_digest
    from ..pipeline.receipt import describe_source, difference, make_receipt
    from ..text.encode import DEFAULT_NEGATIVE_PROMPT

    is_builtin = arguments.transformer is None
    width, height, num_frames = size
    negative = DEFAULT_NEGATIVE_PROMPT if arguments.negative is None else arguments.negative
    parameters = {
        "prompt": with_fps_prefix(arguments.prompt),
        "negative_prompt": negative if settings.uses_cfg else None,
        "seed": settings.seed,
        "steps": arguments.steps,
        "cfg": arguments.cfg,
        "embedded_guidance": arguments.embedded_guidance,
        "shift": arguments.shift,
        "width": width,
        "height": height,
        "num_frames": num_frames,
        "cache": arguments.cache,
        "attention": arguments.attention,
        "precision": arguments.precision,
        "decode": arguments.decode,
        "riflex_k": settings.riflex_k,
    }
    name = BUILTIN_NAME if is_builtin else arguments.transformer.name
    weights = {
        **{
            part: describe_source(module.source, BUILTIN_NAME if is_builtin else "")
            for part, module in models.items()
        },
        **describe_text_encoders(arguments),
    }
    origin = None
    if image is not None:
        origin = PictureOrigin(
            image_settings(arguments),
            settings.seed,
            *(image.shape[2], image.shape[1]),
            picture_digest(image),
            arguments.end_image is not None,
            models["vae"].source,
        )
    untold = {"window": arguments.window, "extend": arguments.extend}
    receipt = make_receipt(
        name,
        parameters,
        weights={part: told for part, told in weights.items() if told is not None},
        loras=settings.loras,
        origin=origin,
        by_hand=[option for option, given in untold.items() if given is not None],
        device=device,
        elapsed_s=elapsed_s,
    )
    given = getattr(arguments, "receipt", None)
    if given is not None:
        differences = [difference(given, part, told) for part, told in weights.items()]
        if given.picture_sha256 and origin and given.picture_sha256 != origin.sha256:
            differences.append("The picture is not the one of the receipt.")
        for line in filter(None, differences):
            say(line)
    return receipt


def describe_text_encoders(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a receipt says of the two text encoders."""
    from ..builtin import BUILTIN_FOLDER, BUILTIN_NAME
    from ..pipeline.receipt import describe_weights
    from ..text.sources import TextSources, find_text_sources
    from ..weights.inspect import inspect

    given = arguments.text_encoder
    source = find_text_sources(given, arguments.tokenizer or ()) if given else BUILTIN_FOLDER
    if isinstance(source, TextSources):
        places = {"llama": source.llm, "clip": source.clip}
        return {part: describe_weights(inspect(place)) for part, place in places.items()}
    name = source.resolve().name if given else BUILTIN_NAME
    folders = {"llama": "text_encoder", "clip": "text_encoder_2"}
    return {
        part: describe_weights(inspect(source / folder), name) for part, folder in folders.items()
    }
