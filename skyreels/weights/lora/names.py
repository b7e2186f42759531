"""Which of our parameters a name in a LoRA file means.

Nothing is parsed back: every spelling of every module is made once from the module tree, so a name
is either in the table or not one of ours. Undoing `_` for `.` by rules would be ambiguous.

A module that is fused here may be several in the file; each of those is some of its rows.
"""

from functools import lru_cache
from typing import NamedTuple

from ...config import TransformerConfig
from ...runtime.offload import shapes_only
from ...transformer.model import SkyReelsTransformer
from ..dialects import LORA_PREFIXES
from ..keymaps import HALF_SWAPPED, transformer_sources

#: MLP embedders, whose layers OneTrainer names as diffusers does
_EMBEDDERS = ("time_in", "guidance_in", "txt_in.t_embedder")


class Place(NamedTuple):
    """Where a module of a LoRA file acts.

    Attributes:
        module: ours.
        rows: of its weight and bias, the first and the one after the last.
        swaps_halves: the file has the second half of these rows first.
    """

    module: str
    rows: tuple[int, int]
    swaps_halves: bool = False


@lru_cache(maxsize=4)
def parameter_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of the transformer.

    Args:
        config: sizes of the transformer.

    Returns:
        By name, in the order of the module tree.
    """
    with shapes_only():
        model = SkyReelsTransformer(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@lru_cache(maxsize=4)
def spellings(config: TransformerConfig) -> dict[str, Place]:
    """Every name, without prefix, that a LoRA file may have for a module of the transformer.

    Args:
        config: sizes of the transformer.

    Returns:
        Where each acts. Names of the original checkpoint, ComfyUI and diffusers, those of
        OneTrainer's OMI format (`.0`, `.1`, `.2` for q, k, v, `.3` for the MLP; `fc0`), and all of
        them with `_` for `.`.
    """
    table: dict[str, Place] = {}
    for name, shape in parameter_shapes(config).items():
        module, _, attribute = name.rpartition(".")
        if attribute == "weight":
            for spelling, place in _of_module(module, shape[0], config):
                for each in {spelling, spelling.replace(".", "_")}:
                    other = table.setdefault(each, place)
                    assert other == place, f"{each} means {other} and {place}"
    return table


def _of_module(module: str, num_rows: int, config: TransformerConfig) -> list[tuple[str, Place]]:
    """Dotted names of a module, and of the parts that other layouts have instead."""
    whole = Place(module, (0, num_rows))
    layouts = ("original", "comfyui")
    fused = [transformer_sources(f"{module}.weight", layout)[0] for layout in layouts]
    names = list(dict.fromkeys(name.rpartition(".")[0] for name in fused))
    for embedder in _EMBEDDERS:
        if module.startswith(f"{embedder}.mlp."):
            number = 1 if module.endswith("0") else 2
            names.append(f"{embedder}.linear_{number}")
    if module.endswith("mlp.fc1"):
        names.append(f"{module[:-1]}0")
    found = [(name, whole) for name in names]
    parts = [
        name.rpartition(".")[0] for name in transformer_sources(f"{module}.weight", "diffusers")
    ]
    if len(parts) == 1:
        return [
            *found,
            (parts[0], whole._replace(swaps_halves=("diffusers", module) in HALF_SWAPPED)),
        ]
    for index, part in enumerate(parts):
        start = index * config.hidden_size
        is_last = index == len(parts) - 1
        rows = (start, num_rows if is_last else start + config.hidden_size)
        found += [(each, Place(module, rows)) for each in (part, *(f"{n}.{index}" for n in names))]
    return found


def find(table: dict[str, Place], name: str) -> Place | None:
    """Look a name up, with and without the prefixes that writers put in front.

    Args:
        table: from `spellings`.
        name: of a module, as the file spells it.

    Returns:
        Where it acts; None if it is not one of ours.
    """
    while name not in table:
        prefix = next((p for p in LORA_PREFIXES if name.startswith(p)), None)
        if prefix is None:
            return None
        name = name[len(prefix) :]
    return table[name]
