"""Weights in a prompt: how they are read, and what they do to the states."""

import pytest
import torch
from comfyui_skyreels.skyreels.builtin import builtin_text_encoder
from comfyui_skyreels.skyreels.errors import TextError
from comfyui_skyreels.skyreels.runtime import TorchRuntime
from comfyui_skyreels.skyreels.text.encode import encode_prompt
from comfyui_skyreels.skyreels.text.prompt_weights import (
    apply_weights,
    clip_ids,
    is_plain,
    parse_weights,
)


@pytest.fixture(scope="module")
def encoder():
    return builtin_text_encoder(runtime=TorchRuntime())


def encode(encoder, text):
    return encode_prompt(encoder, text, fps_prefix=False, runtime=TorchRuntime())


@pytest.mark.parametrize(
    ("text", "runs"),
    [
        ("a cat", [("a cat", 1.0)]),
        ("", [("", 1.0)]),
        ("a (cat:1.2) walks", [("a ", 1.0), ("cat", 1.2), (" walks", 1.0)]),
        ("(cat)", [("cat", 1.1)]),
        ("((cat))", [("cat", 1.1 * 1.1)]),
        ("((cat:2) dog)", [("cat", 2.0), (" dog", 1.1)]),
        ("(a: b)", [("a: b", 1.1)]),
        (r"\(cat\) walks", [("(cat) walks", 1.0)]),
        (r"(\(cat\):1.5)", [("(cat)", 1.5)]),
        ("(cat", [("(cat", 1.0)]),
        ("at 4:30 )", [("at 4:30 )", 1.0)]),
    ],
)
def test_a_prompt_is_read_as_runs_of_one_weight(text, runs):
    assert parse_weights(text) == runs
    assert is_plain(text) == (runs == [(text, 1.0)])


@pytest.mark.parametrize("weight", ["nan", "inf", "-inf"])
def test_a_weight_that_is_no_number_is_refused(encoder, weight):
    with pytest.raises(TextError, match="is not a number"):
        encode(encoder, f"a (cat:{weight})")


def test_states_move_away_from_the_empty_text():
    states, empty = torch.randn(2, 1, 3, 5)
    moved = apply_weights(states, empty, [1.0, 0.0, 2.0])
    assert torch.equal(moved[:, 0], states[:, 0])
    torch.testing.assert_close(moved[:, 1], empty[:, 1])
    torch.testing.assert_close(moved[:, 2], 2 * states[:, 2] - empty[:, 2])


def test_only_weighed_words_and_what_follows_them_change(encoder):
    plain, weighed = encode(encoder, "a red circle"), encode(encoder, "a( red:1.4) circle")
    assert weighed.prompt_embeds.shape == plain.prompt_embeds.shape
    assert not torch.allclose(weighed.prompt_embeds, plain.prompt_embeds)
    assert torch.equal(weighed.pooled_prompt_embeds, plain.pooled_prompt_embeds)
    differs = (weighed.prompt_embeds - plain.prompt_embeds).abs().amax((0, 2)) > 1e-4
    assert int(differs.sum()) == 1


def test_a_weight_of_one_and_escapes_are_the_words_themselves(encoder):
    plain = encode(encoder, "a red circle")
    one = encode(encoder, "a( red:1.0) circle")
    torch.testing.assert_close(one.prompt_embeds, plain.prompt_embeds, atol=1e-5, rtol=1e-5)
    escaped = encode(encoder, r"a \(red\) circle")
    assert escaped.prompt_embeds.shape[1] > plain.prompt_embeds.shape[1]


class Letters:
    pad_token_id = 0

    def __call__(self, text, add_special_tokens=True):
        ids = [ord(char) for char in text]
        return {"input_ids": [1, *ids, 2] if add_special_tokens else ids}


def test_a_short_run_that_does_not_fit_clips_context_stays_whole_in_the_next():
    assert clip_ids(Letters(), "abc(de)", 10) == [1, *map(ord, "abcde"), 2, 0, 0, 0]
    assert clip_ids(Letters(), "abcdef(ghij)", 10) == [1, *map(ord, "abcdef"), 2, 0, 0]
    assert clip_ids(Letters(), "abcdef(ghijklmno)", 10) == [1, *map(ord, "abcdefgh"), 2]
