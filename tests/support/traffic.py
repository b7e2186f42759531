"""Bytes and kernels of a computation on shape-only (meta) tensors, operator by operator."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from support.peak import run

PRODUCTS = {
    "mm", "_scaled_mm", "_int_mm", "int8_linear_", "addmm", "_addmm_activation", "bmm", "baddbmm",
    "linear", "convolution", "add_low_rank_",
}  # fmt: skip
#: what allocates or looks, and runs no kernel
NOTHING = {"empty", "empty_like", "new_empty", "empty_strided", "detach", "alias", "lift_fresh"}


class Traffic(TorchDispatchMode):
    """Counts what operators read and write.

    `.bytes` of everything that is neither a matrix product nor attention: each tensor argument is
    read once, as far as the view goes, and each result written once. `.kernels` counts these and
    the products and attentions, which are `.products`. Views cost nothing.

    attention: what the code under test calls for attention, by name of the operator.
    write_only: operators that do not read the tensor they write to.
    """

    def __init__(self, attention: str = "attention", write_only: frozenset[str] = frozenset()):
        super().__init__()
        self.attention, self.write_only = attention, write_only
        self.bytes = self.kernels = self.products = 0
        self.by_name: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = run(func, args, kwargs or {})
        name = func._schema.name.split("::")[-1]
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        given = {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)}
        given |= kwargs or {}
        changes = [
            given[argument.name]
            for argument in func._schema.arguments
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        storages = {tensor.untyped_storage()._cdata for tensor in inputs}
        is_view = not changes and all(o.untyped_storage()._cdata in storages for o in outputs)
        if name in NOTHING or is_view or not inputs:
            return result
        self.kernels += 1
        if name in PRODUCTS or name == self.attention:
            self.products += 1
            return result
        returned = {tensor.untyped_storage()._cdata for tensor in outputs}
        written = [c for c in changes if c.untyped_storage()._cdata not in returned]
        moved = sum(map(_bytes, [*inputs, *outputs, *written]))
        if name in self.write_only:
            moved -= sum(map(_bytes, changes))
        self.bytes += moved
        self.by_name[name] = self.by_name.get(name, 0) + moved
        return result


def _bytes(tensor):
    """Of the elements that exist: an expanded dimension is read once."""
    count = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= length if stride or length == 1 else 1
    return count * tensor.itemsize
