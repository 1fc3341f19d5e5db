"""The residual update of an adaLN-Zero block: x + gate·y, the gate one row per sample."""

from __future__ import annotations

import torch
from torch import Tensor


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return torch.addcmul(x, gate[:, None], y)  # [B, N, D]


def gated_residual_tangent(
    y: Tensor,
    gate: Tensor,
    x_dot: Tensor | None,
    y_dot: Tensor | None,
    gate_dot: Tensor | None,
) -> Tensor:
    """All arguments cut to the tangent rows; a tangent of None is zero.

    The branch is summed first: one rounding at the size of the residual stream instead of two, which in a deep network
    in float32 made du/dt 1.1 times as far from float64.
    """
    dtype = y.dtype if x_dot is None else torch.promote_types(y.dtype, x_dot.dtype)
    branch = None
    if y_dot is not None:
        branch = gate[:, None] * y_dot.to(dtype)  # [B_t, N, D]
    if gate_dot is not None:
        branch = gate_dot[:, None] * y.to(dtype) if branch is None else branch.addcmul_(gate_dot[:, None], y)
    if branch is None:
        return torch.zeros_like(y) if x_dot is None else x_dot
    return branch if x_dot is None else branch.add_(x_dot)
