"""What a run is told by text and time, computed once for the whole schedule.

The modulation of all blocks, the embedders and the text refiner are 3.76 of the model's 12.82
billion parameters, and no latent ever enters them. So they visit the device once, one after the
other, before the first step; what they say (2.2 MB and the text tokens for a step of one prompt in
bfloat16) waits on the host, and the weights stay out of the loop. Every value comes from the same
call with the same shapes as in `SkyReelsTransformer.condition`, so it has the same bits.

A step of a prompt is about a hundred tensors. They wait in one piece of memory, from which one copy
brings them to the device while the host goes on.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from ..kernels import dispatch
from ..kernels.dispatch import BYTE_ALIGNMENT
from ..offload import on_device
from ..runtime import Runtime
from ..text.embeds import PromptEmbeds
from ..transformer.attention import Attention
from ..transformer.model import RunBlock, SkyReelsTransformer, StepModulation

logger = logging.getLogger("skyreels.sampling.precompute")

#: pairs of prompt and step that are kept; with 256 tokens of text each, 256 are about 1 GB. What
#: lies beyond is computed when it is asked for.
MAX_KEPT = 256

#: of(prompt, timestep, run_block): what one forward pass is told, on the device. prompt: its place
#: among the prompts. timestep: 0..1000, exactly representable in float32; a number, as looking up a
#: tensor's would make the host wait for the device. run_block: brings weights back for a timestep
#: that was not in the schedule.
Conditioning = Callable[[int, float, RunBlock], StepModulation]


def precompute(
    transformer: SkyReelsTransformer,
    prompts: Sequence[PromptEmbeds],
    timesteps: Sequence[float],
    guidance: Tensor,
    *,
    attention: Attention,
    runtime: Runtime,
) -> Conditioning:
    """Compute what every step of a run is told.

    Args:
        transformer: on any device; its conditioners visit the device one at a time.
        timesteps: of the schedule, 0..1000, exactly representable in float32.
        guidance: [1] float32, embedded guidance times 1000.
        runtime: asked for an interrupt between modules; its device is where results are wanted.
    """
    device, host = runtime.device, torch.device("cpu")
    guidance = guidance.to(device)
    inputs = [(p.prompt_embeds.to(device), p.pooled_prompt_embeds.to(device)) for p in prompts]
    keys = [(which, float(t)) for t in timesteps for which in range(len(prompts))]
    keys = list(dict.fromkeys(keys))[:MAX_KEPT]

    embedded = {}
    with ExitStack() as stack:
        for module in transformer.embedders:
            stack.enter_context(on_device(module, device))
        for which, t in keys:
            runtime.check_interrupt()
            timestep = torch.tensor([t], dtype=torch.float32, device=device)
            embedded[which, t] = transformer.embed(
                timestep, *inputs[which], guidance, attention=attention
            )
    rows: dict[tuple[int, float], list[tuple[Tensor, ...]]] = {key: [] for key in keys}
    for modulations in transformer.modulations:
        with ExitStack() as stack:
            runtime.check_interrupt()
            for module in modulations:
                stack.enter_context(on_device(module, device))
            for key, (vec, _) in embedded.items():
                rows[key].append(tuple(module(vec).to(host) for module in modulations))
    kept: dict[tuple[int, float], Tensor] = {}
    shapes: dict[int, StepModulation] = {}  # of what a prompt's steps are told
    for key in keys:
        told = StepModulation(embedded.pop(key)[1].to(host), tuple(rows.pop(key)))
        kept[key] = pack(told, device)
        shapes[key[0]] = StepModulation(
            told.text.to("meta"), tuple(tuple(r.to("meta") for r in block) for block in told.mods)
        )

    def of(prompt: int, timestep: float, run_block: RunBlock) -> StepModulation:
        packed = kept.get((prompt, timestep))
        if packed is None:
            return transformer.condition(
                torch.tensor([timestep], dtype=torch.float32, device=device), *inputs[prompt],
                guidance, attention=attention, run_block=run_block,
            )  # fmt: skip
        return unpack(packed.to(runtime.device, non_blocking=True), shapes[prompt])

    return of


def pack(told: StepModulation, device: torch.device) -> Tensor:
    """Put what a step is told into one piece of host memory.

    Args:
        told: on the host, all of one dtype.
        device: where it will be wanted; see `host_memory`.
    Returns:
        one-dimensional, of that dtype; each tensor begins at a multiple of BYTE_ALIGNMENT.
    """
    tensors = _tensors(told)
    dtype = told.text.dtype
    assert all(tensor.dtype == dtype for tensor in tensors)
    packed = host_memory(sum(map(_padded_numel, tensors)), dtype, device)
    for place, tensor in zip(_tensors(unpack(packed, told)), tensors, strict=True):
        place.copy_(tensor)
    return packed


def unpack(packed: Tensor, shapes: StepModulation) -> StepModulation:
    """What was packed, as views.

    Args:
        packed: from `pack`, on any device. shapes: of what was packed; only that is looked at.
    """
    start = 0

    def next_like(tensor: Tensor) -> Tensor:
        nonlocal start
        view = packed[start : start + tensor.numel()].view(tensor.shape)
        start += _padded_numel(tensor)
        return view

    text = next_like(shapes.text)
    return StepModulation(text, tuple(tuple(map(next_like, block)) for block in shapes.mods))


def host_memory(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[numel] numbers on the host, not yet written, to be copied to `device` later.

    For a CUDA device they are pinned, so that a copy runs beside what the host does. Where that
    cannot be had (it is limited on Windows and in containers), the host waits for each copy, and
    that is said once.
    """
    if device.type == "cuda":
        try:
            return torch.empty(numel, dtype=dtype, pin_memory=True)
        except RuntimeError as error:
            dispatch.log_once(
                "Host memory cannot be pinned, so each step waits for its copy: "
                f"{dispatch.brief(error)}.",
                source=logger,
            )
    return torch.empty(numel, dtype=dtype)


def _tensors(told: StepModulation) -> list[Tensor]:
    return [told.text, *(row for block in told.mods for row in block)]


def _padded_numel(tensor: Tensor) -> int:
    """Elements up to where the next tensor may begin."""
    step = BYTE_ALIGNMENT // tensor.itemsize
    return -(-tensor.numel() // step) * step
