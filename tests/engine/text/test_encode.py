"""Prompts encode as diffusers encodes them, on devices too small for the model, and once each."""

import logging
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from comfyui_skyreels.skyreels.conditioning.embeds import check_prompt_embeds
from comfyui_skyreels.skyreels.config import TransformerConfig
from comfyui_skyreels.skyreels.errors import OutOfRoomError, TextError
from comfyui_skyreels.skyreels.runtime import TorchRuntime
from comfyui_skyreels.skyreels.runtime.offload import on_device, weight_bytes
from comfyui_skyreels.skyreels.text import encode, load

CONFIG = TransformerConfig(text_embed_dim=24, pooled_projection_dim=12)
RUNTIME = TorchRuntime()


class Stopped(Exception):  # noqa: N818 - a host's own exception
    pass


@pytest.fixture(autouse=True)
def empty_cache():
    encode._cache.clear()


@pytest.mark.parametrize("prompt", ["", "a cat", "a cat {with} {} braces {0}", "мир 你好 😀 " * 9])
def test_an_encoded_prompt_equals_diffusers_trimmed_by_its_mask(
    encoder, folder, diffusers_pipeline, prompt
):
    theirs, pooled = diffusers_embeds(diffusers_pipeline, folder, encoder, prompt)
    ours = encode.encode_prompt(encoder, prompt, fps_prefix=False, runtime=RUNTIME)
    assert ours.prompt_embeds.shape == theirs.shape
    assert (ours.prompt_embeds - theirs).abs().max() <= 1e-5
    assert (ours.pooled_prompt_embeds - pooled).abs().max() <= 1e-5


def test_an_overlong_prompt_is_cut_as_diffusers_does_and_says_so(
    encoder, folder, diffusers_pipeline, caplog
):
    prompt = "a cat walks over the bridge " * 60
    theirs, pooled = diffusers_embeds(diffusers_pipeline, folder, encoder, prompt)
    with caplog.at_level(logging.WARNING, logger="skyreels.conditioning.embeds"):
        ours = encode.encode_prompt(encoder, prompt, fps_prefix=False, runtime=RUNTIME)
    assert ours.prompt_embeds.shape == theirs.shape == (1, 256, 24)
    assert (ours.prompt_embeds - theirs).abs().max() <= 1e-5
    assert (ours.pooled_prompt_embeds - pooled).abs().max() <= 1e-5
    assert [
        r
        for r in caplog.records
        if r.name == "skyreels.conditioning.embeds" and "256" in r.getMessage()
    ]


def diffusers_embeds(module, folder, encoder, prompt):
    import transformers

    pipeline = module.HunyuanSkyreelsImageToVideoPipeline(
        text_encoder=transformers.LlamaModel.from_pretrained(folder / "text_encoder").eval(),
        text_encoder_2=transformers.CLIPTextModel.from_pretrained(folder / "text_encoder_2").eval(),
        # the right class: what AutoTokenizer would pick here is another test's subject
        tokenizer=transformers.PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer"),
        tokenizer_2=transformers.PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer_2"),
        transformer=None,
        vae=None,
        scheduler=None,
    )
    # format() would read a prompt's braces as fields only in the template, so theirs is safe too
    template = {"template": module.DEFAULT_PROMPT_TEMPLATE["template"]}
    with torch.no_grad():
        states, pooled, mask = pipeline.encode_prompt(
            prompt, prompt_template=template | {"crop_start": encoder.crop_start}, device="cpu"
        )
    return states[:, mask[0].bool()], pooled


def test_the_empty_prompt_is_at_least_the_end_of_its_turn(encoder):
    got = encode.encode_prompt(encoder, "", fps_prefix=False, runtime=RUNTIME)
    assert got.prompt_embeds.shape[1] == 1
    check_prompt_embeds(got, CONFIG)


def test_the_prefix_reaches_both_encoders(encoder):
    bare = encode.encode_prompt(encoder, "a cat", fps_prefix=False, runtime=RUNTIME)
    prefixed = encode.encode_prompt(encoder, "a cat", runtime=RUNTIME)
    spelled = encode.encode_prompt(encoder, "FPS-24, a cat", fps_prefix=False, runtime=RUNTIME)
    assert torch.equal(prefixed.prompt_embeds, spelled.prompt_embeds)
    assert prefixed.prompt_embeds.shape[1] > bare.prompt_embeds.shape[1]
    assert not torch.equal(prefixed.pooled_prompt_embeds, bare.pooled_prompt_embeds)


def test_the_result_is_float32_on_the_cpu_from_a_half_precision_encoder(tmp_path):
    from support.text import make_text_folder

    folder = make_text_folder(tmp_path, dtype=torch.bfloat16)
    half = load.load_text_encoder(folder, runtime=RUNTIME)
    assert {p.dtype for p in half.llm.parameters()} == {torch.bfloat16}
    got = encode.encode_prompt(half, "a cat", runtime=RUNTIME)
    assert got.prompt_embeds.dtype == got.pooled_prompt_embeds.dtype == torch.float32
    assert not got.prompt_embeds.requires_grad


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
    assert "encoding it again" in caplog.text


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


def test_an_unpaired_surrogate_is_refused(encoder):
    with pytest.raises(TextError, match="Character 10 of the prompt is an unpaired surrogate"):
        encode.encode_prompt(encoder, "a\udcff", runtime=RUNTIME)
