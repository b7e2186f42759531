"""ComfyUI as the engine's Runtime: its devices, memory manager, progress bar and Cancel."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...skyreels.builtin import BUILTIN_NAME
from ...skyreels.errors import OptionError
from ...skyreels.runtime import check_pinnable, pinnable_limit
from ...skyreels.runtime.ladder import is_out_of_memory
from ...skyreels.runtime.offload import (
    RESERVE_BYTES,
    missing_bytes,
    page_lock,
    page_unlock,
    weight_bytes,
)
from .files import state_folder
from .preview import moving_preview, preview_format
from .server import show_on_node

logger = logging.getLogger("skyreels.nodes.host.runtime")

#: more than any device has
UNKNOWN_BYTES = 2**50


@dataclass(frozen=True)
class LoadedModel:
    """What a SKYREELS_MODEL or SKYREELS_VAE socket carries.

    Attributes:
        module: SkyReelsTransformer or VideoVAE.
        patcher: ComfyUI's handle on it, through which its memory manager moves it.
        name: for messages.
        loras: that a run brings the module to, see `SamplingSettings`.
        precision: that it was asked for in.
    """

    module: Any
    patcher: Any
    name: str
    loras: tuple[Any, ...] = ()
    precision: str = "auto"


class ComfyRuntime:
    """The engine's Runtime over ComfyUI's memory manager, progress bar and cancel button.

    Args:
        unique_id: of the node that runs.
        *models: those that run, so that ComfyUI's memory manager can load them.
        with_preview: draw previews of the latents on the node.
        device: that computes, if not the one ComfyUI prefers.
    """

    def __init__(
        self,
        unique_id: str | None = None,
        *models: LoadedModel,
        with_preview: bool = False,
        device: torch.device | None = None,
    ) -> None:
        import comfy.model_management as mm
        import comfy.utils
        import latent_preview

        self._mm = mm
        self._unique_id = unique_id
        self._bar = comfy.utils.ProgressBar(1, node_id=unique_id)
        self._started: dict[str, tuple[float, int]] = {}
        self._line, self._said, self._notes = "", "", list[str]()
        self._console: Any = None
        # as weights name it: "mps" becomes "mps:0"
        self.device = torch.empty(0, device=device or mm.get_torch_device()).device
        self.offload_device = mm.unet_offload_device()
        if self.offload_device.type != "cpu":  # --highvram keeps models where they compute
            self.offload_device = torch.device("cpu")
        self.state_folder = state_folder()
        self.partner: ComfyRuntime | None = None
        self.ranks = None
        self._previewer = self._moving = None
        if with_preview:
            is_builtin = any(model.name == BUILTIN_NAME for model in models)
            latent_format = preview_format(is_builtin)
            self._previewer = latent_preview.get_previewer(self.device, latent_format)
            self._moving = moving_preview(self._previewer, latent_format, unique_id)
        self._models = {model.module: model for model in models}
        self._in_use: list[Any] = []
        self._pinned_bytes = 0

    def free_bytes(self) -> int:
        """Bytes ComfyUI considers free on the compute device, less what --reserve-vram keeps."""
        if self.device.type == "privateuseone":  # DirectML does not report it: try, and see
            return UNKNOWN_BYTES
        return int(self._mm.get_free_memory(self.device) - self._mm.extra_reserved_memory())

    def reclaimable_bytes(self) -> int:
        """Bytes of the compute device that loaded models take and would give back."""
        # one whose handle is gone while its module lives cannot be asked, and cannot be unloaded
        loaded = [each for each in self._mm.current_loaded_models if each.model is not None]
        return sum(each.model_loaded_memory() for each in loaded if each.device == self.device)

    def say(self, text: str) -> None:
        """Write lines on the node, if they are not there already."""
        if text != self._said:
            self._said = text
            show_on_node(text, self._unique_id)

    def make_room(self, num_bytes: int) -> None:
        """Let ComfyUI unload other models until `free_bytes` are num_bytes."""
        in_use = [self._mm.LoadedModel(patcher) for patcher in self._in_use]
        # it unloads no more than it is asked for, of a large model too
        self._mm.free_memory(num_bytes + self._mm.extra_reserved_memory(), self.device, in_use)

    @contextmanager
    def place(self, module: nn.Module, activation_bytes: int) -> Iterator[None]:
        """Load a module through ComfyUI's memory manager if it fits whole, and keep it there.

        If it does not fit, it and everything else leaves the device, and the engine streams it.
        """
        num_bytes = missing_bytes(module, self.device) + activation_bytes + RESERVE_BYTES
        model = self._models.get(module)
        if model is None:
            self.make_room(num_bytes)
            yield
            return
        _recount(model)
        self._in_use.append(model.patcher)
        try:
            if not (self._fits(num_bytes) and self._load(model, activation_bytes)):
                logger.info(
                    "%s (%.1f GB) and %.1f GB of activations do not fit the card together: it is "
                    "streamed in parts.",
                    model.name,
                    weight_bytes(module) / 1e9,
                    activation_bytes / 1e9,
                )
                self.stream(module)
            yield
        finally:
            self._in_use.remove(model.patcher)
            if self._moving is not None:
                self._moving.stop()
            self._end_console()

    def stream(self, module: nn.Module) -> None:
        """Let everything leave the device; the engine brings what it needs of the module."""
        self._mm.free_memory(UNKNOWN_BYTES, self.device)  # other devices keep what they have

    def _fits(self, num_bytes: int) -> bool:
        if self.device.type == "cpu":
            return True
        self.make_room(num_bytes)
        return num_bytes <= self.free_bytes()

    def _load(self, model: LoadedModel, activation_bytes: int) -> bool:
        """Load all of a model; whether that went well.

        Another program may take what was free a moment ago. ComfyUI then takes off what it has
        loaded.

        Returns:
            False if memory ran out.
        """
        try:
            self._mm.load_models_gpu(
                [model.patcher], memory_required=activation_bytes, force_full_load=True
            )
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return False
        return True

    def pinnable_bytes(self) -> int:
        """What is left of ComfyUI's own limit; of a share of main memory where it has none."""
        if not hasattr(self._mm, "MAX_PINNED_MEMORY"):
            return max(0, int(pinnable_limit(self.device)) - self._pinned_bytes)
        return max(0, int(self._mm.MAX_PINNED_MEMORY - self._mm.TOTAL_PINNED_MEMORY))

    def pin(self, memory: Tensor) -> None:
        """Page-lock memory through ComfyUI, which counts it and first gives up what it can spare.

        Raises:
            RuntimeError: ComfyUI or the system refuses.
        """
        if not hasattr(self._mm, "pin_memory"):  # older than its budget of pinned memory
            check_pinnable(memory.nbytes, self.pinnable_bytes())
            page_lock(memory)
            self._pinned_bytes += memory.nbytes
            return
        if self._mm.MAX_PINNED_MEMORY <= 0:
            raise RuntimeError("ComfyUI pins no memory here, or was told --disable-pinned-memory")
        if hasattr(self._mm, "ensure_pin_registerable"):
            self._mm.ensure_pin_registerable(memory.nbytes)
        check_pinnable(memory.nbytes, self.pinnable_bytes())
        if not self._mm.pin_memory(memory):
            raise RuntimeError("ComfyUI could not pin it")

    def unpin(self, memory: Tensor) -> None:
        """Undo `pin`."""
        if hasattr(self._mm, "pin_memory"):
            self._mm.unpin_memory(memory)
        else:
            page_unlock(memory)
            self._pinned_bytes -= memory.nbytes

    def progress(self, stage: str, done: int, total: int, preview: Tensor | None = None) -> None:
        """Move the bar of the node, draw a preview if the server wants one, write a status line."""
        now = time.monotonic()
        if stage not in self._started or done <= self._started[stage][1]:
            self._started[stage] = (now, done)
        image = None
        if preview is not None and self._previewer is not None:
            image = self._previewer.decode_latent_to_preview_image("JPEG", preview)
        self._bar.update_absolute(done, max(1, total), image)  # also checks for Cancel
        self._draw_on_console(stage, done, total)
        if preview is not None and self._moving is not None:
            self._moving.offer(preview)
        start, first = self._started[stage]
        self._line = status_line(stage, done, total, (now - start) / max(1, done - first))
        self._show()

    def _draw_on_console(self, stage: str, done: int, total: int) -> None:
        """Draw the bar in the console that core's samplers draw there, one line in place."""
        import comfy.utils

        if stage != "sample" or not getattr(comfy.utils, "PROGRESS_BAR_ENABLED", True):
            return
        from tqdm import tqdm

        if self._console is not None and done < self._console.n:  # a run that begins anew
            self._end_console()
        if self._console is None:
            if done == self._started[stage][1]:  # what is logged before the first step stands above
                return
            self._console = tqdm(total=total, initial=self._started[stage][1])
        self._console.update(done - self._console.n)
        if done >= total:
            self._end_console()

    def _end_console(self) -> None:
        if self._console is not None:
            self._console.close()
            self._console = None

    def note(self, text: str) -> None:
        """Keep a sentence below the status line, while this node runs."""
        self._notes.append(text)
        self._show()

    def _show(self) -> None:
        self.say("\n".join(filter(None, [self._line, *self._notes])))

    def check_interrupt(self) -> None:
        """Raise ComfyUI's own exception if the user pressed Cancel."""
        self._mm.throw_exception_if_processing_interrupted()


def _recount(model: LoadedModel) -> None:
    """Tell ComfyUI the size of a model whose layers were given side branches, or lost them."""
    num_bytes, counted = weight_bytes(model.module), model.patcher.model_size()
    if num_bytes != counted:
        model.patcher.size = num_bytes
        if model.patcher.loaded_size():  # they lie where their layers do
            model.module.model_loaded_weight_memory += num_bytes - counted


def status_line(stage: str, done: int, total: int, seconds_each: float) -> str:
    """The status line of a node, as "step 12/30 · 3.4 s/step · about 61 s left"."""
    if stage == "load":
        scale, unit = (1e9, "GB") if total >= 1e8 else (1e6, "MB")
        size = f"{total / scale:.1f} {unit}"
        return f"loading {done / scale:.1f} of {size}" if done < total else f"loaded {size}"
    if stage == "encode":
        return "encoding" if done < total else "encoded"
    unit = "step" if stage == "sample" else "tile"
    if done > total:  # adaptive samplers take as many as they need
        return f"{unit} {done}"
    line = f"{unit} {done}/{total}"
    if done and done < total and seconds_each > 0:
        left = seconds_each * (total - done)
        short = f"{left:.0f} s" if left < 90 else f"{left / 60:.0f} min"
        each = f"{seconds_each:.1f}" if seconds_each >= 1 else f"{seconds_each:.2f}"
        line += f" · {each} s/{unit} · about {short} left"
    return line


#: names for `second_runtime`
SECOND_DEVICES = ("off", "auto", "cuda:0", "cuda:1", "cuda:2", "cuda:3")


def second_runtime(name: str, first: ComfyRuntime) -> ComfyRuntime | None:
    """The device that makes the negative predictions, beside the one that samples.

    Args:
        name: of SECOND_DEVICES; auto is the first card that is not the one that samples.
        first: that one.

    Returns:
        None for off, and for auto where there is no second card, which is said.

    Raises:
        OptionError: there is no such device, or it is the one that samples.
    """
    if name == "off":
        return None
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    others = [f"cuda:{i}" for i in range(count) if f"cuda:{i}" != str(first.device)]
    if name == "auto":
        if first.device.type == "cuda" and others:
            return ComfyRuntime(device=torch.device(others[0]))
        first.note(f"second_device is auto, and beside {first.device} there is no other CUDA card.")
        return None
    if name == str(first.device):
        raise OptionError(
            f"second_device {name} is the card that samples already: choose another one, or off."
        )
    if name not in others:
        raise OptionError(
            f"second_device {name} is not here ({', '.join(others) or 'no other CUDA card'}): "
            "choose auto, which takes what is there, or off."
        )
    return ComfyRuntime(device=torch.device(name))


def register(
    module: nn.Module, name: str, runtime: ComfyRuntime, precision: str = "auto"
) -> LoadedModel:
    """Hand a module to ComfyUI's memory manager, idle until it is used."""
    from comfy.model_patcher import ModelPatcher

    patcher = ModelPatcher(
        module, load_device=runtime.device, offload_device=runtime.offload_device
    )
    return LoadedModel(module, patcher, name, precision=precision)


def free_host_bytes() -> int:
    """Bytes of main memory that ComfyUI considers free."""
    import comfy.model_management as mm

    return int(mm.get_free_memory(torch.device("cpu")))


@contextmanager
def without_inference_mode() -> Iterator[None]:
    """Leave ComfyUI's inference mode while modules are built: their weights outlive the prompt."""
    with torch.inference_mode(False), torch.no_grad():
        yield
