from __future__ import annotations

import torch
from torch import Tensor

from ..backend import choose
from ..checks import check_operand, check_shape
from ..dual import Dual, TensorOrDual
from . import reference


def mlp(
    x: TensorOrDual,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
) -> TensorOrDual:
    """Two-layer perceptron with the tanh form of GELU: y = gelu(x W₁ᵀ + b₁) W₂ᵀ + b₂.

    The tangent is ẏ = (gelu'(h) ∘ ẋ W₁ᵀ) W₂ᵀ at the pre-activation h (arXiv 1606.08415 for GELU).

    Args:
        x: (B, …, D_in) tensor or Dual.
        w1: (D_hidden, D_in); b1: (D_hidden,) or None.
        w2: (D_out, D_hidden); b2: (D_out,) or None.

    Returns:
        (B, …, D_out), of the kind of `x`.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    check_operand("x", x)
    check_operand("w1", w1, 2)
    check_operand("w2", w2, 2)
    if x.shape[-1] != w1.shape[1]:
        raise ValueError(f"x: expected last size {w1.shape[1]} (D_in of w1), got shape {tuple(x.shape)}")
    if w2.shape[1] != w1.shape[0]:
        raise ValueError(f"w2: expected (D_out, {w1.shape[0]}) after w1 {tuple(w1.shape)}, got {tuple(w2.shape)}")
    for name, b, w in (("b1", b1, w1), ("b2", b2, w2)):
        if b is not None:
            check_shape(name, b, (w.shape[0],), f"({w.shape[0]},)")
    choose("mlp", x.device, {})
    if not isinstance(x, Dual):
        return reference.mlp(x, w1, b1, w2, b2)[0]
    y, h = reference.mlp(x.primal, w1, b1, w2, b2)
    if x.tangent is None:
        return Dual(y)
    with torch.no_grad():
        return Dual(y, reference.mlp_tangent(h[: x.rows], x.tangent, w1, w2))
