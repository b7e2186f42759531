"""The one seam between the engine and whatever hosts it.

The engine never asks which program it runs in: it is handed a Runtime, places work on its device,
reports progress to it and gives it a chance to stop. ComfyUI's version lives in nodes/host.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from .offload import missing_bytes

#: if neither Linux nor psutil reports it (the extra "standalone" brings psutil)
ASSUMED_HOST_BYTES = 16 * 1024**3


class Runtime(Protocol):
    """What the engine needs from its host."""

    device: torch.device
    """Where compute runs."""
    offload_device: torch.device
    """Where idle weights rest."""
    state_folder: Path | None
    """Where runs leave what they learned about the device (outcomes.py); None: nowhere."""

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

    def progress(self, stage: str, done: int, total: int, preview: Tensor | None = None) -> None:
        """Report that `done` of `total` units of a stage are finished.

        Args:
            stage: "load", "encode", "sample" or "decode".
            done: units finished so far.
            total: units of the stage.
            preview: [1, 16, T, h, w] denoised estimate in model space, in the "sample" stage only.
        """
        ...

    def check_interrupt(self) -> None:
        """Raise the host's own exception if the user asked to stop.

        Called between blocks, tiles and weight loads.
        """
        ...


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
    ) -> None:
        # as tensors name it: "cuda" becomes "cuda:0"
        self.device = torch.empty(0, device=device).device
        self.offload_device = torch.device("cpu")
        self.state_folder = state_folder
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

    def progress(self, stage: str, done: int, total: int, preview: Tensor | None = None) -> None:
        """Hand the report to the callback given at construction."""
        self._on_progress(stage, done, total, preview)

    def check_interrupt(self) -> None:
        """Hand the check to the callback given at construction."""
        self._on_check()


def free_host_bytes() -> int:
    """Available host memory, from Linux itself or from psutil elsewhere."""
    try:
        with open("/proc/meminfo", encoding="ascii") as meminfo:
            for line in meminfo:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import psutil
    except ImportError:
        return ASSUMED_HOST_BYTES
    return int(psutil.virtual_memory().available)
