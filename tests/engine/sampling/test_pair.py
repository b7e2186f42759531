"""Two devices for one clip: the bits of one, whatever is slower, stopped or lost."""

import logging
import random
import threading
import time
from dataclasses import replace

import pytest
import torch
from comfyui_skyreels.skyreels.conditioning.latents import ImageConditioning
from comfyui_skyreels.skyreels.config import ContextWindows, Guidance, SkipLayers
from comfyui_skyreels.skyreels.errors import OptionError, SkyReelsError
from comfyui_skyreels.skyreels.runtime import TorchRuntime
from comfyui_skyreels.skyreels.sampling import pair
from comfyui_skyreels.skyreels.sampling.pair import twin_of
from comfyui_skyreels.skyreels.sampling.sample import sample
from comfyui_skyreels.skyreels.sampling.settings import SamplingSettings, get_sigmas
from comfyui_skyreels.skyreels.sampling.step_cache import CACHES, CacheConfig
from comfyui_skyreels.skyreels.transformer.sparse_attention import SparseConfig
from support import tiny
from support.tiny import embeds

PROMPT, NEGATIVE = embeds(7, 1), embeds(4, 2)
SIGMAS = get_sigmas(5)
SPARSE = SparseConfig(beta=0.5, dense_blocks=1, min_tokens=0)
#: skips steps of a tiny model with random weights
EASY = CacheConfig("easy", 1.0)


@pytest.fixture(scope="module")
def model():
    """A double block to skip, one before it, a single one, as few refiners: runs are many here."""
    return tiny.transformer(replace(tiny.TRANSFORMER, num_single_layers=1, num_refiner_layers=1))


@pytest.fixture(scope="module")
def image():
    generator = torch.Generator().manual_seed(2)
    return ImageConditioning(torch.randn(1, 16, 1, 16, 16, generator=generator), 128, 128, 9)


class StopError(Exception):
    """The user's."""


class Slow(TorchRuntime):
    """A device that is slow at times, and interrupted at a check."""

    def __init__(self, seed=0, stop_at=None, error=StopError):
        super().__init__("cpu")
        self.random, self.checks, self.stop_at, self.error = random.Random(seed), 0, stop_at, error
        self.threads = set()

    def check_interrupt(self):
        self.checks += 1
        self.threads.add(threading.current_thread().name)
        if self.stop_at is not None and self.checks >= self.stop_at:
            raise self.error
        if self.random.random() < 0.2:
            time.sleep(self.random.random() / 500)


def run(model, image, runtime, second=None, **settings):
    settings = SamplingSettings(**{"sigmas": SIGMAS, **settings})
    runtime.partner = second
    return sample(model, image, PROMPT, NEGATIVE, settings, runtime=runtime)


SETTINGS = {
    "plain": {},
    "easy": {"cache": EASY},
    "sparse": {"attention": SPARSE},
    "sparse and easy": {"attention": SPARSE, "cache": EASY},
    "guided to the half": {"guidance": Guidance(cfg_end=0.5)},
    "skip layers": {"guidance": Guidance(skip_layers=SkipLayers(double_blocks=(1,), scale=2.0))},
    "skip layers, negative": {
        "guidance": Guidance(skip_layers=SkipLayers(double_blocks=(1,), scale=0.0))
    },
    "windows": {"windows": ContextWindows(length=2, overlap=1)},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_two_devices_make_the_bits_of_one(model, image, name):
    expected = run(model, image, TorchRuntime(), **SETTINGS[name])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for seed in range(2):
        first, second = Slow(seed), Slow(seed + 100)
        got = run(model, image, first, second, **SETTINGS[name])
        assert torch.equal(got, expected)
        assert second.threads > {"MainThread"}  # it has worked in a thread of its own
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["plain", "sparse and easy"])
@pytest.mark.parametrize("which", [0, 1])
def test_whoever_is_interrupted_stops_the_other_and_the_next_run_is_good(model, image, name, which):
    counted = Slow(), Slow()
    expected = run(model, image, *counted, **SETTINGS[name])
    checks = counted[which].checks
    for seed, stop_at in enumerate(range(1, checks, max(1, checks // 8))):
        devices = [Slow(seed), Slow(seed + 100)]
        devices[which].stop_at = stop_at
        with pytest.raises(StopError):
            run(model, image, *devices, **SETTINGS[name])
        assert not any(thread.name.startswith("second device") for thread in threading.enumerate())
    assert torch.equal(run(model, image, Slow(7), Slow(8), **SETTINGS[name]), expected)


def test_a_lost_device_is_named_and_the_other_is_free(model, image):
    counted = Slow()
    run(model, image, Slow(), counted)
    last = counted.checks - 2
    second = Slow(stop_at=last, error=RuntimeError("CUDA error: unspecified launch failure"))
    with pytest.raises(SkyReelsError, match="second device, cpu, failed in mid-run.*one device"):
        run(model, image, Slow(), second)
    assert second.checks == last
    run(model, image, Slow())


def test_a_twin_shares_memory_and_not_its_place(model):
    twin = twin_of(model)
    own, other = dict(model.named_parameters()), dict(twin.named_parameters())
    assert own.keys() == other.keys()
    for name, parameter in own.items():
        assert parameter is not other[name]
        assert parameter.data_ptr() == other[name].data_ptr()
    some = next(iter(other.values()))
    some.data = torch.zeros_like(some)
    assert next(iter(own.values())).data_ptr() != some.data_ptr()


def test_what_two_devices_cannot_share_is_refused_before_anything_is_loaded(model, image):
    with pytest.raises(OptionError, match="first-block decides in the midst.*easy or fast"):
        run(model, image, Slow(), Slow(), cache=CACHES["first-block"])


def test_without_guidance_the_second_device_is_not_used(model, image, caplog):
    first, second = Slow(), Slow()
    first.partner = second
    settings = SamplingSettings(sigmas=SIGMAS, guidance=Guidance(true_cfg_scale=1.0))
    sample(model, image, PROMPT, None, settings, runtime=first)
    assert second.checks == 0
    assert "The second device, cpu, is not used: with CFG 1" in caplog.text


def test_each_device_computes_text_for_its_own_prompts(model, image, monkeypatch):
    asked = []
    true = pair.Network.predict

    def predict(self, latents, sigma, step, branches, run_block=None):
        asked.append((threading.current_thread().name.startswith("second"), tuple(branches)))
        return true(self, latents, sigma, step, branches, run_block)

    monkeypatch.setattr(pair.Network, "predict", predict)
    run(model, image, Slow(), Slow())
    assert set(asked) == {(False, (0,)), (True, (1,))}
    assert len(asked) == 2 * (len(SIGMAS) - 1)


def test_what_the_pair_takes_is_said(model, image, caplog):
    caplog.set_level(logging.INFO)
    run(model, image, Slow(), Slow())
    assert "Two devices, cpu and cpu: one branch of guidance each." in caplog.text or (
        "Two devices, one branch of guidance each: cpu takes about" in caplog.text
    )


def test_a_saved_run_continues_on_two_devices(model, image, tmp_path):
    state = tmp_path / "state.safetensors"
    counted = Slow()
    expected = run(model, image, counted, Slow())
    first = Slow(stop_at=counted.checks - 2)
    with pytest.raises(StopError):
        run(model, image, first, Slow(), resume=state)
    assert state.is_file()
    again = Slow()
    assert torch.equal(run(model, image, again, Slow(), resume=state), expected)
    assert again.checks < counted.checks
