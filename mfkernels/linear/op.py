from __future__ import annotations

import torch
from torch import Tensor

from ..backend import choose
from ..checks import check_operand, check_parameter, check_shape
from ..dual import Dual, TensorOrDual
from ..forward_mode import plain_forward_mode
from . import reference


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
    check_operand("x", x)
    if len(x.shape) == 0:
        raise ValueError("x: expected (…, D_in), got a single number")
    check_parameter("weight", weight, 2, x)
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x: expected last size {weight.shape[1]} (D_in of weight), got shape {tuple(x.shape)}")
    if bias is not None:
        check_parameter("bias", bias, 1, x)
        check_shape("bias", bias, (weight.shape[0],), "(D_out,) of weight")
    choose("linear", x.device, {})
    return plain_forward_mode("linear", _run, x, weight, bias)


def _run(x: TensorOrDual, weight: Tensor, bias: Tensor | None) -> TensorOrDual:
    if not isinstance(x, Dual):
        return reference.linear(x, weight, bias)
    y = reference.linear(x.primal, weight, bias)
    if x.tangent is None:
        return Dual(y)
    with torch.no_grad():
        return Dual(y, reference.linear_tangent(x.tangent, weight))
