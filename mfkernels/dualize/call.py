"""Where the batch is in a tensor, which of its rows carry tangents, and one ATen call on such tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _torch


class Untracked(Exception):
    """The rows with tangents are not the first of one dimension of the result: the other rows need tangents of zero."""


class MixesRows(Exception):
    """The operator makes the result of one sample depend on other samples."""


class Rows(NamedTuple):
    """Dimension `axis` of a tensor runs over (outer, batch, inner); the first `active` of `batch` carry tangents.

    A tangent has these rows alone: its size along `axis` is outer·active·inner, its other sizes are the primal's.
    [B, N, D] has axis 0 and (1, B, 1); flattened to [B·N, D] it has (1, B, N). Transposed to [N, B, D] it has axis 1
    and (1, B, 1); this flattened to [N·B, D] has axis 0 and (N, B, 1).
    """

    axis: int
    outer: int
    batch: int
    inner: int
    active: int

    @property
    def size(self) -> int:
        return self.outer * self.batch * self.inner

    @property
    def active_size(self) -> int:
        return self.outer * self.active * self.inner

    def at(self, axis: int) -> Rows:
        return self if axis == self.axis else Rows(axis, *self[1:])

    def take(self, x: Tensor, axis: int | None = None) -> Tensor:
        """The rows of `x` that carry tangents; a view where `outer` is 1."""
        axis = self.axis if axis is None else axis
        if self.active == self.batch:
            return x
        if self.outer == 1:
            return x.narrow(axis, 0, self.active_size)
        parts = x.unflatten(axis, (self.outer, self.batch, self.inner))
        return parts.narrow(axis + 1, 0, self.active).flatten(axis, axis + 2)

    def shape(self, shape: Sequence[int]) -> list[int]:
        """The tangent's shape for a primal of `shape`."""
        shape = list(shape)
        shape[self.axis] = self.active_size
        return shape

    def fit(self, tangent: Sequence[int], primal: Sequence[int]) -> bool:
        """Whether these can be the shapes of a tangent and its primal."""
        return len(primal) > self.axis and primal[self.axis] == self.size and list(tangent) == self.shape(primal)

    def fill(self, x_dot: Tensor) -> Tensor:
        """The tangent of every row, zero for those that had none."""
        if self.active == self.batch:
            return x_dot
        parts = x_dot.unflatten(self.axis, (self.outer, self.active, self.inner))
        shape = list(parts.shape)
        shape[self.axis + 1] = self.batch - self.active
        return torch.cat([parts, parts.new_zeros(shape)], self.axis + 1).flatten(self.axis, self.axis + 2)

    def reshaped(self, old: Sequence[int], new: Sequence[int]) -> Rows:
        """Where the batch is after a reshape.

        Raises:
            Untracked: one of the new dimensions cuts through the batch.
        """
        if self.axis == 0 < len(new) and new[0] == old[0]:
            return self
        stride = self.inner * math.prod(old[self.axis + 1 :])  # of the batch, in elements
        if stride == 0:
            raise Untracked("reshape")
        below = 1
        for axis in range(len(new) - 1, -1, -1):
            above = below * new[axis]
            if above > stride:  # the batch begins in this dimension
                if stride % below == 0 and above % (stride * self.batch) == 0:
                    return Rows(axis, above // (stride * self.batch), self.batch, stride // below, self.active)
                break
            below = above
        raise Untracked("reshape")


# ------------------------------------------------------------------------------------------------- operands and results


class Slot:
    """An operand that carries a tangent.

    rows: those that the tangent is of; None: all of the operand.
    sample: the only sample that the operand depends on, as x[0] does; None: the samples of `rows`, or not known.
    """

    __slots__ = ("primal", "rows", "sample", "tangent")

    def __init__(self, primal: Tensor, tangent: Tensor, rows: Rows | None, sample: int | None = None) -> None:
        self.primal, self.tangent, self.rows, self.sample = primal, tangent, rows, sample

    @property
    def shape(self) -> torch.Size:
        return self.primal.shape

    @property
    def ndim(self) -> int:
        return self.primal.ndim

    @property
    def from_right(self) -> int:
        """The batch's dimension, counted from the right as in broadcasting; 0 where `rows` is None."""
        return 0 if self.rows is None else self.primal.ndim - self.rows.axis

    def take(self, x: Tensor | None = None, axis: int | None = None) -> Tensor:
        """The rows of `x`, by default the primal, that carry tangents."""
        x = self.primal if x is None else x
        return x if self.rows is None else self.rows.take(x, axis)


class _SlotOnRows(Slot):
    """A Slot cut to its rows; the primal is cut on access, as many rules do not read it."""

    __slots__ = ("whole",)

    def __init__(self, whole: Slot) -> None:
        self.whole, self.tangent, self.rows, self.sample = whole, whole.tangent, None, whole.sample

    @property
    def primal(self) -> Tensor:  # type: ignore[override]
        return self.whole.take()


class Out(NamedTuple):
    """The tangent of one output; None is zero. `rows` and `sample` as a Slot's."""

    tangent: Tensor | None
    rows: Rows | None = None
    sample: int | None = None


# An output whose rule computes no tangent, such as attention's log-sum-exp.
NOT_COMPUTED = Out(None, Rows(-1, 0, 0, 0, 0))


def can_have_tangent(x: Any) -> bool:
    """Whether `x` is a tensor of floating-point or complex numbers."""
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


def primal(x: Any) -> Any:
    return x.primal if isinstance(x, Slot) else x


def tangent(x: Any) -> Tensor | None:
    return x.tangent if isinstance(x, Slot) else None


def leaves(x: Any) -> list[Any]:
    """The values in `x`, an argument or result of an ATen operator: single values and lists of them."""
    return [z for y in x for z in leaves(y)] if isinstance(x, (tuple, list)) else [x]


def mapped(fn: Callable[[Any], Any], x: Any) -> Any:
    """`x` with `fn` applied to each of its values."""
    return [mapped(fn, y) for y in x] if isinstance(x, (tuple, list)) else fn(x)


def differentiable(out: Any) -> list[Tensor]:
    """The outputs of a call that can have tangents."""
    return [x for x in leaves(out) if can_have_tangent(x)]


# --------------------------------------------------------------------------------------------------------------- a call


@cache
def _defaults(func: Any) -> dict[str, Any]:
    """Of every argument of an operator, in order."""
    return {a.name: a.default_value for a in _torch.schema_of(func).arguments}


class Call(NamedTuple):
    """`func(*args, **kwargs)`, with a `Slot` for each operand that carries a tangent.

    jvps: the operators that went through `torch.func.jvp`; shared with the copies that `map` makes.
    """

    func: Any
    name: str
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    jvps: list[str]

    def operands(self) -> list[Slot | Tensor]:
        """The arguments that are Slots or plain tensors, in order."""
        return [x for x in leaves((self.args, *self.kwargs.values())) if isinstance(x, (Slot, Tensor))]

    def slots(self) -> list[Slot]:
        return [x for x in leaves((self.args, *self.kwargs.values())) if isinstance(x, Slot)]

    def only_first(self, ndim: int = 0, axis: int | None = None) -> bool:
        """Whether only the first argument has a tangent, with its rows along `axis`, and at least `ndim` dimensions."""
        x = self.args[0]
        if not isinstance(x, Slot) or x.ndim < ndim or len(self.slots()) > 1:
            return False
        return axis is None or x.rows is None or x.rows.axis == axis

    def map(self, fn: Callable[[Any], Any]) -> Call:
        """The same call with `fn` applied to each argument."""
        kwargs = {k: mapped(fn, x) for k, x in self.kwargs.items()}
        return Call(self.func, self.name, mapped(fn, self.args), kwargs, self.jvps)

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        """An argument by position or keyword."""
        if len(self.args) > position:
            return self.args[position]
        return self.kwargs.get(name, default)

    def named(self) -> dict[str, Any]:
        """Every argument by its name in the operator's schema, defaults included."""
        defaults = _defaults(self.func)
        return {**defaults, **dict(zip(defaults, self.args, strict=False)), **self.kwargs}

    def dense(self) -> Call:
        """The same call with tangents of every row, zero for those that had none."""
        return self.map(
            lambda x: Slot(x.primal, x.rows.fill(x.tangent), None) if isinstance(x, Slot) and x.rows is not None else x
        )

    def refuse_mixing(self) -> None:
        """Check that the operands of an operator that combines them depend on the same samples.

        Raises:
            MixesRows: one depends on a single sample, and another on other samples.
        """
        slots = self.slots()
        single = {x.sample for x in slots if x.sample is not None}
        if len(single) > 1 or (single and any(x.rows is not None for x in slots)):
            raise MixesRows(f"it takes sample {min(single)} together with others")

    def on_rows(self) -> tuple[Call, int, Rows | None]:
        """The call on the rows that carry tangents, operands aligned as broadcasting aligns them.

        Returns:
            The call, the dimension of these rows counted from the right, and the rows.

        Raises:
            Untracked: the rows of two operands are not along the same dimension.
        """
        first, *others = self.slots()
        from_right, rows = first.from_right, first.rows
        for slot in others:
            if slot.from_right != from_right or (slot.rows or ())[1:] != (rows or ())[1:]:
                raise Untracked(self.name)
        if rows is None or rows.active == rows.batch:
            return self, from_right, rows

        def cut(x: Any) -> Any:
            if isinstance(x, Slot):
                return _SlotOnRows(x)
            if isinstance(x, Tensor) and x.ndim >= from_right and x.shape[-from_right] == rows.size:
                return rows.take(x, x.ndim - from_right)
            return x

        return self.map(cut), from_right, rows

    def jvp(self) -> list[Tensor]:
        """Tangents of the outputs that can have one, in order, by PyTorch's forward-mode rule of the operator."""
        self.jvps.append(self.name)
        if torch.Tag.nondeterministic_seeded in self.func.tags:
            raise NotImplementedError(f"{self.func}: draws at random, and forward AD would draw anew")
        slots = self.slots()

        def run(*xs: Tensor) -> tuple[Tensor, ...]:
            given = iter(xs)
            filled = self.map(lambda x: next(given) if isinstance(x, Slot) else x)
            return tuple(differentiable(self.func(*filled.args, **filled.kwargs)))

        # PyTorch stores a tangent with its primal's strides, and an expanded one cannot be written
        with _torch.autograd_again(), torch.no_grad():
            primals = tuple(slot.primal.detach().contiguous() for slot in slots)
            return list(torch.func.jvp(run, primals, tuple(slot.tangent for slot in slots))[1])
