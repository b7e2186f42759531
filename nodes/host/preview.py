"""Moving previews: the denoised estimate as a small clip, for the page that queued the prompt.

ComfyUI's own preview of a video is one still frame. Where it is made with latent-to-RGB factors,
the same factors give every latent frame. The page (web/preview.js) shows them one after the other
and fades between them: upsampled in time there, a clip takes half the bytes.
"""

import base64
import io
import logging
import math
import os
import threading
import time
from typing import Any

import torch
from torch import Tensor

from ...skyreels.builtin import RGB_BIAS, RGB_FACTORS
from ...skyreels.conditioning.latents import latents_to_rgb
from ...skyreels.config import FRAMES_PER_SECOND, TEMPORAL_COMPRESSION
from .server import page_address, prompt_client, send_event

logger = logging.getLogger("skyreels.nodes.host.preview")

#: environment variable: frames of a clip at most
FRAMES_VARIABLE = "SKYREELS_PREVIEW_FRAMES"
#: between the starts of two clips
PERIOD_S = 1.0
#: of a JPEG; as base64 it takes a third more
MAX_BYTES = 36 * 1024
#: of all frames of a clip; noise of this size fits MAX_BYTES at the last quality
MAX_PIXELS = 2**18
#: of JPEG, tried in turn until the file is small enough
QUALITIES = (85, 70, 50, 30, 20, 10, 3)
#: JPEG codes 8 x 8 pixels together: frames that shared them would run into each other
BLOCK = 8


class MovingPreview:
    """Sends denoised estimates to one page, at most one a second, while sampling goes on.

    The loop only pays for a linear map and the copy of a few hundred kilobytes; a thread that lives
    as long as one clip does the rest. An estimate that comes too early is dropped: none waits, and
    each clip is of the latest.

    Args:
        unique_id: of the node that runs.
        client: the page.
        factors: [16, 3].
        bias: [3].
        max_edge: in pixels, of ComfyUI's own previews.
        most: frames of a clip at most; None for all latent frames.
    """

    def __init__(
        self,
        unique_id: str,
        client: str,
        factors: Tensor,
        bias: Tensor,
        max_edge: int,
        most: int | None = None,
    ) -> None:
        self._unique_id, self._client, self._max_edge = unique_id, client, max_edge
        self._factors, self._bias, self._most = factors, bias, most
        self._due_s = -math.inf
        self._has_failed = False
        self._thread: threading.Thread | None = None
        self._stop_event = threading.Event()

    def offer(self, latents: Tensor) -> None:
        """Show an estimate, if it is time for one.

        Args:
            latents: [1, 16, T, h, w] on any device, model space; may change after the call.
        """
        now_s = time.monotonic()
        is_busy = self._thread is not None and self._thread.is_alive()
        if self._has_failed or is_busy or now_s < self._due_s:
            return
        self._due_s = now_s + PERIOD_S
        try:
            places = spread_frames(latents.shape[2], self._most)
            fps = FRAMES_PER_SECOND / TEMPORAL_COMPRESSION * len(places) / latents.shape[2]
            shown = latents[:, :, places]
            frames = latents_to_rgb(shown, self._factors, self._bias, MAX_PIXELS).cpu()
            address = page_address(self._unique_id)
        except Exception:  # noqa: BLE001 - a preview never ends a run
            self._give_up()
            return
        self._thread = threading.Thread(
            target=self._send, args=(frames, fps, address), name="skyreels preview", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """The run has ended, or was cancelled: nothing is sent after this."""
        self._stop_event.set()
        if self._thread is not None:
            self._thread.join()
        self._thread, self._stop_event = None, threading.Event()

    def _send(self, frames: Tensor, fps: float, address: dict[str, str]) -> None:
        try:
            clip = {**contact_sheet(frames), "fps": fps, **address, "max_edge": self._max_edge}
            if not self._stop_event.is_set():
                send_event("skyreels.preview", clip, self._client)
        except Exception:  # noqa: BLE001 - a preview never ends a run
            self._give_up()

    def _give_up(self) -> None:
        self._has_failed = True
        logger.warning("No more moving previews in this run, because of an error:", exc_info=True)


def preview_format(is_builtin: bool) -> Any:
    """What ComfyUI makes previews by: HunyuanVideo's colours, or those of the built-in model.

    Args:
        is_builtin: the built-in model has latents of its own, which no other decoder fits either.

    Returns:
        A latent format of ComfyUI.
    """
    import comfy.latent_formats

    latent_format: Any = comfy.latent_formats.HunyuanVideo()
    if is_builtin:
        latent_format.latent_rgb_factors = [list(row) for row in RGB_FACTORS]
        latent_format.latent_rgb_factors_bias = list(RGB_BIAS)
        latent_format.taesd_decoder_name = None
    return latent_format


def moving_preview(
    previewer: Any, latent_format: Any, unique_id: str | None
) -> MovingPreview | None:
    """The moving previews of a run.

    Args:
        previewer: of ComfyUI, for this run.
        latent_format: from `preview_format`.
        unique_id: of the node that runs.

    Returns:
        None where there is no page, and where ComfyUI draws none or otherwise: previews are
        switched off, made by a decoder that the user has chosen, or by another pack.
    """
    import latent_preview

    client = prompt_client()
    if not (client and unique_id and isinstance(previewer, latent_preview.Latent2RGBPreviewer)):
        return None
    return MovingPreview(
        unique_id,
        client,
        torch.tensor(latent_format.latent_rgb_factors),
        torch.tensor(latent_format.latent_rgb_factors_bias),
        int(latent_preview.MAX_PREVIEW_RESOLUTION),
        max_frames_wanted(),
    )


def max_frames_wanted() -> int | None:
    """Frames of a clip at most, as SKYREELS_PREVIEW_FRAMES says; None for all of them."""
    text = os.environ.get(FRAMES_VARIABLE, "").strip()
    if not text:
        return None
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        logger.warning(
            "%s is %r, and must be a whole number from 1: all frames are shown.",
            FRAMES_VARIABLE,
            text,
        )
        return None
    return int(text)


def spread_frames(count: int, most: int | None) -> list[int]:
    """Which of `count` frames are shown, evenly apart, the first and the last among them."""
    if most is None or count <= most:
        return list(range(count))
    if most == 1:
        return [0]
    return [round(index * (count - 1) / (most - 1)) for index in range(most)]


def contact_sheet(frames: Tensor) -> dict[str, Any]:
    """The frames of a clip in one JPEG, row by row, with what is needed to cut them out.

    Args:
        frames: [T, H, W, 3] uint8 on the CPU, of at most MAX_PIXELS in all.

    Returns:
        `image`, base64 of at most 4/3 * MAX_BYTES; `columns` and `rows` of cells of equal size;
        `count` frames, each `width` x `height` at the top left of its cell; `fps` at which they
        follow one another.
    """
    import numpy as np
    from PIL import Image

    count, height, width, _ = frames.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    unused = ((0, columns * rows - count), (0, -height % BLOCK), (0, -width % BLOCK), (0, 0))
    cells = np.pad(frames.numpy(), unused, mode="edge")
    cells = cells.reshape(rows, columns, *cells.shape[1:]).swapaxes(1, 2)
    sheet = Image.fromarray(cells.reshape(rows * cells.shape[1], -1, 3))
    for quality in QUALITIES:
        file = io.BytesIO()
        sheet.save(file, "JPEG", quality=quality, subsampling="4:4:4")  # a pixel is 8 of the video
        if file.tell() <= MAX_BYTES:
            break
    return {
        "image": base64.b64encode(file.getvalue()).decode(),
        "columns": columns,
        "rows": rows,
        "count": count,
        "width": width,
        "height": height,
        "fps": FRAMES_PER_SECOND / TEMPORAL_COMPRESSION,
    }
