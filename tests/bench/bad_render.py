"""How well bad renders are seen: clips of the built-in model, good ones and planted bad ones.

    python -m tests.bench.bad_render [--good 64] [--still 32] [--jump 32] [--drift 16] [--seed 1]
        [--cfg 6]

    good    runs of prompts that move, grow, shrink or fade the shape; movers with as little as 4
            pixels of way before them among them
    still   the same pictures, and a model that is told "stays still"
    jump    runs in which the model is shown another picture and prompt from a latent frame on (each
            of 1 to 4 in turn)
    drift   runs in which the later a frame, the more the model is shown other colours

Every estimate is one the sampler made, on its way from noise, at the step where it would look. For
each kind the figures' range is printed, and how many clips are called what.
"""

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from comfyui_skyreels.skyreels import builtin
from comfyui_skyreels.skyreels.conditioning.embeds import PromptEmbeds
from comfyui_skyreels.skyreels.conditioning.latents import ImageConditioning
from comfyui_skyreels.skyreels.config import Guidance
from comfyui_skyreels.skyreels.image import encode_image
from comfyui_skyreels.skyreels.runtime import TorchRuntime
from comfyui_skyreels.skyreels.sampling.bad_render import Look, look_at, step_to_look_at
from comfyui_skyreels.skyreels.sampling.sample import sample
from comfyui_skyreels.skyreels.sampling.settings import SamplingSettings, Velocity
from comfyui_skyreels.skyreels.text.encode import DEFAULT_NEGATIVE_PROMPT, encode_prompt
from torch import Tensor
from train import data, measure

#: least way of a mover, in pixels of the picture
LEAST_WAY = 4.0
#: change of colour of a picture at the end of a clip that drifts, of 1
TINT = 0.3


class _SeenError(Exception):
    """The estimate is there; the rest of the run is not needed."""


@dataclass
class Planter:
    """Makes estimates with the built-in model."""

    settings: SamplingSettings

    @cached_property
    def models(self) -> tuple:
        """Transformer, VAE, text encoder and the negative prompt."""
        runtime = TorchRuntime()
        text = builtin.builtin_text_encoder(runtime=runtime)
        negative = encode_prompt(text, DEFAULT_NEGATIVE_PROMPT, fps_prefix=False, runtime=runtime)
        transformer = builtin.builtin_transformer(runtime=runtime)
        return transformer, builtin.builtin_vae(runtime=runtime), text, negative

    def picture(self, image: Tensor) -> ImageConditioning:
        """First-frame latents of [1, H, W, 3]."""
        return encode_image(
            self.models[1], image, width=64, height=64, num_frames=17, runtime=TorchRuntime()
        )

    def prompt(self, text: str) -> PromptEmbeds:
        """A prompt, encoded."""
        return encode_prompt(self.models[2], text, runtime=TorchRuntime())

    def estimate(
        self, inputs: list[tuple[ImageConditioning, PromptEmbeds]], weights: Tensor, seed: int
    ) -> Tensor:
        """The estimate at the step that is looked at, of a run whose velocity is a mixture.

        Args:
            inputs: what the model is shown and told, at every step once for each.
            weights: [inputs, T] of each in the velocity of a latent frame.
            seed: of the noise.

        Returns:
            [1, 16, T, h, w].
        """
        at = step_to_look_at(self.settings)
        assert at is not None
        seen: list[Tensor] = []
        velocities: list[Velocity] = []

        def solver(velocity: Velocity, latents: Tensor, sigmas: Tensor, on_step) -> Tensor:
            velocities.append(velocity)
            if len(velocities) < len(inputs):  # inside of this run, that of the next inputs
                self._run(inputs[len(velocities)], replace(settings, seed=seed))
            for step in range(at):
                sigma, after = sigmas[step], sigmas[step + 1]
                parts = [each(latents, sigma)[0] for each in velocities]
                mixed = sum(
                    part * weight[:, None, None]
                    for part, weight in zip(parts, weights, strict=True)
                )
                seen[:] = [latents - sigma * mixed]
                latents = latents + (after - sigma) * mixed
            raise _SeenError

        settings = replace(self.settings, solver=solver)
        try:
            self._run(inputs[0], replace(settings, seed=seed))
        except _SeenError:
            return seen[0]
        raise AssertionError("the run went on")

    def _run(self, inputs: tuple, settings: SamplingSettings) -> None:
        transformer, _, _, negative = self.models
        sample(transformer, *inputs, negative, settings, runtime=TorchRuntime())


def moving_cases(count: int, seed: int) -> list[measure.Case]:
    """Clips in which something is to happen."""
    scenes = data.draw_scenes(2 * count + 16, torch.Generator().manual_seed(seed), held_out=None)
    times, extent = torch.tensor([[0.0, data.FRAMES - 1.0]]), torch.tensor([64, 64])
    centre, _, _, *_ = data.track(scenes, times.expand(len(scenes), -1), data.FRAMES, extent)
    way = (centre[:, 1] - centre[:, 0]).norm(dim=-1)
    cases = []
    for index in range(len(scenes)):
        scene = scenes.take(slice(index, index + 1))
        verb = data.VERBS[int(scene.verb)]
        if verb != "still" and not (verb in data.DIRECTIONS and way[index] < LEAST_WAY):
            parts = (int(scene.colour), int(scene.shape), int(scene.verb))
            cases.append(measure.Case(scene, data.plain_prompt(*parts)))
    return cases[:count]


def shown(planter: Planter, case: measure.Case) -> tuple[ImageConditioning, PromptEmbeds]:
    """What the model is shown and told for a case."""
    return planter.picture(case.truth()[:1]), planter.prompt(case.prompt)


def good(planter: Planter, cases: list[measure.Case], index: int) -> tuple[Tensor, Tensor]:
    """An estimate, and the picture's latents."""
    inputs = shown(planter, cases[index])
    return planter.estimate([inputs], torch.ones(1, 5), index), _latents(inputs)


def still(planter: Planter, cases: list[measure.Case], index: int) -> tuple[Tensor, Tensor]:
    """The same of a clip in which nothing moves."""
    return good(planter, [case.told("still") for case in cases], index)


def jump(planter: Planter, cases: list[measure.Case], index: int) -> tuple[Tensor, Tensor]:
    """The same of a clip that cuts to another one."""
    inputs = [shown(planter, cases[index]), shown(planter, cases[index - 1])]
    later = (torch.arange(5) >= 1 + index % 4).float()
    return planter.estimate(inputs, torch.stack([1 - later, later]), index), _latents(inputs[0])


def drift(planter: Planter, cases: list[measure.Case], index: int) -> tuple[Tensor, Tensor]:
    """The same of a clip that turns to other colours."""
    case = cases[index]
    sign = 2.0 * torch.randint(2, (3,), generator=torch.Generator().manual_seed(index)) - 1
    image = (case.truth()[:1] * (1 - TINT) + TINT * (sign > 0)).clamp(0, 1)
    inputs = [shown(planter, case), (planter.picture(image), planter.prompt(case.prompt))]
    share = torch.linspace(0, 1, 5)
    return planter.estimate(inputs, torch.stack([1 - share, share]), index), _latents(inputs[0])


def _latents(inputs: tuple[ImageConditioning, PromptEmbeds]) -> Tensor:
    latents = inputs[0].image_latents
    assert latents is not None
    return latents


KINDS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "good": good,
    "still": still,
    "jump": jump,
    "drift": drift,
}


def called(look: Look, scale: float = 6.0) -> str:
    """What a clip is taken for, in a word; `scale` of CFG."""
    words = {"stands": "still", "cuts": "jump", "drifts": "drift"}
    fault = look.fault(scale)
    return words[fault.split()[0]] if fault else "good"


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for kind, count in (("good", 64), ("still", 32), ("jump", 32), ("drift", 16)):
        parser.add_argument(f"--{kind}", type=int, default=count)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cfg", type=float, default=6.0)
    arguments = parser.parse_args()
    planter = Planter(SamplingSettings(guidance=Guidance(arguments.cfg), riflex_k=0))
    cases = moving_cases(max(getattr(arguments, kind) for kind in KINDS), arguments.seed)
    results = {}
    for kind, plant in KINDS.items():
        looks, seconds = [], []
        for index in range(getattr(arguments, kind)):
            estimate, picture = plant(planter, cases, index)
            start = time.perf_counter()
            looks.append(look_at(estimate, picture))
            seconds.append(time.perf_counter() - start)
        if not looks:
            continue
        calls = [called(look, arguments.cfg) for look in looks]
        print(f"{kind}: {len(looks)} clips, called {dict(Counter(calls))}")
        for name in ("motion", "jump", "drift"):
            values = sorted(getattr(look, name) for look in looks)
            median = statistics.median(values)
            print(f"  {name:6} {values[0]:.3f} to {values[-1]:.3f}, median {median:.3f}")
        caught = sum(call != "good" for call in calls) / len(calls)
        results[kind] = {"clips": len(looks), "called_bad": round(caught, 4)}
    results["seconds_a_look"] = round(statistics.median(seconds), 6)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
