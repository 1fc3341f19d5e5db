"""Tangents written out for the operators that networks spend their time on; every other one goes through jvp.

`x` and `y` are tensors, numbers or slots, already cut to the rows that carry tangents.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _torch
from .call import Slot, primal, tangent

aten = torch.ops.aten


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _times(x: Tensor | None, factor: Any) -> Tensor | None:
    return x if x is None or (isinstance(factor, (int, float)) and factor == 1) else x * factor


def add(x: Any, y: Any, alpha: Any = 1) -> Tensor | None:
    return _sum(tangent(x), _times(tangent(y), alpha))


def sub(x: Any, y: Any, alpha: Any = 1) -> Tensor | None:
    x_dot, y_dot = tangent(x), tangent(y)
    if x_dot is None or y_dot is None:
        return _sum(x_dot, _times(y_dot, -alpha))
    return torch.sub(x_dot, y_dot, alpha=alpha)


def rsub(x: Any, y: Any, alpha: Any = 1) -> Tensor | None:
    return _sum(tangent(y), _times(tangent(x), -alpha))


def mul(x: Any, y: Any) -> Tensor | None:
    a, b = _times(tangent(x), primal(y)), tangent(y)
    if b is None:
        return a
    return b * primal(x) if a is None else torch.addcmul(a, b, primal(x))


def div(x: Any, y: Any) -> Tensor | None:
    p, q, x_dot, y_dot = primal(x), primal(y), tangent(x), tangent(y)
    a = None if x_dot is None else x_dot / q
    return a if y_dot is None else _sum(a, -(p / q) / q * y_dot)


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


def attention_with_mask(q: Any, k: Any, v: Any, mask: Any, is_causal: bool, scale: float | None) -> Tensor:
    """Masked softmax attention's tangent with the scores of the tangent rows materialised; layout [B, H, N, d].

    In float32 or wider.
    """
    wide = torch.promote_types(primal(q).dtype, torch.float32)  # no statistics in half precision
    Q, K, V = (primal(a).to(wide) for a in (q, k, v))
    dots = (tangent(a) for a in (q, k, v, mask))
    q_dot, k_dot, v_dot, mask_dot = (None if dot is None else dot.to(wide) for dot in dots)
    scale = 1 / math.sqrt(Q.shape[-1]) if scale is None else scale
    if K.shape[-3:-2] != Q.shape[-3:-2] and Q.ndim > 2 and K.shape[-3] != 1:  # grouped queries
        n = Q.shape[-3] // K.shape[-3]
        K, V = K.repeat_interleave(n, -3), V.repeat_interleave(n, -3)
        k_dot, v_dot = (None if a is None else a.repeat_interleave(n, -3) for a in (k_dot, v_dot))
    s = Q @ K.mT * scale  # [B_t, H, N_q, N_kv]
    hidden = None
    if is_causal:
        hidden = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1)
    if isinstance(primal(mask), Tensor):
        if primal(mask).dtype == torch.bool:
            hidden = ~primal(mask)
        else:
            s = s + primal(mask)
    if hidden is not None:
        s = s.masked_fill(hidden, float("-inf"))
    p = torch.softmax(s, -1)
    # a query that sees no key: PyTorch's attention gives zero there, softmax NaN
    p = p.masked_fill((s == float("-inf")).all(-1, keepdim=True), 0.0)
    s_dot = mask_dot
    if q_dot is not None:
        s_dot = _sum(s_dot, q_dot @ K.mT * scale)
    if k_dot is not None:
        s_dot = _sum(s_dot, Q @ k_dot.mT * scale)
    o_dot = None
    if s_dot is not None:
        s_dot = s_dot.expand_as(p)
        p_dot = p * (s_dot - (p * s_dot).sum(-1, keepdim=True))
        o_dot = p_dot @ V
    if v_dot is not None:
        o_dot = _sum(o_dot, p @ v_dot)
    assert o_dot is not None
    return o_dot


ELEMENTWISE: dict[str, Callable[..., Tensor | None]] = {
    "add": add,
    "sub": sub,
    "rsub": rsub,
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
