"""The tensor that carries its tangent through an ordinary module, and the dual pass that it belongs to.

A `DualTensor` works below autograd: autograd records its operators as those of any tensor, and the ATen operators that
reach `__torch_dispatch__` are run on the primal and, by their rules, on the tangent. Hooks unwrap the tensors that
autograd saves, so the tape holds primals. After the pass a `DualTensor` behaves as its primal: backward formulas and
the recomputation of a checkpoint see no tangent.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .. import _torch
from ..dual import Dual, padded_tangent, primal_of, unshared
from ..forward_mode import CarriesTangent
from .autograd import Functions, OwnRule, saving_primals
from .call import NOT_COMPUTED, Call, Out, Rows, Slot, can_have_tangent, differentiable, leaves, mapped
from .memory import Memory
from .report import Report, refused
from .rules import COPIED_VIEWS, MEMORY, NUMBER, RESHAPES, Operator, operator, tangents


class DualTensor(CarriesTangent):
    """A primal and the tangent of some of its rows, which the module and autograd use as an ordinary tensor."""

    _primal: Tensor
    _slot: Slot | None  # None: a tangent of zero
    _run: DualPass
    _memory: Memory | None = None  # shared with the views of this tensor, once there are any
    # of a tensor made in the forward of a Function with a `jvp`: its rule; NOT_COMPUTED: the tangent is not available
    _rule: OwnRule | Out | None = None

    @staticmethod
    def make(primal: Tensor, slot: Slot | None, run: DualPass) -> DualTensor:
        x = _torch.make_wrapper_subclass(
            DualTensor,
            primal.shape,
            strides=primal.stride(),
            storage_offset=primal.storage_offset(),
            dtype=primal.dtype,
            layout=primal.layout,
            device=primal.device,
        )
        x._primal, x._slot, x._run = primal, slot, run
        if not _torch.forward_mode_enabled():
            x._rule = run.functions.own_rule(run.slot)
        run.tensors.append(weakref.ref(x))
        return x

    @property
    def _rows(self) -> Rows | None:
        return None if self._slot is None else self._slot.rows

    def drop_tangent(self) -> None:
        """Make this tensor one with a tangent of zero."""
        self._slot = self._memory = self._rule = None

    __torch_function__ = _torch.disabled_torch_function

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        # the mode of the pass is not active: on another thread, below another mode, or after the pass
        kwargs = kwargs or {}
        duals = (x for x in leaves((args, *kwargs.values())) if isinstance(x, DualTensor))
        run = next((x._run for x in duals if x._run.active), None)
        if run is not None:
            return run.dispatch(func, args, kwargs)
        op = operator(func)
        if op.refusal is MEMORY:
            raise refused(op.name, op.refusal)
        if op.reshapes:  # outside a pass it is not known whether there are views
            return args[0].change_shape(func, op, args[1:], kwargs, has_views=args[0].requires_grad)
        return func(*mapped(_bare, args), **{k: mapped(_bare, x) for k, x in kwargs.items()})

    def change_shape(self, func: Any, op: Operator, args: Any, kwargs: Any, has_views: bool) -> DualTensor:
        """transpose_, unsqueeze_ …, of the primal and of this tensor itself."""
        # autograd computes views of a wrapper again from their base, which would have another shape now
        if torch.is_grad_enabled() and (has_views or _torch.viewed(self) is not self):
            raise refused(op.name, RESHAPES)
        self._primal = op.functional(self._primal, *args, **kwargs)
        with _torch.no_dispatch():
            func(self, *args, **kwargs)
        return self

    def through(self, run: Callable[..., Any], operands: Sequence[Any]) -> Any:
        return self._run.through(run, operands)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"DualTensor({self._primal!r})"

    def detach_(self) -> DualTensor:  # does not reach `__torch_dispatch__`
        self.drop_tangent()
        return super().detach_()  # type: ignore[return-value]

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Any) -> None:
        raise refused("x.data = y", "it replaces the tensor; use x.copy_(y) to write the values of y")

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.clone() if self._run.active else copy.deepcopy(self._primal, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self._run.active:
            raise refused("pickle", "a tensor with a tangent cannot be stored; detach() it")
        return self._primal.__reduce_ex__(protocol)


def _of_primal(name: str, refusal: str | None = None) -> Callable[..., Any]:
    def method(self: DualTensor, *args: Any, **kwargs: Any) -> Any:
        if refusal is not None and self._run.active and self._run.slot(self) is not None:
            raise refused(name, refusal)
        return getattr(self._primal, name)(*args, **kwargs)

    return method


for _name in ("__bool__", "is_nonzero", "__int__", "__format__"):
    setattr(DualTensor, _name, _of_primal(_name))
for _name in ("item", "tolist", "numpy", "__float__", "__complex__", "__array__", "__dlpack__"):
    setattr(DualTensor, _name, _of_primal(_name, NUMBER))
for _name in ("data_ptr", "share_memory_"):
    setattr(DualTensor, _name, _of_primal(_name, MEMORY))


def _bare(x: Any) -> Any:
    return x._primal if isinstance(x, DualTensor) else x


class DualPass(_torch.TorchDispatchMode):  # type: ignore[misc, valid-type]
    """One dual pass over `batch` samples, of which the first `active` carry tangents."""

    def __init__(self, batch: int, active: int, report: Report | None) -> None:
        super().__init__()
        self.batch, self.active_rows, self.report = batch, active, report
        self.active = False
        self._tape: AbstractContextManager[Any] = nullcontext()
        self._begin()

    def _begin(self) -> None:
        self.functions = Functions()
        self.unwrapping = False
        self.written_by_functions: list[tuple[DualTensor, OwnRule]] = []
        self.tensors: list[weakref.ref[DualTensor]] = []
        self.written: dict[Any, Memory] = {}  # of plain tensors into which tangents were written

    # ------------------------------------------------------------------------------------------------- begin and end

    def __enter__(self) -> DualPass:
        self._tape = saving_primals(self._to_be_saved, lambda: self.active)
        self._tape.__enter__()
        self.active = True
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.active = False
        self._tape.__exit__(*error)
        for ref in self.tensors:  # a closure, such as that of a checkpoint, may keep one
            x = ref()
            if x is not None:
                x.drop_tangent()
        self._begin()

    def has_live_tensors(self) -> bool:
        """Whether tensors of this pass are still in use."""
        return any(ref() is not None for ref in self.tensors)

    def _to_be_saved(self, x: Tensor) -> Tensor:
        # a saved tensor with a grad_fn would be a reference cycle
        return self.primal(x) if x.grad_fn is not None or isinstance(x, DualTensor) else x

    def primal(self, x: Tensor) -> Tensor:
        """The detached primal of `x`; it shares the version counter of `x`."""
        self.unwrapping = True
        try:
            return x.detach()
        finally:
            self.unwrapping = False

    def enter(self, x: Dual) -> Tensor:
        """A Dual as a DualTensor, on the tape if the primal is; the primal if there is no tangent."""
        if x.rows == 0:
            return x.primal
        # a single sample cannot be mixed with others
        rows = Rows(0, 1, self.batch, 1, self.active_rows) if self.batch > 1 else None
        return _dual_tensor(x.primal, padded_tangent(x, self.active_rows), rows, self)

    def slot(self, x: Tensor) -> Slot | None:
        """A tensor's primal and tangent, if it carries one in this pass."""
        if self.written_by_functions:
            self._assign_function_tangents()
        if isinstance(x, DualTensor):
            if x._run is not self:
                if x._run.active:
                    raise refused(
                        "a tensor of another dual pass", "dual passes cannot be nested; dualize the outer module only"
                    )
                return None
            if isinstance(x._rule, Out):
                raise refused("a statistic", "the tangent of this output of a fused operator is not computed")
            if x._rule is not None and not x._rule.is_running():
                self._assign_function_tangent(x, x._rule)
            if x._memory is not None and x._memory.buffer is not None:
                return x._memory.read(x._primal, x._rows)
            return x._slot
        memory = self.written.get(_torch.memory_of(x)) if self.written and can_have_tangent(x) else None
        return None if memory is None else memory.read(x, None)

    def _assign_function_tangents(self) -> None:
        """Set the tangents of tensors that Functions with a `jvp` wrote in place and returned."""
        over = [(x, rule) for x, rule in self.written_by_functions if not rule.is_running()]
        self.written_by_functions = [(x, rule) for x, rule in self.written_by_functions if rule.is_running()]
        for x, rule in over:
            if rule.has(x._primal):
                self._assign_function_tangent(x, rule)

    def _assign_function_tangent(self, x: DualTensor, rule: OwnRule) -> None:
        """Set the tangent of `x`, an output of a Function with a `jvp`, by that."""
        t, rows = rule.tangent_of(x._primal), None
        if t is not None and t.ndim and len(t) == self.batch > self.active_rows and not t[self.active_rows :].any():
            t, rows = t[: self.active_rows], Rows(0, 1, self.batch, 1, self.active_rows)
        x._rule = None
        self._store(x, x._primal, Out(None if t is None else t.to(x.dtype), rows))

    def through(self, run: Callable[..., Any], operands: Sequence[Any]) -> Any:
        """`run`, an op of this package, on Duals in place of DualTensors."""
        given = []
        for x in operands:
            slot = self.slot(x) if isinstance(x, Tensor) else None
            if slot is None:
                given.append(primal_on_tape(x))
                continue
            t, rows = slot.tangent, slot.rows
            given.append(Dual(primal_on_tape(x), t if rows is None or rows[:2] == (0, 1) else rows.fill(t)))
        out = run(*given)
        return tuple(map(self._return, out)) if type(out) is tuple else self._return(out)

    def _return(self, x: Any) -> Any:
        if not isinstance(x, Dual) or x.tangent is None:
            return primal_of(x)
        n = x.primal.shape[0]
        if self.batch > 1 and n % self.batch == 0 and x.rows == n // self.batch * self.active_rows:
            return _dual_tensor(*x, Rows(0, 1, self.batch, n // self.batch, self.active_rows), self)
        return _dual_tensor(x.primal, padded_tangent(x, n), None, self)

    # ------------------------------------------------------------------------------------------------------- dispatch

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # Dynamo does not trace the pass: see op.py

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.unwrapping and func is torch.ops.aten.detach.default:
            return func(_bare(args[0]))
        if not types and not self.written and not operator(func).in_place:
            return func(*args, **(kwargs or {}))  # on plain tensors
        return self.dispatch(func, args, kwargs or {})

    def dispatch(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run one ATen operator on primals, and its tangent's rule where an operand carries one."""
        op, found = operator(func), _Operands()
        slots, primals = self._taken(args, found)
        slot_kwargs, p_kwargs = kwargs, kwargs
        if kwargs:
            taken = self._taken(kwargs.values(), found)
            slot_kwargs, p_kwargs = (dict(zip(kwargs, xs, strict=True)) for xs in taken)
        if not found.dual and not op.in_place:
            return func(*args, **kwargs)
        if torch.is_inference_mode_enabled():
            super().__enter__()  # the parts are dispatched to this mode
            try:
                parts = func.decompose(*args, **kwargs)  # as autograd does outside inference mode
            finally:
                super().__exit__(None, None, None)
            if parts is not NotImplemented:
                return parts
        if op.refusal is not None and (found.tangent or (found.dual and op.refusal is MEMORY)):
            raise refused(op.name, op.refusal)
        rule = None
        if found.dual and not _torch.forward_mode_enabled():
            rule = self.functions.own_rule(self.slot)
            if op.name == "detach" and not op.in_place and self.functions.detaches():
                op = operator(torch.ops.aten.alias.default)
            if rule is not None and op.in_place:
                if not isinstance(args[0], DualTensor):
                    raise refused(rule.cls.__name__, "it has a jvp of its own and writes in place")
                self.written_by_functions.append((args[0], rule))
        if op.reshapes:
            return self._change_shape(func, op, args, kwargs, slots, found)
        call = Call(func, op.name, slots, slot_kwargs, [])
        if op.in_place:
            return self._in_place(op, call, args, primals, p_kwargs, found)

        out = func(*primals, **p_kwargs)
        source = args[0] if args and isinstance(args[0], DualTensor) else None
        copied = op.name in COPIED_VIEWS
        if copied and source is not None:
            self._memory_of(source).copied = True
        if not op.view or op.constant:
            source = None
        elif source is None:
            return out  # a view of a plain tensor: its tangent is found by its memory
        if found.tangent and not op.constant:
            if copied:
                out = out.resolve_conj().resolve_neg()
            shared = [] if source is not None else found.shared
            outs = tangents(op, call, out, shared, self.batch, self.report)
            result = self._wrap(out, outs, source, keep=source is not None)
            if copied:
                self._memory_of(result).copied = True
            return result
        # the tangent is zero; a DualTensor is needed where a later write or the rule of a Function can change that
        cut_off = op.view and op.constant and self.written and _torch.memory_of(out) in self.written
        if source is not None or rule is not None or cut_off:
            return self._wrap(out, [Out(None)] * len(differentiable(out)), source, keep=True)
        return out

    def _taken(self, xs: Iterable[Any], found: _Operands) -> tuple[list[Any], list[Any]]:
        """Operands, with a `Slot` for each that carries a tangent, and the primals of the operands."""
        slots: list[Any] = []
        primals: list[Any] = []
        for x in xs:
            slot = primal = x
            if isinstance(x, Tensor):
                dual = isinstance(x, DualTensor)
                carried = self.slot(x) if dual or self.written else None
                if dual:
                    slot = primal = x._primal  # type: ignore[attr-defined]
                    found.dual = True
                if carried is not None:
                    slot, found.dual, found.tangent = carried, True, True
                    if not dual or carried is not x._slot:  # type: ignore[attr-defined]
                        found.shared.append(carried.tangent)
            elif isinstance(x, (list, tuple)) and not (x and isinstance(x[0], int)):
                slot, primal = self._taken(x, found)
            slots.append(slot)
            primals.append(primal)
        return slots, primals

    def _wrap(self, out: Any, outs: list[Out], source: DualTensor | None, keep: bool) -> Any:
        """`out` with tangents, as views of `source` if it is given; with `keep` also where the tangent is zero."""
        memory = None if source is None else self._memory_of(source)
        given = iter(outs)

        def one(p: Any) -> Any:
            if not can_have_tangent(p):
                return p
            t, rows, sample = next(given)
            if t is None and not keep and rows is not NOT_COMPUTED.rows:
                return p
            x = DualTensor.make(p, None if t is None else Slot(p, t, rows, sample), self)
            if rows is NOT_COMPUTED.rows:
                x._rule = NOT_COMPUTED
            x._memory = memory
            return x

        return mapped(one, out)

    def _adopt(self, x: DualTensor) -> None:
        """Make a tensor that the module has kept from an earlier pass one of this pass."""
        if x._run is not self:
            x.drop_tangent()
            x._run = self
            self.tensors.append(weakref.ref(x))

    def _memory_of(self, x: DualTensor) -> Memory:
        """The `Memory` that `x` shares with its views."""
        self._adopt(x)
        if x._memory is None:
            x._memory = Memory(x._primal, x._slot, self.batch, self.active_rows)
        return x._memory

    def _in_place(self, op: Operator, call: Call, args: Any, p_args: Any, p_kwargs: Any, found: _Operands) -> Any:
        """Compute the tangent, which needs the old primal; then write the primal."""
        target = args[0]
        if isinstance(target, DualTensor):
            self._adopt(target)
            if target._memory is not None and target._memory.copied:
                why = "writes into conj(), which is a copy here, or after it was taken; clone() before"
                raise refused(op.name, why)
            base = p_args[0] if target._memory is None else target._memory.primal
            if any(0 in p.stride() and p.numel() > 1 for p in (base, p_args[0])):
                if base is not p_args[0] or self._has_views(target):
                    raise refused(op.name, "writes into an expanded tensor, where several elements are one; clone() it")
                target._memory = None
                # an expanded argument, say
                target._primal = p_args[0] = p_args[0].contiguous()
        elif found.tangent and not isinstance(target, Tensor):
            raise refused(op.name, "writes into a list of tensors")
        outs: list[Out] = []
        if found.tangent and can_have_tangent(target):
            functional = call._replace(func=op.functional)
            outs = tangents(op, functional, p_args[0], found.shared, self.batch, self.report)
        out = call.func(*p_args, **p_kwargs)
        if not isinstance(target, Tensor):
            return out
        if outs:
            self._store(target, p_args[0], outs[0])
        return target

    def _change_shape(self, func: Any, op: Operator, args: Any, kwargs: Any, slots: list[Any], found: _Operands) -> Any:
        """transpose_, unsqueeze_ …"""
        x, turned = args[0], operator(op.functional)
        if not isinstance(x, DualTensor):
            return func(*args, **kwargs)  # its tangent is found by its memory
        self._adopt(x)
        x.change_shape(func, op, args[1:], kwargs, has_views=self._has_views(x))
        x._slot = None
        if found.tangent:
            call = Call(op.functional, turned.name, slots, kwargs, [])
            x._slot = _slot_of(x._primal, *tangents(turned, call, x._primal, [], self.batch, self.report))
        return x

    def _has_views(self, x: DualTensor) -> bool:
        """Whether another tensor shares the memory of `x`."""
        others = (ref() for ref in self.tensors) if x._memory is not None else ()
        return any(y is not x and y is not None and y._memory is x._memory for y in others)

    def _store(self, target: Tensor, p: Tensor, out: Out) -> None:
        """Set the tangent of `target`, whose primal `p` was written to, to `out`."""
        t, rows, _ = out
        if isinstance(target, DualTensor):
            if target._memory is None:  # no view shares it
                target._slot = _slot_of(p, out)
            else:
                target._memory.write(p, target._rows, t, rows)
            return
        memory = self.written.get(_torch.memory_of(p))
        if memory is None:
            if t is None:
                return
            memory = Memory(_torch.viewed(p), None, self.batch, self.active_rows)
            self.written[_torch.memory_of(p)] = memory
        memory.write(p, None, t, rows)


def _slot_of(p: Tensor, out: Out) -> Slot | None:
    """The primal `p` with the tangent that a rule gave; None where that is zero."""
    return None if out.tangent is None else Slot(p, out.tangent, out.rows, out.sample)


class _Operands:
    """What is known of the operands of a call."""

    __slots__ = ("dual", "shared", "tangent")

    def __init__(self) -> None:
        self.dual = self.tangent = False  # whether there is a DualTensor, and whether there is a tangent
        self.shared: list[Tensor] = []  # tangents in memory that later writes may change


class _Identity(torch.autograd.Function):
    """`convert(x)`, which has the value of `x` and passes its gradient on to `x`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, convert: Callable[[Any], Tensor]) -> Tensor:
        return convert(x)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return grad, None


def _dual_tensor(x: Tensor, t: Any, rows: Rows | None, run: DualPass) -> DualTensor:
    def convert(x: Tensor) -> DualTensor:
        if 0 in x.stride():
            x = unshared(x.detach())  # one that requires grad has not been copied yet
        # conjugate bits are not resolved below autograd
        p, p_dot = (a.detach().resolve_conj().resolve_neg() for a in (x, t))
        return DualTensor.make(p, Slot(p, p_dot, rows), run)

    return _Identity.apply(x, convert) if x.requires_grad and torch.is_grad_enabled() else convert(x)


def primal_on_tape(x: Any) -> Any:
    """The primal of a DualTensor, on the tape if that is; anything else unchanged."""
    if not isinstance(x, DualTensor):
        return x
    return _Identity.apply(x, x._run.primal) if x.requires_grad else x._run.primal(x)
