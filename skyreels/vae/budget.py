"""The peak memory of a decode, predicted from shapes alone."""

import math

import torch

from ..config import VAEConfig
from . import model as vae_model

#: covers convolution workspaces and the allocator's rounding
MEMORY_MARGIN = 1.25


def decode_bytes(config: VAEConfig, latent_shape: torch.Size, dtype: torch.dtype) -> int:
    """Estimate the peak bytes of one VideoVAE.decode call, beside the weights.

    Walks the decoder and adds up what is alive at the first resnet and the upsampler of each level
    and in the attention: whole clips, and the piece being worked on. Tests compare it with the
    storages that model.py allocates on shape-only tensors; MEMORY_MARGIN covers what those do not
    show. Encoding a clip of that size takes less: the encoder is the narrower half.

    Args:
        config: of the VAE.
        latent_shape: [B, 16, T, h, w] of the latents in that call; see `largest_tile`.
        dtype: the compute dtype.

    Returns:
        Bytes, MEMORY_MARGIN included.
    """
    item = dtype.itemsize
    batch, _, frames, height, width = latent_shape
    channels = config.block_out_channels[::-1]
    tokens = batch * channels[0] * frames * height * width
    scores = min(vae_model.SCORE_BYTES, 4 * batch * (height * width) ** 2 * frames)
    wide = torch.promote_types(dtype, torch.float32).itemsize
    # beside the clip: its norm with wide copies; q, k, v, out and what an unfused kernel writes
    peak = tokens * item + max(tokens * (2 * wide + item), 4 * tokens * item + 3 * scores)
    previous = channels[0]
    for level, width_out in enumerate(channels):
        inputs, outputs = (
            c * batch * frames * height * width * item for c in (previous, width_out)
        )
        into, of = (
            _piece_bytes(c, batch, frames, height, width, item) for c in (previous, width_out)
        )
        peak = max(peak, max(inputs, outputs) + into, 2 * outputs + of)
        if previous == width_out:
            peak = max(peak, inputs + outputs + into)
        factors = vae_model.level_factors(level, len(channels))
        if factors != (1, 1, 1):
            frames = (frames - 1) * factors[0] + 1
            height, width = height * factors[1], width * factors[2]
            enlarged = width_out * batch * frames * height * width * item
            piece = min(enlarged, vae_model.PIECE_ELEMENTS * item)
            peak = max(peak, outputs + enlarged + piece // 2)
        previous = width_out
    return int((peak + folded_bytes(config, dtype)) * MEMORY_MARGIN)


def folded_bytes(config: VAEConfig, dtype: torch.dtype) -> int:
    """Bytes of the weights that `VideoVAE.folded` makes for a run: 62 MB in bf16."""
    levels = len(config.block_out_channels)
    total = 0
    for level, width in enumerate(config.block_out_channels[::-1]):
        factors = vae_model.level_factors(level, levels)
        if factors[1] > 1:  # copies and taps of each enlarged axis
            total += width**2 * math.prod(4 if factor > 1 else 3 for factor in factors)
    return total * dtype.itemsize


def _piece_bytes(channels: int, batch: int, frames: int, height: int, width: int, item: int) -> int:
    """Bytes of the temporaries of one convolution: a padded piece, the one before, the result."""
    frame = batch * channels * height * width
    step = min(frames, max(1, vae_model.PIECE_ELEMENTS // frame))
    padded = batch * channels * (height + 2) * (width + 2)
    before = step + 2 if frames > step else 0
    return item * (padded * (step + 2 + before) + frame * step)
