from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backend import choose, triton_unavailable, unsupported_dtype
from ..checks import check_number, check_operand, check_shape
from ..dual import Dual, check_tangent
from ..forward_mode import carries_tangent
from ..operator import operator
from . import reference

# ------------------------------------------------------------------------------------------- operator and its rules


@operator("meanflow_loss_forward")
def _forward(
    u: Tensor,
    du_dt: Tensor,
    v: Tensor,
    t: Tensor,
    r: Tensor,
    norm_p: float,
    norm_eps: float,
    with_error: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss, squared error and weight (B,) in float32, and u − u_tgt (B, …) where asked for, else no elements."""
    from .kernels import loss_forward

    loss, squared_error, weight, error = loss_forward(
        u,
        du_dt,
        v,
        t,
        r,
        norm_p=norm_p,
        norm_eps=norm_eps,
        with_error=with_error,
    )
    return loss, squared_error, weight, u.new_empty(0) if error is None else error


@_forward.register_fake
def _(u, du_dt, v, t, r, norm_p, norm_eps, with_error):  # type: ignore[no-untyped-def]
    per_sample = (u.new_empty(u.shape[:1], dtype=torch.float32) for _ in range(3))
    return *per_sample, u.new_empty(u.shape if with_error else 0)


@operator("meanflow_loss_backward")
def _backward(dloss: Tensor, error: Tensor, weight: Tensor) -> Tensor:
    from .kernels import loss_backward

    return loss_backward(dloss, error, weight)


@_backward.register_fake
def _(dloss, error, weight):  # type: ignore[no-untyped-def]
    return error.new_empty(error.shape)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    _, squared_error, weight, error = output
    ctx.mark_non_differentiable(squared_error, weight, error)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(error, weight)


def _backward_rule(ctx, dloss, *_):  # type: ignore[no-untyped-def]
    if dloss is None:
        return (None,) * 8
    return _backward(dloss, *ctx.saved_tensors), *(None,) * 7


_forward.register_autograd(_backward_rule, setup_context=_setup_context)


def _triton_unsupported(u: Tensor, *others: Tensor) -> str | None:
    reason = triton_unavailable(u.device)
    for name, a in zip(("u", "du_dt", "v", "t", "r"), (u, *others), strict=True):
        reason = reason or unsupported_dtype(name, a.dtype)
        if reason is not None:
            return reason
    return None


# ------------------------------------------------------------------------------------------------- the public function


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
        NotImplementedError: the backend that was asked for cannot serve the call.
    """
    if isinstance(u, Dual):
        raise TypeError("u: expected a tensor, got a Dual; its tangent is the argument du_dt")
    check_operand("u", u)
    if u.ndim < 2:
        raise ValueError(f"u: expected (B, …) with at least 2 dimensions, got shape {tuple(u.shape)}")
    check_tangent("du_dt", u, du_dt)
    for name, a in (("v", v), ("t", t), ("r", r)):
        if isinstance(a, Dual):
            raise TypeError(f"{name}: expected a tensor, got a Dual; nothing is differentiated through the target")
        check_operand(name, a)
        if a.device != u.device:
            raise ValueError(f"{name}: expected the device of u, {u.device}, got {a.device}")
    check_shape("v", v, tuple(u.shape), "that of u")
    check_shape("t", t, (u.shape[0],), "(B,)")
    check_shape("r", r, (u.shape[0],), "(B,)")
    for name, a in (("u", u), ("du_dt", du_dt), ("v", v), ("t", t), ("r", r)):
        if carries_tangent(a):
            raise NotImplementedError(f"{name}: forward mode through the loss is not supported")
    norm_p = check_number("norm_p", norm_p, 0)
    norm_eps = check_number("norm_eps", norm_eps, 0, above=True)
    if choose("meanflow_loss", u.device, {"triton": lambda: _triton_unsupported(u, du_dt, v, t, r)}) == "reference":
        return MeanFlowLoss(*reference.meanflow_loss(u, du_dt, v, t, r, norm_p, norm_eps))
    with_error = torch.is_grad_enabled() and u.requires_grad
    loss, squared_error, *_ = _forward(u, du_dt, v.detach(), t.detach(), r.detach(), norm_p, norm_eps, with_error)
    return MeanFlowLoss(loss, squared_error)
