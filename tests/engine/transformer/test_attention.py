"""Which attention runs where and why, what is refused, and the arithmetic of the one in 8 bits."""

import contextlib
import functools
import importlib.machinery
import importlib.util
import json
import logging
import os
import subprocess
import sys
import types
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from comfyui_skyreels.skyreels import cli
from comfyui_skyreels.skyreels.conditioning.embeds import PromptEmbeds
from comfyui_skyreels.skyreels.conditioning.latents import ImageConditioning
from comfyui_skyreels.skyreels.errors import OptionError, OutOfRoomError
from comfyui_skyreels.skyreels.kernels import dispatch
from comfyui_skyreels.skyreels.kernels.dispatch import DeviceInfo
from comfyui_skyreels.skyreels.kernels.reference import (
    VALUES_E4M3,
    VALUES_FP16,
    quantized_attention,
)
from comfyui_skyreels.skyreels.sampling.sample import run_bytes
from comfyui_skyreels.skyreels.sampling.settings import SamplingSettings
from comfyui_skyreels.skyreels.transformer import attention, attention_quality, fast_attention
from comfyui_skyreels.skyreels.transformer.attention import choose_attention, sdpa
from support import tiny
from support.forked import forks
from support.project import ROOT
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
CUDNN, FLASH = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION
EFFICIENT, MATH = SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
#: GPUs as `describe` would show them


def gpu(*capability: int, cudnn: int = 91900, triton: str = "3.6.0", **options) -> DeviceInfo:
    return DeviceInfo("cuda", "GPU", capability or None, cudnn, triton=triton, **options)


DEVICES = {
    "sm75": gpu(7, 5),
    "sm80": gpu(8, 0),
    "sm86": gpu(8, 6),
    "sm89": gpu(8, 9),
    "sm90": gpu(9, 0),
    "sm90, old cuDNN": gpu(9, 0, cudnn=91500),
    "sm90, no cuDNN": gpu(9, 0, cudnn=0),
    "sm100": gpu(10, 0, cudnn=91501),
    "sm120": gpu(12, 0),
    "sm120, Windows": gpu(12, 0, has_flash=False, triton="", triton_problem="no Triton"),
    "AMD": gpu(),
    "CPU": DeviceInfo("cpu"),
}
HAS_TRITON = importlib.util.find_spec("triton") is not None


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Nothing tried or said before, nothing pinned, and none of the packages installed."""
    monkeypatch.setattr(dispatch, "_decisions", {})
    monkeypatch.setattr(dispatch, "_waits", {})
    monkeypatch.setattr(dispatch, "_logged", set())
    for name in (dispatch.BACKEND_VARIABLE, dispatch.ATTENTION_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    for kernel in attention.FAST.values():
        monkeypatch.setitem(sys.modules, kernel.package, None)
    monkeypatch.setattr(attention, "draw", draw)


def draw(*which, **options) -> tuple[torch.Tensor, ...]:
    """`attention_quality.draw`, which draws the same for each trial: a copy of what it drew."""
    return drawn(*which, **options).clone().permute(2, 0, 3, 1, 4).unbind()


@functools.cache
def drawn(*which, **options) -> torch.Tensor:
    parts = attention_quality.draw(*which, **options)
    return torch.stack([part.transpose(1, 2) for part in parts], dim=2)


@pytest.fixture
def machine(monkeypatch):
    """Let every device look like one of DEVICES; Triton's own kernels are not there to be run."""

    def use(name: str) -> None:
        monkeypatch.setattr(dispatch, "describe", lambda device: DEVICES[name])
        monkeypatch.setattr(fast_attention, "_load_triton", None)
        for kernel in ("Triton", "Triton large tile", "Triton fp16"):
            monkeypatch.setitem(
                attention.FAST, kernel, replace(attention.FAST[kernel], load=no_triton)
            )

    return use


@pytest.fixture
def one_kind(monkeypatch):
    """Trials on one kind of input, for what does not depend on how a kernel rounds."""
    monkeypatch.setattr(attention, "KINDS", ["Gaussian"])


def no_triton(*args):
    raise ImportError("No module named 'triton'")


@pytest.fixture
def timed(monkeypatch):
    """timed(exact=45.0, **others): milliseconds that the clock of a GPU would show, by name.

    The CPU then stands for the GPU that `machine` describes.
    """

    def use(exact: float, **others: float) -> list[tuple[int, int]]:
        sizes: list[tuple[int, int]] = []

        def clock(functions, choice, device, size):
            sizes.append((size.tokens, size.heads))
            shown = {name: others[name.replace("-", "_")] for name in functions}
            return {choice.name: exact, **shown}

        monkeypatch.setattr(attention, "timed", clock)
        return sizes

    return use


@pytest.fixture
def install(monkeypatch):
    """Put a module with these attributes in the place of a package."""

    def put(package: str, **attributes) -> None:
        module = types.ModuleType(package)
        module.__spec__ = importlib.machinery.ModuleSpec(package, None)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, package, module)

    return put


def inputs(tokens: int = 300, heads: int = 2, head_dim: int = 32) -> list[torch.Tensor]:
    return list(attention_quality.draw("video-like", tokens, heads, head_dim))


def fast(**options) -> dispatch.Decision:
    """What a run of a small clip gets that asks for 8 bits."""
    return choose_attention(CPU, "fast", **{"tokens": 1100, "heads": 4, **options})


def report() -> dict[str, str]:
    return dispatch.report(attention.decisions(CPU))


def relative_l2(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


def allowed_kernels() -> list[SDPBackend]:
    """Torch's attention kernels that its flags allow now, by priority."""
    try:
        from torch.nn.attention import _cur_sdpa_kernel_backends
    except ImportError:  # torch 2.6 and older has flags, but no priority
        cuda = torch.backends.cuda
        flags = {
            CUDNN: cuda.cudnn_sdp_enabled,
            FLASH: cuda.flash_sdp_enabled,
            EFFICIENT: cuda.mem_efficient_sdp_enabled,
            MATH: cuda.math_sdp_enabled,
        }
        return [kernel for kernel, is_enabled in flags.items() if is_enabled()]
    return _cur_sdpa_kernel_backends(with_priority=True)


class Watch(TorchFunctionMode):
    """Notes torch's kernels, in order, as they are allowed while attention runs."""

    allowed = None

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            self.allowed = allowed_kernels()
        return function(*args, **(kwargs or {}))


# --- exact ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "order", "words"),
    [
        ("sm75", [EFFICIENT], "flash needs sm80, this is sm75"),
        ("sm80", [FLASH, EFFICIENT], "the fastest on sm80"),
        ("sm86", [FLASH, EFFICIENT], "the fastest on sm86"),
        ("sm89", [FLASH, EFFICIENT], "the fastest on sm89"),
        ("sm90", [CUDNN, FLASH, EFFICIENT], "version 9.19.0, the fastest on sm90"),
        (
            "sm90, old cuDNN",
            [FLASH, EFFICIENT],
            "version 9.15.0 is too old: any length needs 9.15.1",
        ),
        ("sm90, no cuDNN", [FLASH, EFFICIENT], "missing"),
        ("sm100", [CUDNN, FLASH, EFFICIENT], "version 9.15.1"),
        ("sm120", [FLASH, EFFICIENT], "the fastest on sm120"),
        ("sm120, Windows", [EFFICIENT], "built without flash"),
        ("AMD", [FLASH, EFFICIENT], "AMD"),
        ("CPU", [FLASH], "CPU"),
    ],
)
def test_each_gpu_gets_its_kernels_in_order_and_torchs_flags_come_back(machine, name, order, words):
    machine(name)
    before = allowed_kernels()
    choice = choose_attention(CPU)
    query, key, value = inputs()
    with Watch() as watch:
        got = choice.impl(query, key, value)
    assert watch.allowed == [*order, MATH]
    assert allowed_kernels() == before
    assert words in choice.reason
    names = {CUDNN: "cuDNN", FLASH: "flash", EFFICIENT: "memory-efficient"}
    assert choice.name == names[order[0]]
    assert relative_l2(got, sdpa(query, key, value)) < 1e-5


@pytest.mark.parametrize("pin", ["", "cudnn", "flash"])
def test_torch_keeps_its_own_order_of_kernels_for_the_rest_of_the_process(monkeypatch, pin):
    """Torch orders its kernels at the first attention on a GPU, cuDNN first on sm90; an order that
    was set for a call is taken back after it, to what stood there before."""
    state = {"order": ["flash", "efficient", "cudnn"], "is_ordered": False}
    ran = []

    @contextlib.contextmanager
    def sdpa_kernel(kernels, set_priority=False):
        before = state["order"]
        if set_priority:
            state["order"] = ["ours"]
        yield
        if set_priority:
            state["order"] = before

    def run(query, key, value):
        if not state["is_ordered"]:
            state.update(is_ordered=True, order=["cudnn", "flash", "efficient"])
        ran.append(query)
        return query

    class OnGPU:
        device, shape = torch.device("cuda:0"), (1, 1, 8, 64)
        element_size = staticmethod(lambda: 2)

        def __getitem__(self, part):
            return "a few"

    monkeypatch.setattr(attention, "sdpa_kernel", sdpa_kernel)
    monkeypatch.setattr(attention, "_ordered", [])
    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", run)
    query = OnGPU()
    attend = attention._exact(DEVICES["sm90"], torch.bfloat16, pin).impl
    for _ in range(2):
        assert attend(query, query, query) is query
    assert state["order"] == ["cudnn", "flash", "efficient"]
    assert [each for each in ran if each is not query] == ([] if pin else ["a few"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_torch_orders_its_kernels_as_it_would_without_us():
    script = """
import sys, torch
query = torch.zeros(1, 1, 256, 64, device="cuda", dtype=torch.bfloat16)
if sys.argv[1] == "ours":
    sys.path.insert(0, "tests")
    import comfyui_skyreels
    from comfyui_skyreels.skyreels.transformer.attention import choose_attention
    choose_attention("cuda").impl(query, query, query)
torch.nn.functional.scaled_dot_product_attention(query, query, query)
print(torch._C._get_sdp_priority_order())
"""
    orders = [
        subprocess.run(
            [sys.executable, "-c", script, whose],
            cwd=ROOT, capture_output=True, text=True, check=True,
        ).stdout
        for whose in ("torch", "ours")
    ]  # fmt: skip
    assert orders[0] == orders[1]


@pytest.mark.parametrize("name", ["sm80", "sm90", "sm120"])
def test_float32_goes_to_the_one_kernel_that_takes_it(machine, name):
    machine(name)
    choice = choose_attention(CPU, dtype=torch.float32)
    assert choice.name == "memory-efficient"
    assert "float32" in choice.reason


def test_bfloat16_is_widened_head_by_head_where_no_kernel_takes_it(machine):
    machine("sm75")
    choice = choose_attention(CPU)
    assert "in float32, head by head" in choice.reason
    query, key, value = (x.bfloat16() for x in inputs())
    got = choice.impl(query, key, value)
    assert got.dtype == torch.bfloat16
    assert got.transpose(1, 2).is_contiguous()
    wide = sdpa(query.float(), key.float(), value.float())
    rounding = relative_l2(wide.bfloat16().float(), wide)
    assert relative_l2(got.float(), wide) < 1.01 * rounding


def test_devices_torch_alone_knows_are_left_to_it():
    assert choose_attention("meta").impl is sdpa
    assert "meta" in choose_attention("meta").reason


def test_unknown_mode_is_refused():
    with pytest.raises(OptionError, match="'quick' is not one of exact, fast"):
        choose_attention(CPU, "quick")


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch says why, in several
def test_quadratic_memory_is_refused_with_its_number():
    # no fused kernel of the CPU takes a head dimension that is not contiguous
    query, key, value = torch.randn(3, 1, 24, 16, 5000).transpose(-1, -2)
    attend = choose_attention(CPU).impl
    with pytest.raises(OutOfRoomError, match=r"2,400,000,000 bytes .* \(2,000,000,000 are allowed"):
        attend(query, key, value)
    short = [x[:, :, :40] for x in (query, key, value)]
    assert relative_l2(attend(*short), sdpa(*(x.contiguous() for x in short))) < 1e-5
    # and the same length runs where a kernel takes it
    assert attend(*(x[:, :1].contiguous() for x in (query, key, value))).isfinite().all()


def test_other_faults_pass_through():
    query, key, value = inputs()
    with pytest.raises(RuntimeError, match="size"):
        choose_attention(CPU).impl(query, key[..., :7], value)


def test_output_of_views_of_one_buffer_needs_no_copy():
    query, key, value = inputs(tokens=1001)
    assert not query.is_contiguous()
    got = choose_attention(CPU).impl(query, key, value)
    assert got.transpose(1, 2).is_contiguous()


# --- fast ----------------------------------------------------------------------------------------


@functools.cache
def noise(shape: torch.Size) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(9))


def close(query, key, value):
    """Exact but for a per cent."""
    out = sdpa(query, key, value)
    return out + 0.01 * out.std() * noise(out.shape).to(out)


def sage_1(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, smooth_k=True, **kwargs):
    """As version 1 does it: the mean leaves the keys in place."""
    assert (tensor_layout, is_causal, sm_scale, smooth_k) == ("NHD", False, None, True)
    k -= k.mean(dim=1, keepdim=True)
    return close(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def sage_2(
    q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False, **kwargs
):
    assert (tensor_layout, is_causal, return_lse) == ("NHD", False, False)
    return close(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def fa3(q, k, v, softmax_scale=None, causal=False, q_descale=None, k_descale=None, v_descale=None):
    assert {q.dtype, k.dtype, v.dtype} == {torch.float8_e4m3fn}
    assert q_descale.shape == (q.shape[0], q.shape[2])
    wide = [
        (x.float() * scale[:, None, :, None]).transpose(1, 2)
        for x, scale in ((q, q_descale), (k, k_descale), (v, v_descale))
    ]
    return sdpa(*wide).transpose(1, 2).bfloat16(), None


class CudnnFrontend:
    """The parts of nvidia-cudnn-frontend 1.18 that are used, checked as it checks them."""

    class data_type:  # noqa: N801 - their name
        FLOAT, BFLOAT16, FP8_E4M3 = "float", "bfloat16", "e4m3"

    class heur_mode:  # noqa: N801
        A = "A"

    class Named:
        def __init__(self, **known):
            self.known = known

        def __getattr__(self, name):
            assert name.startswith("set_"), name
            return lambda value: self.known.__setitem__(name[4:], value) or self

    def __init__(self):
        self.built = 0

    def backend_version(self):
        return 91900

    def create_handle(self):
        return 7

    def pygraph(self, *, io_data_type, intermediate_data_type, compute_data_type, handle):
        assert (io_data_type, intermediate_data_type, compute_data_type) == ("e4m3", *2 * ["float"])
        frontend, tensors = self, {}

        class Graph:
            def tensor(self, *, name, dim, stride, data_type, uid):
                tensors[uid] = name, dim, stride
                return name

            def sdpa_fp8(self, *, generate_stats, attn_scale, **named):
                assert generate_stats is False and type(attn_scale) is float
                assert all(name == value for name, value in named.items())
                self.scale = attn_scale
                self.out = frontend.Named()
                return [self.out, None, frontend.Named(), frontend.Named()]

            def build(self, modes):
                assert self.out.known["output"] is True
                frontend.built += 1

            def get_workspace_size(self):
                return 256

            def execute(self, pack, workspace, handle):
                x = {tensors[uid][0]: value for uid, value in pack.items() if uid in tensors}
                for name in "qkv":
                    assert x[name].dtype == torch.float8_e4m3fn
                q, k, v = (x[name].float() * x["descale_" + name] for name in "qkv")
                weights = (q @ k.transpose(-1, -2) * self.scale).softmax(-1)
                weights = (weights * x["scale_s"]).to(torch.float8_e4m3fn).float() * x["descale_s"]
                (out,) = (value for uid, value in pack.items() if uid not in tensors)
                assert list(out.stride()) == self.out.known["stride"]
                out.copy_(weights @ v * x["scale_o"])

        return Graph()


@pytest.mark.parametrize(
    ("name", "package", "attributes"),
    [
        ("comfy-kitchen", "comfy_kitchen", {"int8_attention": close}),
        ("SageAttention", "sageattention", {"sageattn": sage_1}),
        ("SageAttention", "sageattention", {"sageattn": sage_2}),
    ],
)
def test_each_fast_kernel_is_found_tried_and_used(machine, install, name, package, attributes):
    machine("sm90")
    install(package, **attributes)
    choice = fast(dtype=torch.float32)
    assert choice.name == name, choice.reason
    query, key, value = inputs(tokens=1100, head_dim=128)
    kept, expected = key.clone(), sdpa(query, key, value)
    got = choice.impl(query, key, value)
    assert 1e-4 < relative_l2(got, expected) < 0.04
    assert torch.equal(key, kept), "the caller's keys were written to"


def test_fp8_of_cudnn_is_called_as_its_frontend_wants_and_judged_by_its_error(
    machine, monkeypatch, caplog
):
    """Rounding its output to e4m3 as well takes it beyond what is allowed."""
    machine("sm90")
    frontend = CudnnFrontend()
    frontend.__spec__ = importlib.machinery.ModuleSpec("cudnn", None)
    frontend.set_stream = lambda handle, stream: None
    monkeypatch.setitem(sys.modules, "cudnn", frontend)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(cuda_stream=0))
    load = attention.FAST["cuDNN fp8"].load
    function = load(DEVICES["sm90"], CPU, 128, torch.float32)
    query, key, value = attention_quality.draw("Gaussian", 600, 2, 128)
    error = relative_l2(function(query, key + 10, value - 7) + 7, sdpa(query, key, value))
    assert 0.02 < error < 0.08
    function(query, key, value)
    assert frontend.built == 1, "one graph for a shape"
    choice = fast(dtype=torch.float32)
    assert choice.name == "memory-efficient"
    assert "cuDNN fp8: self-test failed, error 0.0" in choice.reason
    assert "0.04 is allowed" in choice.reason


def test_fa3_is_called_with_scales_for_each_head_and_judged_by_its_error(machine, install):
    """Queries and keys in e4m3 cost more than integers do, too much for some kinds of input."""
    machine("sm90")
    install("flash_attn_interface", flash_attn_func=fa3)
    function = attention.FAST["FA3"].load(DEVICES["sm90"], CPU, 128, torch.float32)
    query, key, value = attention_quality.draw("video-like", 600, 2, 128)
    kept = key.clone()
    assert 1e-4 < relative_l2(function(query, key, value), sdpa(query, key, value)) < 0.08
    assert torch.equal(key, kept)
    choice = fast(dtype=torch.float32)
    assert choice.name == "memory-efficient"
    assert "FA3: self-test failed, error 0.0" in choice.reason
    assert "0.04 is allowed" in choice.reason


@pytest.mark.usefixtures("one_kind")
def test_short_sequences_stay_exact(machine, install):
    machine("sm90")
    install("comfy_kitchen", int8_attention=close)
    choice = fast()
    assert choice.name == "comfy-kitchen"
    query, key, value = inputs(tokens=attention.FAST_MIN_TOKENS - 1)
    got = choice.impl(query, key, value)
    assert relative_l2(got, sdpa(query, key, value)) < 1e-5


def test_a_clip_too_short_to_gain_is_told_so(machine, install):
    machine("sm90")
    install("comfy_kitchen", int8_attention=close)
    assert "900 tokens are below 1,024" in fast(tokens=900).reason


@pytest.mark.usefixtures("one_kind")
@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({"int8_attention": lambda q, k, v: sdpa(q, k, v) * float("nan")}, "error nan"),
        ({"int8_attention": lambda q, k, v: sdpa(q, k, v) * 1.1}, "), 0.04 is allowed"),
        (
            {"int8_attention": lambda q, k, v: sdpa(q, k, v)[:, :, 1:]},
            "it returns [1, 4, 1099, 128]",
        ),
        ({"int8_attention": lambda q, k, v: 1 / 0}, "ZeroDivisionError: division by zero"),
        ({}, "AttributeError"),
        (
            {"int8_attention": close, "int8_attention_is_available": lambda device: False},
            "driver 580",
        ),
    ],
)
def test_a_fast_kernel_that_fails_is_switched_off_with_its_reason(
    machine, install, caplog, attributes, words
):
    machine("sm89")
    install("comfy_kitchen", **attributes)
    choice = fast()
    assert choice.name == "flash"
    assert words in choice.reason
    query, key, value = inputs(tokens=1100, head_dim=128)
    assert relative_l2(choice.impl(query, key, value), sdpa(query, key, value)) < 1e-5
    assert [r.levelno for r in caplog.records if r.name == "skyreels.transformer.attention"] == [
        logging.WARNING
    ]
    assert words in caplog.text


def int8_weights(query, key, value, tile=128):
    """Weights on an integer grid over the largest of their tile, everything else exact."""
    scores = query.float() @ key.float().transpose(-1, -2) * query.shape[-1] ** -0.5
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    parts = [
        (part / part.amax(-1, keepdim=True) * 127).round() * part.amax(-1, keepdim=True) / 127
        for part in weights.split(tile, -1)
    ]
    rounded = torch.cat(parts, -1)
    return (rounded @ value.float() / rounded.sum(-1, keepdim=True)).to(query.dtype)


def test_a_kernel_that_loses_what_stands_beside_a_sink_is_refused_with_the_number(
    machine, install, monkeypatch
):
    findings, judge = [], attention.judge

    def heard(*args):
        findings.append(judge(*args))
        return findings[-1]

    monkeypatch.setattr(attention, "judge", heard)
    machine("sm89")
    install("comfy_kitchen", int8_attention=int8_weights)
    choice = fast(dtype=torch.float32)
    assert choice.name == "memory-efficient"
    assert "sink" in choice.reason or "peak" in choice.reason
    assert "0.04 is allowed" in choice.reason
    [errors] = [finding.errors for finding in findings]
    assert errors["Gaussian"] < 0.04 and errors["video-like"] < 0.04
    assert min(errors["1 sink"], errors["8 sinks"]) > 0.1


@pytest.mark.usefixtures("one_kind")
def test_the_next_one_takes_over_and_the_log_says_why(machine, install, caplog):
    caplog.set_level(logging.INFO)
    machine("sm80")
    install("comfy_kitchen", int8_attention=lambda q, k, v: v)
    install("sageattention", sageattn=sage_2)
    assert fast().name == "SageAttention"
    (record,) = [r for r in caplog.records if r.name == "skyreels.transformer.attention"]
    assert "SageAttention, 8 bits: self-test passed, error" in record.message
    assert "comfy-kitchen: self-test failed, error" in record.message


@pytest.mark.usefixtures("one_kind")
def test_the_fastest_of_those_that_are_right_is_used_and_all_are_told(machine, install, timed):
    machine("sm89")
    install("comfy_kitchen", int8_attention=close)
    install("sageattention", sageattn=sage_2)
    sizes = timed(exact=10.0, SageAttention=9.0, comfy_kitchen=5.0)
    choice = fast(heads=3)
    assert choice.name == "comfy-kitchen"
    assert "5.000 ms at 1,100 tokens, 2.00 times as fast as flash" in choice.reason
    assert (
        "Not used: SageAttention: self-test passed, error" in choice.reason
        and "1.11 times" in choice.reason
    )
    assert "FA3: flash_attn_interface is not installed" in choice.reason
    assert sizes == [(1100, 3)], "timed at the size of the run"


def milliseconds(tera_operations: float, tokens: int, heads: int, launches: int) -> float:
    """Of one call: its arithmetic, and 5 microseconds for each small kernel before it."""
    return 4 * tokens**2 * heads * 128 / tera_operations / 1e9 + 0.005 * launches


@pytest.mark.parametrize(("tera", "wins"), [(560, False), (700, True), (800, True), (900, True)])
def test_a_kernel_that_wins_at_the_size_of_the_run_is_used(
    machine, install, monkeypatch, tera, wins
):
    """At 8,192 tokens of 8 heads, where the gate once stood, the launches cost it the race."""
    machine("sm90")
    install("comfy_kitchen", int8_attention=close)
    monkeypatch.setattr(attention, "judge", lambda *args: dispatch.Finding({"": 0.01}, 0.04))

    def modelled(functions, choice, device, size):
        exact = milliseconds(590, size.tokens, size.heads, 1)
        ours = milliseconds(tera, size.tokens, size.heads, 50)
        return {choice.name: exact, "comfy-kitchen": ours}

    monkeypatch.setattr(attention, "timed", modelled)
    choice = choose_attention(CPU, "fast", heads=24, tokens=51_060)
    assert (choice.name == "comfy-kitchen") == wins, choice.reason
    assert milliseconds(tera, 8192, 8, 50) > milliseconds(590, 8192, 8, 1)


def test_the_clock_sees_the_inputs_of_the_run(machine, monkeypatch):
    shapes = []

    def median_ms(contenders, device):
        for function in contenders.values():
            shapes.append([list(x.shape) for x in function.args])
        return dict.fromkeys(contenders, 1.0)

    monkeypatch.setattr(dispatch, "median_ms", median_ms)
    cuda = types.SimpleNamespace(type="cuda")
    empty = torch.randn
    monkeypatch.setattr(torch, "Generator", lambda device: torch.default_generator)
    monkeypatch.setattr(
        torch, "randn", lambda shape, device, dtype, generator: empty(shape, dtype=dtype)
    )
    size = attention.Size(3, 64, 1100, torch.bfloat16)
    exact = dispatch.Decision(sdpa, "", "exact")
    assert set(attention.timed({"ours": close}, exact, cuda, size)) == {"exact", "ours"}
    assert shapes == 2 * [3 * [[1, 3, 1100, 64]]]


def test_a_kernel_is_tried_once_for_sizes_that_are_alike_and_said_once(machine, install, caplog):
    caplog.set_level(logging.INFO)
    machine("sm80")
    calls = []

    def counted(query, key, value):
        calls.append(query.shape[2])
        return close(query, key, value)

    install("comfy_kitchen", int8_attention=counted)
    for tokens in (1100, 1100, 1110):
        fast(tokens=tokens)
        choose_attention(CPU)
    assert calls == [1100] * len(attention_quality.KINDS)
    assert len([r for r in caplog.records if r.name == "skyreels.transformer.attention"]) == 2
    fast(tokens=2500)
    assert calls[len(attention_quality.KINDS) :] == [2500] * len(attention_quality.KINDS)


@pytest.mark.usefixtures("one_kind")
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ],
    ids=["torch", "cuDNN", "driver"],
)
def test_want_of_memory_in_the_trial_is_no_verdict(machine, install, error):
    machine("sm89")
    shortages = iter([error])

    def short_of_memory(query, key, value):
        for shortage in shortages:
            raise shortage
        return close(query, key, value)

    install("comfy_kitchen", int8_attention=short_of_memory)
    first = fast()
    assert first.name == "flash" and "tried again later" in first.reason
    assert fast().name == "comfy-kitchen"


@pytest.mark.usefixtures("one_kind")
def test_want_of_memory_at_the_clock_is_no_verdict(machine, install, monkeypatch):
    machine("sm89")
    install("comfy_kitchen", int8_attention=close)
    shortages = iter([torch.OutOfMemoryError("CUDA out of memory")])

    def clock(functions, choice, device, size):
        for shortage in shortages:
            raise shortage
        return {choice.name: 2.0, **dict.fromkeys(functions, 1.0)}

    monkeypatch.setattr(attention, "timed", clock)
    assert fast().name == "flash"
    assert fast().name == "comfy-kitchen"


def test_a_trial_that_breaks_the_gpu_says_how_to_go_on_without_it(machine, install):
    def broken(query, key, value):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    machine("sm89")
    install("comfy_kitchen", int8_attention=broken)
    with pytest.raises(RuntimeError, match="Restart with SKYREELS_BACKEND=reference"):
        fast()


@pytest.mark.usefixtures("one_kind")
def test_a_package_installed_later_is_found(machine, install):
    machine("sm80")
    assert fast().name == "flash"
    install("sageattention", sageattn=sage_2)
    assert fast().name == "SageAttention"


def test_another_device_is_looked_at_anew(monkeypatch, machine, install, caplog):
    caplog.set_level(logging.INFO)
    machine("sm80")
    install("comfy_kitchen", int8_attention=close)
    kinds = {"cpu": DEVICES["sm80"], "meta": DEVICES["AMD"]}
    monkeypatch.setattr(dispatch, "describe", lambda device: kinds[device.type])
    for device, name in (("cpu", "comfy-kitchen"), ("meta", "flash"), ("cpu", "comfy-kitchen")):
        assert choose_attention(device, "fast", tokens=1100).name == name
    assert "on cpu" in caplog.text
    assert "on meta" in caplog.text


@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("sm75", {"comfy-kitchen": "found", "SageAttention": "not made for sm75", "FA3": "not made",
                  "Triton": "not made", "cuDNN fp8": "not made"}),
        ("sm86", {"comfy-kitchen": "found", "SageAttention": "found", "FA3": "not made for sm86",
                  "Triton": "found", "Triton large tile": "not made for sm86"}),
        ("sm90", {"comfy-kitchen": "found", "SageAttention": "found", "FA3": "found",
                  "Triton": "found", "Triton large tile": "found", "cuDNN fp8": "found"}),
        ("sm100", {"comfy-kitchen": "found", "FA3": "not made", "Triton": "not made for sm100"}),
        ("sm120", {"FA3": "not made for sm120", "Triton": "found"}),
        ("sm120, Windows", {"Triton": "no Triton", "comfy-kitchen": "found"}),
        ("AMD", {"comfy-kitchen": "needs an NVIDIA GPU", "Triton": "needs an NVIDIA GPU"}),
        ("CPU", {"comfy-kitchen": "needs an NVIDIA GPU, this is cpu"}),
    ],
)  # fmt: skip
def test_report_says_what_is_found_without_importing_it(machine, monkeypatch, name, refused):
    machine(name)
    monkeypatch.setattr(dispatch, "is_installed", lambda package: True)
    found = report()
    assert "attention" in found
    for kernel, words in refused.items():
        assert words in found[f"8-bit attention, {kernel}"]
    assert sys.modules["comfy_kitchen"] is None


def test_report_names_what_is_missing(machine):
    machine("sm90")
    found = report()
    assert found["8-bit attention, SageAttention"] == (
        "not available: sageattention is not installed"
    )


@pytest.mark.parametrize(
    ("errors", "is_fit"),
    [({"a": 0.01, "b": 0.04}, True), ({"a": 0.041, "b": 0.0}, False),
     ({"a": 0.01, "b": float("nan")}, False), ({"a": float("inf")}, False)],
)  # fmt: skip
def test_the_worst_kind_of_input_decides(errors, is_fit):
    finding = dispatch.Finding(errors, attention.FAST_ERROR)
    assert finding.is_accepted == is_fit
    assert str(finding).startswith("error ") and ("allowed" in str(finding)) != is_fit


@pytest.mark.usefixtures("one_kind")
@pytest.mark.parametrize(("milliseconds", "is_fit"), [(9.0, True), (9.9, False), (12.0, False)])
def test_what_is_not_faster_is_not_used_and_its_figures_are_told(
    machine, install, timed, milliseconds, is_fit
):
    machine("sm89")
    install("comfy_kitchen", int8_attention=close)
    timed(exact=10.0, comfy_kitchen=milliseconds)
    choice = fast()
    assert (choice.name == "comfy-kitchen") == is_fit
    assert f"{10 / milliseconds:.2f} times as fast as flash" in choice.reason


def test_fast_on_a_cpu_is_exact_and_says_so(caplog):
    choice = fast()
    assert choice.name == "flash"
    assert "needs an NVIDIA GPU, this is cpu" in caplog.text


@pytest.mark.usefixtures("kept_models", "one_kind")
def test_fast_reaches_the_blocks_from_the_command_line(machine, install, monkeypatch, tmp_path):
    lengths = []

    def counted(query, key, value):
        lengths.append((key.shape[2], key.shape[1]))
        return close(query, key, value)

    machine("sm89")
    install("comfy_kitchen", int8_attention=counted)
    monkeypatch.setattr(attention, "FAST_MIN_TOKENS", 30)
    size = ["--width", "64", "--height", "64", "--frames", "5", "--steps", "1", "--cfg", "1"]
    command = ["generate", "--prompt", "x", *size, "--out", str(tmp_path / "a.npy")]
    assert cli.main(command) == 0
    assert lengths == []
    assert cli.main([*command, "--attention", "fast"]) == 0
    (trial, trial_heads), *run = lengths
    assert trial == run[0][0], "tried at the length of the run"
    assert trial_heads == attention.PROBED_HEADS
    assert len(run) == 6, "one call a block, none of the text refiner"


def test_fast_is_planned_with_more_memory():
    model = tiny.transformer()
    image = ImageConditioning(torch.zeros(1, 16, 1, 8, 8), 64, 64, 9)
    states = torch.zeros(1, 7, model.config.text_embed_dim)
    prompt = PromptEmbeds(states, torch.zeros(1, model.config.pooled_projection_dim))
    exact, fast = (
        run_bytes(model, image, [prompt], SamplingSettings(attention=mode))["chunks"]
        for mode in attention.MODES
    )
    assert fast - exact == attention.FAST_BYTES * (3 * 4 * 4 + 7) * model.config.hidden_size


def test_room_is_made_for_the_trial_at_the_size_of_the_run():
    full = attention.trial_bytes(24, 128, 51_060, torch.bfloat16)
    qkv, out = 3 * 2 * 51_060 * 3072, 2 * 51_060 * 3072
    assert full >= qkv + out + attention.FAST_BYTES * 51_060 * 3072


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_our_kernel_names_the_head_dimensions_and_devices_it_takes(monkeypatch):
    monkeypatch.delitem(sys.modules, "triton")
    import triton  # noqa: F401 - the module may have been imported before

    load = attention.FAST["Triton"].load
    with pytest.raises(OptionError, match=r"head dimensions \(32, 64, 128\), not 16"):
        load(DEVICES["sm89"], CPU, 16, torch.bfloat16)
    with pytest.raises(OptionError, match="no tile for sm100"):
        load(DEVICES["sm100"], CPU, 128, torch.bfloat16)


# --- pinned by the environment -------------------------------------------------------------------


@pytest.mark.usefixtures("one_kind")
def test_plain_torch_refuses_every_kernel_in_8_bits_and_says_why(machine, install, monkeypatch):
    machine("sm89")
    install("comfy_kitchen", int8_attention=close)
    monkeypatch.setenv("SKYREELS_BACKEND", "reference")
    choice = fast()
    assert choice.name == "flash"
    assert choice.reason == "fast attention unavailable (SKYREELS_BACKEND=reference)"
    monkeypatch.delenv("SKYREELS_BACKEND")
    assert fast().name == "comfy-kitchen"


@pytest.mark.usefixtures("one_kind")
def test_triton_alone_is_tried_where_it_is_pinned_and_whatever_its_speed(
    machine, install, monkeypatch, timed
):
    machine("sm89")
    install("comfy_kitchen", int8_attention=close)
    ours = replace(attention.FAST["Triton"], load=lambda *args: close)
    monkeypatch.setitem(attention.FAST, "Triton", ours)
    timed(exact=10.0, Triton=20.0, comfy_kitchen=5.0)
    assert fast().name == "comfy-kitchen"
    monkeypatch.setenv("SKYREELS_BACKEND", "triton")
    choice = fast()
    assert choice.name == "Triton"
    assert "FA3, comfy-kitchen, cuDNN fp8: SKYREELS_BACKEND=triton" in choice.reason


@pytest.mark.usefixtures("one_kind")
def test_one_kernel_in_8_bits_can_be_pinned_but_must_be_right(machine, install, monkeypatch, timed):
    machine("sm89")
    install("comfy_kitchen", int8_attention=close)
    install("sageattention", sageattn=sage_2)
    timed(exact=10.0, SageAttention=5.0, comfy_kitchen=20.0)
    monkeypatch.setenv("SKYREELS_ATTENTION", "Comfy-Kitchen")
    choice = fast()
    assert choice.name == "comfy-kitchen"
    assert "SageAttention, FA3, Triton, " in choice.reason
    assert ": SKYREELS_ATTENTION=comfy-kitchen" in choice.reason
    assert choose_attention(CPU).name == "flash", "exact stays exact"
    install("comfy_kitchen", int8_attention=lambda q, k, v: v)
    monkeypatch.setattr(dispatch, "_decisions", {})
    assert fast().name == "flash"


@pytest.mark.parametrize("mode", attention.MODES)
def test_one_of_torchs_kernels_can_be_pinned_for_both_modes(machine, install, monkeypatch, mode):
    machine("sm90")
    install("comfy_kitchen", int8_attention=close)
    monkeypatch.setenv("SKYREELS_ATTENTION", "math")
    choice = choose_attention(CPU, mode, tokens=1100)
    assert choice.name == "math"
    query, key, value = inputs()
    with Watch() as watch:
        got = choice.impl(query, key, value)
    assert watch.allowed == [MATH]
    assert relative_l2(got, sdpa(query, key, value)) < 1e-5
    assert report()["attention"] == "math: SKYREELS_ATTENTION=math, exact"


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch says why, in several
def test_a_pinned_kernel_that_cannot_run_says_so_and_is_not_replaced(machine, monkeypatch):
    machine("sm90")
    monkeypatch.setenv("SKYREELS_ATTENTION", "cudnn")
    attend = choose_attention(CPU).impl
    with pytest.raises(OptionError, match="SKYREELS_ATTENTION=cudnn, and that kernel does not"):
        attend(*inputs())
    monkeypatch.setenv("SKYREELS_ATTENTION", "math")
    long = torch.empty(3, 1, 24, 51_060, 8, device="meta", dtype=torch.bfloat16)
    with pytest.raises(OutOfRoomError, match="SKYREELS_ATTENTION=math would need"):
        choose_attention(CPU).impl(*long)


@pytest.mark.parametrize("variable", ["SKYREELS_ATTENTION", "SKYREELS_BACKEND"])
def test_an_unknown_name_in_the_environment_is_refused_with_those_there_are(monkeypatch, variable):
    monkeypatch.setenv(variable, "fastest")
    with pytest.raises(OptionError, match=rf"{variable} is 'fastest', which is not one of auto, "):
        choose_attention(CPU)


# --- arithmetic ----------------------------------------------------------------------------------

FORMATS = pytest.mark.parametrize(
    ("tile", "values"),
    [(128, VALUES_E4M3), (64, VALUES_E4M3), (64, VALUES_FP16)],
    ids=["e4m3, 128 keys", "e4m3, 64 keys", "fp16, 64 keys"],
)


@functools.lru_cache(maxsize=2)  # the formats of one kind follow one another
def attended(kind: str, seed: int) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values of 8,200 tokens, and exact attention of the queries."""
    query, key, value = attention_quality.draw(kind, 8200, 1, 128, seed=seed)
    query = query[:, :, ::100]
    return query, key, value, attention_quality.exact(query, key, value)


@FORMATS
@pytest.mark.parametrize("kind", attention_quality.KINDS)
def test_every_kind_of_input_stays_within_what_is_allowed(kind, tile, values):
    for seed in (0, 1):
        query, key, value, exact = attended(kind, seed)
        got = quantized_attention(query, key, value, key_tile=tile, values=values)
        error = relative_l2(got, exact)
        assert error <= (0.015 if values is VALUES_FP16 else attention.FAST_ERROR), (seed, error)


@pytest.mark.parametrize("sinks", [1, 8, 64])
def test_a_sink_does_not_round_away_what_stands_beside_it(sinks):
    """Weights on an integer grid lose it, though there everything else is exact."""
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(128, generator=generator)
    direction /= direction.norm()
    query = torch.randn(1, 1, 128, 128, generator=generator) + 6 * direction
    key, value = torch.randn(2, 1, 1, 8192, 128, generator=generator)
    where = torch.linspace(0, 8191, sinks).long()
    key[:, :, where] = direction * {1: 17.0, 8: 15.0, 64: 13.0}[sinks]
    value[:, :, where] *= 0.05
    expected = sdpa(query, key, value)
    assert relative_l2(quantized_attention(query, key, value), expected) <= 0.04
    assert relative_l2(int8_weights(query, key, value), expected) >= 0.04


@pytest.mark.parametrize("head_dim", [32, 64])
@FORMATS
def test_error_on_gaussian_inputs_of_narrow_heads(head_dim, tile, values):
    query, key, value = torch.randn(3, 1, 2, 2003, head_dim)
    got = quantized_attention(query, key, value, key_tile=tile, values=values)
    assert relative_l2(got, sdpa(query, key, value)) < 0.04


@pytest.mark.parametrize("head_dim", [64, 128])
def test_error_with_outliers_and_what_smoothing_is_worth(head_dim):
    query, key, value = torch.randn(3, 1, 2, 2003, head_dim)
    query[..., 5] *= 5
    key[..., 7] *= 5
    key += 20 * torch.randn(1, 2, 1, head_dim)  # what all keys share
    value[..., 9] += 30
    value[:, :, -50:] *= 20  # text
    expected = sdpa(query, key, value)
    error = relative_l2(quantized_attention(query, key, value), expected)
    assert error < 0.04
    rounded = []
    for x in (query, key):  # a scale for each row, and nothing else done
        scale = x.abs().amax(dim=-1, keepdim=True) / 127
        rounded.append((x / scale).round() * scale)
    assert relative_l2(sdpa(*rounded, value), expected) > 4 * error


def test_error_where_few_keys_count():
    query, key, value = inputs(tokens=2003, head_dim=128)
    for sharpness in (1, 2, 4):
        expected = sdpa(sharpness * query, key, value)
        assert relative_l2(quantized_attention(sharpness * query, key, value), expected) < 0.025


def test_what_all_keys_or_values_share_changes_nothing():
    query, key, value = inputs()
    base = quantized_attention(query, key, value)
    shifted = quantized_attention(query, key + 100, value - 7) + 7
    assert relative_l2(shifted, base) < 2e-3


def test_constant_and_zero_inputs_are_exact():
    query, key, value = inputs(tokens=100)
    constant = torch.full_like(value, 3.0)
    assert torch.equal(quantized_attention(query, key, constant), constant)
    zero = torch.zeros_like(query)
    assert relative_l2(quantized_attention(zero, key, value), sdpa(zero, key, value)) < 0.1
    assert quantized_attention(zero, zero, zero).abs().max() == 0


@pytest.mark.parametrize("broken", range(3))
@pytest.mark.parametrize("what", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(broken, what):
    parts = [x.clone() for x in inputs(tokens=70)]
    parts[broken][0, 0, 3, 5] = what
    assert not quantized_attention(*parts)[0, 0, 3].isfinite().all()


# --- the Triton kernel ---------------------------------------------------------------------------


def run_support(*command: str, **variables: str) -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = ["-m", "support.triton_attention", *command]
    run = forks("torch").run(command, {**environment, **variables})
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def compiled():
    return run_support("compile", "80", "86", "89", "90", "120")


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_kernel_computes_what_the_reference_says_in_the_interpreter():
    rows = run_support("interpret", TRITON_INTERPRET="1")
    compared = [row for row in rows if "to_exact" in row]
    assert len(compared) == 7
    for row in compared:
        # one bfloat16 in two is rounded to its neighbour by a difference in the last bit
        bound = 5e-3 if "bfloat16" in row["case"][3] else 2e-3
        assert row["to_reference"] < bound, row
        assert row["to_exact"] < 0.04, row
        assert row["finite"], row
    broken = [row for row in rows if row["case"][0] == "nan"]
    assert [row["finite"] for row in broken] == [False] * 6


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_kernel_compiles_for_every_gpu_without_spilling(compiled):
    rows = compiled
    assert len(rows) == 4 * (1 + 1 + 3 + 3 + 3)
    for row in rows:
        assert row["stack"] == row["local"] == 0, row
        # of a block: sm86, sm89 and sm120 have 99 KiB, sm90 227
        assert row["shared"] <= (227 if row["capability"] == 90 else 99) * 1024, row
        is_attention = row["kernel"] == "_attend_kernel"
        assert (row["int8_products"] > 0) == is_attention, row
        is_e4m3 = row["capability"] >= 89 and row["tile"] < 2
        assert (row["e4m3_products"] > 0) == (is_attention and is_e4m3), row


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_two_programs_share_a_multiprocessor_of_sm90(compiled):
    """65,536 registers in steps of 8 a thread, 228 KiB of shared memory of which each takes 1."""
    (row,) = (
        row for row in compiled
        if (row["kernel"], row["capability"], row["tile"]) == ("_attend_kernel", 90, 0)
    )  # fmt: skip
    by_registers = 65_536 // (row["threads"] * (-(-row["registers"] // 8) * 8))
    by_memory = 228 * 1024 // (row["shared"] + 1024)
    assert min(by_registers, by_memory) >= 2, row
