"""Text: embeddings are checked, the folder is loaded, and prompts encode as diffusers does."""

import importlib
import json
import logging
import shutil
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from comfyui_skyreels.skyreels.config import TransformerConfig
from comfyui_skyreels.skyreels.errors import (
    CheckpointError,
    DependencyError,
    OptionError,
    OutOfRoomError,
    TextError,
)
from comfyui_skyreels.skyreels.offload import on_device, weight_bytes
from comfyui_skyreels.skyreels.runtime import TorchRuntime
from comfyui_skyreels.skyreels.text import embeds as text_embeds
from comfyui_skyreels.skyreels.text import encode, load
from comfyui_skyreels.skyreels.text.embeds import PromptEmbeds

CONFIG = TransformerConfig(text_embed_dim=24, pooled_projection_dim=12)
RUNTIME = TorchRuntime()


class Stopped(Exception):  # noqa: N818 - a host's own exception
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    pytest.importorskip("transformers")
    from support.text import make_text_folder

    return make_text_folder(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def encoder(folder) -> load.TextEncoder:
    return load.load_text_encoder(folder, runtime=RUNTIME)


@pytest.fixture(autouse=True)
def empty_cache():
    encode._cache.clear()


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def embeds(tokens: int = 5, width: int = 24, pooled: int = 12) -> PromptEmbeds:
    return PromptEmbeds(torch.ones(1, tokens, width), torch.ones(1, pooled))


# --- embeddings


def test_fitting_embeds_pass():
    text_embeds.check_prompt_embeds(embeds(), CONFIG)


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (embeds(width=17), ("17", "24", "T5", "DualCLIPLoader", "hunyuan_video", "llava_llama3")),
        (embeds(tokens=0), ("no token", "DualCLIPLoader")),
        (replace(embeds(), pooled_prompt_embeds=None), ("no pooled", "T5", "DualCLIPLoader")),
        (embeds(pooled=20), ("[1, 20]", "[1, 12]", "DualCLIPLoader")),
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


# --- prompt text


@pytest.mark.parametrize("prompt", ["FPS-24, a cat", "fps-30,a cat", "  FPS-8 , a cat"])
def test_a_named_frame_rate_is_kept(prompt):
    assert text_embeds.with_fps_prefix(prompt) == prompt


@pytest.mark.parametrize("prompt", ["a cat", "", "a cat at FPS-24, slow", "FPS-, a cat"])
def test_the_frame_rate_is_added_in_front(prompt):
    assert text_embeds.with_fps_prefix(prompt) == "FPS-24, " + prompt


def test_the_carried_template_is_that_of_diffusers():
    module = diffusers_pipeline_module()
    theirs = module.DEFAULT_PROMPT_TEMPLATE
    assert theirs["template"] == load.PROMPT_TEMPLATE
    assert theirs["crop_start"] == load.REAL_CROP_START


def test_the_template_is_read_from_an_installed_diffusers_without_importing_it(
    tmp_path, monkeypatch
):
    home = tmp_path / "diffusers" / "pipelines" / "hunyuan_video"
    home.mkdir(parents=True)
    (tmp_path / "diffusers" / "__init__.py").write_text("raise RuntimeError('imported')")
    (home / "pipeline_hunyuan_skyreels_image2video.py").write_text(
        "import nowhere\nDEFAULT_PROMPT_TEMPLATE = {'template': 'theirs: ' '{}', 'crop_start': 3}\n"
    )
    monkeypatch.delitem(sys.modules, "diffusers", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load.prompt_template() == "theirs: {}"


def test_without_diffusers_the_carried_template_is_used(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert load.prompt_template() == load.PROMPT_TEMPLATE


# --- encoding


@pytest.mark.parametrize("prompt", ["", "a cat", "a cat {with} {} braces {0}", "мир 你好 😀 " * 9])
def test_an_encoded_prompt_equals_diffusers_trimmed_by_its_mask(encoder, folder, prompt):
    theirs, pooled = diffusers_embeds(folder, encoder, prompt)
    ours = encode.encode_prompt(encoder, prompt, fps_prefix=False, runtime=RUNTIME)
    assert ours.prompt_embeds.shape == theirs.shape
    assert (ours.prompt_embeds - theirs).abs().max() <= 1e-5
    assert (ours.pooled_prompt_embeds - pooled).abs().max() <= 1e-5


def test_an_overlong_prompt_is_cut_as_diffusers_does_and_says_so(encoder, folder, caplog):
    prompt = "a cat walks over the bridge " * 60
    theirs, pooled = diffusers_embeds(folder, encoder, prompt)
    with caplog.at_level(logging.WARNING, logger="skyreels.text.embeds"):
        ours = encode.encode_prompt(encoder, prompt, fps_prefix=False, runtime=RUNTIME)
    assert ours.prompt_embeds.shape == theirs.shape == (1, 256, 24)
    assert (ours.prompt_embeds - theirs).abs().max() <= 1e-5
    assert (ours.pooled_prompt_embeds - pooled).abs().max() <= 1e-5
    assert [
        r for r in caplog.records if r.name == "skyreels.text.embeds" and "256" in r.getMessage()
    ]


def diffusers_pipeline_module():
    try:
        return importlib.import_module(
            "diffusers.pipelines.hunyuan_video.pipeline_hunyuan_skyreels_image2video"
        )
    except (ImportError, RuntimeError) as error:  # missing, or does not go with transformers
        pytest.skip(f"diffusers cannot be imported: {error}")


def diffusers_embeds(folder, encoder, prompt):
    module = diffusers_pipeline_module()
    import transformers

    pipeline = module.HunyuanSkyreelsImageToVideoPipeline(
        text_encoder=transformers.LlamaModel.from_pretrained(folder / "text_encoder").eval(),
        text_encoder_2=transformers.CLIPTextModel.from_pretrained(folder / "text_encoder_2").eval(),
        # the right class: what AutoTokenizer would pick here is another test's subject
        tokenizer=transformers.PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer"),
        tokenizer_2=transformers.PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer_2"),
        transformer=None, vae=None, scheduler=None,
    )  # fmt: skip
    # format() would read a prompt's braces as fields only in the template, so theirs is safe too
    template = {"template": module.DEFAULT_PROMPT_TEMPLATE["template"]}
    with torch.no_grad():
        states, pooled, mask = pipeline.encode_prompt(
            prompt, prompt_template=template | {"crop_start": encoder.crop_start}, device="cpu"
        )
    return states[:, mask[0].bool()], pooled


def test_the_cut_model_gives_the_third_last_hidden_state_of_the_full_one(encoder, folder):
    import transformers

    full = transformers.LlamaModel.from_pretrained(folder / "text_encoder").eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        wanted = full(input_ids=ids, output_hidden_states=True).hidden_states[-3]
        normed = full.norm(wanted)
        got = encoder.llm(input_ids=ids, use_cache=False).last_hidden_state
    assert len(encoder.llm.layers) == len(full.layers) - 2
    assert torch.equal(got, wanted)
    assert (got - normed).abs().max() > 0.1  # the norm would have shown


def test_the_empty_prompt_is_at_least_the_end_of_its_turn(encoder):
    got = encode.encode_prompt(encoder, "", fps_prefix=False, runtime=RUNTIME)
    assert got.prompt_embeds.shape[1] == 1
    text_embeds.check_prompt_embeds(got, CONFIG)


def test_the_prefix_reaches_both_encoders(encoder):
    bare = encode.encode_prompt(encoder, "a cat", fps_prefix=False, runtime=RUNTIME)
    prefixed = encode.encode_prompt(encoder, "a cat", runtime=RUNTIME)
    spelled = encode.encode_prompt(encoder, "FPS-24, a cat", fps_prefix=False, runtime=RUNTIME)
    assert torch.equal(prefixed.prompt_embeds, spelled.prompt_embeds)
    assert prefixed.prompt_embeds.shape[1] > bare.prompt_embeds.shape[1]
    assert not torch.equal(prefixed.pooled_prompt_embeds, bare.pooled_prompt_embeds)


def test_the_result_is_float32_on_the_cpu_from_a_half_precision_encoder(folder):
    half = load.load_text_encoder(folder, precision="bf16", runtime=RUNTIME)
    assert {p.dtype for p in half.llm.parameters()} == {torch.bfloat16}
    got = encode.encode_prompt(half, "a cat", runtime=RUNTIME)
    assert got.prompt_embeds.dtype == got.pooled_prompt_embeds.dtype == torch.float32
    assert not got.prompt_embeds.requires_grad


def test_a_half_precision_file_runs_on_the_cpu_in_bf16_and_clip_in_fp32(tmp_path):
    from support.text import make_text_folder

    half = make_text_folder(tmp_path, dtype=torch.float16)
    loaded = load.load_text_encoder(half, runtime=RUNTIME)
    assert {p.dtype for p in loaded.llm.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in loaded.clip.parameters()} == {torch.float32}


# --- interrupt, memory


def test_a_stop_before_any_layer_or_clip_leaves_an_encoder_that_works(encoder):
    wanted = encode.encode_prompt(encoder, "a cat", runtime=RUNTIME)
    layers = len(encoder.llm.layers)
    for stop_at in range(1, layers + 3):
        encode._cache.clear()
        with pytest.raises(Stopped):
            encode.encode_prompt(encoder, "a cat", runtime=stopping(stop_at))
        assert not any(layer._forward_pre_hooks for layer in encoder.llm.layers)
        again = encode.encode_prompt(encoder, "a cat", runtime=RUNTIME)
        assert torch.equal(again.prompt_embeds, wanted.prompt_embeds)


def stopping(stop_at: int) -> TorchRuntime:
    checks = 0

    def check() -> None:
        nonlocal checks
        checks += 1
        if checks == stop_at:
            raise Stopped

    return TorchRuntime(on_check=check)


class SmallDevice(TorchRuntime):
    """A device the weights are not on ("cpu:0" is not "cpu" to torch), with little room."""

    def __init__(self, free: int, on_check=lambda: None) -> None:
        super().__init__(on_check=on_check)
        self.device = torch.device("cpu", 0)
        self._free = free

    def free_bytes(self) -> int:
        return self._free


def test_a_language_model_too_big_for_the_device_goes_through_layer_by_layer(encoder, monkeypatch):
    wanted = encode.encode_prompt(encoder, "a cat", runtime=RUNTIME)
    homes = [parameter.data_ptr() for parameter in encoder.llm.parameters()]
    layers = list(encoder.llm.layers)
    here: list = []
    most_layers_at_once = []

    @contextmanager
    def watched(module, device):
        with on_device(module, device):
            here.append(module)
            most_layers_at_once.append([layers.index(m) for m in here if m in layers])
            yield
            here.remove(module)

    monkeypatch.setattr(encode, "on_device", watched)
    encode._cache.clear()
    small = SmallDevice(free=weight_bytes(encoder.llm) - 1)
    got = encode.encode_prompt(encoder, "a cat", runtime=small)
    assert torch.equal(got.prompt_embeds, wanted.prompt_embeds)
    assert [at_once for at_once in most_layers_at_once if at_once] == [[0], [1], [2]]
    assert encoder.llm not in here
    assert [parameter.data_ptr() for parameter in encoder.llm.parameters()] == homes


def test_a_device_without_room_for_one_layer_is_refused(encoder):
    with pytest.raises(OutOfRoomError, match="layer by layer"):
        encode.encode_prompt(encoder, "a cat", runtime=SmallDevice(free=100))


def test_progress_ends_at_its_total(encoder):
    seen = []
    runtime = TorchRuntime(
        on_progress=lambda stage, done, total, _: seen.append((stage, done, total))
    )
    encode.encode_prompt(encoder, "a cat", runtime=runtime)
    assert seen == [("encode", i, 3) for i in range(4)]


# --- cache


def test_a_second_encoding_runs_no_model(encoder):
    first = encode.encode_prompt(encoder, "a cat", runtime=RUNTIME)
    without_models = replace(encoder, llm=None, clip=None)
    again = encode.encode_prompt(without_models, "a cat", runtime=RUNTIME)
    assert torch.equal(again.prompt_embeds, first.prompt_embeds)
    again.prompt_embeds.zero_()  # a caller's tensors are its own
    third = encode.encode_prompt(without_models, "a cat", runtime=RUNTIME)
    assert torch.equal(third.prompt_embeds, first.prompt_embeds)


def test_the_cache_folder_serves_another_process(encoder, tmp_path):
    first = encode.encode_prompt(encoder, "a cat", cache_dir=tmp_path, runtime=RUNTIME)
    encode._cache.clear()  # as a new process starts
    found = encode.cached_prompt(encoder.fingerprint, "a cat", cache_dir=tmp_path)
    assert torch.equal(found.prompt_embeds, first.prompt_embeds)
    assert torch.equal(found.pooled_prompt_embeds, first.pooled_prompt_embeds)
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


def test_a_prompt_never_encoded_is_not_found(encoder, tmp_path):
    assert encode.cached_prompt(encoder.fingerprint, "a dog", cache_dir=tmp_path) is None


@pytest.mark.parametrize("damage", [b"", b"nonsense" * 9, None])
def test_a_damaged_cache_entry_is_reported_and_made_again(encoder, tmp_path, caplog, damage):
    first = encode.encode_prompt(encoder, "a cat", cache_dir=tmp_path, runtime=RUNTIME)
    [entry] = tmp_path.iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(whole[:-8] if damage is None else damage)
    encode._cache.clear()
    with caplog.at_level(logging.WARNING):
        again = encode.encode_prompt(encoder, "a cat", cache_dir=tmp_path, runtime=RUNTIME)
    assert torch.equal(again.prompt_embeds, first.prompt_embeds)
    assert entry.read_bytes() == whole
    assert "damaged" in caplog.text


def test_the_cache_in_memory_is_bounded_and_drops_the_oldest(encoder, monkeypatch):
    monkeypatch.setattr(encode, "_CACHE_ENTRIES", 2)
    for prompt in ("one", "two", "one", "three"):
        encode.encode_prompt(encoder, prompt, runtime=RUNTIME)
    kept = [
        encode.cached_prompt(encoder.fingerprint, p) is not None for p in ("one", "two", "three")
    ]
    assert kept == [True, False, True]


def test_the_fingerprint_follows_weights_tokenizer_precision_and_nothing_else(folder, copy):
    def fingerprint(root, precision="auto"):
        return load.fingerprint_text_encoder(root, precision=precision, runtime=RUNTIME)

    original = fingerprint(folder)
    assert fingerprint(copy) == original
    assert fingerprint(copy, "bf16") != original
    weights = copy / "text_encoder" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    changed = fingerprint(copy)
    assert changed != original
    config = copy / "tokenizer" / "tokenizer_config.json"
    config.write_text(config.read_text() + "\n")
    assert fingerprint(copy) not in (original, changed)


# --- tokenizers


def test_a_byte_level_tokenizer_declared_as_llama_gets_the_right_ids(folder):
    from tokenizers import Tokenizer

    plain = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    ours = load.load_tokenizer(folder / "tokenizer")
    for sentence in ("the cat walks  over the bridge", "你好 мир 😀\n\n", load._GUARD_TEXT):
        assert ours(sentence)["input_ids"] == plain.encode(sentence).ids


def test_the_guard_refuses_what_the_declared_class_makes_of_the_file(folder):
    import transformers
    from tokenizers import Tokenizer

    plain = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    declared = transformers.LlamaTokenizerFast.from_pretrained(folder / "tokenizer")
    if declared(load._GUARD_TEXT)["input_ids"] == plain.encode(load._GUARD_TEXT).ids:
        pytest.skip(f"transformers {transformers.__version__} reads the file rightly")
    with pytest.raises(TextError, match=r"transformers .* tokens and the tokenizer's own file"):
        load.check_tokenizer(declared, plain)


@pytest.mark.comfy
def test_the_real_clip_vocabulary_gives_the_known_ids(checkout):
    pytest.importorskip("transformers")
    vocabulary = checkout.folder / "comfy" / "sd1_tokenizer"
    tokenizer = load.load_clip_tokenizer(vocabulary)
    words, ids = load._CLIP_KNOWN
    assert len(tokenizer) == load._CLIP_VOCABULARY
    assert tokenizer(words)["input_ids"] == ids


def test_a_wrong_crop_in_the_real_vocabulary_is_refused():
    class Real:
        def convert_tokens_to_ids(self, token):
            return 128006

        def __call__(self, words):
            return {"input_ids": list(range(94))}

    with pytest.raises(TextError, match=r"94 tokens and must take 95"):
        load.find_crop_start(Real(), load.PROMPT_TEMPLATE)


def test_clip_is_also_read_from_vocab_and_merges(tmp_path):
    pytest.importorskip("transformers")
    import json

    from support.text import save_clip_tokenizer

    vocab = json.loads(
        save_clip_tokenizer(tmp_path / "fast").to_str()
    )["model"]["vocab"]  # fmt: skip
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "vocab.json").write_text(json.dumps(vocab))
    (slow / "merges.txt").write_text("#version: 0.2\n")
    shutil.copy(tmp_path / "fast" / "tokenizer_config.json", slow)
    tokenizer = load.load_clip_tokenizer(slow)
    ids = tokenizer("a", padding="max_length", max_length=5, truncation=True)["input_ids"]
    bos, eos = vocab["<|startoftext|>"], vocab["<|endoftext|>"]
    assert ids == [bos, vocab["a</w>"], eos, eos, eos]


# --- refusals


@pytest.mark.parametrize(
    "piece",
    [
        "tokenizer/tokenizer.json",
        "tokenizer_2/tokenizer.json",
        "text_encoder/config.json",
        "text_encoder_2/model.safetensors",
    ],
)
def test_a_missing_piece_is_named_with_where_to_get_it(copy, piece):
    (copy / piece).unlink()
    with pytest.raises(CheckpointError) as raised:
        load.load_text_encoder(copy, runtime=RUNTIME)
    assert str((copy / piece).parent) in str(raised.value)
    assert "hunyuanvideo-community/HunyuanVideo" in str(raised.value)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"no text encoder folder .*nowhere"):
        load.load_text_encoder(tmp_path / "nowhere", runtime=RUNTIME)


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_damaged_weights_are_refused(copy, part):
    weights = copy / part / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load.load_text_encoder(copy, runtime=RUNTIME)


def test_weights_with_a_tensor_missing_are_refused(copy):
    from safetensors.torch import load_file, save_file

    weights = copy / "text_encoder" / "model.safetensors"
    state = load_file(weights)
    del state["layers.1.mlp.up_proj.weight"]
    save_file(state, weights, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks tensors layers\.1\.mlp\.up_proj\.weight"):
        load.load_text_encoder(copy, runtime=RUNTIME)


def test_another_model_in_the_folder_is_refused(copy):
    config = copy / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"llama"', '"t5"'))
    with pytest.raises(CheckpointError, match=r"type 't5' and 'llama' is needed"):
        load.load_text_encoder(copy, runtime=RUNTIME)


def test_a_damaged_tokenizer_is_refused(copy):
    (copy / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        load.load_text_encoder(copy, runtime=RUNTIME)


def test_an_unknown_precision_is_refused(folder):
    with pytest.raises(OptionError, match="fp8"):
        load.load_text_encoder(folder, precision="fp8", runtime=RUNTIME)


def test_without_transformers_the_command_that_installs_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(DependencyError, match="pip install 'transformers"):
        load.load_text_encoder(tmp_path, runtime=RUNTIME)


def test_a_stop_while_loading_passes_through(folder):
    with pytest.raises(Stopped):
        load.load_text_encoder(folder, runtime=stopping(2))


# --- strange folders, prompts and caches ---------------------------------------------------------


@pytest.mark.parametrize("tensor", ["width", "batch", "empty", "int"])
def test_a_cache_entry_that_is_no_prompt_is_made_again(encoder, tmp_path, caplog, tensor):
    from safetensors.torch import save_file

    good = encode.encode_prompt(encoder, "a cat", cache_dir=tmp_path, runtime=RUNTIME)
    file = next(tmp_path.iterdir())
    states = {
        "width": good.prompt_embeds[0],
        "batch": good.prompt_embeds.repeat(2, 1, 1),
        "empty": good.prompt_embeds[:, :0],
        "int": good.prompt_embeds.long(),
    }[tensor]
    pooled = good.pooled_prompt_embeds
    save_file({"prompt_embeds": states.contiguous(), "pooled_prompt_embeds": pooled}, file)
    encode._cache.clear()
    again = encode.encode_prompt(encoder, "a cat", cache_dir=tmp_path, runtime=RUNTIME)
    assert torch.equal(again.prompt_embeds, good.prompt_embeds)
    assert "made again" in caplog.text


@pytest.mark.parametrize("place", ["file", "nul\0"])
def test_a_cache_that_cannot_be_written_does_not_cost_the_prompt(encoder, tmp_path, caplog, place):
    (tmp_path / "file").touch()
    encode._cache.clear()
    encode.encode_prompt(encoder, "a dog", cache_dir=tmp_path / place, runtime=RUNTIME)
    assert "could not be cached" in caplog.text


def test_a_prompt_known_in_memory_still_reaches_the_cache_folder(encoder, tmp_path):
    encode.encode_prompt(encoder, "a bird", runtime=RUNTIME)
    encode.encode_prompt(encoder, "a bird", cache_dir=tmp_path, runtime=RUNTIME)
    assert len(list(tmp_path.iterdir())) == 1


def test_half_a_character_is_refused(encoder):
    with pytest.raises(TextError, match="Character 10 of the prompt is half a character"):
        encode.encode_prompt(encoder, "a\udcff", runtime=RUNTIME)


def test_tokenizers_of_the_other_model_are_refused(copy):
    (copy / "tokenizer").rename(copy / "x")
    (copy / "tokenizer_2").rename(copy / "tokenizer")
    (copy / "x").rename(copy / "tokenizer_2")
    with pytest.raises((CheckpointError, TextError), match="do not belong together|misread"):
        load.load_text_encoder(copy, runtime=RUNTIME)


@pytest.mark.parametrize("change", [{"hidden_act": "zzz"}, {"hidden_size": 48}])
def test_a_config_that_does_not_fit_is_one_sentence(copy, change):
    file = copy / "text_encoder" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(CheckpointError, match="download it again") as caught:
        load.load_text_encoder(copy, runtime=RUNTIME)
    assert "above report" not in str(caught.value)


def test_loading_prints_no_remark_of_transformers(folder, capfd):
    load.load_text_encoder(folder, runtime=RUNTIME)
    assert capfd.readouterr() == ("", "")
