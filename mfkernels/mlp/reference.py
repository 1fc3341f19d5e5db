"""linear → GELU (tanh form) → linear. The backward keeps x, h and a, as a plain MLP does."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def mlp(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """y, and the pre-activation h, which the tangent reads; `dtype` is the products', which PyTorch chooses itself."""
    h = F.linear(x, w1, b1)  # [B, …, D_hidden]
    a = F.gelu(h, approximate="tanh")  # [B, …, D_hidden]
    return F.linear(a, w2, b2), h


def mlp_tangent(
    x: Tensor,
    x_dot: Tensor,
    h: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    h_dot = F.linear(x_dot, w1)  # [B_t, …, D_hidden]
    # GELU's Jacobian is diagonal: its VJP kernel is its JVP, derivative and product in one pass
    a_dot = torch.ops.aten.gelu_backward(h_dot, h, approximate="tanh")  # [B_t, …, D_hidden]
    return F.linear(a_dot, w2)  # [B_t, …, D_out]
