"""What a rank-32 LoRA on all linear layers of the blocks costs an 8-bit model, counted.

Shapes only. The launches are those of a GPU: each side branch is one kernel there.
"""

import pytest
import torch
from comfyui_skyreels.skyreels.config import CHUNKINGS, TransformerConfig
from comfyui_skyreels.skyreels.plan import weights_of
from comfyui_skyreels.skyreels.runtime.offload import weight_bytes
from comfyui_skyreels.skyreels.transformer.model import SkyReelsTransformer
from comfyui_skyreels.skyreels.transformer.quant import (
    STORAGE_DTYPES,
    QuantLinear,
    hadamard_block_size,
)
from comfyui_skyreels.skyreels.transformer.side_branch import SideBranch
from support import peak
from support.traffic import Traffic
from torch.utils._python_dispatch import TorchDispatchMode

RANK, WIDTH, TEXT_TOKENS = 32, 3072, 256
#: of 960x544x97
IMAGE_TOKENS = 51_000
FULL = TransformerConfig()
#: rows of the parts that diffusers splits a layer into
PARTS = {"linear1": [WIDTH] * 3 + [4 * WIDTH], "qkv": [WIDTH] * 3}
PRODUCTS = ("_scaled_mm", "int8_linear_")

_library = torch.library.Library("lora_costs", "DEF")
_library.define("attention(Tensor query, Tensor key, Tensor value) -> Tensor")
_library.impl(
    "attention",
    lambda query, key, value: torch.empty_like(query.transpose(1, 2).contiguous()).transpose(1, 2),
    "Meta",
)


def shape(*sizes, dtype=torch.bfloat16):
    return torch.empty(*sizes, dtype=dtype, device="meta")


def quantized(precision):
    """One block of each kind, every linear layer of it in 8 bits but the modulation."""
    config = TransformerConfig(num_layers=1, num_single_layers=1)
    block = hadamard_block_size(WIDTH, 4 * WIDTH) if precision == "int8" else 0
    with torch.device("meta"):
        model = SkyReelsTransformer(config).bfloat16().requires_grad_(False)
    for name, layer in list(model.named_modules()):
        if is_block_linear(name, layer):
            stored = shape(*layer.weight.shape, dtype=STORAGE_DTYPES[precision])
            scale = shape(layer.out_features, 1, dtype=torch.float32)
            model.set_submodule(
                name,
                QuantLinear(stored, scale, layer.bias, hadamard_block=block, weight_only=False),
            )
    return model


def is_block_linear(name, layer):
    is_inside = name.startswith(("double_blocks.", "single_blocks."))
    return is_inside and isinstance(layer, torch.nn.Linear) and "mod" not in name


def give_branches(model, is_split):
    for name, layer in model.named_modules():
        if not isinstance(layer, QuantLinear):
            continue
        whole = [layer.out_features]
        rows = next((r for end, r in PARTS.items() if name.endswith(end)), whole)
        factors, start = [], 0
        for count in rows if is_split else whole:
            pair = (shape(count, RANK), shape(RANK, layer.in_features))
            factors.append(((start, start + count), *pair))
            start += count
        size = (layer.out_features, layer.in_features)
        layer.side_branch = SideBranch(
            size, factors, hadamard_block=layer.hadamard_block, dtype=torch.bfloat16
        )


class Operations(TorchDispatchMode):
    """Multiplications and additions of the layers, and of the branches beside them."""

    def __init__(self):
        super().__init__()
        self.layers = self.branches = self.launches = self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[-1]
        if name == "_scaled_mm":
            self.layers += 2 * args[0].numel() * args[1].shape[1]
        if name == "int8_linear_":
            self.layers += 2 * args[0].numel() * len(args[2])
        self.products += name in PRODUCTS
        if name == "add_low_rank_":
            x, segments = args[0], args[4]
            for place in range(0, len(segments), 4):
                start, stop, first, last = segments[place : place + 4]
                tokens = x.numel() // x.shape[-1]
                self.branches += 2 * tokens * (last - first) * (x.shape[-1] + stop - start)
            self.launches += 1
        return peak.run(func, args, kwargs or {})


def run_blocks(model, chunking, mode):
    rope = shape(IMAGE_TOKENS, 64, dtype=torch.complex64)
    img, txt = shape(1, IMAGE_TOKENS, WIDTH), shape(1, TEXT_TOKENS, WIDTH)
    joined = shape(1, IMAGE_TOKENS + TEXT_TOKENS, WIDTH)
    mods = [shape(1, 1, 6 * WIDTH) for _ in range(2)]
    last = (rope, torch.ops.lora_costs.attention, CHUNKINGS[chunking])
    with mode, torch.inference_mode():
        model.double_blocks[0](img, txt, mods, *last)
        model.single_blocks[0](joined, [shape(1, 1, 3 * WIDTH)], *last)
    return mode


each_kind = pytest.mark.parametrize("is_split", [False, True], ids=["fused", "split"])


@each_kind
@pytest.mark.parametrize("precision", STORAGE_DTYPES)
@pytest.mark.parametrize("chunking", ["whole", "chunks"])
def test_operations_and_launches_are_few(precision, chunking, is_split):
    """1.4 and 2.1 per cent, and no kernel but one for each product of the layers."""
    model = quantized(precision)
    before = run_blocks(model, chunking, Traffic()).kernels
    give_branches(model, is_split)
    counted = run_blocks(model, chunking, Operations())
    after = run_blocks(model, chunking, Traffic()).kernels
    assert 0.01 * counted.layers <= counted.branches
    assert counted.branches <= (0.023 if is_split else 0.016) * counted.layers
    assert after - before == counted.launches <= counted.products


@each_kind
def test_the_factors_take_little_memory_and_the_plan_counts_them(is_split):
    """236 and 275 MB: no zeros are stored for the parts of a fused layer."""
    model = quantized("fp8")
    bare, planned = (weight_bytes(b) for b in model.blocks), weights_of(model)
    bare = list(bare)
    give_branches(model, is_split)
    double, single = (weight_bytes(b) - n for b, n in zip(model.blocks, bare, strict=True))
    whole = FULL.num_layers * double + FULL.num_single_layers * single
    assert whole <= (276e6 if is_split else 237e6)
    grown = [after - b for after, b in zip(weights_of(model).blocks, planned.blocks, strict=True)]
    assert grown == [double, single]
