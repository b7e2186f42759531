"""A LoRA file as changes to our parameters.

All dialects end as one thing: a `Change` of some rows of one parameter, in float32, with its scale
folded in. What a file means is decided by its names and shapes and, for PEFT, by its description of
itself; a tensor that would be dropped or misread is an error, not a smaller effect.

Scales: `alpha / rank`, where a file has an alpha; an alpha of 0 means that of the rank, as in
musubi-tuner; without one 1. PEFT keeps r, alpha and rsLoRA (alpha / sqrt(r)) in the file's metadata
or in adapter_config.json beside it.

Sources: ComfyUI's weight adapters and PEFT's LoRA layers; see weights/dialects.py for the writers.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...config import TransformerConfig
from ...errors import CheckpointError, shown
from ..dialects import is_text_encoder_key, lora_key, refused_method
from ..entries import DTYPE_NAMES, TensorEntry
from ..inspect import COMPANION_SUFFIXES, inspect
from ..load import open_reader
from .names import Place, find, parameter_shapes, spellings

#: of adapter_config.json
MAX_CONFIG_BYTES = 1_000_000
#: the patch embedder; text-to-video models have half of its input channels
PATCH_EMBEDDER = "img_in.proj"
#: names in a message
NAMED = 3


@dataclass(frozen=True, eq=False)
class Change:
    """What a LoRA adds to some rows of a parameter at strength 1.

    Attributes:
        parameter: name of it.
        rows: the first and the one after the last.
        method: "low-rank" (up [rows, r], down [r, columns]), "hadamard" (two such pairs, whose
            products are multiplied number by number), "kronecker" (two matrices, or one and a
            pair), "difference" (the sum itself), or "value" (what it is to become).
        tensors: float32, scale included; a "difference" or "value" in the dtype of the file.
        magnitude: DoRA's, [rows, 1] or [1, columns]; None for others.
    """

    parameter: str
    rows: tuple[int, int]
    method: str
    tensors: tuple[Tensor, ...] = field(repr=False)
    magnitude: Tensor | None = field(default=None, repr=False)


@dataclass(frozen=True, eq=False)
class Lora:
    """A LoRA file, read for the transformer.

    Attributes:
        path: of the file.
        digest: SHA-256 of the file.
        dialect: who writes such files, and the method unless it is plain LoRA.
        changes: in the order of the file.
        num_matched: tensors that act.
        ignored: names of tensors of text encoders and embeddings.
        unknown: names that are no module of the transformer.
        notes: about modules that do not fit and are left out, and a foreign base model.
    """

    path: Path
    digest: str
    dialect: str
    changes: tuple[Change, ...] = field(repr=False)
    num_matched: int
    ignored: tuple[str, ...] = field(repr=False)
    unknown: tuple[str, ...] = field(repr=False)
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """For messages."""
        return shown(self.path.name)


def load_lora(path: str | os.PathLike[str], config: TransformerConfig) -> Lora:
    """Read a LoRA for a transformer of these sizes.

    Args:
        path: a .safetensors or .pt file of any dialect of weights/dialects.py.
        config: of the transformer, from its `config`.

    Returns:
        Its changes, on the CPU.

    Raises:
        CheckpointError: unreadable; not a LoRA, or none for this model; a method that is not
            supported; shapes that do not fit; NaN or infinity.
    """
    path = Path(path)
    info = inspect(path)
    if info.family != "lora":
        raise CheckpointError(
            f"{shown(path.name)} is not a LoRA: its first tensors are "
            f"{_listed(list(info.tensors))}. Choose a LoRA for HunyuanVideo.",
            info.family,
        )
    names = list(info.tensors)
    if method := refused_method(names):
        raise CheckpointError(
            f"{shown(path.name)} is a LoRA of the kind {method}, which is not supported: use one "
            "saved as LoRA, LoHa, LoKr or DoRA."
        )
    companions = [name for name in names if name.endswith(COMPANION_SUFFIXES)]
    if companions:
        raise CheckpointError(
            f"{shown(path.name)} has scaled 8-bit factors ({_listed(companions)}), which are not "
            "supported: use the LoRA saved in bf16, fp16, fp32 or plain fp8."
        )
    groups, ignored, unknown = _sort(path, info.tensors, config)
    if not groups:
        raise CheckpointError(
            f"{shown(path.name)} changes nothing of a HunyuanVideo transformer: its names, such as "
            f"{_listed(unknown or ignored)}, look like {info.layout}. Choose a LoRA for "
            "HunyuanVideo."
        )
    description = _peft_description(path, info.metadata, info.layout)
    changes: list[Change] = []
    skipped: list[str] = []
    scales = _Scales(path, description, list(groups))
    with open_reader() as read:
        file = _File(path, read, config)
        for module, (place, roles) in groups.items():
            if reason := _foreign_channels(place, roles, config):
                skipped.append(f"{shown(module)} {reason}")
                continue
            changes += file.changes(place, roles, scales.of(module))
    if not changes:
        raise CheckpointError(f"{shown(path.name)} cannot be used: {'; '.join(skipped)}.")
    return Lora(
        path=path,
        digest=file_digest(path),
        dialect=info.layout,
        changes=tuple(changes),
        num_matched=len(names) - len(ignored) - len(unknown),
        ignored=tuple(ignored),
        unknown=tuple(unknown),
        notes=(*skipped, *_foreign_base(info.metadata)),
    )


def _foreign_base(metadata: Mapping[str, str]) -> list[str]:
    """Whether the metadata names another base: FLUX has layers of the same names and sizes."""
    texts = [metadata.get(key, "") for key in ("modelspec.architecture", "ss_base_model_version")]
    said = next((text for text in texts if text), "")
    if not said or any(name in said.lower() for name in ("hunyuan", "hyv", "skyreels")):
        return []
    return [f"its metadata says that it was trained for {shown(said)}"]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(shown, names[:NAMED]))


def file_digest(path: Path) -> str:
    """SHA-256 of all bytes of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


# --- names to groups ----------------------------------------------------------------------------

#: role -> the tensor that plays it
_Roles = dict[str, TensorEntry]
#: rank, or None where there is none -> scale; takes the file's alpha, if any
_Scale = Callable[[int | None, float | None], float]


def _sort(
    path: Path, tensors: Mapping[str, TensorEntry], config: TransformerConfig
) -> tuple[dict[str, tuple[Place, _Roles]], list[str], list[str]]:
    """Group tensors by the module that they change.

    Returns:
        The module as the file spells it -> where it acts, and its tensors; then the names that are
        ignored, and those that are unknown.

    Raises:
        CheckpointError: two tensors play the same role for a module.
    """
    table = spellings(config)
    groups: dict[str, tuple[Place, _Roles]] = {}
    ignored, unknown = [], []
    spelled: dict[Place, tuple[str, str]] = {}
    for name, entry in tensors.items():
        key = lora_key(name)
        if is_text_encoder_key(name):
            ignored.append(name)
            continue
        place = None if key is None else find(table, key.module)
        if key is None or place is None:
            unknown.append(name)
            continue
        roles = groups.setdefault(key.module, (place, {}))[1]
        first = spelled.setdefault(place, (key.module, key.adapter))
        # an alpha names no adapter
        is_other = first[0] != key.module or (key.adapter and first[1] not in ("", key.adapter))
        if is_other or key.role in roles:
            raise CheckpointError(
                f"{shown(path.name)} changes {place.module} twice, also as {shown(name)}: save "
                "each adapter in a file of its own."
            )
        roles[key.role] = entry
    groups = {m: group for m, group in groups.items() if set(group[1]) != {"alpha"}}
    return groups, ignored, unknown


class _File:
    """The changes of a LoRA file, module by module."""

    def __init__(
        self, path: Path, read: Callable[[TensorEntry], Tensor], config: TransformerConfig
    ) -> None:
        self._path, self._read_entry = path, read
        self._shapes = parameter_shapes(config)

    def changes(self, place: Place, roles: _Roles, scale_of: _Scale) -> list[Change]:
        """What the tensors of a module change in its weight and its bias."""
        alpha = self._alpha(roles)
        found = []
        product = self._product(place, roles, lambda rank: scale_of(rank, alpha))
        if product is not None:
            found.append(self._with_magnitude(place, roles, product))
        elif "dora_scale" in roles:
            raise self._bad(roles["dora_scale"], "a magnitude without factors")
        found += self._bias(place, roles, lambda rank: scale_of(rank, alpha))
        for role, attribute, method in (
            ("diff", "weight", "difference"),
            ("diff_b", "bias", "difference"),
            ("set_weight", "weight", "value"),
        ):
            if role in roles:
                found.append(self._whole(place, roles[role], attribute, method))
        known = {
            "alpha",
            "dora_scale",
            "down",
            "up",
            "down_bias",
            "up_bias",
            "diff",
            "diff_b",
            "set_weight",
            *_LOHA,
            *_LOKR,
        }
        assert set(roles) <= known
        return found

    # --- one module ---

    def _read(self, entry: TensorEntry) -> Tensor:
        """A tensor of the file, in its dtype; refused if it is not finite."""
        if not entry.dtype.is_floating_point:
            raise self._bad(entry, f"stored as {DTYPE_NAMES[entry.dtype]}, not as floating point")
        if 0 in entry.shape:
            raise self._bad(entry, f"of shape {list(entry.shape)}, without numbers")
        tensor = self._read_entry(entry)
        if not bool(tensor.float().isfinite().all()):
            raise self._bad(entry, "with NaN or infinity")
        return tensor

    def _matrix(self, entry: TensorEntry) -> Tensor:
        """A factor in float32: convolutions flattened to [out, in * kernel]."""
        tensor = self._read(entry).float()
        if tensor.ndim < 2:
            raise self._bad(entry, f"of shape {list(entry.shape)}, which is no matrix")
        return tensor.flatten(1)

    def _bad(self, entry: TensorEntry, what: str) -> CheckpointError:
        return CheckpointError(
            f"{shown(self._path.name)} has {shown(entry.name)} {what}: it is damaged or of another "
            "kind; use another file."
        )

    def _alpha(self, roles: _Roles) -> float | None:
        if "alpha" not in roles:
            return None
        entry = roles["alpha"]
        if math.prod(entry.shape) != 1:
            raise self._bad(entry, f"of shape {list(entry.shape)}, not one number")
        alpha = float(self._read_entry(entry).float().item())
        if not math.isfinite(alpha):
            raise self._bad(entry, "with NaN or infinity")
        return alpha

    def _target(self, place: Place, attribute: str) -> tuple[str, tuple[int, ...]]:
        """Name of a parameter, and the shape of the rows that are changed."""
        name = f"{place.module}.{attribute}"
        shape = self._shapes[name]
        return name, (place.rows[1] - place.rows[0], *shape[1:])

    def _fit(self, place: Place, entry: TensorEntry, got: Sequence[int]) -> Callable[..., Tensor]:
        """Refuse a product that is not of the weight's shape; pad one with half its channels.

        Args:
            place: of the weight.
            entry: named in the refusal.
            got: rows and columns of the product.

        Returns:
            What makes the columns of a factor those of the weight.

        Raises:
            CheckpointError: names both shapes.
        """
        name, shape = self._target(place, "weight")
        rows, columns = shape[0], math.prod(shape[1:])
        if (got[0], got[1]) == (rows, columns):
            return lambda factor: factor
        if _is_half(place, got[1], columns) and got[0] == rows:
            return lambda factor: torch.nn.functional.pad(factor, (0, columns - got[1]))
        raise CheckpointError(
            f"{shown(self._path.name)} changes {name} by a matrix of {got[0]} x {got[1]} "
            f"({shown(entry.name)} is {list(entry.shape)}), and it must be {rows} x {columns}: it "
            "is a LoRA for another model."
        )

    def _product(
        self, place: Place, roles: _Roles, scale: Callable[[int | None], float]
    ) -> Change | None:
        """The change of a weight by factors; None if the module has none."""
        name = f"{place.module}.weight"
        for makers, make in (
            (("down", "up"), self._low_rank),
            (_LOHA, self._loha),
            (_LOKR, self._lokr),
        ):
            if set(makers) & set(roles):
                if name not in self._shapes or len(self._shapes[name]) < 2:
                    raise self._bad(next(iter(roles.values())), "for a layer without a matrix")
                method, tensors = make(place, roles, scale)
                if place.swaps_halves:
                    method, tensors = _swapped(method, tensors)
                return Change(name, place.rows, method, tensors)
        return None

    def _both(self, roles: _Roles, *names: str) -> list[TensorEntry]:
        missing = [name for name in names if name not in roles]
        if missing:
            raise self._bad(next(iter(roles.values())), f"without its {', '.join(missing)}")
        return [roles[name] for name in names]

    def _low_rank(
        self, place: Place, roles: _Roles, scale: Callable[[int | None], float]
    ) -> tuple[str, tuple[Tensor, ...]]:
        down_entry, up_entry = self._both(roles, "down", "up")
        down, up = self._matrix(down_entry), self._matrix(up_entry)
        self._check_pair(up_entry, up, down)
        pad = self._fit(place, up_entry, (len(up), down.shape[1]))
        return "low-rank", (up * scale(len(down)), pad(down))

    def _check_pair(self, entry: TensorEntry, up: Tensor, down: Tensor) -> None:
        if up.shape[1] != len(down):
            raise self._bad(
                entry,
                f"of {list(up.shape)} beside a factor of {list(down.shape)}, which cannot "
                "be multiplied",
            )

    def _loha(
        self, place: Place, roles: _Roles, scale: Callable[[int | None], float]
    ) -> tuple[str, tuple[Tensor, ...]]:
        entries = self._both(roles, *_LOHA[:4])
        if "hada_t1" in roles or "hada_t2" in roles:
            cores = self._both(roles, "hada_t1", "hada_t2")
            rank = entries[1].shape[0]
            products = [
                self._tucker(place, core, *entries[2 * i : 2 * i + 2])
                for i, core in enumerate(cores)
            ]
            return "difference", (scale(rank) * products[0] * products[1],)
        up1, down1, up2, down2 = (self._matrix(entry) for entry in entries)
        for entry, up, down in ((entries[0], up1, down1), (entries[2], up2, down2)):
            self._check_pair(entry, up, down)
            pad = self._fit(place, entry, (len(up), down.shape[1]))
        return "hadamard", (up1 * scale(len(down1)), pad(down1), up2, pad(down2))

    def _tucker(
        self, place: Place, core: TensorEntry, out: TensorEntry, inner: TensorEntry
    ) -> Tensor:
        """[rows, columns] of a convolution's kernel from a core [r, s, kernel] and two factors."""
        first, second = self._matrix(out), self._matrix(inner)
        cube = self._read(core).float()
        if cube.ndim < 3 or (len(first), len(second)) != tuple(cube.shape[:2]):
            raise self._bad(
                core,
                f"of {list(core.shape)} beside factors of {list(first.shape)} and "
                f"{list(second.shape)}, which cannot be multiplied",
            )
        cube = cube.flatten(2)
        pad = self._fit(place, core, (first.shape[1], second.shape[1] * cube.shape[2]))
        return pad(torch.einsum("rsk,ro,si->oik", cube, first, second).flatten(1))

    def _lokr(
        self, place: Place, roles: _Roles, scale: Callable[[int | None], float]
    ) -> tuple[str, tuple[Tensor, ...]]:
        ranks: list[int] = []

        def factors(which: str) -> list[Tensor]:
            if which in roles:
                return [self._matrix(roles[which])]
            entries = self._both(roles, f"{which}_a", f"{which}_b")
            up, down = map(self._matrix, entries)
            self._check_pair(entries[0], up, down)
            ranks.append(len(down))
            return [up, down]

        if "lokr_t2" in roles:
            raise self._bad(roles["lokr_t2"], "(a Tucker core of LoKr), which is not supported")
        small, large = factors("lokr_w1"), factors("lokr_w2")
        rows = len(small[0]) * len(large[0])
        columns = small[-1].shape[1] * large[-1].shape[1]
        entry = next(iter(roles.values()))
        self._fit(place, entry, (rows, columns))
        name, shape = self._target(place, "weight")
        if columns != math.prod(shape[1:]):
            raise self._bad(entry, f"for {name} with half of its channels, as LoKr")
        whole = small[0] @ small[1] if len(small) == 2 else small[0]
        # without a rank the scale is 1, whatever alpha says: the factors are whole matrices
        return "kronecker", (whole * scale(ranks[-1] if ranks else None), *large)

    def _with_magnitude(self, place: Place, roles: _Roles, change: Change) -> Change:
        if "dora_scale" not in roles:
            return change
        entry = roles["dora_scale"]
        magnitude = self._read(entry).float()
        _, shape = self._target(place, "weight")
        rows, columns = shape[0], math.prod(shape[1:])
        if magnitude.numel() == rows and (magnitude.ndim == 1 or magnitude.shape[0] == rows):
            magnitude = magnitude.reshape(rows, 1)
            if place.swaps_halves:
                magnitude = torch.cat(magnitude.chunk(2)[::-1])
        elif magnitude.numel() == columns and magnitude.shape[0] == 1:
            magnitude = magnitude.reshape(1, columns)
        else:
            raise self._bad(
                entry, f"of shape {list(entry.shape)} for a weight of {[rows, columns]}"
            )
        return replace(change, magnitude=magnitude)

    def _bias(
        self, place: Place, roles: _Roles, scale: Callable[[int | None], float]
    ) -> list[Change]:
        """PEFT's biases of the factors: up @ down_bias + up_bias."""
        if not {"up_bias", "down_bias"} & set(roles):
            return []
        name = f"{place.module}.bias"
        up = self._matrix(self._both(roles, "up")[0])
        bias = torch.zeros(len(up))
        if "up_bias" in roles:
            bias = self._read(roles["up_bias"]).float()
        if "down_bias" in roles:
            inner = self._read(roles["down_bias"]).float()
            if inner.shape != (up.shape[1],):
                raise self._bad(roles["down_bias"], f"of shape {list(inner.shape)}")
            bias = bias + up @ inner
        rows = place.rows[1] - place.rows[0]
        if bias.shape != (rows,) or name not in self._shapes:
            raise self._bad(roles.get("up_bias", roles["up"]), f"for a bias of [{rows}]")
        bias = bias * scale(up.shape[1])
        if place.swaps_halves:
            bias = torch.cat(bias.chunk(2)[::-1])
        return [Change(name, place.rows, "difference", (bias,))]

    def _whole(self, place: Place, entry: TensorEntry, attribute: str, method: str) -> Change:
        """A whole difference or value of a weight or bias."""
        if f"{place.module}.{attribute}" not in self._shapes:
            raise self._bad(entry, f"for a layer without {attribute}")
        name, shape = self._target(place, attribute)
        tensor = self._read(entry)
        tensor = tensor.float() if tensor.dtype.itemsize == 1 else tensor
        if len(shape) > 1 and tensor.ndim > 1:
            got = (len(tensor), tensor[0].numel())
            pad = self._fit(place, entry, got)
            if method == "value" and got[1] != math.prod(shape[1:]):
                raise self._bad(entry, f"of shape {list(entry.shape)} to replace {list(shape)}")
            tensor = pad(tensor.flatten(1))
        elif tuple(tensor.shape) != shape:
            raise self._bad(entry, f"of shape {list(entry.shape)}, and {name} is {list(shape)}")
        if place.swaps_halves:
            tensor = torch.cat(tensor.chunk(2)[::-1])
        return Change(name, place.rows, method, (tensor,))


_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
_LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")


def _is_half(place: Place, columns: int, needed: int) -> bool:
    """Whether a change of the patch embedder is for a text-to-video model."""
    return place.module == PATCH_EMBEDDER and 2 * columns == needed


def _foreign_channels(place: Place, roles: _Roles, config: TransformerConfig) -> str:
    """Why a change of the patch embedder is left out; empty if it fits or can be padded."""
    if place.module != PATCH_EMBEDDER:
        return ""
    kernel = config.patch_size_t * config.patch_size**2
    needed = config.in_channels * kernel
    entry = roles.get("down") or roles.get("diff")
    if entry is None or len(entry.shape) < 2:
        return ""
    columns = math.prod(entry.shape[1:])
    if columns == needed or _is_half(place, columns, needed) or columns % kernel:
        return ""
    channels = columns // kernel
    if channels not in (16, 32, 33):
        return ""
    return (
        f"is for a model with {channels} input channels, and this one has {config.in_channels}: it "
        "is left out"
    )


def _swapped(method: str, tensors: tuple[Tensor, ...]) -> tuple[str, tuple[Tensor, ...]]:
    """The same product with the halves of its rows exchanged."""

    def swap(tensor: Tensor) -> Tensor:
        return torch.cat(tensor.chunk(2)[::-1])

    if method == "kronecker":
        return "difference", (swap(product(method, tensors)),)
    # of each pair the first has the rows
    places = (0, 2) if method == "hadamard" else (0,)
    return method, tuple(swap(t) if i in places else t for i, t in enumerate(tensors))


def product(method: str, tensors: Sequence[Tensor]) -> Tensor:
    """The sum that a change adds, before DoRA.

    Args:
        method: of `Change`.
        tensors: of `Change`.

    Returns:
        [rows, columns], or [rows] for a bias or norm.
    """
    if method == "low-rank":
        return tensors[0] @ tensors[1]
    if method == "hadamard":
        up1, down1, up2, down2 = tensors
        return (up1 @ down1) * (up2 @ down2)
    if method == "kronecker":
        small, *large = tensors
        return torch.kron(small, large[0] @ large[1] if len(large) == 2 else large[0])
    return tensors[0].float()


# --- scales -------------------------------------------------------------------------------------


def _peft_description(path: Path, metadata: Mapping[str, str], dialect: str) -> dict[str, Any]:
    """What PEFT says of a LoRA: in the metadata, or beside a raw PEFT file; {} if nothing."""
    text = metadata.get("lora_adapter_metadata", "")
    config = path.with_name("adapter_config.json")
    try:
        if not text and dialect.startswith("raw PEFT") and config.is_file():
            if config.stat().st_size > MAX_CONFIG_BYTES:
                raise ValueError(f"{config.stat().st_size} bytes")
            text = config.read_text(encoding="utf-8")
        found = json.loads(text) if text else {}
        if not isinstance(found, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(
            f"The PEFT description of {shown(path.name)} cannot be read "
            f"({shown(str(error))}): save the LoRA again, or remove it to use a scale of 1."
        ) from None
    # diffusers puts the component in front of every key
    inner = {k.removeprefix("transformer."): v for k, v in found.items() if "text_enc" not in k}
    return inner


class _Scales:
    """The scale of each module."""

    def __init__(self, path: Path, description: Mapping[str, Any], modules: list[str]) -> None:
        self._path = path
        self._alpha = self._number(description, "lora_alpha")
        self._has_rslora = description.get("use_rslora") is True
        patterns = description.get("alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise self._bad("alpha_pattern", patterns)
        self._patterns: dict[str, float] = {}
        known = {end for module in modules for end in _ends(module)}
        for key in patterns:
            name = str(key).replace("\\.", ".").removeprefix("^").removesuffix("$")
            value = self._number(patterns, key)
            assert value is not None
            self._patterns[name] = value
            if name not in known:
                raise CheckpointError(
                    f"The PEFT description of {shown(path.name)} has an alpha for "
                    f"{shown(str(key))}, which is the name of no module in it: save it with plain "
                    "names."
                )

    def _bad(self, key: str, value: object) -> CheckpointError:
        return CheckpointError(
            f"The PEFT description of {shown(self._path.name)} has {shown(key)} "
            f"{shown(repr(value))}, which is no finite number: save the LoRA again."
        )

    def _number(self, values: Mapping[str, Any], key: str) -> float | None:
        value = values.get(key)
        if value is None and key not in values:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._bad(key, value)
        if not abs(value) < 1e30:  # nor NaN
            raise self._bad(key, value)
        return float(value)

    def of(self, module: str) -> _Scale:
        """The function from rank and the file's own alpha to the scale of a module."""
        described = [self._patterns[end] for end in _ends(module) if end in self._patterns]

        def scale(rank: int | None, alpha: float | None) -> float:
            if rank is None:
                return 1.0
            if alpha is not None:
                return alpha / rank if alpha else 1.0
            alpha = described[0] if described else self._alpha
            if alpha is None:
                return 1.0
            return alpha / (math.sqrt(rank) if self._has_rslora else rank)

        return scale


def _ends(module: str) -> list[str]:
    """A dotted name, and what is left of it without its first parts."""
    parts = module.split(".")
    return [".".join(parts[index:]) for index in range(len(parts))]
