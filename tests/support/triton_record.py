"""What Triton kernels compile to, kept so that an unchanged kernel is not compiled again.

    python -m support.triton_record     (from tests/) compiles every kernel and writes the record

A result is kept under all it depends on, as in Triton's own cache: the source of the kernel and of
what it calls, its types and constants, the GPU, the options, the versions of Triton and of its
assembler. Whatever is not in the record is compiled. So is one kernel in sixteen that is there,
another one after each change: it must come to what the record says. With SKYREELS_COMPILE=all each
of them is.
"""

import functools
import hashlib
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime import cache

RECORD = Path(__file__).parent / "compiled_kernels.json"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
#: instructions of a kernel that tests ask for -> what they are called in PTX
INSTRUCTIONS = {
    "wgmma": "wgmma.mma_async", "int8_products": ".s32.s8.s8", "e4m3_products": ".e4m3.e4m3",
}  # fmt: skip
# Triton's own cache, too, is good for a version of it: 0.6 s for the sums of its files in a process
cache.triton_key = lambda: triton.__version__
#: every kernel of this process: key -> result
found: dict[str, dict[str, int]] = {}


def compiled(source: ASTSource, capability: int, options: dict) -> dict[str, int]:
    """What a kernel takes of a GPU that need not be here.

    Args:
        source: kernel, types and constants.
        capability: of the GPU, 90 for an H100.
        options: of triton.compile.

    Returns:
        Bytes of "shared" memory of a block; "registers" of a thread; bytes of its "stack" and
        "local" memory, where registers are spilled to; how often each of INSTRUCTIONS occurs.
    """
    target = GPUTarget("cuda", capability, 32)
    key = _key(source, target, options)
    kept = _record().get(key)
    if kept is not None and key[0] != "0" and os.environ.get("SKYREELS_COMPILE") != "all":
        found[key] = kept
        return kept
    made = triton.compile(source, target=target, options=options)
    counts = {name: made.asm["ptx"].count(code) for name, code in INSTRUCTIONS.items()}
    result = {"shared": made.metadata.shared, **_resources(made.asm["cubin"]), **counts}
    if kept not in (None, result):
        raise RuntimeError(
            f"{source.name} for sm_{capability} comes to {result}, and {RECORD.name} says {kept}: "
            "make that file again with python -m support.triton_record."
        )
    found[key] = result
    return result


@functools.cache
def _record() -> dict[str, dict[str, int]]:
    return json.loads(RECORD.read_text()) if RECORD.is_file() else {}


def _key(source: ASTSource, target: GPUTarget, options: dict) -> str:
    backend = make_backend(target)
    parts = [source.hash(), backend.hash(), backend.parse_options(dict(options)).hash()]
    return hashlib.sha256("-".join([triton.__version__, *parts]).encode()).hexdigest()[:24]


def _resources(cubin: bytes) -> dict[str, int]:
    """What the assembler says the kernel takes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", path], capture_output=True, text=True, check=True
        ).stdout
    said = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text))
    return {"registers": int(said["REG"]), "stack": int(said["STACK"]),
            "local": int(said["LOCAL"])}  # fmt: skip


def write() -> None:
    """Compile every kernel for every GPU, and keep what that comes to."""
    from support import (
        triton_attention,
        triton_blocks,
        triton_compile,
        triton_int8,
        triton_low_rank,
        triton_rescale,
        triton_sparse,
    )

    RECORD.unlink(missing_ok=True)
    modules = (
        triton_compile, triton_attention, triton_int8, triton_rescale, triton_blocks,
        triton_low_rank, triton_sparse,
    )  # fmt: skip
    for module in modules:
        module.compile_for(triton_compile.CAPABILITIES)
    rows = (f'"{key}": {json.dumps(result)}' for key, result in sorted(found.items()))
    RECORD.write_text("{\n" + ",\n".join(rows) + "\n}\n")


if __name__ == "__main__":
    from support import triton_record

    triton_record.write()  # the module that the others import, not this copy of it
