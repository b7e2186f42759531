"""Everything that needs a GPU, in one run of under ten minutes; tiny sizes where there is none.

    python tests/scripts/gpu_check.py [--size full|tiny] [--device cuda|cpu]

Each phase compares with a reference in the same process, and ends as "ok", "failed" or "skipped"
with its reason: a phase never reports what it did not measure. The last line is one JSON object.
Copy its figures, dated, to tests/bench/LOG.md. Exit code 1 if a phase failed.
"""

import argparse
import copy
import importlib.util
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
import bench_attention
import bench_kernels
import bench_linear
import bench_load
import bench_transformer
import conftest  # noqa: F401 - loads the package the way ComfyUI does
from bench_transformer import timed
from comfyui_skyreels.skyreels import memory
from comfyui_skyreels.skyreels.attention import (
    FAST,
    Attention,
    Choice,
    choose_attention,
    sdpa,
)
from comfyui_skyreels.skyreels.config import LAYOUTS, TransformerConfig
from comfyui_skyreels.skyreels.layers import rope_table
from comfyui_skyreels.skyreels.memory import placed, weight_bytes
from comfyui_skyreels.skyreels.model import SkyReelsTransformer
from comfyui_skyreels.skyreels.quant import (
    STORAGE_DTYPES,
    QuantLinear,
    is_quantizable,
    quantize,
    rotation_size,
)
from comfyui_skyreels.skyreels.runtime import TorchRuntime
from comfyui_skyreels.skyreels.vae.model import VideoVAE
from support import tiny

#: image tokens of 97 frames of 544x960, and what one forward pass of them takes (performance plan)
FULL_TOKENS, FORWARD_TFLOP = 51_000, 2_634


class Skipped(Exception):  # noqa: N818 - not an error
    """A phase that cannot be measured here, and why."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def environment(device: torch.device, full: bool) -> dict:
    """Versions, the device, and what a matrix product reaches in this run."""
    result = {"torch": torch.__version__, "python": sys.version.split()[0], "device": str(device)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        result["device"] = properties.name
        result["capability"] = f"{properties.major}.{properties.minor}"
        result["memory_gb"] = round(properties.total_memory / 1e9, 1)
        result["cudnn"] = torch.backends.cudnn.version()
    side = 8192 if full else 512
    a = torch.randn(side, side, device=device).bfloat16()
    timed(lambda: a @ a, device)
    seconds = statistics.median(timed(lambda: a @ a, device) for _ in range(5))
    result["gemm_tflops"] = round(2 * side**3 / seconds / 1e12, 3)
    return result


def attention(device: torch.device, full: bool) -> dict:
    """Our attention in bf16 against float32: no worse than twice what rounding costs."""
    tokens = 4096 if full else 300
    q, k, v = torch.randn(3, 1, 4, tokens, 128, device=device)
    scores = (q.double() @ k.double().transpose(-1, -2) * 128**-0.5).softmax(-1)
    truth = (scores @ v.double()).float()
    q16, k16, v16 = q.bfloat16(), k.bfloat16(), v.bfloat16()
    eager = ((q16 @ k16.transpose(-1, -2) * 128**-0.5).softmax(-1) @ v16).float()
    ours = sdpa(q16, k16, v16).float()
    error, loss = (ours - truth).norm(), (eager - truth).norm()
    require(bool(error <= 2 * loss), f"attention error {error:.3g} against eager's {loss:.3g}")
    return {"tokens": tokens, "error_to_eager_error": round((error / loss).item(), 3)}


def attention_kernels(device: torch.device, full: bool) -> dict:
    """Every attention that can be had, at the length of a clip: speed and error."""
    return bench_attention.run(device=str(device), runs=3)


def linears(device: torch.device, full: bool) -> dict:
    """8-bit linear layers beside bf16 ones, at the shapes of the model."""
    return bench_linear.run(device=str(device), runs=3)


def fused_kernels(device: torch.device, full: bool) -> dict:
    """Every fused operator beside eager torch: time and error."""
    sizes = {} if full else {"tokens": 96, "width": 256, "runs": 1}
    result = bench_kernels.run(device=str(device), **sizes)
    worst = result["worst_error_to_eager_error"]
    require(worst <= 1.2, f"an operator loses {worst} times what eager bf16 does")
    return result


def is_fast(choice: Choice) -> bool:
    """Whether an attention in 8 bits was found; else exact attention came back."""
    return choice.name in FAST


def to_8bit(model: torch.nn.Module, precision: str) -> None:
    """Round the block linears as loading.py does, in place."""
    config, storage_dtype = model.config, STORAGE_DTYPES[precision]
    rotation = 0
    if precision == "int8":
        rotation = rotation_size(config.hidden_size, int(config.hidden_size * config.mlp_ratio))
    for name, layer in list(model.named_modules()):
        is_linear = isinstance(layer, torch.nn.Linear)
        if is_linear and is_quantizable(name + ".weight", config.num_layers):
            weight, scale = quantize(layer.weight.data, storage_dtype, rotation)
            quantized = QuantLinear(
                weight, scale, layer.bias, rotation=rotation, weight_only=False,
                compute_dtype=layer.weight.dtype,
            )  # fmt: skip
            model.set_submodule(name, quantized)


@torch.inference_mode()
def accuracy(device: torch.device, full: bool) -> dict:
    """What each mode loses in one forward pass of two and two blocks, against float32."""
    tokens, heads = (16_384, 24) if full else (256, 2)
    config = TransformerConfig(
        num_attention_heads=heads, num_layers=2, num_single_layers=2, num_refiner_layers=1,
        text_embed_dim=256, pooled_projection_dim=64,
    )  # fmt: skip
    model = tiny.transformer(config).to(device)
    inputs = tiny.inputs(config, 60, (tokens // 256, 32, 32))
    inputs = {name: value.to(device) for name, value in inputs.items()}
    truth = model(**inputs)
    keep = ("timestep", "guidance")
    half = {k: v if k in keep else v.bfloat16() for k, v in inputs.items()}
    fast = choose_attention(device, "fast", head_dim=config.attention_head_dim)
    result: dict = {"fast_attention": f"{fast.name}: {fast.reason}"}

    def loss(output: torch.Tensor) -> float:
        return ((output.float() - truth).norm() / truth.norm()).item()

    theirs = tiny.diffusers_transformer(model.float().cpu()).to(device, torch.bfloat16)
    mask = torch.ones(1, 60, dtype=torch.long, device=device)
    result["diffusers bf16"] = loss(theirs(**half, encoder_attention_mask=mask).sample)
    del theirs
    exact = model.to(device, torch.bfloat16)
    result["bf16"] = loss(exact(**half))
    modes, bounds = {"": sdpa}, {"": 0.06, ", fast attention": 0.08}
    if is_fast(fast):
        modes[", fast attention"] = fast.function
        result["bf16, fast attention"] = loss(exact(**half, attention=fast.function))
    require(result["bf16"] <= 1.2 * result["diffusers bf16"], "bf16 loses more than diffusers'")
    for precision in STORAGE_DTYPES:
        model = copy.deepcopy(exact)
        to_8bit(model, precision)
        for kind, function in modes.items():
            error = result[precision + kind] = loss(model(**half, attention=function))
            bound = bounds[kind]
            require(error <= bound, f"{precision}{kind} loses {error:.3g}, {bound} is allowed")
    return {k: round(v, 5) if isinstance(v, float) else v for k, v in result.items()}


def small_model(device: torch.device, full: bool) -> dict:
    """Two and two blocks beside diffusers', same weights, both dtypes."""
    tokens, heads = (16_384, 24) if full else (512, 2)
    result = {}
    for dtype in ("fp32", "bf16"):
        row = bench_transformer.run(
            tokens=tokens, runs=3, dtype=dtype, device=str(device), heads=heads
        )
        bound = {"fp32": 1e-4 if device.type == "cuda" else 1e-5, "bf16": 0.1}[dtype]
        require(row["relative_error"] <= bound, f"{dtype} differs by {row['relative_error']:.3g}")
        result[dtype] = {
            k: row[k] for k in ("median_s", "ratio_to_trimmed", "ratio_to_padded", "relative_error")
        }
    return result


def fill(model: torch.nn.Module) -> None:
    """Random weights of a sensible size: zeros would run faster than any real model."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.02)
        else:
            parameter.data.normal_(mean=1.0 if parameter.numel() == 128 else 0.0, std=0.02)


def beside_diffusers(
    ours: SkyReelsTransformer, inputs: dict, device: torch.device
) -> tuple[float, dict[str, list[float]]]:
    """Relative difference of the outputs, and the seconds of both, which take turns."""
    from diffusers import HunyuanVideoTransformer3DModel

    with torch.device("meta"):
        theirs = HunyuanVideoTransformer3DModel(**tiny.diffusers_config(ours.config)).eval()
    theirs.load_state_dict(tiny.to_diffusers(ours.state_dict(), ours.config), assign=True)
    padded = {k: v for k, v in inputs.items() if k not in ("rope", "attention")}
    states = padded["encoder_hidden_states"]
    pad = 256 - states.shape[1]
    padded["encoder_hidden_states"] = torch.nn.functional.pad(states, (0, 0, 0, pad))
    mask = torch.zeros(1, 256, dtype=torch.long, device=device)
    mask[:, : states.shape[1]] = 1
    contenders = {
        "diffusers": lambda: theirs(**padded, encoder_attention_mask=mask, return_dict=False)[0],
        "ours": lambda: ours(**inputs, layout=LAYOUTS["chunks"]),
    }
    yours, mine = (contenders[name]().float() for name in ("diffusers", "ours"))
    require(bool(mine.isfinite().all()), "our output is not finite")
    difference = ((mine - yours).norm() / yours.norm()).item()
    require(difference < 0.05, f"bf16 outputs differ by {difference:.3g}")
    del mine, yours
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(3):
        for name, function in contenders.items():
            seconds[name].append(timed(function, device))
    return difference, seconds


@torch.inference_mode()
def full_model(device: torch.device, full: bool) -> dict:
    """A whole forward pass at full size: beside diffusers' on the same weights, in every mode, and
    what each layout takes."""
    if full and torch.cuda.mem_get_info()[0] < 60e9:
        raise Skipped("full-size weights and a copy of the blocks need 60 GB free")
    config = TransformerConfig() if full else tiny.TRANSFORMER
    grid, text_tokens = ((25, 68, 120), 60) if full else ((3, 8, 8), 60)
    with torch.device("meta"):
        ours = SkyReelsTransformer(config).bfloat16().requires_grad_(False)
    ours = ours.to_empty(device=device).eval()
    fill(ours)
    inputs = tiny.inputs(config, text_tokens, grid)
    keep = ("timestep", "guidance")
    inputs = {k: v.to(device) if k in keep else v.to(device).bfloat16() for k, v in inputs.items()}
    inputs["rope"] = rope_table(ours.token_grid(inputs["hidden_states"].shape), config,
                                device=device)  # fmt: skip
    exact = choose_attention(device).function
    inputs["attention"] = exact
    difference, seconds = beside_diffusers(ours, inputs, device)
    result = {"tokens": inputs["rope"].shape[0], "relative_l2": round(difference, 5)}
    conditions = {k: v for k, v in inputs.items() if k not in ("hidden_states", "rope")}
    conditioning = ours.condition(**conditions)

    def denoise(attention: Attention, layout: str = "chunks") -> torch.Tensor:
        return ours.denoise(
            inputs["hidden_states"], conditioning, rope=inputs["rope"], attention=attention,
            layout=LAYOUTS[layout],
        )  # fmt: skip

    modes = {"": exact}
    fast = choose_attention(device, "fast", head_dim=config.attention_head_dim)
    result["fast_attention"] = f"{fast.name}: {fast.reason}"
    if is_fast(fast):
        modes[", fast attention"] = fast.function
    if device.type == "cuda":
        result["activation_gb"] = {}
        for layout in LAYOUTS:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            denoise(exact, layout)
            peak = torch.cuda.max_memory_allocated() - before
            num_tokens = inputs["rope"].shape[0] + text_tokens
            planned = memory.sampling_bytes(config, num_tokens, torch.bfloat16, layout)
            row = {"peak": round(peak / 1e9, 2), "planned": round(planned / 1e9, 2)}
            result["activation_gb"][layout] = row
            if full:
                require(peak <= planned, f"{layout} takes more memory than is planned: {row}")

    def measure(name: str) -> None:
        for kind, function in modes.items():
            denoise(function)
            times = [timed(lambda f=function: denoise(f), device) for _ in range(3)]
            seconds[name + kind] = times

    measure("denoise bf16")
    for precision in ("int8", "fp8"):  # a copy of the blocks at a time: 18 GB rounded to 9
        blocks = {n: getattr(ours, n) for n in ("double_blocks", "single_blocks")}
        for name, modules in blocks.items():
            setattr(ours, name, copy.deepcopy(modules))
        to_8bit(ours, precision)
        measure("denoise " + precision)
        for name, modules in blocks.items():
            setattr(ours, name, modules)
    result["median_s"] = {
        name: round(statistics.median(values), 4) for name, values in seconds.items()
    }
    return result


@torch.inference_mode()
def streaming(device: torch.device, full: bool) -> dict:
    """Streamed blocks give the bits of resident ones; what the visits cost."""
    if device.type != "cuda":
        raise Skipped("weights are already on the only device")
    config = TransformerConfig(num_layers=2, num_single_layers=4) if full else tiny.TRANSFORMER
    model = tiny.transformer(config).bfloat16()
    inputs = tiny.inputs(config, 60, (13, 34, 60) if full else (3, 8, 8))
    inputs = {k: v.to(device) for k, v in inputs.items()}
    results, seconds = [], []
    for spare in (10 * weight_bytes(model), max(map(weight_bytes, model.blocks))):
        runtime = TorchRuntime(device)
        outside = weight_bytes(model) - sum(map(weight_bytes, model.blocks))
        runtime.free_bytes = lambda b=outside + spare + memory.RESERVE_BYTES: b
        with placed(model, runtime, 0) as run_block:
            results.append(model(**inputs, run_block=run_block).cpu())
            seconds.append(timed(lambda: model(**inputs, run_block=run_block), device))
    require(torch.equal(*results), "streamed and resident outputs differ")
    require(all(p.device.type == "cpu" for p in model.parameters()), "weights did not come home")
    return {"resident_s": round(seconds[0], 4), "streamed_s": round(seconds[1], 4)}


@torch.inference_mode()
def decoding(device: torch.device, full: bool) -> dict:
    """VAE decode beside diffusers' with the same tiles: same frames, time and memory of each."""
    from comfyui_skyreels.skyreels.config import VAEConfig
    from comfyui_skyreels.skyreels.vae.tiling import decode_frames
    from diffusers import AutoencoderKLHunyuanVideo

    config = VAEConfig() if full else tiny.VAE
    shape = (1, 16, 25, 68, 120) if full else (1, 16, 5, 10, 12)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    ours = tiny.randomize(VideoVAE(config)).to(device, dtype)
    theirs = AutoencoderKLHunyuanVideo(
        block_out_channels=config.block_out_channels, layers_per_block=config.layers_per_block
    )
    theirs.load_state_dict(ours.state_dict())
    theirs = theirs.to(device, dtype).eval()
    theirs.enable_tiling()
    latents = torch.randn(shape, device=device)
    runtime = TorchRuntime(device)
    contenders = {
        "ours tiled-diffusers": lambda: decode_frames(
            ours, latents, "tiled-diffusers", runtime=runtime
        ),
        "diffusers tiled": lambda: theirs.decode(latents.to(dtype)).sample,
        "ours auto": lambda: decode_frames(ours, latents, "auto", runtime=runtime),
    }
    rows = {}
    for name, function in contenders.items():
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        row = {"seconds": round(timed(function, device), 3)}
        if device.type == "cuda":
            row["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        rows[name] = row
    frames = contenders["ours tiled-diffusers"]()
    expected = (contenders["diffusers tiled"]()[0].permute(1, 2, 3, 0).float().cpu() + 1) / 2
    error = (frames - expected.clamp(0, 1)).abs().max().item()
    bound = 0.1 if dtype == torch.bfloat16 else 1e-4
    require(error <= bound, f"tiled frames differ from diffusers' by {error:.3g}")
    return {"rows": rows, "largest_difference": round(error, 6)}


def yardstick(device: torch.device, full: bool) -> dict:
    """The built-in model as a whole: what its clips show in each precision, and streamed."""
    if importlib.util.find_spec("transformers") is None:
        raise Skipped("transformers is not installed, which reads the prompts")
    from bench import quality
    from train import measure

    studio, cases = quality.Studio(device=str(device)), measure.held_out_cases(32 if full else 4)
    rows, exact = {}, None
    for name in ("fp32", "bf16", "fp8", "int8", "easy cache", "streamed"):
        if quality.SETTINGS[name].needs_cuda and device.type != "cuda":
            continue
        row, clips, _ = quality.run_setting(studio, quality.SETTINGS[name], cases, exact)
        exact = exact or clips
        keys = ("told", "kept", "true", "exact", "forwards", "seconds")
        rows[name] = {key: row[key] for key in keys}
        require(row["told"] >= 75, f"{name}: {row['told']} % of the clips do as told")
    return {"cases": len(cases), "rows": rows}


def loading(device: torch.device, full: bool) -> dict:
    """Seconds and memory of loading a file in each precision, in processes of their own."""
    return bench_load.run(device=str(device), heads=24 if full else 2)


PHASES: dict[str, Callable[[torch.device, bool], dict]] = {
    "environment": environment,
    "attention": attention,
    "attention_kernels": attention_kernels,
    "linears": linears,
    "fused_kernels": fused_kernels,
    "accuracy": accuracy,
    "small_model": small_model,
    "full_model": full_model,
    "streaming": streaming,
    "decoding": decoding,
    "loading": loading,
    "yardstick": yardstick,
}


def bars(report: dict) -> dict:
    """Bars 11 to 15 of the speed plan, from what the phases measured; None for what they did not.

    Step caching is computed: the best step, times the share of the forward passes that the built-in
    model needs with its default threshold. Random weights say nothing about that.
    """
    environment, model = report.get("environment", {}), report.get("full_model", {})
    if model.get("tokens") != FULL_TOKENS:  # of a small one they would say nothing
        model = {}
    rows = report.get("yardstick", {}).get("rows", {})
    seconds = model.get("median_s", {})
    theirs, exact = seconds.get("diffusers"), seconds.get("denoise bf16")
    linears = [seconds[n] for n in ("denoise fp8", "denoise int8") if n in seconds]
    both = [seconds[n + ", fast attention"] for n in ("denoise fp8", "denoise int8")
            if n + ", fast attention" in seconds]  # fmt: skip
    share = None
    if "easy cache" in rows:
        share = rows["easy cache"]["forwards"] / rows["fp32"]["forwards"]

    def ratio(mine: float | None) -> float | None:
        return round(theirs / mine, 3) if theirs and mine else None

    best = min(both, default=None)
    return {
        "11 exact bf16": ratio(exact),
        "12 8-bit linears": ratio(min(linears, default=None)),
        "13 8-bit linears and attention": ratio(best),
        "14 and caching, computed": ratio(best * share if best and share else None),
        "15 share of the matrix product": (
            round(FORWARD_TFLOP / exact / environment["gemm_tflops"], 3) if exact else None
        ),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default)
    parser.add_argument("--size", choices=("full", "tiny"), default=None)
    parser.add_argument("--only", choices=PHASES, action="append")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    full = (arguments.size or ("full" if device.type == "cuda" else "tiny")) == "full"
    if full and device.type != "cuda":
        parser.error("full size needs a CUDA device")
    torch.manual_seed(0)
    report = {}
    for name, phase in PHASES.items():
        if arguments.only and name not in arguments.only:
            continue
        start = time.perf_counter()
        try:
            outcome = {"status": "ok", **phase(device, full)}
        except Skipped as reason:
            outcome = {"status": "skipped", "reason": str(reason)}
        except Exception as error:  # noqa: BLE001 - the other phases still have their turn
            traceback.print_exc()
            outcome = {"status": "failed", "reason": str(error)[:500]}
        outcome["seconds"] = round(time.perf_counter() - start, 2)
        report[name] = outcome
        print(f"{name:12} {json.dumps(outcome)}", flush=True)
    report["bars"] = bars(report)
    print(f"{'bars':12} {json.dumps(report['bars'])}", flush=True)
    counts = {
        s: sum(o.get("status") == s for o in report.values()) for s in ("ok", "skipped", "failed")
    }
    print(json.dumps({"gpu_check": "full" if full else "tiny", **counts, "phases": report}))
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
