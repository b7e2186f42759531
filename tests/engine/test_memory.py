"""What a step costs, and streaming that leaves everything where it was."""

import pytest
import torch
from comfyui_skyreels.skyreels import memory
from comfyui_skyreels.skyreels.config import TransformerConfig
from comfyui_skyreels.skyreels.errors import OutOfRoomError
from comfyui_skyreels.skyreels.layers import rope_table
from comfyui_skyreels.skyreels.memory import placed, sampling_bytes, weight_bytes
from comfyui_skyreels.skyreels.model import SkyReelsTransformer
from comfyui_skyreels.skyreels.runtime import TorchRuntime
from support import tiny
from support.peak import PeakBytes

FULL_TOKENS = 51_256


@pytest.fixture
def full_size():
    """Full width and length, one block of each kind, as shapes only."""
    config = TransformerConfig(num_layers=1, num_single_layers=2)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model = SkyReelsTransformer(config).requires_grad_(False)
    finally:
        torch.set_default_dtype(default)
    with torch.device("meta"):
        inputs = {
            "hidden_states": torch.empty(1, 32, 25, 68, 120),
            "timestep": torch.empty(1),
            "encoder_hidden_states": torch.empty(1, 256, 4096),
            "pooled_projections": torch.empty(1, 768),
            "rope": torch.empty(51_000, 64, dtype=torch.complex64),
        }
    return model, inputs


def test_a_step_stays_within_the_estimate_at_full_size(full_size):
    model, inputs = full_size
    estimate = sampling_bytes(model.config, FULL_TOKENS, torch.bfloat16)
    with PeakBytes() as counted, torch.inference_mode():
        model(**inputs, attention=lambda query, key, value: torch.empty_like(query))
    assert 0.85 * estimate <= counted.peak <= 1.02 * estimate


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
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
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


@pytest.fixture
def visits(monkeypatch):
    """Pretend every weight is elsewhere, and record which modules come and go."""
    log = []

    def visit(module, device):
        log.append(("in", module))
        return lambda: log.append(("out", module))

    monkeypatch.setattr(memory, "missing_bytes", lambda module, device: weight_bytes(module))
    monkeypatch.setattr(memory, "_visit", visit)
    return log


def test_model_that_fits_moves_in_once_and_out_once(visits):
    model = tiny.transformer()
    runtime = SmallDevice(10 * weight_bytes(model))
    inputs = tiny.inputs(model.config)
    with placed(model, runtime, 0) as run_block:
        moved_in = len(visits)
        result = model(**inputs, run_block=run_block)
        model(**inputs, run_block=run_block)
        assert len(visits) == moved_in
    assert {m for kind, m in visits if kind == "in"} == {m for kind, m in visits if kind == "out"}
    assert runtime.asked and runtime.asked[0] >= weight_bytes(model)
    assert torch.equal(result, model(**inputs))


def test_small_device_streams_the_blocks_that_do_not_fit(visits):
    model = tiny.transformer()
    blocks = [weight_bytes(block) for block in model.blocks]
    outside = weight_bytes(model) - sum(blocks)
    runtime = SmallDevice(outside + blocks[0] + max(blocks))  # one resident, one visiting
    inputs = tiny.inputs(model.config)
    with placed(model, runtime, 0) as run_block:
        visits.clear()
        result = model(**inputs, run_block=run_block)
        assert [module for kind, module in visits if kind == "in"] == model.blocks[1:]
        assert [kind for kind, _ in visits] == ["in", "out"] * 3
    assert torch.equal(result, model(**inputs))


def test_blocks_that_left_while_room_was_made_are_brought_back(visits, monkeypatch):
    # ComfyUI's memory manager may unload a part of the very model that asks for room
    model = tiny.transformer()
    gone: list[torch.nn.Module] = []
    monkeypatch.setattr(
        memory, "missing_bytes", lambda module, device: module in gone and weight_bytes(module)
    )
    runtime = SmallDevice(10 * weight_bytes(model))
    runtime.make_room = lambda num_bytes: gone.extend(model.blocks[1:3])
    with placed(model, runtime, 0) as run_block:
        model(**tiny.inputs(model.config), run_block=run_block)
    assert [module for kind, module in visits if kind == "in" and module in model.blocks] == gone


def test_too_little_room_says_how_much_and_what_helps(visits):
    model = tiny.transformer()
    with (
        pytest.raises(OutOfRoomError, match="3.0 GB for activations.*fewer frames"),
        placed(model, SmallDevice(1_000_000_000), 3_000_000_000),
    ):
        pass
    assert visits == []


def test_weights_return_after_an_interrupt_inside_a_block(visits):
    model = tiny.transformer()

    class StopError(Exception):
        pass

    checks = iter(range(100))

    def check():
        if next(checks) == 3:
            raise StopError

    blocks = [weight_bytes(block) for block in model.blocks]
    runtime = SmallDevice(weight_bytes(model) - sum(blocks) + max(blocks), on_check=check)
    with pytest.raises(StopError), placed(model, runtime, 0) as run_block:
        model(**tiny.inputs(model.config), run_block=run_block)
    modules_in = [module for kind, module in visits if kind == "in"]
    modules_out = [module for kind, module in visits if kind == "out"]
    assert sorted(map(id, modules_in)) == sorted(map(id, modules_out))


def test_visiting_tensors_are_put_back_as_the_same_objects():
    module = torch.nn.Linear(3, 3)
    before = {name: (p, p.data_ptr()) for name, p in module.named_parameters()}
    with memory.on_device(module, torch.device("cpu")):
        pass
    assert {name: (p, p.data_ptr()) for name, p in module.named_parameters()} == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_streamed_run_on_the_gpu_equals_the_resident_run():
    model = tiny.transformer()
    inputs = {k: v.cuda() for k, v in tiny.inputs(model.config).items()}
    rope = rope_table((3, 3, 5), model.config, device="cuda")
    pointers = [p.data_ptr() for p in model.parameters()]
    runtime = TorchRuntime("cuda")
    results = []
    for free in (10**9, 0):
        runtime.free_bytes = lambda free=free: (
            memory.RESERVE_BYTES
            + (free or max(map(weight_bytes, model.blocks)) + weight_bytes(model) // 2)
        )
        with torch.inference_mode(), placed(model, runtime, 0) as run_block:
            results.append(model(**inputs, rope=rope, run_block=run_block).cpu())
    assert torch.equal(*results)
    assert [p.data_ptr() for p in model.parameters()] == pointers
