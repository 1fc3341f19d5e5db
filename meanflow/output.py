"""Broken pipes: a command whose output is no longer read, as in `meanflow info | head -1`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

CODE = 141  # a shell's, of a program that SIGPIPE ended


@contextmanager
def handling_broken_pipes() -> Iterator[None]:
    """Context of a command: a broken stderr loses its output, a broken stdout ends the command with exit code 141.

    Raises:
        SystemExit: stdout is closed.
    """
    with redirect_stderr(_Guarded(sys.stderr, lambda: None)), redirect_stdout(_Guarded(sys.stdout, _leave)):
        try:
            yield
        finally:
            sys.stdout.flush()  # what the parsers print before they leave as well


def _leave() -> None:
    raise SystemExit(CODE)


class _Guarded:
    """The text stream `stream`. Once it is closed at the other end, output is dropped and `closed` is called."""

    def __init__(self, stream: Any, closed: Callable[[], None]) -> None:
        self._stream, self._closed = stream, closed

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except BrokenPipeError:
            self._drop()
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._drop()

    def _drop(self) -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())  # Python flushes what is left once more at its end
        os.close(null)
        self._closed()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
