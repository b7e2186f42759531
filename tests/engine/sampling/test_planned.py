"""Memory that runs out in a run: one rung down, the step again, the rung remembered."""

import json
import logging
from contextlib import contextmanager
from itertools import chain

import pytest
import torch
from comfyui_skyreels.skyreels.conditioning.latents import ImageConditioning
from comfyui_skyreels.skyreels.config import CHUNKINGS, Guidance, TransformerConfig
from comfyui_skyreels.skyreels.errors import OutOfRoomError
from comfyui_skyreels.skyreels.runtime import TorchRuntime, outcomes
from comfyui_skyreels.skyreels.sampling import planned
from comfyui_skyreels.skyreels.sampling.sample import sample
from comfyui_skyreels.skyreels.sampling.settings import SamplingSettings, get_sigmas
from comfyui_skyreels.skyreels.sampling.step_cache import CACHES, CacheConfig
from comfyui_skyreels.skyreels.transformer import placement
from support import tiny
from support.tiny import embeds

pytestmark = pytest.mark.usefixtures("few_objects")

PROMPT, NEGATIVE = embeds(7, 1), embeds(4, 2)
#: several blocks of a kind, so that some can stay while others are streamed
CONFIG = TransformerConfig(**{**tiny.TRANSFORMER.__dict__, "num_layers": 3, "num_single_layers": 5})
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.fixture(scope="module")
def model():
    return tiny.transformer(CONFIG)


@pytest.fixture(scope="module")
def conditioning():
    generator = torch.Generator().manual_seed(2)
    return ImageConditioning(torch.randn(1, 16, 1, 4, 6, generator=generator), 48, 32, 9)


def run(model, conditioning, runtime=None, **settings):
    settings = SamplingSettings(**{"sigmas": get_sigmas(4), **settings})
    runtime = runtime or TorchRuntime()
    return sample(model, conditioning, PROMPT, NEGATIVE, settings, runtime=runtime)


@pytest.fixture(scope="module")
def undisturbed(model, conditioning):
    return run(model, conditioning)


@contextmanager
def failing(module, calls, error=FULL):
    """Raise an error in the calls of a module with these numbers."""
    made = iter(range(10_000))

    def check(*_):
        if next(made) in calls:
            raise error

    hook = module.register_forward_pre_hook(check)
    try:
        yield
    finally:
        hook.remove()


def stages(model):
    return {
        "embedding": model.time_in,
        "text": model.txt_in,
        "modulation": model.double_blocks[1].img_mod,
        "patches": model.img_in,
        "double block": model.double_blocks[1],
        "single block": model.single_blocks[2],
        "last layer": model.final_layer,
    }


@pytest.mark.parametrize("stage", stages(tiny.transformer(CONFIG)))
def test_a_stage_that_runs_out_of_memory_is_repeated_with_the_right_result(
    model, conditioning, undisturbed, stage
):
    with failing(stages(model)[stage], {3}):
        got = run(model, conditioning)
    torch.testing.assert_close(got, undisturbed, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "error",
    [
        FULL,
        MemoryError(),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
    ],
)
def test_a_step_is_repeated_from_the_same_latents_whatever_library_ran_out(
    model, conditioning, undisturbed, error
):
    inputs = []
    hook = model.img_in.register_forward_pre_hook(lambda _, args: inputs.append(args[0].clone()))
    try:
        with failing(model.single_blocks[0], {4}, error):  # the positive branch of the third step
            got = run(model, conditioning)
    finally:
        hook.remove()
    assert len(inputs) == 9
    assert torch.equal(inputs[4], inputs[5])
    torch.testing.assert_close(got, undisturbed, atol=1e-5, rtol=1e-5)


def test_a_step_whose_second_branch_runs_out_is_repeated_as_a_whole(model, conditioning):
    inputs = []
    hook = model.img_in.register_forward_pre_hook(lambda _, args: inputs.append(args[0].clone()))
    try:
        with failing(model.single_blocks[0], {5}):
            run(model, conditioning)
    finally:
        hook.remove()
    assert len(inputs) == 10
    assert torch.equal(inputs[4], inputs[6])


def test_any_other_error_ends_the_run(model, conditioning):
    with (
        failing(model.single_blocks[0], {4}, RuntimeError("CUDA error: misaligned address")),
        pytest.raises(RuntimeError, match="misaligned"),
    ):
        run(model, conditioning)


def test_each_rung_is_told_and_the_last_one_says_what_would_help(model, conditioning, caplog):
    with (
        failing(model.double_blocks[0], range(1, 100)),
        pytest.raises(OutOfRoomError, match="also with head groups.*another program.*at least"),
    ):
        run(model, conditioning)
    told = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(told) == 2
    assert "with activations whole" in told[0]
    assert "repeated with chunks" in told[0]
    assert "repeated with head groups" in told[1]


@pytest.mark.parametrize("name", ["fast", "first-block"])
def test_a_cache_starts_anew_on_the_new_rung(model, conditioning, undisturbed, name):
    with failing(model.single_blocks[0], {3}):
        got = run(model, conditioning, cache=CACHES[name])
    assert (got - undisturbed).norm() <= 0.05 * undisturbed.norm()


# --- a device with a memory of its own ----------------------------------------------------------


class Device(TorchRuntime):
    """A device that holds the weights brought to it, and refuses what exceeds its memory.

    It is the CPU, as tests have no other; `placement` is told that every weight is elsewhere.
    """

    def __init__(self, capacity, model, monkeypatch, **kwargs):
        super().__init__("cpu", **kwargs)
        self.offload_device = torch.device("meta")  # so that the planner streams
        self.capacity, self.taken_by_others, self.lost = capacity, 0, 0
        self.held = self.most = 0
        monkeypatch.setattr(
            placement, "onload_bytes", lambda tensors, device: sum(t.nbytes for t in tensors)
        )
        monkeypatch.setattr(
            planned, "onload_bytes", lambda tensors, device: sum(t.nbytes for t in tensors)
        )
        monkeypatch.setattr(placement, "onload", self.onload)
        self.hooks = [block.register_forward_pre_hook(self.compute) for block in model.blocks]

    def onload(self, tensors, device):
        num_bytes = sum(t.nbytes for t in tensors)
        self.take(num_bytes)
        self.held += num_bytes

        def offload():
            self.held -= num_bytes

        return offload

    def compute(self, block, args):
        chunking = next(name for name, each in CHUNKINGS.items() if each == args[-1])
        self.take(self.activations[chunking])

    def take(self, num_bytes):
        self.most = max(self.most, self.held + num_bytes)
        if self.held + num_bytes > self.capacity - self.taken_by_others - self.lost:
            raise FULL

    def free_bytes(self):
        return self.capacity - self.taken_by_others - self.held


@pytest.fixture
def device(model, monkeypatch, conditioning, tmp_path):
    """Makes devices; activations are as large as a third of the weights of the loop."""
    made = []

    def make(capacity_in_loops, **kwargs):
        from comfyui_skyreels.skyreels.runtime import offload
        from comfyui_skyreels.skyreels.sampling import sample as sampling

        monkeypatch.setattr(offload, "RESERVE_BYTES", 0)
        loop = sum(t.nbytes for t in placement.loop_tensors(model))
        runtime = Device(
            int(capacity_in_loops * loop), model, monkeypatch, state_folder=tmp_path, **kwargs
        )
        runtime.activations = {
            name: int(loop * share)
            for name, share in (("whole", 0.4), ("chunks", 0.3), ("head groups", 0.2))
        }
        monkeypatch.setattr(placement, "WHOLE_MARGIN_BYTES", 0)
        monkeypatch.setattr(sampling, "run_bytes", lambda *_: dict(runtime.activations))
        made.append(runtime)
        return runtime

    yield make
    for runtime in made:
        for hook in runtime.hooks:
            hook.remove()


def rung_of(tmp_path):
    known = json.loads((tmp_path / "plan.json").read_text())["devices"]
    [groups] = known.values()
    [rung] = groups["rungs"].values()
    return rung["rung"]


def test_a_device_with_room_keeps_everything(device, model, conditioning, undisturbed, tmp_path):
    runtime = device(2)
    assert torch.equal(run(model, conditioning, runtime), undisturbed)
    assert runtime.held == 0
    assert not (tmp_path / "plan.json").exists()


@pytest.mark.parametrize("taken", [0.15, 0.4, 0.8])
def test_memory_that_another_program_takes_in_mid_run_costs_one_rung(
    device, model, conditioning, undisturbed, tmp_path, taken
):
    runtime = device(1.5)

    def report(stage, done, *_):
        if done == 2:
            runtime.taken_by_others = int(taken * runtime.capacity / 1.5)

    runtime._on_progress = report
    got = run(model, conditioning, runtime)
    torch.testing.assert_close(got, undisturbed, atol=1e-5, rtol=1e-5)
    assert rung_of(tmp_path) == "chunks"  # and as many blocks stay as now fit
    assert runtime.held == 0


@pytest.mark.parametrize(
    ("lost", "rung"), [(0.15, "chunks"), (0.25, "head groups"), (0.4, "fewer"), (0.6, "fewer")]
)
def test_memory_that_is_told_to_be_free_and_is_not_costs_as_many_rungs_as_it_takes(
    device, model, conditioning, undisturbed, tmp_path, lost, rung
):
    runtime = device(1.5)
    runtime.lost = int(lost * runtime.capacity / 1.5)  # in pieces too small to be used
    got = run(model, conditioning, runtime)
    torch.testing.assert_close(got, undisturbed, atol=1e-5, rtol=1e-5)
    assert rung in rung_of(tmp_path)
    assert runtime.held == 0


def test_the_rung_is_taken_at_once_as_long_as_no_more_memory_is_free(
    device, model, conditioning, caplog
):
    runtime = device(1.5)
    runtime.activations["whole"] *= 2  # as if a kernel took more than is counted
    needed = dict(runtime.activations, whole=runtime.activations["whole"] // 2)
    from comfyui_skyreels.skyreels.sampling import sample as sampling

    caplog.set_level(logging.INFO)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "run_bytes", lambda *_: dict(needed))
        for falls in (1, 0):
            caplog.clear()
            run(model, conditioning, runtime)
            told = [r.getMessage() for r in caplog.records]
            assert sum("Memory ran out with" in text for text in told) == falls
            assert sum("ran out here before" in text for text in told) == 1 - falls
        runtime.capacity *= 2  # a card that is no longer shared
        caplog.clear()
        run(model, conditioning, runtime)
        assert not any("ran out" in r.getMessage() for r in caplog.records)


def test_a_cancel_while_the_run_goes_down_stops_it_and_frees_all(device, model, conditioning):
    class StopError(Exception):
        pass

    def check():
        if runtime.taken_by_others:
            raise StopError

    runtime = device(1.5, on_check=check)
    runtime._on_progress = lambda stage, done, *_: setattr(
        runtime, "taken_by_others", runtime.capacity // 3 if done == 2 else 0
    )
    with pytest.raises(StopError):
        run(model, conditioning, runtime)
    assert runtime.held == 0


# --- both branches block by block, behind a slow link -------------------------------------------


@pytest.fixture
def slow_link(tmp_path):
    """A file that knows rates of this machine, the link so slow that every copy is waited for."""

    def remember(bytes_per_s=1e6):
        rates = {"GEMM fp32": 1e12, "attention exact": 1e12, "memory": 1e12, "link": bytes_per_s}
        outcomes.remember(tmp_path, outcomes.device_key(torch.device("cpu")), "rates", rates)

    remember()
    return remember


@contextmanager
def ran(model):
    """Numbers of the blocks in the order in which they run."""
    order = []
    hooks = [
        block.register_forward_hook(lambda *_, number=number: order.append(number))
        for number, block in enumerate(model.blocks)
    ]
    try:
        yield order
    finally:
        for hook in hooks:
            hook.remove()


ONE, BOTH = list(range(8)), [number for number in range(8) for _ in range(2)]


def test_behind_a_slow_link_both_branches_run_block_by_block_with_the_same_bits(
    device, model, conditioning, slow_link, caplog
):
    caplog.set_level(logging.INFO)
    runs = []
    for link in (1e12, 1e6):
        slow_link(link)
        caplog.clear()
        with ran(model) as order:
            got = run(model, conditioning, runtime := device(1))
        runs.append((got, order, "once for both predictions of a step" in caplog.text))
        assert runtime.held == 0
        assert 0 < runtime.most <= runtime.capacity
    (plain, in_turn, told), (interleaved, together, told_too) = runs
    assert torch.equal(plain, interleaved)
    assert (in_turn, together) == (4 * (ONE + ONE), 4 * BOTH)
    assert (told, told_too) == (False, True)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"guidance": Guidance(cfg_end=0.5)}, 2 * [BOTH] + 2 * [ONE]),
        ({"guidance": Guidance(true_cfg_scale=1.0)}, 4 * [ONE]),
        ({"cache": CacheConfig("first-block", 0.0)}, 8 * [ONE]),
    ],
)
def test_blocks_run_for_both_branches_only_where_both_are_needed_and_no_cache_decides(
    device, model, conditioning, slow_link, settings, steps
):
    with ran(model) as order:
        run(model, conditioning, device(1), **settings)
    assert order == list(chain(*steps))


def test_memory_that_runs_out_with_both_branches_alive_costs_the_interleaving_first(
    device, model, conditioning, slow_link, tmp_path, caplog
):
    slow_link(1e12)
    plain = run(model, conditioning, device(1))
    slow_link()
    for falls in (1, 0):
        caplog.clear()
        with ran(model) as order, failing(model.single_blocks[2], {5} if falls else set()):
            got = run(model, conditioning, device(1))
        assert torch.equal(got, plain)
        told = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        if falls:  # in the second branch of the third step
            assert order == 2 * BOTH + BOTH[: BOTH.index(5) + 1] + 2 * (ONE + ONE)
            assert "with activations head groups, both predictions at once" in told[0]
            assert told[0].endswith("the step is repeated with head groups.")
            assert rung_of(tmp_path) == "head groups"
        else:  # the rung is remembered
            assert order == 4 * (ONE + ONE)
            assert told == []


@pytest.mark.parametrize("stop_at", [1, 2, 3, 16, 29])
def test_a_cancel_between_the_branches_of_a_block_stops_there_and_the_next_run_is_good(
    device, model, conditioning, slow_link, stop_at
):
    class StopError(Exception):
        pass

    def check():
        if stop_at is not None and len(order) == stop_at:
            raise StopError

    sigmas = get_sigmas(2)
    expected = run(model, conditioning, device(1), sigmas=sigmas)
    runtime = device(1, on_check=check)
    with ran(model) as order, pytest.raises(StopError):
        run(model, conditioning, runtime, sigmas=sigmas)
    assert order == (2 * BOTH)[:stop_at]
    assert runtime.held == 0
    stop_at = None
    assert torch.equal(run(model, conditioning, runtime, sigmas=sigmas), expected)


def test_too_little_memory_for_any_plan_is_refused_before_anything_is_brought(
    device, model, conditioning
):
    runtime = device(0.2)
    runtime.activations = dict.fromkeys(runtime.activations, 3 * runtime.capacity)
    with pytest.raises(OutOfRoomError, match="at least .* GB and .* are free.*What would work"):
        run(model, conditioning, runtime)
    assert runtime.most == 0
