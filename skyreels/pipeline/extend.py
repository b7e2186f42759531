"""Continue a clip: its last frames start a new one, which is matched in colour and joined to it."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..conditioning.latents import check_picture, check_size, nearest_frames
from ..config import SIZE_MULTIPLE, TEMPORAL_COMPRESSION
from ..errors import ShapeError
from ..image import ImageSettings
from ..runtime import Runtime, never_interrupt
from ..sampling.prompts import Prompt
from ..sampling.settings import SamplingSettings
from ..transformer.model import SkyReelsTransformer
from ..vae.frames import FrameSink
from ..vae.model import VideoVAE
from ..vae.tiling import decode_frames
from . import image_to_latents

#: fewest frames of a clip to continue: less is a picture, or hardly more
MIN_CLIP_FRAMES = 5
#: standard deviation below which a channel is flat: its contrast says nothing
FLAT = 1e-3
#: contrast is changed by at most this factor, so that noise of a dull channel is not blown up
MAX_CONTRAST = 2.0


@dataclass(frozen=True)
class ExtendSettings:
    """How a clip is continued.

    Attributes:
        num_frames: of the new clip, 4k + 1, the overlap included: the whole grows by
            num_frames - overlap_frames.
        overlap_frames: last frames of the clip from which the new one starts, 4k + 1. The model was
            trained with 1; more also carry the direction of the motion, but are untrained.
        color_match: give the new frames the colours of the clip, see `match_colors`.
    """

    num_frames: int = 97
    overlap_frames: int = 1
    color_match: bool = True

    def __post_init__(self) -> None:
        check_size(SIZE_MULTIPLE, SIZE_MULTIPLE, self.num_frames)
        overlap = self.overlap_frames
        if overlap < 1 or (overlap - 1) % TEMPORAL_COMPRESSION:
            raise ShapeError(
                f"An overlap of {overlap} frames is not a multiple of 4 plus 1: use "
                f"{nearest_frames(overlap)}."
            )
        if overlap >= self.num_frames:
            raise ShapeError(
                f"An overlap of {overlap} frames leaves nothing new in {self.num_frames}: use a "
                "smaller overlap (1 is the trained one) or more frames."
            )


def extend_video(
    transformer: SkyReelsTransformer,
    vae: VideoVAE,
    clip: Tensor,
    prompt: Prompt,
    negative: Prompt | None,
    settings: SamplingSettings,
    *,
    extend: ExtendSettings = ExtendSettings(),
    image_settings: ImageSettings = ImageSettings(),  # noqa: B008 - frozen
    decode: str = "auto",
    runtime: Runtime,
) -> tuple[Tensor, Tensor]:
    """A clip and a prompt become a longer clip.

    The last frames of the clip are encoded as the first latents of a new one, which is sampled and
    decoded as any other. In the overlap the clip fades into the new frames.

    Args:
        transformer: from `load_transformer`, on any device.
        vae: from `load_vae`, on any device.
        clip: [F, H, W, 3] float in 0..1, at least 5 frames; H and W multiples of 16.
        prompt: what happens next, from `encode_prompt`.
        negative: likewise; needed if true CFG is on.
        settings: see `SamplingSettings`.
        extend: length, overlap, colours.
        image_settings: as for `image_to_video`; prefix_frames is the overlap.
        decode: as for `image_to_video`.
        runtime: its device computes; it gets the progress and may interrupt.

    Returns:
        The whole, [F + num_frames - overlap_frames, H, W, 3] float32 in 0..1, and the part of it
        that is new, a view.

    Raises:
        ShapeError: a clip that is too short, or of a size that the model cannot generate.
        SkyReelsError: see `image_to_video`.
    """
    vae_latents = extend_latents(
        transformer,
        vae,
        clip,
        prompt,
        negative,
        settings,
        extend=extend,
        image_settings=image_settings,
        runtime=runtime,
    )
    new = decode_frames(vae, vae_latents, decode, runtime=runtime)
    clip = clip[..., :3].to(new.device, torch.float32)
    if extend.color_match:
        match_colors(new, clip[-extend.overlap_frames :], check=runtime.check_interrupt)
    joined = join_clips(clip, new, extend.overlap_frames)
    return joined, joined[len(clip) :]


def extend_latents(
    transformer: SkyReelsTransformer,
    vae: VideoVAE,
    clip: Tensor,
    prompt: Prompt,
    negative: Prompt | None,
    settings: SamplingSettings,
    *,
    extend: ExtendSettings = ExtendSettings(),
    image_settings: ImageSettings = ImageSettings(),  # noqa: B008 - frozen
    runtime: Runtime,
) -> Tensor:
    """The same up to the decode; a `Continuation` does what comes after it, frame by frame.

    Args:
        transformer: as for `extend_video`, and all the others.
        vae: encodes the last frames.
        clip: to continue.
        prompt: what happens next.
        negative: what to avoid.
        settings: of the run.
        extend: length, overlap.
        image_settings: of the prefix.
        runtime: where.

    Returns:
        [1, 16, T, h, w] float32 on the CPU, VAE space: the new clip, the overlap included.
    """
    check_clip(clip, extend)
    check_picture(transformer.config, has_picture=True)
    return image_to_latents(
        transformer,
        vae,
        clip[-extend.overlap_frames :],
        prompt,
        negative,
        settings,
        width=clip.shape[2],
        height=clip.shape[1],
        num_frames=extend.num_frames,
        image_settings=replace(image_settings, prefix_frames=extend.overlap_frames),
        runtime=runtime,
    )


class Continuation:
    """A sink for the new frames that hands on the whole which `extend_video` would return.

    Only the overlap is held back: its frames show how the colours differ.

    Args:
        clip: [F, H, W, 3 or 4] float in 0..1, that is continued.
        extend: overlap, colours.
        sink: gets the frames of the clip, then the new ones.
        check: called before each frame; may raise to stop.
    """

    def __init__(
        self,
        clip: Tensor,
        extend: ExtendSettings,
        sink: FrameSink,
        *,
        check: Callable[[], None] = never_interrupt,
    ) -> None:
        self._clip = clip
        self._extend = extend
        self._sink = sink
        self._check = check
        self._held: list[Tensor] | None = []
        self._change: tuple[Tensor, Tensor] | None = None

    def restart(self) -> None:
        """Begin with the clip, up to the overlap."""
        self._held, self._change = [], None
        self._sink.restart()
        for frame in self._clip[: -self._extend.overlap_frames]:
            self._check()
            self._sink.write(frame[None, ..., :3].to("cpu", torch.float32))

    def write(self, frames: Tensor) -> None:
        """Take new frames; those of the overlap are handed on when all of them are there."""
        for frame in frames:
            if self._held is None:
                self._hand_on(frame)
                continue
            self._held.append(frame.clone())  # not the memory of all that came with it
            if len(self._held) == self._extend.overlap_frames:
                self._join()

    def _join(self) -> None:
        assert self._held is not None
        new, self._held = torch.stack(self._held), None
        overlap = self._clip[-len(new) :, ..., :3].to(new.device, torch.float32)
        if self._extend.color_match:
            self._change = _color_change(new, overlap)
        for index, frame in enumerate(new):
            self._hand_on(frame, overlap[index], _fade(index, len(new)))

    def _hand_on(self, frame: Tensor, before: Tensor | None = None, weight: float = 1.0) -> None:
        self._check()
        if self._change is not None:
            frame = _recolored(frame, *self._change)
        if before is not None:
            frame = torch.lerp(before, frame, weight)
        self._sink.write(frame[None])


def check_clip(clip: Tensor, extend: ExtendSettings) -> None:
    """Refuse a clip that cannot be continued, before anything is loaded or computed.

    Raises:
        ShapeError: names what is wrong, and the nearest legal value.
    """
    if clip.ndim != 4 or clip.shape[-1] not in (3, 4) or 0 in clip.shape:
        raise ShapeError(
            f"A clip must be [frames, height, width, 3 or 4 channels]; got {list(clip.shape)}."
        )
    num_frames, height, width = clip.shape[:3]
    if num_frames < MIN_CLIP_FRAMES:
        raise ShapeError(
            f"A clip of {num_frames} frames is too short to continue: give at least "
            f"{MIN_CLIP_FRAMES}, or start a video from a picture."
        )
    if num_frames < extend.overlap_frames:
        raise ShapeError(
            f"An overlap of {extend.overlap_frames} frames is longer than the clip, which has "
            f"{num_frames}: use {(num_frames - 1) // 4 * 4 + 1} or less."
        )
    check_size(width, height, extend.num_frames)


def join_clips(clip: Tensor, new: Tensor, overlap_frames: int) -> Tensor:
    """Two clips with common frames as one; over those the first fades into the second.

    Args:
        clip: [F, H, W, 3] float32.
        new: [N, H, W, 3] float32; its first frames show what the last of the clip show.
        overlap_frames: how many.

    Returns:
        [F + N - overlap_frames, H, W, 3]; every frame outside the overlap is unchanged.
    """
    start = len(clip) - overlap_frames
    joined = new.new_empty(start + len(new), *new.shape[1:])
    joined[:start] = clip[:start]
    joined[start:] = new
    for index in range(overlap_frames):
        weight = _fade(index, overlap_frames)
        joined[start + index] = torch.lerp(clip[start + index], new[index], weight)
    return joined


def _fade(index: int, overlap_frames: int) -> float:
    """Share of the new clip in a frame of the overlap."""
    # neither end is wholly one of the two: the step to a frame that is belongs to the fade
    return (index + 1) / (overlap_frames + 1)


def match_colors(new: Tensor, reference: Tensor, *, check: Callable[[], None]) -> None:
    """Give a clip the colours of other frames that show the same as its first ones, in place.

    Per channel, in linear light, mean and standard deviation over those frames become those of the
    reference: what a change of exposure and white balance would do. All frames are changed by the
    same two numbers, so that what happens later in the clip (a fade, say) is kept.

    Args:
        new: [N, H, W, 3] float32 in 0..1; overwritten.
        reference: [n, H, W, 3] float32 in 0..1, n <= N.
        check: called before each frame; may raise to stop.

    Source: Reinhard et al., Color Transfer between Images, 2001, with linear RGB for its space.
    """
    scale, shift = _color_change(new[: len(reference)], reference)
    for frame in new:
        check()
        frame.copy_(_recolored(frame, scale, shift))


def _color_change(own: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift [3] that give frames the statistics of others that show the same."""
    mean, deviation = _color_statistics(reference)
    own_mean, own_deviation = _color_statistics(own)
    contrast = (deviation / own_deviation.clamp_min(FLAT)).clamp(1 / MAX_CONTRAST, MAX_CONTRAST)
    is_flat = torch.minimum(deviation, own_deviation) < FLAT
    scale = torch.where(is_flat, 1.0, contrast).float()
    return scale, (mean - own_mean * scale).float()


def _recolored(frame: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return _to_srgb(_to_linear(frame) * scale + shift)


def _color_statistics(frames: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [3] float64 of each channel, in linear light."""
    total = torch.zeros(2, 3, dtype=torch.float64, device=frames.device)
    for frame in frames:
        linear = _to_linear(frame).double()
        total += torch.stack([linear.mean((0, 1)), linear.square().mean((0, 1))])
    mean, square = total / len(frames)
    return mean, (square - mean.square()).clamp_min(0.0).sqrt()


def _to_linear(srgb: Tensor) -> Tensor:
    """The transfer function of IEC 61966-2-1; values outside 0..1 are clipped."""
    srgb = srgb.clamp(0.0, 1.0)
    return torch.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def _to_srgb(linear: Tensor) -> Tensor:
    """The inverse of `_to_linear`; values outside 0..1 are clipped."""
    linear = linear.clamp(0.0, 1.0)
    return torch.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
