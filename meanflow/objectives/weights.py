"""Weights of squared errors."""

from __future__ import annotations

import torch
from torch import Tensor

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
