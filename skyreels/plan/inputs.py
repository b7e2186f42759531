"""What a plan is made from: a machine, a job, and what the user fixed."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from ..conditioning.latents import latent_shape
from ..config import (
    MAX_TEXT_TOKENS,
    TEMPORAL_COMPRESSION,
    ContextWindows,
    TransformerConfig,
    VAEConfig,
)
from ..kernels.dispatch import DeviceInfo, describe
from ..runtime import Runtime, free_host_bytes
from ..runtime.offload import reserve_bytes
from ..runtime.outcomes import corrections, device_key
from ..transformer.quant import CAPABILITIES, STORAGE_DTYPES
from ..transformer.rates import known_rates, rates


@dataclass(frozen=True)
class Machine:
    """A device and what it reaches.

    Attributes:
        name: of the device.
        total_bytes: of its memory.
        free_bytes: of its memory, what a run may use now.
        ram_bytes: of main memory that are free.
        rates: "GEMM bf16" (fp32, fp8, int8), "attention exact" and "convolution" in FLOP/s,
            "memory", "link" and "peer" in bytes/s. Times that need a missing one are unknown.
        corrections: how far earlier runs were off, see `outcomes.corrections`.
        info: what the dispatcher knows of the device.
        streams: whether weights can rest elsewhere than on the device.
        num_cards: devices of this kind that one process sees.
    """

    name: str
    total_bytes: int
    free_bytes: int
    ram_bytes: int
    rates: Mapping[str, float] = field(default_factory=dict)
    corrections: Mapping[str, float] = field(default_factory=dict)
    info: DeviceInfo = DeviceInfo("cpu")  # noqa: RUF009 - frozen
    streams: bool = True
    num_cards: int = 1

    @property
    def capability(self) -> tuple[int, int] | None:
        """Compute capability of an NVIDIA GPU."""
        return self.info.capability

    @property
    def usable_bytes(self) -> int:
        """Free memory less the reserve."""
        return self.free_bytes - (reserve_bytes(self.free_bytes) if self.streams else 0)


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
        corrections=corrections(runtime.state_folder, device_key(device)),
        info=info,
        streams=device.type != runtime.offload_device.type,
        num_cards=torch.cuda.device_count() if device.type == "cuda" else 1,
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


def multiplies(machine: Machine, precision: str) -> bool:
    """Whether a GPU has tensor cores for an 8-bit format; a CPU multiplies them in software."""
    needed = CAPABILITIES[STORAGE_DTYPES[precision]]
    return machine.capability is None or machine.capability >= needed


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
        num_extra: steps with one more prediction, of skip-layer guidance.
        config: sizes of the transformer.
        vae: of the VAE that decodes; None plans no decode.
        vae_dtype: it computes in.
        windows: in which the clip is predicted; None predicts it whole.
        num_ranks: cards that share each prediction, see transformer/ulysses.py.
        num_strips: cards that share the decode, see vae/strips.py.
    """

    width: int = 960
    height: int = 544
    num_frames: int = 97
    num_steps: int = 30
    num_guided: int = 30
    text_tokens: int = MAX_TEXT_TOKENS
    held_bytes: int = 0
    num_extra: int = 0
    config: TransformerConfig = field(default_factory=TransformerConfig)
    vae: VAEConfig | None = field(default_factory=VAEConfig)
    vae_dtype: torch.dtype = torch.bfloat16
    windows: ContextWindows | None = None
    num_ranks: int = 1
    num_strips: int = 1

    @property
    def latent_shape(self) -> torch.Size:
        """[1, 16, T, h, w]."""
        return torch.Size(latent_shape(self.num_frames, self.height, self.width))

    @property
    def evaluated_shape(self) -> torch.Size:
        """[1, 16, T, h, w] of what one model evaluation sees: a window, or the clip."""
        batch, channels, frames, height, width = self.latent_shape
        if self.windows is not None:
            frames = min(frames, self.windows.length)
        return torch.Size((batch, channels, frames, height, width))

    @property
    def tokens(self) -> int:
        """Of image and text, in one model evaluation."""
        _, _, frames, height, width = self.evaluated_shape
        patch = self.config.patch_size
        patches = frames // self.config.patch_size_t * (height // patch) * (width // patch)
        return patches + self.text_tokens

    @property
    def tokens_here(self) -> int:
        """Of these, those of one card: a share of the image, and all of the text."""
        return -(-(self.tokens - self.text_tokens) // self.num_ranks) + self.text_tokens

    @property
    def num_predictions(self) -> int:
        """Predictions of the clip in the run."""
        return self.num_steps + self.num_guided + self.num_extra

    @property
    def num_windows(self) -> float:
        """Forward passes of a prediction, the mean of all steps."""
        if self.windows is None:
            return 1
        frames = self.latent_shape[2]
        counts = [len(self.windows.starts(frames, step)) for step in range(self.num_steps)]
        return sum(counts) / len(counts)

    @property
    def num_evaluations(self) -> int:
        """Forward passes of the run."""
        return round(self.num_predictions * self.num_windows)

    def __str__(self) -> str:
        text = f"{self.num_frames} frames of {self.width}x{self.height}"
        if self.windows is None or self.latent_shape[2] <= self.windows.length:
            return text
        return f"{text} in windows of {(self.windows.length - 1) * TEMPORAL_COMPRESSION + 1}"


def vae_dtype(device: torch.device) -> torch.dtype:
    """What the VAE computes in with precision "auto"."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@dataclass(frozen=True)
class Choice:
    """What the user fixed; the defaults leave it to the planner.

    Attributes:
        attention: a name of config.ATTENTIONS.
        decode: a name of config.DECODE_MODES.
        is_resident: True refuses to stream, False streams everything; None is what fits.
    """

    attention: str = "exact"
    decode: str = "auto"
    is_resident: bool | None = None


#: everything that a user can leave to the planner is
AUTO = Choice()
