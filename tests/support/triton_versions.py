"""What the programs that interpret or compile one kernel share.

Among it is what Triton's interpreter needs where one of its versions does not fit the numpy beside
it, and what makes it three times as fast.
"""

import dataclasses
import inspect
import json
from collections.abc import Callable

import torch


def mend_interpreter() -> None:
    """Let loops over a number of tiles run in the interpreter of Triton 3.6 with numpy 2.4.

    That numpy turns no array of one element into an index any more, which Triton relied on until
    3.7; compiled kernels know nothing of it.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, *args):
        patch(tensor, *args)
        set_attr = args[0].set_attr if args else lambda *each: setattr(*each)
        set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
    _look_up_once(interpreter)


def _look_up_once(interpreter) -> None:
    """Keep what the interpreter looks up anew at each operation, or at each call of a function.

    These are the numpy type of a Triton type, and which members of a module are operations.
    """
    import triton.language as tl

    numpy_type, numpy_types = interpreter._get_np_dtype, {}

    def kept_type(type):
        name = type.scalar.name
        if name not in numpy_types:
            numpy_types[name] = numpy_type(type)
        return numpy_types[name]

    operations = {  # before any of them is replaced
        package: [name for name, each in inspect.getmembers(package) if tl.core.is_builtin(each)]
        for package in (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base)
    }

    def replace_operations(package, builder, *scope):
        for name in operations[package]:
            if tl.core.is_builtin(member := getattr(package, name)):
                interpreter._patch_attr(package, name, member, builder, *scope)

    interpreter._get_np_dtype = kept_type
    interpreter._patch_builtin = replace_operations


def check_overflow(is_checked: bool) -> None:
    """Choose if the interpreter checks every sum and product of integers, for half of its time."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=is_checked)


def run_mode(
    interpret: Callable[[], object],
    compile_for: Callable[[list[int]], object],
    mode: str,
    *capabilities: str,
) -> None:
    """What the programs of one kernel do: one of their two functions, its result as a JSON line."""
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    found = interpret() if mode == "interpret" else compile_for(list(map(int, capabilities)))
    print(json.dumps(found))
