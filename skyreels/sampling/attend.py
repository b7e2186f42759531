"""The attention of a run: exact, in 8 bits, or sparse where it may be."""

import logging
import math
from typing import TypedDict

import torch

from ..errors import OptionError
from ..kernels import dispatch
from ..plan import Job
from ..runtime import Runtime
from ..runtime.collectives import least_of
from ..transformer.attention import Attention, choose_attention, trial_bytes
from ..transformer.model import SkyReelsTransformer
from ..transformer.sparse_attention import SPARSE, DenseRun, SparseConfig, SparseRun
from ..transformer.sparse_kernels import choose_sparse
from ..transformer.ulysses import UlyssesRun, check_ranks
from .settings import SamplingSettings

logger = logging.getLogger("skyreels.sampling.attend")

#: distilled LoRAs make clips in fewer, and sparse ones of them had artefacts (ComfyUI issue 16382)
MIN_SPARSE_STEPS = 15


class _Size(TypedDict):
    heads: int
    head_dim: int
    tokens: int
    dtype: torch.dtype


def name_of(attention: Attention | SparseConfig | str) -> str:
    """For the planner: a name of config.ATTENTIONS; a function given by hand counts as "fast"."""
    if isinstance(attention, SparseConfig):
        return "sparse"
    return attention if isinstance(attention, str) else "fast"


def attention_of_run(
    transformer: SkyReelsTransformer,
    job: Job,
    mode: Attention | SparseConfig | str,
    runtime: Runtime,
    *,
    follows: DenseRun | None = None,
) -> DenseRun:
    """The attention of a run, see `choose_attention` and `choose_sparse`.

    Args:
        transformer: whose sizes, dtype and blocks count.
        job: what is made.
        mode: of config.ATTENTIONS, or how sparse it is; a function is taken as it is.
        runtime: where; it makes room for trying kernels.
        follows: that of the other branch of guidance, on the first of two devices.

    Returns:
        The attention, which may be told of steps and blocks.

    Raises:
        OptionError: of several devices not all have a sparse kernel.
    """
    found = _attention_here(transformer, job, mode, runtime, follows)
    if runtime.ranks is not None:
        is_sparse = isinstance(found, SparseRun)
        fewest, most = least_of([is_sparse, -is_sparse], runtime.device, runtime.ranks.all)
        if fewest != -most:
            raise OptionError(
                "Not all ranks have a kernel for sparse attention "
                f"({runtime.device}: {'has one' if is_sparse else 'has none'}): use attention "
                "exact or fast, or cards of one kind."
            )
    return found


def _attention_here(
    transformer: SkyReelsTransformer,
    job: Job,
    mode: Attention | SparseConfig | str,
    runtime: Runtime,
    follows: DenseRun | None,
) -> DenseRun:
    """`attention_of_run` as far as this rank knows."""
    if not isinstance(mode, str | SparseConfig):
        return DenseRun(mode)
    config = mode if isinstance(mode, SparseConfig) else SPARSE.get(mode)
    heads = transformer.config.num_attention_heads
    if runtime.ranks is not None:  # each rank attends with some of them
        check_ranks(runtime.ranks.num_shares, heads)
        heads //= runtime.ranks.num_shares
    size: _Size = {
        "heads": heads,
        "head_dim": transformer.config.attention_head_dim,
        "tokens": job.tokens,
        "dtype": transformer.compute_dtype,
    }
    device = runtime.device
    # 8 bits belong to the sparse modes, where there are kernels for them
    dense_mode = mode if isinstance(mode, str) and config is None else "fast"
    if config is not None and device.type == "cpu":
        dense_mode = "exact"
    if dense_mode == "fast":  # its kernels are tried at this size
        runtime.make_room(trial_bytes(**size))
    dense = choose_attention(device, dense_mode, **size)
    if config is None:
        return DenseRun(dense.impl)
    if job.tokens < config.min_tokens:
        dispatch.log_once(
            f"Sparse attention is not used for {job}: its {job.tokens:,} tokens are below "
            f"{config.min_tokens:,}, where it gains nothing. Attention is dense ({dense.name}).",
            logging.WARNING,
            logger,
        )
        return DenseRun(dense.impl)
    sparse = choose_sparse(device, dense, config.beta, **size)
    leader = follows if isinstance(follows, SparseRun) else None
    if follows is not None and (leader is None) != (sparse.impl is None):
        raise OptionError(
            f"Of two devices only one has a kernel for sparse attention ({device}: "
            f"{sparse.reason}): use attention exact or fast, or one device."
        )
    if sparse.impl is None:
        return DenseRun(dense.impl)
    return SparseRun(
        config,
        sparse.impl,
        dense.impl,
        grid=transformer.token_grid(job.evaluated_shape),
        num_steps=job.num_steps,
        blocks=transformer.blocks,
        heads=size["heads"],
        device=device,
        follows=leader,
    )


def shared_out(
    attention: DenseRun, transformer: SkyReelsTransformer, job: Job, runtime: Runtime
) -> DenseRun:
    """The attention of a rank, where ranks share each prediction.

    Args:
        attention: from `attention_of_run`.
        transformer: whose blocks run.
        job: what is made.
        runtime: of this rank.

    Returns:
        `attention` itself where there is one rank.
    """
    if runtime.ranks is None or runtime.ranks.share is None:
        return attention
    return UlyssesRun(
        attention,
        math.prod(transformer.token_grid(job.evaluated_shape)),
        transformer.config.num_attention_heads,
        blocks=transformer.blocks,
        device=runtime.device,
        group=runtime.ranks.share,
    )


def warn_of_few_steps(settings: SamplingSettings) -> None:
    """Warn of sparse attention with a LoRA in a run as short as those of distilled ones."""
    is_sparse = isinstance(settings.attention, SparseConfig) or settings.attention in SPARSE
    if is_sparse and settings.loras and settings.num_steps < MIN_SPARSE_STEPS:
        logger.warning(
            "Sparse attention in a run of %d steps with a LoRA: with LoRAs distilled for few steps "
            "it can leave artefacts. Use attention exact or fast, or %d steps or more.",
            settings.num_steps,
            MIN_SPARSE_STEPS,
        )
