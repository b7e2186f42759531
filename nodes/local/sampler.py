"""The sampler."""

import logging
import time
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from ...skyreels.builtin import BUILTIN_NAME, warn_of_builtin_size
from ...skyreels.conditioning.latents import ImageConditioning
from ...skyreels.config import (
    ATTENTIONS,
    BAD_RENDERS,
    MAX_STEPS,
    ContextWindows,
    Guidance,
    TransformerConfig,
)
from ...skyreels.sampling.batch import Clip, sample_clips
from ...skyreels.sampling.calibrate import CACHE_CHOICES, choose_cache
from ...skyreels.sampling.schedules import SCHEDULES, named_sigmas
from ...skyreels.sampling.settings import SamplingSettings, euler, get_sigmas
from ...skyreels.weights.load import checkpoint_of
from .. import host
from . import convert
from .receipts import is_plain, sampler_receipt

logger = logging.getLogger("skyreels.nodes.local.sampler")

STEPS = {
    "steps": (
        "INT",
        {
            "default": 30,
            "min": 1,
            "max": MAX_STEPS,
            "tooltip": "The authors use 30. Use at least 5 times CFG: below 20 steps with CFG 6 "
            "the picture dissolves.",
        },
    ),
}
SHIFT = {
    "shift": (
        "FLOAT",
        {
            "default": 7.0,
            "min": 0.1,
            "max": 100.0,
            "step": 0.1,
            "tooltip": "Shift of the schedule towards noise. 7 is the released value; use 17 below "
            "20 steps.",
        },
    ),
}
DENOISE = {
    "denoise": (
        "FLOAT",
        {
            "default": 1.0,
            "min": 0.01,
            "max": 1.0,
            "step": 0.01,
            "advanced": True,
            "tooltip": "Below 1, only the end of the schedule runs, on a start latent: 0.5 keeps "
            "its composition, 0.8 little more than its colours.",
        },
    ),
}


class SkyReelsScheduler:
    CATEGORY = "SkyReels/sampling"
    SEARCH_ALIASES = ["sigmas", "hunyuan scheduler"]
    DESCRIPTION = (
        "The default schedule of SkyReels Sampler as SIGMAS, or one of core's by name, to split it "
        "between two samplers or to modify it."
    )
    FUNCTION = "schedule"
    RETURN_TYPES = ("SIGMAS",)
    RETURN_NAMES = ("sigmas",)
    OUTPUT_TOOLTIPS = ("steps + 1 sigmas from 1 (or where denoise starts) to 0.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        scheduler = {
            "scheduler": (
                list(SCHEDULES),
                {
                    "default": "default",
                    "tooltip": "default is the one SkyReels was released with; the others are "
                    "core's, with the shift above. sgm_uniform and normal stay longer at high "
                    "noise; karras and exponential spend most steps at low noise, where this model "
                    "needs few.",
                },
            )
        }
        return {"required": {**STEPS, **SHIFT, **DENOISE}, "optional": scheduler}

    def schedule(
        self, steps: int, shift: float, denoise: float, scheduler: str = "default"
    ) -> tuple[Tensor]:
        return (named_sigmas(scheduler, steps, shift, denoise),)


class SkyReelsSampler:
    CATEGORY = "SkyReels/sampling"
    SEARCH_ALIASES = [
        "image to video",
        "i2v",
        "text to video",
        "t2v",
        "hunyuan sampler",
        "ksampler",
        "generate video",
    ]
    DESCRIPTION = (
        "Turns noise into the latents of a video: 30 Euler steps with true CFG 6 by default, as "
        "the authors do. A transformer that does not fit the card is streamed block by block. "
        "Cancel works between blocks."
    )
    FUNCTION = "sample"
    RETURN_TYPES = ("LATENT", "STRING")
    RETURN_NAMES = ("samples", "receipt")
    OUTPUT_TOOLTIPS = (
        "[1, 16, T, h, w] in VAE space, for SkyReels VAE Decode or core's VAE Decode nodes.",
        "JSON: prompt, seed, settings, weights with their hashes, versions, seconds; for SkyReels "
        "From Receipt.",
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        fraction = {"min": 0.0, "max": 1.0, "step": 0.01, "advanced": True}
        return {
            "required": {
                "model": ("SKYREELS_MODEL", {"tooltip": "From SkyReels Load Transformer."}),
                "positive": (
                    "CONDITIONING",
                    {
                        "tooltip": "From core's CLIPTextEncode with a hunyuan_video CLIP, or "
                        "SkyReels Text Encode. Prompts should begin with 'FPS-24, '. Several "
                        "entries (ConditioningCombine, timestep ranges, strengths) count as in "
                        "core; each that is active at a step is one more model evaluation."
                    },
                ),
                "seed": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": 2**64 - 1,
                        "control_after_generate": True,
                        "tooltip": "One seed gives the same noise on every device.",
                    },
                ),
                **STEPS,
                "cfg": (
                    "FLOAT",
                    {
                        "default": 6.0,
                        "min": 0.0,
                        "max": 30.0,
                        "step": 0.1,
                        "tooltip": "True classifier-free guidance, default 6. At 1 or below the "
                        "negative prompt is skipped and a step takes half the time.",
                    },
                ),
                "embedded_guidance": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        "min": 0.0,
                        "max": 30.0,
                        "step": 0.1,
                        "tooltip": "Keep 1.0: SkyReels is not guidance-distilled (6 is for "
                        "HunyuanVideo's text-to-video). A FluxGuidance node overrides it.",
                    },
                ),
                **SHIFT,
            },
            "optional": {
                "negative": (
                    "CONDITIONING",
                    {
                        "tooltip": "What to avoid; needed while cfg is above 1, may be empty text. "
                        "Several entries count as in the positive one."
                    },
                ),
                "image": (
                    "SKYREELS_IMAGE",
                    {
                        "tooltip": "From SkyReels Image Conditioning. Without it the picture is "
                        "taken from core's InstructPixToPixConditioning. A text-to-video model "
                        "takes none."
                    },
                ),
                "latent": (
                    "LATENT",
                    {
                        "tooltip": "A clip of the same size to start from, for video to video "
                        "with denoise below 1. An empty latent only sets the length, and with a "
                        "text-to-video model the size too (EmptyHunyuanLatentVideo). A batch is "
                        "sampled one clip after the other; a noise mask keeps the rest."
                    },
                ),
                "sampler": (
                    "SAMPLER",
                    {
                        "tooltip": "From KSamplerSelect or another core node without a model "
                        "input. Euler if not connected."
                    },
                ),
                "sigmas": (
                    "SIGMAS",
                    {
                        "tooltip": "From SkyReels Scheduler or your own, falling within 1..0; they "
                        "replace steps, shift and denoise. Part of a schedule (SplitSigmas) gives "
                        "an unfinished latent for a second sampler with add_noise off."
                    },
                ),
                **DENOISE,
                "cfg_start": (
                    "FLOAT",
                    {
                        "default": 0.0,
                        **fraction,
                        "tooltip": "Fraction of the steps before which the negative prompt is "
                        "skipped; 0 uses it from the start.",
                    },
                ),
                "cfg_end": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        **fraction,
                        "tooltip": "Fraction of the steps after which the negative prompt is "
                        "skipped; 0.5 saves a quarter of the time.",
                    },
                ),
                "guidance_rescale": (
                    "FLOAT",
                    {
                        "default": 0.0,
                        **fraction,
                        "tooltip": "0 is off; 0.7 reduces the excess contrast of a high CFG.",
                    },
                ),
                "cfg_zero_star": (
                    "BOOLEAN",
                    {
                        "default": False,
                        "advanced": True,
                        "tooltip": "CFG-Zero*: scale the negative prediction to match the "
                        "positive one.",
                    },
                ),
                "zero_init_steps": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": 20,
                        "advanced": True,
                        "tooltip": "CFG-Zero*: zero the velocity for the first N steps; 0 is off.",
                    },
                ),
                "riflex_k": (
                    "INT",
                    {
                        "default": 4,
                        "min": 0,
                        "max": 8,
                        "advanced": True,
                        "tooltip": "RIFLEx keeps clips beyond 177 frames from repeating: index of "
                        "the temporal frequency to lower, 4 for SkyReels, 0 is off.",
                    },
                ),
                "resume": (
                    "BOOLEAN",
                    {
                        "default": False,
                        "advanced": True,
                        "tooltip": "Save each finished step to disk (13 MB). Queueing the same "
                        "inputs after a cancel or crash continues there. Euler only. Saved steps "
                        "are deleted after 7 days.",
                    },
                ),
                "add_noise": (
                    "BOOLEAN",
                    {
                        "default": True,
                        "advanced": True,
                        "tooltip": "Switch off to continue the unfinished latent of another "
                        "sampler, whose sigmas ended where these begin.",
                    },
                ),
                "cache": (
                    list(CACHE_CHOICES),
                    {
                        "default": "off",
                        "advanced": True,
                        "tooltip": "Skips predictable denoising steps (off = exact). Model "
                        "evaluations out of 60 and PSNR to the exact clip, built-in model: easy "
                        "35, 70 dB; fast 28, 64 dB; first-block 35, 66 dB (needs 0.7 GB at "
                        "960x544x97). calibrated takes the threshold that `python -m skyreels "
                        "calibrate` has stored for the weights. Euler only.",
                    },
                ),
                "attention": (
                    list(ATTENTIONS),
                    {
                        "default": "exact",
                        "advanced": True,
                        "tooltip": "fast uses the fastest 8-bit kernel available (ours, "
                        "comfy-kitchen, SageAttention, FA3, cuDNN) whose error stays within 4 % on "
                        "every test input and that is faster than exact attention at the size of "
                        "the run; otherwise attention stays exact and the log says why. Needs up "
                        "to 1 GB more at 960x544x97. Our kernel gives 44 dB PSNR to the exact clip "
                        "on the built-in model. sparse and sparser: fast, and after the first 20 % "
                        "of the steps each block of tokens attends exactly to about 20 % (14 %) of "
                        "the others and to the means of the rest. From 12,000 tokens on.",
                    },
                ),
                "guidance": (
                    "SKYREELS_GUIDANCE",
                    {"tooltip": "From SkyReels Guidance: skip-layer guidance and FreSca."},
                ),
                "windows": (
                    "SKYREELS_WINDOWS",
                    {
                        "tooltip": "From SkyReels Context Windows, for clips longer than a window. "
                        "Not together with a cache."
                    },
                ),
                "bad_render": (
                    list(BAD_RENDERS),
                    {
                        "default": "off",
                        "advanced": True,
                        "tooltip": "Halfway (step 15 of 30 with shift 7) look whether the clip "
                        "will stand still, cut to another scene or change colours. warn says so, "
                        "stop ends the run, retry goes on with the next seed, four tries in all; "
                        "the seed that was used is in the log and in the latent. The limits were "
                        "measured on the built-in model only, so off is the default.",
                    },
                ),
                "second_device": (
                    list(host.SECOND_DEVICES),
                    {
                        "default": "off",
                        "advanced": True,
                        "tooltip": "A second card makes the negative prediction of each step while "
                        "this one makes the positive one: about half the time, the same clip. auto "
                        "takes the first other CUDA card. Each card needs room for the model as if "
                        "it were alone. Not with cache first-block.",
                    },
                ),
            },
            "hidden": {"unique_id": "UNIQUE_ID", "graph": "DYNPROMPT"},
        }

    def sample(
        self,
        model: host.LoadedModel,
        positive: convert.Conditioning,
        seed: int,
        steps: int,
        cfg: float,
        embedded_guidance: float,
        shift: float,
        negative: convert.Conditioning | None = None,
        image: ImageConditioning | None = None,
        latent: convert.Latent | None = None,
        sampler: Any = None,
        sigmas: Tensor | None = None,
        denoise: float = 1.0,
        cfg_start: float = 0.0,
        cfg_end: float = 1.0,
        guidance_rescale: float = 0.0,
        cfg_zero_star: bool = False,
        zero_init_steps: int = 0,
        riflex_k: int = 4,
        resume: bool = False,
        add_noise: bool = True,
        cache: str = "off",
        attention: str = "exact",
        guidance: Guidance | None = None,
        windows: ContextWindows | None = None,
        bad_render: str = "off",
        second_device: str = "off",
        unique_id: str | None = None,
        graph: Any = None,
    ) -> tuple[convert.Latent, str]:
        begun = time.monotonic()
        sockets = {"sampler": sampler, "latent": latent, "guidance": guidance, "windows": windows}
        by_hand = [name for name, given in sockets.items() if given is not None]
        if not is_plain(sigmas, steps, shift, denoise):
            by_hand.append("sigmas")
        convert.warn_unused(positive, negative)
        start = None if latent is None else convert.latent_samples(latent, "start latent")
        image = _picture_of(model, positive, image, latent)
        connected = sigmas
        if sigmas is None:
            sigmas = get_sigmas(steps, shift, denoise)
        combined = replace(
            guidance or Guidance(),
            true_cfg_scale=cfg,
            guidance_scale=convert.embedded_guidance(positive, embedded_guidance),
            cfg_start=cfg_start,
            cfg_end=cfg_end,
            guidance_rescale=guidance_rescale,
            cfg_zero_star=cfg_zero_star,
            zero_init_steps=zero_init_steps,
        )
        settings = SamplingSettings(
            sigmas=sigmas.float().cpu(),
            guidance=combined,
            riflex_k=riflex_k,
            cache=choose_cache(cache, checkpoint_of(model.module), len(sigmas) - 1),
            attention=attention,
            resume=host.resume_folder() if resume else None,
            loras=model.loras,
            windows=windows,
            bad_render=bad_render,
        )
        if add_noise:
            convert.check_denoise(denoise, connected, start)
        config, own = model.module.config, replace(settings, seed=seed)
        clips = _clips_of(
            image, latent, start, positive, negative, config, own, sampler, shift, add_noise
        )
        runtime = host.ComfyRuntime(unique_id, model, with_preview=True)
        runtime.partner = host.second_runtime(second_device, runtime)
        if model.name == BUILTIN_NAME:
            told = warn_of_builtin_size(image.width, image.height, image.num_frames)
            if told is not None:
                runtime.note(told)
        samples, seeds = sample_clips(model.module, clips, runtime=runtime)
        used = {"seeds": seeds} if bad_render == "retry" else {}
        widgets = {"steps": steps, "shift": shift, "denoise": denoise, "cache": cache}
        receipt = sampler_receipt(
            model,
            image,
            replace(settings, seed=seeds[0] if bad_render == "retry" else seed),
            widgets,
            by_hand,
            graph,
            unique_id,
            runtime,
            time.monotonic() - begun,
        )
        return {**(latent or {}), **used, "samples": samples}, receipt


def _picture_of(
    model: host.LoadedModel,
    positive: convert.Conditioning,
    image: ImageConditioning | None,
    latent: convert.Latent | None,
) -> ImageConditioning:
    """What a clip begins with: the socket, or what core's conditioning has; else a size alone."""
    if not model.module.config.takes_image:
        return convert.size_without_picture(positive, image, latent)
    if image is None:
        return convert.image_from_conditioning(positive, latent)
    if any("concat_latent_image" in extras for _, extras in positive):
        logger.warning("The picture in the conditioning is not used: `image` is connected.")
    return image


def _clips_of(
    image: ImageConditioning,
    latent: convert.Latent | None,
    start: Tensor | None,
    positive: convert.Conditioning,
    negative: convert.Conditioning | None,
    config: TransformerConfig,
    settings: SamplingSettings,
    sampler: Any,
    shift: float,
    add_noise: bool,
) -> list[Clip]:
    """A clip for each picture of a batch, or for each start latent (the samples of `latent`)."""
    count = convert.num_clips(image, start)
    convert.warn_surplus(positive, "positive", count)
    convert.warn_surplus(negative, "negative", count)
    mask = None if latent is None or start is None else convert.noise_mask(latent, start)
    indices = convert.noise_indices(latent, count)
    clips = []
    for index in range(count):
        embeds = convert.to_prompts(
            positive, negative, settings.guidance, shift, config, index=index
        )
        solver, solver_of = euler, None
        if sampler is not None:  # one that adds noise of its own has another seed a clip
            solver_of = partial(_solver_of_clip, sampler, shift, index)
            solver = solver_of(settings.seed)
        own = replace(
            settings,
            init_latents=convert.clip_of(start, index),
            add_noise=add_noise,
            solver=solver,
            noise_index=indices[index],
            noise_mask=convert.clip_of(mask, index),
        )
        clips.append(Clip(convert.of_batch(image, index, count), *embeds, own, solver_of))
    return clips


def _solver_of_clip(sampler: Any, shift: float, index: int, seed: int) -> Any:
    """The solver of a clip of a batch, for the seed of the batch."""
    return host.core_solver(sampler, shift, (seed + index) % 2**64)
