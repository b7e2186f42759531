"""Tiny stand-ins of all three models, made in memory: the whole machinery without a download.

They have the true architecture and seeded random weights, so what comes out is noise-like; every
place that offers them shows BUILTIN_NOTICE. Weights are drawn from generators of their own: a
program's global random state stays as it was.
"""

import hashlib
import math
from typing import Any

import torch
from torch import Tensor, nn

from .config import MAX_TEXT_TOKENS, TransformerConfig, VAEConfig
from .errors import DependencyError, OptionError
from .loading import TRANSFORMER_PRECISIONS, VAE_PRECISIONS
from .model import SkyReelsTransformer
from .quant import STORAGE_DTYPES, QuantLinear, is_quantizable, quantize
from .runtime import Runtime
from .text import MAX_CLIP_TOKENS, PROMPT_TEMPLATE, TextEncoder, find_crop_start
from .vae.model import VideoVAE

BUILTIN_NAME = "built-in (tiny, 64x64)"
BUILTIN_NOTICE = (
    "This is the built-in model: a tiny stand-in with random weights that shows the machinery at "
    "work; it is not SkyReels-V1, and its video looks like noise."
)
#: width and height of `example_image` and the video size it is meant for
BUILTIN_SIZE = 64

BUILTIN_TRANSFORMER = TransformerConfig(
    num_attention_heads=2,
    attention_head_dim=32,
    num_layers=2,
    num_single_layers=2,
    num_refiner_layers=1,
    text_embed_dim=64,
    pooled_projection_dim=32,
    rope_axes_dim=(4, 14, 14),
)
BUILTIN_VAE = VAEConfig(block_out_channels=(16, 32, 32, 32), layers_per_block=1, norm_num_groups=8)

#: spread of a layer's output for an input of spread 1; small enough that 30 steps stay near the
#: noise they start from, large enough that every gate is open and text and picture matter
_GAIN = 0.7
#: brings the latents of `example_image` from the spread measured, 0.298, to 1 / 0.476986, that of
#: real ones; decoding such latents then gives pixels of spread 0.4 without a gain of its own
_VAE_ENCODE_GAIN = 7.0

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def builtin_transformer(precision: str = "auto", *, runtime: Runtime) -> SkyReelsTransformer:
    """The stand-in transformer on `runtime.offload_device`.

    Args:
        precision: as for `load_transformer`; "auto" is fp32.
    Raises:
        OptionError: unknown precision.
    """
    _check_precision(precision, TRANSFORMER_PRECISIONS)
    with torch.random.fork_rng(devices=[]):
        model = SkyReelsTransformer(BUILTIN_TRANSFORMER)
    _draw_weights(model, seed=1)
    model.to(_DTYPES.get(precision, torch.float32 if precision == "auto" else torch.bfloat16))
    if precision in STORAGE_DTYPES:
        _store_in_8_bits(model, STORAGE_DTYPES[precision])
    return _finished(model, runtime)


def builtin_vae(precision: str = "auto", *, runtime: Runtime) -> VideoVAE:
    """The stand-in VAE on `runtime.offload_device`.

    Args:
        precision: as for `load_vae`; "auto" is fp32.
    Raises:
        OptionError: unknown precision.
    """
    _check_precision(precision, VAE_PRECISIONS)
    with torch.random.fork_rng(devices=[]):
        model = VideoVAE(BUILTIN_VAE)
    _draw_weights(model, seed=2)
    with torch.no_grad():
        model.quant_conv.weight.mul_(_VAE_ENCODE_GAIN)
    model.to(_DTYPES.get(precision, torch.float32))
    return _finished(model, runtime)


def builtin_text_encoder(precision: str = "auto", *, runtime: Runtime) -> TextEncoder:
    """Stand-ins of LLaMA-3 and CLIP-L that read bytes, with the real prompt template.

    One byte is one token, so a prompt is cut after about 250 letters.

    Args:
        precision: as for `load_text_encoder`; "auto" is fp32.
    Raises:
        OptionError: unknown precision. DependencyError: transformers is missing.
    """
    _check_precision(precision, ("auto", *_DTYPES))
    try:
        import transformers
    except ImportError as error:
        raise DependencyError(
            "The built-in text encoder needs transformers: pip install 'transformers>=4.50.3'."
        ) from error

    specials = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    llm_tokenizer = _byte_tokenizer(specials, bos=specials[0], eos=None)
    clip_specials = ("<|startoftext|>", "<|endoftext|>")
    clip_tokenizer = _byte_tokenizer(clip_specials, *clip_specials)
    crop_start = find_crop_start(llm_tokenizer, PROMPT_TEMPLATE)
    llm_config = transformers.LlamaConfig(
        vocab_size=len(llm_tokenizer),
        hidden_size=BUILTIN_TRANSFORMER.text_embed_dim,
        intermediate_size=2 * BUILTIN_TRANSFORMER.text_embed_dim,
        num_hidden_layers=2,  # four, less the two SkyReels leaves out
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=crop_start + MAX_TEXT_TOKENS,
        bos_token_id=None,
        eos_token_id=None,
    )
    clip_config = transformers.CLIPTextConfig(
        vocab_size=len(clip_tokenizer),
        hidden_size=BUILTIN_TRANSFORMER.pooled_projection_dim,
        intermediate_size=2 * BUILTIN_TRANSFORMER.pooled_projection_dim,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_CLIP_TOKENS,
        bos_token_id=clip_tokenizer.bos_token_id,
        eos_token_id=clip_tokenizer.eos_token_id,
        pad_token_id=clip_tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        llm: Any = transformers.LlamaModel(llm_config)
        clip: Any = transformers.CLIPTextModel(clip_config)
    llm.norm = nn.Identity()
    _draw_weights(llm, seed=3)
    _draw_weights(clip, seed=4)
    dtype = _DTYPES.get(precision, torch.float32)
    return TextEncoder(
        llm=_finished(llm.to(dtype), runtime),
        clip=_finished(clip.to(dtype), runtime),
        llm_tokenizer=llm_tokenizer,
        clip_tokenizer=clip_tokenizer,
        template=PROMPT_TEMPLATE,
        crop_start=crop_start,
        fingerprint=_fingerprint(llm, clip, str(runtime.device.type)),
    )


def example_image() -> Tensor:
    """A picture to start from: an orange disc over a blue and green gradient.

    Returns:
        [1, 64, 64, 3] float32 in 0..1.
    """
    axis = torch.linspace(0.0, 1.0, BUILTIN_SIZE)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    background = torch.stack([0.15 + 0.2 * x, 0.35 + 0.35 * y, 0.75 - 0.35 * y], dim=-1)
    distance = ((x - 0.42) ** 2 + (y - 0.45) ** 2).sqrt()
    cover = ((0.24 - distance) * BUILTIN_SIZE + 0.5).clamp(0.0, 1.0)[..., None]  # soft edge
    disc = torch.tensor([0.95, 0.55, 0.15]) * (1.0 - 0.5 * distance[..., None])
    return torch.lerp(background, disc, cover)[None]


def _check_precision(precision: str, legal: tuple[str, ...]) -> None:
    if precision not in legal:
        raise OptionError(f"Precision {precision!r} is not one of {', '.join(legal)}.")


def _draw_weights(module: nn.Module, seed: int) -> None:
    """Fill every parameter from one generator: norms with ones, the rest with normal numbers."""
    generator = torch.Generator("cpu").manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "embed" in name and parameter.ndim == 2:  # one row is looked up, none are summed
                parameter.copy_(noise)
            elif parameter.ndim > 1:
                parameter.copy_(noise * (_GAIN / math.sqrt(parameter[0].numel())))
            elif name.endswith("weight"):
                parameter.fill_(1.0)
            else:
                parameter.copy_(0.02 * noise)


def _store_in_8_bits(model: SkyReelsTransformer, storage_dtype: torch.dtype) -> None:
    """Swap the linears that `load_transformer` would swap."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and is_quantizable(f"{name}.weight"):
            weight, scale = quantize(layer.weight.detach(), storage_dtype)
            model.set_submodule(name, QuantLinear(weight, scale, layer.bias))


def _finished(module: Any, runtime: Runtime) -> Any:
    return module.eval().requires_grad_(False).to(runtime.offload_device)


def _byte_tokenizer(specials: tuple[str, ...], bos: str, eos: str | None) -> Any:
    """A tokenizer of one token per byte, `bos` in front and `eos`, if any, behind."""
    import transformers
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in specials])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}" if eos else f"{bos} $A",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (bos, eos) if token],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=eos
    )


def _fingerprint(llm: nn.Module, clip: nn.Module, device: str) -> str:
    """Digest of all weights; they are few."""
    digest = hashlib.sha256(f"{BUILTIN_NAME}\0{PROMPT_TEMPLATE}\0{device}\0".encode())
    for module in (llm, clip):
        for name, parameter in module.named_parameters():
            digest.update(f"{name}\0{parameter.dtype}\0".encode())
            digest.update(parameter.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()
