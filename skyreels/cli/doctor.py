"""`doctor`: devices, kernels, versions and weights found; what a clip would take."""

import argparse
from typing import Any

from ..errors import OptionError
from .console import say
from .devices import pick_device


def add_doctor(commands: Any) -> argparse.ArgumentParser:
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


def run_doctor(arguments: argparse.Namespace) -> dict[str, Any]:
    """`doctor`: what is installed and what is used; with --plan, what a clip would take."""
    from ..doctor import examine

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
    from ..conditioning.latents import check_size
    from ..config import MAX_STEPS
    from ..doctor import plan_here
    from ..plan import Job, vae_dtype
    from ..runtime import TorchRuntime
    from ..runtime.outcomes import user_folder

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
