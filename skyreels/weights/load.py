"""Load a checkpoint into a module, one tensor at a time.

The module is built on the meta device, the whole plan (names, shapes, dtypes) is checked against
the header before the first weight is read, and each tensor is then read straight into its place in
the fused weight. So memory beyond the model itself stays at one tensor, and a bad file fails before
anything is allocated. Files are read, not memory-mapped: replacing or truncating a mapped file
while it is in use ends the process, and mapped pages count twice while a copy is made.

Given up: starting before the whole file is read. A .pt file is mapped: its tensors lie behind a
pickle that only torch reads.
"""

import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import IO, TypeVar

import torch
from torch import Tensor, nn

from ..config import TRANSFORMER_PRECISIONS, VAE_PRECISIONS, TransformerConfig, VAEConfig
from ..errors import CheckpointError, OptionError, shown
from ..kernels import QuantFormat
from ..kernels.blocks import factors
from ..kernels.dispatch import is_passing
from ..runtime import Runtime, in_parts
from ..runtime.offload import shapes_only
from ..transformer.block_linear import BlockLinear, unpack
from ..transformer.model import SkyReelsTransformer
from ..transformer.quant import (
    FLOAT8_DTYPES,
    STORAGE_DTYPES,
    QuantLinear,
    dequantize,
    hadamard_block_size,
    is_quantizable,
    quantize,
)
from ..vae.model import VideoVAE
from .entries import DTYPE_NAMES, DTYPES, TensorEntry
from .inspect import (
    COMPANION_SUFFIXES,
    FRAMEPACK_PREFIX,
    I2V_FILE,
    SCALE_SUFFIXES,
    CheckpointInfo,
    inspect,
    load_pickle,
    require,
)
from .keymaps import HALF_SWAPPED, transformer_sources, vae_sources

logger = logging.getLogger("skyreels.weights.load")

_FLOAT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

LATENT_CHANNELS = 16
#: layers whose 8-bit weights may stay in 8 bits: of the transformer, of LLaMA, of CLIP
BLOCK_STEMS = (
    "double_blocks.",
    "single_blocks.",
    "layers.",
    "encoder.layers.",
    "text_model.encoder.layers.",
)
#: elements of a weight that are checked for NaN at once: 4 MB in float32
CHECKED_ELEMENTS = 1024**2
#: of a weight in GGUF blocks that are dequantized at once while loading: 64 MB in float32
UNPACKED_ELEMENTS = 2**24
VAE_FILE = "hunyuan_video_vae_bf16.safetensors of Comfy-Org/HunyuanVideo_repackaged"

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def load_transformer(
    path: str | PathLike[str],
    *,
    precision: str = "auto",
    runtime: Runtime,
) -> SkyReelsTransformer:
    """Load a SkyReels-V1 transformer, I2V or T2V, onto `runtime.offload_device`.

    Args:
        path: any layout of keymaps.py, as a file or a diffusers folder.
        precision: "auto" keeps what the file stores: float32 stays float32, anything else computes
            in bfloat16, and 8-bit weights and GGUF blocks stay as they are but are dequantized for
            every call (as other implementations do with such a file). "fp32" and "bf16" convert
            everything. "fp8" and "int8" quantize the block linears, with a scale per row and, for
            int8, after a Hadamard rotation; their GEMMs run in 8 bits where the device can
            (quant.py). A file's own fp8 weights are used for "fp8" as they are.
        runtime: progress "load" in bytes; asked for an interrupt before every tensor.

    Returns:
        The module in eval mode, without gradients.

    Raises:
        CheckpointError: unreadable, another family, another variant (33 channels, FramePack),
            tensors missing, left over, of the wrong shape, or not finite.
        OptionError: unknown precision.
    """
    _check_precision(precision, TRANSFORMER_PRECISIONS)
    info = check_transformer(path)
    config = info.config
    assert isinstance(config, TransformerConfig)
    if precision == "auto":
        compute_dtype = torch.float32 if _main_dtype(info) == torch.float32 else torch.bfloat16
    else:
        compute_dtype = _FLOAT_DTYPES.get(precision, torch.bfloat16)
    weight_format = _weight_format(precision, config)
    keep_8bit = precision not in _FLOAT_DTYPES
    if keep_8bit and not (has_float8 := holds_float8(runtime.device)) and precision == "fp8":
        raise OptionError(
            f"Precision fp8 needs a device that holds float8 numbers, and {runtime.device} does "
            "not: choose int8 or bf16."
        )
    float8 = [entry for entry in info.tensors.values() if entry.dtype in FLOAT8_DTYPES]
    if keep_8bit and float8 and not has_float8:
        keep_8bit = False
        logger.warning(
            "%s stores weights in fp8, which %s cannot hold: they are dequantized to bfloat16 "
            "while loading and take %.1f GB instead of %.1f GB.",
            shown(info.path.name),
            runtime.device,
            2e-9 * sum(entry.num_bytes for entry in float8),
            1e-9 * sum(entry.num_bytes for entry in float8),
        )
    transformer = _assemble(
        info,
        lambda: SkyReelsTransformer(config),
        lambda name: transformer_sources(name, info.layout),
        keep_8bit=keep_8bit,
        keep_blocks=precision == "auto",
        storage=lambda name: weight_format if is_quantizable(name, config.num_layers) else None,
        compute_dtype=compute_dtype,
        runtime=runtime,
    )
    transformer.source = Source(info, _stamps(info))
    return transformer


def load_vae(path: str | PathLike[str], *, precision: str = "auto", runtime: Runtime) -> VideoVAE:
    """Load the HunyuanVideo VAE onto `runtime.offload_device`.

    Args:
        path: either key layout, .safetensors or .pt (plain weights only), or a diffusers folder.
        precision: "auto" is bfloat16 on a CUDA device and float32 elsewhere.
        runtime: as for `load_transformer`.

    Returns:
        The module in eval mode, without gradients.

    Raises:
        CheckpointError: unreadable, another family or another VAE, tensors missing, left over, of
            the wrong shape, or not finite.
        OptionError: unknown precision.
    """
    _check_precision(precision, VAE_PRECISIONS)
    info = check_vae(path)
    config = info.config
    assert isinstance(config, VAEConfig)
    if precision == "auto":
        precision = "bf16" if runtime.device.type == "cuda" else "fp32"
    levels = len(config.block_out_channels)
    vae = _assemble(
        info,
        lambda: VideoVAE(config),
        lambda name: vae_sources(name, info.layout, levels),
        keep_8bit=False,
        keep_blocks=False,
        storage=lambda name: None,
        compute_dtype=_FLOAT_DTYPES[precision],
        runtime=runtime,
    )
    vae.source = Source(info, _stamps(info))
    return vae


@dataclass(frozen=True)
class Source:
    """Where the weights of a transformer or a VAE came from.

    Attributes:
        info: of the checkpoint.
        stamps: size and time of the last change of each of its files, as they were.
    """

    info: CheckpointInfo
    stamps: dict[Path, tuple[int, int]]

    @property
    def is_unchanged(self) -> bool:
        """Whether the files are still those that were read, by size and time."""
        try:
            return _stamps(self.info) == self.stamps
        except OSError:
            return False


def checkpoint_of(transformer: SkyReelsTransformer) -> CheckpointInfo | None:
    """What a transformer was loaded from.

    Args:
        transformer: from `load_transformer`, or made otherwise.

    Returns:
        None if it was made otherwise.
    """
    return transformer.source.info if isinstance(transformer.source, Source) else None


def _stamps(info: CheckpointInfo) -> dict[Path, tuple[int, int]]:
    found = {}
    for file in {entry.file for entry in info.tensors.values()}:
        status = file.stat()
        found[file] = (status.st_size, status.st_mtime_ns)
    return found


def reload_parameters(
    transformer: SkyReelsTransformer, names: Collection[str], device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Read parameters of a loaded transformer again, in the bits in which they were loaded.

    Args:
        transformer: from `load_transformer`.
        names: of parameters that are not in 8 bits or in blocks.
        device: that dequantized GGUF blocks when they were loaded.

    Yields:
        Each name and its tensor on the CPU, in the compute dtype.

    Raises:
        CheckpointError: the transformer was not loaded from a file, or the file has changed.
    """
    if not names:
        return
    source = transformer.source
    if not isinstance(source, Source):
        raise CheckpointError(
            "The weights cannot be read again, because this transformer was not loaded from a "
            "file: load it with load_transformer."
        )
    info = source.info
    try:
        is_same = _stamps(info) == source.stamps
    except OSError:
        is_same = False
    if not is_same:
        raise CheckpointError(
            f"{info.path.name} was changed, moved or deleted since it was loaded, and its weights "
            "must be read again: put it back, or load the transformer again."
        )
    with shapes_only():
        unfilled = SkyReelsTransformer(transformer.config)
    shapes = {name: tuple(p.shape) for name, p in unfilled.state_dict().items()}
    plan = _plan(info, shapes, lambda name: transformer_sources(name, info.layout))
    targets = {target.name: target for target in plan}
    with ExitStack() as stack:
        reader = _Reader(stack)
        for name in names:
            weight, scale, kind = _read_target(
                info, reader, targets[name], transformer.compute_dtype
            )
            if kind:
                weight = unpack_on(device, weight, kind)
            weight = _upcast(info, targets[name], weight, scale, transformer.compute_dtype)
            yield name, torch.cat(weight.chunk(2)[::-1]) if targets[name].swap_halves else weight


@contextmanager
def open_reader() -> Iterator[Callable[[TensorEntry], Tensor]]:
    """Read single tensors of a checkpoint, whose files stay open inside the block.

    Yields:
        The function that reads an entry of `CheckpointInfo.tensors` onto the CPU.
    """
    with ExitStack() as stack:
        yield _Reader(stack).read


@lru_cache
def holds_float8(device: torch.device) -> bool:
    """Whether float8 weights can be on a device: MPS and some older GPUs refuse them."""
    try:
        torch.zeros(1, dtype=torch.float8_e4m3fn).to(device).to(torch.bfloat16)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        if is_passing(error):
            raise
        return False
    return True


def _weight_format(precision: str, config: TransformerConfig) -> QuantFormat | None:
    """The format of quantized block linears; one Hadamard block, which divides all their widths."""
    if precision not in STORAGE_DTYPES:
        return None
    storage_dtype, hidden = STORAGE_DTYPES[precision], config.hidden_size
    if storage_dtype != torch.int8:
        return QuantFormat(storage_dtype)
    return QuantFormat(storage_dtype, hadamard_block_size(hidden, int(hidden * config.mlp_ratio)))


def check_transformer(path: str | PathLike[str]) -> CheckpointInfo:
    """Refuse what `load_transformer` could not load, from the header alone.

    Returns:
        What the checkpoint is.

    Raises:
        CheckpointError: unreadable, another family, or another variant (33 channels, FramePack).
    """
    info = inspect(path, "transformer")
    require(info, "transformer")
    config = info.config
    assert isinstance(config, TransformerConfig)
    if info.variant == "framepack":
        raise CheckpointError(
            f"{info.path.name} is FramePack, another model on the base of HunyuanVideo (it has "
            f"tensors {FRAMEPACK_PREFIX}*): use {I2V_FILE}."
        )
    if config.in_channels not in (config.out_channels, 2 * config.out_channels):
        raise CheckpointError(
            f"{info.path.name} has {config.in_channels} input channels ({info.variant}), and "
            f"SkyReels image-to-video has {2 * config.out_channels} (noise and image latents), "
            f"text-to-video {config.out_channels}: use {I2V_FILE}."
        )
    return info


def check_vae(path: str | PathLike[str]) -> CheckpointInfo:
    """Refuse what `load_vae` could not load, from the header alone.

    Returns:
        What the checkpoint is.

    Raises:
        CheckpointError: unreadable, another family, or of sizes that the VAE cannot have.
    """
    info = inspect(path, "vae")
    require(info, "vae")
    config = info.config
    assert isinstance(config, VAEConfig)
    if config.latent_channels != LATENT_CHANNELS:
        raise CheckpointError(
            f"{info.path.name} is a VAE with {config.latent_channels} latent channels, and "
            f"HunyuanVideo's has {LATENT_CHANNELS}: use {VAE_FILE}."
        )
    if (config.in_channels, config.out_channels) != (3, 3):
        raise CheckpointError(
            f"{info.path.name} is a VAE of pictures with {config.in_channels} channels in and "
            f"{config.out_channels} out, and HunyuanVideo's has 3: use {VAE_FILE}."
        )
    bad = [c for c in config.block_out_channels if c % config.norm_num_groups]
    if bad:
        raise CheckpointError(
            f"{info.path.name} has {bad[0]} channels, not a multiple of {config.norm_num_groups} "
            "norm groups: load its folder, whose config.json says how many groups it has."
        )
    return info


def _check_precision(precision: str, legal: tuple[str, ...]) -> None:
    if precision not in legal:
        fix = " (the transformer's range exceeds fp16)" if precision == "fp16" else ""
        raise OptionError(f"Precision {precision!r} is not one of {', '.join(legal)}{fix}.")


def _main_dtype(info: CheckpointInfo) -> torch.dtype:
    """The dtype in which most parameters are stored; that of bytes for GGUF blocks of all types."""
    counts: Counter[torch.dtype] = Counter()
    for name, count in info.dtypes.items():
        counts[DTYPES.get(name, torch.uint8)] += count
    return counts.most_common(1)[0][0]


# --- the plan -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """One source tensor of a parameter, and its scale if it has one."""

    entry: TensorEntry
    scale: TensorEntry | None


@dataclass(frozen=True)
class _Target:
    """One parameter of the module: its name, shape, and the parts joined along dim 0."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[_Part, ...]
    swap_halves: bool


def _plan(
    info: CheckpointInfo,
    shapes: dict[str, tuple[int, ...]],
    sources: Callable[[str], tuple[str, ...]],
) -> list[_Target]:
    """Match every parameter with tensors of the file, from the header alone.

    Args:
        info: of the file.
        shapes: of the module's parameters, by name.
        sources: parameter name -> the names of its tensors in the file.

    Returns:
        One target for each parameter.

    Raises:
        CheckpointError: a tensor is missing, left over or of the wrong shape.
    """
    targets, missing, used = [], [], set()
    for name, shape in shapes.items():
        parts = []
        for source in sources(name):
            entry = info.tensors.get(source)
            if entry is None:
                missing.append(source)
                continue
            used.add(source)
            parts.append(_Part(entry, _find_scale(info, source)))
        if len(parts) == len(sources(name)):
            swap = (info.layout, name.rpartition(".")[0]) in HALF_SWAPPED
            targets.append(_Target(name, shape, tuple(parts), swap))
    unknown = [n for n in info.tensors if n not in used and not n.endswith(COMPANION_SUFFIXES)]
    for problem, names in (("lacks", missing), ("contains unknown", unknown)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise CheckpointError(
                f"{info.path.name} {problem} tensors {', '.join(map(shown, names[:5]))}{more}: it "
                "is an incomplete conversion or of another model; choose another file."
            )
    for target in targets:
        _check_shape(info, target)
        for part in target.parts:
            _check_scale(info, part)
    return targets


def _find_scale(info: CheckpointInfo, source: str) -> TensorEntry | None:
    layer, _, suffix = source.rpartition(".")
    if suffix != "weight":
        return None
    for scale_suffix in SCALE_SUFFIXES.values():
        if (entry := info.tensors.get(layer + scale_suffix)) is not None:
            return entry
    return None


def _check_scale(info: CheckpointInfo, part: _Part) -> None:
    """Refuse a scale that is neither one number nor one for each row."""
    if part.scale is None:
        return
    rows, shape = part.entry.shape[0], part.scale.shape
    per_row = shape in ((rows,), (rows, 1)) and len(part.entry.shape) == 2
    if math.prod(shape) != 1 and not per_row:
        raise CheckpointError(
            f"{info.path.name} has {shown(part.scale.name)} of shape {list(shape)} for a weight of "
            f"{list(part.entry.shape)}; a scale must be one number, or one for each row of a "
            "matrix: use the bf16, fp8 or scaled fp8 file."
        )


def _split_rows(info: CheckpointInfo, target: _Target) -> list[int]:
    """Number of rows of each part: all but the last of several have the model's width."""
    leading = len(target.parts) - 1
    if leading == 0 or not isinstance(info.config, TransformerConfig):
        return [target.shape[0]]
    hidden = info.config.hidden_size
    return [*[hidden] * leading, target.shape[0] - leading * hidden]


def _check_shape(info: CheckpointInfo, target: _Target) -> None:
    fits = True
    for part, rows in zip(target.parts, _split_rows(info, target), strict=True):
        shape = _squeezed(part.entry.shape, target.shape)
        dtype = part.entry.dtype
        in_blocks = bool(part.entry.block_type)
        stores_integers = not (dtype.is_floating_point or dtype == torch.int8 or in_blocks)
        if stores_integers or (dtype == torch.int8 and part.scale is None):
            raise CheckpointError(
                f"{info.path.name} stores {shown(part.entry.name)} as {DTYPE_NAMES[dtype]}, a "
                "quantisation this package cannot read: use the bf16, fp8 or scaled fp8 file."
            )
        fits = fits and shape == (rows, *target.shape[1:])
    if not fits:
        got = ", ".join(str(list(part.entry.shape)) for part in target.parts)
        raise CheckpointError(
            f"{info.path.name} has {shown(target.parts[0].entry.name)} of shape {got}, and "
            f"{target.name} must be {list(target.shape)}: it is of another model; choose another "
            "file."
        )


def _squeezed(shape: tuple[int, ...], target: tuple[int, ...]) -> tuple[int, ...]:
    """Drop the trailing ones of a 1x1x1 convolution that becomes a linear layer."""
    extra = len(shape) - len(target)
    return shape[:-extra] if extra > 0 and set(shape[-extra:]) == {1} else shape


# --- reading ------------------------------------------------------------------------------------


class _Reader:
    """The open files of a checkpoint; reads one tensor at a time into given memory."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._files: dict[Path, IO[bytes]] = {}
        self._pickles: dict[Path, dict[str, Tensor]] = {}

    def read_into(self, out: Tensor, entry: TensorEntry) -> None:
        """Fill `out` (contiguous, the entry's dtype) with the tensor's bytes.

        Raises:
            CheckpointError: the file has become shorter.
        """
        if entry.is_pickled:
            if entry.file not in self._pickles:
                self._pickles[entry.file] = load_pickle(entry.file, "cpu")
            out.copy_(self._pickles[entry.file][entry.name].reshape(out.shape))
            return
        if entry.file not in self._files:
            # unbuffered: a tensor is one large read
            self._files[entry.file] = self._stack.enter_context(entry.file.open("rb", 0))
        file = self._files[entry.file]
        file.seek(entry.offset)
        view = memoryview(out.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        done = 0
        while done < entry.num_bytes:
            count = file.readinto(view[done:])  # type: ignore[attr-defined]
            if not count:
                raise CheckpointError(
                    f"{entry.file.name} ended inside tensor {shown(entry.name)}: it changed while "
                    "being read; load it again."
                )
            done += count

    def read(self, entry: TensorEntry) -> Tensor:
        """Read a tensor, or the bytes of its blocks, into memory of its own."""
        out = torch.empty(entry.stored_shape, dtype=entry.dtype)
        self.read_into(out, entry)
        return out


def _assemble(
    info: CheckpointInfo,
    build: Callable[[], ModuleT],
    sources: Callable[[str], tuple[str, ...]],
    *,
    keep_8bit: bool,
    keep_blocks: bool,
    storage: Callable[[str], QuantFormat | None],
    compute_dtype: torch.dtype,
    runtime: Runtime,
) -> ModuleT:
    """Build a module and fill it from a checkpoint.

    Args:
        info: of the checkpoint.
        build: makes the module; called on the meta device.
        sources: parameter name -> the names of its tensors in the file.
        keep_8bit: whether 8-bit weights of the file stay 8-bit in the block linears.
        keep_blocks: whether GGUF blocks of the file stay so there.
        storage: parameter name -> the format a linear weight is quantized to, or None.
        compute_dtype: of everything else.
        runtime: as for `load_transformer`.

    Returns:
        The module in eval mode, on `runtime.offload_device`.
    """
    with shapes_only():
        module = build()
    shapes = {name: tuple(p.shape) for name, p in module.state_dict().items()}
    targets = _plan(info, shapes, sources)
    total = sum(part.entry.num_bytes for target in targets for part in target.parts)
    done = 0
    device = runtime.offload_device
    report = in_parts(runtime, "load", total)
    with ExitStack() as stack, torch.inference_mode(False), torch.no_grad():
        reader = _Reader(stack)
        _check_formats(info, reader)
        for target in targets:
            runtime.check_interrupt()
            weight, scale, kind = _read_target(info, reader, target, compute_dtype)
            layer_name, _, attribute = target.name.rpartition(".")
            layer = module.get_submodule(layer_name)
            is_linear = attribute == "weight" and isinstance(layer, nn.Linear)
            in_block = target.name.startswith(BLOCK_STEMS)
            quant_format = storage(target.name) if is_linear else None
            if kind and not (keep_blocks and is_linear and in_block):
                weight, kind = unpack_on(runtime.device, weight, kind), ""
            if kind:
                bias = dict(layer.named_parameters()).get("bias")
                module.set_submodule(layer_name, BlockLinear(weight.to(device), kind, bias))
                done += sum(part.entry.num_bytes for part in target.parts)
                report(done)
                continue
            hadamard_block, weight_only = 0, True
            if quant_format is not None and _is_stored_as(weight, quant_format.dtype):
                weight_only = weight.dtype == torch.int8  # an int8 file is not rotated
            elif quant_format is not None:
                if _is_8bit(weight) or scale is not None:
                    weight = dequantize(weight, scale, torch.float32)
                hadamard_block, weight_only = quant_format.hadamard_block, False
                weight, scale = quantize(weight, quant_format.dtype, hadamard_block, runtime.device)
            elif not (_is_8bit(weight) and keep_8bit and is_linear and in_block):
                weight = _upcast(info, target, weight, scale, compute_dtype)
                scale = None
            if target.swap_halves:
                weight = torch.cat(weight.chunk(2)[::-1])
            if _is_8bit(weight):
                quantized = QuantLinear(
                    weight.to(device),
                    None if scale is None else scale.to(device),
                    dict(layer.named_parameters()).get("bias"),
                    hadamard_block=hadamard_block,
                    weight_only=weight_only,
                    compute_dtype=compute_dtype,
                )
                module.set_submodule(layer_name, quantized)
            else:
                parameter = nn.Parameter(weight.to(device), requires_grad=False)
                setattr(layer, attribute, parameter)
            done += sum(part.entry.num_bytes for part in target.parts)
            report(done)
    return module.eval()


def fill_module(
    info: CheckpointInfo,
    build: Callable[[], ModuleT],
    sources: Callable[[str], tuple[str, ...]],
    *,
    keep_8bit: bool,
    compute_dtype: torch.dtype,
    runtime: Runtime,
) -> ModuleT:
    """Build a module of another library and fill it from a checkpoint.

    Args:
        info: of the checkpoint, with the tensors that the module must use and no others.
        build: makes the module; called on the meta device, where its buffers stay.
        sources: parameter name -> the names of its tensors in the file.
        keep_8bit: whether 8-bit weights of the file stay 8-bit in the linear layers of BLOCK_STEMS.
        compute_dtype: of everything else.
        runtime: as for `load_transformer`.

    Returns:
        The module in eval mode, on `runtime.offload_device`.

    Raises:
        CheckpointError: tensors missing, left over, of the wrong shape, or not finite.
    """
    return _assemble(
        info,
        build,
        sources,
        keep_8bit=keep_8bit,
        keep_blocks=False,
        storage=lambda name: None,
        compute_dtype=compute_dtype,
        runtime=runtime,
    )


def _is_8bit(weight: Tensor) -> bool:
    return weight.dtype == torch.int8 or weight.dtype in FLOAT8_DTYPES


def _is_stored_as(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether a weight needs no quantization to `dtype`; e5m2 counts as fp8."""
    return weight.dtype == dtype or (dtype in FLOAT8_DTYPES and weight.dtype in FLOAT8_DTYPES)


def _check_formats(info: CheckpointInfo, reader: _Reader) -> None:
    """Refuse 8-bit formats other than values with a scale (ComfyUI v1 names the format)."""
    formats = {}
    try:
        described = json.loads(info.metadata.get("_quantization_metadata", "{}"))
        formats = {name: value["format"] for name, value in described.get("layers", {}).items()}
        for name, entry in info.tensors.items():
            if name.endswith(".comfy_quant"):
                described = json.loads(reader.read(entry).numpy().tobytes())
                formats[name] = described["format"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(
            f"{info.path.name} has a description of its quantisation that cannot be read: use the "
            "bf16, fp8 or scaled fp8 file."
        ) from None
    for name, kind in formats.items():
        if kind not in ("float8_e4m3fn", "float8_e5m2"):
            raise CheckpointError(
                f"{info.path.name} stores {name.removesuffix('.comfy_quant')} as {kind}, a "
                "quantisation this package cannot read: use the bf16, fp8 or scaled fp8 file."
            )


def _upcast(
    info: CheckpointInfo,
    target: _Target,
    weight: Tensor,
    scale: Tensor | None,
    compute_dtype: torch.dtype,
) -> Tensor:
    """Dequantize or cast a weight to the compute dtype; refuse what overflows in it."""
    if weight.dtype == compute_dtype and scale is None:
        return weight
    upcast = dequantize(weight, scale, compute_dtype)
    if not _is_finite(upcast):
        fix = "" if compute_dtype == torch.float32 else "choose precision fp32, or "
        raise CheckpointError(
            f"{info.path.name} has values in {shown(target.parts[0].entry.name)} beyond the range "
            f"of {str(compute_dtype).removeprefix('torch.')}: {fix}use another file."
        )
    return upcast


def _read_target(
    info: CheckpointInfo, reader: _Reader, target: _Target, compute_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, str]:
    """Read and join the parts of a parameter.

    Returns:
        The weight, its scale (float32, [] or [rows, 1]) or None, and the type of its blocks or "".
        Parts of one dtype keep it, and their scales are joined; parts of several dtypes are joined
        in the compute dtype. Blocks are [rows, bytes]; those that are not whole in a row come in
        float32.

    Raises:
        CheckpointError: NaN, infinity, or a scale that is not positive.
    """
    kinds = {part.entry.dtype_name for part in target.parts}
    scaled = any(part.scale is not None for part in target.parts)
    if len(kinds) > 1:
        pieces = []
        for part in target.parts:
            piece = reader.read(part.entry)
            _check_finite(info, part.entry, piece)
            if part.entry.block_type:
                piece = unpack(piece, part.entry.block_type, compute_dtype)
            piece = piece.reshape(-1, *target.shape[1:])
            pieces.append(dequantize(piece, _read_scale(reader, part), compute_dtype))
        return torch.cat(pieces), None, ""
    if target.parts[0].entry.block_type:
        return _read_blocks(info, reader, target)

    weight = torch.empty(target.shape, dtype=target.parts[0].entry.dtype)
    row = 0
    for part in target.parts:
        rows = part.entry.shape[0]
        reader.read_into(weight[row : row + rows], part.entry)
        row += rows
    _check_finite(info, target.parts[0].entry, weight)
    if not scaled:
        return weight, None, ""
    scales = []
    for part in target.parts:
        scale = _read_scale(reader, part)
        scale = torch.ones(1, 1) if scale is None else scale
        if len(target.parts) > 1:
            scale = scale.expand(part.entry.shape[0], 1)
        scales.append(scale)
    joined = torch.cat(scales).contiguous()
    if not bool((joined > 0).all()) or not bool(joined.isfinite().all()):
        raise CheckpointError(
            f"{info.path.name} has a scale of {shown(target.parts[0].entry.name)} that is not a "
            "positive number: the file is damaged; download it again, or use another one."
        )
    return weight, joined if joined.numel() > 1 else joined.reshape(()), ""


def _read_blocks(
    info: CheckpointInfo, reader: _Reader, target: _Target
) -> tuple[Tensor, None, str]:
    """Read and join parts in GGUF blocks of one type, as `_read_target` returns them."""
    entries = [part.entry for part in target.parts]
    kind = entries[0].block_type
    pieces = [reader.read(entry) for entry in entries]
    for entry, piece in zip(entries, pieces, strict=True):
        _check_finite(info, entry, piece)
    if len(target.shape) == 2 and all(
        len(p) == e.shape[0] for p, e in zip(pieces, entries, strict=True)
    ):
        return torch.cat(pieces), None, kind
    floats = [unpack(piece, kind, torch.float32).reshape(-1) for piece in pieces]
    return torch.cat(floats).reshape(target.shape), None, ""


def unpack_on(device: torch.device, data: Tensor, kind: str) -> Tensor:
    """Dequantize rows of blocks, some rows at a time on a device.

    Args:
        device: does the work.
        data: [rows, bytes] uint8.
        kind: of blocks.BLOCK_TYPES.

    Returns:
        [rows, columns] float32, where `data` is.
    """
    rows = max(1, UNPACKED_ELEMENTS // (2 * data.shape[1]))
    pieces = (unpack(p.to(device), kind, torch.float32) for p in torch.split(data, rows))
    return torch.cat([piece.to(data.device) for piece in pieces])


def _read_scale(reader: _Reader, part: _Part) -> Tensor | None:
    """Read a part's scale: [rows, 1] or [1, 1] float32, or None."""
    if part.scale is None:
        return None
    return reader.read(part.scale).float().reshape(-1, 1)


def _check_finite(info: CheckpointInfo, entry: TensorEntry, weight: Tensor) -> None:
    if not _is_finite(factors(weight, entry.block_type) if entry.block_type else weight):
        raise CheckpointError(
            f"{info.path.name} has NaN or infinity in tensor {shown(entry.name)}: the file is "
            "damaged; download it again."
        )


def _is_finite(weight: Tensor) -> bool:
    """Whether a tensor of any dtype contains neither NaN nor infinity."""
    # in pieces, because the sum below copies what is not float32
    if weight.numel() > CHECKED_ELEMENTS:
        return all(map(_is_finite, torch.split(weight.flatten(), CHECKED_ELEMENTS)))
    if weight.dtype in FLOAT8_DTYPES:
        magnitudes = weight.view(torch.uint8) & 0x7F
        # e4m3fn: only 0x7f is NaN; e5m2: everything from 0x7c up is infinity or NaN
        limit = 0x7F if weight.dtype == torch.float8_e4m3fn else 0x7C
        return weight.numel() == 0 or bool(magnitudes.max() < limit)
    if not weight.dtype.is_floating_point:
        return True
    # a sum reads the weight once; it is finite unless an element is not, or many are near the limit
    sum_dtype = torch.promote_types(weight.dtype, torch.float32)
    return math.isfinite(weight.sum(dtype=sum_dtype).item()) or bool(weight.isfinite().all())
