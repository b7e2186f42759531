"""Prompt embeddings are checked and cut; a prompt names its frame rate."""

import logging
from dataclasses import replace

import pytest
import torch
from comfyui_skyreels.skyreels.conditioning import embeds as text_embeds
from comfyui_skyreels.skyreels.conditioning.embeds import PromptEmbeds
from comfyui_skyreels.skyreels.config import TransformerConfig
from comfyui_skyreels.skyreels.errors import TextError

CONFIG = TransformerConfig(text_embed_dim=24, pooled_projection_dim=12)


def embeds(tokens: int = 5, width: int = 24, pooled: int = 12) -> PromptEmbeds:
    return PromptEmbeds(torch.ones(1, tokens, width), torch.ones(1, pooled))


def test_fitting_embeds_pass():
    text_embeds.check_prompt_embeds(embeds(), CONFIG)


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (embeds(width=17), ("17", "24", "T5", "Encode the prompt with LLaMA-3")),
        (embeds(tokens=0), ("no token", "Encode the prompt again")),
        (replace(embeds(), pooled_prompt_embeds=None), ("no pooled", "T5", "with CLIP-L")),
        (embeds(pooled=20), ("[1, 20]", "[1, 12]", "with CLIP-L")),
        (replace(embeds(), prompt_embeds=torch.ones(5, 24)), ("[5, 24]", "[1, tokens, 24]")),
        (replace(embeds(), prompt_embeds=torch.ones(2, 5, 24)), ("[2, 5, 24]",)),
        (replace(embeds(), prompt_embeds=[1.0]), ("a list",)),
        (replace(embeds(), prompt_embeds=torch.full((1, 5, 24), torch.nan)), ("NaN", "bf16")),
        (replace(embeds(), pooled_prompt_embeds=torch.full((1, 12), torch.inf)), ("pooled",)),
    ],
)
def test_embeds_that_do_not_fit_are_refused_with_what_and_fix(broken, words):
    with pytest.raises(TextError) as raised:
        text_embeds.check_prompt_embeds(broken, CONFIG)
    assert [word for word in words if word not in str(raised.value)] == []


def test_long_embeds_are_cut_to_256_tokens_with_one_warning(caplog):
    states = torch.arange(300.0).reshape(1, 300, 1)
    with caplog.at_level(logging.WARNING):
        cut = text_embeds.trim(PromptEmbeds(states, torch.ones(1, 12)))
    assert torch.equal(cut.prompt_embeds, states[:, :256])
    assert [record.getMessage().count("300") for record in caplog.records] == [1]


def test_embeds_of_256_tokens_are_left_alone_without_a_warning(caplog):
    whole = embeds(tokens=256)
    with caplog.at_level(logging.WARNING):
        assert text_embeds.trim(whole) is whole
    assert caplog.records == []


@pytest.mark.parametrize("prompt", ["FPS-24, a cat", "fps-30,a cat", "  FPS-8 , a cat"])
def test_a_named_frame_rate_is_kept(prompt):
    assert text_embeds.with_fps_prefix(prompt) == prompt


@pytest.mark.parametrize("prompt", ["a cat", "", "a cat at FPS-24, slow", "FPS-, a cat"])
def test_the_frame_rate_is_added_in_front(prompt):
    assert text_embeds.with_fps_prefix(prompt) == "FPS-24, " + prompt
