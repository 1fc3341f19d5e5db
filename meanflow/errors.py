"""The one error that means "the user can mend this"."""


class UsageError(ValueError):
    """A wrong path, value or file; the message is one paragraph that names it and says what to do.

    The command line prints it without a traceback and exits with code 2.
    """
