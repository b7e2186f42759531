"""`caplog` without pytest's logging plugin, which goes through all loggers six times a test.

There are thousands with torch and transformers: 20 s of the suite. What tests use of pytest's own
fixture is here, under the same names; a failed test shows no log section, but standard error.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

FORMAT = "%(levelname)-8s %(name)s:%(filename)s:%(lineno)d %(message)s"


class Log(logging.Handler):
    """What has been logged in a test, of all loggers that let it through."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self._levels: dict[logging.Logger, int] = {}
        self._lines: list[str] = []
        self.setFormatter(logging.Formatter(FORMAT))

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(self.format(record))  # which gives the record its `message`
        self.records.append(record)

    @property
    def messages(self) -> list[str]:
        """Of each record."""
        return [record.getMessage() for record in self.records]

    @property
    def text(self) -> str:
        """All of it, a line a record, tracebacks included."""
        return "".join(f"{line}\n" for line in self._lines)

    def clear(self) -> None:
        """Forget what was logged so far."""
        self.records.clear()
        self._lines.clear()

    def set_level(self, level: int | str, logger: str | None = None) -> None:
        """Give a logger, or the root, a level to the end of the test."""
        target = logging.getLogger(logger)
        self._levels.setdefault(target, target.level)
        target.setLevel(level)

    @contextmanager
    def at_level(self, level: int | str, logger: str | None = None) -> Iterator[None]:
        """The same inside a block."""
        target = logging.getLogger(logger)
        before = target.level
        target.setLevel(level)
        try:
            yield
        finally:
            target.setLevel(before)

    def restore(self) -> None:
        """Give every logger its level back."""
        for logger, level in self._levels.items():
            logger.setLevel(level)
