"""Custom autograd Functions in a dual pass, and the tensors that autograd saves.

Below autograd the forward of a Function is a sequence of operators, so it needs no `jvp`. A Function that has a `jvp`
staticmethod is differentiated by it; that need not be the derivative of its forward, as in straight-through estimators.
Tensors made in its forward are marked, and get their tangents at their first use outside it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import FrameType
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from .. import _torch
from .._torch import tree_leaves, tree_map
from .call import Slot
from .report import callers, refused

SlotOf = Callable[[Tensor], Slot | None]


class OwnRule:
    """One call of a Function that has a `jvp`: its outputs and their tangents by that."""

    def __init__(self, frame: FrameType, cls: Any, slot_of: SlotOf) -> None:
        self.frame, self.cls = frame, cls

        def dual(x: Any) -> Any:
            """A copy, as the Function may write into it."""
            if not isinstance(x, Tensor):
                return x
            slot = slot_of(x)
            if slot is None:
                return x.detach().clone()
            t = slot.tangent if slot.rows is None else slot.rows.fill(slot.tangent)
            return fwAD.make_dual(slot.primal.clone(memory_format=torch.contiguous_format), t.clone())

        with _torch.autograd_again(), torch.no_grad(), _torch.forward_mode(True), fwAD.dual_level():
            out = cls.apply(*tree_map(dual, _arguments(frame, cls)))
            outs = [fwAD.unpack_dual(x) for x in tree_leaves(out) if isinstance(x, Tensor)]
            self.outs = [(p.detach(), None if t is None else t.detach()) for p, t in outs]

    def is_running(self) -> bool:
        """Whether the call has not returned yet."""
        return any(frame is self.frame for frame in callers(sys._getframe(1)))

    def has(self, x: Tensor) -> bool:
        """Whether `x`, a primal, is an output."""
        return any(_equal(p, x) for p, _ in self.outs)

    def tangent_of(self, x: Tensor) -> Tensor | None:
        """The tangent of an output, of all rows; None if it is zero."""
        found = [t for p, t in self.outs if _equal(p, x)]
        if not found:
            why = "its jvp gives the tangents of its outputs, and this tensor has the value of none of them"
            raise refused(self.cls.__name__, why)
        first, *others = found
        if any(t is not first and (t is None or first is None or not torch.equal(t, first)) for t in others):
            raise refused(self.cls.__name__, "its jvp gives outputs of the same values different tangents")
        return first


def _equal(p: Tensor, x: Tensor) -> bool:
    return p.shape == x.shape and p.dtype == x.dtype and torch.allclose(p, x, 0, 0, True)


def _arguments(frame: FrameType, cls: Any) -> list[Any]:
    """The arguments of `apply`, read from the frame of the forward before its first operator has run."""
    code, values = frame.f_code, frame.f_locals
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    args = [values[name] for name in names]
    if code.co_flags & inspect.CO_VARARGS:
        args += values[code.co_varnames[len(names)]]
    return args if cls.setup_context is not torch.autograd.Function.setup_context else args[1:]


_functions: dict[Any, list[Any]] = {}  # by the code of their forward


class Functions:
    """The Functions that are applied during a pass."""

    def __init__(self) -> None:
        self.calls: dict[int, OwnRule] = {}  # by the frame of their forward
        self.listed = False

    def running(self) -> FrameType | None:
        """The frame of the innermost forward of a Function that is running in this thread."""
        if _torch.forward_mode_enabled():  # every Function's forward turns it off
            return None
        if not self.listed:
            _functions.update(_torch.functions_by_code())
            self.listed = True
        return next((frame for frame in callers(sys._getframe(1)) if frame.f_code in _functions), None)

    def detaches(self) -> bool:
        """Whether a Function calls detach(), which does not stop its tangent, as it does not stop its gradient.

        Not in the Functions of PyTorch: the forward of a reentrant checkpoint runs the module.
        """
        frame = self.running()
        return frame is not None and not any(cls.__module__.startswith("torch.") for cls in _functions[frame.f_code])

    def own_rule(self, slot_of: SlotOf) -> OwnRule | None:
        """The call of a Function with a `jvp` whose forward is running in this thread."""
        frame = self.running()
        if frame is None:
            return None
        own = [cls for cls in _functions[frame.f_code] if cls.jvp is not torch.autograd.Function.jvp]
        if not own:
            return None
        name = own[0].__name__
        if torch.compiler.is_compiling():
            raise refused(name, "it has a jvp of its own, which torch.compile cannot follow; run it eagerly")
        if len(_functions[frame.f_code]) > 1:
            raise refused(name, "it shares its forward with another autograd.Function and has a jvp of its own")
        rule = self.calls.get(id(frame))
        if rule is None or rule.frame is not frame:
            rule = self.calls[id(frame)] = OwnRule(frame, own[0], slot_of)
        return rule


# -------------------------------------------------------------------------------------------------------- saved tensors


def saving_primals(
    primal_of: Callable[[Tensor], Tensor], is_running: Callable[[], bool]
) -> AbstractContextManager[Any]:
    """A context in which autograd saves primals; saved-tensor hooks set around the pass are called with them."""
    if not torch.is_grad_enabled():
        return nullcontext()
    outer = _torch.saved_tensors_hooks_in_force(lambda: hooks)

    def unpack(saved: _Saved) -> Tensor:
        if is_running():
            raise refused("backward", "a network that differentiates inside its own forward needs torch.func.jvp")
        return saved.tensor()

    hooks = saved_tensors_hooks(lambda x: _Saved(primal_of(x), outer), unpack)
    return hooks


class _Saved:
    """A tensor that autograd has saved, checked for later writes as autograd would without hooks."""

    __slots__ = ("hooks", "kept", "version")

    def __init__(self, x: Tensor, hooks: _torch.Hooks | None) -> None:
        self.hooks = hooks  # those set around the pass, which decide how it is saved
        self.kept: Any = x if hooks is None else hooks[0](x)
        self.version = _torch.writes_to(x) if hooks is None else 0

    def tensor(self) -> Tensor:
        if self.hooks is None and _torch.writes_to(self.kept) != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation; "
                "clone() it before writing"
            )
        return self.kept if self.hooks is None else self.hooks[1](self.kept)
