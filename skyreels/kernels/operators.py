"""The fused steps as torch operators: what each computes, and where its kernel runs.

Each step is one operator, so that compilers, shape-only tensors and counters see one call: a row of
OPERATORS or EPILOGUES. On a CPU it is its reference; on a GPU the Triton kernel of the same name
runs where it is fit for the device and passes its self-test, else the reference, which is logged
once with the reason. A further kernel takes one row, a reference and a function in `triton/`.

Operators live in a namespace of their own for every copy of this package in a process: copies that
are loaded under two names, or again after a reload, may be of different versions, and each runs its
own code. The first copy gets the plain name, so that names in traces do not change from run to run.
"""

import importlib
import itertools
import logging
import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import blocks, dispatch, reference
from .dispatch import Candidate, Decision, DeviceInfo, Finding, dotted, short

logger = logging.getLogger("skyreels.kernels.operators")

MIN_CAPABILITY = (7, 5)
#: of a dtype that a kernel reads or writes: the first with instructions for it
DTYPE_CAPABILITY = {torch.bfloat16: (8, 0), torch.float8_e4m3fn: (8, 9)}
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
#: 32 float32 registers in each thread of 32 warps
MAX_WIDTH = 32_768
MAX_HADAMARD_BLOCK = 256
#: of a LoRA: 128 float32 registers in each thread of 8 warps for 128 tokens
MAX_RANK = 128
#: queries, keys, values, MLP
MAX_SEGMENTS = 4
#: of a clip: a tile is a pixel with all its channels
MAX_CHANNELS = 4096
HEAD_DIMS = (16, 32, 64, 128, 256)
#: tokens that plain torch works on at a time: float32 copies of a whole clip would take gigabytes
PIECE_TOKENS = 4096
#: largest relative L2 difference from the reference, both rounded to the same format: a value in a
#: few thousand lies so close to a tie that it falls the other way
SELF_TEST_BOUND = 5e-3
#: of the model, in self-tests
_WIDTH = 3072
#: types of GGUF blocks that have a kernel: those of the published files
BLOCK_KINDS = ("Q8_0", "Q4_K", "Q5_K", "Q6_K")

#: draws standard normal numbers of a shape
Draw = Callable[..., Tensor]
Args = tuple[Any, ...]


class Operator(NamedTuple):
    """One fused step.

    Attributes:
        schema: arguments and results, in torch's notation.
        reference: what it computes.
        samples: arguments of self-tests, without the format: the widths of the model, an odd
            number of tokens, strided views.
        limits: why the kernel does not take these arguments; empty if it does.
        formats: 8-bit dtypes of the result; these operators take (dtype, hadamard_block) last.
        writes: place of the argument that is written to; None where all results are returned.
        is_tokenwise: tokens do not depend on each other, so that plain torch may go by pieces.
        module: in `triton/`, that has the kernel.
    """

    schema: str
    reference: Callable[..., Any]
    samples: Callable[[Draw], list[Args]]
    limits: Callable[[Args], str]
    formats: tuple[torch.dtype | None, ...] = (None,)
    writes: int | None = None
    is_tokenwise: bool = True
    module: str = "norms"


# --- arguments ----------------------------------------------------------------------------------


def _no_limits(args: Args) -> str:
    return ""


def _token_limits(args: Args) -> str:
    if args[0].shape[-1] > MAX_WIDTH:
        return f"rows of {args[0].shape[-1]} channels are wider than {MAX_WIDTH}"
    if _format(args) is not None and args[-1] > MAX_HADAMARD_BLOCK:
        return f"a Hadamard block of {args[-1]} channels is wider than {MAX_HADAMARD_BLOCK}"
    return ""


def _head_limits(args: Args) -> str:
    if args[0].shape[-1] not in HEAD_DIMS:
        return f"head size {args[0].shape[-1]} is not one of {HEAD_DIMS}"
    if args[0].stride(-1) != 1:
        return f"the channels of a head are {args[0].stride(-1)} elements apart"
    return ""


def _clip_limits(args: Args, place: int = 0) -> str:
    channels = args[0].shape[1]
    if channels > MAX_CHANNELS:
        return f"{channels} channels are more than {MAX_CHANNELS}"
    # the others are copied where they are laid out otherwise
    is_dense = args[place][:1].is_contiguous(memory_format=torch.channels_last_3d)
    return "" if is_dense else "the clip is not laid out with adjacent channels"


def _tokens(draw: Draw, count: int) -> list[Tensor]:
    return [2 * draw(2, 4, _WIDTH)[:, 1:] + 1, *(draw(2, 3, _WIDTH) for _ in range(count - 1))]


def _vectors(draw: Draw, count: int) -> tuple[Tensor, ...]:
    return draw(2, 1, 3 * _WIDTH).chunk(3, dim=-1)[:count]


def _attention_sample(draw: Draw) -> Args:
    rope = torch.polar(torch.ones(3, 64), draw(3, 64).float())
    return draw(2, 5, 3, 24, 128), *(1 + 0.1 * draw(4, 128)), rope


def _rescale_samples(draw: Draw) -> list[Args]:
    """With all factors, added with one factor, and with none."""
    acc = (2**18 * draw(37, 1300).float()).int()
    act_scale, scale = (draw(n, 1).float().abs() / 1024 for n in acc.shape)
    bias, out = draw(1300).bfloat16(), draw(37, 2000).bfloat16()[:, 500:1800]
    return [
        (acc, act_scale, scale, bias, out, False),
        (acc, act_scale, scale[0], None, out, True),
        (acc, act_scale, None, None, out, False),
    ]


def _low_rank_samples(draw: Draw) -> list[Args]:
    """Two segments of unequal rank, from activations in 16 bits and in int8."""
    x, out = draw(1, 37, 400)[:, :, :232], draw(1, 37, 300)[:, :, 50:250]
    last = (draw(24, 232) / 16, draw(200, 16), [0, 80, 0, 8, 80, 200, 8, 24], out)
    values = (40 * x.float()).clamp(-127, 127).to(torch.int8)
    return [(x, None, *last), (values, draw(1, 37, 1).float().abs() / 40, *last)]


def _low_rank_limits(args: Args) -> str:
    x, _, down, up, segments, out = args
    if up.shape[1] > MAX_RANK or len(segments) > 4 * MAX_SEGMENTS:
        return f"rank {up.shape[1]} in {len(segments) // 4} segments is too much for it"
    if any(tensor.stride(-1) != 1 for tensor in (x, down, up, out)):
        return "the numbers of a row are not adjacent"
    if down.dtype not in (torch.bfloat16, torch.float16):
        return f"factors are {short(down.dtype)}"
    found = torch.cuda.get_device_capability(down.device) if down.is_cuda else MIN_CAPABILITY
    if down.is_cuda and found < DTYPE_CAPABILITY.get(down.dtype, (0, 0)):
        return f"{short(down.dtype)} is emulated on compute capability {dotted(found)}"
    return ""


def _clip(x: Tensor) -> Tensor:
    """A clip [B, C, T, H, W] whose channels are adjacent."""
    return x.contiguous(memory_format=torch.channels_last_3d)


def _padding_samples(draw: Draw) -> list[Args]:
    """The start of a clip, a later piece, and one that is not normalised."""
    x, out = _clip(draw(2, 8, 4, 5, 7))[:, :, 1:], _clip(draw(2, 8, 5, 7, 9))
    scale, shift = draw(2, 2, 8, 1, 1, 1).float()
    return [
        (x, scale, shift, out, 2),
        (x, scale, shift, out[:, :, 2:], 0),
        (x, None, None, out[:, :, :4], 1),
    ]


def _adding_samples(draw: Draw) -> list[Args]:
    return [(*(_clip(draw(2, 8, 4, 5, 7))[:, :, 1:] for _ in range(2)), draw(8))]


def _interleaving_samples(draw: Draw) -> list[Args]:
    """In time and space from the clip's first frame and from a later one, and in space alone."""
    both, space, bias = _clip(draw(2, 64, 3, 4, 6)), _clip(draw(2, 32, 3, 4, 6)), draw(8)
    out = _clip(draw(2, 8, 7, 6, 10))
    return [
        (both, bias, out[:, :, :5]),
        (both, bias, out[:, :, 1:]),
        (space, bias, out[:, :, 2:5]),
    ]


def _block_samples(draw: Draw) -> list[Args]:
    """Some columns of a weight of each type that the kernel unpacks."""
    return [
        (_block_bytes(draw, kind, 5, 1024)[1:, blocks.row_bytes(kind, 256) :], kind, out)
        for kind, out in zip(BLOCK_KINDS, draw(len(BLOCK_KINDS), 4, 800)[:, :, 16:784], strict=True)
    ]


def _block_bytes(draw: Draw, kind: str, rows: int, columns: int) -> Tensor:
    """[rows, bytes] of blocks whose factors are small numbers and whose codes are any."""
    block = blocks.BLOCK_TYPES[kind]
    numbers = draw(rows, columns // block.size, block.num_bytes).float()
    data = (numbers * 1000).int().to(torch.uint8)
    for start in block.halves:
        data[..., start : start + 2] = numbers[..., start : start + 1].half().view(torch.uint8)
    return data.view(rows, -1)


def _block_limits(args: Args) -> str:
    data, kind, out = args
    if kind not in BLOCK_KINDS:
        return f"the kernel unpacks {', '.join(BLOCK_KINDS)}, not {kind}"
    return "" if data.stride(1) == out.stride(1) == 1 else "the numbers of a row are not adjacent"


_FORMATS = (torch.float8_e4m3fn, torch.int8)
_NORM = "Tensor x, Tensor shift, Tensor scale"
_RESIDUAL = "Tensor x, Tensor y, Tensor gate"
_QUANTIZE = "ScalarType dtype, int hadamard_block"

OPERATORS = {
    "layer_norm_modulate": Operator(
        f"({_NORM}) -> Tensor",
        reference.layer_norm_modulate,
        lambda draw: [(*_tokens(draw, 1), *_vectors(draw, 2))],
        _token_limits,
    ),
    "layer_norm_modulate_quantize": Operator(
        f"({_NORM}, {_QUANTIZE}) -> (Tensor, Tensor)",
        reference.layer_norm_modulate_quantize,
        lambda draw: [(*_tokens(draw, 1), *_vectors(draw, 2))],
        _token_limits,
        _FORMATS,
    ),
    "residual_layer_norm_modulate": Operator(
        f"({_RESIDUAL}, Tensor shift, Tensor scale) -> (Tensor, Tensor)",
        reference.residual_layer_norm_modulate,
        lambda draw: [(*_tokens(draw, 2), *_vectors(draw, 3))],
        _token_limits,
    ),
    "residual_layer_norm_modulate_quantize": Operator(
        f"({_RESIDUAL}, Tensor shift, Tensor scale, {_QUANTIZE}) -> (Tensor, Tensor, Tensor)",
        reference.residual_layer_norm_modulate_quantize,
        lambda draw: [(*_tokens(draw, 2), *_vectors(draw, 3))],
        _token_limits,
        _FORMATS,
    ),
    "gated_residual": Operator(
        f"({_RESIDUAL}) -> Tensor",
        reference.gated_residual,
        lambda draw: [(*_tokens(draw, 2), *_vectors(draw, 1))],
        _token_limits,
    ),
    "gated_residual_sum": Operator(
        "(Tensor x, Tensor y, Tensor z, Tensor gate) -> Tensor",
        reference.gated_residual_sum,
        lambda draw: [(*_tokens(draw, 3), *_vectors(draw, 1))],
        _token_limits,
    ),
    "qk_norm_rope_": Operator(
        "(Tensor(a!) qk, Tensor q_weight, Tensor k_weight, Tensor text_q_weight, "
        "Tensor text_k_weight, Tensor rope) -> ()",
        reference.qk_norm_rope_,
        lambda draw: [_attention_sample(draw)],
        _head_limits,
        writes=0,
    ),
    "gelu_quantize": Operator(
        f"(Tensor x, {_QUANTIZE}) -> (Tensor, Tensor)",
        reference.gelu_quantize,
        lambda draw: [(draw(2, 4, 4 * _WIDTH)[:, 1:],)],
        _token_limits,
        _FORMATS,
    ),
    "quantize_rows": Operator(
        f"(Tensor x, {_QUANTIZE}) -> (Tensor, Tensor)",
        reference.quantize_rows,
        lambda draw: [(draw(2, 4, _WIDTH)[:, 1:],)],
        _token_limits,
        _FORMATS,
    ),
    "channel_moments": Operator(
        "(Tensor x) -> (Tensor, Tensor)",
        reference.channel_moments,
        lambda draw: [(_clip(3 * draw(2, 8, 3, 5, 7) + 1),)],
        _clip_limits,
        is_tokenwise=False,
        module="video",
    ),
    "norm_silu_pad_": Operator(
        "(Tensor x, Tensor? scale, Tensor? shift, Tensor(a!) out, int front) -> ()",
        reference.norm_silu_pad_,
        _padding_samples,
        partial(_clip_limits, place=3),
        writes=3,
        is_tokenwise=False,
        module="video",
    ),
    "residual_add_": Operator(
        "(Tensor(a!) x, Tensor branch, Tensor bias) -> ()",
        reference.residual_add_,
        _adding_samples,
        _clip_limits,
        writes=0,
        is_tokenwise=False,
        module="video",
    ),
    "residual_add_moments_": Operator(
        "(Tensor(a!) x, Tensor branch, Tensor bias) -> (Tensor, Tensor)",
        reference.residual_add_moments_,
        _adding_samples,
        _clip_limits,
        writes=0,
        is_tokenwise=False,
        module="video",
    ),
    "interleave_": Operator(
        "(Tensor x, Tensor bias, Tensor(a!) out) -> ()",
        reference.interleave_,
        _interleaving_samples,
        partial(_clip_limits, place=2),
        writes=2,
        is_tokenwise=False,
        module="video",
    ),
    "interleave_moments_": Operator(
        "(Tensor x, Tensor bias, Tensor(a!) out) -> (Tensor, Tensor)",
        reference.interleave_moments_,
        _interleaving_samples,
        partial(_clip_limits, place=2),
        writes=2,
        is_tokenwise=False,
        module="video",
    ),
}
#: beside the steps above: what follows a GEMM whose accumulator goes through memory, the side
#: branch of a LoRA, and weights in GGUF blocks; quant.py reports them where they are needed
EPILOGUES = {
    "rescale_": Operator(
        "(Tensor acc, Tensor act_scale, Tensor? scale, Tensor? bias, Tensor(a!) out, bool add) "
        "-> ()",
        reference.rescale_,
        _rescale_samples,
        lambda args: (
            "" if args[4].dtype == torch.bfloat16 else f"results are {short(args[4].dtype)}"
        ),
        writes=4,
        is_tokenwise=False,
        module="int8",
    ),
    "add_low_rank_": Operator(
        "(Tensor x, Tensor? act_scale, Tensor down, Tensor up, int[] segments, Tensor(a!) out) "
        "-> ()",
        reference.add_low_rank_,
        _low_rank_samples,
        _low_rank_limits,
        writes=5,
        module="low_rank",
    ),
    "dequantize_blocks_": Operator(
        "(Tensor data, str kind, Tensor(a!) out) -> ()",
        blocks.dequantize_blocks_,
        _block_samples,
        _block_limits,
        writes=2,
        is_tokenwise=False,
        module="blocks",
    ),
}


# --- registration -------------------------------------------------------------------------------


def _free_namespace() -> str:
    """The package's name, and a number where another copy in this process has that name."""
    base = re.sub(r"\W", "_", __package__ or "skyreels")
    names = (f"{base}_{number}" if number else base for number in itertools.count())
    first = next(iter(OPERATORS))
    return next(name for name in names if not hasattr(getattr(torch.ops, name), first))


NAMESPACE = _free_namespace()
# a fragment, as a process may register only one library of another kind for a name
_make_library: Any = torch.library.Library  # untyped in torch
_library = _make_library(NAMESPACE, "FRAGMENT")


def _define(name: str, row: Operator) -> Callable[..., Any]:
    """Register an operator: the reference everywhere and for shapes, on a GPU what is chosen."""
    _library.define(name + row.schema)
    plain = in_pieces(row.reference) if row.is_tokenwise else row.reference
    _library.impl(name, plain, "CompositeExplicitAutograd")
    _library.impl(name, dispatcher(name, plain), "CUDA")
    if row.schema.endswith("()"):
        _library.impl(name, lambda *_: None, "Meta")
    elif "moments" in name:
        _library.impl(name, partial(_moment_shapes, row.writes or 0), "Meta")
    operator = getattr(getattr(torch.ops, NAMESPACE), name).default

    def call(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            return row.reference(*args)
        return operator(*args)

    return call


def _moment_shapes(place: int, *args: Any) -> tuple[Tensor, Tensor]:
    """Of the moments of an argument."""
    like = args[place].new_empty(args[place].shape[:2], dtype=torch.float64)
    return like, torch.empty_like(like)


def dispatcher(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    """What an operator does on CUDA devices: its kernel where it is chosen and takes the arguments.

    Args:
        name: in OPERATORS or EPILOGUES.
        plain: runs otherwise.

    Returns:
        The function to register.
    """

    def run(*args: Any) -> Any:
        device = args[0].device
        kernel = choose(name, device, _format(args)).impl
        if kernel is not None:
            reason = unsuited(name, args, dispatch.describe(device))
            if not reason:
                return kernel(*args)
            dispatch.log_once(f"{name} runs in plain torch on {device}: {reason}.", source=logger)
        return plain(*args)

    return run


def in_pieces(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same over a few thousand tokens at a time, which is exact where `is_tokenwise` holds."""

    def run(*args: Any) -> Any:
        x = args[0]
        tokens = x.shape[1]
        if x.is_meta or x.ndim < 3 or tokens <= PIECE_TOKENS:
            return function(*args)
        wholes: list[Tensor] = []
        for start in range(0, tokens, PIECE_TOKENS):
            span = slice(start, start + PIECE_TOKENS)
            returned = function(*(_piece(arg, tokens, span) for arg in args))
            if returned is None:  # in place
                continue
            pieces = [returned] if isinstance(returned, Tensor) else list(returned)
            if not wholes:
                wholes = [each.new_empty(each.shape[0], tokens, *each.shape[2:]) for each in pieces]
            for whole, piece in zip(wholes, pieces, strict=True):
                whole[:, span] = piece
        return (wholes[0] if len(wholes) == 1 else tuple(wholes)) if wholes else None

    return run


def _piece(arg: Any, tokens: int, span: slice) -> Any:
    """The tokens of an argument that has some; a rope table has them in its first dimension."""
    if not isinstance(arg, Tensor):
        return arg
    if arg.is_complex():
        return arg[span]
    return arg[:, span] if arg.ndim >= 3 and arg.shape[1] == tokens else arg


def _format(args: Args) -> torch.dtype | None:
    return next((a for a in args if isinstance(a, torch.dtype)), None)


# --- choice -------------------------------------------------------------------------------------


def choose(name: str, device: torch.device, act_format: torch.dtype | None = None) -> Decision:
    """The kernel of an operator on a device, or None for the reference.

    Args:
        name: in OPERATORS or EPILOGUES.
        device: where it is to run.
        act_format: the 8-bit dtype of the result, for operators that have one.

    Returns:
        The decision.
    """
    key = ("operator", name, device, act_format, dispatch.backend())
    return dispatch.remembered(key, lambda: _decide(name, device, act_format))


def _decide(name: str, device: torch.device, act_format: torch.dtype | None) -> Decision:
    info, row = dispatch.describe(device), _row(name)
    dtype = torch.bfloat16
    if info.capability is not None and info.capability < DTYPE_CAPABILITY[dtype]:
        dtype = torch.float16
    problem, kernel = _unfit(info, act_format), f"Triton {info.triton}"
    candidate = Candidate(
        kernel,
        lambda: getattr(load_kernels(row.module), name),
        lambda impl: self_test(name, impl, device, dtype, act_format),
        problem,
    )
    decision = dispatch.decide([candidate], "plain torch")
    subject = name if act_format is None else f"{name} ({short(act_format)})"
    subject = (
        f"Fused kernels on {device} ({info.name or info.type})"
        if problem
        else f"{subject} on {device}"
    )
    dispatch.log_decision(subject, info, decision, kernel, logger)
    return decision


def _row(name: str) -> Operator:
    return OPERATORS[name] if name in OPERATORS else EPILOGUES[name]


def load_kernels(module: str) -> Any:
    """A module of Triton kernels; imports Triton."""
    return importlib.import_module(f".triton.{module}", __package__)


def _unfit(info: DeviceInfo, act_format: torch.dtype | None) -> str:
    if problem := dispatch.triton_problem(info):
        return problem
    assert info.capability is not None
    if info.capability < MIN_CAPABILITY:
        return (
            f"compute capability {dotted(info.capability)} is below {dotted(MIN_CAPABILITY)}, "
            "the least that Triton supports"
        )
    needed = DTYPE_CAPABILITY.get(act_format, (0, 0)) if act_format is not None else (0, 0)
    if info.capability < needed:
        return (
            f"{short(act_format)} needs compute capability {dotted(needed)}, this device has "
            f"{dotted(info.capability)}"
        )
    return ""


def unsuited(name: str, args: Args, info: DeviceInfo) -> str:
    """Why a kernel that works on the device does not take these arguments; empty if it does."""
    row = _row(name)
    if args[0].numel() == 0:
        return "the input is empty"
    if name in EPILOGUES:
        return row.limits(args)
    for arg in args:
        if not isinstance(arg, Tensor) or arg.is_complex():
            continue
        if arg.dtype not in KERNEL_DTYPES:
            return f"the kernels take float16, bfloat16 and float32, not {short(arg.dtype)}"
        least = DTYPE_CAPABILITY.get(arg.dtype, (0, 0))
        if info.capability is not None and info.capability < least:
            return f"{short(arg.dtype)} is emulated on compute capability {dotted(info.capability)}"
    return row.limits(args)


def samples(name: str, dtype: torch.dtype, act_format: torch.dtype | None = None) -> list[Args]:
    """Arguments of an operator's self-tests, from a generator of their own."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    block = MAX_HADAMARD_BLOCK if act_format == torch.int8 else 0
    rounding = () if act_format is None else (act_format, block)
    return [(*args, *rounding) for args in _row(name).samples(draw)]


def self_test(
    name: str,
    kernel: Callable[..., Any],
    device: torch.device,
    dtype: torch.dtype,
    act_format: torch.dtype | None = None,
) -> Finding:
    """Compare a kernel with its reference; results in 8 bits after multiplication with scales."""
    row = _row(name)
    listed = samples(name, dtype, act_format)
    inputs = ((f"input {i}" if len(listed) > 1 else "", args) for i, args in enumerate(listed))
    run, right = (partial(_outputs, row, each, device) for each in (kernel, row.reference))
    return dispatch.probe(run, right, inputs, SELF_TEST_BOUND)


def _outputs(
    row: Operator, function: Callable[..., Any], device: torch.device, *args: Any
) -> list[Tensor]:
    """Results of a call on copies of the arguments, which keep their strides."""
    args = tuple(_copy(a, device) if isinstance(a, Tensor) else a for a in args)
    returned = function(*args)
    outputs = [] if row.writes is None else [args[row.writes]]
    if returned is not None:
        outputs += [returned] if isinstance(returned, Tensor) else list(returned)
    if row.formats != (None,):
        scale = outputs.pop()
        outputs[-1] = outputs[-1].float() * scale
    return outputs


def _copy(x: Tensor, device: torch.device) -> Tensor:
    """The same numbers and strides; what lies between rows is 0."""
    # torch's GEMM of bfloat16 on CPUs with AMX reads on beyond a row and multiplies that by 0
    reach = 1 + sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True))
    storage = torch.zeros(reach, dtype=x.dtype, device=device)
    return storage.as_strided(x.shape, x.stride()).copy_(x)


def decisions(device: torch.device) -> dict[str, dict[str, Decision]]:
    """Decide on every operator and 8-bit format: on a GPU, seconds at first use.

    Returns:
        Operator -> 8-bit dtype -> decision.
    """
    return {
        name: {short(to): choose(name, device, to) for to in row.formats}
        for name, row in OPERATORS.items()
    }


CALLS = {name: _define(name, row) for name, row in (OPERATORS | EPILOGUES).items()}


def _int8_linear(*args: Any) -> None:
    load_kernels("int8").int8_linear_(*args)


_library.define(
    "int8_linear_(Tensor qdata, Tensor act_scale, Tensor weight, Tensor? scale, Tensor? bias, "
    "Tensor(a!) out, bool add) -> ()"
)
# not for CUDA alone: Triton's interpreter runs it on a CPU
_library.impl("int8_linear_", _int8_linear, "CompositeExplicitAutograd")
_library.impl("int8_linear_", lambda *_: None, "Meta")
int8_linear_ = getattr(torch.ops, NAMESPACE).int8_linear_.default
