"""Sparse attention through a run: who is sparse when, who shares lists, and how dense it was."""

import logging
import math
from dataclasses import replace

import pytest
import torch
from comfyui_skyreels.skyreels.conditioning.latents import ImageConditioning
from comfyui_skyreels.skyreels.config import ATTENTIONS, CHUNKINGS, ContextWindows, Guidance
from comfyui_skyreels.skyreels.errors import OptionError
from comfyui_skyreels.skyreels.kernels import dispatch, sparse
from comfyui_skyreels.skyreels.kernels.dispatch import Decision, DeviceInfo
from comfyui_skyreels.skyreels.plan import Job, activation_bytes
from comfyui_skyreels.skyreels.plan.predict import block_seconds
from comfyui_skyreels.skyreels.runtime import TorchRuntime
from comfyui_skyreels.skyreels.sampling import attend
from comfyui_skyreels.skyreels.sampling.sample import sample
from comfyui_skyreels.skyreels.sampling.settings import SamplingSettings, get_sigmas
from comfyui_skyreels.skyreels.sampling.step_cache import CACHES, CacheConfig
from comfyui_skyreels.skyreels.transformer import sparse_kernels
from comfyui_skyreels.skyreels.transformer.attention import Size, sdpa
from comfyui_skyreels.skyreels.transformer.layers import rope_table
from comfyui_skyreels.skyreels.transformer.model import SkyReelsTransformer
from comfyui_skyreels.skyreels.transformer.sparse_attention import (
    SPARSE,
    SparseConfig,
    SparseRun,
)
from comfyui_skyreels.skyreels.transformer.token_order import hilbert_order
from support import tiny
from support.tiny import embeds

RUNTIME = TorchRuntime()
PROMPT, NEGATIVE = embeds(7, 1), embeds(4, 2)
#: 3 x 8 x 8 tokens: three blocks of 64
GRID, LATENT = (3, 8, 8), (1, 16, 3, 16, 16)
SIGMAS = get_sigmas(5)
#: the last four of five steps, and all blocks but the first
CONFIG = SparseConfig(beta=0.5, dense_blocks=1, min_tokens=0)


@pytest.fixture(scope="module")
def model() -> SkyReelsTransformer:
    return tiny.transformer()


@pytest.fixture(scope="module")
def image() -> ImageConditioning:
    generator = torch.Generator().manual_seed(2)
    return ImageConditioning(torch.randn(1, 16, 1, 16, 16, generator=generator), 128, 128, 9)


def run(model, image, **settings) -> torch.Tensor:
    negative = NEGATIVE if settings.get("guidance", Guidance()).true_cfg_scale > 1 else None
    settings = SamplingSettings(**{"sigmas": SIGMAS, **settings})
    return sample(model, image, PROMPT, negative, settings, runtime=RUNTIME)


class Recorder:
    """The kernel in plain torch, which notes what it was given."""

    def __init__(self) -> None:
        self.given: list[bool] = []
        self.chosen: list[torch.Tensor] = []

    def __call__(self, query, key, value, beta, num_image_blocks, exact):
        assert num_image_blocks == 3 and beta == CONFIG.beta
        result = sparse.sparse_attention(query, key, value, beta, num_image_blocks, exact)
        self.given.append(exact is not None)
        self.chosen.append(result.exact)
        return result


@pytest.fixture
def recorder(monkeypatch) -> Recorder:
    kernel = Recorder()
    monkeypatch.setattr(
        attend, "choose_sparse", lambda *_, **__: Decision(kernel, "recorded", "recorder")
    )
    return kernel


@pytest.fixture
def runs(monkeypatch) -> list[SparseRun]:
    """Every `SparseRun` that is made."""
    made = []

    class Noted(SparseRun):
        def __init__(self, *args, **options) -> None:
            super().__init__(*args, **options)
            made.append(self)

    monkeypatch.setattr(attend, "SparseRun", Noted)
    return made


# --- order ----------------------------------------------------------------------------------------


def test_an_order_goes_in_once_and_comes_out_once(model):
    double = SkyReelsTransformer(model.config).double().eval()
    double.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 32, 3, 16, 16, generator=generator, dtype=torch.float64)
    seen = []

    def attention(query, key, value):
        if query.shape[2] > 64:
            seen.append((query, key, value))
        return sdpa(query, key, value)

    with torch.no_grad():
        modulation = double.condition(
            torch.tensor([500.0]), PROMPT.prompt_embeds.double(),
            PROMPT.pooled_prompt_embeds.double(), torch.tensor([1000.0]),
        )  # fmt: skip
        plain = double.denoise(latents, modulation, attention=attention)
        order = hilbert_order(GRID)
        assert not torch.equal(order, torch.arange(192))
        ordered = double.denoise(latents, modulation, order=order, attention=attention)
    assert (plain - ordered).abs().max() <= 1e-12
    # what the first attention is given is the same to the bit, at other places: text, table, all
    place = torch.cat([order, torch.arange(192, 199)])
    for raster, reordered in zip(seen[0], seen[4], strict=True):
        assert torch.equal(raster[:, :, place], reordered)
    # and it would not be without the table: tokens that are alike differ by their place alone
    table = rope_table(GRID, model.config)
    assert not torch.equal(table[order], table)


# --- the run --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache": CACHES["first-block"]},
        {"windows": ContextWindows(2, 1)},
        {"guidance": Guidance(true_cfg_scale=1.0)},
    ],
    ids=["plain", "first-block cache", "windows", "no guidance"],
)
def test_with_every_block_exact_a_run_is_the_dense_one(model, image, options):
    everything = replace(CONFIG, beta=-math.inf)
    got = run(model, image, attention=everything, **options)
    torch.testing.assert_close(got, run(model, image, **options), atol=5e-5, rtol=0)


def test_sparse_where_it_may_be_and_the_branches_share_what_is_chosen(
    model, image, recorder, runs, caplog
):
    dense = run(model, image)
    with caplog.at_level(logging.DEBUG, "skyreels"):
        got = run(model, image, attention=CONFIG)
    assert not torch.allclose(got, dense, atol=1e-4)
    # four steps, three blocks, two branches: the first chooses, the second is given that
    assert recorder.given == ([False] * 3 + [True] * 3) * 4
    for step in range(4):
        positive, negative = (recorder.chosen[6 * step + 3 * k :][:3] for k in range(2))
        assert all(map(torch.equal, positive, negative))
    (sparse_run,) = runs
    found = sparse_run.densities()
    # visited pairs of blocks, counted by hand: of three rows of four blocks, the last one text's
    counts = [sparse.unpack(bits).sum().item() for bits in recorder.chosen]
    expected = sum(count + 2 * 3 for count in counts) / (len(counts) * 2 * 3 * 4)
    assert found.sparse == pytest.approx(expected, abs=1e-12)
    assert found.by_step[0] == 1.0 and all(found.by_step[step] < 1 for step in range(1, 5))
    assert set(found.by_block) == {1, 2, 3} and set(found.by_head) == {0, 1}
    calls = 5 * 4 * 2
    assert found.mean == pytest.approx((24 * expected + calls - 24) / calls, abs=1e-12)
    (line,) = [record for record in caplog.messages if "pairs of blocks" in record]
    assert f"{100 * expected:.1f} %" in line and "steps 2 to 5" in line


def test_one_branch_chooses_for_itself_as_the_positive_one_does(model, image, recorder, runs):
    one_step = replace(CONFIG, dense_share=0.0)
    for scale in (1.0, 6.0):  # in the first step they have the same latents
        run(model, image, attention=one_step, guidance=Guidance(true_cfg_scale=scale))
    alone, together = recorder.chosen[:3], recorder.chosen[15:18]
    assert all(map(torch.equal, alone, together))
    assert recorder.given[:18] == [False] * 18 and recorder.given[18:21] == [True] * 3
    assert runs[0].densities().by_step[0] == runs[1].densities().by_step[0]


def test_a_cache_never_skips_the_first_sparse_step(model, image, runs):
    config = replace(CONFIG, dense_share=0.5)
    sigmas = get_sigmas(12)
    run(model, image, attention=config, sigmas=sigmas, cache=CacheConfig("easy", 1.0))
    ran = set(runs[0].densities().by_step)
    assert 6 in ran and len(ran) < 12
    everywhere = replace(config, dense_share=1.0)
    run(model, image, attention=everywhere, sigmas=sigmas, cache=CacheConfig("easy", 1.0))
    assert 6 not in runs[1].densities().by_step


def test_head_groups_choose_the_same_lists(model, image, recorder, runs, monkeypatch):
    whole = run(model, image, attention=CONFIG)
    chosen, recorder.chosen = recorder.chosen, []
    monkeypatch.setitem(CHUNKINGS, "whole", replace(CHUNKINGS["whole"], head_groups=2))
    grouped = run(model, image, attention=CONFIG)
    assert len(recorder.chosen) == 2 * len(chosen)
    for index, lists in enumerate(chosen):
        assert torch.equal(lists, torch.cat(recorder.chosen[2 * index : 2 * index + 2]))
    torch.testing.assert_close(grouped, whole, atol=5e-5, rtol=0)
    first, second = (each.densities() for each in runs)
    assert first == second


@pytest.mark.parametrize("interleaves", [False, True])
def test_block_by_block_for_both_branches_is_the_same(model, image, interleaves, monkeypatch):
    from comfyui_skyreels.skyreels.sampling import guidance as module
    from comfyui_skyreels.skyreels.sampling import sample as sampling

    monkeypatch.setattr(
        sampling, "guided_velocity",
        lambda *args, **options: module.guided_velocity(
            *args, **{**options, "interleaves": interleaves}
        ),
    )  # fmt: skip
    got = run(model, image, attention=CONFIG)
    monkeypatch.undo()
    assert torch.equal(got, run(model, image, attention=CONFIG))


def test_a_resumed_run_is_sparse_at_the_same_steps(model, image, tmp_path, recorder):
    whole = run(model, image, attention=CONFIG)
    given = list(recorder.given)
    path = tmp_path / "run.safetensors"

    def stop(stage, done, *_):
        if stage == "sample" and done == 3:
            raise KeyboardInterrupt

    settings = SamplingSettings(sigmas=SIGMAS, attention=CONFIG, resume=path)
    with pytest.raises(KeyboardInterrupt):
        sample(model, image, PROMPT, NEGATIVE, settings, runtime=TorchRuntime(on_progress=stop))
    recorder.given.clear()
    assert torch.equal(sample(model, image, PROMPT, NEGATIVE, settings, runtime=RUNTIME), whole)
    assert recorder.given == given[2 * 6 :]


def test_every_window_has_lists_of_its_own(model):
    given = []

    def kernel(query, key, value, beta, num_image_blocks, exact):
        given.append(exact)
        return sparse.sparse_attention(query, key, value, beta, num_image_blocks, exact)

    sparse_run = SparseRun(
        CONFIG, kernel, sdpa, grid=(2, 8, 8), num_steps=5, blocks=model.blocks, heads=2,
        device="cpu",
    )  # fmt: skip
    sparse_run.begin_step(2)
    run_block = sparse_run.around(lambda block, *args: sparse_run(*args))
    generator = torch.Generator().manual_seed(0)
    windows = torch.randn(2, 3, 1, 2, 135, 16, generator=generator)
    for branch in range(2):
        for part, qkv in enumerate(windows):
            sparse_run.begin([branch], part)
            run_block(model.blocks[1], *qkv)
    assert given[:2] == [None, None]
    for part, (query, key, _) in enumerate(windows):
        expected = sparse.pack(sparse.route(query, key, CONFIG.beta, 2))
        assert torch.equal(given[2 + part], expected)


def test_outside_the_blocks_it_is_dense(model):
    calls = []

    def dense(query, key, value):
        calls.append(query.shape[2])
        return sdpa(query, key, value)

    def kernel(*_):
        raise AssertionError("the text refiner is not sparse")

    sparse_run = SparseRun(
        replace(CONFIG, dense_share=0.0), kernel, dense, grid=GRID, num_steps=5,
        blocks=model.blocks, heads=2, device="cpu",
    )  # fmt: skip
    sparse_run.begin_step(3)
    sparse_run.begin([0])
    with torch.no_grad():
        model.embed(
            torch.tensor([500.0]), PROMPT.prompt_embeds, PROMPT.pooled_prompt_embeds,
            attention=sparse_run, run_block=sparse_run.around(lambda block, *args: block(*args)),
        )  # fmt: skip
    assert calls == [7, 7]
    assert math.isnan(sparse_run.densities().mean)


# --- what is chosen -------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def said_once(monkeypatch):
    monkeypatch.setattr(dispatch, "_logged", set(), raising=False)


def test_short_sequences_are_dense_to_the_bit_and_it_is_said_once(model, image, caplog):
    dense = run(model, image)
    with caplog.at_level(logging.WARNING, "skyreels"):
        for _ in range(2):
            assert torch.equal(run(model, image, attention="sparse"), dense)
    (message,) = [text for text in caplog.messages if "Sparse attention" in text]
    assert "199 tokens are below 12,000" in message and "flash" in message


def test_where_no_kernel_is_usable_attention_is_dense_and_each_reason_is_named(monkeypatch, caplog):
    def missing(info, device, size):
        raise RuntimeError("it is not built for this card")

    monkeypatch.setattr(
        dispatch, "describe", lambda _: DeviceInfo("cuda", "card", (8, 9), triton="3.9.0")
    )
    monkeypatch.setattr(dispatch, "is_installed", lambda _: False)
    monkeypatch.setitem(sparse_kernels.SPARSE_KERNELS, "Triton 8 bits", missing)
    monkeypatch.setitem(sparse_kernels.SPARSE_KERNELS, "Triton 16 bits", missing)
    monkeypatch.setattr(dispatch, "remembered", lambda _, make: make())
    with caplog.at_level(logging.WARNING, "skyreels"):
        chosen = sparse_kernels.choose_sparse("cpu", Decision(sdpa, "", "cuDNN"), 0.85)
    assert chosen.impl is None
    (message,) = caplog.messages
    assert "not available, so attention is dense (cuDNN)" in message
    assert "it is not built for this card" in message
    assert "comfy-kitchen: comfy_kitchen is not installed" in message


@pytest.mark.parametrize("name", ["Triton 8 bits", "Triton 16 bits"])
def test_a_card_without_tiles_is_named(name):
    pytest.importorskip("triton", reason="triton is not installed")
    info = DeviceInfo("cuda", "card", (10, 0), triton="3.9.0")
    size = Size(24, 128, 51_060, torch.bfloat16)
    with pytest.raises(RuntimeError, match="it has no tile for sm100"):
        sparse_kernels.SPARSE_KERNELS[name](info, torch.device("cpu"), size)


def test_the_fastest_kernel_that_is_right_is_used(monkeypatch):
    """Ours for given lists; comfy-kitchen's by its own rule and tail."""

    def kitchen(query, key, value, beta, num_image_blocks, exact):
        assert exact is None
        pooled = sparse.pool(query, key, value)
        chosen = sparse.route_by_means(pooled, beta, num_image_blocks)
        out = sparse.attend(query, key, value, pooled, chosen, "block")
        return sparse.SparseResult(out, None, chosen.sum(dim=2))

    def wrong(*args):
        result = sparse.sparse_attention(*args)
        return result._replace(out=1.1 * result.out)

    kernels = {"Triton 8 bits": sparse.sparse_attention, "Triton 16 bits": wrong,
               "comfy-kitchen": kitchen}  # fmt: skip
    for name, kernel in kernels.items():
        monkeypatch.setitem(sparse_kernels.SPARSE_KERNELS, name, lambda *_, kernel=kernel: kernel)
    monkeypatch.setattr(
        dispatch, "describe", lambda _: DeviceInfo("cuda", "card", (8, 9), triton="3.9.0")
    )
    monkeypatch.setattr(dispatch, "is_installed", lambda _: True)
    monkeypatch.setattr(dispatch, "remembered", lambda _, make: make())
    milliseconds = {"cuDNN": 10.0, "Triton 8 bits": 4.0, "comfy-kitchen": 3.0}
    monkeypatch.setattr(
        sparse_kernels, "timed",
        lambda functions, *_: {name: milliseconds[name] for name in ["cuDNN", *functions]},
    )  # fmt: skip
    monkeypatch.setattr(sparse_kernels, "PROBED_TOKENS", 300)
    monkeypatch.setattr(sparse_kernels, "PROBED_IMAGE_BLOCKS", 3)

    def choose():
        return sparse_kernels.choose_sparse(
            "cpu", Decision(sdpa, "", "cuDNN"), 0.85, head_dim=32, dtype=torch.float32
        )

    chosen = choose()
    assert chosen.name == "comfy-kitchen" and "Triton 16 bits: self-test failed" in chosen.reason
    milliseconds.update({"Triton 8 bits": 2.0})
    assert choose().name == "Triton 8 bits"
    milliseconds.update({"cuDNN": 2.05})  # within five per cent of dense: not worth it
    assert choose().impl is None


def test_names_presets_and_bad_values():
    assert set(SPARSE) < set(ATTENTIONS)
    assert SPARSE["sparse"].first_sparse(30) == 6 and not SPARSE["sparse"].is_dense(6, 30)
    assert SPARSE["sparse"].is_dense(5, 30) and not SPARSE["sparse"].is_dense(29, 30)
    assert replace(CONFIG, dense_last=0.1).is_dense(27, 30)
    for wrong in ({"dense_share": 1.5}, {"dense_last": -0.1}, {"dense_blocks": -1},
                  {"beta": math.nan}):  # fmt: skip
        with pytest.raises(OptionError, match="use"):
            SparseConfig(**wrong)
    with pytest.raises(OptionError, match="exact, fast, sparse, sparser"):
        SamplingSettings(attention="sparsest")


def test_a_lora_in_a_short_run_is_warned_of(caplog):
    settings = SamplingSettings(sigmas=get_sigmas(8), attention="sparse")
    object.__setattr__(settings, "loras", (object(),))
    for attention, steps, count in (("sparse", 8, 1), ("exact", 8, 0), ("sparser", 15, 0)):
        object.__setattr__(settings, "attention", attention)
        object.__setattr__(settings, "sigmas", get_sigmas(steps))
        caplog.clear()
        attend.warn_of_few_steps(settings)
        assert len(caplog.messages) == count


# --- the plan -------------------------------------------------------------------------------------


def test_the_planner_knows_what_it_takes_and_saves():
    from comfyui_skyreels.skyreels.config import TransformerConfig
    from comfyui_skyreels.skyreels.plan import Machine
    from comfyui_skyreels.skyreels.plan.weights import weights_as

    config, job = TransformerConfig(), Job(text_tokens=60)
    weights = weights_as(config, "bf16", "auto")
    fast, lists = (
        activation_bytes(config, job.tokens, weights, attention) for attention in ("fast", "sparse")
    )
    assert 0 < lists["whole"] - fast["whole"] <= 120e6
    assert lists["head groups"] - fast["head groups"] <= 41e6
    rates = {"GEMM bf16": 7e14, "attention exact": 4e14, "memory": 2e12, "link": 2e10}
    machine = Machine("card", 80 * 10**9, 70 * 10**9, 10**11, rates)
    seconds = {
        attention: sum(block_seconds(machine, job, weights, attention)) for attention in ATTENTIONS
    }
    assert seconds["exact"] == seconds["fast"] > seconds["sparse"] > seconds["sparser"]
    assert 1.5 <= seconds["exact"] / seconds["sparse"] <= 2.0
    short = replace(job, num_frames=9)
    assert block_seconds(machine, short, weights, "sparse") == block_seconds(
        machine, short, weights, "exact"
    )
