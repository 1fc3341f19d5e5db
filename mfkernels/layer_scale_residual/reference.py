"""x + scale·y with one learned factor per channel, the same for every sample."""

from __future__ import annotations

import torch
from torch import Tensor


def layer_scale_residual(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(x, y, scale).to(torch.promote_types(x.dtype, y.dtype))  # [B, …, D]


def layer_scale_residual_tangent(
    x: Tensor, y: Tensor, x_dot: Tensor | None, y_dot: Tensor | None, scale: Tensor
) -> Tensor:
    """All cut to the tangent rows; a tangent of None is zero, not both are."""
    if y_dot is None:
        assert x_dot is not None
        return x_dot  # [B_t, …, D]
    return y_dot * scale if x_dot is None else torch.addcmul(x_dot, y_dot, scale)  # [B_t, …, D]
