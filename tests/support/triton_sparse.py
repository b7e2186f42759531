"""Run our sparse attention in Triton's interpreter, or compile it for GPUs that need not be here.

    python -m support.triton_sparse interpret        (from tests/, with TRITON_INTERPRET=1)
    python -m support.triton_sparse compile 80 90    (from tests/, without it)

`interpret` prints one JSON line, {"cases": [{case, error, lists, counts}], "findings": {...}}, with
relative L2 errors to the twin in plain torch; `compile` for head dimension 128 at the model's
length {"kernels": [{kernel, capability, tile, threads, and what support/triton_record.py says}],
"taken", "second": what calls take}.
"""

import math
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from comfyui_skyreels.skyreels.kernels import sparse
from comfyui_skyreels.skyreels.kernels.dispatch import short
from comfyui_skyreels.skyreels.kernels.triton import attention, common
from comfyui_skyreels.skyreels.kernels.triton import sparse as kernels
from torch import Tensor

from support.peak import PeakBytes
from support.triton_versions import check_overflow, mend_interpreter, run_mode

#: image and text tokens of 97 frames of 544x960
IMAGE_TOKENS, TOKENS, HEADS, HEAD_DIM = 51_000, 51_060, 24, 128
#: beta -> share of normal numbers that are more than so many standard deviations above their mean
NORMAL_SHARE = {beta: 0.5 * math.erfc(beta / 2**0.5) for beta in (0.85, 1.1)}


class Case(NamedTuple):
    """A call of the kernels on inputs in which blocks differ.

    Attributes:
        head_dim: D.
        image: tokens, of which the last may share a block with text.
        text: tokens.
        dtype: of the inputs.
        capability: of the GPU whose tiles are taken.
        index: of the tile.
        beta: threshold.
        batch: B.
        heads: H.
    """

    head_dim: int
    image: int
    text: int
    dtype: torch.dtype
    capability: tuple[int, int]
    index: int
    beta: float = 0.3
    batch: int = 1
    heads: int = 2


CASES = (
    Case(64, 256, 1, torch.bfloat16, (9, 0), 0, heads=1),  # values in e4m3
    Case(128, 248, 60, torch.float32, (9, 0), 2, heads=1),  # 16 bits throughout, here in 32
    Case(32, 193, 8, torch.float16, (8, 6), 0, heads=1),  # values in fp16
    Case(32, 255, 0, torch.bfloat16, (8, 0), 0, heads=1),  # values in place
    Case(32, 192, 0, torch.float16, (8, 0), 1, beta=1.0, batch=2, heads=1),
    Case(32, 193, 8, torch.float32, (8, 0), 1, beta=-math.inf, heads=1),
    Case(32, 40, 30, torch.float32, (9, 0), 0, heads=1),  # the text starts in the first block
)


def tile_of(case: Case) -> kernels.Tile:
    """Pooled keys in twos, so that a clip of few blocks has several."""
    return kernels.tiles(case.capability)[case.index]._replace(tail_keys=2)


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Strided views of one buffer; tokens of a block are alike, and keys have a mean."""
    tokens = case.image + case.text
    shape = (case.batch, -(-tokens // 64), 3, case.heads, case.head_dim)
    buffer = torch.randn(shape).repeat_interleave(64, dim=1)[:, :tokens]
    buffer = buffer + torch.randn_like(buffer)
    buffer[:, :, 1] += 2 * torch.randn(case.heads, case.head_dim)
    query, key, value = buffer.to(case.dtype).permute(2, 0, 3, 1, 4)
    return query, key, value


def relative_l2(got: Tensor, expected: Tensor) -> float:
    return ((got.float() - expected).norm() / expected.norm()).item()


def compared(case: Case) -> dict:
    """The kernels beside the twin; exact attention, where everything is exact."""
    given = inputs(case)
    wide = [x.float() for x in given]
    count = case.image // 64
    tile = tile_of(case)
    got = kernels.sparse_attention(*given, beta=case.beta, num_image_blocks=count, tile=tile)
    exact = sparse.unpack(got.exact)
    chosen = exact
    if count:
        chosen = sparse.route(*wide[:2], case.beta, count)
    twin = sparse.attend(*wide, sparse.pool(*wide), chosen)
    if case.beta == -math.inf:
        twin = torch.nn.functional.scaled_dot_product_attention(*wide)
    return {
        "case": [*case[:3], str(case.dtype), case.capability, case.index],
        "error": relative_l2(got.out, twin),
        "lists": torch.equal(exact, chosen),
        "counts": torch.equal(got.counts, chosen.sum(dim=2).int()),
        "density": exact.float().mean().item() if count else 1.0,
    }


def given_lists() -> dict[str, float]:
    """Lists of another branch whose text is longer: one block, none of its neighbours, all."""
    case = Case(32, 256, 7, torch.float32, (8, 0), 1, heads=1)
    given = inputs(case)
    chosen = torch.eye(4, dtype=torch.bool)[None]
    chosen[0, 1] = True
    chosen[0, 2, :2] = True
    tile = tile_of(case)
    bitmap = sparse.pack(chosen)
    got = kernels.sparse_attention(*given, beta=9.0, num_image_blocks=4, exact=bitmap, tile=tile)
    twin = sparse.attend(*given, sparse.pool(*given), chosen)
    return {"error": relative_l2(got.out, twin), "kept": torch.equal(got.exact, bitmap)}


def routed(query: Tensor, key: Tensor, beta: float) -> Tensor:
    """What the kernels choose, without attention."""
    count = query.shape[2] // 64
    pooled = kernels._pool(query, key, key, count, is_routed=True, is_scaled=False)
    return kernels._route(pooled, kernels._center(pooled, query.shape[2], None), beta)


def routing() -> dict[str, bool]:
    """Lists of more blocks than one program takes; by heads; of keys that are all alike."""
    whole = kernels._ROUTE_BLOCKS
    kernels._ROUTE_BLOCKS = 8
    try:
        query, key, _ = inputs(Case(32, 64 * 9, 0, torch.float32, (8, 0), 1))
        bitmap = routed(query, key, 0.85)
        twin = sparse.route(query, key, 0.85, 9)
        alike = torch.ones_like(key[:, :1])
        same = routed(query[:, :1], 3 * alike, 0.0)
        return {
            "as the twin": torch.equal(bitmap, sparse.pack(twin)),
            "some and not all": 0.3 < twin.float().mean().item() < 0.7,
            "by heads": torch.equal(routed(query[:, 1:], key[:, 1:], 0.85), bitmap[1:]),
            "neighbours where all are alike": torch.equal(
                same, sparse.pack(sparse.route(query[:, :1], 3 * alike, 0.0, 9))
            ),
        }
    finally:
        kernels._ROUTE_BLOCKS = whole


def poisoned() -> dict[str, bool]:
    """Whether a NaN or an infinity in one key shows in its head, and only there."""
    found = {}
    for value, index in ((math.nan, 0), (math.inf, 0), (math.nan, 2)):
        case = Case(32, 66, 2, torch.float32, (9, 0), index)
        given = [x.clone() for x in inputs(case)]
        given[1][0, 0, 3, 5] = value
        tile = tile_of(case)
        got = kernels.sparse_attention(*given, beta=0.3, num_image_blocks=1, tile=tile).out
        found[f"{value} {index}"] = bool(got[:, 1].isfinite().all()) and not bool(
            got[:, 0, :, 5].isfinite().any()
        )
    return found


def interpret() -> dict:
    mend_interpreter()
    first, *others = CASES
    found = [compared(first)]
    check_overflow(False)
    return {
        "cases": found + [compared(case) for case in others],
        "given": given_lists(),
        "routing": routing(),
        "poisoned": poisoned(),
        "work": {beta: work(NORMAL_SHARE[beta] + 3 * 64 / IMAGE_TOKENS) for beta in NORMAL_SHARE},
    }


def launches(tile: kernels.Tile) -> list[tuple]:
    """(kernel, arguments, options) of a call at the model's length, on shape-only tensors."""
    found: list[tuple] = []

    def record(kernel, grid, *args, **options):
        found.append((kernel, args, options | {"enable_fp_fusion": True}))

    called(tile, record)
    return found


def called(tile: kernels.Tile, launch: Callable[..., None], exact: Tensor | None = None) -> None:
    """Call at the model's length, on shape-only tensors, with something else that launches."""
    attention.launch = kernels.launch = launch
    try:
        qkv = torch.empty(1, TOKENS, 3, HEADS, HEAD_DIM, dtype=torch.bfloat16, device="meta")
        kernels.sparse_attention(
            *qkv.permute(2, 0, 3, 1, 4),
            beta=0.85,
            num_image_blocks=IMAGE_TOKENS // 64,
            exact=exact,
            tile=tile,
        )
    finally:
        attention.launch = kernels.launch = common.launch


def taken(tile: kernels.Tile, *, is_second: bool = False) -> dict[str, int]:
    """Launches and bytes of a call at the model's length.

    Args:
        tile: of the kernel.
        is_second: whether the lists are those of another branch of guidance.

    Returns:
        Launches of kernels of ours; the most bytes alive at once beside inputs and output, without
        and with the copies in 8 bits (or fp16); bytes that kernels read and write, were every
        tensor moved once.
    """
    count = IMAGE_TOKENS // 64
    exact = torch.empty(HEADS, count, -(-count // 8), dtype=torch.uint8, device="meta")
    moved: list[int] = []

    def launch(kernel, grid, *args, **options):
        moved.append(sum(arg.nbytes for arg in args if isinstance(arg, Tensor)))

    with PeakBytes() as peak:
        called(tile, launch, exact if is_second else None)
    held = TOKENS * HEADS * HEAD_DIM
    copies = held * (2 * tile.is_int8 + (tile.values.dtype.itemsize if tile.values else 0))
    beside = peak.peak - 2 * 3 * held - 2 * held  # without queries, keys, values, and the output
    return {
        "launches": len(moved),
        "bytes": beside - copies,
        "with copies": beside,
        "moved": sum(moved),
    }


def work(
    density: float, tail_keys: int = 32, tokens: int = TOKENS, image_tokens: int = IMAGE_TOKENS
) -> dict:
    """Products of one head, over those of dense attention.

    Sums of weights are products with 16 columns of ones. Scores of parts are computed twice.

    Args:
        density: share of the pairs of image blocks that are exact.
        tail_keys: of the tile; the last ones may be padding.
        tokens: of image and text.
        image_tokens: the first of them.
    """
    blocks, count, width = sparse.num_blocks(tokens), image_tokens // 64, HEAD_DIM
    dense = 2 * tokens**2 * 2 * width
    tile = 2 * 64 * 64 * (2 * width + 16)
    pooled = 2 * 64 * tail_keys * (3 * width + 16)
    parts = count * (sparse.BLOCK // sparse.PART)
    shares = {
        "exact": count * (density * count + blocks - count) * tile / dense,
        "text": (blocks - count) * blocks * tile / dense,
        "tail": count * -(-count // tail_keys) * pooled / dense,
        "routing": 2 * 2 * parts**2 * width / dense,
    }
    return shares | {"all": sum(shares.values())}


def compile_for(capabilities: list[int]) -> list[dict]:
    """Resources of every kernel with every tile on every kind of GPU."""
    from support.triton_compile import source
    from support.triton_record import compiled

    rows = []
    for capability in capabilities:
        for index, tile in enumerate(kernels.tiles(divmod(capability, 10))):
            values = tile.values and short(tile.values.dtype)
            for kernel, args, options in launches(tile):
                named = dict(zip(kernel.arg_names, args, strict=True))
                constants = {p.name: named[p.name] for p in kernel.params if p.is_constexpr}
                runtime = args[: len(args) - len(constants)]  # constants come last
                took = compiled(source(kernel, runtime, constants), capability, options)
                rows.append({"kernel": kernel.fn.__name__, "capability": capability,
                             "tile": index, "is_int8": tile.is_int8, "values": values,
                             "threads": 32 * options["num_warps"], **took})  # fmt: skip
    return rows


def compiled_and_counted(capabilities: list[int]) -> dict:
    """What needs shape-only tensors, for which torch imports its compiler: seconds."""
    tiles = kernels.tiles((9, 0))
    return {
        "kernels": compile_for(capabilities),
        "taken": [taken(tile) for tile in tiles],
        "second": taken(tiles[0], is_second=True),
    }


if __name__ == "__main__":
    run_mode(interpret, compiled_and_counted, *sys.argv[1:])
