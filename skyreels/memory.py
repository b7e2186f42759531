"""Where weights are while they are used, and how many bytes a run needs.

Only what `SkyReelsTransformer.denoise` needs counts as the weights of the loop (9.06 G of 12.82 G
parameters). A transformer whose loop does not fit the device is streamed: its small layers and as
many blocks as fit stay there for the whole run, the other blocks visit for the length of their own
forward pass. The tensors on the offload device are kept throughout, so leaving costs nothing and a
cancelled or failed run finds every weight where it was.

Given up for now: prefetching the next block while one computes (performance plan, section 2.5).
"""

from collections.abc import Callable, Iterator, Mapping
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
#: 51,256 x 3072 in bfloat16 (tests/engine/test_budget.py repeats the count), and a little more
PEAK_HIDDEN_TENSORS = {"whole": 8.8, "chunks": 6.2, "head groups": 4.6}
#: what must be left for "whole", which is hardly faster than "chunks"
WHOLE_MARGIN_BYTES = 1024**3
#: kernels, workspaces and fragmentation
RESERVE_BYTES = 512 * 1024**2
#: what decode_bytes adds for convolution workspaces and the allocator's rounding
MEMORY_MARGIN = 1.25


def weight_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    return sum(tensor.nbytes for tensor in _tensors(module))


def missing_bytes(module: nn.Module, device: torch.device) -> int:
    """Bytes of the parameters and buffers that are not on `device`."""
    return _missing(_tensors(module), device)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _loop_tensors(transformer: SkyReelsTransformer, part: nn.Module | None = None) -> list[Tensor]:
    """What of the transformer, or of a part of it, `denoise` needs: not the conditioners."""
    apart = {id(t) for module in transformer.conditioners for t in _tensors(module)}
    return [t for t in _tensors(part or transformer) if id(t) not in apart]


def _missing(tensors: list[Tensor], device: torch.device) -> int:
    return sum(t.nbytes for t in tensors if t.device != device)


def sampling_bytes(
    config: TransformerConfig, num_tokens: int, dtype: torch.dtype, layout: str = "chunks"
) -> int:
    """Peak bytes of one forward pass beyond the weights.

    Args:
        num_tokens: image and text tokens of one branch; the branches run one after the other.
        dtype: of the activations. layout: a name of config.LAYOUTS.
    """
    hidden = num_tokens * config.hidden_size * dtype.itemsize
    return int(PEAK_HIDDEN_TENSORS[layout] * hidden)


def choose_layout(
    transformer: SkyReelsTransformer, activation_bytes: Mapping[str, int], runtime: Runtime
) -> str:
    """The fastest layout that leaves room for all weights of the loop, else the smallest.

    Args:
        activation_bytes: of each layout; names of config.LAYOUTS, fastest first.
    """
    weights = _missing(_loop_tensors(transformer), runtime.device) + RESERVE_BYTES
    runtime.make_room(weights + activation_bytes["chunks"])
    free = runtime.free_bytes() - weights
    for layout, num_bytes in activation_bytes.items():
        margin = WHOLE_MARGIN_BYTES if layout == "whole" else 0
        if num_bytes + margin <= free:
            return layout
    return "head groups"


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
        stack.callback(_visit(_tensors(module), device))
        yield


def _visit(tensors: list[Tensor], device: torch.device) -> Callable[[], None]:
    """Copy tensors to `device`; the function returned puts the originals back."""
    homes: list[tuple[Tensor, Tensor]] = []

    def restore() -> None:
        for tensor, home in homes:
            tensor.data = home

    try:
        for tensor in tensors:
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

    Conditioners stay away: they visit when they are called (see modulation.py).

    Args:
        transformer: on any device; left alone if it is on `runtime.device` already.
        activation_bytes: to keep free beside the weights, from `sampling_bytes`.
    Yields:
        run_block for `SkyReelsTransformer.denoise`; asks for an interrupt before each block and
        brings in the blocks that do not live on the device.
    Raises:
        OutOfRoomError: not even one block fits beside the activations.
    """
    device = runtime.device
    parts = {id(block): _loop_tensors(transformer, block) for block in transformer.blocks}
    conditioners = {id(module): _tensors(module) for module in transformer.conditioners}
    in_blocks = {id(tensor) for tensors in parts.values() for tensor in tensors}
    outside = [t for t in _loop_tensors(transformer) if id(t) not in in_blocks]
    missing = _missing(_loop_tensors(transformer), device)
    runtime.make_room(missing + activation_bytes + RESERVE_BYTES)
    away = {key: tensors for key, tensors in parts.items() if _missing(tensors, device)}
    free = runtime.free_bytes() - activation_bytes - _missing(outside, device)
    if device.type != "cpu":
        free -= RESERVE_BYTES
    sizes = {key: sum(t.nbytes for t in tensors) for key, tensors in away.items()}
    largest = max(sizes.values(), default=0)
    if away and free < largest:
        raise OutOfRoomError(
            f"One step needs {activation_bytes / 1e9:.1f} GB for activations and "
            f"{largest / 1e9:.1f} GB for a block on {device}, {(largest - free) / 1e9:.1f} GB more "
            "than there is: use fewer frames or a smaller size, or close other programs."
        )
    with ExitStack() as stack:
        stack.callback(_visit(outside, device))
        visitors = dict(conditioners)
        for key, tensors in away.items():
            free -= sizes[key]
            if free < largest:  # room for one visitor must remain
                visitors[key] = tensors
                continue
            runtime.check_interrupt()
            stack.callback(_visit(tensors, device))

        def run_block(module: nn.Module, *args: Any) -> Any:
            runtime.check_interrupt()
            if id(module) not in visitors:
                return module(*args)
            restore = _visit(visitors[id(module)], device)
            try:
                return module(*args)
            finally:
                restore()

        yield run_block
