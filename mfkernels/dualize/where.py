"""The line of a user's module that a call came from."""

from __future__ import annotations

import contextlib
import linecache
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from traceback import walk_tb
from types import FrameType

import torch
from torch import nn

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


def outwards(frame: FrameType | None) -> Iterator[FrameType]:
    """A frame, its caller, that one's …."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def refused(name: str, why: str, error: BaseException | None = None) -> NotImplementedError:
    """What dualize cannot do, with the line of the user's module that asked for it, or in which `error` was raised."""
    raised = error and error.__traceback__
    frames = [frame for frame, _ in walk_tb(raised)][::-1] if raised else outwards(sys._getframe(1))
    return NotImplementedError(f"dualize: {name}: {why}{user_line(frames)}")
