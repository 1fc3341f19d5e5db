"""The residual update of an adaLN-Zero block, x + gate·(y + bias), the gate one row per sample; and the norm of it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ada_layer_norm.reference import ada_layer_norm, ada_layer_norm_tangent


def with_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else (y + bias).to(y.dtype)  # [B, N, D]


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The sum, and y with the bias, which the tangent reads."""
    y = with_bias(y, bias)
    return torch.addcmul(x, gate[:, None], y), y  # [B, N, D]


def gated_residual_tangent(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    x_dot: Tensor | None,
    y_dot: Tensor | None,
    gate_dot: Tensor | None,
    biased: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """All arguments cut to the tangent rows; a tangent of None is zero.

    The branch is summed first: one rounding at the size of the residual stream instead of two, which in a deep network
    in float32 made du/dt 1.1 times as far from float64.
    """
    y = biased
    dtype = y.dtype if x_dot is None else torch.promote_types(y.dtype, x_dot.dtype)
    branch = None
    if y_dot is not None:
        branch = gate[:, None] * y_dot.to(dtype)  # [B_t, N, D]
    if gate_dot is not None:
        branch = gate_dot[:, None] * y.to(dtype) if branch is None else branch.addcmul_(gate_dot[:, None], y)
    if branch is None:
        return torch.zeros_like(y) if x_dot is None else x_dot
    return branch if x_dot is None else branch.add_(x_dot)


def gated_residual_ada_layer_norm(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    keeps_dtype: bool,
) -> tuple[Tensor, ...]:
    """The sum, its norm in `dtype`, and what the tangent reads."""
    x_new, biased = gated_residual(x, y, gate, bias)  # [B, N, D]
    h, *statistics = ada_layer_norm(x_new, shift, scale, eps, dtype)  # [B, N, D]
    return x_new, h, biased, x_new, *statistics


def gated_residual_ada_layer_norm_tangent(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    x_dot: Tensor | None,
    y_dot: Tensor | None,
    gate_dot: Tensor | None,
    shift_dot: Tensor | None,
    scale_dot: Tensor | None,
    biased: Tensor,
    x_new: Tensor,
    x_hat: Tensor,
    mean: Tensor,
    rstd: Tensor,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    keeps_dtype: bool,
) -> tuple[Tensor | None, Tensor]:
    x_new_dot, dots = None, (x_dot, y_dot, gate_dot)
    if any(dot is not None for dot in dots):
        x_new_dot = gated_residual_tangent(x, y, gate, *dots, biased, bias).to(x_new.dtype)  # [B_t, N, D]
    dots = (x_new_dot, shift_dot, scale_dot)
    return x_new_dot, ada_layer_norm_tangent(x_new, shift, scale, *dots, x_hat, mean, rstd, eps, dtype)
