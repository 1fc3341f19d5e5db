"""Errors that the command line reports in words, without a traceback."""


class UsageError(ValueError):
    """A wrong path, value or file; the message is one paragraph that names it and says what to do.

    The command line prints it without a traceback and exits with code 2.
    """


class TrainingError(RuntimeError):
    """The run cannot go on; the message says why and where its last good checkpoint is."""
