from __future__ import annotations

from ..checks import check_operand
from ..dual import TensorOrDual
from ..router import DualOp
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
    return _silu(x)


def _check(x: TensorOrDual) -> None:
    check_operand("x", x)


_silu = DualOp("silu", ["x"], check=_check, reference=reference.silu, tangent=reference.silu_tangent)
