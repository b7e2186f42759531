"""Frozen descriptions of the networks, of guidance and of tiles; and the few global constants.

Settings check their values when they are made. Letters used everywhere in this package: B batch,
C channels, F frames, T latent frames, H W pixels, h w latent pixels, N image tokens, L text tokens,
D head dim.
"""

from dataclasses import dataclass

from .errors import OptionError

#: of this package, as pyproject.toml says
VERSION = "0.1.0"
#: model-space latents = VAE-space latents * SCALING_FACTOR (config.json of the HunyuanVideo VAE)
SCALING_FACTOR = 0.476986
#: flow-matching times run 1 -> 0 as sigmas and 1000 -> 0 as timesteps
NUM_TRAIN_TIMESTEPS = 1000
#: pixels per latent pixel, frames per latent frame (after the first), pixels per token
SPATIAL_COMPRESSION = 8
TEMPORAL_COMPRESSION = 4
SIZE_MULTIPLE = 16
#: trained text length, without the template
MAX_TEXT_TOKENS = 256
FRAMES_PER_SECOND = 24
#: largest values accepted anywhere; far beyond what the model was trained for (97 frames of
#: 960x544), and small enough that a typing error is refused instead of filling the memory
MAX_SIZE = 4096
MAX_FRAMES = 1025
MAX_STEPS = 1000
MAX_GUIDANCE = 100.0

#: how a checkpoint is computed with; weights/load.py says what each does
TRANSFORMER_PRECISIONS = ("auto", "fp32", "bf16", "fp8", "int8")
VAE_PRECISIONS = ("auto", "fp32", "bf16", "fp16")


@dataclass(frozen=True)
class TransformerConfig:
    """The HunyuanVideo transformer; defaults are SkyReels-V1 I2V (diffusers config names).

    SkyReels-V1 T2V differs in `in_channels`, 16: it sees no image latents.
    """

    in_channels: int = 32
    out_channels: int = 16
    num_attention_heads: int = 24
    attention_head_dim: int = 128
    num_layers: int = 20
    num_single_layers: int = 40
    num_refiner_layers: int = 2
    mlp_ratio: float = 4.0
    patch_size: int = 2
    patch_size_t: int = 1
    guidance_embeds: bool = True
    text_embed_dim: int = 4096
    pooled_projection_dim: int = 768
    rope_theta: float = 256.0
    rope_axes_dim: tuple[int, int, int] = (16, 56, 56)

    @property
    def hidden_size(self) -> int:
        """Width of every token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def takes_image(self) -> bool:
        """Whether image latents are joined to the noisy ones: I2V yes, T2V no."""
        return self.in_channels != self.out_channels


@dataclass(frozen=True)
class VAEConfig:
    """The HunyuanVideo causal video VAE (diffusers config names)."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 16
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32


@dataclass(frozen=True)
class SkipLayers:
    """Guidance away from a weaker model: the same one with some blocks left out.

    Attributes:
        double_blocks: indices of the double blocks that hand on their input.
        single_blocks: likewise of the single blocks.
        scale: 0..10, how far the velocity is pushed away from the weak prediction of the positive
            prompt, which is a third evaluation. 0 leaves the blocks out of the negative prediction
            instead, which costs nothing.
        start: fraction of the steps before which nothing is left out.
        end: fraction of the steps from which on nothing is left out.
    """

    double_blocks: tuple[int, ...] = ()
    single_blocks: tuple[int, ...] = ()
    scale: float = 0.0
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if not self.double_blocks and not self.single_blocks:
            raise OptionError(
                "Skip-layer guidance leaves no block out: name one, or switch it off."
            )
        if not 0.0 <= self.scale <= 10.0:
            raise OptionError(f"Skip-layer scale {self.scale} is not within 0..10: use 1.")
        if not 0.0 <= self.start <= self.end <= 1.0:
            raise OptionError(
                f"Skip-layer window {self.start}..{self.end} is invalid: use 0 <= start <= end <= "
                "1."
            )

    def is_on(self, step: int, num_steps: int) -> bool:
        """Whether blocks are left out in a step."""
        return self.start <= step / num_steps < self.end


@dataclass(frozen=True)
class FreSca:
    """Low and high spatial frequencies of the guidance scaled apart; 1 and 1 is off.

    Attributes:
        low: 0..10, factor of the low frequencies.
        high: 0..10, factor of the others.
        cutoff: frequency indices on either side of zero that are low, from 1.
    """

    low: float = 1.0
    high: float = 1.25
    cutoff: int = 20

    def __post_init__(self) -> None:
        for name, factor in (("low", self.low), ("high", self.high)):
            if not 0.0 <= factor <= 10.0:
                raise OptionError(f"FreSca {name} {factor} is not within 0..10: use 1 for off.")
        if self.cutoff < 1:
            raise OptionError(f"FreSca cutoff {self.cutoff} is below 1: use 20.")


@dataclass(frozen=True)
class Guidance:
    """How the two predictions of a step become one velocity.

    Attributes:
        true_cfg_scale: classifier-free guidance, 0..100; at 1 or below the negative prediction is
            skipped.
        guidance_scale: embedded guidance, 0..100; SkyReels was trained with 1.0.
        cfg_start: fraction of the steps before which the negative prediction is skipped.
        cfg_end: fraction of the steps from which on it is skipped.
        guidance_rescale: 0..1, pulls the std of the guided velocity to the positive one's.
        cfg_zero_star: project the negative prediction on the positive one (CFG-Zero*).
        zero_init_steps: first steps whose velocity is zero (CFG-Zero*).
        skip_layers: see `SkipLayers`; None is off.
        fresca: see `FreSca`; None is off.
    """

    true_cfg_scale: float = 6.0
    guidance_scale: float = 1.0
    cfg_start: float = 0.0
    cfg_end: float = 1.0
    guidance_rescale: float = 0.0
    cfg_zero_star: bool = False
    zero_init_steps: int = 0
    skip_layers: SkipLayers | None = None
    fresca: FreSca | None = None

    def __post_init__(self) -> None:
        for name, scale, usual in (
            ("CFG", self.true_cfg_scale, 6),
            ("Embedded guidance", self.guidance_scale, 1),
        ):
            if not 0.0 <= scale <= MAX_GUIDANCE:
                raise OptionError(f"{name} {scale} is not within 0..{MAX_GUIDANCE:g}: use {usual}.")
        if not 0.0 <= self.cfg_start <= self.cfg_end <= 1.0:
            raise OptionError(
                f"CFG window {self.cfg_start}..{self.cfg_end} is invalid: use 0 <= cfg_start <= "
                "cfg_end <= 1."
            )
        if not 0.0 <= self.guidance_rescale <= 1.0:
            raise OptionError(
                f"Guidance rescale {self.guidance_rescale} is not within 0..1: use 0 for off."
            )
        if self.zero_init_steps < 0:
            raise OptionError(
                f"zero_init_steps must be >= 0, got {self.zero_init_steps}: use 0 for off."
            )

    def is_in_window(self, step: int, num_steps: int) -> bool:
        """Whether the negative prediction counts at a step, from 0."""
        return self.cfg_start <= step / num_steps < self.cfg_end

    def skip_scale(self, step: int, num_steps: int) -> float | None:
        """The scale of skip-layer guidance at a step; None where it is off."""
        skip = self.skip_layers
        return skip.scale if skip is not None and skip.is_on(step, num_steps) else None


#: where context windows begin, and how their predictions are blended; the defaults first
WINDOW_SCHEDULES = ("static", "uniform")
WINDOW_BLENDS = ("pyramid", "relative", "flat")


@dataclass(frozen=True)
class ContextWindows:
    """A long clip predicted in windows that overlap in time.

    Attributes:
        length: latent frames of a window, from 2; 25 are 97 frames, the trained length. A clip that
            is not longer is predicted whole.
        overlap: latent frames that neighbours share at least, 0..length - 1.
        schedule: "static" has the same windows at every step; "uniform" moves them from step to
            step, so that no frame is always at an edge.
        blend: weights within a window: "pyramid" (1, 2, ... 2, 1), "relative" (falling to 0.01 at
            the edges) or "flat".

    Source: AnimateDiff's sliding windows (neggles/animatediff-cli), with the weights of
        Kosinkadink/ComfyUI-AnimateDiff-Evolved; node ContextWindowsManual of ComfyUI's core has
        both, there as standard_static and standard_uniform with a stride of 1.
    """

    length: int = 25
    overlap: int = 6
    schedule: str = "static"
    blend: str = "pyramid"

    def __post_init__(self) -> None:
        for name, frames in (("length", self.length), ("overlap", self.overlap)):
            if not isinstance(frames, int):
                raise OptionError(f"Window {name} {frames!r} is not a whole number: use one.")
        if self.length < 2:
            raise OptionError(f"Windows of {self.length} latent frames are too short: use 25.")
        if not 0 <= self.overlap < self.length:
            raise OptionError(
                f"Window overlap {self.overlap} is not within 0..{self.length - 1}, below the "
                f"length of a window: use {self.length // 4}."
            )
        for value, known in ((self.schedule, WINDOW_SCHEDULES), (self.blend, WINDOW_BLENDS)):
            if value not in known:
                raise OptionError(f"{value!r} of windows is not one of {', '.join(known)}.")

    @staticmethod
    def of_frames(
        num_frames: int,
        overlap_frames: int | None = None,
        schedule: str = "static",
        blend: str = "pyramid",
    ) -> "ContextWindows":
        """Windows counted in frames of the video.

        Args:
            num_frames: of a window, 4k + 1, from 5.
            overlap_frames: a multiple of 4; by default a quarter of a window.
            schedule: as in the attributes.
            blend: as in the attributes.

        Returns:
            The windows.

        Raises:
            OptionError: names the nearest legal value.
        """
        latent_frames, rest = divmod(num_frames - 1, TEMPORAL_COMPRESSION)
        if rest or latent_frames < 1:
            near = max(1, round((num_frames - 1) / TEMPORAL_COMPRESSION)) * TEMPORAL_COMPRESSION + 1
            raise OptionError(
                f"A window of {num_frames} frames is not a multiple of 4 plus 1, from 5: use "
                f"{near}."
            )
        length = latent_frames + 1
        if overlap_frames is None:
            return ContextWindows(length, length // 4, schedule, blend)
        overlap, rest = divmod(overlap_frames, TEMPORAL_COMPRESSION)
        if rest or not 0 <= overlap < length:
            near = min(max(0, round(overlap_frames / TEMPORAL_COMPRESSION)), length - 1)
            raise OptionError(
                f"A window overlap of {overlap_frames} frames is not a multiple of 4 below the "
                f"{num_frames} frames of a window: use {near * TEMPORAL_COMPRESSION}."
            )
        return ContextWindows(length, overlap, schedule, blend)

    def starts(self, num_frames: int, step: int) -> list[int]:
        """First latent frames of the windows of a step.

        Args:
            num_frames: latent frames of the clip.
            step: of the schedule, from 0.

        Returns:
            Ascending, from 0; [0] for a clip that is predicted whole.
        """
        last, stride = num_frames - self.length, self.length - self.overlap
        if last <= 0:
            return [0]
        if self.schedule == "static":
            return [*range(0, last, stride), last]
        # 0, 1/2, 1/4, 3/4, 1/8, ...: the bits of the step in reverse (van der Corput)
        part = int(f"{step:b}"[::-1], 2) / 2 ** step.bit_length()
        first = round(num_frames * part)
        moved = range(first, first + num_frames - self.overlap, stride)
        # what reaches beyond the end begins where the last window does, and a first one fills up
        return sorted({0, *(min(start % num_frames, last) for start in moved)})

    def weights(self) -> list[float]:
        """How much each latent frame of a window counts, > 0."""
        middle, positions = (self.length - 1) / 2, range(self.length)
        if self.blend == "flat":
            return [1.0] * self.length
        if self.blend == "pyramid":
            return [1.0 + min(place, self.length - 1 - place) for place in positions]
        reach = (self.length - 1 + 1e-2) / 2
        return [max(1e-2, 1 - abs(place - middle) / reach) for place in positions]


@dataclass(frozen=True)
class Chunking:
    """How much of a block is computed at a time; the numbers are the same up to rounding.

    Attributes:
        mlp_chunks: runs of tokens into which the MLP is cut, whose middle is 4 times as wide.
        head_groups: groups of heads into which the attention is cut.
    """

    mlp_chunks: int = 1
    head_groups: int = 1


#: fastest first; transformer/placement.py says what each takes
CHUNKINGS = {"whole": Chunking(), "chunks": Chunking(3), "head groups": Chunking(8, 3)}


@dataclass(frozen=True)
class Preset:
    """Settings of a run that belong together.

    Attributes:
        steps: of the schedule.
        cfg: true CFG scale.
        embedded_guidance: as the model is told it.
        shift: of the schedule.
    """

    steps: int
    cfg: float
    embedded_guidance: float
    shift: float


PRESETS = {
    # as the authors released the model
    "official": Preset(30, 6.0, 1.0, 7.0),
    # experimental: for a step-distilled LoRA of HunyuanVideo's text-to-video model; values of
    # hao-ai-lab/FastVideo scripts/inference/inference_hunyuan.sh
    "few-steps": Preset(6, 1.0, 6.0, 17.0),
}


@dataclass(frozen=True)
class Tiling:
    """Decode windows in pixels and frames; 0 frames means the whole clip at once.

    Heights and widths are multiples of 8, frame counts multiples of 4; a window of N frames decodes
    N / 4 + 1 latent frames, the first of which is context.
    """

    tile_sample_min_height: int = 256
    tile_sample_min_width: int = 256
    tile_sample_min_num_frames: int = 0
    tile_sample_stride_height: int = 192
    tile_sample_stride_width: int = 192
    tile_sample_stride_num_frames: int = 0

    def __post_init__(self) -> None:
        for axis, multiple in (
            ("height", SPATIAL_COMPRESSION),
            ("width", SPATIAL_COMPRESSION),
            ("num_frames", TEMPORAL_COMPRESSION),
        ):
            tile = getattr(self, f"tile_sample_min_{axis}")
            stride = getattr(self, f"tile_sample_stride_{axis}")
            if axis == "num_frames" and tile == 0:
                continue
            for name, value in (("min", tile), ("stride", stride)):
                if value <= 0 or value % multiple:
                    near = max(round(value / multiple), 1) * multiple
                    raise OptionError(
                        f"tile_sample_{name}_{axis} is {value}; it must be a positive multiple of "
                        f"{multiple}: use {near}."
                    )
            if stride > tile:
                raise OptionError(
                    f"tile_sample_stride_{axis} {stride} is larger than tile_sample_min_{axis} "
                    f"{tile} and would leave gaps: use at most {tile}."
                )


#: geometries of the reference implementations (skyreels/vae/tiling.py says what each costs)
TILINGS: dict[str, Tiling] = {
    "tiled": Tiling(),
    "tiled-tencent": Tiling(tile_sample_min_num_frames=64, tile_sample_stride_num_frames=48),
    "tiled-diffusers": Tiling(tile_sample_min_num_frames=16, tile_sample_stride_num_frames=12),
}
#: how a clip is decoded; new ones go to the end, as nodes list them in this order
DECODE_MODES = ("auto", "full", *TILINGS, "synced", "exact")
#: how attention is computed; new ones go to the end likewise. The last two are sparse in most
#: steps, see transformer/sparse_attention.py
ATTENTIONS = ("exact", "fast", "sparse", "sparser")
#: what happens when a render goes wrong, see sampling/bad_render.py
BAD_RENDERS = ("off", "warn", "stop", "retry")
