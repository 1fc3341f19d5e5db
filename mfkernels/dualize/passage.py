"""What a dual pass changes in PyTorch while it runs: code that would take a tensor apart is shown the primal."""

from __future__ import annotations

import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.checkpoint as checkpointing
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from .call import has_tangent
from .tensor import DualTensor, _is_alias, refused, unwrapped

_lock = threading.Lock()
_depth = 0
_generator = checkpointing._checkpoint_without_reentrant_generator

# `scatter = Scatter.apply` is taken once and called for ever: what such names hold is this function object, so it is
# its code that a pass replaces
_function: Any = torch.autograd.Function.__dict__["apply"].__func__
_original: Any = types.FunctionType(
    _function.__code__, _function.__globals__, "apply", _function.__defaults__, _function.__closure__
)


def _replacement() -> types.CodeType:
    __class__ = None  # the code replaced calls super(), and both must have the same free variables

    def apply(cls, *args, **kwargs):  # type: ignore[no-untyped-def]
        __class__  # noqa: B018
        return __import__("sys").modules["mfkernels.dualize.passage"]._apply(cls, *args, **kwargs)

    return apply.__code__


@contextmanager
def passage() -> Iterator[None]:
    """While a dual pass runs, autograd.Function and checkpoints know `DualTensor`, and compiled parts run eagerly."""
    global _depth
    with _lock:
        _depth += 1
        if _depth == 1:
            _function.__code__ = _replacement()
            checkpointing._checkpoint_without_reentrant_generator = _checkpoint_generator  # type: ignore[assignment]
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                _function.__code__ = _original.__code__
                checkpointing._checkpoint_without_reentrant_generator = _generator


def _checkpoint_generator(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The checkpoint keeps primals, and so recomputes the primal alone."""

    def recomputed(*a: Any, **k: Any) -> Any:
        with torch.compiler.set_stance("force_eager"):
            return function(*a, **k)

    return _generator(recomputed, *unwrapped(args), **unwrapped(kwargs))


def _apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
    leaves, spec = tree_flatten((args, kwargs))
    duals = [x for x in leaves if isinstance(x, DualTensor)]
    if not duals:
        return _original(cls, *args, **kwargs)
    if cls is checkpointing.CheckpointFunction:
        # the reentrant kind would run the module where no tape is; the other kind gives the same gradients
        function, preserve, *inputs = args
        return checkpointing.checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=preserve)
    versions = [x._primal._version for x in duals]
    p_args, p_kwargs = tree_unflatten(list(map(unwrapped, leaves)), spec)
    out = _original(cls, *p_args, **p_kwargs)
    unchanged = versions == [x._primal._version for x in duals]
    outs, out_spec = tree_flatten(out)
    if unchanged:
        same = [next((x for x in duals if _same(o, x._primal)), None) for o in outs]
        if all(x is not None or not has_tangent(o) or _is_input(o, leaves) for o, x in zip(outs, same, strict=True)):
            # a hook on the backward (FSDP's, DDP's): it hands on what it was given
            return tree_unflatten([o if x is None else _moved(o, x) for o, x in zip(outs, same, strict=True)], out_spec)
    if "jvp" not in cls.__dict__ and cls.jvp is torch.autograd.Function.jvp:
        raise refused(
            cls.__name__,
            "a custom autograd.Function without a jvp staticmethod, so its tangent cannot be computed; give it one, or "
            "write it with PyTorch's operations",
        )
    tangents = iter(_through_jvp(cls, leaves, spec))
    batch = duals[0]._batch
    return tree_map(
        lambda o: DualTensor.make(o, next(tangents).to(o.dtype), None, batch) if has_tangent(o) else o,
        out,
    )


def _same(o: Any, p: Tensor) -> bool:
    return (
        isinstance(o, Tensor)
        and o.shape == p.shape
        and o.stride() == p.stride()
        and o.dtype == p.dtype
        and _is_alias(o, p)
        and o.storage_offset() == p.storage_offset()
    )


def _is_input(o: Any, leaves: list[Any]) -> bool:
    return any(isinstance(x, Tensor) and not isinstance(x, DualTensor) and _same(o, x) for x in leaves)


def _moved(o: Tensor, x: DualTensor) -> DualTensor:
    y = DualTensor.make(o, x._tangent, x._rows, x._batch)
    y._cell = x._cell
    return y


def _through_jvp(cls: Any, leaves: list[Any], spec: Any) -> list[Tensor]:
    """Tangents of all rows by the function's own jvp rule."""
    active = [i for i, x in enumerate(leaves) if isinstance(x, DualTensor)]

    def run(*xs: Tensor) -> tuple[Tensor, ...]:
        filled = list(leaves)
        for i, x in zip(active, xs, strict=True):
            filled[i] = x
        args, kwargs = tree_unflatten(filled, spec)
        return tuple(o for o in tree_leaves(_original(cls, *args, **kwargs)) if has_tangent(o))

    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        duals = [leaves[i] for i in active]
        dots = tuple(x._tangent if x._rows is None else x._rows.fill(x._tangent) for x in duals)
        return [t.detach() for t in torch.func.jvp(run, tuple(x._primal.detach() for x in duals), dots)[1]]
