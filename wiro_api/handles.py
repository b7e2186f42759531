"""The identifiers of a model and of a task."""

import re
from dataclasses import dataclass, field

from .errors import ConfigError


@dataclass(frozen=True)
class RunHandle:
    """Both identifiers of a task. Store it before anything else is done.

    Attributes:
        taskid: digits, or "" where only the token is known.
        token: of the task, or "".
        started_at: Unix seconds of the Run, or None for a handle made later.
    """

    taskid: str
    token: str = field(repr=False)
    started_at: float | None = None

    @classmethod
    def parse(cls, text: str) -> "RunHandle":
        """A handle of what a person types: a task id, or "token:" and a task token."""
        text = text.strip()
        if text.startswith("token:"):
            return cls("", text.removeprefix("token:"))
        if not (text.isascii() and text.isdigit()):  # not quoted: it may be a token
            raise ConfigError("This is not a task: give the id (digits), or token:<task token>.")
        return cls(text, "")


@dataclass(frozen=True)
class Model:
    """Owner and project of a model, as its page's address says."""

    owner: str
    project: str

    @classmethod
    def parse(cls, slug: str) -> "Model":
        """A model of "owner/project"; blanks and capitals are kept."""
        owner, _, project = slug.strip().strip("/").partition("/")
        if not owner.strip() or not project.strip() or "/" in project:
            raise ConfigError(f"{slug!r} is not a model: give owner/project, as wiro/SkyReels-V1.")
        return cls(owner.strip(), project.strip())

    @property
    def clean(self) -> "Model":
        """Lower case with hyphens, the service's other spelling."""
        return Model(
            *(
                re.sub(r"[^a-z0-9]+", "-", part.lower()).strip("-")
                for part in (self.owner, self.project)
            )
        )

    def __str__(self) -> str:
        return f"{self.owner}/{self.project}"
