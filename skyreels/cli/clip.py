"""One clip: its picture, prompts and weights, sampled and written to its file."""

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import OptionError
from ..files import write_json
from ..runtime.ranks import is_first, leave_ranks
from .console import say
from .options import image_settings
from .receipts import make_clip_receipt

if TYPE_CHECKING:
    from torch import Tensor

    from ..conditioning.embeds import PromptEmbeds
    from ..image import ImageSettings
    from ..media import FrameFile
    from ..pipeline.extend import ExtendSettings
    from ..runtime import Runtime, TorchRuntime
    from ..sampling.settings import SamplingSettings
    from ..text.load import TextEncoder
    from ..text.sources import TextSources
    from ..transformer.model import SkyReelsTransformer
    from ..vae.model import VideoVAE
    from ..weights.lora.apply import AppliedLora


def picture_of(arguments: argparse.Namespace) -> "Tensor | None":
    """The picture that a clip begins with."""
    from ..image import example_image
    from ..media import read_image

    if arguments.image:
        return read_image(arguments.image)
    return example_image() if arguments.transformer is None else None


def end_image_of(arguments: argparse.Namespace) -> "Tensor | None":
    """Read the picture that a clip ends with.

    Args:
        arguments: of `generate`.

    Returns:
        [1, H, W, 3] in 0..1; None without --end-image.
    """
    from ..media import read_image

    return None if arguments.end_image is None else read_image(arguments.end_image)


def check_files(arguments: argparse.Namespace, has_picture: bool) -> None:
    """Refuse weights that cannot be loaded, and a picture where they take none, or the reverse."""
    from ..weights.load import check_transformer, check_vae

    config = check_transformer(arguments.transformer).config
    check_vae(arguments.vae)
    _check_picture(arguments, config, has_picture, image_settings(arguments))


def describe_loras(loras: "tuple[AppliedLora, ...]", transformer: "SkyReelsTransformer") -> None:
    """Say which layers each LoRA changes.

    Args:
        loras: as `read_loras` reads them.
        transformer: that they will be applied to.

    Raises:
        SkyReelsError: one of them does not fit.
    """
    from ..weights.lora.apply import check_loras
    from ..weights.lora.report import describe_lora

    check_loras(transformer, loras)
    for applied in loras:
        say(describe_lora(applied, transformer))


def make_clip(  # noqa: PLR0917 - of two callers
    arguments: argparse.Namespace,
    image: "Tensor | None",
    end_image: "Tensor | None",
    size: tuple[int, int, int],
    settings: "SamplingSettings",
    models: "tuple[SkyReelsTransformer, VideoVAE]",
    prompts: "tuple[PromptEmbeds, PromptEmbeds | None]",
    *,
    runtime: "TorchRuntime",
    start: float,
) -> tuple[int, dict[str, Any]]:
    """Make the clip and write it, frame by frame as it is decoded.

    Returns:
        The number of frames in the file, and the clip's receipt, which an .mp4 holds and which
        lies beside an .npy.
    """
    from ..pipeline import image_to_latents
    from ..pipeline.extend import Continuation, extend_latents
    from ..sampling.bad_render import with_retries
    from ..vae.frames import FrameSink
    from ..vae.tiling import decode_into

    transformer, vae = models
    width, height, num_frames = size
    options: Any = {"image_settings": image_settings(arguments), "runtime": runtime}
    clip = None if arguments.extend is None else image
    if clip is None:
        options |= {
            "width": width,
            "height": height,
            "num_frames": num_frames,
            "end_image": end_image,
        }
    else:
        extend = extend_settings(arguments, num_frames)
        options["extend"] = extend
        num_frames += len(clip) - extend.overlap_frames

    def run(settings: "SamplingSettings") -> "Tensor":
        inputs = (*prompts, settings)
        if clip is None:
            return image_to_latents(transformer, vae, image, *inputs, **options)
        return extend_latents(transformer, vae, clip, *inputs, **options)

    vae_latents, used = with_retries(settings, run)
    named = {"transformer": transformer, "vae": vae}
    elapsed_s = time.perf_counter() - start
    receipt = make_clip_receipt(arguments, named, image, size, used, runtime.device, elapsed_s)
    if not is_first():  # it helps the first one, which writes the file
        decode_into(None, vae, vae_latents, arguments.decode, runtime=runtime)
        leave_ranks()
        return num_frames, receipt
    with _clip_file(arguments.out, (num_frames, height, width), receipt) as file:
        sink: FrameSink = file
        if clip is not None:
            sink = Continuation(clip, extend, file, check=runtime.check_interrupt)
        decode_into(sink, vae, vae_latents, arguments.decode, runtime=runtime)
        runtime.check_interrupt()
    leave_ranks()
    return num_frames, receipt


def load_models(
    arguments: argparse.Namespace, runtime: "Runtime"
) -> "tuple[SkyReelsTransformer, VideoVAE]":
    """Load the transformer and the VAE.

    Args:
        arguments: of `generate`; without --transformer, the built-in ones are loaded.
        runtime: where they will compute.

    Returns:
        Both.
    """
    from ..builtin import builtin_transformer, builtin_vae
    from ..weights.load import load_transformer, load_vae

    precision = arguments.precision
    if arguments.transformer is None:
        transformer = builtin_transformer(precision=precision, runtime=runtime)
        return transformer, builtin_vae(runtime=runtime)
    transformer = load_transformer(arguments.transformer, precision=precision, runtime=runtime)
    return transformer, load_vae(arguments.vae, runtime=runtime)


@contextlib.contextmanager
def _clip_file(
    path: Path, shape: tuple[int, int, int], receipt: Mapping[str, Any]
) -> "Iterator[FrameFile]":
    """The file of a clip, with its receipt inside, or beside it where it has no place for texts.

    Args:
        path: of an .mp4 or .npy.
        shape: frames, height, width.
        receipt: of the clip.

    Yields:
        What takes the frames.
    """
    from ..media import open_frames
    from ..pipeline.receipt import MARK, MOMENTARY, SUFFIX, to_text

    # the same inputs give the same file, whenever and however fast it was made
    held = {MARK: to_text({k: v for k, v in receipt.items() if k not in MOMENTARY})}
    with open_frames(path, *shape, metadata=held) as file:
        yield file
    if path.suffix.lower() == ".npy":
        write_json(path.with_name(path.stem + SUFFIX), receipt)


def _check_picture(
    arguments: argparse.Namespace, config: Any, has_picture: bool, settings: "ImageSettings"
) -> None:
    """Refuse a picture, or options for one, where the transformer takes none, and the reverse.

    Raises:
        OptionError: names them.
    """
    from ..conditioning.latents import check_picture
    from ..image import ImageSettings

    check_picture(config, has_picture)
    if not has_picture and (settings != ImageSettings() or arguments.end_image is not None):
        raise OptionError(
            "--end-image, --fit, --noise-augmentation and --latent-strength are for a picture, and "
            "a text-to-video transformer takes none: leave them out."
        )


def check_extend(arguments: argparse.Namespace) -> None:
    """Refuse options that contradict --extend, or that only it has.

    Raises:
        OptionError: names them.
    """
    if arguments.extend is None:
        if arguments.overlap is not None or arguments.no_color_match:
            raise OptionError("--overlap and --no-color-match belong to --extend CLIP: give it.")
    elif arguments.image is not None:
        raise OptionError("--extend continues a clip and takes no picture: leave one of them out.")
    elif arguments.end_image is not None:
        raise OptionError("--extend does not go together with --end-image: leave one of them out.")
    elif (arguments.width, arguments.height) != (None, None):
        raise OptionError("--extend keeps the clip's size: leave --width and --height out.")


def extend_settings(arguments: argparse.Namespace, num_frames: int) -> "ExtendSettings":
    """How --extend continues a clip.

    Args:
        arguments: of `generate`.
        num_frames: of the continuation, the overlap included.

    Returns:
        The settings.

    Raises:
        OptionError: the overlap breaks a rule.
    """
    from ..pipeline.extend import ExtendSettings

    overlap = 1 if arguments.overlap is None else arguments.overlap
    return ExtendSettings(num_frames, overlap, not arguments.no_color_match)


def load_encoder(source: "Path | TextSources | None", runtime: "Runtime") -> "TextEncoder":
    """The text encoder of files or a folder; without any, the built-in one."""
    from ..builtin import builtin_text_encoder
    from ..text.load import load_text_encoder

    if source is None:
        return builtin_text_encoder(runtime=runtime)
    return load_text_encoder(source, runtime=runtime)


def encode_prompts(
    arguments: argparse.Namespace,
    runtime: "Runtime",
    load: "Callable[[Path | TextSources | None, Runtime], TextEncoder]",
) -> "tuple[PromptEmbeds, PromptEmbeds | None]":
    """Prompt and negative prompt; the text encoder (8 B parameters) is freed when this returns.

    Unless `load` keeps it. With --prompt-cache, prompts encoded earlier are found without it.

    Returns:
        The negative one is None if CFG does not use it.
    """
    from ..text.encode import DEFAULT_NEGATIVE_PROMPT, cached_prompt, encode_prompt
    from ..text.load import fingerprint_text_encoder
    from ..text.sources import find_text_sources

    given, cache = arguments.text_encoder, arguments.prompt_cache
    source = find_text_sources(given, arguments.tokenizer or ()) if given else None
    negative = DEFAULT_NEGATIVE_PROMPT if arguments.negative is None else arguments.negative
    texts = [(arguments.prompt, True)]
    if arguments.cfg > 1:
        texts.append((negative, False))  # the frame rate belongs to the prompt only
    found: list[PromptEmbeds | None] = []
    if source is not None and cache is not None:
        fingerprint = fingerprint_text_encoder(source, runtime=runtime)
        found = [
            cached_prompt(fingerprint, text, fps_prefix=prefix, cache_dir=cache)
            for text, prefix in texts
        ]
    if not found or None in found:
        encoder = load(source, runtime)
        found = [
            encode_prompt(encoder, text, fps_prefix=prefix, cache_dir=cache, runtime=runtime)
            for text, prefix in texts
        ]
    assert found[0] is not None
    return found[0], found[1] if len(found) > 1 else None
