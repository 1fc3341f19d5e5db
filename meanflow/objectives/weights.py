"""Weights of squared errors."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from mfkernels import meanflow_loss

from .rows import Rows


class Weighted(NamedTuple):
    """per_sample: (B,) weighted squared error, differentiable; squared_error: (B,) before weighting, detached."""

    per_sample: Tensor
    squared_error: Tensor


def adaptive_error(
    u: Tensor, v: Tensor, b: Rows, du_dt: Tensor | None = None, *, norm_p: float, norm_eps: float
) -> Weighted:
    """‖Δ‖² / (‖Δ‖² + norm_eps)^norm_p of each sample, the divisor detached, with Δ = u − (v − (t − r)·du_dt) where there
    is a du_dt (the first rows) and u − v elsewhere (arXiv 2505.13447, eqs. 10 and 22)."""
    found = meanflow_loss(
        u,
        u.new_zeros((0, *u.shape[1:])) if du_dt is None else du_dt.to(u.dtype),
        v,
        b.t,
        b.r,
        norm_p=norm_p,
        norm_eps=norm_eps,
    )
    return Weighted(found.per_sample, found.squared_error)
