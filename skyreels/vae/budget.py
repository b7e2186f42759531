"""The peak memory of a decode or encode, predicted from shapes alone."""

import torch

from ..config import SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION, VAEConfig
from . import model as vae_model

#: covers convolution workspaces and the allocator's rounding
MEMORY_MARGIN = 1.25


def decode_bytes(config: VAEConfig, latent_shape: torch.Size, dtype: torch.dtype) -> int:
    """Estimate the peak bytes of one VideoVAE.decode call, beside the weights.

    Walks the decoder and adds up what is alive at the first resnet and the upsampler of each level
    and in the attention: whole inputs and outputs, and the piece being worked on. Tests compare it
    with the storages that model.py allocates on shape-only tensors; MEMORY_MARGIN covers what
    those do not show. Counted that way at full size in bf16, 97 frames, without the margin: 1072
    bytes per output pixel and frame for 544x960 in one pass (54.3 GB), 1293 for a 256 px tile
    (8.2 GB), 1958 for such a tile in a 17-frame window (2.2 GB).

    Args:
        config: of the VAE.
        latent_shape: [B, 16, T, h, w] of the latents in that call; see `largest_tile`.
        dtype: the compute dtype.

    Returns:
        Bytes, MEMORY_MARGIN included.
    """
    item = dtype.itemsize
    batch, _, frames, height, width = latent_shape
    area = batch * height * width
    channels = config.block_out_channels[::-1]
    tokens = frames * area * channels[0]
    scores = min(vae_model.SCORE_BYTES, 4 * area * height * width * frames)
    peak = 7 * tokens * item + 3 * scores  # norm, q, k, v, out and what an unfused kernel writes
    previous = channels[0]
    for level, width_out in enumerate(channels):
        inputs, outputs = previous * frames * area, width_out * frames * area
        shortcut = outputs if previous != width_out else 0
        first = (inputs + outputs) * item + _piece_bytes(previous, frames, area, item)
        second = (inputs + outputs + shortcut) * item + _piece_bytes(width_out, frames, area, item)
        time, rows, columns = vae_model.level_factors(level, len(channels))
        frames, area = (frames - 1) * time + 1, area * rows * columns
        enlarged = 0
        if (time, rows, columns) != (1, 1, 1):
            enlarged = (outputs + width_out * frames * area) * item
            enlarged += _piece_bytes(width_out, frames, area, item)
        peak = max(peak, first, second, enlarged)
        previous = width_out
    return int(peak * MEMORY_MARGIN)


def encode_bytes(config: VAEConfig, video_shape: torch.Size, dtype: torch.dtype) -> int:
    """Estimate the peak bytes of one VideoVAE.encode call, beside weights and video.

    It lies in the resnets at full resolution, which hold an input, an output and a piece of work;
    or, of a single small frame, in the attention.

    Args:
        config: of the VAE.
        video_shape: [B, 3, F, H, W] of the clip.
        dtype: the compute dtype.

    Returns:
        Bytes, MEMORY_MARGIN included.
    """
    batch, _, frames, height, width = video_shape
    channels, area = config.block_out_channels[0], batch * height * width
    resnet = 2 * channels * frames * area * dtype.itemsize
    resnet += _piece_bytes(channels, frames, area, dtype.itemsize)
    return max(int(resnet * MEMORY_MARGIN), attention_bytes(config, video_shape, dtype))


def attention_bytes(config: VAEConfig, video_shape: torch.Size, dtype: torch.dtype) -> int:
    """Estimate the peak bytes of the attention in the middle of the encoder, as `encode_bytes`."""
    batch, _, frames, height, width = video_shape
    per_frame = height * width // SPATIAL_COMPRESSION**2
    tokens = batch * ((frames - 1) // TEMPORAL_COMPRESSION + 1) * per_frame
    # norm, q, k, v, out and what an unfused kernel writes
    hidden = 7 * tokens * config.block_out_channels[-1] * dtype.itemsize
    scores = min(vae_model.SCORE_BYTES, 4 * tokens * per_frame)
    return int((hidden + 3 * scores) * MEMORY_MARGIN)


def _piece_bytes(channels: int, frames: int, area: int, item: int) -> int:
    """Bytes of the temporaries of one convolution at one piece of its input."""
    step = max(1, vae_model.PIECE_ELEMENTS // (channels * area))
    if step >= frames:
        return channels * (2 * frames + 2) * area * item  # normalised, padded
    return channels * area * (step + 2) * (4 + item)  # normalised in fp32, cast or padded
