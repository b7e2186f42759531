"""The transformer's predictions for a sampling loop that belongs to somebody else.

`sample` knows its whole run before it begins. Here a host's loop asks for one prediction after the
other and may end at any time. So the run is planned and the weights are placed with the first call,
and again if a later call needs more; what text and time determine is computed for the whole
schedule when a prompt is seen for the first time.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..conditioning.embeds import PromptEmbeds
from ..config import CHUNKINGS, NUM_TRAIN_TIMESTEPS, SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION
from ..plan import MAX_KEPT, Job, Rung, activation_bytes, weights_of
from ..runtime import Runtime
from ..runtime.offload import weight_bytes
from ..transformer.attention import Attention
from ..transformer.layers import rope_table
from ..transformer.model import RunBlock, SkyReelsTransformer
from ..transformer.placement import placed
from ..weights.lora.apply import AppliedLora, use_loras
from .attend import attention_of_run
from .planned import start_run
from .precompute import StepLookup, precompute

#: as in SamplingSettings; only clips beyond 177 frames change
RIFLEX_K = 4


#: the evaluator that has a transformer placed
_OPEN: "WeakKeyDictionary[SkyReelsTransformer, Evaluator]" = WeakKeyDictionary()


class _Place(NamedTuple):
    """How the weights are placed, and what attention runs there."""

    run_block: RunBlock
    rung: Rung
    attention: Attention


class _Request(NamedTuple):
    """One prediction, see `Evaluator.predict`."""

    timestep: float
    prompt: PromptEmbeds
    guidance_scale: float
    wrap: Callable[[RunBlock], RunBlock]


class Evaluator:
    """Predictions of a transformer, one at a time, for as long as it is open.

    Args:
        transformer: on any device; it is streamed if it does not fit. Of several evaluators of one
            transformer only that which predicts has it placed: taking turns is right and slow.
        sigmas: [N + 1] of the loop's schedule, for the plan and for what is computed ahead. A
            prediction for any other sigma is as good, and slower where the weights are streamed.
        runtime: its device computes; asked for an interrupt before every block.
        loras: in use together; the transformer keeps them afterwards, as after `sample`.
        attention: "exact" or "fast".
    """

    def __init__(
        self,
        transformer: SkyReelsTransformer,
        sigmas: Tensor,
        *,
        runtime: Runtime,
        loras: Sequence[AppliedLora] = (),
        attention: str = "exact",
    ) -> None:
        self._transformer, self._runtime, self._mode = transformer, runtime, attention
        self._loras = loras
        timesteps = sigmas.detach().float().cpu()[:-1] * NUM_TRAIN_TIMESTEPS
        self._timesteps: list[float] = timesteps.tolist()
        self._stack = ExitStack()
        #: of the largest prediction that there is room for; 0 while nothing is placed
        self._tokens = 0
        self._ropes: dict[tuple[int, int, int], Tensor] = {}
        #: of each prompt and embedded guidance; the prompt is kept so that its id stays its own
        self._lookups: dict[tuple[int, float], tuple[PromptEmbeds, StepLookup]] = {}

    def __enter__(self) -> "Evaluator":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Put every weight back where it was; the next prediction places them again."""
        self._tokens = 0
        self._ropes.clear()
        self._lookups.clear()
        if _OPEN.get(self._transformer) is self:
            del _OPEN[self._transformer]
        self._stack.close()

    def predict(
        self,
        hidden_states: Tensor,
        timestep: float,
        prompt: PromptEmbeds,
        *,
        guidance_scale: float = 1.0,
        wrap: Callable[[RunBlock], RunBlock] = lambda run_block: run_block,
    ) -> Tensor:
        """One prediction.

        Args:
            hidden_states: [1, C, T, h, w], as for `SkyReelsTransformer.forward`.
            timestep: 0..1000.
            prompt: encoded and trimmed; the same object for the same prompt.
            guidance_scale: embedded guidance.
            wrap: makes another run_block of the one that runs a block, for a host that replaces
                or skips blocks.

        Returns:
            [1, 16, T, h, w] float32 velocity on the runtime's device.

        Raises:
            ShapeError: channels or sizes that do not fit.
            OutOfRoomError: not even one block fits the device.
            CheckpointError: as for `use_loras`.
        """
        self._runtime.check_interrupt()
        transformer, device = self._transformer, self._runtime.device
        grid = transformer.token_grid(hidden_states.shape)
        text_tokens = prompt.prompt_embeds.shape[1]
        tokens = math.prod(grid) + text_tokens
        with torch.inference_mode():
            if tokens > self._tokens:
                self.close()
                self._open(_job(transformer, hidden_states, text_tokens, len(self._timesteps)))
                self._tokens = tokens
            if grid not in self._ropes:
                self._ropes[grid] = rope_table(
                    grid, transformer.config, riflex_k=RIFLEX_K, device=device
                )
            hidden_states, rope = hidden_states.to(device), self._ropes[grid]
            request = _Request(timestep, prompt, guidance_scale, wrap)
            try:
                velocity: Tensor = self._velocity(hidden_states, rope, request)
            except BaseException:
                with self._stack.pop_all():  # what was opened is told of the error, and may explain
                    self.close()
                    raise
            return velocity

    def _open(self, job: Job) -> None:
        """Plan, and place the weights for predictions of a job."""
        transformer, runtime = self._transformer, self._runtime
        if (other := _OPEN.get(transformer)) is not None:
            other.close()
        _OPEN[transformer] = self
        try:
            use_loras(transformer, self._loras, runtime=runtime)
            conditioners = [nn.ModuleList(transformer.embedders), *transformer.conditioners]
            needed = activation_bytes(
                transformer.config,
                job.tokens,
                weights_of(transformer),
                self._mode,
                max(map(weight_bytes, conditioners)),
            )
            self._stack.enter_context(runtime.place(transformer, needed["chunks"]))
            run = start_run(transformer, job, needed, runtime, self._mode)
            attention = attention_of_run(transformer, job, self._mode, runtime)

            @contextmanager
            def on_rung(rung: Rung) -> Iterator[Callable[..., Tensor]]:
                with placed(transformer, runtime, run.bytes_on(rung)) as run_block:
                    yield partial(self._evaluate, _Place(run_block, rung, attention))

            self._velocity = self._stack.enter_context(run.descending(on_rung))
        except BaseException:
            self.close()
            raise

    def _evaluate(
        self,
        place: _Place,
        hidden_states: Tensor,
        rope: Tensor,
        request: _Request,
    ) -> Tensor:
        lookup = self._lookup(request, place.attention)
        return self._transformer.denoise(
            hidden_states,
            lookup(0, request.timestep, place.run_block),
            rope=rope,
            attention=place.attention,
            run_block=request.wrap(place.run_block),
            chunking=CHUNKINGS[place.rung.chunking],
        ).float()

    def _lookup(self, request: _Request, attention: Attention) -> StepLookup:
        """Text and modulation of a prompt; of all timesteps when it is asked for the first time."""
        key = (id(request.prompt), request.guidance_scale)
        if key not in self._lookups:
            if len(self._lookups) * len(self._timesteps) >= MAX_KEPT:
                self._lookups.clear()
            lookup = precompute(
                self._transformer,
                [request.prompt],
                self._timesteps,
                torch.tensor([request.guidance_scale * NUM_TRAIN_TIMESTEPS]),
                attention=attention,
                runtime=self._runtime,
            )
            self._lookups[key] = request.prompt, lookup
        return self._lookups[key][1]


def _job(
    transformer: SkyReelsTransformer, hidden_states: Tensor, text_tokens: int, num_steps: int
) -> Job:
    """What is made, as far as a single prediction shows it; both branches are counted."""
    frames, height, width = hidden_states.shape[-3:]
    return Job(
        width=width * SPATIAL_COMPRESSION,
        height=height * SPATIAL_COMPRESSION,
        num_frames=(frames - 1) * TEMPORAL_COMPRESSION + 1,
        num_steps=num_steps,
        num_guided=num_steps,
        text_tokens=text_tokens,
        config=transformer.config,
        vae=None,
    )
