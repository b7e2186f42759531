"""Graphics cards as the planner sees them, with rates measured, or published and marked so."""

from comfyui_skyreels.skyreels.kernels.dispatch import DeviceInfo
from comfyui_skyreels.skyreels.plan import Machine

#: rates of an H100: measured, tests/bench/LOG.md (convolutions: the decode of 97 frames of 544x960,
#: 663 TFLOP in 1.65 s); of the others: published dense rates, of which products reach nine tenths,
#: and memory and links as data sheets have them, of which eight tenths. Between cards none is
#: measured: NVLink 4 of the H100 has 450 GB/s each way, of which eight tenths; the others send
#: through main memory, over PCIe 4 at about 20 GB/s each way with 16 lanes
CARDS = {
    "H100": ((9, 0), {
        "GEMM fp32": 50e12, "GEMM bf16": 780e12, "GEMM fp8": 1300e12, "GEMM int8": 1050e12,
        "attention exact": 587e12, "convolution": 402e12, "memory": 2.6e12, "link": 53.5e9,
        "peer": 360e9,
    }),
    "RTX 4090": ((8, 9), {
        "GEMM fp32": 60e12, "GEMM bf16": 150e12, "GEMM fp8": 280e12, "GEMM int8": 480e12,
        "attention exact": 164e12, "convolution": 75e12, "memory": 0.8e12, "link": 25e9,
        "peer": 20e9,
    }),
    "RTX 3060": ((8, 6), {
        "GEMM fp32": 11e12, "GEMM bf16": 46e12, "GEMM fp8": 46e12, "GEMM int8": 90e12,
        "attention exact": 40e12, "convolution": 23e12, "memory": 0.28e12, "link": 12e9,
        "peer": 10e9,
    }),
}  # fmt: skip
#: driver, CUDA context and libraries
CONTEXT_BYTES = 700_000_000


def card(name: str, gigabytes: int) -> Machine:
    """An idle card of a kind with so much memory, under Linux, in a machine with 64 GiB."""
    capability, rates = CARDS[name]
    total = gigabytes * 2**30
    return Machine(
        name=name,
        total_bytes=total,
        free_bytes=total - CONTEXT_BYTES,
        ram_bytes=64 * 2**30,
        rates=rates,
        info=DeviceInfo("cuda", name, capability),
    )
