"""Encode prompts: the language model layer by layer where it does not fit, and results cached."""

import hashlib
import logging
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..conditioning.embeds import PromptEmbeds, warn_truncated, with_fps_prefix
from ..config import MAX_TEXT_TOKENS
from ..errors import OutOfRoomError, TextError, shown
from ..runtime import Runtime
from ..runtime.ladder import retried
from ..runtime.offload import missing_bytes, on_device, weight_bytes
from .load import TextEncoder
from .prompt_weights import apply_weights, clip_ids, is_plain, weighted_ids

logger = logging.getLogger("skyreels.text.encode")

#: the default negative prompt of the official pipeline, which says "aerial view" twice too
#: Source: SkyworkAI/SkyReels-V1 @cb0ceaa, negative_prompt of its pipeline
DEFAULT_NEGATIVE_PROMPT = (
    "Aerial view, aerial view, overexposed, low quality, deformation, a poor composition, "
    "bad hands, bad teeth, bad eyes, bad limbs, distortion"
)

#: context of CLIP-L
MAX_CLIP_TOKENS = 77
#: words of a prompt that a message names
_MAX_NAMED = 12
#: prompts kept in memory: 4 MB each at most
_CACHE_ENTRIES = 32

_cache: OrderedDict[str, PromptEmbeds] = OrderedDict()
_cache_lock = threading.Lock()


def encode_prompt(
    encoder: TextEncoder,
    prompt: str,
    *,
    fps_prefix: bool = True,
    cache_dir: Path | None = None,
    runtime: Runtime,
) -> PromptEmbeds:
    r"""Encode a prompt for the transformer, or return the cached result of the same prompt.

    The final text goes to both encoders, as in diffusers. A language model that does not fit on
    `runtime.device` is onloaded layer by layer.

    Args:
        encoder: from `load_text_encoder`, on any device; back there afterwards.
        prompt: any text, may be empty; braces have no meaning. `(word:1.2)` weighs words as in
            ComfyUI, see weights.py; write parentheses that mean themselves as `\(` and `\)`.
        fps_prefix: put "FPS-24, " in front unless the prompt names a frame rate. Pass False for the
            negative prompt: the official pipeline uses it without the prefix.
        cache_dir: folder that keeps results beyond this process, one file each.
        runtime: progress "encode" in layers; asked for an interrupt before each layer and CLIP.

    Returns:
        At most 256 tokens of the prompt and the end of its turn, and the pooled state; a longer
        prompt is cut, with a warning.

    Raises:
        OutOfRoomError: not even one layer fits on the device.
        TextError: the prompt contains an unpaired surrogate.
    """
    text = with_fps_prefix(prompt) if fps_prefix else prompt
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TextError(
            f"Character {error.start + 1} of the prompt is an unpaired surrogate (invalid "
            "Unicode): re-type it."
        ) from None
    _warn_of_unknown(encoder, prompt, runtime)
    key = _cache_key(encoder.fingerprint, text)
    if (cached := _find_cached(key, cache_dir)) is not None:
        if cache_dir is not None and not _cache_path(key, cache_dir).is_file():
            _write_cache(_cache_path(key, cache_dir), cached)
        return cached

    runtime.check_interrupt()
    with torch.inference_mode(False), torch.no_grad():
        states = retried(
            partial(_language_states, encoder, text, runtime),
            runtime,
            weight_bytes(encoder.llm),
            "Encoding the text",
        )
        runtime.check_interrupt()
        pooled = _pooled_state(encoder, text, runtime)
    embeds = PromptEmbeds(states.float().cpu(), pooled.float().cpu())
    _remember(key, PromptEmbeds(embeds.prompt_embeds.clone(), embeds.pooled_prompt_embeds.clone()))
    if cache_dir is not None:
        _write_cache(_cache_path(key, cache_dir), embeds)
    return embeds


def _warn_of_unknown(encoder: TextEncoder, prompt: str, runtime: Runtime) -> None:
    """Name the words of a prompt that mean nothing to the encoder, in one warning."""
    words = dict.fromkeys(re.findall(r"[^\W\d_]+", prompt.lower()))
    unknown = [word for word in words if word not in encoder.known_words]
    if not encoder.known_words or not unknown:
        return
    named = ", ".join(unknown[:_MAX_NAMED]) + (", ..." if len(unknown) > _MAX_NAMED else "")
    text = (
        f"The built-in model does not know {shown(named, 300)}: it reads prompts like "
        '"a red circle moves left".'
    )
    logger.warning(text)
    runtime.note(text)


def cached_prompt(
    fingerprint: str, prompt: str, *, fps_prefix: bool = True, cache_dir: Path | None = None
) -> PromptEmbeds | None:
    """Look up the result of an earlier `encode_prompt`.

    Args:
        fingerprint: of a `TextEncoder`, or from `fingerprint_text_encoder`.
        prompt: as for `encode_prompt`.
        fps_prefix: as for `encode_prompt`.
        cache_dir: as for `encode_prompt`.

    Returns:
        None if the prompt is neither in memory nor in `cache_dir`.
    """
    text = with_fps_prefix(prompt) if fps_prefix else prompt
    return _find_cached(_cache_key(fingerprint, text), cache_dir)


def _language_states(encoder: TextEncoder, text: str, runtime: Runtime) -> Tensor:
    """Encode with the language model: [1, n, text_dim], n <= 256 without the template's tokens."""
    full = encoder.template.replace("{}", text)
    if not is_plain(text):
        return _weighted_states(encoder, full, runtime)
    ids = encoder.llm_tokenizer(full)["input_ids"]
    limit = MAX_TEXT_TOKENS + encoder.crop_start
    if len(ids) > limit:
        warn_truncated(len(ids) - encoder.crop_start, MAX_TEXT_TOKENS)
        ids = encoder.llm_tokenizer(full, max_length=limit, truncation=True)["input_ids"]
    input_ids = torch.tensor([ids], device=runtime.device)
    with _onloaded(encoder.llm, runtime):
        states: Tensor = encoder.llm(input_ids=input_ids, use_cache=False).last_hidden_state
    return states[:, encoder.crop_start :]


def _weighted_states(encoder: TextEncoder, full: str, runtime: Runtime) -> Tensor:
    """As `_language_states`, of a text with weights or escapes."""
    tokenizer, limit = encoder.llm_tokenizer, MAX_TEXT_TOKENS + encoder.crop_start
    ids, weights = weighted_ids(tokenizer, full)
    if len(ids) > limit:
        warn_truncated(len(ids) - encoder.crop_start, MAX_TEXT_TOKENS)
        ids, weights = ids[:limit], weights[:limit]
    if all(weight == 1.0 for weight in weights):
        input_ids = torch.tensor([ids], device=runtime.device)
        with _onloaded(encoder.llm, runtime):
            found: Tensor = encoder.llm(input_ids=input_ids, use_cache=False).last_hidden_state
        return found[:, encoder.crop_start :]
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    both = torch.tensor([ids, [ids[0], *[pad] * (len(ids) - 1)]], device=runtime.device)
    mask = torch.ones_like(both)
    mask[1, 1:] = 0
    with _onloaded(encoder.llm, runtime):
        states: Tensor = encoder.llm(
            input_ids=both, attention_mask=mask, use_cache=False
        ).last_hidden_state
    return apply_weights(states[:1], states[1:], weights)[:, encoder.crop_start :]


def _pooled_state(encoder: TextEncoder, text: str, runtime: Runtime) -> Tensor:
    """Encode with CLIP: [1, pooled_dim], the state at end of text after the final norm."""
    if is_plain(text):
        ids = encoder.clip_tokenizer(
            text, padding="max_length", max_length=MAX_CLIP_TOKENS, truncation=True
        )["input_ids"]
    else:
        ids = clip_ids(encoder.clip_tokenizer, text, MAX_CLIP_TOKENS)
    input_ids = torch.tensor([ids], device=runtime.device)
    with runtime.place(encoder.clip, 0), on_device(encoder.clip, runtime.device):
        pooled: Tensor = encoder.clip(input_ids=input_ids).pooler_output
    return pooled


@contextmanager
def _onloaded(llm: Any, runtime: Runtime) -> Iterator[None]:
    """Keep the language model on `runtime.device`: whole if it fits, else one layer at a time.

    Each layer reports progress and checks for an interrupt. Afterwards the weights are where they
    were, after an error too.
    """
    layers = list(llm.layers)
    is_streamed = not _fits(llm, runtime)
    resident = [llm]
    if is_streamed:
        resident = [child for name, child in llm.named_children() if name != "layers"]
    with ExitStack() as stack:
        for module in resident:
            stack.enter_context(on_device(module, runtime.device))
        current_layer = stack.enter_context(ExitStack())

        def before_layer(index: int, layer: nn.Module, _: Any) -> None:
            runtime.check_interrupt()
            runtime.progress("encode", index, len(layers))
            if is_streamed:
                current_layer.enter_context(on_device(layer, runtime.device))

        def after_layer(*_: Any) -> None:
            current_layer.close()

        for index, layer in enumerate(layers):
            hook = partial(before_layer, index)
            stack.callback(layer.register_forward_pre_hook(hook).remove)
            stack.callback(layer.register_forward_hook(after_layer).remove)
        yield
        runtime.progress("encode", len(layers), len(layers))


def _fits(llm: Any, runtime: Runtime) -> bool:
    """Make room for the language model; whether all of it fits, and not just layer by layer."""
    if not missing_bytes(llm, runtime.device):
        return True
    total = weight_bytes(llm)
    whole = int(1.1 * total)  # activations of 351 tokens are small beside the weights
    runtime.make_room(whole)
    free = runtime.free_bytes()
    in_layers = sum(weight_bytes(layer) for layer in llm.layers)
    least = total - in_layers + in_layers // len(llm.layers)
    if free < least:
        raise OutOfRoomError(
            f"The text encoder needs {least / 1e9:.1f} GB on {runtime.device} even layer by layer, "
            f"and {free / 1e9:.1f} GB are free: close other programs, or encode on the CPU."
        )
    return free >= whole


def _cache_key(fingerprint: str, text: str) -> str:
    if not is_plain(text):  # earlier versions took weights for words
        fingerprint = f"{fingerprint}\0weights"
    return hashlib.sha256(f"{fingerprint}\0{text}".encode("utf-8", "surrogatepass")).hexdigest()


def _find_cached(key: str, cache_dir: Path | None) -> PromptEmbeds | None:
    with _cache_lock:
        embeds = _cache.get(key)
        if embeds is not None:
            _cache.move_to_end(key)
    if embeds is None and cache_dir is not None:
        embeds = _read_cache(_cache_path(key, cache_dir))
        if embeds is not None:
            _remember(key, embeds)
    if embeds is None:
        return None
    # copies: a caller may write to its tensors
    return PromptEmbeds(embeds.prompt_embeds.clone(), embeds.pooled_prompt_embeds.clone())


def _remember(key: str, embeds: PromptEmbeds) -> None:
    with _cache_lock:
        _cache[key] = embeds
        _cache.move_to_end(key)
        while len(_cache) > _CACHE_ENTRIES:
            _cache.popitem(last=False)


def _cache_path(key: str, cache_dir: Path) -> Path:
    return Path(cache_dir) / f"{key}.safetensors"


def _read_cache(path: Path) -> PromptEmbeds | None:
    if not path.is_file():
        return None
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        # read, not memory-mapped: rewriting a mapped file would change the tensors
        tensors = load(path.read_bytes())
        states, pooled = tensors["prompt_embeds"], tensors["pooled_prompt_embeds"]
        is_prompt = (
            states.ndim == 3
            and states.shape[0] == 1
            and 1 <= states.shape[1] <= MAX_TEXT_TOKENS
            and pooled.ndim == 2
            and pooled.shape[0] == 1
            and states.dtype == pooled.dtype == torch.float32
        )
        if not is_prompt or not all(bool(t.isfinite().all()) for t in (states, pooled)):
            raise ValueError("its tensors are not those of a prompt")
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        logger.warning(
            "Cached prompt %s is damaged (%s): encoding it again.", shown(path), shown(error)
        )
        return None
    return PromptEmbeds(states, pooled)


def _write_cache(path: Path, embeds: PromptEmbeds) -> None:
    from safetensors.torch import save

    data = save(
        {
            "prompt_embeds": embeds.prompt_embeds.contiguous(),
            "pooled_prompt_embeds": embeds.pooled_prompt_embeds.contiguous(),
        }
    )
    part = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data)
        os.replace(part, path)
    except (OSError, ValueError) as error:  # the result is good even if the disk is full
        logger.warning(
            "The prompt could not be cached in %s: %s.", shown(path.parent), shown(error)
        )
        with suppress(OSError, ValueError):
            part.unlink(missing_ok=True)
