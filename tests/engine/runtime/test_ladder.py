"""A decode that runs out of memory, and what counts as running out."""

import copy
import json
import logging
import math
import weakref
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from comfyui_skyreels.skyreels.config import TILINGS, VAEConfig
from comfyui_skyreels.skyreels.errors import OptionError, OutOfRoomError
from comfyui_skyreels.skyreels.image import encode_image
from comfyui_skyreels.skyreels.plan import (
    Choice,
    Job,
    machine_of,
    plan_run,
    vae_bytes,
    weights_as,
)
from comfyui_skyreels.skyreels.runtime import TorchRuntime, ladder, outcomes
from comfyui_skyreels.skyreels.vae import frames, store, tiling
from comfyui_skyreels.skyreels.vae.frames import FrameWriter
from comfyui_skyreels.skyreels.vae.model import STORED_PIECE_ELEMENTS, VideoVAE
from comfyui_skyreels.skyreels.vae.tiling import (
    EXACT_LADDER,
    LADDER,
    STRIPS,
    DecodePlan,
    decode_frames,
    decode_into,
    plan_bytes,
    plan_flop,
)
from support import tiny
from support.cards import card

pytestmark = pytest.mark.usefixtures("fast_convolutions", "few_objects")

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
SMALL = VAEConfig(block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_num_groups=2)


class Steady(TorchRuntime):
    """As much free memory whatever else runs on this machine: more than before forgets a rung."""

    def free_bytes(self):
        return 64 * 10**9


@pytest.fixture(scope="module")
def vae():
    return tiny.randomize(VideoVAE(SMALL))


@pytest.fixture(scope="module")
def latents():
    return torch.randn(1, 16, 9, 4, 3, generator=torch.Generator().manual_seed(0))


def out_of_memory_above(monkeypatch, vae, frames, strips=math.inf):
    """Refuse decodes of more latent frames than these, and synced ones in fewer strips.

    Returns:
        Latent frames of each decode, which grows with them.
    """
    made = []

    def limit(name, refuses):
        true = getattr(vae, name)

        def limited(latents, *args, **kwargs):
            made.append(latents.shape[2])
            pieces = true(latents, *args, **kwargs)
            yield next(pieces)
            if refuses(latents, *args):  # in the middle of the work
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            yield from pieces

        monkeypatch.setattr(vae, name, limited)

    limit("iter_decode", lambda latents: latents.shape[2] > frames)
    limit("iter_synced", lambda latents, count: count < strips)
    return made


def test_a_decode_that_runs_out_of_memory_is_repeated_in_smaller_pieces(
    vae, latents, monkeypatch, tmp_path, caplog
):
    made = out_of_memory_above(monkeypatch, vae, 5)
    totals = []
    runtime = Steady(state_folder=tmp_path, on_progress=lambda *report: totals.append(report[2]))
    got = decode_frames(vae, latents, "auto", runtime=runtime)
    assert torch.equal(got, decode_frames(vae, latents, "tiled-diffusers", runtime=Steady()))
    told = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "with full" in told[0]
    assert "repeated with tiled-diffusers" in told[-1]
    falls = len(told)
    assert made[:falls] == [9] * falls
    assert falls == len(LADDER) - 2
    assert max(made[falls:]) == 5
    assert totals[-1] == 3

    made.clear()  # the next decode of that size begins there
    caplog.clear()
    decode_frames(vae, latents, "auto", runtime=runtime)
    assert max(made) == 5
    assert caplog.records == []
    [groups] = json.loads((tmp_path / "plan.json").read_text())["devices"].values()
    assert len(groups["rungs"]) == 1


def test_a_mode_that_was_asked_for_is_not_replaced_by_another(vae, latents, monkeypatch):
    made = out_of_memory_above(monkeypatch, vae, 5)
    with pytest.raises(OutOfRoomError) as caught:
        decode_frames(vae, latents, "full", runtime=Steady())
    assert made == [9]
    text = str(caught.value)
    needed = plan_bytes(DecodePlan("full"), SMALL, latents.shape, torch.float32)
    assert f"with full: it needs about {needed / 1e9:.2f} GB" in text
    assert "GB of the device are free" in text
    assert "choose synced, as synced needs" in text


@pytest.mark.parametrize(
    ("plan", "free", "advice"),
    [
        (DecodePlan("full"), 10**10, "choose synced, as synced needs"),
        (DecodePlan("full"), 1000, "To go on, close other programs"),
        (DecodePlan("synced", strips=8), 10**10, "To go on, choose"),
        (DecodePlan("tiled", TILINGS["tiled-diffusers"]), 10**10, "choose auto, as tiles of 128"),
    ],
)
def test_the_error_of_a_decode_names_a_mode_that_takes_less_and_fits(plan, free, advice):
    shape = torch.Size((1, 16, 25, 68, 120))
    assert advice in tiling.what_fits([plan], VAEConfig(), shape, free, torch.bfloat16)


def test_a_decode_that_never_fits_ends(vae, latents, monkeypatch):
    made = out_of_memory_above(monkeypatch, vae, 0)
    with pytest.raises(OutOfRoomError, match="tiles of 128 px.*To go on, close other programs"):
        decode_frames(vae, latents, "auto", runtime=Steady())
    assert len(made) == len(LADDER)


def test_a_synced_decode_is_repeated_in_strips_from_its_start(
    vae, latents, monkeypatch, tmp_path, caplog
):
    strips = plan_bytes(DecodePlan("synced", strips=2), vae.config, latents.shape, torch.float32)

    class Small(TorchRuntime):
        def free_bytes(self):
            return strips + 4 * 3 * 33 * 32 * 24  # and the clip

    totals = []
    runtime = Small(on_progress=lambda *report: totals.append(report[2]))
    expected = decode_frames(vae, latents, "synced", runtime=runtime)
    assert set(totals) == {2 * 33}
    made = out_of_memory_above(monkeypatch, vae, 9, strips=2)
    runtime = Steady(state_folder=tmp_path)
    got = decode_frames(vae, latents, "synced", runtime=runtime)
    assert torch.equal(got, expected)
    assert made == [9, 9]
    [told] = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "with synced (" in told
    assert "repeated with synced in 2 strips" in told

    made.clear()  # the next decode of that size begins there
    caplog.clear()
    assert torch.equal(decode_frames(vae, latents, "synced", runtime=runtime), expected)
    assert made == [9]
    assert caplog.records == []


class Sink:
    """Remembers frames, and when they came."""

    def __init__(self, clock) -> None:
        self.clock, self.groups, self.times = clock, [], []

    def restart(self) -> None:
        self.groups.clear()
        self.times.clear()

    def write(self, frames: torch.Tensor) -> None:
        assert frames.dtype == torch.float32
        self.groups.append(frames)
        self.times.append(self.clock())


@pytest.mark.parametrize("plan", [p for p in LADDER if p.mode == "synced"] + [LADDER[0]], ids=str)
def test_frames_are_handed_on_in_order_as_they_become_final(vae, latents, plan):
    done = [0]
    runtime = Steady(on_progress=lambda *report: done.append(report[1]))
    sink = Sink(lambda: len(done))
    expected = tiling._decode_clip(vae, latents, plan, Steady())
    assert tiling._decode_clip(vae, latents, plan, runtime, sink) is None
    assert torch.equal(torch.cat(sink.groups), expected)
    if plan.mode == "synced":  # a group for every report of the last strip
        reports = len(done) - 1
        assert len(sink.groups) == reports // plan.strips
        assert sink.times[0] == 1 + reports - len(sink.groups)
        assert sink.times == sorted(set(sink.times))


def test_a_synced_decode_in_parts_hands_on_what_was_not_handed_on_before(vae, latents, monkeypatch):
    expected = decode_frames(vae, latents, "synced", runtime=Steady())
    monkeypatch.setattr(frames, "STAGING_BYTES", 2 * 4 * 3 * 32 * 24)
    sink = Sink(int)
    decode_into(sink, vae, latents, "synced", runtime=Steady())
    assert torch.equal(torch.cat(sink.groups), expected)
    assert max(map(len, sink.groups)) == 2


@pytest.mark.parametrize("plan", [LADDER[2], LADDER[-1]], ids=str)
def test_a_16_bit_decode_keeps_no_wider_clip_than_it_must(vae, latents, plan, monkeypatch):
    """Parts of frames for a sink wait in 16 bits; what is shown is the same to the bit."""
    narrow = copy.deepcopy(vae).bfloat16()
    whole = tiling._decode_clip(narrow, latents, plan, Steady())
    made, empty = [], torch.empty

    def counted(*size, **kwargs):
        made.append(empty(*size, **kwargs))
        return made[-1]

    monkeypatch.setattr(frames.torch, "empty", counted)
    sink = Sink(int)
    assert tiling._decode_clip(narrow, latents, plan, Steady(), sink) is None
    assert torch.equal(torch.cat(sink.groups), whole)
    held = [each for each in made if each.shape == whole.shape]
    assert [each.dtype for each in held] == [torch.bfloat16] * (plan.strips > 1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [4, 8])
def test_frames_with_nan_are_refused_and_infinite_ones_shown_as_black_or_white(rows, dtype, value):
    sink = Sink(int)
    writer = FrameWriter(2, 8, 6, torch.device("cpu"), sink)
    parts = [torch.zeros(2, rows, 6, 3, dtype=dtype) for _ in range(0, 8, rows)]
    parts[-1][1, -1, -1, -1] = value
    if math.isnan(value):
        with pytest.raises(OptionError, match="NaN"):
            for index, part in enumerate(parts):
                writer.write(part, 0, index * rows)
        return
    for index, part in enumerate(parts):
        writer.write(part, 0, index * rows)
    shown = torch.cat(sink.groups)
    assert shown[1, -1, -1, -1] == (value > 0)
    assert (shown == 0.5).sum() == shown.numel() - 1


def test_a_synced_decode_is_never_replaced_by_tiles(vae, latents, monkeypatch):
    made = out_of_memory_above(monkeypatch, vae, 5)
    with pytest.raises(OutOfRoomError, match="with synced in 2 strips: it needs"):
        decode_frames(vae, latents, "synced", runtime=Steady())
    assert made == [9] * len(STRIPS)


def test_the_ladder_goes_from_one_pass_to_no_seams_to_tiles():
    strips = [plan.strips for plan in LADDER if plan.mode == "synced"]
    assert [plan.mode for plan in LADDER] == ["full"] + ["synced"] * 2 + ["tiled"] * 10
    assert strips == list(STRIPS)
    names = list(map(str, LADDER))
    assert len(set(names)) == len(names)  # they are remembered by name
    assert names[:3] == ["full", "synced", "synced in 2 strips"]
    assert names[-2:] == ["tiled-diffusers", "tiles of 128 px, 16 frames"]


class Locking(Steady):
    """A host with page-locked memory, of which it gives so many chunks."""

    def __init__(self, chunks=2**20, **kwargs):
        super().__init__(**kwargs)
        self.chunks, self.locked = chunks, []

    def pinnable_bytes(self):
        return 2**40

    def pin(self, memory):
        if len(self.locked) == self.chunks:
            raise RuntimeError("no more than 0.0 GB may still be page-locked")
        self.locked.append(memory)

    def unpin(self, memory):
        self.locked = [each for each in self.locked if each is not memory]


@contextmanager
def refusing(vae, refuses):
    """Run out of memory in the last level, in walks that are refused."""

    def check(block, args):
        if refuses(args[1]):
            raise FULL

    hook = vae.decoder.up_blocks[-1].resnets[-1].register_forward_pre_hook(check)
    try:
        yield
    finally:
        hook.remove()


def is_larger(walk):
    """Than the smallest rung of an exact decode."""
    return walk.store is None or walk.piece_elements == STORED_PIECE_ELEMENTS


def test_an_exact_decode_that_runs_out_of_memory_goes_on_in_smaller_pieces(
    vae, latents, tmp_path, caplog
):
    expected = decode_frames(vae, latents, "full", runtime=Steady())
    runtime = Locking(state_folder=tmp_path)
    with refusing(vae, is_larger):
        got = decode_frames(vae, latents, "exact", runtime=runtime)
        told = [r.getMessage() for r in caplog.records if "repeated with" in r.getMessage()]
        assert [text.split("repeated with ")[1] for text in told] == [
            "exact.", "exact in 1/2 pieces.",
        ]  # fmt: skip
        caplog.clear()  # the next decode of that size begins there
        assert torch.equal(decode_frames(vae, latents, "exact", runtime=runtime), got)
        assert "repeated with" not in caplog.text
    assert (got - expected).abs().max() <= 1e-5
    assert runtime.locked == []
    runtime = Locking()
    assert torch.equal(decode_frames(vae, latents, "exact", runtime=runtime), expected)


def test_an_exact_decode_that_never_fits_says_which_mode_would(vae, latents):
    runtime = Locking()
    with (
        refusing(vae, lambda walk: True),
        pytest.raises(OutOfRoomError, match="exact in 1/2 pieces: it needs .* choose synced"),
    ):
        decode_frames(vae, latents, "exact", runtime=runtime)
    assert runtime.locked == []


def test_pages_that_cannot_be_locked_in_mid_decode_change_nothing(vae, latents, monkeypatch):
    monkeypatch.setattr(tiling, "EXACT_LADDER", EXACT_LADDER[1:])
    monkeypatch.setattr(store, "CHUNK_BYTES", 4096)
    runtimes = [Locking(), Locking(chunks=3), Locking(chunks=0)]
    first, *others = [decode_frames(vae, latents, "exact", runtime=each) for each in runtimes]
    assert all(torch.equal(first, other) for other in others)
    assert [each.locked for each in runtimes] == [[], [], []]


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes.")]
)
def test_main_memory_that_runs_out_in_an_exact_decode_is_named_and_nothing_stays_locked(
    vae, latents, monkeypatch, caplog, error
):
    monkeypatch.setattr(tiling, "EXACT_LADDER", EXACT_LADDER[1:])
    monkeypatch.setattr(store, "CHUNK_BYTES", 4096)
    empty, runtime = torch.empty, Locking()
    expected = decode_frames(vae, latents, "exact", runtime=runtime)

    def limited(*size, **kwargs):
        if size == (4096 + store.PAGESIZE,) and len(runtime.locked) == 5:
            raise error
        return empty(*size, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(store.torch, "empty", limited)
        with pytest.raises(OutOfRoomError, match='Main memory ran out .* mode "synced"'):
            decode_frames(vae, latents, "exact", runtime=runtime)
    assert "repeated" not in caplog.text  # smaller pieces take as much of it
    assert runtime.locked == []
    assert torch.equal(decode_frames(vae, latents, "exact", runtime=runtime), expected)


@pytest.mark.parametrize(
    ("error", "is_so"),
    [
        (FULL, True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
        (OutOfRoomError("Attention would need 9 bytes for its scores: use fewer frames."), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_only_a_failed_allocation_is_memory_that_ran_out(error, is_so):
    assert ladder.is_out_of_memory(error) is is_so


def test_what_the_failed_call_held_is_free_before_the_next():
    """A tensor of its frames that lived on would be missing for the next rung."""
    held, alive = [], []

    class Held:
        pass

    @contextmanager
    def enter(rung):
        def work():
            if held:
                alive.append(held[0]() is not None)
                return rung
            local = Held()
            held.append(weakref.ref(local))
            raise torch.OutOfMemoryError("CUDA out of memory.")

        yield work

    with ladder.descending([1, 2], enter, torch.device("cpu"), lambda *_: None) as work:
        assert work() == 2
    assert alive == [False]


def test_a_picture_whose_encoding_runs_out_of_memory_is_encoded_again(vae, monkeypatch):
    encode, calls, asked = vae.encode, [], []

    def once(video, **kwargs):
        calls.append(video)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return encode(video, **kwargs)

    runtime = Steady()
    runtime.make_room = asked.append
    image = torch.rand(1, 16, 16, 3, generator=torch.Generator().manual_seed(0))
    size = {"width": 16, "height": 16, "num_frames": 5}
    expected = encode_image(vae, image, **size, runtime=runtime)
    asked.clear()
    monkeypatch.setattr(vae, "encode", once)
    got = encode_image(vae, image, **size, runtime=runtime)
    assert torch.equal(got.image_latents, expected.image_latents)
    assert torch.equal(*calls)
    assert len(asked) == 2  # as it began, and before it was repeated


@pytest.mark.parametrize("times", [1, 2])
def test_what_has_no_rung_is_tried_twice_and_then_told_with_numbers(times):
    calls, asked = [], []

    def work():
        calls.append(1)
        if len(calls) <= times:
            raise FULL
        return "done"

    runtime = Steady()
    runtime.make_room = asked.append
    if times == 1:
        assert ladder.retried(work, runtime, 3 * 10**9, "Encoding the text") == "done"
        assert asked == [3 * 10**9]
        return
    with pytest.raises(OutOfRoomError, match=r"Encoding the text needs about 3\.0 GB .* are free"):
        ladder.retried(work, runtime, 3 * 10**9, "Encoding the text")
    assert len(calls) == 2


def test_a_decode_teaches_the_next_prediction_of_its_kind(vae, latents, tmp_path, caplog):
    runtime = Steady(state_folder=tmp_path)
    key, plan = outcomes.device_key(runtime.device), DecodePlan("full")
    kind = tiling.kind_of_decode(plan, torch.float32)
    caplog.set_level(logging.INFO)
    decode_frames(vae, latents, "full", runtime=runtime)
    assert "expected" not in caplog.text  # its rate is not known
    assert not (tmp_path / "plan.json").exists()
    outcomes.remember(tmp_path, key, "rates", {"convolution": 1e9})
    moments = iter([0.0, 2.0 * plan_flop(plan, SMALL, latents.shape) / 1e9])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiling.time, "perf_counter", lambda: next(moments))
        decode_frames(vae, latents, "full", runtime=runtime)
    assert "Decoded 33 frames with full in" in caplog.text
    assert outcomes.corrections(tmp_path, key) == {kind: pytest.approx(2.0, rel=1e-3)}
    job = Job(24, 32, 33, vae=SMALL, vae_dtype=torch.float32)
    machine = machine_of(runtime, can_probe=False)
    planned = plan_run(machine, job, weights_as(job.config, "bf16", "auto"), Choice(decode="full"))
    raw = plan_flop(plan, SMALL, latents.shape) / 1e9
    assert planned.seconds["decode"] == pytest.approx(2 * raw, rel=1e-3)


@pytest.mark.parametrize(("factor", "rung"), [(0.5, "synced"), (1.2, "synced"), (1.4, "2 strips")])
def test_a_peak_that_was_measured_decides_in_the_run_as_in_the_plan(
    vae, latents, tmp_path, caplog, factor, rung
):
    """With memory for what shapes say, and a quarter more."""
    synced = DecodePlan("synced")
    needed = plan_bytes(synced, SMALL, latents.shape, torch.float32)

    class Small(TorchRuntime):
        def free_bytes(self):
            return needed + 4 * 3 * 33 * 32 * 24  # and the clip

    runtime = Small(state_folder=tmp_path)
    key = outcomes.device_key(runtime.device)
    kind = outcomes.peak_kind(tiling.kind_of_decode(synced, torch.float32))
    outcomes.remember(tmp_path, key, "corrections", {kind: factor})
    caplog.set_level(logging.INFO)
    decode_frames(vae, latents, "synced", runtime=runtime)
    assert f"{rung} in" in caplog.text
    job = Job(24, 32, 33, vae=SMALL, vae_dtype=torch.float32)
    machine = machine_of(runtime, loaded_bytes=vae_bytes(SMALL, torch.float32), can_probe=False)
    weights = weights_as(job.config, "bf16", "auto")
    assert plan_run(machine, job, weights, Choice(decode="synced")).decode.endswith(rung)


def test_a_peak_that_was_measured_is_expected_next_time():
    job, weights = Job(), weights_as(Job().config, "bf16", "auto")
    machine = card("RTX 4090", 24)
    plain = plan_run(machine, job, weights)
    decode = f"decode {plain.decode}, bfloat16, peak"
    sampling = "GEMM bf16, attention exact, peak"
    machine = replace(machine, corrections={decode: 1.2, sampling: 1.1})
    plan = plan_run(machine, job, weights)
    vae = vae_bytes(job.vae, job.vae_dtype)
    assert plan.peak_bytes["decode"] - vae == pytest.approx(
        1.2 * (plain.peak_bytes["decode"] - vae), rel=1e-6
    )
    assert plan.peak_bytes["sample"] == pytest.approx(1.1 * plain.peak_bytes["sample"], rel=1e-6)
