"""Where each of our tensors is found in the common checkpoint layouts.

Our transformer uses the names of Tencent's original checkpoint, whose projections are already
fused; our VAE uses the diffusers names, which are Tencent's own too. So the maps run from *our*
name to the name or names in the file: several names are concatenated along dim 0 while loading.

    transformer   "original"   856 tensors at full size, identity
                  "comfyui"    856, files saved by ComfyUI; the q and k norms are a "scale" up to
                               0.3.64 and a "weight" in 0.33, see `common_spelling`
                  "diffusers"  1264, separate q, k, v and mlp projections
    VAE           "diffusers"  248 tensors at full size, identity
                  "sd"         248, CompVis names with 1x1x1 convolutions as attention projections

Sources: the original names from Tencent/HunyuanVideo; the renames from diffusers'
scripts/convert_hunyuan_video_to_diffusers.py and ComfyUI's comfy/ldm/hunyuan_video/model.py,
checked name by name and number by number.
"""

import re
from collections.abc import Collection, Mapping

from .dialects import lora_dialect

#: one of these is stripped: the one in front of the family's marker tensors
PREFIXES = (
    "",
    "model.diffusion_model.",
    "model.model.",
    "diffusion_model.",
    "model.",
    "transformer.",
    "module.",
    "vae.",
    "first_stage_model.",
    "language_model.model.",
    "language_model.",
    "model.language_model.",
    "clip_l.transformer.",
    "llama.transformer.model.",
    "text_encoders.clip_l.transformer.",
    "text_encoders.llama.transformer.model.",
)

#: (family, layout) -> unprefixed names that must all be present; the first match wins
MARKERS: dict[tuple[str, str], tuple[str, ...]] = {
    ("transformer", "original"): ("img_in.proj.weight", "double_blocks.0.img_attn_qkv.weight"),
    ("transformer", "comfyui"): ("img_in.proj.weight", "double_blocks.0.img_attn.qkv.weight"),
    ("transformer", "diffusers"): (
        "x_embedder.proj.weight",
        "transformer_blocks.0.attn.to_q.weight",
        "context_embedder.proj_in.weight",
    ),
    ("vae", "diffusers"): ("decoder.conv_in.conv.weight", "decoder.conv_norm_out.weight"),
    ("vae", "sd"): ("decoder.conv_in.conv.weight", "decoder.norm_out.weight"),
    ("llama", "huggingface"): ("layers.0.self_attn.q_proj.weight",),
    ("llama", "gguf"): ("token_embd.weight", "blk.0.attn_q.weight"),
    ("clip", "huggingface"): ("text_model.encoder.layers.0.self_attn.q_proj.weight",),
    # as transformers 5 writes it
    ("clip", "bare"): (
        "embeddings.token_embedding.weight",
        "encoder.layers.0.self_attn.q_proj.weight",
        "final_layer_norm.weight",
    ),
    ("t5", "huggingface"): ("encoder.block.0.layer.0.SelfAttention.q.weight",),
    ("t5", "gguf"): ("enc.blk.0.attn_q.weight",),
    ("wan", "original"): ("patch_embedding.weight", "blocks.0.self_attn.q.weight"),
    ("wan", "diffusers"): ("patch_embedding.weight", "blocks.0.attn1.to_q.weight"),
}

#: our module -> the diffusers modules it is concatenated from
_DIFFUSERS: dict[str, tuple[str, ...]] = {
    "img_in.proj": ("x_embedder.proj",),
    "time_in.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.mlp.2": ("time_text_embed.timestep_embedder.linear_2",),
    "guidance_in.mlp.0": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.mlp.2": ("time_text_embed.guidance_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "txt_in.input_embedder": ("context_embedder.proj_in",),
    "txt_in.t_embedder.mlp.0": ("context_embedder.time_text_embed.timestep_embedder.linear_1",),
    "txt_in.t_embedder.mlp.2": ("context_embedder.time_text_embed.timestep_embedder.linear_2",),
    "txt_in.c_embedder.linear_1": ("context_embedder.time_text_embed.text_embedder.linear_1",),
    "txt_in.c_embedder.linear_2": ("context_embedder.time_text_embed.text_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
_DIFFUSERS_REFINER = {
    "norm1": ("norm1",),
    "norm2": ("norm2",),
    "self_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "self_attn_proj": ("attn.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
    "adaLN_modulation.1": ("norm_out.linear",),
}
_DIFFUSERS_DOUBLE = {
    "img_mod.linear": ("norm1.linear",),
    "txt_mod.linear": ("norm1_context.linear",),
    "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn_q_norm": ("attn.norm_q",),
    "img_attn_k_norm": ("attn.norm_k",),
    "txt_attn_q_norm": ("attn.norm_added_q",),
    "txt_attn_k_norm": ("attn.norm_added_k",),
    "img_attn_proj": ("attn.to_out.0",),
    "txt_attn_proj": ("attn.to_add_out",),
    "img_mlp.fc1": ("ff.net.0.proj",),
    "img_mlp.fc2": ("ff.net.2",),
    "txt_mlp.fc1": ("ff_context.net.0.proj",),
    "txt_mlp.fc2": ("ff_context.net.2",),
}
_DIFFUSERS_SINGLE = {
    "modulation.linear": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "q_norm": ("attn.norm_q",),
    "k_norm": ("attn.norm_k",),
}
_DIFFUSERS_BLOCKS = {
    "txt_in.individual_token_refiner.blocks": (
        "context_embedder.token_refiner.refiner_blocks",
        _DIFFUSERS_REFINER,
    ),
    "double_blocks": ("transformer_blocks", _DIFFUSERS_DOUBLE),
    "single_blocks": ("single_transformer_blocks", _DIFFUSERS_SINGLE),
}
#: [shift ; scale] rows in our layout, [scale ; shift] in diffusers'
HALF_SWAPPED = {("diffusers", "final_layer.adaLN_modulation.1")}

_COMFYUI: tuple[tuple[str, str], ...] = (
    (r"^(time_in|guidance_in|txt_in\.t_embedder)\.mlp\.0", r"\1.in_layer"),
    (r"^(time_in|guidance_in|txt_in\.t_embedder)\.mlp\.2", r"\1.out_layer"),
    (r"^txt_in\.c_embedder\.linear_1", "txt_in.c_embedder.in_layer"),
    (r"^txt_in\.c_embedder\.linear_2", "txt_in.c_embedder.out_layer"),
    (r"(img|txt)_mod\.linear", r"\1_mod.lin"),
    (r"\.modulation\.linear", ".modulation.lin"),
    (r"(img|txt)_attn_q_norm\.weight", r"\1_attn.norm.query_norm.scale"),
    (r"(img|txt)_attn_k_norm\.weight", r"\1_attn.norm.key_norm.scale"),
    (r"(self|img|txt)_attn_(qkv|proj)", r"\1_attn.\2"),
    (r"(single_blocks\.\d+)\.q_norm\.weight", r"\1.norm.query_norm.scale"),
    (r"(single_blocks\.\d+)\.k_norm\.weight", r"\1.norm.key_norm.scale"),
    (r"mlp\.fc1", "mlp.0"),
    (r"mlp\.fc2", "mlp.2"),
)

_SD_VAE: tuple[tuple[str, str], ...] = (
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2"),
    (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d+)\.resnets\.(\d+)", r"up.\1.block.\2"),
    (r"up_blocks\.(\d+)\.upsamplers\.0", r"up.\1.upsample"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"conv_norm_out", "norm_out"),
)


def transformer_sources(target: str, layout: str) -> tuple[str, ...]:
    """Find which tensors of a file, joined along dim 0, are our tensor `target`.

    Args:
        target: a parameter name of SkyReelsTransformer, or such a name's layer with any suffix
            after the last dot ("double_blocks.0.img_attn_qkv.scale_weight").
        layout: "original", "comfyui" or "diffusers".

    Returns:
        Names in the file, without its prefix.

    Raises:
        KeyError: the name is not one of ours.
    """
    if layout == "original":
        return (target,)
    if layout == "comfyui":
        for pattern, replacement in _COMFYUI:
            target = re.sub(pattern, replacement, target)
        return (target,)
    module, _, suffix = target.rpartition(".")
    block = re.match(r"(.*?blocks)\.(\d+)\.(.*)", module)
    if block is None:
        return tuple(f"{source}.{suffix}" for source in _DIFFUSERS[module])
    theirs, table = _DIFFUSERS_BLOCKS[block[1]]
    return tuple(f"{theirs}.{block[2]}.{source}.{suffix}" for source in table[block[3]])


def common_spelling(name: str) -> str:
    """A name of the layout "comfyui" as every version of ComfyUI before 0.33 wrote it."""
    return re.sub(r"\.(query|key)_norm\.weight$", r".\1_norm.scale", name)


def vae_sources(target: str, layout: str, num_levels: int) -> tuple[str, ...]:
    """Find which tensor of a file is our VAE's tensor `target`.

    Args:
        target: a parameter name of VideoVAE.
        layout: "diffusers" or "sd".
        num_levels: number of up blocks, which the "sd" layout counts from the other end.

    Returns:
        One name in the file, without its prefix.
    """
    if layout == "sd":
        for pattern, replacement in _SD_VAE:
            target = re.sub(pattern, replacement, target)
        target = re.sub(
            r"decoder\.up\.(\d+)", lambda m: f"decoder.up.{num_levels - 1 - int(m[1])}", target
        )
    return (target,)


def detect(names: Collection[str]) -> tuple[str, str, str]:
    """Recognise a model by the names of its tensors.

    Returns:
        Family, layout and prefix. The family is "transformer", "vae", "llama", "clip", "t5", "wan",
        "lora" or "unknown"; layout and prefix are "" for the last one. The layout of a LoRA says
        who writes such files (dialects.py), its prefix is "".
    """
    present = names if isinstance(names, Mapping | set | frozenset) else set(names)
    if dialect := lora_dialect(present):
        return "lora", dialect, ""
    for (family, layout), markers in MARKERS.items():
        for prefix in PREFIXES:
            if all(prefix + marker in present for marker in markers):
                return family, layout, prefix
    return "unknown", "", ""
