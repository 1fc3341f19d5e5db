"""Ctrl-C and SIGTERM as a flag that the training loop reads between two steps."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any


class StopSignals:
    """Context in which the first SIGINT or SIGTERM is noted in `received`; a second one interrupts at once.

    Args:
        first: message of the first one, from its name; "" for none.
        second: message of the KeyboardInterrupt that the second one raises, from its name.
    """

    def __init__(self, first: Callable[[str], str], second: Callable[[str], str]) -> None:
        self.first, self.second = first, second
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers there only
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.received is not None:
            raise KeyboardInterrupt(self.second(name))
        self.received = number
        words = self.first(name)
        if words:
            # not print: the signal may have come in the middle of one, which its buffer does not allow
            bar = "\n" if sys.stderr is not None and sys.stderr.isatty() else ""
            with suppress(OSError):  # nobody reads stderr
                os.write(2, f"{bar}{words}\n".encode())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
