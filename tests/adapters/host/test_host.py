"""The adapter to ComfyUI: memory manager, status line, files that stay behind."""

import os
import time
from types import SimpleNamespace

import pytest
import torch
from comfyui_skyreels.nodes import host
from comfyui_skyreels.nodes.host import runtime as runtime_module
from comfyui_skyreels.skyreels.errors import OptionError
from comfyui_skyreels.skyreels.runtime import offload
from comfyui_skyreels.skyreels.runtime.offload import RESERVE_BYTES, weight_bytes
from comfyui_skyreels.skyreels.transformer import placement
from comfyui_skyreels.skyreels.transformer.placement import placed
from support import tiny
from support.host import NamedPatcher

GIB = 1024**3


@pytest.fixture
def model() -> host.LoadedModel:
    return host.LoadedModel(tiny.transformer(), NamedPatcher("our patcher"), "tiny.safetensors")


@pytest.fixture
def on_gpu(comfy, model):
    """A runtime that says it computes on a GPU; its weights are on the CPU, none are moved."""
    runtime = host.ComfyRuntime("1", model)
    runtime.device = torch.device("cuda:0")
    return runtime


def test_a_model_that_fits_is_loaded_by_comfyuis_memory_manager(comfy, on_gpu, model):
    with on_gpu.place(model.module, GIB):
        assert comfy.loaded == ["our patcher"]
    assert comfy.loads == [{"memory_required": GIB, "force_full_load": True}]
    assert comfy.asked[0][0] == weight_bytes(model.module) + GIB + RESERVE_BYTES


def test_a_model_that_does_not_fit_leaves_with_all_others_so_that_it_can_be_streamed(
    comfy, on_gpu, model, caplog
):
    comfy.loaded.append("somebody else's")
    comfy.free_bytes = GIB
    with caplog.at_level("INFO"), on_gpu.place(model.module, GIB):
        assert comfy.loaded == []
    assert "tiny.safetensors" in caplog.text
    assert "do not fit the card together" in caplog.text


def test_making_room_never_unloads_the_model_of_the_run(comfy, on_gpu, model):
    with on_gpu.place(model.module, 0):
        on_gpu.make_room(5 * GIB)
    assert comfy.asked[-1] == (5 * GIB, ["our patcher"])


def test_after_the_run_its_model_may_be_unloaded_even_if_the_run_failed(comfy, on_gpu, model):
    with pytest.raises(RuntimeError), on_gpu.place(model.module, 0):
        raise RuntimeError
    on_gpu.make_room(5 * GIB)
    assert comfy.asked[-1] == (5 * GIB, [])


def test_a_module_that_comfyui_does_not_manage_gets_room_and_nothing_is_loaded(comfy, on_gpu):
    other = tiny.transformer()
    with on_gpu.place(other, GIB):
        assert comfy.loaded == []
    assert comfy.asked == [(weight_bytes(other) + GIB + RESERVE_BYTES, [])]


def test_models_are_registered_with_their_devices(comfy):
    runtime = host.ComfyRuntime()
    module = tiny.transformer()
    patcher = host.register(module, "x", runtime).patcher
    assert patcher.model is module
    assert (patcher.load_device, patcher.offload_device) == (runtime.device, runtime.offload_device)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("load", 6_600_000_000, 13_200_000_000, 0), "loading 6.6 of 13.2 GB"),
        (("load", 13_200_000_000, 13_200_000_000, 0), "loaded 13.2 GB"),
        (("load", 1_000_000, 2_200_000, 0), "loading 1.0 of 2.2 MB"),
        (("encode", 0, 1, 0), "encoding"),
        (("encode", 1, 1, 0), "encoded"),
        (("sample", 0, 30, 0), "step 0/30"),
        (("sample", 12, 30, 3.4), "step 12/30 · 3.4 s/step · about 61 s left"),
        (("sample", 12, 30, 0.04), "step 12/30 · 0.04 s/step · about 1 s left"),
        (("sample", 12, 30, 34.0), "step 12/30 · 34.0 s/step · about 10 min left"),
        (("sample", 30, 30, 3.4), "step 30/30"),
        (("decode", 3, 15, 2.0), "tile 3/15 · 2.0 s/tile · about 24 s left"),
    ],
)
def test_the_status_line_says_where_it_is_and_how_long_it_takes(arguments, line):
    assert host.status_line(*arguments) == line


def test_a_server_that_is_not_there_is_no_obstacle(comfy, monkeypatch):
    import sys

    runtime = host.ComfyRuntime("1")
    monkeypatch.setitem(sys.modules, "server", None)
    runtime.progress("sample", 1, 2)
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace()))
    runtime.progress("sample", 2, 2)
    assert comfy.progress == [(1, 2), (2, 2)]


def test_saved_steps_nobody_came_back_for_are_removed(comfy):
    folder = host.resume_folder()
    old, new = folder / "old.safetensors", folder / "new.safetensors"
    for file in (old, new):
        file.touch()
    os.utime(old, (0, time.time() - 8 * 86_400))
    assert host.resume_folder() == folder
    assert not old.exists()
    assert new.exists()
    assert folder.parent.name == "__skyreels"  # ComfyUI serves no such folder


@pytest.mark.parametrize("spare", [0, 1, 99_999, 100_000, 100_001])
def test_a_model_near_the_limit_runs_whole_or_streamed(comfy, on_gpu, model, monkeypatch, spare):
    """Free memory is what the device has, less the weights that are there, as on a real one."""
    for module in (placement, host.runtime):
        monkeypatch.setattr(module, "RESERVE_BYTES", 100_000)  # in proportion to a tiny model
    whole, activations = weight_bytes(model.module), 10_000_000
    inside: set[int] = set()
    comfy.free_bytes = whole + activations + spare

    def missing(tensors, device):
        return sum(tensor.nbytes for tensor in tensors if id(tensor) not in inside)

    def visit(tensors, device):
        mine = [tensor for tensor in tensors if id(tensor) not in inside]
        inside.update(map(id, mine))
        comfy.free_bytes -= sum(tensor.nbytes for tensor in mine)
        assert comfy.free_bytes >= 0

        def leave():
            inside.difference_update(map(id, mine))
            comfy.free_bytes += sum(tensor.nbytes for tensor in mine)

        return leave

    for module in (offload, placement):
        monkeypatch.setattr(module, "onload_bytes", missing)
    monkeypatch.setattr(placement, "onload", visit)
    with on_gpu.place(model.module, activations):
        if comfy.loaded:
            visit([*model.module.parameters()], on_gpu.device)
        with placed(model.module, on_gpu, activations) as run_block:
            model.module(**tiny.inputs(model.module.config), run_block=run_block)


@pytest.fixture
def driver(monkeypatch):
    """The CUDA driver's list of page-locked memory: address -> bytes."""
    locked: dict[int, int] = {}

    def register(address, num_bytes, flags):
        locked[address] = num_bytes
        return 0

    def unregister(address):
        del locked[address]
        return 0

    cudart = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=unregister)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    return locked


@pytest.fixture
def budget(comfy, monkeypatch, driver):
    """The pinned-memory budget of ComfyUI 0.33, beside another model's pins."""
    import sys

    management = sys.modules["comfy.model_management"]
    spare = [0]  # what other models would give up

    def pin_memory(tensor):
        torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 1)
        management.TOTAL_PINNED_MEMORY += tensor.nbytes
        return True

    def unpin_memory(tensor):
        torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())
        management.TOTAL_PINNED_MEMORY -= tensor.nbytes
        return True

    def ensure_pin_registerable(size, evict_active=True):
        shortfall = management.TOTAL_PINNED_MEMORY + size - management.MAX_PINNED_MEMORY
        freed = min(max(0, shortfall), spare[0])
        spare[0] -= freed
        management.TOTAL_PINNED_MEMORY -= freed
        return freed >= shortfall

    for function in (pin_memory, unpin_memory, ensure_pin_registerable):
        monkeypatch.setattr(management, function.__name__, function, raising=False)
    monkeypatch.setattr(management, "MAX_PINNED_MEMORY", 100 * 4096.0, raising=False)
    monkeypatch.setattr(management, "TOTAL_PINNED_MEMORY", 60 * 4096, raising=False)
    return SimpleNamespace(management=management, spare=spare)


def test_what_is_page_locked_counts_against_comfyuis_own_limit(on_gpu, budget, driver):
    memory = torch.empty(30 * 4096, dtype=torch.uint8)
    assert on_gpu.pinnable_bytes() == 40 * 4096
    on_gpu.pin(memory)
    assert budget.management.TOTAL_PINNED_MEMORY == 90 * 4096
    assert on_gpu.pinnable_bytes() == 10 * 4096
    with pytest.raises(RuntimeError, match="no more than 0.0 GB may still be page-locked"):
        on_gpu.pin(torch.empty(11 * 4096, dtype=torch.uint8))
    assert driver == {memory.data_ptr(): memory.nbytes}
    on_gpu.unpin(memory)
    assert budget.management.TOTAL_PINNED_MEMORY == 60 * 4096
    assert driver == {}


def test_other_models_give_up_pinned_memory_that_they_do_not_use(on_gpu, budget):
    budget.spare[0] = 20 * 4096
    on_gpu.pin(torch.empty(50 * 4096, dtype=torch.uint8))
    assert budget.management.TOTAL_PINNED_MEMORY == 100 * 4096


def test_nothing_is_page_locked_if_comfyui_was_told_so(on_gpu, budget, driver):
    budget.management.MAX_PINNED_MEMORY = -1
    assert on_gpu.pinnable_bytes() == 0
    with pytest.raises(RuntimeError, match="--disable-pinned-memory"):
        on_gpu.pin(torch.empty(4096, dtype=torch.uint8))
    assert driver == {}


def test_a_comfyui_that_cannot_pin_a_piece_is_not_taken_to_have(on_gpu, budget, monkeypatch):
    monkeypatch.setattr(budget.management, "pin_memory", lambda tensor: False)
    with pytest.raises(RuntimeError, match="could not pin"):
        on_gpu.pin(torch.empty(4096, dtype=torch.uint8))


def test_where_comfyui_has_no_such_budget_a_share_of_main_memory_is_used(on_gpu, driver):
    before = on_gpu.pinnable_bytes()
    memory = torch.empty(4096, dtype=torch.uint8)
    on_gpu.pin(memory)
    assert on_gpu.pinnable_bytes() == before - 4096
    assert driver == {memory.data_ptr(): 4096}
    on_gpu.unpin(memory)
    assert driver == {}
    assert on_gpu.pinnable_bytes() == before


def test_reserved_memory_is_not_counted_as_free(comfy):
    comfy.reserved_bytes = GIB
    assert host.ComfyRuntime().free_bytes() == comfy.free_bytes - GIB


def test_a_device_that_does_not_report_its_memory_is_tried(comfy):
    runtime = host.ComfyRuntime()
    runtime.device = SimpleNamespace(type="privateuseone")
    assert runtime.free_bytes() > 1000 * GIB


def test_highvram_does_not_make_the_card_the_resting_place(comfy, monkeypatch):
    import sys

    management = sys.modules["comfy.model_management"]
    monkeypatch.setattr(management, "unet_offload_device", lambda: torch.device("cuda:0"))
    assert host.ComfyRuntime().offload_device == torch.device("cpu")


def test_an_unreadable_model_folder_does_not_take_the_node_away(comfy, monkeypatch, caplog):
    def refuse(root):
        raise PermissionError(13, "Permission denied", root)

    monkeypatch.setattr(os, "scandir", refuse)
    assert host.model_folders(("diffusers",), "config.json") == {}
    assert "Permission denied" in caplog.text


def test_room_is_made_for_what_is_reserved_too_or_a_model_that_fits_would_be_streamed(
    comfy, on_gpu, model
):
    comfy.reserved_bytes = GIB
    on_gpu.make_room(5 * GIB)
    assert comfy.asked[-1] == (6 * GIB, [])


def test_a_load_that_runs_out_of_memory_is_streamed_instead(comfy, on_gpu, model, monkeypatch):
    def fail(models, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(on_gpu._mm, "load_models_gpu", fail)
    comfy.loaded.append("somebody else's")
    with on_gpu.place(model.module, GIB):
        assert comfy.loaded == []


def test_any_other_error_of_a_load_is_raised(comfy, on_gpu, model, monkeypatch):
    def fail(models, **options):
        raise RuntimeError("CUDA error: misaligned address")

    monkeypatch.setattr(on_gpu._mm, "load_models_gpu", fail)
    with pytest.raises(RuntimeError, match="misaligned"), on_gpu.place(model.module, GIB):
        pass


def test_a_loaded_model_whose_handle_is_gone_gives_nothing_back(comfy):
    runtime = host.ComfyRuntime()
    comfy.others.append(SimpleNamespace(device=runtime.device, model=None))
    assert runtime.reclaimable_bytes() == 0


# --- the console and the node -------------------------------------------------------------------


def test_the_console_has_one_line_for_all_steps_of_a_run(comfy, capsys):
    runtime = host.ComfyRuntime(unique_id="1")
    with runtime.place(tiny.transformer(), 0):
        for done in range(4):
            runtime.progress("load", done, 3)
            runtime.progress("sample", done, 3)
    assert "3/3" in capsys.readouterr().err
    for done in (0, 1, 2, 0, 1):  # the last try is another run
        runtime.progress("sample", done, 3)
    lines = capsys.readouterr().err
    assert lines.count("\n") == 1
    assert "100%" not in lines


def test_the_console_stays_quiet_where_core_keeps_its_own_bars_off(comfy, capsys, monkeypatch):
    import comfy.utils

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_ENABLED", False, raising=False)
    host.ComfyRuntime(unique_id="1").progress("sample", 1, 3)
    assert capsys.readouterr().err == ""


def test_a_line_that_is_on_the_node_already_is_not_sent_again(comfy):
    runtime = host.ComfyRuntime(unique_id="1")
    for done in (1, 2, 3):
        runtime.progress("load", done, 200_000_000)
    assert comfy.texts == ["loading 0.0 of 0.2 GB"]
    runtime.note("Something to know.")
    runtime.progress("sample", 3, 3)
    assert comfy.texts[1:] == [
        "loading 0.0 of 0.2 GB\nSomething to know.", "step 3/3\nSomething to know.",
    ]  # fmt: skip


# --- a second device ------------------------------------------------------------------------------


@pytest.fixture
def cards(monkeypatch):
    """Three cards; a runtime on one of them is its device."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(runtime_module, "ComfyRuntime", lambda *, device: device)


@pytest.mark.parametrize(
    ("name", "chosen"),
    [("off", None), ("auto", "cuda:1"), ("cuda:1", "cuda:1"), ("cuda:2", "cuda:2")],
)
def test_a_second_device_is_another_card(on_gpu, cards, name, chosen):
    found = host.second_runtime(name, on_gpu)
    assert found == (None if chosen is None else torch.device(chosen))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cuda:0", "cuda:0 is the card that samples already: choose another one, or off"),
        ("cuda:3", r"cuda:3 is not here \(cuda:1, cuda:2\): choose auto"),
    ],
)
def test_a_second_device_that_is_none_is_refused(on_gpu, cards, name, words):
    with pytest.raises(OptionError, match=words):
        host.second_runtime(name, on_gpu)


def test_where_there_is_no_second_card_auto_says_so_and_takes_one(comfy, on_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert host.second_runtime("auto", on_gpu) is None
    assert "beside cuda:0 there is no other CUDA card" in comfy.texts[-1]
    with pytest.raises(OptionError, match=r"cuda:1 is not here \(no other CUDA card\)"):
        host.second_runtime("cuda:1", on_gpu)
