"""LoRAs on a transformer: which are in use, what they change, and how that is undone.

The LoRAs of a run are part of its settings. `use_loras` brings a transformer to exactly those: it
compares, parameter by parameter, what is in it with what is wanted, and touches the others only.

* A parameter in 16 or 32 bits gets base + sum of all changes, computed in float32 and rounded once.
  To take a change away, the base is read again from the checkpoint: subtracting would leave other
  bits, and a copy of the model would cost its memory.
* The weight of a linear layer in 8 or fewer bits keeps its bits; the layer gets a side branch.

What is in a parameter is written down after it was changed; while it changes, it counts as unknown
and is read again by the next run. So a run that is cancelled here leaves nothing half done.
"""

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

import torch
from torch import Tensor, nn

from ...config import TransformerConfig
from ...errors import CheckpointError, OptionError
from ...runtime import Runtime, in_parts
from ...transformer.model import SkyReelsTransformer
from ...transformer.side_branch import Factors, SideBranch
from ..load import reload_parameters
from .names import parameter_shapes
from .read import Change, Lora, product

logger = logging.getLogger("skyreels.weights.lora.apply")

#: a factor of a LoRA beyond this is a mistake
MAX_STRENGTH = 100.0
#: float32 tensors of the largest parameter that are held while it is changed
HELD_TENSORS = 4
#: kind in a list of blocks -> start of its parameters' names
BLOCK_KINDS = {"double": "double_blocks.", "single": "single_blocks.", "other": ""}
BLOCKS_EXAMPLE = "double:0-5, single:3"


@dataclass(frozen=True)
class AppliedLora:
    """A LoRA in use.

    Attributes:
        lora: from `load_lora`.
        strength: factor of its changes; 0 is as without it.
        blocks: where it acts, as in "double:0-5, single:3, other"; "" is everywhere. `double` and
            `single` alone are all blocks of the kind, `other` is what lies outside the blocks.

    Raises:
        OptionError: a strength that is no number within -100..100, or a list that is none.
    """

    lora: Lora
    strength: float = 1.0
    blocks: str = ""

    def __post_init__(self) -> None:
        if not -MAX_STRENGTH <= self.strength <= MAX_STRENGTH:
            raise OptionError(
                f"LoRA strength {self.strength} is not within -{MAX_STRENGTH:.0f}..."
                f"{MAX_STRENGTH:.0f}: use 1."
            )
        parse_blocks(self.blocks)


#: kind of block -> numbers, None for all
Blocks = dict[str, frozenset[int] | None]


def parse_blocks(text: str) -> Blocks | None:
    """Read a list of blocks.

    Args:
        text: as for `AppliedLora.blocks`.

    Returns:
        The blocks; None for everything.

    Raises:
        OptionError: it is no such list.
    """
    if not text.strip():
        return None
    found: Blocks = {}
    for item in text.split(","):
        kind, has_numbers, numbers = (part.strip() for part in item.partition(":"))
        first, is_range, last = (part.strip() for part in numbers.partition("-"))
        last = last if is_range else first
        is_sound = kind in BLOCK_KINDS and (
            all(n.isascii() and n.isdigit() and len(n) < 4 for n in (first, last))
            and int(first) <= int(last)
            and kind != "other"
            if has_numbers
            else True
        )
        if not is_sound:
            raise OptionError(
                f"{item.strip()[:40]!r} in the list of blocks is not of the form kind or "
                f"kind:first-last, with a kind of {', '.join(BLOCK_KINDS)}: write as in "
                f'"{BLOCKS_EXAMPLE}".'
            )
        before = found.get(kind, frozenset())
        if not has_numbers or before is None:
            found[kind] = None
        else:
            found[kind] = before | frozenset(range(int(first), int(last) + 1))
    return found


def _check_blocks(text: str, config: TransformerConfig) -> Blocks | None:
    blocks = parse_blocks(text)
    counts = {"double": config.num_layers, "single": config.num_single_layers}
    for kind, numbers in (blocks or {}).items():
        beyond = [n for n in numbers or () if n >= counts[kind]]
        if beyond:
            raise OptionError(
                f"The list of blocks names {kind} block {min(beyond)}, and this model has "
                f"{counts[kind]}, 0 to {counts[kind] - 1}."
            )
    return blocks


def _acts(change: Change, blocks: Blocks | None) -> bool:
    if blocks is None:
        return True
    stem, _, rest = change.parameter.partition(".")
    kind = {"double_blocks": "double", "single_blocks": "single"}.get(stem, "other")
    if kind not in blocks:
        return False
    numbers = blocks[kind]
    return numbers is None or int(rest.partition(".")[0]) in numbers


def acting_changes(applied: AppliedLora, config: TransformerConfig) -> list[Change]:
    """The changes of a LoRA in the blocks where it is to act.

    Args:
        applied: a LoRA and its list of blocks.
        config: of the transformer.

    Returns:
        Some or all of its changes.

    Raises:
        OptionError: the list names a block that is not there.
    """
    blocks = _check_blocks(applied.blocks, config)
    return [change for change in applied.lora.changes if _acts(change, blocks)]


# --- which changes ------------------------------------------------------------------------------

#: changes of one parameter and their strengths, and what tells these apart from others
_Use = tuple[Change, float]
_Signature = tuple[tuple[str, float], ...]


def _wanted(
    transformer: SkyReelsTransformer, loras: Sequence[AppliedLora]
) -> tuple[dict[str, list[_Use]], dict[str, _Signature]]:
    uses: dict[str, list[_Use]] = {}
    signatures: dict[str, _Signature] = {}
    for applied in loras:
        acting = acting_changes(applied, transformer.config)
        acting = acting if applied.strength != 0 else []
        for change in acting:
            uses.setdefault(change.parameter, []).append((change, applied.strength))
        signature = (applied.lora.digest, applied.strength)
        for name in dict.fromkeys(change.parameter for change in acting):
            signatures[name] = (*signatures.get(name, ()), signature)
    for name, of_parameter in uses.items():
        if is_quantized(transformer, name):
            _check_quantized(name, of_parameter, loras)
    return uses, signatures


def is_quantized(transformer: SkyReelsTransformer, parameter: str) -> bool:
    """Whether a change of a parameter goes beside it: a weight whose layer is none of torch's."""
    module, _, attribute = parameter.rpartition(".")
    layer = transformer.get_submodule(module)
    kinds = (nn.Linear, nn.Conv3d, nn.RMSNorm, nn.LayerNorm)
    return attribute == "weight" and not isinstance(layer, kinds)


def _check_quantized(name: str, uses: Iterable[_Use], loras: Sequence[AppliedLora]) -> None:
    """Refuse what needs the weight itself where that is in 8 or fewer bits."""
    for change, _ in uses:
        problem = "DoRA" if change.magnitude is not None else ""
        problem = "a replaced weight (set_weight)" if change.method == "value" else problem
        if problem:
            owner = next(each.lora for each in loras if change in each.lora.changes)
            raise CheckpointError(
                f"{owner.name} has {problem} for {name}, which needs a weight in 16 or 32 bits, "
                "and this one is quantized: load the transformer with precision bf16, or use a "
                "plain LoRA."
            )


def check_loras(transformer: SkyReelsTransformer, loras: Sequence[AppliedLora]) -> None:
    """Refuse LoRAs that `use_loras` could not bring into a transformer.

    Args:
        transformer: on any device.
        loras: in use together.

    Raises:
        CheckpointError: one needs weights in 16 or 32 bits.
        OptionError: a list of blocks names one that is not there.
    """
    _wanted(transformer, loras)


def use_loras(
    transformer: SkyReelsTransformer, loras: Sequence[AppliedLora], *, runtime: Runtime
) -> None:
    """Bring a transformer to a set of LoRAs; what is in use and not in the set is taken away.

    Args:
        transformer: on any device; its weights are changed where they are.
        loras: the set; changes of one parameter add.
        runtime: its device computes; progress "load" in bytes; asked for an interrupt before every
            parameter.

    Raises:
        CheckpointError: as for `check_loras`; or weights must be read again and their file is gone.
        OptionError: as for `check_loras`.
    """
    uses, signatures = _wanted(transformer, loras)
    state = transformer.lora_state
    names = dict.fromkeys([*state, *signatures])
    changed = [name for name in names if state.get(name, ()) != signatures.get(name, ())]
    if not changed:
        return
    shapes = parameter_shapes(transformer.config)
    sizes = {name: math.prod(shapes[name]) * transformer.compute_dtype.itemsize for name in changed}
    total, done = sum(sizes.values()), 0
    largest = max(math.prod(shapes[name]) for name in changed)
    runtime.make_room(HELD_TENSORS * largest * torch.float32.itemsize)
    report = in_parts(runtime, "load", total)
    with torch.inference_mode(False), torch.no_grad():
        for name, base in _bases(transformer, changed, state, runtime):
            runtime.check_interrupt()
            state[name] = None
            if base is None:
                _branch_out(transformer, name, uses.get(name, ()), runtime.device)
            else:
                _merge(transformer.get_parameter(name), base, uses.get(name, ()), runtime.device)
            if name in signatures:
                state[name] = signatures[name]
            else:
                del state[name]
            done += sizes[name]
            report(done)
    named = ", ".join(f"{each.lora.name} ({each.strength:g})" for each in loras)
    logger.info("LoRAs in use: %s; %d weights were changed.", named or "none", len(changed))


def _bases(
    transformer: SkyReelsTransformer,
    names: Sequence[str],
    state: dict[str, object],
    runtime: Runtime,
) -> Iterator[tuple[str, Tensor | None]]:
    """Each parameter without any change; None where it is quantized and does not change."""
    quantized = [name for name in names if is_quantized(transformer, name)]
    merged = [name for name in names if name not in quantized]
    changed = [name for name in merged if name in state]
    fresh = [name for name in merged if name not in state]
    return chain(
        reload_parameters(
            transformer, changed, runtime.device
        ),  # first: if it fails, nothing is changed yet
        ((name, None) for name in quantized),
        ((name, transformer.get_parameter(name).data) for name in fresh),
    )


# --- how a change acts --------------------------------------------------------------------------


def _merge(
    parameter: nn.Parameter, base: Tensor, uses: Iterable[_Use], device: torch.device
) -> None:
    """Write base and changes to a parameter, rounded once."""
    total = base.to(device, torch.float32, copy=True).flatten(1 if base.ndim > 1 else 0)
    before = total.clone() if any(_needs_base(change) for change, _ in uses) else total
    for change, strength in uses:
        rows = slice(*change.rows)
        total[rows].add_(difference(change, before[rows]), alpha=strength)
    parameter.data.copy_(total.view(base.shape))


def _needs_base(change: Change) -> bool:
    return change.magnitude is not None or change.method == "value"


def difference(change: Change, base: Tensor) -> Tensor:
    """What a change adds at strength 1 to its rows of a parameter.

    Args:
        change: of the parameter.
        base: [rows, columns] or [rows] float32, those rows without changes.

    Returns:
        Of the same shape, where the base is.

    Source: DoRA arXiv:2402.09353, equation 5.
    """
    tensors = [tensor.to(base.device) for tensor in change.tensors]
    added = product(change.method, tensors)
    if change.method == "value":
        return added - base
    if change.magnitude is None:
        return added
    whole = base + added
    axis = 1 if change.magnitude.shape[1] == 1 else 0
    norm = whole.norm(dim=axis, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    scaled: Tensor = change.magnitude.to(base.device) * whole / norm
    return scaled - base


def _branch_out(
    transformer: SkyReelsTransformer, name: str, uses: Iterable[_Use], device: torch.device
) -> None:
    """Give a quantized layer the side branch for these changes, in place of the one it has."""
    layer = transformer.get_submodule(name.rpartition(".")[0])
    layer.side_branch = None  # type: ignore[assignment]
    uses = list(uses)
    if not uses:
        return
    shape = (int(layer.out_features), int(layer.in_features))  # type: ignore[arg-type]
    factors, dense = side_factors(uses, shape, device)
    branch = SideBranch(
        shape,
        factors,
        dense,
        hadamard_block=getattr(layer, "hadamard_block", 0),
        dtype=transformer.compute_dtype,
    )
    layer.side_branch = branch.to(next(layer.parameters()).device)


def side_factors(
    uses: Sequence[_Use], shape: tuple[int, int], device: torch.device
) -> tuple[list[Factors], Tensor | None]:
    """Changes of one weight as factors of disjoint rows, or as one matrix.

    Args:
        uses: changes without DoRA, and their strengths.
        shape: [out, in] of the weight.
        device: where it is computed.

    Returns:
        For each run of rows that the same changes touch, their factors side by side, the strengths
        in the upper ones; or none, and the sum of all, where factors would be larger than that.
    """
    found = []
    for change, strength in uses:
        pair = low_rank(change)
        if pair is None:
            return [], _dense(uses, shape, device)
        found.append((change.rows, strength * pair[0].to(device), pair[1].to(device)))
    edges = sorted({edge for rows, _, _ in found for edge in rows})
    factors: list[Factors] = []
    for start, stop in pairwise(edges):
        here = [(rows, up, down) for rows, up, down in found if rows[0] <= start < rows[1]]
        if here:
            ups = [up[start - rows[0] : stop - rows[0]] for rows, up, _ in here]
            downs = [down for _, _, down in here]
            factors.append(((start, stop), torch.cat(ups, dim=1), torch.cat(downs)))
    rank = max(len(down) for _, _, down in factors)
    if shape[0] * rank + sum(down.numel() for _, _, down in factors) > shape[0] * shape[1]:
        return [], _dense(uses, shape, device)
    return factors, None


def _dense(uses: Sequence[_Use], shape: tuple[int, int], device: torch.device) -> Tensor:
    total = torch.zeros(shape, device=device)
    for change, strength in uses:
        rows = total[slice(*change.rows)]
        rows.add_(product(change.method, [t.to(device) for t in change.tensors]), alpha=strength)
    return total


def low_rank(change: Change) -> tuple[Tensor, Tensor] | None:
    """A change as two factors, up and down; None if it has none.

    Args:
        change: of a weight, without DoRA.

    Returns:
        [rows, r] and [r, columns] float32. LoHa's are all products of a column of one pair with a
        column of the other (ranks multiply); LoKr's with a pair are kron(a, up), kron(1, down).
    """
    if change.method == "low-rank":
        return change.tensors[0], change.tensors[1]
    if change.method == "hadamard":
        up1, down1, up2, down2 = change.tensors
        up = torch.einsum("or,os->ors", up1, up2).flatten(1)
        return up, torch.einsum("ri,si->rsi", down1, down2).flatten(0, 1)
    if change.method == "kronecker" and len(change.tensors) == 3:
        small, up, down = change.tensors
        columns = torch.eye(small.shape[1], device=small.device)
        return torch.kron(small, up), torch.kron(columns, down)
    return None
