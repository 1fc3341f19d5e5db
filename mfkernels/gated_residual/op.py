from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ada_layer_norm.op import check_ada_layer_norm, normed_dtype, promoted
from ..backend import rows_unsupported
from ..checks import check_constant, check_number, check_operand, check_same, check_shape
from ..dual import TensorOrDual, primal_of
from ..operator import num_tangent_rows, operator, tangent_or_empty
from ..router import Backend, Decision, DualOp, run_on_duals
from . import reference

# ------------------------------------------------------------------------------------------- operators and their rules


@operator("gated_residual_forward")
def _forward(
    x: Tensor, y: Tensor, gate: Tensor, x_dot: Tensor | None, y_dot: Tensor | None, gate_dot: Tensor | None
) -> tuple[Tensor, Tensor]:
    """x + gate·y (B, N, D) and its tangent (B_t, N, D), B_t = 0 where there is none."""
    from .kernels import gated_residual_forward

    out, out_dot = gated_residual_forward(x, y, gate, x_dot, y_dot, gate_dot, dtype=promoted(x, y, gate))
    return out, tangent_or_empty(out_dot, out)


@_forward.register_fake
def _(x, y, gate, x_dot, y_dot, gate_dot):  # type: ignore[no-untyped-def]
    out = x.new_empty(x.shape, dtype=promoted(x, y, gate))
    return out, out.new_empty((num_tangent_rows(x_dot, y_dot, gate_dot), *x.shape[1:]))


@operator("gated_residual_backward", outputs_like=("y", "gate"))
def _backward(dout: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    from .kernels import gated_residual_backward

    return gated_residual_backward(dout, y, gate)


_forward.register_gradients(
    lambda ctx, dout: (dout, *_backward(dout, *ctx.saved_tensors)),
    save=lambda ctx, inputs, output: inputs[1:3],  # y, gate
)


# The update followed by a norm. `defer` leaves out writing the sum: the next update computes it again, from what it was
# added to, `start`, and this update's y, gate and bias, the base. What this one returned in the sum's place is then the
# next one's x: nothing reads its values, and its gradient is the sum's.


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
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    keeps_dtype: bool,
    start: Tensor | None = None,
    base_y: Tensor | None = None,
    base_gate: Tensor | None = None,
    base_bias: Tensor | None = None,
    defer: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x_new and h (B, N, D), their tangents (B_t, N, D) with B_t = 0 where there is none, mean and rstd (B, N, 2).

    x_dot is that of the sum with the base, which is written in any case. With `defer` x_new is NaN without memory.
    `keeps_dtype`, whether the sum has the dtype of x, is for `ResidualStream` alone.
    """
    from ..ada_layer_norm.kernels import Tangents, Update, norm_forward

    x_new, h, x_new_dot, h_dot, stats = norm_forward(
        x if start is None else start,
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
    return x_new, h, tangent_or_empty(x_new_dot, x_new), tangent_or_empty(h_dot, h), stats


@_norm_forward.register_fake
def _(x, y, gate, shift, scale, *rest):  # type: ignore[no-untyped-def]
    *dots, _bias, _eps, dtype, _keeps_dtype = rest[:9]
    defer = len(rest) == 14 and rest[13]
    rows = num_tangent_rows(*dots)
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

    dx, dy, dmodulation, dbias = norm_backward(dh, dx_new, x, Update(y, gate, bias), scale, stats, deferred=deferred)
    assert dy is not None
    return dx, dy, dmodulation, dy.new_empty(0) if dbias is None else dbias


@_norm_backward.register_fake
def _(dh, dx_new, x, y, gate, bias, scale, stats, deferred):  # type: ignore[no-untyped-def]
    dbias = y.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return x.new_empty(x.shape), y.new_empty(y.shape), scale.new_empty((3, *scale.shape)), dbias


def _norm_saved(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, y, gate, _, scale = inputs[:5]
    bias = inputs[10]
    ctx.deferred = len(inputs) == 19 and inputs[18]
    # nothing of the base: its gradients come from the update that it was
    return x if ctx.deferred else output[0], y, gate, bias, scale, output[4]


def _norm_gradients(ctx, dx_new, dh):  # type: ignore[no-untyped-def]
    x, y, gate, bias, scale, stats = ctx.saved_tensors
    if dh is not None:
        dx, dy, (dshift, dscale, dgate), dbias = _norm_backward(
            dh, dx_new, x, y, gate, bias, scale, stats, ctx.deferred
        )
        dbias = None if bias is None else dbias
    else:  # the norm was not used
        dx, dshift, dscale = dx_new, None, None
        dy, dgate = _backward(dx_new, y if bias is None else y + bias, gate)
        dbias = None if bias is None else (dx_new * gate.unsqueeze(1)).sum((0, 1)).to(bias.dtype)
        dy = dy.to(y.dtype)
    return dx, dy, dgate, dshift, dscale, *(None,) * 5, dbias


_norm_forward.register_gradients(_norm_gradients, save=_norm_saved, outputs=2)


def _wrapper(
    forward: Callable[..., tuple[Tensor, Tensor]], x: Tensor, y: Tensor, gate: Tensor, *dots_and_bias: Any
) -> tuple[Tensor, Tensor]:
    *dots, bias = dots_and_bias
    return forward(x, reference.with_bias(y, bias), gate, *dots)


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
        BackendError: the requested backend cannot serve the call.
    """
    return _gated_residual(x, y, gate, bias)


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
        BackendError: the requested backend cannot serve the call.
        NotImplementedError: `bias` has a tangent.
    """
    return gated_residual_norm(x, y, gate, shift, scale, bias, check_number("eps", eps, 0))


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


def _check_norm(
    x: TensorOrDual, y: TensorOrDual, gate: TensorOrDual, shift: TensorOrDual, scale: TensorOrDual, bias: Tensor | None
) -> None:
    _check(x, y, gate, bias)
    check_ada_layer_norm(x, shift, scale)


def _unsupported(bias: Tensor | None = None, **tensors: Tensor) -> str | None:
    return rows_unsupported(**tensors)  # a bias of any width and dtype is added to y


_gated_residual = DualOp(
    "gated_residual",
    ["x", "y", "gate"],
    ["bias"],
    check=_check,
    reference=reference.gated_residual,
    tangent=reference.gated_residual_tangent,
    backends={"triton": Backend(_forward, _unsupported, wrapper=_wrapper)},
)


class _Norm(DualOp):
    def update_and_norm(
        self,
        decision: Decision,
        operands: Sequence[TensorOrDual],
        bias: Tensor | None,
        eps: float,
        *,
        eager: bool,
        before: tuple[TensorOrDual, TensorOrDual, TensorOrDual, Tensor | None] | None = None,
        defer: bool = False,
    ) -> tuple[TensorOrDual, TensorOrDual]:
        """The kernels' x_new and h for a stream whose sums may be left unwritten; see `_norm_forward`."""
        # the gradients of `before` go through the sum's
        detached = (None,) * 4 if before is None else [None if a is None else primal_of(a).detach() for a in before]
        rest = (bias, eps, *decision.derived, *detached, defer)
        return run_on_duals(self._runs[eager][decision.backend], operands, rest, self.outputs)


gated_residual_norm = _Norm(
    "gated_residual_ada_layer_norm",
    ["x", "y", "gate", "shift", "scale"],
    ["bias"],
    check=_check_norm,
    reference=reference.gated_residual_ada_layer_norm,
    tangent=reference.gated_residual_ada_layer_norm_tangent,
    backends={"triton": Backend(_norm_forward, _unsupported)},
    outputs=((0, 1, 2), None),
    # the dtype of h, and whether the sum has that of x
    derived=lambda x, y, gate, shift, scale, bias: (
        normed_dtype(x, y, gate, shift, scale),
        promoted(x, y, gate) == x.dtype,
    ),
)
