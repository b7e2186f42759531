"""Our transformer as a MODEL of ComfyUI's core: for KSampler, custom samplers and guiders.

Core's MODEL is a patcher around a `BaseModel`, which turns a sampler's latents and CONDITIONING
into inputs of a `diffusion_model`. Here that is a `_Bridge` without weights. Its predictions come
from the engine's `Evaluator`, which is opened by the first prediction of a run and closed when
core's sampling ends. So core's memory manager sees our weights once, through the patcher of the
SKYREELS_MODEL, and the engine plans, streams and recovers from a lack of memory as in SkyReels
Sampler.

What nodes do to a MODEL comes in through its options. Wrappers, guiders, CFG functions and replaced
or skipped blocks work as with core's own model; what has no counterpart is named once in the log.
"""

import copy
import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...skyreels.conditioning.embeds import PromptEmbeds, check_prompt_embeds, trim
from ...skyreels.conditioning.latents import ImageConditioning, check_picture, to_vae_space
from ...skyreels.errors import CheckpointError, ShapeError, TextError
from ...skyreels.kernels.dispatch import log_once
from ...skyreels.sampling.evaluator import Evaluator
from ...skyreels.transformer.model import RunBlock, SkyReelsTransformer
from ...skyreels.weights.lora.apply import AppliedLora
from ...skyreels.weights.lora.names import parameter_shapes
from .core_patches import core_names, loras_of
from .runtime import ComfyRuntime, LoadedModel, without_inference_mode

logger = logging.getLogger("skyreels.nodes.host.core_model")

#: SkyReels is not distilled for the embedded guidance; core's own default is 6
EMBEDDED_GUIDANCE = 1.0
#: how core names our blocks where nodes replace them
_BLOCK_KINDS = ("double_block", "single_block")
_KEY = "skyreels"


@dataclass(frozen=True)
class _Seen:
    """A prompt as core gave it, and as the engine takes it."""

    given: tuple[Tensor | None, ...]
    embeds: PromptEmbeds

    def is_of(self, given: tuple[Tensor | None, ...]) -> bool:
        return all(map(_is_equal, self.given, given))


def _is_equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


class _Bridge(nn.Module):
    """What core calls as its diffusion model; it has no weights of its own.

    Args:
        model: the transformer and its patcher.
    """

    def __init__(self, model: LoadedModel) -> None:
        super().__init__()
        self.source = model  # no Module, so that core does not see its weights as this one's
        self.dtype = model.module.compute_dtype
        config = model.module.config
        # nodes of others look it up
        self.patch_size = [config.patch_size_t, config.patch_size, config.patch_size]
        self._evaluator: Evaluator | None = None
        self._seen: list[_Seen] = []
        self._is_in_run = False
        self._loras: tuple[AppliedLora, ...] = ()

    def begin(self, loras: tuple[AppliedLora, ...]) -> None:
        """Keep the evaluator open from the next prediction on.

        Args:
            loras: that core's nodes put on the model, beside those it had before.
        """
        self._is_in_run, self._loras = True, loras

    def end(self) -> None:
        """Give the device back."""
        self._is_in_run, self._loras = False, ()
        self._seen.clear()
        if self._evaluator is not None:
            self._evaluator.close()
            self._evaluator = None

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        y: Tensor | None = None,
        guidance: Tensor | None = None,
        attention_mask: Tensor | None = None,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
        **others: Any,
    ) -> Tensor:
        """[B, C, T, h, w] and [B] timesteps -> [B, 16, T, h, w]; arguments as core's own model."""
        import comfy.patcher_extension as extension

        options = transformer_options or {}
        kind = extension.WrappersMP.DIFFUSION_MODEL
        executor = extension.WrapperExecutor.new_class_executor(
            self._forward, self, extension.get_all_wrappers(kind, options)
        )
        unused = [
            name for name, value in {"control": control, **others}.items() if value is not None
        ]
        _name_unused(options, unused)
        result: Tensor = executor.execute(
            x, timestep, context, y, guidance, attention_mask, options
        )
        return result

    def _forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        y: Tensor | None,
        guidance: Tensor | None,
        attention_mask: Tensor | None,
        options: dict[str, Any],
    ) -> Tensor:
        try:
            evaluator = self._open(options, timestep, x.device)
            scales = [EMBEDDED_GUIDANCE] if guidance is None else guidance.flatten().tolist()
            wrap = functools.partial(_replaced, self.source.module, options)
            velocities = [
                evaluator.predict(
                    x[item : item + 1],
                    float(timestep[item]),
                    self._prompt(context, y, attention_mask, item),
                    guidance_scale=scales[min(item, len(scales) - 1)],
                    wrap=wrap,
                )
                for item in range(x.shape[0])
            ]
        finally:
            if not self._is_in_run:
                self.end()
        return torch.cat(velocities).to(x.device)

    def _open(
        self, options: Mapping[str, Any], timestep: Tensor, device: torch.device
    ) -> Evaluator:
        if self._evaluator is None:
            if self.source.patcher.load_device != device:
                self.source = _on_device(self.source, device)
            sigmas = options.get("sample_sigmas")
            if sigmas is None:  # somebody asks for one prediction
                sigmas = torch.stack([timestep.flatten()[0].float().cpu() / 1000, torch.zeros(())])
            runtime = ComfyRuntime(None, self.source, device=device)
            self._evaluator = Evaluator(
                self.source.module,
                sigmas,
                runtime=runtime,
                loras=(*self.source.loras, *self._loras),
            )
        return self._evaluator

    def _prompt(
        self, context: Tensor, y: Tensor | None, mask: Tensor | None, item: int
    ) -> PromptEmbeds:
        """The prompt of an item of a batch, trimmed to its tokens; the same object each time."""
        given = tuple(
            None if tensor is None else tensor[min(item, len(tensor) - 1)][None]
            for tensor in (context, y, mask)
        )
        for seen in self._seen:
            if seen.is_of(given):
                return seen.embeds
        states, pooled, mask = given
        assert states is not None
        if pooled is None:
            raise TextError(
                "The conditioning has no pooled CLIP state: use DualCLIPLoader (clip_l + "
                "llava_llama3, type hunyuan_video) with CLIPTextEncode, or SkyReels Text Encode."
            )
        if mask is not None:
            states = states[:, mask.reshape(-1)[: states.shape[1]].bool()]
        embeds = trim(PromptEmbeds(states.float().cpu(), pooled.float().cpu()))
        check_prompt_embeds(embeds, self.source.module.config)
        self._seen.append(_Seen(given, embeds))
        return embeds


def _name_unused(options: Mapping[str, Any], arguments: list[str]) -> None:
    """Name once what a node asks for and this model cannot do."""
    patches = [name for name, functions in options.get("patches", {}).items() if functions]
    replaced = options.get("patches_replace", {})
    patches += [name for name, functions in replaced.items() if functions and name != "dit"]
    patches += [str(key) for key in replaced.get("dit", {}) if key[0] not in _BLOCK_KINDS]
    if names := sorted(patches + arguments):
        log_once(
            f"SkyReels as a core MODEL does not use {', '.join(names)}: prompts of different "
            "lengths are evaluated one after the other, by kernels that nothing can be hooked "
            "into. Remove the node that sets it, or use core's own model.",
            source=logger,
        )


def _replaced(
    transformer: SkyReelsTransformer, options: Mapping[str, Any], run_block: RunBlock
) -> RunBlock:
    """run_block with the blocks that nodes replace or skip, as core's own model has them."""
    functions = options.get("patches_replace", {}).get("dit", {})
    if not functions:
        return run_block
    lists = zip(_BLOCK_KINDS, (transformer.double_blocks, transformer.single_blocks), strict=True)
    keys = {id(block): (kind, n) for kind, blocks in lists for n, block in enumerate(blocks)}

    def run(module: nn.Module, *args: Any) -> Any:
        key = keys.get(id(module))
        if key is None or key not in functions:
            return run_block(module, *args)
        names = ("img", "txt") if key[0] == "double_block" else ("img",)
        rest = args[len(names) :]

        def original(given: Mapping[str, Any]) -> dict[str, Any]:
            result = run_block(module, *(given[name] for name in names), *rest)
            return dict(zip(names, result if len(names) > 1 else [result], strict=True))

        given = dict(zip(names, args, strict=False))
        given |= {"vec": rest[0], "pe": rest[1], "transformer_options": options}
        result = functions[key](given, {"original_block": original})
        return tuple(result[name] for name in names) if len(names) > 1 else result["img"]

    return run


def _picture_for(noise: Tensor, given: Tensor | None, own: Tensor | None) -> Tensor:
    """Choose the latents of the picture.

    Args:
        noise: of the run, [B, 16, T, h, w].
        given: by the conditioning.
        own: those that the model was made with.

    Returns:
        Those of the conditioning, else the model's.

    Raises:
        ShapeError: there are none, or they are for another size.
    """
    if given is not None:
        return given
    if own is None:
        raise ShapeError(
            "No picture: connect SkyReels Image Conditioning to `image` of SkyReels Core Model (or "
            "use core's InstructPixToPixConditioning on both prompts)."
        )
    if own.shape[2:] != noise.shape[2:]:
        raise ShapeError(
            f"The picture is for latents of {list(own.shape)}, and the latent is "
            f"{list(noise.shape)}: give SkyReels Image Conditioning and the empty latent the same "
            "width, height and frames."
        )
    return own


# --- core's classes -----------------------------------------------------------------------------


@functools.cache
def _classes() -> tuple[type[Any], type[Any]]:
    """The model and the patcher, made when ComfyUI can be imported."""
    import comfy.model_base
    import comfy.model_patcher

    class SkyReelsModel(comfy.model_base.HunyuanVideo):  # type: ignore[misc]
        """Core's side of the model: latent space, schedule and conditioning."""

        def __init__(self, model_config: Any, bridge: _Bridge, image: Tensor | None) -> None:
            super().__init__(model_config)
            self.diffusion_model = bridge
            #: [1, 16, T, h, w] in VAE space, where the conditioning has no picture
            self.image = image
            self.takes_image = bridge.source.module.config.takes_image
            self.concat_keys = ("concat_image",) if self.takes_image else ()

        def concat_cond(self, **kwargs: Any) -> Tensor | None:
            """The latents of the picture, as core lays them out."""
            given = kwargs.get("concat_latent_image")
            if self.takes_image:
                given = _picture_for(kwargs["noise"], given, self.image)
            else:
                check_picture(self.diffusion_model.source.module.config, given is not None)
            kwargs["concat_latent_image"] = given
            conditioning: Tensor | None = super().concat_cond(**kwargs)
            return conditioning

        def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
            """As core, with the embedded guidance that SkyReels was trained for."""
            if kwargs.get("guidance") is None:
                kwargs["guidance"] = EMBEDDED_GUIDANCE
            conditions: dict[str, Any] = super().extra_conds(**kwargs)
            return conditions

        def memory_required(self, *args: Any, **kwargs: Any) -> int:
            """None beyond what the engine asks for itself when a run begins."""
            return 0

        def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
            """Names and shapes in core's layout, by which LoRA files find their weights."""
            config = self.diffusion_model.source.module.config
            shapes = parameter_shapes(config)
            return {
                key: torch.empty(shapes[name], device="meta")
                for key, name in core_names(config).items()
            }

    class SkyReelsPatcher(comfy.model_patcher.ModelPatcher):  # type: ignore[misc]
        """A patcher of a model whose weights the engine loads."""

        def model_size(self) -> int:
            """Bytes that core has to load: none."""
            return 0

        def get_key_patches(self, filter_prefix: str | None = None) -> Any:
            """What nodes ask that merge or save models.

            Raises:
                CheckpointError: always.
            """
            raise CheckpointError(
                "Core's nodes cannot merge or save a SkyReels model, because the engine holds its "
                "weights: load the file with core's Load Diffusion Model for that."
            )

    return SkyReelsModel, SkyReelsPatcher


def core_model(model: LoadedModel, image: ImageConditioning | None) -> Any:
    """A MODEL for core's samplers and guiders.

    Args:
        model: of SkyReels Load Transformer.
        image: the start of the clip, for conditioning that has no picture.

    Returns:
        A ModelPatcher.

    Raises:
        OptionError: a picture for a text-to-video model.
    """
    if image is None or image.image_latents is None:
        return _patcher(model, None)
    check_picture(model.module.config, True)
    ends = image.end_latents
    count = len(image.image_latents)
    clips = [
        replace(
            image,
            image_latents=image.image_latents[index : index + 1],
            end_latents=ends if ends is None else ends[min(index, len(ends) - 1)][None],
        ).padded()
        for index in range(count)
    ]
    return _patcher(model, to_vae_space(torch.cat([clip for clip in clips if clip is not None])))


def _patcher(model: LoadedModel, image: Tensor | None) -> Any:
    import comfy.patcher_extension
    import comfy.supported_models

    model_class, patcher_class = _classes()
    config = comfy.supported_models.HunyuanVideo(
        {
            "image_model": "hunyuan_video",
            "in_channels": model.module.config.in_channels,
            "disable_unet_model_creation": True,
        }
    )
    patcher = patcher_class(
        model_class(config, _Bridge(model), image),
        load_device=model.patcher.load_device,
        offload_device=model.patcher.offload_device,
    )
    outer_sample = comfy.patcher_extension.WrappersMP.OUTER_SAMPLE
    patcher.add_wrapper_with_key(outer_sample, _KEY, _around_sampling)
    patcher.cached_patcher_init = _copy, (model, image)  # how core copies it for another device
    return patcher


def _copy(model: LoadedModel, image: Tensor | None, **_: Any) -> Any:
    """A MODEL with weights of its own, in main memory."""
    import comfy.model_management as mm

    mm.unload_model_and_clones(model.patcher)
    with without_inference_mode():
        module = copy.deepcopy(model.module)
    return _patcher(_on_device(replace(model, module=module), model.patcher.load_device), image)


def _on_device(model: LoadedModel, device: torch.device) -> LoadedModel:
    """The model as core's memory manager moves it to a device."""
    from comfy.model_patcher import ModelPatcher

    patcher = ModelPatcher(
        model.module, load_device=device, offload_device=model.patcher.offload_device
    )
    return replace(model, patcher=patcher)


def _around_sampling(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """Core's sampling with the weights kept in place from its first prediction to its end."""
    patcher = executor.class_obj.model_patcher
    patchers = [patcher, *patcher.get_additional_models_with_key("multigpu")]
    bridges = [each.model.diffusion_model for each in patchers]
    if patcher.hook_patches:
        log_once(
            "LoRAs of hooks (Create Hook LoRA) are not applied to a SkyReels model, whose weights "
            "do not change within a run: use SkyReels Load LoRA, or Load LoRA (Model).",
            source=logger,
        )
    loras = loras_of(patcher.patches, patcher.model.diffusion_model.source.module.config)
    for bridge in bridges:
        bridge.begin(loras)
    try:
        return executor(*args, **kwargs)
    finally:
        for bridge in bridges:
            bridge.end()
