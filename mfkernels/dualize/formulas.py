"""Tangents written out for the operators that networks spend their time on; every other one goes through jvp.

`x` and `y` are tensors, numbers or slots, already cut to the rows that carry tangents.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _torch
from .call import Slot, primal, tangent

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


def gelu(x: Any, approximate: str = "none") -> Tensor:
    return aten.gelu_backward(x.tangent, x.primal, approximate=approximate)


def where(condition: Any, x: Any, y: Any) -> Tensor:
    a, b = tangent(x), tangent(y)
    zero = (b if a is None else a).new_zeros(())  # type: ignore[union-attr]
    return torch.where(condition, zero if a is None else a, zero if b is None else b)


def masked_fill(x: Any, mask: Tensor, value: Any) -> Tensor:
    v_dot = tangent(value)
    if v_dot is None:
        return x.tangent.masked_fill(mask, 0)
    x_dot = tangent(x)
    return torch.where(mask, v_dot, torch.zeros_like(primal(x)) if x_dot is None else x_dot)


def _slope(slope: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda x: x.tangent * slope(x.primal)


def softmax(x_dot: Tensor, dim: int, p: Tensor) -> Tensor:
    # softmax's Jacobian diag(p) − ppᵀ is symmetric: its VJP kernel is its JVP
    return _torch.softmax_backward(x_dot.to(p.dtype), p, dim, p.dtype)


def layer_norm(x: Tensor, x_dot: Tensor, shape: Any, mean: Tensor, rstd: Tensor, weight: Tensor | None) -> Tensor:
    # the Jacobian of x̂ is symmetric: LayerNorm's VJP kernel, without weight, is its JVP
    mask = [True, False, False]
    x_hat_dot = aten.native_layer_norm_backward(
        x_dot.contiguous(), x.contiguous(), shape, mean.contiguous(), rstd.contiguous(), None, None, mask
    )[0]
    return x_hat_dot if weight is None else x_hat_dot * weight


ELEMENTWISE: dict[str, Callable[..., Tensor | None]] = {
    "add": add,
    "sub": lambda x, y, alpha=1: add(x, y, -alpha),
    "rsub": lambda x, y, alpha=1: add(y, x, -alpha),
    "mul": mul,
    "div": div,
    "pow": power,
    "gelu": gelu,
    "where": where,
    "masked_fill": masked_fill,
    "neg": lambda x: -x.tangent,
    "exp": _slope(torch.exp),
    "sin": _slope(torch.cos),
    "cos": _slope(lambda x: -torch.sin(x)),
    "sqrt": _slope(lambda x: 0.5 * torch.rsqrt(x)),
    "rsqrt": _slope(lambda x: -0.5 * torch.rsqrt(x) / x),
    "reciprocal": _slope(lambda x: -torch.reciprocal(x).square()),
    "silu": lambda x: aten.silu_backward(x.tangent, x.primal),
    "relu": lambda x: aten.threshold_backward(x.tangent, x.primal, 0),
    "sigmoid": lambda x: aten.sigmoid_backward(x.tangent, torch.sigmoid(x.primal)),
    "tanh": lambda x: aten.tanh_backward(x.tangent, torch.tanh(x.primal)),
}
# right for complex numbers as they stand; PyTorch's rules take the conjugates of the others
HOLOMORPHIC = frozenset(["add", "sub", "rsub", "mul", "neg", "where", "masked_fill"])
