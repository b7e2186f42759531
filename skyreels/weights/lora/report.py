"""What a LoRA does to a transformer, in a few lines: names that were used, and how much changes."""

import math

import torch
from torch import Tensor, nn

from ...errors import shown
from ...transformer.model import SkyReelsTransformer
from .apply import AppliedLora, acting_changes, difference, is_quantized, low_rank
from .read import NAMED, Change, product

#: start of a parameter's name -> group in the report, the first that fits
GROUPS = {
    "double_blocks.*.img_": "double blocks (image)",
    "double_blocks.*.txt_": "double blocks (text)",
    "single_blocks.": "single blocks",
    "": "the rest",
}
#: rows of a weight from which its norm is estimated: so many runs of so many
RUNS, RUN_ROWS = 4, 16
#: random inputs that a quantized layer is measured with: the estimate is within a few per cent
PROBES = 16


def describe_lora(applied: AppliedLora, transformer: SkyReelsTransformer) -> str:
    """A report for people, of one sentence a line.

    Args:
        applied: a LoRA, its strength and blocks.
        transformer: that it will act on, on any device.

    Returns:
        Keys matched, ignored and unknown; relative size of the change in each group of blocks; the
        memory that a quantized transformer needs beside its weights.
    """
    lora, acting = applied.lora, acting_changes(applied, transformer.config)
    modules = {change.parameter.rpartition(".")[0] for change in acting}
    ranks = sorted({c.tensors[0].shape[1] for c in acting if c.method == "low-rank"})
    rank = f", rank {'-'.join(map(str, [*ranks[:1], *ranks[1:][-1:]]))}" if ranks else ""
    lines = [
        f"{lora.name} ({lora.dialect}): {lora.num_matched} keys matched, {len(modules)} modules "
        f"changed{rank}."
    ]
    if lora.ignored:
        lines.append(
            f"{len(lora.ignored)} keys of text encoders or embeddings ignored "
            f"({shown(lora.ignored[0])})."
        )
    if lora.unknown:
        named = ", ".join(map(shown, lora.unknown[:NAMED]))
        lines.append(f"{len(lora.unknown)} unknown keys not used: {named}.")
    lines += [f"{note}." for note in lora.notes]
    sizes = effect_sizes(applied, transformer)
    if sizes:
        listed = ", ".join(f"{group} {100 * size:.2g} %" for group, size in sizes.items())
        lines.append(f"Change relative to the weights at strength {applied.strength:g}: {listed}.")
    else:
        lines.append(f"Changes no weight at strength {applied.strength:g} and these blocks.")
    if num_bytes := side_bytes(applied, transformer):
        lines.append(f"Takes {num_bytes / 1e9:.2g} GB beside the quantized weights.")
    return "\n".join(lines)


def effect_sizes(applied: AppliedLora, transformer: SkyReelsTransformer) -> dict[str, float]:
    """Relative Frobenius norm of the change of the matrices that change, for each group of blocks.

    That of the change comes from its factors; that of the weight is estimated from some rows.

    Args:
        applied: a LoRA, its strength and blocks.
        transformer: that it will act on.

    Returns:
        Group -> norm of the change / norm of the weight.
    """
    squares: dict[str, list[float]] = {}
    seen: set[str] = set()
    with torch.no_grad():
        for change in acting_changes(applied, transformer.config):
            name = change.parameter
            if change.tensors[0].ndim < 2 or applied.strength == 0:  # biases and norms
                continue
            sums = squares.setdefault(_group(name), [0.0, 0.0])
            sums[0] += applied.strength**2 * _square(change, transformer)
            if name not in seen:
                seen.add(name)
                sums[1] += _weight_square(transformer, name)
    return {
        group: math.sqrt(squares[group][0] / squares[group][1])
        for group in GROUPS.values()
        if group in squares and squares[group][1] > 0
    }


def _group(parameter: str) -> str:
    stem, _, rest = parameter.partition(".")
    part = rest.partition(".")[2]
    if stem == "double_blocks":
        return GROUPS[f"double_blocks.*.{'img_' if part.startswith('img_') else 'txt_'}"]
    return GROUPS["single_blocks." if stem == "single_blocks" else ""]


def _square(change: Change, transformer: SkyReelsTransformer) -> float:
    """The squared Frobenius norm of a change."""
    if change.magnitude is not None or change.method == "value":
        base = transformer.get_parameter(change.parameter).data.cpu().float()
        base = base.flatten(1)[slice(*change.rows)]
        return float(difference(change, base).square().sum())
    if change.method == "low-rank":
        return _product_square(*change.tensors)
    if change.method == "kronecker":
        small, *large = change.tensors
        square = _product_square(large[0], large[1]) if len(large) == 2 else _sum(large[0])
        return _sum(small) * square
    if change.method == "hadamard":
        pair = low_rank(change)
        assert pair is not None
        return _product_square(*pair)
    return _sum(product(change.method, change.tensors))


def _sum(tensor: Tensor) -> float:
    return float(tensor.float().square().sum())


def _product_square(up: Tensor, down: Tensor) -> float:
    """|up @ down|^2, from matrices of the rank's size."""
    return float(((up.T @ up) * (down @ down.T)).sum().clamp_min(0))


def _weight_square(transformer: SkyReelsTransformer, name: str) -> float:
    """An estimate of the squared Frobenius norm of a weight."""
    layer, apart = (
        transformer.get_submodule(name.rpartition(".")[0]),
        is_quantized(transformer, name),
    )
    rows = int(layer.out_features) if apart else len(transformer.get_parameter(name))  # type: ignore[arg-type]
    spans = sorted({rows * run // RUNS for run in range(RUNS)})
    total, count = 0.0, 0
    for start in spans:
        part = slice(start, min(start + RUN_ROWS, rows))
        count += part.stop - part.start
        if apart:
            total += _measured_square(layer, part, transformer.compute_dtype)
        else:
            total += _sum(transformer.get_parameter(name).data[part])
    return total * rows / count


def _measured_square(layer: nn.Module, rows: slice, dtype: torch.dtype) -> float:
    """|W[rows]|^2 of a quantized layer: the mean of |W[rows] z|^2 over normal z."""
    weight = next(layer.parameters())
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1, PROBES, int(layer.in_features), generator=generator)  # type: ignore[arg-type]
    result = layer.part(z.to(weight.device, dtype), rows, slice(None), None)  # type: ignore[operator]
    return _sum(result) / PROBES


def side_bytes(applied: AppliedLora, transformer: SkyReelsTransformer) -> int:
    """Bytes of the side branches that a LoRA gives a quantized transformer.

    Args:
        applied: a LoRA, its strength and blocks.
        transformer: that it will act on.

    Returns:
        0 where everything is merged.
    """
    numbers = 0
    for change in acting_changes(applied, transformer.config):
        if applied.strength == 0 or not is_quantized(transformer, change.parameter):
            continue
        layer = transformer.get_submodule(change.parameter.rpartition(".")[0])
        rows, columns = change.rows[1] - change.rows[0], int(layer.in_features)  # type: ignore[arg-type]
        rank = _rank(change) or min(rows, columns)
        numbers += min(rank * (rows + columns), rows * columns)
    return numbers * transformer.compute_dtype.itemsize


def _rank(change: Change) -> int:
    """Of the factors of a change; 0 if it has none."""
    tensors = change.tensors
    if change.method == "low-rank":
        return len(tensors[1])
    if change.method == "hadamard":
        return len(tensors[1]) * len(tensors[3])
    return tensors[0].shape[1] * len(tensors[2]) if len(tensors) == 3 else 0
