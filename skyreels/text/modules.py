"""LLaMA-3 and CLIP-L from weight files, one tensor at a time; 8-bit weights stay in 8 bits.

Such files have no config.json: sizes come from the shapes of the tensors, the rest is the same for
every LLaMA-3 and every CLIP of OpenAI. An 8-bit linear layer is dequantized for every call
(`QuantLinear`), so a 9 GB file takes 9 GB.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ..errors import CheckpointError
from ..runtime import Runtime
from ..weights.inspect import COMPANION_SUFFIXES, CheckpointInfo, inspect
from ..weights.load import fill_module, holds_float8

#: of every LLaMA-3. Source: config.json of meta-llama/Meta-Llama-3-8B
LLAMA3: dict[str, Any] = {
    "head_dim": 128,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
}
#: width of a head of every CLIP of OpenAI
CLIP_HEAD_DIM = 64
#: layers at the end of the language model that SkyReels does not use
UNUSED_LAYERS = 2
_HALF_DTYPES = (torch.float16, torch.bfloat16)


def load_llama(
    path: Path, *, exact: bool, runtime: Runtime, config: Any = None
) -> tuple[nn.Module, int]:
    """Load LLaMA-3 without its last two layers and its final norm.

    Args:
        path: a file, or a folder with shards and their index.
        exact: compute in float32.
        runtime: progress "load" in bytes; asked for an interrupt before every tensor.
        config: of a folder that has one, with the used layers only; else it is made from shapes.

    Returns:
        transformers LlamaModel on `runtime.offload_device`, and the size of its vocabulary.

    Raises:
        CheckpointError: damaged, incomplete, or of other sizes than a LLaMA-3 can have.
    """
    import transformers

    info = inspect(path)
    numbers = [re.match(r"layers\.(\d+)\.", name) for name in info.tensors]
    num_layers = 1 + max((int(match[1]) for match in numbers if match), default=-1)
    used = num_layers - UNUSED_LAYERS
    if used < 1:
        raise CheckpointError(
            f"{path.name} has {num_layers} layers of a LLaMA, and at least {UNUSED_LAYERS + 1} are "
            "needed: use llava_llama3_fp8_scaled.safetensors of "
            "Comfy-Org/HunyuanVideo_repackaged."
        )
    if config is None:
        config = _llama_config(info, used, transformers.LlamaConfig)

    def is_used(name: str) -> bool:
        layer = re.match(r"layers\.(\d+)\.", name)
        is_rest = name == "norm.weight" or name.startswith("lm_head.")
        return int(layer[1]) < used if layer else not is_rest

    def build() -> nn.Module:
        model: Any = transformers.LlamaModel(config)
        model.norm = nn.Identity()
        return cast(nn.Module, model)

    info = replace(info, tensors={n: e for n, e in info.tensors.items() if is_used(n)})
    model: Any = _fill(info, build, lambda name: name, exact, torch.bfloat16, runtime)
    # the buffers are on the meta device still: they are in no file
    model.rotary_emb = type(model.rotary_emb)(config=config).to(runtime.offload_device)
    return model.requires_grad_(False), config.vocab_size


def load_clip(
    path: Path, eos_token_id: int, *, exact: bool, runtime: Runtime, config: Any = None
) -> tuple[nn.Module, int]:
    """Load the text model of CLIP.

    Args:
        path: as for `load_llama`.
        eos_token_id: of its tokenizer; the pooled state is that of this token.
        exact: compute in float32.
        runtime: as for `load_llama`.
        config: of a folder that has one; else it is made from shapes.

    Returns:
        transformers CLIPTextModel on `runtime.offload_device`, and the size of its vocabulary.

    Raises:
        CheckpointError: damaged, incomplete, or of other sizes than CLIP can have.
    """
    import transformers

    info = inspect(path)
    stem = "text_model." if info.layout == "huggingface" else ""

    def is_used(name: str) -> bool:
        parts = tuple(stem + part for part in ("embeddings.", "encoder.", "final_layer_norm."))
        return name.startswith(parts) and not name.endswith("position_ids")

    info = replace(info, tensors={n: e for n, e in info.tensors.items() if is_used(n)})
    if config is None:
        config = _clip_config(info, stem, eos_token_id, transformers.CLIPTextConfig)
    # transformers 5 has left "text_model." out of the names of its module
    model: Any = _fill(
        info,
        lambda: transformers.CLIPTextModel(config),
        lambda name: stem + name.removeprefix("text_model."),
        exact,
        torch.float32,
        runtime,
    )
    for module in model.modules():
        if "position_ids" in dict(module.named_buffers(recurse=False)):
            count = config.max_position_embeddings
            module.position_ids = torch.arange(count, device=runtime.offload_device)[None]
    return model.requires_grad_(False), config.vocab_size


def _fill(
    info: CheckpointInfo,
    build: Callable[[], nn.Module],
    source: Callable[[str], str],
    exact: bool,
    half_on_cpu: torch.dtype,
    runtime: Runtime,
) -> nn.Module:
    return fill_module(
        info,
        build,
        lambda name: (source(name),),
        keep_8bit=holds_float8(runtime.device),
        compute_dtype=torch.float32 if exact else _compute_dtype(info, half_on_cpu, runtime),
        runtime=runtime,
    )


def _compute_dtype(info: CheckpointInfo, half_on_cpu: torch.dtype, runtime: Runtime) -> torch.dtype:
    """What most numbers that are not in 8 bits are stored in; bfloat16 if all are."""
    stored: Counter[torch.dtype] = Counter()
    for name, entry in info.tensors.items():
        if entry.dtype in (*_HALF_DTYPES, torch.float32) and not name.endswith(COMPANION_SUFFIXES):
            stored[entry.dtype] += entry.num_bytes
    dtype = stored.most_common(1)[0][0] if stored else torch.bfloat16
    return half_on_cpu if runtime.device.type == "cpu" and dtype in _HALF_DTYPES else dtype


def _rows_and_columns(info: CheckpointInfo, name: str) -> tuple[int, int]:
    entry = info.tensors.get(name)
    if entry is None or len(entry.shape) != 2 or 0 in entry.shape:
        found = "lacks it" if entry is None else f"has {list(entry.shape)}"
        raise CheckpointError(
            f"{info.path.name} needs a matrix {name} and {found}: it is incomplete or of another "
            "model; choose another file."
        )
    return entry.shape[0], entry.shape[1]


def _heads(info: CheckpointInfo, name: str, rows: int, head_dim: int) -> int:
    if rows % head_dim:
        raise CheckpointError(
            f"{info.path.name} has {rows} rows in {name}, not a multiple of {head_dim}: it is of "
            "another model; choose another file."
        )
    return rows // head_dim


def _llama_config(info: CheckpointInfo, num_layers: int, config_class: Any) -> Any:
    vocab_size, hidden = _rows_and_columns(info, "embed_tokens.weight")
    heads = {}
    for part in ("q_proj", "k_proj"):
        name = f"layers.0.self_attn.{part}.weight"
        heads[part] = _heads(info, name, _rows_and_columns(info, name)[0], LLAMA3["head_dim"])
    return config_class(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=_rows_and_columns(info, "layers.0.mlp.gate_proj.weight")[0],
        num_hidden_layers=num_layers,
        num_attention_heads=heads["q_proj"],
        num_key_value_heads=heads["k_proj"],
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **LLAMA3,
    )


def _clip_config(info: CheckpointInfo, stem: str, eos_token_id: int, config_class: Any) -> Any:
    vocab_size, hidden = _rows_and_columns(info, f"{stem}embeddings.token_embedding.weight")
    numbers = [re.match(rf"{re.escape(stem)}encoder\.layers\.(\d+)\.", n) for n in info.tensors]
    return config_class(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=_rows_and_columns(info, f"{stem}encoder.layers.0.mlp.fc1.weight")[0],
        num_hidden_layers=1 + max((int(match[1]) for match in numbers if match), default=-1),
        num_attention_heads=_heads(info, "embeddings.token_embedding", hidden, CLIP_HEAD_DIM),
        max_position_embeddings=_rows_and_columns(
            info, f"{stem}embeddings.position_embedding.weight"
        )[0],
        hidden_act="quick_gelu",
        bos_token_id=None,
        eos_token_id=eos_token_id,
        pad_token_id=None,
    )
