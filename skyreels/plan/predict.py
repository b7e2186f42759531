"""What a run needs on this machine, before it starts: memory and time of each mode.

Memory is counted from shapes, as tests do it on shape-only tensors. Time is work over rates: of
matrix products, of attention, of memory and of the link, each measured once in a short probe and
remembered (outcomes.py). What a run then took corrects the next prediction of its kind.

The choice follows these rules. Weights keep the precision that was asked for; "auto" is the
file's own and never one that changes numbers. Everything stays on the device if it fits, with the
largest chunks that then fit; else blocks are streamed, and the smallest chunks leave the most room
for those that stay. A twentieth of the free memory, at least RESERVE_BYTES, is left. The decode is
the best that fits: in one pass, without seams, in tiles (vae/tiling.py).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from .. import outcomes
from ..config import CHUNKINGS, MAX_TEXT_TOKENS, TILINGS, TransformerConfig, VAEConfig
from ..errors import OutOfRoomError
from ..kernels.dispatch import DeviceInfo, describe
from ..latents import latent_shape, nearest_frames
from ..offload import module_tensors, reserve_bytes, weight_bytes, with_reserve
from ..outcomes import device_key, in_bytes, in_seconds
from ..runtime import FREE_HOST_BYTES, Runtime, free_host_bytes
from ..streaming import SLOTS, choose_resident, least_bytes, simulate
from ..transformer.attention import FAST_BYTES
from ..transformer.model import SkyReelsTransformer
from ..transformer.placement import choose_chunking, sampling_bytes
from ..transformer.quant import (
    CAPABILITIES,
    STORAGE_DTYPES,
    QuantLinear,
    is_quantizable,
)
from ..transformer.rates import known_rates, rates
from ..vae.budget import MEMORY_MARGIN
from ..vae.model import VideoVAE
from ..vae.tiling import (
    CHOOSING_MODES,
    DecodePlan,
    choose_decode,
    kind_of_decode,
    last_rung,
    plan_bytes,
    plan_flop,
)

#: hidden-sized tensors that a double and a single block move beside products and attention
#: (tests/engine/test_budget.py counts them), in 16 bits and where inputs are rounded to 8
MOVED_TENSORS = {False: (13.2, 9.1), True: (19.7, 17.2)}
#: pairs of prompt and step whose text and modulation are kept; with 256 tokens of text each, 256
#: are about 1 GB. Others are computed when they are looked up
MAX_KEPT = 256
#: frames that are tried, largest first, to find a clip that fits
SHORTER = (0.75, 0.5, 0.25, 0.0)


# --- what a plan is made from -------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """A device and what it reaches.

    Attributes:
        name: of the device.
        total_bytes: its memory.
        free_bytes: of it, what a run may use now.
        ram_bytes: free host memory.
        rates: "GEMM bf16" (fp32, fp8, int8; FLOP/s), "attention exact" and
            "convolution" (FLOP/s), "memory" and "link" (bytes/s). Times that need a missing one
            are unknown.
        corrections: kind of work -> seconds measured over seconds predicted, of earlier runs.
        info: what the dispatcher knows of the device.
        streams: whether weights can rest elsewhere than on the device.
    """

    name: str
    total_bytes: int
    free_bytes: int
    ram_bytes: int
    rates: Mapping[str, float] = field(default_factory=dict)
    corrections: Mapping[str, float] = field(default_factory=dict)
    info: DeviceInfo = DeviceInfo("cpu")  # noqa: RUF009 - frozen
    streams: bool = True

    @property
    def capability(self) -> tuple[int, int] | None:
        """Compute capability of an NVIDIA GPU."""
        return self.info.capability

    @property
    def usable_bytes(self) -> int:
        """Free memory less the reserve."""
        return self.free_bytes - (reserve_bytes(self.free_bytes) if self.streams else 0)


@dataclass(frozen=True)
class Job:
    """What is to be made.

    Attributes:
        width: in pixels.
        height: in pixels.
        num_frames: 4k + 1.
        num_steps: of the schedule.
        num_guided: of these, the steps with a negative prediction.
        text_tokens: of the longer prompt.
        held_bytes: what a step cache keeps through the run.
        config: sizes of the transformer.
        vae: of the VAE that decodes; None plans no decode.
        vae_dtype: it computes in.
    """

    width: int = 960
    height: int = 544
    num_frames: int = 97
    num_steps: int = 30
    num_guided: int = 30
    text_tokens: int = MAX_TEXT_TOKENS
    held_bytes: int = 0
    config: TransformerConfig = field(default_factory=TransformerConfig)
    vae: VAEConfig | None = field(default_factory=VAEConfig)
    vae_dtype: torch.dtype = torch.bfloat16

    @property
    def latent_shape(self) -> torch.Size:
        """[1, 16, T, h, w]."""
        return torch.Size(latent_shape(self.num_frames, self.height, self.width))

    @property
    def tokens(self) -> int:
        """Of image and text."""
        _, _, frames, height, width = self.latent_shape
        patch = self.config.patch_size
        return frames // self.config.patch_size_t * (height // patch) * (width // patch) + (
            self.text_tokens
        )

    @property
    def num_evaluations(self) -> int:
        """Forward passes of the run."""
        return self.num_steps + self.num_guided

    def __str__(self) -> str:
        return f"{self.num_frames} frames of {self.width}x{self.height}"


@dataclass(frozen=True)
class Weights:
    """A transformer's weights in one precision.

    Attributes:
        precision: as the loader is asked for it.
        gemm: how blocks are multiplied: "fp32", "bf16", "fp8" or "int8".
        is_exact: whether no number is rounded further than the file rounded it.
        is_dequantized: 8-bit weights are dequantized for every product.
        dtype: of the activations.
        blocks: bytes of each block in the loop, in the order in which they run.
        outside: bytes of the rest of the loop.
        conditioners: bytes of the largest group of conditioners that is loaded at a time.
        total: bytes of everything, which the host holds.
    """

    precision: str
    gemm: str
    is_exact: bool
    is_dequantized: bool
    dtype: torch.dtype
    blocks: tuple[int, ...]
    outside: int
    conditioners: int
    total: int

    @property
    def loop(self) -> int:
        """Bytes that every forward pass reads."""
        return sum(self.blocks) + self.outside


@dataclass(frozen=True)
class Choice:
    """What the user fixed; the defaults leave it to the planner.

    Attributes:
        attention: "exact" or "fast".
        decode: a name of config.DECODE_MODES.
        is_resident: True refuses to stream, False streams everything; None is what fits.
    """

    attention: str = "exact"
    decode: str = "auto"
    is_resident: bool | None = None


@dataclass(frozen=True)
class Plan:
    """One way to make a clip, and what it is expected to take.

    Attributes:
        precision: of the transformer.
        is_exact: see `Weights`; False as well with attention in 8 bits.
        attention: "exact" or "fast".
        chunking: a name of config.CHUNKINGS.
        activation_bytes: of a forward pass, beside the weights.
        resident_bytes: of the blocks, those that stay on the device.
        streamed_bytes: of the blocks, those copied in every forward pass.
        decode: mode or tiles of the decode; "" if none is planned.
        peak_bytes: stage ("condition", "sample", "decode") -> most bytes on the device.
        seconds: stage ("step", "stall", "sample", "decode", "total") -> seconds, None if unknown;
            "stall" is the part of a step that waits for copies.
        free_bytes: of the device when this was planned.
        fits: whether every stage fits, with the reserve.
    """

    precision: str
    is_exact: bool
    attention: str
    chunking: str
    activation_bytes: int
    resident_bytes: int
    streamed_bytes: int
    decode: str
    peak_bytes: Mapping[str, int]
    seconds: Mapping[str, float | None]
    free_bytes: int
    fits: bool

    @property
    def peak(self) -> int:
        """Most bytes of any stage."""
        return max(self.peak_bytes.values())

    @property
    def placement(self) -> str:
        """Where the blocks are, in words."""
        if not self.streamed_bytes:
            return "all weights stay on the device"
        stay, away = self.resident_bytes / 1e9, self.streamed_bytes / 1e9
        return f"{stay:.1f} GB of blocks stay on the device, {away:.1f} GB are streamed"


# --- weights ------------------------------------------------------------------------------------


def weights_of(
    transformer: SkyReelsTransformer, precision: str = "", is_exact: bool = True
) -> Weights:
    """The weights of a transformer, on any device, "meta" included.

    Args:
        transformer: loaded.
        precision: for people; "" names how it multiplies.
        is_exact: see `Weights`; False where 8-bit layers multiply in 8 bits in any case.

    Returns:
        Their sizes.
    """
    apart = {id(t) for module in transformer.conditioners for t in module_tensors(module)}

    def in_loop(module: nn.Module) -> int:
        return sum(t.nbytes for t in module_tensors(module) if id(t) not in apart)

    blocks = tuple(map(in_loop, transformer.blocks))
    groups = [sum(map(weight_bytes, modules)) for modules in transformer.modulations]
    in_8_bits = [
        layer
        for block in transformer.blocks
        for layer in block.modules()
        if isinstance(layer, QuantLinear)
    ]
    rounded = {layer.weight.dtype for layer in in_8_bits if not layer.weight_only}
    is_dequantized = any(layer.weight_only for layer in in_8_bits)
    names = {dtype: name for name, dtype in STORAGE_DTYPES.items()}
    dtype = transformer.compute_dtype
    plain = "fp32" if dtype == torch.float32 else "bf16"
    gemm = next((names[each] for each in names if each in rounded), plain)
    return Weights(
        precision=precision or (f"8-bit weights in {gemm}" if is_dequantized else gemm),
        gemm=gemm,
        is_exact=is_exact and not rounded,
        is_dequantized=is_dequantized,
        dtype=dtype,
        blocks=blocks,
        outside=in_loop(transformer) - sum(blocks),
        conditioners=max(sum(map(weight_bytes, transformer.embedders)), *groups),
        total=weight_bytes(transformer),
    )


@lru_cache(maxsize=32)
def weights_as(config: TransformerConfig, stored: str, precision: str) -> Weights:
    """The weights that `load_transformer` will make of a file, from shapes alone.

    Args:
        config: of the transformer.
        stored: precision of most of the file's numbers: "fp32", "bf16", "fp16", "fp8" or "int8".
        precision: a name of config.TRANSFORMER_PRECISIONS.

    Returns:
        Their sizes.
    """
    # blocks are alike but for the first and the last two double ones, see `is_quantizable`
    doubles, singles = min(config.num_layers, 5), min(config.num_single_layers, 1)
    small = replace(config, num_layers=doubles, num_single_layers=singles)
    is_wide = precision == "fp32" or (precision == "auto" and stored == "fp32")
    with torch.device("meta"):
        model = SkyReelsTransformer(small).to(torch.float32 if is_wide else torch.bfloat16)
    keeps = precision == "auto" and stored in STORAGE_DTYPES
    for name, layer in list(model.named_modules()):
        weight = f"{name}.weight"
        in_block = name.startswith(("double_blocks.", "single_blocks."))
        if isinstance(layer, nn.Linear) and (
            (keeps and in_block)
            or (precision in STORAGE_DTYPES and is_quantizable(weight, doubles))
        ):
            dtype = STORAGE_DTYPES[stored if keeps else precision]
            quantized = QuantLinear(
                torch.empty(layer.weight.shape, dtype=dtype, device="meta"),
                torch.empty(layer.out_features, 1, device="meta"),
                layer.bias,
                weight_only=keeps,
            )
            model.set_submodule(name, quantized)
    found = weights_of(model, precision, is_exact=not (stored == "fp32" and precision == "bf16"))
    blocks = list(found.blocks)
    if config.num_layers > doubles:
        blocks[2:3] = [blocks[2]] * (config.num_layers - doubles + 1)
    if config.num_single_layers > singles:
        blocks += blocks[-1:] * (config.num_single_layers - singles)
    return replace(found, blocks=tuple(blocks), total=_total_bytes(config, model, found, blocks))


def _total_bytes(
    config: TransformerConfig, model: SkyReelsTransformer, found: Weights, blocks: Sequence[int]
) -> int:
    """Of the whole model, from one with fewer blocks."""
    of_each = [sum(map(weight_bytes, block.modulations)) for block in model.blocks]
    counts = (config.num_layers, config.num_single_layers)
    of_kinds = (of_each[0], of_each[-1] if config.num_single_layers else 0)
    modulations = sum(count * size for count, size in zip(counts, of_kinds, strict=True))
    rest = found.total - sum(found.blocks) - sum(of_each)
    return rest + sum(blocks) + modulations


# --- memory and time ----------------------------------------------------------------------------


def activation_bytes(
    config: TransformerConfig,
    tokens: int,
    weights: Weights,
    attention: str,
    held_bytes: int = 0,
) -> dict[str, int]:
    """Peak bytes of a forward pass beyond the weights, of each chunking.

    Args:
        config: sizes of the network.
        tokens: image and text tokens of the longer branch.
        weights: of the transformer.
        attention: "exact" or "fast".
        held_bytes: what a step cache keeps.

    Returns:
        Bytes for each name in config.CHUNKINGS, in that order.
    """
    if attention == "fast":
        held_bytes += FAST_BYTES * tokens * config.hidden_size
    kind = "dequantized" if weights.is_dequantized else weights.gemm
    return {
        name: held_bytes + sampling_bytes(config, tokens, weights.dtype, name, kind)
        for name in CHUNKINGS
    }


def plan_run(
    machine: Machine,
    job: Job,
    weights: Weights,
    choice: Choice = Choice(),
    activations: Mapping[str, int] | None = None,
) -> Plan:
    """How to make a clip with these weights, whether it fits or not.

    Args:
        machine: where.
        job: what.
        weights: of the transformer.
        choice: what the user fixed.
        activations: bytes of each chunking, if they are known; else they are computed.

    Returns:
        The plan; see `Plan.fits`.
    """
    config = job.config
    if activations is None:
        activations = activation_bytes(
            config, job.tokens, weights, choice.attention, job.held_bytes
        )
    usable = machine.usable_bytes
    chunking = choose_chunking(activations, usable - weights.loop)
    if choice.is_resident is False:
        chunking = "head groups"
    num_bytes = activations[chunking]
    budget = usable - num_bytes - weights.outside
    blocks, slots = weights.blocks, SLOTS
    if choice.is_resident is True or not machine.streams:
        resident, fits = frozenset(range(len(blocks))), sum(blocks) <= budget
    elif choice.is_resident is False:
        least = least_bytes(blocks)
        resident, fits = choose_resident(blocks, least), least <= budget
    else:
        slots = SLOTS if least_bytes(blocks) <= budget else 1  # as `placed`
        fits = least_bytes(blocks, slots) <= budget
        resident = choose_resident(blocks, max(budget, least_bytes(blocks, slots)), slots)
    away = [size for index, size in enumerate(blocks) if index not in resident]
    stay = sum(blocks) - sum(away)
    kept = min(job.num_evaluations, MAX_KEPT)
    text = kept * job.text_tokens * config.hidden_size * weights.dtype.itemsize
    sampling = weights.outside + stay + slots * max(away, default=0) + num_bytes
    kind = f"{kind_of_work(weights, choice.attention)}, peak"
    peak_bytes = {
        "condition": weights.conditioners + text,
        "sample": int(machine.corrections.get(kind, 1.0) * sampling),
    }
    seconds = _sampling_seconds(machine, job, weights, choice.attention, resident, slots)
    decode = ""
    if job.vae is not None:
        decode, peak_bytes["decode"], seconds["decode"], decodes = _plan_decode(
            machine, job, choice.decode
        )
        fits = fits and decodes
    parts = [seconds[name] for name in ("sample", "decode") if name in seconds]
    known = [part for part in parts if part is not None]
    seconds["total"] = sum(known) if len(known) == len(parts) else None
    return Plan(
        precision=weights.precision,
        is_exact=weights.is_exact and choice.attention == "exact",
        attention=choice.attention,
        chunking=chunking,
        activation_bytes=num_bytes,
        resident_bytes=stay,
        streamed_bytes=sum(away),
        decode=decode,
        peak_bytes=peak_bytes,
        seconds=seconds,
        free_bytes=machine.free_bytes,
        fits=fits and peak_bytes["condition"] <= usable,
    )


def kind_of_work(weights: Weights, attention: str) -> str:
    """Name of what is corrected together."""
    return f"GEMM {weights.gemm}, attention {attention}"


def _sampling_seconds(
    machine: Machine,
    job: Job,
    weights: Weights,
    attention: str,
    resident: frozenset[int],
    slots: int,
) -> dict[str, float | None]:
    """Seconds of a step, of its stall and of all steps."""
    compute = block_seconds(machine, job, weights, attention)
    link = machine.rates.get("link", 0.0)
    is_streamed = len(resident) < len(weights.blocks)
    if compute is None or (is_streamed and not link):
        return {"step": None, "stall": None, "sample": None}
    # the first pass of a run has nothing to hide its first copies behind: taken from the second on
    passes = [
        simulate(weights.blocks, compute, resident, link or 1.0, slots, passes=count)
        if is_streamed
        else None
        for count in (1, 2)
    ]
    stall = 0.0
    if passes[0] is not None and passes[1] is not None:
        stall = passes[1].stall_s - passes[0].stall_s
    forward = sum(compute) + stall
    each = job.num_evaluations / job.num_steps
    return {
        "step": each * forward,
        "stall": each * stall,
        "sample": job.num_evaluations * forward,
    }


def block_seconds(
    machine: Machine, job: Job, weights: Weights, attention: str
) -> list[float] | None:
    """Seconds that each block computes in one forward pass; None where a rate is unknown."""
    names = (f"GEMM {weights.gemm}", "attention exact", "memory")
    gemm, attend, memory = (machine.rates.get(name, 0.0) for name in names)
    if not gemm or not attend or not memory:
        return None
    config, tokens = job.config, job.tokens
    hidden = config.hidden_size
    per_token = int((4 + 2 * config.mlp_ratio) * hidden**2)
    common = 2 * tokens * per_token / gemm + 4 * tokens**2 * hidden / attend
    unit = tokens * hidden * weights.dtype.itemsize / memory
    moved = MOVED_TENSORS[weights.gemm in STORAGE_DTYPES]
    factor = machine.corrections.get(kind_of_work(weights, attention), 1.0)
    double, single = (factor * (common + tensors * unit) for tensors in moved)
    return [double] * config.num_layers + [single] * config.num_single_layers


def _plan_decode(machine: Machine, job: Job, mode: str) -> tuple[str, int, float | None, bool]:
    """Mode, peak bytes and seconds of a decode, and whether it fits."""
    assert job.vae is not None
    shape, dtype = job.latent_shape, job.vae_dtype
    vae = vae_bytes(job.vae, dtype)
    free = machine.free_bytes - vae  # `plan_bytes` has a margin of its own
    decode, fits = DecodePlan(mode, TILINGS.get(mode)), True
    if mode in CHOOSING_MODES:
        try:
            decode, _ = choose_decode(
                job.vae, shape, free, dtype, mode, host_bytes=_host_bytes(machine)
            )
        except OutOfRoomError:
            decode, fits = last_rung(mode), False
    needed = plan_bytes(decode, job.vae, shape, dtype)
    kind = kind_of_decode(decode, dtype)
    rate = machine.rates.get("convolution", 0.0)
    seconds = None
    if rate:
        factor = machine.corrections.get(kind, 1.0)
        seconds = factor * plan_flop(decode, job.vae, shape) / rate
    taken = int(machine.corrections.get(f"{kind}, peak", 1.0) * needed / MEMORY_MARGIN)
    return str(decode), vae + taken, seconds, fits and max(needed, taken) <= free


def _host_bytes(machine: Machine) -> int | None:
    """Main memory for a clip between layers; None where the device's is the same."""
    if machine.info.type in ("cpu", "mps"):
        return None
    return machine.ram_bytes - FREE_HOST_BYTES


def vae_dtype(device: torch.device) -> torch.dtype:
    """What the VAE computes in with precision "auto"."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@lru_cache(maxsize=8)
def vae_bytes(config: VAEConfig, dtype: torch.dtype) -> int:
    """Bytes of a VAE's weights."""
    with torch.device("meta"):
        vae = VideoVAE(config)
    return sum(tensor.numel() for tensor in module_tensors(vae)) * dtype.itemsize


# --- which one ----------------------------------------------------------------------------------


def plans(
    machine: Machine,
    job: Job,
    stored: str,
    choice: Choice = Choice(),
) -> list[Plan]:
    """Every mode beside the others, for people to compare.

    Args:
        machine: where.
        job: what.
        stored: precision of the file, see `weights_as`.
        choice: attention and decode.

    Returns:
        For each precision what would be chosen here and, where that streams a part, all resident
        and all streamed. The exact ones come first.
    """
    found: list[Plan] = []
    for precision in ("auto", "bf16", "fp8", "int8"):
        weights = weights_as(job.config, stored, precision)
        if precision == "bf16" and stored in ("bf16", "fp16"):
            continue  # as auto
        if precision in STORAGE_DTYPES and not multiplies(machine, precision):
            continue
        chosen = plan_run(machine, job, weights, choice)
        found.append(chosen)
        if machine.streams:
            others = (plan_run(machine, job, weights, replace(choice, is_resident=resident))
                      for resident in (True, False))  # fmt: skip
            found += [plan for plan in others if plan.streamed_bytes != chosen.streamed_bytes]
    return sorted(found, key=lambda plan: not plan.is_exact)


def multiplies(machine: Machine, precision: str) -> bool:
    """Whether a GPU has tensor cores for an 8-bit format; a CPU multiplies them in software."""
    needed = CAPABILITIES[STORAGE_DTYPES[precision]]
    return machine.capability is None or machine.capability >= needed


def why_not(machine: Machine, job: Job, weights: Weights, choice: Choice = Choice()) -> str:
    """What is missing, the least that works, and what would help, in two sentences.

    What the user fixed is kept; what could be chosen instead is named.

    Args:
        machine: where.
        job: what does not fit.
        weights: of the transformer.
        choice: what the user fixed.

    Returns:
        For people.
    """
    least = smallest(job, weights, machine, choice)
    stage, needed = max(least.peak_bytes.items(), key=lambda item: item[1])
    verb = {"condition": "prepare", "sample": "sample", "decode": "decode"}[stage]
    device = f"{machine.free_bytes / 1e9:.1f} GB of {machine.name} are free"
    helps = [f"{with_reserve(needed) / 1e9:.1f} GB of free memory (close other programs)"]
    helps += _other_choices(machine, job, weights, choice)
    helps += _smaller_jobs(machine, job, weights, choice)
    return (
        f"To {verb} {job} takes at least {needed / 1e9:.1f} GB and {device}, of which "
        f"{(machine.free_bytes - machine.usable_bytes) / 1e9:.1f} GB are left to the driver. What "
        f"would work: {'; '.join(helps)}."
    )


def smallest(job: Job, weights: Weights, machine: Machine, choice: Choice = Choice()) -> Plan:
    """The plan that takes the least memory, whether it fits or not."""
    return plan_run(replace(machine, free_bytes=0), job, weights, choice)


def _other_choices(machine: Machine, job: Job, weights: Weights, choice: Choice) -> list[str]:
    """Of what the user fixed, what would fit if it were left to the planner."""
    others = {
        "exact attention": replace(choice, attention="exact"),
        "decode auto": replace(choice, decode="auto"),
        "weights that are streamed": replace(choice, is_resident=None),
    }
    return [
        name
        for name, other in others.items()
        if other != choice and _fits(machine, job, weights, other)
    ]


def _smaller_jobs(machine: Machine, job: Job, weights: Weights, choice: Choice) -> list[str]:
    """Clips, and a precision, that would fit."""
    found = []
    others = {
        "fewer frames": [
            replace(job, num_frames=nearest_frames(int(part * job.num_frames))) for part in SHORTER
        ],
        "a smaller size": [
            replace(job, width=_multiple(part * job.width), height=_multiple(part * job.height))
            for part in SHORTER[:-1]
        ],
    }
    for name, jobs in others.items():
        fitting = [each for each in jobs if each != job and _fits(machine, each, weights, choice)]
        if fitting:
            found.append(f"{name}, such as {fitting[0]}")
    for precision in STORAGE_DTYPES:
        if weights.gemm in ("bf16", "fp32") and multiplies(machine, precision):
            other = weights_as(job.config, weights.gemm, precision)
            if other.loop < weights.loop and _fits(machine, job, other, choice):
                found.append(f"precision {precision} (not exact)")
    return found


def _fits(machine: Machine, job: Job, weights: Weights, choice: Choice) -> bool:
    return plan_run(machine, job, weights, choice).fits


def _multiple(pixels: float) -> int:
    return max(16, int(pixels) // 16 * 16)


# --- the machine now ----------------------------------------------------------------------------


def machine_of(
    runtime: Runtime, names: Iterable[str] = (), *, loaded_bytes: int = 0, can_probe: bool = True
) -> Machine:
    """The runtime's device as it is now.

    Args:
        runtime: whose device, and whose free memory.
        names: rates that are needed, see transformer/rates.py.
        loaded_bytes: of the run's own weights that are on the device already; they count as free.
        can_probe: measure rates that are not known.

    Returns:
        The machine; rates that could not be had are missing.
    """
    device = runtime.device
    found = rates(runtime, names) if can_probe else known_rates(runtime)
    free = max(0, runtime.free_bytes() + loaded_bytes)  # a host may reserve more than is free
    info, total = describe(device), free
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    return Machine(
        name=info.name or info.type,
        total_bytes=total,
        free_bytes=free,
        ram_bytes=free_host_bytes(),
        rates=found,
        corrections=outcomes.corrections(runtime.state_folder, device_key(device)),
        info=info,
        streams=device.type != runtime.offload_device.type,
    )


def rates_needed(gemms: Iterable[str]) -> list[str]:
    """Names of the rates that a prediction takes.

    Attention in 8 bits counts as exact until a run has corrected it: which kernel will run shows
    then.

    Args:
        gemms: see `Weights.gemm`.

    Returns:
        Of transformer/rates.py.
    """
    # the longest first, which brings the clocks of an idle card up
    gemms = (f"GEMM {gemm}" for gemm in gemms)
    return ["attention exact", *gemms, "memory", "link", "convolution"]


#: how a checkpoint names the dtype of most of its numbers -> precision, see `weights_as`
STORED = {
    "F32": "fp32",
    "BF16": "bf16",
    "F16": "fp16",
    "F8_E4M3": "fp8",
    "F8_E5M2": "fp8",
    "I8": "int8",
}


@dataclass(frozen=True)
class Preflight:
    """What a run would take, before anything is loaded.

    Attributes:
        machine: where.
        job: what.
        chosen: the plan that would be taken.
        modes: every plan, the chosen one among them.
        text: for people.
    """

    machine: Machine
    job: Job
    chosen: Plan
    modes: tuple[Plan, ...]
    text: str

    def to_json(self) -> dict[str, Any]:
        """The same, ready for json.dumps; precisions and bytes as numbers."""
        job = {
            key: getattr(self.job, key) for key in ("width", "height", "num_frames", "num_steps")
        }
        return {
            "device": self.machine.name,
            "total_bytes": self.machine.total_bytes,
            "free_bytes": self.machine.free_bytes,
            "rates": dict(self.machine.rates),
            "job": {**job, "num_evaluations": self.job.num_evaluations},
            "chosen": self.modes.index(self.chosen),
            "modes": [{**asdict(plan), "peak_bytes": dict(plan.peak_bytes)} for plan in self.modes],
            "text": self.text,
        }


def preflight(
    runtime: Runtime,
    job: Job,
    stored: str,
    precision: str = "auto",
    choice: Choice = Choice(),
    *,
    reclaimable: int = 0,
) -> Preflight:
    """Plan a run from the header of its file.

    Args:
        runtime: whose device is probed, if it is a new one, and whose free memory counts.
        job: what is made.
        stored: precision of the file, see STORED.
        precision: that the loader is asked for.
        choice: attention and decode.
        reclaimable: bytes that other models take and would give back.

    Returns:
        The chosen plan and the others.
    """
    weights = weights_as(job.config, stored, precision)
    gemms = {weights_as(job.config, stored, each).gemm for each in ("auto", "fp8", "int8")}
    names = rates_needed(sorted({weights.gemm, *gemms}))
    machine = machine_of(runtime, names, loaded_bytes=reclaimable)
    chosen = plan_run(machine, job, weights, choice)
    modes = plans(machine, job, stored, choice)
    if chosen not in modes:
        modes.insert(0, chosen)
    lines = [
        f"{machine.name}: {machine.free_bytes / 1e9:.1f} of {machine.total_bytes / 1e9:.1f} GB "
        f"free, {machine.ram_bytes / 1e9:.1f} GB of main memory free",
        expectation(chosen, job),
        *table(modes, chosen),
    ]
    if not chosen.fits:
        lines.append(why_not(machine, job, weights, choice))
    if weights.total > machine.ram_bytes:
        lines.append(
            f"The weights take {weights.total / 1e9:.1f} GB of main memory, more than is free: "
            "close other programs, or use a file in 8 bits."
        )
    return Preflight(machine, job, chosen, tuple(modes), "\n".join(lines))


# --- rungs --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rung:
    """A way to sample.

    Attributes:
        chunking: a name of config.CHUNKINGS.
        spare: share of the planned resident blocks that are streamed instead, 0..1.
    """

    chunking: str
    spare: float = 0.0

    def __str__(self) -> str:
        if not self.spare:
            return self.chunking
        return f"{self.chunking}, {self.spare:.0%} fewer resident blocks"


def rungs(chunking: str, streams: bool) -> list[Rung]:
    """From the planned chunking down to the smallest, then with fewer and fewer resident blocks.

    Args:
        chunking: of the plan.
        streams: whether blocks can leave the device.

    Returns:
        At least one.
    """
    names = list(CHUNKINGS)
    found = [Rung(name) for name in names[names.index(chunking) :]]
    if streams:
        found += [Rung(names[-1], spare) for spare in (0.25, 0.5, 0.75, 1.0)]
    return found


def bytes_on(rung: Rung, plan: Plan, weights: Weights, free: int, needed: Mapping[str, int]) -> int:
    """Bytes to keep free beside the weights on a rung.

    What smaller chunks leave of the planned bytes stays free: more weights in it would make the
    next step run out again.

    Args:
        rung: of `rungs`.
        plan: of the run.
        weights: of the run.
        free: bytes of the device while no weight is on it.
        needed: bytes of the activations, of each chunking.

    Returns:
        Never so many that blocks could not be streamed beside them.
    """
    least = needed[rung.chunking]
    room = free - least - weights.outside - least_bytes(weights.blocks, 1) - reserve_bytes(free)
    kept = plan.activation_bytes - least
    if rung.spare:
        kept = max(kept, room - int((1 - rung.spare) * plan.resident_bytes))
    return least + max(0, min(kept, room))


# --- expected and happened ----------------------------------------------------------------------


def expectation(plan: Plan, job: Job) -> str:
    """What was chosen and what it should take, as one line."""
    exact = "exact" if plan.is_exact else "not exact"
    step = plan.seconds.get("step")
    time_ = "time not known yet"
    if step is not None:
        time_ = f"{job.num_steps} steps of about {in_seconds(step)}"
    return (
        f"Plan for {job}: {plan.precision} ({exact}), {plan.attention} attention, activations "
        f"{plan.chunking}, {plan.placement}; {time_}; peak {in_bytes(plan.peak_bytes['sample'])} "
        f"of {in_bytes(plan.free_bytes)} free."
    )


# --- for people ---------------------------------------------------------------------------------


def table(found: Sequence[Plan], chosen: Plan) -> list[str]:
    """Plans beside each other for people.

    Args:
        found: see `plans`.
        chosen: the one that will be taken, marked ->; those that do not fit are marked "no".

    Returns:
        A heading and a line for each plan.
    """
    rows = [["", "precision", "streamed", "sampling", "a step", "decoding", "in pieces", "total"]]
    for plan in found:
        away = plan.streamed_bytes
        seconds = [_known(plan.seconds.get(name)) for name in ("step", "total")]
        peaks = [in_bytes(plan.peak_bytes.get(name, 0)) for name in ("sample", "decode")]
        rows.append(
            [
                "->" if plan == chosen else "" if plan.fits else "no",
                plan.precision + ("" if plan.is_exact else ", not exact"),
                f"{away / 1e9:.1f} GB" if away else "nothing",
                *(peaks[0], seconds[0], peaks[1], plan.decode or "-", seconds[1]),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _known(seconds: float | None) -> str:
    return "?" if seconds is None else in_seconds(seconds)
