from __future__ import annotations

import torch

from ..backend import recorded
from ..calls import kind_of_call, known, remember
from ..checks import check_operand
from ..dual import Dual, TensorOrDual
from ..forward_mode import plain_forward_mode
from . import reference


def silu(x: TensorOrDual) -> TensorOrDual:
    """Sigmoid-weighted linear unit, y = x σ(x); ẏ = ẋ σ(x) (1 + x (1 − σ(x))).

    Args:
        x: (B, …) tensor or Dual.

    Returns:
        (B, …), of the kind of `x`.

    Raises:
        TypeError, ValueError: `x` does not fit; the message says why.
    """
    kind = kind_of_call("silu", x)
    if not known(kind):
        check_operand("x", x)
        remember(kind, True)
    recorded("silu", "reference")  # PyTorch's own everywhere
    return _run(x) if kind else plain_forward_mode("silu", _run, x)


def _run(x: TensorOrDual) -> TensorOrDual:
    if not isinstance(x, Dual):
        return reference.silu(x)
    y = reference.silu(x.primal)
    if x.tangent is None:
        return Dual(y)
    with torch.no_grad():
        return Dual(y, reference.silu_tangent(x.primal[: x.rows], x.tangent))
