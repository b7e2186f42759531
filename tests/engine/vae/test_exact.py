"""Exact decodes out of main memory: the decode in one pass, in the memory of a few pieces."""

import copy
from itertools import pairwise
from typing import ClassVar

import pytest
import torch
from comfyui_skyreels.skyreels.config import VAEConfig
from comfyui_skyreels.skyreels.errors import OutOfRoomError
from comfyui_skyreels.skyreels.runtime import TorchRuntime
from comfyui_skyreels.skyreels.vae import store as store_module
from comfyui_skyreels.skyreels.vae import tiling
from comfyui_skyreels.skyreels.vae.budget import MEMORY_MARGIN, exact_bytes, stored_bytes
from comfyui_skyreels.skyreels.vae.model import STORED_PIECE_ELEMENTS, VideoVAE
from comfyui_skyreels.skyreels.vae.store import HostMemory, HostStore
from comfyui_skyreels.skyreels.vae.tiling import (
    EXACT_LADDER,
    LADDER,
    DecodePlan,
    choose_decode,
    decode_frames,
    expected_decode,
    plan_bytes,
    plan_flop,
    plan_host_bytes,
)
from support import streams, tiny
from support.peak import PeakBytes
from torch.utils._python_dispatch import _disable_current_modes

pytestmark = pytest.mark.usefixtures("fast_convolutions")

CPU = torch.device("cpu")
NARROW = VAEConfig(block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4)
FULL_SIZE = torch.Size((1, 16, 25, 68, 120))  # 97 x 544 x 960


@pytest.fixture(scope="module")
def vae64():
    return tiny.randomize(VideoVAE(NARROW)).double()


def latents(frames, height, width):
    generator = torch.Generator().manual_seed(4)
    return torch.randn(1, 16, frames, height, width, generator=generator)


def plain(num_bytes):
    return torch.empty(num_bytes, dtype=torch.uint8)


def relative(value, reference):
    return ((value - reference).abs().max() / reference.abs().max()).item()


@pytest.mark.parametrize("size", [(1, 3, 2), (2, 2, 3), (5, 3, 2)])
@pytest.mark.parametrize("frames", [1, 2, 3])
def test_it_is_the_decode_in_one_pass(vae64, size, frames, monkeypatch):
    monkeypatch.setattr(store_module, "CHUNK_BYTES", 1024)  # pieces of several, none of them full
    vae_latents = latents(*size).double()
    pixels = 64 * size[1] * size[2]
    store = HostStore(CPU, plain)
    piece = frames * pixels * NARROW.block_out_channels[0]
    ours = torch.cat(list(vae64.iter_exact(vae_latents, store, piece)), 2)
    store.close()
    assert relative(ours, vae64.decode(vae_latents)) <= 1e-12
    assert store.num_bytes > 0


def test_main_memory_is_used_again_and_nothing_of_it_is_left_in_use(vae64):
    store = HostStore(CPU, plain)
    for _ in range(2):
        for piece in vae64.iter_exact(latents(3, 2, 2), store, 1):
            del piece
        used = store.num_bytes
        store.close()
        assert sum(chunk.nbytes for chunk in store._free) == used


class Stop(Exception):  # noqa: N818
    pass


def test_an_interrupt_stops_between_pieces_and_the_next_run_is_good(vae64, monkeypatch):
    vae, vae_latents = copy.deepcopy(vae64).float(), latents(3, 2, 2)
    monkeypatch.setattr(tiling, "EXACT_LADDER", EXACT_LADDER[1:])  # not in one pass
    calls, stop_at = [], []

    class Pinning(TorchRuntime):
        """Counts the pages that are locked."""

        locked = 0

        def pinnable_bytes(self):
            return 2**40

        def pin(self, memory):
            Pinning.locked += memory.nbytes

        def unpin(self, memory):
            Pinning.locked -= memory.nbytes

    def stop():
        calls.append(Pinning.locked)
        if stop_at and len(calls) == stop_at[-1]:
            raise Stop

    expected = decode_frames(vae, vae_latents, "exact", runtime=Pinning(on_check=stop))
    whole = decode_frames(vae, vae_latents, "full", runtime=TorchRuntime())
    assert (expected - whole).abs().max() <= 1e-5
    assert max(calls) > 0 and Pinning.locked == 0
    total = len(calls)
    for at in (1, total // 2, total):
        calls.clear()
        stop_at.append(at)
        with pytest.raises(Stop):
            decode_frames(vae, vae_latents, "exact", runtime=Pinning(on_check=stop))
        assert Pinning.locked == 0
        again = decode_frames(vae, vae_latents, "exact", runtime=Pinning())
        assert torch.equal(again, expected)


def test_memory_that_cannot_be_locked_is_used_all_the_same_and_said_once(caplog):
    class Refusing(TorchRuntime):
        pinned: ClassVar[list] = []

        def pinnable_bytes(self):
            return 2**40

        def pin(self, memory):
            if self.pinned:
                raise RuntimeError("no more than 0.0 GB may still be page-locked")
            self.pinned.append(memory)

        def unpin(self, memory):
            self.pinned.remove(memory)

    runtime = Refusing()
    memory = HostMemory(runtime)
    chunks = [memory.allocate(8192) for _ in range(3)]
    assert [chunk.data_ptr() % 4096 for chunk in chunks] == [0, 0, 0]
    assert len(runtime.pinned) == 1
    told = [r.getMessage() for r in caplog.records if "not page-locked" in r.getMessage()]
    assert len(told) <= 1  # once in a process
    memory.release()
    assert runtime.pinned == []


# --- what waits for what --------------------------------------------------------------------------


class Copies(streams.TimedCopies):
    """Copies that must not touch what others still read or write, on all streams."""

    def _copy(self, target, source):
        start, machine = self._stream.clock, self.machine
        assert start >= machine.written.get(source.data_ptr(), 0.0), "read before it is there"
        assert start >= machine.used.get(target.data_ptr(), 0.0), "overwritten while it is in use"
        target.copy_(source)
        self._stream.clock += target.nbytes / machine.bytes_per_s
        machine.written[target.data_ptr()] = self._stream.clock
        for tensor in (target, source):
            machine.used[tensor.data_ptr()] = max(
                self._stream.clock, machine.used.get(tensor.data_ptr(), 0.0)
            )
        machine.copied.append(target.nbytes)


@pytest.mark.parametrize("bytes_per_s", [1e4, 1e6])  # slower than the computation, and faster
@pytest.mark.parametrize("count", [1, 2, 7])
def test_no_memory_is_used_before_its_copy_ended_nor_overwritten_before_its_use(
    bytes_per_s, count, monkeypatch
):
    machine = streams.Machine(bytes_per_s).install(monkeypatch)
    machine.written, machine.used = {}, {}
    monkeypatch.setattr(store_module, "CHUNK_BYTES", 4096)
    store = HostStore(CPU, plain, lambda device: Copies(machine))

    def compute(piece):
        for part in store_module._bytes_of(piece).split(4096):
            address = part.data_ptr()
            assert machine.compute.clock >= machine.written.get(address, 0.0), "not there yet"
            assert machine.compute.clock >= machine.used.get(address, 0.0), "still being copied"
        machine.compute.clock += 0.5
        for part in store_module._bytes_of(piece).split(4096):
            machine.used[part.data_ptr()] = machine.compute.clock

    kept = []
    for index in range(count):
        piece = torch.full((1, 8, 2, 16, 16), float(index))
        piece = piece.contiguous(memory_format=torch.channels_last_3d)
        compute(piece)
        kept.append(store.put(piece))
        del piece
    for turn in range(3):
        residual, made = list(kept), []
        for index, piece in enumerate(store.take(kept)):
            compute(piece)
            assert (piece == index + turn).all()
            piece += 1
            made.append(store.put(piece))
            del piece
        del residual
        kept = made
    assert sum(machine.copied) == (4 + 3) * count * 8 * 2 * 16 * 16 * 4
    assert "a stream" not in machine.waits  # the host never waits for all copies
    store.close()


def test_the_next_piece_comes_while_one_is_worked_on(monkeypatch):
    """Copies of 0.4 s beside 0.5 s of work: only the first is waited for."""
    machine = streams.Machine(bytes_per_s=16384 / 0.4).install(monkeypatch)
    machine.written, machine.used = {}, {}
    store = HostStore(CPU, plain, lambda device: Copies(machine))
    kept = [store.put(torch.zeros(1, 8, 2, 16, 16)) for _ in range(8)]
    store.close()
    machine.stall = 0.0
    for piece in store.take(kept):
        machine.compute.clock += 0.5
        del piece
    assert machine.stall == pytest.approx(0.4)


# --- what it takes --------------------------------------------------------------------------------


def nothing(num_bytes):
    """Main memory that is not counted as the device's."""
    with _disable_current_modes():
        return torch.empty(num_bytes, dtype=torch.uint8, device="meta")


@pytest.fixture(scope="module")
def meta_vae():
    with torch.device("meta"):
        return VideoVAE(VAEConfig()).bfloat16()


@pytest.mark.parametrize(
    ("shape", "gib"), [(FULL_SIZE, 4), (torch.Size((1, 16, 9, 32, 32)), 4)], ids=str
)
def test_the_device_holds_a_few_pieces_and_the_estimates_cover_both_memories(meta_vae, shape, gib):
    """3.6 GB on the device and 26 GB in main memory at full size."""
    vae_latents = torch.empty(shape, device="meta", dtype=torch.bfloat16)
    store = HostStore(torch.device("meta"), nothing)
    with PeakBytes() as memory:
        for piece in meta_vae.iter_exact(vae_latents, store):
            del piece
    assert memory.peak <= gib * 2**30
    sizes = (meta_vae.config, shape, torch.bfloat16, STORED_PIECE_ELEMENTS)
    assert 1.2 * memory.peak <= exact_bytes(*sizes) <= 1.6 * memory.peak
    assert store.num_bytes <= stored_bytes(*sizes) <= 1.3 * store.num_bytes + 2**29


SIZES = [(9, 34, 60), (5, 68, 120), (13, 45, 80), (9, 32, 32), (5, 32, 32), (2, 68, 120)]


@pytest.fixture(scope="module")
def walked(meta_vae):
    """Peak and copied bytes of decodes in two sizes of pieces, counted on shape-only tensors."""
    counted = {}
    for size in SIZES:
        for plan in EXACT_LADDER[1:]:
            vae_latents = torch.empty(1, 16, *size, device="meta", dtype=torch.bfloat16)
            store = HostStore(torch.device("meta"), nothing, CountedCopies)
            with PeakBytes() as memory:
                for piece in meta_vae.iter_exact(vae_latents, store, plan.piece_elements):
                    del piece
            copied = sorted(copies.num_bytes for copies in (store._up, store._down))
            counted[size, plan] = memory.peak, copied
    return counted


class CountedCopies:
    """Copies of nothing, by their size."""

    def __init__(self, device):
        self.num_bytes = 0

    def bring(self, slot, parts):
        self.num_bytes += sum(source.nbytes for _, source in parts)

    def mark_used(self, slot):
        pass

    wait_for = hold = mark_used

    def close(self):
        pass


@pytest.mark.parametrize("plan", EXACT_LADDER[1:], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_predicted_peak_is_what_shapes_take(walked, size, plan):
    peak, _ = walked[size, plan]
    predicted = plan_bytes(plan, VAEConfig(), torch.Size((1, 16, *size)), torch.bfloat16)
    assert 0.95 <= predicted / MEMORY_MARGIN / peak <= 1.10


@pytest.mark.parametrize("plan", EXACT_LADDER[1:], ids=str)
def test_on_a_slow_link_it_takes_as_long_as_the_copies_on_a_fast_one_as_the_products(walked, plan):
    shape = torch.Size((1, 16, *SIZES[1]))
    _, (leaving, coming) = walked[SIZES[1], plan]

    def seconds(rate, link):
        rates = {"convolution": rate, "link": link}
        made = expected_decode(
            plan, 0, VAEConfig(), shape, torch.bfloat16, rates=rates, corrections={}
        )
        return made.seconds

    flop = plan_flop(plan, VAEConfig(), shape)
    assert seconds(1e12, 1e18) == pytest.approx(flop / 1e12, rel=1e-3)
    assert coming / 1e9 <= seconds(1e18, 1e9) <= (leaving + coming) / 1e9
    assert seconds(1e12, 1e9) >= max(flop / 1e12, coming / 1e9)
    assert seconds(1e12, 0.0) is None


def test_at_full_size_a_slow_link_decides_and_a_fast_one_does_not():
    """146 GB to main memory and 179 GB back, beside 663 TFLOP."""

    def seconds(link):
        rates = {"convolution": 198e12, "link": link}
        exact = DecodePlan("exact")
        sizes = (VAEConfig(), FULL_SIZE, torch.bfloat16)
        return expected_decode(exact, 0, *sizes, rates=rates, corrections={}).seconds

    assert seconds(53.5e9) == pytest.approx(4.7, rel=0.1)  # an H100
    # some layers bring more than they put away, others less
    assert 178.7 / 12 <= seconds(12e9) <= 1.25 * 178.7 / 12


def test_auto_never_takes_it_and_its_rungs_save_memory():
    assert not any(plan.mode == "exact" for plan in LADDER)
    names = list(map(str, EXACT_LADDER))
    assert names[:3] == ["full", "exact", "exact in 1/2 pieces"]
    shape = torch.Size((1, 16, 9, 32, 32))
    needed = [plan_bytes(plan, VAEConfig(), shape, torch.bfloat16) for plan in EXACT_LADDER]
    assert all(lower <= 0.9 * upper for upper, lower in pairwise(needed))


def test_what_fits_is_chosen_and_what_is_missing_is_said():
    config, dtype = VAEConfig(), torch.bfloat16
    exact = DecodePlan("exact")
    needed = plan_bytes(exact, config, FULL_SIZE, dtype)
    stored = plan_host_bytes(exact, config, FULL_SIZE, dtype)
    choose = choose_decode
    sizes = (config, FULL_SIZE)
    assert choose(*sizes, 80 * 2**30, dtype, "exact", host_bytes=0)[0] == DecodePlan("full")
    assert choose(*sizes, needed, dtype, "exact", host_bytes=stored)[0] == exact
    with pytest.raises(OutOfRoomError, match=r'2\d\.\d GB in main memory.*"synced"'):
        choose(*sizes, needed, dtype, "exact", host_bytes=stored - 1)
    with pytest.raises(OutOfRoomError, match="in one pass needs"):
        choose(*sizes, needed // 4, dtype, "exact", host_bytes=stored)
    with pytest.raises(OutOfRoomError, match="in one pass needs"):  # one memory for both
        choose(*sizes, needed, dtype, "exact")
