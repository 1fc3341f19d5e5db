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
    """All arguments cut to the tangent rows; a tangent of None is zero."""
    out = torch.zeros_like(y) if x_dot is None else x_dot  # [B_t, N, D]
    if y_dot is not None:
        out = torch.addcmul(out, gate[:, None], y_dot)
    if gate_dot is not None:
        out = torch.addcmul(out, gate_dot[:, None], y)
    return out
