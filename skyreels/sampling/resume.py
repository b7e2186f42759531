"""Finished steps in a file, so that an interrupted run continues where it was."""

import hashlib
import logging
import os
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..conditioning.latents import ImageConditioning
from ..config import Guidance
from ..errors import CheckpointError, OptionError, shown
from ..media import is_disk_full
from ..transformer.model import SkyReelsTransformer
from .prompts import Prompt
from .settings import SamplingSettings

logger = logging.getLogger("skyreels.sampling.resume")

#: settings that do not decide the result of a run that can be resumed: its solver is Euler
NOT_IN_FINGERPRINT = {"solver", "resume", "loras", "bad_render"}
#: options of later versions, part of it only where they are used: files of earlier versions fit
ADDED_LATER: dict[str, object] = {"noise_index": 0, "noise_mask": None, "windows": None}

#: save(step, latents): keep the latents after `step` finished steps
SaveStep = Callable[[int, Tensor], None]


def fingerprint_run(
    transformer: SkyReelsTransformer,
    image: ImageConditioning,
    prompt: Prompt,
    negative: Prompt | None,
    settings: SamplingSettings,
) -> str:
    """A hash of everything that decides the result; of each weight, its kind and first numbers.

    It covers every field of the settings that is not in NOT_IN_FINGERPRINT. Their order is part of
    it: with another order, or a new field that is not in ADDED_LATER, files of earlier versions are
    refused.

    Args:
        transformer: whose weights decide.
        image: start of the clip.
        prompt: positive prompt.
        negative: negative prompt, if any.
        settings: of the run.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256(repr(transformer.config).encode())
    for name, weight in transformer.named_parameters():
        digest.update(f"{name} {list(weight.shape)}".encode())
        _add(digest, weight.detach().flatten()[:16])
    for part in (image, prompt, negative):
        _add(digest, part)
    for each in fields(settings):
        value = getattr(settings, each.name)
        if each.name in ADDED_LATER:
            is_used = isinstance(value, Tensor) or value != ADDED_LATER[each.name]
            _add(digest, (each.name, value) if is_used else ())
        elif each.name not in NOT_IN_FINGERPRINT:
            _add(digest, value)
        if each.name == "guidance":
            _add(digest, 0)  # an option that it had, always off, in files of earlier versions
    for applied in settings.loras:
        if applied.strength != 0:
            _add(
                digest,
                (applied.lora.path.name, applied.lora.digest, applied.strength, applied.blocks),
            )
    return digest.hexdigest()


def _add(digest: "hashlib._Hash", value: object) -> None:
    """Put a value and all that it holds into a hash."""
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype}{list(value.shape)}".encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    elif is_dataclass(value):
        for each in fields(value):
            inner = getattr(value, each.name)
            if isinstance(value, ImageConditioning) and each.name == "origin":
                continue
            is_later = isinstance(value, Guidance) or each.name == "end_latents"
            if not (is_later and inner is None):
                # what is off counts as it did before it existed
                _add(digest, inner)
    elif isinstance(value, list | tuple):
        for item in value:
            _add(digest, item)
    else:
        digest.update(repr("a function" if callable(value) else value).encode())


def resume_run(
    place: Path, fingerprint: str, latents: Tensor, num_steps: int
) -> tuple[int, Tensor, SaveStep]:
    """Continue the run that is saved in a place, or begin to save one there.

    Args:
        place: a file, or a folder in which the file is named after the fingerprint.
        fingerprint: of the run.
        latents: its start.
        num_steps: of its schedule.

    Returns:
        Finished steps, the latents after them, and a function that saves a step.
    """
    if os.path.isdir(place):
        place = place / f"{fingerprint[:32]}.safetensors"
    first_step, latents = load_state(place, fingerprint, latents, num_steps)

    def save(step: int, latents: Tensor) -> None:
        if not bool(latents.isfinite().all()):
            return
        try:
            save_state(place, fingerprint, step, latents)
        except OSError as error:  # a full disk must not cost the run
            logger.warning("Step %d is not saved in %s: %s.", step, shown(place), shown(error))

    return first_step, latents, save


def save_state(path: Path, fingerprint: str, step: int, latents: Tensor) -> None:
    """Save the latents after `step` steps; the file is replaced as a whole."""
    from safetensors.torch import save

    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # other processes write theirs
    metadata = {"fingerprint": fingerprint, "step": str(step)}
    try:
        part.write_bytes(save({"latents": latents.float().cpu().contiguous()}, metadata))
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def load_state(path: Path, fingerprint: str, latents: Tensor, num_steps: int) -> tuple[int, Tensor]:
    """Finished steps and the latents after them; 0 and what was given if nothing is saved.

    Then the start is saved, so that a path that cannot be written is found now.

    Args:
        path: of the file.
        fingerprint: of the run.
        latents: its start.
        num_steps: of its schedule.

    Returns:
        Finished steps, and the latents after them.

    Raises:
        OptionError: the file belongs to another run, or the path cannot be used.
        CheckpointError: the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            save_state(path, fingerprint, 0, latents)
            return 0, latents
        if not path.is_file():
            raise OptionError(f"{path} is not a file: name a file for the saved steps.")
    except (OSError, ValueError) as error:
        reason = "its disk is full" if is_disk_full(error) else error
        raise OptionError(
            f"Steps cannot be saved in {path} ({reason}): choose another place."
        ) from None
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            # a copy: a mapped file could not be replaced on Windows
            saved = file.get_tensor("latents").clone()
            step = int(metadata["step"])
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a saved step ({error}): delete it to start over."
        ) from None
    if metadata.get("fingerprint") != fingerprint or saved.shape != latents.shape:
        raise OptionError(
            f"{path} was saved with other settings, picture, prompt or weights: restore them to "
            "continue, or delete the file to start over."
        )
    is_whole = saved.dtype == torch.float32 and bool(saved.isfinite().all())
    if not is_whole or not 0 <= step <= num_steps:
        raise CheckpointError(f"{path} is damaged (step {step}): delete it to start over.")
    return step, saved
