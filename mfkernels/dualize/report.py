"""Messages to the user: a report of the operations that ran, and errors with the line of the user's module."""

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
    """One kind of operation.

    calls: how often it ran.
    seconds: in its tangents.
    """

    calls: int = 0
    seconds: float = 0.0


@dataclass
class Report:
    """What `dualize(model, report=True)` saw since it was made or cleared.

    rules: ATen operators whose tangent is written out, by name.
    jvp: operations that went through `torch.func.jvp` one by one, on the rows that carry tangents.
    zero_filled: operations after which those rows are no prefix, so that zeros stand for the others.
    seconds: in all dual passes, hooks and the user's Python included. On CUDA kernels run on after their launch: the
        times are those of the launches, unless CUDA_LAUNCH_BLOCKING=1.
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
        """Start anew."""
        for table in (self.rules, self.jvp, self.zero_filled):
            table.clear()
        self.seconds = 0.0

    @property
    def jvp_share(self) -> float:
        """Share of the time of all dual passes that went into `jvp`."""
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
    """A frame, its caller, that one's …."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def refused(name: str, why: str, error: BaseException | None = None) -> NotImplementedError:
    """What dualize cannot do, with the line of the user's module that asked for it, or in which `error` was raised."""
    raised = error and error.__traceback__
    frames = [frame for frame, _ in walk_tb(raised)][::-1] if raised else callers(sys._getframe(1))
    return NotImplementedError(f"dualize: {name}: {why}{user_line(frames)}")
