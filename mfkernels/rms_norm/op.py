from __future__ import annotations

import torch
from torch import Tensor

from ..backend import choose
from ..checks import check_constant, check_operand
from ..dual import Dual, TensorOrDual, bridge_forward_mode
from . import reference


def rms_norm(x: TensorOrDual, weight: Tensor, *, eps: float = 1e-6) -> TensorOrDual:
    """Root-mean-square norm of the last dimension with a weight per channel, y = x (mean(x²) + eps)^(-1/2) ∘ weight.

    arXiv 1910.07467. Statistics are computed in float32 or better. Tangent: ẏ = rstd·(ẋ − x̂·mean(x̂∘ẋ)) ∘ weight;
    under `torch.func.jvp` or `forward_ad` the same rule serves plain tensors.

    Args:
        x: (B, …, D) tensor or Dual; any strides.
        weight: (D,), a plain multiplier (a norm that stores weight − 1 adds the one before the call); any float dtype.
        eps: added to the mean square, >= 0.

    Returns:
        (B, …, D) in the dtype of `x`, of the kind of `x`.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        NotImplementedError: the backend that was asked for cannot serve the call; `weight` has a tangent.
    """
    check_operand("x", x)
    check_constant("weight", weight, x.shape[-1:], "(D,) of x", x)
    check_eps(eps)
    choose("rms_norm", x.device, {})
    return bridge_forward_mode("rms_norm", lambda x: _run(x, weight, eps), x)


def check_eps(eps: float) -> None:
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps: expected a finite number >= 0, got {eps}")


def _run(x: TensorOrDual, weight: Tensor, eps: float) -> TensorOrDual:
    if not isinstance(x, Dual):
        return reference.rms_norm(x, weight, eps)
    y = reference.rms_norm(x.primal, weight, eps)
    if x.tangent is None:
        return Dual(y)
    with torch.no_grad():
        return Dual(y, reference.rms_norm_tangent(x.primal[: x.rows], weight, x.tangent, eps).to(y.dtype))
