"""Time loading a transformer file in each precision, and the memory it takes.

    python tests/bench/bench_load.py [--layers 1] [--single-layers 2] [--heads 8] [--device cpu]
        [--stored bf16|fp8] [--precision auto]... [--folder DIR]

A file of random weights of these sizes is written to a temporary folder (in --folder, where the
disk to be measured is) and loaded in a process of its own for each precision, so that peaks are its
own. The file has just been written, so it is likely read from the page cache: reading from a cold
disk takes longer. "beyond" is the peak of the process above what it held before and above the
weights. --device is where weights are rounded; they rest in host memory. Ends with one line of
JSON.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from comfyui_skyreels.skyreels.config import TransformerConfig
from comfyui_skyreels.skyreels.runtime import TorchRuntime
from comfyui_skyreels.skyreels.runtime.offload import weight_bytes
from comfyui_skyreels.skyreels.transformer.model import SkyReelsTransformer
from comfyui_skyreels.skyreels.weights.load import load_transformer
from support import tiny

STORED = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


def write(path: Path, config: TransformerConfig, stored: str) -> None:
    """Random weights; "fp8" is what is published as that: the linears of blocks, without scales."""
    with torch.device("meta"):
        shapes = SkyReelsTransformer(config).state_dict()
    state = {}
    for name, meta in shapes.items():
        tensor = 0.02 * torch.randn(meta.shape, dtype=torch.bfloat16)
        in_block = "_blocks." in name and tensor.ndim == 2
        state[name] = tensor.to(STORED[stored]) if in_block else tensor
    tiny.save(path, state)


def resident_bytes(item: str) -> int | None:
    """Of this process, "VmRSS" now or "VmHWM" at most; None where it is not told the Linux way.

    Not ru_maxrss: that one starts at what the parent process held.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    line = next(line for line in status.splitlines() if line.startswith(item))
    return 1024 * int(line.split()[1])


def forget_peak() -> None:
    """Start VmHWM anew; where that is not allowed, importing counts too."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def measure(path: str, precision: str, device: str) -> dict:
    """Load once, in this process."""
    runtime = TorchRuntime(device)
    torch.zeros(1, device=runtime.device)  # a CUDA context is no part of loading
    forget_peak()
    before = resident_bytes("VmRSS")
    started = time.perf_counter()
    model = load_transformer(path, precision=precision, runtime=runtime)
    seconds = time.perf_counter() - started
    peak, weights = resident_bytes("VmHWM"), weight_bytes(model)
    beyond = None if peak is None or before is None else peak - before - weights
    row = {
        "precision": precision, "seconds": round(seconds, 3), "weights_mb": round(weights / 1e6, 1),
        "beyond_mb": None if beyond is None else round(beyond / 1e6, 1),
    }  # fmt: skip
    if runtime.device.type == "cuda":
        row["gpu_peak_mb"] = round(torch.cuda.max_memory_allocated(runtime.device) / 1e6, 1)
    return row


def run(
    *, layers: int = 1, single_layers: int = 2, heads: int = 8, device: str = "cpu",
    stored: str = "bf16", precisions: tuple[str, ...] = ("bf16", "fp8", "int8"),
    folder: str | None = None,
) -> dict:  # fmt: skip
    """A row for each precision; sizes as in `TransformerConfig`, heads of 128."""
    config = TransformerConfig(
        num_attention_heads=heads, num_layers=layers, num_single_layers=single_layers,
        num_refiner_layers=1,
    )  # fmt: skip
    rows = []
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        path = Path(temporary) / "transformer.safetensors"
        write(path, config, stored)
        size = path.stat().st_size
        for precision in precisions:
            command = [sys.executable, __file__, "--measure", str(path)]
            command += ["--precision", precision, "--device", device]
            child = subprocess.run(command, capture_output=True, text=True, check=False)
            if child.returncode:
                raise RuntimeError(f"loading as {precision} failed: {child.stderr[-2000:]}")
            row = json.loads(child.stdout.splitlines()[-1])
            row["mb_per_s"] = round(size / 1e6 / row["seconds"], 1)
            rows.append(row)
    on_gpu = torch.device(device).type == "cuda"
    return {
        "bench": "load", "file_mb": round(size / 1e6, 1), "stored": stored,
        "device": torch.cuda.get_device_name() if on_gpu else device,
        "torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--single-layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--stored", choices=STORED, default="bf16")
    parser.add_argument("--precision", action="append", default=[])
    parser.add_argument("--folder")
    parser.add_argument("--measure", metavar="FILE", help="load this file here and print one row")
    options = vars(parser.parse_args())
    file, precisions = options.pop("measure"), options.pop("precision")
    if file is not None:
        print(json.dumps(measure(file, precisions[0], options["device"])))
        return
    if precisions:
        options["precisions"] = tuple(precisions)
    result = run(**options)
    print(f"{result['file_mb']:.0f} MB of {result['stored']}")
    for row in result["rows"]:
        beyond = "not measured here" if row["beyond_mb"] is None else f"{row['beyond_mb']:.0f} MB"
        print(
            f"{row['precision']:6} {row['seconds']:8.2f} s {row['mb_per_s']:8.0f} MB/s"
            f"  weights {row['weights_mb']:8.0f} MB  beyond {beyond}"
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
