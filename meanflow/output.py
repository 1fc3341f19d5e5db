"""What becomes of a command whose output nobody reads any more, as in `meanflow info | head -1`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

CODE = 141  # what a shell says of a program that SIGPIPE ended


@contextmanager
def survives_its_readers() -> Iterator[None]:
    """Context of a command. Once stderr has no reader, progress is dropped and the work goes on; a result that stdout's
    reader does not want any more ends the command without a word, with exit code 141.

    Raises:
        SystemExit: the reader of stdout has left.
    """
    with redirect_stderr(_Guarded(sys.stderr, lambda: None)), redirect_stdout(_Guarded(sys.stdout, _leave)):
        try:
            yield
        finally:
            sys.stdout.flush()  # what the parsers print before they leave as well


def _leave() -> None:
    raise SystemExit(CODE)


class _Guarded:
    """The text stream `stream`. When its reader has left, it leads nowhere from then on, and `left` is called."""

    def __init__(self, stream: Any, left: Callable[[], None]) -> None:
        self._stream, self._left = stream, left

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except BrokenPipeError:
            self._to_nowhere()
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._to_nowhere()

    def _to_nowhere(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())  # Python flushes what is left once more at its end
        os.close(nowhere)
        self._left()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
