"""The line of a user's module that a call came from."""

from __future__ import annotations

import linecache
import os
import sys
from pathlib import Path
from types import FrameType

import torch
from torch import nn

_INSIDE = tuple(f"{Path(module).parent}{os.sep}" for module in (torch.__file__, Path(__file__).parent))


def user_line() -> str:
    """ " (in BatchNorm2d, net.py:12: `x = self.norm(x)`)": the innermost line outside PyTorch and this package."""
    frame: FrameType | None = sys._getframe(1)
    module = ""
    while frame is not None:
        name = frame.f_code.co_filename
        owner = frame.f_locals.get("self")
        if not module and isinstance(owner, nn.Module) and frame.f_code.co_name not in ("__call__", "_call_impl"):
            module = type(owner).__name__
        if not name.startswith(_INSIDE) and not name.startswith("<"):
            line = linecache.getline(name, frame.f_lineno).strip()
            inside = f"in {module}, " if module else ""
            return f" ({inside}{name}:{frame.f_lineno}: `{line}`)"
        frame = frame.f_back
    return ""
