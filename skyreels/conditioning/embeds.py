"""Encoded prompts, checked and cut to the trained length; the frame rate prefix of a prompt.

A host may encode prompts with its own LLaMA-3 and CLIP-L; the checks here tell its results from
those of other encoders. Texts are never padded and so never masked: padding with a mask gives the
same numbers, slower.
"""

import logging
import re
from dataclasses import dataclass

from torch import Tensor

from ..config import MAX_TEXT_TOKENS, TransformerConfig
from ..errors import TextError

logger = logging.getLogger("skyreels.conditioning.embeds")

_FPS_PREFIX = re.compile(r"\s*FPS-\d+\s*,", re.IGNORECASE)


@dataclass(frozen=True)
class PromptEmbeds:
    """One encoded prompt.

    Attributes:
        prompt_embeds: [1, n, text_dim] float32 on the CPU, the n true tokens, no padding.
        pooled_prompt_embeds: [1, pooled_dim] float32 on the CPU.
    """

    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor


def check_prompt_embeds(embeds: PromptEmbeds, config: TransformerConfig) -> None:
    """Refuse embeddings that do not come from this model's two text encoders.

    Args:
        embeds: from `encode_prompt` or a host.
        config: of the transformer that reads them.

    Raises:
        TextError: a tensor missing, wrongly shaped, empty or not finite.
    """
    states, pooled = embeds.prompt_embeds, embeds.pooled_prompt_embeds
    text_dim, pooled_dim = config.text_embed_dim, config.pooled_projection_dim
    if not isinstance(states, Tensor) or states.ndim != 3 or states.shape[0] != 1:
        raise TextError(
            f"Prompt embeddings must be [1, tokens, {text_dim}], one prompt; got "
            f"{_describe(states)}. Encode one prompt with LLaMA-3."
        )
    if states.shape[1] == 0:
        raise TextError(
            "Prompt embeddings have no token; even an empty prompt has one (the end of its turn). "
            "Encode the prompt again."
        )
    if states.shape[2] != text_dim:
        raise TextError(
            f"Prompt embeddings have width {states.shape[2]}, and this model reads {text_dim}: "
            "they probably come from another text encoder (T5, CLIP alone or another LLM). Encode "
            "the prompt with LLaMA-3."
        )
    if pooled is None:
        raise TextError(
            "The prompt has no pooled CLIP state: it probably comes from an encoder without CLIP-L "
            "(T5 alone). Encode the prompt with CLIP-L too."
        )
    if not isinstance(pooled, Tensor) or tuple(pooled.shape) != (1, pooled_dim):
        raise TextError(
            f"The prompt's pooled state must be [1, {pooled_dim}]; got {_describe(pooled)}. Encode "
            "the prompt with CLIP-L."
        )
    for name, tensor in (("embeddings", states), ("pooled state", pooled)):
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise TextError(
                f"The prompt's {name} must be finite floats; got {tensor.dtype} with NaN, infinity "
                "or integers. Load the text encoders in bf16 or fp32 (fp16 can overflow), then "
                "encode again."
            )


def trim(embeds: PromptEmbeds, max_tokens: int = MAX_TEXT_TOKENS) -> PromptEmbeds:
    """Cut a prompt to the length the model was trained with; a cut is logged as a warning.

    Args:
        embeds: prompt_embeds [1, n, text_dim].
        max_tokens: number of tokens kept, from the front.

    Returns:
        `embeds` itself if it is short enough.
    """
    num_tokens = embeds.prompt_embeds.shape[1]
    if num_tokens <= max_tokens:
        return embeds
    warn_truncated(num_tokens, max_tokens)
    return PromptEmbeds(embeds.prompt_embeds[:, :max_tokens], embeds.pooled_prompt_embeds)


def with_fps_prefix(prompt: str) -> str:
    """The prompt with "FPS-24, " in front, as in training, unless it names a frame rate already."""
    return prompt if _FPS_PREFIX.match(prompt) else f"FPS-24, {prompt}"


def warn_truncated(num_tokens: int, max_tokens: int) -> None:
    """Log that a prompt is cut."""
    logger.warning(
        "The prompt has %d tokens, and the model was trained with %d: the rest is cut off.",
        num_tokens,
        max_tokens,
    )


def _describe(value: object) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else f"a {type(value).__name__}"
