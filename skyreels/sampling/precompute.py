"""What each step gets from text and time, computed once for the whole schedule.

The modulation of all blocks, the embedders and the text refiner are 3.76 of the model's 12.82
billion parameters, and no latent ever enters them. So they are loaded on the device once, one after
the other, before the first step; their results (2.2 MB and the text tokens for a step of one prompt
in bfloat16) are kept on the host, and the weights stay out of the loop. Every value comes from the
same call with the same shapes as in `SkyReelsTransformer.condition`, so it has the same bits.

A step of a prompt is about a hundred tensors. They are packed into one piece of memory, from which
one copy brings them to the device while the host goes on.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from ..conditioning.embeds import PromptEmbeds
from ..kernels import dispatch
from ..kernels.dispatch import BYTE_ALIGNMENT
from ..plan import MAX_KEPT
from ..runtime import Runtime
from ..runtime.offload import on_device
from ..transformer.attention import Attention
from ..transformer.model import RunBlock, SkyReelsTransformer, StepModulation

logger = logging.getLogger("skyreels.sampling.precompute")

#: lookup(prompt, timestep, run_block): text and modulation of one model evaluation, on the device.
#: prompt: its index among the prompts. timestep: 0..1000, exactly representable in float32; a
#: number, because reading a tensor's would make the host wait for the device. run_block: brings
#: weights back for a timestep that was not in the schedule.
StepLookup = Callable[[int, float, RunBlock], StepModulation]


def precompute(
    transformer: SkyReelsTransformer,
    prompts: Sequence[PromptEmbeds],
    timesteps: Sequence[float],
    guidance: Tensor,
    *,
    needed: Sequence[Sequence[int]] | None = None,
    attention: Attention,
    runtime: Runtime,
) -> StepLookup:
    """Compute text and modulation for every step of a run.

    Args:
        transformer: on any device; its conditioners are loaded on the device one at a time.
        prompts: encoded, of any lengths.
        timesteps: of the schedule, 0..1000, exactly representable in float32.
        guidance: [1] float32, embedded guidance times 1000; or [P], of each prompt.
        needed: of each timestep, the indices of the prompts that it takes; all if not given.
        attention: for the text refiner.
        runtime: asked for an interrupt between modules; its device is where results are wanted.

    Returns:
        The function that looks them up.
    """
    device, host = runtime.device, torch.device("cpu")
    scales = guidance.to(device).expand(len(prompts))
    inputs = [
        (each.prompt_embeds.to(device), each.pooled_prompt_embeds.to(device), scales[index, None])
        for index, each in enumerate(prompts)
    ]
    if needed is None:
        needed = [range(len(prompts))] * len(timesteps)
    keys = [
        (prompt, float(t)) for t, each in zip(timesteps, needed, strict=True) for prompt in each
    ]
    keys = list(dict.fromkeys(keys))[:MAX_KEPT]

    embedded = {}
    with ExitStack() as stack:
        for module in transformer.embedders:
            stack.enter_context(on_device(module, device))
        for prompt, t in keys:
            runtime.check_interrupt()
            timestep = torch.tensor([t], dtype=torch.float32, device=device)
            embedded[prompt, t] = transformer.embed(timestep, *inputs[prompt], attention=attention)
    modulation: dict[tuple[int, float], list[tuple[Tensor, ...]]] = {key: [] for key in keys}
    for modules in transformer.modulations:
        with ExitStack() as stack:
            runtime.check_interrupt()
            for module in modules:
                stack.enter_context(on_device(module, device))
            for key, (vec, _) in embedded.items():
                modulation[key].append(tuple(module(vec).to(host) for module in modules))
    packed: dict[tuple[int, float], Tensor] = {}
    shapes: dict[int, StepModulation] = {}  # of each prompt's steps
    for key in keys:
        step = StepModulation(embedded.pop(key)[1].to(host), tuple(modulation.pop(key)))
        packed[key] = pack(step, device)
        shapes[key[0]] = StepModulation(
            step.text.to("meta"), tuple(tuple(t.to("meta") for t in block) for block in step.mods)
        )

    def lookup(prompt: int, timestep: float, run_block: RunBlock) -> StepModulation:
        found = packed.get((prompt, timestep))
        if found is None:
            return transformer.condition(
                torch.tensor([timestep], dtype=torch.float32, device=device),
                *inputs[prompt],
                attention=attention,
                run_block=run_block,
            )
        return unpack(found.to(runtime.device, non_blocking=True), shapes[prompt])

    return lookup


def pack(step: StepModulation, device: torch.device) -> Tensor:
    """Put text and modulation of a step into one piece of host memory.

    Args:
        step: on the host, all of one dtype.
        device: where it will be copied; see `host_memory`.

    Returns:
        One-dimensional, of that dtype; each tensor begins at a multiple of BYTE_ALIGNMENT.
    """
    tensors = _tensors(step)
    dtype = step.text.dtype
    assert all(tensor.dtype == dtype for tensor in tensors)
    packed = host_memory(sum(map(_padded_numel, tensors)), dtype, device)
    for place, tensor in zip(_tensors(unpack(packed, step)), tensors, strict=True):
        place.copy_(tensor)
    return packed


def unpack(packed: Tensor, shapes: StepModulation) -> StepModulation:
    """What was packed, as views.

    Args:
        packed: from `pack`, on any device.
        shapes: what was packed, or tensors of its shapes.

    Returns:
        Views of `packed`.
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
    """[numel] uninitialized numbers on the host, to be copied to `device` later.

    For a CUDA device they are pinned, so that a copy runs beside what the host does. Where pinning
    fails (it is limited on Windows and in containers), the host waits for each copy, and one
    warning says so.

    Args:
        numel: how many.
        dtype: of each.
        device: where they will be copied.

    Returns:
        One-dimensional, on the host.
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


def _tensors(step: StepModulation) -> list[Tensor]:
    return [step.text, *(tensor for block in step.mods for tensor in block)]


def _padded_numel(tensor: Tensor) -> int:
    """Elements up to where the next tensor may begin."""
    step = BYTE_ALIGNMENT // tensor.itemsize
    return -(-tensor.numel() // step) * step
