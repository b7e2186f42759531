"""The VAE against diffusers, its causal attention, its refusals."""

import copy

import pytest
import torch
import torch.nn.functional as F
from comfyui_skyreels.skyreels.config import VAEConfig
from comfyui_skyreels.skyreels.errors import ShapeError
from comfyui_skyreels.skyreels.vae import model
from comfyui_skyreels.skyreels.vae.model import VideoVAE, frame_causal_attention, level_factors

CHANNELS = (16, 16, 32, 32)
SIZES = [(1, 24, 40), (5, 16, 24), (9, 24, 8), (17, 8, 24)]


def tiny_pair(channels=CHANNELS, groups=8, layers=2):
    diffusers = pytest.importorskip("diffusers")
    reference = diffusers.AutoencoderKLHunyuanVideo(
        block_out_channels=channels,
        norm_num_groups=groups,
        layers_per_block=layers,
        down_block_types=("HunyuanVideoDownBlock3D",) * len(channels),
        up_block_types=("HunyuanVideoUpBlock3D",) * len(channels),
    ).eval()
    # the true, undivided encode and decode; diffusers cuts windows of 16 frames by default
    reference.use_framewise_decoding = reference.use_framewise_encoding = False
    for name, parameter in reference.named_parameters():
        if "norm" in name:  # freshly built norms are 1 and 0 and would hide a missing affine
            torch.nn.init.normal_(parameter, 1.0 if name.endswith("weight") else 0.0, 0.2)
    vae = VideoVAE(
        VAEConfig(block_out_channels=channels, norm_num_groups=groups, layers_per_block=layers)
    )
    vae.load_state_dict(reference.state_dict(), strict=True)
    return reference, vae


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(1)
    return tiny_pair()


@pytest.fixture(scope="module")
def pair64(pair):
    return tuple(copy.deepcopy(vae).double() for vae in pair)


@pytest.fixture(scope="module", params=SIZES)
def in_float64(request, pair64):
    """A clip and its latents by diffusers, latents and their clip by diffusers."""
    torch.manual_seed(0)
    video, vae_latents = clip(*request.param).double(), latents(*request.param).double()
    reference = pair64[0]
    return (
        video, diffusers_encode(reference, video),
        vae_latents, diffusers_decode(reference, vae_latents),
    )  # fmt: skip


def relative(value, reference):
    return ((value - reference).abs().max() / reference.abs().max()).item()


def clip(frames, height, width):
    return torch.rand(1, 3, frames, height, width) * 2 - 1


def latents(frames, height, width):
    return torch.randn(1, 16, (frames - 1) // 4 + 1, height // 8, width // 8)


@torch.no_grad()
def diffusers_encode(reference, video):
    return reference.encode(video).latent_dist.mode()


@torch.no_grad()
def diffusers_decode(reference, vae_latents):
    return reference.decode(vae_latents).sample


@pytest.mark.parametrize("size", SIZES)
def test_encode_equals_diffusers_in_float32(pair, size):
    video = clip(*size)
    assert relative(pair[1].encode(video), diffusers_encode(pair[0], video)) <= 1e-5


@pytest.mark.parametrize("size", SIZES)
def test_decode_equals_diffusers_in_float32(pair, size):
    vae_latents = latents(*size)
    expected = diffusers_decode(pair[0], vae_latents)
    decoded = pair[1].decode(vae_latents)
    assert decoded.shape == (1, 3, *size)
    assert relative(decoded, expected) <= 1e-5


@pytest.mark.parametrize("pieces", [False, True])
def test_arithmetic_equals_diffusers_in_float64(pair64, in_float64, pieces, monkeypatch):
    """With `pieces` every layer walks through time one frame at a time, as large clips do."""
    if pieces:
        monkeypatch.setattr(model, "PIECE_ELEMENTS", 1)
    vae, (video, encoded, vae_latents, decoded) = pair64[1], in_float64
    assert relative(vae.encode(video), encoded) <= 1e-12
    assert relative(vae.decode(vae_latents), decoded) <= 1e-12


def enlarged_and_convolved(layer, clip):
    """As the reference does it: pixels and frames are repeated, the first frame is not."""
    time, rows, columns = layer.upsample
    clip = torch.cat([clip[:, :, :1], clip[:, :, 1:].repeat_interleave(time, 2)], 2)
    clip = clip.repeat_interleave(rows, 3).repeat_interleave(columns, 4)
    return layer.conv(F.pad(clip, (1, 1, 1, 1, 2, 0), mode="replicate"))


@pytest.mark.parametrize("frames", [[1], [4], [1, 3, 2], [2, 2]])
@pytest.mark.parametrize("upsample", [(2, 2, 2), (1, 2, 2), (2, 1, 1)])
def test_an_enlarging_convolution_is_the_convolution_of_the_enlarged_clip(frames, upsample):
    layer = model.CausalConv3d(6, 5, upsample=upsample).double().requires_grad_(False)
    clip = torch.randn(2, 6, sum(frames), 3, 4, dtype=torch.float64)
    stream = model.ConvStream(layer, keeps_copies=True)
    ours = torch.cat([stream(piece) for piece in clip.split(frames, 2)], 2)
    assert relative(ours, enlarged_and_convolved(layer, clip)) <= 1e-12


def test_folded_taps_are_rounded_once():
    """Three roundings: of the sums of taps, of the convolution, and of the sum with the bias."""
    layer = model.CausalConv3d(32, 32, upsample=(2, 2, 2)).bfloat16().requires_grad_(False)
    clip = torch.randn(1, 32, 3, 6, 6).bfloat16()
    exact = enlarged_and_convolved(copy.deepcopy(layer).double(), clip.double())
    error = (model.ConvStream(layer)(clip).double() - exact).norm() / exact.norm()
    rounding = (exact.bfloat16().double() - exact).norm() / exact.norm()
    assert error <= 1.8 * rounding


def test_statistics_in_one_pass_over_pieces_are_those_of_the_clip():
    clip = 3 * torch.randn(2, 8, 7, 5, 6) + 4
    norm = torch.nn.GroupNorm(2, 8, eps=1e-6).requires_grad_(False)
    bias = torch.randn(8)
    moments = model.Moments()
    for piece in clip.split([1, 4, 2], 2):
        moments.add(piece)
    scale, shift = moments.affine(norm, bias, is_one_clip=False)
    wide = clip.double() + bias.double()[:, None, None, None]
    expected = F.group_norm(wide, 2, eps=1e-6)
    assert relative(clip.double() * scale + shift, expected) <= 1e-6  # scale and shift in float32
    exact = model.Moments()
    exact.add(clip.double())
    means = moments.affine(norm.double(), None, is_one_clip=False)
    for ours, theirs in zip(means, exact.affine(norm, None, is_one_clip=False), strict=True):
        assert relative(ours.double(), theirs) <= 1e-6


@pytest.fixture(scope="module")
def in_large_pieces(pair):
    """Latents, and the clip that is decoded from them."""
    vae_latents = latents(17, 24, 16)
    return vae_latents, pair[1].decode(vae_latents)


@pytest.mark.parametrize("piece_elements", [1, 10_000, 50_000])
def test_the_piece_size_changes_nothing_but_rounding(
    pair, in_large_pieces, piece_elements, monkeypatch
):
    vae_latents, whole = in_large_pieces
    monkeypatch.setattr(model, "PIECE_ELEMENTS", piece_elements)
    assert relative(pair[1].decode(vae_latents), whole) <= 1e-5


def test_a_batch_equals_its_clips(pair64):
    vae_latents = torch.cat([latents(5, 16, 16), latents(5, 16, 16)]).double()
    alone = torch.cat([pair64[1].decode(single) for single in vae_latents.split(1)])
    assert relative(pair64[1].decode(vae_latents), alone) <= 1e-12


@pytest.mark.parametrize(
    ("channels", "layers"), [((16, 32, 32), 1), ((16, 16, 32, 32, 32), 1), ((32, 24, 16, 32), 3)]
)
def test_other_depths_equal_diffusers(channels, layers):
    reference, vae = (m.double() for m in tiny_pair(channels, groups=8, layers=layers))
    vae_latents = latents(9, 16, 24).double()
    expected = diffusers_decode(reference, vae_latents)
    assert relative(vae.decode(vae_latents), expected) <= 1e-12
    video = clip(9, 16, 24).double()
    assert relative(vae.encode(video), diffusers_encode(reference, video)) <= 1e-12


def test_time_is_resampled_in_the_second_and_third_of_four_levels():
    assert [level_factors(i, 4) for i in range(4)] == [(1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 1, 1)]


def test_the_full_size_vae_has_the_names_and_shapes_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        state = VideoVAE(VAEConfig()).state_dict()
        expected = diffusers.AutoencoderKLHunyuanVideo().state_dict()
    assert len(state) == 248
    assert sum(tensor.numel() for tensor in state.values()) == 246_478_803
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in expected.items()}


def test_a_vae_built_on_the_meta_device_takes_its_weights_by_assignment(pair):
    with torch.device("meta"):
        empty = VideoVAE(pair[1].config)
    empty.load_state_dict(pair[1].state_dict(), strict=True, assign=True)
    vae_latents = latents(5, 8, 8)
    assert torch.equal(empty.decode(vae_latents), pair[1].decode(vae_latents))


def masked_attention(query, key, value, tokens_per_frame):
    frame = torch.arange(query.shape[1]) // tokens_per_frame
    return F.scaled_dot_product_attention(query, key, value, frame[:, None] >= frame[None])


@pytest.mark.parametrize(("frames", "per_frame"), [(1, 6), (3, 5), (5, 1), (4, 35)])
@pytest.mark.parametrize("score_bytes", [2**29, 4 * 130, 1])
def test_causal_attention_equals_attention_under_a_dense_mask(frames, per_frame, score_bytes):
    query, key, value = torch.randn(3, 2, frames * per_frame, 32, dtype=torch.float64)
    ours = frame_causal_attention(query, key, value, per_frame, score_bytes=score_bytes)
    expected = masked_attention(query, key, value, per_frame)
    assert relative(ours, expected) <= 1e-13


def test_no_attention_call_exceeds_the_score_budget_or_carries_a_mask(monkeypatch):
    calls = []
    true_attention = F.scaled_dot_product_attention

    def recording(query, key, value, *args, **kwargs):
        calls.append((query.shape[2] * key.shape[2], args, kwargs))
        return true_attention(query, key, value, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recording)
    query, key, value = torch.randn(3, 1, 60, 16)
    frame_causal_attention(query, key, value, 20, score_bytes=4 * 100)
    assert max(scores for scores, _, _ in calls) <= 100
    assert len(calls) == 20 // 5 + 20 // 2 + 20
    assert not any(args or kwargs for _, args, kwargs in calls)


def test_latent_frames_attend_only_backwards():
    query, key, value = torch.randn(3, 1, 12, 8)
    before = frame_causal_attention(query, key, value, 4)
    key[:, 8:], value[:, 8:] = 9.0, -9.0
    after = frame_causal_attention(query, key, value, 4)
    assert torch.equal(before[:, :8], after[:, :8])
    assert not torch.equal(before[:, 8:], after[:, 8:])


def test_two_runs_are_bit_identical(pair):
    video, vae_latents = clip(5, 16, 24), latents(9, 16, 24)
    assert torch.equal(pair[1].encode(video), pair[1].encode(video))
    assert torch.equal(pair[1].decode(vae_latents), pair[1].decode(vae_latents))


def test_inputs_are_left_as_they_were(pair):
    video, vae_latents = clip(5, 16, 24), latents(5, 16, 24)
    kept = video.clone(), vae_latents.clone()
    pair[1].encode(video)
    pair[1].decode(vae_latents)
    assert torch.equal(video, kept[0])
    assert torch.equal(vae_latents, kept[1])


def test_inputs_of_another_dtype_are_cast_to_the_weights(pair):
    half = copy.deepcopy(pair[1]).bfloat16()
    decoded = half.decode(latents(5, 16, 16))
    assert decoded.dtype == torch.bfloat16
    assert half.encode(clip(5, 16, 16)).dtype == torch.bfloat16


class Stop(Exception):  # noqa: N818
    pass


class Budget:
    """An interrupt check that raises once it has been called more than `left` times."""

    def __init__(self, left):
        self.left = left

    def spend(self):
        if self.left == 0:
            raise Stop
        self.left -= 1


@pytest.mark.parametrize("work", ["encode", "decode"])
def test_a_check_that_raises_stops_between_blocks_and_the_next_run_is_good(pair, work):
    vae = pair[1]
    tensor = clip(5, 16, 16) if work == "encode" else latents(5, 16, 16)
    run = getattr(vae, work)
    expected = run(tensor)
    budget = Budget(1_000)
    run(tensor, check=budget.spend)
    total = 1_000 - budget.left
    assert total >= 12  # once per resnet and resampler, once per frame of attention
    for stop_at in (1, total // 2, total):
        budget = Budget(stop_at - 1)
        with pytest.raises(Stop):
            run(tensor, check=budget.spend)
        assert torch.equal(run(tensor), expected)
    run(tensor, check=Budget(total).spend)


@pytest.mark.parametrize(
    ("shape", "value", "fix"),
    [
        ((1, 4, 5, 16, 16), "[1, 4, 5, 16, 16]", "C = 3"),
        ((3, 5, 16, 16), "[3, 5, 16, 16]", "[B, C, F, H, W]"),
        ((1, 3, 0, 16, 16), "[1, 3, 0, 16, 16]", "no empty dimension"),
        ((1, 3, 6, 16, 16), "6 frames", "use 5"),
        ((1, 3, 8, 16, 16), "8 frames", "use 9"),
        ((1, 3, 5, 20, 16), "height 20", "use 24"),
        ((1, 3, 5, 16, 35), "width 35", "use 32"),
        ((1, 3, 5, 3, 16), "height 3", "use 8"),
    ],
)
def test_an_illegal_clip_is_refused_with_the_nearest_legal_value(pair, shape, value, fix):
    with pytest.raises(ShapeError) as error:
        pair[1].encode(torch.zeros(shape))
    assert value in str(error.value)
    assert fix in str(error.value)


@pytest.mark.parametrize("shape", [(1, 4, 2, 3, 3), (16, 2, 3, 3), (1, 16, 0, 3, 3)])
def test_illegal_latents_are_refused(pair, shape):
    with pytest.raises(ShapeError) as error:
        pair[1].decode(torch.zeros(shape))
    assert str(list(shape)) in str(error.value)
    assert "C = 16" in str(error.value)
