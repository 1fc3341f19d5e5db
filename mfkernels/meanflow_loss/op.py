from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..backend import choose
from ..checks import check_operand, check_shape
from ..dual import check_tangent
from . import reference


class MeanFlowLoss(NamedTuple):
    """per_sample: (B,) weighted losses, differentiable in u; squared_error: (B,) ‖u − u_tgt‖², detached."""

    per_sample: Tensor
    squared_error: Tensor


def meanflow_loss(
    u: Tensor,
    du_dt: Tensor,
    v: Tensor,
    t: Tensor,
    r: Tensor,
    *,
    norm_p: float = 1.0,
    norm_eps: float = 0.01,
) -> MeanFlowLoss:
    """Adaptively weighted squared error against the MeanFlow target (arXiv 2505.13447, eqs. 10-11 and 22).

    u_tgt = v − (t − r)·du/dt without gradient, e = ‖u − u_tgt‖² per sample, loss = e / stopgrad(e + norm_eps)^norm_p.

    Args:
        u: (B, …) prediction.
        du_dt: (B_t, …) its total derivative for the first B_t <= B rows, detached; for the other rows the target is v.
        v: (B, …) velocity.
        t, r: (B,) times, r <= t.
        norm_p: power p >= 0 of the adaptive weight (0: plain squared error).
        norm_eps: ε > 0 in it.

    Returns:
        `MeanFlowLoss(per_sample, squared_error)`, in float32 or better. The scalar loss is `per_sample.mean()`.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    check_operand("u", u)
    if u.ndim < 2:
        raise ValueError(f"u: expected (B, …) with at least 2 dimensions, got shape {tuple(u.shape)}")
    check_tangent("du_dt", u, du_dt)
    check_shape("v", v, tuple(u.shape), "that of u")
    check_shape("t", t, (u.shape[0],), "(B,)")
    check_shape("r", r, (u.shape[0],), "(B,)")
    if norm_p < 0:
        raise ValueError(f"norm_p: expected a number >= 0, got {norm_p}")
    if norm_eps <= 0:
        raise ValueError(f"norm_eps: expected a number > 0, got {norm_eps}")
    choose("meanflow_loss", u.device, {})
    return MeanFlowLoss(*reference.meanflow_loss(u, du_dt, v, t, r, norm_p, norm_eps))
