"""What makes the host wait for a device, counted without one: the meta device stands for it."""

import warnings
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from support.peak import run

#: operators whose result, or its size, the host needs before it goes on, as for indexing by a mask;
#: in inference mode some are seen before they are taken apart
READS = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique",
}  # fmt: skip
COPIES = {"_to_copy", "to", "copy_"}


class Waits(TorchDispatchMode):
    """Notes every read of a device's values on the host, and every copy each way.

    `.reads` are names of operators, `.to_host` and `.to_device` the tensors copied, as (operator,
    shape). A number made into a tensor on the device (`torch.tensor(1.0, device=...)`) is a copy
    that dispatch does not see: in inference mode its `detach_` tells of it. What happens on the CPU
    alone is nobody's wait. Noted before it is run: on shape-only tensors a read raises.
    """

    def __init__(self, device="meta"):
        super().__init__()
        self.device = device
        self.reads: list[str] = []
        self.to_host: list[tuple[str, tuple[int, ...]]] = []
        self.to_device: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[-1]
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        on_device = [tensor for tensor in tensors if self._holds(tensor.device)]
        masks = name.startswith("index") and any(t.dtype == torch.bool for t in on_device)
        if on_device and (name in READS or masks):
            self.reads.append(name)
        elif name in COPIES:
            source, target = tensors[-1 if name == "copy_" else 0], tensors[0].device
            if name == "to" and len(tensors) > 1:
                target = tensors[1].device
            elif name != "copy_":
                target = next((x for x in leaves if isinstance(x, torch.device)), target)
            if self._holds(source.device) != self._holds(target):
                copies = self.to_device if self._holds(target) else self.to_host
                copies.append((name, tuple(source.shape)))
        elif name == "detach_" and on_device:
            self.to_device.append((name, tuple(tensors[0].shape)))
        if name in READS or name in COPIES:
            return func(*args, **(kwargs or {}))
        return run(func, args, kwargs or {})

    def _holds(self, device):
        return device.type == self.device


@contextmanager
def no_wait_for_the_gpu():
    """On a GPU, make every operation inside the block an error that lets the host wait for it."""
    _tell_waits("error")
    try:
        yield
    finally:
        _tell_waits("default")


def _tell_waits(mode):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this is a prototype
        torch.cuda.set_sync_debug_mode(mode)
