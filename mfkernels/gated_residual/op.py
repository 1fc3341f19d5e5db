from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..ada_layer_norm.op import check_ada_layer_norm, promoted
from ..ada_layer_norm.op import run_reference as ada_layer_norm_reference
from ..backend import choose, rows_unsupported
from ..checks import check_operand, check_same, check_shape
from ..dual import Dual, TensorOrDual, padded_tangent, primal_of, tangent_rows
from ..forward_mode import bridge_forward_mode
from ..operator import operator
from . import reference

# ------------------------------------------------------------------------------------------- operators and their rules


def _rows(*dots: Tensor | None) -> int:
    return next((a.shape[0] for a in dots if a is not None), 0)


@operator("gated_residual_forward")
def _forward(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    x_dot: Tensor | None,
    y_dot: Tensor | None,
    gate_dot: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """x + gate·y (B, N, D) and its tangent (B_t, N, D), B_t = 0 where there is none."""
    from .kernels import gated_residual_forward

    out, out_dot = gated_residual_forward(x, y, gate, x_dot, y_dot, gate_dot, dtype=promoted(x, y, gate))
    return out, out.new_empty((0, *out.shape[1:])) if out_dot is None else out_dot


@_forward.register_fake
def _(x, y, gate, x_dot, y_dot, gate_dot):  # type: ignore[no-untyped-def]
    out = x.new_empty(x.shape, dtype=promoted(x, y, gate))
    return out, out.new_empty((_rows(x_dot, y_dot, gate_dot), *x.shape[1:]))


@operator("gated_residual_backward")
def _backward(dout: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    from .kernels import gated_residual_backward

    return gated_residual_backward(dout, y, gate)


@_backward.register_fake
def _(dout, y, gate):  # type: ignore[no-untyped-def]
    return y.new_empty(y.shape), gate.new_empty(gate.shape)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    _, y, gate, *_ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(y, gate)  # nothing of the tangent


def _backward_rule(ctx, dout, _dout_dot):  # type: ignore[no-untyped-def]
    if dout is None:
        return (None,) * 6
    return dout, *_backward(dout, *ctx.saved_tensors), *(None,) * 3


_forward.register_autograd(_backward_rule, setup_context=_setup_context)


@operator("gated_residual_ada_layer_norm_forward")
def _norm_forward(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    x_dot: Tensor | None,
    y_dot: Tensor | None,
    gate_dot: Tensor | None,
    shift_dot: Tensor | None,
    scale_dot: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x_new and h (B, N, D), their tangents (B_t, N, D) with B_t = 0 where there is none, mean and rstd (B, N, 2)."""
    from ..ada_layer_norm.kernels import norm_forward

    x_new, h, x_new_dot, h_dot, stats = norm_forward(
        x,
        y,
        gate,
        shift,
        scale,
        x_dot,
        y_dot,
        gate_dot,
        shift_dot,
        scale_dot,
        eps=eps,
        x_dtype=promoted(x, y, gate),
        h_dtype=promoted(x, y, gate, shift, scale),
    )
    assert x_new is not None
    if x_new_dot is None or h_dot is None:
        x_new_dot, h_dot = x_new.new_empty((0, *x.shape[1:])), h.new_empty((0, *x.shape[1:]))
    return x_new, h, x_new_dot, h_dot, stats


@_norm_forward.register_fake
def _(x, y, gate, shift, scale, x_dot, y_dot, gate_dot, shift_dot, scale_dot, eps):  # type: ignore[no-untyped-def]
    rows = _rows(x_dot, y_dot, gate_dot, shift_dot, scale_dot)
    B, N, D = x.shape
    x_new = x.new_empty((B, N, D), dtype=promoted(x, y, gate))
    h = x.new_empty((B, N, D), dtype=promoted(x, y, gate, shift, scale))
    stats = x.new_empty((B, N, 2), dtype=torch.float32)
    return x_new, h, x_new.new_empty((rows, N, D)), h.new_empty((rows, N, D)), stats


@operator("gated_residual_ada_layer_norm_backward")
def _norm_backward(
    dh: Tensor,
    dx_new: Tensor | None,
    x_new: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    stats: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx and dy (B, N, D) and [dshift, dscale, dgate] (3, B, D)."""
    from ..ada_layer_norm.kernels import norm_backward

    dx, dy, dmodulation = norm_backward(dh, dx_new, x_new, y, gate, scale, stats, x_dtype=x_new.dtype)
    assert dy is not None
    return dx, dy, dmodulation


@_norm_backward.register_fake
def _(dh, dx_new, x_new, y, gate, scale, stats):  # type: ignore[no-untyped-def]
    return x_new.new_empty(x_new.shape), y.new_empty(y.shape), scale.new_empty((3, *scale.shape))


def _norm_setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    _, y, gate, _, scale, *_ = inputs
    x_new, _, x_new_dot, h_dot, stats = output
    ctx.mark_non_differentiable(x_new_dot, h_dot, stats)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x_new, y, gate, scale, stats)  # nothing of the tangents


def _norm_backward_rule(ctx, dx_new, dh, *_):  # type: ignore[no-untyped-def]
    x_new, y, gate, scale, stats = ctx.saved_tensors
    if dh is None:
        if dx_new is None:
            return (None,) * 11
        return dx_new, *_backward(dx_new, y, gate), *(None,) * 8
    dx, dy, (dshift, dscale, dgate) = _norm_backward(dh, dx_new, x_new, y, gate, scale, stats)
    return dx, dy, dgate, dshift, dscale, *(None,) * 6


_norm_forward.register_autograd(_norm_backward_rule, setup_context=_norm_setup_context)


# ------------------------------------------------------------------------------------------------ the public functions


def gated_residual(x: TensorOrDual, y: TensorOrDual, gate: TensorOrDual) -> TensorOrDual:
    """The residual update of an adaLN-Zero block (arXiv 2212.09748, §3.2): x + gate·y.

    Tangent: ẋ + gate_dot·y + gate·ẏ; under `torch.func.jvp` or `forward_ad` the same rule serves plain tensors.

    Args:
        x, y: (B, N, D) tensors or Duals.
        gate: (B, D) tensor or Dual; a view with any strides.

    Returns:
        (B, N, D); a Dual if any argument is one.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        NotImplementedError: the backend that was asked for cannot serve the call.
    """
    _check(x, y, gate)
    return bridge_forward_mode("gated_residual", _run, x, y, gate)


def gated_residual_ada_layer_norm(
    x: TensorOrDual,
    y: TensorOrDual,
    gate: TensorOrDual,
    shift: TensorOrDual,
    scale: TensorOrDual,
    *,
    eps: float = 1e-6,
) -> tuple[TensorOrDual, TensorOrDual]:
    """A block's residual update and the adaptive layer norm that follows it, in one pass over the residual stream.

    Args:
        x, y: (B, N, D) tensors or Duals.
        gate, shift, scale: (B, D) tensors or Duals; views with any strides.
        eps: added to the variance, >= 0.

    Returns:
        `(x + gate·y, ada_layer_norm(x + gate·y, shift, scale))`, both (B, N, D). Each is a Dual if an argument that it
        depends on is one.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        NotImplementedError: the backend that was asked for cannot serve the call.
    """
    _check(x, y, gate)
    eps = check_ada_layer_norm(x, shift, scale, eps)
    run = partial(_run_norm, eps=eps)
    return bridge_forward_mode("gated_residual_ada_layer_norm", run, x, y, gate, shift, scale)


def _check(x: TensorOrDual, y: TensorOrDual, gate: TensorOrDual) -> None:
    check_operand("x", x, 3)
    check_operand("y", y, 3)
    check_shape("y", y, tuple(x.shape), "(B, N, D) of x")
    check_same("y", y, "x", x)
    check_operand("gate", gate, 2)
    check_shape("gate", gate, (x.shape[0], x.shape[2]), "(B, D) of x")
    check_same("gate", gate, "x", x)


def _run(x: TensorOrDual, y: TensorOrDual, gate: TensorOrDual) -> TensorOrDual:
    operands = (x, y, gate)
    primals = {"x": primal_of(x), "y": primal_of(y), "gate": primal_of(gate)}
    if choose("gated_residual", x.device, {"triton": lambda: rows_unsupported(**primals)}) == "reference":
        return _run_reference(x, y, gate)
    rows = tangent_rows(*operands)
    dots = (None,) * 3 if rows is None else tuple(padded_tangent(a, rows) for a in operands)
    out, out_dot = _forward(*map(primal_of, operands), *dots)
    if not any(isinstance(a, Dual) for a in operands):
        return out
    return Dual(out, None if rows is None else out_dot)


def _run_norm(
    x: TensorOrDual,
    y: TensorOrDual,
    gate: TensorOrDual,
    shift: TensorOrDual,
    scale: TensorOrDual,
    eps: float,
) -> tuple[TensorOrDual, TensorOrDual]:
    operands = (x, y, gate, shift, scale)
    primals = dict(zip(("x", "y", "gate", "shift", "scale"), map(primal_of, operands), strict=True))
    serves = {"triton": lambda: rows_unsupported(**primals)}
    if choose("gated_residual_ada_layer_norm", x.device, serves) == "reference":
        x_new = _run_reference(x, y, gate)
        return x_new, ada_layer_norm_reference(x_new, shift, scale, eps)
    rows = tangent_rows(*operands)
    dots = (None,) * 5 if rows is None else tuple(padded_tangent(a, rows) for a in operands)
    x_new, h, x_new_dot, h_dot, _ = _norm_forward(*map(primal_of, operands), *dots, eps)
    if not any(isinstance(a, Dual) for a in operands):
        return x_new, h
    if rows is None:
        return (Dual(x_new) if any(isinstance(a, Dual) for a in operands[:3]) else x_new), Dual(h)
    moved = tangent_rows(x, y, gate)  # x_new has the tangent rows of its own arguments alone, as in the reference
    if moved is None:
        return (Dual(x_new) if any(isinstance(a, Dual) for a in operands[:3]) else x_new), Dual(h, h_dot)
    return Dual(x_new, x_new_dot[:moved]), Dual(h, h_dot)


def _run_reference(x: TensorOrDual, y: TensorOrDual, gate: TensorOrDual) -> TensorOrDual:
    yp, gp = primal_of(y), primal_of(gate)
    out = reference.gated_residual(primal_of(x), yp, gp)
    if not any(isinstance(a, Dual) for a in (x, y, gate)):
        return out
    rows = tangent_rows(x, y, gate)
    if rows is None:
        return Dual(out)
    with torch.no_grad():
        out_dot = reference.gated_residual_tangent(
            y=yp[:rows],
            gate=gp[:rows],
            x_dot=padded_tangent(x, rows),
            y_dot=padded_tangent(y, rows),
            gate_dot=padded_tangent(gate, rows),
        )
        return Dual(out, out_dot.to(out.dtype))
