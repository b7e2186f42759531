"""What the programs that interpret or compile one kernel share.

Among it is what Triton's interpreter needs where one of its versions does not fit the numpy beside
it.
"""

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
