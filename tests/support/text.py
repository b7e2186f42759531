"""A tiny text encoder folder in the layout of hunyuanvideo-community/HunyuanVideo."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

LLM_LAYERS = 5
TEXT_DIM = 24
POOLED_DIM = 12
LLM_SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<pad>",
)
CORPUS = [
    "the main content and theme of the video, the colour and the light of the scene",
    "a cat walks over the bridge in the rain; the camera pans to the left, 24 frames per second",
] * 4


def make_text_folder(
    root: Path,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    true_heads: bool = False,
) -> Path:
    """Random models, true layout: LlamaModel, CLIPTextModel, and byte-level BPE tokenizers whose
    configuration declares LlamaTokenizerFast, as the real one does. With true_heads, what a file
    of weights does not say is as in LLaMA-3 and CLIP-L: heads of 128 and 64, theta, eps."""
    llm_tokenizer = byte_level_bpe()
    save_llm_tokenizer(root / "tokenizer", llm_tokenizer)
    clip_tokenizer = save_clip_tokenizer(root / "tokenizer_2")
    save_models(
        root,
        llm_tokenizer.get_vocab_size(),
        clip_tokenizer.get_vocab_size(),
        dtype=dtype,
        seed=seed,
        true_heads=true_heads,
    )
    return root


def byte_level_bpe() -> Tokenizer:
    """Byte-level BPE with LLaMA-3's shape: split first, BOS in front, merges over blanks."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in LLM_SPECIAL]
    )
    bos = LLM_SPECIAL[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return tokenizer


def save_llm_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "LlamaTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|end_of_text|>",
        "pad_token": "<pad>",
        "model_max_length": 1000000,
        "clean_up_tokenization_spaces": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def save_clip_tokenizer(folder: Path) -> Tokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    bos, eos = "<|startoftext|>", "<|endoftext|>"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, *(a + "</w>" for a in alphabet)])}
    vocab |= {bos: len(vocab), eos: len(vocab) + 1}
    tokenizer = Tokenizer(
        models.BPE(vocab, [], continuing_subword_prefix="", end_of_word_suffix="</w>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([bos, eos])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}", special_tokens=[(bos, vocab[bos]), (eos, vocab[eos])]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": eos,
        "unk_token": eos,
        "model_max_length": 77,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer


def llama_config(vocab_size: int, **changes: Any) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=TEXT_DIM,
        intermediate_size=40,
        num_hidden_layers=LLM_LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=None,
        **changes,
    )


def save_models(
    root: Path,
    llm_vocab: int,
    clip_vocab: int,
    *,
    dtype: torch.dtype,
    seed: int,
    true_heads: bool = False,
) -> None:
    torch.manual_seed(seed)
    true = {"head_dim": 128, "rope_theta": 500000.0, "rms_norm_eps": 1e-5} if true_heads else {}
    llm = transformers.LlamaModel(llama_config(llm_vocab, **true))
    clip = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=clip_vocab,
            hidden_size=128 if true_heads else POOLED_DIM,
            intermediate_size=20,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            bos_token_id=clip_vocab - 2,
            eos_token_id=clip_vocab - 1,
            pad_token_id=clip_vocab - 1,
        )
    )
    for model in (llm, clip):
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)  # norms included
    llm.to(dtype).save_pretrained(root / "text_encoder")
    clip.to(dtype).save_pretrained(root / "text_encoder_2")
