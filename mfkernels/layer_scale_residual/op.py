from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..backend import rows_unsupported
from ..checks import check_constant, check_operand, check_rows, check_same, check_shape
from ..dual import TensorOrDual
from ..operator import num_tangent_rows, operator, tangent_or_empty
from ..router import Backend, DualOp
from . import reference

# ------------------------------------------------------------------------------------------- operators and their rules


@operator("layer_scale_residual_forward")
def _forward(x: Tensor, y: Tensor, x_dot: Tensor | None, y_dot: Tensor | None, scale: Tensor) -> tuple[Tensor, Tensor]:
    """x + scale·y (B, …, D) and its tangent (B_t, …, D), B_t = 0 without a y_dot."""
    from .kernels import layer_scale_residual_forward

    dtype = torch.promote_types(x.dtype, y.dtype)
    out, out_dot = layer_scale_residual_forward(x, y, x_dot, y_dot, scale, dtype=dtype)
    return out, tangent_or_empty(out_dot, out)


@_forward.register_fake
def _(x, y, x_dot, y_dot, scale):  # type: ignore[no-untyped-def]
    out = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, y.dtype))
    return out, out.new_empty((num_tangent_rows(y_dot), *x.shape[1:]))


@operator("layer_scale_residual_backward", outputs_like=("y", "scale"))
def _backward(dout: Tensor, y: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    from .kernels import layer_scale_residual_backward

    return layer_scale_residual_backward(dout, y, scale)


def _saved(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, y, _, _, scale = inputs
    ctx.dtype = x.dtype
    return y, scale


def _gradients(ctx, dout):  # type: ignore[no-untyped-def]
    dy, dscale = _backward(dout, *ctx.saved_tensors)
    return dout.to(ctx.dtype), dy, None, None, dscale


_forward.register_gradients(_gradients, save=_saved)


def _wrapper(
    forward: Callable[..., tuple[Tensor, Tensor]],
    x: Tensor,
    y: Tensor,
    x_dot: Tensor | None,
    y_dot: Tensor | None,
    scale: Tensor,
) -> tuple[Tensor, Tensor | None]:
    out, out_dot = forward(x, y, x_dot, y_dot, scale)
    if y_dot is None:  # the update does not move the tangent
        return out, None if x_dot is None else x_dot.to(out.dtype)
    return out, out_dot


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
        BackendError: the requested backend cannot serve the call.
        NotImplementedError: `scale` has a tangent.
    """
    return _layer_scale_residual(x, y, scale)


def _check(x: TensorOrDual, y: TensorOrDual, scale: Tensor) -> None:
    check_rows("x", x)
    check_operand("y", y)
    check_shape("y", y, tuple(x.shape), "(B, …, D) of x")
    check_same("y", y, "x", x)
    check_constant("scale", scale, x.shape[-1:], "(D,) of x", x)


_layer_scale_residual = DualOp(
    "layer_scale_residual",
    ["x", "y"],
    ["scale"],
    check=_check,
    reference=reference.layer_scale_residual,
    tangent=reference.layer_scale_residual_tangent,
    backends={"triton": Backend(_forward, rows_unsupported, wrapper=_wrapper)},
)
