"""What this machine has, what of it is used, and why the rest is not.

Optional packages are looked up, not imported: a broken one must not break the diagnosis. Triton is
the exception, as only an import shows whether it loads; on a GPU the self-tests of its kernels run.
"""

import importlib.metadata
import os
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .config import TransformerConfig
from .errors import SkyReelsError, shown
from .kernels import dispatch, operators
from .plan import STORED, Job, Preflight, preflight
from .runtime import Runtime, TorchRuntime
from .transformer import attention, linear, quant, sparse_kernels
from .weights.inspect import FAMILY_NAMES, inspect
from .weights.load import check_transformer

#: package -> what it is for here
PACKAGES = {
    "torch": "everything",
    "safetensors": "saved steps and cached prompts",
    "einops": "tensor shapes",
    "numpy": "pictures",
    "transformers": "text encoding outside ComfyUI",
    "diffusers": "the prompt template; tests compare with it",
    "av": "writing videos outside ComfyUI",
    "pillow": "reading and resizing pictures",
}
#: packages with kernels, beside Triton
KERNELS = {
    "comfy_kitchen": (
        "fused norms, quantizers and 8-bit linears not used (not benchmarked against ours). See "
        '"8-bit attention" for its attention kernel'
    ),
    "sageattention": "8-bit attention, not exact: tried when fast attention is requested",
    "cudnn": (
        "nvidia-cudnn-frontend, 8-bit attention of cuDNN, not exact: tried when fast attention is "
        "requested"
    ),
}
MODEL_FOLDERS = ("diffusion_models", "unet", "diffusers", "vae", "text_encoders", "clip")


def examine() -> dict[str, dict[str, str]]:
    """Describe versions, devices, kernels and weights.

    Weights are looked for in `COMFYUI_DIR`/models (else ~/ComfyUI/models); headers only.

    Returns:
        Section -> item -> finding.
    """
    return {
        "versions": _versions(),
        "devices": _devices(),
        "kernels": _kernels(),
        "weights": _weights(),
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "system": platform.platform()}
    for package, purpose in PACKAGES.items():
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = f"missing: needed for {purpose}; pip install {package}"
        else:
            found[package] = f"{version} ({purpose})"
    return found


def _devices() -> dict[str, str]:
    found = {
        "cpu": f"{os.cpu_count()} cores, {TorchRuntime().free_bytes() / 1e9:.1f} GB memory free"
    }
    if not torch.cuda.is_available():
        reason = "this torch build has none" if torch.version.cuda is None else "no device found"
        found["cuda"] = f"not available: {reason}"
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free = TorchRuntime(f"cuda:{index}").free_bytes()
        found[f"cuda:{index}"] = (
            f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{free / 1e9:.1f} of {properties.total_memory / 1e9:.1f} GB free"
        )
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            found[f"cuda:{index}"] += "; no native bfloat16: slow"
    return found


def _kernels() -> dict[str, str]:
    found = _pins()
    cudnn_version: Any = torch.backends.cudnn.version  # untyped in torch
    cudnn = cudnn_version() if torch.cuda.is_available() else None
    if cudnn is not None and torch.__version__.startswith(("2.9", "2.10")) and cudnn < 91500:
        found["cuDNN version"] = (
            f"{cudnn}: this version takes 3-17 times the memory in 3-D convolutions of bf16 "
            "(pytorch issue 166643): update torch or nvidia-cudnn"
        )
    version, problem = dispatch.find_triton(dispatch.backend())
    used = "compiles our fused kernels on NVIDIA GPUs"
    found["triton"] = f"not used: {problem}" if problem else f"{version}: {used}"
    for module, reason in KERNELS.items():
        present = dispatch.is_installed(module)
        found[module] = f"{'found' if present else 'not installed'}: {reason}"
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        for name, finding in _reports(device).items():
            found[f"{name} (cuda:{index})"] = finding
    if not torch.cuda.device_count():
        found |= _reports(torch.device("cpu"))
    return found


def _pins() -> dict[str, str]:
    """The environment variables that choose fast paths."""
    pins = {
        dispatch.BACKEND_VARIABLE: (dispatch.backend(), dispatch.BACKENDS),
        dispatch.ATTENTION_VARIABLE: (dispatch.attention_pin(), ("auto", *attention.PINS)),
    }
    return {name: f"{value} (of {', '.join(all_)})" for name, (value, all_) in pins.items()}


def _reports(device: torch.device) -> dict[str, str]:
    tables = (attention, sparse_kernels, quant, linear, operators)
    return dispatch.report(
        {name: variants for table in tables for name, variants in table.decisions(device).items()}
    )


def plan_here(runtime: Runtime, job: Job) -> dict[str, Preflight]:
    """What a clip would take here, with each kind of transformer that is found.

    Args:
        runtime: whose device is probed.
        job: what is made.

    Returns:
        Precision of the file -> plans; those of the published bf16 file if there is none.
    """
    stored: dict[str, TransformerConfig] = {}
    for path in _weight_paths():
        try:
            info = check_transformer(path)
        except (SkyReelsError, OSError):
            continue  # told by `examine`
        if isinstance(info.config, TransformerConfig):
            stored.setdefault(STORED.get(next(iter(info.dtypes)), "bf16"), info.config)
    return {
        precision: preflight(runtime, replace(job, config=config), precision)
        for precision, config in (stored or {"bf16": TransformerConfig()}).items()
    }


def _checkout() -> Path:
    return Path(os.environ.get("COMFYUI_DIR", Path.home() / "ComfyUI"))


def _weight_paths() -> dict[Path, str]:
    """Each checkpoint among ComfyUI's models, and its name below them."""
    found = {}
    for folder in MODEL_FOLDERS:
        root = _checkout() / "models" / folder
        # shards are one checkpoint, which their folder stands for
        indices = {path.parent for path in root.rglob("*.safetensors.index.json")}
        files = {
            path
            for suffix in ("safetensors", "gguf")
            for path in root.rglob(f"*.{suffix}")
            if path.parent not in indices
        }
        for path in sorted(files | indices):
            found[path] = f"{folder}/{path.relative_to(root).as_posix()}"
    return found


def _weights() -> dict[str, str]:
    found = {}
    for path, name in _weight_paths().items():
        try:
            info = inspect(path)
        except (SkyReelsError, OSError) as error:
            found[shown(name)] = str(error)
            continue
        kind = FAMILY_NAMES[info.family] + (f" ({info.variant})" if info.variant else "")
        dtypes = "/".join(info.dtypes)
        found[shown(name)] = f"{kind}, {dtypes}, {info.num_bytes / 1e9:.1f} GB"
    return found or {
        "none": f"no .safetensors or .gguf under {_checkout().name}/models; the built-in works"
    }
