"""Peak bytes and FLOPs of a computation on shape-only (meta) tensors."""

import functools
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack


class PeakBytes(TorchDispatchMode):
    """Counts the storages that operators allocate; `.peak` is the most bytes alive at once.

    What exists before the block (weights, inputs) is not counted, nor is a kernel's own workspace.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = run(func, args, kwargs or {})
        before = {
            leaf.untyped_storage()._cdata for leaf in _tensors((*args, *(kwargs or {}).values()))
        }
        for leaf in _tensors((result,)):
            storage = leaf.untyped_storage()
            if storage._cdata not in self._known and storage._cdata not in before:
                self._count(storage)
        return result

    def _count(self, storage):
        key, size = storage._cdata, storage.nbytes()
        self._known[key] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key, size):
        if self._known.pop(key, None) is not None:
            self.live -= size


class Convolutions(TorchDispatchMode):
    """Counts the FLOPs of convolutions, `.flops`, as torch's FlopCounterMode does.

    That one asks for the shapes of every operator anew.
    """

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = run(func, args, kwargs or {})
        # in inference mode it is not taken apart
        if func._schema.name in ("aten::convolution", "aten::conv3d", "aten::conv2d"):
            weight = args[1]
            self.flops += 2 * result.numel() * weight[0].numel()
        return result


#: operator and the shapes of its arguments -> what it returned for them, see `run`
_returned: dict[tuple, Any] = {}


def run(func: Any, args: tuple, kwargs: dict) -> Any:
    """What an operator returns, for shapes that it has seen without asking it.

    On shape-only tensors the operators are Python code of a millisecond; a clip of 97 frames takes
    thousands of the same. Views are always asked, and so is every operator that another counter
    around this one would see, which then may know it.
    """
    kind = _kind(func)
    tensors = list(_tensors((*args, *kwargs.values())))
    is_watched = bool(_get_current_dispatch_mode_stack())
    if is_watched or kind == "view" or not tensors or not all(each.is_meta for each in tensors):
        return func(*args, **kwargs)
    key = _key_of(func, args, kwargs)
    if key not in _returned:
        result = func(*args, **kwargs)
        if kind == "new" and isinstance(result, Tensor):
            _returned[key] = _key((result,))[0]
        elif kind == "new" and type(result) is tuple and len(list(_tensors(result))) == len(result):
            _returned[key] = [_key((each,))[0] for each in result]
        elif kind == "written" and key == _key_of(func, args, kwargs):  # its shape is as before
            places = [place for place, each in enumerate(tensors) if each is result]
            if places:
                _returned[key] = places[0]
        elif kind == "nothing" and result is None:
            _returned[key] = None
        return result
    known = _returned[key]
    if isinstance(known, int):
        return tensors[known]
    if isinstance(known, list):
        return tuple(map(_new, known))
    return None if known is None else _new(known)


def _key_of(func: Any, args: tuple, kwargs: dict) -> tuple:
    return func, _key(args), _key(tuple(sorted(kwargs.items())))


def _new(known: tuple) -> Tensor:
    shape, stride, dtype = known
    return torch.empty_strided(shape, stride, dtype=dtype, device="meta")


@functools.cache
def _kind(func: Any) -> str:
    """Whether an operator returns "new" tensors, "nothing", what it has "written", or a "view"."""
    schema = func._schema
    if schema.name == "aten::_unsafe_view":  # its schema is silent about it
        return "view"
    if not schema.returns:
        return "nothing"
    infos = [each.alias_info for each in schema.returns]
    if len(infos) == 1 and infos[0] is not None and infos[0].is_write:
        return "written"
    aliases = any(info is not None for info in infos)
    return "view" if aliases or schema.is_mutable else "new"


def _key(values: tuple) -> tuple:
    found: list[Any] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append((value.shape, value.stride(), value.dtype))
        elif isinstance(value, list | tuple):
            found.append(_key(tuple(value)))
        else:
            found.append((type(value), value))
    return tuple(found)


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
