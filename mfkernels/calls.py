"""The cache of what a public function decides about its calls: checks passed, backend, dtype.

A layer of a network is called with the same shapes at every step, and checking them again in Python would cost as much
as launching its kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backend
from ._torch import nothing_intercepts, nothing_transforms
from .dual import Dual, TensorOrDual
from .forward_mode import carries_tangent

MAX_ENTRIES = 4096  # a full cache is emptied
PLAIN = (Tensor, torch.nn.Parameter)
_cache: dict[tuple[Any, ...], Any] = {}


def is_plain(x: Any) -> bool:
    """Whether `x` is a tensor, of no subclass but Parameter."""
    return type(x) in PLAIN and not x.is_nested


def cache_key(op: str, *operands: Any) -> tuple[Any, ...] | None:
    """Everything that checks and decisions of a call depend on; None where they may depend on more.

    That is: shapes, dtypes and devices of tensors and Duals, other operands as they are, autocast's dtype and the
    requested backend. None under a compiler, torch.func, forward mode and dispatch modes, and for tensor subclasses.
    So a call that has a key is plain eager PyTorch, and only its Duals carry tangents.
    """
    if operands[0] is None or torch.compiler.is_compiling() or not nothing_intercepts():
        return None
    key: list[Any] = [op, *backend.dispatch_state()]
    for x in operands:
        which = type(x)
        if which is Dual:
            p, t = x
            if not is_plain(p):
                return None
            key += (Dual, p.shape, p.dtype, p.device, p.layout)
            if t is not None:
                if not is_plain(t) or t.requires_grad:
                    return None
                key += (t.shape, t.dtype, t.device, t.layout)
        elif x is None or (which is int and len(key) > 3):  # the first operand is a tensor
            key.append(x)
        elif is_plain(x):
            key += (x.shape, x.dtype, x.device, x.layout)
        else:
            return None
    device_type = operands[0].device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        key.append(torch.get_autocast_dtype(device_type))
    return tuple(key)


def is_untransformed(*operands: TensorOrDual | None) -> bool:
    """Whether these carry no tangents of forward mode, no torch.func transform is active, and none is a subclass.

    So for every call that has a cache key, and also under a compiler and dispatch modes: these see the operators that
    plain eager runs, values have the same bits, and autograd saves the same tensors.
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


def cached(key: tuple[Any, ...] | None) -> Any:
    """What was stored under this key, or None."""
    return None if key is None else _cache.get(key)


def store(key: tuple[Any, ...] | None, decision: Any) -> None:
    """Cache what was decided for all calls of this key, after their checks have passed."""
    if key is not None:
        if len(_cache) >= MAX_ENTRIES:
            _cache.clear()
        _cache[key] = decision


def clear_cache() -> None:
    """Check and decide anew at the next call."""
    _cache.clear()
