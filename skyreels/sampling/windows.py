"""The prediction of a long clip from the predictions of windows that overlap in time.

A window begins anew at position 0 of the rotary embedding, as a clip of its length would. So that
the person stays the same, the network is shown the picture at the first frame of every window, also
of those that begin later (`cond_retain_index_list` "0" of ComfyUI's context windows, and what I2V
models are used with there): without it, later windows would see no picture at all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..conditioning.latents import ImageConditioning
from ..config import ContextWindows

#: predict(latents, image latents or None) -> velocities, each of the shape of the latents
Predict = Callable[[Tensor, Tensor | None], Sequence[Tensor]]


@dataclass(frozen=True, eq=False)
class Windowed:
    """What the windows of a clip see of the picture, and how their predictions are blended.

    Attributes:
        windows: length, overlap, schedule.
        weights: [length, 1, 1] float32, of the frames of a window.
        image_latents: [1, 16, T, h, w] of the whole clip; None for text to video.
        num_given: first latent frames of the clip that are given.
    """

    windows: ContextWindows
    weights: Tensor
    image_latents: Tensor | None
    num_given: int

    def picture_of(self, start: int) -> Tensor | None:
        """The image latents of the window that begins at a frame; its first one is never empty."""
        if self.image_latents is None:
            return None
        own = self.image_latents[:, :, start : start + self.windows.length]
        if start < self.num_given:
            return own
        return torch.cat([self.image_latents[:, :, :1], own[:, :, 1:]], dim=2)

    def spread(self, predict: Predict, latents: Tensor, step: int) -> list[Tensor]:
        """The weighted means of what is predicted for the windows of a step."""
        sums: list[Tensor] = []
        total = torch.zeros_like(latents[0, 0, :, :1, :1])
        for start in self.windows.starts(len(total), step):
            place = slice(start, start + self.windows.length)
            made = predict(latents[:, :, place], self.picture_of(start))
            sums = sums or [torch.zeros_like(latents) for _ in made]
            for each, velocity in zip(sums, made, strict=True):
                each[:, :, place] += velocity.float() * self.weights
            total[place] += self.weights
        return [each / total for each in sums]


#: beside the latents: [1, 16, T, h, w] of a clip that is predicted whole, None for text to video
Picture = Tensor | Windowed | None


def picture_of_run(
    image: ImageConditioning, windows: ContextWindows | None, device: torch.device
) -> Picture:
    """What the network sees of the picture.

    Args:
        image: size of the clip, and the latent frames that are given.
        windows: of the run; a clip that is not longer than one is predicted whole.
        device: of the latents.

    Returns:
        Image latents on the device, in windows or not.
    """
    padded = image.padded()
    if padded is not None:
        padded = padded.to(device)
    if windows is None or image.latent_shape[2] <= windows.length:
        return padded
    weights = torch.tensor(windows.weights(), device=device)[:, None, None]
    num_given = 0 if image.image_latents is None else image.image_latents.shape[2]
    return Windowed(windows, weights, padded, num_given)


def predict_clip(
    predict: Predict, latents: Tensor, picture: Picture, step: int
) -> Sequence[Tensor]:
    """Predictions of a clip, at once or in windows.

    Args:
        predict: makes them of as many frames as it is given.
        latents: [1, 16, T, h, w] of the clip.
        picture: from `picture_of_run`.
        step: of the schedule, from 0.

    Returns:
        Velocities [1, 16, T, h, w].
    """
    if isinstance(picture, Windowed):
        return picture.spread(predict, latents, step)
    return predict(latents, picture)


def evaluated_shape(image: ImageConditioning, windows: ContextWindows | None) -> tuple[int, ...]:
    """[1, 16, T, h, w] of what one model evaluation sees: a window, or the clip."""
    batch, channels, frames, height, width = image.latent_shape
    if windows is not None:
        frames = min(frames, windows.length)
    return (batch, channels, frames, height, width)
