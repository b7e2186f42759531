"""Between ComfyUI's objects and the engine's."""

import logging
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...skyreels.conditioning.embeds import PromptEmbeds, check_prompt_embeds, trim
from ...skyreels.conditioning.latents import ImageConditioning, is_whole, to_model_space
from ...skyreels.config import (
    SPATIAL_COMPRESSION,
    TEMPORAL_COMPRESSION,
    Guidance,
    TransformerConfig,
)
from ...skyreels.errors import OptionError, ShapeError, TextError
from ...skyreels.sampling.prompts import Prompt, ScheduledPrompt, percent_to_sigma, scheduled

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


#: what is read of an entry's options
USED_KEYS = {
    "pooled_output",
    "attention_mask",
    "guidance",
    "concat_latent_image",
    "strength",
    "default",
    "start_percent",
    "end_percent",
    "clip_start_percent",
    "clip_end_percent",
}
#: what is not, and what that means; of any other key, only that it is not used
UNUSED_KEYS = {
    "area": "the entry counts for the whole picture",
    "mask": "the entry counts for the whole picture",
    "control": "the model has no ControlNet",
    "gligen": "the model has no GLIGEN",
    "hooks": "LoRAs and schedules of hooks are not applied; use SkyReels Load LoRA",
    "reference_latents": "the model takes no reference pictures",
    "concat_mask": "the model takes no mask beside the picture",
    "guiding_frame_index": "it belongs to Tencent's own image-to-video model",
    "ref_latent": "it belongs to Tencent's own image-to-video model",
}
#: parts of another key, which is told
KEYS_OF_OTHERS = {
    "mask_strength": "mask",
    "set_area_to_bounds": "mask",
    "control_apply_to_uncond": "control",
}


def warn_unused(*conditionings: Conditioning | None) -> None:
    """Tell each key of any entry that is not used, once.

    Args:
        conditionings: of a run.
    """
    entries = [entry for each in conditionings if each for entry in each]
    keys = dict.fromkeys(key for _, extras in entries for key in extras)
    for key in keys:
        if key not in USED_KEYS and KEYS_OF_OTHERS.get(key) not in keys:
            reason = UNUSED_KEYS.get(key)
            logger.warning(
                "The conditioning's %s is not used%s.", key, f": {reason}" if reason else ""
            )


def warn_surplus(conditioning: Conditioning | None, name: str, count: int) -> None:
    """Tell of prompts that no clip takes.

    Args:
        conditioning: some entries may hold several prompts.
        name: "positive" or "negative", for messages.
        count: clips of the batch.
    """
    most = max((len(states) for states, _ in conditioning or []), default=0)
    if most > count:
        logger.warning(
            "An entry of the %s conditioning holds %d prompts at once, and the batch has %d "
            "clip(s): the first %d are used.",
            name,
            most,
            count,
            count,
        )


def to_prompt_embeds(conditioning: Conditioning, name: str, index: int = 0) -> PromptEmbeds:
    """Prompt embeddings of a CONDITIONING's first entry, trimmed to its true tokens and to 256.

    Args:
        conditioning: of which the first entry is used.
        name: "positive" or "negative", for messages.
        index: of the clip in a batch; an entry that holds several prompts gives each clip its own.

    Returns:
        One encoded prompt.

    Raises:
        TextError: empty, or without pooled CLIP state.
    """
    if not conditioning:
        raise TextError(f"The {name} conditioning is empty: {TEXT_FIX}.")
    states, extras = conditioning[0]
    pooled = extras.get("pooled_output")
    if pooled is None:
        raise TextError(f"The {name} conditioning has no pooled CLIP state: {TEXT_FIX}.")
    states, pooled = _of_clip(states, index), _of_clip(pooled, index)
    mask = extras.get("attention_mask")
    if mask is not None:
        mask = _of_clip(mask, index) if mask.ndim > 1 else mask
        if mask.numel() < states.shape[1]:
            raise TextError(
                f"The {name} conditioning has {states.shape[1]} tokens and a mask of "
                f"{mask.numel()}: {TEXT_FIX}."
            )
        states = states[:, mask.reshape(-1)[: states.shape[1]].bool().to(states.device)]
    return trim(PromptEmbeds(states.float().cpu(), pooled.float().cpu()))


def _of_clip(batch: Tensor, index: int) -> Tensor:
    """What a clip takes of a batch: core repeats one that is too short."""
    return batch if len(batch) < 2 else batch[index % len(batch)][None]


def to_prompt(
    conditioning: Conditioning, name: str, *, shift: float, guidance: float, index: int = 0
) -> Prompt:
    """All entries of a CONDITIONING, with their strengths and ranges, as core reads them.

    Args:
        conditioning: at least one entry.
        name: "positive" or "negative", for messages.
        shift: of the schedule, by which ranges become sigmas.
        guidance: the run's embedded guidance; an entry may have another.
        index: of the clip in a batch.

    Returns:
        One prompt, or several.

    Raises:
        TextError: an entry that cannot be read.
        OptionError: a strength or range that is none.
    """
    if not conditioning:
        raise TextError(f"The {name} conditioning is empty: {TEXT_FIX}.")
    return [
        _scheduled(entry, to_prompt_embeds([entry], name, index), shift, guidance)
        for entry in conditioning
    ]


def _scheduled(
    entry: list[Any], embeds: PromptEmbeds, shift: float, guidance: float
) -> ScheduledPrompt:
    extras = entry[1]
    start, end = extras.get("start_percent"), extras.get("end_percent")
    if "clip_start_percent" in extras:  # of text encoded with hooks
        start = max(extras["clip_start_percent"], 0.0 if start is None else start)
        end = min(extras["clip_end_percent"], 1.0 if end is None else end)
    own_guidance = extras.get("guidance")
    return ScheduledPrompt(
        embeds,
        strength=float(extras.get("strength", 1.0)),
        sigma_start=1.0 if start is None else percent_to_sigma(float(start), shift),
        sigma_end=0.0 if end is None else percent_to_sigma(float(end), shift),
        fills_up="default" in extras,
        guidance_scale=guidance if own_guidance is None else float(own_guidance),
    )


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
    positive: Conditioning,
    negative: Conditioning | None,
    guidance: Guidance,
    shift: float,
    config: TransformerConfig,
    *,
    index: int = 0,
) -> tuple[Prompt, Prompt | None]:
    """Both prompts of a run, from its two conditionings.

    Args:
        positive: of the prompt.
        negative: of the negative prompt, if one is connected.
        guidance: at a true CFG scale of 1 or below the negative prompt is not used.
        shift: of the schedule.
        config: sizes that the prompts must have.
        index: of the clip in a batch.

    Returns:
        The encoded prompt, and the negative one or None.

    Raises:
        TextError: one that does not fit the model.
        OptionError: a strength or range that is none.
    """
    options: Any = {"shift": shift, "guidance": guidance.guidance_scale, "index": index}
    prompt, negative_prompt = to_prompt(positive, "positive", **options), None
    if negative is not None and guidance.true_cfg_scale > 1:
        negative_prompt = to_prompt(negative, "negative", **options)
    for each in filter(None, (prompt, negative_prompt)):
        for entry in scheduled(each):
            check_prompt(entry.embeds, config)
    return prompt, negative_prompt


def embedded_guidance(conditioning: Conditioning, widget: float) -> float:
    """The value a FluxGuidance node left in the conditioning, else the widget's."""
    value = conditioning[0][1].get("guidance") if conditioning else None
    if value is None:
        return widget
    if value != widget:
        logger.info("Embedded guidance %s comes from the conditioning, not the widget.", value)
    return float(value)


def latent_samples(latent: Latent, name: str = "latent") -> Tensor:
    """The tensor of a LATENT.

    Args:
        latent: from any node.
        name: for messages.

    Returns:
        [B, 16, T, h, w], VAE space.

    Raises:
        ShapeError: another model's latent, or one with NaN or infinity.
    """
    samples = latent.get("samples")
    if not isinstance(samples, Tensor):
        raise ShapeError("The latent holds no samples: connect a LATENT of HunyuanVideo.")
    if samples.ndim != 5 or samples.shape[1] != 16 or 0 in samples.shape:
        raise ShapeError(
            f"The latent is {list(samples.shape)}; HunyuanVideo's is [1, 16, frames, height, "
            "width]. Use EmptyHunyuanLatentVideo, or VAE Encode with the HunyuanVideo VAE."
        )
    if not bool(samples.isfinite().all()):
        raise ShapeError(f"The {name} holds NaN or infinity: check the node that made it.")
    return samples


def check_denoise(denoise: float, sigmas: Tensor | None, start: Tensor | None) -> None:
    """Refuse a run of the schedule's end alone that has no clip to start from.

    Args:
        denoise: the widget.
        sigmas: that replace it, if connected.
        start: latents to start from, if connected.

    Raises:
        OptionError: denoise below 1 and no latent, or sigmas that begin below 1 and none.
    """
    if sigmas is not None and denoise < 1:
        logger.warning("denoise %g is not used: `sigmas` is connected.", denoise)
    begin = denoise if sigmas is None else float(sigmas[0]) if sigmas.numel() else 1.0
    if begin > 0.99 or (start is not None and bool(start.any())):
        return
    what = f"denoise is {denoise:g}" if sigmas is None else f"`sigmas` begin at {begin:.3g}"
    if start is not None:
        logger.warning("%s, and `latent` is empty: the clip starts from a grey one.", what)
        return
    raise OptionError(
        f"{what}, so only the end of the schedule would run, and no clip to start from is "
        "connected: connect one to `latent`, or set denoise to 1."
    )


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
    _, _, frames, height, width = latent_samples(latent, "start latent").shape
    return ImageConditioning(
        None,
        width=width * SPATIAL_COMPRESSION,
        height=height * SPATIAL_COMPRESSION,
        num_frames=(frames - 1) * TEMPORAL_COMPRESSION + 1,
    )


def noise_mask(latent: Latent, samples: Tensor) -> Tensor | None:
    """Which parts of a LATENT are sampled anew, as core resizes a mask.

    Args:
        latent: from SetLatentNoiseMask or another node.
        samples: its tensor.

    Returns:
        [B, 1 or 16, T, h, w] in 0..1, of the samples' batch and size; None if all of it is.

    Raises:
        ShapeError: a mask of another shape, or with NaN or infinity.
    """
    mask = latent.get("noise_mask")
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 3, 4, 5) or 0 in mask.shape:
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ShapeError(
            f"The latent's noise mask is {shape}; use a MASK of [frames, height, width]."
        )
    if not bool(mask.isfinite().all()):
        raise ShapeError("The noise mask holds NaN or infinity: check the node that made it.")
    mask = mask.float().cpu()
    if mask.ndim < 5:
        mask = mask.reshape(1, 1, -1, *mask.shape[-2:])
    mask = F.interpolate(mask, size=samples.shape[2:], mode="trilinear")
    if mask.shape[1] > 1:
        mask = mask.repeat(1, 16, 1, 1, 1)[:, :16]
    if bool((mask == 1).all()):
        return None
    return torch.cat([_of_clip(mask, index) for index in range(len(samples))])


def noise_indices(latent: Latent | None, count: int) -> list[int]:
    """Which draw of the seed's generator each clip of a batch starts from, as core counts them.

    Args:
        latent: whose "batch_index" tells, if it has one.
        count: clips of the batch.

    Returns:
        One for each clip.

    Raises:
        ShapeError: the latent tells fewer, or no numbers.
    """
    indices = (latent or {}).get("batch_index")
    if indices is None:
        return list(range(count))
    if not all(map(is_whole, indices)) or len(indices) < count:
        raise ShapeError(
            f"The latent's batch_index is {list(indices)[:8]}; {count} clips need a whole number "
            "each. Remove the node that set it."
        )
    return [int(index) for index in indices[:count]]


def image_from_conditioning(positive: Conditioning, latent: Latent | None) -> ImageConditioning:
    """The picture an InstructPixToPixConditioning node left in the positive conditioning.

    A picture of another size than the latent is resized, and a longer one cut, as core does.

    Args:
        positive: the conditioning.
        latent: gives size and length of the video; without one the picture's own count.

    Returns:
        Start and size of the clip; of a batch of pictures, all of them.

    Raises:
        ShapeError: no picture, or no length.
    """
    given = positive[0][1].get("concat_latent_image") if positive else None
    if given is None:
        raise ShapeError(
            "No picture: connect SkyReels Image Conditioning to `image` (or use core's "
            "InstructPixToPixConditioning on both prompts)."
        )
    if given.ndim != 5 or given.shape[1] != 16 or 0 in given.shape:
        raise ShapeError(
            f"The picture's latent in the conditioning is {list(given.shape)}; HunyuanVideo's is "
            "[1, 16, frames, height, width]: use the HunyuanVideo VAE and one picture in "
            "InstructPixToPixConditioning."
        )
    given = given.float().cpu()
    frames, height, width = given.shape[2:]
    if latent is not None:
        frames, height, width = latent_samples(latent, "start latent").shape[2:]
        if given.shape[3:] != (height, width):
            logger.warning(
                "The picture's latent is %dx%d and the clip's %dx%d: it is resized, which blurs "
                "it. Scale the picture before encoding it.",
                given.shape[4],
                given.shape[3],
                width,
                height,
            )
            given = _resized(given, height, width)
        if given.shape[2] > frames:
            logger.warning(
                "The picture has %d latent frames and the clip %d: the rest is cut off.",
                given.shape[2],
                frames,
            )
            given = given[:, :, :frames]
    elif frames == 1:
        raise ShapeError(
            "The length of the video is unknown: connect an EmptyHunyuanLatentVideo to `latent`."
        )
    return ImageConditioning(
        to_model_space(given),
        width=width * SPATIAL_COMPRESSION,
        height=height * SPATIAL_COMPRESSION,
        num_frames=(frames - 1) * TEMPORAL_COMPRESSION + 1,
    )


def _resized(latents: Tensor, height: int, width: int) -> Tensor:
    """Cut latents to the proportions of another size, then resize them frame by frame.

    Returns:
        [B, 16, k, height, width].

    Source: common_upscale of comfy/utils.py, "bilinear" and "center".
    """
    batch, channels, frames, old_height, old_width = latents.shape
    old, new = old_width / old_height, width / height
    x = round((old_width - old_width * (new / old)) / 2) if old > new else 0
    y = round((old_height - old_height * (old / new)) / 2) if old < new else 0
    cut = latents[..., y : old_height - y, x : old_width - x]
    flat = cut.transpose(1, 2).reshape(-1, channels, *cut.shape[3:])
    flat = F.interpolate(flat, size=(height, width), mode="bilinear")
    return flat.reshape(batch, frames, channels, height, width).transpose(1, 2)


def num_clips(image: ImageConditioning, start: Tensor | None) -> int:
    """Clips of a run: one for each start latent; for each picture where there is one or none.

    Args:
        image: pictures, or a size.
        start: [B, 16, T, h, w], or None.

    Returns:
        At least 1.
    """
    pictures = 1 if image.image_latents is None else len(image.image_latents)
    return pictures if start is None or len(start) == 1 else len(start)


def of_batch(image: ImageConditioning, index: int, count: int) -> ImageConditioning:
    """The picture of one clip of a batch; fewer pictures than clips are spread as core does.

    Args:
        image: of one picture or several.
        index: of the clip.
        count: of the clips.

    Returns:
        One picture; a size without one as it is.
    """
    if image.image_latents is None:
        return image
    pictures = len(image.image_latents)
    if pictures > count:
        place = round(index * (pictures - 1) / max(1, count - 1))
    else:
        place = math.floor((index + 0.5) * pictures / count)
    place = min(place, pictures - 1)
    ends = image.end_latents
    if ends is not None and len(ends) > 1:
        ends = ends[place : place + 1]
    return replace(image, image_latents=image.image_latents[place : place + 1], end_latents=ends)


def clip_of(batch: Tensor | None, index: int) -> Tensor | None:
    """One clip of [B, ...], [1, ...]; the only one serves all."""
    return None if batch is None else _of_clip(batch, index)
