"""Weights are on a device only while they are used; their memory in whole pages."""

import os
import sys
from mmap import PAGESIZE

import pytest
import torch
from comfyui_skyreels.skyreels import runtime
from comfyui_skyreels.skyreels.runtime import TorchRuntime, offload
from support.forked import forks

GB = 1_000_000_000


def test_onloaded_tensors_are_put_back_as_the_same_objects():
    module = torch.nn.Linear(3, 3)
    before = {name: (p, p.data_ptr()) for name, p in module.named_parameters()}
    with offload.on_device(module, torch.device("cpu")):
        pass
    assert {name: (p, p.data_ptr()) for name, p in module.named_parameters()} == before


def test_modules_of_shapes_only_have_the_shapes_of_others_and_none_of_their_numbers():
    def build():
        return torch.nn.Sequential(
            torch.nn.Linear(3, 5), torch.nn.Conv3d(2, 4, 3), torch.nn.GroupNorm(2, 4)
        )

    with offload.shapes_only():
        module = build()
    expected = {name: (p.shape, p.dtype) for name, p in build().named_parameters()}
    assert {name: (p.shape, p.dtype) for name, p in module.named_parameters()} == expected
    assert all(p.is_meta for p in module.parameters())
    assert torch.empty(1).device.type == "cpu"


def test_whole_pages_are_those_that_hold_nothing_else():
    storage = torch.zeros(40 * PAGESIZE, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    cuts = torch.randint(0, len(storage), (12,), generator=generator).sort().values.tolist()
    cuts[3] = cuts[2] + 1  # a small one
    cuts[4] = cuts[3]  # one right after another
    tensors = [storage[a:b] for a, b in zip(cuts[::2], cuts[1::2], strict=True)]
    mine = bytearray(len(storage))
    for first, last in zip(cuts[::2], cuts[1::2], strict=True):
        mine[first:last] = b"1" * (last - first)
    pieces = offload.whole_pages([*tensors[::-1], torch.empty(0)])
    pages = [
        page
        for piece in pieces
        for page in range(piece.data_ptr(), piece.data_ptr() + piece.nbytes, PAGESIZE)
    ]
    start = storage.data_ptr()
    assert pages and pages == [
        page
        for page in range(-(-start // PAGESIZE) * PAGESIZE, start + len(storage), PAGESIZE)
        if bytes(mine[page - start : page - start + PAGESIZE]) == b"1" * PAGESIZE
    ]
    pieces[0][0] = 7
    assert storage[pieces[0].data_ptr() - start] == 7


class Driver:
    """Counts what is page-locked, and refuses at a limit."""

    def __init__(self, limit=2**40):
        self.limit, self.locked, self.launched = limit, {}, 0

    def cudaHostRegister(self, address, num_bytes, flags):
        if sum(self.locked.values()) + num_bytes > self.limit:
            return 2
        self.locked[address] = num_bytes
        return 0

    def cudaHostUnregister(self, address):
        return 0 if self.locked.pop(address, 0) else 713


@pytest.fixture
def driver(monkeypatch):
    driver = Driver()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)

    def check_error(code):
        raise RuntimeError(f"out of memory ({code})")

    zeros = torch.zeros

    def launch(*shape, device="cpu", **options):
        if device == "cuda":
            driver.launched += 1
            raise RuntimeError("CUDA error: out of memory")
        return zeros(*shape, **options)

    monkeypatch.setattr(torch.cuda, "check_error", check_error)
    monkeypatch.setattr(torch, "zeros", launch)
    return driver


@pytest.fixture
def gpu():
    runtime = TorchRuntime()
    runtime.device = torch.device("cuda:0")
    return runtime


def host_of(monkeypatch, **gigabytes):
    monkeypatch.setattr(
        runtime, "_host_bytes", lambda line, attribute: int(GB * gigabytes[attribute])
    )


@pytest.mark.parametrize(
    ("total", "limit"), [(128, 0.9 * 128 * GB), (32, 32 * GB - 4 * 1024**3), (3, 0)]
)
def test_a_share_of_main_memory_may_be_page_locked(gpu, monkeypatch, total, limit):
    monkeypatch.setattr(runtime, "PINNABLE_SHARE", 0.9)
    host_of(monkeypatch, total=total)
    assert gpu.pinnable_bytes() == pytest.approx(limit)
    assert TorchRuntime("cpu").pinnable_bytes() == 0


def test_what_is_page_locked_is_counted(gpu, driver, monkeypatch):
    host_of(monkeypatch, total=32, available=20)
    before, memory = gpu.pinnable_bytes(), torch.empty(4096, dtype=torch.uint8)
    gpu.pin(memory)
    assert driver.locked == {memory.data_ptr(): 4096}
    assert (gpu.pinnable_bytes(), gpu.pinned_bytes) == (before - 4096, 4096)
    gpu.unpin(memory)
    assert driver.locked == {}
    assert (gpu.pinnable_bytes(), gpu.pinned_bytes) == (before, 0)


@pytest.mark.parametrize(
    ("host", "limit", "reason"),
    [
        ({"total": 3, "available": 3}, 2**40, "no more than 0.0 GB may still be page-locked"),
        ({"total": 32, "available": 1.5}, 2**40, "only 1.5 GB of main memory are free"),
        ({"total": 32, "available": 20}, 4095, "out of memory"),
    ],
)
def test_too_little_memory_to_page_lock_is_an_error_with_the_reason(
    gpu, driver, monkeypatch, host, limit, reason
):
    host_of(monkeypatch, **host)
    driver.limit = limit
    with pytest.raises(RuntimeError, match=reason):
        gpu.pin(torch.empty(4096, dtype=torch.uint8))
    assert (driver.locked, gpu.pinned_bytes) == ({}, 0)


def test_an_error_that_was_handled_is_not_reported_by_the_next_kernel(driver):
    driver.limit = 0
    with pytest.raises(RuntimeError, match=r"out of memory \(2\)"):
        offload.page_lock(torch.empty(4096, dtype=torch.uint8))
    assert driver.launched == 1  # it took the error with it


#: what a system with 8 MB of page-lockable memory does; the driver's call is the system's own
LITTLE = """
import ctypes, os, resource
import torch
from comfyui_skyreels.skyreels import runtime
from types import SimpleNamespace

libc = ctypes.CDLL(None, use_errno=True)
register = lambda address, size, flags: libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(size))
unregister = lambda address: 0
torch.cuda.cudart = lambda: SimpleNamespace(
    cudaHostRegister=register, cudaHostUnregister=unregister
)
def check_error(code):
    if code:
        raise RuntimeError("CUDA error: out of memory")
def no_kernel(*shape, device):
    raise RuntimeError("CUDA error: out of memory")
torch.cuda.check_error = check_error
runtime._host_bytes = lambda line, attribute: 2**36
gpu = runtime.TorchRuntime()
gpu.device = torch.device("cuda:0")
pieces = [torch.zeros(2**20, dtype=torch.uint8) for _ in range(12)]
resource.setrlimit(resource.RLIMIT_MEMLOCK, (8_000_000, 8_000_000))
if os.getuid() == 0:
    os.setuid(65534)  # the limit is not for root
torch.zeros = no_kernel
refused = 0
for piece in pieces:
    try:
        gpu.pin(piece)
    except RuntimeError as error:
        assert "out of memory" in str(error)
        refused += 1
print(gpu.pinned_bytes, refused)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_with_8_mb_that_may_be_page_locked_no_more_is_and_the_rest_is_refused():
    run = forks("torch").run(["-c", LITTLE], {**os.environ})
    assert run.returncode == 0, run.stderr
    pinned, refused = map(int, run.stdout.split())
    assert 0 < pinned <= 8_000_000
    assert pinned + refused * 2**20 == 12 * 2**20
