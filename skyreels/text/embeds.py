"""Encoded prompts: what they hold, how they are checked and cut, and the prefix of a prompt."""

import logging
import re
from dataclasses import dataclass

from torch import Tensor

from ..config import MAX_TEXT_TOKENS, TransformerConfig
from ..errors import TextError

logger = logging.getLogger("skyreels.text.embeds")

EMBEDS_FIX = (
    "make it with DualCLIPLoader (type hunyuan_video, files clip_l and llava_llama3) and a text "
    "encode node, or with SkyReels Text Encode"
)

FPS_PREFIX = re.compile(r"\s*FPS-\d+\s*,", re.IGNORECASE)


@dataclass(frozen=True)
class PromptEmbeds:
    """One encoded prompt.

    prompt_embeds: [1, n, text_dim] float32 on the CPU, the n true tokens, no padding.
    pooled_prompt_embeds: [1, pooled_dim] float32 on the CPU.
    """

    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor


def check_prompt_embeds(embeds: PromptEmbeds, config: TransformerConfig) -> None:
    """Refuse embeddings that do not come from this model's two text encoders.

    Args:
        embeds: from `encode_prompt` or a host.
        config: of the transformer they are for.
    Raises:
        TextError: a tensor missing, wrongly shaped, empty or not finite (the message gives what it
            got and how to make the right one).
    """
    states, pooled = embeds.prompt_embeds, embeds.pooled_prompt_embeds
    text_dim, pooled_dim = config.text_embed_dim, config.pooled_projection_dim
    if not isinstance(states, Tensor) or states.ndim != 3 or states.shape[0] != 1:
        raise TextError(
            f"The prompt is {_describe(states)} and not [1, tokens, {text_dim}] states of one "
            f"prompt: {EMBEDS_FIX}."
        )
    if states.shape[1] == 0:
        raise TextError(
            f"The prompt holds no token; even an empty text has one (the end of its turn): "
            f"{EMBEDS_FIX}."
        )
    if states.shape[2] != text_dim:
        raise TextError(
            f"The prompt has states of width {states.shape[2]} and this model reads {text_dim}: it "
            f"probably comes from another text encoder (T5, CLIP alone or another LLM); "
            f"{EMBEDS_FIX}."
        )
    if pooled is None:
        raise TextError(
            "The prompt has no pooled CLIP state: it probably comes from an encoder without CLIP-L "
            f"(T5 alone); {EMBEDS_FIX}."
        )
    if not isinstance(pooled, Tensor) or tuple(pooled.shape) != (1, pooled_dim):
        raise TextError(
            f"The prompt's pooled state is {_describe(pooled)} and this model reads "
            f"[1, {pooled_dim}] of CLIP-L: it probably comes from another CLIP; {EMBEDS_FIX}."
        )
    for name, tensor in (("states", states), ("pooled state", pooled)):
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise TextError(
                f"The prompt's {name} hold NaN, infinity or no floating-point numbers: load the "
                "text encoders in bf16 or fp32 (fp16 can overflow), then encode again."
            )


def trim(embeds: PromptEmbeds, max_tokens: int = MAX_TEXT_TOKENS) -> PromptEmbeds:
    """The prompt cut to the length the model was trained with; a cut is logged as a warning.

    Args:
        embeds: prompt_embeds [1, n, text_dim].
        max_tokens: tokens kept, from the front.
    """
    num_tokens = embeds.prompt_embeds.shape[1]
    if num_tokens <= max_tokens:
        return embeds
    warn_long(num_tokens, max_tokens)
    return PromptEmbeds(embeds.prompt_embeds[:, :max_tokens], embeds.pooled_prompt_embeds)


def with_fps_prefix(prompt: str) -> str:
    """The prompt with "FPS-24, " in front, as in training, unless it names a frame rate already."""
    return prompt if FPS_PREFIX.match(prompt) else f"FPS-24, {prompt}"


def _describe(value: object) -> str:
    return (
        f"of shape {list(value.shape)}"
        if isinstance(value, Tensor)
        else f"a {type(value).__name__}"
    )


def warn_long(num_tokens: int, max_tokens: int) -> None:
    """Say in the log how much of a prompt is cut."""
    logger.warning(
        "The prompt has %d tokens and the model was trained with %d: the rest is cut off.",
        num_tokens,
        max_tokens,
    )
