"""The exceptions of the engine.

    SkyReelsError
    ├── CheckpointError     a weight file is unreadable, damaged, or not what this slot needs
    ├── ShapeError          a size, frame count or tensor shape breaks a rule of the model
    ├── OptionError         a setting has an illegal value
    ├── TextError           prompt embeddings or a text encoder that do not fit the model
    ├── BadRenderError      a clip that would be a still, jump or change colours, and was stopped
    ├── DependencyError     an optional package is missing or unusable
    └── OutOfRoomError      the device has too little memory for the request

Each message is one or two sentences that name the value, the rule and the fix. A host's own
interrupt exception is none of these and passes through unchanged.

A message is made safe as a whole: no more than a screenful, and no codes that a terminal obeys.
What may be a megabyte long (a name or a text inside a file) goes through `shown` first, so that the
rest of the sentence remains; and so does what comes from a file into a log.

Imported before anything that needs another package, to say in a sentence which one is missing.
"""

import importlib.util
import json
import sys

#: what is imported everywhere
REQUIRED = ("torch", "numpy", "einops", "safetensors")
#: how libraries say that they could not allocate; "can't allocate" is torch's own on a CPU
MEMORY_WORDS = ("out of memory", "outofmemory", "alloc_failed", "can't allocate memory")
#: characters of a message, of which a text from a file is a part
MAX_MESSAGE = 1500
#: characters of a text from a file
MAX_SHOWN = 100


def shown(text: object, limit: int = MAX_SHOWN) -> str:
    """A text from a file as a message may show it.

    Args:
        text: anything; what str makes of it.
        limit: of characters; the middle of a longer text is left out.

    Returns:
        On one line, with control, formatting and unpaired characters escaped.
    """
    escaped = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode()
        for c in _shortened(str(text), limit)
    )
    return _shortened(escaped, limit)


def _shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit * 2 // 3]}...{text[-limit // 3 :]}"


class SkyReelsError(Exception):
    """Base of all errors a user can act on; its message fits on a screen, see `shown`.

    Tracebacks and ComfyUI's error report name the class without the path of this module, which says
    nothing to who reads them: hence `__module__`, and `__reduce__` so that other processes find it.
    """

    __module__ = "builtins"

    def __init_subclass__(cls) -> None:
        cls.__module__ = "builtins"

    def __init__(self, message: str = "") -> None:
        super().__init__(shown(message, MAX_MESSAGE))

    def __reduce__(self) -> tuple[object, ...]:
        return _again, (type(self).__name__, self.args, self.__dict__)


def _again(name: str, args: tuple[str, ...], state: dict[str, object]) -> SkyReelsError:
    """An error as it was before it was pickled."""
    kind = globals()[name]
    error: SkyReelsError = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


class CheckpointError(SkyReelsError):
    """A weight file is unreadable, damaged, or not what this slot needs.

    Attributes:
        family: of a sound file in the wrong slot, what it is (see `CheckpointInfo`); else "".
    """

    def __init__(self, message: str, family: str = "") -> None:
        super().__init__(message)
        self.family = family


class ShapeError(SkyReelsError):
    """A size, frame count or tensor shape breaks a rule of the model."""


class OptionError(SkyReelsError):
    """A setting has an illegal value."""


class TextError(SkyReelsError):
    """Prompt embeddings or a text encoder that do not fit the model."""


class BadRenderError(SkyReelsError):
    """A run was stopped because its clip would be a still, jump or change colours.

    Attributes:
        seen: what was seen, at which step and with which seed, as a sentence.
    """

    def __init__(self, message: str, seen: str = "") -> None:
        super().__init__(message)
        self.seen = seen


class DependencyError(SkyReelsError):
    """An optional package is missing or unusable."""


class OutOfRoomError(SkyReelsError):
    """The device has too little memory for the request."""


def check_installed() -> None:
    """Refuse to go on without what is imported everywhere; `python -m skyreels` says so and ends.

    Raises:
        ImportError: names what is missing and the command that installs it.
    """
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if not missing:
        return
    are = "is" if len(missing) == 1 else "are"
    message = (
        f"{' and '.join(missing)} {are} not installed: {sys.executable} -m pip install "
        f"{' '.join(missing)}"
    )
    if sys.argv[:1] == ["-m"] and "skyreels" in sys.orig_argv:  # as Python imports the package
        print(f"error: {message}", file=sys.stderr)  # noqa: T201
        if "--json" in sys.argv:
            print(json.dumps({"error": message}))  # noqa: T201
        sys.exit(1)
    raise ImportError(message)
