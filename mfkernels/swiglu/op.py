from __future__ import annotations

import torch

from ..backend import choose
from ..checks import check_operand, check_same, check_shape
from ..dual import Dual, TensorOrDual, bridge_forward_mode, padded_tangent, primal_of, tangent_rows
from . import reference


def swiglu(a: TensorOrDual, b: TensorOrDual) -> TensorOrDual:
    """The gate of a SwiGLU feed-forward network (arXiv 2002.05202), silu(a) ∘ b.

    Tangent: silu'(a)∘ȧ∘b + silu(a)∘ḃ with silu'(a) = σ(a) (1 + a (1 − σ(a))); under `torch.func.jvp` or `forward_ad`
    the same rule serves plain tensors.

    Args:
        a, b: (B, …, D) tensors or Duals, for instance the two halves (views) of one projection; any strides.

    Returns:
        (B, …, D); a Dual if any argument is one.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        NotImplementedError: the backend that was asked for cannot serve the call.
    """
    check_operand("a", a)
    check_operand("b", b)
    check_shape("b", b, tuple(a.shape), "(B, …, D) of a")
    check_same("b", b, "a", a)
    choose("swiglu", a.device, {})
    return bridge_forward_mode("swiglu", _run, a, b)


def _run(a: TensorOrDual, b: TensorOrDual) -> TensorOrDual:
    ap, bp = primal_of(a), primal_of(b)
    y = reference.swiglu(ap, bp)
    if not (isinstance(a, Dual) or isinstance(b, Dual)):
        return y
    rows = tangent_rows(a, b)
    if rows is None:
        return Dual(y)
    with torch.no_grad():
        y_dot = reference.swiglu_tangent(
            a=ap[:rows],
            b=bp[:rows],
            a_dot=padded_tangent(a, rows),
            b_dot=padded_tangent(b, rows),
        )
        return Dual(y, y_dot.to(y.dtype))
