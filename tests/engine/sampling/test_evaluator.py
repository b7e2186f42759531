"""Predictions for a loop that is not ours: equal to the run's own, and nothing is left behind."""

from contextlib import contextmanager

import pytest
import torch
from comfyui_skyreels.skyreels.config import TransformerConfig
from comfyui_skyreels.skyreels.errors import OutOfRoomError, ShapeError
from comfyui_skyreels.skyreels.runtime import TorchRuntime
from comfyui_skyreels.skyreels.sampling import evaluator as module
from comfyui_skyreels.skyreels.sampling.evaluator import Evaluator
from comfyui_skyreels.skyreels.sampling.settings import get_sigmas
from comfyui_skyreels.skyreels.weights.load import load_transformer
from comfyui_skyreels.skyreels.weights.lora.apply import AppliedLora
from comfyui_skyreels.skyreels.weights.lora.read import load_lora
from support import lora, tiny
from support.tiny import embeds

pytestmark = pytest.mark.usefixtures("few_objects")

PROMPT, LONGER = embeds(7, 1), embeds(11, 2)
SIGMAS = get_sigmas(3)
CONFIG = TransformerConfig(**{**tiny.TRANSFORMER.__dict__, "num_layers": 2, "num_single_layers": 3})
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.fixture(scope="module")
def model():
    return tiny.transformer(CONFIG)


def latents(frames=2, height=4):
    return torch.randn(1, 32, frames, height, 6, generator=torch.Generator().manual_seed(3))


def expected(model, hidden_states, timestep, prompt, guidance_scale=1.0):
    with torch.inference_mode():
        return model(
            hidden_states,
            torch.tensor([timestep]),
            prompt.prompt_embeds,
            prompt.pooled_prompt_embeds,
            torch.tensor([guidance_scale * 1000]),
        )


@pytest.mark.parametrize("timestep", [float(SIGMAS[1] * 1000), 123.0], ids=["scheduled", "any"])
@pytest.mark.parametrize("guidance_scale", [1.0, 6.0])
def test_a_prediction_is_that_of_the_transformer(model, timestep, guidance_scale):
    with Evaluator(model, SIGMAS, runtime=TorchRuntime()) as evaluator:
        got = evaluator.predict(latents(), timestep, PROMPT, guidance_scale=guidance_scale)
    assert torch.equal(got, expected(model, latents(), timestep, PROMPT, guidance_scale))


def test_weights_are_placed_once_for_what_is_no_larger(model, monkeypatch):
    placed, opened = module.placed, []

    @contextmanager
    def counted(*args):
        opened.append(args)
        with placed(*args) as run_block:
            yield run_block

    monkeypatch.setattr(module, "placed", counted)
    with Evaluator(model, SIGMAS, runtime=TorchRuntime()) as evaluator:
        for hidden_states, prompt in (
            (latents(2), PROMPT),
            (latents(2), PROMPT),
            (latents(1), LONGER),  # fewer tokens in all, of other shapes
            (latents(2), LONGER),
            (latents(2), PROMPT),
        ):
            got = evaluator.predict(hidden_states, 500.0, prompt)
            assert torch.equal(got, expected(model, hidden_states, 500.0, prompt))
    assert len(opened) == 2


def test_text_is_embedded_once_for_the_whole_schedule(model):
    calls = []
    hook = model.txt_in.register_forward_hook(lambda *_: calls.append(1))
    try:
        with Evaluator(model, SIGMAS, runtime=TorchRuntime()) as evaluator:
            for sigma in SIGMAS[:-1]:
                for prompt in (PROMPT, LONGER):
                    evaluator.predict(latents(), float(sigma * 1000), prompt)
    finally:
        hook.remove()
    # the longer prompt needs a larger placement, which begins anew
    assert len(calls) <= 3 * (len(SIGMAS) - 1)


def test_memory_that_runs_out_costs_a_rung_and_no_result(model):
    attempts = iter([FULL, None])

    def fail(*_):
        if error := next(attempts, None):
            raise error

    hook = model.single_blocks[1].register_forward_pre_hook(fail)
    try:
        with Evaluator(model, SIGMAS, runtime=TorchRuntime()) as evaluator:
            got = evaluator.predict(latents(), 500.0, PROMPT)
    finally:
        hook.remove()
    torch.testing.assert_close(got, expected(model, latents(), 500.0, PROMPT), rtol=0, atol=1e-5)


def test_what_never_fits_is_explained_and_the_next_prediction_is_good(model):
    hook = model.double_blocks[0].register_forward_pre_hook(raising)
    evaluator = Evaluator(model, SIGMAS, runtime=TorchRuntime())
    try:
        with pytest.raises(OutOfRoomError, match="Memory ran out in a step"):
            evaluator.predict(latents(), 500.0, PROMPT)
    finally:
        hook.remove()
    with evaluator:
        got = evaluator.predict(latents(), 500.0, PROMPT)
    assert torch.equal(got, expected(model, latents(), 500.0, PROMPT))


def raising(*_):
    raise FULL


def test_cancel_leaves_every_weight_where_it_was(model):
    class Cancelled(Exception):  # noqa: N818 - as hosts name it
        pass

    class Runtime(TorchRuntime):
        checks = 0

        def check_interrupt(self):
            self.checks += 1
            if self.checks > 12:
                raise Cancelled

    homes = [tensor.data_ptr() for tensor in model.parameters()]
    with (
        pytest.raises(Cancelled),
        Evaluator(model, SIGMAS, runtime=Runtime()) as evaluator,
    ):
        while True:
            evaluator.predict(latents(), 500.0, PROMPT)
    assert [tensor.data_ptr() for tensor in model.parameters()] == homes


def test_replaced_blocks_run_in_place_of_the_models(model):
    skipped = model.double_blocks[1]

    def wrap(run_block):
        def run(block, *args):
            return args[:2] if block is skipped else run_block(block, *args)

        return run

    class Skips(torch.nn.Module):
        modulations = skipped.modulations

        def forward(self, *args):
            return args[:2]

    with Evaluator(model, SIGMAS, runtime=TorchRuntime()) as evaluator:
        got = evaluator.predict(latents(), 500.0, PROMPT, wrap=wrap)
    model.double_blocks[1] = Skips()
    try:
        assert torch.equal(got, expected(model, latents(), 500.0, PROMPT))
    finally:
        model.double_blocks[1] = skipped


def test_loras_act_while_they_are_asked_for(model, tmp_path):
    parts = lora.draw_parts(CONFIG)
    loaded = load_lora(lora.write("diffusion-pipe", parts, tmp_path), CONFIG)
    saved = tiny.save(tmp_path / "model.safetensors", model.state_dict())
    model = load_transformer(saved, precision="fp32", runtime=TorchRuntime())
    plain = expected(model, latents(), 500.0, PROMPT)
    for loras in ([AppliedLora(loaded)], []):
        with Evaluator(model, SIGMAS, runtime=TorchRuntime(), loras=loras) as evaluator:
            got = evaluator.predict(latents(), 500.0, PROMPT)
        assert torch.equal(got, expected(model, latents(), 500.0, PROMPT))
        assert torch.equal(got, plain) == (not loras)


def test_two_that_take_turns_on_one_transformer_are_both_right(model, tmp_path):
    lora_file = lora.write("diffusion-pipe", lora.draw_parts(CONFIG), tmp_path)
    loras = [AppliedLora(load_lora(lora_file, CONFIG))]
    saved = tiny.save(tmp_path / "model.safetensors", model.state_dict())
    shared = load_transformer(saved, precision="fp32", runtime=TorchRuntime())
    plain = expected(shared, latents(), 500.0, PROMPT)
    with (
        Evaluator(shared, SIGMAS, runtime=TorchRuntime()) as one,
        Evaluator(shared, SIGMAS, runtime=TorchRuntime(), loras=loras) as other,
    ):
        first, changed, again = (
            each.predict(latents(), 500.0, PROMPT) for each in (one, other, one)
        )
    assert torch.equal(first, plain)
    assert torch.equal(again, plain)
    assert not torch.equal(changed, plain)


def test_latents_of_another_model_are_refused(model):
    with (
        Evaluator(model, SIGMAS, runtime=TorchRuntime()) as evaluator,
        pytest.raises(ShapeError, match="32"),
    ):
        evaluator.predict(latents()[:, :16], 500.0, PROMPT)
