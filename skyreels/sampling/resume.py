"""Finished steps in a file, so that an interrupted run goes on where it was."""

import hashlib
import os
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError, OptionError
from ..transformer.model import SkyReelsTransformer


def fingerprint_run(transformer: SkyReelsTransformer, *inputs: object) -> str:
    """A hash of everything that decides the result; of each weight, its kind and first numbers."""
    digest = hashlib.sha256(repr(transformer.config).encode())

    def add(value: object) -> None:
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype}{list(value.shape)}".encode())
            digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
        elif hasattr(value, "__dataclass_fields__"):
            for name in value.__dataclass_fields__:
                add(getattr(value, name))
        else:
            digest.update(repr(value).encode())

    for name, weight in transformer.named_parameters():
        digest.update(f"{name} {list(weight.shape)}".encode())
        add(weight.detach().flatten()[:16])
    for value in inputs:
        add(value)
    return digest.hexdigest()


def save_state(path: Path, fingerprint: str, step: int, latents: Tensor) -> None:
    """Keep the latents after `step` steps; the file is replaced as a whole."""
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

    Then the start is saved, so that a place that cannot be written is found now.
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
        raise OptionError(
            f"Steps cannot be saved in {path} ({error}): choose another place."
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
    whole = saved.dtype == torch.float32 and bool(saved.isfinite().all())
    if not whole or not 0 <= step <= num_steps:
        raise CheckpointError(f"{path} is damaged (step {step}): delete it to start over.")
    return step, saved
