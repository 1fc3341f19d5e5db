"""Rules of operators in which row i of the result depends on row i of each operand.

`x` and `y` of the formulas are tensors, numbers or slots, already cut to the rows that carry tangents.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..silu.reference import silu_tangent
from .call import Call, MixesRows, Out, Slot, differentiable, primal, tangent
from .views import broadcast, by_jvp

aten = torch.ops.aten


def total(a: Tensor | None, b: Tensor | None = None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def times(x: Any, factor: Any) -> Any:
    return x if x is None or (isinstance(factor, (int, float)) and factor == 1) else x * factor


def add(x: Any, y: Any, alpha: Any = 1) -> Tensor | None:
    a, b = tangent(x), tangent(y)
    return total(a, times(b, alpha)) if a is None or b is None else torch.add(a, b, alpha=alpha)


def mul(x: Any, y: Any) -> Tensor | None:
    a, b = times(tangent(x), primal(y)), tangent(y)
    if b is None:
        return a
    return b * primal(x) if a is None else torch.addcmul(a, b, primal(x))


def div(x: Any, y: Any) -> Tensor | None:
    p, q, x_dot, y_dot = primal(x), primal(y), tangent(x), tangent(y)
    a = None if x_dot is None else x_dot / q
    return a if y_dot is None else total(a, -(p / q) / q * y_dot)


def power(x: Any, n: Any) -> Tensor | None:
    if not isinstance(x, Slot) or not isinstance(n, (int, float)) or isinstance(n, bool):
        return None
    return torch.zeros_like(x.tangent) if n == 0 else x.tangent * (n * x.primal ** (n - 1))


def where(condition: Any, x: Any, y: Any) -> Tensor:
    a, b = tangent(x), tangent(y)
    zero = (b if a is None else a).new_zeros(())  # type: ignore[union-attr]
    return torch.where(condition, zero if a is None else a, zero if b is None else b)


def _slope(slope: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda x: x.tangent * slope(x.primal)


ELEMENTWISE: dict[str, Callable[..., Tensor | None]] = {
    "add": add,
    "sub": lambda x, y, alpha=1: add(x, y, -alpha),
    "rsub": lambda x, y, alpha=1: add(y, x, -alpha),
    "mul": mul,
    "div": div,
    "pow": power,
    "where": where,
    "masked_fill": lambda x, mask, value: where(mask, value, x),
    "neg": lambda x: -x.tangent,
    "exp": _slope(torch.exp),
    "sin": _slope(torch.cos),
    "cos": _slope(lambda x: -torch.sin(x)),
    "sqrt": _slope(lambda x: 0.5 * torch.rsqrt(x)),
    "rsqrt": _slope(lambda x: -0.5 * torch.rsqrt(x) / x),
    "reciprocal": _slope(lambda x: -torch.reciprocal(x).square()),
    "gelu": lambda x, approximate="none": aten.gelu_backward(x.tangent, x.primal, approximate=approximate),
    "silu": lambda x: silu_tangent(x.primal, x.tangent),
    "relu": lambda x: aten.threshold_backward(x.tangent, x.primal, 0),
    "sigmoid": lambda x: aten.sigmoid_backward(x.tangent, torch.sigmoid(x.primal)),
    "tanh": lambda x: aten.tanh_backward(x.tangent, torch.tanh(x.primal)),
}
# Formulas that hold for complex numbers too; those of the others need conjugates, which PyTorch's own rules have.
HOLOMORPHIC = frozenset(["add", "sub", "rsub", "mul", "neg", "where", "masked_fill"])


# ------------------------------------------------------------------------------------------------------------ the rules


def elementwise(call: Call, out: Any) -> list[Out]:
    """By a formula of `ELEMENTWISE`, or by PyTorch's rule."""
    call.refuse_mixing()
    axes = {x.from_right for x in call.slots() if x.rows is not None}
    if len(axes) > 1:
        raise MixesRows(f"it broadcasts the batch along {len(axes)} dimensions, as differences of all pairs do")
    inner, from_right, rows = call.on_rows()
    formula, t = ELEMENTWISE.get(call.name), None
    if formula is not None and (call.name in HOLOMORPHIC or not out.is_complex()):
        try:
            t = formula(*inner.args, **inner.kwargs)
        except (TypeError, AttributeError):  # arguments that it does not take (rounding_mode=, a mask with a tangent)
            t = None
    if t is not None:
        return [broadcast(t, out, from_right, rows)]
    return [broadcast(t, o, from_right, rows) for t, o in zip(inner.jvp(), differentiable(out), strict=True)]


def dropout(call: Call, out: Any) -> list[Out]:
    """native_dropout, by the mask that it returns."""
    x, p, mask = call.args[0], call.args[1], out[1]
    if call.arg(2, "train") is False:
        return [Out(x.tangent, x.rows)]
    return [Out(x.tangent * x.take(mask) * (0.0 if p == 1 else 1 / (1 - p)), x.rows)]


def rrelu(call: Call, out: Any) -> list[Out]:
    """rrelu_with_noise, by the slopes that it wrote into its second argument."""
    if not call.only_first():
        return by_jvp(call, out)
    (x, noise), given = call.args[:2], call.named()
    limits = given["lower"], given["upper"], given["training"], False
    return [Out(torch.ops.aten.rrelu_with_noise_backward(x.tangent, x.take(), x.take(noise), *limits), x.rows)]
