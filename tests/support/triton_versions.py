"""What Triton's interpreter needs where one of its versions does not fit the numpy beside it."""


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
