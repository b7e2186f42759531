"""The one seam between the engine and whatever hosts it.

The engine never asks which program it runs in: it is handed a Runtime, places work on its device,
reports progress to it and gives it a chance to stop. ComfyUI's version lives in nodes/host.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from ..errors import OptionError
from .offload import missing_bytes, page_lock, page_unlock

if TYPE_CHECKING:
    from .collectives import Ranks

#: if neither Linux nor psutil reports it (the extra "standalone" brings psutil)
ASSUMED_HOST_BYTES = 16 * 1024**3
#: of a stage that is reported in parts, beside the first
REPORTS = 40
#: of main memory that may be page-locked; Windows refuses about half
PINNABLE_SHARE = 0.4 if sys.platform == "win32" else 0.9
#: of main memory never page-locked by us, and free at least while we do
UNPINNED_BYTES, FREE_HOST_BYTES = 4 * 1024**3, 2 * 1024**3


class Runtime(Protocol):
    """What the engine needs from its host."""

    device: torch.device
    """Where compute runs."""
    offload_device: torch.device
    """Where idle weights rest."""
    state_folder: Path | None
    """Where runs leave what they learned about the device (outcomes.py beside); None: nowhere."""
    partner: "Runtime | None"
    """A second device, for the negative predictions of guidance (sampling/pair.py); or None. Its
    interrupt is asked for in a thread of its own."""
    ranks: "Ranks | None"
    """Processes that make the clip together, this one among them: they share predictions
    (transformer/ulysses.py) and the decode (vae/strips.py); or None."""

    def free_bytes(self) -> int:
        """Bytes that can be allocated on `device` right now."""
        ...

    def make_room(self, num_bytes: int) -> None:
        """Ask other models to leave `device` until num_bytes are free; may do nothing."""
        ...

    def place(self, module: nn.Module, activation_bytes: int) -> AbstractContextManager[None]:
        """Prepare `device` for a run of a module, and keep it so inside the block.

        There is room for the weights that are missing there and for activation_bytes, as far as the
        host can make it. A host with a memory manager loads the module through it if both fit;
        weights still missing inside the block are streamed by the engine.
        """
        ...

    def stream(self, module: nn.Module) -> None:
        """Take a module that was placed off `device`: it does not fit whole after all.

        Called inside of `place`; the engine then brings what it needs.
        """
        ...

    def pinnable_bytes(self) -> int:
        """Bytes of main memory that `pin` may still page-lock; 0 where it never does."""
        ...

    def pin(self, memory: Tensor) -> None:
        """Page-lock memory where it lies, so that copies to `device` run beside the computation.

        What the host itself has page-locked counts against the same limit.

        Args:
            memory: from `offload.whole_pages`.

        Raises:
            RuntimeError: the limit is reached, or the system refuses; the message says why.
        """
        ...

    def unpin(self, memory: Tensor) -> None:
        """Undo `pin`; no copy from this memory may be under way."""
        ...

    def progress(self, stage: str, done: int, total: int, preview: Tensor | None = None) -> None:
        """Report that `done` of `total` units of a stage are finished.

        Args:
            stage: "load", "encode", "sample" or "decode".
            done: units finished so far.
            total: units of the stage.
            preview: [1, 16, T, h, w] denoised estimate in model space, in the "sample" stage only.
        """
        ...

    def note(self, text: str) -> None:
        """Show a sentence where the run is shown, until it ends; the log has it already."""
        ...

    def check_interrupt(self) -> None:
        """Raise the host's own exception if the user asked to stop.

        Called between blocks, tiles and weight loads.
        """
        ...


def in_parts(runtime: Runtime, stage: str, total: int) -> Callable[[int], None]:
    """Reports of a stage of very many units, such as bytes, at most REPORTS + 1 of them.

    Args:
        runtime: that is told; of 0 at once.
        stage: its name.
        total: units.

    Returns:
        report(done), to be called after every part.
    """
    runtime.progress(stage, 0, total)
    told = 0

    def report(done: int) -> None:
        nonlocal told
        if done >= total or (done - told) * REPORTS >= total:
            told = done
            runtime.progress(stage, done, total)

    return report


def ignore_progress(stage: str, done: int, total: int, preview: Tensor | None = None) -> None:
    """Take a progress report and do nothing with it."""


def never_interrupt() -> None:
    """The interrupt check of a host that cannot be interrupted."""


class TorchRuntime:
    """A Runtime over plain torch, for the command line, library users and tests."""

    def __init__(
        self,
        device: str | torch.device = "cpu",
        *,
        on_progress: Callable[[str, int, int, Tensor | None], None] = ignore_progress,
        on_check: Callable[[], None] = never_interrupt,
        state_folder: Path | None = None,
        partner: Runtime | None = None,
        ranks: "Ranks | None" = None,
    ) -> None:
        # as tensors name it: "cuda" becomes "cuda:0"
        try:
            self.device = torch.empty(0, device=device).device
        except (RuntimeError, AssertionError) as error:  # the latter of builds without the device
            reason = str(error).partition("\n")[0].partition(". ")[0]
            raise OptionError(
                f"Device {str(device)!r} cannot be used ({reason}): use cpu."
            ) from error
        self.offload_device = torch.device("cpu")
        self.state_folder = state_folder
        self.partner, self.ranks = partner, ranks
        #: page-locked by `pin`
        self.pinned_bytes = 0
        self._on_progress = on_progress
        self._on_check = on_check

    def free_bytes(self) -> int:
        """Free device memory, including what torch has cached but does not use."""
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            cached = torch.cuda.memory_reserved(self.device)
            return free + cached - torch.cuda.memory_allocated(self.device)
        return free_host_bytes()

    def make_room(self, num_bytes: int) -> None:
        """Give torch's cached blocks back to the driver if they are needed."""
        if self.device.type == "cuda" and torch.cuda.mem_get_info(self.device)[0] < num_bytes:
            torch.cuda.empty_cache()

    @contextmanager
    def place(self, module: nn.Module, activation_bytes: int) -> Iterator[None]:
        """Make room for a module and its activations; nothing moves."""
        self.make_room(missing_bytes(module, self.device) + activation_bytes)
        yield

    def stream(self, module: nn.Module) -> None:
        """Do nothing: `place` has moved nothing."""

    def pinnable_bytes(self) -> int:
        """A share of main memory, less what is page-locked already."""
        return max(0, pinnable_limit(self.device) - self.pinned_bytes)

    def pin(self, memory: Tensor) -> None:
        """Page-lock memory through the CUDA driver."""
        check_pinnable(memory.nbytes, self.pinnable_bytes())
        page_lock(memory)
        self.pinned_bytes += memory.nbytes

    def unpin(self, memory: Tensor) -> None:
        """Undo `pin`."""
        page_unlock(memory)
        self.pinned_bytes -= memory.nbytes

    def progress(self, stage: str, done: int, total: int, preview: Tensor | None = None) -> None:
        """Hand the report to the callback given at construction."""
        self._on_progress(stage, done, total, preview)

    def note(self, text: str) -> None:
        """Do nothing: the log is all that there is."""

    def check_interrupt(self) -> None:
        """Hand the check to the callback given at construction."""
        self._on_check()


def pinnable_limit(device: torch.device) -> int:
    """Bytes of main memory that may be page-locked for a device; 0 where it gains nothing."""
    if device.type != "cuda":
        return 0
    total = _host_bytes("MemTotal", "total")
    return max(0, min(int(PINNABLE_SHARE * total), total - UNPINNED_BYTES))


def check_pinnable(num_bytes: int, limit: int) -> None:
    """Refuse to page-lock beyond a limit, or where main memory is short.

    Args:
        num_bytes: to be page-locked.
        limit: bytes that may still be.

    Raises:
        RuntimeError: they are not to be page-locked.
    """
    if num_bytes > limit:
        raise RuntimeError(f"no more than {limit / 1e9:.1f} GB may still be page-locked")
    free = free_host_bytes()
    if free < FREE_HOST_BYTES:
        raise RuntimeError(f"only {free / 1e9:.1f} GB of main memory are free")


def free_host_bytes() -> int:
    """Available main memory."""
    return _host_bytes("MemAvailable", "available")


def _host_bytes(line: str, attribute: str) -> int:
    """Of main memory, from Linux itself or from psutil elsewhere."""
    try:
        with open("/proc/meminfo", encoding="ascii") as meminfo:
            for text in meminfo:
                if text.startswith(f"{line}:"):
                    return int(text.split()[1]) * 1024
    except OSError:
        pass
    try:
        import psutil
    except ImportError:
        return ASSUMED_HOST_BYTES
    return int(getattr(psutil.virtual_memory(), attribute))
