"""The report of the operators that ran, and errors that show the line of the user's module."""

from __future__ import annotations

import contextlib
import linecache
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from traceback import walk_tb
from types import FrameType

import torch
from torch import nn


@dataclass
class Line:
    """One ATen operator: number of calls, and seconds spent in its tangents."""

    calls: int = 0
    seconds: float = 0.0


@dataclass
class Report:
    """What `dualize(model, report=True)` saw since it was made or cleared.

    rules: operators with a tangent rule in this package, by name.
    jvp: operators whose tangent `torch.func.jvp` computed.
    zero_filled: operators whose tangent was computed for all rows, with zeros for those that have none.
    seconds: of all dual passes, with hooks and the user's Python. On CUDA the times are those of launches, unless
        CUDA_LAUNCH_BLOCKING=1.
    """

    rules: dict[str, Line] = field(default_factory=dict)
    jvp: dict[str, Line] = field(default_factory=dict)
    zero_filled: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def add(self, name: str, *, by_jvp: bool, seconds: float) -> None:
        line = (self.jvp if by_jvp else self.rules).setdefault(name, Line())
        line.calls += 1
        line.seconds += seconds

    def clear(self) -> None:
        """Remove all entries and set the time to zero."""
        for table in (self.rules, self.jvp, self.zero_filled):
            table.clear()
        self.seconds = 0.0

    @property
    def jvp_share(self) -> float:
        """Share of `seconds` that the operators of `jvp` took, in [0, 1]."""
        return sum(line.seconds for line in self.jvp.values()) / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        total = self.seconds or 1.0
        rows = [f"{'tangent':<36}{'calls':>7}{'share of time':>15}"]
        for title, lines in (("rule", self.rules), ("torch.func.jvp", self.jvp)):
            for name, line in sorted(lines.items(), key=lambda item: -item[1].seconds):
                rows.append(f"{name + ', ' + title:<36}{line.calls:>7}{line.seconds / total:>14.1%}")
        for name, calls in self.zero_filled.items():
            rows.append(f"{name + ', zero rows filled in':<36}{calls:>7}")
        return "\n".join(rows)


# ------------------------------------------------------------------------------------------------------------- refusals

_INSIDE = (*(f"{Path(file).parent}{os.sep}" for file in (torch.__file__, Path(__file__).parent)), contextlib.__file__)


def user_line(frames: Iterable[FrameType]) -> str:
    """ " (in BatchNorm2d, net.py:12: `x = self.norm(x)`)": the first line outside PyTorch and this package."""
    module = ""
    for frame in frames:
        name = frame.f_code.co_filename
        owner = frame.f_locals.get("self")
        if not module and isinstance(owner, nn.Module) and frame.f_code.co_name not in ("__call__", "_call_impl"):
            module = type(owner).__name__
        if not name.startswith(_INSIDE) and not name.startswith("<"):
            line = linecache.getline(name, frame.f_lineno).strip()
            inside = f"in {module}, " if module else ""
            return f" ({inside}{name}:{frame.f_lineno}: `{line}`)"
    return ""


def callers(frame: FrameType | None) -> Iterator[FrameType]:
    """A frame and all its callers, innermost first."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def refused(name: str, why: str, error: BaseException | None = None) -> NotImplementedError:
    """The error for what dualize cannot do, with the user's line that is running, or that raised `error`."""
    raised = error and error.__traceback__
    frames = [frame for frame, _ in walk_tb(raised)][::-1] if raised else callers(sys._getframe(1))
    return NotImplementedError(f"dualize: {name}: {why}{user_line(frames)}")
