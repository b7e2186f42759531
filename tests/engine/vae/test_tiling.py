"""Tiled decoding: geometry, blends, streaming, memory, refusals."""

import itertools
import random
from dataclasses import replace

import pytest
import torch
from comfyui_skyreels.skyreels.config import DECODE_MODES, TILINGS, Tiling, VAEConfig
from comfyui_skyreels.skyreels.errors import OptionError, OutOfRoomError, ShapeError
from comfyui_skyreels.skyreels.runtime import TorchRuntime
from comfyui_skyreels.skyreels.vae import tiling as tiling_module
from comfyui_skyreels.skyreels.vae.budget import decode_bytes
from comfyui_skyreels.skyreels.vae.model import VideoVAE
from comfyui_skyreels.skyreels.vae.tiling import (
    DecodePlan,
    choose_decode,
    count_decodes,
    decode_frames,
    iter_decode,
    largest_tile,
    plan_bytes,
    tile_starts,
    window_starts,
)
from support.peak import PeakBytes

pytestmark = pytest.mark.usefixtures("fast_convolutions")
FULL_SIZE = torch.Size((1, 16, 25, 68, 120))  # 97 x 544 x 960
GIB = 2**30


class IdentityDecoder:
    """Repeats latents into pixels and frames in the geometry of the VAE."""

    def __init__(self):
        self.shapes = []

    def decode(self, vae_latents, *, check):
        check()
        self.shapes.append(tuple(vae_latents.shape[2:]))
        pixels = vae_latents[:, :3].repeat_interleave(8, 3).repeat_interleave(8, 4)
        return torch.cat([pixels[:, :, :1], pixels[:, :, 1:].repeat_interleave(4, 2)], dim=2)


class UnevenDecoder(IdentityDecoder):
    """Differs from call to call and place to place, so that every blend weight shows."""

    def decode(self, vae_latents, *, check):
        generator = torch.Generator().manual_seed(len(self.shapes))
        pixels = super().decode(vae_latents, check=check)
        return pixels + torch.randn(pixels.shape, generator=generator)


def identity(vae_latents):
    return IdentityDecoder().decode(vae_latents, check=lambda: None)


def decode_all(vae, vae_latents, tiling, runtime=None):
    chunks = list(iter_decode(vae, vae_latents, tiling, runtime=runtime or TorchRuntime()))
    return torch.cat(chunks, dim=2)


def latents(frames, height, width):
    return torch.randn(1, 16, frames, height, width)


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(3)
    return VideoVAE(
        VAEConfig(block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4)
    )


# geometry


@pytest.mark.parametrize("name", TILINGS)
@pytest.mark.parametrize("size", [(1, 3, 3), (2, 33, 40), (3, 68, 31), (7, 3, 70), (25, 2, 33)])
def test_an_identity_decoder_gives_exactly_the_identity_under_each_preset(name, size):
    vae_latents = latents(*size)
    assert torch.equal(
        decode_all(IdentityDecoder(), vae_latents, TILINGS[name]), identity(vae_latents)
    )


def random_cases(count):
    generator = random.Random(20)
    for _ in range(count):
        tile = [generator.randint(1, 9) for _ in range(3)]
        stride = [generator.randint(1, t) for t in tile]
        size = [generator.randint(1, 14) for _ in range(3)]
        whole = generator.random() < 0.25
        yield pytest.param(
            size,
            Tiling(
                8 * tile[0],
                8 * tile[1],
                0 if whole else 4 * tile[2],
                8 * stride[0],
                8 * stride[1],
                0 if whole else 4 * stride[2],
            ),
            id=f"{size}-{tile}-{stride}-{whole}".replace(" ", ""),
        )


@pytest.mark.parametrize(("size", "tiling"), list(random_cases(60)))
def test_an_identity_decoder_gives_exactly_the_identity_for_any_tiles(size, tiling):
    vae_latents = latents(*size)
    decoder = IdentityDecoder()
    assert torch.equal(decode_all(decoder, vae_latents, tiling), identity(vae_latents))
    assert len(decoder.shapes) == count_decodes(vae_latents.shape, tiling)
    largest = largest_tile(vae_latents.shape, tiling)[2:]
    assert all(
        all(side <= most for side, most in zip(shape, largest, strict=True))
        for shape in decoder.shapes
    )


@pytest.mark.parametrize("frames", [1, 2, 3, 7])
@pytest.mark.parametrize("tiling", [None, *TILINGS.values()])
def test_a_clip_has_4k_plus_1_frames_of_eight_times_the_size(frames, tiling):
    clip = decode_all(IdentityDecoder(), latents(frames, 5, 34), tiling)
    assert clip.shape == (1, 3, 4 * (frames - 1) + 1, 40, 272)
    assert clip.dtype == torch.float32


def test_a_window_that_would_add_no_frame_is_not_decoded():
    decoder = IdentityDecoder()
    decode_all(decoder, latents(25, 2, 2), TILINGS["tiled-diffusers"])
    assert len(decoder.shapes) == 8  # diffusers decodes a ninth and drops all of it
    assert [shape[0] for shape in decoder.shapes] == [5] * 7 + [4]
    assert window_starts(25, TILINGS["tiled-tencent"]) == ([0, 12], 17)


@pytest.mark.parametrize(
    ("preset", "calls"), [("tiled", 15), ("tiled-tencent", 30), ("tiled-diffusers", 120)]
)
def test_a_full_size_clip_takes_the_expected_number_of_decodes(preset, calls):
    assert count_decodes(FULL_SIZE, TILINGS[preset]) == calls


def test_a_frame_that_fits_one_tile_is_not_cut():
    assert tile_starts(torch.Size((1, 16, 1, 32, 32)), Tiling()) == ([0], [0])
    assert tile_starts(torch.Size((1, 16, 1, 32, 33)), Tiling()) == ([0, 24], [0, 24])


def test_an_overlap_ramps_linearly_from_the_earlier_window_at_weight_zero():
    class Counter(IdentityDecoder):
        def decode(self, vae_latents, *, check):
            pixels = super().decode(vae_latents, check=check)
            return torch.full_like(pixels, float(len(self.shapes)))

    tiling = Tiling(64, 64, 16, 48, 48, 12)
    in_time = decode_all(Counter(), latents(7, 1, 1), tiling)[0, 0, :, 0, 0]
    assert in_time.tolist() == [1.0] * 13 + [1.0, 1.25, 1.5, 1.75] + [2.0] * 8
    in_space = decode_all(Counter(), latents(1, 1, 14), tiling)[0, 0, 0, 0]
    ramp = [1 + i / 16 for i in range(16)]
    assert in_space.tolist() == [*[1.0] * 48, *ramp, *[2.0] * 32, *[2 + i / 16 for i in range(16)]]


# against diffusers


def diffusers_decoder(vae, tiling, whole_time=False):
    diffusers = pytest.importorskip("diffusers")
    config = vae.config
    reference = diffusers.AutoencoderKLHunyuanVideo(
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        norm_num_groups=config.norm_num_groups,
    )
    reference.load_state_dict(vae.state_dict())
    reference.enable_tiling(
        tile_sample_min_height=tiling.tile_sample_min_height,
        tile_sample_min_width=tiling.tile_sample_min_width,
        tile_sample_min_num_frames=tiling.tile_sample_min_num_frames,
        tile_sample_stride_height=tiling.tile_sample_stride_height,
        tile_sample_stride_width=tiling.tile_sample_stride_width,
        tile_sample_stride_num_frames=tiling.tile_sample_stride_num_frames,
    )
    reference.use_framewise_decoding = not whole_time
    return reference


def relative(value, reference):
    return ((value - reference).abs().max() / reference.abs().max()).item()


SMALL = Tiling(32, 40, 16, 24, 24, 12)


@pytest.mark.parametrize(
    ("tiling", "size"),
    [
        (TILINGS["tiled-diffusers"], (5, 1, 33)),
        (TILINGS["tiled-tencent"], (18, 1, 2)),
        (TILINGS["tiled"], (2, 33, 1)),
        (SMALL, (5, 5, 7)),
        (SMALL, (8, 4, 6)),
        (replace(SMALL, tile_sample_stride_height=8), (4, 6, 5)),
    ],
)
def test_tiled_decoding_equals_diffusers(vae, tiling, size):
    vae_latents = latents(*size)
    whole_time = tiling.tile_sample_min_num_frames == 0
    reference = diffusers_decoder(vae, tiling, whole_time)
    with torch.no_grad():
        expected = reference.decode(vae_latents).sample
    assert relative(decode_all(vae, vae_latents, tiling), expected) <= 1e-5


@pytest.mark.parametrize("size", [(25, 5, 6), (6, 9, 12), (17, 3, 13)])
def test_blends_equal_diffusers_when_every_tile_disagrees(vae, size):
    """The arithmetic alone: both sides are given the same uneven decoder."""
    vae_latents = latents(*size)
    reference = diffusers_decoder(vae, SMALL)
    uneven = UnevenDecoder()
    ours = decode_all(uneven, vae_latents, SMALL)
    source = UnevenDecoder()

    class Body(torch.nn.Module):
        def forward(self, tile):
            return source.decode(tile, check=lambda: None)

    reference.decoder, reference.post_quant_conv = Body(), torch.nn.Identity()
    with torch.no_grad():
        expected = reference.decode(vae_latents).sample
    assert source.shapes[: len(uneven.shapes)] == uneven.shapes
    assert relative(ours, expected) <= 1e-6


# streaming


@pytest.mark.parametrize("tiling", [None, Tiling(32, 32, 0, 24, 24, 0), SMALL])
def test_streamed_frames_equal_the_batch_bit_for_bit(vae, tiling):
    vae_latents = latents(6, 5, 6)
    streamed = decode_all(vae, vae_latents, tiling)[0].permute(1, 2, 3, 0)
    batch = decode_frames(vae, vae_latents, "full", tiling=tiling, runtime=TorchRuntime())
    assert torch.equal(batch, ((streamed + 1) / 2).clamp(0, 1))


def test_windows_arrive_before_later_latents_are_decoded():
    decoder = UnevenDecoder()
    chunks = iter_decode(decoder, latents(13, 2, 2), SMALL, runtime=TorchRuntime())
    lengths, calls = [], []
    for chunk in chunks:
        lengths.append(chunk.shape[2])
        calls.append(len(decoder.shapes))
        chunk.fill_(torch.nan)  # a receiver may overwrite what it was given
    assert lengths == [13, 12, 12, 12]
    assert calls == [1, 2, 3, 4]


@pytest.mark.parametrize("stride", [12, 4])
def test_overwriting_a_chunk_does_not_reach_the_next_one(stride):
    tiling = replace(SMALL, tile_sample_stride_num_frames=stride)
    vae_latents = latents(9, 5, 6)
    kept = decode_all(UnevenDecoder(), vae_latents, tiling)
    parts = []
    for chunk in iter_decode(UnevenDecoder(), vae_latents, tiling, runtime=TorchRuntime()):
        parts.append(chunk.clone())
        chunk.fill_(torch.nan)
    assert torch.equal(torch.cat(parts, dim=2), kept)


@pytest.mark.parametrize("tiling", [None, Tiling(32, 32, 0, 24, 24, 0), SMALL])
def test_a_chunk_lies_in_memory_as_frames(tiling):
    for chunk in iter_decode(IdentityDecoder(), latents(9, 5, 6), tiling, runtime=TorchRuntime()):
        assert chunk[0].permute(1, 2, 3, 0).is_contiguous()


def test_whole_time_tiles_are_handed_over_without_a_second_copy(vae):
    plan = DecodePlan("tiled", Tiling(32, 32, 0, 24, 24, 0))
    vae_latents, held = latents(9, 5, 6), []

    class Watching(IdentityDecoder):
        def decode(self, vae_latents, *, check):
            held.append(memory.live)
            return super().decode(vae_latents, check=check)

    with PeakBytes() as memory:
        frames = tiling_module._decode_clip(Watching(), vae_latents, plan, TorchRuntime())
    bytes_of_columns = 4 * 3 * len(frames)
    overlaps = bytes_of_columns * 8 * (2 * 32 + 32)
    # of the clip nothing before the first tile, and once after it
    assert held[0] < frames.nbytes
    assert max(held) <= frames.nbytes + overlaps
    with torch.no_grad():
        expected = decode_all(IdentityDecoder(), vae_latents, plan.tiling)
    assert torch.equal(frames, ((expected[0].permute(1, 2, 3, 0) + 1) / 2).clamp(0, 1))


@pytest.mark.parametrize("stride", [60, 4])
def test_between_windows_only_the_overlap_is_held(stride):
    tiling = Tiling(32, 32, 64, 32, 32, stride)
    vae_latents = latents(61, 4, 4)
    frame_bytes = 32 * 32 * 3 * 4
    held = []

    class Watching(IdentityDecoder):
        def decode(self, vae_latents, *, check):
            held.append(memory.live)
            return super().decode(vae_latents, check=check)

    with PeakBytes() as memory:
        for chunk in iter_decode(Watching(), vae_latents, tiling, runtime=TorchRuntime()):
            del chunk
    assert max(held) == (64 - stride) * frame_bytes


# frames


@pytest.mark.parametrize("mode", DECODE_MODES)
def test_every_mode_gives_float32_frames_between_0_and_1(vae, mode):
    frames = decode_frames(vae, 3 * latents(7, 2, 3), mode, runtime=TorchRuntime())
    assert frames.shape == (25, 16, 24, 3)
    assert frames.dtype == torch.float32
    assert frames.is_contiguous()
    assert 0 <= frames.min() < frames.max() <= 1


def test_a_bf16_vae_still_blends_in_float32():
    class Half(UnevenDecoder):
        def decode(self, vae_latents, *, check):
            return super().decode(vae_latents, check=check).bfloat16()

    clip = decode_all(Half(), latents(7, 2, 2), SMALL)
    rounded = clip.bfloat16().float()
    assert torch.equal(clip[:, :, :13], rounded[:, :, :13])
    assert not torch.equal(clip[:, :, 14:17], rounded[:, :, 14:17])


def test_two_tiled_runs_are_bit_identical_and_leave_the_latents_alone(vae):
    vae_latents = latents(6, 2, 6)
    kept = vae_latents.clone()
    first, second = (
        decode_frames(vae, vae_latents, tiling=SMALL, runtime=TorchRuntime()) for _ in range(2)
    )
    assert torch.equal(first, second)
    assert torch.equal(vae_latents, kept)


# progress and interrupts


def test_progress_counts_every_tile_up_to_the_total():
    reports = []
    runtime = TorchRuntime(on_progress=lambda *report: reports.append(report))
    vae_latents = latents(9, 5, 6)
    decode_all(IdentityDecoder(), vae_latents, SMALL, runtime)
    total = count_decodes(vae_latents.shape, SMALL)
    assert total == 3 * 2 * 2
    assert reports == [("decode", i + 1, total, None) for i in range(total)]


class Stop(Exception):  # noqa: N818
    pass


@pytest.fixture(scope="module")
def undisturbed(vae):
    """Latents, the frames of a decode that nothing stopped, and its checks."""
    torch.manual_seed(0)
    vae_latents, checks = latents(6, 2, 6), itertools.count(1)
    runtime = TorchRuntime(on_check=lambda: next(checks))
    frames = decode_frames(vae, vae_latents, tiling=SMALL, runtime=runtime)
    return vae_latents, frames, next(checks) - 1


@pytest.mark.parametrize("where", ["first", "between tiles", "inside a tile", "last"])
def test_an_interrupt_passes_through_and_the_next_decode_is_bit_identical(vae, undisturbed, where):
    vae_latents, expected, num_checks = undisturbed
    per_tile = num_checks // count_decodes(vae_latents.shape, SMALL)
    assert per_tile > 10
    stop_at = {
        "first": 1, "between tiles": None, "inside a tile": per_tile + 5, "last": num_checks
    }  # fmt: skip
    calls, done = 0, []

    def stop():
        nonlocal calls
        calls += 1
        if calls == stop_at[where] or (where == "between tiles" and len(done) == 2):
            raise Stop

    runtime = TorchRuntime(on_check=stop, on_progress=lambda *report: done.append(report))
    with pytest.raises(Stop):
        decode_frames(vae, vae_latents, tiling=SMALL, runtime=runtime)
    again = decode_frames(vae, vae_latents, tiling=SMALL, runtime=TorchRuntime())
    assert torch.equal(again, expected)


# memory


@pytest.mark.parametrize(
    ("free_gib", "expected"),
    [
        (36, DecodePlan("full")),
        (35, DecodePlan("synced")),
        (9, DecodePlan("synced")),
        (8, DecodePlan("synced", strips=2)),
        (4.8, DecodePlan("synced", strips=2)),
        (4.7, DecodePlan("tiled", Tiling(128, 128, 0, 96, 96, 0))),
        (3.5, DecodePlan("tiled", Tiling(128, 128, 0, 96, 96, 0))),
        (3, DecodePlan("tiled", TILINGS["tiled-diffusers"])),
        (1, DecodePlan("tiled", Tiling(128, 128, 16, 96, 96, 12))),
    ],
)
def test_auto_takes_seams_only_where_nothing_without_them_fits(free_gib, expected):
    free = int(free_gib * GIB)
    plan, num_bytes = choose_decode(VAEConfig(), FULL_SIZE, free, torch.bfloat16)
    assert plan == expected
    assert num_bytes == plan_bytes(plan, VAEConfig(), FULL_SIZE, torch.bfloat16) <= free


def test_long_clips_fall_back_to_tencent_windows_before_diffusers_ones():
    shape = torch.Size((1, 16, 201, 68, 120))
    chosen, _ = choose_decode(VAEConfig(), shape, 8 * GIB, torch.bfloat16)
    assert chosen.tiling == TILINGS["tiled-tencent"]


def test_more_memory_never_means_more_parts_or_seams():
    def parts(plan):
        seams = plan.mode == "tiled"
        return seams, count_decodes(FULL_SIZE, plan.tiling) if seams else plan.strips

    chosen = [
        choose_decode(VAEConfig(), FULL_SIZE, free * GIB, torch.bfloat16) for free in range(1, 80)
    ]
    order = [parts(plan) for plan, _ in chosen]
    assert order == sorted(order, reverse=True)
    assert all(num_bytes <= free * GIB for free, (_, num_bytes) in enumerate(chosen, 1))


def test_synced_takes_no_more_strips_than_memory_forces():
    shape, dtype = FULL_SIZE, torch.bfloat16
    assert choose_decode(VAEConfig(), shape, 80 * GIB, dtype, "synced")[0].strips == 1
    assert choose_decode(VAEConfig(), shape, 6 * GIB, dtype, "synced")[0].strips == 2
    with pytest.raises(OutOfRoomError, match="in 2 strips needs"):
        choose_decode(VAEConfig(), shape, 3 * GIB, dtype, "synced")


@pytest.mark.parametrize("free_bytes", [0, -5, 100 * 2**20])
def test_too_little_memory_for_the_smallest_tiles_is_refused_with_both_numbers(free_bytes):
    with pytest.raises(OutOfRoomError) as error:
        choose_decode(VAEConfig(), FULL_SIZE, free_bytes, torch.bfloat16)
    smallest = DecodePlan("tiled", Tiling(128, 128, 16, 96, 96, 12))
    needed = plan_bytes(smallest, VAEConfig(), FULL_SIZE, torch.bfloat16)
    assert f"needs {needed / 1e6:,.0f} MB" in str(error.value)
    assert f"{max(free_bytes, 0) / 1e6:,.0f} MB are free" in str(error.value)
    assert "unload other models" in str(error.value)


def test_auto_asks_the_runtime_for_free_memory_less_the_clip(vae):
    vae_latents = latents(9, 4, 3)
    clip_bytes = 4 * 3 * 33 * 32 * 24
    whole = decode_bytes(vae.config, vae_latents.shape, torch.float32)

    class Small(TorchRuntime):
        room = whole + clip_bytes

        def free_bytes(self):
            return self.room

    totals = []
    runtime = Small(on_progress=lambda *report: totals.append(report[2]))
    decode_frames(vae, vae_latents, "auto", runtime=runtime)
    assert totals == [1]
    runtime.room -= 1  # one byte short of a full decode: frame by frame
    decode_frames(vae, vae_latents, "auto", runtime=runtime)
    assert totals == [1] + 17 * [33]


# refusals


def test_an_unknown_mode_is_refused_with_the_list(vae):
    with pytest.raises(OptionError) as error:
        decode_frames(vae, latents(1, 2, 2), "fast", runtime=TorchRuntime())
    for word in ("fast", *DECODE_MODES):
        assert word in str(error.value)


@pytest.mark.parametrize("shape", [(2, 16, 1, 2, 2), (16, 1, 2, 2), (1, 16, 0, 2, 2)])
def test_anything_but_one_clip_is_refused_before_the_first_chunk(vae, shape):
    with pytest.raises(ShapeError, match="one clip") as error:
        iter_decode(vae, torch.zeros(shape), None, runtime=TorchRuntime())
    assert str(list(shape)) in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "fix"),
    [
        ("tile_sample_min_height", 250, "use 248"),
        ("tile_sample_min_width", 0, "use 8"),
        ("tile_sample_stride_width", -8, "use 8"),
        ("tile_sample_stride_height", 264, "use at most 256"),
        ("tile_sample_min_num_frames", 17, "use 16"),
        ("tile_sample_stride_num_frames", 0, "use 4"),
        ("tile_sample_stride_num_frames", 20, "use at most 16"),
    ],
)
def test_illegal_tiles_are_refused_with_the_fix(field, value, fix):
    with pytest.raises(OptionError) as error:
        replace(TILINGS["tiled-diffusers"], **{field: value})
    assert field in str(error.value)
    assert str(value) in str(error.value)
    assert fix in str(error.value)


def test_out_of_memory_passes_through():
    class Full:
        def decode(self, vae_latents, *, check):
            raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError):
        decode_all(Full(), latents(1, 2, 2), None)
