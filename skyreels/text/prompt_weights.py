r"""Weights in a prompt, `(word:1.2)`, read and applied as ComfyUI's core does.

Parentheses multiply by 1.1, nested ones again; a number after a colon replaces that. `\(` and `\)`
are parentheses. Each run of one weight becomes tokens by itself. A state of the language model is
moved away from, or towards, the state of an empty text at its place. CLIP's pooled state takes the
words without their weights: so does core.

Source: comfy/sd1_clip.py of ComfyUI, `SDTokenizer` and `ClipTokenWeightEncoder`.
"""

import contextlib
import math
from typing import Any

import torch
from torch import Tensor

from ..errors import TextError

_OPEN, _CLOSE = "\0\2", "\0\1"
#: core keeps a shorter run of tokens together when CLIP's context ends in it
_LONG_RUN = 8


def parse_weights(text: str) -> list[tuple[str, float]]:
    """The runs of a text that have one weight each.

    Args:
        text: any; what is not a weight stays as it is.

    Returns:
        Runs and weights, in order; at least one.

    Raises:
        TextError: a weight that is infinite or not a number.
    """
    escaped = text.replace("\\)", _CLOSE).replace("\\(", _OPEN)
    runs = [
        (run.replace(_CLOSE, ")").replace(_OPEN, "("), weight)
        for run, weight in _weighted(escaped, 1.0)
    ]
    for run, weight in runs:
        if not math.isfinite(weight):
            raise TextError(f"Weight {weight} of {run!r} in the prompt is not a number: use 1.1.")
    return runs or [("", 1.0)]


def is_plain(text: str) -> bool:
    """Whether a text means itself: without weights and escapes."""
    return parse_weights(text) == [(text, 1.0)]


def _weighted(text: str, weight: float) -> list[tuple[str, float]]:
    runs: list[tuple[str, float]] = []
    for piece in _outer_groups(text):
        if not (len(piece) > 1 and piece[0] == "(" and piece[-1] == ")"):
            runs.append((piece, weight))
            continue
        inner, own = piece[1:-1], weight * 1.1
        words, _, number = inner.rpartition(":")
        if words:
            with contextlib.suppress(ValueError):  # a colon of the text
                own = float(number)
                inner = words
        runs += _weighted(inner, own)
    return runs


def _outer_groups(text: str) -> list[str]:
    """Cut around each outermost pair of parentheses, which stays whole."""
    pieces, start, depth = [], 0, 0
    for place, char in enumerate(text):
        if char == "(":
            if depth == 0:
                pieces.append(text[start:place])
                start = place
            depth += 1
        elif char == ")":
            depth -= 1
            if depth == 0:
                pieces.append(text[start : place + 1])
                start = place + 1
    return [piece for piece in (*pieces, text[start:]) if piece]


def weighted_ids(tokenizer: Any, text: str) -> tuple[list[int], list[float]]:
    """The language model's tokens of a text with weights, and their weights.

    Args:
        tokenizer: of the language model.
        text: with its template.

    Returns:
        Tokens with those that begin every text, and one weight for each.
    """
    ids = list(tokenizer("")["input_ids"])
    weights = [1.0] * len(ids)
    for run, weight in parse_weights(text):
        tokens = tokenizer(run, add_special_tokens=False)["input_ids"]
        ids += tokens
        weights += [weight] * len(tokens)
    return ids, weights


def clip_ids(tokenizer: Any, text: str, length: int) -> list[int]:
    """CLIP's tokens of a text whose weights it does not take.

    Args:
        tokenizer: of CLIP.
        text: without a template.
        length: of its context.

    Returns:
        `length` tokens, filled up.
    """
    first, *_, last = tokenizer("")["input_ids"]
    ids = [first]
    for run, _ in parse_weights(text):
        tokens = tokenizer(run, add_special_tokens=False)["input_ids"]
        room = length - 1 - len(ids)
        if len(tokens) > room:
            ids += tokens[:room] if len(tokens) >= _LONG_RUN else []
            break
        ids += tokens
    ids.append(last)
    return ids + [tokenizer.pad_token_id] * (length - len(ids))


def apply_weights(states: Tensor, empty: Tensor, weights: list[float]) -> Tensor:
    """Move states away from those of an empty text, or towards them.

    Args:
        states: [1, n, text_dim].
        empty: [1, n, text_dim], of the empty text.
        weights: n of them; 1 changes nothing.

    Returns:
        [1, n, text_dim] float32.
    """
    states, empty = states.float(), empty.float()
    scale = torch.tensor(weights, device=states.device)[None, :, None]
    return torch.where(scale == 1, states, (states - empty) * scale + empty)
