from __future__ import annotations

import torch
from torch import Tensor

from ..backend import choose, rows_unsupported
from ..checks import check_constant, check_operand, check_rows, check_same, check_shape
from ..dual import Dual, TensorOrDual, padded_tangent, primal_of, tangent_rows
from ..forward_mode import bridge_forward_mode
from ..operator import operator
from . import reference

# ------------------------------------------------------------------------------------------- operators and their rules


@operator("layer_scale_residual_forward")
def _forward(
    x: Tensor,
    y: Tensor,
    x_dot: Tensor | None,
    y_dot: Tensor | None,
    scale: Tensor,
) -> tuple[Tensor, Tensor]:
    """x + scale·y (B, …, D) and its tangent (B_t, …, D), B_t = 0 without a y_dot."""
    from .kernels import layer_scale_residual_forward

    dtype = torch.promote_types(x.dtype, y.dtype)
    out, out_dot = layer_scale_residual_forward(x, y, x_dot, y_dot, scale, dtype=dtype)
    return out, out.new_empty((0, *out.shape[1:])) if out_dot is None else out_dot


@_forward.register_fake
def _(x, y, x_dot, y_dot, scale):  # type: ignore[no-untyped-def]
    out = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, y.dtype))
    return out, out.new_empty((0 if y_dot is None else y_dot.shape[0], *x.shape[1:]))


@operator("layer_scale_residual_backward")
def _backward(dout: Tensor, y: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    from .kernels import layer_scale_residual_backward

    return layer_scale_residual_backward(dout, y, scale)


@_backward.register_fake
def _(dout, y, scale):  # type: ignore[no-untyped-def]
    return y.new_empty(y.shape), scale.new_empty(scale.shape)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, y, _, _, scale = inputs
    ctx.dtype = x.dtype
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(y, scale)  # nothing of the tangent


def _backward_rule(ctx, dout, _dout_dot):  # type: ignore[no-untyped-def]
    if dout is None:
        return (None,) * 5
    dy, dscale = _backward(dout, *ctx.saved_tensors)
    return dout.to(ctx.dtype), dy, None, None, dscale


_forward.register_autograd(_backward_rule, setup_context=_setup_context)

# ------------------------------------------------------------------------------------------------- the public function


def layer_scale_residual(x: TensorOrDual, y: TensorOrDual, scale: Tensor) -> TensorOrDual:
    """A residual update with a learned factor per channel (LayerScale, arXiv 2103.17239), x + scale·y.

    Tangent: ẋ + scale·ẏ; under `torch.func.jvp` or `forward_ad` the same rule serves plain tensors.

    Args:
        x, y: (B, …, D) tensors or Duals; any strides.
        scale: (D,); any float dtype.

    Returns:
        (B, …, D); a Dual if `x` or `y` is one.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        NotImplementedError: the backend that was asked for cannot serve the call; `scale` has a tangent.
    """
    check_rows("x", x)
    check_operand("y", y)
    check_shape("y", y, tuple(x.shape), "(B, …, D) of x")
    check_same("y", y, "x", x)
    check_constant("scale", scale, x.shape[-1:], "(D,) of x", x)
    return bridge_forward_mode("layer_scale_residual", lambda x, y: _run(x, y, scale), x, y)


def _run(x: TensorOrDual, y: TensorOrDual, scale: Tensor) -> TensorOrDual:
    xp, yp = primal_of(x), primal_of(y)
    rows = tangent_rows(x, y)
    x_dot, y_dot = (None, None) if rows is None else (padded_tangent(x, rows), padded_tangent(y, rows))
    serves = {"triton": lambda: rows_unsupported(x=xp, y=yp, scale=scale)}
    if choose("layer_scale_residual", xp.device, serves) == "triton":
        out, out_dot = _forward(xp, yp, x_dot, y_dot, scale)
        if y_dot is None:
            out_dot = x_dot
    else:
        out = reference.layer_scale_residual(xp, yp, scale)
        with torch.no_grad():
            out_dot = None if rows is None else reference.layer_scale_residual_tangent(x_dot, y_dot, scale)
    if not (isinstance(x, Dual) or isinstance(y, Dual)):
        return out
    return Dual(out, None if out_dot is None else out_dot.to(out.dtype))
