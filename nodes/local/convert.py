"""Between ComfyUI's objects and the engine's."""

import logging
from typing import Any

from torch import Tensor

from ...skyreels.config import SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION, TransformerConfig
from ...skyreels.errors import ShapeError, TextError
from ...skyreels.latents import ImageConditioning, to_model_space
from ...skyreels.text.embeds import PromptEmbeds, check_prompt_embeds, trim

logger = logging.getLogger("skyreels.nodes.local.convert")

Conditioning = list[list[Any]]
Latent = dict[str, Any]

TEXT_FIX = (
    "use DualCLIPLoader (clip_l + llava_llama3, type hunyuan_video) with CLIPTextEncode, or "
    "SkyReels Text Encode"
)


def to_conditioning(embeds: PromptEmbeds) -> Conditioning:
    """CONDITIONING in the format of core's hunyuan_video CLIP.

    Args:
        embeds: one encoded prompt.

    Returns:
        [[tensor [1, n, 4096] float32 on the CPU, {"pooled_output": [1, 768]}]]
    """
    return [[embeds.prompt_embeds, {"pooled_output": embeds.pooled_prompt_embeds}]]


def to_prompt_embeds(conditioning: Conditioning, name: str) -> PromptEmbeds:
    """Prompt embeddings of a CONDITIONING, trimmed to its true tokens and to 256.

    Args:
        conditioning: of which the first entry is used; more are reported in the log.
        name: "positive" or "negative", for messages.

    Returns:
        One encoded prompt.

    Raises:
        TextError: empty, several prompts in one entry, or without pooled CLIP state.
    """
    if not conditioning:
        raise TextError(f"The {name} conditioning is empty: {TEXT_FIX}.")
    if len(conditioning) > 1:
        logger.warning(
            "The %s conditioning has %d entries (combined, areas or time ranges); SkyReels uses "
            "the first one only.",
            name,
            len(conditioning),
        )
    states, extras = conditioning[0]
    pooled = extras.get("pooled_output")
    if pooled is None:
        raise TextError(f"The {name} conditioning has no pooled CLIP state: {TEXT_FIX}.")
    if states.shape[0] != 1 or pooled.shape[0] != 1:
        raise TextError(
            f"The {name} conditioning holds {states.shape[0]} prompts and {pooled.shape[0]} pooled "
            "states in one entry, and must hold one of each: encode one prompt."
        )
    mask = extras.get("attention_mask")
    if mask is not None and mask.numel() < states.shape[1]:
        raise TextError(
            f"The {name} conditioning has {states.shape[1]} tokens and a mask of {mask.numel()}: "
            f"{TEXT_FIX}."
        )
    if mask is not None:
        states = states[:, mask.reshape(-1)[: states.shape[1]].bool().to(states.device)]
    return trim(PromptEmbeds(states.float().cpu(), pooled.float().cpu()))


def check_prompt(embeds: PromptEmbeds, config: TransformerConfig) -> None:
    """As the engine's `check_prompt_embeds`, with the nodes that make the right embeddings.

    Raises:
        TextError: the embeddings do not come from this model's two text encoders.
    """
    try:
        check_prompt_embeds(embeds, config)
    except TextError as error:
        raise TextError(f"{error} In ComfyUI {TEXT_FIX}.") from None


def to_prompts(
    positive: Conditioning, negative: Conditioning | None, cfg: float, config: TransformerConfig
) -> tuple[PromptEmbeds, PromptEmbeds | None]:
    """Both prompts of a run, from its two conditionings.

    Args:
        positive: of the prompt.
        negative: of the negative prompt, if one is connected.
        cfg: true CFG scale; at 1 or below the negative prompt is not used.
        config: sizes that the prompts must have.

    Returns:
        The encoded prompt, and the negative one or None.

    Raises:
        TextError: one that does not fit the model.
    """
    prompt, negative_prompt = to_prompt_embeds(positive, "positive"), None
    if negative is not None and cfg > 1:
        negative_prompt = to_prompt_embeds(negative, "negative")
    for embeds in filter(None, (prompt, negative_prompt)):
        check_prompt(embeds, config)
    return prompt, negative_prompt


def embedded_guidance(conditioning: Conditioning, widget: float) -> float:
    """The value a FluxGuidance node left in the conditioning, else the widget's."""
    value = conditioning[0][1].get("guidance") if conditioning else None
    if value is None:
        return widget
    if value != widget:
        logger.info("Embedded guidance %s comes from the conditioning, not the widget.", value)
    return float(value)


def latent_samples(latent: Latent) -> Tensor:
    """The tensor of a LATENT.

    Args:
        latent: from any node.

    Returns:
        [1, 16, T, h, w], VAE space.

    Raises:
        ShapeError: another model's latent, or a batch of clips.
    """
    samples = latent.get("samples")
    if not isinstance(samples, Tensor):
        raise ShapeError("The latent holds no samples: connect a LATENT of HunyuanVideo.")
    if samples.ndim != 5 or samples.shape[1] != 16:
        raise ShapeError(
            f"The latent is {list(samples.shape)}; HunyuanVideo's is [1, 16, frames, height, "
            "width]. Use EmptyHunyuanLatentVideo, or VAE Encode with the HunyuanVideo VAE."
        )
    if samples.shape[0] != 1:
        raise ShapeError(
            f"The latent holds {samples.shape[0]} clips: set batch_size to 1 and queue the rest."
        )
    return samples


def size_without_picture(
    positive: Conditioning, image: ImageConditioning | None, latent: Latent | None
) -> ImageConditioning:
    """The size of a text-to-video clip, from `latent`.

    Args:
        positive: the conditioning.
        image: from SkyReels Image Conditioning; must not be connected.
        latent: of the size of the video.

    Returns:
        A size without image latents.

    Raises:
        ShapeError: a picture, or no size.
    """
    if image is not None or (positive and "concat_latent_image" in positive[0][1]):
        raise ShapeError(
            "The model is text-to-video (16 input channels) and takes no picture: disconnect "
            "`image` (and InstructPixToPixConditioning), or load the image-to-video transformer."
        )
    if latent is None:
        raise ShapeError(
            "The size of the video is unknown: connect an EmptyHunyuanLatentVideo to `latent`; the "
            "model is text-to-video and takes no picture."
        )
    _, _, frames, height, width = latent_samples(latent).shape
    return ImageConditioning(
        None,
        width=width * SPATIAL_COMPRESSION,
        height=height * SPATIAL_COMPRESSION,
        num_frames=(frames - 1) * TEMPORAL_COMPRESSION + 1,
    )


def image_from_conditioning(positive: Conditioning, latent: Latent | None) -> ImageConditioning:
    """The picture an InstructPixToPixConditioning node left in the positive conditioning.

    Args:
        positive: the conditioning.
        latent: gives the length of the video; without one the picture's own length counts.

    Returns:
        Start and size of the clip.

    Raises:
        ShapeError: no picture, no length, or two sizes that disagree.
    """
    given = positive[0][1].get("concat_latent_image") if positive else None
    if given is None:
        raise ShapeError(
            "No picture: connect SkyReels Image Conditioning to `image` (or use core's "
            "InstructPixToPixConditioning on both prompts)."
        )
    if given.ndim != 5 or given.shape[:2] != (1, 16):
        raise ShapeError(
            f"The picture's latent in the conditioning is {list(given.shape)}; HunyuanVideo's is "
            "[1, 16, frames, height, width]: use the HunyuanVideo VAE and one picture in "
            "InstructPixToPixConditioning."
        )
    frames = given.shape[2]
    if latent is not None:
        samples = latent_samples(latent)
        frames = samples.shape[2]
        if samples.shape[3:] != given.shape[3:] or frames < given.shape[2]:
            raise ShapeError(
                f"The picture's latent is {list(given.shape)} and `latent` is "
                f"{list(samples.shape)}: make both for the same video size."
            )
    elif frames == 1:
        raise ShapeError(
            "The length of the video is unknown: connect an EmptyHunyuanLatentVideo to `latent`."
        )
    return ImageConditioning(
        to_model_space(given.float().cpu()),
        width=given.shape[4] * SPATIAL_COMPRESSION,
        height=given.shape[3] * SPATIAL_COMPRESSION,
        num_frames=(frames - 1) * TEMPORAL_COMPRESSION + 1,
    )
