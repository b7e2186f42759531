"""What happens when memory runs out: free what is held, go one rung down, do the same work again.

Predictions can be wrong, memory can be fragmented, and other programs can take some in the middle
of a run. A rung is a way to do the work that needs less memory than the one above.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ..errors import MEMORY_WORDS, OutOfRoomError

if TYPE_CHECKING:
    from . import Runtime

T = TypeVar("T")
RungT = TypeVar("RungT")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be allocated."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error).lower() for words in MEMORY_WORDS
    )


def release(device: torch.device) -> None:
    """Give what was freed back to the device, in pieces as large as can be."""
    gc.collect()  # frames of an error may be in a cycle
    if device.type == "cuda":
        torch.cuda.empty_cache()


def retried(function: Callable[[], T], runtime: "Runtime", num_bytes: int, what: str) -> T:
    """Call a function that has no rung of its own, and once more if memory ran out.

    Args:
        function: without effects until it returns.
        runtime: whose device ran out; other models are asked to leave it.
        num_bytes: that the function needs there.
        what: it does, as "Encoding the picture".

    Returns:
        Its result.

    Raises:
        OutOfRoomError: memory ran out again.
    """
    for _ in range(2):
        try:
            return function()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        release(runtime.device)  # outside of the handler, see below
        runtime.make_room(num_bytes)
    raise OutOfRoomError(
        f"{what} needs about {num_bytes / 1e9:.1f} GB beside what is there, and "
        f"{max(0, runtime.free_bytes()) / 1e9:.1f} GB of {runtime.device} are free: close other "
        "programs that use it, or use a smaller size or fewer frames."
    )


@contextmanager
def descending(
    rungs: Sequence[RungT],
    enter: Callable[[RungT], AbstractContextManager[Callable[..., Any]]],
    device: torch.device,
    on_fall: Callable[[RungT, RungT], None],
) -> Iterator[Callable[..., Any]]:
    """A function that runs on the first rung, and further down whenever memory runs out.

    Args:
        rungs: from the most memory to the least.
        enter: prepares a rung and gives the function that works on it; an OutOfRoomError while it
            does counts as memory that ran out.
        device: whose memory runs out.
        on_fall: called with the rung that failed and the next, when what it held is free.

    Yields:
        The function: a call that runs out of memory is made again, with the same arguments, one
        rung down. On the last rung the error is raised.
    """
    with ExitStack() as stack:
        current: Callable[..., Any] | None = None
        place = 0

        def fall() -> None:
            nonlocal current, place
            current = None
            stack.close()
            release(device)
            place += 1
            on_fall(rungs[place - 1], rungs[place])

        def run(*args: Any) -> Any:
            nonlocal current
            while True:
                try:
                    if current is None:
                        current = stack.enter_context(enter(rungs[place]))
                    return current(*args)
                except Exception as error:
                    does_not_fit = current is None and isinstance(error, OutOfRoomError)
                    if place == len(rungs) - 1 or not (does_not_fit or is_out_of_memory(error)):
                        raise
                # outside of the handler, as the error's frames hold the tensors of the failed call
                fall()

        yield run
