from __future__ import annotations

import torch

from ..ada_layer_norm.op import check_ada_layer_norm
from ..ada_layer_norm.op import run as run_ada_layer_norm
from ..backend import choose
from ..checks import check_operand, check_same, check_shape
from ..dual import Dual, TensorOrDual, padded_tangent, primal_of, tangent_rows
from . import reference


def gated_residual(x: TensorOrDual, y: TensorOrDual, gate: TensorOrDual) -> TensorOrDual:
    """The residual update of an adaLN-Zero block (arXiv 2212.09748, §3.2): x + gate·y.

    Tangent: ẋ + gate_dot·y + gate·ẏ.

    Args:
        x, y: (B, N, D) tensors or Duals.
        gate: (B, D) tensor or Dual; a view with any strides.

    Returns:
        (B, N, D); a Dual if any argument is one.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    _check(x, y, gate)
    choose("gated_residual", x.device, {})
    return _run(x, y, gate)


def gated_residual_ada_layer_norm(
    x: TensorOrDual,
    y: TensorOrDual,
    gate: TensorOrDual,
    shift: TensorOrDual,
    scale: TensorOrDual,
    *,
    eps: float = 1e-6,
) -> tuple[TensorOrDual, TensorOrDual]:
    """A block's residual update and the adaptive layer norm that follows it, one after the other.

    Args:
        x, y: (B, N, D) tensors or Duals.
        gate, shift, scale: (B, D) tensors or Duals; views with any strides.
        eps: added to the variance, >= 0.

    Returns:
        `(x + gate·y, ada_layer_norm(x + gate·y, shift, scale))`, both (B, N, D).

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    _check(x, y, gate)
    check_ada_layer_norm(x, shift, scale, eps)
    choose("gated_residual_ada_layer_norm", x.device, {})
    x = _run(x, y, gate)
    return x, run_ada_layer_norm(x, shift, scale, eps)


def _check(x: TensorOrDual, y: TensorOrDual, gate: TensorOrDual) -> None:
    check_operand("x", x, 3)
    check_operand("y", y, 3)
    check_shape("y", y, tuple(x.shape), "(B, N, D) of x")
    check_same("y", y, "x", x)
    check_operand("gate", gate, 2)
    check_shape("gate", gate, (x.shape[0], x.shape[2]), "(B, D) of x")
    check_same("gate", gate, "x", x)


def _run(x: TensorOrDual, y: TensorOrDual, gate: TensorOrDual) -> TensorOrDual:
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
