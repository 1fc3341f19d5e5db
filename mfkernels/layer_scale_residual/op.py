from __future__ import annotations

import torch
from torch import Tensor

from ..backend import choose
from ..checks import check_constant, check_operand, check_same, check_shape
from ..dual import Dual, TensorOrDual, bridge_forward_mode, padded_tangent, primal_of, tangent_rows
from . import reference


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
    check_operand("x", x)
    check_operand("y", y)
    check_shape("y", y, tuple(x.shape), "(B, …, D) of x")
    check_same("y", y, "x", x)
    check_constant("scale", scale, x.shape[-1:], "(D,) of x", x)
    choose("layer_scale_residual", x.device, {})
    return bridge_forward_mode("layer_scale_residual", lambda x, y: _run(x, y, scale), x, y)


def _run(x: TensorOrDual, y: TensorOrDual, scale: Tensor) -> TensorOrDual:
    out = reference.layer_scale_residual(primal_of(x), primal_of(y), scale)
    if not (isinstance(x, Dual) or isinstance(y, Dual)):
        return out
    rows = tangent_rows(x, y)
    if rows is None:
        return Dual(out)
    with torch.no_grad():
        out_dot = reference.layer_scale_residual_tangent(padded_tangent(x, rows), padded_tangent(y, rows), scale)
        return Dual(out, out_dot.to(out.dtype))
