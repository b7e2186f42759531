"""Where weights are while they are used, and how many bytes a run needs.

A transformer that does not fit the device is streamed: its small layers and as many blocks as fit
stay there for the whole run, the other blocks visit for the length of their own forward pass. The
tensors on the offload device are kept throughout, so leaving costs nothing and a cancelled or
failed run finds every weight where it was.

Given up for now: prefetching the next block while one computes (performance plan, section 2.5).
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .config import TransformerConfig, VAEConfig
from .errors import OutOfRoomError
from .model import RunBlock, SkyReelsTransformer
from .runtime import Runtime
from .vae import model as vae_model

#: hidden-sized tensors alive at the peak of a block, counted on shape-only tensors at the full
#: 51,256 x 3072 in bfloat16 (tests/engine/test_memory.py repeats the count)
PEAK_HIDDEN_TENSORS = 20
#: kernels, workspaces and fragmentation
RESERVE_BYTES = 512 * 1024**2
#: what decode_bytes adds for convolution workspaces and the allocator's rounding
MEMORY_MARGIN = 1.25


def weight_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def missing_bytes(module: nn.Module, device: torch.device) -> int:
    """Bytes of the parameters and buffers that are not on `device`."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(t.numel() * t.itemsize for t in tensors if t.device != device)


def sampling_bytes(config: TransformerConfig, num_tokens: int, dtype: torch.dtype) -> int:
    """Peak bytes of one forward pass beyond the weights.

    Args:
        num_tokens: image and text tokens of one branch; the branches run one after the other.
        dtype: of the activations.
    """
    return PEAK_HIDDEN_TENSORS * num_tokens * config.hidden_size * dtype.itemsize


def decode_bytes(config: VAEConfig, latent_shape: torch.Size, dtype: torch.dtype) -> int:
    """Estimate the peak bytes of one VideoVAE.decode call, beside the weights.

    Walks the decoder and adds up what is alive at the first resnet and the upsampler of each level
    and in the attention: whole inputs and outputs, and the piece being worked on. Checked against
    the storages that model.py really allocates on shape-only tensors (tests/engine/test_tiling.py);
    MEMORY_MARGIN covers what those do not show. Measured that way at full size in bf16, 97 frames,
    without the margin: 1072 bytes per output pixel and frame for 544x960 at once (54.3 GB), 1293
    for a 256 px tile (8.2 GB), 1958 for such a tile in a 17-frame window (2.2 GB). Encoding a clip
    of that size takes less: the encoder is the narrower half.

    Args:
        latent_shape: [B, 16, T, h, w] of what that call receives; see `largest_tile`.
    """
    item = dtype.itemsize
    batch, _, frames, height, width = latent_shape
    area = batch * height * width
    channels = config.block_out_channels[::-1]
    tokens = frames * area * channels[0]
    scores = min(vae_model.SCORE_BYTES, 4 * area * height * width * frames)
    peak = 7 * tokens * item + 3 * scores  # norm, q, k, v, out and what a math kernel writes
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


def _piece_bytes(channels: int, frames: int, area: int, item: int) -> int:
    """Bytes of the temporaries with which one convolution works on one piece of its input."""
    step = max(1, vae_model.PIECE_ELEMENTS // (channels * area))
    if step >= frames:
        return channels * (2 * frames + 2) * area * item  # normalised, padded
    return channels * area * (step + 2) * (4 + item)  # normalised in fp32, cast or padded


@contextmanager
def on_device(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Have a module's weights on `device` inside the block; afterwards they are where they were."""
    with ExitStack() as stack:
        stack.callback(_visit(module, device))
        yield


def _visit(module: nn.Module, device: torch.device) -> Callable[[], None]:
    """Copy a module's weights to `device`; the function returned puts the originals back."""
    homes: list[tuple[Tensor, Tensor]] = []

    def restore() -> None:
        for tensor, home in homes:
            tensor.data = home

    try:
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.device != device:
                home = tensor.data
                tensor.data = home.to(device, non_blocking=True)
                homes.append((tensor, home))
    except BaseException:
        restore()
        raise
    return restore


@contextmanager
def placed(
    transformer: SkyReelsTransformer, runtime: Runtime, activation_bytes: int
) -> Iterator[RunBlock]:
    """Make a transformer runnable on `runtime.device` for the length of a run.

    Args:
        transformer: on any device; left alone if it is on `runtime.device` already.
        activation_bytes: to keep free beside the weights, from `sampling_bytes`.
    Yields:
        run_block for `SkyReelsTransformer.forward`; asks for an interrupt before each block and
        brings in the blocks that do not live on the device.
    Raises:
        OutOfRoomError: not even one block fits beside the activations.
    """
    device = runtime.device
    runtime.make_room(missing_bytes(transformer, device) + activation_bytes + RESERVE_BYTES)
    away = [block for block in transformer.blocks if missing_bytes(block, device)]
    free = runtime.free_bytes() - activation_bytes
    if device.type != "cpu":
        free -= RESERVE_BYTES
    outside = [child for name, child in transformer.named_children() if "blocks" not in name]
    free -= sum(missing_bytes(child, device) for child in outside)
    largest = max((weight_bytes(block) for block in away), default=0)
    if away and free < largest:
        raise OutOfRoomError(
            f"One step needs {activation_bytes / 1e9:.1f} GB for activations and "
            f"{largest / 1e9:.1f} GB for a block on {device}, {(largest - free) / 1e9:.1f} GB more "
            "than there is: use fewer frames or a smaller size, or close other programs."
        )
    with ExitStack() as stack:
        for child in outside:
            stack.callback(_visit(child, device))
        streamed = set()
        for block in away:
            free -= weight_bytes(block)
            if free < largest:  # room for one visitor must remain
                streamed.add(id(block))
                continue
            runtime.check_interrupt()
            stack.callback(_visit(block, device))

        def run_block(block: nn.Module, *args: Any) -> Any:
            runtime.check_interrupt()
            if id(block) not in streamed:
                return block(*args)
            with on_device(block, device):
                return block(*args)

        yield run_block
