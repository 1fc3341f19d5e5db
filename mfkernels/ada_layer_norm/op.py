from __future__ import annotations

import torch
from torch import Tensor

from ..backend import choose
from ..checks import check_operand, check_same, check_shape
from ..dual import Dual, TensorOrDual, padded_tangent, primal_of, tangent_rows
from . import reference


def ada_layer_norm(
    x: TensorOrDual,
    shift: TensorOrDual,
    scale: TensorOrDual,
    *,
    eps: float = 1e-6,
) -> TensorOrDual:
    """LayerNorm without weights, then the sample's own scale and shift: y = x̂ (1 + scale) + shift.

    DiT's "modulate(norm(x), shift, scale)" (arXiv 2212.09748, §3.2, adaLN). Statistics are computed in float32 or
    better. Tangent: ẏ = x̂_dot (1 + scale) + x̂∘scale_dot + shift_dot, x̂_dot = rstd·(ẋ − mean(ẋ) − x̂·mean(x̂∘ẋ)).

    Args:
        x: (B, N, D) tensor or Dual.
        shift, scale: (B, D) tensors or Duals; views with any strides.
        eps: added to the variance, >= 0.

    Returns:
        (B, N, D); a Dual if any argument is one.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    check_ada_layer_norm(x, shift, scale, eps)
    choose("ada_layer_norm", x.device, {})
    return run(x, shift, scale, eps)


def check_ada_layer_norm(x: TensorOrDual, shift: TensorOrDual, scale: TensorOrDual, eps: float) -> None:
    check_operand("x", x, 3)
    for name, m in (("shift", shift), ("scale", scale)):
        check_operand(name, m, 2)
        check_shape(name, m, (x.shape[0], x.shape[2]), "(B, D) of x")
        check_same(name, m, "x", x)
    if eps < 0:
        raise ValueError(f"eps: expected a number >= 0, got {eps}")


def run(x: TensorOrDual, shift: TensorOrDual, scale: TensorOrDual, eps: float) -> TensorOrDual:
    xp, sp, cp = primal_of(x), primal_of(shift), primal_of(scale)
    y, (x_hat, mean, rstd) = reference.ada_layer_norm(xp, sp, cp, eps)
    if not any(isinstance(a, Dual) for a in (x, shift, scale)):
        return y
    rows = tangent_rows(x, shift, scale)
    if rows is None:
        return Dual(y)

    def first(a: Tensor) -> Tensor:
        return a[:rows]

    with torch.no_grad():
        y_dot = reference.ada_layer_norm_tangent(
            x=first(xp),
            scale=first(cp),
            x_dot=padded_tangent(x, rows),
            shift_dot=padded_tangent(shift, rows),
            scale_dot=padded_tangent(scale, rows),
            x_hat=first(x_hat),
            mean=first(mean),
            rstd=first(rstd),
        )
        return Dual(y, y_dot.to(y.dtype))
