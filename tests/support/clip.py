"""A small video that really plays."""

import io
from functools import lru_cache

import numpy as np


@lru_cache
def make_clip(num_frames: int = 9, width: int = 64, height: int = 48) -> bytes:
    """An MP4 file of a bright square that moves right, 24 frames per second."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(num_frames):
            picture = np.zeros((height, width, 3), np.uint8)
            left = 4 * number % (width - 16)
            picture[16:32, left : left + 16] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()
