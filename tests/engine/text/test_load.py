"""The text encoder folder is loaded as its files say, or refused with the reason."""

import json
import shutil
import sys

import pytest
import torch
from comfyui_skyreels.skyreels.errors import CheckpointError, DependencyError, TextError
from comfyui_skyreels.skyreels.runtime import TorchRuntime
from comfyui_skyreels.skyreels.text import load

RUNTIME = TorchRuntime()


def test_the_carried_template_is_that_of_diffusers(diffusers_pipeline):
    theirs = diffusers_pipeline.DEFAULT_PROMPT_TEMPLATE
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


def test_a_half_precision_file_runs_on_the_cpu_in_bf16_and_clip_in_fp32(tmp_path):
    from support.text import make_text_folder

    half = make_text_folder(tmp_path, dtype=torch.float16)
    loaded = load.load_text_encoder(half, runtime=RUNTIME)
    assert {p.dtype for p in loaded.llm.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in loaded.clip.parameters()} == {torch.float32}


def test_the_fingerprint_follows_weights_tokenizer_precision_and_nothing_else(folder, copy):
    def fingerprint(root, exact=False):
        return load.fingerprint_text_encoder(root, exact=exact, runtime=RUNTIME)

    original = fingerprint(folder)
    assert fingerprint(copy) == original
    assert fingerprint(copy, exact=True) != original
    weights = copy / "text_encoder" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    changed = fingerprint(copy)
    assert changed != original
    config = copy / "tokenizer" / "tokenizer_config.json"
    config.write_text(config.read_text() + "\n")
    assert fingerprint(copy) not in (original, changed)


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
    with pytest.raises(TextError, match=r"transformers .* tokens, and the tokenizer's own file"):
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
    from support.text import save_clip_tokenizer

    vocab = json.loads(save_clip_tokenizer(tmp_path / "fast").to_str())["model"]["vocab"]
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "vocab.json").write_text(json.dumps(vocab))
    (slow / "merges.txt").write_text("#version: 0.2\n")
    shutil.copy(tmp_path / "fast" / "tokenizer_config.json", slow)
    tokenizer = load.load_clip_tokenizer(slow)
    ids = tokenizer("a", padding="max_length", max_length=5, truncation=True)["input_ids"]
    bos, eos = vocab["<|startoftext|>"], vocab["<|endoftext|>"]
    assert ids == [bos, vocab["a</w>"], eos, eos, eos]


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
    with pytest.raises(CheckpointError, match=r"type 't5', and 'llama' is needed"):
        load.load_text_encoder(copy, runtime=RUNTIME)


def test_a_damaged_tokenizer_is_refused(copy):
    (copy / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        load.load_text_encoder(copy, runtime=RUNTIME)


def test_exact_computes_half_precision_files_in_fp32(tmp_path):
    from support.text import make_text_folder

    half = make_text_folder(tmp_path, dtype=torch.float16)
    loaded = load.load_text_encoder(half, exact=True, runtime=RUNTIME)
    parameters = [*loaded.llm.parameters(), *loaded.clip.parameters()]
    assert {parameter.dtype for parameter in parameters} == {torch.float32}


def test_without_transformers_the_command_that_installs_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(DependencyError, match="pip install 'transformers"):
        load.load_text_encoder(tmp_path, runtime=RUNTIME)


def test_a_stop_while_loading_passes_through(folder):
    class Stopped(Exception):  # noqa: N818 - a host's own exception
        pass

    checks = []

    def check() -> None:
        checks.append(1)
        if len(checks) == 2:
            raise Stopped

    with pytest.raises(Stopped):
        load.load_text_encoder(folder, runtime=TorchRuntime(on_check=check))


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
