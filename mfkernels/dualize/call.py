"""One intercepted PyTorch call: its operands, and its tangent through `torch.func.jvp`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ..dual import _RefuseSilentZeros
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


class Out(NamedTuple):
    """The tangent of one output; None is zero."""

    tangent: Tensor | None
    rows: Rows | None


def has_tangent(x: Any) -> bool:
    """Whether `x` is of a kind that can carry a derivative."""
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


def primal(x: Any) -> Any:
    return x.primal if isinstance(x, Slot) else x


def tangent(x: Any) -> Tensor | None:
    return x.tangent if isinstance(x, Slot) else None


# not a closure: one that calls itself is a reference cycle, and would keep tangents until the garbage collector comes
def _applied(fn: Callable[[Any], Any], x: Any) -> Any:
    if isinstance(x, (Slot, Tensor)):
        return fn(x)
    if isinstance(x, (list, tuple)) and any(isinstance(y, (Slot, Tensor)) for y in x):
        return type(x)(_applied(fn, y) for y in x) if type(x) in (list, tuple) else [_applied(fn, y) for y in x]
    return x


class Call:
    """`func(*args, **kwargs)`, with a `Slot` for each operand that carries a tangent."""

    def __init__(self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.func, self.name, self.args, self.kwargs = func, name, args, kwargs
        self.through_jvp = False  # set where the tangent has no rule of its own
        self.noise: Any = None  # what dropout multiplied by

    def operands(self) -> Iterator[Any]:
        """Slots and plain tensors, in order; those in lists included."""
        for x in (*self.args, *self.kwargs.values()):
            if isinstance(x, (Slot, Tensor)):
                yield x
            elif isinstance(x, (list, tuple)):
                yield from (y for y in x if isinstance(y, (Slot, Tensor)))

    def slots(self) -> list[Slot]:
        return [x for x in self.operands() if isinstance(x, Slot)]

    def map(self, fn: Callable[[Any], Any]) -> Call:
        """The same call with `fn` applied to slots and tensors."""
        args = tuple(_applied(fn, x) for x in self.args)
        return Call(self.func, self.name, args, {k: _applied(fn, x) for k, x in self.kwargs.items()})

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        """An argument by position or keyword."""
        if len(self.args) > position:
            return self.args[position]
        return self.kwargs.get(name, default)

    def dense(self) -> Call:
        """The same call with the tangent of every row given, zeros where there was none."""
        return self.map(
            lambda x: Slot(x.primal, x.rows.fill(x.tangent), None) if isinstance(x, Slot) and x.rows is not None else x
        )

    def rows_from_right(self) -> tuple[int, Rows | None]:
        """The rows common to all slots, aligned as broadcasting aligns, and their dimension counted from the right."""
        found: tuple[int, Rows | None] | None = None
        for slot in self.slots():
            rows = slot.rows
            here = (0, None) if rows is None else (slot.ndim - rows.axis, rows.at(0))
            if found is not None and here != found:
                raise Untracked(self.name)
            found = here
        assert found is not None
        return found

    def sliced(self, from_right: int, rows: Rows | None) -> Call:
        """The call on the rows that carry tangents alone, operands aligned as broadcasting aligns them."""
        if rows is None or rows.active == rows.batch:
            return self

        def one(x: Any) -> Any:
            p = primal(x)
            if p.ndim >= from_right and p.shape[-from_right] == rows.size:
                p = rows.take(p, p.ndim - from_right)
            return Slot(p, x.tangent, None) if isinstance(x, Slot) else p

        return self.map(one)

    def only(self, slot: Slot, rows: Rows | None) -> Call:
        """The call with `slot`, its one operand with rows, cut to those that carry tangents."""
        if rows is None:
            return self
        return self.map(lambda x: Slot(rows.take(x.primal), x.tangent, None) if x is slot else x)

    def jvp(self) -> list[Tensor]:
        """Tangents of the outputs that can have one, in order, by `torch.func.jvp` of the function itself."""
        self.through_jvp = True
        leaves, spec = tree_flatten((list(self.args), dict(self.kwargs)))
        active = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Slot)]
        in_place = self.name.endswith("_")

        def run(*xs: Tensor) -> tuple[Tensor, ...]:
            filled = list(leaves)
            for i, x in zip(active, xs, strict=True):
                filled[i] = x
            args, kwargs = tree_unflatten(filled, spec)
            if in_place:
                args[0] = args[0].clone()
            return tuple(x for x in tree_leaves(self.func(*args, **kwargs)) if has_tangent(x))

        with _RefuseSilentZeros():
            slots = [leaves[i] for i in active]
            return list(
                torch.func.jvp(
                    run,
                    tuple(slot.primal.detach() for slot in slots),
                    tuple(slot.tangent for slot in slots),
                )[1]
            )
