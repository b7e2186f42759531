"""Options that several commands share, and what they ask for."""

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import ATTENTIONS, BAD_RENDERS, DECODE_MODES, PRESETS, TRANSFORMER_PRECISIONS
from ..errors import OptionError
from ..sampling.calibrate import CACHE_CHOICES, CALIBRATED, choose_cache

if TYPE_CHECKING:
    from ..image import ImageSettings
    from ..sampling.settings import SamplingSettings
    from ..sampling.step_cache import CacheConfig
    from ..weights.lora.apply import AppliedLora


def path_of(text: str) -> Path:
    """A path of the command line, with ~ for the home folder also where no shell replaced it."""
    try:
        return Path(text).expanduser()
    except RuntimeError:  # the home of a user who is not there
        return Path(text)


def add_weights(command: argparse.ArgumentParser) -> None:
    """The options of `generate` that stay the same in a batch: weights, and where they compute."""
    command.add_argument(
        "--transformer", type=path_of, help="safetensors, GGUF or .pt file, or diffusers folder"
    )
    command.add_argument("--vae", type=path_of, help="VAE file or folder")
    command.add_argument(
        "--text-encoder",
        type=path_of,
        action="append",
        metavar="PATH",
        help="folder with both text encoders and their tokenizers; or given twice, the files of "
        "LLaMA-3 and CLIP-L",
    )
    command.add_argument(
        "--tokenizer",
        type=path_of,
        action="append",
        metavar="DIR",
        help="folder of a tokenizer, or of both, for text encoders in single files; default: "
        "beside them",
    )
    command.add_argument("--precision", choices=TRANSFORMER_PRECISIONS, default="auto")
    command.add_argument(
        "--device",
        "--devices",
        default="auto",
        help="auto, cpu, cuda or cuda:N; or two with a comma between them, each of which makes one "
        "of the two predictions of a step: cuda:0,cuda:1",
    )
    command.add_argument(
        "--lora",
        type=parse_lora,
        action="append",
        default=[],
        metavar="FILE[:STRENGTH]",
        help="a HunyuanVideo LoRA, default strength 1; may be given several times",
    )
    command.add_argument(
        "--prompt-cache", type=path_of, metavar="DIR", help="cache encoded prompts in this folder"
    )


def add_clip(command: argparse.ArgumentParser) -> None:
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


def parse_lora(text: str) -> tuple[Path, float]:
    """Read the value of --lora.

    Args:
        text: FILE or FILE:STRENGTH. What follows the last colon is a strength only if it is a
            number, so the colon of a Windows drive is part of the file.

    Returns:
        The file and the strength, 1 if none is given.
    """
    file, colon, strength = text.rpartition(":")
    if colon and file and not path_of(text).is_file():
        with contextlib.suppress(ValueError):
            return path_of(file), float(strength)
    return path_of(text), 1.0


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


def check_weights(arguments: argparse.Namespace) -> bool:
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


def size_of(arguments: argparse.Namespace) -> tuple[int, int, int]:
    """Width, height and frames, given or usual."""
    defaults = (64, 64, 17) if arguments.transformer is None else (960, 544, 97)
    given = (arguments.width, arguments.height, arguments.frames)
    width, height, num_frames = (
        default if value is None else value for value, default in zip(given, defaults, strict=True)
    )
    return width, height, num_frames


def sampling_settings(
    arguments: argparse.Namespace, loras: "tuple[AppliedLora, ...]"
) -> "SamplingSettings":
    """What the options ask the sampler for."""
    from ..config import ContextWindows, Guidance
    from ..sampling.settings import SamplingSettings, get_sigmas

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


def image_settings(arguments: argparse.Namespace) -> "ImageSettings":
    """How the picture is fitted and encoded.

    Args:
        arguments: of `generate`.

    Returns:
        The settings.

    Raises:
        OptionError: one of them breaks a rule.
    """
    from ..image import ImageSettings

    return ImageSettings(
        arguments.fit,
        noise_augmentation=arguments.noise_augmentation,
        latent_strength=arguments.latent_strength,
    )


def _chosen_cache(arguments: argparse.Namespace) -> "CacheConfig":
    """The cache of --cache, for the transformer that will be loaded."""
    from ..builtin import BUILTIN_FOLDER
    from ..weights.load import check_transformer

    info = None
    if arguments.cache == CALIBRATED:
        info = check_transformer(arguments.transformer or BUILTIN_FOLDER / "transformer")
    return choose_cache(arguments.cache, info, arguments.steps)


def read_loras(arguments: argparse.Namespace) -> "tuple[AppliedLora, ...]":
    """The LoRAs of --lora, for the transformer that will be loaded."""
    from ..builtin import BUILTIN_FOLDER
    from ..weights.load import check_transformer
    from ..weights.lora.apply import AppliedLora
    from ..weights.lora.read import load_lora

    if not arguments.lora:
        return ()
    config = check_transformer(arguments.transformer or BUILTIN_FOLDER / "transformer").config
    return tuple(
        AppliedLora(load_lora(file, config), strength)  # type: ignore[arg-type]
        for file, strength in arguments.lora
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
