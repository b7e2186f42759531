"""The yardsticks: what a small model makes of held-out pictures and prompts, one row a setting.

    python -m tests.bench.quality [--model built-in|large|FOLDER] [--cases 128] [--seed 11]
        [--setting NAME]... [--suite settings|bars|all] [--sheet PNG]

The built-in model makes clips of 64x64, 17 frames: 80 tokens, too few to judge sparse attention.
The large one (tests/yardstick) makes the same clips in 192x192 and 33 frames: 1,296 tokens.

`settings` renders the same cases under every setting of SETTINGS (a new mode is one line there):

    told      share of the clips in which the shape did what the prompt says (measured from pixels)
    kept      share in which colour and shape are those of the picture in the last frame (no fades)
    first     median PSNR of the first frame against the picture given
    true      median PSNR of the clip against the true clip
    exact     median PSNR of the clip against the clip of the first setting
    worst     the least of these
    ssim, vmaf, warp, gmsd (evaluators.py)
              median and worst of the clip against the clip of the first setting
    flicker   of the ground, root mean square, in steps of 1/255
    seam      step of the error across tile borders over the step elsewhere (tiled decodes)
    forwards  transformer passes for one clip: blocks that ran over blocks there are
    density   of sparse attention: share of the pairs of blocks of a run that were attended to
              exactly, dense steps included
    seconds   median for one clip, text and loading not included

`bars` measures the rest: opposite verbs on one picture, negative prompts, sizes not trained for, a
VAE round trip, diffusers; with the large model the error of sparse attention in the velocity.

--model takes another diffusers folder (tests/train/export.py), too; what it lacks is the built-in
model's. Figures are printed as a table, then as one line of JSON.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import evaluators
from comfyui_skyreels.skyreels.builtin import BUILTIN_FOLDER
from comfyui_skyreels.skyreels.conditioning.embeds import PromptEmbeds
from comfyui_skyreels.skyreels.config import Guidance, Tiling
from comfyui_skyreels.skyreels.image import encode_image
from comfyui_skyreels.skyreels.kernels import sparse
from comfyui_skyreels.skyreels.kernels.dispatch import Decision
from comfyui_skyreels.skyreels.kernels.reference import hadamard_rotate, quantized_attention
from comfyui_skyreels.skyreels.runtime import TorchRuntime
from comfyui_skyreels.skyreels.runtime.offload import RESERVE_BYTES
from comfyui_skyreels.skyreels.sampling import attend
from comfyui_skyreels.skyreels.sampling.sample import sample
from comfyui_skyreels.skyreels.sampling.settings import (
    SamplingSettings,
    Solver,
    euler,
    get_sigmas,
)
from comfyui_skyreels.skyreels.sampling.step_cache import CACHES, OFF, CacheConfig
from comfyui_skyreels.skyreels.text.encode import DEFAULT_NEGATIVE_PROMPT, encode_prompt
from comfyui_skyreels.skyreels.text.load import load_text_encoder
from comfyui_skyreels.skyreels.transformer.attention import Attention, sdpa
from comfyui_skyreels.skyreels.transformer.model import SkyReelsTransformer
from comfyui_skyreels.skyreels.transformer.quant import QuantLinear
from comfyui_skyreels.skyreels.transformer.sparse_attention import (
    SPARSE,
    SparseConfig,
    SparseRun,
)
from comfyui_skyreels.skyreels.vae.tiling import decode_frames
from comfyui_skyreels.skyreels.weights.load import load_transformer, load_vae
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from train import data, measure

#: folder of the second yardstick, a transformer alone, and the size of clips of both
LARGE_FOLDER = Path(__file__).resolve().parents[1] / "yardstick"
MODELS = {"built-in": (BUILTIN_FOLDER, data.SMALL), "large": (LARGE_FOLDER, data.LARGE)}
OPPOSITE = {
    "left": "right", "right": "left", "up": "down", "down": "up",
    "grow": "shrink", "shrink": "grow", "still": "fade", "fade": "still",
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """How clips are made.

    precision, vae_precision: of the loaders. decode: a mode, or explicit tiles in `tiling`.
    rounded: sparse attention works in 8 bits, as it does on a GPU; what has 16 bits there has 32.
    free_bytes: what the device pretends to have, so that blocks are streamed.
    """

    precision: str = "fp32"
    vae_precision: str = "fp32"
    decode: str = "full"
    tiling: Tiling | None = None
    steps: int = 30
    guidance: Guidance = field(default_factory=Guidance)
    attention: Attention | SparseConfig = sdpa
    rounded: bool = False
    solver: Solver = euler
    cache: CacheConfig = OFF
    free_bytes: int | None = None
    needs_cuda: bool = False


def _kernel(backend: SDPBackend) -> Attention:
    """Attention by one of torch's kernels alone."""

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return sdpa(query, key, value)

    return attention


def _sparse_in_8_bits(
    query: Tensor, key: Tensor, value: Tensor, beta: float, num_blocks: int, exact: Tensor | None
) -> sparse.SparseResult:
    """The twin with inputs rounded as the GPU kernel rounds them, weights and tail apart.

    Queries and keys, rotated, to int8, a scale for each query and each 64 keys; values to e4m3, a
    scale for each channel. Blocks are chosen and pooled before.
    """
    chosen = (
        sparse.unpack(exact) if exact is not None else sparse.route(query, key, beta, num_blocks)
    )
    pooled = sparse.pool(query, key, value)
    width, tokens = query.shape[3], key.shape[2]

    def rounded(x: Tensor, rows: int) -> Tensor:
        x = hadamard_rotate(x, width)
        x = F.pad(x, (0, 0, 0, -tokens % rows)).unflatten(2, (-1, rows))
        scale = x.abs().amax(dim=(3, 4), keepdim=True).clamp_min(1e-12) / 127
        return hadamard_rotate(((x / scale).round() * scale).flatten(2, 3)[:, :, :tokens], width)

    centre, mean = (x.mean(dim=2, keepdim=True) for x in (key, value))
    scale = (value - mean).abs().amax(dim=2, keepdim=True).clamp_min(1e-12) / 448
    values = ((value - mean) / scale).to(torch.float8_e4m3fn).to(value.dtype) * scale + mean
    out = sparse.attend(
        rounded(query, 1), rounded(key - centre, sparse.BLOCK) + centre, values, pooled, chosen
    )
    return sparse.SparseResult(out.to(query.dtype), sparse.pack(chosen), chosen.sum(dim=2))


@contextmanager
def attention_in_8_bits() -> Iterator[None]:
    """Sparse runs take what rounds as the kernels of a GPU do, in dense and in sparse blocks."""
    dense = Decision(quantized_attention, "as on a GPU", "8 bits")
    with (
        mock.patch.object(attend, "choose_attention", lambda *_, **__: dense),
        mock.patch.object(
            attend, "choose_sparse", lambda *_, **__: Decision(_sparse_in_8_bits, "", "8 bits")
        ),
    ):
        yield


#: tiles of 32 pixels: as many in a clip of 64 as the real ones are in a real clip
_TILES = Tiling(32, 32, 0, 24, 24, 0)
_SHORT = Tiling(32, 32, 8, 24, 24, 4)
#: as users choose them, but for clips of any length
_SPARSE, _SPARSER = (replace(SPARSE[name], min_tokens=0) for name in ("sparse", "sparser"))
#: name -> how; the first is what the others are compared with
SETTINGS = {
    "fp32": Setting(),
    "bf16": Setting(precision="bf16", vae_precision="bf16"),
    "fp8": Setting(precision="fp8"),
    "int8": Setting(precision="int8"),
    "tiled 32/24": Setting(tiling=_TILES),
    "tiled 32/24, 8/4 frames": Setting(tiling=_SHORT),
    "tiled-diffusers": Setting(decode="tiled-diffusers"),
    "streamed": Setting(free_bytes=RESERVE_BYTES + 8 * 1024**2, needs_cuda=True),
    "math attention": Setting(attention=_kernel(SDPBackend.MATH)),
    "flash attention": Setting(attention=_kernel(SDPBackend.FLASH_ATTENTION), precision="bf16"),
    "cuDNN attention": Setting(
        attention=_kernel(SDPBackend.CUDNN_ATTENTION), precision="bf16", needs_cuda=True
    ),
    "efficient attention": Setting(
        attention=_kernel(SDPBackend.EFFICIENT_ATTENTION), needs_cuda=True
    ),
    "8-bit attention (reference)": Setting(attention=quantized_attention),
    "12 steps": Setting(steps=12),
    "6 steps": Setting(steps=6),
    "CFG 1": Setting(guidance=Guidance(true_cfg_scale=1.0)),
    "CFG 3": Setting(guidance=Guidance(true_cfg_scale=3.0)),
    "CFG until half": Setting(guidance=Guidance(cfg_end=0.5)),
    "CFG-Zero*": Setting(guidance=Guidance(cfg_zero_star=True)),
    "CFG rescaled 0.7": Setting(guidance=Guidance(guidance_rescale=0.7)),
    "easy cache": Setting(cache=CACHES["easy"]),
    "fast cache": Setting(cache=CACHES["fast"]),
    "first-block cache": Setting(cache=CACHES["first-block"]),
    "sparse": Setting(attention=_SPARSE),
    "sparser": Setting(attention=_SPARSER),
    "sparse, easy cache": Setting(attention=_SPARSE, cache=CACHES["easy"]),
    "sparse, easy cache, 8 bits": Setting(
        attention=_SPARSE, cache=CACHES["easy"], precision="fp8", rounded=True
    ),
}


class _Cramped(TorchRuntime):
    """A device with little room."""

    def __init__(self, device: torch.device, free_bytes: int) -> None:
        super().__init__(device)
        self.room = free_bytes

    def free_bytes(self) -> int:
        return self.room


def _in_float32(folder: Path, precision: str, runtime: TorchRuntime) -> SkyReelsTransformer:
    """A transformer whose 16-bit parts are in 32: ten times as fast on a processor without bf16."""
    model = load_transformer(folder, precision=precision, runtime=runtime)
    for module in model.modules():
        if not isinstance(module, QuantLinear):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.float()
    return model


class Studio:
    """The model under test; its parts are loaded once for each precision.

    Args:
        folder: of the model; parts that it lacks are those of the built-in one.
    """

    def __init__(self, folder: Path = BUILTIN_FOLDER, device: str = "cpu") -> None:
        self.folder, self.runtime = folder, TorchRuntime(device)
        self._parts: dict = {}
        self._embeds: dict[tuple[str, bool], PromptEmbeds] = {}

    def _part(self, load: Callable, name: str, **options: Any):
        key = (name, *options.values())
        if key not in self._parts:
            self._parts[key] = load(self._folder(name), **options, runtime=self.runtime)
        return self._parts[key]

    def _folder(self, name: str) -> Path:
        has_it = (self.folder / (name or "text_encoder")).exists()
        return (self.folder if has_it else BUILTIN_FOLDER) / name

    def vae(self, setting: Setting):
        """The VAE of a setting."""
        return self._part(load_vae, "vae", precision=setting.vae_precision)

    def transformer(self, setting: Setting):
        """The transformer of a setting."""
        if not setting.rounded:
            return self._part(load_transformer, "transformer", precision=setting.precision)
        return self._part(_in_float32, "transformer", precision=setting.precision)

    def make(
        self,
        setting: Setting,
        image: Tensor,
        prompt: str,
        *,
        seed: int,
        negative: str = DEFAULT_NEGATIVE_PROMPT,
        num_frames: int = data.FRAMES,
    ) -> tuple[Tensor, float]:
        """A clip [F, H, W, 3] in 0..1 from a picture [1, H, W, 3], and its seconds."""
        vae, runtime = self.vae(setting), self.runtime
        self.transformer(setting)
        embeds = [self.encode(prompt), self.encode(negative, fps_prefix=False)]
        started = time.perf_counter()
        latents = self.sample(setting, image, embeds, seed, num_frames)
        clip = decode_frames(vae, latents, setting.decode, tiling=setting.tiling, runtime=runtime)
        return clip.cpu(), time.perf_counter() - started

    def encode(self, prompt: str, fps_prefix: bool = True) -> PromptEmbeds:
        """A prompt, encoded once."""
        key = (prompt, fps_prefix)
        if key not in self._embeds:
            encoder = self._part(load_text_encoder, "", exact=True)
            self._embeds[key] = encode_prompt(
                encoder, prompt, fps_prefix=fps_prefix, runtime=self.runtime
            )
        return self._embeds[key]

    def sample(
        self,
        setting: Setting,
        image: Tensor,
        embeds: list[PromptEmbeds],
        seed: int,
        num_frames: int,
    ) -> Tensor:
        """Model-space latents [1, 16, T, h, w]; how they are decoded plays no part."""
        transformer = self.transformer(setting)
        vae, runtime = self.vae(setting), self.runtime
        sampling_runtime = runtime
        if setting.free_bytes is not None:
            sampling_runtime = _Cramped(runtime.device, setting.free_bytes)
        conditioning = encode_image(
            vae, image, width=image.shape[2], height=image.shape[1], num_frames=num_frames,
            runtime=runtime,
        )  # fmt: skip
        with attention_in_8_bits() if setting.rounded else nullcontext():
            return sample(
                transformer, conditioning, *embeds,
                SamplingSettings(
                    seed=seed, sigmas=get_sigmas(setting.steps), guidance=setting.guidance,
                    riflex_k=0, attention=setting.attention, cache=setting.cache,
                    solver=setting.solver,
                ),
                runtime=sampling_runtime,
            )  # fmt: skip


@contextmanager
def counted_blocks(transformer) -> Iterator[list[int]]:
    """Count in a list of one how many blocks run."""
    runs = [0]

    def count(*_) -> None:
        runs[0] += 1

    hooks = [block.register_forward_hook(count) for block in transformer.blocks]
    try:
        yield runs
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def collected_densities() -> Iterator[list[float]]:
    """Collect the mean density of each sparse run."""
    found: list[float] = []
    with mock.patch.object(SparseRun, "report", lambda run: found.append(run.densities().mean)):
        yield found


def run_setting(
    studio: Studio, setting: Setting, cases: list[measure.Case], exact: list[Tensor] | None
) -> tuple[dict, list[Tensor], list[measure.Finding]]:
    """One row of the table, its clips, and what was seen in each."""
    clips, findings, seconds = [], [], []
    transformer = studio.transformer(setting)
    with counted_blocks(transformer) as runs, collected_densities() as densities:
        for index, case in enumerate(cases):
            clip, took = studio.make(
                setting, case.truth()[:1], case.prompt, seed=index, num_frames=case.size.frames
            )
            clips.append(clip)
            findings.append(case.measured(clip))
            seconds.append(took)
    truths = [case.truth() for case in cases]
    lasting = [
        (f.colour, f.shape) == (case_colour(case), case_shape(case))
        for f, case in zip(findings, cases, strict=True)
        if case.verb != "fade"
    ]
    tiles = setting.tiling.tile_sample_stride_width if setting.tiling else 0
    pairs = list(zip(clips, cases, strict=True))
    told = [f.verb == c.verb for f, c in zip(findings, cases, strict=True)]
    row = {
        "told": round(100 * statistics.mean(told), 1),
        "kept": round(100 * statistics.mean(lasting), 1),
        "first": _median(measure.psnr(c[0], t[0]) for c, t in zip(clips, truths, strict=True)),
        "true": _median(measure.psnr(c, t) for c, t in zip(clips, truths, strict=True)),
        **_to_exact(clips, exact),
        "flicker": _median(measure.flicker(clip, case) for clip, case in pairs),
        "seam": _median(measure.seam(*pair, tiles) for pair in pairs) if tiles else None,
        "forwards": round(runs[0] / len(transformer.blocks) / len(cases), 1),
        "density": round(statistics.mean(densities), 3) if densities else None,
        "seconds": _median(seconds),
    }
    return row, clips, findings


#: of each measure of a clip against the exact one: its function, and which of its values is worst
MEASURES = {
    "exact": (measure.psnr, min),
    "ssim": (evaluators.ssim, min),
    "vmaf": (evaluators.vmaf, min),
    "warp": (evaluators.warp, max),
    "gmsd": (evaluators.gmsd, max),
}


def _to_exact(clips: list[Tensor], exact: list[Tensor] | None) -> dict[str, float | None]:
    """Median and worst of every measure; None without an exact clip or what a measure needs."""
    row: dict[str, float | None] = {}
    for name, (score, worst) in MEASURES.items():
        names = (name, "worst" if name == "exact" else f"{name} w.")
        if exact is None or not evaluators.is_here(name):
            row |= dict.fromkeys(names)
            continue
        scores = [score(clip.float(), other) for clip, other in zip(clips, exact, strict=True)]
        row |= dict(
            zip(names, (round(f(scores), 4) for f in (statistics.median, worst)), strict=True)
        )
    return row


def case_colour(case: measure.Case) -> str:
    """Name of the colour of a case's shape."""
    return list(data.COLOURS)[int(case.scene.colour[0])]


def case_shape(case: measure.Case) -> str:
    """Name of the shape of a case."""
    return data.SHAPES[int(case.scene.shape[0])]


def _median(values) -> float:
    return round(statistics.median(values), 2)


# --- the other bars -----------------------------------------------------------------------------


def opposites(
    studio: Studio, cases: list[measure.Case], setting: Setting = SETTINGS["fp32"]
) -> dict[str, float]:
    """Per cent of pictures whose two clips, told opposite things, each do as told."""
    right = []
    for index, case in enumerate(cases):
        image = case.truth()[:1]
        pair = (case, case.told(OPPOSITE[case.verb]))
        done = [
            studio.make(setting, image, c.prompt, seed=index, num_frames=case.size.frames)[0]
            for c in pair
        ]
        seen = [case.measured(clip).verb for clip in done]
        right.append(seen == [c.verb for c in pair])
    return {"pairs that differ as told, %": round(100 * statistics.mean(right), 1)}


def negatives(
    studio: Studio,
    cases: list[measure.Case],
    prompts: Sequence[str] = ("", "moves left", "moves right"),
    setting: Setting = SETTINGS["fp32"],
) -> dict[str, float]:
    """Mean movement to the right in pixels, prompt empty, by negative prompt."""
    shifts = {}
    for negative in prompts:
        moved = []
        for index, case in enumerate(cases):
            clip, _ = studio.make(
                setting, case.truth()[:1], "", seed=index, negative=negative,
                num_frames=case.size.frames,
            )  # fmt: skip
            moved.append(case.measured(clip).shift[0])
        name = f"shift right, empty prompt, negative {negative!r}, px"
        shifts[name] = round(statistics.mean(moved), 2)
    return shifts


def shared_lists(
    studio: Studio, cases: list[measure.Case], steps: Sequence[int] = range(6, 30, 4)
) -> dict[str, float]:
    """Relative error of the guided velocity at some steps of exact runs, per cent.

    Both branches of guidance attend to the blocks that the first one chose, or each to its own.
    """
    setting, errors = Setting(attention=_SPARSE), {"shared": [], "own": []}
    for index, case in enumerate(cases):
        states, exact = {}, {}

        def recording(velocity, latents, sigmas, on_step, states=states, exact=exact):
            for step in range(len(sigmas) - 1):
                states[step] = latents
                exact[step], _ = velocity(latents, sigmas[step])
                latents = latents + (sigmas[step + 1] - sigmas[step]) * exact[step]
            return latents

        def make(setting: Setting, index=index, case=case) -> None:
            studio.make(
                setting, case.truth()[:1], case.prompt, seed=index, num_frames=case.size.frames
            )

        make(replace(SETTINGS["fp32"], solver=recording))
        for kind, found in errors.items():

            def replaying(velocity, latents, sigmas, on_step, found=found, s=states, exact=exact):
                for step in steps:
                    guided, _ = velocity(s[step], sigmas[step])
                    found.append(float((guided - exact[step]).norm() / exact[step].norm()))
                return latents

            own = mock.patch.object(SparseRun, "_leads", lambda _: True)
            with own if kind == "own" else nullcontext():
                make(replace(setting, solver=replaying))
    return {
        f"guided velocity, {kind} lists, error in %, {name}": round(100 * f(found), 3)
        for kind, found in errors.items()
        for name, f in (("median", statistics.median), ("worst", max))
    }


def other_sizes(studio: Studio, count: int) -> dict[str, float]:
    """Per cent of clips in which the shape is still there at the end; no fades among them."""
    found = {}
    for width, height, frames in ((64, 64, 33), (96, 64, 17), (64, 96, 17)):
        cases = measure.held_out_cases(count, seed=33, width=width, height=height)
        there, told = [], []
        for index, case in enumerate(c for c in cases if c.verb != "fade"):
            image = case.truth(frames, width, height)[:1]
            clip, _ = studio.make(
                SETTINGS["fp32"], image, case.prompt, seed=index, num_frames=frames
            )
            finding = case.measured(clip)
            there.append(finding.colour == case_colour(case) and finding.shape != "none")
            told.append(finding.verb == case.verb)
        name = f"{frames} frames of {width}x{height}"
        found[f"{name}: shape present, %"] = round(100 * statistics.mean(there), 1)
        found[f"{name}: as told, %"] = round(100 * statistics.mean(told), 1)
    return found


@torch.inference_mode()
def round_trip(studio: Studio, cases: list[measure.Case]) -> dict[str, float]:
    """Median PSNR of true clips through the VAE."""
    vae, values = studio.vae(SETTINGS["fp32"]), []
    for case in cases:
        truth = case.truth()
        latents = vae.encode((truth * 2 - 1).permute(3, 0, 1, 2)[None])
        values.append(
            measure.psnr(decode_frames(vae, latents, "full", runtime=studio.runtime), truth)
        )
    return {"VAE round trip, dB": _median(values)}


@torch.inference_mode()
def through_diffusers(
    studio: Studio, case: measure.Case, setting: Setting = SETTINGS["fp32"]
) -> dict[str, float]:
    """Largest difference to the clip that diffusers' and transformers' own classes make.

    The same files in float32: their VAE, transformer, text encoders and scheduler, the posterior's
    mode, the whole clip decoded at once. Pixels in 0..1.
    """
    import diffusers
    from transformers import AutoTokenizer, CLIPTextModel, LlamaModel

    folder, size = studio._folder, case.size
    vae = diffusers.AutoencoderKLHunyuanVideo.from_pretrained(folder("vae")).float()
    vae.use_framewise_decoding = False
    transformer = diffusers.HunyuanVideoTransformer3DModel.from_pretrained(folder("transformer"))
    pipeline = diffusers.HunyuanSkyreelsImageToVideoPipeline(
        text_encoder=LlamaModel.from_pretrained(folder("text_encoder")).float(),
        tokenizer=AutoTokenizer.from_pretrained(folder("tokenizer")),
        text_encoder_2=CLIPTextModel.from_pretrained(folder("text_encoder_2")).float(),
        tokenizer_2=AutoTokenizer.from_pretrained(folder("tokenizer_2")),
        transformer=transformer.float(),
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
    )
    image = case.truth()[:1]
    shape = (1, 16, size.grid[0], size.size // 8, size.size // 8)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    first = vae.encode((image * 2 - 1).permute(3, 0, 1, 2)[None]).latent_dist.mode()
    padded = torch.zeros(shape)
    padded[:, :, :1] = first * vae.config.scaling_factor
    pipeline.prepare_latents = lambda *args, **kwargs: (noise.clone(), padded)
    theirs = pipeline(
        image=image.permute(0, 3, 1, 2), prompt=f"FPS-24, {case.prompt}",
        negative_prompt=DEFAULT_NEGATIVE_PROMPT, width=size.size, height=size.size,
        num_frames=size.frames, num_inference_steps=setting.steps,
        true_cfg_scale=6.0, guidance_scale=1.0, output_type="pt",
    ).frames[0].permute(0, 2, 3, 1)  # fmt: skip
    ours, _ = studio.make(setting, image, case.prompt, seed=0, num_frames=size.frames)
    return {"through diffusers, largest difference": float((theirs - ours).abs().max())}


def contact_sheet(
    path: Path, cases: list[measure.Case], clips: list[Tensor], columns: int = 4
) -> None:
    """A picture for people: of every case five true frames above those that were made."""
    from PIL import Image

    rows = []
    for case, clip in zip(cases, clips, strict=True):
        every = (len(clip) - 1) // 4
        strips = [v[::every].permute(1, 0, 2, 3).flatten(1, 2) for v in (case.truth(), clip)]
        tile = torch.cat([*strips, torch.zeros(6, strips[0].shape[1], 3)])
        rows.append(torch.cat([tile, torch.zeros(tile.shape[0], 6, 3)], dim=1))
    rows += [torch.zeros_like(rows[0])] * (-len(rows) % columns)
    lines = [torch.cat(rows[i : i + columns], dim=1) for i in range(0, len(rows), columns)]
    sheet = (torch.cat(lines) * 255).round().clamp(0, 255).byte()
    Image.fromarray(sheet.numpy()).save(path)


def print_table(rows: dict[str, dict]) -> None:
    """Settings down, measures across."""
    names = list(next(iter(rows.values())))
    wide = max(map(len, rows)) + 2
    print(" " * wide + "".join(f"{name:>9}" for name in names))
    for label, row in rows.items():
        cells = ("-" if row[name] is None else row[name] for name in names)
        print(f"{label:<{wide}}" + "".join(f"{cell:>9}" for cell in cells))


def main() -> None:
    """Parse, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="built-in", help="built-in, large or a folder")
    parser.add_argument("--cases", type=int, default=128)
    parser.add_argument("--seed", type=int, default=11, help="of the cases")
    parser.add_argument("--setting", action="append", choices=list(SETTINGS))
    parser.add_argument("--suite", choices=("settings", "bars", "all"), default="settings")
    parser.add_argument("--sheet", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    folder, size = MODELS.get(arguments.model, (Path(arguments.model), data.SMALL))
    studio = Studio(folder, arguments.device)
    cases = measure.held_out_cases(arguments.cases, arguments.seed, size=size)
    print(*evaluators.missing(), sep="\n", file=sys.stderr)
    rows, bars, exact = {}, {}, None
    if arguments.suite != "bars":
        for name in arguments.setting or SETTINGS:
            if SETTINGS[name].needs_cuda and studio.runtime.device.type != "cuda":
                print(f"not measured, needs CUDA: {name}", file=sys.stderr)
                continue
            row, clips, findings = run_setting(studio, SETTINGS[name], cases, exact)
            rows[name] = row
            print(json.dumps({name: row}), file=sys.stderr, flush=True)
            if exact is None:
                exact = clips
                for case, finding in zip(cases, findings, strict=True):
                    if finding.verb != case.verb:
                        print(f"not as told: {case.prompt!r}: {finding}", file=sys.stderr)
                if arguments.sheet:
                    contact_sheet(arguments.sheet, cases[:64], clips[:64])
        print_table(rows)
    if arguments.suite != "settings":
        few = cases[: max(8, arguments.cases // 2)]
        bars = round_trip(studio, cases) | opposites(studio, few) | negatives(studio, few[:16])
        if size == data.SMALL:
            bars |= other_sizes(studio, len(few))
        else:
            bars |= shared_lists(studio, few[:8])
        bars |= through_diffusers(studio, cases[0])
        for name, value in bars.items():
            print(f"{name:<60}{value:>9}")
    print(json.dumps({"cases": arguments.cases, "settings": rows, "bars": bars}))


if __name__ == "__main__":
    main()
