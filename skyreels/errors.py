"""The exceptions of the engine.

    SkyReelsError
    ├── CheckpointError     a weight file is unreadable, damaged, or not what this slot needs
    ├── ShapeError          a size, frame count or tensor shape breaks a rule of the model
    ├── OptionError         a setting has an illegal value
    ├── TextError           prompt embeddings or a text encoder that do not fit the model
    ├── DependencyError     an optional package is missing or unusable
    └── OutOfRoomError      the device has too little memory for the request

Each message is one or two sentences that name the value, the rule and the fix. A host's own
interrupt exception is none of these and passes through unchanged.
"""


class SkyReelsError(Exception):
    """Base of all errors a user can act on."""


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


class DependencyError(SkyReelsError):
    """An optional package is missing or unusable."""


class OutOfRoomError(SkyReelsError):
    """The device has too little memory for the request."""
