"""Rotary position embedding: each pair of channels of a head turned by the angle of its token; and the norm before it.

    (y₁, y₂) = (x₁ cos − x₂ sin, x₁ sin + x₂ cos)

The pairs are (x_i, x_{i + d/2}) or, interleaved, (x_{2i}, x_{2i+1}). The rotation is linear: it is its own tangent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..rms_norm.reference import rms_norm, rms_norm_tangent


def turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x (B, N, H, d); cos, sin (N, d/2)."""
    wide = torch.promote_types(x.dtype, torch.float32)  # angles are not rounded to half precision
    cos, sin = cos[:, None].to(wide), sin[:, None].to(wide)  # [N, 1, d/2]
    x1, x2 = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)  # [B, N, H, d/2] twice
    y1, y2 = x1 * cos - x2 * sin, x1 * sin + x2 * cos  # [B, N, H, d/2] twice
    y = torch.stack((y1, y2), -1).flatten(-2) if interleaved else torch.cat((y1, y2), -1)  # [B, N, H, d]
    return y.to(x.dtype)


def rotary(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """With the norm where there are weights."""
    if q_weight is not None and k_weight is not None:
        q, k = rms_norm(q, q_weight, eps), rms_norm(k, k_weight, eps)  # [B, N, H, d], [B, N, H_kv, d]
    return turned(q, cos, sin, interleaved), turned(k, cos, sin, interleaved)


def rotary_tangent(
    q: Tensor,
    k: Tensor,
    q_dot: Tensor | None,
    k_dot: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """All cut to the tangent rows."""

    def of(x: Tensor, x_dot: Tensor | None, weight: Tensor | None) -> Tensor | None:
        if x_dot is None:
            return None
        x_dot = x_dot if weight is None else rms_norm_tangent(x, x_dot, weight, eps)  # [B_t, N, H, d]
        return turned(x_dot, cos, sin, interleaved)  # [B_t, N, H, d]

    return of(q, q_dot, q_weight), of(k, k_dot, k_weight)
