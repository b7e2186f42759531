"""Steps of tests/scripts/gpu_check.py that run the transformer.

Weights are random and drawn on the device; the size is the real one, or tiny. Every timing comes in
rounds, and the median so far is recorded after each, so that a step that is cut short has some.
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import ClassVar

import bench_attention
import torch
import torch.nn.functional as F
from bench_attention import Unavailable
from comfyui_skyreels.skyreels.conditioning.embeds import PromptEmbeds
from comfyui_skyreels.skyreels.conditioning.latents import ImageConditioning
from comfyui_skyreels.skyreels.config import CHUNKINGS, TransformerConfig
from comfyui_skyreels.skyreels.kernels import dispatch, reference
from comfyui_skyreels.skyreels.plan import (
    Job,
    expectation,
    machine_of,
    plan_run,
    rates_needed,
    weights_of,
)
from comfyui_skyreels.skyreels.runtime import TorchRuntime, offload
from comfyui_skyreels.skyreels.runtime.streaming import CudaCopies, least_bytes, padded_bytes
from comfyui_skyreels.skyreels.sampling.sample import sample
from comfyui_skyreels.skyreels.sampling.settings import SamplingSettings, get_sigmas
from comfyui_skyreels.skyreels.transformer import attention, placement, quant
from comfyui_skyreels.skyreels.transformer.attention import Attention, choose_attention
from comfyui_skyreels.skyreels.transformer.attention_quality import draw
from comfyui_skyreels.skyreels.transformer.layers import rope_table
from comfyui_skyreels.skyreels.transformer.model import (
    RunBlock,
    SkyReelsTransformer,
    StepModulation,
    call,
)
from comfyui_skyreels.skyreels.transformer.placement import placed
from comfyui_skyreels.skyreels.transformer.quant import (
    STORAGE_DTYPES,
    QuantLinear,
    hadamard_block_size,
    is_quantizable,
    quantize,
)
from gpu_steps import Context, draw_weights, relative_difference
from support import tiny
from torch import Tensor

TEXT_TOKENS, PADDED_TOKENS = 60, 256
#: latents of 97 frames of 544x960
FULL_GRID, TINY_GRID = (25, 68, 120), (3, 8, 8)
#: kind of work -> what the names of its kernels (on a CPU, of its operators) hold; first fit counts
KINDS_OF_WORK = {
    "attention": ("sdpa", "flash", "fmha", "attend", "attention", "_quantize_rotated",
                  "_quantize_values"),
    "GEMM and convolution": ("conv", "implicit", "gemm", "nvjet", "cutlass", "xmma", "cublas",
                             "_int8_linear", "addmm", "::mm", "scaled_mm", "_int_mm"),
    "fused norm and residual": ("_norm_kernel", "norm_modulate"),
    "fused gated residual": ("_gated_residual", "gated_residual"),
    "fused q/k norm and rotation": ("_qk_norm_rope", "qk_norm_rope"),
    "fused rounding to 8 bits": ("_quantize_kernel", "quantize_rows", "gelu_quantize"),
    "group norm": ("group_norm", "_moments", "rowwisemoments"),
    "padding": ("pad",),
    "enlarging": ("upsample", "index_select", "indexselect"),
    "scales": ("_rescale_kernel", "rescale"),
    "GELU alone": ("gelu",),
    "copies": ("memcpy", "memset", "copy"),
}  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """A transformer with what one step of it takes."""

    model: SkyReelsTransformer
    inputs: dict[str, Tensor]
    rope: Tensor
    conditioning: StepModulation
    exact: Attention

    @property
    def tokens(self) -> int:
        """Of image and text."""
        return len(self.rope) + TEXT_TOKENS

    def denoise(
        self,
        function: Attention | None = None,
        chunking: str = "whole",
        run_block: RunBlock = call,
    ) -> Tensor:
        """One prediction, its conditioning made before, as in a run."""
        return self.model.denoise(
            self.inputs["hidden_states"], self.conditioning, rope=self.rope,
            attention=function or self.exact, chunking=CHUNKINGS[chunking], run_block=run_block,
        )  # fmt: skip


def build(config: TransformerConfig, device: torch.device) -> SkyReelsTransformer:
    """A transformer in bf16 with random weights."""
    with torch.device("meta"):
        model = SkyReelsTransformer(config).bfloat16()
    return draw_weights(model.to_empty(device=device))


def make_inputs(
    config: TransformerConfig, grid: tuple[int, int, int], device: torch.device
) -> dict[str, Tensor]:
    """Inputs of a forward pass in bf16, but for the numbers that stay float32."""
    keep = ("timestep", "guidance")
    made = tiny.inputs(config, TEXT_TOKENS, grid)
    return {
        name: value.to(device, torch.float32 if name in keep else torch.bfloat16)
        for name, value in made.items()
    }


def prepare(
    context: Context,
    config: TransformerConfig | None = None,
    grid: tuple[int, int, int] | None = None,
) -> Bench:
    """The model at the size of the context, or of a stated size."""
    config = config or (TransformerConfig() if context.full else tiny.TRANSFORMER)
    device = context.device
    model = build(config, device)
    inputs = make_inputs(config, grid or (FULL_GRID if context.full else TINY_GRID), device)
    rope = rope_table(model.token_grid(inputs["hidden_states"].shape), config, device=device)
    heads, head_dim = config.num_attention_heads, config.attention_head_dim
    exact = choose_attention(device, heads=heads, head_dim=head_dim).impl
    told = {name: value for name, value in inputs.items() if name != "hidden_states"}
    return Bench(model, inputs, rope, model.condition(**told, attention=exact), exact)


def forward_flop(config: TransformerConfig, tokens: int) -> int:
    """Of the blocks, in one forward pass: what all but a thousandth of the time goes to."""
    hidden, layers = config.hidden_size, config.num_layers + config.num_single_layers
    per_token = int((4 + 2 * config.mlp_ratio) * hidden**2)
    return layers * (4 * tokens**2 * hidden + 2 * tokens * per_token)


class Rounds:
    """Seconds of several functions that take turns; the median so far is recorded each time."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.taken: dict[str, list[float]] = {}

    def time(self, name: str, function: Callable[[], Tensor], **details: object) -> Tensor | None:
        """Time one call and return its result; None if it failed."""
        result: list[Tensor] = []
        with self.context.attempt(name):
            seconds = self.context.seconds(lambda: result.append(function()))
            taken = self.taken.setdefault(name, [])
            taken.append(round(seconds, 5))
            self.context.emit(f"{name}: time", statistics.median(taken), "s", runs=taken, **details)
        return result[0] if result else None


# --- bf16 beside diffusers ----------------------------------------------------------------------


def diffusers_twin(ours: SkyReelsTransformer) -> torch.nn.Module:
    """diffusers' own class around the same weights, of which it shares all that it can."""
    from diffusers import HunyuanVideoTransformer3DModel

    with torch.device("meta"):
        theirs = HunyuanVideoTransformer3DModel(**tiny.diffusers_config(ours.config)).eval()
    state = tiny.to_diffusers(ours.state_dict(), ours.config)
    theirs.load_state_dict(state, assign=True)
    return theirs.requires_grad_(False)


def as_its_pipeline_calls(theirs: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """One forward pass of diffusers: text padded to 256 tokens, and a mask over the padding."""
    states = inputs["encoder_hidden_states"]
    mask = torch.zeros(1, PADDED_TOKENS, dtype=torch.long, device=states.device)
    mask[:, : states.shape[1]] = 1
    padded = F.pad(states, (0, 0, 0, PADDED_TOKENS - states.shape[1]))
    told = {**inputs, "encoder_hidden_states": padded}
    return theirs(**told, encoder_attention_mask=mask, return_dict=False)[0]


@torch.inference_mode()
def exact(context: Context) -> None:
    """A forward pass in bf16 beside diffusers', in turns; then where the time goes, and layouts."""
    bench = prepare(context)
    config = bench.model.config
    context.emit("tokens: image and text", bench.tokens)
    context.emit("forward: work", forward_flop(config, bench.tokens) / 1e12, "TFLOP")
    rounds = Rounds(context)
    whole = partial(bench.denoise)
    mine = measured_peak(context, bench, "whole")
    if hasattr(torch._C, "_get_sdp_priority_order"):  # what other models get from now on
        context.emit("torch's order of kernels", str(torch._C._get_sdp_priority_order()))
    twins = []
    with context.attempt("diffusers"):
        twins.append(diffusers_twin(bench.model))
    if twins:
        with context.attempt("diffusers"), peak_of(context, "diffusers"):
            yours = as_its_pipeline_calls(twins[0], bench.inputs)
            difference = relative_difference(mine, yours)
            context.emit("ours, whole: difference to diffusers", difference)
            del yours
    for _ in range(2):
        rounds.time("ours, whole", whole)
        if twins:
            rounds.time("diffusers", lambda: as_its_pipeline_calls(twins[0], bench.inputs))
    twins.clear()
    context.tidy()
    with context.attempt("split"):
        split(context, whole)
    for chunking in ("chunks", "head groups"):
        with context.attempt(f"ours, {chunking}"):
            other = measured_peak(context, bench, chunking)
            difference = relative_difference(other, mine)
            context.emit(f"ours, {chunking}: difference to whole", difference)
            del other
            if chunking == "chunks":
                rounds.time("ours, chunks", partial(bench.denoise, chunking=chunking))
                rounds.time("ours, with its conditioning", lambda: bench.model(
                    **bench.inputs, rope=bench.rope, attention=bench.exact
                ))  # fmt: skip


class peak_of:  # noqa: N801 - a context manager
    """Record the most memory that a block takes beside what is there."""

    def __init__(self, context: Context, name: str) -> None:
        self.context, self.name, self.num_bytes = context, name, 0

    def __enter__(self) -> "peak_of":
        if self.context.is_cuda:
            self.context.tidy()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *error: object) -> None:
        if self.context.is_cuda:
            self.num_bytes = torch.cuda.max_memory_allocated() - self.before
            self.context.emit(f"{self.name}: peak of activations", self.num_bytes / 1e9, "GB")


def measured_peak(context: Context, bench: Bench, chunking: str) -> Tensor:
    """A prediction, and what it takes beside what is planned with."""
    name = f"ours, {chunking}"
    planned = placement.sampling_bytes(bench.model.config, bench.tokens, torch.bfloat16, chunking)
    with peak_of(context, name) as peak:
        output = bench.denoise(chunking=chunking)
    context.emit(f"{name}: planned", planned / 1e9, "GB")
    if context.is_cuda:
        context.emit(f"{name}: peak over planned", peak.num_bytes / planned)
    return output


def split(context: Context, function: Callable[[], object]) -> None:
    """Seconds of one call by kind of work, from torch's profiler."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CUDA if context.is_cuda else ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        function()
        if context.is_cuda:
            torch.cuda.synchronize()
    seconds: Counter[str] = Counter()
    rest: Counter[str] = Counter()
    calls = 0
    for event in profiler.key_averages():
        if context.is_cuda and event.device_type != DeviceType.CUDA:
            continue  # what the host did, which may be told to have taken its kernels' time
        taken = event.self_device_time_total if context.is_cuda else event.self_cpu_time_total
        if not taken:
            continue
        name = event.key.lower()
        kind = next(
            (kind for kind, parts in KINDS_OF_WORK.items() if any(p in name for p in parts)), "rest"
        )
        seconds[kind] += taken / 1e6
        calls += event.count
        if kind == "rest":
            rest[event.key[:100]] += taken / 1e6
    for kind, value in seconds.most_common():
        context.emit(f"split: {kind}", value, "s")
    largest = {name: round(value, 5) for name, value in rest.most_common(12)}
    context.emit("split: launches", calls, largest_of_the_rest=largest)


# --- 8 bits -------------------------------------------------------------------------------------


def to_8bit(model: torch.nn.Module, precision: str) -> None:
    """Round the block linears as weights/load.py does, in place."""
    config, storage_dtype = model.config, STORAGE_DTYPES[precision]
    block = 0
    if precision == "int8":
        block = hadamard_block_size(config.hidden_size, int(config.hidden_size * config.mlp_ratio))
    for name, layer in list(model.named_modules()):
        is_linear = isinstance(layer, torch.nn.Linear)
        if is_linear and is_quantizable(name + ".weight", config.num_layers):
            weight, scale = quantize(layer.weight.data, storage_dtype, block)
            quantized = QuantLinear(
                weight, scale, layer.bias, hadamard_block=block, weight_only=False,
                compute_dtype=layer.weight.dtype,
            )  # fmt: skip
            model.set_submodule(name, quantized)


def forced(context: Context, bench: Bench) -> dict[str, tuple[Attention, dict]]:
    """Every 8-bit attention that can be loaded, whatever the speed gate says, and its judgement.

    Each has run once at the size of the model, so that nothing is compiled when it is timed. On a
    CPU, which has none, the same arithmetic in plain torch stands in.
    """
    config, device = bench.model.config, context.device
    heads, head_dim = config.num_attention_heads, config.attention_head_dim
    found: dict[str, tuple[Attention, dict]] = {}
    loads: dict[str, Callable[[], Attention]] = {
        name: partial(bench_attention.fast_attention, name, device, torch.bfloat16, head_dim)
        for name in attention.FAST
    }
    if not context.is_cuda:
        loads["plain torch"] = lambda: reference.quantized_attention
    for name, load in loads.items():
        with context.attempt(name):
            try:
                function = load()
            except Unavailable as reason:
                context.skip(name, str(reason))
                continue
            function(*draw("Gaussian", bench.tokens, heads, head_dim, device=device,
                           dtype=torch.bfloat16))  # fmt: skip
            finding = attention.judge(function, bench.tokens, head_dim, device, torch.bfloat16)
            details = {"accepted": finding.is_accepted, "finding": str(finding)}
            found[name] = function, details
    return found


@torch.inference_mode()
def in_8_bits(context: Context, precision: str, *, with_8_bit_attention: bool) -> None:
    """Predictions with 8-bit linear layers and exact attention, then with each 8-bit attention."""
    bench = prepare(context)
    truth = bench.denoise()
    to_8bit(bench.model, precision)
    context.tidy()
    rounds = Rounds(context)

    def measure(kind: str, function: Attention, **details: object) -> None:
        name = f"{precision}, {kind}"
        output = rounds.time(name, partial(bench.denoise, function), **details)
        if output is not None:
            difference = relative_difference(output, truth)
            context.emit(f"{name}: difference to exact bf16", difference)

    with context.attempt(precision):
        bench.denoise()  # compiles, and tries its products
    for name, text in dispatch.report(quant.decisions(context.device)).items():
        context.emit(f"{name}: chosen", text)
    for _ in range(2):
        measure("exact attention", bench.exact)
    if with_8_bit_attention:
        with context.attempt("8-bit attention"):
            for kind, (function, details) in forced(context, bench).items():
                measure(kind, function, **details)


def fp8(context: Context) -> None:
    """fp8 linear layers; in a process of its own, what cuBLAS says of odd addresses."""
    if context.is_cuda:
        context.run_child("alignment", 20)
    else:
        context.skip("alignment", "only CUDA has rowwise products of float8 here")
    in_8_bits(context, "fp8", with_8_bit_attention=True)


def int8(context: Context) -> None:
    """int8 linear layers."""
    in_8_bits(context, "int8", with_8_bit_attention=False)


@torch.inference_mode()
def alignment(context: Context) -> None:
    """torch's rowwise float8 product with row scales on a boundary of 16 bytes, and 4 past one.

    cuBLAS 12.9 and later may refuse the second, misread it, or break the CUDA context.
    """
    device = context.device
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(n, 384, generator=generator, device=device) for n in (512, 192))
    storage = torch.empty(513, 1, device=device)
    row_scale = torch.rand(512, 1, generator=generator, device=device) + 0.5
    columns = torch.rand(1, 192, generator=generator, device=device) + 0.5
    a, b = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    truth = (a.float() @ b.float().t()) * row_scale * columns
    for name, start in (("on a boundary", 0), ("4 bytes past one", 1)):
        scale = storage[start : start + 512].copy_(row_scale)
        assert scale.data_ptr() % 16 == 4 * start
        with context.attempt(f"row scales {name}"):
            got = torch._scaled_mm(
                a, b.t(), scale_a=scale, scale_b=columns, out_dtype=torch.bfloat16,
                use_fast_accum=True,
            )  # fmt: skip
            difference = relative_difference(got, truth)
            context.emit(f"row scales {name}: difference", difference)


# --- memory -------------------------------------------------------------------------------------


@torch.inference_mode()
def _whole_process(context: Context, precision: str) -> None:
    bench = prepare(context)
    for part in bench.model.conditioners:
        part.to("meta")  # in a run they are away by now
    if precision == "fp8":
        to_8bit(bench.model, precision)
    context.tidy()
    torch.cuda.reset_peak_memory_stats()
    weights = torch.cuda.memory_allocated()
    bench.denoise()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    free, total = torch.cuda.mem_get_info()
    activations = placement.sampling_bytes(
        bench.model.config, bench.tokens, torch.bfloat16, "whole", precision
    )
    planned = weights + activations + offload.RESERVE_BYTES
    context.emit(f"{precision}: weights", weights / 1e9, "GB")
    context.emit(f"{precision}: peak allocated", peak / 1e9, "GB")
    context.emit(f"{precision}: used on the device afterwards", (total - free) / 1e9, "GB",
                 reserved_gb=round(torch.cuda.memory_reserved() / 1e9, 3))  # fmt: skip
    context.emit(f"{precision}: planned with the reserve", planned / 1e9, "GB")
    context.emit(f"{precision}: peak over planned", peak / planned)


def memory_bf16(context: Context) -> None:
    """Of bf16 alone."""
    _whole_process(context, "bf16")


def memory_fp8(context: Context) -> None:
    """Of fp8 alone."""
    _whole_process(context, "fp8")


class TimedCopies(CudaCopies):
    """Copies that notice how long the computation waits for them."""

    waits: ClassVar[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = []

    def wait_for(self, slot: int) -> None:
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        super().wait_for(slot)
        after.record()
        self.waits.append((before, after))


class Cramped(TorchRuntime):
    """A device with room for some bytes of blocks and slots; its host may refuse to page-lock."""

    def __init__(self, device: torch.device, room: int, kept: int, pins: bool = True) -> None:
        super().__init__(device)
        self.room, self.kept, self.pins = room, kept, pins

    def free_bytes(self) -> int:
        return self.room + self.kept + offload.RESERVE_BYTES * (self.device.type != "cpu")

    def pin(self, memory: Tensor) -> None:
        if not self.pins:
            raise RuntimeError("not here")
        super().pin(memory)


def moved_to_host(bench: Bench) -> tuple[int, list[int]]:
    """Move the weights of the loop to the host, drop the others.

    Returns:
        Bytes that stay on the device in any case, and those of each block.
    """
    for part in bench.model.conditioners:
        part.to("meta")
    for tensor in placement.loop_tensors(bench.model):
        tensor.data = tensor.data.cpu()
    # on a CPU they are not away, and nothing is streamed
    kept, away = placement._split(bench.model, bench.rope.device)
    return sum(tensor.nbytes for tensor in kept), [padded_bytes(block) for block in away.values()]


@torch.inference_mode()
def streaming(context: Context) -> None:
    """Streamed blocks beside resident ones at full length, a fifth of the blocks of the model."""
    config = TransformerConfig(num_layers=4, num_single_layers=8) if context.full else None
    bench = prepare(context, config)
    kept, sizes = moved_to_host(bench)
    total, least = sum(sizes), least_bytes(sizes) if sizes else 0
    context.emit("streaming: blocks", total / 1e9, "GB")
    if context.is_cuda:
        placement.open_copies = TimedCopies
    modes = {
        "resident": Cramped(context.device, 2 * total, kept),
        "all streamed": Cramped(context.device, least, kept),
        "half streamed": Cramped(context.device, (total + least) // 2, kept),
        "all streamed, nothing pinned": Cramped(context.device, least, kept, pins=False),
    }
    outputs: dict[str, Tensor] = {}
    seconds: dict[str, list[float]] = {}
    for name in [*modes, "resident"]:  # again at the end, for a card that has become slower
        with context.attempt(name):
            outputs[name], taken = passes(context, bench, name, modes[name])
            seconds.setdefault(name, []).append(taken)
    for name in list(seconds)[1:]:
        slowdown = min(seconds[name]) / min(seconds["resident"]) - 1
        context.emit(f"{name}: slowdown", slowdown)
    home = all(p.device.type in ("cpu", "meta") for p in bench.model.parameters())
    context.emit("streamed: weights came home", home)
    context.emit("streamed: equals resident",
                 all(torch.equal(output, outputs["resident"]) for output in outputs.values()),
                 modes=list(outputs))  # fmt: skip
    del bench, outputs
    with context.attempt("both branches streamed"):
        both_branches_streamed(context)
    for precision in STORAGE_DTYPES:
        with context.attempt(f"{precision} streamed"):
            context.emit(f"{precision} streamed: equals resident", in_8_bits_streamed(
                context, precision
            ))  # fmt: skip


def passes(
    context: Context, bench: Bench, name: str, runtime: Cramped
) -> tuple[Tensor, float]:  # fmt: skip
    """Time three forward passes in a row.

    Returns:
        The prediction of another pass, and seconds of one.
    """
    count = 3 if context.full else 1
    if context.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    with placed(bench.model, runtime, 0) as run_block:
        pinned = round(runtime.pinned_bytes / 1e9, 3)
        context.emit(f"{name}: preparation", time.perf_counter() - started, "s", pinned_gb=pinned)
        output = bench.denoise(run_block=run_block).cpu()
        TimedCopies.waits.clear()

        def forward() -> None:
            for _ in range(count):
                bench.denoise(run_block=run_block)

        seconds = context.seconds(forward) / count
        stall_ms = sum(before.elapsed_time(after) for before, after in TimedCopies.waits)
        stall_s = round(stall_ms / 1e3 / count, 5)
        context.emit(f"{name}: one pass", seconds, "s", stall_s=stall_s)
        if context.is_cuda:
            peak = torch.cuda.max_memory_allocated() / 1e9
            context.emit(f"{name}: peak allocated", peak, "GB")
        started = time.perf_counter()
    context.emit(f"{name}: clearing up", time.perf_counter() - started, "s")
    return output, seconds


def both_branches_streamed(context: Context) -> None:
    """Two predictions of a clip so short that copies take longer than blocks, all streamed."""
    config = TransformerConfig(num_layers=4, num_single_layers=8) if context.full else None
    bench = prepare(context, config, (5, 32, 32) if context.full else None)
    latents, branches = bench.inputs["hidden_states"], [bench.conditioning] * 2
    kept, sizes = moved_to_host(bench)
    least, count = least_bytes(sizes) if sizes else 0, 3 if context.full else 1

    def one_by_one(run_block: RunBlock) -> list[Tensor]:
        return [bench.denoise(run_block=run_block) for _ in branches]

    def at_once(run_block: RunBlock) -> list[Tensor]:
        return bench.model.denoise_together(
            latents, branches, rope=bench.rope, attention=bench.exact, run_block=run_block
        )

    def steps(step: Callable[[RunBlock], list[Tensor]], run_block: RunBlock) -> None:
        for _ in range(count):
            step(run_block)

    outputs, seconds = [], {}
    for name, room, step in (
        ("resident", 2 * sum(sizes), one_by_one),
        ("streamed one by one", least, one_by_one),
        ("streamed at once", least, at_once),
    ):
        with placed(bench.model, Cramped(context.device, room, kept), 0) as run_block:
            outputs += [output.cpu() for output in step(run_block)]
            seconds[name] = context.seconds(partial(steps, step, run_block)) / count
        context.emit(f"branches of a short clip {name}: a step", seconds[name], "s")
    context.emit("branches of a short clip: at once over one by one",
                 seconds["streamed at once"] / seconds["streamed one by one"])  # fmt: skip
    context.emit("both branches streamed: equals resident",
                 all(torch.equal(output, outputs[0]) for output in outputs))  # fmt: skip


def in_8_bits_streamed(context: Context, precision: str) -> bool:
    """Whether a small model of full width in 8 bits gives the same bits streamed."""
    config = TransformerConfig(num_layers=1, num_single_layers=2) if context.full else None
    bench = prepare(context, config, (5, 32, 32) if context.full else None)
    to_8bit(bench.model, precision)
    kept, sizes = moved_to_host(bench)
    outputs = []
    for room in (2 * sum(sizes), least_bytes(sizes) if sizes else 0):
        with placed(bench.model, Cramped(context.device, room, kept), 0) as run_block:
            outputs.append(bench.denoise(run_block=run_block).cpu())
    return torch.equal(*outputs)


# --- plan ---------------------------------------------------------------------------------------


def plan(context: Context) -> None:
    """What a run is expected to take beside what it takes: a fifth of the blocks, all resident.

    The planner knows its probe alone, as nothing is remembered here.
    """
    config, (width, height, num_frames) = tiny.TRANSFORMER, (64, 64, 9)
    if context.full:
        config = TransformerConfig(num_layers=4, num_single_layers=8)
        width, height, num_frames = 960, 544, 97
    device = context.device
    model = build(config, device)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, 1, height // 8, width // 8, generator=generator)
    image = ImageConditioning(latents, width, height, num_frames)
    prompt, negative = (
        PromptEmbeds(
            torch.randn(1, TEXT_TOKENS, config.text_embed_dim, generator=generator),
            torch.randn(1, config.pooled_projection_dim, generator=generator),
        )
        for _ in range(2)
    )
    marks: list[float] = []

    def report(*_: object) -> None:
        if context.is_cuda:
            torch.cuda.synchronize()
        marks.append(time.perf_counter())

    runtime = TorchRuntime(device, on_progress=report)
    weights = weights_of(model)
    loaded = sum(tensor.nbytes for tensor in placement.loop_tensors(model))
    job = Job(width, height, num_frames, 4, 4, TEXT_TOKENS, config=config, vae=None)
    machine = machine_of(runtime, rates_needed([weights.gemm]), loaded_bytes=loaded)
    for name, rate in machine.rates.items():
        context.emit(f"probe: {name}", rate / 1e12, "T/s")
    expected = plan_run(machine, job, weights)
    context.emit("plan: said", expectation(expected, job))
    others = torch.cuda.memory_allocated() - loaded if context.is_cuda else 0
    settings = SamplingSettings(sigmas=get_sigmas(job.num_steps))
    sample(model, image, prompt, negative, settings, runtime=runtime)
    # the first step also compiles, and tries kernels
    step_s = statistics.median(later - earlier for earlier, later in pairwise(marks[1:]))
    planned_s, planned_bytes = expected.seconds["step"], expected.peak_bytes["sample"]
    context.emit("a step: time", step_s, "s")
    context.emit("sampling: planned", planned_bytes / 1e9, "GB")
    if planned_s is not None:
        context.emit("a step: planned", planned_s, "s")
        context.emit("a step: time over planned", step_s / planned_s)
    if context.is_cuda:
        peak = torch.cuda.max_memory_allocated() - others
        context.emit("sampling: peak", peak / 1e9, "GB")
        context.emit("sampling: peak over planned", peak / planned_bytes)


# --- accuracy -----------------------------------------------------------------------------------


@torch.inference_mode()
def accuracy(context: Context) -> None:
    """What each mode loses in one forward pass of two and two blocks, against float32."""
    grid, heads = ((64, 32, 32), 24) if context.full else ((1, 16, 16), 2)
    config = TransformerConfig(
        num_attention_heads=heads, num_layers=2, num_single_layers=2, num_refiner_layers=1,
        text_embed_dim=256, pooled_projection_dim=64,
    )  # fmt: skip
    device = context.device
    model = build(config, device)
    inputs = make_inputs(config, grid, device)
    wide = {name: value.float() for name, value in inputs.items()}
    truth = model.float()(**wide)
    del wide
    model = model.bfloat16()
    with context.attempt("bf16"):
        losses = {"bf16": relative_difference(model(**inputs), truth)}
        context.emit("bf16: error", losses["bf16"])
    with context.attempt("diffusers bf16"):
        mask = torch.ones(1, TEXT_TOKENS, dtype=torch.long, device=device)
        theirs = diffusers_twin(model)
        output = theirs(**inputs, encoder_attention_mask=mask, return_dict=False)[0]
        loss = relative_difference(output, truth)
        context.emit("diffusers bf16: error", loss)
        context.emit("bf16: error over diffusers'", losses["bf16"] / loss)
        del theirs, output
    rope = rope_table(model.token_grid(inputs["hidden_states"].shape), config, device=device)
    exact_ = choose_attention(device, heads=heads).impl
    bench = Bench(model, inputs, rope, None, exact_)  # type: ignore[arg-type]
    fast: dict[str, tuple[Attention, dict]] = {}
    with context.attempt("8-bit attention"):
        fast = forced(context, bench)

    def measure(name: str, rounded: SkyReelsTransformer) -> None:
        for kind, (function, details) in fast.items():
            with context.attempt(f"{name}, {kind}"):
                loss = relative_difference(rounded(**inputs, attention=function), truth)
                context.emit(f"{name}, {kind}: error", loss, **details)

    measure("bf16", model)
    for precision in STORAGE_DTYPES:
        with context.attempt(precision):
            rounded = build(config, device)  # the same seed, so the same weights
            to_8bit(rounded, precision)
            loss = relative_difference(rounded(**inputs), truth)
            context.emit(f"{precision}: error", loss)
            measure(precision, rounded)
