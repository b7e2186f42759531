"""How LoRA files name their tensors, and which program writes such names.

A name is a prefix, a module in one of several vocabularies (lora/names.py), and a suffix that says
which factor the tensor is. Suffixes and the guess at the writer need no model, so `inspect` uses
them too.

Sources: the LoRA networks and converters of kohya-ss/musubi-tuner, tdrussell/diffusion-pipe,
Nerogar/OneTrainer, huggingface/peft and diffusers, Tencent/HunyuanVideo-I2V, KohakuBlueleaf/LyCORIS
and ComfyUI.
"""

import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

#: longer names are those of no module
MAX_NAME_CHARS = 400

#: in front of a module's name, in any order and number; the longest that fits goes first
LORA_PREFIXES = (
    "model.diffusion_model.",
    "Hunyuan_video_I2V_lora_",
    "lora_transformer_",
    "base_model.model.",
    "diffusion_model.",
    "transformer.",
    "lora_unet__",
    "lora_unet_",
    "lycoris_",
)

#: of a text encoder or an embedding, which this package does not change
_NOT_OURS = re.compile(
    r"(?:base_model\.model\.)?"
    r"(?:lora_te\d*_|text_encoder(?:_\d|s)?\.|te\d?\.|llama\.|clip_[lg]\.|bundle_emb\.)"
)

_FACTORS = (
    r"[._]lora(?:_linear_layer)?[._](?P<side>A|B|down|up)"
    r"(?:\.(?!(?:weight|bias)$)(?P<adapter>[^.]+))?\.(?P<kind>weight|bias)"
)
_OTHERS = (
    r"\.(?P<other>alpha|dora_scale|hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2|diff|"
    r"diff_b|set_weight|w_norm|b_norm)"
)
_MAGNITUDE = r"\.lora_magnitude_vector(?:\.(?!weight$)(?P<of>[^.]+))?(?P<magnitude>\.weight|)"
#: a name without any of these is no LoRA's; this is asked of every name of every checkpoint
_HINT = re.compile(r"lora|hada_|lokr_|dora_|\.diff|\.alpha|\.set_weight|\.[wb]_norm")
_SUFFIX = re.compile(f"(?P<module>.+?)(?:{_FACTORS}|{_OTHERS}|{_MAGNITUDE})")
#: suffix -> what it belongs to; refused by name
_REFUSED = {
    "OFT or BOFT": re.compile(r".+\.(?:oft_blocks|oft_diag|oft_[RS](?:\.[^.]+)?(?:\.weight)?)"),
    "GLoRA": re.compile(r".+\.[ab][12]\.weight"),
    "LoCon with a middle factor": re.compile(r".+\.lora_mid\.weight"),
    "VeRA": re.compile(r".+\.vera_lambda_[bd](?:\.[^.]+)?"),
    "IA3": re.compile(r".+\.(?:ia3_l(?:\.[^.]+)?|on_input)"),
    "AdaLoRA": re.compile(r".+\.lora_E(?:\.[^.]+)?"),
}
_ROLES = {"A": "down", "B": "up", "w_norm": "diff", "b_norm": "diff_b"}

#: program -> what one of its module names has; the first that any name has is the one
_WRITERS = {
    "raw PEFT": r"base_model\.model\.",
    "Tencent HunyuanVideo-I2V": r"Hunyuan_video_I2V_lora_",
    "OneTrainer": r"lora_transformer_",
    "LyCORIS": r"lycoris_",
    "OneTrainer OMI": r".*(?:attn[._]qkv|linear1)\.[0-3]$|.*mlp\.fc0$",
    "musubi-tuner": r"lora_unet_+(?:double|single)_blocks_|lora_unet_+(?:txt|img|time|vector)_in",
    "LTX-Video or CogVideoX": r".*transformer_blocks[._]\d+[._]attn\d",
    "Wan": r".*blocks[._]\d+[._](?:self|cross)_attn[._][qkvo]$",
    "diffusers": r"(?:transformer\.)?(?:single_transformer_blocks\.\d+\.(?:attn|norm|proj_\w+)\.|"
    r"single_transformer_blocks\.\d+\.proj|transformer_blocks\.\d+\.(?:attn|norm1|ff)|"
    r"(?:context|x)_embedder\.)",
    "ComfyUI": r".*blocks\.\d+\.(?:(?:img|txt)_(?:attn\.|mod\.lin$|mlp\.[02]$)|modulation\.lin$)",
    "diffusion-pipe": r".*(?:double|single)_blocks\.\d+\.|(?:\w+\.)?(?:txt|img|time)_in\.|"
    r"(?:\w+\.)?(?:vector_in|guidance_in|final_layer)\.",
    "Stable Diffusion": r".*(?:down|up|mid|input|output|middle)_blocks?[._]",
}
_METHODS = {
    "DoRA": ("dora_scale",),
    "LoHa": ("hada_w1_a",),
    "LoKr": ("lokr_w1", "lokr_w1_a"),
    "LoRA": ("down",),
    "full difference": ("diff", "diff_b", "set_weight"),
}


class LoraKey(NamedTuple):
    """The name of a tensor of a LoRA.

    Attributes:
        module: with its prefix, as the file spells it.
        role: "down", "up", "down_bias", "up_bias", "alpha", "dora_scale", "diff", "diff_b",
            "set_weight", or a factor of LoHa or LoKr as LyCORIS names it.
        adapter: PEFT's name of the adapter, or "".
    """

    module: str
    role: str
    adapter: str


def lora_key(name: str) -> LoraKey | None:
    """Split the name of a tensor of a LoRA; None if it has none of the known suffixes."""
    if len(name) > MAX_NAME_CHARS or _HINT.search(name) is None:
        return None
    match = _SUFFIX.fullmatch(name)
    if match is None:
        return None
    if match["other"] is not None:
        return LoraKey(match["module"], _ROLES.get(match["other"], match["other"]), "")
    if match["magnitude"] is not None:
        return LoraKey(match["module"], "dora_scale", match["of"] or "")
    role = _ROLES.get(match["side"], match["side"])
    role = role if match["kind"] == "weight" else f"{role}_bias"
    return LoraKey(match["module"], role, match["adapter"] or "")


def refused_method(names: Iterable[str]) -> str:
    """The first method that is not supported whose suffix one of the names has; else ""."""
    for name in names:
        for method, pattern in _REFUSED.items():
            if len(name) <= MAX_NAME_CHARS and pattern.fullmatch(name):
                return method
    return ""


def is_text_encoder_key(name: str) -> bool:
    """Whether a tensor of a LoRA belongs to a text encoder or is an embedding."""
    return _NOT_OURS.match(name) is not None


def lora_dialect(names: Collection[str]) -> str:
    """Recognise a LoRA, and guess who wrote it.

    Args:
        names: of all tensors of a file.

    Returns:
        The writer and, unless it is plain LoRA, the method, as in "musubi-tuner, LoHa"; "" if the
        file is not a LoRA.
    """
    keys = [key for name in names if (key := lora_key(name)) is not None and key.role != "alpha"]
    method = ""
    if keys:
        roles = {key.role for key in keys}
        method = next((m for m, of in _METHODS.items() if roles & set(of)), "LoRA")
    elif (found := refused_method(names)) != "GLoRA" or _has_all_of_glora(names):
        method = found
    if not method:
        return ""
    modules = [key.module for key in keys] or list(names)
    ours = [name for name in modules if not is_text_encoder_key(name)]
    writer = next(
        (
            w
            for w, pattern in _WRITERS.items()
            if any(re.match(pattern, name[:MAX_NAME_CHARS]) for name in ours)
        ),
        "unknown names",
    )
    return writer if method == "LoRA" else f"{writer}, {method}"


def _has_all_of_glora(names: Collection[str]) -> bool:
    """Other models have a layer called a1 too."""
    ends = {name[-len(".a1.weight") :] for name in names}
    return {".a1.weight", ".a2.weight", ".b1.weight", ".b2.weight"} <= ends
