"""Bytes of a transformer's weights in one precision: of a loaded one, or from a file's header."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import nn

from ..config import TransformerConfig
from ..kernels.blocks import BLOCK_TYPES, row_bytes
from ..runtime.offload import module_tensors, shapes_only, weight_bytes
from ..transformer.block_linear import BlockLinear
from ..transformer.model import SkyReelsTransformer
from ..transformer.quant import STORAGE_DTYPES, QuantLinear, is_quantizable

#: how a checkpoint names the dtype of most of its numbers -> precision, see `weights_as`; GGUF
#: blocks go by their own names
STORED = {
    "F32": "fp32",
    "BF16": "bf16",
    "F16": "fp16",
    "F8_E4M3": "fp8",
    "F8_E5M2": "fp8",
    "I8": "int8",
    **{kind: kind for kind in BLOCK_TYPES},
}
#: names of what `load_transformer` keeps as the file has it
_BLOCKS = ("double_blocks.", "single_blocks.")


@dataclass(frozen=True)
class Weights:
    """A transformer's weights in one precision.

    Attributes:
        precision: as the loader is asked for it.
        gemm: how blocks are multiplied: "fp32", "bf16", "fp8" or "int8".
        is_exact: whether no number is rounded further than the file rounded it.
        is_dequantized: 8-bit weights or GGUF blocks are dequantized for every product.
        dtype: of the activations.
        blocks: bytes of each block in the loop, in the order in which they run.
        outside: bytes of the rest of the loop.
        conditioners: bytes of the largest group of conditioners that is loaded at a time.
        total: bytes of everything, which the host holds.
    """

    precision: str
    gemm: str
    is_exact: bool
    is_dequantized: bool
    dtype: torch.dtype
    blocks: tuple[int, ...]
    outside: int
    conditioners: int
    total: int

    @property
    def loop(self) -> int:
        """Bytes that every forward pass reads."""
        return sum(self.blocks) + self.outside


def weights_of(
    transformer: SkyReelsTransformer, precision: str = "", is_exact: bool = True
) -> Weights:
    """The weights of a transformer, on any device, "meta" included.

    Args:
        transformer: loaded.
        precision: for people; "" names how it multiplies.
        is_exact: see `Weights`; False where 8-bit layers multiply in 8 bits in any case.

    Returns:
        Their sizes.
    """
    apart = {id(t) for module in transformer.conditioners for t in module_tensors(module)}

    def in_loop(module: nn.Module) -> int:
        return sum(t.nbytes for t in module_tensors(module) if id(t) not in apart)

    blocks = tuple(map(in_loop, transformer.blocks))
    groups = [sum(map(weight_bytes, modules)) for modules in transformer.modulations]
    layers = [layer for block in transformer.blocks for layer in block.modules()]
    in_8_bits = [layer for layer in layers if isinstance(layer, QuantLinear)]
    kinds = Counter(layer.kind for layer in layers if isinstance(layer, BlockLinear))
    rounded = {layer.weight.dtype for layer in in_8_bits if not layer.weight_only}
    is_dequantized = bool(kinds) or any(layer.weight_only for layer in in_8_bits)
    what = f"{kinds.most_common(1)[0][0]} blocks" if kinds else "8-bit weights"
    names = {dtype: name for name, dtype in STORAGE_DTYPES.items()}
    dtype = transformer.compute_dtype
    plain = "fp32" if dtype == torch.float32 else "bf16"
    gemm = next((names[each] for each in names if each in rounded), plain)
    return Weights(
        precision=precision or (f"{what} in {gemm}" if is_dequantized else gemm),
        gemm=gemm,
        is_exact=is_exact and not rounded,
        is_dequantized=is_dequantized,
        dtype=dtype,
        blocks=blocks,
        outside=in_loop(transformer) - sum(blocks),
        conditioners=max(sum(map(weight_bytes, transformer.embedders)), *groups),
        total=weight_bytes(transformer),
    )


@lru_cache(maxsize=32)
def weights_as(config: TransformerConfig, stored: str, precision: str) -> Weights:
    """The weights that `load_transformer` will make of a file, from shapes alone.

    Args:
        config: of the transformer.
        stored: precision of most of the file's numbers: "fp32", "bf16", "fp16", "fp8", "int8" or a
            type of GGUF blocks, which all weights of the blocks are taken to have.
        precision: a name of config.TRANSFORMER_PRECISIONS.

    Returns:
        Their sizes.
    """
    # blocks of a kind are alike, but for the first and the last two double ones (`is_quantizable`)
    doubles, singles = min(config.num_layers, 5), min(config.num_single_layers, 1)
    small = replace(config, num_layers=doubles, num_single_layers=singles)
    is_wide = precision == "fp32" or (precision == "auto" and stored == "fp32")
    with shapes_only():
        model = SkyReelsTransformer(small).to(torch.float32 if is_wide else torch.bfloat16)
    in_blocks = precision == "auto" and stored in BLOCK_TYPES
    keeps = precision == "auto" and stored in STORAGE_DTYPES
    linears = {n: layer for n, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    for name, layer in linears.items():
        if in_blocks and name.startswith(_BLOCKS):
            if layer.in_features % BLOCK_TYPES[stored].size == 0:
                model.set_submodule(name, _in_blocks(layer, stored))
        elif keeps and name.startswith(_BLOCKS):
            model.set_submodule(name, _in_8_bits(layer, stored, weight_only=True))
        elif precision in STORAGE_DTYPES and is_quantizable(f"{name}.weight", doubles):
            model.set_submodule(name, _in_8_bits(layer, precision, weight_only=False))
    is_rounded = stored in ("fp32", "fp16") and not is_wide
    found = weights_of(model, precision, is_exact=not is_rounded)
    blocks = list(found.blocks)
    if config.num_layers > doubles:
        blocks[2:3] = [blocks[2]] * (config.num_layers - doubles + 1)
    if config.num_single_layers > singles:
        blocks += blocks[-1:] * (config.num_single_layers - singles)
    return replace(found, blocks=tuple(blocks), total=_total_bytes(config, model, found, blocks))


def _in_blocks(layer: nn.Linear, kind: str) -> BlockLinear:
    num_bytes = row_bytes(kind, layer.in_features)
    data = torch.empty(layer.out_features, num_bytes, dtype=torch.uint8, device="meta")
    return BlockLinear(data, kind, layer.bias)


def _in_8_bits(layer: nn.Linear, precision: str, *, weight_only: bool) -> QuantLinear:
    weight = torch.empty(layer.weight.shape, dtype=STORAGE_DTYPES[precision], device="meta")
    scale = torch.empty(layer.out_features, 1, device="meta")
    return QuantLinear(weight, scale, layer.bias, weight_only=weight_only)


def _total_bytes(
    config: TransformerConfig, model: SkyReelsTransformer, found: Weights, blocks: Sequence[int]
) -> int:
    """Bytes of a whole model, from one with fewer blocks.

    Args:
        config: of the whole model.
        model: the same with fewer blocks.
        found: sizes of `model`.
        blocks: bytes of each block of the whole model.

    Returns:
        As `Weights.total`.
    """
    of_each = [sum(map(weight_bytes, block.modulations)) for block in model.blocks]
    counts = (config.num_layers, config.num_single_layers)
    of_kinds = (of_each[0], of_each[-1] if config.num_single_layers else 0)
    modulations = sum(count * size for count, size in zip(counts, of_kinds, strict=True))
    rest = found.total - sum(found.blocks) - sum(of_each)
    return rest + sum(blocks) + modulations
