"""Weights of errors, and the learned log-variance."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from mfkernels import AdaptiveSquaredError, adaptive_squared_error

from .rows import Rows


def adaptive_error(
    u: Tensor, v: Tensor, b: Rows, du_dt: Tensor | None = None, *, norm_p: float, norm_eps: float
) -> AdaptiveSquaredError:
    """‖Δ‖² / (‖Δ‖² + norm_eps)^norm_p of each sample, the divisor detached (arXiv 2505.13447, eqs. 10 and 22).

    Δ is u − (v − (t − r)·du_dt) where there is a du_dt, on the first rows, and u − v elsewhere.
    """
    if du_dt is None:
        return adaptive_squared_error(u, v, p=norm_p, eps=norm_eps)
    wide = torch.promote_types(b.t.dtype, torch.float32)  # a difference of half-precision times needs more bits
    return adaptive_squared_error(u, v, du_dt.to(u.dtype), b.t.to(wide) - b.r.to(wide), p=norm_p, eps=norm_eps)


def mean_square(error: Tensor) -> Tensor:
    """Mean of the squares of each sample's numbers, (B,), of (B, …)."""
    return error.flatten(1).square().mean(dim=1)


def squared_norm(error: Tensor) -> Tensor:
    """‖error‖² of each sample, (B,), of (B, …)."""
    return error.flatten(1).square().sum(dim=1)


def power(error: Tensor, *, p: float, c: float) -> Tensor:
    """error/(error + c)^p with the divisor detached, of (B,) squared errors: MeanFlow's adaptive weight."""
    return error if p == 0 else error / (error.detach() + c).pow(p)


def pseudo_huber(error: Tensor, c: float) -> Tensor:
    """√(‖error‖² + c²) − c of each sample, (B,), of (B, …) (arXiv 2310.14189, eq. 7); with c = 0 the norm."""
    norm = torch.linalg.vector_norm(error.flatten(1), dim=1)  # [B]; its gradient at 0 is 0
    return norm if c == 0 else torch.hypot(norm, torch.full_like(norm, c)) - c


def normalised(g: Tensor, c: float, per: Literal["sum", "mean"] = "sum") -> Tensor:
    """g/(‖g‖ + c) of each sample, (B, …) (tangent normalisation, arXiv 2410.11081, §4.1); "mean": g/(‖g‖/√D + c)."""
    norm = torch.linalg.vector_norm(g.flatten(1), dim=1)  # [B]
    norm = norm / g[0].numel() ** 0.5 if per == "mean" else norm
    return g / (norm + c).view(-1, *[1] * (g.ndim - 1))


class LogVariance(nn.Module):
    """λ(t, r) = w₀ + w₁·t + w₂·r, the log-variance of a loss e^(−λ)·error + λ, learned with the network.

    Args:
        times: 1 for λ(t), 2 for λ(t, r).
    """

    def __init__(self, times: int = 2) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1 + times))

    def forward(self, t: Tensor, r: Tensor) -> Tensor:
        """(B,) of times t, r (B,)."""
        w = self.weight
        λ = w[0] + w[1] * t  # [B]
        return λ if len(w) == 2 else λ + w[2] * r
