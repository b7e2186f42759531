"""Steps of tests/scripts/gpu_check.py: the machine, attention, rates, and the built-in model.

A step is a function of a Context. It hands over every figure as soon as it is measured and asserts
nothing; bounds are judged later, from the file. The models are in gpu_model_steps.py, the video VAE
in gpu_vae_steps.py. What is imported late is not needed by every step.

A figure is named "subject: quantity"; figures of one subject stand on one line of a table.
"""

import gc
import itertools
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from bench_transformer import timed
from comfyui_skyreels.skyreels import kernels
from comfyui_skyreels.skyreels.kernels import blocks, dispatch, operators, reference
from comfyui_skyreels.skyreels.transformer import linear, quant
from torch import Tensor, nn

#: tokens of the fc1 that GELU follows: 97 frames of 544x960 and 60 of text
FULL_TOKENS = 51_060


@dataclass(frozen=True)
class Context:
    """Where a step runs, at which size, and who is told.

    write: takes a record for the file. child: runs another function of these modules in a process
    of its own, for at most so many seconds, and says how it ended.
    """

    device: torch.device
    full: bool
    write: Callable[[dict], None]
    child: Callable[[str, float], str]

    @property
    def is_cuda(self) -> bool:
        """Whether the device is a GPU that torch calls CUDA."""
        return self.device.type == "cuda"

    def emit(self, name: str, value: Any, unit: str = "", **details: Any) -> None:
        """Record a figure: "subject: quantity". Numbers keep six digits."""
        if isinstance(value, float):
            value = float(f"{value:.6g}")
        self.write({"name": name, "value": value, "unit": unit, **details})

    def skip(self, name: str, reason: str) -> None:
        """Record what cannot be measured here, and why."""
        self.write({"name": name, "skipped": reason[:300]})

    def problem(self, name: str, text: str) -> None:
        """Record a measurement that failed."""
        self.write({"name": name, "problem": text[:500]})

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Record an error inside the block as a problem and go on.

        Raises:
            Exception: that which broke the CUDA context; nothing after it would run.
        """
        try:
            yield
        except Exception as error:
            self.problem(name, f"{type(error).__name__}: {error}")
            if dispatch.broke_device(error):
                raise
        else:
            return
        self.tidy()

    def tidy(self) -> None:
        """Give back memory of the GPU that nothing uses any more."""
        if self.is_cuda:
            gc.collect()
            torch.cuda.empty_cache()

    def run_child(self, name: str, limit_s: float) -> None:
        """Run a child; where it does not end well that is a problem, and its figures stand."""
        ended = self.child(name, limit_s)
        if ended != "ok":
            self.problem(name, f"its process {ended}")

    def seconds(self, function: Callable[[], object]) -> float:
        """Of one call."""
        return timed(function, self.device)

    def median(self, function: Callable[[], object], runs: int = 3) -> float:
        """Median seconds of a call, after one to warm up."""
        function()
        return statistics.median(self.seconds(function) for _ in range(runs))


def make_context(
    device: str, full: bool, write: Callable[[dict], None], child: Callable[[str, float], str]
) -> Context:
    """A Context for the device of that name."""
    torch.manual_seed(0)
    where = torch.empty(0, device=device).device
    if where.type == "cpu":  # threads that wait for each other wait long on a busy machine
        torch.set_num_threads(1)
    return Context(where, full, write, child)


def draw_weights(module: nn.Module, seed: int = 0) -> nn.Module:
    """Fill a module with weights large enough that every path matters, drawn where they are.

    As support.tiny.randomize, which draws on the CPU: half a minute for four billion numbers.
    """
    device = next(module.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    for part in module.modules():
        is_norm = isinstance(part, nn.RMSNorm | nn.LayerNorm | nn.GroupNorm)
        for name, parameter in part.named_parameters(recurse=False):
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 16
            center = 1.0 if is_norm and name == "weight" else 0.0
            parameter.data.normal_(center, 0.8 / fan_in**0.5, generator=generator)
    return module.eval().requires_grad_(False)


def relative_difference(got: Tensor, expected: Tensor) -> float:
    """Relative L2 difference."""
    expected = expected.float()
    return ((got.float() - expected).norm() / expected.norm()).item()


# --- the machine --------------------------------------------------------------------------------


@torch.inference_mode()
def environment(context: Context) -> None:
    """Versions, the device, and what a matrix product and a copy reach in this run."""
    context.emit("python: version", sys.version.split()[0])
    context.emit("torch: version", torch.__version__)
    for package in ("triton", "diffusers", "transformers", "numpy", "comfy_kitchen", "cudnn"):
        context.emit(f"{package}: version", _version(package))
    if context.is_cuda:
        properties = torch.cuda.get_device_properties(context.device)
        context.emit("device: name", properties.name)
        context.emit("device: capability", f"{properties.major}.{properties.minor}")
        context.emit("device: memory", properties.total_memory / 1e9, "GB")
        context.emit("device: multiprocessors", properties.multi_processor_count)
        context.emit("libcudnn: version", torch.backends.cudnn.version())
        _clocks(context, "at rest")
    else:
        context.emit("device: name", context.device.type)
    with context.attempt("GEMM: rate"):
        side = 8192 if context.full else 256
        a = torch.randn(side, side, device=context.device, dtype=torch.bfloat16)
        seconds = context.median(lambda: a @ a, 10)
        context.emit("GEMM: rate", 2 * side**3 / seconds / 1e12, "TFLOP/s", side=side)
        if context.is_cuda:
            for _ in range(600 if context.full else 1):  # the clocks of a busy card
                a @ a
            _clocks(context, "at work")
            torch.cuda.synchronize()
    _copies(context)
    _gelu(context)


def _version(package: str) -> str:
    import importlib.metadata

    distribution = {"cudnn": "nvidia-cudnn-frontend", "comfy_kitchen": "comfy-kitchen"}
    try:
        return importlib.metadata.version(distribution.get(package, package))
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _clocks(context: Context, when: str) -> None:
    """Driver, clocks and power, from nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        context.skip(f"driver {when}", "no nvidia-smi")
        return
    asked = {
        "driver": "driver_version", "SM clock": "clocks.sm", "memory clock": "clocks.mem",
        "largest SM clock": "clocks.max.sm", "power": "power.draw", "power limit": "power.limit",
        "temperature": "temperature.gpu",
    }  # fmt: skip
    with context.attempt(f"driver {when}"):
        query = f"--query-gpu={','.join(asked.values())}"
        command = ["nvidia-smi", query, "--format=csv,noheader"]
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        values = said.stdout.splitlines()[0].split(",")
        for name, value in zip(asked, values, strict=True):
            context.emit(f"{when}: {name}", value.strip())


def _copies(context: Context) -> None:
    size = 2**31 if context.full else 2**20
    with context.attempt("copies: on the device"):
        source = torch.ones(size, dtype=torch.uint8, device=context.device)
        target = torch.empty_like(source)
        seconds = context.median(lambda: target.copy_(source), 5)
        context.emit("copies: on the device, read and written", 2 * size / seconds / 1e9, "GB/s")
        if not context.is_cuda:
            context.skip("copies: pinned, to the device", "the host is the device")
            return
        for kind, host in (
            ("pinned", torch.ones(size // 2, dtype=torch.uint8, pin_memory=True)),
            ("pageable", torch.ones(size // 4, dtype=torch.uint8)),
        ):
            part = target[: len(host)]
            seconds = context.median(lambda p=part, h=host: p.copy_(h, non_blocking=True))
            context.emit(f"copies: {kind}, to the device", len(host) / seconds / 1e9, "GB/s")


def _gelu(context: Context) -> None:
    """The first layer of an MLP alone, with GELU in its epilogue, and with a pass of its own."""
    with context.attempt("GELU: trial"):
        for name, text in dispatch.report(linear.decisions(context.device)).items():
            context.emit("GELU: trial", text, of=name)
    tokens, width = (FULL_TOKENS, 3072) if context.full else (64, 32)
    options = {"device": context.device, "dtype": torch.bfloat16}
    with context.attempt("fc1"):
        x = torch.randn(tokens, width, **options)
        weight = torch.randn(4 * width, width, **options) / width**0.5
        bias = torch.randn(4 * width, **options)
        ways = {
            "alone": lambda: F.linear(x, weight, bias),
            "GELU in the epilogue": lambda: torch._addmm_activation(
                bias, x, weight.t(), use_gelu=True
            ),
            "GELU in a pass of its own": lambda: kernels.gelu(F.linear(x, weight, bias)[None]),
        }
        work = 2 * x.numel() * len(weight) / 1e12
        taken = {}
        for name, function in ways.items():
            with context.attempt(f"fc1: {name}"):
                seconds = taken[name] = context.median(function, 5)
                rate = round(work / seconds, 2)
                context.emit(f"fc1: {name}", 1e3 * seconds, "ms", tflops=rate, tokens=tokens)
        with context.attempt("fc1: the epilogue over a pass of its own"):
            _, epilogue, own_pass = (taken[name] for name in ways)
            context.emit("fc1: the epilogue over a pass of its own", epilogue / own_pass)


# --- attention and rates ------------------------------------------------------------------------


def attention(context: Context) -> None:
    """Every attention that can be had, at the length of a clip: speed, and error by kind of input.

    Also what would be chosen, which times kernels at that size again.
    """
    import bench_attention

    def emit(row: dict) -> None:
        name = row["name"]
        if "chosen" in row:
            context.emit(name, row["chosen"])
        elif "unavailable" in row:
            context.skip(name, row["unavailable"])
        elif "failed" in row:
            context.problem(name, row["failed"])
        else:
            context.emit(f"{name}: rate", row["tflops"], "TFLOP/s",
                         tokens=row["tokens"], ms=row["ms"])  # fmt: skip
            for kind, error in row["errors"].items():
                context.emit(f"{name}: error, {kind}", error)

    with context.attempt("attention"):
        bench_attention.run(device=str(context.device), runs=3 if context.full else 1, emit=emit)


def rates(context: Context) -> None:
    """8-bit linear layers beside bf16 ones, and every fused operator beside eager torch."""
    import bench_kernels
    import bench_linear

    def emit_linear(row: dict) -> None:
        name = f"{row['shape']}, {row['name']}"
        if "skipped" in row:
            context.skip(name, row["skipped"])
            return
        details = {key: row[key] for key in ("ms", "error", "rounding_ms") if key in row}
        context.emit(f"{name}: rate", row["tflops"], "TFLOP/s", **details)

    def emit_operator(row: dict) -> None:
        name = row["operator"].rstrip("_") + (f" {row['to']}" if row.get("to") else "")
        if "failed" in row:
            context.problem(name, row["failed"])
            return
        keys = ("shape", "fused_ms", "eager_ms", "speedup", "error", "runs")
        context.emit(f"{name}: rate", row["gb_per_s"], "GB/s", **{key: row[key] for key in keys})
        if row["error_to_eager_error"] is not None:
            context.emit(f"{name}: error over eager error", row["error_to_eager_error"])

    runs = 3 if context.full else 1
    with context.attempt("linear layers"):
        tokens = None if context.full else 8
        bench_linear.run(device=str(context.device), runs=runs, tokens=tokens, emit=emit_linear)
    context.tidy()
    with context.attempt("fused operators"):
        sizes = {"tokens": FULL_TOKENS} if context.full else {"tokens": 96, "width": 256}
        bench_kernels.run(device=str(context.device), runs=runs, emit=emit_operator, **sizes)
    context.tidy()
    with context.attempt("side branches"):
        side_branches(context, runs)
    with context.attempt("GGUF blocks"):
        gguf_blocks(context, runs)


@torch.inference_mode()
def side_branches(context: Context, runs: int) -> None:
    """The side branch of a LoRA on the fused projection, beside plain torch, by what x is in."""
    device, (tokens, width) = context.device, (FULL_TOKENS, 3072) if context.full else (64, 32)
    options = {"device": device, "dtype": torch.bfloat16}
    runs_in = operators.choose("add_low_rank_", device).reason
    for dtype, rank in itertools.product(
        (torch.bfloat16, *quant.STORAGE_DTYPES.values()), (32, 128)
    ):
        name = f"side branch of rank {rank}, {dispatch.short(dtype)}"
        with context.attempt(name):
            x = torch.randn(1, tokens, width, **options)
            given = x if dtype == torch.bfloat16 else reference.quantize_rows(x, dtype)
            down = torch.randn(3 * rank, width, **options) / width**0.5
            up, out = (
                torch.randn(n, m, **options) for n, m in ((3 * width, rank), (tokens, 3 * width))
            )
            segments = [n for part in range(3) for n in (
                part * width, (part + 1) * width, part * rank, (part + 1) * rank)]  # fmt: skip
            parts = (given, None) if isinstance(given, Tensor) else given
            few = [part if part is None else part[:, :512] for part in parts]
            wide = [few[0].double() * (1 if few[1] is None else few[1]), None]
            factors = (down, up, segments)
            exact, *results = (
                out[None, :512].double(),
                out[None, :512].clone(),
                out[None, :512].clone(),
            )
            reference.add_low_rank_(*wide, down.double(), up.double(), segments, exact)
            operator = getattr(torch.ops, kernels.NAMESPACE).add_low_rank_.default
            ways = {"fused": operator, "eager": reference.add_low_rank_}
            for function, result in zip(ways.values(), results, strict=True):
                function(*few, *factors, result)
            errors = [relative_difference(result, exact) for result in results]
            taken = {
                way: 1e3 * context.median(partial(function, *parts, *factors, out[None]), runs)
                for way, function in ways.items()
            }
            rate = 2 * tokens * (3 * rank * width + 3 * width * rank) / taken["fused"] / 1e9
            details = {f"{way}_ms": round(each, 4) for way, each in taken.items()}
            context.emit(f"{name}: rate", rate, "TFLOP/s", error=errors[0], runs=runs_in, **details)
            context.emit(f"{name}: error over eager error", errors[0] / errors[1])


@torch.inference_mode()
def gguf_blocks(context: Context, runs: int) -> None:
    """A weight of an MLP from each kind of GGUF block that the kernel unpacks, and plain torch."""
    device, (rows, columns) = context.device, (3072, 12_288) if context.full else (8, 512)
    runs_in = operators.choose("dequantize_blocks_", device).reason

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device)

    for kind in operators.BLOCK_KINDS:
        with context.attempt(f"GGUF {kind}"):
            data = operators._block_bytes(draw, kind, rows, columns)
            out, plain = torch.empty(2, rows, columns, device=device, dtype=torch.bfloat16)
            ways = {"fused": (kernels.dequantize_blocks_, out),
                    "eager": (blocks.dequantize_blocks_, plain)}  # fmt: skip
            taken = {
                way: 1e3 * context.median(partial(function, data, kind, target), runs)
                for way, (function, target) in ways.items()
            }
            moved = (data.nbytes + out.nbytes) / taken["fused"] / 1e6
            context.emit(f"GGUF {kind}: rate", moved, "GB/s", fused_ms=round(taken["fused"], 4),
                         eager_ms=round(taken["eager"], 4), runs=runs_in)  # fmt: skip
            context.emit(f"GGUF {kind}: difference to plain torch", relative_difference(out, plain))


# --- the built-in model -------------------------------------------------------------------------


def yardstick(context: Context) -> None:
    """The built-in model as a whole: what its clips show in each precision, cached and streamed."""
    if not dispatch.is_installed("transformers"):
        context.skip("built-in model", "transformers is not installed, which reads the prompts")
        return
    import quality
    from train import measure

    studio = quality.Studio(device=str(context.device))
    cases, names = measure.held_out_cases(4), ["fp32", "bf16", "fp8", "int8", "easy cache"]
    if not context.full:  # one clip whose shape is there at the end, in every other setting
        cases, names = [case for case in cases if case.verb != "fade"][:1], names[::2]
    exact = None
    for name in (*names, "streamed"):
        setting = quality.SETTINGS[name]
        if setting.needs_cuda and not context.is_cuda:
            context.skip(name, "weights are already on the only device")
            continue
        if not context.full:
            setting = replace(setting, steps=2)
        with context.attempt(name):
            row, clips, _ = quality.run_setting(studio, setting, cases, exact)
            exact = exact or clips
            units = {"told": "%", "kept": "%", "true": "dB", "exact": "dB", "worst": "dB",
                     "forwards": "", "seconds": "s"}  # fmt: skip
            for key, unit in units.items():
                if row[key] is not None:
                    context.emit(f"{name}: {key}", row[key], unit, cases=len(cases))
        context.tidy()
