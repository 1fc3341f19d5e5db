"""[cos(tω), sin(tω)] with ω_i = max_period^(−i/half); tangent ṫ·ω·[−sin(tω), cos(tω)]."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _angles(t: Tensor, dim: int, max_period: float) -> tuple[Tensor, Tensor]:
    half = dim // 2
    wide = torch.promote_types(t.dtype, torch.float32)  # an angle of 1000 in bfloat16 would be off by whole radians
    omega = torch.exp(-math.log(max_period) / half * torch.arange(half, dtype=wide, device=t.device))  # [half]
    return t.to(wide)[:, None] * omega, omega  # [B, half], [half]


def timestep_embedding(t: Tensor, dim: int, max_period: float) -> Tensor:
    angle, _ = _angles(t, dim, max_period)
    return torch.cat([angle.cos(), angle.sin()], dim=-1).to(t.dtype)  # [B, dim]


def timestep_embedding_tangent(t: Tensor, t_dot: Tensor, dim: int, max_period: float) -> Tensor:
    angle, omega = _angles(t, dim, max_period)
    rate = t_dot.to(omega.dtype)[:, None] * omega  # [B_t, half]
    return torch.cat([-rate * angle.sin(), rate * angle.cos()], dim=-1).to(t.dtype)  # [B_t, dim]
