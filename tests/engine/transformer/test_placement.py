"""What a step costs, and streaming that leaves everything where it was."""

import functools
from contextlib import ExitStack

import pytest
import torch
from comfyui_skyreels.skyreels.config import CHUNKINGS, TransformerConfig
from comfyui_skyreels.skyreels.errors import OutOfRoomError
from comfyui_skyreels.skyreels.kernels import dispatch
from comfyui_skyreels.skyreels.kernels.blocks import BLOCK_TYPES
from comfyui_skyreels.skyreels.runtime import TorchRuntime, offload, streaming
from comfyui_skyreels.skyreels.runtime.offload import weight_bytes
from comfyui_skyreels.skyreels.runtime.streaming import CopiesInOrder, least_bytes, padded_bytes
from comfyui_skyreels.skyreels.sampling.pair import twin_of
from comfyui_skyreels.skyreels.sampling.step_cache import FirstBlockCache
from comfyui_skyreels.skyreels.transformer import placement
from comfyui_skyreels.skyreels.transformer.block_linear import BlockLinear
from comfyui_skyreels.skyreels.transformer.layers import rope_table
from comfyui_skyreels.skyreels.transformer.model import SkyReelsTransformer
from comfyui_skyreels.skyreels.transformer.placement import choose_chunking, placed, sampling_bytes
from comfyui_skyreels.skyreels.transformer.quant import (
    STORAGE_DTYPES,
    QuantLinear,
    hadamard_block_size,
    is_quantizable,
    quantize,
)
from support import tiny
from support.gguf_files import random_blocks
from support.streams import Machine


def test_a_forward_at_full_size_stays_within_the_flops_budget():
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model = SkyReelsTransformer(TransformerConfig())
        inputs = {
            "hidden_states": torch.empty(1, 32, 25, 68, 120),
            "timestep": torch.empty(1),
            "encoder_hidden_states": torch.empty(1, 256, 4096),
            "pooled_projections": torch.empty(1, 768),
            "rope": torch.empty(51_000, 64, dtype=torch.complex64),
        }
    # not inference mode: there torch 2.5 shows the counter linear layers and attention as a whole
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    assert 2_600e12 <= counter.get_total_flops() <= 2_634e12


class SmallDevice(TorchRuntime):
    """A host whose compute device has a stated amount of memory.

    The compute device is the CPU, and "elsewhere" is where weights are told to come from: placement
    is decided from `missing_bytes`, which the tests below replace.
    """

    def __init__(self, free: int, **kwargs) -> None:
        super().__init__("cpu", **kwargs)
        self.free, self.asked = free, []

    def free_bytes(self) -> int:
        return self.free

    def make_room(self, num_bytes: int) -> None:
        self.asked.append(num_bytes)


def loop_bytes(module, model):
    apart = {id(p) for conditioner in model.conditioners for p in conditioner.parameters()}
    return sum(p.nbytes for p in module.parameters() if id(p) not in apart)


class Visits(list):
    """("in" or "out", tensors), in order."""

    def tensors(self, kind):
        return {id(tensor) for each, tensors in self if each == kind for tensor in tensors}


@pytest.fixture
def visits(monkeypatch):
    """Pretend every weight is elsewhere, and record which tensors come and go."""
    log = Visits()

    def visit(tensors, device):
        log.append(("in", tensors))
        return lambda: log.append(("out", tensors))

    monkeypatch.setattr(
        placement, "onload_bytes", lambda tensors, device: sum(t.nbytes for t in tensors)
    )
    monkeypatch.setattr(placement, "onload", visit)
    return log


def denoise_inputs(model, text_tokens=7):
    """Of `denoise`, made while everything is at hand."""
    inputs = tiny.inputs(model.config, text_tokens)
    latents = inputs.pop("hidden_states")
    return latents, model.condition(**inputs)


def test_a_loop_that_fits_moves_in_once_and_out_once(visits):
    model = tiny.transformer()
    runtime = SmallDevice(10 * weight_bytes(model))
    inputs = denoise_inputs(model)
    with placed(model, runtime, 0) as run_block:
        moved_in = len(visits)
        result = model.denoise(*inputs, run_block=run_block)
        model.denoise(*inputs, run_block=run_block)
        assert len(visits) == moved_in
    assert visits.tensors("in") == visits.tensors("out")
    assert runtime.asked[0] >= loop_bytes(model, model)
    assert torch.equal(result, model.denoise(*inputs))


def test_what_only_conditions_stays_away_and_comes_when_it_is_called(visits):
    model = tiny.transformer()
    apart = {id(p) for module in model.conditioners for p in module.parameters()}
    with placed(model, SmallDevice(10 * weight_bytes(model)), 0) as run_block:
        assert visits.tensors("in") == {id(p) for p in model.parameters()} - apart
        visits.clear()
        model(**tiny.inputs(model.config), run_block=run_block)
        assert visits.tensors("in") == visits.tensors("out") == apart


def away_bytes(model):
    """What is there for the whole run, and bytes of each block."""
    kept, away = placement._split(model, torch.device("cpu"))
    return sum(tensor.nbytes for tensor in kept), [padded_bytes(block) for block in away.values()]


def away_tensors(model):
    """Of each block."""
    return placement._split(model, torch.device("cpu"))[1].values()


@pytest.fixture
def machine(monkeypatch, visits):
    """A device with a copy stream, to which every weight has to be brought."""
    machine = Machine(bytes_per_s=1e6).install(monkeypatch)
    monkeypatch.setattr(placement, "open_copies", machine.open_copies)
    return machine


class Locking(SmallDevice):
    """A small device whose host may page-lock so many bytes."""

    def __init__(self, free: int, lockable: int = 2**40, **kwargs) -> None:
        super().__init__(free, **kwargs)
        self.lockable, self.locked = lockable, []

    def pin(self, memory):
        if memory.nbytes > self.lockable:
            raise RuntimeError("CUDA error: out of memory")
        first, last = memory.data_ptr(), memory.data_ptr() + memory.nbytes
        taken = any(start < last and first < end for start, end in Machine.locked.items())
        assert not taken, "CUDA registers no page twice"
        self.lockable -= memory.nbytes
        self.locked.append(memory.data_ptr())
        Machine.locked[memory.data_ptr()] = memory.data_ptr() + memory.nbytes

    def unpin(self, memory):
        assert Machine.waits[-1:] == ["a stream"], "copies may be under way"
        self.lockable += memory.nbytes
        self.locked.remove(memory.data_ptr())
        del Machine.locked[memory.data_ptr()]


@pytest.mark.parametrize("beside", [True, False])
def test_small_device_streams_the_blocks_that_do_not_fit(machine, monkeypatch, beside):
    model = tiny.transformer()
    kept, sizes = away_bytes(model)
    if not beside:
        monkeypatch.setattr(placement, "open_copies", lambda device: InOrder(machine))
    slots = 2 if beside else 1
    runtime = Locking(kept + sizes[0] + slots * max(sizes))  # a large one stays
    inputs = denoise_inputs(model)
    pointers = [p.data_ptr() for p in model.parameters()]
    with placed(model, runtime, 0) as run_block:
        assert bool(runtime.locked) == beside
        for _ in range(2):
            result = model.denoise(*inputs, run_block=run_block)
            assert [p.data_ptr() for p in model.parameters()] == pointers
    assert torch.equal(result, model.denoise(*inputs))
    streamed = sum(sizes) - sizes[0]
    ahead = slots * max(sizes)
    assert 2 * streamed - 10_000 <= sum(machine.copied) <= 2 * streamed + ahead
    assert runtime.locked == []


class InOrder(CopiesInOrder):
    def __init__(self, machine):
        self.log = machine.copied

    def bring(self, slot, pairs):
        super().bring(slot, pairs)
        self.log.append(sum(len(source) for _, source in pairs))


PRECISIONS = ("fp32", "bf16", "fp16", "fp8", "int8", "weight-only fp8", "Q8_0")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("lockable", [2**40, 0])
def test_streamed_run_equals_the_resident_run_bit_for_bit(machine, precision, share, lockable):
    model, latents, (conditioning, _), (expected, _) = resident(precision)
    kept, sizes = away_bytes(model)
    pointers = [p.data_ptr() for p in model.parameters()]
    least = least_bytes(sizes)
    runtime = Locking(int(kept + least + share * (sum(sizes) - least)), lockable)
    with torch.inference_mode(), placed(model, runtime, 0) as run_block:
        results = [model.denoise(latents, conditioning, run_block=run_block) for _ in range(2)]
    assert sum(machine.copied) >= (1 - share) * sum(sizes)
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert all(torch.equal(result, expected) for result in results)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("lockable", [2**40, 0])
def test_both_branches_share_each_streamed_block_and_equal_the_resident_ones(
    machine, precision, lockable
):
    model, latents, branches, expected = resident(precision)
    kept, sizes = away_bytes(model)
    count = 3
    pointers = [p.data_ptr() for p in model.parameters()]
    runtime = Locking(kept + least_bytes(sizes), lockable)
    with torch.inference_mode(), placed(model, runtime, 0) as run_block:
        results = [
            model.denoise_together(latents, branches, run_block=run_block) for _ in range(count)
        ]
    assert [p.data_ptr() for p in model.parameters()] == pointers
    streamed = sum(sum(t.nbytes for t in block) for block in away_tensors(model))
    assert count * streamed <= sum(machine.copied) <= count * streamed + 2 * max(sizes)
    for result in results:
        assert all(torch.equal(*pair) for pair in zip(result, expected, strict=True))


@pytest.mark.parametrize(("made", "run"), [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("lockable", [2**40, 0])
def test_weights_of_inference_mode_are_streamed_in_it_and_others_in_both(
    machine, made, run, lockable
):
    with torch.inference_mode(made):
        model = tiny.transformer()
    kept, sizes = away_bytes(model)
    with torch.inference_mode(run), torch.no_grad():
        inputs = denoise_inputs(model)
        with placed(model, Locking(kept + least_bytes(sizes), lockable), 0) as run_block:
            result = model.denoise(*inputs, run_block=run_block)
        assert torch.equal(result, model.denoise(*inputs))


@functools.cache
def resident(precision):
    """A model that is streamed again and again, latents, two branches, what it makes of them."""
    model = in_precision(precision)
    (latents, positive), (_, negative) = denoise_inputs(model), denoise_inputs(model, 4)
    branches = [positive, negative]
    with torch.inference_mode():
        return model, latents, branches, [model.denoise(latents, each) for each in branches]


def in_precision(precision):
    """A tiny model whose block linears are of that precision."""
    model = tiny.transformer()
    if precision == "fp16":
        return model.half()
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    model = model.to(dtype)
    kind = precision.removeprefix("weight-only ")
    if kind in BLOCK_TYPES:
        for name, layer in list(model.named_modules()):
            if isinstance(layer, torch.nn.Linear) and "_blocks." in name:
                data = random_blocks(kind, *layer.weight.shape).data
                model.set_submodule(name, BlockLinear(data, kind, layer.bias))
        return model
    if kind not in STORAGE_DTYPES:
        return model
    block = hadamard_block_size(model.config.hidden_size) if kind == "int8" else 0
    for name, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.Linear) and is_quantizable(f"{name}.weight", 2):
            weight, scale = quantize(layer.weight.data, STORAGE_DTYPES[kind], block)
            model.set_submodule(
                name,
                QuantLinear(
                    weight, scale, layer.bias, hadamard_block=block, weight_only=kind != precision
                ),
            )
    assert any(isinstance(layer, QuantLinear) for layer in model.modules())
    return model


def test_blocks_that_left_while_room_was_made_are_brought_back(visits, monkeypatch):
    # ComfyUI's memory manager may unload a part of the very model that asks for room
    model = tiny.transformer()
    gone: set[int] = set()
    monkeypatch.setattr(
        placement,
        "onload_bytes",
        lambda tensors, device: sum(t.nbytes for t in tensors if id(t) in gone),
    )
    runtime = SmallDevice(10 * weight_bytes(model))
    left = [p for block in model.single_blocks for p in (block.linear1.weight, block.linear2.bias)]
    runtime.make_room = lambda num_bytes: gone.update(map(id, left))
    with placed(model, runtime, 0):
        assert gone <= visits.tensors("in")


def test_a_tensor_that_is_not_contiguous_is_not_streamed(visits):
    model = tiny.transformer()
    layer = model.single_blocks[0].linear1
    layer.weight.data = layer.weight.data.T.contiguous().T
    kept, away = placement._split(model, torch.device("cpu"))
    assert any(tensor is layer.weight for tensor in kept)
    assert all(tensor.is_contiguous() for tensors in away.values() for tensor in tensors)


def test_too_little_room_says_how_much_and_what_helps(visits):
    model = tiny.transformer()
    with (
        pytest.raises(OutOfRoomError, match="3.0 GB for activations.*fewer frames"),
        placed(model, SmallDevice(1_000_000_000), 3_000_000_000),
    ):
        pass
    assert visits == []


@pytest.mark.parametrize("lockable", [2**40, 0])
@pytest.mark.parametrize("stop_at", [1, 2, 5, 6, 9])
@pytest.mark.parametrize("branches", [1, 2])
def test_an_interrupt_stops_before_the_next_block_and_the_next_run_is_good(
    machine, stop_at, lockable, branches
):
    model, latents, conditionings, expected = resident("fp32")
    conditionings, expected = conditionings[:branches], expected[:branches]
    kept, sizes = away_bytes(model)
    pointers = [p.data_ptr() for p in model.parameters()]
    ran = []

    class StopError(Exception):
        pass

    def check():
        if len(ran) == stop_at:
            raise StopError

    def run_twice(runtime):
        with placed(model, runtime, 0) as run_block:

            def counted(module, *args):
                result = run_block(module, *args)
                ran.append(module)
                return result

            return [
                model.denoise_together(latents, conditionings, run_block=counted) for _ in range(3)
            ]

    room = kept + least_bytes(sizes)
    stopped = Locking(room, lockable, on_check=check)
    with pytest.raises(StopError):
        run_twice(stopped)
    assert len(ran) == stop_at
    assert stopped.locked == []
    assert [p.data_ptr() for p in model.parameters()] == pointers
    for result in run_twice(Locking(room, lockable)):
        assert all(torch.equal(*pair) for pair in zip(result, expected, strict=True))


def test_a_step_cache_that_runs_the_first_block_alone_gets_it(machine):
    model = tiny.transformer()
    kept, sizes = away_bytes(model)
    inputs = denoise_inputs(model)
    results = []
    for free in (10 * weight_bytes(model), kept + least_bytes(sizes)):
        with placed(model, Locking(free), 0) as run_block:
            cache = FirstBlockCache(
                9, run_block, 10.0, first=model.blocks[0], last=model.blocks[-1]
            )
            for step in range(9):
                cache.begin(step, inputs[0], [0, 1])
                for branch in range(2):
                    results.append(
                        cache.predict(branch, lambda run: model.denoise(*inputs, run_block=run))
                    )
        assert cache.skipped
    assert all(torch.equal(*pair) for pair in zip(results[:18], results[18:], strict=True))


def test_no_neighbour_of_a_streamed_block_is_page_locked_in_part(machine):
    model = tiny.transformer()
    file = torch.empty(sum(p.nbytes for p in model.parameters()) + 12, dtype=torch.uint8)
    start = 12  # as in a mapped file: one tensor right after the other, on no boundary of pages
    for parameter in model.parameters():
        place = file[start : start + parameter.nbytes].view(parameter.dtype).view(parameter.shape)
        parameter.data = place.copy_(parameter)
        start += parameter.nbytes
    kept, away = placement._split(model, torch.device("meta"))
    streamed = {t.data_ptr() for tensors in away.values() for t in tensors}
    sizes = [padded_bytes(tensors) for tensors in away.values()]
    inputs = denoise_inputs(model)
    expected = model.denoise(*inputs)
    room = sum(t.nbytes for t in kept) + least_bytes(sizes)
    with placed(model, Locking(room), 0) as run_block:
        others = [p for p in model.parameters() if p.data_ptr() not in streamed]
        assert Machine.locked and others
        for tensor in others:
            first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
            assert not any(first < end and start < last for start, end in Machine.locked.items())
        result = model.denoise(*inputs, run_block=run_block)
    assert torch.equal(result, expected)


@pytest.mark.parametrize("lockable", [2**40, 60_000])
@pytest.mark.parametrize("blocks", [(0, 1), (1, 0), (0, 0)])
def test_two_devices_stream_from_the_same_memory(machine, monkeypatch, blocks, lockable):
    """Both read what one of them has locked, until the last one leaves."""
    monkeypatch.setattr(streaming, "page_locked", lambda n: torch.empty(n, dtype=torch.uint8))
    model = tiny.transformer()
    twin = twin_of(model)
    kept, sizes = away_bytes(model)
    least, large = kept + least_bytes(sizes), max(sizes)
    first = Locking(least + blocks[0] * large, lockable)
    second = Locking(least + blocks[1] * large)
    inputs = denoise_inputs(model)
    expected = model.denoise(*inputs)
    with ExitStack() as stack:
        stacks = [stack.enter_context(ExitStack()) for _ in range(2)]
        one = stacks[0].enter_context(placed(model, first, 0))
        other = stacks[1].enter_context(placed(twin, second, 0))
        assert first.locked
        for _ in range(2):
            assert torch.equal(model.denoise(*inputs, run_block=one), expected)
            assert torch.equal(twin.denoise(*inputs, run_block=other), expected)
        stacks[0].close()  # the first one leaves, and what it locked stays for the other
        assert torch.equal(twin.denoise(*inputs, run_block=other), expected)
        assert Machine.locked
    assert (first.locked, second.locked, Machine.locked) == ([], [], {})


def test_what_cannot_be_page_locked_goes_through_a_ring_and_that_is_said_once(
    machine, monkeypatch, caplog
):
    monkeypatch.setattr(dispatch, "_logged", set())
    monkeypatch.setattr(streaming, "page_locked", lambda n: torch.empty(n, dtype=torch.uint8))
    monkeypatch.setattr(streaming, "RING_BYTES", (4096,))
    model = tiny.transformer()
    kept, sizes = away_bytes(model)
    inputs = denoise_inputs(model)
    expected = model.denoise(*inputs)
    for _ in range(2):
        with placed(model, Locking(kept + least_bytes(sizes), 60_000), 0) as run_block:
            assert torch.equal(model.denoise(*inputs, run_block=run_block), expected)
    (said,) = [r.getMessage() for r in caplog.records if "page-locked" in r.getMessage()]
    assert "out of memory" in said
    assert "a ring of 0.0 MB, slower" in said
    assert max(machine.copied) <= 4096


def test_without_page_locked_memory_copies_are_pageable(machine, monkeypatch, caplog):
    def refuse(num_bytes):
        raise RuntimeError("CUDA error: OS call failed")

    monkeypatch.setattr(dispatch, "_logged", set())
    monkeypatch.setattr(streaming, "page_locked", refuse)
    model = tiny.transformer()
    kept, sizes = away_bytes(model)
    inputs = denoise_inputs(model)
    with placed(model, Locking(kept + least_bytes(sizes), 0), 0) as run_block:
        result = model.denoise(*inputs, run_block=run_block)
    assert torch.equal(result, model.denoise(*inputs))
    assert "pageable copies" in caplog.text


def test_memory_that_is_gone_when_it_is_wanted_leaves_fewer_blocks_there(
    machine, monkeypatch, visits
):
    model = tiny.transformer()
    kept, sizes = away_bytes(model)
    inputs = denoise_inputs(model)
    runtime = Locking(kept + sum(sizes) - 1)
    held = [0]
    visit = placement.onload

    def onload(tensors, device):
        wanted = sum(t.nbytes for t in tensors)
        if held[0] + wanted > kept + sizes[0]:
            runtime.free = kept + least_bytes(sizes) + sizes[-1]
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        held[0] += wanted
        leave = visit(tensors, device)

        def offload():
            held[0] -= wanted
            leave()

        return offload

    monkeypatch.setattr(placement, "onload", onload)
    with placed(model, runtime, 0) as run_block:
        result = model.denoise(*inputs, run_block=run_block)
    assert held == [0]
    assert torch.equal(result, model.denoise(*inputs))
    assert visits.tensors("in") == visits.tensors("out")


def test_memory_that_never_comes_ends_in_a_clear_error(machine, monkeypatch, visits):
    model = tiny.transformer()
    kept, sizes = away_bytes(model)
    empty = torch.empty

    def refuse(*args, **kwargs):
        if kwargs.get("dtype") == torch.uint8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return empty(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", refuse)
    with (
        pytest.raises(OutOfRoomError, match="for a block on cpu"),
        placed(model, Locking(kept + sum(sizes) - 1), 0),
    ):
        pass
    assert visits == []


def test_with_room_for_one_slot_alone_blocks_are_streamed_through_it(machine):
    model = tiny.transformer()
    kept, sizes = away_bytes(model)
    inputs = denoise_inputs(model)
    for free in (least_bytes(sizes, 2), least_bytes(sizes, 2) - 1, least_bytes(sizes, 1)):
        with placed(model, Locking(kept + free), 0) as run_block:
            result = model.denoise(*inputs, run_block=run_block)
        assert torch.equal(result, model.denoise(*inputs))
    with (
        pytest.raises(OutOfRoomError),
        placed(model, Locking(kept + least_bytes(sizes, 1) - 1), 0),
    ):
        pass


@pytest.mark.parametrize("room", ["whole", "chunks", "head groups", ""])
def test_the_chunking_is_the_fastest_that_fits_beside_the_weights(room):
    config, tokens = tiny.TRANSFORMER, 1_000_000
    needed = {name: sampling_bytes(config, tokens, torch.float32, name) for name in CHUNKINGS}
    free = needed[room or "head groups"]
    free += {"whole": placement.WHOLE_MARGIN_BYTES, "": -1}.get(room, 0)
    assert choose_chunking(needed, free) == (room or "head groups")
    if room:
        others = list(CHUNKINGS)
        following = others[min(others.index(room) + 1, len(others) - 1)]
        assert choose_chunking(needed, free - 1) == following


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("way", ["page-locked", "ring", "pageable"])
def test_streamed_run_on_the_gpu_equals_the_resident_run(monkeypatch, way):
    if way == "pageable":
        monkeypatch.setattr(streaming, "RING_BYTES", ())
    model = tiny.transformer()
    inputs = {k: v.cuda() for k, v in tiny.inputs(model.config).items()}
    rope = rope_table((3, 3, 5), model.config, device="cuda")
    pointers = [p.data_ptr() for p in model.parameters()]
    kept, away = placement._split(model, torch.device("cuda:0"))
    kept = sum(tensor.nbytes for tensor in kept) + offload.RESERVE_BYTES
    sizes = [padded_bytes(block) for block in away.values()]
    results, locked = [], []
    for room in (2 * sum(sizes), least_bytes(sizes)):
        runtime = TorchRuntime("cuda")
        runtime.free_bytes = lambda room=room: kept + room
        if way != "page-locked":
            runtime.pin = refuse_to_pin
        with torch.inference_mode(), placed(model, runtime, 0) as run_block:
            locked.append(runtime.pinned_bytes)
            for _ in range(3):
                results.append(model(**inputs, rope=rope, run_block=run_block).cpu())
            latents, *others = inputs.values()
            branch = model.condition(*others, run_block=run_block)
            together = model.denoise_together(
                latents, [branch, branch], rope=rope, run_block=run_block
            )
            results += [result.cpu() for result in together]
        assert runtime.pinned_bytes == 0
    assert locked[0] == 0
    assert (locked[1] > 0) == (way == "page-locked")
    assert all(torch.equal(result, results[0]) for result in results)
    assert [p.data_ptr() for p in model.parameters()] == pointers


def refuse_to_pin(memory):
    raise RuntimeError("refused")
