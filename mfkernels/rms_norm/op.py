from __future__ import annotations

from torch import Tensor

from ..backend import rows_unsupported
from ..checks import check_constant, check_number, check_rows
from ..dual import TensorOrDual
from ..operator import num_tangent_rows, operator, tangent_or_empty
from ..router import Backend, DualOp
from . import reference

# ------------------------------------------------------------------------------------------- operators and their rules


@operator("rms_norm_forward")
def _forward(x: Tensor, x_dot: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y (B, …, D) and its tangent (B_t, …, D), B_t = 0 where there is none."""
    from .kernels import rms_norm_forward

    y, y_dot = rms_norm_forward(x, x_dot, weight, eps=eps)
    return y, tangent_or_empty(y_dot, y)


@_forward.register_fake
def _(x, x_dot, weight, eps):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), x.new_empty((num_tangent_rows(x_dot), *x.shape[1:]))


@operator("rms_norm_backward", outputs_like=("x", "weight"))
def _backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from .kernels import rms_norm_backward

    return rms_norm_backward(dy, x, weight, eps=eps)


def _saved(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, _, weight, ctx.eps = inputs
    return x, weight


def _gradients(ctx, dy):  # type: ignore[no-untyped-def]
    dx, dweight = _backward(dy, *ctx.saved_tensors, ctx.eps)
    return dx, None, dweight


_forward.register_gradients(_gradients, save=_saved)

# ------------------------------------------------------------------------------------------------- the public function


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
        BackendError: the requested backend cannot serve the call.
        NotImplementedError: `weight` has a tangent.
    """
    return _rms_norm(x, weight, check_number("eps", eps, 0))


def _check(x: TensorOrDual, weight: Tensor) -> None:
    check_rows("x", x)
    check_constant("weight", weight, x.shape[-1:], "(D,) of x", x)


_rms_norm = DualOp(
    "rms_norm",
    ["x"],
    ["weight"],
    check=_check,
    reference=reference.rms_norm,
    tangent=reference.rms_norm_tangent,
    backends={"triton": Backend(_forward, rows_unsupported)},
)
