from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..calls import is_untransformed
from ..checks import check_operand, check_parameter, check_shape
from ..dual import TensorOrDual
from ..operator import num_tangent_rows, operator, tangent_or_empty
from ..products import in_dtype, product_dtype, weight_gradient, without_autocast
from ..router import Decision, DualOp, run_on_duals
from . import reference

# ------------------------------------------------------------------------------------------- operator and its rules
# Used under autocast only, whose casts round a weight's gradient.


@operator("linear_forward")
def _forward(
    x: Tensor, x_dot: Tensor | None, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y (B, …, D_out), its tangent (B_t, …, D_out), B_t = 0 without one; x, weight in `dtype`, (0,) if given so."""
    x_low, low = in_dtype(x, dtype), in_dtype(weight, dtype)
    y = F.linear(x_low, low, None if bias is None else in_dtype(bias, dtype))  # [B, …, D_out]
    y_dot = None if x_dot is None else F.linear(in_dtype(x_dot, dtype), low)  # [B_t, …, D_out]
    return (
        y,
        tangent_or_empty(y_dot, y),
        x_low if x_low is not x else y.new_empty(0),
        low if low is not weight else y.new_empty(0),
    )


@_forward.register_fake
def _(x, x_dot, weight, bias, dtype):  # type: ignore[no-untyped-def]
    y = x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)
    y_dot = y.new_empty((num_tangent_rows(x_dot), *y.shape[1:]))
    return y, y_dot, *(y.new_empty(0) if a.dtype == dtype else torch.empty_like(a, dtype=dtype) for a in (x, weight))


def _saved(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, _, weight, bias, ctx.product_dtype = inputs
    ctx.bias_dtype, ctx.dtype = None if bias is None else bias.dtype, weight.dtype
    return x, weight, output[3]


def _gradients(ctx, dy):  # type: ignore[no-untyped-def]
    x, weight, low = ctx.saved_tensors
    if low.shape != weight.shape or torch.is_grad_enabled():  # with create_graph a cast that is differentiated
        low = in_dtype(weight, ctx.product_dtype)
    to_x, _, to_weight, to_bias, _ = ctx.needs_input_grad
    rows = dy.reshape(-1, dy.shape[-1])  # [B·…, D_out]
    with without_autocast(dy.device):
        dx = torch.mm(rows, low).view(x.shape) if to_x else None  # [B, …, D_in]
        x = in_dtype(x, ctx.product_dtype).reshape(-1, x.shape[-1])  # [B·…, D_in]
        dweight = weight_gradient(rows, x, ctx.dtype) if to_weight else None  # [D_out, D_in]
        dbias = rows.sum(0, dtype=ctx.bias_dtype) if to_bias else None  # [D_out]
    return dx, None, dweight, dbias


_forward.register_gradients(_gradients, save=_saved)

# ------------------------------------------------------------------------------------------------- the public function


def linear(x: TensorOrDual, weight: Tensor, bias: Tensor | None = None) -> TensorOrDual:
    """Affine map of the last dimension, y = x Wᵀ + b; ẏ = ẋ Wᵀ.

    Args:
        x: (B, …, D_in) tensor or Dual.
        weight: (D_out, D_in).
        bias: (D_out,) or None.

    Returns:
        (B, …, D_out), of the kind of `x`.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    return _linear(x, weight, bias)


def check_linear(x: TensorOrDual, weight: Tensor, bias: Tensor | None) -> None:
    check_operand("x", x)
    if len(x.shape) == 0:
        raise ValueError("x: expected (…, D_in), got a single number")
    check_parameter("weight", weight, 2, x)
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x: expected last size {weight.shape[1]} (D_in of weight), got shape {tuple(x.shape)}")
    if bias is not None:
        check_parameter("bias", bias, 1, x)
        check_shape("bias", bias, (weight.shape[0],), "(D_out,) of weight")


class _Linear(DualOp):
    """Where autocast casts the weight, an op of its own, whose backward does not round the weight's gradient."""

    def run(self, decision: Decision, arguments: tuple[Any, ...], *, eager: bool) -> TensorOrDual:
        x, weight, bias = arguments
        (dtype,) = decision.derived
        casts = dtype != weight.dtype and len(x.shape) > 1 and torch.is_grad_enabled()
        if not casts or not (eager or is_untransformed(x, weight, bias)):
            return super().run(decision, arguments, eager=eager)
        return run_on_duals(_forward.visible_to_modes, (x,), (weight, bias, dtype))


_linear = _Linear(
    "linear",
    ["x"],
    ["weight", "bias"],
    check=check_linear,
    reference=reference.linear,
    tangent=reference.linear_tangent,
    derived=lambda x, weight, bias: (product_dtype(x),),
)
