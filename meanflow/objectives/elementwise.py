"""Functions of numbers that may be Duals, for the coefficients of forms: what `mfkernels.Dual` has no operator for."""

from __future__ import annotations

import torch
from torch import Tensor

from mfkernels import Dual, TensorOrDual
from mfkernels.dual import primal_of


def reciprocal(x: TensorOrDual) -> TensorOrDual:
    """1/x."""
    value = primal_of(x).reciprocal()
    return _chained(value, -value.square(), x)


def sqrt(x: TensorOrDual) -> TensorOrDual:
    """The square root of x > 0."""
    value = primal_of(x).sqrt()
    return _chained(value, 0.5 / value, x)


def log(x: TensorOrDual) -> TensorOrDual:
    """The natural logarithm of x > 0."""
    p = primal_of(x)
    return _chained(p.log(), p.reciprocal(), x)


def clamp(x: TensorOrDual, low: float, high: float) -> TensorOrDual:
    """x in [low, high], with derivative zero outside."""
    p = primal_of(x)
    return _chained(p.clamp(low, high), ((p >= low) & (p <= high)).to(p.dtype), x)


def arctan_ratio(y: TensorOrDual, x: TensorOrDual) -> TensorOrDual:
    """arctan(y/x) of y, x >= 0, of which one is positive."""
    p, q = primal_of(y), primal_of(x)
    value, norm = torch.atan2(p, q), p.square() + q.square()
    if not isinstance(y, Dual) and not isinstance(x, Dual):
        return value
    sides = _chained(value, q / norm, y), _chained(value, -p / norm, x)
    return sum((Dual(torch.zeros_like(value), side.tangent) for side in sides if isinstance(side, Dual)), Dual(value))


def _chained(value: Tensor, slope: Tensor, x: TensorOrDual) -> TensorOrDual:
    """The value, with its derivative where x has one."""
    if not isinstance(x, Dual) or x.tangent is None:
        return Dual(value) if isinstance(x, Dual) else value
    with torch.no_grad():
        return Dual(value, slope[: x.rows] * x.tangent)
