"""RMSNorm: x̂ = x·rstd, rstd = (mean(x²) + eps)^(-1/2), y = x̂∘weight.

x̂_dot = rstd·(ẋ − x̂·mean(x̂∘ẋ)): the Jacobian of x̂ is symmetric, so this is also the backward rule.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = torch.promote_types(x.dtype, weight.dtype)
    # equal dtypes: PyTorch fuses only those, and warns about others
    return F.rms_norm(x.to(wide), x.shape[-1:], weight.to(wide), eps).to(x.dtype)  # [B, …, D]


def rms_norm_tangent(x: Tensor, x_dot: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x` cut to the tangent rows."""
    wide = torch.promote_types(x.dtype, torch.float32)  # no statistics in half precision
    x, x_dot = x.to(wide), x_dot.to(wide)  # [B_t, …, D]
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)  # [B_t, …, 1]
    x_hat = x * rstd  # [B_t, …, D]
    x_hat_dot = torch.addcmul(x_dot, x_hat, (x_hat * x_dot).mean(-1, keepdim=True), value=-1) * rstd  # [B_t, …, D]
    return x_hat_dot * weight
