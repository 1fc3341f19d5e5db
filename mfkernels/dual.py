"""Dual numbers for batches of tensors: the type `Dual`, its arithmetic, its maps and the mark `dual_aware`."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from numbers import Number
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ._torch import before_compile, tree_flatten, tree_unflatten

T = TypeVar("T")


class Dual(NamedTuple):
    """A primal and the tangent (directional derivative) of its first rows.

    A `Dual` is a tuple, so pytrees, DDP, FSDP2, activation checkpointing and torch.compile see through it. Arithmetic
    (`+ - * /`, unary `-`) works as on tensors; everything else is a function of this package.

    Args:
        primal: (B, …) an ordinary tensor, on the autograd tape as usual.
        tangent: (B_t, …) with B_t <= B: the derivative of the FIRST B_t batch rows; the other rows have tangent zero
            and cost nothing. `None` is a tangent of zero for every row. It has the primal's dtype and device and never
            requires grad: gradients stop at tangents by design.
    """

    primal: Tensor
    tangent: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return self.primal.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.primal.dtype

    @property
    def device(self) -> torch.device:
        return self.primal.device

    @property
    def rows(self) -> int:
        """Number of rows that carry a tangent."""
        return 0 if self.tangent is None else self.tangent.shape[0]

    # A tuple's own `+` and `*` concatenate and repeat; on duals that would be a silent mistake.
    def __add__(self, other: Any) -> Dual:
        return _add(self, other, 1.0)

    def __radd__(self, other: Any) -> Dual:
        return _add(self, other, 1.0)

    def __sub__(self, other: Any) -> Dual:
        return _add(self, other, -1.0)

    def __rsub__(self, other: Any) -> Dual:
        return _add(-self, other, 1.0)

    def __neg__(self) -> Dual:
        return linear_map(torch.neg, self)

    def __mul__(self, other: Any) -> Dual:
        return _mul(self, other)

    def __rmul__(self, other: Any) -> Dual:
        return _mul(self, other)

    def __truediv__(self, other: Any) -> Dual:
        if isinstance(other, Dual):
            raise TypeError("other: a Dual can be divided by a tensor or a number, got a Dual")
        _check_operands(self, other)
        p = _same_batch(self.primal / other, self)
        if self.tangent is None:
            return Dual(p)
        with torch.no_grad():
            t = self.tangent / leading(other, self.rows, p.ndim)
            return Dual(p, t.expand(self.rows, *p.shape[1:]).to(p.dtype))


# NumPy leaves `array * dual` to __rmul__, and does not take a Dual for a sequence.
Dual.__array_ufunc__ = None  # type: ignore[attr-defined]

TensorOrDual = Tensor | Dual


# ------------------------------------------------------------------------------------------ its parts, and maps of them


def primal_of(x: Any) -> Any:
    """The primal of a Dual; anything else unchanged."""
    return x.primal if isinstance(x, Dual) else x


def tangent_of(x: Any) -> Tensor | None:
    """The tangent of a Dual; None (zero) for anything else."""
    return x.tangent if isinstance(x, Dual) else None


def tangent_rows(*xs: Any) -> int | None:
    """Rows of the longest tangent among `xs`; None when none of them has a tangent."""
    rows = [x.tangent.shape[0] for x in xs if isinstance(x, Dual) and x.tangent is not None]
    return max(rows) if rows else None


def padded_tangent(x: Any, rows: int) -> Tensor | None:
    """The tangent of `x` as `rows` rows, the missing ones zero; None when `x` has no tangent."""
    t = tangent_of(x)
    if t is None or t.shape[0] == rows:
        return t
    return torch.cat([t, t.new_zeros(rows - t.shape[0], *t.shape[1:])])


def leading(x: Any, rows: int, ndim: int) -> Any:
    """The first `rows` batch rows of a tensor that broadcasts against an `ndim`-dimensional batch (numbers pass)."""
    return x[:rows] if isinstance(x, Tensor) and x.ndim == ndim and x.shape[0] > 1 else x


def linear_map(fn: Callable[[Tensor], Tensor], x: TensorOrDual) -> Any:
    """Apply a map that is linear in `x` and keeps the batch first (reshape, permute, scaling …) to primal and tangent.

    Args:
        fn: the map, called on the primal and, under no_grad, on the tangent.
        x: (B, …) tensor or Dual.
    """
    if not isinstance(x, Dual):
        return fn(x)
    y = fn(x.primal)
    if x.tangent is None:
        return Dual(y)
    with torch.no_grad():
        return Dual(y, fn(x.tangent))


def split_map(fn: Callable[[Tensor], Sequence[Tensor]], x: TensorOrDual) -> tuple[Any, ...]:
    """`linear_map` for a map with several outputs (unbind, chunk, split)."""
    if not isinstance(x, Dual):
        return tuple(fn(x))
    ps = fn(x.primal)
    if x.tangent is None:
        return tuple(Dual(p) for p in ps)
    with torch.no_grad():
        return tuple(Dual(p, t) for p, t in zip(ps, fn(x.tangent), strict=True))


def map_output(fn: Callable[[Any], Any], out: Any) -> Any:
    """`fn` of the leaves, Duals among them, of what a module returned: a pytree, or a dataclass as in diffusers."""
    if isinstance(out, (Tensor, Dual)):
        return fn(out)
    if dataclasses.is_dataclass(out) and not isinstance(out, type):
        changed: Any = copy.copy(out)
        for field in dataclasses.fields(out):
            value = map_output(fn, getattr(out, field.name))
            if isinstance(changed, dict) and field.name in changed:
                changed[field.name] = value
            else:
                object.__setattr__(changed, field.name, value)
        return changed
    if isinstance(out, Mapping):
        changed = out.copy() if isinstance(out, dict) else {}
        for key, value in out.items():
            changed[key] = map_output(fn, value)
        return changed
    if isinstance(out, (tuple, list)):
        make: Any = out._make if hasattr(out, "_make") else type(out)  # a NamedTuple takes its fields one by one
        return make([map_output(fn, x) for x in out])
    leaves, spec = tree_flatten(out)  # types that the user has registered
    return tree_unflatten([fn(x) if x is out else map_output(fn, x) for x in leaves], spec)


def unshared(x: Tensor) -> Tensor:
    """A copy for a function that may write into its arguments: the caller's tensors are not its own.

    Its strides stay, on which the last bit of a result may depend: what is expanded takes no more memory than it did.
    With a gradient that stays as it is: PyTorch refuses most writes into it, and `dualize` all that reach the caller's.
    """
    for axis, (n, step) in enumerate(zip(x.shape, x.stride(), strict=True)):
        if step == 0 and n > 1:
            return x if x.requires_grad else unshared(x.narrow(axis, 0, 1)).expand(x.shape)
    y = x.clone()
    if y.stride() != x.stride():
        y = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)
    return y


def check_tangent(name: str, primal: Tensor, tangent: Tensor) -> None:
    """Raise unless `tangent` can be the tangent of the first rows of `primal`."""
    if not isinstance(tangent, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tangent).__name__}")
    if tangent.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense (strided) tensor, got layout {tangent.layout}")
    if primal.ndim == 0:
        raise ValueError(f"{name}: expected a primal (B, …) with a batch, got a scalar")
    if not (primal.is_floating_point() or primal.is_complex()):
        raise TypeError(f"{name}: a {primal.dtype} primal has no tangent")
    if tangent.dtype != primal.dtype:
        raise TypeError(f"{name}: expected the primal's dtype {primal.dtype}, got {tangent.dtype}")
    if tangent.device != primal.device:
        raise ValueError(f"{name}: expected the primal's device {primal.device}, got {tangent.device}")
    if tangent.ndim != primal.ndim or tangent.shape[1:] != primal.shape[1:]:
        raise ValueError(
            f"{name}: expected shape (rows, {', '.join(map(str, primal.shape[1:]))}) after a primal of shape "
            f"{tuple(primal.shape)}, got {tuple(tangent.shape)}"
        )
    if tangent.shape[0] > primal.shape[0]:
        raise ValueError(f"{name}: expected at most {primal.shape[0]} rows (the batch), got {tangent.shape[0]}")
    if tangent.requires_grad:
        raise ValueError(f"{name}: a tangent must not require grad (gradients stop at tangents); pass it detached")


# ----------------------------------------------------------------------------------------------------------- arithmetic


def _same_batch(out: Tensor, *operands: Any) -> Tensor:
    """`out`, if its rows are those of every Dual operand: broadcasting over a batch would move the tangents' rows."""
    for x in operands:
        if isinstance(x, Dual) and (x.primal.ndim != out.ndim or x.primal.shape[0] != out.shape[0]):
            raise ValueError(
                f"other: expected an operand that leaves the rows of a Dual of shape {tuple(x.shape)} in place, got a "
                f"result of shape {tuple(out.shape)}; expand the Dual to it first"
            )
    return out


def _check_operands(x: Dual, other: Any) -> None:
    """The operands of arithmetic are Duals whose tangents fit their primals, tensors or numbers."""
    if not isinstance(other, (Dual, Tensor, int, float, Number)):
        raise TypeError(f"other: expected a Dual, a tensor or a number, got {type(other).__name__}")
    for name, a in (("self", x), ("other", other)):
        if isinstance(a, Dual) and not isinstance(a.primal, Tensor):
            raise TypeError(f"{name}.primal: expected a tensor, got {type(a.primal).__name__}")
        if isinstance(a, Dual) and a.tangent is not None:
            check_tangent(f"{name}.tangent", a.primal, a.tangent)


def _add(x: Dual, other: Any, sign: float) -> Dual:
    _check_operands(x, other)
    p = x.primal + primal_of(other) if sign > 0 else x.primal - primal_of(other)
    _same_batch(p, x, other)
    rows = tangent_rows(x, other)
    if rows is None:
        return Dual(p)
    with torch.no_grad():
        a, b = padded_tangent(x, rows), padded_tangent(other, rows)
        if a is None:
            assert b is not None
            t = b if sign > 0 else -b
        elif b is None:
            t = a
        else:
            t = torch.add(a, b, alpha=sign)
        return Dual(p, t.expand(rows, *p.shape[1:]).to(p.dtype))


def _mul(x: Dual, other: Any) -> Dual:
    _check_operands(x, other)
    q = primal_of(other)
    p = _same_batch(x.primal * q, x, other)
    rows = tangent_rows(x, other)
    if rows is None:
        return Dual(p)
    with torch.no_grad():
        a, b = padded_tangent(x, rows), padded_tangent(other, rows)
        t = torch.zeros_like(p[:rows])
        if a is not None:
            t = t + a * leading(q, rows, p.ndim)
        if b is not None:
            t = t + leading(x.primal, rows, p.ndim) * b
        return Dual(p, t.to(p.dtype))


# ------------------------------------------------------------------------------------------------- dual-aware callables


def dual_aware(fn: T) -> T:
    """Mark a module class or function as taking `Dual`s: `jvp` then runs it once, on duals.

    The mark is a promise that every operation inside is one of this package's, or is applied through `linear_map`.
    """
    fn.__dual_aware__ = True  # type: ignore[attr-defined]
    return fn


def unwrapped(fn: Any) -> Any:
    """The module inside wrappers that only forward their call (DDP, accelerate, torch.compile)."""
    seen = fn
    while isinstance(seen, nn.Module):
        inner = before_compile(seen)
        if inner is None and isinstance(seen, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            inner = seen.module
        if inner is None:
            break
        seen = inner
    return seen


def is_dual_aware(fn: Any) -> bool:
    """Whether `jvp` may call `fn` on Duals (see `dual_aware`); sees through DDP and torch.compile wrappers."""
    return bool(getattr(unwrapped(fn), "__dual_aware__", False))
