from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import recorded
from ..calls import is_untransformed, kind_of_call, known, remember
from ..checks import check_operand, check_parameter, check_shape
from ..dual import Dual, TensorOrDual, primal_of, tangent_of
from ..forward_mode import plain_forward_mode
from ..operator import operator
from ..products import in_dtype, product_dtype, weight_gradient, without_autocast
from . import reference

# ------------------------------------------------------------------------------------------- operator and its rules
# Under autocast alone, whose casts round a weight's gradient.


@operator("linear_forward")
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x_dot: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y (B, …, D_out), its tangent (B_t, …, D_out), B_t = 0 without one; x, weight in `dtype`, (0,) if given so."""
    x_low, low = in_dtype(x, dtype), in_dtype(weight, dtype)
    y = F.linear(x_low, low, None if bias is None else in_dtype(bias, dtype))  # [B, …, D_out]
    y_dot = y.new_empty((0, *y.shape[1:])) if x_dot is None else F.linear(in_dtype(x_dot, dtype), low)
    return y, y_dot, x_low if x_low is not x else y.new_empty(0), low if low is not weight else y.new_empty(0)


@_forward.register_fake
def _(x, weight, bias, x_dot, dtype):  # type: ignore[no-untyped-def]
    y = x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)
    y_dot = y.new_empty((0 if x_dot is None else x_dot.shape[0], *y.shape[1:]))
    return y, y_dot, *(y.new_empty(0) if a.dtype == dtype else torch.empty_like(a, dtype=dtype) for a in (x, weight))


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, weight, bias, _, dtype = inputs
    _, y_dot, *low = output
    ctx.mark_non_differentiable(y_dot, *low)
    ctx.set_materialize_grads(False)
    ctx.bias_dtype, ctx.dtype = None if bias is None else bias.dtype, weight.dtype
    ctx.product_dtype = dtype
    ctx.save_for_backward(x, weight, low[1])  # nothing of the tangent


def _backward_rule(ctx, dy, *_):  # type: ignore[no-untyped-def]
    if dy is None:
        return (None,) * 5
    x, weight, low = ctx.saved_tensors
    if low.shape != weight.shape or torch.is_grad_enabled():  # with create_graph a cast that is differentiated
        low = in_dtype(weight, ctx.product_dtype)
    to_x, to_weight, to_bias = ctx.needs_input_grad[:3]
    rows = dy.reshape(-1, dy.shape[-1])  # [B·…, D_out]
    with without_autocast(dy.device):
        dx = torch.mm(rows, low).view(x.shape) if to_x else None  # [B, …, D_in]
        x = in_dtype(x, ctx.product_dtype).reshape(-1, x.shape[-1])  # [B·…, D_in]
        dweight = weight_gradient(rows, x, ctx.dtype) if to_weight else None  # [D_out, D_in]
        dbias = rows.sum(0, dtype=ctx.bias_dtype) if to_bias else None  # [D_out]
    return dx, dweight, dbias, None, None


_forward.register_autograd(_backward_rule, setup_context=_setup_context)

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
    kind = kind_of_call("linear", x, weight, bias)
    if not known(kind):
        check_linear(x, weight, bias)
        remember(kind, True)
    recorded("linear", "reference")  # PyTorch's own everywhere
    dtype = product_dtype(x)
    casts = dtype != weight.dtype and len(x.shape) > 1 and torch.is_grad_enabled()
    if not casts or not (kind or is_untransformed(x, weight, bias)):
        return plain_forward_mode("linear", _run, x, weight, bias)
    # modes see its products: a counter of FLOPs knows nothing of custom ops
    run = _forward if torch.compiler.is_compiling() else _forward.eager
    y, y_dot, *_ = run(primal_of(x), weight, bias, tangent_of(x), dtype)
    if not isinstance(x, Dual):
        return y
    return Dual(y, None if x.tangent is None else y_dot)


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


def _run(x: TensorOrDual, weight: Tensor, bias: Tensor | None) -> TensorOrDual:
    if not isinstance(x, Dual):
        return reference.linear(x, weight, bias)
    y = reference.linear(x.primal, weight, bias)
    if x.tangent is None:
        return Dual(y)
    with torch.no_grad():
        return Dual(y, reference.linear_tangent(x.tangent, weight))
