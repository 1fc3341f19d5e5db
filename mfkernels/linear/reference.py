"""y = x Wᵀ + b; the tangent goes through the same weight, the bias is the primal's alone."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)  # [B, …, D_out]


def linear_tangent(x_dot: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x_dot, weight)  # [B_t, …, D_out]
