"""y = silu(a)∘b. Both Jacobians are diagonal, so SiLU's VJP kernel gives its part of the JVP in one pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(a: Tensor, b: Tensor) -> Tensor:
    return F.silu(a) * b  # [B, …, D]


def swiglu_tangent(a: Tensor, b: Tensor, a_dot: Tensor | None, b_dot: Tensor | None) -> Tensor:
    """All arguments cut to the tangent rows; a tangent of None is zero, not both are."""
    if a_dot is None:
        assert b_dot is not None
        return F.silu(a) * b_dot  # [B_t, …, D]
    y_dot = torch.ops.aten.silu_backward(a_dot * b, a)  # [B_t, …, D]
    return y_dot if b_dot is None else torch.addcmul(y_dot, F.silu(a), b_dot)
