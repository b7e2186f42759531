"""Text and time computed once for a schedule, and the equalities that a faster run relies on.

Equalities are shown in float64, where rounding cannot hide a mistake.
"""

import logging

import pytest
import torch
from comfyui_skyreels.skyreels.conditioning.embeds import PromptEmbeds
from comfyui_skyreels.skyreels.config import CHUNKINGS, Chunking, TransformerConfig
from comfyui_skyreels.skyreels.runtime import TorchRuntime
from comfyui_skyreels.skyreels.sampling import precompute as modulation
from comfyui_skyreels.skyreels.sampling.precompute import host_memory, pack, precompute, unpack
from comfyui_skyreels.skyreels.sampling.settings import get_sigmas
from comfyui_skyreels.skyreels.transformer.attention import sdpa
from comfyui_skyreels.skyreels.transformer.model import StepModulation, call
from comfyui_skyreels.skyreels.transformer.quant import is_quantizable
from support import tiny

GUIDANCE = torch.tensor([1000.0])


def prompts_of(model, *lengths):
    generator = torch.Generator().manual_seed(3)
    config = model.config
    return [
        PromptEmbeds(
            torch.randn(1, length, config.text_embed_dim, generator=generator),
            torch.randn(1, config.pooled_projection_dim, generator=generator),
        )
        for length in lengths
    ]


def timesteps_of(steps=4):
    return (get_sigmas(steps)[:-1] * 1000).tolist()


def leaves(conditioning):
    return [conditioning.text, *(row for rows in conditioning.mods for row in rows)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precomputed_conditioning_has_the_bits_of_every_step(dtype):
    model = tiny.transformer().to(dtype)
    prompts = prompts_of(model, 7, 5)
    lookup = precompute(
        model, prompts, timesteps_of(), GUIDANCE, attention=sdpa, runtime=TorchRuntime()
    )
    for which, prompt in enumerate(prompts):
        for t in timesteps_of():
            expected = model.condition(
                torch.tensor([t]), prompt.prompt_embeds, prompt.pooled_prompt_embeds, GUIDANCE
            )
            found = lookup(which, t, call)
            assert all(map(torch.equal, leaves(found), leaves(expected)))


def test_the_loop_needs_no_conditioner():
    model = tiny.transformer()
    (prompt,) = prompts_of(model, 7)
    inputs = tiny.inputs(model.config)
    timestep = timesteps_of()[1]
    expected = model(
        inputs["hidden_states"], torch.tensor([timestep]), prompt.prompt_embeds,
        prompt.pooled_prompt_embeds,
    )  # fmt: skip
    lookup = precompute(
        model, [prompt], timesteps_of(), GUIDANCE, attention=sdpa, runtime=TorchRuntime()
    )
    for module in model.conditioners:
        for parameter in module.parameters():
            parameter.data = torch.full_like(parameter, torch.nan)
    found = model.denoise(inputs["hidden_states"], lookup(0, timestep, call))
    assert torch.equal(found, expected)


def test_a_time_outside_the_schedule_brings_the_weights_back():
    model = tiny.transformer()
    (prompt,) = prompts_of(model, 7)
    lookup = precompute(
        model, [prompt], timesteps_of(), GUIDANCE, attention=sdpa, runtime=TorchRuntime()
    )
    seen = []

    def run_block(module, *args):
        seen.append(module)
        return module(*args)

    lookup(0, timesteps_of()[0], run_block)
    assert seen == []
    found = lookup(0, 123.25, run_block)
    assert list(map(id, seen)) == list(map(id, model.conditioners))
    expected = model.condition(
        torch.tensor([123.25]), prompt.prompt_embeds, prompt.pooled_prompt_embeds, GUIDANCE
    )
    assert all(map(torch.equal, leaves(found), leaves(expected)))


def test_a_schedule_longer_than_what_is_kept_is_right_too(monkeypatch):
    monkeypatch.setattr(modulation, "MAX_KEPT", 3)
    model = tiny.transformer()
    (prompt,) = prompts_of(model, 7)
    lookup = precompute(
        model, [prompt], timesteps_of(), GUIDANCE, attention=sdpa, runtime=TorchRuntime()
    )
    timestep = timesteps_of()[3]
    expected = model.condition(
        torch.tensor([timestep]), prompt.prompt_embeds, prompt.pooled_prompt_embeds, GUIDANCE
    )
    assert all(map(torch.equal, leaves(lookup(0, timestep, call)), leaves(expected)))


def test_each_conditioner_visits_the_device_once_and_stop_is_asked_for(monkeypatch):
    model = tiny.transformer()
    visits, checks = [], []
    on_device = modulation.on_device

    def visit(module, device):
        visits.append(id(module))
        return on_device(module, device)

    monkeypatch.setattr(modulation, "on_device", visit)
    runtime = TorchRuntime(on_check=lambda: checks.append(1))
    precompute(
        model, prompts_of(model, 7, 5), timesteps_of(), GUIDANCE, attention=sdpa, runtime=runtime
    )
    assert sorted(visits) == sorted(map(id, model.conditioners))
    assert len(checks) >= len(model.blocks)


def test_no_weight_that_is_rounded_to_8_bits_is_a_conditioner():
    model = tiny.transformer()
    apart = {id(p) for module in model.conditioners for p in module.parameters()}
    for name, parameter in model.named_parameters():
        assert not (is_quantizable(name, 2) and id(parameter) in apart), name


# --- one piece of memory for each step ------------------------------------------------------------


def odd_sizes(dtype):
    """A step of sizes that are no multiples of 16 bytes."""
    generator = torch.Generator().manual_seed(4)
    text, *rows = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((1, 3, 7), (1, 1, 5), (1, 1, 9), (1, 1, 1), (2, 13))
    )
    return StepModulation(text, ((rows[0], rows[1]), (rows[2],), (rows[3],)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_was_packed_has_its_bits_shapes_and_order_at_addresses_kernels_can_load_from(dtype):
    step = odd_sizes(dtype)
    found = unpack(pack(step, torch.device("cpu")), step)
    assert [len(block) for block in found.mods] == [2, 1, 1]
    for view, expected in zip(leaves(found), leaves(step), strict=True):
        assert torch.equal(view, expected) and view.dtype == dtype
        assert view.data_ptr() % 16 == 0 and view.is_contiguous()
    # without the padding they would not be
    sizes = torch.tensor([part.nbytes for part in leaves(step)])
    assert (sizes.cumsum(0) % 16).any()


def test_what_is_packed_may_hold_nan_and_infinity():
    step = odd_sizes(torch.float32)
    step.text[0, 0, :2] = torch.tensor([torch.nan, torch.inf])
    found = unpack(pack(step, torch.device("cpu")), step)
    assert torch.equal(found.text.view(torch.int32), step.text.view(torch.int32))


def test_prompts_of_other_lengths_and_steps_share_no_memory():
    model = tiny.transformer()
    lookup = precompute(
        model, prompts_of(model, 7, 5), timesteps_of(), GUIDANCE, attention=sdpa,
        runtime=TorchRuntime(),
    )  # fmt: skip
    steps = [lookup(which, t, call) for which in (0, 1) for t in timesteps_of()]
    assert [step.text.shape[1] for step in steps] == [7] * 4 + [5] * 4
    for step in steps:
        whole = {part.untyped_storage().data_ptr() for part in leaves(step)}
        assert len(whole) == 1
        assert all(part.data_ptr() % 16 == 0 for part in leaves(step))
    assert len({step.text.untyped_storage().data_ptr() for step in steps}) == 8


def test_memory_for_a_gpu_is_pinned(monkeypatch):
    pinned, empty = [], torch.empty

    def noted(*args, pin_memory=False, **kwargs):
        pinned.append(pin_memory)
        return empty(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", noted)
    for device in ("cuda", "cpu", "mps"):
        place = host_memory(12, torch.bfloat16, torch.device(device))
        assert (place.device.type, place.shape, place.dtype) == ("cpu", (12,), torch.bfloat16)
    assert pinned == [True, False, False]


def test_memory_that_cannot_be_pinned_is_pageable_and_that_is_said_once(monkeypatch, caplog):
    empty = torch.empty

    def refused(*args, pin_memory=False, **kwargs):
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory\nand a long explanation")
        return empty(*args, **kwargs)

    monkeypatch.setattr(modulation.dispatch, "_logged", set())
    monkeypatch.setattr(torch, "empty", refused)
    step = odd_sizes(torch.bfloat16)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            found = unpack(pack(step, torch.device("cuda")), step)
            assert all(map(torch.equal, leaves(found), leaves(step)))
    assert len(caplog.messages) == 1
    words = "pinned, so each step waits for its copy: RuntimeError: CUDA error: out of memory."
    assert caplog.messages[0].endswith(words)


def test_a_run_packs_for_the_device_it_runs_on(monkeypatch):
    wanted = []
    monkeypatch.setattr(
        modulation, "host_memory",
        lambda numel, dtype, device: wanted.append(device) or torch.empty(numel, dtype=dtype),
    )  # fmt: skip
    model, runtime = tiny.transformer(), TorchRuntime()
    precompute(
        model, prompts_of(model, 7), timesteps_of(), GUIDANCE, attention=sdpa, runtime=runtime
    )
    assert len(wanted) == 4 and all(device is runtime.device for device in wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gets_a_step_in_one_copy_that_the_host_does_not_wait_for():
    step, device = odd_sizes(torch.bfloat16), torch.device("cuda", 0)
    packed = pack(step, device)
    assert packed.is_pinned()
    found = unpack(packed.to(device, non_blocking=True), step)
    for view, expected in zip(leaves(found), leaves(step), strict=True):
        assert view.data_ptr() % 16 == 0 and torch.equal(view.cpu(), expected)


# --- exactness, in float64 ----------------------------------------------------------------------


@pytest.fixture
def exact():
    """A tiny model and its inputs in float64."""
    model = tiny.transformer().double()
    keep = ("timestep", "guidance")
    inputs = tiny.inputs(model.config)
    return model, {k: v if k in keep else v.double() for k, v in inputs.items()}


@pytest.mark.parametrize("chunking", [*CHUNKINGS.values(), Chunking(5, 2), Chunking(200, 2)])
def test_chunkings_are_the_same_function(exact, chunking):
    model, inputs = exact
    found = model(**inputs, chunking=chunking)
    with torch.inference_mode():
        in_place = model(**inputs, chunking=chunking)
    assert found.dtype == torch.float64
    assert tiny.relative_error(found, model(**inputs)) <= 1e-12
    assert tiny.relative_error(in_place, found) <= 1e-12


def test_head_groups_need_not_divide_the_heads():
    config = TransformerConfig(**{**tiny.TRANSFORMER.__dict__, "num_attention_heads": 5})
    model = tiny.transformer(config).double()
    keep = ("timestep", "guidance")
    inputs = {k: v if k in keep else v.double() for k, v in tiny.inputs(config, batch=2).items()}
    with torch.inference_mode():
        found = model(**inputs, chunking=Chunking(4, 3))
        assert tiny.relative_error(found, model(**inputs)) <= 1e-12


def test_trimmed_text_is_padded_and_masked_text(exact):
    model, inputs = exact
    theirs = tiny.diffusers_transformer(tiny.transformer()).double()
    states = inputs["encoder_hidden_states"]
    padding = torch.randn(1, 11, states.shape[2], dtype=torch.float64)
    mask = torch.cat([torch.ones(1, states.shape[1]), torch.zeros(1, 11)], dim=1).long()
    masked = theirs(
        **{**inputs, "encoder_hidden_states": torch.cat([states, padding], dim=1)},
        encoder_attention_mask=mask, return_dict=False,
    )[0]  # fmt: skip
    trimmed = theirs(
        **inputs, encoder_attention_mask=mask[:, : states.shape[1]], return_dict=False
    )[0]
    assert tiny.relative_error(trimmed, masked) <= 1e-12
    # ours has float32 sinusoids and rotations of its own making
    assert tiny.relative_error(model(**inputs), masked) <= 1e-6


def test_two_branches_one_after_the_other_are_a_batch_of_two(exact):
    model, inputs = exact
    other = {k: torch.randn_like(v) if "projections" in k or "states" in k else v
             for k, v in inputs.items()}  # fmt: skip
    other["hidden_states"] = inputs["hidden_states"]
    both = {k: torch.cat([v, other[k]]) for k, v in inputs.items()}
    split = torch.cat([model(**inputs), model(**other)])
    assert tiny.relative_error(model(**both), split) <= 1e-12
