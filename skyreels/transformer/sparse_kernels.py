"""Which kernel runs sparse attention on a device, and why.

Ours (kernels/triton/sparse.py) takes the lists of the other branch of guidance and knows the
variance term. comfy-kitchen's `sol_attn` routes each branch for itself, by mean queries and keys.
Each one found is compared with its definition in plain torch (kernels/sparse.py) on small inputs of
every kind, those that pass are timed beside dense attention at the size of the run, and the fastest
is used. Where none is faster, attention is dense, and a warning says why.
"""

import logging
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..kernels import dispatch, sparse
from ..kernels.dispatch import Candidate, Decision, DeviceInfo, Finding
from ..kernels.sparse import BLOCK, PART, SparseAttention, SparseResult, num_blocks
from .attention import FAST_GAIN, Size, timed
from .attention_quality import KINDS, draw

logger = logging.getLogger("skyreels.transformer.sparse_kernels")

#: a kernel must come this close to its definition (relative L2) on every kind of input
SPARSE_ERROR = 4e-2
#: the size of those inputs: whole blocks, one with the beginning of the text, and a short one
PROBED_TOKENS, PROBED_IMAGE_BLOCKS, PROBED_HEADS = 1_100, 15, 2
#: comfy-kitchen's kernel is compiled for this head dimension
KITCHEN_HEAD_DIM = 128


def sparse_bytes(heads: int, head_dim: int, tokens: int) -> int:
    """Bytes that sparse attention takes beside what `FAST_BYTES` counts.

    Args:
        heads: that attend together.
        head_dim: D.
        tokens: of image and text.

    Returns:
        Pooled tensors, and the larger of the means of parts and the lists.
    """
    blocks = num_blocks(tokens)
    pooled = 3 * heads * blocks * head_dim * 4
    parts = 2 * heads * blocks * (BLOCK // PART) * head_dim * 4
    lists = heads * blocks * (2 * blocks + -(-blocks // 8))
    return pooled + max(parts, lists)


def choose_sparse(
    device: torch.device | str,
    dense: Decision,
    beta: float,
    *,
    heads: int = 24,
    head_dim: int = 128,
    tokens: int = 51_060,
    dtype: torch.dtype = torch.bfloat16,
) -> Decision:
    """The kernel for sparse attention on a device; logged once per device and process.

    Args:
        device: of the queries.
        dense: what runs instead where none is usable, and what a kernel must be faster than.
        beta: of the run, see `sparse.route`.
        heads: of the queries.
        head_dim: of the queries.
        tokens: of the queries, image and text.
        dtype: of the queries.

    Returns:
        A `SparseAttention` as `impl`; None where none is usable, after a warning that names each
        and its reason.
    """
    device = torch.empty(0, device=device).device
    info, size = dispatch.describe(device), Size(heads, head_dim, tokens, dtype)
    if info.type == "cpu" or dispatch.backend() == "reference":
        chosen = Decision(sparse.sparse_attention, "slower than dense attention", "plain torch")
    else:
        chosen = _fastest(info, device, size, dense, beta)
    is_found = chosen.impl is not None
    what = f"{chosen.name}: {chosen.reason}"
    if not is_found:
        what = f"not available, so attention is dense ({dense.name}): {chosen.reason}"
    level = logging.INFO if is_found else logging.WARNING
    dispatch.log_once(f"Sparse attention on {device}: {what}.", level, logger)
    return chosen


def decisions(device: torch.device) -> dict[str, dict[str, Decision]]:
    """Look up kernels for sparse attention without importing them.

    Args:
        device: they would run on.

    Returns:
        Subject -> "" -> decision, for `dispatch.report`.
    """
    info = dispatch.describe(device)
    found = {}
    for name in SPARSE_KERNELS:
        problem = unavailable_reason(name, info)
        reason = problem or "tried when sparse attention is requested"
        decision = Decision(None, reason, "not available" if problem else "found")
        found[f"sparse attention, {name}"] = {"": decision}
    return found


def unavailable_reason(name: str, info: DeviceInfo) -> str:
    """Why a kernel of SPARSE_KERNELS cannot be tried on a device; empty if it can."""
    is_ours, backend = name != "comfy-kitchen", dispatch.backend()
    if backend == "reference" or (backend == "triton" and not is_ours):
        return f"{dispatch.BACKEND_VARIABLE}={backend}"
    if info.capability is None:
        return f"needs an NVIDIA GPU, this is {info.type}"
    if info.capability < (8, 0):
        return f"needs sm80, this is {dispatch.sm(info)}"
    if is_ours:
        return dispatch.triton_problem(info)
    return "" if dispatch.is_installed("comfy_kitchen") else "comfy_kitchen is not installed"


def _fastest(
    info: DeviceInfo, device: torch.device, size: Size, dense: Decision, beta: float
) -> Decision:
    candidates = [
        Candidate(
            name,
            partial(load, info, device, size),
            partial(_judge, is_ours=name != "comfy-kitchen", size=size, device=device),
            unavailable_reason(name, info),
        )
        for name, load in SPARSE_KERNELS.items()
    ]
    problems = tuple(each.problem for each in candidates)
    if all(problems):
        return dispatch.decide(candidates, dense.name)
    is_forced = dispatch.backend() == "triton"
    num_image_blocks = size.tokens // BLOCK - 1  # a block of text is good enough for timing

    def clock(passed: dict[str, SparseAttention]) -> dict[str, float]:
        functions = {
            name: partial(_output, attend, beta, num_image_blocks)
            for name, attend in passed.items()
        }
        return timed(functions, dense, device, size)

    return dispatch.remembered(
        ("sparse attention", device, size.key, problems, is_forced, dense.name, beta),
        lambda: dispatch.decide(
            candidates,
            dense.name,
            clock=None if is_forced else clock,
            size=f"{size.tokens:,} tokens",
            min_gain=FAST_GAIN,
            must_be_timed=True,
        ),
    )


def _output(
    attend: SparseAttention,
    beta: float,
    num_image_blocks: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
) -> Tensor:
    return attend(query, key, value, beta, num_image_blocks, None).out


def _judge(attend: SparseAttention, *, is_ours: bool, size: Size, device: torch.device) -> Finding:
    """Error of a kernel beside its definition, on each kind of input; of ours for given lists."""
    beta, count = 0.85, PROBED_IMAGE_BLOCKS

    def expected(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        pooled = sparse.pool(query, key, value)
        if is_ours:
            chosen, tail = sparse.route(query, key, beta, count), "variance"
        else:
            chosen, tail = sparse.route_by_means(pooled, beta, count), "block"
        return [sparse.attend(query, key, value, pooled, chosen, tail)]

    def found(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        lists = sparse.pack(sparse.route(query, key, beta, count)) if is_ours else None
        return [attend(query, key, value, beta, count, lists).out]

    inputs = (
        (
            kind,
            draw(kind, PROBED_TOKENS, PROBED_HEADS, size.head_dim, device=device, dtype=size.dtype),
        )
        for kind in KINDS
    )
    return dispatch.probe(found, expected, inputs, SPARSE_ERROR)


def _load_kitchen(info: DeviceInfo, device: torch.device, size: Size) -> SparseAttention:
    import comfy_kitchen

    attend = comfy_kitchen.sol_attn  # an AttributeError is a reason too
    if size.head_dim != KITCHEN_HEAD_DIM:
        raise RuntimeError(f"it takes a head dimension of {KITCHEN_HEAD_DIM}, not {size.head_dim}")
    if not comfy_kitchen.sol_attn_is_available(device):
        raise RuntimeError("its CUDA extension does not load: it needs driver 580 or newer")

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        beta: float,
        num_image_blocks: int,
        exact: Tensor | None,
    ) -> SparseResult:
        text = [num_image_blocks, num_blocks(key.shape[2])]
        tokens_first = (x.transpose(1, 2) for x in (query, key, value))
        out = attend(*tokens_first, tau=beta, sink_blocks=text, sink_q=text)
        pooled = sparse.pool(query, key, value)  # to tell how dense it was
        counts = sparse.route_by_means(pooled, beta, num_image_blocks).sum(dim=2)
        return SparseResult(out.transpose(1, 2), None, counts)

    return attention


def _load_triton(
    info: DeviceInfo, device: torch.device, size: Size, *, index: int = 0
) -> SparseAttention:
    from ..kernels.triton import sparse as triton_sparse

    problem = triton_sparse.refusal(size.head_dim, size.tokens)
    tiles = triton_sparse.tiles(info.capability or (0, 0))
    if problem or not tiles:
        raise RuntimeError(problem or f"it has no tile for {dispatch.sm(info)}")
    return partial(triton_sparse.sparse_attention, tile=tiles[index])


#: name -> load(info, device, size) -> the attention; the likely fastest first
SPARSE_KERNELS: dict[str, Callable[[DeviceInfo, torch.device, Size], SparseAttention]] = {
    "Triton 8 bits": _load_triton,
    "Triton 16 bits": partial(_load_triton, index=-1),
    "comfy-kitchen": _load_kitchen,
}
