"""Work of several ranks beside the same of one: gloo, on this machine's CPU.

    python -m support.ranks 3 predictions     (from tests/) prints one JSON line of rows, of rank 0
    python -m support.ranks 3 decodes
    python -m support.ranks 4 branches
    python -m support.ranks 3 weights

A row of predictions: {grid, text, heads, sparse, difference: the largest of any rank to one rank,
in units of the result's largest number, ranks_agree: bit by bit, bytes: exchanged by a block,
expected: what 4 tensors of the image tokens take, divided by the ranks, and one of the text}. A row
of decodes: {name, shape: of the latents, difference: of the frames, plan: what was chosen}. A row
of weights: {name, loads: by each rank, same: the bits of all are those of the first one alone,
held_once: what the first one writes to a weight all have, warnings: of the first}.
"""

import functools
import json
import logging
import multiprocessing
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from comfyui_skyreels.skyreels.builtin import builtin_vae
from comfyui_skyreels.skyreels.conditioning.embeds import PromptEmbeds
from comfyui_skyreels.skyreels.conditioning.latents import ImageConditioning
from comfyui_skyreels.skyreels.config import CHUNKINGS, ContextWindows, Guidance, SkipLayers
from comfyui_skyreels.skyreels.errors import OptionError, OutOfRoomError
from comfyui_skyreels.skyreels.kernels.dispatch import Decision
from comfyui_skyreels.skyreels.kernels.sparse import sparse_attention
from comfyui_skyreels.skyreels.plan import Plan
from comfyui_skyreels.skyreels.runtime import TorchRuntime
from comfyui_skyreels.skyreels.runtime import ranks as runtime_ranks
from comfyui_skyreels.skyreels.runtime.collectives import Ranks, one_group, two_groups
from comfyui_skyreels.skyreels.runtime.ranks import load_once
from comfyui_skyreels.skyreels.sampling import attend, bad_render, planned
from comfyui_skyreels.skyreels.sampling.network import Network
from comfyui_skyreels.skyreels.sampling.prompts import Prompt, ScheduledPrompt
from comfyui_skyreels.skyreels.sampling.sample import sample
from comfyui_skyreels.skyreels.sampling.settings import SamplingSettings, get_sigmas
from comfyui_skyreels.skyreels.sampling.step_cache import CacheConfig
from comfyui_skyreels.skyreels.transformer.attention import sdpa
from comfyui_skyreels.skyreels.transformer.model import SkyReelsTransformer, call
from comfyui_skyreels.skyreels.transformer.sparse_attention import (
    DenseRun,
    SparseConfig,
    SparseRun,
)
from comfyui_skyreels.skyreels.transformer.ulysses import UlyssesRun
from comfyui_skyreels.skyreels.vae import model as vae_model
from comfyui_skyreels.skyreels.vae import tiling
from comfyui_skyreels.skyreels.vae.model import VideoVAE
from comfyui_skyreels.skyreels.vae.tiling import decode_frames, decode_into
from comfyui_skyreels.skyreels.weights.load import load_transformer
from comfyui_skyreels.skyreels.weights.lora.apply import AppliedLora, use_loras
from comfyui_skyreels.skyreels.weights.lora.read import load_lora

from support import lora as lora_files
from support import tiny
from support.convolutions import fast_convolutions
from support.forked import forks

#: latents whose tokens are 27, 105, 64 and 1
GRIDS = ((3, 6, 6), (5, 6, 14), (1, 16, 16), (1, 2, 2))
TEXTS = (1, 7, 256)
#: of runs, whose every step is a prediction
FEW = {"num_layers": 1, "num_refiner_layers": 1}
SPARSE = SparseConfig(beta=0.3, dense_blocks=1, min_tokens=0)


@functools.cache
def model_of(heads: int, **layers: int) -> SkyReelsTransformer:
    return tiny.transformer(replace(tiny.TRANSFORMER, num_attention_heads=heads, **layers))


@functools.cache
def vae() -> VideoVAE:
    return builtin_vae(runtime=TorchRuntime())


@functools.cache
def double_vae() -> VideoVAE:
    return tiny.randomize(VideoVAE(tiny.VAE)).double()


def predict(model, inputs, run):
    """One prediction, in the midst of a run."""
    run.begin_step(3)
    run.begin([0])
    run_block = run.around(call)
    latents, *others = inputs.values()
    conditioning = model.condition(*others, attention=run, run_block=run_block)
    (velocity,) = model.denoise_together(
        latents, [conditioning], order=run.order, gather=run.gather, attention=run,
        run_block=run_block, chunking=CHUNKINGS["chunks"],
    )  # fmt: skip
    return velocity


def run_of(model, grid, heads, is_sparse):
    if not is_sparse:
        return DenseRun(sdpa)
    return SparseRun(
        SPARSE, sparse_attention, sdpa, grid=grid, num_steps=4, blocks=model.blocks, heads=heads,
        device="cpu",
    )  # fmt: skip


def case(model, grid, text, is_sparse) -> dict:
    """The row of one case; all ranks take part."""
    heads, num_ranks = model.config.num_attention_heads, dist.get_world_size()
    inputs = tiny.inputs(model.config, text, grid)
    tokens = model.token_grid(inputs["hidden_states"].shape)
    num_tokens = tokens[0] * tokens[1] * tokens[2]
    shared = UlyssesRun(
        run_of(model, tokens, heads // num_ranks, is_sparse), num_tokens, heads,
        blocks=model.blocks, device=torch.device("cpu"),
    )  # fmt: skip
    got = predict(model, inputs, shared)
    difference = largest_difference(
        got, lambda: predict(model, inputs, run_of(model, tokens, heads, is_sparse))
    )
    first = got.clone()
    dist.broadcast(first, 0)
    agree = torch.tensor(int(torch.equal(first, got)))
    dist.all_reduce(agree, dist.ReduceOp.MIN)
    sent = torch.tensor(shared.num_bytes)
    dist.all_reduce(sent)
    tensors = (4 * num_tokens + num_ranks * text) * model.config.hidden_size * got.element_size()
    return {
        "grid": grid, "text": text, "heads": heads, "sparse": is_sparse,
        "difference": difference, "ranks_agree": bool(agree),
        "bytes": sent.item() / num_ranks / len(model.blocks), "expected": tensors / num_ranks,
    }  # fmt: skip


def whole_run(cache: CacheConfig) -> dict:
    """A run with sparse attention and a step cache, beside the same on one rank."""
    model, embeds = model_of(2 * dist.get_world_size(), **FEW), tiny.embeds
    image = ImageConditioning(torch.zeros(1, 16, 1, 16, 16), 128, 128, 9)
    settings = SamplingSettings(sigmas=get_sigmas(6), attention=SPARSE, cache=cache)

    def clip(runtime: TorchRuntime) -> torch.Tensor:
        return sample(model, image, embeds(7, 1), embeds(4, 2), settings, runtime=runtime)

    with heard("skyreels.sampling.step_cache") as told:
        got = clip(TorchRuntime(ranks=one_group()))
        difference = largest_difference(got, lambda: clip(TorchRuntime()))
    skipped = [record.getMessage() for record in told]
    return {"run": cache.kind, "difference": difference, "skipped": skipped}


def largest_difference(got: torch.Tensor, make_alone: Callable[[], torch.Tensor]) -> float:
    """Of any rank to what the first one makes alone, in units of that one's largest number."""
    alone = make_alone() if dist.get_rank() == 0 else torch.empty_like(got)
    dist.broadcast(alone, 0)
    difference = (got - alone).abs().max() / alone.abs().max()
    dist.all_reduce(difference, dist.ReduceOp.MAX)
    return difference.item()


@contextmanager
def heard(name: str) -> Iterator[list[logging.LogRecord]]:
    """What a logger tells."""
    records: list[logging.LogRecord] = []
    handler, log = logging.Handler(), logging.getLogger(name)
    handler.emit = records.append
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield records
    finally:
        log.removeHandler(handler)


class Sink:
    """Takes frames as they come."""

    def __init__(self) -> None:
        self.frames: list[torch.Tensor] = []

    def restart(self) -> None:
        self.frames.clear()

    def write(self, frames: torch.Tensor) -> None:
        self.frames.append(frames)


def decode_case(name: str, vae: VideoVAE, shape: tuple[int, int, int], mode: str) -> dict:
    """The row of one decode; all ranks take part."""
    generator = torch.Generator().manual_seed(4)
    latents = torch.randn(1, 16, *shape, generator=generator)
    runtime = TorchRuntime(ranks=one_group())
    is_first = dist.get_rank() == 0
    sink, plans = Sink() if is_first else None, []
    decode_clip = tiling._decode_clip
    try:
        tiling._decode_clip = lambda *args: plans.append(args[2]) or decode_clip(*args)
        decode_into(sink, vae, latents, mode, runtime=runtime)
    finally:
        tiling._decode_clip = decode_clip
    difference = None
    if sink is not None:
        alone = decode_frames(vae, latents, "full", runtime=TorchRuntime())
        difference = (torch.cat(sink.frames) - alone).abs().max().item()
    plan = str(plans[0]) if plans else ""
    return {"name": name, "shape": shape, "difference": difference, "plan": plan}


def decodes() -> list[dict]:
    """Rows of decodes in strips: of a row each, of unequal heights, of several pieces."""
    num_ranks, rows = dist.get_world_size(), []
    builtin, double = vae(), double_vae()
    shapes = [(1, num_ranks, 3), (2, 2 * num_ranks + 1, 4)]
    rows += [decode_case("built-in", builtin, shape, "full") for shape in shapes]
    rows.append(decode_case("chosen", builtin, shapes[0], "auto"))
    rows.append(decode_case("fewer rows than ranks", builtin, (2, num_ranks - 1, 3), "full"))
    frames = decode_frames(
        builtin, torch.zeros(1, 16, *shapes[0]), runtime=TorchRuntime(ranks=one_group())
    )
    counts = [0] * num_ranks
    dist.all_gather_object(counts, list(frames.shape))
    vae_model.PIECE_ELEMENTS = 20_000  # a few frames at a time
    rows.append(decode_case("float64 in pieces", double, shapes[1], "full"))
    tiling.EXACT_LADDER = tuple(
        replace(plan, piece_elements=40_000) for plan in tiling.EXACT_LADDER[1:2]
    )
    rows.append(decode_case("float64 out of main memory", double, shapes[1], "exact"))
    rows[0]["frames"] = counts
    return rows


def predictions() -> list[dict]:
    """Rows of predictions, and of a whole run."""
    num_ranks, rows = dist.get_world_size(), []
    with torch.inference_mode():
        model = model_of(num_ranks)  # a head each
        rows += [case(model, GRIDS[1], text, False) for text in TEXTS[:2]]
        model = model_of(2 * num_ranks)
        sizes = [(grid, TEXTS[1]) for grid in GRIDS] + [(GRIDS[1], text) for text in TEXTS[::2]]
        for grid, text in (*sizes, (GRIDS[-1], TEXTS[0])):
            rows.append(case(model, grid, text, False))
        rows.append(case(model, (3, 16, 16), 9, True))
        rows.append(case(model, (5, 24, 24), 2, False))
    return [*rows, *map(whole_run, CACHES)]


CACHES = (CacheConfig("easy", 1.0), CacheConfig("first-block", 0.5))
SKIP = {"double_blocks": (1,), "single_blocks": (0,)}
#: settings of runs in two groups of ranks
RUNS = {
    "plain": {},
    "sparse and easy": {"attention": SPARSE, "cache": CacheConfig("easy", 1.0)},
    "sparse, in windows": {"attention": SPARSE, "windows": ContextWindows(length=2, overlap=1)},
    "guided to the half": {"attention": SPARSE, "guidance": Guidance(cfg_end=0.5)},
    "skip layers": {
        "attention": SPARSE, "guidance": Guidance(skip_layers=SkipLayers(**SKIP, scale=2.0))
    },
    "skip layers, negative": {
        "attention": SPARSE, "guidance": Guidance(skip_layers=SkipLayers(**SKIP, scale=0.0))
    },
}  # fmt: skip


def several(one: PromptEmbeds, other: PromptEmbeds) -> Prompt:
    """Two prompts that count alike."""
    return [ScheduledPrompt(one), ScheduledPrompt(other)]


def branches() -> list[dict]:
    """Runs in two groups of ranks beside the same of one group as large."""
    model, embeds = model_of(4, num_single_layers=1), tiny.embeds
    image = ImageConditioning(torch.zeros(1, 16, 1, 16, 16), 128, 128, 9)
    ranks, rows = two_groups(), []
    alone = None if ranks.share is None else Ranks(ranks.share, ranks.share)
    prompts = {name: (embeds(7, 1), embeds(4, 2)) for name in RUNS}
    prompts["several prompts"] = (several(embeds(7, 1), embeds(3, 4)),
                                  several(embeds(4, 2), embeds(9, 5)))  # fmt: skip
    if dist.get_world_size() > 2:
        prompts = {name: prompts[name] for name in ("sparse and easy", "several prompts")}
    for name, (prompt, negative) in prompts.items():
        given = RUNS.get(name, RUNS["sparse and easy"])
        settings = SamplingSettings(**{"sigmas": get_sigmas(5), **given})
        asked: list[int] = []
        with noted_branches(asked):
            runtime = TorchRuntime(ranks=ranks)
            got = sample(model, image, prompt, negative, settings, runtime=runtime)
        expected = torch.empty_like(got)
        if ranks.side == 0:  # its group makes both branches, and the other one waits
            runtime = TorchRuntime(ranks=alone)
            expected = sample(model, image, prompt, negative, settings, runtime=runtime)
        dist.broadcast(expected, 0)
        same = torch.tensor(int(torch.equal(got, expected)))
        dist.all_reduce(same, dist.ReduceOp.MIN)
        half = len(prompt) if isinstance(prompt, list) else 1
        own = all((branch >= half) == (ranks.side == 1) for branch in asked)
        rows.append({"name": name, "same": bool(same), "own": own, "count": len(asked)})
    rows.append(resumed(model, image, ranks))
    return [*rows, unlike_cards(model, image, ranks)]


def resumed(model: SkyReelsTransformer, image: ImageConditioning, ranks: Ranks) -> dict:
    """The row of a run that all ranks leave after three steps, and continue."""
    given = (model, image, tiny.embeds(7, 1), tiny.embeds(4, 2))
    settings = SamplingSettings(sigmas=get_sigmas(5))
    whole = sample(*given, settings, runtime=TorchRuntime(ranks=ranks))
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder)
    # each rank its own, of which only that of the first is written
    place = Path(folder[0]) / f"{dist.get_rank()}.safetensors"
    steps: list[int] = []

    def leave(stage: str, done: int, total: int, preview: object = None) -> None:
        steps.append(done)
        if steps == [0, 1, 2, 3]:
            raise KeyboardInterrupt

    runtime = TorchRuntime(ranks=ranks, on_progress=leave)
    settings = replace(settings, resume=place)
    with suppress(KeyboardInterrupt):
        sample(*given, settings, runtime=runtime)
    again = sample(*given, settings, runtime=runtime)
    same = torch.tensor(int(torch.equal(again, whole) and steps == [0, 1, 2, 3, 3, 4, 5]))
    dist.all_reduce(same, dist.ReduceOp.MIN)
    saved = sorted(each.name for each in Path(folder[0]).iterdir())
    dist.barrier()
    shutil.rmtree(folder[0], ignore_errors=True)
    return {"name": "resumed", "same": bool(same), "saved": saved}


class Card(TorchRuntime):
    """A rank's device with so much free memory, which may run out at a check."""

    def __init__(self, ranks: Ranks, free: int, runs_out_at: int = 0) -> None:
        super().__init__(ranks=ranks)
        self.free, self.runs_out_at, self.checks = free, runs_out_at, 0

    def free_bytes(self) -> int:
        return self.free

    def check_interrupt(self) -> None:
        self.checks += 1
        if self.checks == self.runs_out_at:
            raise torch.OutOfMemoryError("out of memory")


def unlike_cards(model: SkyReelsTransformer, image: ImageConditioning, ranks: Ranks) -> dict:
    """{name, plans: of all ranks, warnings: of the first, error, refused, looked}.

    The error is that of memory which runs out on all ranks; refused is what each says of sparse
    attention where one of them has no kernel for it; looked, how often the first one has judged a
    clip that only the last one finds bad.
    """
    settings = SamplingSettings(sigmas=get_sigmas(3))
    given = (model, image, tiny.embeds(7, 1), tiny.embeds(4, 2), settings)
    free = 10**9 * (9 - dist.get_rank())
    is_last, plan_run = dist.get_rank() == dist.get_world_size() - 1, planned.plan_run

    def chunked(*args: Any) -> Plan:
        """Of another kind of card, which needs more room."""
        return replace(plan_run(*args), chunking="chunks" if is_last else "whole")

    planned.plan_run = chunked
    with heard("skyreels.sampling.planned") as told:
        sample(*given, runtime=Card(ranks, free))
    planned.plan_run = plan_run
    plan = next(text for text in (r.getMessage() for r in told) if "Plan" in text)
    plans = [None] * dist.get_world_size()
    dist.all_gather_object(plans, plan)
    warnings = [r.getMessage() for r in told if r.levelno == logging.WARNING]
    error = ""
    try:
        sample(*given, runtime=Card(ranks, free, runs_out_at=12))
    except OutOfRoomError as raised:
        error = str(raised)
    choose_sparse, refused = attend.choose_sparse, ""

    def choose(*args: Any, **size: Any) -> Decision:
        """The last card has no kernel for sparse attention."""
        return Decision(None, "refused", "none") if is_last else choose_sparse(*args, **size)

    attend.choose_sparse = choose
    try:
        sample(*given[:-1], replace(settings, attention=SPARSE), runtime=Card(ranks, free))
    except OptionError as raised:
        refused = str(raised)
    attend.choose_sparse = choose_sparse
    said = [None] * dist.get_world_size()
    dist.all_gather_object(said, refused)
    looked: list[int] = []

    def look(*_: Any) -> bad_render.Look:
        """To the last card the clip stands still."""
        looked.append(1)
        return bad_render.Look(motion=0.0 if is_last else 9.0, jump=0.0, drift=0.0, jump_frame=1)

    look_at, bad_render.look_at = bad_render.look_at, look
    sample(*given[:-1], replace(settings, bad_render="stop"), runtime=Card(ranks, free))
    bad_render.look_at = look_at
    return {
        "name": "unlike cards", "plans": plans, "warnings": warnings, "error": error,
        "refused": said, "looked": len(looked),
    }  # fmt: skip


@contextmanager
def noted_branches(asked: list[int]) -> Iterator[None]:
    """Note which branches this rank predicts."""
    predict = Network.predict

    def noted(self: Network, latents: torch.Tensor, sigma: torch.Tensor, step: int,
              branches: Sequence[int], run_block: object = None) -> list[torch.Tensor]:  # fmt: skip
        asked.extend(branches)
        return predict(self, latents, sigma, step, branches, run_block)

    Network.predict = noted
    try:
        yield
    finally:
        Network.predict = predict


def weights() -> list[dict]:
    """Rows of weights that one rank loads, and of systems that cannot share memory."""
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder)
    place, is_first = Path(folder[0]), dist.get_rank() == 0
    if is_first:
        tiny.save(place / "model.safetensors", tiny.transformer().state_dict())
        lora_files.write("OneTrainer OMI", lora_files.draw_parts(seed=4), place)
    dist.barrier()
    (lora_file,) = set(place.iterdir()) - {place / "model.safetensors"}
    lora = (AppliedLora(load_lora(lora_file, tiny.TRANSFORMER)),)

    def load(precision: str) -> tuple[SkyReelsTransformer, VideoVAE]:
        runtime = TorchRuntime()
        model = load_transformer(place / "model.safetensors", precision=precision, runtime=runtime)
        use_loras(model, lora, runtime=runtime)
        return model, builtin_vae(runtime=runtime)

    rows = [weights_case(precision, load, precision, lora) for precision in ("bf16", "int8", "fp8")]
    for name, fails in (("share", is_first), ("attach", dist.get_rank() == 1)):
        kept = getattr(runtime_ranks, name)

        def refuse(*_: object) -> None:
            raise OSError("not here")

        setattr(runtime_ranks, name, refuse if fails else kept)
        rows.append(weights_case(f"no {name}", load, "fp32", lora))
        setattr(runtime_ranks, name, kept)
    dist.barrier()
    if is_first:
        shutil.rmtree(place, ignore_errors=True)
    return rows


def weights_case(
    name: str,
    load: Callable[[str], tuple[SkyReelsTransformer, VideoVAE]],
    precision: str,
    loras: tuple[AppliedLora, ...],
) -> dict:
    """The row of weights in one precision; all ranks take part."""
    loads: list[int] = []
    ranks, is_first = one_group(), dist.get_rank() == 0
    with heard("skyreels.runtime.ranks") as told:
        modules = load_once(lambda: loads.append(1) or load(precision), ranks)
    use_loras(modules[0], loras, runtime=TorchRuntime())  # as a run does: they are in already
    alone = load(precision) if is_first else None
    expected = [None if alone is None else bits(alone)]
    dist.broadcast_object_list(expected)
    same = [False] * dist.get_world_size()
    dist.all_gather_object(same, bits(modules) == expected[0])
    counts = [0] * dist.get_world_size()
    dist.all_gather_object(counts, len(loads))
    weight = next(modules[1].parameters())
    if is_first:
        weight.data.fill_(7.0)
    dist.barrier()
    seen = [0.0] * dist.get_world_size()
    dist.all_gather_object(seen, weight.flatten()[-1].item())
    return {
        "name": name, "loads": counts, "same": all(same),
        "held_once": [value == 7.0 for value in seen], "warnings": [r.getMessage() for r in told],
    }  # fmt: skip


def bits(modules: Sequence[torch.nn.Module]) -> list[tuple[str, int]]:
    """A checksum of each weight."""
    return [
        (name, zlib.crc32(weight.detach().reshape(-1).view(torch.uint8).numpy().tobytes()))
        for module in modules
        for name, weight in module.state_dict().items()
    ]


def take_part(rank: int, num_ranks: int, store: str, what: str) -> None:
    """Be a rank; the first one prints the rows."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=num_ranks)
    kinds = {
        "predictions": predictions, "decodes": decodes, "branches": branches, "weights": weights,
    }  # fmt: skip
    with fast_convolutions():
        rows = kinds[what]()
    if rank == 0:
        sys.stdout.write(json.dumps(rows) + "\n")
    dist.destroy_process_group()


@functools.cache
def rows_of(num_ranks: int, what: str) -> list[dict]:
    """Rows that as many processes print."""
    command = ["-c", "from support.ranks import main; main()", str(num_ranks), what]
    done = forks("torch", "support.ranks").run(command, dict(os.environ))
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def prepare(num_ranks: int, what: str) -> None:
    """Make the models once for all ranks, which are forks."""
    if what == "predictions":
        model_of(num_ranks), model_of(2 * num_ranks), model_of(2 * num_ranks, **FEW)
    elif what == "branches":
        model_of(4, num_single_layers=1)
    elif what == "decodes":
        vae(), double_vae()


def main() -> None:
    num_ranks, what = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    prepare(num_ranks, what)
    fork = multiprocessing.get_context("fork")
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        ranks = [
            fork.Process(target=take_part, args=(r, num_ranks, store, what))
            for r in range(num_ranks)
        ]
        for each in ranks:
            each.start()
        for each in ranks:
            each.join()
    sys.exit(max(abs(each.exitcode) for each in ranks))


if __name__ == "__main__":
    main()
