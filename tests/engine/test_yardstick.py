"""The second yardstick, of 1,296 tokens: its files, and that sparse attention runs on it.

How well each mode does is a bench: `python -m tests.bench.quality --model large`.
"""

import math
from collections.abc import Iterator

import pytest
import torch
from bench import quality
from comfyui_skyreels.skyreels.builtin import BUILTIN_FOLDER, builtin_transformer
from comfyui_skyreels.skyreels.conditioning.embeds import PromptEmbeds
from comfyui_skyreels.skyreels.config import Guidance
from comfyui_skyreels.skyreels.kernels import sparse
from comfyui_skyreels.skyreels.runtime import TorchRuntime
from comfyui_skyreels.skyreels.transformer.sparse_attention import SparseConfig
from comfyui_skyreels.skyreels.weights.inspect import inspect
from support.memory import reused_memory
from train import data, measure

CASE = measure.held_out_cases(1, seed=2, size=data.LARGE)[0]


@pytest.fixture(scope="module", autouse=True)
def memory() -> Iterator[None]:
    with reused_memory():
        yield


@pytest.fixture(scope="module")
def studio() -> quality.Studio:
    return quality.Studio(quality.LARGE_FOLDER)


def test_the_files_are_a_transformer_of_the_built_in_ones_shape():
    file = inspect(quality.LARGE_FOLDER / "transformer")
    assert (file.family, file.variant) == ("transformer", "skyreels-i2v")
    assert file.dtypes.keys() == {"BF16"}
    weights = quality.LARGE_FOLDER / "transformer" / "diffusion_pytorch_model.safetensors"
    assert weights.stat().st_size < 6e6
    loaded = quality.Studio(quality.LARGE_FOLDER).transformer(quality.SETTINGS["fp32"])
    assert loaded.config == builtin_transformer(runtime=TorchRuntime()).config
    tokens = math.prod(loaded.token_grid((1, 16, 9, 24, 24)))
    assert tokens == math.prod(data.LARGE.grid) >= 1_000


def test_what_it_lacks_is_the_built_in_models(studio):
    folders = {name: studio._folder(name) for name in ("transformer", "vae", "tokenizer")}
    assert folders.pop("transformer") == quality.LARGE_FOLDER / "transformer"
    assert folders == {name: BUILTIN_FOLDER / name for name in ("vae", "tokenizer")}


def test_the_card_says_what_it_is_and_how_it_was_made():
    card = (quality.LARGE_FOLDER / "README.md").read_text(encoding="utf-8")
    for word in ("not SkyReels-V1", "seeds", "held-out", "1,296", "Apache-2.0", "one CPU core"):
        assert word in card


@pytest.mark.usefixtures("fast_convolutions")
def test_sparse_attention_of_density_one_gives_the_exact_latents(studio):
    generator = torch.Generator().manual_seed(0)
    texts = [
        PromptEmbeds(torch.randn(1, n, 64, generator=generator), torch.randn(1, 64))
        for n in (9, 23)
    ]
    runs: list[list[float]] = []

    def latents(beta: float | None) -> torch.Tensor:
        sparse = {} if beta is None else {"attention": SparseConfig(beta, 0.5, min_tokens=0)}
        setting = quality.Setting(steps=2, guidance=Guidance(true_cfg_scale=1.0), **sparse)
        image = CASE.truth()[:1]
        with quality.collected_densities() as found:
            made = studio.sample(setting, image, texts, 0, CASE.size.frames)
        runs.append(found)
        return made

    exact, whole, sparse = (latents(beta) for beta in (None, -math.inf, 0.85))
    assert (whole - exact).abs().max() < 1e-4 * exact.abs().max()
    assert (sparse - exact).abs().max() > 1e-3 * exact.abs().max()
    assert runs[0] == []
    assert runs[1] == [1.0]
    assert 0.5 < runs[2][0] < 0.9  # the first of two steps is dense


def test_sparse_attention_in_8_bits_is_near_and_takes_lists():
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 2, 330, 32, generator=generator) for _ in range(3)]
    wide = sparse.sparse_attention(*inputs, 0.85, 4)
    rounded = quality._sparse_in_8_bits(*inputs, 0.85, 4, None)
    error = ((rounded.out - wide.out).norm() / wide.out.norm()).item()
    assert 0.005 < error < 0.05
    assert torch.equal(rounded.counts, wide.counts)
    shared = quality._sparse_in_8_bits(*inputs, 0.85, 4, wide.exact)
    assert torch.equal(shared.out, rounded.out)
    assert torch.equal(shared.exact, wide.exact)
