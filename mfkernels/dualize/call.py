"""One ATen call of a dual pass: its operands, and its tangent through `torch.func.jvp`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _torch
from .rows import Rows, Untracked


class Slot:
    """An operand that carries a tangent; `rows` is None where the tangent covers all of it."""

    __slots__ = ("primal", "rows", "tangent")

    def __init__(self, primal: Tensor, tangent: Tensor, rows: Rows | None) -> None:
        self.primal, self.tangent, self.rows = primal, tangent, rows

    @property
    def shape(self) -> torch.Size:
        return self.primal.shape

    @property
    def ndim(self) -> int:
        return self.primal.ndim

    def small(self, x: Tensor | None = None, axis: int | None = None) -> Tensor:
        """The rows of `x`, by default the primal, that carry tangents."""
        x = self.primal if x is None else x
        return x if self.rows is None else self.rows.take(x, axis)


class Out(NamedTuple):
    """The tangent of one output; None is zero."""

    tangent: Tensor | None
    rows: Rows | None = None


UNKNOWN = Out(None, Rows(-1, 0, 0, 0, 0))  # an output that its rule says nothing of, such as attention's statistics


def has_tangent(x: Any) -> bool:
    """Whether `x` is of a kind that can carry a derivative."""
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


def primal(x: Any) -> Any:
    return x.primal if isinstance(x, Slot) else x


def tangent(x: Any) -> Tensor | None:
    return x.tangent if isinstance(x, Slot) else None


def tensors(out: Any) -> list[Any]:
    """The outputs of an ATen call, of which each is a tensor, a list of them or something else."""
    if isinstance(out, (tuple, list)):
        return [x for part in out for x in (part if isinstance(part, (tuple, list)) else (part,))]
    return [out]


class Call:
    """`func(*args, **kwargs)`, with a `Slot` for each operand that carries a tangent."""

    __slots__ = ("args", "func", "jvps", "kwargs", "name")

    def __init__(
        self, func: Any, name: str, args: Any, kwargs: Mapping[str, Any], jvps: list[str] | None = None
    ) -> None:
        self.func, self.name, self.args, self.kwargs = func, name, args, kwargs
        self.jvps = [] if jvps is None else jvps  # filled where a tangent has no rule of its own; copies share it

    def operands(self) -> Iterator[Any]:
        """Slots and plain tensors, in order; those in lists included."""
        for x in (*self.args, *self.kwargs.values()):
            if isinstance(x, (Slot, Tensor)):
                yield x
            elif isinstance(x, (list, tuple)):
                yield from (y for y in x if isinstance(y, (Slot, Tensor)))

    def slots(self) -> list[Slot]:
        return [x for x in self.operands() if isinstance(x, Slot)]

    def sole(self) -> bool:
        """Whether the first argument carries a tangent, and no other."""
        return isinstance(self.args[0], Slot) and len(self.slots()) == 1

    def with_args(self, args: Any, kwargs: Mapping[str, Any]) -> Call:
        return Call(self.func, self.name, args, kwargs, self.jvps)

    def map(self, fn: Callable[[Any], Any]) -> Call:
        """The same call with `fn` applied to slots and tensors."""

        def one(x: Any) -> Any:
            if isinstance(x, (Slot, Tensor)):
                return fn(x)
            if isinstance(x, (list, tuple)) and any(isinstance(y, (Slot, Tensor)) for y in x):
                return [fn(y) if isinstance(y, (Slot, Tensor)) else y for y in x]
            return x

        return self.with_args([one(x) for x in self.args], {k: one(x) for k, x in self.kwargs.items()})

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        """An argument by position or keyword."""
        if len(self.args) > position:
            return self.args[position]
        return self.kwargs.get(name, default)

    def named(self) -> dict[str, Any]:
        """Every argument by its name in the operator's schema, defaults included."""
        arguments = _torch.schema_of(self.func).arguments
        values = {a.name: a.default_value for a in arguments}
        values.update(zip((a.name for a in arguments), self.args, strict=False))
        return values | dict(self.kwargs)

    def dense(self) -> Call:
        """The same call with the tangent of every row given, zeros where there was none."""
        return self.map(
            lambda x: Slot(x.primal, x.rows.fill(x.tangent), None) if isinstance(x, Slot) and x.rows is not None else x
        )

    def rows_from_right(self) -> tuple[int, Rows | None]:
        """The rows common to all slots, aligned as broadcasting aligns, and their dimension counted from the right."""
        first, *others = self.slots()
        rows = first.rows
        from_right = 0 if rows is None else first.ndim - rows.axis
        for slot in others:
            if (slot.rows is None) != (rows is None):
                raise Untracked(self.name)
            if slot.rows is not None and (slot.ndim - slot.rows.axis != from_right or not slot.rows.matches(rows)):
                raise Untracked(self.name)
        return from_right, rows

    def sliced(self, from_right: int, rows: Rows | None) -> Call:
        """The call on the rows that carry tangents alone, operands aligned as broadcasting aligns them."""
        if rows is None or rows.active == rows.batch:
            return self

        def one(x: Any) -> Any:
            if not isinstance(x, (Slot, Tensor)):
                return x
            p = primal(x)
            if p.ndim >= from_right and p.shape[-from_right] == rows.size:
                p = rows.take(p, p.ndim - from_right)
            return Slot(p, x.tangent, None) if isinstance(x, Slot) else p

        return self.with_args([one(x) for x in self.args], {k: one(x) for k, x in self.kwargs.items()})

    def only(self, slot: Slot) -> Call:
        """The call with `slot`, its one operand with rows, cut to those that carry tangents."""
        return self.map(lambda x: Slot(x.small(), x.tangent, None) if x is slot else x)

    def jvp(self) -> list[Tensor]:
        """Tangents of the outputs that can have one, in order, by PyTorch's forward-mode rule of the operator."""
        self.jvps.append(self.name)
        if torch.Tag.nondeterministic_seeded in self.func.tags:
            raise NotImplementedError(f"{self.func}: draws at random, and forward AD would draw anew")
        slots = self.slots()

        def run(*xs: Tensor) -> tuple[Tensor, ...]:
            given = iter(xs)
            filled = self.map(lambda x: next(given) if isinstance(x, Slot) else x)
            return tuple(x for x in tensors(self.func(*filled.args, **filled.kwargs)) if has_tangent(x))

        # PyTorch stores a tangent with its primal's strides, and an expanded one cannot be written
        with _torch.autograd_again(), torch.no_grad():
            primals = tuple(slot.primal.detach().contiguous() for slot in slots)
            return list(torch.func.jvp(run, primals, tuple(slot.tangent for slot in slots))[1])
