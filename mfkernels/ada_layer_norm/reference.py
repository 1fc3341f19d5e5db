"""Adaptive layer norm: x̂ = (x − mean)·rstd, y = x̂ (1 + scale) + shift.

The Jacobian of x̂ is symmetric, so LayerNorm's own VJP kernel, without weight, gives its JVP in one pass:
x̂_dot = rstd·(ẋ − mean(ẋ) − x̂·mean(x̂∘ẋ)).
"""

from __future__ import annotations

import torch
from torch import Tensor


def ada_layer_norm(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y in `dtype`, and what the tangent reads: x̂, mean, rstd."""
    x_hat, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, eps)  # [B, N, D], [B, N, 1] twice
    y = torch.addcmul(shift[:, None], x_hat, 1 + scale[:, None])  # [B, N, D]
    return y.to(dtype), x_hat, mean, rstd


def ada_layer_norm_tangent(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    x_dot: Tensor | None,
    shift_dot: Tensor | None,
    scale_dot: Tensor | None,
    x_hat: Tensor,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """All arguments cut to the tangent rows; a tangent of None is zero, not all three are."""
    y_dot = torch.zeros_like(x_hat) if shift_dot is None else shift_dot[:, None].expand_as(x_hat)  # [B_t, N, D]
    if x_dot is not None:
        x_hat_dot, _, _ = torch.ops.aten.native_layer_norm_backward(
            x_dot, x, x.shape[-1:], mean, rstd, None, None, [True, False, False]
        )  # [B_t, N, D]
        y_dot = torch.addcmul(y_dot, x_hat_dot, 1 + scale[:, None])
    if scale_dot is not None:
        y_dot = torch.addcmul(y_dot, x_hat, scale_dot[:, None])
    return y_dot
