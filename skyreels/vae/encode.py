"""Encode a clip in little memory: the two wide levels of the encoder a few frames at a time.

At full resolution one activation of a clip is larger than a small card (4.4 GB for 33 frames of
960x544 in bf16), and the GroupNorm between two layers needs the statistics of all frames. So a
level is walked once for each of its norms: each pass computes everything up to that norm and keeps
its statistics only; the last pass keeps the level's output, a quarter or an eighth of the input.
Convolutions look back two frames and never ahead, so a pass needs no more than those beside the
frames it works on. The result is that of `VideoVAE.encode` up to rounding, for 2.4 times the
products of those two levels.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from .model import (
    SYNCED_PIECE_ELEMENTS,
    CausalConv3d,
    Check,
    Clip,
    ConvStream,
    Frozen,
    Level,
    Moments,
    Pieces,
    Resample,
    ResnetBlock,
    VideoVAE,
    Walk,
    check_video_shape,
)

#: levels that are walked in pieces; those after them are an eighth as large
STREAMED_LEVELS = 2
#: frames of a piece after the first, which is one frame: even, as the second level halves time
PIECE_FRAMES = 2

#: [B, C, t, H, W] -> the frames that a layer makes of them and of those before; None for none yet
_Push = Callable[[Tensor], Tensor | None]


@torch.no_grad()
def encode_streamed(vae: VideoVAE, video: Tensor, *, check: Check) -> Tensor:
    """Encode a clip to the mode of its posterior, as `VideoVAE.encode`.

    Args:
        vae: on the device of the computation.
        video: [B, 3, F, H, W] in [-1, 1]; F = 4k + 1, H and W multiples of 8.
        check: called before each piece and between blocks; may raise to stop.

    Returns:
        [B, 16, T, h, w], VAE space (unscaled).

    Raises:
        ShapeError: the clip breaks one of these rules.
    """
    check_video_shape(video.shape, vae.config.in_channels)
    encoder = vae.encoder
    lengths = [1, *[PIECE_FRAMES] * (video.shape[2] // PIECE_FRAMES)]
    clip: Pieces = list(torch.split(video.to(vae.quant_conv.weight), lengths, 2))
    begin: list[nn.Module] = [encoder.conv_in]
    for level in list(encoder.down_blocks)[:STREAMED_LEVELS]:
        assert isinstance(level, Level)
        clip = _stream([*begin, *level.resnets, *level.downsamplers], clip, check)
        begin = []
    walk = Walk(check, piece_elements=SYNCED_PIECE_ELEMENTS)
    hidden = encoder.from_level(STREAMED_LEVELS, Clip(clip), walk)
    moments: Tensor = vae.quant_conv(hidden)
    return moments[:, : vae.config.latent_channels].contiguous()


def _stream(blocks: list[nn.Module], clip: Pieces, check: Check) -> Pieces:
    """Pieces [B, C, t, H, W] -> [B, C', t', H', W'], which are not changed."""
    frozen: Frozen = {}
    for block in blocks:
        if isinstance(block, ResnetBlock):
            for norm, bias in ((block.norm1, None), (block.norm2, block.conv1.conv.bias)):
                moments = Moments()
                for piece in _pass(blocks, clip, frozen, check):
                    moments.add(piece)
                    del piece
                frozen[norm] = moments.affine(norm, bias, is_one_clip=False)
    return list(_pass(blocks, clip, frozen, check))


def _pass(blocks: list[nn.Module], clip: Pieces, frozen: Frozen, check: Check) -> Iterator[Tensor]:
    """Walk a level up to its first norm that is not known, or to its end.

    Args:
        blocks: of the level, in order.
        clip: pieces [B, C, t, H, W]; not changed.
        frozen: the norms that are known.
        check: called before each piece.

    Yields:
        [B, C', t', H', W'], piece by piece; before a second norm without the bias of the
        convolution.
    """
    pushes = _pushes(blocks, frozen)
    for piece in clip:
        check()
        # layers overwrite what they are given
        frames: Tensor | None = piece.clone(memory_format=torch.channels_last_3d)
        for push in pushes:
            assert frames is not None
            frames = push(frames)
        if frames is not None:
            yield frames
        del frames


def _pushes(blocks: list[nn.Module], frozen: Frozen) -> list[_Push]:
    """The layers up to the first norm that is not known."""
    pushes: list[_Push] = []
    for block in blocks:
        if isinstance(block, ResnetBlock):
            if block.norm1 not in frozen:
                break
            if block.norm2 not in frozen:
                conv1 = ConvStream(block.conv1, frozen[block.norm1], keeps_copies=True)
                pushes.append(partial(conv1, with_bias=False))
                break
            pushes.append(block.stream(frozen))
        elif isinstance(block, Resample):
            pushes.append(block.stream(frozen))
        else:
            assert isinstance(block, CausalConv3d)
            pushes.append(ConvStream(block, keeps_copies=True))
    return pushes
