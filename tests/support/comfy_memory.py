"""Run inside ComfyUI's own environment: our modules under its memory manager, on a made-up card.

    python comfy_memory.py CHECKOUT PACK FOLDER FLAGS...

FLAGS are sets of command-line options, "" for none; each is tried in a process of its own. The last
line of the output is one JSON object: flags -> what was found. Tensors have shapes and a device and
no numbers, so models are as large as real ones, and nothing is computed.
"""

import gc
import importlib
import json
import logging
import os
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

GIB = 2**30
DEVICE = torch.device("cuda:0")


class Card:
    """A GPU that has a size and holds the weights that were moved to it."""

    def __init__(self) -> None:
        self.total, self.taken_by_others = 24 * GIB, 0
        self.modules: list[weakref.ref[nn.Module]] = []
        #: address -> bytes of page-locked memory
        self.locked: dict[int, int] = {}

    def used(self) -> int:
        alive = [module for each in self.modules if (module := each()) is not None]
        return sum(map(resident, alive))

    def install(self) -> None:
        """Let torch report this card."""
        cuda: Any = torch.cuda
        cuda.current_device, cuda.device_count = lambda: 0, lambda: 1
        cuda.memory_stats = lambda device=None: dict.fromkeys(
            ("reserved_bytes.all.current", "active_bytes.all.current"), self.used()
        )
        cuda.mem_get_info = lambda device=None: (
            self.total - self.used() - self.taken_by_others,
            self.total,
        )
        cuda.get_device_properties = lambda device=None: SimpleNamespace(
            name="card", major=8, minor=9, total_memory=self.total, gcnArchName=""
        )
        cuda.get_device_name = lambda device=None: "card"
        cuda.synchronize = lambda device=None: None
        cuda.cudart = lambda: SimpleNamespace(
            cudaHostRegister=self.lock, cudaHostUnregister=self.unlock
        )

    def lock(self, address: int, num_bytes: int, flags: int) -> int:
        self.locked[address] = num_bytes
        return 0

    def unlock(self, address: int) -> int:
        del self.locked[address]
        return 0


def resident(module: nn.Module) -> int:
    """Bytes of a module on the card."""
    return sum(tensor.nbytes for tensor in module.parameters() if tensor.device == DEVICE)


def blocks(gigabytes: float) -> nn.Module:
    """A module of 128 MiB a layer."""
    layers = [
        nn.Linear(8192, 8192, bias=False, dtype=torch.bfloat16) for _ in range(int(gigabytes * 8))
    ]
    module = nn.Sequential(*layers).requires_grad_(False)
    card.modules.append(weakref.ref(module))
    return module


card = Card()


class Case:
    """Our modules and others' on one card."""

    def __init__(self, gigabytes: float) -> None:
        from comfyui_skyreels.nodes import host

        self.host = host
        card.total, card.taken_by_others, card.modules = int(gigabytes * GIB), 0, []
        mm.current_loaded_models.clear()

    def ours(self, gigabytes: float, name: str = "ours") -> Any:
        return self.host.register(blocks(gigabytes), name, self.host.ComfyRuntime())

    def others(self, gigabytes: float, *, is_dynamic: bool = False) -> Any:
        """A patcher of a core node; a dynamic one gives way by itself for its like."""
        made = patcher.ModelPatcher(blocks(gigabytes), DEVICE, torch.device("cpu"))
        if is_dynamic:
            made.is_dynamic = lambda: True
            made.model.dynamic_pins = {DEVICE: {"active": False, "current_prompt": False}}
        return made

    def runtime(self, *models: Any) -> Any:
        return self.host.ComfyRuntime(None, *models)


def a_model_that_has_room_once_others_leave() -> dict[str, Any]:
    """6 GiB of another model, 8 of ours and 2 of activations, on 12."""
    case = Case(12)
    ours, other = case.ours(8), case.others(6)
    mm.load_models_gpu([other])
    runtime = case.runtime(ours)
    with runtime.place(ours.module, 2 * GIB):
        inside = resident(ours.module)
        room = card.total - card.used() - mm.extra_reserved_memory()
    mm.load_models_gpu([other], memory_required=5 * GIB)
    back = resident(other.model)
    given = inside - resident(ours.module)
    with runtime.place(ours.module, 2 * GIB):
        again = resident(ours.module)
    return {"resident": inside, "room": room, "other": back, "given": given, "again": again}


def a_dynamic_model_that_loads() -> dict[str, Any]:
    case = Case(12)
    ours, other = case.ours(8), case.others(6, is_dynamic=True)
    with case.runtime(ours).place(ours.module, GIB):
        before = resident(ours.module)
    if hasattr(other, "loaded_ram_size"):
        mm.load_models_gpu([other], memory_required=4 * GIB)
    else:  # this version has none
        mm.free_memory(11 * GIB, DEVICE)
    return {"before": before, "after": resident(ours.module)}


def a_host_that_asks_for_memory() -> dict[str, Any]:
    """Also with what the current version asks for: for a dynamic model, pins and RAM."""
    case = Case(12)
    ours = case.ours(8)
    with case.runtime(ours).place(ours.module, GIB):
        pass
    asked = {} if not hasattr(mm, "MAX_PINNED_MEMORY") else {
        "for_dynamic": True, "pins_required": GIB, "ram_required": GIB}  # fmt: skip
    mm.free_memory(10 * GIB, DEVICE, **asked)
    return {"free": mm.get_free_memory(DEVICE), "left": resident(ours.module)}


def a_model_that_does_not_fit() -> dict[str, Any]:
    case = Case(8)
    ours, other = case.ours(8), case.others(3)
    mm.load_models_gpu([other])
    runtime = case.runtime(ours)
    with runtime.place(ours.module, 2 * GIB):
        return {"used": card.used(), "free": runtime.free_bytes()}


def a_run_after_text_encoder_and_vae(gigabytes: float) -> dict[str, Any]:
    """4 GiB of text encoder and 1 of VAE are there when 8 are to sample beside 3 of activations."""
    case = Case(gigabytes)
    ours, vae, text = case.ours(8), case.ours(1, "vae"), case.others(4)
    mm.load_models_gpu([text])
    with case.runtime(vae).place(vae.module, GIB):
        pass
    runtime = case.runtime(ours)
    with runtime.place(ours.module, 3 * GIB):
        sampling = resident(ours.module)
        beside = resident(vae.module) + resident(text.model)
        room = runtime.free_bytes()
    with case.runtime(vae).place(vae.module, GIB):
        decoding = resident(vae.module)
    return {"sampling": sampling, "beside": beside, "room": room, "decoding": decoding}


def ten_runs_that_alternate() -> dict[str, Any]:
    case = Case(12)
    ours, other = case.ours(8), case.others(6)
    used = []
    for _ in range(10):
        with case.runtime(ours).place(ours.module, 2 * GIB):
            pass
        mm.load_models_gpu([other], memory_required=GIB)
        used.append(card.used())
    mm.unload_all_models()  # as at the end of a prompt with --disable-smart-memory
    return {"used": used, "after": card.used()}


def a_card_that_shrinks_while_we_load() -> dict[str, Any]:
    """Another program takes what was free a moment ago: the load fails, and the run goes on."""
    case = Case(12)
    ours = case.ours(8)
    runtime = case.runtime(ours)
    load = ours.patcher.load

    def fail(*args: Any, **kwargs: Any) -> None:
        load(*args, **kwargs)
        card.taken_by_others = 6 * GIB
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 128.00 MiB.")

    ours.patcher.load = fail
    with runtime.place(ours.module, 2 * GIB):
        inside = card.used()
    ours.patcher.load, card.taken_by_others = load, 0
    with runtime.place(ours.module, 2 * GIB):
        again = resident(ours.module)
    return {"inside": inside, "again": again}


def models_that_are_let_go() -> dict[str, Any]:
    """As with --cache-none: the outputs of a node are dropped when its prompt ends."""
    case = Case(24)
    ours, leaked = case.ours(8), case.ours(2, "leaked")
    runtime = case.runtime(ours, leaked)
    for model in (ours, leaked):
        with runtime.place(model.module, GIB):
            pass
    module = leaked.module  # somebody kept the module, and not its patcher
    del ours, leaked, model, runtime
    gc.collect()
    reclaimable = case.runtime().reclaimable_bytes()
    left = card.used()
    del module
    gc.collect()
    mm.cleanup_models()
    return {"reclaimable": reclaimable, "kept": left, "used": card.used(),
            "listed": len(mm.current_loaded_models)}  # fmt: skip


def memory_that_is_page_locked(runtime: Any) -> dict[str, Any]:
    memory = torch.empty(16 * 4096, dtype=torch.uint8)
    before = runtime.pinnable_bytes()
    found: dict[str, Any] = {"before": before, "total": getattr(mm, "TOTAL_PINNED_MEMORY", None)}
    if before:
        runtime.pin(memory)
        found |= {"taken": before - runtime.pinnable_bytes(), "locked": sum(card.locked.values())}
        if found["total"] is not None:
            found["counted"] = mm.TOTAL_PINNED_MEMORY - found["total"]
        runtime.unpin(memory)
        found["after"] = runtime.pinnable_bytes()
    else:
        try:
            runtime.pin(memory)
        except RuntimeError as error:
            found["refused"] = str(error)
    return found


def everything() -> dict[str, Any]:
    found: dict[str, Any] = {
        "state": mm.vram_state.name,
        "reserved": int(mm.extra_reserved_memory()),
        "smart": not mm.DISABLE_SMART_MEMORY,
    }
    with FakeTensorMode(allow_non_fake_inputs=True):
        found |= {
            "room": a_model_that_has_room_once_others_leave(),
            "dynamic": a_dynamic_model_that_loads(),
            "asked": a_host_that_asks_for_memory(),
            "streamed": a_model_that_does_not_fit(),
            "small": a_run_after_text_encoder_and_vae(12.5),
            "large": a_run_after_text_encoder_and_vae(24),
            "ten": ten_runs_that_alternate(),
            "shrinks": a_card_that_shrinks_while_we_load(),
            "let go": models_that_are_let_go(),
        }
        runtime = Case(12).runtime()
        found["free"] = runtime.free_bytes()
    found["pins"] = memory_that_is_page_locked(runtime)  # of real memory
    return found


def in_a_process(flags: str) -> dict[str, Any]:
    """What is found with these options of ComfyUI; its memory manager reads them when it loads."""
    reader, writer = os.pipe()
    if (process := os.fork()) == 0:
        try:
            os.close(reader)
            vars(cli_args.args).update(vars(cli_args.parser.parse_args(flags.split())))
            importlib.reload(mm)
            with os.fdopen(writer, "w") as file:
                json.dump(everything(), file)
            os._exit(0)
        except BaseException:
            logging.exception("with %s", flags)
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader) as file:
        text = file.read()
    _, status = os.waitpid(process, 0)
    if status:
        sys.exit(f"failed with {flags!r}")
    return json.loads(text)


if __name__ == "__main__":
    checkout, pack, base = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    flag_sets = sys.argv[4:]
    sys.argv = [sys.argv[0]]
    sys.path.insert(0, checkout)
    sys.path.append(str(pack / "tests"))  # behind ComfyUI's own `tests`
    card.install()
    import comfyui_skyreels  # noqa: F401
    import folder_paths
    from comfy import cli_args
    from comfy import model_management as mm
    from comfy import model_patcher as patcher

    folder_paths.set_user_directory(base)
    print(json.dumps({flags: in_a_process(flags) for flags in flag_sets}))  # noqa: T201
