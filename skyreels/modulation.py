"""What a run is told by text and time, computed once for the whole schedule.

The modulation of all blocks, the embedders and the text refiner are 3.76 of the model's 12.82
billion parameters, and no latent ever enters them. So they visit the device once, one after the
other, before the first step; what they say (2.2 MB and the text tokens for a step of one prompt in
bfloat16) waits on the offload device, and the weights stay out of the loop. Every value comes from
the same call with the same shapes as in `SkyReelsTransformer.condition`, so it has the same bits.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from .attention import Attention
from .memory import on_device
from .model import RunBlock, SkyReelsTransformer, StepConditioning
from .runtime import Runtime
from .text import PromptEmbeds

#: pairs of prompt and step that are kept; 256 are about 0.6 GB. What lies beyond is computed when
#: it is asked for.
MAX_KEPT = 256

#: of(prompt, timestep, run_block): what one forward pass is told, on the device. prompt: its place
#: among the prompts. timestep: [1] float32. run_block: brings weights back for a timestep that was
#: not in the schedule.
Conditioning = Callable[[int, Tensor, RunBlock], StepConditioning]


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
        runtime: asked for an interrupt between modules; its offload device keeps the results.
    """
    device, home = runtime.device, runtime.offload_device
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
                rows[key].append(tuple(module(vec).to(home) for module in modulations))
    kept = {key: StepConditioning(embedded[key][1].to(home), tuple(rows[key])) for key in keys}

    def of(prompt: int, timestep: Tensor, run_block: RunBlock) -> StepConditioning:
        found = kept.get((prompt, float(timestep)))
        if found is None:
            return transformer.condition(
                timestep.to(device), *inputs[prompt], guidance,
                attention=attention, run_block=run_block,
            )  # fmt: skip
        moved = [tuple(row.to(device) for row in block) for block in found.rows]
        return StepConditioning(found.text.to(device), tuple(moved))

    return of
