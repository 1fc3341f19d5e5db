"""What a dual pass changes in PyTorch while it runs: code that would take a tensor apart is shown the primal."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.checkpoint as checkpointing
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from .call import has_tangent
from .tensor import DualTensor, refused, unwrapped

_lock = threading.Lock()
_depth = 0
_originals: dict[str, Any] = {}


@contextmanager
def passage() -> Iterator[None]:
    """For the time of a dual pass: autograd.Function and activation checkpoints know `DualTensor`, torch.compile'd parts
    of the module run eagerly."""
    global _depth
    with _lock:
        _depth += 1
        if _depth == 1:
            _originals["apply"] = torch.autograd.Function.__dict__["apply"]
            _originals["generator"] = checkpointing._checkpoint_without_reentrant_generator
            torch.autograd.Function.apply = classmethod(_apply)  # type: ignore[assignment, method-assign]
            checkpointing._checkpoint_without_reentrant_generator = _checkpoint_generator
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                torch.autograd.Function.apply = _originals["apply"]
                checkpointing._checkpoint_without_reentrant_generator = _originals["generator"]


def _checkpoint_generator(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The checkpoint keeps primals, and so recomputes the primal alone."""

    def recomputed(*a: Any, **k: Any) -> Any:
        with torch.compiler.set_stance("force_eager"):
            return function(*a, **k)

    return _originals["generator"](recomputed, *unwrapped(args), **unwrapped(kwargs))


def _apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
    original = _originals["apply"].__func__
    leaves, spec = tree_flatten((args, kwargs))
    duals = [x for x in leaves if isinstance(x, DualTensor)]
    if not duals:
        return original(cls, *args, **kwargs)
    if cls is checkpointing.CheckpointFunction:
        # the reentrant kind would run the module where no tape is; the other kind gives the same gradients
        function, preserve, *inputs = args
        return checkpointing.checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=preserve)
    versions = [x._primal._version for x in duals]
    p_args, p_kwargs = tree_unflatten(list(map(unwrapped, leaves)), spec)
    out = original(cls, *p_args, **p_kwargs)
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
    tangents = iter(_through_jvp(cls, original, leaves, spec))
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
        and torch._C._is_alias_of(o, p)
        and o.storage_offset() == p.storage_offset()
    )


def _is_input(o: Any, leaves: list[Any]) -> bool:
    return any(isinstance(x, Tensor) and not isinstance(x, DualTensor) and _same(o, x) for x in leaves)


def _moved(o: Tensor, x: DualTensor) -> DualTensor:
    y = DualTensor.make(o, x._tangent, x._rows, x._batch)
    y._cell = x._cell
    return y


def _through_jvp(cls: Any, original: Any, leaves: list[Any], spec: Any) -> list[Tensor]:
    """Tangents of all rows by the function's own jvp rule."""
    active = [i for i, x in enumerate(leaves) if isinstance(x, DualTensor)]

    def run(*xs: Tensor) -> tuple[Tensor, ...]:
        filled = list(leaves)
        for i, x in zip(active, xs, strict=True):
            filled[i] = x
        args, kwargs = tree_unflatten(filled, spec)
        return tuple(o for o in tree_leaves(original(cls, *args, **kwargs)) if has_tangent(o))

    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        duals = [leaves[i] for i in active]
        dots = tuple(x._tangent if x._rows is None else x._rows.fill(x._tangent) for x in duals)
        return [t.detach() for t in torch.func.jvp(run, tuple(x._primal.detach() for x in duals), dots)[1]]
