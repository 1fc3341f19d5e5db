"""The ops as formulas of plain PyTorch, for `python -m mfkernels.check`. They share no code with the ops.

In float64 a formula is the oracle; in a case's own dtype and on its own device it is what the op's error is measured
against.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

EPS = 1e-6  # of the norms


def layer_norm(x: Tensor, eps: float = EPS) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)  # [B, N, D]
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()  # [B, N, D]


def rms(x: Tensor, weight: Tensor, eps: float = EPS) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight  # [B, …, D]


def residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return x + gate[:, None] * y  # [B, N, D]


def modulated(x: Tensor, shift: Tensor, scale: Tensor, eps: float = EPS) -> Tensor:
    return layer_norm(x, eps) * (1 + scale[:, None]) + shift[:, None]  # [B, N, D]


def residual_modulated(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    stream = residual(x, y, gate)  # [B, N, D]
    return torch.cat((stream, modulated(stream, shift, scale)), 1)  # [B, 2N, D]


def perceptron(x: Tensor, w1: Tensor, b1: Tensor | float, w2: Tensor, b2: Tensor | float) -> Tensor:
    h = x @ w1.mT + b1  # [B, N, D_hidden]
    a = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))  # [B, N, D_hidden]
    return a @ w2.mT + b2  # [B, N, D]


def frequencies(dim: int, max_period: float = 10000.0) -> Tensor:
    return max_period ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))  # [dim/2]


def sinusoids(t: Tensor, omega: Tensor) -> Tensor:
    wide = torch.promote_types(t.dtype, torch.float32)  # of the angles: in bfloat16 they would be off by whole radians
    angle = t.to(wide)[:, None] * omega.to(wide)  # [B, dim/2]
    return torch.cat((angle.cos(), angle.sin()), 1).to(t.dtype)  # [B, dim]


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None = None) -> Tensor:
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, 2) for x in (k, v))  # [B, N_kv, H, d]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale  # [B, H, N_q, N_kv]
    if causal:
        hidden = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu(1)  # [N_q, N_kv]
        scores = scores.masked_fill(hidden, -math.inf)
    return torch.einsum("bhij,bjhd->bihd", torch.softmax(scores, -1), v)  # [B, N_q, H, d]


def angles(tokens: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Tables of cosines and sines, float32; the first of several tokens has no position."""
    positions = (torch.arange(tokens) - 1).clamp_min(0)  # [N]
    angle = positions[:, None] * 100.0 ** -torch.linspace(0, 1, head_dim // 2, dtype=torch.float64)  # [N, d/2]
    return angle.cos().float(), angle.sin().float()


def turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)  # the tables are float32, whatever the heads are
    cos, sin = cos[:, None].to(wide), sin[:, None].to(wide)  # [N, 1, d/2]
    if interleaved:
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)  # [B, N, H, d/2]
    else:
        a, b = x.unflatten(-1, (2, -1)).unbind(-2)  # [B, N, H, d/2]
    pair = torch.stack((a * cos - b * sin, a * sin + b * cos), -1 if interleaved else -2)  # [B, N, H, d/2, 2] or so
    return pair.flatten(-2).to(x.dtype)  # [B, N, H, d]


def error_terms(
    u: Tensor, v: Tensor, correction: Tensor, interval: Tensor, p: float, eps: float
) -> tuple[Tensor, Tensor]:
    """Weighted and plain squared error per sample, in float32 or better, as the op has them."""
    wide = torch.promote_types(u.dtype, torch.float32)
    correction = torch.cat((correction, torch.zeros_like(u[len(correction) :])))  # [B, …]
    interval = interval.to(wide).view(-1, *[1] * (u.ndim - 1))  # [B, 1, …]
    target = (v.to(wide) - interval * correction.to(wide)).detach()  # [B, …]
    squared_error = (u.to(wide) - target).square().flatten(1).sum(1)  # [B]
    return squared_error / (squared_error.detach() + eps) ** p, squared_error.detach()
