"""Errors that the command line reports in words, without a traceback."""

from __future__ import annotations


class UsageError(ValueError):
    """A wrong path, value or file; the message is one paragraph that names it and says what to do.

    The command line prints it without a traceback and exits with code 2.

    Args:
        message: what was expected and what came.
        field: the option that is wrong, if it is one; the text begins with its name.
    """

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(f"{field}: {message}" if field else message)
        self.message, self.field = message, field


class TrainingError(RuntimeError):
    """The run cannot go on; the message says why and where its last good checkpoint is."""


class NetworkError(TypeError, ValueError):
    """A network does not take or return what an objective or a sampler needs."""
