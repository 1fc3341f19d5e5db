"""y = x Wᵀ + b; the tangent goes through the same weight, the bias is the primal's alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`dtype` is the product's, which PyTorch's own chooses by itself."""
    return F.linear(x, weight, bias)  # [B, …, D_out]


def linear_tangent(x: Tensor, x_dot: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return F.linear(x_dot, weight)  # [B_t, …, D_out]
