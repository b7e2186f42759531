"""SkyReels Load LoRA under stand-ins of ComfyUI: chains, branches, the report, ComfyUI's count."""

import comfyui_skyreels
import pytest
import torch
from comfyui_skyreels.nodes import host
from comfyui_skyreels.nodes.local.lora import NO_LORA
from comfyui_skyreels.skyreels.conditioning.latents import ImageConditioning
from comfyui_skyreels.skyreels.errors import CheckpointError, OptionError
from comfyui_skyreels.skyreels.runtime.offload import weight_bytes
from comfyui_skyreels.skyreels.vae.model import VideoVAE
from support import host as stand_ins
from support import lora as dialects
from support import tiny

NODES = comfyui_skyreels.NODE_CLASS_MAPPINGS
TEXT = (tiny.TRANSFORMER.text_embed_dim, tiny.TRANSFORMER.pooled_projection_dim)
STYLE, OTHER = "style.safetensors", "sub/other.safetensors"
IMAGE = ImageConditioning(torch.zeros(1, 16, 1, 4, 6), 48, 32, 9)


def node(name, **inputs):
    cls = NODES[name]
    with torch.inference_mode():
        return getattr(cls(), cls.FUNCTION)(**inputs)


@pytest.fixture(scope="module")
def files() -> dict[str, dict[str, torch.Tensor]]:
    """What is in "tiny.safetensors" and in the LoRAs."""
    found = {"tiny.safetensors": tiny.transformer().state_dict()}
    for seed, name in enumerate((STYLE, OTHER)):
        parts = dialects.draw_parts(seed=seed)
        found[name] = dialects.letters(dialects.diffusers_modules(parts), "transformer.")
    return found


@pytest.fixture
def comfy(comfy, files):
    for name, tensors in files.items():
        folder = "diffusion_models" if name == "tiny.safetensors" else "loras"
        tiny.save(comfy.folder(folder) / name, tensors)
    return comfy


def load_model(precision="auto"):
    return node("SkyReelsTransformerLoader", transformer="tiny.safetensors", precision=precision)[0]


def with_lora(model, name=STYLE, strength=1.0, **more):
    return node("SkyReelsLoraLoader", model=model, lora=name, strength=strength, **more)


def sample(model):
    text = [stand_ins.made_up_conditioning(words, *TEXT) for words in ("a dog runs", "")]
    settings = {"seed": 5, "steps": 2, "cfg": 6.0, "embedded_guidance": 1.0, "shift": 7.0}
    return node("SkyReelsSampler", model=model, positive=text[0], negative=text[1], image=IMAGE,
                **settings)[0]["samples"]  # fmt: skip


@pytest.mark.parametrize("precision", ["auto", "int8"])
def test_branches_of_a_graph_share_the_model_and_get_their_own_loras(comfy, precision):
    model = load_model(precision)
    plain = sample(model)
    one, _ = with_lora(model)
    both, _ = with_lora(one, OTHER, 0.5)
    assert [len(each.loras) for each in (model, one, both)] == [0, 1, 2]
    assert one.module is model.module
    assert one.patcher is model.patcher
    results = [sample(each) for each in (one, both, model, one)]
    assert torch.equal(results[2], plain)
    assert torch.equal(results[0], results[3])
    assert not torch.equal(results[0], results[1])
    assert not torch.equal(results[0], plain)


def test_the_report_is_on_the_node_in_the_log_and_on_the_second_output(comfy, caplog):
    with caplog.at_level("INFO", "skyreels.nodes.local.lora"):
        _, report = with_lora(load_model("int8"), OTHER, 0.5, unique_id="7")
    assert report.startswith("other.safetensors (diffusers): 136 keys matched, 50 modules changed")
    assert "Change relative to the weights at strength 0.5: double blocks (image) " in report
    assert "GB beside the quantized weights." in report
    assert comfy.texts[-1] == report
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("LoRA ")]
    assert lines == [f"LoRA {report}".replace("\n", " ")]


def test_comfyui_counts_the_factors(comfy):
    model = load_model("int8")
    before = model.patcher.model_size()
    sample(with_lora(model)[0])
    assert model.patcher.size == weight_bytes(model.module) > before
    sample(model)
    assert model.patcher.size == weight_bytes(model.module) == before


def test_factors_of_a_model_that_is_on_the_card_count_as_loaded(comfy):
    model = load_model("int8")
    model.module.model_loaded_weight_memory = before = model.patcher.model_size()
    sample(with_lora(model)[0])
    assert model.module.model_loaded_weight_memory == weight_bytes(model.module) > before


def test_blocks_limit_where_it_acts_and_a_wrong_list_is_refused(comfy):
    model = load_model()
    _, report = with_lora(model, blocks="double:0")
    assert "double blocks (image)" in report
    assert "single" not in report
    with pytest.raises(OptionError, match="this model has 2"):
        with_lora(model, blocks="double:0-19")


def test_cancelling_while_loras_are_applied_leaves_a_good_model(comfy):
    model = load_model()
    plain, styled = sample(model), with_lora(model)[0]
    comfy.cancel_after = comfy.checks + 20
    with pytest.raises(stand_ins.InterruptProcessingException):
        sample(styled)
    assert 0 < len(model.module.lora_state) < 50
    assert torch.equal(sample(model), plain)


@pytest.mark.parametrize("name", ["tiny.safetensors", STYLE])
def test_a_file_in_the_wrong_loader_names_the_right_one(comfy, name):
    model = load_model()
    (comfy.folder("loras") / "tiny.safetensors").write_bytes(
        (comfy.folder("diffusion_models") / "tiny.safetensors").read_bytes()
    )
    (comfy.folder("diffusion_models") / STYLE).write_bytes(
        (comfy.folder("loras") / STYLE).read_bytes()
    )
    if name == STYLE:
        with pytest.raises(CheckpointError, match=r"Use the node SkyReels Load LoRA\.$"):
            node("SkyReelsTransformerLoader", transformer=name, precision="auto")
    else:
        with pytest.raises(CheckpointError, match=r"Use the node SkyReels Load Transformer\.$"):
            with_lora(model, name)


def test_the_list_is_that_of_the_loras_folder(comfy):
    cls = NODES["SkyReelsLoraLoader"]
    assert cls.INPUT_TYPES()["required"]["lora"][0] == [STYLE, OTHER]
    assert cls.VALIDATE_INPUTS(STYLE) is True
    assert "is not in models/loras: download it" in cls.VALIDATE_INPUTS("gone.safetensors")


def test_without_a_lora_the_list_says_so(comfy):
    for path in list(comfy.folder("loras").rglob("*.safetensors")):
        path.unlink()
    cls = NODES["SkyReelsLoraLoader"]
    assert cls.INPUT_TYPES()["required"]["lora"][0] == [NO_LORA]
    assert "put a HunyuanVideo LoRA there" in cls.VALIDATE_INPUTS(NO_LORA)


def test_the_extension_of_a_clip_uses_the_loras_too(comfy):
    vae = tiny.randomize(VideoVAE(tiny.SMALL_VAE))
    tiny.save(comfy.folder("vae") / "vae.safetensors", vae.state_dict())
    model = with_lora(load_model())[0]
    text = [stand_ins.made_up_conditioning(words, *TEXT) for words in ("a dog runs", "")]
    vae = node("SkyReelsVAELoader", vae="vae.safetensors", precision="auto")[0]
    clip = torch.rand(5, 32, 32, 3, generator=torch.Generator().manual_seed(1))
    settings = {"seed": 5, "steps": 1, "cfg": 1.0, "embedded_guidance": 1.0, "shift": 7.0}
    assert isinstance(model, host.LoadedModel)
    node("SkyReelsExtendVideo", model=model, vae=vae, images=clip, positive=text[0],
         negative=text[1], num_frames=5, **settings)  # fmt: skip
    assert len(model.module.lora_state) == 50
