"""The command line: generate, batch, calibrate, inspect, doctor.

Exit code 0 only when the job is done. With --json, standard output carries exactly one JSON object;
everything meant for people goes to standard error.
"""

import argparse
import contextlib
import functools
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .config import (
    ATTENTIONS,
    BAD_RENDERS,
    DECODE_MODES,
    PRESETS,
    TRANSFORMER_PRECISIONS,
    TransformerConfig,
)
from .errors import MAX_MESSAGE, OptionError, SkyReelsError, shown
from .files import check_regular, write_json
from .runtime.interrupt import remembered_interrupt
from .runtime.ranks import (
    check_devices,
    is_first,
    is_rank,
    join_ranks,
    leave_ranks,
    start_ranks,
)
from .sampling.calibrate import CACHE_CHOICES, CALIBRATED, choose_cache

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .conditioning.embeds import PromptEmbeds
    from .image import ImageSettings
    from .media import FrameFile
    from .pipeline.batch import Ended, Line, Task
    from .pipeline.calibration import Case
    from .pipeline.extend import ExtendSettings
    from .runtime import Runtime, TorchRuntime
    from .sampling.settings import SamplingSettings
    from .sampling.step_cache import CacheConfig
    from .text.load import TextEncoder
    from .text.sources import TextSources
    from .transformer.model import SkyReelsTransformer
    from .vae.model import VideoVAE
    from .weights.inspect import CheckpointInfo
    from .weights.lora.apply import AppliedLora

#: prompts of a calibration, and clips to check it with
MAX_CLIPS = 256
#: of a batch
MAX_WORKERS = 256
#: between two lines of progress where standard error is a file, in seconds
LINE_PERIOD_S = 60.0
EXIT_ERROR = 1
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; None means sys.argv.

    Returns:
        The exit code: 0 done, 1 an error that was explained, 2 wrong usage, 130 interrupted.
    """
    arguments = build_parser().parse_args(argv)
    # on a terminal over the progress bar, which is drawn again
    line = "\r\033[K%(message)s" if sys.stderr.isatty() else "%(message)s"
    logging.basicConfig(level=logging.WARNING, format=line, stream=sys.stderr)
    try:
        if getattr(arguments, "from_receipt", None) is not None:
            arguments = _with_receipt(arguments, argv)
        if arguments.run is run_generate and arguments.prompt is None:
            build_parser().error("the following arguments are required: --prompt")
        if getattr(arguments, "ranks", None) is not None and not is_rank():
            return _start_ranks(arguments, argv)
        result = arguments.run(arguments)
    except SkyReelsError as error:
        return _fail(arguments, str(error), EXIT_ERROR)
    except OSError as error:
        return _fail(arguments, _of_file(error), EXIT_ERROR)
    except KeyboardInterrupt:
        return _fail(arguments, _interrupted(arguments), EXIT_INTERRUPTED)
    except Exception as error:  # users get a sentence, `python -X dev` gets the traceback
        if sys.flags.dev_mode:
            raise
        return _fail(arguments, _unexpected(error), EXIT_ERROR)
    if arguments.json:
        print(json.dumps(result))  # noqa: T201
    return EXIT_ERROR if arguments.run is run_batch and result["failed"] else 0


def _start_ranks(arguments: argparse.Namespace, argv: Sequence[str] | None) -> int:
    """Run the same command on several ranks; what can be refused is refused before."""
    from .builtin import BUILTIN_FOLDER
    from .transformer.ulysses import check_ranks
    from .weights.load import check_transformer

    check_devices(arguments.ranks, pick_device(arguments.device))
    if arguments.resume is not None:
        raise OptionError("--resume is of one rank: leave it out, or leave out --ranks.")
    config = check_transformer(arguments.transformer or BUILTIN_FOLDER / "transformer").config
    assert isinstance(config, TransformerConfig)
    check_ranks(arguments.ranks, config.num_attention_heads)
    given = sys.argv[1:] if argv is None else argv
    return start_ranks(arguments.ranks, ["-m", __package__, *map(str, given)])


def _interrupted(arguments: argparse.Namespace) -> str:
    if arguments.run is run_calibrate:
        return "Interrupted; the same command continues with the first clip that is not finished."
    if arguments.run is run_batch:
        return "Interrupted; the same command makes the clips that are not finished."
    state = getattr(arguments, "resume", None)
    if state is not None and state.is_file():
        return f"Interrupted; the same command continues from {state}."
    return "Interrupted; nothing was written."


def _of_file(error: OSError) -> str:
    from .media import is_disk_full

    place = error.filename or "A file"
    if is_disk_full(error):
        return f"{place} cannot be written, because its disk is full: free some space."
    return f"{place} cannot be used ({error.strerror}): check the path."


def _unexpected(error: Exception) -> str:
    """A sentence for an error that no check caught."""
    if type(error).__name__ in ("OutOfMemoryError", "MemoryError"):  # torch's, Python's
        return (
            "The device ran out of memory: use fewer frames, a smaller size, --decode "
            "tiled-diffusers or --precision fp8, or close other programs."
        )
    reason = shown(next(iter(str(error).splitlines()), ""), 300)
    return (
        f"Unexpected {type(error).__name__} ({reason}): this is a defect of the program. Please "
        "report it with the output of `python -X dev -m skyreels ...` and `python -m skyreels "
        "doctor`."
    )


class _Parser(argparse.ArgumentParser):
    """Answers wrong usage with a JSON object too if --json was asked for."""

    def error(self, message: str) -> NoReturn:
        if "--json" in sys.argv:
            print(json.dumps({"error": message}))  # noqa: T201
        super().error(message)


def _fail(arguments: argparse.Namespace, message: str, code: int) -> int:
    say(f"error: {message}")
    if arguments.json:
        print(json.dumps({"error": message}))  # noqa: T201
    return code


def say(text: str) -> None:
    """Write a line for people."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201


def _path(text: str) -> Path:
    """A path of the command line, with ~ for the home folder also where no shell replaced it."""
    try:
        return Path(text).expanduser()
    except RuntimeError:  # the home of a user who is not there
        return Path(text)


@functools.cache
def build_parser() -> argparse.ArgumentParser:
    """All commands and options."""
    return _make_parser({})


def _make_parser(generate_defaults: Mapping[str, Any]) -> argparse.ArgumentParser:
    """All commands and options, with defaults of `generate` in place of the usual ones."""
    parser = _Parser(prog="python -m skyreels", description="SkyReels-V1 image-to-video.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    generate = commands.add_parser(
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
        type=_path,
        help="picture file; the built-in model draws an example without one, a text-to-video "
        "transformer takes none",
    )
    generate.add_argument(
        "--end-image",
        type=_path,
        metavar="FILE",
        help="picture that the clip ends with; the model was not trained with one",
    )
    generate.add_argument("--out", type=_path, required=True, help="FILE.mp4 or FILE.npy")
    _add_weights(generate)
    _add_clip(generate)
    generate.add_argument(
        "--ranks", type=int, metavar="N",
        help="share each prediction among N cards of this machine (2 to 8), whose number divides "
        "the heads of attention: 2, 3, 4, 6 or 8",
    )  # fmt: skip
    _add_extend(generate)
    generate.add_argument(
        "--resume",
        type=_path,
        metavar="FILE",
        help="save finished steps here and continue from them",
    )
    _add_from_receipt(generate, generate_defaults)
    batch = _add_batch(commands)
    calibrate = _add_calibrate(commands)

    inspect = commands.add_parser("inspect", help="what a checkpoint is, from its header alone")
    inspect.set_defaults(run=run_inspect)
    inspect.add_argument("path", type=_path)

    doctor = _add_doctor(commands)
    for command in (generate, batch, calibrate, inspect, doctor):
        command.add_argument("--json", action="store_true")
    return parser


def _add_batch(commands: Any) -> argparse.ArgumentParser:
    """The command `batch`, and its options."""
    batch: argparse.ArgumentParser = commands.add_parser(
        "batch",
        help="many clips, on this machine or on a Ray cluster",
        description="Makes a clip of each line of JOBS, a JSON object whose keys are options of "
        'generate without their dashes, as {"image": "a.png", "prompt": "a red circle", "seed": '
        "1}. What a line leaves out is taken from the options given here. Clips are named by what "
        "they are made from; those that are there are not made again, so the same command "
        "continues a batch that was stopped. Weights are loaded once and kept, the text encoder "
        "too.",
    )
    batch.set_defaults(run=run_batch)
    batch.add_argument(
        "jobs", type=_path, metavar="JOBS.jsonl", help="paths of pictures are relative to it"
    )
    batch.add_argument(
        "--out", type=_path, required=True, metavar="DIR", help="folder of the clips"
    )
    _add_weights(batch)
    _add_clip(batch)
    batch.add_argument(
        "--ray", metavar="ADDRESS",
        help="make the clips on a Ray cluster, or with `local` in several processes of this "
        "machine; a worker for each GPU",
    )  # fmt: skip
    batch.add_argument(
        "--workers", type=int, metavar="N",
        help="with --ray, so many (default: as there are GPUs, or machines without any)",
    )  # fmt: skip
    batch.add_argument(
        "--wiro-limit", metavar="USD",
        help='what the jobs with "backend": "remote", which are made on wiro.ai, may cost in all; '
        "none is sent without it",
    )  # fmt: skip
    return batch


def _add_weights(command: argparse.ArgumentParser) -> None:
    """The options of `generate` that stay the same in a batch: weights, and where they compute."""
    command.add_argument(
        "--transformer", type=_path, help="safetensors, GGUF or .pt file, or diffusers folder"
    )
    command.add_argument("--vae", type=_path, help="VAE file or folder")
    command.add_argument(
        "--text-encoder",
        type=_path,
        action="append",
        metavar="PATH",
        help="folder with both text encoders and their tokenizers; or given twice, the files of "
        "LLaMA-3 and CLIP-L",
    )
    command.add_argument(
        "--tokenizer",
        type=_path,
        action="append",
        metavar="DIR",
        help="folder of a tokenizer, or of both, for text encoders in single files; default: "
        "beside them",
    )
    command.add_argument("--precision", choices=TRANSFORMER_PRECISIONS, default="auto")
    command.add_argument(
        "--device", "--devices", default="auto",
        help="auto, cpu, cuda or cuda:N; or two with a comma between them, each of which makes one "
        "of the two predictions of a step: cuda:0,cuda:1",
    )  # fmt: skip
    command.add_argument(
        "--lora",
        type=parse_lora,
        action="append",
        default=[],
        metavar="FILE[:STRENGTH]",
        help="a HunyuanVideo LoRA, default strength 1; may be given several times",
    )
    command.add_argument(
        "--prompt-cache", type=_path, metavar="DIR", help="cache encoded prompts in this folder"
    )


def _add_clip(command: argparse.ArgumentParser) -> None:
    """The options of `generate` that a job of a batch may have too."""
    command.add_argument("--prompt", help="what happens ('FPS-24, ' is added)")
    command.add_argument("--negative", help="what to avoid (default: the official list)")
    command.add_argument("--width", type=int, help="multiple of 16 (default 960; built-in 64)")
    command.add_argument("--height", type=int, help="multiple of 16 (default 544; built-in 64)")
    command.add_argument("--frames", type=int, help="4k+1 (default 97; built-in 17)")
    command.add_argument("--steps", type=int, help="default 30")
    command.add_argument("--cfg", type=float, help="true CFG scale, default 6")
    command.add_argument(
        "--embedded-guidance", type=float, help="keep 1.0, the value of the training"
    )
    command.add_argument("--shift", type=float, help="schedule shift, default 7")
    command.add_argument("--seed", type=int, default=0, help="default 0")
    command.add_argument("--fit", choices=("crop", "pad", "stretch"), default="crop")
    command.add_argument("--noise-augmentation", type=float, default=0.0, metavar="S")
    command.add_argument("--latent-strength", type=float, default=1.0, metavar="S")
    command.add_argument("--decode", choices=DECODE_MODES, default="auto")
    command.add_argument(
        "--attention",
        choices=ATTENTIONS,
        default="exact",
        help="fast uses 8 bits on a GPU; sparse and sparser also skip distant detail",
    )
    command.add_argument(
        "--cache",
        choices=CACHE_CHOICES,
        default="off",
        help="skip predictable steps; off is exact, calibrated takes what `calibrate` has stored",
    )
    command.add_argument(
        "--bad-render",
        choices=BAD_RENDERS,
        default="off",
        help="halfway, look whether the clip will stand still, cut to another scene or change "
        "colours: say so, stop, or go on with the next seed (four tries in all)",
    )
    command.add_argument(
        "--riflex",
        choices=("auto", "off"),
        default="auto",
        help="auto keeps clips beyond 177 frames from repeating; shorter ones do not change",
    )
    command.add_argument(
        "--window",
        type=parse_window,
        metavar="FRAMES[:OVERLAP]",
        help="sample a longer clip in windows of so many frames, 4k+1, that overlap by a multiple "
        "of 4 (default a quarter); 97 is the trained length",
    )
    command.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        default="official",
        help="defaults of --steps, --cfg, --embedded-guidance and --shift; few-steps (6, 1, 6, 17) "
        "is experimental, for a step-distilled LoRA",
    )


def _add_doctor(commands: Any) -> argparse.ArgumentParser:
    """The command `doctor`, and its options."""
    doctor: argparse.ArgumentParser = commands.add_parser(
        "doctor", help="devices, kernels and why each is used or not, versions, weights found"
    )
    doctor.set_defaults(run=run_doctor)
    doctor.add_argument(
        "--plan", action="store_true", help="what a clip would take here, in each mode"
    )
    for option, default in (("width", 960), ("height", 544), ("frames", 97), ("steps", 30)):
        doctor.add_argument(
            f"--{option}", type=int, default=default, help=f"of that clip, default {default}"
        )
    doctor.add_argument("--cfg", type=float, default=6.0, help="of that clip, default 6")
    doctor.add_argument("--device", default="auto", help="of that clip: auto, cpu, cuda or cuda:N")
    return doctor


def _add_from_receipt(generate: argparse.ArgumentParser, defaults: Mapping[str, Any]) -> None:
    generate.add_argument(
        "--from-receipt",
        type=_path,
        metavar="FILE",
        help="take prompt, seed and settings of an earlier clip from its .mp4, or from its receipt "
        "as .json; what is given beside it counts",
    )
    generate.set_defaults(**defaults)


def _add_extend(generate: argparse.ArgumentParser) -> None:
    """The options of `generate` that continue a clip."""
    generate.add_argument(
        "--extend",
        type=_path,
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


def _add_calibrate(commands: Any) -> argparse.ArgumentParser:
    """The command `calibrate`, and its options."""
    calibrate: argparse.ArgumentParser = commands.add_parser(
        "calibrate",
        help="the cache's threshold for these weights, from exact runs",
        description="Makes exact clips, finds the threshold with which --cache easy would take the "
        "wanted number of model evaluations, and stores it beside the weights for --cache "
        "calibrated. An interrupted calibration continues with the same command.",
    )
    calibrate.set_defaults(run=run_calibrate)
    calibrate.add_argument(
        "models",
        nargs="*",
        type=_path,
        metavar="MODEL",
        help="transformer, as --transformer of generate; a folder that also holds the VAE and the "
        "text encoders needs no --vae and no --text-encoder; without any MODEL, the built-in one",
    )
    calibrate.add_argument("--vae", type=_path, help="as of generate")
    for option, metavar in (("--text-encoder", "PATH"), ("--tokenizer", "DIR")):
        calibrate.add_argument(
            option, type=_path, action="append", metavar=metavar, help="as of generate"
        )
    calibrate.add_argument(
        "--prompts", type=_path, metavar="FILE", help="one prompt a line (default: eight of ours)"
    )
    calibrate.add_argument(
        "--image",
        type=_path,
        action="append",
        metavar="FILE",
        help="picture of the first prompt, of the second if given again, and so on in turn; "
        "pictures are drawn without one, so give some that are like yours",
    )
    calibrate.add_argument("--negative", help="as of generate")
    calibrate.add_argument(
        "--passes",
        default="50%",
        metavar="N",
        help="model evaluations of a clip that are wanted: a count as 30, or a share as 50%% or "
        "0.5 (default 50%%)",
    )
    calibrate.add_argument(
        "--check",
        type=int,
        default=0,
        metavar="N",
        help="make so many more clips, exact and with the threshold, and compare them (default 0)",
    )
    calibrate.add_argument("--width", type=int, help="multiple of 16 (default 960; built-in 64)")
    calibrate.add_argument("--height", type=int, help="multiple of 16 (default 544; built-in 64)")
    calibrate.add_argument("--frames", type=int, help="4k+1 (default 97; built-in 17)")
    calibrate.add_argument("--steps", type=int, default=30, help="default 30")
    calibrate.add_argument("--cfg", type=float, default=6.0, help="true CFG scale, default 6")
    calibrate.add_argument("--shift", type=float, default=7.0, help="schedule shift, default 7")
    calibrate.add_argument("--seed", type=int, default=0, help="of the first clip, default 0")
    calibrate.add_argument("--precision", choices=TRANSFORMER_PRECISIONS, default="auto")
    calibrate.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    calibrate.add_argument(
        "--user-folder",
        action="store_true",
        help="store the result in the folder of your own settings, not beside MODEL; --cache "
        "calibrated finds it there too",
    )
    return calibrate


def _with_receipt(arguments: argparse.Namespace, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments again, with what a receipt says where nothing was given.

    Returns:
        Complete ones; `receipt` is what was read.

    Raises:
        OptionError: the receipt cannot be read, or names weights that were not given.
    """
    from .builtin import BUILTIN_NAME
    from .pipeline.receipt import read_receipt

    receipt = read_receipt(arguments.from_receipt)
    known = {k: v for k, v in receipt.parameters.items() if k not in receipt.unknown}
    names = {"negative_prompt": "negative", "num_frames": "frames"}
    defaults = {names.get(name, name): value for name, value in known.items()}
    if known.get("riflex_k") == 0:
        defaults["riflex"] = "off"
    defaults["receipt"] = receipt
    if arguments.extend is not None:  # the clip has a size
        defaults = {k: v for k, v in defaults.items() if k not in ("width", "height")}
    again = _make_parser(defaults).parse_args(argv)
    if receipt.model != BUILTIN_NAME and again.transformer is None:
        told = receipt.weights.get("transformer", receipt.model)
        raise OptionError(
            f"The clip of the receipt was made with {told}, and a receipt names no folder: give "
            "--transformer, --vae and --text-encoder."
        )
    if receipt.loras and not again.lora:
        loras = " ".join(f"--lora PATH/{each.name}:{each.strength:g}" for each in receipt.loras)
        raise OptionError(
            f"The clip of the receipt was made with LoRAs, and a receipt names no folder: give "
            f"{loras}."
        )
    if receipt.by_hand:
        say(f"Not in the receipt, and missing now: {', '.join(receipt.by_hand)}.")
    if "seed" in receipt.unknown:
        say("The receipt names no seed (Wiro picks its own): the clip will be another one.")
    return again


def parse_lora(text: str) -> tuple[Path, float]:
    """Read the value of --lora.

    Args:
        text: FILE or FILE:STRENGTH. What follows the last colon is a strength only if it is a
            number, so the colon of a Windows drive is part of the file.

    Returns:
        The file and the strength, 1 if none is given.
    """
    file, colon, strength = text.rpartition(":")
    if colon and file and not _path(text).is_file():
        with contextlib.suppress(ValueError):
            return _path(file), float(strength)
    return _path(text), 1.0


def parse_window(text: str) -> tuple[int, int | None]:
    """Read the value of --window.

    Args:
        text: FRAMES or FRAMES:OVERLAP.

    Returns:
        Frames of a window, and of the overlap; None if it is not given.

    Raises:
        ValueError: one of them is no whole number.
    """
    frames, colon, overlap = text.partition(":")
    return int(frames), int(overlap) if colon else None


# --- generate -----------------------------------------------------------------------------------


def run_generate(arguments: argparse.Namespace) -> dict[str, Any]:
    """`generate`: load, encode, sample, decode, write."""
    start = time.perf_counter()
    _check_places(arguments)  # before minutes of work, not after
    is_builtin = _check_weights(arguments)
    _check_extend(arguments)
    apply_preset(arguments)
    width, height, num_frames = _size_of(arguments)

    from .builtin import BUILTIN_NOTICE, warn_of_builtin_size
    from .conditioning.latents import check_size
    from .media import read_clip
    from .pipeline.extend import check_clip

    image: Tensor | None
    if arguments.extend is not None:
        image = read_clip(arguments.extend)
        height, width = image.shape[1:3]
        check_clip(image, _extend_settings(arguments, num_frames))
    else:
        check_size(width, height, num_frames)
        image = _picture_of(arguments)
    if is_builtin:
        say(BUILTIN_NOTICE)
        warn_of_builtin_size(width, height, num_frames)
    with (
        remembered_interrupt() as check,
        _chosen_options_logged(arguments),
        progress_bar() as report,
    ):
        count, receipt = _generate(arguments, image, (width, height, num_frames), report, check)
    if arguments.resume is not None:
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


def _check_weights(arguments: argparse.Namespace) -> bool:
    """Refuse weights of which some are not named.

    Returns:
        Whether the built-in model is asked for.

    Raises:
        OptionError: names the options.
    """
    paths = (arguments.transformer, arguments.vae, arguments.text_encoder)
    if any(paths) and not all(paths):
        raise OptionError(
            "--transformer, --vae and --text-encoder belong together: give all three, or none for "
            "the built-in model."
        )
    if arguments.tokenizer is not None and not any(paths):
        raise OptionError("--tokenizer belongs to --text-encoder: give it, or leave it out.")
    return not any(paths)


def _size_of(arguments: argparse.Namespace) -> tuple[int, int, int]:
    """Width, height and frames, given or usual."""
    defaults = (64, 64, 17) if arguments.transformer is None else (960, 544, 97)
    given = (arguments.width, arguments.height, arguments.frames)
    width, height, num_frames = (
        default if value is None else value for value, default in zip(given, defaults, strict=True)
    )
    return width, height, num_frames


def _picture_of(arguments: argparse.Namespace) -> "Tensor | None":
    """The picture that a clip begins with."""
    from .image import example_image
    from .media import read_image

    if arguments.image:
        return read_image(arguments.image)
    return example_image() if arguments.transformer is None else None


def _check_places(arguments: argparse.Namespace) -> None:
    """Refuse places where the run could not write.

    Raises:
        OptionError: names the option's path.
    """
    from .media import check_output, check_place

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
    """Load what makes the clip, and make it; see `_make_clip`."""
    start = time.perf_counter()
    settings = _sampling_settings(arguments, _read_loras(arguments))
    _image_settings(arguments)  # refuses illegal ones
    end_image = _end_image(arguments)
    runtime = _runtime_of(arguments, report, check)
    if arguments.transformer is not None:  # minutes before they are loaded
        _check_files(arguments, image is not None)
    prompts = _encode_prompts(arguments, runtime, _load_encoder)
    models = _load_models(arguments, runtime)
    _describe_loras(settings.loras, models[0])
    return _make_clip(
        arguments, image, end_image, size, settings, models, prompts, runtime=runtime, start=start
    )


def _end_image(arguments: argparse.Namespace) -> "Tensor | None":
    from .media import read_image

    return None if arguments.end_image is None else read_image(arguments.end_image)


def _check_files(arguments: argparse.Namespace, has_picture: bool) -> None:
    """Refuse weights that cannot be loaded, and a picture where they take none, or the reverse."""
    from .weights.load import check_transformer, check_vae

    config = check_transformer(arguments.transformer).config
    check_vae(arguments.vae)
    _check_picture(arguments, config, has_picture, _image_settings(arguments))


def _describe_loras(loras: "tuple[AppliedLora, ...]", transformer: "SkyReelsTransformer") -> None:
    from .weights.lora.apply import check_loras
    from .weights.lora.report import describe_lora

    check_loras(transformer, loras)
    for applied in loras:
        say(describe_lora(applied, transformer))


def _make_clip(  # noqa: PLR0917 - of two callers
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
    from .pipeline import image_to_latents
    from .pipeline.extend import Continuation, extend_latents
    from .sampling.bad_render import with_retries
    from .vae.frames import FrameSink
    from .vae.tiling import decode_into

    transformer, vae = models
    width, height, num_frames = size
    options: Any = {"image_settings": _image_settings(arguments), "runtime": runtime}
    clip = None if arguments.extend is None else image
    if clip is None:
        options |= {"width": width, "height": height, "num_frames": num_frames,
                    "end_image": end_image}  # fmt: skip
    else:
        extend = _extend_settings(arguments, num_frames)
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
    receipt = _make_receipt(arguments, named, image, size, used, runtime.device, elapsed_s)
    leave_ranks()
    if not is_first():  # the first rank has the same latents, and writes the file
        return num_frames, receipt
    with _clip_file(arguments.out, (num_frames, height, width), receipt) as file:
        sink: FrameSink = file
        if clip is not None:
            sink = Continuation(clip, extend, file, check=runtime.check_interrupt)
        decode_into(sink, vae, vae_latents, arguments.decode, runtime=runtime)
        runtime.check_interrupt()
    return num_frames, receipt


def _load_models(
    arguments: argparse.Namespace, runtime: "Runtime"
) -> "tuple[SkyReelsTransformer, VideoVAE]":
    from .builtin import builtin_transformer, builtin_vae
    from .weights.load import load_transformer, load_vae

    precision = arguments.precision
    if arguments.transformer is None:
        transformer = builtin_transformer(precision=precision, runtime=runtime)
        return transformer, builtin_vae(runtime=runtime)
    transformer = load_transformer(arguments.transformer, precision=precision, runtime=runtime)
    return transformer, load_vae(arguments.vae, runtime=runtime)


def _sampling_settings(
    arguments: argparse.Namespace, loras: "tuple[AppliedLora, ...]"
) -> "SamplingSettings":
    """What the options ask the sampler for."""
    from .config import ContextWindows, Guidance
    from .sampling.settings import SamplingSettings, get_sigmas

    return SamplingSettings(
        seed=arguments.seed,
        sigmas=get_sigmas(arguments.steps, arguments.shift),
        guidance=Guidance(arguments.cfg, arguments.embedded_guidance),
        riflex_k=riflex_k(arguments),
        cache=_chosen_cache(arguments),
        attention=arguments.attention,
        resume=arguments.resume,
        loras=loras,
        windows=arguments.window and ContextWindows.of_frames(*arguments.window),
        bad_render=arguments.bad_render,
    )


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
    from .media import open_frames
    from .pipeline.receipt import MARK, MOMENTARY, SUFFIX, to_text

    # the same inputs give the same file, whenever and however fast it was made
    held = {MARK: to_text({k: v for k, v in receipt.items() if k not in MOMENTARY})}
    with open_frames(path, *shape, metadata=held) as file:
        yield file
    if path.suffix.lower() == ".npy":
        write_json(path.with_name(path.stem + SUFFIX), receipt)


def _make_receipt(  # noqa: PLR0917 - of one caller
    arguments: argparse.Namespace,
    models: Mapping[str, Any],
    image: "Tensor | None",
    size: tuple[int, int, int],
    settings: "SamplingSettings",
    device: "torch.device",
    elapsed_s: float,
) -> dict[str, Any]:
    """The receipt of the clip; says what differs from the one that the settings came from."""
    from .builtin import BUILTIN_NAME
    from .conditioning.embeds import with_fps_prefix
    from .image import PictureOrigin, picture_digest
    from .pipeline.receipt import describe_source, difference, make_receipt
    from .text.encode import DEFAULT_NEGATIVE_PROMPT

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
        **_describe_text_encoders(arguments),
    }
    origin = None
    if image is not None:
        origin = PictureOrigin(
            _image_settings(arguments),
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


def _describe_text_encoders(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a receipt says of the two text encoders."""
    from .builtin import BUILTIN_FOLDER, BUILTIN_NAME
    from .pipeline.receipt import describe_weights
    from .text.sources import TextSources, find_text_sources
    from .weights.inspect import inspect

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


def _image_settings(arguments: argparse.Namespace) -> "ImageSettings":
    from .image import ImageSettings

    return ImageSettings(
        arguments.fit,
        noise_augmentation=arguments.noise_augmentation,
        latent_strength=arguments.latent_strength,
    )


def _chosen_cache(arguments: argparse.Namespace) -> "CacheConfig":
    """The cache of --cache, for the transformer that will be loaded."""
    from .builtin import BUILTIN_FOLDER
    from .weights.load import check_transformer

    info = None
    if arguments.cache == CALIBRATED:
        info = check_transformer(arguments.transformer or BUILTIN_FOLDER / "transformer")
    return choose_cache(arguments.cache, info, arguments.steps)


def _read_loras(arguments: argparse.Namespace) -> "tuple[AppliedLora, ...]":
    """The LoRAs of --lora, for the transformer that will be loaded."""
    from .builtin import BUILTIN_FOLDER
    from .weights.load import check_transformer
    from .weights.lora.apply import AppliedLora
    from .weights.lora.read import load_lora

    if not arguments.lora:
        return ()
    config = check_transformer(arguments.transformer or BUILTIN_FOLDER / "transformer").config
    return tuple(
        AppliedLora(load_lora(file, config), strength)  # type: ignore[arg-type]
        for file, strength in arguments.lora
    )


def _check_picture(
    arguments: argparse.Namespace, config: Any, has_picture: bool, settings: "ImageSettings"
) -> None:
    """Refuse a picture, or options for one, where the transformer takes none, and the reverse.

    Raises:
        OptionError: names them.
    """
    from .conditioning.latents import check_picture
    from .image import ImageSettings

    check_picture(config, has_picture)
    if not has_picture and (settings != ImageSettings() or arguments.end_image is not None):
        raise OptionError(
            "--end-image, --fit, --noise-augmentation and --latent-strength are for a picture, and "
            "a text-to-video transformer takes none: leave them out."
        )


def riflex_k(arguments: argparse.Namespace) -> int:
    """The temporal frequency that RIFLEx lowers in long clips; 0 is off.

    Args:
        arguments: of `generate`.

    Returns:
        SkyReels' own; the built-in model has none that a clip could outgrow.
    """
    is_builtin = arguments.transformer is None
    return 0 if is_builtin or arguments.riflex == "off" else 4


def apply_preset(arguments: argparse.Namespace) -> None:
    """Take from the preset what was not given.

    Args:
        arguments: of `generate`; they are completed.
    """
    for name, value in vars(PRESETS[arguments.preset]).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)


def _check_extend(arguments: argparse.Namespace) -> None:
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


def _extend_settings(arguments: argparse.Namespace, num_frames: int) -> "ExtendSettings":
    from .pipeline.extend import ExtendSettings

    overlap = 1 if arguments.overlap is None else arguments.overlap
    return ExtendSettings(num_frames, overlap, not arguments.no_color_match)


def _load_encoder(source: "Path | TextSources | None", runtime: "Runtime") -> "TextEncoder":
    """The text encoder of files or a folder; without any, the built-in one."""
    from .builtin import builtin_text_encoder
    from .text.load import load_text_encoder

    if source is None:
        return builtin_text_encoder(runtime=runtime)
    return load_text_encoder(source, runtime=runtime)


def _encode_prompts(
    arguments: argparse.Namespace,
    runtime: "Runtime",
    load: "Callable[[Path | TextSources | None, Runtime], TextEncoder]",
) -> "tuple[PromptEmbeds, PromptEmbeds | None]":
    """Prompt and negative prompt; the text encoder (8 B parameters) is freed when this returns.

    Unless `load` keeps it. With --prompt-cache, prompts encoded earlier are found without it.

    Returns:
        The negative one is None if CFG does not use it.
    """
    from .text.encode import DEFAULT_NEGATIVE_PROMPT, cached_prompt, encode_prompt
    from .text.load import fingerprint_text_encoder
    from .text.sources import find_text_sources

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


def pick_device(name: str) -> str:
    """The device for "auto", or the named one if it exists.

    Args:
        name: auto, cpu, cuda or cuda:N.

    Returns:
        Its name for torch.

    Raises:
        OptionError: unknown device, or CUDA where there is none.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", name):
        raise OptionError(
            f"Device {name!r} is not one of auto, cpu, cuda, cuda:N: use cpu, or the nodes in "
            "ComfyUI, which also run on devices that it supports."
        )
    kind, _, index = name.partition(":")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise OptionError(
            f"Device {name!r} not found (CUDA devices: {torch.cuda.device_count()}): use cpu, or "
            "see `python -m skyreels doctor`."
        )
    return name


def _runtime_of(
    arguments: argparse.Namespace, report: Any, check: Callable[[], None]
) -> "TorchRuntime":
    """Where a clip is made, on one device or two."""
    from .runtime import TorchRuntime
    from .runtime.outcomes import user_folder

    (device, second), folder = pick_devices(arguments.device), user_folder()
    partner = group = None
    if is_rank():
        device, group = join_ranks(device)
    if second is not None:
        partner = TorchRuntime(second, on_check=check, state_folder=folder)
    return TorchRuntime(
        device,
        on_progress=report,
        on_check=check,
        state_folder=folder,
        partner=partner,
        group=group,
    )


def pick_devices(names: str) -> tuple[str, str | None]:
    """The device of a run, and a second one where two are named.

    Args:
        names: as for `pick_device`; or two with a comma between them.

    Returns:
        Their names for torch.

    Raises:
        OptionError: as for `pick_device`; more than two, or one of them twice.
    """
    listed = [name.strip() for name in names.split(",")]
    if len(listed) > 2:
        raise OptionError(
            f"{len(listed)} devices are named ({names!r}): use one or two, as a step has two "
            "predictions."
        )
    picked = [pick_device(name) for name in listed]
    if len({"cuda:0" if name == "cuda" else name for name in picked}) < len(picked):
        raise OptionError(f"Device {picked[0]} is named twice in {names!r}: name two, or one.")
    return picked[0], picked[1] if len(picked) > 1 else None


@contextlib.contextmanager
def progress_bar() -> Iterator[Any]:
    """A bar on standard error: one line that is rewritten; in a file, a line now and then.

    Yields:
        The callback for progress reports.
    """
    started: dict[str, float] = {}
    is_terminal = sys.stderr.isatty()
    last_line = time.perf_counter()

    def report(stage: str, done: int, total: int, preview: "Tensor | None" = None) -> None:
        nonlocal last_line
        now = time.perf_counter()
        if done <= 0:
            started[stage] = now
        elapsed = now - started.setdefault(stage, now)
        if total <= 0:
            return
        left = f"{elapsed / done * (total - done):.0f} s left" if done > 0 and elapsed else ""
        if not is_terminal:
            if now - last_line >= LINE_PERIOD_S:
                last_line = now
                say(f"{stage} {100 * done // total} %, {left or 'just begun'}")
            return
        filled = 24 * done // total
        bar = "█" * filled + "·" * (24 - filled)
        sys.stderr.write(f"\r{stage:7} {bar} {100 * done // total:3d} %  {left:14}")
        if done >= total:
            sys.stderr.write(f"\r{stage:7} {'█' * 24} 100 %  {elapsed:.1f} s{'':14}\n")
        sys.stderr.flush()

    yield report


# --- batch --------------------------------------------------------------------------------------


def run_batch(arguments: argparse.Namespace) -> dict[str, Any]:
    """`batch`: a clip of each line, and a summary."""
    from .builtin import BUILTIN_NOTICE
    from .media import check_output
    from .pipeline import batch
    from .pipeline.ray_workers import Crew, check_crew, work_on_ray
    from .pipeline.remote import RemoteRuns, beside, parse_dollars

    is_builtin = _check_weights(arguments)
    check_output(arguments.out / "clip.mp4")
    count = arguments.workers
    if count is not None and (arguments.ray is None or not 1 <= count <= MAX_WORKERS):
        raise OptionError(f"--workers {count} is for --ray, and within 1..{MAX_WORKERS}: use 2.")
    if arguments.ray is None:
        pick_devices(arguments.device)
        crew = None
    else:
        arguments = argparse.Namespace(**_absolute(vars(arguments)))  # workers are elsewhere
        crew = Crew(arguments.ray, count, arguments.device, batch_maker, _fingerprints)
        check_crew(crew)
    limit = None if arguments.wiro_limit is None else parse_dollars(arguments.wiro_limit)
    weights = _fingerprints(arguments)
    with batch.locked(arguments.out):
        batch.remove_parts(arguments.out)
        lines = _read_jobs(arguments, weights)
        remote = None if limit is None else RemoteRuns(arguments.out, limit)
        if is_builtin:
            say(BUILTIN_NOTICE)
        with (
            remembered_interrupt() as check,
            progress_bar() as report,
            open(os.devnull, "w", encoding="utf-8") as nowhere,
            contextlib.redirect_stdout(nowhere),  # Ray tells of lost workers there
        ):

            def work_here(tasks: "Sequence[Task]") -> "Iterator[Ended]":
                if crew is not None:
                    return work_on_ray(tasks, arguments, crew, weights, say, check)
                make = batch_maker(arguments, report, check)
                return batch.work_here(tasks, make, arguments.out)

            def work(tasks: "Sequence[Task]") -> "Iterator[Ended]":
                here = work_here([task for task in tasks if not task.is_remote])
                if remote is None:
                    return here
                return beside(remote, [task for task in tasks if task.is_remote], here, check)

            result = batch.run_lines(lines, arguments.out, work, say)
    say(
        f"{arguments.out}: {result['made']} made, {result['found']} were there, "
        f"{result['failed']} failed, in {result['elapsed_s']:.1f} s; see {batch.SUMMARY}"
    )
    return result


def _absolute(value: Any) -> Any:
    """Arguments with absolute paths."""
    if isinstance(value, dict):
        return {name: _absolute(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_absolute, value))
    return value.absolute() if isinstance(value, Path) else value


def batch_maker(
    given: argparse.Namespace, report: Any = None, check: Callable[[], None] | None = None
) -> Callable[[argparse.Namespace], None]:
    """What makes the clips of a batch, with weights that are loaded when first needed, once.

    Args:
        given: arguments of `batch`.
        report: takes the progress.
        check: may interrupt.

    Returns:
        Makes the clip of arguments of `generate`; raises SkyReelsError.
    """
    from .runtime import never_interrupt

    runtime = _runtime_of(given, report or (lambda *_: None), check or never_interrupt)
    load_encoder: Any = functools.cache(_load_encoder)
    load_loras = _lora_reader(given)

    @functools.cache
    def load_models() -> "tuple[SkyReelsTransformer, VideoVAE]":
        return _load_models(given, runtime)

    @functools.cache
    def describe(lora: tuple[tuple[Path, float], ...]) -> None:
        _describe_loras(load_loras(lora), load_models()[0])

    def make(arguments: argparse.Namespace) -> None:
        try:
            make_checked(arguments)
        except SkyReelsError:
            raise
        except OSError as error:
            raise SkyReelsError(_of_file(error)) from error
        except Exception as error:  # of this clip; the others go on
            if sys.flags.dev_mode:
                raise
            raise SkyReelsError(_unexpected(error)) from error

    def make_checked(arguments: argparse.Namespace) -> None:
        start = time.perf_counter()
        image, end_image = _picture_of(arguments), _end_image(arguments)
        loras = load_loras(tuple(arguments.lora))
        if [each.lora.digest for each in loras] != arguments.lora_digests:
            raise OptionError(
                f"{', '.join(str(file) for file, _ in arguments.lora)}: not what the batch began "
                "with, or another file on this machine; copy it here, and run the command again."
            )
        settings = _sampling_settings(arguments, loras)
        if arguments.transformer is not None:
            _check_files(arguments, image is not None)
        prompts = _encode_prompts(arguments, runtime, load_encoder)
        models, size = load_models(), _size_of(arguments)
        describe(tuple(arguments.lora))
        _make_clip(
            arguments, image, end_image, size, settings, models, prompts,
            runtime=runtime, start=start,
        )  # fmt: skip

    return make


def _lora_reader(
    arguments: argparse.Namespace,
) -> "Callable[[tuple[tuple[Path, float], ...]], tuple[AppliedLora, ...]]":
    """Reads LoRAs for the transformer of a batch, each set once."""

    @functools.cache
    def read(lora: tuple[tuple[Path, float], ...]) -> "tuple[AppliedLora, ...]":
        return _read_loras(argparse.Namespace(**{**vars(arguments), "lora": lora}))

    return read


def _fingerprints(arguments: argparse.Namespace) -> dict[str, str]:
    """What the weights of a batch are.

    Returns:
        Part -> hash of samples of it.

    Raises:
        SkyReelsError: they are not there, or others than are needed.
    """
    from .builtin import BUILTIN_FOLDER
    from .pipeline.receipt import describe_weights
    from .weights.load import check_transformer, check_vae

    given = (arguments.transformer, arguments.vae)
    transformer, vae = given if all(given) else [BUILTIN_FOLDER / n for n in ("transformer", "vae")]
    told = {
        "transformer": describe_weights(check_transformer(transformer)),
        "vae": describe_weights(check_vae(vae)),
        **_describe_text_encoders(arguments),
    }
    found = {part: each["sampled_sha256"] for part, each in told.items()}
    for number, each in enumerate(_read_loras(arguments), 1):
        found[f"LoRA {number}"] = each.lora.digest
    return found


class _JobParser(argparse.ArgumentParser):
    """The options of a job; an illegal value is an OptionError."""

    def error(self, message: str) -> NoReturn:
        raise OptionError(
            message.removeprefix("argument ").removeprefix("--") + ": correct the line."
        )


def _read_jobs(arguments: argparse.Namespace, weights: Mapping[str, str]) -> "list[Line]":
    """The jobs of a batch, each checked.

    Args:
        arguments: of `batch`, the defaults of jobs.
        weights: part -> hash, see `_fingerprints`; a job has LoRAs of its own, or those given.

    Returns:
        A task, or an error, for each line.
    """
    from .pipeline import batch

    parser = _JobParser(add_help=False, allow_abbrev=False)
    for option in ("--image", "--end-image"):
        parser.add_argument(option, type=_path)
    parser.add_argument("--backend", choices=("local", "remote"), default="local")
    parser.add_argument("--lora", type=parse_lora, action="append")
    _add_clip(parser)
    # a parser's actions have no public list
    keys = sorted(name[2:] for name in parser._option_string_actions)
    lines = []
    usual = {**vars(arguments), "extend": None, "resume": None, "ranks": None, "receipt": None}
    usual["lora"] = None
    shared = {"weights": {p: h for p, h in weights.items() if not p.startswith("LoRA")}}
    read_loras = _lora_reader(arguments)
    folder = arguments.jobs.absolute().parent
    digests = functools.cache(batch.file_digest)  # of a picture that many lines name
    for number, text in batch.read_lines(arguments.jobs):
        try:
            told = batch.parse_line(text, keys)
            given = [f"--{key}={value}" for key, value in told]
            job = parser.parse_args(given, argparse.Namespace(**usual))
            is_remote = job.backend == "remote"
            files = {}
            for name in ("image", "end_image"):
                path = getattr(job, name, None)
                if path is not None:
                    setattr(job, name, folder / path)
                    files[name] = digests(folder / path)
            if is_remote:
                made_from = {**_check_remote(job, {key for key, _ in told}), **files}
            else:
                own = [(folder / path, strength) for path, strength in job.lora or ()]
                job.lora = own or arguments.lora
                loras = read_loras(tuple(job.lora))
                job.lora_digests = [each.lora.digest for each in loras]
                changes = [(each.lora.digest, each.strength) for each in loras]
                made_from = {**_check_job(job), "loras": changes, **files, **shared}
            digest = batch.content_hash(made_from)
            lines.append(batch.Line(number, batch.Task(digest, job, files, is_remote)))
        except SkyReelsError as error:
            lines.append(batch.Line(number, None, str(error)))
    return lines


#: arguments that a clip depends on, beside its pictures and the weights
_HASHED = (
    *("prompt", "width", "height", "frames", "steps", "cfg", "embedded_guidance", "shift", "seed"),
    *("fit", "noise_augmentation", "latent_strength", "precision", "decode", "attention"),
    *("bad_render", "riflex", "window"),
)


def _check_job(arguments: argparse.Namespace) -> dict[str, Any]:
    """Complete the arguments of a job, and refuse illegal ones before any work.

    Returns:
        What the clip is made from, by name, but for its pictures and the weights.

    Raises:
        OptionError: there is no prompt, or an illegal value.
        SkyReelsError: a size or a schedule that breaks a rule.
    """
    from .conditioning.latents import check_size
    from .text.encode import DEFAULT_NEGATIVE_PROMPT

    if not arguments.prompt:
        raise OptionError("There is no prompt: write one in the line, or give --prompt for all.")
    apply_preset(arguments)
    arguments.width, arguments.height, arguments.frames = _size_of(arguments)
    check_size(arguments.width, arguments.height, arguments.frames)
    settings = _sampling_settings(arguments, ())
    _image_settings(arguments)
    negative = DEFAULT_NEGATIVE_PROMPT if arguments.negative is None else arguments.negative
    told = {name: getattr(arguments, name) for name in _HASHED}
    return {**told, "negative": negative, "cache": repr(settings.cache)}


#: keys of a job that is made on Wiro
_REMOTE_KEYS = {
    *("backend", "image", "prompt", "negative", "width", "height", "frames", "steps", "cfg"),
}
_REMOTE_SIZES = ((960, 544), (544, 960))


def _check_remote(arguments: argparse.Namespace, told: Collection[str]) -> dict[str, Any]:
    """Complete the arguments of a job for Wiro, and refuse what is not for Wiro.

    Args:
        arguments: of the job, with the defaults of the batch.
        told: keys of its line.

    Returns:
        What the clip is made from, by name, but for its picture.

    Raises:
        OptionError: no limit, no prompt or picture, or what Wiro's model does not take.
    """
    from .conditioning.embeds import with_fps_prefix
    from .conditioning.latents import check_size

    if arguments.wiro_limit is None:
        raise OptionError(
            "It would be made on wiro.ai and cost money, and there is no limit: give --wiro-limit "
            'with US dollars for all such lines together, or leave out "backend".'
        )
    if others := sorted(set(told) - _REMOTE_KEYS):
        raise OptionError(
            f"{', '.join(others)} is for clips that are made here, and Wiro's model takes "
            f"{', '.join(sorted(_REMOTE_KEYS))}: leave it out."
        )
    if not arguments.prompt:
        raise OptionError("There is no prompt: write one in the line, or give --prompt for all.")
    if arguments.image is None:
        raise OptionError("Wiro's model starts from a picture: name its file as image.")
    usual = {"width": 960, "height": 544, "frames": 97, "steps": 30, "cfg": 6.0, "negative": ""}
    for name, value in usual.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    size = (arguments.width, arguments.height)
    if size not in _REMOTE_SIZES:
        raise OptionError(f"{size[0]}x{size[1]} is not made on Wiro: use 960x544 or 544x960.")
    check_size(*size, arguments.frames)
    arguments.prompt = with_fps_prefix(arguments.prompt)
    told_of = {name: getattr(arguments, name) for name in usual}
    return {"backend": "wiro", "prompt": arguments.prompt, **told_of}


# --- calibrate ----------------------------------------------------------------------------------


def run_calibrate(arguments: argparse.Namespace) -> dict[str, Any]:
    """`calibrate`: exact clips of each model, replayed, and the result stored."""
    from .builtin import BUILTIN_FOLDER, BUILTIN_NOTICE
    from .conditioning.latents import check_size
    from .runtime import TorchRuntime
    from .runtime.outcomes import user_folder
    from .sampling.calibrate import parse_passes
    from .sampling.settings import check_schedule

    start = time.perf_counter()
    if not arguments.models:
        if arguments.vae or arguments.text_encoder or arguments.tokenizer:
            raise OptionError(
                "--vae, --text-encoder and --tokenizer belong to a MODEL: name its transformer, or "
                "leave them out for the built-in model."
            )
        say(BUILTIN_NOTICE)
    check_schedule(arguments.steps, arguments.shift, 1.0)
    num_passes = arguments.steps * (2 if arguments.cfg > 1 else 1)
    passes = parse_passes(arguments.passes, arguments.steps, num_passes)
    if not 0 <= arguments.check <= MAX_CLIPS:
        raise OptionError(f"--check {arguments.check} is not within 0..{MAX_CLIPS}: use 8.")
    prompts = _read_prompts(arguments.prompts)
    size = [arguments.width, arguments.height, arguments.frames]
    defaults = (960, 544, 97) if arguments.models else (64, 64, 17)
    size = [default if n is None else n for n, default in zip(size, defaults, strict=True)]
    check_size(*size)
    models = arguments.models or [BUILTIN_FOLDER]
    for model in models:  # minutes before the last one is loaded
        _check_model(arguments, model)
    found = []
    with remembered_interrupt() as check, progress_bar() as report:
        for model in models:
            runtime = TorchRuntime(
                pick_device(arguments.device),
                on_progress=report,
                on_check=check,
                state_folder=user_folder(),
            )
            found.append(_calibrate(arguments, model, prompts, size, passes, runtime))
    return {"models": found, "elapsed_s": round(time.perf_counter() - start, 3)}


def _read_prompts(path: Path | None) -> list[str] | None:
    """The lines of a file; None without one.

    Returns:
        The prompts.

    Raises:
        OptionError: not a text file of 1..MAX_CLIPS prompts.
    """
    if path is None:
        return None
    try:
        check_regular(path)
        text = path.read_bytes()[:1_000_000].decode("utf-8-sig")
    except UnicodeDecodeError:
        raise OptionError(f"{path} is not text in UTF-8: save it so.") from None
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not 1 <= len(prompts) <= MAX_CLIPS:
        raise OptionError(
            f"{path} has {len(prompts)} prompts, and 1..{MAX_CLIPS} are used: write one a line; "
            "eight are enough."
        )
    return prompts


def _check_model(arguments: argparse.Namespace, model: Path) -> None:
    """Refuse what cannot be calibrated, or has no place for the result.

    Raises:
        OptionError: a VAE, a text encoder or a writable place is missing.
        SkyReelsError: see the functions called.
    """
    from .conditioning.latents import check_picture
    from .media import check_place
    from .sampling.calibrate import place_of_user
    from .text.sources import find_text_sources
    from .weights.load import check_transformer, check_vae

    info = check_transformer(model)
    takes_image = info.config.takes_image  # type: ignore[union-attr]
    check_picture(info.config, takes_image or bool(arguments.image))  # type: ignore[arg-type]
    if arguments.vae is None and not (model / "vae").is_dir():
        raise OptionError(f"There is no VAE in {model}: give --vae PATH.")
    check_vae(arguments.vae or model)
    if arguments.text_encoder is None and not (model / "text_encoder").is_dir():
        raise OptionError(f"There is no text encoder in {model}: give --text-encoder PATH.")
    find_text_sources(arguments.text_encoder or [model], arguments.tokenizer or ())
    place, fingerprint = _place_of_calibration(arguments, info)
    try:
        check_place(place)
    except OptionError as error:
        other = place_of_user(fingerprint)
        if other is None or other == place:
            raise
        raise OptionError(
            f"{error} Or give --user-folder: then {other} is written, where --cache calibrated "
            "looks too."
        ) from None


def _place_of_calibration(
    arguments: argparse.Namespace, info: "CheckpointInfo"
) -> tuple[Path, str]:
    """Where the result is stored, and the fingerprint of the weights."""
    from .sampling.calibrate import fingerprint_weights, place_beside, place_of_user

    fingerprint = fingerprint_weights(info)
    if arguments.models and not arguments.user_folder:
        return place_beside(info), fingerprint
    place = place_of_user(fingerprint)  # the built-in model lies in the program's own folder
    if place is None:
        raise OptionError("You have no home folder to store the result in: set HOME.")
    return place, fingerprint


def _calibrate(
    arguments: argparse.Namespace,
    model: Path,
    prompts: list[str] | None,
    size: list[int],
    passes: float,
    runtime: "Runtime",
) -> dict[str, Any]:
    """Calibrate one model and store the result; says what it is."""
    from .builtin import builtin_transformer, builtin_vae
    from .config import Guidance
    from .pipeline.calibration import Size, Target, calibrate, unfinished_place
    from .sampling.calibrate import save_calibration
    from .sampling.settings import SamplingSettings, get_sigmas
    from .weights.load import check_transformer, load_transformer, load_vae

    info = check_transformer(model)
    place, fingerprint = _place_of_calibration(arguments, info)
    takes_image = info.config.takes_image  # type: ignore[union-attr]
    if arguments.models and takes_image and not arguments.image:
        say(
            "No --image: the clips begin with drawn pictures of coloured circles. A threshold from "
            "pictures and prompts like yours fits them better."
        )
    settings = SamplingSettings(
        sigmas=get_sigmas(arguments.steps, arguments.shift),
        guidance=Guidance(arguments.cfg),
        riflex_k=4 if arguments.models else 0,
    )
    width, height, num_frames = size
    cases, checks = _cases(arguments, model, prompts, size, info, runtime)
    if arguments.models:
        transformer = load_transformer(model, precision=arguments.precision, runtime=runtime)
        vae = load_vae(arguments.vae or model, runtime=runtime)
    else:
        transformer = builtin_transformer(arguments.precision, runtime=runtime)
        vae = builtin_vae(runtime=runtime)
    name = info.path.name if arguments.models else "built-in"
    told = {
        "width": width,
        "height": height,
        "frames": num_frames,
        "steps": arguments.steps,
        "cfg": arguments.cfg,
        "shift": arguments.shift,
        "precision": arguments.precision,
    }
    found = calibrate(
        transformer,
        vae,
        cases,
        checks,
        settings,
        Size(width, height, num_frames),
        passes=passes,
        target=Target(name, fingerprint, place, told),
        runtime=runtime,
        tell=say,
    )
    save_calibration(place, found)
    unfinished_place(place).unlink(missing_ok=True)
    if found.replayed.passes > passes:
        say(f"No threshold up to {found.threshold:g} saves as much as is wanted.")
    for kind, score in (("expected from replay", found.replayed), ("measured", found.measured)):
        if score is not None:
            say(
                f"{name}: threshold {found.threshold:g} takes {score.passes:g} of "
                f"{found.passes_of} model evaluations; latents {score.median_db:g} dB to exact, "
                f"worst {score.worst_db:g} dB ({kind}, {score.clips} clips)"
            )
    say(f"Stored in {place}; use it with --cache calibrated.")
    return {"model": name, "file": str(place), "passes_wanted": passes, **found.to_json()}


def _cases(
    arguments: argparse.Namespace,
    model: Path,
    prompts: list[str] | None,
    size: list[int],
    info: "CheckpointInfo",
    runtime: "Runtime",
) -> "tuple[list[Case], list[Case]]":
    """The clips to calibrate with, then those to check with: further prompts, further seeds."""
    from .builtin import builtin_text_encoder
    from .media import read_image
    from .pipeline.calibration import DEFAULT_CLIPS, Case, drawn_image, drawn_prompts
    from .text.encode import DEFAULT_NEGATIVE_PROMPT, encode_prompt
    from .text.load import load_text_encoder
    from .text.sources import find_text_sources

    pictures = [read_image(path) for path in arguments.image or ()]
    count = DEFAULT_CLIPS if prompts is None else len(prompts)
    texts = prompts or drawn_prompts()
    if arguments.models:
        source = find_text_sources(arguments.text_encoder or [model], arguments.tokenizer or ())
        encoder = load_text_encoder(source, runtime=runtime)
    else:
        encoder = builtin_text_encoder(runtime=runtime)
    encoded = [encode_prompt(encoder, text, runtime=runtime) for text in texts]
    negative = None
    if arguments.cfg > 1:
        text = DEFAULT_NEGATIVE_PROMPT if arguments.negative is None else arguments.negative
        negative = encode_prompt(encoder, text, fps_prefix=False, runtime=runtime)
    cases = []
    for index in range(count + arguments.check):
        image = None
        if info.config.takes_image:  # type: ignore[union-attr]
            drawn = drawn_image(index, size[0], size[1])
            image = pictures[index % len(pictures)] if pictures else drawn
        prompt = encoded[index % len(encoded)]
        cases.append(Case(prompt, negative, image, arguments.seed + index))
    return cases[:count], cases[count:]


# --- inspect, doctor ----------------------------------------------------------------------------


def run_inspect(arguments: argparse.Namespace) -> dict[str, Any]:
    """`inspect`: describe a checkpoint."""
    from .weights.inspect import FAMILY_NAMES, inspect

    info = inspect(arguments.path)
    if not arguments.json:
        kind = FAMILY_NAMES[info.family] + (f" ({info.variant})" if info.variant else "")
        dtypes = ", ".join(f"{count:,} in {name}" for name, count in info.dtypes.items())
        lines = {
            "is": kind,
            "layout": f"{info.layout or '-'}, prefix {info.prefix or 'none'}",
            "tensors": f"{info.num_tensors:,} with {info.num_parameters:,} parameters "
            f"({info.num_bytes / 1e9:.2f} GB)",
            "dtypes": f"{dtypes}; 8-bit scales: {info.scales}",
            "guidance": "embedded" if info.guidance_embeds else "no embedding",
        }
        say(shown(info.path, MAX_MESSAGE))
        for name, text in lines.items():
            if name != "guidance" or info.family == "transformer":
                say(f"  {name:9} {text}")
    return info.to_json()


def run_doctor(arguments: argparse.Namespace) -> dict[str, Any]:
    """`doctor`: what is installed and what is used; with --plan, what a clip would take."""
    from .doctor import examine

    findings: dict[str, Any] = dict(examine())
    if not arguments.json:
        for section, values in findings.items():
            say(section)
            width = max(map(len, values))
            for name, text in values.items():
                say(f"  {name:{width}}  {text}")
    if arguments.plan:
        findings["plan"] = _plan(arguments)
    return findings


def _plan(arguments: argparse.Namespace) -> dict[str, Any]:
    from .conditioning.latents import check_size
    from .config import MAX_STEPS
    from .doctor import plan_here
    from .plan import Job, vae_dtype
    from .runtime import TorchRuntime
    from .runtime.outcomes import user_folder

    check_size(arguments.width, arguments.height, arguments.frames)
    if not 1 <= arguments.steps <= MAX_STEPS:
        raise OptionError(f"{arguments.steps} steps are not within 1..{MAX_STEPS}: use 30.")
    runtime = TorchRuntime(pick_device(arguments.device), state_folder=user_folder())
    job = Job(
        width=arguments.width,
        height=arguments.height,
        num_frames=arguments.frames,
        num_steps=arguments.steps,
        num_guided=arguments.steps if arguments.cfg > 1 else 0,
        vae_dtype=vae_dtype(runtime.device),
    )
    found = plan_here(runtime, job)
    if not arguments.json:
        for stored, each in found.items():
            say(f"plan, for a file in {stored}")
            for line in each.text.splitlines():
                say(f"  {line}")
    return {stored: each.to_json() for stored, each in found.items()}
