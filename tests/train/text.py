"""Make and train the built-in text encoders: a LLaMA and a CLIP of two layers, own tokenizers.

    nice -n 19 python -m tests.train.text RUN_DIR [--steps 1500]

Both learn from the prompts alone: the language model to foretell the next token, and both to name
colour, shape and verb of the prompt from the state at its end. They are then frozen, and the
transformer trains on what `skyreels.text` makes of the exported folders.

The tokenizers split as LLaMA-3's does and know every word of the prompt template, so the template
takes as many tokens as there (95) and other pipelines' fixed cut fits. They read lower case.
"""

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from comfyui_skyreels.skyreels.text.encode import DEFAULT_NEGATIVE_PROMPT, MAX_CLIP_TOKENS
from comfyui_skyreels.skyreels.text.load import PROMPT_TEMPLATE, UNUSED_LAYERS, find_crop_start
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import data, optim

TEXT_DIM, POOLED_DIM, LAYERS = 64, 64, 2
VOCABULARY = 1600
#: LLaMA-3's pre-tokenizer (its tokenizer.json), and GPT-4's before it
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLM_SPECIALS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
CLIP_SPECIALS = ("<|startoftext|>", "<|endoftext|>")
#: answers of the three questions; the last is "not said"
ANSWERS = (len(data.COLOURS) + 1, len(data.SHAPES) + 1, len(data.VERBS) + 1)


def draw_texts(count: int, seed: int) -> tuple[list[str], Tensor]:
    """Prompts as both encoders see them, and what they say.

    Returns:
        texts, and [count, 3] int64 answers. One in sixteen is empty or the default negative prompt,
        one in five lacks the frame rate in front, as a negative prompt does.
    """
    generator = torch.Generator().manual_seed(seed)
    scenes = data.draw_scenes(count, generator)
    texts, answers = [], []
    for prompt, verb in zip(data.write_prompts(scenes, generator), scenes.verb, strict=True):
        chance = float(torch.rand((), generator=generator))
        text = prompt if chance < 0.2 else f"FPS-24, {prompt}"
        if chance > 15 / 16:
            text = DEFAULT_NEGATIVE_PROMPT if chance > 31 / 32 else ""
        texts.append(text)
        answers.append(answer(text, int(verb)))
    return texts, torch.tensor(answers)


def answer(text: str, verb: int) -> tuple[int, int, int]:
    """Places of the colour, shape and verb a text names; one past the end for none."""
    lower = text.lower()
    colour = next((i for i, name in enumerate(data.COLOURS) if name in lower), len(data.COLOURS))
    shape = next((i for i, name in enumerate(data.SHAPES) if name in lower), len(data.SHAPES))
    is_prompt = bool(lower) and text != DEFAULT_NEGATIVE_PROMPT
    return colour, shape, verb if is_prompt else len(data.VERBS)


def make_tokenizer(specials: tuple[str, ...], bos: str, eos: str | None) -> Any:
    """A byte-level BPE tokenizer that knows the words of our prompts and of the template."""
    import transformers
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    plain = PROMPT_TEMPLATE
    for special in LLM_SPECIALS:
        plain = plain.replace(special, "\0")
    corpus = sorted(draw_texts(4000, seed=5)[0]) + 20 * plain.split("\0")
    corpus += 20 * [DEFAULT_NEGATIVE_PROMPT, f"FPS-24, {DEFAULT_NEGATIVE_PROMPT}", "\n\n"]
    tokenizer.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY - len(specials),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in specials])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}" if eos else f"{bos} $A",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (bos, eos) if token],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=eos or specials[-1]
    )


def make_models(llm_tokenizer: Any, clip_tokenizer: Any, layers: int) -> tuple[Any, Any]:
    """LlamaModel of so many layers and CLIPTextModel, random."""
    import transformers

    llm_config = transformers.LlamaConfig(
        vocab_size=len(llm_tokenizer),
        hidden_size=TEXT_DIM,
        intermediate_size=2 * TEXT_DIM,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=llm_tokenizer.bos_token_id,
        eos_token_id=None,
        initializer_range=0.1,
    )
    clip_config = transformers.CLIPTextConfig(
        vocab_size=len(clip_tokenizer),
        hidden_size=POOLED_DIM,
        projection_dim=POOLED_DIM,
        intermediate_size=2 * POOLED_DIM,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=MAX_CLIP_TOKENS,
        bos_token_id=clip_tokenizer.bos_token_id,
        eos_token_id=clip_tokenizer.eos_token_id,
        pad_token_id=clip_tokenizer.eos_token_id,
    )
    return transformers.LlamaModel(llm_config), transformers.CLIPTextModel(clip_config)


def train(steps: int, batch: int = 32, seed: int = 11) -> tuple[Any, Any, Any, Any, dict]:
    """Train both encoders.

    Returns:
        llm (without its final norm), clip, their tokenizers, and the share of right answers on
        fresh prompts.
    """
    torch.manual_seed(seed)
    random.seed(seed)
    llm_tokenizer = make_tokenizer(LLM_SPECIALS, LLM_SPECIALS[0], None)
    clip_tokenizer = make_tokenizer(CLIP_SPECIALS, *CLIP_SPECIALS)
    llm, clip = make_models(llm_tokenizer, clip_tokenizer, LAYERS)
    llm.norm = nn.Identity()
    crop_start = find_crop_start(llm_tokenizer, PROMPT_TEMPLATE)
    heads = nn.ModuleList(nn.Linear(dim, sum(ANSWERS)) for dim in (TEXT_DIM, POOLED_DIM))
    parts = nn.ModuleList([llm, clip, heads])
    optimizer = torch.optim.AdamW(parts.parameters(), lr=3e-3, betas=(0.9, 0.98))

    def tokens(tokenizer: Any, texts: list[str]) -> tuple[Tensor, Tensor]:
        rows = tokenizer(texts)["input_ids"]
        longest = max(map(len, rows))
        fill = tokenizer.pad_token_id
        ids = torch.tensor([row + [fill] * (longest - len(row)) for row in rows])
        return ids, torch.tensor([len(row) for row in rows])

    def predict(texts: list[str]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ids, lengths = tokens(llm_tokenizer, [PROMPT_TEMPLATE.replace("{}", t) for t in texts])
        states = llm(input_ids=ids, use_cache=False).last_hidden_state[:, crop_start:]
        ends = states[torch.arange(len(ids)), lengths - 1 - crop_start]
        pooled = clip(input_ids=tokens(clip_tokenizer, texts)[0]).pooler_output
        return states, ids[:, crop_start:], heads[0](ends), heads[1](pooled)

    for step in range(steps):
        texts, answers = draw_texts(batch, seed=100 + step)
        states, ids, by_llm, by_clip = predict(texts)
        logits = F.linear(states[:, :-1], llm.embed_tokens.weight) * TEXT_DIM**-0.5
        loss = 0.3 * F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss = loss + 0.1 * (states.square().mean() - 1).square()
        for scores in (by_llm, by_clip):
            for part, wanted in zip(scores.split(ANSWERS, dim=1), answers.T, strict=True):
                loss = loss + F.cross_entropy(part, wanted)
        loss.backward()
        nn.utils.clip_grad_norm_(parts.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * optim.scale_at(step, steps, decay=0.7)
        optimizer.step()
        optimizer.zero_grad()

    texts, answers = draw_texts(512, seed=3)
    with torch.no_grad():
        _, _, *both = predict(texts)
    right = {"crop_start": crop_start, "loss": round(loss.item(), 4)}
    for name, scores in zip(("llm", "clip"), both, strict=True):
        found = torch.stack([part.argmax(1) for part in scores.split(ANSWERS, dim=1)], dim=1)
        right[name] = [round(x, 4) for x in (found == answers).float().mean(0).tolist()]
    return llm, clip, llm_tokenizer, clip_tokenizer, right


def save(folder: Path, llm: Any, clip: Any, llm_tokenizer: Any, clip_tokenizer: Any) -> None:
    """Write text_encoder/, text_encoder_2/, tokenizer/ and tokenizer_2/ in bfloat16.

    The language model gets the two unused layers that loaders of the real one leave out, closed
    (their outputs are zero), so that any loader finds all it looks for.
    """
    whole, _ = make_models(llm_tokenizer, clip_tokenizer, LAYERS + UNUSED_LAYERS)
    with torch.no_grad():
        for layer in whole.layers[LAYERS:]:
            for parameter in layer.parameters():
                parameter.zero_()
        whole.embed_tokens.load_state_dict(llm.embed_tokens.state_dict())
        for mine, trained in zip(whole.layers, llm.layers, strict=False):
            mine.load_state_dict(trained.state_dict())
    whole.to(torch.bfloat16).save_pretrained(folder / "text_encoder")
    clip.to(torch.bfloat16).save_pretrained(folder / "text_encoder_2")
    _publish_names(folder / "text_encoder_2" / "model.safetensors")
    llm_tokenizer.save_pretrained(folder / "tokenizer")
    clip_tokenizer.save_pretrained(folder / "tokenizer_2")


def _publish_names(file: Path) -> None:
    """CLIP's names as published: transformers 5 leaves their prefix out, but reads both."""
    weights = load_file(file)
    prefix = "" if "text_model.embeddings.token_embedding.weight" in weights else "text_model."
    save_file({prefix + name: tensor for name, tensor in weights.items()}, file, {"format": "pt"})


def main() -> None:
    """Parse, train and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--steps", type=int, default=1500)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    *parts, right = train(arguments.steps)
    save(arguments.run_dir, *parts)
    right["s"] = round(time.perf_counter() - started)
    (arguments.run_dir / "text.json").write_text(json.dumps(right))


if __name__ == "__main__":
    main()
