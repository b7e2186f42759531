"""What a weight file is, from its header alone.

Files are recognised by their first bytes and by the names and shapes of their tensors, never by
their own name. Sizes and offsets are checked against the file before anything is trusted, so that a
truncated or damaged file is reported as such and not as a shape mismatch later.
"""

import contextlib
import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from ..config import TransformerConfig, VAEConfig
from ..errors import CheckpointError, shown
from ..files import check_regular, read_json
from .entries import DTYPE_NAMES, DTYPES, TensorEntry
from .folders import MAIN_FILE, find_weights, read_index, weights_folder
from .gguf import read_gguf
from .keymaps import PREFIXES, common_spelling, detect, transformer_sources
from .kinds import MAX_HEADER_BYTES, is_shard, kind_of, split_number

VARIANTS = {16: "t2v", 32: "skyreels-i2v", 33: "tencent-i2v"}

#: names of families in messages
FAMILY_NAMES = {
    "transformer": "a HunyuanVideo transformer",
    "vae": "a HunyuanVideo VAE",
    "llama": "a LLaMA text encoder",
    "clip": "a CLIP text encoder",
    "t5": "a T5 text encoder",
    "lora": "a LoRA",
    "unknown": "an unknown model",
}

#: suffixes of companions of a quantised weight, ComfyUI v0 and v1
SCALE_SUFFIXES = {"v0": ".scale_weight", "v1": ".weight_scale"}
COMPANION_SUFFIXES = (
    ".scale_weight",
    ".scale_input",
    ".weight_scale",
    ".input_scale",
    ".comfy_quant",
)
#: a tensor without weights that ComfyUI puts into scaled fp8 files
MARKER_NAME = "scaled_fp8"
#: where a .pt file may nest its weights, and how deep
_NESTING_KEYS = ("state_dict", "module", "model")
_MAX_NESTING = 4
_PICKLE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
#: blocks of a kind that a network may have; HunyuanVideo's has 40
MAX_LAYERS = 256
#: what Tencent's names have and no other model's
_UNFINISHED_MARKER = "double_blocks.0.img_attn_qkv.weight"
#: the file that has everything, for advice
I2V_FILE = "skyreels_hunyuan_i2v_bf16.safetensors of Kijai/SkyReels-V1-Hunyuan_comfy"


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint is.

    Attributes:
        path: of the file or folder.
        family: "transformer", "vae", "llama", "clip", "t5", "lora" or "unknown".
        variant: of a transformer, "skyreels-i2v", "t2v", "tencent-i2v" or "<n>-channel"; else "".
        layout: how its tensors are named, see keymaps.py.
        prefix: in front of all their names.
        dtypes: number of parameters stored in each dtype, the most frequent first.
        scales: "none", "v0 per tensor", "v0 per row", "v1 per tensor" or "v1 per row".
        guidance_embeds: whether a transformer takes the embedded guidance.
        num_tensors: without the companions of quantised weights.
        num_parameters: of those tensors.
        num_bytes: of all tensors, companions included.
        config: of a transformer or a VAE, else None.
        metadata: text of the header beside its tensors.
        tensors: by name without the prefix. Tensors without the prefix belong to another model in
            the same file and are not listed.
    """

    path: Path
    family: str
    variant: str
    layout: str
    prefix: str
    dtypes: dict[str, int]
    scales: str
    guidance_embeds: bool
    num_tensors: int
    num_parameters: int
    num_bytes: int
    config: TransformerConfig | VAEConfig | None
    metadata: Mapping[str, str] = field(repr=False)
    tensors: Mapping[str, TensorEntry] = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """The same without the tensors and the metadata, ready for json.dumps."""
        from dataclasses import asdict

        skipped = ("tensors", "metadata", "path", "config")
        values = {k: v for k, v in self.__dict__.items() if k not in skipped}
        return {
            "path": str(self.path),
            **values,
            "config": None if self.config is None else asdict(self.config),
        }


def inspect(
    path: str | os.PathLike[str], part: Literal["", "transformer", "vae"] = ""
) -> CheckpointInfo:
    """Find out what a checkpoint is without reading its weights.

    Args:
        path: a .safetensors, .gguf or .pt file, whatever its name, or a folder of folders.py.
        part: what is wanted of a folder with a whole model; "" takes the only one that is there.

    Returns:
        Its description; of family "unknown" for tensors this package does not know.

    Raises:
        CheckpointError: missing, empty, truncated or damaged file, one of another kind, or one
            shard of several; folder without weights.
    """
    path = Path(path)
    folder_config: dict[str, Any] = {}
    if os.path.isdir(path):
        folder = weights_folder(path, part)
        tensors, metadata = _read_folder(folder)
        folder_config = _read_folder_config(folder)
    else:
        check_regular(path)
        if is_shard(path.name):
            number, count = split_number(path.name) or (0, 0)
            fix = f"choose its folder, {path.absolute().parent.name}"
            if path.suffix.lower() in _PICKLE_SUFFIXES:
                fix = "use the .safetensors files of the same model"
            raise CheckpointError(
                f"{path.name} is shard {number} of {count} and not a whole model: {fix}."
            )
        tensors, metadata = read_tensors(path)
        if path.name.startswith(MAIN_FILE.partition(".")[0]):
            folder_config = _read_folder_config(path.parent)
    return _describe(path, tensors, folder_config, metadata)


def read_tensors(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Read the tensor table of one file, whose first bytes decide what it is.

    Returns:
        The tensors by name, and the text that the file has beside them.

    Raises:
        CheckpointError: see `inspect`.
    """
    kind, suffix = kind_of(path), path.suffix.lower()
    if kind == "gguf":
        return read_gguf(path)
    if kind == "pickle" or (kind == "unknown" and suffix in _PICKLE_SUFFIXES):
        return _pickle_entries(path, load_pickle(path, map_location="meta")), {}
    if kind == "unknown" and suffix == ".gguf":
        raise CheckpointError(
            f"{path.name} does not begin as a GGUF file: it is damaged or another file; "
            "download it again."
        )
    return read_header(path)


def _describe(
    path: Path,
    tensors: dict[str, TensorEntry],
    folder_config: dict[str, Any],
    metadata: dict[str, str],
) -> CheckpointInfo:
    if not tensors:
        raise CheckpointError(
            f"{path.name} contains no tensors: it is not a checkpoint; choose another file."
        )
    family, layout, prefix = detect(tensors)
    if family == "unknown":
        _check_finished(path, tensors)
    weights = {
        name[len(prefix) :]: entry
        for name, entry in tensors.items()
        if name.startswith(prefix) and name != prefix + MARKER_NAME
    }
    if layout == "comfyui":
        weights = {common_spelling(name): entry for name, entry in weights.items()}
    config: TransformerConfig | VAEConfig | None = None
    variant = ""
    if family == "transformer":
        config = _transformer_config(path, weights, layout, folder_config)
        variant = VARIANTS.get(config.in_channels, f"{config.in_channels}-channel")
    elif family == "vae":
        config = _vae_config(path, weights, layout, folder_config)
    plain = {n: e for n, e in weights.items() if not n.endswith(COMPANION_SUFFIXES)}
    dtypes: Counter[str] = Counter()
    for entry in plain.values():
        dtypes[entry.dtype_name] += math.prod(entry.shape)
    return CheckpointInfo(
        path=path,
        family=family,
        variant=variant,
        layout=layout,
        prefix=prefix,
        dtypes=dict(dtypes.most_common()),
        scales=_scales(weights),
        guidance_embeds=isinstance(config, TransformerConfig) and config.guidance_embeds,
        num_tensors=len(plain),
        num_parameters=sum(dtypes.values()),
        num_bytes=sum(entry.num_bytes for entry in weights.values()),
        config=config,
        metadata=metadata,
        tensors=weights,
    )


def _check_finished(path: Path, tensors: Mapping[str, TensorEntry]) -> None:
    """Refuse a conversion that left out the patch embedder, whose weight has five dimensions."""
    for prefix in PREFIXES:
        if prefix + _UNFINISHED_MARKER in tensors and prefix + "img_in.proj.weight" not in tensors:
            raise CheckpointError(
                f"{path.name} lacks tensor img_in.proj.weight: its conversion is "
                "unfinished, as programs for GGUF leave out what has five dimensions. Use a "
                f"finished file, or add that tensor from {I2V_FILE}."
            )


def require(info: CheckpointInfo, family: Literal["transformer", "vae"]) -> None:
    """Refuse a checkpoint of another family.

    Raises:
        CheckpointError: names what the file is and what is needed; `family` says the former.
    """
    if info.family == family:
        return
    fixes = {
        "transformer": "load it as the transformer",
        "vae": "load it as the VAE",
        "llama": "load text encoders from a diffusers-style folder",
        "clip": "load text encoders from a diffusers-style folder",
        "t5": "HunyuanVideo does not use it",
        "lora": "it modifies a model and is not one",
        "unknown": f"its first tensors are {', '.join(map(shown, list(info.tensors)[:3]))}",
    }
    raise CheckpointError(
        f"{info.path.name} is {FAMILY_NAMES[info.family]}, and {FAMILY_NAMES[family]} is needed: "
        f"{fixes[info.family]}.",
        info.family,
    )


# --- reading ------------------------------------------------------------------------------------


def read_header(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Read the tensor table and the metadata of one safetensors file.

    Returns:
        The tensors by name, and the text that the header has beside them.

    Raises:
        CheckpointError: the file is shorter or longer than its header says, or the header is
            damaged.

    Source: format description in the README of huggingface/safetensors.
    """
    file_bytes = path.stat().st_size
    again = "it is truncated or not a safetensors file; download it again."
    if file_bytes < 8:
        raise CheckpointError(f"{path.name} has {file_bytes} bytes, a header needs 8: {again}")
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > min(file_bytes - 8, MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{path.name} announces a header of {header_bytes} bytes in a file of "
                f"{file_bytes} (limit {MAX_HEADER_BYTES}): {again}"
            )
        raw = file.read(header_bytes)
    try:
        header = json.loads(raw, object_pairs_hook=_refuse_duplicates)
        metadata = _header_text(header.pop("__metadata__", None) or {})
        entries = {
            name: _header_entry(path, name, value, 8 + header_bytes)
            for name, value in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path.name} has a damaged header ({shown(error)}): download it again."
        ) from None
    end = 8 + header_bytes
    for name, entry in sorted(entries.items(), key=lambda item: item[1].offset):
        if entry.offset != end:
            raise CheckpointError(
                f"{path.name} has a damaged header: tensor {shown(name)} starts at byte "
                f"{entry.offset}, the one before ends at {end}. Download it again."
            )
        end += entry.num_bytes
    if end != file_bytes:
        raise CheckpointError(
            f"{path.name} has {file_bytes} bytes, and its header describes {end}: {again}"
        )
    return entries, metadata


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name appears twice")
    return values


def _header_text(metadata: dict[str, Any]) -> dict[str, str]:
    if not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("its metadata is not text")
    return metadata


def _header_entry(path: Path, name: str, value: dict[str, Any], data_start: int) -> TensorEntry:
    if value["dtype"] not in DTYPES:
        raise CheckpointError(
            f"{path.name} stores {shown(name)} as {shown(value['dtype'])}, which this package "
            "cannot read: use the bf16, fp8 or scaled fp8 file of the same model; if this is one, "
            "download it again."
        )
    dtype, shape = DTYPES[value["dtype"]], tuple(value["shape"])
    begin, end = value["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise ValueError(f"tensor {shown(name)} has a shape or offset that is not a whole number")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(
            f"tensor {shown(name)} of {value['dtype']} {list(shape)} has {end - begin} bytes"
        )
    return TensorEntry(path, name, dtype, shape, end - begin, data_start + begin)


def load_pickle(path: Path, map_location: str) -> dict[str, torch.Tensor]:
    """Read the tensors of a .pt file, also from inside "state_dict", "module" or "model".

    Only plain weights are unpickled. The file is memory-mapped, or read whole if it was written
    before torch 1.6.

    Args:
        path: of the file.
        map_location: device of the tensors; "meta" reads no weights.

    Returns:
        The dense tensors by name.

    Raises:
        CheckpointError: damaged file, or one that contains code.
    """
    import zipfile

    name = path.name
    # torch goes by the suffix .safetensors, if it is given a path
    is_misnamed = path.suffix == ".safetensors"
    try:
        with path.open("rb") if is_misnamed else contextlib.nullcontext(path) as source:
            content = torch.load(
                source,
                map_location=map_location,
                weights_only=True,
                mmap=not is_misnamed and zipfile.is_zipfile(path),
            )
    except Exception:  # noqa: BLE001 - torch's own messages advise to run the code inside
        raise CheckpointError(
            f"{name} cannot be read as plain weights: it is damaged, not a checkpoint, or "
            "contains program code, which is never run. Use the .safetensors file of the same "
            "model."
        ) from None
    for _ in range(_MAX_NESTING):  # a dict may hold itself
        if not isinstance(content, dict):
            break
        inner = next((content[k] for k in _NESTING_KEYS if isinstance(content.get(k), dict)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{name} contains no tensors: it is not a checkpoint; choose another file."
        )
    return {
        name: value
        for name, value in content.items()
        if isinstance(name, str)
        and isinstance(value, torch.Tensor)
        and value.layout == torch.strided
    }


def _pickle_entries(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, TensorEntry]:
    file_bytes = path.stat().st_size
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPE_NAMES:
            raise CheckpointError(
                f"{path.name} stores {shown(name)} as {tensor.dtype}, which this package "
                "cannot read: use the .safetensors file of the same model."
            )
        if tensor.nbytes > file_bytes:
            raise CheckpointError(
                f"{path.name} has {file_bytes} bytes, and its tensor {shown(name)} takes "
                f"{tensor.nbytes}: it is not a plain checkpoint; use the .safetensors file of the "
                "same model."
            )
    return {
        name: TensorEntry(path, name, t.dtype, tuple(t.shape), t.nbytes, is_pickled=True)
        for name, t in tensors.items()
    }


def _read_folder(folder: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Read the tensor table of a folder: its file, or the shards that its index lists."""
    found = find_weights(folder)
    if found.suffix != ".json":
        return read_tensors(found)
    shard_of = read_index(found)
    tensors: dict[str, TensorEntry] = {}
    metadata: dict[str, str] = {}
    for shard in sorted(set(shard_of.values())):
        entries, shard_metadata = read_tensors(folder / shard)
        tensors.update(entries)
        metadata.update(shard_metadata)
    absent = [name for name in shard_of if name not in tensors]
    if absent:
        raise CheckpointError(
            f"Folder {folder.name} lacks tensor {shown(absent[0])} and {len(absent) - 1} "
            "more that its index lists: index and shards are not of one download; get all of them "
            "from one place."
        )
    return tensors, metadata


def _read_folder_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    config = read_json(file) if file.exists() else {}
    return config if isinstance(config, dict) else {}


def _bad_config(path: Path, name: str, value: object, rule: str) -> CheckpointError:
    return CheckpointError(
        f"config.json in {path.name} has {name} {shown(repr(value))}; it must be {rule}: "
        "use the config.json that was published with the weights."
    )


# --- describing ---------------------------------------------------------------------------------


def _scales(weights: Mapping[str, TensorEntry]) -> str:
    for version, suffix in SCALE_SUFFIXES.items():
        sizes = [math.prod(e.shape) for name, e in weights.items() if name.endswith(suffix)]
        if sizes:
            return f"{version} per {'row' if max(sizes) > 1 else 'tensor'}"
    return "none"


def _count(path: Path, weights: Mapping[str, TensorEntry], stem: str) -> int:
    """Count the numbered blocks `stem`.0, `stem`.1, ..."""
    numbers = {
        name[len(stem) + 1 :].partition(".")[0] for name in weights if name.startswith(stem + ".")
    }
    if len(numbers) > MAX_LAYERS:
        raise CheckpointError(
            f"{path.name} has {len(numbers)} {stem}, and no known model more than {MAX_LAYERS}: it "
            "is of another model; choose another file."
        )
    return len(numbers)


def rope_axes(head_dim: int) -> tuple[int, int, int]:
    """Rotary dims of (time, height, width), in the proportion 16:56:56 of a 128-wide head."""
    time = max(2, head_dim // 16 * 2)
    space = (head_dim - time) // 4 * 2
    return head_dim - 2 * space, space, space


def _shape(path: Path, weights: Mapping[str, TensorEntry], name: str, ndim: int) -> tuple[int, ...]:
    """Shape of a tensor that the model needs, with `ndim` dimensions, none of them empty."""
    if name not in weights:
        raise CheckpointError(
            f"{path.name} lacks tensor {name}: it is an incomplete conversion or of another model; "
            "choose another file."
        )
    shape = weights[name].shape
    if len(shape) != ndim or 0 in shape:
        raise CheckpointError(
            f"{path.name} has {name} of shape {list(shape)}, and HunyuanVideo's has {ndim} "
            "dimensions: it is of another model; choose another file."
        )
    return shape


def _transformer_config(
    path: Path, weights: Mapping[str, TensorEntry], layout: str, folder_config: dict[str, Any]
) -> TransformerConfig:
    def shape(name: str, ndim: int) -> tuple[int, ...]:
        return _shape(path, weights, transformer_sources(name, layout)[0], ndim)

    if layout == "diffusers":
        double, single = "transformer_blocks", "single_transformer_blocks"
        refiner = "context_embedder.token_refiner.refiner_blocks"
    else:
        double, single = "double_blocks", "single_blocks"
        refiner = "txt_in.individual_token_refiner.blocks"
    hidden, in_channels, patch_t, patch, _ = shape("img_in.proj.weight", 5)
    (head_dim,) = shape("double_blocks.0.img_attn_q_norm.weight", 1)
    guidance = transformer_sources("guidance_in.mlp.0.weight", layout)[0] in weights
    return TransformerConfig(
        in_channels=in_channels,
        out_channels=shape("final_layer.linear.weight", 2)[0] // (patch_t * patch * patch),
        num_attention_heads=hidden // head_dim,
        attention_head_dim=head_dim,
        num_layers=_count(path, weights, double),
        num_single_layers=_count(path, weights, single),
        num_refiner_layers=_count(path, weights, refiner),
        mlp_ratio=shape("double_blocks.0.img_mlp.fc1.weight", 2)[0] / hidden,
        patch_size=patch,
        patch_size_t=patch_t,
        guidance_embeds=guidance,
        text_embed_dim=shape("txt_in.input_embedder.weight", 2)[1],
        pooled_projection_dim=shape("vector_in.in_layer.weight", 2)[1],
        rope_theta=_rope_theta(path, folder_config),
        rope_axes_dim=_rope_axes_dim(path, folder_config, head_dim),
    )


def _rope_theta(path: Path, folder_config: dict[str, Any]) -> float:
    theta = folder_config.get("rope_theta", 256.0)
    if type(theta) not in (int, float) or not 0 < theta < math.inf:
        raise _bad_config(path, "rope_theta", theta, "a positive number (256)")
    return float(theta)


def _rope_axes_dim(
    path: Path, folder_config: dict[str, Any], head_dim: int
) -> tuple[int, int, int]:
    axes = folder_config.get("rope_axes_dim")
    if axes is None:
        return rope_axes(head_dim)
    is_sound = isinstance(axes, list) and len(axes) == 3 and all(type(dim) is int for dim in axes)
    if not is_sound or any(dim < 2 or dim % 2 for dim in axes) or sum(axes) != head_dim:
        rule = f"three even numbers with the sum {head_dim}"
        raise _bad_config(path, "rope_axes_dim", axes, rule)
    return axes[0], axes[1], axes[2]


def _vae_config(
    path: Path, weights: Mapping[str, TensorEntry], layout: str, folder_config: dict[str, Any]
) -> VAEConfig:
    stem, conv = (
        ("encoder.down", "block.0.conv1.conv.weight")
        if layout == "sd"
        else ("encoder.down_blocks", "resnets.0.conv1.conv.weight")
    )
    resnets = "block" if layout == "sd" else "resnets"
    groups = folder_config.get("norm_num_groups", 32)
    if type(groups) is not int or groups < 1:
        raise _bad_config(path, "norm_num_groups", groups, "a whole number from 1 (32)")

    def channels(name: str, axis: int) -> int:
        return _shape(path, weights, name, 5)[axis]

    return VAEConfig(
        in_channels=channels("encoder.conv_in.conv.weight", 1),
        out_channels=channels("decoder.conv_out.conv.weight", 0),
        latent_channels=channels("post_quant_conv.weight", 0),
        block_out_channels=tuple(
            channels(f"{stem}.{level}.{conv}", 0) for level in range(_count(path, weights, stem))
        ),
        layers_per_block=_count(path, weights, f"{stem}.0.{resnets}"),
        norm_num_groups=groups,
    )
