# ruff: noqa: E402 - ComfyUI chooses its device when it is imported
"""Run inside ComfyUI's own environment: our nodes beside core's, on the same weights.

    python comfy_inside.py CHECKOUT PACK FOLDER

The last line of the output is one JSON object.
"""

import importlib
import inspect
import json
import logging
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

checkout, pack, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
sys.argv = sys.argv[:1]
sys.path.insert(0, checkout)

import comfy.cli_args

comfy.cli_args.args.cpu = True

import comfy.context_windows
import comfy.latent_formats
import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.sd1_clip
import comfy_extras.nodes_context_windows
import comfy_extras.nodes_model_advanced
import comfy_extras.nodes_model_merging
import folder_paths
import torch

import nodes

sys.path.append(str(pack / "tests"))  # behind ComfyUI's own `tests`

import comfyui_skyreels
from comfyui_skyreels.skyreels.conditioning.latents import to_model_space
from comfyui_skyreels.skyreels.config import ContextWindows, TransformerConfig, VAEConfig
from comfyui_skyreels.skyreels.runtime import TorchRuntime
from comfyui_skyreels.skyreels.sampling.settings import get_sigmas
from comfyui_skyreels.skyreels.text.encode import _weighted_states
from comfyui_skyreels.skyreels.text.prompt_weights import parse_weights, weighted_ids
from comfyui_skyreels.skyreels.vae.model import VideoVAE
from comfyui_skyreels.skyreels.weights.keymaps import vae_sources

from support import lora, tiny
from support.host import made_up_conditioning

NODES = comfyui_skyreels.NODE_CLASS_MAPPINGS
# ComfyUI fixes the rotary axes to 16, 56, 56 and two refiner blocks
CONFIG = TransformerConfig(num_attention_heads=1, num_layers=1, num_single_layers=1)
SIZE = {"width": 64, "height": 48, "num_frames": 9}
STEPS = 4


def node(class_type, **inputs):
    cls = NODES[class_type]
    with torch.inference_mode():
        return getattr(cls(), cls.FUNCTION)(**inputs)[0]


def relative_error(got, expected):
    return ((got - expected).abs().max() / expected.abs().max()).item()


# --- weights ------------------------------------------------------------------------------------

folder_paths.folder_names_and_paths["diffusion_models"] = ([str(folder)], {".safetensors"})
folder_paths.folder_names_and_paths["vae"] = ([str(folder)], {".safetensors"})
tiny.save(folder / "transformer.safetensors", tiny.transformer(CONFIG).state_dict())
wide = VideoVAE(VAEConfig())  # core's is of one size
for parameter in wide.parameters():
    parameter.requires_grad_(False)
state = {vae_sources(k, "sd", 4)[0]: v for k, v in tiny.randomize(wide).state_dict().items()}
for key, value in state.items():
    if "attn_1" in key and key.endswith(("q.weight", "k.weight", "v.weight", "proj_out.weight")):
        state[key] = value[:, :, None, None, None]
tiny.save(folder / "vae.safetensors", state)

# --- samplers -----------------------------------------------------------------------------------

model = node("SkyReelsTransformerLoader", transformer="transformer.safetensors", precision="auto")
our_vae = node("SkyReelsVAELoader", vae="vae.safetensors", precision="fp32")
picture = torch.rand(1, 48, 64, 3, generator=torch.Generator().manual_seed(1))
image = node("SkyReelsImageConditioning", vae=our_vae, image=picture, fit="crop", **SIZE)
positive, negative = (made_up_conditioning(t, 4096, 768) for t in ("a cat walks", ""))
sigmas = get_sigmas(STEPS)
ours = {
    "model": model, "positive": positive, "negative": negative, "image": image, "seed": 3,
    "steps": STEPS, "cfg": 6.0, "embedded_guidance": 1.0, "shift": 7.0, "sigmas": sigmas,
}  # fmt: skip
reference = node("SkyReelsSampler", **ours)["samples"]

# core's own path: UNETLoader, FluxGuidance 1, InstructPixToPixConditioning, a custom sampler
core_model = comfy.sd.load_diffusion_model(
    str(folder / "transformer.safetensors"), model_options={"dtype": torch.float32}
)
concat = image.image_latents / comfy.latent_formats.HunyuanVideo().scale_factor
extra = {"guidance": 1.0, "concat_latent_image": concat}


def core_samples(sampler, sigmas, *, start=None, add_noise=True, model=core_model, extra=extra,
                 conds=None, indices=None, mask=None):  # fmt: skip
    start = torch.zeros(image.latent_shape) if start is None else start
    noise = comfy.sample.prepare_noise(start, 3, indices)
    with torch.inference_mode():
        return comfy.sample.sample_custom(
            model,
            noise if add_noise else torch.zeros_like(noise),
            6.0,
            sampler,
            sigmas.clone(),
            *([[states, {**own, **extra}] for states, own in side]
              for side in conds or (positive, negative)),
            start,
            noise_mask=mask,
            seed=3,
        )  # fmt: skip


euler = comfy.samplers.sampler_object("euler")
result = {"samplers": {}, "sampler_relative_error": relative_error(
    reference, core_samples(euler, sigmas))}  # fmt: skip
for sampler_name in comfy.samplers.SAMPLER_NAMES:
    sampler = comfy.samplers.sampler_object(sampler_name)
    samples = node("SkyReelsSampler", **ours, sampler=sampler)["samples"]
    error = relative_error(samples, core_samples(sampler, sigmas))
    result["samplers"][sampler_name] = error
    if sampler_name == "euler":
        result["euler_relative_error"] = relative_error(samples, reference)

# a schedule in two parts, and a clip to start from
high, low = sigmas[:3], sigmas[2:]
part = node("SkyReelsSampler", **{**ours, "sigmas": high})
core_part = core_samples(euler, high)
result["unfinished_relative_error"] = relative_error(part["samples"], core_part)
rest = node("SkyReelsSampler", **{**ours, "sigmas": low}, latent=part, add_noise=False)
core_rest = core_samples(euler, low, start=core_part, add_noise=False)
result["continued_relative_error"] = relative_error(rest["samples"], core_rest)
again = node("SkyReelsSampler", **{**ours, "sigmas": low}, latent={"samples": reference})
core_again = core_samples(euler, low, start=reference)
result["video_to_video_relative_error"] = relative_error(again["samples"], core_again)

# --- our model in core's samplers ---------------------------------------------------------------

bridged = node("SkyReelsCoreModel", model=model, image=image)


def bridge_error(change=lambda model: model, sampler=euler, **options):
    """Relative difference of what a core sampler makes of our model and of core's."""
    got = core_samples(sampler, sigmas, model=change(bridged), **{"extra": {}, **options})
    return relative_error(got, core_samples(sampler, sigmas, model=change(core_model)))


def execute(name, **inputs):
    """A change of a model by a node of comfy_extras, whose default values are those of the node."""
    module, class_name = name.split(".")
    cls = getattr(importlib.import_module(f"comfy_extras.nodes_{module}"), class_name)
    defaults = {i.id: i.default for i in cls.define_schema().inputs if hasattr(i, "default")}
    wanted = inspect.signature(cls.execute).parameters
    inputs = {k: v for k, v in {**defaults, **inputs}.items() if k in wanted}
    return lambda model: cls.execute(**{**inputs, "model": model})[0]


def shifted(model):
    return comfy_extras.nodes_model_advanced.ModelSamplingSD3().patch(model, 3.0)[0]


def ksampler(model):
    inputs = {
        "seed": 3, "steps": 3, "cfg": 6.0, "sampler_name": "euler", "scheduler": "simple",
        "denoise": 1.0, "latent_image": {"samples": torch.zeros(image.latent_shape)},
    }  # fmt: skip
    if model.model is core_model.model:
        made = [[[c[0][0], {**c[0][1], **extra}]] for c in (positive, negative)]
    else:
        made = [positive, negative]
    conditioning = dict(zip(("positive", "negative"), made, strict=True))
    with torch.inference_mode():
        return nodes.KSampler().sample(model, **inputs, **conditioning)[0]["samples"]


skip_layers = {"scale": 3.0, "start_percent": 0.0, "end_percent": 1.0}
result["bridge"] = {
    **{name: bridge_error(sampler=comfy.samplers.sampler_object(name))
       for name in ("euler", "dpmpp_2m", "heun", "euler_ancestral")},
    "picture in the conditioning": bridge_error(extra=extra),
    "KSampler": relative_error(ksampler(bridged), ksampler(core_model)),
    "another shift": relative_error(ksampler(shifted(bridged)), ksampler(shifted(core_model))),
    "double block skipped": bridge_error(execute(
        "slg.SkipLayerGuidanceDiT", double_layers="0", single_layers="", **skip_layers)),
    "single block skipped": bridge_error(execute(
        "slg.SkipLayerGuidanceDiT", double_layers="", single_layers="0", **skip_layers)),
    "EasyCache": bridge_error(execute("easycache.EasyCacheNode", reuse_threshold=0.5,
                                      start_percent=0.0, end_percent=1.0)),
}  # fmt: skip

windows = comfy_extras.nodes_context_windows.ContextWindowsManualNode
if "cond_retain_index_list" in inspect.signature(windows.execute).parameters:
    # before, core cut the latents into windows and left the picture whole
    change = execute("context_windows.ContextWindowsManualNode", context_length=2,
                     context_overlap=1, dim=2, context_schedule="standard_static")  # fmt: skip
    result["bridge"]["context windows"] = bridge_error(change)

# ours in our sampler, core's in core's; cut into windows there since the same version
result["windows"] = {}
if "cond_retain_index_list" in inspect.signature(windows.execute).parameters:
    long_image = replace(image, num_frames=25)
    empty = torch.zeros(long_image.latent_shape)
    for schedule, blend in (("static", "pyramid"), ("static", "relative"), ("static", "flat"),
                            ("uniform", "pyramid")):  # fmt: skip
        change = execute("context_windows.ContextWindowsManualNode", context_length=3,
                         context_overlap=1, dim=2, context_schedule=f"standard_{schedule}",
                         fuse_method=blend, cond_retain_index_list="0",
                         causal_window_fix=False)  # fmt: skip
        own = node("SkyReelsContextWindows", window_frames=9, overlap_frames=4, schedule=schedule,
                   blend=blend)  # fmt: skip
        made = node("SkyReelsSampler", **{**ours, "image": long_image}, windows=own)["samples"]
        core_made = core_samples(euler, sigmas, model=change(core_model), start=empty)
        result["windows"][f"{schedule}, {blend}"] = relative_error(made, core_made)
result["windows_that_differ"] = []
for length, overlap, frames in ((2, 0, 9), (3, 1, 7), (4, 2, 10), (5, 4, 6), (7, 3, 30),
                                (25, 6, 73)):  # fmt: skip
    handler = SimpleNamespace(context_length=length, context_overlap=overlap, context_stride=1,
                              closed_loop=False)  # fmt: skip
    for schedule in ("static", "uniform"):
        make = getattr(comfy.context_windows, f"create_windows_{schedule}_standard")
        for handler._step in range(31):
            core = {tuple(window) for window in make(frames, handler, {})}
            starts = ContextWindows(length, overlap, schedule).starts(frames, handler._step)
            if core != {tuple(range(start, start + length)) for start in starts}:
                result["windows_that_differ"].append([length, overlap, frames, handler._step])

# a LoRA that core's own loader puts on the model, in a dialect that core reads, also on 8 bits
changes = {}
for name, up, down in lora.whole_modules(lora.draw_parts(CONFIG)):
    if name.startswith(("double_blocks", "single_blocks")):
        changes[f"transformer.{name}.lora_A.weight"] = down
        changes[f"transformer.{name}.lora_B.weight"] = up
tiny.save(folder / "lora.safetensors", changes)
folder_paths.folder_names_and_paths["loras"] = ([str(folder)], {".safetensors"})


def with_lora(strength):
    loader = nodes.LoraLoaderModelOnly()
    return lambda model: loader.load_lora_model_only(model, "lora.safetensors", strength)[0]


result["bridge"]["LoraLoaderModelOnly"] = bridge_error(with_lora(0.7))
result["bridge"]["two LoRAs"] = bridge_error(lambda model: with_lora(-0.2)(with_lora(0.7)(model)))
plain = core_samples(euler, sigmas, model=bridged, extra={})
changed = core_samples(euler, sigmas, model=with_lora(0.7)(bridged), extra={})
again = core_samples(euler, sigmas, model=bridged, extra={})
result["bridge_lora"] = {
    "effect": relative_error(changed, plain),
    "is_undone": torch.equal(again, plain),
}
ours_with_lora = node("SkyReelsLoraLoader", model=model, lora="lora.safetensors", strength=0.7)
behind = node("SkyReelsCoreModel", model=ours_with_lora, image=image)
samples = core_samples(euler, sigmas, model=with_lora(-0.2)(behind), extra={})
result["bridge"]["SkyReels Load LoRA and core's"] = relative_error(
    samples, core_samples(euler, sigmas, model=with_lora(-0.2)(with_lora(0.7)(core_model)))
)


def refusal(action):
    try:
        action()
    except Exception as error:  # noqa: BLE001 - any is reported
        return f"{type(error).__name__}: {error}"
    return ""


without = node("SkyReelsCoreModel", model=model)
result["bridge_refusals"] = {
    "no picture": refusal(lambda: core_samples(euler, sigmas, model=without, extra={})),
    "merged": refusal(
        lambda: comfy_extras.nodes_model_merging.ModelMergeSimple().merge(bridged, bridged, 0.5)
    ),
}

messages = []
watch = logging.Handler()
watch.emit = lambda record: messages.append(record.getMessage())
logging.getLogger("skyreels").addHandler(watch)
hooked = bridged.clone()
hooked.set_model_attn1_output_patch(lambda out, options: out)
core_samples(euler, sigmas, model=hooked, extra={})
result["bridge_unused"] = " ".join(messages)

# the weights are seen once, and are idle afterwards
listed = [each.model for each in comfy.model_management.current_loaded_models]
result["bridge_listed"] = sum(each is model.patcher for each in listed)
result["bridge_bytes"] = bridged.model_size()
result["bridge_is_idle"] = bridged.model.diffusion_model._evaluator is None
if hasattr(bridged, "deepclone_multigpu"):
    copied = bridged.deepclone_multigpu(torch.device("cpu"))
    samples = core_samples(euler, sigmas, model=copied, extra={})
    result["bridge"]["a copy for another device"] = relative_error(
        samples, core_samples(euler, sigmas)
    )
    theirs = copied.model.diffusion_model.source.module
    result["bridge_shares_weights"] = bool(
        {p.data_ptr() for p in theirs.parameters()}
        & {p.data_ptr() for p in model.module.parameters()}
    )

# text to video: an empty latent gives the size, and core's model is plain HunyuanVideo
text_only = tiny.transformer(replace(CONFIG, in_channels=16))
tiny.save(folder / "t2v.safetensors", text_only.state_dict())
text_model = node("SkyReelsTransformerLoader", transformer="t2v.safetensors", precision="auto")
core_text_model = comfy.sd.load_diffusion_model(
    str(folder / "t2v.safetensors"), model_options={"dtype": torch.float32}
)
empty = {"samples": torch.zeros(image.latent_shape)}
made = node("SkyReelsSampler", **{**ours, "model": text_model, "image": None}, latent=empty)
core_made = core_samples(euler, sigmas, model=core_text_model, extra={"guidance": 1.0})
result["t2v_relative_error"] = relative_error(made["samples"], core_made)
text_bridge = node("SkyReelsCoreModel", model=text_model)
samples = core_samples(euler, sigmas, model=text_bridge, extra={})
result["bridge"]["text to video"] = relative_error(samples, core_made)
result["bridge_refusals"]["picture for text"] = refusal(
    lambda: node("SkyReelsCoreModel", model=text_model, image=image)
)
pictures = replace(image, image_latents=torch.cat([image.image_latents, image.image_latents + 1]))
of_two = node("SkyReelsCoreModel", model=model, image=pictures).model.image
result["bridge_pictures"] = [list(of_two.shape), of_two[0].equal(bridged.model.image[0])]

# --- several entries, batches, masks, schedules -------------------------------------------------


def entry(text, **options):
    ((states, own),) = made_up_conditioning(text, 4096, 768)
    return [states, {**own, **options}]


# of one length, so that core evaluates both at once
conds = [entry("a cat walks", guidance=4.0)], [entry("a dog sleeps", guidance=1.0)]
made, expected = (
    core_samples(euler, sigmas, model=each, conds=conds, extra={"concat_latent_image": concat})
    for each in (bridged, core_model)
)
result["bridge"]["guidance of each prompt"] = relative_error(made, expected)


def ranged(start, end, **options):
    return {"start_percent": start, "end_percent": end, **options}


cat, dog, bad = "a cat walks", "two dogs run fast", "bad"
CONDS = {
    "ranges": ([entry(cat, **ranged(0.0, 0.4)), entry(dog, **ranged(0.4, 1.0))], [entry(bad)]),
    "overlapping ranges": (
        [entry(cat, **ranged(0.0, 0.7)), entry(dog, **ranged(0.3, 1.0))],
        [entry(bad, **ranged(0.0, 0.5)), entry("", **ranged(0.2, 1.0))],
    ),
    "strengths": ([entry(cat, strength=0.3), entry(dog, strength=1.7)], [entry(bad)]),
    "three entries": ([entry(cat), entry(dog), entry("rain", strength=0.5)], [entry(bad)]),
    "two of each": ([entry(cat), entry(dog)], [entry(bad), entry("", strength=0.25)]),
    "one weak entry": ([entry(cat, strength=0.3)], [entry(bad)]),
    "no strength": ([entry(cat, strength=0.0), entry(dog)], [entry(bad)]),
    "a gap": ([entry(cat)], [entry(bad, **ranged(0.0, 0.5))]),
    "a gap in both": ([entry(cat, **ranged(0.2, 1.0))], [entry(bad, **ranged(0.2, 1.0))]),
    "default": ([entry(cat, strength=0.6), entry(dog, default=True)], [entry(bad)]),
    "default in a range": (
        [entry(cat, **ranged(0.0, 0.5)), entry(dog, default=True)], [entry(bad)],
    ),
    "range of hooks": ([entry(cat, clip_start_percent=0.1, clip_end_percent=0.6),
                        entry(dog, clip_start_percent=0.6, clip_end_percent=1.0)], [entry(bad)]),
}  # fmt: skip
long = get_sigmas(6)
result["entries"] = {}
for name, conds in CONDS.items():
    core = core_samples(euler, long, conds=conds)
    samples = node("SkyReelsSampler", **{**ours, "positive": conds[0], "negative": conds[1],
                                         "sigmas": long})["samples"]  # fmt: skip
    result["entries"][name] = relative_error(samples, core)

generator = torch.Generator().manual_seed(5)
batch = torch.randn(3, *image.latent_shape[1:], generator=generator)
mask = torch.rand(9, 48, 64, generator=generator)
LATENTS = {
    "batch": {"samples": batch},
    "batch index": {"samples": batch, "batch_index": [2, 0, 2]},
    "mask": {"samples": batch[:1], "noise_mask": mask},
    "mask of one frame": {"samples": batch[:1], "noise_mask": (mask[:1] > 0.5).float()},
    "mask of a batch": {"samples": batch, "noise_mask": mask[None, None]},
}
result["latents"] = {}
for name, latent in LATENTS.items():
    options = {"start": latent["samples"], "indices": latent.get("batch_index"),
               "mask": latent.get("noise_mask")}  # fmt: skip
    core = core_samples(euler, low, **options)
    samples = node("SkyReelsSampler", **{**ours, "sigmas": low}, latent=latent)["samples"]
    result["latents"][name] = relative_error(samples, core)
masked = LATENTS["mask"]
for sampler_name in ("dpmpp_2m", "euler_cfg_pp"):
    sampler = comfy.samplers.sampler_object(sampler_name)
    core = core_samples(sampler, low, start=batch[:1], mask=mask)
    samples = node("SkyReelsSampler", **{**ours, "sigmas": low}, latent=masked, sampler=sampler)
    result["latents"][f"mask, {sampler_name}"] = relative_error(samples["samples"], core)

result["schedules"] = {}
flow = type("Flow", (comfy.model_sampling.ModelSamplingDiscreteFlow,), {})()
for name in NODES["SkyReelsScheduler"].INPUT_TYPES()["optional"]["scheduler"][0][1:]:
    worst = 0.0
    for shift in (1.0, 7.0, 17.0):
        flow.set_parameters(shift=shift)
        for steps, denoise in ((1, 1.0), (7, 1.0), (30, 1.0), (20, 0.45), (400, 0.6)):
            total = int(steps / denoise)
            core = comfy.samplers.calculate_sigmas(flow, name, total)[-(steps + 1) :]
            made = node("SkyReelsScheduler", steps=steps, shift=shift, denoise=denoise,
                        scheduler=name)  # fmt: skip
            same = made.shape == core.shape
            worst = max(worst, (made - core).abs().max().item() if same else float("inf"))
    result["schedules"][name] = worst

# --- weights in a prompt ------------------------------------------------------------------------

TEXTS = (
    "", "a cat", "a (cat:1.2) walks", "((cat)) and (dog:0.5)", "a (b (c:2) d) e", r"\(cat\) (dog)",
    "(a:b) (c:) (:2) () (x", "a) (b (c) d", "x:1.2 (y:1_0) (z: 1.5 )", r"(a \(b\):1.3), c\)",
    "(a:1.0)",
)  # fmt: skip
result["parsed"] = sum(
    [
        (comfy.sd1_clip.unescape_important(run), weight)
        for run, weight in comfy.sd1_clip.token_weights(comfy.sd1_clip.escape_important(text), 1.0)
    ]
    != (parse_weights(text) if text else [])
    for text in TEXTS
)


class Letters:
    """A tokenizer whose tokens are letters."""

    pad_token_id = 2

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [1] * add_special_tokens + [ord(c) % 90 + 3 for c in text]}


def core_llama(sizes):
    from comfy.text_encoders.hunyuan_video import LLAMAModel

    options = {"llama_model_config": sizes, "vocab_size": 100}
    model = LLAMAModel(dtype=torch.float32, model_options=options, attention_mask=True,
                       special_tokens={"start": 1, "pad": 2})  # fmt: skip
    return tiny.randomize(model)


def our_states(core, sizes, text):
    from transformers import LlamaConfig, LlamaModel

    names = {"head_dim": 128}  # core's
    ours = LlamaModel(LlamaConfig(vocab_size=100, rope_theta=500000.0, rms_norm_eps=1e-5,
                                  **{**sizes, **names, "num_hidden_layers": 2}))  # fmt: skip
    state = {k.removeprefix("model."): v for k, v in core.transformer.state_dict().items()}
    ours.load_state_dict({k: state[k] for k in ours.state_dict()})
    ours.norm = torch.nn.Identity()
    encoder = SimpleNamespace(llm=ours.eval(), llm_tokenizer=Letters(), crop_start=0, template="{}")
    return _weighted_states(encoder, text, TorchRuntime())


sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
core = core_llama(sizes)
result["weighted"] = {}
for text in ("a (cat:1.2) walks", "((cat)) and (dog:0.5)", "(cat:0) x"):
    pairs = [list(zip(*weighted_ids(Letters(), text), strict=True))]
    with torch.inference_mode():
        expected = core.encode_token_weights(pairs)[0]
        result["weighted"][text] = relative_error(our_states(core, sizes, text), expected)

# --- VAE ----------------------------------------------------------------------------------------

core_vae = comfy.sd.VAE(sd=dict(state), dtype=torch.float32)
with torch.inference_mode():
    encoded = core_vae.encode(picture)
    # one latent frame: core's decoder and encoder leave the causal mask out, which shows from two
    decoded = core_vae.decode(reference[:, :, :1])
    still = node("SkyReelsVAEDecode", vae=our_vae, samples={"samples": reference[:, :, :1]},
                 mode="full")  # fmt: skip
result["encode_relative_error"] = relative_error(image.image_latents, to_model_space(encoded))
result["decode_relative_error"] = relative_error(still, decoded[0])
result["latent_format_scale"] = comfy.latent_formats.HunyuanVideo().scale_factor
print(json.dumps(result))  # noqa: T201
