"""Checks and decisions (backend, dtype) of a public function's calls, made once for each kind of arguments and cached.

A layer of a network is called with the same shapes at every step, and Python's checks of them would cost as much as
launching its kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backend
from ._torch import nothing_intercepts, nothing_transforms
from .dual import Dual, TensorOrDual
from .forward_mode import carries_tangent

MAX_CALLS = 4096  # kinds that are remembered; then they are worked out anew
_PLAIN = (Tensor, torch.nn.Parameter)
_known: dict[tuple[Any, ...], Any] = {}


def is_plain(x: Any) -> bool:
    return type(x) in _PLAIN and not x.is_nested


def kind_of_call(op: str, *operands: Any) -> tuple[Any, ...]:
    """All that the checks and decisions of a call look at; () where they can depend on more than that.

    Of tensors and Duals: shapes, dtypes and devices, and of the rest autocast and the backend that was asked for. ()
    under a compiler, torch.func, forward mode and modes, and for tensor subclasses; so whatever has another kind than
    () is plain eager PyTorch, and nothing in it carries a tangent but Duals.
    """
    if operands[0] is None or torch.compiler.is_compiling() or not nothing_intercepts():
        return ()
    kind: list[Any] = [op, *backend.circumstances()]
    for x in operands:
        which = type(x)
        if which is Dual:
            p, t = x
            if not is_plain(p):
                return ()
            kind += (Dual, p.shape, p.dtype, p.device, p.layout)
            if t is not None:
                if not is_plain(t) or t.requires_grad:
                    return ()
                kind += (t.shape, t.dtype, t.device, t.layout)
        elif x is None or (which is int and len(kind) > 3):  # the first operand is a tensor
            kind.append(x)
        elif is_plain(x):
            kind += (x.shape, x.dtype, x.device, x.layout)
        else:
            return ()
    device_type = operands[0].device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        kind.append(torch.get_autocast_dtype(device_type))
    return tuple(kind)


def is_untransformed(*operands: TensorOrDual | None) -> bool:
    """Whether an op may be called on these: whatever has another kind than (), and also what a compiler or modes see.

    They see the operators that plain eager runs, so values have the same bits and the tape keeps the same tensors. Not
    where forward mode, torch.func or a subclass has rules of its own for what the op is made of.
    """
    compiling = torch.compiler.is_compiling()  # whose tensors are subclasses of its own
    if not (compiling or nothing_transforms()):
        return False
    for x in operands:
        parts = x if isinstance(x, Dual) else (x,)
        if any(a is not None and (carries_tangent(a) or not (compiling or is_plain(a))) for a in parts):
            return False
        if isinstance(x, Dual) and x.tangent is not None and x.tangent.requires_grad:
            return False
    return True


def known(kind: tuple[Any, ...]) -> Any:
    """What `remember` was given for this kind, or None."""
    return _known.get(kind)


def remember(kind: tuple[Any, ...], facts: Any) -> None:
    """Keep what the calls of a kind come to, after their checks have passed."""
    if kind:
        if len(_known) >= MAX_CALLS:
            _known.clear()
        _known[kind] = facts


def forget() -> None:
    """Work everything out anew."""
    _known.clear()
