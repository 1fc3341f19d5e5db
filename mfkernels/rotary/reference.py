"""Rotary position embedding: each pair of channels of a head turned by the angle of its token; and the norm before it.

    (y₁, y₂) = (x₁ cos − x₂ sin, x₁ sin + x₂ cos)

The pairs are (x_i, x_{i + d/2}) or, interleaved, (x_{2i}, x_{2i+1}). The rotation is linear: it is its own tangent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..rms_norm.reference import rms_norm, rms_norm_tangent


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x (B, N, H, d); cos, sin (N, d/2)."""
    wide = torch.promote_types(x.dtype, torch.float32)  # angles are not rounded to half precision
    cos, sin = cos[:, None].to(wide), sin[:, None].to(wide)  # [N, 1, d/2]
    x1, x2 = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)  # [B, N, H, d/2] twice
    y1, y2 = x1 * cos - x2 * sin, x1 * sin + x2 * cos  # [B, N, H, d/2] twice
    y = torch.stack((y1, y2), -1).flatten(-2) if interleaved else torch.cat((y1, y2), -1)  # [B, N, H, d]
    return y.to(x.dtype)


def norm_rotary(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float, interleaved: bool) -> Tensor:
    return rotary(rms_norm(x, weight, eps), cos, sin, interleaved)  # [B, N, H, d]


def norm_rotary_tangent(
    x: Tensor,
    weight: Tensor,
    x_dot: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    interleaved: bool,
) -> Tensor:
    """`x` cut to the tangent rows."""
    return rotary(rms_norm_tangent(x, weight, x_dot, eps), cos, sin, interleaved)  # [B_t, N, H, d]
