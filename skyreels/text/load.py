"""Load LLaMA-3 and CLIP-L with their tokenizers, as modules of transformers.

They come from a diffusers-style folder, which contains text_encoder, text_encoder_2, tokenizer and
tokenizer_2, or from single files (sources.py). A folder in 16 or 32 bits is read by transformers,
everything else by modules.py. (A host with encoders of its own passes finished `PromptEmbeds`
instead and needs nothing from here.)

The language model is cut to what is used. SkyReels reads the states after all layers but two,
before the final norm, so these two layers and the norm are never built (1.4 GB of 15 in 16 bits).

transformers 5 rebuilds the pre-tokenizer of a tokenizer.json declared as LlamaTokenizerFast, as
this model's is, and so silently produces other ids. Hence the generic fast class below, and a
comparison of its ids with those of the plain `tokenizers` library at every load.

Given up: encoders in GGUF.
"""

import ast
import functools
import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError, DependencyError, TextError
from ..files import check_regular
from ..runtime import Runtime
from ..transformer.quant import FLOAT8_DTYPES
from ..weights.entries import TensorEntry
from ..weights.inspect import read_header
from .modules import UNUSED_LAYERS, load_clip, load_llama
from .sources import MODELS, TextSources

#: the text around every prompt; the braces mark where the prompt goes.
#: Source: diffusers 0.42.1 (Apache-2.0), DEFAULT_PROMPT_TEMPLATE of
#: pipelines/hunyuan_video/pipeline_hunyuan_skyreels_image2video.py; it must match to the letter
PROMPT_TEMPLATE = (
    "<|start_header_id|>system<|end_header_id|>\n\n"
    "Describe the video by detailing the following aspects: "
    "1. The main content and theme of the video."
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "3. Actions, events, behaviors temporal relationships, "
    "physical movement changes of the objects."
    "4. background environment, light, style and atmosphere."
    "5. camera angles, movements, and transitions used in the video:<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
)

#: tokens before the prompt in the real vocabulary: begin of text, system turn, user header
REAL_CROP_START = 95
#: id of <|start_header_id|> in the LLaMA-3 vocabulary; it identifies that vocabulary
_START_HEADER_ID = 128006
#: number of tokens of CLIP-L
_CLIP_VOCABULARY = 49408
#: a text and its ids in the CLIP-L vocabulary, begin and end of text included
_CLIP_KNOWN = ("a photo of a cat", [49406, 320, 1125, 539, 320, 2368, 49407])
#: tokens of the LLaMA-3 vocabulary without those that LLaVA adds
_LLAMA3_VOCABULARY = 128_000

_FOLDER_SOURCE = (
    "get the folders text_encoder, text_encoder_2, tokenizer and tokenizer_2 of "
    "hunyuanvideo-community/HunyuanVideo"
)

#: what tokenizers disagree on: scripts, digits, runs of blanks, the template's special tokens
_GUARD_TEXT = (
    "<|start_header_id|>user<|end_header_id|>\n\nFPS-24, A cat's 3.14 naïve café —  two  blanks\t"
    "12345678 你好。世界 Привет, мир! مرحبا 日本語 हिन्दी 😀\n\n  end<|eot_id|>"
)


@dataclass(frozen=True)
class TextEncoder:
    """The two encoders with their tokenizers.

    Attributes:
        llm: transformers LlamaModel without its last two layers and final norm.
        clip: transformers CLIPTextModel.
        llm_tokenizer: transformers PreTrainedTokenizerFast.
        clip_tokenizer: a transformers tokenizer.
        template: text with "{}" where the prompt goes.
        crop_start: tokens before that place, which are cut off the states.
        fingerprint: hex digest of everything that decides the numbers; part of the cache key.
        known_words: all words that mean something to it, in lower case; empty where any may.
    """

    llm: nn.Module
    clip: nn.Module
    llm_tokenizer: Any
    clip_tokenizer: Any
    template: str
    crop_start: int
    fingerprint: str
    known_words: frozenset[str] = frozenset()


def prompt_template() -> str:
    """The prompt template: that of an installed diffusers, else PROMPT_TEMPLATE.

    It is read from diffusers' source without importing it, which would take seconds and fail with
    some versions of transformers.

    Returns:
        Text with one "{}" where the prompt goes.
    """
    try:
        spec = importlib.util.find_spec("diffusers")
    except ValueError:  # the running program has marked diffusers as not importable
        spec = None
    for folder in (spec.submodule_search_locations or []) if spec else []:
        name = "pipelines/hunyuan_video/pipeline_hunyuan_skyreels_image2video.py"
        if template := _template_in(Path(folder) / name):
            return template
    return PROMPT_TEMPLATE


@functools.lru_cache(maxsize=8)
def _template_in(source: Path) -> str:
    """The prompt template in a file of diffusers, which is read once; empty if there is none."""
    try:
        tree = ast.parse(source.read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.Assign) and _assigns(node, "DEFAULT_PROMPT_TEMPLATE"):
                template = ast.literal_eval(node.value)["template"]
                if template.count("{}") == 1:
                    return str(template)
    except (OSError, SyntaxError, ValueError, KeyError, TypeError):
        pass  # a diffusers older or newer than this constant
    return ""


def _assigns(node: ast.Assign, name: str) -> bool:
    return any(isinstance(target, ast.Name) and target.id == name for target in node.targets)


def load_text_encoder(
    source: str | os.PathLike[str] | TextSources, *, exact: bool = False, runtime: Runtime
) -> TextEncoder:
    """Load LLaMA-3 and CLIP-L with their tokenizers onto `runtime.offload_device`.

    On an accelerator the weights keep the dtype of the files. On the CPU a half precision language
    model becomes bf16 (same size; fp16 there is slow and can overflow) and CLIP becomes fp32 (it is
    small). Linear layers in fp8 stay in fp8 and are dequantized for every call.

    Args:
        source: a folder that contains text_encoder/, text_encoder_2/, tokenizer/ and tokenizer_2/,
            or what `find_text_sources` found.
        exact: compute in fp32, which needs 30 GB for the real encoders.
        runtime: progress "load" in bytes; asked for an interrupt before each of the two.

    Returns:
        Both models in eval mode, without gradients.

    Raises:
        CheckpointError: a folder or file missing or damaged, weights missing, or another model.
        TextError: the tokenizer gives other ids than its own file.
        DependencyError: transformers is missing.
    """
    transformers = _import_transformers()
    if isinstance(source, TextSources):
        return _load_files(source, exact, runtime)
    root = Path(source)
    _check_folder(root)
    llm_tokenizer = load_tokenizer(root / "tokenizer")
    clip_tokenizer = load_clip_tokenizer(root / "tokenizer_2")

    llm_config = _read_config(root / "text_encoder", "llama", transformers.LlamaConfig)
    llm_config.num_hidden_layers -= UNUSED_LAYERS
    if llm_config.num_hidden_layers < 1:
        raise CheckpointError(
            f"{root / 'text_encoder'} has {llm_config.num_hidden_layers + UNUSED_LAYERS} layers, "
            f"and at least {UNUSED_LAYERS + 1} are needed: {_FOLDER_SOURCE}."
        )
    clip_config = _read_config(
        root / "text_encoder_2", "clip_text_model", transformers.CLIPTextConfig
    )
    _check_vocabulary(root / "tokenizer", llm_tokenizer, llm_config.vocab_size)
    _check_vocabulary(root / "tokenizer_2", clip_tokenizer, clip_config.vocab_size)
    llm_dtype = _compute_dtype(root / "text_encoder", exact, torch.bfloat16, runtime.device)
    clip_dtype = _compute_dtype(root / "text_encoder_2", exact, torch.float32, runtime.device)

    runtime.check_interrupt()
    sizes = [_weight_bytes(root / name) for name in ("text_encoder", "text_encoder_2")]
    runtime.progress("load", 0, sum(sizes))
    if llm_dtype is None:
        llm, _ = load_llama(root / "text_encoder", exact=exact, runtime=runtime, config=llm_config)
    else:
        llm = _load_model(transformers.LlamaModel, root / "text_encoder", llm_config, llm_dtype)
        llm.norm = nn.Identity()
    runtime.progress("load", sizes[0], sum(sizes))
    runtime.check_interrupt()
    if clip_dtype is None:
        clip, _ = load_clip(
            root / "text_encoder_2",
            clip_tokenizer.eos_token_id,
            exact=exact,
            runtime=runtime,
            config=clip_config,
        )
    else:
        clip = _load_model(
            transformers.CLIPTextModel, root / "text_encoder_2", clip_config, clip_dtype
        )
    runtime.progress("load", sum(sizes), sum(sizes))
    fingerprint = fingerprint_text_encoder(root, exact=exact, runtime=runtime)
    return _encoder(llm, clip, llm_tokenizer, clip_tokenizer, fingerprint, runtime)


def _weight_bytes(folder: Path) -> int:
    """Bytes of the weight files in a folder."""
    return sum(
        file.stat().st_size for file in folder.iterdir() if file.suffix in (".safetensors", ".bin")
    )


def _load_files(source: TextSources, exact: bool, runtime: Runtime) -> TextEncoder:
    llm_tokenizer = load_tokenizer(source.llm_tokenizer)
    clip_tokenizer = load_clip_tokenizer(source.clip_tokenizer)
    runtime.check_interrupt()
    llm, vocabulary = load_llama(source.llm, exact=exact, runtime=runtime)
    _check_vocabulary(source.llm_tokenizer, llm_tokenizer, vocabulary)
    runtime.check_interrupt()
    clip, vocabulary = load_clip(
        source.clip, clip_tokenizer.eos_token_id, exact=exact, runtime=runtime
    )
    _check_vocabulary(source.clip_tokenizer, clip_tokenizer, vocabulary)
    fingerprint = fingerprint_text_encoder(source, exact=exact, runtime=runtime)
    return _encoder(llm, clip, llm_tokenizer, clip_tokenizer, fingerprint, runtime)


def _encoder(
    llm: Any, clip: Any, llm_tokenizer: Any, clip_tokenizer: Any, fingerprint: str, runtime: Runtime
) -> TextEncoder:
    template = prompt_template()
    return TextEncoder(
        llm=llm.to(runtime.offload_device),
        clip=clip.to(runtime.offload_device),
        llm_tokenizer=llm_tokenizer,
        clip_tokenizer=clip_tokenizer,
        template=template,
        crop_start=find_crop_start(llm_tokenizer, template),
        fingerprint=fingerprint,
    )


def _check_vocabulary(folder: Path, tokenizer: Any, num_tokens: int) -> None:
    """Refuse a tokenizer whose ids are not those of its model.

    Raises:
        CheckpointError: it has more tokens than the model, or is not LLaMA-3's for a LLaMA-3.
    """
    if len(tokenizer) > num_tokens:
        raise CheckpointError(
            f"{folder} has {len(tokenizer)} tokens and its model has {num_tokens}: "
            f"the two do not belong together; {_FOLDER_SOURCE}."
        )
    header = tokenizer.convert_tokens_to_ids(MODELS["llama"][1])
    if num_tokens >= _LLAMA3_VOCABULARY and header != _START_HEADER_ID:
        raise CheckpointError(
            f"{folder} is not LLaMA-3's tokenizer, which has {MODELS['llama'][1]} at "
            f"{_START_HEADER_ID}: give the folder tokenizer of hunyuanvideo-community/HunyuanVideo."
        )


def fingerprint_text_encoder(
    source: str | os.PathLike[str] | TextSources, *, exact: bool = False, runtime: Runtime
) -> str:
    """Digest of a text encoder's files, made without loading them.

    Configs and tokenizers are read whole, of each weight file its size and 64 samples; template,
    precision and kind of device count too, since they change the numbers. With the digest and a
    cache folder, `cached_prompt` finds a prompt encoded earlier without loading 15 GB.

    Args:
        source: as for `load_text_encoder`.
        exact: as for `load_text_encoder`.
        runtime: gives the kind of device.

    Returns:
        Hex digits.
    """
    parts: dict[str, Path] = {}
    if isinstance(source, TextSources):
        parts = {each.name: getattr(source, each.name) for each in fields(source)}
    else:
        root = Path(source)
        _check_folder(root)
        for part in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
            parts[part] = root / part
    digest = hashlib.sha256()
    precision = "fp32" if exact else "auto"
    digest.update(f"{prompt_template()}\0{precision}\0{runtime.device.type}\0".encode())
    for part, place in parts.items():
        inside = [place] if place.is_file() else place.iterdir()
        for file in sorted(path for path in inside if path.is_file()):
            size = file.stat().st_size
            digest.update(f"{part}/{file.name}\0{size}\0".encode())
            with file.open("rb") as stream:
                if file.suffix != ".safetensors" and not place.is_file():
                    digest.update(stream.read())
                    continue
                for sample in range(64):
                    stream.seek(size * sample // 64)
                    digest.update(stream.read(4096))
    return digest.hexdigest()


def load_tokenizer(folder: Path) -> Any:
    """Load the language model's tokenizer and check it against its own file.

    Args:
        folder: contains tokenizer.json.

    Returns:
        transformers PreTrainedTokenizerFast, whatever class tokenizer_config.json declares.

    Raises:
        TextError: its ids differ from those of the `tokenizers` library.
        CheckpointError: the file is unreadable.
        DependencyError: transformers is missing.
    """
    transformers = _import_transformers()
    import tokenizers

    try:
        plain = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # `tokenizers` raises nothing finer
        raise CheckpointError(_unreadable(folder / "tokenizer.json", error)) from error
    with _quiet(transformers):
        try:
            tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(
                str(folder), local_files_only=True
            )
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(_unreadable(folder, error)) from error
    check_tokenizer(tokenizer, plain)
    return tokenizer


def check_tokenizer(tokenizer: Any, plain: Any) -> None:
    """Compare the ids that two readers of one file give for a difficult sentence.

    Args:
        tokenizer: of transformers.
        plain: `tokenizers.Tokenizer` of the same file.

    Raises:
        TextError: they differ (the message names the versions).
    """
    # not verbose: no warning that the sentence is longer than CLIP's context
    got = list(tokenizer(_GUARD_TEXT, verbose=False)["input_ids"])
    expected = list(plain.encode(_GUARD_TEXT).ids)
    if got != expected:
        import tokenizers
        import transformers

        raise TextError(
            f"transformers {transformers.__version__} with tokenizers {tokenizers.__version__} "
            f"splits a test sentence into {len(got)} tokens, and the tokenizer's own file into "
            f"{len(expected)}: prompts would be misread. Install another version: pip install -U "
            "transformers, or transformers==4.57.6."
        )


def load_clip_tokenizer(folder: Path) -> Any:
    """Load CLIP's tokenizer and check it.

    Args:
        folder: contains tokenizer.json, or vocab.json and merges.txt.

    Returns:
        A transformers tokenizer with a padding token.

    Raises:
        TextError: its ids differ from those of its own file or, for the real vocabulary, from those
            known for CLIP-L.
        CheckpointError: a file is unreadable.
        DependencyError: transformers is missing.
    """
    transformers = _import_transformers()
    if (folder / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(folder)
    else:
        with _quiet(transformers):
            try:
                tokenizer = transformers.CLIPTokenizer.from_pretrained(
                    str(folder), local_files_only=True
                )
            except (OSError, ValueError, TypeError, KeyError) as error:
                raise CheckpointError(_unreadable(folder, error)) from error
    text, ids = _CLIP_KNOWN
    if len(tokenizer) == _CLIP_VOCABULARY and list(tokenizer(text)["input_ids"]) != ids:
        words = [f"{word}</w>" for word in text.split()]
        if list(tokenizer.convert_tokens_to_ids(words)) != ids[1:-1]:
            raise TextError(
                f"{folder} is not CLIP-L's tokenizer, though it has as many tokens (the ids of "
                f"{text!r} differ from the known ones): give the folder tokenizer_2 of "
                "hunyuanvideo-community/HunyuanVideo."
            )
        raise TextError(
            f"transformers {transformers.__version__} splits {text!r} into other tokens than CLIP "
            f"does, and the vocabulary in {folder} is CLIP's: install another version, pip install "
            "-U transformers or transformers==4.57.6, or download the folder's merges.txt or "
            "tokenizer.json again."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # as CLIP-L does
    return tokenizer


def find_crop_start(tokenizer: Any, template: str) -> int:
    """Count the tokens before the prompt, begin-of-text included.

    Args:
        tokenizer: the language model's.
        template: text with "{}" where the prompt goes.

    Returns:
        95 for the real tokenizer and template.

    Raises:
        TextError: the vocabulary is LLaMA-3's and the number is not 95, so the tokenizer or the
            template is damaged.
    """
    crop_start = len(tokenizer(template.partition("{}")[0])["input_ids"])
    is_real = tokenizer.convert_tokens_to_ids("<|start_header_id|>") == _START_HEADER_ID
    if is_real and crop_start != REAL_CROP_START:
        raise TextError(
            f"The prompt template takes {crop_start} tokens and must take {REAL_CROP_START}: the "
            f"tokenizer is damaged or adds no begin-of-text token; {_FOLDER_SOURCE}."
        )
    return crop_start


def _import_transformers() -> Any:
    try:
        import tokenizers  # noqa: F401
        import transformers
    except ImportError as error:
        raise DependencyError(
            "Encoding text from a folder needs transformers: pip install 'transformers>=4.50.3'."
        ) from error
    return transformers


def _check_folder(root: Path) -> None:
    """Refuse an incomplete folder, naming the missing file and where to get it."""
    if not root.is_dir():
        raise CheckpointError(f"There is no text encoder folder {root}: {_FOLDER_SOURCE}.")
    needed: dict[str, tuple[tuple[str, ...], ...]] = {
        "text_encoder": (("config.json",), ("*.safetensors",)),
        "text_encoder_2": (("config.json",), ("*.safetensors",)),
        "tokenizer": (("tokenizer.json",),),
        "tokenizer_2": (("tokenizer.json", "vocab.json"),),
    }
    for part, choices in needed.items():
        for names in choices:
            found = [path for name in names for path in (root / part).glob(name)]
            for path in found:
                check_regular(path)
            if not found:
                raise CheckpointError(
                    f"{root / part} lacks {' or '.join(names)}: {_FOLDER_SOURCE}, all into one "
                    "folder."
                )


def _read_config(folder: Path, model_type: str, config_class: Any) -> Any:
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        found = values.get("model_type")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(_unreadable(folder / "config.json", error)) from error
    if found != model_type:
        raise CheckpointError(
            f"{folder} is a model of type {found!r}, and {model_type!r} is needed: "
            f"{_FOLDER_SOURCE}."
        )
    try:
        return config_class(**values)
    except Exception as error:  # versions of transformers validate differently
        raise CheckpointError(_unreadable(folder / "config.json", error)) from error


def _compute_dtype(
    folder: Path, exact: bool, half_on_cpu: torch.dtype, device: torch.device
) -> torch.dtype | None:
    """The dtype of the files; `half_on_cpu` where that is a half precision one on the CPU.

    Returns:
        None for files in 8 bits, which transformers would read without their scales.

    Raises:
        CheckpointError: a file that is damaged, or that stores something else.
    """
    files = sorted(folder.glob("*.safetensors"))
    entries: list[TensorEntry] = []
    for file in files:
        try:
            entries += read_header(file)[0].values()
        except (OSError, CheckpointError) as error:
            raise CheckpointError(_unreadable(file, error)) from error
    stored = [entry.dtype for entry in entries]
    if any(dtype in FLOAT8_DTYPES for dtype in stored):
        return None
    dtype = stored[0] if stored else None
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise CheckpointError(
            f"{files[0]} stores {dtype}, and F32, F16, BF16 or fp8 is needed: {_FOLDER_SOURCE}."
        )
    if exact:
        return torch.float32
    return half_on_cpu if device.type == "cpu" and dtype != torch.float32 else dtype


def _load_model(model_class: Any, folder: Path, config: Any, dtype: torch.dtype) -> Any:
    import transformers

    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    dtype_name = "dtype" if version >= (4, 56) else "torch_dtype"
    with _quiet(transformers):
        try:
            model, report = model_class.from_pretrained(
                str(folder),
                config=config,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                **{dtype_name: dtype},
            )
        except Exception as error:  # a damaged folder makes transformers raise almost anything
            raise CheckpointError(_unreadable(folder, error)) from error
    missing = sorted(str(name) for name in report["missing_keys"])
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise CheckpointError(
            f"{folder} lacks tensors {', '.join(missing[:5])}{more}: it is incomplete or another "
            f"model; {_FOLDER_SOURCE}."
        )
    return model.eval().requires_grad_(False)


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Silence transformers' remarks on unused layers and tokenizer classes: we intend both."""
    verbosity = transformers.logging.get_verbosity()
    bar = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bar:
            transformers.logging.enable_progress_bar()


def _unreadable(path: Path, error: Exception) -> str:
    reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
    if "above report" in reason:  # the report is silenced
        reason = "its weights do not fit its config.json"
    return f"{path} cannot be read ({reason}): download it again; {_FOLDER_SOURCE}."
