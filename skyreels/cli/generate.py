"""`generate`: a picture and a prompt become a video."""

import argparse
import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import OptionError
from ..runtime.collectives import made_by_first
from ..runtime.interrupt import remembered_interrupt
from ..runtime.ranks import is_first, load_once
from .clip import (
    check_extend,
    check_files,
    describe_loras,
    encode_prompts,
    end_image_of,
    extend_settings,
    load_encoder,
    load_models,
    make_clip,
    picture_of,
)
from .console import progress_bar, say
from .devices import runtime_of
from .options import (
    add_clip,
    add_weights,
    apply_preset,
    check_weights,
    image_settings,
    path_of,
    read_loras,
    sampling_settings,
    size_of,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ..runtime import Runtime
    from ..sampling.settings import SamplingSettings
    from ..transformer.model import SkyReelsTransformer
    from ..vae.model import VideoVAE


def add_generate(commands: Any, defaults: Mapping[str, Any]) -> argparse.ArgumentParser:
    """Add the command `generate`, and its options.

    Args:
        commands: of the parser.
        defaults: of options, in place of the usual ones.

    Returns:
        The command's parser.
    """
    generate: argparse.ArgumentParser = commands.add_parser(
        "generate",
        help="a picture and a prompt become a video",
        description="A picture and a prompt become a video; with a text-to-video transformer, a "
        "prompt alone does. Without --transformer, --vae and "
        "--text-encoder the tiny built-in model is used (64x64, 17 frames).",
    )
    generate.set_defaults(run=run_generate)
    generate.add_argument(
        "image",
        nargs="?",
        type=path_of,
        help="picture file; the built-in model draws an example without one, a text-to-video "
        "transformer takes none",
    )
    generate.add_argument(
        "--end-image",
        type=path_of,
        metavar="FILE",
        help="picture that the clip ends with; the model was not trained with one",
    )
    generate.add_argument("--out", type=path_of, required=True, help="FILE.mp4 or FILE.npy")
    add_weights(generate)
    add_clip(generate)
    generate.add_argument(
        "--ranks",
        type=int,
        metavar="N",
        help="make the clip on N cards of this machine, 2 to 8: with guidance an even number makes "
        "two groups, one for each prediction of a step; those of a group share a prediction, and "
        "their number divides the heads of attention",
    )
    _add_extend(generate)
    generate.add_argument(
        "--resume",
        type=path_of,
        metavar="FILE",
        help="save finished steps here and continue from them",
    )
    generate.add_argument(
        "--from-receipt",
        type=path_of,
        metavar="FILE",
        help="take prompt, seed and settings of an earlier clip from its .mp4, or from its receipt "
        "as .json; what is given beside it counts",
    )
    generate.set_defaults(**defaults)
    return generate


def _add_extend(generate: argparse.ArgumentParser) -> None:
    """The options of `generate` that continue a clip."""
    generate.add_argument(
        "--extend",
        type=path_of,
        metavar="CLIP",
        help="continue this video (or .npy) instead of a picture; it gives the size",
    )
    generate.add_argument(
        "--overlap",
        type=int,
        metavar="N",
        help="with --extend, last frames of CLIP to start from, 4k+1 (default 1, as in training); "
        "--frames includes them",
    )
    generate.add_argument(
        "--no-color-match",
        action="store_true",
        help="with --extend, leave the colours of the new frames as they are",
    )


def run_generate(arguments: argparse.Namespace) -> dict[str, Any]:
    """`generate`: load, encode, sample, decode, write."""
    start = time.perf_counter()
    _check_places(arguments)  # before minutes of work, not after
    is_builtin = check_weights(arguments)
    check_extend(arguments)
    apply_preset(arguments)
    width, height, num_frames = size_of(arguments)

    from ..builtin import BUILTIN_NOTICE, warn_of_builtin_size
    from ..conditioning.latents import check_size
    from ..media import read_clip
    from ..pipeline.extend import check_clip

    image: Tensor | None
    if arguments.extend is not None:
        image = read_clip(arguments.extend)
        height, width = image.shape[1:3]
        check_clip(image, extend_settings(arguments, num_frames))
    else:
        check_size(width, height, num_frames)
        image = picture_of(arguments)
    if is_builtin:
        say(BUILTIN_NOTICE)
        warn_of_builtin_size(width, height, num_frames)
    with (
        remembered_interrupt() as check,
        _chosen_options_logged(arguments),
        progress_bar() as report,
    ):
        count, receipt = _generate(arguments, image, (width, height, num_frames), report, check)
    if arguments.resume is not None and is_first():
        arguments.resume.unlink(missing_ok=True)  # the video is safe
    seconds = time.perf_counter() - start
    say(f"{arguments.out}: {count} frames of {width}x{height} in {seconds:.1f} s")
    return {
        "file": str(arguments.out),
        "model": "built-in" if is_builtin else str(arguments.transformer),
        "width": width,
        "height": height,
        "frames": count,
        "seed": receipt["parameters"]["seed"],
        "elapsed_s": round(seconds, 3),
        "receipt": receipt,
    }


def _check_places(arguments: argparse.Namespace) -> None:
    """Refuse places where the run could not write.

    Raises:
        OptionError: names the option's path.
    """
    from ..media import check_output, check_place

    check_output(arguments.out)
    state, cache = arguments.resume, arguments.prompt_cache
    if state is not None:
        check_place(state)
        if state.resolve() == arguments.out.resolve():
            raise OptionError(f"--resume and --out both name {state}: name two files.")
    if cache is not None and cache.exists() and not cache.is_dir():
        raise OptionError(f"--prompt-cache {cache} is not a folder: name one.")


@contextlib.contextmanager
def _chosen_options_logged(arguments: argparse.Namespace) -> Iterator[None]:
    """An option that was chosen logs what it did, in this run alone."""
    names = ["skyreels.sampling.planned"]  # what is expected, and what happened
    if arguments.cache != "off":
        names += ["skyreels.sampling.step_cache", "skyreels.sampling.calibrate"]
    if arguments.attention != "exact":
        names.append("skyreels.transformer")
        names.append("skyreels.sampling.attend")
    if arguments.ranks is not None:
        names.append("skyreels.vae.tiling")
    levels = {name: logging.getLogger(name).level for name in names}
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.INFO)
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _generate(
    arguments: argparse.Namespace,
    image: "Tensor | None",
    size: tuple[int, int, int],
    report: Any,
    check: Callable[[], None],
) -> tuple[int, dict[str, Any]]:
    """Load what makes the clip, and make it; see `make_clip`."""
    start = time.perf_counter()
    settings = sampling_settings(arguments, read_loras(arguments))
    image_settings(arguments)  # refuses illegal ones
    end_image = end_image_of(arguments)
    runtime = runtime_of(arguments, report, check)
    if arguments.transformer is not None:  # minutes before they are loaded
        check_files(arguments, image is not None)
    ranks = runtime.ranks
    prompts = made_by_first(lambda: encode_prompts(arguments, runtime, load_encoder), ranks)
    models = load_once(lambda: _load_all(arguments, settings, runtime), ranks)
    return make_clip(
        arguments, image, end_image, size, settings, models, prompts, runtime=runtime, start=start
    )


def _load_all(
    arguments: argparse.Namespace, settings: "SamplingSettings", runtime: "Runtime"
) -> "tuple[SkyReelsTransformer, VideoVAE]":
    """Load the models, and refuse LoRAs that do not fit.

    Returns:
        Transformer and VAE; with the LoRAs in it where ranks will share the weights. Without ranks,
        sampling brings them in.
    """
    from ..weights.lora.apply import use_loras

    models = load_models(arguments, runtime)
    describe_loras(settings.loras, models[0])
    if runtime.ranks is not None:
        use_loras(models[0], settings.loras, runtime=runtime)
    return models
