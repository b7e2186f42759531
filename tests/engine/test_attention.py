"""Which attention runs where and why, what is refused, and the arithmetic of the one in 8 bits."""

import importlib.machinery
import importlib.util
import json
import logging
import os
import subprocess
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from comfyui_skyreels.skyreels import attention, cli
from comfyui_skyreels.skyreels.attention import Machine, choose_attention, int8_attention, sdpa
from comfyui_skyreels.skyreels.conditioning import ImageConditioning
from comfyui_skyreels.skyreels.errors import OptionError, OutOfRoomError
from comfyui_skyreels.skyreels.sampling import run_bytes
from comfyui_skyreels.skyreels.text import PromptEmbeds
from support import tiny
from support.project import ROOT
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
CUDNN, FLASH = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION
EFFICIENT, MATH = SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
#: GPUs as `describe` would show them
MACHINES = {
    "sm75": Machine("cuda", (7, 5), 91900),
    "sm80": Machine("cuda", (8, 0), 91900),
    "sm86": Machine("cuda", (8, 6), 91900),
    "sm89": Machine("cuda", (8, 9), 91900),
    "sm90": Machine("cuda", (9, 0), 91900),
    "sm90, old cuDNN": Machine("cuda", (9, 0), 91500),
    "sm90, no cuDNN": Machine("cuda", (9, 0), 0),
    "sm100": Machine("cuda", (10, 0), 91501),
    "sm120": Machine("cuda", (12, 0), 91900),
    "sm120, Windows": Machine("cuda", (12, 0), 91900, has_flash=False),
    "AMD": Machine("cuda", None),
    "CPU": Machine("cpu"),
}
HAS_TRITON = importlib.util.find_spec("triton") is not None


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Nothing tried or said before, and none of the packages installed."""
    monkeypatch.setattr(attention, "_tried", {})
    monkeypatch.setattr(attention, "_said", set())
    for fast in attention.FAST.values():
        monkeypatch.setitem(sys.modules, fast.package, None)


@pytest.fixture
def machine(monkeypatch):
    """Let every device look like one of MACHINES."""

    def use(name: str) -> None:
        monkeypatch.setattr(attention, "describe", lambda device: MACHINES[name])

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
    return list(attention.probe_inputs(tokens, heads, head_dim))


def relative_l2(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


class Watch(TorchFunctionMode):
    """Notes torch's kernels, in order, as they are allowed while attention runs."""

    allowed = None

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            self.allowed = _cur_sdpa_kernel_backends(with_priority=True)
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
        ("sm90, old cuDNN", [FLASH, EFFICIENT], "version 9.15.0: lengths need 9.15.1"),
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
    before = _cur_sdpa_kernel_backends(with_priority=True)
    choice = choose_attention(CPU)
    query, key, value = inputs()
    with Watch() as watch:
        got = choice.function(query, key, value)
    assert watch.allowed == [*order, MATH]
    assert _cur_sdpa_kernel_backends(with_priority=True) == before
    assert words in choice.reason
    names = {CUDNN: "cuDNN", FLASH: "flash", EFFICIENT: "memory-efficient"}
    assert choice.name == names[order[0]]
    assert relative_l2(got, sdpa(query, key, value)) < 1e-5


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
    got = choice.function(query, key, value)
    assert got.dtype == torch.bfloat16
    assert got.transpose(1, 2).is_contiguous()
    wide = sdpa(query.float(), key.float(), value.float())
    rounding = relative_l2(wide.bfloat16().float(), wide)
    assert relative_l2(got.float(), wide) < 1.01 * rounding


def test_devices_torch_alone_knows_are_left_to_it():
    assert choose_attention("meta").function is sdpa
    assert "meta" in choose_attention("meta").reason


def test_unknown_mode_is_refused():
    with pytest.raises(OptionError, match="'quick' is not one of exact, fast"):
        choose_attention(CPU, "quick")


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch says why, in several
def test_quadratic_memory_is_refused_with_its_number():
    # no fused kernel of the CPU takes a head dimension that is not contiguous
    query, key, value = torch.randn(3, 1, 24, 16, 5000).transpose(-1, -2)
    attend = choose_attention(CPU).function
    with pytest.raises(OutOfRoomError, match=r"2,400,000,000 bytes .* \(2,000,000,000 are allowed"):
        attend(query, key, value)
    short = [x[:, :, :40] for x in (query, key, value)]
    assert relative_l2(attend(*short), sdpa(*(x.contiguous() for x in short))) < 1e-5
    # and the same length runs where a kernel takes it
    assert attend(*(x[:, :1].contiguous() for x in (query, key, value))).isfinite().all()


def test_other_faults_pass_through():
    query, key, value = inputs()
    with pytest.raises(RuntimeError, match="size"):
        choose_attention(CPU).function(query, key[..., :7], value)


def test_output_of_views_of_one_buffer_needs_no_copy():
    query, key, value = inputs(tokens=1001)
    assert not query.is_contiguous()
    got = choose_attention(CPU).function(query, key, value)
    assert got.transpose(1, 2).is_contiguous()


# --- fast ----------------------------------------------------------------------------------------


def close(query, key, value):
    """Exact but for a per cent."""
    out = sdpa(query, key, value)
    return out + 0.01 * out.std() * torch.randn_like(out)


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


@pytest.mark.parametrize(
    ("name", "package", "attributes"),
    [
        ("comfy-kitchen", "comfy_kitchen", {"int8_attention": close}),
        ("SageAttention", "sageattention", {"sageattn": sage_1}),
        ("SageAttention", "sageattention", {"sageattn": sage_2}),
        ("FA3", "flash_attn_interface", {"flash_attn_func": fa3}),
    ],
)
def test_each_fast_kernel_is_found_tried_and_used(machine, install, name, package, attributes):
    machine("sm90")
    install(package, **attributes)
    choice = choose_attention(CPU, "fast", dtype=torch.float32)
    assert choice.name == name
    query, key, value = inputs(tokens=1100, head_dim=128)
    kept, expected = key.clone(), sdpa(query, key, value)
    got = choice.function(query, key, value)
    assert 1e-4 < relative_l2(got, expected) < 0.04
    assert torch.equal(key, kept), "the caller's keys were written to"


def test_short_sequences_stay_exact(machine, install):
    machine("sm90")
    install("comfy_kitchen", int8_attention=close)
    query, key, value = inputs(tokens=attention.FAST_MIN_TOKENS - 1)
    got = choose_attention(CPU, "fast").function(query, key, value)
    assert relative_l2(got, sdpa(query, key, value)) < 1e-5


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({"int8_attention": lambda q, k, v: sdpa(q, k, v) * float("nan")}, "error nan"),
        ({"int8_attention": lambda q, k, v: sdpa(q, k, v) * 1.1}, "error 0.1 on a small input"),
        (
            {"int8_attention": lambda q, k, v: sdpa(q, k, v)[:, :, 1:]},
            "it returns [1, 2, 999, 128]",
        ),
        ({"int8_attention": lambda q, k, v: 1 / 0}, "ZeroDivisionError (division by zero)"),
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
    choice = choose_attention(CPU, "fast")
    assert choice.name == "flash"
    assert words in choice.reason
    query, key, value = inputs(tokens=1100, head_dim=128)
    assert relative_l2(choice.function(query, key, value), sdpa(query, key, value)) < 1e-5
    assert [r.levelno for r in caplog.records if r.name == attention.__name__] == [logging.WARNING]
    assert words in caplog.text


def test_the_next_one_takes_over_and_the_log_says_why(machine, install, caplog):
    caplog.set_level(logging.INFO)
    machine("sm80")
    install("comfy_kitchen", int8_attention=lambda q, k, v: v)
    install("sageattention", sageattn=sage_2)
    assert choose_attention(CPU, "fast").name == "SageAttention"
    (record,) = [r for r in caplog.records if r.name == attention.__name__]
    assert "SageAttention in 8 bits, error" in record.message
    assert "Not used: comfy-kitchen: error" in record.message


def test_a_kernel_is_tried_once_and_said_once(machine, install, caplog):
    caplog.set_level(logging.INFO)
    machine("sm80")
    calls = []

    def counted(query, key, value):
        calls.append(query.shape)
        return close(query, key, value)

    install("comfy_kitchen", int8_attention=counted)
    for _ in range(3):
        choose_attention(CPU, "fast")
        choose_attention(CPU)
    assert len(calls) == 1
    assert len([r for r in caplog.records if r.name == attention.__name__]) == 2


def test_a_package_installed_later_is_found(machine, install):
    machine("sm80")
    assert choose_attention(CPU, "fast").name == "flash"
    install("sageattention", sageattn=sage_2)
    assert choose_attention(CPU, "fast").name == "SageAttention"


def test_another_device_is_looked_at_anew(monkeypatch, install, caplog):
    caplog.set_level(logging.INFO)
    install("comfy_kitchen", int8_attention=close)
    kinds = {"cpu": MACHINES["sm80"], "meta": MACHINES["AMD"]}
    monkeypatch.setattr(attention, "describe", lambda device: kinds[device.type])
    assert choose_attention("cpu", "fast").name == "comfy-kitchen"
    assert choose_attention("meta", "fast").name == "flash"
    assert choose_attention("cpu", "fast").name == "comfy-kitchen"
    assert "on cpu" in caplog.text
    assert "on meta" in caplog.text


@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("sm75", {"comfy-kitchen": "found", "SageAttention": "not made for sm75", "FA3": "not made",
                  "Triton": "not made"}),
        ("sm86", {"comfy-kitchen": "found", "SageAttention": "found", "FA3": "not made for sm86",
                  "Triton": "found"}),
        ("sm90", {"comfy-kitchen": "found", "SageAttention": "found", "FA3": "found",
                  "Triton": "found"}),
        ("sm100", {"comfy-kitchen": "found", "FA3": "not made", "Triton": "not made for sm100"}),
        ("sm120", {"FA3": "not made for sm120", "Triton": "found"}),
        ("AMD", {"comfy-kitchen": "needs an NVIDIA GPU", "Triton": "needs an NVIDIA GPU"}),
        ("CPU", {"comfy-kitchen": "needs an NVIDIA GPU, this is cpu"}),
    ],
)  # fmt: skip
def test_report_says_what_is_found_without_importing_it(machine, monkeypatch, name, refused):
    machine(name)
    monkeypatch.setattr(attention, "_is_installed", lambda package: True)
    found = attention.report(CPU)
    assert found["attention"].endswith("used, exact")
    for kernel, words in refused.items():
        assert words in found[f"8-bit attention, {kernel}"]
    assert sys.modules["comfy_kitchen"] is None


def test_report_names_what_is_missing(machine):
    machine("sm90")
    found = attention.report(CPU)
    assert found["8-bit attention, SageAttention"] == "sageattention is not installed"
    assert "triton-windows" in found["8-bit attention, Triton"]


def test_hopper_prefers_the_kernels_made_for_it(machine, install):
    install("comfy_kitchen", int8_attention=close)
    install("sageattention", sageattn=sage_2)
    machine("sm90")
    assert choose_attention(CPU, "fast").name == "SageAttention"
    machine("sm89")
    assert choose_attention(CPU, "fast").name == "comfy-kitchen"


@pytest.mark.parametrize(
    ("error", "gain", "is_fit"),
    [(0.01, 1.3, True), (0.01, None, True), (0.01, 1.0, False), (0.05, 2.0, False),
     (float("nan"), 2.0, False)],
)  # fmt: skip
def test_what_is_not_faster_or_not_right_is_not_used(error, gain, is_fit):
    verdict, finding = attention.judge(error, gain, "cuDNN")
    assert verdict == is_fit
    assert f"error {error:.2g}" in finding


def test_fast_on_a_cpu_is_exact_and_says_so(caplog):
    choice = choose_attention(CPU, "fast")
    assert choice.name == "flash"
    assert "needs an NVIDIA GPU, this is cpu" in caplog.text


def test_fast_reaches_the_blocks_from_the_command_line(machine, install, monkeypatch, tmp_path):
    lengths = []

    def counted(query, key, value):
        lengths.append(key.shape[2])
        return close(query, key, value)

    machine("sm89")
    install("comfy_kitchen", int8_attention=counted)
    monkeypatch.setattr(attention, "FAST_MIN_TOKENS", 30)
    size = ["--width", "64", "--height", "64", "--frames", "5", "--steps", "1", "--cfg", "1"]
    command = ["generate", "--prompt", "x", *size, "--out", str(tmp_path / "a.npy")]
    assert cli.main(command) == 0
    assert lengths == []
    assert cli.main([*command, "--attention", "fast"]) == 0
    probe, *run = lengths
    assert probe == 1000
    assert len(run) == 6, "one call a block, none of the text refiner"
    assert min(run) > 32


def test_fast_is_planned_with_more_memory():
    model = tiny.transformer()
    image = ImageConditioning(torch.zeros(1, 16, 1, 8, 8), 64, 64, 9)
    states = torch.zeros(1, 7, model.config.text_embed_dim)
    prompt = PromptEmbeds(states, torch.zeros(1, model.config.pooled_projection_dim))
    exact, fast = (
        run_bytes(model, image, prompt, None, attention=mode) for mode in attention.MODES
    )
    assert fast - exact == attention.FAST_BYTES * (3 * 4 * 4 + 7) * model.config.hidden_size


def test_our_kernel_names_the_head_dimensions_it_takes(machine, monkeypatch):
    if not HAS_TRITON:
        pytest.skip("Triton is not installed")
    monkeypatch.delitem(sys.modules, "triton")
    import triton  # noqa: F401 - the module may have been imported before

    machine("sm89")
    reason = choose_attention(CPU, "fast", head_dim=16).reason
    assert "head dimensions (32, 64, 128), not 16" in reason


# --- arithmetic ----------------------------------------------------------------------------------


def plain_int8(query, key, value):
    """Queries and keys rounded with a scale a row, and nothing else done."""
    rounded = []
    for x in (query, key):
        scale = x.abs().amax(dim=-1, keepdim=True) / 127
        rounded.append((x / scale).round() * scale)
    return sdpa(*rounded, value)


@pytest.mark.parametrize("tile", [64, 128])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_error_on_gaussian_inputs(head_dim, tile):
    query, key, value = torch.randn(3, 1, 2, 2003, head_dim)
    error = relative_l2(int8_attention(query, key, value, tile=tile), sdpa(query, key, value))
    assert error < 0.025


@pytest.mark.parametrize("head_dim", [64, 128])
def test_error_with_outliers_and_what_smoothing_is_worth(head_dim):
    query, key, value = torch.randn(3, 1, 2, 2003, head_dim)
    query[..., 5] *= 5
    key[..., 7] *= 5
    key += 20 * torch.randn(1, 2, 1, head_dim)  # what all keys share
    value[..., 9] += 30
    value[:, :, -50:] *= 20  # text
    expected = sdpa(query, key, value)
    error = relative_l2(int8_attention(query, key, value), expected)
    assert error < 0.04
    assert relative_l2(plain_int8(query, key, value), expected) > 4 * error


def test_error_where_few_keys_count():
    query, key, value = inputs(tokens=2003, head_dim=128)
    for sharpness in (1, 2, 4):
        expected = sdpa(sharpness * query, key, value)
        assert relative_l2(int8_attention(sharpness * query, key, value), expected) < 0.02


def test_what_all_keys_or_values_share_changes_nothing():
    query, key, value = inputs()
    base = int8_attention(query, key, value)
    shifted = int8_attention(query, key + 100, value - 7) + 7
    assert relative_l2(shifted, base) < 2e-3


def test_constant_and_zero_inputs_are_exact():
    query, key, value = inputs(tokens=100)
    assert torch.equal(int8_attention(query, key, torch.full_like(value, 3.0)),
                       torch.full_like(value, 3.0))  # fmt: skip
    zero = torch.zeros_like(query)
    assert relative_l2(int8_attention(zero, key, value), sdpa(zero, key, value)) < 0.02
    assert int8_attention(zero, zero, zero).abs().max() == 0


@pytest.mark.parametrize("broken", range(3))
@pytest.mark.parametrize("what", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(broken, what):
    parts = [x.clone() for x in inputs(tokens=70)]
    parts[broken][0, 0, 3, 5] = what
    assert not int8_attention(*parts)[0, 0, 3].isfinite().all()


# --- the Triton kernel ---------------------------------------------------------------------------


def run_support(*command: str, **variables: str) -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "support.triton_attention", *command],
        cwd=ROOT / "tests", env={**environment, **variables}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_kernel_computes_what_the_reference_says_in_the_interpreter():
    rows = run_support("interpret", TRITON_INTERPRET="1")
    compared = [row for row in rows if "to_exact" in row]
    assert len(compared) == 5
    for row in compared:
        # the interpreter cuts bfloat16 off where it should round it: half a unit in the last place
        bound = 5e-3 if "bfloat16" in row["case"][-1] else 5e-4
        assert row["to_reference"] < bound, row
        assert row["to_exact"] < 0.015, row
        assert row["finite"], row
    broken = [row for row in rows if row["case"][0] == "nan"]
    assert [row["finite"] for row in broken] == [False] * 3


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_kernel_compiles_for_every_gpu_without_spilling():
    rows = run_support("compile", "80", "86", "89", "90", "120")
    assert len(rows) == 5 * 4
    for row in rows:
        assert row["stack"] == row["local"] == 0, row
        # of a block: sm86, sm89 and sm120 have 99 KiB, sm90 227
        assert row["shared"] <= (227 if row["capability"] == 90 else 99) * 1024, row
        assert (row["int8_products"] > 0) == (row["kernel"] == "_attend_kernel"), row
