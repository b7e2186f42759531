"""`calibrate`: the cache's threshold for given weights, from exact runs."""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import TRANSFORMER_PRECISIONS
from ..errors import OptionError
from ..files import check_regular
from ..runtime.interrupt import remembered_interrupt
from .console import progress_bar, say
from .devices import pick_device
from .options import path_of

if TYPE_CHECKING:
    from ..pipeline.calibration import Case
    from ..runtime import Runtime
    from ..weights.inspect import CheckpointInfo

#: prompts of a calibration, and clips to check it with
MAX_CLIPS = 256


def add_calibrate(commands: Any) -> argparse.ArgumentParser:
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
        type=path_of,
        metavar="MODEL",
        help="transformer, as --transformer of generate; a folder that also holds the VAE and the "
        "text encoders needs no --vae and no --text-encoder; without any MODEL, the built-in one",
    )
    calibrate.add_argument("--vae", type=path_of, help="as of generate")
    for option, metavar in (("--text-encoder", "PATH"), ("--tokenizer", "DIR")):
        calibrate.add_argument(
            option, type=path_of, action="append", metavar=metavar, help="as of generate"
        )
    calibrate.add_argument(
        "--prompts", type=path_of, metavar="FILE", help="one prompt a line (default: eight of ours)"
    )
    calibrate.add_argument(
        "--image",
        type=path_of,
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


def run_calibrate(arguments: argparse.Namespace) -> dict[str, Any]:
    """`calibrate`: exact clips of each model, replayed, and the result stored."""
    from ..builtin import BUILTIN_FOLDER, BUILTIN_NOTICE
    from ..conditioning.latents import check_size
    from ..runtime import TorchRuntime
    from ..runtime.outcomes import user_folder
    from ..sampling.calibrate import parse_passes
    from ..sampling.settings import check_schedule

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
    from ..conditioning.latents import check_picture
    from ..media import check_place
    from ..sampling.calibrate import place_of_user
    from ..text.sources import find_text_sources
    from ..weights.load import check_transformer, check_vae

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
    from ..sampling.calibrate import fingerprint_weights, place_beside, place_of_user

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
    from ..builtin import builtin_transformer, builtin_vae
    from ..config import Guidance
    from ..pipeline.calibration import Size, Target, calibrate, unfinished_place
    from ..sampling.calibrate import save_calibration
    from ..sampling.settings import SamplingSettings, get_sigmas
    from ..weights.load import check_transformer, load_transformer, load_vae

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
    from ..builtin import builtin_text_encoder
    from ..media import read_image
    from ..pipeline.calibration import DEFAULT_CLIPS, Case, drawn_image, drawn_prompts
    from ..text.encode import DEFAULT_NEGATIVE_PROMPT, encode_prompt
    from ..text.load import load_text_encoder
    from ..text.sources import find_text_sources

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
