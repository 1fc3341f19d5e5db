"""Every private name of PyTorch that this package leans on, each with what stands in for it where it is missing."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import enable_reentrant_dispatch


def _find(path: str) -> Any:
    found: Any = torch
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


# `__torch_function__` of a tensor subclass that leaves PyTorch's functions alone
disabled_torch_function: Any = _find("_C._disabled_torch_function_impl")

_top_hooks: Callable[[bool], Any] | None = _find("_C._autograd._top_saved_tensors_default_hooks")
Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]


def saved_tensors_hooks_in_force(inner: Callable[[], saved_tensors_hooks]) -> Hooks | None:
    """The (pack, unpack) of the innermost `saved_tensors_hooks`, which hooks pushed after them replace.

    `inner` gives those that will be pushed: a PyTorch that does not say whether there are others is made to call them,
    by saving a tensor with `inner` set aside.
    """
    if _top_hooks is not None:
        return _top_hooks(True)
    anchor = torch.empty(0, requires_grad=True)

    def pack(x: Tensor) -> Any:
        inner().__exit__(None, None, None)
        try:
            with torch.enable_grad():
                return _Saver.apply(anchor, x)
        finally:
            inner().__enter__()

    return pack, lambda y: y.grad_fn.saved_tensors[0]


class _Saver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return anchor.clone()


_force_keys: Any = _find("_C._ForceDispatchKeyGuard")
# the dispatch keys of a thread that is in no operator
_at_rest = _force_keys and [_find(f"_C._dispatch_tls_local_{kind}_set")() for kind in ("include", "exclude")]
_modes: Callable[[], int] = _find("_C._len_torch_dispatch_stack") or (lambda: 0)


def autograd_again() -> AbstractContextManager[Any]:
    """Inside `__torch_dispatch__`, where autograd's keys are off: operators run from the top again.

    The public `enable_reentrant_dispatch` gives the key of the mode back too, whose turn it is not; without a mode to
    go to, an operator with that key stops with an internal error.
    """
    return _force_keys(*_at_rest) if _force_keys and not _modes() else enable_reentrant_dispatch()


def functions_by_code() -> dict[Any, list[Any]]:
    """Every autograd.Function there is, by the code of its forward."""
    found: dict[Any, list[Any]] = {}
    classes = list(torch.autograd.Function.__subclasses__())
    while classes:
        cls = classes.pop()
        classes += cls.__subclasses__()
        found.setdefault(getattr(inspect.unwrap(cls.forward), "__code__", None), []).append(cls)
    return found


# False inside the forward of an autograd.Function
forward_mode_enabled: Callable[[], bool] = _find("_C._is_fwd_grad_enabled") or (lambda: True)
forward_mode: Callable[[bool], AbstractContextManager[Any]] = _find("autograd.forward_ad._set_fwd_grad_enabled")


def memory_of(x: Tensor) -> int:
    """A number that tensors share if and only if they share memory."""
    return x.untyped_storage()._cdata


def schema_of(operator: Any) -> Any:
    """An OpOverload's schema."""
    return operator._schema
