from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..ada_layer_norm.op import check_ada_layer_norm, normed_dtype, promoted
from ..ada_layer_norm.op import run_reference as ada_layer_norm_reference
from ..backend import choose, recorded, rows_unsupported
from ..calls import kind_of_call, known, remember
from ..checks import check_constant, check_number, check_operand, check_same, check_shape
from ..dual import Dual, TensorOrDual, padded_tangent, primal_of, tangent_rows
from ..forward_mode import bridge_forward_mode
from ..operator import operator
from . import reference

_NORM = "gated_residual_ada_layer_norm"

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


# The update followed by a norm. `defer` leaves out writing the sum: the next update makes it again, from x and this
# update's y, gate and bias, which it calls the base. `seen` is what this one returned in the sum's place, and carries
# the sum's gradient from that update to this one.


@operator("gated_residual_ada_layer_norm_forward")
def _norm_forward(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    bias: Tensor | None,
    seen: Tensor | None,
    base_y: Tensor | None,
    base_gate: Tensor | None,
    base_bias: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    x_dot: Tensor | None,
    y_dot: Tensor | None,
    gate_dot: Tensor | None,
    shift_dot: Tensor | None,
    scale_dot: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    defer: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x_new and h (B, N, D), their tangents (B_t, N, D) with B_t = 0 where there is none, mean and rstd (B, N, 2).

    x_dot is that of the sum with the base, which is written in any case. With `defer` x_new is NaN without memory.
    """
    from ..ada_layer_norm.kernels import Tangents, Update, norm_forward

    x_new, h, x_new_dot, h_dot, stats = norm_forward(
        x,
        Update(y, gate, bias),
        None if base_y is None or base_gate is None else Update(base_y, base_gate, base_bias),
        shift,
        scale,
        Tangents(x_dot, y_dot, gate_dot, shift_dot, scale_dot),
        eps=eps,
        x_dtype=promoted(x, y, gate),
        h_dtype=dtype,
        defer=defer,
    )
    assert x_new is not None
    if x_new_dot is None or h_dot is None:
        x_new_dot, h_dot = x_new.new_empty((0, *x.shape[1:])), h.new_empty((0, *x.shape[1:]))
    return x_new, h, x_new_dot, h_dot, stats


@_norm_forward.register_fake
def _(  # type: ignore[no-untyped-def]
    x, y, gate, bias, seen, base_y, base_gate, base_bias, shift, scale, *dots_and_rest
):
    *dots, _eps, dtype, defer = dots_and_rest
    rows = _rows(*dots)
    B, N, D = x.shape
    x_new = x.new_empty((1, 1, 1) if defer else (B, N, D), dtype=promoted(x, y, gate)).expand(B, N, D)
    h = x.new_empty((B, N, D), dtype=dtype)
    stats = x.new_empty((B, N, 2), dtype=torch.float32)
    return x_new, h, x_new.new_empty((rows, N, D)), h.new_empty((rows, N, D)), stats


@operator("gated_residual_ada_layer_norm_backward")
def _norm_backward(
    dh: Tensor,
    dx_new: Tensor | None,
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    stats: Tensor,
    deferred: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx and dy (B, N, D), [dshift, dscale, dgate] (3, B, D) and dbias (D,), or (0,) without a bias.

    x is what was normed; with `deferred` what was updated.
    """
    from ..ada_layer_norm.kernels import Update, norm_backward

    dx, dy, dmodulation, dbias = norm_backward(
        dh,
        dx_new,
        x,
        Update(y, gate, bias),
        scale,
        stats,
        deferred=deferred,
    )
    assert dy is not None
    return dx, dy, dmodulation, dy.new_empty(0) if dbias is None else dbias


@_norm_backward.register_fake
def _(dh, dx_new, x, y, gate, bias, scale, stats, deferred):  # type: ignore[no-untyped-def]
    dbias = y.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return x.new_empty(x.shape), y.new_empty(y.shape), scale.new_empty((3, *scale.shape)), dbias


def _norm_setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, y, gate, bias, seen, _, _, _, _, scale, *_, ctx.deferred = inputs
    x_new, _, x_new_dot, h_dot, stats = output
    ctx.seen = seen is not None
    ctx.mark_non_differentiable(x_new_dot, h_dot, stats)
    ctx.set_materialize_grads(False)
    # nothing of the tangents, nor of the base: its gradients come from the update that it was
    ctx.save_for_backward(x if ctx.deferred else x_new, y, gate, bias, scale, stats)


def _norm_backward_rule(ctx, dx_new, dh, *_):  # type: ignore[no-untyped-def]
    x, y, gate, bias, scale, stats = ctx.saved_tensors
    if dh is not None:
        dx, dy, (dshift, dscale, dgate), dbias = _norm_backward(
            dh, dx_new, x, y, gate, bias, scale, stats, ctx.deferred
        )
    elif dx_new is not None:  # the norm was not used
        dx, dshift, dscale = dx_new, None, None
        dy, dgate = _backward(dx_new, y if bias is None else y + bias, gate)
        dbias = None if bias is None else (dx_new * gate.unsqueeze(1)).sum((0, 1)).to(bias.dtype)
        dy = dy.to(y.dtype)
    else:
        return (None,) * 18
    to_x, to_seen = (None, dx) if ctx.seen else (dx, None)
    dbias = None if bias is None else dbias
    return to_x, dy, dgate, dbias, to_seen, None, None, None, dshift, dscale, *(None,) * 8


_norm_forward.register_autograd(_norm_backward_rule, setup_context=_norm_setup_context)


# ------------------------------------------------------------------------------------------------ the public functions


def gated_residual(x: TensorOrDual, y: TensorOrDual, gate: TensorOrDual, *, bias: Tensor | None = None) -> TensorOrDual:
    """The residual update of an adaLN-Zero block (arXiv 2212.09748, §3.2): x + gate·(y + bias).

    Tangent: ẋ + gate_dot·(y + bias) + gate·ẏ; under `torch.func.jvp` or `forward_ad` the same rule serves plain
    tensors.

    Args:
        x, y: (B, N, D) tensors or Duals.
        gate: (B, D) tensor or Dual; a view with any strides.
        bias: (D,), added to `y` first; any float dtype.

    Returns:
        (B, N, D); a Dual if any argument is one.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        NotImplementedError: the backend that was asked for cannot serve the call.
    """
    _check(x, y, gate, bias)
    return bridge_forward_mode("gated_residual", partial(_run, bias=bias), x, y, gate)


def gated_residual_ada_layer_norm(
    x: TensorOrDual,
    y: TensorOrDual,
    gate: TensorOrDual,
    shift: TensorOrDual,
    scale: TensorOrDual,
    *,
    bias: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[TensorOrDual, TensorOrDual]:
    """A block's residual update and the adaptive layer norm that follows it, in one pass over the residual stream.

    Args:
        x, y: (B, N, D) tensors or Duals.
        gate, shift, scale: (B, D) tensors or Duals; views with any strides.
        bias: (D,), added to `y` first: that of the layer that made it, whose gradient this pass sums up; any float
            dtype.
        eps: added to the variance, >= 0.

    Returns:
        `(x + gate·(y + bias), ada_layer_norm(x + gate·(y + bias), shift, scale))`, both (B, N, D). Each is a Dual if an
        argument that it depends on is one.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        NotImplementedError: the backend that was asked for cannot serve the call; `bias` has a tangent.
    """
    eps = check_number("eps", eps, 0)
    facts = facts_of(x, y, gate, bias, shift, scale)
    if facts is None:
        run = partial(_run_norm, bias=bias, eps=eps)
        return bridge_forward_mode(_NORM, run, x, y, gate, shift, scale)
    if facts.backend == "reference":
        return _reference_norm(x, y, gate, bias, shift, scale, eps)
    return update_and_norm(x, y, gate, bias, shift, scale, eps=eps, dtype=facts.dtype)


class Facts(NamedTuple):
    """What a kind of calls of `gated_residual_ada_layer_norm` comes to."""

    backend: str
    dtype: torch.dtype  # of h
    keeps_dtype: bool  # the sum has that of x


def facts_of(
    x: TensorOrDual,
    y: TensorOrDual,
    gate: TensorOrDual,
    bias: Tensor | None,
    shift: TensorOrDual,
    scale: TensorOrDual,
) -> Facts | None:
    """Check the arguments; None where it is not plain eager, and what they come to depends on more than their kind."""
    kind = kind_of_call(_NORM, x, y, gate, bias, shift, scale)
    facts: Facts | None = known(kind)
    if facts is None:
        _check(x, y, gate, bias)
        check_ada_layer_norm(x, shift, scale, 0.0)
        if not kind:
            return None
        xp, yp, gp, sp, cp = map(primal_of, (x, y, gate, shift, scale))
        backend = choose_norm(x, y, gate, shift, scale)
        facts = Facts(backend, normed_dtype(xp, yp, gp, sp, cp), promoted(xp, yp, gp) == xp.dtype)
        remember(kind, facts)
    recorded(_NORM, facts.backend)
    return facts


def _check(x: TensorOrDual, y: TensorOrDual, gate: TensorOrDual, bias: Tensor | None) -> None:
    check_operand("x", x, 3)
    check_operand("y", y, 3)
    check_shape("y", y, tuple(x.shape), "(B, N, D) of x")
    check_same("y", y, "x", x)
    check_operand("gate", gate, 2)
    check_shape("gate", gate, (x.shape[0], x.shape[2]), "(B, D) of x")
    check_same("gate", gate, "x", x)
    if bias is not None:
        check_constant("bias", bias, x.shape[-1:], "(D,) of x", x)


def _run(x: TensorOrDual, y: TensorOrDual, gate: TensorOrDual, bias: Tensor | None) -> TensorOrDual:
    if bias is not None:
        y = _with_bias(y, bias)
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
    bias: Tensor | None,
    eps: float,
) -> tuple[TensorOrDual, TensorOrDual]:
    if choose_norm(x, y, gate, shift, scale) == "reference":
        return _reference_norm(x, y, gate, bias, shift, scale, eps)
    dtype = normed_dtype(*map(primal_of, (x, y, gate, shift, scale)))
    return update_and_norm(x, y, gate, bias, shift, scale, eps=eps, dtype=dtype)


def _reference_norm(
    x: TensorOrDual,
    y: TensorOrDual,
    gate: TensorOrDual,
    bias: Tensor | None,
    shift: TensorOrDual,
    scale: TensorOrDual,
    eps: float,
) -> tuple[TensorOrDual, TensorOrDual]:
    x_new = _run_reference(x, y if bias is None else _with_bias(y, bias), gate)
    return x_new, ada_layer_norm_reference(x_new, shift, scale, eps)


def _with_bias(y: TensorOrDual, bias: Tensor) -> TensorOrDual:
    added = (primal_of(y) + bias).to(y.dtype)  # [B, N, D]
    return Dual(added, y.tangent) if isinstance(y, Dual) else added


def choose_norm(*operands: TensorOrDual) -> str:
    """The backend of an update and norm of (x, y, gate, shift, scale), or of the first few of these."""
    primals = dict(zip(("x", "y", "gate", "shift", "scale"), map(primal_of, operands), strict=False))
    serves = {"triton": lambda: rows_unsupported(**primals)}
    return choose("gated_residual_ada_layer_norm", operands[0].device, serves)


def update_and_norm(
    x: TensorOrDual,
    y: TensorOrDual,
    gate: TensorOrDual,
    bias: Tensor | None,
    shift: TensorOrDual,
    scale: TensorOrDual,
    *,
    eps: float,
    dtype: torch.dtype,
    seen: TensorOrDual | None = None,
    base: tuple[TensorOrDual, TensorOrDual, Tensor | None] = (None, None, None),  # type: ignore[assignment]
    defer: bool = False,
) -> tuple[TensorOrDual, TensorOrDual]:
    """The Triton kernels' x_new and h; of `seen`, `base` and `defer` see the operator."""
    xp, yp, gp, sp, cp = map(primal_of, (x, y, gate, shift, scale))
    before: list[Tensor | None] = [None] * 4
    if seen is not None:  # through which the gradients of x and of the base go
        before = [primal_of(seen), *(None if a is None else primal_of(a).detach() for a in base)]
        xp = xp.detach()
    sum_of = x if seen is None else seen  # whose tangent is the stream's
    operands = (sum_of, y, gate, shift, scale)
    if Dual not in map(type, operands):
        x_new, h, *_ = _norm_forward(xp, yp, gp, bias, *before, sp, cp, *(None,) * 5, eps, dtype, defer)
        return x_new, h
    rows = tangent_rows(*operands)
    dots = (None,) * 5 if rows is None else tuple(padded_tangent(a, rows) for a in operands)
    x_new, h, x_new_dot, h_dot, _ = _norm_forward(xp, yp, gp, bias, *before, sp, cp, *dots, eps, dtype, defer)
    # x_new has the tangent rows of its own arguments alone, as in the reference
    moved = tangent_rows(sum_of, y, gate)
    if moved is not None:
        return Dual(x_new, x_new_dot[:moved]), Dual(h, h_dot)
    x_new = Dual(x_new) if any(isinstance(a, Dual) for a in operands[:3]) else x_new
    return x_new, Dual(h, None if rows is None else h_dot)


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
