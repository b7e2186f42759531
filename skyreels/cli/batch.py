"""`batch`: many clips, on this machine or on a Ray cluster."""

import argparse
import contextlib
import functools
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import OptionError, SkyReelsError
from ..runtime.interrupt import remembered_interrupt
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
from .console import explain_file_error, explain_unexpected, progress_bar, say
from .devices import pick_devices, runtime_of
from .options import (
    add_clip,
    add_weights,
    apply_preset,
    check_weights,
    image_settings,
    parse_lora,
    path_of,
    read_loras,
    sampling_settings,
    size_of,
)
from .receipts import describe_text_encoders

if TYPE_CHECKING:
    from ..pipeline.batch import Ended, Line, Task
    from ..transformer.model import SkyReelsTransformer
    from ..vae.model import VideoVAE
    from ..weights.lora.apply import AppliedLora

#: of a batch
MAX_WORKERS = 256
#: arguments that a clip depends on, beside its pictures and the weights
_HASHED = (
    *("prompt", "width", "height", "frames", "steps", "cfg", "embedded_guidance", "shift", "seed"),
    *("fit", "noise_augmentation", "latent_strength", "precision", "decode", "attention"),
    *("bad_render", "riflex", "window"),
)
#: keys of a job that is made on Wiro
_REMOTE_KEYS = {
    *("backend", "image", "prompt", "negative", "width", "height", "frames", "steps", "cfg"),
}
_REMOTE_SIZES = ((960, 544), (544, 960))


def add_batch(commands: Any) -> argparse.ArgumentParser:
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
        "jobs", type=path_of, metavar="JOBS.jsonl", help="paths of pictures are relative to it"
    )
    batch.add_argument(
        "--out", type=path_of, required=True, metavar="DIR", help="folder of the clips"
    )
    add_weights(batch)
    add_clip(batch)
    batch.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="make the clips on a Ray cluster, or with `local` in several processes of this "
        "machine; a worker for each GPU",
    )
    batch.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="with --ray, so many (default: as there are GPUs, or machines without any)",
    )
    batch.add_argument(
        "--wiro-limit",
        metavar="USD",
        help='what the jobs with "backend": "remote", which are made on wiro.ai, may cost in all; '
        "none is sent without it",
    )
    return batch


def run_batch(arguments: argparse.Namespace) -> dict[str, Any]:
    """`batch`: a clip of each line, and a summary."""
    from ..builtin import BUILTIN_NOTICE
    from ..media import check_output
    from ..pipeline import batch
    from ..pipeline.ray_workers import Crew, check_crew, work_on_ray
    from ..pipeline.remote import RemoteRuns, beside, parse_dollars

    is_builtin = check_weights(arguments)
    check_output(arguments.out / "clip.mp4")
    count = arguments.workers
    if count is not None and (arguments.ray is None or not 1 <= count <= MAX_WORKERS):
        raise OptionError(f"--workers {count} is for --ray, and within 1..{MAX_WORKERS}: use 2.")
    if arguments.ray is None:
        pick_devices(arguments.device)
        crew = None
    else:
        arguments = argparse.Namespace(**_absolute(vars(arguments)))  # workers are elsewhere
        crew = Crew(arguments.ray, count, arguments.device, batch_maker, fingerprints)
        check_crew(crew)
    limit = None if arguments.wiro_limit is None else parse_dollars(arguments.wiro_limit)
    weights = fingerprints(arguments)
    with batch.locked(arguments.out):
        batch.remove_parts(arguments.out)
        lines = read_jobs(arguments, weights)
        remote = None if limit is None else RemoteRuns(arguments.out, limit, say)
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
    from ..media import read_clip
    from ..pipeline.extend import check_clip
    from ..runtime import never_interrupt

    runtime = runtime_of(given, report or (lambda *_: None), check or never_interrupt)
    keep_encoder: Any = functools.cache(load_encoder)
    keep_loras = _lora_reader(given)

    @functools.cache
    def keep_models() -> "tuple[SkyReelsTransformer, VideoVAE]":
        return load_models(given, runtime)

    @functools.cache
    def describe(lora: tuple[tuple[Path, float], ...]) -> None:
        describe_loras(keep_loras(lora), keep_models()[0])

    def make(arguments: argparse.Namespace) -> None:
        try:
            make_checked(arguments)
        except SkyReelsError:
            raise
        except OSError as error:
            raise SkyReelsError(explain_file_error(error)) from error
        except Exception as error:  # of this clip; the others go on
            if sys.flags.dev_mode:
                raise
            raise SkyReelsError(explain_unexpected(error)) from error

    def make_checked(arguments: argparse.Namespace) -> None:
        start = time.perf_counter()
        if arguments.extend is None:
            image, size = picture_of(arguments), size_of(arguments)
        else:
            image = read_clip(arguments.extend)
            size = (image.shape[2], image.shape[1], arguments.frames)
            check_clip(image, extend_settings(arguments, arguments.frames))
        end_image = end_image_of(arguments)
        loras = keep_loras(tuple(arguments.lora))
        if [each.lora.digest for each in loras] != arguments.lora_digests:
            raise OptionError(
                f"{', '.join(str(file) for file, _ in arguments.lora)}: not what the batch began "
                "with, or another file on this machine; copy it here, and run the command again."
            )
        settings = sampling_settings(arguments, loras)
        if arguments.transformer is not None:
            check_files(arguments, image is not None)
        prompts = encode_prompts(arguments, runtime, keep_encoder)
        models = keep_models()
        describe(tuple(arguments.lora))
        make_clip(
            arguments,
            image,
            end_image,
            size,
            settings,
            models,
            prompts,
            runtime=runtime,
            start=start,
        )

    return make


def _lora_reader(
    arguments: argparse.Namespace,
) -> "Callable[[tuple[tuple[Path, float], ...]], tuple[AppliedLora, ...]]":
    """Reads LoRAs for the transformer of a batch, each set once."""

    @functools.cache
    def read(lora: tuple[tuple[Path, float], ...]) -> "tuple[AppliedLora, ...]":
        return read_loras(argparse.Namespace(**{**vars(arguments), "lora": lora}))

    return read


def fingerprints(arguments: argparse.Namespace) -> dict[str, str]:
    """What the weights of a batch are.

    Returns:
        Part -> hash of samples of it.

    Raises:
        SkyReelsError: they are not there, or others than are needed.
    """
    from ..builtin import BUILTIN_FOLDER
    from ..pipeline.receipt import describe_weights
    from ..weights.load import check_transformer, check_vae

    given = (arguments.transformer, arguments.vae)
    transformer, vae = given if all(given) else [BUILTIN_FOLDER / n for n in ("transformer", "vae")]
    told = {
        "transformer": describe_weights(check_transformer(transformer)),
        "vae": describe_weights(check_vae(vae)),
        **describe_text_encoders(arguments),
    }
    found = {part: each["sampled_sha256"] for part, each in told.items()}
    for number, each in enumerate(read_loras(arguments), 1):
        found[f"LoRA {number}"] = each.lora.digest
    return found


class _JobParser(argparse.ArgumentParser):
    """The options of a job; an illegal value is an OptionError."""

    def error(self, message: str) -> NoReturn:
        raise OptionError(
            message.removeprefix("argument ").removeprefix("--") + ": correct the line."
        )


def read_jobs(arguments: argparse.Namespace, weights: Mapping[str, str]) -> "list[Line]":
    """The jobs of a batch, each checked.

    Args:
        arguments: of `batch`, the defaults of jobs.
        weights: part -> hash, see `fingerprints`; a job has LoRAs of its own, or those given.

    Returns:
        A task, or an error, for each line.
    """
    from ..pipeline import batch

    parser = _JobParser(add_help=False, allow_abbrev=False)
    for option in ("--image", "--end-image", "--extend"):
        parser.add_argument(option, type=path_of)
    parser.add_argument("--overlap", type=int)
    parser.add_argument("--backend", choices=("local", "remote"), default="local")
    parser.add_argument("--lora", type=parse_lora, action="append")
    add_clip(parser)
    # a parser's actions have no public list
    keys = sorted(name[2:] for name in parser._option_string_actions)
    lines = []
    none = ("extend", "overlap", "lora", "resume", "ranks", "receipt")
    usual = {**vars(arguments), "no_color_match": False, **dict.fromkeys(none)}
    shared = {"weights": {p: h for p, h in weights.items() if not p.startswith("LoRA")}}
    keep_loras = _lora_reader(arguments)
    folder = arguments.jobs.absolute().parent
    digests = functools.cache(batch.file_digest)  # of a picture that many lines name
    for number, text in batch.read_lines(arguments.jobs):
        try:
            told = batch.parse_line(text, keys)
            given = [f"--{key}={value}" for key, value in told]
            job = parser.parse_args(given, argparse.Namespace(**usual))
            is_remote = job.backend == "remote"
            files = {}
            for name in ("image", "end_image", "extend"):
                path = getattr(job, name, None)
                if path is not None:
                    setattr(job, name, folder / path)
                    files[name] = digests(folder / path)
            if is_remote:
                made_from = {**_check_remote(job, {key for key, _ in told}), **files}
            else:
                own = [(folder / path, strength) for path, strength in job.lora or ()]
                job.lora = own or arguments.lora
                loras = keep_loras(tuple(job.lora))
                job.lora_digests = [each.lora.digest for each in loras]
                changes = [(each.lora.digest, each.strength) for each in loras]
                if job.extend is not None:  # which has a size
                    for name in {"width", "height"} - {key for key, _ in told}:
                        setattr(job, name, None)
                made_from = {**_check_job(job), "loras": changes, **files, **shared}
            digest = batch.content_hash(made_from)
            lines.append(batch.Line(number, batch.Task(digest, job, files, is_remote)))
        except SkyReelsError as error:
            lines.append(batch.Line(number, None, str(error)))
    return lines


def _check_job(arguments: argparse.Namespace) -> dict[str, Any]:
    """Complete the arguments of a job, and refuse illegal ones before any work.

    Returns:
        What the clip is made from, by name, but for its pictures and the weights.

    Raises:
        OptionError: there is no prompt, or an illegal value.
        SkyReelsError: a size or a schedule that breaks a rule.
    """
    from ..conditioning.latents import check_size
    from ..text.encode import DEFAULT_NEGATIVE_PROMPT

    if not arguments.prompt:
        raise OptionError("There is no prompt: write one in the line, or give --prompt for all.")
    apply_preset(arguments)
    check_extend(arguments)
    width, height, arguments.frames = size_of(arguments)
    if arguments.extend is None:
        arguments.width, arguments.height = width, height
        check_size(width, height, arguments.frames)
    else:
        extend_settings(arguments, arguments.frames)
    settings = sampling_settings(arguments, ())
    image_settings(arguments)
    negative = DEFAULT_NEGATIVE_PROMPT if arguments.negative is None else arguments.negative
    told = {name: getattr(arguments, name) for name in (*_HASHED, "overlap")}
    return {**told, "negative": negative, "cache": repr(settings.cache)}


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
    from ..conditioning.embeds import with_fps_prefix
    from ..conditioning.latents import check_size

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
