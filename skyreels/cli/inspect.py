"""`inspect`: what a checkpoint is, from its header alone."""

import argparse
from typing import Any

from ..errors import MAX_MESSAGE, shown
from .console import say
from .options import path_of


def add_inspect(commands: Any) -> argparse.ArgumentParser:
    """Add the command `inspect`, and its options.

    Args:
        commands: of the parser.

    Returns:
        The command's parser.
    """
    inspect: argparse.ArgumentParser = commands.add_parser(
        "inspect", help="what a checkpoint is, from its header alone"
    )
    inspect.set_defaults(run=run_inspect)
    inspect.add_argument("path", type=path_of)
    return inspect


def run_inspect(arguments: argparse.Namespace) -> dict[str, Any]:
    """`inspect`: describe a checkpoint."""
    from ..weights.inspect import FAMILY_NAMES, inspect

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
