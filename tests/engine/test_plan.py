"""What a plan predicts, beside what shape-only tensors take; and what it chooses."""

import json
import re
from dataclasses import asdict, replace
from functools import lru_cache

import pytest
import torch
from comfyui_skyreels.skyreels.config import (
    CHUNKINGS,
    DECODE_MODES,
    TILINGS,
    Tiling,
    TransformerConfig,
    VAEConfig,
)
from comfyui_skyreels.skyreels.errors import OutOfRoomError
from comfyui_skyreels.skyreels.plan import (
    Choice,
    Job,
    Rung,
    activation_bytes,
    block_seconds,
    bytes_on,
    expectation,
    inputs,
    kind_of_work,
    machine_of,
    plan_run,
    plans,
    preflight,
    rungs,
    smallest,
    table,
    vae_bytes,
    weights_as,
    weights_of,
    why_not,
)
from comfyui_skyreels.skyreels.plan.advice import least_free_bytes
from comfyui_skyreels.skyreels.runtime import TorchRuntime
from comfyui_skyreels.skyreels.runtime.offload import reserve_bytes, shapes_only
from comfyui_skyreels.skyreels.runtime.outcomes import corrections, device_key, learn, remember
from comfyui_skyreels.skyreels.runtime.streaming import SLOTS, least_bytes
from comfyui_skyreels.skyreels.transformer.model import SkyReelsTransformer
from comfyui_skyreels.skyreels.transformer.placement import sampling_bytes
from comfyui_skyreels.skyreels.transformer.quant import (
    STORAGE_DTYPES,
    QuantLinear,
    hadamard_block_size,
    is_quantizable,
)
from comfyui_skyreels.skyreels.transformer.rates import NAMES, rates
from comfyui_skyreels.skyreels.vae.budget import MEMORY_MARGIN
from comfyui_skyreels.skyreels.vae.model import VideoVAE
from comfyui_skyreels.skyreels.vae.tiling import (
    CHOOSING_MODES,
    DecodePlan,
    choose_decode,
    iter_decode,
    plan_bytes,
    plan_flop,
)
from support import tiny
from support.cards import CARDS, card
from support.peak import Convolutions, PeakBytes

CONFIG = TransformerConfig()
JOB = Job()
#: so short that a block computes for less time than its copy takes
SHORT = replace(JOB, width=480, height=272, num_frames=33)
GIB = 2**30


def attention_shape(query, key, value):
    """[B, heads, S, D], laid out as flash kernels do."""
    batch, heads, length, dim = query.shape
    return query.new_empty(batch, length, heads, dim).transpose(1, 2)


def in_precision(model, precision):
    """A model on "meta" with its block linears as the loader makes them for a precision.

    "dequantized" is the file in 8 bits that is multiplied in bfloat16.
    """
    num_layers, hidden = len(model.double_blocks), model.config.hidden_size
    block = hadamard_block_size(hidden, 4 * hidden) if precision == "int8" else 0
    dtype = STORAGE_DTYPES.get(precision, torch.float8_e4m3fn)
    for name, layer in list(model.named_modules()):
        if precision == "bf16" or not isinstance(layer, torch.nn.Linear):
            continue
        # the only block of a small model stands for one in the middle
        placed = name.replace("double_blocks.0", "double_blocks.10") if num_layers == 1 else name
        if not is_quantizable(f"{placed}.weight", max(num_layers, 20)):
            continue
        weight = torch.empty(layer.weight.shape, dtype=dtype, device="meta")
        scale = torch.empty(layer.out_features, 1, device="meta")
        made = QuantLinear(
            weight, scale, layer.bias, hadamard_block=block,
            weight_only=precision == "dequantized",
        )  # fmt: skip
        model.set_submodule(name, made)
    return model


@lru_cache
def shape_only(precision, **blocks):
    with shapes_only():
        model = SkyReelsTransformer(replace(CONFIG, **blocks)).bfloat16().requires_grad_(False)
    return in_precision(model, precision)


@lru_cache
def counted_activations(precision, size, chunking, branches=1):
    """Peak bytes that a forward pass allocates; one block of each kind shows it as well as all.

    With two branches, that of a step whose blocks run for both.
    """
    job = job_of(*size)
    model = shape_only(precision, num_layers=1, num_single_layers=1, num_refiner_layers=1)
    frames, rows, columns = model.token_grid(job.latent_shape)
    with torch.device("meta"):
        inputs = {
            "hidden_states": torch.empty(1, 32, *job.latent_shape[2:]),
            "timestep": torch.empty(1),
            "encoder_hidden_states": torch.empty(1, job.text_tokens, 4096),
            "pooled_projections": torch.empty(1, 768),
            "rope": torch.empty(frames * rows * columns, 64, dtype=torch.complex64),
        }
    options = {"attention": attention_shape, "chunking": CHUNKINGS[chunking]}
    with PeakBytes() as counted, torch.inference_mode():
        latents, rope = inputs.pop("hidden_states"), inputs.pop("rope")
        conditioned = [model.condition(**inputs, attention=attention_shape)] * branches
        model.denoise_together(latents, conditioned, rope=rope, **options)
    return counted.peak


def job_of(width, height, num_frames):
    return replace(JOB, width=width, height=height, num_frames=num_frames)


@lru_cache
def counted_weights(precision):
    """Those of the full model on "meta"."""
    return weights_of(shape_only(precision))


SIZES = ((960, 544, 97), (544, 960, 49), (720, 720, 97), (480, 272, 33), (960, 544, 193))
#: 60 settings: card, precision, size and frames. The last precision is a file's own 8 bits
GRID = {
    (gigabytes, precision, SIZES[(number + shift) % len(SIZES)])
    for number, gigabytes in enumerate((8, 12, 16, 24, 48, 80))
    for precision, shifts in (("bf16", 4), ("fp8", 2), ("int8", 2), ("dequantized", 2))
    for shift in range(shifts)
}


def with_link(machine, bytes_per_s):
    return replace(machine, rates={**machine.rates, "link": bytes_per_s})


def test_the_grid_is_large_enough():
    assert len(GRID) == 60


@pytest.mark.parametrize("precision", ["bf16", "fp8", "int8", "dequantized"])
@pytest.mark.parametrize("link", [25e9, 0.1e9])
def test_the_predicted_peak_of_sampling_is_what_shapes_take(precision, link):
    for gigabytes, _, size in (setting for setting in GRID if setting[1] == precision):
        stored = ("fp8", "auto") if precision == "dequantized" else ("bf16", precision)
        machine = with_link(card("RTX 4090", gigabytes), link)
        plan = plan_run(machine, job_of(*size), weights_as(CONFIG, *stored))
        if link < 1e9:
            assert plan.interleaves == (plan.streamed_bytes > 0)
        weights = plan.resident_bytes + plan.streamed_bytes
        if precision != "dequantized":
            blocks, outside = counted_weights(precision).blocks, counted_weights(precision).outside
            assert sum(blocks) == weights
        else:
            blocks, outside = weights_as(CONFIG, *stored).blocks, counted_weights("bf16").outside
        counted = outside + plan.resident_bytes
        counted += SLOTS * max(blocks) if plan.streamed_bytes else 0
        counted += counted_activations(precision, size, plan.chunking, 1 + plan.interleaves)
        assert 0.95 <= plan.peak_bytes["sample"] / counted <= 1.10, (gigabytes, size)


@pytest.mark.parametrize("precision", ["bf16", "fp8", "int8", "dequantized"])
@pytest.mark.parametrize("chunking", CHUNKINGS)
def test_predicted_activations_are_what_shapes_take(precision, chunking):
    job = job_of(*SIZES[0])
    predicted = sampling_bytes(CONFIG, job.tokens, torch.bfloat16, chunking, precision)
    assert 0.98 <= predicted / counted_activations(precision, SIZES[0], chunking) <= 1.17


@pytest.mark.parametrize("precision", ["bf16", "fp8", "int8"])
def test_weights_from_the_header_alone_are_those_of_the_module(precision):
    made = counted_weights(precision)
    planned = weights_as(CONFIG, "bf16", precision)
    assert planned.blocks == made.blocks
    assert (planned.outside, planned.conditioners, planned.total, planned.gemm) == (
        made.outside, made.conditioners, made.total, made.gemm,
    )  # fmt: skip
    assert planned.is_exact is (precision == "bf16")


@pytest.mark.parametrize("stored", ["fp8", "fp32"])
def test_auto_keeps_what_the_file_holds(stored):
    kept = weights_as(CONFIG, stored, "auto")
    assert kept.is_exact
    assert kept.gemm == {"fp8": "bf16", "fp32": "fp32"}[stored]
    bf16 = weights_as(CONFIG, "bf16", "auto").loop
    assert kept.loop == pytest.approx(bf16 * {"fp8": 0.5, "fp32": 2}[stored], rel=0.01)


@pytest.mark.parametrize("config", [tiny.TRANSFORMER, replace(CONFIG, num_layers=5)])
def test_weights_of_models_of_other_sizes_are_counted_too(config):
    with shapes_only():
        model = SkyReelsTransformer(config).bfloat16()
    made, planned = weights_of(model), weights_as(config, "bf16", "auto")
    assert (planned.blocks, planned.total) == (made.blocks, made.total)


@pytest.mark.parametrize("size", [(480, 272, 17), (256, 256, 33)])
def test_the_predicted_peak_of_a_decode_is_what_shapes_take(meta_vae, size):
    job = job_of(*size)
    plan = plan_run(card("H100", 80), job, weights_as(CONFIG, "bf16", "auto"))
    assert plan.decode == "full"
    with PeakBytes() as counted:
        meta_vae.decode(torch.empty(job.latent_shape, device="meta", dtype=torch.bfloat16))
    weights = sum(p.nbytes for p in meta_vae.parameters())
    assert 0.95 <= plan.peak_bytes["decode"] / (counted.peak + weights) <= 1.10


@pytest.mark.parametrize(("gigabytes", "decode"), [(24, "synced"), (8, "synced in 2 strips")])
def test_the_predicted_peak_of_a_synced_decode_is_what_shapes_take(meta_vae, gigabytes, decode):
    plan = plan_run(card("RTX 4090", gigabytes), JOB, weights_as(CONFIG, "bf16", "auto"))
    assert plan.decode == decode
    strips = int(decode.split()[2]) if " " in decode else 1
    latents = torch.empty(JOB.latent_shape, device="meta", dtype=torch.bfloat16)
    with PeakBytes() as counted:
        decode_shapes(meta_vae, DecodePlan("synced", strips=strips), latents)
    weights = sum(p.nbytes for p in meta_vae.parameters())
    assert 0.95 <= plan.peak_bytes["decode"] / (counted.peak + weights) <= 1.10


def test_a_clip_too_short_to_be_sparse_is_planned_dense():
    machine, weights = card("RTX 4090", 24), weights_as(CONFIG, "bf16", "auto")
    plan = plan_run(machine, SHORT, weights, Choice("sparse"))
    assert plan == plan_run(machine, SHORT, weights) and plan.is_exact
    long = plan_run(machine, JOB, weights, Choice("sparse"))
    assert long.attention == "sparse" and not long.is_exact


@pytest.mark.parametrize("mode", DECODE_MODES)
@pytest.mark.parametrize("gigabytes", [3, 8, 24, 80])
def test_a_decode_is_planned_as_it_is_chosen_in_a_run(mode, gigabytes):
    machine, vae = card("RTX 4090", gigabytes), vae_bytes(JOB.vae, JOB.vae_dtype)
    weights = weights_as(CONFIG, "bf16", "auto")
    plan = plan_run(machine, JOB, weights, Choice(decode=mode))
    chosen = DecodePlan(mode, TILINGS.get(mode))
    if mode in CHOOSING_MODES:
        free = machine.free_bytes - vae
        try:
            chosen, _ = choose_decode(
                JOB.vae, JOB.latent_shape, free, JOB.vae_dtype, mode, host_bytes=machine.ram_bytes
            )
        except OutOfRoomError:
            assert not plan.fits
            return
    needed = plan_bytes(chosen, JOB.vae, JOB.latent_shape, JOB.vae_dtype)
    assert plan.decode == str(chosen)
    assert plan.peak_bytes["decode"] == vae + int(needed / MEMORY_MARGIN)
    if needed > machine.free_bytes - vae:
        assert not plan.fits


@pytest.fixture(scope="module")
def meta_vae():
    with shapes_only():
        return VideoVAE(VAEConfig()).bfloat16()


def decode_shapes(vae, plan, latents):
    """Run a plan on shape-only tensors."""
    if plan.mode == "synced":
        pieces = vae.iter_synced(latents, plan.strips)
    else:
        runtime, meta = TorchRuntime(), torch.device("meta")
        pieces = iter_decode(vae, latents, plan.tiling, runtime=runtime, device=meta)
    for piece in pieces:
        del piece


@pytest.mark.parametrize(
    "plan",
    [
        DecodePlan("full"),
        DecodePlan("synced"),
        DecodePlan("synced", strips=2),
        DecodePlan("synced", strips=4),
        DecodePlan("tiled", Tiling(128, 128, 0, 128, 128, 0)),  # two, none cut off at an edge
    ],
    ids=str,
)
def test_the_work_of_a_decode_is_that_of_its_convolutions(meta_vae, plan):
    latents = torch.empty(1, 16, 5, 16, 32, dtype=torch.bfloat16, device="meta")
    with Convolutions() as convolutions:
        decode_shapes(meta_vae, plan, latents)
    assert plan_flop(plan, meta_vae.config, latents.shape) == pytest.approx(
        convolutions.flops, rel=0.001
    )


# --- what is chosen -----------------------------------------------------------------------------


@pytest.mark.parametrize("gigabytes", [8, 12, 16, 24])
@pytest.mark.parametrize("size", SIZES[:4])
def test_the_chosen_plan_leaves_a_twentieth_of_the_card_free(gigabytes, size):
    job = job_of(*size)
    machine = card("RTX 4090", gigabytes)
    plan = plan_run(machine, job, weights_as(CONFIG, "bf16", "auto"))
    assert plan.fits
    assert plan.is_exact
    assert plan.peak <= 0.95 * machine.free_bytes


def test_24_gb_hold_exact_bf16_without_streaming():
    plan = plan_run(card("RTX 4090", 24), JOB, weights_as(CONFIG, "bf16", "auto"))
    assert (plan.precision, plan.attention, plan.is_exact) == ("auto", "exact", True)
    assert plan.streamed_bytes == 0


def test_a_windows_desktop_of_24_gb_still_holds_them():
    machine = card("RTX 4090", 24)
    machine = replace(machine, free_bytes=machine.free_bytes - 10**9)
    plan = plan_run(machine, JOB, weights_as(CONFIG, "bf16", "auto"))
    assert (plan.streamed_bytes, plan.fits) == (0, True)


@pytest.mark.parametrize("gigabytes", [8, 12, 16])
def test_streaming_at_full_length_costs_next_to_nothing(gigabytes):
    """At 51,256 tokens a block computes far longer than it takes to bring one."""
    resident = plan_run(card("RTX 4090", 80), JOB, weights_as(CONFIG, "bf16", "auto"))
    plan = plan_run(card("RTX 4090", gigabytes), JOB, weights_as(CONFIG, "bf16", "auto"))
    assert plan.streamed_bytes > 0
    assert plan.seconds["step"] <= 1.01 * resident.seconds["step"]


def test_a_slow_link_at_a_small_size_is_told_to_cost_time():
    job = replace(JOB, width=256, height=256, num_frames=17)
    machine = with_link(card("RTX 4090", 8), 3e9)
    plan = plan_run(machine, job, weights_as(CONFIG, "bf16", "auto"))
    assert plan.seconds["stall"] > 0.5 * plan.seconds["step"]


@pytest.mark.parametrize(
    ("name", "gigabytes", "job", "link"),
    [
        ("H100", 8, JOB, 3e9),
        ("RTX 4090", 8, SHORT, 12e9),
        ("RTX 4090", 8, SHORT, 6e9),
        ("RTX 3060", 12, replace(SHORT, num_frames=17), 3e9),
    ],
)
def test_behind_a_slow_link_blocks_run_for_both_branches_which_costs_memory_and_saves_time(
    name, gigabytes, job, link
):
    weights = weights_as(CONFIG, "bf16", "auto")
    machine = with_link(card(name, gigabytes), link)
    plan = plan_run(machine, job, weights)
    plain = plan_run(machine, replace(job, held_bytes=1), weights)  # a cache runs them in turn
    assert (plan.interleaves, plain.interleaves) == (True, False)
    waiting = job.tokens * CONFIG.hidden_size * 2
    assert plan.activation_bytes == plain.activation_bytes - 1 + waiting
    assert plan.streamed_bytes >= plain.streamed_bytes
    assert plan.seconds["step"] < 0.99 * plain.seconds["step"]
    assert plan.seconds["stall"] < 0.5 * plain.seconds["stall"]
    assert plan.fits
    assert plan.peak <= 0.95 * machine.free_bytes
    assert "once for both predictions of a step" in expectation(plan, job)
    assert f"{plan.streamed_bytes / 1e9:.1f} GB a step" in table([plan], plan)[1]
    assert "once for both" not in expectation(plain, job)


@pytest.mark.parametrize(
    "changed",
    [{"num_guided": 0}, {"held_bytes": 10**6}],  # one branch, or a cache that decides after one
)
def test_branches_run_in_turn_where_one_is_enough_or_decides(changed):
    machine, weights = with_link(card("RTX 4090", 8), 6e9), weights_as(CONFIG, "bf16", "auto")
    assert plan_run(machine, SHORT, weights).interleaves
    assert not plan_run(machine, replace(SHORT, **changed), weights).interleaves


def test_a_window_of_guidance_saves_in_its_steps_alone():
    machine, weights = with_link(card("RTX 4090", 8), 6e9), weights_as(CONFIG, "bf16", "auto")
    whole, half, none = (
        plan_run(machine, replace(SHORT, num_guided=steps), weights) for steps in (30, 15, 0)
    )
    assert half.interleaves
    sampling = [plan.seconds["sample"] for plan in (whole, half, none)]
    # blocks of a step with one branch compute for half as long, in the plan with less room too
    assert sampling[2] < sampling[1] < sampling[0]
    assert sampling[1] == pytest.approx((sampling[0] + sampling[2]) / 2, rel=0.05)


def test_where_copies_are_hidden_or_unknown_branches_run_in_turn():
    weights = weights_as(CONFIG, "bf16", "auto")
    for machine in (
        card("RTX 4090", 12), card("RTX 4090", 24), replace(card("RTX 4090", 8), rates={}),
    ):  # fmt: skip
        assert not plan_run(machine, JOB, weights).interleaves


@pytest.mark.parametrize("name", CARDS)
def test_the_table_holds_every_mode_the_exact_ones_first(name):
    machine = card(name, 12)
    found = plans(machine, JOB, "bf16")
    exact = [plan.is_exact for plan in found]
    assert exact == sorted(exact, reverse=True)
    precisions = {plan.precision for plan in found}
    assert precisions == {"auto", "int8"} | ({"fp8"} if machine.capability >= (8, 9) else set())
    assert any(plan.streamed_bytes == 0 and not plan.fits for plan in found)
    lines = table(found, found[0])
    assert len(lines) == len(found) + 1
    assert lines[1].startswith("->")
    assert any(line.startswith("no") for line in lines)
    json.dumps([asdict(plan) for plan in found])


def test_a_file_in_8_bits_is_compared_with_its_own_faster_modes():
    found = plans(card("H100", 24), JOB, "fp8")
    assert [plan.precision for plan in found if plan.is_exact][:2] == ["auto", "auto"]
    assert {plan.precision for plan in found} == {"auto", "bf16", "fp8", "int8"}
    assert found[0].is_exact


def test_a_device_without_rates_has_memory_planned_and_no_times():
    machine = replace(card("RTX 4090", 12), rates={})
    plan = plan_run(machine, JOB, weights_as(CONFIG, "bf16", "auto"))
    assert plan.fits
    assert set(plan.seconds.values()) == {None}
    assert "not known" in expectation(plan, JOB)
    assert "?" in table([plan], plan)[1]


def test_the_line_before_a_run_says_what_was_chosen_and_what_it_takes():
    plan = plan_run(card("RTX 4090", 16), JOB, weights_as(CONFIG, "bf16", "auto"))
    line = expectation(plan, JOB)
    for part in ("97 frames of 960x544", "auto (exact)", "head groups", "streamed",
                 "30 steps of"):  # fmt: skip
        assert part in line
    peak, free = (n / 1e9 for n in (plan.peak_bytes["sample"], plan.free_bytes))
    assert f"{peak:.1f} GB of {free:.1f} GB" in line


# --- too little ---------------------------------------------------------------------------------


def test_what_does_not_fit_is_told_with_the_least_that_would_and_what_helps():
    machine = replace(card("RTX 4090", 8), free_bytes=int(2.2e9))
    weights = weights_as(CONFIG, "bf16", "auto")
    assert not plan_run(machine, JOB, weights).fits
    text = why_not(machine, JOB, weights)
    for part in ("at least 1.9 GB", "2.2 GB of RTX 4090", "fewer frames, such as",
                 "a smaller size, such as", "close other programs"):  # fmt: skip
        assert part in text
    # what is named does work
    free = float(text.split("What would work: ")[1].split(" GB")[0])
    bigger = replace(machine, free_bytes=int((free + 0.06) * 1e9))
    assert plan_run(bigger, JOB, weights).fits
    frames = int(text.split("fewer frames, such as ")[1].split()[0])
    assert plan_run(machine, replace(JOB, num_frames=frames), weights).fits


def test_the_least_plan_streams_everything_it_can():
    least = smallest(JOB, weights_as(CONFIG, "bf16", "auto"), card("RTX 4090", 24))
    assert least.chunking == "head groups"
    assert least.peak_bytes["sample"] <= 2.6e9
    assert least.decode.startswith("tiles of 128 px")


def test_a_machine_that_cannot_stream_needs_room_for_everything():
    machine = replace(card("RTX 4090", 16), streams=False)
    plan = plan_run(machine, JOB, weights_as(CONFIG, "bf16", "auto"))
    assert (plan.streamed_bytes, plan.fits) == (0, False)


def test_what_was_asked_for_is_kept_and_what_could_be_chosen_instead_is_named():
    machine, weights = card("RTX 4090", 16), weights_as(CONFIG, "bf16", "auto")
    choice = Choice(decode="full")
    plan = plan_run(machine, JOB, weights, choice)
    assert (plan.decode, plan.fits) == ("full", False)
    text = why_not(machine, JOB, weights, choice)
    assert f"To decode {JOB} takes at least {plan.peak_bytes['decode'] / 1e9:.1f} GB" in text
    assert "decode auto" in text
    resident = Choice(is_resident=True)
    assert not plan_run(machine, JOB, weights, resident).fits
    assert "weights that are streamed" in why_not(machine, JOB, weights, resident)


def test_main_memory_that_is_short_for_an_exact_decode_is_told_with_what_would_work():
    machine, weights = card("RTX 4090", 24), weights_as(CONFIG, "bf16", "auto")
    machine, choice = replace(machine, ram_bytes=16 * 2**30), Choice(decode="exact")
    assert not plan_run(machine, JOB, weights, choice).fits
    text = why_not(machine, JOB, weights, choice)
    stored = re.search(r"keeps (2\d\.\d) GB in main memory .* 17\.2 GB of it are free", text)
    assert "decode auto" in text
    # what is named does work
    bigger = replace(machine, ram_bytes=int((float(stored[1]) + 3) * 1e9))
    assert plan_run(bigger, JOB, weights, choice).fits
    frames = int(text.split("fewer frames, such as ")[1].split()[0])
    assert plan_run(machine, replace(JOB, num_frames=frames), weights, choice).fits


@pytest.mark.parametrize("decode", ["full", "tiled", "synced", "auto"])
def test_the_free_memory_that_is_named_is_enough_and_no_more_than_that(decode):
    machine, weights = card("RTX 4090", 4), weights_as(CONFIG, "bf16", "auto")
    choice = Choice(decode=decode)
    least = least_free_bytes(machine, JOB, weights, choice)
    fits = [plan_run(replace(machine, free_bytes=least - less), JOB, weights, choice).fits
            for less in (0, 2 * 10**7)]  # fmt: skip
    assert fits == [True, False]


def test_fast_attention_that_does_not_fit_is_told_that_exact_does():
    weights, fast = weights_as(CONFIG, "bf16", "auto"), Choice("fast")
    needed = [smallest(JOB, weights, card("RTX 4090", 8), each).peak for each in (Choice(), fast)]
    machine = replace(card("RTX 4090", 8), free_bytes=int(sum(needed) / 2) + 512 * 2**20)
    assert plan_run(machine, JOB, weights).fits
    assert not plan_run(machine, JOB, weights, fast).fits
    assert "exact attention" in why_not(machine, JOB, weights, fast)


def test_a_host_that_reserves_more_than_is_free_leaves_nothing():
    runtime = TorchRuntime()
    runtime.free_bytes = lambda: -(2 * 10**9)
    machine = machine_of(runtime, can_probe=False)
    assert machine.free_bytes == 0
    text = why_not(machine, JOB, weights_as(CONFIG, "bf16", "auto"))
    assert "and 0.0 GB of" in text
    assert machine_of(runtime, loaded_bytes=3 * 10**9, can_probe=False).free_bytes == 10**9


def test_main_memory_that_is_short_for_the_weights_is_told_before_the_run(monkeypatch):
    monkeypatch.setattr(inputs, "free_host_bytes", lambda: 8 * 10**9)
    monkeypatch.setattr(inputs, "rates", lambda runtime, names: {})
    text = preflight(TorchRuntime(), JOB, "bf16").text
    assert "The weights take 25.6 GB of main memory, more than is free" in text


def test_what_another_gpu_taught_is_not_used(tmp_path, monkeypatch):
    runtime = TorchRuntime(state_folder=tmp_path)
    key = device_key(runtime.device)
    learn(tmp_path, key, "GEMM bf16, attention exact", 2.0)
    remember(tmp_path, key, "rates", {"memory": 5e12})
    assert machine_of(runtime, can_probe=False).corrections
    monkeypatch.setattr(inputs, "device_key", lambda device: key + ", after an update")
    assert machine_of(runtime, can_probe=False).corrections == {}


# --- rungs --------------------------------------------------------------------------------------


def test_the_ladder_goes_from_the_planned_chunks_to_everything_streamed():
    assert list(map(str, rungs("chunks", streams=True))) == [
        "chunks", "head groups", *(f"head groups, {n}% fewer resident blocks"
                                   for n in (25, 50, 75, 100)),
    ]  # fmt: skip
    assert list(map(str, rungs("whole", streams=False))) == ["whole", "chunks", "head groups"]
    below = rungs("head groups", streams=True)
    both = rungs("head groups", streams=True, interleaves=True)
    assert both[1:] == below
    assert str(both[0]) == "head groups, both predictions at once"


@pytest.mark.parametrize(("gigabytes", "link"), [(24, 25e9), (16, 0.1e9)])
def test_each_rung_takes_less_than_the_one_above(gigabytes, link):
    machine = with_link(card("RTX 4090", gigabytes), link)
    weights = weights_as(CONFIG, "bf16", "auto")
    plan = plan_run(machine, JOB, weights)
    needed = activation_bytes(CONFIG, JOB.tokens, weights, "exact")
    assert plan.interleaves == (link < 25e9)
    waiting, taken = JOB.tokens * CONFIG.hidden_size * 2, []
    for rung in rungs(plan.chunking, streams=True, interleaves=plan.interleaves):
        kept = bytes_on(rung, plan, weights, machine.free_bytes, needed)
        stay = min(sum(weights.blocks), machine.usable_bytes - kept - weights.outside)
        taken.append(stay + needed[rung.chunking] + waiting * rung.interleaves)
    assert taken == sorted(taken, reverse=True)
    assert taken[0] > taken[1]
    assert taken[-1] <= 0.3 * taken[0]


def test_a_rung_never_keeps_so_much_that_no_block_can_be_streamed():
    weights = weights_as(CONFIG, "bf16", "auto")
    plan = plan_run(card("RTX 4090", 24), JOB, weights)
    needed = activation_bytes(CONFIG, JOB.tokens, weights, "exact")
    free = int(3.2e9)  # another program has taken the rest
    for rung in (Rung("chunks"), Rung("head groups"), Rung("head groups", 1.0)):
        kept = bytes_on(rung, plan, weights, free, needed)
        assert kept >= needed[rung.chunking]
        room = free - kept - weights.outside - reserve_bytes(free)
        assert kept == needed[rung.chunking] or room >= least_bytes(weights.blocks, 1)


# --- rates and corrections ----------------------------------------------------------------------


def test_times_follow_the_rates():
    weights = weights_as(CONFIG, "bf16", "auto")
    machine = card("H100", 80)
    job = replace(JOB, text_tokens=60)
    forward = sum(block_seconds(machine, job, weights, "exact"))
    assert forward == pytest.approx(4.47, rel=0.15)  # measured on one at this size
    twice = replace(machine, rates={name: 2 * rate for name, rate in machine.rates.items()})
    assert sum(block_seconds(twice, job, weights, "exact")) == pytest.approx(forward / 2)


def test_what_a_run_took_corrects_the_next_prediction(tmp_path):
    runtime = TorchRuntime(state_folder=tmp_path)
    key, weights = device_key(runtime.device), weights_as(CONFIG, "bf16", "auto")
    remember(tmp_path, key, "rates", dict.fromkeys(NAMES, 10000000000000.0))
    kind = kind_of_work(weights, "exact")
    truth = None
    for _ in range(6):
        machine = machine_of(runtime, can_probe=False)
        machine = replace(machine, free_bytes=10**12, streams=True)
        plan = plan_run(machine, JOB, weights)
        truth = truth or 1.4 * plan.seconds["step"]
        ratio = truth / plan.seconds["step"] * machine.corrections.get(kind, 1.0)
        learn(tmp_path, key, kind, ratio)
    assert plan.seconds["step"] == pytest.approx(truth, rel=0.01)


@pytest.mark.parametrize("factor", [0.01, 100.0])
def test_a_run_that_was_disturbed_teaches_nothing(tmp_path, factor):
    learn(tmp_path, "card", "GEMM bf16, attention exact", factor)
    assert corrections(tmp_path, "card") == {}
    assert not (tmp_path / "plan.json").exists()


def test_rates_are_probed_once_and_remembered(tmp_path, monkeypatch):
    from comfyui_skyreels.skyreels.transformer import rates as probing

    measured = []

    def measure(name, device):
        measured.append(name)
        return None if name == "link" else 5e12

    monkeypatch.setattr(probing, "_measure", measure)
    monkeypatch.setattr(probing, "_measured", {})
    runtime = TorchRuntime(state_folder=tmp_path)
    assert rates(runtime, ["memory", "GEMM bf16"]) == {"memory": 5e12, "GEMM bf16": 5e12}
    monkeypatch.setattr(probing, "_measured", {})  # another process
    assert rates(runtime, ["memory", "link"]) == {"memory": 5e12, "GEMM bf16": 5e12}
    assert measured == ["memory", "GEMM bf16", "link"]


@pytest.mark.parametrize(
    ("error", "is_told"),
    [(torch.OutOfMemoryError("CUDA out of memory."), 0), (RuntimeError("no such kernel"), 1)],
)
def test_a_probe_that_fails_breaks_no_run_and_is_no_verdict(
    tmp_path, monkeypatch, caplog, error, is_told
):
    from comfyui_skyreels.skyreels.kernels import dispatch
    from comfyui_skyreels.skyreels.transformer import rates as probing

    def fail(name, device):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(probing, "_measure", fail)
        patch.setattr(probing, "_measured", {})
        patch.setattr(dispatch, "_logged", set())
        runtime = TorchRuntime(state_folder=tmp_path)
        assert rates(runtime, ["memory"]) == {}
        assert caplog.text.count("cannot be measured") == is_told
        patch.setattr(probing, "_measure", lambda name, device: 7.0)
        assert rates(runtime, ["memory"]) == {"memory": 7.0}


def test_every_rate_of_this_machine_can_be_measured():
    found = rates(TorchRuntime(), NAMES)
    assert set(NAMES) - set(found) == {"link", "peer"}  # host memory needs none, one card neither
    assert all(rate > 0 for rate in found.values())


def test_nonsense_in_the_file_is_no_rate_and_no_correction(tmp_path):
    runtime = TorchRuntime(state_folder=tmp_path)
    key = device_key(runtime.device)
    remember(tmp_path, key, "rates", {"memory": -1, "link": "fast", "other": 3, "GEMM fp8": 2})
    remember(tmp_path, key, "corrections", {"a": 1.5, "b": 1e9, "c": "x", "d": None})
    machine = machine_of(runtime, can_probe=False)
    assert machine.rates == {"GEMM fp8": 2}
    assert machine.corrections == {"a": 1.5}


def test_fast_attention_is_not_exact_and_takes_its_copies():
    machine, weights = card("H100", 80), weights_as(CONFIG, "bf16", "auto")
    exact, fast = (plan_run(machine, JOB, weights, Choice(name)) for name in ("exact", "fast"))
    assert not fast.is_exact
    assert fast.activation_bytes > exact.activation_bytes
