"""The command line: generate, batch, calibrate, inspect, doctor.

Exit code 0 only when the job is done. With --json, standard output carries exactly one JSON object;
everything meant for people goes to standard error.
"""

import argparse
import functools
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ..config import TransformerConfig
from ..errors import SkyReelsError
from ..runtime.ranks import check_devices, is_rank, start_ranks, tell_launcher, wait_for_others
from .batch import add_batch, run_batch
from .calibrate import add_calibrate, run_calibrate
from .console import Parser, explain_file_error, explain_unexpected, say
from .devices import makes_groups, pick_device
from .doctor import add_doctor
from .generate import add_generate, run_generate
from .inspect import add_inspect
from .options import apply_preset
from .receipts import check_given, read_defaults

__all__ = ["build_parser", "main"]

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
            arguments = _make_parser(read_defaults(arguments)).parse_args(argv)
            check_given(arguments)
        if arguments.run is run_generate and arguments.prompt is None:
            build_parser().error("the following arguments are required: --prompt")
        if getattr(arguments, "ranks", None) is not None and not is_rank():
            return _start_ranks(arguments, argv)
        result = arguments.run(arguments)
    except SkyReelsError as error:
        return _fail(arguments, str(error), EXIT_ERROR)
    except OSError as error:
        return _fail(arguments, explain_file_error(error), EXIT_ERROR)
    except KeyboardInterrupt:
        return _fail(arguments, _interrupted(arguments), EXIT_INTERRUPTED)
    except Exception as error:  # users get a sentence, `python -X dev` gets the traceback
        if sys.flags.dev_mode:
            raise
        wait_for_others()
        return _fail(arguments, explain_unexpected(error), EXIT_ERROR)
    if arguments.json:
        print(json.dumps(result))  # noqa: T201
    return EXIT_ERROR if arguments.run is run_batch and result["failed"] else 0


def _start_ranks(arguments: argparse.Namespace, argv: Sequence[str] | None) -> int:
    """Run the same command on several ranks; what can be refused is refused before."""
    from ..builtin import BUILTIN_FOLDER
    from ..transformer.ulysses import check_ranks
    from ..weights.load import check_transformer

    check_devices(arguments.ranks, pick_device(arguments.device))
    config = check_transformer(arguments.transformer or BUILTIN_FOLDER / "transformer").config
    assert isinstance(config, TransformerConfig)
    apply_preset(arguments)
    num_groups = 2 if makes_groups(arguments) else 1
    check_ranks(arguments.ranks // num_groups, config.num_attention_heads, num_groups)
    given = sys.argv[1:] if argv is None else argv
    program = __name__.rpartition(".")[0]
    return start_ranks(arguments.ranks, ["-m", program, *map(str, given)])


def _interrupted(arguments: argparse.Namespace) -> str:
    if arguments.run is run_calibrate:
        return "Interrupted; the same command continues with the first clip that is not finished."
    if arguments.run is run_batch:
        return "Interrupted; the same command makes the clips that are not finished."
    state = getattr(arguments, "resume", None)
    if state is not None and state.is_file():
        return f"Interrupted; the same command continues from {state}."
    return "Interrupted; nothing was written."


def _fail(arguments: argparse.Namespace, message: str, code: int) -> int:
    say(f"error: {message}")
    if code != EXIT_INTERRUPTED:  # all ranks are interrupted
        tell_launcher(message)
    if arguments.json:
        print(json.dumps({"error": message}))  # noqa: T201
    return code


@functools.cache
def build_parser() -> argparse.ArgumentParser:
    """Describe all commands and options.

    Returns:
        The parser; `run` of what it reads is the command's function.
    """
    return _make_parser({})


def _make_parser(generate_defaults: Mapping[str, Any]) -> argparse.ArgumentParser:
    """All commands and options, with defaults of `generate` in place of the usual ones."""
    parser = Parser(prog="python -m skyreels", description="SkyReels-V1 image-to-video.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    added = [
        add_generate(commands, generate_defaults),
        add_batch(commands),
        add_calibrate(commands),
        add_inspect(commands),
        add_doctor(commands),
    ]
    for command in added:
        command.add_argument("--json", action="store_true")
    return parser
