"""Attention that rounds to 8 bits: the kernels of other packages and ours, behind one signature.

Each is found, not required. `load` imports its package; attention.py decides whether it is used.
Queries, keys and values are read in place, as views of one buffer. Ours, SageAttention and FA3
write [B, S, heads, D], as the projection reads it; comfy-kitchen writes [B, heads, S, D], so the
projection copies it once. SageAttention 1 subtracts the mean of the keys in place and gets a copy
of them; FA3 and cuDNN get copies in 8 bits.
"""

import inspect
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import OptionError
from ..kernels import dispatch
from ..kernels.dispatch import DeviceInfo, sm
from ..kernels.reference import hadamard

#: attention(query, key, value), each [B, heads, S, D] -> [B, heads, S, D]; no mask, scale D**-0.5
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class FastKernel:
    """An attention that rounds to 8 bits.

    Attributes:
        package: that must be installed.
        min_capability: the least compute capability that it is made for.
        majors: the major versions of the compute capabilities that it supports.
        load: imports it and makes the function for (info, device, head_dim, dtype).
    """

    package: str
    min_capability: tuple[int, int]
    majors: tuple[int, ...]
    load: Callable[[DeviceInfo, torch.device, int, torch.dtype], Attention]


def _load_comfy_kitchen(
    info: DeviceInfo, device: torch.device, head_dim: int, dtype: torch.dtype
) -> Attention:
    import comfy_kitchen

    attend = comfy_kitchen.int8_attention  # an AttributeError is a reason too
    is_available = getattr(comfy_kitchen, "int8_attention_is_available", None)
    if is_available is not None and not is_available(device):
        raise RuntimeError("its CUDA extension does not load: it needs driver 580 or newer")

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out: Tensor = attend(query, key, value)
        return out

    return attention


def _load_sage(
    info: DeviceInfo, device: torch.device, head_dim: int, dtype: torch.dtype
) -> Attention:
    from sageattention import sageattn

    # version 1 names this parameter, and then subtracts the mean from the keys it was given
    writes_keys = "smooth_k" in inspect.signature(sageattn).parameters

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if writes_keys:
            key = key.clone()
        tokens_first = (x.transpose(1, 2) for x in (query, key, value))
        with dispatch.current_device(query.device):  # version 2 sets it and leaves it so
            out: Tensor = sageattn(
                *tokens_first, tensor_layout="NHD", is_causal=False, smooth_k=True
            )
        return out.transpose(1, 2)

    return attention


def _load_fa3(
    info: DeviceInfo, device: torch.device, head_dim: int, dtype: torch.dtype
) -> Attention:
    """FA3 in fp8, called directly: torch's hook for it changes attention for the whole process."""
    from flash_attn_interface import flash_attn_func

    matrix = hadamard(head_dim, device).to(dtype)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key = key - key.mean(dim=2, keepdim=True)
        parts = [_to_e4m3(x, (2, 3)) for x in (query @ matrix, key @ matrix, value)]
        q, k, v = (x.transpose(1, 2) for x, _ in parts)
        q_scale, k_scale, v_scale = (scale[:, :, 0, 0] for _, scale in parts)
        out = flash_attn_func(q, k, v, q_descale=q_scale, k_descale=k_scale, v_descale=v_scale)
        out = out[0] if isinstance(out, tuple) else out  # early releases add the log-sum-exp
        result: Tensor = out.transpose(1, 2).to(query.dtype)
        return result

    return attention


def _to_e4m3(x: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Divide x by the largest magnitude along `axes`, in e4m3; and the scales, float32."""
    scale = x.abs().amax(dim=axes, keepdim=True).float() / 448
    scale = torch.where(scale == 0, 1.0, scale)
    return (x / scale.to(x.dtype)).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def _load_cudnn_fp8(
    info: DeviceInfo, device: torch.device, head_dim: int, dtype: torch.dtype
) -> Attention:
    """Attention of cuDNN with both GEMMs in e4m3, through nvidia-cudnn-frontend.

    One scale for each tensor. Below sm100 its output is e4m3 too, which costs 2.6 % by itself.

    Returns:
        The attention.

    Source: nvidia-cudnn-frontend 1.18.0, sdpa_support_surface.h (what sm90 takes) and
        scaled_dot_product_flash_attention.h (where each scale enters).
    """
    import cudnn

    version = cudnn.backend_version()  # raises where there is no libcudnn
    is_wide = info.capability is not None and info.capability >= (10, 0) and version >= 91300
    out_dtype = torch.bfloat16 if is_wide else torch.float8_e4m3fn
    with dispatch.current_device(device):
        handle = cudnn.create_handle()
    matrix = hadamard(head_dim, device).to(dtype)
    # weights are at most 1; a power of two below 448 has an exact inverse
    weight_scale = torch.full((1, 1, 1, 1), 256.0, device=device)
    graphs: dict[Hashable, Any] = {}

    def build(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Any:
        e4m3, float32 = cudnn.data_type.FP8_E4M3, cudnn.data_type.FLOAT
        graph = cudnn.pygraph(
            io_data_type=e4m3,
            intermediate_data_type=float32,
            compute_data_type=float32,
            handle=handle,
        )
        inputs = {
            name: graph.tensor(
                name=name,
                dim=list(x.shape),
                stride=list(x.stride()),
                data_type=e4m3,
                uid=_CUDNN_UIDS[name],
            )
            for name, x in (("q", q), ("k", k), ("v", v))
        }
        scales = {
            name: graph.tensor(
                name=name, dim=[1] * 4, stride=[1] * 4, data_type=float32, uid=_CUDNN_UIDS[name]
            )
            for name in _CUDNN_SCALES
        }
        result, _, *largest = graph.sdpa_fp8(
            **inputs, **scales, generate_stats=False, attn_scale=float(head_dim**-0.5)
        )
        result.set_uid(_CUDNN_UIDS["o"]).set_output(True).set_dim(list(out.shape)).set_stride(
            list(out.stride())
        ).set_data_type(cudnn.data_type.BFLOAT16 if is_wide else e4m3)
        for name, tensor in zip(_CUDNN_UNUSED, largest, strict=True):  # they must have a shape
            tensor.set_uid(_CUDNN_UIDS[name]).set_output(False)
            tensor.set_dim([1] * 4).set_stride([1] * 4).set_data_type(float32)
        graph.build([cudnn.heur_mode.A])
        return graph

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mean = value.mean(dim=2, keepdim=True)
        key = key - key.mean(dim=2, keepdim=True)
        whole = (0, 1, 2, 3)
        q, q_scale = _to_e4m3(query @ matrix, whole)
        k, k_scale = _to_e4m3(key @ matrix, whole)
        v, v_scale = _to_e4m3(value - mean, whole)
        batch, heads, tokens, width = query.shape
        out = torch.empty(batch, tokens, heads, width, dtype=out_dtype, device=query.device)
        out = out.transpose(1, 2)
        layout = tuple((x.shape, x.stride()) for x in (q, k, v))
        if layout not in graphs:
            graphs[layout] = build(q, k, v, out)
        graph = graphs[layout]
        # no output exceeds the largest value, so this scale cannot overflow
        out_scale = torch.ones_like(v_scale) if is_wide else 1 / v_scale
        scales = (q_scale, k_scale, v_scale, 1 / weight_scale, weight_scale, out_scale)
        pack = {"q": q, "k": k, "v": v, "o": out, **dict(zip(_CUDNN_SCALES, scales, strict=True))}
        with dispatch.current_device(query.device):
            cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
            workspace = torch.empty(
                graph.get_workspace_size(), dtype=torch.uint8, device=query.device
            )
            graph.execute(
                {_CUDNN_UIDS[name]: x for name, x in pack.items()}, workspace, handle=handle
            )
        return (out.float() / out_scale + mean).to(query.dtype)

    return attention


_CUDNN_SCALES = ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o")
#: largest weight and output, which cuDNN would return
_CUDNN_UNUSED = ("amax_s", "amax_o")
_CUDNN_NAMES = ("q", "k", "v", "o", *_CUDNN_SCALES, *_CUDNN_UNUSED)
_CUDNN_UIDS = {name: uid for uid, name in enumerate(_CUDNN_NAMES, 1)}


def _load_triton(
    info: DeviceInfo, device: torch.device, head_dim: int, dtype: torch.dtype, *, index: int = 0
) -> Attention:
    from ..kernels.triton import attention as triton_attention

    if head_dim not in triton_attention.HEAD_DIMS:
        raise OptionError(f"it takes head dimensions {triton_attention.HEAD_DIMS}, not {head_dim}")
    tiles = triton_attention.tiles(info.capability or (0, 0))
    if index >= len(tiles):
        raise OptionError(f"it has {len(tiles) or 'no'} tile for {sm(info)}")
    return partial(triton_attention.quantized_attention, tile=tiles[index])


#: the likely fastest first, which is what counts where nothing can be timed
FAST = {
    "SageAttention": FastKernel("sageattention", (8, 0), (8, 9, 12), _load_sage),
    "FA3": FastKernel("flash_attn_interface", (9, 0), (9,), _load_fa3),
    "comfy-kitchen": FastKernel("comfy_kitchen", (7, 5), (7, 8, 9, 10, 12), _load_comfy_kitchen),
    "Triton": FastKernel("triton", (8, 0), (8, 9, 12), _load_triton),
    "Triton large tile": FastKernel("triton", (8, 9), (8, 9, 12), partial(_load_triton, index=1)),
    "Triton fp16": FastKernel("triton", (8, 9), (8, 9, 12), partial(_load_triton, index=2)),
    "cuDNN fp8": FastKernel("cudnn", (9, 0), (9, 10, 12), _load_cudnn_fp8),
}
