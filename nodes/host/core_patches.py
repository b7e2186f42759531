"""LoRAs that core's own loader put on a MODEL, as LoRAs of the engine.

Core keeps a patch for each weight and adds it when it loads the weight. Ours are loaded by the
engine, which may hold them in 8 bits, so the patches become changes of its parameters.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ...skyreels.config import TransformerConfig
from ...skyreels.errors import CheckpointError
from ...skyreels.weights.keymaps import transformer_sources
from ...skyreels.weights.lora.apply import AppliedLora
from ...skyreels.weights.lora.names import parameter_shapes
from ...skyreels.weights.lora.read import Change, Lora

#: in front of the names of weights in core's models
PREFIX = "diffusion_model."
#: name of what core's loader made, for messages
NAME = "Core's LoRA"
FIX = "use SkyReels Load LoRA in front of SkyReels Core Model for this file."

#: (strength of the patch, patch, factor of the weight, part of the weight, function of the change)
Patch = tuple[float, Any, float, Any, Any]


def core_names(config: TransformerConfig) -> dict[str, str]:
    """Names of weights in core's model -> our parameters.

    Args:
        config: of the transformer.

    Returns:
        All of them.
    """
    names = parameter_shapes(config)
    return {PREFIX + transformer_sources(name, "comfyui")[0]: name for name in names}


def loras_of(
    patches: Mapping[str, Sequence[Patch]], config: TransformerConfig
) -> tuple[AppliedLora, ...]:
    """What core's patcher was told to add, as one LoRA.

    Args:
        patches: of a ModelPatcher, by core's names of weights.
        config: of the transformer.

    Returns:
        One LoRA of strength 1, or none.

    Raises:
        CheckpointError: a kind of patch that the engine does not have.
    """
    names, changes = core_names(config), []
    shapes = parameter_shapes(config)
    for key, of_weight in patches.items():
        name = names[key]
        changes += [_change(name, shapes[name], patch) for patch in of_weight if patch[0] != 0]
    if not changes:
        return ()
    lora = Lora(
        path=Path(NAME),
        digest=_digest(changes),
        dialect="ComfyUI",
        changes=tuple(changes),
        num_matched=len(changes),
        ignored=(),
        unknown=(),
    )
    return (AppliedLora(lora),)


def _change(name: str, shape: tuple[int, ...], patch: Patch) -> Change:
    strength, value, weight_factor, part, function = patch
    rows = _rows(name, shape, part)
    if weight_factor != 1 or function is not None:
        raise CheckpointError(
            f"{NAME} scales or computes weight {name}, not only adds to it: {FIX}"
        )
    kind = getattr(value, "name", None) or (value[0] if len(value) > 1 else "diff")
    if kind == "lora":
        up, down = _factors(name, strength, value.weights)
        needed = (rows[1] - rows[0], math.prod(shape[1:]))
        if (up.shape[0], down.shape[1]) != needed or up.shape[1] != down.shape[0]:
            raise CheckpointError(
                f"{NAME} has factors of {list(up.shape)} and {list(down.shape)} for {list(needed)} "
                f"of {name}: it is of another model; choose a LoRA for HunyuanVideo."
            )
        return Change(name, rows, "low-rank", (up, down))
    if kind == "diff":
        difference = value[-1][0] if len(value) > 1 else value[0]
        if tuple(difference.shape) == shape and part is None:
            added = strength * difference.detach().float().cpu().flatten(min(1, len(shape) - 1))
            return Change(name, rows, "difference", (added,))
        raise CheckpointError(
            f"{NAME} has a difference of shape {list(difference.shape)} for {name} of "
            f"{list(shape)}: it is of another model; choose a LoRA for HunyuanVideo."
        )
    raise CheckpointError(f"{NAME} has a patch of the kind {kind} for {name}: {FIX}")


def _rows(name: str, shape: tuple[int, ...], part: Any) -> tuple[int, int]:
    if part is None:
        return 0, shape[0]
    axis, start, length = part
    if axis != 0:
        raise CheckpointError(f"{NAME} changes some columns of {name}: {FIX}")
    return start, start + length


def _factors(name: str, strength: float, weights: Sequence[Any]) -> tuple[Tensor, Tensor]:
    up, down, alpha, middle, *others = weights
    if middle is not None or any(other is not None for other in others):
        raise CheckpointError(f"{NAME} has DoRA or a reshaped convolution for {name}: {FIX}")
    scale = strength * (1.0 if alpha is None else alpha / down.shape[0])
    return scale * _matrix(up), _matrix(down)


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu().flatten(1)


def _digest(changes: Sequence[Change]) -> str:
    digest = hashlib.sha256()
    for change in changes:
        digest.update(repr((change.parameter, change.rows, change.method)).encode())
        for tensor in change.tensors:
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
